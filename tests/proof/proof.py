"""`make proof`: does generated video help a policy? The protocol, and what was tried, is in README.md here.

Fine-tunes as `make demo` does (or takes its model), generates from new first frames with the fine-tuned and the base
model, labels the videos by inverse dynamics, trains policies with and without them, and lets PyBullet judge. Everything
goes to proof/: table.md, results.json, clips.png, pushes.png. Run again after a stop, it goes on.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import clips  # isort: skip  (first: it finds svd_common, which quiets OpenCV)
import cv2
import learn
import numpy as np

import svd_common as common
from svd_parts.dataset import list_clips
from svd_parts.files import write_file

TINY, BUNDLED = clips.ROOT / "tests" / "tiny_svd", clips.ROOT / "tests" / "data" / "robot_push"
GENERATING = "--output_format frames --num_inference_steps 4 --max_guidance_scale 1.0 --fps 4 --motion_bucket_id 126"
LABELLED, SEEDS = 10, {"new": 7001, "more": 7006, "aimless": 7005, "judged": 7102, "development": 7003}
ARMS = {
    "a": "10 real clips",
    "b": "+ clips of the fine-tuned model, pseudo-labelled",
    "c": "+ clips of the base model, pseudo-labelled",
    "d": "+ first frames held still, pseudo-labelled",
    "e": "+ real video of the same layouts, pseudo-labelled",
    "f": "+ the same layouts with true paths",
    "g": "+ the bundled videos, pseudo-labelled, nothing generated",
    "h": "+ (g) and (b): the bundled videos and the generated clips",
    "i": "+ (g), (b) and clips generated for more new scenes",
}
DIFFERENCES = ("hg", "ig", "ba", "bc", "bd", "bg", "ea", "fa")
COLORS = {"true": (20, 200, 60), "a": (235, 150, 20), "b": (230, 20, 40), "c": (40, 80, 235), "f": (150, 60, 200)}


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--output_dir", type=Path, default=clips.ROOT / "proof")
    add("--model_dir", type=Path, default=clips.ROOT / "demo" / "model", help="fine-tuned (default: make demo's)")
    add("--judge_on", choices=["judged", "development"], default="judged", help="development: to choose something by")
    add("--arms", default="".join(ARMS), help="which, e.g. abc")
    add("--new", type=int, default=100, help="clips to generate")
    add("--videos", type=int, default=192, help="bundled clips, the labelled ones included")
    add("--more", type=int, default=300, help="clips to generate for arm i")
    add("--aimless", type=int, default=320, help="clips of aimless motion that the inverse dynamics learns from too")
    add("--layouts", type=int, default=128, help="to judge on")
    add("--seeds", type=int, default=5, help="policies of an arm")
    add("--labellers", type=int, default=4, help="inverse dynamics networks, averaged")
    add("--label_steps", type=int, default=400)
    add("--policy_steps", type=int, default=400)
    return parser


def generate(model, frames, output):
    """Starts infer_svd.py as a user does."""
    command = [sys.executable, clips.ROOT / "infer_svd.py", "--model_dir", model, "--input_image", frames,
        "--output_video", output, *GENERATING.split()]  # fmt: skip
    threads = str(max(1, (os.cpu_count() or 2) // 2))  # two of them run at a time
    return subprocess.Popen(command, env={"TQDM_DISABLE": "1", **os.environ, "OMP_NUM_THREADS": threads})


def read_generated(folder):
    return np.stack([[common.read_image(f) for f in clip["frames"]] for clip in list_clips(folder)])


# What is measured


def label_quality(labels, true):
    """Error of displacements (N, T - 1, 3) against the true, cm: all frames, the last; ratio of the steps' lengths."""
    error = np.linalg.norm(labels - true, axis=2) * 100
    length = [np.linalg.norm(np.diff(x, axis=1, prepend=0), axis=2).mean() for x in (labels, true)]
    return {"label_error_cm": error.mean(), "last_cm": error[:, -1].mean(), "action_ratio": length[0] / length[1]}


def bootstrap(values, draws=10000):
    """(seeds, layouts) of each arm -> means (draws,), the same seeds and layouts drawn for every arm."""
    rng = np.random.default_rng(0)
    seeds, layouts = next(iter(values.values())).shape
    s, n = rng.integers(0, seeds, (draws, seeds)), rng.integers(0, layouts, (draws, layouts))
    return {arm: v[s[:, :, None], n[:, None, :]].mean((1, 2)) for arm, v in values.items()}


def write_table(results, path):
    head = "| arm | success | fingertip error | pseudo-label error | actions, labelled / true |"
    lines = [head, "|---|---|---|---|---|"]
    for arm, r in results["arms"].items():
        low, high = (100 * x for x in r["success_interval"])
        label = [f"{r['label_error_cm']:.1f} cm", f"{r['action_ratio']:.2f}"] if "label_error_cm" in r else ["", ""]
        success = f"{100 * r['success']:.1f} % ({low:.1f} to {high:.1f})"
        lines.append(f"| {arm}: {ARMS[arm]} | {success} | {r['fingertip_error_cm']:.1f} cm | {' | '.join(label)} |")
    for name, r in results["differences"].items():
        lines += ["", f"{name}: {100 * r['mean']:+.1f} points ({100 * r['low']:+.1f} to {100 * r['high']:+.1f})"]
    for name, r in results["ratios"].items():
        lines += ["", f"{name}: {100 * r['mean']:.0f} % ({100 * r['low']:.0f} to {100 * r['high']:.0f})"]
    alone = results["demonstrations_alone"]
    lines += ["", "Label error with the 10 demonstrations alone, without aimless motion: "
        + ", ".join(f"{arm} {r['label_error_cm']:.1f} cm" for arm, r in alone.items())]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")
    print("\n" + path.read_text())


# Pictures


def draw_path(frame, path, color):
    points = np.round(clips.to_pixels(path, *frame.shape[1::-1]) * 16).astype(np.int32)
    cv2.polylines(frame, [points], False, color, 2, cv2.LINE_AA, 4)
    for point in points:
        cv2.circle(frame, tuple(map(int, point)), 48, color, -1, cv2.LINE_AA, 4)


def write_pushes(path, first_frames, answers, seed, layouts=4):
    """A row a layout: the first frame with the true path and the arms', then where each of them leaves the cube."""
    rows = []
    for i in range(min(layouts, len(first_frames))):
        cells = {"the first frame": cv2.resize(first_frames[i], (288, 192), interpolation=cv2.INTER_CUBIC)}
        for arm, paths in answers.items():
            draw_path(cells["the first frame"], paths[i], COLORS[arm])
            cells[arm] = clips.after_playing(seed, i, paths[i])
            cv2.rectangle(cells[arm], (0, 0), (287, 191), COLORS[arm], 3)
        rows.append(np.concatenate([common.label_frames([frame], name)[0] for name, frame in cells.items()], 1))
    path.write_bytes(common.encode_png(np.concatenate(rows)))


def write_clips(path, videos, labels, paths, count=3):
    """New layouts: each kind of video, where its pseudo-labels put the fingertip (dots) and where it really is (+)."""
    rows = []
    for i in range(min(count, len(paths))):
        for name, video in videos.items():
            cells = []
            for t, frame in enumerate(video[i]):
                frame = cv2.resize(frame, (192, 128), interpolation=cv2.INTER_CUBIC)
                places = [paths[i, t], paths[i, 0] + (labels[name][i, t - 1] if t else 0)]
                true, label = (tuple(map(int, x)) for x in np.round(clips.to_pixels(np.stack(places), 192, 128)))
                cv2.drawMarker(frame, true, COLORS["true"], cv2.MARKER_CROSS, 9, 2)
                cv2.circle(frame, label, 3, COLORS["b"], -1, cv2.LINE_AA)
                cells.append(frame)
            rows.append(common.label_frames([np.concatenate(cells, 1)], name)[0])
    path.write_bytes(common.encode_png(np.concatenate(rows)))


def main(args):
    started, out, seed, took = time.time(), args.output_dir, SEEDS[args.judge_on], {}

    def done(stage):
        cpu = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        took[stage] = {"wall_s": round(time.time() - started), "cpu_s": round(cpu)}
        print(f"\n--- {stage}: {took[stage]['wall_s']} s so far, {took[stage]['cpu_s']} s of CPU", flush=True)

    if not (args.model_dir / "model_index.json").exists():
        cores = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}  # it runs alone; `learn` has set it to 1
        subprocess.run([sys.executable, str(clips.ROOT / "tests" / "demo.py")], env=cores, check=True)
    done("fine-tuned")

    # Layouts: true clips, true paths, first frames
    clips.make_clips(out / "bundled", 1, args.videos, cameras=())
    clips.make_clips(out / "new", SEEDS["new"], args.new)
    clips.make_clips(out / "more", SEEDS["more"], args.more, pictures=1)
    clips.make_clips(out / "aimless", SEEDS["aimless"], args.aimless, task="reach")
    clips.make_clips(out / args.judge_on, seed, args.layouts, pictures=1)
    paths = {name: clips.read_paths(out / name, n) for name, n in
        (("bundled", args.videos), ("new", args.new), ("more", args.more), ("aimless", args.aimless),
        (args.judge_on, args.layouts))}  # fmt: skip
    bundled, new = clips.read_clips(BUNDLED, args.videos), clips.read_clips(out / "new", args.new)
    test = clips.read_clips(out / args.judge_on, args.layouts)[:, 0], paths[args.judge_on][:, 0]
    aimless, more = clips.read_clips(out / "aimless", args.aimless), clips.read_clips(out / "more", args.more)[:, :1]
    first_frames = {"first_frames": new, "more_first_frames": more}
    for name, videos in first_frames.items():
        (out / name).mkdir(exist_ok=True)
        for i, clip in enumerate(videos):
            write_file(out / name / f"episode_{i:06d}.png", common.encode_png(clip[0]))
    done("rendered")

    # Generated video
    models = {"b": args.model_dir, "c": TINY}
    running = [generate(model, out / "first_frames", out / f"generated_{arm}") for arm, model in models.items()]
    if any([process.wait() for process in running]):
        sys.exit("error: infer_svd.py failed, see above")
    if generate(args.model_dir, out / "more_first_frames", out / "generated_more").wait():
        sys.exit("error: infer_svd.py failed, see above")
    done("generated")

    # Pseudo-labels
    videos = {arm: read_generated(out / f"generated_{arm}") for arm in models}
    videos |= {"d": np.repeat(new[:, :1], clips.FRAMES, 1), "e": new, "g": bundled[LABELLED:]}
    videos["more"] = read_generated(out / "generated_more")
    demonstrations = bundled[:LABELLED], paths["bundled"][:LABELLED]
    sources = [demonstrations, (aimless, paths["aimless"])]
    options = {"videos": list(videos.values()), "steps": args.label_steps}
    labels = dict(zip(videos, learn.pseudo_label(args.labellers, sources=sources, **options)))
    alone = dict(zip(videos, learn.pseudo_label(args.labellers, sources=sources[:1], **options)))
    done("labelled")

    # Policies
    moved = {name: p[:, 1:] - p[:, :1] for name, p in paths.items()}

    def samples(name, labels, chosen=slice(None)):
        frames = bundled if name == "bundled" else new
        return frames[chosen, 0], paths[name][chosen, 0], labels

    rest = slice(LABELLED, None)
    added = {arm: samples("new", labels[arm]) for arm in "bcde"} | {"g": samples("bundled", labels["g"], rest)}
    added |= {"a": None, "f": samples("new", moved["new"])}
    added["h"] = [np.concatenate(both) for both in zip(added["g"], added["b"])]
    further = more[:, 0], paths["more"][:, 0], labels["more"]
    added["i"] = [np.concatenate(both) for both in zip(added["h"], further)]
    real = samples("bundled", moved["bundled"][:LABELLED], slice(LABELLED))
    jobs = [(arm, policy) for arm in args.arms for policy in range(args.seeds)]
    train = partial(learn.train_policy, real=real, steps=args.policy_steps, test=test)
    answers = np.stack(learn.in_processes(train, [(policy, added[arm]) for arm, policy in jobs]))
    answers = dict(zip(args.arms, answers.reshape(len(args.arms), args.seeds, *answers.shape[1:])))
    done("trained")

    # Judge: the arms, and itself with the true path and with standing still
    true = paths[args.judge_on]
    control = np.stack([true, np.repeat(true[:, :1], clips.FRAMES, 1)])
    success = clips.judge(np.concatenate([*answers.values(), control]), seed) < clips.DISC
    print(f"\nthe judge: true path {success[-2].mean():.1%}, standing still {success[-1].mean():.1%}")
    success = dict(zip(args.arms, success[:-2].reshape(len(args.arms), args.seeds, args.layouts).astype(float)))
    draws = bootstrap(success)
    results = {"judged_on": args.judge_on, "arms": {}, "differences": {}, "ratios": {}}
    true_moves = {"g": moved["bundled"][rest], **dict.fromkeys("bcde", moved["new"])}
    results["demonstrations_alone"] = {arm: label_quality(alone[arm], true_moves[arm]) for arm in "beg"}
    for arm, answer in answers.items():
        error = np.linalg.norm(answer - true, axis=3)[:, :, 1:].mean() * 100
        row = {"success": success[arm].mean(), "success_interval": np.percentile(draws[arm], [2.5, 97.5]).tolist()}
        row |= {"fingertip_error_cm": error, "success_of_each_seed": success[arm].mean(1).tolist()}
        if arm in true_moves:
            row |= label_quality(labels[arm], true_moves[arm])
        results["arms"][arm] = row
    for pair in DIFFERENCES:
        if set(pair) <= set(args.arms):
            low, high = np.percentile(draws[pair[0]] - draws[pair[1]], [2.5, 97.5])
            mean = success[pair[0]].mean() - success[pair[1]].mean()
            results["differences"][f"{pair[0]} - {pair[1]}"] = {"mean": mean, "low": low, "high": high}
    if set("abe") <= set(args.arms):
        low, high = np.percentile((draws["b"] - draws["a"]) / (draws["e"] - draws["a"]), [2.5, 97.5])
        mean = (success["b"].mean() - success["a"].mean()) / (success["e"].mean() - success["a"].mean())
        results["ratios"]["(b - a) / (e - a)"] = {"mean": mean, "low": low, "high": high}
    done("judged")

    write_clips(out / "clips.png", {"real": new, "fine-tuned": videos["b"], "base": videos["c"]},
        {"real": labels["e"], "fine-tuned": labels["b"], "base": labels["c"]}, paths["new"])  # fmt: skip
    shown = {"true": true} | {arm: answers[arm][0] for arm in "abcf" if arm in answers}
    write_pushes(out / "pushes.png", test[0], shown, seed)
    results["took"] = took
    write_file(out / "results.json", json.dumps(results, indent=1, default=float).encode())
    write_table(results, out / "table.md")
    print(f"Done in {time.time() - started:.0f} s. Look at {out}/table.md, clips.png and pushes.png.")


if __name__ == "__main__":
    main(build_parser().parse_args())
