"""Make tests/tiny_svd, a complete SVD checkpoint of a few megabytes, from the clips that render.py wrote.

    python tests/tiny/make_tiny.py --stage vae         # the VAE learns to reproduce the frames
    python tests/tiny/make_tiny.py --stage clip        # the image encoder learns to see where cube and goal are
    python tests/tiny/make_tiny.py --stage decoder     # the VAE's decoder alone, longer: latents stay what they were
    python tests/tiny/make_tiny.py --stage unet-init   # a random UNet and the rest of the folder

Then `train_svd.py --trainable all` trains the UNet, as it trains any other. The classes, the file layout and the
forward pass are SVD-XT's; only the sizes differ. VAE and UNet are stored in fp16, the image encoder in fp32, because
transformers 5 loads a file in the file's own dtype and diffusers in fp32: one call would give a mixed pipeline.
Each stage prints what it reached on episodes that it was not trained on.
"""

import argparse
import json
import math
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from svd_common import dtype_option, read_image, read_video
from svd_parts.dataset import list_clips

COLORS = ["blue", "orange", "purple", "red", "yellow"]
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
CAMERAS = ["front", "side"]
HELD_OUT = 0.05  # share of the reach episodes that no stage trains on


# Data


def load_clips(folder, episodes):
    """[(frames (T, H, W, 3) uint8, camera, state)] of both cameras; `episodes` is a slice of the episodes in order."""
    clips = []
    for state_file in sorted((folder / "states").glob("*.json"))[episodes]:
        state = json.loads(state_file.read_text())
        for camera in CAMERAS:
            video = folder / "videos" / "chunk-000" / f"observation.images.{camera}" / f"{state_file.stem}.mp4"
            clips.append((read_video(video), camera, state))
    return clips


def split(args):
    """Training and held-out clips. Push episodes from --push_train on are seen by nothing before the demo."""
    n = round(len(list((args.reach_dir / "states").glob("*.json"))) * (1 - HELD_OUT))
    train = load_clips(args.reach_dir, slice(0, n)) + load_clips(args.push_dir, slice(0, args.push_train))
    held_out = load_clips(args.reach_dir, slice(n, None)) + load_clips(args.push_dir, slice(args.push_train, None))
    if not train or not held_out:
        sys.exit(f"error: no clips in {args.reach_dir} and {args.push_dir}; render them first (tests/tiny/render.py)")
    print(f"{len(train)} clips to train on, {len(held_out)} held out")
    return train, held_out


def to_pixels(frames, device):
    """(N, H, W, 3) uint8 -> (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def set_learning_rate(optimizer, peak, step, steps):
    """100 steps of warm-up, then half a cosine."""
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def fit(module, loss_of_batch, steps, score):
    """Trains `module`, leaves it with the average of its weights; prints the loss and `score()`, dB, now and then."""
    average, began = {k: v.clone() for k, v in module.state_dict().items()}, time.time()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0)
    for step in range(steps):
        set_learning_rate(optimizer, 1e-3, step, steps)
        loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():  # the average is short at first: it must forget the start
            for name, value in module.state_dict().items():
                average[name].lerp_(value, max(0.01, 1 / (step + 2)))
        if step % 250 == 249:
            seconds = time.time() - began
            print(f"step {step + 1}  loss {loss.item():.4f}  held-out {score():.2f} dB  {seconds:.0f} s", flush=True)
    module.load_state_dict(average)


# The VAE: reconstruction of short clips, because its decoder is temporal


@torch.no_grad()
def reconstruction_psnr(vae, clips, device):
    """PSNR in dB over the first frames of all clips, from the posterior's mode."""
    errors = []
    for frames, _, _ in clips:
        x = to_pixels(frames[:8], device)
        y = vae.decode(vae.encode(x).latent_dist.mode(), num_frames=len(x)).sample.clamp(-1, 1)
        errors.append(((y - x) / 2).square().mean().item())
    return -10 * math.log10(sum(errors) / len(errors))


@torch.no_grad()
def latent_std(vae, clips, device):
    return torch.cat([vae.encode(to_pixels(c[0][:8], device)).latent_dist.sample() for c in clips]).std().item()


def train_vae(args):
    train, held_out = split(args)
    watched = held_out[:: max(1, len(held_out) // 16)]
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        sample_size=96,
        force_upcast=True,
    ).to(args.device)
    rng = np.random.default_rng(args.seed)

    def loss_of_batch():
        windows = []
        for _ in range(2):
            frames = train[rng.integers(len(train))][0]
            start = rng.integers(len(frames) - 7)
            windows.append(frames[start : start + 8])
        x = to_pixels(np.concatenate(windows), args.device)
        posterior = vae.encode(x).latent_dist
        z = posterior.sample()
        y = vae.decode(z, num_frames=8).sample
        kl = posterior.kl().mean() / z[0].numel()
        return F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + 2e-5 * kl

    fit(vae, loss_of_batch, args.steps or 1650, partial(reconstruction_psnr, vae, watched, args.device))
    std = latent_std(vae, train[:: max(1, len(train) // 170)], args.device)
    vae.register_to_config(scaling_factor=round(1 / std, 5))
    vae.half().save_pretrained(args.output_dir / "vae")
    psnr = reconstruction_psnr(vae.float(), watched, args.device)
    print(f"VAE: {psnr:.2f} dB on {len(watched)} held-out clips (fp16 weights), latent std {std:.3f}")


# Its decoder alone, once more: whatever was trained on the latents stays valid


def moving_weight(frames):
    """(T, H, W, 3) uint8 -> (T, 1, H, W): 5 where the picture differs from the clip's median (arm, cube), else 1."""
    moves = np.abs(frames.astype(np.int16) - np.median(frames, axis=0)).max(3) > 16
    moves = np.stack([cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) for mask in moves])
    return 1 + 4 * torch.from_numpy(moves).float()[:, None]


def train_decoder(args):
    """On the clips of a prepared dataset, small and moving things weighing more; every 40th clip is held out."""
    frames = [clip["frames"] for clip in list_clips(args.dataset_dir) if len(clip["frames"]) >= 8]
    clips = [np.stack([read_image(path) for path in paths]) for paths in frames]
    watched, clips = [(frames, None, None) for frames in clips[::40]], [c for i, c in enumerate(clips) if i % 40]
    vae = AutoencoderKLTemporalDecoder.from_pretrained(args.output_dir / "vae", **dtype_option(torch.float32))
    vae.to(args.device).requires_grad_(False).decoder.requires_grad_(True)
    rng, score = np.random.default_rng(args.seed), partial(reconstruction_psnr, vae, watched, args.device)
    print(f"{len(clips)} clips; held-out {score():.2f} dB before")

    def loss_of_batch():
        windows = [clips[i][:8] for i in rng.integers(len(clips), size=2)]
        x = to_pixels(np.concatenate(windows), args.device)
        weight = torch.cat([moving_weight(window) for window in windows]).to(args.device)
        with torch.no_grad():
            z = vae.encode(x).latent_dist.sample()
        error = vae.decode(z, num_frames=8).sample - x
        return (weight * (error.abs() + 2 * error.square())).mean()

    fit(vae.decoder, loss_of_batch, args.steps or 1500, score)
    vae.half().save_pretrained(args.output_dir / "vae")
    vae.float()
    print(f"decoder: {score():.2f} dB on {len(watched)} held-out clips (fp16 weights)")


# The image encoder: regression of what the simulator knows from the first frame


def state_vector(camera, state):
    """Cube and goal (x, y) about the middle of the table, the camera, the cube's colour: all about unit size."""
    xy = (np.array([state["cube"], state["goal"]]) - [0.5, 0]) * 8
    return [*xy.ravel(), 1.0 if camera == "front" else -1.0, *(float(c == state["cube_color"]) for c in COLORS)]


def clip_input(frames):
    """First frames as the pipeline shows them to CLIP: (N, 3, H, W) uint8 -> (N, 3, 224, 224)."""
    mean, std = (torch.tensor(x, device=frames.device)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    return ((_resize_with_antialiasing(frames.float() / 127.5 - 1, (224, 224)) + 1) / 2 - mean) / std


def train_clip(args):
    def tensors(clips):
        frames = torch.from_numpy(np.stack([frames[0] for frames, _, _ in clips])).permute(0, 3, 1, 2)
        targets = torch.tensor([state_vector(camera, state) for _, camera, state in clips])
        return frames.to(args.device), targets.float().to(args.device)

    (x, y), (held_out_x, held_out_y) = map(tensors, split(args))
    clip = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=224,
            patch_size=16,
            projection_dim=32,
        )
    ).to(args.device)
    head = torch.nn.Linear(32, y.shape[1], device=args.device)  # thrown away afterwards
    optimizer = torch.optim.AdamW([*clip.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.01)
    steps = args.steps or 1500
    for step in range(steps):
        set_learning_rate(optimizer, 1e-3, step, steps)
        batch = torch.randint(len(x), (32,))
        loss = F.mse_loss(head(clip(clip_input(x[batch])).image_embeds), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 250 == 249:
            print(f"step {step + 1}  loss {loss.item():.4f}")
    with torch.no_grad():
        error = (head(clip(clip_input(held_out_x)).image_embeds) - held_out_y).square().mean(0)
    unexplained = (error / held_out_y.var(0)).cpu().numpy().round(3)
    names = ["cube x", "cube y", "goal x", "goal y", "camera", *(f"{color} cube" for color in COLORS)]
    print("share of the variance not explained, held out:", dict(zip(names, unexplained.tolist())))
    clip.save_pretrained(args.output_dir / "image_encoder")


# The rest of the folder


def init_unet(args):
    channels = args.unet_channels
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=32,  # CLIP's projection_dim
        num_attention_heads=tuple(c // 32 for c in channels),
        down_block_types=["CrossAttnDownBlockSpatioTemporal"] * (len(channels) - 1) + ["DownBlockSpatioTemporal"],
        up_block_types=["UpBlockSpatioTemporal"] + ["CrossAttnUpBlockSpatioTemporal"] * (len(channels) - 1),
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,  # fps, motion bucket, noise augmentation: 3 x 32
        num_frames=8,
        sample_size=24,  # latent width: 96 pixels over the VAE's factor 4
    )
    scheduler = EulerDiscreteScheduler(  # SVD-XT's own configuration
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        interpolation_type="linear",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_spacing="leading",
        timestep_type="continuous",
        steps_offset=1,
    )
    feature_extractor = CLIPImageProcessor(
        size={"shortest_edge": 224},
        crop_size={"height": 224, "width": 224},
        do_center_crop=True,
        do_convert_rgb=True,
        do_normalize=True,
        do_rescale=True,
        do_resize=True,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        resample=3,
        rescale_factor=1 / 255,
    )
    StableVideoDiffusionPipeline(
        vae=AutoencoderKLTemporalDecoder.from_pretrained(args.output_dir / "vae", **dtype_option(torch.float16)),
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(args.output_dir / "image_encoder"),
        unet=unet.half(),
        scheduler=scheduler,
        feature_extractor=feature_extractor,
    ).save_pretrained(args.output_dir)
    index = args.output_dir / "model_index.json"  # a class that old versions of transformers have, too
    index.write_text(index.read_text().replace("CLIPImageProcessorPil", "CLIPImageProcessor"))
    size = sum(file.stat().st_size for file in args.output_dir.rglob("*") if file.is_file())
    parameters = sum(p.numel() for p in unet.parameters())
    print(f"UNet: {parameters / 1e6:.2f} M parameters; {args.output_dir}: {size / 1e6:.1f} MB")


# Command line


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", choices=["vae", "decoder", "clip", "unet-init"], required=True)
    parser.add_argument("--reach_dir", type=Path, default=ROOT / ".dev/tiny/reach", help="render.py --task reach")
    parser.add_argument("--push_dir", type=Path, default=ROOT / ".dev/tiny/push", help="render.py --task push --seed 1")
    parser.add_argument("--push_train", type=int, default=160, help="push episodes before this number are trained on")
    parser.add_argument("--dataset_dir", type=Path, help="of the decoder's clips, by prepare_dataset.py")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "tests/tiny_svd")
    parser.add_argument("--steps", type=int, help="training steps (default: 1650 for vae, else 1500)")
    parser.add_argument("--unet_channels", type=int, nargs=3, default=(32, 64, 128), help="multiples of 32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(args):
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    {"vae": train_vae, "decoder": train_decoder, "clip": train_clip, "unet-init": init_unet}[args.stage](args)


if __name__ == "__main__":
    main(build_parser().parse_args())
