"""The clips of one generated set: what is to be made, what is there, and their records."""

import contextlib
import itertools
import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

import cv2

from svd_parts.files import (
    UserError,
    file_digest,
    lock_file,
    lock_shard,
    natural_key,
    read_json,
    read_lines,
    write_file,
)
from svd_parts.formats import FORMATS, write_clip
from svd_parts.lerobot_writer import (
    DEFAULT_CAMERA,
    EPISODES_A_FOLDER,
    LEROBOT_FILE,
    check_lerobot,
    image_stats,
    write_lerobot,
)
from svd_parts.metrics import clip_measures
from svd_parts.page import page_entry, write_page
from svd_parts.weights import weights_fingerprint

# What decides the pixels of a clip besides its image and the model: what the pipeline is called with, and what we add.
PIPELINE_OPTIONS = "width height num_frames fps motion_bucket_id noise_aug_strength num_inference_steps".split()
PIPELINE_OPTIONS += ["min_guidance_scale", "max_guidance_scale", "decode_chunk_size"]
OPTIONS = [*PIPELINE_OPTIONS, "seed", "num_segments", "color_correction"]
CARRIED = ("task", "camera", "robot_type")  # what a prepared LeRobot clip knows and its generated ones inherit
DAMAGED = "damaged, or not UTF-8; repair or delete it"


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
            job["name"] = f"videos/{job['camera'] or DEFAULT_CAMERA}/{place}.mp4"
            job["target"] = self.folder / job["name"]

    def read_records(self):
        """Reads the records of all clips into `records`, and metadata.jsonl into `listed`; returns the names of those
        of `jobs` that are there."""
        path, self.listed = self.folder / "metadata.jsonl", {}
        for where, record in [] if self.single else read_lines(path, DAMAGED):
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
            record_name(path, record := read_json(path, "repair or delete it"))
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
        with lock_shard(self.hidden, self.shard, busy):
            if self.lerobot:
                self.number_clips(reserve=True)
            self.plan(settings)
            shutil.rmtree(self.making, ignore_errors=True)  # what a killed process left
            if self.shard.name:
                with lock_file(self.hidden / "finishing", busy=None):
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
        with lock_file(self.hidden / "finishing", busy=None):
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
        for name in sorted(self.records, key=natural_key):
            record = self.records[name]
            if (self.folder / name).exists():
                made += [record] if record.get("output_format") == "lerobot" else []
                lines += json.dumps({key: value for key, value in record.items() if key != "deleted"}) + "\n"
                shown.append(page_entry(name, record))
            elif name in self.listed and not record.get("deleted"):
                self.write_record(name, {**record, "deleted": True})
        if not self.single and (lines or path.exists()):
            write_file(path, lines)
            write_page(self.folder / "index.html", {"title": self.folder.absolute().name, "clips": shown})
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
        now = {**clip_settings(settings, job), "source_image_sha256": job["sha256"]}
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
        name, target, options = job["name"], job["target"], clip_settings(settings, job)
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
            **clip_measures(frames, image, settings.fps),
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
            write_file(first, cv2.imencode(".jpg", image[..., ::-1])[1].tobytes())
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
        write_file(path, json.dumps(record, indent=1))
        self.records[name] = record


def clip_settings(settings, job):
    """What decides the pixels of one clip besides its image and the model: {name: value}."""
    chosen = {"seed": job["seed"], "motion_bucket_id": job["motion_bucket_id"]}
    return {**{name: getattr(settings, name) for name in OPTIONS}, **chosen}


def fingerprint(model):
    """Tells two models apart, whatever their folders are called; the trained weights of a checkpoint count whole."""
    found = weights_fingerprint(model.base, "unet")
    found = file_digest(model.trained, found.encode())[:16] if model.trained else found
    for file, scale in model.adapters:
        found = file_digest(file, f"{found} {scale:g}".encode())[:16]
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


def is_file(output):
    """Whether an --output_video names the file of one clip; else it is the folder of a set."""
    return Path(output).suffix.lower() in (".mp4", ".gif", ".webp") and not Path(output).is_dir()
