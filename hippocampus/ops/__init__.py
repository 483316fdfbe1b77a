"""Pure functions on arrays: no parameters, no Flax. Axis letters as in docs/architecture.md."""
