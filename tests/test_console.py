"""Printing that ends no run, one-line errors, the command line's own errors, and what Ctrl-C says."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, run

import infer_svd
import prepare_dataset
import train_svd
from svd_parts.console import Parser, check_launcher, number, progress_bar, run_script
from svd_parts.files import UserError


@pytest.mark.parametrize(
    "body, status, message",
    [
        ("raise OSError(30, 'Read-only file system', '/data/x')", 1, "error: /data/x: Read-only file system"),
        ("raise PermissionError(13, 'Permission denied', 'out')", 1, "error: out: Permission denied"),
        ("raise OSError('two\\nlines')", 1, "error: two lines"),
        ("raise UserError('\u89c6\u9891\\udcff')", 2, r"error: \u89c6\u9891\udcff"),
        ("print('\u89c6\u9891\\udcff')", 0, r"\u89c6\u9891\udcff"),
    ],
)
def test_errors_and_names_that_no_terminal_shows_are_one_line(body, status, message, tmp_path):
    script = f"from svd_parts.console import run_script, UserError\ndef main():\n    {body}\nrun_script(main)\n"
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    env = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = run(tmp_path / "script.py", ok=not status, env=env)
    assert (done.returncode, done.stdout) == (status, message + "\n")


@pytest.mark.parametrize("script", ["train_svd.py", "infer_svd.py"])
def test_ctrl_c_while_torch_is_imported_is_one_line(script, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise KeyboardInterrupt")
    flags = ["--pretrained_model_name", TINY, "--dataset_dir", tmp_path, "--output_dir", tmp_path / "out"]
    if script == "infer_svd.py":
        flags = ["--model_dir", TINY, "--input_image", make_picture(tmp_path), "--output_video", tmp_path / "x.mp4"]
    done = run(script, *flags, ok=False, env={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout.strip()) == (130, "stopped; run the same command again to go on")


def make_picture(folder):
    from PIL import Image

    Image.new("RGB", (96, 64)).save(folder / "picture.png")
    return folder / "picture.png"


@pytest.mark.parametrize("script", [prepare_dataset, train_svd, infer_svd])
def test_an_option_of_several_values_that_is_given_twice_adds_up(script):
    parser = script.build_parser()
    lists = [action for action in parser._actions if action.nargs == "+"]
    for action in parser._actions:
        action.required = False
    for action in lists:
        flag, kind = action.option_strings[0], action.type or str
        given = vars(parser.parse_args([flag, "1", "2", flag, "3"]))[action.dest]
        assert given == [kind("1"), kind("2"), kind("3")], flag
    assert lists


@pytest.mark.parametrize("script", [prepare_dataset, train_svd, infer_svd])
def test_every_option_but_help_stands_in_a_group_of_the_help(script):
    for group in script.build_parser()._action_groups:
        ungrouped = group.title in ("positional arguments", "optional arguments", "options")  # argparse's own
        flags = [action.dest for action in group._group_actions]
        assert flags in ([], ["help"]) if ungrouped else 0 < len(flags) < 25, group.title


@pytest.mark.parametrize("script", ["prepare_dataset.py", "train_svd.py", "infer_svd.py"])
def test_help_and_mistakes_are_answered_without_torch(script, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')")
    env = {"PYTHONPATH": str(tmp_path)}
    assert "--output_" in run(script, "--help", env=env).stdout
    done = run(script, "--no_such_option", 1, ok=False, env=env)
    assert done.returncode == 2 and done.stdout.startswith("error: ") and done.stdout.count("\n") == 1, done.stdout
    assert f"{script} --help" in done.stdout


def test_the_command_line_s_errors_are_one_line_with_the_nearest_option(capsys):
    parser = Parser(prog="x.py", advice={"--prompt": "SVD takes no text"}, stray="quote a pattern")
    parser.add_argument("--trainable", choices=["temporal", "all"])
    parser.add_argument("--fps", type=number(float, 1, 240), nargs="+")

    def said(*words):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(list(words))
        assert ended.value.code == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ") and text.count("\n") == 1 and "(all options: python x.py --help)" in text
        return text

    assert "unrecognized arguments: --trainable_layers; did you mean --trainable?" in said("--trainable_layers", "all")
    assert "unrecognized arguments: --prompt; SVD takes no text" in said("--prompt", "a robot")
    parser.add_argument("--width", type=number(int, 1))
    assert "--fps must be 1..240, got 7,5; give several with spaces between them" in said("--fps", "7,5")
    assert "--width must be at least 1, got 1,2; give one number" in said("--width", "1,2")
    assert "--width must be a whole number, at least 1, got eight" in said("--width", "eight")
    assert "unrecognized arguments: b.png c.png; quote a pattern" in said("b.png", "c.png")
    assert "--fps must be 1..240, got 60,120; give several with spaces between them" in said("--fps", "60,120")
    assert "got nan" in said("--fps", "nan")
    assert parser.parse_args(["--fps", "7", "8.5"]).fps == [7, 8.5]


@pytest.mark.parametrize("closed", ["stdout", "both"])
def test_nobody_hears_and_the_work_goes_on(closed, tmp_path):
    """A reader that goes away (EPIPE) and streams that were closed from the start (>&-) end nothing."""
    script = "import sys\nfrom svd_parts.console import progress_bar, run_script\ndef main():\n"
    script += (
        "    for number in range(3):\n        print('x' * 100_000)\n        print('y' * 100_000, file=sys.stderr)\n"
    )
    script += "    bar = progress_bar('work', 'step', 9)\n    bar.update(9)\n    bar.close()\n"
    script += "    open(sys.argv[1], 'w').write('saved')\n    return 3\nrun_script(main)\n"
    (tmp_path / "script.py").write_text(script)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} {tmp_path}/script.py {tmp_path}/{{}} {{}}"
    whole = f"({command.format('a', '2>&1' if closed == 'both' else '')}; echo $? > {tmp_path}/status) | true"
    subprocess.run(["sh", "-c", whole], env=env, timeout=60, stderr=subprocess.DEVNULL)
    assert (tmp_path / "a").read_text() == "saved" and (tmp_path / "status").read_text() == "3\n"
    redirected = command.format("b", ">&- 2>&-" if closed == "both" else ">&-")
    assert subprocess.run(["sh", "-c", redirected], env=env, timeout=60, stderr=subprocess.DEVNULL).returncode == 3
    assert (tmp_path / "b").read_text() == "saved"  # and not what was printed


def test_a_log_file_has_each_line_at_once(tmp_path):
    body = "print('a line')\n    os.kill(os.getpid(), signal.SIGKILL)"
    script = f"import os, signal\nfrom svd_parts.console import run_script\ndef main():\n    {body}\nrun_script(main)\n"
    (tmp_path / "script.py").write_text(script)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open(tmp_path / "log", "w") as log:
        command = [sys.executable, tmp_path / "script.py"]
        assert subprocess.run(command, stdout=log, env={**env, "PYTHONPATH": str(ROOT)}).returncode == -9
    assert (tmp_path / "log").read_text() == "a line\n"


def test_a_log_file_gets_a_line_now_and_then(capsys):
    bar = progress_bar("generating", "step", 400)
    bar.start_t -= 60
    bar.last_print_t -= 60
    bar.update(10)
    bar.close()
    text = capsys.readouterr().err
    assert text.startswith("generating: 10 of 400 steps after 01:00, 39:00 left\n") and "\r" not in text, text


def test_the_home_folder_is_found_where_the_shell_leaves_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["x", "--output_dir=~/out", "@~/list", "~/a", "--task", "a ~ b", "~no-such/x"])
    with pytest.raises(SystemExit):
        run_script(lambda: 0)
    home = str(tmp_path)
    assert sys.argv[1:] == [f"--output_dir={home}/out", f"@{home}/list", f"{home}/a", "--task", "a ~ b", "~no-such/x"]


LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "there", [{}, LAUNCHED, {"WORLD_SIZE": "1"}, {"MASTER_ADDR": "localhost"}, {"LOCAL_RANK": "-1"}, {"RANK": "0"}]
)
def test_a_whole_environment_of_a_launcher_or_none_is_taken(there, monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    check_launcher()


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP"])
def test_ways_of_a_launcher_that_are_not_known_here_are_refused(name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "false")
    check_launcher()
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=f"unset ACCELERATE_USE_{name}, or"):
        check_launcher()


@pytest.mark.parametrize("there", [("WORLD_SIZE",), ("LOCAL_RANK", "RANK"), ("WORLD_SIZE", "RANK", "LOCAL_RANK")])
def test_a_part_of_it_is_refused_by_name(there, monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name in there:
        monkeypatch.setenv(name, LAUNCHED[name])
    with pytest.raises(UserError, match=f"{there[0]}=. is set in the environment, but .* not: unset "):
        check_launcher()
