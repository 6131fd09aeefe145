"""The model card, and pushing a result to a stand-in for the hub on this machine."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import TINY, run, train_arguments

pytest.importorskip("torch")
import huggingface_hub


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
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"id": "me/robot", "siblings": [], "sha": "0" * 40}).encode())

    def log_message(self, *_):
        pass


@pytest.fixture()
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.asked, server.refuses = set(), [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def push(hub, dataset, output, **options):
    arguments = [*train_arguments(dataset, output), "--max_train_steps", 2, "--push_to_hub", "me/robot"]
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"}
    return run("train_svd.py", *arguments, env={**environment, "HF_HUB_DISABLE_XET": "1"}, **options)


def test_result_is_pushed_without_checkpoints(hub, dataset, tmp_path):
    done = push(hub, dataset, tmp_path / "out")
    assert "pushed to me/robot" in done.stdout
    assert {"model_index.json", "README.md", "unet/diffusion_pytorch_model.safetensors"} <= hub.files
    assert not [name for name in hub.files if "checkpoint" in name or name.startswith(".")]
    created = next(body for path, body in hub.asked if path.endswith("/repos/create"))
    asked = json.loads(created)
    assert asked.get("private") is True or asked.get("visibility") == "private"  # before and since huggingface_hub 2


def test_a_push_that_fails_leaves_the_result_and_says_how_to_push_later(hub, dataset, tmp_path):
    hub.refuses = True
    done = push(hub, dataset, tmp_path / "out", ok=False)
    assert f"hf upload me/robot {tmp_path / 'out'}" in done.stdout
    assert (tmp_path / "out" / "model_index.json").exists()


def test_what_cannot_be_pushed_is_refused_before_the_run(dataset, tmp_path):
    arguments = train_arguments(dataset, tmp_path / "out")
    done = run("train_svd.py", *arguments, "--push_to_hub", "robot", ok=False)
    assert "--push_to_hub must have the form OWNER/NAME, got robot" in done.stdout
    done = run("train_svd.py", *arguments, "--push_to_hub", "me/robot", ok=False,
        env={"HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": ""})  # fmt: skip
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
