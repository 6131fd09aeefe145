"""What the tests share: the small real checkpoint, folders of frames, and launching the real scripts."""

import functools
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: the tensors are small, and the threads of a busy machine fight
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import svd_common as common  # isort: skip

import numpy as np
import pytest

TINY = ROOT / "tests" / "tiny_svd"
SIZE = ["--width", "96", "--height", "64", "--num_frames", "8"]


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch  # not for the tests of preparing, which need none

        if not torch.cuda.is_available():
            pytest.skip("no CUDA GPU here")


# Half of a short run is importing torch and diffusers: a server does that once and forks a new process for each run.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["warm"])


@functools.cache
def start_server():
    """Starts it where it finds `warm`: Python leaves out, without a word, what the server cannot import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.path.dirname(__file__), os.pathsep)
        forkserver.ensure_running()


def run_forked(command, output, ignored, environment):
    """What `python SCRIPT ...` does, in a process of the server: stdout and stderr go into the file `output`."""
    assert "warm" in sys.modules
    os.environ.update(environment)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    with open(output, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = command
    sys.path.insert(0, str(ROOT))
    runpy.run_path(command[0], run_name="__main__")


class Launched:
    """A script at work in a process of the server: what the tests need of subprocess.Popen.

    ignored: signals that the process ignores, as under nohup; environment: what it finds there beside ours.
    """

    def __init__(self, script, *arguments, ignored=(), environment=()):
        self.command, self.folder = [str(ROOT / script), *map(str, arguments)], tempfile.TemporaryDirectory()
        self.output = Path(self.folder.name, "output")
        start_server()
        self.process = server.Process(target=run_forked, args=(self.command, str(self.output), ignored, environment))
        self.process.start()

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def wait(self, timeout=500):
        """Ends it where it hangs."""
        self.process.join(timeout)
        self.process.kill()
        self.process.join()
        return self.returncode

    def communicate(self, timeout=500):
        """(stdout and stderr together, None)."""
        self.wait(timeout)
        return self.output.read_text(errors="replace") if self.output.exists() else "", None


def run_together(count, script, *arguments):
    """Runs a script as torchrun does, in `count` processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    known = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        Launched(script, *arguments, environment={**known, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0, output


def run(script, *arguments, ok=True, env=None, **options):
    """Runs a script as a user does; returns the finished process, its stdout and stderr together in `.stdout`."""
    command = [str(ROOT / script), *map(str, arguments)]
    if env or options or script == "prepare_dataset.py":  # that one imports no torch
        done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **(env or {})}, timeout=500, **options)  # fmt: skip
    else:
        process = Launched(script, *arguments)
        output, _ = process.communicate()
        done = subprocess.CompletedProcess(command, process.returncode, output)
    if ok:
        assert done.returncode == 0, done.stdout
    else:
        assert done.returncode != 0, done.stdout
        assert "Traceback" not in done.stdout, done.stdout
    return done


def moving_square(num_frames, width=96, height=64, seed=0):
    """(T, H, W, 3) uint8: a bright square that glides over a textured ground."""
    rng = np.random.default_rng(seed)
    ground = (rng.random((height // 8, width // 8, 3)) * 120).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    frames = []
    for t in range(num_frames):
        frame = ground.copy()
        left = 4 + (t * 6 + 11 * seed) % (width - 24)
        frame[20:40, left : left + 16] = 230 - 20 * (seed % 4)
        frames.append(frame)
    return np.stack(frames)


def write_clip(folder, frames):
    folder.mkdir(parents=True)
    for t, frame in enumerate(frames):
        (folder / f"{t:05d}.png").write_bytes(common.encode_png(frame))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Plain frame folders, without metadata.jsonl: three clips of 10 frames."""
    root = tmp_path_factory.mktemp("dataset")
    for seed in range(3):
        write_clip(root / f"clip{seed}", moving_square(10, seed=seed))
    return root


@pytest.fixture(scope="session")
def trained(dataset, tmp_path_factory):
    """A finished run of train_svd.py with two checkpoints, used by many tests."""
    output = tmp_path_factory.mktemp("run") / "outputs"
    run("train_svd.py", *train_arguments(dataset, output), "--max_train_steps", 6, "--checkpointing_steps", 3)
    return output


def train_arguments(dataset, output, model=TINY):
    return [
        "--pretrained_model_name", model, "--dataset_dir", dataset, "--output_dir", output, *SIZE,
        "--learning_rate", "1e-4", "--gradient_checkpointing", "none", "--logging_steps", "1",
        "--validation_inference_steps", "2",
    ]  # fmt: skip
