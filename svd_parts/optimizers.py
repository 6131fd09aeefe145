"""The table of optimizers: how each is built, how it takes a step, and how many bytes a parameter it needs.

torch is imported inside the functions, so that the command line can list the table without loading torch.
"""

from functools import partial
from typing import Callable, NamedTuple

from svd_parts.actions import PREFIX


class Optimizer(NamedTuple):
    """One entry of the table."""

    build: Callable  # (parameter groups, lr=..., weight_decay=...) -> a torch optimizer
    step: Callable  # (optimizer, parameter groups, bad): takes a step, unless the device scalar `bad` is True
    bytes_per_parameter: float  # of the optimizer's states
    package: str = ""  # a package that it needs beside those in requirements.txt
    needs_cuda: bool = False
    max_grad_norm: float = 1.0  # default of --max_grad_norm; 0 frees each gradient once it is used


def build_adamw(groups, **options):
    import torch

    return torch.optim.AdamW(groups, fused=True, **options)


def build_adamw8bit(groups, **options):
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups, **options)


def step_fused(optimizer, groups, bad):
    """One step of a fused torch optimizer. It reads `found_inf` on the device, so the CPU never waits for the GPU."""
    all_groups, optimizer.param_groups = optimizer.param_groups, groups
    optimizer.found_inf = bad.float()
    optimizer.step()
    optimizer.param_groups = all_groups


def step_bitsandbytes(optimizer, groups, bad):
    """One step of a bitsandbytes optimizer, part by part: its own step() waits for the GPU after every tensor.

    If the step is bad, the old values are put back, on the device.
    """
    import torch

    for group in groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                optimizer.init_state(group, parameter, 0, 0)
            changing = [parameter.data, *(state[name] for name in state if name.startswith(("state", "absmax")))]
            before = [value.clone() for value in changing]
            optimizer.update_step(group, parameter, 0, 0)
            for value, old in zip(changing, before):
                value.copy_(torch.where(bad, old, value))


# AdamW keeps two fp32 numbers a parameter; its 8-bit form two bytes, and two fp32 scales for every 256 parameters.
OPTIMIZERS = {
    "adamw": Optimizer(build_adamw, step_fused, bytes_per_parameter=8),
    "adamw8bit": Optimizer(build_adamw8bit, step_bitsandbytes, 2 + 8 / 256, "bitsandbytes", True, max_grad_norm=0.0),
}


def gradients_freed_early(options, num_processes):
    """Whether each gradient can be used and freed in the backward pass, as nothing needs all of them together."""
    alone = options.gradient_accumulation_steps == num_processes == 1
    return alone and options.max_grad_norm == 0 and options.mixed_precision != "fp16"


def build_optimizer(options, trained, each_alone=False):
    """Builds the optimizer of --optimizer for `trained`, {name: parameter}. each_alone: each one in its own group."""
    groups = {}
    for name, parameter in trained.items():
        rate = options.action_learning_rate if name.startswith(PREFIX) else options.learning_rate
        group = groups.setdefault(name if each_alone else rate, {"params": [], "lr": rate})
        group["params"].append(parameter)
    groups = list(groups.values())
    build = OPTIMIZERS[options.optimizer].build
    return build(groups, lr=options.learning_rate, weight_decay=options.adam_weight_decay)


def step_in_backward(optimizer, step, bad):
    """Lets the backward pass update each parameter and free its gradient at once, so that few gradients exist together.

    step: `Optimizer.step` of the table. bad: a device scalar, set when a gradient is not finite; from then on no
    parameter changes.
    """
    import torch

    def hook(parameter, group):
        torch.logical_or(bad, ~torch.isfinite(parameter.grad).all(), out=bad)
        step(optimizer, [group], bad)
        parameter.grad = None

    for group in optimizer.param_groups:
        group["params"][0].register_post_accumulate_grad_hook(partial(hook, group=group))


def optimizer_bytes(name, count):
    """The bytes of the states of the optimizer `name` for `count` parameters."""
    return int(count * OPTIMIZERS[name].bytes_per_parameter)
