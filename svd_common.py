"""What several scripts share: reading and writing frames and videos, and loading SVD's parts.

Importing this module touches no disk, GPU or network. torch and diffusers are imported inside the functions that use
them, so that preparing a dataset needs neither.
"""

import contextlib
import errno
import io
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path

import svd_parts  # noqa: F401  isort: skip  (first: it sets what cv2 reads once)

try:
    import cv2
except ImportError as error:  # most often because a server without a screen has no libGL
    sys.exit(
        f"error: OpenCV cannot be loaded ({error}). On a server without a screen: pip uninstall opencv-python, then"
        " pip install opencv-python-headless. If it is not installed: pip install -r requirements.txt"
    )
import numpy as np

from svd_parts.files import UserError, replacing
from svd_parts.lora import load_trained_weights
from svd_parts.weights import (
    CHECKPOINT_STATE,
    PARTS,
    SETTINGS,
    read_settings,
    resolve_model,
    safetensors_header,
    weight_files,
    weights_fingerprint,
)

if not hasattr(cv2, "IMWRITE_PNG_ZLIBBUFFER_SIZE"):
    sys.exit(f"error: OpenCV {cv2.__version__} is older than 4.13: pip install -U opencv-python, and no other OpenCV")

IMAGE_SUFFIXES = tuple(".png .jpg .jpeg .jpe .jfif .webp .bmp .avif .jp2 .j2k .tif .tiff .ppm .pgm .pnm .tga".split())
VIDEO_SUFFIXES = tuple(".mp4 .mov .mkv .avi .webm .m4v .mpg .mpeg .ts .wmv .flv".split())  # common ones
MOST_PIXELS = 1 << 29  # 23,170 x 23,170: a larger image is refused after reading its header
PNG_OPTIONS = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
PNG_OPTIONS += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]  # the fastest lossless settings measured
PNG_OPTIONS += [cv2.IMWRITE_PNG_ZLIBBUFFER_SIZE, 1 << 16]


def is_plain(data):
    """Whether these bytes are a plain PNG or JPEG: 8-bit RGB, not rotated, not transparent, without a colour profile.

    OpenCV decodes such a file to the same pixels as PIL, in half the time.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:26] == b"\x08\x02":
        at = 8
        while at < len(data):  # a chunk: size, kind, content, checksum
            if re.match(rb"eXIf|tRNS|acTL|iCCP|[tzi][ET]Xt(Raw|XML)", data[at + 4 : at + 11]):  # texts with EXIF, XMP
                return False
            at += int.from_bytes(data[at : at + 4], "big") + 12
        return True
    if data[:2] != b"\xff\xd8":
        return False
    header, picture, _ = data.partition(b"\xff\xda")
    is_rgb = re.search(rb"\xff[\xc0-\xc2]\0\x11\x08.{4}\x03", header, re.DOTALL)
    is_special = re.search(rb"\xff[\xe1\xe2\xee]", header)  # EXIF or XMP, which may rotate; ICC; Adobe's colour spaces
    return bool(picture and is_rgb and not is_special)


def to_srgb(image):
    """Converts a PIL image with an ICC profile (Adobe RGB, Display P3, ...) to sRGB; returns others as they are."""
    from PIL import ImageCms

    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK", "L", "LA"):
        return image
    alpha = image.getchannel("A") if "A" in image.getbands() else None
    mode = {"RGBA": "RGB", "LA": "L"}.get(image.mode, image.mode)
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        image = ImageCms.profileToProfile(image.convert(mode), source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):  # a damaged or unsuitable profile: ignored, as viewers do
        return image
    if alpha is not None:
        image.putalpha(alpha)
    return image


def read_image(path):
    """Reads any still image as people see it: rotated by EXIF, converted to sRGB, with white behind transparent parts.

    Returns (H, W, 3) uint8 RGB. Raises `UserError` if the file is missing, not a readable image, or too large.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise UserError(f"{path}: no such image file") from None
    except OSError as error:
        raise UserError(f"{path}: not a readable image ({error.strerror})") from None
    return decode_image(data, path)


def decode_image(data, path):
    """Decodes the bytes of a still image as `read_image` does, to (H, W, 3) uint8 RGB. path: a name for errors."""
    from PIL import Image, ImageOps

    try:
        Image.MAX_IMAGE_PIXELS = None  # PIL's limit would refuse panoramas; ours is MOST_PIXELS
        opened = Image.open(io.BytesIO(data))  # reads the header alone
        if opened.width * opened.height > MOST_PIXELS:
            raise UserError(f"{path}: {opened.width}x{opened.height} pixels are too many; make the image smaller")
        frame = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if is_plain(data) else None
        if frame is not None:
            return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        with opened:
            image = to_srgb(ImageOps.exif_transpose(opened))
            if image.mode.startswith("I;16") or image.mode == "I":  # 16-bit grey: PIL would clip, not scale
                image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except UserError:
        raise
    except Exception as error:  # PIL raises errors of many kinds for a damaged file
        reason = getattr(error, "strerror", None) or re.sub(" <.*>", "", str(error)) or type(error).__name__
        raise UserError(f"{path}: not a readable image ({reason})") from None


read_frame = read_image  # one reader for frames and single images: two would disagree on some file


def read_frames(paths, width, height):
    """Reads image files to (T, height, width, 3) uint8 RGB, each resized and cropped by `fit_frame`."""
    return np.stack([fit_frame(read_image(path), width, height) for path in paths])


def to_pixels(frames):
    """(T, H, W, 3) uint8 -> (T, 3, H, W) float32 in [-1, 1], through [0, 1] for the same bits as in the pipeline."""
    import torch

    return torch.from_numpy(frames.astype(np.float32) / 255.0 * 2.0 - 1.0).permute(0, 3, 1, 2)


def fit_frame(frame, width, height):
    """Resizes (H, W, 3) to cover `width` x `height` at the same aspect ratio, then crops the centre.

    Shrinks by area averaging (no aliasing), enlarges bicubically. A frame of the right size is returned unchanged.
    """
    h, w = frame.shape[:2]
    scale = max(width / w, height / h)
    if scale != 1:
        size = max(width, round(w * scale)), max(height, round(h * scale))
        frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (frame.shape[0] - height) // 2, (frame.shape[1] - width) // 2
    return np.ascontiguousarray(frame[top : top + height, left : left + width])


def encode_png(frame):
    """(H, W, 3) uint8 RGB -> the bytes of a PNG file."""
    return cv2.imencode(".png", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), PNG_OPTIONS)[1].tobytes()


# ffmpeg converts RGB to YUV with BT.601's matrix, so the file says so. Else players take a wide video for BT.709.
COLORS = "-colorspace smpte170m -color_primaries bt709 -color_trc bt709 -color_range tv".split()


def write_video(path, frames, fps, *options):
    """Writes (T, H, W, 3) uint8 RGB, whole or not at all, as H.264 yuv420p mp4, which browsers and phones play.

    options: further options of ffmpeg. An odd width or height loses its last column or row, as H.264 with 4:2:0 needs
    even sizes. Raises `OSError` if the file cannot be read back whole.
    """
    import imageio_ffmpeg

    frames = np.asarray(frames)[:, : frames[0].shape[0] // 2 * 2, : frames[0].shape[1] // 2 * 2]
    size, options = frames.shape[2:0:-1], ["-crf", "14", *options, *COLORS, "-movflags", "+faststart", "-f", "mp4"]
    codec = {"codec": "libx264", "pix_fmt_out": "yuv420p", "macro_block_size": 2, "output_params": options}
    with replacing(path) as aside:
        writer = imageio_ffmpeg.write_frames(str(aside), size, fps=fps, **codec)
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        with contextlib.suppress(UserError):
            if len(read_video(aside)) == len(frames):  # ffmpeg does not report a disk that fills up at the end
                return
        raise OSError(errno.ENOSPC, "not written whole; is the disk full?", str(path))


def read_video(path):
    """Decodes a short video by `write_video` to (T, H, W, 3) uint8 RGB. Raises `UserError` if no frame can be read."""
    capture, frames = cv2.VideoCapture(os.fsencode(path)), []  # OpenCV crashes on a str that is not UTF-8
    while (frame := capture.read()[1]) is not None:
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    if not frames:
        raise UserError(f"{path}: no frame could be read")
    return np.stack(frames)


def label_frames(frames, text):
    """Adds a white strip with `text` above every frame: (T, H, W, 3) -> (T, H + 24, W, 3)."""
    frames = np.asarray(frames)
    strip = np.full((24, frames.shape[2], 3), 255, np.uint8)
    width = max(cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)[0][0], 1)
    scale = min(0.5, 0.5 * (frames.shape[2] - 8) / width)
    cv2.putText(strip, text, (4, 16), cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 1, cv2.LINE_AA)
    return np.stack([np.concatenate([strip, frame]) for frame in frames])


def side_by_side(videos, min_width=256):
    """{label: (T, H, W, 3)} -> one labelled video, as long as the shortest. Narrow videos are enlarged."""
    length = min(len(video) for video in videos.values())
    scale = max(1, -(-min_width // next(iter(videos.values())).shape[2]))
    columns = []
    for text, video in videos.items():
        big = [cv2.resize(f, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC) for f in video[:length]]
        columns.append(label_frames(big, text))
    return np.concatenate(columns, axis=2)


def dtype_option(dtype):
    """`dtype` as an option of diffusers' `from_pretrained`, which called it `torch_dtype` before version 0.40."""
    major, minor = version("diffusers").split(".")[:2]
    return {"dtype" if (int(major), int(minor)) >= (0, 40) else "torch_dtype": dtype}


def load_part(folder, part, dtype):
    """Loads one model part in `dtype`, on the CPU, in eval mode. Reads weights from safetensors files only."""
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
        return cls.from_pretrained(folder, **dtype_option(dtype), **options).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}/{part}: cannot be loaded ({str(error).strip().splitlines()[0]})") from error


def load_pipeline(name, dtype, base=None):
    """A stock `StableVideoDiffusionPipeline` on the CPU in `dtype`: (pipeline, settings of its training).

    name: a hub name, a pipeline folder, or a checkpoint of train_svd.py. A checkpoint's weights are put into the base
    that it names, or into `base`. settings is {} for a model that train_svd.py did not train.
    """
    from diffusers import StableVideoDiffusionPipeline
    from safetensors.torch import load_file

    from svd_parts.action_encoder import load_action_encoder

    folder, settings, trained = resolve_checkpoint(name, base)
    parts = {part: load_part(folder, part, dtype) for part in PARTS}
    tensors = load_file(trained) if trained else {}
    load_trained_weights(dict(parts["unet"].named_parameters()), tensors, settings)
    load_action_encoder(parts["unet"], tensors, folder)
    return StableVideoDiffusionPipeline(**parts), settings


def resolve_checkpoint(name, base=None):
    """Finds the files of a model: (pipeline folder, training settings, trained-weights file or None). Reads no weights.

    base: for a checkpoint, a hub name or folder to use in place of the base that it names. Raises `UserError` if a file
    is missing or damaged, or if the checkpoint was trained on another base.
    """
    folder = Path(name)
    state_file = folder / CHECKPOINT_STATE
    if not state_file.is_file():
        folder = resolve_model(name)
        file = folder / SETTINGS
        return folder, read_settings(file, "delete it, or copy the folder again") if file.is_file() else {}, None
    settings = read_settings(state_file, "use another checkpoint")
    trained = folder / ("ema.safetensors" if settings["use_ema"] else "trained.safetensors")
    if not trained.is_file():
        raise UserError(f"{trained}: missing; use another checkpoint")
    safetensors_header(trained)
    fingerprint = settings["base_fingerprint"]
    found = resolve_model(base or find_base(folder, settings["pretrained_model_name"], fingerprint))
    if weights_fingerprint(found, "unet") != fingerprint:
        raise UserError(f"{folder}: was trained on another base than that in {found}; give the right --base_model")
    return found, settings, trained


def find_base(folder, recorded, fingerprint):
    """The base of a checkpoint, also if it was moved together with the run: the end of its path is then the same.

    recorded: the base's hub name, or its path when the run began. A folder counts only if its weights have this
    fingerprint, so a fine-tuned result of the same name does not. Raises `UserError` if the base is not found.
    """
    if os.path.isdir(recorded) or re.fullmatch(r"[\w.-]+/[\w.-]+", recorded):
        return recorded
    parts = [part for part in re.split(r"[\\/]", recorded) if part]
    for parent in (*folder.resolve().parents, Path.cwd()):
        for start in range(len(parts)):
            candidate = parent.joinpath(*parts[start:])
            with contextlib.suppress(UserError):
                if os.path.isdir(candidate / "unet") and weights_fingerprint(candidate, "unet") == fingerprint:
                    return candidate
    where = f"no longer in {recorded}, nor beside the run"
    raise UserError(f"{folder}: its base model is {where}; give its folder or hub name as --base_model")
