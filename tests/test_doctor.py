"""The doctor says what is there, and fails when something is not."""

import pytest

from hippocampus import doctor
from hippocampus.errors import ConfigError
from hippocampus.runs import diagnosis


def test_a_good_machine_passes_every_check(tmp_path, capsys):
    doctor.main([f"--workdir={tmp_path / 'new'}"])
    lines = capsys.readouterr().out.splitlines()
    for name in ("python", "packages", "devices", "computes", "auto", "disk", "write test"):
        assert any(line.startswith("ok ") and f" {name} " in line for line in lines), name
    assert not (tmp_path / "new").exists(), "the write test left its folder behind"


def test_a_workdir_that_cannot_be_written_fails_with_a_hint(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"1 of \d+ checks failed .write test"):
        doctor.main([f"--workdir={tmp_path / 'file' / 'below'}"])
    assert "choose another --workdir" in capsys.readouterr().out


def test_a_full_disk_fails(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda path: usage)
    found = {finding.name: finding for finding in diagnosis.diagnose(tmp_path)}
    assert not found["disk"].good and found["disk"].hint


def test_apple_silicon_is_told_why_the_cpu_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(diagnosis.sys, "platform", "darwin")
    monkeypatch.setattr(diagnosis.platform, "machine", lambda: "arm64")
    found = {finding.name: finding for finding in diagnosis.diagnose(tmp_path)}
    assert found["devices"].good and "Apple silicon the CPU is used" in found["devices"].hint


def test_a_plugin_of_another_version_is_found(tmp_path, monkeypatch):
    class Distribution:
        name, version = "jax-cuda13-plugin", "0.1.0"

    monkeypatch.setattr(diagnosis.metadata, "distributions", lambda: [Distribution])
    found = {finding.name: finding for finding in diagnosis.diagnose(tmp_path)}
    assert not found["plugins"].good and "does not fit jax" in found["plugins"].hint
