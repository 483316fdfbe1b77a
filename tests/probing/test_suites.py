"""Suites on models whose answer is known, and what their tables, files and csv rows say."""

import csv
import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import own_text
import pytest

from hippocampus.config import PATHS
from hippocampus.errors import ConfigError
from hippocampus.evaluation.report import Windows
from hippocampus.probing.probe import about, whole_windows
from hippocampus.probing.results import write_suite
from hippocampus.probing.rows import CSV_COLUMNS, write_results
from hippocampus.probing.suites import SUITES, SkipSuite, choose_suites, run_suites

pytestmark = pytest.mark.usefixtures("quick_compiles")

OWN = ("paths", "shuffle", "segments", "controller")
ORIGINAL = {
    "baseline", "seg_1", "seg_2", "seg_3", "ctrl_normal", "ctrl_shuffle", "ctrl_random", "no_ctrl",
    "only_ssm", "only_hop", "only_attn", "ssm+hop", "ssm+attn", "hop+attn"}
SHORT = dict(zip(PATHS, ("ssm", "hop", "attn"), strict=True))


def rows_of(result):
    """Rows by name; of the same name the first."""
    rows = {}
    for table in result.tables:
        for row in table.rows:
            rows.setdefault(row["name"], row)
    return rows


def run(suite, probe):
    return rows_of(importlib.import_module(SUITES[suite]).run(probe))


def damaged(row):
    """By more than chance, in either direction."""
    return abs(row["delta"]) > 3 * row["delta_stderr"] > 0


@pytest.fixture(scope="module")
def planted(built, tiny_config):
    """(change of the random parameters) -> a probe on the model's own text."""
    model, params = built(own_text.OVERRIDES)
    config = tiny_config(own_text.OVERRIDES)

    @functools.cache
    def make(change=lambda params: params):
        return own_text.probe_of(model, change(params), config)

    return make


@pytest.fixture(scope="module")
def small(built, tiny_config):
    """A probe of two paths and one segment, whose Hopfield memory has a single slot."""
    overrides = {**own_text.OVERRIDES, "model.hopfield.patterns": "slots",
                 "model.hopfield.n_slots": 1, "model.paths": ("hopfield", "attention"),
                 "model.segments.train": 1}
    return own_text.probe_of(*built(overrides), tiny_config(overrides))


@pytest.fixture(scope="module")
def everything(planted):
    """The rows of all suites of one model in which every path speaks."""
    probe = planted()
    return {name: row for suite in OWN for name, row in run(suite, probe).items()}


# ---------------------------------------------------------------- planted models

def test_no_change_improves_a_model_on_its_own_text(everything):
    """And most changes damage it: the entropy of a source is the least loss on it."""
    changed = [row for name, row in everything.items() if row.get("delta_stderr")]
    assert all(row["delta"] > -3 * row["delta_stderr"] for row in changed)
    for name in ("hop+attn", "only_attn", "shuffle_ssm", "shuffle_attn_batch", "seg_1", "no_ctrl",
                 "ctrl_shuffle", "ctrl_random", "shuffle_hop_layer_0"):
        assert damaged(everything[name]), name
    for name in ("ctrl_normal", "seg_2"):
        assert everything[name]["delta"] == everything[name]["delta_stderr"] == 0


@pytest.mark.parametrize("speaker", PATHS)
def test_only_the_path_that_carries_the_signal_is_damaged(speaker, planted):
    """The others say zero. Raw gates, because renormalised ones make the speaker louder."""
    probe = planted(lambda params: own_text.speak_alone(params, speaker))
    assert probe.contributions == {path: pytest.approx(float(path == speaker), abs=1e-6)
                                   for path in PATHS}
    knocked, shuffled = run("paths", probe), run("shuffle", probe)
    for path in PATHS:
        rows = [knocked[f"no_{SHORT[path]}_layer_0_raw"],
                *(shuffled[f"shuffle_{SHORT[path]}{ending}"] for ending in ("", "_batch"))]
        for row in rows:
            assert damaged(row) if path == speaker else row["delta"] == 0, row["name"]
    assert knocked[f"only_{SHORT[speaker]}_raw"]["delta"] == 0


def test_paths_that_the_gates_shut_out_are_not_missed_renormalised_or_not(planted):
    rows = run("paths", planted(lambda params: own_text.gate_only(params, "hopfield")))
    for ending in ("", "_raw"):
        for name in ("only_hop", "ssm+hop", "hop+attn", "no_ssm_layer_0", "no_attn_layer_0"):
            assert rows[name + ending]["delta"] == 0
        for name in ("only_ssm", "ssm+attn", "no_hop_layer_0"):
            assert damaged(rows[name + ending])


def test_a_controller_that_is_ignored_makes_no_difference(planted):
    def ignored(params):
        controller = params["reasoner"]["controller"]
        silent = {**controller, "out": {"kernel": jnp.zeros_like(controller["out"]["kernel"])}}
        return {**params, "reasoner": {"controller": silent}}

    probe = planted(ignored)
    rows = run("controller", probe)
    for name in ("ctrl_normal", "ctrl_shuffle", "ctrl_shuffle_past", "ctrl_random", "no_ctrl"):
        assert rows[name]["delta"] == 0, name
    for row in run("segments", probe).values():  # and every pass repeats the first
        assert abs(row["delta"]) < 1e-6


def test_a_path_that_repeats_one_vector_is_not_damaged_by_a_shuffle(small):
    """A memory with a single slot retrieves that slot, whatever it is asked."""
    shuffled, knocked = run("shuffle", small), run("paths", small)
    for ending in ("", "_batch", "_plain", "_layer_0"):
        assert abs(shuffled[f"shuffle_hop{ending}"]["delta"]) < 1e-6
    assert damaged(shuffled["shuffle_attn"]) and damaged(knocked["only_attn_raw"])


# ---------------------------------------------------------------- rows

def test_the_rows_of_the_original_table_are_there_by_their_names(everything):
    assert set(everything) >= ORIGINAL
    categories = {name: everything[name]["category"] for name in ORIGINAL}
    assert {categories[f"seg_{r}"] for r in (1, 2, 3)} == {"segments"}
    assert {categories[name] for name in ORIGINAL if "ctrl" in name} == {"controller"}
    assert {categories[name] for name in ("only_ssm", "hop+attn")} == {"knockout"}
    assert everything["shuffle_ssm_plain"]["category"] == "shuffle_plain"
    layer = everything["no_hop_layer_0_raw"]
    assert (layer["category"], layer["path"], layer["layer"]) == ("knockout_layer_raw", "hop", 0)


def test_rows_that_a_model_cannot_have_are_left_out(small):
    """One of two paths has no pairs, one of one segment no second pass and no controller."""
    assert set(run("paths", small)) & ORIGINAL == {"baseline", "only_hop", "only_attn"}
    assert "shuffle_ssm" not in run("shuffle", small)
    for suite in ("segments", "controller"):
        with pytest.raises(SkipSuite, match="one segment"):
            run(suite, small)


def test_damage_is_given_over_what_the_changed_paths_contribute(everything):
    shares = {name: everything[f"shuffle_{name}"]["contribution"] for name in SHORT.values()}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    row = everything["only_ssm"]
    assert row["contribution"] == pytest.approx(shares["hop"] + shares["attn"])
    assert row["delta_per_contribution"] == pytest.approx(row["delta"] / row["contribution"])
    assert everything["seg_1"]["contribution"] is None


def test_a_row_that_counting_tokens_would_beat_is_flagged(planted):
    probe = dataclasses.replace(planted(), lines={"unigram": planted().baseline.loss + 0.3,
                                                  "uniform": 9.0})
    rows = run("shuffle", probe)
    flagged = {name for name, row in rows.items() if row["worse_than_unigram"]}
    assert "shuffle_ssm" in flagged and "baseline" not in flagged
    assert "shuffle_attn" not in flagged
    assert rows["shuffle_ssm"]["flag"] == "!" and rows["baseline"]["flag"] == ""
    probe.lines["uniform"] = probe.lines["unigram"]
    assert run("shuffle", probe)["shuffle_ssm"]["flag"] == "!!"


def test_results_are_made_of_the_files_of_the_suites(planted, tmp_path):
    probe = planted()
    for result in run_suites(probe, ("segments", "paths"), lambda line: None):
        write_suite(tmp_path, result, about(probe))
    with open(write_results(tmp_path, tuple(SUITES)), encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0])[:12] == CSV_COLUMNS and tuple(rows[0])[-3:] == (
        "commit", "seed", "command")
    names = [row["name"] for row in rows]
    assert names.count("baseline") == 1 and names.index("only_ssm") < names.index("seg_1")
    assert len(set(names)) == len(names)
    found = next(row for row in rows if row["name"] == "seg_1")
    assert float(found["loss"]) == run("segments", probe)["seg_1"]["loss"]
    assert (found["text"], found["context"], found["seed"], found["worse_than_unigram"]) == (
        "its own text", "16", "0", "False")


# ---------------------------------------------------------------- running

def compilations(suite, probe):
    """How many programs are compiled while a suite runs."""
    compiled = []

    def listen(event, duration, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(about.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        importlib.import_module(SUITES[suite]).run(probe)
    except SkipSuite:
        pass
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return compiled


def test_one_compilation_serves_all_suites_that_change_arrays(planted):
    probe = planted()
    probe.batches, probe.neutral  # noqa: B018 - on the device before the suite begins
    jax.clear_caches()
    assert compilations("paths", probe) == ["jit(_sums)"]
    for suite in OWN[1:]:
        assert compilations(suite, probe) == []


@pytest.mark.full
@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_compiles_once(suite, planted):
    probe = planted()
    probe.baseline  # noqa: B018
    assert len(compilations(suite, probe)) <= 1


def test_suites_run_in_their_order_and_say_what_they_leave_out(small):
    said, done = [], []
    results = run_suites(small, choose_suites("segments,shuffle,paths"), said.append, done.append)
    assert [result.suite for result in results] == ["paths", "shuffle"] and results == done
    assert said[2] == ("segments: left out, the model was trained with one segment: a second pass "
                       "would repeat it")
    assert all(result.seconds > 0 and result.plots for result in results)


def test_one_window_in_a_batch_leaves_out_what_needs_another_row(small):
    alone = dataclasses.replace(small, windows=whole_windows(
        small.text, Windows(own_text.CONTEXT, 0, 1), 2))
    result = importlib.import_module(SUITES["shuffle"]).run(alone)
    assert not any("_batch" in name for name in rows_of(result))
    assert "no shuffle across the batch: there is one window in it" in result.tables[0].notes


@pytest.mark.parametrize(("names", "chosen"), [
    ("", tuple(SUITES)), ("shuffle, paths", ("paths", "shuffle")), ("lens,lens", ("lens",))])
def test_suites_are_chosen_by_name(names, chosen):
    assert choose_suites(names) == chosen


@pytest.mark.parametrize(("names", "message"), [("path", "there is no suite 'path'"),
                                                ("paths,,gates", "there is no suite ''")])
def test_unknown_suites_are_refused(names, message):
    with pytest.raises(ConfigError, match=message):
        choose_suites(names)


def test_the_same_seed_draws_the_same_shuffles_and_another_seed_others(planted):
    probe = planted()
    again, other = (dataclasses.replace(probe, seed=seed) for seed in (0, 1))
    first, second, third = (run("shuffle", one)["shuffle_ssm"]["loss"]
                            for one in (probe, again, other))
    assert first == second != third and np.isfinite(third)
