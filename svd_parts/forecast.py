"""Forecasts the memory and the arithmetic of a training step and of a generated clip.

The real passes run on fake tensors, which have a shape but no data.
"""

import contextlib
import functools
import json
import os
import weakref

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from svd_parts.action_encoder import add_encoder
from svd_parts.latent_cache import frames_to_decode
from svd_parts.lora import add_adapters
from svd_parts.objective import random_generator, training_loss
from svd_parts.optimizers import gradients_freed_early, optimizer_bytes
from svd_parts.shortcuts import avoid_conv3d, save_memory
from svd_parts.unet import prepare_unet, trained_parameters
from svd_parts.weights import MODEL_PARTS, latent_factor, read_config

cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
cpu_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
ATTENTION_ON_CPU = {  # torch's FLOP counter knows only the GPU's attention kernels
    cpu_attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    cpu_attention_backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
}


class MemoryTracker(TorchDispatchMode):
    """A context that counts bytes: of all tensors made in it that are alive `now`, and at the `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, {}

    def track(self, tensor):
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self.free(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def free(self, key, size):
        self.now -= size
        del self.alive[key]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.track(leaf)
        return out


FAKE = FakeTensorMode(allow_non_fake_inputs=True)  # of inference: one, for fake tensors of two must not meet
NUM_ACTIONS = 7  # numbers in an action of most robot arms; a few more hardly change the forecast


def fake_batch(options, count, unet_config, vae_config):
    """A training batch of `count` samples, with the shapes that ClipDataset gives and without real values."""
    factor = latent_factor(vae_config)
    shape = (count, options.num_frames, vae_config.latent_channels, options.height // factor, options.width // factor)
    shapes = {"latents": shape, "noise": shape, "sigmas": (count,), "keep": (count,), "added_time_ids": (count, 3)}
    if options.condition_on:
        shapes |= {"actions": (count, options.num_frames, NUM_ACTIONS), "keep_actions": (count,)}
    shapes["conditioning_image"] = (count, 3, options.height, options.width)
    shapes["image_embeddings"] = (count, 1, unet_config.cross_attention_dim)
    return {name: torch.ones(shape) for name, shape in shapes.items()}


def forecast(options, folder, checkpointing, weight_dtype, count_flops=False):
    """Forecasts one training step. Runs the real step on fake tensors: nothing is loaded or computed.

    Returns a dict. In GiB: `peak_memory_gib` is the larger of `training_gib` and `validation_gib`; it consists of
    `weights_gib`, `gradients_gib`, `optimizer_gib` and, as the rest, `activations_gib`. Also `trainable_parameters`
    and, with `count_flops`, `flops_per_step`.
    """
    processes, flops = int(os.environ.get("WORLD_SIZE", 1)), {}
    freed_early = gradients_freed_early(options, processes)
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel.from_config(read_config(folder, "unet"))
        if options.lora_rank:
            add_adapters(unet, options, random_generator(options.seed, "adapters"))
        if options.condition_on:
            add_encoder(unet, NUM_ACTIONS, random_generator(options.seed, "actions"))
        prepare_unet(unet, options.trainable, weight_dtype, checkpointing)
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryTracker() as tracker:
        for module in unet.modules():  # to_empty() would swap tensors, and fake tensors cannot be swapped
            for name, p in module._parameters.items():
                if p is not None:
                    empty = torch.empty(p.shape, dtype=p.dtype, device="cpu")
                    module._parameters[name] = torch.nn.Parameter(empty, p.requires_grad)
        vae = AutoencoderKLTemporalDecoder.from_config(read_config(folder, "vae")).requires_grad_(False)
        vae.decoder = None
        trained = list(trained_parameters(unet).values())
        count = sum(p.numel() for p in trained)
        optimizer = optimizer_bytes(options.optimizer, count)
        held = [torch.empty(optimizer, dtype=torch.uint8), *(torch.empty_like(p) for p in trained if options.use_ema)]
        batch = fake_batch(options, options.train_batch_size, unet.config, vae.config)
        for parameter in trained if freed_early else ():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

        def train(micro_batches):
            for _ in range(micro_batches):
                training_loss(unet, vae, batch, weight_dtype)[0].backward()
            if not freed_early:
                torch.nn.utils.clip_grad_norm_(trained, 1.0)

        tracker.peak = tracker.now
        # With several micro-batches or processes, the gradients of the first pass are still there during the second.
        train(1 if processes == options.gradient_accumulation_steps == 1 else 2)
        training = tracker.peak
        if processes == 1:
            unet.zero_grad(set_to_none=True)
        tracker.peak = tracker.now
        fake_validation(options, folder, unet, batch, weight_dtype)
        validation = tracker.peak
        if count_flops:  # after the memory: the FLOP counter keeps recomputed activations alive
            with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter:
                train(1)
            flops = {"flops_per_step": counter.get_total_flops() * options.gradient_accumulation_steps}
    peak = max(training, validation) if options.validation_dir or options.num_validation_videos else training
    weights = sum(p.nbytes for p in [*unet.parameters(), *vae.parameters(), *held[1:]])
    gradients = (max if freed_early else sum)(p.nbytes for p in trained)
    sizes = {"peak_memory": peak, "weights": weights, "gradients": gradients, "optimizer": optimizer}
    sizes |= {"activations": peak - weights - gradients - optimizer, "training": training, "validation": validation}
    sizes = {f"{name}_gib": round(size / 2**30, 3) for name, size in sizes.items()}
    return {**sizes, "trainable_parameters": count, **flops}


@torch.no_grad()
def fake_validation(options, folder, unet, batch, weight_dtype):
    """Runs the two parts of a validation that take most memory: the UNet on guidance's two samples, and decoding."""
    latents = torch.cat([batch["latents"][:1], batch["latents"][:1]], dim=2).repeat(2, 1, 1, 1, 1).to(weight_dtype)
    embeddings = batch["image_embeddings"][:1].repeat(2, 1, 1).to(weight_dtype)
    unet(latents, torch.tensor(1.0), embeddings, batch["added_time_ids"][:1].repeat(2, 1), return_dict=False)
    decoder = AutoencoderKLTemporalDecoder.from_config(read_config(folder, "vae"))
    decoder.encoder = None
    frames = torch.empty(options.num_frames, 3, options.height, options.width)
    count = min(options.num_frames, frames_to_decode(options))
    decoder.decode(batch["latents"][0, :count].float(), num_frames=count)
    del frames


def forecast_clip(base, settings):
    """What generating one clip needs: (GiB of GPU memory, TFLOP), in fp16. Runs the real passes on fake tensors.

    base: the folder of the model's configuration, or SVD_XT_CONFIG. Without --low_vram all parts of the model stay on
    the GPU; with it, only the part that is at work. CUDA itself takes 0.5 GiB more.
    """
    configs = [json.dumps(read_config(base, part)) for part in MODEL_PARTS]
    factor, chunk = latent_factor(read_config(base, "vae")), settings.decode_chunk_size
    latents = settings.num_frames, settings.height // factor, settings.width // factor
    unet, denoise, step_flops = denoising_needs(configs[0], *latents, low_vram=False)
    if settings.low_vram:
        _, denoise, _ = denoising_needs(configs[0], *latents, low_vram=True)
    vae, decode, chunk_flops = decoding_needs(configs[1], chunk, *latents[1:])
    clip = clip_bytes(configs[2])
    decode += 4 * 3 * settings.num_frames * settings.width * settings.height  # all decoded frames, in fp32
    if not settings.low_vram:
        denoise, decode = denoise + vae + clip, decode + unet + clip
    tflop = (settings.num_inference_steps * step_flops + settings.num_frames / chunk * chunk_flops) / 1e12
    return max(denoise, decode, vae + clip) / 2**30, tflop


def fake_part(part, config):
    """A part of the model in fp16, without data. config: its configuration as JSON."""
    classes = {"unet": UNetSpatioTemporalConditionModel, "vae": AutoencoderKLTemporalDecoder}
    with FAKE:
        if part in classes:
            model = classes[part].from_config(json.loads(config))
        else:
            model = CLIPVisionModelWithProjection(CLIPVisionConfig(**json.loads(config)))
        for parameter in model.parameters():
            parameter.data = parameter.data.half()
    avoid_conv3d(model)
    return model


@functools.lru_cache
def clip_bytes(config):
    return sum(parameter.nbytes for parameter in fake_part("image_encoder", config).parameters())


@functools.lru_cache  # a plan asks for several settings, which share most passes
def denoising_needs(config, num_frames, h, w, low_vram):
    """What `needs` says of one denoising step of the UNet. h, w: of the latents.

    low_vram: FLOP is None, since it is the same and takes long to count.
    """
    unet = fake_part("unet", config)
    if low_vram:
        save_memory(unet)
    with FAKE:
        x = torch.empty(2, num_frames, unet.config.in_channels, h, w).half()
        token, ids = torch.empty(2, 1, unet.config.cross_attention_dim).half(), torch.empty(2, 3).half()
        return needs(unet, lambda x, *more: unet(x, torch.tensor(1.0), *more), x, token, ids, count=not low_vram)


@functools.lru_cache
def decoding_needs(config, chunk, h, w):
    """What `needs` says of decoding `chunk` frames."""
    vae = fake_part("vae", config)
    with FAKE:
        z = torch.empty(chunk, vae.config.latent_channels, h, w).half()
        return needs(vae, lambda z: vae.decode(z, num_frames=chunk), z)


def needs(model, function, *inputs, count=True):
    """Runs a pass without gradients: (bytes of the weights, of the peak with them; FLOP, or None if not to `count`)."""
    flops = FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU)
    with torch.no_grad(), flops if count else contextlib.nullcontext(), MemoryTracker() as tracker:
        for tensor in [*model.parameters(), *inputs]:
            tracker.track(tensor)
        function(*inputs)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return weights, tracker.peak, flops.get_total_flops() if count else None


def choose_checkpointing(options, folder, weight_dtype, available):
    """The mode of --gradient_checkpointing. `auto` becomes the mode that recomputes least and fits `available` GiB.

    Where no mode fits, `auto` becomes `full`.
    """
    if options.gradient_checkpointing != "auto":
        return options.gradient_checkpointing
    less = ("none", "transformers") if available > 0 else ()
    fitting = (m for m in less if forecast(options, folder, m, weight_dtype)["peak_memory_gib"] <= available)
    return next(fitting, "full")
