"""What can be said of a pretrained model: what it is, and whether its logits are transformers'."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from hippocampus.backbones.loading import Backbone, load_backbone
from hippocampus.backbones.parameters import count_parameters
from hippocampus.files import expand
from hippocampus.runs.diagnosis import Finding

LARGEST_DIFFERENCE = 1e-3
"""Of logits in float32, as a share of the largest one: well above rounding, well below any
difference between two architectures."""
_TEXT = ("The quick brown fox jumps over the lazy dog. 1, 2, 3 - and then? "
         "Das war's: naïve café, 日本語.")
_MOST_TOKENS = 48


def check_backbone(path: Path) -> list[Finding]:
    """All findings, after the whole model was read; logits are compared in float32.

    Args:
      path: as for `load_backbone`.

    Raises:
      DataError, CheckpointError: it cannot be read.
    """
    backbone = load_backbone(path)
    cfg = backbone.model.config
    kinds = Counter(str(leaf.dtype) for leaf in jax.tree.leaves(backbone.params))
    windows = sorted({spec.window for spec in cfg.layers if spec.window})
    shared = cfg.n_layers - cfg.n_own_layers
    layers = [f"{cfg.n_layers} layers of width {cfg.d_model}",
              f"{cfg.n_heads} heads over {cfg.n_kv_heads} of width {cfg.head_width}",
              *(f"windows of {window}" for window in windows),
              *([f"{shared} layers that share keys"] if shared else ()),
              f"{cfg.vocab_size:,} ids", f"{cfg.max_length:,} positions"]
    rope = cfg.layers[-1].rope
    return [
        Finding("architecture", True, f"{cfg.family}: {', '.join(layers)}"),
        Finding("positions", True, f"{rope.kind}, theta {rope.theta:g}"
                + (f", factor {rope.factor:g}" if rope.factor != 1 else "")),
        Finding("parameters", True, f"{count_parameters(backbone.model):,}"),
        Finding("dtype", True, ", ".join(f"{kind} ({n} tensors)" for kind, n in kinds.items())),
        _tokenizer(backbone), _chat(backbone), _logits(backbone, expand(path))]


def logits_of(backbone: Backbone, ids: Int[np.ndarray, " T"]) -> Float[np.ndarray, "T V"]:
    """Logits of one text, in float32 whatever the parameters are."""
    with jax.default_matmul_precision("highest"):
        logits, _ = jax.jit(backbone.model.apply)({"params": backbone.params}, ids[None])
    return np.asarray(logits[0])


def compare(ours: Float[np.ndarray, "T V"], theirs: Float[np.ndarray, "T V"]) -> Finding:
    """How far two models' logits of one text are apart.

    Args:
      ours, theirs: in float32, of the same ids.
    """
    difference = float(np.abs(ours - theirs).max())
    share = difference / float(np.abs(theirs).max())
    agree = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    return Finding(
        "logits", bool(share <= LARGEST_DIFFERENCE),
        f"{len(ours)} tokens in float32: largest difference from transformers {difference:.2g} "
        f"({share:.1g} of the largest logit), the same most likely id for {agree:.0%}",
        "" if share <= LARGEST_DIFFERENCE else "the model is not read as its makers meant it: "
        "do not use it here, and report its config.json")


def _tokenizer(backbone: Backbone) -> Finding:
    tokenizer = backbone.tokenizer
    if tokenizer is None:
        return Finding("tokenizer", True, "none")
    ids = tokenizer.encode(_TEXT)
    whole = tokenizer.decode(ids[tokenizer.begin_id is not None:]).strip() == _TEXT
    back = "as it was" if whole else "changed, as from a tokenizer that forgets something"
    return Finding("tokenizer", True, f"{tokenizer.vocab_size:,} ids, first token "
                   f"{tokenizer.begin_id}, texts end in {list(tokenizer.end_ids)}; a sentence "
                   f"comes back {back}")


def _chat(backbone: Backbone) -> Finding:
    if backbone.chat is None:
        return Finding("chat template", True, "none")
    text = backbone.chat.render([{"role": "user", "content": "Hi"}])
    return Finding("chat template", True, f"a greeting becomes {text[-160:]!r}")


def _logits(backbone: Backbone, path: Path) -> Finding:
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if not path.is_dir() or missing:
        why = f"{missing[0]} is not installed" if missing else "transformers reads folders"
        return Finding("logits", True, f"not compared: {why}", "pip install 'hippocampus[parity]'"
                       if missing else "")
    if backbone.tokenizer:
        ids = backbone.tokenizer.encode(_TEXT)[:_MOST_TOKENS]
    else:
        ids = np.random.default_rng(0).integers(
            0, backbone.model.config.vocab_size, _MOST_TOKENS).astype(np.int32)
    return compare(logits_of(backbone, ids), _theirs(path, ids))


def _theirs(path: Path, ids: Any) -> Float[np.ndarray, "T V"]:
    """What transformers says; of files that can run code when they are opened it reads none."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype="float32", attn_implementation="eager", local_files_only=True,
        use_safetensors=True, trust_remote_code=False).eval().requires_grad_(False)
    batch = transformers.BatchEncoding({"input_ids": np.asarray(ids, np.int64)[None]},
                                       tensor_type="pt")
    logits = model(**batch, use_cache=False).logits[0]
    return np.asarray(logits.numpy(), np.float32)
