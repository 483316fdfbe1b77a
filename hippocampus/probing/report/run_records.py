"""What the files of a run folder come to in a report: tables of evaluations, samples, trouble."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hippocampus.evaluation.result_table import FLAG, Column, Protocol, ResultTable
from hippocampus.exports.run_records import RunRecords
from hippocampus.probing.report.blocks import Block, Command, Folded, Listing, Note, command_line
from hippocampus.probing.report.series import is_finite, read_series
from hippocampus.runs.run_folder import RunFolder

_COLUMNS = (Column("model", "model"), Column("nats_per_token", "loss", "nats/token"),
            Column("perplexity", "perplexity", "ppl/token", 2),
            Column("bits_per_byte", "bits", "bits/byte"),
            Column("word_perplexity", "perplexity", "ppl/word", 2),
            Column("skip_nats_per_token", "skip path", "nats/token"))
_NAMES = {"ema": "average"}
_MOST_SAMPLES, _MOST_CHARACTERS = 12, 4000


def number(record: Mapping[str, Any], key: str) -> float | None:
    """A number of a record that may be damaged; None where there is none."""
    value = record.get(key)
    return value if is_finite(value) else None


def evaluation_table(content: Mapping[str, Any], name: str) -> ResultTable | None:
    """The table of a file of evaluations/; None for one that is damaged."""
    try:
        text, tokenizer, windows = (content[part] for part in ("text", "tokenizer", "windows"))
        step = number(content, "step")
        protocol = Protocol(
            Path(str(text["corpus"])).name, str(text["digest"]), str(text["split"]),
            int(text["tokens"]), str(tokenizer["kind"]), str(tokenizer["digest"]),
            int(tokenizer["vocabulary"]), int(windows["context"]), int(windows["stride"]),
            str(windows["documents"]), " and ".join(_weights(content["rows"])),
            None if step is None else int(step), float(text["unknown_rate"]))
        rows = tuple({"model": str(row["model"]),
                      FLAG: "!" if row.get("worse_than_unigram") else "",
                      **{column.key: number(row, column.key) for column in _COLUMNS[1:]}}
                     for row in content["rows"])
        used = tuple(column for column in _COLUMNS
                     if column.key == "model" or any(row[column.key] is not None for row in rows))
        title = (f"{protocol.text}, {protocol.split}" if protocol.split != "text"
                 else protocol.text)
        return ResultTable(name, f"{title}: step {protocol.step}, context {protocol.context}, "
                           f"stride {protocol.stride}", used, rows, (protocol,),
                           tuple(map(str, content.get("notes") or ())))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return None


def accuracy_table(content: Mapping[str, Any], main: ResultTable) -> ResultTable | None:
    """Right answers by kind of question, of a task that has some; None for another one."""
    found = content.get("accuracy")
    found = found if isinstance(found, dict) else {}
    by_weights = {str(weights): shares for weights, shares in found.items()
                  if isinstance(shares, dict)}
    kinds = dict.fromkeys(str(kind) for shares in by_weights.values() for kind in shares)
    if not kinds:
        return None
    columns = [Column(weights, f"{_NAMES.get(weights, weights)} weights", "share right", 4)
               for weights in by_weights]
    rows = tuple({"kind": kind, **{weights: number(shares, kind)
                                   for weights, shares in by_weights.items()}} for kind in kinds)
    return ResultTable(f"{main.name}_accuracy", "Right answers", (Column("kind", "kind"),
                       *columns), rows, main.protocols)


def _weights(rows: Any) -> list[str]:
    return list(dict.fromkeys(_NAMES.get(row["weights"], str(row["weights"])) for row in rows
                              if row.get("weights"))) or ["unknown"]


def evaluation_blocks(folder: RunFolder, records: RunRecords) -> list[Block]:
    """A table for every evaluation, the one at the end of training first."""
    first = Path(str(records.results.get("evaluation", ""))).name
    files = sorted(folder.evaluations.glob("*.json"), key=lambda p: (p.name != first, p.name))
    blocks: list[Block] = []
    for file in files:
        content = read_any(file)
        found = evaluation_table(content, file.stem) if isinstance(content, dict) else None
        if found is None:
            blocks.append(Note(f"{file.name} is damaged and not shown", "warning"))
            continue
        blocks.append(found)
        if accuracy := accuracy_table(content, found):
            blocks.append(accuracy)
        if command := command_line(content.get("command")):
            blocks.append(Command(command))
    return blocks


def counted_lines(folder: RunFolder, records: RunRecords) -> tuple[dict[str, float], float | None]:
    """The count-based lines of the validation split, and its bytes per token.

    Returns:
      Nats per token by name, in the order of the file; bytes per token, None where not known.
    """
    first = str(records.results.get("evaluation", ""))
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        wanted = read_any(folder.path / "evaluations" / Path(first).name) if first else None
        for content in ([wanted] if isinstance(wanted, dict) else records.evaluations):
            text = content["text"]
            if text["split"] == "validation" and content["tokenizer"]["digest"] == (
                    records.data.get("tokenizer")):
                size, tokens = number(text, "bytes"), number(text, "tokens")
                return {str(row["model"]): value for row in content["rows"]
                        if row["kind"] == "line"
                        and (value := number(row, "nats_per_token")) is not None
                        }, size / tokens if size and tokens else None
    tokens = number(records.data, "validation_tokens")
    size = number(records.data, "validation_bytes")
    return {}, size / tokens if tokens and size else None


def sample_blocks(folder: RunFolder, prompt: str) -> list[Block]:
    """The text of the best checkpoint, and those written on the way, folded."""
    blocks: list[Block] = []
    best = folder.samples / "best.txt"
    if best.is_file():
        blocks.append(_sample(best, prompt, "From the best checkpoint"))
    steps = sorted((p for p in folder.samples.glob("*.txt") if re.fullmatch(r"\d{1,12}", p.stem)),
                   key=lambda path: int(path.stem))
    kept = steps if len(steps) <= _MOST_SAMPLES else [
        steps[round(i * (len(steps) - 1) / (_MOST_SAMPLES - 1))] for i in range(_MOST_SAMPLES)]
    blocks += [Folded(f"After step {int(path.stem):,}", (_sample(path, prompt),)) for path in kept]
    if len(kept) < len(steps):
        blocks.append(Note(f"{len(kept)} of {len(steps)} samples, evenly spaced; all are in "
                           "samples/"))
    return blocks


def _sample(path: Path, prompt: str, title: str = "") -> Listing:
    try:
        text = path.read_bytes()[:4 * _MOST_CHARACTERS].decode("utf-8", "replace")
    except OSError:
        text = ""
    strong = len(prompt) if prompt.strip() and text.startswith(prompt) else 0
    more = "…" if len(text) > _MOST_CHARACTERS else ""
    return Listing(text[:_MOST_CHARACTERS] + more, title, strong)


def trouble(folder: RunFolder, rows: Sequence[Mapping[str, Any]]) -> list[Note]:
    """What went wrong on the way: rollbacks, bad batches, hangs, steps that were skipped."""
    notes = []
    skipped = read_series(rows, "train/skipped")
    if len(skipped) and skipped.values.max() > 0:
        notes.append(f"steps skipped: {skipped.values.max():,.0f}, whose loss or gradient was not "
                     "finite, or a spike")
    if broken := read_series(rows, "train/loss").broken:
        notes.append(f"no finite loss: {broken:,} logged steps")
    records = read_any(folder.rollbacks)
    for record in records if isinstance(records, list) else ():
        if isinstance(record, dict):
            notes.append(f"went back from step {record.get('at')} to step {record.get('to')}, past "
                         "the batches in between")
    for place, what in ((folder.bad_batches, "bad batches are kept in"),
                        (folder.path / "stacks", "records of a run that hung are in")):
        files = sorted(p.name for p in place.glob("*") if p.suffix != ".npz")
        if files:
            more = ", …" if len(files) > 3 else ""
            notes.append(f"{what} {place.name}/: {', '.join(files[:3])}{more}")
    return [Note(text, "warning") for text in notes]


def read_any(path: Path) -> Any:
    """The content of a JSON file; None where there is none or it is damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return json.loads(path.read_text("utf-8"))
    return None
