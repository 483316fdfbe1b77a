"""What a model looks up in its context, with all of its paths and without each of them.

On the run of a synthetic task: the share of right answers for every kind of held-out examples, and
for one of twice the length. On a text: the loss where an n-gram occurred before in the window
without being frequent in the training text (associative recall: "AR hits"), and elsewhere.

Source: Arora et al. 2023 (arXiv:2312.04927), section 3, for the split.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from hippocampus.config import PATHS, DataConfig
from hippocampus.config_recall import Kind, fits, held_out_kinds, task_of
from hippocampus.data.batches import Batch
from hippocampus.data.shards import token_split
from hippocampus.errors import DataError
from hippocampus.evaluation.metrics import perplexity
from hippocampus.evaluation.ngrams import MAX_COUNTED
from hippocampus.evaluation.recall_text import recall_text
from hippocampus.evaluation.result_table import Column, ResultTable
from hippocampus.evaluation.stand_alone import corpus_of
from hippocampus.models.interventions import NEUTRAL, Interventions
from hippocampus.ops.cross_entropy import token_hits, token_nll
from hippocampus.probing.measured import Measured
from hippocampus.probing.plots import INK, PATH_COLORS, themed_svg
from hippocampus.probing.probe import Probe
from hippocampus.probing.repeats import FREQUENT, count_grams, gram_keys, repeated
from hippocampus.probing.results import Plot, SuiteResult
from hippocampus.probing.suites import SkipSuite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Recall: what is looked up in the context"

_LONGEST = 4096
"""Tokens of the longest examples beyond the held-out kinds."""

_NOISES = (0.0, 0.5, 1.0, 2.0)
"""Pairs of filler per key that the noisy task is measured at."""

_ORDERS = {"bytes": (2, 6), "characters": (2, 6)}
"""Lengths of n-grams by kind of tokenizer; pairs for others. Six letters are about a word."""

_NAMES = {"ssm": "ssm", "hopfield": "hop", "attention": "attn"}


class Variant(NamedTuple):
    """A model with all of its paths, or without one.

    Attributes:
      name: in tables.
      path: that is missing; "" for none.
    """

    name: str
    path: str


Row = dict[str, Any]


def run(probe: Probe) -> SuiteResult:
    """Accuracies of a task, or the split of a text's loss.

    Raises:
      SkipSuite: a text whose training text is not at hand.
    """
    return _of_task(probe) if task_of(probe.config.data) else _of_text(probe)


def variants(paths: Sequence[str]) -> tuple[Variant, ...]:
    """All paths, and without each of several."""
    removable = paths if len(paths) > 1 else ()
    return (Variant("all", ""), *(Variant(f"no {_NAMES[path]}", path) for path in removable))


def path_masks(chosen: Sequence[Variant], n_layers: int) -> Float[np.ndarray, "M L P"]:
    """What each variant keeps of every layer that has paths."""
    kept = [[path != variant.path for path in PATHS] for variant in chosen]
    return np.repeat(np.array(kept, np.float32)[:, None], n_layers, axis=1)


def _masked(mask_LP: Array) -> Interventions:
    return Interventions(path_mask_LP=mask_LP) if mask_LP.size else NEUTRAL


# ---------------------------------------------------------------- a synthetic task

def _of_task(probe: Probe) -> SuiteResult:
    data, task = probe.config.data, task_of(probe.config.data)
    rows = [row for kind in _kinds(probe) for row in _kind_rows(probe, data, kind, kind.name)]
    tables = [_task_table(probe, "kinds", "Right answers by kind of examples", rows)]
    if task == "noisy":
        kind = max(held_out_kinds(data.recall), key=lambda kind: kind.length / kind.pairs)
        noisy: list[Row] = []
        for noise in _NOISES:
            recall = dataclasses.replace(data.recall, noise=noise)
            if fits(task, recall, kind):
                noisy += _kind_rows(probe, dataclasses.replace(data, recall=recall), kind,
                                    f"{kind.name}, noise {noise:g}")
        tables.append(_task_table(probe, "noise", "Right answers by pairs of filler per key",
                                  noisy))
    return SuiteResult("recall", TITLE, tuple(tables), (_task_plot(rows, data.context),))


def _kinds(probe: Probe) -> list[Kind]:
    """The held-out kinds, and one of twice the length, as far as the model can read them."""
    config = probe.config
    recall, task = config.data.recall, task_of(config.data)
    kinds = list(held_out_kinds(recall))
    longest = max(kinds)
    double = Kind(2 * longest.length, longest.pairs * (1 if task == "induction" else 2))
    if double.length <= _LONGEST and fits(task, recall, double):
        kinds.append(double)
    most = config.model.longest_row(config.data.context)
    return [kind for kind in kinds if most is None or kind.length <= most]


def _kind_rows(probe: Probe, data: DataConfig, kind: Kind, name: str) -> list[Row]:
    """A row for each variant."""
    recall = dataclasses.replace(data.recall, test_lengths=(kind.length,), test_pairs=(kind.pairs,))
    text = recall_text(dataclasses.replace(data, recall=recall), "test", probe.text.tokenizer)
    context = max(kind.length, data.context)
    batch_size = max(1, probe.config.eval.batch_size * data.context // context)
    chosen = variants(probe.paths)
    masks_MLP = path_masks(chosen, len(probe.specs))
    sums = jax.device_get([_answers(probe.model, probe.params, jax.device_put(batch), masks_MLP)
                           for batch in text.windows(context, 0, batch_size)])
    hits_M, nll_M = (np.stack([part[key] for part in sums]).astype(np.float64).sum(0)
                     / text.predictions for key in ("hits", "nll"))
    return [{"name": name, "category": "recall", "path": variant.name, "length": kind.length,
             "pairs": kind.pairs, "accuracy": float(hits_M[i]), "loss": float(nll_M[i]),
             "tokens": text.predictions} for i, variant in enumerate(chosen)]


@functools.partial(jax.jit, static_argnums=0)
def _answers(model: Any, params: Any, batch: Batch,
             masks_MLP: Float[Array, "M L P"]) -> dict[str, Float[Array, " M"]]:
    """Right answers and summed loss of a batch under every mask."""
    def sums(mask_LP: Array) -> dict[str, Array]:
        hidden_BTD, _, _ = model.apply({"params": params}, batch, method="forward",
                                       interventions=_masked(mask_LP))
        head, weight_BT = model.head(params), batch.loss_weight_BT
        return {"hits": (token_hits(hidden_BTD, head, batch.targets_BT) * weight_BT).sum(),
                "nll": (token_nll(hidden_BTD, head, batch.targets_BT) * weight_BT).sum()}

    return jax.lax.map(sums, masks_MLP)


def _task_table(probe: Probe, name: str, title: str, rows: Sequence[Row]) -> ResultTable:
    context = probe.config.data.context
    protocol = dataclasses.replace(
        probe.protocol, split="test", context=context, stride=context,
        tokens=sum(row["tokens"] for row in rows if row["path"] == "all"))
    columns = (Column("name", "tokens x pairs"), Column("category", "category"),
               Column("path", "paths"), Column("accuracy", "right"),
               Column("loss", "loss", "nats/token"), Column("tokens", "answers"))
    return ResultTable(name, title, columns, tuple(rows), (protocol,), (
        "right: the most likely id is the answer", f"trained on rows of {context} tokens; longer "
        "examples stand in rows of their own length"))


def _task_plot(rows: Sequence[Row], context: int) -> Plot:
    names = list(dict.fromkeys(row["name"] for row in rows))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name in dict.fromkeys(row["path"] for row in rows):
            own = [row for row in rows if row["path"] == name]
            whole: dict[str, Any] = {"linestyle": "--", "markersize": 9,
                                     "markerfacecolor": "none"} if name == "all" else {}
            axes.plot(range(len(own)), [row["accuracy"] for row in own], label=name,
                      color=_color(name), clip_on=False,
                      **{"marker": "o", "markersize": 4, **whole})
        axes.set_xticks(range(len(names)), names)
        axes.set(ylim=(0, 1), xlabel="tokens x pairs", ylabel="share of right answers")
        figure.legend(loc="outside upper center", ncols=4)

    return Plot("accuracy", "Right answers by kind of examples",
                "Share of right answers, from short examples with few pairs to long ones with "
                f"many. Rows of {context} tokens were trained on.", themed_svg(draw))


def _color(variant: str) -> str:
    """Of the path that is missing; of the page's text for the whole model."""
    return {f"no {short}": PATH_COLORS[path] for path, short in _NAMES.items()}.get(variant, INK)


# ---------------------------------------------------------------- a text

def _of_text(probe: Probe) -> SuiteResult:
    chosen = variants(probe.paths)
    masks_MLP = path_masks(chosen, len(probe.specs))
    orders = [n for n in _ORDERS.get(probe.text.tokenizer.kind, (2,))
              if probe.config.model.vocab_size**n < 2**64]
    if not orders:
        raise SkipSuite("the vocabulary is too large to number its pairs")

    def losses(model: Any, params: Any, batch: Batch) -> Float[Array, "M B T"]:
        def loss(mask_LP: Array) -> Array:
            hidden_BTD, _, _ = model.apply({"params": params}, batch, method="forward",
                                           interventions=_masked(mask_LP))
            return token_nll(hidden_BTD, model.head(params), batch.targets_BT)

        return jax.lax.map(loss, masks_MLP)

    ids = _training_ids(probe)
    nll_MWT = np.concatenate(probe.map(losses).astype(np.float64), axis=1)
    rows: list[Row] = []
    for n in orders:
        hit_WT, weight_WT = _hits(probe, ids, n)
        for name, of_class_WT in ((f"AR hits, {n}-grams", hit_WT),
                                  (f"AR misses, {n}-grams", ~hit_WT)):
            rows += _class_rows(name, n, nll_MWT, weight_WT * of_class_WT, weight_WT, chosen)
    return SuiteResult("recall", TITLE, (_text_table(probe, rows, len(ids)),), (
        _text_plot(rows, chosen),))


def _training_ids(probe: Probe) -> np.ndarray:
    try:
        corpus = corpus_of(probe.config)
        return token_split(corpus, probe.text.tokenizer, "train").ids[:MAX_COUNTED]
    except DataError as error:
        raise SkipSuite(f"the training text is not at hand ({error.message})") from None


def _hits(probe: Probe, training_ids: np.ndarray, n: int,
          ) -> tuple[Bool[np.ndarray, "W T"], Float[np.ndarray, "W T"]]:
    """Which predictions of all windows are repeated and not frequent; and what counts."""
    size, hits, weights = probe.config.model.vocab_size, [], []
    for batch in probe.host_batches:
        hit_BT, (key_BT, _) = repeated(batch, n, size), gram_keys(batch, n, size)
        known = count_grams(key_BT[hit_BT], training_ids, n, size) > FREQUENT
        hit_BT[hit_BT] = ~known
        hits.append(hit_BT)
        weights.append(np.asarray(batch.loss_weight_BT, np.float64))
    return np.concatenate(hits), np.concatenate(weights)


def _class_rows(name: str, n: int, nll_MWT: np.ndarray, weight_WT: np.ndarray, all_WT: np.ndarray,
                chosen: Sequence[Variant]) -> list[Row]:
    """The loss of one class of predictions, and what each missing path costs there."""
    tokens = weight_WT.sum()
    none = np.zeros((0, 0))  # contributions are not asked for here
    measured = [Measured((nll_WT * weight_WT).sum(1), weight_WT.sum(1), none, none)
                for nll_WT in nll_MWT]
    rows: list[Row] = []
    for variant, found in zip(chosen, measured, strict=True):
        damage = found.minus(measured[0]) if tokens and variant.path else None
        rows.append({
            "name": name, "category": "recall", "path": variant.name, "order": n,
            "share": float(tokens / all_WT.sum()), "tokens": int(tokens),
            "loss": found.loss if tokens else None,
            "perplexity": perplexity(found.loss) if tokens else None,
            "delta": damage.nats if damage else None,
            "delta_stderr": damage.standard_error if damage else None})
    return rows


def _text_table(probe: Probe, rows: Sequence[Row], counted: int) -> ResultTable:
    columns = (Column("name", "predictions"), Column("category", "category"),
               Column("path", "paths"), Column("share", "share"), Column("tokens", "tokens"),
               Column("loss", "loss", "nats/token"), Column("delta", "damage", "nats/token"),
               Column("delta_stderr", "s.e.", "nats/token"))
    return ResultTable(
        "split", "Loss where the context has the answer, and elsewhere", columns, tuple(rows),
        (probe.protocol,), (
            "AR hits: the n-gram that ends here has ended before in the document's part of the "
            f"window and occurs at most {FREQUENT:,} times in the training text ({counted:,} "
            "tokens)",))


def _text_plot(rows: Sequence[Mapping[str, Any]], chosen: Sequence[Variant]) -> Plot:
    names = list(dict.fromkeys(row["name"] for row in rows))
    shown = [variant.name for variant in chosen[1:]] or [chosen[0].name]
    value = "delta" if chosen[1:] else "loss"

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        width = 0.8 / len(shown)
        for i, variant in enumerate(shown):
            own = [row for row in rows if row["path"] == variant]
            at = np.arange(len(own)) + (i - (len(shown) - 1) / 2) * width
            axes.bar(at, [row[value] or 0.0 for row in own], width * 0.92, label=variant,
                     color=_color(variant), yerr=[row["delta_stderr"] or 0.0 for row in own],
                     ecolor=INK)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel("rise of the loss (nats/token)" if chosen[1:] else "loss (nats/token)")
        axes.axhline(0, color=INK, linewidth=0.8)
        figure.legend(loc="outside upper center", ncols=4)

    return Plot("split", "What each path is worth where the context has the answer",
                "Rise of the loss without a path, on predictions whose n-gram the window has had "
                "before (AR hits) and on all others; the other gates are brought to a sum of 1, "
                "lines are standard errors over windows.", themed_svg(draw))
