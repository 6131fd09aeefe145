"""Actions: the encoder on the stock UNet, its numbers, training that follows them, and generating by them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SIZE, TINY, Launched, moving_square, run, train_arguments, write_clip
from diffusers import StableVideoDiffusionPipeline
from safetensors.torch import load_file

import svd_common as common
from svd_parts import action_encoder as encoders
from svd_parts import actions as acts
from svd_parts.files import UserError
from svd_parts.objective import random_generator
from svd_parts.unet import prepare_unet, trained_parameters


@pytest.fixture(scope="module")
def inputs():
    generator = random_generator("actions test")
    return {
        "sample": torch.randn(2, 8, 8, 16, 24, generator=generator),
        "timestep": torch.tensor([0.3, -0.2]),
        "encoder_hidden_states": torch.randn(2, 1, 32, generator=generator),
        "added_time_ids": torch.tensor([[3.0, 100.0, 0.05]] * 2),
    }


def small_unet(count=3, trained=True, checkpointing="none", trainable="temporal"):
    """The tiny checkpoint's UNet with an encoder, whose last layer is not zero any more where it is `trained`."""
    unet = common.load_part(TINY, "unet", torch.float32)
    encoder = encoders.add_encoder(unet, count, random_generator("encoder"))
    for last in (encoder.time, *encoder.maps) if trained else ():
        torch.nn.init.normal_(last.weight, std=0.1, generator=random_generator("last"))
    return prepare_unet(unet, trainable, torch.float32, checkpointing)


def some_actions(seed=0, batch=2):
    return torch.randn(batch, 8, 3, generator=random_generator("actions", seed))


@torch.no_grad()
def test_before_training_the_output_is_bit_for_bit_the_stock_models(inputs):
    stock = common.load_part(TINY, "unet", torch.float32)(**inputs).sample
    unet = common.load_part(TINY, "unet", torch.float32)
    encoders.add_encoder(unet, 3, random_generator("encoder"))
    with encoders.follow_actions(unet, some_actions()):
        assert torch.equal(unet(**inputs).sample, stock)
    assert torch.equal(unet(**inputs).sample, stock)


@torch.no_grad()
def test_a_frames_action_changes_that_frame_most(inputs):
    unet, actions = small_unet(), some_actions()
    with encoders.follow_actions(unet, actions):
        before = unet(**inputs).sample
    for frame in (0, 3, 7):
        changed = actions.clone()
        changed[:, frame] += 1
        with encoders.follow_actions(unet, changed):
            change = (unet(**inputs).sample - before).abs().mean((0, 2, 3, 4))
        assert change.argmax() == frame and change[frame] > 0, change


@torch.no_grad()
def test_dropped_actions_are_the_stock_model_and_samples_keep_their_own(inputs):
    unet, actions = small_unet(), some_actions()
    stock = unet(**inputs).sample
    with encoders.follow_actions(unet, actions, torch.tensor([1.0, 0.0])):
        mixed = unet(**inputs).sample
    assert torch.equal(mixed[1], stock[1]) and not torch.equal(mixed[0], stock[0])
    with encoders.follow_actions(unet, actions[:1]):  # guidance: one clip's actions for both of its samples
        both = unet(**inputs).sample
    with encoders.follow_actions(unet, actions[:1].expand(2, -1, -1)):
        assert torch.equal(unet(**inputs).sample, both)


@pytest.mark.parametrize("checkpointing", ["transformers", "full"])
def test_recomputation_gives_the_same_gradients(inputs, checkpointing):
    gradients = []
    for mode in ("none", checkpointing):
        unet = small_unet(checkpointing=mode)
        with encoders.follow_actions(unet, some_actions(), torch.tensor([1.0, 1.0])):
            out = unet(**inputs).sample
        out.square().mean().backward()  # when the actions are no longer set
        gradients.append({name: p.grad for name, p in trained_parameters(unet).items()})
    assert gradients[0].keys() == gradients[1].keys()
    assert {name for name in gradients[0] if name.startswith(acts.PREFIX)} == {
        f"actions.{layer}.{kind}"
        for layer in ("action", "place", "hidden", "time", *(f"maps.{block}" for block in range(7)))
        for kind in ("weight", "bias")
    }
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-8)
    assert gradients[0]["actions.action.weight"].abs().sum() > 0


@torch.no_grad()
def test_low_vram_takes_guidances_samples_one_by_one_with_their_actions(inputs):
    from svd_parts.shortcuts import save_memory

    unet = small_unet()
    inputs = {**inputs, "timestep": torch.tensor(0.3)}
    with encoders.follow_actions(unet, some_actions(batch=1)):
        at_once = unet(**inputs).sample
        save_memory(unet)
        torch.testing.assert_close(unet(**inputs)[0], at_once, rtol=1e-4, atol=1e-5)


def test_scaling_puts_the_percentiles_at_one_and_a_constant_at_zero():
    rows = np.stack([np.linspace(0, 100, 101), np.full(101, 5.0)], 1)
    described = acts.describe_actions([{"actions": rows, "action_names": ["x", "y"]}])
    assert described == {"count": 2, "names": ["x", "y"], "low": [1, 5], "high": [99, 5]}
    scaled = acts.scale_actions(rows, described)
    np.testing.assert_allclose(scaled[[1, 50, 99], 0], [-1, 0, 1], atol=1e-6)
    assert (scaled[:, 1] == 0).all() and scaled.dtype == np.float32


def test_files_of_actions(tmp_path):
    table = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.save(tmp_path / "a.npy", table)
    (tmp_path / "a.csv").write_text("0,1\n2,3\n4,5\n")
    (tmp_path / "named.csv").write_text("x,y\n0,1\n2,3\n4,5\n")
    for name in ("a.npy", "a.csv", "named.csv"):
        assert np.array_equal(acts.read_actions(tmp_path / name), table)
    np.save(tmp_path / "flat.npy", table.ravel())
    np.save(tmp_path / "nan.npy", np.where(table == 3, np.nan, table))
    np.save(tmp_path / "text.npy", np.array([["a"]]))
    (tmp_path / "bad.csv").write_text("x,y\n1,2\n1\n")
    (tmp_path / "damaged.npy").write_bytes(b"\x93NUMPY")
    for name, said in {
        "flat.npy": "shape", "nan.npy": "row 1, column 1 is nan", "text.npy": "no table", "bad.csv": "no table",
        "damaged.npy": "no table", "none.npy": "no such file",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=said) as raised:
            acts.read_actions(tmp_path / name)
        assert name in str(raised.value) and "\n" not in str(raised.value)


def test_actions_are_checked_against_what_the_model_knows(tmp_path, capsys):
    described = {"count": 2, "names": ["x", "grip"], "low": [0, 0], "high": [1, 0]}

    def give(rows, frames=2, segments=1, **image):
        np.save(tmp_path / acts.FILE, np.array(rows, np.float32))
        images = [{"image": "a", **image}, {"image": "b"}]
        settings = SimpleNamespace(actions=str(tmp_path / acts.FILE), num_frames=frames, num_segments=segments)
        acts.add_actions_to_images(images, settings, SimpleNamespace(name="model", settings={"actions": described}))
        return images[0], capsys.readouterr().out

    image, said = give([[0.5, 0], [1.2, 0]])
    assert said == "" and np.allclose(image["action_rows"], [[0.5, 0], [1.2, 0]]) and len(image["actions_sha256"]) == 64
    assert "x is 0.5 to 30; the model was trained on 0 to 1" in give([[0.5, 0], [30, 0]])[1]
    assert "grip is 0 to 1" in give([[0.5, 0], [0.5, 1]])[1]
    assert "the first 2 rows are used" in give([[0.5, 0]] * 4)[1]
    for rows, more, said in (
        (np.zeros((4, 3)), {}, r"3 columns; .* 2 \(x, grip\)"),
        (np.zeros((4, 2)), {"frames": 3, "segments": 2}, "has 4 rows; 2 segments of 3 frames need 5"),
        (np.zeros((4, 2)), {"action_names": ["x", "y"]}, r'has columns \["x", "y"\]; .* 2 \(x, grip\)'),
    ):
        with pytest.raises(UserError, match=said):
            give(rows, **more)


def test_an_encoder_comes_back_from_its_folder(tmp_path, inputs):
    unet, described = small_unet(), {"count": 3, "names": None, "low": [0.0] * 3, "high": [1.0] * 3}
    weights, encoder = encoders.split_actions({name: p.data for name, p in unet.named_parameters()})
    assert len(encoder) == 22 and not any(name.startswith(acts.PREFIX) for name in weights)
    encoders.save_encoder(tmp_path / acts.FOLDER, encoder, described)
    for trained, folder in (({}, tmp_path), (dict(unet.named_parameters()), tmp_path / "none")):
        other = common.load_part(TINY, "unet", torch.float32)
        encoders.load_action_encoder(other, trained, folder)
        with (
            torch.no_grad(),
            encoders.follow_actions(unet, some_actions()),
            encoders.follow_actions(other, some_actions()),
        ):
            assert torch.equal(unet(**inputs).sample, other(**inputs).sample)


# ------------------------------------------------------------------------------------- the real scripts


@pytest.fixture(scope="module")
def acted(tmp_path_factory):
    """Four clips of ten frames, whose actions say where the square is; the last one has fewer clips' names."""
    root = tmp_path_factory.mktemp("acted")
    for seed in range(4):
        write_clip(root / f"clip{seed}", moving_square(10, seed=seed))
        left = 4 + (np.arange(10) * 6 + 11 * seed) % 72
        np.save(root / f"clip{seed}" / acts.FILE, np.stack([left, np.full(10, seed)], 1).astype(np.float32))
    lines = [{"directory": f"clip{seed}", "fps": 7, "action_names": ["left", "seed"]} for seed in range(4)]
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


RATES = ["--learning_rate", "1e-2", "--action_learning_rate", "1e-2"]


def train(acted, output, *more, **options):
    return run("train_svd.py", *train_arguments(acted, output), "--condition_on", "actions", *more, **options)


@pytest.fixture(scope="module")
def model(acted, tmp_path_factory):
    output = tmp_path_factory.mktemp("model") / "outputs"
    train(acted, output, "--max_train_steps", 4, "--checkpointing_steps", 2, "--use_ema", *RATES,
        "--num_validation_videos", 1)  # fmt: skip
    return output


def tensors(folder):
    return {file.name: load_file(file) for file in sorted(Path(folder).rglob("*.safetensors"))}


def same(first, second):
    one, two = ({(file, n): t for file, found in side.items() for n, t in found.items()} for side in (first, second))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_result_is_a_plain_pipeline_folder_and_the_encoder_beside_it(model):
    described = json.loads((model / "actions" / "actions.json").read_text())
    assert described["count"] == 2 and described["names"] == ["left", "seed"] and len(described["low"]) == 2
    assert load_file(model / "actions" / "encoder.safetensors")["time.weight"].abs().sum() > 0
    names = load_file(next((model / "unet").glob("*.safetensors"))).keys()
    assert names == load_file(next((TINY / "unet").glob("*.safetensors"))).keys()
    pipe = StableVideoDiffusionPipeline.from_pretrained(model)
    assert not hasattr(pipe.unet, "actions")
    settings = json.loads((model / "training_settings.json").read_text())
    assert settings["actions"] == described and settings["condition_on"] == "actions"
    assert any("validation_loss_v" in line for line in (model / "metrics.jsonl").read_text().splitlines())


def test_a_killed_run_goes_on_to_the_unbroken_one_to_the_last_bit(acted, model, tmp_path):
    same_run = ["--checkpointing_steps", 2, "--use_ema", *RATES, "--num_validation_videos", 1]
    whole = [*train_arguments(acted, tmp_path / "run"), "--condition_on", "actions", "--max_train_steps", 4, *same_run]
    process, deadline = Launched("train_svd.py", *whole), time.time() + 120
    while process.poll() is None and time.time() < deadline and not (tmp_path / "run" / "checkpoint-2").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "run" / "model_index.json").exists()
    same_run += ["--resume_from_checkpoint", "latest"]
    train(acted, tmp_path / "run", "--max_train_steps", 4, *same_run)
    for part in ("checkpoint-4", "actions", "unet"):
        assert same(tensors(tmp_path / "run" / part), tensors(model / part)), part
    done = train(acted, tmp_path / "run", "--max_train_steps", 6, "--action_dropout_prob", 0.5, *same_run, ok=False)
    assert "action_dropout_prob was 0.1, is 0.5" in done.stdout
    other = shutil.copytree(acted, tmp_path / "other")
    for path in other.glob(f"*/{acts.FILE}"):
        np.save(path, np.load(path) + 1)
    done = train(other, tmp_path / "run", "--max_train_steps", 6, *same_run, ok=False)
    assert "changed (frames, fps, motion or actions)" in done.stdout


def test_training_goes_on_from_a_model_that_follows_actions(acted, model, tmp_path):
    other = shutil.copytree(acted, tmp_path / "other")
    for path in other.glob(f"*/{acts.FILE}"):
        np.save(path, np.load(path) / 2)  # of the same kind, in another range
    start = ["--learning_rate", 0, "--max_train_steps", 1]
    with_actions = ["--condition_on", "actions", "--action_learning_rate", 0]
    run("train_svd.py", *train_arguments(other, tmp_path / "on", model), *with_actions, *start)
    for name in ("actions.json", "encoder.safetensors"):
        assert (tmp_path / "on" / "actions" / name).read_bytes() == (model / "actions" / name).read_bytes()
    done = run("train_svd.py", *train_arguments(other, tmp_path / "off", model), *start)
    assert "follows actions; without --condition_on actions" in done.stdout
    assert not (tmp_path / "off" / "actions").exists()
    (other / "metadata.jsonl").write_text((other / "metadata.jsonl").read_text().replace("left", "right"))
    done = run("train_svd.py", *train_arguments(other, tmp_path / "new", model), *with_actions, *start)
    assert (
        "follows other actions (left, seed): its encoder is not used, and a new one learns right, seed" in done.stdout
    )
    assert load_file(tmp_path / "new" / "actions" / "encoder.safetensors")["time.weight"].abs().sum() == 0


def test_two_processes_share_the_encoders_gradients(acted, tmp_path):
    batch = ["--max_train_steps", 2, "--learning_rate", "1e-3"]
    train(acted, tmp_path / "one", *batch, "--train_batch_size", 2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [ROOT / "train_svd.py", *train_arguments(acted, tmp_path / "two"), "--condition_on", "actions", *batch]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([*map(str, command)], env=environment, check=True, timeout=400)
    one, two = (tensors(tmp_path / name / "actions")["encoder.safetensors"] for name in ("one", "two"))
    apart = {name: ((one[name] - two[name]).norm() / one[name].norm()).item() for name in one}
    # as a whole: Adam's first steps have the size of the learning rate also where a gradient is next to nothing
    assert max(apart.values()) < 2e-3, apart


@pytest.mark.parametrize(
    "more",
    [
        ["--lora_rank", 2],
        ["--max_grad_norm", 0],
        ["--trainable", "all"],
        ["--no-cache_latents", "--mixed_precision", "bf16"],
    ],
    ids=lambda more: more[0],
)
def test_actions_train_with_everything_else(acted, tmp_path, more):
    output = tmp_path / "out"
    train(acted, output, "--max_train_steps", 2, "--learning_rate", "1e-2", *more)
    assert load_file(output / "actions" / "encoder.safetensors")["time.weight"].abs().sum() > 0
    if "--lora_rank" in more:  # the LoRA's folder is whole by itself
        rows = tmp_path / "rows.npy"
        np.save(rows, np.zeros((8, 2), np.float32))
        generate(
            TINY, acted / "clip0" / "00000.png", tmp_path / "lora.mp4", "--lora", output / "lora", "--actions", rows
        )
        generate(output, acted / "clip0" / "00000.png", tmp_path / "whole.mp4", "--actions", rows)
        shown = [common.read_video(tmp_path / f"{name}.mp4").astype(int) for name in ("lora", "whole")]
        assert np.abs(shown[0] - shown[1]).mean() < 2  # the merged one is stored in fp16


def test_a_dry_run_counts_the_encoder(tmp_path, acted):
    plans = []
    for more in ([], ["--condition_on", "actions"]):
        done = run("train_svd.py", *train_arguments(acted, tmp_path / "x"), "--max_train_steps", 1000,
            "--num_validation_videos", 1, "--dry_run", *more)  # fmt: skip
        assert "time for 1000 steps, caching 40 frames and validating 1 clip included; an estimate" in done.stdout
        plans.append(json.loads(done.stdout.splitlines()[-1]))
    unet = common.load_part(TINY, "unet", torch.float32)
    more = sum(p.numel() for p in encoders.add_encoder(unet, 7).parameters())  # most robot arms have 7
    assert plans[1]["trainable_parameters"] - plans[0]["trainable_parameters"] == more


def test_training_refuses_clips_without_actions_and_with_others(acted, tmp_path):
    data = shutil.copytree(acted, tmp_path / "data")
    np.save(data / "clip2" / acts.FILE, np.zeros((9, 2), np.float32))
    assert "9 rows for 10 frames" in train(data, tmp_path / "out", ok=False).stdout
    np.save(data / "clip2" / acts.FILE, np.zeros((10, 3), np.float32))
    assert "the same columns" in train(data, tmp_path / "out", ok=False).stdout
    (data / "clip2" / acts.FILE).unlink()
    done = train(data, tmp_path / "out", ok=False)
    assert "actions.npy is missing" in done.stdout and "--exclude" in done.stdout
    done = run("train_svd.py", *train_arguments(data, tmp_path / "out"), "--action_dropout_prob", 0.2, ok=False)
    assert "--condition_on" in done.stdout


def generate(model, image, output, *more, **options):
    return run("infer_svd.py", "--model_dir", model, "--input_image", image, "--output_video", output,
        "--num_inference_steps", 2, *SIZE, *more, **options)  # fmt: skip


def test_generating_follows_the_actions_of_a_file_and_of_a_dataset(acted, model, tmp_path):
    image, rows = acted / "clip0" / "00000.png", np.load(acted / "clip0" / acts.FILE)[:8]
    np.save(tmp_path / "same.npy", rows)
    np.save(tmp_path / "other.npy", rows[::-1])
    np.savetxt(tmp_path / "same.csv", rows, delimiter=",", header="left,seed", comments="")
    for name in ("same.npy", "other.npy", "same.csv"):
        generate(model, image, tmp_path / f"{name}.mp4", "--actions", tmp_path / name)
    generate(model, image, tmp_path / "none.mp4")
    made = {name: (tmp_path / f"{name}.mp4").read_bytes() for name in ("same.npy", "other.npy", "same.csv", "none")}
    assert made["same.npy"] == made["same.csv"] and len(set(made.values())) == 3
    record = json.loads((tmp_path / "same.npy.json").read_text())
    assert record["actions_file"] == str(tmp_path / "same.npy") and len(record["actions_sha256"]) == 64
    generate(model / "checkpoint-4", image, tmp_path / "c.mp4", "--actions", tmp_path / "same.npy")
    shown = [common.read_video(tmp_path / name).astype(int) for name in ("c.mp4", "same.npy.mp4")]
    assert np.abs(shown[0] - shown[1]).mean() < 2  # the result is stored in fp16, as the base

    generate(model, acted, tmp_path / "set", "--output_format", "frames", "--actions", acted)
    for clip in ("clip0", "clip3"):  # a set that can be trained on again
        [folder] = (tmp_path / "set").glob(f"{clip}*")
        assert np.array_equal(np.load(folder / acts.FILE), np.load(acted / clip / acts.FILE)[:8])
    done = generate(model, acted, tmp_path / "set", "--output_format", "frames", ok=False)
    assert "actions_sha256" in done.stdout


def test_the_next_segment_takes_the_next_actions(acted, model, tmp_path):
    rows = np.concatenate([np.load(acted / "clip0" / acts.FILE), np.load(acted / "clip1" / acts.FILE)])[:15]
    changed = rows.copy()
    changed[8:] = rows[8:][::-1]
    image, two = acted / "clip0" / "00000.png", ["--num_segments", 2, "--output_format", "frames"]
    for name, actions in (("a", rows), ("b", changed)):
        np.save(tmp_path / f"{name}.npy", actions)
        generate(model, image, tmp_path / name, *two, "--actions", tmp_path / f"{name}.npy")
    a, b = ([common.read_image(f) for f in sorted((tmp_path / name).rglob("*.png"))] for name in "ab")
    assert len(a) == len(b) == 15
    assert np.array_equal(a[:8], b[:8]) and not np.array_equal(a[8:], b[8:])
    done = generate(model, image, tmp_path / "c", *two, "--num_segments", 3, "--actions", tmp_path / "a.npy", ok=False)
    assert "3 segments of 8 frames need 22" in done.stdout


def test_generating_refuses_actions_that_do_not_fit(acted, model, tmp_path, trained):
    image = acted / "clip0" / "00000.png"
    np.save(tmp_path / "three.npy", np.zeros((8, 3), np.float32))
    np.save(tmp_path / "two.npy", np.zeros((8, 2), np.float32))
    for folder, path, said in (
        (model, tmp_path / "three.npy", "2 (left, seed)"), (model, tmp_path / "none.npy", "no such file"),
        (model, image, "must be an .npy or .csv"), (trained, tmp_path / "two.npy", "--condition_on actions"),
    ):  # fmt: skip
        done = generate(folder, image, tmp_path / "x.mp4", "--actions", path, ok=False)
        assert said in done.stdout and not (tmp_path / "x.mp4").exists()


def test_a_lerobot_set_carries_the_actions(acted, model, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "set"
    generate(model, acted, out, "--output_format", "lerobot", "--task", "move", "--actions", acted)
    info = json.loads((out / "meta" / "info.json").read_text())
    assert info["features"]["action"] == {"dtype": "float32", "shape": [2], "names": ["left", "seed"]}
    table = parquet.read_table(out / "data" / "chunk-000" / "file-000.parquet")
    given = np.concatenate([np.load(acted / f"clip{i}" / acts.FILE)[:8] for i in range(4)])
    assert np.array_equal(np.array(table["action"].to_pylist(), np.float32), given)
    stats = json.loads((out / "meta" / "stats.json").read_text())["action"]
    assert np.allclose(stats["mean"], given.mean(0)) and np.allclose(stats["std"], given.std(0))
    assert stats["count"] == [32] and np.allclose(stats["max"], given.max(0))
    episodes = parquet.read_table(out / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    assert np.allclose(episodes["stats/action/min"].to_pylist()[0], given[:8].min(0))


def test_lerobot_itself_loads_and_merges_a_set_with_actions(acted, model, tmp_path):
    pytest.importorskip("lerobot")
    from lerobot.datasets.aggregate import aggregate_datasets
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    camera, made = "observation.images.image", tmp_path / "made"
    generate(model, acted, made, "--output_format", "lerobot", "--task", "move", "--actions", acted)
    given = np.concatenate([np.load(acted / f"clip{i}" / acts.FILE)[:8] for i in range(4)])

    def check(dataset, first):
        found = np.stack([dataset[first + t]["action"].numpy() for t in range(32)])
        assert found.dtype == np.float32 and np.array_equal(found, given)

    check(LeRobotDataset("local/made", root=made, video_backend="pyav"), 0)
    features = {camera: {"dtype": "video", "shape": (64, 96, 3), "names": ["height", "width", "channels"]}}
    features["action"] = {"dtype": "float32", "shape": (2,), "names": ["left", "seed"]}
    recorded = LeRobotDataset.create("local/real", fps=7, features=features, root=tmp_path / "real")
    for frame, action in zip(moving_square(10), np.zeros((10, 2), np.float32)):
        recorded.add_frame({camera: frame, "action": action, "task": "move"})
    recorded.save_episode()
    recorded.finalize()
    info, real = (json.loads((root / "meta" / "info.json").read_text()) for root in (made, tmp_path / "real"))
    assert info["features"]["action"] == real["features"]["action"]
    info["features"][camera] = real["features"][camera]  # the recorded video's codec is lerobot's own choice
    (made / "meta" / "info.json").write_text(json.dumps(info))
    aggregate_datasets(["a", "b"], "local/merged", roots=[tmp_path / "real", made], aggr_root=tmp_path / "merged")
    check(LeRobotDataset("local/merged", root=tmp_path / "merged", video_backend="pyav"), 10)
