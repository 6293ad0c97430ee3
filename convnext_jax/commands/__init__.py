"""The commands that run on every host of a job: `train` and `eval`. The others are in `__main__.py`."""
