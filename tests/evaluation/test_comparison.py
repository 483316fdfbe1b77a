"""Runs side by side, from what run folders say: numbers, differences, curves, refusals."""

import csv
import io
import json
import math

import pytest
import tiny_run

from hippocampus.config_files import to_json
from hippocampus.devices import resolve
from hippocampus.errors import ConfigError, DataError
from hippocampus.evaluation import curves
from hippocampus.evaluation.comparison import Comparison, differences, read_runs

BYTES, CHARACTERS = "b" * 64, "c" * 64


def losses(step: int) -> tuple[float, float]:
    """Training and validation loss of a made-up run."""
    return 2 + 3 * math.exp(-step / 40), 2.1 + 3 * math.exp(-step / 40)


def make_run(folder, tokenizer=BYTES, bytes_per_token=1.0, text="t" * 64, finished=True,
             steps=200, unknown=0, **changes):
    """What training leaves behind, less the weights."""
    folder.mkdir(parents=True)
    config, automatic = resolve(tiny_run.config(train__steps=steps, **changes))
    (folder / "config.json").write_text(to_json(config, automatic))
    (folder / "data.json").write_text(json.dumps({
        "corpus": "text.txt", "sha256": text, "tokenizer": tokenizer, "train_tokens": 1000,
        "train_bytes": 1000 * bytes_per_token, "validation_tokens": 100,
        "validation_unknown": unknown}))

    def evaluated(prefix, loss):
        return {f"{prefix}/loss": loss, f"{prefix}/bits_per_byte":
                loss / math.log(2) / bytes_per_token,
                f"{prefix}/word_perplexity": math.exp(loss * 5)}

    rows = []
    for step in range(10, steps + 1, 10):
        train, validation = losses(step)
        rows.append({"step": step, "train/loss": train, "train/tokens_per_second": 100.0 + step})
        if step % 50 == 0:
            rows.append({"step": step, **evaluated("eval", validation)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (folder / "results.json").write_text(json.dumps(
            {"step": steps, **evaluated("final", losses(steps)[1])}))
    return folder


@pytest.fixture
def pair(tmp_path):
    return make_run(tmp_path / "a"), make_run(tmp_path / "b", optimizer__learning_rate=5e-3)


def printed(comparison: Comparison, width: int = 80) -> str:
    from rich.console import Console

    console = Console(width=width, file=io.StringIO())
    console.print(comparison.render())
    return console.file.getvalue()


def test_numbers_of_a_run_are_those_of_its_folder(pair):
    first, second = read_runs(pair)
    assert (first.label, second.label) == ("a", "b")
    assert first.steps == 200 and first.tokens == 200 * 8 * 16
    assert first.tokens_per_second == 205
    assert first.best.nats_per_token == losses(200)[1] and first.best_step == 200
    assert first.best.bits_per_byte == pytest.approx(losses(200)[1] / math.log(2))
    assert first.best.word_perplexity == pytest.approx(math.exp(5 * losses(200)[1]))
    wanted = sum(losses(step)[0] for step in range(110, 201, 10)) / 10
    assert first.train_nats == pytest.approx(wanted)


def test_only_settings_that_differ_are_listed(pair):
    assert differences(read_runs(pair)) == {"optimizer.learning_rate": [1e-2, 5e-3]}


def test_parameters_are_counted_from_the_config(tmp_path):
    small, large = read_runs([make_run(tmp_path / "a"), make_run(
        tmp_path / "b", model__n_layers=2)])
    assert 0 < small.parameters < large.parameters


def test_unfinished_run_shows_its_best_evaluation_so_far_and_is_named(tmp_path):
    runs = read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", finished=False)])
    assert runs[1].best_step == 200 and not runs[1].finished
    assert "not finished: b" in printed(Comparison(runs))


def test_run_without_an_evaluation_yet_is_compared_all_the_same(tmp_path):
    fresh = make_run(tmp_path / "b", finished=False)
    (fresh / "metrics.jsonl").write_text("")
    comparison = Comparison(read_runs([make_run(tmp_path / "a"), fresh]))
    assert comparison.runs[1].best is None and "not finished: b" in printed(comparison)
    assert json.loads(comparison.to_json())["runs"][1]["best_nats_per_token"] is None


def test_two_tokenizers_have_no_column_and_no_axis_per_token(tmp_path):
    runs = read_runs([make_run(tmp_path / "a"), make_run(
        tmp_path / "b", tokenizer=CHARACTERS, bytes_per_token=2.0, data__tokenizer="characters")])
    comparison = Comparison(runs)
    text = printed(comparison)
    assert not comparison.per_token
    assert "nats/token" not in text and "ppl/token" not in text
    assert "bits/byte" in text and "2 tokenizers (bbbbbbbbbbbb, cccccccccccc)" in text
    (shown,) = [line.split() for line in text.splitlines() if line.startswith("training bits/byte")]
    assert [float(value) for value in shown[2:]] == pytest.approx(
        [runs[0].train_nats / math.log(2), runs[1].train_nats / math.log(2) / 2], abs=1e-4)
    (_, train), (_, validation) = curves._both(runs[1], comparison)
    assert train[-1] == pytest.approx(losses(200)[0] / math.log(2) / 2)
    assert validation[-1] == pytest.approx(losses(200)[1] / math.log(2) / 2)


def test_one_tokenizer_has_both_and_its_axis_is_per_token(pair):
    comparison = Comparison(read_runs(pair))
    text = printed(comparison)
    assert comparison.per_token and "nats/token" in text and "ppl/token" in text
    (_, train), _ = curves._both(comparison.runs[0], comparison)
    assert train[-1] == losses(200)[0]


def test_different_texts_and_unknown_words_are_said(tmp_path):
    runs = read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", text="u" * 64, unknown=7)])
    text = " ".join(printed(Comparison(runs)).split())
    assert "2 different texts: their numbers do not compare" in text
    assert "7.00% of the tokens are <unk>" in text and "not comparable with an open" in text


def test_files_hold_what_is_printed(tmp_path, pair):
    comparison = Comparison(read_runs(pair))
    csv_path, json_path = comparison.write(tmp_path / "out")
    content = json.loads(json_path.read_text())
    rows = list(csv.DictReader(csv_path.open()))
    assert [run["label"] for run in content["runs"]] == [row["label"] for row in rows] == ["a", "b"]
    for run, row in zip(content["runs"], rows, strict=True):
        for name, value in run.items():
            assert row[name] == ("" if value is None else str(value))
    assert [row["config.optimizer.learning_rate"] for row in rows] == ["0.01", "0.005"]
    assert content["differences"] == {"optimizer.learning_rate": [0.01, 0.005]}
    assert content["format"] == 1 and content["command"]


@pytest.mark.parametrize("width", [80, 100])
def test_tables_of_two_runs_fit_a_pipe(pair, width):
    text = printed(Comparison(read_runs(pair)), width)
    assert max(map(len, text.splitlines())) <= width
    assert "best nats/token" in text and "5e-03" not in text and "0.005" in text


def test_runs_of_the_same_name_are_told_apart_by_the_folder_above(tmp_path):
    runs = read_runs([make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run")])
    assert [run.label for run in runs] == ["x/run", "y/run"]


@pytest.mark.parametrize(("names", "error", "words"), [
    (["a"], ConfigError, "one run has nothing"), (["a", "a"], ConfigError, "named twice"),
    (["a", "none"], DataError, "no run folder at"), (["a", "broken"], DataError, "cannot read"),
])
def test_what_cannot_be_compared_is_refused(tmp_path, names, error, words):
    make_run(tmp_path / "a")
    (make_run(tmp_path / "broken") / "data.json").write_text("{")
    with pytest.raises(error, match=words) as caught:
        read_runs([tmp_path / name for name in names])
    assert caught.value.hint and "\n" not in caught.value.message


def test_curves_are_drawn_the_same_each_time(tmp_path, pair):
    pytest.importorskip("matplotlib")
    comparison = Comparison(read_runs(pair))
    svg, png = curves.draw_curves(comparison, tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text()
    assert text.count("<svg") == 1
    assert curves.draw_curves(comparison, tmp_path)[1].read_bytes() == png.read_bytes()


def test_runs_without_rows_have_no_curves(tmp_path):
    pytest.importorskip("matplotlib")
    folders = [make_run(tmp_path / name, finished=False) for name in "ab"]
    for folder in folders:
        (folder / "metrics.jsonl").unlink()
    assert curves.draw_curves(Comparison(read_runs(folders)), tmp_path) == []
