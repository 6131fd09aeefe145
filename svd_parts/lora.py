"""LoRA adapters: adds them to a UNet, saves, reads and merges them."""

import json
import math
import re
from pathlib import Path

from svd_parts.files import UserError, read_json, write_file
from svd_parts.weights import SETTINGS, read_settings, safetensors_header, weight_files, write_tensors


def add_adapters(unet, options, generator):
    """Puts a LoRA of --lora_rank into the transformer blocks that --trainable names, in place, as peft does it.

    Every linear layer there gets one, but the queries and keys of cross-attention: see WITHOUT_GRADIENT.
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
    """The forward pass of a peft LoRA layer, W x + b + scale * B A x, in its input's dtype.

    peft's own holds its input in fp32 too, and four tensors as large as the output where this holds one: training
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
    """A LoRA as peft itself saves it, and what it was trained with."""
    config, settings = state.bare_unet.peft_config["default"], state.settings
    config.base_model_name_or_path = settings["base_model_name"]
    config.save_pretrained(folder)
    names = {name: "base_model.model." + name.replace(".default", "") for name in weights}
    tensors = {names[name]: tensor.detach().cpu() for name, tensor in weights.items()}
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_file(folder / SETTINGS, json.dumps({**settings, "step": state.steps}, indent=1))


def load_trained_weights(weights, trained, settings):
    """Puts trained tensors in the place of the base's, whatever dtype these have; a LoRA is added to them.

    weights: {name: tensor} of a UNet or of one of its files, changed in place; settings: what it was trained with.
    """
    import torch

    if settings.get("lora_rank"):
        return add_adapter(weights, trained, lora_scale(settings))
    with torch.no_grad():
        for name in trained.keys() & weights.keys():
            weights[name].copy_(trained[name])


def add_adapter(weights, adapter, scale):
    """Adds scale * B A of a LoRA (Hu et al. 2021) to the weights that it is for, in place; the sum is made in fp32.

    weights: {"<layer>.weight": (out, in)} of a UNet or of one of its files; adapter: {"<layer>.lora_A.weight": (r, in),
    "<layer>.lora_B.weight": (out, r)}, named as in peft's files or as in a model that peft has adapters in.
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
    """What B A is multiplied by, from training_settings.json or from peft's adapter_config.json."""
    rank = config.get("lora_rank") or config["r"]
    return config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)


def read_lora(folder):
    """(adapter_config.json, the header of its weights) of a plain LoRA; raises `UserError` for any other folder."""
    config, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config.is_file():
        raise UserError(f"--lora {folder}: no {config.name} in it; give OUTPUT_DIR/lora of a training run")
    config, tensors = read_json(config), safetensors_header(file)
    special = [n for n in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save") if config.get(n)]
    special += [f"peft_type {config.get('peft_type')}"] * (config.get("peft_type") != "LORA")
    special += [f"bias {config.get('bias')}"] * (config.get("bias", "none") != "none")
    numbers = (config.get(name) for name in ("r", "lora_alpha"))
    special += ["no r and lora_alpha"] * (not all(isinstance(n, (int, float)) and n > 0 for n in numbers))
    if special:
        raise UserError(f"--lora {folder}: not a plain LoRA ({', '.join(special)}); peft itself can merge it")
    return config, tensors


def check_adapters(model, options):
    """The model with the LoRAs of --lora, and where it was not trained here, with what the first was trained with.

    Raises `UserError` for a folder that holds none, and for a LoRA that is not for this model, by the shapes alone.
    """
    shapes, settings, adapters = {}, model.settings, []
    for file in weight_files(model.base, "unet") if options.lora and not options.dry_run else ():
        shapes |= {name: tensor["shape"] for name, tensor in safetensors_header(file).items()}
    for folder in map(Path, options.lora):
        config, tensors = read_lora(folder)
        layers = sorted({name.rsplit(".lora_", 1)[0] for name in tensors})
        for layer in layers or [""]:
            down, up = (tensors.get(f"{layer}.lora_{side}.weight", {}).get("shape", []) for side in "AB")
            if len(down) != 2 or len(up) != 2 or down[0] != config["r"] or up[1] != config["r"]:
                raise UserError(f"--lora {folder}: damaged, {layer} has no two matrices of rank {config['r']}")
            name = layer.removeprefix("base_model.model.") + ".weight"
            if shapes and shapes.get(name) != [up[0], down[1]]:
                raise UserError(f"--lora {folder}: for another model: {model.base} has no {name} of its size")
        adapters.append((folder / "adapter_model.safetensors", options.lora_scale * lora_scale(config)))
        if (folder / SETTINGS).is_file():
            found = read_settings(folder / SETTINGS, "delete it, or copy the folder again")
            if {**found, "step": None} == {**model.settings, "step": None}:  # a result's or a checkpoint's
                raise UserError(f"--lora {folder} is merged into --model_dir {model.name} already; leave it out")
            settings = settings or found
    return model._replace(adapters=adapters, settings=settings)
