r"""Fine-tunes Stable Video Diffusion on a folder of clips, on one GPU.

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
import functools
import gc
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import quote

import svd_common as common  # isort: skip  (first: it quiets OpenCV and transformers, which read that once)
from svd_common import UserError  # isort: skip

import accelerate
import cv2
import diffusers
import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from diffusers import AutoencoderKLTemporalDecoder, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from diffusers.models.activations import GEGLU
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
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
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
DEFAULT_FPS, DEFAULT_BUCKET = 7, 127  # SVD's own, for clips of which metadata.jsonl says nothing


def random_generator(*key):
    """A CPU generator that depends on `key` alone: the same numbers on every machine, in every order."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little"))


@functools.lru_cache(maxsize=4)  # the loader's threads may be in two epochs at once
def shuffled(count, *key):
    """0 .. count - 1 in an order that depends on `key` alone."""
    return torch.randperm(count, generator=random_generator(*key)).tolist()


@contextlib.contextmanager
def cure_named(clip):
    """What is wrong with a file of this clip becomes a `UserError` that names the clip and the cure."""
    try:
        yield
    except (UserError, OSError, SafetensorError) as error:
        what = error if isinstance(error, UserError) else f"{clip['root'] / clip['directory']}: {error}"
        cure = f"mend it, or go on without this clip: --exclude {shlex.quote(clip['directory'])}"
        raise UserError(f"{what}; {cure}") from error


class ClipDataset:
    """Random windows of consecutive frames, with every random number of a training step already drawn.

    `dataset[index]`, any index >= 0: each clip once an epoch, in an order shuffled by (seed, epoch).
    Shapes, without the batch axis: latents and noise (T, 4, h, w); sigmas (); conditioning_image (3, H, W), the first
    frame in [-1, 1] with its noise; image_embeddings (1, D); added_time_ids (3,); keep (), 0 where both image
    conditions are dropped. Without a cache: pixel_values (T, 3, H, W) and posterior_noise instead of latents.
    """

    def __init__(self, clips, args, vae_config, cached):
        self.clips, self.args, self.cached = clips, args, cached
        factor = common.latent_factor(vae_config)
        self.scaling_factor = vae_config.scaling_factor
        self.latent_shape = (vae_config.latent_channels, args.height // factor, args.width // factor)

    def clip_of(self, index):
        """The clip that `dataset[index]` is cut from."""
        epoch, place = divmod(index, len(self.clips))
        return self.clips[shuffled(len(self.clips), self.args.seed, "order", epoch)[place]]

    def __getitem__(self, index):
        """Raises `UserError` that names the clip where a file of it cannot be read any more."""
        clip, generator = self.clip_of(index), random_generator(self.args.seed, "sample", index)
        last_start = len(clip["frames"]) - self.args.num_frames
        with cure_named(clip):
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
        frames = clip["frames"][start : start + (1 if self.cached else args.num_frames)]
        pixels = common.to_pixels(common.read_frames(frames, args.width, args.height)).contiguous()
        noise = torch.randn(pixels.shape[1:], generator=generator)
        sample["conditioning_image"] = pixels[0] + noise_aug_strength * noise
        if self.cached:
            mean, std, embedding = read_cached(clip["cache"], start, args.num_frames)
            sample["latents"] = (mean + std * posterior_noise) * self.scaling_factor
            sample["image_embeddings"] = embedding
        else:
            sample |= {"pixel_values": pixels, "posterior_noise": posterior_noise}
        return sample


def batches(dataset, index_batches, pin_memory, num_workers):
    """Yields a batch on the CPU for each list of B indices: ClipDataset's samples, stacked: {name: (B, ...)}.

    num_workers: threads that prepare batches ahead, two for each; pin_memory: whether a GPU will fetch them. Threads,
    since OpenCV, safetensors and torch release the GIL, and a forked worker would deadlock in OpenCV. An error of a
    sample is raised in its turn.
    """

    def load(indices):
        samples = [dataset[index] for index in indices]
        batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
        return {key: value.pin_memory() for key, value in batch.items()} if pin_memory else batch

    torch.zeros(()).exp()  # MKL's very first exp, if several threads call it at once, is now and then off by 7e-5
    with ThreadPoolExecutor(num_workers) as pool:
        jobs = (pool.submit(load, indices) for indices in index_batches)
        ahead = deque(itertools.islice(jobs, 2 * num_workers))
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(itertools.islice(jobs, 1))
            yield batch


def load_clips(args, dataset_dir):
    """The clips that can be trained on, with `fps` and `motion_bucket_id` filled in; short ones are named.

    Raises `UserError` where none is as long as --num_frames, and as `common.list_clips` does.
    """
    found = common.list_clips(dataset_dir)
    clips = [clip for clip in found if len(clip["frames"]) >= args.num_frames]
    if not clips:
        longest = max(len(clip["frames"]) for clip in found)
        what = f"no clip is that long; the longest has {longest} frames ({dataset_dir})"
        raise UserError(f"--num_frames {args.num_frames}: {what}")
    short = [clip for clip in found if len(clip["frames"]) < args.num_frames]
    if short:
        named = listed([f"{clip['directory']} has {len(clip['frames'])} frames" for clip in short])
        print(f"left out: {named}; --num_frames is {args.num_frames}")
    generated = sum(bool(clip.get("generated")) for clip in clips)
    if generated:
        print(f"{generated} of {len(clips)} clips are generated by a model, not recorded")
    unknown = sum("fps" not in clip for clip in clips)
    if unknown:
        print(f"{unknown} clips without metadata: --fps {args.fps:g}, --motion_bucket_id {args.motion_bucket_id:g}")
    return [{"fps": args.fps, "motion_bucket_id": args.motion_bucket_id, **clip} for clip in clips]


def clip_group(clip):
    """What must stay together when clips are held out: all cameras of one LeRobot episode, else the video itself."""
    source = str(clip.get("group") or clip.get("source") or clip["directory"])
    episode = re.match(r"(.*?)videos/(chunk-\d+)/[^/]+/(episode_\d+)", source)
    return "/".join(episode.groups()) if episode else source


def hold_out(clips, args, known=None):
    """(training clips, held-out clips): whole episodes are held out, so that no camera of one is on the other side.

    known: names of those that the run being resumed held out; then it is these, whatever has come or gone meanwhile.
    """
    if args.validation_dir:
        if not Path(args.validation_dir).is_dir():
            raise UserError(f"--validation_dir {args.validation_dir}: no such folder; make it with prepare_dataset.py")
        return clips, load_clips(args, args.validation_dir)[: args.num_validation_videos or None]
    if known is not None:
        held_out = [clip for clip in clips if clip["directory"] in known]
        if known and not held_out:
            print(f"warning: no clip is there that this run held out ({listed(known)}): nothing is validated any more")
        return [clip for clip in clips if clip["directory"] not in known], held_out
    groups = {}
    for clip in clips:
        groups.setdefault(clip_group(clip), []).append(clip)
    names = list(groups)
    drawn = [names[place] for place in shuffled(len(names), args.seed, "held out")]
    before = itertools.accumulate((len(groups[name]) for name in drawn), initial=0)
    held_out = {name for name, videos in zip(drawn, before) if videos < args.num_validation_videos}
    if len(held_out) == len(groups):
        raise UserError(f"--num_validation_videos {args.num_validation_videos}: no episode would be left to train on")
    validation = [clip for name in names if name in held_out for clip in groups[name]][: args.num_validation_videos]
    return [clip for clip in clips if clip_group(clip) not in held_out], validation


def leave_out(sides, patterns):
    """Both sides without the clips that --exclude names; says how many, and which names are no clip's.

    This comes after `hold_out`, so that the other clips stay on the side where they are without it.
    """
    left = [[clip for clip in clips if not common.is_named(patterns, clip["directory"])] for clips in sides]
    for name in common.names_of_nothing(patterns, [(clip["directory"],) for clips in sides for clip in clips]):
        print(f"warning: --exclude {name}: no clip that would be used is called so")
    if not left[0]:
        raise UserError(f"--exclude {' '.join(exclude_names(patterns)[:5])}: no clip is left to train on")
    if patterns:
        print(f"--exclude: {sum(map(len, sides)) - sum(map(len, left))} of {sum(map(len, sides))} clips left out")
    return left


def exclude_names(patterns):
    """What --exclude holds as one list of text: its patterns, and the lines of its lists."""
    return [name for pattern in patterns for name in ([pattern] if isinstance(pattern, str) else sorted(pattern))]


# Cache: the frozen VAE's posterior and CLIP's embedding of every frame, one file a clip, computed once.


def add_digests(clips):
    """Fills `clip["digest"]`, which tells its frames from others, wherever they lie: sizes and last 4 KB of the files.

    So they are not read whole: a PNG ends with a checksum of its pixels, other compressed files change in length. Of
    these the first 4 KB count too, where EXIF turns a picture. A BMP is read whole. Raises `OSError` where a file
    cannot be read.
    """

    def digest(clip):
        hashed = hashlib.sha256()
        for path in clip["frames"]:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                head = file.read(4096) if path.suffix.lower() not in (".png", ".bmp") else b""
                file.seek(0 if path.suffix.lower() == ".bmp" else max(0, size - 4096))
                hashed.update(head + size.to_bytes(8, "little") + file.read())
        return hashed.hexdigest()[:16]

    with ThreadPoolExecutor(16) as pool:
        for clip, found in zip(clips, pool.map(digest, clips)):
            clip["digest"] = found


def frames_at_once(args):
    """How many frames the VAE encodes at a time: bounds its activations to about 3 GiB."""
    return max(1, 512 * 320 * 8 // (args.width * args.height))


def cache_is_current(path, digest):
    try:
        with safe_open(path, "pt") as cached:
            return (cached.metadata() or {}).get("key") == digest
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


def load_frozen(clips, args, base, accelerator):
    """What training needs of the frozen parts: (pipeline that encodes, or None with the cache; VAE; its decoder).

    With the cache, which is filled here, training needs the VAE's encoder alone, and CLIP not at all.
    """
    if args.cache_latents:
        build_cache(clips, args, base, accelerator)
        pipe, vae = None, common.load_part(base, "vae", torch.float32).requires_grad_(False)
    else:
        pipe = load_encoders(base, accelerator.device)
        vae = pipe.vae
    decoder, vae.decoder = vae.decoder, None
    return pipe, vae, decoder


def encoders_fingerprint(base):
    """Tells the frozen parts that the cache is made by from others."""
    return "-".join(common.weights_fingerprint(base, part)[:8] for part in ("vae", "image_encoder"))


def build_cache(clips, args, base, accelerator):
    """Fills `clip["cache"]` for every clip, encoding those that have no current file; the processes share the work."""
    fingerprint = encoders_fingerprint(base)
    for clip in clips:
        root, name = clip["root"] / ".cache", "/".join(map(common.plain_name, clip["directory"].split("/")))
        if args.cache_dir:  # may be shared by several datasets
            root, name = Path(args.cache_dir), f"{name}-{clip['digest']}"
        clip["cache"] = root / f"{args.width}x{args.height}-{fingerprint}" / f"{name}.safetensors"
    missing = [clip for clip in clips if not cache_is_current(clip["cache"], clip["digest"])]
    for folder in {clip["cache"].parent for clip in missing}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            str(folder).encode()
        except (OSError, UnicodeEncodeError) as error:
            why = getattr(error, "strerror", "the name is not UTF-8")
            cure = "name a folder that can by --cache_dir, or train without: --no-cache_latents"
            raise UserError(f"{folder}: the cache cannot be written there ({why}); {cure}") from None
    accelerator.wait_for_everyone()  # every process has looked before one of them writes
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    if mine:
        encode_clips(mine, args, load_encoders(base, accelerator.device), accelerator)
        gc.collect()
        torch.cuda.empty_cache()  # what the encoders took: `usable_memory` would not count it as free
    accelerator.wait_for_everyone()


@torch.no_grad()
def encode_clips(clips, args, pipe, accelerator):
    """Writes the cache file of every clip: posterior mean and std (N, 4, h, w), CLIP embeddings (N, 1, D), all fp32."""
    total, chunk, device = sum(len(clip["frames"]) for clip in clips), frames_at_once(args), accelerator.device
    with tqdm(total=total, desc="caching latents", unit="frame", disable=not accelerator.is_main_process) as progress:
        for clip in clips:
            parts = []
            for i in range(0, len(clip["frames"]), chunk):
                with cure_named(clip):
                    frames = common.read_frames(clip["frames"][i : i + chunk], args.width, args.height)  # (n, H, W, 3)
                posterior = pipe.vae.encode(common.to_pixels(frames).to(device)).latent_dist
                embeddings = pipe._encode_image([Image.fromarray(frame) for frame in frames], device, 1, False)
                parts.append([part.cpu() for part in (posterior.mean, posterior.std, embeddings)])
                progress.update(len(frames))
            tensors = dict(zip(("mean", "std", "image_embeddings"), (torch.cat(part) for part in zip(*parts))))
            write_tensors(clip["cache"], tensors, {"key": clip["digest"]})


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
# SVD's cross-attention sees one token, so its softmax is 1 whatever the query is: these never get a gradient.
WITHOUT_GRADIENT = ("attn2.to_q.", "attn2.to_k.", ".norm2.")


def is_trained(name, trainable):
    """Whether the UNet parameter `name` is trained under --trainable."""
    idle = any(part in name for part in WITHOUT_GRADIENT) and "transformer_blocks" in name
    return any(group in name for group in TRAINABLE[trainable]) and not idle


# What is recomputed in the backward pass. 512x320x25, AdamW: 37.0 GiB and 45.8 TFLOP with none, 17.4 and 56.0 with
# transformers, 13.8 and 62.7 with full; recomputing the resnets alone would save little memory.
RECOMPUTED = {
    "none": (),
    "transformers": (TransformerSpatioTemporalModel,),
    "full": (TransformerSpatioTemporalModel, SpatioTemporalResBlock),
}


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
        return common.convolve(module, x, weight, bias)

    return forward


def trained_layers(args):
    """What is trained, in words: `temporal, LoRA of rank 32`."""
    return args.trainable + (f", LoRA of rank {args.lora_rank}" if args.lora_rank else "")


def add_adapters(unet, args):
    """Puts a LoRA of --lora_rank into the transformer blocks that --trainable names, in place, as peft does it.

    Every linear layer there gets one, but the queries and keys of cross-attention: see WITHOUT_GRADIENT.
    """
    import peft

    blocks = "transformer_blocks" if args.trainable == "all" else "temporal_transformer_blocks"
    layers = rf".*{blocks}\..*\.(attn1\.to_q|attn1\.to_k|to_v|to_out\.0|proj|net\.2)"
    config = peft.LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=layers)
    peft.inject_adapter_in_model(config, unet)
    generator = random_generator(args.seed, "adapters")
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
    base, down, up, scale = (getattr(layer, n) for n in ("base_layer", "lora_A", "lora_B", "scaling"))
    down, up, scale = down["default"], up["default"], scale["default"]

    def forward(x):
        rows = x.flatten(0, -2)  # (N, in)
        low = F.linear(rows, down.weight.to(x.dtype))  # (N, rank)
        out = F.linear(rows, base.weight, base.bias).addmm_(low, up.weight.to(x.dtype).T, alpha=scale)
        return out.unflatten(0, x.shape[:-1])

    return forward


def prepare_unet(unet, trainable, weight_dtype, checkpointing):
    """Freezes, casts and wraps a UNet for training, in place; names and shapes in its state dict stay as they are.

    Where it has adapters, they alone are trained, and `trainable` has said where they are.
    """
    has_adapters = any("lora_" in name for name, _ in unet.named_parameters())
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("lora_" in name if has_adapters else is_trained(name, trainable))
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else weight_dtype)
    common.avoid_conv3d(unet)
    for module in unet.modules():
        if weight_dtype != torch.float32 and any(p.requires_grad for p in module.parameters(recurse=False)):
            module.forward = forward_in_input_dtype(module)
        if hasattr(module, "lora_A"):
            module.forward = adapter_forward(module)
        if isinstance(module, (BasicTransformerBlock, TemporalBasicTransformerBlock)) and module.attn2 is not None:
            module.attn2.set_processor(common.SingleTokenAttention())
        if isinstance(module, GEGLU) and checkpointing != "none":
            module.forward = gated_recomputed(module)
        if isinstance(module, RECOMPUTED[checkpointing]):  # diffusers' own checkpointing skips the temporal halves
            module.forward = checkpointed(module.forward)
    return unet.train()


def load_unet(args, base, device):
    """The UNet as the run trains it, on the device, and the mode of recomputation that was chosen for it."""
    weight_dtype = DTYPES[args.mixed_precision]
    mode = choose_checkpointing(args, base, weight_dtype, common.usable_memory(device))
    unet = common.load_part(base, "unet", torch.float32)
    if args.lora_rank:
        add_adapters(unet, args)
    prepare_unet(unet, args.trainable, weight_dtype, mode)
    if args.compile:
        common.compile_blocks(unet)
    return unet.to(device), mode


def checkpointed(forward):
    """`forward`, its activations recomputed in the backward pass; nothing in SVD draws random numbers there."""

    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def gated_recomputed(geglu):
    """A GEGLU's forward pass, with all but its matrix product computed again: that costs next to nothing."""

    def gate(projected):
        hidden, gate = projected.chunk(2, dim=-1)
        return hidden * geglu.gelu(gate)

    recomputed = checkpointed(gate)
    return lambda x: recomputed(geglu.proj(x))


def trained_parameters(unet):
    """{name: parameter} of what is trained, in the model's order."""
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


# ----------------------------------------------------------------------------------------- Optimizer and its state


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


def take_step(optimizer, groups, bad):
    """One step over these parameter groups; where the device scalar `bad` is set it changes nothing.

    Neither kind makes the CPU wait for the GPU: fused AdamW looks at `found_inf` on the device; of bitsandbytes the
    parts are called, since its own step() waits after every tensor, and what it changed is put back on the device.
    """
    if not hasattr(optimizer, "update_step"):
        all_groups, optimizer.param_groups = optimizer.param_groups, groups
        optimizer.found_inf = bad.float()
        optimizer.step()
        optimizer.param_groups = all_groups
        return
    for group in groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                optimizer.init_state(group, parameter, 0, 0)
            changing = [parameter.data, *(state[name] for name in state if name.startswith(("state", "absmax")))]
            before = [value.clone() for value in changing]
            optimizer.update_step(group, parameter, 0, 0)
            for value, old in zip(changing, before):
                value.copy_(torch.where(bad, old, value))


def step_in_backward(optimizer, bad):
    """Updates each parameter in the backward pass and frees its gradient at once, so that they are never all there.

    bad: a device scalar, set where a gradient was not finite; neither that parameter nor any after it changes then.
    """

    def hook(parameter, group):
        torch.logical_or(bad, ~torch.isfinite(parameter.grad).all(), out=bad)
        take_step(optimizer, [group], bad)
        parameter.grad = None

    for group in optimizer.param_groups:
        group["params"][0].register_post_accumulate_grad_hook(partial(hook, group=group))


class TrainingState:
    """What is trained, and all that a checkpoint holds: fp32 parameters, optimizer, schedule, average, scaler.

    unet: as `prepare_unet` leaves it, on its device. `self.unet` is what to call: several processes wrap it.
    clips: {directory: digest, fps and motion} of what is trained on, for a resumption to compare.
    """

    def __init__(self, unet, args, accelerator, settings, clips):
        self.args, self.accelerator, self.settings, self.clips = args, accelerator, settings, clips
        self.bare_unet, self.trained, self.steps = unet, trained_parameters(unet), 0
        self.freed_early = gradients_freed_early(args, accelerator.num_processes)
        self.optimizer = build_optimizer(args, self.trained.values(), self.freed_early)
        self.lr_scheduler = get_scheduler(args.lr_scheduler, self.optimizer, num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps)  # fmt: skip
        self.ema = EMAModel(self.trained.values(), decay=args.ema_decay) if args.use_ema else None
        self.unet, self.scaled_optimizer = accelerator.prepare(unet, self.optimizer)
        unet.__dict__.pop("forward", None)  # with fp16, accelerate's fp32 outputs would break the stock pipeline
        self.scaler = accelerator.scaler
        # A loss or gradient that is not finite sets `bad`, on the device: to look at every step would stall the GPU.
        self.bad = torch.zeros((), dtype=torch.bool, device=accelerator.device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=accelerator.device)  # the first of them
        self.whole = True  # not in the middle of a step that changes weights as it goes
        if self.freed_early:
            step_in_backward(self.optimizer, self.bad)

    def load(self, folder, saved):
        """Puts a checkpoint's weights, optimizer, schedule, average and scaler in place."""
        for name, tensor in load_file(folder / "trained.safetensors").items():
            self.trained[name].data.copy_(tensor)
        unflatten_state(self.optimizer, self.trained, load_file(folder / "optimizer.safetensors"), saved["optimizer"])
        for _ in range(saved["step"]):  # the schedule is a function of the step
            self.lr_scheduler.step()
        if self.ema:
            average = load_file(folder / "ema.safetensors")
            self.ema.shadow_params = [average[name].to(self.accelerator.device) for name in self.trained]
            self.ema.optimization_step = saved["ema_step"]
        if self.scaler:
            self.scaler.load_state_dict(saved["scaler"])
        self.steps = saved["step"]

    def synchronized(self, last):
        """A context for each micro-batch of a step: processes exchange gradients in the last one alone."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.unet)

    def backward(self, loss):
        """Adds the gradients of `loss`; where each is used at once, that is the update too."""
        bad = ~torch.isfinite(loss.detach())
        if self.scaler and self.accelerator.num_processes > 1:  # there no gradient norm tells the others of it
            bad = self.accelerator.reduce(bad.float()) > 0
        torch.logical_or(self.bad, bad, out=self.bad)
        self.whole = not self.freed_early
        self.accelerator.backward(loss)

    def update(self, look):
        """One optimizer step with the gradients that are there. Returns False if a step was bad, which only shows
        when the CPU may wait for the GPU to `look`; the weights are then those before it, and so is `self.steps`."""
        if not self.freed_early:
            norm = self.accelerator.clip_grad_norm_(self.trained.values(), self.args.max_grad_norm or math.inf)
            if not self.scaler:  # with fp16 an overflow is the scaler's business: it skips that step
                torch.logical_or(self.bad, ~torch.isfinite(norm), out=self.bad)
            self.grad_norm = norm
        self.bad_step = torch.where(self.bad & (self.bad_step < 0), self.steps, self.bad_step)
        if self.scaler:
            self.scaled_optimizer.step()
        elif not self.freed_early:
            take_step(self.optimizer, self.optimizer.param_groups, self.bad)
        self.optimizer.zero_grad(set_to_none=True)
        self.whole = True
        if look and (bad_step := self.bad_step.item()) >= 0:
            self.steps = bad_step
            return False
        if look and self.overflows():
            return False
        self.lr_scheduler.step()
        if self.ema:
            self.ema.optimization_step += 1  # its own step() would hold a copy of all weights for a moment
            decay = self.ema.get_decay(self.ema.optimization_step)
            torch._foreach_lerp_(self.ema.shadow_params, [p.data for p in self.trained.values()], 1 - decay)
        self.steps += 1
        return True

    def overflows(self):
        """Whether fp16's scaler has fallen so low that no step gets through; waits for the GPU."""
        return bool(self.scaler) and self.scaler.get_scale() < 2**-14

    def save(self):
        """Writes `checkpoint-<steps>/`; only then goes the oldest beyond --checkpoints_total_limit."""
        if self.steps:
            output = Path(self.args.output_dir)
            if not (output / f"checkpoint-{self.steps}").exists():
                save_checkpoint(output / f"checkpoint-{self.steps}", self)
            self.prune()
            write_page(output)

    def prune(self):
        """Removes the oldest checkpoints beyond --checkpoints_total_limit, renamed first: none is ever half there."""
        done = [path for path in checkpoints_of(self.args.output_dir) if checkpoint_step(path) <= self.steps]
        for old in done[: -self.args.checkpoints_total_limit]:
            os.replace(old, gone := old.with_name(f".{old.name}.gone"))
            shutil.rmtree(gone)


# ------------------------------------------------------------------------------------------------------- Forecast
# What a run needs, from the model's configuration alone: the real step, run on tensors that have a shape but no data.

cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
cpu_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
ATTENTION_ON_CPU = {  # torch's counter has formulas for the GPU's kernels of attention only
    cpu_attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    cpu_attention_backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
}


def fake_batch(args, count, unet_config, vae_config):
    """A batch of `count` samples as the cache and the loader give them."""
    factor = common.latent_factor(vae_config)
    shape = (count, args.num_frames, vae_config.latent_channels, args.height // factor, args.width // factor)
    shapes = {"latents": shape, "noise": shape, "sigmas": (count,), "keep": (count,), "added_time_ids": (count, 3)}
    shapes["conditioning_image"] = (count, 3, args.height, args.width)
    shapes["image_embeddings"] = (count, 1, unet_config.cross_attention_dim)
    return {name: torch.ones(shape) for name, shape in shapes.items()}


def optimizer_bytes(args, count):
    """AdamW: two fp32 numbers a parameter; in 8 bits two bytes, and two fp32 scales for every 256 parameters."""
    return int(count * (8 if args.optimizer == "adamw" else 2 + 8 / 256))


def forecast(args, folder, checkpointing, weight_dtype, count_flops=False):
    """Runs the real training step on fake tensors; nothing is loaded or computed.

    Returns GiB by part (`peak_memory_gib`, `weights_gib`, `gradients_gib`, `optimizer_gib`, `activations_gib`: what the
    peak holds beside the others; `training_gib` and `validation_gib`, of which the peak is the larger),
    `trainable_parameters` and, if asked, `flops_per_step`.
    """
    processes, flops = int(os.environ.get("WORLD_SIZE", 1)), {}
    freed_early = gradients_freed_early(args, processes)
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel.from_config(common.read_config(folder, "unet"))
        if args.lora_rank:
            add_adapters(unet, args)
        prepare_unet(unet, args.trainable, weight_dtype, checkpointing)
    with FakeTensorMode(allow_non_fake_inputs=True), common.memory_tracker() as tracker:
        for module in unet.modules():  # not by to_empty(): it swaps tensors, which fake ones cannot bear
            for name, p in module._parameters.items():
                if p is not None:
                    empty = torch.empty(p.shape, dtype=p.dtype, device="cpu")
                    module._parameters[name] = torch.nn.Parameter(empty, p.requires_grad)
        vae = AutoencoderKLTemporalDecoder.from_config(common.read_config(folder, "vae")).requires_grad_(False)
        vae.decoder = None
        trained = list(trained_parameters(unet).values())
        count = sum(p.numel() for p in trained)
        optimizer = optimizer_bytes(args, count)
        held = [torch.empty(optimizer, dtype=torch.uint8), *(torch.empty_like(p) for p in trained if args.use_ema)]
        batch = fake_batch(args, args.train_batch_size, unet.config, vae.config)
        for parameter in trained if freed_early else ():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

        def train(micro_batches):
            for _ in range(micro_batches):
                training_loss(unet, vae, batch, weight_dtype)[0].backward()
            if not freed_early:
                torch.nn.utils.clip_grad_norm_(trained, 1.0)

        tracker.peak = tracker.now
        # gradients of an earlier micro-batch, or those that several processes share, are there all the time
        train(1 if processes == args.gradient_accumulation_steps == 1 else 2)
        training = tracker.peak
        if processes == 1:
            unet.zero_grad(set_to_none=True)
        tracker.peak = tracker.now
        generate_fake(args, folder, unet, batch, weight_dtype)
        validation = tracker.peak
        if count_flops:  # last: the counter keeps recomputed activations alive
            with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter:
                train(1)
            flops = {"flops_per_step": counter.get_total_flops() * args.gradient_accumulation_steps}
    peak = max(training, validation) if args.validation_dir or args.num_validation_videos else training
    weights = sum(p.nbytes for p in [*unet.parameters(), *vae.parameters(), *held[1:]])
    gradients = (max if freed_early else sum)(p.nbytes for p in trained)
    sizes = {"peak_memory": peak, "weights": weights, "gradients": gradients, "optimizer": optimizer}
    sizes |= {"activations": peak - weights - gradients - optimizer, "training": training, "validation": validation}
    sizes = {f"{name}_gib": round(size / 2**30, 3) for name, size in sizes.items()}
    return {**sizes, "trainable_parameters": count, **flops}


@torch.no_grad()
def generate_fake(args, folder, unet, batch, weight_dtype):
    """What validation does of the things that take memory: guidance's pair through the UNet, and decoding."""
    latents = torch.cat([batch["latents"][:1], batch["latents"][:1]], dim=2).repeat(2, 1, 1, 1, 1).to(weight_dtype)
    embeddings = batch["image_embeddings"][:1].repeat(2, 1, 1).to(weight_dtype)
    unet(latents, torch.tensor(1.0), embeddings, batch["added_time_ids"][:1].repeat(2, 1), return_dict=False)
    decoder = AutoencoderKLTemporalDecoder.from_config(common.read_config(folder, "vae"))
    decoder.encoder = None
    frames = torch.empty(args.num_frames, 3, args.height, args.width)
    count = min(args.num_frames, frames_to_decode(args))
    decoder.decode(batch["latents"][0, :count].float(), num_frames=count)
    del frames


def choose_checkpointing(args, folder, weight_dtype, available):
    """--gradient_checkpointing; for `auto` the least recomputation whose forecast fits, `full` where none does."""
    if args.gradient_checkpointing != "auto":
        return args.gradient_checkpointing
    less = ("none", "transformers") if available > 0 else ()
    fitting = (m for m in less if forecast(args, folder, m, weight_dtype)["peak_memory_gib"] <= available)
    return next(fitting, "full")


def advice(args, folder, weight_dtype, available):
    """One sentence: which changes of the command line would fit, cheapest first. Each adds to the one before."""
    multiple, fitting, flags = common.size_multiple(folder), [], []
    batch = args.train_batch_size * args.gradient_accumulation_steps
    smaller = {s: max(multiple, int(getattr(args, s) * 0.7) // multiple * multiple) for s in ("width", "height")}
    for change in (
        {"gradient_checkpointing": "full"},
        {"train_batch_size": 1, "gradient_accumulation_steps": batch},
        {"optimizer": "adamw8bit", "max_grad_norm": 0},
        {"lora_rank": 32, "lora_alpha": 32.0} if importlib.util.find_spec("peft") and not args.lora_rank else {},
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
            fitting.append(f"{' '.join(flags)} ({needed:.1f} GiB)")
    found = "; or ".join(fitting) or "nothing that the options can change; use a larger card"
    return f"What would fit, cheapest first: {found}"


def dry_run(args, device):
    """Prints the plan of a run; its last line is one JSON object."""
    folder, weight_dtype = common.resolve_config(args.pretrained_model_name), DTYPES[args.mixed_precision]
    common.check_sizes(args, folder)
    available = common.usable_memory(device) if device.type == "cuda" else 0
    mode = choose_checkpointing(args, folder, weight_dtype, available)
    plan = forecast(args, folder, mode, weight_dtype, count_flops=True)
    clips = common.list_clips(args.dataset_dir) if Path(args.dataset_dir).is_dir() else ()
    frames = sum(len(clip["frames"]) for clip in clips)
    plan |= disk_space(args, folder, frames, plan)
    size = f"{args.width}x{args.height}, {args.num_frames} frames, batch {args.train_batch_size}"
    what = f"{plan['trainable_parameters'] / 1e6:.1f} M parameters ({trained_layers(args)})"
    what += f" of {args.pretrained_model_name}"
    print(f"trains {what}, {size}, {args.mixed_precision}, {args.optimizer}, gradient checkpointing {mode}")
    for name in ("weights", "gradients", "optimizer", "activations"):
        print(f"  {name:12s} {plan[f'{name}_gib']:8.2f} GiB" + (" at the peak" if name == "activations" else ""))
    print(f"  peak         {plan['peak_memory_gib']:8.2f} GiB, and about 0.6 GiB for CUDA itself")
    print(f"  validation   {plan['validation_gib']:8.2f} GiB, where there is one")
    print(f"  a step       {plan['flops_per_step'] / 1e12:8.2f} TFLOP")
    cache, each = f"{plan['cache_gib']:.2f} GiB for {frames} frames", f"{plan['checkpoint_gib']:.2f} GiB a checkpoint"
    at_once = f"(up to {args.checkpoints_total_limit + 1} at once)"
    print(f"  disk: cache {cache}, {each} {at_once}, result {plan['output_gib']:.2f} GiB")
    if device.type != "cuda":
        print(f"no CUDA GPU to compare with ({why_no_cuda()}): choose a card with more memory than the peak")
    else:
        fits = plan["peak_memory_gib"] <= available
        print(f"{'fits' if fits else 'does not fit'} {torch.cuda.get_device_name()}: {available:.1f} GiB can be used")
        if not fits:
            print(advice(args, folder, weight_dtype, available))
    print(json.dumps(plan))


def disk_space(args, folder, frames, plan):
    """GiB on disk of the cache, of one checkpoint and of the result, which is as large as the base.

    Where there is only the base's configuration, that is the size of its weights in fp32.
    """
    unet, vae = common.read_config(folder, "unet"), common.read_config(folder, "vae")
    factor = common.latent_factor(vae)
    frame = 2 * vae["latent_channels"] * (args.width // factor) * (args.height // factor) + unet["cross_attention_dim"]
    weights = (1 + args.use_ema) * plan["trainable_parameters"] * 4 / 2**30
    try:
        output = sum(f.stat().st_size for part in common.MODEL_PARTS for f in common.weight_files(folder, part))
    except (UserError, TypeError):  # no files there, or no folder at all
        with torch.device("meta"):
            clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**common.read_config(folder, "image_encoder")))
            models = [UNetSpatioTemporalConditionModel.from_config(unet), AutoencoderKLTemporalDecoder.from_config(vae)]
        output = sum(4 * p.numel() for model in (*models, clip) for p in model.parameters())
    if args.lora_rank:
        output = output * args.save_merged + 4 * plan["trainable_parameters"]
    sizes = {"cache_gib": frames * frame * 4 / 2**30, "checkpoint_gib": plan["optimizer_gib"] + weights}
    return {name: round(size, 3) for name, size in {**sizes, "output_gib": output / 2**30}.items()}


def warn_of_disk(state, base):
    """Says before the first step where the checkpoints that are still to come and the result will not fit."""
    args, count = state.args, sum(p.numel() for p in state.trained.values())
    plan = {"trainable_parameters": count, "optimizer_gib": optimizer_bytes(args, count) / 2**30}
    sizes = disk_space(args, base, 0, plan)
    ahead = math.ceil((args.max_train_steps - state.steps) / args.checkpointing_steps)
    more = min(ahead, args.checkpoints_total_limit + 1 - len(checkpoints_of(args.output_dir)))
    needed, free = more * sizes["checkpoint_gib"] + sizes["output_gib"], shutil.disk_usage(args.output_dir).free / 2**30
    if needed > free:
        where = f"--output_dir {args.output_dir}: the checkpoints and the result"
        print(f"warning: {where} need {needed:.1f} GiB more, {free:.1f} are free on its disk")


# -------------------------------------------------------------------------------------------- Checkpoints, result
# checkpoint-N/: trained.safetensors, optimizer.safetensors, ema.safetensors, training_state.json; nothing pickled.


def write_tensors(path, tensors, metadata=None):
    """A safetensors file, whole or as it was. Raises `OSError` for a full disk, which safetensors calls otherwise."""
    try:
        with common.replacing(path) as aside:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata)
    except SafetensorError as error:
        raise OSError(errno.ENOSPC, f"cannot be written ({error})", str(path)) from error


def flatten_state(optimizer, names):
    """Optimizer state -> ({"name|key": tensor}, {"name|key": number}), by parameter name instead of by position."""
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


def save_checkpoint(folder, state, resumable=True, **more):
    """Writes `folder` aside and renames it: all of `state`, or only the weights to generate with and what is in `more`.

    An earlier folder of that name goes once the new one is whole.
    """
    with common.replacing(folder, folder=True) as aside:
        if resumable or not state.ema:
            write_tensors(aside / "trained.safetensors", {name: p.data for name, p in state.trained.items()})
        if state.ema:
            write_tensors(aside / "ema.safetensors", dict(zip(state.trained, state.ema.shadow_params)))
        saved = {"step": state.steps, "settings": state.settings, **more}
        if resumable:
            tensors, numbers = flatten_state(state.optimizer, state.trained)
            write_tensors(aside / "optimizer.safetensors", tensors)
            saved |= {"optimizer": numbers, "scaler": state.scaler.state_dict() if state.scaler else None}
            saved |= {"ema_step": state.ema.optimization_step if state.ema else None, "clips": state.clips}
            saved["files"] = {file.name: common.file_digest(file) for file in aside.glob("*.safetensors")}
        common.write_file(aside / common.CHECKPOINT_STATE, json.dumps(saved, indent=1))
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
    shutil.rmtree(old, ignore_errors=True)


def checkpoint_step(folder):
    return int(folder.name.rsplit("-", 1)[1])


def checkpoints_of(output_dir):
    """The checkpoint folders of a run, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=checkpoint_step)


def read_checkpoint(folder):
    """The state of a complete checkpoint. Raises `UserError` that names the damaged or missing file."""
    path = folder / common.CHECKPOINT_STATE
    try:
        saved = common.read_json(path, "use another checkpoint")
    except FileNotFoundError:
        raise UserError(f"{path}: missing; not a checkpoint of train_svd.py") from None
    if "files" not in saved and "step" in saved:
        raise UserError(f"{folder}: holds weights to generate with, no training to go on with")
    for name, kind in (("step", int), ("settings", dict), ("optimizer", dict), ("files", dict)):
        if not isinstance(saved.get(name), kind):
            raise UserError(f"{path}: damaged, it has no {name}; use another checkpoint")
    if "max_train_steps" not in saved["settings"] or not isinstance(saved.get("clips", {}), dict):
        raise UserError(f"{path}: damaged, its settings or clips are not whole; use another checkpoint")
    for name, digest in saved["files"].items():
        file = folder / name
        if not file.is_file() or common.file_digest(file) != digest:
            raise UserError(f"{file}: {'damaged' if file.is_file() else 'missing'}")
    return saved


def find_checkpoint(args):
    """--resume_from_checkpoint -> (folder, saved state) or (None, None); `latest` takes the newest complete one."""
    output, given = Path(args.output_dir), args.resume_from_checkpoint
    if not given:
        return None, None
    if given != "latest":
        folder = Path(given) if Path(given).is_dir() else output / given  # checkpoint-500: the one of this run
        return folder, read_checkpoint(folder)
    for folder in reversed(checkpoints_of(output)):
        try:
            return folder, read_checkpoint(folder)
        except UserError as error:
            print(f"{error}; taking the checkpoint before it", file=sys.stderr)
    if (output / "model_index.json").exists():
        raise UserError(f"{output} holds a result and no checkpoint to go on from; give another --output_dir")
    print(f"--resume_from_checkpoint latest: no checkpoint in {output}; starting from the beginning")
    return None, None


def put_aside_newer(args, folder, step):
    """Renames what lies beyond the resumed step to `damaged-checkpoint-N`, out of the way of the new ones."""
    for newer in checkpoints_of(args.output_dir):
        if checkpoint_step(newer) > step:
            target = newer.with_name(f"damaged-{newer.name}")
            if args.resume_from_checkpoint != "latest" or target.exists():
                raise UserError(f"{newer} is beyond {folder or 'the beginning'}; move it away to go on from there")
            os.replace(newer, target)


# Settings that may differ between a checkpoint and its resumption: they do not change the result.
MAY_DIFFER_ON_RESUME = frozenset(
    """output_dir dataset_dir pretrained_model_name resume_from_checkpoint checkpointing_steps
checkpoints_total_limit cache_latents cache_dir dataloader_num_workers logging_steps report_to compile dry_run exclude
gradient_checkpointing gradient_accumulation_steps train_batch_size max_train_steps push_to_hub
base_model_name versions step num_clips median_fps median_motion_bucket_id motion_bucket_id_range validation_dir
validation_steps validation_metric held_out""".split()
)


def check_resume(settings, clips, saved, folder):
    """Refuses, by name, settings and frames that would make the resumed run another run.

    Clips that are gone are named, and the run goes on without them: that is how one that cannot be read is left out.
    """
    before = {"lora_rank": 0, **saved["settings"]}  # older versions had none
    free = {*MAY_DIFFER_ON_RESUME, *(["num_validation_videos"] if settings["validation_dir"] else [])}
    changed = [key for key in settings if key not in free and settings[key] != before.get(key, settings[key])]
    if settings["max_train_steps"] != before["max_train_steps"] and "constant" not in settings["lr_scheduler"]:
        changed.append("max_train_steps")  # it shapes the learning-rate schedule
    if changed:
        pairs = ", ".join(f"{key} was {before[key]!r}, is {settings[key]!r}" for key in changed)
        raise UserError(f"{folder}: {pairs}; use the checkpoint's, or start a new run in another --output_dir")
    if saved["step"] > settings["max_train_steps"]:
        raise UserError(f"{folder} is beyond --max_train_steps {settings['max_train_steps']}")
    if "clips" not in saved:
        return print(f"warning: {folder} is of an older version and does not say which frames it was trained on")
    known = saved["clips"]
    changed = [name for name in clips if name in known and known[name] != clips[name]]
    new, gone = sorted(clips.keys() - known.keys()), sorted(known.keys() - clips.keys())
    if changed or new:
        what = f"{listed(new)} not trained on before"
        if changed:
            what = f"{listed(changed)} changed (frames, fps or motion)"
        cure = "put back what was there, leave them out by --exclude, or start a new run in another --output_dir"
        raise UserError(f"{folder}: {what}; {cure}")
    if gone:
        print(f"going on without {listed(gone)}, which the checkpoint was trained on")


def listed(names):
    """A few names and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def save_adapter(folder, state, weights):
    """A LoRA as peft itself saves it, and what it was trained with."""
    config, settings = state.bare_unet.peft_config["default"], state.settings
    config.base_model_name_or_path = settings["base_model_name"]
    config.save_pretrained(folder)
    names = {name: "base_model.model." + name.replace(".default", "") for name in weights}
    tensors = {names[name]: tensor.detach().cpu() for name, tensor in weights.items()}
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    common.write_file(folder / common.SETTINGS, json.dumps({**settings, "step": state.steps}, indent=1))


def save_result(state, base):
    """The fine-tuned pipeline as a standard diffusers folder: the base's own files, the trained tensors replaced.

    Frozen weights are copied from the base on disk, so they stay bitwise the same whatever dtype they were trained in,
    and no second model is built. Every file keeps the base's precision. model_index.json is written last. (diffusers'
    save_pretrained would write the local path into config.json, and shards of its own.) A LoRA is merged into it, and
    lies in `lora/` too; with --no-save_merged there alone.
    """
    output, args = Path(state.args.output_dir), state.args
    weights = dict(zip(state.trained, state.ema.shadow_params)) if state.ema else state.trained
    aside = output / ".result.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    if args.lora_rank:
        save_adapter(aside / "lora", state, weights)
        common.write_file(aside / "lora" / "README.md", model_card(state, base, "adapter"))
    for part in common.PARTS if args.save_merged else ():
        (aside / part).mkdir(parents=True)
        stored = common.weight_files(base, part) if part in common.MODEL_PARTS else []
        for source in [*(base / part).glob("*.json"), *stored]:
            target = aside / part / source.name.replace(".fp16", "")
            if ".index" in source.name:
                text = source.read_text(encoding="utf-8")
                if all(file.name in text for file in stored):
                    common.write_file(target, text.replace(".fp16", ""))
            elif part == "unet" and source in stored:
                common.load_trained_weights(tensors := load_file(source), weights, state.settings)
                write_tensors(target, tensors, {"format": "pt"})
            else:
                shutil.copyfile(source, target)
    if args.save_merged:  # without this transformers, given no dtype, would load fp16 beside diffusers' fp32
        config = {**common.read_config(base, "image_encoder"), "dtype": "float32"}
        common.write_file(aside / "image_encoder" / "config.json", json.dumps(config, indent=2))
        (output / "model_index.json").unlink(missing_ok=True)  # until it is back, this is no finished result
    for part in list(aside.iterdir()):
        shutil.rmtree(output / part.name, ignore_errors=True)  # an earlier result of this same run, resumed to go on
        os.replace(part, output / part.name)
    aside.rmdir()
    common.write_file(output / common.SETTINGS, json.dumps({**state.settings, "step": state.steps}, indent=1))
    common.write_file(output / "README.md", model_card(state, base, "finetune" if args.save_merged else "adapter"))
    if args.save_merged:
        common.write_file(output / "model_index.json", (base / "model_index.json").read_text())


def read_metrics(output_dir):
    """The lines of a run's metrics.jsonl, without those that a crash cut off."""
    path, lines = Path(output_dir) / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(UserError):
            lines.append(common.parse_object(line, damaged=""))
    return [line for line in lines if isinstance(line.get("step"), int)]


def hub_name(path, kind):
    """The hub's name of a local folder that lies in the hub's cache, or None; kind: models or datasets."""
    found = re.search(rf"{kind}--([\w.-]+?)--([\w.-]+)", str(path))
    return "/".join(found.groups()) if found else None


def is_hub_name(name):
    """Whether this is OWNER/NAME as the hub takes it."""
    with contextlib.suppress(ValueError):
        huggingface_hub.utils.validate_repo_id(name)
        return "/" in str(name)
    return False


def is_token_valid():
    """Whether there is a token and the hub does not refuse it; where the hub cannot be asked, that is seen later."""
    if not huggingface_hub.get_token():
        return False
    try:
        huggingface_hub.HfApi().whoami()
    except Exception as error:  # the network's and the hub's are of many kinds
        return getattr(getattr(error, "response", None), "status_code", None) != 401
    return True


def base_card(base):
    """The head of the base's own model card; {} where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        text = (base / "README.md").read_text(encoding="utf-8")
        return huggingface_hub.ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    return {}


def find_base_name(args, base):
    """The base's name on the hub, never a local path; None where nothing tells it."""
    names = [hub_name(base.resolve(), "models"), args.pretrained_model_name]
    names += [name for name in common.SVD_NAMES if Path(name).name == base.resolve().name]  # copied, under its own name
    names += [base_card(base).get("base_model"), common.read_json(base / "model_index.json").get("_name_or_path")]
    names += [common.read_config(base, "unet").get("_name_or_path")]
    return args.base_model_name or next((n for n in names if is_hub_name(n) and not Path(n).exists()), None)


def card_data(settings, base, relation):
    """The head of a model card; the licence is the base's, by its own card or, for Stability's, as they name it."""
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


def push_to_hub(args):
    """Uploads the result, without checkpoints, to a repository of the hub, a private one where it is new."""
    skip, name, output = ["checkpoint-*", "damaged-*", "earlier-*", "best/*", ".*"], args.push_to_hub, args.output_dir
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=output, ignore_patterns=list(skip))
    except Exception as error:  # the network's, the hub's and the token's are of many kinds
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        between = " " if huggingface_hub.__version__.startswith("0.") else " --exclude "
        later = f"hf upload {name} {shlex.quote(output)} . --private --exclude " + between.join(map(shlex.quote, skip))
        raise UserError(f"--push_to_hub {name}: {why}; the result is in {output}; to push it later: {later}") from error
    print(f"pushed to {name}")


def as_url(path):
    """A relative path as a page or a README links to it."""
    return quote(os.fsencode(path.as_posix()))


def model_card(state, base, relation="finetune"):
    """What the result is, as a README in the hub's format: base, data, settings, last validation, samples.

    relation: to the base, finetune for a whole model, adapter for a LoRA.
    """
    settings, output = state.settings, Path(state.args.output_dir)
    scores = next((line for line in reversed(read_metrics(output)) if "validation_loss_v" in line), {})
    numbers = {name.removeprefix("validation_"): value for name, value in scores.items() if value is not None}
    table = "".join(f"| {name} | {value:.4g} |\n" for name, value in numbers.items())
    videos = sorted((output / "validation").glob(f"step-{scores.get('step', 0):06d}/*.mp4"))
    samples = "".join(f"- [{common.printable(video.name)}]({as_url(video.relative_to(output))})\n" for video in videos)
    what = "{num_clips} clips, {steps} steps of {global_batch_size}, {width}x{height}, {num_frames} frames; trained:"
    what += " {layers}. Median fps {median_fps:g}, median motion_bucket_id {median_motion_bucket_id:g}: use these."
    what = what.format(steps=state.steps, layers=trained_layers(state.args), **settings)
    text = f"---\n{card_data(settings, base, relation).to_yaml()}\n---\n"
    text += f"\n# Stable Video Diffusion, fine-tuned\n\n{what} All settings: {common.SETTINGS}.\n"
    if scores:
        text += f"\n| held-out clips | real beside generated |\n|---|---|\n{table}\n{samples}"
    return text


# ----------------------------------------------------------------------------------------------------- Validation
# Is it learning? Held-out clips: the loss at fixed noise, by noise level, and generated videos scored against the real.

VALIDATION_SIGMAS = (0.1, 0.5, 2.0, 10.0, 100.0)  # 8 of the 25 inference steps lie over 80
LOWER_IS_BETTER = ("loss_v", "flow_error")


def frames_to_decode(args):
    """How many frames validation decodes at a time: so few that it never needs more memory than training."""
    return max(1, frames_at_once(args) // 4)


class Validation:
    """Scores the model as it stands on held-out clips, with generators of its own: it changes nothing of the run.

    vae: the run's own, on the GPU; its decoder stays on the CPU until latents are decoded. CLIP is not needed: the
    cache holds what it says of each first frame.
    """

    def __init__(self, args, base, clips, vae, decoder):
        self.args, self.clips, self.vae, self.decoder = args, clips, vae, decoder
        self.weight_dtype = DTYPES[args.mixed_precision]
        self.dataset = ClipDataset(clips, args, vae.config, cached=True)
        parts = {part: common.load_part(base, part, None) for part in ("scheduler", "feature_extractor")}
        self.pipe = StableVideoDiffusionPipeline(unet=None, vae=vae, image_encoder=None, **parts)
        self.pipe.set_progress_bar_config(disable=True)

    def losses(self, unet, device):
        """Mean v loss by noise level, on the first window of every clip, with the same noise every time."""
        sums = dict.fromkeys(VALIDATION_SIGMAS, 0.0)
        for place, clip in enumerate(self.clips):
            sample = self.dataset.sample(clip, 0, random_generator("validation", place))
            batch = {name: value[None].to(device) for name, value in sample.items()}
            batch["keep"] = torch.ones_like(batch["keep"])
            for sigma in VALIDATION_SIGMAS:
                batch["sigmas"] = torch.full_like(batch["sigmas"], sigma)
                loss, _ = training_loss(unet, self.vae, batch, self.weight_dtype)
                sums[sigma] += loss.item() / len(self.clips)
        by_sigma = {f"loss_v_sigma_{sigma:g}": value for sigma, value in sums.items()}
        return {**by_sigma, "loss_v": sum(sums.values()) / len(sums)}

    def generate(self, clip, device):
        """The continuation of the clip's first frame by the stock pipeline: (T, H, W, 3) uint8, the first frame too.

        T is --num_frames, at the clip's fps and motion. The noise is the same every time.
        """
        args, pipe = self.args, self.pipe
        first = common.read_frames(clip["frames"][:1], args.width, args.height)[0]
        embedding = read_cached(clip["cache"], 0, 1)[2][None].to(device, self.weight_dtype)  # (1, 1, D)
        pipe._encode_image = lambda *_: torch.cat([torch.zeros_like(embedding), embedding])
        latents = pipe(
            Image.fromarray(first), width=args.width, height=args.height, num_frames=args.num_frames,
            fps=round(clip["fps"]), motion_bucket_id=clip["motion_bucket_id"], output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).frames  # fmt: skip
        self.vae.decoder = self.decoder.to(device)
        try:
            frames = pipe.decode_latents(latents.float(), args.num_frames, frames_to_decode(args))
        finally:
            self.vae.decoder = None
            self.decoder.to("cpu")
        return (pipe.video_processor.postprocess_video(frames, "np")[0] * 255).round().astype(np.uint8)

    @torch.no_grad()
    def __call__(self, state):
        """{metric: mean over clips} of the state as it is; writes `validation/step-N/<clip>.mp4`, real and generated.

        {} where it failed, with a line that says so: nothing here is worth the run.
        """
        device = state.accelerator.device
        if state.ema:
            state.ema.store(state.trained.values())
            state.ema.copy_to(state.trained.values())
        try:
            self.pipe.unet = state.bare_unet
            metrics, scores, copied = self.losses(state.bare_unet, device), [], []
            target = Path(self.args.output_dir) / "validation" / f"step-{state.steps:06d}"
            target.mkdir(parents=True, exist_ok=True)
            for left in target.glob(".*.part"):  # of a killed run
                left.unlink()
            for clip in self.clips:
                real = common.read_frames(clip["frames"][: self.args.num_frames], self.args.width, self.args.height)
                generated = self.generate(clip, device)
                scores.append(common.video_metrics(generated, real))
                copied.append(common.video_metrics(np.repeat(real[:1], len(real), axis=0), real))
                sheet = common.side_by_side({"real": real, f"generated, step {state.steps}": generated})
                name = clip["directory"].replace("/", "_")
                name += f"+{common.name_digest(clip['directory'])}" if "/" in clip["directory"] else ""
                common.write_video(target / f"{common.plain_name(name)}.mp4", sheet, clip["fps"])
            copied = {f"copied_{name}": value for name, value in mean_scores(copied).items()}
            return {**metrics, **mean_scores(scores), **copied}
        except (RuntimeError, OSError, SafetensorError, UserError) as error:  # out of memory has many names
            tqdm.write(f"validation failed and was left out; training goes on ({str(error).splitlines()[0]})")
            return {}
        finally:
            torch.cuda.empty_cache()
            if state.ema:
                state.ema.restore(state.trained.values())


def finite(values):
    """The numbers as JSON has them: null for what is not finite (a step that overflowed in fp16, equal pictures)."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def mean_scores(scores):
    """The mean of each metric over the clips that have it."""
    values = {name: [score[name] for score in scores if score[name] is not None] for name in scores[0]}
    return {name: float(np.mean(given)) for name, given in values.items() if given}


def write_page(output):
    """Writes index.html of a run: the loss and the scores by step, and the validation's videos."""
    videos = [path.relative_to(output) for path in sorted(output.glob("validation/step-*/*.mp4"))]
    shown = [{"step": p.parent.name[5:], "name": p.stem, "url": as_url(p)} for p in videos]
    run = {"title": output.absolute().name, "lines": read_metrics(output), "videos": shown}
    common.write_page(output / "index.html", run)


def report_scores(metrics, state):
    """Prints the scores beside those of the base and of a copied first frame; warns of video that does not move."""
    base = next((line for line in read_metrics(state.args.output_dir) if line["step"] == 0), None)  # only scores have 0
    rows = {f"step {state.steps}": metrics}
    if base and state.steps:
        rows["base model"] = {name.removeprefix("validation_"): value for name, value in base.items()}
    rows["first frame copied"] = {n.removeprefix("copied_"): v for n, v in metrics.items() if n.startswith("copied_")}
    for label, row in rows.items():
        names = [n for n in ("loss_v", "psnr_moving", "motion_ratio", "flow_error") if row.get(n) is not None]
        tqdm.write(f"{label}: " + ", ".join(f"{name} {row[name]:.3f}" for name in names))
    if metrics.get("motion_ratio", 1.0) < 0.5:
        moves = f"generated video moves {metrics['motion_ratio']:.2f} times as much as the real one"
        cure = "Try --P_mean 1.0, fewer steps or a lower --learning_rate; check fps and motion in metadata.jsonl"
        tqdm.write(f"warning: {moves}. {cure}")


def keep_best(metrics, state):
    """Keeps the weights of the best step by --validation_metric in `best/`, to generate with."""
    folder, name = Path(state.args.output_dir) / "best", state.args.validation_metric
    sign, best = -1 if name in LOWER_IS_BETTER else 1, None
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError):  # of this run, or of before it was resumed
        best = json.loads((folder / common.CHECKPOINT_STATE).read_text())["metrics"].get(name)
    if metrics.get(name) is not None and (best is None or sign * metrics[name] > sign * best):
        save_checkpoint(folder, state, resumable=False, metrics=finite(metrics))


# --------------------------------------------------------------------------------------------------- Command line

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_parser():
    wide = partial(argparse.RawDescriptionHelpFormatter, width=110)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=wide)

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
    add("--base_model_name", metavar="OWNER/NAME", help="its name on the hub, for the model card, where it is a folder")
    add("--dataset_dir", required=True, help="folder of clip folders, from prepare_dataset.py")
    add("--output_dir", required=True, help="where the checkpoints and the fine-tuned pipeline go")
    add("--push_to_hub", metavar="OWNER/NAME", help="upload the result there, to a private repository where it is new")
    named = "leave these clips out: names, 'patterns*', or @FILE: the names in this list"
    add("--exclude", nargs="+", default=[], metavar="CLIP", help=named)
    add("--num_frames", type=positive, default=25, help="frames in a training window (default 25)")
    add("--width", type=positive, default=512, help="pixels, a multiple of 64 for SVD (default 512)")
    add("--height", type=positive, default=320, help="pixels, a multiple of 64 for SVD (default 320)")
    add("--fps", type=at_least_zero, default=DEFAULT_FPS, help="for clips without metadata.jsonl (default 7)")
    add("--motion_bucket_id", type=at_least_zero, default=DEFAULT_BUCKET, help="likewise, 0..255 (default 127)")
    switch = argparse.BooleanOptionalAction
    add("--cache_latents", action=switch, default=True, help="encode every frame once (default)")
    add("--cache_dir", help="where the cache goes (default: DATASET_DIR/.cache)")
    add("--dataloader_num_workers", type=positive, default=4, help="threads that load samples (default 4)")

    add = parser.add_argument_group("training").add_argument
    add("--train_batch_size", type=positive, default=1, help="clips a step on each GPU (default 1)")
    add("--gradient_accumulation_steps", type=positive, default=1, help="batches summed into one step (default 1)")
    add("--max_train_steps", type=positive, default=5000, help="optimizer steps (default 5000)")
    add("--learning_rate", type=at_least_zero, help="peak of the schedule (default 1e-5; 1e-4 for a LoRA)")
    schedules = [s.value for s in SchedulerType if s.value != "piecewise_constant"]  # that one needs a rule
    add("--lr_scheduler", choices=schedules, default="constant", help="of the learning rate (default constant)")
    add("--lr_warmup_steps", type=int, default=0, help="optimizer steps of linear warm-up (default 0)")
    clipping = "clip the gradient's norm; 0: free each gradient once it is used (default 1; 0 with adamw8bit)"
    add("--max_grad_norm", type=at_least_zero, help=clipping)
    add("--optimizer", choices=["adamw", "adamw8bit"], default="adamw", help="8 bits need bitsandbytes (default adamw)")
    add("--adam_weight_decay", type=at_least_zero, default=1e-2, help="AdamW's decoupled decay (default 0.01)")
    add("--trainable", choices=list(TRAINABLE), default="temporal", help="which UNet layers (default temporal)")
    lora = "train a LoRA of this rank in the transformer blocks' linear layers alone, the rest frozen; needs peft"
    add("--lora_rank", type=positive, default=0, metavar="N", help=lora)
    add("--lora_alpha", type=at_least_zero, help="the LoRA's strength is alpha / rank (default: the rank)")
    merged = "beside OUTPUT_DIR/lora, also the whole pipeline with the LoRA merged in (default)"
    add("--save_merged", action=switch, default=True, help=merged)
    add("--loss", choices=["v", "noise"], default="v", help="v: SVD's weighting; noise: plain noise MSE (default v)")
    add("--P_mean", type=float, default=0.7, help="mean of ln sigma (default 0.7; 1.0 favours motion)")
    add("--P_std", type=at_least_zero, default=1.6, help="standard deviation of ln sigma (default 1.6)")
    add("--conditioning_dropout_prob", type=at_least_zero, default=0.1, help="for guidance (default 0.1)")
    add("--use_ema", action="store_true", help="average the trained weights; the result is the average")
    add("--ema_decay", type=at_least_zero, default=0.9999, help="of the average, reached by warm-up (default 0.9999)")
    add("--seed", type=int, default=0, help="everything drawn is a function of it and the step (default 0)")

    add = parser.add_argument_group("memory and speed").add_argument
    add("--mixed_precision", choices=list(DTYPES), help="default: bf16; fp16 on cards without; no on a CPU")
    recompute = "recompute activations: none, of the transformers, full, or the cheapest that fits (default auto)"
    modes = [*RECOMPUTED, "auto"]
    add("--gradient_checkpointing", nargs="?", const="full", default="auto", choices=modes, help=recompute)
    add("--deterministic", action="store_true", help="slower kernels, one CPU thread, the same bits every time")
    add("--compile", action="store_true", help="torch.compile the blocks: slow to start, faster to run on a GPU")
    add("--dry_run", action="store_true", help="print what the run needs and whether it fits; needs no weights")

    add = parser.add_argument_group("validation").add_argument
    add("--validation_dir", help="prepared folder of held-out clips")
    add("--num_validation_videos", type=int, default=0, help="else: hold out so many clips, whole episodes (default 0)")
    add("--validation_steps", type=positive, default=500, help="steps from one to the next (default 500)")
    metrics = ["psnr_moving", "loss_v", "flow_error", "ssim", "psnr"]
    best = "the best step by this is kept in OUTPUT_DIR/best (default psnr_moving)"
    add("--validation_metric", default="psnr_moving", choices=metrics, help=best)

    add = parser.add_argument_group("checkpoints and logs").add_argument
    add("--checkpointing_steps", type=positive, default=500, help="save every so many steps (default 500)")
    add("--checkpoints_total_limit", type=positive, default=2, help="keep the newest so many (default 2)")
    resume = "go on from a checkpoint of this run: the newest, checkpoint-N, or a folder"
    add("--resume_from_checkpoint", metavar="latest|FOLDER", help=resume)
    add("--logging_steps", type=positive, default=10, help="a line in metrics.jsonl every so many steps (default 10)")
    add("--report_to", choices=["tensorboard", "wandb"], help="also log there, where it is installed")
    return parser


def parse_args(argv=None):
    """Parses and checks the command line: whatever can be known to be wrong without loading a weight."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for name, is_right, wanted in (
        ("fps", 0 < args.fps <= 240, "over 0 and at most 240"),
        ("motion_bucket_id", args.motion_bucket_id <= 255, "0..255"),
        ("conditioning_dropout_prob", args.conditioning_dropout_prob <= 1, "0..1"),
        ("lr_warmup_steps", 0 <= args.lr_warmup_steps <= args.max_train_steps, f"0..{args.max_train_steps}"),
        ("ema_decay", args.ema_decay < 1, "under 1"),
        ("num_validation_videos", args.num_validation_videos >= 0, "at least 0"),
        ("num_frames", args.num_frames >= 2, "at least 2, for one frame has no motion to learn"),
        ("lora_alpha", args.lora_alpha != 0, "over 0: it is the LoRA's strength"),
        ("P_mean", abs(args.P_mean) <= 20, "-20..20: a sigma is e to this"),
        ("P_std", args.P_std <= 10, "0..10"),
    ):
        if not is_right:
            parser.error(f"--{name} must be {wanted}, got {getattr(args, name)}")
    if (args.validation_dir or args.num_validation_videos) and not args.cache_latents:
        parser.error("validation reads the latent cache: leave out --no-cache_latents")
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        args.lr_scheduler = "constant_with_warmup"  # diffusers' `constant` would ignore the warm-up
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if args.lora_rank else 1e-5
    if not args.lora_rank and (args.lora_alpha is not None or not args.save_merged):
        parser.error("--lora_alpha and --no-save_merged are of a LoRA: give --lora_rank too")
    if args.lora_alpha is None:
        args.lora_alpha = float(args.lora_rank)
    if args.lora_rank and importlib.util.find_spec("peft") is None:
        parser.error("--lora_rank needs: pip install peft")
    if args.lr_scheduler == "polynomial" and args.learning_rate <= 1e-7:
        parser.error(f"--learning_rate must be over 1e-7, where polynomial ends, got {args.learning_rate}")
    if args.max_grad_norm is None:
        args.max_grad_norm = 0.0 if args.optimizer == "adamw8bit" else 1.0
    cuda = torch.cuda.is_available()
    if args.mixed_precision is None:
        older = cuda and torch.cuda.get_device_capability() < (8, 0)
        args.mixed_precision = "fp16" if older else "bf16" if cuda or args.dry_run else "no"
    args.exclude = common.read_patterns(args.exclude, "--exclude")
    if args.dry_run:  # needs no more than the numbers
        return args
    needed = {"--optimizer": "bitsandbytes" if args.optimizer == "adamw8bit" else None, "--report_to": args.report_to}
    for flag, module in needed.items():
        if module and importlib.util.find_spec(module) is None:
            parser.error(f"{flag} needs: pip install {module}")
    if args.optimizer == "adamw8bit" and not cuda:
        parser.error("--optimizer adamw8bit needs a CUDA GPU; leave it out on the CPU")
    if args.mixed_precision == "fp16" and not cuda:
        parser.error("--mixed_precision fp16 needs a CUDA GPU; on the CPU use no or bf16")
    for flag in ("base_model_name", "push_to_hub"):
        if getattr(args, flag) and not is_hub_name(getattr(args, flag)):
            parser.error(f"--{flag} must have the form OWNER/NAME, got {getattr(args, flag)}")
    if args.push_to_hub and not is_token_valid():
        parser.error("--push_to_hub needs a token that may write: run `hf auth login`, or set HF_TOKEN")
    if args.push_to_hub and huggingface_hub.constants.HF_HUB_OFFLINE:
        parser.error("--push_to_hub: HF_HUB_OFFLINE is set, so nothing would be sent; unset it")
    check_output_dir(args)
    return args


def check_output_dir(args):
    """Refuses a folder in which the run would write over something: a run, unless it is resumed, or anything else."""
    output = Path(args.output_dir)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output}: a file of that name is in the way")
    if output.resolve() in [Path(folder).resolve() for folder in (args.dataset_dir, args.validation_dir) if folder]:
        raise UserError(f"--output_dir {output} is the dataset's folder; give another")
    if common.printable(output.resolve()) != str(output.resolve()):
        raise UserError(f"--output_dir {output}: its path is not UTF-8, and safetensors reads no other; give another")
    if args.validation_dir and Path(args.validation_dir).resolve() == Path(args.dataset_dir).resolve():
        cure = "give other clips, or hold some of these out by --num_validation_videos"
        raise UserError(f"--validation_dir {args.validation_dir} is what is trained on; {cure}")
    run = checkpoints_of(output) or (output / "metrics.jsonl").is_file()
    ours = ("model_index.json", common.SETTINGS, "README.md", "metrics.jsonl", "validation", "best", "lora")
    there = [name for name in (*ours, *common.PARTS) if (output / name).exists()]
    if there and not run:
        raise UserError(f"--output_dir {output} holds what is no run of this script: {there[0]}; give another")
    if run and not args.resume_from_checkpoint:
        raise UserError(f"--output_dir {output} already holds a run; give another, or --resume_from_checkpoint latest")


# ----------------------------------------------------------------------------------------------------------- Main


def why_no_cuda():
    """Why torch finds no CUDA GPU, and what to do about it."""
    with warnings.catch_warnings(record=True) as caught:  # torch warns of a driver that is too old
        warnings.simplefilter("always")
        torch.cuda.is_available()
    if any("driver" in str(warning.message) for warning in caught):
        return "the NVIDIA driver is too old for this torch: update the driver, or install a torch for an older CUDA"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA: install one with it, see pytorch.org"
    return "no NVIDIA GPU or driver found: see whether nvidia-smi lists one"


PATIENCE = datetime.timedelta(hours=12)  # the other processes wait while one validates


def build_accelerator(args, device):
    """Accelerate for devices, processes and fp16's scaler alone: nothing of its environment may change the result."""
    # fp16 needs accelerate's gradient scaler, but never its autocast: prepare_unet has cast what is to be cast.
    # Accumulation and dynamo's backend are given because it would take those of the environment.
    kinds = accelerate.utils
    options = {"mixed_precision": "fp16" if args.mixed_precision == "fp16" else "no", "dynamo_backend": "no"}
    options["gradient_accumulation_plugin"] = kinds.GradientAccumulationPlugin(num_steps=1)
    options["kwargs_handlers"] = [
        kinds.AutocastKwargs(enabled=False),
        kinds.DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        kinds.InitProcessGroupKwargs(timeout=PATIENCE),
    ]
    options |= {"log_with": args.report_to, "project_dir": args.output_dir}
    accelerator = accelerate.Accelerator(cpu=device.type == "cpu", **options)
    if accelerator.distributed_type.value not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        kind = accelerator.distributed_type.value
        raise UserError(f"accelerate is set up for {kind}, which is not supported; launch with --multi_gpu")
    return accelerator


def describe_run(args, base, clips, held_out, num_processes):
    """The settings that every checkpoint and the result carry."""
    name, local = args.pretrained_model_name, Path(args.pretrained_model_name).is_dir()
    fps, buckets = ([clip[key] for clip in clips] for key in ("fps", "motion_bucket_id"))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
    return {
        **vars(args),
        "exclude": exclude_names(args.exclude),
        "global_batch_size": args.train_batch_size * args.gradient_accumulation_steps * num_processes,
        "pretrained_model_name": str(base.resolve()) if local else name,
        "base_model_name": find_base_name(args, base),
        "base_fingerprint": common.weights_fingerprint(base, "unet"),
        "encoders_fingerprint": encoders_fingerprint(base),
        "held_out": held_out if args.num_validation_videos and not args.validation_dir else [],
        "num_clips": len(clips),
        "median_fps": statistics.median(fps),
        "median_motion_bucket_id": statistics.median(buckets),
        "motion_bucket_id_range": [min(buckets), max(buckets)],
        "versions": versions,
    }


def main(argv=None):
    args = parse_args(argv)
    cv2.setNumThreads(0)  # the loader has threads of its own
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # take_step is not step()
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)  # the order of sums must not depend on the number of cores
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.dry_run:
        return dry_run(args, device)
    try:
        return train(args, device)
    except RuntimeError as error:
        if not common.is_out_of_memory(error):
            raise
        available = common.usable_memory(device, torch.cuda.get_device_properties(device).total_memory)
        folder = common.resolve_model(args.pretrained_model_name)
        advised = advice(args, folder, DTYPES[args.mixed_precision], available)
        raise UserError(f"the GPU's memory is not enough ({str(error).splitlines()[0]}). {advised}") from None


def train(args, device):
    """One run, from the first or a saved step to the result; returns the exit status.

    Everything that can be refused is refused before a weight is loaded.
    """
    base = common.resolve_model(args.pretrained_model_name)
    common.check_sizes(args, base)
    folder, saved = find_checkpoint(args)
    known = saved["settings"].get("held_out") if saved else None
    sides = hold_out(load_clips(args, args.dataset_dir), args, known)
    known = [clip["directory"] for clip in sides[1]] if known is None else known
    clips, held_out = leave_out(sides, args.exclude)
    add_digests([*clips, *held_out])
    accelerator = build_accelerator(args, device)
    settings = describe_run(args, base, clips, known, accelerator.num_processes)
    frames = {clip["directory"]: f"{clip['digest']} {clip['fps']:g} {clip['motion_bucket_id']:g}" for clip in clips}
    if saved:
        check_resume(settings, frames, saved, folder)
    with lock_output(args, accelerator):
        if device.type == "cpu":
            accelerator.print(f"no CUDA GPU: {why_no_cuda()}. On the CPU only a tiny model trains in reasonable time.")
        if args.resume_from_checkpoint and accelerator.is_main_process:
            put_aside_newer(args, folder, saved["step"] if saved else 0)
        start_trackers(args, accelerator)
        pipe, vae, decoder = load_frozen([*clips, *held_out], args, base, accelerator)
        dataset = ClipDataset(clips, args, vae.config, cached=not pipe)
        unet, checkpointing = load_unet(args, base, accelerator.device)
        vae.to(accelerator.device)
        state = TrainingState(unet, args, accelerator, settings, frames)
        if saved:
            state.load(folder, saved)
        if accelerator.is_main_process:
            put_aside_other_run(state)
            state.prune()
            warn_of_disk(state, base)
        validation = None
        if held_out and accelerator.is_main_process:
            validation = Validation(args, base, held_out, vae, decoder)
        data = f"{len(clips)} clips" + (f" and {len(held_out)} held out" if held_out else "")
        steps = f"{args.max_train_steps} steps of {settings['global_batch_size']}"
        count = sum(p.numel() for p in state.trained.values()) / 1e6
        trained = f"{count:.1f} M parameters trained ({trained_layers(args)})"
        how = f"{args.mixed_precision} on {device.type}, recomputed: {checkpointing}"
        accelerator.print(f"{data}, {steps}; {trained}, {how}")
        with saved_on_error(state):
            status = run_steps(state, dataset, pipe, vae, validation)
        if not status and accelerator.is_main_process:
            save_result(state, base)
            output = args.output_dir
            if args.save_merged:
                print(f"done: {output} is a diffusers pipeline; python infer_svd.py --model_dir {output} ...")
            else:
                print(f"done: python infer_svd.py --model_dir {args.pretrained_model_name} --lora {output}/lora ...")
        end_processes(state)
        if args.push_to_hub and not status and accelerator.is_main_process:
            push_to_hub(args)
        return status


def run_steps(state, dataset, pipe, vae, validation):
    """The loop, from the step that the state is at: one pass is one optimizer step. Returns 0 or a stop's status."""
    args, accelerator, weight_dtype = state.args, state.accelerator, DTYPES[state.args.mixed_precision]
    loader = batches(dataset, index_batches(state), accelerator.device.type == "cuda", args.dataloader_num_workers)
    stop, log, first = StopSignal(accelerator), Log(state), state.steps
    has_validation = bool(args.validation_dir or args.num_validation_videos)  # true on all processes, as what follows
    if validation and is_validated(args, first) and not log.has_scores(first):  # the base's, or a kill cut it off
        log.scores(validation(state))
    for step in range(first, args.max_train_steps):
        micro_batches, failure = take(loader, args.gradient_accumulation_steps, log)
        received = stop.requested(failure)
        if failure or received < 0 or (received and state.steps > first):  # a step at least, or it would never end
            return end_early(state, received, failure)
        for micro, batch in enumerate(micro_batches):
            batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
            if pipe:
                batch = add_latents(batch, pipe, args, accelerator.device)
            with state.synchronized(last=micro == len(micro_batches) - 1):
                loss, losses = training_loss(state.unet, vae, batch, weight_dtype, args.loss)
                state.backward(loss / len(micro_batches))
            log.add(losses)

        done = step + 1
        ended = done == args.max_train_steps
        saving = ended or done % args.checkpointing_steps == 0
        validating = has_validation and is_validated(args, done)
        logging = ended or saving or validating or done % args.logging_steps == 0
        if not state.update(look=logging):
            raise UserError(describe_bad_step(state, dataset))
        log.step_done(done, write=logging)
        if saving and accelerator.is_main_process:
            state.save()
        if validating and validation:
            log.scores(validation(state))
    log.progress.close()
    accelerator.wait_for_everyone()
    return 0


def is_validated(args, step):
    return step == args.max_train_steps or step % args.validation_steps == 0


def index_batches(state):
    """For each micro-batch of this process from `state.steps` on, the sample indices in it."""
    args, ranks, rank = state.args, state.accelerator.num_processes, state.accelerator.process_index
    size, total = args.train_batch_size, state.settings["global_batch_size"]
    for step in range(state.steps, args.max_train_steps):
        for micro in range(args.gradient_accumulation_steps):
            first = step * total + (micro * ranks + rank) * size
            yield list(range(first, first + size))


def take(loader, count, log):
    """The next `count` batches, and the error that came in their place or None; the time counts as waiting."""
    start = time.perf_counter()
    try:
        return [next(loader) for _ in range(count)], None
    except (UserError, OSError) as error:
        return [], error
    finally:
        log.waited += time.perf_counter() - start


def end_early(state, received, failure):
    """A signal, or data that this or another process could not read: saves, then says how to go on."""
    accelerator = state.accelerator
    if accelerator.is_main_process:
        state.save()
    accelerator.wait_for_everyone()  # a launcher ends the others as soon as one has ended
    if failure:
        raise UserError(f"{failure} --resume_from_checkpoint latest") from failure
    accelerator.print(f"\nstopped after step {state.steps}, saved; go on with --resume_from_checkpoint latest")
    return 128 + received if received > 0 else 1


def describe_bad_step(state, dataset):
    """Names the clips of a step whose loss or gradient was not finite."""
    if state.overflows():
        return "fp16 gradients overflow at every step; use --mixed_precision bf16 or a lower --learning_rate"
    total = state.settings["global_batch_size"]
    indices = range(state.steps * total, (state.steps + 1) * total)
    names = sorted({dataset.clip_of(index)["directory"] for index in indices})
    reached = "some weights may have it" if state.freed_early else "it did not reach the weights"
    what = f"step {state.steps + 1}: the loss or a gradient is not finite; {reached}"
    cure = "Look at them, or try a lower --learning_rate, or --mixed_precision bf16"
    return f"{what}. Its clips: {', '.join(names)}. {cure}"


@contextlib.contextmanager
def saved_on_error(state):
    """Saves the steps that are done before an error ends the run (a full disk, a clip, the GPU's memory, a bug)."""
    try:
        yield
    except Exception:
        print(file=sys.stderr)  # the progress bar's line ends
        if state.whole and state.steps and state.accelerator.is_main_process:
            with contextlib.suppress(OSError, RuntimeError):  # the error that is on its way out is the one to show
                state.save()
                print(f"the {state.steps} steps that are done are saved", file=sys.stderr)
        raise


@contextlib.contextmanager
def lock_output(args, accelerator):
    """Makes --output_dir and holds it: a second run on it is refused, also one that looked when it was still empty."""
    output = Path(args.output_dir)
    if not accelerator.is_main_process:
        yield
        return
    output.mkdir(parents=True, exist_ok=True)
    with common.lock_file(output / ".lock", f"--output_dir {output}: another run is at work on it"):
        check_output_dir(args)
        for left in [*output.glob(".checkpoint-*.*"), *output.glob(".best.*")]:  # what a killed run left
            if left.suffix == ".old" and not (whole := output / left.stem[1:]).exists():
                os.replace(left, whole)  # it was to be replaced, and what was to replace it is not whole
            else:
                shutil.rmtree(left)
        for left in filter(Path.is_file, output.glob(".*.part")):
            left.unlink()
        yield


def end_processes(state):
    """Several processes end together: one that is gone would leave the others waiting."""
    accelerator = state.accelerator
    accelerator.wait_for_everyone()
    # The wrapper of several processes goes before their group: if it let go of the group last, it would wait for the
    # group's threads with Python's lock in its hand, and they for the lock: a deadlock, seen on one busy core.
    state.unet = None
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


class StopSignal:
    """SIGINT, SIGTERM, SIGHUP (a closed terminal) and SIGUSR1 (Slurm) ask for a stop after the step.

    A second Ctrl-C stops at once. What nohup told the process to ignore stays ignored.
    """

    def __init__(self, accelerator):
        self.signal, self.launcher, self.group = 0, os.getppid(), None
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows has the first two
            ignored = number and name in ("SIGHUP", "SIGUSR1") and signal.getsignal(number) == signal.SIG_IGN
            if number and not ignored:
                signal.signal(number, self.receive)
        if accelerator.num_processes > 1:  # a group of its own on the CPU: to ask each other makes no GPU wait
            self.group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

    def receive(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # not SIGTERM: launchers send it twice

    def requested(self, failure):
        """The signal's number, or 0; -1 where only another process failed. The same answer on every process."""
        if not self.group:
            return self.signal
        if os.getppid() != self.launcher:  # killed; nobody would end this run any more
            self.signal = self.signal or signal.SIGTERM
        answer = torch.tensor([self.signal, failure is not None])
        torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MAX, self.group)
        received, failed = answer.tolist()
        return received or -failed


# ----------------------------------------------------------------------------------------------------------- Logs


def start_trackers(args, accelerator):
    """Starts --report_to before anything expensive; what it needs of the user is one line."""
    if args.report_to:
        simple = {name: value for name, value in vars(args).items() if isinstance(value, (int, float, str))}
        try:
            accelerator.init_trackers("svd", simple)
        except Exception as error:  # each tracker has errors of its own
            cure = "run `wandb login`, or set WANDB_MODE=offline" if args.report_to == "wandb" else "or leave it out"
            why = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"--report_to {args.report_to}: cannot be started ({why[0]}); {cure}") from None


def put_aside_other_run(state):
    """Moves into `earlier-N/` what a run of other settings, given up before its first checkpoint, validated here."""
    output, settings = Path(state.args.output_dir), state.settings
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        before = json.loads((output / "best" / common.CHECKPOINT_STATE).read_text())["settings"]
        if any(settings[key] != before.get(key, settings[key]) for key in settings.keys() - MAY_DIFFER_ON_RESUME):
            aside = next(path for n in itertools.count(1) if not (path := output / f"earlier-{n}").exists())
            aside.mkdir()
            for name in ("best", "validation"):
                os.replace(output / name, aside / name)


class Log:
    """The progress bar, metrics.jsonl and --report_to; device values are read only when a line is written."""

    def __init__(self, state):
        self.state, self.accelerator, args = state, state.accelerator, state.args
        self.path = Path(args.output_dir) / "metrics.jsonl"
        if self.accelerator.is_main_process:  # a resumed run writes the lines after its checkpoint again
            kept = [line for line in read_metrics(args.output_dir) if line["step"] <= state.steps and state.steps]
            common.write_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            write_page(self.path.parent)
        self.progress = tqdm(total=args.max_train_steps, initial=state.steps, desc="training", unit="step",
            disable=not self.accelerator.is_main_process)  # fmt: skip
        self.start(state.steps)

    def start(self, step):
        self.values, self.waited, self.since, self.step = defaultdict(list), 0.0, time.perf_counter(), step
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def add(self, values):
        """Device scalars by name; a line holds the mean of those since the last one."""
        for name, value in values.items():
            self.values[name].append(value)

    def step_done(self, step, write):
        """Counts a step; with `write`, a line of the means since the last one."""
        if not self.state.freed_early:
            self.add({"grad_norm": self.state.grad_norm})
        if write:
            self.write(step)
        self.progress.update()

    def write(self, step):
        reduce, elapsed = self.accelerator.reduce, time.perf_counter() - self.since
        means = {name: reduce(sum(given) / len(given), "mean").item() for name, given in self.values.items()}
        line = {"step": step, **means, "learning_rate": self.state.lr_scheduler.get_last_lr()[0]}
        line["seconds_per_step"] = round(elapsed / (step - self.step), 4)
        line["data_wait_share"] = round(self.waited / elapsed, 4)
        shown = {"loss": f"{means['loss_v']:.4f}", "lr": f"{line['learning_rate']:.1e}"}
        if self.accelerator.device.type == "cuda":
            line["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            line["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
            shown["mem"] = f"{line['peak_memory_gib']:.1f}G"
        self.append(line)
        self.progress.set_postfix(shown, refresh=False)
        self.start(step)

    def append(self, line):
        """Adds a line of numbers to metrics.jsonl and to --report_to."""
        line = finite(line)
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        numbers = {name: value for name, value in line.items() if name != "step" and value is not None}
        self.accelerator.log(numbers, step=line["step"])

    def scores(self, metrics):
        """Writes and shows what a validation gave, and keeps the weights where they are the best so far."""
        if metrics:
            keep_best(metrics, self.state)  # before the line, without which a resumed run does all of this again
            self.append({"step": self.state.steps, **{f"validation_{name}": v for name, v in metrics.items()}})
            report_scores(metrics, self.state)
            self.send_videos()
            write_page(self.path.parent)
        self.start(self.state.steps)

    def has_scores(self, step):
        return any(line["step"] == step and "validation_loss_v" in line for line in read_metrics(self.path.parent))

    def send_videos(self):
        """The side-by-side videos of a validation, to --report_to."""
        step, kind = self.state.steps, self.state.args.report_to
        for path in sorted(self.path.parent.glob(f"validation/step-{step:06d}/*.mp4")) if kind else ():
            tracker, name = self.accelerator.get_tracker(kind, unwrap=True), common.printable(path.stem)
            if kind == "wandb":
                import wandb

                tracker.log({name: wandb.Video(str(path), format="mp4")}, step=step)
            else:  # as a GIF, which its page plays; torch's add_video would need moviepy 1
                from tensorboard.compat.proto.summary_pb2 import Summary

                frames, data = [Image.fromarray(frame) for frame in common.read_video(path)], io.BytesIO()
                frames[0].save(data, "gif", save_all=True, append_images=frames[1:], duration=250, loop=0)
                width, height = frames[0].size
                image = Summary.Image(width=width, height=height, encoded_image_string=data.getvalue())
                tracker.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)


if __name__ == "__main__":
    common.run_script(main)
