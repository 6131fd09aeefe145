"""Estimates how long a run will take: on this machine's GPU, or on some common cards if there is none."""

import math
import time
from typing import NamedTuple

from svd_parts.files import counted


class Card(NamedTuple):
    """A GPU: its published dense bf16 rate with fp32 sums, its memory, and the share of the rate that we expect."""

    tflops: float
    gib: int
    share: float


# The shares are estimates, on no card measured. A roofline of the whole step gives 0.39 on an RTX 4090, where
# elementwise work takes a quarter of the time. Cards whose matrix rate is higher for their bandwidth reach less.
CARDS = {
    "RTX 4060 Ti 16 GB": Card(44, 16, 0.4),
    "RTX 3090": Card(71, 24, 0.4),
    "RTX 4090": Card(165, 24, 0.35),
    "A100 80 GB": Card(312, 80, 0.3),
    "H100 80 GB": Card(989, 80, 0.2),
}
MEASURED_SHARE = 0.4  # expected share of a measured matrix rate, which is lower than a published one
FORWARD_SHARE = {"none": 1 / 2.56, "transformers": 1 / 3.13, "full": 1 / 3.5}  # the forward pass in a step's FLOP
ENCODE_TFLOP, DECODE_TFLOP = 0.676, 1.88  # of the VAE, for a frame of 512x320
VAE_SLOWER = 2  # the VAE works in fp32: on tensor cores (TF32) at half the rate of bf16


def training_tflop(options, plan, frames, clips, mode):
    """The work in TFLOP of bf16: (a step, caching, all validations). The VAE's fp32 counts `VAE_SLOWER` times.

    mode: the --gradient_checkpointing of `plan`.
    """
    area = options.width * options.height / (512 * 320)
    step = plan["flops_per_step"] / 1e12
    forward = step * FORWARD_SHARE[mode] / (options.train_batch_size * options.gradient_accumulation_steps)
    clip = options.validation_inference_steps * 2 * forward + options.num_frames * DECODE_TFLOP * area * VAE_SLOWER
    count = 1 + math.ceil(options.max_train_steps / options.validation_steps)
    cache = frames * ENCODE_TFLOP * area * VAE_SLOWER if options.cache_latents else 0
    return step, cache, count * clips * clip


def readable(seconds):
    """Seconds as text: `40 s`, `12 min`, `3.2 h`."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def measured_rate(device):
    """TFLOP/s of a large matrix product on this GPU in bf16 (fp16 on older cards), measured for half a second."""
    import torch

    dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=dtype).unbind()
    a @ b
    torch.cuda.synchronize()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 0.5:
        a @ b
        torch.cuda.synchronize()
        count += 1
    return 2 * 8192**3 * count / (time.perf_counter() - started) / 1e12


def rates(device):
    """{card: (expected TFLOP/s of a run, GiB or None)} for this GPU, or for the common cards if there is none."""
    if device.type == "cuda":
        import torch

        return {torch.cuda.get_device_name(device): (MEASURED_SHARE * measured_rate(device), None)}
    return {name: (card.tflops * card.share, card.gib) for name, card in CARDS.items()}


def usable(gib):
    """The GiB of a card of `gib` that a run can use, without CUDA's own and fragments. None: unknown, so any number."""
    return math.inf if gib is None else 0.95 * gib - 0.6


def basis(device):
    """What the times are estimated from, as text."""
    how = "its measured matrix rate" if device.type == "cuda" else "published rates, on no card measured"
    return f"an estimate from {how}"


def print_training_time(options, plan, frames, clips, peaks, device):
    """Prints seconds a step and the total time; returns {card: hours}. frames: to cache; clips: of a validation.

    peaks: {--gradient_checkpointing: GiB}, the fastest first; the last one is that of `plan`. A card takes the first
    that fits.
    """
    *_, mode = peaks
    step, cache, validation = training_tflop(options, plan, frames, clips, mode)
    steps = f"{options.max_train_steps} step" + "s" * (options.max_train_steps != 1)
    parts = f"caching {counted(frames, 'frame')}" + (f" and validating {counted(clips, 'clip')}" if clips else "")
    print(f"time for {steps}, {parts} included; {basis(device)}:")
    hours = {}
    for name, (rate, gib) in rates(device).items():
        room = usable(gib)
        taken = next((other for other, peak in peaks.items() if peak <= room), mode)
        seconds = step * FORWARD_SHARE[mode] / FORWARD_SHARE[taken] / rate
        total = seconds * options.max_train_steps + (cache + validation) / rate
        hours[name] = round(total / 3600, 2)
        fits = "" if peaks[taken] <= room else f", but {gib} GiB are too few"
        how = f" (gradient checkpointing {taken})" if taken != mode else ""
        print(f"  {name:18s} {seconds:6.2f} s a step, {readable(total)}{how}{fits}")
    return hours


def print_clip_time(tflop, count, modes, device):
    """Prints how long it takes to generate `count` clips of `tflop` TFLOP each.

    modes: {flags: GiB}, the largest first. A run on a card takes the first that fits.
    """
    print(f"time for {counted(count, 'clip')}; {basis(device)}:")
    for name, (rate, gib) in rates(device).items():
        text = f"{readable(tflop / rate)} a clip" + (f", {readable(count * tflop / rate)} in all" if count > 1 else "")
        taken = next((flags for flags, peak in modes.items() if peak <= usable(gib)), None)
        how = f"{gib} GiB are too few" if taken is None else f"with {taken}" if taken else ""
        print(f"  {name:18s} {text}" + (f", {how}" if how else ""))
