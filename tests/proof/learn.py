"""The proof's two networks: inverse dynamics (two frames -> how the fingertip moved) and policy (first frame -> path).

Both are the same small CNN, which finds points in the image and says from their places where the fingertip is or goes.
"""

import math
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial

os.environ["OMP_NUM_THREADS"] = "1"  # the tensors are small: as many processes as cores instead

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

LEARNING_RATE = 3e-3
LABEL_SHIFT, POLICY_SHIFT = 10, 3  # pixels: how far the pictures are moved at random in training


class PointNet(nn.Module):
    """(B, 3, H, W) in [0, 1] and what else is known (B, K) -> (B, N), by where in the image a few features lie."""

    def __init__(self, points, known, outputs):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, points, 1),
        )  # fmt: skip
        self.sharpness = nn.Parameter(torch.full((1, points, 1, 1), 2.0))
        self.head = nn.Sequential(nn.Linear(2 * points + known, 128), nn.ReLU(), nn.Linear(128, outputs))

    def forward(self, frames, known):
        features = F.instance_norm(self.features(frames - 0.5)) * self.sharpness
        height, width = features.shape[2:]
        weights = features.flatten(2).softmax(2).view_as(features)  # a soft arg max: finer than a pixel
        x = weights.sum(2) @ torch.linspace(-1, 1, width)
        y = weights.sum(3) @ torch.linspace(-1, 1, height)
        return self.head(torch.cat([x, y, known], 1))


def vary(frames, shift, generator):
    """Frames (B, 3, H, W) in another light, and moved sideways by up to `shift` pixels."""

    def uniform(low, high):
        return torch.empty(len(frames), 1, 1, 1).uniform_(low, high, generator=generator)

    height, width = frames.shape[2:]
    affine = torch.eye(2, 3).repeat(len(frames), 1, 1)
    affine[:, :1, 2:] = uniform(-shift, shift)[:, 0] * 2 / width
    affine[:, 1:, 2:] = uniform(-shift, shift)[:, 0] * 2 / height
    grid = F.affine_grid(affine, frames.shape, align_corners=False)
    frames = F.grid_sample(frames, grid, padding_mode="border", align_corners=False)
    return (frames - 0.5) * uniform(0.8, 1.2) + 0.5 + uniform(-0.08, 0.08)


def soften(frames, generator):
    """Blurs each frame by a random share: generated frames are softer than real ones."""
    share = torch.empty(len(frames), 1, 1, 1).uniform_(0, 1, generator=generator)
    return torch.lerp(frames, F.avg_pool2d(frames, 3, 1, 1, count_include_pad=False), share)


def train(model, loss_of_batch, steps):
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(steps):
        falling = min(1, (step + 1) / 30) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * falling
        loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def to_tensor(frames):
    """(..., H, W, 3) uint8 -> (..., 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3).float() / 255


def in_processes(function, jobs):
    """[function(job)], a process a core."""
    with ProcessPoolExecutor() as pool:
        return list(pool.map(function, jobs))


# Inverse dynamics


def train_labeller(seed, sources, videos, steps, batch=16):
    """Learns from `sources` and labels each of `videos`, (M, T, H, W, 3) uint8.

    sources: [(clips (N, T, H, W, 3) uint8, paths (N, T, 3))]; each batch is drawn from all of them alike.

    Returns displacements since frame 0, in metres, a list of (M, T - 1, 3). One network says for each of two frames
    where the hand is; the difference is trained to be the displacement, so two frames are all it ever compares.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    sources = [(to_tensor(clips), torch.from_numpy(paths).float()) for clips, paths in sources]
    length, scale = sources[0][1].shape[1], sources[0][1].std((0, 1))
    model = PointNet(points=8, known=0, outputs=3)
    nothing = torch.zeros(2 * batch, 0)

    def loss_of_batch():
        pairs, moves = [], []
        for frames, paths in sources:
            size = (batch // len(sources),)
            clip, i, j = (torch.randint(0, n, size, generator=generator) for n in (len(paths), length, length))
            pairs.append(torch.cat([frames[clip, i], frames[clip, j]], 1))  # both move and brighten alike
            moves.append((paths[clip, j] - paths[clip, i]) / scale)
        pairs, moves = torch.cat(pairs), torch.cat(moves)
        pairs = vary(pairs, LABEL_SHIFT, generator).view(batch, 2, 3, *pairs.shape[2:]).transpose(0, 1).flatten(0, 1)
        before, after = model(soften(pairs, generator), nothing).chunk(2)
        return F.mse_loss(after - before, moves)

    train(model, loss_of_batch, steps)
    with torch.no_grad():
        places = [torch.stack([model(to_tensor(clip), nothing[:length]) for clip in clips]) for clips in videos]
    return [((x[:, 1:] - x[:, :1]) * scale).numpy() for x in places]


def pseudo_label(networks, **options):
    """The mean of the labels of so many networks, each from another seed."""
    answers = in_processes(partial(train_labeller, **options), range(networks))
    return [np.mean(labels, 0) for labels in zip(*answers)]


# Policy


def train_policy(job, real, steps, test, batch=32):
    """A policy of a seed and with added samples, both in `job`; returns its answers to `test`, paths (N, T, 3).

    Samples are (first frames (N, H, W, 3) uint8, starts (N, 3), displacements (N, T - 1, 3)); `test` has the first two.
    """
    seed, added = job
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    (middle, spread), (mean, std) = ([f(x, 0).reshape(-1) for f in (np.mean, np.std)] for x in real[1:])

    def tensors(frames, starts):
        return to_tensor(frames), torch.from_numpy((starts - middle) / spread).float()

    sources = [(*tensors(*s[:2]), torch.from_numpy((s[2].reshape(len(s[2]), -1) - mean) / std).float())
        for s in (real, added) if s]  # fmt: skip
    model = PointNet(points=32, known=3, outputs=len(mean))

    def loss_of_batch():
        parts = []
        for source in sources:  # as many of the one as of the other
            chosen = torch.randint(0, len(source[0]), (batch // len(sources),), generator=generator)
            parts.append([x[chosen] for x in source])
        frames, known, target = (torch.cat(x) for x in zip(*parts))
        return F.mse_loss(model(vary(frames, POLICY_SHIFT, generator), known), target)

    train(model, loss_of_batch, steps)
    with torch.no_grad():
        moved = (model(*tensors(*test)).numpy() * std + mean).reshape(len(test[1]), -1, 3)
    return np.concatenate([test[1][:, None], test[1][:, None] + moved], 1)
