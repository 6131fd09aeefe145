"""`make actions`: is the action followed? The protocol, and what was tried, is in README.md here.

Renders clips whose paths are known, fine-tunes the tiny checkpoint on them with and without actions, generates from
held-out first frames, and finds the fingertip in what was generated. Everything goes to actions/: table.md,
results.json, steer.webp. Run again after a stop, it goes on.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are small: two trainings side by side instead
sys.path.insert(0, str(Path(__file__).parent))

import data  # isort: skip  (first: it finds svd_common, which quiets OpenCV)
import cv2
import numpy as np
import torch
from detector import train_detector
from intervals import interval
from PIL import Image

import svd_common as common
from svd_parts.action_encoder import follow_actions
from svd_parts.actions import scale_actions
from svd_parts.files import write_file
from svd_parts.metrics import video_metrics
from svd_parts.shortcuts import wrap_unet

TINY = data.ROOT / "tests" / "tiny_svd"
TRAINING = (
    "--num_frames 8 --width 96 --height 64 --train_batch_size 4 --learning_rate 2e-3 --P_mean 1.5 --lr_scheduler cosine"
)
TRAINING += " --lr_warmup_steps 30 --use_ema --ema_decay 0.98 --checkpointing_steps 100 --gradient_checkpointing none"
SEEDS = {"training": 7005, "development": 7205, "held out": 7209, "bent": 7208}
PUSH_SEEDS = {"development": 7207, "held out": 7210}
INFERENCE_STEPS = 4


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--output_dir", type=Path, default=data.ROOT / "actions")
    add(
        "--judge_on",
        choices=["held out", "development"],
        default="held out",
        help="development: to choose something by",
    )
    add("--steps", type=int, default=500, help="of training, for each of the two models")
    add("--clips", type=int, default=16, help="held-out clips of reach, and half as many of push")
    add("--failures", type=int, default=0, help="clips of bent pushes, which often miss, to train on too")
    add("--more", default="", help="further options of train_svd.py for both models")
    return parser


# Training


def start_training(output, dataset, options):
    """Both models side by side: their processes. The second begins when the first has encoded the frames."""
    running, clips = [], len(list(dataset.glob("*/00000.png")))
    for name, more in (("with", ["--condition_on", "actions", "--action_learning_rate", "6e-3"]), ("without", [])):
        model = output / name
        if (model / "model_index.json").exists():
            continue
        while running and running[0].poll() is None and len(list(dataset.glob(".cache/*/*.safetensors"))) < clips:
            time.sleep(1)
        command = [sys.executable, data.ROOT / "train_svd.py", "--pretrained_model_name", TINY]
        command += [
            "--dataset_dir",
            dataset,
            "--output_dir",
            model,
            *TRAINING.split(),
            "--max_train_steps",
            options.steps,
            *options.more.split(),
        ]
        command += [*more, *(["--resume_from_checkpoint", "latest"] if model.exists() else [])]
        environment, log = {**os.environ, "HF_HUB_OFFLINE": "1"}, open(output / f"{name}.log", "a")
        running.append(subprocess.Popen([*map(str, command)], env=environment, stdout=log, stderr=log))
    return running


# Generating


@functools.lru_cache(maxsize=2)
def load(model):
    torch.set_num_threads(1)
    pipe, settings = common.load_pipeline(model, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    wrap_unet(pipe.unet)
    return pipe, settings


@functools.cache
def workers():
    """A process for each core, which keeps its models."""
    return ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"))


def generate(model, firsts, paths=None, seed=0, guidance=None):
    """(N, T, H, W, 3) uint8 by the paths (N, T, 3), if there are any; clip i has the noise of seed + i."""
    paths = [None] * len(firsts) if paths is None else paths
    jobs = [(model, first, path, seed + index, guidance) for index, (first, path) in enumerate(zip(firsts, paths))]
    return np.stack(list(workers().map(generate_clip, jobs)))


@torch.no_grad()
def generate_clip(job):
    """guidance: on the actions, or None."""
    model, first, path, seed, guidance = job
    pipe, settings = load(model)
    rows = None if path is None else scale_actions(path, settings["actions"])[None]
    with follow_actions(pipe.unet, rows), guided_on_actions(pipe) if guidance else contextlib.nullcontext():
        frames = pipe(
            Image.fromarray(first), width=96, height=64, num_frames=data.FRAMES, fps=data.FPS, motion_bucket_id=127,
            num_inference_steps=INFERENCE_STEPS, min_guidance_scale=guidance or 1.0, max_guidance_scale=guidance or 1.0,
            noise_aug_strength=0.02, output_type="np", generator=torch.Generator().manual_seed(seed),
        ).frames[0]  # fmt: skip
    return (frames * 255).round().astype(np.uint8)


@torch.no_grad()
def round_trip(model, videos):
    """What the VAE alone makes of real clips: the ceiling."""
    vae, made = load(model)[0].vae, []
    for video in videos:
        latents = vae.encode(common.to_pixels(video)).latent_dist.mode()
        frames = vae.decode(latents, num_frames=len(video)).sample
        made.append(((frames / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8))
    return np.stack(made)


@contextlib.contextmanager
def guided_on_actions(pipe):
    """While this lasts, the pipeline's guidance compares with the same picture and no actions, not with no picture."""

    def share_picture(unet, inputs, known):
        sample, *others = inputs
        first, second = sample.chunk(2)
        sample = torch.cat([torch.cat([first[:, :, :4], second[:, :, 4:]], 2), second])
        known["encoder_hidden_states"] = known["encoder_hidden_states"][1:].repeat(2, 1, 1)
        if len(unet.actions.actions) == 1:
            unet.actions.actions = unet.actions.actions.repeat(2, 1, 1)
            unet.actions.keep = torch.tensor([0.0, 1.0])
        return (sample, *others), known

    handle = pipe.unet.register_forward_pre_hook(share_picture, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# Measuring


def moving_psnr(videos, real):
    """PSNR on moving pixels of each clip; NaN where nothing moves."""
    found = [video_metrics(video, truth)["psnr_moving"] for video, truth in zip(videos, real)]
    return np.array([np.nan if value is None else min(value, 100.0) for value in found])


def following(detect, videos, paths):
    """cm from where the action says to where the fingertip is found, (N, T - 1): frame 0 is given."""
    found = detect(videos[:, 1:].reshape(-1, *videos.shape[2:])).reshape(paths[:, 1:].shape)
    return 100 * np.linalg.norm(found - paths[:, 1:], axis=-1)


def row(detect, videos, real, paths):
    """One line of the table. real: what to compare the pixels with, or None; paths: what was asked for."""
    result = {}
    if real is not None:
        values = moving_psnr(videos, real)
        result["psnr_moving"] = {"clips": values.tolist(), "mean": interval(values)}
    distances = following(detect, videos, paths)
    result["following_cm"] = {"clips": distances.mean(1).tolist(), "mean": interval(distances.mean(1))}
    result["within_2_cm"] = {"mean": interval((distances < 2).mean(1))}
    return result


def write_table(path, rows):
    text = "| | PSNR moving, dB | following error, cm | within 2 cm |\n|---|---|---|---|\n"
    for name, found in rows.items():
        cells = []
        for key, shown in (("psnr_moving", "{:.1f} [{:.1f}, {:.1f}]"), ("following_cm", "{:.1f} [{:.1f}, {:.1f}]")):
            cells.append(shown.format(*found[key]["mean"]) if key in found else "")
        share = found["within_2_cm"]["mean"]
        text += f"| {name} | {cells[0]} | {cells[1]} | {share[0]:.0%} |\n"
    write_file(path, text)
    return text


def main(options):
    started, out = time.time(), options.output_dir
    out.mkdir(parents=True, exist_ok=True)
    seed = SEEDS[options.judge_on]
    data.render_clips(out / "reach", "reach", SEEDS["training"], 320)
    data.render_clips(out / "push", "push", 1, 192, cameras=())
    judged = out / options.judge_on.replace(" ", "_")
    data.render_clips(judged, "reach", seed, options.clips)
    pushed = judged.with_name(f"{judged.name}_push")
    data.render_clips(pushed, "push", PUSH_SEEDS[options.judge_on], options.clips // 2)
    training = {"reach": data.read_clips(out / "reach", out / "reach", 320)}
    training["push"] = data.read_clips(data.BUNDLED, out / "push", 192)
    if options.failures:
        training["bent"] = data.bent_pushes(out / "bent", SEEDS["bent"], options.failures)
    if not (out / "dataset" / "metadata.jsonl").exists():
        data.write_dataset(out / "dataset", training)
    running = start_training(out, out / "dataset", options)

    frames = np.concatenate([videos.reshape(-1, *videos.shape[2:]) for videos, _ in training.values()])
    places = np.concatenate([paths.reshape(-1, 3) for _, paths in training.values()])
    detect = train_detector(out / "detector.pt", frames, places)
    if any([process.wait() for process in running]):
        sys.exit(f"training failed: see {out}/*.log")
    models = {name: str(out / name) for name in ("with", "without")}
    real, paths = data.read_clips(judged, judged, options.clips)
    rows = measure(models, detect, real, paths, seed)
    pushes = data.read_clips(pushed, pushed, options.clips // 2)
    rows |= {f"push: {name}": found for name, found in measure_task(models, detect, *pushes).items()}
    write_steer(out / "steer.webp", models["with"], real[:, 0], paths, (0, 1))
    write_file(out / "results.json", json.dumps({"options": vars(options), "rows": rows}, indent=1, default=str))
    print(write_table(out / "table.md", rows))
    print(f"Done in {time.time() - started:.0f} s: {out}/table.md")
    workers().shutdown()


def write_steer(path, model, firsts, paths, chosen):
    """The picture of the README: first frames, three paths from each, what the model makes of them. A ring is where the
    action says that the fingertip is."""
    rows, scale = [], 3
    for index in chosen:
        other = paths[(index + 1) % len(paths)]
        ways = [
            paths[index],
            data.other_paths(paths[index : index + 1])["mirrored"][0],
            paths[index, :1] + other - other[:1],
        ]
        made = generate(model, np.repeat(firsts[index : index + 1], len(ways), axis=0), np.array(ways, np.float32))
        films = []
        for video, way in zip(made, ways):
            video = np.stack([cv2.resize(f, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC) for f in video])
            for frame, place in zip(video, data.to_pixels(way, 96 * scale, 64 * scale)):
                cv2.circle(frame, tuple(int(x) for x in place.round()), 7, (230, 20, 40), 2, cv2.LINE_AA)
            films.append(np.pad(video, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255))
        rows.append(np.concatenate(films, axis=2))
    film = np.concatenate(rows, axis=1)
    frames = [Image.fromarray(frame) for frame in np.concatenate([film, film[-1:].repeat(3, axis=0)])]
    more = {"append_images": frames[1:], "duration": 1000 // data.FPS, "loop": 0, "quality": 60, "method": 6}
    frames[0].save(path, save_all=True, **more)


def measure_task(models, detect, real, paths):
    """Rows with the true actions, with shuffled ones, with none, and of the model trained without."""
    firsts, shuffled = real[:, 0], np.roll(paths, -1, axis=0)
    return {
        "real video": row(detect, real, None, paths),
        "real video through the VAE": row(detect, round_trip(models["with"], real), real, paths),
        "true actions": row(detect, generate(models["with"], firsts, paths), real, paths),
        "shuffled actions": row(detect, generate(models["with"], firsts, shuffled), real, shuffled),
        "no actions": row(detect, generate(models["with"], firsts), real, paths),
        "model trained without actions": row(detect, generate(models["without"], firsts), real, paths),
    }


def measure(models, detect, real, paths, seed):
    """The rows of `reach`: those of `measure_task`, and paths that nobody demonstrated."""
    rows = {f"reach: {name}": found for name, found in measure_task(models, detect, real, paths).items()}
    for how, wanted in data.other_paths(paths).items():
        played, tips = data.play_all(wanted, seed)
        made = generate(models["with"], real[:, 0], tips)
        rows[f"{how}: real video"] = row(detect, played, None, tips)
        rows[f"{how}: generated"] = row(detect, made, played, tips)
    return rows


if __name__ == "__main__":
    main(build_parser().parse_args())
