"""Makes a video from an image with a Stable Video Diffusion model, fine-tuned by train_svd.py or not.

    python infer_svd.py --model_dir ./outputs --input_image path/to/image.jpg --output_video ./sample_output.mp4 \
        --motion_bucket_id 180 --noise_aug_strength 0.1 --fps 7

A recipe: parse, load, read the image, run the stock diffusers pipeline, write the video and, beside it, a JSON
file with everything that is needed to make it again.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np

import svd_common as common
from svd_common import UserError


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_dir", required=True, help="fine-tuned folder, checkpoint-N of a run, base folder or hub name")
    add("--input_image", required=True, help="the first frame: any image file; resized and centre-cropped to fit")
    add("--output_video", required=True, help="the .mp4 to write; its settings go beside it as .json")
    add("--width", type=int, help="pixels (default: what the model was trained at, or 1024)")
    add("--height", type=int, help="pixels (default: what the model was trained at, or 576)")
    add("--num_frames", type=int, help="frames to make (default: what the model was trained at)")
    add("--fps", type=float, help="frames a second, conditioning and mp4 (default: the training data's, or 7)")
    add("--motion_bucket_id", type=int, help="0..255, more is more motion (default: the training data's, or 127)")
    add("--noise_aug_strength", type=float, default=0.02, help="noise on the first frame, 0..10 (default 0.02)")
    add("--num_inference_steps", type=int, default=25, help="denoising steps (default 25)")
    add("--min_guidance_scale", type=float, default=1.0, help="guidance at the first frame (default 1.0)")
    add("--max_guidance_scale", type=float, default=3.0, help="guidance at the last frame (default 3.0)")
    add("--decode_chunk_size", type=int, help="frames decoded at once; fewer need less memory (default: all)")
    add("--seed", type=int, default=0, help="of the noise (default 0)")
    return parser


def parse_args(argv=None):
    """Parses the command line and refuses what cannot work before anything is loaded."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.fps = int(args.fps) if args.fps and args.fps % 1 == 0 else args.fps
    for flag, low, high in (
        ("width", 8, None), ("height", 8, None), ("num_frames", 2, None), ("fps", 1, 240), ("motion_bucket_id", 0, 255),
        ("noise_aug_strength", 0, 10), ("num_inference_steps", 1, 1000), ("decode_chunk_size", 1, None),
        ("min_guidance_scale", 0, 100), ("max_guidance_scale", 0, 100), ("seed", 0, 2**63 - 1),
    ):  # fmt: skip
        value = getattr(args, flag)
        if value is not None and not (low <= value <= (high or value)):
            parser.error(f"--{flag} must be {f'{low}..{high}' if high else f'at least {low}'}, got {value}")
    if args.min_guidance_scale > args.max_guidance_scale:
        parser.error(
            f"--min_guidance_scale {args.min_guidance_scale:g} must not be over --max_guidance_scale"
            f" {args.max_guidance_scale:g}: the guidance rises from the first frame to the last"
        )
    if not args.output_video.lower().endswith(".mp4"):
        parser.error(f"--output_video must end in .mp4, got {args.output_video}")
    for path in (Path(args.output_video), Path(args.output_video).with_suffix(".json")):
        if path.exists():
            parser.error(f"--output_video: {path} exists already; move it away or give another name")
    parent = next(folder for folder in Path(args.output_video).absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        parser.error(f"--output_video: {parent} is not a folder that can be written to")
    return args


def fill_in_defaults(args, folder, settings):
    """Sizes and conditioning that were not given: what the model was trained with, else the base model's own."""
    unet = common.read_config(folder, "unet")
    factor = 2 ** (len(common.read_config(folder, "vae")["block_out_channels"]) - 1)
    side = unet.get("sample_size") or 96  # SVD-XT's configuration says 96: 768 pixels; it was trained at 1024 x 576
    trained = (1024, 576) if side == 96 and factor == 8 else (side * factor, side * factor)
    for name, default in (
        ("width", settings.get("width", trained[0])),
        ("height", settings.get("height", trained[1])),
        ("num_frames", settings.get("num_frames", unet.get("num_frames") or 25)),
        ("fps", max(1, round(settings.get("median_fps", 7)))),
        ("motion_bucket_id", round(settings.get("median_motion_bucket_id", 127))),
    ):
        if getattr(args, name) is None:
            setattr(args, name, default)
    multiple = common.size_multiple(folder)
    for flag in ("width", "height"):
        value = getattr(args, flag)
        if value % multiple:
            near = max(multiple, round(value / multiple) * multiple)
            raise UserError(
                f"--{flag} must be a multiple of {multiple} for this model, got {value}; the nearest is {near}"
            )
    args.decode_chunk_size = min(args.decode_chunk_size or args.num_frames, args.num_frames)


def main(argv=None):
    args = parse_args(argv)
    image = common.read_image(args.input_image)
    try:
        folder, settings, _ = common.resolve_checkpoint(args.model_dir)
    except ValueError as error:
        raise UserError(f"{Path(args.model_dir) / common.SETTINGS}: damaged ({error}); copy the folder again") from None
    fill_in_defaults(args, folder, settings)

    import diffusers
    import torch
    from PIL import Image

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    where = "the GPU in fp16" if device == "cuda" else "the CPU in fp32 (no CUDA GPU found)"
    print(f"{args.model_dir} on {where}")
    pipe, _ = common.load_pipeline(args.model_dir, dtype)
    pipe.to(device)
    Path(args.output_video).parent.mkdir(parents=True, exist_ok=True)

    started = time.perf_counter()
    frames = pipe(
        Image.fromarray(common.fit_frame(image, args.width, args.height)),
        generator=torch.Generator().manual_seed(args.seed),  # on the CPU: the same noise on every machine
        output_type="np",
        **{
            name: getattr(args, name)
            for name in (
                "width", "height", "num_frames", "fps", "motion_bucket_id", "noise_aug_strength",
                "num_inference_steps", "min_guidance_scale", "max_guidance_scale", "decode_chunk_size",
            )
        },
    ).frames[0]  # fmt: skip
    seconds = time.perf_counter() - started
    common.write_video(args.output_video, (frames * 255).round().astype(np.uint8), args.fps)
    record = {
        **vars(args),
        "seconds": round(seconds, 2),
        "trained_step": settings.get("step"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }
    common.write_file(Path(args.output_video).with_suffix(".json"), json.dumps(record, indent=1))
    print(
        f"{args.output_video}: seed {args.seed}, {args.num_frames} frames {args.width}x{args.height}, {seconds:.0f} s"
    )
    return 0


if __name__ == "__main__":
    common.run_script(main)
