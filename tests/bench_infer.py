"""Seconds and memory of one clip, beside the stock pipeline: same card, same run, full size, random weights.

    python tests/bench_infer.py              # full-size SVD-XT on a CUDA GPU, 512x320 and 1024x576, 25 frames, fp16
    python tests/bench_infer.py --tiny       # the small checkpoint, on a CPU too: only whether this program works

Prints a row a setting: seconds a clip, peak memory beside the forecast of infer_svd.py, and by how much the frames
differ from those of the stock pipeline with the same decode_chunk_size (levels of 255: largest, mean).
"""

import argparse
import gc
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import svd_common as common  # isort: skip
import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKLTemporalDecoder, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import infer_svd
from svd_parts.clip_set import PIPELINE_OPTIONS
from svd_parts.forecast import forecast_clip
from svd_parts.shortcuts import avoid_conv3d, move_to_device, wrap_unet
from svd_parts.weights import SVD_XT_CONFIG, read_config

diffusers.utils.logging.set_verbosity_error()
TINY = ROOT / "tests" / "tiny_svd"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32
SETTINGS = (  # (label, whether it is wrapped by infer_svd.py, its options)
    ("stock pipeline", False, []),
    ("infer_svd.py", True, []),
    ("stock, decode_chunk_size 8", False, ["--decode_chunk_size", "8"]),
    ("infer_svd.py --decode_chunk_size 8", True, ["--decode_chunk_size", "8"]),
    ("stock, decode_chunk_size 4", False, ["--decode_chunk_size", "4"]),
    ("infer_svd.py --low_vram", True, ["--low_vram"]),
    ("infer_svd.py --compile", True, ["--compile"]),
)


def build(config, seed=0):
    """A stock pipeline with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    with torch.device(DEVICE):
        unet = UNetSpatioTemporalConditionModel.from_config(read_config(config, "unet"))
        vae = AutoencoderKLTemporalDecoder.from_config(read_config(config, "vae"))
        clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**read_config(config, "image_encoder")))
    parts = {"unet": unet, "vae": vae, "image_encoder": clip}
    parts |= {name: common.load_part(TINY, name, DTYPE) for name in ("scheduler", "feature_extractor")}
    pipe = StableVideoDiffusionPipeline(**{name: part for name, part in parts.items()})
    return pipe.to("cpu", DTYPE)


def measure(config, size, ours, flags, num_inference_steps):
    """(seconds, peak GiB, forecast GiB, frames) of one clip, after a first one that warms up."""
    width, height, num_frames = size
    args = infer_svd.parse_args(
        ["--model_dir", ".", "--input_image", ".", "--output_video", "./none.mp4", "--width", str(width), "--height",
         str(height), "--num_frames", str(num_frames), "--num_inference_steps", str(num_inference_steps), *flags]
    )  # fmt: skip
    settings = infer_svd.resolve(args, config, {})
    options = {name: getattr(settings, name) for name in PIPELINE_OPTIONS} | {"motion_bucket_id": 127}
    pipe = build(config)
    pipe.set_progress_bar_config(disable=True)
    if ours:
        wrap_unet(pipe.unet, settings.compile)
        avoid_conv3d(pipe.vae)
    move_to_device(pipe, settings.low_vram, DEVICE)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8))

    def clip(steps):
        generator = torch.Generator().manual_seed(0)
        return pipe(image, generator=generator, output_type="np", **{**options, "num_inference_steps": steps}).frames[0]

    clip(2)  # compiles, and lets cuDNN choose
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    frames = clip(num_inference_steps)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0
    return seconds, peak, forecast_clip(config, settings)[0], (frames * 255).round()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the small checkpoint at 96x64, 8 frames")
    parser.add_argument("--num_inference_steps", type=int, default=25, help="denoising steps (default 25)")
    args = parser.parse_args()
    if DEVICE == "cpu" and not args.tiny:
        parser.error("the full-size model needs a CUDA GPU; --tiny runs anywhere")
    config, sizes = (TINY, [(96, 64, 8)]) if args.tiny else (SVD_XT_CONFIG, [(512, 320, 25), (1024, 576, 25)])
    print(f"{torch.cuda.get_device_name() if DEVICE == 'cuda' else 'CPU'}, torch {torch.__version__}, {DTYPE}")
    for size in sizes:
        stock = {}  # {decode_chunk_size: the stock pipeline's frames}
        print(f"\n{size[0]}x{size[1]}, {size[2]} frames, {args.num_inference_steps} steps")
        print(f"{'':36s}{'s a clip':>10s}{'peak GiB':>10s}{'forecast':>10s}   differs from stock")
        for label, ours, flags in SETTINGS:
            if "--compile" in flags and DEVICE == "cpu":
                continue  # minutes of a compiler, for nothing
            chunk = "4" if "--low_vram" in flags else flags[1] if "--decode_chunk_size" in flags else "all"
            try:
                seconds, peak, forecast, frames = measure(config, size, ours, flags, args.num_inference_steps)
            except torch.cuda.OutOfMemoryError:
                print(f"{label:36s}{'out of memory':>20s}")
                continue
            finally:
                gc.collect()
                torch.cuda.empty_cache()
            difference = np.abs(frames - stock.setdefault(chunk, frames)) if not ours or chunk in stock else None
            shown = f"{difference.max():.0f}, {difference.mean():.4f}" if difference is not None else "-"
            print(f"{label:36s}{seconds:10.2f}{peak:10.2f}{forecast:10.2f}   {shown}", flush=True)


if __name__ == "__main__":
    main()
