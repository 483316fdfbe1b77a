"""Prompts from a file, from a terminal or from a pipe, and their continuations on the way out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hippocampus.errors import DataError, HippocampusError
from hippocampus.files import write_atomically
from hippocampus.generation.generate import Continuation, Request, check_seeds
from hippocampus.generation.language_model import LanguageModel


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: its lines, or the field `prompt` of each line of a `.jsonl`.

    Empty lines are left out.

    Raises:
      DataError: missing, not UTF-8, without a prompt, or a line that is no JSON object with one.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except FileNotFoundError:
        raise DataError(f"there is no file {path}", "--prompts takes a text file with one prompt "
                        "a line, or a .jsonl") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte 0x{error.object[error.start]:02x} at "
                        f"offset {error.start})", "convert it first, for example with iconv -t "
                        "UTF-8") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "check the path") from None
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".jsonl":
        prompts = [_prompt_of(line, f"{path}, line {n}") for n, line in numbered]
    else:
        prompts = [line for _, line in numbered]
    if not prompts:
        raise DataError(f"{path} has no prompt", "give one a line")
    return prompts


def read_piped() -> str:
    """All of the standard input.

    Raises:
      DataError: it is not UTF-8.
    """
    try:
        text = sys.stdin.read()
        text.encode()  # where the locale lets foreign bytes through, they are surrogates now
    except UnicodeError:
        raise DataError("what is piped in is not UTF-8 text", "convert it first, for example with "
                        "iconv -t UTF-8") from None
    return text


def records(lm: LanguageModel, prompts: Sequence[str], batch_size: int, seed: int,
            **settings: Any) -> Iterator[dict[str, Any]]:
    """The continuation of each prompt as what a line of JSON holds.

    Args:
      lm: the model.
      prompts: any number.
      batch_size: prompts that are decoded side by side.
      seed: of every prompt's draws.
      settings: as for `LanguageModel.generate`.
    """
    for n, prompt in enumerate(prompts, 1):  # before the first is continued
        try:
            lm.tokenizer.encode(prompt)
        except DataError as error:
            where = f"prompt {n}: " if len(prompts) > 1 else ""
            raise DataError(f"{where}{error.message}", error.hint) from None
    in_full = settings.pop("log_probabilities", False)
    for few in _batched(prompts, batch_size):
        found = lm.generate(list(few), seed=seed, log_probabilities=True, **settings)
        for prompt, one in zip(few, found, strict=True):
            yield record(prompt, one, seed, in_full)


def record(prompt: str, one: Continuation, seed: int, in_full: bool) -> dict[str, Any]:
    """A continuation as JSON has it; `in_full` with its tokens and log-probabilities."""
    line: dict[str, Any] = {"prompt": prompt, "text": one.text, "finish": one.finish, "seed": seed}
    if in_full:
        line |= {"tokens": one.tokens, "log_probabilities": one.log_probabilities}
    return line


def write_lines(lines: Iterator[dict[str, Any]], out: Path | None = None) -> None:
    """Prints JSON lines, or writes all of them or nothing into a file."""
    texts = (json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if out is not None:
        write_atomically(out, "".join(texts).encode())
        return
    for text in texts:
        sys.stdout.write(text)
        sys.stdout.flush()


def converse(lm: LanguageModel, **settings: Any) -> None:
    """Continues what is typed, line by line, until an empty line or the end of the input.

    Ctrl-C ends a text that is being written, and nothing else. A memory is saved after each text;
    of one that was ended so nothing is remembered.

    Raises:
      ConfigError: a setting out of range; of a prompt it is only said.
    """
    import readline  # noqa: F401  (input() edits lines and remembers them by it)

    check_seeds(settings["seed"], 1)
    Request.check(lm.model, **{name: settings[name] for name in settings
                               if name not in ("seed", "memory", "memory_mode")})
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            continue
        if not prompt:
            return
        try:
            show(prompt, lm.stream(prompt, **settings))
        except KeyboardInterrupt:
            sys.stdout.write("\n")
        except HippocampusError as error:  # an unknown character, or more than there is room for
            sys.stdout.write(f"{error.message}\n")


def show(prompt: str, pieces: Iterator[str]) -> None:
    """Writes a prompt and its continuation as it comes."""
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _prompt_of(line: str, where: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}, is not JSON: {error}", 'a line is {"prompt": "…"}') from None
    prompt = found.get("prompt") if isinstance(found, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise DataError(f"{where}, has no text in the field prompt", 'a line is {"prompt": "…"}')
    return prompt


def _batched(prompts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (prompts[begin:begin + size] for begin in range(0, len(prompts), size))
