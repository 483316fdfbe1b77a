"""Corpora: the same text every time, split without leaks, and errors that say what to do."""

import hashlib
import io
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants as hub_constants

from hippocampus.config import DataConfig
from hippocampus.data import corpora, named_texts, text_files
from hippocampus.data import standard_library as library
from hippocampus.data.corpora import open_corpus
from hippocampus.data.shards import token_split
from hippocampus.data.vocabularies import build_tokenizer
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


@pytest.mark.full
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


def paths(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return str(folder)


def documents(split, **fields):
    return list(open_corpus(DataConfig(**fields)).documents(split))


def test_files_of_a_glob_are_documents_in_the_order_of_their_names(tmp_path):
    folder = paths(tmp_path, b="two", a="one", c="three")
    fields = {"corpus": f"{folder}/*.txt"}
    assert documents("train", **fields) == ["one", "two"]
    assert documents("validation", **fields) == ["three"]


def test_files_to_validate_and_test_on(tmp_path):
    folder = paths(tmp_path, train="one\ntwo\n", valid="three\n", test="four\n")
    fields = {"corpus": f"{folder}/train.txt", "validation_files": f"{folder}/valid.txt",
              "test_files": f"{folder}/test.txt"}
    assert open_corpus(DataConfig(**fields)).splits == ("train", "validation", "test")
    assert [documents(s, **fields) for s in ("train", "validation", "test")] == [
        ["one\ntwo\n"], ["three\n"], ["four\n"]]


def test_documents_of_a_text_begin_at_its_headings(tmp_path):
    text = " \n = One = \n a \n = = Part = = \n" + "".join(f" = {i} = \n b \n" for i in range(9))
    folder = paths(tmp_path, x=text)
    fields = {"corpus": f"{folder}/x.txt", "document_start": "^ = [^=].* = $"}
    found = documents("train", **fields) + documents("validation", **fields)
    assert "".join(found) == text
    assert len(found) == 10
    assert documents("validation", **fields) == [" = 8 = \n b \n"]


def test_digest_tells_files_and_cuts_apart(tmp_path):
    folder = paths(tmp_path, a="one\n", b="two\n", c="three\n")
    fields = [
        {"corpus": f"{folder}/a.txt"}, {"corpus": f"{folder}/*.txt"},
        {"corpus": f"{folder}/*.txt", "document_start": "^t"},
        {"corpus": f"{folder}/a.txt", "validation_files": f"{folder}/b.txt"},
        {"corpus": f"{folder}/a.txt", "validation_files": f"{folder}/c.txt"},
        {"corpus": f"{folder}/a.txt", "validation_files": f"{folder}/b.txt",
         "test_files": f"{folder}/c.txt"}]
    assert len({open_corpus(DataConfig(**f)).digest for f in fields}) == len(fields)


@pytest.mark.parametrize("field", ["validation_files", "test_files"])
def test_missing_validation_or_test_file_is_an_error_that_names_the_field(tmp_path, field):
    folder = paths(tmp_path, a="one\n", b="two\n")
    fields = {"corpus": f"{folder}/a.txt", "validation_files": f"{folder}/b.txt",
              field: f"{folder}/none.txt"}
    with pytest.raises(DataError, match=rf"data\.{field}: there is no file"):
        open_corpus(DataConfig(**fields))


def test_glob_without_a_match_and_mixed_formats_are_errors(tmp_path):
    folder = paths(tmp_path, a="one\n")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n')
    with pytest.raises(DataError, match="no file matches"):
        open_corpus(DataConfig(corpus=f"{folder}/*.tokens"))
    with pytest.raises(DataError, match="different formats"):
        open_corpus(DataConfig(corpus=f"{folder}/*"))


@pytest.mark.parametrize("block", [1, 2, 3, 5, 4096])
def test_text_is_the_same_whatever_is_read_at_once(tmp_path, monkeypatch, block):
    text = "é東🙂a\r\n" * 9
    (tmp_path / "x.txt").write_bytes(text.encode())
    (tmp_path / "bad.txt").write_bytes("é東".encode() + b"\xf0\x9f\x99")
    monkeypatch.setattr(text_files, "BLOCK_BYTES", block)
    corpus = load_corpus(str(tmp_path / "x.txt"))
    assert corpus.train + corpus.validation == text
    assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert "".join(text_files.lines(tmp_path / "x.txt")) == text
    with pytest.raises(DataError, match=r"byte 0xf0 at offset 5"):
        load_corpus(str(tmp_path / "bad.txt"))


def test_wikitext_mini_is_articles_stories_and_speeches(tinyshakespeare_path, monkeypatch):
    monkeypatch.setenv("HIPPOCAMPUS_DATA", str(tinyshakespeare_path.parent))
    corpus = open_corpus(DataConfig(corpus="wikitext_mini"))
    train, validation = (list(corpus.documents(s)) for s in ("train", "validation"))
    assert len(train) == 2770
    assert sum(map(len, train)) == 7_306_397
    assert train[0].startswith("2007 European Parliament election in Romania\n\nRomania elected")
    assert not any("<doc" in text or "</doc>" in text for text in train)
    assert all(text == text.strip() + "\n" for text in train)
    assert len(validation) == 60
    whole = (tinyshakespeare_path.parent / "wikitext-2/wiki.valid.tokens").read_text()
    assert "".join(validation) == whole


def test_wikitext_validation_has_its_published_number_of_words(
    tinyshakespeare_path, tmp_path, monkeypatch
):
    monkeypatch.setenv("HIPPOCAMPUS_CACHE", str(tmp_path))
    path = str(tinyshakespeare_path.parent / "wikitext-2/wiki.valid.tokens")
    data = DataConfig(corpus=path, validation_files=path, document_start="^ = [^=].* = $",
                      tokenizer="words")
    corpus = open_corpus(data)
    split = token_split(corpus, build_tokenizer(data, corpus), "validation")
    assert split.n_words == len(split.ids) == 217_646
    assert split.n_documents == 60
    assert split.n_bytes == os.path.getsize(path)


@pytest.mark.parametrize("there", [False, True])
def test_wikitext_mini_without_its_files_names_them_and_where_they_go(tmp_path, monkeypatch, there):
    monkeypatch.setenv("HIPPOCAMPUS_DATA", str(tmp_path))
    if there:
        write_atomically(tmp_path / "wikipedia/wiki.utf8", "<doc id=1>\nText\n</doc>\n")
    with pytest.raises(DataError, match=r"fairytaleqa/train\.jsonl, .*wiki\.valid") as caught:
        open_corpus(DataConfig(corpus="wikitext_mini"))
    assert ("wiki.utf8" in caught.value.message) is not there
    assert "HIPPOCAMPUS_DATA" in caught.value.hint
    assert str(tmp_path) in caught.value.hint


@pytest.mark.parametrize(("name", "found"), [
    ("Salesforce/wikitext", True), ("pydoc", False), ("texts/mine.txt", False), ("mine", False),
    ("texts/*", False), ("/data/set", False), ("tests/data", False)])
def test_only_a_data_set_of_the_hub_has_a_hub_id(name, found, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    assert corpora.hub_id(name) == (name if found else None)


@pytest.mark.parametrize("start", ["", "^w1"])
@pytest.mark.parametrize("change", ["shorter", "longer", "replaced", "touched", "gone"])
def test_a_file_that_changes_after_it_was_scanned_is_refused_and_never_half_read(
        tmp_path, change, start):
    path = tmp_path / "x.txt"
    path.write_text(" ".join(f"w{i}" for i in range(999)))
    corpus = open_corpus(DataConfig(corpus=str(path), document_start=start))
    if change == "replaced":
        (tmp_path / "new").write_text(path.read_text()[::-1])
        (tmp_path / "new").rename(path)
    elif change == "gone":
        path.unlink()
    elif change == "touched":
        os.utime(path, (0, 0))
    else:
        path.write_text("short" if change == "shorter" else path.read_text() + " more")
    with pytest.raises(DataError, match=r"changed while it was read|there is no file") as caught:
        list(corpus.pieces("train"))
    assert caught.value.hint


@pytest.mark.parametrize("name", ["~nobody_of_that_name/x.txt", "~nobody_of_that_name/*.txt"])
def test_the_home_folder_of_nobody_is_an_error(name):
    with pytest.raises(DataError, match="there is no home folder for ~nobody"):
        open_corpus(DataConfig(corpus=name))
