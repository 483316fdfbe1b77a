"""The experiments in configs/: sizes, tokens and what their docstrings promise."""

import re
from pathlib import Path

import pytest

from hippocampus.config_files import load_config, start_from
from hippocampus.errors import ConfigError
from hippocampus.models.build_model import build_model, count_parameters

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

# Millions of parameters: the smallest and the largest that the name stands for.
PARAMETERS = {
    "wt103_bpe.py": (97 * 0.98, 97 * 1.02), "wt103_word.py": (107 * 0.98, 107 * 1.02),
    "wt103_bytes.py": (70, 73), "openwebtext.py": (97 * 0.98, 97 * 1.02),
    "wikitext_mini.py": (24, 26.5), "wikitext_mini.py:10m": (9.5, 10.5),
    "wikitext_mini.py:25m": (24, 26.5), "wikitext_mini.py:97m": (97 * 0.98, 97 * 1.02),
    "wikitext_mini.py:bytes": (22, 24),
    "shakespeare.py": (3.4, 3.7), "shakespeare.py:3.5m": (3.4, 3.7),
    "shakespeare.py:10m": (9.5, 10.7), "shakespeare.py:50m": (48, 52)}


def config_of(name):
    return load_config(CONFIGS / name)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_config_has_the_size_that_it_is_named_after(name):
    smallest, largest = PARAMETERS[name]
    assert smallest * 1e6 <= count_parameters(build_model(config_of(name))) <= largest * 1e6


@pytest.mark.parametrize("file", sorted(path.name for path in CONFIGS.glob("*.py")))
def test_every_config_loads_and_its_docstring_has_the_command_that_trains_it(file):
    config = config_of(file)
    assert config.name == file.removesuffix(".py")
    assert f"--config=configs/{file}" in (CONFIGS / file).read_text()


@pytest.mark.parametrize("name", ["wt103_bpe.py", "wt103_word.py", "wikitext_mini.py"])
def test_the_wikitext_models_have_what_the_main_model_is_made_of(name):
    config = config_of(name)
    assert config.model.n_layers == 8
    assert set(config.model.paths) == {"ssm", "hopfield", "attention"}
    assert config.model.hopfield.depth_schedule[0] > config.model.hopfield.depth_schedule[-1]
    assert (config.model.segments.train, config.model.segments.gradient) == (2, "stop")
    assert config.model.segments.weights == (1.0,)  # the last pass alone
    assert config.ema.decay and config.loss.z_weight
    assert bool(config.loss.label_smoothing) == (name == "wikitext_mini.py")
    assert not config.loss.rectified_flow.segment_weight + config.loss.rectified_flow.depth_weight


@pytest.mark.parametrize("name", ["wt103_bpe.py", "wt103_word.py", "wt103_bytes.py"])
def test_the_docstring_states_the_tokens_that_25000_steps_see(name):
    config = config_of(name)
    assert config.train.steps == 25_000
    rows, context, billions = re.search(
        r"25,000 steps of ([\d,]+) x ([\d,]+) = ([\d.]+) billion",
        (CONFIGS / name).read_text()).groups()
    assert int(rows) == config.train.batch_size
    assert int(context.replace(",", "")) == config.data.context
    seen = config.train.steps * config.train.batch_size * config.data.context
    assert float(billions) == pytest.approx(seen / 1e9, abs=0.005)


def test_sizes_of_a_study_share_everything_but_the_widths():
    from hippocampus.config_files import fields

    first, *others = (fields(config_of(f"wikitext_mini.py:{size}")) for size in
                      ("10m", "25m", "97m"))
    for other in others:
        differing = {name for name in first if first[name] != other[name]}
        assert differing == {"name", "model.d_model", "model.n_heads", "model.mlp.width",
                             "model.attention.n_kv_heads"} - (
            {"model.attention.n_kv_heads"} if other["model.attention.n_kv_heads"] == 1 else set())


def test_kinds_of_state_space_cost_the_same_and_differ_in_nothing_else():
    from hippocampus.config_files import fields
    from hippocampus.models.flops import training_flops_per_token

    base = config_of("shakespeare.py:10m")
    for kind in ("gated", "diagonal", "s6", "ssd"):
        config = config_of(f"ssm_kinds.py:{kind}")
        assert config.model.ssm.kind == kind
        assert training_flops_per_token(config) == pytest.approx(
            training_flops_per_token(base), rel=0.0025)
        differing = {name for name, value in fields(config).items() if fields(base)[name] != value}
        assert differing <= {"name", "model.ssm.kind", "model.ssm.d_state", "model.mlp.width"}


@pytest.mark.parametrize("file", ["wikitext_mini.py", "shakespeare.py"])
def test_an_unknown_size_is_refused_with_the_known_ones(file):
    with pytest.raises(ConfigError, match=r"has no size .7b..*10m"):
        config_of(f"{file}:7b")


def test_a_config_that_starts_from_another_changes_only_its_own_copy(tmp_path):
    (tmp_path / "a.py").write_text(
        "from hippocampus.config_files import defaults\n"
        "def get_config():\n    c = defaults()\n    c.train.steps = 7\n    return c\n")
    (tmp_path / "b.py").write_text(
        "from hippocampus.config_files import start_from\n"
        "def get_config():\n    c = start_from('a.py', __file__)\n    c.train.seed = 3\n"
        "    return c\n")
    b = load_config(tmp_path / "b.py")
    assert (b.name, b.train.steps, b.train.seed) == ("b", 7, 3)
    assert load_config(tmp_path / "a.py").train.seed == 0
    with pytest.raises(ConfigError, match=r"no config file at .*c\.py"):
        start_from("c.py", str(tmp_path / "b.py"))
