"""validation.py: a stop signal ends a validation."""

import signal
import time

from conftest import Launched, moving_square, train_arguments, write_clip

from svd_parts.checkpoints import checkpoints_of


def test_a_stop_signal_during_a_validation_ends_it_within_seconds(dataset, tmp_path):
    for number in range(9):
        write_clip(tmp_path / "held_out" / f"clip{number}", moving_square(8, seed=number))
    output, validation = tmp_path / "out", ["--validation_dir", tmp_path / "held_out", "--validation_steps", 1]
    validation += ["--validation_inference_steps", 25]
    process = Launched("train_svd.py", *train_arguments(dataset, output), "--max_train_steps", 50, *validation)
    deadline = time.time() + 200
    while time.time() < deadline and not list((output / "validation").glob("step-000000/*.mp4")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert "the validation was stopped" in printed and "failed" not in printed
    assert len(list((output / "validation").glob("*/*.mp4"))) < 9  # 2 s each
    assert [path.name for path in checkpoints_of(output)] == ["checkpoint-1"]  # a step at least
    assert '"validation_loss_v"' not in (output / "metrics.jsonl").read_text()
