"""Flags of XLA: those of the user stay, and every one that is set is known to this XLA."""

import os

import jax
import jax.numpy as jnp

from hippocampus import xla_flags


def test_flags_are_added_once_and_never_change_what_is_there(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    for _ in range(2):
        xla_flags.prepare(xla_flags.DETERMINISTIC, xla_flags.NAMED_KERNELS)
    assert os.environ["XLA_FLAGS"].split() == [
        "--xla_gpu_deterministic_ops=false", "--xla_gpu_enable_command_buffer="]
    assert xla_flags.asked(xla_flags.NAMED_KERNELS)
    assert not xla_flags.asked(xla_flags.DETERMINISTIC)


def test_gradients_are_overlapped_only_between_gpus():
    assert xla_flags.compiler_options("gpu", 1) == {}
    assert xla_flags.compiler_options("tpu", 8) == {}
    assert xla_flags.compiler_options("gpu", 2)


def test_xla_knows_the_options():
    options = xla_flags.compiler_options("gpu", 2)
    compiled = jax.jit(lambda x: x + 1, compiler_options=options)
    assert compiled(jnp.ones(3)).sum() == 6
