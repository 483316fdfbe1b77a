"""What a person reads before and after a training: what is about to run, and what came out."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from hippocampus import distributed
from hippocampus.config import Config
from hippocampus.errors import Stopped
from hippocampus.evaluation.evaluate import Evaluation
from hippocampus.evaluation.report import Report, Windows, make_report
from hippocampus.files import write_atomically
from hippocampus.generation.language_model import LanguageModel
from hippocampus.models.build_model import count_parameters
from hippocampus.models.halves import frozen_shapes, read_frozen, trained_shapes, whole
from hippocampus.models.trained_share import trained_share
from hippocampus.runs.checkpoints import Checkpoints
from hippocampus.runs.run_folder import RunFolder
from hippocampus.training import sharding
from hippocampus.training.console import RunConsole
from hippocampus.training.run_data import RunData
from hippocampus.training.signals import AGAIN, StopSignal


def greet(console: RunConsole, config: Config, folder: RunFolder, data: RunData,
           model: Any) -> None:
    """What is about to run."""
    console.say(f"{config.name}: {count_parameters(model):,} parameters, "
                f"{len(jax.devices())} x {jax.devices()[0].device_kind}, "
                f"{config.model.compute_dtype}, in {folder.path}")
    if share := trained_share(model, config):
        console.say(f"trained: {share}")
    for line in data.describe(config):
        console.say(line)


def conclude(console: RunConsole, config: Config, folder: RunFolder, data: RunData,
              model: Any, mesh: Mesh, checkpoints: Checkpoints, stop: StopSignal) -> None:
    """The best checkpoint against the n-gram lines, a text from it, and what to type next."""
    console.stop()
    checkpoints.wait()
    step = distributed.from_first(checkpoints.best_good() if distributed.is_first() else None)
    shapes = trained_shapes(model)
    like = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes,
                        sharding.tree_shardings(mesh, shapes, config.mesh.rules))
    trees = {"raw": "params", **({"ema": "ema"} if config.ema.decay else {})}
    windows, scored = data.windows(config, 0), {}

    def place(batch: Any) -> Any:
        if number := stop.here():
            raise Stopped(f"{number.name}: nothing was left to save", AGAIN)
        return sharding.to_devices(batch, mesh)

    frozen = read_frozen(model, config, sharding.tree_shardings(
        mesh, frozen_shapes(model, config), config.mesh.rules))
    for name, tree in trees.items():  # the last one is the one that counts
        params = whole(model, checkpoints.restore(step, {tree: like})[tree], frozen)
        with sharding.around(mesh):
            scored[name] = data.score(model, params, windows, place)
    params = sharding.to_one_device(params, mesh)
    if not distributed.is_first():
        return
    best = LanguageModel(model, params, data.tokenizer, config, step)
    report = _report(config, folder, data, scored, step)
    console.show(report.render())
    text = generate_sample(best, config)
    folder.samples.mkdir(exist_ok=True)
    write_atomically(folder.samples / "best.txt", config.sample.prompt + text)
    console.sample(best.step or 0, config.sample.prompt, text)
    results = {"step": best.step, **eval_values("final", scored),
               "context": windows.context, "stride": windows.stride or windows.context,
               "evaluation": str(report.write(folder.evaluations).relative_to(folder.path))}
    write_atomically(folder.results, json.dumps(results, indent=2) + "\n")  # last: it is concluded
    console.say("next:")
    console.say(f"  {_python()} -m hippocampus.sample --workdir={folder.path} "
                f"--prompt={shlex.quote(config.sample.prompt)}")
    console.say(f"  {_python()} -m hippocampus.probe --workdir={folder.path}")
    console.say(f"  tensorboard --logdir={folder.path}      (pip install tensorboard)")
    console.say("  go on: the same command with a larger --config.train.steps")


def eval_values(prefix: str, scored: Mapping[str, Evaluation]) -> dict[str, float]:
    """The series of an evaluation; the averaged weights are the ones that count, if there are."""
    best = scored.get("ema", scored["raw"])
    values = {}
    for weights, found in (("", best), ("_raw", scored["raw"])):
        values[f"{prefix}/loss{weights}"] = found.nats_per_token
        for name, value in (("bits_per_byte", found.bits_per_byte), ("accuracy", found.accuracy)):
            if value is not None:
                values[f"{prefix}/{name}{weights}"] = value
    for part, score in best.parts.items():
        values[f"{prefix}/accuracy_{part}"] = score.accuracy
    if best.word_perplexity is not None:
        values[f"{prefix}/word_perplexity"] = best.word_perplexity
    if best.skip_nats_per_token is not None:
        values[f"{prefix}/loss_skip"] = best.skip_nats_per_token
    return values


def generate_sample(lm: LanguageModel, config: Config) -> str:
    """The sample that a config asks for, without its prompt."""
    sample = config.sample
    length = int(min(sample.max_new_tokens, lm.room(sample.prompt)))
    return lm.generate(sample.prompt, max_new_tokens=length, top_k=sample.top_k,
                       temperature=sample.temperature, seed=config.train.seed)


def _report(config: Config, folder: RunFolder, data: RunData,
            scored: Mapping[str, Evaluation], step: int | None) -> Report:
    """The evaluation at the end, as `python -m hippocampus.evaluate` makes it."""
    text = data.held_out(config.data.documents == "packed")
    return make_report(scored, text, Windows.of(config), data.lines(), data.line_notes(),
                       config=config, step=step, run=folder.path)


def _python() -> str:
    """This interpreter, as a person would type it from here."""
    here = Path(sys.executable)
    return str(here.relative_to(Path.cwd())) if here.is_relative_to(Path.cwd()) else "python"
