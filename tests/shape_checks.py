"""The type checker of jaxtyping's import hook, see conftest.py."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int may be passed as a float
