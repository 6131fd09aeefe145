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
import inside
import learn
import numpy as np
from intervals import interval
from paths import read_paths

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
    "j": "+ paths that end well inside the action-conditioned model, no labels",
}
DIFFERENCES = "hg ig ba bc bd bg ea fa ja jf jg".split()
OF_LABELS = "new videos aimless label_steps".split()  # the options that labels, and policies, depend on
OF_POLICIES = [*OF_LABELS, *"labellers layouts policy_steps".split()]
COLORS = {"true": (20, 200, 60), "a": (235, 150, 20), "b": (230, 20, 40), "c": (40, 80, 235), "f": (150, 60, 200)}


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--output_dir", type=Path, default=clips.ROOT / "proof")
    add("--model_dir", type=Path, default=clips.ROOT / "demo" / "model", help="fine-tuned (default: make demo's)")
    add("--judge_on", choices=["judged", "development"], default="judged", help="development: to choose something by")
    add("--arms", default="abcdefghi", help="which, e.g. abc")
    add("--new", type=int, default=100, help="clips to generate")
    add("--videos", type=int, default=192, help="bundled clips, the labelled ones included")
    add("--more", type=int, default=300, help="clips to generate for arm i")
    add("--aimless", type=int, default=320, help="clips of aimless motion that the inverse dynamics learns from too")
    add("--layouts", type=int, default=128, help="to judge on")
    add("--seeds", type=int, default=5, help="policies of an arm")
    add("--labellers", type=int, default=5, help="networks, averaged")
    add("--label_steps", type=int, default=1000)
    add("--policy_steps", type=int, default=400)
    add("--action_model", type=Path, default=clips.ROOT / "actions" / "with", help="of make actions, for section 3")
    add("--tries", type=int, default=4, help="paths that are tried for each new layout (arm j)")
    add("--inside", type=int, nargs=2, default=[2, 16], help="policies of an arm and layouts to judge inside the model")
    add("--processes", type=int, default=os.cpu_count(), help="at a time")
    return parser


# The stages


def prepare(args):
    """Renders what is not there yet. Returns ({name: true paths}, {name: videos}); some are of first frames alone."""
    out, front = args.output_dir, ("front",)
    sets = {"bundled": (1, args.videos, None, ()), "new": (SEEDS["new"], args.new, None, front)}
    sets["aimless"] = SEEDS["aimless"], args.aimless, None, front
    if "i" in args.arms:
        sets["more"] = SEEDS["more"], args.more, 1, front
    sets[args.judge_on] = SEEDS[args.judge_on], args.layouts, 1, front
    paths, videos = {}, {}
    for name, (seed, count, pictures, cameras) in sets.items():
        task = "reach" if name == "aimless" else "push"
        clips.make_clips(out / name, seed, count, pictures, cameras, task, args.processes)
        paths[name] = read_paths(out / name, count)
        videos[name] = clips.read_clips(out / name if cameras else BUNDLED, count)
    for name in {"new", "more"} & set(sets):
        (out / f"{name}_first_frames").mkdir(exist_ok=True)
        for i, clip in enumerate(videos[name]):
            write_file(out / f"{name}_first_frames" / f"episode_{i:06d}.png", common.encode_png(clip[0]))
    return paths, videos


def generate(processes, *sets):
    """Starts infer_svd.py as a user does, for each set (model, images, output, further options ...); returns the clips.

    Each set is made in as many parts as there are processes.
    """
    parts = [(*words, "--shard", f"{part}/{processes}") for words in sets for part in range(processes)]
    if any(learn.in_processes(run_infer, parts, processes)):
        sys.exit("error: infer_svd.py failed, see above")
    return [np.stack([[common.read_image(f) for f in clip["frames"]] for clip in list_clips(s[2])]) for s in sets]


def run_infer(words):
    model, images, output, *more = words
    command = [sys.executable, clips.ROOT / "infer_svd.py", "--model_dir", model, "--input_image", images,
        "--output_video", output, *GENERATING.split(), *more]  # fmt: skip
    return subprocess.run(command, env={"TQDM_DISABLE": "1", **os.environ, "OMP_NUM_THREADS": "1"}).returncode


def train_labellers(args, paths, videos, networks, **sets):
    """For `learn.find`."""
    sources = [(videos[name][:count], paths[name][:count]) for name, count in sets.items()]
    work = partial(learn.train_labeller, sources=sources, steps=args.label_steps)
    return keep(args, work, range(networks), f"labellers_{'_'.join(sets)}", OF_LABELS)


def label(labellers, videos, paths):
    """Pseudo-labels: how the fingertip moves from its true start, which a robot knows, (N, T - 1, 3)."""
    return learn.find(labellers, videos)[:, 1:] - paths[:, :1]


def keep(args, work, jobs, name, depends_on):
    options = {key: value for key, value in vars(args).items() if key in depends_on}
    return learn.keep(work, list(jobs), args.processes, args.output_dir / name, options)


def train_and_judge(args, added, real, test):
    """The policies' answers {arm: (seeds, N, 8, 3)} and how far they leave the cube {arm: (seeds, judged layouts)}.

    added: {arm: samples or None}; test: the first frames and starts of the judged layouts, and of any others.
    """
    answers, distances = {}, {}
    for arm in added:
        name = f"{args.judge_on}_{arm}"
        train = partial(learn.train_policy, real=real, steps=args.policy_steps, test=test)
        jobs = [(policy, added[arm]) for policy in range(args.seeds)]
        answers[arm] = np.stack(keep(args, train, jobs, f"{name}_answers", OF_POLICIES))
        paths = enumerate(np.swapaxes(answers[arm][:, : args.layouts], 0, 1))
        play = partial(clips.judge_layout, seed=SEEDS[args.judge_on])
        distances[arm] = np.stack(keep(args, play, paths, f"{name}_distances_{args.seeds}", OF_POLICIES), 1)
    return answers, distances


def follow(args, name, firsts, answers):
    """(N,) whether a clip of the first frame (N, H, W, 3) and the path (N, 8, 3) ends with the cube on the disc."""
    commands, output = (args.output_dir / f"{name}_{what}" for what in ("commands", "clips"))
    inside.write_commands(commands, firsts, answers)
    made = generate(args.processes, (args.action_model, commands, output, "--actions", commands))[0]
    return inside.on_disc(firsts, made[:, -1])


def try_paths(args, answers, firsts, starts):
    """Arm j: paths mixed of the answers (P, N, 8, 3), tried in the model. Returns (added samples or None, numbers)."""
    tried, owner = inside.propose(answers, args.tries), np.repeat(np.arange(args.new), args.tries)
    good = follow(args, "tried", firsts[owner], tried)
    play = partial(clips.judge_layout, seed=SEEDS["new"])
    jobs = enumerate(tried.reshape(args.new, args.tries, clips.FRAMES, 3))
    really = np.concatenate(keep(args, play, jobs, "tried_distances", [*OF_POLICIES, "tries"])) < clips.DISC
    numbers = {"tried": len(tried), "kept": int(good.sum()), "layouts": len(set(owner[good].tolist()))}
    numbers |= {"succeed_of_tried": interval(really), "succeed_of_kept": interval(really[good])}
    samples = firsts[owner[good]], starts[owner[good]], tried[good][:, 1:] - tried[good][:, :1]
    return samples if good.any() else None, numbers


def judge_inside(args, answers, distances, firsts):
    """What the model says of policies, beside what the simulator says of them, on the same layouts."""
    policies, layouts = min(args.inside[0], args.seeds), min(args.inside[1], args.layouts)
    asked = np.concatenate([answer[:policies, :layouts] for answer in answers.values()])
    true = np.concatenate([d[:policies, :layouts] for d in distances.values()]) < clips.DISC
    predicted = follow(args, "inside", np.tile(firsts[:layouts], (len(asked), 1, 1, 1)), np.concatenate(asked))
    return inside.compare(predicted.reshape(true.shape), true)


# What is measured


def label_quality(labels, true):
    """Error of displacements (N, T - 1, 3) against the true, cm: all frames, the last; ratio of the steps' lengths."""
    error = np.linalg.norm(labels - true, axis=2) * 100
    length = [np.linalg.norm(np.diff(x, axis=1, prepend=0), axis=2).mean() for x in (labels, true)]
    return {
        "label_error_cm": interval(error.mean(1)),
        "last_cm": error[:, -1].mean(),
        "action_ratio": length[0] / length[1],
    }


def bootstrap(values, draws=10000):
    """(seeds, layouts) of each arm -> means (draws,), the same seeds and layouts drawn for every arm."""
    rng = np.random.default_rng(0)
    seeds, layouts = next(iter(values.values())).shape
    s, n = rng.integers(0, seeds, (draws, seeds)), rng.integers(0, layouts, (draws, layouts))
    return {arm: v[s[:, :, None], n[:, None, :]].mean((1, 2)) for arm, v in values.items()}


def centimetres(values):
    return "{:.1f} cm ({:.1f} to {:.1f})".format(*values)


def write_table(results, path):
    head = "| arm | success | fingertip error | pseudo-label error | actions, labelled / true |"
    lines = [head, "|---|---|---|---|---|"]
    for arm, r in results["arms"].items():
        success = "{:.1f} % ({:.1f} to {:.1f})".format(*(100 * x for x in r["success"]))
        label = [centimetres(r["label_error_cm"]), f"{r['action_ratio']:.2f}"] if "label_error_cm" in r else ["", ""]
        lines.append(
            f"| {arm}: {ARMS[arm]} | {success} | {centimetres(r['fingertip_error_cm'])} | {' | '.join(label)} |"
        )
    for name, r in results["differences"].items():
        lines += ["", f"{name}: {100 * r['mean']:+.1f} points ({100 * r['low']:+.1f} to {100 * r['high']:+.1f})"]
    for name, r in results["ratios"].items():
        lines += ["", f"{name}: {100 * r['mean']:.0f} % ({100 * r['low']:.0f} to {100 * r['high']:.0f})"]
    alone = results["demonstrations_alone"]
    lines += ["", "Label error with the 10 demonstrations alone, without aimless motion: "
        + ", ".join(f"{arm} {centimetres(r['label_error_cm'])}" for arm, r in alone.items())]  # fmt: skip
    lines += inside.sentences(results)
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


def summarize(args, answers, distances, labels, alone, paths):
    """The table's numbers."""
    success = {arm: (d < clips.DISC).astype(float) for arm, d in distances.items()}
    draws, true = bootstrap(success), paths[args.judge_on]
    errors = {
        arm: 100 * np.linalg.norm(x[:, : args.layouts] - true, axis=3)[:, :, 1:].mean(2) for arm, x in answers.items()
    }
    error_draws, moved = bootstrap(errors), {name: p[:, 1:] - p[:, :1] for name, p in paths.items()}
    true_moves = {"g": moved["bundled"][LABELLED:], **dict.fromkeys("bcde", moved["new"])}
    results = {"judged_on": args.judge_on, "arms": {}, "differences": {}, "ratios": {}}
    results["demonstrations_alone"] = {arm: label_quality(alone[arm], true_moves[arm]) for arm in alone}
    for arm in answers:
        row = {"success": [success[arm].mean(), *np.percentile(draws[arm], [2.5, 97.5])]}
        row["fingertip_error_cm"] = [errors[arm].mean(), *np.percentile(error_draws[arm], [2.5, 97.5])]
        row["success_of_each_seed"] = success[arm].mean(1).tolist()
        if arm in true_moves:
            row |= label_quality(labels[arm], true_moves[arm])
        results["arms"][arm] = row
    for pair in DIFFERENCES:
        if set(pair) <= set(answers):
            low, high = np.percentile(draws[pair[0]] - draws[pair[1]], [2.5, 97.5])
            mean = success[pair[0]].mean() - success[pair[1]].mean()
            results["differences"][f"{pair[0]} - {pair[1]}"] = {"mean": mean, "low": low, "high": high}
    if set("abe") <= set(answers) and success["e"].mean() > success["a"].mean():
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = np.nanpercentile((draws["b"] - draws["a"]) / (draws["e"] - draws["a"]), [2.5, 97.5])
        mean = (success["b"].mean() - success["a"].mean()) / (success["e"].mean() - success["a"].mean())
        results["ratios"]["(b - a) / (e - a)"] = {"mean": mean, "low": low, "high": high}
    return results


def main(args):
    started, out, seed, took = time.time(), args.output_dir, SEEDS[args.judge_on], {}

    def done(stage):
        cpu = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        took[stage] = {"wall_s": round(time.time() - started), "cpu_s": round(cpu)}
        print(f"\n--- {stage}: {took[stage]['wall_s']} s so far, {took[stage]['cpu_s']} s of CPU", flush=True)

    paths, videos = prepare(args)
    done("rendered")
    labellers = train_labellers(args, paths, videos, args.labellers, bundled=LABELLED, aimless=args.aimless)
    done("labellers trained")

    # Arms that need no video model: first frames, starts, moves
    moved = {name: p[:, 1:] - p[:, :1] for name, p in paths.items()}
    firsts = {name: (videos[name][:, 0], paths[name][:, 0]) for name in paths}
    real = *(x[:LABELLED] for x in firsts["bundled"]), moved["bundled"][:LABELLED]
    test = [np.concatenate(both) for both in zip(firsts[args.judge_on], firsts["new"])]
    new, rest, of_rest = paths["new"], videos["bundled"][LABELLED:], paths["bundled"][LABELLED:]
    videos |= {"d": np.repeat(videos["new"][:, :1], clips.FRAMES, 1), "e": videos["new"], "g": rest}
    labels = {"d": label(labellers, videos["d"], new), "e": label(labellers, videos["e"], new)}
    labels["g"] = label(labellers, rest, of_rest)
    added = {"a": None, "d": (*firsts["new"], labels["d"]), "e": (*firsts["new"], labels["e"])}
    added |= {"f": (*firsts["new"], moved["new"]), "g": (rest[:, 0], of_rest[:, 0], labels["g"])}
    answers, distances = train_and_judge(args, {arm: added[arm] for arm in args.arms if arm in added}, real, test)
    done("judged what needs no video model")

    # Arms with generated clips
    if not (args.model_dir / "model_index.json").exists():
        cores = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}  # it runs alone; `learn` has set it to 1
        subprocess.run([sys.executable, str(clips.ROOT / "tests" / "demo.py")], env=cores, check=True)
    done("fine-tuned")
    sets = {"b": (args.model_dir, out / "new_first_frames", out / "generated_b")}
    sets["c"] = TINY, out / "new_first_frames", out / "generated_c"
    sets["i"] = args.model_dir, out / "more_first_frames", out / "generated_more"
    needed = [arm for arm in sets if arm in args.arms or arm == "b"]
    generated = dict(zip(needed, generate(args.processes, *(sets[arm] for arm in needed))))
    videos |= generated
    done("generated")
    labels |= {arm: label(labellers, clip, paths["more" if arm == "i" else "new"]) for arm, clip in generated.items()}
    added = {arm: (*firsts["new"], labels[arm]) for arm in "bc" if arm in generated} | {"g": added["g"]}
    added["h"] = [np.concatenate(both) for both in zip(added["g"], added["b"])]
    if "i" in generated:
        added["i"] = [np.concatenate(both) for both in zip(added["h"], (*firsts["more"], labels["i"]))]
    of_generated = train_and_judge(args, {arm: added[arm] for arm in args.arms if arm in "bchi"}, real, test)
    answers, distances = (
        {arm: x[arm] for arm in sorted(x)} for x in map(dict.__or__, (answers, distances), of_generated)
    )
    labellers_alone = train_labellers(args, paths, videos, 1, bundled=LABELLED)
    alone = {arm: label(labellers_alone, videos[arm], of_rest if arm == "g" else new) for arm in "beg"}
    done("judged all")

    true = paths[args.judge_on][:8]  # the judge himself, on a few layouts
    still = np.repeat(true[:, :1], clips.FRAMES, 1)
    played = [clips.judge_layout(job, seed) for job in enumerate(np.stack([true, still], 1))]
    right, none = np.mean(np.array(played) < clips.DISC, 0)
    print(f"\nthe judge: true path {right:.1%}, standing still {none:.1%}")

    tried, judged_inside = None, None
    if (args.action_model / "model_index.json").exists():
        added_j, tried = try_paths(args, answers["a"][:, args.layouts :], *firsts["new"])
        if added_j:
            of_j = train_and_judge(args, {"j": added_j}, real, test)
            answers, distances = answers | of_j[0], distances | of_j[1]
        judged_inside = judge_inside(args, answers, distances, test[0])
        done("tried and judged inside the model")
    else:
        print(f"\nsection 3 is left out: there is no model in {args.action_model}; `make actions` trains it")

    results = summarize(args, answers, distances, labels, alone, paths)
    shown = {"real": "e", "fine-tuned": "b"} | ({"base": "c"} if "c" in generated else {})
    pictured = ({name: kind[arm] for name, arm in shown.items()} for kind in (videos, labels))
    write_clips(out / "clips.png", *pictured, paths["new"])
    shown = {"true": paths[args.judge_on]} | {arm: answers[arm][0] for arm in "abcf" if arm in answers}
    write_pushes(out / "pushes.png", test[0][: args.layouts], shown, seed)
    results |= {"tried": tried, "inside": judged_inside, "took": took}
    write_file(out / "results.json", json.dumps(results, indent=1, default=float).encode())
    write_table(results, out / "table.md")
    print(f"Done in {time.time() - started:.0f} s. Look at {out}/table.md, clips.png and pushes.png.")


if __name__ == "__main__":
    main(build_parser().parse_args())
