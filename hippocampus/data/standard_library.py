"""The prose of this Python's standard library, the corpus `pydoc`: `read_modules`."""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from hippocampus.errors import DataError

TRAIN_PERCENT = 90
TOPICS_MODULE = "pydoc_data.topics"
TEST_PACKAGES = frozenset({"test", "tests", "idle_test"})
MIN_PROSE_CHARACTERS = 40


def read_modules() -> tuple[list[str], list[str]]:
    """Read the help topics and docstrings without importing a module.

    Returns:
        The training and the validation documents, a module (or help topic) each. Whole modules
        are on one side; a tenth of them validate, less the paragraphs that training has too.

    Raises:
        DataError: this Python comes without sources.
    """
    sides: dict[bool, list[str]] = {False: [], True: []}
    seen: set[str] = set()
    for module, texts in _standard_library():
        # By module, so that no docstring is validated by its neighbours of the same class.
        validates = int(hashlib.sha256(module.encode()).hexdigest(), 16) % 100 >= TRAIN_PERCENT
        document = ""
        for text in texts:
            text = text.encode("utf-8", "ignore").decode()  # an escape may make a lone surrogate
            if len(text) >= MIN_PROSE_CHARACTERS and text not in seen:
                seen.add(text)
                document += text + "\n\n"
        if document:
            sides[validates].append(document)
    if not seen:
        raise DataError(
            "data.corpus: this Python comes without the sources of its standard library",
            "pass a local file with --config.data.corpus=/path/to/file.txt",
        )
    train, validation = sides[False], sides[True]
    return train, _without_paragraphs_of(train, validation)


def _without_paragraphs_of(train: list[str], validation: list[str]) -> list[str]:
    """Drop what a model could have memorised: help topics quote whole passages of each other."""
    known = {
        p.strip()
        for text in train
        for p in text.split("\n\n")
        if len(p.strip()) >= MIN_PROSE_CHARACTERS
    }
    kept = ("\n\n".join(p for p in text.split("\n\n") if p.strip() not in known)
            for text in validation)
    return [text for text in kept if text]


def _standard_library() -> Iterator[tuple[str, list[str]]]:
    """Yield every module's name and its texts, sorted by name; each help topic is a module."""
    root = Path(sysconfig.get_path("stdlib"))
    for module, path in sorted(_source_files(root)):
        try:
            with warnings.catch_warnings():
                # Old sources have invalid escapes, which is no concern of ours.
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        if module == TOPICS_MODULE:
            for topic, text in sorted(_topics(tree).items()):
                yield f"{TOPICS_MODULE}.{topic}", [text.strip()]
        else:
            yield module, list(_docstrings(tree))


def _source_files(root: Path) -> Iterator[tuple[str, Path]]:
    for folder, subfolders, files in os.walk(root):
        # Packages only: this leaves out site-packages, lib-dynload and the build's config-* too.
        subfolders[:] = [s for s in subfolders if s.isidentifier() and s not in TEST_PACKAGES]
        for file in files:
            path = Path(folder, file)
            if path.suffix == ".py" and path.stem.isidentifier():
                parts = path.relative_to(root).with_suffix("").parts
                yield ".".join(parts).removesuffix(".__init__"), path


def _topics(tree: ast.Module) -> dict[str, str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            return topics
    return {}


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Yield the docstrings in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
        text := ast.get_docstring(node)
    ):
        yield text
    for child in ast.iter_child_nodes(node):
        # Definitions hide in blocks (if, try, with), never in expressions.
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _docstrings(child)
