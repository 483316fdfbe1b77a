"""Writes text: `python -m hippocampus.sample --workdir=checkpoints/quickstart --prompt='The '`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hippocampus.errors import ConfigError
from hippocampus.files import check_writable
from hippocampus.verbs import Parser, run_verb

_SAMPLER: dict[str, tuple[type, Any, str]] = {
    "max_new_tokens": (int, 200, "most tokens to write"),
    "temperature": (float, 0.8, "0 = most likely token"),
    "top_k": (int, 0, "among the k most likely; 0 = all tokens"),
    "top_p": (float, 1.0, "among the most likely that reach this probability; 1 = all"),
    "min_p": (float, 0.0, "among those with this share of the most likely one's; 0 = all"),
    "repetition_penalty": (float, 1.0, "above 1: tokens that were there become less likely"),
    "seed": (int, 0, "the same seed gives the same text"),
    "segments": (int, None, "reasoning passes (default: as in training)")}


def main(arguments: Sequence[str]) -> None:
    """Parses flags; continues one prompt, those of a file, or what is typed."""
    parser = Parser("sample", "Continue texts with a trained model. Without a prompt: an "
                              "interactive one, or what is piped in.")
    parser.add_argument("--workdir", required=True, help="run folder, or an exported folder")
    parser.add_argument("--prompt", help="the text to continue")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line, or .jsonl "
                        "with the field prompt; gives JSON lines")
    parser.add_argument("--out", type=Path, metavar="FILE", help="of the JSON lines (default: "
                        "printed)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts side by side")
    for name, (kind, default, meaning) in _SAMPLER.items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=meaning)
    parser.add_argument("--stop", action="append", default=[], help="ends a text; repeatable")
    parser.add_argument("--skip", action="store_true", help="one pass and one step of the flow")
    parser.add_argument("--log_probabilities", action="store_true", help="of every token, as JSON")
    parser.add_argument("--stream", action=argparse.BooleanOptionalAction,
                        help="show text as it comes (default: on a terminal)")
    parser.add_argument("--memory", type=Path, metavar="FILE", help="of one user: read, then "
                        "prompt and text are written; saved after each text")
    parser.add_argument("--read_only", action="store_true", help="write nothing into --memory")
    parser.add_argument("--write_only", action="store_true", help="write the prompt, or what is "
                        "piped in, into --memory and no text")
    parser.add_argument("--reset", action="store_true", help="begin with a new --memory")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema",
                        help="running average of the parameters, or the parameters")
    parser.add_argument("--step", type=int, help="a saved step (default: the best one)")
    flags = parser.parse_args(arguments)
    _check(flags)

    from hippocampus.generation import prompts
    from hippocampus.generation.loading import load

    several = prompts.read_prompts(flags.prompts) if flags.prompts else []
    lm = load(flags.workdir, weights=flags.weights, step=flags.step)
    settings = {name: getattr(flags, name) for name in [*_SAMPLER, "stop", "skip"]}
    if flags.memory:
        settings |= {"memory": lm.open_memory(flags.memory, new=flags.reset),
                     "memory_mode": "read_only" if flags.read_only else "read+write"}
    try:
        if several:
            prompts.write_lines(prompts.records(
                lm, several, flags.batch_size, **settings,
                log_probabilities=flags.log_probabilities), flags.out)
        elif flags.prompt is None and sys.stdin.isatty() and not flags.write_only:
            prompts.converse(lm, **settings)
        else:
            prompt = prompts.read_piped() if flags.prompt is None else flags.prompt
            if flags.write_only:
                done = lm.remember(prompt, memory=settings["memory"])
                sys.stdout.write(f"{flags.memory}: {done.tokens:,} tokens in {done.chunks:,} chunks"
                                 f", {done.used_slots} of {lm.fingerprint.n_slots} slots in use\n")
            elif flags.log_probabilities:
                one = lm.generate(prompt, log_probabilities=True, **settings)
                prompts.write_lines(iter([prompts.record(prompt, one, flags.seed, True)]))
            elif sys.stdout.isatty() if flags.stream is None else flags.stream:
                prompts.show(prompt, lm.stream(prompt, **settings))
            else:
                prompts.show(prompt, iter([lm.generate(prompt, **settings)]))
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on: whoever did has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check(flags: argparse.Namespace) -> None:
    """Flags that do not go together."""
    problems = (
        (flags.prompt is not None and flags.prompts, "--prompt and --prompts are both given",
         "give one of them"),
        (flags.out and not flags.prompts, "--out is for the prompts of a file", "--prompts=FILE"),
        (flags.stream and (flags.prompts or flags.log_probabilities),
         "--stream shows one text", "leave out --prompts and --log_probabilities"),
        (flags.overwrite and not flags.out, "--overwrite is for --out", "--out=FILE"),
        (flags.memory and flags.prompts, "--memory is one user's, and --prompts are of several",
         "give --prompt"),
        (not flags.memory and (flags.read_only or flags.write_only or flags.reset),
         "--read_only, --write_only and --reset are for --memory", "--memory=FILE"),
        (flags.read_only and (flags.write_only or flags.reset),
         "--read_only goes with neither --write_only nor --reset", "give one of them"),
        (flags.write_only and (flags.stream or flags.log_probabilities),
         "--write_only writes no text", "leave out --stream and --log_probabilities"),
        (flags.prompt is None and not flags.prompts and sys.stdin.isatty() and not flags.write_only
         and (flags.log_probabilities or flags.stream is False), "the interactive prompt shows "
         "text as it comes", "give --prompt or --prompts"),
        (flags.out and flags.out.is_dir(), f"{flags.out} is a folder", "--out takes a file"),
        (flags.batch_size < 1, f"--batch_size is {flags.batch_size}", "it must be at least 1"),
        (flags.out and flags.out.exists() and not flags.overwrite, f"{flags.out} exists already",
         "--overwrite replaces it"))
    for wrong, message, hint in problems:
        if wrong:
            raise ConfigError(message, hint)
    if flags.out:
        check_writable(flags.out.absolute().parent)


if __name__ == "__main__":
    run_verb(main)
