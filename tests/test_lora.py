"""LoRA: the adapters alone are trained, saved as peft's own, and the merged result is the base plus the adapter."""

import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
from conftest import SIZE, TINY, Launched, moving_square, run, train_arguments

import infer_svd
import svd_common as common
from svd_parts.dataset import list_clips
from svd_parts.judging import find_trained_on
from svd_parts.lora import check_adapters
from svd_parts.weights import CHECKPOINT_STATE

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

from diffusers import UNetSpatioTemporalConditionModel
from safetensors.torch import load_file, save_file

LORA = ["--lora_rank", 4, "--learning_rate", "1e-3"]


def weights_of(model):
    return load_file(model / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def adapted(dataset, tmp_path_factory):
    """A finished run with a LoRA, an average and validation."""
    output = tmp_path_factory.mktemp("lora") / "outputs"
    run("train_svd.py", *train_arguments(dataset, output), *LORA, "--lora_alpha", 8, "--max_train_steps", 6,
        "--checkpointing_steps", 3, "--use_ema", "--num_validation_videos", 1,
        "--validation_inference_steps", 25)  # fmt: skip
    return output


def test_adapters_alone_are_trained_in_every_linear_layer_of_the_temporal_blocks(adapted):
    state = json.loads((adapted / "checkpoint-6" / CHECKPOINT_STATE).read_text())
    first, trained = (load_file(adapted / f"checkpoint-{step}" / "trained.safetensors") for step in (3, 6))
    assert all(".lora_" in name for name in trained) and all(not torch.equal(trained[n], first[n]) for n in trained)
    unet = UNetSpatioTemporalConditionModel.from_pretrained(TINY, subfolder="unet")
    linear = {name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear)}
    idle = ("attn2.to_q", "attn2.to_k")  # without a gradient: one token is attended to
    expected = {n for n in linear if ".temporal_transformer_blocks." in n and not n.endswith(idle)}
    assert {name.split(".lora_")[0] for name in trained} == expected
    assert state["settings"]["lora_rank"] == 4 and state["settings"]["lora_alpha"] == 8
    line = json.loads((adapted / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["validation_psnr_moving"] > 5 and (adapted / "best" / "ema.safetensors").exists()


def test_others_can_read_all_that_a_run_writes(adapted, dataset):
    """Result, best/, checkpoints, LoRA, validation, pages and cache go by the umask: safetensors alone would not."""
    os.umask(umask := os.umask(0))
    mode = 0o666 & ~umask
    files = [path for folder in (adapted, dataset / ".cache") for path in folder.rglob("*") if path.is_file()]
    kinds = {path.relative_to(adapted).parts[0] for path in files if path.is_relative_to(adapted)}
    assert {"unet", "best", "checkpoint-6", "lora", "validation", "index.html"} <= kinds
    assert any(".cache" in path.parts and path.suffix == ".safetensors" for path in files)
    assert {path: oct(path.stat().st_mode & 0o777) for path in files} == {path: oct(mode) for path in files}


def test_merged_result_is_what_plain_peft_makes_of_base_and_adapter(adapted):
    base = UNetSpatioTemporalConditionModel.from_pretrained(TINY, subfolder="unet")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = peft.PeftModel.from_pretrained(base, str(adapted / "lora")).merge_and_unload()
    merged = UNetSpatioTemporalConditionModel.from_pretrained(adapted, subfolder="unet").state_dict()
    changed = 0
    for name, value in model.state_dict().items():
        torch.testing.assert_close(merged[name], value, rtol=1e-3, atol=1e-6)  # the file is fp16, as the base's is
        moved = not torch.equal(merged[name], before[name])
        assert not moved or ".temporal_transformer_blocks." in name
        changed += moved
    assert changed > 20


def test_lora_over_the_base_gives_the_frames_of_the_merged_result(adapted, dataset, tmp_path):
    image = next((dataset / "clip0").glob("*.png"))
    options = ["--input_image", image, "--num_inference_steps", 2, "--seed", 1]
    for name, model in (
        ("merged", ["--model_dir", adapted]),
        ("checkpoint", ["--model_dir", adapted / "checkpoint-6"]),
        ("lora", ["--model_dir", TINY, "--lora", adapted / "lora"]),
        ("halves", ["--model_dir", TINY, "--lora", adapted / "lora", adapted / "lora", "--lora_scale", 0.5]),
        ("base", ["--model_dir", TINY, *SIZE, "--fps", 7, "--motion_bucket_id", 127]),
    ):
        run("infer_svd.py", *model, *options, "--output_video", tmp_path / name, "--output_format", "frames")
    frames = {}
    for folder in tmp_path.iterdir():
        files = sorted(folder.glob("*/*.png"))
        frames[folder.name] = np.stack([common.read_image(file) for file in files]).astype(int)
    for name in ("checkpoint", "lora", "halves"):
        assert np.abs(frames[name] - frames["merged"]).max() <= 2
    assert np.abs(frames["base"] - frames["merged"]).max() > 4


def test_lora_that_does_not_fit_is_refused(adapted, dataset, tmp_path):
    image = next((dataset / "clip0").glob("*.png"))

    def refused(folder):
        done = run("infer_svd.py", "--model_dir", TINY, "--lora", folder, "--input_image", image,
            "--output_video", tmp_path / "clips", ok=False)  # fmt: skip
        assert not (tmp_path / "clips").exists()
        return done.stdout

    assert "no adapter_config.json in it" in refused(adapted / "unet")
    odd = tmp_path / "odd"
    shutil.copytree(adapted / "lora", odd)
    config = json.loads((odd / "adapter_config.json").read_text())
    tensors = load_file(odd / "adapter_model.safetensors")
    down = next(name for name in tensors if ".lora_A." in name)
    for changed, said in (
        ({**tensors, down: torch.zeros(4, 48)}, "for another model"),
        ({**tensors, down: torch.zeros(3, 32)}, "no two matrices of rank 4"),
        ({**tensors, down: torch.zeros(4)}, "no two matrices of rank 4"),
        ({name: tensor for name, tensor in tensors.items() if name != down}, "no two matrices of rank 4"),
        ({}, "no two matrices of rank 4"),
    ):
        save_file(changed, odd / "adapter_model.safetensors")
        assert said in refused(odd)
    for field, value, said in (("use_dora", True, "use_dora"), ("peft_type", "LOHA", "peft_type LOHA")):
        (odd / "adapter_config.json").write_text(json.dumps({**config, field: value}))
        assert f"not a plain LoRA ({said})" in refused(odd)
    for model in (adapted, max(adapted.glob("checkpoint-*"))):
        twice = run("infer_svd.py", "--model_dir", model, "--lora", adapted / "lora", "--input_image", image,
            "--output_video", tmp_path / "clips", ok=False)  # fmt: skip
        assert "is merged into --model_dir" in twice.stdout
    parent = run("infer_svd.py", "--model_dir", adapted / "lora", "--input_image", image, "--output_video",
        tmp_path / "clips", ok=False)  # fmt: skip
    assert str(adapted) in parent.stdout


def test_wrong_lora_options_are_refused(dataset, tmp_path):
    arguments = train_arguments(dataset, tmp_path / "out")
    assert "--lora_rank must be at least 1, got 0" in run("train_svd.py", *arguments, "--lora_rank", 0, ok=False).stdout
    for option in (["--lora_alpha", 4], ["--no-save_merged"]):
        assert "give --lora_rank too" in run("train_svd.py", *arguments, *option, ok=False).stdout
    assert "--lora_alpha must be over 0" in run("train_svd.py", *arguments, *LORA, "--lora_alpha", 0, ok=False).stdout
    assert not (tmp_path / "out").exists()


def test_killed_lora_run_goes_on_to_the_same_weights_and_writes_the_adapter_alone(dataset, tmp_path):
    def arguments(output):
        return [*train_arguments(dataset, output), *LORA, "--max_train_steps", 12, "--checkpointing_steps", 2,
            "--use_ema", "--no-save_merged", "--gradient_checkpointing", "full", "--trainable", "all"]  # fmt: skip

    run("train_svd.py", *arguments(tmp_path / "whole"))
    process = Launched("train_svd.py", *arguments(tmp_path / "killed"))
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline and not (tmp_path / "killed" / "checkpoint-4").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "lora").exists()
    done = run("train_svd.py", *arguments(tmp_path / "killed"), "--resume_from_checkpoint", "latest")
    assert f"--lora {tmp_path / 'killed'}/lora" in done.stdout
    files = [tmp_path / name / "lora" / "adapter_model.safetensors" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (tmp_path / "killed" / "model_index.json").exists() and not (tmp_path / "killed" / "unet").exists()
    assert any(not re.search("temporal", name) for name in load_file(files[0]))  # --trainable all: the spatial ones too


def test_what_the_base_and_each_lora_were_trained_on_is_known_wherever_it_was_prepared(tmp_path):
    """A model is trained on A, a LoRA over it on B. A is then prepared again, elsewhere and at another size."""
    for name, seeds in (("A", (0, 1)), ("B", (2, 3))):
        for seed in seeds:
            (tmp_path / "videos" / name).mkdir(parents=True, exist_ok=True)
            common.write_video(tmp_path / "videos" / name / f"v{seed}.mp4", moving_square(8, seed=seed), 7)
        run("prepare_dataset.py", "--video_dir", tmp_path / "videos" / name, "--output_dir", tmp_path / name)
    run("prepare_dataset.py", "--video_dir", tmp_path / "videos" / "A", "--output_dir", tmp_path / "data" / "again",
        "--width", 64, "--height", 64)  # fmt: skip
    first, second = tmp_path / "first", tmp_path / "second"
    run("train_svd.py", *train_arguments(tmp_path / "A", first), "--max_train_steps", 1)
    done = run("train_svd.py", *train_arguments(tmp_path / "B", second, first), "--max_train_steps", 1, *LORA,
        "--validation_dir", tmp_path / "A", "--num_validation_videos", 1)  # fmt: skip
    assert f"warning: {first} was trained on 1 of the 1 held-out clip (v0)" in done.stdout

    def known(model, reference, *flags):
        args = infer_svd.parse_args([*map(str, ["--model_dir", model, "--input_image", reference, "--output_video",
            tmp_path / "set", "--reference", reference, *flags])])  # fmt: skip
        found = check_adapters(infer_svd.find_model(str(model), args), args)
        return find_trained_on({clip["directory"]: clip for clip in list_clips(reference)}, [found.settings])

    again, lora = tmp_path / "data" / "again", second / "lora"
    assert known(first, again) == known(second, again) == known(second / "checkpoint-1", again) == {"v0", "v1"}
    assert known(second, tmp_path / "B") == known(second / "checkpoint-1", tmp_path / "B") == {"v2", "v3"}
    assert known(first, tmp_path / "B") == known(TINY, again) == set()
    assert known(first, tmp_path / "B", "--lora", second) == known(TINY, tmp_path / "B", "--lora", lora) == {"v2", "v3"}
    flags = ["--model_dir", TINY, "--input_image", again, "--reference", again, "--held_out", *SIZE]
    done = run("infer_svd.py", *flags, "--num_inference_steps", 1, "--output_video", tmp_path / "set")
    assert "--held_out leaves nothing out" in done.stdout


def test_forecast_of_a_lora_fits_an_8_gb_card(tmp_path):
    done = run("train_svd.py", "--pretrained_model_name", "stabilityai/stable-video-diffusion-img2vid-xt",
        "--dataset_dir", "none", "--output_dir", tmp_path / "out", "--lora_rank", 32, "--dry_run")  # fmt: skip
    plan = json.loads(done.stdout.splitlines()[-1])
    assert 4 < plan["peak_memory_gib"] <= 6.8
    assert 10e6 < plan["trainable_parameters"] < 20e6
