"""Actions: the encoder on the stock UNet, its numbers, training that follows them, and generating by them."""

import numpy as np
import pytest
import torch
from conftest import TINY

import svd_common as common
from svd_parts import actions as acts
from svd_parts.files import UserError
from svd_parts.objective import random_generator
from svd_parts.unet import prepare_unet, trained_parameters


@pytest.fixture(scope="module")
def inputs():
    generator = random_generator("actions test")
    return {
        "sample": torch.randn(2, 8, 8, 16, 24, generator=generator),
        "timestep": torch.tensor([0.3, -0.2]),
        "encoder_hidden_states": torch.randn(2, 1, 32, generator=generator),
        "added_time_ids": torch.tensor([[3.0, 100.0, 0.05]] * 2),
    }


def small_unet(count=3, trained=True, checkpointing="none", trainable="temporal"):
    """The tiny checkpoint's UNet with an encoder, whose last layer is not zero any more where it is `trained`."""
    unet = common.load_part(TINY, "unet", torch.float32)
    encoder = acts.add_encoder(unet, count, random_generator("encoder"))
    if trained:
        torch.nn.init.normal_(encoder[2].weight, std=0.1, generator=random_generator("last"))
    return prepare_unet(unet, trainable, torch.float32, checkpointing)


def some_actions(seed=0, batch=2):
    return torch.randn(batch, 8, 3, generator=random_generator("actions", seed))


@torch.no_grad()
def test_before_training_the_output_is_bit_for_bit_the_stock_models(inputs):
    stock = common.load_part(TINY, "unet", torch.float32)(**inputs).sample
    unet = common.load_part(TINY, "unet", torch.float32)
    acts.add_encoder(unet, 3, random_generator("encoder"))
    with acts.acting(unet, some_actions()):
        assert torch.equal(unet(**inputs).sample, stock)
    assert torch.equal(unet(**inputs).sample, stock)


@torch.no_grad()
def test_a_frames_action_changes_that_frame_most(inputs):
    unet, actions = small_unet(), some_actions()
    with acts.acting(unet, actions):
        before = unet(**inputs).sample
    for frame in (0, 3, 7):
        changed = actions.clone()
        changed[:, frame] += 1
        with acts.acting(unet, changed):
            change = (unet(**inputs).sample - before).abs().mean((0, 2, 3, 4))
        assert change.argmax() == frame and change[frame] > 0, change


@torch.no_grad()
def test_dropped_actions_are_the_stock_model_and_samples_keep_their_own(inputs):
    unet, actions = small_unet(), some_actions()
    stock = unet(**inputs).sample
    with acts.acting(unet, actions, torch.tensor([1.0, 0.0])):
        mixed = unet(**inputs).sample
    assert torch.equal(mixed[1], stock[1]) and not torch.equal(mixed[0], stock[0])
    with acts.acting(unet, actions[:1]):  # guidance: one clip's actions for both of its samples
        both = unet(**inputs).sample
    with acts.acting(unet, actions[:1].expand(2, -1, -1)):
        assert torch.equal(unet(**inputs).sample, both)


@pytest.mark.parametrize("checkpointing", ["transformers", "full"])
def test_recomputation_gives_the_same_gradients(inputs, checkpointing):
    gradients = []
    for mode in ("none", checkpointing):
        unet = small_unet(checkpointing=mode)
        with acts.acting(unet, some_actions(), torch.tensor([1.0, 1.0])):
            out = unet(**inputs).sample
        out.square().mean().backward()  # when the actions are no longer set
        gradients.append({name: p.grad for name, p in trained_parameters(unet).items()})
    assert gradients[0].keys() == gradients[1].keys()
    assert {name for name in gradients[0] if name.startswith(acts.PREFIX)} == {
        f"actions.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-8)
    assert gradients[0]["actions.2.weight"].abs().sum() > 0


@torch.no_grad()
def test_low_vram_takes_guidances_samples_one_by_one_with_their_actions(inputs):
    from svd_parts.shortcuts import save_memory

    unet = small_unet()
    inputs = {**inputs, "timestep": torch.tensor(0.3)}
    with acts.acting(unet, some_actions(batch=1)):
        at_once = unet(**inputs).sample
        save_memory(unet)
        torch.testing.assert_close(unet(**inputs)[0], at_once, rtol=1e-4, atol=1e-5)


def test_scaling_puts_the_percentiles_at_one_and_a_constant_at_zero():
    rows = np.stack([np.linspace(0, 100, 101), np.full(101, 5.0)], 1)
    described = acts.describe_actions([{"actions": rows, "action_names": ["x", "y"]}])
    assert described == {"count": 2, "names": ["x", "y"], "low": [1, 5], "high": [99, 5]}
    scaled = acts.scale_actions(rows, described)
    torch.testing.assert_close(scaled[[1, 50, 99], 0], torch.tensor([-1.0, 0, 1]))
    assert (scaled[:, 1] == 0).all() and scaled.dtype == torch.float32


def test_files_of_actions(tmp_path):
    table = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.save(tmp_path / "a.npy", table)
    (tmp_path / "a.csv").write_text("0,1\n2,3\n4,5\n")
    (tmp_path / "named.csv").write_text("x,y\n0,1\n2,3\n4,5\n")
    for name in ("a.npy", "a.csv", "named.csv"):
        assert np.array_equal(acts.read_actions(tmp_path / name), table)
    np.save(tmp_path / "flat.npy", table.ravel())
    np.save(tmp_path / "nan.npy", np.where(table == 3, np.nan, table))
    np.save(tmp_path / "text.npy", np.array([["a"]]))
    (tmp_path / "bad.csv").write_text("x,y\n1,2\n1\n")
    (tmp_path / "damaged.npy").write_bytes(b"\x93NUMPY")
    for name, said in {
        "flat.npy": "shape", "nan.npy": "row 1, column 1 is nan", "text.npy": "no table", "bad.csv": "no table",
        "damaged.npy": "no table", "none.npy": "no such file",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=said) as raised:
            acts.read_actions(tmp_path / name)
        assert name in str(raised.value) and "\n" not in str(raised.value)


def test_actions_are_checked_against_what_the_model_knows(capsys):
    described = {"count": 2, "names": ["x", "grip"], "low": [0, 0], "high": [1, 0]}
    acts.check_actions(np.array([[0.5, 0], [1.2, 0]]), described, "a.npy")
    assert capsys.readouterr().out == ""
    acts.check_actions(np.array([[0.5, 0], [30, 0]]), described, "a.npy")
    assert "x is 0.5 to 30; the model was trained on 0 to 1" in capsys.readouterr().out
    acts.check_actions(np.array([[0.5, 1]]), described, "a.npy")
    assert "grip is 1 to 1" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"3 columns.*2 \(x, grip\)"):
        acts.check_actions(np.zeros((4, 3)), described, "a.npy")


def test_an_encoder_comes_back_from_its_folder(tmp_path, inputs):
    unet, described = small_unet(), {"count": 3, "names": None, "low": [0.0] * 3, "high": [1.0] * 3}
    weights, encoder = acts.split_actions({name: p.data for name, p in unet.named_parameters()})
    assert len(encoder) == 4 and not any(name.startswith(acts.PREFIX) for name in weights)
    acts.save_encoder(tmp_path, encoder, described)
    other = common.load_part(TINY, "unet", torch.float32)
    assert acts.load_encoder(other, tmp_path) == described
    with torch.no_grad(), acts.acting(unet, some_actions()), acts.acting(other, some_actions()):
        assert torch.equal(unet(**inputs).sample, other(**inputs).sample)
