"""Stories as ids: every token in exactly one chunk, tokenized once, questions put as told."""

import json

import numpy as np
import pytest
import story_files
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers

from hippocampus.data import story_tokens
from hippocampus.data.cache import cache_path
from hippocampus.data.stories import open_stories
from hippocampus.data.story_forms import Question, Story
from hippocampus.data.story_tokens import (
    StoryTokens,
    Template,
    story_split,
    tokenize_questions,
    tokenize_story,
)
from hippocampus.data.tokenizers import Tokenizer, byte_tokenizer
from hippocampus.errors import ConfigError, DataError

STORIES = story_files.make_stories(4)


def marked_tokenizer():
    """Bytes by a library, with <|endoftext|> as id 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = LibraryTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(library.to_str())


TOKENIZERS = {"bytes": byte_tokenizer, "marked": marked_tokenizer}


@pytest.fixture
def stories(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPPOCAMPUS_CACHE", str(tmp_path / "cache"))
    story_files.write_fairytales(tmp_path / "train.jsonl", STORIES)
    story_files.write_fairytales(tmp_path / "val.jsonl", story_files.make_stories(2, first=9))
    return open_stories(str(tmp_path))


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200),
       chunk=st.integers(1, 60), kind=st.sampled_from(sorted(TOKENIZERS)))
def test_every_token_of_a_story_is_once_in_its_chunks_and_the_rest_is_padding(text, chunk, kind):
    tokenizer = TOKENIZERS[kind]()
    found = tokenize_story(Story("s", text, ()), tokenizer, chunk)
    assert isinstance(found, StoryTokens) and found.ids_CT.shape[1] == chunk
    assert tokenizer.decode(found.ids_CT[found.valid_CT]) == text
    # Padding is at the end of the last chunk alone, and is 0.
    assert not np.diff(found.valid_CT.ravel().astype(int)).clip(0).any()
    assert found.valid_CT[:, 0].all() and found.valid_CT[:-1].all()
    assert not found.ids_CT[~found.valid_CT].any()


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@pytest.mark.parametrize("chunk", [7, 64, 5000])
def test_the_cached_split_has_the_chunks_of_each_story(stories, kind, chunk):
    tokenizer = TOKENIZERS[kind]()
    split = story_split(stories, tokenizer, "train")
    assert split.names == tuple(story.name for story in STORIES)
    assert split.questions == tuple(story.questions for story in STORIES)
    for i, story in enumerate(STORIES):
        alone, cached = tokenize_story(story, tokenizer, chunk), split.chunks(i, chunk)
        np.testing.assert_array_equal(cached.ids_CT, alone.ids_CT)
        np.testing.assert_array_equal(cached.valid_CT, alone.valid_CT)
        assert cached.name == story.name
        assert split.lengths[i] == len(split.story_ids(i)) == alone.valid_CT.sum()


def test_a_second_time_nothing_is_read_or_tokenized(stories, monkeypatch):
    first = story_split(stories, byte_tokenizer(), "train")
    monkeypatch.setattr(Tokenizer, "encode_pieces", None)
    monkeypatch.setattr(type(stories), "read", None)
    second = story_split(stories, byte_tokenizer(), "train")
    np.testing.assert_array_equal(first.ids, second.ids)
    assert second.questions == first.questions and second.names == first.names


def test_another_chunk_and_another_template_need_no_new_ids(stories):
    split = story_split(stories, byte_tokenizer(), "train")
    assert isinstance(split.ids, np.memmap)
    assert np.shares_memory(split.story_ids(1), split.ids)


def test_changed_stories_get_ids_of_their_own(stories, tmp_path):
    before = story_split(stories, byte_tokenizer(), "train")
    story_files.write_fairytales(tmp_path / "train.jsonl", STORIES[:3])
    after = story_split(open_stories(str(tmp_path)), byte_tokenizer(), "train")
    assert (len(before), len(after)) == (4, 3)


@pytest.mark.parametrize("damage", ["", "[1, 2]", None])
def test_a_damaged_index_is_made_again_with_a_warning(stories, damage):
    right = story_split(stories, byte_tokenizer(), "train")
    path, = cache_path().glob("stories/*/train.json")
    path.write_text(path.read_text().replace("Who", "Why", 1) if damage is None else damage)
    with pytest.warns(UserWarning, match="damaged: made again"):
        found = story_split(stories, byte_tokenizer(), "train")
    assert found.questions == right.questions


def test_a_split_that_shares_a_story_with_another_is_never_tokenized(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPPOCAMPUS_CACHE", str(tmp_path / "cache"))
    for name in ("train", "val"):
        story_files.write_fairytales(tmp_path / f"{name}.jsonl", STORIES)
    with pytest.raises(DataError, match="in the splits train and validation"):
        story_split(open_stories(str(tmp_path)), byte_tokenizer(), "validation")


def test_an_empty_split_says_so(stories, tmp_path):
    (tmp_path / "val.jsonl").write_text(json.dumps({"story": "x", "sections": [" "], "qa": []}))
    with (pytest.warns(UserWarning, match="no text"),
          pytest.raises(DataError, match=r"validation split .* has no stories")):
        story_split(open_stories(str(tmp_path)), byte_tokenizer(), "validation")


TEMPLATE = Template("Question: {question}\nAnswer: {answer}\n")


def test_prompt_and_reply_are_the_template_cut_before_the_space_of_the_answer():
    assert TEMPLATE.prompt("Who {answer}?") == "Question: Who {answer}?\nAnswer:"
    assert TEMPLATE.reply("{question}") == " {question}\n"
    assert TEMPLATE.prompt("a") + TEMPLATE.reply("b") == "Question: a\nAnswer: b\n"


@pytest.mark.parametrize("text", ["{question}", "{answer}", "{answer} {question}", "",
                                  "{question}{question}{answer}"])
def test_a_template_that_does_not_ask_and_then_answer_is_refused(text):
    with pytest.raises(ConfigError, match="does not put a question"):
        Template(text)


@pytest.mark.parametrize(("begin", "end"), [(None, None), (256, 256)])
def test_questions_are_prompt_and_every_answer_between_begin_and_end(begin, end):
    asked = ((Question("Who?", ("Ann", "Ann <|endoftext|> did")),), (), (Question("Why?", ("x",)),))
    tokenizer = marked_tokenizer()
    found = tokenize_questions(asked, tokenizer, TEMPLATE, begin_id=begin, end_id=end)
    assert [len(one) for one in found] == [1, 0, 1]
    before, behind = ([] if one is None else [one] for one in (begin, end))
    one = found[0][0]
    assert one.prompt.tolist() == before + tokenizer.encode("Question: Who?\nAnswer:").tolist()
    assert one.answers[0].tolist() == tokenizer.encode(" Ann\n").tolist() + behind
    # What looks like a special token is text, and no second end.
    assert (one.answers[1] == 256).sum() == len(behind)
    assert one.length == len(one.prompt) + len(one.answers[1])
    assert one.prompt.dtype == one.answers[0].dtype == np.int32


def test_an_answer_has_the_ids_that_it_has_behind_its_prompt():
    # As SentencePiece: a space in front of every text, so that " Ann" alone would have two.
    letters = sorted(set("_Question:Who?\nAnswer"))
    library = LibraryTokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("_"),
                                               normalizers.Replace(" ", "_")])
    found = tokenize_questions(((Question("Who?", ("Ann",)),),), Tokenizer(library.to_str()),
                               TEMPLATE, begin_id=None, end_id=None)[0][0]
    written = ["".join(letters[i] for i in ids) for ids in (found.prompt, *found.answers)]
    assert written == ["_Question:_Who?\nAnswer:", "_Ann\n"]


def test_an_answer_that_would_merge_with_its_prompt_stands_alone():
    letters = ["q", "=", "a", "=a"]
    library = LibraryTokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)},
                                          merges=[("=", "a")]))
    found = tokenize_questions(((Question("q", ("a",)),),), Tokenizer(library.to_str()),
                               Template("{question}={answer}"), begin_id=None, end_id=None)[0][0]
    assert (found.prompt.tolist(), found.answers[0].tolist()) == ([0, 1], [2])


def test_a_chunk_needs_a_token():
    with pytest.raises(ConfigError, match="chunk of 0"):
        tokenize_story(STORIES[0], byte_tokenizer(), 0)


def test_stories_that_change_between_index_and_ids_are_refused(stories, monkeypatch):
    monkeypatch.setattr(story_tokens, "_index", lambda *_: [("tale-0", ())])
    with pytest.raises(DataError, match="changed while they were read"):
        story_split(stories, byte_tokenizer(), "train")
