from svd_parts.files import read_patterns
from svd_parts.samples import hold_out, leave_out

"""samples.py: which clips are held out, and which are left out."""


def test_exclude_takes_names_patterns_and_lists_on_both_sides_and_names_what_matches_nothing(tmp_path, capsys):
    names = [f"{folder}/clip[{number}]" for folder in "ab" for number in range(3)]
    clips = [{"directory": name, "source": name} for name in names]
    (tmp_path / "list.txt").write_bytes(b"a/clip[0]\r\n\r\na/clip[9]\r\n")
    texts = ["b/*[[]1]", "b/clip[2]", "typo*", f"@{tmp_path}/list.txt"]
    patterns = read_patterns(texts, "--exclude")
    everything = hold_out(clips, num_validation_videos=2, seed=0)
    sides = leave_out(everything, patterns)
    for side, whole in zip(sides, everything):
        excluded = ("a/clip[0]", "b/clip[1]", "b/clip[2]")
        assert side == [clip for clip in whole if clip["directory"] not in excluded]
    printed = capsys.readouterr().out
    assert "3 of 6 clips left out" in printed and printed.count("warning: ") == 2
    assert "--exclude typo*: no clip" in printed and "--exclude a/clip[9]: no clip" in printed


def test_all_cameras_of_an_episode_fall_on_one_side(capsys):
    clips = [
        {
            "directory": f"{camera}_{episode}",
            "source": f"videos/chunk-000/observation.images.{camera}/episode_{episode:06d}.mp4",
        }
        for camera in ("front", "side")
        for episode in range(6)
    ]
    training, held_out = hold_out(clips, num_validation_videos=4, seed=0)
    episodes = [{clip["source"][-10:] for clip in side} for side in (training, held_out)]
    assert len(held_out) == 4 and len(episodes[1]) == 2 and not episodes[0] & episodes[1]
    assert "not used" not in capsys.readouterr().out
    training, held_out = hold_out(clips, num_validation_videos=3, seed=0)  # the other camera of the second episode
    assert len(held_out) == 3 and len(training) == 8
    assert "not used: 1 more clip of the held-out episodes" in capsys.readouterr().out
    known = {clip["directory"]: "digest" for clip in held_out}
    assert hold_out(clips, num_validation_videos=3, seed=0, known=known) == (training, held_out)
