"""Corpora: the same text every time, split without leaks, and errors that say what to do."""

import hashlib
import io
import os
import sys
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
from huggingface_hub import constants as hub_constants

from hippocampus.config import DataConfig
from hippocampus.data import named_texts
from hippocampus.data import standard_library as library
from hippocampus.data.corpora import open_corpus
from hippocampus.errors import DataError
from hippocampus.files import write_atomically

PLAY = "First Citizen:\r\nSpeak, speak.\n" * 40


def load_corpus(name, **fields):
    """A corpus with the text of its splits."""
    corpus = open_corpus(DataConfig(corpus=name, **fields))
    texts = {split: "".join(text for _, text in corpus.chunks(split)) for split in corpus.splits}
    return SimpleNamespace(name=corpus.name, sha256=corpus.digest, **texts)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test waits for the network."""
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def pydoc():
    return load_corpus("pydoc")


@pytest.fixture
def standard_library(tmp_path, monkeypatch):
    """An invented standard library: `add(path, source)` puts a file into it."""
    monkeypatch.setattr(library.sysconfig, "get_path", lambda name: str(tmp_path))

    def add(path, source):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(source if isinstance(source, bytes) else source.encode())

    return add


@pytest.fixture
def shakespeare(tmp_path, monkeypatch):
    """Empty data and cache folders, a network that gives PLAY, and PLAY's digest as the right one.

    Returns the list of the addresses that were fetched."""
    fetched = []

    def urlopen(url, timeout):
        fetched.append(url)
        return io.BytesIO(PLAY.encode())

    monkeypatch.setenv("HIPPOCAMPUS_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HIPPOCAMPUS_CACHE", str(tmp_path / "cache"))
    right = hashlib.sha256(PLAY.encode()).hexdigest()
    monkeypatch.setattr(named_texts, "SHAKESPEARE_SHA256", right)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return fetched


def prose(word):
    return f"What {word} is good for, told in a whole sentence."


def paragraphs(text):
    return {p.strip() for p in text.split("\n\n") if len(p.strip()) >= 40}


def test_pydoc_is_the_same_text_in_every_call(pydoc):
    assert load_corpus("pydoc") == pydoc


def test_pydoc_is_two_million_characters_and_a_tenth_of_them_validate(pydoc):
    total = len(pydoc.train) + len(pydoc.validation)
    assert 1.5e6 < total < 4e6
    assert 0.06 < len(pydoc.validation) / total < 0.14


def test_pydoc_validation_has_no_paragraph_of_training(pydoc):
    assert not paragraphs(pydoc.train) & paragraphs(pydoc.validation)


def test_pydoc_is_read_without_importing_the_modules(pydoc):
    assert not {"antigravity", "this", "turtledemo"} & sys.modules.keys()


def test_digest_is_that_of_the_whole_text(pydoc):
    text = pydoc.train + pydoc.validation
    assert pydoc.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_modules_are_never_cut_in_two_and_keep_their_side_when_others_come(standard_library):
    def sides():
        corpus = load_corpus("pydoc")
        found = {}
        for i in range(200):
            texts = [prose(f"{part} of m{i}") for part in ("the module", "a class", "a method")]
            sides = {t in corpus.validation for t in texts}
            assert len(sides) == 1
            assert sides == {t not in corpus.train for t in texts}
            found[i] = sides.pop()
        return found

    for i in range(200):
        standard_library(
            f"m{i}.py",
            f'"""{prose(f"the module of m{i}")}"""\n'
            f'class C:\n    """{prose(f"a class of m{i}")}"""\n'
            f'    if True:\n        def f():\n            """{prose(f"a method of m{i}")}"""\n',
        )
    before = sides()
    assert 5 < sum(before.values()) < 40
    for i in range(50):
        standard_library(f"another{i}.py", f'"""{prose(f"another{i}")}"""')
    assert sides() == before


def test_only_prose_of_the_library_itself_is_read(standard_library):
    standard_library("good/__init__.py", f'"""{prose("good")}\n\n    Indented."""')
    standard_library("again.py", f'"""{prose("good")}\n\nIndented."""')
    standard_library("short.py", '"""Too short."""')
    standard_library("broken.py", f'"""{prose("broken")}"""\nprint "two"')
    standard_library("binary.py", b'"""\xff\x00 is not a source file in any encoding at all."""')
    for folder in ("test", "good/tests", "site-packages", "config-3-linux"):
        standard_library(f"{folder}/hidden.py", f'"""{prose(folder)}"""')
    corpus = load_corpus("pydoc")
    assert (corpus.train + corpus.validation).strip() == f"{prose('good')}\n\nIndented."


def test_every_help_topic_is_a_module_of_its_own(standard_library):
    topics = {f"t{i}": prose(f"topic {i}") for i in range(200)}
    standard_library("pydoc_data/topics.py", f"topics = {topics!r}")
    corpus = load_corpus("pydoc")
    assert all((t in corpus.train) != (t in corpus.validation) for t in topics.values())
    assert 5 < sum(t in corpus.validation for t in topics.values()) < 40


def test_python_without_sources_is_an_error(standard_library):
    with pytest.raises(DataError, match="without the sources"):
        load_corpus("pydoc")


def test_tinyshakespeare_is_split_as_usual(tinyshakespeare_path, monkeypatch):
    monkeypatch.setenv("HIPPOCAMPUS_DATA", str(tinyshakespeare_path.parent))
    corpus = load_corpus("tinyshakespeare")
    assert (len(corpus.train), len(corpus.validation)) == (1_003_854, 111_540)
    assert corpus.sha256 == named_texts.SHAKESPEARE_SHA256
    assert corpus.train + corpus.validation == tinyshakespeare_path.read_text()


def test_tinyshakespeare_is_downloaded_once(shakespeare):
    first = load_corpus("tinyshakespeare")
    assert first.train + first.validation == PLAY
    assert load_corpus("tinyshakespeare") == first
    assert shakespeare == [named_texts.SHAKESPEARE_URL]


def test_data_folder_goes_before_the_network(shakespeare, tmp_path):
    write_atomically(tmp_path / "data" / "tinyshakespeare.txt", PLAY.encode())
    load_corpus("tinyshakespeare")
    assert not shakespeare


def test_unwritable_cache_costs_a_warning_only(shakespeare, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot keep a copy"):
        assert load_corpus("tinyshakespeare").train


@pytest.mark.parametrize("folder", ["data", "cache"])
def test_file_with_the_wrong_digest_is_refused(shakespeare, tmp_path, folder):
    write_atomically(tmp_path / folder / "tinyshakespeare.txt", PLAY.encode() + b"!")
    with pytest.raises(DataError, match="is not Tiny Shakespeare") as caught:
        load_corpus("tinyshakespeare")
    assert "delete" in caught.value.hint


def test_wrong_download_is_refused_and_not_kept(shakespeare, tmp_path, monkeypatch):
    monkeypatch.setattr(named_texts, "SHAKESPEARE_SHA256", "0" * 64)
    with pytest.raises(DataError, match="wrong sha256"):
        load_corpus("tinyshakespeare")
    assert not (tmp_path / "cache").exists()


def test_offline_without_the_file_says_to_pass_one(shakespeare, monkeypatch):
    def offline(url, timeout):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(DataError, match="no route to host") as caught:
        load_corpus("tinyshakespeare")
    assert "--config.data.corpus=/path/to/file.txt" in caught.value.hint


def test_local_file_is_split_by_characters_and_kept_to_the_byte(tmp_path):
    path = tmp_path / "mine"
    text = "é🙂\r\n" * 25
    path.write_bytes(text.encode())
    corpus = load_corpus(str(path))
    assert (corpus.train, corpus.validation) == (text[:90], text[90:])
    assert corpus.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert corpus.name == str(path)


def test_file_of_the_current_folder_needs_no_separator(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("some text")
    monkeypatch.chdir(tmp_path)
    assert load_corpus("mine").train == "some tex"


@pytest.mark.parametrize("name", ["absent.txt", "nowhere/absent"])
def test_missing_file_is_an_error_that_names_the_corpora(name):
    with pytest.raises(DataError, match=f"no file {name}") as caught:
        load_corpus(name)
    assert "pydoc" in caught.value.hint


def test_directory_is_an_error(tmp_path):
    with pytest.raises(DataError, match="is a directory"):
        load_corpus(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b" \n\t\n"])
def test_empty_file_is_an_error(tmp_path, content):
    (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"empty\.txt is empty"):
        load_corpus(str(tmp_path / "empty.txt"))


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b"caf\xe9 au lait", "byte 0xe9 at offset 3"),
        (b"a\0b", "byte 0x00 at offset 1"),
        (b"ab\xff\0", "byte 0xff at offset 2"),
        (b"a\0\xff", "byte 0x00 at offset 1"),
    ],
)
def test_binary_file_is_an_error_that_names_the_byte(tmp_path, content, where):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"is not UTF-8 text \({where}\)"):
        load_corpus(str(tmp_path / "x.txt"))


def test_unknown_name_is_an_error_with_the_nearest_one():
    with pytest.raises(DataError, match="known: pydoc, tinyshakespeare") as caught:
        load_corpus("Tinyshakespear")
    assert "did you mean tinyshakespeare?" in caught.value.hint


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_atomically(tmp_path / "file", b"old")

    def full_disk(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_atomically(tmp_path / "file", b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]
