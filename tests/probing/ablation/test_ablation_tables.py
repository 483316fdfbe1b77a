"""The tables of planted runs, against numbers worked out by hand."""

import csv
import json
import math
from pathlib import Path

import planted_cells as planted
import pytest

from hippocampus.errors import DataError
from hippocampus.evaluation.result_table import FLAG, Protocol
from hippocampus.probing.ablation import tables
from hippocampus.probing.ablation.knockout import Knockout
from hippocampus.probing.ablation.matching import parameters
from hippocampus.probing.ablation.rows import write_csv
from hippocampus.probing.ablation.runs import read_finished
from hippocampus.probing.ablation.study import conclude
from hippocampus.probing.ablation.summaries import find, scaling_fits

PATHS = ("ssm", "hopfield", "attention")
LOSSES = {"full": (2.0, 2.1, 2.2), "ssm+hop": (2.1, 2.3, 2.6), "ssm+attn": (2.0, 2.1, 2.2),
          "hop+attn": (2.5, 2.5, 2.5), "ssm": (2.2, 2.2, 2.2), "hop": (3.5, 2.4, 2.4),
          "attn": (2.3, None, 2.4)}


PROTOCOL = Protocol("planted", planted.DIGEST, "validation", 992, "bytes", "cd" * 32, 256, 16, 16,
                    "joined", "ema", 12)
"""Of the knock-outs: fewer tokens than the evaluation at the end has."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return planted.study(tmp_path_factory.mktemp("paths"), planted.grid(), LOSSES)


def knockouts(study):
    """Twice as bad as the retrained ones of the same paths; without renormalising a bit less."""
    subsets = {cell.paths: cell.name for cell in study.grid.cells}
    return tuple(Knockout("full", seed, {
        subset: (2 * LOSSES[name][0] + i, 2 * LOSSES[name][0] + i - 0.25)
        for subset, name in subsets.items()}, PROTOCOL) for i, seed in enumerate(study.grid.seeds))


def row(table, name):
    (found,) = [row for row in table.rows if row["name"] == name]
    return found


def test_losses_are_means_over_seeds_beside_the_counted_lines(paths):
    table = tables.loss_table(find(paths.grid, read_finished(paths)))
    found = row(table, "ssm+hop")
    assert found["loss"] == pytest.approx(7.0 / 3)
    assert found["loss_sd"] == pytest.approx(math.sqrt(0.19 / 3))  # 0.1633..., worked out
    assert found["raw"] == pytest.approx(7.0 / 3 + 0.5)
    assert found["bits"] == pytest.approx(7.0 / 3 / math.log(2) / 2)
    assert row(table, "unigram")["loss"] == 3.0 and row(table, "bigram")["loss"] == 2.5
    assert row(table, "uniform")["loss"] == pytest.approx(math.log(256))
    assert row(table, "attn")["seeds"] == 2
    assert table.columns[2].unit == "nats/token"


def test_a_cell_with_a_seed_worse_than_unigram_is_flagged(paths):
    table = tables.loss_table(find(paths.grid, read_finished(paths)))
    assert [row["name"] for row in table.rows if row.get(FLAG)] == ["hop"]
    assert any("! hop: this model is worse than the unigram line" in note for note in table.notes)


def test_differences_are_paired_by_seed_and_corrected_for_their_number(paths):
    table = tables.difference_table(find(paths.grid, read_finished(paths)))
    # 0.1, 0.2, 0.4 against full: t = sqrt(7) with two degrees of freedom.
    found = row(table, "ssm+hop")
    assert found["p"] == pytest.approx(1 - math.sqrt(7) / 3)
    # hop+attn comes before it: 0.5, 0.4, 0.3, t = 4 sqrt(3); five of six comparisons are left.
    assert row(table, "hop+attn")["p"] == pytest.approx(1 - 4 * math.sqrt(3) / math.sqrt(50))
    assert row(table, "hop+attn")["p_holm"] == pytest.approx(6 * row(table, "hop+attn")["p"])
    assert found["p_holm"] == pytest.approx(5 * found["p"])
    # One degree of freedom: the Cauchy distribution. 0.3, 0.2: t = 5.
    assert row(table, "attn")["p"] == pytest.approx(1 - 2 / math.pi * math.atan(5))
    assert row(table, "ssm+attn")["p"] == 1.0 and row(table, "ssm+attn")["difference"] == 0
    assert row(table, "attn")["pairs"] == 2
    assert "full" not in [row["name"] for row in table.rows]


def test_knockouts_stand_beside_the_retrained_losses(paths):
    found = find(paths.grid, read_finished(paths), knockouts(paths))
    table, lost = tables.knockout_tables(found, knockouts(paths))
    ssm = row(table, "ssm")
    assert (ssm["retrained"], ssm["knockout"], ssm["knockout_raw"]) == (
        pytest.approx(2.2), pytest.approx(5.4), pytest.approx(5.15))
    assert ssm["knockout_sd"] == pytest.approx(1.0)
    assert row(table, "ssm+hop+attn")["knockout"] == pytest.approx(5.0)
    assert row(lost, "ssm")["lost_retrained"] == pytest.approx(0.1)
    assert row(lost, "ssm")["lost_knockout"] == pytest.approx(0.4)
    assert len(lost.rows) == 6
    assert [(p.tokens, p.seeds) for p in table.protocols] == [(1000, 3), (992, 3)]
    assert all(row.get(FLAG) for row in table.rows)
    assert not any(row.get(FLAG) for row in lost.rows)


def test_every_whole_model_has_its_own_knockouts(tmp_path):
    made = planted.grid("model.n_layers=1,2", paths=True, seeds=1,
                        overrides={"model.paths": ("ssm", "attention")})
    study = planted.study(tmp_path, made, {cell.name: (2.0,) for cell in made.cells})
    cut = tuple(Knockout(f"full,n_layers={n}", 0, {
        paths: (n + len(paths), n + 0.5) for paths in (("ssm", "attention"), ("ssm",),
                                                       ("attention",))}, PROTOCOL)
                for n in (1, 2))
    found = find(made, read_finished(study), cut)
    knocked = tables.knockout_tables(found, cut)
    assert [table.name for table in knocked] == ["knockout", "lost", "knockout_1", "lost_1"]
    assert "of full, n_layers=2" in knocked[2].title
    assert [row(table, "ssm")["knockout"] for table in knocked[::2]] == [2.0, 3.0]
    assert row(knocked[3], "attn")["lost_knockout"] == -1.0


def test_speed_is_counted_to_what_the_worst_run_reaches(paths):
    table = tables.speed_table(find(paths.grid, read_finished(paths)))
    # hop's first seed ends at 3.5: the others are there at once, with 1 added at step 4.
    assert "3.5000" in table.title
    assert row(table, "ssm")["steps"] == 4 and row(table, "ssm")["seconds"] == 1.0
    assert row(table, "ssm")["tokens"] == 4 * 8 * 16
    assert row(table, "hop")["steps"] == pytest.approx((12 + 4 + 4) / 3)
    asked = tables.speed_table(find(paths.grid, read_finished(paths), target=2.15))
    assert row(asked, "full")["reached"] == "2 of 3" and row(asked, "full")["steps"] is None
    assert row(asked, "hop")["reached"] == "0 of 3"


def test_cells_of_two_tokenizers_are_compared_in_bits_per_byte_alone(tmp_path):
    made = planted.grid("data.tokenizer=bytes,characters")
    names = [cell.name for cell in made.cells]
    study = planted.study(tmp_path, made, dict.fromkeys(names, (2.0, 2.1, 2.2)),
                          tokenizers=dict(zip(names, ("cd" * 32, "ef" * 32), strict=True)))
    found = find(made, read_finished(study))
    result = conclude(study, found, (), {}, 0.0)
    assert found.unit == "bits/byte"
    assert not any(column.unit.endswith("/token") for table in result.tables
                   for column in table.columns)
    assert row(result.tables[0], names[0])["loss"] == pytest.approx(2.1 / math.log(2) / 2)
    lines = [row["name"] for row in result.tables[0].rows if row.get("category") == "line"]
    assert f"unigram (text of {names[1]})" in lines


def test_a_size_sweep_is_fitted_with_the_numbers_in_a_table(tmp_path):
    made = planted.grid("model.n_layers=1,2,4", "loss.z_weight=0,1e-4", seeds=2)
    sizes = {cell.name: parameters(cell.config) for cell in made.cells}
    study = planted.study(tmp_path, made, {
        name: [12 * n**-0.2 * (1 if "z_weight=0.0001" in name else 1.1)] * 2
        for name, n in sizes.items()})
    found = find(made, read_finished(study))
    fits = scaling_fits(found, parameters)
    assert [fit.label for fit in fits] == ["z_weight=0", "z_weight=0.0001"]
    assert [fit.law.alpha for fit in fits] == [pytest.approx(0.2, abs=1e-4)] * 2
    table = tables.scaling_table(found, fits)
    assert row(table, "z_weight=0.0001")["alpha"] == pytest.approx(0.2, abs=1e-4)
    assert any("E is fixed at 0" in note for note in table.notes)
    plots = [plot.name for plot in conclude(study, found, (), {}, 0.0).plots]
    assert plots == ["losses", "curves", "scaling", "scaling_1"]


def test_subsets_of_paths_are_no_size_sweep(paths):
    assert scaling_fits(find(paths.grid, read_finished(paths)), parameters) == []


def test_csv_rows_say_all_that_is_needed_to_use_them_alone(paths, tmp_path):
    found = find(paths.grid, read_finished(paths), knockouts(paths))
    about = {"version": "1", "commit": "abc", "command": ["ablate.py", "--seeds=3"]}
    write_csv(tmp_path, found, knockouts(paths), about)
    cells = list(csv.DictReader((tmp_path / "ablation.csv").open()))
    runs = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert len(cells) == 7 and len(runs) == 20
    ssm = next(row for row in cells if row["cell"] == "ssm")
    assert float(ssm["loss_mean"]) == pytest.approx(2.2)
    assert float(ssm["knockout_mean"]) == pytest.approx(5.4)
    assert (ssm["unigram"], ssm["unit"], ssm["commit"], ssm["command"], ssm["text"]) == (
        "3.0", "nats/token", "abc", "ablate.py --seeds=3", "planted")
    run = next(row for row in runs if row["cell"] == "ssm" and row["seed"] == "1")
    assert (float(run["knockout"]), float(run["nats_per_token_raw"])) == (5.4, 2.7)
    assert Path(run["run"]) == paths.folder(paths.grid["ssm"], 1).path


def test_what_has_no_result_is_said(paths):
    found = find(paths.grid, read_finished(paths))
    result = conclude(paths, found, (), {("attn", 1): "training did not recover"}, 0.0)
    assert result.notes == ("attn, seed 1: training did not recover; it is in no number",)


def test_a_damaged_result_is_named(tmp_path):
    study = planted.study(tmp_path, planted.grid("model.n_layers=1,2", seeds=1),
                          {"n_layers=1": (2.0,), "n_layers=2": (2.0,)})
    folder = study.folder(study.grid.cells[1], 0)
    folder.results.write_text(json.dumps({"step": 12}))
    with pytest.raises(DataError, match="n_layers=2/seed_0 is damaged"):
        read_finished(study)
