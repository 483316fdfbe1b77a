"""Shards: written once, whole or not at all, the same after any kill, refused when damaged."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hippocampus.config import DataConfig
from hippocampus.data import cache, shards
from hippocampus.data.corpora import open_corpus
from hippocampus.data.shards import open_split, split_folder, token_split, verify
from hippocampus.data.tokenizers import byte_tokenizer, character_tokenizer
from hippocampus.data.vocabularies import build_tokenizer
from hippocampus.errors import DataError

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "é", "東京", "."]
BUILD = """
import sys, time
from hippocampus.config import DataConfig
from hippocampus.data import shards
from hippocampus.data.corpora import open_corpus
from hippocampus.data.vocabularies import build_tokenizer
data = DataConfig(corpus=sys.argv[1], document_start="^# ", tokenizer="words")
shards.CHUNK_CHARACTERS = 4000
encode = shards._encode
def slowly(*arguments):
    print("chunk", flush=True)
    time.sleep(float(sys.argv[2]))
    return encode(*arguments)
shards._encode = slowly
corpus = open_corpus(data)
tokenizer = build_tokenizer(data, corpus)
print("tokenizing", flush=True)
shards.token_split(corpus, tokenizer, "train")
"""


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPPOCAMPUS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path):
    """A file of about 200 documents and 200,000 characters."""
    draw = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text("".join(
        f"# document {i}\n" + " ".join(draw.choices(WORDS, k=draw.randint(1, 400))) + "\n"
        for i in range(200)))
    return path


def opened(path, **fields):
    data = DataConfig(corpus=str(path), document_start="^# ", **fields)
    corpus = open_corpus(data)
    return corpus, build_tokenizer(data, corpus)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start(path, seconds_per_chunk=0.0):
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(path), str(seconds_per_chunk)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)})


def test_split_has_the_ids_and_the_counts_of_its_documents(text):
    corpus, tokenizer = opened(text, tokenizer="words", vocab_size=12)
    split = token_split(corpus, tokenizer, "train")
    documents = list(corpus.documents("train"))
    ids = [tokenizer.encode(document) for document in documents]
    assert split.ids.tolist() == np.concatenate(ids).tolist()
    assert split.document_starts.tolist() == [0, *np.cumsum([len(i) for i in ids])[:-1]]
    assert split.n_documents == len(documents) == 180
    assert split.n_bytes == len("".join(documents).encode())
    assert split.n_words == sum(len(d.split()) + d.count("\n") for d in documents)
    assert split.n_unknown == (split.ids == tokenizer.unknown_id).sum() > 0
    assert isinstance(split.ids, np.memmap)


@pytest.mark.parametrize(("size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_take_two_bytes_where_the_vocabulary_fits(tmp_path, size, dtype):
    characters = "".join(chr(32 + i if 32 + i < 0xD800 else 2080 + i) for i in range(size))
    (tmp_path / "x.txt").write_text(characters + "ab" * size)
    corpus = open_corpus(DataConfig(corpus=str(tmp_path / "x.txt")))
    tokenizer = character_tokenizer(characters + "ab" * size)
    assert tokenizer.vocab_size == size
    split = token_split(corpus, tokenizer, "train")
    assert split.ids.dtype == dtype
    assert tokenizer.decode(split.ids[:size]) == characters


@pytest.mark.parametrize("chunk", [1, 999, 10**9])
def test_chunks_do_not_show_in_the_files(text, monkeypatch, chunk):
    corpus, tokenizer = opened(text)
    token_split(corpus, tokenizer, "train")
    folder = split_folder(corpus, tokenizer, "train")
    before = contents(folder)
    shutil.rmtree(folder)
    monkeypatch.setattr(shards, "CHUNK_CHARACTERS", chunk)
    monkeypatch.setattr(shards, "_sync", lambda file: file.flush())
    token_split(corpus, tokenizer, "train")
    assert contents(folder) == before
    assert before.keys() == {"ids.bin", "document_starts.bin", "manifest.json"}


def test_split_is_reused_without_reading_the_text(text, monkeypatch):
    corpus, tokenizer = opened(text)
    first = token_split(corpus, tokenizer, "validation")
    monkeypatch.setattr(shards, "_build", lambda *_: pytest.fail("it was built again"))
    again = token_split(corpus, tokenizer, "validation")
    assert np.array_equal(first.ids, again.ids)
    assert (first.n_bytes, first.n_words) == (again.n_bytes, again.n_words)


def test_another_text_or_tokenizer_has_another_folder(text):
    corpus, tokenizer = opened(text)
    folders = {split_folder(corpus, tokenizer, "train"),
               split_folder(corpus, character_tokenizer("abc"), "train")}
    text.write_text(text.read_text() + "more\n")
    folders.add(split_folder(opened(text)[0], tokenizer, "train"))
    assert len(folders) == 3


def killed_and_restarted(text, kills, seed):
    """Kills a process while it tokenizes, again and again, and lets the last one finish."""
    draw = random.Random(seed)
    folder = split_folder(*opened(text, tokenizer="words"), "train")
    chunks = []
    for _ in range(kills):
        process = start(text, 0.005)
        for _ in range(draw.randint(1, 12)):
            process.stdout.readline()
        time.sleep(draw.random() * 0.03)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if folder.exists():  # it had come to the end
            break
        journal = folder.with_name("train.partial") / "journal.jsonl"
        chunks.append(len(journal.read_bytes().splitlines()) if journal.exists() else 0)
    last = start(text)
    output, errors = last.communicate(timeout=60)
    assert last.returncode == 0, errors
    return folder, chunks, output.count("chunk")


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full),
                                  pytest.param(2, marks=pytest.mark.full)])
def test_killed_at_any_moment_and_restarted_gives_the_same_files(text, tmp_path, monkeypatch, seed):
    folder, chunks, encoded = killed_and_restarted(text, 10 if seed else 3, seed)
    after = contents(folder)
    monkeypatch.setenv("HIPPOCAMPUS_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(shards, "CHUNK_CHARACTERS", 4000)
    corpus, tokenizer = opened(text, tokenizer="words")
    token_split(corpus, tokenizer, "train")
    assert after == contents(split_folder(corpus, tokenizer, "train"))
    total = -(-len("".join(corpus.documents("train"))) // 4000)
    assert chunks == sorted(chunks)
    assert chunks[-1] > 0
    assert encoded <= total - chunks[-1] + 1  # what was finished is not done again
    assert not folder.with_name("train.partial").exists()


@pytest.mark.parametrize("torn", ["journal", "ids", "lost"])
def test_torn_ends_are_cut_off(text, monkeypatch, torn):
    corpus, tokenizer = opened(text)
    token_split(corpus, tokenizer, "train")
    folder = split_folder(corpus, tokenizer, "train")
    whole = contents(folder)
    shutil.rmtree(folder)
    monkeypatch.setattr(shards, "CHUNK_CHARACTERS", 20_000)
    encode, calls = shards._encode, []

    def stop_in_the_third_chunk(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(shards, "_encode", stop_in_the_third_chunk)
    with pytest.raises(KeyboardInterrupt):
        token_split(corpus, tokenizer, "train")
    partial = folder.with_name("train.partial")
    if torn == "journal":
        with (partial / "journal.jsonl").open("a") as file:
            file.write('{"pieces": 99, "tok')
    elif torn == "ids":
        with (partial / "ids.bin").open("ab") as file:
            file.write(b"\1\2\3")
    else:  # the disk lost what the journal vouches for: all is done again
        os.truncate(partial / "ids.bin", 10)
    monkeypatch.setattr(shards, "_encode", encode)
    token_split(corpus, tokenizer, "train")
    assert contents(folder) == whole


def test_two_processes_at_once_build_once(text):
    first = start(text)
    while first.stdout.readline() != "chunk\n":
        pass  # then it holds the lock
    first.send_signal(signal.SIGSTOP)
    second = start(text)
    waiting = second.stderr.readline()
    first.send_signal(signal.SIGCONT)
    outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], outputs
    assert "waiting for another process" in waiting
    assert "chunk" in outputs[0][0]
    assert "chunk" not in outputs[1][0]


def damage_size(path):
    path.write_bytes(path.read_bytes()[:-2])


def damage_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [damage_size, damage_bit, Path.unlink])
@pytest.mark.parametrize("name", ["ids.bin", "document_starts.bin", "manifest.json"])
def test_damaged_split_is_refused_and_made_again_with_one_line(text, name, damage):
    corpus, tokenizer = opened(text)
    before = token_split(corpus, tokenizer, "train").ids.tolist()
    folder = split_folder(corpus, tokenizer, "train")
    whole = contents(folder)
    damage(folder / name)
    if name == "manifest.json" and damage is damage_bit:
        (folder / name).write_text("{}")
    with pytest.raises(DataError, match=rf"damaged \({name}\)"):
        open_split(folder, tokenizer)
    with pytest.warns(UserWarning, match=rf"damaged \({name}\): made again"):
        split = token_split(corpus, tokenizer, "train")
    assert split.ids.tolist() == before
    assert contents(folder) == whole


def test_large_files_are_checked_by_size_and_on_demand(text, monkeypatch):
    corpus, tokenizer = opened(text)
    token_split(corpus, tokenizer, "train")
    folder = split_folder(corpus, tokenizer, "train")
    verify(folder)
    damage_bit(folder / "ids.bin")
    monkeypatch.setattr(shards, "VERIFIED_BYTES", 1000)
    open_split(folder, tokenizer)
    with pytest.raises(DataError, match="ids"):
        verify(folder)
    damage_size(folder / "ids.bin")
    with pytest.raises(DataError, match="ids"):
        open_split(folder, tokenizer)


def test_ids_of_another_tokenizer_are_refused_by_both_hashes(text):
    corpus, tokenizer = opened(text)
    token_split(corpus, tokenizer, "train")
    other = character_tokenizer("abc")
    with pytest.raises(DataError) as caught:
        open_split(split_folder(corpus, tokenizer, "train"), other)
    assert tokenizer.digest[:12] in caught.value.message
    assert other.digest[:12] in caught.value.message


def test_manifest_says_what_the_files_are(text):
    corpus, tokenizer = opened(text)
    split = token_split(corpus, tokenizer, "train")
    manifest = json.loads((split_folder(corpus, tokenizer, "train") / "manifest.json").read_text())
    assert manifest["corpus"] == corpus.digest
    assert manifest["tokenizer"] == tokenizer.digest
    assert manifest["files"]["ids.bin"]["size"] == split.ids.nbytes == manifest["tokens"] * 2
    assert (manifest["documents"], manifest["bytes"], manifest["words"]) == (
        split.n_documents, split.n_bytes, split.n_words)


def test_unknown_character_leaves_nothing_behind(text):
    corpus, _ = opened(text)
    with pytest.raises(DataError, match="is not in the vocabulary"):
        token_split(corpus, character_tokenizer("abc"), "train")
    assert not [path for path in cache.cache_folder().rglob("*") if path.suffix == ".partial"]


def test_full_disk_is_one_line_and_what_was_done_is_kept(text, monkeypatch):
    corpus, tokenizer = opened(text)
    monkeypatch.setattr(shards, "CHUNK_CHARACTERS", 20_000)
    calls = []

    def full(file):
        file.flush()
        calls.append(file)
        if len(calls) == 7:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_sync", full)
        with pytest.raises(DataError, match="No space left on device") as caught:
            token_split(corpus, tokenizer, "train")
    assert "HIPPOCAMPUS_CACHE" in caught.value.hint
    folder = split_folder(corpus, tokenizer, "train")
    assert not folder.exists()
    assert len((folder.with_name("train.partial") / "journal.jsonl").read_text().splitlines()) == 2
    expected = np.concatenate([tokenizer.encode(d) for d in corpus.documents("train")])
    assert np.array_equal(token_split(corpus, tokenizer, "train").ids, expected)


def test_cache_that_cannot_be_written_is_replaced_for_this_process(text, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder can be made here")
    monkeypatch.setenv("HIPPOCAMPUS_CACHE", str(tmp_path / "file" / "cache"))
    corpus, tokenizer = opened(text)
    with pytest.warns(UserWarning, match="set HIPPOCAMPUS_CACHE to another folder"):
        split = token_split(corpus, tokenizer, "train")
    assert len(split.ids) == sum(len(d.encode()) for d in corpus.documents("train"))


def test_long_text_is_tokenized_in_bounded_memory(tmp_path):
    path = tmp_path / "long.txt"
    with path.open("w") as file:
        for i in range(300):
            file.write(f"line {i} of one document " * 8000 + "\n")
    script = ("import resource, sys\n"
              "from hippocampus.config import DataConfig\n"
              "from hippocampus.data.corpora import open_corpus\n"
              "from hippocampus.data import shards\n"
              "from hippocampus.data.tokenizers import byte_tokenizer\n"
              "shards.CHUNK_CHARACTERS = 2**20\n"
              "corpus = open_corpus(DataConfig(corpus=sys.argv[1]))\n"
              "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
              "shards.token_split(corpus, byte_tokenizer(), 'train')\n"
              "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n")
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True,
                         check=True, env={**os.environ, "PYTHONPATH": str(root)})
    assert path.stat().st_size > 50e6
    assert int(run.stdout) < 40_000  # kilobytes


def test_byte_tokenizer_of_the_tests_is_the_one_of_the_config(text):
    assert opened(text)[1].digest == byte_tokenizer().digest


def test_a_manifest_with_any_byte_flipped_is_made_again_or_means_the_same(text):
    corpus, tokenizer = opened(text)
    good = token_split(corpus, tokenizer, "train")
    counts = (good.n_bytes, good.n_words, good.n_documents, good.n_unknown)
    folder = split_folder(corpus, tokenizer, "train")
    content = (folder / "manifest.json").read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 7
        (folder / "manifest.json").write_bytes(flipped)
        try:
            found = open_split(folder, tokenizer)
        except DataError as error:
            assert len(error.message.splitlines()) == 1
            continue
        assert (found.n_bytes, found.n_words, found.n_documents, found.n_unknown) == counts
        np.testing.assert_array_equal(found.ids, good.ids)
    (folder / "manifest.json").write_bytes(content)


@pytest.mark.parametrize("change", [
    {"dtype": "<u8"}, {"dtype": "x"}, {"dtype": None}, {"tokenizer": 3}, {"bytes": -1},
    {"bytes": True}, {"words": "9"}, {"tokens": 1}, {"documents": 2}, {"format": 2}, {"more": 1},
    {"files": {}}, {"files": None}, {"files": {"../x": {"size": 1, "sha256": "x"}}}])
def test_a_manifest_without_a_digest_is_held_to_what_it_looks_like(text, change):
    corpus, tokenizer = opened(text)
    token_split(corpus, tokenizer, "train")
    path = split_folder(corpus, tokenizer, "train") / "manifest.json"
    whole = path.read_text()
    content = json.loads(whole)
    del content["digest"]
    path.write_text(json.dumps(content))
    open_split(path.parent, tokenizer)
    path.write_text(json.dumps({**content, **change}))
    with pytest.raises(DataError, match="are damaged"):
        open_split(path.parent, tokenizer)
    path.write_text(whole)
