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
    """An Accelerator for the device, the processes and fp16's gradient scaler; its environment changes no result."""
    # Autocast stays off, as `prepare_unet` does all casts. Accumulation and dynamo's backend are set here, since
    # accelerate would read them from the environment.
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
    """Ends all processes together, as the others would wait for one that is gone."""
    accelerator = state.accelerator
    accelerator.wait_for_everyone()
    # DDP's wrapper must go before the process group. If the wrapper held the group's last reference, it would wait for
    # the group's threads while it holds the GIL, and they would wait for the GIL: a deadlock, seen on one busy core.
    state.unet = None
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


class StopSignal:
    """Makes SIGINT, SIGTERM, SIGHUP (a closed terminal) and SIGUSR1 (Slurm) ask for a stop after the current step.

    A second Ctrl-C stops at once. Signals that nohup has set to be ignored stay ignored.
    """

    def __init__(self, accelerator):
        self.signal, self.launcher, self.group = 0, os.getppid(), None
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows has the first two
            ignored = number and name in ("SIGHUP", "SIGUSR1") and signal.getsignal(number) == signal.SIG_IGN
            if number and not ignored:
                signal.signal(number, self.receive)
        if accelerator.num_processes > 1:  # a group on the CPU, so that asking the others stalls no GPU
            self.group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

    def receive(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # SIGTERM stays, as launchers send it twice

    def requested(self, failure):
        """A received signal's number, or 0, or -1 if another process failed: the same answer on every process."""
        if not self.group:
            return self.signal
        if os.getppid() != self.launcher:  # the launcher was killed, and would no longer end this run
            self.signal = self.signal or signal.SIGTERM
        answer = torch.tensor([self.signal, failure is not None])
        torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MAX, self.group)
        received, failed = answer.tolist()
        return received or -failed
