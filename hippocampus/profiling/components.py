"""Which component of a step an instruction of the compiled program belongs to.

XLA keeps, as an instruction's `op_name`, the scopes that it was traced in: Flax gives the names of
modules, `jax.named_scope` the rest. The innermost scope that is known decides. What the compiler
made itself (a copy, a fusion without a name) belongs to what it was made of.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from hippocampus.planning.hlo import Computation, Instruction, Module
from hippocampus.planning.traffic import COLLECTIVES

COMPONENTS = ("embedding", "ssm", "hopfield", "attention", "mixer", "mlp", "equilibrium",
              "norms and residual", "controller", "loss", "optimizer", "ema", "collectives",
              "other")
"""In the order of the table."""

CONTROL_FLOW = ("while", "conditional", "call")
"""Opcodes that run others: those have their own events in a trace."""

_SCOPES = {
    "HybridLM._embed": "embedding", "embedding": "embedding", "embedding_up": "embedding",
    "ssm": "ssm", "hopfield": "hopfield", "attention": "attention", "mixer": "mixer", "mlp": "mlp",
    "norm_paths": "norms and residual", "norm_mlp": "norms and residual",
    "norm_out": "norms and residual", "HybridBlock": "norms and residual",
    "controller": "controller", "feedback": "controller", "feedback_norm": "controller",
    "EquilibriumLM._embed": "embedding", "MambaBlock": "norms and residual",
    "EquilibriumLM._injection": "equilibrium", "EquilibriumLM._equilibrium": "equilibrium",
    "EquilibriumLM.sweep": "equilibrium", "EquilibriumCell": "equilibrium",
    "recalled": "hopfield", **{f"EquilibriumCell.{method}": "hopfield" for method in (
        "retrieve", "energies", "query_of", "_recall", "_look", "_patterns", "_heads")},
    "loss": "loss", "flow": "loss", "optimizer": "optimizer", "ema": "ema",
}
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLEE = re.compile(r"calls=%?([\w.\-]+)")
_NEIGHBOURS = 4
"""How far to look along operands for where a copy comes from."""


@dataclass(frozen=True)
class Origin:
    """Where an instruction comes from.

    Attributes:
      component: one of `COMPONENTS`.
      backward: whether it computes gradients.
      op_name: the scopes, as XLA has them; "" where there are none.
      control_flow: whether it only runs other instructions.
    """

    component: str
    backward: bool
    op_name: str = ""
    control_flow: bool = False


def component_of(op_name: str) -> str | None:
    """The component that scopes belong to; None where none of them is known."""
    scopes = re.split(r"[/()]+", op_name)
    for scope in reversed(scopes):
        known = _SCOPES.get(scope) or _SCOPES.get(scope.partition(".")[0])
        if known == "mixer" and "MambaBlock" in scopes:
            return "ssm"  # a Mamba layer has the name that published checkpoints give it
        if known:
            return known
    return None


def origin_of(op_name: str) -> Origin:
    """By the scopes alone."""
    return Origin(component_of(op_name) or "other", "transpose(" in op_name, op_name)


def origins(module: Module) -> dict[str, Origin]:
    """Name of every instruction of a compiled program -> where it comes from.

    A fusion of several components belongs to the one of its result.
    """
    found = {}
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            kind = re.sub(r"-(start|done|update)$", "", instruction.opcode)
            name = _name(module, computation, instruction)
            origin = origin_of(name)
            found[instruction.name] = Origin(
                "collectives" if kind in COLLECTIVES else origin.component, origin.backward,
                name, instruction.opcode in CONTROL_FLOW)
    return found


def _name(module: Module, computation: Computation, instruction: Instruction) -> str:
    """The first of its own scopes, of what it fuses, and of its operands that is known."""
    candidates = [_own_name(instruction)]
    callee = _CALLEE.search(instruction.attributes)
    inner = module.computations.get(callee[1]) if callee else None
    if inner is not None:
        candidates.append(_own_name(inner.instructions[inner.root]))
        names = Counter(name for name in map(_own_name, inner.instructions.values())
                        if component_of(name))
        candidates += [name for name, _ in names.most_common(1)]
    for candidate in candidates:
        if component_of(candidate):
            return candidate
    named = next(filter(None, candidates), "")
    return named or _name_of_operands(computation, instruction)


def _name_of_operands(computation: Computation, instruction: Instruction) -> str:
    """Of the first operand, its first operand and so on, whichever is known first."""
    for _ in range(_NEIGHBOURS):
        first = next((name for name in instruction.operands if name in computation.instructions),
                     None)
        if first is None:
            break
        instruction = computation.instructions[first]
        if component_of(_own_name(instruction)):
            return _own_name(instruction)
    return ""


def _own_name(instruction: Instruction) -> str:
    found = _OP_NAME.search(instruction.attributes)
    return found[1] if found else ""
