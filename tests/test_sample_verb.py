"""The sample verb: a prompt, a file of prompts, a terminal, a pipe."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
import tiny_run

import hippocampus.sample
from hippocampus.data.tokenizers import character_tokenizer
from hippocampus.errors import ConfigError, DataError
from hippocampus.generation.language_model import LanguageModel
from hippocampus.generation.loading import load
from hippocampus.generation.prompts import converse, read_prompts, records
from hippocampus.training.loop import fit

SETTINGS = {"max_new_tokens": 4, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
            "repetition_penalty": 1.0, "seed": 0, "segments": None, "stop": [], "skip": False}


@pytest.fixture(scope="module")
def folder():
    return tiny_run.trained()


@pytest.fixture(scope="module")
def lm(folder):
    return load(folder)


def sample(folder, *flags):
    hippocampus.sample.main([f"--workdir={folder}", *flags])


def test_one_prompt_is_printed_with_its_continuation_however_it_is_shown(folder, lm, capsys):
    settings = {"max_new_tokens": 12, "temperature": 0.5, "top_k": 9, "min_p": 0.01,
                "repetition_penalty": 1.1, "seed": 4}
    stop = lm.generate("the ", **settings)[6:8]
    wanted = "the " + lm.generate("the ", **settings, stop=stop) + "\n"
    flags = ["--prompt=the ", "--max_new_tokens=12", "--temperature=0.5", "--top_k=9",
             "--min_p=0.01", "--repetition_penalty=1.1", "--seed=4", f"--stop={stop}"]
    for shown in ([], ["--stream"], ["--no-stream"]):
        sample(folder, *flags, *shown)
        assert capsys.readouterr().out == wanted


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_a_file_of_prompts_becomes_lines_of_json(name, folder, lm, tmp_path, capsys):
    prompts = ["the cat", "a", "the dog ran to"]
    lines = [json.dumps({"prompt": p, "id": 1}) if name.endswith("jsonl") else p for p in prompts]
    (tmp_path / name).write_text("\n\n".join(lines) + "\n")
    flags = [f"--prompts={tmp_path / name}", "--max_new_tokens=6", "--seed=2", "--batch_size=2"]
    sample(folder, *flags)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in printed] == prompts
    for line in printed:
        assert line["text"] == lm.generate(line["prompt"], max_new_tokens=6, temperature=0.8,
                                           seed=2)
        assert line["finish"] == "length" and line["seed"] == 2 and len(line) == 4
    out = tmp_path / "out.jsonl"
    sample(folder, *flags, f"--out={out}")
    assert [json.loads(line) for line in out.read_text().splitlines()] == printed
    with pytest.raises(ConfigError, match="exists already"):
        sample(folder, *flags, f"--out={out}")
    sample(folder, *flags, f"--out={out}", "--overwrite", "--log_probabilities")
    full = [json.loads(line) for line in out.read_text().splitlines()]
    assert [len(line["tokens"]) for line in full] == [6, 6, 6]
    assert all(p <= 0 for line in full for p in line["log_probabilities"])


def test_log_probabilities_of_one_prompt_are_json(folder, capsys):
    sample(folder, "--prompt=the ", "--max_new_tokens=3", "--log_probabilities")
    line = json.loads(capsys.readouterr().out)
    assert len(line["tokens"]) == len(line["log_probabilities"]) == 3


def test_what_is_piped_in_is_one_prompt(folder, lm, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\nsat "))
    sample(folder, "--max_new_tokens=5", "--temperature=0")
    wanted = lm.generate("the cat\nsat ", max_new_tokens=5, temperature=0.0)
    assert capsys.readouterr().out == f"the cat\nsat {wanted}\n"


def test_what_is_piped_in_must_be_text(folder):
    done = subprocess.run(
        [sys.executable, "-m", "hippocampus.sample", f"--workdir={folder}"], input=b"the \xff",
        capture_output=True, env=tiny_run.environment(), timeout=60)
    assert done.returncode == 66 and b"piped in is not UTF-8" in done.stderr


@pytest.mark.parametrize("separator", ["\u2028", "\x85"])
def test_a_line_of_json_ends_with_a_line_feed_alone(separator, tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"prompt": f"a{separator}b"}, ensure_ascii=False) + "\r\n", "utf-8")
    assert read_prompts(tmp_path / "a.jsonl") == [f"a{separator}b"]
    (tmp_path / "a.txt").write_text(f"a{separator}b\n", "utf-8")
    assert read_prompts(tmp_path / "a.txt") == [f"a{separator}b"]


@pytest.fixture(scope="module")
def narrow(lm):
    """The same model, whose tokenizer refuses most characters."""
    return LanguageModel(lm.model, lm.params, character_tokenizer("thecasdongr "), lm.config)


def test_a_line_that_cannot_be_continued_does_not_end_the_conversation(
        narrow, capsys, monkeypatch):
    lines = iter(["€", "the cat", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(narrow.tokenizer, "decode", lambda ids: "." * len(ids))
    converse(narrow, **SETTINGS)
    said, shown = capsys.readouterr().out.split("\n", 1)
    assert "'€'" in said and "not in the vocabulary" in said and shown.startswith("the cat")


def test_a_character_that_no_tokenizer_knows_is_found_before_anything_is_written(narrow):
    made = records(narrow, ["the cat", "a", "b€"], 2, 0, **{
        name: value for name, value in SETTINGS.items() if name != "seed"})
    with pytest.raises(DataError, match=r"^prompt 3: the character"):
        next(made)


@pytest.mark.full
def test_a_prompt_without_room_does_not_end_the_conversation(tmp_path, capsys, monkeypatch):
    lm = load(fit(tiny_run.config(train__steps=1, model__position="learned", data__context=24,
                                  model__max_length=24), tmp_path / "run"))
    lines = iter(["the cat sat on the mat and ran", "the", ""])
    capsys.readouterr()
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    converse(lm, **SETTINGS)
    out = capsys.readouterr().out
    assert "learned positions" in out and out.splitlines()[-1].startswith("the")
    with pytest.raises(ConfigError, match="temperature is -1"):  # holds for every line
        converse(lm, **{**SETTINGS, "temperature": -1.0})


@pytest.mark.parametrize(("flags", "message"), [
    (["--prompt=a", "--prompts=b"], "both given"), (["--prompt=a", "--out=b"], "--out is for"),
    (["--prompts=a", "--stream"], "shows one text"),
    (["--prompt=a", "--stream", "--log_probabilities"], "shows one text"),
    (["--prompts=a", "--batch_size=0"], "--batch_size is 0"),
    (["--prompt=", "--no-stream"], "the prompt is empty"),
    (["--prompt=a", "--temperature=-1"], "temperature is -1"),
    (["--prompts=a", "--out=/dev/null/x"], "cannot write to"),
    (["--prompts=a", "--out=/tmp", "--overwrite"], "is a folder"),
    (["--prompt=a", "--overwrite"], "--overwrite is for --out"),
    (["--prompts=a", "--memory=b"], "--memory is one user's"),
    (["--prompt=a", "--reset"], "are for --memory"),
    (["--prompt=a", "--memory=b", "--read_only", "--write_only"], "goes with neither"),
    (["--prompt=a", "--memory=b", "--read_only", "--reset"], "goes with neither"),
    (["--prompt=a", "--memory=b", "--write_only", "--stream"], "writes no text"),
    (["--prompt=a", "--memory=b"], "the model has no memory"),
    (["--prompt=a", "--top_k=x"], "invalid int value"), (["--prompt=a", "--skip"], "segment flow")])
def test_flags_that_make_no_sense_are_refused(flags, message, folder):
    with pytest.raises(ConfigError, match=message):
        sample(folder, *flags)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("none.txt", None, "there is no file"), ("a.txt", b"\n \n", "has no prompt"),
    ("a.txt", b"ab\xff", "is not UTF-8"), ("a.jsonl", b'{"prompt": "x"}\n{oops\n', "line 2"),
    ("a.jsonl", b'{"text": "x"}\n', "no text in the field"), ("a.jsonl", b"[1]\n", "no text in")])
def test_a_bad_file_of_prompts_is_refused_before_anything_is_written(
        name, content, message, folder, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        sample(folder, f"--prompts={tmp_path / name}", f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_a_reader_that_leaves_early_is_no_error(folder):
    command = [sys.executable, "-m", "hippocampus.sample", f"--workdir={folder}",
               "--prompt=the ", "--max_new_tokens=40", "--stream"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=tiny_run.environment())
    process.stdout.close()
    assert (process.stderr.read().decode(), process.wait(60)) == ("", 0)


def read_until(terminal, text, seconds=60):
    seen, end = "", time.monotonic() + seconds
    while text not in seen:
        assert time.monotonic() < end, f"no {text!r} in {seen!r}"
        if select.select([terminal], [], [], 0.2)[0]:
            seen += os.read(terminal, 4096).decode(errors="replace")
    return seen


def test_a_terminal_has_a_prompt_that_ctrl_c_does_not_end(folder, lm):
    command = [sys.executable, "-m", "hippocampus.sample", f"--workdir={folder}",
               "--max_new_tokens=100000", "--temperature=1"]
    terminal, inside = pty.openpty()
    process = subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside,
                               env=tiny_run.environment(), start_new_session=True)
    os.close(inside)
    try:
        read_until(terminal, "> ")
        os.write(terminal, b"the cat\n")
        started = lm.generate("the cat", max_new_tokens=1, temperature=1.0)
        read_until(terminal, "the cat" + started.replace("\n", "\r\n"))
        os.killpg(process.pid, signal.SIGINT)
        read_until(terminal, "> ")
        os.write(terminal, b"\x04")  # Ctrl-D
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(terminal)
