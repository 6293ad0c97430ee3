"""The workdir of a run and its checkpoints."""
