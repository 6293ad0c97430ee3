"""What a run keeps in its workdir: the training state, and files that are whole or not there."""
