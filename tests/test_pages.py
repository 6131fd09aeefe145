"""The pages of a generated set and of a training run: opened in a real browser, clicked, filtered and read."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SIZE, TINY, moving_square, run, write_clip

import svd_common as common
from svd_parts.dataset import read_metadata
from svd_parts.metrics import METRICS, clip_measures
from svd_parts.page import write_clips_page, write_page, write_run_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --remote-debugging-pipe"
needs_browser = pytest.mark.skipif(not BROWSER, reason="no Chromium here")
NAMES = [f"{name}_seed0_motion{bucket}" for name in ("b cup", "机器 手#1%") for bucket in (60, 180)]

SEEN = """(async () => {
const by_id = (id) => document.getElementById(id), seen = {};
const enter = (id, value) => { by_id(id).value = value; by_id(id).dispatchEvent(new Event("input")); };
const names = () => [...document.querySelectorAll(".card .name")].map((element) => element.textContent);
const shown = (list) => list.filter((element) => element.videoWidth || element.naturalWidth);
const wait = async (ready) => {
  for (let i = 0; i < 300 && !ready(); i++) await new Promise((done) => setTimeout(done, 50));
};
%s
return seen;
})()"""


@contextlib.contextmanager
def opened(page, profile, query="", size=(1300, 2500), scheme="light", first=""):
    """A page in the browser: the function that runs JavaScript in it. Speaks Chromium's protocol, over two pipes.

    size: of the view in CSS pixels; below 701 a phone's. first: a script that runs before those of the page.
    """
    to_browser, from_browser = os.pipe(), os.pipe()
    pipes = to_browser[0], from_browser[1]
    moved = "import os, sys; _, a, b, *c = sys.argv; os.dup2(int(a), 3); os.dup2(int(b), 4); os.execv(c[0], c)"
    command = [sys.executable, "-c", moved, *map(str, pipes), BROWSER, *FLAGS.split(), f"--user-data-dir={profile}"]
    process = subprocess.Popen([*command, "about:blank"], pass_fds=pipes, stderr=subprocess.DEVNULL)
    for pipe in pipes:
        os.close(pipe)
    killer = threading.Timer(60, process.kill)
    killer.start()
    try:
        with open(to_browser[1], "wb", buffering=0) as out, open(from_browser[0], "rb") as answers:

            def ask(method, session=None, **params):
                message = {"id": 1, "method": method, "params": params, **({"sessionId": session} if session else {})}
                out.write(json.dumps(message).encode() + b"\0")
                while True:
                    text = b"".join(iter(lambda: answers.read(1).strip(b"\0"), b""))  # up to a 0 or the end
                    if "id" in (answer := json.loads(text)):
                        return answer.get("result", {})  # there is none while a page gives way to the next

            def evaluate(expression):
                answer = ask("Runtime.evaluate", session, expression=expression, awaitPromise=True, returnByValue=True)
                assert "exceptionDetails" not in answer, answer
                return answer.get("result", {}).get("value")

            targets = []
            while not targets:
                found = ask("Target.getTargets")["targetInfos"]
                targets = [target["targetId"] for target in found if target["url"] == "about:blank"]
            session = ask("Target.attachToTarget", targetId=targets[0], flatten=True)["sessionId"]
            view = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 701}
            ask("Emulation.setDeviceMetricsOverride", session, **view)
            ask("Emulation.setEmulatedMedia", session, features=[{"name": "prefers-color-scheme", "value": scheme}])
            ask("Page.enable", session)
            ask("Page.addScriptToEvaluateOnNewDocument", session, source=first)
            ask("Page.navigate", session, url=page.as_uri() + query)
            while not evaluate("Boolean(document.title) && document.readyState === 'complete'"):
                pass
            yield evaluate
            ask("Browser.close")
    finally:  # the pipes are closed, so the browser ends
        process.wait()
        killer.cancel()


def see(page, script, profile, query="", **look):
    """What a script saw that did something in the page: its object `seen`."""
    with opened(page, profile, query, **look) as evaluate:
        return evaluate(SEEN % script)


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text("utf-8"))[1])


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A set of four clips, of names that a link has to encode."""
    root = tmp_path_factory.mktemp("pages")
    (root / "images").mkdir()
    for seed, name in enumerate(("b cup", "机器 手#1%")):
        (root / "images" / f"{name}.png").write_bytes(common.encode_png(moving_square(1, seed=seed)[0]))
    run("infer_svd.py", "--model_dir", TINY, "--input_image", root / "images", "--output_video", root / "set <1>",
        *SIZE, "--num_inference_steps", 1, "--motion_bucket_id", 60, 180)  # fmt: skip
    return root / "set <1>"


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A set of four clips with real ones in `real` beside it, a compared model and scores."""
    root = tmp_path_factory.mktemp("judged")
    for seed, name in enumerate(("clip0", "clip1")):
        write_clip(root / "real" / name, moving_square(9, seed=seed))
    judge(root)
    return root / "set"


def judge(root):
    run("infer_svd.py", "--model_dir", TINY, "--input_image", root / "real", "--output_video", root / "set", *SIZE,
        "--num_inference_steps", 1, "--num_videos_per_image", 2, "--compare_with", TINY,
        "--reference", root / "real")  # fmt: skip


SETTINGS = {"pretrained_model_name": "/models/svd", "num_clips": 9, "held_out": {"a": "0"}, "width": 512,
    "height": 320, "num_frames": 25, "max_train_steps": 40, "global_batch_size": 1, "learning_rate": 1e-5,
    "trainable": "temporal", "mixed_precision": "no", "validation_metric": "psnr_moving"}  # fmt: skip


def write_run(folder, lines, **settings):
    """Writes metrics.jsonl and the page of a run."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_run_page(folder, {**SETTINGS, **settings})
    return folder / "index.html"


def test_measures_tell_blur_another_picture_and_flicker():
    still, none = moving_square(1).repeat(8, 0), {"motion": 0.0, "measured_motion_bucket_id": 0, "flicker": 0.0}
    assert clip_measures(still, still[0], 7) == {**none, "sharpness_ratio": 1.0, "psnr_first_frame": 100.0}
    small = [common.fit_frame(frame, 96 // (1 + t), 64 // (1 + t)) for t, frame in enumerate(still)]
    fades = np.stack([common.fit_frame(frame, 96, 64) for frame in small])
    blurred = clip_measures(fades, still[0], 7)
    assert blurred["sharpness_ratio"] < 0.2 and blurred["psnr_first_frame"] == 100 and blurred["flicker"] < 1
    lit = (still // 2 + 10 * (np.arange(8) % 2)[:, None, None, None]).astype(np.uint8)
    assert clip_measures(lit, still[0], 7)["flicker"] == pytest.approx(10, abs=0.3)
    assert clip_measures(lit, still[0], 7)["psnr_first_frame"] < 20
    assert clip_measures(lit * 0, still[0], 7)["sharpness_ratio"] is None


def test_every_record_has_the_measures_and_the_page_shows_them(clips):
    records = [json.loads(line) for line in (clips / "metadata.jsonl").read_text().splitlines()]
    shown = data_of(clips / "index.html")["clips"]
    assert [clip["name"] for clip in shown] == [f"{name}.mp4" for name in NAMES]
    for record, clip in zip(records, shown):
        frames = common.read_video(clips / record["file_name"])
        measured = clip_measures(frames, common.read_image(record["source_image"]), 7)
        assert clip["asked_motion_bucket_id"] == record["motion_bucket_id"]
        for name, value in measured.items():
            assert record[name] == clip[name] and record[name] == pytest.approx(value, rel=0.2, abs=0.5), name


@needs_browser
def test_clips_are_played_sorted_filtered_ticked_and_saved(clips, tmp_path):
    flickers = sorted((clip["flicker"], clip["name"]) for clip in data_of(clips / "index.html")["clips"])
    script = """
      const media = [...document.querySelectorAll(".pair img, .pair video")];
      await wait(() => shown(media).length === media.length);
      seen.loaded = [media.length, shown(media).length];
      seen.title = [document.title, document.querySelector("h1").textContent];
      seen.all = names();
      by_id("sort").value = "flicker";
      by_id("sort").dispatchEvent(new Event("change"));
      seen.rising = names();
      by_id("order").click();
      seen.falling = names();
      enter("flicker-least", "LEAST");
      seen.flickering = names();
      enter("flicker-least", "");
      enter("asked_motion_bucket_id-most", "100");
      seen.slow = names();
      by_id("tick-all").click();
      enter("asked_motion_bucket_id-most", "");
      enter("text", "机器");
      seen.found = names();
      document.querySelector(".card").click();
      enter("text", "");
      by_id("only").click();
      seen.kept = names();
      seen.count = by_id("count").textContent;
      let blob;
      URL.createObjectURL = (given) => { blob = given; return "data:,"; };
      by_id("save-kept").click();
      seen.saved = await blob.text();
    """.replace("LEAST", str(flickers[2][0]))
    seen = see(clips / "index.html", script, tmp_path)
    files, rising = [f"{name}.mp4" for name in NAMES], [name for _, name in flickers]
    assert seen["loaded"] == [8, 8] and seen["title"] == ["set <1>", "set <1>"] and seen["all"] == files
    assert seen["rising"] == rising and seen["falling"] == rising[::-1]
    assert sorted(seen["flickering"]) == sorted(rising[2:]) and set(seen["slow"]) == {files[0], files[2]}
    assert set(seen["found"]) == {files[2], files[3]}
    kept = {files[0], files[2]} ^ {seen["found"][0]}  # both of motion 60 ticked, then one more or one less
    assert set(seen["kept"]) == kept and seen["count"] == f"{len(kept)} of 4 clips shown, {len(kept)} kept"
    assert seen["saved"] == "".join(f"{name}\n" for name in files if name in kept)


def test_kept_clips_are_prepared_by_their_list(clips, tmp_path, capsys):
    kept, other = tmp_path / "kept.txt", tmp_path / "other"
    kept.write_bytes(f"\ufeff{NAMES[0]}.mp4\r\n{NAMES[3]}.mp4\r\n".encode())  # as an editor of Windows leaves it

    def prepare(output, *flags, ok=True):
        done = run("prepare_dataset.py", "--video_dir", clips, "--output_dir", output, "--width", 96, "--height", 64,
            *flags, ok=ok)  # fmt: skip
        return {record["source"] for record in read_metadata(output).values()}, done.stdout

    assert prepare(tmp_path / "kept", "--include", f"@{kept}")[0] == {f"{NAMES[0]}.mp4", f"{NAMES[3]}.mp4"}
    assert prepare(other, "--exclude", f"@{kept}")[0] == {f"{NAMES[1]}.mp4", f"{NAMES[2]}.mp4"}
    both = prepare(tmp_path / "both", "--include", f"@{kept}", "b cup*180*", "--exclude", f"{NAMES[3]}.mp4")
    assert both[0] == {f"{NAMES[0]}.mp4", f"{NAMES[1]}.mp4"}
    kept.write_text("b cup*\ngone.mp4\n", "utf-8")  # no pattern in a list
    _, printed = prepare(tmp_path / "none", "--include", f"@{kept}", ok=False)
    assert "leave none of 4 videos" in printed and "matches 2 names of --include and --exclude: " in printed
    _, printed = prepare(tmp_path / "none", "--include", "@nothing.txt", ok=False)
    assert "--include @nothing.txt: no such file" in printed and "one a line" in printed
    kept.write_text("")
    assert "leave none of 4 videos" in prepare(tmp_path / "none", "--include", f"@{kept}", ok=False)[1]


@needs_browser
def test_the_command_below_the_clips_takes_the_kept_ones(clips, tmp_path, monkeypatch):
    script = "seen.next = by_id('next').textContent; seen.all = document.querySelector('main').innerText;"
    (tmp_path / "kept.txt").write_text(f"{NAMES[0]}.mp4\n", "utf-8")
    python, *command = shlex.split(see(clips / "index.html", script, tmp_path / "absolute")["next"])
    assert python == "python" and str(clips) in command
    run(*command, "--width", 96, "--height", 64, cwd=tmp_path)
    assert [record["source"] for record in read_metadata(tmp_path / "chosen").values()] == [f"{NAMES[0]}.mp4"]
    monkeypatch.chdir(tmp_path)
    record = {"motion_bucket_id": 127, "num_frames": 8, "width": 96, "height": 64}
    prepare = "python prepare_dataset.py --video_dir {} --output_dir ./chosen --include @kept.txt"
    for folder, more, wanted in (
        ("clips", {"file_name": "a.mp4"}, prepare),
        ("all/my $et", {"file_name": "a.mp4", "output_format": "lerobot"}, prepare),
        ("it's", {"directory": "a"}, "python train_svd.py --dataset_dir {} --include @kept.txt ..."),
    ):
        wanted = wanted.format(shlex.quote(str(tmp_path / folder)))
        (tmp_path / folder).mkdir(parents=True)
        write_clips_page(Path(folder), {"a": {**record, **more}})
        for language, lerobot in (("en", "it numbers the episodes anew"), ("zh", "重新编号")):
            seen = see(tmp_path / folder / "index.html", script, tmp_path / language, f"?lang={language}")
            assert seen["next"] == wanted and shlex.split(seen["next"])[3] == str(tmp_path / folder)
            assert (lerobot in seen["all"]) == ("output_format" in more)
            assert "Two numbers" not in seen["all"]


@needs_browser
def test_a_set_of_frame_folders_and_one_of_gif_are_played(clips, tmp_path):
    for output_format, suffix in (("frames", ""), ("gif", ".gif")):
        folder = tmp_path / output_format
        run("infer_svd.py", "--model_dir", TINY, "--input_image", clips.parent / "images" / "机器 手#1%.png",
            "--output_video", folder, "--output_format", output_format, *SIZE, "--num_inference_steps", 1)  # fmt: skip
        seen = see(folder / "index.html", """
          const media = [...document.querySelectorAll(".pair img")], sources = new Set();
          await wait(() => { sources.add(media[1].src); return shown(media).length === 2 && sources.size > WANTED; });
          Object.assign(seen, { media: media.length, shown: shown(media).length, names: names() });
          seen.sources = sources.size;
        """.replace("WANTED", "0" if suffix else "3"), tmp_path / "profile")  # fmt: skip
        assert seen.pop("sources") >= (1 if suffix else 4)
        assert seen == {"media": 2, "shown": 2, "names": [f"机器 手#1%_seed0_motion127{suffix}"]}


@needs_browser
def test_the_page_of_a_run_shows_losses_scores_and_videos(tmp_path):

    lines = [{"step": step, "loss_v": 1 / step, "grad_norm": None, "learning_rate": 1e-4} for step in range(1, 31)]
    lines += [{"step": s, "validation_psnr": 20 + s, "validation_copied_psnr": 21.0} for s in (0, 15, 30)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (15, 30):
        for name in ("a b#%", "机器"):
            video = tmp_path / "validation" / f"step-{step:06d}" / f"{name}.mp4"
            video.parent.mkdir(parents=True, exist_ok=True)
            common.write_video(video, moving_square(4), 7)
    write_run_page(tmp_path)
    script = """
      const videos = () => [...document.querySelectorAll("#videos video")];
      await wait(() => shown(videos()).length === videos().length);
      seen.videos = [videos().length, shown(videos()).length];
      by_id("step").value = "30";
      by_id("step").dispatchEvent(new Event("change"));
      await wait(() => shown(videos()).length === 2);
      seen.last = videos().map((video) => decodeURIComponent(video.src).split("/validation/")[1]);
      seen.charts = [...document.querySelectorAll(".chart")].map((chart) =>
        [chart.querySelector("b").textContent, chart.querySelectorAll("path").length]);
      seen.psnr = by_id("validation").querySelector(".top span").textContent;
      const svg = by_id("validation").querySelector("svg"), box = svg.getBoundingClientRect();
      svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width * 0.55 }));
      seen.at = by_id("validation").querySelector(".top span").textContent;
      seen.count = by_id("count").textContent;
    """
    seen = see(tmp_path / "index.html", script, tmp_path / "profile")
    assert seen["videos"] == [4, 4] and seen["count"] == "step 30, 4 validation videos"
    assert seen["last"] == [f"step-000030/{name}.mp4" for name in ("a b#%", "机器")]
    assert seen["charts"] == [["loss", 2], ["learning rate", 1], ["PSNR", 2]]
    assert "model 50" in seen["psnr"] and "copied 21" in seen["psnr"]
    assert "model 35" in seen["at"] and "at step 15" in seen["at"]


@needs_browser
def test_the_labels_of_a_chart_have_a_true_zero_and_stay_inside_it(tmp_path):
    ranges = {
        "direction": [-0.3, 0.05, 0.0],  # from -0.3 in steps of 0.1, a sum passes 0 at -2.8e-17
        "direction_of_the_flow": [-0.35, 0.55, 0.0],
        "tiny": [-3.4e-18, 2e-17, 0.0],
        "huge": [-3e12, 4e12, 0.0],
        "close": [20.008, 20.019, 20.01],
        "equal": [1.0, 1 + 2**-52, 1.0],
        "long": [-99999.8, -99998.1, -99999.0],
    }
    lines = [
        {"step": s, **{f"validation_{name}": values[s // 10] for name, values in ranges.items()}} for s in (0, 10, 20)
    ]
    script = """
      for (const chart of document.querySelectorAll("#validation .chart")) {
        const texts = [...chart.querySelectorAll("svg text")], boxes = texts.map((text) => text.getBBox());
        seen[chart.querySelector("b").textContent] = [
          texts.filter((text) => text.matches(".tick")).map((text) => text.textContent),
          boxes.every((box) => box.x >= 0 && box.x + box.width <= 440)];
      }
    """
    seen = see(write_run(tmp_path, lines), script, tmp_path / "profile")
    assert len(seen) == len(ranges)
    for name, (ticks, inside) in seen.items():
        assert inside and 2 <= len(ticks) <= 6 and len(set(ticks)) == len(ticks), (name, ticks)
        assert ("0" in ticks) == (name not in ("close", "equal", "long")), (name, ticks)
    assert seen["direction"][0] == ["-0.3", "-0.2", "-0.1", "0"] and "20.015" in seen["close"][0]


def test_no_page_of_another_maker_is_overwritten_and_none_is_needed(tmp_path, monkeypatch):
    page = tmp_path / "index.html"
    write_page(page, {"title": "</script><b>", "clips": []})
    assert data_of(page)["title"] == "</script><b>" and "</script><b>" not in page.read_text()
    page.write_text("mine")
    write_page(page, {"title": "x", "clips": []})
    assert page.read_text() == "mine"
    monkeypatch.setattr("svd_parts.page.__file__", str(tmp_path / "page.py"))  # the scripts were copied without it
    write_page(tmp_path / "other.html", {"title": "x", "clips": []})
    assert not (tmp_path / "other.html").exists()


@needs_browser
def test_a_page_shows_the_real_clip_the_compared_one_and_the_scores_and_plays_them_larger(judged, tmp_path):
    [first, *_] = clips = data_of(judged / "index.html")["clips"]
    metrics = json.loads((judged / "metrics.json").read_text())
    scores = metrics["files"][first["name"]]["generated"]
    assert first["psnr_moving"] == scores["psnr_moving"] == first["compared"]["psnr_moving"]
    assert common.read_video(judged / first["real"]).shape == (8, 64, 96, 3)
    assert len({(judged / clip["real"]).read_bytes() for clip in clips}) == 2
    assert [clip["image"] for clip in clips] == ["clip0"] * 2 + ["clip1"] * 2
    script = """
      const key = (name, target = document.body) =>
        target.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
      seen.captions = [...document.querySelectorAll(".card figcaption")].slice(0, 4).map((e) => e.textContent);
      seen.numbers = document.querySelector(".card .numbers").textContent;
      seen.two = by_id("two").innerText;
      seen.sorts = [...by_id("sort").options].map((option) => option.value);
      by_id("grouped").click();
      seen.groups = [...document.querySelectorAll(".grid h2")].map((element) => element.textContent);
      document.querySelector(".card .pair video").click();
      const dialog = by_id("larger"), videos = [...dialog.querySelectorAll("video")];
      await wait(() => shown(videos).length === 3 && videos.every((video) => !video.paused));
      seen.large = [dialog.open, shown(videos).length, document.querySelectorAll("input:checked").length];
      key(" ", dialog);
      await wait(() => videos.every((video) => video.paused));
      seen.paused = videos.every((video) => video.paused);
      for (const video of videos) video.currentTime = 0;
      key(".", dialog);
      seen.stepped = videos.map((video) => +video.currentTime.toFixed(2));
      by_id("half-speed").click();
      seen.rate = videos.map((video) => video.playbackRate);
      key("k", dialog);
      seen.kept = by_id("count").textContent;
      key("ArrowRight", dialog);
      await wait(() => dialog.querySelector(".name").textContent.includes("seed1"));
      seen.next = dialog.querySelector(".name").textContent;
      by_id("close").click();
      seen.open = dialog.open;
      key("ArrowRight");
      key("k");
      seen.at = document.querySelector(".card.at .name").textContent;
      seen.more = by_id("count").textContent;
    """
    seen = see(judged / "index.html", script, tmp_path)
    assert seen["captions"] == ["input image", "real", "generated, seed 0", "compared model"]
    assert seen["two"] == "Two numbers on a card: generated / compared model"
    assert "PSNR moving dB" in seen["numbers"] and " / " in seen["numbers"] and "psnr_moving" in seen["sorts"]
    assert seen["groups"] == ["clip0", "clip1"] and seen["large"] == [True, 3, 1] and seen["paused"]  # 1: grouped
    assert seen["stepped"] == [0.14] * 3 and seen["rate"] == [0.5] * 3 and seen["kept"] == "4 of 4 clips shown, 1 kept"
    assert "clip0_seed1" in seen["next"] and seen["open"] is False
    assert "clip1_seed0" in seen["at"] and seen["more"] == "4 of 4 clips shown, 2 kept"


@needs_browser
def test_a_set_of_several_models_shows_the_model_of_each_clip_and_is_searched_and_grouped_by_it(judged, tmp_path):
    base = json.loads((judged / "metadata.jsonl").read_text().splitlines()[0])
    assert base["model_fingerprint"] and {clip["model"] for clip in data_of(judged / "index.html")["clips"]} == {None}
    script = """
      seen.models = [...document.querySelectorAll(".card .model")].map((element) => element.textContent);
      seen.choice = [by_id("text").placeholder, Boolean(by_id("by-model"))];
      by_id("by-model")?.click();
      seen.groups = [...document.querySelectorAll(".grid h2")].map((element) => element.textContent);
      by_id("grouped").click();
      seen.both = document.querySelectorAll(".grid h2").length;
      enter("text", "STEP 500");
      seen.found = names();
      document.querySelector(".card .pair video").click();
      seen.large = by_id("larger").querySelector(".model").textContent;
    """
    one = see(judged / "index.html", script.replace("STEP 500", ""), tmp_path / "one")
    assert (one["models"], one["choice"], one["groups"], one["large"]) == ([], ["name contains", False], [], "")
    names, lora = [clip["name"] for clip in data_of(judged / "index.html")["clips"]], {"lora": ["style", "hand"]}
    made = [("out", 500, "aaaaaaaaaaaa", {}), ("./out", 500, "aaaaaaaaaaaa", {}), ("out", 500, "bbbbbbbbbbbb", {}),
        ("owner/base", None, "cccccccccccc", {**lora, "lora_scale": 0.8})]  # fmt: skip
    records = {
        name: {**base, "model_dir": folder, "trained_step": step, "model_fingerprint": weights, **more}
        for name, (folder, step, weights, more) in zip(names, made)
    }
    shutil.copytree(judged, tmp_path / "set")
    write_clips_page(tmp_path / "set", records)
    several = see(tmp_path / "set" / "index.html", script, tmp_path / "several")
    titles = ["out (aaaaaaaa), step 500", "out (bbbbbbbb), step 500", "owner/base + style + hand x 0.8"]
    assert several["models"] == [titles[0], *titles] and several["choice"] == ["name or model", True]
    assert several["groups"] == titles and several["both"] == 3
    assert several["found"] == names[:3] and several["large"] == titles[0]


@needs_browser
def test_scores_and_videos_side_by_side_are_linked_where_they_exist(clips, judged, tmp_path):
    assert data_of(clips / "index.html")["files"] == []
    script = "seen.links = [...document.querySelectorAll('a')].map((link) => [link.textContent, link.href]);"
    links = see(judged / "index.html", script, tmp_path)["links"]
    assert links == [[name, f"{judged.as_uri()}/{name}"] for name in ("metrics.json", "side_by_side/")]


def test_each_clip_is_shown_beside_its_own_real_clip_of_the_last_scores(judged, tmp_path):
    root, there = shutil.copytree(judged.parent, tmp_path / "copy"), moving_square(9)
    back = there[[0, *range(8, 0, -1)]]  # another clip with the same first frame, and so with the same input image
    shutil.rmtree(root / "real" / "clip0")
    for name, frames in (("clip0", back), ("clip2", there)):
        write_clip(root / "real" / name, frames)
    judge(root)
    shown = data_of(root / "set" / "index.html")["clips"]
    films = {"clip0": back, "clip1": moving_square(9, seed=1), "clip2": there}
    assert len(shown) == 6
    for clip in shown:
        real = common.read_video(root / "set" / clip["real"])
        assert np.abs(real.astype(float) - films[clip["image"]][:8]).mean() < 3, clip["name"]


@needs_browser
def test_on_a_phone_the_filters_are_folded_and_a_chinese_browser_reads_chinese(clips, judged, tmp_path):
    script = """
      seen.filters = document.querySelector("details").open;
      seen.columns = getComputedStyle(document.querySelector(".numbers")).gridTemplateColumns.split(" ").length;
      seen.words = [by_id("save-kept").textContent, by_id("order").textContent, document.documentElement.lang];
      seen.language = navigator.language;
      document.querySelector(".pair").click();
      seen.scrolled = [by_id("larger").open, by_id("larger").scrollTop];
      by_id("close").click();
      seen.size = [innerWidth, document.documentElement.scrollWidth];
      seen.outside = [...document.querySelectorAll(".card *")].filter((element) => element.getBoundingClientRect().right
        > element.closest(".card").getBoundingClientRect().right).length;
    """
    chinese, english = ["保存 kept.txt", "从低到高", "zh"], ["Save kept.txt", "low to high", "en"]
    for folder, query, words in ((clips, "zh-CN", chinese), (judged, "zh", chinese), (judged, "en", english)):
        seen = see(folder / "index.html", script, tmp_path / query, f"?lang={query}", size=(390, 844))
        assert seen["words"] == words and seen["scrolled"] == [True, 0]
        assert not seen["filters"] and seen["columns"] == 2 and seen["size"] == [390, 390] and not seen["outside"]
    seen = see(clips / "index.html", script, tmp_path / "wide")
    assert seen["filters"] and seen["columns"] == 3 and not seen["outside"]
    assert seen["words"][2] == ("zh" if seen["language"].startswith("zh") else "en")


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_in_the_light_and_in_the_dark_scheme(scheme, judged, tmp_path):
    lines = [{"step": 20, "loss_v": 0.5}, {"step": 20, "validation_psnr": 9.0, "validation_copied_psnr": 8.0}]
    script = """
      const light = (color) => color.match(/[\\d.]+/g).slice(0, 3).map((level) => level / 255).map((level) =>
        level > 0.03928 ? ((level + 0.055) / 1.055) ** 2.4 : level / 12.92) // as WCAG defines luminance and contrast
        .reduce((sum, level, i) => sum + level * [0.2126, 0.7152, 0.0722][i], 0);
      const back = (element) => {
        const color = getComputedStyle(element).backgroundColor;
        return color !== "rgba(0, 0, 0, 0)" || !element.parentElement ? color : back(element.parentElement);
      };
      by_id("tick-all")?.click();
      seen.page = light(back(document.body));
      seen.faint = [];
      for (const element of document.querySelectorAll("body *")) {
        if (![...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
        const style = getComputedStyle(element), of_svg = element.namespaceURI.endsWith("svg");
        const [low, high] = [light(of_svg ? style.fill : style.color), light(back(element))].sort((a, b) => a - b);
        if ((high + 0.05) / (low + 0.05) < 4.5) seen.faint.push(element.textContent);
      }
    """
    for page in (judged / "index.html", write_run(tmp_path, lines)):
        seen = see(page, script, tmp_path / f"browser {page.parent.name}", scheme=scheme)
        assert not seen["faint"] and (seen["page"] > 0.8 if scheme == "light" else seen["page"] < 0.02)


@needs_browser
def test_a_long_name_is_shortened_in_the_middle_and_is_whole_on_hover(clips, tmp_path):
    page, data = tmp_path / "index.html", data_of(clips / "index.html")
    name, shown = (
        "videos__chunk-000__front__episode_000192_seed0_motion126.mp4",
        "videos__ch…e_000192_seed0_motion126.mp4",
    )
    script = "seen.names = [...document.querySelectorAll('main .name')].map((e) => [e.textContent, e.title]);"
    data["clips"][0]["name"] = name
    write_page(page, data)
    others = [[f"{other}.mp4"] * 2 for other in NAMES[1:]]
    assert see(page, script, tmp_path / "set")["names"] == [[shown, name], *others]
    write_page(page, {"title": "run", "lines": [], "metrics": {}, "videos": [{"step": "0", "name": name, "url": "x"}]})
    assert see(page, script, tmp_path / "run")["names"] == [[shown, name]]


@needs_browser
def test_the_page_of_a_run_reloads_itself_every_minute_until_the_run_has_ended(tmp_path, monkeypatch):
    hurry = (
        "const wait = setTimeout, waits = []; setTimeout = (act, time) => { waits.push(time); wait(act, time / 100); }"
    )

    def write(step):
        return write_run(tmp_path, [{"step": step, "loss_v": 0.5}])

    with opened(write(10), tmp_path / "profile", first=hurry) as evaluate:

        def wait_for(step):
            while not (evaluate("document.getElementById('count')?.textContent") or "").startswith(f"step {step},"):
                pass

        wait_for(10)
        assert evaluate("waits") == [60000]
        write(20)
        wait_for(20)
        write(40)  # the last step
        wait_for(40)
        assert evaluate("waits") == []
    monkeypatch.setattr("svd_parts.page.time", SimpleNamespace(time=lambda: time.time() - 3601))  # a run that died
    with opened(write(30), tmp_path / "profile", first=hurry) as evaluate:
        assert evaluate("waits") == []


@needs_browser
def test_the_page_of_a_run_shows_settings_time_the_best_step_and_what_is_missing(tmp_path):
    lines = [{"step": step, "loss_v": 1 / step, "seconds_per_step": 2.5} for step in range(1, 31)]
    script = """
      seen.facts = by_id("facts").innerText;
      seen.missing = by_id("missing")?.textContent ?? null;
      seen.best = document.querySelectorAll("line.best").length;
      seen.count = by_id("count").textContent;
    """

    def look(name):
        return see(write_run(tmp_path, lines, held_out=held_out), script, tmp_path / name)

    training, lines, held_out = lines, [], {"a": "0"}
    seen = look("begun")
    assert "first validation is under way" in seen["missing"] and seen["count"] == "step 0, 0 validation videos"
    lines = training
    assert look("failed")["missing"].startswith("No validation has finished.")
    held_out = {}
    seen = look("without")
    assert "--num_validation_videos 4" in seen["missing"] and not seen["best"]
    for fact in ("svd", "512 x 320 x 25", "40 x 1", "1e-05", "fp32", "2.5 s", "0:00:25"):
        assert fact in seen["facts"], seen["facts"]
    lines += [{"step": s, "validation_psnr_moving": value} for s, value in ((0, 1.0), (15, 9.0), (30, 8.0))]
    held_out = {"a": "0"}
    seen = look("with")
    assert seen["missing"] is None and seen["best"] == 1 and data_of(tmp_path / "index.html")["best"]["step"] == 15


# What a Chinese engineer leaves in English: options, names of files, of clips and of the model, units and terms.
ALLOWED = r"--\w+|\w+\.(?:py|txt|json|jsonl|mp4)|side_by_side|clip\d|svd|PSNR|SSIM|dB|px|GiB|LoRA|bucket|fp32"
ALLOWED += r"|LeRobot|^python \w+\.py [^\u4e00-\u9fff]*$"  # and a whole command
TEXTS = """
  document.querySelector(".pair")?.click();  // the larger view
  const nodes = document.createNodeIterator(document.body, NodeFilter.SHOW_TEXT);
  seen.texts = [...document.body.querySelectorAll("*")].flatMap((element) =>
    ["title", "placeholder", "aria-label"].map((name) => element.getAttribute(name) || ""));
  for (let node; node = nodes.nextNode();) if (!node.parentElement.closest("script, h1")) seen.texts.push(node.data);
"""


@needs_browser
def test_in_chinese_no_english_word_is_left(judged, tmp_path):
    line = {"step": 20, "loss_v": 0.5, "grad_norm": 1.0, "learning_rate": 1e-4, "peak_memory_gib": 20.5}
    line |= {"seconds_per_step": 1.0, "seconds_left": 93784.0}
    scores = {f"validation_{name}": 1.0 for name in [*METRICS, "loss_v_sigma_0.1", "copied_psnr"]}
    runs = {
        "validated": ([line, {"step": 20, **scores}], {"lora_rank": 4, "trainable": "temporal_attention"}),
        "not validated": ([line], {"held_out": {}, "trainable": "all"}),
        "failed": ([line], {}),
        "begun": ([], {}),
    }
    for name in runs:
        (tmp_path / name / "validation" / "step-000020").mkdir(parents=True)
    common.write_video(tmp_path / "validated" / "validation" / "step-000020" / "clip0.mp4", moving_square(4), 7)
    pages = [write_run(tmp_path / name, lines, **settings) for name, (lines, settings) in runs.items()]
    shutil.copytree(judged, tmp_path / "set")
    data = data_of(judged / "index.html")
    for place, clip in enumerate(data["clips"]):
        clip["model"] = [f"clip{place}", place or None]
    write_page(tmp_path / "set" / "index.html", {**data, "lerobot": True})
    pages.append(tmp_path / "set" / "index.html")
    for number, page in enumerate([judged / "index.html", *pages]):
        texts = see(page, TEXTS, tmp_path / f"browser{number}", "?lang=zh")["texts"]
        assert "26:03:04" in texts or number in (0, 4, 5)
        left = {text for text in texts if re.search("[A-Za-z]{2}", re.sub(ALLOWED, "", text, flags=re.A))}
        assert not left, (page, left)
