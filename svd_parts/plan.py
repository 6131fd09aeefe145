"""The plan of a run, for --dry_run: memory, disk and time, and what would fit a smaller card."""

import json
import math
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from svd_parts.checkpoints import checkpoints_of
from svd_parts.dataset import list_clips, warn_of_crop
from svd_parts.files import UserError, counted
from svd_parts.forecast import choose_checkpointing, forecast, forecast_clip
from svd_parts.memory import advice, smaller_memory, usable_memory, why_no_cuda
from svd_parts.optimizers import optimizer_bytes
from svd_parts.timing import print_clip_time, print_training_time
from svd_parts.unet import compute_dtype, trained_layers
from svd_parts.weights import (
    MODEL_PARTS,
    check_sizes,
    latent_factor,
    read_config,
    resolve_config,
    size_multiple,
    weight_files,
)


def print_training_plan(options, device):
    """Prints the plan of a training run. The last line is one JSON object."""
    folder, weight_dtype = resolve_config(options.pretrained_model_name), compute_dtype(options.mixed_precision)
    check_sizes(options, folder)
    available = usable_memory(device) if device.type == "cuda" else 0
    mode = choose_checkpointing(options, folder, weight_dtype, available)
    plan = forecast(options, folder, mode, weight_dtype, count_flops=True)
    clips, held_out = [], options.num_validation_videos
    if Path(options.dataset_dir).is_dir():
        clips = list_clips(options.dataset_dir)
    else:
        print(f"--dataset_dir {options.dataset_dir}: no such folder, so its frames are not in these numbers")
    if options.validation_dir and Path(options.validation_dir).is_dir():
        validation = list_clips(options.validation_dir)[: options.num_validation_videos or None]
        clips, held_out = [*clips, *validation], len(validation)
    frames = sum(len(clip["frames"]) for clip in clips)
    warn_of_crop(clips, options.width, options.height, size_multiple(folder))
    plan |= disk_space(options, folder, frames, plan)
    size = f"{options.width}x{options.height}, {options.num_frames} frames, batch {options.train_batch_size}"
    what = f"{plan['trainable_parameters'] / 1e6:.1f} M parameters ({trained_layers(options)})"
    what += f" of {options.pretrained_model_name}"
    print(f"trains {what}, {size}, {options.mixed_precision}, {options.optimizer}, gradient checkpointing {mode}")
    for name in ("weights", "gradients", "optimizer", "activations"):
        print(f"  {name:12s} {plan[f'{name}_gib']:8.2f} GiB" + (" at the peak" if name == "activations" else ""))
    print(f"  peak         {plan['peak_memory_gib']:8.2f} GiB, and about 0.6 GiB for CUDA itself")
    print(f"  validation   {plan['validation_gib']:8.2f} GiB, if the run has one")
    print(f"  a step       {plan['flops_per_step'] / 1e12:8.2f} TFLOP")
    cache, each = f"{plan['cache_gib']:.2f} GiB for {frames} frames", f"{plan['checkpoint_gib']:.2f} GiB a checkpoint"
    at_once = f"(up to {options.checkpoints_total_limit + 1} at once)"
    print(f"  disk: cache {cache}, {each} {at_once}, result {plan['output_gib']:.2f} GiB")
    if device.type != "cuda":
        print(f"no CUDA GPU to compare with ({why_no_cuda()}): the card needs more memory than the peak")
    else:
        fits = plan["peak_memory_gib"] <= available
        print(f"{'fits' if fits else 'does not fit'} {torch.cuda.get_device_name()}: {available:.1f} GiB can be used")
        if not fits:
            print(advice(options, folder, weight_dtype, available))
    peaks = {mode: plan["peak_memory_gib"]}
    if device.type != "cuda" and options.gradient_checkpointing == "auto":  # each card takes the fastest that fits
        others = (other for other in ("none", "transformers") if other != mode)
        peaks = {**{m: forecast(options, folder, m, weight_dtype)["peak_memory_gib"] for m in others}, **peaks}
    plan["hours"] = print_training_time(options, plan, frames, held_out, peaks, device)
    print(json.dumps(plan))


def disk_space(options, folder, frames, plan):
    """The GiB on disk of the cache, of one checkpoint and of the result: {cache_gib, checkpoint_gib, output_gib}."""
    unet, vae = read_config(folder, "unet"), read_config(folder, "vae")
    factor = latent_factor(vae)
    latents = vae["latent_channels"] * (options.width // factor) * (options.height // factor)
    frame = 2 * latents + unet["cross_attention_dim"]  # numbers in the cache: mean, std and embedding
    weights = (1 + options.use_ema) * plan["trainable_parameters"] * 4 / 2**30
    try:
        output = sum(f.stat().st_size for part in MODEL_PARTS for f in weight_files(folder, part))
    except (UserError, TypeError):  # the base has no weights here, or is only a dict: as large as in fp32
        with torch.device("meta"):
            clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**read_config(folder, "image_encoder")))
            models = [UNetSpatioTemporalConditionModel.from_config(unet), AutoencoderKLTemporalDecoder.from_config(vae)]
        output = sum(4 * p.numel() for model in (*models, clip) for p in model.parameters())
    if options.lora_rank:
        output = output * options.save_merged + 4 * plan["trainable_parameters"]
    sizes = {"cache_gib": frames * frame * 4 / 2**30, "checkpoint_gib": plan["optimizer_gib"] + weights}
    return {name: round(size, 3) for name, size in {**sizes, "output_gib": output / 2**30}.items()}


def warn_of_disk(state, base):
    """Warns before the first step if the disk has no room for the further checkpoints and the result."""
    options, count = state.options, sum(p.numel() for p in state.trained.values())
    plan = {"trainable_parameters": count, "optimizer_gib": optimizer_bytes(options.optimizer, count) / 2**30}
    sizes = disk_space(options, base, 0, plan)
    ahead = math.ceil((options.max_train_steps - state.steps) / options.checkpointing_steps)
    more = min(ahead, options.checkpoints_total_limit + 1 - len(checkpoints_of(options.output_dir)))
    needed, free = more * sizes["checkpoint_gib"] + sizes["output_gib"], shutil.disk_usage(options.output_dir).free
    if needed > free / 2**30:
        where = f"--output_dir {options.output_dir}: the checkpoints and the result"
        print(f"warning: {where} need {needed:.1f} GiB more, but its disk has only {free / 2**30:.1f} GiB free")


def print_clip_plan(settings, images, base):
    """Prints the plan of inference: clips, memory and time. base: folder of the configuration, or SVD_XT_CONFIG."""
    count = len(images) * settings.num_videos_per_image * len(settings.motion_bucket_id)
    count *= 2 if settings.compare_with else 1
    size, chunk = f"{settings.width}x{settings.height}", settings.decode_chunk_size
    print(f"{counted(count, 'clip')} of {settings.num_frames} frames, {size}, {chunk} frames decoded at once")
    needed, tflop = forecast_clip(base, settings)
    print(f"{needed:.1f} GiB of GPU memory in fp16, and about 0.5 GiB for CUDA itself")
    modes, smaller = {"": needed}, settings
    while smaller := smaller_memory(smaller, ""):
        less = forecast_clip(base, smaller)[0]
        if less < min(modes.values()):
            flags = f"--decode_chunk_size {smaller.decode_chunk_size}" + " --low_vram" * smaller.low_vram
            modes[flags] = less
            print(f"  with less memory the run goes on with {flags}: {less:.1f} GiB")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print_clip_time(tflop * settings.num_segments, count, modes, device)
