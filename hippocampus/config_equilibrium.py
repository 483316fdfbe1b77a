"""The fields of the equilibrium model, and of what its loss adds."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from hippocampus.config_fields import count, group, setting
from hippocampus.config_hybrid import MLPConfig, SSMConfig


@dataclass(frozen=True)
class CellConfig:
    """The cell whose fixed point is the model's depth (hippocampus.layers.equilibrium_cell)."""

    copies: int = count(1, "cells with weights of their own, each applied once (method explicit; "
                        "0 = none); a fixed point has one", low=0, high=1024)
    parts: tuple[str, ...] = setting(
        ("ssm", "hopfield", "mlp"), "what the state update sums",
        choices=("ssm", "hopfield", "mlp"))
    gain: float = setting(0.5, "first scale of what the parts add to the injection", above=0,
                          high=100)
    ssm: SSMConfig = group(functools.partial(SSMConfig, expansion=1.0))
    mlp: MLPConfig = group(MLPConfig)


@dataclass(frozen=True)
class CellHopfieldConfig:
    """The memory of the cell."""

    patterns: str = setting("slots", "what is retrieved from: learned slots, the causal context, "
                            "or both", choices=("slots", "context", "both"))
    n_slots: int = count(512, "learned patterns S", high=10_000)
    anchor: float = setting(1.0, "weight kappa of the energy's term |xi - q|^2 / 2, which holds "
                            "the query near the state", above=0, high=1e6)
    step_size: float = setting(1.0, "step alpha of a retrieval; the energy never rises for "
                               "alpha <= 1", above=0, high=1)
    steps: int = count(1, "retrieval steps in one sweep of the solver", high=64)
    trust_radius: float = setting(1.0, "longest move of a head's query in one step (cascade)",
                                  above=0, high=1e6)
    normalize: str = setting("l2", "norm of queries and patterns per head: unit length, or RMS",
                             choices=("l2", "rms"))
    backend: str = setting("auto", "attention backend of retrieval from the context",
                           choices=("auto", "xla", "cudnn", "flash"))


@dataclass(frozen=True)
class SolverConfig:
    """How the fixed point is found and differentiated (hippocampus.ops.fixed_point)."""

    method: str = setting("anderson", "picard, anderson or broyden; explicit = no fixed point, "
                          "`cell.copies` cells in a row",
                          choices=("picard", "anderson", "broyden", "explicit"))
    schedule: str = setting("alternating", "order of state update and retrieval in a sweep: "
                            "alternating (the retrieval sees the new state), simultaneous (the "
                            "old one), cascade (the state is solved for first)",
                            choices=("alternating", "simultaneous", "cascade"))
    max_iterations: int = count(30, "sweeps at most", high=1000)
    inner_iterations: int = count(10, "state updates at most in a sweep (cascade)", high=1000)
    tol_fixedpoint: float = setting(1e-3, "relative residual at which a token's state has "
                                    "converged; 0 = every sweep is run", low=0, below=1)
    tol_energy: float = setting(1e-3, "change of the energy at which a token's retrieval has "
                                "converged", low=0, high=1e6)
    damping: float = setting(1.0, "share tau of a sweep's result in the next state", above=0,
                             high=1)
    memory: int = count(5, "earlier iterates that anderson and broyden use", high=64)
    regularization: float = setting(1e-6, "of anderson's least squares, as a share of their trace",
                                    low=0, high=1)
    gradient: str = setting("implicit", "implicit: of the fixed point itself; phantom: of the last "
                            "`phantom_steps` sweeps; unroll: of all of them",
                            choices=("implicit", "phantom", "unroll"))
    phantom_steps: int = count(1, "sweeps that phantom differentiates", high=64)
    backward_iterations: int = count(30, "iterations of the implicit gradient at most", high=1000)
    backward_tol: float = setting(1e-4, "relative residual of the implicit gradient", low=0,
                                  below=1)
    warmup_fraction: float = setting(0.0, "share of training that first unrolls "
                                     "`warmup_iterations` sweeps only", low=0, below=1)
    warmup_iterations: int = count(2, "those sweeps", high=64)
    ramp_fraction: float = setting(0.0, "share of training, after that, in which the sweeps grow "
                                   "to `max_iterations` and the tolerances fall by `ramp_tol` to "
                                   "their own", low=0, high=1)
    ramp_tol: float = setting(10.0, "first tolerances / last tolerances", low=1, high=1e6)
    jitter: int = count(0, "training draws the sweeps within this distance of their number",
                        low=0, high=64)
    warm_start: str = setting("none", "first state: none = from the injection; stream = from the "
                              "row's last token, where data.order is streams",
                              choices=("none", "stream"))
    cache: str = setting("equilibrium", "what a decoder keeps: the equilibrium of the tokens read, "
                         "or that of each of the iterations (exactly the full pass)",
                         choices=("equilibrium", "iterations"))
    on_expansion: str = setting("report", "where too few tokens converge: report = say so and go "
                                "on with the best iterate; skip = leave that step out; stop = end "
                                "the run", choices=("report", "skip", "stop"))
    least_converged: float = setting(0.5, "share of the tokens that has to converge", low=0, high=1)


@dataclass(frozen=True)
class EquilibriumConfig:
    """The equilibrium language model (hippocampus.models.equilibrium_lm)."""

    family: str = setting("equilibrium", "model family", choices=("equilibrium",))
    vocab_size: int = count(256, "token ids; training replaces it by the tokenizer's size",
                            high=16_777_216)
    d_model: int = count(256, "width D of the residual stream", high=65_536)
    n_layers: int = count(4, "Mamba layers L in front of the equilibrium", low=0, high=1024)
    n_heads: int = count(4, "heads H of the memory and of block-diagonal gates", high=1024)
    tie_embeddings: bool = setting(True, "one table for input and output")
    embedding_scale: bool = setting(True, "embeddings are brought to unit size")
    dropout: float = setting(0.0, "dropout after each layer and on the injection", low=0, below=1)
    scan_layers: bool = setting(False, "compile the Mamba layers once (lax.scan)")
    remat: str = setting("none", "what the backward pass recomputes: none, dots (all but matrix "
                         "products), or full (whole layers and sweeps)",
                         choices=("none", "dots", "full"))
    compute_dtype: str = setting("auto", "type of matrix products; parameters stay float32",
                                 choices=("auto", "float32", "bfloat16", "float16"))
    norm_epsilon: float = setting(1e-6, "added to the mean square in norms", low=1e-12, high=1)
    ssm: SSMConfig = group(functools.partial(SSMConfig, kind="s6", expansion=2.0, d_state=16))
    hopfield: CellHopfieldConfig = group(CellHopfieldConfig)
    cell: CellConfig = group(CellConfig)
    solver: SolverConfig = group(SolverConfig)

    @property
    def passes(self) -> int:
        """Reasoning passes: one, in which the fixed point is the depth."""
        return 1

    @property
    def is_explicit(self) -> bool:
        """Whether there is no fixed point, only cells in a row."""
        return self.solver.method == "explicit"

    def longest_row(self, context: int) -> int | None:
        """Tokens that a row can have: any number."""
        return None


@dataclass(frozen=True)
class EquilibriumLossConfig:
    """What the loss of an equilibrium model adds, per token (hippocampus.training.equilibrium)."""

    energy_weight: float = setting(0.0, "weight of the memory's energy at the fixed point", low=0,
                                   high=1e6)
    convergence_weight: float = setting(0.0, "weight of the squared relative residual", low=0,
                                        high=1e6)
    jacobian_weight: float = setting(0.0, "weight of the Jacobian's squared Frobenius norm / D, "
                                     "estimated with one random vector", low=0, high=1e6)
    jacobian_chance: float = setting(0.4, "share of the steps that have the Jacobian's term",
                                     low=0, high=1)
    contraction_weight: float = setting(0.0, "weight of max(0, contraction - contraction_target)^2",
                                        low=0, high=1e6)
    contraction_target: float = setting(0.8, "largest contraction that costs nothing", above=0,
                                        high=100)
    power_iterations: int = count(3, "products with the Jacobian that estimate the contraction",
                                  high=64)
