"""The memory of one user as generation holds it: where it is kept, and whose it must be."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hippocampus.data.tokenizers import Tokenizer
from hippocampus.errors import CheckpointError, ConfigError
from hippocampus.files import check_nameable, check_writable, expand
from hippocampus.generation.memory_file import Fingerprint, load_memory, save_memory
from hippocampus.generation.parameter_digest import parameter_digest
from hippocampus.ops.memory_state import MemoryState

LAYER = "memory_bank"
"""The layer's name in the parameters."""


class UserMemory:
    """The memory of one user, from turn to turn.

    In a file it is read again at every turn, so that it is what any other process left there.

    Attributes:
      path: the file; None = it lives as long as this object.
      fingerprint: of the model that it belongs to.
    """

    def __init__(self, path: str | Path | None, fingerprint: Fingerprint, fresh: MemoryState, *,
                 new: bool = False):
        """Finds out whether the file is good; there need not be one yet.

        Args:
          path: the file; None = none.
          fingerprint: of the model.
          fresh: a new user's memory.
          new: begin with that whatever the file holds, which stays until the first save.

        Raises:
          ConfigError: no file can be there.
          CheckpointError: what is there is damaged, no memory, another model's, or several users'.
        """
        self.path = None if path is None else _place(path)
        self.fingerprint, self._fresh, self._new = fingerprint, fresh, new
        self._state, self._notes, self._saves = fresh, dict[str, str](), 0
        self.load()

    def load(self) -> MemoryState:
        """The memory of now, of one user, as numpy arrays; a new one where there is no file.

        Raises:
          CheckpointError: as for the class.
        """
        if self.path is None:
            return self._state
        if self.version() is None:
            return self._fresh
        saved = load_memory(self.path, None if self._new else self.fingerprint)
        users = len(saved.state.writes_B)
        if users != 1:
            raise CheckpointError(f"{self.path} holds the memories of {users} users",
                                  "generation takes a file for each: see take_users")
        self._notes = dict(saved.notes)
        if self._new:
            return self._fresh
        theirs, ours = (s.source_BSn.shape[-1] for s in (saved.state, self._fresh))
        if theirs != ours:
            raise CheckpointError(
                f"{self.path} has source_tokens {theirs}, here {ours}",
                "a memory is of use to the model that wrote it")
        return saved.state

    def check(self, mode: str) -> None:
        """Refuses, before anything is computed, what could not be done with the memory.

        Args:
          mode: of `memory_bank.MODES`.

        Raises:
          CheckpointError: it is only to be read, and not there.
          ConfigError: it could not be saved.
        """
        if self.path is None:
            return
        if mode in ("read_only", "frozen") and not self.path.exists():
            raise CheckpointError(f"there is no memory at {self.path}",
                                  "check the path; a turn that writes makes one")
        if mode != "frozen":
            check_writable(self.path.absolute().parent, "choose another place for the memory")

    def version(self) -> tuple[int, ...] | None:
        """What every save changes; None = there is nothing yet.

        Raises:
          CheckpointError: the file cannot be looked at.
        """
        if self.path is None:
            return (self._saves,)
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}",
                                  "check the path") from None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def save(self, state: MemoryState, version: tuple[int, ...] | None) -> None:
        """Keeps what a turn made of the memory.

        Args:
          state: of one user.
          version: as it was before `load`.

        Raises:
          CheckpointError: it cannot be saved, or another turn, perhaps of another process, has
            saved the memory since; it stays as it is.
        """
        with _alone(self.path):
            if self.version() != version:
                raise CheckpointError(
                    f"{self.path or 'the memory'} was changed by another turn in the meantime",
                    "what that one saved is kept; start the turn again")
            if self.path is None:
                self._state = state
            else:
                save_memory(self.path, state, self.fingerprint, self._notes)
            self._saves, self._new = self._saves + 1, False

    @property
    def identity(self) -> object:
        """What two objects of one memory have in common."""
        if self.path is None:
            return id(self)
        if not self.path.exists():
            return self.path.resolve()
        found = self.path.stat()
        return found.st_dev, found.st_ino


def fingerprint_of(model: Any, params: Any, tokenizer: Tokenizer) -> Fingerprint:
    """What tells the memories of a model from all others: its sizes, and every bit that it has.

    Args:
      model: with a memory.
      params: all of its parameters, decoder and memory.
      tokenizer: of its texts.
    """
    memory, D = model.memory, model.config.d_model
    return Fingerprint(
        model=parameter_digest(params), layer=LAYER, d_model=D, n_slots=memory.n_slots,
        n_heads=memory.n_heads, head_width=(memory.width or D) // memory.n_heads,
        tokenizer=tokenizer.digest)


def check_apart(memories: Sequence[UserMemory]) -> None:
    """Refuses a memory that stands for two users.

    Raises:
      ConfigError: two of them are one.
    """
    first: dict[object, int] = {}
    for n, one in enumerate(memories, 1):
        other = first.setdefault(one.identity, n)
        if other != n:
            raise ConfigError(f"{one.path or 'the memory'} is given twice, as memory {other} and "
                              f"memory {n}", "a memory is one user's")


def _place(path: str | Path) -> Path:
    check_nameable(path, "the memory")
    place = expand(path)
    # A rename would put the new file in the place of the link.
    return place.resolve() if place.is_symlink() else place


@contextlib.contextmanager
def _alone(path: Path | None) -> Iterator[None]:
    """One save at a time in the file's folder, where the file system has locks."""
    folder = None
    if path is not None:
        with contextlib.suppress(OSError):  # none yet, or no locks: the version is checked anyway
            folder = os.open(path.parent, os.O_RDONLY)
            fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if folder is not None:
            os.close(folder)
