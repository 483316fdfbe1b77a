"""Whatever any field is set to, in whatever way: one line that refuses it, or a config that works.

The fields are found by walking the schema, so that a new one is covered as it is written.
"""

import dataclasses
import functools
import json
import math
import typing
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from config_schema import schema
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_dict

from hippocampus.config import Config
from hippocampus.config_files import defaults, fields, from_json, load_config, read_json, to_json
from hippocampus.config_refusals import shown
from hippocampus.devices import resolve
from hippocampus.errors import ConfigError, DataError
from hippocampus.evaluation.report import Windows
from hippocampus.models.build_model import build_model, parameter_shapes
from hippocampus.training.optimizer import build_optimizer, learning_rate_schedule

SCHEMA = schema()
PATTERNS = ("(", "[", "a{99999999999999999999}", "(" * 3000, "(?P<a>x)(?P<a>y)")
TEXTS = ("", " ", ".", "..", "auto", "a/b", "../x", "/etc", "a\0b", "\ud800", "a\nb", "x" * 5000,
         "\x1b[2J", "😀", "--x", "full", "learned", "both", "bpe", "x.json", *PATTERNS)
NUMBERS = (0, 1, 2, 3, 7, 16, -1, -2, 2**31 - 1, 2**31, 2**63, 10**400, 10**5000, -10**5000, 0.5,
           1.5, -0.5, -0.0, 1e-3, 1e-16, 1e-38, 1e-300, 5e-324, 1e10, 1e38, 3.5e38, 1e300,
           1 - 1e-9, math.nan, math.inf, -math.inf)
OTHERS = (None, True, False, b"x", {}, {"a": 1}, [], (), [1], [[1]], (1, 2), [0], (0.0, 1.0),
          ["ssm"], ("ssm", "ssm"), ["ssm+attention"], [("a", "fsdp")], [["a"]],
          [("a", "fsdp", "-")], [("(", "-")], [(PATTERNS[2], "-")], (1,) * 2000, (1.0,) * 500,
          [10**5000], [math.nan], [None], ["a\0"], 1j, set(), np.int32(3), np.array([1, 2]))
OVERRIDES = ("(1", "[1]", "1,", "1,2,3", "nan", "1e400", "1e-400", "true", "None", "0x10", "3.0",
             "9" * 5000, "(" + "9" * 5000 + ")", "(" * 300, "-" * 20_000 + "1",
             "(" + "-" * 20_000 + "1)", "[1]*9", "{1:2}", "({1},)", "(True,)", "(1,'a')",
             "__import__('os').system('false')", "[__import__('os')]")


def near_the_bounds(name: str) -> list:
    """The bounds of a field and what lies next to them."""
    kind, limits = SCHEMA[name]
    bounds = [limits[k] for k in ("low", "high", "above", "below") if limits[k] is not None]
    if kind is int:
        return [bound + d for bound in bounds for d in (-1, 0, 1)]
    return [x for bound in bounds
            for x in (bound, math.nextafter(bound, -math.inf), math.nextafter(bound, math.inf))]


def values(name: str) -> st.SearchStrategy:
    edges = (*NUMBERS, *TEXTS, *OTHERS, *near_the_bounds(name), *SCHEMA[name][1]["choices"])
    return st.one_of(st.sampled_from(edges), st.integers(), st.floats(), st.text(max_size=20),
                     st.lists(st.sampled_from(edges), max_size=4))


# ---------------------------------------------------------------- the ways in

@functools.cache
def base() -> dict[str, typing.Any]:
    """A small model that has everything, so that every field of one means something."""
    return dataclasses.asdict(tiny_run.config(
        model__paths=("ssm", "hopfield", "attention"), model__segments__train=2,
        loss__rectified_flow__segment_weight=0.1, loss__rectified_flow__depth_weight=0.1))


@functools.cache
def base_config_dict() -> ConfigDict:
    return ConfigDict(base())  # loading copies it


def nested(name: str, value: typing.Any) -> dict[str, typing.Any]:
    def changed(group: dict, path: list[str]) -> dict:
        first, *rest = path
        return {**group, first: changed(group[first], rest) if rest else value}
    return changed(base(), name.split("."))


def by_override(name: str, value: typing.Any) -> Config:
    return load_config(base_config_dict(), {name: value})


def by_config_dict(name: str, value: typing.Any) -> Config:
    return load_config(ConfigDict(nested(name, value)))


def by_json(name: str, value: typing.Any) -> Config:
    try:
        text = json.dumps({"format": 1, **nested(name, value)})
        content = json.loads(text)
    except (TypeError, ValueError):
        return by_override(name, value)  # no JSON can say this
    return from_json(content, Path("config.json"))[0]


WAYS = st.sampled_from([by_override, by_config_dict, by_json])


# ---------------------------------------------------------------- what must come of it

def check(config_of: typing.Callable[[], Config]) -> Config | None:
    """Calls it: a refusal must be a line and a hint, and what is accepted must work."""
    try:
        config = config_of()
    except ConfigError as error:
        for line in (error.message, error.hint):
            assert len(line.splitlines()) == 1 and len(line) < 1000 and line.encode(), line
        return None
    assert from_json(json.loads(to_json(config)), Path())[0] == config
    for name, value in fields(config).items():
        assert_right_type(name, value, SCHEMA[name][0])
    works(config)
    return config


def assert_right_type(name: str, value: object, kind: typing.Any) -> None:
    if typing.get_origin(kind) is tuple:
        item, *rest = typing.get_args(kind)
        assert isinstance(value, tuple) and (rest == [...] or len(value) == 1 + len(rest)), name
        for entry in value:
            assert_right_type(name, entry, item)
    else:
        assert isinstance(value, kind) and (kind is bool or not isinstance(value, bool)), name
        assert kind is not float or math.isfinite(np.float32(value)), name


def works(config: Config) -> None:
    """The model can be built, and the schedule has a number for every step."""
    resolved, _ = resolve(config)
    Windows.of(resolved)
    build_optimizer(resolved.optimizer, resolved.train.steps)
    assert_finite_schedule(resolved.optimizer, resolved.train.steps)
    if resolved.model.n_layers <= 4 and resolved.model.segments.train <= 4:  # others take long
        shapes_of(build_model(resolved))


@functools.cache
def shapes_of(model: typing.Any) -> None:
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(parameter_shapes(model)))


@functools.cache
def assert_finite_schedule(optimizer: typing.Any, steps: int) -> None:
    schedule = learning_rate_schedule(optimizer, steps)
    for step in {0, steps // 2, steps - 1}:
        assert math.isfinite(float(schedule(np.int32(step)))), step


def same(given: typing.Any, found: typing.Any) -> bool:
    if isinstance(found, tuple):
        return len(given) == len(found) and all(map(same, given, found))
    return given == found


def check_value_of(name: str, way: typing.Callable, value: typing.Any) -> None:
    config = check(lambda: way(name, value))
    # A string is read as the field's type by an override; all else is taken as it is or not at all.
    if config is not None and not (way is by_override and isinstance(value, str)):
        assert same(value, fields(config)[name]), "accepted, but not as it was given"


SHARP = (None, True, -1, math.nan, 10**5000, "", "a\0b", "x" * 5000, PATTERNS[2], [PATTERNS[2]],
         [(PATTERNS[2], "-")])
SHARP_TEXTS = ("-" * 20_000 + "1", "(" + "-" * 20_000 + "1)", "(" * 300, "9" * 5000, "(1,'a')")
"""What once went through, or made another error."""


@pytest.mark.parametrize("name", SCHEMA)
def test_what_once_was_wrong_of_some_field_is_right_of_every_field(name):
    for value in SHARP:
        check_value_of(name, by_config_dict, value)
    for text in SHARP_TEXTS:
        check(lambda text=text: by_override(name, text))


@pytest.mark.parametrize("name", SCHEMA)
def test_any_value_of_any_field_is_refused_in_one_line_or_works(name):
    @given(way=WAYS, value=values(name))
    @settings(deadline=None, max_examples=10, database=None)
    def check_it(way, value):
        check_value_of(name, way, value)

    check_it()


@pytest.mark.parametrize("name", SCHEMA)
def test_any_text_of_an_override_is_refused_in_one_line_or_works(name):
    @given(text=st.sampled_from((*OVERRIDES, *TEXTS)) | st.text(max_size=20)
           | st.sampled_from(near_the_bounds(name) or [0]).map(str))
    @settings(deadline=None, max_examples=6, database=None)
    def check_it(text):
        check(lambda: by_override(name, text))

    check_it()


@pytest.mark.full
@pytest.mark.parametrize("name", SCHEMA)
def test_every_edge_of_any_field_in_every_way_is_refused_in_one_line_or_works(name):
    for value in (*NUMBERS, *TEXTS, *OTHERS, *near_the_bounds(name)):
        for way in (by_override, by_config_dict, by_json):
            check_value_of(name, way, value)
    for text in OVERRIDES:
        check(lambda text=text: by_override(name, text))


# ---------------------------------------------------------------- what was found by that

@pytest.mark.parametrize("name", ["optimizer.beta1", "optimizer.beta2", "ema.decay",
                                  "model.dropout", "model.ssm.dominance"])
def test_a_number_that_is_its_bound_as_a_float32_is_refused(name):
    with pytest.raises(ConfigError, match="float32, which has no such number"):
        load_config(defaults(), {name: 1 - 1e-9})
    load_config(defaults(), {name: 0.999999})


@pytest.mark.parametrize("value", [1e-300, 1e-40, 1e39, 1e300])
def test_a_number_that_float32_makes_nothing_or_infinite_is_refused(value):
    with pytest.raises(ConfigError, match=r"^optimizer\.clip_norm is ") as caught:
        load_config(defaults(), {"optimizer.clip_norm": value})
    assert caught.value.hint.startswith("it is computed with as a float32")


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
@pytest.mark.parametrize("name", ["data.corpus", "data.subset", "sample.prompt", "name",
                                  "log.wandb_project"])
def test_text_that_no_file_can_hold_is_refused(name, text):
    with pytest.raises(ConfigError) as caught:
        load_config(defaults(), {name: text})
    assert caught.value.message.startswith(f"{name} is {text!r}; it holds ")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", " a", "a ", "é" * 128, "x" * 256])
def test_a_run_has_a_plain_name_that_a_folder_can_have(name):
    with pytest.raises(ConfigError, match=r"^name is ."):
        load_config(defaults(), {"name": name})
    load_config(defaults(), {"name": "é" * 127})


def test_an_empty_prompt_is_refused_before_a_text_is_read():
    with pytest.raises(ConfigError, match=r"^sample\.prompt is empty"):
        load_config(defaults(), {"sample.prompt": ""})


def test_a_key_that_only_a_config_json_has_is_no_field_of_a_config():
    for key in ("automatic", "format", "export"):
        with pytest.raises(ConfigError, match=f"^{key} is not a field"):
            load_config(ConfigDict({**base(), key: []}))


@pytest.mark.parametrize("name", [*sorted({n.rpartition(".")[0] for n in SCHEMA} - {""}), ""])
@pytest.mark.parametrize("key", ["zzz", "a\nb", "", "x" * 9999, "__class__"])
def test_an_unknown_key_in_any_group_is_refused_in_one_line(name, key):
    field = f"{name}.{key}" if name else key
    assert check(lambda: by_override(field, "1")) is None
    with pytest.raises(ConfigError, match="is not a field"):
        from_json({"format": 1, **nested(field, 1)}, Path()) if not name else from_json(
            {"format": 1, **nested(name, {key: 1})}, Path())


def test_a_placeholder_that_nobody_filled_is_refused():
    for required in (False, True):
        values = ConfigDict(base())
        del values.train["steps"]
        values.train.steps = config_dict.placeholder(int, required=required)
        assert check(lambda values=values: load_config(values)) is None


@pytest.mark.parametrize("text", ["[" * 200_000, '{"format": true}', '{"format": 1.0}',
                                  '{"format": 1, "train": {"steps": ' + "9" * 5000 + "}}"])
def test_a_config_json_that_no_run_wrote_is_a_data_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataError) as caught:
        read_json(tmp_path / "config.json")
    assert len(caught.value.message.splitlines()) == 1


def test_a_value_is_shown_short_and_on_one_line():
    class Odd:
        def __repr__(self):
            return "a\nb"

    assert shown("a\nb") == r"'a\nb'" and shown(Odd()) == "a b"
    assert shown(10**5000) == "a int that cannot be printed"
    assert len(shown("x" * 9999)) < 100 and "10,001 characters" in shown("x" * 9999)


# ---------------------------------------------------------------- exit codes

@pytest.mark.parametrize(("flag", "words"), [
    ("train.steps=many", "train.steps is 'many'; it must be an integer"),
    ("optimizer.learning_rate=nan", "optimizer.learning_rate is nan"),
    ("train.batch_size=-1", "train.batch_size is -1"),
    ("model.n_heads=3", "model.d_model = 16 is not a multiple of model.n_heads = 3"),
    ("mesh.rules=(('a',),)", "mesh.rules[0] has 1 entries; it must have 2"),
    ("train.stepz=3", "train.stepz is not a field"),
])
def test_a_bad_field_ends_with_64_before_data_is_looked_for_or_a_file_is_made(
        tmp_path, flag, words):
    command = tiny_run.command(tmp_path / "run", data__corpus=tmp_path / "missing.txt")
    done = tiny_run.run([*command, f"--config.{flag}"], timeout=20)
    assert done.returncode == 64 and done.stdout == ""
    first, second = done.stderr.splitlines()
    assert first.startswith(f"error: {words}") and second.startswith("hint: ")
    assert list(tmp_path.iterdir()) == []
