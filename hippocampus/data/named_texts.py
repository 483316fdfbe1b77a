"""The named texts that lie in `$HIPPOCAMPUS_DATA`: `tinyshakespeare` and `wikitext_mini`."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import urllib.request
import warnings
from pathlib import Path

from hippocampus.data import text_files
from hippocampus.data.cache import cache_path
from hippocampus.data.documents import cut, group_lines, join
from hippocampus.errors import DataError
from hippocampus.files import write_atomically

SHAKESPEARE_FILE = "tinyshakespeare.txt"
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOWNLOAD_TIMEOUT_SECONDS = 10

MINI_FILES = ("wikipedia/wiki.utf8", "fairytaleqa/train.jsonl", "speeches/inaugural.txt",
              "speeches/state_union.txt", "wikitext-2/wiki.valid.tokens")
WIKITEXT_ARTICLE = r"^ = [^=].* = $"

_DOC = re.compile(r"<doc [^>]*>\n(.*?)</doc>", re.DOTALL)
_SPEECH_END = re.compile(r"\n[ \t]*\n[ \t]*\n")


def tinyshakespeare() -> str:
    """Read Tiny Shakespeare from `$HIPPOCAMPUS_DATA`, else download it into `$HIPPOCAMPUS_CACHE`.

    Raises:
        DataError: it is nowhere to be had, or is not the known text.
    """
    cached = cache_path() / SHAKESPEARE_FILE
    for path in (*(folder / SHAKESPEARE_FILE for folder in data_folders()), cached):
        if path.is_file():
            text = "".join(text_files.read(path))
            if hashlib.sha256(text.encode()).hexdigest() != SHAKESPEARE_SHA256:
                raise DataError(
                    f"data.corpus: {path} is not Tiny Shakespeare: its sha256 does not begin "
                    f"with {SHAKESPEARE_SHA256[:12]}",
                    "delete the damaged file, or read it as it is with "
                    f"--config.data.corpus={path}",
                )
            return text
    content = _download_shakespeare()
    try:
        write_atomically(cached, content)
    except OSError as error:
        # The text is in hand; only the next run pays for it.
        warnings.warn(f"cannot keep a copy in {cached.parent}: {error.strerror}", stacklevel=3)
    return content.decode()


def wikitext_mini() -> tuple[list[str], list[str]]:
    """Read the small Wikipedia-like corpus from `$HIPPOCAMPUS_DATA`.

    Training, 7.3 MB, in this order: every article of `wikipedia/wiki.utf8` (the text between
    its `<doc …>` and `</doc>` tags, which begins with the title; the tags are left out), every
    story of `fairytaleqa/train.jsonl` (its sections, joined by empty lines; no title, no
    questions), every speech of `speeches/inaugural.txt` and `state_union.txt` (cut at two empty
    lines, which stand between speeches and between the parts of a few). Each is one document,
    stripped of white space at both ends and closed with a line end. Validation: the 60 articles of
    `wikitext-2/wiki.valid.tokens`, cut at their headings and otherwise untouched.

    It is not WikiText-103, and its perplexities are not comparable with those of WikiText-103.

    Returns:
        The training and the validation documents.

    Raises:
        DataError: files are missing or damaged.
    """
    folder = next((f for f in data_folders() if (f / MINI_FILES[0]).is_file()), None)
    missing = [name for name in MINI_FILES if folder is None or not (folder / name).is_file()]
    if folder is None or missing:
        raise DataError(
            f"data.corpus: wikitext_mini needs {', '.join(missing)}",
            "put them under the folder that the environment variable HIPPOCAMPUS_DATA names "
            f"(looked in {', '.join(map(str, data_folders()))})",
        )
    wiki, stories, inaugural, union, validation = (folder / name for name in MINI_FILES)
    train = [match.group(1) for match in _DOC.finditer(_text(wiki))]
    try:
        train += ["\n\n".join(json.loads(line)["sections"]) for line in text_files.lines(stories)]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"data.corpus: {stories} is not FairytaleQA's train.jsonl",
                        "restore it from a copy") from None
    train += [speech for path in (inaugural, union) for speech in _SPEECH_END.split(_text(path))]
    train = [text.strip() + "\n" for text in train if text.strip()]
    articles = _articles(validation)
    return train, articles


def _articles(path: Path) -> list[str]:
    """The articles of a WikiText file of lines."""
    return list(join(cut(group_lines(text_files.lines(path), re.compile(WIKITEXT_ARTICLE)))))


def data_folders() -> list[Path]:
    """Where named texts are looked for."""
    if folder := os.environ.get("HIPPOCAMPUS_DATA"):
        return [Path(folder).expanduser()]
    checkout = Path(__file__).resolve().parents[2]
    return [Path("../shared/data"), checkout / "../shared/data"]



def _text(path: Path) -> str:
    return "".join(text_files.read(path))


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
