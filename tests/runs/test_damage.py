"""A step whose files changed on disk: found before it is read, said, renamed and kept."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.config import CheckpointConfig
from hippocampus.errors import CheckpointError
from hippocampus.runs.checkpoints import Checkpoints, abstract
from hippocampus.runs.manifest import MANIFEST, check_manifest, extend_manifest
from hippocampus.runs.step_folders import COMMITTED

KEEP_ALL = CheckpointConfig(keep_latest=100)
LOSSES = {50: 1.0, 100: 3.0, 150: 2.0}

FILES = {
    "array data": "params/d/*", "a process's array data": "params/ocdbt.process_0/d/*",
    "the index": "params/manifest.ocdbt", "a process's index": "params/ocdbt.process_0/manif*",
    "the tree": "params/_METADATA", "shapes": "params/array_metadatas/*",
    "the sharding": "params/_sharding", "the record": "_CHECKPOINT_METADATA",
    "the mark": COMMITTED, "another tree": "progress/d/*", "the manifest": MANIFEST}
"""Every class of file in a step."""


def trees(step: int) -> dict:
    return {"params": {"x": jnp.arange(300.0) + step, "y": jnp.ones((2, 3), jnp.bfloat16)},
            "progress": {"step": jnp.asarray(step, jnp.int32), "key": jax.random.key(step)}}


LIKE = {name: abstract(tree) for name, tree in trees(0).items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "steps"
    with Checkpoints(folder, KEEP_ALL) as checkpoints:
        for step, loss in LOSSES.items():
            assert checkpoints.save(step, trees(step), loss)
    return folder


@pytest.fixture
def steps(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "steps")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def delete(path):
    path.unlink()


def harm(step_folder, pattern, how) -> str:
    found = [path for path in sorted(step_folder.glob(pattern)) if path.is_file()]
    assert found, f"no {pattern} in a step"
    how(found[0])
    return found[0].relative_to(step_folder).as_posix()


def content(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def restored(folder, **options):
    lines: list[str] = []
    with Checkpoints(folder, KEEP_ALL, lines.append) as checkpoints:
        result = checkpoints.restore_newest(LIKE, **options)
        return result, lines, checkpoints.steps


def assert_is_step(result, step):
    assert result is not None and result[0] == step
    for name, tree in trees(step).items():
        for (path, got), want in zip(jax.tree.leaves_with_path(result[1][name]),
                                     jax.tree.leaves(tree), strict=True):
            if jax.dtypes.issubdtype(want.dtype, jax.dtypes.extended):
                got, want = jax.random.key_data(got), jax.random.key_data(want)
            assert got.dtype == want.dtype, path
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("kind", "how"), [
    (kind, how) for kind in FILES for how in (flip, truncate, empty, delete)
    if (kind, how) != ("the manifest", delete)])  # then it is used if it restores; see below
def test_the_step_before_is_used_and_the_damaged_one_is_kept(steps, kind, how):
    name = harm(steps / "150", FILES[kind], how)
    before = content(steps / "150")
    result, lines, left = restored(steps)
    assert_is_step(result, 100)
    assert left == [50, 100]
    assert len(lines) == 1 and lines[0].startswith(f"checkpoint 150 is damaged ({name}")
    assert lines[0].endswith("); using 100")
    assert content(steps / "150.damaged") == before
    assert not (steps / "150").exists()


def test_a_damaged_file_is_named_with_what_is_wrong(steps):
    cases = {flip: "digest differs", delete: "is missing", truncate: "bytes, not"}
    for step, (how, words) in zip(LOSSES, cases.items(), strict=True):
        name = harm(steps / str(step), "params/manifest.ocdbt", how)
        problem = check_manifest(steps / str(step))
        assert problem is not None and problem.startswith(name) and words in problem


def test_several_damaged_steps_are_said_one_by_one(steps):
    for step in (100, 150):
        harm(steps / str(step), "params/d/*", flip)
    result, lines, _ = restored(steps)
    assert_is_step(result, 50)
    assert [line.partition(" (")[0] for line in lines] == [
        "checkpoint 150 is damaged", "checkpoint 100 is damaged"]
    assert [line.rpartition("; ")[2] for line in lines] == ["using 100", "using 50"]


def test_no_good_step_is_an_error_that_keeps_all_of_them(steps):
    for step in LOSSES:
        harm(steps / str(step), "params/d/*", flip)
    before = {step: content(steps / str(step)) for step in LOSSES}
    lines: list[str] = []
    with Checkpoints(steps, KEEP_ALL, lines.append) as checkpoints, \
            pytest.raises(CheckpointError, match=r"50\.damaged") as caught:
        checkpoints.restore_newest(LIKE)
    assert caught.value.exit_code == 66
    assert lines[-1].endswith("there is none before it")
    assert {step: content(steps / f"{step}.damaged") for step in LOSSES} == before
    # The same command once more must not begin from the seed over what is left.
    with pytest.raises(CheckpointError, match="is good"):
        restored(steps)


def test_a_second_damage_of_a_number_gets_a_name_of_its_own(steps):
    shutil.copytree(steps / "150", steps / "150.damaged")
    first = content(steps / "150.damaged")
    harm(steps / "150", "params/d/*", flip)
    restored(steps)
    assert content(steps / "150.damaged") == first
    assert (steps / "150.damaged-2").is_dir()


def test_a_step_without_a_manifest_is_used_if_it_restores(steps):
    (steps / "150" / MANIFEST).unlink()
    result, lines, _ = restored(steps)
    assert_is_step(result, 150)
    assert len(lines) == 1 and lines[0].startswith("note: checkpoint 150 has no digests")


@pytest.mark.parametrize(("kind", "how"), [
    ("array data", empty), ("array data", delete), ("the index", empty), ("the index", delete),
    ("the tree", empty)])
def test_a_step_without_a_manifest_that_does_not_restore_is_damaged(steps, kind, how):
    (steps / "150" / MANIFEST).unlink()
    harm(steps / "150", FILES[kind], how)
    result, lines, _ = restored(steps)
    assert_is_step(result, 100)
    assert "\n" not in lines[0] and lines[0].endswith("using 100")


def test_a_tree_that_is_gone_from_a_step_without_a_manifest_is_damage(steps):
    (steps / "150" / MANIFEST).unlink()
    shutil.rmtree(steps / "150" / "params")
    result, lines, _ = restored(steps)
    assert_is_step(result, 100)
    assert lines == ["checkpoint 150 is damaged (params is missing); using 100"]


def test_steps_before_a_number_are_all_that_a_roll_back_looks_at(steps):
    result, lines, left = restored(steps, before=150)
    assert_is_step(result, 100)
    assert (lines, left) == ([], [50, 100, 150])
    assert restored(steps, before=50)[0] is None


def test_no_step_at_all_is_none(tmp_path):
    assert restored(tmp_path / "steps") == (None, [], [])


def test_an_optional_tree_that_a_step_lacks_is_left_out(steps):
    with Checkpoints(steps, KEEP_ALL) as checkpoints:
        like = {**LIKE, "guard": {"skipped": jax.ShapeDtypeStruct((), jnp.int32)}}
        step, back = checkpoints.restore_newest(like, optional=("guard",))
        assert step == 150 and set(back) == set(LIKE)
        with pytest.raises(CheckpointError, match="it has no guard"):
            checkpoints.restore_newest(like)
    assert sorted(path.name for path in steps.iterdir()) == ["100", "150", "50"]


@pytest.mark.parametrize(("leaf", "words"), [
    (jax.ShapeDtypeStruct((300,), jnp.bfloat16), r"params/x has dtype float32, not bfloat16"),
    (jax.ShapeDtypeStruct((301,), jnp.float32), r"params/x has shape \(300,\), not \(301,\)")])
def test_a_step_of_another_model_is_refused_and_not_called_damaged(steps, leaf, words):
    like = {**LIKE, "params": {**LIKE["params"], "x": leaf}}
    with Checkpoints(steps, KEEP_ALL) as checkpoints:
        with pytest.raises(CheckpointError, match=words):
            checkpoints.restore_newest(like)
        with pytest.raises(CheckpointError, match=words):
            checkpoints.restore(150, like)
    assert sorted(path.name for path in steps.iterdir()) == ["100", "150", "50"]


def test_readers_take_the_best_step_that_is_good(steps):
    lines: list[str] = []
    before = content(steps)
    with Checkpoints(steps, say=lines.append) as checkpoints:
        assert (checkpoints.best_good(), checkpoints.best_good(100), lines) == (50, 100, [])
    harm(steps / "50", "params/d/*", flip)
    with Checkpoints(steps, say=lines.append) as checkpoints:
        assert checkpoints.best_good() == 150  # the second best, not the newest before
        assert checkpoints.best_good(trees=["progress"]) == 50  # what is read is good
        with pytest.raises(CheckpointError, match=r"50 is damaged \(params/d/.*digest differs"):
            checkpoints.best_good(50)
        with pytest.raises(CheckpointError, match="no step 51"):
            checkpoints.best_good(51)
    assert len(lines) == 1 and lines[0].endswith("digest differs); using 150")
    for step in (100, 150):
        harm(steps / str(step), "params/d/*", flip)
    with Checkpoints(steps) as checkpoints, pytest.raises(CheckpointError, match="is good"):
        checkpoints.best_good()
    assert content(steps).keys() == before.keys()


def test_steps_that_were_set_aside_can_be_saved_again(steps):
    old = content(steps / "150")
    with Checkpoints(steps, KEEP_ALL) as checkpoints:
        checkpoints.set_aside(50, "diverged")
        assert checkpoints.steps == [50]
        assert checkpoints.save(150, trees(7), None)
        checkpoints.wait()
        assert checkpoints.steps == [50, 150]
        np.testing.assert_array_equal(
            checkpoints.restore(150, LIKE)["params"]["x"], trees(7)["params"]["x"])
        checkpoints.set_aside(50, "diverged")
    assert content(steps / "150.diverged") == old
    assert (steps / "150.diverged-2").is_dir() and (steps / "100.diverged").is_dir()


def test_a_manifest_cannot_lead_out_of_its_step(steps):
    (steps / "outside").write_text("secret")
    extend_manifest(steps / "50", "../outside")  # as a person could who computes the digest anew
    assert check_manifest(steps / "50") == f"{MANIFEST} is damaged"


def test_every_byte_of_a_manifest_counts(steps):
    manifest = steps / "50" / MANIFEST
    whole = manifest.read_bytes()
    for place in range(0, len(whole), 7):
        manifest.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        assert check_manifest(steps / "50") == f"{MANIFEST} is damaged", place
        manifest.write_bytes(whole[:place])
        assert check_manifest(steps / "50") == f"{MANIFEST} is damaged", place
    manifest.write_bytes(whole)
    assert check_manifest(steps / "50") is None


def test_a_file_that_came_later_is_covered_and_the_others_are_not_trusted_anew(steps):
    (steps / "50" / "later").write_text("1")
    harm(steps / "50", FILES["array data"], flip)
    extend_manifest(steps / "50", "later")
    assert "digest differs" in check_manifest(steps / "50")
    (steps / "100" / "later").write_text("1")
    extend_manifest(steps / "100", "later")
    assert check_manifest(steps / "100") is None
    (steps / "100" / "later").write_text("2")
    assert check_manifest(steps / "100") == "later: digest differs"
