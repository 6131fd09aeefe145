r"""Makes videos from images with a Stable Video Diffusion model, fine-tuned by train_svd.py or not.

    python infer_svd.py --model_dir ./outputs --input_image path/to/image.jpg --output_video ./sample_output.mp4 \
        --motion_bucket_id 180 --noise_aug_strength 0.1 --fps 7

Many clips go into a folder, with a metadata.jsonl that says how each was made. The same command goes on after a stop:

    python infer_svd.py --model_dir ./outputs --input_image ./images --output_video ./clips \
        --num_videos_per_image 4 --motion_bucket_id 60 120 180

The steps: parse, list the clips to make, load the model, run the pipeline of diffusers for each, write, compare.
"""

import argparse
import collections
import contextlib
import gc
import glob
import os
import shlex
import shutil
import sys
import time
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

import svd_common as common
from svd_parts.actions import add_actions_to_images, scaled_actions
from svd_parts.clip_set import CARRIED, OPTIONS, PIPELINE_OPTIONS, ClipSet, SingleClip, clip_settings, is_file
from svd_parts.console import Parser, number, progress_bar, run_script
from svd_parts.crop import describe_crop
from svd_parts.dataset import find_folders, list_clips, read_metadata
from svd_parts.files import UserError, count_kinds, counted, file_digest, listed, natural_key, parse_shard, same_name
from svd_parts.formats import FORMATS
from svd_parts.judging import find_trained_on, judge, report_drift
from svd_parts.lerobot_writer import warn_of_codec
from svd_parts.lora import check_adapters, merge_adapter
from svd_parts.memory import LOW_VRAM_CHUNK, fit_memory, is_out_of_memory, smaller_memory
from svd_parts.metrics import sharpness
from svd_parts.shortcuts import avoid_conv3d, move_to_device, wrap_unet
from svd_parts.weights import check_sizes, latent_factor, read_config, resolve_config, size_multiple

# The command line after `resolve`: no size and no conditioning is None. It never changes. Where memory runs short,
# `smaller_memory` makes new settings, with the reason in `fallback`.
SETTINGS = "model_dir base_model lora lora_scale input_image actions output_video output_format task shard".split()
SETTINGS += [*OPTIONS, *"num_videos_per_image compare_with reference held_out".split()]
SETTINGS += "low_vram compile dry_run fallback".split()
Settings = namedtuple("Settings", SETTINGS, defaults=[None])

# What `common.resolve_checkpoint` finds under a name. adapters: (safetensors file, scale) of each --lora.
Model = namedtuple("Model", "name base settings trained adapters", defaults=[()])


# Command line


def build_parser():
    advice = {"--prompt": "SVD takes no text: the image and --motion_bucket_id say what happens"}
    stray = 'quote a pattern or a name with spaces: --input_image "images/*.png"; put spaces between several numbers'
    parser = Parser(description=__doc__, advice=advice, stray=stray)
    count, pixels, guidance = number(int, 1), number(int, 8), number(float, 0, 100)
    add = parser.add_argument_group("in and out").add_argument
    add("--model_dir", required=True, help="a fine-tuned folder, a run's checkpoint-N, a base folder or a hub name")
    add("--base_model", metavar="FOLDER_OR_NAME", help="the base of a checkpoint, if it has moved since")
    several = {"nargs": "+", "action": "extend"}
    add("--lora", **several, default=[], metavar="DIR", help="add these LoRAs: folders such as OUTPUT_DIR/lora")
    add("--lora_scale", type=number(float, -100, 100), help="strength of the LoRAs (default 1.0)")
    add("--input_image", required=True, help="an image, a folder of them, a prepared dataset or a quoted pattern")
    add("--output_video", required=True, help="the .mp4, .gif or .webp of one clip, or a folder for many")
    add("--output_format", choices=list(FORMATS), help="for a folder; frames suits train_svd.py (default mp4)")
    add("--task", metavar="TEXT", help="what the robot does, for lerobot (default: from the real clip's metadata)")
    add("--shard", metavar="I/N", help="make part I of N of a set (default: RANK/WORLD_SIZE, where they are set)")
    acts = "actions, a row a frame: .npy, .csv or a prepared dataset (for models of --condition_on actions)"
    add("--actions", metavar="PATH", help=acts)
    add("--num_videos_per_image", type=count, default=1, help="clips of an image, seeds SEED, SEED+1, ... (default 1)")

    add = parser.add_argument_group("what to make").add_argument
    add("--width", type=pixels, help="pixels (default: what the model was trained at, or 1024)")
    add("--height", type=pixels, help="pixels (default: what the model was trained at, or 576)")
    add("--num_frames", type=number(int, 2), help="frames to make (default: what the model was trained at)")
    add("--fps", type=number(float, 0.01, 240), help="frames a second (default: the training data's, or 7)")
    buckets = "how much moves, 0..255; each of several makes a clip (default: the training data's, or 127)"
    add("--motion_bucket_id", type=number(int, 0, 255), **several, help=buckets)
    noise = "noise added to the image; with more, more moves and less of the image stays (default 0.02)"
    add("--noise_aug_strength", type=number(float, 0, 10), default=0.02, help=noise)
    add("--num_inference_steps", type=number(int, 1, 1000), default=25, help="denoising steps (default 25)")
    add("--min_guidance_scale", type=guidance, default=1.0, help="guidance at the first frame (default 1.0)")
    add("--max_guidance_scale", type=guidance, default=3.0, help="guidance at the last frame (default 3.0)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of the noise (default 0)")
    add("--num_segments", type=count, default=1, help="clips in a row, each from the last frame before (default 1)")
    yes_no = argparse.BooleanOptionalAction
    add("--color_correction", action=yes_no, default=True, help="keep the colours from segment to segment (default)")

    add = parser.add_argument_group("judging (into a folder)").add_argument
    add("--compare_with", metavar="MODEL", help="make the same clips with this model too; writes them side by side")
    add("--reference", metavar="DIR", help="prepared dataset with these images' real clips; writes metrics.json")
    add("--held_out", action="store_true", help="make only those clips of --reference that no model saw in training")

    add = parser.add_argument_group("memory and speed").add_argument
    add("--decode_chunk_size", type=count, help="frames decoded at once (default: all; 4 with --low_vram)")
    add("--low_vram", action="store_true", help="keep parts of the model on the GPU only while they work: slower")
    add("--compile", action="store_true", help="torch.compile the blocks: takes minutes, for long runs on a GPU")
    add("--dry_run", action="store_true", help="print the clips and the GPU memory that they need; load no weights")
    return parser


def parse_args(argv=None):
    """Reads the command line, and refuses what cannot work before anything is loaded."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.motion_bucket_id = args.motion_bucket_id and list(dict.fromkeys(args.motion_bucket_id))
    if args.min_guidance_scale > args.max_guidance_scale:
        low, high = args.min_guidance_scale, args.max_guidance_scale
        parser.error(f"--min_guidance_scale {low:g} must not be over --max_guidance_scale {high:g}: guidance rises")

    output, suffix = Path(args.output_video).absolute(), Path(args.output_video).suffix.lower()
    if is_file(output):
        many = {"num_videos_per_image": args.num_videos_per_image > 1, "compare_with": args.compare_with}
        many |= {"motion_bucket_id": len(args.motion_bucket_id or []) > 1, "reference": args.reference}
        many |= {"output_format": args.output_format not in (None, suffix[1:])}
        for flag in (flag for flag, given in many.items() if given):
            why = f"one file holds one clip in its own format, which --{flag} does not fit"
            parser.error(f"--output_video {output}: {why}; give a folder")
        args.output_format = suffix[1:]
    elif suffix in (*common.IMAGE_SUFFIXES, *common.VIDEO_SUFFIXES) and not output.is_dir():
        parser.error(f"--output_video must end in .mp4, .gif or .webp, or be a folder's name, got {output}")
    args.output_format = args.output_format or "mp4"
    if not args.lora and args.lora_scale is not None:
        parser.error("--lora_scale needs --lora")
    args.lora_scale = 1.0 if args.lora_scale is None else args.lora_scale
    if args.shard or os.environ.get("WORLD_SIZE", "1") == "1":
        args.shard = parse_shard(args.shard or "0/1")
    else:  # accelerate launch, torchrun
        rank = f"{os.environ.get('RANK')}/{os.environ['WORLD_SIZE']}"
        args.shard = parse_shard(rank, "RANK/WORLD_SIZE of the environment")
    if args.shard.parts > 1 and is_file(output):
        parser.error(f"--output_video {output}: one clip cannot be shared among processes; give a folder")
    chosen = FORMATS[args.output_format]
    if (args.compare_with or args.reference) and not chosen.read:
        parser.error(f"--output_format {args.output_format} cannot be compared: its colours are not exact; use mp4")
    if chosen.package and not find_spec(chosen.package):
        parser.error(f"--output_format {args.output_format} needs: pip install {chosen.package}")
    if chosen.is_image:
        for flag, given in (("input_image", args.input_image), ("reference", args.reference)):
            inside, folder = output.resolve(), Path(given or "").resolve()
            if given and (folder == inside or (folder in inside.parents and has_clips(folder))):
                parser.error(f"--output_video {output} lies in --{flag} and would add its clips to it; give another")
    if args.held_out and not args.reference:
        parser.error("--held_out chooses among the clips of --reference, so give that, too")
    if args.actions and not (Path(args.actions).is_dir() or args.actions.lower().endswith((".npy", ".csv"))):
        parser.error(f"--actions {args.actions}: must be an .npy or .csv file, or a prepared dataset's folder")
    if args.reference and not Path(args.reference).is_dir():
        parser.error(f"--reference {args.reference}: no such folder")
    places = output.parents if is_file(output) else [output, *output.parents]
    parent = next(folder for folder in places if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        parser.error(f"--output_video: {parent} is not a folder that can be written to")
    if shutil.disk_usage(parent).free < 2**24:
        parser.error(f"--output_video: the disk of {parent} is full; make room")
    return args


def resolve(args, base, trained):
    """Makes `Settings` of the command line. Sizes and conditioning that were not given are those of the training.

    base: the folder with the model's configuration. trained: training_settings.json of a fine-tuned model, else {}.
    """
    unet = read_config(base, "unet")
    factor = latent_factor(read_config(base, "vae"))
    side = unet.get("sample_size") or 96  # SVD-XT says 96, which is 768 pixels, but was trained at 1024 x 576
    width, height = (1024, 576) if side == 96 and factor == 8 else (side * factor, side * factor)
    fps, bucket = trained.get("median_fps", 7), round(trained.get("median_motion_bucket_id", 127))
    settings = {
        "width": trained.get("width", width),
        "height": trained.get("height", height),
        "num_frames": trained.get("num_frames", unet.get("num_frames") or 25),
        "fps": fps,
        "motion_bucket_id": [bucket],
        **{name: value for name, value in vars(args).items() if value is not None},
    }
    settings["fps"] = int(settings["fps"]) if settings["fps"] % 1 == 0 else settings["fps"]
    chunk = args.decode_chunk_size or (LOW_VRAM_CHUNK if args.low_vram else settings["num_frames"])
    settings["decode_chunk_size"] = min(chunk, settings["num_frames"])
    low, high = trained.get("motion_bucket_id_range", (0, 255))
    margin = max(20, (high - low) / 2)
    for value in settings["motion_bucket_id"]:
        if not low - margin <= value <= high + margin:
            print(f"warning: --motion_bucket_id {value}: the model was fine-tuned on clips of {low:g} to {high:g}")
    if "median_fps" in trained and not fps / 2 <= settings["fps"] <= fps * 2:
        print(f"warning: --fps {args.fps:g}: the model was fine-tuned on clips of about {fps:g} frames a second")
    if settings["fps"] > (most := FORMATS[args.output_format].most_fps):
        why = f"browsers play a {args.output_format} of at most {most} fps"
        print(f"warning: {why}: frames are left out, the length stays; webp and mp4 keep all frames")
    return Settings(**{**vars(args), **settings})


# The images to start from


def is_image(path):
    return path.suffix.lower() in common.IMAGE_SUFFIXES and not path.name.startswith(".")


def images_in(folder):
    """The images in a folder, without those in its subfolders and hidden ones."""
    return [path for path in folder.iterdir() if is_image(path) and not path.is_dir()]


def say_left_out(files):
    """Prints which kinds of files are not taken for images, and how many of each."""
    if names := [file.name for file in files if not file.name.startswith(".")]:
        print(f"left out, because they are not images: {count_kinds(names)}")


def has_clips(folder):
    """Whether a folder is a dataset, whose clips are subfolders, and not a folder of images."""
    return not images_in(folder) or bool(read_metadata(folder))


def find_images(given):
    """--input_image -> {name: path}. A name is the path inside the folder, or inside the folder before the wildcard."""
    path = Path(given)
    if path.is_dir():
        files, root = images_in(path), path
        if not files and not any(map(is_image, path.rglob("*"))):
            if any(file.suffix.lower() in common.VIDEO_SUFFIXES for file in path.iterdir()):
                raise UserError(f"--input_image {given} holds videos and no image; {first_frames_of(path)}")
            raise UserError(f"--input_image {given} holds no image, and no folder of frames")
        if has_clips(path):
            return {clip["directory"]: clip["frames"][0] for clip in list_clips(path)}
        say_left_out(file for file in path.iterdir() if not is_image(file) and file.is_file())
    elif glob.has_magic(given) and not path.exists():
        root, files = expand_pattern(path)
        say_left_out(file for file in files if not is_image(file))
        found, files = files, [file for file in files if is_image(file)]
        if not files:
            videos = [file for file in found if file.suffix.lower() in common.VIDEO_SUFFIXES]
            hint = f", but videos; {first_frames_of(videos[0].parent)}" if videos else ""
            raise UserError(f"--input_image {given}: no image matches{hint}")
    elif path.suffix.lower() in common.VIDEO_SUFFIXES and path.exists():
        raise UserError(f"--input_image {given} is a video; {first_frames_of(path)}")
    else:
        return {path.stem: path}
    files.sort(key=natural_key)
    names = [file.relative_to(root).with_suffix("").as_posix() for file in files]
    whole = [file.relative_to(root).as_posix() for file in files]
    while twice := {name for name, count in Counter(names).items() if count > 1}:  # such as a.png, a.jpg and a.png.png
        names = [full if name in twice else name for name, full in zip(names, whole)]
    return dict(zip(names, files))


def first_frames_of(path):
    """Says how to get first frames out of the video `path`, or out of the videos of the folder `path`."""
    folder, one = (path, "") if path.is_dir() else (path.parent, f" --include {shlex.quote(path.name)}")
    where = f"--video_dir {shlex.quote(str(folder))}{one} --output_dir ./frames"
    cure = f"python prepare_dataset.py {where} gives a dataset, which --input_image takes"
    return cure + (f"; or: ffmpeg -i {shlex.quote(str(path))} -frames:v 1 first.png" if one else "")


def expand_pattern(pattern):
    """Returns the folder before the first wildcard, and the files that match. A part of the path that exists as it is
    written is a name, even if it has brackets. Links are followed, and `**` reaches each folder once."""
    root, parts = Path(pattern.anchor), list(pattern.parts[len(Path(pattern.anchor).parts) :])
    while (root / parts[0]).exists():
        root /= parts.pop(0)
    found = [root]
    for part in [*parts, "*"] if parts[-1] == "**" else parts:
        if part == "**":
            reached = [base / folder for base in found if base.is_dir() for folder in find_folders(base)[0]]
        else:
            reached = []
            for base in found:
                exact, pattern = base / part, f"{glob.escape(str(base))}/{part}"
                reached += [exact] if exact.exists() else map(Path, glob.glob(pattern))
        found = list(dict.fromkeys(reached))
    return root, [path for path in found if not path.is_dir()]


def list_images(args):
    """Reads the images: [{image (its name), path, sha256, size, fields of CARRIED}], and why others cannot be read."""
    images, failed, single = [], [], is_file(args.output_video)
    dataset = Path(args.reference or args.input_image)
    known = read_metadata(dataset) if dataset.is_dir() else {}
    for name, path in find_images(args.input_image).items():
        try:
            height, width = common.read_image(path).shape[:2]
            images.append({"image": name, "path": path, "sha256": file_digest(path), "size": (width, height)})
            images[-1] |= {field: known.get(same_name(name), {}).get(field) for field in CARRIED}
        except UserError as error:
            failed.append(str(error))
    if not images:
        raise UserError(failed[0] if single else f"--input_image {args.input_image}: no readable image ({failed[0]})")
    if single and len(images) + len(failed) > 1:
        raise UserError(f"--output_video {args.output_video}: several images need a folder, not a file")
    return images, failed


def warn_of_losses(images, settings, multiple):
    """Prints what the pictures lose before the model sees them. Those that lose the same share a line."""
    losses = {}
    for image in images:
        for what in what_is_lost(image, settings, multiple):
            losses.setdefault(what, []).append(image["path"])
    for what, paths in losses.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        print(f"warning: {paths[0]}{more}: {what}")


def what_is_lost(image, settings, multiple):
    """What a picture loses to the crop and to 8-bit RGB: [text]. multiple: as `describe_crop` has it."""
    crop = describe_crop(image["size"], settings.width, settings.height, multiple)
    with Image.open(image["path"]) as opened:
        alpha = "A" in opened.getbands() or "transparency" in opened.info
        losses = {
            crop: bool(crop),
            "what is transparent becomes white": alpha and opened.convert("RGBA").getextrema()[3][0] < 255,
            "CMYK becomes RGB, with nearly the same colours": opened.mode == "CMYK",
            "more than 8 bits a channel become 8": opened.mode[0] in "IF",
            "an animation or a stack of pages: its first picture is used": has_more_pictures(opened),
        }
    return [what for what, is_so in losses.items() if is_so]


def has_more_pictures(opened):
    """Whether a PIL image is an animation or has pages. The small copy in a phone's photograph (MPO) does not count."""
    try:
        return getattr(opened, "n_frames", 1) > 1 and opened.format != "MPO"
    except Exception:  # for a file that is damaged after its first picture, PIL raises errors of many kinds
        return True


# One clip


def generate(pipe, image, options, on_step, actions=None):
    """Makes one clip from an image, (H, W, 3) uint8. Returns (T, H, W, 3) uint8 and a report of each segment.

    Each later segment starts from the last frame of the one before, so its own first frame is dropped. One generator
    serves all segments: the first is the clip that --num_segments 1 gives.
    on_step: called after every denoising step. actions: scaled, (T, A), for a model that follows them.
    """
    import torch

    from svd_parts.action_encoder import follow_actions

    def callback(pipe, step, timestep, tensors):
        on_step()
        return tensors

    call = {name: options[name] for name in PIPELINE_OPTIONS}
    call |= {"output_type": "np", "callback_on_step_end": callback}
    call["generator"] = torch.Generator().manual_seed(options["seed"])  # on the CPU: the same noise on every machine
    frames, report = image[None], []
    for index in range(options["num_segments"]):
        first = index * (options["num_frames"] - 1)
        rows = None if actions is None else actions[None, first : first + options["num_frames"]]
        with follow_actions(pipe.unet, rows):
            output = pipe(Image.fromarray(frames[-1]), **call).frames[0]
        if not np.isfinite(output).all():
            raise UserError("the model gave frames that are not numbers: a damaged model, or fp16 overflow")
        segment = (output * 255).round().astype(np.uint8)
        if report and options["color_correction"]:
            segment = match_colors(segment, frames[-1])
        frames = np.concatenate([frames, segment[1:]]) if report else segment
        report.append(describe_segment(segment))
    return frames, report


def match_colors(segment, start):
    """Corrects the colours of a segment, (T, H, W, 3) uint8, whose first frame should look like `start`, (H, W, 3).

    Each channel gets one gain (0.9 to 1.1) and one offset for the whole segment, by mean and standard deviation.
    """
    first, start = segment[0].astype(np.float64), start.astype(np.float64)
    gain = np.clip((start.std((0, 1)) + 1) / (first.std((0, 1)) + 1), 0.9, 1.1)
    corrected = (segment - first.mean((0, 1))) * gain + start.mean((0, 1))
    return corrected.round().clip(0, 255).astype(np.uint8)


def describe_segment(frames):
    """What may drift: sharpness (variance of the Laplacian), mean colour, motion (mean |frame difference|), of 255."""
    sharp = np.mean([sharpness(frame) for frame in frames])
    motion = np.abs(np.diff(frames.astype(np.float64), axis=0)).mean()
    color = frames.mean((0, 1, 2))
    return {"sharpness": round(sharp, 2), "color": color.round(2).tolist(), "motion": round(motion, 3)}


# The clips of one or two models, and the real ones that they are compared with


def make_clips(clips, settings, device, progress, failed):
    """Makes the clips of one set that are still to be made. Adds to `failed` why a clip cannot be made, and goes on.

    Returns the settings of the last clip: where memory runs short, `smaller_memory` makes smaller ones for the rest.
    """
    import torch
    from safetensors.torch import load_file

    from svd_parts.action_encoder import load_action_encoder

    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe, _ = common.load_pipeline(clips.model.name, dtype, settings.base_model)
    for file, scale in clips.model.adapters:
        merge_adapter(dict(pipe.unet.named_parameters()), load_file(file), scale)
        load_action_encoder(pipe.unet, {}, file.parent)
    pipe.set_progress_bar_config(disable=True)
    wrap_unet(pipe.unet, settings.compile)
    avoid_conv3d(pipe.vae)
    for job in clips.todo:
        frames, done, started = None, progress.n, time.perf_counter()
        while frames is None:
            try:
                image = common.fit_frame(common.read_image(job["path"]), settings.width, settings.height)
                move_to_device(pipe, settings.low_vram, device)
                actions = scaled_actions(job, clips.model.settings)
                frames, segments = generate(pipe, image, clip_settings(settings, job), progress.update, actions)
            except UserError as error:
                if clips.single:
                    raise
                failed.append(f"{job['name']}: {error}")
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            if frames is None:  # not inside `except`, because the traceback there keeps the memory
                settings = smaller_memory(settings, "out of GPU memory")
                if settings is None:
                    raise UserError("out of GPU memory with the smallest settings; take fewer --num_frames")
                progress.update(done - progress.n)
                torch.cuda.empty_cache()
        if frames is None:
            continue
        more = {"seconds": round(time.perf_counter() - started, 2)}
        if settings.num_segments > 1:
            more["segments"] = segments
        clips.save(job, settings, image, frames, **more)
        shown = f"{len(frames)} frames {settings.width}x{settings.height}, {more['seconds']:.0f} s"
        progress.write(f"{job['target']}: seed {job['seed']}, {shown}")
    return settings


def choose_held_out(settings, images, clips, models):
    """Says how many images have real clips that a model was trained on, and leaves these out with --held_out.

    Returns the images that stay, and the names of those among them that were trained on.
    """
    trained_on = find_trained_on(clips, [model.settings for model in models])
    seen = [image["image"] for image in images if image["image"] in trained_on]
    left = [image for image in images if image["image"] not in trained_on]
    were = "was" if len(seen) == 1 else "were"
    unknown = [str(model.name) for model in models if "trained_on" not in model.settings]
    if settings.held_out:
        if not left:
            every = "the only clip was" if len(images) == 1 else f"all {len(images)} clips were"
            raise UserError(f"--held_out: {every} trained on; give others, in their own dataset")
        if len(unknown) == len(models):
            print(f"--held_out leaves nothing out: {' and '.join(unknown)} names no clips that it was trained on")
        if seen:
            print(f"--held_out: {len(seen)} of {len(images)} clips left out, which {were} trained on ({listed(seen)})")
        return left, []
    if seen:
        name = " or ".join(str(model.name) for model in models)
        cure = f"--held_out scores the other {len(left)} alone" if left else "score clips that were held out"
        print(f"warning: {len(seen)} of these {counted(len(images), 'clip')} {were} trained on by {name}; {cure}")
    return images, seen


def check_real_clips(settings, images, clips):
    """Raises `UserError` unless each image has a real clip of its name in `clips`, {name: clip}, that can be read."""
    others = {}  # clips at another rate, by their rate
    for name in sorted(image["image"] for image in images):
        if name not in clips:
            cure = "give that dataset as --input_image, or images that are named as its clips"
            raise UserError(f"--reference {settings.reference}: no clip named {name}; {cure}")
        if len(clips[name]["frames"]) < 2:
            raise UserError(f"--reference: {name} has one frame; a video needs two to be compared")
        paths = clips[name]["frames"][: 1 + (settings.num_frames - 1) * settings.num_segments]
        with ThreadPoolExecutor(8) as pool:  # reads them now, not after all clips are made
            collections.deque(pool.map(common.read_image, paths), maxlen=0)
        fps = clips[name].get("fps", settings.fps)
        if abs(fps - settings.fps) > 0.05 * settings.fps:
            others.setdefault(fps, []).append(name)
    for fps, names in others.items():
        what = f"{counted(len(names), 'real clip')} at {fps:g} fps ({listed(names)})"
        print(f"warning: {what} beside generated ones at {settings.fps:g} fps")


def make_all(sets, settings, failed):
    """Makes all clips that are still to be made, one model after the other. Returns whether there were any."""
    import torch

    todo, device = sum(len(clips.todo) for clips in sets), "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # a launcher starts a process for each GPU
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    why = "no CUDA GPU found" if torch.version.cuda else "this torch is built for CPUs; pytorch.org has it for CUDA"
    if not todo:
        print(sets[0].describe_done())
        return False
    where = "the GPU in fp16" if device == "cuda" else f"the CPU in fp32 ({why})"
    print(f"{settings.model_dir} on {where}" + ("" if sets[0].single else f", {counted(todo, 'clip')} to make"))
    if device == "cuda":
        settings = fit_memory(settings, sets[0].model.base)
    steps = todo * settings.num_inference_steps * settings.num_segments
    with progress_bar("generating", "step", steps) as progress:
        for clips in sets:
            gc.collect()
            torch.cuda.empty_cache()  # the model before has cycles of references, so only `gc` frees it
            if clips.todo:
                settings = make_clips(clips, settings, device, progress, failed)
    return True


def find_model(name, args):
    """Finds the parts of a model and its training settings. A dry run loads only the configuration from the hub."""
    if args.dry_run and not Path(name).is_dir():
        return Model(name, resolve_config(name), {}, None)
    return Model(name, *common.resolve_checkpoint(name, args.base_model))


def wait_for_others():
    """Waits for all processes of the launcher, which kills the others as soon as one ends with a failure."""
    from torch import distributed

    sys.stdout.flush()  # the launcher may kill this process before Python writes out what was printed
    with contextlib.suppress(RuntimeError):  # the process that holds the store may be the first to leave
        store, rank, count = next(distributed.rendezvous("env://"))
        store.set(f"ended{rank}", "")
        store.wait([f"ended{rank}" for rank in range(count)], timedelta(days=99))


def main(argv=None):
    args = parse_args(argv)
    images, failed = list_images(args)
    unreadable = len(failed)
    for text in failed:
        print(f"left out: {text}", file=sys.stderr)
    models = [find_model(name, args) for name in (args.model_dir, args.compare_with) if name]
    models[0] = check_adapters(models[0], args)
    settings = resolve(args, models[0].base, models[0].settings)
    for model in models:
        check_sizes(settings, model.base)
    real_clips, seen = {}, []
    if settings.reference:
        real_clips = {clip["directory"]: clip for clip in list_clips(settings.reference)}
        images, seen = choose_held_out(settings, images, real_clips, models)
    if settings.output_format == "lerobot":
        warn_of_codec(images)
    if settings.actions:
        add_actions_to_images(images, settings, models[0])
    elif models[0].settings.get("actions"):
        print(f"{settings.model_dir} follows actions; without --actions it moves as it likes")
    warn_of_losses(images, settings, size_multiple(models[0].base))
    if settings.dry_run:
        from svd_parts.plan import print_clip_plan

        return print_clip_plan(settings, images, models[0].base)
    if settings.reference:
        check_real_clips(settings, images, real_clips)
    # .compare is hidden, so neither train_svd.py nor `datasets` takes it for a part of the set.
    folders = [Path(settings.output_video), Path(settings.output_video) / ".compare"]
    if is_file(settings.output_video):
        sets = [SingleClip(settings, models[0], images)]
    else:
        sets = [ClipSet(settings, model, folder, images) for model, folder in zip(models, folders)]
    with contextlib.ExitStack() as locks:
        for clips in sets:
            locks.enter_context(clips.locked(settings))
        made = make_all(sets, settings, failed)
        complete = all([clips.finish(settings) for clips in sets])
        if settings.num_segments > 1:
            report_drift(sets[0].records.values())
        if complete and (settings.compare_with or settings.reference):
            judge(settings, sets, real_clips, seen)
            sets[0].publisher.publish()  # so that the page shows the scores
        if made and not sets[0].single:
            print(f"look at {sets[0].folder / 'index.html'}: sort, compare and choose the clips")
    for text in failed[unreadable:]:
        print(f"left out: {text}", file=sys.stderr)
    if unreadable:
        print(f"left out: {counted(unreadable, 'image')}, named at the start", file=sys.stderr)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        wait_for_others()
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
