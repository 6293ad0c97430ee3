"""Two simulated hosts (network namespaces) on this machine, and a link that can be slow, lose packets or break.

Each host has a TUN device, and threads of this process carry packets from one to the other. The usual tool, netem, is
missing in many Linux kernels.
"""

import collections
import contextlib
import fcntl
import os
import random
import select
import struct
import subprocess
import threading
import time

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # from <linux/if_tun.h>


def ip(*arguments: str) -> str:
    """Runs the command `ip` and returns its output."""
    return subprocess.run(['ip', *arguments], check=True, capture_output=True, text=True).stdout


class Host:
    """A network namespace with one IPv4 address.

    Args:
        name: name of the namespace and of its network device.
        address: the address.
        stack: removes the namespace when it closes.
    """

    def __init__(self, name: str, address: str, stack: contextlib.ExitStack):
        self.address, self._name = address, name
        self.tun = os.open('/dev/net/tun', os.O_RDWR)
        stack.callback(os.close, self.tun)
        fcntl.ioctl(self.tun, TUNSETIFF, struct.pack('16sH', name.encode(), IFF_TUN | IFF_NO_PI))
        ip('netns', 'add', name)
        stack.callback(ip, 'netns', 'delete', name)
        ip('link', 'set', name, 'netns', name)
        ip('-n', name, 'address', 'add', f'{address}/24', 'dev', name)
        for device in ('lo', name):
            ip('-n', name, 'link', 'set', device, 'up')

    def command(self, *arguments: str, hostname: str | None = None) -> list[str]:
        """The command that runs another command on this host.

        Args:
            hostname: name of the host; None for its address, because JAX connects CPU devices by the name of the host.
        """
        script = f'hostname {hostname or self.address} && exec "$@"'
        return ['ip', 'netns', 'exec', self._name, 'unshare', '--uts', 'sh', '-c', script, 'sh', *arguments]

    def processes(self) -> list[int]:
        """The ids of all processes on this host."""
        return [int(pid) for pid in ip('netns', 'pids', self._name).split()]


class Network:
    """Two hosts and their link. Use as a context manager.

    Attributes:
        hosts: the hosts.
        delay: time that a packet takes, in seconds.
        loss: probability that a packet is lost.
        connected: whether packets arrive.
    """

    def __init__(self, delay: float = 0, loss: float = 0):
        self.delay, self.loss, self.connected = delay, loss, True

    def __enter__(self) -> 'Network':
        with contextlib.ExitStack() as stack:
            self.hosts = [Host(f'host{i}-{os.getpid()}', f'10.77.0.{i + 1}', stack) for i in range(2)]
            self._stack = stack.pop_all()
        self._open = True
        self._threads = [
            threading.Thread(target=self._carry, args=(self.hosts[i].tun, self.hosts[1 - i].tun)) for i in range(2)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def _carry(self, source: int, target: int) -> None:
        draw = random.Random(0)
        packets: collections.deque[tuple[float, bytes]] = collections.deque()
        while self._open:
            wait = max(0, packets[0][0] - time.monotonic()) if packets else 0.1
            if select.select([source], [], [], wait)[0]:
                packet = os.read(source, 65536)
                if self.connected and draw.random() >= self.loss:
                    packets.append((time.monotonic() + self.delay, packet))
            while packets and packets[0][0] <= time.monotonic():
                os.write(target, packets.popleft()[1])

    def __exit__(self, *_: object) -> None:
        self._open = False
        for thread in self._threads:
            thread.join()
        self._stack.close()
