import csv
import dataclasses
import io
import json

import pytest
from rich.console import Console

from hippocampus.errors import ConfigError, DataError
from hippocampus.evaluation.result_table import Column, Protocol, ResultTable, merged

PROTOCOL = Protocol("pydoc", "ab" * 32, "validation", 8192, "bytes", "cd" * 32, 256, 128, 128,
                    "joined", "ema", 600)
COLUMNS = (Column("name", "row"), Column("loss", "loss", "nats/token"), Column("n", "number"))
ROWS = ({"name": "baseline", "loss": 1.25, "n": 3}, {"name": "worse", "loss": None, "flag": "!"})


def table(columns=COLUMNS, rows=ROWS, protocols=(PROTOCOL,)) -> ResultTable:
    return ResultTable("losses", "what was lost", columns, rows, protocols, ("a note",))


def other_tokenizer() -> Protocol:
    return dataclasses.replace(PROTOCOL, tokenizer="bpe", tokenizer_digest="ef" * 32)


@pytest.mark.parametrize("unit", ["nats/token", "ppl/token", "bits/token"])
def test_a_column_per_token_is_refused_where_tokens_differ(unit):
    columns = (COLUMNS[0], Column("loss", "loss", unit))
    assert table(columns).header[1] == f"loss ({unit})"
    with pytest.raises(ConfigError, match="2 tokenizers") as error:
        table(columns, protocols=(PROTOCOL, other_tokenizer()))
    assert "bits per byte" in error.value.hint


@pytest.mark.parametrize("unit", ["bits/byte", "ppl/word"])
def test_what_compares_between_tokenizers_is_shown(unit):
    columns = (COLUMNS[0], Column("loss", "loss", unit))
    assert table(columns, protocols=(PROTOCOL, other_tokenizer())).header[1] == f"loss ({unit})"


def test_there_is_no_table_without_a_protocol():
    with pytest.raises(ConfigError, match="no protocol"):
        table(protocols=())


def test_the_protocol_is_printed_beside_the_numbers():
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table().render())
    text = console.export_text()
    for part in ("validation of pydoc", "abababababab", "8,192 tokens", "step 600",
                 "tokenizer bytes cdcdcdcdcdcd", "context 128, stride 128", "a note", "1.2500",
                 "worse !"):
        assert part in text


def test_several_texts_are_pointed_out():
    elsewhere = dataclasses.replace(PROTOCOL, text_digest="12" * 32)
    assert any("2 different texts" in note
               for note in table(protocols=(PROTOCOL, elsewhere)).all_notes)
    assert not any("different texts" in note for note in table().all_notes)


def test_every_row_of_the_csv_file_stands_alone():
    rows = list(csv.DictReader(io.StringIO(table().to_csv())))
    assert [row["name"] for row in rows] == ["baseline", "worse"]
    assert rows[0]["loss"] == "1.25" and rows[1]["loss"] == ""
    assert rows[1]["flag"] == "!" and rows[0]["flag"] == ""
    for row in rows:
        assert row["tokenizer_digest"] == "cd" * 32 and row["context"] == "128"


def test_a_table_comes_back_from_its_record():
    again = ResultTable.from_record(json.loads(json.dumps(table().record())))
    assert again == table()


@pytest.mark.parametrize("record", [{}, {"name": "x"}, {**table().record(), "columns": [{"a": 1}]}])
def test_what_is_no_table_is_refused(record):
    with pytest.raises(DataError, match="not a table"):
        ResultTable.from_record(record)


def test_protocols_are_listed_once():
    assert merged([PROTOCOL, other_tokenizer(), PROTOCOL]) == (PROTOCOL, other_tokenizer())
