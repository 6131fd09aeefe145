"""Writes the pages (index.html) of a generated set and of a training run."""

import contextlib
import json
import os
import re
import time
from pathlib import Path
from urllib.parse import quote

import numpy as np

from svd_parts.files import write_file
from svd_parts.metrics import MEASURES, METRICS, read_metrics, table_metrics


def write_page(path, data):
    """Writes a page that shows `data`: page.html, which lies beside this file, with the data in it as JSON.

    A page that cannot be written ends no run. A page that somebody else made stays as it is.
    """
    with contextlib.suppress(OSError):
        template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        if not path.exists() or b'content="SVD trio"' in path.read_bytes():
            write_file(path, template.replace("{{DATA}}", json.dumps(data).replace("<", "\\u003c")))


def write_run_page(output, settings=None):
    """Writes index.html of a training run: settings, time, the loss and the scores by step, and validation videos.

    settings: as `describe_run` makes them. With them, the page shows the best step, and reloads until the last step.
    """
    videos = [path.relative_to(output) for path in sorted(output.glob("validation/step-*/*.mp4"))]
    shown = [{"step": p.parent.name[5:], "name": p.stem, "url": as_url(p)} for p in videos]
    metrics = {name: [metric.title, metric.note] for name, metric in METRICS.items()}
    lines = read_metrics(output)
    run = {"title": output.absolute().name, "lines": lines, "videos": shown, "metrics": metrics}
    if settings:
        best = best_step(lines, settings["validation_metric"])
        run |= {"steps": settings["max_train_steps"], "updated": time.time(), "best": best}
        run["held_out"] = bool(settings["held_out"])
        run["facts"] = describe_settings(settings) | describe_time(lines, settings["max_train_steps"], best)
    write_page(output / "index.html", run)


def best_step(lines, name):
    """{metric, step} of the best validation by the metric `name`; None before the first validation."""
    scored = [line for line in lines if isinstance(line.get(f"validation_{name}"), (int, float))]
    sign = -1 if METRICS[name].better == "lower" else 1
    best = max(scored, key=lambda line: sign * line[f"validation_{name}"], default=None)
    return {"metric": name, "step": best["step"]} if best else None


def describe_settings(settings):
    """The settings of a run for its page: {title: text}."""
    base = settings.get("base_model_name") or Path(str(settings["pretrained_model_name"])).name
    rank = settings.get("lora_rank")
    return {
        "base model": base,
        "clips": str(settings["num_clips"]),
        "held out": str(len(settings["held_out"])),
        "size": f"{settings['width']} x {settings['height']} x {settings['num_frames']}",
        "steps x batch": f"{settings['max_train_steps']} x {settings['global_batch_size']}",
        "learning rate": f"{settings['learning_rate']:g}",
        "trained": str(settings["trainable"]),
        **({"LoRA rank": str(rank)} if rank else {}),
        "precision": "fp32" if settings["mixed_precision"] == "no" else str(settings["mixed_precision"]),
    }


def describe_time(lines, steps, best):
    """The progress of a run for its page, {title: text}: time a step and left, memory, the best step."""
    timed = [line for line in lines if line.get("seconds_per_step")]
    if not timed:
        return {}
    last, usual = timed[-1], float(np.median([line["seconds_per_step"] for line in timed]))
    minutes, seconds = divmod(round(last.get("seconds_left", (steps - last["step"]) * usual)), 60)
    facts = {"a step": f"{usual:.3g} s"}
    facts |= {"left": f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"} if last["step"] < steps else {}
    facts |= {"GPU memory": f"{last['peak_memory_gib']:g} GiB"} if last.get("peak_memory_gib") else {}
    return facts | ({"best step": str(best["step"])} if best else {})


def write_clips_page(folder, records):
    """Writes index.html of a generated set. records: {name: record} of the clips that are there."""
    scores = read_scores(folder)
    clips = [page_entry(folder, name, record, scores.get(name, {})) for name, record in records.items()]
    for clip, model in zip(clips, name_models(list(records.values()))):
        clip["model"] = model
    headings = table_metrics()
    measures = {name: [headings[name], METRICS[name].note] for name in headings if any(name in clip for clip in clips)}
    measures |= {name: [measure.title, measure.note] for name, measure in MEASURES.items()}
    measures["asked_motion_bucket_id"] = ["bucket asked", "the --motion_bucket_id that the clip was made with"]
    files = [name for name in ("metrics.json", "side_by_side/") if (folder / name).exists()]
    lerobot = any(record.get("output_format") == "lerobot" for record in records.values())
    data = {"title": folder.absolute().name, "clips": clips, "measures": measures, "files": files}
    data |= {"next": next_command(any(clip["frames"] for clip in clips)), "lerobot": lerobot}
    write_page(folder / "index.html", data)


def next_command(is_dataset):
    """The command that takes the kept clips of a set. The page puts in its own folder for FOLDER.

    A set of frames (`is_dataset`) is trained on as it is; from other sets a dataset is made.
    """
    if is_dataset:
        return "python train_svd.py --dataset_dir FOLDER --include @kept.txt ..."
    return "python prepare_dataset.py --video_dir FOLDER --output_dir ./chosen --include @kept.txt"


def name_models(records):
    """[name, step] of the model of each record where several models made the clips; None for each where one made all.

    Some digits of the weights tell apart two models that lay in one folder, one after the other.
    """
    plain = [[model_name(record), record.get("trained_step")] for record in records]
    weights = [str(record.get("model_fingerprint") or model) for record, model in zip(records, plain)]
    models = {found: model for found, model in reversed(list(zip(weights, plain)))}  # as the first clip spells it
    if len(models) < 2:
        return [None] * len(records)
    names = list(models.values())
    named = {found: [f"{name} ({found[:8]})" if names.count([name, step]) > 1 else name, step]
        for found, (name, step) in models.items()}  # fmt: skip
    return [named[found] for found in weights]


def model_name(record):
    """The folder or hub name of a clip's model, and the LoRAs that were laid over it."""
    scale = record.get("lora_scale", 1)
    parts = [record.get("model_dir"), *(record.get("lora") or [])]
    return " + ".join(map(str, parts)) + (f" x {scale}" if scale != 1 else "")


def read_scores(folder):
    """{clip: {"generated": {metric: number}, "compared": ...}} from metrics.json; {} where there is no such file."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / "metrics.json").read_text(encoding="utf-8")).get("files")
        return found if isinstance(found, dict) else {}
    return {}


def as_url(path):
    """A relative path as a link in a page or a README."""
    return quote(os.fsencode(path.as_posix()))


def page_entry(folder, name, record, scores):
    """What index.html shows of a clip: its measures and scores, and the links to its videos."""
    bucket = record.get("motion_bucket_id")  # the measured one in a set of frames, else the one that was asked for
    fields = [*MEASURES, *"seed fps task width height".split()]
    entry = {field: record.get(field) for field in fields}
    entry["measured_motion_bucket_id"] = record.get("measured_motion_bucket_id", bucket)
    entry["asked_motion_bucket_id"] = record.get("requested", {}).get("motion_bucket_id", bucket)
    entry["frames"] = record.get("num_frames") if "directory" in record else None
    first = f".infer/{record.get('source_image_sha256')}.jpg"
    image = re.sub(r"_seed\d+_motion\d+(\.\w+)?$", "", name)
    if image == name:  # the clips of a LeRobot set are numbered, not named after their images
        image = "/".join(Path(str(record.get("source_image"))).with_suffix("").parts[-2:])
    entry |= {"first": first, "name": name, "url": as_url(Path(name)), "image": image}
    for what, path in (("real", real_clip(name)), ("other", Path(".compare", name))):
        if (folder / path).exists():
            entry[what] = as_url(path)
    return {**scores.get("generated", {}), **entry, "compared": scores.get("compared")}


def real_clip(name):
    """The path, inside a set, of the real clip that the page shows beside the clip `name`."""
    return Path(".infer", "real", f"{name}.mp4")
