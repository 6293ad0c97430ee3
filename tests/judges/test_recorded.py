"""The values in `tests/reference` are those of the libraries that are installed."""

import json

import numpy as np
import pytest

from tests import reference
from tests.judges import record

BOUND = 2e-5  # of a stored array's standard deviation: other kernels of torch sum in another order


@pytest.mark.parametrize('name', record.ARRAYS)
def test_arrays_are_those_of_the_libraries(name):
    """Stored values that no library gives any more, or never gave, hold our numerics to a mistake."""
    stored, live = reference.arrays(name), record.ARRAYS[name]()
    assert stored.keys() == live.keys()
    for key, array in live.items():
        if name == 'training' and key.endswith(('parameters', 'average')):
            np.testing.assert_allclose(array, stored[key], atol=2e-5, err_msg=key)  # a fiftieth of the learning rate
        else:
            assert np.abs(np.float32(array) - stored[key]).max() <= BOUND * stored[key].std(), key


@pytest.mark.parametrize('name', record.TABLES)
def test_tables_are_those_of_the_libraries(name):
    """Names, shapes and configs change with a library's version: `python -m tests.judges.record` stores the new."""
    assert reference.table(name) == json.loads(json.dumps(record.TABLES[name]()))
