"""A folder that is damaged, or made by somebody who means harm: what a report does with it."""

import json
import re
import shutil

import pytest
import report_folders
from report_folders import PROTOCOL, add_probes, evaluation, make_lean_run, make_run, write_metrics
from report_page import read, titles

from hippocampus.errors import DataError
from hippocampus.evaluation.result_table import Column, ResultTable
from hippocampus.probing.report import write_report
from hippocampus.probing.report.svg import clean_svg
from hippocampus.probing.results import Plot, SuiteResult, TokenText, write_suite

EVIL = ("<script>pwned()</script><img src=x onerror=pwned()>\"'&</pre></style>{{ 191 * 7 }}"
        "$\\frac$\\")


@pytest.fixture(scope="module")
def lean(tmp_path_factory):
    return make_lean_run(tmp_path_factory.mktemp("report") / "lean")


@pytest.fixture
def hostile(tmp_path):
    """A run folder in which every text is an attack."""
    run = make_run(tmp_path / "run", sample__prompt=EVIL)
    (run / "samples" / "best.txt").write_text(EVIL + "and \x00\x1b[31m\x7f\udcff".encode(
        "utf-8", "replace").decode() + EVIL)
    (run / "data.json").write_text(json.dumps({"sha256": EVIL, "tokenizer": EVIL}))
    (run / "env.json").write_text(json.dumps({
        "commit": EVIL, "command": [EVIL], "devices": [EVIL], "packages": {EVIL: EVIL},
        "platform": EVIL, "python": EVIL, "cpu_count": EVIL}))
    name = "validation-step600-c128-s128.json"
    content = evaluation(notes=[EVIL], command=[EVIL])
    content["text"]["corpus"] = content["tokenizer"]["kind"] = EVIL
    content["tokenizer"]["digest"] = EVIL
    content["rows"][0] |= {"model": EVIL, "nats_per_token": 1.1}
    (run / "evaluations" / name).write_text(json.dumps(content))
    rows = [{"step": step, f"train/{EVIL}": 1.0, EVIL: 2.0, "train/loss": 1.0 + step / 50,
             f"train/nll_segment_{EVIL}\x00": 1.0}
            for step in (10, 20)]
    write_metrics(run, rows)
    table = ResultTable("t", EVIL, (Column("n", EVIL, EVIL), Column("v", EVIL)),
                        ({"n": EVIL, "v": EVIL, "category": EVIL, "flag": EVIL},
                         {"n": "b", "v": 1.0, "category": "other"}), (PROTOCOL,), (EVIL,))
    text = TokenText("x", EVIL, EVIL, (EVIL, "\x00"), (0, 0), (float("1e400"), -1.0), (EVIL,))
    write_suite(run / "probes", SuiteResult("evil", EVIL, (table,), (Plot("p", EVIL, EVIL, (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9" onload="pwned()">'
        '<script>pwned()</script><text>fine</text></svg>')),), (text,), 1.0, (EVIL,)),
        {"command": EVIL, "commit": EVIL, "step": EVIL})
    return run


def test_no_text_of_a_folder_becomes_a_tag(hostile):
    path = write_report(hostile)
    found = read(path)
    assert "script" not in found.tags and "img" not in found.tags
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    assert "pwned()" in found.text and "{{ 191 * 7 }}" in found.text and "1337" not in found.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", path.read_text())


def test_text_that_matplotlib_would_take_for_mathematics_is_drawn_as_it_is(hostile):
    text = write_report(hostile).read_text()
    assert "damaged and cannot be shown" not in text
    assert re.search(r"<text[^>]*>[^<]*\$\\frac\$[^<]* 1\.10</text>", text)
    assert "␀</text>" in text


SVG = ('<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {}>'
       "{}</svg>")


@pytest.mark.parametrize(("attributes", "inside"), [
    ('onload="x()"', ""), ("", '<g onclick="x()"/>'), ("", "<script>x()</script>"),
    ("", '<image xlink:href="https://x.org/a.png"/>'), ("", '<image href="data:text/html,x()"/>'),
    ("", '<use href="other.svg#x"/>'), ("", '<a href="javascript:x()"><text>t</text></a>'),
    ("", "<foreignObject><p>x()</p></foreignObject>"), ("", '<set attributeName="href" to="x()"/>'),
    ("", "<style>body{display:none} x()</style>"), ("", "<style>@import 'x()';</style>"),
    ("", '<rect fill="url(https://x.org)"/>'), ('style="position:fixed; x()"', ""),
    ("", "<text>&lt;script&gt;y()&lt;/script&gt;</text>")])
def test_of_a_picture_only_what_draws_is_kept(attributes, inside):
    shown = clean_svg(Plot("p", "t", "c", SVG.format(attributes, inside)))
    assert "x()" not in shown and "x.org" not in shown and "other.svg" not in shown
    assert "<script" not in shown and "foreignObject" not in shown and "position" not in shown


@pytest.mark.parametrize("text", [
    "", "<svg", "<html/>", "<svg/>", '<!DOCTYPE x [<!ENTITY a "b">]><svg>&a;</svg>'])
def test_what_is_no_picture_is_refused_in_one_line(text):
    with pytest.raises(DataError, match="picture p"):
        clean_svg(Plot("p", "t", "c", text))


def test_a_picture_of_matplotlib_is_kept_whole():
    plot = report_folders.views().plots[0]
    shown = clean_svg(plot)
    for tag in ("path", "image", "use", "text", "clipPath", "g"):
        assert shown.count(f"<{tag}") == plot.svg.count(f"<{tag}") > 0
    assert shown.count("currentColor") == plot.svg.count("currentColor")
    assert "data:image/png" in shown and "<style>" in shown


def test_a_damaged_suite_is_named_and_the_others_are_shown(lean, tmp_path):
    run = shutil.copytree(lean, tmp_path / "run")
    add_probes(run)
    (run / "probes" / "gates.json").write_text("{")
    tokens = run / "probes" / "tokens.json"
    tokens.write_text(tokens.read_text().replace('"classes": [', '"classes": ["one",', 1).replace(
        '"strengths": [', '"strengths": [0.5,', 1).replace('"tokens": [', '"tokens": ["x",', 1))
    text = read(write_report(run)).text
    assert "gates.json" in text and "tokens.json is damaged" in text
    assert "--suite=gates again" in text and "Which memory carries the prediction" in text


@pytest.mark.parametrize("damage", [
    {"text": 3}, {"windows": {"context": "wide"}},
    {"rows": [{"model": "x", "kind": "line", "weights": None, "nats_per_token": {}}]}])
def test_a_damaged_evaluation_does_not_keep_the_rest_from_being_shown(lean, tmp_path, damage):
    run = shutil.copytree(lean, tmp_path / "run")
    (run / "evaluations" / "test-step600.json").write_text(json.dumps({**evaluation(), **damage}))
    text = read(write_report(run)).text
    assert "4.7609" in text and ("test-step600.json is damaged" in text or "rows" in damage)


@pytest.mark.parametrize("content", [
    "", "[3]", "null", '{"step": {}, "at": [], "packages": 3, "evaluation": 4, "sha256": []}'])
def test_small_files_that_are_damaged_cost_only_what_they_said(lean, tmp_path, content):
    run = shutil.copytree(lean, tmp_path / "run")
    for name in ("data.json", "env.json", "results.json", "rollbacks.json"):
        (run / name).write_text(content)
    assert "Training and validation loss" in titles(write_report(run))
