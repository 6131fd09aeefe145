"""Files that are whole or not there; locks, shards, names and lists; one line for a user's mistake."""

import contextlib
import fnmatch
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import unicodedata
from collections import Counter, namedtuple
from pathlib import Path
from typing import NamedTuple


class UserError(Exception):
    """A mistake of the user or of a file: one line that says what is wrong, where, and the cure."""


def frozen(args):
    """The command line as it was resolved, as a named tuple: no room can change it."""
    return namedtuple("Options", vars(args))(**vars(args))


def natural_key(name):
    """Sorts `frame2` before `frame10`: digits compare as numbers."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(name))]


def listed(names):
    """A few names and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def counted(number, noun):
    """`1 clip`, `2 clips`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def same_name(name):
    """A name as all systems write it: macOS takes letters with accents apart, here they are one character."""
    return unicodedata.normalize("NFC", name)


def printable(name):
    """A file's name as UTF-8 text: what is not UTF-8 in it becomes question marks."""
    return os.fsencode(name).decode(errors="replace")


def plain_name(name):
    """The name of a file that is made of `name`: UTF-8, for safetensors reads no other path, and not too long.

    255 bytes are the most that a name can have, with its suffix and with what is added while it is written.
    """
    text = printable(name)
    if text == name and len(text.encode()) <= 200:
        return name
    return f"{text.encode()[:150].decode(errors='ignore')}+{name_digest(name)}"


def name_digest(name):
    """Eight hexadecimal digits that depend on the name alone."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:8]


def file_digest(path, before=b""):
    """SHA-256 of a file's bytes, as hex, and of what is put `before` them."""
    digest = hashlib.sha256(before)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def named(path):
    """Puts the name of this file into an `OSError` that has none, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path, folder=False):
    """Gives a name beside `path` to write a file to, or an empty folder to fill; at the end it is renamed to `path`.

    A file is flushed to disk before. So `path` is whole or as it was, and after an error (a full disk) nothing stays;
    what a killed run left of a folder goes first.
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
    """Writes bytes or text: the file is whole or as it was."""
    with replacing(path) as aside:
        aside.write_bytes(data.encode() if isinstance(data, str) else data)


def inside(name, where):
    """A path that was read out of the file `where`, which must stay in that file's folder: relative and plain.

    Returns the name. Raises `UserError` for any other, so that nothing read from a file leads outside its folder.
    """
    parts = re.split(r"[\\/]", name) if isinstance(name, str) else [".."]
    if not name or ".." in parts or parts[0] == "" or re.match(r"[A-Za-z]:", parts[0]) or "\0" in name:
        raise UserError(f"{where} names {json.dumps(name)[:80]}, which is not inside its folder; repair or delete it")
    return name


def write_json(path, value):
    """Writes an object as JSON, one field a line: the file is whole or as it was."""
    write_file(path, json.dumps(value, indent=1))


def tidy(leftovers):
    """Removes files, links and folders. A folder gets another name first, so that none is ever half there.

    What cannot be removed stays, with a warning: no run ends for it.
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
    """Holds a lock on the file `path`, made where it is missing, until the block or the process ends in whatever way.

    Raises `UserError(busy)` where another process holds it, and waits where `busy` is None; `shared` locks bear each
    other.
    """
    with open(path, "a+") as file:  # NFS gives a shared lock only to who may read
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
    """A part of so many parts that processes or machines share; 0 of 1 is all, and has no name."""

    part: int
    parts: int

    @property
    def name(self):
        return f"-{self.part}-of-{self.parts}" if self.parts > 1 else ""

    def holds(self, name):
        """Whether what has this name falls to this part: by a hash, so to the same part in every run."""
        return int(name_digest(name), 16) % self.parts == self.part


def parse_shard(text, what="--shard"):
    """I/N -> Shard; I from 0 to N - 1, or from 1 to N, which is part 0. Raises `UserError` that says `what` it was."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) <= int(parts) > 0):
        raise UserError(f"{what} must be I/N with I at most N, as in 0/4, got {text}")
    return Shard(int(part) % int(parts), int(parts))


@contextlib.contextmanager
def lock_shard(folder, shard, busy):
    """Holds the locks of a set in `folder`: all of it, or a part beside the others of as many.

    Raises `UserError(busy)` where that is held, or a part of another number.
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
    """The values of --include or --exclude: patterns as they are; for @FILE its lines, a frozenset of names.

    Raises `UserError` where there is no such file, and as `read_text` does.
    """

    def read(text):
        if not (path := Path(text[1:])).exists():
            raise UserError(f"{flag} {text}: no such file; give a text file of names, one a line")
        return frozenset(read_text(path).split("\n")) - {""}

    return [read(text) if text.startswith("@") else text for text in texts]


def is_named(patterns, *names):
    """Whether a pattern stands for one of `names`, or a list of `read_patterns` holds the first of them."""
    listed = any(names[0] in pattern for pattern in patterns if not isinstance(pattern, str))
    globs = [pattern for pattern in patterns if isinstance(pattern, str)]
    return listed or any(name == glob or fnmatch.fnmatch(name, glob) for glob in globs for name in names)


def names_of_nothing(patterns, known):
    """The patterns, and the lines of lists, that stand for nothing in `known`: [the names of one thing], as above."""
    found, whole = [], {names[0] for names in known}
    for pattern in patterns:
        if not isinstance(pattern, str):
            found += sorted(pattern - whole)
        elif not any(is_named([pattern], *names) for names in known):
            found.append(pattern)
    return found


def parse_object(text, damaged):
    """A JSON object as a dict; raises `UserError(damaged)` for any other text."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(text), dict):
            return found
    raise UserError(damaged)


def read_json(path, cure="copy the model folder again, whole"):
    """A file that holds a JSON object, as a dict; raises `UserError` with the cure for any other."""
    return parse_object(path.read_bytes(), f"{path}: damaged; {cure}")


def read_text(path):
    """The text of a UTF-8 file, with its mark or without; empty where there is none. Raises `UserError` for others."""
    try:
        text = path.read_text(encoding="utf-8-sig") if path.exists() else ""
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 without its mark reads as UTF-8 with these
        raise UserError(f"{path}: not UTF-8 text; open it in an editor and save it as UTF-8")
    return text


def read_lines(path, damaged, cut_off=False):
    """The objects of a JSON Lines file, none where there is no file: yields (`FILE line N`, dict).

    Raises `UserError` for a line that is no JSON object, what it is says `damaged`, and as `read_text` does. With
    `cut_off` the last line may be broken off, where it ends in neither a brace nor a newline.
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
    """What --exclude holds as one list of text: its patterns, and the lines of its lists."""
    return [name for pattern in patterns for name in ([pattern] if isinstance(pattern, str) else sorted(pattern))]


def is_of_kind(found, kinds):
    """Whether this is a dict that has every field of `kinds`, {name: type}, each of its type; lists hold no numbers."""
    if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in kinds.items()):
        return False
    return not any(
        isinstance(item, (int, float)) for name, kind in kinds.items() if kind is list for item in found[name]
    )


def count_kinds(names):
    """Names of files by their suffix, the most first: `12 .json, 3 .zip, 1 without a suffix`."""
    counts = Counter(os.path.splitext(name)[1].lower() or "without a suffix" for name in names)
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def umask():
    """The permissions that new files are not given, without changing them for a moment: other threads write, too."""
    with tempfile.TemporaryDirectory() as folder:
        descriptor = os.open(os.path.join(folder, "x"), os.O_CREAT | os.O_WRONLY, 0o666)
        mode = os.fstat(descriptor).st_mode & 0o777
        os.close(descriptor)
    return 0o666 & ~mode
