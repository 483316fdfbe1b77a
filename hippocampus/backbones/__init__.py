"""Models of other projects: their checkpoints as trees of ours."""
