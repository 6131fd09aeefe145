"""What two or three of the scripts share: frames and videos, video metrics, SVD's parts and its conditioning.

torch and diffusers are imported inside the functions that use them, so that preparing a dataset needs neither.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

# Read once, when cv2, torch and transformers are imported; what the user has set stays.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # no decoder chatter
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait: 10 times slower on a busy CPU
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # fewer fragments: 14.5 GiB, not 14.9
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else: torchvision is missing, which SVD does not use

import cv2
import numpy as np

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PNG_OPTIONS = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
PNG_OPTIONS += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]  # the fastest lossless settings measured
PNG_OPTIONS += [cv2.IMWRITE_PNG_ZLIBBUFFER_SIZE, 1 << 16]


class UserError(Exception):
    """A mistake of the user or of a file: one line that says what is wrong, where, and the cure."""


def run_script(main):
    """Runs `main()`; a `UserError` or a full disk becomes one line and exit status 2 or 1, Ctrl-C 130."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error.filename or 'disk'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------- frames


def natural_key(name):
    """Sorts `frame2` before `frame10`: digits compare as numbers."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(name))]


def list_frames(folder):
    """The image files of one clip folder, in frame order."""
    names = [entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")]
    return [Path(folder) / n for n in sorted(names, key=natural_key) if n.lower().endswith(IMAGE_SUFFIXES)]


def read_image(path):
    """Reads any still image as people see it: EXIF rotation applied, alpha over white, grey and CMYK to RGB.

    Returns (H, W, 3) uint8 RGB. Raises `UserError` for a file that is no readable image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16") or image.mode == "I":  # 16-bit grey: PIL would clip, not scale
                image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such image file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({error})") from None


def read_frame(path):
    """Reads one frame of a clip as (H, W, 3) uint8 RGB: fast for plain PNG and JPEG, `read_image` for the rest."""
    data = np.fromfile(path, np.uint8)
    frame = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
    if frame is None or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        return read_image(path)
    return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


def fit_frame(frame, width, height):
    """Resizes (H, W, 3) so that it covers `width` x `height`, keeping the aspect ratio, then crops the centre.

    Area averaging when shrinking (no aliasing), bicubic when enlarging. A frame of the right size is returned as it is.
    """
    h, w = frame.shape[:2]
    scale = max(width / w, height / h)
    if scale != 1:
        size = max(width, round(w * scale)), max(height, round(h * scale))
        frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (frame.shape[0] - height) // 2, (frame.shape[1] - width) // 2
    return np.ascontiguousarray(frame[top : top + height, left : left + width])


def write_file(path, data):
    """Writes bytes or text beside `path`, flushes to disk and renames: the file is whole or not there."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def write_folder(path):
    """Gives a folder beside `path` to write into and renames it at the end: `path` is whole or not there.

    What a killed run left there goes first; after an error (a full disk) nothing stays.
    """
    aside = path.with_name(f".{path.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextlib.contextmanager
def lock_file(path, busy, shared=False):
    """Holds a lock on the file `path`, made where it is missing, until the block or the process ends in whatever way.

    Raises `UserError(busy)` where another process holds it; `shared` locks bear each other.
    """
    with open(path, "a") as file:
        with contextlib.suppress(ImportError):  # no such locks on Windows
            import fcntl

            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(busy) from None
            except OSError:  # a file system without locks
                pass
        yield


def file_digest(path):
    """SHA-256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def encode_png(frame):
    """(H, W, 3) RGB -> PNG bytes."""
    return cv2.imencode(".png", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), PNG_OPTIONS)[1].tobytes()


def write_video(path, frames, fps):
    """Writes (T, H, W, 3) uint8 RGB as H.264 yuv420p mp4 that browsers and phones play; whole or not at all.

    An odd width or height loses its last column or row: H.264 with 4:2:0 has even sizes only.
    """
    import imageio_ffmpeg

    path = Path(path)
    aside = path.with_name(f".{path.stem}.{os.getpid()}.part.mp4")
    frames = np.asarray(frames)[:, : frames[0].shape[0] // 2 * 2, : frames[0].shape[1] // 2 * 2]
    writer = imageio_ffmpeg.write_frames(
        str(aside),
        (frames.shape[2], frames.shape[1]),
        fps=fps,
        codec="libx264",
        pix_fmt_out="yuv420p",
        macro_block_size=2,
        output_params=["-crf", "14", "-movflags", "+faststart"],
    )
    try:
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        if len(read_video(aside)) != len(frames):  # ffmpeg does not tell of a disk that fills up with its last write
            raise UserError("incomplete")
        os.replace(aside, path)
    except UserError:
        raise OSError(errno.ENOSPC, "not written whole; is the disk full?", str(path)) from None
    finally:
        aside.unlink(missing_ok=True)


def read_video(path):
    """Decodes a short, well-behaved video (one that `write_video` wrote) to (T, H, W, 3) uint8 RGB."""
    capture, frames = cv2.VideoCapture(os.fspath(path)), []
    while True:
        ok, frame = capture.read()
        if not ok:
            break
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    if not frames:
        raise UserError(f"{path}: no frame could be read")
    return np.stack(frames)


def label_frames(frames, text):
    """Puts a white strip with `text` above every frame of (T, H, W, 3)."""
    frames = np.asarray(frames)
    strip = np.full((24, frames.shape[2], 3), 255, np.uint8)
    scale = min(
        0.5, 0.5 * (frames.shape[2] - 8) / max(cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)[0][0], 1)
    )
    cv2.putText(strip, text, (4, 16), cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 1, cv2.LINE_AA)
    return np.stack([np.concatenate([strip, frame]) for frame in frames])


def side_by_side(videos, min_width=256):
    """`{label: (T, H, W, 3)}` -> one labelled video, the shortest's length; small ones enlarged to be seen."""
    length = min(len(video) for video in videos.values())
    scale = max(1, -(-min_width // next(iter(videos.values())).shape[2]))
    columns = []
    for text, video in videos.items():
        big = [cv2.resize(f, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC) for f in video[:length]]
        columns.append(label_frames(big, text))
    return np.concatenate(columns, axis=2)


# ------------------------------------------------------------------------------------------------- dataset folder


def read_metadata(dataset_dir):
    """`metadata.jsonl` of a prepared dataset as `{directory: record}`; empty where there is none (plain folders)."""
    path, records = Path(dataset_dir) / "metadata.jsonl", {}
    if not path.exists():
        return records
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line) if line.strip() else None
            if record and "directory" in record:
                records[record["directory"]] = record
        except (json.JSONDecodeError, TypeError):
            raise UserError(
                f"{path} line {number}: not a JSON object; repair it or prepare the dataset again"
            ) from None
    return records


def list_clips(dataset_dir):
    """Every clip of a dataset folder: records with `directory`, `frames` (paths) and `root`, in name order.

    A clip is any folder that holds images. `metadata.jsonl` gives fps and motion where it has a line for the folder.
    Raises `UserError` where there is no such folder or no clip in it.
    """
    root = Path(dataset_dir)
    if not root.is_dir():
        raise UserError(f"--dataset_dir {root}: no such folder; make it with prepare_dataset.py")
    metadata, clips = read_metadata(root), []
    for folder, subfolders, _ in os.walk(root):
        subfolders[:] = sorted((s for s in subfolders if not s.startswith(".")), key=natural_key)
        directory = Path(folder).relative_to(root).as_posix()
        frames = list_frames(folder)
        if folder != str(root) and frames:
            clips.append({**metadata.get(directory, {}), "directory": directory, "frames": frames, "root": root})
    if not clips:
        raise UserError(
            f"{root}: holds no folder of frames; expected {root}/<video>/00000.png, from prepare_dataset.py"
        )
    return clips


def clip_group(clip):
    """What must stay together when clips are held out: all cameras of one LeRobot episode, else the video itself."""
    source = str(clip.get("group") or clip.get("source") or clip["directory"])
    episode = re.match(r"(.*?)videos/(chunk-\d+)/[^/]+/(episode_\d+)", source)
    return "/".join(episode.groups()) if episode else source


# ---------------------------------------------------------------------------------------------- motion and metrics


def optical_flow(first, second):
    """Dense flow (H, W, 2) in pixels between two uint8 images, RGB or grey: OpenCV's DIS, medium preset."""
    first, second = (cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) if f.ndim == 3 else f for f in (first, second))
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(first, second, None)


MOTION_SIZE = 128  # pixels of the longer side at which motion is measured, so that it does not depend on the resolution
MOTION_MIDDLE, MOTION_EXPONENT = 1.5, 0.5  # the motion that is given bucket 127, and how the buckets spread around it


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
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST).calc(first, second, None)[:h, :w]
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
    real_step = np.abs(np.diff(real.astype(np.float64), axis=0)).mean()
    scores = {
        "psnr": psnr(error.mean()),
        "ssim": float(np.mean([ssim(g, r) for g, r in zip(generated[1:], real[1:])])),
        "psnr_moving": psnr(error[moving].mean()) if moving.any() else None,
        "motion_ratio": float(np.abs(np.diff(generated.astype(np.float64), axis=0)).mean() / real_step)
        if real_step > 0
        else None,
        "flow_error": None,
        "flow_cosine": None,
    }
    if moving.any():
        flows = [
            (optical_flow(generated[t], generated[t + 1])[moving[t]], optical_flow(real[t], real[t + 1])[moving[t]])
            for t in range(length - 1)
        ]
        flow, truth = (np.concatenate(part) for part in zip(*flows))
        dot, norms = (flow * truth).sum(1), np.linalg.norm(flow, axis=1) * np.linalg.norm(truth, axis=1)
        scores["flow_error"] = float(np.linalg.norm(flow - truth, axis=1).mean())
        scores["flow_cosine"] = float(dot.sum() / max(norms.sum(), 1e-9))
    return scores


# ---------------------------------------------------------------------------------------------------- SVD's parts

PARTS = ("unet", "vae", "image_encoder", "scheduler", "feature_extractor")
MODEL_PARTS = PARTS[:3]
# The published configurations, where they differ from the classes' defaults; a plan needs nothing else.
SVD_XT_CONFIG = {
    "unet": {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 1024, "num_frames": 25},
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "latent_channels": 4,
        "layers_per_block": 2,
    },
    "image_encoder": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 16,
        "num_hidden_layers": 32,
        "patch_size": 14,
        "projection_dim": 1024,
    },
}
SVD_CONFIGS = {
    f"stabilityai/stable-video-diffusion-{kind}": SVD_XT_CONFIG for kind in ("img2vid", "img2vid-xt", "img2vid-xt-1-1")
}
CHECKPOINT_STATE = "training_state.json"  # what makes a folder a checkpoint of train_svd.py
SETTINGS = "training_settings.json"  # beside every result: what it was trained with

HUB_HELP = """{name}: {what}. Three ways to get the weights:
  1. accept the licence at https://huggingface.co/{name} , then: pip install -U huggingface_hub && hf auth login
  2. in mainland China: export HF_ENDPOINT=https://hf-mirror.com HF_TOKEN=hf_... , then run the same command again
  3. download the folder on another machine (hf download {name} --exclude "svd*.safetensors"), copy it here whole,
     and give the folder's path in place of the name"""


def resolve_model(name):
    """A hub name or local folder -> the local folder of a complete diffusers pipeline in safetensors.

    Raises `UserError` that says exactly what is missing and how to get it. Never reads pickled weights.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        looks_local = folder.is_absolute() or str(name).startswith((".", "~")) or len(folder.parts) != 2
        if looks_local or folder.exists() or folder.parent.is_dir():
            raise UserError(f"{name}: no such model folder (and not a hub name, which has the form owner/name)")
        folder = download_model(str(name))
    if not (folder / "model_index.json").is_file():
        checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda c: natural_key(c.name))
        hint = f"; its newest checkpoint is {checkpoints[-1]}: use that" if checkpoints else ""
        raise UserError(f"{folder}: no finished diffusers pipeline here (model_index.json is missing){hint}")
    for part in PARTS:
        if part in MODEL_PARTS:
            read_config(folder, part)
            weight_files(folder, part)
        elif not list((folder / part).glob("*.json")):
            raise UserError(f"{folder}: {part}/ has no configuration (.json); copy the folder again, whole")
    return folder


def resolve_config(name):
    """A model name -> a folder (or, for SVD itself, a dict) with the configuration of its parts; needs no weights."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import hf_hub_download

    try:
        local = str(name) in SVD_CONFIGS  # what the cache has, or what we know: no network needed to plan
        paths = [hf_hub_download(str(name), f"{part}/config.json", local_files_only=local) for part in MODEL_PARTS]
        return Path(paths[0]).parent.parent
    except Exception as error:  # the hub's many errors, and names that it refuses
        if str(name) in SVD_CONFIGS:
            return SVD_CONFIGS[str(name)]
        raise UserError(HUB_HELP.format(name=name, what=f"no configuration ({type(error).__name__})")) from None


def download_model(name):
    """Downloads (or finds in the cache) a pipeline of the hub: full-precision safetensors, or fp16 if it has no other.

    Everything that can go wrong at the hub becomes one `UserError` with the three ways to get the weights.
    """
    from diffusers import DiffusionPipeline
    from huggingface_hub import errors

    for variant in (None, "fp16"):
        try:
            return Path(DiffusionPipeline.download(name, variant=variant, use_safetensors=True))
        except errors.GatedRepoError:
            what = "the weights are gated: no login, or its licence is not accepted yet"
        except errors.RepositoryNotFoundError:
            what = "no such model on the hub, or it is private and there is no login"
        except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
            what = f"the hub cannot be reached, and the model is not in the cache ({type(error).__name__})"
            if variant is None and "safetensors" in str(error):
                continue  # no full-precision safetensors: try the fp16 files
        except ValueError as error:
            what = f"not usable from the hub ({str(error).splitlines()[0]})"
        raise UserError(HUB_HELP.format(name=name, what=what))


def read_config(folder, part):
    """`<folder>/<part>/config.json` as a dict, readable before any weight is loaded."""
    if isinstance(folder, dict):
        return folder[part]
    path = Path(folder) / part / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: {part}/config.json is missing; copy the model folder again, whole") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); copy the model folder again") from None


def weight_files(folder, part):
    """The safetensors files of a part, full precision first, the fp16 files where the folder has only those.

    Raises `UserError` for missing, pickled-only, git-lfs-pointer and cut-off files.
    """
    folder, stem = Path(folder) / part, "model" if part == "image_encoder" else "diffusion_pytorch_model"
    for single, index in (
        (f"{stem}.safetensors", f"{stem}.safetensors.index.json"),
        (f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"),
    ):
        files = [folder / single] if (folder / single).exists() else []
        if (folder / index).exists():
            try:
                shards = json.loads((folder / index).read_text())["weight_map"].values()
                files = [folder / shard for shard in sorted(set(shards))]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{folder / index}: damaged; download it again") from None
        if files:
            break
    else:
        pickled = [p.name for p in folder.glob("*.bin")]
        why = f"only pickled weights ({pickled[0]}), which are never loaded: unpickling runs code" if pickled else "no"
        raise UserError(f"{folder}: {why} {stem}.safetensors or {stem}.fp16.safetensors; download it into this folder")
    for file in files:
        if not file.exists():
            raise UserError(f"{file}: missing; download it into this folder")
        safetensors_header(file)
    return files


def safetensors_header(file):
    """The header of a safetensors file: `{tensor name: {dtype, shape, data_offsets}}`, offsets from the file's start.

    Raises `UserError` where the file is a git-lfs pointer or shorter than its header says.
    """
    with open(file, "rb") as opened:
        head = opened.read(8)
        if head.startswith(b"version"):
            raise UserError(
                f"{file}: a git-lfs pointer, not the weights; run `git lfs pull`, or download the file itself"
            )
        size = int.from_bytes(head, "little")
        try:
            header = json.loads(opened.read(min(size, 100_000_000)))
            header.pop("__metadata__", None)
            for tensor in header.values():
                tensor["data_offsets"] = [8 + size + offset for offset in tensor["data_offsets"]]
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=8 + size)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{file}: not a safetensors file, or a damaged one; download it again") from None
    if os.path.getsize(file) != end:
        raise UserError(f"{file}: cut off ({os.path.getsize(file):,} of {end:,} bytes); download it again")
    return header


def weights_fingerprint(folder, part):
    """A hash that tells two sets of weights apart, without reading gigabytes: the head of every tensor."""
    digest = hashlib.sha256()
    for file in weight_files(folder, part):
        with open(file, "rb") as opened:
            for name, tensor in sorted(safetensors_header(file).items()):
                start, end = tensor["data_offsets"]
                opened.seek(start)
                digest.update(f"{name} {tensor['dtype']} {tensor['shape']}".encode())
                digest.update(opened.read(min(end - start, 4096)))
    return digest.hexdigest()[:16]


def size_multiple(folder):
    """What width and height must be multiples of: the VAE's factor times the UNet's downsampling; 64 for SVD."""
    levels = [len(read_config(folder, part)["block_out_channels"]) - 1 for part in ("vae", "unet")]
    return 2 ** sum(levels)


def check_sizes(args, folder):
    """Refuses `--width` and `--height` that the model cannot take, from its configuration alone."""
    multiple = size_multiple(folder)
    for flag, value in (("--width", args.width), ("--height", args.height)):
        if value % multiple:
            near = max(multiple, round(value / multiple) * multiple)
            raise UserError(
                f"{flag} must be a multiple of {multiple} for this model, got {value}; the nearest is {near}"
            )


def convolve(module, x, weight, bias):
    """The forward pass of a convolution with these weights; in half precision SVD's 3-D ones become 2-D, equal.

    All of SVD's 3-D kernels are (3, 1, 1): over (B, C, T, H * W) they are 2-D. cuDNN 9.8 to 9.14 has no fast 3-D
    convolution in half precision (pytorch#166122), and oneDNN's bf16 backward pass on a CPU does not come to its end.
    """
    import torch

    if x.ndim < 5 or x.dtype in (torch.float32, torch.float64) or module.kernel_size[1:] != (1, 1):
        return module._conv_forward(x, weight, bias)
    out = torch.nn.functional.conv2d(x.flatten(3), weight.flatten(3), bias, padding=(module.padding[0], 0))
    return out.unflatten(3, x.shape[3:])


def avoid_conv3d(model):
    """Lets the 3-D convolutions of a UNet or VAE go through `convolve`, in place."""
    from torch.nn import Conv3d

    for module in model.modules():
        if isinstance(module, Conv3d):
            module.forward = lambda x, module=module: convolve(module, x, module.weight, module.bias)


def is_out_of_memory(error):
    """Whether the GPU's memory was not enough, which torch, cuBLAS and cuDNN say in different words."""
    import torch

    names = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "ALLOCATION_FAILED", "unable to find an engine")
    return isinstance(error, torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(name in str(error) for name in names)
    )


def load_part(folder, part, dtype):
    """One model part in `dtype`, on the CPU, in eval mode, from safetensors alone."""
    from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        if part == "scheduler":
            return EulerDiscreteScheduler.from_pretrained(folder, subfolder=part)
        if part == "feature_extractor":
            return CLIPImageProcessor.from_pretrained(folder, subfolder=part)
        variant = "fp16" if ".fp16" in weight_files(folder, part)[0].name else None
        options = {"subfolder": part, "variant": variant, "use_safetensors": True, "local_files_only": True}
        if part == "image_encoder":
            return CLIPVisionModelWithProjection.from_pretrained(folder, dtype=dtype, **options).eval()
        cls = UNetSpatioTemporalConditionModel if part == "unet" else AutoencoderKLTemporalDecoder
        return cls.from_pretrained(folder, torch_dtype=dtype, **options).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}/{part}: cannot be loaded ({str(error).strip().splitlines()[0]})") from error


def load_pipeline(name, dtype):
    """A stock `StableVideoDiffusionPipeline` on the CPU in `dtype`, and what it was trained with.

    name: a hub name, a pipeline folder, or a checkpoint of train_svd.py, which is laid over the base that it names.
    Returns (pipeline, settings); settings is {} for a model that was not trained here.
    """
    from diffusers import StableVideoDiffusionPipeline

    folder, settings, trained = resolve_checkpoint(name)
    parts = {part: load_part(folder, part, dtype) for part in PARTS}
    if trained is not None:
        lay_over(parts["unet"], trained)
    return StableVideoDiffusionPipeline(**parts), settings


def resolve_checkpoint(name):
    """A model name -> (pipeline folder, training settings, trained-weights file or None): reads no weights."""
    folder = Path(name).expanduser()
    state_file = folder / CHECKPOINT_STATE
    if not state_file.is_file():
        folder = resolve_model(name)
        settings_file = folder / SETTINGS
        try:
            return folder, json.loads(settings_file.read_text()) if settings_file.is_file() else {}, None
        except ValueError:
            raise UserError(f"{settings_file}: damaged; delete it, or copy the folder again") from None
    try:
        settings = json.loads(state_file.read_text())["settings"]
        base_name, fingerprint = settings["pretrained_model_name"], settings["base_fingerprint"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{state_file}: damaged; use another checkpoint") from None
    base = resolve_model(base_name)
    if weights_fingerprint(base, "unet") != fingerprint:
        raise UserError(f"{folder}: was trained on another base than what is now in {base}; restore that model there")
    trained = folder / ("ema.safetensors" if settings["use_ema"] else "trained.safetensors")
    if not trained.is_file():
        raise UserError(f"{trained}: missing; use another checkpoint")
    safetensors_header(trained)
    return base, settings, trained


def lay_over(unet, trained_file):
    """Copies the trained weights of a checkpoint into a UNet, in place, whatever their dtype."""
    import torch
    from safetensors import safe_open

    parameters = dict(unet.named_parameters())
    with safe_open(trained_file, "pt") as tensors, torch.no_grad():
        for key in tensors.keys():
            parameters[key].copy_(tensors.get_tensor(key))


# -------------------------------------------------------------------------------------------------------- Forecast


def memory_tracker():
    """A context that counts the bytes of all storages alive, `now` and at the `peak`, of every tensor made in it."""
    import weakref

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class MemoryTracker(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.now = self.peak = 0
            self.alive = {}

        def track(self, tensor):
            storage = tensor.untyped_storage()
            key, size = id(storage), storage.nbytes()
            if key not in self.alive:

                def freed(_):
                    self.now -= size
                    del self.alive[key]

                self.alive[key] = weakref.ref(storage, freed)
                self.now += size
                self.peak = max(self.peak, self.now)

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self.track(leaf)
            return out

    return MemoryTracker()
