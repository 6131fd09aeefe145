"""The hub: names, tokens, the heads of model cards, and uploads."""

import contextlib
import functools
import re
import shlex
from pathlib import Path

import huggingface_hub
import yaml
from huggingface_hub.utils import validate_repo_id

from svd_parts.files import UserError, read_json
from svd_parts.weights import SVD_NAMES, read_config


def hub_name(path, kind):
    """OWNER/NAME of a local folder in the hub's cache, or None for other folders. kind: "models" or "datasets"."""
    found = re.search(rf"{kind}--([\w.-]+?)--([\w.-]+)", str(path))
    return "/".join(found.groups()) if found else None


def is_hub_name(name):
    """Whether this is OWNER/NAME, as the hub allows it."""
    with contextlib.suppress(ValueError):
        validate_repo_id(name)
        return "/" in str(name)
    return False


def is_token_valid():
    """Whether there is a token that the hub does not refuse. True, too, where the hub cannot be reached to ask."""
    if not huggingface_hub.get_token():
        return False
    try:
        huggingface_hub.HfApi().whoami()
    except Exception as error:  # the network and the hub raise errors of many kinds
        return getattr(getattr(error, "response", None), "status_code", None) != 401
    return True


@functools.lru_cache(maxsize=1)
def base_card(base):
    """The head of the base model's own card as a dict, read once a run. {} where no card can be read."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        text = (base / "README.md").read_text(encoding="utf-8")
        return huggingface_hub.ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    return {}


def find_base_name(options, base):
    """The base model's OWNER/NAME on the hub, never a local path. None where nothing tells it."""
    names = [hub_name(base.resolve(), "models"), options.pretrained_model_name]
    names += [name for name in SVD_NAMES if Path(name).name == base.resolve().name]  # a copy that has kept its name
    names += [base_card(base).get("base_model"), read_json(base / "model_index.json").get("_name_or_path")]
    names += [read_config(base, "unet").get("_name_or_path")]
    return options.base_model_name or next((n for n in names if is_hub_name(n) and not Path(n).exists()), None)


def card_data(settings, base, relation):
    """The head of a model card. The licence is that of the base: by its card, or Stability's for Stability's models."""
    name, there = settings["base_model_name"], base_card(base)
    data = {key: there[key] for key in ("license", "license_name", "license_link") if there.get(key)}
    if not data and str(name).startswith("stabilityai/stable-video-diffusion"):
        kind = "stable-video-diffusion-1-1-community" if name.endswith("1-1") else "stable-video-diffusion-community"
        data = {"license": "other", "license_name": kind, "license_link": "LICENSE.md"}
    if name and "license_link" in data and "://" not in data["license_link"]:
        data["license_link"] = f"https://huggingface.co/{name}/blob/main/{data['license_link']}"
    data |= {"base_model": name, "base_model_relation": relation} if name else {}
    tags = ["image-to-video", "stable-video-diffusion", *(["lora"] if settings["lora_rank"] else [])]
    library = "peft" if relation == "adapter" else "diffusers"
    datasets = hub_name(Path(settings["dataset_dir"]).resolve(), "datasets")
    return huggingface_hub.ModelCardData(**data, pipeline_tag="image-to-video", library_name=library, tags=tags,
        datasets=[datasets] if datasets else None)  # fmt: skip


NOT_UPLOADED = ["checkpoint-*", "damaged-*", "earlier-*", "best/*", ".*"]


def push_to_hub(options):
    """Uploads the result without its checkpoints to a repository of the hub. A new repository is private.

    A LoRA without a merged model goes to the top of the repository, where peft looks for it. Raises `UserError` with
    the command for a later upload.
    """
    name, output = options.push_to_hub, Path(options.output_dir)
    folder = output if options.save_merged else output / "lora"
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder), ignore_patterns=list(NOT_UPLOADED))
        if folder != output and (output / "validation").is_dir():  # the card links to these videos
            api.upload_folder(repo_id=name, folder_path=str(output / "validation"), path_in_repo="validation")
    except Exception as error:  # the network and the hub raise errors of many kinds
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        between = " " if huggingface_hub.__version__.startswith("0.") else " --exclude "
        skip = between.join(map(shlex.quote, NOT_UPLOADED))
        later = f"hf upload {name} {shlex.quote(str(folder))} . --private --exclude {skip}"
        raise UserError(f"--push_to_hub {name}: {why}; the result is in {output}; to push it later: {later}") from error
    print(f"pushed to {name}")
