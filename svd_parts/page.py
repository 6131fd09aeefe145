"""Writes the pages (index.html) of a generated set and of a training run."""

import contextlib
import json
import os
from pathlib import Path
from urllib.parse import quote

from svd_parts.files import write_file
from svd_parts.metrics import MEASURES, METRICS, read_metrics


def write_page(path, data):
    """Writes a page that shows `data`: page.html beside this file, with the data put in as JSON.

    No page where that template is missing, or cannot be written: no run fails for it. A page of another maker stays.
    """
    with contextlib.suppress(OSError):
        template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        if not path.exists() or b'content="SVD trio"' in path.read_bytes():
            write_file(path, template.replace("{{DATA}}", json.dumps(data).replace("<", "\\u003c")))


def write_run_page(output):
    """Writes index.html of a run: the loss and the scores by step, and the validation's videos."""
    videos = [path.relative_to(output) for path in sorted(output.glob("validation/step-*/*.mp4"))]
    shown = [{"step": p.parent.name[5:], "name": p.stem, "url": as_url(p)} for p in videos]
    metrics = {name: [metric.title, metric.note] for name, metric in METRICS.items()}
    run = {"title": output.absolute().name, "lines": read_metrics(output), "videos": shown, "metrics": metrics}
    write_page(output / "index.html", run)


def write_clips_page(folder, clips):
    """Writes index.html of a generated set; clips: what `page_entry` gives of each."""
    measures = {name: [measure.title, measure.note] for name, measure in MEASURES.items()}
    measures["asked_motion_bucket_id"] = ["bucket asked", "the --motion_bucket_id that the clip was made with"]
    write_page(folder / "index.html", {"title": folder.absolute().name, "clips": clips, "measures": measures})


def as_url(path):
    """A relative path as a page or a README links to it."""
    return quote(os.fsencode(path.as_posix()))


def page_entry(name, record):
    """What index.html shows of a clip."""
    bucket = record.get("motion_bucket_id")  # in a set of frames, the measured one
    fields = [*MEASURES, *"seed fps task width height".split()]
    entry = {field: record.get(field) for field in fields}
    entry["measured_motion_bucket_id"] = record.get("measured_motion_bucket_id", bucket)
    entry["asked_motion_bucket_id"] = record.get("requested", {}).get("motion_bucket_id", bucket)
    entry["frames"] = record.get("num_frames") if "directory" in record else None
    first = f".infer/{record.get('source_image_sha256')}.jpg"
    return {**entry, "first": first, "name": name, "url": quote(os.fsencode(name))}
