"""What a run may go on with: allowed differences, forced ones, and those that cannot be."""

import pytest
import tiny_run

from hippocampus.config_files import fields, to_json
from hippocampus.errors import ConfigError
from hippocampus.runs.run_folder import RunFolder
from hippocampus.training import resume
from hippocampus.training.resume import check_resumable, check_same_data

TEXT = {"sha256": "a" * 64, "tokenizer": "b" * 64}


@pytest.fixture
def folder(tmp_path):
    """A run folder that has the tiny config, as far as going on reads it."""
    folder = RunFolder(tmp_path)
    folder.config.write_text(to_json(tiny_run.config()))
    return folder


def refused(folder, allowed=(), **changes) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_resumable(folder, tiny_run.config(**changes), (), allowed)
    return caught.value


def test_the_same_config_goes_on_without_a_word(folder):
    assert check_resumable(folder, tiny_run.config(), ()) == []



def every_field():
    return sorted(fields(tiny_run.config()))


@pytest.mark.parametrize("name", every_field())
def test_every_field_is_allowed_or_refused_with_the_old_the_new_and_the_flag(
        folder, name, monkeypatch):
    old = fields(tiny_run.config())[name]
    new = (not old if isinstance(old, bool) else old + 1 if isinstance(old, (int, float))
           else f"{old}x" if isinstance(old, str) else (*old, "x"))
    # Values that no schema would let pass are good enough to be compared.
    asked = tiny_run.config()
    monkeypatch.setattr(resume, "fields", lambda config: {
        **fields(config), **({name: new} if config is asked else {})})
    monkeypatch.setattr(resume, "_shapes", lambda config: {})
    group = name.split(".")[0]
    free = (group in ("eval", "checkpoint", "log", "sample", "mesh", "guard", "name")
            and not name.startswith("guard.spike_")) or name in (
        "train.steps", "train.epochs", "train.grad_accumulation", "train.deterministic")
    if free:
        assert check_resumable(folder, asked, ()) == []
        return
    with pytest.raises(ConfigError) as caught:
        check_resumable(folder, asked, ())
    assert caught.value.message == f"{folder.path} was trained with {name} = {old!r}, not {new!r}"
    assert caught.value.hint == (
        f"--allow_change={name} goes on with the new value; or choose another --workdir")
    assert check_resumable(folder, asked, (), [name]) == [
        f"note: {name} was {old!r}, is {new!r} from here on (--allow_change)"]


def test_the_flag_of_the_hint_names_every_field_that_needs_it_and_works(folder):
    changes = {"optimizer__learning_rate": 0.5, "train__seed": 7, "ema__decay": 0.5}
    error = refused(folder, ["train.seed"], **changes)
    flag = error.hint.split(" ")[0].removeprefix("--allow_change=")
    assert flag == "ema.decay,optimizer.learning_rate,train.seed"
    notes = check_resumable(folder, tiny_run.config(**changes), (), flag.split(","))
    assert [note.split()[1] for note in notes] == flag.split(",")


def test_an_allowed_field_frees_no_other_field(folder):
    assert "optimizer.beta1 = 0.9, not 0.5" in refused(
        folder, ["optimizer.beta2"], optimizer__beta1=0.5, optimizer__beta2=0.5).message


@pytest.mark.parametrize(("changes", "difference"), [
    ({"model__d_model": 32},
     "params/embedding is float32[256,16] there and float32[256,32] here"),
    ({"model__n_layers": 2}, "missing there and float32"),
    ({"model__paths": ("ssm",)}, "float32"),
    ({"model__position": "learned"}, "missing there and float32"),
])
@pytest.mark.parametrize("force", [False, True])
def test_a_model_of_another_shape_cannot_be_forced_and_no_flag_is_offered(
        folder, changes, difference, force):
    name = next(iter(changes)).replace("__", ".")
    error = refused(folder, [name] if force else [], **changes)
    assert f"was trained with {name} = " in error.message
    assert error.hint.startswith("the saved state does not fit: ") and difference in error.hint
    assert "--allow_change" not in error.hint and "another --workdir" in error.hint


def test_an_average_can_be_given_up_but_not_begun(folder):
    assert len(check_resumable(folder, tiny_run.config(ema__decay=0.0), (), ["ema.decay"])) == 1
    folder.config.write_text(to_json(tiny_run.config(ema__decay=0.0)))
    assert "ema/" in refused(folder, ["ema.decay"], ema__decay=0.9).hint


@pytest.mark.parametrize(("name", "hint"), [
    ("optimizer.learning_rat", "did you mean optimizer.learning_rate?"),
    ("learning_rate", "did you mean optimizer.learning_rate?"),
    ("optimizer", "did you mean "), ("", "hippocampus/config.py lists every field")])
def test_a_name_that_is_no_field_is_refused_even_where_nothing_differs(folder, name, hint):
    error = refused(folder, [name])
    assert error.message == f"--allow_change names {name!r}, which is not a field"
    assert error.hint.startswith(hint)


def test_what_the_device_decided_may_differ_with_a_note(folder):
    other = tiny_run.config(model__compute_dtype="bfloat16")
    note, = check_resumable(folder, other, ("model.compute_dtype",))
    assert note.startswith("note: model.compute_dtype is bfloat16 on this device (it was auto)")


def test_a_longer_run_is_told_that_its_schedule_moves_if_it_has_one(folder):
    note, = check_resumable(folder, tiny_run.config(train__steps=99), ())
    assert note == "note: train.steps was 12, is 99: the learning-rate schedule moves"
    folder.config.write_text(to_json(tiny_run.config(optimizer__schedule="constant")))
    longer = tiny_run.config(train__steps=99, optimizer__schedule="constant")
    assert check_resumable(folder, longer, ()) == []


@pytest.mark.parametrize(("key", "what"), [("sha256", "text"), ("tokenizer", "tokenizer")])
def test_another_text_or_tokenizer_is_refused_until_it_is_allowed(folder, key, what):
    now = {**TEXT, key: "c" * 64}
    with pytest.raises(ConfigError) as caught:
        check_same_data(folder, TEXT, now, ["optimizer.beta1"])
    before = TEXT[key][:12]
    assert caught.value.message == (f"{folder.path} was trained on another {what} ({before}… then, "
                                    "cccccccccccc… now)")
    flag = caught.value.hint.split(" ")[0].removeprefix("--allow_change=").split(",")
    assert set(flag) == {f"data.{what}", "optimizer.beta1"}
    assert check_resumable(folder, tiny_run.config(), (), flag) == []  # both are known names
    note, = check_same_data(folder, TEXT, now, flag)
    assert note.startswith(f"note: another {what} from here on")


def test_the_same_text_goes_on_without_a_word_and_a_missing_digest_is_a_difference(folder):
    assert check_same_data(folder, TEXT, TEXT) == []
    with pytest.raises(ConfigError, match="another tokenizer"):
        check_same_data(folder, {"sha256": TEXT["sha256"]}, TEXT)
