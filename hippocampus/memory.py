"""Looks into memory files: `python -m hippocampus.memory inspect ann.memory --workdir=MODEL`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hippocampus.errors import ConfigError, DataError
from hippocampus.files import check_writable, write_atomically
from hippocampus.verbs import Parser, run_verb


def main(arguments: Sequence[str]) -> None:
    """Parses flags; shows, puts together, exports or empties."""
    parser = Parser("memory", "Look into memories, merge them, export them, or empty them.")
    parser.add_argument("action", choices=("inspect", "merge", "export", "reset"))
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="of save_memory")
    parser.add_argument("--workdir", type=Path, metavar="MODEL", help="whose tokenizer turns ids "
                        "into text (inspect, export)")
    parser.add_argument("--user", type=int, help="a row of the file (default: all)")
    parser.add_argument("--top", type=int, default=20, help="slots of a user (inspect)")
    parser.add_argument("--vectors", action="store_true", help="keys and values too (export)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="of the merged memory, or of the "
                        "JSON lines (default: printed)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    flags = parser.parse_args(arguments)
    _check(flags)

    from hippocampus.data.tokenizers import Tokenizer
    from hippocampus.generation import memory_file, memory_report

    found = memory_file.load_memory(flags.files[0])
    if flags.action == "merge":
        others = [memory_file.load_memory(path, found.fingerprint) for path in flags.files[1:]]
        sys.stdout.write(memory_report.merge(flags.out, [found, *others]))
        return
    if flags.action == "reset":
        sys.stdout.write(memory_report.reset(flags.files[0], found, flags.user))
        return
    tokenizer = Tokenizer.load(flags.workdir / "tokenizer.json") if flags.workdir else None
    if tokenizer and tokenizer.digest != found.fingerprint.tokenizer:
        raise DataError(f"{flags.files[0]} was not written with the tokenizer of {flags.workdir}",
                        "--workdir is the model that the memory belongs to")
    if flags.action == "inspect":
        sys.stdout.write(memory_report.report(found, tokenizer, flags.user, flags.top))
        return
    lines = memory_report.export(found, tokenizer, flags.user, flags.vectors)
    if flags.out:
        write_atomically(flags.out, lines)
    else:
        sys.stdout.write(lines)


def _check(flags: argparse.Namespace) -> None:
    """Flags that do not go together."""
    out, makes = flags.out, flags.action in ("merge", "export")
    problems = (
        (len(flags.files) > 1 and flags.action != "merge", f"{flags.action} takes one file",
         "only merge takes several"),
        (flags.action == "merge" and not out, "merge needs --out", "--out=FILE"),
        (out and not makes, f"--out is not for {flags.action}", "leave it out"),
        (flags.overwrite and not out, "--overwrite is for --out", "--out=FILE"),
        (flags.user is not None and flags.action == "merge", "--user is not for merge",
         "leave it out"),
        (flags.top < 1, f"--top is {flags.top}", "it must be at least 1"),
        (out and out.is_dir(), f"{out} is a folder", "--out takes a file"),
        (out and out.exists() and not flags.overwrite, f"{out} exists already",
         "--overwrite replaces it"))
    for wrong, message, hint in problems:
        if wrong:
            raise ConfigError(message, hint)
    if out:
        check_writable(out.absolute().parent)


if __name__ == "__main__":
    run_verb(main)
