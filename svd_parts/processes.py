"""Several processes and signals: starting, stopping and ending together."""

import datetime
import gc
import os
import signal

import accelerate
import torch

from svd_parts.files import UserError

PATIENCE = datetime.timedelta(hours=12)  # the other processes wait while one validates


def build_accelerator(options, device):
    """Accelerate for devices, processes and fp16's scaler alone: nothing of its environment may change the result."""
    # fp16 needs accelerate's gradient scaler, but never its autocast: prepare_unet has cast what is to be cast.
    # Accumulation and dynamo's backend are given because it would take those of the environment.
    kinds = accelerate.utils
    chosen = {"mixed_precision": "fp16" if options.mixed_precision == "fp16" else "no", "dynamo_backend": "no"}
    chosen["gradient_accumulation_plugin"] = kinds.GradientAccumulationPlugin(num_steps=1)
    chosen["kwargs_handlers"] = [
        kinds.AutocastKwargs(enabled=False),
        kinds.DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        kinds.InitProcessGroupKwargs(timeout=PATIENCE),
    ]
    chosen |= {"log_with": options.report_to, "project_dir": options.output_dir}
    accelerator = accelerate.Accelerator(cpu=device.type == "cpu", **chosen)
    if accelerator.distributed_type.value not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        kind = accelerator.distributed_type.value
        raise UserError(f"accelerate is set up for {kind}, which is not supported; launch with --multi_gpu")
    return accelerator


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
