"""Accuracy on a recall task, models x seeds trained side by side on one device.

    python benchmarks/recall.py --config=configs/recall_mqar.py --seeds=3 --out=recall/mqar

Every run is trained by a process of its own, as `python -m hippocampus.train` would, and then
scored on all held-out kinds, those longer than its training context too. The processes share the
device's memory in equal parts and what has been compiled. After --minutes (or Ctrl-C) all of them
save and this command ends with 75: the same command goes on. The table is made of what is there:
results.csv, results.json and results.md in --out. Further --config.a.b=c change the config.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.side_by_side import fit_until_stopped, train_all
from hippocampus.config_files import load_config
from hippocampus.config_recall import held_out_kinds
from hippocampus.errors import EXIT_TRY_AGAIN, HippocampusError
from hippocampus.files import write_atomically
from hippocampus.verbs import take_overrides

MODELS = ("hybrid", "attention", "hopfield", "ssm")
ACCURACY = "accuracy.json"


def main() -> int:
    """Trains what is not trained yet, and writes the table."""
    arguments, overrides = take_overrides(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/recall_mqar.py", help="the experiment")
    parser.add_argument("--models", default=",".join(MODELS),
                        help="arguments that the config is called with")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model")
    parser.add_argument("--parallel", type=int, default=0, help="runs at once; 0 = all")
    parser.add_argument("--minutes", type=float, default=0, help="stop and save after; 0 = never")
    parser.add_argument("--out", default="recall", help="folder of the runs and tables")
    parser.add_argument("--only_table", action="store_true", help="train nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    out = Path(given.out)
    if given.worker:
        return work(given.config, Path(given.worker), overrides)
    runs = {(model, seed): out / model / f"seed_{seed}"
            for seed in range(given.seeds) for model in given.models.split(",")}
    for model in given.models.split(","):
        load_config(f"{given.config}:{model}", overrides)  # refuses before anything starts
    code = 0
    if not given.only_table:
        code = train_all(
            lambda key: [__file__, f"--config={given.config}:{key[0]}", f"--worker={runs[key]}",
                         *(f"--config.{name}={value}" for name, value in
                           {"train.seed": str(key[1]), **overrides}.items())],
            runs, result=ACCURACY, parallel=given.parallel, minutes=given.minutes)
    rows = table(runs)
    if rows:
        write(out, rows, given)
        sys.stdout.write((out / "results.md").read_text())
    return code


def work(config: str, workdir: Path, overrides: Mapping[str, str]) -> int:
    """Trains one run to its end and scores it: what each process does."""
    if not fit_until_stopped(config, workdir, overrides):
        return EXIT_TRY_AGAIN
    write_atomically(workdir / ACCURACY, json.dumps(score(workdir), indent=2) + "\n")
    return 0


def score(workdir: Path) -> dict[str, Any]:
    """Accuracy and loss of every held-out kind, each in rows as long as its examples need."""
    from hippocampus.evaluation.evaluate import evaluate
    from hippocampus.evaluation.recall_text import recall_text
    from hippocampus.generation.loading import load
    from hippocampus.models.build_model import count_parameters
    from hippocampus.runs.run_folder import environment, read_metrics

    lm = load(workdir)
    config, kinds = lm.config, {}
    text = recall_text(config.data, "test", lm.tokenizer)
    for kind in held_out_kinds(config.data.recall):
        context = max(kind.length, config.data.context)
        rows = max(1, config.eval.batch_size * config.data.context // context)
        windows = text.of_kinds([kind]).windows(context, 0, rows)
        found = evaluate(lm.model, lm.params, windows, None, parts=windows.parts)
        kinds[kind.name] = {"length": kind.length, "pairs": kind.pairs, "answers": found.tokens,
                            "accuracy": found.accuracy, "nats_per_token": found.nats_per_token}
    metrics = read_metrics(workdir / "metrics.jsonl")
    speed = [row["train/tokens_per_second"] for row in metrics
             if "train/tokens_per_second" in row]
    return {"step": lm.step, "parameters": count_parameters(lm.model), "kinds": kinds,
            "learning_rate": config.optimizer.learning_rate, "steps": config.train.steps,
            "tokens": config.train.steps * config.train.batch_size * config.data.context,
            "compute_dtype": config.model.compute_dtype,
            "tokens_per_second": statistics.median(speed) if speed else None,
            "environment": environment()}


# ---------------------------------------------------------------- the table


def table(runs: Mapping[tuple[str, int], Path]) -> list[dict[str, Any]]:
    """A row for each model and kind: accuracies of the seeds, their mean and deviation."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for (model, seed), path in runs.items():
        if (path / ACCURACY).is_file():
            found.setdefault(model, {})[seed] = json.loads((path / ACCURACY).read_text())
    rows = []
    for model, seeds in found.items():
        one = next(iter(seeds.values()))
        for kind, of_kind in one["kinds"].items():
            values = [result["kinds"][kind]["accuracy"] for result in seeds.values()]
            rows.append({
                "model": model, "kind": kind, "length": of_kind["length"],
                "pairs": of_kind["pairs"], "accuracy_mean": statistics.fmean(values),
                "accuracy_sd": statistics.stdev(values) if len(values) > 1 else None,
                "seeds": len(values), "accuracies": values, "answers": of_kind["answers"],
                **{name: one[name] for name in ("parameters", "learning_rate", "steps", "tokens")},
                "commit": one["environment"]["commit"], "devices": one["environment"]["devices"]})
    return rows


def write(out: Path, rows: Sequence[Mapping[str, Any]], given: argparse.Namespace) -> None:
    """results.json, results.csv and results.md."""
    from hippocampus.evaluation.tables import csv_text

    command = f"python benchmarks/recall.py {' '.join(sys.argv[1:])}"
    content = {"format": 1, "config": given.config, "command": command, "rows": rows}
    write_atomically(out / "results.json", json.dumps(content, indent=2) + "\n")
    flat = [{**row, "accuracies": " ".join(f"{v:.6f}" for v in row["accuracies"]),
             "devices": " ".join(row["devices"]), "command": command} for row in rows]
    write_atomically(out / "results.csv", csv_text(flat[0], flat))
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    header = ["model", "parameters", "learning rate", *(kind.replace("x", "/") for kind in kinds)]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = {row["kind"]: row for row in rows if row["model"] == model}
        one = next(iter(of_model.values()))
        cells = [model, f"{one['parameters']:,}", f"{one['learning_rate']:g}",
                 *(_cell(of_model[kind]) for kind in kinds)]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = sorted({row["seeds"] for row in rows})
    first = rows[0]
    lines += ["", f"Share of right answers in %, mean ± sd over {'/'.join(map(str, seeds))} seeds; "
              f"tokens of an example / pairs. {given.config}, {first['steps']:,} steps "
              f"({first['tokens'] / 1e6:,.0f} million tokens) each, {first['devices'][0]}, commit "
              f"{first['commit']}.", "", f"    {command}", ""]
    write_atomically(out / "results.md", "\n".join(lines))


def _cell(row: Mapping[str, Any]) -> str:
    mean = f"{100 * row['accuracy_mean']:.1f}"
    return mean if row["accuracy_sd"] is None else f"{mean} ± {100 * row['accuracy_sd']:.1f}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HippocampusError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")
