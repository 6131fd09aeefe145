"""LoRA adapters: adds them to a UNet, saves, reads, checks and merges them."""

import math
import re
from pathlib import Path

from svd_parts.files import UserError, listed, read_json, write_json
from svd_parts.weights import (
    SETTINGS,
    SVD_NAMES,
    hub_errors,
    read_settings,
    safetensors_header,
    trained_marks,
    weight_files,
    weights_fingerprint,
    write_tensors,
)


def add_adapters(unet, options, generator):
    """Adds a LoRA of --lora_rank to the transformer blocks that --trainable names, in place, as peft does.

    Every linear layer gets one, except for the queries and keys of cross-attention: see WITHOUT_GRADIENT in unet.py.
    """
    import peft
    import torch

    blocks = "transformer_blocks" if options.trainable == "all" else "temporal_transformer_blocks"
    layers = rf".*{blocks}\..*\.(attn1\.to_q|attn1\.to_k|to_v|to_out\.0|proj|net\.2)"
    config = peft.LoraConfig(r=options.lora_rank, lora_alpha=options.lora_alpha, target_modules=layers)
    peft.inject_adapter_in_model(config, unet)
    for module in unet.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            down, up = module.lora_A["default"], module.lora_B["default"]
            start = torch.nn.init.kaiming_uniform_(torch.empty(down.weight.shape), math.sqrt(5), generator=generator)
            down.weight, up.weight = torch.nn.Parameter(start), torch.nn.Parameter(torch.zeros(up.weight.shape))


def adapter_forward(layer):
    """The forward pass of a peft LoRA layer, W x + b + scale * B A x, in the dtype of its input.

    peft's own forward also keeps its input in fp32, and four tensors as large as the output instead of one: training
    SVD-XT at 512x320x25 would need 7.8 GiB instead of 6.7.
    """
    import torch.nn.functional as F

    base, down, up, scale = (getattr(layer, n) for n in ("base_layer", "lora_A", "lora_B", "scaling"))
    down, up, scale = down["default"], up["default"], scale["default"]

    def forward(x):
        rows = x.flatten(0, -2)  # (N, in)
        low = F.linear(rows, down.weight.to(x.dtype))  # (N, rank)
        out = F.linear(rows, base.weight, base.bias).addmm_(low, up.weight.to(x.dtype).T, alpha=scale)
        return out.unflatten(0, x.shape[:-1])

    return forward


def save_adapter(folder, state, weights):
    """Saves the trained tensors `weights` of a LoRA as peft does, with the training's settings beside them."""
    config, settings = state.bare_unet.peft_config["default"], state.settings
    config.base_model_name_or_path = settings["base_model_name"]
    config.save_pretrained(folder)
    names = {name: "base_model.model." + name.replace(".default", "") for name in weights}
    tensors = {names[name]: tensor.detach().cpu() for name, tensor in weights.items()}
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(folder / SETTINGS, without_paths({**settings, "step": state.steps}))


def load_trained_weights(weights, trained, settings):
    """Copies trained tensors over those of the base, in the base's dtype, or adds a trained LoRA to them.

    weights: {name: tensor} of a UNet or of one of its files, changed in place. settings: those of the training.
    """
    import torch

    if settings.get("lora_rank"):
        return merge_adapter(weights, trained, lora_scale(settings))
    with torch.no_grad():
        for name in trained.keys() & weights.keys():
            weights[name].copy_(trained[name])


def merge_adapter(weights, adapter, scale):
    """Adds scale * B A of a LoRA (Hu et al. 2021) to the weights that it adapts, in place. The sum is made in fp32.

    weights: {"<layer>.weight": (out, in)} of a UNet or of one of its files. adapter: {"<layer>.lora_A.weight": (r, in),
    "<layer>.lora_B.weight": (out, r)}, named as in peft's files or as in a model with peft's adapters.
    """
    import torch

    adapter = {re.sub(r"^base_model\.model\.|\.default(?=\.)", "", name): tensor for name, tensor in adapter.items()}
    with torch.no_grad():
        for name in adapter:
            weight = weights.get(name.replace(".lora_A", "")) if ".lora_A" in name else None
            if weight is not None:
                update = adapter[name.replace("lora_A", "lora_B")].float() @ adapter[name].float()
                weight.copy_(weight.float() + scale * update.to(weight.device))


def lora_scale(config):
    """The factor of B A, from the fields of training_settings.json or of peft's adapter_config.json."""
    rank = config.get("lora_rank") or config["r"]
    return config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)


# Fields of peft's adapter_config.json that we understand or that change nothing. Other fields mean another method.
UNDERSTOOD = frozenset(
    """peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules
exclude_modules lora_alpha lora_dropout use_rslora layers_to_transform layers_pattern megatron_core
qalora_group_size""".split()
)
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # other initialisations also change the base


def read_lora(folder):
    """Reads a plain LoRA: (adapter_config.json, header of its weights). Raises `UserError` for any other folder."""
    config, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config.is_file():
        raise UserError(f"--lora {folder}: no {config.name} in it; give OUTPUT_DIR/lora of a training run")
    config, tensors = read_json(config), safetensors_header(file)
    special = [f"peft_type {config.get('peft_type')}"] * (config.get("peft_type") != "LORA")
    plain = {"init_lora_weights": PLAIN_STARTS, "bias": (None, "none")}
    for name, value in config.items():
        if name not in UNDERSTOOD and (value not in plain[name] if name in plain else value):
            special.append(name + (f" {value}" if isinstance(value, (str, int)) and value is not True else ""))
    numbers = (config.get(name) for name in ("r", "lora_alpha"))
    special += ["no r and lora_alpha"] * (not all(isinstance(n, (int, float)) and n > 0 for n in numbers))
    if special:
        cure = "merge it with peft, or convert it to a plain LoRA (path_initial_model_for_weight_conversion)"
        raise UserError(f"--lora {folder}: not a plain LoRA ({', '.join(special)}); {cure}")
    others = sorted(name for name in tensors if not re.search(r"\.lora_[AB]\.weight$", name))
    if others or not tensors:
        empty = f"damaged, it has no two matrices of rank {config['r']}"
        what = f"{listed(others)} in {file.name} does not belong to a plain LoRA; merge it with peft"
        raise UserError(f"--lora {folder}: {what if others else empty}")
    return config, tensors


def find_lora(name):
    """The folder of a LoRA: `name`, the lora/ in a training's output `name`, or a download of the hub's `name`."""
    folder = Path(name)
    if not folder.exists() and len(folder.parts) == 2 and not str(name).startswith((".", "~", "/")):
        from huggingface_hub import snapshot_download

        with hub_errors(name):
            wanted = [f"{folder}{file}" for folder in ("", "lora/") for file in ("adapter_*", SETTINGS, "actions/*")]
            folder = Path(snapshot_download(str(name), allow_patterns=wanted))
    nested = folder / "lora" / "adapter_config.json"
    return nested.parent if nested.is_file() and not (folder / "adapter_config.json").is_file() else folder


def check_shapes(folder, config, tensors, shapes, base):
    """Raises `UserError` if a LoRA's matrices are not pairs of its rank, or do not fit the `shapes` of the base."""
    for layer in sorted({name.rsplit(".lora_", 1)[0] for name in tensors}):
        down, up = (tensors.get(f"{layer}.lora_{side}.weight", {}).get("shape", []) for side in "AB")
        if len(down) > 2 and len(up) > 2:
            raise UserError(f"--lora {folder}: adapts a convolution, not only linear layers ({layer}); use peft itself")
        if len(down) != 2 or len(up) != 2 or down[0] != config["r"] or up[1] != config["r"]:
            raise UserError(f"--lora {folder}: damaged, {layer} has no two matrices of rank {config['r']}")
        name = layer.removeprefix("base_model.model.") + ".weight"
        if shapes and shapes.get(name) != [up[0], down[1]]:
            raise UserError(f"--lora {folder}: for another model: {base} has no {name} of this size")


def check_adapters(model, options):
    """Adds the LoRAs of --lora to the model's `adapters`. A model without settings takes those of the first LoRA.

    Reads no weights, only their shapes. Raises `UserError` for a LoRA that is missing, damaged or for another model.
    """
    shapes, settings, adapters = {}, model.settings, []
    for file in weight_files(model.base, "unet") if options.lora and not options.dry_run else ():
        shapes |= {name: tensor["shape"] for name, tensor in safetensors_header(file).items()}
    for folder in map(find_lora, options.lora):
        config, tensors = read_lora(folder)
        check_shapes(folder, config, tensors, shapes, model.base)
        adapters.append((folder / "adapter_model.safetensors", options.lora_scale * lora_scale(config)))
        known, here = config.get("base_model_name_or_path"), model.settings.get("base_model_name") or model.name
        if (folder / SETTINGS).is_file():
            found = read_settings(folder / SETTINGS, "delete it, or copy the folder again")
            if without_paths({**found, "step": 0}) == without_paths({**model.settings, "step": 0}):
                raise UserError(f"--lora {folder} is merged into --model_dir {model.name} already; leave it out")
            if shapes and found["base_fingerprint"] not in fingerprints_of(model):
                print(f"warning: --lora {folder} was trained on another base than {model.name} ({known or 'unnamed'})")
            settings = {**(settings or found), "marks": {**trained_marks(settings), **trained_marks(found)}}
            if found.get("actions"):  # the LoRA's folder holds their encoder
                settings = {**settings, "actions": found["actions"]}
        elif known and known in SVD_NAMES and str(here) in SVD_NAMES and known != here:
            print(f"warning: --lora {folder} was trained on {known}, not on {here}")
    return model._replace(adapters=adapters, settings=settings)


def fingerprints_of(model):
    """The fingerprints of the base that the model was trained from, and of the model itself."""
    return {model.settings.get("base_fingerprint"), weights_fingerprint(model.base, "unet")}


def without_paths(settings):
    """The settings of a run without paths of this machine: only the last part of each path stays."""
    folders = "dataset_dir output_dir validation_dir cache_dir pretrained_model_name resume_from_checkpoint".split()
    public = dict(settings)
    for name in folders:
        value = public.get(name)
        if isinstance(value, str) and (Path(value).is_absolute() or Path(value).exists()):
            public[name] = Path(value).name or Path(value).resolve().name
    for option in ("include", "exclude"):
        public[option] = [Path(name).name if Path(name).is_absolute() else name for name in public.get(option, [])]
    return public
