"""The evaluate and compare verbs on a real run: the numbers, the files, and what they refuse."""

import csv
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_run

import hippocampus.compare
import hippocampus.evaluate
from hippocampus.errors import CheckpointError, ConfigError, DataError, HippocampusError
from hippocampus.runs.run_folder import read_metrics


@pytest.fixture(scope="module")
def run() -> Path:
    return tiny_run.trained()


def evaluate(run: Path, out: Path, *flags: str) -> dict:
    """The JSON file of an evaluation."""
    before = set(out.glob("*.json")) if out.exists() else set()
    hippocampus.evaluate.main([f"--workdir={run}", f"--out={out}", *flags])
    (made,) = set(out.glob("*.json")) - before
    return json.loads(made.read_text())


def rows(content: dict) -> dict[str, dict]:
    return {row["weights"] or row["model"]: row for row in content["rows"]}


def validation_text() -> str:
    text = tiny_run.corpus().read_text()
    return text[len(text) * 90 // 100:]


def test_evaluation_is_that_at_the_end_of_the_training_to_the_last_digit(run, tmp_path):
    results = json.loads((run / "results.json").read_text())
    trained = json.loads((run / results["evaluation"]).read_text())
    again = evaluate(run, tmp_path)
    assert again["rows"] == trained["rows"] and again["step"] == results["step"]
    assert again["text"] == trained["text"] and again["windows"] == trained["windows"]
    assert (results["context"], results["stride"]) == (16, 16)
    found = rows(again)
    assert found["ema"]["nats_per_token"] == results["final/loss"]
    assert found["raw"]["nats_per_token"] == results["final/loss_raw"]
    assert found["ema"]["bits_per_byte"] == results["final/bits_per_byte"]
    assert found["ema"]["word_perplexity"] == results["final/word_perplexity"]


def test_metrics_are_those_of_the_text_by_hand(run, tmp_path):
    content = evaluate(run, tmp_path)
    text, found = validation_text(), rows(content)["ema"]
    n = len(text.encode()) - 1
    words = len(text.split()) + 1  # one line without a line end
    assert content["text"]["tokens"] == content["text"]["bytes"] == n
    assert content["text"]["words"] == words and content["text"]["unknown_rate"] == 0
    nats = found["nats_per_token"]
    assert found["perplexity"] == pytest.approx(math.exp(nats))
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2))
    assert found["word_perplexity"] == pytest.approx(math.exp(nats * n / words))
    assert rows(content)["uniform"]["bits_per_byte"] == pytest.approx(8)
    assert content["tokenizer"]["vocabulary"] == 256 and content["tokenizer"]["kind"] == "bytes"
    train = np.frombuffer(tiny_run.corpus().read_bytes(), np.uint8)[:-n - 1]
    cost = -np.log((np.bincount(train, minlength=256) + 1) / (len(train) + 256))
    wanted = cost[np.frombuffer(text.encode(), np.uint8)[1:]].mean()
    assert rows(content)["unigram"]["nats_per_token"] == pytest.approx(wanted)


def test_text_file_is_scored_as_the_python_interface_scores_it(run, tmp_path, capsys):
    from hippocampus import load

    text = validation_text()[:300] + "\n\nélan \N{SNOWMAN}\n"
    (tmp_path / "my text.txt").write_text(text, encoding="utf-8")
    content = evaluate(run, tmp_path / "out", f"--text={tmp_path / 'my text.txt'}")
    score, found = load(run).score(text), rows(content)["ema"]
    assert content["text"]["tokens"] == score.tokens and content["text"]["bytes"] == score.bytes
    assert content["text"]["words"] == score.words
    assert found["nats_per_token"] == pytest.approx(score.nats_per_token, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-6)
    assert found["word_perplexity"] == pytest.approx(score.word_ppl, rel=1e-5)
    assert list((tmp_path / "out").glob("text-my_text-*-step12-c16-s16.csv"))
    printed = capsys.readouterr().out
    assert "my text.txt (sha256 " in printed and "unigram" in printed


def test_stride_and_context_are_used_recorded_and_named(run, tmp_path, capsys):
    disjoint = rows(evaluate(run, tmp_path))["ema"]["nats_per_token"]
    content = evaluate(run, tmp_path, "--context=24", "--stride=6", "--batch_size=5")
    assert content["windows"] == {"context": 24, "stride": 6, "batch_size": 5,
                                  "documents": "joined", "trained_context": 16}
    assert (tmp_path / "validation-step12-c24-s6.csv").is_file()
    assert content["text"]["tokens"] == len(validation_text()) - 1
    found = rows(content)["ema"]["nats_per_token"]
    assert found != disjoint and abs(found - disjoint) < 0.3
    printed = capsys.readouterr().out
    assert "context 24, stride 6" in printed
    assert "trained on windows of 16 tokens and evaluated on 24" in printed


def test_printed_table_names_text_tokenizer_windows_and_smoothing(run, tmp_path, capsys):
    content = evaluate(run, tmp_path)
    printed = capsys.readouterr().out
    text = " ".join(printed.split())
    for part in (content["text"]["digest"][:12], content["tokenizer"]["digest"][:12],
                 "vocabulary 256", "OOV 0.00%", "context 16, stride 16", "uniform", "unigram",
                 "bigram", "trigram", "add-one smoothing", "Witten-Bell", "nats/token",
                 "bits/byte", "ppl/word", "average weights", "raw weights",
                 f"{rows(content)['ema']['nats_per_token']:.4f}"):
        assert part in text
    lines = printed.splitlines()
    assert max(map(len, [line for line in lines if not line.startswith("/")])) <= 80
    assert lines[-1] == str(tmp_path / "validation-step12-c16-s16.json")


def test_csv_and_json_hold_the_same_numbers(run, tmp_path):
    content = evaluate(run, tmp_path)
    with (tmp_path / "validation-step12-c16-s16.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(content["rows"]) == 6
    for row, line in zip(content["rows"], table, strict=True):
        for name in ("nats_per_token", "perplexity", "bits_per_byte", "word_perplexity"):
            assert float(line[name]) == row[name]
        assert line["weights"] == (row["weights"] or "") and line["model"] == row["model"]
        assert line["tokenizer_digest"] == content["tokenizer"]["digest"]
        assert (line["step"], line["context"], line["stride"]) == ("12", "16", "16")
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_one_kind_of_weights_has_a_file_of_its_own(run, tmp_path, weights):
    both = rows(evaluate(run, tmp_path))
    one = rows(evaluate(run, tmp_path, f"--weights={weights}"))
    assert one[weights] == both[weights] and len(one) == 5
    assert (tmp_path / f"validation-step12-c16-s16-{weights}.json").is_file()


def test_windows_of_the_training_are_those_of_the_config():
    from hippocampus.training.data import read_data

    config = tiny_run.config(eval__stride=4, eval__context=12, eval__batch_size=5)
    windows = read_data(config).windows(config, 7)
    assert (windows.context, windows.stride, windows.batch_size) == (12, 4, 5)
    assert windows.max_windows == 7 and windows.document_starts is None
    config = tiny_run.config(data__documents="packed")
    windows = read_data(config).windows(config, 0)
    assert (windows.context, windows.stride) == (16, 0)
    assert windows.document_starts.tolist() == [0]


@pytest.mark.full
def test_evaluation_while_training_uses_the_strided_windows_of_the_config(tmp_path):
    from hippocampus.training.loop import fit

    run = fit(tiny_run.config(train__steps=2, eval__stride=4, eval__context=12,
                              eval__max_windows=0, eval__every_steps=1), tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    assert (results["context"], results["stride"]) == (12, 4)
    found = evaluate(run, tmp_path / "out", "--step=2")
    assert (found["windows"]["context"], found["windows"]["stride"]) == (12, 4)
    last = [row for row in read_metrics(run / "metrics.jsonl") if "eval/loss" in row][-1]
    assert last["step"] == 2
    for name, weights in (("eval/loss", "ema"), ("eval/loss_raw", "raw")):
        assert rows(found)[weights]["nats_per_token"] == pytest.approx(last[name], rel=1e-6)
    assert rows(found)["ema"]["word_perplexity"] == pytest.approx(
        last["eval/word_perplexity"], rel=1e-4)


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize(("flags", "error", "words"), [
    (["--stride=17"], ConfigError, "--stride=17 is more than the context of 16"),
    (["--stride=-1"], ConfigError, "--stride is -1"),
    (["--context=0"], ConfigError, "--context is 0"),
    (["--batch_size=0"], ConfigError, "--batch_size is 0"),
    (["--context=8", "--stride=9"], ConfigError, "--stride=9 is more than the context of 8"),
    (["--split=test"], DataError, "has no test split"),
    (["--split=train"], ConfigError, "--split"),
    (["--weights=best"], ConfigError, "--weights"),
    (["--step=7"], CheckpointError, "has no step 7"),
    (["--text=none.txt"], DataError, "there is no file none.txt"),
    (["--text=."], DataError, "cannot be read"),
])
def test_wrong_flags_are_refused_and_nothing_is_written(run, tmp_path, flags, error, words):
    with pytest.raises(error, match=words) as caught:
        hippocampus.evaluate.main([f"--workdir={run}", f"--out={tmp_path / 'out'}", *flags])
    assert isinstance(caught.value, HippocampusError) and caught.value.hint
    assert "\n" not in caught.value.message and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "words"), [
    (b"", "has 0 tokens"), (b"x", "has 1 tokens"), (b"ab\xff", r"not UTF-8 text \(byte 0xff at"),
])
def test_text_that_cannot_be_scored_is_refused(run, tmp_path, content, words):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(DataError, match=words):
        hippocampus.evaluate.main([f"--workdir={run}", f"--text={tmp_path / 'text.txt'}",
                                   f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def edit(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    for name, value in changes.items():
        group, _, field = name.partition("__")
        if field:
            content[group][field] = value
        else:
            content[group] = value
    path.write_text(json.dumps(content))


def test_another_text_than_that_of_the_training_is_refused(copy, tmp_path):
    edit(copy / "data.json", sha256="f" * 64)
    with pytest.raises(DataError, match=r"is not the text that .* was trained on"):
        evaluate(copy, tmp_path / "out")


def test_text_is_scored_without_the_corpus_of_the_training(copy, tmp_path, capsys):
    edit(copy / "config.json", data__corpus=str(tmp_path / "gone.txt"))
    (tmp_path / "text.txt").write_text("the cat sat on the mat")
    content = evaluate(copy, tmp_path / "out", f"--text={tmp_path / 'text.txt'}")
    assert list(rows(content)) == ["uniform", "raw", "ema"]
    assert "no n-gram lines: the training text cannot be read" in capsys.readouterr().out
    with pytest.raises(DataError, match="there is no file"):
        evaluate(copy, tmp_path / "out")


def test_learned_positions_refuse_a_context_beyond_them():
    from hippocampus.evaluation.stand_alone import Request, choose_windows

    config = tiny_run.config(model__position="learned")
    with pytest.raises(ConfigError, match="--context=17 is more than the 16 learned positions"):
        choose_windows(config, Request(context=17))
    assert choose_windows(config, Request(context=16)).context == 16
    assert choose_windows(tiny_run.config(), Request(context=17)).context == 17
    larger = tiny_run.config(model__position="learned", model__max_length=20)
    assert choose_windows(larger, Request(context=20)).context == 20


def test_stride_of_the_run_belongs_to_the_context_of_the_run():
    from hippocampus.evaluation.stand_alone import Request, choose_windows

    config = tiny_run.config(eval__stride=8)
    assert choose_windows(config, Request()).stride == 8
    assert choose_windows(config, Request(context=4)).stride == 0
    assert choose_windows(config, Request(stride=0)).stride == 0


def test_average_of_a_run_that_keeps_none_is_refused(copy, tmp_path):
    edit(copy / "config.json", ema__decay=0.0)
    with pytest.raises(ConfigError, match="keeps no average"):
        evaluate(copy, tmp_path / "out", "--weights=ema")
    assert list(rows(evaluate(copy, tmp_path / "out")))[-1] == "raw"


def test_folder_that_cannot_be_written_is_refused_before_anything_is_computed(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to"):
        hippocampus.evaluate.main([f"--workdir={run}", f"--out={tmp_path / 'file' / 'out'}"])


def test_process_of_a_missing_run_ends_with_66_and_two_lines(tmp_path):
    done = tiny_run.run([sys.executable, "-m", "hippocampus.evaluate",
                         f"--workdir={tmp_path / 'none'}"])
    assert done.returncode == 66 and len(done.stderr.splitlines()) == 2, done.stderr
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- compare

def test_compare_prints_and_writes_tables_and_curves(run, copy, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    edit(copy / "config.json", optimizer__learning_rate=0.5)
    hippocampus.compare.main([str(run), str(copy), f"--out={tmp_path / 'out'}"])
    printed = capsys.readouterr().out
    assert "best bits/byte" in printed and "optimizer.learning_rate" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "comparison.csv", "comparison.json", "curves.png", "curves.svg"]
    (first, second) = json.loads((tmp_path / "out" / "comparison.json").read_text())["runs"]
    results = json.loads((run / "results.json").read_text())
    for found in (first, second):
        assert found["best_nats_per_token"] == results["final/loss"]
        assert found["best_bits_per_byte"] == pytest.approx(results["final/bits_per_byte"])
        assert found["best_word_perplexity"] == pytest.approx(results["final/word_perplexity"])
        assert found["steps"] == 12 and found["tokens"] == 12 * 8 * 16 and found["finished"]


def test_compare_without_matplotlib_prints_and_writes_the_tables_and_says_how_to_get_it(
        run, copy, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    hippocampus.compare.main([str(run), str(copy), f"--out={tmp_path / 'out'}"])
    printed = capsys.readouterr().out
    assert "no curves: matplotlib is not installed (pip install matplotlib pillow)" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "comparison.csv", "comparison.json"]


@pytest.mark.parametrize(("arguments", "error", "words"), [
    ([], ConfigError, "RUN"), (["RUN"], ConfigError, "one run has nothing"),
    (["RUN", "RUN"], ConfigError, "named twice"), (["RUN", "none"], DataError, "no run folder at"),
])
def test_compare_refuses_what_it_cannot_compare(run, tmp_path, monkeypatch, arguments, error,
                                                words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        hippocampus.compare.main([str(run) if a == "RUN" else a for a in arguments])
    assert not list(tmp_path.iterdir())
