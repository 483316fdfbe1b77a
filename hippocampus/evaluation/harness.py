"""A model as EleutherAI's lm-evaluation-harness asks questions of it (extra `[eval]`).

    import lm_eval
    from hippocampus.evaluation.harness import HarnessLM
    lm_eval.simple_evaluate(model=HarnessLM(hp.load("checkpoints/quickstart")), tasks=["arc_easy"])

A text without anything before it is read behind `<|endoftext|>`, or behind a line end where the
tokenizer has no such token (its first id, where it has no line end either). Contexts that are too
long lose their beginning; with learned positions an answer gets at most half of them.

Source: Gao et al. 2024, lm-evaluation-harness (doi:10.5281/zenodo.12608602).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager

from hippocampus.data.batches import Batch
from hippocampus.data.evaluation_windows import EvaluationWindows
from hippocampus.errors import ConfigError, DataError
from hippocampus.evaluation.evaluate import evaluate
from hippocampus.evaluation.report import Windows
from hippocampus.generation.language_model import LanguageModel
from hippocampus.generation.loading import load
from hippocampus.ops.cross_entropy import Head

_SHORTEST = 32
"""Tokens of the shortest batch; longer ones are powers of two."""
_MOST_NEW_TOKENS = 256
"""Drawn where a task does not say how many."""


class _Row(NamedTuple):
    """The last `n` of these ids are to be predicted."""

    ids: Int[np.ndarray, " T"]
    n: int
    request: int


@register_model("hippocampus")
class HarnessLM(LM):
    """What lm_eval takes for a model."""

    def __init__(self, lm: LanguageModel, batch_size: int = 16):
        """Wraps a model.

        Args:
          lm: from `hippocampus.load`.
          batch_size: texts that are read side by side.
        """
        super().__init__()
        self.lm, self._batch_size = lm, batch_size

    @classmethod
    def create_from_arg_string(cls, arg_string: str,
                               additional_config: dict | None = None) -> HarnessLM:
        """Opens `path=FOLDER` (and `weights=`, `step=`), for lm_eval's own command line."""
        parts = (part.partition("=") for part in arg_string.split(",") if part)
        return cls.create_from_arg_obj({name: value for name, _, value in parts},
                                       additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None,
                            ) -> HarnessLM:
        """The same of a dict, which is what lm_eval's command line makes of its flags."""
        given = dict(arg_dict)
        if "path" not in given or set(given) - {"path", "weights", "step"}:
            raise ConfigError(f"model_args is {arg_dict!r}", "path=FOLDER, and if need be "
                              "weights=ema|raw and step=N")
        step = int(given["step"]) if "step" in given else None
        wanted = str((additional_config or {}).get("batch_size"))
        size = int(wanted) if wanted.isdigit() else 16
        return cls(load(given["path"], weights=given.get("weights", "ema"), step=step), size)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether it is what greedy decoding gives) of each request."""
        rows: list[_Row] = []
        for i, request in enumerate(requests):
            context, continuation = request.args
            rows += self._pair(context, continuation, i)
        sums, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
        for batch in _batches(rows, self._batch_size):
            for row, log_p, likely in zip(batch, *self._score(batch), strict=False):
                sums[row.request] += log_p
                greedy[row.request] &= bool(likely)
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """log p of each whole text, in the windows of `python -m hippocampus.evaluate`."""
        found = []
        for request in requests:
            (text,) = request.args
            ids = self.lm.tokenizer.encode_document(text) if text else np.zeros(0, np.int32)
            total = 0.0
            if len(ids) and self.lm.tokenizer.end_id is None:  # nothing else predicts the first
                (total,), _ = self._score([_Row(np.asarray([self._start(), ids[0]]), 1, 0)])
            if len(ids) > 1:
                total -= self._nats(ids)
            found.append(float(total))
        return found

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Continues each context until a stop string; greedy unless the task asks for draws."""
        by_settings: dict[tuple, list[int]] = {}
        for i, request in enumerate(requests):
            by_settings.setdefault(_settings(request.args[1]), []).append(i)
        found = [""] * len(requests)
        for (stop, asked, temperature, top_k, top_p), group in by_settings.items():
            # Of learned positions the answer gets at most half: the question needs some, too.
            n = int(min(asked, self.lm.room("") / 2))
            prompts = [self._within(requests[i].args[0], n) for i in group]
            texts = self.lm.generate(prompts, max_new_tokens=n, temperature=temperature,
                                     top_k=top_k, top_p=top_p, stop=stop)
            for i, text in zip(group, texts, strict=True):
                found[i] = text
        return found

    def _start(self) -> int:
        """The id that stands for nothing before a text."""
        if self.lm.tokenizer.end_id is not None:
            return self.lm.tokenizer.end_id
        try:
            return int(self.lm.tokenizer.encode("\n")[-1])
        except DataError:  # a vocabulary of characters that has no line end
            return 0

    def _pair(self, context: str, continuation: str, request: int) -> list[_Row]:
        """Ids of both; a space between them belongs to the continuation, as in lm_eval."""
        stripped = context.rstrip()
        continuation = context[len(stripped):] + continuation
        encode, longest = self.lm.tokenizer.encode, self.lm.context
        before = encode(stripped) if stripped else np.asarray([self._start()])
        ids = encode(stripped + continuation)
        new = ids[len(before):] if stripped else ids
        if not len(new) and len(ids) and continuation.strip():
            # It grew together with the context's last token: what became of it is the target, or
            # it would be certain.
            before = ids[:-1] if len(ids) > 1 else np.asarray([self._start()])
            new = ids[-1:]
        ids = np.concatenate([before, new])
        rows = []
        for begin in range(0, len(new), longest):  # more than one only if it is very long
            end = min(begin + longest, len(new))
            stop = len(before) + end
            rows.append(_Row(ids[max(0, stop - longest - 1):stop], end - begin, request))
        return rows

    def _score(self, rows: Sequence[_Row]) -> tuple[np.ndarray, np.ndarray]:
        """Summed log p of each row's targets, and whether all were the most likely."""
        B = self._batch_size if len(rows) > 1 else 1
        T = _size(max(len(row.ids) for row in rows) - 1)
        n = min(T, _size(max(row.n for row in rows)))
        tokens_BT, targets_Bn = np.zeros((B, T), np.int32), np.zeros((B, n), np.int32)
        at_Bn, weight_Bn = np.zeros((B, n), np.int32), np.zeros((B, n), bool)
        for b, row in enumerate(rows):
            tokens_BT[b, :len(row.ids) - 1] = row.ids[:-1]
            targets_Bn[b, :row.n] = row.ids[-row.n:]
            at_Bn[b, :row.n] = np.arange(len(row.ids) - 1 - row.n, len(row.ids) - 1)
            weight_Bn[b, :row.n] = True
        log_p_B, greedy_B = jax.device_get(_log_p(
            self.lm.model, self.lm.params, tokens_BT, at_Bn, targets_Bn, weight_Bn))
        return log_p_B[:len(rows)], greedy_B[:len(rows)]

    def _nats(self, ids: Int[np.ndarray, " T"]) -> float:
        own = Windows.of(self.lm.config)
        context = min(own.context, _size(len(ids) - 1))
        one = len(ids) - 1 <= context
        windows = EvaluationWindows(ids, context, 1 if one else own.batch_size, 0,
                                    0 if one else own.stride)
        found = evaluate(self.lm.model, self.lm.params, windows, 1.0)
        return found.nats_per_token * found.tokens

    def _within(self, context: str, n: int) -> str:
        """The context, or its end where learned positions leave no room for all of it."""
        room = self.lm.room("")
        ids = self.lm.tokenizer.encode(context)
        if not len(ids):
            return self.lm.tokenizer.decode([self._start()])
        if len(ids) + n <= room:
            return context
        for kept in range(max(1, int(room) - n), 0, -1):  # half a character may need more ids
            context = self.lm.tokenizer.decode(ids[len(ids) - kept:])
            if len(self.lm.tokenizer.encode(context)) + n <= room:
                break
        return context


@functools.partial(jax.jit, static_argnums=0)
def _log_p(model: Any, params: Any, tokens_BT: Array, at_Bn: Array, targets_Bn: Array,
           weight_Bn: Array) -> tuple[Array, Array]:
    logits_of = functools.partial(_row_log_p, model.head(params))
    batch = Batch(tokens_BT, tokens_BT, jnp.ones(tokens_BT.shape, jnp.float32))
    hidden_BTD = model.apply({"params": params}, batch, method="forward")[0]
    hidden_BnD = jnp.take_along_axis(hidden_BTD, at_Bn[..., None], axis=1)
    # Row by row: the logits of all rows could be more than the device holds.
    found: tuple[Array, Array] = jax.lax.map(
        lambda row: logits_of(*row), (hidden_BnD, targets_Bn, weight_Bn))
    return found


def _row_log_p(head: Head, hidden_nD: Array, targets_n: Array,
               weight_n: Array) -> tuple[Array, Array]:
    logits_nV = head.logits(hidden_nD)
    log_p_n = jnp.take_along_axis(jax.nn.log_softmax(logits_nV), targets_n[:, None], 1)[:, 0]
    likely_n = logits_nV.argmax(-1) == targets_n
    return jnp.where(weight_n, log_p_n, 0.0).sum(), (likely_n | ~weight_n).all()


def _size(length: int) -> int:
    return max(_SHORTEST, 1 << (length - 1).bit_length())


def _batches(rows: Iterable[_Row], size: int) -> Iterable[list[_Row]]:
    """Rows of like length together."""
    ordered = sorted(rows, key=lambda row: len(row.ids))
    return (ordered[begin:begin + size] for begin in range(0, len(ordered), size))


def _settings(given: dict[str, Any]) -> tuple:
    """(stop, max_new_tokens, temperature, top_k, top_p) of a task's generation_kwargs."""
    until = given.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(text for text in until if text)
    n = int(given.get("max_gen_toks", given.get("max_new_tokens", _MOST_NEW_TOKENS)))
    drawn = bool(given.get("do_sample", given.get("temperature", 0.0)))
    temperature = float(given.get("temperature", 1.0)) if drawn else 0.0
    return stop, n, temperature, int(given.get("top_k", 0)), float(given.get("top_p", 1.0))


def run_tasks(lm: LanguageModel, tasks: Sequence[str], include_path: Path | None = None,
              limit: int | None = None, batch_size: int = 16) -> dict[str, Any]:
    """Runs tasks and gives what lm_eval reports of them.

    Args:
      lm: the model.
      tasks: names.
      include_path: a folder of task files, which are then the only ones known.
      limit: only so many questions of each task.
      batch_size: texts side by side.

    Raises:
      ConfigError: an unknown task.
      DataError: the folder does not exist.
    """
    if include_path is not None and not include_path.is_dir():
        raise DataError(f"there is no folder {include_path}", "it holds the tasks' yaml files")
    manager = TaskManager(include_path=str(include_path) if include_path else None,
                          include_defaults=include_path is None)
    known = set(manager.all_tasks)
    if unknown := [task for task in tasks if task not in known]:
        few = ", ".join(sorted(known)[:8])
        raise ConfigError(f"there is no task {unknown[0]!r}", f"known: {few}"
                          + (" …" if len(known) > 8 else ""))
    results: dict[str, Any] = simple_evaluate(
        model=HarnessLM(lm, batch_size), tasks=list(tasks), task_manager=manager, limit=limit,
        bootstrap_iters=0, log_samples=False)
    return results
