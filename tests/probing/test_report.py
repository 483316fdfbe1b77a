"""What a report says of a folder, read as HTML: complete and honest."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import report_folders
import tiny_run
from report_folders import (
    PROTOCOL,
    add_probes,
    evaluation,
    make_lean_run,
    make_run,
    write_metrics,
)
from report_page import read, titles

from hippocampus import report
from hippocampus.errors import ConfigError
from hippocampus.evaluation.result_table import Column, ResultTable
from hippocampus.probing.report import Facts, Listing, Section, write_page, write_report
from hippocampus.probing.report.blocks import command_line
from hippocampus.probing.report.curves import training_curves
from hippocampus.probing.report.series import read_series, thin
from hippocampus.probing.results import SuiteResult


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("report") / "run",
                   model__paths=("ssm", "hopfield", "attention"))
    add_probes(run)
    return run


@pytest.fixture(scope="module")
def page(folder):
    return write_report(folder)


@pytest.fixture(scope="module")
def lean(tmp_path_factory):
    return make_lean_run(tmp_path_factory.mktemp("report") / "lean")


# ---------------------------------------------------------------- what it says

def test_every_series_of_the_metrics_has_a_picture(page):
    shown = titles(page)
    for title in ("Training and validation loss", "Validation, bits per byte", "Gates",
                  "Gate entropy", "Retrieval depth", "Loss of every pass", "Total", "z-loss",
                  "Label smoothing", "Segment flow", "Depth straightness", "Learning rate",
                  "Gradient norm", "Speed", "Model FLOPs utilisation", "Peak memory",
                  "Skipped steps", "memory/of_tomorrow"):
        assert title in shown


def test_the_curves_come_before_tables_and_probes(page):
    order = re.findall(r'<section id="([\w-]+)"', page.read_text())
    assert order[:4] == ["training", "machine", "evaluations", "samples"]
    assert set(order[4:]) == {"paths", "gates", "tokens"}


def test_it_says_what_is_needed_to_make_it_again(folder, page):
    text = read(page).text
    assert f"This page: python -m hippocampus.report --workdir={folder}" in text
    for needed in ("0123456789ab", "2 x NVIDIA H100", "jax 0.10.2", "seed 0",
                   "python -m hippocampus.train --config=configs/tiny.py",
                   "python -m hippocampus.evaluate --workdir=run --stride=32",
                   "python -m hippocampus.probe --workdir=run --suite=paths",
                   "8,192 tokens predicted", "vocabulary 256; context 128, stride 128"):
        assert needed in text


def test_settings_that_differ_stand_beside_their_defaults(page):
    text = page.read_text()
    rows = text.replace("<wbr>", "")
    assert '<th scope="row">model.d_model</th><td>16</td><td>256</td>' in rows
    assert '<th scope="row">model.rope_theta</th>' not in rows
    assert "rope_theta" in text  # in the whole config


def test_the_numbers_are_those_of_the_files(folder, page):
    text = read(page).text
    final = json.loads((folder / "results.json").read_text())
    assert f"{final['final/bits_per_byte']:.3f}" in text
    change = final["final/loss"] / report_folders.COUNTED["trigram"] - 1
    assert f"{change:+.1%}" in text
    assert "82.3%" in text  # of the seconds were training: 100 of 121.5
    for cell in ("3.3000", "27.11", "4.7609"):  # the unigram line
        assert cell in text


def test_the_loss_of_a_run_is_drawn_with_the_count_based_lines(page):
    text = page.read_text()
    assert text.count("trigram 2.05</text>") == 2  # for a wide and for a narrow screen
    assert "trigram 2.96</text>" in text  # in bits per byte
    assert "Above the picture: uniform 5.55" in text


def test_count_based_lines_far_above_the_curves_do_not_flatten_them():
    """A pretrained decoder begins where no count gets to."""
    rows = [{"step": step, "train/loss": 3.2 - step / 500, "eval/loss": 3.1}
            for step in range(10, 110, 10)]
    plot = training_curves(rows, {"bigram": 7.6605, "trigram": 7.7652}, None).wide
    assert plot.caption == "Above the picture: bigram 7.66, trigram 7.77 nats."
    assert "7.66</text>" not in plot.svg
    near = training_curves(rows, {"bigram": 3.3, "trigram": 3.302}, None).wide
    heights = [float(re.search(rf' y="([\d.]+)"[^<]*>{name}<', near.svg)[1])
               for name in ("bigram 3.30", "trigram 3.30")]
    assert abs(heights[0] - heights[1]) > 7  # texts of as many points


def test_a_flagged_row_is_marked_by_more_than_its_colour(page):
    row = re.search(r'<tr class="flagged">.*?</tr>', page.read_text(), re.DOTALL)
    assert row and "only_<wbr>hop" in row[0] and "unigram" in row[0]
    assert read(page).text.count("only_hop !") == 1


def test_the_same_folder_gives_the_same_bytes(folder, page, tmp_path):
    assert write_report(folder, tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_an_unfinished_run_without_probes_says_where_it_is(tmp_path):
    path = write_report(make_run(tmp_path / "run", finished=False))
    assert "step 300 of 600" in read(path).text
    assert "Evaluations" not in path.read_text() and "Training and validation loss" in titles(path)


def test_a_run_that_has_logged_nothing_has_a_page(tmp_path):
    run = make_run(tmp_path / "run", finished=False)
    write_metrics(run, [])
    shutil.rmtree(run / "samples")
    assert "Nothing measured yet" in read(write_report(run)).text


def test_rows_without_a_finite_loss_are_counted_and_not_drawn(tmp_path):
    run = make_run(tmp_path / "run")
    rows = [{"step": step, "train/loss": 2.0, "train/total": 2.0} for step in range(10, 600, 10)]
    for row in rows[30:33]:
        row["train/loss"] = None  # as NaN is written
    rows[40]["train/total"] = "NaN"
    write_metrics(run, rows)
    path = write_report(run)
    assert "no finite loss: 3 logged steps" in read(path).text
    assert not re.search(r"\bnan\b", path.read_text(), re.IGNORECASE)


def test_a_run_without_any_finite_number_has_a_page(tmp_path):
    run = make_run(tmp_path / "run", finished=False)
    write_metrics(run, [{"step": 10, "train/loss": None, "train/total": None,
                         "train/grad_norm": None}])
    assert "no finite loss" in read(write_report(run)).text.lower()


def test_a_long_run_has_a_page_of_bounded_size(tmp_path):
    run = make_run(tmp_path / "run", finished=False, steps=20_000, every=1)
    size = write_report(run).stat().st_size
    assert size < 600_000 < (run / "metrics.jsonl").stat().st_size / 5


def test_trouble_on_the_way_is_told_first(lean, tmp_path):
    run = shutil.copytree(lean, tmp_path / "run")
    write_metrics(run, [{"step": 10, "train/loss": 2.0, "train/skipped": 1.0}])
    (run / "rollbacks.json").write_text(json.dumps([{"at": 340, "to": 300, "offset": 40}]))
    (run / "bad_batches").mkdir()
    (run / "bad_batches" / "step_340.json").write_text("{}")
    text = read(write_report(run)).text
    assert "went back from step 340 to step 300" in text and "step_340.json" in text
    assert "steps skipped: 1" in text
    assert text.index("went back") < text.index("Training and validation")


def test_a_recall_run_shows_its_accuracy(tmp_path):
    run = make_run(tmp_path / "run")
    write_metrics(run, [{
        "step": step, "eval/loss": 1.0, "eval/loss_raw": 1.0, "eval/accuracy": step / 100,
        "eval/accuracy_raw": step / 200, "eval/accuracy_64x4": 1.0} for step in (10, 50, 90)])
    (run / "results.json").write_text(json.dumps({"step": 90, "final/accuracy": 0.875}))
    content = evaluation(accuracy={"ema": {"all": 0.875, "64x4": 0.9375}, "raw": {"all": 0.5}})
    content["text"]["bytes"] = 0
    (run / "data.json").write_text(json.dumps({"tokenizer": "b" * 64, "validation_bytes": 0}))
    (run / "evaluations" / "validation-step600-c128-s128.json").write_text(json.dumps(content))
    path = write_report(run)
    assert {"Accuracy", "Accuracy by kind", "Right answers"} <= set(titles(path))
    found = read(path).text
    assert "87.5%" in found and "64x4 0.9375 -" in found
    assert "bits per byte" not in path.read_text()  # a task has no bytes
    assert "unigram 3.30" in path.read_text()


def test_an_exported_model_has_a_page(folder, tmp_path):
    content = json.loads((folder / "config.json").read_text())
    content["export"] = {"step": 600, "weights": "ema", "storage": "float32", "tokenizer": "b" * 64,
                         "text": None, "version": "0.1.0", "format": 1}
    (tmp_path / "config.json").write_text(json.dumps(content))
    shutil.copytree(folder / "probes", tmp_path / "probes")
    text = read(write_report(tmp_path)).text
    assert "exported model" in text and "Which memory carries the prediction" in text


def test_a_page_asks_nobody_for_anything(page):
    addresses = [(tag, value) for tag, name, value in read(page).attributes
                 if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster")]
    assert addresses
    assert not [(tag, value) for tag, value in addresses
                if not value.startswith(("#", "data:image/"))]
    text = page.read_text()
    assert "default-src 'none'" in text and "@import" not in text
    assert not re.findall(r"url\((?!#)", text)


# ---------------------------------------------------------------- the verb

def test_no_run_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, "-m", "hippocampus.report", f"--workdir={tmp_path}"],
                          capture_output=True, text=True, env=tiny_run.environment())
    assert (done.returncode, done.stdout) == (66, "")
    assert re.fullmatch(r"error: no run folder at .*\nhint: .*\n", done.stderr)


@pytest.mark.parametrize("out", ["a/page.html", "b", "x" * 300])
def test_a_place_that_cannot_be_written_is_one_line(lean, tmp_path, out):
    (tmp_path / "a").write_text("a file")
    (tmp_path / "b").mkdir()
    with pytest.raises(ConfigError) as error:
        report.main([f"--workdir={lean}", f"--out={tmp_path / out}"])
    assert error.value.hint and "\n" not in error.value.message


def test_the_verb_writes_where_it_is_told_and_prints_the_path(lean, tmp_path):
    out = tmp_path / "new" / "page.html"
    done = subprocess.run(
        [sys.executable, "-m", "hippocampus.report", f"--workdir={lean}", f"--out={out}"],
        capture_output=True, text=True, env=tiny_run.environment())
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}\n", "")
    assert out.read_bytes() == write_report(lean, tmp_path / "same.html").read_bytes()
    assert [p.name for p in out.parent.iterdir()] == ["page.html"]


# ---------------------------------------------------------------- parts

def test_a_page_of_anything(tmp_path):
    suite = report_folders.knock_outs()
    sections = [suite, (suite, report_folders.ABOUT),
                Section("more", "More", (Listing("text"), Facts((("a", "b"),))))]
    path = write_page(tmp_path / "page.html", "An ablation", {
        "commit": "abc", "command": ["ablate.py", "--config=x.py"], "devices": ["cpu", "cpu"],
        "seeds": [0, 1], "missing": None}, sections)
    found = read(path)
    assert "python -m hippocampus.ablate --config=x.py" in found.text and "2 x cpu" in found.text
    assert "0, 1" in found.text and "missing" not in found.text
    ids = [value for _, name, value in found.attributes if name == "id"
           and not re.match("p[0-9a-f]{10}-", value)]
    assert {"paths-2", "more"} <= set(ids) and len(ids) == len(set(ids))


def test_a_protocol_stands_once_above_the_tables_that_share_it_else_below_each(tmp_path):
    def table(name, protocol):
        return ResultTable(name, name, (Column("n", "row"), Column("v", "value")),
                           ({"n": "a", "v": -0.00001},), (protocol,))

    other = dataclasses.replace(PROTOCOL, step=700)
    for protocols, steps in (((PROTOCOL, PROTOCOL), ["600"]), ((PROTOCOL, other), ["600", "700"])):
        tables = tuple(table(f"t{i}", protocol) for i, protocol in enumerate(protocols))
        text = read(write_page(tmp_path / "page.html", "x", {}, [
            SuiteResult("s", "s", tables)])).text
        assert re.findall(r"average weights, step (\d+)", text) == steps
        assert "-0.0000" not in text and "0.0000" in text


def test_rows_of_several_categories_stand_below_their_names(tmp_path):
    columns = (Column("n", "row"), Column("category", "category"), Column("v", "value"))
    rows = tuple({"n": f"row_{i}", "category": f"kind {i // 2}", "v": i} for i in range(4))
    turns = (rows[0], rows[2], rows[1])
    alone = ({"n": "kind 9", "category": "kind 9", "v": 9}, *rows[:2])
    for shown, wanted in ((rows, ["kind 0", "kind 1"]), (rows[:2], []), (turns, []),
                          (alone, ["kind 0"])):
        path = write_page(tmp_path / "page.html", "x", {}, [SuiteResult(
            "s", "s", (ResultTable("t", "t", columns, shown, (PROTOCOL,)),))])
        text = path.read_text()
        assert re.findall(r'"rowgroup" colspan="2"><span>(.*?)</span>', text) == wanted
        assert "category" not in read(path).text


def test_thinning_keeps_the_mean_and_the_extremes():
    rows = [{"step": step, "x": value} for step, value in enumerate(
        np.random.default_rng(0).normal(size=4000))]
    series = read_series(rows, "x")
    curve = thin(series, 400)
    assert len(curve.values) == 400 and curve.per_point == 10
    np.testing.assert_allclose(curve.values.mean(), series.values.mean())
    assert curve.low.min() == series.values.min() and curve.high.max() == series.values.max()
    np.testing.assert_array_equal(thin(series, 4000).values, series.values)


def test_a_series_is_read_in_order_without_what_is_no_number():
    rows = [{"step": 3, "x": 3.0}, {"step": 1, "x": 1}, {"step": 2, "x": None}, {"step": 4},
            {"step": 5, "x": "1"}, {"step": 6, "x": True}, {"step": 7, "x": 10**400}, {"x": 1.0}]
    series = read_series(rows, "x")
    assert series.steps.tolist() == [1, 3] and series.values.tolist() == [1, 3]
    assert series.broken == 4


def test_a_recorded_command_is_shown_as_one_types_it():
    assert command_line(["train.py", "--config=a b.py"]) == (
        "python -m hippocampus.train '--config=a b.py'")
    assert command_line(["benchmark.py", "x"]) == "python benchmark.py x"
    assert command_line(None) == "" and command_line("make it") == "make it"
