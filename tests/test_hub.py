"""The model card, and pushing a result to a stand-in for the hub on this machine."""

import json
import os
import shutil
import subprocess
import sys
import threading
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import TINY, run, train_arguments

pytest.importorskip("torch")
import huggingface_hub

import train_svd
from svd_parts.hub import base_card, card_data, find_base_name


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload takes; every file is sent in the commit itself."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        answer = {
            "url": "https://huggingface.co/me/robot",
            "commitUrl": "https://huggingface.co/me/robot/commit/0",
            "commitOid": "0" * 40,
            "errors": [],
            "warnings": [],
        }
        if self.server.refuses:
            self.send_response(403)
            answer = {"error": "you may not write there"}
        else:
            self.send_response(200)
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.server.files |= {line["value"]["path"] for line in lines if line["key"] == "file"}
        self.server.asked.append((self.path, body[:300]))
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def do_GET(self):
        self.send_response(200 if self.server.knows_token else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"id": "me/robot", "siblings": [], "sha": "0" * 40}).encode())

    def log_message(self, *_):
        pass


@pytest.fixture()
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.asked, server.refuses, server.knows_token = set(), [], False, True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def hub_environment(hub):
    here = f"http://127.0.0.1:{hub.server_port}"
    return {"HF_ENDPOINT": here, "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


def push(hub, dataset, output, **options):
    arguments = [*train_arguments(dataset, output), "--max_train_steps", 2, "--push_to_hub", "me/robot"]
    return run("train_svd.py", *arguments, env=hub_environment(hub), **options)


def was_private(hub):
    asked = [json.loads(body) for path, body in hub.asked if path.endswith("/repos/create")]
    return all(a.get("private") is True or a.get("visibility") == "private" for a in asked)  # until, since version 2


def test_result_is_pushed_without_checkpoints(hub, dataset, tmp_path):
    done = push(hub, dataset, tmp_path / "out")
    assert "pushed to me/robot" in done.stdout
    assert {"model_index.json", "README.md", "unet/diffusion_pytorch_model.safetensors"} <= hub.files
    assert not [name for name in hub.files if "checkpoint" in name or name.startswith(".")]
    assert was_private(hub)


def test_a_push_that_fails_leaves_the_result_and_says_how_to_push_later(hub, dataset, tmp_path):
    hub.refuses = True
    done = push(hub, dataset, tmp_path / "out", ok=False)
    assert (tmp_path / "out" / "model_index.json").exists(), done.stdout
    hub.refuses, later = False, done.stdout.partition("to push it later: ")[2].splitlines()[0]
    environment = {**os.environ, **hub_environment(hub), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(later, shell=True, check=True, env=environment, timeout=100)  # it does what it says
    assert "model_index.json" in hub.files and not [name for name in hub.files if "checkpoint" in name]
    assert was_private(hub)


def test_what_cannot_be_pushed_is_refused_before_the_run(hub, dataset, tmp_path, capsys):
    arguments = [*map(str, train_arguments(dataset, tmp_path / "out"))]
    for name in ("robot", "me/robot.git"):
        with pytest.raises(SystemExit):
            train_svd.parse_args([*arguments, "--push_to_hub", name])
        assert f"--push_to_hub must have the form OWNER/NAME, got {name}" in capsys.readouterr().err
    done = run("train_svd.py", *arguments, "--push_to_hub", "me/robot", ok=False,
        env={"HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": ""})  # fmt: skip
    assert "hf auth login" in done.stdout and not (tmp_path / "out").exists()
    done = run("train_svd.py", *arguments, "--push_to_hub", "me/robot", ok=False, env={"HF_TOKEN": "hf_x"})
    assert "HF_HUB_OFFLINE is set" in done.stdout and not (tmp_path / "out").exists()
    hub.knows_token = False
    done = run("train_svd.py", *arguments, "--push_to_hub", "me/robot", ok=False, env=hub_environment(hub))
    assert "hf auth login" in done.stdout and not (tmp_path / "out").exists()


def test_card_names_base_and_licence(dataset, tmp_path):
    name = "stabilityai/stable-video-diffusion-img2vid-xt"
    base = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / "0"  # as the hub's cache has it
    shutil.copytree(TINY, base)
    arguments = train_arguments(dataset, tmp_path / "out", model=base)
    run("train_svd.py", *arguments, "--max_train_steps", 1)
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == name and card.data.base_model_relation == "finetune"
    assert card.data.license == "other" and card.data.license_name == "stable-video-diffusion-community"
    assert card.data.license_link == f"https://huggingface.co/{name}/blob/main/LICENSE.md"
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "image-to-video"
    assert str(tmp_path) not in card.content

    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")  # the base's own card comes first
    arguments = train_arguments(dataset, tmp_path / "other", model=base)
    run("train_svd.py", *arguments, "--max_train_steps", 1, "--base_model_name", "me/mine")
    card = huggingface_hub.ModelCard.load(tmp_path / "other" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.base_model == "me/mine"


@pytest.mark.parametrize("readme", [None, "---\nlicense: [other\n---\n", "---\n- a\n---\n", "\udcff"])
def test_a_copied_base_is_known_by_its_folder_whatever_its_card(tmp_path, readme):
    name = "stabilityai/stable-video-diffusion-img2vid-xt-1-1"
    base = tmp_path / name.partition("/")[2]
    shutil.copytree(TINY, base)
    if readme:
        (base / "README.md").write_bytes(readme.encode(errors="surrogateescape"))
    args = Namespace(base_model_name=None, pretrained_model_name=str(base))
    settings = {"base_model_name": find_base_name(args, base), "lora_rank": 0, "dataset_dir": str(tmp_path)}
    data = card_data(settings, base, "finetune")
    assert data.base_model == name and data.license_name == "stable-video-diffusion-1-1-community"


def test_a_base_that_was_fine_tuned_before_names_what_it_came_from(tmp_path):
    shutil.copytree(TINY, base := tmp_path / "outputs")
    args = Namespace(base_model_name=None, pretrained_model_name=str(base))
    assert find_base_name(args, base) is None  # never the folder
    (base / "README.md").write_text("---\nbase_model: me/first\n---\n")
    base_card.cache_clear()  # a run reads the card once
    assert find_base_name(args, base) == "me/first"
