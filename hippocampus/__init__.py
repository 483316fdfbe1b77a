"""Hippocampus: train, probe and extend language models that have a memory.

    import hippocampus as hp
    cfg = hp.load_config("configs/quickstart.py", {"train.steps": 200})
    hp.fit(cfg, workdir="checkpoints/quickstart")
    lm = hp.load("checkpoints/quickstart")
    lm.generate("The ", max_new_tokens=100)

Public names are loaded when first used, so that `import hippocampus` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hippocampus.config import Config as Config
    from hippocampus.config_files import load_config as load_config
    from hippocampus.errors import HippocampusError as HippocampusError
    from hippocampus.generation.language_model import LanguageModel as LanguageModel
    from hippocampus.generation.loading import load as load
    from hippocampus.models.build_model import build_model as build_model
    from hippocampus.training.loop import fit as fit

_HOME = {
    "Config": "hippocampus.config",
    "load_config": "hippocampus.config_files",
    "HippocampusError": "hippocampus.errors",
    "LanguageModel": "hippocampus.generation.language_model",
    "load": "hippocampus.generation.loading",
    "build_model": "hippocampus.models.build_model",
    "fit": "hippocampus.training.loop",
}

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hippocampus' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
