"""Run folders as training and probing leave them, made by hand for the tests of the report."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import tiny_run

from hippocampus.config_files import to_json
from hippocampus.devices import resolve
from hippocampus.evaluation.result_table import Column, Protocol, ResultTable
from hippocampus.probing.plots import HEAT, INK, PATH_COLORS, SERIES, themed_svg
from hippocampus.probing.results import Plot, SuiteResult, TokenText, write_suite

TOKENIZER, TEXT = "b" * 64, "t" * 64
COUNTED = {"uniform": 5.5452, "unigram": 3.3, "bigram": 2.6334, "trigram": 2.0536}
PROTOCOL = Protocol("text.txt", TEXT, "validation", 8192, "bytes", TOKENIZER, 256, 128, 128,
                    "joined", "ema", 600)
ABOUT = {"version": "0.1.0", "commit": "0123456789ab", "command":
         ["probe.py", "--workdir=run", "--suite=paths"], "devices": ["cpu"], "run": "run",
         "config": "tiny", "step": 600, "weights": "ema", "seed": 0}


def training_row(step: int, steps: int, noise: float = 0.1) -> dict[str, Any]:
    """A row of metrics.jsonl with every series that a hybrid has."""
    done = step / steps
    loss = 1.5 + 4 * math.exp(-8 * done) + noise * math.sin(12.9898 * step)
    ssm = 1 / 3 + 0.3 * done
    return {
        "step": step, "train/loss": loss, "train/total": 1.3 * loss, "train/z": 50 + loss,
        "train/smoothing": loss + 1, "train/flow_segment": 1 - 0.5 * done,
        "train/flow_depth": 0.3, "train/nll_segment_1": loss + 0.2, "train/grad_norm": 0.3 + loss,
        "train/learning_rate": 1e-3 * (1 - done), "train/skipped": float(step > steps / 2),
        "train/skipped_in_a_row": 0.0, "train/tokens_per_second": 7000.0 + step % 7,
        "train/mfu": 0.4, "train/peak_memory_gib": 12.5, "mixer/gate/ssm": ssm,
        "mixer/gate/hopfield": (1 - ssm) / 2, "mixer/gate/attention": (1 - ssm) / 2,
        "mixer/entropy": 1.0 - 0.4 * done, "hopfield/depth": 1.5, "memory/of_tomorrow": done,
        "time/training": 100 * done, "time/start": 4.0, "time/compile": 9.0,
        "time/data": 1.0, "time/checkpoint": 0.5, "time/evaluation": 5.0 * done,
        "time/samples": 2.0, "time/lost": 0.0}


def evaluation_row(step: int, steps: int, prefix: str = "eval") -> dict[str, Any]:
    """The series of an evaluation."""
    loss = 1.6 + 4 * math.exp(-7 * step / steps)
    raw = loss + 0.05 * math.exp(-step / steps)
    return {"step": step, f"{prefix}/loss": loss, f"{prefix}/loss_raw": raw,
            f"{prefix}/bits_per_byte": loss / math.log(2),
            f"{prefix}/bits_per_byte_raw": raw / math.log(2),
            f"{prefix}/word_perplexity": 6000.0, f"{prefix}/loss_skip": loss + 0.1}


def evaluation(step: int = 600, nats: float = 1.6, **changes: Any) -> dict[str, Any]:
    """A file of evaluations/."""
    def row(name: str, value: float, kind: str, weights: str | None) -> dict[str, Any]:
        return {"model": name, "kind": kind, "weights": weights, "nats_per_token": value,
                "perplexity": math.exp(value), "bits_per_byte": value / math.log(2),
                "word_perplexity": math.exp(5 * value), "skip_nats_per_token": None,
                "worse_than_unigram": None if kind == "line" else value > COUNTED["unigram"]}

    rows = [row(name, value, "line", None) for name, value in COUNTED.items()]
    rows.append(row("this model, average weights", nats, "model", "ema"))
    return {"format": 1, "version": "0.1.0", "commit": "0123456789ab", "devices": ["cpu"],
            "command": ["evaluate.py", "--workdir=run", "--stride=32"], "run": "run",
            "config": "tiny", "step": step,
            "text": {"corpus": "text.txt", "digest": TEXT, "split": "validation", "tokens": 8192,
                     "bytes": 8192, "words": 1500, "unknown": 0, "unknown_rate": 0.0},
            "tokenizer": {"kind": "bytes", "digest": TOKENIZER, "vocabulary": 256},
            "windows": {"context": 128, "stride": 128, "batch_size": 8, "documents": "joined",
                        "trained_context": 128},
            "rows": rows, "notes": ["counted on all 1,000 training tokens"], **changes}


def make_run(folder: Path, steps: int = 600, finished: bool = True, every: int = 10,
             **changes: Any) -> Path:
    """What training leaves behind, less the weights."""
    folder.mkdir(parents=True)
    config, automatic = resolve(tiny_run.config(train__steps=steps, data__context=128, **changes))
    (folder / "config.json").write_text(to_json(config, automatic))
    (folder / "data.json").write_text(json.dumps({
        "corpus": "text.txt", "sha256": TEXT, "tokenizer": TOKENIZER, "train_tokens": 1000,
        "train_bytes": 1000, "validation_tokens": 100, "validation_bytes": 100}))
    (folder / "env.json").write_text(json.dumps({
        "python": "3.11.7", "platform": "Linux", "packages": {"hippocampus": "0.1.0",
        "jax": "0.10.2"}, "commit": "0123456789ab", "devices": ["NVIDIA H100"] * 2,
        "command": ["train.py", "--config=configs/tiny.py"], "cpu_count": 16}))
    done = steps if finished else steps // 2
    rows = []
    for step in range(every, done + 1, every):
        rows.append(training_row(step, steps))
        if step % (steps // 6) == 0:
            rows.append(evaluation_row(step, steps))
    write_metrics(folder, rows)
    (folder / "samples").mkdir()
    for step in range(100, done, 100):
        (folder / "samples" / f"{step}.txt").write_text(f"the text after {step} steps\n")
    if finished:
        (folder / "evaluations").mkdir()
        name = "validation-step600-c128-s128.json"
        (folder / "evaluations" / name).write_text(json.dumps(evaluation()))
        (folder / "samples" / "best.txt").write_text("the cat sat on the mat\n" * 6)
        final = evaluation_row(steps, steps, "final")
        (folder / "results.json").write_text(json.dumps(
            {**final, "context": 128, "stride": 128, "evaluation": f"evaluations/{name}"}))
    return folder


def make_lean_run(folder: Path) -> Path:
    """A run with few series, whose page takes a fraction of a second."""
    run = make_run(folder)
    write_metrics(run, [{"step": step, "train/loss": 2.0 + 1 / step} for step in (10, 20, 30)])
    return run


def write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------- what probes leave behind

def add_probes(folder: Path) -> list[SuiteResult]:
    """Suites with everything that a page can show, written to probes/."""
    suites = [knock_outs(), views(), texts()]
    for suite in suites:
        write_suite(folder / "probes", suite, ABOUT)
    return suites


def knock_outs() -> SuiteResult:
    """A wide table in categories, with a flagged row, and bars."""
    damage = {"baseline": 0.0, "only_ssm": 0.31, "only_hop": 2.4, "only_attn": 1.2,
              "ssm+hop": 0.2, "ssm+attn": 0.05, "hop+attn": 0.9}
    categories = {"baseline": "baseline"}
    rows = tuple({"name": name, "category": categories.get(name, "knockout"), "loss": 1.6 + change,
                  "bits_per_byte": (1.6 + change) / math.log(2), "perplexity": math.exp(
                      1.6 + change),
                  "delta": change, "delta_stderr": 0.004, "contribution": None if not change
                  else 0.4, "delta_per_contribution": None if not change else change / 0.4,
                  "flag": "!" if change > 2 else ""} for name, change in damage.items())
    columns = (Column("name", "row"), Column("loss", "loss", "nats/token"),
               Column("bits_per_byte", "bits", "bits/byte"),
               Column("perplexity", "perplexity", "ppl/token", 2),
               Column("delta", "damage", "nats/token"), Column("delta_stderr", "standard error"),
               Column("contribution", "contribution"),
               Column("delta_per_contribution", "damage / contribution"))
    table = ResultTable("rows", "Paths knocked out", columns, rows, (PROTOCOL,),
                        ("gates of the kept paths are renormalised",))

    def bars(figure: Any) -> None:
        axes = figure.subplots()
        axes.barh(list(damage), list(damage.values()), color=SERIES[0], xerr=0.05,
                  error_kw={"ecolor": INK})
        axes.invert_yaxis()
        axes.set_xlabel("damage (nats per token)")

    plot = Plot("damage", "Damage", "Loss above the baseline; bars are standard errors.",
                themed_svg(bars))
    return SuiteResult("paths", "Which memory carries the prediction", (table,), (plot,), (), 4.2)


def views() -> SuiteResult:
    """A heat map, a small picture and a wide one."""
    rng = np.random.default_rng(0)

    def heat(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(False)
        shown = axes.imshow(rng.random((4, 64)), aspect="auto", cmap=HEAT, interpolation="nearest")
        axes.set_xlabel("token")
        axes.set_ylabel("layer")
        figure.colorbar(shown, ax=axes, label="gate of ssm")

    def lines(figure: Any) -> None:
        axes = figure.subplots()
        for path, color in PATH_COLORS.items():
            axes.plot(np.arange(4), rng.random(4), color=color, label=path, marker="o")
        axes.set_xlabel("layer")
        axes.legend()

    def wide(figure: Any) -> None:
        for i, axes in enumerate(figure.subplots(1, 4, sharey=True)):
            axes.hist(rng.normal(size=500), bins=30, color=SERIES[i])
            axes.set_title(f"layer {i}")

    return SuiteResult("gates", "Where the gates point", (), (
        Plot("heat", "Gates, layer by token", "One passage of 64 tokens.", themed_svg(heat)),
        Plot("mean", "Mean gate", "", themed_svg(lines, 4.0, 2.7)),
        Plot("histogram", "Distribution of a gate", "64 windows.", themed_svg(wide, 11.0, 2.8)),
    ), (), 3.0, ("the first layer has two paths only",))


def texts() -> SuiteResult:
    """Token texts: paths, and one class of a rising strength."""
    words = ("Return", " the", " cat", " of", " a", " mat", ".", "\n") * 12
    paths = TokenText("winner", "Which path wins", "Strength: how much more than an equal share.",
                      words, tuple(i % 3 for i in range(len(words))),
                      tuple((i % 10) / 9 for i in range(len(words))), ("ssm", "hop", "attn"))
    loss = TokenText("loss", "Loss of every token", "Strong: far above the mean.", words,
                     (0,) * len(words), tuple(i / len(words) for i in range(len(words))),
                     ("surprise",))
    return SuiteResult("tokens", "Token by token", (), (), (paths, loss), 0.7)
