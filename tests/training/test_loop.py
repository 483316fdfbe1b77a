"""Whole runs: what a run leaves behind, and that a stopped one ends like one never stopped."""

import json
import shutil
import signal
import struct
import subprocess
from pathlib import Path

import pytest
import tiny_run
from tiny_run import STEPS, assert_same_run, finish

from hippocampus.errors import ConfigError, DataError, HippocampusError
from hippocampus.runs import step_folders
from hippocampus.runs.run_folder import RunFolder, RunLock, read_metrics
from hippocampus.training import loop
from hippocampus.training.loop import fit
from hippocampus.training.resume import check_resumable


def stop(workdir: Path, number: signal.Signals, after_rows: int) -> tuple[int, str]:
    """Starts the run and sends a signal after some rows; returns exit code and stderr."""
    process = subprocess.Popen(
        tiny_run.slowly(tiny_run.command(workdir, **tiny_run.LONG)), text=True,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=tiny_run.environment())
    try:
        tiny_run.wait_for(lambda: len(read_metrics(workdir / "metrics.jsonl")) >= after_rows,
                          process)
        process.send_signal(number)
        return process.wait(60), process.communicate()[1]
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def uninterrupted() -> Path:
    return tiny_run.uninterrupted()


def test_run_stopped_by_sigterm_saves_exits_75_and_ends_bit_for_bit_like_one_never_stopped(
        tmp_path, uninterrupted):
    code, stderr = stop(tmp_path / "run", signal.SIGTERM, after_rows=7)
    assert code == 75
    first, second = stderr.splitlines()[-2:]
    step = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert first == f"stopped: SIGTERM at step {step}: everything is saved"
    assert second.startswith("hint: ")
    assert (tmp_path / "run" / "steps" / str(step)).is_dir()
    assert f"going on from step {step}" in finish(tmp_path / "run")
    assert_same_run(tmp_path / "run", uninterrupted)


def test_longer_run_goes_on_with_a_note(tmp_path, uninterrupted):
    shutil.copytree(uninterrupted, tmp_path / "run")
    printed = finish(tmp_path / "run", train__steps=STEPS + 3)
    assert f"note: train.steps was {STEPS}, is {STEPS + 3}" in printed
    assert f"going on from step {STEPS}" in printed
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, STEPS + 4))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["step"] <= STEPS + 3


# ---------------------------------------------------------------- what a finished run leaves

@pytest.fixture(scope="module")
def trained() -> Path:
    return tiny_run.trained()


def trained_config(**changes):
    from hippocampus.config_files import read_json

    config, _ = read_json(tiny_run.trained() / "config.json")
    return tiny_run.config(**{
        "model__paths": config.model.paths, "model__hopfield__depth_schedule": (2,),
        "train__steps": 12, **changes})


def test_metrics_have_the_documented_series_once_per_step(trained):
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for name in ("train/loss", "train/tokens_per_second", "train/grad_norm", "train/learning_rate",
                 "eval/loss", "eval/bits_per_byte", "mixer/gate/hopfield", "mixer/gate/attention",
                 "mixer/entropy"):
        steps = [row["step"] for row in rows if name in row]
        assert steps and steps == sorted(set(steps)), name
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in rows if "eval/loss" in row] == [4, 8, 12]
    assert all("/" in name for row in rows for name in set(row) - {"step"})
    gates = next(row for row in rows if "mixer/gate/hopfield" in row)
    assert sum(gates[f"mixer/gate/{path}"] for path in tiny_run.PATHS) == pytest.approx(1, abs=1e-5)


def test_training_learns(trained):
    losses = [row["train/loss"] for row in read_metrics(trained / "metrics.jsonl")
              if "train/loss" in row]
    assert losses[-1] < losses[0] - 0.3


def test_evaluation_scores_raw_and_averaged_weights(trained):
    rows = [row for row in read_metrics(trained / "metrics.jsonl") if "eval/loss" in row]
    for row in rows:
        assert row["eval/loss"] != row["eval/loss_raw"]
        # Bytes are the tokens here.
        assert row["eval/bits_per_byte"] == pytest.approx(row["eval/loss"] / 0.6931471805599453)


def test_results_are_those_of_the_best_step(trained):
    results = json.loads((trained / "results.json").read_text())
    evaluated = {row["step"]: row["eval/loss"] for row in read_metrics(trained / "metrics.jsonl")
                 if "eval/loss" in row}
    assert results["step"] == min(evaluated, key=evaluated.get)
    assert {"final/loss", "final/bits_per_byte", "final/loss_raw"} <= set(results)


def test_best_and_latest_checkpoints_are_kept(trained):
    from hippocampus.runs.checkpoints import Checkpoints

    with Checkpoints(trained / "steps") as checkpoints:
        assert checkpoints.latest == 12
        assert checkpoints.best == json.loads((trained / "results.json").read_text())["step"]
        assert set(checkpoints.steps) == {checkpoints.best, 12}


def test_best_checkpoint_survives_when_the_loss_rises(tmp_path):
    fit(tiny_run.config(train__steps=6, eval__every_steps=2, optimizer__learning_rate=50.0,
                        optimizer__warmup_steps=3, ema__decay=0.0, optimizer__clip_norm=0.0,
                        checkpoint__keep_latest=1), tmp_path / "run")
    from hippocampus.runs.checkpoints import Checkpoints

    losses = {row["step"]: row["eval/loss"] for row in
              read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval/loss" in row}
    best = min(losses, key=losses.get)
    assert best < 6, f"the loss was to rise: {losses}"
    with Checkpoints(tmp_path / "run" / "steps") as checkpoints:
        assert checkpoints.steps == [best, 6] and checkpoints.best == best
    assert "eval/loss_raw" in read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]


def test_samples_begin_with_the_prompt(trained):
    assert {p.name for p in (trained / "samples").iterdir()} == {"6.txt", "best.txt"}
    for path in (trained / "samples").iterdir():
        assert path.read_text().startswith("the ") and len(path.read_text()) > len("the ")


def test_run_folder_has_all_that_a_user_needs(trained):
    names = {p.name for p in trained.iterdir()}
    assert {"config.json", "env.json", "tokenizer.json", "metrics.jsonl", "steps", "samples",
            "results.json"} <= names
    saved = json.loads((trained / "config.json").read_text())
    assert saved["format"] == 1 and saved["model"]["vocab_size"] == 256
    assert '"auto"' not in (trained / "config.json").read_text()
    assert json.loads((trained / "env.json").read_text())["packages"]["jax"]
    assert not [name for name in names if name.endswith(".partial")]


def events(folder: Path) -> list:
    """The events of every TensorBoard file: length, checksum, message, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack("<Q", content[at:at + 8])
            found.append(Event.FromString(content[at + 12:at + 12 + length]))
            at += 16 + length
    return found


def test_tensorboard_has_the_same_series(trained):
    points = {}
    for event in events(trained):
        for value in event.summary.value:
            points.setdefault(value.tag, {})[event.step] = value.simple_value
    rows = read_metrics(trained / "metrics.jsonl")
    for name in ("train/loss", "eval/loss", "mixer/gate/hopfield"):
        wanted = {row["step"]: pytest.approx(row[name], rel=1e-6) for row in rows if name in row}
        assert points[name] == wanted, name
    assert any(tag.startswith("mixer/gate/hopfield/layer_0") for tag in points), "histograms"
    assert any(tag.startswith("sample") for tag in points), "texts"


# ---------------------------------------------------------------- starting a run again

def again(tmp_path, capsys, **changes) -> tuple[Path, str]:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run.trained(), folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    try:
        fit(trained_config(**changes), folder)
    except (ConfigError, DataError):
        after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
        assert after == before, "a refused start changed the run"
        raise
    return folder, capsys.readouterr().out


def test_finished_run_says_so_and_changes_no_number(tmp_path, capsys, trained):
    folder, out = again(tmp_path, capsys)
    assert "this run is finished (12 steps); raise train.steps to go on" in out
    assert "validation:" not in out  # nothing is evaluated a second time
    for name in ("metrics.jsonl", "results.json"):
        assert (folder / name).read_bytes() == (trained / name).read_bytes()


@pytest.mark.parametrize(("changes", "words"), [
    ({"optimizer__learning_rate": 0.5}, "optimizer.learning_rate = 0.01, not 0.5"),
    ({"model__d_model": 32}, "model.d_model = 16, not 32"),
    ({"train__seed": 1}, "train.seed = 0, not 1"),
    ({"model__ssm__backend": "sequential"}, "model.ssm.backend = 'chunked', not 'sequential'"),
])
def test_changed_field_is_refused_with_old_and_new(tmp_path, capsys, changes, words):
    with pytest.raises(ConfigError) as caught:
        again(tmp_path, capsys, **changes)
    assert caught.value.message.endswith(f"was trained with {words}")


def test_another_text_is_refused(tmp_path, capsys, monkeypatch):
    text = tmp_path / "other" / tiny_run.corpus().name
    text.parent.mkdir()
    text.write_text(tiny_run.corpus().read_text().replace("cat", "cow"))
    # The same name, so that only the text differs.
    real = loop.read_data
    monkeypatch.setattr(loop, "read_data", lambda config: real(
        tiny_run.config(data__corpus=str(text))))
    with pytest.raises(ConfigError, match="was trained on another text"):
        again(tmp_path, capsys)


def test_fields_that_may_change_and_what_a_device_decides(trained):
    folder = RunFolder(trained)
    from hippocampus.devices import resolve

    config, automatic = resolve(trained_config(
        eval__every_steps=3, log__every_steps=7, checkpoint__keep_latest=4, sample__top_k=3,
        train__grad_accumulation=2, name="other"))
    assert check_resumable(folder, config, automatic) == []
    other, automatic = resolve(trained_config(), device=_gpu())
    notes = check_resumable(folder, other, automatic)
    assert any("model.compute_dtype is bfloat16 on this device" in note for note in notes)


def _gpu():
    from hippocampus.devices import Device
    return Device("gpu", "NVIDIA H100", 9.0)


def test_constant_schedule_can_be_prolonged_without_a_note(tmp_path):
    from hippocampus.config_files import to_json

    folder = RunFolder(tmp_path)
    folder.config.write_text(to_json(tiny_run.config(optimizer__schedule="constant")))
    longer = tiny_run.config(optimizer__schedule="constant", train__steps=99)
    assert check_resumable(folder, longer, ()) == []


def test_occupied_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="not empty and not a run folder"):
        fit(tiny_run.config(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_folder_of_another_program_is_refused_and_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DataError):
        fit(tiny_run.config(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_locked_folder_is_refused_and_left_alone(tmp_path):
    lock = RunLock(RunFolder(tmp_path))
    done = tiny_run.run(tiny_run.command(tmp_path))
    lock.release()
    assert done.returncode == 64 and "is in use by process" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("content", [b"", b"abc\0" * 100, b"\xff" * 400, b"short"])
def test_bad_text_is_refused_before_anything_is_written(tmp_path, content):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(DataError):
        fit(tiny_run.config(data__corpus=str(tmp_path / "text.txt")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_default_folder_has_the_name_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "tiny").write_text("in the way")
    with pytest.raises(ConfigError, match="checkpoints/tiny is a file"):
        fit(tiny_run.config())


def test_folder_that_vanishes_while_it_trains_is_one_clear_line(tmp_path, monkeypatch):
    real = loop._step

    def step(run, state, step, batch, compiles):
        if step == 2:
            run.checkpoints.wait()  # tests/runs/test_disk.py moves it in the middle of a save
            run.folder.path.rename(tmp_path / "elsewhere")
        return real(run, state, step, batch, compiles)

    monkeypatch.setattr(loop, "_step", step)
    with pytest.raises(HippocampusError, match=r"the run folder .*run is gone") as caught:
        fit(tiny_run.config(checkpoint__every_steps=2, train__steps=8), tmp_path / "run")
    assert caught.value.exit_code == 1 and not (tmp_path / "run").exists()
    assert step_folders.damage(tmp_path / "elsewhere" / "steps" / "2") is None
