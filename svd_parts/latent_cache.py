"""The cache: results of the frozen VAE and CLIP, computed once and kept on disk, one file for each clip."""

import contextlib
import gc
import shlex
import tempfile
from pathlib import Path

import torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image
from safetensors import SafetensorError, safe_open

import svd_common as common
from svd_parts.console import progress_bar
from svd_parts.files import UserError, counted, lock_file, plain_name, tidy
from svd_parts.weights import PARTS, write_tensors


@contextlib.contextmanager
def errors_naming(clip):
    """Turns an error about a file of this clip into a `UserError` that names the clip and the cure."""
    try:
        yield
    except (UserError, OSError, SafetensorError) as error:
        what = error if isinstance(error, UserError) else f"{clip['root'] / clip['directory']}: {error}"
        cure = f"repair it, or go on without this clip: --exclude {shlex.quote(clip['directory'])}"
        raise UserError(f"{what}; {cure}") from error


def frames_at_once(options):
    """How many frames the VAE encodes at a time, so that its activations take about 3 GiB at most."""
    return max(1, 512 * 320 * 8 // (options.width * options.height))


def frames_to_decode(options):
    """How many frames validation decodes at a time: few, so that it never needs more memory than training."""
    return max(1, frames_at_once(options) // 4)


def cache_is_current(path, digest):
    try:
        with safe_open(path, "pt") as cached:
            return (cached.metadata() or {}).get("key") == digest
    except Exception:  # safetensors has several kinds for a missing or damaged file; the file is then written again
        return False


def read_cached(path, start, num_frames):
    """Reads a window: posterior mean and std, (T, 4, h, w) each, and the embedding of its first frame, (1, D)."""
    with safe_open(path, "pt") as cached:
        window = slice(start, start + num_frames)
        mean, std = cached.get_slice("mean")[window], cached.get_slice("std")[window]
        return mean, std, cached.get_slice("image_embeddings")[start : start + 1][0]


def load_encoders(base, device):
    """A pipeline without a UNet, with the VAE and CLIP in fp32 on the device."""
    parts = {part: common.load_part(base, part, torch.float32) for part in PARTS if part != "unet"}
    for part in ("vae", "image_encoder"):
        parts[part].requires_grad_(False).to(device)
    return StableVideoDiffusionPipeline(unet=None, **parts)


def load_frozen(clips, options, base, fingerprint, accelerator):
    """Loads the frozen parts for training: (a pipeline that encodes, or None with a cache; the VAE; its decoder).

    Fills the cache first. Training then needs only the VAE's encoder, and no CLIP. fingerprint: that of VAE and CLIP,
    which is a part of the cache's name.
    """
    if options.cache_latents:
        build_cache(clips, options, base, fingerprint, accelerator)
        pipe, vae = None, common.load_part(base, "vae", torch.float32).requires_grad_(False)
    else:
        pipe = load_encoders(base, accelerator.device)
        vae = pipe.vae
    decoder, vae.decoder = vae.decoder, None
    return pipe, vae, decoder


def build_cache(clips, options, base, fingerprint, accelerator):
    """Sets the path `clip["cache"]` and encodes clips without a current file there. The processes share the work."""
    for clip in clips:
        root, name = clip["root"] / ".cache", "/".join(map(plain_name, clip["directory"].split("/")))
        if options.cache_dir:  # may be shared by several datasets
            root, name = Path(options.cache_dir), f"{name}-{clip['digest']}"
        clip["cache"] = root / f"{options.width}x{options.height}-{fingerprint}" / f"{name}.safetensors"
        clip["cache_root"] = root
    missing = [clip for clip in clips if not cache_is_current(clip["cache"], clip["digest"])]
    for folder in {clip["cache"].parent for clip in missing}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            str(folder).encode()
        except (OSError, UnicodeEncodeError) as error:
            why = getattr(error, "strerror", "the name is not UTF-8")
            cure = "give another folder with --cache_dir, or train without a cache: --no-cache_latents"
            raise UserError(f"{folder}: the cache cannot be written there ({why}); {cure}") from None
    if missing:
        frames = sum(len(clip["frames"]) for clip in missing)
        accelerator.print(f"caching latents of {counted(len(missing), 'clip')}, {counted(frames, 'frame')}")
    accelerator.wait_for_everyone()  # no process writes before all have looked what is missing
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    if mine:
        with lock_cache({clip["cache_root"] for clip in mine}):
            encode_clips(mine, options, load_encoders(base, accelerator.device), accelerator)
        gc.collect()
        torch.cuda.empty_cache()  # else `usable_memory` would not count the encoders' memory as free
    accelerator.wait_for_everyone()


@contextlib.contextmanager
def lock_cache(roots):
    """Holds shared locks on the cache folders. A process that is alone there first removes what a killed run left."""
    with contextlib.ExitStack() as locks:
        for root in sorted(roots):
            with contextlib.suppress(UserError), lock_file(root / ".lock", "busy"):
                tidy([*root.glob("[0-9]*x*-*/**/.*.part")])
            locks.enter_context(lock_file(root / ".lock", None, shared=True))
        yield


@torch.no_grad()
def encode_clips(clips, options, pipe, accelerator):
    """Writes the cache file of each clip: posterior mean and std (N, 4, h, w), CLIP embeddings (N, 1, D), all fp32."""
    total, chunk, device = sum(len(clip["frames"]) for clip in clips), frames_at_once(options), accelerator.device
    hidden = not accelerator.is_main_process
    with progress_bar("caching latents", "frame", total, disable=hidden) as progress:
        for clip in clips:
            parts = []
            for i in range(0, len(clip["frames"]), chunk):
                with errors_naming(clip):
                    paths = clip["frames"][i : i + chunk]
                    frames = common.read_frames(paths, options.width, options.height)  # (n, H, W, 3)
                posterior = pipe.vae.encode(common.to_pixels(frames).to(device)).latent_dist
                embeddings = pipe._encode_image([Image.fromarray(frame) for frame in frames], device, 1, False)
                parts.append([part.cpu() for part in (posterior.mean, posterior.std, embeddings)])
                progress.update(len(frames))
            tensors = dict(zip(("mean", "std", "image_embeddings"), (torch.cat(part) for part in zip(*parts))))
            write_tensors(clip["cache"], tensors, {"key": clip["digest"]})


def add_latents(batch, pipe, options, device):
    """Encodes the frames of a batch when there is no cache, exactly as the cache would have."""
    pixels, chunk = batch.pop("pixel_values"), frames_at_once(options)
    frames = ((pixels + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy()  # (B, T, H, W, 3)
    with torch.no_grad():
        posteriors = [pipe.vae.encode(part).latent_dist for part in pixels.flatten(0, 1).split(chunk)]
        first = [Image.fromarray(clip[0]) for clip in frames]
        batch["image_embeddings"] = pipe._encode_image(first, device, 1, False)
    mean, std = (torch.cat([getattr(p, name) for p in posteriors]) for name in ("mean", "std"))
    noise = batch.pop("posterior_noise")
    batch["latents"] = (mean + std * noise.flatten(0, 1)).view_as(noise) * pipe.vae.config.scaling_factor
    return batch
