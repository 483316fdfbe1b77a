"""Every cell is a whole config before anything is trained; what cannot be is one line."""

import itertools

import pytest
import tiny_run

from hippocampus.config import PATHS
from hippocampus.config_files import defaults, fields
from hippocampus.errors import ConfigError
from hippocampus.probing.ablation.grid import make_grid, parse_axis, value_text

ALL = {**tiny_run.TINY, "model.paths": PATHS, "model.n_layers": 2}


def grid(*over, seeds=2, overrides=None, **options):
    return make_grid(defaults(), {**ALL, **(overrides or {})}, over, seeds, **options)


def names(found):
    return [cell.name for cell in found.cells]


def test_without_axes_the_cells_are_all_subsets_of_the_paths():
    found = grid()
    assert names(found) == ["full", "ssm+hop", "ssm+attn", "hop+attn", "ssm", "hop", "attn"]
    subsets = [set(cell.config.model.paths) for cell in found.cells]
    assert sorted(map(sorted, subsets)) == sorted(
        sorted(subset) for n in (1, 2, 3) for subset in itertools.combinations(PATHS, n))
    assert found.baseline == "full" and [cell.whole for cell in found.cells] == [""] + ["full"] * 6


def test_subsets_differ_from_the_whole_in_their_paths_alone():
    found = grid()
    whole = fields(found["full"].config)
    for cell in found.cells[1:]:
        differs = {name for name, value in fields(cell.config).items() if value != whole[name]}
        assert differs == {"model.paths"}


def test_paths_per_layer_are_cut_to_the_subset():
    found = grid(overrides={"model.layer_paths": "attention,ssm+attention"})
    assert names(found) == ["full", "attn"]
    assert found["attn"].config.model.layer_paths == ("attention", "attention")
    assert found.notes == ("no cell ssm: layer 0 would have no path",)


def test_a_subset_that_leaves_a_layer_bare_is_left_out_with_a_note():
    found = grid(overrides={"model.ssm.first_layer": "1"})
    assert names(found) == ["full", "ssm+hop", "ssm+attn", "hop+attn", "hop", "attn"]
    assert found.notes == ("no cell ssm: layer 0 would have no path",)


def test_several_axes_give_all_combinations_with_typed_values():
    found = grid("loss.z_weight=0,1e-4", "model.segments.gradient=full,stop")
    assert names(found) == ["z_weight=0,gradient=full", "z_weight=0,gradient=stop",
                            "z_weight=0.0001,gradient=full", "z_weight=0.0001,gradient=stop"]
    assert found.cells[3].changes == {"loss.z_weight": 1e-4, "model.segments.gradient": "stop"}
    assert found.cells[3].config.loss.z_weight == 1e-4


def test_the_baseline_is_the_cell_that_changes_nothing():
    assert grid("train.batch_size=4,8,16").baseline == "batch_size=8"
    assert grid("train.batch_size=4,16").baseline == "batch_size=4"
    assert grid("train.batch_size=4,16", baseline="batch_size=16").baseline == "batch_size=16"


def test_subsets_and_axes_together_have_a_whole_model_for_every_value():
    found = grid("model.n_layers=1,2", paths=True)
    assert len(found.cells) == 14
    assert found["ssm,n_layers=1"].whole == "full,n_layers=1"
    assert found["full,n_layers=2"].whole == ""


def test_commas_in_brackets_do_not_end_a_value():
    axis = parse_axis("model.hopfield.depth_schedule=(3,2,1),[1,1],2")
    assert axis.values == ("(3,2,1)", "[1,1]", "2")
    found = grid("model.hopfield.depth_schedule=(3,2),2", "model.paths=(ssm,attention),attention")
    assert [cell.config.model.hopfield.depth_schedule for cell in found.cells] == [
        (3, 2), (3, 2), (2,), (2,)]
    assert found.cells[0].config.model.paths == ("ssm", "attention")
    assert names(found)[0] == "depth_schedule=3+2,paths=ssm+attention"


def test_seeds_go_on_from_the_one_of_the_config():
    found = grid("model.n_layers=1,2", seeds=3, overrides={"train.seed": "7"})
    assert found.seeds == (7, 8, 9)
    run = found.config(found.cells[1], 9)
    assert (run.train.seed, run.model.n_layers, run.name) == (9, 2, "n_layers=2-seed9")


def test_fields_of_one_last_name_are_told_apart():
    found = grid("model.attention.backend=auto,xla", "model.ssm.backend=auto,sequential")
    assert names(found)[0] == "attention.backend=auto,ssm.backend=auto"


def test_values_that_are_no_folder_names_get_one_of_their_own():
    assert value_text("/data/a b.txt") != value_text("/data/a_b.txt")
    assert "/" not in value_text("/data/a b.txt")
    assert [value_text(value) for value in (1e-4, 2.0, True, (), "")] == [
        "0.0001", "2", "True", "none", "empty"]


@pytest.mark.parametrize(("over", "words"), [
    (["loss.z_wieght=0,1"], "loss.z_wieght is not a field"),
    (["loss.z_weight=0,much"], "loss.z_weight is 'much'"),
    (["loss.z_weight=0,-1"], "loss.z_weight is -1"),
    (["model.n_heads=2,3"], "model.d_model = 16 is not a multiple"),
    (["loss=0,1"], "loss is a group of fields"),
    (["loss.z_weight=0,0.0"], "are the same"),
    (["loss.z_weight=0,0"], "twice"),
    (["loss.z_weight=0"], "one cell"),
    (["loss.z_weight="], "names no values"),
    (["loss.z_weight"], "names no values"),
    (["train.seed=1,2"], "not varied"),
    (["model.n_layers=1,2", "model.n_layers=1,2"], "twice"),
])
def test_what_cannot_be_a_grid_is_refused_in_one_line(over, words):
    with pytest.raises(ConfigError) as caught:
        grid(*over)
    assert words in caught.value.message and "\n" not in caught.value.message
    assert caught.value.hint


def test_other_mistakes_are_refused_too():
    with pytest.raises(ConfigError, match="--seeds is 0"):
        grid(seeds=0)
    with pytest.raises(ConfigError, match=r"train.seed is 2147483648"):
        grid(seeds=2, overrides={"train.seed": str(2**31 - 1)})
    with pytest.raises(ConfigError, match="no cell 'fall'"):
        grid(baseline="fall")
    with pytest.raises(ConfigError, match="only the path attn"):
        grid(overrides={"model.paths": "attention"})
