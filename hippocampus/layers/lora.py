"""Low-rank adapters of linear layers: trained in place of the matrices, which stay as they are.

    y = x W + s dropout(x) A B,      s = alpha / r, or alpha / sqrt(r)

with A (in, r) drawn and B (r, out) zero, so that a fresh adapter changes no output. Adapters are a
tree of their own, with the paths of the layers that they belong to:

    {"layers_0": {"attention": {"query": {"lora_a": A, "lora_b": B}}}, …}

That tree is what is trained and what files hold. `with_adapters` lays it beside the matrices for
layers of the class `Linear`, which add the low-rank term; `merge` adds it to the matrices of any
model.

Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1; Kalajdzievski 2023 (arXiv:2312.03732) for
alpha / sqrt(r).
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from hippocampus.errors import ConfigError
from hippocampus.layers.dropout import drop

A, B = "lora_a", "lora_b"
"""Of an adapter: (in, r) and (r, out)."""
DROPOUT = "lora_dropout"
"""Beside them in the tree of `with_adapters`: the chance of dropout, where it is not 0."""


@dataclass(frozen=True)
class LoRA:
    """Which linear layers have an adapter, and of what kind.

    Attributes:
      rank: r.
      alpha: of the scale s.
      dropout: chance that an input of the low-rank term is zeroed while training.
      rslora: s = alpha / sqrt(r), which keeps the term's size at any rank.
      targets: globs over the names of linear layers, such as "layers_*.attention.query"; a star
        stands for dots too.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    targets: tuple[str, ...] = ("layers_*.attention.*", "layers_*.mlp.*")

    def __post_init__(self) -> None:
        """Refuses what is out of range."""
        for name, good, wanted in (
                ("rank", self.rank > 0, "at least 1"),
                ("alpha", 0 < self.alpha < math.inf, "above 0"),
                ("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")):
            if not good:
                raise ConfigError(f"lora.{name} is {getattr(self, name)}", f"it must be {wanted}")

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Linear(nn.Dense):
    """A dense layer, with the low-rank term of an adapter where its parameters have one.

    Without an adapter it is `nn.Dense` and adds no operation.
    """

    @nn.compact
    def __call__(self, inputs: Float[Array, "... m"], train: bool = True) -> Float[Array, "... n"]:
        """Returns x W, or x W + s dropout(x) A B.

        Args:
          inputs: x.
          train: dropout on; also needs the random stream "dropout".
        """
        y: Array = super().__call__(inputs)
        if not self.has_variable("params", A):
            return y
        a: Array = self.get_variable("params", A).astype(y.dtype)
        b: Array = self.get_variable("params", B).astype(y.dtype)
        x = inputs.astype(y.dtype)
        if train and self.has_variable("params", DROPOUT) and self.has_rng("dropout"):
            x = drop(x, self.get_variable("params", DROPOUT), self.make_rng("dropout"))
        return y + (x @ a) @ b


def linear_layers(params: Any) -> dict[str, tuple[int, int]]:
    """The (in, out) of every linear layer of a parameter tree, by its name with dots.

    Args:
      params: arrays, or their shapes.
    """
    return {".".join(path[:-1]): leaf.shape for path, leaf in flatten_dict(params).items()
            if path[-1] == "kernel" and len(leaf.shape) == 2}


def matching(names: Iterable[str], targets: Iterable[str]) -> list[str]:
    """The linear layers that the globs name, in the order of `names`.

    Args:
      names: of linear layers.
      targets: globs.

    Raises:
      ConfigError: a glob that matches nothing.
    """
    names = list(names)
    for target in targets:
        if not any(fnmatchcase(name, target) for name in names):
            kinds = dict.fromkeys(re.sub(r"_\d+", "_*", name) for name in names)
            raise ConfigError(f"lora.targets: no linear layer is named {target!r}",
                              f"there are {', '.join(kinds)}")
    return [name for name in names if any(fnmatchcase(name, target) for target in targets)]


def init_adapters(key: Array, params: Any, lora: LoRA) -> Any:
    """Fresh adapters in float32: A uniform within 1 / sqrt(in), B zero.

    An adapter does not depend on which others there are.

    Args:
      key: random key.
      params: of the model, or their shapes.
      lora: which layers get one.

    Raises:
      ConfigError: a glob of `lora.targets` that matches no linear layer.

    Source: `kaiming_uniform_(a=sqrt(5))` of A, as PEFT draws it.
    """
    shapes = linear_layers(params)
    tree: dict[tuple[str, ...], Array] = {}
    for name in matching(shapes, lora.targets):
        (m, n), path = shapes[name], tuple(name.split("."))
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        tree[(*path, A)] = jax.random.uniform(own, (m, lora.rank), minval=-1, maxval=1) * m**-0.5
        tree[(*path, B)] = jnp.zeros((lora.rank, n))
    return unflatten_dict(tree)


def with_adapters(params: Any, adapters: Any, lora: LoRA) -> Any:
    """The parameters that a model of `Linear` layers runs with: adapters beside their matrices.

    s is multiplied into B here, so that a model needs to know nothing of it. Part of the function
    that is differentiated by `adapters`; nothing is copied but them.

    Args:
      params: of the model; any tree that it takes.
      adapters: from `init_adapters` or a file.
      lora: their kind.

    Raises:
      ConfigError: an adapter of a layer that is not there, or of another size.
    """
    def beside(kernel: Array, a: Array, b: Array) -> dict[str, Array]:
        drops = {DROPOUT: jnp.asarray(lora.dropout, jnp.float32)} if lora.dropout else {}
        return {"kernel": kernel, A: a, B: lora.scale * b, **drops}

    return _at_kernels(params, adapters, beside)


def merge(params: Any, adapters: Any, lora: LoRA) -> Any:
    """The parameters with W + s A B in place of W: the same model, for files and any module.

    Args:
      params: of any model with `kernel` matrices.
      adapters: from `init_adapters` or a file.
      lora: their kind.

    Raises:
      ConfigError: an adapter of a layer that is not there, or of another size.
    """
    def added(kernel: Array, a: Array, b: Array) -> dict[str, Array]:
        return {"kernel": _added(kernel, a, b, lora.scale)}

    return _at_kernels(params, adapters, added)


def absorb(params: Any) -> Any:
    """A tree of `with_adapters` with W + s A B in place of W: the same model, for any module.

    Args:
      params: with or without adapters beside matrices.
    """
    flat = flatten_dict(params, keep_empty_nodes=True)
    plain = {path: leaf for path, leaf in flat.items() if path[-1] not in (A, B, DROPOUT)}
    for path, a in ((path, leaf) for path, leaf in flat.items() if path[-1] == A):
        kernel, b = (*path[:-1], "kernel"), flat[(*path[:-1], B)]
        plain[kernel] = _added(plain[kernel], a, b)
    return unflatten_dict(plain)


def has_dropout(params: Any) -> bool:
    """Whether a tree of `with_adapters` asks for dropout."""
    return any(path[-1] == DROPOUT for path in flatten_dict(params))


def adapted_layers(adapters: Any) -> dict[str, tuple[Array, Array]]:
    """(A, B) of every adapter, by the name of its layer."""
    flat = flatten_dict(adapters)
    return {".".join(path[:-1]): (leaf, flat[(*path[:-1], B)])
            for path, leaf in flat.items() if path[-1] == A}


def _added(kernel: Array, a: Array, b: Array, scale: float = 1.0) -> Array:
    wide = jnp.promote_types(jnp.float32, kernel.dtype)
    change = jnp.matmul(a.astype(wide), b.astype(wide), precision="highest")
    return (kernel.astype(wide) + scale * change).astype(kernel.dtype)


def _at_kernels(params: Any, adapters: Any,
                change: Callable[[Array, Array, Array], dict[str, Array]]) -> Any:
    """The tree with `change(W, A, B)` in place of the kernel of every layer with an adapter."""
    tree: dict[tuple[str, ...], Any] = dict(flatten_dict(params, keep_empty_nodes=True))
    for name, (a, b) in adapted_layers(adapters).items():
        path = tuple(name.split("."))
        kernel = tree.get((*path, "kernel"))
        if kernel is None:
            raise ConfigError(f"there is no linear layer {name} for its adapter",
                              "model and adapters must belong together")
        if a.shape[1:] != b.shape[:1] or (a.shape[0], b.shape[1]) != kernel.shape:
            raise ConfigError(f"the adapter of {name} has {list(a.shape)} and {list(b.shape)}, its "
                              f"matrix {list(kernel.shape)}",
                              "model and adapters must belong together")
        tree |= {(*path, leaf): value for leaf, value in change(kernel, a, b).items()}
    return unflatten_dict(tree)
