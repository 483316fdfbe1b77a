import pytest
import tiny_run

from hippocampus.config import PATHS
from hippocampus.config_files import defaults, fields
from hippocampus.errors import ConfigError
from hippocampus.models.build_model import build_model, count_parameters
from hippocampus.models.flops import training_flops_per_token
from hippocampus.probing.ablation.grid import make_grid
from hippocampus.probing.ablation.matching import KINDS, with_matched

TWO_PASSES = {**tiny_run.TINY, "model.paths": PATHS, "model.d_model": 32, "model.mlp.width": 0,
              "model.segments.train": 2, "model.segments.weights": (0.3, 1.0),
              "loss.rectified_flow.segment_weight": 0.1, "data.tokenizer": "words"}
VOCABULARY = 1234


def of_tokenizer(config):
    import dataclasses

    return dataclasses.replace(config, model=dataclasses.replace(
        config.model, vocab_size=VOCABULARY))


@pytest.fixture(scope="module")
def matched():
    return with_matched(make_grid(defaults(), TWO_PASSES, [], 1), KINDS, VOCABULARY)


def test_every_single_path_gets_a_baseline_of_each_kind(matched):
    assert [cell.title for cell in matched.cells[7:]] == [
        f"{path} (same {kind})" for kind in ("parameters", "FLOPs")
        for path in ("ssm", "hop", "attn")]
    assert all(cell.whole == "full" and cell.note for cell in matched.cells[7:])


@pytest.mark.parametrize("path", ["ssm", "hop", "attn"])
def test_parameters_come_within_one_per_cent(matched, path):
    def count(name):
        return count_parameters(build_model(of_tokenizer(matched[name].config)))

    assert count(f"{path}_same_parameters") == pytest.approx(count("full"), rel=0.01)
    assert count(path) < 0.95 * count("full")  # there was something to make up for


@pytest.mark.parametrize("path", ["ssm", "hop", "attn"])
def test_flops_come_within_one_per_cent_in_a_single_pass(matched, path):
    def flops(name):
        return training_flops_per_token(of_tokenizer(matched[name].config))

    cell = matched[f"{path}_same_flops"]
    assert flops(cell.name) == pytest.approx(flops("full"), rel=0.01)
    assert cell.config.model.segments.train == 1
    assert f"{flops(cell.name):,.0f} for {flops('full'):,.0f}" in cell.note


def test_nothing_but_width_and_passes_differs_from_the_single_path(matched):
    def differs(name, other):
        theirs = fields(matched[other].config)
        return {field for field, value in fields(matched[name].config).items()
                if value != theirs[field]}

    assert differs("attn_same_parameters", "attn") == {"model.mlp.width"}
    assert differs("attn_same_flops", "attn") == {
        "model.mlp.width", "model.segments.train", "loss.rectified_flow.segment_weight"}


def test_an_unknown_kind_or_a_grid_without_paths_is_refused():
    with pytest.raises(ConfigError, match="--match is 'seconds'"):
        with_matched(make_grid(defaults(), TWO_PASSES, [], 1), ["seconds"], 256)
    with pytest.raises(ConfigError, match="nothing to match"):
        with_matched(make_grid(defaults(), TWO_PASSES, ["model.n_layers=1,2"], 1), KINDS, 256)


def test_a_width_that_comes_nowhere_near_is_refused():
    # 2 x 1 matrices of a width-2 model: one more column of the MLP is several per cent.
    tiny = {**TWO_PASSES, "model.d_model": 4, "model.mlp.width": 1, "model.n_layers": 1,
            "model.n_heads": 1, "model.mixer.width": 1, "model.segments.train": 1,
            "loss.rectified_flow.segment_weight": 0.0}
    with pytest.raises(ConfigError, match="same_parameters: with"):
        with_matched(make_grid(defaults(), tiny, [], 1), ["parameters"], 2)
