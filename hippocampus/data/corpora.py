"""Texts to train on, split into training and validation: `load_corpus`, `Corpus`.

A corpus is named (`pydoc`, `tinyshakespeare`) or is the path of a local UTF-8 file. Every corpus
carries the digest of its text, so that two results can be said to rest on the same data.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import http.client
import os
import sysconfig
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hippocampus.errors import DataError
from hippocampus.files import write_atomically

TRAIN_PERCENT = 90

SHAKESPEARE_FILE = "tinyshakespeare.txt"
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOWNLOAD_TIMEOUT_SECONDS = 10

TOPICS_MODULE = "pydoc_data.topics"
TEST_PACKAGES = frozenset({"test", "tests", "idle_test"})
MIN_PROSE_CHARACTERS = 40


@dataclass(frozen=True)
class Corpus:
    """A text in its two parts.

    Attributes:
        name: the name or path it was asked for by.
        train: the training part.
        validation: the validation part, disjoint from `train`.
        sha256: hex digest of `train + validation` in UTF-8.
    """

    name: str
    train: str
    validation: str
    sha256: str


def load_corpus(name: str) -> Corpus:
    """Load a named corpus or a local text file.

    Args:
        name: `"pydoc"` (the prose of this Python's standard library: its help topics and
            docstrings, about 2 million characters, never touches the network),
            `"tinyshakespeare"` (from `$HIPPOCAMPUS_DATA`, else downloaded into
            `$HIPPOCAMPUS_CACHE`), or a path: anything with a separator, ending in `.txt`, or
            existing.

    Returns:
        The corpus. `pydoc` keeps whole modules apart (a tenth of them validate, less the
        paragraphs that training has too); every other text gives its first 90 % of the
        characters to training and the rest to validation.

    Raises:
        DataError: the name is unknown, or the text is missing, empty, damaged or not UTF-8.
    """
    if name in _LOADERS:
        train, validation = _LOADERS[name]()
    elif _looks_like_path(name):
        train, validation = _split(_decode(_read(Path(name).expanduser()), name))
    else:
        known = ", ".join(_LOADERS)
        nearest = difflib.get_close_matches(name.lower(), _LOADERS, n=1)
        suggestion = f"did you mean {nearest[0]}? " if nearest else ""
        raise DataError(
            f"data.corpus: unknown corpus {name!r}; known: {known}",
            f"{suggestion}a local file works too: --config.data.corpus=/path/to/file.txt",
        )
    digest = hashlib.sha256()
    digest.update(train.encode())
    digest.update(validation.encode())
    return Corpus(name, train, validation, digest.hexdigest())


def _looks_like_path(name: str) -> bool:
    return "/" in name or os.sep in name or name.endswith(".txt") or os.path.exists(name)


def _split(text: str) -> tuple[str, str]:
    cut = len(text) * TRAIN_PERCENT // 100
    return text[:cut], text[cut:]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"data.corpus: there is no file {path}",
            f"check the path, or use one of: {', '.join(_LOADERS)}",
        ) from None
    except IsADirectoryError:
        raise DataError(
            f"data.corpus: {path} is a directory", "name one UTF-8 text file inside it"
        ) from None
    except OSError as error:
        raise DataError(
            f"data.corpus: {path} cannot be read: {error.strerror}", "check its permissions"
        ) from None


def _decode(content: bytes, name: str) -> str:
    """Decode without translating line ends: the digest is that of the file."""
    bad = content.find(b"\0")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = error.start if bad < 0 else min(bad, error.start)
    if bad >= 0:
        raise DataError(
            f"data.corpus: {name} is not UTF-8 text (byte 0x{content[bad]:02x} at offset {bad})",
            "convert it first, for example with iconv -t UTF-8",
        )
    if not text.strip():
        raise DataError(f"data.corpus: {name} is empty", "name a file with text in it")
    return text


def _tinyshakespeare() -> tuple[str, str]:
    cached = _cache_folder() / SHAKESPEARE_FILE
    for path in (*(folder / SHAKESPEARE_FILE for folder in _data_folders()), cached):
        if path.is_file():
            content = _read(path)
            if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
                raise DataError(
                    f"data.corpus: {path} is not Tiny Shakespeare: its sha256 does not begin "
                    f"with {SHAKESPEARE_SHA256[:12]}",
                    "delete the damaged file, or read it as it is with "
                    f"--config.data.corpus={path}",
                )
            return _split(_decode(content, str(path)))

    content = _download_shakespeare()
    try:
        write_atomically(cached, content)
    except OSError as error:
        # The text is in hand; only the next run pays for it.
        warnings.warn(f"cannot keep a copy in {cached.parent}: {error.strerror}", stacklevel=3)
    return _split(_decode(content, SHAKESPEARE_URL))


def _download_shakespeare() -> bytes:
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=DOWNLOAD_TIMEOUT_SECONDS) as reply:
            content: bytes = reply.read()
        reason = "the download is not the known text (wrong sha256)"
    except (OSError, http.client.HTTPException) as error:
        content, reason = b"", f"the download failed ({error})"
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        raise DataError(
            f"data.corpus: no {SHAKESPEARE_FILE} in $HIPPOCAMPUS_DATA, and {reason}",
            "pass a local file with --config.data.corpus=/path/to/file.txt",
        )
    return content


def _data_folders() -> list[Path]:
    if folder := os.environ.get("HIPPOCAMPUS_DATA"):
        return [Path(folder).expanduser()]
    checkout = Path(__file__).resolve().parents[2]
    return [Path("../shared/data"), checkout / "../shared/data"]


def _cache_folder() -> Path:
    return Path(os.environ.get("HIPPOCAMPUS_CACHE") or "~/.cache/hippocampus").expanduser()


def _pydoc() -> tuple[str, str]:
    parts: dict[bool, list[str]] = {False: [], True: []}
    seen: set[str] = set()
    for module, texts in _standard_library():
        # By module, so that no docstring is validated by its neighbours of the same class.
        validates = int(hashlib.sha256(module.encode()).hexdigest(), 16) % 100 >= TRAIN_PERCENT
        for text in texts:
            text = text.encode("utf-8", "ignore").decode()  # an escape may make a lone surrogate
            if len(text) >= MIN_PROSE_CHARACTERS and text not in seen:
                seen.add(text)
                parts[validates].append(text)
    if not seen:
        raise DataError(
            "data.corpus: this Python comes without the sources of its standard library",
            "pass a local file with --config.data.corpus=/path/to/file.txt",
        )
    train, validation = ("".join(text + "\n\n" for text in parts[side]) for side in (False, True))
    return train, _without_paragraphs_of(train, validation)


def _without_paragraphs_of(train: str, validation: str) -> str:
    """Drop what a model could have memorised: help topics quote whole passages of each other."""
    known = {p.strip() for p in train.split("\n\n") if len(p.strip()) >= MIN_PROSE_CHARACTERS}
    return "\n\n".join(p for p in validation.split("\n\n") if p.strip() not in known)


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


_LOADERS: dict[str, Callable[[], tuple[str, str]]] = {
    "pydoc": _pydoc,
    "tinyshakespeare": _tinyshakespeare,
}
