"""`--profile` on a real run: the table comes from a trace that JAX has written."""

import json

import pytest
import tiny_run
from hippocampus.errors import ConfigError, DataError
from hippocampus.profiling.components import COMPONENTS
from hippocampus.profiling.profiler import Profiler
from hippocampus.profiling.trace import read_trace
from hippocampus.training.loop import fit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tiny_run.config(train__steps=6, model__d_model=32, train__grad_accumulation=2)
    return fit(config, tmp_path_factory.mktemp("profiled") / "run", watcher=Profiler(2))


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
    assert seconds["other"] < 0.15 * sum(seconds.values())
    backward = {part["name"]: part["backward"] for part in profile["components"]}
    assert backward["attention"] > 0 and backward["optimizer"] == 0


def test_the_run_goes_on_and_its_trace_stays(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 6
    assert rows[-1]["time/profile"] > 0
    assert list((folder / "profile").glob("plugins/profile/*/*.trace.json.gz"))
    assert read_trace(folder / "profile")


def test_profiling_changes_no_number(folder, tmp_path):
    plain = fit(tiny_run.config(train__steps=6, model__d_model=32, train__grad_accumulation=2),
                tmp_path / "run")
    assert tiny_run.series(plain) == tiny_run.series(folder)


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
