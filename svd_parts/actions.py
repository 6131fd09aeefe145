"""Actions: one row of numbers for each frame. Reads, checks and scales them."""

import hashlib
import json
from pathlib import Path

import numpy as np

from svd_parts.files import UserError, listed

FILE = "actions.npy"  # the file of a clip's actions, beside its frames
FOLDER, SETTINGS, WEIGHTS = "actions", "actions.json", "encoder.safetensors"  # the encoder's folder in a trained model
PREFIX = "actions."  # of the encoder's parameters; as a part of the UNet they train, average and resume like all others


def read_actions(path):
    """Reads (T, A) float32 from an .npy or .csv file; a .csv may begin with a line of names. Raises `UserError`."""
    path = Path(path)
    try:
        if path.suffix.lower() == ".csv":
            lines = [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
            if not lines:
                raise UserError(f"{path}: is empty; actions need a row for each frame")
            try:
                actions = np.loadtxt(lines, delimiter=",", ndmin=2)
            except ValueError:  # the first line holds names
                if len(lines) < 2:
                    raise
                actions = np.loadtxt(lines[1:], delimiter=",", ndmin=2)
        else:
            actions = np.load(path, allow_pickle=False)
        actions = np.asarray(actions, np.float32)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of actions") from None
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise UserError(f"{path}: no table of actions, .npy or .csv ({str(error).splitlines()[0][:100]})") from None
    if actions.ndim != 2 or not actions.size:
        wanted = "a table with a row for each frame and a column for each number"
        raise UserError(f"{path}: has the shape {actions.shape}; actions are {wanted}")
    if not np.isfinite(actions).all():
        row, column = np.argwhere(~np.isfinite(actions))[0]
        raise UserError(f"{path}: row {row}, column {column} is {actions[row, column]}; every action must be a number")
    return actions


def add_actions_of_clips(clips):
    """Fills `clip["actions"]`, (frames, A). Raises a `UserError` that names a clip without actions or with others."""
    for clip in clips:
        path = clip["root"] / clip["directory"] / FILE
        if not path.is_file():
            cure = f"prepare a LeRobot set that has actions, put {FILE} beside the frames, or --exclude the clip"
            raise UserError(f"--condition_on actions: {path} is missing; {cure}")
        clip["actions"], count = read_actions(path), len(clip["frames"])
        if len(clip["actions"]) != count:
            raise UserError(f"{path}: {len(clip['actions'])} rows for {count} frames; each frame needs one row")
    kinds = {}
    for clip in clips:
        names = clip.get("action_names")
        kinds.setdefault((clip["actions"].shape[1], json.dumps(names)), clip["directory"])
    if len(kinds) > 1:
        columns = {kind: f"{kind[0]}" + (f" ({kind[1]})" if kind[1] != "null" else "") for kind in kinds}
        found = [f"{name} has {columns[kind]}" for kind, name in kinds.items()]
        raise UserError(f"the actions of all clips must have the same columns: {listed(found)}; --exclude the others")


def describe_actions(clips):
    """What is saved with a model: {count, names or None, low, high}; the 1st and 99th percentile of each column."""
    rows = np.concatenate([clip["actions"] for clip in clips])
    low, high = np.percentile(rows.astype(np.float64), (1, 99), axis=0).round(6)
    names = clips[0].get("action_names")
    return {"count": rows.shape[1], "names": names, "low": low.tolist(), "high": high.tolist()}


def scale_actions(actions, described):
    """Scales (T, A) to float32, so that `low` becomes -1 and `high` 1; a constant column becomes 0."""
    low, high = np.array(described["low"]), np.array(described["high"])
    half = np.where(high > low, high - low, np.inf) / 2
    return ((actions - (low + high) / 2) / half).astype(np.float32)


def prepare_actions(condition_on, clips, held_out, before, base):
    """Fills `clip["scaled_actions"]` of all clips. Returns {"actions": as `describe_actions`}; {} without actions.

    before: the actions of the resumed run, or None; their scale stays, even if clips were removed since. base: the
    folder of the model to start from. If it follows actions of the same kind, its scale and its encoder are kept.
    """
    known = before or read_described(base)
    if not condition_on:
        if known:
            print(f"warning: {base} follows actions; without --condition_on actions the result will not")
        return {}
    add_actions_of_clips([*clips, *held_out])
    described = describe_actions(clips)
    if known and [known["count"], known["names"]] == [described["count"], described["names"]]:
        described = known
    elif known:
        wanted, found = (", ".join(column_names(kind)) for kind in (known, described))
        print(f"{base} follows other actions ({wanted}): its encoder is not used, and a new one learns {found}")
    for clip in [*clips, *held_out]:
        clip["scaled_actions"] = scale_actions(clip["actions"], described)
        clip["actions_digest"] = digest_of(clip["actions"])
    return {"actions": described}


def read_described(base):
    """The `describe_actions` that is saved with a trained model; None if the model follows no actions."""
    path = Path(base) / FOLDER / SETTINGS
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def digest_of(rows):
    return hashlib.sha256(rows.tobytes()).hexdigest()


def column_names(described):
    """The names of the A columns as one list. LeRobot may group them: {"motors": [...]}."""
    names, count = described["names"], described["count"]
    names = [name for part in names.values() for name in part] if isinstance(names, dict) else names
    return names if names and len(names) == count else [f"column {place}" for place in range(count)]


def warn_of_far_values(rows, described, given):
    """Prints a warning for each column with values far outside those that the model was trained on."""
    far = np.abs(scale_actions(rows, described)).max(0)
    kinds = zip(column_names(described), described["low"], described["high"], rows.T, far)
    for name, low, high, column, value in kinds:
        if value > 2 or (low == high and np.abs(column - low).max() > 1e-6):
            found = f"{name} is {column.min():g} to {column.max():g}"
            print(f"warning: --actions {given}: {found}; the model was trained on {low:g} to {high:g}")


def add_actions_to_images(images, settings, model):
    """Reads --actions, one table for all images or a prepared dataset with one for each, and adds it to `images`.

    Each image gets the rows that its clip needs, their names, file and digest. settings: those of inference;
    `model.settings`: those of the model's training. Raises `UserError` if the actions do not fit the model.
    """
    given, num_frames, num_segments = settings.actions, settings.num_frames, settings.num_segments
    described = model.settings.get("actions")
    if not described:
        cure = "train one with --condition_on actions, or leave out --actions"
        raise UserError(f"--actions: {model.name} was not trained to follow actions; {cure}")
    needed, longer = 1 + (num_frames - 1) * num_segments, {}
    wanted = f"{described['count']} ({', '.join(column_names(described))})"
    for image in images:
        path = Path(given)
        path = path / image["image"] / FILE if path.is_dir() else path
        rows, names = read_actions(path), image.get("action_names")
        if rows.shape[1] != described["count"]:
            raise UserError(f"--actions {path}: has {rows.shape[1]} columns; the model was trained with {wanted}")
        if path.name == FILE and names and described["names"] and names != described["names"]:
            raise UserError(f"--actions {path}: has columns {json.dumps(names)}; the model was trained with {wanted}")
        if len(rows) < needed:
            what = f"{num_segments} segments of {num_frames} frames" if num_segments > 1 else f"{num_frames} frames"
            raise UserError(f"--actions {path}: has {len(rows)} rows; {what} need {needed} (--num_frames)")
        if len(rows) > needed:
            longer[str(path)] = True
        rows = rows[:needed]
        image |= {"action_rows": rows.tolist(), "action_names": described["names"], "actions_file": str(path)}
        image["actions_sha256"] = digest_of(rows)
    warn_of_far_values(np.concatenate([image["action_rows"] for image in images]), described, given)
    if longer:
        print(f"--actions: only the first {needed} rows are used of {listed(list(longer))}")


def scaled_actions(job, settings):
    """The scaled actions of a clip, (T, A); None if the model, trained with `settings`, does not follow actions."""
    described, rows = settings.get("actions"), job.get("action_rows")
    return scale_actions(np.array(rows), described) if rows and described else None
