"""Every field of a config, found by walking the schema: a new one is tested by itself."""

import dataclasses
import typing

from hippocampus.config import Config


def schema(cls: type = Config, prefix: str = "") -> dict[str, tuple]:
    """Dotted name -> (type, limits) of every leaf field."""
    leaves = {}
    for field in dataclasses.fields(cls):
        kind = typing.get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(kind):
            leaves.update(schema(kind, f"{prefix}{field.name}."))
        else:
            leaves[prefix + field.name] = (kind, field.metadata)
    return leaves
