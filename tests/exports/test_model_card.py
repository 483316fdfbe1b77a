"""The model card: what the run recorded, and nothing that it did not."""

import dataclasses
import json
import shutil

import pytest
import tiny_run

from hippocampus.evaluation.export_run import Request, export_run
from hippocampus.exports.folder import ExportRecord
from hippocampus.exports.model_card import MISSING, Card, StorageCost
from hippocampus.exports.run_records import RunRecords
from hippocampus.runs.run_folder import RunFolder

NOTHING = RunRecords({}, {}, {}, (), ())


def header(text: str) -> dict:
    yaml = pytest.importorskip("yaml")
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


@pytest.fixture(scope="module")
def card():
    from hippocampus.config_files import read_json

    folder = RunFolder(tiny_run.trained())
    record = ExportRecord(12, "ema", "float32", "f" * 64, None, "0")
    return Card("tiny", read_json(folder.config)[0], record, RunRecords.of(folder), 6942,
                StorageCost(27768, 30040, None, None, ""))


def test_numbers_are_those_of_the_records(card):
    text, folder = card.render(), tiny_run.trained()
    results = json.loads((folder / "results.json").read_text())
    content = json.loads((folder / results["evaluation"]).read_text())
    for row in content["rows"]:
        line = next((n for n in text.splitlines() if n.startswith(f"| {row['model']} |")), "")
        if row["weights"] == "raw":
            assert not line
        else:
            assert f"| {row['bits_per_byte']:.4f} |" in line
            assert f"| {row['nats_per_token']:.4f} |" in line
    data, env = (json.loads((folder / n).read_text()) for n in ("data.json", "env.json"))
    for part in (data["sha256"][:12], "5,383 tokens to train on", "1,536 in 12 of 12 steps",
                 env["commit"], f"jax {env['packages']['jax']}", "1 x cpu", "6,942 parameters",
                 "Worse than counting tokens", "--split=validation --weights=ema --context=16",
                 "layer 0: Hopfield memory + attention (retrieval depth 2)", 'hp.load("tiny")',
                 "no safety tuning", "`text.txt`", "interpolated Witten-Bell; counted on all"):
        assert part in text, part
    assert str(tiny_run.corpus().parent) not in text  # where it lay is nobody's business


def test_missing_records_say_so_and_nothing_is_guessed(card):
    text = dataclasses.replace(card, records=NOTHING).render()
    for line in ("| hardware | not recorded |", "| versions | not recorded |",
                 "| commit | not recorded |", "| command | not recorded |",
                 "| speed | not recorded |", "| text | a text whose name is not recorded |",
                 "No evaluation of these weights at step 12: not recorded."):
        assert line in text, line
    assert "text.txt" not in text and "bits/byte" not in text and "datasets" not in header(text)


@pytest.mark.parametrize(("command", "words"), [
    (["train.py", "--config=configs/x.py", "--config.sample.prompt=a b"],
     "`python -m hippocampus.train --config=configs/x.py '--config.sample.prompt=a b'`"),
    (["pytest"], "not recorded (the run was not started by `hippocampus.train`)"),
    ([], MISSING), (7, MISSING)])
def test_the_command_is_that_of_the_training_or_not_recorded(card, command, words):
    records = dataclasses.replace(card.records, environment={"command": command})
    text = dataclasses.replace(card, records=records).render()
    assert f"| command | {words} |" in text


@pytest.mark.parametrize("content", ["", "[]", '{"step": 12}', '{"rows": 3, "step": 12}',
                                     '{"rows": [{}], "step": 12}', '{"rows": [7], "text": []}'])
def test_damaged_records_are_not_recorded(tmp_path, card, content):
    run = shutil.copytree(tiny_run.trained(), tmp_path / "run")
    for path in (run / "env.json", run / "data.json", *(run / "evaluations").glob("*.json")):
        path.write_text(content)
    text = dataclasses.replace(card, records=RunRecords.of(RunFolder(run))).render()
    assert text.count(MISSING) >= 5
    # Of that step there is still what training wrote on its way.
    assert "During training: 6.3010 bits per byte" in text


def test_evaluations_of_another_step_or_other_weights_are_not_shown(card):
    other = dataclasses.replace(card.record, step=8)
    assert "| trigram |" not in dataclasses.replace(card, record=other).render()
    raw = dataclasses.replace(card, record=dataclasses.replace(card.record, weights="raw"))
    assert "| this model, raw weights | 6.0522" in raw.render()
    assert "average weights |" not in raw.render()


def hub(card: Card) -> Card:
    config = dataclasses.replace(card.config, data=dataclasses.replace(
        card.config.data, corpus="Salesforce/wikitext", subset="wikitext-103-raw-v1"))
    return dataclasses.replace(card, config=config)


def test_header_is_what_the_hub_reads(card):
    plain = header(card.render())
    assert plain["library_name"] == "hippocampus" and plain["pipeline_tag"] == "text-generation"
    assert plain["tags"] == ["hippocampus", "jax", "flax", "modern-hopfield-network", "attention"]
    assert not {"datasets", "model-index", "license", "language"} & plain.keys()
    found = header(hub(card).render())
    assert found["datasets"] == ["Salesforce/wikitext"]
    (result,) = found["model-index"][0]["results"]
    assert result["dataset"] == {"type": "Salesforce/wikitext", "name": "Salesforce/wikitext",
                                 "config": "wikitext-103-raw-v1", "split": "validation"}
    assert result["metrics"][0]["value"] == pytest.approx(6.1178, abs=1e-4)
    none = dataclasses.replace(hub(card), records=NOTHING)
    assert "model-index" not in header(none.render())


def test_the_hub_s_own_library_accepts_the_header(card):
    hub_library = pytest.importorskip("huggingface_hub")
    data = hub_library.ModelCard(hub(card).render()).data
    assert [result.metric_type for result in data.eval_results] == [
        "bits_per_byte", "word_perplexity"]
    assert data.to_dict()["library_name"] == "hippocampus"
    assert header(hub(card).render())["model-index"][0]["name"] == "tiny"


def test_names_from_outside_cannot_break_the_page(card):
    config = dataclasses.replace(
        card.config, name='x"\n---\n| a | `b` <script>', sample=dataclasses.replace(
            card.config.sample, prompt='"\n\'$(rm)'))
    text = dataclasses.replace(hub(dataclasses.replace(card, config=config))).render()
    assert header(text)["model-index"][0]["name"] == config.name
    assert "<script>" not in text.split("---\n", 2)[2]
    assert r"--prompt=$'\"" not in text and r"""--prompt=$'"\n\'$(rm)'""" in text


def test_storage_is_measured_and_told(tmp_path):
    card = export_run(tiny_run.trained(), tmp_path / "out", Request(storage="int8"))
    text = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert text == card.render()
    assert f"| bits/byte | {card.cost.bits_before:.4f} | {card.cost.bits_after:.4f} |" in text
    results = json.loads((tiny_run.trained() / "results.json").read_text())
    assert card.cost.bits_before == results["final/bits_per_byte"]
    assert 0 < abs(card.cost.bits_after - card.cost.bits_before) < 0.05
    assert "model-index" not in header(text)
