"""The log of a training run: the progress bar, metrics.jsonl and trackers."""

import contextlib
import io
import json
import time
from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import svd_common as common
from svd_parts.console import progress_bar
from svd_parts.files import UserError, printable, write_file
from svd_parts.metrics import finite, read_metrics
from svd_parts.page import write_run_page

PAGE_EVERY = 60  # seconds between two updates of the run's page, which reloads itself as often


def start_trackers(options, accelerator, step):
    """Starts the tracker of --report_to. Raises a `UserError` with the cure if that fails.

    step: where the run begins. TensorBoard then drops what a killed run wrote beyond this step.
    """
    if options.report_to:
        simple = {name: value for name, value in options._asdict().items() if isinstance(value, (int, float, str))}
        again = {"tensorboard": {"purge_step": step + 1 if step else 0}} if options.resume_from_checkpoint else {}
        try:
            accelerator.init_trackers("svd", simple, again)
        except Exception as error:  # each tracker has its own kinds
            cure = "run `wandb login`, or set WANDB_MODE=offline" if options.report_to == "wandb" else "or leave it out"
            why = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"--report_to {options.report_to}: cannot be started ({why[0]}); {cure}") from None


def is_validated(options, step):
    return step == options.max_train_steps or step % options.validation_steps == 0


class Log:
    """Writes the progress bar, metrics.jsonl and --report_to. Reads values from the GPU only when it writes a line."""

    def __init__(self, state):
        self.state, self.accelerator, options = state, state.accelerator, state.options
        self.path, lines = Path(options.output_dir) / "metrics.jsonl", []
        if self.accelerator.is_main_process:  # drops lines after the checkpoint: the resumed run writes them again
            lines = [line for line in read_metrics(options.output_dir) if line["step"] <= state.steps and state.steps]
            write_file(self.path, "".join(json.dumps(line) + "\n" for line in lines))
            write_run_page(self.path.parent, state.settings)
        self.page_written, self.shown, self.seconds_per_step = time.monotonic(), {}, 0.0
        known = (line.get("seconds_of_validation") for line in reversed(lines))
        self.seconds_of_validation = next(filter(None, known), 0.0)
        self.progress = progress_bar("training", "step", options.max_train_steps, left=False, initial=state.steps,
            disable=not self.accelerator.is_main_process)  # fmt: skip
        self.start(state.steps)

    def start(self, step):
        """Begins to measure for the next line, after step `step`."""
        self.values, self.waited, self.since, self.step = defaultdict(list), 0.0, time.perf_counter(), step
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    @contextlib.contextmanager
    def waiting(self):
        """A context whose time counts as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def add(self, values):
        """Adds scalars on the device, {name: scalar}. The next line holds their means."""
        for name, value in values.items():
            self.values[name].append(value)

    def step_done(self, step, write):
        """Counts a step; with `write`, also writes a line."""
        if not self.state.freed_early:
            self.add({"grad_norm": self.state.grad_norm})
        if write:
            self.write(step)
        self.progress.update()

    def write(self, step):
        """Writes a line with the means since the last line, speed, time left and GPU memory."""
        reduce, elapsed = self.accelerator.reduce, time.perf_counter() - self.since
        means = {name: reduce(sum(given) / len(given), "mean").item() for name, given in self.values.items()}
        line = {"step": step, **means, "learning_rate": self.state.lr_scheduler.get_last_lr()[0]}
        line["seconds_per_step"] = round(elapsed / (step - self.step), 4)
        line["data_wait_share"] = round(self.waited / elapsed, 4)
        line["seconds_left"] = round(self.seconds_left(step, elapsed / (step - self.step)))
        shown = {"loss": f"{means['loss_v']:.4f}", "lr": f"{line['learning_rate']:.1e}"}
        self.shown, self.seconds_per_step = shown, elapsed / (step - self.step)
        if self.accelerator.device.type == "cuda":
            line["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            line["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
            shown["mem"] = f"{line['peak_memory_gib']:.1f}G"
        self.append(line)
        self.show_left(line["seconds_left"])
        self.start(step)

    def show_left(self, seconds):
        self.progress.set_postfix({**self.shown, "left": tqdm.format_interval(seconds)}, refresh=False)

    def seconds_left(self, step, seconds_per_step, validated=False):
        """Seconds until the run ends, if each further validation takes as long as the last one did.

        validated: whether the validation of this step is over.
        """
        last, every = self.state.options.max_train_steps, self.state.options.validation_steps
        first = step + validated
        validations = last // every - (first - 1) // every + bool(last % every and first <= last)
        return (last - step) * seconds_per_step + validations * self.seconds_of_validation

    def append(self, line):
        """Adds a line of numbers, {name: number} with "step", to metrics.jsonl and to --report_to."""
        line = finite(line)
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
            if time.monotonic() - self.page_written > PAGE_EVERY:
                write_run_page(self.path.parent, self.state.settings)
                self.page_written = time.monotonic()
        numbers = {name: value for name, value in line.items() if name != "step" and value is not None}
        self.accelerator.log(numbers, step=line["step"])

    def scores(self, metrics, seconds):
        """Writes the scores of a validation, its videos, and how many seconds it took."""
        self.seconds_of_validation = round(seconds, 1)
        scores = {f"validation_{name}": value for name, value in metrics.items()}
        self.append({"step": self.state.steps, **scores, "seconds_of_validation": self.seconds_of_validation})
        if self.shown:  # not before the first step
            self.show_left(self.seconds_left(self.state.steps, self.seconds_per_step, validated=True))
        self.send_videos()
        write_run_page(self.path.parent, self.state.settings)

    def has_scores(self, step):
        return any(line["step"] == step and "validation_loss_v" in line for line in read_metrics(self.path.parent))

    def send_videos(self):
        """Sends the side-by-side videos of a validation to --report_to."""
        step, kind = self.state.steps, self.state.options.report_to
        for path in sorted(self.path.parent.glob(f"validation/step-{step:06d}/*.mp4")) if kind else ():
            tracker, name = self.accelerator.get_tracker(kind, unwrap=True), printable(path.stem)
            if kind == "wandb":
                import wandb

                tracker.log({name: wandb.Video(str(path), format="mp4")}, step=step)
            else:  # TensorBoard's page plays GIFs; torch's add_video would need moviepy 1
                from tensorboard.compat.proto.summary_pb2 import Summary

                frames, data = [Image.fromarray(frame) for frame in common.read_video(path)], io.BytesIO()
                frames[0].save(data, "gif", save_all=True, append_images=frames[1:], duration=250, loop=0)
                width, height = frames[0].size
                image = Summary.Image(width=width, height=height, encoded_image_string=data.getvalue())
                tracker.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
