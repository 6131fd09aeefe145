"""The encoder of actions, and how its results reach the blocks of a stock UNet."""

import contextlib
import math

import torch
from safetensors.torch import load_file
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from svd_parts.actions import FOLDER, PREFIX, SETTINGS, WEIGHTS
from svd_parts.files import write_json
from svd_parts.weights import write_tensors

WIDTH = 128  # of the hidden layers: at 1024x576x25, 59 MB for a layer in half precision, which are not kept
WAVES = 4  # for each axis of the picture; the shortest is an eighth of it


class ActionEncoder(torch.nn.Module):
    """Actions -> what is added to the input of each block of the UNet, and to its time embedding.

    A vector that is added everywhere tells a convolution what happens, but hardly where: convolutions learn badly to
    turn numbers into places (CoordConv, arXiv:1807.03247). So the encoder is a small network of the action *and* of the
    place in the picture, which is given as waves (Fourier features, arXiv:2006.10739). All last layers begin at zero.
    """

    def __init__(self, count, config, generator=None):
        super().__init__()
        widths = config.block_out_channels
        inputs = (widths[0], *widths[:-1], widths[-1], widths[-1], *widths[:0:-1])  # down, middle, up
        self.action = begin(torch.nn.Linear(count, WIDTH), 3, generator)
        self.place = begin(torch.nn.Linear(2 + 4 * WAVES, WIDTH), 3, generator)
        self.hidden = begin(torch.nn.Linear(WIDTH, WIDTH), 1.7, generator)
        self.time = begin(torch.nn.Linear(WIDTH, 4 * widths[0]), 0, generator)
        self.maps = torch.nn.ModuleList(begin(torch.nn.Linear(WIDTH, channels), 0, generator) for channels in inputs)
        self.actions = self.keep = None  # of the forward passes: see `follow_actions`

    def add_to(self, block, temb, hidden_states):
        """temb (B * T, D), hidden_states (B * T, C, h, w) -> the same with what the actions (b, T, A) add.

        b is B, or half of it where guidance doubles the batch.
        """
        actions = self.actions.to(hidden_states).flatten(0, 1)  # (b * T, A)
        keep = torch.ones_like(actions[:, :1])
        if self.keep is not None:
            keep = self.keep.to(keep).repeat_interleave(self.actions.shape[1])[:, None]
        times = len(temb) // len(actions)
        more = keep * self.time(silu(self.action(actions)))
        places = picture_places(*hidden_states.shape[2:], hidden_states)
        maps = checkpoint(self.map, block, actions, places, use_reentrant=False, preserve_rng_state=False)
        maps = keep[:, :, None, None] * maps
        return temb + more.repeat(times, 1).to(temb), hidden_states + maps.repeat(times, 1, 1, 1)

    def map(self, block, actions, places):
        """(N, A), (h, w, features) -> (N, C, h, w). Computed again in the backward pass: it costs next to nothing."""
        hidden = silu(self.action(actions)[:, None, None] + self.place(places))
        return self.maps[block](silu(self.hidden(hidden))).permute(0, 3, 1, 2)


def begin(layer, spread, generator):
    """Random weights: inputs of size 1 give outputs of size `spread`, with random biases. Spread 0: all are zero."""
    start = torch.empty(layer.out_features, layer.in_features + 1).uniform_(-1, 1, generator=generator)
    layer.weight = torch.nn.Parameter(start[:, :-1] * spread / math.sqrt(layer.in_features))
    layer.bias = torch.nn.Parameter(start[:, -1] * min(spread, 1))
    return layer


def picture_places(h, w, like):
    """Where each of h * w places is in the picture, from -1 to 1, and as waves: (h, w, 2 + 4 * WAVES)."""
    y, x = (torch.linspace(-1, 1, size, device=like.device) for size in (h, w))
    places = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)
    waves = (places[..., None] * math.pi / 2 * 2 ** torch.arange(WAVES, device=like.device)).flatten(-2)
    return torch.cat([places, waves.sin(), waves.cos()], -1).to(like.dtype)


def add_encoder(unet, count, generator=None):
    """Gives a stock UNet an encoder of actions of `count` numbers, in place.

    Its output is at first bit for bit what it was. `follow_actions` sets the actions. generator: draws the
    first weights.
    """
    encoder = unet.actions = ActionEncoder(count, unet.config, generator)
    for index, block in enumerate((*unet.down_blocks, unet.mid_block, *unet.up_blocks)):

        def add(module, inputs, known, index=index):
            if encoder.actions is None:
                return None
            temb, hidden_states = encoder.add_to(index, known["temb"], known["hidden_states"])
            return inputs, {**known, "temb": temb, "hidden_states": hidden_states}

        block.register_forward_pre_hook(add, with_kwargs=True)
    return encoder


@contextlib.contextmanager
def follow_actions(unet, actions, keep=None):
    """While this lasts, the UNet's forward passes follow `actions`, (B, T, A), scaled. With None it works as the base.

    actions: an array or a tensor. keep: (B,), 0 where they are dropped. Recomputing
    activations is safe: a block is recomputed from the sums.
    """
    if actions is None:
        yield
        return
    encoder = getattr(unet, "module", unet).actions  # DDP wraps the UNet
    encoder.actions, encoder.keep = torch.as_tensor(actions), keep
    try:
        yield
    finally:
        encoder.actions = encoder.keep = None


# On disk


def split_actions(weights):
    """Trained tensors -> (those of the UNet, those of the encoder, by the encoder's own names)."""
    ours = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items() if name.startswith(PREFIX)}
    return {name: tensor for name, tensor in weights.items() if not name.startswith(PREFIX)}, ours


def save_encoder(folder, tensors, described):
    """Writes the encoder and what its numbers mean; plain diffusers passes over the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, {name: tensor.detach().cpu() for name, tensor in tensors.items()})
    write_json(folder / SETTINGS, described)


def load_action_encoder(unet, trained, folder):
    """Gives a UNet the encoder that is among the `trained` tensors of a checkpoint, or in the folder of a result.

    Does nothing where there is none.
    """
    tensors = split_actions(trained)[1]
    if not tensors and (folder / FOLDER / WEIGHTS).is_file():
        tensors = load_file(folder / FOLDER / WEIGHTS)
    if tensors:
        add_encoder(unet, tensors["action.weight"].shape[1]).load_state_dict(tensors)
