"""The meeting of a run's processes: what torchrun, mpirun and srun tell them, and where they find each other."""
import ipaddress
import os
import re
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from plaingpt import console
from plaingpt.errors import PEER_LOST, UserError, first_line

T = TypeVar('T')


class Launcher(NamedTuple):
    """The variables of a program that starts processes."""

    names: tuple[str, str, str]  # of the rank, the rank on this machine, and the number of processes
    run: tuple[str, ...]  # those that together tell a run from all others


RANKS = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')
ALL = (*RANKS, 'MASTER_ADDR', 'MASTER_PORT')  # the variables that torchrun gives each process
# mpirun may run in a step of Slurm, and torchrun in either: the first one that fits has started this process.
# torchrun's count of restarts is not in its `run`, as its machines may have counted differently.
LAUNCHERS = {
    'torchrun': Launcher(RANKS, ('TORCHELASTIC_RUN_ID',)),
    'mpirun': Launcher(('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK', 'OMPI_COMM_WORLD_SIZE'),
                       ('PMIX_NAMESPACE',)),
    'srun': Launcher(('SLURM_PROCID', 'SLURM_LOCALID', 'SLURM_STEP_NUM_TASKS'),
                     ('SLURM_JOB_ID', 'SLURM_STEP_ID', 'SLURM_RESTART_COUNT')),
}
FIRST_PORT, PORTS = 20000, 12000  # below the ports that systems hand out themselves
PAUSE = 0.5  # seconds between two attempts to reach a machine
SILENT = 10.0  # seconds after which a process says why it waits
SIOCGIFADDR = 0x8915  # Linux: which address has this interface?


class Launch(NamedTuple):
    """A process as its launcher sees it."""

    variables: dict[str, str]  # under torchrun's names
    run: str  # a text that tells this run from all others


def launch_of(environment: Mapping[str, str]) -> Launch | None:
    """Return what the launcher of this process says; None for a process that trains alone. Raise UserError if a part of
    it is missing, or makes no sense."""
    several = [name for name, launcher in LAUNCHERS.items() if environment.get(launcher.names[2], '1') != '1']
    name = 'torchrun' if environment.keys() & set(RANKS) else next(iter(several), '')
    if not name:
        return None
    launcher, found = LAUNCHERS[name], {key: environment[key] for key in ALL if key in environment}
    found |= {key: environment[variable] for key, variable in zip(RANKS, launcher.names, strict=True)
              if variable in environment}
    run = f'{name} {".".join(environment.get(part, "0") for part in launcher.run)}'
    if name == 'srun':
        found = {'MASTER_ADDR': first_host(environment.get('SLURM_STEP_NODELIST', 'localhost')),
                 'MASTER_PORT': port_of(run)} | found
    elif name == 'mpirun' and environment.get('OMPI_COMM_WORLD_LOCAL_SIZE') == environment['OMPI_COMM_WORLD_SIZE']:
        found = {'MASTER_ADDR': 'localhost', 'MASTER_PORT': port_of(run)} | found
    if missing := ', '.join(key for key in ALL if key not in found):
        remedy = ('mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500, with the name of the first machine, passes them on'
                  if name == 'mpirun' else f'start the processes with torchrun, which sets all of them, or unset '
                  f'{", ".join(RANKS)} to train alone\n(with one process on each machine, LOCAL_RANK is 0)')
        raise UserError(f'the environment of this process has {", ".join(found)}, and lacks {missing}\n{remedy}')
    for key in (*RANKS, 'MASTER_PORT'):
        if not found[key].isdecimal():
            raise UserError(f'{key}={found[key]} must be a whole number: torchrun sets it')
    if not (int(found['RANK']) < int(found['WORLD_SIZE']) and 0 < int(found['MASTER_PORT']) < 2**16):
        raise UserError(f'RANK={found["RANK"]} must be below WORLD_SIZE={found["WORLD_SIZE"]}, and MASTER_PORT='
                        f'{found["MASTER_PORT"]} from 1 to 65535')
    return Launch(found, f'{run}, {found["WORLD_SIZE"]} processes')


def first_host(nodes: str) -> str:
    """Return the machine on which Slurm starts process 0: rack[0-1]-n[07-09,12],login -> rack0-n07."""
    first = re.match(r'(?:[^,\[]|\[[^]]*])*', nodes)
    return re.sub(r'\[(\w+)[^]]*]', r'\1', first[0] if first else nodes)


def port_of(run: str) -> str:
    """Return the port at which a run meets: the same on all its machines, and hardly ever that of another run."""
    return str(FIRST_PORT + zlib.crc32(run.encode()) % PORTS)


def why_alone(environment: Mapping[str, str]) -> str:
    """Return what a process that trains alone should say in a Slurm job of several tasks."""
    n_tasks = environment.get('SLURM_NTASKS', '1')
    return '' if n_tasks == '1' else f'; alone, as srun, which starts the {n_tasks} tasks of a job, did not start it'


def end_now(last_words: UserError) -> None:
    """End the process from a thread, while the main thread waits in C++ for another process."""
    console.last_words(str(last_words))
    os._exit(last_words.code)


class Deadline:
    """The time by which a process must have met the others. PyTorch's C++ heeds no time-out in some places, and starts
    to count anew in others, so a thread ends the process."""

    def __init__(self, seconds: float, complaint: str) -> None:
        self.begun, self.complaint, self.reason = time.monotonic(), complaint, ''
        self.timer = threading.Timer(seconds, lambda: end_now(self.failure()))
        self.timer.daemon = True

    def failure(self) -> UserError:
        seconds = time.monotonic() - self.begun
        return UserError(f'{self.complaint} in {seconds:.0f} s: {self.reason}\nwere all of them started, with '
                         'Slurm by srun, and can they reach that address?', PEER_LOST)

    def insist(self, attempt: Callable[[], T]) -> T:
        """Call `attempt` until it succeeds, and return the result: another machine may not be ready yet, or not even
        have a name."""
        has_said = False
        while True:
            try:
                return attempt()
            except OSError as error:
                self.reason = error.strerror or str(error)
            if not has_said and time.monotonic() - self.begun > SILENT:
                console.note(f'{self.complaint} yet: {self.reason}')
                has_said = True
            time.sleep(PAUSE)


@contextmanager
def deadline(seconds: float, complaint: str) -> Iterator[Deadline]:
    """Yield a deadline that counts until the block ends."""
    end = Deadline(seconds, complaint)
    end.timer.start()
    try:
        yield end
    finally:
        end.timer.cancel()


def join(launch: Launch, backend: str, timeout: float, gpu: torch.device | None = None) -> dist.Store:
    """Form the group of all processes within `timeout` seconds, bound to the `gpu` of this process if it has one.
    Return one more connection to their store: with it watch.Watch notices sooner than the group's own time-out that a
    process is lost, and names it."""
    rank, _, world_size, host, number = (launch.variables[name] for name in ALL)
    limit, port = timedelta(seconds=2 * timeout), int(number)
    attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')  # torchrun's store outlives a restart, old keys and all
    refuse_unknown_interface(os.environ.get('GLOO_SOCKET_IFNAME', ''))
    connect = partial(dist.TCPStore, host, port, timeout=limit, wait_for_workers=False)
    with deadline(timeout, f'process {rank} of {world_size} has not met all others at {host}:{port}') as end:
        try:
            end.insist(lambda: socket.getaddrinfo(host, port))  # C++ would fill the screen with complaints as it waits
            keeps_store = rank == '0' and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True'
            kept = connect(is_master=True) if keeps_store else None
            with end.insist(lambda: socket.create_connection((host, port), timeout)) as connection:
                address = str(connection.getpeername()[0])
            end.reason = 'what answers there is not process 0'
            store, second = kept or connect(is_master=False), connect(is_master=False)
            met, end.reason = dist.PrefixStore(f'meeting/{attempt}', second), 'not all of them have come'
            refuse_another_run(met, launch)
            name_interface(met, launch, address)
            dist.init_process_group(backend, store=dist.PrefixStore(f'group/{attempt}', store), rank=int(rank),
                                    world_size=int(world_size), timeout=limit, device_id=gpu)
            dist.barrier()
        except UserError:
            raise
        except (dist.DistError, RuntimeError, ValueError) as error:
            if 'EADDRINUSE' in str(error):
                raise UserError(f'port {port} of this machine is taken, perhaps by another run\nwith srun, leave '
                                'MASTER_PORT unset; else export a free one for all processes', PEER_LOST) from None
            end.reason = first_line(error)
            raise end.failure() from None
    return dist.PrefixStore(f'watch/{attempt}', second)


def refuse_another_run(store: dist.Store, launch: Launch) -> None:
    """Raise UserError if another run has the same port: process 0 says which run this is, before anything else is
    said."""
    if launch.variables['RANK'] == '0':
        store.set('run', launch.run)
    found = store.get('run').decode(errors='replace')
    if found != launch.run:
        raise UserError(f'process {launch.variables["RANK"]} ({launch.run}) has met another run ({found[:100]}) at '
                        f'{launch.variables["MASTER_ADDR"]}:{launch.variables["MASTER_PORT"]}\nwith srun, leave '
                        'MASTER_PORT unset; else export another one for each run', PEER_LOST)


def refuse_unknown_interface(names: str) -> None:
    """Raise UserError if this machine lacks a network interface that GLOO_SOCKET_IFNAME lists."""
    known = [name for _, name in socket.if_nameindex()]
    if unknown := set(filter(None, names.split(','))) - set(known):
        raise UserError(f'GLOO_SOCKET_IFNAME={names}: this machine has no network interface {min(unknown)}, but '
                        f'{", ".join(known)}\nunset it: the interface that reaches MASTER_ADDR is then taken')


def name_interface(store: dist.Store, launch: Launch, address: str) -> None:
    """Tell gloo through which network interface to reach the other processes, unless the user did. It would take that
    of the machine's own name, which many systems resolve to 127.0.1.1, out of reach for other machines. `address` is
    that of the store, as this process sees it; if process 0 itself sees 127.0.0.1, the others know better."""
    store.set(f'address/{launch.variables["RANK"]}', address)
    keys = [f'address/{rank}' for rank in range(int(launch.variables['WORLD_SIZE']))]
    seen = [ipaddress.ip_address(answer.decode()) for answer in store.multi_get(keys)]  # multi_get waits for all
    name = interface_to(str(next((one for one in seen if not one.is_loopback), seen[0])))
    if name:
        os.environ.setdefault('GLOO_SOCKET_IFNAME', name)


def interface_to(address: str) -> str:
    """Return the name of the network interface that packets to this address take; '' if this system cannot tell."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # with UDP this sends nothing, and only picks a route
        local = socket.inet_aton(probe.getsockname()[0])
        return next((name for _, name in socket.if_nameindex() if address_of(name, probe) == local), '')
    return ''


def address_of(name: str, probe: socket.socket) -> bytes:
    """Return the IPv4 address of a network interface, in four bytes; b'' if it has none."""
    if sys.platform == 'linux':
        import fcntl

        with suppress(OSError):
            return fcntl.ioctl(probe, SIOCGIFADDR, struct.pack('256s', name.encode()))[20:24]
    return b''
