"""Shows what each memory of a model does: `python -m hippocampus.probe --workdir=RUN`."""

from __future__ import annotations

from collections.abc import Sequence

from hippocampus.verbs import Parser, run_verb

_SUITES = ("paths, shuffle, segments, controller, gates, hopfield, ssm, energy, tokens, attention, "
           "lens, flow, recall, equilibrium, energy_landscape, associative_recall, continual")


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
    flags = parser.parse_args(arguments)

    from hippocampus.probing.command import probe_run

    probe_run(flags.workdir, suite or flags.suite, flags.out, step=flags.step,
              weights=flags.weights, split=flags.split, text=flags.text, context=flags.context,
              batch_size=flags.batch_size, max_windows=flags.max_windows, seed=flags.seed)


def script(suite: str) -> None:
    """Runs one suite as a script, with the flags of the verb but --suite."""
    run_verb(lambda arguments: main(arguments, suite))


if __name__ == "__main__":
    run_verb(main)
