"""Results are written or reported as an error, and progress that cannot be written never ends a run."""

import io
import os
import pty
import subprocess
import sys

import pytest
from conftest import ONE_DEVICE, ROOT, SMALL_TRAIN, TIMEOUT, fingerprints, strict_json

from convnext_jax.command_line import run
from convnext_jax.errors import UserError
from convnext_jax.output import OutputClosed, finite, open_streams, say, say_in_handler, show, to_json


def test_json_has_null_for_values_that_are_not_finite():
    """Only Python reads NaN: jq, JavaScript and databases would refuse the whole line."""
    rows = [(1.5, float('inf')), {'low': -float('inf')}]
    value = {'loss': float('nan'), 'rows': rows, 'name': 'é', 'n': 3, 'no': None}
    expected = {'loss': None, 'rows': [[1.5, None], {'low': None}], 'name': 'é', 'n': 3, 'no': None}
    assert strict_json(to_json(value)) == finite(value) == expected


def broken_pipe() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, 'w', encoding='utf-8')


def closed_file() -> io.TextIOWrapper:
    with open(os.devnull, 'w', encoding='utf-8') as file:
        return file


def full_disk() -> io.TextIOWrapper:
    return open('/dev/full', 'w', encoding='utf-8')


STREAMS = {
    'broken pipe': broken_pipe,
    'closed': closed_file,
    'full disk': full_disk,
    'ascii': lambda: io.TextIOWrapper(io.BytesIO(), 'ascii'),
    'none': lambda: None,
}


@pytest.mark.parametrize('name', STREAMS)
def test_a_line_of_progress_never_ends_a_run(monkeypatch, name):
    """Days of training would end because a terminal was closed."""
    for stream in ('stdout', 'stderr'):
        monkeypatch.setattr(sys, stream, STREAMS[name]())
    for error in (False, True):
        say('28×28', error=error)
        say('again', error=error)
    for stream in (sys.stdout, sys.stderr):
        if name in ('broken pipe', 'full disk'):
            with pytest.raises(OSError, match='Broken pipe|No space left'):
                stream.close()  # otherwise Python closes it later and prints a warning


def test_a_signal_handler_ignores_errors_of_stderr(monkeypatch):
    """An error in the handler would end the run before it saves its state."""
    monkeypatch.setattr(os, 'write', lambda *_: (_ for _ in ()).throw(OSError(5, 'Input/output error')))
    say_in_handler('stops')


def test_a_result_that_cannot_be_written_is_an_error(monkeypatch):
    """A script would get an empty file and exit status 0."""
    for name, error in (('broken pipe', OutputClosed), ('full disk', UserError)):
        monkeypatch.setattr(sys, 'stdout', stream := STREAMS[name]())
        with pytest.raises(error, match='standard output'):
            show('{"top1": 80}')
        with pytest.raises(OSError, match='Broken pipe|No space left'):
            stream.close()


def test_characters_that_a_terminal_cannot_show_are_escaped(monkeypatch):
    """A command would fail on class names, which may have any characters, and even bytes that are not text."""
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(content := io.BytesIO(), 'ascii'))
    open_streams()
    show('28×28 … żubr \udcff')
    assert content.getvalue() == b'28\\xd728 \\u2026 \\u017cubr \\udcff\n'


def test_streams_of_a_notebook_are_unchanged(monkeypatch):
    """A command would fail in a notebook, whose streams have no descriptor and an encoding that is fixed."""

    class Stream(io.StringIO):
        reconfigure = property()

    monkeypatch.setattr(sys, 'stdout', stream := Stream())
    monkeypatch.setattr(sys, 'argv', ['command'])
    monkeypatch.setattr(sys, 'unraisablehook', sys.unraisablehook)  # restored after the test
    run(lambda arguments: show('28×28'))
    assert stream.getvalue() == '28×28\n'


def test_training_goes_on_when_the_reader_of_its_output_ends(commands, finished_run, tmp_path, monkeypatch):
    """`train.py … | head -3` would end the training. Its output is also ASCII here, which has no ×."""
    monkeypatch.setenv('PYTHONIOENCODING', 'ascii')
    process = commands.start(*SMALL_TRAIN, f'--workdir={tmp_path / "run"}')
    assert r'28\xd728' in process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ''
    assert process.wait(timeout=TIMEOUT) == 0
    assert fingerprints(tmp_path / 'run') == fingerprints(finished_run)


def test_training_goes_on_when_its_terminal_is_gone(finished_run, tmp_path):
    """A lost connection would end the training: each later write to the terminal fails, also from the progress bar."""
    master, terminal = pty.openpty()
    command = [sys.executable, *SMALL_TRAIN, f'--workdir={tmp_path / "run"}']
    options = {'stdin': terminal, 'stdout': terminal, 'stderr': terminal, 'start_new_session': True}
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | ONE_DEVICE, **options)
    os.close(terminal)
    seen = b''
    while b'0/24' not in seen:  # the bar
        seen += os.read(master, 1000)
    os.close(master)
    assert process.wait(timeout=TIMEOUT) == 0
    assert fingerprints(tmp_path / 'run') == fingerprints(finished_run)


PRINTS = """
import os, sys
from convnext_jax.command_line import run
def command(arguments):
    with open(arguments[1], 'w') as file:
        print('a line', flush=True)
        print('a line', file=sys.stderr, flush=True)
        for number in (1, 2):
            os.write(number, b'of a library')
        file.write('record')
run(command)
"""


def test_output_without_streams_does_not_go_into_a_file(tmp_path):
    """Libraries would print into records: the first files that a process opens get the numbers of closed streams."""
    shell = ['sh', '-c', 'exec "$0" "$@" <&- >&- 2>&-', sys.executable, '-c', PRINTS, tmp_path / 'records']
    assert subprocess.run(shell, cwd=ROOT, env=os.environ | ONE_DEVICE, timeout=TIMEOUT).returncode == 0
    assert (tmp_path / 'records').read_text() == 'record'


@pytest.mark.slow
@pytest.mark.parametrize(
    ('output', 'status', 'error'),
    [
        ('| true', 141, ''),
        ('> /dev/full', 2, 'error: standard output cannot be written: No space left on device\n'),
        ('>&-', 0, ''),
    ],
)
def test_a_command_whose_output_is_not_read_ends_quietly(output, status, error):
    """`… | head -1` would print pages of traceback."""
    shell = f'{{ "$0" -m convnext_jax models; echo "status $?" >&2; }} {output}'
    environment = os.environ | ONE_DEVICE
    done = subprocess.run(
        ['sh', '-c', shell, sys.executable], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.stderr == f'{error}status {status}\n'
