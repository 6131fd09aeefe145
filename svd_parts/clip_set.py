"""The clips of one generated set: which are there, which are still to be made, and the record of each."""

import contextlib
import itertools
import os
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np

from svd_parts.actions import FILE as ACTIONS
from svd_parts.files import UserError, counted, file_digest, lock_file, lock_shard, read_json, write_file, write_json
from svd_parts.formats import FORMATS
from svd_parts.lerobot_writer import check_lerobot, image_stats, table_stats
from svd_parts.metrics import clip_measures
from svd_parts.publishing import Publisher, is_of_format
from svd_parts.weights import weights_fingerprint

# What decides the pixels of a clip, besides its image and the model: the arguments of the pipeline, and our own.
PIPELINE_OPTIONS = "width height num_frames fps motion_bucket_id noise_aug_strength num_inference_steps".split()
PIPELINE_OPTIONS += ["min_guidance_scale", "max_guidance_scale", "decode_chunk_size"]
OPTIONS = [*PIPELINE_OPTIONS, "seed", "num_segments", "color_correction"]
CARRIED = "task camera robot_type video_info action_names".split()  # fields that a clip takes over from its real clip
PUBLISH_EVERY = 30  # seconds; writing the tables after every clip would slow down a large set


def is_file(output):
    """Whether an --output_video names the file of one clip, and not the folder of a set."""
    suffixes = {chosen.suffix for chosen in FORMATS.values() if chosen.is_file}
    return Path(output).suffix.lower() in suffixes and not Path(output).is_dir()


def make_jobs(settings, images, folder):
    """A job for each clip: its image's fields, seed, motion_bucket_id, title, name (in the set) and target path."""
    jobs, copies = [], range(settings.num_videos_per_image)
    for image, index, bucket in itertools.product(images, copies, settings.motion_bucket_id):
        job = {**image, "seed": settings.seed + index, "motion_bucket_id": bucket}
        job |= {"task": settings.task or job["task"], "title": f"{job['image']}_seed{job['seed']}_motion{bucket}"}
        name = job["title"] + FORMATS[settings.output_format].suffix
        jobs.append({**job, "name": name, "target": folder / name})
    return jobs


def clip_settings(settings, job):
    """What decides the pixels of one clip, besides its image and the model: {option: value}."""
    chosen = {"seed": job["seed"], "motion_bucket_id": job["motion_bucket_id"]}
    return {**{name: getattr(settings, name) for name in OPTIONS}, **chosen}


def fingerprint(model):
    """Hexadecimal digits that tell two models apart, whatever their folders are called."""
    found = weights_fingerprint(model.base, "unet")
    found = file_digest(model.trained, found.encode())[:16] if model.trained else found
    for file, scale in model.adapters:
        found = file_digest(file, f"{found} {scale:g}".encode())[:16]
    return found


def describe_clip(job, settings, model, model_fingerprint, frames, image, more):
    """The record of a clip: what is needed to make it again, its measures, and `more`. frames: (T, H, W, 3) uint8."""
    record = {
        "file_name": job["name"],
        **{key: value for key, value in settings._asdict().items() if key not in ("shard", "fallback")},
        **({"fallback": settings.fallback} if settings.fallback else {}),
        **clip_settings(settings, job),
        **{field: job[field] for field in CARRIED if job[field]},
        "model_dir": str(model.name),
        "model_fingerprint": model_fingerprint,
        "base_model": model.settings.get("pretrained_model_name"),
        "base_fingerprint": model.settings.get("base_fingerprint"),
        "trained_step": model.settings.get("step"),
        "source_image": str(job["path"]),
        "source_image_sha256": job["sha256"],
        **{key: job[key] for key in ("actions_file", "actions_sha256") if job.get(key)},
        "generated": True,
        **more,
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "diffusers")}},
        **clip_measures(frames, image, settings.fps),
    }
    if settings.output_format == "frames":  # the fields of a dataset say what the clip is, not what was asked for
        asked = {key: record[key] for key in ("num_frames", "motion_bucket_id")}
        bucket = record.pop("measured_motion_bucket_id")
        record |= {"num_frames": len(frames), "motion_bucket_id": bucket, "requested": asked}
        record = {"directory": record.pop("file_name"), "source": record["source_image"], **record}
    if settings.output_format == "lerobot":
        record["stats"] = image_stats(frames)
        if job.get("action_rows"):
            record |= {"action_rows": job["action_rows"], "action_stats": table_stats(job["action_rows"])}
    return record


def differences(job, record, settings, model_fingerprint):
    """How the settings of a clip that is there differ from those asked for: `seed was 1, is 2`, or ""."""
    now = {**clip_settings(settings, job), "source_image_sha256": job["sha256"]}
    now |= {"model_fingerprint": model_fingerprint, "actions_sha256": job.get("actions_sha256")}
    if settings.output_format == "lerobot":
        now["task"] = job["task"]
    if record.get("fallback"):  # memory ran short, so fewer frames were decoded at once
        del now["decode_chunk_size"]
    before = {**record, **record.get("requested", {})}
    return ", ".join(f"{key} was {before.get(key)}, is {now[key]}" for key in now if before.get(key) != now[key])


class SingleClip:
    """The one clip of an --output_video that names a file. Its record lies beside it, as FILE.json."""

    single = True

    def __init__(self, settings, model, images):
        self.model, self.fingerprint, self.target = model, fingerprint(model), Path(settings.output_video)
        [job] = make_jobs(settings, images, self.target.parent)
        self.jobs = self.todo = [{**job, "name": self.target.name, "target": self.target}]
        self.records, self.path = {}, self.target.with_suffix(".json")
        found = self.path.exists()
        record = read_json(self.path, "move it away or give another name") if found else {}
        ours = record.get("generated") is True and record.get("file_name") == self.target.name
        if found and not ours:
            raise UserError(f"--output_video: {self.path} is not the record of a clip; give another name")
        if os.path.lexists(self.target):
            if not found:
                raise UserError(f"--output_video: {self.target} exists already; move it away or give another name")
            if changed := differences(self.jobs[0], record, settings, self.fingerprint):
                cure = "give another name, or move it away"
                raise UserError(f"--output_video: {self.target} was made with other settings ({changed}); {cure}")
            self.todo = []

    locked = staticmethod(contextlib.nullcontext)  # a single file needs no lock

    def finish(self, settings):
        return True

    def describe_done(self):
        """The line to print where there is nothing to make."""
        return f"{self.target} is there already, made with these settings"

    def save(self, job, settings, image, frames, **more):
        """Writes the clip, whole or not at all, then its record."""
        if os.path.lexists(self.target):
            raise UserError(f"{self.target}: somebody else has written it meanwhile; it stays as it is")
        self.target.parent.mkdir(parents=True, exist_ok=True)
        FORMATS[settings.output_format].write(self.target, frames, settings.fps)
        record = describe_clip(job, settings, self.model, self.fingerprint, frames, image, more)
        write_json(self.path, record)
        self.records[job["name"]] = record


class ClipSet:
    """The clips that one model makes in one folder: those that are there, and those still to be made.

    The hidden folder `.infer` beside them holds the record of each clip, `.infer/NAME.json`. `save` writes the record
    first, then the clip in `.infer/.making`, and moves the clip out of there when it is whole. So after a kill at any
    moment, a clip is done if its record and the clip are there. `Publisher` writes all other files from the records.

    Several processes can each make a part, `settings.shard`. Each writes its records and clips, and publishes when its
    part is done, so that the last one publishes all of them.

    To drop a clip, delete it. It leaves metadata.jsonl and is not made again, unless its record is deleted, too.
    """

    single = False

    def __init__(self, settings, model, folder, images):
        self.folder, self.model, self.fingerprint, self.shard = Path(folder), model, fingerprint(model), settings.shard
        self.hidden = self.folder / ".infer"
        self.making = self.hidden / f".making{self.shard.name}"
        self.jobs = make_jobs(settings, images, self.folder)
        self.publisher, self.published = Publisher(self.folder, settings.output_format), 0
        self.plan(settings)

    @property
    def records(self):
        return self.publisher.records

    def refuse_others(self, settings):
        """Raises `UserError` where the folder holds another set, a training run, or files of others."""
        if settings.output_format == "lerobot":
            check_lerobot(self.folder, self.jobs, self.records.values(), settings)
        ours = ["metrics.jsonl", "model_index.json"]  # of a training run
        ours += ["meta", "data"] * (settings.output_format == "lerobot")
        ours += ["metrics.json", "side_by_side"] * bool(settings.compare_with or settings.reference)
        for name in () if self.records else ours:
            if (self.folder / name).exists():
                raise UserError(f"{self.folder / name} is not of a set that was made here; give another --output_video")
        if settings.reference and self.records:
            self.refuse_other_scores(settings)
        for record in self.records.values():
            if not is_of_format(record, settings.output_format):
                what = f"a set of {record['output_format']}, not of {settings.output_format}"
                raise UserError(f"{self.folder}: {what}; give another --output_video")

    def refuse_other_scores(self, settings):
        """Raises `UserError` where the folder's metrics.json has the scores of other models."""
        path = self.folder / "metrics.json"
        scored = read_json(path, "move it away").get("settings") if path.is_file() else None
        for flag in ("model_dir", "compare_with") if isinstance(scored, dict) else ():
            before, now = scored.get(flag), getattr(settings, flag)
            if before and now and Path(before).resolve() != Path(now).resolve():
                cure = "give another --output_video, or move that file away"
                raise UserError(f"{path} has the scores of --{flag} {before}; {cure}")

    def plan(self, settings):
        """Reads which clips are there and sets `todo`; writes nothing. Raises `UserError` where the set is not ours."""
        self.todo, self.dropped, there = [], [], self.publisher.read(self.jobs)
        self.refuse_others(settings)
        for job in self.jobs:
            target, record = job["target"], self.records.get(job["name"])
            if len(os.fsencode(target.name)) > 220:  # and 255 while it is written
                raise UserError(f"{job['path']}: the name is too long for a clip's; give the image a shorter one")
            if job["name"] in there:
                if record is None:
                    why = f"exists, and has no record in {self.hidden}"
                    raise UserError(f"--output_video: {target} {why}; move it away or give another name")
                if changed := differences(job, record, settings, self.fingerprint):
                    raise UserError(f"{target}: made before with other settings ({changed}); give another folder")
            elif record is not None and (job["name"] in self.publisher.listed or record.get("deleted")):
                self.dropped.append(job["name"])
            elif self.shard.holds(job["title"]):
                self.todo.append(job)

    @contextlib.contextmanager
    def locked(self, settings):
        """Keeps the set, or this part of it, for this process alone, and plans again. Publishes when the block ends.

        Raises `UserError` if another process has it.
        """
        self.hidden.mkdir(parents=True, exist_ok=True)
        busy = f"{self.folder}: another infer_svd.py is writing here; wait for its end, or give another --output_video"
        with lock_shard(self.hidden, self.shard, busy):
            self.publisher.reserve(self.jobs)
            self.plan(settings)
            shutil.rmtree(self.making, ignore_errors=True)  # what a killed process left
            if self.shard.name:
                with lock_file(self.hidden / "finishing", busy=None):
                    (self.hidden / f"ended{self.shard.name}").unlink(missing_ok=True)
                yield
                return
            self.publisher.tidy()
            self.publisher.publish()
            if self.dropped:
                again = f"to make it again, delete {self.hidden / self.dropped[0]}.json"
                what = counted(len(self.dropped), "clip")
                print(f"not made again, because somebody deleted them: {what} ({self.dropped[0]}, ...); {again}")
            try:
                yield
            finally:  # after a stop, too; after a kill, the next run publishes
                self.publisher.publish()

    def finish(self, settings):
        """Ends a part of the set. Returns whether all parts have ended now, even if some clips failed."""
        if not self.shard.name:
            return True
        with lock_file(self.hidden / "finishing", busy=None):
            (self.hidden / f"ended{self.shard.name}").touch()
            ended = None
            while ended != (ended := sorted(self.hidden.glob("ended-*"))):  # a disk without locks lets several in
                self.plan(settings)
                self.publisher.publish()
            parts = (self.shard._replace(part=part).name for part in range(self.shard.parts))
            complete = all((self.hidden / f"ended{name}").exists() for name in parts)
            if complete:
                self.publisher.tidy()
        return complete

    def describe_done(self):
        """The line to print where there is nothing to make."""
        count = sum(self.shard.holds(job["title"]) for job in self.jobs) - len(self.dropped)
        what = "the clip is" if count == 1 else f"all {count} clips are"
        return f"nothing to make: {what} there: {self.folder / 'index.html'}"

    def save(self, job, settings, image, frames, **more):
        """Writes the record, then the clip, whole or not at all."""
        target = job["target"]
        if os.path.lexists(target):
            raise UserError(f"{target}: somebody else has written it meanwhile; it stays as it is")
        record = describe_clip(job, settings, self.model, self.fingerprint, frames, image, more)
        self.publisher.write_record(job["name"], record)
        if not (first := self.hidden / f"{job['sha256']}.jpg").exists():  # for the page
            write_file(first, cv2.imencode(".jpg", image[..., ::-1])[1].tobytes())
        aside = self.making / target.name
        for folder in (aside.parent, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        FORMATS[settings.output_format].write(aside, frames, settings.fps)
        if settings.output_format == "frames" and job.get("action_rows"):
            np.save(aside / ACTIONS, np.array(job["action_rows"], np.float32))
        os.replace(aside, target)
        if not self.shard.name and time.monotonic() - self.published > PUBLISH_EVERY:
            self.publisher.publish()
            self.published = time.monotonic()
