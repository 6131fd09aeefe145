"""Validation: generates held-out clips and scores them, to show whether the model is learning."""

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

import svd_common as common
from svd_parts.action_encoder import follow_actions
from svd_parts.checkpoints import read_best, save_checkpoint
from svd_parts.console import progress_bar
from svd_parts.files import UserError, counted, name_digest, plain_name, tidy
from svd_parts.latent_cache import frames_to_decode, read_cached
from svd_parts.metrics import METRICS, finite, mean_scores, read_metrics, table_metrics, video_metrics
from svd_parts.objective import random_generator, training_loss
from svd_parts.samples import ClipDataset
from svd_parts.unet import compute_dtype

VALIDATION_SIGMAS = (0.1, 0.5, 2.0, 10.0, 100.0)  # 8 of 25 inference steps have a sigma over 80


class Stopped(Exception):
    """A stop signal was received during a validation."""


class Validation:
    """Scores the current model on held-out clips. It has its own random generators, so the training is not changed.

    vae: the run's VAE, on the GPU; `decoder` stays on the CPU until latents are decoded. CLIP is not needed, since the
    cache holds the embedding of each first frame.
    """

    def __init__(self, options, base, clips, vae, decoder):
        self.options, self.clips, self.vae, self.decoder = options, clips, vae, decoder
        self.weight_dtype = compute_dtype(options.mixed_precision)
        self.dataset = ClipDataset(clips, options, vae.config, cached=True)
        parts = {part: common.load_part(base, part, None) for part in ("scheduler", "feature_extractor")}
        self.pipe = StableVideoDiffusionPipeline(unet=None, vae=vae, image_encoder=None, **parts)
        self.pipe.set_progress_bar_config(disable=True)
        self.header_shown = False

    def __call__(self, state, log, stop):
        """Scores the current weights, keeps them in `best/` if no step was better, and writes and prints the scores.

        A signal that `stop` received ends the validation within seconds. If it fails, it says why and the run goes on.
        """
        start, metrics = time.perf_counter(), {}
        try:
            metrics = self.score(state, stop)
        except Stopped:
            tqdm.write("the validation was stopped; a resumed run does it again")
        except (RuntimeError, OSError, SafetensorError, UserError) as error:  # RuntimeError: out of memory
            tqdm.write(f"validation failed and was left out; training goes on ({str(error).splitlines()[0]})")
        if metrics:
            is_best = keep_best(metrics, state)  # before the log: a run killed in between validates again
            seconds = time.perf_counter() - start
            log.scores(metrics, seconds)
            self.report(metrics, state, seconds, is_best)
        log.start(state.steps)

    def losses(self, unet, device, stop):
        """The mean v loss at each noise level, on the first window of every clip, always with the same noise."""
        sums = dict.fromkeys(VALIDATION_SIGMAS, 0.0)
        for place, clip in enumerate(self.clips):
            sample = self.dataset.sample(clip, 0, random_generator("validation", place))
            batch = {name: value[None].to(device) for name, value in sample.items()}
            batch |= {name: torch.ones_like(batch[name]) for name in ("keep", "keep_actions") if name in batch}
            for sigma in VALIDATION_SIGMAS:
                raise_if_stopped(stop)
                batch["sigmas"] = torch.full_like(batch["sigmas"], sigma)
                loss, _ = training_loss(unet, self.vae, batch, self.weight_dtype)
                sums[sigma] += loss.item() / len(self.clips)
        by_sigma = {f"loss_v_sigma_{sigma:g}": value for sigma, value in sums.items()}
        return {**by_sigma, "loss_v": sum(sums.values()) / len(sums)}

    def generate(self, clip, device, stop):
        """Generates from the clip's first frame with the stock pipeline: (T, H, W, 3) uint8, the first frame included.

        T is --num_frames; fps and motion are the clip's. The noise is always the same.
        """
        options, pipe = self.options, self.pipe
        first = common.read_frames(clip["frames"][:1], options.width, options.height)[0]
        embedding = read_cached(clip["cache"], 0, 1)[2][None].to(device, self.weight_dtype)  # (1, 1, D)
        pipe._encode_image = lambda *_: torch.cat([torch.zeros_like(embedding), embedding])
        actions = clip["scaled_actions"][None, : options.num_frames] if options.condition_on else None
        with follow_actions(pipe.unet, actions):
            latents = pipe(
                Image.fromarray(first), width=options.width, height=options.height, num_frames=options.num_frames,
                fps=round(clip["fps"]), motion_bucket_id=clip["motion_bucket_id"], output_type="latent",
                num_inference_steps=options.validation_inference_steps,
                generator=torch.Generator().manual_seed(0), callback_on_step_end=lambda *_: raise_if_stopped(stop),
            ).frames  # fmt: skip
        self.vae.decoder = self.decoder.to(device)
        try:
            frames = pipe.decode_latents(latents.float(), options.num_frames, frames_to_decode(options))
        finally:
            self.vae.decoder = None
            self.decoder.to("cpu")
        return (pipe.video_processor.postprocess_video(frames, "np")[0] * 255).round().astype(np.uint8)

    @torch.no_grad()
    def score(self, state, stop):
        """{metric: mean over the clips} of the state. Writes `validation/step-N/<clip>.mp4`, real and generated."""
        device, options = state.accelerator.device, self.options
        target = Path(options.output_dir) / "validation" / f"step-{state.steps:06d}"
        target.mkdir(parents=True, exist_ok=True)
        tidy(target.glob(".*.part"))  # of a killed run
        if state.ema:
            state.ema.store(state.trained.values())
            state.ema.copy_to(state.trained.values())
        try:
            self.pipe.unet = state.bare_unet
            scores, copied = [], []
            with progress_bar("validating", "clip", len(self.clips), leave=False) as progress:
                metrics = self.losses(state.bare_unet, device, stop)
                for clip in self.clips:
                    real = common.read_frames(clip["frames"][: options.num_frames], options.width, options.height)
                    generated = self.generate(clip, device, stop)
                    scores.append(video_metrics(generated, real))
                    copied.append(video_metrics(np.repeat(real[:1], len(real), axis=0), real))
                    sheet = common.side_by_side({"real": real, f"generated, step {state.steps}": generated})
                    name = clip["directory"].replace("/", "_")
                    name += f"+{name_digest(clip['directory'])}" if "/" in clip["directory"] else ""
                    common.write_video(target / f"{plain_name(name)}.mp4", sheet, clip["fps"])
                    progress.update()
            copied = {f"copied_{name}": value for name, value in mean_scores(copied).items()}
            return {**metrics, **mean_scores(scores), **copied}
        finally:
            torch.cuda.empty_cache()
            if state.ema:
                state.ema.restore(state.trained.values())

    def report(self, metrics, state, seconds, is_best):
        """Prints one line of scores; before the first one also a table of the copied first frame and the base."""
        base = next((line for line in read_metrics(self.options.output_dir) if line["step"] == 0), {})
        copied = {name.removeprefix("copied_"): v for name, v in metrics.items() if name.startswith("copied_")}
        base = {name.removeprefix("validation_"): value for name, value in base.items()}
        if not self.header_shown:
            self.header_shown, names = True, {"loss_v": METRICS["loss_v"].title, **table_metrics()}
            clips = counted(len(self.clips), "held-out clip")
            tqdm.write(f"{clips:22s}" + "".join(f"{title:>16s}" for title in names.values()))
            for label, row in {"first frame copied": copied, "step 0, the base": base}.items():
                cells = (f"{row[name]:.3f}" if row.get(name) is not None else "-" for name in names)
                tqdm.write(f"{label:22s}" + "".join(f"{cell:>16s}" for cell in cells))
        texts = []
        for name in ("psnr_moving", "loss_v", "motion_ratio", "flow_error"):
            if metrics.get(name) is not None:
                others = {"copied": copied.get(name), "base": base.get(name)} if name == "psnr_moving" else {}
                others = ", ".join(f"{label} {value:.1f}" for label, value in others.items() if value is not None)
                text = f"{METRICS[name].title} {metrics[name]:.3g} {METRICS[name].unit}".strip()
                texts.append(text + (f" ({others})" if others else ""))
        best = f"; best so far -> {Path(self.options.output_dir, 'best')}" if is_best else ""
        tqdm.write(f"step {state.steps}: {', '.join(texts)}; validated in {seconds:.0f} s{best}")
        if metrics.get("motion_ratio", 1.0) < 0.5:
            moves = f"generated video moves {metrics['motion_ratio']:.2f} times as much as the real one"
            cure = "Try --P_mean 1.0, fewer steps or a lower --learning_rate; check fps and motion in metadata.jsonl"
            tqdm.write(f"warning: {moves}. {cure}")


def raise_if_stopped(stop):
    """Raises `Stopped` once a stop signal was received. As a callback of the pipeline it returns no changes."""
    if stop.signal:
        raise Stopped
    return {}


def keep_best(metrics, state):
    """Saves the weights in `best/` if this step is the best by --validation_metric. Returns whether it is."""
    name = state.options.validation_metric
    sign, best = -1 if METRICS[name].better == "lower" else 1, read_best(state.options.output_dir)[1].get(name)
    is_best = metrics.get(name) is not None and (best is None or sign * metrics[name] > sign * best)
    if is_best:
        save_checkpoint(Path(state.options.output_dir) / "best", state, resumable=False, metrics=finite(metrics))
    return is_best
