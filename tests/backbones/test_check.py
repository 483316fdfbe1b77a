"""The doctor says what a pretrained model is, and fails where its logits are not transformers'."""

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from hippocampus import doctor
from hippocampus.backbones import check
from hippocampus.errors import ConfigError

pytestmark = pytest.mark.usefixtures("quick_compiles")


def lines(capsys):
    return {line[5:].split("  ")[0].strip(): line for line in capsys.readouterr().out.splitlines()}


def test_without_transformers_it_says_that_nothing_was_compared(folder_of, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name: None if name == "torch" else find(name))
    doctor.main([f"--backbone={folder_of('gemma3n')}"])
    found = lines(capsys)
    assert "gemma3n: 5 layers of width 32" in found["architecture"]
    assert "windows of 8, 2 layers that share keys" in found["architecture"]
    assert "77,800" in found["parameters"] and "float32 (1" in found["dtype"]
    assert "none" in found["chat template"] and "none" in found["tokenizer"]
    assert "not compared: torch is not installed" in found["logits"]


@pytest.mark.parametrize("error", [1e-5, 0.5])
def test_logits_that_are_not_transformers_fail(folder_of, backbone_of, capsys, monkeypatch, error):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(check, "_theirs", lambda path, ids: check.logits_of(
        backbone_of("llama"), ids) + np.float32(error))
    arguments = [f"--backbone={folder_of('llama')}"]
    if error < 1e-3:
        doctor.main(arguments)
        assert "the same most likely id for 100%" in lines(capsys)["logits"]
        return
    with pytest.raises(ConfigError, match=r"1 of 7 checks failed .logits"):
        doctor.main(arguments)
    assert "not read as its makers meant it" in capsys.readouterr().out


def test_transformers_itself_agrees(folder_of, capsys):
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason=f"{name} is not installed (extra parity)")
    doctor.main([f"--backbone={folder_of('qwen3')}"])
    assert "the same most likely id for 100%" in lines(capsys)["logits"]


def test_a_path_without_a_model_is_an_error(tmp_path):
    from hippocampus.errors import DataError

    with pytest.raises(DataError, match="no pretrained model at"):
        doctor.main([f"--backbone={tmp_path}"])
    assert "torch" not in sys.modules or importlib.util.find_spec("torch")
