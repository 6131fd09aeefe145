"""Seconds and memory of one training step, beside a step as SVD_Xtend writes it: same card, same run, random weights.

    python tests/bench_train.py              # full-size SVD-XT on a CUDA GPU (about 60 GB for all rows); tiny on a CPU

Prints a row a setting: median seconds of a step, peak memory, share of the card's own bf16 matrix rate (measured
first), and the forecast of train_svd.py --dry_run beside the measured peak.
"""

import gc
import json
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import train_svd
from svd_parts.forecast import forecast
from svd_parts.objective import training_loss
from svd_parts.optimizers import OPTIMIZERS, build_optimizer, gradients_freed_early, step_in_backward
from svd_parts.shortcuts import compile_blocks
from svd_parts.unet import prepare_unet, trained_parameters
from svd_parts.weights import SVD_XT_CONFIG, read_config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
FRAMES = 25 if DEVICE.type == "cuda" else 4
CONFIG = Path(__file__).resolve().parent / "tiny_svd" if DEVICE.type == "cpu" else SVD_XT_CONFIG


def build(cls, part):
    """A part with random weights, made on the device."""
    with DEVICE:
        model = cls.from_config(read_config(CONFIG, part))
    return model.to(DEVICE)


def seconds_and_peak(step, repeats=8, warmup=3):
    """Median seconds of `step()` and the peak GiB allocated while it runs (0 on a CPU)."""
    times = []
    for i in range(warmup + repeats):
        if i == warmup and DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0
    return sorted(times[warmup:])[repeats // 2], peak


def matrix_rate():
    """TFLOP/s of a large product in the compute dtype: the ceiling that shares are given of."""
    n = 8192 if DEVICE.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=DTYPE).unbind()
    seconds, _ = seconds_and_peak(lambda: a @ b, repeats=20)
    return 2 * n**3 / seconds / 1e12


def arguments(width, height, *flags):
    command = ["--pretrained_model_name", "x", "--dataset_dir", "x", "--output_dir", tempfile.mkdtemp()]
    command += ["--width", width]
    command += ["--height", height, "--num_frames", FRAMES, *flags]
    return train_svd.parse_args([str(word) for word in command])


def our_step(args, checkpointing):
    """The step of train_svd.py, everything on the device counted: UNet, optimizer, the VAE's encoder."""
    unet = prepare_unet(build(UNetSpatioTemporalConditionModel, "unet"), "temporal", DTYPE, checkpointing)
    vae = build(AutoencoderKLTemporalDecoder, "vae").requires_grad_(False)
    vae.decoder = None
    if args.compile:
        compile_blocks(unet)
    trained = trained_parameters(unet)
    freed_early = gradients_freed_early(args, 1)
    optimizer = build_optimizer(args, trained, freed_early)
    if freed_early:
        step_in_backward(optimizer, OPTIMIZERS[args.optimizer].step, torch.zeros((), dtype=torch.bool, device=DEVICE))
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (1, args.num_frames, 4, args.height // factor, args.width // factor)
    batch = {"latents": torch.randn(shape), "noise": torch.randn(shape), "sigmas": torch.ones(1), "keep": torch.ones(1)}
    batch |= {"added_time_ids": torch.tensor([[6.0, 127.0, 0.05]])}
    batch |= {"conditioning_image": torch.randn(1, 3, args.height, args.width)}
    batch |= {"image_embeddings": torch.randn(1, 1, unet.config.cross_attention_dim)}
    batch = {name: value.to(DEVICE) for name, value in batch.items()}

    def step():
        training_loss(unet, vae, batch, DTYPE)[0].backward()
        if not freed_early:
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), args.max_grad_norm)
            optimizer.found_inf = (~torch.isfinite(norm)).float()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def xtend_step(width, height, checkpointing):
    """As SVD_Xtend does it: fp32 UNet under autocast, VAE of all frames and CLIP every step, its 398 M parameters."""
    unet = build(UNetSpatioTemporalConditionModel, "unet").requires_grad_(False).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    vae = build(AutoencoderKLTemporalDecoder, "vae").requires_grad_(False).to(DTYPE)
    with DEVICE:
        clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**read_config(CONFIG, "image_encoder")))
    clip.to(DEVICE, DTYPE).requires_grad_(False)
    trained = [p for name, p in unet.named_parameters() if "temporal_transformer_block" in name]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    frames = torch.randn(FRAMES, 3, height, width, device=DEVICE, dtype=DTYPE)
    image = torch.randn(1, 3, 224, 224, device=DEVICE, dtype=DTYPE)
    ids = torch.tensor([[6.0, 127.0, 0.05]], device=DEVICE)

    def step():
        with torch.no_grad():
            latents = vae.encode(frames).latent_dist.sample()[None].float()
            condition = vae.encode(frames[:1]).latent_dist.sample()[None].float().expand_as(latents)
            embedding = clip(image).image_embeds[:, None].float()
        with torch.autocast(DEVICE.type, DTYPE, enabled=DTYPE != torch.float32):
            inputs = torch.cat([latents + torch.randn_like(latents), condition], dim=2)
            output = unet(inputs, torch.ones(1, device=DEVICE), encoder_hidden_states=embedding, added_time_ids=ids)
            loss = (output.sample.float() - latents).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def row(label, make_step, flops, rate, predicted=None):
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    try:
        seconds, peak = seconds_and_peak(make_step())
    except torch.cuda.OutOfMemoryError:
        print(f"{label:44s}  out of memory", flush=True)
        return None
    share = f"{flops / seconds / 1e12 / rate:6.1%}" if flops else "     -"
    forecast = f"{predicted:7.2f}" if predicted else "      -"
    print(
        f"{label:44s} {seconds:8.3f} s {peak:7.2f} GiB  forecast {forecast} GiB  {share} of the matrix rate", flush=True
    )
    return {"label": label, "seconds": seconds, "peak_gib": peak, "forecast_gib": predicted}


def measured_and_forecast(width, height, checkpointing):
    """(measured, forecast) peak GiB of a step on this GPU."""
    args = arguments(width, height)
    expected = forecast(args, CONFIG, checkpointing, DTYPE)["peak_memory_gib"]
    return seconds_and_peak(our_step(args, checkpointing), repeats=2)[1], expected


def main():
    small, large = ((512, 320), (1024, 576)) if DEVICE.type == "cuda" else ((96, 64), (128, 96))
    rate = matrix_rate()
    print(
        f"{torch.cuda.get_device_name() if DEVICE.type == 'cuda' else 'CPU, tiny model'}: {rate:.1f} TFLOP/s in {DTYPE}"
    )
    rows = []
    for (width, height), mode, flags in (
        (small, "none", []), (small, "none", ["--compile"]), (small, "transformers", []), (small, "full", []),
        (small, "full", ["--max_grad_norm", 0]), (small, "full", ["--optimizer", "adamw8bit"]), (large, "full", []),
    ):  # fmt: skip
        if flags[-1:] == ["adamw8bit"] and find_spec("bitsandbytes") is None:
            continue
        if DEVICE.type == "cpu" and "--compile" in flags:
            continue
        args = arguments(width, height, *flags)
        plan = forecast(args, CONFIG, mode, DTYPE, count_flops=True)
        label = f"ours {width}x{height}x{FRAMES} {mode} {' '.join(map(str, flags))}"
        make_step = lambda args=args, mode=mode: our_step(args, mode)  # noqa: E731
        rows.append(row(label, make_step, plan["flops_per_step"], rate, plan["peak_memory_gib"]))
    for checkpointing in (False, True):
        label = f"as SVD_Xtend {small[0]}x{small[1]}x{FRAMES}, its checkpointing {checkpointing}"
        rows.append(row(label, lambda c=checkpointing: xtend_step(*small, c), None, rate))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
