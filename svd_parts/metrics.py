"""How much a clip moves, how a generated clip is scored, and reading a run's metrics.jsonl."""

import contextlib
import math
from pathlib import Path

import cv2
import numpy as np

from svd_parts.files import UserError, parse_object


def optical_flow(first, second, preset=cv2.DISOPTICAL_FLOW_PRESET_MEDIUM):
    """Dense flow (H, W, 2) in pixels between two uint8 images, RGB or grey: OpenCV's DIS."""
    first, second = (cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) if f.ndim == 3 else f for f in (first, second))
    return cv2.DISOpticalFlow_create(preset).calc(first, second, None)


MOTION_SIZE = 128  # pixels of the longer side at which motion is measured, so that it does not depend on the resolution
MOTION_MIDDLE, MOTION_EXPONENT = 1.5, 0.5  # the motion in the middle of the buckets, and how they spread around it


def motion_stride(fps):
    """Frames between the two pictures of a motion measurement: about a tenth of a second, whatever the fps."""
    return max(1, round(fps / 10))


def motion_thumbnail(frame, to_grey=cv2.COLOR_RGB2GRAY):
    """(H, W, 3) -> grey, the longer side at most `MOTION_SIZE`: what `flow_magnitude` compares."""
    step = max(1, max(frame.shape[:2]) // (2 * MOTION_SIZE))  # every step-th pixel first: area averaging is slow
    frame = frame[::step, ::step]
    scale = MOTION_SIZE / max(frame.shape[:2])
    if scale < 1:
        size = (max(8, round(frame.shape[1] * scale)), max(8, round(frame.shape[0] * scale)))
        frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(frame, to_grey)


def flow_magnitude(first, second):
    """Mean length of the optical flow between two thumbnails, in percent of the longer side: DIS, fast preset."""
    h, w = first.shape
    if min(h, w) < 32:  # DIS needs some room
        pad = (0, max(0, 32 - h), 0, max(0, 32 - w), cv2.BORDER_REPLICATE)
        first, second = cv2.copyMakeBorder(first, *pad), cv2.copyMakeBorder(second, *pad)
    flow = optical_flow(first, second, cv2.DISOPTICAL_FLOW_PRESET_FAST)[:h, :w]
    return 100 * float(np.nan_to_num(np.hypot(flow[..., 0], flow[..., 1])).mean()) / max(h, w)


def clip_motion(frames, fps):
    """How much a clip (T, H, W, 3) RGB moves: mean optical flow in percent of the longer side per second."""
    stride = min(motion_stride(fps), max(1, len(frames) - 1))
    thumbnails = [motion_thumbnail(frame) for frame in frames[::stride]]
    flows = [flow_magnitude(first, second) for first, second in zip(thumbnails, thumbnails[1:])]
    return float(np.mean(flows)) * fps / stride if flows else 0.0


def motion_bucket(motion):
    """`clip_motion` -> motion_bucket_id: 255 * m^p / (m^p + middle^p). The scale is ours: Stability's is not public."""
    powered = max(motion, 0.0) ** MOTION_EXPONENT
    return round(255 * powered / (powered + MOTION_MIDDLE**MOTION_EXPONENT))


def ssim(first, second):
    """Structural similarity of two (H, W, 3) uint8 images: Gaussian window, sigma 1.5 (Wang et al. 2004)."""
    x, y = first.astype(np.float64), second.astype(np.float64)

    def mean(image):
        return cv2.GaussianBlur(image, (11, 11), 1.5)

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(score[5:-5, 5:-5].mean())  # the border has no full window


def psnr(squared_error):
    """Decibels of a mean squared error on the 0..255 scale; infinite for equal pictures."""
    return float(10 * np.log10(255**2 / squared_error)) if squared_error > 0 else float("inf")


def video_metrics(generated, real):
    """Scores a generated continuation against the real one of the same first frame, frames 1..T-1.

    generated, real: (T, H, W, 3) uint8 RGB. Returns
      psnr, ssim     over whole frames: a static background wins these, they prove little alone
      psnr_moving    dB over moving pixels (|real - frame 0| > 20 of 255 in any channel, dilated 3x3)
      motion_ratio   mean |frame difference|, generated over real: 0 is a frozen video, 1 moves as much
      flow_error     end-point error of DIS flow on moving pixels, pixels a frame; flow_cosine its direction
    Values are None where the real clip does not move.
    """
    length = min(len(generated), len(real))
    generated, real = np.asarray(generated)[:length], np.asarray(real)[:length]
    error = (generated[1:].astype(np.float64) - real[1:]) ** 2
    moving = np.abs(real[1:].astype(np.int16) - real[0]).max(axis=3) > 20
    moving = np.stack([cv2.dilate(m.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0 for m in moving])
    step, real_step = (np.abs(np.diff(video.astype(np.float64), axis=0)).mean() for video in (generated, real))
    scores = dict.fromkeys(("psnr", "ssim", "psnr_moving", "motion_ratio", "flow_error", "flow_cosine"))
    scores["psnr"] = psnr(error.mean())
    scores["ssim"] = float(np.mean([ssim(g, r) for g, r in zip(generated[1:], real[1:])]))
    if real_step > 0:
        scores["motion_ratio"] = float(step / real_step)
    if moving.any():
        flow, truth = (
            np.concatenate([optical_flow(video[t], video[t + 1])[moving[t]] for t in range(length - 1)])
            for video in (generated, real)
        )
        dot, norms = (flow * truth).sum(1), np.linalg.norm(flow, axis=1) * np.linalg.norm(truth, axis=1)
        scores["psnr_moving"] = psnr(error[moving].mean())
        scores["flow_error"] = float(np.linalg.norm(flow - truth, axis=1).mean())
        scores["flow_cosine"] = float(dot.sum() / max(norms.sum(), 1e-9))
    return scores


def sharpness(frame):
    """Variance of the Laplacian of (H, W, 3) RGB: falls when a picture blurs."""
    return float(cv2.Laplacian(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var())


def clip_measures(frames, image, fps):
    """Measures of a generated clip (T, H, W, 3) RGB that need no real one; image: its input, at the clip's size.

    motion            as `clip_motion`; measured_motion_bucket_id is its bucket
    sharpness_ratio   `sharpness`, mean of the last quarter of the frames over frame 0: below 1 it blurs
    psnr_first_frame  dB of frame 0 to the image; at most 100, which stands for equal
    flicker           mean |change| of a frame's mean brightness to the next, in levels of 255; what only moves within
                      the picture hardly changes that mean, so motion is not compensated
    """
    motion, start = clip_motion(frames, fps), sharpness(frames[0])
    end = np.mean([sharpness(frame) for frame in frames[-max(1, len(frames) // 4) :]])
    brightness = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).mean() for frame in frames]
    return {
        "motion": round(motion, 4),
        "measured_motion_bucket_id": motion_bucket(motion),
        "sharpness_ratio": round(float(end / start), 4) if start else None,  # none where frame 0 is of one colour
        "psnr_first_frame": round(min(psnr(((frames[0] - image.astype(np.float64)) ** 2).mean()), 100.0), 2),
        "flicker": round(float(np.abs(np.diff(brightness)).mean()), 4),
    }


LOWER_IS_BETTER = ("loss_v", "flow_error")


def mean_scores(scores):
    """The mean of each metric over the clips that have it."""
    values = {name: [score[name] for score in scores if score[name] is not None] for name in scores[0]}
    return {name: float(np.mean(given)) for name, given in values.items() if given}


def finite(values):
    """The numbers as JSON has them: null for what is not finite (a step that overflowed in fp16, equal pictures)."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def read_metrics(output_dir):
    """The lines of a run's metrics.jsonl, without those that a crash cut off."""
    path, lines = Path(output_dir) / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(UserError):
            lines.append(parse_object(line, damaged=""))
    return [line for line in lines if isinstance(line.get("step"), int)]
