"""model.safetensors from a stranger: refused in one line, or read as it was written."""

import json
import struct

import numpy as np
import pytest
import tiny_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hippocampus.errors import CheckpointError, HippocampusError
from hippocampus.exports.folder import open_export
from hippocampus.exports.parameters import read_parameters
from hippocampus.exports.storage import TensorSpec
from hippocampus.exports.weights_file import (
    check_tensors,
    open_tensors,
    read_header,
    write_weights,
)

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(4, np.int8)}


def entry(dtype: str, shape: list, *offsets: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


GOOD = {"a": entry("F32", [2, 3], 0, 24), "b": entry("I8", [4], 24, 28)}


def file_of(path, header, data: bytes = bytes(28)):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def test_what_was_written_is_read_and_so_it_is_by_the_library(tmp_path):
    from safetensors.numpy import load_file

    path = tmp_path / "w.safetensors"
    write_weights(path, TENSORS, {"step": "3"})
    header = read_header(path)
    assert header.metadata == {"step": "3"}
    assert header.tensors == {"a": TensorSpec("float32", (2, 3)), "b": TensorSpec("int8", (4,))}
    with open_tensors(path) as read:
        for name, tensor in TENSORS.items():
            np.testing.assert_array_equal(read(name), tensor)
            np.testing.assert_array_equal(load_file(path)[name], tensor)


def test_a_good_header_by_hand_is_read(tmp_path):
    assert set(read_header(file_of(tmp_path / "w", GOOD)).tensors) == {"a", "b"}


@pytest.mark.parametrize(("header", "words"), [
    (b"", "not JSON"), (b"{", "not JSON"), (b"[]", "not a JSON object"),
    (b"\xff\xfe{}", "not JSON"), (b" {}", "not a JSON object"), (b'{"a":' * 9999, "not JSON"),
    (json.dumps(GOOD).replace('"b"', '"a"').encode(), "the same name twice"),
    ({**GOOD, "__metadata__": {"step": 3}}, "__metadata__ is not text"),
    ({**GOOD, "__metadata__": "x"}, "__metadata__ is not text"),
    ({**GOOD, "b": entry("I8", [4], 20, 24)}, "'b' overlaps"),
    ({**GOOD, "b": entry("I8", [4], 0, 4)}, "overlaps"),
    ({"a": GOOD["a"], "b": entry("I8", [3], 25, 28)}, "a hole of 1 bytes before 'b'"),
    ({"a": GOOD["a"]}, "24 bytes of tensors in its header, 28 behind it"),
    ({**GOOD, "b": entry("I8", [400], 24, 424)}, "424 bytes of tensors in its header, 28 behind"),
    ({**GOOD, "b": entry("I8", [5], 24, 28)}, "'b' has 4 bytes for I8"),
    ({**GOOD, "b": entry("I8", [4], 28, 24)}, "'b' has -4 bytes"),
    ({**GOOD, "b": entry("I8", [2**62, 4], 24, 28)}, "'b' has 4 bytes"),
    ({**GOOD, "b": entry("I8", [-4], 24, 28)}, "'b' has the shape"),
    ({**GOOD, "b": entry("I8", [4.0], 24, 28)}, "'b' has the shape"),
    ({**GOOD, "b": entry("I8", [True] * 4, 24, 25)}, "'b' has the shape"),
    ({**GOOD, "b": entry("I8", [1] * 9 + [4], 24, 28)}, "'b' has the shape"),
    ({**GOOD, "b": entry("I8", [4], 24)}, "'b' has the offsets"),
    ({**GOOD, "b": entry("I8", [4], -4, 0)}, "'b' has the offsets"),
    ({**GOOD, "b": entry("Q4", [4], 24, 28)}, "'b' has the unknown type 'Q4'"),
    ({**GOOD, "b": entry([], [4], 24, 28)}, "'b' has the unknown type"),
    ({**GOOD, "b": 7}, "'b' is not described"),
    ({**GOOD, "b": {**GOOD["b"], "code": "x"}}, "'b' is not described"),
    ({**GOOD, "\x1b[2J\n": 7}, r"'\x1b[2J\n' is not described"),
])
def test_a_bad_header_is_one_line_with_a_hint(tmp_path, header, words):
    with pytest.raises(CheckpointError) as caught:
        read_header(file_of(tmp_path / "w", header))
    assert words in caught.value.message and " is damaged: " in caught.value.message
    assert "\n" not in caught.value.message and len(caught.value.message) < 400
    assert caught.value.hint


@pytest.mark.parametrize("content", [
    b"", b"1234567", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 3) + b"{}",
    struct.pack("<Q", 17 * 2**20) + bytes(17 * 2**20)])
def test_a_length_that_cannot_be_is_refused(tmp_path, content):
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a header of .* bytes in a file of"):
        read_header(tmp_path / "w")


def test_a_missing_file_is_refused_and_a_pickled_one_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="there are no weights at") as caught:
        read_header(tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / "model.safetensors")
    assert caught.value.hint.startswith("pytorch_model.bin is never read")


@pytest.mark.parametrize(("change", "words"), [
    ({"b": None}, "lacks the tensor b"), ({"c": TensorSpec("int8", (1,))}, "has not: 'c'"),
    ({"b": TensorSpec("int8", (2, 2))}, r"b is int8 \[2, 2\]; the model needs int8 \[4\]"),
    ({"b": TensorSpec("uint8", (4,))}, r"b is uint8 \[4\]; the model needs int8 \[4\]")])
def test_tensors_of_another_model_are_refused_by_name(tmp_path, change, words):
    header = read_header(file_of(tmp_path / "w", GOOD))
    changed = {**header.tensors, **change}
    found = type(header)({}, {name: spec for name, spec in changed.items() if spec})
    with pytest.raises(CheckpointError, match=words):
        check_tensors(tmp_path / "w", found, header.tensors)


# ---------------------------------------------------------------- the file of a real model

@pytest.fixture(scope="module")
def real(exported):
    """The bytes of an export, and a function that reads others as it would be read."""
    import jax

    from hippocampus.models.build_model import build_model, parameter_shapes

    config, _, record = open_export(exported)
    shapes = parameter_shapes(build_model(config))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return (exported / "model.safetensors").read_bytes(), lambda path: tiny_run.digest(
        read_parameters(path, shapes, record, sharding))


def outcome(real, path, content: bytes) -> str:
    path.write_bytes(content)
    try:
        return real[1](path)
    except HippocampusError as error:
        assert error.hint and "\n" not in error.message
        return "refused"


shared_folder = settings(max_examples=200, deadline=None, derandomize=True,
                         suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1,
                max_size=3))
@shared_folder
def test_flipped_bits_of_the_header_are_refused_or_change_nothing(real, tmp_path, flips):
    content = bytearray(real[0])
    end = 8 + struct.unpack("<Q", content[:8])[0]
    for place, mask in flips:
        content[int(place * end)] ^= mask
    good = outcome(real, tmp_path / "w", real[0])
    assert outcome(real, tmp_path / "w", bytes(content)) in ("refused", good)


@given(st.floats(0, 1, exclude_max=True))
@shared_folder
def test_a_file_cut_short_or_too_long_is_refused(real, tmp_path, place):
    content = real[0]
    assert outcome(real, tmp_path / "w", content[:int(place * len(content))]) == "refused"
    assert outcome(real, tmp_path / "w", content + content[:1 + int(place * 99)]) == "refused"


@given(st.integers(0, 2**30), st.floats(0, 1, exclude_max=True), st.integers(0, 255))
@shared_folder
def test_a_digit_or_letter_of_the_header_replaced_is_refused_or_changes_nothing(
        real, tmp_path, seed, place, byte):
    """Nearer to what still parses than any byte: another character of the same class."""
    content = bytearray(real[0])
    length = struct.unpack("<Q", content[:8])[0]
    i = 8 + int(place * length)
    if chr(content[i]).isdigit():
        content[i] = ord("0") + seed % 10
    elif chr(content[i]).isalpha():
        content[i] = ord("a") + seed % 26
    else:
        content[i] = byte
    good = outcome(real, tmp_path / "w", real[0])
    assert outcome(real, tmp_path / "w", bytes(content)) in ("refused", good)
