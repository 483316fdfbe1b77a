import json
import re

import numpy as np
import pytest

from hippocampus.errors import DataError
from hippocampus.evaluation.result_table import Column, Protocol, ResultTable
from hippocampus.probing.plots import INK, SERIES, themed_svg
from hippocampus.probing.results import (
    Plot,
    SuiteResult,
    TokenText,
    read_suite,
    read_suites,
    write_suite,
)

PROTOCOL = Protocol("pydoc", "ab" * 32, "validation", 8192, "bytes", "cd" * 32, 256, 128, 128,
                    "joined", "ema", 600)


def line(figure, label="loss"):
    axes = figure.subplots()
    axes.plot([3.0, 2.0, 1.5], color=SERIES[0], label=label)
    axes.fill_between([0, 1, 2], [3, 2, 1], [3, 3, 3], alpha=0.2, hatch="//")
    axes.set_xlabel("step")
    axes.legend()


def result(suite="paths") -> SuiteResult:
    table = ResultTable("rows", "losses", (Column("name", "row"), Column("loss", "loss")),
                        ({"name": "baseline", "loss": 1.5},), (PROTOCOL,))
    text = TokenText("winner", "who won", "a passage", ("a", "<b>", "\n"), (0, 1, 0),
                     (0.5, 1.0, 0.0), ("ssm", "hop"))
    return SuiteResult(suite, "knock-outs", (table,),
                       (Plot("losses", "losses", "of nothing", themed_svg(line)),), (text,), 1.5,
                       ("two paths only",))


def test_a_suite_comes_back_from_its_files(tmp_path):
    path = write_suite(tmp_path / "probes", result(), {"step": 600})
    found, about = read_suite(path)
    assert found == result()
    assert about == {"step": 600}
    assert {file.name for file in path.parent.iterdir()} == {
        "paths.json", "paths_losses.svg", "paths_rows.csv"}
    assert (path.parent / "paths_rows.csv").read_text().startswith("name,loss,flag,text")


def test_suites_come_in_the_order_that_was_asked_for(tmp_path):
    for name in ("aa", "bb", "cc"):
        write_suite(tmp_path, result(name), {})
    found = [suite.suite for suite, _ in read_suites(tmp_path, ("cc",))]
    assert found == ["cc", "aa", "bb"]
    assert read_suites(tmp_path / "missing") == []


def test_the_file_is_json_that_every_reader_takes(tmp_path):
    about = {"loss": np.float32(np.nan), "n": np.int64(3), "steps": (1, 2)}
    path = write_suite(tmp_path, result(), about)

    def refuse(constant):
        raise AssertionError(constant)

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content["about"] == {"loss": None, "n": 3, "steps": [1, 2]}
    assert content["format"] == 1


@pytest.mark.parametrize("damage", [
    lambda text: text[:100], lambda text: "[]",
    lambda text: text.replace('"format": 1', '"format": 9'),
    lambda text: text.replace('"tables"', '"chairs"'),
    lambda text: text.replace('"tokens": 8192', '"tokens_": 1'),
    lambda text: text.replace("paths_losses.svg", "gone.svg")])
def test_a_damaged_file_is_named_in_one_line(tmp_path, damage):
    path = write_suite(tmp_path, result(), {})
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match=re.escape(str(path))) as error:
        read_suite(path)
    assert "--suite=paths" in error.value.hint and "\n" not in error.value.message


def test_a_picture_is_read_from_its_own_folder_only(tmp_path):
    (tmp_path / "secret.svg").write_text("<svg>secret</svg>")
    path = write_suite(tmp_path / "probes", result(), {})
    path.write_text(path.read_text().replace("paths_losses.svg", "../secret.svg"))
    with pytest.raises(DataError):
        read_suite(path)


def test_a_picture_takes_the_colour_of_the_page():
    svg = themed_svg(line)
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")
    assert INK not in svg and "currentColor" in svg
    assert "#ffffff" not in svg  # no background
    assert ">step<" in svg  # text stays text
    head = svg.split(">", 1)[0]
    assert "viewBox" in head and not re.search(r"\s(width|height)=", head)


def test_the_same_picture_has_the_same_bytes():
    assert themed_svg(line) == themed_svg(line)


def test_pictures_share_no_id_and_every_reference_finds_its_own():
    one, two = themed_svg(line), themed_svg(lambda figure: line(figure, "other"))
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, two)]
    assert ids[0] and not ids[0] & ids[1]
    for svg, own in zip((one, two), ids, strict=True):
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
        assert used and used <= own


def test_the_style_of_a_picture_ends_at_its_border():
    assert "<style>.p" in themed_svg(line) and ">*{" not in themed_svg(line)


def test_a_coloured_text_has_a_colour_per_token():
    with pytest.raises(ValueError, match="2 tokens"):
        TokenText("x", "x", "x", ("a", "b"), (0,), (1.0, 1.0), ("ssm",))
