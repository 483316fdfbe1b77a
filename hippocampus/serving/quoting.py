"""Foreign text in a prompt, as a JSON string in which no control mark can stand: `quote`.

JSON escapes line ends and control characters already. Angle brackets are escaped too, so that no
tag of any model family is in the text, and so is the first character of whatever the tokenizer
has an id for by name. The ids are made with special tokens switched off besides.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from hippocampus.data.documents import Piece
from hippocampus.data.tokenizers import Tokenizer

_TAGS = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "```")
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn")

Segment = tuple[str, bool]
"""A text, and whether it is ours: control marks in it count. In any other they are text."""


def quote(text: str, tags: Iterable[str] = ()) -> str:
    """A JSON string that `json.loads` reads as the text, without its invisible characters.

    Args:
      text: of a stranger.
      tags: that may not stand in it, as `added_tokens` gives them; those of `_TAGS` never do.
    """
    visible = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in _INVISIBLE)
    quoted = json.dumps(visible, ensure_ascii=False)
    quoted = quoted.replace("<", "\\u003c").replace(">", "\\u003e")
    for tag in sorted({*_TAGS, *tags}, key=len, reverse=True):
        # A backslash could be half of an escape: what begins with one is broken behind it.
        if len(tag) > 1 and tag.strip() == tag and not set(tag) & set('<>"\\'):
            quoted = quoted.replace(tag, f"\\u{ord(tag[0]):04x}{tag[1:]}"
                                    if ord(tag[0]) < 2**16 else "")
    return quoted


def added_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """What a tokenizer has an id for by name, whatever stands around it."""
    added = json.loads(tokenizer.to_json()).get("added_tokens") or ()
    return tuple(str(one["content"]) for one in added)


def encode_segments(tokenizer: Tokenizer, segments: Sequence[Segment], *,
                    first: bool) -> np.ndarray:
    """The ids of segments one after the other.

    Args:
      tokenizer: of the model.
      segments: text, and whether it is ours.
      first: they begin a text, so that the tokenizer's own first token stands in front.

    Raises:
      DataError: a character that the tokenizer does not know.
    """
    begin = getattr(tokenizer, "begin_id", None)
    parts: list[np.ndarray] = []
    for text, ours in segments:
        if not text:
            continue
        ids = tokenizer.encode(text) if ours else tokenizer.encode_pieces(
            [Piece(text, starts=False, ends=False)])[0]
        if ours and begin is not None and len(ids) and ids[0] == begin and (parts or not first):
            ids = ids[1:]
        parts.append(ids)
    whole = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    if first and begin is not None and (not len(whole) or whole[0] != begin):
        whole = np.concatenate((np.array([begin], np.int32), whole))
    return whole.astype(np.int32)
