"""A learned head that says which tool a prompt needs, before a word is written: `ToolHead`.

    p(tool | prompt) = softmax((W z + b) / tau)        z: the last hidden state, standardised

W and b by L2-regularised likelihood, tau on prompts that they have not seen; one class is "no
tool". The model itself is not changed. A head is saved as one safetensors file, which names the
model that it was learned from: to any other its weights are noise.

Source: Guo et al. 2017 (arXiv:1706.04599), temperature scaling and the expected calibration error.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, softmax

from hippocampus.data.batches import Batch
from hippocampus.errors import CheckpointError, ConfigError
from hippocampus.exports.storage import TensorSpec
from hippocampus.exports.weights_file import open_tensors, read_header
from hippocampus.files import expand, write_atomically
from hippocampus.generation.parameter_digest import parameter_digest

FORMAT = "hippocampus.tool_head/1"
NO_TOOL = ""
_ARRAYS = ("weight_KD", "bias_K", "mean_D", "scale_D")
_LEARN_AGAIN = "learn it again with ToolHead.fit"
_BINS = 10
_SHORTEST = 32


@dataclass(frozen=True)
class ToolHead:
    """Probabilities of tools from a model's last hidden state.

    Attributes:
      tools: the classes, `NO_TOOL` among them.
      weight_KD, bias_K: of standardised states.
      mean_D, scale_D: that standardise them.
      temperature: above 1 makes probabilities more modest.
      threshold: least probability at which `choose` names a tool.
      model: digest of the parameters that the states are of.
    """

    tools: tuple[str, ...]
    weight_KD: Float[np.ndarray, "K D"]
    bias_K: Float[np.ndarray, " K"]
    mean_D: Float[np.ndarray, " D"]
    scale_D: Float[np.ndarray, " D"]
    temperature: float = 1.0
    threshold: float = 0.5
    model: str = ""

    @classmethod
    def fit(cls, lm: Any, prompts: Sequence[str], tools: Sequence[str], *, l2: float = 1e-2,
            held_out: float = 0.25, threshold: float = 0.5, seed: int = 0) -> ToolHead:
        """Learns from prompts and the tool that each needs.

        Args:
          lm: a `LanguageModel`.
          prompts: at least four.
          tools: of each; `NO_TOOL` where none helps.
          l2: weight of the squared weights.
          held_out: share of the prompts that the temperature is fitted on.
          threshold: see the class.
          seed: of which are held out.

        Raises:
          ConfigError: too few prompts or tools, or another number of one of them.
        """
        names = tuple(sorted({NO_TOOL, *tools}))
        if len(prompts) != len(tools) or len(prompts) < 4:
            raise ConfigError(f"{len(prompts)} prompts and {len(tools)} tools",
                              "give one tool for each of at least four prompts")
        if not 0 < held_out < 1 or not 0 <= threshold <= 1 or not l2 >= 0:
            raise ConfigError("held_out, threshold or l2 is out of range", "held_out is between 0 "
                              "and 1, threshold too, l2 at least 0")
        states = last_states(lm, prompts)
        labels = np.array([names.index(tool) for tool in tools])
        order = np.random.default_rng(seed).permutation(len(prompts))
        cut = max(1, min(len(prompts) - 2, round(held_out * len(prompts))))
        calibrating, training = order[:cut], order[cut:]
        mean, scale = states[training].mean(0), states[training].std(0) + 1e-6
        weight, bias = _regression((states[training] - mean) / scale, labels[training],
                                   len(names), l2)
        scores = (states[calibrating] - mean) / scale @ weight.T + bias
        best = minimize_scalar(lambda log_t: _nll(scores / np.exp(log_t), labels[calibrating]),
                               bounds=(-3, 3), method="bounded")
        return cls(names, weight, bias, mean, scale, float(np.exp(best.x)), threshold,
                   parameter_digest(lm.params))

    def save(self, path: str | Path) -> None:
        """Writes the head as one file; a file that is there is replaced, or stays as it is.

        Raises:
          CheckpointError: it cannot be written.
        """
        from safetensors.numpy import save

        path = expand(path)
        record = {"format": FORMAT, "model": self.model, "tools": self.tools,
                  "temperature": self.temperature, "threshold": self.threshold}
        arrays = {name: np.ascontiguousarray(getattr(self, name), np.float64) for name in _ARRAYS}
        try:
            write_atomically(path, save(arrays, metadata={"tool_head": json.dumps(record)}))
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror}",
                                  "make room, or save elsewhere") from None

    @classmethod
    def load(cls, path: str | Path, lm: Any) -> ToolHead:
        """Reads a head of this model.

        Args:
          path: a file that `save` wrote.
          lm: the `LanguageModel` that it was learned from.

        Raises:
          CheckpointError: missing, damaged, no head, or learned from another model.
        """
        path = expand(path)
        if not path.is_file():
            raise CheckpointError(f"there is no tool head at {path}", "check the path")
        header = read_header(path)
        try:
            record = json.loads(header.metadata["tool_head"])
            if record["format"] != FORMAT:
                raise ValueError
            tools = tuple(map(str, record["tools"]))
            temperature, threshold = float(record["temperature"]), float(record["threshold"])
            model = str(record["model"])
        except (KeyError, TypeError, ValueError, RecursionError):
            raise CheckpointError(f"{path} is no tool head", _LEARN_AGAIN) from None
        if model != parameter_digest(lm.params):
            raise CheckpointError(f"{path} was learned from another model", _LEARN_AGAIN)
        K, D = len(tools), math.prod(header.tensors.get("mean_D", TensorSpec("", (0,))).shape)
        sizes = dict(zip(_ARRAYS, ((K, D), (K,), (D,), (D,)), strict=True))
        if header.tensors != {name: TensorSpec("float64", size) for name, size in sizes.items()}:
            raise CheckpointError(f"{path} is damaged: its arrays are not those of {K} tools",
                                  _LEARN_AGAIN)
        with open_tensors(path) as read:
            arrays: dict[str, Any] = {name: np.array(read(name)) for name in _ARRAYS}
        if not all(np.isfinite(one).all() for one in (*arrays.values(), temperature, threshold)):
            raise CheckpointError(f"{path} is damaged: it has numbers that are not finite",
                                  _LEARN_AGAIN)
        return cls(tools, **arrays, temperature=temperature, threshold=threshold, model=model)

    def probabilities(self, lm: Any, prompts: Sequence[str]) -> Float[np.ndarray, "N K"]:
        """Of every class, for each prompt."""
        z = (last_states(lm, prompts) - self.mean_D) / self.scale_D
        found: np.ndarray = softmax((z @ self.weight_KD.T + self.bias_K) / self.temperature, axis=1)
        return found

    def choose(self, lm: Any, prompts: Sequence[str]) -> list[str]:
        """The likeliest tool of each prompt; `NO_TOOL` where none reaches the threshold."""
        p_NK = self.probabilities(lm, prompts)
        return [self.tools[k] if p >= self.threshold else NO_TOOL
                for k, p in zip(p_NK.argmax(1), p_NK.max(1), strict=True)]


def calibration_error(p_NK: Float[np.ndarray, "N K"], labels_N: Int[np.ndarray, " N"]) -> float:
    """Expected calibration error: mean gap of confidence and accuracy over ten bins.

    Args:
      p_NK: probabilities.
      labels_N: the right classes.
    """
    confidence, right = p_NK.max(1), p_NK.argmax(1) == labels_N
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    return float(sum(abs(confidence[bins == b].mean() - right[bins == b].mean())
                     * (bins == b).mean() for b in np.unique(bins)))


def last_states(lm: Any, prompts: Sequence[str]) -> Float[np.ndarray, "N D"]:
    """The hidden state of each prompt's last token, float64."""
    found = []
    for prompt in prompts:
        ids = lm.tokenizer.encode(prompt)[-lm.context:]
        if not len(ids):
            raise ConfigError("a prompt is empty", "give some text")
        size = min(lm.context, max(_SHORTEST, 1 << (len(ids) - 1).bit_length()))
        tokens = np.zeros((1, size), np.int32)
        tokens[0, :len(ids)] = ids
        found.append(np.asarray(_state(lm.model, lm.params, tokens, np.int32(len(ids))), float))
    return np.stack(found)


@functools.partial(jax.jit, static_argnums=0)
def _state(model: Any, params: Any, tokens_1T: Any, n: Any) -> Any:
    places = jnp.arange(tokens_1T.shape[1])[None]
    filled = (places < n).astype(jnp.int32)
    batch = Batch(tokens_1T, tokens_1T, filled.astype(jnp.float32), filled, places * filled,
                  jnp.zeros(1, bool))
    hidden_1TD, _, _ = model.apply({"params": params}, batch, method="forward")
    return hidden_1TD[0, n - 1].astype(jnp.float32)


def _regression(z_ND: np.ndarray, labels_N: np.ndarray, K: int,
                l2: float) -> tuple[np.ndarray, np.ndarray]:
    N, D = z_ND.shape
    wanted_NK = np.eye(K)[labels_N]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = flat[:K * D].reshape(K, D), flat[K * D:]
        scores = z_ND @ weight.T + bias
        gap_NK = (softmax(scores, axis=1) - wanted_NK) / N
        gradient = np.concatenate(((gap_NK.T @ z_ND + 2 * l2 * weight).ravel(), gap_NK.sum(0)))
        return _nll(scores, labels_N) + l2 * float((weight**2).sum()), gradient

    flat = minimize(loss, np.zeros(K * D + K), jac=True, method="L-BFGS-B").x
    return flat[:K * D].reshape(K, D), flat[K * D:]


def _nll(scores_NK: np.ndarray, labels_N: np.ndarray) -> float:
    return -float(log_softmax(scores_NK, axis=1)[np.arange(len(labels_N)), labels_N].mean())
