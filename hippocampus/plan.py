"""Plans a training step: `python -m hippocampus.plan --config=FILE.py --topology=v4:2x2x1`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from hippocampus.config_files import load_config
from hippocampus.verbs import Parser, run_verb, take_overrides


def main(arguments: Sequence[str]) -> None:
    """Says what a step needs on devices that are not here, as text or JSON."""
    parser = Parser("plan", "Memory, traffic and the least time of a training step, on TPUs that "
                            "are not here (compiled) or on GPUs (arithmetic only).")
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARGUMENT]",
                        help="the experiment; --config.a.b=c changes a field of it")
    parser.add_argument("--topology", required=True, metavar="NAME",
                        help="v4:2x2x1 (TPU generation and chips along each side), an accelerator "
                             "type such as v3-8, or h100x8")
    parser.add_argument("--scaling", nargs="?", const=0.0, type=float, metavar="ROWS",
                        help="instead: compute against gradient all-reduce on every usual slice of "
                             "that TPU, with ROWS sequences on each device (default: "
                             "train.batch_size shared out); nothing is compiled")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    rest, overrides = take_overrides(arguments)
    flags = parser.parse_args(rest)

    from hippocampus.planning.topology import find_topology, prepare_environment

    prepare_environment()
    topology = find_topology(flags.topology)
    config = load_config(flags.config, overrides)

    if flags.scaling is not None:
        from hippocampus.planning.scaling import describe_scaling, scaling

        scales = scaling(config, topology, flags.scaling)
        sys.stdout.write(json.dumps([scale.to_json() for scale in scales], indent=2) + "\n"
                         if flags.json else describe_scaling(scales))
        return

    from hippocampus.planning.plan import make_plan
    from hippocampus.planning.report import describe

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()

    plan = make_plan(config, topology, say)
    sys.stdout.write(json.dumps(plan.to_json(), indent=2) + "\n" if flags.json else describe(plan))


if __name__ == "__main__":
    run_verb(main)
