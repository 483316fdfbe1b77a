"""Models that several files test."""

import functools

import pytest

from hippocampus.models.build_model import build_model


@pytest.fixture(scope="session")
def built(tiny_config, random_parameters):
    """overrides -> (model, random parameters); the same overrides give the same objects."""
    @functools.cache
    def make(items):
        model = build_model(tiny_config(dict(items)))
        return model, random_parameters(model)

    return lambda overrides=None: make(tuple((overrides or {}).items()))
