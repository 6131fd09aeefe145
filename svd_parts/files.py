"""Files that are whole or not there, locks, shards, names, lists and JSON; and `UserError`, a user's mistake."""

import contextlib
import fnmatch
import hashlib
import json
import os
import re
import shutil
import sys
import unicodedata
from collections import Counter, namedtuple
from pathlib import Path
from typing import NamedTuple


class UserError(Exception):
    """A mistake of the user, or a wrong file. The text is one line: what is wrong, where, and the cure."""


def frozen(args):
    """The command line as a named tuple, which no room can change."""
    return namedtuple("Options", vars(args))(**vars(args))


def natural_key(name):
    """A key for sorting that compares digits as numbers: `frame2` comes before `frame10`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(name))]


def listed(names):
    """Up to five names, and how many more there are: `a, b, c, d, e and 3 more`."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def counted(number, noun):
    """`1 clip`, `2 clips`, `1,737 frames`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def same_name(name):
    """A name as most systems write it: a letter with its accent is one character. macOS writes two."""
    return unicodedata.normalize("NFC", name)


def printable(name):
    """A file's name as text that any file in UTF-8 can hold: each byte that is not UTF-8 becomes U+FFFD."""
    return os.fsencode(name).decode(errors="replace")


def plain_name(name):
    """Makes of `name` a name for a file: UTF-8, because safetensors opens no other path, and at most 200 bytes.

    File systems allow 255 bytes. The rest is for the suffix, and for what is added while the file is written.
    """
    text = printable(name)
    if text == name and len(text.encode()) <= 200:
        return name
    return f"{text.encode()[:150].decode(errors='ignore')}+{name_digest(name)}"


def name_digest(name):
    """Eight hexadecimal digits that depend on the name alone."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:8]


def file_digest(path, before=b""):
    """SHA-256 of the bytes `before` and then a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256(before)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def quick_digest(path):
    """16 hexadecimal digits of a file's size and its first and last 64 KB, which tell it from others, however large."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(size.to_bytes(8, "little") + file.read(1 << 16))
        file.seek(max(0, size - (1 << 16)))
        digest.update(file.read())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def named(path):
    """Adds this file's name to an `OSError` that has none. That of a full disk has none."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path, folder=False):
    """Gives a name beside `path` to write a file to, or an empty folder to fill, and renames that to `path` at the end.

    A file is flushed to disk before the rename. So `path` is either whole or as it was. After an error, as on a full
    disk, nothing is left beside it. What a killed run left of a folder is removed at the start.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.part" if folder else f".{path.name}.{os.urandom(4).hex()}.part")
    if folder:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    try:
        with named(path):
            yield aside
        if not folder:
            with open(aside, "r+b") as file:
                os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True) if folder else aside.unlink(missing_ok=True)


def write_file(path, data):
    """Writes bytes or text to a file, which is whole or as it was, even after a kill."""
    with replacing(path) as aside:
        aside.write_bytes(data.encode() if isinstance(data, str) else data)


def inside(name, where):
    """Returns `name`, a path that was read out of the file `where`, if it stays inside that file's folder.

    Raises `UserError` for an absolute path, one with `..`, and anything that is no path.
    """
    parts = re.split(r"[\\/]", name) if isinstance(name, str) else [".."]
    if not name or ".." in parts or parts[0] == "" or re.match(r"[A-Za-z]:", parts[0]) or "\0" in name:
        raise UserError(f"{where} names {json.dumps(name)[:80]}, which is not inside its folder; repair or delete it")
    return name


def write_json(path, value):
    """Writes an object as JSON, one field a line, by `write_file`."""
    write_file(path, json.dumps(value, indent=1))


def tidy(leftovers):
    """Removes files, links and folders. Renames a folder first, so that no folder is ever half there.

    What cannot be removed stays, with a warning. No run ends for it.
    """
    for path in leftovers:
        try:
            if path.is_dir() and not path.is_symlink():
                if not path.name.startswith("."):
                    path = path.rename(path.with_name(f".{path.name}.gone"))
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except FileNotFoundError:  # another process was faster
            pass
        except OSError as error:
            print(f"warning: {path}: cannot be removed ({error.strerror}); it stays", file=sys.stderr)


@contextlib.contextmanager
def lock_file(path, busy, shared=False):
    """Holds a lock on the file `path` until the block or the process ends. Makes the file where it is missing.

    Where another process holds the lock: raises `UserError(busy)`, or waits if `busy` is None. Several processes can
    hold a `shared` lock at once.
    """
    with open(path, "a+") as file:  # "+": NFS gives a shared lock only for a file that is open for reading
        with contextlib.suppress(ImportError):  # no such locks on Windows
            import fcntl

            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (fcntl.LOCK_NB if busy else 0))
            except BlockingIOError:
                raise UserError(busy) from None
            except OSError:  # a file system without locks
                pass
        yield


class Shard(NamedTuple):
    """Part `part` of `parts`, which processes or machines share. Part 0 of 1 is everything, and its name is empty."""

    part: int
    parts: int

    @property
    def name(self):
        return f"-{self.part}-of-{self.parts}" if self.parts > 1 else ""

    def holds(self, name):
        """Whether this part has to do what has this name. A hash decides, so every run decides alike."""
        return int(name_digest(name), 16) % self.parts == self.part


def parse_shard(text, what="--shard"):
    """I/N -> Shard. I counts from 0 to N - 1, or from 1 to N (N is part 0). Raises `UserError`, naming `what`."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) <= int(parts) > 0):
        raise UserError(f"{what} must be I/N with I at most N, as in 0/4, got {text}")
    return Shard(int(part) % int(parts), int(parts))


@contextlib.contextmanager
def lock_shard(folder, shard, busy):
    """Holds the locks of a set in `folder`: of the whole set, or of one part beside the other parts.

    Raises `UserError(busy)` where another process holds these, or any part of another number of parts.
    """
    with contextlib.ExitStack() as locks:
        locks.enter_context(lock_file(folder / "lock", busy, shared=shard.parts > 1))
        if shard.parts > 1:
            locks.enter_context(lock_file(folder / f"lock-of-{shard.parts}", busy, shared=True))
            for other in set(folder.glob("lock-of-*")) - {folder / f"lock-of-{shard.parts}"}:
                with lock_file(other, busy):
                    pass
            locks.enter_context(lock_file(folder / f"lock{shard.name}", busy))
        yield


def read_patterns(texts, flag):
    """Reads the values of --include or --exclude: a pattern stays text, @FILE becomes a frozenset of its lines.

    Raises `UserError` where the file is missing or is not UTF-8 text.
    """

    def read(text):
        if not (path := Path(text[1:])).exists():
            raise UserError(f"{flag} {text}: no such file; give a text file of names, one a line")
        return frozenset(read_text(path).split("\n")) - {""}

    return [read(text) if text.startswith("@") else text for text in texts]


def is_named(patterns, *names):
    """Whether `patterns` (see `read_patterns`) take this thing: a pattern by any of its names, a list by the first."""
    listed = any(names[0] in pattern for pattern in patterns if not isinstance(pattern, str))
    globs = [pattern for pattern in patterns if isinstance(pattern, str)]
    return listed or any(name == glob or fnmatch.fnmatch(name, glob) for glob in globs for name in names)


def unmatched(patterns, known):
    """The patterns, and the lines of lists, that take nothing. known: a tuple of names for each thing that is there."""
    found, whole = [], {names[0] for names in known}
    for pattern in patterns:
        if not isinstance(pattern, str):
            found += sorted(pattern - whole)
        elif not any(is_named([pattern], *names) for names in known):
            found.append(pattern)
    return found


def parse_object(text, damaged):
    """Reads a JSON object -> dict. Raises `UserError(damaged)` for any other text."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(text), dict):
            return found
    raise UserError(damaged)


def read_json(path, cure="copy the model folder again, whole"):
    """Reads a file that holds a JSON object -> dict. Raises `UserError` with the `cure` for any other file."""
    return parse_object(path.read_bytes(), f"{path}: damaged; {cure}")


def read_text(path):
    """The text of a UTF-8 file, with or without a byte order mark; "" for no file. Raises `UserError` if not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8-sig") if path.exists() else ""
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 without its mark passes for UTF-8 that is full of these
        raise UserError(f"{path}: not UTF-8 text; open it in an editor and save it as UTF-8")
    return text


def read_lines(path, damaged, cut_off=False):
    """Yields (`FILE line N`, dict) for each object of a JSON Lines file, and nothing for a file that is missing.

    Raises `UserError` for a line that is no JSON object, with `damaged` as the reason, and for text that is not UTF-8.
    cut_off: pass over a last line that a kill cut off, so that it ends with neither a brace nor a newline.
    """
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = parse_object(line, f"{path} line {number}: {damaged}")
        except UserError:
            if cut_off and number == len(lines) and not line.rstrip().endswith("}"):
                return
            raise
        yield f"{path} line {number}", found


def pattern_names(patterns):
    """The patterns of `read_patterns`, and the lines of its lists, as one list of text."""
    return [name for pattern in patterns for name in ([pattern] if isinstance(pattern, str) else sorted(pattern))]


def fits(found, kinds):
    """Whether this is a dict with all fields of `kinds`, {name: type}, of their types. Their lists hold no numbers."""
    if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in kinds.items()):
        return False
    items = [item for name, kind in kinds.items() if kind is list for item in found[name]]
    return not any(isinstance(item, (int, float)) for item in items)


def count_kinds(names):
    """Counts names of files by suffix, the most frequent first: `12 .json, 3 .zip, 1 without a suffix`."""
    counts = Counter(os.path.splitext(name)[1].lower() or "without a suffix" for name in names)
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
