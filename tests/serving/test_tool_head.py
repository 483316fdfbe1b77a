"""The head learns from hidden states which tool a prompt needs, and knows how sure it is."""

import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tool_models import language_model

from hippocampus.errors import CheckpointError, ConfigError
from hippocampus.exports.weights_file import read_header
from hippocampus.serving.tool_head import NO_TOOL, ToolHead, calibration_error, last_states
from hippocampus.serving.tool_questions import questions

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def asked():
    found, _ = questions(24)
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i].text for i in order], [found[i].tools[0] for i in order]


def test_the_head_tells_prompts_apart_that_it_has_not_seen(asked):
    lm, (texts, tools) = language_model(), asked
    head = ToolHead.fit(lm, texts[:32], tools[:32])
    assert head.choose(lm, texts[32:]) == tools[32:]
    p_NK = head.probabilities(lm, texts[32:])
    np.testing.assert_allclose(p_NK.sum(1), 1)
    shuffled = ToolHead.fit(lm, texts[:32], list(np.random.default_rng(1).permutation(tools[:32])))
    wrong = shuffled.choose(lm, texts[32:])
    assert np.mean([a == b for a, b in zip(wrong, tools[32:], strict=True)]) < 0.9
    shy = ToolHead(**{**vars(head), "threshold": 1.0, "temperature": 100.0})
    assert set(shy.choose(lm, texts[32:])) == {NO_TOOL}


def test_a_state_is_of_the_last_token_whatever_is_padded():
    lm = language_model()
    text = "What is 1?"
    short, _ = last_states(lm, [text, text + " And this is longer than one window of them."])
    hidden = lm.run_with_cache(text, names="*")[1]
    assert any(value.shape[-1:] == short.shape and np.allclose(value.reshape(-1, short.size)[-1],
                                                               short, atol=1e-5)
               for value in hidden.values())


def test_confidence_that_is_kept_has_no_error_and_boasting_has():
    p = np.array([[0.75, 0.25]] * 4)
    assert calibration_error(p, np.array([0, 0, 0, 1])) == pytest.approx(0)
    assert calibration_error(p, np.array([1, 1, 1, 1])) == pytest.approx(0.75)


def test_too_little_to_learn_from_is_refused():
    with pytest.raises(ConfigError, match="prompts and"):
        ToolHead.fit(language_model(), ["a"] * 4, ["b"] * 3)


def test_a_saved_head_says_the_same_of_its_model_and_is_refused_by_another(asked, tmp_path):
    lm, (texts, tools) = language_model(), asked
    head = ToolHead.fit(lm, texts[:8], tools[:8], threshold=0.25)
    head.save(tmp_path / "head.safetensors")
    again = ToolHead.load(tmp_path / "head.safetensors", lm)
    assert again.tools == head.tools and again.threshold == 0.25
    np.testing.assert_array_equal(again.probabilities(lm, texts[8:12]),
                                  head.probabilities(lm, texts[8:12]))
    other = types.SimpleNamespace(params=jax.tree.map(lambda x: x + 1, lm.params))
    with pytest.raises(CheckpointError, match="another model"):
        ToolHead.load(tmp_path / "head.safetensors", other)


def test_a_damaged_head_ends_in_one_line(asked, tmp_path):
    lm, (texts, tools) = language_model(), asked
    good, bad = tmp_path / "good", tmp_path / "bad"
    ToolHead.fit(lm, texts[:8], tools[:8]).save(good)

    def refusal():
        with pytest.raises(CheckpointError) as caught:
            ToolHead.load(bad, lm)
        return caught.value.message

    assert "there is no tool head" in refusal()
    bad.write_bytes(good.read_bytes()[:-8])
    assert refusal()
    arrays, metadata = load_file(good), read_header(good).metadata
    save_file(arrays, bad)
    assert "is no tool head" in refusal()
    save_file({name: value for name, value in arrays.items() if name != "mean_D"}, bad, metadata)
    assert "damaged" in refusal()
    save_file({**arrays, "mean_D": arrays["mean_D"].sum()[None].reshape(())}, bad, metadata)
    assert "damaged" in refusal()
    save_file({**arrays, "bias_K": arrays["bias_K"][:-1]}, bad, metadata)
    assert "damaged" in refusal()
    save_file({**arrays, "bias_K": arrays["bias_K"] * np.nan}, bad, metadata)
    assert "not finite" in refusal()
    with pytest.raises(CheckpointError, match="cannot write"):
        ToolHead.load(good, lm).save(good / "head")
