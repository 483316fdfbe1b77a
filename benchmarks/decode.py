"""Time per generated token: the cached loop, beside the full forward and beside the memory's speed.

    python benchmarks/decode.py --config=configs/shakespeare.py:3.5m --new=512
    python benchmarks/decode.py --config=configs/wt103_bpe.py --batch=1,64 --peer=transformers

Weights are random unless `--workdir` names a run. Every line is measured `--repeats` times after a
warm-up and the median counts; the reading of the prompt is not in it, but for the lines that are
compared with the peer, whose time it is part of. The floor of a token is the
time in which the device moves as many bytes as parameters and caches have, in place over an array
of that size (what fits into the caches of a processor comes from there), measured in the same run;
`of floor` is floor / measured.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hippocampus.config_files import load_config
from hippocampus.data.corpora import open_corpus
from hippocampus.data.evaluation_windows import EvaluationWindows
from hippocampus.data.shards import token_split
from hippocampus.generation import decode
from hippocampus.generation.loading import load
from hippocampus.generation.sampling import SamplerSettings, sample_without_cache
from hippocampus.models.build_model import build_model, parameter_shapes
from hippocampus.ops.cross_entropy import token_nll

GREEDY = SamplerSettings(temperature=0.0)
WHOLE = "cached, R = 1, prompt included"


@dataclass(frozen=True)
class Result:
    """One line of the table: seconds a token of every row, and the least that they could be.

    `n_bytes` of parameters and caches are read for it; 0 = not counted.
    """

    what: str
    batch: int
    seconds: float
    n_bytes: int = 0
    floor: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together."""
        return self.batch / self.seconds


def main() -> None:
    """Prints one line for each measurement, and the results as JSON with --json."""
    given = parse()
    model, variables, context = open_model(given)
    results = []
    if not given.json:
        device = jax.devices()[0]
        print(f"{given.workdir or given.config} on one {device.device_kind} ({os.cpu_count()} "
              f"cores), {model.config.compute_dtype}, prompt {given.prompt}, {given.new} new "
              f"tokens, {given.repeats} repeats")
        print(f"{'':<44} {'batch':>6} {'µs/token':>10} {'tokens/s':>10} {'GB/s':>7} "
              f"{'of floor':>9}")
    for result in measurements(given, model, variables, context):
        results.append(result)
        if not given.json:
            share = (f"{result.n_bytes / result.seconds / 1e9:7.1f} "
                     f"{result.floor / result.seconds:9.1%}" if result.n_bytes else "")
            print(f"{result.what:<44} {result.batch:>6} {result.seconds * 1e6:>10.1f} "
                  f"{result.tokens_per_second:>10.0f} {share}", flush=True)
    if given.workdir and "loss" in given.only:
        losses(given.workdir)
    if given.json:
        print(json.dumps([vars(result) for result in results]))
    else:
        compare(results)


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/shakespeare.py:3.5m")
    parser.add_argument("--workdir", help="a run folder, for its weights and config")
    parser.add_argument("--new", type=int, default=512, help="tokens to draw")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of every prompt")
    parser.add_argument("--batch", type=numbers, default=(1,), help="rows, such as 1,64")
    parser.add_argument("--segments", type=numbers, help="passes, such as 1,2; more than one adds "
                        "a line for the segment flow (default: 1, with a peer 1,2)")
    parser.add_argument("--paths", help="instead of the config's, such as ssm or hopfield,ssm")
    parser.add_argument("--repeats", type=int, default=3, help="the median counts")
    parser.add_argument("--only", type=lambda text: text.split(","),
                        default=["model", "full", "contexts", "slots", "peer"],
                        help="of model, full (the loop without caches), contexts, slots, peer, "
                        "loss (of each pass and of the flow's step, with --workdir)")
    parser.add_argument("--slots", type=numbers, default=(64, 1024, 8192, 65536))
    parser.add_argument("--contexts", type=numbers, default=(256, 4096))
    parser.add_argument("--peer", choices=("transformers",), help="also GPT-2 124M there")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    given = parser.parse_args()
    given.segments = given.segments or ((1, 2) if given.peer else (1,))
    return given


def numbers(text: str) -> tuple[int, ...]:
    """Of a list with commas."""
    return tuple(int(part) for part in text.split(","))


def open_model(given: argparse.Namespace) -> tuple[Any, Any, int]:
    """The model, its variables as a decoder holds them, and its context."""
    if given.workdir:
        lm = load(given.workdir)
        return lm.model, lm.decode_variables, lm.context
    changes: dict[str, Any] = {}
    if given.paths:
        changes |= {"model.paths": tuple(given.paths.split(",")), "model.layer_paths": ()}
    if max(given.segments) > 1:
        changes |= {"model.segments.train": max(given.segments),
                    "model.segments.eval": max(given.segments),
                    "loss.rectified_flow.segment_weight": 0.1}
    return (*random_model(given.config, changes), load_config(given.config).data.context)


def random_model(path: str, changes: dict[str, Any]) -> tuple[Any, Any]:
    """A config's model with small random weights."""
    config = load_config(path, changes)
    model = build_model(config)
    draw = np.random.default_rng(0)

    def leaf(shape: Any) -> jax.Array:
        return jnp.asarray(draw.standard_normal(shape.shape, np.float32) * 0.02)

    return model, model.decode_variables(
        jax.tree.map(leaf, parameter_shapes(model)), config.data.context)


def measurements(given: argparse.Namespace, model: Any, variables: Any,
                 context: int) -> Iterator[Result]:
    """Every line, in order."""
    measure = functools.partial(cached, given)
    if "model" in given.only:
        for batch in given.batch:
            for passes in given.segments:
                if passes > 1 == model.config.segments.train:
                    continue  # there is no controller to read a pass
                yield measure(f"cached, R = {passes}", model, variables, batch, context,
                              passes=passes)
                if given.peer and passes == 1:
                    yield measure(WHOLE, model, variables, batch, context, passes=1, whole=True)
            if model.flow_width:
                yield measure("cached, one pass and one flow step", model, variables, batch,
                              context, passes=1, skip=True)
    if "full" in given.only:
        yield uncached(given, model, variables, context)
    if "contexts" in given.only:
        for length in given.contexts:
            small, weights = variant(given, {"model.paths": ("ssm",), "data.context": length})
            yield measure(f"state space only, behind {length} tokens", small, weights, 1, length,
                          prompt=length)
    if "slots" in given.only:
        for slots in given.slots:
            small, weights = slots_only(given, slots, 256)
            yield measure(f"slots only, S = {slots:,}", small, weights, 1, 256)
        for length in given.contexts:
            small, weights = slots_only(given, 1024, length)
            yield measure(f"slots only, S = 1,024, behind {length} tokens", small, weights, 1,
                          length, prompt=length)
    if given.peer and "peer" in given.only:
        yield from peer(given)


def variant(given: argparse.Namespace, changes: dict[str, Any]) -> tuple[Any, Any]:
    """The config's model with other memories, one pass and random weights."""
    return random_model(given.config, {"model.layer_paths": (), "model.segments.train": 1,
                                       **changes})


def slots_only(given: argparse.Namespace, slots: int, context: int) -> tuple[Any, Any]:
    """The config's model with learned patterns for its only memory."""
    return variant(given, {
        "model.paths": ("hopfield",), "model.hopfield.patterns": "slots",
        "model.hopfield.n_slots": slots, "data.context": context})


def cached(given: argparse.Namespace, what: str, model: Any, variables: Any, batch: int,
           context: int, *, passes: int | None = None, skip: bool = False,
           prompt: int | None = None, whole: bool = False) -> Result:
    """The decode loop; with `whole`, the reading of the prompt too."""
    prompt = prompt or given.prompt
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (batch, prompt))
    prompts, seeds = list(ids.astype(np.int32)), np.arange(batch, dtype=np.uint32)
    max_length = decode.capacity(prompt + given.new, context)
    seconds, n_bytes = [], 0
    for repeat in range(given.repeats + 1):
        started = time.perf_counter()
        state = decode.start(model, variables, prompts, max_length=max_length, passes=passes,
                             skip=skip)
        n_bytes = size((variables["params"], state.cache))
        jax.block_until_ready(state)
        begin = time.perf_counter()
        for first in range(0, given.new, decode.TOKENS_PER_CALL):
            limit = min(decode.TOKENS_PER_CALL, given.new - first)
            state, _ = decode.write(model, variables, state, seeds, GREEDY, limit, skip=skip)
        jax.block_until_ready(state)
        took = time.perf_counter() - (started if whole else begin)
        assert int(state.drawn) == given.new
        if repeat:  # the first one compiles
            seconds.append(took / given.new)
    return Result(what, batch, statistics.median(seconds), n_bytes, floor(n_bytes))


def uncached(given: argparse.Namespace, model: Any, variables: Any, context: int) -> Result:
    """The loop that reads the whole window for every token."""
    prompt = np.random.default_rng(1).integers(0, model.config.vocab_size, given.prompt)
    new = min(given.new, 64)  # every token takes the same time

    def run() -> None:
        for _ in sample_without_cache(model, variables["params"], prompt.astype(np.int32),
                                      context=context, max_new_tokens=new, settings=GREEDY,
                                      seed=0):
            pass

    return Result(f"full forward over {context} tokens", 1, median(run, given.repeats) / new)


def peer(given: argparse.Namespace) -> Iterator[Result]:
    """GPT-2 124M of transformers with random weights: bfloat16, greedy, static cache."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        print("torch and transformers are not installed: no peer", file=sys.stderr)
        return
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpt2 = GPT2LMHeadModel(GPT2Config()).to(device, torch.bfloat16).eval()
    for batch in given.batch:
        ids = torch.randint(0, 50_000, (batch, given.prompt), device=device)

        def run(ids: Any = ids) -> None:
            gpt2.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                          max_new_tokens=given.new, min_new_tokens=given.new, pad_token_id=0,
                          cache_implementation="static")
            if device == "cuda":
                torch.cuda.synchronize()

        yield Result("transformers GPT-2 124M, static cache", batch,
                     median(run, given.repeats) / given.new)


def losses(workdir: str) -> None:
    """Prints a run's validation loss after each pass, and after one pass and one flow step."""
    lm = load(workdir)
    ids = token_split(open_corpus(lm.config.data), lm.tokenizer, "validation").ids
    windows = EvaluationWindows(ids, lm.config.data.context, 32)
    head, totals = lm.model.head(lm.params), {}

    @jax.jit
    def sums(params: Any, batch: Any) -> dict[str, jax.Array]:
        _, out, _ = lm.model.apply({"params": params}, batch, method="forward")
        hidden = {f"R = {r + 1}": h for r, h in enumerate(out["segments.hidden"])}
        if "flow.skip_hidden" in out:
            hidden["one pass and one flow step"] = out["flow.skip_hidden"]
        return {name: (token_nll(h, head, batch.targets_BT) * batch.loss_weight_BT).sum()
                for name, h in hidden.items()}

    for batch in windows:
        for name, nats in sums(lm.params, batch).items():
            totals[name] = totals.get(name, 0.0) + float(nats)
    for name, nats in totals.items():
        print(f"validation loss, step {lm.step}, {name}: {nats / windows.n_targets:.4f} nats/token",
              file=sys.stderr)


def median(work: Callable[[], None], repeats: int) -> float:
    """Seconds of it, after a first time that is not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


@functools.cache
def floor(n_bytes: int) -> float:
    """Seconds in which the device moves so many bytes."""
    rounds = 20
    add = jax.jit(lambda x: jax.lax.fori_loop(0, rounds, lambda _, x: x + 1, x), donate_argnums=0)
    array = jnp.zeros(n_bytes // 4, jnp.float32)
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        array = jax.block_until_ready(add(array))
        seconds.append((time.perf_counter() - begin) / rounds)
    return statistics.median(seconds[1:]) / 2  # every round reads and writes them


def size(tree: Any) -> int:
    """Bytes of all its arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compare(results: list[Result]) -> None:
    """The ratios that matter."""
    by_name = {(result.what, result.batch): result.seconds for result in results}
    mine = {r.batch: r for r in results if r.what == "cached, R = 1"}
    whole = {r.batch: r for r in results if r.what == WHOLE}
    full = [r for r in results if r.what.startswith("full forward")]
    if full and 1 in mine:
        print(f"cached against full forward: {full[0].seconds / mine[1].seconds:.1f} times faster")
    for kind in ("state space only", "slots only, S = 1,024"):
        behind = [s for (what, _), s in by_name.items() if what.startswith(f"{kind}, behind")]
        if len(behind) > 1:
            print(f"{kind}: longest context takes {behind[-1] / behind[0]:.2f} times the shortest")
    for result in results:
        if result.what.startswith("transformers") and result.batch in whole:
            print(f"against transformers at batch {result.batch}, prompt included: "
                  f"{result.seconds / whole[result.batch].seconds:.2f} times its tokens/s")


if __name__ == "__main__":
    main()
