"""The notebook's cells run in their order, without Jupyter."""

import json
import sys

import matplotlib
import matplotlib.pyplot as plt
import pytest
from conftest import ROOT

NOTEBOOK = ROOT / 'examples' / 'finetune.ipynb'


@pytest.mark.slow
def test_the_cells_run_in_order(tmp_path, monkeypatch, capsys):
    """A user would open a notebook that uses a renamed function."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [str(NOTEBOOK.parent), *sys.path])
    matplotlib.use('Agg')
    names = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']:
        if cell['cell_type'] == 'code':
            exec(''.join(cell['source']), names)
    assert len(plt.get_fignums()) == 2
    plt.close('all')
    assert names['accuracy'] > 0.25  # chance is 0.1
    assert 'accuracy' in capsys.readouterr().out


def test_the_stored_outputs_are_there_and_small():
    """Readers on the web would see no pictures; or a large notebook would stay in the history of every clone."""
    cells = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
    kinds = [kind for cell in cells for output in cell.get('outputs', ()) for kind in output.get('data', ())]
    assert kinds == ['image/png', 'image/png']
    assert NOTEBOOK.stat().st_size < 100_000
