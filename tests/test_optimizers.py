"""The table of optimizers: its steps, its bytes, and what a bad step leaves as it was."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from svd_parts.optimizers import OPTIMIZERS, Optimizer, build_optimizer, optimizer_bytes
from train_svd import build_parser

INSTALLED = [name for name, entry in OPTIMIZERS.items() if not entry.package or find_spec(entry.package)]


def test_a_bad_step_changes_neither_weights_nor_states_of_either_optimizer():
    """torch's fused AdamW by found_inf; bitsandbytes', where it is installed and knows CPUs, by putting back."""
    for name in INSTALLED:
        parameter = torch.nn.Parameter(torch.randn(8192, generator=torch.Generator().manual_seed(0)))
        optimizer = OPTIMIZERS[name].build([{"params": [parameter]}], lr=0.1)
        kept = []
        for bad, gradient in ((False, 1.0), (True, float("nan"))):
            parameter.grad = torch.full_like(parameter, gradient)
            OPTIMIZERS[name].step(optimizer, optimizer.param_groups, torch.tensor(bad))
            kept.append([parameter.detach().clone()])
            kept[-1] += [value.clone() for value in optimizer.state[parameter].values() if torch.is_tensor(value)]
        assert all(torch.equal(before, after) for before, after in zip(*kept)), name


def test_states_have_the_bytes_of_the_table():
    parameter = torch.nn.Parameter(torch.zeros(4096))
    optimizer = OPTIMIZERS["adamw"].build([{"params": [parameter]}], lr=0.1)
    parameter.grad = torch.ones(4096)
    OPTIMIZERS["adamw"].step(optimizer, optimizer.param_groups, torch.tensor(False))
    held = sum(value.nbytes for value in optimizer.state[parameter].values() if value.numel() > 1)
    assert held == optimizer_bytes("adamw", 4096)


@pytest.mark.parametrize("each_alone", [False, True])
def test_the_encoder_of_actions_has_its_own_learning_rate(each_alone):
    trained = {name: torch.nn.Parameter(torch.zeros(2)) for name in ("conv_in.weight", "actions.time.bias", "mid.bias")}
    options = SimpleNamespace(optimizer="adamw", learning_rate=1e-5, action_learning_rate=1e-3, adam_weight_decay=0)
    optimizer = build_optimizer(options, trained, each_alone)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert [rates[id(parameter)] for parameter in trained.values()] == [1e-5, 1e-3, 1e-5]
    assert len(optimizer.param_groups) == (3 if each_alone else 2)


def test_a_new_optimizer_is_one_entry(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "sgd", Optimizer(torch.optim.SGD, None, bytes_per_parameter=0))
    [action] = [action for action in build_parser()._actions if action.dest == "optimizer"]
    assert "sgd" in action.choices and optimizer_bytes("sgd", 100) == 0
    with pytest.raises(KeyError):
        optimizer_bytes("unknown", 1)
