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
_MOST_PENDING = 8
"""Ids without the end of a character among them that are decoded again with every new one."""


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
        self._before: list[int] = []
        self._given = 0
        self._pending = [int(index) for index in prompt_ids[-_CONTEXT - _LONGEST_CHARACTER + 1:]]
        self._advance(len(self._pending))
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
        new = self._new_text()[self._given:]
        self._advance(len(self._pending))
        piece = self._release(new)
        if not self.stopped:
            piece += self._keep(self._held)
            self._held = ""
        return piece

    def _at_once(self, ids: list[int]) -> str | None:
        """The usual case without looking at every id: whole characters and no stop string."""
        whole = self._added(self._before, [*self._pending, *ids])
        new = whole[self._given:]
        if _UNFINISHED in whole or any(stop in self._held + new for stop in self._stop):
            return None
        self._pending += ids
        self.n_tokens += len(ids)
        self._advance(len(self._pending))
        return self._release(new)

    def _certain(self) -> str:
        """The text of pending ids that no later id can change and that did not come out yet."""
        new = self._new_text()
        waiting = _unfinished(new)
        last = _LONGEST_CHARACTER - 1
        if waiting and len(self._pending) > last:
            # An unfinished character can only be in the last three ids.
            waiting = min(waiting, _unfinished(self._added(
                [*self._before, *self._pending[:-last]], self._pending[-last:])))
        certain = new[self._given:len(new) - waiting]
        self._given += len(certain)
        if not waiting:
            self._advance(len(self._pending))
        elif len(self._pending) > _MOST_PENDING:
            self._advance(len(self._pending) - last)
            self._given = max(0, len(self._new_text()) - waiting)
        return certain

    def _advance(self, n: int) -> None:
        """Makes the first n pending ids context; nothing of the others has come out then."""
        passed, self._pending = [*self._before, *self._pending[:n]], self._pending[n:]
        self._given = 0
        # It has to begin with a whole character: byte tokens behind a part of one may be no text.
        for length in range(_CONTEXT, _CONTEXT + _LONGEST_CHARACTER):
            self._before = passed[-length:]
            if not self._tokenizer.decode(self._before).startswith(_UNFINISHED):
                break

    def _new_text(self) -> str:
        return self._added(self._before, self._pending)

    def _added(self, before: list[int], ids: list[int]) -> str:
        """What ids add to the text of those before them."""
        if not ids:
            return ""
        old, whole = self._tokenizer.decode(before), self._tokenizer.decode([*before, *ids])
        # Some decoders take a run of byte tokens for text only as a whole, so that the first
        # byte of a character undoes the character before it until the last byte is there.
        return whole[len(old):] if whole.startswith(old) else self._tokenizer.decode(ids)

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


def _unfinished(text: str) -> int:
    """Replacement characters at the end."""
    return len(text) - len(text.rstrip(_UNFINISHED))
