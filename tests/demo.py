"""`make demo`: the whole trio on the bundled robot clips, in minutes on a CPU, scored on clips that it never saw.

Prepares tests/data, fine-tunes the temporal layers of tests/tiny_svd on the task (reach the cube, push it to the green
goal), generates from held-out first frames with the fine-tuned and the base model, and compares both with the real
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
import numpy as np
from PIL import Image

from svd_parts.dataset import list_clips

TINY, DATA, DEMO = ROOT / "tests" / "tiny_svd", ROOT / "tests" / "data", ROOT / "demo"
TRAINING = "--num_frames 8 --width 96 --height 64 --train_batch_size 4 --max_train_steps 400 --learning_rate 2e-3"
TRAINING += " --P_mean 1.5 --lr_scheduler cosine --lr_warmup_steps 30 --use_ema --ema_decay 0.98"
TRAINING += " --checkpointing_steps 100 --gradient_checkpointing none"
TRAINING += " --num_validation_videos 2 --validation_steps 200"  # for its page; they change nothing of the weights
FPS = 4  # of the bundled clips
SHOWN = (0, 2)  # the held-out clips in sample.mp4


def script(name, *arguments):
    """Runs one of the three scripts as a user does; everything that they need is local."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    print("\n$ python", name, *arguments, flush=True)
    status = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode
    if status:
        sys.exit(status)


def main():
    started = time.time()
    script("prepare_dataset.py", "--video_dir", DATA / "robot_push", "--output_dir", DEMO / "dataset")
    script("prepare_dataset.py", "--video_dir", DATA / "robot_push_heldout", "--output_dir", DEMO / "heldout")
    model = DEMO / "model"
    if not (model / "model_index.json").exists():
        resume = ["--resume_from_checkpoint", "latest"] if model.exists() else []
        script("train_svd.py", "--pretrained_model_name", TINY, "--dataset_dir", DEMO / "dataset",
            "--output_dir", model, "--validation_dir", DEMO / "heldout", *TRAINING.split(), *resume)  # fmt: skip
    script("infer_svd.py", "--model_dir", model, "--input_image", DEMO / "heldout",
        "--output_video", DEMO / "generated", "--compare_with", TINY, "--reference", DEMO / "heldout",
        "--num_inference_steps", 3, "--max_guidance_scale", 1.0)  # fmt: skip

    clips = [read_clip(clip) for clip in list_clips(DEMO / "heldout")]
    write_sample(DEMO / "sample", [clips[i] for i in SHOWN])
    write_contact_sheet(DEMO / "contact_sheet.png", clips[:4])
    scores = json.loads((DEMO / "generated" / "metrics.json").read_text())["mean"]
    moving = [f"{label} {table['psnr_moving']['mean']:.1f}" for label, table in scores.items()]
    print(f"\nPSNR on moving pixels, dB: {', '.join(moving)}. Done in {time.time() - started:.0f} s.")
    print("Look at demo/sample.mp4, demo/contact_sheet.png, and the pages demo/generated/index.html (the clips, beside")
    print("the real ones and the base's) and demo/model/index.html (the training).")


def read_clip(clip):
    """{"real", "generated", "base before fine-tuning": (T, H, W, 3) uint8} of one held-out clip."""
    videos = {"real": np.stack([common.read_image(frame) for frame in clip["frames"]])}
    for label, folder in (("generated", ""), ("base before fine-tuning", ".compare")):
        videos[label] = common.read_video(next((DEMO / "generated" / folder).glob(f"{clip['directory']}*.mp4")))
    return videos


def write_sample(path, clips):
    """The videos of these clips side by side, enlarged, the end held for a second: as an mp4 of three rounds, which
    any player shows, and as a webp, which a README shows moving at first sight."""
    film = np.concatenate([common.side_by_side(videos, min_width=384) for videos in clips], axis=1)  # (T, H, W, 3)
    film = np.concatenate([film, film[-1:].repeat(FPS, axis=0)])
    common.write_video(path.with_suffix(".mp4"), np.tile(film, (3, 1, 1, 1)), FPS)
    frames = [Image.fromarray(frame) for frame in film]
    more = {"append_images": frames[1:], "duration": 1000 // FPS, "loop": 0, "quality": 70, "method": 6}
    frames[0].save(path.with_suffix(".webp"), save_all=True, **more)


def write_contact_sheet(path, clips):
    """A picture: the frames of the real, the fine-tuned and the base video of each clip in a row each."""
    rows = [(label, np.concatenate(list(video), axis=1)) for videos in clips for label, video in videos.items()]
    path.write_bytes(common.encode_png(np.concatenate([common.label_frames([row], label)[0] for label, row in rows])))


if __name__ == "__main__":
    main()
