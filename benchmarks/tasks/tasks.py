"""Finds the tasks' data beside this file, wherever the checkout is."""

import json
from pathlib import Path


def read(name: str, **_: object) -> dict:
    """The rows of a file as lm_eval takes them: a split and its data set."""
    from datasets import Dataset

    text = Path(__file__).with_name(name).read_text("utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return {"test": Dataset.from_list(rows)}


def questions(**_: object) -> dict:
    """Twelve questions with four answers each."""
    return read("questions.jsonl")


def paragraphs(**_: object) -> dict:
    """Three short texts."""
    return read("paragraphs.jsonl")
