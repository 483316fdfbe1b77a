"""Writes text: `python -m hippocampus.sample --workdir=checkpoints/quickstart --prompt='The '`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hippocampus.verbs import Parser, run_verb


def main(arguments: Sequence[str]) -> None:
    """Parses flags and prints the prompt with its continuation."""
    parser = Parser("sample", "Continue a text with a trained model.")
    parser.add_argument("--workdir", required=True, help="run folder of a training")
    parser.add_argument("--prompt", default="\n", help="the text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = most likely token")
    parser.add_argument("--top_k", type=int, default=0, help="0 = all tokens")
    parser.add_argument("--top_p", type=float, default=1.0, help="1 = all tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema",
                        help="running average of the parameters, or the parameters")
    parser.add_argument("--step", type=int, help="a saved step (default: the best one)")
    flags = parser.parse_args(arguments)

    from hippocampus.generation.loading import load

    lm = load(flags.workdir, weights=flags.weights, step=flags.step)
    pieces = lm.generate(
        flags.prompt, max_new_tokens=flags.max_new_tokens, temperature=flags.temperature,
        top_k=flags.top_k, top_p=flags.top_p, seed=flags.seed, stream=True)
    sys.stdout.write(flags.prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


if __name__ == "__main__":
    run_verb(main)
