"""Flags of XLA: those of the user stay, and every one that is set is known to this XLA."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tiny_run

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


LOWERED = """
import jax
from hippocampus.verbs import run_verb

def main(arguments):
    def doubled(x):
        with jax.named_scope("layer"):
            return x * 2
    print(jax.jit(doubled).lower(1.0).as_text(debug_info=True))

run_verb(main, [])
"""


@pytest.mark.parametrize("calls", [{}, {xla_flags.TRACEBACKS: "100"}], ids=["default", "asked"])
def test_programs_have_names_of_layers_and_lines_of_code_only_if_asked(tmp_path, calls):
    (tmp_path / "program.py").write_text(LOWERED)
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True,
                          env={**tiny_run.environment(), **calls}, check=True)
    assert "layer/mul" in done.stdout
    assert ("program.py" in done.stdout) is bool(calls)
