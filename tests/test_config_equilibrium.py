"""The config of the equilibrium family: what is refused, decided, and said of it."""

import dataclasses
import math
import typing

import pytest
import tiny_run

from hippocampus.config import Config, EquilibriumConfig
from hippocampus.config_files import defaults, fields, from_dict, load_config
from hippocampus.devices import Device, portable, resolve
from hippocampus.errors import ConfigError
from hippocampus.exports.model_facts import facts_of


def refusal(family: str, overrides: dict[str, typing.Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(defaults(family), overrides)
    for line in (caught.value.message, caught.value.hint):
        assert line and len(line.splitlines()) == 1
    return caught.value


# ---------------------------------------------------------------- refused

EXPLICIT = {"model.solver.method": "explicit"}

REFUSED = [
    ({"model.segments.train": 2},
     "model.segments.train is not a field of the equilibrium family"),
    ({"model.paths": "ssm"}, "model.paths is not a field of the equilibrium family"),
    ({"model.attention.window": 4},
     "model.attention.window is not a field of the equilibrium family"),
    ({"model.solver.methode": "picard"}, "model.solver.methode is not a field"),
    ({"model.d_model": 30}, "model.d_model = 30 is not a multiple of model.n_heads = 4"),
    ({"loss.rectified_flow.depth_weight": 0.1},
     "loss.rectified_flow is set, and model.family is equilibrium"),
    ({"model.ssm.kind": "gated"}, "model.ssm.kind is gated in an equilibrium model"),
    ({"model.ssm.first_layer": 1}, "model.ssm.first_layer is set"),
    ({"model.cell.ssm.dominance": 0.5}, "model.cell.ssm.dominance is set"),
    ({"model.ssm.expansion": 1.001}, "model.ssm.expansion * model.d_model = 256.256 is not whole"),
    ({"model.cell.ssm.expansion": 0.5078125},
     "model.cell.ssm.expansion * model.d_model = 130 is not a multiple of model.n_heads = 4"),
    ({"model.ssm.kind": "ssd", "model.ssm.head_width": 96},
     "model.ssm.expansion * model.d_model = 512 is not a multiple of model.ssm.head_width = 96"),
    ({"model.ssm.kind": "ssd", "model.ssm.n_groups": 3}, "model.ssm has 8 heads"),
    ({"model.cell.parts": ()}, "model.cell.parts is ()"),
    ({"model.cell.parts": ("mlp", "mlp")}, "model.cell.parts is ('mlp', 'mlp')"),
    ({"model.cell.copies": 2}, "model.cell.copies = 2 has no fixed point"),
    ({"model.cell.copies": 0}, "model.cell.copies = 0 has no fixed point"),
    ({"model.solver.warm_start": "stream"},
     "model.solver.warm_start is stream, and data.order shuffled"),
    ({"model.solver.warmup_fraction": 0.6, "model.solver.ramp_fraction": 0.5},
     "model.solver.warmup_fraction = 0.6 and ramp_fraction = 0.5"),
    ({"model.solver.warmup_fraction": 0.1, "model.solver.warmup_iterations": 8,
      "model.solver.max_iterations": 4}, "model.solver.warmup_iterations = 8 is more than"),
    ({"model.solver.jitter": 4, "model.solver.max_iterations": 4}, "model.solver.jitter = 4"),
    ({"model.solver.on_expansion": "skip", "model.solver.tol_fixedpoint": 0.0},
     "model.solver.on_expansion is skip, and tol_fixedpoint 0"),
    ({"model.solver.cache": "iterations", "model.solver.schedule": "cascade"},
     "model.solver.cache is iterations, and model.solver.schedule cascade"),
    ({"model.cell.parts": ("ssm", "mlp"), "loss.equilibrium.energy_weight": 0.1},
     "loss.equilibrium.energy_weight needs hopfield in model.cell.parts"),
    ({**EXPLICIT, "loss.equilibrium.jacobian_weight": 1.0},
     "loss.equilibrium is set, and model.solver.method is explicit"),
    ({**EXPLICIT, "model.solver.on_expansion": "stop"},
     "model.solver.on_expansion is stop, and model.solver.method explicit"),
    ({**EXPLICIT, "model.solver.cache": "iterations"}, "model.solver.cache is iterations"),
    ({**EXPLICIT, "model.cell.copies": 0, "model.n_layers": 0},
     "model.n_layers and model.cell.copies are 0"),
    ({"optimizer.groups": (("(", 1.0, 0.0),)}, "optimizer.groups[0]: '(' is not a regular"),
    ({"optimizer.groups": (("slots$", -1.0, 0.0),)},
     "optimizer.groups has learning_rate_scale = -1"),
    ({"optimizer.groups": (("slots$", 1.0),)}, "optimizer.groups[0] has 2 entries; it must have 3"),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED)
def test_what_cannot_be_is_refused_in_one_line(overrides, words):
    assert refusal("equilibrium", overrides).message.startswith(words)


@pytest.mark.parametrize("field", ["model.solver.method", "model.cell.gain", "model.solver"])
def test_a_field_of_this_family_is_no_field_of_another(field):
    error = refusal("hybrid", {field: "1"})
    assert error.message == f"{field} is not a field of the hybrid family"
    assert error.hint == "it belongs to model.family=equilibrium"


def test_the_hybrid_has_no_terms_of_a_fixed_point():
    error = refusal("hybrid", {"loss.equilibrium.energy_weight": 0.1})
    assert error.message.startswith("loss.equilibrium is set, and model.family is hybrid")


@pytest.mark.parametrize("overrides", [
    {}, {**EXPLICIT, "model.cell.copies": 0}, {**EXPLICIT, "model.cell.copies": 7},
    {"model.solver.warm_start": "stream", "data.order": "streams"},
    {"model.cell.parts": ("ssm",), "loss.equilibrium.contraction_weight": 1.0},
    {"model.ssm.kind": "ssd", "model.ssm.n_groups": 4}, {"model.n_layers": 0},
    {"optimizer.groups": "(('slots$', 0.3, 0.0), ('^cell/', 1.0, 0.1))"}])
def test_what_can_be_is_not_refused(overrides):
    config = load_config(defaults("equilibrium"), overrides)
    assert from_dict(dataclasses.asdict(config)) == config


FIELDS = [name for name in fields(Config(model=EquilibriumConfig()))
          if name.startswith(("model.", "loss.equilibrium."))]
SHARP = (None, True, -1, math.nan, 10**5000, "", "a\0b", "x" * 5000, (), [None], 0, 0.0, 1 - 1e-9)


@pytest.mark.parametrize("field", FIELDS)
def test_any_value_of_any_field_is_refused_in_one_line_or_taken(field):
    *groups, last = field.split(".")
    for value in SHARP:
        values = dataclasses.asdict(Config(model=EquilibriumConfig()))
        inner = values
        for group in groups:
            inner = inner[group]
        inner[last] = value
        try:
            found = fields(from_dict(values))[field]
            assert found == value or (value == [None] and found == (None,))
        except ConfigError as error:
            assert len(error.message.splitlines()) == len(error.hint.splitlines()) == 1


# ---------------------------------------------------------------- decided, and described

H100 = Device("gpu", "NVIDIA H100 80GB HBM3", 9.0)


def test_automatic_fields_are_decided_for_the_device():
    config, decided = resolve(load_config(defaults("equilibrium")), H100)
    assert set(decided) == {"model.compute_dtype", "model.hopfield.backend", "model.ssm.backend",
                            "model.cell.ssm.backend", "loss.backend"}
    assert "auto" not in [value for name, value in fields(config).items()
                          if name.endswith(("backend", "dtype"))]
    assert config.model.hopfield.backend == "cudnn" and config.model.compute_dtype == "bfloat16"
    assert portable(config).model.hopfield.backend == "xla"
    assert resolve(config, H100) == (config, ())


def test_attention_that_a_device_does_not_have_is_refused():
    config = load_config(defaults("equilibrium"), {"model.hopfield.backend": "cudnn"})
    with pytest.raises(ConfigError, match=r"^model\.hopfield\.backend is cudnn on cpu"):
        resolve(config, Device("cpu"))


@pytest.mark.parametrize(("overrides", "outline", "tags"), [
    ({}, "4 Mamba layers (s6), the fixed point of a cell of state space + Hopfield memory + MLP; "
     "width 256", {"mamba", "modern-hopfield-network", "deep-equilibrium-model"}),
    ({**EXPLICIT, "model.cell.copies": 3, "model.cell.parts": ("mlp",), "model.n_layers": 1},
     "1 Mamba layer (s6), 3 cells of MLP; width 256", {"mamba"}),
    ({**EXPLICIT, "model.cell.copies": 0}, "4 Mamba layers (s6); width 256", {"mamba"})])
def test_a_page_says_what_the_model_is_made_of(overrides, outline, tags):
    facts = facts_of(load_config(defaults("equilibrium"), overrides).model)
    assert facts.outline == outline
    assert set(facts.tags) == {"state-space-model", *tags}
    assert ("Hopfield" in dict(facts.rows).get("equilibrium", "")) == (
        "deep-equilibrium-model" in tags)


def test_an_impossible_setting_ends_with_64_before_data_is_looked_for(tmp_path):
    done = tiny_run.run(tiny_run.command(
        tmp_path / "run", model__family="equilibrium", model__cell__copies=3,
        data__corpus=tmp_path / "missing.txt"))
    assert done.returncode == 64 and done.stdout == "" and not (tmp_path / "run").exists()
    first, second = done.stderr.splitlines()
    assert first == "error: model.cell.copies = 3 has no fixed point"
    assert second.startswith("hint: it has one cell")
