"""Finds a model's folder, checks it, says what is wrong with it, and fingerprints its weights."""

import contextlib
import difflib
import errno
import hashlib
import json
import logging
import os
import re
import sys
from pathlib import Path

from svd_parts.files import UserError, inside, natural_key, read_json, replacing

PARTS = ("unet", "vae", "image_encoder", "scheduler", "feature_extractor")
MODEL_PARTS = PARTS[:3]
CLIP_CONFIG = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120}
VAE_CONFIG = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4, "layers_per_block": 2}
SVD_XT_CONFIG = {  # as published; only fields that differ from the classes' defaults. A plan needs no more.
    "unet": {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 1024, "num_frames": 25},
    "vae": {"down_block_types": ["DownEncoderBlock2D"] * 4, **VAE_CONFIG},
    "image_encoder": {"patch_size": 14, "projection_dim": 1024, **CLIP_CONFIG},
}
SVD_NAMES = [f"stabilityai/stable-video-diffusion-img2vid{kind}" for kind in ("", "-xt", "-xt-1-1")]
CHECKPOINT_STATE = "training_state.json"  # every checkpoint of train_svd.py has this file
SETTINGS = "training_settings.json"  # every result has this file: the settings of its training
ON_MODELSCOPE = dict(zip(SVD_NAMES, ("stable-video-diffusion-img2vid-fp16", "stable-video-diffusion-img2vid-xt")))
WAYS_TO_GET_WEIGHTS = (
    "accept the licence at https://huggingface.co/{name} , then: pip install -U huggingface_hub && hf auth login",
    "in mainland China: export HF_ENDPOINT=https://hf-mirror.com HF_TOKEN=hf_... , then run the same command again",
    """in mainland China, without an account: pip install modelscope, then
     modelscope download AI-ModelScope/{short} --local-dir ./{short}{files}
     and give ./{short} in place of the name (the same licence holds)""",
    """download the folder on another machine (hf download {name} --exclude "svd*.safetensors"), copy it here whole,
     and give the folder's path in place of the name (infer_svd.py, for a checkpoint: as --base_model)""",
)
AWAY = "the hub cannot be reached ({}), and the model is not in the cache: check the network, or set HTTPS_PROXY"
NEEDED = (
    "give a whole diffusers folder of Stable Video Diffusion (model_index.json, unet/, vae/, ...): hf"
    " download stabilityai/stable-video-diffusion-img2vid-xt --exclude 'svd*.safetensors'"
    " --local-dir ./stable-video-diffusion-img2vid-xt"
)


def resolve_model(name):
    """The local folder of the complete diffusers pipeline that `name`, a hub name or local folder, stands for.

    Downloads it if needed. Raises a `UserError` that says what is missing and how to get it. Reads no pickled weights.
    """
    folder = local_folder(name) or download_model(str(name))
    for part in PARTS:
        if part in MODEL_PARTS:
            read_config(folder, part)
            weight_files(folder, part)
        elif not list((folder / part).glob("*.json")):
            raise UserError(f"{folder}: {part}/ has no configuration (.json); copy the folder again, whole")
        for file in (folder / part).glob("*.json"):
            read_json(file)
    return folder


def resolve_config(name):
    """The folder with the configuration of a model's parts, or SVD_XT_CONFIG for SVD itself. Needs no weights."""
    from huggingface_hub import hf_hub_download

    if folder := local_folder(name):
        return folder
    known = str(name) in SVD_NAMES  # planning then needs no network: the hub's cache or SVD_XT_CONFIG is enough
    try:
        with hub_errors(name):
            paths = [hf_hub_download(str(name), f"{part}/config.json", local_files_only=known) for part in MODEL_PARTS]
        return Path(paths[0]).parent.parent
    except UserError:
        if known:
            return SVD_XT_CONFIG
        raise


def local_folder(name):
    """The pipeline folder `name`, or None if `name` is a hub name. Raises `UserError` for anything else."""
    path = Path(name)
    looks_local = path.is_absolute() or str(name).startswith((".", "~")) or len(path.parts) != 2
    if not (looks_local or path.exists() or path.parent.is_dir()):
        return None
    if not (path / "model_index.json").is_file():
        raise UserError(f"{path}: {describe(path)}")
    check_pipeline(path / "model_index.json", path)
    return path


def check_pipeline(index, name):
    """Refuses the model_index.json of another pipeline (Stable Diffusion 1.5, SDXL, ...)."""
    found = read_json(index).get("_class_name") or "pipeline without a name"
    if not str(found).startswith("StableVideoDiffusion"):
        raise UserError(f"{name}: is a {found}, not a StableVideoDiffusionPipeline; {NEEDED}")


LORA = "a LoRA, which is not a whole model: give it to infer_svd.py as --lora"


def describe(path):
    """Says what a path is if it is no pipeline folder, and what to give instead."""
    if not path.exists():
        return "no such model folder (and not a hub name, which has the form owner/name)"
    if (path / CHECKPOINT_STATE).is_file():
        return "a checkpoint of train_svd.py, not a whole model; go on from it with --resume_from_checkpoint"
    dataset = "a dataset ({}), not a model; give the --output_dir of its training, or a base model"
    if path.is_dir() and ((path / "metadata.jsonl").is_file() or (path / ".prepare").is_dir()):
        return dataset.format("metadata.jsonl")
    if path.name == "lora" and (path / "adapter_config.json").is_file():
        return LORA
    patterns = ("*", "snapshots/*", "*/snapshots/*")  # the last two: the hub's cache
    for index in sorted(found for pattern in patterns for found in path.glob(f"{pattern}/model_index.json")):
        return f"no pipeline, but it contains one: give {index.parent}"
    if (path.resolve().parent / "model_index.json").is_file():
        return f"one part of a pipeline; give the whole folder, {path.parent}"
    for newest in sorted(path.glob("checkpoint-*"), key=lambda folder: natural_key(folder.name))[-1:]:
        return f"no finished diffusers pipeline here (model_index.json is missing); its newest checkpoint is {newest}"
    for frame in (file for file in path.glob("*/*") if file.suffix.lower() in (".png", ".jpg", ".jpeg")):
        return dataset.format(frame.relative_to(path))
    files = [path] if path.is_file() else [f for pattern in ("*", "*/*", "*/*/*") for f in sorted(path.glob(pattern))]
    weights = [file for file in files if file.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin")]
    if not weights:
        return f"no diffusers pipeline here (model_index.json is missing); {NEEDED}"
    if weights[0].suffix != ".safetensors":
        return f"pickled weights ({weights[0].name}), which are never loaded: unpickling runs code; {NEEDED}"
    names, what = "".join(safetensors_header(weights[0])), "the weights of one part of a model"
    if "lora" in names:
        what = LORA
    elif "diffusion_model." in names:
        what = "weights in one file, as ComfyUI takes them"
    return f"{what} ({weights[0].name}); {NEEDED}"


def download_model(name):
    """Downloads a pipeline of the hub, or finds it in the cache: in full precision, or in fp16 if there is no other."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with hub_errors(name):
        check_pipeline(Path(hf_hub_download(name, "model_index.json")), name)  # before gigabytes are downloaded
        with contextlib.suppress(EntryNotFoundError):  # files of a model that was trained with train_svd.py
            for file in (SETTINGS, "actions/actions.json", "actions/encoder.safetensors"):
                hf_hub_download(name, file)
        from diffusers import DiffusionPipeline

        try:
            return Path(DiffusionPipeline.download(name, use_safetensors=True))
        except OSError as error:
            if "safetensors" not in str(error):
                raise
            return Path(DiffusionPipeline.download(name, variant="fp16", use_safetensors=True))


def ways_to_get(name):
    """The ways to get the weights of a model of the hub, numbered, as text. Only SVD's own are on ModelScope, too."""
    short = ON_MODELSCOPE.get(str(name))
    ways = (way for way in WAYS_TO_GET_WEIGHTS if short or "modelscope" not in way)
    files = ' --include "*.json" "*.fp16.safetensors"' if name == SVD_NAMES[1] else ""  # it has three kinds of files
    lines = (f"  {number}. {way.format(name=name, short=short, files=files)}" for number, way in enumerate(ways, 1))
    return "Ways to get the weights:\n" + "\n".join(lines)


@contextlib.contextmanager
def hub_errors(name):
    """Turns an error of the hub into a `UserError` that says what to do. A full or read-only disk stays an `OSError`.

    The hub's own errors are also Python's OSError or ValueError; those of httpx are not. One line stands for the two
    that the hub's client logs at each of its five retries.
    """
    from huggingface_hub import errors

    logger, told = logging.getLogger("huggingface_hub.utils._http"), []

    def once(record):
        if not re.search("thrown while requesting|[Rr]etry", record.getMessage()):
            return True
        if not told:
            print(f"{name}: no good answer from the hub; trying again for half a minute", file=sys.stderr, flush=True)
        return bool(told.append(True))  # False: the client's own line is not shown

    logger.addFilter(once)
    try:
        yield
    except (OSError, ValueError, getattr(sys.modules.get("httpx"), "HTTPError", OSError)) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EROFS, errno.EACCES):
            raise
        near = difflib.get_close_matches(str(name), SVD_NAMES, n=1, cutoff=0.8)
        unknown = "no folder here and no model of the hub, or a private one and no login"
        gated = f"the weights are gated: no login, or its licence is not accepted yet. {ways_to_get(name)}"
        away = f"{AWAY.format(type(error).__name__)}. {ways_to_get(name)}"
        for kind, text in (
            (errors.GatedRepoError, gated),
            (errors.RepositoryNotFoundError, unknown + (f"; is it {near[0]}?" if near else "")),
            (errors.LocalEntryNotFoundError, away),
            (errors.EntryNotFoundError, f"on the hub, but no diffusers pipeline; {NEEDED}"),
            (ValueError, "not usable from the hub ({})".format(str(error).partition("\n")[0])),
            (Exception, away),
        ):
            if isinstance(error, kind):
                raise UserError(f"{name}: {text}") from None
    finally:
        logger.removeFilter(once)


def read_config(folder, part):
    """`<folder>/<part>/config.json` as a dict. Raises `UserError` if it is missing or damaged."""
    if isinstance(folder, dict):
        return folder[part]
    try:
        config = read_json(Path(folder) / part / "config.json")
    except FileNotFoundError:
        raise UserError(f"{folder}: {part}/config.json is missing; copy the model folder again, whole") from None
    if part in ("unet", "vae") and not isinstance(config.get("block_out_channels"), list):
        raise UserError(f"{folder}: {part}/config.json is not whole; copy the model folder again")
    return config


def weight_files(folder, part):
    """The safetensors files of a part: those in full precision, or in fp16 if there are no others.

    Raises `UserError` if the files are missing, only pickled, git-lfs pointers or cut off.
    """
    folder, stem = Path(folder) / part, "model" if part == "image_encoder" else "diffusion_pytorch_model"
    for variant in ("", ".fp16"):
        single, index = f"{stem}{variant}.safetensors", folder / f"{stem}.safetensors.index{variant}.json"
        files = [folder / single] if (folder / single).exists() else []
        if index.exists():
            names = read_json(index, "download it again").get("weight_map")
            names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
            files = [folder / inside(name, index) for name in names]
        for file in files:
            safetensors_header(file)
        if files:
            return files
    pickled = [file.name for file in folder.glob("*.bin")]
    why = f"only pickled weights ({pickled[0]}), never loaded, as unpickling runs code" if pickled else "no weights"
    raise UserError(f"{folder}: {why}; download {stem}.safetensors or {stem}.fp16.safetensors into this folder")


def safetensors_header(file):
    """The header of a safetensors file: {tensor name: {dtype, shape, data_offsets}}, offsets from the file's start.

    Raises `UserError` if the file is missing, a git-lfs pointer, damaged, or shorter than its header says.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with open(file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            if size.to_bytes(8, "little") == b"version ":
                raise UserError(f"{file}: a git-lfs pointer, not the weights; run `git lfs pull`, or download the file")
            with safe_open(file, "np"):  # checks the header, and the file's length against it
                header = json.loads(opened.read(size))
    except FileNotFoundError:
        raise UserError(f"{file}: missing; download it into this folder") from None
    except SafetensorError as error:
        raise UserError(f"{file}: cut off or damaged ({error}); download it again") from None
    header.pop("__metadata__", None)
    for tensor in header.values():
        tensor["data_offsets"] = [8 + size + offset for offset in tensor["data_offsets"]]
    return header


def weights_fingerprint(folder, part):
    """A hash of the first 4 KB of every tensor: it tells two sets of weights apart without reading gigabytes.

    The bytes are read by their offsets, since safetensors needs torch for bf16, and torch takes seconds to load.
    """
    digest = hashlib.sha256()
    for file in weight_files(folder, part):
        with open(file, "rb") as opened:
            for name, tensor in sorted(safetensors_header(file).items()):
                start, end = tensor["data_offsets"]
                opened.seek(start)
                digest.update(f"{name} {tensor['dtype']} {tensor['shape']}".encode())
                digest.update(opened.read(min(end - start, 4096)))
    return digest.hexdigest()[:16]


def latent_factor(vae_config):
    """How many pixels of the image's side make one of the latents' side: 8 for SVD."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def size_multiple(folder):
    """Width and height must be multiples of this: the VAE's factor times the UNet's downsampling, 64 for SVD."""
    return latent_factor(read_config(folder, "vae")) * 2 ** (len(read_config(folder, "unet")["block_out_channels"]) - 1)


def check_sizes(options, folder):
    """Raises `UserError` for a --width or --height that the model cannot take, by its configuration."""
    multiple = size_multiple(folder)
    for flag, value in (("--width", options.width), ("--height", options.height)):
        if value > 16384:
            raise UserError(f"{flag} must be at most 16384, got {value}")
        if value % multiple:
            near = max(multiple, round(value / multiple) * multiple)
            wanted = f"must be a multiple of {multiple} for this model"
            raise UserError(f"{flag} {wanted}, got {value}; the nearest is {near}")


def write_tensors(path, tensors, metadata=None):
    """Writes a safetensors file, whole or not at all. Raises `OSError` if the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with replacing(path) as aside:
            aside.touch()
            mode = aside.stat().st_mode & 0o777  # as of any new file here; safetensors lets only the owner read its own
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata)
            os.chmod(aside, mode)
    except SafetensorError as error:
        raise OSError(errno.ENOSPC, f"cannot be written ({error})", str(path)) from error


def encoders_fingerprint(base):
    """A hash of the VAE and CLIP, which make the cache: it tells caches of different models apart."""
    return "-".join(weights_fingerprint(base, part)[:8] for part in ("vae", "image_encoder"))


SETTINGS_EXAMPLE = {"width": 512, "height": 320, "num_frames": 14, "median_fps": 7, "median_motion_bucket_id": 127}
SETTINGS_EXAMPLE |= {"motion_bucket_id_range": [0, 255], "pretrained_model_name": "", "base_fingerprint": ""}
SETTINGS_EXAMPLE |= {"use_ema": False, "lora_rank": 0, "lora_alpha": 0, "trained_on": {}, "held_out": {}, "marks": {}}


def trained_marks(settings):
    """{digest or recording: name} of the clips that a model and its base were trained on, from its settings."""
    digests = {digest: name for name, digest in settings.get("trained_on", {}).items() if digest}
    return {**settings.get("marks", {}), **digests}


def read_settings(path, cure):
    """Reads the settings of a training from a result's or a checkpoint's file. Raises `UserError` if it is damaged."""

    def kind(value):
        return [kind(one) for one in value] if isinstance(value, list) else {int: float}.get(type(value), type(value))

    settings = read_json(path, cure)
    if path.name == CHECKPOINT_STATE:  # must have all that is needed to find its base
        found, needed = settings.get("settings"), ("pretrained_model_name", "base_fingerprint", "use_ema")
        settings = {"step": settings.get("step"), **dict.fromkeys(needed), **(found if isinstance(found, dict) else {})}
    for field in settings.keys() & SETTINGS_EXAMPLE:
        if kind(settings[field]) != kind(SETTINGS_EXAMPLE[field]):
            value = json.dumps(settings[field])[:60]
            raise UserError(f"{path}: damaged, its {field} is {value}; {cure}")
    return settings
