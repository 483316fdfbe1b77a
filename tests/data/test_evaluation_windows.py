"""Windows that overlap: every prediction once, with the context that the stride promises."""

import functools
import itertools

import jax
import numpy as np
import pytest
import tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st

from hippocampus.data.evaluation_windows import EvaluationWindows
from hippocampus.errors import ConfigError, DataError
from hippocampus.evaluation.evaluate import evaluate
from hippocampus.models.build_model import build_model

pytestmark = pytest.mark.usefixtures("quick_compiles")


QUICK = settings(deadline=None, max_examples=60)


@st.composite
def cuts(draw):
    context = draw(st.integers(1, 40))
    return {"n": draw(st.integers(2, 300)), "context": context,
            "stride": draw(st.integers(0, context)), "batch_size": draw(st.integers(1, 12))}


def numbered(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.int32) + 7


def counted(windows: EvaluationWindows, field: str) -> np.ndarray:
    """A field of every prediction that counts, in the order of the windows."""
    return np.concatenate([getattr(b, field)[b.loss_weight_BT == 1] for b in windows])


@QUICK
@given(cut=cuts())
def test_every_id_but_the_first_is_predicted_exactly_once(cut):
    n = cut.pop("n")
    windows = EvaluationWindows(numbered(n), **cut)
    batches = list(windows)
    assert len(batches) == len(windows)
    assert {b.tokens_BT.shape for b in batches} == {(windows.batch_size, windows.context)}
    assert {w for b in batches for w in np.unique(b.loss_weight_BT)} <= {0, 1}
    assert np.array_equal(counted(windows, "targets_BT"), numbered(n)[1:])
    assert np.array_equal(counted(windows, "tokens_BT"), numbered(n)[:-1])
    assert windows.n_targets == n - 1


@QUICK
@given(cut=cuts())
def test_a_prediction_sees_all_that_is_before_it_or_at_least_context_minus_stride(cut):
    n, context, stride = cut.pop("n"), cut["context"], cut["stride"] or cut["context"]
    seen = {}
    for batch in EvaluationWindows(numbered(n), **cut):
        for tokens, targets, weight in zip(batch.tokens_BT, batch.targets_BT,
                                           batch.loss_weight_BT, strict=True):
            for t in np.flatnonzero(weight):
                assert np.array_equal(np.diff(tokens[:t + 1]), np.ones(t))  # one piece of text
                seen[targets[t] - 7] = t + 1
    for target, length in seen.items():
        if target <= context:
            assert length == target
        else:
            assert context - stride < length <= context
    assert len(seen) == n - 1


@QUICK
@given(cut=cuts(), max_windows=st.integers(1, 30))
def test_fewer_windows_count_what_they_hold(cut, max_windows):
    n = cut.pop("n")
    some = EvaluationWindows(numbered(n), max_windows=max_windows, **cut)
    found = counted(some, "targets_BT")
    assert len(found) == len(np.unique(found)) == some.n_targets
    assert len(some) == -(-min(max_windows, some.n_windows) // some.batch_size)


@QUICK
@given(cut=cuts(), data=st.data())
def test_documents_are_numbered_from_one_and_their_positions_restart(cut, data):
    n = cut.pop("n")
    starts = [0, *sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=8)))]
    windows = EvaluationWindows(numbered(n), document_starts=np.array(starts), **cut)
    plain = EvaluationWindows(numbered(n), **cut)
    last = 0
    for batch, same in zip(windows, plain, strict=True):
        assert np.array_equal(batch.tokens_BT, same.tokens_BT)
        assert np.array_equal(batch.loss_weight_BT, same.loss_weight_BT)
        for row, tokens in enumerate(batch.tokens_BT - 7):
            real = tokens >= 0
            assert (batch.document_ids_BT[row][~real] == 0).all()
            if not real.any():
                continue
            first, wanted_ids, wanted_positions = tokens[0], [], []
            for at in tokens[real]:
                begin = max(s for s in starts if s <= at)
                wanted_ids.append(1 + sum(first < s <= at for s in starts))
                wanted_positions.append(at - max(begin, first))
            assert batch.document_ids_BT[row][real].tolist() == wanted_ids
            assert batch.positions_BT[row][real].tolist() == wanted_positions
            last = max(last, wanted_ids[-1])
    assert last >= 1


def test_documents_outside_a_text_of_one_document_are_absent():
    batch = next(iter(EvaluationWindows(numbered(50), 8, 3)))
    assert batch.document_ids_BT is batch.positions_BT is None
    assert len(jax.tree.leaves(batch)) == 3


@pytest.mark.parametrize("stride", [-1, 9, 100])
def test_stride_that_would_leave_tokens_out_is_refused(stride):
    with pytest.raises(ConfigError, match=f"a stride of {stride} .* windows of 8"):
        EvaluationWindows(numbered(50), 8, 3, stride=stride)


@pytest.mark.parametrize("size", [{"context": 0}, {"batch_size": 0}])
def test_windows_of_nothing_are_refused(size):
    with pytest.raises(ConfigError, match="tokens in batches of"):
        EvaluationWindows(numbered(50), **{"context": 8, "batch_size": 3, **size})


# ---------------------------------------------------------------- with a model

@pytest.fixture(scope="module")
def model():
    """Each token sees itself and the four before it, so 5 of context are as good as any more."""
    return build_model(tiny_run.config(
        model__vocab_size=40, model__attention__window=5, model__compute_dtype="float32"))


@pytest.fixture(scope="module")
def params(model, random_parameters):
    return random_parameters(model)


IDS = np.random.default_rng(0).integers(0, 40, 120).astype(np.int32)


@functools.cache
def forward(model):
    return jax.jit(model.apply)


def nll(model, params, tokens_BT) -> np.ndarray:
    """-log p of every next token of whole rows, from the public logits."""
    logits, _ = forward(model)({"params": params}, tokens_BT)
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    return -np.take_along_axis(log_p[:, :-1], tokens_BT[:, 1:, None], axis=-1)[..., 0]


@pytest.mark.parametrize(("context", "stride"), [(16, 12), (16, 5), (16, 1), (200, 0)])
def test_windows_that_overlap_by_all_a_model_sees_are_one_long_forward(
        model, params, context, stride):
    found = evaluate(model, params, EvaluationWindows(IDS, context, 4, stride=stride), 1.0)
    assert found.tokens == 119
    assert found.nats_per_token == pytest.approx(nll(model, params, IDS[None]).mean(), rel=1e-6)


def test_windows_that_overlap_by_less_are_not(model, params):
    found = evaluate(model, params, EvaluationWindows(IDS, 16, 4, stride=14), 1.0)
    whole = nll(model, params, IDS[None]).mean()
    assert abs(found.nats_per_token - whole) > 1e-4


def test_stride_1_gives_every_prediction_the_full_context(random_parameters):
    model = build_model(tiny_run.config(model__vocab_size=40, model__compute_dtype="float32"))
    params, ids, context = random_parameters(model), IDS[:60], 8
    found = evaluate(model, params, EvaluationWindows(ids, context, 16, stride=1), 1.0)
    first = nll(model, params, ids[None, :context + 1])[0]
    views = np.lib.stride_tricks.sliding_window_view(ids, context + 1)[1:]
    others = nll(model, params, views)[:, -1]
    assert len(first) + len(others) == found.tokens == 59
    wanted = np.concatenate([first, others]).mean()
    assert found.nats_per_token == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("starts", [(1,), (30,), (7, 8, 31, 59)])
def test_packed_documents_are_scored_as_if_alone(model, params, starts):
    ids, bounds = IDS[:60], [0, *starts, 60]
    windows = EvaluationWindows(ids, 60, 2, document_starts=np.array(bounds[:-1]))
    found = evaluate(model, params, windows, 1.0)
    alone = []
    for begin, end in itertools.pairwise(bounds):
        piece = ids[begin:end + 1]  # the end of a document predicts the start of the next
        padded = np.pad(piece, (0, 61 - len(piece)))[None]  # one shape, one compilation
        alone += nll(model, params, padded)[0, :len(piece) - 1].tolist()
    assert found.tokens == len(alone) == 59
    assert found.nats_per_token == pytest.approx(np.mean(alone), rel=1e-5)


@given(
    n=st.integers(2, 300),
    context=st.integers(1, 40),
    batch_size=st.integers(1, 12),
)
def test_disjoint_windows_predict_every_id_but_the_first_exactly_once(n, context, batch_size):
    windows = EvaluationWindows(numbered(n), context, batch_size)
    batches = list(windows)
    assert len(batches) == len(windows)
    assert all(b.tokens_BT.shape == (batch_size, context) for b in batches)
    weight = np.concatenate([b.loss_weight_BT for b in batches])
    tokens = np.concatenate([b.tokens_BT for b in batches])[weight == 1]
    targets = np.concatenate([b.targets_BT for b in batches])[weight == 1]
    assert set(np.unique(weight)) <= {0, 1}
    assert windows.n_targets == weight.sum() == n - 1
    assert np.array_equal(targets, numbered(n)[1:])
    assert np.array_equal(tokens, targets - 1)


@given(
    n=st.integers(2, 300),
    context=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    max_windows=st.integers(1, 30),
)
def test_fewer_evaluation_windows_are_spread_evenly_over_the_text(
    n, context, batch_size, max_windows
):
    every = EvaluationWindows(np.arange(n), context, batch_size=1)
    some = EvaluationWindows(np.arange(n), context, batch_size, max_windows)
    weight = np.concatenate([b.loss_weight_BT for b in some])
    first = np.concatenate([b.tokens_BT for b in some])[weight[:, 0] == 1, 0]
    assert len(first) == min(max_windows, len(every))
    assert some.n_targets == weight.sum()
    gaps = np.diff(np.append(first // context, len(every)))
    assert (first % context == 0).all()
    assert first[0] == 0
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def test_evaluation_can_be_repeated():
    windows = EvaluationWindows(numbered(100), 8, 3)
    for a, b in zip(windows, windows, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_text_without_a_prediction_is_an_error():
    with pytest.raises(DataError, match="has 1 tokens"):
        EvaluationWindows(numbered(1), 8, 3)
