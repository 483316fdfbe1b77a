"""A HybridBlock reads one token per row in few kernels.

What `HybridBlock.extend` computes, for one token and on a GPU where `hippocampus.ops.kernels.
decode_gpu` runs: all maps of the block's input are one product with one matrix, the paths' way
back is one batched product, norms and the gate of the MLP are computed where they are read, and a
cache is written and read by one kernel. The maths is that of the layers, whose files explain it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hippocampus.config import PATHS, HybridConfig
from hippocampus.layers.mlp import mlp_width
from hippocampus.layers.modern_ssm import SSMCache
from hippocampus.layers.mor_hopfield import HopfieldCache, inverse_temperature
from hippocampus.layers.norms import rms_normalize, unit_normalize
from hippocampus.layers.self_attention import AttentionCache
from hippocampus.models.hybrid_block import BlockSpec
from hippocampus.ops.gated_scan import decay_and_input
from hippocampus.ops.kernels import decode_gpu
from hippocampus.ops.rotary import rotate

Layer = dict[str, Any]


def supports(config: HybridConfig, capacity: int) -> bool:
    """Whether the kernels cover every layer of a model with caches of this capacity."""
    D, H = config.d_model, config.n_heads
    head, inner = D // H, round(config.ssm.expansion * D)
    window = config.attention.window
    return (config.ssm.kind == "gated" and config.hopfield.patterns == "context"
            and config.mlp.kind == "swiglu" and head in (16, 32, 64, 128)
            and D % 16 == 0 and inner % (16 * H) == 0 and mlp_width(config.mlp, D) % 16 == 0
            and capacity % 16 == 0
            and min(window or capacity, capacity) % 16 == 0)


def fuse(params: Layer, spec: BlockSpec, dtype: jnp.dtype) -> Layer:
    """A layer's matrices as the kernels read them.

    Args:
      params: parameter tree of a HybridBlock.
      spec: of that block.
      dtype: of the products.

    Returns:
      "in" (N,D), "gates" (H,2w,w), "out" (one (n,D,K) for each inner width), "up" and "down", an
      output's weights in a row.
    """
    inputs = [params[path][name]["kernel"] for path, name in _inputs(spec)]
    width = sum(kernel.shape[1] for kernel in inputs)
    pad = jnp.zeros((inputs[0].shape[0], -width % 16), inputs[0].dtype)
    fused = {"in": jnp.concatenate([*inputs, pad], axis=1),
             "up": params["mlp"]["up"]["kernel"], "down": params["mlp"]["down"]["kernel"]}
    outs = [params[path]["out"]["kernel"] for path in spec.paths]
    if len({kernel.shape for kernel in outs}) == 1:
        fused["out"] = [jnp.stack(outs)]
    else:
        fused["out"] = [kernel[None] for kernel in outs]
    if "ssm" in spec.paths:
        fused["gates"] = params["ssm"]["gates"]["kernel"]
    return jax.tree.map(lambda kernel: jnp.swapaxes(kernel.astype(dtype), -1, -2), fused)


def extend(
    config: HybridConfig, spec: BlockSpec, params: Layer, fused: Layer, x_BD: Float[Array, "B D"],
    positions_B: Int[Array, " B"], caches: Mapping[str, Any], valid_B: Bool[Array, " B"],
    control_BP: Float[Array, "B P"] | None = None, *, interpret: bool = False,
) -> tuple[Float[Array, "B D"], dict[str, Any]]:
    """What `HybridBlock.extend` gives for one token per row.

    Args:
      config, spec: of the block; `supports` says which configs are covered.
      params, fused: its parameters, and the same from `fuse`.
      x_BD: residual stream; a power of two of rows.
      positions_B, caches, valid_B, control_BP: as for `HybridBlock.extend`.
      interpret: run the kernels without a GPU.
    """
    linear = functools.partial(decode_gpu.linear, epsilon=config.norm_epsilon,
                               interpret=interpret)
    read = _Reader(config, spec, params, positions_B, valid_B, linear, interpret)
    y_BN = linear(x_BD[None], fused["in"][None], norm_scale_K=params["norm_paths"]["scale"])[0]
    parts = _split(y_BN, params, spec)
    inner, new = {}, {}
    for path in spec.paths:
        inner[path], new[path] = read.path(path, parts, caches[path], fused)

    stacked = [jnp.stack([inner[path] for path in spec.paths])] if len(fused["out"]) == 1 else [
        inner[path][None] for path in spec.paths]
    outs_PBD = jnp.concatenate([linear(rows, kernel) for rows, kernel in
                                zip(stacked, fused["out"], strict=True)])
    x_BD = x_BD + _mix(config, spec, params["mixer"], parts["mixer", "hidden"], outs_PBD,
                       control_BP).astype(x_BD.dtype)
    up_BF = linear(x_BD[None], fused["up"][None], norm_scale_K=params["norm_mlp"]["scale"])
    return linear(up_BF, fused["down"][None], gated=True, residual_BN=x_BD)[0], new


class _Reader:
    """The paths of one block, up to their output matrices."""

    def __init__(self, config: HybridConfig, spec: BlockSpec, params: Layer, positions_B: Array,
                 valid_B: Array, linear: Any, interpret: bool):
        self.config, self.spec, self.params = config, spec, params
        self.positions_B, self.valid_B = positions_B, valid_B
        self.linear = linear
        self.retrieve = functools.partial(decode_gpu.retrieve, positions_B=positions_B,
                                          valid_B=valid_B, interpret=interpret)

    def path(self, path: str, parts: Any, cache: Any, fused: Layer) -> tuple[Array, Any]:
        if path == "ssm":
            return self._ssm(parts, cache, fused["gates"])
        return self._hopfield(parts, cache) if path == "hopfield" else self._attention(parts, cache)

    def _ssm(self, parts: Any, cache: SSMCache, gates_HNw: Array) -> tuple[Array, SSMCache]:
        params, H = self.params["ssm"], self.config.n_heads
        B = len(self.valid_B)
        x_BE, z_BE = jnp.split(parts["ssm", "in"], 2, axis=-1)
        window_BWE = jnp.concatenate([cache.conv_BwE, x_BE[:, None]], axis=1)
        kernel_WE = jnp.flip(params["conv_kernel"], 0).astype(jnp.float32)
        c_BE = jax.nn.silu((window_BWE * kernel_WE).sum(1) + params["conv_bias"]).astype(x_BE.dtype)
        E = c_BE.shape[1]
        blocks_HBw = jnp.moveaxis(c_BE.reshape(B, H, E // H), 1, 0)
        y_HBN = self.linear(blocks_HBw, gates_HNw)
        gates = jnp.moveaxis(y_HBN.reshape(H, B, 2, E // H), (2, 1), (0, 1)).reshape(2, B, E)
        g_forget, g_in = jax.nn.sigmoid(
            gates.astype(jnp.float32) + params["gates"]["bias"][:, None])
        a_BE, size_BE = decay_and_input(params["log_decay"], g_forget, self.positions_B == 0)
        scale_E = params.get("input_scale", jnp.ones(()))
        state_BE = jnp.where(self.positions_B[:, None] == 0, 0.0, a_BE * cache.state_BE) + (
            size_BE * g_in * scale_E * c_BE)
        valid_B1 = self.valid_B[:, None]
        new = SSMCache(jnp.where(valid_B1[..., None], window_BWE[:, 1:], cache.conv_BwE),
                       jnp.where(valid_B1, state_BE, cache.state_BE))
        return state_BE.astype(x_BE.dtype) * jax.nn.gelu(z_BE), new

    def _hopfield(self, parts: Any, cache: HopfieldCache) -> tuple[Array, HopfieldCache]:
        params, cfg, H = self.params["hopfield"], self.config.hopfield, self.config.n_heads
        B = len(self.valid_B)
        q_BD, k_BD, logits_BK = (parts["hopfield", name]
                                 for name in ("query", "key", "depth_gate"))
        D = q_BD.shape[1]
        normalize = unit_normalize if cfg.normalize == "l2" else rms_normalize
        qk = normalize(jnp.concatenate([q_BD, k_BD], axis=-1).reshape(B, 1, 2 * H, D // H))
        if cfg.rope:
            qk = rotate(qk.astype(q_BD.dtype), self.positions_B[:, None], self.config.rope_theta)
        q, k = jnp.split(qk[:, 0].astype(q_BD.dtype), 2, axis=1)
        assert cache.key_BHCd is not None
        states, (keys,) = self.retrieve(
            q, (k,), (cache.key_BHCd,), scale_H=inverse_temperature(params["log_beta"]),
            steps=self.spec.depth, alpha=cfg.step_size)
        logits_BK = logits_BK + params["depth_gate"]["bias"].astype(q.dtype)
        gates_BK = jax.nn.softmax(logits_BK.astype(jnp.float32), axis=-1)
        mixed = jnp.einsum("bk,kbhd->bhd", gates_BK, states.astype(jnp.float32))
        return mixed.reshape(B, D).astype(q_BD.dtype), HopfieldCache(keys)

    def _attention(self, parts: Any, cache: AttentionCache) -> tuple[Array, AttentionCache]:
        params, cfg, H = self.params["attention"], self.config.attention, self.config.n_heads
        B, G = len(self.valid_B), cfg.n_kv_heads or H
        q_BD, k, v = (parts["attention", name] for name in ("query", "key", "value"))
        D = q_BD.shape[1]
        d = D // H
        qk = jnp.concatenate([q_BD, k], axis=-1).reshape(B, 1, H + G, d)
        if cfg.qk_norm:
            scale = jnp.concatenate([
                jnp.broadcast_to(params[f"{name}_norm"]["scale"], (heads, d))
                for name, heads in (("query", H), ("key", G))])
            qk = (rms_normalize(qk) * scale).astype(q_BD.dtype)
        if self.config.position == "rope":
            qk = rotate(qk, self.positions_B[:, None], self.config.rope_theta)
        q, k = qk[:, 0, :H], qk[:, 0, H:]
        states, written = self.retrieve(
            q, (k, v.reshape(B, G, d)), (cache.key_BGCd, cache.value_BGCd),
            scale_H=jnp.full((H,), d**-0.5))
        return states[0].reshape(B, D), AttentionCache(*written)


def _mix(config: HybridConfig, spec: BlockSpec, params: Layer, hidden_BW: Array, outs_PBD: Array,
         control_BP: Array | None) -> Float[Array, "B D"]:
    """The GatedMixer, from the product with its first matrix."""
    hidden_BW = hidden_BW + params["hidden"]["bias"].astype(hidden_BW.dtype)
    logits_BP = jax.nn.silu(hidden_BW).astype(jnp.float32) @ params["gate"]["kernel"]
    logits_BP = logits_BP + params["gate"]["bias"]
    if control_BP is not None:
        present = jnp.asarray([PATHS.index(path) for path in spec.paths])
        logits_BP = logits_BP + control_BP[:, present].astype(jnp.float32)
    gates_BP = jax.nn.softmax(logits_BP / config.mixer.temperature, axis=-1)
    scale_PD = jnp.stack([params[f"norm_{path}"]["scale"] for path in spec.paths])
    terms = gates_BP.T[..., None] * rms_normalize(outs_PBD, config.norm_epsilon) * scale_PD[:, None]
    return terms.sum(0)


def _inputs(spec: BlockSpec) -> list[tuple[str, str]]:
    """(path, name) of every map of a block's input, in the order of their columns."""
    names = {"ssm": ("in",), "hopfield": ("query", "key", "depth_gate"),
             "attention": ("query", "key", "value")}
    return [*((path, name) for path in spec.paths for name in names[path]), ("mixer", "hidden")]


def _split(y_BN: Array, params: Layer, spec: BlockSpec) -> dict[tuple[str, str], Array]:
    """The product with the joined matrix, by what each part of it is."""
    parts, begin = {}, 0
    for path, name in _inputs(spec):
        end = begin + params[path][name]["kernel"].shape[1]
        parts[path, name] = y_BN[:, begin:end]
        begin = end
    return parts
