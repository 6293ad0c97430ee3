"""Training and evaluation of a run: the loop, the training step, the optimizer, the device mesh, initial weights."""
