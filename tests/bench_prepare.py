"""How fast prepare_dataset.py is beside ffmpeg itself and a plain OpenCV loop: alternating runs, ratio of medians.

    python tests/bench_prepare.py [--rounds 5] [--videos FOLDER] [--work /dev/shm]

ffmpeg is imageio-ffmpeg's binary, one process a core. Without --videos the clips are made here: zooms into the
Mandelbrot set, whose PNG files are as large, and as dear to encode, as those of real video enlarged to 720p. With isal
installed, preparing is measured without it and with it.
"""

import argparse
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import imageio_ffmpeg

ROOT = Path(__file__).resolve().parents[1]
FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
SCENE = "mandelbrot=s={}:r=25:start_scale={}:end_scale=0.01:end_pts=100"


def make_videos(folder, count, size, seconds):
    folder.mkdir(parents=True)
    for number in range(count):
        scene = SCENE.format(size, 2 + 0.1 * number)
        width, height = map(int, size.split("x"))
        rate = str(width * height * 6)  # bits a second, 5.5 M at 720p: as cameras write, or decoding the noise is all
        options = ["-c:v", "libx264", "-preset", "veryfast", "-b:v", rate, "-pix_fmt", "yuv420p"]
        command = [FFMPEG, "-v", "error", "-f", "lavfi", "-t", str(seconds), "-i", scene, *options]
        command += [folder / f"{number:03d}.mp4"]
        subprocess.run(command, check=True)
    return folder


def ours(videos, out, size, with_isal=False):
    command = [sys.executable, ROOT / "prepare_dataset.py", "--video_dir", videos, "--output_dir", out]
    command += ["--width", str(size[0]), "--height", str(size[1])] if size else []
    with tempfile.TemporaryDirectory() as hidden:  # a module of that name which cannot be imported hides the real one
        Path(hidden, "isal.py").write_text("raise ImportError")
        path = {} if with_isal else {"PYTHONPATH": os.pathsep.join([hidden, os.environ.get("PYTHONPATH", "")])}
        subprocess.run(list(map(str, command)), check=True, env={**os.environ, **path},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip


def ffmpeg(videos, out, size, *encoder):
    scale = (
        "scale={0}:{1}:force_original_aspect_ratio=increase:flags=area,crop={0}:{1}".format(*size) if size else "null"
    )

    def one(path):
        (out / path.stem).mkdir(parents=True)
        command = [FFMPEG, "-nostdin", "-v", "error", "-i", path, "-vf", scale, *encoder, out / path.stem / "%05d.png"]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(one, sorted(videos.iterdir())))


def opencv(videos, out, size):
    for path in sorted(videos.iterdir()):
        (out / path.stem).mkdir(parents=True)
        capture, number = cv2.VideoCapture(str(path)), 0
        while True:
            ok, frame = capture.read()
            if not ok:
                break
            if size:
                scale = max(size[0] / frame.shape[1], size[1] / frame.shape[0])
                frame = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)[: size[1], : size[0]]
            cv2.imwrite(str(out / path.stem / f"{number:05d}.png"), frame)
            number += 1


CONTENDERS = {
    "ours": ours,
    "ours with isal": lambda *a: ours(*a, with_isal=True),
    "ffmpeg tuned": lambda *a: ffmpeg(*a, "-compression_level", "1", "-pred", "up"),
    "ffmpeg plain": ffmpeg,
    "OpenCV loop": opencv,
}


def compare(title, videos, size, work, rounds, skip=()):
    """Prints milliseconds a frame of each contender, and how many times ours is faster."""
    skip = [*skip, *([] if importlib.util.find_spec("isal") else ["ours with isal"])]
    contenders = {name: run for name, run in CONTENDERS.items() if name not in skip}
    seconds, cpu, frames = {name: [] for name in contenders}, {name: [] for name in contenders}, {}
    for _ in range(rounds):
        for name, run in contenders.items():
            out = work / "out"
            shutil.rmtree(out, ignore_errors=True)
            start, cpu_start = time.perf_counter(), sum(os.times()[:4])
            run(videos, out, size)
            seconds[name].append(time.perf_counter() - start)
            cpu[name].append(sum(os.times()[:4]) - cpu_start)
            frames[name] = sum(1 for _ in out.rglob("*.png"))
    assert len(set(frames.values())) == 1, frames
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{title}: {frames['ours']} frames")
    for name, value in medians.items():
        cores = 1000 * statistics.median(cpu[name]) / frames[name]
        ratios = [f"{value / medians[own]:.2f}" for own in contenders if own.startswith("ours")]
        text = "" if name.startswith("ours") else f"ours is {' and '.join(ratios)}x as fast"
        print(f"  {name:14} {1000 * value / frames[name]:7.2f} ms a frame, {cores:6.2f} of a core  {text}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--videos", type=Path, help="a folder of 720p clips of your own")
    parser.add_argument(
        "--work", default=tempfile.gettempdir(), help="where to put frames; /dev/shm leaves the disk out"
    )
    parser.add_argument("--only", help="run the comparisons whose title holds this")
    parser.add_argument("--skip", nargs="*", default=[], help="contenders to leave out")
    args = parser.parse_args()
    print(f"{CORES} cores, OpenCV {cv2.__version__}, ffmpeg {imageio_ffmpeg.get_ffmpeg_version()}", flush=True)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        work = Path(work)
        clips = args.videos or make_videos(work / "clips", 16, "1280x720", 4)
        one = make_videos(work / "one", 1, "1280x720", 20)
        small = make_videos(work / "small", 64, "256x256", 3)
        for title, videos, size in (
            ("16 clips, native 720p", clips, None),
            ("16 clips, to 512x320", clips, (512, 320)),
            ("one long video, 720p", one, None),
            ("one long video, to 512x320", one, (512, 320)),
            ("64 small robot videos", small, None),
        ):
            if not args.only or args.only in title:
                compare(title, videos, size, work, args.rounds, args.skip)


if __name__ == "__main__":
    main()
