"""Shows what each memory of a model does: `python -m hippocampus.probe --workdir=RUN`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hippocampus.errors import ConfigError
from hippocampus.verbs import Parser, run_verb

if TYPE_CHECKING:
    from hippocampus.probing.adapters.opening import Request as AdapterRequest
    from hippocampus.probing.memory.opening import Request

_SUITES = ("paths, shuffle, segments, controller, gates, hopfield, ssm, energy, tokens, attention, "
           "lens, flow, recall, equilibrium, energy_landscape, associative_recall, continual, "
           "memory, buu")


def main(arguments: Sequence[str], suite: str = "") -> None:
    """Parses flags, runs the suites, prints their tables and writes their files.

    Args:
      arguments: of the command line.
      suite: the only one to run; "" = what the flags say.
    """
    parser = Parser("probe", "Change a trained model in every way that says what its memories do, "
                    "and look inside. docs/probing.md describes each suite.")
    parser.add_argument("--workdir", "--checkpoint", required=True,
                        help="run folder, or an exported folder")
    if not suite:
        parser.add_argument("--suite", default="", help=f"some of {_SUITES}, separated by commas "
                            "(default: all that fit the model)")
    parser.add_argument("--step", type=int, help="a saved step (default: the best one)")
    parser.add_argument("--weights", choices=("ema", "raw"), help="running average of the "
                        "parameters, or the parameters (default: the average if there is one)")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--text", default="", metavar="FILE",
                        help="measure on this UTF-8 text instead of a split")
    parser.add_argument("--context", type=int, help="tokens in a window (default: the run's)")
    parser.add_argument("--batch_size", type=int, help="windows at once (default: the run's)")
    parser.add_argument("--max_windows", type=int, default=64, help="at most so many windows, "
                        "evenly spaced over the text; 0 = all (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
    parser.add_argument("--out", metavar="DIR", help="folder of results.csv, the JSON and SVG "
                        "files and the report (default: probes/ in the run folder)")
    add_story_flags(parser)
    add_adapter_flags(parser)
    flags = parser.parse_args(arguments)

    from hippocampus.probing.command import probe_run, write_memories

    windows = {name: getattr(flags, name) for name in (
        "step", "weights", "split", "text", "context", "batch_size", "max_windows", "seed")}
    asked, stories = suite or flags.suite, story_request(flags)
    if flags.stage == "write":
        if asked != "memory":
            raise ConfigError("--stage=write is for the suite memory", "--suite=memory")
        write_memories(flags.workdir, stories, **windows)
        return
    probe_run(flags.workdir, asked, flags.out, stories=stories, adapters=adapter_request(flags),
              **windows)


def add_story_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the suite that asks about stories."""
    group = parser.add_argument_group("suite memory")
    group.add_argument("--stories", default="", metavar="PATH", help="stories with questions "
                       "(default: the run's data.corpus)")
    group.add_argument("--max_stories", type=int, default=32, help="0 = all (default: 32)")
    group.add_argument("--max_questions", type=int, default=4, help="about each; 0 = all "
                       "(default: 4)")
    group.add_argument("--max_answer", type=int, default=24, help="tokens that are written "
                       "(default: 24)")
    group.add_argument("--max_text", type=int, default=2048, help="tokens in front of an answer "
                       "where a text stands there (default: 2048)")
    group.add_argument("--delays", type=_numbers, default=(1, 4, 16), help="rows of other stories "
                       "between a story and its questions (default: 1,4,16)")
    group.add_argument("--interferers", type=_numbers, default=(1, 2, 4, 8), help="whole stories "
                       "between them (default: 1,2,4,8)")
    group.add_argument("--slots", type=_numbers, default=(), help="of other memories (default: an "
                       "eighth, a quarter and a half of the model's)")
    group.add_argument("--users", type=int, default=8, help="memories that are written at once "
                       "(default: 8)")
    group.add_argument("--memories", default="", metavar="DIR", help="keep the memory files there")
    group.add_argument("--stage", choices=("all", "write", "ask"), default="all",
                       help="write: feed the stories, save the memories and end; ask: with the "
                       "files of --memories; all: another process writes, this one asks")


def story_request(flags: argparse.Namespace) -> Request:
    """What the flags say of stories.

    Raises:
      ConfigError: a number that is out of range.
    """
    from hippocampus.probing.memory.opening import Request
    from hippocampus.probing.memory.subject import Settings

    settings = Settings(
        stories=flags.max_stories, questions=flags.max_questions, answer_tokens=flags.max_answer,
        context_tokens=flags.max_text, delays=flags.delays, interferers=flags.interferers,
        slots=flags.slots, users=flags.users)
    return Request(flags.stories, flags.split, flags.memories, flags.stage, settings=settings)


def add_adapter_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the suite that looks into adapters."""
    group = parser.add_argument_group("suite buu")
    group.add_argument("--lora", default="", metavar="RUN", help="run folder of the same decoder "
                       "with low-rank adapters of as many parameters, as a control")
    group.add_argument("--queries", default="", metavar="FILE", help="JSON lines with category, "
                       "prompt and answer (default: generated ones)")
    group.add_argument("--n_queries", type=int, default=1000,
                       help="how many are generated (default: 1000)")
    group.add_argument("--max_written", type=int, default=16,
                       help="tokens of an answer (default: 16)")
    group.add_argument("--base_text", default="", metavar="FILE", help="general text that must not "
                       "have become harder (default: documentation that comes with Python)")


def adapter_request(flags: argparse.Namespace) -> AdapterRequest:
    """What the flags say of adapters.

    Raises:
      ConfigError: a number that is out of range.
    """
    from hippocampus.probing.adapters.opening import Request

    return Request(flags.lora, flags.queries, flags.n_queries, flags.max_written, flags.base_text)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(",") if number.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,4") from None


def script(suite: str) -> None:
    """Runs one suite as a script, with the flags of the verb but --suite."""
    run_verb(lambda arguments: main(arguments, suite))


if __name__ == "__main__":
    run_verb(main)
