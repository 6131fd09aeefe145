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
import datetime
import errno
import gc
import hashlib
import importlib.util
import json
import math
import os
import platform
import shutil
import signal
import statistics
import sys
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import svd_common as common  # isort: skip  (first: it quiets OpenCV and transformers, which read that once)
from svd_common import UserError  # isort: skip

import cv2
import diffusers
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs, InitProcessGroupKwargs
from diffusers import AutoencoderKLTemporalDecoder, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.resnet import SpatioTemporalResBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

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

    def __init__(self, clips, args, vae_config, cached):
        self.clips, self.args, self.cached = clips, args, cached
        factor = 2 ** (len(vae_config.block_out_channels) - 1)
        self.scaling_factor = vae_config.scaling_factor
        self.latent_shape = (vae_config.latent_channels, args.height // factor, args.width // factor)
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
        clip, generator = self.clip_of(index), random_generator(self.args.seed, "sample", index)
        last_start = len(clip["frames"]) - self.args.num_frames
        return self.sample(clip, int(torch.randint(last_start + 1, (), generator=generator)), generator)

    def sample(self, clip, start, generator):
        """The window of `clip` from frame `start`, with everything random drawn from `generator`."""
        args = self.args
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

    torch.zeros(()).exp()  # MKL's very first exp, if several threads call it at once, is now and then off by 7e-5
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        pending = deque()
        for indices in index_batches:
            pending.append(pool.submit(load, indices))
            if len(pending) > 2 * max(1, num_workers):
                yield {key: value.to(device, non_blocking=True) for key, value in pending.popleft().result().items()}
        while pending:
            yield {key: value.to(device, non_blocking=True) for key, value in pending.popleft().result().items()}


def load_clips(args, dataset_dir):
    """The clips that can be trained on, with `fps` and `motion_bucket_id` filled in; short ones are named."""
    clips, short, unknown = [], [], 0
    for clip in common.list_clips(dataset_dir):
        if len(clip["frames"]) < args.num_frames:
            short.append(clip)
            continue
        unknown += "fps" not in clip
        clip["fps"] = clip.get("fps") or args.fps
        clip["motion_bucket_id"] = clip.get("motion_bucket_id", args.motion_bucket_id)
        for name in ("fps", "motion_bucket_id"):
            if not isinstance(clip[name], int | float):
                raise UserError(f"metadata.jsonl: {name} of {clip['directory']} is {clip[name]!r}, not a number")
        clips.append(clip)
    for clip in short:
        print(f"left out: {clip['directory']} has {len(clip['frames'])} frames, --num_frames is {args.num_frames}")
    if not clips:
        longest = max(len(clip["frames"]) for clip in short)
        raise UserError(f"--num_frames {args.num_frames}: no clip is that long; the longest has {longest} frames")
    generated = sum(bool(clip.get("generated")) for clip in clips)
    if generated:
        print(f"{generated} of {len(clips)} clips are generated by a model, not recorded")
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


def frames_at_once(args):
    """How many frames the VAE takes at a time: bounds its activations to about 3 GiB."""
    return max(1, 512 * 320 * 8 // (args.width * args.height))


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


def load_encoders(base, device):
    """A pipeline without its UNet: the fp32 VAE and CLIP on the device."""
    parts = {part: common.load_part(base, part, torch.float32) for part in common.PARTS if part != "unet"}
    for part in ("vae", "image_encoder"):
        parts[part].requires_grad_(False).to(device)
    return StableVideoDiffusionPipeline(unet=None, **parts)


def build_cache(clips, args, pipe_loader, base, accelerator):
    """Fills `clip["cache"]` for every clip, encoding those that have no current file; ranks share the work.

    pipe_loader() gives the fp32 VAE and CLIP on the device, called only where something is missing.
    """
    fingerprint = "-".join(common.weights_fingerprint(base, part)[:8] for part in ("vae", "image_encoder"))
    missing = []
    for clip in clips:
        root = clip["root"] / ".cache"
        if args.cache_dir:  # may be shared by several datasets
            root = Path(args.cache_dir) / hashlib.sha256(str(clip["root"].resolve()).encode()).hexdigest()[:8]
        clip["cache"] = root / f"{args.width}x{args.height}-{fingerprint}" / f"{clip['directory']}.safetensors"
        key = cache_key(clip, args, fingerprint)
        if not cache_is_current(clip["cache"], key):
            missing.append((clip, key))
    accelerator.wait_for_everyone()  # every rank has looked before one of them writes
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    if mine:
        pipe = pipe_loader()
        chunk = frames_at_once(args)
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


def add_latents(batch, pipe, args, device):
    """Without a cache: encodes the frames of a batch here and now, as the cache would have."""
    pixels, chunk = batch.pop("pixel_values"), frames_at_once(args)
    frames = ((pixels + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy()  # (B, T, H, W, 3)
    with torch.no_grad():
        posteriors = [pipe.vae.encode(part).latent_dist for part in pixels.flatten(0, 1).split(chunk)]
        first = [Image.fromarray(clip[0]) for clip in frames]
        batch["image_embeddings"] = pipe._encode_image(first, device, 1, False)
    mean, std = (torch.cat([getattr(p, name) for p in posteriors]) for name in ("mean", "std"))
    noise = batch.pop("posterior_noise")
    batch["latents"] = (mean + std * noise.flatten(0, 1)).view_as(noise) * pipe.vae.config.scaling_factor
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


# What is recomputed in the backward pass. 512x320x25, AdamW: 37.0 GiB and 41.5 TFLOP with none, 17.7 and 50.5 with
# transformers, 14.1 and 57.3 with full; recomputing the resnets alone would save little memory.
RECOMPUTED = {
    "none": (),
    "transformers": (TransformerSpatioTemporalModel,),
    "full": (TransformerSpatioTemporalModel, SpatioTemporalResBlock),
}


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
        if isinstance(module, RECOMPUTED[checkpointing]):  # diffusers' own checkpointing skips the temporal halves
            module.forward = checkpointed(module.forward)
    return unet.train()


def compile_blocks(unet):
    """Compiles each large block by itself, in place: the names in the state dict stay as they are."""
    torch._dynamo.config.cache_size_limit = 64  # the blocks come in more shapes than the default 8
    for module in unet.modules():
        if isinstance(module, (BasicTransformerBlock, TemporalBasicTransformerBlock, SpatioTemporalResBlock)):
            module.compile()


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


def gradients_freed_early(args, num_processes):
    """Whether each gradient can be used and freed as soon as it is there: nothing needs all of them at once."""
    alone = args.gradient_accumulation_steps == num_processes == 1
    return alone and args.max_grad_norm == 0 and args.mixed_precision != "fp16"


def build_optimizer(args, parameters, each_alone=False):
    """AdamW over the trained parameters: torch's fused one, or bitsandbytes' with 8-bit states."""
    options = {"lr": args.learning_rate, "weight_decay": args.adam_weight_decay}
    groups = [{"params": [parameter]} for parameter in parameters] if each_alone else [{"params": list(parameters)}]
    if args.optimizer == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def step_in_backward(optimizer, bad):
    """Updates each parameter in the backward pass and frees its gradient at once, so that they are never all there.

    bad: a device scalar, set where a gradient was not finite; such values are zeroed before they reach a weight.
    """

    def hook(parameter, group):
        torch.logical_or(bad, ~torch.isfinite(parameter.grad).all(), out=bad)
        parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
        groups, optimizer.param_groups = optimizer.param_groups, [group]
        optimizer.step()
        optimizer.param_groups = groups
        parameter.grad = None

    for group in optimizer.param_groups:
        group["params"][0].register_post_accumulate_grad_hook(partial(hook, group=group))


# ------------------------------------------------------------------------------------------------------- Forecast
# What a run needs, from the model's configuration alone: the real step, run on tensors that have a shape but no data.


class EightBitStates(torch.optim.Optimizer):
    """AdamW8bit's memory without bitsandbytes: two bytes a parameter and two scales for every 256."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter not in self.state:
                small = parameter.numel() < 4096
                shapes = (2, parameter.numel()), (2, 1 if small else parameter.numel() // 256)
                dtypes = (torch.float32 if small else torch.uint8), torch.float32
                self.state[parameter] = {
                    str(i): torch.empty(s, dtype=d) for i, (s, d) in enumerate(zip(shapes, dtypes))
                }


def forecast(args, folder, checkpointing, weight_dtype, count_flops=False):
    """Runs the real training step on fake tensors; nothing is loaded or computed.

    Returns GiB by part (`peak_memory_gib`, `weights_gib`, `gradients_gib`, `optimizer_gib`, `activations_gib`: what the
    peak holds beside the others), `trainable_parameters` and, if asked, `flops_per_step`.
    """
    tracker = common.memory_tracker()
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet = UNetSpatioTemporalConditionModel.from_config(common.read_config(folder, "unet"))
        prepare_unet(unet, args.trainable, weight_dtype, checkpointing)
        vae = AutoencoderKLTemporalDecoder.from_config(common.read_config(folder, "vae")).requires_grad_(False)
        vae.decoder = None
        trained = list(trained_parameters(unet).values())
        freed_early = gradients_freed_early(args, int(os.environ.get("WORLD_SIZE", 1)))
        if args.optimizer == "adamw8bit":
            optimizer = EightBitStates([{"params": [parameter]} for parameter in trained])
        else:
            optimizer = build_optimizer(args, trained, freed_early)
        if freed_early:
            step_in_backward(optimizer, torch.zeros((), dtype=torch.bool))
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        shape = (args.train_batch_size, args.num_frames, vae.config.latent_channels)
        shape += (args.height // factor, args.width // factor)
        batch = {"latents": torch.empty(shape), "noise": torch.empty(shape), "added_time_ids": torch.empty(shape[0], 3)}
        batch |= {"sigmas": torch.ones(shape[0]), "keep": torch.ones(shape[0])}
        batch["conditioning_image"] = torch.empty(shape[0], 3, args.height, args.width)
        batch["image_embeddings"] = torch.empty(shape[0], 1, unet.config.cross_attention_dim)
        average = [torch.empty_like(parameter) for parameter in trained] if args.use_ema else []
        weights = [*unet.parameters(), *vae.parameters(), *average]

        def step():
            loss, _ = training_loss(unet, vae, batch, weight_dtype)
            loss.backward()
            del loss
            if not freed_early:
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        with tracker:
            for tensor in [*weights, *batch.values()]:
                tracker.track(tensor)
            step()  # makes the optimizer's states
            tracker.peak = tracker.now
            step()
        result = {
            "peak_memory_gib": tracker.peak,
            "weights_gib": sum(p.numel() * p.element_size() for p in weights),
            "gradients_gib": (max if freed_early else sum)(p.numel() * 4 for p in trained),
            "optimizer_gib": sum(s.numel() * s.element_size() for p in trained for s in optimizer.state[p].values()),
        }
        result["activations_gib"] = 2 * result["peak_memory_gib"] - sum(result.values())
        result = {name: round(size / 2**30, 3) for name, size in result.items()}
        if count_flops:  # a second pass: the counter keeps recomputed activations alive
            with FlopCounterMode(display=False) as counter:
                step()
            result["flops_per_step"] = counter.get_total_flops() * args.gradient_accumulation_steps
    result["trainable_parameters"] = sum(p.numel() for p in trained)
    return result


def free_memory(device):
    """GiB that a run may use: what is free now, less what no forecast sees (CUDA's context, workspaces, fragments)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30 * 0.95 - 0.6
    return psutil.virtual_memory().available / 2**30 * 0.95 - 0.6


def cheapest_checkpointing(args, folder, weight_dtype, available):
    """`auto`: the mode with the least recomputation whose forecast fits; `full` where none does."""
    for mode in RECOMPUTED:
        if mode == "full" or forecast(args, folder, mode, weight_dtype)["peak_memory_gib"] <= available:
            return mode


def changes_that_fit(args, folder, weight_dtype, available):
    """The changes of the command line that would fit, cheapest first: [(flags, GiB)]. Each adds to the one before."""
    multiple, fitting, flags = common.size_multiple(folder), [], []
    batch = args.train_batch_size * args.gradient_accumulation_steps
    smaller = {s: max(multiple, int(getattr(args, s) * 0.7) // multiple * multiple) for s in ("width", "height")}
    for change in (
        {"gradient_checkpointing": "full"},
        {"train_batch_size": 1, "gradient_accumulation_steps": batch},
        {"optimizer": "adamw8bit", "max_grad_norm": 0},
        {"num_frames": min(14, args.num_frames)},
        smaller,
    ):
        change = {name: value for name, value in change.items() if getattr(args, name) != value}
        if not change:
            continue
        args = argparse.Namespace(**{**vars(args), **change})
        flags += [f"--{name} {value}" for name, value in change.items()]
        needed = forecast(args, folder, "full", weight_dtype)["peak_memory_gib"]
        if needed <= available:
            fitting.append((" ".join(flags), needed))
    return fitting


def dry_run(args, folder, weight_dtype, device):
    """Prints the plan of a run; its last line is one JSON object."""
    available = free_memory(device) if device.type == "cuda" else math.inf
    mode = args.gradient_checkpointing
    if mode == "auto":
        mode = cheapest_checkpointing(args, folder, weight_dtype, available) if device.type == "cuda" else "full"
    plan = forecast(args, folder, mode, weight_dtype, count_flops=True)
    unet, vae = common.read_config(folder, "unet"), common.read_config(folder, "vae")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    frame = 2 * vae["latent_channels"] * (args.width // factor) * (args.height // factor) + unet["cross_attention_dim"]
    clips = common.list_clips(args.dataset_dir) if Path(args.dataset_dir).is_dir() else ()
    frames = sum(len(clip["frames"]) for clip in clips)
    states = plan["optimizer_gib"] + (1 + args.use_ema) * plan["trainable_parameters"] * 4 / 2**30
    plan |= {"cache_gib": round(frames * frame * 4 / 2**30, 3), "checkpoint_gib": round(states, 3)}
    plan["output_gib"] = round(output_bytes(folder) / 2**30, 3)
    print(
        f"trains {plan['trainable_parameters'] / 1e6:.1f} M parameters ({args.trainable}) of"
        f" {args.pretrained_model_name}, {args.width}x{args.height}, {args.num_frames} frames, batch"
        f" {args.train_batch_size}, {args.mixed_precision}, {args.optimizer}, gradient checkpointing {mode}"
    )
    for name in ("weights", "gradients", "optimizer", "activations"):
        print(f"  {name:12s} {plan[f'{name}_gib']:8.2f} GiB" + (" at the peak" if name == "activations" else ""))
    print(f"  peak         {plan['peak_memory_gib']:8.2f} GiB, and about 0.6 GiB for CUDA itself")
    print(f"  a step       {plan['flops_per_step'] / 1e12:8.2f} TFLOP")
    print(
        f"  disk: cache {plan['cache_gib']:.2f} GiB for {frames} frames, {plan['checkpoint_gib']:.2f} GiB a checkpoint"
        f" (up to {args.checkpoints_total_limit + 1} at once), result {plan['output_gib']:.2f} GiB"
    )
    if device.type != "cuda":
        print("no CUDA GPU here to compare with: choose a card with more memory than the peak")
    elif plan["peak_memory_gib"] <= available:
        print(f"fits {torch.cuda.get_device_name()}: {available:.1f} GiB can be used")
    else:
        print(f"does not fit {torch.cuda.get_device_name()}: {available:.1f} GiB can be used")
        print(advice(args, folder, weight_dtype, available))
    print(json.dumps(plan))


def advice(args, folder, weight_dtype, available):
    """One sentence that names the changes that would fit, in order."""
    fitting = changes_that_fit(args, folder, weight_dtype, available)
    listed = "; or ".join(f"{flags} ({needed:.1f} GiB)" for flags, needed in fitting)
    return f"What would fit, cheapest first: {listed or 'nothing that the options can change; use a larger card'}"


def output_bytes(folder):
    """Size of the result: that of the base's files, or of fp32 weights where only the configuration is there."""
    try:
        return sum(f.stat().st_size for part in common.MODEL_PARTS for f in common.weight_files(folder, part))
    except (UserError, TypeError):  # no files there, or no folder at all
        with FakeTensorMode(allow_non_fake_inputs=True):
            models = [
                UNetSpatioTemporalConditionModel.from_config(common.read_config(folder, "unet")),
                AutoencoderKLTemporalDecoder.from_config(common.read_config(folder, "vae")),
                CLIPVisionModelWithProjection(CLIPVisionConfig(**common.read_config(folder, "image_encoder"))),
            ]
        return sum(4 * p.numel() for model in models for p in model.parameters())


# -------------------------------------------------------------------------------------------- Checkpoints, result
# checkpoint-N/: trained.safetensors, optimizer.safetensors, ema.safetensors, training_state.json; nothing pickled.


def write_tensors(path, tensors, metadata=None):
    """A safetensors file, written aside, flushed to disk and renamed: whole or not there."""
    aside = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.part")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata)
        with open(aside, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(errno.ENOSPC, f"cannot be written ({error})", str(path)) from error
    finally:
        aside.unlink(missing_ok=True)


def flatten_state(optimizer, names):
    """Optimizer state -> ({"name.key": tensor}, {"name.key": number}), by parameter name instead of by position."""
    tensors, numbers = {}, {}
    for name, parameter in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            value = value.clone() if key.startswith("qmap") else value  # bitsandbytes shares one table among all
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
        return
    with common.write_folder(final) as aside:
        tensors, numbers = flatten_state(run.optimizer, run.trained)
        write_tensors(aside / "trained.safetensors", {name: p.data for name, p in run.trained.items()})
        write_tensors(aside / "optimizer.safetensors", tensors)
        if run.ema:
            write_tensors(aside / "ema.safetensors", dict(zip(run.trained, run.ema.shadow_params)))
        state = {
            "step": step,
            "settings": run.settings,
            "optimizer": numbers,
            "scaler": run.scaler.state_dict() if run.scaler else None,
            "ema_step": run.ema.optimization_step if run.ema else None,
            "files": {file.name: common.file_digest(file) for file in aside.glob("*.safetensors")},
        }
        common.write_file(aside / common.CHECKPOINT_STATE, json.dumps(state, indent=1))
    done = [path for path in checkpoints_of(args.output_dir) if checkpoint_step(path) <= step]
    for old in done[: -args.checkpoints_total_limit]:
        shutil.rmtree(old)


def save_weights(run, folder, step, extra):
    """The trained weights alone, as infer_svd.py takes them, in place of what `folder` held before."""
    old = folder.with_name(f".{folder.name}.old")
    name, weights = ("ema", run.ema.shadow_params) if run.ema else ("trained", run.trained.values())
    with common.write_folder(folder) as aside:
        write_tensors(aside / f"{name}.safetensors", dict(zip(run.trained, weights)))
        state = {"step": step, "settings": run.settings, **extra}
        common.write_file(aside / common.CHECKPOINT_STATE, json.dumps(state, indent=1))
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
    shutil.rmtree(old, ignore_errors=True)


def checkpoint_step(folder):
    return int(folder.name.rsplit("-", 1)[1])


def checkpoints_of(output_dir):
    """The checkpoint folders of a run, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.rsplit("-", 1)[1].isdigit()]
    return sorted(found, key=checkpoint_step)


def read_checkpoint(folder):
    """The state of a complete checkpoint. Raises `UserError` that names the damaged or missing file."""
    path = Path(folder) / common.CHECKPOINT_STATE
    try:
        state = json.loads(path.read_text())
        if "files" not in state:
            raise UserError(f"{folder}: holds weights to generate with, no training to go on with")
        files = state["files"]
    except FileNotFoundError:
        raise UserError(f"{path}: missing; not a checkpoint of train_svd.py") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged") from None
    for name, digest in files.items():
        file = Path(folder) / name
        if not file.is_file() or common.file_digest(file) != digest:
            raise UserError(f"{file}: {'damaged' if file.is_file() else 'missing'}")
    return state


def find_checkpoint(args):
    """--resume_from_checkpoint -> (folder, state) or (None, None); `latest` takes the newest complete one."""
    if args.resume_from_checkpoint != "latest":
        return Path(args.resume_from_checkpoint), read_checkpoint(args.resume_from_checkpoint)
    for folder in reversed(checkpoints_of(args.output_dir)):
        try:
            return folder, read_checkpoint(folder)
        except UserError as error:
            print(f"{error}; taking the checkpoint before it", file=sys.stderr)
    if (Path(args.output_dir) / "model_index.json").exists():
        raise UserError(f"{args.output_dir} holds a result and no checkpoint to go on from; give another --output_dir")
    print(f"--resume_from_checkpoint latest: no checkpoint in {args.output_dir}; starting from the beginning")
    return None, None


def put_aside_newer(args, folder, step):
    """Renames what lies beyond the resumed step to `damaged-checkpoint-N`, out of the way of the new ones."""
    for newer in checkpoints_of(args.output_dir):
        if checkpoint_step(newer) > step:
            target = newer.with_name(f"damaged-{newer.name}")
            if args.resume_from_checkpoint != "latest" or target.exists():
                raise UserError(f"{newer} is beyond {folder or 'the beginning'}; move it away to go on from there")
            os.replace(newer, target)


def load_checkpoint(run, unet, folder, state):
    """Puts a checkpoint's weights, optimizer, schedule and average in place; returns the number of steps done."""
    folder = Path(folder)
    common.lay_over(unet, folder / "trained.safetensors")
    unflatten_state(run.optimizer, run.trained, load_file(folder / "optimizer.safetensors"), state["optimizer"])
    with warnings.catch_warnings():  # torch expects optimizer steps in between
        warnings.simplefilter("ignore")
        for _ in range(state["step"]):  # the schedule is a function of the step
            run.lr_scheduler.step()
    if run.ema:
        shadow = load_file(folder / "ema.safetensors")
        run.ema.shadow_params = [shadow[name] for name in run.trained]
        run.ema.optimization_step = state["ema_step"]
    return state["step"]


# Settings that may differ between a checkpoint and its resumption: they do not change the result.
FREE = """output_dir dataset_dir pretrained_model_name resume_from_checkpoint checkpointing_steps
checkpoints_total_limit cache_latents cache_dir dataloader_num_workers logging_steps report_to compile dry_run
gradient_checkpointing gradient_accumulation_steps train_batch_size max_train_steps versions step
validation_dir validation_steps validation_metric""".split()


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
        if part == "image_encoder":  # else transformers, given no dtype, loads fp16 beside diffusers' fp32
            config = {**common.read_config(base, part), "dtype": "float32"}
            common.write_file(aside / part / "config.json", json.dumps(config, indent=2))
        for source in common.weight_files(base, part) if part in common.MODEL_PARTS else ():
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
                target = aside / part / source.name.replace(".fp16", "")
                common.write_file(target, source.read_text().replace(".fp16", ""))
    (output / "model_index.json").unlink(missing_ok=True)  # from here until it is back, this is no finished result
    for part in common.PARTS:
        shutil.rmtree(output / part, ignore_errors=True)  # an earlier result of this same run, resumed to go further
        os.replace(aside / part, output / part)
    aside.rmdir()
    common.write_file(output / common.SETTINGS, json.dumps({**run.settings, "step": step}, indent=1))
    common.write_file(output / "README.md", model_card(run, step))
    common.write_file(output / "model_index.json", (base / "model_index.json").read_text())


def read_metrics(path):
    """The lines of a metrics.jsonl, without those that a crash cut off."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def model_card(run, step):
    """What the result is, as a README in the hub's format: base, data, settings, last validation, samples."""
    settings, output = run.settings, Path(run.args.output_dir)
    lines = read_metrics(output / "metrics.jsonl")
    scores = next((line for line in reversed(lines) if "validation_loss_v" in line), {})
    table = "".join(f"| {name.removeprefix('validation_')} | {value:.4g} |\n" for name, value in scores.items())
    videos = sorted((output / "validation").glob(f"step-{scores.get('step', 0):06d}/*.mp4"))
    samples = "".join(f"- [{video.name}]({video.relative_to(output).as_posix()})\n" for video in videos)
    what = f"{settings['num_clips']} clips, {step} steps of {settings['global_batch_size']}, {settings['width']}x"
    what += f"{settings['height']}, {settings['num_frames']} frames; trained: {settings['trainable']}. Median fps "
    what += f"{settings['median_fps']:g}, median motion_bucket_id {settings['median_motion_bucket_id']:g}: use these."
    return (
        f"---\nbase_model: {run.args.pretrained_model_name}\npipeline_tag: image-to-video\n"
        "library_name: diffusers\n---\n"
        f"\n# Stable Video Diffusion, fine-tuned\n\n{what} All settings: {common.SETTINGS}.\n"
        + (f"\n| held-out clips | real beside generated |\n|---|---|\n{table}\n{samples}" if scores else "")
    )


# ----------------------------------------------------------------------------------------------------- Validation
# Is it learning? Held-out clips: the loss at fixed noise, by noise level, and generated videos scored against the real.

VALIDATION_SIGMAS = (0.1, 0.5, 2.0, 10.0, 100.0)  # 8 of the 25 inference steps lie over 80
LOWER_IS_BETTER = ("loss_v", "flow_error")


def split_clips(clips, args):
    """(training clips, held-out clips): whole episodes are held out, so that no camera of one is on the other side."""
    if args.validation_dir:
        if not Path(args.validation_dir).is_dir():
            raise UserError(f"--validation_dir {args.validation_dir}: no such folder; make it with prepare_dataset.py")
        return clips, load_clips(args, args.validation_dir)[: args.num_validation_videos or None]
    groups = {}
    for clip in clips:
        groups.setdefault(common.clip_group(clip), []).append(clip)
    order = torch.randperm(len(groups), generator=random_generator(args.seed, "held out")).tolist()
    names, held_out, videos = list(groups), set(), 0
    for place in order:
        if videos >= args.num_validation_videos:
            break
        held_out.add(names[place])
        videos += len(groups[names[place]])
    if held_out and len(held_out) == len(groups):
        raise UserError(f"--num_validation_videos {args.num_validation_videos}: no episode would be left to train on")
    validation = [clip for name in names if name in held_out for clip in groups[name]]
    return [clip for clip in clips if common.clip_group(clip) not in held_out], validation[: args.num_validation_videos]


class Validation:
    """Scores the model as it stands on held-out clips, with generators of its own: it changes nothing of the run."""

    def __init__(self, run, clips, vae, weight_dtype):
        self.run, self.clips, self.vae, self.weight_dtype = run, clips, vae, weight_dtype
        self.dataset = ClipDataset(clips, run.args, vae.config, cached=True)
        self.folder = Path(run.args.output_dir) / "validation"
        self.pipe, self.copied, self.base, self.best = None, None, {}, None
        best = Path(run.args.output_dir) / "best" / common.CHECKPOINT_STATE
        if best.is_file():  # of this run, before it was resumed
            self.best = json.loads(best.read_text())["metrics"].get(run.args.validation_metric)

    def losses(self, unet, device):
        """Mean v loss by noise level, on the first window of every clip, with the same noise every time."""
        sums = dict.fromkeys(VALIDATION_SIGMAS, 0.0)
        for place in range(len(self.clips)):
            sample = self.dataset.sample(self.clips[place], 0, random_generator("validation", place))
            batch = {name: value[None].to(device) for name, value in sample.items()}
            batch["keep"] = torch.ones_like(batch["keep"])
            for sigma in VALIDATION_SIGMAS:
                batch["sigmas"] = torch.full_like(batch["sigmas"], sigma)
                loss, _ = training_loss(unet, self.vae, batch, self.weight_dtype)
                sums[sigma] += loss.item() / len(self.clips)
        return {f"loss_v_sigma_{sigma:g}": value for sigma, value in sums.items()} | {
            "loss_v": sum(sums.values()) / len(sums)
        }

    def generate(self, unet, clip, device):
        """The continuation of the clip's first frame by the stock pipeline: (T, H, W, 3) uint8."""
        args, pipe = self.run.args, self.pipe
        first = common.fit_frame(common.read_frame(clip["frames"][0]), args.width, args.height)
        latents = pipe(
            Image.fromarray(first), width=args.width, height=args.height, num_frames=args.num_frames,
            fps=round(clip["fps"]), motion_bucket_id=clip["motion_bucket_id"], output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).frames  # fmt: skip
        frames = pipe.decode_latents(latents.float(), args.num_frames, frames_at_once(args))  # the VAE stays in fp32
        return (pipe.video_processor.postprocess_video(frames, "np")[0] * 255).round().astype(np.uint8)

    @torch.no_grad()
    def __call__(self, unet, step, device):
        """{metric: mean over clips} of this step; writes `validation/step-N/<clip>.mp4`, real beside generated."""
        args, run = self.run.args, self.run
        if run.ema:
            run.ema.store(run.trained.values())
            run.ema.copy_to(run.trained.values())
        try:
            metrics, scores, copied = self.losses(unet, device), [], []
            if self.pipe is None:
                parts = {
                    part: common.load_part(run.base, part, torch.float32) for part in common.PARTS if part != "unet"
                }
                self.pipe = StableVideoDiffusionPipeline(unet=unet, **parts)
                self.pipe.set_progress_bar_config(disable=True)
            self.pipe.vae.to(device)
            self.pipe.image_encoder.to(device, self.weight_dtype)
            target = self.folder / f"step-{step:06d}"
            target.mkdir(parents=True, exist_ok=True)
            for clip in self.clips:
                real = [
                    common.fit_frame(common.read_frame(p), args.width, args.height)
                    for p in clip["frames"][: args.num_frames]
                ]
                real, generated = np.stack(real), self.generate(unet, clip, device)
                scores.append(common.video_metrics(generated, real))
                copied.append(common.video_metrics(np.repeat(real[:1], len(real), axis=0), real))
                name = clip["directory"].replace("/", "_")
                sheet = common.side_by_side({"real": real, f"generated, step {step}": generated})
                common.write_video(target / f"{name}.mp4", sheet, clip["fps"])
            self.copied = mean_scores(copied)
            return metrics | mean_scores(scores) | {f"copied_{name}": value for name, value in self.copied.items()}
        except (RuntimeError, OSError) as error:  # out of memory has many names; nothing here is worth the run
            tqdm.write(f"validation failed and was left out; training goes on ({str(error).splitlines()[0]})")
            return {}
        finally:
            if self.pipe:
                self.pipe.vae.to("cpu")
                self.pipe.image_encoder.to("cpu")
            torch.cuda.empty_cache()
            if run.ema:
                run.ema.restore(run.trained.values())

    def report(self, metrics, step):
        """Prints the scores, warns of frozen video, and keeps the weights of the best step in `best/`."""
        self.base = self.base or metrics  # the first validation of a run is that of the base
        rows = {f"step {step}": metrics, "first validation": self.base, "first frame copied": self.copied}
        for label, row in rows.items():
            names = [n for n in ("loss_v", "psnr_moving", "motion_ratio", "flow_error") if row.get(n) is not None]
            tqdm.write(f"{label}: " + ", ".join(f"{name} {row[name]:.3f}" for name in names))
        if metrics.get("motion_ratio", 1.0) < 0.5:
            tqdm.write(
                f"warning: generated video moves {metrics['motion_ratio']:.2f} times as much as the real one. Try"
                " --P_mean 1.0, fewer steps or a lower --learning_rate; check fps and motion in metadata.jsonl"
            )
        value = metrics.get(self.run.args.validation_metric)
        sign = -1 if self.run.args.validation_metric in LOWER_IS_BETTER else 1
        if value is not None and (self.best is None or sign * value > sign * self.best):
            self.best = value
            save_weights(self.run, Path(self.run.args.output_dir) / "best", step, {"metrics": metrics})


def mean_scores(scores):
    """The mean of each metric over the clips that have it."""
    values = {name: [score[name] for score in scores if score[name] is not None] for name in scores[0]}
    return {name: float(np.mean(given)) for name, given in values.items() if given}


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
    schedules = [s.value for s in SchedulerType if s.value != "piecewise_constant"]  # that one needs a rule
    add("--lr_scheduler", choices=schedules, default="constant", help="of the learning rate (default constant)")
    add("--lr_warmup_steps", type=int, default=0, help="optimizer steps of linear warm-up (default 0)")
    add("--max_grad_norm", type=at_least_zero, help="clip the gradient's norm; 0: do not, and free each gradient as"
        " soon as it is used (default 1; 0 with adamw8bit)")  # fmt: skip
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

    add("--deterministic", action="store_true", help="slower kernels, one CPU thread, the same bits every time")
    add("--compile", action="store_true", help="torch.compile the blocks: slow to start, faster to run on a GPU")
    add(
        "--dry_run",
        action="store_true",
        help="print what the run needs and whether it fits, from the configuration alone",
    )

    add = parser.add_argument_group("validation").add_argument
    add("--validation_dir", help="prepared folder of held-out clips")
    add("--num_validation_videos", type=int, default=0, help="else: hold out so many clips, whole episodes (default 0)")
    add("--validation_steps", type=positive, default=500, help="validate every so many steps, and before the first")
    add("--validation_metric", default="psnr_moving", choices=["psnr_moving", "loss_v", "flow_error", "ssim", "psnr"],
        help="the best step by this is kept in OUTPUT_DIR/best (default psnr_moving)")  # fmt: skip

    add = parser.add_argument_group("checkpoints and logs").add_argument
    add("--checkpointing_steps", type=positive, default=500, help="save every so many steps (default 500)")
    add("--checkpoints_total_limit", type=positive, default=2, help="keep the newest so many (default 2)")
    add("--resume_from_checkpoint", metavar="latest|FOLDER", help="go on from a checkpoint of this run")
    add("--logging_steps", type=positive, default=10, help="a line in metrics.jsonl every so many steps (default 10)")
    add("--report_to", choices=["tensorboard", "wandb"], help="also log there, where it is installed")
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
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        args.lr_scheduler = "constant_with_warmup"  # diffusers' `constant` would ignore the warm-up
    if not args.ema_decay < 1:
        parser.error(f"--ema_decay must be under 1, got {args.ema_decay:g}")
    if args.num_validation_videos < 0:
        parser.error(f"--num_validation_videos must be at least 0, got {args.num_validation_videos}")
    if args.num_frames < 2:
        parser.error("--num_frames must be at least 2: one frame has no motion to learn")
    if args.max_grad_norm is None:
        args.max_grad_norm = 0.0 if args.optimizer == "adamw8bit" else 1.0
    for module, flag in (("bitsandbytes", args.optimizer == "adamw8bit"), (args.report_to, args.report_to)):
        if flag and not args.dry_run and importlib.util.find_spec(module) is None:
            parser.error(f"{'--report_to' if module == args.report_to else '--optimizer'} needs: pip install {module}")
    if (args.validation_dir or args.num_validation_videos) and not args.cache_latents:
        parser.error("validation reads the latent cache: leave out --no-cache_latents")
    if args.optimizer == "adamw8bit" and not torch.cuda.is_available() and not args.dry_run:
        parser.error("--optimizer adamw8bit needs a CUDA GPU; leave it out on the CPU")
    if not torch.cuda.is_available() and args.mixed_precision == "fp16" and not args.dry_run:
        parser.error("--mixed_precision fp16 needs a CUDA GPU; on the CPU use no or bf16")
    output = Path(args.output_dir)
    if not args.dry_run and output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not (output / "metrics.jsonl").is_file():
            parser.error(f"--output_dir {output} holds something that is no run of this script; give another folder")
        if not args.resume_from_checkpoint:
            parser.error(f"--output_dir {output} already holds a run; give another, or --resume_from_checkpoint latest")
    return args


# ----------------------------------------------------------------------------------------------------------- Main


class Run:
    """What saving, validating and logging need of a run in progress; `main` fills it in."""

    args: argparse.Namespace
    settings: dict  # what goes into every checkpoint and the result
    base: Path  # folder of the model it started from
    trained: dict  # {name: fp32 parameter}
    optimizer: torch.optim.Optimizer
    lr_scheduler: object
    scaler: object = None
    ema: EMAModel | None = None


def choose_precision(args, device):
    """Fills in --mixed_precision and returns its dtype: bf16; fp16 on GPUs without it; fp32 on a CPU."""
    if args.mixed_precision is None:
        older = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
        args.mixed_precision = "fp16" if older else "bf16" if device.type == "cuda" or args.dry_run else "no"
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.mixed_precision]


def describe_run(args, base, clips, accelerator):
    """The settings that every checkpoint and the result carry."""
    args.global_batch_size = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    local = Path(args.pretrained_model_name).is_dir()
    fps, buckets = ([clip[name] for clip in clips] for name in ("fps", "motion_bucket_id"))
    seen = [(clip["directory"], len(clip["frames"]), clip["fps"], clip["motion_bucket_id"]) for clip in clips]
    return {
        **vars(args),
        "pretrained_model_name": str(base.resolve()) if local else args.pretrained_model_name,
        "base_fingerprint": common.weights_fingerprint(base, "unet"),
        "dataset": hashlib.sha256(repr(seen).encode()).hexdigest()[:16],
        "num_clips": len(clips),
        "median_fps": statistics.median(fps),
        "median_motion_bucket_id": statistics.median(buckets),
        "motion_bucket_id_range": [min(buckets), max(buckets)],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }


def main(argv=None):
    args = parse_args(argv)
    cv2.setNumThreads(0)  # the loader has threads of its own
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_num_threads(1)  # the order of sums must not depend on the number of cores
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.dry_run:
        weight_dtype, folder = choose_precision(args, device), common.resolve_config(args.pretrained_model_name)
        common.check_sizes(args, folder)
        return dry_run(args, folder, weight_dtype, device)
    try:
        return train(args, device)
    except torch.cuda.OutOfMemoryError as error:
        available = torch.cuda.get_device_properties(device).total_memory / 2**30 * 0.95 - 0.6
        advised = advice(
            args, common.resolve_model(args.pretrained_model_name), choose_precision(args, device), available
        )
        raise UserError(f"the GPU's memory is not enough ({str(error).splitlines()[0]}). {advised}") from None


def train(args, device):
    """One run, from the first or a saved step to the result; returns the exit status."""
    # set up: everything that can be refused is refused before a weight is loaded
    run = Run()
    run.args, run.base = args, common.resolve_model(args.pretrained_model_name)
    common.check_sizes(args, run.base)
    clips, held_out = split_clips(load_clips(args, args.dataset_dir), args)
    folder, state = find_checkpoint(args) if args.resume_from_checkpoint else (None, None)
    weight_dtype = choose_precision(args, device)
    accelerator = Accelerator(
        # fp16 needs accelerate's gradient scaler, but never its autocast: prepare_unet has cast what is to be cast
        mixed_precision="fp16" if args.mixed_precision == "fp16" else "no",
        cpu=device.type == "cpu",
        kwargs_handlers=[
            AutocastKwargs(enabled=False),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=datetime.timedelta(hours=12)),  # the others wait while one validates
        ],
        log_with=args.report_to,
        project_dir=args.output_dir,
    )
    device = accelerator.device
    run.settings = describe_run(args, run.base, clips, accelerator)
    if state:
        check_resume(run.settings, state["settings"], folder)
        if state["step"] > args.max_train_steps:
            raise UserError(f"{folder} is beyond --max_train_steps {args.max_train_steps}")
    if args.resume_from_checkpoint and accelerator.is_main_process:
        put_aside_newer(args, folder, state["step"] if state else 0)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    checkpointing = args.gradient_checkpointing
    if checkpointing == "auto":
        checkpointing = cheapest_checkpointing(args, run.base, weight_dtype, free_memory(device))

    # data: with the cache, training needs the VAE's encoder alone, and CLIP not at all
    pipe = None if args.cache_latents else load_encoders(run.base, device)
    if args.cache_latents:
        build_cache(clips + held_out, args, partial(load_encoders, run.base, device), run.base, accelerator)
    vae = pipe.vae if pipe else common.load_part(run.base, "vae", torch.float32).requires_grad_(False)
    if not pipe:
        vae.decoder = None
        vae.to(device)
    dataset = ClipDataset(clips, args, vae.config, cached=not pipe)

    # model
    unet = common.load_part(run.base, "unet", torch.float32)
    prepare_unet(unet, args.trainable, weight_dtype, checkpointing)
    if args.compile:
        compile_blocks(unet)
    unet.to(device)
    run.trained = trained_parameters(unet)
    freed_early = gradients_freed_early(args, accelerator.num_processes)
    run.optimizer = build_optimizer(args, run.trained.values(), freed_early)
    run.lr_scheduler = get_scheduler(
        args.lr_scheduler, run.optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    run.ema = EMAModel(run.trained.values(), decay=args.ema_decay, foreach=True) if args.use_ema else None
    first_step = load_checkpoint(run, unet, folder, state) if state else 0
    bare_unet, (unet, optimizer) = unet, accelerator.prepare(unet, run.optimizer)
    bare_unet.__dict__.pop("forward", None)  # with fp16, accelerate's fp32 outputs would break the stock pipeline
    run.scaler = accelerator.scaler
    if state and run.scaler:
        run.scaler.load_state_dict(state["scaler"])
    if run.ema:
        run.ema.to(device)
    bad = torch.zeros((), dtype=torch.bool, device=device)  # whether a gradient was not finite
    bad_step = torch.full((), -1, dtype=torch.int64, device=device)  # and in which step first
    if freed_early:
        step_in_backward(run.optimizer, bad)
    validation = Validation(run, held_out, vae, weight_dtype) if held_out and accelerator.is_main_process else None
    accelerator.print(
        f"{len(clips)} clips{f' and {len(held_out)} held out' if held_out else ''}, {args.max_train_steps} steps of"
        f" {args.global_batch_size}; {sum(p.numel() for p in run.trained.values()) / 1e6:.1f} M parameters trained"
        f" ({args.trainable}), {args.mixed_precision} on {device.type}, gradient checkpointing {checkpointing}"
    )

    # loop: one pass is one optimizer step
    size, ranks, accumulation = args.train_batch_size, accelerator.num_processes, args.gradient_accumulation_steps
    index_batches = (
        [step * args.global_batch_size + (micro * ranks + accelerator.process_index) * size + i for i in range(size)]
        for step in range(first_step, args.max_train_steps)
        for micro in range(accumulation)
    )
    loader = batches(dataset, index_batches, device, args.dataloader_num_workers)
    stop, log = StopSignal(), Log(run, accelerator, first_step)
    if first_step == 0:
        log.validate(validation, bare_unet, 0)
    for step in range(first_step, args.max_train_steps):
        for micro in range(accumulation):
            batch = log.timed(next, loader)
            if pipe:
                batch = add_latents(batch, pipe, args, device)
            with contextlib.nullcontext() if micro == accumulation - 1 else accelerator.no_sync(unet):
                loss, losses = training_loss(unet, vae, batch, weight_dtype, args.loss)
                accelerator.backward(loss / accumulation)
            log.add(losses)
        # A non-finite gradient must not reach the weights, nor cost a CPU-GPU sync each step: fused AdamW skips its
        # update on the device while found_inf is set, and the step is named when the next line is logged. With fp16 an
        # overflow is the scaler's business (it sets found_inf itself), so there only the loss counts.
        if not freed_early:
            grad_norm = accelerator.clip_grad_norm_(run.trained.values(), args.max_grad_norm or math.inf)
            bad = ~torch.isfinite(accelerator.reduce(loss.detach()) if run.scaler else grad_norm)
            log.add({"grad_norm": grad_norm})
        bad_step = torch.where(bad & (bad_step < 0), step, bad_step)
        if not run.scaler:
            run.optimizer.found_inf = (bad_step >= 0).float()
        if args.optimizer == "adamw8bit" and not freed_early:  # bitsandbytes does not know found_inf: look now
            log.stop_if_bad(bad_step, dataset)
        if not freed_early:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        run.lr_scheduler.step()
        if run.ema:
            run.ema.step(run.trained.values())
        done = step + 1

        stopping = stop.requested(accelerator)
        saving = done % args.checkpointing_steps == 0 or done == args.max_train_steps or stopping
        validating = held_out and (done % args.validation_steps == 0 or done == args.max_train_steps)
        if done % args.logging_steps == 0 or done == args.max_train_steps or saving or validating:
            log.stop_if_bad(bad_step, dataset)
            log.write(done)
        log.progress.update()
        if saving and accelerator.is_main_process:
            save_checkpoint(run, done)
        if stopping:
            accelerator.wait_for_everyone()  # a launcher ends the others as soon as one has ended
            accelerator.print(f"\nstopped after step {done}, saved; go on with --resume_from_checkpoint latest")
            return 128 + stopping
        if validating:
            log.validate(validation, bare_unet, done)
    log.progress.close()

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_result(run, args.max_train_steps)
        print(f"done: {args.output_dir} is a diffusers pipeline; python infer_svd.py --model_dir {args.output_dir} ...")
    accelerator.wait_for_everyone()  # a process that is gone would leave the others waiting at the end
    # The wrapper of several processes goes before their group: if it let go of the group last, it would wait for the
    # group's threads with Python's lock in its hand, and they for the lock: a deadlock, seen on one busy core.
    (unet,) = accelerator.free_memory(unet)
    gc.collect()
    accelerator.end_training()
    return 0


class StopSignal:
    """SIGINT and SIGTERM ask for a stop after the step; a second Ctrl-C stops at once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # not SIGTERM: launchers send it twice

    def requested(self, accelerator):
        """The signal's number, or 0; the same answer on every process."""
        if accelerator.num_processes == 1:
            return self.signal
        received = torch.tensor(self.signal, device=accelerator.device)
        return int(accelerator.gather(received[None]).max())


class Log:
    """The progress bar, metrics.jsonl and --report_to; device values are read only when a line is written."""

    def __init__(self, run, accelerator, first_step):
        self.run, self.accelerator, self.path = run, accelerator, Path(run.args.output_dir) / "metrics.jsonl"
        if accelerator.is_main_process:  # a resumed run writes the lines after its checkpoint again
            kept = [line for line in read_metrics(self.path) if line["step"] <= first_step and first_step]
            common.write_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        if run.args.report_to:
            accelerator.init_trackers(
                "svd", {k: v for k, v in vars(run.args).items() if isinstance(v, int | float | str)}
            )
        total, quiet = run.args.max_train_steps, not accelerator.is_main_process
        self.progress = tqdm(total=total, initial=first_step, desc="training", unit="step", disable=quiet)
        self.start(first_step)

    def start(self, step):
        self.sums, self.counts, self.waited, self.since, self.step = {}, {}, 0.0, time.perf_counter(), step
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def timed(self, function, *args):
        """Calls it, and counts the time as waiting for data."""
        start = time.perf_counter()
        result = function(*args)
        self.waited += time.perf_counter() - start
        return result

    def add(self, values):
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def stop_if_bad(self, bad_step, dataset):
        """Ends the run with the names of the clips if a gradient was not finite; the weights are those before it."""
        if self.accelerator.scaler and self.accelerator.scaler.get_scale() < 2**-14:
            raise UserError(
                "fp16 gradients overflow at every step; use --mixed_precision bf16 or a lower --learning_rate"
            )
        if (step := bad_step.item()) >= 0:
            batch = self.run.args.global_batch_size
            names = sorted({dataset.clip_of(index)["directory"] for index in range(step * batch, (step + 1) * batch)})
            raise UserError(
                f"step {step + 1}: the loss or a gradient is not finite; it did not reach the weights. Its clips:"
                f" {', '.join(names)}. Look at them, or try a lower --learning_rate, or --mixed_precision bf16"
            )

    def write(self, step):
        reduce, elapsed = self.accelerator.reduce, time.perf_counter() - self.since
        means = {name: reduce(total / self.counts[name], "mean").item() for name, total in self.sums.items()}
        line = {"step": step, **means, "learning_rate": self.run.lr_scheduler.get_last_lr()[0]}
        line["seconds_per_step"] = round(elapsed / (step - self.step), 4)
        line["data_wait_share"] = round(self.waited / elapsed, 4)
        if self.accelerator.device.type == "cuda":
            line["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.append(line)
        shown = {"loss": f"{means['loss_v']:.4f}", "lr": f"{line['learning_rate']:.1e}"}
        shown |= {"mem": f"{line['peak_memory_gib']:.1f}G"} if "peak_memory_gib" in line else {}
        self.progress.set_postfix(shown, refresh=False)
        self.start(step)

    def append(self, line):
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    def send_videos(self, step):
        """The side-by-side videos of a validation, to TensorBoard (needs moviepy there) or Weights & Biases."""
        for path in (
            sorted(self.path.parent.glob(f"validation/step-{step:06d}/*.mp4")) if self.run.args.report_to else ()
        ):
            tracker = self.accelerator.get_tracker(self.run.args.report_to, unwrap=True)
            if self.run.args.report_to == "wandb":
                import wandb

                tracker.log({path.stem: wandb.Video(str(path), format="mp4")}, step=step)
            elif importlib.util.find_spec("moviepy"):
                video = torch.from_numpy(common.read_video(path)).permute(0, 3, 1, 2)[None]
                tracker.add_video(path.stem, video, step, fps=4)

    def validate(self, validation, unet, step):
        if validation:
            metrics = validation(unet, step, self.accelerator.device)
            if metrics:
                self.append({"step": step, **{f"validation_{name}": value for name, value in metrics.items()}})
                validation.report(metrics, step)
                self.send_videos(step)
            self.start(step)


if __name__ == "__main__":
    common.run_script(main)
