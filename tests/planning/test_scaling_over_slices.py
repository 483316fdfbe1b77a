"""Compute against the gradients' all-reduce on every slice of a generation."""

import json

import pytest

import hippocampus.plan
from hippocampus.config_files import defaults, load_config
from hippocampus.devices import chip, choose
from hippocampus.errors import ConfigError
from hippocampus.models.flops import training_flops_per_token
from hippocampus.planning.scaling import scaling
from hippocampus.planning.topology import find_topology

V5E = find_topology("v5e:2x2")


def config(**changes):
    return load_config(defaults(), {name.replace("__", "."): v for name, v in changes.items()})


def test_a_slice_computes_its_share_and_sends_a_ring_of_gradients():
    from hippocampus.models.build_model import build_model, count_parameters

    cfg = config(train__batch_size=64)
    by_name = {scale.topology.name: scale for scale in scaling(cfg, V5E)}
    scale, tokens = by_name["v5e:4x4"], 4 * cfg.data.context
    assert scale.rows == 4
    assert scale.compute == pytest.approx(
        training_flops_per_token(cfg) * tokens / choose(V5E.device).peak_flops)
    sent = 4 * count_parameters(build_model(cfg)) * 2 * 15 / 16
    assert scale.links == pytest.approx(sent / (4 * chip(V5E.device).link_bandwidth))
    assert scale.compute * scale.least_rows / scale.rows == pytest.approx(scale.links)


def test_a_batch_is_shared_out_as_long_as_every_device_gets_a_row():
    rows = [scale.rows for scale in scaling(config(train__batch_size=64), V5E)]
    assert rows == [64, 16, 8, 4, 2, 1]  # 1, 4, 8, 16, 32, 64 chips


def test_with_rows_on_each_device_the_links_share_hardly_grows():
    scales = scaling(config(), V5E, rows=8)
    assert scales[-1].topology.n_devices == 256
    assert {scale.rows for scale in scales} == {8}
    shares = [scale.links / scale.compute for scale in scales if scale.topology.n_devices >= 16]
    assert max(shares) < 1.1 * min(shares)


def test_one_chip_sends_nothing():
    assert scaling(config(), V5E)[0].links == 0


@pytest.mark.parametrize("axis", ["fsdp", "tensor", "sequence"])
def test_other_meshes_are_refused(axis):
    with pytest.raises(ConfigError, match="about data parallelism"):
        scaling(config(**{f"mesh__{axis}": 2}), V5E)


def test_gpus_are_refused():
    with pytest.raises(ConfigError, match="no slices are known for h100x8"):
        scaling(config(), find_topology("h100x8"))


def test_the_verb_prints_a_line_or_an_object_per_slice(tmp_path, capsys):
    path = tmp_path / "small.py"
    path.write_text("from hippocampus.config_files import defaults\n\n\ndef get_config():\n"
                    "    return defaults()\n")
    hippocampus.plan.main([f"--config={path}", "--topology=v4:2x2x1", "--scaling=8"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["slice", "devices"]
    assert lines[-1].split()[:3] == ["v4:8x8x8", "512", "8"]
    hippocampus.plan.main([f"--config={path}", "--topology=v4:2x2x1", "--scaling", "--json"])
    first = json.loads(capsys.readouterr().out)[0]
    assert (first["topology"], first["devices"]) == ("v4:2x2x1", 4)
    assert first["links"] > 0 and first["compute"] > 0
