"""A folder can be searched and read, and nothing outside it."""

import os

import pytest

from hippocampus.errors import DataError
from hippocampus.serving import documents
from hippocampus.serving.documents import Documents

HARBOUR = "The harbour of Lorn was built in 1823. Its lighthouse is 41 metres high.\nIt is red."
MILL = "The mill does not grind on Sundays. " + "Flour and bran. " * 60 + "The miller is Bert."


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "folder"
    (root / "towns").mkdir(parents=True)
    (root / "towns/lorn.txt").write_text(HARBOUR)
    (root / "mill.md").write_text(MILL)
    return root


def test_the_passage_that_answers_comes_first_with_where_it_is(folder):
    found = Documents.read(folder).search("how high is the lighthouse of Lorn")
    assert (found[0].document, found[0].number) == ("towns/lorn.txt", 0)
    assert found[0].score > found[-1].score and "41 metres" in found[0].text
    assert Documents.read(folder).search("zebra") == []
    assert len(Documents.read(folder).search("the", limit=1)) == 1


def test_passages_of_a_document_are_read_one_after_the_other(folder):
    found = Documents.read(folder, words=10)
    n = len(documents.split_passages(MILL, 10))
    assert found.retrieve("mill.md", n - 1).endswith("Bert.")
    assert found.retrieve("mill.md", 0, 10**9).split() == MILL.split()
    with pytest.raises(DataError, match="no passage"):
        found.retrieve("mill.md", n)
    with pytest.raises(DataError, match="no passage"):
        found.retrieve("mill.md", -1)


@pytest.mark.parametrize(("claim", "verdict"), [
    ("The harbour of Lorn was built in 1823.", "supported"),
    ("the lighthouse is 41 metres high", "supported"),
    ("The harbour of Lorn was built in 1824.", "conflicting"),
    ("The harbour of Lorn was not built in 1823", "conflicting"),
    ("The mill does grind on Sundays.", "conflicting"),
    ("The mill doesn't grind on Sundays.", "supported"),
    ("Zebras eat quartz.", "not found"), ("", "not found"), ("???", "not found")])
def test_a_claim_is_judged_by_the_sentence_nearest_to_it(folder, claim, verdict):
    found = Documents.read(folder).verify(claim)
    assert found.verdict == verdict
    assert bool(found.evidence) == bool(found.document) == (verdict != "not found")
    assert not found.evidence or found.evidence in HARBOUR + MILL


@pytest.mark.parametrize("name", [
    "../secret.txt", "towns/../../secret.txt", "/etc/passwd", "link.txt", "towns/up/secret.txt",
    "~/secret.txt", ".hidden.txt", ".git/config.txt", "towns", "", ".", "towns/lorn.txt\0",
    "%2e%2e/secret.txt", "..\\secret.txt", "pipe.txt", "photo.png", "huge.txt", "latin.txt"])
def test_no_name_and_no_link_leads_out_of_the_folder(folder, tmp_path, name, monkeypatch):
    (tmp_path / "secret.txt").write_text("the password is swordfish")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "towns/up").symlink_to(tmp_path)
    (folder / ".hidden.txt").write_text("swordfish")
    (folder / ".git").mkdir()
    (folder / ".git/config.txt").write_text("swordfish")
    (folder / "photo.png").write_text("swordfish")
    (folder / "latin.txt").write_bytes(b"swordfish \xe9")
    (folder / "huge.txt").write_text("swordfish " * 999)
    os.mkfifo(folder / "pipe.txt")
    monkeypatch.setattr(documents, "LARGEST_FILE", 5000)
    found = Documents.read(folder)
    with pytest.raises(DataError, match="no document"):
        found.retrieve(name)
    assert found.search("swordfish password") == []
    assert set(found.texts) == {"mill.md", "towns/lorn.txt"}


def test_a_folder_that_is_none_or_too_large_is_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="cannot be read"):
        Documents.read(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no text"):
        Documents.read(folder / "mill.md")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no text"):
        Documents.read(tmp_path / "empty")
    monkeypatch.setattr(documents, "LARGEST_FOLDER", 100)
    with pytest.raises(DataError, match="more than"):
        Documents.read(folder)


def test_a_file_whose_name_is_no_text_gets_one(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("a cafe by the sea")
    found = Documents.read(tmp_path).search("cafe")[0]
    assert found.document == "caf\ufffd.txt"
    found.document.encode()
