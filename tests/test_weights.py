"""A model's folder: who can read what is written, and what other folders are called."""

import http.server
import json
import logging
import os
import re
import shutil
import threading

import numpy as np
import pytest
import torch
from conftest import TINY, run
from PIL import Image

import svd_common as common
from svd_parts.files import UserError, inside
from svd_parts.weights import CHECKPOINT_STATE, hub_errors, resolve_model, write_tensors


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_others_can_read_weights_as_the_umask_says(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(3)})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == mode


def test_a_dataset_is_called_a_dataset(tmp_path):
    (tmp_path / "metadata.jsonl").write_text("{}")
    with pytest.raises(UserError, match="a dataset .metadata.jsonl., not a model"):
        resolve_model(tmp_path)
    frames = tmp_path / "frames"  # without metadata.jsonl, and trained on once
    for name in (".cache/96x64/a.safetensors", "a/00000.png"):
        (frames / name).parent.mkdir(parents=True)
        (frames / name).write_bytes(b"")
    with pytest.raises(UserError, match="a dataset .a/00000.png., not a model"):
        resolve_model(frames)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "C:x", "\\\\host\\x", "..", "", None, 3, "a\0b"])
def test_nothing_read_from_a_file_leads_outside_its_folder(name):
    with pytest.raises(UserError, match="metadata.jsonl names .* not inside its folder"):
        inside(name, "metadata.jsonl")
    assert inside("a/b c.png", "x") == "a/b c.png"


def test_a_weight_index_that_leads_outside_is_refused(tmp_path):
    import shutil

    shutil.copytree(TINY, tmp_path / "m")
    (tmp_path / "m/unet/diffusion_pytorch_model.safetensors").unlink()
    index = tmp_path / "m/unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../../x.safetensors"}}')
    with pytest.raises(UserError, match="which is not inside its folder"):
        resolve_model(tmp_path / "m")


def test_the_hubs_retries_are_told_in_one_line_and_the_first_cure_is_the_network(capsys):
    with pytest.raises(UserError, match="check the network, or set HTTPS_PROXY"), hub_errors("a/b"):
        for _ in range(5):
            logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 8s [Retry 1/5].")
        raise OSError
    assert capsys.readouterr().err == "a/b: no good answer from the hub; trying again for half a minute\n"


def test_other_lines_of_the_hub_are_no_trouble(capsys, caplog):
    with hub_errors("a/b"):
        logging.getLogger("huggingface_hub.utils._http").warning("You are sending unauthenticated requests.")
    assert "unauthenticated" in caplog.text and "no good answer" not in capsys.readouterr().err


@pytest.mark.parametrize("name, folder", [
    ("stabilityai/stable-video-diffusion-img2vid-xt", "stable-video-diffusion-img2vid-xt"),
    ("stabilityai/stable-video-diffusion-img2vid", "stable-video-diffusion-img2vid-fp16"),
    ("stabilityai/stable-video-diffusion-img2vid-xt-1-1", None), ("me/mine", None),
])  # fmt: skip
def test_modelscope_is_named_for_the_models_that_it_has(name, folder):
    with pytest.raises(UserError) as error, hub_errors(name):
        raise OSError
    found = re.search(r"modelscope download AI-ModelScope/(\S+) --local-dir \./(\S+)", str(error.value))
    assert (found and found.groups()) == (folder and (folder, folder))
    assert re.findall(r"^  (\d)\.", str(error.value), re.M) == list("1234" if folder else "123")


def test_what_is_no_pipeline_is_called_what_it_is(trained, tmp_path):
    from safetensors.numpy import save_file

    def refused(path):
        with pytest.raises(UserError) as error:
            resolve_model(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    one = {"a": np.zeros(1, np.float32)}
    comfy = tmp_path / "comfy" / "models" / "checkpoints"
    comfy.mkdir(parents=True)
    save_file({"model.diffusion_model.x": one["a"]}, comfy / "svd_xt.safetensors")
    for path in (comfy / "svd_xt.safetensors", comfy, tmp_path / "comfy"):
        assert "weights in one file, as ComfyUI takes them (svd_xt.safetensors)" in refused(path)
    (tmp_path / "old.ckpt").write_bytes(b"x")
    assert "pickled" in refused(tmp_path / "old.ckpt")
    (tmp_path / "lora").mkdir()
    save_file({"unet.lora_A.weight": one["a"]}, tmp_path / "lora" / "adapter_model.safetensors")
    assert "a LoRA" in refused(tmp_path / "lora")
    shutil.copytree(TINY / "unet", tmp_path / "bare" / "unet")
    assert "one part of a model" in refused(tmp_path / "bare" / "unet")
    assert f"one part of a pipeline; give the whole folder, {TINY}" in refused(TINY / "unet")
    shutil.copytree(TINY, tmp_path / "sd15")
    index = tmp_path / "sd15" / "model_index.json"
    assert f"give {tmp_path / 'sd15'}" in refused(tmp_path)
    index.write_text(index.read_text().replace("StableVideo", "Stable"))
    assert "a StableDiffusionPipeline, not a StableVideoDiffusionPipeline" in refused(tmp_path / "sd15")
    index.write_text("[]")
    assert "damaged" in refused(tmp_path / "sd15")
    assert "--resume_from_checkpoint" in refused(trained / "checkpoint-3")
    (tmp_path / "empty").mkdir()
    assert "no diffusers pipeline here" in refused(tmp_path / "empty")


@pytest.fixture
def hub(tmp_path):
    """A hub that knows a gated model, another pipeline and a repository of single files, and no other."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, code, body = 401, "RepoNotFound", b""
            if self.path.startswith("/stabilityai/gated/"):
                status, code = 403, "GatedRepo"
            elif self.path.startswith("/stabilityai/files/"):
                status, code = 404, "EntryNotFound"
            elif self.path.startswith("/stabilityai/sd15/"):
                status, code, body = 200, "", b'{"_class_name": "StableDiffusionPipeline"}'
            self.send_response(status)
            for name, value in {"X-Error-Code": code, "Content-Length": len(body), "ETag": '"a"'}.items():
                self.send_header(name, str(value))
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "0",
    }
    server.shutdown()


@pytest.mark.parametrize(
    "name, message",
    [
        ("stabilityai/stable-video-difusion-img2vid", "is it stabilityai/stable-video-diffusion-img2vid?"),
        ("stabilityai/gated", "licence"),
        ("stabilityai/files", "no diffusers pipeline"),
        ("stabilityai/sd15", "a StableDiffusionPipeline, not a StableVideoDiffusionPipeline"),
        ("https://huggingface.co/stabilityai/gated", "owner/name"),
    ],
)
def test_what_the_hub_answers_is_told_rightly(name, message, hub, tmp_path):
    Image.new("RGB", (96, 64)).save(tmp_path / "x.png")
    arguments = ["--input_image", tmp_path / "x.png", "--output_video", tmp_path / "x.mp4", "--model_dir", name]
    done = run("infer_svd.py", *arguments, ok=False, env=hub)
    assert message in done.stdout and ("HF_ENDPOINT" in done.stdout) == (name == "stabilityai/gated")


def test_a_checkpoint_finds_its_base_after_a_move(trained, tmp_path):
    """The base lies elsewhere: beside the run, where the option says, or nowhere, which is one line."""
    checkpoint = tmp_path / "models" / "run" / "checkpoint-6"
    shutil.copytree(trained / "checkpoint-6", checkpoint)
    state_file = checkpoint / CHECKPOINT_STATE
    state = json.loads(state_file.read_text())
    state["settings"]["pretrained_model_name"] = str(tmp_path / "before" / "models" / "svd")
    state_file.write_text(json.dumps(state))
    shutil.copytree(trained, tmp_path / "models" / "run" / "svd")  # the right name, and other weights
    with pytest.raises(UserError, match=r"before/models/svd.*--base_model"):
        common.resolve_checkpoint(checkpoint)
    assert common.resolve_checkpoint(checkpoint, base=TINY)[0] == TINY
    with pytest.raises(UserError, match="another base.*--base_model"):
        common.resolve_checkpoint(checkpoint, base=trained)
    shutil.copytree(TINY, tmp_path / "models" / "svd")
    assert common.resolve_checkpoint(checkpoint)[0] == tmp_path / "models" / "svd"
