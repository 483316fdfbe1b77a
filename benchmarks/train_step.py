"""Time of a whole training step, beside GPT-2 124M in torch.compile and in a few lines of JAX.

    python benchmarks/train_step.py --config=configs/gpt2_124m.py --peer=torch,jax
    python benchmarks/train_step.py --config=configs/wt103_bpe.py \\
        --config.train.grad_accumulation=2 --config.model.segments.train=1

Everything runs in processes of its own, one after another, on random tokens. Ours is the step that
training runs: loss, gradients, guard, clipping, AdamW, averaging, metrics. The peers get the
config's batch and context: torch is nanoGPT's recipe (torch.compile, flash attention, fused AdamW,
bfloat16 autocast, TF32 for the rest), jax is Flax with cuDNN attention and whole float32 logits.

The ratio is tokens/s over those of the first peer (or of the first line). The roofline column is
the MFU: matrix products and the causal half of attention, over the peak of `hippocampus.devices`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import Table, median_seconds, this_hardware
from hippocampus.verbs import take_overrides

GPT2 = {"layers": 12, "width": 768, "heads": 12, "vocabulary": 50_304}
TINY = {"layers": 2, "width": 64, "heads": 2, "vocabulary": 512}


def main() -> None:
    """Prints a line for ours and for every peer."""
    rest, overrides = take_overrides(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/gpt2_124m.py")
    parser.add_argument("--peer", default="", help="of torch, jax, with a comma between")
    parser.add_argument("--tiny", action="store_true", help="small peers, to try the script")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one process")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args(rest)
    if given.part:
        print(json.dumps(measure(given, overrides)))
        return
    peers = [name for name in given.peer.split(",") if name]
    table, first = None, None
    for part in [*peers[:1], "ours", *peers[1:]]:
        found = run_part(part, given.limit)
        if isinstance(found, str):
            print(f"{part} failed: {found}", flush=True)
            continue
        per_token = found["seconds"] / found["tokens"]
        if table is None or first is None:
            table = Table(f"one training step of {found['tokens']:,} tokens", found["what"],
                          hardware=found["hardware"])
            first = per_token
        table.add(found["what"], found["seconds"], peer=first * found["tokens"],
                  floor=found["floor"], note=f"{1 / per_token:,.0f} tokens/s, "
                  f"{found['parameters']:,} parameters, {found['note']}")


def run_part(part: str, limit: float) -> dict[str, Any] | str:
    """What a process of its own found, or why it did not."""
    try:
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], f"--part={part}"],
                              capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["?"])[-1]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(given: argparse.Namespace, overrides: dict[str, str]) -> dict[str, Any]:
    """Runs one part in this process."""
    from hippocampus.config_files import load_config

    config = load_config(given.config, overrides)
    if given.part == "ours":
        return ours(config)
    shape = {**(TINY if given.tiny else GPT2), "batch": config.train.batch_size,
             "context": config.data.context}
    return {"torch": torch_gpt2, "jax": jax_gpt2}[given.part](shape)


def result(what: str, seconds: float, tokens: int, parameters: int, flops_per_token: float,
           peak: float, note: str, hardware: str = "") -> dict[str, Any]:
    """One line; `floor` is the time at the device's peak."""
    return {"what": what, "hardware": hardware or this_hardware(), "seconds": seconds,
            "tokens": tokens, "parameters": parameters, "note": note,
            "floor": tokens * flops_per_token / peak if peak else None}


def ours(config: Any) -> dict[str, Any]:
    """The step as `hippocampus.training.loop` runs it."""
    import jax

    from benchmarks.steps import compile_step
    from hippocampus.devices import choose, this_device
    from hippocampus.models.flops import training_flops_per_token

    program = compile_step(config, jax.devices())
    held = [program.first()]

    def run() -> Any:
        held[0], metrics = program.step(held[0], program.batch)
        return metrics["train/loss"]

    seconds = median_seconds(run, batch_seconds=1.0, warm_up=3)
    config, k = program.config, program.config.train.grad_accumulation
    note = f"{program.bytes_per_device / 2**30:.1f} GiB a device" + (
        f", {k} micro-batches" if k > 1 else "")
    peak = choose(this_device()).peak_flops * len(jax.devices())
    return result(f"hippocampus {config.name}", seconds, program.tokens, program.parameters,
                  training_flops_per_token(config), peak, note)


def gpt2_flops(shape: dict[str, int]) -> float:
    """Training FLOPs a token of the peers, counted as `hippocampus.models.flops` counts ours."""
    D = shape["width"]
    layer = 24.0 * D * D + 4.0 * D * (shape["context"] + 1) / 2
    return 3 * (shape["layers"] * layer + 2.0 * D * shape["vocabulary"])


def torch_gpt2(shape: dict[str, int]) -> dict[str, Any]:
    """nanoGPT's recipe."""
    import torch
    from torch import nn
    from torch.nn import functional

    L, D, H, V = shape["layers"], shape["width"], shape["heads"], shape["vocabulary"]
    B, T = shape["batch"], shape["context"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")  # TF32
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_1, self.norm_2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
            self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
            self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

        def forward(self, x: Any) -> Any:
            q, k, v = (part.view(B, T, H, D // H).transpose(1, 2)
                       for part in self.qkv(self.norm_1(x)).split(D, dim=-1))
            heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(heads.transpose(1, 2).reshape(B, T, D))
            return x + self.down(functional.gelu(self.up(self.norm_2(x)), approximate="tanh"))

    class GPT2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(V, D), nn.Embedding(T, D)
            self.blocks = nn.ModuleList(Block() for _ in range(L))
            self.norm, self.head = nn.LayerNorm(D, bias=False), nn.Linear(D, V, bias=False)
            self.head.weight = self.tokens.weight
            for p in self.parameters():
                if p.dim() > 1:
                    nn.init.normal_(p, std=0.02)

        def forward(self, ids: Any, targets: Any) -> Any:
            x = self.tokens(ids) + self.positions(torch.arange(T, device=ids.device))
            for block in self.blocks:
                x = block(x)
            return functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1),
                                            targets.flatten())

    model = GPT2().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1,
                                  fused=device == "cuda")
    ids, targets = (torch.randint(V, (B, T), device=device) for _ in range(2))
    compiled = torch.compile(model) if device == "cuda" else model

    def run() -> Any:
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = median_seconds(run, lambda _: torch.cuda.synchronize() if device == "cuda" else None,
                             batch_seconds=1.0, warm_up=3)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    name = f"torch {torch.__version__}"
    return result(f"GPT-2, {name}{', compiled' if device == 'cuda' else ''}", seconds, B * T,
                  sum(p.numel() for p in model.parameters()), gpt2_flops(shape), _peak(),
                  f"{memory / 2**30:.1f} GiB",
                  f"1 x {torch.cuda.get_device_name()}" if device == "cuda" else "")


def jax_gpt2(shape: dict[str, int]) -> dict[str, Any]:
    """GPT-2 in Flax as one would write it down."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import linen as nn

    L, D, H, V = shape["layers"], shape["width"], shape["heads"], shape["vocabulary"]
    B, T = shape["batch"], shape["context"]
    normal = nn.initializers.normal(0.02)

    class GPT2(nn.Module):
        @nn.compact
        def __call__(self, ids: Any) -> Any:
            def dense(width: int, x: Any) -> Any:
                return nn.Dense(width, use_bias=False, dtype=jnp.bfloat16, kernel_init=normal)(x)

            def norm(x: Any) -> Any:
                return nn.LayerNorm(use_bias=False, dtype=jnp.bfloat16)(x)

            tokens = self.param("tokens", normal, (V, D))
            x = (tokens.astype(jnp.bfloat16)[ids]
                 + self.param("positions", normal, (T, D)).astype(jnp.bfloat16))
            for _ in range(L):
                q, k, v = (part.reshape(B, T, H, D // H)
                           for part in jnp.split(dense(3 * D, norm(x)), 3, axis=-1))
                heads = jax.nn.dot_product_attention(
                    q, k, v, is_causal=True,
                    implementation="cudnn" if jax.default_backend() == "gpu" else "xla")
                x = x + dense(D, heads.reshape(B, T, D))
                x = x + dense(D, nn.gelu(dense(4 * D, norm(x))))
            return jnp.einsum("btd,vd->btv", norm(x), tokens.astype(jnp.bfloat16),
                              preferred_element_type=jnp.float32)

    model, draw = GPT2(), np.random.default_rng(0)
    ids, targets = (jnp.asarray(draw.integers(0, V, (B, T)), jnp.int32) for _ in range(2))
    params = jax.jit(model.init)(jax.random.key(0), ids)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0),
                            optax.adamw(6e-4, b2=0.95, weight_decay=0.1))

    def step(params: Any, state: Any) -> Any:
        def loss(params: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(
                model.apply(params, ids), targets).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    compiled = jax.jit(step, donate_argnums=(0, 1))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    held = [params, jax.jit(optimizer.init)(params)]
    del params

    def run() -> Any:
        *held[:], value = compiled(*held)
        return value

    seconds = median_seconds(run, batch_seconds=1.0, warm_up=3)
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return result("GPT-2, minimal Flax", seconds, B * T, parameters, gpt2_flops(shape), _peak(),
                  f"{peak / 2**30:.1f} GiB")


def _peak() -> float:
    """Of the device that ours runs on; asked in a process of its own, which JAX fills no GPU of."""
    code = ("from hippocampus.devices import choose, this_device;"
            "print(choose(this_device()).peak_flops)")
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
                               "PYTHONPATH": path})
    return float(done.stdout or 0)


if __name__ == "__main__":
    main()
