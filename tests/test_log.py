"""log.py: the time that is left."""

import argparse
import json

import pytest
from accelerate import Accelerator

from svd_parts.log import Log


def test_the_time_left_includes_the_validations_that_are_still_to_come(tmp_path):
    options = argparse.Namespace(output_dir=str(tmp_path), max_train_steps=10, validation_steps=4, report_to=None)
    log = Log(argparse.Namespace(options=options, settings={}, steps=0, accelerator=Accelerator(cpu=True)))
    assert log.seconds_left(1, 2.0) == 18
    log.scores({"loss_v": 1.0}, 100.0)  # of step 0
    assert log.seconds_left(1, 2.0) == 18 + 300  # steps 4, 8 and 10
    assert log.seconds_left(4, 2.0) == 12 + 300  # a step's line is written before its validation
    assert log.seconds_left(10, 2.0) == 100
    assert log.seconds_left(4, 2.0, validated=True) == 12 + 200 and log.seconds_left(10, 2.0, validated=True) == 0
    resumed = Log(argparse.Namespace(options=options, settings={}, steps=3, accelerator=Accelerator(cpu=True)))
    assert resumed.seconds_of_validation == 100


def test_metrics_are_json_also_where_a_number_is_not_finite(trained, tmp_path):
    options = argparse.Namespace(output_dir=str(tmp_path), max_train_steps=1)
    state = argparse.Namespace(options=options, settings={}, steps=0,
        accelerator=Accelerator(cpu=True))  # fmt: skip
    Log(state).append({"step": 1, "loss_v": float("nan"), "grad_norm": float("inf"), "learning_rate": 0.1})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert line == {"step": 1, "loss_v": None, "grad_norm": None, "learning_rate": 0.1}
