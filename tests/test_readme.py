"""What the README shows works as it stands there."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / 'README.md').read_text()


@pytest.mark.slow
def test_the_python_examples_run():
    blocks = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
    assert blocks
    for block in blocks:
        names = {}
        exec(block, names)
        assert names['logits'].shape == (2, 10)
        assert names['pyramid']['stage4'].shape == (2, 4, 6, 320)
        assert names['maps']['stage4'].shape == (2, 2, 3, 320)


def test_every_file_it_names_is_there():
    root = Path(__file__).parent.parent
    for name in re.findall(r'(?:configs|docs|convnext_jax)/[\w/]+\.(?:py|png)', README):
        assert (root / name).is_file(), name
