"""`--profile` on a real run: the table comes from a trace that JAX has written."""

import json
from pathlib import Path

import pytest
import tiny_run

from hippocampus.errors import ConfigError, DataError
from hippocampus.profiling.components import COMPONENTS
from hippocampus.profiling.profiler import Profiler
from hippocampus.profiling.trace import read_trace
from hippocampus.training.loop import fit

CHANGES = {"train__steps": 6, "model__d_model": 32, "train__grad_accumulation": 2}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    command = tiny_run.command(tmp_path_factory.mktemp("profiled") / "run", **CHANGES)
    done = tiny_run.run([*command, "--profile=2"])
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(done):
    return Path(next(argument for argument in done.args
                     if argument.startswith("--workdir=")).removeprefix("--workdir="))


@pytest.fixture(scope="module")
def profile(folder):
    return json.loads((folder / "profile" / "profile.json").read_text())


def test_components_idle_time_and_the_rest_are_the_whole_step(profile):
    parts = sum(part["seconds"] for part in profile["components"])
    assert parts + profile["outside"] + profile["idle"] == pytest.approx(profile["seconds"])
    assert 0 <= profile["idle_between"] <= profile["idle"]
    assert profile["steps"] == 2


def test_what_a_step_does_is_found_by_name(profile):
    seconds = {part["name"]: part["seconds"] for part in profile["components"]}
    assert tuple(seconds) == COMPONENTS
    for name in ("attention", "mlp", "mixer", "norms and residual", "loss", "optimizer"):
        assert seconds[name] > 0
    assert seconds["ssm"] == seconds["hopfield"] == seconds["collectives"] == 0
    assert seconds["other"] < 0.3 * sum(seconds.values())
    backward = {part["name"]: part["backward"] for part in profile["components"]}
    assert backward["attention"] > 0 and backward["optimizer"] == 0


def test_a_profiled_program_knows_the_lines_of_code(folder):
    (trace,) = (folder / "profile").glob("plugins/profile/*/*.xplane.pb")
    assert b"training/step.py" in trace.read_bytes()


def test_the_run_goes_on_and_its_trace_stays(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "time/profile" in row][-1]
    assert last["step"] == 6 and last["time/profile"] > 0
    assert list((folder / "profile").glob("plugins/profile/*/*.trace.json.gz"))
    assert read_trace(folder / "profile")


@pytest.mark.full
def test_profiling_changes_no_number(folder, tmp_path):
    plain = fit(tiny_run.config(**CHANGES), tmp_path / "run")
    assert tiny_run.series(plain) == tiny_run.series(folder)


def test_the_table_is_printed(done):
    assert "mean of 2" in done.stdout and "idle between steps" in done.stdout
    assert "warning" not in done.stdout + done.stderr


def test_a_run_that_is_too_short_says_so(tmp_path):
    with pytest.raises(ConfigError, match="needs 6 steps"):
        fit(tiny_run.config(train__steps=5), tmp_path / "run", watcher=Profiler(5))
    with pytest.raises(ConfigError, match="traces nothing"):
        Profiler(0)


def test_a_missing_or_broken_trace_is_one_clear_line(tmp_path):
    with pytest.raises(DataError, match="no trace"):
        read_trace(tmp_path)
    (tmp_path / "host.xplane.pb").write_bytes(b"no protocol buffer at all")
    with pytest.raises(DataError, match=r"(?s)cannot be read as a trace|no device"):
        read_trace(tmp_path)
