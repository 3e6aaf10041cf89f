"""The groups that connect the processes of a run on GPUs: the GPUs are emulated, the store at which processes meet is
real."""
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import train
from plaingpt.machines import processes
from plaingpt.machines.processes import backend_for
from plaingpt.machines.watch import Watch
from tests.waiting import PATIENT

ROOT = Path(__file__).parents[2]


class HasBegun(Exception):
    """An exception that ends a run before its first exchange."""


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Emulate two GPUs of the generation 9.0; return the backend and the bound device of each group that is formed."""
    formed: list[tuple[str, Any]] = []

    def form(backend: str, *, device_id: torch.device | None = None, **_: Any) -> None:
        formed.append((backend, device_id))

    for name, answer in {'is_available': True, 'device_count': 2, 'get_device_capability': (9, 0), 'set_device': None,
                         'get_arch_list': ['sm_90']}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(dist, 'init_process_group', form)
    monkeypatch.setattr(dist, 'barrier', lambda: None)
    return formed


@pytest.mark.parametrize(('kind', 'asked', 'offloads', 'backend'), [
    ('cuda', 'auto', False, 'nccl'), ('cuda', 'nccl', False, 'nccl'), ('cuda', 'gloo', False, 'gloo'),
    ('cuda', 'auto', True, 'cpu:gloo,cuda:nccl'), ('cuda', 'nccl', True, 'cpu:gloo,cuda:nccl'),
    ('cuda', 'gloo', True, 'gloo'), ('cpu', 'nccl', True, 'gloo'), ('mps', 'auto', False, 'gloo')])
def test_gpus_meet_without_gloo_unless_something_is_exchanged_in_main_memory(
        kind: str, asked: str, offloads: bool, backend: str) -> None:
    assert backend_for(kind, asked, offloads) == backend


@pytest.mark.parametrize(('options', 'backend'), [
    (['--strategy=fsdp'], 'nccl'), (['--strategy=fsdp', '--backend=nccl'], 'nccl'),
    (['--strategy=fsdp', '--cpu_offload=True'], 'cpu:gloo,cuda:nccl'),
    (['--strategy=fsdp', '--cpu_offload=True', '--backend=nccl'], 'cpu:gloo,cuda:nccl')])
def test_a_run_on_one_gpu_forms_the_group_that_its_strategy_needs(
        options: list[str], backend: str, groups: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*_: Any) -> None:
        raise HasBegun

    monkeypatch.setattr(processes, 'agree_on_settings', begin)
    with pytest.raises(HasBegun):
        train.main([*options, '--device=cuda:1'])
    assert groups == [(backend, torch.device('cuda', 1))]


@pytest.mark.parametrize(('asked', 'offloads', 'expected'), [
    ('auto', False, ('nccl', torch.device('cuda', 1))),
    ('nccl', True, ('cpu:gloo,cuda:nccl', torch.device('cuda', 1))),
    ('gloo', False, ('gloo', None))])
def test_the_group_of_several_processes_is_bound_to_the_gpu_of_each(
        asked: str, offloads: bool, expected: tuple[str, Any], groups: list[tuple[str, Any]],
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A barrier of a bound group is between GPUs; the barrier of an unbound group with gloo would be gloo's."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    for name, value in {'RANK': '0', 'LOCAL_RANK': '1', 'WORLD_SIZE': '1', 'MASTER_ADDR': '127.0.0.1',
                        'MASTER_PORT': port, 'GLOO_SOCKET_IFNAME': 'lo'}.items():
        monkeypatch.setenv(name, value)
    process = processes.start('cuda', asked, timeout=60, offloads=offloads)
    assert process.device == torch.device('cuda', 1)
    assert groups == [expected]


@pytest.mark.slow
@pytest.mark.parametrize(('error', 'code'), [('errors.UserError("it is gone", 5)', 5), ('NameError("losses")', 1)])
def test_a_process_that_fails_on_a_gpu_ends_without_what_would_wait_for_its_peers(error: str, code: int) -> None:
    """The GPU is a name here, and the group one of gloo; what waits for ever stands for NCCL at the interpreter's
    end."""
    script = f"""
import atexit, time, torch, torch.distributed as dist
from plaingpt import errors
from plaingpt.machines import processes
atexit.register(time.sleep, {PATIENT})
def start(*_):
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    return processes.Process(0, 1, torch.device('cuda', 0), '')
def main(_):
    with processes.joined('cuda'):
        print('a word that is still in its buffer')
        raise {error}
processes.start = start
errors.run(main)
"""
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, encoding='utf-8',
                          timeout=PATIENT / 2)
    assert done.returncode == code
    assert done.stdout == 'a word that is still in its buffer\n'
    assert 'it is gone' in done.stderr or 'NameError: losses' in done.stderr


def test_a_process_whose_watch_may_starve_waits_for_others_twice_the_timeout_and_no_longer() -> None:
    """The group is one of gloo, which takes a limit as NCCL does."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(hours=1))
    try:
        group = dist.group.WORLD
        assert group is not None

        def limit() -> timedelta:
            return group._get_backend(torch.device('cpu')).options._timeout

        for may_starve, expected in ((False, timedelta(hours=1)), (True, timedelta(minutes=10))):
            watch = Watch(processes.Process(0, 2, torch.device('cuda', 0), ''), start_timeout=1800, timeout=300)
            watch.may_starve = may_starve
            assert limit() == timedelta(hours=1), 'until the first step is done'
            watch.tighten()
            watch.tighten()
            assert (limit(), watch.limit) == (expected, 300)
            watch.rest()
            assert limit() == timedelta(hours=1), 'while the last checkpoint is written'
    finally:
        dist.destroy_process_group()
