"""files.py: leftovers that are tidied."""

import os

from svd_parts.files import tidy


def test_a_leftover_goes_and_what_a_link_points_to_stays(tmp_path, capsys):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big")
    (tmp_path / ".file.part").write_text("x")
    for name in ("folder", "link", ".file.part", "nothing"):
        tidy([tmp_path / name])
    assert os.listdir(tmp_path) == ["big"] and capsys.readouterr() == ("", "")


def test_what_cannot_be_removed_is_a_warning(tmp_path, capsys):
    (tmp_path / "checkpoint-1" / "x").mkdir(parents=True)
    (tmp_path / ".checkpoint-1.gone" / "busy").mkdir(parents=True)  # an earlier one, in whose place none can go
    tidy([tmp_path / "checkpoint-1"])
    printed = capsys.readouterr().err
    assert printed.startswith(f"warning: {tmp_path}/checkpoint-1: cannot be removed") and printed.count("\n") == 1
