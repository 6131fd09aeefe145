"""The state of a training run: what is trained, and how one step changes it."""

import contextlib
import math
from pathlib import Path

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from svd_parts.checkpoints import checkpoint_step, checkpoints_of, save_checkpoint, unflatten_state
from svd_parts.files import lock_file, tidy
from svd_parts.optimizers import OPTIMIZERS, build_optimizer, gradients_freed_early, step_in_backward
from svd_parts.page import write_run_page
from svd_parts.unet import trained_parameters


class TrainingState:
    """What is trained and how: fp32 parameters, optimizer, schedule, average and scaler.

    A checkpoint holds all of it but the schedule, which follows from the step.

    unet: from `prepare_unet`, on its device. Call `self.unet`, which is wrapped where there are several processes.
    clips: {directory: fingerprint} of the training clips; a resumed run compares them.
    """

    def __init__(self, unet, options, accelerator, settings, clips):
        self.options, self.accelerator, self.settings, self.clips = options, accelerator, settings, clips
        self.bare_unet, self.trained, self.steps = unet, trained_parameters(unet), 0
        self.take_step = OPTIMIZERS[options.optimizer].step
        self.freed_early = gradients_freed_early(options, accelerator.num_processes)
        self.optimizer = build_optimizer(options, self.trained, self.freed_early)
        steps = {"num_warmup_steps": options.lr_warmup_steps, "num_training_steps": options.max_train_steps}
        self.lr_scheduler = get_scheduler(options.lr_scheduler, self.optimizer, **steps)
        self.ema = EMAModel(self.trained.values(), decay=options.ema_decay) if options.use_ema else None
        self.unet, self.scaled_optimizer = accelerator.prepare(unet, self.optimizer)
        unet.__dict__.pop("forward", None)  # accelerate's, for fp16: its fp32 outputs would break the stock pipeline
        self.scaler = accelerator.scaler
        # A loss or gradient that is not finite sets `bad`, on the device: reading it at every step would stall the GPU.
        # From then on no step changes the weights or the average.
        self.bad = torch.zeros((), dtype=torch.bool, device=accelerator.device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=accelerator.device)  # the first bad step, or -1
        self.consistent = True  # False while a backward pass updates one parameter after the other
        if self.freed_early:
            step_in_backward(self.optimizer, self.take_step, self.bad)

    def load(self, folder, saved):
        """Loads a checkpoint's weights, optimizer, average and scaler, and moves the schedule to its step."""
        for name, tensor in load_file(folder / "trained.safetensors").items():
            self.trained[name].data.copy_(tensor)
        unflatten_state(self.optimizer, self.trained, load_file(folder / "optimizer.safetensors"), saved["optimizer"])
        for _ in range(saved["step"]):
            self.lr_scheduler.step()
        if self.ema:
            average = load_file(folder / "ema.safetensors")
            self.ema.shadow_params = [average[name].to(self.accelerator.device) for name in self.trained]
        if self.scaler:
            self.scaler.load_state_dict(saved["scaler"])
        self.steps = saved["step"]

    def synchronized(self, last):
        """A context for one micro-batch: the processes exchange gradients only in the `last` one of a step."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.unet)

    def backward(self, loss):
        """Adds the gradients of `loss`. With gradients that are freed early, this also updates the parameters."""
        bad = ~torch.isfinite(loss.detach())
        if self.scaler and self.accelerator.num_processes > 1:  # with fp16 no gradient norm tells them
            bad = self.accelerator.reduce(bad.float()) > 0
        torch.logical_or(self.bad, bad, out=self.bad)
        self.consistent = not self.freed_early
        self.accelerator.backward(loss)

    def update(self, check):
        """Takes one optimizer step with the gradients that `backward` made.

        check: wait for the GPU and return False if a loss or gradient was not finite, or if fp16 overflows.
        """
        if not self.freed_early:
            norm = self.accelerator.clip_grad_norm_(self.trained.values(), self.options.max_grad_norm or math.inf)
            if not self.scaler:  # fp16's scaler skips a step that overflows by itself
                torch.logical_or(self.bad, ~torch.isfinite(norm), out=self.bad)
            self.grad_norm = norm
        self.bad_step = torch.where(self.bad & (self.bad_step < 0), self.steps, self.bad_step)
        if self.scaler:
            self.scaled_optimizer.step()
        elif not self.freed_early:
            self.take_step(self.optimizer, self.optimizer.param_groups, self.bad)
        self.optimizer.zero_grad(set_to_none=True)
        self.consistent = True
        if check and (self.is_bad() or self.overflows()):
            return False
        self.lr_scheduler.step()
        if self.ema:  # diffusers' step() would copy all weights for a moment, and would average a bad step in
            weight = ~self.bad * (1 - self.ema.get_decay(self.steps + 1))
            averages, weights = self.ema.shadow_params, [p.data for p in self.trained.values()]
            torch._foreach_lerp_(averages, weights, [weight] * len(weights))
        self.steps += 1
        return True

    def is_bad(self):
        """Whether any step was bad; waits for the GPU. If so, `self.steps` goes back to the last good step."""
        bad_step = self.bad_step.item()
        if bad_step >= 0:
            self.steps = bad_step
        return bad_step >= 0

    def overflows(self):
        """Whether fp16's scale has fallen so low that every step is skipped; waits for the GPU."""
        return bool(self.scaler) and self.scaler.get_scale() < 2**-14

    def save(self):
        """Writes `checkpoint-<steps>/`, then removes the oldest beyond --checkpoints_total_limit.

        After an error any process may call this, since all hold the same state. The lock admits one at a time.
        """
        self.is_bad()
        if self.steps:
            output = Path(self.options.output_dir)
            with lock_file(output / ".saving", busy=None):
                if not (output / f"checkpoint-{self.steps}").exists():
                    save_checkpoint(output / f"checkpoint-{self.steps}", self)
                self.prune()
            write_run_page(output, self.settings)

    def prune(self):
        """Removes the oldest checkpoints beyond --checkpoints_total_limit."""
        done = [path for path in checkpoints_of(self.options.output_dir) if checkpoint_step(path) <= self.steps]
        tidy(done[: -self.options.checkpoints_total_limit])
