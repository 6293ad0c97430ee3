"""Starts a job of N processes on this machine, to test multi-process runs. Each process uses all visible devices.

    python launch/local.py 2 -- train.py --config=configs/fashion_mnist.py --workdir=runs/two

SIGTERM and Ctrl-C are forwarded to all processes. When one process fails, the others have 60 s to exit and are then
killed. The exit status is 0 if no process failed, otherwise the status of the first that failed (128 + N for signal N).
"""

import signal
import socket
import subprocess
import sys
import time

EXIT_TIMEOUT = 60
"""Time that the other processes have to exit after one has failed. The package's watchdog usually ends them sooner."""


def main(arguments: list[str]) -> int:
    if len(arguments) < 4 or not arguments[1].isdecimal() or arguments[2] != '--':
        print(__doc__, file=sys.stderr)
        return 2
    count, command = int(arguments[1]), arguments[3:]
    with socket.create_server(('127.0.0.1', 0)) as free:
        flags = [f'--coordinator=127.0.0.1:{free.getsockname()[1]}', f'--process_count={count}']
    processes = [
        # A new session for each process: the terminal sends Ctrl-C to this process only, which forwards it once.
        subprocess.Popen([sys.executable, *command, *flags, f'--process_id={number}'], start_new_session=True)
        for number in range(count)
    ]

    def forward(number: int, _frame: object) -> None:
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    return wait(processes)


def wait(processes: list[subprocess.Popen]) -> int:
    """Waits until all processes have ended, and returns the exit status of the job."""
    status, deadline = 0, None
    while any(process.poll() is None for process in processes):
        time.sleep(0.1)
        if deadline is None:
            status = first_failure(processes)
            deadline = time.monotonic() + EXIT_TIMEOUT if status else None
        elif time.monotonic() > deadline:
            for process in processes:
                process.kill()
    return status or first_failure(processes)


def first_failure(processes: list[subprocess.Popen]) -> int:
    """Reports the first failed process and returns its status as a shell does; 0 if no process has failed."""
    for number, process in enumerate(processes):
        if process.poll():
            status = process.returncode
            how = f'was ended by {signal.Signals(-status).name}' if status < 0 else f'ended with status {status}'
            print(f'launch/local.py: process {number} {how}', file=sys.stderr, flush=True)
            return 128 - status if status < 0 else status
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv))
