"""files.py: files that are whole or not there, and leftovers that are tidied."""

import os

import pytest

from svd_parts.files import replacing, tidy, write_file


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


def test_what_is_written_is_whole_or_as_it_was(tmp_path):
    write_file(tmp_path / "x", "before")
    (tmp_path / ".f.part").mkdir()
    (tmp_path / ".f.part" / "half").write_bytes(b"left by a killed run")
    for path, folder in ((tmp_path / "x", False), (tmp_path / "f", True)):
        with pytest.raises(OSError, match="full"), replacing(path, folder) as aside:
            assert not path.is_dir() and not (aside / "half").exists()
            (aside / "y" if folder else aside).write_bytes(b"after")
            raise OSError("full")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "before"
    with replacing(tmp_path / "f", folder=True) as aside:
        (aside / "y").write_bytes(b"after")
        assert not (tmp_path / "f").exists()
    assert (tmp_path / "f" / "y").read_bytes() == b"after"
