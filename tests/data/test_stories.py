"""Stories from every form: the same stories, each once, in one split; errors that name fields."""

import json
import os
from pathlib import Path

import pytest
import story_files
from huggingface_hub import constants as hub_constants

from hippocampus.data import stories as data_stories
from hippocampus.data import story_forms
from hippocampus.data.rows import Table
from hippocampus.data.stories import open_stories, read_stories
from hippocampus.data.story_forms import Story
from hippocampus.errors import DataError

TRAIN, HELD = story_files.make_stories(5), story_files.make_stories(3, first=5)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test waits for the network."""
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def fairytale_folder():
    default = Path(__file__).resolve().parents[2] / "../shared/data"
    path = Path(os.environ.get("HIPPOCAMPUS_DATA") or default) / "fairytaleqa"
    if not path.is_dir():
        pytest.skip("no fairytaleqa in $HIPPOCAMPUS_DATA or ../shared/data")
    return path


def without_kinds(stories):
    """As NarrativeQA has them."""
    return [Story(s.name, s.text, tuple(story_forms.Question(q.text, q.answers)
                                        for q in s.questions)) for s in stories]


def splits_of_rows():
    return {split: story_files.narrative_rows(stories)
            for split, stories in (("train", TRAIN), ("validation", HELD))}


@pytest.mark.parametrize("form", ["hub", "parquet", "jsonl"])
def test_narrativeqa_is_grouped_by_story_whatever_files_it_lies_in(tmp_path, form):
    folder = story_files.write_narratives(tmp_path / form, form, splits_of_rows())
    stories = open_stories(str(folder))
    assert stories.splits == ("train", "validation")
    assert list(stories.read("train")) == without_kinds(TRAIN)
    assert list(stories.read("validation")) == without_kinds(HELD)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_rows_of_a_story_need_not_follow_each_other(tmp_path, form):
    rows = splits_of_rows()
    rows["train"] = rows["train"][::2] + rows["train"][1::2]
    folder = story_files.write_narratives(tmp_path, form, rows)
    found = {story.name: story for story in read_stories(str(folder), "train")}
    assert found.keys() == {story.name for story in TRAIN}
    for story in without_kinds(TRAIN):
        assert found[story.name].text == story.text
        assert set(found[story.name].questions) == set(story.questions)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_the_summary_takes_the_place_of_the_document(tmp_path, form):
    folder = story_files.write_narratives(tmp_path, form, splits_of_rows())
    whole, summaries = open_stories(str(folder)), open_stories(str(folder), text="summary")
    assert [story.text for story in summaries.read("train")] == [
        f"Summary of {story.name}." for story in TRAIN]
    assert whole.digest != summaries.digest


def test_documents_are_cleaned_and_those_without_text_are_left_out_with_a_warning(tmp_path):
    def raw(text):
        return "" if text.startswith("Tale 1.") else f"<html><pre>{text}</pre></html>"

    rows = {"train": story_files.narrative_rows(TRAIN, raw),
            "validation": story_files.narrative_rows(HELD)}
    folder = story_files.write_narratives(tmp_path, "jsonl", rows)
    with pytest.warns(UserWarning, match="1 stories .* have no text"):
        found = list(read_stories(str(folder), "train"))
    assert found == [story for story in without_kinds(TRAIN) if story.name != "tale-1"]


def test_texts_are_read_as_they_are_asked_for(tmp_path, monkeypatch):
    folder = story_files.write_narratives(tmp_path, "parquet", splits_of_rows())
    cleaned = []
    monkeypatch.setattr(story_forms, "clean_text", lambda text: cleaned.append(text) or text)
    stories = read_stories(str(folder), "train")
    next(stories)
    assert len(cleaned) == 1
    list(stories)
    assert len(cleaned) == len(TRAIN)


@pytest.fixture
def hub(monkeypatch):
    """rows by split -> a hub that has them as `somebody/stories`."""
    from datasets import Dataset

    def make(rows_by_split):
        def open_repository(name, subset, streaming):
            assert (name, subset) == ("somebody/stories", "")
            parts = {split: Dataset.from_list(rows, features=story_files.features())
                     for split, rows in rows_by_split.items()}

            def opener(split):
                return parts[split].to_iterable_dataset() if streaming else parts[split]

            return Table(name, tuple(parts), "0" * 64, opener, streaming)

        monkeypatch.setattr(data_stories, "open_repository", open_repository)

    return make


@pytest.mark.parametrize("streaming", [False, True])
def test_the_hub_gives_the_same_stories_kept_or_streamed(hub, streaming):
    hub(splits_of_rows())
    stories = open_stories("somebody/stories", streaming=streaming)
    assert list(stories.read("train")) == without_kinds(TRAIN)
    assert list(stories.read("validation")) == without_kinds(HELD)
    stories.check_splits()


def test_a_stream_whose_story_comes_back_is_refused(hub):
    rows = splits_of_rows()
    hub({**rows, "train": [*rows["train"][1:], rows["train"][0]]})
    with pytest.raises(DataError, match=r"tale-0.*do not follow each other") as caught:
        list(read_stories("somebody/stories", "train", streaming=True))
    assert "data.streaming=False" in caught.value.hint


def test_a_stream_without_a_validation_split_is_refused(hub):
    hub({"train": splits_of_rows()["train"]})
    with pytest.raises(DataError, match="no validation split to stream"):
        open_stories("somebody/stories", streaming=True)
    assert open_stories("somebody/stories").splits == ("train", "validation")


def test_fairytaleqa_is_read_from_a_folder_whose_validation_file_is_called_val(tmp_path):
    story_files.write_fairytales(tmp_path / "train.jsonl", TRAIN)
    story_files.write_fairytales(tmp_path / "val.jsonl", HELD)
    stories = open_stories(str(tmp_path))
    assert list(stories.read("train")) == TRAIN
    assert list(stories.read("validation")) == HELD


@pytest.mark.parametrize("n", [2, 5, 40])
def test_one_file_holds_out_a_tenth_of_its_stories_whatever_their_order(tmp_path, n):
    every = story_files.make_stories(n, sentences=1)
    halves = []
    for order in (every, every[::-1]):
        stories = open_stories(str(story_files.write_fairytales(tmp_path / "mine.jsonl", order)))
        assert stories.splits == ("train", "validation")
        halves.append({split: {story.name for story in stories.read(split)}
                       for split in stories.splits})
        stories.check_splits()
    assert halves[0] == halves[1]
    train, held = halves[0]["train"], halves[0]["validation"]
    assert len(held) == -(-n // 10) and not train & held
    assert train | held == {story.name for story in every}


def test_a_test_file_alone_is_all_that_there_is(tmp_path):
    story_files.write_fairytales(tmp_path / "test.jsonl", HELD)
    stories = open_stories(str(tmp_path))
    assert stories.splits == ("test",) and list(stories.read("test")) == HELD


def test_a_story_in_two_splits_is_refused_by_name(tmp_path):
    story_files.write_fairytales(tmp_path / "train.jsonl", TRAIN)
    story_files.write_fairytales(tmp_path / "test.jsonl", [*HELD, TRAIN[3]])
    story_files.write_fairytales(tmp_path / "val.jsonl", HELD[:1])
    with pytest.raises(DataError, match=r"tale-3.*train and test|tale-5.*validation and test"):
        open_stories(str(tmp_path)).check_splits()


def test_the_digest_changes_with_an_answer_and_not_with_the_place(tmp_path):
    first = story_files.write_fairytales(tmp_path / "a" / "x.jsonl", TRAIN)
    second = story_files.write_fairytales(tmp_path / "b" / "y.jsonl", TRAIN)
    third = story_files.write_fairytales(tmp_path / "c.jsonl", TRAIN)
    third.write_text(third.read_text().replace('"Ann"', '"Anna"', 1))
    one, two, three = (open_stories(str(path)).digest for path in (first, second, third))
    assert one == two != three


def test_questions_without_an_answer_are_left_out(tmp_path):
    record = {"story": "s", "sections": ["Once."], "qa": [
        {"q": "Why?", "a": [" ", ""], "kind": "x"},
        {"q": "Who?", "a": ["", " Ann "], "kind": None}]}
    (tmp_path / "test.jsonl").write_text(json.dumps(record))
    assert list(read_stories(str(tmp_path), "test")) == [
        Story("s", "Once.", (story_forms.Question("Who?", ("Ann",)),))]


@pytest.mark.parametrize(("content", "message"), [
    ('{"title": "x", "body": "y"}', r"the fields title, body, which are of no known form"),
    ('{"story": "x", "sections": ["y"]}', r"the fields story, sections, which"),
    ("no json", r"test\.jsonl line 1 is not a JSON object"),
    ('[1]', r"line 1 is not a JSON object"),
    ('{"story": "s", "sections": "text", "qa": []}', r"story 's' .* is not FairytaleQA's"),
    ('{"story": "s", "sections": ["t"], "qa": [{"q": "?", "a": "text"}]}', "is not FairytaleQA's"),
    ('{"story": "s", "sections": ["t"], "qa": [{"question": "?"}]}', "is not FairytaleQA's"),
    ('{"story": "s", "sections": ["t"], "qa": []}\n{"story": "s", "sections": ["t"], "qa": []}',
     "story 's' .* comes twice"),
    ('{"story": "s", "sections": ["t"], "qa": []}\n{"story": "u"}',
     r"line 2 has no field 'sections'"),
    ('{"document": {"id": "1"}, "question": {"text": "?"}, "answers": []}',
     r"line 1 has no field 'document.text'"),
    ('{"document": {"id": "1", "text": "t"}, "question": {"text": "?"}, "answers": ["a"]}',
     "is not NarrativeQA's"),
])
def test_errors_of_a_file_are_one_line_that_names_what_is_wrong(tmp_path, content, message):
    (tmp_path / "test.jsonl").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_stories(str(tmp_path), "test"))
    assert "\n" not in caught.value.message and caught.value.hint


def test_parquet_of_other_fields_names_them(tmp_path):
    from datasets import Dataset

    Dataset.from_list([{"title": "x", "text": "y"}]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="the fields title, text, which are of no known form"):
        open_stories(str(tmp_path))


def test_parquet_without_the_text_says_which_field(tmp_path):
    from datasets import Dataset

    rows = [{"document": {"id": "1"}, "question": {"text": "?"}, "answers": [{"text": "a"}]}]
    Dataset.from_list(rows).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(DataError, match=r"document\.text"):
        list(read_stories(str(tmp_path), "test"))


@pytest.mark.parametrize("source", ["deepmind/narrativeqa", "nowhere/at/all", "nothing.jsonl"])
def test_what_is_not_there_names_the_field_and_what_to_do(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^data\.corpus: ") as caught:
        open_stories(source)
    assert source.rpartition("/")[2] in caught.value.message and caught.value.hint


def test_a_folder_without_stories_and_an_unknown_split_or_text_are_refused(tmp_path):
    with pytest.raises(DataError, match="no stories in the folder"):
        open_stories(str(tmp_path))
    path = story_files.write_fairytales(tmp_path / "x.jsonl", TRAIN)
    with pytest.raises(DataError, match="no split 'test'"):
        list(read_stories(str(path), "test"))
    with pytest.raises(DataError, match="document or summary"):
        open_stories(str(path), text="title")


def test_fairytaleqa_itself_has_255_stories_of_which_none_is_in_both_splits(fairytale_folder):
    stories = open_stories(str(fairytale_folder))
    stories.check_splits()
    found = {split: list(stories.read(split)) for split in stories.splits}
    counts = {split: (len(s), sum(len(one.questions) for one in s)) for split, s in found.items()}
    assert counts == {"train": (232, 8548), "validation": (23, 1025)}
    assert {one.kind for story in found["validation"] for one in story.questions} == {
        "action", "causal relationship", "character", "feeling", "outcome resolution",
        "prediction", "setting"}
