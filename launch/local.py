"""Starts N processes of one job on this machine, each with the devices that it sees: a pod to try things on.

    python launch/local.py 2 -- train.py --config=configs/fashion_mnist.py --workdir=runs/two

SIGTERM and Ctrl-C go to all. When one process fails, the others are given time to end by themselves. The exit status is
that of the first that failed, as a shell gives it; 0 if none did.
"""

import signal
import socket
import subprocess
import sys
import time

GRACE = 60
"""Seconds that the others have once one has failed. JAX's runtime ends them sooner."""


def main(arguments: list[str]) -> int:
    if len(arguments) < 4 or not arguments[1].isdecimal() or arguments[2] != '--':
        print(__doc__, file=sys.stderr)
        return 2
    count, command = int(arguments[1]), arguments[3:]
    with socket.create_server(('127.0.0.1', 0)) as free:
        flags = [f'--coordinator=127.0.0.1:{free.getsockname()[1]}', f'--process_count={count}']
    processes = [
        # In sessions of their own: Ctrl-C comes from here, once.
        subprocess.Popen([sys.executable, *command, *flags, f'--process_id={number}'], start_new_session=True)
        for number in range(count)
    ]

    def pass_on(number: int, _frame: object) -> None:
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    return wait(processes)


def wait(processes: list[subprocess.Popen]) -> int:
    """Returns when all have ended, and says which failed first."""
    status, deadline = 0, None
    while any(process.poll() is None for process in processes):
        time.sleep(0.1)
        if deadline is None:
            status = first_failure(processes)
            deadline = time.monotonic() + GRACE if status else None
        elif time.monotonic() > deadline:
            for process in processes:
                process.kill()
    return status or first_failure(processes)


def first_failure(processes: list[subprocess.Popen]) -> int:
    for number, process in enumerate(processes):
        if process.poll():
            status = process.returncode
            how = f'was ended by {signal.Signals(-status).name}' if status < 0 else f'ended with status {status}'
            print(f'launch/local.py: process {number} {how}', file=sys.stderr, flush=True)
            return 128 - status if status < 0 else status
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv))
