"""Everything that makes a run: optimizer, state, step, mesh, checkpoints, logs, the loop."""
