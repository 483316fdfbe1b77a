"""Tables: numbers by hand, one unit per column, and what must be said below them."""

import csv
import io
import math

import pytest
from rich.console import Console

from hippocampus.evaluation.metrics import bits_per_byte, perplexity, word_perplexity
from hippocampus.evaluation.tables import Measurement, MetricTable, csv_text, number, render

A, B = "a" * 64, "b" * 64


def row(name="model", nats=1.5, tokenizer=A, **changes):
    values = {"bytes_per_token": 1.0, "words_per_token": 0.2, "text": "t", "context": 16,
              "stride": 16}
    return Measurement(name, nats, tokenizer=tokenizer, **{**values, **changes})


def line(name, nats, **changes):
    return row(name, nats, kind="line", context=None, stride=None, **changes)


def test_metrics_are_those_computed_by_hand():
    # Four predictions of 1, 2, 3 and 4 nats over 8 bytes and 2 words.
    assert bits_per_byte(10 / 4, 8 / 4) == pytest.approx(10 / math.log(2) / 8)
    assert perplexity(10 / 4) == pytest.approx(math.exp(2.5))
    assert word_perplexity(10 / 4, 2 / 4) == pytest.approx(math.exp(5))
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8)


@pytest.mark.parametrize("value", [perplexity(1e4), word_perplexity(5, 1e-3),
                                   word_perplexity(5, 0)])
def test_perplexity_beyond_all_floats_is_infinite(value):
    assert value == math.inf


def test_one_tokenizer_has_every_column():
    table = MetricTable((line("unigram", 3.0), row()))
    assert table.header == ("model", "nats/token", "ppl/token", "bits/byte", "ppl/word")
    assert table.cells[1] == ["model", "1.5000", "4.48", "2.1640", "1,808.04"]
    assert table.notes == ()


def test_two_tokenizers_have_no_column_per_token():
    table = MetricTable((row("one"), row("other", tokenizer=B, bytes_per_token=4.0)))
    assert table.header == ("model", "bits/byte", "ppl/word")
    assert [len(cells) for cells in table.cells] == [3, 3]
    text = " ".join(cell for cells in table.cells for cell in cells)
    assert number(1.5, 4) not in text and number(math.exp(1.5), 2) not in text
    (note,) = table.notes
    assert "2 tokenizers (aaaaaaaaaaaa, bbbbbbbbbbbb)" in note


def test_numbers_with_unknown_words_are_starred_and_explained():
    table = MetricTable((row("open"), row("closed", unknown_rate=0.043, tokenizer=B)))
    assert [cells[-1].endswith("*") for cells in table.cells] == [False, True]
    assert [cells[-2].endswith("*") for cells in table.cells] == [False, True]
    assert any("4.30% of the tokens are <unk>" in note and "not comparable" in note
               for note in table.notes)


def test_rows_of_different_texts_or_windows_are_said():
    assert any("2 different texts" in n for n in MetricTable((row(), row(text="u"))).notes)
    assert any("context and stride" in n for n in MetricTable((row(), row(stride=8))).notes)


@pytest.mark.parametrize(("nats", "worse"), [
    (2.9, False), (3.0, False), (3.1, True), (math.nan, True), (math.inf, True)])
def test_model_worse_than_unigram_is_flagged(nats, worse):
    table = MetricTable((line("uniform", 5.0), line("unigram", 3.0), row(nats=nats)))
    assert table.worse_than_unigram(table.rows[2]) is worse
    assert any("worse than the unigram line" in note for note in table.notes) == worse
    assert table.worse_than_unigram(table.rows[0]) is None


def test_unigram_line_of_another_tokenizer_flags_nothing():
    table = MetricTable((line("unigram", 3.0), row(nats=9.0, tokenizer=B)))
    assert table.worse_than_unigram(table.rows[1]) is None


@pytest.mark.parametrize(("value", "text"), [
    (None, "-"), (1234.5, "1,234.50"), (0.0, "0.00"), (2e7, "2.00e+07"), (math.inf, "inf"),
    (math.nan, "nan"), (7_636_650, "7,636,650")])
def test_numbers_are_short_and_honest(value, text):
    assert number(value, 2) == text


def test_table_reads_well_in_a_pipe_of_80_columns():
    table = MetricTable((line("unigram", 3.0), row("this model, average weights", nats=9.0)))
    console = Console(width=80, file=io.StringIO())
    console.print(render("a title\nof two lines", table.header, table.cells, table.notes))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[:2] == ["a title", "of two lines"]
    (shown,) = [text for text in lines if text.startswith("this model")]
    assert shown.split() == ["this", "model,", "average", "weights", "9.0000", "8,103.08",
                             "12.9843", "3.49e+19"]


def test_names_are_not_read_as_markup():
    console = Console(width=80, file=io.StringIO())
    console.print(render("[bold]t", ["[red]h"], [["[x] y"]], ["[i]n"]))
    text = console.file.getvalue()
    assert all(part in text for part in ("[bold]t", "[red]h", "[x] y", "[i]n"))


def test_csv_is_read_back_as_it_was():
    rows = [{"a": 0.1, "b": None, "c": 'x,"y"\nz', "other": 1}, {"a": 1e-300}]
    back = list(csv.DictReader(io.StringIO(csv_text(("a", "b", "c"), rows))))
    assert back == [{"a": "0.1", "b": "", "c": 'x,"y"\nz'}, {"a": "1e-300", "b": "", "c": ""}]
