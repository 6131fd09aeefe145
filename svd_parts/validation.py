"""Scores of held-out clips: is the model learning?"""

import contextlib
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image
from safetensors import SafetensorError
from tqdm.auto import tqdm

import svd_common as common
from svd_parts.actions import acting
from svd_parts.checkpoints import save_checkpoint
from svd_parts.files import UserError, name_digest, plain_name, tidy
from svd_parts.latent_cache import frames_to_decode, read_cached
from svd_parts.metrics import METRICS, finite, mean_scores, read_metrics, video_metrics
from svd_parts.objective import random_generator, training_loss
from svd_parts.samples import ClipDataset
from svd_parts.unet import compute_dtype
from svd_parts.weights import CHECKPOINT_STATE

# Is it learning? Held-out clips: the loss at fixed noise, by noise level, and generated videos scored against the real.
VALIDATION_SIGMAS = (0.1, 0.5, 2.0, 10.0, 100.0)  # 8 of the 25 inference steps lie over 80


class Validation:
    """Scores the model as it stands on held-out clips, with generators of its own: it changes nothing of the run.

    vae: the run's own, on the GPU; its decoder stays on the CPU until latents are decoded. CLIP is not needed: the
    cache holds what it says of each first frame.
    """

    def __init__(self, options, base, clips, vae, decoder):
        self.options, self.clips, self.vae, self.decoder = options, clips, vae, decoder
        self.weight_dtype = compute_dtype(options.mixed_precision)
        self.dataset = ClipDataset(clips, options, vae.config, cached=True)
        parts = {part: common.load_part(base, part, None) for part in ("scheduler", "feature_extractor")}
        self.pipe = StableVideoDiffusionPipeline(unet=None, vae=vae, image_encoder=None, **parts)
        self.pipe.set_progress_bar_config(disable=True)

    def losses(self, unet, device):
        """Mean v loss by noise level, on the first window of every clip, with the same noise every time."""
        sums = dict.fromkeys(VALIDATION_SIGMAS, 0.0)
        for place, clip in enumerate(self.clips):
            sample = self.dataset.sample(clip, 0, random_generator("validation", place))
            batch = {name: value[None].to(device) for name, value in sample.items()}
            batch |= {name: torch.ones_like(batch[name]) for name in ("keep", "keep_actions") if name in batch}
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
        options, pipe = self.options, self.pipe
        first = common.read_frames(clip["frames"][:1], options.width, options.height)[0]
        embedding = read_cached(clip["cache"], 0, 1)[2][None].to(device, self.weight_dtype)  # (1, 1, D)
        pipe._encode_image = lambda *_: torch.cat([torch.zeros_like(embedding), embedding])
        actions = clip["scaled_actions"][None, : options.num_frames] if options.condition_on else None
        with acting(pipe.unet, actions):
            latents = pipe(
                Image.fromarray(first), width=options.width, height=options.height, num_frames=options.num_frames,
                fps=round(clip["fps"]), motion_bucket_id=clip["motion_bucket_id"], output_type="latent",
                generator=torch.Generator().manual_seed(0),
            ).frames  # fmt: skip
        self.vae.decoder = self.decoder.to(device)
        try:
            frames = pipe.decode_latents(latents.float(), options.num_frames, frames_to_decode(options))
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
            target = Path(self.options.output_dir) / "validation" / f"step-{state.steps:06d}"
            target.mkdir(parents=True, exist_ok=True)
            tidy(target.glob(".*.part"))  # of a killed run
            for clip in self.clips:
                real = common.read_frames(
                    clip["frames"][: self.options.num_frames], self.options.width, self.options.height
                )
                generated = self.generate(clip, device)
                scores.append(video_metrics(generated, real))
                copied.append(video_metrics(np.repeat(real[:1], len(real), axis=0), real))
                sheet = common.side_by_side({"real": real, f"generated, step {state.steps}": generated})
                name = clip["directory"].replace("/", "_")
                name += f"+{name_digest(clip['directory'])}" if "/" in clip["directory"] else ""
                common.write_video(target / f"{plain_name(name)}.mp4", sheet, clip["fps"])
            copied = {f"copied_{name}": value for name, value in mean_scores(copied).items()}
            return {**metrics, **mean_scores(scores), **copied}
        except (RuntimeError, OSError, SafetensorError, UserError) as error:  # out of memory has many names
            tqdm.write(f"validation failed and was left out; training goes on ({str(error).splitlines()[0]})")
            return {}
        finally:
            torch.cuda.empty_cache()
            if state.ema:
                state.ema.restore(state.trained.values())


def is_validated(options, step):
    return step == options.max_train_steps or step % options.validation_steps == 0


def report_scores(metrics, state):
    """Prints the scores beside those of the base and of a copied first frame; warns of video that does not move."""
    base = next(
        (line for line in read_metrics(state.options.output_dir) if line["step"] == 0), None
    )  # only scores have 0
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
    folder, name = Path(state.options.output_dir) / "best", state.options.validation_metric
    sign, best = -1 if METRICS[name].better == "lower" else 1, None
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError):  # of this run, or of before it was resumed
        best = json.loads((folder / CHECKPOINT_STATE).read_text())["metrics"].get(name)
    if metrics.get(name) is not None and (best is None or sign * metrics[name] > sign * best):
        save_checkpoint(folder, state, resumable=False, metrics=finite(metrics))
