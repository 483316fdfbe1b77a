"""What the fields of an equilibrium model must be to each other: `check_equilibrium`."""

from __future__ import annotations

from hippocampus.config import (
    Config,
    EquilibriumConfig,
    EquilibriumLossConfig,
    RectifiedFlowConfig,
    SSMConfig,
)
from hippocampus.config_checks_hybrid import check_ssm
from hippocampus.config_refusals import shown
from hippocampus.errors import ConfigError

MAMBA = ("s6", "ssd")
"""Kinds of the layers in front of the cell."""

_OF_THE_HYBRID = ("first_layer", "dominant_from_layer", "dominance")
"""Fields of a state-space layer that only the hybrid reads."""


def check_equilibrium(config: Config, model: EquilibriumConfig) -> None:
    """Refuses fields of an equilibrium model that contradict each other or the rest of the config.

    Args:
      config: all of it.
      model: its model.

    Raises:
      ConfigError: with the fields and the numbers that do not fit.
    """
    if config.loss.rectified_flow != RectifiedFlowConfig():
        raise ConfigError("loss.rectified_flow is set, and model.family is equilibrium",
                          "it is between the passes of the hybrid; loss.equilibrium.* has the "
                          "terms of this family")
    _check_layers(model)
    if model.is_explicit:
        _check_explicit(model, config.loss.equilibrium)
    else:
        _check_solver(model)
        if config.loss.equilibrium.energy_weight and "hopfield" not in model.cell.parts:
            raise ConfigError("loss.equilibrium.energy_weight needs hopfield in model.cell.parts",
                              "without a memory there is no energy")
    if model.solver.warm_start == "stream" and config.data.order != "streams":
        raise ConfigError(f"model.solver.warm_start is stream, and data.order {config.data.order}",
                          "the state of another text is no first guess: data.order=streams")


def _check_layers(model: EquilibriumConfig) -> None:
    """The widths of the layers, and what the cell is made of."""
    if model.ssm.kind not in MAMBA:
        raise ConfigError(f"model.ssm.kind is {model.ssm.kind} in an equilibrium model",
                          f"its layers are Mamba's: {' or '.join(MAMBA)}; model.cell.ssm.kind is "
                          "free")
    for name, ssm in (("model.ssm", model.ssm), ("model.cell.ssm", model.cell.ssm)):
        for field in _OF_THE_HYBRID:
            if getattr(ssm, field) != getattr(SSMConfig(), field):
                raise ConfigError(f"{name}.{field} is set, and model.family is equilibrium",
                                  "only the gates of model.family=hybrid read it")
        if name == "model.ssm" or "ssm" in model.cell.parts:
            check_ssm(name, ssm, model.d_model, model.n_heads)
    parts = model.cell.parts
    if not parts or len(set(parts)) < len(parts):
        raise ConfigError(f"model.cell.parts is {shown(parts)}",
                          "name each of ssm, hopfield, mlp at most once, and at least one of them")


def _check_explicit(model: EquilibriumConfig, loss: EquilibriumLossConfig) -> None:
    """Without a fixed point, what belongs to one has no meaning."""
    solver, hint = model.solver, "take picard, anderson or broyden for a fixed point"
    if loss != EquilibriumLossConfig():
        raise ConfigError("loss.equilibrium is set, and model.solver.method is explicit", hint)
    if not model.n_layers and not model.cell.copies:
        raise ConfigError("model.n_layers and model.cell.copies are 0", "a model needs a layer")
    for field, neutral in (("warm_start", "none"), ("warmup_fraction", 0.0),
                           ("ramp_fraction", 0.0), ("jitter", 0), ("cache", "equilibrium"),
                           ("on_expansion", "report")):
        if getattr(solver, field) != neutral:
            raise ConfigError(f"model.solver.{field} is {getattr(solver, field)}, and "
                              "model.solver.method explicit", hint)


def _check_solver(model: EquilibriumConfig) -> None:
    """The curriculum, and the rule for a cell that does not contract."""
    solver = model.solver
    if model.cell.copies != 1:
        raise ConfigError(f"model.cell.copies = {model.cell.copies} has no fixed point",
                          "it has one cell; several, or none, go with "
                          "model.solver.method=explicit")
    if solver.warmup_fraction + solver.ramp_fraction > 1:
        raise ConfigError(
            f"model.solver.warmup_fraction = {solver.warmup_fraction:g} and ramp_fraction = "
            f"{solver.ramp_fraction:g} are more than the whole training",
            "together at most 1")
    if solver.warmup_fraction and solver.warmup_iterations > solver.max_iterations:
        raise ConfigError(f"model.solver.warmup_iterations = {solver.warmup_iterations} is more "
                          f"than max_iterations = {solver.max_iterations}",
                          "the sweeps grow from the first to the second")
    if solver.jitter >= solver.max_iterations:
        raise ConfigError(f"model.solver.jitter = {solver.jitter} is not below max_iterations = "
                          f"{solver.max_iterations}", "at least one sweep has to be left")
    if solver.cache == "iterations" and solver.schedule == "cascade":
        raise ConfigError("model.solver.cache is iterations, and model.solver.schedule cascade",
                          "the state is solved for within every sweep: take cache=equilibrium")
    if solver.on_expansion != "report" and not solver.tol_fixedpoint:
        raise ConfigError(f"model.solver.on_expansion is {solver.on_expansion}, and "
                          "tol_fixedpoint 0", "no token ever converges to nothing: give a "
                          "tolerance, or report")
