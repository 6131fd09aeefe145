"""The samples of a training step, and the choice of training and held-out clips."""

import itertools
import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch

import svd_common as common
from svd_parts.dataset import group_clips, list_clips
from svd_parts.files import UserError, counted, is_named, listed, pattern_names, unmatched
from svd_parts.latent_cache import errors_naming, read_cached
from svd_parts.objective import random_generator, sample_sigmas, shuffled
from svd_parts.weights import latent_factor

# A sample depends on (seed, index) alone, with index = step * global batch size + place in the batch. So a resumed run
# draws the same numbers as an uninterrupted one, and no random state has to be saved.
NOISE_AUG_MEAN, NOISE_AUG_STD = -3.0, 0.5  # ln of noise_aug_strength; median 0.05 (Blattmann et al. 2023, appendix D)


class ClipDataset:
    """Random windows of consecutive frames, with every random number of a training step already drawn.

    `dataset[index]` takes any index >= 0. Each clip comes once an epoch, in an order shuffled by (seed, epoch).
    Shapes, without the batch axis: latents and noise (T, 4, h, w); sigmas (); conditioning_image (3, H, W), the first
    frame in [-1, 1] with its noise; image_embeddings (1, D); added_time_ids (3,); keep (), 0 where both image
    conditions are dropped. Without a cache, pixel_values (T, 3, H, W) and posterior_noise stand in place of latents.
    With actions, also the scaled actions (T, A) and keep_actions (), 0 where the actions are dropped.
    """

    def __init__(self, clips, options, vae_config, cached):
        self.clips, self.options, self.cached = clips, options, cached
        factor = latent_factor(vae_config)
        self.scaling_factor = vae_config.scaling_factor
        self.latent_shape = (vae_config.latent_channels, options.height // factor, options.width // factor)

    def clip_of(self, index):
        """The clip from which `dataset[index]` is cut."""
        epoch, place = divmod(index, len(self.clips))
        return self.clips[shuffled(len(self.clips), self.options.seed, "order", epoch)[place]]

    def __getitem__(self, index):
        """Raises a `UserError` that names the clip if one of its files can no longer be read."""
        clip, generator = self.clip_of(index), random_generator(self.options.seed, "sample", index)
        last_start = len(clip["frames"]) - self.options.num_frames
        with errors_naming(clip):
            return self.sample(clip, int(torch.randint(last_start + 1, (), generator=generator)), generator)

    def sample(self, clip, start, generator):
        """The window of `clip` that begins at frame `start`; `generator` draws all random numbers."""
        options = self.options
        normal = torch.randn(3, generator=generator)
        noise_aug_strength = math.exp(NOISE_AUG_MEAN + NOISE_AUG_STD * normal[1].item())
        keep = torch.rand((), generator=generator) >= options.conditioning_dropout_prob
        shape = (options.num_frames, *self.latent_shape)
        posterior_noise = torch.randn(shape, generator=generator)
        sample = {
            "noise": torch.randn(shape, generator=generator),
            "sigmas": sample_sigmas(normal[0], options.P_mean, options.P_std),
            "keep": keep.float(),
            "added_time_ids": torch.tensor([clip["fps"] - 1, clip["motion_bucket_id"], noise_aug_strength]),
        }
        frames = clip["frames"][start : start + (1 if self.cached else options.num_frames)]
        pixels = common.to_pixels(common.read_frames(frames, options.width, options.height)).contiguous()
        noise = torch.randn(pixels.shape[1:], generator=generator)
        sample["conditioning_image"] = pixels[0] + noise_aug_strength * noise
        if self.cached:
            mean, std, embedding = read_cached(clip["cache"], start, options.num_frames)
            sample["latents"] = (mean + std * posterior_noise) * self.scaling_factor
            sample["image_embeddings"] = embedding
        else:
            sample |= {"pixel_values": pixels, "posterior_noise": posterior_noise}
        if options.condition_on:  # drawn last, so that all other numbers are the same without actions
            sample["actions"] = torch.from_numpy(clip["scaled_actions"][start : start + options.num_frames])
            keep = torch.rand((), generator=generator) >= options.action_dropout_prob
            sample["keep_actions"] = keep.float()
        return sample


def batches(dataset, index_batches, pin_memory, num_workers):
    """Yields one batch on the CPU for each list of B indices: stacked samples of ClipDataset, {name: (B, ...)}.

    num_workers: how many threads load; each prepares two batches ahead. pin_memory: for batches that go to a GPU.
    Threads are enough, since OpenCV, safetensors and torch release the GIL; a forked worker would deadlock in OpenCV.
    An error in a sample is raised when its batch is due.
    """

    def load(indices):
        samples = [dataset[index] for index in indices]
        batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
        return {key: value.pin_memory() for key, value in batch.items()} if pin_memory else batch

    torch.zeros(()).exp()  # if several threads make MKL's very first exp, it is now and then off by 7e-5
    with ThreadPoolExecutor(num_workers) as pool:
        jobs = (pool.submit(load, indices) for indices in index_batches)
        ahead = deque(itertools.islice(jobs, 2 * num_workers))
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(itertools.islice(jobs, 1))
            yield batch


def index_batches(state):
    """Yields the sample indices of each micro-batch of this process, from step `state.steps` on."""
    options, ranks, rank = state.options, state.accelerator.num_processes, state.accelerator.process_index
    size, total = options.train_batch_size, state.settings["global_batch_size"]
    for step in range(state.steps, options.max_train_steps):
        for micro in range(options.gradient_accumulation_steps):
            first = step * total + (micro * ranks + rank) * size
            yield list(range(first, first + size))


def next_batches(loader, count):
    """(the next `count` batches, None), or ([], the error) if one of them cannot be read."""
    try:
        return [next(loader) for _ in range(count)], None
    except (UserError, OSError) as error:
        return [], error


def load_clips(dataset_dir, num_frames, fps, motion_bucket_id):
    """The clips of at least `num_frames` frames, with `fps` and `motion_bucket_id` filled in. Prints the shorter ones.

    Raises `UserError` if all clips are too short, and as `dataset.list_clips` does.
    """
    found = list_clips(dataset_dir)
    clips = [clip for clip in found if len(clip["frames"]) >= num_frames]
    if not clips:
        longest = max(len(clip["frames"]) for clip in found)
        what = f"no clip is that long; the longest has {counted(longest, 'frame')} ({dataset_dir})"
        raise UserError(f"--num_frames {num_frames}: {what}")
    short = [clip for clip in found if len(clip["frames"]) < num_frames]
    if short:
        named = listed([f"{clip['directory']} has {counted(len(clip['frames']), 'frame')}" for clip in short])
        print(f"left out, as --num_frames is {num_frames}: {named}")
    generated = sum(bool(clip.get("generated")) for clip in clips)
    if generated:
        print(f"generated by a model, not filmed: {generated} of {counted(len(clips), 'clip')}")
    unknown = sum("fps" not in clip for clip in clips)
    if unknown:
        given = f"--fps {fps:g}, --motion_bucket_id {motion_bucket_id:g}"
        print(f"{counted(unknown, 'clip')} not described in metadata.jsonl: using {given}")
    return [{"fps": fps, "motion_bucket_id": motion_bucket_id, **clip} for clip in clips]


def hold_out(clips, num_validation_videos, seed, known=None):
    """Holds out whole episodes, so that no camera of an episode is on both sides: (training clips, held-out clips).

    Clips of one recording, or with the same frames, count as one episode, whatever their names: see `group_clips`.
    known: the names that the resumed run held out; they stay held out, even if clips were added or removed since.
    Raises `UserError` if no episode would be left to train on.
    """
    if known is not None:
        there = {clip["directory"]: clip for clip in clips}
        validation = [there[name] for name in known if name in there]
        if known and not validation:
            what = listed(list(known))
            print(f"warning: the clips that this run held out are gone ({what}); nothing is validated any more")
        return clips_of_other_groups(clips, validation), validation
    groups = group_clips(clips)
    names = list(groups)
    drawn = [names[place] for place in shuffled(len(names), seed, "held out")]
    before = itertools.accumulate((len(groups[name]) for name in drawn), initial=0)
    held_out = {name for name, videos in zip(drawn, before) if videos < num_validation_videos}
    if len(held_out) == len(groups):
        most = len(clips) - max(map(len, groups.values()))
        what = f"{counted(len(clips), 'clip')} of {counted(len(groups), 'episode')}"
        cure = f"at most {most} can be held out" if most else "give held-out clips as --validation_dir"
        why = f"no episode would be left to train on ({what}; {cure})"
        raise UserError(f"--num_validation_videos {num_validation_videos}: {why}")
    validation = [clip for name in names if name in held_out for clip in groups[name]][:num_validation_videos]
    return clips_of_other_groups(clips, validation), validation


def clips_of_other_groups(clips, held_out):
    """The clips that share no episode with `held_out`. Prints how many clips are then on neither side."""
    names = {clip["directory"] for clip in held_out}
    shared = (group for group in group_clips(clips).values() if any(clip["directory"] in names for clip in group))
    taken = {clip["directory"] for group in shared for clip in group}
    training = [clip for clip in clips if clip["directory"] not in taken]
    if unused := len(clips) - len(training) - len(held_out):
        what = f"not used: {counted(unused, 'more clip')} of the held-out episodes"
        print(f"{what}; --num_validation_videos {unused + len(held_out)} would validate with all of them")
    return training


def take_included(clips, patterns):
    """The clips that --include names; all, where it is not given. Prints how many are left out, and unknown names."""
    included = [clip for clip in clips if not patterns or is_named(patterns, clip["directory"])]
    report_choice("--include", patterns, clips, included)
    return included


def leave_out(chosen, patterns):
    """(training clips, held-out clips) without those that --exclude names. Prints their number and unknown names.

    This comes after `hold_out`, so that --exclude moves no other clip from one side to the other.
    """
    left = [[clip for clip in clips if not is_named(patterns, clip["directory"])] for clips in chosen]
    report_choice("--exclude", patterns, [*chosen[0], *chosen[1]], left[0], len(left[1]))
    return left


def report_choice(flag, patterns, clips, left, held_out=0):
    """Prints what a choice of clips by `flag` leaves out. left: to train on. Raises `UserError` if none are."""
    if not patterns:
        return
    for name in unmatched(patterns, [(clip["directory"],) for clip in clips]):
        print(f"warning: {flag} {name}: no clip of this run has that name")
    if not left:
        raise UserError(f"{flag} {' '.join(pattern_names(patterns)[:5])}: no clip is left to train on")
    print(f"{flag}: {len(clips) - len(left) - held_out} of {counted(len(clips), 'clip')} left out")
