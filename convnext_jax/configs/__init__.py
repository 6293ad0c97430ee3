"""The published recipes. Each file has a function `get_config(variant)` that returns the config of an experiment."""

from pathlib import Path

RECIPES = {path.stem: path for path in sorted(Path(__file__).parent.glob('[a-z]*.py'))}
"""Name of a recipe → its file, for --config=NAME[:VARIANT]."""
