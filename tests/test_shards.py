"""One set of generated clips, made by several processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SIZE, TINY, Launched, moving_square, run, write_clip

import infer_svd
import svd_common as common
from svd_parts.clip_set import ClipSet
from svd_parts.files import Shard, UserError, parse_shard
from svd_parts.lora import check_adapters
from svd_parts.shortcuts import move_to_device

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    root = tmp_path_factory.mktemp("real")
    for seed in range(4):
        write_clip(root / f"clip{seed}", moving_square(8, seed=seed))
    write_clip(root / "bad", moving_square(8))
    (root / "bad" / "00000.png").write_bytes(b"no image")
    return root


def command(real, output, *more):
    return ["--model_dir", TINY, "--input_image", real, "--output_video", output, *SIZE, "--num_inference_steps", 1,
        "--num_videos_per_image", 2, "--reference", real, "--compare_with", TINY, *more]  # fmt: skip


def contents(folder):
    """{file: bytes} of a set; of JSON, without what no two runs share: the time it took, and where it lies."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and ".infer" not in path.parts:
            found[name] = path.read_bytes()
        if path.name == "metadata.jsonl":
            records = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{**record, "seconds": 0, "output_video": ""} for record in records]
    return found


@pytest.fixture(scope="module")
def alone(real, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "clips"
    run("infer_svd.py", *command(real, output), ok=False)
    return contents(output)


def test_a_launcher_s_two_processes_make_what_one_makes(real, alone, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", ROOT / "infer_svd.py"]
    done = subprocess.run([*map(str, [*torchrun, *command(real, tmp_path / "clips")])], text=True, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert done.returncode == 1 and done.stdout.count("not a readable image") == 2  # at the start of both
    assert done.stdout.count("left out: 1 image, named at the start") == 2
    assert "real clips, 95 % intervals" in done.stdout  # whoever was last has judged
    assert contents(tmp_path / "clips") == alone
    assert len(alone["metadata.jsonl"]) == 8 and "metrics.json" in alone


def test_a_killed_part_of_three_goes_on_and_the_last_to_end_writes_all(real, alone, tmp_path):
    output = tmp_path / "clips"
    killed = Launched("infer_svd.py", *command(real, output, "--shard", "0/3"))
    deadline = time.time() + 120
    while killed.poll() is None and time.time() < deadline and not list(output.glob(".infer/*.json")):
        time.sleep(0.005)
    killed.send_signal(signal.SIGSTOP)  # else it may be done before the next process has looked
    refused = run("infer_svd.py", *command(real, output), ok=False).stdout
    assert "another infer_svd.py is writing here" in refused
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    for part in (1, 2):
        run("infer_svd.py", *command(real, output, "--shard", f"{part}/3"), ok=False)
    assert not (output / "metrics.json").exists() and len(contents(output)["metadata.jsonl"]) < 8
    run("infer_svd.py", *command(real, output, "--shard", "0/3"), ok=False)
    assert contents(output) == alone
    assert not list(output.rglob(".making*/*"))


def test_wrong_shards_are_refused(real, tmp_path):
    for text in ("3/2", "1", "a/b", "0/0"):
        done = run("infer_svd.py", *command(real, tmp_path / "clips", "--shard", text), ok=False)
        assert f"--shard must be I/N with I at most N, as in 0/4, got {text}" in done.stdout
    image = next(real.glob("*/*.png"))
    done = run("infer_svd.py", "--model_dir", TINY, "--input_image", image, "--output_video", tmp_path / "one.mp4",
        "--shard", "0/2", ok=False)  # fmt: skip
    assert "one clip cannot be shared" in done.stdout


def test_names_are_spread_over_the_parts():
    parts = [Shard(0, 4).holds(f"clip_{i}_seed0") for i in range(2000)]
    assert 400 < sum(parts) < 600
    assert parse_shard("4/4") == parse_shard("0/4") == (0, 4)


def test_parts_that_work_and_end_beside_each_other(real, tmp_path, monkeypatch):
    parts = []
    for shard in ("0/2", "1/2", "0/3"):
        args = infer_svd.parse_args(list(map(str, [*command(real, tmp_path / "clips"), "--shard", shard])))
        model = check_adapters(infer_svd.find_model(args.model_dir, args), args)
        settings = infer_svd.resolve(args, model.base, model.settings)
        images, _ = infer_svd.list_images(args)
        parts.append((ClipSet(settings, model, tmp_path / "clips", images), settings))
    (busy, busy_settings), (planning, settings), (odd, odd_settings) = parts
    walk, wanted = os.walk, len(busy.todo)

    def slow_walk(folder):
        yield from list(walk(folder))  # what is listed is old by now
        if len(busy.todo) == wanted:  # so the clip is made while the set is read
            busy.save(busy.todo.pop(), busy_settings, moving_square(1)[0], moving_square(8))

    with busy.locked(busy_settings):
        with pytest.raises(UserError, match="another infer_svd.py"), odd.locked(odd_settings):
            pass
        monkeypatch.setattr(os, "walk", slow_walk)
        planning.plan(settings)  # which takes it for no stranger
        assert not busy.finish(busy_settings)
    left = tmp_path / "clips" / ".metadata.jsonl.0.part"  # as a part leaves it that is killed while it ends
    left.touch()
    assert len((tmp_path / "clips" / "metadata.jsonl").read_text().splitlines()) == 1 and planning.todo
    with planning.locked(settings):
        assert planning.finish(settings)  # the last: its clips have failed, and it judges what there is
    assert not left.exists()


def test_a_small_card_s_process_keeps_to_its_own_gpu(monkeypatch):
    pipe, _ = common.load_pipeline(TINY, torch.float32)
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.get_device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)  # as make_all sets it from LOCAL_RANK
    move_to_device(pipe, True, "cuda")
    assert str(pipe._offload_device) == "cuda:3"
