"""state.py: what a bad step leaves as it was."""

import pytest
import torch
from accelerate import Accelerator
from conftest import TINY, train_arguments

import svd_common as common
import train_svd
from svd_parts.checkpoints import checkpoints_of
from svd_parts.state import TrainingState
from svd_parts.unet import prepare_unet


def make_state(tmp_path, *flags):
    options = train_svd.parse_args([*map(str, train_arguments(tmp_path, tmp_path / "out")), *flags])
    (tmp_path / "out").mkdir()
    unet = prepare_unet(common.load_part(TINY, "unet", torch.float32), "temporal", torch.float32, "none")
    return TrainingState(unet, options, Accelerator(cpu=True), {}, {})


def test_the_average_does_not_take_a_bad_step_in_and_the_checkpoint_is_that_of_the_step_before(tmp_path):
    """Nobody looks for two steps: neither the weights nor the average nor the number of steps may show the bad one."""
    state = make_state(tmp_path, "--use_ema", "--ema_decay", "0.5")
    for factor in (1.0, 1.0, float("nan"), 1.0):
        for place, parameter in enumerate(state.trained.values()):
            parameter.grad = torch.full_like(parameter, factor * (-1) ** place)
        assert state.update(check=False)
        if state.steps == 2:
            kept = [value.clone() for value in (*state.ema.shadow_params, *(p.data for p in state.trained.values()))]
    assert state.steps == 4
    now = [*state.ema.shadow_params, *(p.data for p in state.trained.values())]
    assert all(torch.equal(before, after) for before, after in zip(kept, now))
    state.save()
    assert state.steps == 2 and [path.name for path in checkpoints_of(tmp_path / "out")] == ["checkpoint-2"]
    assert not state.update(check=True)


def test_the_process_that_fails_saves_and_an_old_checkpoint_that_cannot_go_is_no_reason_to_stop(tmp_path, capsys):
    state = make_state(tmp_path, "--checkpoints_total_limit", "1")
    (tmp_path / "out" / "checkpoint-1").mkdir()
    (tmp_path / "out" / ".checkpoint-1.gone" / "busy").mkdir(parents=True)  # where it would have to go to
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "checkpoint-2").symlink_to(tmp_path / "elsewhere")
    state.steps, state.accelerator = 3, None  # whichever process this is
    with pytest.raises(RuntimeError, match="out of memory"), train_svd.saved_on_error(state):
        raise RuntimeError("out of memory")
    assert [path.name for path in checkpoints_of(tmp_path / "out")] == ["checkpoint-1", "checkpoint-3"]
    assert (tmp_path / "out" / "checkpoint-3" / "training_state.json").exists() and (tmp_path / "elsewhere").exists()
    printed = capsys.readouterr().err
    assert "checkpoint-1: cannot be removed" in printed and "saved: the 3 steps before this error" in printed
