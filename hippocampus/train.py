"""Trains a model: `python -m hippocampus.train --config=configs/quickstart.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from hippocampus import distributed, xla_flags
from hippocampus.allocator import keep_freed_memory
from hippocampus.config_files import load_config
from hippocampus.training.signals import StopSignal
from hippocampus.verbs import Parser, run_verb, take_overrides


def main(arguments: Sequence[str]) -> None:
    """Parses flags and trains (or, with --check, only says what would be trained)."""
    parser = Parser("train", "Train a model, or go on with a run folder.")
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARGUMENT]",
                        help="the experiment; --config.a.b=c changes a field of it")
    parser.add_argument("--workdir", help="run folder (default: checkpoints/<config name>)")
    parser.add_argument("--check", action="store_true",
                        help="check the config, print parameters and memory, train nothing")
    parser.add_argument("--allow_change", default="", metavar="FIELD[,FIELD]",
                        help="go on with new values of fields that a run must not change by itself")
    parser.add_argument("--profile", type=int, nargs="?", const=5, metavar="STEPS",
                        help="trace so many steps (default 5) after the first ones, and print "
                        "what each component takes")
    distributed.add_flags(parser)
    rest, overrides = take_overrides(arguments)
    flags = parser.parse_args(rest)
    if flags.expect_devices:
        overrides["mesh.devices"] = str(flags.expect_devices)
    keep_freed_memory()  # before JAX is imported, and its threads start
    with StopSignal(owns_process=True) as stop:
        distributed.initialize(flags.coordinator_address, flags.num_processes, flags.process_id)
        config = load_config(flags.config, overrides)
        if config.train.deterministic:
            from hippocampus.devices import prepare_deterministic

            prepare_deterministic()
        if flags.profile is not None:
            xla_flags.prepare(xla_flags.NAMED_KERNELS)
            xla_flags.python_calls(100)
        if flags.check:
            from hippocampus.training.check import describe

            sys.stdout.write(describe(config))
        else:
            from hippocampus.training.head_start import begin

            ahead = None if flags.profile is not None else begin(config, flags.workdir)
            from hippocampus.training.loop import fit  # takes long: see head_start

            fit(config, flags.workdir, stop=stop, watcher=_profiler(flags.profile),
                allow_changes=[name for name in flags.allow_change.split(",") if name],
                head_start=ahead)


def _profiler(steps: int | None) -> Any:
    if steps is None:
        return None
    from hippocampus.profiling.profiler import Profiler

    return Profiler(steps)


if __name__ == "__main__":
    run_verb(main)
