"""The FLOP count: by hand for attention, and near what the compiler counts."""

import jax
import jax.numpy as jnp
import pytest

from hippocampus.data.batches import Batch
from hippocampus.models.build_model import build_model, parameter_shapes
from hippocampus.models.flops import (
    ssm_flops,
    training_flops_by_component,
    training_flops_per_token,
)

ATTENTION = {"model.paths": ("attention",), "model.segments.train": 1}


def test_attention_alone_is_what_one_counts_by_hand(tiny_config):
    config = tiny_config({**ATTENTION, "model.mlp.width": 48})
    D, T, L, padded, mixer = 16, 24, 2, 128, 8
    projections = 4 * D * D  # query, key, value, out
    scores_and_values = 2 * D * (T + 1) / 2  # a token sees (T + 1) / 2 tokens on average
    swiglu = 3 * D * 48
    gate = D * mixer + mixer * 1
    forward = 2 * (L * (projections + scores_and_values + swiglu + gate) + padded * D)
    assert training_flops_per_token(config) == 3 * forward


def test_every_part_is_counted_where_it_is_done(tiny_config):
    parts = training_flops_by_component(tiny_config({**ATTENTION, "model.mlp.width": 48}))
    assert parts == {
        "ssm": 0, "hopfield": 0, "attention": 3 * 2 * 2 * (4 * 16 * 16 + 16 * 25),
        "mixer": 3 * 2 * 2 * (16 * 8 + 8), "mlp": 3 * 2 * 2 * 3 * 16 * 48, "controller": 0,
        "loss": 3 * 2 * 128 * 16, "embedding": 0}


def test_a_second_pass_doubles_the_layers(tiny_config):
    weights = {"model.segments.weights": (1.0,)}
    once, twice, stopped = (training_flops_per_token(tiny_config({
        **ATTENTION, **weights, "model.segments.train": R, "model.segments.gradient": gradient}))
        for R, gradient in ((1, "full"), (2, "full"), (2, "stop")))
    head = 3 * 2 * 128 * 16
    controller = 3 * 2 * 8 * (16 + 2 * 3)
    assert twice == 2 * (once - head) + head + controller
    # Without a gradient through it, a pass costs a third.
    assert stopped == pytest.approx((once - head) * 4 / 3 + head + controller)


def test_a_gru_is_what_one_counts_by_hand(tiny_config):
    """The compiler counts the body of its loop once, whatever the length."""
    config = tiny_config({"model.paths": ("ssm",), "model.segments.train": 1,
                          "model.ssm.kind": "gru", "model.mlp.width": 48})
    D, E, L, padded, mixer = 16, 24, 2, 128, 8
    gru = D * 3 * E + E * 3 * E + E * D
    forward = 2 * (L * (gru + 3 * D * 48 + D * mixer + mixer) + padded * D)
    assert training_flops_per_token(config) == 3 * forward


def test_mamba_is_what_one_counts_by_hand(tiny_config):
    """The compiler counts the body of S6's loop once; a chunk of SSD is all 24 tokens here."""
    settings = {"model.paths": ("ssm",), "model.ssm.expansion": 2.0, "model.ssm.head_width": 8,
                "model.ssm.dt_rank": 3, "model.ssm.n_groups": 2}
    D, E, N, H, conv, T = 16, 32, 4, 4, 4, 24
    s6 = D * 2 * E + conv * E + E * (3 + 2 * N) + 3 * E + E * D
    chunks = (T + 1) / 2 * (2 * N + E) + 2 * E * N  # scores and their use; in and out of states
    ssd = D * (2 * E + 2 * 2 * N + H) + conv * (E + 2 * 2 * N) + chunks + E * D
    for kind, forward in (("s6", s6), ("ssd", ssd)):
        config = tiny_config({**settings, "model.ssm.kind": kind}).model
        assert ssm_flops(config.ssm, D, config.n_heads, T) == 2 * forward, kind


@pytest.mark.parametrize("overrides", [
    {"model.paths": ("ssm",)},
    {"model.paths": ("ssm",), "model.ssm.kind": "ssd", "model.ssm.d_state": 16},
    {"model.paths": ("hopfield",), "model.hopfield.patterns": "both"},
    {"model.paths": ("attention",), "model.attention.n_kv_heads": 1},
    {"model.segments.train": 2, "model.segments.feedback": True}])
def test_the_count_is_near_the_compilers(overrides, tiny_config):
    """Wide enough that matrices dominate; the compiler counts the masked half of scores too."""
    config = tiny_config({"model.d_model": 128, "model.mlp.width": 256, "model.n_layers": 1,
                          "model.segments.train": 1, "model.segments.weights": (1.0,),
                          **overrides})
    model, T = build_model(config), config.data.context
    tokens = jax.ShapeDtypeStruct((4, T), jnp.int32)

    def forward(params, tokens):
        batch = Batch(tokens, tokens, jnp.ones(tokens.shape))
        hidden, _, _ = model.apply({"params": params}, batch, method="forward")
        return model.head(params).logits(hidden)

    cost = jax.jit(forward).lower(parameter_shapes(model), tokens).compile().cost_analysis()
    counted = (cost[0] if isinstance(cost, list) else cost)["flops"] / (4 * T)
    ours = training_flops_per_token(config) / 3
    assert 0.75 < ours / counted < 1.05
