"""The proof's two networks: labeller (frame -> where the fingertip is) and policy (first frame -> path).

Both are small CNNs that find points in the image and say from their places where the fingertip is or goes.
"""

import json
import math
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial

os.environ["OMP_NUM_THREADS"] = "1"  # the tensors are small: as many processes as cores instead

import numpy as np
import torch
from detector import Detector, to_tensor  # in tests/tiny, which clips.py puts on the path
from torch import nn
from torch.nn import functional as F

LEARNING_RATE = 3e-3
WIDTHS = 16, 24, 32  # of the labeller's network
POLICY_SHIFT = 3  # pixels: how far its pictures are moved at random in training


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


def vary(frames, generator, shift=0):
    """Frames (B, 3, H, W) in another light, and moved sideways by up to `shift` pixels."""

    def uniform(low, high):
        return torch.empty(len(frames), 1, 1, 1).uniform_(low, high, generator=generator)

    if shift:
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


def in_processes(function, jobs, processes):
    """[function(job)], so many at a time."""
    if processes == 1:
        return [function(job) for job in jobs]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(function, jobs))


def keep(function, jobs, processes, folder, options):
    """`in_processes`, each result, an array, kept in the folder: after a stop it goes on. Other options begin anew."""
    folder.mkdir(parents=True, exist_ok=True)
    told, text = folder / "options.json", json.dumps(options, default=str)
    if not told.exists() or told.read_text() != text:
        for old in folder.glob("*.npy"):
            old.unlink()
        told.write_text(text)
    files = [folder / f"{index:04d}.npy" for index in range(len(jobs))]
    missing = [(job, file) for job, file in zip(jobs, files) if not file.exists()]
    in_processes(partial(write_result, function), missing, processes)
    return [np.load(file) for file in files]


def write_result(function, job_and_file):
    result, file = function(job_and_file[0]), job_and_file[1]
    np.save(file.with_suffix(".tmp.npy"), result)
    os.replace(file.with_suffix(".tmp.npy"), file)


# Labels


def train_labeller(seed, sources, steps, batch=32):
    """Learns where the fingertip is in a picture. Returns all that `find` needs, one vector.

    sources: [(clips (N, T, H, W, 3) uint8, paths (N, T, 3))]; a quarter of each batch is drawn from the first, the
    demonstrations.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    sources = [
        (to_tensor(clips).flatten(0, 1), torch.from_numpy(paths).float().flatten(0, 1)) for clips, paths in sources
    ]
    middle, scale = (f(torch.cat([places for _, places in sources]), 0) for f in (torch.mean, torch.std))
    shares = [batch] if len(sources) == 1 else [batch // 4, batch - batch // 4]
    model = Detector(WIDTHS)

    def loss_of_batch():
        frames, places = [], []
        for (pictures, known), share in zip(sources, shares):
            chosen = torch.randint(len(pictures), (share,), generator=generator)
            frames.append(pictures[chosen])
            places.append((known[chosen] - middle) / scale)
        shown = vary(soften(torch.cat(frames), generator), generator)
        shown = shown + 0.02 * torch.randn(shown.shape, generator=generator)
        return F.smooth_l1_loss(model(shown), torch.cat(places), beta=0.1)

    train(model, loss_of_batch, steps)
    return torch.cat([middle, scale, nn.utils.parameters_to_vector(model.parameters()).detach()]).numpy()


@torch.no_grad()
def find(labellers, clips):
    """Where the fingertip is in clips (M, T, H, W, 3) uint8: (M, T, 3) metres, the mean of what the labellers say."""
    places = []
    for vector in map(torch.from_numpy, labellers):
        model = Detector(WIDTHS)
        nn.utils.vector_to_parameters(vector[6:], model.parameters())
        places.append([(model(to_tensor(clip)) * vector[3:6] + vector[:3]).numpy() for clip in clips])
    return np.mean(places, 0)


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
        return F.mse_loss(model(vary(frames, generator, POLICY_SHIFT), known), target)

    train(model, loss_of_batch, steps)
    with torch.no_grad():
        moved = (model(*tensors(*test)).numpy() * std + mean).reshape(len(test[1]), -1, 3)
    return np.concatenate([test[1][:, None], test[1][:, None] + moved], 1)
