"""The proof's two networks: inverse dynamics (two frames -> how the fingertip moved) and policy (first frame -> path).

Both are the same small CNN that finds points in the image and says from their places how far the fingertip goes.
"""

import math
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are small: as many processes as cores instead

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

LEARNING_RATE = 1e-3


class PointNet(nn.Module):
    """(B, C, H, W) in [0, 1] and what else is known (B, K) -> (B, N) numbers, by where in the image 32 features lie."""

    def __init__(self, channels, known, outputs):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 32, 1),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(64 + known, 128), nn.ReLU(), nn.Linear(128, outputs))

    def forward(self, frames, known):
        features = self.features(frames - 0.5)
        height, width = features.shape[2:]
        weights = features.flatten(2).softmax(2).view_as(features)  # a soft arg max: sharper than a pixel
        x = weights.sum(2) @ torch.linspace(-1, 1, width)
        y = weights.sum(3) @ torch.linspace(-1, 1, height)
        return self.head(torch.cat([x, y, known], 1))


def vary(frames, generator, blur=False):
    """Frames (B, C, H, W) in another light, with noise, and blurred if asked: generated frames are softer than real."""

    def uniform(low, high, channels=1):
        return torch.empty(len(frames), channels, 1, 1).uniform_(low, high, generator=generator)

    if blur:  # each frame of a pair for itself
        share = torch.cat([uniform(0, 1).expand(-1, 3, 1, 1) for _ in range(frames.shape[1] // 3)], 1)
        frames = torch.lerp(frames, F.avg_pool2d(frames, 3, 1, 1, count_include_pad=False), share)
    frames = (frames - 0.5) * uniform(0.8, 1.2) + 0.5 + uniform(-0.08, 0.08)
    return frames + 0.02 * torch.randn(frames.shape, generator=generator)


def train(model, draw, steps, generator):
    """Least squares; `draw()` returns a batch (frames, known, target)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    for _ in range(steps):
        frames, known, target = draw()
        loss = F.mse_loss(model(frames, known), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def to_tensor(frames):
    """(..., H, W, 3) uint8 -> (..., 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3).float() / 255


def no_knowledge(count):
    return torch.zeros(count, 0)


# Inverse dynamics


def train_inverse_dynamics(clips, paths, steps, seed=0, batch=64):
    """Clips (N, T, H, W, 3) uint8 with paths (N, T, 3) -> a function from clips to displacements since frame 0."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    frames, paths = to_tensor(clips), torch.from_numpy(paths).float()
    count, length = paths.shape[:2]
    scale = (paths[:, :, None] - paths[:, None]).std((0, 1, 2))
    model = PointNet(channels=6, known=0, outputs=3)

    def draw():
        clip, i, j = (torch.randint(0, n, (batch,), generator=generator) for n in (count, length, length))
        pairs = torch.cat([frames[clip, i], frames[clip, j]], 1)
        return vary(pairs, generator, blur=True), no_knowledge(batch), (paths[clip, j] - paths[clip, i]) / scale

    train(model, draw, steps, generator)

    @torch.no_grad()
    def label(clips):
        frames = to_tensor(clips)
        moved = [model(torch.cat([f[:1].expand_as(f), f], 1), no_knowledge(length)) * scale for f in frames]
        return torch.stack(moved).numpy()[:, 1:]  # (N, T - 1, 3)

    return label


# Policy


def train_policy(job, real, steps, test, batch=32):
    """One policy, seed and added samples in `job`; returns its answers to `test`, paths (N, T, 3).

    Samples are (first frames (N, H, W, 3) uint8, starts (N, 3), displacements (N, T - 1, 3)); `test` has the first two.
    """
    seed, added = job
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    mean, std = (torch.from_numpy(f(real[2], 0)).float().flatten() for f in (np.mean, np.std))
    middle, spread = (torch.from_numpy(f(real[1], 0)).float() for f in (np.mean, np.std))

    def tensors(frames, starts, moved=None):
        known = (torch.from_numpy(starts).float() - middle) / spread
        return to_tensor(frames), known, moved is not None and (torch.from_numpy(moved).float().flatten(1) - mean) / std

    sources = [tensors(*real)] + ([tensors(*added)] if added else [])
    model = PointNet(channels=3, known=3, outputs=len(mean))

    def draw():
        size = batch // len(sources)
        parts = []
        for source in sources:
            chosen = torch.randint(0, len(source[0]), (size,), generator=generator)
            parts.append([x[chosen] for x in source])
        frames, known, target = (torch.cat(x) for x in zip(*parts))
        return vary(frames, generator), known, target

    train(model, draw, steps, generator)
    frames, known, _ = tensors(*test)
    with torch.no_grad():
        moved = (model(frames, known) * std + mean).view(len(frames), -1, 3).numpy()
    return np.concatenate([test[1][:, None], test[1][:, None] + moved], 1)


def train_policies(jobs, **options):
    """`train_policy` for each job, one process a core: (jobs, N, T, 3)."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return np.stack([f.result() for f in [pool.submit(train_policy, job, **options) for job in jobs]])
