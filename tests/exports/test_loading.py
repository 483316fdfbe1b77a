"""An exported folder opens as the run does, to the last bit, and refuses what does not fit it."""

import ast
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from hippocampus.data.tokenizers import character_tokenizer
from hippocampus.errors import CheckpointError, ConfigError, DataError
from hippocampus.evaluation.export_run import Request, export_run
from hippocampus.exports.folder import ExportRecord
from hippocampus.exports.parameters import read_parameters, write_parameters
from hippocampus.exports.storage import dequantize
from hippocampus.generation.loading import load

ROOT = Path(__file__).resolve().parents[2]
TEXT = "the cat sat on the mat"


@pytest.fixture(scope="module")
def run():
    return tiny_run.trained()


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, ids):
    return model.apply({"params": params}, ids)[0]


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_parameters_and_logits_are_those_of_the_run_bit_for_bit(run, tmp_path, weights):
    export_run(run, tmp_path / "out", Request(weights))
    before, after = load(run, weights=weights), load(tmp_path / "out", weights=weights)
    assert tiny_run.digest(after.params) == tiny_run.digest(before.params)
    ids = jnp.asarray(before.tokenizer.encode(TEXT))[None]
    logits = [np.asarray(_logits(lm.model, lm.params, ids)) for lm in (before, after)]
    assert logits[0].tobytes() == logits[1].tobytes()
    assert (after.step, after.config) == (before.step, before.config)
    assert after.tokenizer.digest == before.tokenizer.digest
    assert tiny_run.digest(load(tmp_path / "out").params) == tiny_run.digest(before.params)


def test_names_and_header_are_what_other_tools_expect(exported):
    from safetensors import safe_open

    with safe_open(exported / "model.safetensors", "np") as file:
        assert {"embedding", "norm_out.scale", "layers_0.hopfield.query.kernel"} <= set(file.keys())
        about = file.metadata()
    assert about["format"] == "hippocampus 1"
    assert (about["step"], about["weights"], about["storage"]) == ("12", "ema", "float32")
    assert (exported / "model.safetensors").stat().st_mode == (
        exported / "config.json").stat().st_mode


@pytest.mark.parametrize(("asked", "words"), [
    ({"weights": "raw"}, "has no raw weights: it is an export of the average"),
    ({"step": 3}, "has no step 3: it is an export of step 12"),
    ({"weights": "best"}, "weights is 'best'")])
def test_what_an_export_does_not_have_is_a_config_error(exported, asked, words):
    with pytest.raises(ConfigError, match=words) as caught:
        load(exported, **asked)
    assert caught.value.hint
    assert load(exported, step=12).step == 12


def test_parameters_go_where_they_are_asked_to(exported):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
    params = load(exported, sharding=sharding).params
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("path", [
    {"model.paths": ("ssm", "hopfield"), "model.ssm.kind": "diagonal", "model.position": "none",
     "model.hopfield.patterns": "both", "model.embedding_width": 8},
    {"model.tie_embeddings": False, "model.position": "learned", "model.segments.feedback": True,
     "loss.rectified_flow.segment_weight": 0.1}], ids=["diagonal", "untied"])
@pytest.mark.parametrize("storage", ["float32", "int8", "bfloat16"])
def test_every_kind_of_parameter_goes_through_a_file(
        tiny_config, random_parameters, tmp_path, path, storage):
    from hippocampus.models.build_model import build_model, parameter_shapes

    model = build_model(tiny_config(path))
    params = random_parameters(model)
    record = ExportRecord(1, "raw", storage, "", None, "0")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    write_parameters(tmp_path / "w", params, record)
    again = read_parameters(tmp_path / "w", parameter_shapes(model), record, sharding)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    if storage == "float32":
        assert tiny_run.digest(again) == tiny_run.digest(params)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        assert after.dtype == jnp.float32
        np.testing.assert_allclose(after, before, atol=float(jnp.abs(before).max()) / 100)


def test_int8_is_smaller_and_loads_as_float32_within_half_a_scale(run, tmp_path):
    from safetensors.numpy import load_file

    export_run(run, tmp_path / "out", Request(storage="int8"))
    found, before = load_file(tmp_path / "out" / "model.safetensors"), load(run).params
    kernel = before["layers_0"]["mlp"]["up"]["kernel"]
    stored, scale = (found[f"layers_0.mlp.up.kernel{end}"] for end in ("", ".scale"))
    assert stored.dtype == np.int8 and scale.shape == (1, kernel.shape[1])
    assert (np.abs(dequantize(stored, scale) - kernel) <= scale * 0.50001).all()
    after = load(tmp_path / "out").params
    assert after["embedding"].dtype == jnp.float32
    np.testing.assert_array_equal(after["layers_0"]["mlp"]["up"]["kernel"],
                                  dequantize(stored, scale))
    np.testing.assert_array_equal(after["norm_out"]["scale"], before["norm_out"]["scale"])


# ---------------------------------------------------------------- what does not fit

def change(copy, edit):
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    path = copy / "model.safetensors"
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    tensors = {name: np.array(tensor) for name, tensor in load_file(path).items()}
    edit(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def poison(value):
    def edit(tensors, metadata):
        tensors["layers_0.mlp.up.kernel"][3, 2] = value
    return edit


@pytest.mark.parametrize(("edit", "words"), [
    (poison(np.nan), r"layers_0\.mlp\.up\.kernel has weights that are not finite"),
    (poison(-np.inf), r"layers_0\.mlp\.up\.kernel has weights that are not finite"),
    (lambda t, m: t.pop("embedding"), "lacks the tensor embedding"),
    (lambda t, m: t.update(more=np.zeros(1, np.float32)), "has a tensor that the model has not: "),
    (lambda t, m: t.update(embedding=t["embedding"].T.copy()), r"embedding is float32 \[16, 256\]"),
    (lambda t, m: t.update(embedding=t["embedding"].astype(np.float16)), "embedding is float16"),
    (lambda t, m: t.update(embedding=t["embedding"].view(np.int32)), "embedding is int32"),
    (lambda t, m: m.update(step="11"), r"is not the file that config\.json beside it describes")])
def test_weights_of_another_model_or_not_finite_are_refused_by_name(copy, edit, words):
    change(copy, edit)
    with pytest.raises(CheckpointError, match=words) as caught:
        load(copy)
    assert caught.value.hint


def test_a_scale_that_makes_numbers_infinite_is_refused(run, tmp_path):
    export_run(run, tmp_path / "out", Request(storage="int8"))
    change(tmp_path / "out", lambda t, m: t["embedding.scale"].fill(3e38))
    with pytest.raises(CheckpointError, match="embedding has weights that are not finite"):
        load(tmp_path / "out")


def test_a_foreign_damaged_or_missing_tokenizer_is_a_data_error(copy):
    path = copy / "tokenizer.json"
    whole = path.read_text()
    character_tokenizer("abc").save(path)
    with pytest.raises(DataError, match="is not the tokenizer that the run was trained with"):
        load(copy)
    path.write_text(whole[:300])
    with pytest.raises(DataError, match="is damaged"):
        load(copy)
    path.unlink()
    with pytest.raises(DataError, match="there is no tokenizer"):
        load(copy)


def test_a_config_of_another_width_is_refused_before_an_array_is_built(copy):
    content = json.loads((copy / "config.json").read_text())
    content["model"]["d_model"] = 32768
    (copy / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"is float32 \[.*; the model needs float32"):
        load(copy)


def test_a_pickled_file_is_never_opened(copy, tmp_path):
    attack = f"cos\nsystem\n(S'touch {tmp_path / 'pwned'}'\ntR.".encode()
    for name in ("pytorch_model.bin", "model.pt"):
        (copy / name).write_bytes(attack)
    assert load(copy).step == 12
    (copy / "model.safetensors").write_bytes(attack)
    with pytest.raises(CheckpointError, match="is damaged"):
        load(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="there are no weights") as caught:
        load(copy)
    assert "is never read" in caught.value.hint
    assert not (tmp_path / "pwned").exists()


def test_nothing_in_the_package_imports_what_unpickles():
    for path in (ROOT / "hippocampus").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = ([node.module or ""] if isinstance(node, ast.ImportFrom)
                     else [alias.name for alias in node.names] if isinstance(node, ast.Import)
                     else [])
            found = {n.split(".")[0] for n in names} & {
                "pickle", "dill", "cloudpickle", "joblib", "torch", "shelve", "marshal"}
            assert not found, f"{path} imports {found}"


def test_a_run_that_diverged_is_not_exported(run, tmp_path):
    lm = load(run)
    broken = jax.tree.map(lambda a: a * jnp.nan, lm.params)
    with pytest.raises(CheckpointError, match="step 12: embedding has weights that are not finite"):
        write_parameters(tmp_path / "w", broken, ExportRecord(12, "ema", "int8", "", None, "0"))
    assert not list(tmp_path.iterdir())


def test_an_export_moved_elsewhere_opens(exported, tmp_path):
    assert load(shutil.move(shutil.copytree(exported, tmp_path / "a"), tmp_path / "b")).step == 12
