"""EquilibriumLM: Mamba layers read the text, and a cell is iterated to its fixed point.

    x = embedding;   x = x + mamba(rms(x))  n times;   u = rms(x)
    (z*, xi*) = the fixed point of the cell driven by u      (hippocampus.layers.equilibrium_cell)
    logits = head(rms(x + W_o z*))

With `solver.method="explicit"` there is no fixed point: `cell.copies` cells with weights of their
own make one sweep each, and none is a plain Mamba.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from hippocampus.config import EquilibriumConfig
from hippocampus.data.batches import Batch
from hippocampus.errors import ConfigError
from hippocampus.layers.dropout import Dropout
from hippocampus.layers.edits import Edit, no_edit, scoped
from hippocampus.layers.equilibrium_cell import Drive, EquilibriumCell
from hippocampus.layers.equilibrium_solver import (
    Solved,
    apply,
    call,
    continued,
    full_effort,
    solve,
    solve_at,
)
from hippocampus.layers.layer_stack import layer_parameters, run_layers
from hippocampus.layers.norms import RMSNorm
from hippocampus.models import equilibrium_statistics
from hippocampus.models.decode_parameters import cast_parameters
from hippocampus.models.equilibrium_decoding import EquilibriumCache, init_cache, solve_on
from hippocampus.models.interventions import NEUTRAL, Interventions
from hippocampus.models.mamba_block import MambaBlock
from hippocampus.ops.cross_entropy import Head
from hippocampus.ops.embedding import embed, padded_vocabulary
from hippocampus.ops.positions import token_positions

_INJECTION, _JITTER = 2**31, 2**31 + 1
"""Random streams of the injection's dropout and of the sweeps; layers are counted from 0."""


class EquilibriumLM(nn.Module):
    """A causal language model whose depth is a fixed point.

    `model.apply({"params": params}, tokens_BT)` gives `(logits_BTV, out)`.
    """

    config: EquilibriumConfig
    edit: Edit = no_edit

    def setup(self) -> None:
        """Creates the parameters: a table or two, one tree per layer, and the cell's."""
        cfg = self.config
        self.dtype = jnp.dtype(cfg.compute_dtype)
        shape = (padded_vocabulary(cfg.vocab_size), cfg.d_model)
        table = nn.initializers.normal(cfg.d_model**-0.5)
        self.embedding_VD = self.param("embedding", table, shape)
        if not cfg.tie_embeddings:
            self.param("head", table, shape)
        self.layer_params = layer_parameters(
            self, [f"layers_{i}" for i in range(cfg.n_layers)], ("layer",) * cfg.n_layers,
            self._init_tree)
        self.cell_params = layer_parameters(
            self, self.cell_names, ("cell",) * len(self.cell_names), self._init_tree)
        self.norm_out = RMSNorm(cfg.norm_epsilon, self.dtype)
        if self.cell_names:
            self.norm_injection = RMSNorm(cfg.norm_epsilon, self.dtype)
            self.out = nn.Dense(cfg.d_model, use_bias=False, dtype=self.dtype)

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> tuple[Float[Array, "B T V"], dict]:
        """Logits of the next token; deterministic.

        Args:
          tokens_BT: token ids below `vocab_size`; every row is one document.

        Returns:
          logits_BTV (float32, V = vocab_size), and the named intermediates.
        """
        batch = Batch(tokens_BT, tokens_BT, jnp.ones(tokens_BT.shape, jnp.float32))
        hidden_BTD, out, _ = self.forward(batch)
        head = self.head(self.variables["params"])
        return head.logits(hidden_BTD)[..., :self.config.vocab_size], out

    def forward(
        self, batch: Batch, state: dict | None = None, *,
        interventions: Interventions = NEUTRAL, train: bool = False,
        progress: Float[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array], dict]:
        """Final hidden states of every token.

        Args:
          batch: tokens, and where documents begin.
          state: with `solver.warm_start="stream"` what the last call gave; see `init_state`.
          interventions: none that changes anything; the parts of the hybrid are not here.
          train: dropout and jitter on; needs the random stream "dropout" where they are above 0.
          progress: share of the training that is done, for the curriculum; None = all of it.

        Returns:
          hidden_BTD (normalised, compute dtype), `out`, and the state. `out` has
          "segments.hidden" (1,B,T,D: hidden_BTD), "embedding", "layers.<i>.…", "residual" (B,T,D),
          and with a cell "injection" (u), "z_equilibrium" (B,T,D), "cell.query" (q(z*), B,T,H,d)
          and "energy.retrieval", "energy.anchor", "energy.total" (B,T); of a fixed point also
          "solver.converged", "solver.iterations", "solver.residual", "solver.rate" (B,T),
          "solver.residual_trace", "solver.evaluations" (), "solver.state" (B,T,S: the solver's
          vector), and outside of training "solver.energy_trace" (K,B,T).

        Raises:
          ConfigError: an intervention.
        """
        _refuse(interventions)
        positions_BT = token_positions(batch.tokens_BT, batch.document_ids_BT, batch.positions_BT)
        key = self.make_rng("dropout") if train and self.has_rng("dropout") else None
        x_BTD = self.edit("embedding", self._embed(batch.tokens_BT))
        out = {"embedding": x_BTD}
        x_BTD, part = self._run_stack(x_BTD, batch.document_ids_BT, positions_BT, train, key)
        out.update(part)
        new_state: dict = {}
        if self.cell_names:
            u_BTD = self._injection(x_BTD, train, key)
            out["injection"] = u_BTD
            z_BTD, part, new_state = self._equilibrium(u_BTD, batch, positions_BT, state or {},
                                                       train, progress, key)
            out.update(part)
            x_BTD = x_BTD + self.out(z_BTD.astype(self.dtype))
        out["residual"] = x_BTD = self.edit("residual", x_BTD)
        hidden_BTD = self.norm_out(x_BTD)
        out["segments.hidden"] = hidden_BTD[None]
        return hidden_BTD, out, new_state

    # ------------------------------------------------------------ the map, for terms of the loss

    def sweep(self, s_BTS: Float[Array, "B T S"], u_BTD: Float[Array, "B T D"],
              document_ids_BT: Int[Array, "B T"] | None,
              positions_BT: Int[Array, "B T"] | None = None, schedule: str = "simultaneous",
              ) -> Float[Array, "B T S"]:
        """One sweep of the cell, such as at the fixed point `out["solver.state"]`.

        Args:
          s_BTS: the solver's vector, float32.
          u_BTD: `out["injection"]`.
          document_ids_BT, positions_BT: of the batch; without positions they follow from the
            ids, and without ids every row is one document.
          schedule: "simultaneous" or "alternating".
        """
        drive = self._drive(self.cell_params[0], u_BTD, document_ids_BT, positions_BT)
        return apply(self.cell, (self.cell_params[0], drive), "sweep", s_BTS, schedule=schedule)

    def energies(self, s_BTS: Float[Array, "B T S"], u_BTD: Float[Array, "B T D"],
                 document_ids_BT: Int[Array, "B T"] | None,
                 positions_BT: Int[Array, "B T"] | None = None) -> dict[str, Float[Array, "B T"]]:
        """The memory's energy, "retrieval", "anchor" and their sum "total"; as `sweep`."""
        drive = self._drive(self.cell_params[0], u_BTD, document_ids_BT, positions_BT)
        return apply(self.cell, (self.cell_params[0], drive), "energies", s_BTS)

    def solve(self, s0_BTS: Float[Array, "B T S"], u_BTD: Float[Array, "B T D"],
              document_ids_BT: Int[Array, "B T"] | None,
              positions_BT: Int[Array, "B T"] | None = None, record: bool = False) -> Solved:
        """Solves from any first state with the solver of the config; as `sweep`."""
        drive = self._drive(self.cell_params[0], u_BTD, document_ids_BT, positions_BT)
        return solve(self.cell, self.cell_params[0], drive, s0_BTS, self.config.solver,
                     full_effort(self.config.solver, self.dtype), record=record)

    def first_state(self, u_BTD: Float[Array, "B T D"], document_ids_BT: Int[Array, "B T"] | None,
                    positions_BT: Int[Array, "B T"] | None = None) -> Float[Array, "B T S"]:
        """Where `forward` begins to solve; arguments as for `sweep`."""
        drive = self._drive(self.cell_params[0], u_BTD, document_ids_BT, positions_BT)
        first: Array = call(self.cell, self.cell_params[0], "first_state", drive)
        return first

    # ------------------------------------------------------------ reading on

    @nn.nowrap
    def init_cache(self, batch: int, max_length: int,
                   passes: int | None = None) -> EquilibriumCache:
        """The cache before the first token; needs no parameters.

        Args:
          batch: rows B.
          max_length: tokens of the context that a memory with context patterns keeps.
          passes: 1 or None; there is one.

        Raises:
          ConfigError: iterations kept of a cascade, whose inner solves have their own.
        """
        cfg = self.config
        layers = tuple(self._block().init_cache(batch, max_length, cfg.d_model)
                       for _ in range(cfg.n_layers))
        return init_cache(cfg.solver, layers, tuple(
            self.cell.init_cache(batch, max_length) for _ in self.cell_names), batch)

    def extend(
        self, tokens_Bn: Int[Array, "B n"], cache: EquilibriumCache,
        valid_Bn: Bool[Array, "B n"] | None = None, *, skip: bool = False,
    ) -> tuple[Float[Array, "B n D"], EquilibriumCache]:
        """Reads further tokens of every row.

        With `solver.cache="iterations"`, or without a fixed point, any chunks give what `forward`
        gives at once; with "equilibrium" they do to the tolerance of the solver.

        Args:
          tokens_Bn: any number n >= 1 of tokens a row.
          cache: from `init_cache` or the last call.
          valid_Bn: a row's valid tokens come first; the others leave its cache as it is, and
            their outputs mean nothing. None = all are valid.
          skip: false; there is no flow to skip with.

        Returns:
          hidden_BnD (normalised, compute dtype), and the new cache.
        """
        if valid_Bn is None:
            valid_Bn = jnp.ones(tokens_Bn.shape, bool)
        positions_Bn = cache.length_B[:, None] + jnp.cumsum(valid_Bn, axis=1) - valid_Bn
        x_BnD, layers = self._embed(tokens_Bn), []
        for params, own in zip(self.layer_params, cache.layers, strict=True):
            read: Any = self._block().apply({"params": params}, x_BnD, positions_Bn, own,
                                            valid_Bn, method="extend")
            x_BnD, own = read
            layers.append(own)
        cells, frozen_B = cache.cells, cache.frozen_B
        if self.cell_names:
            u_BnD = self.norm_injection(x_BnD)
            z_BnD, cells, frozen_B = solve_on(
                self.cell, self.cell_params, self.config.solver, u_BnD, positions_Bn, valid_Bn,
                cells, frozen_B)
            x_BnD = x_BnD + self.out(z_BnD.astype(self.dtype))
        return self.norm_out(x_BnD), EquilibriumCache(
            cache.length_B + valid_Bn.sum(1), tuple(layers), cells, frozen_B)

    @nn.nowrap
    def reset(self, cache: EquilibriumCache, rows_B: Bool[Array, " B"]) -> EquilibriumCache:
        """The cache with these rows as before their first token; the others keep every bit."""
        def clear(array: Array) -> Array:
            chosen = rows_B.reshape(-1, *[1] * (array.ndim - 1))
            return jnp.where(chosen, jnp.zeros((), array.dtype), array)

        return jax.tree.map(clear, cache)

    @nn.nowrap
    def decode_params(self, params: Any) -> Any:
        """The parameters with those in compute dtype that every use casts to it anyway."""
        return cast_parameters(params, jnp.dtype(self.config.compute_dtype))

    @nn.nowrap
    def decode_variables(self, params: Any, capacity: int) -> dict[str, Any]:
        """What `apply(…, method="extend")` takes; `capacity` is without meaning here."""
        return {"params": self.decode_params(params)}

    # ------------------------------------------------------------ what a trainer asks for

    def head(self, params: Any) -> Head:
        """The output layer of a parameter tree."""
        weight = params["embedding" if self.config.tie_embeddings else "head"]
        return Head(weight, vocab_size=self.config.vocab_size)

    def statistics(self, out: dict[str, Array],
                   weight_BT: Float[Array, "B T"]) -> dict[str, Float[Array, ""]]:
        """What to log of a forward pass: series name -> weighted sum over its tokens."""
        return equilibrium_statistics.token_sums(out, weight_BT)

    def distributions(self, out: dict[str, Array]) -> dict[str, Array]:
        """What to draw of a forward pass: series name -> values of its tokens."""
        return equilibrium_statistics.distributions(out)

    def init_state(self, batch: Batch) -> dict:
        """What `forward` carries from batch to batch: a row's last state, or nothing."""
        cfg = self.config
        if cfg.solver.method == "explicit" or cfg.solver.warm_start == "none":
            return {}
        width = cfg.d_model * (2 if "hopfield" in cfg.cell.parts else 1)
        return {"z_last": jnp.zeros((batch.tokens_BT.shape[0], width), jnp.float32)}

    # ------------------------------------------------------------ parts

    @property
    def cell(self) -> EquilibriumCell:
        """The cell without parameters; all cells of a model are alike."""
        cfg = self.config
        backend = "xla" if cfg.hopfield.backend == "auto" else cfg.hopfield.backend
        return EquilibriumCell(cfg.cell, cfg.hopfield, cfg.d_model, cfg.n_heads, cfg.norm_epsilon,
                               backend, jnp.dtype(cfg.compute_dtype), parent=None)

    @property
    def cell_names(self) -> tuple[str, ...]:
        """The cells' names in the parameters."""
        if self.config.solver.method == "explicit":
            return tuple(f"cells_{i}" for i in range(self.config.cell.copies))
        return ("cell",)

    @nn.nowrap
    def _block(self, edit: Edit = no_edit) -> MambaBlock:
        cfg = self.config
        return MambaBlock(cfg.ssm, cfg.n_heads, cfg.dropout, cfg.norm_epsilon,
                          jnp.dtype(cfg.compute_dtype), edit, parent=None)

    def _init_tree(self, key: Array, spec: str) -> dict:
        x_BTD = jnp.zeros((1, 2, self.config.d_model), self.dtype)
        positions_BT = jnp.zeros((1, 2), jnp.int32)
        module, inputs = ((self.cell, (positions_BT,)) if spec == "cell" else
                          (self._block(), (None, positions_BT)))
        params: dict = module.init(key, x_BTD, *inputs)["params"]
        return params

    def _embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x_BTD = embed(self.embedding_VD, tokens_BT).astype(self.dtype)
        if not self.config.embedding_scale:
            return x_BTD
        return x_BTD * jnp.asarray(self.config.d_model**0.5, self.dtype)

    def _run_stack(self, x_BTD: Array, document_ids_BT: Array | None, positions_BT: Array,
                   train: bool, key: Array | None) -> tuple[Array, dict[str, Array]]:
        """The Mamba layers, as pure functions of their parameter trees."""
        cfg = self.config
        if self.is_initializing() or not cfg.n_layers:
            return x_BTD, {}

        def apply_layer(spec: None, params: Any, x: Array, layer: dict,
                        edit: Edit = no_edit) -> tuple[Array, dict[str, Array]]:
            rngs = {} if layer["key"] is None else {"dropout": layer["key"]}
            result: Any = self._block(edit).apply({"params": params}, x, document_ids_BT,
                                                  positions_BT, train=train, rngs=rngs)
            return result

        per_layer = {"key": None if key is None else jax.random.split(key, cfg.n_layers)}
        if self.edit is no_edit:
            return run_layers(apply_layer, [None] * cfg.n_layers, self.layer_params, x_BTD,
                              per_layer, scan=cfg.scan_layers, remat=cfg.remat)
        out: dict[str, Array] = {}  # a callable edit knows layers by name: one by one
        for i, params in enumerate(self.layer_params):
            own = jax.tree.map(lambda array, i=i: array[i], per_layer)
            x_BTD, part = apply_layer(None, params, x_BTD, own,
                                      scoped(self.edit, f"layers.{i}."))
            out.update({f"layers.{i}.{name}": value for name, value in part.items()})
        return x_BTD, out

    def _injection(self, x_BTD: Array, train: bool, key: Array | None) -> Array:
        """u; what dropout removes stays removed for a whole solve."""
        u_BTD = self.norm_injection(x_BTD)
        if train and self.config.dropout and key is not None:
            dropout = Dropout(self.config.dropout, deterministic=False, parent=None)
            kept: Any = dropout.apply({}, u_BTD,
                                      rngs={"dropout": jax.random.fold_in(key, _INJECTION)})
            u_BTD = kept
        return self.edit("injection", u_BTD)

    def _drive(self, params: Any, u_BTD: Array, document_ids_BT: Array | None,
               positions_BT: Array | None) -> Drive:
        positions_BT = token_positions(u_BTD[..., 0], document_ids_BT, positions_BT)
        drive: Drive = call(self.cell, params, "drive", u_BTD, document_ids_BT, positions_BT)
        return drive

    def _equilibrium(self, u_BTD: Array, batch: Batch, positions_BT: Array, state: dict,
                     train: bool, progress: Array | None, key: Array | None,
                     ) -> tuple[Array, dict[str, Array], dict]:
        """z*, intermediates, and the state to carry on with."""
        cfg, cell = self.config, self.cell
        if self.is_initializing():  # the cells' parameters are made in setup
            return u_BTD, {}, {}
        params = self.cell_params[0]
        drive = self._drive(params, u_BTD, batch.document_ids_BT, positions_BT)
        s_BTS = call(cell, params, "first_state", drive)
        out, new_state = {}, {}
        if cfg.solver.method == "explicit":
            for params in self.cell_params:
                drive = self._drive(params, u_BTD, batch.document_ids_BT, positions_BT)
                s_BTS = apply(cell, (params, drive), "sweep", s_BTS, schedule="alternating")
        else:
            if cfg.solver.warm_start == "stream" and "z_last" in state:
                s_BTS = continued(s_BTS, state["z_last"], batch.reset_B, batch.document_ids_BT)
            own = jax.random.fold_in(key, _JITTER) if train and key is not None else None
            solved = solve_at(progress, cell, params, drive, s_BTS, cfg.solver, key=own,
                              remat=cfg.remat == "full", record=not train)
            s_BTS = solved.s_BTS
            out = equilibrium_statistics.of_solver(solved, cell, (params, drive))
            if cfg.solver.warm_start == "stream":
                new_state = {"z_last": jax.lax.stop_gradient(s_BTS[:, -1])}
        out.update({f"energy.{name}": value for name, value in apply(
            cell, (params, drive), "energies", s_BTS).items()})
        z_BTD = self.edit("z_equilibrium", s_BTS[..., :cfg.d_model])
        out["z_equilibrium"] = z_BTD
        if "hopfield" in cfg.cell.parts:
            out["cell.query"] = call(cell, params, "query_of", z_BTD)
        return z_BTD, out, new_state


def _refuse(interventions: Interventions) -> None:
    asked = [name for name, value in vars(interventions).items() if value is not None]
    if asked:
        raise ConfigError(f"an equilibrium model has nothing that {asked[0]} could change",
                          "it has no paths, gates, controller or passes; that is of the hybrid")
