"""Fine-tunes Stable Video Diffusion on a folder of clips, on one GPU.

    python train_svd.py --pretrained_model_name stabilityai/stable-video-diffusion-img2vid-xt \
        --dataset_dir ./dataset --output_dir ./outputs --train_batch_size 1 --max_train_steps 5000 \
        --learning_rate 1e-5 --num_frames 25 --width 512 --height 320

Resume a stopped run by the same command with --resume_from_checkpoint latest. The result, --output_dir, is a standard
diffusers pipeline folder for infer_svd.py or StableVideoDiffusionPipeline.from_pretrained.

Read it from top to bottom: the objective, the data, one step, memory, checkpoints, validation, the loop.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import statistics
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs
from diffusers import StableVideoDiffusionPipeline
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.resnet import SpatioTemporalResBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

import svd_common as common
from svd_common import UserError

# ------------------------------------------------------------------------------------------------------ Objective
# SVD is a v-prediction model in EDM's continuous-sigma form (Karras et al. 2022; Blattmann et al. 2023, appendix D).
# With x = latents + sigma * noise, the network F gives the clean latents as c_skip * x + c_out * F(c_in * x, c_noise).


def sample_sigmas(normal, P_mean, P_std):
    """Noise levels from standard normal draws: ln(sigma) ~ N(P_mean, P_std^2) (EDM, table 1)."""
    return torch.exp(P_mean + P_std * normal)


def scalings(sigmas):
    """c_skip, c_out, c_in, c_noise of SVD for `sigmas` (generative-models, VScalingWithEDMcNoise)."""
    c_skip = 1 / (sigmas**2 + 1)
    c_out = -sigmas / (sigmas**2 + 1).sqrt()
    c_in = 1 / (sigmas**2 + 1).sqrt()
    c_noise = 0.25 * sigmas.log()
    return c_skip, c_out, c_in, c_noise


def v_target(latents, noise, sigmas):
    """What F should give: v = (noise - sigma * latents) / sqrt(sigma^2 + 1).

    MSE(F, v) equals SVD's weighted denoising loss, (sigma^2 + 1) / sigma^2 * MSE(denoised, latents), since that weight
    times c_out^2 is 1; and it keeps its digits in half precision at small sigma, which the denoised form does not.
    """
    return (noise - sigmas * latents) / (sigmas**2 + 1).sqrt()


def loss_weight(sigmas, loss):
    """Weight of the squared v error: 1 for SVD's loss; 1 / (sigma^2 + 1) makes it MSE(predicted noise, noise).

    The predicted noise is (x - denoised) / sigma; its error is the error of F divided by sqrt(sigma^2 + 1).
    """
    return torch.ones_like(sigmas) if loss == "v" else 1 / (sigmas**2 + 1)


# ----------------------------------------------------------------------------------------------------------- Data
# A sample is a function of (seed, index), nothing else; index = step * global batch + place in the batch. So a resumed
# run draws what an unbroken one would have drawn, at no cost, and there is no random state to save.

NOISE_AUG_MEAN, NOISE_AUG_STD = -3.0, 0.5  # ln of noise_aug_strength; median 0.05 (Blattmann et al. 2023, appendix D)
DEFAULT_FPS, DEFAULT_MOTION_BUCKET_ID = 7, 127  # SVD's own, for clips of which metadata.jsonl says nothing


def random_generator(*key):
    """A CPU generator that depends on `key` alone: the same numbers on every machine, in every order."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little"))


class ClipDataset:
    """Random windows of consecutive frames, with every random number of a training step already drawn.

    `dataset[index]`, any index >= 0: each clip once an epoch, in an order shuffled by (seed, epoch).
    Shapes, without the batch axis: latents and noise (T, 4, h, w); sigmas (); conditioning_image (3, H, W), the first
    frame in [-1, 1] with its noise; image_embeddings (1, D); added_time_ids (3,); keep (), 0 where both image
    conditions are dropped. Without a cache: pixel_values (T, 3, H, W) and posterior_noise instead of latents.
    """

    def __init__(self, clips, args, scaling_factor, latent_shape, cached):
        self.clips, self.args, self.cached = clips, args, cached
        self.scaling_factor, self.latent_shape = scaling_factor, latent_shape
        self._order = (None, None)

    def clip_of(self, index):
        epoch, place = divmod(index, len(self.clips))
        if self._order[0] != epoch:
            generator = random_generator(self.args.seed, "order", epoch)
            self._order = (epoch, torch.randperm(len(self.clips), generator=generator).tolist())
        order = self._order  # one read: another thread may be in another epoch
        if order[0] != epoch:
            return self.clip_of(index)
        return self.clips[order[1][place]]

    def __getitem__(self, index):
        args, clip = self.args, self.clip_of(index)
        generator = random_generator(args.seed, "sample", index)
        start = int(torch.randint(len(clip["frames"]) - args.num_frames + 1, (), generator=generator))
        normal = torch.randn(3, generator=generator)
        noise_aug_strength = math.exp(NOISE_AUG_MEAN + NOISE_AUG_STD * normal[1].item())
        keep = torch.rand((), generator=generator) >= args.conditioning_dropout_prob
        shape = (args.num_frames, *self.latent_shape)
        posterior_noise = torch.randn(shape, generator=generator)
        sample = {
            "noise": torch.randn(shape, generator=generator),
            "sigmas": sample_sigmas(normal[0], args.P_mean, args.P_std),
            "keep": keep.float(),
            "added_time_ids": torch.tensor([clip["fps"] - 1, clip["motion_bucket_id"], noise_aug_strength]),
        }
        frames = clip["frames"][start : start + args.num_frames]
        first = load_pixels(frames[:1], args.width, args.height)[0]
        sample["conditioning_image"] = first + noise_aug_strength * torch.randn(first.shape, generator=generator)
        if self.cached:
            mean, std, embedding = read_cached(clip["cache"], start, args.num_frames)
            sample["latents"] = (mean + std * posterior_noise) * self.scaling_factor
            sample["image_embeddings"] = embedding
        else:
            sample["pixel_values"] = load_pixels(frames, args.width, args.height)
            sample["posterior_noise"] = posterior_noise
        return sample


def load_pixels(paths, width, height):
    """Frames as (T, 3, H, W) float32 in [-1, 1], fitted to the size as infer_svd.py fits its image."""
    frames = np.stack([common.fit_frame(common.read_frame(path), width, height) for path in paths])
    # to [0, 1] first, then [-1, 1]: the pipeline's order, so that its numbers are met to the last bit
    return torch.from_numpy(frames.astype(np.float32) / 255.0 * 2.0 - 1.0).permute(0, 3, 1, 2).contiguous()


def batches(dataset, index_batches, device, num_workers):
    """Yields collated batches on `device`, prepared ahead by threads (OpenCV, safetensors and torch release the GIL;
    a forked worker would deadlock in OpenCV)."""

    def load(indices):
        samples = [dataset[index] for index in indices]
        batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
        return {key: value.pin_memory() for key, value in batch.items()} if device.type == "cuda" else batch

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        pending = deque()
        for indices in index_batches:
            pending.append(pool.submit(load, indices))
            if len(pending) > 2 * max(1, num_workers):
                yield {key: value.to(device, non_blocking=True) for key, value in pending.popleft().result().items()}
        while pending:
            yield {key: value.to(device, non_blocking=True) for key, value in pending.popleft().result().items()}


def load_clips(args):
    """The clips that can be trained on, with `fps` and `motion_bucket_id` filled in; short ones are named."""
    clips, short, unknown = [], [], 0
    for clip in common.list_clips(args.dataset_dir):
        if len(clip["frames"]) < args.num_frames:
            short.append(clip)
            continue
        unknown += "fps" not in clip
        clip["fps"] = clip.get("fps") or args.fps
        clip["motion_bucket_id"] = clip.get("motion_bucket_id", args.motion_bucket_id)
        clips.append(clip)
    for clip in short:
        print(f"left out: {clip['directory']} has {len(clip['frames'])} frames, --num_frames is {args.num_frames}")
    if not clips:
        longest = max(len(clip["frames"]) for clip in short)
        raise UserError(f"--num_frames {args.num_frames}: no clip is that long; the longest has {longest} frames")
    if unknown:
        print(f"{unknown} clips without metadata: --fps {args.fps:g}, --motion_bucket_id {args.motion_bucket_id:g}")
    return clips


# Cache: the frozen VAE's posterior and CLIP's embedding of every frame, one file a clip, computed once.


def encode_frames(pipe, frames, device):
    """(N, H, W, 3) uint8 frames -> posterior mean and std (N, 4, h, w), CLIP embeddings (N, 1, D); fp32."""
    pixels = torch.from_numpy(frames.astype(np.float32) / 255.0 * 2.0 - 1.0).permute(0, 3, 1, 2)
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels.to(device)).latent_dist
        embeddings = pipe._encode_image([Image.fromarray(frame) for frame in frames], device, 1, False)
    return posterior.mean, posterior.std, embeddings


def cache_key(clip, args, model_fingerprint):
    """Everything that a cached clip depends on; a changed frame has another size or time."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in clip["frames"]]
    return hashlib.sha256(repr((files, args.width, args.height, model_fingerprint)).encode()).hexdigest()


def cache_is_current(path, key):
    try:
        with safe_open(path, "pt") as cached:
            return (cached.metadata() or {}).get("key") == key
    except Exception:  # safetensors raises its own kinds for a missing or damaged file: either way it is made again
        return False


def read_cached(path, start, num_frames):
    """Posterior mean and std of a window (T, 4, h, w) and the embedding of its first frame (1, D)."""
    with safe_open(path, "pt") as cached:
        window = slice(start, start + num_frames)
        mean, std = cached.get_slice("mean")[window], cached.get_slice("std")[window]
        return mean, std, cached.get_slice("image_embeddings")[start : start + 1][0]


def build_cache(clips, args, pipe_loader, fingerprint, accelerator):
    """Fills `clip["cache"]` for every clip, encoding those that have no current file; ranks share the work.

    pipe_loader() gives the fp32 VAE and CLIP on the device, called only where something is missing.
    """
    root = Path(args.cache_dir or Path(args.dataset_dir) / ".cache") / f"{args.width}x{args.height}-{fingerprint}"
    missing = []
    for clip in clips:
        clip["cache"] = root / f"{clip['directory']}.safetensors"
        key = cache_key(clip, args, fingerprint)
        if not cache_is_current(clip["cache"], key):
            missing.append((clip, key))
    accelerator.wait_for_everyone()  # every rank has looked before one of them writes
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    if mine:
        pipe = pipe_loader()
        chunk = max(1, 512 * 320 * 8 // (args.width * args.height))  # frames at once: bounds the VAE's activations
        total = sum(len(clip["frames"]) for clip, _ in mine)
        progress = tqdm(total=total, desc="caching latents", unit="frame", disable=not accelerator.is_main_process)
        for clip, key in mine:
            parts = []
            for i in range(0, len(clip["frames"]), chunk):
                paths = clip["frames"][i : i + chunk]
                frames = [common.fit_frame(common.read_frame(path), args.width, args.height) for path in paths]
                parts.append([part.cpu() for part in encode_frames(pipe, np.stack(frames), accelerator.device)])
                progress.update(len(paths))
            tensors = dict(zip(("mean", "std", "image_embeddings"), (torch.cat(part) for part in zip(*parts))))
            clip["cache"].parent.mkdir(parents=True, exist_ok=True)
            write_tensors(clip["cache"], tensors, {"key": key})
        progress.close()
    accelerator.wait_for_everyone()


# ------------------------------------------------------------------------------------------------------- One step


def training_loss(unet, vae, batch, weight_dtype, loss="v"):
    """One forward pass: latents -> noise -> condition -> predict -> loss.

    batch: as ClipDataset, with a batch axis. Returns (loss to minimise, {"loss_v", "loss_noise"} detached scalars).
    """
    latents, noise = batch["latents"], batch["noise"]  # (B, T, 4, h, w)
    sigmas = batch["sigmas"].view(-1, 1, 1, 1, 1)
    keep = batch["keep"].view(-1, 1, 1, 1, 1)
    _, _, c_in, c_noise = scalings(sigmas)
    with torch.no_grad():  # the mode, not a sample, and not scaled: what the pipeline feeds
        image_latents = vae.encode(batch["conditioning_image"]).latent_dist.mode()  # (B, 4, h, w)
    image_latents = image_latents[:, None].expand_as(latents) * keep

    noisy_latents = latents + sigmas * noise
    model_pred = unet(
        torch.cat([noisy_latents * c_in, image_latents], dim=2).to(weight_dtype),
        c_noise.flatten(),
        encoder_hidden_states=(batch["image_embeddings"] * keep[:, 0, 0]).to(weight_dtype),
        added_time_ids=batch["added_time_ids"],
    ).sample

    errors = (model_pred.float() - v_target(latents, noise, sigmas)).square().mean((1, 2, 3, 4))  # (B,)
    losses = {name: (loss_weight(batch["sigmas"], name) * errors).mean() for name in ("v", "noise")}
    return losses[loss], {f"loss_{name}": value.detach() for name, value in losses.items()}


def add_latents(batch, pipe, scaling_factor, device):
    """Without a cache: encodes the frames of a batch here and now, as the cache would have."""
    pixels = batch.pop("pixel_values")
    frames = ((pixels + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy()
    encoded = [encode_frames(pipe, clip, device) for clip in frames]
    mean, std, embeddings = (torch.stack(part) for part in zip(*encoded))
    batch["latents"] = (mean + std * batch.pop("posterior_noise")) * scaling_factor
    batch["image_embeddings"] = embeddings[:, 0]
    return batch


# --------------------------------------------------------------------------------------------------------- Memory
# Frozen weights stay in the compute dtype; trained ones, their gradients and AdamW's states are fp32.

TRAINABLE = {
    "temporal": ("temporal_transformer_blocks", "temporal_res_block", "time_pos_embed", "time_mixer"),
    "temporal_attention": ("temporal_transformer_blocks",),
    "all": ("",),
}
# SVD's cross-attention sees one token, so its softmax is 1 whatever the query: these never get a gradient.
DEAD = ("attn2.to_q.", "attn2.to_k.", ".norm2.")


def is_trained(name, trainable):
    """Whether the UNet parameter `name` is trained under --trainable."""
    dead = any(part in name for part in DEAD) and "transformer_blocks" in name
    return any(group in name for group in TRAINABLE[trainable]) and not dead


class SingleTokenAttention:
    """Cross-attention over one token, exactly: softmax over one key is 1, so the output is to_out(to_v(token))."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        assert encoder_hidden_states.shape[1] == 1, "the shortcut holds for one token only"
        hidden = attn.to_out[0](attn.to_v(encoder_hidden_states))  # (B, 1, C)
        return hidden.expand(-1, hidden_states.shape[1], -1)


def forward_in_input_dtype(module):
    """The forward pass of a layer with fp32 weights, in the dtype of its input: autocast for this layer alone."""
    if not isinstance(
        module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.GroupNorm, torch.nn.LayerNorm)
    ):
        return module.forward  # AlphaBlender casts its scalar by itself

    def forward(x):
        weight = module.weight.to(x.dtype)
        bias = None if module.bias is None else module.bias.to(x.dtype)
        if isinstance(module, torch.nn.Linear):
            return F.linear(x, weight, bias)
        if isinstance(module, torch.nn.GroupNorm):
            return F.group_norm(x, module.num_groups, weight, bias, module.eps)
        if isinstance(module, torch.nn.LayerNorm):
            return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
        return module._conv_forward(x, weight, bias)

    return forward


def prepare_unet(unet, trainable, weight_dtype, checkpointing):
    """Freezes, casts and wraps a UNet for training, in place; names and shapes in its state dict stay as they are."""
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(is_trained(name, trainable))
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else weight_dtype)
    for module in unet.modules():
        if weight_dtype != torch.float32 and any(p.requires_grad for p in module.parameters(recurse=False)):
            module.forward = forward_in_input_dtype(module)
        if isinstance(module, (BasicTransformerBlock, TemporalBasicTransformerBlock)) and module.attn2 is not None:
            module.attn2.set_processor(SingleTokenAttention())
        # diffusers' own checkpointing skips the temporal halves; these two hold everything that is large
        if checkpointing == "full" and isinstance(module, (SpatioTemporalResBlock, TransformerSpatioTemporalModel)):
            module.forward = checkpointed(module.forward)
    return unet.train()


def checkpointed(forward):
    """`forward`, its activations recomputed in the backward pass; nothing in SVD draws random numbers there."""

    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def trained_parameters(unet):
    """{name: parameter} of what is trained, in the model's order."""
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


def build_optimizer(args, parameters, device):
    """AdamW over the trained parameters: torch's fused one, or bitsandbytes' with 8-bit states."""
    options = {"lr": args.learning_rate, "weight_decay": args.adam_weight_decay}
    if args.optimizer == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)


# -------------------------------------------------------------------------------------------- Checkpoints, result
# checkpoint-N/: trained.safetensors, optimizer.safetensors, ema.safetensors, training_state.json; nothing pickled.


def write_tensors(path, tensors, metadata=None):
    """A safetensors file, written aside, flushed to disk and renamed: whole or not there."""
    aside = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.part")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except Exception as error:  # safetensors reports a full disk as its own kind of error
        aside.unlink(missing_ok=True)
        raise OSError(getattr(error, "errno", None) or 28, f"cannot be written ({error})", str(path)) from error


def flatten_state(optimizer, names):
    """Optimizer state -> ({"name.key": tensor}, {"name.key": number}), by parameter name instead of by position."""
    tensors, numbers = {}, {}
    for name, parameter in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            (tensors if torch.is_tensor(value) else numbers)[f"{name}|{key}"] = value
    return tensors, numbers


def unflatten_state(optimizer, names, tensors, numbers):
    """Puts back what `flatten_state` took, on each parameter's device."""
    for flat, value in {**tensors, **numbers}.items():
        name, key = flat.rsplit("|", 1)
        parameter = names[name]
        optimizer.state[parameter][key] = value.to(parameter.device) if torch.is_tensor(value) else value


def save_checkpoint(run, step):
    """Writes `checkpoint-<step>/` aside and renames it; only then goes the oldest beyond --checkpoints_total_limit."""
    args, final = run.args, Path(run.args.output_dir) / f"checkpoint-{step}"
    if final.exists():
        return final
    aside = final.with_name(f".{final.name}.part")
    shutil.rmtree(aside, ignore_errors=True)  # left by a killed run of ours
    aside.mkdir(parents=True)
    try:
        tensors, numbers = flatten_state(run.optimizer, run.trained)
        write_tensors(aside / "trained.safetensors", {name: p.data for name, p in run.trained.items()})
        write_tensors(aside / "optimizer.safetensors", tensors)
        if run.ema:
            write_tensors(aside / "ema.safetensors", dict(zip(run.trained, run.ema.shadow_params)))
        state = {
            "step": step,
            "settings": run.settings,
            "optimizer": numbers,
            "lr_scheduler": run.lr_scheduler.state_dict(),
            "scaler": run.scaler.state_dict() if run.scaler else None,
            "ema_step": run.ema.optimization_step if run.ema else None,
            "files": {file.name: file.stat().st_size for file in aside.glob("*.safetensors")},
        }
        common.write_file(aside / common.CHECKPOINT_STATE, json.dumps(state, indent=1))
        os.replace(aside, final)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)  # a full disk leaves the last good checkpoint and no half of this one
        raise
    for old in checkpoints_of(args.output_dir)[: -args.checkpoints_total_limit or None]:
        shutil.rmtree(old)
    return final


def checkpoints_of(output_dir):
    """The checkpoint folders of a run, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.rsplit("-", 1)[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def read_checkpoint(folder):
    """The state of a complete checkpoint. Raises `UserError` that names the damaged or missing file."""
    path = Path(folder) / common.CHECKPOINT_STATE
    try:
        state = json.loads(path.read_text())
        files = state["files"]
    except FileNotFoundError:
        raise UserError(f"{path}: missing; not a checkpoint of train_svd.py") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged") from None
    for name, size in files.items():
        if not (Path(folder) / name).is_file() or (Path(folder) / name).stat().st_size != size:
            raise UserError(f"{Path(folder) / name}: missing or cut off")
        common.safetensors_header(Path(folder) / name)
    return state


def find_checkpoint(args):
    """--resume_from_checkpoint -> (folder, state) or (None, None); `latest` takes the newest complete one."""
    if args.resume_from_checkpoint != "latest":
        return args.resume_from_checkpoint, read_checkpoint(args.resume_from_checkpoint)
    for folder in reversed(checkpoints_of(args.output_dir)):
        try:
            return folder, read_checkpoint(folder)
        except UserError as error:
            print(f"{error}; taking the checkpoint before it", file=sys.stderr)
    print(f"--resume_from_checkpoint latest: no checkpoint in {args.output_dir}; starting from the beginning")
    return None, None


# Settings that may differ between a checkpoint and its resumption: they do not change the result.
FREE = """output_dir dataset_dir pretrained_model_name resume_from_checkpoint checkpointing_steps
checkpoints_total_limit cache_latents cache_dir dataloader_num_workers logging_steps report_to compile dry_run
gradient_checkpointing gradient_accumulation_steps train_batch_size max_train_steps versions step
validation_dir validation_steps validation_metric num_validation_clips""".split()


def check_resume(settings, saved, folder):
    """Refuses, by name, settings that would make the resumed run another run."""
    changed = [key for key in settings if key not in FREE and settings[key] != saved.get(key, settings[key])]
    if settings["max_train_steps"] != saved["max_train_steps"] and "constant" not in settings["lr_scheduler"]:
        changed.append("max_train_steps")  # it shapes the learning-rate schedule
    if changed:
        pairs = ", ".join(f"{key} was {saved[key]!r}, is {settings[key]!r}" for key in changed)
        raise UserError(f"{folder}: {pairs}; use the checkpoint's, or start a new run in another --output_dir")


def save_result(run, step):
    """The fine-tuned pipeline as a standard diffusers folder: the base's own files, the trained tensors replaced.

    Frozen weights are copied from the base on disk, so they stay bitwise the same whatever dtype they were trained in,
    and no second model is built. Every file keeps the base's precision. model_index.json is written last.
    """
    base, output = Path(run.base), Path(run.args.output_dir)
    weights = dict(zip(run.trained, run.ema.shadow_params)) if run.ema else run.trained
    aside = output / ".result.part"
    shutil.rmtree(aside, ignore_errors=True)
    for part in common.PARTS:
        (aside / part).mkdir(parents=True)
        for source in (base / part).glob("*.json"):
            if ".index" not in source.name:
                shutil.copyfile(source, aside / part / source.name)
        for source in common.weight_files(base, part) if part in ("unet", "vae", "image_encoder") else ():
            target = aside / part / source.name.replace(".fp16", "")
            if part != "unet":
                shutil.copyfile(source, target)
                continue
            with safe_open(source, "pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}
            for name in tensors.keys() & weights.keys():
                tensors[name] = weights[name].detach().to("cpu", tensors[name].dtype)
            write_tensors(target, tensors, {"format": "pt"})
        for source in (base / part).glob("*.index*.json"):
            if all(file.name in source.read_text() for file in common.weight_files(base, part)):
                common.write_file(
                    aside / part / source.name.replace(".fp16", ""), source.read_text().replace(".fp16", "")
                )
    for part in common.PARTS:
        shutil.rmtree(output / part, ignore_errors=True)  # an earlier result of this same run, resumed to go further
        os.replace(aside / part, output / part)
    aside.rmdir()
    common.write_file(output / common.SETTINGS, json.dumps({**run.settings, "step": step}, indent=1))
    common.write_file(output / "model_index.json", (base / "model_index.json").read_text())


# --------------------------------------------------------------------------------------------------- Command line


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=110)
    )

    def positive(text):
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
        return int(text)

    def at_least_zero(text):
        if not float(text) >= 0 or math.isinf(float(text)):
            raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
        return float(text)

    add = parser.add_argument_group("model and data").add_argument
    add("--pretrained_model_name", required=True, help="hub name or local diffusers folder to start from")
    add("--dataset_dir", required=True, help="folder of clip folders, from prepare_dataset.py")
    add("--output_dir", required=True, help="where the checkpoints and the fine-tuned pipeline go")
    add("--num_frames", type=positive, default=25, help="frames in a training window (default 25)")
    add("--width", type=positive, default=512, help="pixels, a multiple of 64 for SVD (default 512)")
    add("--height", type=positive, default=320, help="pixels, a multiple of 64 for SVD (default 320)")
    add("--fps", type=at_least_zero, default=DEFAULT_FPS, help="for clips without metadata.jsonl (default 7)")
    add(
        "--motion_bucket_id",
        type=at_least_zero,
        default=DEFAULT_MOTION_BUCKET_ID,
        help="likewise, 0..255 (default 127)",
    )
    add(
        "--cache_latents", action=argparse.BooleanOptionalAction, default=True, help="encode every frame once (default)"
    )
    add("--cache_dir", help="where the cache goes (default: DATASET_DIR/.cache)")
    add("--dataloader_num_workers", type=positive, default=4, help="threads that load samples (default 4)")

    add = parser.add_argument_group("training").add_argument
    add("--train_batch_size", type=positive, default=1, help="clips a step on each GPU (default 1)")
    add("--gradient_accumulation_steps", type=positive, default=1, help="batches summed into one step (default 1)")
    add("--max_train_steps", type=positive, default=5000, help="optimizer steps (default 5000)")
    add("--learning_rate", type=at_least_zero, default=1e-5, help="peak of the schedule (default 1e-5)")
    add("--lr_scheduler", choices=[s.value for s in SchedulerType if "piecewise" not in s.value], default="constant")
    add("--lr_warmup_steps", type=int, default=0, help="optimizer steps of linear warm-up (default 0)")
    add("--max_grad_norm", type=at_least_zero, default=1.0, help="clip the gradient's norm; 0: do not (default 1)")
    add("--optimizer", choices=["adamw", "adamw8bit"], default="adamw", help="adamw8bit needs bitsandbytes")
    add("--adam_weight_decay", type=at_least_zero, default=1e-2, help="AdamW's decoupled decay (default 0.01)")
    add("--trainable", choices=list(TRAINABLE), default="temporal", help="which UNet layers (default temporal)")
    add("--loss", choices=["v", "noise"], default="v", help="v: SVD's weighting; noise: plain noise MSE (default v)")
    add("--P_mean", type=float, default=0.7, help="mean of ln sigma (default 0.7; 1.0 favours motion)")
    add("--P_std", type=at_least_zero, default=1.6, help="standard deviation of ln sigma (default 1.6)")
    add("--conditioning_dropout_prob", type=at_least_zero, default=0.1, help="for guidance (default 0.1)")
    add("--use_ema", action="store_true", help="average the trained weights; the result is the average")
    add("--ema_decay", type=at_least_zero, default=0.9999, help="of the average, reached by warm-up (default 0.9999)")
    add("--seed", type=int, default=0, help="everything drawn is a function of it and the step (default 0)")

    add = parser.add_argument_group("memory and speed").add_argument
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: bf16; fp16 on cards without; no on a CPU")
    add(
        "--gradient_checkpointing",
        nargs="?",
        const="full",
        default="auto",
        choices=["none", "full", "auto"],
        help="recompute activations: none, full, or the cheapest that fits (default auto)",
    )

    add = parser.add_argument_group("checkpoints and logs").add_argument
    add("--checkpointing_steps", type=positive, default=500, help="save every so many steps (default 500)")
    add("--checkpoints_total_limit", type=positive, default=2, help="keep the newest so many (default 2)")
    add("--resume_from_checkpoint", metavar="latest|FOLDER", help="go on from a checkpoint of this run")
    add("--logging_steps", type=positive, default=10, help="a line in metrics.jsonl every so many steps (default 10)")
    return parser


def parse_args(argv=None):
    """Parses and checks the command line: whatever can be known to be wrong without loading a weight."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not 0 < args.fps <= 240:
        parser.error(f"--fps must be over 0 and at most 240, got {args.fps:g}")
    if args.motion_bucket_id > 255:
        parser.error(f"--motion_bucket_id must be 0..255, got {args.motion_bucket_id:g}")
    if args.conditioning_dropout_prob > 1:
        parser.error(f"--conditioning_dropout_prob must be 0..1, got {args.conditioning_dropout_prob:g}")
    if not 0 <= args.lr_warmup_steps <= args.max_train_steps:
        parser.error(f"--lr_warmup_steps must be 0..{args.max_train_steps}, got {args.lr_warmup_steps}")
    if not args.ema_decay < 1:
        parser.error(f"--ema_decay must be under 1, got {args.ema_decay:g}")
    if args.num_frames < 2:
        parser.error("--num_frames must be at least 2: one frame has no motion to learn")
    if not torch.cuda.is_available() and args.mixed_precision == "fp16":
        parser.error("--mixed_precision fp16 needs a CUDA GPU; on the CPU use no or bf16")
    output = Path(args.output_dir)
    if not args.resume_from_checkpoint and ((output / "model_index.json").exists() or checkpoints_of(output)):
        parser.error(
            f"--output_dir {output} already holds a run; give another one, or --resume_from_checkpoint latest to go on"
        )
    return args


def check_sizes(args, folder):
    """Refuses sizes that the model cannot take, from its configuration alone."""
    multiple = common.size_multiple(folder)
    for flag, value in (("--width", args.width), ("--height", args.height)):
        if value % multiple:
            near = max(multiple, round(value / multiple) * multiple)
            raise UserError(
                f"{flag} must be a multiple of {multiple} for this model, got {value}; the nearest is {near}"
            )


# ----------------------------------------------------------------------------------------------------------- Main


class Run:
    """What saving, validating and logging need of a run in progress; only `main` changes it."""

    args: argparse.Namespace
    settings: dict  # what goes into every checkpoint and the result
    base: Path  # folder of the model it started from
    trained: dict  # {name: fp32 parameter}
    optimizer: torch.optim.Optimizer
    lr_scheduler: object
    scaler: object = None
    ema: EMAModel | None = None


def choose_precision(args, device):
    if args.mixed_precision is None:
        gpu = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        args.mixed_precision = gpu if device.type == "cuda" else "no"
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.mixed_precision]


def main(argv=None):
    args = parse_args(argv)
    cv2.setNumThreads(0)  # the loader has threads of its own
    run = Run()
    run.args = args

    # set up: everything that can be refused is refused before a weight is loaded
    run.base = common.resolve_model(args.pretrained_model_name)
    check_sizes(args, run.base)
    clips = load_clips(args)
    folder, state = find_checkpoint(args) if args.resume_from_checkpoint else (None, None)
    # fp16 needs accelerate's gradient scaler, but not its autocast: the weights are cast once, by prepare_unet
    accelerator = Accelerator(
        mixed_precision="fp16" if args.mixed_precision == "fp16" else "no",
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[AutocastKwargs(enabled=False), DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    device, weight_dtype = accelerator.device, choose_precision(args, accelerator.device)
    args.global_batch_size = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    fingerprint = "-".join(common.weights_fingerprint(run.base, part)[:8] for part in ("vae", "image_encoder"))
    run.settings = {
        **vars(args),
        "base_fingerprint": common.weights_fingerprint(run.base, "unet"),
        "dataset": hashlib.sha256(
            repr([(c["directory"], len(c["frames"]), c["fps"], c["motion_bucket_id"]) for c in clips]).encode()
        ).hexdigest()[:16],
        "num_clips": len(clips),
        "median_fps": statistics.median(clip["fps"] for clip in clips),
        "median_motion_bucket_id": statistics.median(clip["motion_bucket_id"] for clip in clips),
        "motion_bucket_id_range": [f(clip["motion_bucket_id"] for clip in clips) for f in (min, max)],
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    if Path(args.pretrained_model_name).is_dir():
        run.settings["pretrained_model_name"] = str(Path(args.pretrained_model_name).resolve())
    if state:
        check_resume(run.settings, state["settings"], folder)

    # data
    def load_encoders():
        parts = {part: common.load_part(run.base, part, torch.float32) for part in common.PARTS if part != "unet"}
        for part in ("vae", "image_encoder"):
            parts[part].requires_grad_(False).to(device)
        return StableVideoDiffusionPipeline(unet=None, **parts)

    pipe = None if args.cache_latents else load_encoders()
    if args.cache_latents:
        build_cache(clips, args, load_encoders, fingerprint, accelerator)
    vae = pipe.vae if pipe else common.load_part(run.base, "vae", torch.float32).requires_grad_(False)
    if not pipe:
        vae.decoder = None  # training encodes the first frame only
        vae.to(device)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    latent_shape = (vae.config.latent_channels, args.height // factor, args.width // factor)
    dataset = ClipDataset(clips, args, vae.config.scaling_factor, latent_shape, cached=not pipe)

    # model
    checkpointing = "full" if args.gradient_checkpointing == "auto" else args.gradient_checkpointing
    unet = common.load_part(run.base, "unet", torch.float32)
    prepare_unet(unet, args.trainable, weight_dtype, checkpointing)
    unet.to(device)
    run.trained = trained_parameters(unet)
    run.optimizer = build_optimizer(args, run.trained.values(), device)
    run.lr_scheduler = get_scheduler(
        args.lr_scheduler, run.optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    if args.use_ema:
        run.ema = EMAModel(run.trained.values(), decay=args.ema_decay, foreach=True)
    first_step = 0
    if state:
        first_step = state["step"]
        common.lay_over(unet, Path(folder) / "trained.safetensors")
        unflatten_state(
            run.optimizer, run.trained, load_file(Path(folder) / "optimizer.safetensors"), state["optimizer"]
        )
        run.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if run.ema:
            shadow = load_file(Path(folder) / "ema.safetensors")
            run.ema.shadow_params = [shadow[name] for name in run.trained]
            run.ema.optimization_step = state["ema_step"]
    unet, optimizer = accelerator.prepare(unet, run.optimizer)
    run.scaler = accelerator.scaler
    if state and run.scaler:
        run.scaler.load_state_dict(state["scaler"])
    if run.ema:
        run.ema.to(device)

    millions = sum(p.numel() for p in run.trained.values()) / 1e6
    accelerator.print(
        f"{len(clips)} clips, {args.max_train_steps} steps of {args.global_batch_size}; {millions:.1f} M parameters"
        f" trained ({args.trainable}), {args.mixed_precision} on {device.type}, gradient checkpointing {checkpointing}"
    )

    # loop: one pass is one optimizer step
    size, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    places = [
        [(m * accelerator.num_processes + accelerator.process_index) * size + i for i in range(size)]
        for m in range(accumulation)
    ]
    index_batches = (
        [step * args.global_batch_size + place for place in group]
        for step in range(first_step, args.max_train_steps)
        for group in places
    )
    loader = batches(dataset, index_batches, device, args.dataloader_num_workers)
    stop = StopSignal()
    log = Log(run, accelerator)
    bad_step = torch.full((), -1, dtype=torch.int64, device=device)  # the first step with a non-finite gradient
    progress = tqdm(
        total=args.max_train_steps, initial=first_step, desc="training", disable=not accelerator.is_main_process
    )
    for step in range(first_step, args.max_train_steps):
        for micro in range(accumulation):
            with log.waiting():
                batch = next(loader)
            if pipe:
                batch = add_latents(batch, pipe, vae.config.scaling_factor, device)
            last = micro == accumulation - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(unet):
                loss, losses = training_loss(unet, vae, batch, weight_dtype, args.loss)
                accelerator.backward(loss / accumulation)
            log.add(losses)
        grad_norm = accelerator.clip_grad_norm_(run.trained.values(), args.max_grad_norm or math.inf)
        # A non-finite gradient must not reach the weights, nor cost a CPU-GPU sync: fused AdamW skips its update on
        # the device while found_inf is set, and the step is named when the next line is logged. fp16 overflows are
        # the scaler's business (it sets found_inf itself); there only the loss counts.
        bad = ~torch.isfinite(grad_norm if run.scaler is None else loss.detach())
        bad_step = torch.where(bad & (bad_step < 0), step, bad_step)
        if run.scaler is None:
            run.optimizer.found_inf = (bad_step >= 0).float()
        optimizer.step()
        run.lr_scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if run.ema:
            run.ema.step(run.trained.values())
        done = step + 1
        progress.update()

        stopping = stop.requested(accelerator)
        saving = done % args.checkpointing_steps == 0 or stopping
        if done % args.logging_steps == 0 or done == args.max_train_steps or saving:
            if (bad := bad_step.item()) >= 0:
                batch_of = range(bad * args.global_batch_size, (bad + 1) * args.global_batch_size)
                names = sorted({dataset.clip_of(index)["directory"] for index in batch_of})
                raise UserError(
                    f"step {bad + 1}: the loss or gradient is not finite; the weights were not touched. Its clips:"
                    f" {', '.join(names)}. Look at them, or try a lower --learning_rate, or --mixed_precision bf16"
                )
            log.write(done, grad_norm, progress)
        if saving and accelerator.is_main_process:
            save_checkpoint(run, done)
        if stopping:
            progress.close()
            accelerator.print(f"stopped after step {done}, saved; go on with --resume_from_checkpoint latest")
            return 128 + stopping
    progress.close()

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_result(run, args.max_train_steps)
        print(f"done: {args.output_dir} is a diffusers pipeline; python infer_svd.py --model_dir {args.output_dir} ...")
    accelerator.end_training()
    return 0


class StopSignal:
    """SIGINT and SIGTERM ask for a stop after the step; a second one stops at once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def requested(self, accelerator):
        """The signal's number, or 0; the same answer on every process."""
        if accelerator.num_processes == 1:
            return self.signal
        received = torch.tensor(self.signal, device=accelerator.device)
        return int(accelerator.gather(received[None]).max())


class Log:
    """One line of metrics.jsonl every --logging_steps; device values are read only there."""

    def __init__(self, run, accelerator):
        self.run, self.accelerator = run, accelerator
        self.path = Path(run.args.output_dir) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.reset(0)

    def reset(self, step):
        self.sums, self.count, self.waited, self.since, self.step = {}, 0, 0.0, time.perf_counter(), step

    @contextlib.contextmanager
    def waiting(self):
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def add(self, losses):
        self.count += 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def write(self, step, grad_norm, progress):
        means = {name: self.accelerator.reduce(value / self.count, "mean").item() for name, value in self.sums.items()}
        elapsed = time.perf_counter() - self.since
        steps = max(1, step - self.step) if self.step else None
        line = {
            "step": step,
            **means,
            "grad_norm": grad_norm.item(),
            "learning_rate": self.run.lr_scheduler.get_last_lr()[0],
        }
        if steps:
            line["seconds_per_step"] = round(elapsed / steps, 4)
            line["data_wait_share"] = round(self.waited / elapsed, 4)
        if self.accelerator.device.type == "cuda":
            line["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
            progress.set_postfix(loss=f"{means['loss_v']:.4f}", lr=f"{line['learning_rate']:.1e}")
        self.reset(step)


if __name__ == "__main__":
    common.run_script(main)
