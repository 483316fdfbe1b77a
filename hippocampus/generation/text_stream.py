"""From new ids to text, as it becomes certain.

A character may be spread over up to four tokens, and a stop string over any number: text that a
later token could still change, or make part of a stop string, is held back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hippocampus.data.tokenizers import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8, so the most tokens that it can be spread over."""
_CONTEXT = 4
"""Ids in front of the new ones that are decoded with them, so that spaces between words stay."""


class TextStream:
    """The text of one row's new ids.

    Attributes:
      text: what is certain so far and counts: nothing from a stop string on.
      n_tokens: new ids that were read, up to the one that completed a stop string.
      stopped: a stop string was found.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] | np.ndarray,
                 stop: Sequence[str] = ()):
        """Nothing is read yet.

        Args:
          tokenizer: of the ids.
          prompt_ids: what the new ids follow; none of its text comes out.
          stop: strings that end the text, none of them empty.
        """
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._before = [int(index) for index in prompt_ids[-_CONTEXT:]]
        self._pending: list[int] = []
        self._held = ""
        self._pieces: list[str] = []
        self.n_tokens, self.stopped = 0, False

    @property
    def text(self) -> str:
        """All pieces together."""
        return "".join(self._pieces)

    def push(self, ids: Sequence[int]) -> str:
        """Reads further ids; those behind a stop string are left alone.

        Returns:
          The text that became certain; the pieces are the same text however the ids are grouped.
        """
        ids = [int(index) for index in ids]
        if self.stopped or not ids:
            return ""
        at_once = self._at_once(ids)
        if at_once is not None:
            return at_once
        piece = ""
        for index in ids:
            self._pending.append(index)
            self.n_tokens += 1
            piece += self._release(self._certain())
            if self.stopped:
                break
        return piece

    def finish(self) -> str:
        """What was held back in case more came."""
        if self.stopped:
            return ""
        piece = self._release(self._take(len(self._pending)))
        if not self.stopped:
            piece += self._keep(self._held)
            self._held = ""
        return piece

    def _at_once(self, ids: list[int]) -> str | None:
        """The usual case without looking at every id: whole characters and no stop string."""
        new = self._decode([*self._pending, *ids])
        if _UNFINISHED in new or any(stop in self._held + new for stop in self._stop):
            return None
        self._pending += ids
        self.n_tokens += len(ids)
        self._advance(len(self._pending))
        return self._release(new)

    def _certain(self) -> str:
        """The text of pending ids that no later id can change."""
        if not self._decode(self._pending).endswith(_UNFINISHED):
            return self._take(len(self._pending))
        # An unfinished character can only be in the last three ids.
        return self._take(max(0, len(self._pending) - _LONGEST_CHARACTER + 1))

    def _take(self, n: int) -> str:
        new = self._decode(self._pending[:n])
        self._advance(n)
        return new

    def _advance(self, n: int) -> None:
        self._before = [*self._before, *self._pending[:n]][-_CONTEXT:]
        self._pending = self._pending[n:]

    def _decode(self, ids: list[int]) -> str:
        """What ids add to the text before them."""
        if not ids:
            return ""
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode([*self._before, *ids])[len(before):]

    def _release(self, new: str) -> str:
        """Certain text, without what could still become a stop string."""
        text, self._held = self._held + new, ""
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._keep(text[:min(found)])
        n = max((n for stop in self._stop for n in range(1, len(stop))
                 if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - n:]
        return self._keep(text[:len(text) - n])

    def _keep(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece
