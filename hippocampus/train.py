"""Trains a model: `python -m hippocampus.train --config=configs/quickstart.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hippocampus import distributed
from hippocampus.config_files import load_config
from hippocampus.verbs import Parser, run_verb, take_overrides


def main(arguments: Sequence[str]) -> None:
    """Parses flags and trains (or, with --check, only says what would be trained)."""
    parser = Parser("train", "Train a model, or go on with a run folder.")
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARGUMENT]",
                        help="the experiment; --config.a.b=c changes a field of it")
    parser.add_argument("--workdir", help="run folder (default: checkpoints/<config name>)")
    parser.add_argument("--check", action="store_true",
                        help="check the config, print parameters and memory, train nothing")
    distributed.add_flags(parser)
    rest, overrides = take_overrides(arguments)
    flags = parser.parse_args(rest)
    if flags.expect_devices:
        overrides["mesh.devices"] = str(flags.expect_devices)
    distributed.initialize(flags.coordinator_address, flags.num_processes, flags.process_id)
    config = load_config(flags.config, overrides)
    if flags.check:
        from hippocampus.training.check import describe

        sys.stdout.write(describe(config))
    else:
        from hippocampus.training.loop import fit

        fit(config, flags.workdir)


if __name__ == "__main__":
    run_verb(main)
