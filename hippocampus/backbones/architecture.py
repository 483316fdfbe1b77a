"""What is fixed in a decoder before its weights are known: `Architecture`, `LayerSpec`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from itertools import groupby

from hippocampus.backbones.rotary import Rope
from hippocampus.errors import DataError

FAMILIES = ("llama", "qwen3", "gemma3", "gemma3n")
"""Of decoders that are known here."""


@dataclass(frozen=True)
class LayerSpec:
    """What differs between the layers of a decoder; equal specs can be compiled once.

    Attributes:
      mlp_width: hidden width F.
      rope: rotary frequencies.
      window: tokens that a token sees, itself included; 0 = all before it.
      source: the layer whose keys and values this one reads; -1 = its own.
      sparsity: share of the hidden units of the MLP that are cut off; 0 = none.
    """

    mlp_width: int
    rope: Rope
    window: int = 0
    source: int = -1
    sparsity: float = 0.0


@dataclass(frozen=True)
class AltUpSpec:
    """What a Gemma-3n has besides.

    Attributes:
      streams: A, copies of the residual stream; the first one is computed, the others predicted.
      correct_scale: scale the first stream before the per-layer input is gated with it.
      laurel_rank: rank of the learned residual beside attention.
      per_layer_width: P, width of the input that every layer gets of its own.
      per_layer_vocabulary: rows of the table of that input; ids beyond it read row 0.
    """

    streams: int
    correct_scale: bool
    laurel_rank: int
    per_layer_width: int
    per_layer_vocabulary: int


@dataclass(frozen=True)
class Architecture:
    """A decoder without its weights.

    Attributes:
      family: one of `FAMILIES`.
      vocab_size: V, token ids.
      d_model: D, width of the residual stream.
      n_heads, n_kv_heads: H query heads over G key/value heads.
      head_width: d of every head; H d need not be D.
      max_length: positions that the model was trained for.
      layers: one spec per layer.
      norm_epsilon: added to the mean square in norms.
      softcap: c of c tanh(logits / c); 0 = none.
      tie_embeddings: one table for input and output.
      query_scale: of attention scores.
      altup: what a Gemma-3n has besides.
    """

    family: str
    vocab_size: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_width: int
    max_length: int
    layers: tuple[LayerSpec, ...]
    norm_epsilon: float
    query_scale: float
    softcap: float = 0.0
    tie_embeddings: bool = True
    altup: AltUpSpec | None = None

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def n_own_layers(self) -> int:
        """Layers with keys and values of their own, which come first."""
        return sum(spec.source < 0 for spec in self.layers)

    @property
    def is_gemma(self) -> bool:
        """Gemmas scale their embeddings, use gelu, and normalise what attention and MLP give."""
        return self.family.startswith("gemma")

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head."""
        return self.family != "llama"

    @property
    def norm_offset(self) -> float:
        """What is added to the stored scales of norms."""
        return 1.0 if self.family == "gemma3" else 0.0

    @property
    def passes(self) -> int:
        """Reasoning passes: one."""
        return 1

    def longest_row(self, context: int) -> int | None:
        """Tokens that a row can have: any number; beyond `max_length` they slide along."""
        return None


def architecture_text(architecture: Architecture) -> str:
    """An architecture as one line of JSON, with runs of equal layers as [how many, one of them]."""
    fields = dataclasses.asdict(architecture)
    fields["layers"] = [[len(list(run)), dataclasses.asdict(spec)]
                        for spec, run in groupby(architecture.layers)]
    return json.dumps(fields, separators=(",", ":"))


def parse_architecture(text: str) -> Architecture:
    """What `architecture_text` wrote.

    Raises:
      DataError: it is nothing of the kind.
    """
    try:
        fields = json.loads(text)
        layers = [LayerSpec(**{**spec, "rope": Rope(**spec["rope"])})
                  for n, spec in fields.pop("layers") for _ in range(n)]
        altup = fields.pop("altup")
        return Architecture(**fields, layers=tuple(layers),
                            altup=None if altup is None else AltUpSpec(**altup))
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DataError(f"{text[:60]!r} describes no decoder", "leave model.backbone.architecture "
                        "to what the decoder's files say") from None
