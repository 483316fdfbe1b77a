"""CHopT: a pretrained decoder with a Hopfield memory after its last block.

    x   = decoder(tokens of a chunk), before its last norm       attention sees the chunk alone
    x'  = x + tanh(a) W_o recall(W_q norm(x); memory)            (layers.memory_bank)
    y   = norm_out(x'),    memory <- write(memory, x)

A row is cut into chunks. The decoder reads them all at once, each by itself; the memory goes from
chunk to chunk, from row to row of a stream, and through a file from one process to the next. What a
token can know of earlier chunks came through the memory. A chunk is read before it is written, so
that no token sees itself or what follows. At first a = 0, and the logits are the decoder's.

Gradients run through the chunks of a row, from a read back into the writes before it; what a row
hands on to the next one is detached by the training step. Of the decoder nothing is trained,
adapters beside its matrices, or all of it (`train_backbone`, hippocampus.models.around_decoder).

Source: segments that hand on a memory, Bulatov et al. 2022 (arXiv:2207.06881), section 3.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hippocampus.backbones.architecture import Architecture
from hippocampus.backbones.decoder import DecoderCache
from hippocampus.config_memory import MemoryConfig
from hippocampus.data.batches import Batch
from hippocampus.data.story_rows import ChunkedBatch
from hippocampus.errors import ConfigError
from hippocampus.layers.edits import Edit, no_edit, scoped
from hippocampus.layers.lora import LoRA
from hippocampus.layers.memory_bank import MODES, MemoryBank
from hippocampus.models.around_decoder import AroundDecoder
from hippocampus.models.interventions import Interventions
from hippocampus.ops.cross_entropy import token_nll
from hippocampus.ops.memory_state import MemoryState, choose_users, empty_state

READ_ONLY = MODES.index("read_only")


@struct.dataclass
class CHopTCache:
    """What a row has read, and the memory that it reads from.

    Attributes:
      decoder: the keys and values of the decoder's layers.
      memory: of the user of each row; decoding reads it and counts the reads, and writes nothing.
    """

    decoder: DecoderCache
    memory: MemoryState

    @property
    def length_B(self) -> Int[Array, " B"]:
        """Tokens that each row has read."""
        return self.decoder.length_B


class CHopT(AroundDecoder, nn.Module):
    """A decoder and the memory after it; see the module's docstring for the maths.

    Parameters lie as `backbone`, the decoder's tree, and `memory`.

    Attributes:
      config: the decoder's architecture.
      memory: settings of the memory.
      chunk: tokens of a chunk; 0 = a row is one.
      compute_dtype, scan_layers, remat, backend: as of `Decoder`.
      train_backbone: "none", "lora" or "full".
      lora: which matrices have adapters, with "lora".
      edit: of the decoder's names and "memory.<name>" of `MemoryBank`.
    """

    config: Architecture
    memory: MemoryConfig
    chunk: int = 0
    compute_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    backend: str = "xla"
    train_backbone: str = "none"
    lora: LoRA = LoRA()
    edit: Edit = no_edit

    flow_width: ClassVar[int] = 0

    def setup(self) -> None:
        """The decoder's parameters, and the memory's."""
        self.backbone = self._decoder(self.edit)
        bank, D = self._bank(), self.config.d_model

        def first(key: Array) -> Any:
            x_BTD = jnp.zeros((1, 2, D), jnp.float32)
            return bank.init(key, x_BTD, surprise_BT=jnp.zeros((1, 2)),
                             embedded_BTD=x_BTD)["params"]

        self.bank_params = self.param("memory_bank", first)

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> tuple[Float[Array, "B T V"], dict]:
        """Logits of the next token, from empty memories; deterministic.

        Args:
          tokens_BT: token ids below `vocab_size`.

        Returns:
          logits_BTV (float32, V = vocab_size), and the named intermediates, which cover whole
          chunks.
        """
        T = tokens_BT.shape[1]
        padding = -T % min(self.chunk or T, T)
        tokens = jnp.pad(tokens_BT, ((0, 0), (0, padding)))
        ids = jnp.pad(jnp.ones_like(tokens_BT), ((0, 0), (0, padding))) if padding else None
        batch = Batch(tokens, tokens, jnp.ones(tokens.shape, jnp.float32), ids)
        hidden_BTD, out, _ = self.forward(batch)
        head = self.head(self.variables["params"])
        return head.logits(hidden_BTD)[:, :T, :self.config.vocab_size], out

    def forward(
        self, batch: Batch, state: dict | None = None, *,
        interventions: Int[Array, "*B"] | Interventions | None = None, train: bool = False,
        progress: Any = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array], dict]:
        """Reads the chunks of every row in order, and writes each into the row's memory.

        Args:
          batch: tokens; `document_ids_BT` is 0 for padding, which neither reads nor is written; a
            row starts with a new memory where `reset_B` says so, and everywhere without it. Rows
            with `question_B` (hippocampus.data.story_rows) read and do not write. `reset_Bn` and
            `question_Bn` say the same of every chunk of a row, and then chunks without reset go on
            with the memory before them.
          state: {"memory": MemoryState} of the users of the rows; None or {} = new ones.
          interventions: what calls do to the memory, as places in `memory_bank.MODES`: one for all
            rows or one a row; None, or neutral `Interventions`, = what the batch says.
          train: dropout of adapters on.
          progress: of no effect.

        Returns:
          hidden_BTD (normalised, compute dtype); `out`: the decoder's, and "memory.<name>" of
          `MemoryBank.read`, both with whole rows; and the memories after the last chunk.

        Raises:
          ValueError: rows that are no whole number of chunks, or memories of other users.
        """
        B, T = batch.tokens_BT.shape
        C = min(self.chunk or T, T)
        if T % C:
            raise ValueError(f"a row has {T} tokens, which is no whole number of chunks of {C}")
        memory = self._memory_before(batch, state, B)
        chunks = jax.tree.map(lambda a: a.reshape(-1, C), (
            batch.tokens_BT, batch.targets_BT, batch.loss_weight_BT, batch.document_ids_BT,
            batch.positions_BT))
        _, out, _ = self.backbone.forward(Batch(*chunks), train=train)

        def by_chunk(array_bC: Array) -> Array:
            return jnp.moveaxis(array_bC.reshape(B, T // C, *array_bC.shape[1:]), 1, 0)

        def whole(array: Array) -> Array:  # n B C … -> B T …
            return jnp.moveaxis(array, 0, 1).reshape(B, T, *array.shape[3:])

        ids = batch.document_ids_BT
        mask_BT = jnp.ones((B, T), bool) if ids is None else ids > 0
        inputs = {"x": by_chunk(out["final"]), "tokens": by_chunk(chunks[0]),
                  "mask": by_chunk(mask_BT.reshape(-1, C))}
        if self.memory.select == "surprise":
            inputs["surprise"] = by_chunk(self._surprise(out["final"], chunks[0]))
        if self.memory.values == "next_token":
            inputs["embedded"] = by_chunk(out["embedding"])
        inputs |= self._by_chunk(batch, interventions, B, T // C)
        bank, variables = self._bank(), {"params": self.bank_params}

        def step(memory: MemoryState, chunk: dict[str, Array]) -> tuple[MemoryState, Any]:
            if "reset" in chunk:
                memory = cast(Any, bank.apply(variables, memory, chunk["reset"], method="reset"))
            found: Any = bank.apply(
                variables, chunk["x"], memory, chunk["mask"], mode=chunk["mode"],
                surprise_BT=chunk.get("surprise"), tokens_BT=chunk["tokens"],
                embedded_BTD=chunk.get("embedded"))
            x_BCD, parts, memory = found
            return memory, (x_BCD, parts)

        memory, (x_nBCD, parts) = jax.lax.scan(step, memory, inputs)
        out = {name: value.reshape(B, T, *value.shape[2:]) if value.shape[:2] == (B * T // C, C)
               else value for name, value in out.items()}
        out.pop("segments.hidden")
        for name, value in parts.items():
            if name == "energy":
                value = jnp.moveaxis(value, 1, 0)  # steps first
                out["memory.energy"] = jax.vmap(whole)(value)
            else:
                out[f"memory.{name}"] = value[0] if name in ("gate", "beta") else whole(value)
        out["memory.final"] = final_BTD = self.edit("memory.final", whole(x_nBCD))
        hidden_BTD = self.backbone.finish(final_BTD)
        out["segments.hidden"] = hidden_BTD[None]
        return hidden_BTD, out, {"memory": memory}

    @nn.nowrap
    def new_memory(self, params: Any, users: int) -> MemoryState:
        """The memories of new users, as `forward` gives them to rows that start afresh.

        Args:
          params: of the model.
          users: how many.
        """
        found: Any = self._bank().apply({"params": params["memory_bank"]}, users,
                                        method="init_state")
        memory: MemoryState = found
        return memory

    @nn.nowrap
    def init_cache(self, batch: int, max_length: int, passes: int | None = None) -> CHopTCache:
        """The cache before the first token, with memories in which nothing is; needs no parameters.

        Args:
          batch: rows B.
          max_length: as for `Decoder`.
          passes: always one.
        """
        return CHopTCache(self._decoder().init_cache(batch, max_length), self._empty(batch))

    def extend(
        self, tokens_Bn: Int[Array, "B n"], cache: CHopTCache,
        valid_Bn: Bool[Array, "B n"] | None = None, *, skip: bool = False,
    ) -> tuple[Float[Array, "B n D"], CHopTCache]:
        """Reads further tokens of every row, as one chunk that is not written.

        Args:
          tokens_Bn, valid_Bn, skip: as for `Decoder`.
          cache: from `init_cache` or the last call; `cache.replace(memory=…)` gives it a memory.

        Returns:
          hidden_BnD (normalised, compute dtype), and the new cache.
        """
        x_BnD, decoder = self.backbone.extend_stream(tokens_Bn, cache.decoder, valid_Bn)
        found: Any = self._bank().apply({"params": self.bank_params}, x_BnD, cache.memory,
                                        valid_Bn, mode="read_only")
        x_BnD, _, memory = found
        return self.backbone.finish(x_BnD), CHopTCache(decoder, memory)

    @nn.nowrap
    def reset(self, cache: CHopTCache, rows_B: Bool[Array, " B"]) -> CHopTCache:
        """The cache with these rows as `init_cache` gives them."""
        return CHopTCache(self._decoder().reset(cache.decoder, rows_B),
                          choose_users(rows_B, self._empty(len(rows_B)), cache.memory))

    @nn.nowrap
    def statistics(self, out: dict[str, Array],
                   weight_BT: Float[Array, "B T"]) -> dict[str, Float[Array, ""]]:
        """What to log of a forward pass, as sums over tokens: how far the memory's gate is open."""
        return {"memory/gate": out["memory.gate"] * weight_BT.sum()}

    @nn.nowrap
    def init_state(self, batch: Batch) -> dict:
        """What `forward` carries from batch to batch: a memory for each row."""
        return {"memory": self._empty(len(batch.tokens_BT))}

    @nn.nowrap
    def _bank(self) -> MemoryBank:
        return MemoryBank(self.memory, self.config.d_model, self.config.norm_epsilon,
                          jnp.dtype(self.compute_dtype), scoped(self.edit, "memory."), parent=None)

    @nn.nowrap
    def _empty(self, batch: int) -> MemoryState:
        cfg = self.memory
        width = cfg.width or self.config.d_model
        return empty_state(batch, cfg.n_slots, cfg.n_heads, width // cfg.n_heads,
                           cfg.source_tokens)

    def _memory_before(self, batch: Batch, state: dict | None, B: int) -> MemoryState:
        """The rows' memories, new where a row starts afresh."""
        bank, variables = self._bank(), {"params": self.bank_params}
        by_chunk = isinstance(batch, ChunkedBatch)
        if not state or (batch.reset_B is None and not by_chunk):
            return cast(MemoryState, bank.apply(variables, B, method="init_state"))
        before: MemoryState = state["memory"]
        if by_chunk:
            return before
        return cast(MemoryState, bank.apply(variables, before, batch.reset_B, method="reset"))

    @nn.nowrap
    def _by_chunk(self, batch: Batch, asked: Array | Interventions | None, B: int,
                  n: int) -> dict[str, Array]:
        """What every chunk does to the memory, and where it is new: "mode" and "reset", n,B."""
        resets: dict[str, Array] = {}
        question_Bn = jnp.zeros((B, 1), bool)
        if isinstance(batch, ChunkedBatch):
            resets = {"reset": jnp.asarray(batch.reset_Bn).T}
            question_Bn = jnp.asarray(batch.question_Bn)
        elif (question_B := getattr(batch, "question_B", None)) is not None:
            question_Bn = question_B[:, None]
        mode_Bn = jnp.where(question_Bn, READ_ONLY, 0)
        if isinstance(asked, Interventions):
            if any(value is not None for value in vars(asked).values()):
                raise ConfigError("interventions are of the blocks of a hybrid model",
                                  "of a CHopT they are places in memory_bank.MODES")
            asked = None
        if asked is not None:
            mode_Bn = jnp.broadcast_to(jnp.asarray(asked), (B,))[:, None]
        return {"mode": jnp.broadcast_to(mode_Bn, (B, n)).T, **resets}

    def _surprise(self, x_bCD: Array, tokens_bC: Array) -> Array:
        """-log p of every token by the decoder alone; 0 for the first of a chunk."""
        head = self.head(self.variables["params"])
        nll_bC = token_nll(self.backbone.finish(x_bCD)[:, :-1], head, tokens_bC[:, 1:])
        return jax.lax.stop_gradient(jnp.pad(nll_bC, ((0, 0), (1, 0))))
