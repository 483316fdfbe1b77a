"""Tokens per second of the loader: shards on disk -> `batch` -> read-ahead, as training reads them.

    python benchmarks/loader.py --context=512 --batch_size=64

A text of `--megabytes` with documents of about 600 words is written to a temporary folder and
tokenized into shards. Each form of batch is then read for `--seconds`, `--repeats` times, from a
warm page cache; the median is printed, and beside it the rate at which this machine copies as many
bytes with one `numpy.copyto`, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hippocampus.config import DataConfig
from hippocampus.data.batches import Batch, ShuffledWindows, Streams
from hippocampus.data.corpora import open_corpus
from hippocampus.data.prefetch import prefetch
from hippocampus.data.shards import TokenSplit, token_split
from hippocampus.data.tokenizers import byte_tokenizer


def main() -> None:
    """Prints one line for each form of batch, and the results as JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=512, help="tokens in a row")
    parser.add_argument("--batch_size", type=int, default=64, help="rows in a batch")
    parser.add_argument("--megabytes", type=int, default=100, help="size of the text")
    parser.add_argument("--seconds", type=float, default=2.0, help="time of one repeat")
    parser.add_argument("--repeats", type=int, default=5, help="repeats; the median counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HIPPOCAMPUS_CACHE"] = folder
        split = write_shards(Path(folder), given.megabytes)
        size = (given.context, given.batch_size, 0)
        forms = {
            "shuffled windows": ShuffledWindows(split.ids, *size),
            "shuffled windows, document ids": ShuffledWindows(
                split.ids, *size, split.document_starts),
            "streams, document ids": Streams(split.ids, *size, split.document_starts),
        }
        split.ids.sum()  # warms the page cache
        results = [measure(name, batches, given.seconds, given.repeats)
                   for name, batches in forms.items()]
    if given.json:
        print(json.dumps({"cores": os.cpu_count(), "context": given.context,
                          "batch_size": given.batch_size, "results": results}))
        return
    print(f"{len(split.ids):,} ids, {split.n_documents:,} documents, context {given.context}, "
          f"batch {given.batch_size}, {os.cpu_count()} cores, {given.repeats} x {given.seconds} s")
    for result in results:
        print(f"{result['form']:<32} {result['tokens_per_second'] / 1e6:8.1f} M tokens/s   "
              f"{result['of_memcpy']:6.1%} of a plain copy of the same bytes")


def write_shards(folder: Path, megabytes: int) -> TokenSplit:
    """Shards of random words, by the way that training takes."""
    draw = np.random.default_rng(0)
    alphabet = np.frombuffer(b"etaoinshrdlucmfwypvbgkjqxz", np.uint8)
    words = [bytes(draw.choice(alphabet, n)).decode() for n in draw.integers(2, 10, 5000)]
    path = folder / "text.txt"
    with path.open("w") as file:
        while file.tell() < megabytes * 10**6:
            length = int(draw.geometric(1 / 600)) + 1
            file.write(" = Title = \n" + " ".join(draw.choice(words, length)) + "\n")
    corpus = open_corpus(DataConfig(corpus=str(path), document_start="^ = .* = $"))
    return token_split(corpus, byte_tokenizer(), "train")


def measure(name: str, batches: ShuffledWindows | Streams, seconds: float, repeats: int
            ) -> dict[str, object]:
    """Medians of tokens per second and of its share of a plain copy."""
    one = batches.batch(0)
    arrays = [a for a in vars(one).values() if a is not None]
    source = [np.array(a) for a in arrays]
    rates, shares = [], []
    for repeat in range(repeats):
        steps, taken = read(batches, repeat * 10**6, seconds)
        rate = steps * one.tokens_BT.size / taken
        copies, copying = timed(lambda: copy(arrays, source), seconds / 4)
        rates.append(rate)
        shares.append(rate / (copies * one.tokens_BT.size / copying))
    return {"form": name, "tokens_per_second": statistics.median(rates),
            "of_memcpy": statistics.median(shares), "all": rates}


def read(batches: ShuffledWindows | Streams, first: int, seconds: float) -> tuple[int, float]:
    """Steps that come in so many seconds; every array of a batch is touched."""
    with closing(prefetch(batches, first, first + 10**6)) as ahead:
        touch(next(ahead))  # the threads have started
        return timed(lambda: touch(next(ahead)), seconds)


def touch(batch: Batch) -> None:
    """Reads a number of every array, as a transfer to a device would begin."""
    for array in vars(batch).values():
        if array is not None:
            array.flat[0]


def copy(source: list[np.ndarray], target: list[np.ndarray]) -> None:
    """One plain copy of a batch."""
    for a, b in zip(source, target, strict=True):
        np.copyto(b, a)


def timed(work: Callable[[], None], seconds: float) -> tuple[int, float]:
    """How often it was done, and in what time."""
    begin, n = time.perf_counter(), 0
    while (now := time.perf_counter()) - begin < seconds:
        work()
        n += 1
    return n, now - begin


if __name__ == "__main__":
    main()
