"""A model's folder: who can read what is written, and what other folders are called."""

import logging
import os

import pytest
import torch
from conftest import TINY

from svd_parts.files import UserError, inside
from svd_parts.weights import hub_errors, resolve_model, write_tensors


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
            logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 8s")
        raise OSError
    assert capsys.readouterr().err == "a/b: no good answer from the hub; trying again for half a minute\n"
