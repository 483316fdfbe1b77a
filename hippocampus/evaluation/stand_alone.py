"""The evaluation of a run folder: what `python -m hippocampus.evaluate` runs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Bool

from hippocampus.backbones.hub_tokenizer import HubTokenizer
from hippocampus.config import Config
from hippocampus.config_files import read_json
from hippocampus.config_recall import task_of
from hippocampus.data.batches import Batch
from hippocampus.data.corpora import Corpus, open_corpus
from hippocampus.data.recall_rows import RecallWindows
from hippocampus.data.shards import token_split
from hippocampus.data.synthetic import digest_of
from hippocampus.data.tokenizers import Tokenizer
from hippocampus.errors import ConfigError, DataError
from hippocampus.evaluation.evaluate import evaluate
from hippocampus.evaluation.held_out import HeldOutText, read_text, take_split
from hippocampus.evaluation.ngrams import ngram_lines, smoothing_note
from hippocampus.evaluation.recall_text import (
    RECALL_NOTE,
    RecallText,
    recall_lines,
    recall_text,
)
from hippocampus.evaluation.report import WEIGHTS, Report, Windows, make_report
from hippocampus.evaluation.story_scores import (
    STORY_NOTE,
    StoryText,
    answer_lines,
    find_stories,
    score_stories,
    story_text,
)
from hippocampus.exports.folder import ExportRecord, is_export, open_export
from hippocampus.files import check_writable, expand
from hippocampus.generation.language_model import LanguageModel
from hippocampus.generation.loading import load, load_tokenizer
from hippocampus.runs.run_folder import RunFolder

SPLITS = ("validation", "test")


@dataclasses.dataclass(frozen=True)
class Request:
    """What to evaluate, on what.

    Attributes:
      split: "validation" or "test".
      text: a UTF-8 file to score instead of a split; "" = the split.
      step: a saved step; None = the best one.
      weights: "both", "ema" or "raw".
      context, stride, batch_size: None = the run's own.
    """

    split: str = "validation"
    text: str = ""
    step: int | None = None
    weights: str = "both"
    context: int | None = None
    stride: int | None = None
    batch_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Spread:
    """How the work lies on devices; by default on one.

    Attributes:
      place: puts a batch where it belongs.
      sharding: of every parameter; None = whole, on one device.
      ways: batches are rounded up to a multiple of it.
      writes: whether this process is the one that writes files.
    """

    place: Callable[[Batch], Batch] = lambda batch: batch
    sharding: jax.sharding.Sharding | None = None
    ways: int = 1
    writes: bool = True


def evaluate_run(
    path: str | Path, request: Request, out: str | Path | None = None,
    track: Callable[[Iterable[Batch], str, int], Iterable[Batch]] = lambda batches, *_: batches,
    spread: Spread = Spread(),
) -> tuple[Report, Path | None]:
    """Evaluates a run folder, or an exported one, and writes the JSON and CSV files.

    Args:
      path: the folder.
      request: what to evaluate.
      out: folder of the files; None = `evaluations/` in the folder.
      track: wraps the batches, given a name and their number, to show progress.
      spread: over which devices.

    Returns:
      The report, and the JSON file (None where another process writes it).

    Raises:
      ConfigError: a setting that does not go with the model, or a folder that cannot be written.
      DataError: no run folder, no such split, or a text other than the one of the training.
      CheckpointError: no such step.
    """
    folder, config = open_folder(path)
    windows = choose_windows(config, request)
    windows = dataclasses.replace(
        windows, batch_size=-(-windows.batch_size // spread.ways) * spread.ways)
    out = Path(out) if out is not None else folder.evaluations
    if spread.writes:
        check_writable(out)
    text, lines, notes = read_held_out(folder, config, load_tokenizer(folder.tokenizer, config),
                                       request, answers=True)
    cut = text.windows(windows.context, windows.stride, windows.batch_size)
    models = load_weights(folder, request.weights, request.step, spread.sharding)
    parts = cut.parts if isinstance(cut, RecallWindows) else ()
    evaluations = {}
    for name, lm in models.items():
        batches = track(cut, f"{WEIGHTS[name]} weights", len(cut))
        evaluations[name] = (
            score_stories(lm.model, lm.params, batches, text, spread.place)
            if isinstance(text, StoryText) else
            evaluate(lm.model, lm.params, batches, text.bytes_per_token, spread.place,
                     text.words_per_token, parts))
    report = make_report(evaluations, text, windows, lines, notes, config=config,
                         step=next(iter(models.values())).step, run=folder.path)
    return report, report.write(out) if spread.writes else None


def open_folder(path: str | Path) -> tuple[RunFolder, Config]:
    """A run folder, or an exported one, and its config.

    Raises:
      ConfigError: a place that is not on a file system.
      DataError: no run folder, or a damaged one.
    """
    folder = RunFolder.at(path)
    if not folder.is_run():
        raise DataError(f"no run folder at {folder.path}", "train one with python -m "
                        "hippocampus.train --config=configs/quickstart.py")
    return folder, _read_config(folder)[0]


def choose_windows(config: Config, request: Request) -> Windows:
    """The windows asked for, or the run's own.

    Raises:
      ConfigError: a stride beyond the context, or a context beyond the learned positions.
    """
    own = Windows.of(config)
    context = own.context if request.context is None else request.context
    stride = own.stride if request.stride is None else request.stride
    if request.stride is None and stride > context:
        stride = 0  # the run's own stride belongs to the run's own context
    batch_size = own.batch_size if request.batch_size is None else request.batch_size
    for name, value, least in (("--context", request.context, 1), ("--stride", request.stride, 0),
                               ("--batch_size", request.batch_size, 1)):
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}", f"it must be at least {least}")
    if stride > context:
        raise ConfigError(f"--stride={stride} is more than the context of {context}",
                          "tokens would be left out; 0 = disjoint windows")
    limit = config.model.longest_row(config.data.context)
    if limit is not None and context > limit:
        raise ConfigError(f"--context={context} is more than the {limit} learned positions of the "
                          "model", f"at most {limit}; rotary positions go beyond")
    return Windows(context, stride, batch_size)


def load_weights(folder: RunFolder, weights: str, step: int | None,
                 sharding: jax.sharding.Sharding | None = None) -> dict[str, LanguageModel]:
    """The models of one step by their weights, "raw" before "ema".

    A run that keeps no average has raw weights only, an export those that were exported.
    """
    config, exported = _read_config(folder)
    if exported and weights in ("both", exported.weights):
        return {exported.weights: load(folder.path, step=step, sharding=sharding)}
    if exported:
        raise ConfigError(f"{folder.path} is an export of the {exported.weights} weights",
                          f"--weights={exported.weights}")
    if weights == "ema" and not config.ema.decay:
        raise ConfigError(f"{folder.path} keeps no average of its weights (ema.decay = 0)",
                          "--weights=raw")
    names = ("raw", "ema") if weights == "both" and config.ema.decay else (
        "raw" if weights == "both" else weights,)
    models: dict[str, LanguageModel] = {}
    for name in names:
        models[name] = load(folder.path, weights=name, step=step, sharding=sharding)
        step = models[name].step  # a run that goes on may save a better one in between
    return models


def read_held_out(
    folder: RunFolder, config: Config, tokenizer: Tokenizer, request: Request,
    scored: Callable[[HeldOutText], Bool[np.ndarray, " m"] | None] = lambda text: None,
    *, answers: bool = False,
) -> tuple[HeldOutText, dict[str, float], tuple[str, ...]]:
    """The text that is asked for, and the count-based lines on it.

    Args:
      folder, config, tokenizer: of the run.
      request: which text.
      scored: which ids of the text the lines are means over; None = all.
      answers: of stories with questions, the answers rather than the stories.

    Returns:
      The text, nats per token of the lines, and what is to be said of them.

    Raises:
      DataError: no such text or split, or it is not the text of the training.
    """
    if task_of(config.data) and not request.text:
        longest = choose_windows(config, request).context
        examples = _examples(folder, tokenizer, request.split, config, longest)
        return examples, recall_lines(config.data, examples), (RECALL_NOTE,)
    if config.data.form == "stories" and answers and not request.text:
        told = _answers(folder, tokenizer, "train", config)
        asked = _answers(folder, tokenizer, request.split, config)
        return asked, answer_lines(told, asked), (STORY_NOTE,)
    if request.text:
        text = read_text(expand(request.text), tokenizer)
        try:
            corpus = _corpus_of(folder, config)
        except DataError as error:  # the run folder may have travelled without its corpus
            return text, {"uniform": math.log(tokenizer.vocab_size)}, (
                f"no n-gram lines: the training text cannot be read ({error.message})",)
    else:
        corpus = _corpus_of(folder, config)
        text = _held_out(corpus, request.split, tokenizer, config)
    train = token_split(corpus, tokenizer, "train").ids
    lines = ngram_lines(train, text.ids, tokenizer.vocab_size, scored=scored(text))
    return text, lines, (smoothing_note(len(train), tokenizer.vocab_size),)


def held_out_split(folder: RunFolder, tokenizer: Tokenizer, split: str) -> HeldOutText:
    """A split of the text that a run was trained on.

    Raises:
      DataError: the text is not at hand, is another one by now, or has no such split.
    """
    config, _ = _read_config(folder)
    if task_of(config.data):
        return _examples(folder, tokenizer, split, config)
    if config.data.form == "stories":
        return _answers(folder, tokenizer, split, config)
    return _held_out(_corpus_of(folder, config), split, tokenizer, config)


def _examples(folder: RunFolder, tokenizer: Tokenizer, split: str, config: Config,
              longest: int = 0) -> RecallText:
    _check_digest(folder, config, digest_of(config.data))
    return recall_text(config.data, split, tokenizer, longest)


def _answers(folder: RunFolder, tokenizer: Tokenizer, split: str, config: Config) -> StoryText:
    assert isinstance(tokenizer, HubTokenizer)
    stories = find_stories(config)
    _check_digest(folder, config, stories.digest)
    return story_text(config, stories, tokenizer, split)


def _held_out(corpus: Corpus, split: str, tokenizer: Tokenizer, config: Config) -> HeldOutText:
    if split not in corpus.splits:
        raise DataError(f"{corpus.name} has no {split} split",
                        f"it has {', '.join(corpus.splits)}; --text=FILE scores any text")
    return take_split(corpus.name, corpus.digest, split, token_split(corpus, tokenizer, split),
                      tokenizer, config.data.documents == "packed")


def _read_config(folder: RunFolder) -> tuple[Config, ExportRecord | None]:
    """The config, and what an exported folder says of itself; None for a run folder."""
    if is_export(folder.path):
        config, _, record = open_export(folder.path)
        return config, record
    return read_json(folder.config)[0], None


def _digest_of_text(folder: RunFolder) -> str:
    """Of what the run was trained on."""
    _, exported = _read_config(folder)
    if exported and exported.text:
        return exported.text
    try:
        return str(json.loads(folder.data.read_text("utf-8"))["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"cannot read {folder.data}, which says what the run was trained on",
                        "restore it from a copy") from None


def corpus_of(config: Config) -> Corpus:
    """The texts that a config names; of stories with questions, the stories.

    Raises:
      DataError: there are none.
    """
    return (find_stories(config).corpus() if config.data.form == "stories" else
            open_corpus(config.data))


def _corpus_of(folder: RunFolder, config: Config) -> Corpus:
    """The corpus of a run, if it is still the text that the run was trained on."""
    corpus = corpus_of(config)
    _check_digest(folder, config, corpus.digest)
    return corpus


def _check_digest(folder: RunFolder, config: Config, digest: str) -> None:
    saved = _digest_of_text(folder)
    if digest != saved:
        raise DataError(
            f"{config.data.corpus} is not the text that {folder.path} was trained on "
            f"({saved[:12]}… then, {digest[:12]}… now)",
            "what it was trained on may stand in this one's held-out splits; --text=FILE scores "
            "any text")
