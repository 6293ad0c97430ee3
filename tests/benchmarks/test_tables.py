"""The tables of README.md and docs/ show the stored measurements and nothing else."""

import json

import pytest

from benchmarks import tables

FIELDS = {'what', 'machine', 'versions', 'date', 'commit', 'command', 'method', 'note', 'results'}


@pytest.mark.parametrize('page', tables.PAGES, ids=lambda page: page.name)
def test_tables_are_those_that_the_script_writes(page):
    """A figure that was edited by hand, or measured again and not written, would be quoted for years."""
    text = page.read_text(encoding='utf-8')
    assert tables.with_tables(text) == text, 'run python -m benchmarks.tables'


def test_every_table_is_on_a_page_and_every_measurement_in_a_table():
    """A measurement that no page shows is lost to the reader."""
    pages = ''.join(page.read_text(encoding='utf-8') for page in tables.PAGES)
    shown = {name for _, name, _ in tables.MARKED.findall(pages)}
    assert shown == set(tables.TABLES)
    assert {table.file for table in tables.TABLES.values()} == {path.stem for path in tables.MEASUREMENTS.iterdir()}


@pytest.mark.parametrize('path', sorted(tables.MEASUREMENTS.iterdir()), ids=lambda path: path.stem)
def test_measurements_say_where_they_come_from(path):
    """Without machine, versions, commit and command nobody can repeat a figure; null says that one is unknown."""
    measurement = json.loads(path.read_text(encoding='utf-8'))
    assert measurement.keys() >= FIELDS
    assert measurement['results']


def test_a_new_measurement_changes_the_page(tmp_path, monkeypatch):
    """Otherwise a page would keep the figures of an earlier version."""
    result = {'what': 'Speed', 'value': 1234.5, 'unit': 'images/s', 'date': None}
    content = dict.fromkeys(FIELDS) | {'machine': 'here', 'date': '2026-01-01', 'commit': 'abc', 'results': [result]}
    (tmp_path / 'new.json').write_text(json.dumps(content))
    monkeypatch.setattr(tables, 'MEASUREMENTS', tmp_path)
    monkeypatch.setitem(tables.TABLES, 'new', tables.Table('new', tables.VALUE))
    page = tables.with_tables('Text.\n<!-- table: new -->\n| old |\n<!-- end of table -->\nMore.\n')
    assert '| Speed | 1,234.5 images/s | – | abc |\n' in page
    assert 'Source: [new.json](measurements/new.json). Machine: here. Date: 2026-01-01. Commit: abc.\n' in page
    assert 'old' not in page
    assert page.startswith('Text.\n')
    assert page.endswith('\nMore.\n')
