"""`make proof` with two clips and two steps: the whole chain runs, and its judge tells a push from none."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

pytest.importorskip("pybullet")

FEW = "--new 2 --more 2 --aimless 2 --videos 11 --layouts 2 --seeds 1 --labellers 1 --label_steps 2 --policy_steps 2"


@pytest.mark.slow
def test_the_proof_runs_whole(tmp_path):
    command = [sys.executable, "tests/proof/proof.py", "--output_dir", tmp_path, "--model_dir", TINY, *FEW.split()]
    done = subprocess.run(command, cwd=ROOT, timeout=500, text=True, env={**os.environ, "TQDM_DISABLE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "the judge: true path 100.0%, standing still 0.0%" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["arms"]) == list("abcdefghi")
    assert all(row["fingertip_error_cm"] > 0 for row in results["arms"].values())
    assert {"b - a", "b - c", "h - g", "i - g"} <= set(results["differences"])
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("clips.png", "pushes.png"))
    assert (tmp_path / "table.md").read_text().count("\n| ") == 9
