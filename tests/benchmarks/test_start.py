"""`benchmarks/start.py` waits for what a run really says."""

import re

import pytest

from benchmarks.start import MARKS, TRAIN
from hippocampus.training.kept_step import KeptStep, waits_for


@pytest.mark.parametrize("is_there", [False, True])
def test_the_first_start_and_later_ones_are_followed_to_their_first_step(is_there):
    step = object.__new__(KeptStep)
    step.is_there = is_there
    said = ("quickstart: 350,665 parameters, 1 x cpu, float32, in runs/quickstart",
            waits_for(step), "step   1/600  loss 8.3176  lr 6.00e-05")
    for line, (_, mark) in zip(said, MARKS, strict=True):
        assert re.search(mark, line), line
        assert re.search(mark, f"@ 0.02 s @ 0.05 s {line}"), "or two writers hide it"


def test_the_program_of_a_start_can_be_compiled():
    compile(TRAIN.replace("OVER", "0.3"), "start", "exec")
