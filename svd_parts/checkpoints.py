"""Checkpoints: what they hold, how they are written and read, and when a run may be resumed. Nothing is pickled."""

import contextlib
import itertools
import json
import os
import re
import sys
from pathlib import Path

from svd_parts.files import UserError, file_digest, fits, listed, read_json, replacing, tidy, write_file
from svd_parts.weights import CHECKPOINT_STATE, write_tensors


def flatten_state(optimizer, names):
    """The optimizer's state by parameter name: ({"name|key": tensor}, {"name|key": number})."""
    import torch

    tensors, numbers = {}, {}
    for name, parameter in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            value = value.clone() if key.startswith("qmap") else value  # all parameters share bitsandbytes' one table
            (tensors if torch.is_tensor(value) else numbers)[f"{name}|{key}"] = value
    return tensors, numbers


def unflatten_state(optimizer, names, tensors, numbers):
    """Puts the state from `flatten_state` back into the optimizer, on each parameter's device."""
    import torch

    for flat, value in {**tensors, **numbers}.items():
        name, key = flat.rsplit("|", 1)
        parameter = names[name]
        optimizer.state[parameter][key] = value.to(parameter.device) if torch.is_tensor(value) else value


def save_checkpoint(folder, state, resumable=True, **more):
    """Writes a checkpoint, whole or not at all; an earlier one of that name is removed once the new one is whole.

    resumable: save all that training needs, not only the weights to generate with. more: fields of training_state.json.
    """
    with replacing(folder, folder=True) as aside:
        if resumable or not state.ema:
            write_tensors(aside / "trained.safetensors", {name: p.data for name, p in state.trained.items()})
        if state.ema:
            write_tensors(aside / "ema.safetensors", dict(zip(state.trained, state.ema.shadow_params)))
        saved = {"step": state.steps, "settings": state.settings, **more}
        if resumable:
            tensors, numbers = flatten_state(state.optimizer, state.trained)
            write_tensors(aside / "optimizer.safetensors", tensors)
            saved |= {"optimizer": numbers, "scaler": state.scaler.state_dict() if state.scaler else None}
            saved["clips"] = state.clips
            saved["files"] = {file.name: file_digest(file) for file in aside.glob("*.safetensors")}
        write_file(aside / CHECKPOINT_STATE, json.dumps(saved, indent=1))
        old = folder.with_name(f".{folder.name}.{os.urandom(4).hex()}.old")
        if folder.exists():
            os.replace(folder, old)
    tidy([old])


def checkpoint_step(folder):
    return int(folder.name.rsplit("-", 1)[1])


def checkpoints_of(output_dir):
    """The checkpoint folders of a run, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=checkpoint_step)


def read_best(output_dir):
    """(step, {metric: score}) of the model in `best/`; (None, {}) if there is none."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
        saved = json.loads((Path(output_dir) / "best" / CHECKPOINT_STATE).read_text())
        return saved["step"], saved["metrics"]
    return None, {}


def read_checkpoint(folder):
    """The training_state.json of a complete checkpoint. Raises a `UserError` that names the damaged or missing file."""
    path = folder / CHECKPOINT_STATE
    try:
        saved = read_json(path, "use another checkpoint")
    except FileNotFoundError:
        raise UserError(f"{path}: missing; not a checkpoint of train_svd.py") from None
    if "files" not in saved and "step" in saved:
        raise UserError(f"{folder}: only holds weights to generate with; give a checkpoint-N folder to go on from")
    for name, kind in (("step", int), ("settings", dict), ("optimizer", dict), ("files", dict), ("clips", dict)):
        if not fits(saved, {name: kind}):
            raise UserError(f"{path}: damaged, it has no {name}; use another checkpoint")
    if not {"max_train_steps", "validation_dir", "trained_on", "held_out"} <= saved["settings"].keys():
        raise UserError(f"{path}: damaged, its settings are not whole; use another checkpoint")
    for name, digest in saved["files"].items():
        file = folder / name
        if not file.is_file() or file_digest(file) != digest:
            raise UserError(f"{file}: {'damaged' if file.is_file() else 'missing'}; use another checkpoint")
    return saved


def find_checkpoint(options):
    """(folder, saved state) of --resume_from_checkpoint, or (None, None); `latest` is the newest complete one."""
    output, given = Path(options.output_dir), options.resume_from_checkpoint
    if not given:
        return None, None
    if given != "latest":
        folder = Path(given) if Path(given).is_dir() else output / given  # `checkpoint-500` alone: of this run
        if not folder.is_dir():
            there = listed([each.name for each in checkpoints_of(output)]) or "no checkpoint"
            raise UserError(f"--resume_from_checkpoint {given}: no such folder; in {output} there is {there}")
        return folder, read_checkpoint(folder)
    for folder in reversed(checkpoints_of(output)):
        try:
            return folder, read_checkpoint(folder)
        except UserError as error:
            print(f"{error}; taking the checkpoint before it", file=sys.stderr)
    if (output / "model_index.json").exists():
        raise UserError(f"{output} holds a result and no checkpoint to go on from; give another --output_dir")
    print(f"--resume_from_checkpoint latest: no checkpoint in {output}; starting from the beginning")
    return None, None


def put_aside_newer(options, folder, step):
    """Renames checkpoints beyond `step` to `damaged-checkpoint-N`. Raises `UserError` if the user chose this step."""
    for newer in checkpoints_of(options.output_dir):
        if checkpoint_step(newer) > step:
            target = newer.with_name(f"damaged-{newer.name}")
            if options.resume_from_checkpoint != "latest" or target.exists():
                raise UserError(f"{newer} is beyond {folder or 'the beginning'}; move it away to go on from there")
            os.replace(newer, target)


# Settings that may differ when a run is resumed: they do not change the trained weights.
MAY_DIFFER_ON_RESUME = frozenset(
    """output_dir dataset_dir pretrained_model_name resume_from_checkpoint checkpointing_steps checkpoints_total_limit
save_merged cache_latents cache_dir dataloader_num_workers logging_steps report_to compile dry_run include exclude
gradient_checkpointing gradient_accumulation_steps train_batch_size max_train_steps push_to_hub base_model_name versions
step num_clips median_fps median_motion_bucket_id motion_bucket_id_range validation_dir validation_steps
validation_inference_steps validation_metric trained_on held_out marks""".split()
)


def check_resume(settings, clips, saved, folder):
    """Raises a `UserError` that names the settings and clips with which the resumed run would become another run.

    clips: {directory: fingerprint}. A run may go on without some of its clips, which may be unreadable; it names them.
    """
    before = saved["settings"]
    free = {*MAY_DIFFER_ON_RESUME, *(["num_validation_videos"] if settings["validation_dir"] else [])}
    changed = [key for key in settings if key not in free and settings[key] != before.get(key)]
    if settings["max_train_steps"] != before["max_train_steps"] and "constant" not in settings["lr_scheduler"]:
        changed.append("max_train_steps")  # it shapes the learning-rate schedule
    if changed:
        pairs = ", ".join(f"{key} was {before.get(key)!r}, is {settings[key]!r}" for key in changed)
        raise UserError(f"{folder}: {pairs}; use the checkpoint's, or start a new run in another --output_dir")
    if saved["step"] > settings["max_train_steps"]:
        raise UserError(f"{folder} is beyond --max_train_steps {settings['max_train_steps']}; give a larger number")
    known = saved["clips"]
    changed = [name for name in clips if name in known and known[name] != clips[name]]
    new, gone = sorted(clips.keys() - known.keys()), sorted(known.keys() - clips.keys())
    if changed or new:
        what = f"{listed(new)} not trained on before"
        if changed:
            what = f"{listed(changed)} changed (frames, fps, motion or actions)"
        cure = "restore the clips, leave them out with --exclude, or start a new run in another --output_dir"
        raise UserError(f"{folder}: {what}; {cure}")
    if gone:
        print(f"going on without {listed(gone)}; the checkpoint was trained on these clips")


def put_aside_other_run(state):
    """Moves `best/` and `validation/` of a run with other settings, given up before its first checkpoint, aside."""
    output, settings = Path(state.options.output_dir), state.settings
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        before = json.loads((output / "best" / CHECKPOINT_STATE).read_text())["settings"]
        if any(settings[key] != before.get(key, settings[key]) for key in settings.keys() - MAY_DIFFER_ON_RESUME):
            aside = next(path for n in itertools.count(1) if not (path := output / f"earlier-{n}").exists())
            aside.mkdir()
            for name in ("best", "validation"):
                os.replace(output / name, aside / name)
