"""Invented stories, written to disk in the forms that `hippocampus.data.stories` reads."""

import json
from pathlib import Path

import numpy as np

from hippocampus.data.story_forms import Question, Story

PEOPLE = ("Ann", "Bert", "Cleo", "Dora", "Emil", "Finn")
THINGS = ("lantern", "copper key", "blue kettle", "old map", "silver bell", "wooden flute")
PLACES = ("the mill", "the harbour", "the orchard", "the tower", "the well", "the bridge")


def make_stories(n: int, first: int = 0, sentences: int = 12) -> list[Story]:
    """Stories first .. first + n - 1, in which somebody leaves things at places; all different."""
    return [_story(number, sentences) for number in range(first, first + n)]


def _story(number: int, sentences: int) -> Story:
    rng = np.random.default_rng(number)
    left = [(PEOPLE[rng.integers(6)], THINGS[i], PLACES[rng.integers(6)])
            for i in rng.permutation(6)[:4]]
    told = [f"{who} left the {thing} at {place}." for who, thing, place in left]
    told += [f"Then it rained for {rng.integers(2, 99)} days." for _ in range(sentences)]
    body = " ".join(told[i] for i in rng.permutation(len(told)))
    questions = tuple(Question(f"Who left the {thing}?", (who, f"{who} did, at {place}"),
                               "character") for who, thing, place in left)
    return Story(f"tale-{number}", f"Tale {number}.\n\n{body}", questions)


def features():
    """NarrativeQA's, as the hub has them."""
    from datasets import Features, List, Value

    text, number = Value("string"), Value("int32")
    tokens = {"text": text, "tokens": List(text)}
    return Features({
        "document": {"id": text, "kind": text, "url": text, "file_size": number,
                     "word_count": number, "start": text, "end": text,
                     "summary": {"text": text, "tokens": List(text), "url": text, "title": text},
                     "text": text},
        "question": tokens, "answers": List(tokens)})


def narrative_rows(stories, raw=lambda text: text):
    """A row for every question, each with the whole document; `raw` dirties the text."""
    def tokens(text):
        return {"text": text, "tokens": text.split()}

    return [{"document": {"id": story.name, "kind": "gutenberg", "url": "", "file_size": 1,
                          "word_count": 2, "start": "", "end": "",
                          "summary": {**tokens(f"Summary of {story.name}."), "url": "",
                                      "title": story.name},
                          "text": raw(story.text)},
             "question": tokens(one.text), "answers": [tokens(a) for a in one.answers]}
            for story in stories for one in story.questions]


def write_narratives(folder: Path, form: str, rows_by_split) -> Path:
    """With `datasets`, as parquet of the hub's layout, flat parquet, or jsonl."""
    from datasets import Dataset

    for split, rows in rows_by_split.items():
        table = Dataset.from_list(list(rows), features=features())
        if form == "hub":
            (folder / "data").mkdir(parents=True, exist_ok=True)
            half = max(1, len(rows) // 2)
            for i, part in enumerate((range(half), range(half, len(rows)))):
                table.select(part).to_parquet(folder / f"data/{split}-0000{i}-of-00002.parquet")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{split}.{form}"
            table.to_parquet(path) if form == "parquet" else table.to_json(path)
    return folder


def write_fairytales(path: Path, stories) -> Path:
    """FairytaleQA's jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({
        "story": story.name, "sections": story.text.split("\n\n"),
        "qa": [{"q": one.text, "a": list(one.answers), "sections": ["1"], "kind": one.kind,
                "scope": "local", "explicit": "explicit"} for one in story.questions],
    }) + "\n" for story in stories), "utf-8")
    return path
