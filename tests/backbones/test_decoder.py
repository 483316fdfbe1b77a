"""A decoder keeps the laws of the project's own models: past only, chunks, documents, taps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from hippocampus.backbones.loading import build_decoder
from hippocampus.backbones.rotary import Rope
from hippocampus.config import MESH_AXES
from hippocampus.data.batches import Batch
from hippocampus.models import taps
from hippocampus.ops.cross_entropy import cross_entropy
from hippocampus.testing import assert_close, check_causality, check_document_isolation

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T = 2, 20


@pytest.fixture(scope="module")
def widest(backbone_of):
    """Sliding and full layers, shared keys, streams."""
    return backbone_of("gemma3n")


@pytest.fixture(scope="module")
def ids(reference_of):
    return jnp.asarray(reference_of("gemma3n")["ids"][:B, :T])


@pytest.fixture(scope="module")
def packed(widest):
    """(ids, document ids, positions) -> hidden states."""
    @jax.jit
    def run(ids, documents, positions):
        batch = Batch(ids, ids, jnp.ones(ids.shape), documents, positions)
        return widest.model.apply({"params": widest.params}, batch, method="forward")[0]

    return run


def test_a_decoder_reads_the_past_of_its_own_document_only(packed, ids):
    documents = jnp.ones_like(ids)
    positions = jnp.broadcast_to(jnp.arange(T), ids.shape)
    check_causality(lambda x: packed(x, documents, positions), ids, positions=(0, 9, 17), jit=False)
    check_document_isolation(packed, ids, (11, 6), jit=False, n_operations=2000)


@pytest.mark.parametrize(("family", "sent"), [
    ("gemma3n", 1),  # the layers' own inputs; the table of embeddings is the head's too, and small
    ("qwen3", 1), ("llama", 0)])  # a head of its own, or not
def test_a_table_that_only_a_lookup_reads_is_not_gathered(backbone_of, ids, family, sent):
    mesh = AbstractMesh((1, 2, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    decoder = backbone_of(family)
    with jax.sharding.use_abstract_mesh(mesh):
        program = str(jax.make_jaxpr(lambda params, ids: decoder.model.apply(
            {"params": params}, Batch(ids, ids, ids), method="forward")[0])(decoder.params, ids))
    assert program.count("reduce_scatter") == sent


def test_rows_go_on_from_where_each_of_them_stands(widest, ids):
    """Rows of unequal length, single tokens behind a chunk, and one row begun anew."""
    model = widest.model

    @jax.jit
    def run(ids, cache, valid):
        return model.apply({"params": widest.params}, ids, cache, valid, method="extend")

    whole, _, _ = jax.jit(lambda batch: model.apply({"params": widest.params}, batch,
                                                    method="forward"))(
        Batch(ids, ids, jnp.ones(ids.shape)))
    lengths = np.array([10, 4])
    _, cache = run(ids[:, :10], model.init_cache(B, 64), np.arange(10) < lengths[:, None])
    for t in range(3):
        step = np.take_along_axis(np.asarray(ids), lengths[:, None] + t, axis=1)
        hidden, cache = run(step, cache, np.ones((B, 1), bool))
        expected = np.take_along_axis(np.asarray(whole), (lengths + t)[:, None, None], axis=1)
        assert_close(hidden, expected, n_operations=10_000, what=f"token {t} behind the chunk")
    assert cache.length_B.tolist() == [13, 7]

    kept, cleared = cache, model.reset(cache, np.array([False, True]))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), kept, cleared)
    hidden, _ = run(ids[:, :1], cleared, np.ones((B, 1), bool))
    assert_close(hidden[1], whole[1, :1], n_operations=10_000, what="the first token of a new text")

    _, same = run(ids[:, :1], kept, np.zeros((B, 1), bool))
    jax.tree.map(np.testing.assert_array_equal, same, kept)


def test_scanned_layers_with_rematerialisation_learn_as_unrolled_ones(backbone_of, ids):
    backbone = backbone_of("gemma3")

    def gradient(**settings):
        model = build_decoder(backbone.model.config, **settings)

        def loss(params):
            hidden, _, _ = model.apply({"params": params}, Batch(ids, ids, jnp.ones(ids.shape)),
                                       method="forward")
            return cross_entropy(hidden, model.head(params), ids, jnp.ones(ids.shape))[0]

        return jax.jit(jax.value_and_grad(loss))(backbone.params)

    assert_close(gradient(scan_layers=True, remat="full"), gradient(scan_layers=False),
                 n_operations=10_000)


def test_taps_have_stable_names(widest, ids):
    _, out = jax.eval_shape(widest.model.apply, {"params": widest.params}, ids)
    for name, shape in {"embedding": (B, T, 32), "layers.0.attention.query": (B, T, 4, 16),
                        "layers.2.attention.key": (B, T, 2, 16), "final": (B, T, 32),
                        "layers.4.attention.heads": (B, T, 4, 16), "layers.4.mlp.out": (B, T, 32),
                        "layers.4.attention.out": (B, T, 32), "layers.4.residual": (B, T, 32),
                        "segments.hidden": (1, B, T, 32)}.items():
        assert out[name].shape == shape, name
    assert "layers.3.attention.key" not in out, "a layer that reads the keys of another"
    editable = set(taps.editable_names(widest.model, widest.params, ids))
    assert editable == set(out) - {"segments.hidden"}


def test_attention_is_edited_before_it_is_normalised(backbone_of, reference_of):
    """So that the size of it, which a Gemma's norm takes away, changes a Llama alone."""
    def moved(family):
        backbone, reference = backbone_of(family), reference_of(family)
        changed, _ = taps.run_with_edits(backbone.model, backbone.params,
                                         jnp.asarray(reference["ids"][:, :T]),
                                         {"layers.1.attention.out": lambda y: 2 * y})
        return float(jnp.abs(changed - reference["logits"][:, :T]).max())

    assert moved("gemma3") < 1e-3 < 0.1 < moved("llama")


def test_the_final_states_are_those_before_the_last_norm(backbone_of, ids):
    backbone = backbone_of("llama")
    _, out = taps.run_with_edits(backbone.model, backbone.params, ids, {"final": lambda x: 0 * x},
                                 names=("final", "segments.hidden", "layers.1.residual"))
    assert not out["final"].any() and not out["segments.hidden"].any()
    assert out["layers.1.residual"].any()


def test_half_precision_is_near(backbone_of, reference_of):
    """Of most tokens the same ids are likely; the compute dtype is the one that is asked for."""
    half = build_decoder(backbone_of("llama").model.config, compute_dtype="bfloat16")
    params, reference = backbone_of("llama").params, reference_of("llama")
    logits, out = jax.jit(half.apply)({"params": half.decode_params(params)}, reference["ids"])
    assert out["final"].dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    assert np.abs(logits - reference["logits"]).mean() < 0.05


def test_llama_3_frequencies_have_three_bands():
    """Short waves stay, long ones are stretched by the factor, those between them by less."""
    plain = Rope(500_000.0).frequencies(64)
    found = Rope(500_000.0, "llama3", 32.0, 1.0, 4.0, 8192).frequencies(64)
    ratio, waves = found / plain, 2 * np.pi / plain
    np.testing.assert_allclose(ratio[waves < 8192 / 4], 1)
    np.testing.assert_allclose(ratio[waves > 8192], 1 / 32, rtol=1e-6)
    between = ratio[(waves > 8192 / 4) & (waves < 8192)]
    assert len(between) and (between < 1).all() and (between > 1 / 32).all()
