"""The schema of a run, and every way in and out of it."""

import dataclasses
import json
import math
import re
import typing
from pathlib import Path

import pytest
from config_schema import schema
from hypothesis import given, settings
from hypothesis import strategies as st

from hippocampus.config import FAMILIES, Config, HybridConfig, layer_paths
from hippocampus.config_checks import check_together
from hippocampus.config_files import (
    FORMAT,
    check_value,
    defaults,
    fields,
    from_dict,
    load_config,
    read_json,
    to_json,
)
from hippocampus.config_values import parse_value
from hippocampus.errors import ConfigError, DataError

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.py"))


SCHEMA = schema()


def of_kind(name: str, *kinds: type) -> bool:
    return SCHEMA[name][0] in kinds


NUMBERS = [name for name in SCHEMA if of_kind(name, int, float)]
TUPLES = [name for name in SCHEMA if typing.get_origin(SCHEMA[name][0]) is tuple]


def with_value(name: str, value: object) -> Config:
    """The default config with one field changed, as a config file would change it."""
    values = json.loads(json.dumps(dataclasses.asdict(Config())))
    *groups, last = name.split(".")
    inner = values
    for group in groups:
        inner = inner[group]
    inner[last] = value
    return from_dict(values)


def refusal(name: str, value: object) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        with_value(name, value)
    assert "\n" not in caught.value.message and "\n" not in caught.value.hint
    assert caught.value.hint
    return caught.value


# ---------------------------------------------------------------- every field

def test_schema_has_the_stable_names():
    stable = {*re.findall(r"\S+", """train.steps train.seed train.batch_size train.grad_accumulation
        optimizer.learning_rate optimizer.warmup_steps model.family model.d_model model.n_layers
        model.n_heads model.paths model.hopfield.patterns model.hopfield.depth_schedule
        model.segments.train model.segments.eval model.segments.gradient loss.label_smoothing
        loss.z_weight ema.decay data.corpus data.tokenizer data.context checkpoint.every_steps
        log.every_steps eval.every_steps mesh.data mesh.fsdp mesh.tensor mesh.sequence""")}
    assert stable <= set(SCHEMA)
    assert any(name.startswith("model.ssm.") for name in SCHEMA)
    assert any(name.startswith("loss.rectified_flow.") for name in SCHEMA)


@pytest.mark.parametrize("name", SCHEMA)
def test_default_passes_its_own_check(name):
    kind, limits = SCHEMA[name]
    default = fields(Config())[name]
    assert check_value(name, default, kind, limits) == default
    assert limits["meaning"]


def test_defaults_fit_together():
    assert from_dict(defaults("hybrid").to_dict()) == Config()


def wrong_type(kind: object) -> st.SearchStrategy:
    """Values that a field of this type must refuse whatever its range."""
    other = st.one_of(st.none(), st.dictionaries(st.text(), st.integers(), max_size=1),
                      st.binary(max_size=2), st.complex_numbers())
    not_finite = st.sampled_from([math.nan, math.inf, -math.inf])
    if kind is bool:
        return other | st.integers() | st.floats() | st.text() | st.lists(st.booleans())
    if kind is int:
        return other | st.booleans() | st.floats() | st.text() | st.lists(st.integers())
    if kind is float:
        return other | st.booleans() | not_finite | st.text() | st.lists(st.floats())
    if kind is str:
        return other | st.booleans() | st.integers() | st.floats() | st.lists(st.text())
    return other | st.booleans() | st.integers() | st.floats() | st.text()


@given(data=st.data(), name=st.sampled_from(sorted(SCHEMA)))
@settings(deadline=None, max_examples=400)
def test_wrong_type_is_refused_naming_the_field(data, name):
    error = refusal(name, data.draw(wrong_type(SCHEMA[name][0])))
    # The family is what the other fields are chosen by.
    assert error.message.startswith(f"{name} is ")


@given(data=st.data(), name=st.sampled_from(sorted(NUMBERS)))
@settings(deadline=None, max_examples=400)
def test_number_out_of_range_is_refused_naming_the_field(data, name):
    kind, limits = SCHEMA[name]
    low, above = limits["low"], limits["above"]
    high, below = limits["high"], limits["below"]
    number = st.integers if kind is int else st.floats
    outside = []
    if low is not None:
        outside.append(number(max_value=low).filter(lambda x: x < low))
    if above is not None:
        outside.append(number(max_value=above))
    if high is not None:
        outside.append(number(min_value=high).filter(lambda x: x > high))
    if below is not None:
        outside.append(number(min_value=below))
    assert outside, f"{name} takes any number"
    assert refusal(name, data.draw(st.one_of(outside))).message.startswith(f"{name} is ")


@pytest.mark.parametrize("name", sorted(n for n in SCHEMA if of_kind(n, float)))
def test_float_takes_a_whole_number_but_none_too_large_for_a_float(name):
    assert refusal(name, 10**400).message.startswith(f"{name} is ")
    kind, limits = SCHEMA[name]
    whole = 1 if limits["low"] is None else math.ceil(limits["low"])
    if limits["below"] is None or whole < limits["below"]:
        value = check_value(name, whole, kind, limits)
        assert value == whole and type(value) is float


@given(name=st.sampled_from(sorted(n for n in SCHEMA if SCHEMA[n][1]["choices"]
                                   and of_kind(n, str))), word=st.text())
@settings(deadline=None)
def test_word_that_is_no_choice_is_refused(name, word):
    if word not in SCHEMA[name][1]["choices"]:
        assert refusal(name, word).message.startswith(f"{name} is ")


@pytest.mark.parametrize("name", TUPLES)
@pytest.mark.parametrize("entry", [None, True, math.nan, [[]], {"a": 1}, b"x"])
def test_wrong_entry_of_a_tuple_is_refused_naming_the_field(name, entry):
    assert refusal(name, [entry]).message.startswith(f"{name}[0]")


@pytest.mark.parametrize(("name", "value", "words"), [
    ("model.family", "hybird", ["did you mean hybrid?"]),
    ("optimizer.schedule", "cosin", ["cosine, wsd, constant", "did you mean cosine?"]),
    ("model.paths", ["ssm", "atention"], ["model.paths[1]", "did you mean attention?"]),
    ("train.steps", 0, ["it must be an integer at least 1"]),
    ("train.steps", True, ["it must be an integer"]),
    ("ema.decay", 1.0, ["a finite number at least 0 and below 1"]),
    ("optimizer.no_decay", ["(", "b"], ["optimizer.no_decay", "not a regular expression"]),
    ("mesh.rules", [["kernel$"]], ["mesh.rules[0] has 1 entries; it must have 2"]),
    ("mesh.rules", [["(", "fsdp"]], ["mesh.rules[0]", "not a regular expression"]),
    ("mesh.rules", [["kernel$", "fdsp,tensor"]], ["mesh.rules", "'fdsp'", "fsdp"]),
    ("mesh.rules", [["kernel$", "fsdp+fsdp,-"]], ["mesh.rules names an axis twice"]),
    ("mesh.rules", [["kernel$", ""]], ["mesh.rules names the axis ''"]),
])
def test_refusal_says_what_is_allowed(name, value, words):
    error = refusal(name, value)
    for word in words:
        assert word in f"{error.message} {error.hint}"


@pytest.mark.parametrize(("name", "nearest"), [
    ("train.stepz", "train.steps"), ("trian.steps", "train.steps"),
    ("optimizer.learningrate", "optimizer.learning_rate"),
    ("model.ssm.expnsion", "model.ssm.expansion"),
    ("model.dmodel", "model.d_model"), ("steps", "train.steps"),
    ("train.learning_rate", "optimizer.learning_rate"), ("zzz", None),
])
def test_unknown_field_gets_the_nearest_name(name, nearest):
    with pytest.raises(ConfigError) as caught:
        load_config(defaults(), {name: "1"})
    assert caught.value.message == f"{name} is not a field"
    assert caught.value.hint == (f"did you mean {nearest}?" if nearest
                                 else "hippocampus/config.py lists every field")


def test_unknown_field_of_a_mapping_is_refused():
    with pytest.raises(ConfigError, match=r"^model\.ssm\.width is not a field"):
        from_dict({"model": {"ssm": {"width": 3}}})


@pytest.mark.parametrize("name", ["model", "train", "model.ssm", "loss.rectified_flow"])
def test_group_is_no_value_and_a_value_is_no_group(name):
    with pytest.raises(ConfigError, match=f"^{name} is a group of fields"):
        load_config(defaults(), {name: "1"})
    assert refusal(name, 3).message == f"{name} is 3; it must be a group of fields"


# ---------------------------------------------------------------- overrides

@pytest.mark.parametrize(("name", "text", "value"), [
    ("train.steps", "20", 20), ("train.steps", "1_000", 1000), ("mesh.data", "-1", -1),
    ("optimizer.learning_rate", "3e-4", 3e-4), ("optimizer.learning_rate", "1", 1.0),
    ("model.tie_embeddings", "false", False), ("model.tie_embeddings", "True", True),
    ("model.hopfield.depth_schedule", "3,2,1", (3, 2, 1)),
    ("model.hopfield.depth_schedule", "(3, 2)", (3, 2)),
    ("model.hopfield.depth_schedule", "[4]", (4,)),
    ("model.hopfield.depth_schedule", "(4)", (4,)),
    ("model.hopfield.depth_schedule", "4,", (4,)),
    ("model.segments.weights", "0.5,1", (0.5, 1.0)),
    ("model.segments.weights", "(0, 1)", (0.0, 1.0)),
    ("model.paths", "ssm,attention", ("ssm", "attention")),
    ("model.paths", "('ssm',)", ("ssm",)),
    ("model.layer_paths", "ssm,ssm+attention,ssm,hopfield",
     ("ssm", "ssm+attention", "ssm", "hopfield")),
    ("model.layer_paths", "", ()),
    ("optimizer.no_decay", r"bias$,scale$", ("bias$", "scale$")),
    ("mesh.rules", "(('kernel$', 'fsdp,-'),)", (("kernel$", "fsdp,-"),)),
    ("data.corpus", "a=b,c.txt", "a=b,c.txt"), ("sample.prompt", "1, 2", "1, 2"),
    ("data.subset", "", ""), ("name", "true", "true"),
])
def test_override_text_is_read_as_the_type_of_its_field(name, text, value):
    found = fields(load_config(defaults(), {name: text}))[name]
    assert found == value and type(found) is type(value)
    if isinstance(value, tuple):
        assert [type(x) for x in found] == [type(x) for x in value]


def test_override_that_is_no_text_is_taken_as_it_is():
    config = load_config(defaults(), {"train.steps": 7, "model.paths": ["ssm"]})
    assert config.train.steps == 7 and config.model.paths == ("ssm",)


@pytest.mark.parametrize(("name", "text"), [
    ("train.steps", "1.5"), ("train.steps", "many"), ("train.steps", ""), ("train.steps", "0x10"),
    ("optimizer.learning_rate", "nan"), ("optimizer.learning_rate", "inf"),
    ("optimizer.learning_rate", "1e999"), ("model.tie_embeddings", "1"),
    ("model.tie_embeddings", "maybe"), ("model.hopfield.depth_schedule", "3,x"),
    ("model.hopfield.depth_schedule", "(3, 2"), ("model.hopfield.depth_schedule", "3.0"),
    ("model.hopfield.depth_schedule", "[{[]: 1}]"), ("mesh.rules", "ab,cd"),
    ("train.steps", "9" * 5000),
])
def test_override_of_the_wrong_type_is_refused_naming_the_field(name, text):
    with pytest.raises(ConfigError) as caught:
        load_config(defaults(), {name: text})
    assert caught.value.message.startswith(name)
    assert "\n" not in caught.value.message


@given(name=st.sampled_from(sorted(SCHEMA)), text=st.text())
@settings(deadline=None, max_examples=300)
def test_any_override_text_gives_a_config_or_a_config_error(name, text):
    try:
        load_config(defaults(), {name: text})
    except ConfigError as error:
        assert len(error.message.splitlines()) == 1


def test_override_reaches_a_config_that_has_only_some_groups():
    from ml_collections import ConfigDict

    config = load_config(ConfigDict({"train": {"steps": 5}}),
                         {"optimizer.learning_rate": "0.5", "model.ssm.d_conv": "2"})
    assert (config.train.steps, config.optimizer.learning_rate) == (5, 0.5)
    assert config.model.ssm.d_conv == 2


def test_parse_value_leaves_what_it_cannot_read_to_the_check():
    assert parse_value("x", "many", int) == "many"


# ---------------------------------------------------------------- config files

def write(tmp_path: Path, body: str, name: str = "mine.py") -> str:
    path = tmp_path / name
    path.write_text("from hippocampus.config_files import defaults\n" + body)
    return str(path)


def file_error(source: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    assert "\n" not in caught.value.message and "\n" not in caught.value.hint
    assert caught.value.hint
    return caught.value


GOOD = """def get_config(arg='0.5'):
    c = defaults()
    c.ema.decay = float(arg)
    return c
"""


def test_config_file_gives_its_values_and_its_name(tmp_path):
    config = load_config(write(tmp_path, GOOD))
    assert (config.name, config.ema.decay) == ("mine", 0.5)


def test_argument_of_a_config_file_is_passed_and_named(tmp_path):
    config = load_config(write(tmp_path, GOOD) + ":0.25")
    assert (config.name, config.ema.decay) == ("mine-0.25", 0.25)


def test_name_that_the_config_or_an_override_gives_is_kept(tmp_path):
    source = write(tmp_path, GOOD.replace("c.ema", "c.name = 'other'; c.ema"))
    assert load_config(source).name == "other"
    assert load_config(source, {"name": "third"}).name == "third"


def test_missing_config_file_names_the_nearest(tmp_path):
    write(tmp_path, GOOD)
    error = file_error(str(tmp_path / "mien.py"))
    assert "no config file at" in error.message and "mine.py" in error.hint


@pytest.mark.parametrize("source", ["none", "none.py", "none.py:arg", "no/such/folder/x.py", ""])
def test_source_that_is_no_file_is_refused(source):
    assert "no config file at" in file_error(source).message


def test_syntax_error_gives_its_line(tmp_path):
    error = file_error(write(tmp_path, "def get_config(:\n    pass\n"))
    assert f"{tmp_path / 'mine.py'}:2: SyntaxError" in error.message


@pytest.mark.parametrize("relative", [False, True])
def test_wrong_field_in_a_config_file_gives_its_line_and_the_nearest(
        tmp_path, monkeypatch, relative):
    path = write(tmp_path, "def get_config():\n    c = defaults()\n    c.train.stepz = 1\n")
    monkeypatch.chdir(tmp_path)
    error = file_error("mine.py" if relative else path)
    assert "mine.py:4: " in error.message and "stepz is not a field" in error.message
    assert error.hint == "did you mean train.steps?"


def test_wrong_type_in_a_config_file_is_one_line(tmp_path):
    body = "def get_config():\n    c = defaults()\n    c.train.steps = 'many'\n    return c\n"
    message = file_error(write(tmp_path, body)).message
    assert "mine.py:4: TypeError" in message and "steps" in message


@pytest.mark.parametrize(("body", "words"), [
    ("x = 1\n", "has no get_config()"),
    ("def get_config():\n    return {}\n", "get_config() returned dict"),
    ("def get_config():\n    pass\n", "get_config() returned NoneType"),
    ("def get_config():\n    return 1 / 0\n", "mine.py:3: ZeroDivisionError"),
    ("import no_such_module_anywhere\n", "mine.py:2: ModuleNotFoundError"),
])
def test_config_file_that_does_not_work_is_one_line(tmp_path, body, words):
    assert words in file_error(write(tmp_path, body)).message


def test_argument_for_a_config_that_takes_none_is_refused(tmp_path):
    source = write(tmp_path, "def get_config():\n    return defaults()\n")
    assert "takes no argument, got 'x'" in file_error(source + ":x").message


def test_unknown_family_has_no_defaults():
    with pytest.raises(ConfigError, match="'hybird'") as caught:
        defaults("hybird")
    assert caught.value.hint == "did you mean hybrid?"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_committed_config_loads_and_its_model_builds(path):
    from hippocampus.models.build_model import build_model, count_parameters

    config = load_config(path)
    assert config.name == path.stem
    parameters = count_parameters(build_model(config))
    assert parameters > 0
    if path.stem == "quickstart":
        assert parameters < 1.5e6


def test_there_are_committed_configs():
    assert "quickstart" in {path.stem for path in CONFIGS}


# ---------------------------------------------------------------- config.json

def changed() -> Config:
    return load_config(defaults(), {
        "model.paths": "ssm,attention", "mesh.rules": "(('kernel$', 'fsdp,-'),)",
        "model.segments.weights": "0.25,1", "data.corpus": "ünï.txt", "train.seed": "11",
        "optimizer.epsilon": "1e-11"})


def test_config_json_gives_the_same_config_back(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(to_json(changed(), ("model.ssm.backend", "loss.backend")), "utf-8")
    assert read_json(path) == (changed(), ("loss.backend", "model.ssm.backend"))
    assert json.loads(path.read_text())["format"] == FORMAT


@pytest.mark.parametrize("text", [
    None, "", "{", "[]", "3", "null", "{}", json.dumps({"format": FORMAT + 1}),
    json.dumps({"format": "1"}), json.dumps({"format": None}), json.dumps({"model_type": "llama"}),
])
def test_json_that_is_no_config_or_of_a_newer_format_is_refused(tmp_path, text):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_json(path)
    assert str(path) in caught.value.message and "\n" not in caught.value.message


def test_newer_format_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"format": FORMAT + 1}))
    with pytest.raises(DataError, match=f"has format {FORMAT + 1}; this version reads {FORMAT}"):
        read_json(path)


def test_config_json_with_an_unknown_field_is_refused(tmp_path):
    content = json.loads(to_json(Config()))
    content["train"]["stepz"] = 1
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"train\.stepz is not a field"):
        read_json(path)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.steps = 3  # type: ignore[misc]
    assert isinstance(hash(Config().model), int), "a model is a static argument of jit"


# ---------------------------------------------------------------- fields that must fit together

@pytest.mark.parametrize(("overrides", "words"), [
    ({"model.n_heads": 3}, "model.d_model = 256 is not a multiple of model.n_heads = 3"),
    ({"train.grad_accumulation": 3},
     "train.batch_size = 32 is not a multiple of train.grad_accumulation = 3"),
    ({"model.attention.n_kv_heads": 3},
     "model.n_heads = 4 is not a multiple of model.attention.n_kv_heads = 3"),
    ({"model.attention.n_kv_heads": 8},
     "model.n_heads = 4 is not a multiple of model.attention.n_kv_heads = 8"),
    ({"model.d_model": 12, "model.n_heads": 4}, "even head width"),
    ({"model.d_model": 12, "model.n_heads": 4, "model.position": "none",
      "model.hopfield.rope": True}, "even head width"),
    ({"model.ssm.expansion": 1.501}, "is not whole"),
    ({"model.d_model": 12, "model.n_heads": 6, "model.ssm.expansion": 1.25},
     "model.ssm.expansion * model.d_model = 15 is not a multiple of model.n_heads = 6"),
    ({"model.ssm.kind": "ssd", "model.ssm.head_width": 100},
     "model.ssm.expansion * model.d_model = 384 is not a multiple of model.ssm.head_width = 100"),
    ({"model.ssm.kind": "ssd", "model.ssm.n_groups": 4},
     "model.ssm has 6 heads (model.ssm.expansion * model.d_model / model.ssm.head_width), which "
     "model.ssm.n_groups = 4 does not divide"),
    ({"model.ssm.kind": "ssd", "model.ssm.backend": "pallas"},
     "model.ssm.backend is pallas, and model.ssm.kind ssd"),
    ({"model.ssm.kind": "s6", "model.ssm.input_scale": True},
     "model.ssm.input_scale is True, and model.ssm.kind s6"),
    ({"model.paths": ()}, "model.paths is ()"),
    ({"model.paths": ("ssm", "ssm")}, "model.paths is ('ssm', 'ssm')"),
    ({"model.paths": ("ssm",), "model.ssm.first_layer": 2}, "layer 0 has no path"),
    ({"model.layer_paths": ("ssm",)}, "model.layer_paths has 1 entries for 4 layers"),
    ({"model.layer_paths": ("ssm", "ssm+mlp", "ssm", "ssm")}, "model.layer_paths[1] names 'mlp'"),
    ({"model.layer_paths": ("ssm", "", "ssm", "ssm")}, "model.layer_paths[1]"),
    ({"model.hopfield.depth_schedule": ()}, "model.hopfield.depth_schedule is empty"),
    ({"model.segments.train": 3, "model.segments.eval": 2},
     "model.segments.eval = 2 is less than model.segments.train = 3"),
    ({"model.segments.weights": (1.0, 0.0)}, "last of model.segments.weights must be above 0"),
    ({"model.segments.weights": ()}, "last of model.segments.weights must be above 0"),
    ({"model.segments.train": 1, "loss.rectified_flow.segment_weight": 0.1},
     "loss.rectified_flow.segment_weight needs model.segments.train of at least 2"),
    ({"model.position": "learned", "model.max_length": 64},
     "model.max_length = 64 is less than data.context = 128"),
    ({"eval.stride": 129}, "eval.stride = 129 is more than the evaluation's context of 128"),
    ({"eval.stride": 65, "eval.context": 64}, "eval.stride = 65 is more than"),
    ({"model.position": "learned", "eval.context": 129},
     "eval.context = 129 is more than the learned positions, 128"),
    ({"name": ""}, "name is ''"), ({"name": "a/b"}, "name is 'a/b'"),
    ({"name": ".."}, "name is '..'"), ({"name": "a\\b"}, "name is"), ({"name": "a\0"}, "name is"),
])
def test_fields_that_do_not_fit_together_are_refused(overrides, words):
    with pytest.raises(ConfigError) as caught:
        load_config(defaults(), overrides)
    assert words in caught.value.message and caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("overrides", [
    {"model.d_model": 12, "model.position": "learned", "model.ssm.expansion": 1},
    {"model.d_model": 12, "model.paths": ("ssm",), "model.ssm.expansion": 1},
    {"model.ssm.expansion": 1.501, "model.paths": ("attention",)},
    {"model.attention.n_kv_heads": 3, "model.paths": ("ssm",)},
    {"model.attention.n_kv_heads": 2}, {"model.ssm.first_layer": 2},
    {"eval.stride": 129, "eval.context": 200}, {"eval.context": 4096, "eval.stride": 1},
    {"model.position": "learned", "model.max_length": 200, "eval.context": 200},
    {"model.position": "learned", "model.max_length": 128}, {"model.segments.eval": 1,
                                                             "model.segments.train": 1},
])
def test_what_is_not_used_does_not_have_to_fit(overrides):
    load_config(defaults(), overrides)


def test_layer_paths_come_in_the_order_of_paths_and_start_late():
    model = dataclasses.replace(
        HybridConfig(), n_layers=3, layer_paths=("attention+ssm", "attention", "hopfield+ssm"),
        ssm=dataclasses.replace(HybridConfig().ssm, first_layer=1))
    assert layer_paths(model) == (("attention",), ("attention",), ("ssm", "hopfield"))


@pytest.mark.parametrize("family", FAMILIES)
def test_check_together_returns_the_config(family):
    config = load_config(defaults(family))
    assert check_together(config) is config and config.model.family == family
