r"""Makes videos from images with a Stable Video Diffusion model, fine-tuned by train_svd.py or not.

    python infer_svd.py --model_dir ./outputs --input_image path/to/image.jpg --output_video ./sample_output.mp4 \
        --motion_bucket_id 180 --noise_aug_strength 0.1 --fps 7

Many at once, into a folder with a metadata.jsonl that says how each was made; run it again after a stop, it goes on:

    python infer_svd.py --model_dir ./outputs --input_image ./images --output_video ./clips \
        --num_videos_per_image 4 --motion_bucket_id 60 120 180

A recipe: parse, list the clips to make, load, run the stock diffusers pipeline for each, write, compare.
"""

import argparse
import collections
import contextlib
import gc
import glob
import itertools
import json
import os
import platform
import re
import shutil
import sys
import time
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import svd_common as common  # isort: skip  (first: it quiets OpenCV, which reads that once)
from svd_common import UserError  # isort: skip

import cv2
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

# What decides the pixels of a clip besides its image and the model: what the pipeline is called with, and what we add.
PIPELINE_OPTIONS = "width height num_frames fps motion_bucket_id noise_aug_strength num_inference_steps".split()
PIPELINE_OPTIONS += ["min_guidance_scale", "max_guidance_scale", "decode_chunk_size"]
OPTIONS = [*PIPELINE_OPTIONS, "seed", "num_segments", "color_correction"]
FORMATS = {"mp4": ".mp4", "gif": ".gif", "webp": ".webp", "frames": "", "lerobot": ".mp4"}
CARRIED = ("task", "camera", "robot_type")  # what a prepared LeRobot clip knows and its generated ones inherit
LOW_VRAM_CHUNK = 4  # frames decoded at once: needs as much memory as the UNet at 1024x576
DAMAGED = "damaged, or not UTF-8; repair or delete it"
IMAGE_SUFFIXES = (*common.IMAGE_SUFFIXES, ".tif", ".tiff")
Image.MAX_IMAGE_PIXELS = None  # a panorama is no attack

# The command line, resolved: no size and no conditioning is None any more. It never changes: a smaller memory mode is
# another one (`smaller_memory`), with the reason as its `fallback`.
SETTINGS = "model_dir base_model lora lora_scale input_image output_video output_format task shard".split()
SETTINGS += [*OPTIONS, *"num_videos_per_image compare_with reference low_vram compile dry_run fallback".split()]
Settings = namedtuple("Settings", SETTINGS, defaults=[None])
# As `common.resolve_checkpoint` finds it, by its name; adapters: [(safetensors file, scale)] of each --lora.
Model = namedtuple("Model", "name base settings trained adapters", defaults=[()])

# --------------------------------------------------------------------------------------------------- Command line


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("in and out").add_argument
    add("--model_dir", required=True, help="fine-tuned folder, checkpoint-N of a run, base folder or hub name")
    add("--base_model", metavar="FOLDER_OR_NAME", help="what a checkpoint was trained from, where that has moved")
    add("--lora", nargs="+", default=[], metavar="DIR", help="lay these LoRAs over it: folders as OUTPUT_DIR/lora")
    add("--lora_scale", type=float, help="strength of the LoRAs (default 1.0)")
    add("--input_image", required=True, help="an image, a folder of them, a prepared dataset or a quoted pattern")
    add("--output_video", required=True, help="one clip: the .mp4, .gif or .webp to write; any number: a folder")
    add("--output_format", choices=list(FORMATS), help="of a folder; frames: for train_svd.py (default mp4)")
    add("--task", metavar="TEXT", help="what the robot does, for lerobot (default: what the real clip's metadata says)")
    add("--shard", metavar="I/N", help="make part I of N of a set (default: RANK/WORLD_SIZE, where they are set)")
    add("--num_videos_per_image", type=int, default=1, help="clips of each, with seeds SEED, SEED+1, ... (default 1)")

    add = parser.add_argument_group("what to make").add_argument
    add("--width", type=int, help="pixels (default: what the model was trained at, or 1024)")
    add("--height", type=int, help="pixels (default: what the model was trained at, or 576)")
    add("--num_frames", type=int, help="frames to make (default: what the model was trained at)")
    add("--fps", type=float, help="frames a second, conditioning and video (default: the training data's, or 7)")
    add("--motion_bucket_id", type=int, nargs="+", help="0..255, each makes a clip (default: the training's, or 127)")
    add("--noise_aug_strength", type=float, default=0.02, help="noise on the first frame, 0..10 (default 0.02)")
    add("--num_inference_steps", type=int, default=25, help="denoising steps (default 25)")
    add("--min_guidance_scale", type=float, default=1.0, help="guidance at the first frame (default 1.0)")
    add("--max_guidance_scale", type=float, default=3.0, help="guidance at the last frame (default 3.0)")
    add("--seed", type=int, default=0, help="of the noise (default 0)")
    add("--num_segments", type=int, default=1, help="go on from the last frame so many times in all (default 1)")
    yes_no = argparse.BooleanOptionalAction
    add("--color_correction", action=yes_no, default=True, help="keep the colours from segment to segment (default)")

    add = parser.add_argument_group("judging (into a folder)").add_argument
    add("--compare_with", metavar="MODEL", help="make the same clips with this model too; writes them side by side")
    add("--reference", metavar="DIR", help="prepared dataset with the real clips of these images: metrics.json")

    add = parser.add_argument_group("memory and speed").add_argument
    add("--decode_chunk_size", type=int, help="frames decoded at once (default: all, no flicker; 4 with --low_vram)")
    add("--low_vram", action="store_true", help="parts of the model on the GPU only while they work: slower")
    add("--compile", action="store_true", help="torch.compile the blocks: minutes to start, for long runs on a GPU")
    add("--dry_run", action="store_true", help="print the clips and the GPU memory that they need; loads no weights")
    return parser


def parse_args(argv=None):
    """Parses the command line and refuses what cannot work before anything is loaded."""
    parser = build_parser()
    args, leftover = parser.parse_known_args(argv)
    if leftover:
        quote = '; quote a pattern, and a name with spaces: --input_image "images/*.png"'
        shown = " ".join(leftover[:3]) + (f" ... ({len(leftover)})" if len(leftover) > 3 else "")
        parser.error(f"unrecognized arguments: {shown}" + (quote if not leftover[0].startswith("-") else ""))
    args.motion_bucket_id = args.motion_bucket_id and list(dict.fromkeys(args.motion_bucket_id))
    for flag, low, high in (
        ("width", 8, None), ("height", 8, None), ("num_frames", 2, None), ("fps", 1, 240), ("motion_bucket_id", 0, 255),
        ("noise_aug_strength", 0, 10), ("num_inference_steps", 1, 1000), ("decode_chunk_size", 1, None),
        ("min_guidance_scale", 0, 100), ("max_guidance_scale", 0, 100), ("seed", 0, 2**63 - 1),
        ("num_videos_per_image", 1, 1_000_000), ("num_segments", 1, 1000), ("lora_scale", -100, 100),
    ):  # fmt: skip
        given = getattr(args, flag)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not (low <= value <= (high or value)):
                parser.error(f"--{flag} must be {f'{low}..{high}' if high else f'at least {low}'}, got {value}")
    if args.min_guidance_scale > args.max_guidance_scale:
        low, high = args.min_guidance_scale, args.max_guidance_scale
        parser.error(f"--min_guidance_scale {low:g} must not be over --max_guidance_scale {high:g}: guidance rises")

    output, suffix = Path(args.output_video).absolute(), Path(args.output_video).suffix.lower()
    many = args.num_videos_per_image > 1 or len(args.motion_bucket_id or []) > 1 or args.compare_with or args.reference
    if is_file(output):
        if args.output_format not in (None, suffix[1:]) or many:
            parser.error(f"--output_video {output}: a file for one clip alone; give a folder for what you ask")
        args.output_format = suffix[1:]
    elif suffix in (*IMAGE_SUFFIXES, ".avi", ".mov", ".mkv", ".webm", ".m4v") and not output.is_dir():
        parser.error(f"--output_video must end in .mp4, .gif or .webp, or be a folder's name, got {output}")
    args.output_format = args.output_format or "mp4"
    if not args.lora and args.lora_scale is not None:
        parser.error("--lora_scale is of a LoRA: give --lora too")
    args.lora_scale = 1.0 if args.lora_scale is None else args.lora_scale
    if args.shard or os.environ.get("WORLD_SIZE", "1") == "1":
        args.shard = common.parse_shard(args.shard or "0/1")
    else:  # accelerate launch, torchrun
        rank = f"{os.environ.get('RANK')}/{os.environ['WORLD_SIZE']}"
        args.shard = common.parse_shard(rank, "RANK/WORLD_SIZE of the environment")
    if args.shard.parts > 1 and is_file(output):
        parser.error(f"--output_video {output}: one clip cannot be shared among processes; give a folder")
    if (args.compare_with or args.reference) and args.output_format in ("gif", "webp"):
        parser.error(f"--output_format {args.output_format} cannot be compared: its colours are not exact; use mp4")
    if args.output_format == "lerobot" and not find_spec("pyarrow"):
        parser.error("--output_format lerobot writes Parquet files: pip install pyarrow")
    if args.output_format in ("frames", "webp"):  # which are images
        for flag, given in (("input_image", args.input_image), ("reference", args.reference)):
            inside, folder = output.resolve(), Path(given or "").resolve()
            if given and (folder == inside or (folder in inside.parents and has_clips(folder))):
                parser.error(f"--output_video {output} lies in --{flag}, which would hold its clips too; give another")
    if args.reference and not Path(args.reference).is_dir():
        parser.error(f"--reference {args.reference}: no such folder")
    places = output.parents if is_file(output) else [output, *output.parents]
    parent = next(folder for folder in places if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        parser.error(f"--output_video: {parent} is not a folder that can be written to")
    if shutil.disk_usage(parent).free < 2**24:
        parser.error(f"--output_video: the disk of {parent} is full; make room")
    return args


def is_file(output):
    """Whether an --output_video names the file of one clip; else it is the folder of a set."""
    return Path(output).suffix.lower() in (".mp4", ".gif", ".webp") and not Path(output).is_dir()


def resolve(args, base, trained):
    """The command line -> `Settings`. Sizes and conditioning that were not given: what the model was trained with.

    base: the folder with the model's configuration; trained: training_settings.json of a fine-tuned model, else {}.
    """
    unet = common.read_config(base, "unet")
    factor = common.latent_factor(common.read_config(base, "vae"))
    side = unet.get("sample_size") or 96  # SVD-XT's configuration says 96: 768 pixels; it was trained at 1024 x 576
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
    return Settings(**{**vars(args), **settings})


# --------------------------------------------------------------------------------------------------------- Images


def images_in(folder):
    """The images directly in a folder, without hidden ones."""
    files = (p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    return [file for file in files if not file.is_dir()]


def has_clips(folder):
    """Whether a folder is a dataset, which is searched with its subfolders, and not a folder of images."""
    return not images_in(folder) or bool(common.read_metadata(folder))


def find_images(given):
    """--input_image -> {name: path}; a name is the path inside the folder, or inside what precedes the wildcard."""
    path = Path(given)
    if path.is_dir():
        files, root = images_in(path), path
        if has_clips(path):
            return {clip["directory"]: clip["frames"][0] for clip in common.list_clips(path)}
    elif glob.has_magic(given) and not path.exists():
        root, files = expand_pattern(path)
        files = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        if not files:
            raise UserError(f"--input_image {given}: no image matches")
    else:
        return {path.stem: path}
    files.sort(key=lambda file: common.natural_key(file))
    names = [file.relative_to(root).with_suffix("").as_posix() for file in files]
    whole = [file.relative_to(root).as_posix() for file in files]
    while twice := {name for name, count in Counter(names).items() if count > 1}:  # a.png, a.jpg, a.png.png
        names = [full if name in twice else name for name, full in zip(names, whole)]
    return dict(zip(names, files))


def expand_pattern(pattern):
    """(The folder before the first wildcard, the files that match). A part that exists as it is written, brackets and
    all, is a name; links are followed, and `**` reaches each folder once."""
    root, parts = Path(pattern.anchor), list(pattern.parts[len(Path(pattern.anchor).parts) :])
    while (root / parts[0]).exists():
        root /= parts.pop(0)
    found = [root]
    for part in [*parts, "*"] if parts[-1] == "**" else parts:
        if part == "**":
            reached = [base / folder for base in found if base.is_dir() for folder in common.find_folders(base)[0]]
        else:
            reached = []
            for base in found:
                exact, pattern = base / part, f"{glob.escape(str(base))}/{part}"
                reached += [exact] if exact.exists() else map(Path, glob.glob(pattern))
        found = list(dict.fromkeys(reached))
    return root, [path for path in found if not path.is_dir()]


def list_images(args):
    """What to start from: [{image (its name), path, sha256, size, and what is CARRIED}]; why others cannot be read."""
    images, failed, single = [], [], is_file(args.output_video)
    dataset = Path(args.reference or args.input_image)
    known = common.read_metadata(dataset) if dataset.is_dir() else {}
    for name, path in find_images(args.input_image).items():
        try:
            height, width = common.read_image(path).shape[:2]
            images.append({"image": name, "path": path, "sha256": common.file_digest(path), "size": (width, height)})
            images[-1] |= {field: known.get(common.same_name(name), {}).get(field) for field in CARRIED}
        except UserError as error:
            failed.append(str(error))
    if not images:
        raise UserError(failed[0] if single else f"--input_image {args.input_image}: no readable image ({failed[0]})")
    if single and len(images) + len(failed) > 1:
        raise UserError(f"--output_video {args.output_video}: several images need a folder, not a file")
    return images, failed


def warn_of_losses(images, settings, multiple):
    """Prints what the pictures lose before the model sees them, a line for all that lose the same."""
    losses = {}
    for image in images:
        for what in what_is_lost(image, settings, multiple):
            losses.setdefault(what, []).append(image["path"])
    for what, paths in losses.items():
        print(f"warning: {paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "") + f": {what}")


def what_is_lost(image, settings, multiple):
    """What the crop takes away, and what is lost on the way to 8-bit RGB: [text].

    multiple: what width and height must be multiples of, for the advice: a size of as many pixels that would fit.
    """
    (w, h), width, height = image["size"], settings.width, settings.height
    lost = 1 - min(w * height, h * width) / max(w * height, h * width)
    fitting = [max(1, round((width * height * ratio) ** 0.5 / multiple)) * multiple for ratio in (w / h, h / w)]
    advice = "--width {} --height {} would fit".format(*fitting)
    crop = f"some {round(20 * lost) / 20:.0%} of the picture is lost to the crop to {width}x{height}; {advice}"
    with Image.open(image["path"]) as opened:
        alpha = "A" in opened.getbands() or "transparency" in opened.info
        losses = {
            crop: lost > 0.15,
            "what is transparent becomes white": alpha and opened.convert("RGBA").getextrema()[3][0] < 255,
            "CMYK becomes RGB, its colours are near": opened.mode == "CMYK",
            "more than 8 bits a channel become 8": opened.mode[0] in "IF",
            "an animation or a stack of pages: its first picture is used": has_more_pictures(opened),
        }
    return [what for what, is_so in losses.items() if is_so]


def has_more_pictures(opened):
    """Whether a PIL image is an animation or a stack of pages, and not a phone's photograph with its small copy."""
    try:
        return getattr(opened, "n_frames", 1) > 1 and opened.format != "MPO"
    except Exception:  # PIL's errors for a file that is damaged behind its first picture are of many kinds
        return True


# ---------------------------------------------------------------------------------------------------------- Clips


class ClipSet:
    """The clips that one model makes in one folder: what is there already, and what is still to be made.

    The hidden folder `.infer` beside them holds a record of each clip, `.infer/NAME.json`, with all that is needed to
    make it again. The record is written first, then the clip in `.infer/.making`, from where it is moved when it is
    whole: after a kill at any moment, a clip is done if its record and the clip are there. metadata.jsonl is written
    from the records after each clip. Sets of versions without records go on from their metadata.jsonl.

    Several processes can each make a part, `settings.shard`: they write records and clips as they go, and each writes
    metadata.jsonl when its part is done, so that the last one writes all of it.

    To drop a clip, delete it: it leaves metadata.jsonl and is not made again, unless its record is deleted too.

    A single file is a set of one: its record becomes FILE.json in the end, and the hidden folder, `.FILE.infer`, goes.
    """

    def __init__(self, settings, model, folder, images):
        output = Path(settings.output_video)
        self.single, self.model, self.fingerprint = is_file(output), model, fingerprint(model)
        self.folder = output.parent if self.single else Path(folder)
        self.hidden = self.folder / (f".{output.stem}.infer" if self.single else ".infer")
        self.shard = settings.shard
        self.making = self.hidden / f".making{self.shard.name}"
        self.lerobot = settings.output_format == "lerobot"
        self.jobs, suffix, copies = [], FORMATS[settings.output_format], range(settings.num_videos_per_image)
        for image, index, bucket in itertools.product(images, copies, settings.motion_bucket_id):
            job = {**image, "seed": settings.seed + index, "motion_bucket_id": bucket}
            job |= {"task": settings.task or job["task"], "title": f"{job['image']}_seed{job['seed']}_motion{bucket}"}
            name = output.name if self.single else job["title"] + suffix
            self.jobs.append({**job, "name": name, "target": self.folder / name})
        self.plan(settings)

    def number_clips(self, reserve=False):
        """Names the clips of a LeRobot set by number: the place of a line in .infer/episodes.txt, or, not reserved yet,
        after them. Lines are only ever added, by one write: no number changes, and all processes agree."""
        path, titles = self.hidden / "episodes.txt", [json.dumps(job["title"]) for job in self.jobs]
        lines = path.read_text().splitlines() if path.exists() else []
        if reserve and set(titles) - set(lines):
            with open(path, "ab", buffering=0) as file:
                file.write("\n".join(["", *titles, ""]).encode())
                os.fsync(file.fileno())
            lines = path.read_text().splitlines()
        numbers = {title: number for number, title in enumerate(dict.fromkeys(filter(None, [*lines, *titles])))}
        for job, title in zip(self.jobs, titles):
            chunk, file = divmod(numbers[title], EPISODES_A_FOLDER)
            place = LEROBOT_FILE.format(chunk_index=chunk, file_index=file)
            job["name"] = f"videos/{job['camera'] or CAMERA}/{place}.mp4"
            job["target"] = self.folder / job["name"]

    def read_records(self):
        """Reads the records of all clips into `records`, and metadata.jsonl into `listed`; returns the names of those
        of `jobs` that are there."""
        path, self.listed = self.folder / "metadata.jsonl", {}
        for where, record in [] if self.single else common.read_lines(path, DAMAGED):
            self.listed[record_name(where, record)] = record
            if "generated" not in record:
                raise UserError(f"{path}: not written by infer_svd.py (real clips?); give another --output_video")
        if self.lerobot:
            self.number_clips()
        # the clips before the records, which are written first: other processes are making clips meanwhile
        there = {job["name"] for job in self.jobs if os.path.lexists(job["target"])}
        self.records = dict(self.listed)
        walk = os.walk(self.hidden)  # which bears that others move folders away; `rglob` does not
        for path in (Path(folder, file) for folder, _, files in walk for file in files if file.endswith(".json")):
            name = path.relative_to(self.hidden).as_posix().removesuffix(".json")
            record_name(path, record := common.read_json(path, "repair or delete it"))
            self.records[name] = {**self.listed.get(name, {}), **record}
        return there

    def refuse_others(self, settings):
        """Raises `UserError` where the folder holds what is of another set, or of something else than a set."""
        if self.lerobot:
            check_lerobot(self.folder, self.jobs, self.records.values(), settings)
        ours = ["metrics.jsonl", "model_index.json"] + ["meta", "data"] * self.lerobot  # the first: of a training run
        ours += ["metrics.json", "side_by_side"] * bool(settings.compare_with or settings.reference)
        for name in () if self.records or self.single else ours:
            if (self.folder / name).exists():
                raise UserError(f"{self.folder / name} is not of a set that was made here; give another --output_video")
        for record in self.records.values():
            if record.get("output_format", settings.output_format) != settings.output_format:
                what = f"a set of {record['output_format']}, not of {settings.output_format}"
                raise UserError(f"{self.folder}: {what}; give another --output_video")

    def plan(self, settings):
        """Reads what is there, and sets `todo`; changes nothing. Raises `UserError` where it is not ours to go on."""
        self.todo, self.dropped, there = [], [], self.read_records()
        self.refuse_others(settings)
        for job in self.jobs:
            target, record = job["target"], self.records.get(job["name"])
            if len(os.fsencode(target.name)) > 220:  # 255 with what is added while it is written
                raise UserError(f"{job['path']}: the name is too long for a clip's; give the image a shorter one")
            if self.single and target.with_suffix(".json").exists():
                raise UserError(f"--output_video: {target.with_suffix('.json')} exists already; give another name")
            if job["name"] in there:
                if record is None:
                    why = "exists already" if self.single else "exists, and metadata.jsonl does not know it"
                    raise UserError(f"--output_video: {target} {why}; move it away or give another name")
                self.check_same(job, record, settings)
            elif record is not None and (job["name"] in self.listed or record.get("deleted")):
                self.dropped.append(job["name"])
            elif self.shard.holds(job["title"]):
                self.todo.append(job)

    @contextlib.contextmanager
    def locked(self, settings):
        """Keeps the set, or the part of it, for this process alone, and looks again at what is there.

        Raises `UserError` if it is taken.
        """
        self.hidden.mkdir(parents=True, exist_ok=True)
        busy = f"{self.folder}: another infer_svd.py is writing here; wait for its end, or give another --output_video"
        with common.lock_shard(self.hidden, self.shard, busy):
            if self.lerobot:
                self.number_clips(reserve=True)
            self.plan(settings)
            shutil.rmtree(self.making, ignore_errors=True)  # what a killed process left
            if self.shard.name:
                with common.lock_file(self.hidden / "finishing", busy=None):
                    (self.hidden / f"ended{self.shard.name}").unlink(missing_ok=True)
                yield
                return
            self.tidy()
            self.publish()
            if self.dropped:
                again = f"to make it again, delete {self.hidden / self.dropped[0]}.json"
                print(f"{len(self.dropped)} clips were deleted since they were made: {self.dropped[0]}, ...; {again}")
            yield

    def finish(self, settings):
        """Ends a part of the set; returns whether it was the last: all parts have ended, even if clips failed."""
        if not self.shard.name:
            return True
        with common.lock_file(self.hidden / "finishing", busy=None):
            (self.hidden / f"ended{self.shard.name}").touch()
            ended = None
            while ended != (ended := sorted(self.hidden.glob("ended-*"))):  # others too, where the disk has no locks
                self.plan(settings)
                self.publish()
            parts = (self.shard._replace(part=part).name for part in range(self.shard.parts))
            complete = all((self.hidden / f"ended{name}").exists() for name in parts)
            if complete:
                self.tidy()
        return complete

    def tidy(self):
        """Removes what killed processes left half written; called where no other process is at work on the set."""
        for folder in self.hidden.glob(".making-*"):
            shutil.rmtree(folder)
        ours = [".metadata.jsonl.*.part", ".index.html.*.part", ".metrics.json.*.part", "side_by_side/.*.part"]
        ours = [] if self.single else ours + ["meta/**/.*.part", "data/**/.*.part"] * self.lerobot
        for left in [*itertools.chain(*map(self.folder.glob, ours)), *self.hidden.rglob(".*.part")]:
            left.unlink()

    def publish(self):
        """Writes metadata.jsonl: the records of the clips that are there. A single clip's record becomes FILE.json."""
        path, lines, made, shown = self.folder / "metadata.jsonl", "", [], []
        for name in sorted(self.records, key=common.natural_key):
            record = self.records[name]
            if (self.folder / name).exists():
                made += [record] if record.get("output_format") == "lerobot" else []
                lines += json.dumps({key: value for key, value in record.items() if key != "deleted"}) + "\n"
                shown.append(page_entry(name, record))
            elif name in self.listed and not record.get("deleted"):
                self.write_record(name, {**record, "deleted": True})
        if not self.single and (lines or path.exists()):
            common.write_file(path, lines)
            common.write_page(self.folder / "index.html", {"title": self.folder.absolute().name, "clips": shown})
            if made:
                write_lerobot(self.folder, made)
            elif self.lerobot:  # all its clips have been deleted
                for left in ("meta", "data"):
                    shutil.rmtree(self.folder / left, ignore_errors=True)
        elif self.single and self.jobs[0]["target"].exists():
            os.replace(self.hidden / f"{self.jobs[0]['name']}.json", self.jobs[0]["target"].with_suffix(".json"))
            shutil.rmtree(self.hidden, ignore_errors=True)

    def check_same(self, job, record, settings):
        """Raises `UserError` if the clip of this name was made from something else than what is asked for now."""
        now = {**clip_options(settings, job), "source_image_sha256": job["sha256"]}
        now["model_fingerprint"] = self.fingerprint
        if self.lerobot:
            now["task"] = job["task"]
        if record.get("fallback"):  # memory ran short: it was made with fewer frames decoded at once
            del now["decode_chunk_size"]
        before = {**record, **record.get("requested", {})}
        changed = ", ".join(f"{key} was {before.get(key)}, is {now[key]}" for key in now if before.get(key) != now[key])
        if changed:
            raise UserError(f"{job['target']}: made before with other settings ({changed}); give another folder")

    def save(self, job, settings, image, frames, **more):
        """Writes the record, then the clip, whole or not at all, then the metadata."""
        name, target, options = job["name"], job["target"], clip_options(settings, job)
        record = {
            "file_name": name,
            **{key: value for key, value in settings._asdict().items() if key not in ("shard", "fallback")},
            **({"fallback": settings.fallback} if settings.fallback else {}),
            **options,
            **{field: job[field] for field in CARRIED if job[field]},
            "model_dir": str(self.model.name),
            "model_fingerprint": self.fingerprint,
            "base_model": self.model.settings.get("pretrained_model_name"),
            "base_fingerprint": self.model.settings.get("base_fingerprint"),
            "trained_step": self.model.settings.get("step"),
            "source_image": str(job["path"]),
            "source_image_sha256": job["sha256"],
            "generated": True,
            **more,
            "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "diffusers")}},
            **common.clip_measures(frames, image, settings.fps),
        }
        if settings.output_format == "frames":  # a dataset's own fields: what the clip is, not what was asked for
            asked = {key: record[key] for key in ("num_frames", "motion_bucket_id")}
            bucket = record.pop("measured_motion_bucket_id")
            record |= {"num_frames": len(frames), "motion_bucket_id": bucket, "requested": asked}
            record = {"directory": record.pop("file_name"), "source": record["source_image"], **record}
        if self.lerobot:
            record["stats"] = image_stats(frames)
        if os.path.lexists(target):
            raise UserError(f"{target}: somebody else has written it meanwhile; it stays as it is")
        self.write_record(name, record)
        if not self.single and not (first := self.hidden / f"{job['sha256']}.jpg").exists():  # for the page
            common.write_file(first, cv2.imencode(".jpg", image[..., ::-1])[1].tobytes())
        aside = self.making / target.name
        for folder in (aside.parent, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        write_clip(aside, frames, settings.fps, settings.output_format)
        os.replace(aside, target)
        if not self.shard.name:
            self.publish()

    def write_record(self, name, record):
        path = self.hidden / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        common.write_file(path, json.dumps(record, indent=1))
        self.records[name] = record


def clip_options(settings, job):
    """What decides the pixels of one clip besides its image and the model: {name: value}."""
    chosen = {"seed": job["seed"], "motion_bucket_id": job["motion_bucket_id"]}
    return {**{name: getattr(settings, name) for name in OPTIONS}, **chosen}


def fingerprint(model):
    """Tells two models apart, whatever their folders are called; the trained weights of a checkpoint count whole."""
    found = common.weights_fingerprint(model.base, "unet")
    found = common.file_digest(model.trained, found.encode())[:16] if model.trained else found
    for file, scale in model.adapters:
        found = common.file_digest(file, f"{found} {scale:g}".encode())[:16]
    return found


def record_name(where, record):
    """The clip's name in a record as `ClipSet.save` writes it; raises `UserError` for any other object."""
    name = record.get("directory", record.get("file_name"))
    inside = isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts
    kinds = {"requested": dict, "segments": list}
    if record.get("output_format") == "lerobot":
        kinds |= {"stats": dict, "task": str, "height": int, "width": int, "fps": (int, float)}
        inside = inside and kinds.keys() - {"requested", "segments"} <= record.keys()
    if not inside or not all(isinstance(record[key], kind) for key, kind in kinds.items() if key in record):
        raise UserError(f"{where}: {DAMAGED}")
    return name


def page_entry(name, record):
    """What index.html shows of a clip."""
    bucket = record.get("motion_bucket_id")  # in a set of frames, the measured one
    fields = "motion sharpness_ratio psnr_first_frame flicker seed fps task width height".split()
    entry = {field: record.get(field) for field in fields}
    entry["measured_motion_bucket_id"] = record.get("measured_motion_bucket_id", bucket)
    entry["asked_motion_bucket_id"] = record.get("requested", {}).get("motion_bucket_id", bucket)
    entry["frames"] = record.get("num_frames") if "directory" in record else None
    first = f".infer/{record.get('source_image_sha256')}.jpg"
    return {**entry, "first": first, "name": name, "url": quote(os.fsencode(name))}


def write_clip(path, frames, fps, output_format):
    """Writes (T, H, W, 3) uint8 RGB as mp4, gif, webp or a folder of PNG; whole or not at all."""
    if output_format == "mp4":
        common.write_video(path, frames, fps)
    elif output_format == "lerobot":  # as lerobot encodes: others cannot be joined to its own; also quick to seek in
        common.write_video(path, frames, fps, "-g", "2")
    elif output_format == "frames":
        with common.replacing(path, folder=True) as aside:
            for index, frame in enumerate(frames):
                common.write_file(aside / f"{index:05d}.png", common.encode_png(frame))
    else:  # whole milliseconds, hundredths in a GIF: spread so that the frame rate is right on the whole
        unit = 10 if output_format == "gif" else 1
        ends = [round(1000 * t / fps / unit) * unit for t in range(len(frames) + 1)]
        first, *rest = (Image.fromarray(frame) for frame in frames)
        options = {"save_all": True, "append_images": rest, "duration": np.diff(ends).tolist(), "loop": 0}
        with common.replacing(path) as aside:
            first.save(aside, output_format, quality=90, **options)


def read_clip(path):
    """What `write_clip` wrote as mp4 or frames."""
    if not path.is_dir():
        return common.read_video(path)
    return np.stack([common.read_image(frame) for frame in common.list_frames(path)])


# -------------------------------------------------------------------------------------------------------- LeRobot
# Version 3.0 of its layout, an mp4 for each episode; all else is written from the records whenever metadata.jsonl is.

CAMERA, EPISODES_A_FOLDER = "observation.images.image", 1000  # CAMERA: where the image is of no LeRobot clip
LEROBOT_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
COLUMNS = {"timestamp": "float32", **dict.fromkeys(["frame_index", "episode_index", "index", "task_index"], "int64")}


def lerobot_info(clip):
    """What meta/info.json says of a set with this clip (a record or a job). lerobot merges only sets that are equal in
    robot_type, fps and features, down to the video's `info`, which is what its `get_video_info` says of our mp4."""
    shape = {"height": clip["height"], "width": clip["width"], "channels": 3}
    video = {**shape, "codec": "h264", "pix_fmt": "yuv420p", "is_depth_map": False, "fps": int(clip["fps"])}
    info = {**{f"video.{key}": value for key, value in video.items()}, "has_audio": False}
    camera = {"dtype": "video", "shape": list(shape.values()), "names": list(shape), "info": info}
    columns = {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in COLUMNS.items()}
    return {
        "codebase_version": "v3.0", "generated": True, "robot_type": clip.get("robot_type"), "fps": clip["fps"],
        "features": {clip.get("camera") or CAMERA: camera, **columns},
        "chunks_size": EPISODES_A_FOLDER, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200,
        "data_path": f"data/{LEROBOT_FILE}.parquet", "video_path": f"videos/{{video_key}}/{LEROBOT_FILE}.mp4",
    }  # fmt: skip


def is_line(text):
    """Whether this is one line of text, which a file in UTF-8 can hold."""
    return isinstance(text, str) and text.splitlines() == [text] == [text.encode("utf-8", "ignore").decode()]


def check_lerobot(folder, jobs, records, settings):
    """Raises `UserError` where the clips to make and those that are there cannot be one set, or it is not ours."""
    if settings.task and not is_line(settings.task):
        raise UserError("--task must be one line of text")
    for job in jobs:
        if not is_line(job["task"]):
            raise UserError(f"--output_format lerobot: no line of text tells {job['path']}'s task; give --task TEXT")
        for field in ("camera", "robot_type"):
            if job[field] and not (isinstance(job[field], str) and re.fullmatch(r"\w[\w. -]*", job[field])):
                raise UserError(f"{job['path']}: its {field} in metadata.jsonl is no name: {json.dumps(job[field])}")
    infos = [lerobot_info({**settings._asdict(), **job}) for job in jobs]
    infos += [lerobot_info(record) for record in records if record.get("output_format") == "lerobot"]
    if (path := folder / "meta" / "info.json").exists():
        infos.append(common.read_json(path, "give another --output_video"))
    different = [key for key, value in infos[0].items() if any(info.get(key) != value for info in infos)]
    if different:
        cure = "give another --output_video; prepare_dataset.py --camera takes one of several cameras"
        raise UserError(f"{folder}: a LeRobot set is of one kind, here {' and '.join(different)} would differ; {cure}")


def image_stats(frames):
    """(T, H, W, 3) uint8 -> LeRobot's statistics of an episode, of the colours from 0 to 1, shape (3, 1, 1)."""
    pixels = np.ascontiguousarray(frames.reshape(-1, 3).T)
    stats = {name: getattr(pixels, name)(1) / 255 for name in ("min", "max", "mean", "std")}
    quantiles = np.percentile(pixels[:, ::7], [1, 10, 50, 90, 99], axis=1) / 255  # a seventh tells as much
    stats |= dict(zip(("q01", "q10", "q50", "q90", "q99"), quantiles))
    return {**{name: v.round(6).reshape(3, 1, 1).tolist() for name, v in stats.items()}, "count": [len(frames)]}


def write_lerobot(folder, records):
    """Writes data/ and meta/ of a LeRobot set from the records of its clips, which are in the order of the episodes."""
    import pyarrow
    from pyarrow import parquet

    def write(path, columns, metadata=None):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with common.replacing(folder / path) as aside:
            parquet.write_table(pyarrow.table(columns).replace_schema_metadata(metadata), aside)

    tasks, stats = [record["task"] for record in records], [record["stats"] for record in records]
    names, info = list(dict.fromkeys(tasks)), lerobot_info(records[0])
    camera, count = next(iter(info["features"])), len(records)
    lengths = np.array([episode["count"][0] for episode in stats])
    ends = lengths.cumsum()
    episode, index = np.arange(count).repeat(lengths), np.arange(ends[-1])
    frame, task = index - (ends - lengths)[episode], np.array([names.index(text) for text in tasks])[episode]
    values = zip(COLUMNS.items(), (frame / info["fps"], frame, episode, index, task))
    write("data/chunk-000/file-000.parquet", {name: column.astype(dtype) for (name, dtype), column in values})

    videos, zeros = [Path(record["file_name"]) for record in records], np.zeros(count, int)
    columns = {"episode_index": np.arange(count), "tasks": [[text] for text in tasks], "length": lengths}
    columns |= {"dataset_from_index": ends - lengths, "dataset_to_index": ends, "generated": zeros == 0}
    columns |= {f"{part}/{name}_index": zeros for part in ("data", "meta/episodes") for name in ("chunk", "file")}
    columns[f"videos/{camera}/chunk_index"] = [int(path.parent.name[len("chunk-") :]) for path in videos]
    columns[f"videos/{camera}/file_index"] = [int(path.stem[len("file-") :]) for path in videos]
    columns |= {f"videos/{camera}/from_timestamp": zeros / 1, f"videos/{camera}/to_timestamp": lengths / info["fps"]}
    columns |= {f"stats/{camera}/{name}": [episode[name] for episode in stats] for name in stats[0]}
    write("meta/episodes/chunk-000/file-000.parquet", columns)

    each = {name: np.array([episode[name] for episode in stats]) for name in stats[0]}  # (N, 3, 1, 1)
    each["std"] = each["std"] ** 2 + each["mean"] ** 2
    total = {name: np.average(values, axis=0, weights=lengths) for name, values in each.items()}  # as lerobot does
    total |= {"min": each["min"].min(0), "max": each["max"].max(0), "count": each["count"].sum(0)}
    total["std"] = np.sqrt(np.maximum(total["std"] - total["mean"] ** 2, 0))
    total = {name: values.tolist() for name, values in total.items()}
    common.write_file(folder / "meta/stats.json", json.dumps({camera: total}))

    # Readers look a task up by its text, the index of pandas: it has to be told which column that is.
    column = {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    pandas = json.dumps({"index_columns": ["task"], "column_indexes": [], "columns": [column]})
    write("meta/tasks.parquet", {"task_index": np.arange(len(names)), "task": names}, {"pandas": pandas})
    info |= {"total_episodes": count, "total_frames": len(index), "total_tasks": len(names)}
    common.write_file(folder / "meta/info.json", json.dumps({**info, "splits": {"train": f"0:{count}"}}, indent=1))


# ---------------------------------------------------------------------------------------------------------- Model
# The stock pipeline. Only --compile, --low_vram and a smaller decode_chunk_size change more than the rounding.


def save_memory(unet):
    """What --low_vram does to a UNet, in place: feed-forward layers in chunks, and guidance's two samples one after the
    other, which halves the activations and is equal but for rounding."""
    import torch

    def one_at_a_time(sample, timestep, encoder_hidden_states, added_time_ids, return_dict=True):
        parts = zip(sample.split(1), encoder_hidden_states.split(1), added_time_ids.split(1))
        made = [unet.forward_of_all(x, timestep, e, ids, return_dict=False)[0] for x, e, ids in parts]
        return (torch.cat(made),)

    if not hasattr(unet, "forward_of_all"):
        unet.enable_forward_chunking(1, dim=0)
        unet.forward_of_all, unet.forward = unet.forward, one_at_a_time


def wrap_unet(unet, compiled=False):
    """Wraps a stock UNet in place: the same frames, but for the rounding of torch.compile."""
    common.avoid_conv3d(unet)
    processors = unet.attn_processors.items()  # attn2 is the attention over the image's one token
    unet.set_attn_processor({n: common.SingleTokenAttention() if ".attn2." in n else p for n, p in processors})
    if compiled:
        common.compile_blocks(unet)


def move_to_device(pipe, low_vram, device):
    """Puts a pipeline on the device: whole, or with --low_vram each part only while it works (diffusers' offload)."""
    import torch

    if pipe.vae.dtype != pipe.unet.dtype:
        pipe.vae.to(dtype=pipe.unet.dtype)  # the pipeline's encode in fp32 was left by an out-of-memory
    if low_vram:
        save_memory(pipe.unet)
    if low_vram and device == "cuda":
        pipe.enable_model_cpu_offload(gpu_id=torch.cuda.current_device())  # else: always the first
    else:
        pipe.to(device)


def forecast_memory(base, settings):
    """GiB of GPU memory that a clip needs in fp16: the real forward passes on tensors that have a shape but no data.

    base: where the configuration is. Without --low_vram all parts are there all the time; with it, only the one that
    works. CUDA itself takes 0.5 more.
    """
    import torch
    from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    def peak(model, function, *inputs):
        with common.memory_tracker() as tracker, torch.no_grad():
            for tensor in [*model.parameters(), *inputs]:
                tracker.track(tensor)
            function(*inputs)
        return tracker.peak

    with FakeTensorMode(allow_non_fake_inputs=True):
        unet = UNetSpatioTemporalConditionModel.from_config(common.read_config(base, "unet"))
        vae = AutoencoderKLTemporalDecoder.from_config(common.read_config(base, "vae"))
        clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**common.read_config(base, "image_encoder")))
        for model in (unet, vae, clip):
            common.avoid_conv3d(model)
            for parameter in model.parameters():
                parameter.data = parameter.data.half()
        if settings.low_vram:
            save_memory(unet)
        factor = common.latent_factor(vae.config)
        h, w, chunk = settings.height // factor, settings.width // factor, settings.decode_chunk_size
        x = torch.empty(2, settings.num_frames, unet.config.in_channels, h, w).half()
        token, ids = torch.empty(2, 1, unet.config.cross_attention_dim).half(), torch.empty(2, 3).half()
        z = torch.empty(chunk, vae.config.latent_channels, h, w).half()
        denoise = peak(unet, lambda x, token, ids: unet(x, torch.tensor(1.0), token, ids), x, token, ids)
        decode = peak(vae, lambda z: vae.decode(z, num_frames=chunk), z)
        decode += 4 * 3 * settings.num_frames * settings.width * settings.height  # the frames, gathered in fp32
        sizes = [sum(2 * p.numel() for p in model.parameters()) for model in (unet, vae, clip)]
    if not settings.low_vram:
        denoise, decode = denoise + sizes[1] + sizes[2], decode + sizes[0] + sizes[2]
    return max(denoise, decode, sizes[1] + sizes[2]) / 2**30


def smaller_memory(settings, reason):
    """The settings with the next smaller memory mode, which it prints; None where there is none."""
    for low_vram, chunk in ((settings.low_vram, 8), (True, LOW_VRAM_CHUNK), (True, 1)):
        change = {"low_vram": low_vram, "decode_chunk_size": min(chunk, settings.decode_chunk_size)}
        change = {name: value for name, value in change.items() if getattr(settings, name) != value}
        if change:
            flags = " ".join(f"--{name}" + ("" if value is True else f" {value}") for name, value in change.items())
            tqdm.write(f"{reason}: going on with {flags}")
            return settings._replace(**change, fallback=reason)
    return None


def fit_memory(settings, folder):
    """Before anything is loaded: smaller settings where the forecast says that the GPU has too little memory."""
    import torch

    available = common.usable_memory(torch.device("cuda"))
    while (needed := forecast_memory(folder, settings)) > available:
        smaller = smaller_memory(settings, f"needs {needed:.1f} GiB, {available:.1f} GiB are free")
        if smaller is None:
            break  # a forecast may err: let it try
        settings = smaller
    return settings


# ----------------------------------------------------------------------------------------------------- Generation


def generate(pipe, image, options, on_step):
    """One clip -> (T, H, W, 3) uint8 and a report of each segment; `on_step()` is called after every denoising step.

    Each later segment starts from the last frame of the one before, and its own first frame, which shows the same, is
    dropped. One generator serves all segments, so that the first is the clip that one segment gives.
    """
    import torch

    def callback(pipe, step, timestep, tensors):
        on_step()
        return tensors

    call = {name: options[name] for name in PIPELINE_OPTIONS}
    call |= {"output_type": "np", "callback_on_step_end": callback}
    call["generator"] = torch.Generator().manual_seed(options["seed"])  # on the CPU: the same noise on every machine
    frames, report = image[None], []
    for _ in range(options["num_segments"]):
        output = pipe(Image.fromarray(frames[-1]), **call).frames[0]
        if not np.isfinite(output).all():
            raise UserError("the model gave frames that are not numbers (a damaged model, or fp16 overflow)")
        segment = (output * 255).round().astype(np.uint8)
        if report and options["color_correction"]:
            segment = match_colors(segment, frames[-1])
        frames = np.concatenate([frames, segment[1:]]) if report else segment
        report.append(describe_segment(segment))
    return frames, report


def match_colors(segment, start):
    """Corrects a segment's colours by what went wrong in its first frame, which should look like `start`.

    Mild: per channel, one gain (at most 10 % off) and one offset for the whole segment, by mean and standard deviation.
    """
    first, start = segment[0].astype(np.float64), start.astype(np.float64)
    gain = np.clip((start.std((0, 1)) + 1) / (first.std((0, 1)) + 1), 0.9, 1.1)
    corrected = (segment - first.mean((0, 1))) * gain + start.mean((0, 1))
    return corrected.round().clip(0, 255).astype(np.uint8)


def describe_segment(frames):
    """Sharpness (variance of the Laplacian), mean colour and motion (mean |frame difference|): what may drift."""
    sharpness = np.mean([common.sharpness(frame) for frame in frames])
    motion = np.abs(np.diff(frames.astype(np.float64), axis=0)).mean()
    color = frames.mean((0, 1, 2))
    return {"sharpness": round(sharpness, 2), "color": color.round(2).tolist(), "motion": round(motion, 3)}


def make_clips(clips, settings, device, progress, failed):
    """Makes what is still to be made of one set. A clip that fails is named and left out.

    Returns the settings, which are smaller ones from the clip on for which the memory was not enough.
    """
    import torch
    from safetensors.torch import load_file

    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe, _ = common.load_pipeline(clips.model.name, dtype, settings.base_model)
    for file, scale in clips.model.adapters:
        common.add_adapter(dict(pipe.unet.named_parameters()), load_file(file), scale)
    pipe.set_progress_bar_config(disable=True)
    wrap_unet(pipe.unet, settings.compile)
    common.avoid_conv3d(pipe.vae)
    for job in clips.todo:
        frames, done, started = None, progress.n, time.perf_counter()
        while frames is None:
            try:
                image = common.fit_frame(common.read_image(job["path"]), settings.width, settings.height)
                move_to_device(pipe, settings.low_vram, device)
                frames, segments = generate(pipe, image, clip_options(settings, job), progress.update)
            except UserError as error:
                if clips.single:
                    raise
                failed.append(f"{job['name']}: {error}")
                break
            except RuntimeError as error:
                if not common.is_out_of_memory(error):
                    raise
            if frames is None:  # outside of `except`, whose traceback holds the memory
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


# -------------------------------------------------------------------------------------------------------- Judging


def judge(settings, sets, real_clips):
    """Side-by-side videos of the sets (and the real clips); with real clips, scores in metrics.json and a table.

    An infinite PSNR (equal pictures) counts as 100 dB.
    """
    names = [Path(s.model.name).resolve().name for s in sets]
    names = names if len(set(names)) == len(sets) else [str(s.model.name) for s in sets]
    lora = " + LoRA" * bool(sets[0].model.adapters)
    labels = ["generated"] if len(sets) == 1 else [f"generated ({names[0]}{lora})", f"generated ({names[1]})"]
    if len(set(labels)) < len(sets):  # a model beside itself
        labels[1] = f"compared ({names[1]})"
    scores = {}  # {label: {real clip: [scores]}}
    for jobs in zip(*(s.jobs for s in sets)):
        if not all(job["target"].exists() for job in jobs):  # a clip that failed
            continue
        videos = dict(zip(labels, (read_clip(job["target"]) for job in jobs)))
        if real_clips:
            paths = real_clips[jobs[0]["image"]]["frames"][: len(videos[labels[0]])]
            real = common.read_frames(paths, settings.width, settings.height)
            copied = np.repeat(real[:1], len(real), axis=0)
            for label, video in {"first frame copied": copied, **videos}.items():
                found = common.video_metrics(video, real)
                found |= {name: min(found[name], 100.0) for name in ("psnr", "psnr_moving") if found[name] is not None}
                scores.setdefault(label, {}).setdefault(jobs[0]["image"], []).append(found)
            videos = {"real": real, **videos}
        if len(videos) > 1:
            target = Path(settings.output_video) / "side_by_side" / f"{jobs[0]['title']}.mp4"
            target.parent.mkdir(parents=True, exist_ok=True)
            common.write_video(target, common.side_by_side(videos), settings.fps)
    if scores:
        table = {label: bootstrap(found) for label, found in scores.items()}
        asked = {name: getattr(settings, name) for name in ("model_dir", "compare_with", "reference")}
        result = {"settings": asked, "mean": table, "clips": scores}
        common.write_file(Path(settings.output_video) / "metrics.json", json.dumps(result, indent=1))
        print_table(table, len(next(iter(scores.values()))))


def bootstrap(scores, draws=2000):
    """{clip: [scores]} -> {metric: {mean, low, high}}: 95 % percentile bootstrap over the clips, fixed seed.

    The videos of one real clip (other seeds) are averaged first: they are no independent samples. A metric that a clip
    does not have (it does not move) leaves the clip out.
    """
    result, rng = {}, np.random.default_rng(0)
    for metric in next(iter(scores.values()))[0]:
        found = [[s[metric] for s in clip if s[metric] is not None] for clip in scores.values()]
        means = np.array([np.mean(values) for values in found if values])
        if len(means):
            draw = means[rng.integers(len(means), size=(draws, len(means)))].mean(1)
            low, high = np.percentile(draw, [2.5, 97.5])
            result[metric] = {"mean": float(means.mean()), "low": float(low), "high": float(high)}
    return result


def print_table(table, count):
    names = {"psnr": "PSNR dB", "ssim": "SSIM", "psnr_moving": "PSNR moving dB", "motion_ratio": "motion ratio"}
    names["flow_error"] = "flow error px"
    print(f"\n{count} real clips, 95 % intervals" + "".join(f"  {name:>20s}" for name in names.values()))
    for label, scores in table.items():
        cells = (scores.get(name) for name in names)
        texts = (f"{c['mean']:.2f} [{c['low']:.2f}, {c['high']:.2f}]" if c else "-" for c in cells)
        print(f"{label:31.31s}" + "".join(f"  {text:>20s}" for text in texts))


def report_drift(records):
    """Prints how the segments differ from the first: the mean over the clips."""
    reports = ([[s["sharpness"], s["motion"], *s["color"]] for s in r["segments"]] for r in records if "segments" in r)
    values = np.array(list(zip(*reports)))  # (segments, clips, 5)
    for number, value in enumerate(values, 1):
        sharpness, motion = ((value[:, :2] + 1e-9) / (values[0, :, :2] + 1e-9)).mean(axis=0)
        color = " ".join(f"{channel:+.1f}" for channel in (value[:, 2:] - values[0, :, 2:]).mean(axis=0))
        print(f"segment {number}: sharpness x {sharpness:.2f}, motion x {motion:.2f}, colour {color}")


# ----------------------------------------------------------------------------------------------------------- Main


def find_real_clips(settings, images):
    """{image: its real clip} of --reference; each image's name must be a clip's."""
    clips = {clip["directory"]: clip for clip in common.list_clips(settings.reference)}
    for name in sorted(image["image"] for image in images):
        if name not in clips:
            cure = "give that dataset as --input_image, or images that are named as its clips"
            raise UserError(f"--reference {settings.reference}: no clip named {name}; {cure}")
        if len(clips[name]["frames"]) < 2:
            raise UserError(f"--reference: {name} has one frame; a video needs two to be compared")
        paths = clips[name]["frames"][: 1 + (settings.num_frames - 1) * settings.num_segments]
        with ThreadPoolExecutor(8) as pool:  # read now, not when all clips are made
            collections.deque(pool.map(common.read_image, paths), maxlen=0)
        fps = clips[name].get("fps", settings.fps)
        if abs(fps - settings.fps) > 0.05 * settings.fps:
            print(f"warning: {name} is at {fps:g} fps, the generated clip at {settings.fps:g}")
    return clips


def print_plan(settings, images, base):
    """--dry_run: what there is to make and the memory that it needs, from the configuration alone, without weights."""
    count = len(images) * settings.num_videos_per_image * len(settings.motion_bucket_id)
    count *= 2 if settings.compare_with else 1
    size, chunk = f"{settings.width}x{settings.height}", settings.decode_chunk_size
    print(f"{count} clips of {settings.num_frames} frames, {size}, {chunk} frames decoded at once")
    print(f"{forecast_memory(base, settings):.1f} GiB of GPU memory in fp16, and about 0.5 GiB for CUDA itself")


def make_all(sets, settings, failed):
    """Makes all that is still to be made, one model after the other; the reason of each clip that fails is kept."""
    import torch

    todo, device = sum(len(clips.todo) for clips in sets), "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # a launcher starts a process for each GPU
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    why = "no CUDA GPU found" if torch.version.cuda else "this torch is built for CPUs; pytorch.org has it for CUDA"
    where = "the GPU in fp16" if device == "cuda" else f"the CPU in fp32 ({why})"
    print(f"{settings.model_dir} on {where}" + ("" if sets[0].single else f", {todo} clips to make"))
    if device == "cuda" and todo:
        settings = fit_memory(settings, sets[0].model.base)
    steps = todo * settings.num_inference_steps * settings.num_segments
    with tqdm(total=steps, desc="generating", unit="step") as progress:
        for clips in sets:
            gc.collect()
            torch.cuda.empty_cache()  # the model before has cycles, by which it would stay beside this one
            if clips.todo:
                settings = make_clips(clips, settings, device, progress, failed)


def find_model(name, args):
    """Where a model's parts are and what it was trained with. For a dry run of a hub's model, its configuration."""
    if args.dry_run and not Path(name).is_dir():
        return Model(name, common.resolve_config(name), {}, None)
    return Model(name, *common.resolve_checkpoint(name, args.base_model))


def read_lora(folder):
    """(adapter_config.json, the header of its weights) of a plain LoRA; raises `UserError` for any other folder."""
    config, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config.is_file():
        raise UserError(f"--lora {folder}: no {config.name} in it; give OUTPUT_DIR/lora of a training run")
    config, tensors = common.read_json(config), common.safetensors_header(file)
    special = [n for n in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save") if config.get(n)]
    special += [f"peft_type {config.get('peft_type')}"] * (config.get("peft_type") != "LORA")
    special += [f"bias {config.get('bias')}"] * (config.get("bias", "none") != "none")
    numbers = (config.get(name) for name in ("r", "lora_alpha"))
    special += ["no r and lora_alpha"] * (not all(isinstance(n, (int, float)) and n > 0 for n in numbers))
    if special:
        raise UserError(f"--lora {folder}: not a plain LoRA ({', '.join(special)}); peft itself can merge it")
    return config, tensors


def add_adapters(model, args):
    """The model with the LoRAs of --lora, and where it was not trained here, with what the first was trained with.

    Raises `UserError` for a folder that holds none, and for a LoRA that is not for this model, by the shapes alone.
    """
    shapes, settings, adapters = {}, model.settings, []
    for file in common.weight_files(model.base, "unet") if args.lora and not args.dry_run else ():
        shapes |= {name: tensor["shape"] for name, tensor in common.safetensors_header(file).items()}
    for folder in map(Path, args.lora):
        config, tensors = read_lora(folder)
        layers = sorted({name.rsplit(".lora_", 1)[0] for name in tensors})
        for layer in layers or [""]:
            down, up = (tensors.get(f"{layer}.lora_{side}.weight", {}).get("shape", []) for side in "AB")
            if len(down) != 2 or len(up) != 2 or down[0] != config["r"] or up[1] != config["r"]:
                raise UserError(f"--lora {folder}: damaged, {layer} has no two matrices of rank {config['r']}")
            name = layer.removeprefix("base_model.model.") + ".weight"
            if shapes and shapes.get(name) != [up[0], down[1]]:
                raise UserError(f"--lora {folder}: for another model: {model.base} has no {name} of its size")
        adapters.append((folder / "adapter_model.safetensors", args.lora_scale * common.lora_scale(config)))
        if (folder / common.SETTINGS).is_file():
            found = common.read_settings(folder / common.SETTINGS, "delete it, or copy the folder again")
            if {**found, "step": None} == {**model.settings, "step": None}:  # a result's or a checkpoint's
                raise UserError(f"--lora {folder} is merged into --model_dir {model.name} already; leave it out")
            settings = settings or found
    return model._replace(adapters=adapters, settings=settings)


def wait_for_others():
    """Until every process of the launcher has come here: it kills the others as soon as one ends with a failure."""
    from torch import distributed

    with contextlib.suppress(RuntimeError):  # who holds the store may be the first to leave
        store, rank, count = next(distributed.rendezvous("env://"))
        store.set(f"ended{rank}", "")
        store.wait([f"ended{rank}" for rank in range(count)], timedelta(days=99))


def main(argv=None):
    args = parse_args(argv)
    images, failed = list_images(args)
    for text in failed:
        print(f"left out: {text}", file=sys.stderr)
    models = [find_model(name, args) for name in (args.model_dir, args.compare_with) if name]
    models[0] = add_adapters(models[0], args)
    settings = resolve(args, models[0].base, models[0].settings)
    for model in models:
        common.check_sizes(settings, model.base)
    warn_of_losses(images, settings, common.size_multiple(models[0].base))
    if settings.dry_run:
        return print_plan(settings, images, models[0].base)
    real_clips = find_real_clips(settings, images) if settings.reference else {}
    # .compare is hidden: neither train_svd.py nor datasets takes it for a part of the set
    folders = [Path(settings.output_video), Path(settings.output_video) / ".compare"]
    sets = [ClipSet(settings, model, folder, images) for model, folder in zip(models, folders)]
    with contextlib.ExitStack() as locks:
        for clips in sets:
            locks.enter_context(clips.locked(settings))
        make_all(sets, settings, failed)
        complete = all([clips.finish(settings) for clips in sets])
        if settings.num_segments > 1:
            report_drift(sets[0].records.values())
        if complete and (settings.compare_with or settings.reference):
            judge(settings, sets, real_clips)
    for text in failed:
        print(f"left out: {text}", file=sys.stderr)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        wait_for_others()
    return 1 if failed else 0


if __name__ == "__main__":
    common.run_script(main)
