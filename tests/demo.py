"""`make demo`: the whole trio on the bundled robot clips, in minutes on a CPU, scored on clips that it never saw.

Prepares tests/data, fine-tunes the temporal layers of tests/tiny_svd on the task (reach the cube, push it to the green
goal), generates from held-out first frames with the base and the fine-tuned model, and compares both with the real
continuation. Everything goes to demo/; run again after a stop, it goes on where it was.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import svd_common as common  # isort: skip
import infer_svd

import numpy as np

TINY, DATA, DEMO = ROOT / "tests" / "tiny_svd", ROOT / "tests" / "data", ROOT / "demo"
TRAINING = "--num_frames 8 --width 96 --height 64 --train_batch_size 4 --max_train_steps 300 --learning_rate 5e-4"
TRAINING += " --lr_scheduler cosine --lr_warmup_steps 20 --use_ema --ema_decay 0.98 --checkpointing_steps 100"
METRICS = {
    "psnr_moving": "PSNR on moving pixels (dB)",
    "motion_ratio": "motion, generated / real",
    "flow_error": "flow error (pixels a frame)",
}


def script(name, *arguments):
    subprocess.run([sys.executable, str(ROOT / name), *map(str, arguments)], check=True)


def generate(model, first_frames, folder):
    """A video for each held-out first frame, by infer_svd.py: {clip: (T, H, W, 3)}."""
    folder.mkdir(parents=True, exist_ok=True)
    videos = {}
    for name, image in first_frames.items():
        target = folder / f"{name}.mp4"
        if not target.exists():
            infer_svd.main(["--model_dir", str(model), "--input_image", str(image), "--output_video", str(target)])
        videos[name] = common.read_video(target)
    return videos


def mean_scores(videos, real):
    scores = [common.video_metrics(videos[name], real[name]) for name in real]
    return {metric: float(np.mean([score[metric] for score in scores])) for metric in METRICS}


def main():
    started = time.time()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local
    script("prepare_dataset.py", "--video_dir", DATA / "robot_push", "--output_dir", DEMO / "dataset")
    script("prepare_dataset.py", "--video_dir", DATA / "robot_push_heldout", "--output_dir", DEMO / "heldout")
    model = DEMO / "model"
    if not (model / "model_index.json").exists():
        resume = ["--resume_from_checkpoint", "latest"] if list(model.glob("checkpoint-*")) else []
        script("train_svd.py", "--pretrained_model_name", TINY, "--dataset_dir", DEMO / "dataset",
            "--output_dir", model, *TRAINING.split(), *resume)  # fmt: skip

    clips = {f"heldout{i}": clip for i, clip in enumerate(common.list_clips(DEMO / "heldout"))}
    real = {name: np.stack([common.read_frame(path) for path in clip["frames"]]) for name, clip in clips.items()}
    first_frames = {name: clip["frames"][0] for name, clip in clips.items()}
    fine_tuned = generate(model, first_frames, DEMO / "fine_tuned")
    base = generate(TINY, first_frames, DEMO / "base")
    copied = {name: np.repeat(frames[:1], len(frames), axis=0) for name, frames in real.items()}

    rows = {"first frame copied": copied, "base model": base, "fine-tuned": fine_tuned}
    table = {label: mean_scores(videos, real) for label, videos in rows.items()}
    print(f"\n{len(real)} held-out clips, frames 1 to 7" + "".join(f"  {text:>28s}" for text in METRICS.values()))
    for label, scores in table.items():
        print(f"{label:32s}" + "".join(f"  {scores[metric]:28.2f}" for metric in METRICS))
    (DEMO / "metrics.json").write_text(json.dumps(table, indent=1))

    sheets = []
    for name in list(real)[:4]:
        columns = {"real": real[name], "generated (fine-tuned)": fine_tuned[name], "generated (base)": base[name]}
        sheets.append(common.side_by_side(columns, min_width=288))
        common.write_video(DEMO / f"{name}_side_by_side.mp4", sheets[-1], 4)
    film = np.concatenate(sheets[:2], axis=1)
    common.write_video(DEMO / "sample.mp4", np.concatenate([film, film]), 4)  # twice: two seconds are short
    write_contact_sheet(real, fine_tuned, base)
    print(f"demo/ is ready after {time.time() - started:.0f} s: look at demo/sample.mp4 and demo/contact_sheet.png")


def write_contact_sheet(real, fine_tuned, base):
    """demo/contact_sheet.png: for four clips, a row of frames each of the real, the fine-tuned and the base video."""
    rows = []
    for name in list(real)[:4]:
        for label, videos in (("real", real), ("fine-tuned", fine_tuned), ("base", base)):
            rows.append(common.label_frames([np.concatenate(list(videos[name]), axis=1)], f"{label}, {name}")[0])
    (DEMO / "contact_sheet.png").write_bytes(common.encode_png(np.concatenate(rows)))


if __name__ == "__main__":
    main()
