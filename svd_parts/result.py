"""Writes the finished pipeline folder and its model card."""

import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file

from svd_parts.action_encoder import save_encoder, split_actions
from svd_parts.actions import FOLDER as ACTIONS
from svd_parts.files import printable, write_file, write_json
from svd_parts.hub import card_data
from svd_parts.lora import load_trained_weights, save_adapter, without_paths
from svd_parts.metrics import read_metrics
from svd_parts.page import as_url
from svd_parts.unet import trained_layers
from svd_parts.weights import MODEL_PARTS, PARTS, SETTINGS, read_config, weight_files, write_tensors


def save_result(state, base):
    """Writes the fine-tuned pipeline as a standard diffusers folder: the base's files, with the trained tensors.

    Frozen weights are copied from the base on disk. So they stay bitwise the same, whatever dtype they had in training,
    and no second model is built. Each file keeps the base's precision. model_index.json is written last. (diffusers'
    save_pretrained would write the local path into config.json, and would make other shards.) A LoRA is saved in
    `lora/` and merged into the pipeline; with --no-save_merged it is only saved.
    """
    output, options = Path(state.options.output_dir), state.options
    weights = dict(zip(state.trained, state.ema.shadow_params)) if state.ema else state.trained
    weights, encoder = split_actions(weights)
    aside = output / ".result.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    if options.lora_rank:
        save_adapter(aside / "lora", state, weights)
        write_file(aside / "lora" / "README.md", model_card(state, base, "adapter"))
    if encoder:
        for folder in [aside, aside / "lora"][: 1 + bool(options.lora_rank)]:
            save_encoder(folder / ACTIONS, encoder, state.settings["actions"])
    for part in PARTS if options.save_merged else ():
        (aside / part).mkdir(parents=True)
        stored = weight_files(base, part) if part in MODEL_PARTS else []
        for source in [*(base / part).glob("*.json"), *stored]:
            target = aside / part / source.name.replace(".fp16", "")
            if ".index" in source.name:
                text = source.read_text(encoding="utf-8")
                if all(file.name in text for file in stored):
                    write_file(target, text.replace(".fp16", ""))
            elif part == "unet" and source in stored:
                load_trained_weights(tensors := load_file(source), weights, state.settings)
                write_tensors(target, tensors, {"format": "pt"})
            else:
                shutil.copyfile(source, target)
    if options.save_merged:  # else transformers would load fp16 by default, beside diffusers' fp32
        config = {**read_config(base, "image_encoder"), "dtype": "float32"}
        write_file(aside / "image_encoder" / "config.json", json.dumps(config, indent=2))
        (output / "model_index.json").unlink(missing_ok=True)  # without it, the folder counts as not finished
    for part in list(aside.iterdir()):
        shutil.rmtree(output / part.name, ignore_errors=True)  # the result from before this run was resumed
        os.replace(part, output / part.name)
    aside.rmdir()
    write_json(output / SETTINGS, without_paths({**state.settings, "step": state.steps}))
    write_file(output / "README.md", model_card(state, base, "finetune" if options.save_merged else "adapter"))
    if options.save_merged:
        write_file(output / "model_index.json", (base / "model_index.json").read_text())


def model_card(state, base, relation="finetune"):
    """The README of the result, in the hub's format: base, data, settings, last validation, samples.

    relation: how the result relates to its base: "finetune" for a whole model, "adapter" for a LoRA.
    """
    settings, output = state.settings, Path(state.options.output_dir)
    scores = next((line for line in reversed(read_metrics(output)) if "validation_loss_v" in line), {})
    numbers = {name.removeprefix("validation_"): value for name, value in scores.items() if value is not None}
    table = "".join(f"| {name} | {value:.4g} |\n" for name, value in numbers.items())
    videos = sorted((output / "validation").glob(f"step-{scores.get('step', 0):06d}/*.mp4"))
    samples = "".join(f"- [{printable(video.name)}]({as_url(video.relative_to(output))})\n" for video in videos)
    what = "{num_clips} clips, {steps} steps of {global_batch_size}, {width}x{height}, {num_frames} frames; trained:"
    what += " {layers}. Median fps {median_fps:g}, median motion_bucket_id {median_motion_bucket_id:g}: use these."
    what = what.format(steps=state.steps, layers=trained_layers(state.options), **settings)
    text = f"---\n{card_data(settings, base, relation).to_yaml()}\n---\n"
    text += f"\n# Stable Video Diffusion, fine-tuned\n\n{what} All settings: {SETTINGS}.\n"
    text += snippet(state, relation)
    if scores:
        text += f"\n| held-out clips | real beside generated |\n|---|---|\n{table}\n{samples}"
    return text


def snippet(state, relation):
    """The part of the card that shows how to load the result."""
    options = state.options
    name = options.push_to_hub or Path(options.output_dir).absolute().name
    base = state.settings["base_model_name"] or "BASE_MODEL"
    if relation == "adapter":
        code = "import peft\nfrom diffusers import StableVideoDiffusionPipeline\n\n"
        code += f'pipe = StableVideoDiffusionPipeline.from_pretrained("{base}")\n'
        code += f'pipe.unet = peft.PeftModel.from_pretrained(pipe.unet, "{name}").merge_and_unload()\n'
        command = f"python infer_svd.py --model_dir {base} --lora {name} ..."
    else:
        code = "from diffusers import StableVideoDiffusionPipeline\n\n"
        code += f'pipe = StableVideoDiffusionPipeline.from_pretrained("{name}")\n'
        command = f"python infer_svd.py --model_dir {name} ..."
    return f"\n```python\n{code}```\n\nOr by the scripts that trained it: `{command}`\n"
