"""`make proof` with two clips and two steps: the whole chain runs, and its judge tells a push from none."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY

import svd_common as common
from svd_parts.dataset import list_clips

pytest.importorskip("pybullet")
sys.path.insert(0, str(ROOT / "tests" / "proof"))

import inside  # isort: skip

PUSHES = ROOT / "tests" / "data" / "robot_push" / "videos" / "chunk-000" / "observation.images.front"
FEW = "--new 2 --more 2 --aimless 2 --videos 11 --layouts 2 --seeds 1 --labellers 1 --label_steps 2 --policy_steps 2"
FEW += " --processes 1"


@pytest.mark.slow
def test_the_proof_runs_whole(tmp_path):
    command = [sys.executable, "tests/proof/proof.py", "--output_dir", tmp_path, "--model_dir", TINY, *FEW.split()]
    done = subprocess.run(command, cwd=ROOT, timeout=900, text=True, env={**os.environ, "TQDM_DISABLE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "the judge: true path 100.0%, standing still 0.0%" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["arms"]) == list("abcdefghi")
    assert all(row["fingertip_error_cm"][0] > 0 for row in results["arms"].values())
    assert {"b - a", "b - c", "h - g", "i - g"} <= set(results["differences"])
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("clips.png", "pushes.png"))
    assert (tmp_path / "table.md").read_text().count("\n| ") == 9


def test_the_colour_test_tells_the_end_of_a_push_from_its_start():
    clips = np.stack([common.read_video(video) for video in sorted(PUSHES.glob("*.mp4"))[:40]])
    assert inside.on_disc(clips[:, 0], clips[:, -1]).mean() > 0.9
    assert not inside.on_disc(clips[:, 0], clips[:, 0]).any()


def test_a_judge_that_is_always_right_correlates_fully_and_is_no_optimist():
    true = np.random.default_rng(0).random((6, 40)) < np.linspace(0.1, 0.9, 6)[:, None]
    same = inside.compare(true, true, draws=200)
    assert same["spearman"]["mean"] == pytest.approx(1) and same["optimism"]["mean"] == 0
    hopeful = inside.compare(true | True, true, draws=200)
    assert hopeful["optimism"]["mean"] == pytest.approx(1 - true.mean()) and np.isnan(hopeful["pearson"]["mean"])
    assert inside.rank([3, 1, 3]).tolist() == [1.5, 0, 1.5]


def test_proposed_paths_begin_where_the_answers_begin():
    answers = np.random.default_rng(0).normal(size=(3, 4, 8, 3))
    answers[:, :, 0] = 0.5
    paths = inside.propose(answers, count=2)
    assert paths.shape == (8, 8, 3) and np.allclose(paths[:, 0], 0.5)


def test_commands_are_a_dataset_that_inference_reads(tmp_path):
    paths = np.arange(48.0).reshape(2, 8, 3)
    inside.write_commands(tmp_path, np.zeros((2, 64, 96, 3), np.uint8), paths)
    assert [len(clip["frames"]) for clip in list_clips(tmp_path)] == [1, 1]
    assert np.load(tmp_path / "clip_000001" / "actions.npy").tolist() == paths[1].tolist()
