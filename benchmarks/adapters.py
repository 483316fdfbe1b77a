"""Prefill and decoding of a Buu beside the bare decoder in it.

    python benchmarks/adapters.py --config=configs/buu_smollm2.py --batch=1,16
    python benchmarks/adapters.py --config=configs/buu_tiny.py --prompt=64 --new=64

Both have the same random weights in the decoder and are measured in one run; ratio = time of the
bare decoder / time: below 1 is what the adapters cost. Prefill is the reading of the prompts,
decoding the greedy loop behind it, per token of every row.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.decode import cached, numbers, random_model, size
from benchmarks.timing import Table, median_seconds
from hippocampus.config_files import load_config
from hippocampus.generation import decode


def main() -> None:
    """Prints two lines for each batch size and model."""
    given = parse()
    context = load_config(given.config).data.context
    model, variables = random_model(given.config, {})
    none = dataclasses.replace(model.adapters, count=0, layers=())
    backbone = {"backbone": variables["params"]["backbone"]}
    adapted, bare = (model, variables), (model.clone(adapters=none), {"params": backbone})
    trained = size(variables["params"]) - size(backbone)
    table = Table(f"{given.config}: prompt {given.prompt}, {given.new} new tokens, adapters of "
                  f"{trained / 2**20:.1f} MiB", "the bare decoder")
    for batch in given.batch:
        for what, measure in (("prefill", prefill), ("decode, a token", decoding)):
            peer = measure(given, *bare, batch, context)
            table.add(f"{what}, batch {batch}: bare decoder", peer, peer=peer)
            table.add(f"{what}, batch {batch}: with adapters",
                      measure(given, *adapted, batch, context), peer=peer)


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/buu_smollm2.py")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of every prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to draw")
    parser.add_argument("--batch", type=numbers, default=(1, 16), help="rows, such as 1,64")
    parser.add_argument("--repeats", type=int, default=3, help="of the loop; the median counts")
    return parser.parse_args()


def prefill(given: argparse.Namespace, model: Any, variables: Any, batch: int,
            context: int) -> float:
    """Seconds in which the prompts are read."""
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (batch, given.prompt))
    prompts = list(ids.astype(np.int32))
    max_length = decode.capacity(given.prompt + given.new, context)
    return median_seconds(lambda: jax.tree.leaves(
        decode.start(model, variables, prompts, max_length=max_length)))


def decoding(given: argparse.Namespace, model: Any, variables: Any, batch: int,
             context: int) -> float:
    """Seconds of a token of every row."""
    return cached(given, "", model, variables, batch, context).seconds


if __name__ == "__main__":
    main()
