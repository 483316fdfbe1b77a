"""What views reduce: on arrays whose answer is known, and bounded in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.data.batches import Batch
from hippocampus.data.tokenizers import byte_tokenizer
from hippocampus.layers.self_attention import SelfAttention
from hippocampus.probing import views
from hippocampus.probing.drawing import label, pieces
from hippocampus.testing import assert_close

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, H, D_HEAD = 2, 6, 4, 8
IDS = jnp.asarray([[1, 1, 1, 2, 2, 2], [1] * 6])
POSITIONS = jnp.asarray([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
ONES = jnp.ones((B, T))


def batch(ids=None, positions=None, rows=B):
    tokens = jnp.arange(rows * T, dtype=jnp.int32).reshape(rows, T)
    return Batch(tokens, tokens, jnp.ones((rows, T)), ids, positions)


def test_attention_weights_times_values_are_what_the_heads_read():
    from hippocampus.config import AttentionConfig

    layer = SelfAttention(AttentionConfig(n_kv_heads=2, window=3, backend="xla"), H, 100.0)
    u = jax.random.normal(jax.random.key(0), (B, T, H * D_HEAD))
    _, out = jax.jit(lambda key: layer.init_with_output(key, u, IDS, POSITIONS)[0])(
        jax.random.key(1))
    p = views.attention_weights(out["query"], out["key"], IDS, window=3)
    values = jnp.repeat(out["value"], 2, axis=2)
    assert_close(jnp.einsum("bhts,bshd->bthd", p, values), out["heads"], n_operations=T)


def test_even_attention_has_the_entropy_of_its_tokens_and_half_the_distance():
    p = views.attention_weights(jnp.zeros((B, T, H, D_HEAD)), jnp.zeros((B, T, 1, D_HEAD)), IDS)
    found = views.attention_view(p, POSITIONS, ONES)
    n = np.asarray(POSITIONS + 1.0)  # tokens that each sees
    later = n > 1
    for name, value in {"entropy": np.log(n), "distance": (n - 1) / 2, "first": 1 / n,
                        "self": 1 / n}.items():
        expected = np.where(later, value, 0).sum(1)
        assert_close(found[name], np.broadcast_to(expected[:, None], (B, H)), n_operations=T)


def test_attention_to_the_first_token_alone_is_a_sink():
    first = jnp.arange(T) - POSITIONS
    p = jnp.broadcast_to(jax.nn.one_hot(first, T)[:, None], (B, H, T, T))
    found = views.attention_view(p, POSITIONS, ONES)
    n_later = np.asarray((POSITIONS > 0).sum(1))[:, None]
    assert_close(found["first"] / n_later, np.ones((B, H)))
    assert_close(found["distance"], np.broadcast_to(POSITIONS.sum(1)[:, None], (B, H)))
    assert not np.asarray(found["entropy"]).any() and not np.asarray(found["self"]).any()


def test_a_window_of_attention_ends_where_it_should():
    seen = np.asarray(views.visible(1, T, None, window=2))[0]
    np.testing.assert_array_equal(seen.sum(1), [1, 2, 2, 2, 2, 2])
    np.testing.assert_array_equal(np.asarray(views.visible(B, T, IDS)).sum((1, 2)), [12, 21])


def test_a_constant_decay_gives_its_known_rate_and_a_first_token_none():
    decay = jnp.broadcast_to(jnp.asarray([0.5, 1.0, 0.0]), (B, T, 3)).at[:, 0].set(0.123)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    found = views.decay_view(decay, positions, ONES.at[0, 1].set(0))
    rate = np.asarray(found["rate"] / found["counted"][:, None])
    np.testing.assert_allclose(rate[:, 0], np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(rate[:, 1], 0)
    assert np.isfinite(rate).all() and (rate[:, 2] > 80).all()
    np.testing.assert_array_equal(found["counted"], [4, 5])
    np.testing.assert_allclose(views.memory_length(rate)[:, 0], 1 / np.log(2), rtol=1e-6)
    assert (views.memory_length(rate)[:, 1] == np.inf).all()


def test_falls_and_rises_of_an_energy_are_counted_and_rounding_is_neither():
    path = jnp.asarray([[3.0, 2.0, 1.0], [3.0, 3.0 + 1e-6, 3.0], [3.0, 2.0, 2.5]])  # token, J
    energy = path.T[:, None, :, None]  # J, one row, three tokens, one head
    energy_view = jax.jit(views.energy_view)
    found = energy_view(energy, jnp.ones((1, 3)), tolerance=1e-6)
    np.testing.assert_array_equal(found["fell"][0], [2, 1])
    np.testing.assert_array_equal(found["rose"][0], [0, 1])
    np.testing.assert_allclose(found["largest_rise"][0, 1], 0.5)
    np.testing.assert_allclose(found["energy"][0], [9, 7, 6.5], rtol=1e-6)
    unread = energy_view(energy, jnp.asarray([[1.0, 1.0, 0.0]]), tolerance=1e-6)
    assert not np.asarray(unread["rose"]).any() and float(unread["largest_rise"].max()) < 1e-6


def test_a_straight_way_has_ratio_one_and_a_detour_less():
    start, end = jax.random.normal(jax.random.key(0), (2, B, T, D_HEAD))
    straight = [start + share * (end - start) for share in (0, 0.2, 1.0)]
    straightness = jax.jit(views.straightness_view)
    found = straightness(straight, ONES)
    assert_close(found["ratio"] / T, np.ones(B), n_operations=D_HEAD)
    assert_close(found["cosine"] / T, np.ones((B, 2)), n_operations=D_HEAD)
    assert_close(found["length"] / T, np.broadcast_to([0.2, 0.8], (B, 2)), n_operations=D_HEAD)
    back = straightness([start, end, 2 * start - end, end], ONES)  # 1 + 2 + 2 long
    assert_close(back["ratio"] / T, np.full(B, 0.2), n_operations=D_HEAD)
    assert_close(back["cosine"] / T, np.broadcast_to([1, -1, 1], (B, 3)), n_operations=D_HEAD)


def test_a_sum_over_tokens_leaves_out_what_has_no_weight_even_where_it_is_nan():
    value = jnp.asarray([[1.0, jnp.nan, 3.0], [1.0, 1.0, jnp.inf]])
    weight = jnp.asarray([[1.0, 0.0, 2.0], [1.0, 1.0, 0.0]])
    np.testing.assert_array_equal(views.token_sum(value, weight), [7, 2])
    both = jnp.stack([value, 2 * value], -1)
    np.testing.assert_array_equal(views.token_sum(both, weight), [[7, 14], [2, 4]])


def test_a_mean_over_windows_is_that_of_the_tokens_with_the_error_of_the_windows():
    sums, weights = np.asarray([2.0, 4.0, 6.0]), np.asarray([2.0, 2.0, 2.0])
    mean, error = views.window_mean(sums, weights)
    assert mean == 2.0
    np.testing.assert_allclose(error, np.std([1, 2, 3], ddof=1) / 3**0.5)
    mean, _ = views.window_mean(np.stack([sums, 2 * sums], 1), np.asarray([2.0, 2.0, 4.0]))
    np.testing.assert_allclose(mean, [1.5, 3.0])
    assert np.isnan(views.window_mean(np.asarray([2.0]), np.asarray([2.0]))[1])
    assert np.isnan(views.window_mean(np.zeros(2), np.zeros(2))[0])


def test_what_cannot_be_known_is_none():
    assert views.known([{"a": float("nan"), "b": 1.5, "c": "x", "d": float("inf")}]) == (
        {"a": None, "b": 1.5, "c": "x", "d": float("inf")},)


def test_rows_are_taken_a_few_at_a_time_where_the_arrays_are_large(monkeypatch):
    seen = []

    def view(part):
        seen.append(part.tokens_BT.shape)
        return {"sum": part.tokens_BT.sum(1), "rows": part.document_ids_BT[:, :2]}

    ids = jnp.arange(6 * T).reshape(6, T)
    whole = views.by_rows(view, batch(ids, ids, rows=6), 1)
    monkeypatch.setattr(views, "MOST_FLOATS", 4 * T * 10)  # four rows; three divide six
    parts = views.by_rows(view, batch(ids, ids, rows=6), 10)
    assert seen == [(6, T), (3, T)]
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    views.by_rows(view, batch(ids, ids, rows=6), 10**9)
    assert seen[-1] == (1, T)


def test_padding_is_what_has_no_document():
    ids = jnp.asarray([[1, 1, 2, 2, 0, 0]])
    np.testing.assert_array_equal(views.real_tokens(batch(ids, ids, rows=1))[0],
                                  [True] * 4 + [False] * 2)
    assert views.real_tokens(batch()).all()


def test_pieces_are_the_text_and_a_character_belongs_to_its_last_token():
    tokenizer = byte_tokenizer()
    text = "naïve\n→ x"
    found = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(found) == text and len(found) == len(text.encode())
    assert found[2:4] == ("", "ï")
    assert pieces(tokenizer, []) == ()
    assert "".join(pieces(tokenizer, tokenizer.encode("é")[:1])) == "�"


def test_labels_of_tokens_are_short_and_visible():
    assert [label(token) for token in ("\n", " a", "\x00", "internationally")] == [
        "⏎", "·a", "�", "interna…"]
