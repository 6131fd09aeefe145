"""One table of optimizers: how each is built, its bytes a parameter, and how it takes a step.

torch is imported inside the functions, so that the command line can list the table without it.
"""

from functools import partial
from typing import Callable, NamedTuple


class Optimizer(NamedTuple):
    """One entry of the table."""

    build: Callable  # (parameter groups, lr=..., weight_decay=...) -> a torch optimizer
    step: Callable  # (optimizer, parameter groups, bad): one step, none where the device scalar `bad` is set
    bytes_per_parameter: float  # of its states
    package: str = ""  # what has to be installed for it, beside requirements.txt
    needs_cuda: bool = False
    max_grad_norm: float = 1.0  # the default; 0 frees each gradient once it is used


def build_adamw(groups, **options):
    import torch

    return torch.optim.AdamW(groups, fused=True, **options)


def build_adamw8bit(groups, **options):
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups, **options)


def step_fused(optimizer, groups, bad):
    """torch's fused optimizers look at `found_inf` on the device: the CPU never waits for the GPU."""
    all_groups, optimizer.param_groups = optimizer.param_groups, groups
    optimizer.found_inf = bad.float()
    optimizer.step()
    optimizer.param_groups = all_groups


def step_bitsandbytes(optimizer, groups, bad):
    """Calls the parts of bitsandbytes' step, because its own step() waits for the GPU after every tensor.

    What a bad step changed is put back on the device.
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


# AdamW keeps two fp32 numbers a parameter; in 8 bits two bytes, and two fp32 scales for every 256 parameters.
OPTIMIZERS = {
    "adamw": Optimizer(build_adamw, step_fused, bytes_per_parameter=8),
    "adamw8bit": Optimizer(build_adamw8bit, step_bitsandbytes, 2 + 8 / 256, "bitsandbytes", True, max_grad_norm=0.0),
}


def gradients_freed_early(options, num_processes):
    """Whether each gradient can be used and freed as soon as it is there: nothing needs all of them at once."""
    alone = options.gradient_accumulation_steps == num_processes == 1
    return alone and options.max_grad_norm == 0 and options.mixed_precision != "fp16"


def build_optimizer(options, parameters, each_alone=False):
    """The optimizer of --optimizer over `parameters`; each_alone: one parameter group for each of them."""
    groups = [{"params": [parameter]} for parameter in parameters] if each_alone else [{"params": list(parameters)}]
    build = OPTIMIZERS[options.optimizer].build
    return build(groups, lr=options.learning_rate, weight_decay=options.adam_weight_decay)


def step_in_backward(optimizer, step, bad):
    """Updates each parameter in the backward pass and frees its gradient at once, so that they are never all there.

    step: of the table. bad: a device scalar, set where a gradient was not finite; neither that parameter nor any after
    it changes then.
    """
    import torch

    def hook(parameter, group):
        torch.logical_or(bad, ~torch.isfinite(parameter.grad).all(), out=bad)
        step(optimizer, [group], bad)
        parameter.grad = None

    for group in optimizer.param_groups:
        group["params"][0].register_post_accumulate_grad_hook(partial(hook, group=group))


def optimizer_bytes(name, count):
    """Bytes that the states of the optimizer `name` take for `count` parameters."""
    return int(count * OPTIMIZERS[name].bytes_per_parameter)
