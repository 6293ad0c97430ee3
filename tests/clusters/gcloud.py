"""A simulated gcloud with one queued resource, whose host is a folder on this machine.

The folder $STAND_IN contains the file `scenario.json`. Its "states" are printed by the calls of `describe`, one by one.
Its "lost" is the number of the `ssh` call that loses its connection once. The calls are recorded in the file `calls`.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

folder = Path(os.environ['STAND_IN'])
home = folder / 'home'
scenario = json.loads((folder / 'scenario.json').read_text())
assert sys.argv[1:4] == ['compute', 'tpus', 'queued-resources'], sys.argv
assert sys.argv[-1] == '--zone=here', sys.argv
verb, *arguments = sys.argv[4:-1]


def count(name: str) -> int:
    """The number of earlier calls with this verb."""
    calls = folder / 'calls'
    with open(calls, 'a+') as file:
        file.seek(0)
        number = sum(line.split()[0] == name for line in file)
        file.write(f'{verb} {" ".join(arguments)}'.replace('\n', ' ') + '\n')
    return number


number = count(verb)
if verb == 'describe':
    state = scenario['states'][number]
    if state == 'ERROR':
        sys.exit('ERROR: gcloud crashed (ConnectionError)')
    print(state)
elif verb == 'create':
    home.mkdir()  # fails if the resource exists, as gcloud does
elif verb == 'delete':
    home.rename(folder / f'deleted{number}')
elif verb == 'scp':
    source, target = arguments[:2]
    (home / target.partition(':')[2]).write_bytes(Path(source).read_bytes())
elif verb == 'ssh':
    command = next(text.removeprefix('--command=') for text in arguments if text.startswith('--command='))
    shell = ['bash', '-c', command]
    if number == scenario['lost']:  # gcloud runs the command again
        host = subprocess.Popen(shell, cwd=home)
        time.sleep(1)
        host.kill()
    sys.exit(subprocess.run(shell, cwd=home).returncode)
