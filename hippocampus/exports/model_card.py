"""MODEL_CARD.md, from the run's own records alone: what was not recorded says so.

The header is the YAML that the Hugging Face hub reads. Strings in it are written as JSON, which
YAML contains.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hippocampus.config import Config
from hippocampus.data.corpora import hub_id
from hippocampus.exports.folder import ExportRecord
from hippocampus.exports.model_facts import facts_of
from hippocampus.exports.run_records import RunRecords

MISSING = "not recorded"

WEIGHTS = {"ema": "running average", "raw": "raw"}


@dataclass(frozen=True)
class StorageCost:
    """What storing matrices with fewer bits saves and costs.

    Attributes:
      bytes_before, bytes_after: of the weights in float32, and as stored.
      bits_before, bits_after: bits per byte on the run's validation split; None: not measured.
      note: on what it was measured, or that it was not.
      reason: why not, for a console: it may name places on this machine.
    """

    bytes_before: int
    bytes_after: int
    bits_before: float | None
    bits_after: float | None
    note: str
    reason: str = ""


@dataclass(frozen=True)
class Card:
    """All that a model card is made of.

    Attributes:
      name: of the exported folder.
      config: of the run.
      record: of the export.
      records: of the run.
      parameters: how many, without padding.
      cost: of the storage.
    """

    name: str
    config: Config
    record: ExportRecord
    records: RunRecords
    parameters: int
    cost: StorageCost

    def render(self) -> str:
        """The page."""
        config, record = self.config, self.record
        intro = (f"A causal language model of {self.parameters:,} parameters, trained from scratch "
                 f"on {_corpus(self.records)} with Hippocampus, a JAX/Flax framework for language "
                 f"models with a memory. These are its {WEIGHTS[record.weights]} weights at step "
                 f"{record.step:,}.")
        parts = [_header(self), f"# {_plain(config.name)}", intro, "## The model", _model(self),
                 "## Training", _training(self), "## Results", *_results(self), *_storage(self),
                 "## Use", _use(self), "## Limits", _limits(self), "## Licence", _LICENCE]
        return "\n\n".join(parts) + "\n"


_LICENCE = ("Not recorded, neither of the training text nor of these weights. Who passes this "
            "folder on has to find out and to state it (`license:` in the header of this file).")


def _header(card: Card) -> str:
    tags = ["hippocampus", "jax", "flax", *facts_of(card.config.model).tags]
    corpus = hub_id(card.config.data.corpus)
    lines = ["library_name: hippocampus", "pipeline_tag: text-generation", "tags:",
             *(f"- {json.dumps(tag)}" for tag in tags)]
    if corpus:
        lines += ["datasets:", f"- {json.dumps(corpus)}", *_model_index(card, corpus)]
    return "\n".join(["---", *lines, "---"])


def _model_index(card: Card, corpus: str) -> list[str]:
    """The results that stand for the whole: on splits of a data set of the hub."""
    results = []
    for found, rows in _tables(card):
        own = rows[-1]
        if found["text"]["split"] == "text" or card.record.storage != "float32":
            continue
        dataset: dict[str, Any] = {"type": corpus, "name": corpus, "split": found["text"]["split"]}
        if card.config.data.subset:
            dataset["config"] = card.config.data.subset
        metrics = [{"type": name, "name": label, "value": own[name]}
                   for name, label in (("bits_per_byte", "bits per byte"),
                                       ("word_perplexity", "perplexity per word"))
                   if own.get(name) is not None]
        results.append({"task": {"type": "text-generation"}, "dataset": dataset,
                        "metrics": metrics})
    if not results:
        return []
    return ["model-index:", f"- name: {json.dumps(card.config.name)}",
            f"  results: {json.dumps(results)}"]


def _model(card: Card) -> str:
    config = card.config.model
    tokenizer = Path(card.config.data.tokenizer).name
    return _table(("", ""), [
        ("family", config.family),
        *facts_of(config).rows,
        ("parameters", f"{card.parameters:,}"),
        ("vocabulary", f"{config.vocab_size:,} ids ({tokenizer}), tokenizer sha256 "
                       f"{card.record.tokenizer[:12]}"),
        ("context in training", f"{card.config.data.context:,} tokens"),
        ("weights", f"{WEIGHTS[card.record.weights]}"
         + (f" (decay {card.config.ema.decay:g})" if card.record.weights == "ema" else "")
         + f", matrices in {card.record.storage}, {size(card.cost.bytes_after)}")])


def _training(card: Card) -> str:
    config, found, here = card.config, card.records.data, card.records.environment
    text, train = _corpus(card.records), config.train
    if found.get("sha256"):
        text += f", sha256 {_plain(found['sha256'])[:12]}"
    read = card.record.step * train.batch_size * config.data.context
    tokens = f"{read:,} in {card.record.step:,} of {train.steps:,} steps of {train.batch_size} x "\
             f"{config.data.context}"
    known = found.get("train_tokens")
    if isinstance(known, int) and known:
        text += f"; {known:,} tokens to train on"
        tokens += f"; the text {read / known:.3g} times"
    speeds = [row["train/tokens_per_second"] for row in card.records.metrics
              if isinstance(row.get("train/tokens_per_second"), (int, float))]
    optimizer = config.optimizer
    packages = here.get("packages") or {}
    versions = [f"{name} {packages[name]}" for name in ("hippocampus", "jax", "flax", "optax")
                if name in packages]
    if here.get("python"):
        versions.append(f"Python {here['python']}")
    return _table(("", ""), [
        ("text", text), ("tokens read", tokens),
        ("optimizer", f"AdamW, learning rate {optimizer.learning_rate:g}, {optimizer.schedule} "
                      f"schedule after {optimizer.warmup_steps:,} steps, weight decay "
                      f"{optimizer.weight_decay:g}"),
        ("seed", f"{train.seed}"), ("compute type", config.model.compute_dtype),
        ("hardware", _hardware(here)),
        ("speed", f"{median(speeds):,.0f} tokens/s (median)" if speeds else MISSING),
        ("versions", ", ".join(versions) or MISSING),
        ("commit", here.get("commit") or MISSING), ("command", _command(here.get("command")))])


def _hardware(here: Mapping[str, Any]) -> str:
    devices = here.get("devices")
    if not isinstance(devices, list) or not devices:
        return MISSING
    kinds = ", ".join(f"{devices.count(kind)} x {kind}" for kind in dict.fromkeys(devices))
    processes = here.get("processes") or 1
    return kinds + (f" in {processes} processes" if processes != 1 else "")


def _command(words: Any) -> str:
    """The command of the last start, if it was the train verb."""
    if not isinstance(words, list) or not words:
        return MISSING
    if words[0] != "train.py":
        return f"{MISSING} (the run was not started by `hippocampus.train`)"
    return f"`{_plain(shlex.join(['python', '-m', 'hippocampus.train', *map(str, words[1:])]))}`"


def _results(card: Card) -> list[str]:
    """A table per recorded evaluation of these weights, beside the lines that count words."""
    parts = []
    for found, rows in _tables(card):
        text, windows = found["text"], found["windows"]
        parts.append(
            f"{text['split'].capitalize()} of {_plain(Path(text['corpus']).name)} (sha256 "
            f"{_plain(text['digest'])[:12]}): {text['tokens']:,} tokens, {text['bytes']:,} bytes; "
            f"context {windows['context']}, stride {windows['stride']}; recorded by commit "
            f"{found.get('commit') or MISSING} on {', '.join(found.get('devices') or [MISSING])}.")
        parts.append(_table(
            ("", "bits/byte", "perplexity/word", "nats/token"),
            [(_plain(row["model"]), _number(row.get("bits_per_byte")),
              _number(row.get("word_perplexity"), 2), _number(row.get("nats_per_token")))
             for row in rows]))
        parts += [_plain(note.removeprefix("* ")) for note in found.get("notes") or ()
                  if isinstance(note, str) and not note.startswith("!")]
        if rows[-1].get("worse_than_unigram"):
            parts.append("**Worse than counting tokens (the unigram line): broken, or hardly "
                         "trained.**")
        parts.append("Make it again, with `RUN` the run folder:\n\n```bash\n"
                     f"{_evaluate(card, found)}\n```")
    if parts:
        return parts
    row = card.records.last_row(card.record.step, "eval/loss")
    suffix = "" if card.record.weights == "ema" or not card.config.ema.decay else "_raw"
    if f"eval/bits_per_byte{suffix}" in row:
        return [f"During training: {_number(row[f'eval/bits_per_byte{suffix}'])} bits per byte on "
                "the validation split (no n-gram lines recorded for this step)."]
    return [f"No evaluation of these weights at step {card.record.step}: {MISSING}."]


def _tables(card: Card) -> Iterable[tuple[Mapping[str, Any], list[Mapping[str, Any]]]]:
    """Evaluations of these weights: the file's content, and its lines with the model's row last."""
    for found in card.records.evaluations:
        try:
            rows = [row for row in found["rows"] if row["kind"] == "line"]
            own = [row for row in found["rows"] if row["weights"] == card.record.weights]
            complete = {"split", "corpus", "digest", "tokens", "bytes"} <= found["text"].keys()
            complete &= {"context", "stride", "trained_context"} <= found["windows"].keys()
        except (KeyError, TypeError, AttributeError):
            continue
        if found.get("step") == card.record.step and own and complete:
            yield found, [*rows, own[0]]


def _evaluate(card: Card, found: Mapping[str, Any]) -> str:
    text, windows = found["text"], found["windows"]
    what = f"--split={text['split']}" if text["split"] != "text" else (
        f"--text={shlex.quote(Path(text['corpus']).name)}")
    return (f"python -m hippocampus.evaluate --workdir=RUN --step={card.record.step} {what} "
            f"--weights={card.record.weights} --context={windows['context']} "
            f"--stride={windows['stride']}")


def _storage(card: Card) -> list[str]:
    if card.record.storage == "float32":
        return []
    cost = card.cost
    rows = [("size", size(cost.bytes_before), size(cost.bytes_after))]
    if cost.bits_before is not None:
        rows.append(("bits/byte", _number(cost.bits_before), _number(cost.bits_after)))
    table = _table(("weights", "float32", card.record.storage), rows)
    return [f"Those numbers are of the weights in float32. Stored in {card.record.storage}, as "
            "here:", table, cost.note]


def _use(card: Card) -> str:
    name, prompt = card.name, card.config.sample.prompt
    folder = shlex.quote(name)
    return f"""```python
import hippocampus as hp

lm = hp.load({json.dumps(name)})
print(lm.generate({json.dumps(prompt)}, max_new_tokens=100, seed=0))
print(lm.score("Any text.").bits_per_byte)
```

```bash
python -m hippocampus.sample --workdir={folder} --prompt={_shell(prompt)}
python -m hippocampus.evaluate --workdir={folder} --text=FILE
```

Loading runs no code of this folder and unpickles nothing."""


def _limits(card: Card) -> str:
    tokenizer = card.config.data.tokenizer
    lines = [
        f"It knows the text that it was trained on ({_corpus(card.records)}), and continues text. "
        "It does not follow instructions and knows no facts reliably.",
        "There was no safety tuning, and Hippocampus filters nothing: what stands in the training "
        "text, harmful or private, can come out.",
        f"It was trained on windows of {card.config.data.context:,} tokens; what it does beyond "
        "them was not trained."]
    if tokenizer == "characters":
        lines.append("Its tokenizer knows the characters of its training text, and no other.")
    if tokenizer == "words":
        lines.append("Its tokenizer replaces words that it does not know by `<unk>`.")
    return "\n".join(f"- {line}" for line in lines)


def _corpus(records: RunRecords) -> str:
    """The text's name; of a local file not its whole path, which is nobody's business."""
    name = records.data.get("corpus")
    if not isinstance(name, str) or not name:
        return f"a text whose name is {MISSING}"
    return f"`{_plain(name if hub_id(name.split()[0]) else Path(name).name)}`"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    align = ["---"] * len(header) if len(header) == 2 else ["---", *["--:"] * (len(header) - 1)]
    lines = [header, align, *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: Any) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", str(value))


def _plain(value: Any) -> str:
    """On one line, and no code of Markdown's."""
    return " ".join(str(value).split()).replace("`", "'").replace("<", "&lt;")


def _shell(text: str) -> str:
    """A word of bash; line ends as $'\\n'."""
    if text.isprintable():
        return shlex.quote(text)
    return f"$'{text.encode('unicode_escape').decode().replace(chr(39), chr(92) + chr(39))}'"


def _number(value: Any, digits: int = 4) -> str:
    if not isinstance(value, (int, float)):
        return "-"
    return f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.2e}"


def size(n_bytes: int) -> str:
    """Bytes as a person reads them, in powers of 1000."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes} bytes"
