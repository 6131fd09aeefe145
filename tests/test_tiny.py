"""`make tiny` as it is written, every stage of it, with a few clips and two steps: so that it cannot rot."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from svd_parts.weights import PARTS

pytest.importorskip("pybullet")

# Takes the place of Python in make_tiny.sh: the same commands, with small numbers after theirs.
SMALL = """
import runpy, sys
sys.argv = sys.argv[1:]
few = "10" if "reach" in sys.argv else "2"  # a twentieth of the reach episodes is held out
sys.argv += {"render.py": ["--episodes", few, "--workers", "2"], "make_tiny.py": ["--steps", "2", "--push_train", "1"],
    "train_svd.py": ["--max_train_steps", "2", "--lr_warmup_steps", "1"]}.get(sys.argv[0].split("/")[-1], [])
sys.path.insert(0, ".")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_make_tiny_runs_as_written(tmp_path):
    shutil.copytree(ROOT / "tests" / "tiny", tmp_path / "tests" / "tiny")
    for script in ("prepare_dataset.py", "train_svd.py", "svd_common.py"):
        shutil.copy(ROOT / script, tmp_path)
    shutil.copytree(ROOT / "svd_parts", tmp_path / "svd_parts")
    (tmp_path / "small.py").write_text(SMALL)
    done = subprocess.run(["sh", "tests/tiny/make_tiny.sh"], cwd=tmp_path, timeout=500, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHON": f"{sys.executable} small.py"})  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    model = tmp_path / done.stdout.splitlines()[-1].split()[0]
    assert all((model / part).is_dir() for part in PARTS) and (model / "model_index.json").is_file()
