"""Validation loss of several configs x seeds, trained side by side on one device.

    python benchmarks/seeds.py --seeds=3 --out=runs/equilibrium \\
        --configs=configs/equilibrium_shakespeare.py,configs/equilibrium_shakespeare.py:explicit

Every run is trained by a process of its own, as `python -m hippocampus.train` would; its result is
the whole validation split at the best step, with the weights that samples use. The processes share
the device's memory in equal parts and what has been compiled. After --minutes (or Ctrl-C) all of
them save and this command ends with 75: the same command goes on. The table is made of what is
there: results.csv, results.json and results.md in --out. Further --config.a.b=c change every
config. Differences are against the first config, seed by seed, with the 95 % interval of their mean
(Student's t). Steps that runs take side by side cost more than alone; the time of one step is a
matter of `benchmarks/train_step.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.side_by_side import fit_until_stopped, train_all
from hippocampus.config_files import load_config
from hippocampus.errors import EXIT_TRY_AGAIN, HippocampusError
from hippocampus.files import write_atomically
from hippocampus.verbs import take_overrides

RESULT = "result.json"


def main() -> int:
    """Trains what is not trained yet, and writes the table."""
    arguments, overrides = take_overrides(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", required=True, help="config files, separated by commas")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each config")
    parser.add_argument("--parallel", type=int, default=0, help="runs at once; 0 = all")
    parser.add_argument("--minutes", type=float, default=0, help="stop and save after; 0 = never")
    parser.add_argument("--out", default="runs", help="folder of the runs and tables")
    parser.add_argument("--only_table", action="store_true", help="train nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        return work(given.configs, Path(given.worker), overrides)
    # Refused before anything starts; the names are those that runs of their own would have.
    configs = {load_config(source, overrides).name: source for source in given.configs.split(",")}
    out = Path(given.out)
    runs = {(name, seed): out / name / f"seed_{seed}"
            for seed in range(given.seeds) for name in configs}
    code = 0
    if not given.only_table:
        code = train_all(
            lambda key: [__file__, f"--configs={configs[key[0]]}", f"--worker={runs[key]}",
                         *(f"--config.{field}={value}" for field, value in
                           {"train.seed": str(key[1]), **overrides}.items())],
            runs, result=RESULT, parallel=given.parallel, minutes=given.minutes)
    if rows := table(out, configs, given.seeds):
        write(out, rows)
        sys.stdout.write((out / "results.md").read_text())
    return code


def work(config: str, workdir: Path, overrides: Mapping[str, str]) -> int:
    """Trains one run to its end and scores it: what each process does."""
    if not fit_until_stopped(config, workdir, overrides):
        return EXIT_TRY_AGAIN
    write_atomically(workdir / RESULT, json.dumps(score(workdir), indent=2) + "\n")
    return 0


def score(workdir: Path) -> dict[str, Any]:
    """The best step's loss over the whole validation split, and what the run was."""
    from hippocampus.config_files import read_json
    from hippocampus.evaluation.stand_alone import Request, evaluate_run
    from hippocampus.models.build_model import build_model, count_parameters
    from hippocampus.models.flops import training_flops_per_token
    from hippocampus.models.trained_share import trained_share
    from hippocampus.runs.run_folder import environment, read_metrics

    config, _ = read_json(workdir / "config.json")
    model = build_model(config)
    share = trained_share(model, config)
    weights = "ema" if config.ema.decay else "raw"
    report, _ = evaluate_run(workdir, Request(weights=weights))
    row = next(row for row in report.table.rows if row.weights)
    metrics = read_metrics(workdir / "metrics.jsonl")
    sweeps = [row["solver/iterations"] for row in metrics if "solver/iterations" in row]
    return {"loss": row.nats_per_token, "step": report.about["step"], "weights": row.weights,
            "trained": share.trained if share else count_parameters(model),
            "flops_per_token": training_flops_per_token(config),
            "learning_rate": config.optimizer.learning_rate, "steps": config.train.steps,
            "tokens": config.train.steps * config.train.batch_size * config.data.context,
            "sweeps": statistics.fmean(sweeps[-10:]) if sweeps else None,
            "environment": environment()}


# ---------------------------------------------------------------- the table


def table(out: Path, configs: Mapping[str, str], seeds: int) -> list[dict[str, Any]]:
    """A row for each config: its losses, and how they differ from the first config's."""
    rows: list[dict[str, Any]] = []
    for name, source in configs.items():
        paths = {seed: out / name / f"seed_{seed}" / RESULT for seed in range(seeds)}
        found = {seed: json.loads(path.read_text()) for seed, path in paths.items()
                 if path.is_file()}
        if not found:
            continue
        one = next(iter(found.values()))
        losses = {seed: result["loss"] for seed, result in found.items()}
        reference = rows[0]["losses"] if rows else {}
        difference, interval = interval_of(
            [loss - reference[seed] for seed, loss in losses.items() if seed in reference])
        rows.append({
            "name": name, "config": source, "losses": losses,
            "loss_mean": statistics.fmean(losses.values()),
            "loss_sd": statistics.stdev(losses.values()) if len(losses) > 1 else None,
            "difference": difference, "interval": interval, "seeds": len(losses),
            "best_steps": [result["step"] for result in found.values()],
            **{field: one[field] for field in ("trained", "flops_per_token", "learning_rate",
                                               "steps", "tokens", "sweeps", "weights")},
            "commit": one["environment"]["commit"], "devices": one["environment"]["devices"]})
    return rows


def interval_of(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean, and half of its 95 % interval by Student's t; None where there are too few."""
    from scipy import stats

    if not values:
        return None, None
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * error


def write(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """results.json, results.csv and results.md."""
    from hippocampus.evaluation.tables import csv_text

    command = f"python benchmarks/seeds.py {' '.join(sys.argv[1:])}"
    content = {"format": 1, "command": command, "rows": rows}
    write_atomically(out / "results.json", json.dumps(content, indent=2) + "\n")
    flat = [{**row, "losses": " ".join(f"{seed}:{v:.6f}" for seed, v in row["losses"].items()),
             "best_steps": " ".join(map(str, row["best_steps"])),
             "devices": " ".join(row["devices"]), "command": command} for row in rows]
    write_atomically(out / "results.csv", csv_text(flat[0], flat))
    header = ["config", "trained", "MFLOP/token", "sweeps", "best step", "loss",
              f"against {rows[0]['name']}"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        sweeps = f"{row['sweeps']:.1f}" if row["sweeps"] is not None else ""
        cells = [row["name"], f"{row['trained']:,}", f"{row['flops_per_token'] / 1e6:,.1f}",
                 sweeps, "/".join(map(str, row["best_steps"])),
                 _with(row["loss_mean"], row["loss_sd"]),
                 "" if row is rows[0] else _with(row["difference"], row["interval"], "+")]
        lines.append(f"| {' | '.join(cells)} |")
    first, seeds = rows[0], sorted({row["seeds"] for row in rows})
    lines += ["", f"Nats per token of the whole validation split at the best step "
              f"({first['weights']} weights), mean ± sd over {'/'.join(map(str, seeds))} seeds; "
              f"difference: mean over seeds ± half of its 95 % interval. {first['steps']:,} steps "
              f"({first['tokens'] / 1e6:,.1f} million tokens) each, {first['devices'][0]}, commit "
              f"{first['commit']}.", "", f"    {command}", ""]
    write_atomically(out / "results.md", "\n".join(lines))


def _with(value: float | None, spread: float | None, sign: str = "") -> str:
    if value is None:
        return ""
    shown = f"{value:{sign}.4f}"
    return shown if spread is None else f"{shown} ± {spread:.4f}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HippocampusError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")
