"""The memory verb: what it prints, what it makes, what it refuses."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent / "generation"))
from memories import FINGERPRINT, memory

import hippocampus.memory
from hippocampus.data.tokenizers import byte_tokenizer
from hippocampus.errors import CheckpointError, ConfigError, DataError
from hippocampus.generation.memory_file import load_memory, save_memory

OWN = dataclasses.replace(FINGERPRINT, tokenizer=byte_tokenizer().digest)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """two.memory (two users), ann.memory and bob.memory (one each), and the model they are of."""
    monkeypatch.chdir(tmp_path)
    save_memory("two.memory", memory(users=2), OWN, {"user": "Ann\x1b[2J"})
    save_memory("ann.memory", memory(seed=1), OWN, {"user": "Ann"})
    save_memory("bob.memory", memory(seed=2), OWN, {"user": "Bob", "city": "Rome"})
    (tmp_path / "model").mkdir()
    byte_tokenizer().save(tmp_path / "model" / "tokenizer.json")
    return tmp_path


def verb(*arguments: str) -> None:
    hippocampus.memory.main(arguments)


def test_inspect_prints_the_most_used_slots_with_their_text(files, capsys):
    verb("inspect", "two.memory", "--workdir=model", "--top=2")
    printed = capsys.readouterr().out
    assert printed.count("'the c'") + printed.count("'he ca'") + printed.count("'e cat'") >= 2
    assert "user 1: 4 slots in use, 4 writes, 99 tokens" in printed and "\x1b" not in printed
    assert sum(line.strip()[:1].isdigit() and "'" in line for line in printed.splitlines()) == 4
    verb("inspect", "two.memory", "--user=1")
    printed = capsys.readouterr().out
    assert "user 0" not in printed and str(list(b"the c")) in printed


def test_export_prints_or_writes_json_lines(files, capsys):
    verb("export", "ann.memory", "--workdir=model", "--vectors")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 4 and {"text", "key", "value", "usage"} <= lines[0].keys()
    verb("export", "ann.memory", "--out=lines.jsonl")
    assert len((files / "lines.jsonl").read_text().splitlines()) == 4
    assert capsys.readouterr().out == ""


def test_merge_makes_a_memory_that_loads(files, capsys):
    verb("merge", "ann.memory", "bob.memory", "--out=both.memory")
    assert capsys.readouterr().out == "both.memory: 6 slots of 8 in 2 files\n"
    both = load_memory("both.memory", OWN)
    assert both.notes == {"user": "Ann", "city": "Rome"} and both.state.valid_BS.all()


def test_reset_empties_all_or_one_user_and_keeps_the_rest(files, capsys):
    before = load_memory("two.memory").state
    verb("reset", "two.memory", "--user=0")
    assert capsys.readouterr().out == "two.memory: 1 of 2 users emptied\n"
    after = load_memory("two.memory", OWN).state
    assert not after.valid_BS[0].any() and not after.keys_BSHd[0].any()
    np.testing.assert_array_equal(after.values_BSHd[1], before.values_BSHd[1])
    verb("reset", "two.memory")
    assert not load_memory("two.memory").state.valid_BS.any()
    verb("inspect", "two.memory")
    assert "user 0: 0 slots in use" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "error", "words"), [
    (["inspect", "none"], CheckpointError, "there is no memory at none"),
    (["inspect", "model/tokenizer.json"], CheckpointError, "is damaged"),
    (["inspect", "ann.memory", "bob.memory"], ConfigError, "inspect takes one file"),
    (["inspect", "ann.memory", "--out=x"], ConfigError, "--out is not for inspect"),
    (["inspect", "ann.memory", "--user=1"], ConfigError, "no user 1"),
    (["inspect", "ann.memory", "--top=0"], ConfigError, "--top is 0"),
    (["inspect", "foreign.memory", "--workdir=model"], DataError, "not written with the tokenizer"),
    (["inspect", "ann.memory", "--workdir=nowhere"], DataError, "no tokenizer at nowhere"),
    (["reset", "ann.memory", "--user=-1"], ConfigError, "no user -1"),
    (["merge", "ann.memory", "bob.memory"], ConfigError, "merge needs --out"),
    (["merge", "ann.memory", "bob.memory", "--out=ann.memory"], ConfigError, "exists already"),
    (["merge", "ann.memory", "two.memory", "--out=x"], ConfigError, "the same users"),
    (["merge", "ann.memory", "foreign.memory", "--out=x"], CheckpointError, "another tokenizer"),
    (["forget", "ann.memory"], ConfigError, "invalid choice")])
def test_bad_requests_are_refused_and_nothing_is_written(files, arguments, error, words):
    save_memory("foreign.memory", memory(), FINGERPRINT)
    before = {p.name: p.read_bytes() for p in files.iterdir() if p.is_file()}
    with pytest.raises(error, match=words):
        verb(*arguments)
    assert {p.name: p.read_bytes() for p in files.iterdir() if p.is_file()} == before
