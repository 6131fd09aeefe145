"""Compares generated clips with real ones and with another model's: videos, scores, tables."""

import json
from pathlib import Path

import numpy as np

import svd_common as common
from svd_parts.dataset import add_digests, clip_group
from svd_parts.files import counted, write_file
from svd_parts.formats import FORMATS
from svd_parts.metrics import table_metrics, video_metrics
from svd_parts.page import real_clip
from svd_parts.weights import trained_marks


def find_trained_on(clips, trainings):
    """The names, as a set, of the real clips that a model was trained on. clips: {name: clip}.

    trainings: the training_settings.json of each model, or {}. A clip counts if its frames or its recording were
    trained on, from any folder and at any size; or another clip of its group, unless this clip was held out.
    """
    trained_on = set()
    if any(map(trained_marks, trainings)):
        add_digests(list(clips.values()))
    for training in trainings:
        marks, held_out = trained_marks(training), (training.get("held_out") or {}).values()
        found = {n for n, clip in clips.items() if {clip.get("digest"), str(clip.get("recording"))} & marks.keys()}
        groups = {clip_group(clips[name]) for name in found}
        kept_out = {n for n, clip in clips.items() if clip.get("digest") in held_out} - found
        trained_on |= {n for n, clip in clips.items() if clip_group(clip) in groups} - kept_out
    return trained_on


def judge(settings, sets, real_clips, seen):
    """Writes side-by-side videos of the sets and the real clips. With real clips, also writes and prints scores.

    real_clips: {image: clip}, or empty. seen: the images whose real clips were trained on. An infinite PSNR (equal
    pictures) counts as 100 dB.
    """
    names = [Path(s.model.name).resolve().name for s in sets]
    names = names if len(set(names)) == len(sets) else [str(s.model.name) for s in sets]
    lora = " + LoRA" * bool(sets[0].model.adapters)
    labels = ["generated"] if len(sets) == 1 else [f"generated ({names[0]}{lora})", f"generated ({names[1]})"]
    if len(set(labels)) < len(sets):  # a model is compared with itself
        labels[1] = f"compared ({names[1]})"
    scores, files = {}, {}  # {label: {real clip: [scores]}}, {clip: {"generated" or "compared": scores}}
    for jobs in zip(*(s.jobs for s in sets)):
        if not all(job["target"].exists() for job in jobs):  # a clip failed
            continue
        videos = dict(zip(labels, (FORMATS[settings.output_format].read(job["target"]) for job in jobs)))
        if real_clips:
            paths = real_clips[jobs[0]["image"]]["frames"][: len(videos[labels[0]])]
            real = common.read_frames(paths, settings.width, settings.height)
            copied = np.repeat(real[:1], len(real), axis=0)
            for label, video in {"first frame copied": copied, **videos}.items():
                found = video_metrics(video, real)
                found |= {name: min(found[name], 100.0) for name in ("psnr", "psnr_moving") if found[name] is not None}
                scores.setdefault(label, {}).setdefault(jobs[0]["image"], []).append(found)
                if label in labels:
                    what = ("generated", "compared")[labels.index(label)]
                    files.setdefault(jobs[0]["name"], {})[what] = found
            videos = {"real": real, **videos}
            kept = Path(settings.output_video) / real_clip(jobs[0]["name"])  # the page shows it
            kept.parent.mkdir(parents=True, exist_ok=True)
            common.write_video(kept, real, settings.fps)
        if len(videos) > 1:
            target = Path(settings.output_video) / "side_by_side" / f"{jobs[0]['title']}.mp4"
            target.parent.mkdir(parents=True, exist_ok=True)
            common.write_video(target, common.side_by_side(videos), settings.fps)
    if scores:
        table = {label: bootstrap(found) for label, found in scores.items()}
        asked = {name: getattr(settings, name) for name in ("model_dir", "compare_with", "reference")}
        result = {"settings": asked, "trained_on": sorted(seen), "mean": table, "clips": scores, "files": files}
        write_file(Path(settings.output_video) / "metrics.json", json.dumps(result, indent=1))
        print_table(table, len(next(iter(scores.values()))), len(seen))


def bootstrap(scores, draws=2000):
    """Means with 95 % intervals: {clip: [scores]} -> {metric: {mean, low, high}}, by percentile bootstrap over clips.

    Several videos of one real clip (other seeds) are averaged first, as they are not independent. A clip without a
    score (it does not move) is left out for that metric. The bootstrap's seed is fixed.
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


def print_table(table, count, seen=0):
    """Prints {label: {metric: {mean, low, high}}}, a row for each label. seen: how many of `count` were trained on."""
    names = table_metrics()
    if seen:
        what = f"{seen} of the {counted(count, 'real clip')} {'was' if seen == 1 else 'were'} trained on"
        print(f"\n{what}: the scores show how well the model remembers them")
    head = f"{counted(count, 'real clip')}, 95 % intervals"
    print(f"\n{head}" + "".join(f"  {heading:>20s}" for heading in names.values()))
    for label, scores in table.items():
        cells = (scores.get(name) for name in names)
        texts = (f"{c['mean']:.2f} [{c['low']:.2f}, {c['high']:.2f}]" if c else "-" for c in cells)
        print(f"{label:31.31s}" + "".join(f"  {text:>20s}" for text in texts))


def report_drift(records):
    """Prints how each segment differs from the first one, as the mean over the clips."""
    reports = ([[s["sharpness"], s["motion"], *s["color"]] for s in r["segments"]] for r in records if "segments" in r)
    values = np.array(list(zip(*reports)))  # (segments, clips, 5)
    for number, value in enumerate(values, 1):
        sharpness, motion = ((value[:, :2] + 1e-9) / (values[0, :, :2] + 1e-9)).mean(axis=0)
        color = " ".join(f"{channel:+.1f}" for channel in (value[:, 2:] - values[0, :, 2:]).mean(axis=0))
        print(f"segment {number}: sharpness x {sharpness:.2f}, motion x {motion:.2f}, colour {color}")
