"""Whole runs of a CHopT: what is trained, what stays, how far gradients reach, and going on."""

import json
import shutil
from pathlib import Path

import chopt_run
import jax
import numpy as np
import pytest
from chopt_run import CHUNK
from tiny_run import fit_quietly

import hippocampus.evaluate
import hippocampus.export
import hippocampus.sample
from hippocampus.backbones.loading import load_backbone, weights_digest
from hippocampus.config import StoriesConfig
from hippocampus.data.batches import Batch
from hippocampus.devices import resolve
from hippocampus.errors import CheckpointError, ConfigError, DataError
from hippocampus.evaluation.story_scores import find_stories, score_stories, story_text
from hippocampus.generation.loading import load
from hippocampus.models.build_model import build_model
from hippocampus.models.halves import whole
from hippocampus.runs.run_folder import read_metrics
from hippocampus.training.data import read_data
from hippocampus.training.loop import fit
from hippocampus.training.losses import training_loss
from hippocampus.training.opening import from_files, with_architecture
from hippocampus.training.optimizer import build_optimizer
from hippocampus.training.sharding import make_mesh
from hippocampus.training.step import sharded_init, train_step

pytestmark = pytest.mark.usefixtures("quick_compiles")

HALF = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return fit_quietly(chopt_run.config(checkpoint__every_steps=HALF, checkpoint__keep_latest=9),
                   tmp_path_factory.mktemp("chopt") / "run")


def names(tree) -> set[str]:
    return {"/".join(str(entry.key) for entry in path)
            for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def test_adapters_and_memory_are_trained_and_the_decoder_is_not_touched(run):
    lm = load(run, weights="raw")
    before = load_backbone(chopt_run.decoder())
    found = names(lm.params)
    assert any("lora_b" in name for name in found)
    plain = {name: leaf for name, leaf in jax.tree_util.tree_leaves_with_path(
        lm.params["backbone"]) if "lora" not in str(name)}
    for (path, wanted), leaf in zip(jax.tree_util.tree_leaves_with_path(before.params),
                                    plain.values(), strict=True):
        assert np.array_equal(wanted, leaf), path
    b = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(lm.params)
         if "lora_b" in str(path)]
    assert b and all(np.abs(leaf).max() > 0 for leaf in b)  # they start at zero
    assert lm.params["memory_bank"]["read_gate"] != 0
    assert before.tokenizer.digest == lm.tokenizer.digest and lm.tokenizer.end_ids == (10,)


def test_checkpoints_hold_what_is_trained_alone(run):
    for tree in ("params", "ema", "optimizer"):
        names = (run / "steps" / "6" / tree / "_METADATA").read_text()
        assert "memory_bank" in names and "lora_a" in names and "embedding" not in names


def test_a_run_goes_on_bit_for_bit_with_the_memories_it_carried(run, tmp_path):
    killed = shutil.copytree(run, tmp_path / "killed")
    for step in (killed / "steps").iterdir():
        if step.name.isdecimal() and int(step.name) > HALF:
            shutil.rmtree(step)
    (killed / "results.json").unlink()
    fit_quietly(chopt_run.config(checkpoint__every_steps=HALF, checkpoint__keep_latest=9), killed)
    for folder in (run, killed):
        rows = [{name: value for name, value in row.items() if "time" not in name
                 and "per_second" not in name and "mfu" not in name}
                for row in read_metrics(folder / "metrics.jsonl")]
        if folder == run:
            wanted = rows
    assert rows == wanted and len(rows) > HALF
    for one, other in zip(jax.tree.leaves(load(run).params), jax.tree.leaves(load(killed).params),
                          strict=True):
        assert np.array_equal(one, other)


def one_step(config):
    """The state before and after the first step of a run, both whole."""
    config, _ = resolve(with_architecture(config))
    model, data = build_model(config), read_data(config)
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    mesh = make_mesh(config.mesh)
    make, like, _ = sharded_init(model, optimizer, config, mesh)
    before = from_files(config, model, like, make, True)
    after, _ = jax.jit(train_step(model, optimizer, config))(before, data.batches(config).batch(0))
    return [whole(model, state.params, state.frozen) for state in (before, after)], after


@pytest.mark.parametrize("kind", ["none", "full"])
def test_what_is_trained_is_a_choice(kind):
    (before, after), _ = one_step(chopt_run.config(
        model__backbone__train=kind, model__lora__rank=8, optimizer__warmup_steps=0))
    files = load_backbone(chopt_run.decoder()).params
    for wanted, leaf in zip(jax.tree.leaves(files), jax.tree.leaves(before["backbone"]),
                            strict=True):
        assert np.array_equal(wanted, leaf)  # it begins as the files say
    same = [np.array_equal(a, b) for a, b in zip(
        jax.tree.leaves(files), jax.tree.leaves(after["backbone"]), strict=True)]
    assert all(same) if kind == "none" else not any(same)
    assert after["memory_bank"]["read_gate"] != before["memory_bank"]["read_gate"]


def test_another_decoder_is_refused_and_a_missing_one_is_named(run, tmp_path):
    moved = shutil.copytree(run, tmp_path / "run")
    config = json.loads((moved / "config.json").read_text())
    config["model"]["backbone"]["path"] = str(chopt_run.decoder(1))
    (moved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is not the decoder that the run"):
        load(moved)
    with pytest.raises(CheckpointError, match="is not the decoder that the run"):
        fit(chopt_run.config(model__backbone__path=str(chopt_run.decoder(1)), train__steps=8),
            moved)
    copy = shutil.copytree(chopt_run.decoder(), tmp_path / "copy")
    # The same one elsewhere.
    fit_quietly(chopt_run.config(model__backbone__path=str(copy)), moved)
    config = json.loads((moved / "config.json").read_text())
    assert config["model"]["backbone"]["path"] == str(copy)
    config["model"]["backbone"]["path"] = str(tmp_path / "nowhere")
    (moved / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="no pretrained model at"):
        load(moved)
    assert weights_digest(chopt_run.decoder()) != weights_digest(chopt_run.decoder(1))


@pytest.mark.parametrize(("field", "value", "said"), [
    ("data__tokenizer", "bytes", "data.tokenizer=backbone"),
    ("model__chunk", 48, "model.chunk"),
    ("mesh__sequence", 2, "mesh.data"),
    ("model__backbone__train", "none", "model.backbone.train=lora"),
    ("data__stories__template", "{answer}", "once each"),
    ("model__memory__n_heads", 3, "model.memory.n_heads"),
    ("model__backbone__path", "", "--config.model.backbone.path")])
def test_what_does_not_go_together_is_refused_before_anything_is_read(field, value, said, tmp_path):
    with pytest.raises(ConfigError) as error:
        fit(chopt_run.config(**{field: value}), tmp_path / "run")
    assert said in f"{error.value}" and not (tmp_path / "run").exists()


def test_stories_need_a_decoder():
    from hippocampus.config_files import defaults, load_config

    with pytest.raises(ConfigError, match="no pretrained decoder"):
        load_config(defaults("hybrid"), {"data.form": "stories"})


@pytest.fixture(scope="module")
def parts():
    """Config, model, data, and parameters with an open gate."""
    config, _ = resolve(with_architecture(chopt_run.config(
        model__backbone__train="none", model__lora__rank=8, data__stories__story_weight=0.0)))
    model, data = build_model(config), read_data(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    rng = np.random.default_rng(1)
    bank = jax.tree.map(lambda leaf: rng.normal(
        scale=0.3, size=leaf.shape).astype(leaf.dtype), shapes["memory_bank"])
    bank["read_gate"] = np.float32(0.9)
    return config, model, data, {"memory_bank": bank}, {
        "backbone": load_backbone(chopt_run.decoder()).params}


def test_gradients_reach_from_an_answer_into_the_writes_of_its_row_and_end_there(parts):
    """A key is only ever written: its gradient came through the memory."""
    config, model, data, trained, frozen = parts
    streams = data.batches(config).streams

    @jax.jit
    def gradient(trained, batch, carried):
        def loss(trained):
            total, (_, _, after) = training_loss(model, whole(model, trained, frozen), batch,
                                                 jax.random.key(0), config, carried)
            return total, after
        grads, after = jax.grad(loss, has_aux=True)(trained)
        return grads["memory_bank"]["key"]["kernel"], after

    from hippocampus.data.story_chunks import joined

    told = next(i for i in range(99) if streams.batch(i + 1).question_B.all()
                and not streams.batch(i).question_B.any())
    together, _ = gradient(trained, joined([streams.batch(told), streams.batch(told + 1)]),
                           model.init_state(streams.batch(told)))
    assert np.abs(together).max() > 0
    carried = model.init_state(streams.batch(told))
    blank = jax.tree.map(np.zeros_like, streams.batch(told))
    _, carried = gradient(trained, joined([streams.batch(told), blank]), carried)
    assert carried["memory"].writes_B.max() > 0
    apart, _ = gradient(trained, joined([streams.batch(told + 1), blank]), carried)
    assert np.abs(apart).max() == 0


@pytest.mark.parametrize(("context", "batch_size"), [(CHUNK, 3), (3 * CHUNK, 2)])
def test_a_score_does_not_depend_on_how_stories_are_cut_into_batches(parts, context, batch_size):
    _, model, data, trained, frozen = parts
    params, text = whole(model, trained, frozen), data.held_out(False)
    found = score_stories(model, params, text.windows(context, 0, batch_size), text)
    wanted = score_stories(model, params, text.windows(2 * CHUNK, 0, 3), text)
    assert found.tokens == wanted.tokens == text.predictions
    assert found.nats_per_token == pytest.approx(wanted.nats_per_token, rel=1e-5)


def test_a_score_is_of_the_memory_of_the_story_that_is_asked_about(parts):
    _, model, data, trained, frozen = parts
    params, text = whole(model, trained, frozen), data.held_out(False)
    windows = text.windows(CHUNK, 0, 1)
    with_memory = score_stories(model, params, windows, text).nats_per_token

    def forgetful():
        for batch in windows:
            yield batch.replace(reset_Bn=np.ones_like(batch.reset_Bn))

    assert score_stories(model, params, forgetful(), text).nats_per_token != with_memory


def test_other_verbs_know_a_run_on_stories(run, tmp_path, capsys):
    hippocampus.evaluate.main([f"--workdir={run}", "--weights=ema"])
    results = json.loads((run / "results.json").read_text())
    rows = json.loads(next((run / "evaluations").glob("*ema*.json"), next(
        (run / "evaluations").glob("*.json"))).read_text())["rows"]
    assert results["final/loss"] == pytest.approx(rows[-1]["nats_per_token"], rel=1e-6)
    hippocampus.export.main([f"--workdir={run}", f"--out={tmp_path / 'export'}"])
    tokens = np.frombuffer(b"Q: Who left the old map?" * 3, np.uint8).astype(np.int32)[None]
    lm, exported = load(run), load(tmp_path / "export")
    one, _ = lm.run_with_cache(tokens, ())
    other, _ = exported.run_with_cache(tokens, ())
    np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)
    assert lm.score("Ann left the lantern. " * 9).tokens == 22 * 9 - 1
    capsys.readouterr()
    hippocampus.sample.main([f"--workdir={run}", "--prompt=Q: Who?", "--max_new_tokens=3"])
    assert capsys.readouterr().out.startswith("Q: Who?")


def test_plain_text_in_streams_goes_on_with_the_memory_of_the_row_before(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Ann left the lantern at the mill. Then it rained for two days.\n" * 80)
    plain = {"data__stories__template": StoriesConfig().template,
             "data__stories__story_weight": 0.0}
    config = chopt_run.config(data__form="text", data__corpus=str(text), data__order="streams",
                              **plain)
    _, after = one_step(config)
    assert type(read_data(config).batches(config).batch(0)) is Batch
    assert (after.carried["memory"].writes_B == 2 * config.model.memory.n_writes).all()


def test_the_stories_of_a_split_are_told_to_users_once(parts):
    config, _, data, *_ = parts
    text = story_text(config, find_stories(config), data.tokenizer, "train")
    assert len(text.questions) == 6 and text.n_bytes > text.n_words > 0
