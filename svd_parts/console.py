"""The console: printing that never ends a run, progress bars, and the errors of the command line."""

import argparse
import difflib
import math
import os
import re
import sys

from svd_parts.files import UserError

LOG_LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s after {elapsed}, {remaining} left{postfix}\n"


class Guarded:
    """A text stream whose `write` and `flush` never fail: a closed terminal or a broken pipe ends no run."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except (OSError, ValueError):  # EPIPE, EIO; ValueError: closed
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError):
            pass


def guard_output():
    """Makes every later print safe, even where a standard stream was closed before the start (`>&-`).

    Each line goes out at once, to a log file, too: Python would keep 8 KB of them back, and a kill would lose these.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file to be opened would get this number, and printing would go into it
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")
        elif hasattr(stream, "reconfigure"):  # prints backslashes for what the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
        setattr(sys, name, stream if isinstance(stream, Guarded) else Guarded(stream))


def run_script(main):
    """Runs `main()` and exits. A `UserError` becomes one line and status 2, an `OSError` status 1, Ctrl-C status 130.

    Puts the home folder for `~` in `--flag=~/x` and `@~/x`, where the shell does not.
    """
    home = re.compile(r"^(--\w+=|@|)(~[^/]*)")
    sys.argv[1:] = [home.sub(lambda found: found[1] + os.path.expanduser(found[2]), text) for text in sys.argv[1:]]
    guard_output()
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print("error:", where + " ".join((error.strerror or str(error)).split()), file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on", file=sys.stderr)
        status = 130
    sys.exit(status)


def check_launcher():
    """Refuses variables of a launcher that is not there: accelerate would wait for several processes. Refuses ways to
    spread one model over GPUs: here several GPUs share batches alone.

    Raises `UserError` that names the variable.
    """
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"):
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "on"):
            cure = f"unset {name}, or start by `accelerate launch --multi_gpu`"
            raise UserError(f"{name} is set in the environment; several GPUs share batches here, not a model: {cure}")
    alone = dict.fromkeys("WORLD_SIZE PMI_SIZE OMPI_COMM_WORLD_SIZE MV2_COMM_WORLD_SIZE".split(), ("", "1"))
    alone["LOCAL_RANK"] = ("", "-1")
    for name in (name for name in alone if os.environ.get(name, "") not in alone[name]):
        wanted = ["MASTER_ADDR", "MASTER_PORT"] + ["RANK", "WORLD_SIZE"] * (name in ("WORLD_SIZE", "LOCAL_RANK"))
        missing = [other for other in wanted if other not in os.environ]
        if missing or not os.environ[name].isdecimal():
            why = f"{' and '.join(missing)} not" if missing else "is no number"
            what = f"{name}={os.environ[name]} is set in the environment, but {why}"
            raise UserError(f"{what}: unset {name}, or start several processes by `accelerate launch`")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line that names --help, and the nearest option for one that is unknown.

    advice: {unknown option: what to say of it}. stray: what to say of words that belong to no option.
    """

    def __init__(self, *arguments, advice=None, stray="", **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*arguments, **{"allow_abbrev": False, **options})
        self.advice, self.stray = advice or {}, stray

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        flags = [word for word in words if word.startswith("--")]  # argparse would miss a mistyped required one
        if unknown := [word for word in flags if word.partition("=")[0] not in self._option_string_actions]:
            self.error(self.describe_unknown(unknown))
        found, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.error(self.describe_unknown(unknown))
        return found

    def describe_unknown(self, unknown):
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("-"):
            shown = " ".join(unknown[:3]) + (f" ... ({len(unknown)})" if len(unknown) > 3 else "")
            return f"unrecognized arguments: {shown}" + (f"; {self.stray}" if self.stray else "")
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        hint = self.advice.get(flag) or (f"did you mean {near[0]}?" if near else "")
        return f"unrecognized arguments: {flag}" + (f"; {hint}" if hint else "")

    def error(self, message):
        if found := re.match(r"argument ([^:]+): must .* got (.*)", message):  # said by `number`
            message = message[len("argument ") :].replace(": must", " must", 1)
            if "," in found[2]:
                several = self._option_string_actions[found[1]].nargs == "+"
                message += "; give several with spaces between them" if several else "; give one number"
        self.exit(2, f"error: {message} (all options: python {self.prog} --help)\n")


def number(kind, least, most=math.inf):
    """An argparse type: an int or a float from `least` to `most`."""
    wanted = f"at least {least}" if most == math.inf else f"{least}..{most}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= most and value < math.inf):
            whole = "a whole number, " if kind is int and math.isnan(value) and "," not in text else ""
            raise argparse.ArgumentTypeError(f"must be {whole}{wanted}, got {text}")
        return value

    return parse


class Lines:
    """Standard error for a log file: drops a bar's carriage returns and its empty last line."""

    def write(self, text):
        text = text.replace("\r", "")
        return sys.stderr.write(text) if text.strip() else len(text)

    def flush(self):
        sys.stderr.flush()


def progress_bar(desc, unit, total=None, left=True, **options):
    """A tqdm bar on a terminal, and a line every 10 s or so in a log file.

    left: whether tqdm says how much time is left. Training has a better estimate of its own.
    """
    from tqdm import tqdm

    if not left:
        options["bar_format"] = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"
    if not sys.stderr.isatty():
        line = LOG_LINE if left else LOG_LINE.replace(", {remaining} left", "")
        options |= {"bar_format": line, "delay": 10, "mininterval": 10, "miniters": 1, "position": 0, "file": Lines()}
    return tqdm(desc=desc, unit=unit, total=total, dynamic_ncols=True, **options)
