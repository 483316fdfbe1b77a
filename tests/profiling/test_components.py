"""Which component an instruction belongs to."""

import jax
import jax.numpy as jnp
import pytest

from hippocampus.planning import hlo
from hippocampus.profiling.components import component_of, origin_of, origins

BLOCK = "jit(step)/jvp(HybridLM.forward)/reasoner/HybridLM._run_stack/HybridBlock/HybridBlock._run"

SWEEP = ("jit(step)/jvp(EquilibriumLM.forward)/EquilibriumLM._equilibrium/while/body/"
         "EquilibriumCell.sweep")


@pytest.mark.parametrize(("scopes", "component"), [
    (f"{BLOCK}/ssm/ssm._run/ssm._gated/dot_general", "ssm"),
    (f"{BLOCK}/hopfield/hopfield._run/vmap(jit(_where))/select_n", "hopfield"),
    (f"{BLOCK}/attention/attention._run/query_norm/mul", "attention"),
    (f"{BLOCK}/mixer/norm_attention/rsqrt", "mixer"),  # the mixer's, although it names a path
    (f"{BLOCK}/mlp/down/dot_general", "mlp"), (f"{BLOCK}/norm_paths/mul", "norms and residual"),
    (f"{BLOCK}/add", "norms and residual"), (f"{BLOCK}/Dropout_0/mul", "norms and residual"),
    (f"{SWEEP}/EquilibriumCell.update/EquilibriumCell._read/ssm/ssm._run/out/dot_general", "ssm"),
    (f"{SWEEP}/EquilibriumCell.update/mlp/up/dot_general", "mlp"),
    (f"{SWEEP}/EquilibriumCell.update/recalled/dot_general", "hopfield"),
    (f"{SWEEP}/EquilibriumCell.retrieve/exp", "hopfield"),
    (f"{SWEEP}/EquilibriumCell.update/norm_state/mul", "equilibrium"),
    ("jit(step)/jvp(EquilibriumLM.forward)/EquilibriumLM._equilibrium/while/body/add",
     "equilibrium"),
    ("jit(step)/jvp(EquilibriumLM.forward)/EquilibriumLM._run_stack/MambaBlock/mixer/mixer._run",
     "ssm"),
    ("jit(step)/jvp(EquilibriumLM.forward)/EquilibriumLM._run_stack/MambaBlock/norm/mul",
     "norms and residual"),
    ("jit(step)/jvp(HybridLM.forward)/reasoner/controller/out/dot_general", "controller"),
    ("jit(step)/transpose(jvp(HybridLM.forward))/HybridLM._embed/scatter-add", "embedding"),
    ("jit(step)/while/body/closed_call/transpose(jvp(loss))/dot_general", "loss"),
    ("jit(step)/optimizer/mul", "optimizer"), ("jit(step)/optimizer/ema/mul", "ema"),
    ("jit(step)/threefry2x32", None), ("", None)])
def test_the_innermost_known_scope_decides(scopes, component):
    assert component_of(scopes) == component


def test_gradients_are_told_from_the_forward_pass():
    assert origin_of("jit(step)/transpose(jvp(loss))/dot_general").backward
    assert not origin_of("jit(step)/jvp(loss)/dot_general").backward


def test_a_fusion_belongs_to_its_result_and_a_copy_to_what_it_copies():
    text = """HloModule jit_step, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %a = f32[8]{0} negate(%p), metadata={op_name="jit(step)/mlp/neg"}
  ROOT %b = f32[8]{0} negate(%a), metadata={op_name="jit(step)/mixer/neg"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %fusion = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
  %copy = f32[8]{0} copy(%fusion)
  %named = f32[8]{0} negate(%copy), metadata={op_name="jit(step)/ssm/neg"}
  %copy.1 = f32[8]{0} copy(%named)
  %reduce = f32[8]{0} all-reduce(%copy.1), to_apply=%add, metadata={op_name="jit(step)/mlp/dot"}
  ROOT %alone = f32[8]{0} copy(%x)
}
"""
    found = origins(hlo.parse(text))
    assert found["fusion"].component == "mixer"
    assert found["copy.1"].component == "ssm"
    assert found["reduce"].component == "collectives"
    assert found["alone"].component == "other"


def test_a_loop_only_runs_others():
    def loop(x):
        return jax.lax.fori_loop(0, 3, lambda _, y: y @ y, x)

    text = jax.jit(loop).lower(jnp.ones((8, 8))).compile().as_text()
    found = origins(hlo.parse(text))
    assert [origin.control_flow for origin in found.values()].count(True) == 1
