"""The run folder: what a run leaves on disk, and all that is needed to go on from it."""
