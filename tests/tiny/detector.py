"""Finds the fingertip in a picture: a small CNN that learns from real frames where it is, in metres.

`make actions` measures with it, `make proof` labels videos with a smaller one.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

PLACES = 16  # features, each found somewhere in the picture


class Detector(nn.Module):
    """(B, 3, 64, 96) in [0, 1] -> (B, 3), by where in the picture a few features lie and how they look there.

    widths: channels of the first, the second, and the last two layers.
    """

    def __init__(self, widths=(24, 48, 64)):
        super().__init__()
        a, b, c = widths
        self.features = nn.Sequential(
            nn.Conv2d(3, a, 5, 2, 2), nn.ReLU(), nn.Conv2d(a, b, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(b, c, 3, 1, 1), nn.ReLU(), nn.Conv2d(c, c, 3, 1, 2, dilation=2), nn.ReLU(),
        )  # fmt: skip
        self.places = nn.Conv2d(c, PLACES, 1)
        self.head = nn.Sequential(nn.Linear(2 * PLACES + c * 12, 128), nn.ReLU(), nn.Linear(128, 3))

    def forward(self, frames):
        features = self.features(frames - 0.5)  # (B, c, 16, 24)
        height, width = features.shape[2:]
        weights = (3 * F.instance_norm(self.places(features))).flatten(2).softmax(2).unflatten(2, (height, width))
        x = weights.sum(2) @ torch.linspace(-1, 1, width)
        y = weights.sum(3) @ torch.linspace(-1, 1, height)
        coarse = F.adaptive_avg_pool2d(features, (3, 4)).flatten(1)
        return self.head(torch.cat([x, y, coarse], 1))


def to_tensor(frames):
    """(..., H, W, 3) uint8 -> (..., 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3).float() / 255


def train_detector(path, frames, places, steps=2500, batch=32, seed=0):
    """frames: (N, H, W, 3) uint8; places: (N, 3) metres. Returns a function from such frames to such places.

    Each batch is softened, brightened and made noisy at random, since generated frames are softer than real ones.
    path: where it is kept; what is there is taken.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.from_numpy(np.asarray(places)).float()
    mean, spread = targets.mean(0), targets.std(0)
    model = Detector()
    if not path.exists():
        fit(model, to_tensor(frames), (targets - mean) / spread, steps, batch, generator)
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))

    @torch.no_grad()
    def detect(frames):
        found = [model(part) for part in to_tensor(frames).split(256)]
        return (torch.cat(found) * spread + mean).numpy()

    return detect


def fit(model, pictures, targets, steps, batch, generator):
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        chosen = torch.randint(len(pictures), (batch,), generator=generator)
        uniform = torch.rand(3, batch, 1, 1, 1, generator=generator)
        sharp = pictures[chosen]
        shown = torch.lerp(sharp, F.avg_pool2d(sharp, 3, 1, 1, count_include_pad=False), uniform[0])
        shown = (shown - 0.5) * (0.85 + 0.3 * uniform[1]) + 0.5 + 0.1 * (uniform[2] - 0.5)
        shown = shown + 0.02 * torch.randn(shown.shape, generator=generator)
        loss = F.smooth_l1_loss(model(shown), targets[chosen], beta=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
