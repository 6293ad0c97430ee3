"""The stored values in `tests/reference` against the installed libraries."""

import json

import numpy as np
import pytest

from tests import reference
from tests.judges import record

BOUND = 2e-5  # in standard deviations of the stored array: torch's kernels may sum in another order


@pytest.mark.parametrize('name', record.ARRAYS)
def test_arrays_equal_those_of_the_libraries(name):
    """Our numerics would be compared with values that the libraries do not give, or no longer."""
    stored, live = reference.arrays(name), record.ARRAYS[name]()
    assert stored.keys() == live.keys()
    for key, array in live.items():
        if name == 'training' and key.endswith(('parameters', 'average')):
            np.testing.assert_allclose(array, stored[key], atol=2e-5, err_msg=key)  # 2 % of the learning rate
        else:
            assert np.abs(np.float32(array) - stored[key]).max() <= BOUND * stored[key].std(), key


@pytest.mark.parametrize('name', record.TABLES)
def test_tables_equal_those_of_the_libraries(name):
    """A new version of a library may change names, shapes or configs; `python -m tests.judges.record` updates them."""
    assert reference.table(name) == json.loads(json.dumps(record.TABLES[name]()))
