"""train_svd.py: its maths against independent references, and the real script on the small real checkpoint."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIZE, TINY, Launched, moving_square, run, run_together, train_arguments, write_clip
from diffusers import StableVideoDiffusionPipeline
from diffusers.optimization import SchedulerType
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import infer_svd
import svd_common as common
import train_svd
from svd_parts.checkpoints import checkpoint_step, checkpoints_of
from svd_parts.dataset import add_digests, list_clips
from svd_parts.files import UserError
from svd_parts.forecast import MemoryTracker, forecast
from svd_parts.latent_cache import add_latents
from svd_parts.metrics import METRICS
from svd_parts.objective import training_loss
from svd_parts.optimizers import OPTIMIZERS
from svd_parts.samples import ClipDataset, load_clips
from svd_parts.timing import CARDS
from svd_parts.unet import DTYPES, RECOMPUTED, TRAINABLE, is_trained
from svd_parts.validation import VALIDATION_SIGMAS
from svd_parts.weights import SVD_XT_CONFIG


def weights(folder, part="unet"):
    return load_file(next((Path(folder) / part).glob("*.safetensors")))


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


# --------------------------------------------------------------------------------------------------- conditioning


class Recorder(torch.nn.Module):
    """Stands where the UNet stands, keeps what it is fed, and predicts zero."""

    def __init__(self, unet):
        super().__init__()
        self.config, self.add_embedding, self.calls = unet.config, unet.add_embedding, []
        self.device, self.dtype = unet.device, unet.dtype

    def forward(self, sample, timestep, encoder_hidden_states, added_time_ids, return_dict=True):
        self.calls.append((sample, timestep, encoder_hidden_states, added_time_ids))
        out = torch.zeros_like(sample[:, :, :4])
        return (out,) if not return_dict else type("Out", (), {"sample": out})()


def test_training_feeds_the_unet_what_the_pipeline_feeds(dataset, tmp_path):
    pipe = StableVideoDiffusionPipeline.from_pretrained(TINY, **common.dtype_option(torch.float32))
    recorder = Recorder(pipe.unet)
    pipe.unet = recorder
    args = train_svd.parse_args(["--pretrained_model_name", str(TINY), "--dataset_dir", str(dataset),
        "--output_dir", str(tmp_path / "x"), *SIZE, "--conditioning_dropout_prob", "0"])  # fmt: skip
    clips = load_clips(dataset, 8, 7, 127)
    sample = ClipDataset(clips[:1], args, pipe.vae.config, cached=False).sample(
        clips[0], 1, torch.Generator().manual_seed(0)
    )
    strength = sample["added_time_ids"][2].item()
    batch = add_latents({name: value[None] for name, value in sample.items()}, pipe, args, torch.device("cpu"))
    training_loss(recorder, pipe.vae, batch, torch.float32)

    image = common.read_image(clips[0]["frames"][1])
    clean = torch.from_numpy(image.astype(np.float32) / 255.0 * 2.0 - 1.0).permute(2, 0, 1)
    pixel_noise = (sample["conditioning_image"] - clean) / strength

    import diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion as module

    original = module.randn_tensor
    module.randn_tensor = lambda shape, **kw: pixel_noise[None] if tuple(shape)[1] == 3 else original(shape, **kw)
    try:
        pipe(Image.fromarray(image), width=96, height=64, num_frames=8, fps=7, motion_bucket_id=127,
            noise_aug_strength=strength, num_inference_steps=1, output_type="latent")  # fmt: skip
    finally:
        module.randn_tensor = original
    (ours, our_time, our_clip, our_ids), (theirs, _, their_clip, their_ids) = recorder.calls
    assert torch.allclose(our_clip, their_clip[1:], atol=1e-5)  # the second half is the conditional one
    assert torch.allclose(ours[:, :, 4:], theirs[1:, :, 4:], atol=2e-4)
    assert torch.equal(our_ids[0, :2], their_ids[1, :2]) and abs(our_ids[0, 2] - their_ids[1, 2]) < 1e-6
    assert theirs[0, :, 4:].abs().max() == 0 and their_clip[0].abs().max() == 0  # what dropout must imitate
    # and the noisy half: the scheduler's own scaling of the same noisy latents, and its own timestep
    sigma = sample["sigmas"].item()
    noisy = batch["latents"] + sigma * batch["noise"]
    assert torch.allclose(ours[:, :, :4], noisy / (sigma**2 + 1) ** 0.5, atol=1e-5)
    assert abs(our_time.item() - 0.25 * np.log(sigma)) < 1e-5


def test_dropout_zeroes_both_image_conditions_and_keeps_the_ids(dataset, tmp_path):
    args = train_svd.parse_args(["--pretrained_model_name", str(TINY), "--dataset_dir", str(dataset),
        "--output_dir", str(tmp_path / "x"), *SIZE, "--conditioning_dropout_prob", "1"])  # fmt: skip
    pipe = StableVideoDiffusionPipeline.from_pretrained(TINY, **common.dtype_option(torch.float32))
    recorder = Recorder(pipe.unet)
    sample = ClipDataset(load_clips(dataset, 8, 7, 127), args, pipe.vae.config, cached=False)[0]
    batch = add_latents({name: value[None] for name, value in sample.items()}, pipe, args, torch.device("cpu"))
    training_loss(recorder, pipe.vae, batch, torch.float32)
    fed, _, embedding, ids = recorder.calls[0]
    assert fed[:, :, 4:].abs().max() == 0 and embedding.abs().max() == 0 and ids[0, 0] == 6 and ids[0, 1] == 127


# ---------------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("which", ["temporal", "temporal_attention", "all"])
def test_only_the_chosen_parameters_change(which, dataset, tmp_path):
    output = tmp_path / "out"
    run("train_svd.py", *train_arguments(dataset, output), "--max_train_steps", 2, "--trainable", which)
    before, after = weights(TINY), weights(output)
    assert before.keys() == after.keys()
    for name in before:
        trained = is_trained(name, which)
        assert trained or torch.equal(before[name], after[name]), name
        assert before[name].dtype == after[name].dtype
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) > 0.5 * sum(is_trained(name, which) for name in before)
    for part in ("vae", "image_encoder"):
        assert same(weights(TINY, part), weights(output, part))


def test_result_is_a_stock_pipeline_folder_and_metrics_are_logged(trained):
    pipe = StableVideoDiffusionPipeline.from_pretrained(trained, **common.dtype_option(torch.float32))
    frames = pipe(Image.new("RGB", (96, 64), "grey"), width=96, height=64, num_frames=8, num_inference_steps=2,
        output_type="np").frames  # fmt: skip
    assert frames.shape == (1, 8, 64, 96, 3) and np.isfinite(frames).all()
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"loss_v", "loss_noise", "grad_norm", "learning_rate", "seconds_per_step"} <= lines[-1].keys()
    settings = json.loads((trained / "training_settings.json").read_text())
    assert settings["median_fps"] == 7 and settings["num_frames"] == 8 and settings["step"] == 6


def test_loss_on_one_repeated_clip_falls_to_near_zero(tmp_path):
    """One clip, no dropout, a narrow band of noise levels: the trained layers must learn it by heart."""
    write_clip(tmp_path / "data" / "clip", moving_square(8))
    run("train_svd.py", *train_arguments(tmp_path / "data", tmp_path / "out"), "--max_train_steps", 50,
        "--learning_rate", "2e-3", "--conditioning_dropout_prob", 0, "--P_mean", 1.5, "--P_std", 0.3,
        "--trainable", "all", "--logging_steps", 10)  # fmt: skip
    losses = [json.loads(line)["loss_v"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.25 * losses[0] and losses[-1] < 0.1, losses


# -------------------------------------------------------------------------------------------------- cache, resume


def test_cache_is_used_and_a_changed_frame_is_encoded_again(dataset, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(dataset, data, ignore=shutil.ignore_patterns(".cache"))
    first = run("train_svd.py", *train_arguments(data, tmp_path / "a"), "--max_train_steps", 1)
    assert "caching latents" in first.stdout
    cached = sorted(data.glob(".cache/*/*.safetensors"))
    assert len(cached) == 3
    second = run("train_svd.py", *train_arguments(data, tmp_path / "b"), "--max_train_steps", 1)
    assert "caching latents" not in second.stdout
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    time.sleep(0.01)
    (data / "clip1" / "00004.png").write_bytes(common.encode_png(moving_square(1, seed=9)[0]))
    cached[2].write_bytes(cached[2].read_bytes()[:1000])  # and a half-written file is not believed
    before = [path.stat().st_mtime_ns for path in cached]
    run("train_svd.py", *train_arguments(data, tmp_path / "c"), "--max_train_steps", 1)
    assert [path.stat().st_mtime_ns == old for path, old in zip(cached, before)] == [True, False, False]


def test_cached_and_uncached_training_agree(dataset, tmp_path):
    for name, flag in (("a", "--cache_latents"), ("b", "--no-cache_latents")):
        run("train_svd.py", *train_arguments(dataset, tmp_path / name), "--max_train_steps", 2, flag)
    losses = [
        [json.loads(line)["loss_v"] for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in "ab"
    ]
    assert np.allclose(losses[0], losses[1], rtol=1e-3)


def test_resume_equals_uninterrupted(trained, dataset, tmp_path):
    output = tmp_path / "out"
    run("train_svd.py", *train_arguments(dataset, output), "--max_train_steps", 3, "--checkpointing_steps", 3)
    run("train_svd.py", *train_arguments(dataset, output), "--max_train_steps", 6, "--checkpointing_steps", 3,
        "--resume_from_checkpoint", "latest")  # fmt: skip
    assert same(weights(trained), weights(output))


def test_kill_and_resume_give_the_same_weights(dataset, tmp_path):
    def arguments(output):
        return [*train_arguments(dataset, tmp_path / output), "--max_train_steps", 10, "--checkpointing_steps", 2,
            "--use_ema", "--lr_warmup_steps", 5, "--lr_scheduler", "cosine"]  # fmt: skip

    run("train_svd.py", *arguments("whole"))
    for moment, pattern in (("training", "checkpoint-4"), ("saving", ".checkpoint-*.part")):
        process, deadline = Launched("train_svd.py", *arguments(moment)), time.time() + 120
        while process.poll() is None and time.time() < deadline and not list((tmp_path / moment).glob(pattern)):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / moment / "model_index.json").exists()
        run("train_svd.py", *arguments(moment), "--resume_from_checkpoint", "latest")
        assert same(weights(tmp_path / "whole"), weights(tmp_path / moment))


def test_gradients_freed_early_give_the_same_weights(dataset, tmp_path):
    for name, norm in (("early", 0), ("late", 1e9)):
        run("train_svd.py", *train_arguments(dataset, tmp_path / name), "--max_train_steps", 3, "--max_grad_norm", norm)
    assert same(weights(tmp_path / "early"), weights(tmp_path / "late"))


def test_damaged_checkpoint_is_named_and_the_one_before_is_taken(trained, dataset, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(trained, output)
    (output / "model_index.json").unlink()
    broken = output / "checkpoint-6" / "optimizer.safetensors"
    data = broken.read_bytes()
    broken.write_bytes(data[:-100] + bytes(100))  # the right size, other bytes
    arguments = [*train_arguments(dataset, output), "--max_train_steps", 6, "--resume_from_checkpoint"]
    done = run("train_svd.py", *arguments, "latest")
    assert str(broken) in done.stdout
    assert same(weights(trained), weights(output))
    shutil.copytree(output / "checkpoint-6", output / "checkpoint-good-7")  # somebody's own name: it stays
    state = output / "checkpoint-6" / "training_state.json"
    saved = json.loads(state.read_text())
    with open(output / "metrics.jsonl", "ab") as file:
        file.write(b"5\n{}\n\xff\xfe\n")
    lora = run("train_svd.py", *arguments, "latest", "--lora_rank", 4, ok=False)
    assert "lora_rank was 0, is 4" in lora.stdout
    run("train_svd.py", *arguments, "latest", "--max_train_steps", 7, "--checkpointing_steps", 1)
    assert (output / "checkpoint-good-7").exists() and (output / "checkpoint-7").exists()
    del saved["settings"]
    state.write_text(json.dumps(saved))
    assert "damaged, it has no settings" in run("train_svd.py", *arguments, output / "checkpoint-6", ok=False).stdout
    broken.write_bytes(data[:-100])
    assert "damaged" in run("train_svd.py", *arguments, output / "checkpoint-6", ok=False).stdout


def test_other_settings_are_refused_by_name(trained, dataset, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(trained, output)
    done = run("train_svd.py", *train_arguments(dataset, output), "--max_train_steps", 9, "--seed", 7,
        "--resume_from_checkpoint", "latest", ok=False)  # fmt: skip
    assert "seed was 0, is 7" in done.stdout


def test_two_processes_give_the_weights_of_one_with_twice_the_batch(dataset, tmp_path):
    held_out = ["--num_validation_videos", "1"]
    run("train_svd.py", *train_arguments(dataset, tmp_path / "one"), "--max_train_steps", 3, "--train_batch_size", 2,
        *held_out)  # fmt: skip
    same_run = [*train_arguments(dataset, tmp_path / "two"), *held_out, "--checkpointing_steps", 2]
    same_run += ["--validation_steps", 1, "--logging_steps", 9]  # one process validates, all log then
    for steps, more in ((2, []), (3, ["--resume_from_checkpoint", "latest"])):  # a resume works there too
        run_together(2, "train_svd.py", *same_run, "--max_train_steps", steps, *more)
    before, one, two = weights(TINY), weights(tmp_path / "one"), weights(tmp_path / "two")
    moved = sum((one[n].float() - before[n].float()).abs().sum() for n in one)
    apart = sum((one[n].float() - two[n].float()).abs().sum() for n in one)
    assert apart < 0.02 * moved, (apart, moved)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    losses = [[line["loss_v"] for line in map(json.loads, side) if "loss_v" in line] for side in lines]
    assert len(losses[0]) == 3 and np.allclose(losses[0], losses[1], rtol=1e-4)


# ---------------------------------------------------------------------------------------- forecast and validation


def test_dry_run_meets_the_memory_and_flop_targets(tmp_path):
    """SVD-XT's published configuration, no weights, no GPU: the last line is one JSON object."""
    arguments = ["--pretrained_model_name", "stabilityai/stable-video-diffusion-img2vid-xt", "--dataset_dir", "none",
        "--output_dir", str(tmp_path / "out"), "--dry_run"]  # fmt: skip
    write_clip(tmp_path / "held out" / "clip0", moving_square(2, width=64))
    done = run("train_svd.py", *arguments, "--validation_dir", tmp_path / "held out")
    assert "--dataset_dir none: no such folder" in done.stdout
    assert "caching 2 frames and validating 1 clip included" in done.stdout
    assert "warning: 1 clip of 64x64 (clip0): some 40% of the picture is lost to the crop to 512x320" in done.stdout
    plan = json.loads(done.stdout.splitlines()[-1])
    assert "time for 5000 steps" in done.stdout and all(f"  {name}" in done.stdout for name in CARDS)
    assert set(plan["hours"]) == set(CARDS) and all(hours >= 0 for hours in plan["hours"].values())
    assert plan["trainable_parameters"] == 630_881_958
    assert 10 < plan["peak_memory_gib"] <= 15 and 62e12 < plan["flops_per_step"] <= 63e12
    assert 0 < plan["validation_gib"] <= plan["training_gib"] == plan["peak_memory_gib"]
    parts = [plan[f"{name}_gib"] for name in ("weights", "gradients", "optimizer", "activations")]
    assert abs(sum(parts) - plan["peak_memory_gib"]) < 0.01
    assert not (tmp_path / "out").exists()

    def needed(*flags):
        args = train_svd.parse_args([*arguments, *flags])
        return forecast(args, SVD_XT_CONFIG, "full", torch.bfloat16)

    eight_bit = needed("--optimizer", "adamw8bit")
    assert eight_bit["validation_gib"] <= eight_bit["training_gib"] == eight_bit["peak_memory_gib"] < 9
    # each micro-batch but the first finds the gradients of those before it
    accumulated = needed("--gradient_accumulation_steps", "2")["peak_memory_gib"] - plan["peak_memory_gib"]
    assert 0.8 < accumulated < 1.2


def test_memory_tracker_counts_a_known_step():
    tracker = MemoryTracker()
    with tracker:
        a = torch.empty(1000)
        b = a * 2
        del a
        view = b.view(10, 100)
    assert tracker.now == 4000 and tracker.peak == 8000 and view.shape == (10, 100)


def best_of(output):
    return json.loads((output / "best" / "training_state.json").read_text())["step"]


def test_validation_scores_held_out_episodes_and_changes_nothing(dataset, tmp_path):
    held_out = tmp_path / "held_out"
    odd = os.fsdecode("\u7535\u5f71".encode("gbk")) if sys.platform == "linux" else ""  # no UTF-8
    write_clip(held_out / (odd + "\u89c6" * 80), moving_square(8, seed=5))  # as long as a name can be
    for name, flags in (("with", ["--validation_dir", held_out, "--validation_steps", 2]), ("without", [])):
        done = run(
            "train_svd.py", *train_arguments(dataset, tmp_path / name), "--max_train_steps", 4, "--use_ema", *flags
        )
        if flags:
            table = done.stdout[done.stdout.index("1 held-out clip ") :].splitlines()
            assert "PSNR moving dB" in table[0] and "flow error px" in table[0]
            assert table[1].startswith("first frame copied") and table[2].startswith("step 0, the base")
            lines = [
                line for line in table if re.match(r"step \d+: PSNR moving [\d.]+ dB \(copied [\d.]+, base ", line)
            ]
            assert all(re.search(r"; validated in [\d.]+ s", line) for line in lines)
            assert len(lines) == 3 and "best so far -> " in lines[0] and done.stdout.count("PSNR moving dB") == 1
            assert f"look at {tmp_path / name / 'index.html'}" in done.stdout
            assert f"best by PSNR moving: step {best_of(tmp_path / name)}, in " in done.stdout
            assert "next: python infer_svd.py --model_dir " in done.stdout
            assert " --fps 7 --motion_bucket_id 127 " in done.stdout
    assert same(weights(tmp_path / "with"), weights(tmp_path / "without"))
    lines = [json.loads(line) for line in (tmp_path / "with" / "metrics.jsonl").read_text().splitlines()]
    scored = [line for line in lines if "validation_psnr_moving" in line]
    assert [line["step"] for line in scored] == [0, 2, 4]
    assert sum(name.startswith("validation_loss_v_sigma") for name in scored[0]) == len(VALIDATION_SIGMAS)
    videos = sorted((tmp_path / "with" / "validation").glob("*/*.mp4"))
    assert len(videos) == 3 and common.read_video(videos[0]).shape[0] == 8
    link = re.search(r"\]\((validation/.*)\)", (tmp_path / "with" / "README.md").read_text("utf-8"))[1]
    assert tmp_path / "with" / os.fsdecode(urllib.parse.unquote_to_bytes(link)) == videos[-1]
    page = (tmp_path / "with" / "index.html").read_text()
    shown = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert shown["lines"] == lines and [video["step"] for video in shown["videos"]] == ["000000", "000002", "000004"]
    output = tmp_path / "with"
    best = best_of(output)
    assert best in (0, 2, 4)
    # as a kill leaves it within the last validation, within the change of best/, and while a checkpoint goes
    whole = sorted(path.name for path in output.iterdir())
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if line != scored[-1]))
    os.replace(output / "best", output / ".best.1a2b3c4d.old")
    (output / ".checkpoint-1.gone").mkdir()
    (output / "validation" / "step-000004" / ".clip9.mp4.0.part").write_bytes(b"")
    (output / "model_index.json").unlink()
    run("train_svd.py", *train_arguments(dataset, output), "--max_train_steps", 4, "--use_ema", "--validation_dir",
        held_out, "--validation_steps", 2, "--resume_from_checkpoint", "latest")  # fmt: skip
    again = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert again[:-1] == [line for line in lines if line != scored[-1]]
    scored[-1]["seconds_of_validation"] = again[-1]["seconds_of_validation"]
    assert again[-1] == pytest.approx(scored[-1])
    assert json.loads((output / "best" / "training_state.json").read_text())["step"] == best
    assert sorted(path.name for path in output.iterdir()) == whole
    assert sorted((output / "validation").glob("*/*")) == videos
    # a run that is given up before its first checkpoint, and another one begun in its folder
    for path in [*output.glob("checkpoint-*"), output / "model_index.json"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run("train_svd.py", *train_arguments(dataset, output), "--max_train_steps", 1, "--seed", 3, "--validation_dir",
        held_out, "--validation_steps", 9, "--resume_from_checkpoint", "latest")  # fmt: skip
    assert len(list((output / "earlier-1" / "validation").glob("*/*"))) == 3
    assert json.loads((output / "earlier-1/best/training_state.json").read_text())["step"] == best
    assert json.loads((output / "best/training_state.json").read_text())["settings"]["seed"] == 3
    assert len(list((output / "validation").glob("*/*"))) == 2


CROP = "warning: 2 clips of 96x64 (clip0, clip1): some 35% of the picture is lost to the crop to 64x64; "


CROP = "warning: 2 clips of 96x64 (clip0, clip1): some 35% of the picture is lost to the crop to 64x64; "


def test_the_next_command_is_one_that_infer_svd_takes(tmp_path):
    """Half of all medians of whole numbers are none, and a time lapse has less than a frame a second."""
    for number, bucket in enumerate((83, 86)):
        write_clip(tmp_path / "a clip" / f"clip{number}", moving_square(8, seed=number))
        line = {"directory": f"clip{number}", "fps": 0.5, "motion_bucket_id": bucket}
        with open(tmp_path / "a clip" / "metadata.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    output = tmp_path / "a run"
    done = run("train_svd.py", *train_arguments(tmp_path / "a clip", output), "--width", 64, "--max_train_steps", 1)
    assert CROP in done.stdout
    assert "fp32 on cpu" in done.stdout and "2 clips, 1 step, batch 1" in done.stdout
    words = shlex.split(re.search(r"next: (.*)", done.stdout)[1])
    args = infer_svd.parse_args(words[2:])
    assert words[:2] == ["python", "infer_svd.py"] and (args.model_dir, args.fps) == (str(output), 0.5)
    assert (
        args.motion_bucket_id == [84] and "median motion_bucket_id 84: use these" in (output / "README.md").read_text()
    )


def test_a_run_says_what_it_takes_where_it_goes_on_and_that_it_remembers_what_is_held_out(dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache"))
    (tmp_path / "kept.txt").write_text("clip0\nclip2\nclip9\n")
    arguments = [*train_arguments(dataset, tmp_path / "out"), "--include", f"@{tmp_path / 'kept.txt'}",
        "--validation_dir", copy, "--num_validation_videos", 1, "--max_train_steps"]  # fmt: skip
    done = run("train_svd.py", *arguments, 1).stdout
    assert "--include: 1 of 3 clips left out" in done and "--include clip9: no clip of this run has that name" in done
    assert "2 clips and 1 held out" in done
    assert "warning: this run trains on 1 of the 1 held-out clip (clip0); their scores show how well" in done
    again = run("train_svd.py", *arguments, 1, "--resume_from_checkpoint", "latest").stdout
    first = tmp_path / "out" / "checkpoint-1"
    assert f"{first} has all 1 step already: nothing is trained; a larger --max_train_steps trains on" in again
    further = run("train_svd.py", *arguments, 2, "--resume_from_checkpoint", "latest").stdout
    assert f"going on from {first}: step 1 of 2" in further
    wrong = run("train_svd.py", *arguments, 2, "--resume_from_checkpoint", "checkpoint-9", ok=False).stdout
    assert "checkpoint-9: no such folder; in" in wrong and "there is checkpoint-1, checkpoint-2" in wrong
    clip = run("train_svd.py", *train_arguments(dataset / "clip0", tmp_path / "x"), ok=False).stdout
    assert f"{dataset / 'clip0'} is the folder of one clip; give the folder above it, {dataset}" in clip


def test_a_resumed_run_holds_out_what_it_held_out_before(dataset, tmp_path):
    clips = tmp_path / "clips"
    shutil.copytree(dataset, clips, ignore=shutil.ignore_patterns(".cache"))
    for seed in range(3, 6):
        write_clip(clips / f"clip{seed}", moving_square(10, seed=seed))
    arguments = [*train_arguments(clips, tmp_path / "out"), "--num_validation_videos", 2, "--validation_steps", 99]
    run("train_svd.py", *arguments, "--max_train_steps", 1)
    state = json.loads((tmp_path / "out/checkpoint-1/training_state.json").read_text())
    settings = json.loads((tmp_path / "out/training_settings.json").read_text())
    assert (
        settings["trained_on"].keys() == state["clips"].keys() and state["settings"]["held_out"] == settings["held_out"]
    )
    found = list_clips(clips)
    add_digests(found)
    digests = {clip["directory"]: clip["digest"] for clip in found}
    assert {**settings["trained_on"], **settings["held_out"]} == digests
    held_out, trained_on = list(settings["held_out"]), sorted(state["clips"])
    assert len(held_out) == 2 and len(trained_on) == 4
    shutil.rmtree(clips / trained_on[0])
    shutil.rmtree(clips / held_out[0])
    write_clip(clips / "new", moving_square(10, seed=7))
    resumed = [*arguments, "--max_train_steps", 2, "--resume_from_checkpoint", "latest"]
    assert "new not trained on before" in run("train_svd.py", *resumed, ok=False).stdout
    done = run("train_svd.py", *resumed, "--exclude", "new").stdout
    assert f"going on without {trained_on[0]}" in done and "3 clips and 1 held out" in done
    videos = {path.stem for path in (tmp_path / "out/validation/step-000002").iterdir()}
    assert videos == {held_out[1]}
    shutil.rmtree(clips / held_out[1])
    for steps in (3, 4):  # never others, which were trained on
        done = run("train_svd.py", *resumed, "--exclude", "new", "--max_train_steps", steps).stdout
        assert "nothing is validated any more" in done and "3 clips, " in done

    vae = shutil.copytree(TINY, tmp_path / "other_vae") / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.1 for name, tensor in load_file(vae).items()}, vae, {"format": "pt"})
    resumed += ["--exclude", "new", "--pretrained_model_name", tmp_path / "other_vae"]
    other = run("train_svd.py", *resumed, ok=False)
    assert "encoders_fingerprint was" in other.stdout


def test_frames_that_were_turned_are_other_frames(tmp_path):
    path, digests = tmp_path / "clip" / "0.jpg", []
    path.parent.mkdir()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8))
    for orientation in (1, 3):
        exif = image.getexif()
        exif[274] = orientation
        image.save(path, exif=exif)
        clip = {"frames": [path]}
        add_digests([clip])
        digests.append((path.stat().st_size, clip["digest"]))
    assert digests[0][0] == digests[1][0] > 4096 and digests[0][1] != digests[1][1]


# ------------------------------------------------------------------------------------------------ users' mistakes


def test_the_choices_of_options_are_the_tables():
    choices = {action.dest: list(action.choices or ()) for action in train_svd.build_parser()._actions}
    assert choices["lr_scheduler"] == train_svd.SCHEDULES and choices["optimizer"] == list(OPTIMIZERS)
    assert set(train_svd.SCHEDULES) == {kind.value for kind in SchedulerType} - {"piecewise_constant"}  # needs rules
    assert choices["trainable"] == list(TRAINABLE) and choices["mixed_precision"] == list(DTYPES)
    assert choices["gradient_checkpointing"] == [*RECOMPUTED, "auto"]
    assert choices["validation_metric"] == [name for name, metric in METRICS.items() if metric.picks_best]


def test_a_users_mistake_is_one_line_and_a_status(tmp_path):
    done = run("train_svd.py", *train_arguments(tmp_path / "nowhere", tmp_path / "out"), ok=False)
    assert done.returncode == 2 and done.stdout.count("\n") == 1 and "no such folder" in done.stdout


def test_users_mistakes_are_refused_before_anything_is_loaded(dataset, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "load_part", None)  # whatever loads weights fails

    def refused(*flags, data=dataset, output=None, model=TINY):
        arguments = [*train_arguments(data, output or tmp_path / "out", model), *flags]
        with pytest.raises((UserError, SystemExit)) as error:
            train_svd.main([str(argument) for argument in arguments])
        assert not (tmp_path / "out").exists()
        return str(error.value) + capsys.readouterr().err

    assert "--width must be a multiple of 16 for this model, got 100" in refused("--width", 100)
    assert "no such folder" in refused(data=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no folder of frames" in refused(data=tmp_path / "empty")
    assert "no clip is that long; the longest has 10" in refused("--num_frames", 11)
    assert "already holds a run" in refused(output=trained)
    assert "is the dataset's folder" in refused(output=dataset)
    assert "no such model folder" in refused(model=tmp_path / "nothing")
    assert "--lr_warmup_steps" in refused("--lr_warmup_steps", -1)
    broken = tmp_path / "broken"
    shutil.copytree(TINY, broken)
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-7])
    assert "cut off" in refused(model=broken)
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git-lfs pointer" in refused(model=broken)
    file.unlink()
    (broken / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    assert "never loaded" in refused(model=broken)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub = refused(model="stabilityai/stable-video-diffusion-img2vid-xt")
    assert "HF_ENDPOINT" in hub and "licence" in hub


def test_short_clips_are_named_and_the_rest_trains(tmp_path):
    write_clip(tmp_path / "data" / "long", moving_square(9))
    write_clip(tmp_path / "data" / "short", moving_square(5))
    done = run("train_svd.py", *train_arguments(tmp_path / "data", tmp_path / "out"), "--max_train_steps", 1)
    assert "short has 5 frames" in done.stdout


# ----------------------------------------------------------------------------------------- what people bring and do


def steps_done(output):
    path = output / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for_steps(process, output, count, seconds=200):
    deadline = time.time() + seconds
    while process.poll() is None and steps_done(output) < count:
        assert time.time() < deadline, "the run did not get there"
        time.sleep(0.05)


@pytest.fixture
def own_dataset(dataset, tmp_path):
    """A copy of the plain clips, to be damaged."""
    shutil.copytree(dataset, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    return tmp_path / "data"


def test_a_frame_that_turns_bad_costs_no_step_and_the_run_goes_on_without_its_clip(own_dataset, tmp_path):
    output = tmp_path / "out"
    arguments = [*train_arguments(own_dataset, output), "--max_train_steps", 5000]
    process = Launched("train_svd.py", *arguments)
    wait_for_steps(process, output, 3)
    (own_dataset / "clip1" / "00000.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for frame in (own_dataset / "clip1").glob("*.png"):
        frame.write_bytes(b"\x89PNG\r\n\x1a\n")
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 2 and "Traceback" not in printed, printed
    assert printed.count("clip1/0000") == 1 and "--exclude clip1 --resume_from_checkpoint latest" in printed
    (saved,) = checkpoints_of(output)
    assert checkpoint_step(saved) == steps_done(output)  # not a step is lost
    done = checkpoint_step(saved)
    arguments[-1:] = [done + 1, "--resume_from_checkpoint", "latest"]
    assert "going on without clip1" in run("train_svd.py", *arguments, "--exclude", "clip1").stdout
    shutil.rmtree(own_dataset / "clip1")
    arguments[arguments.index("--max_train_steps") + 1] = done + 2
    run("train_svd.py", *arguments)


def test_a_clip_that_gives_nan_is_named_and_the_steps_before_it_are_saved(own_dataset, tmp_path):
    run("train_svd.py", *train_arguments(own_dataset, tmp_path / "a"), "--max_train_steps", 1)
    cached = next(own_dataset.glob(".cache/*/clip1.safetensors"))
    with safe_open(cached, "pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}
    tensors["mean"][:] = float("nan")
    save_file(tensors, cached, metadata)
    for name, flags in (("late", []), ("early", ["--max_grad_norm", 0])):
        done = run("train_svd.py", *train_arguments(own_dataset, tmp_path / name), "--max_train_steps", 9,
            "--logging_steps", 4, *flags, ok=False)  # fmt: skip
        named = done.stdout.split("Its clips")[1]
        assert "not finite" in done.stdout and "clip1" in named and "clip0" not in named
        bad = int(re.search(r"step (\d+): the loss", done.stdout)[1])
        run("train_svd.py", *train_arguments(own_dataset, tmp_path / f"{name}-short"), *flags,
            "--max_train_steps", max(1, bad - 1), "--checkpointing_steps", 1)  # fmt: skip
        assert bad > 1  # else this proves nothing: choose another seed
        saved, whole = (load_file(tmp_path / folder / f"checkpoint-{bad - 1}" / "trained.safetensors")
            for folder in (name, f"{name}-short"))  # fmt: skip
        assert same(saved, whole)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_and_says_how_to_go_on(name, dataset, tmp_path):
    process = Launched("train_svd.py", *train_arguments(dataset, tmp_path / "out"), "--max_train_steps", 5000)
    wait_for_steps(process, tmp_path / "out", 1)
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + getattr(signal, name) and "Traceback" not in output
    assert '"step": 1,' in (tmp_path / "out" / "index.html").read_text()  # a page, though nothing was validated
    assert "--resume_from_checkpoint latest" in output and len(checkpoints_of(tmp_path / "out")) == 1


def test_nohup_stays_and_a_second_run_on_the_folder_is_refused(dataset, tmp_path):
    output = tmp_path / "out"
    arguments = [*train_arguments(dataset, output), "--max_train_steps", 20]
    first = Launched("train_svd.py", *arguments, ignored=[signal.SIGHUP])
    wait_for_steps(first, output, 1)
    first.send_signal(signal.SIGHUP)
    second = run("train_svd.py", *arguments, "--resume_from_checkpoint", "latest", ok=False)
    assert "another run is at work on it" in second.stdout
    assert first.communicate(timeout=200) and first.returncode == 0 and steps_done(output) == 20


def test_resume_by_name_into_a_folder_with_other_files_and_other_validation(trained, dataset, tmp_path):
    output, held_out = tmp_path / "out", tmp_path / "held_out"
    output.mkdir()
    shutil.copytree(trained / "checkpoint-3", output / "checkpoint-3")  # alone, beside a log of the shell
    (output / "train.log").write_text("nohup")
    write_clip(held_out / "clip9", moving_square(8, seed=5))
    arguments = [*train_arguments(dataset, output), "--validation_dir", held_out, "--validation_steps", 100]
    run("train_svd.py", *arguments, "--max_train_steps", 6, "--num_validation_videos", 1,
        "--resume_from_checkpoint", "checkpoint-3")  # fmt: skip
    assert same(weights(trained), weights(output)) and (output / "train.log").read_text() == "nohup"


def test_resuming_on_other_frames_is_refused_by_the_clips_name(trained, own_dataset, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(trained, output)
    arguments = [*train_arguments(own_dataset, output), "--max_train_steps", 7, "--resume_from_checkpoint", "latest"]
    for frame in sorted((own_dataset / "clip0").glob("*.png")):
        shutil.copy(frame, own_dataset / "clip2" / frame.name)
    done = run("train_svd.py", *arguments, ok=False)
    assert "clip2 changed" in done.stdout and "clip0" not in done.stdout
    shutil.rmtree(own_dataset / "clip2")
    write_clip(own_dataset / "clip7", moving_square(10, seed=7))
    assert "clip7 not trained on before" in run("train_svd.py", *arguments, ok=False).stdout


def test_the_cache_follows_a_copy_of_the_data_and_is_refused_early_where_it_cannot_be_written(own_dataset, tmp_path):
    flags = ["--max_train_steps", 1, "--cache_dir", tmp_path / "cache"]
    run("train_svd.py", *train_arguments(own_dataset, tmp_path / "a"), *flags)
    staged = tmp_path / "scratch" / "data"
    shutil.copytree(own_dataset, staged, copy_function=shutil.copyfile)  # other times, another place
    done = run("train_svd.py", *train_arguments(staged, tmp_path / "b"), *flags)
    assert "caching latents" not in done.stdout
    (own_dataset / ".cache").write_text("a file where the folder should be")
    done = run("train_svd.py", *train_arguments(own_dataset, tmp_path / "c"), "--max_train_steps", 1, ok=False)
    assert "--cache_dir" in done.stdout and "the cache cannot be written" in done.stdout


def test_the_environment_of_accelerate_changes_nothing(trained, dataset, tmp_path):
    environment = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_DYNAMO_BACKEND": "eager"}
    run("train_svd.py", *train_arguments(dataset, tmp_path / "out"), "--max_train_steps", 6, env=environment)
    assert same(weights(trained), weights(tmp_path / "out"))


def test_without_cuda_it_says_so_and_the_average_is_that_of_diffusers(dataset, tmp_path):
    arguments = [*train_arguments(dataset, tmp_path / "out"), "--checkpointing_steps", 1]
    arguments += ["--checkpoints_total_limit", 9]
    done = run("train_svd.py", *arguments, "--max_train_steps", 4, "--use_ema", "--ema_decay", 0.7)
    if not torch.cuda.is_available():
        cure = "pytorch.org" if torch.version.cuda is None else "driver"  # "no driver found", or "too old"
        assert "no CUDA GPU: " in done.stdout and cure in done.stdout
    start = common.load_part(TINY, "unet", torch.float32)
    names = list(load_file(tmp_path / "out" / "checkpoint-1" / "trained.safetensors"))
    reference = EMAModel([dict(start.named_parameters())[name] for name in names], decay=0.7)
    for step in (1, 2, 3, 4):
        trained = load_file(tmp_path / "out" / f"checkpoint-{step}" / "trained.safetensors")
        reference.step([torch.nn.Parameter(trained[name]) for name in names])
    average = load_file(tmp_path / "out" / "checkpoint-4" / "ema.safetensors")
    assert all(torch.allclose(average[n], r, rtol=1e-5, atol=1e-7) for n, r in zip(names, reference.shadow_params))


def test_tensorboard_gets_numbers_and_videos_and_each_step_once_after_a_kill(dataset, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_clip(tmp_path / "held_out" / "clip9", moving_square(8, seed=5))
    arguments = [*train_arguments(dataset, tmp_path / "out"), "--report_to", "tensorboard", "--checkpointing_steps", 2]
    arguments += ["--validation_dir", tmp_path / "held_out", "--validation_steps", 99]
    run("train_svd.py", *arguments, "--max_train_steps", 3)
    shutil.rmtree(tmp_path / "out" / "checkpoint-3")  # as if killed after step 3
    run("train_svd.py", *arguments, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    events = EventAccumulator(str(tmp_path / "out" / "svd"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss_v")] == [1, 2, 3, 4]
    assert events.Tags()["images"] == ["clip9"]


@pytest.mark.gpu
def test_forecast_is_within_a_tenth_of_the_measured_peak(tmp_path):
    import bench_train

    measured, forecast = bench_train.measured_and_forecast(512, 320, "full")
    assert abs(measured - forecast) < 0.1 * measured
