"""The meeting of a run's processes under any launcher, and the processes that are turned away: real processes, with the
environment that launchers give them."""
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from plaingpt import errors
from plaingpt.machines import meeting
from plaingpt.run import checkpoint
from tests.waiting import PATIENT, wait_until

ROOT = Path(__file__).parents[2]
TINY = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=2', '--eval_iters=1',
        '--gradient_accumulation_steps=2', '--max_iters=2', '--warmup_iters=1', '--sample_interval=0', '--device=cpu']
LAUNCHED = re.compile(r'RANK|LOCAL_RANK|WORLD_SIZE|MASTER_\w+|(SLURM|OMPI|PMIX|TORCHELASTIC|GLOO)_\w+')
SRUN = {'SLURM_JOB_ID': '12', 'SLURM_STEP_ID': '0', 'SLURM_PROCID': '1', 'SLURM_LOCALID': '1', 'SLURM_NTASKS': '2',
        'SLURM_STEP_NUM_TASKS': '2', 'SLURM_STEP_NODELIST': 'localhost'}
MPIRUN = {'OMPI_COMM_WORLD_RANK': '1', 'OMPI_COMM_WORLD_LOCAL_RANK': '1', 'OMPI_COMM_WORLD_SIZE': '2',
          'OMPI_COMM_WORLD_LOCAL_SIZE': '2', 'PMIX_NAMESPACE': '1144520705'}
TORCHRUN = {'RANK': '1', 'LOCAL_RANK': '1', 'WORLD_SIZE': '2', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '29500'}


class Processes:
    """Processes without a launcher, each with the environment that one would give it. They end with the test."""

    def __init__(self, folder: Path, dataset: Path) -> None:
        self.folder, self.dataset = folder, dataset
        self.running: list[subprocess.Popen[str]] = []

    def start(self, environment: Mapping[str, str], *arguments: str, root: Path = ROOT,
              prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        clean = {name: value for name, value in os.environ.items() if not LAUNCHED.fullmatch(name)}
        self.running.append(subprocess.Popen(
            [*prefix, sys.executable, str(root / 'train.py'), f'--dataset={self.dataset}', *TINY,
             f'--out_dir={self.folder / "out"}', *arguments], env={**clean, **environment}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding='utf-8'))
        return self.running[-1]

    def ends(self) -> list[tuple[int, str]]:
        """Return the exit code of each process, and what it wrote to stderr, after all have ended."""
        said = [process.communicate(timeout=PATIENT)[1] for process in self.running]
        return [(process.returncode, text) for process, text in zip(self.running, said, strict=True)]


@pytest.fixture
def processes(tmp_path: Path, tiny_dataset: Path) -> Iterator[Processes]:
    group = Processes(tmp_path, tiny_dataset)
    yield group
    for process in group.running:
        if process.poll() is None:
            process.kill()
            process.communicate()


def free_port() -> str:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return str(free.getsockname()[1])


def by_hand(rank: int, port: str, host: str = '127.0.0.1') -> dict[str, str]:
    return {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': '2', 'MASTER_ADDR': host, 'MASTER_PORT': port}


def can_connect(port: str) -> bool:
    with socket.socket() as test:
        return test.connect_ex(('127.0.0.1', int(port))) == 0


# ------------------------------------------------------------------------------------------------
# The environment of each launcher


@pytest.mark.parametrize(('environment', 'rank', 'host'), [
    (TORCHRUN, '1', 'localhost'),
    (SRUN, '1', 'localhost'),
    (SRUN | {'SLURM_STEP_NODELIST': 'rack[0-1]-n[1-2]', 'SLURM_JOB_ID': 'no number'}, '1', 'rack0-n1'),
    (SRUN | {'SLURM_STEP_NODELIST': 'gpu[07-09,12],login'}, '1', 'gpu07'),
    (SRUN | {'SLURM_STEP_NODELIST': 'a,b[1-2]'}, '1', 'a'),
    (SRUN | {'MASTER_ADDR': 'chosen'}, '1', 'chosen'),
    (MPIRUN, '1', 'localhost'),
    (SRUN | MPIRUN | {'OMPI_COMM_WORLD_RANK': '0'}, '0', 'localhost'),  # mpirun in a step of Slurm
    (SRUN | MPIRUN | TORCHRUN | {'RANK': '0', 'MASTER_ADDR': 'other'}, '0', 'other'),  # and torchrun inside that
])
def test_each_launcher_is_understood(environment: dict[str, str], rank: str, host: str) -> None:
    launch = meeting.launch_of(environment)
    assert launch is not None
    assert (launch.variables['RANK'], launch.variables['WORLD_SIZE']) == (rank, '2')
    assert launch.variables['MASTER_ADDR'] == host
    assert launch.variables.keys() == TORCHRUN.keys()


@pytest.mark.skipif(shutil.which('scontrol') is None, reason='needs scontrol, of Slurm')
@pytest.mark.parametrize('nodes', ['rack[0-1]-n[1-2]', 'gpu[07-09,12],login', 'a,b[1-2]', 'n1', 'c[3]'])
def test_the_first_node_is_the_one_that_slurm_itself_names(nodes: str, tmp_path: Path) -> None:
    (tmp_path / 'slurm.conf').write_text('ClusterName=none\nSlurmctldHost=localhost\n', encoding='utf-8')
    listed = subprocess.run(['scontrol', 'show', 'hostnames', nodes], capture_output=True, text=True, check=True,
                            env={**os.environ, 'SLURM_CONF': str(tmp_path / 'slurm.conf')})
    assert meeting.first_host(nodes) == listed.stdout.split()[0]


@pytest.mark.parametrize('environment', [
    {}, {name: value for name, value in SRUN.items() if name != 'SLURM_STEP_NUM_TASKS'},  # a batch shell
    {'SLURM_NTASKS': '8', 'SLURM_JOB_ID': '1'},  # salloc
    SRUN | {'SLURM_STEP_NUM_TASKS': '1'},
])
def test_a_process_that_no_launcher_started_is_alone(environment: dict[str, str]) -> None:
    assert meeting.launch_of(environment) is None


def test_each_step_and_each_start_has_a_port_of_its_own() -> None:
    others = ({'SLURM_STEP_ID': '1'}, {'SLURM_RESTART_COUNT': '1'}, {'SLURM_JOB_ID': '13'})
    launches = [meeting.launch_of(SRUN | other) for other in ({}, *others)]
    assert len({launch.variables['MASTER_PORT'] for launch in launches if launch}) == 4
    assert len({launch.run for launch in launches if launch}) == 4
    again = meeting.launch_of(SRUN | {'SLURM_PROCID': '0'})
    assert again is not None and launches[0] is not None
    assert again.variables['MASTER_PORT'] == launches[0].variables['MASTER_PORT'], 'the same for all of its processes'


@pytest.mark.parametrize(('environment', 'words'), [
    ({'RANK': '0', 'WORLD_SIZE': '2'}, r'RANK, WORLD_SIZE, and lacks LOCAL_RANK, MASTER_ADDR, MASTER_PORT\n'),
    ({name: value for name, value in TORCHRUN.items() if name != 'LOCAL_RANK'}, 'lacks LOCAL_RANK\n.*torchrun'),
    (MPIRUN | {'OMPI_COMM_WORLD_LOCAL_SIZE': '1'}, 'lacks MASTER_ADDR, MASTER_PORT\nmpirun -x'),
    (TORCHRUN | {'RANK': 'x'}, 'RANK=x must be a whole number'),
    (TORCHRUN | {'RANK': ''}, 'RANK= must be a whole number'),
    (TORCHRUN | {'RANK': '2'}, 'RANK=2 must be below WORLD_SIZE=2'),
    (TORCHRUN | {'MASTER_PORT': '99999'}, 'MASTER_PORT=99999 from 1 to 65535'),
    (SRUN | {'SLURM_STEP_NUM_TASKS': 'many'}, 'WORLD_SIZE=many'),
])
def test_half_of_a_launchers_environment_or_nonsense_is_refused(environment: dict[str, str], words: str) -> None:
    with pytest.raises(errors.UserError, match=words) as caught:
        meeting.launch_of(environment)
    assert caught.value.code == errors.COMMAND
    assert len(str(caught.value).splitlines()) <= 3


def test_a_process_in_a_batch_shell_trains_alone_and_says_so(processes: Processes) -> None:
    shell = {name: value for name, value in SRUN.items() if 'STEP' not in name} | {'SLURM_PROCID': '0'}
    printed = processes.start(shell | {'SLURM_NTASKS': '8'}).communicate(timeout=PATIENT)[0]
    assert processes.ends()[0][0] == errors.DONE
    assert 'alone, as srun, which starts the 8 tasks of a job, did not start it' in printed


@pytest.mark.slow
def test_processes_of_mpirun_meet_and_only_one_of_them_prints(processes: Processes) -> None:
    run = {'PMIX_NAMESPACE': free_port()}
    both = [processes.start(MPIRUN | run | {'OMPI_COMM_WORLD_RANK': rank, 'OMPI_COMM_WORLD_LOCAL_RANK': rank})
            for rank in '01']
    printed = [process.communicate(timeout=PATIENT)[0] for process in both]
    assert [process.returncode for process in both] == [errors.DONE, errors.DONE]
    assert '2 processes; ' in printed[0]
    assert 'Overriding: ' in printed[0]
    assert printed[1] == ''


# ------------------------------------------------------------------------------------------------
# Processes that are turned away


@pytest.mark.slow
def test_two_steps_of_a_job_with_one_port_do_not_meet_in_one_run(processes: Processes) -> None:
    shared = SRUN | {'MASTER_PORT': free_port(), 'MASTER_ADDR': '127.0.0.1'}
    steps = [[shared | {'SLURM_STEP_ID': step, 'SLURM_PROCID': rank, 'SLURM_LOCALID': rank} for rank in '01']
             for step in '01']
    processes.start(steps[0][0])
    wait_until(lambda: can_connect(shared['MASTER_PORT']), 'the store of the first step')
    strangers = [processes.start(environment, f'--out_dir={processes.folder / "other"}') for environment in steps[1]]
    for process in strangers:
        process.wait(PATIENT)
    processes.start(steps[0][1])
    main, first, second, peer = processes.ends()
    assert (main[0], peer[0]) == (errors.DONE, errors.DONE), main[1]
    assert (first[0], second[0]) == (errors.PEER_LOST, errors.PEER_LOST)
    assert f'port {shared["MASTER_PORT"]} of this machine is taken' in first[1]
    assert 'process 1 (srun 12.1.0, 2 processes) has met another run (srun 12.0.0, 2 processes)' in second[1]
    assert all(len(text.splitlines()) <= 3 for _, text in (first, second)), first[1] + second[1]


@pytest.mark.slow
def test_a_process_that_does_not_meet_the_others_ends_with_code_8_in_every_phase(processes: Processes) -> None:
    """Nothing answers at the address; the name has no address; an answer never comes; another process is missing, or is
    halted after it has arrived."""
    quickly = '--start_timeout=6'
    with socket.socket() as silent:
        silent.bind(('127.0.0.1', 0))
        silent.listen()
        processes.start(by_hand(1, free_port()), quickly)
        processes.start(by_hand(1, free_port(), 'no-such-host.invalid'), quickly)
        processes.start(by_hand(1, str(silent.getsockname()[1])), quickly)
        processes.start(by_hand(0, free_port()), quickly)
        ends = processes.ends()
    assert [code for code, _ in ends] == [errors.PEER_LOST] * 4, ends
    assert 'Connection refused' in ends[0][1]
    assert 'what answers there is not process 0' in ends[2][1]
    assert re.search('no-such-host.invalid.*(Name|name)', ends[1][1]), ends[1][1]
    assert all('has not met all others at' in text and len(text.splitlines()) <= 3 for _, text in ends), ends

    processes.running.clear()
    port = free_port()
    halted = processes.start(by_hand(1, port), quickly)
    main = processes.start(by_hand(0, port), quickly)
    wait_until(lambda: can_connect(port), 'the store')
    halted.send_signal(signal.SIGSTOP)
    assert main.wait(PATIENT) == errors.PEER_LOST
    halted.kill()


@pytest.mark.slow
def test_an_interface_that_does_not_exist_is_named_before_any_wait(processes: Processes) -> None:
    processes.start(by_hand(0, free_port()) | {'GLOO_SOCKET_IFNAME': 'nowhere0'})
    [(code, text)] = processes.ends()
    assert code == errors.COMMAND
    assert 'GLOO_SOCKET_IFNAME=nowhere0: this machine has no network interface nowhere0' in text


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[list[str]]:
    """Yield two network namespaces with a cable between them; on both, the name of this machine is 127.0.0.1 or
    127.0.1.1."""
    names = [f'plaingpt{os.getpid()}{host}' for host in 'ab']

    def ip(*words: str) -> bool:
        return shutil.which('ip') is not None and subprocess.run(['ip', *words], capture_output=True).returncode == 0

    made = ip('netns', 'add', names[0]) and ip('netns', 'add', names[1])
    made = made and ip('link', 'add', 'cable', 'netns', names[0], 'type', 'veth', 'peer', 'cable', 'netns', names[1])
    try:
        if not made:
            pytest.skip('needs iproute2, and the right to make network namespaces')
        for number, name in enumerate(names, start=1):
            assert ip('-n', name, 'addr', 'add', f'10.77.0.{number}/24', 'dev', 'cable')
            assert ip('-n', name, 'link', 'set', 'cable', 'up') and ip('-n', name, 'link', 'set', 'lo', 'up')
        yield names
    finally:
        for name in names:
            ip('netns', 'del', name)


@pytest.mark.slow
def test_hosts_meet_although_their_own_names_are_of_the_loopback(processes: Processes, two_hosts: list[str]) -> None:
    for rank, host in enumerate(two_hosts):
        processes.start(by_hand(rank, '29500', '10.77.0.1'), prefix=('ip', 'netns', 'exec', host))
    assert [code for code, _ in processes.ends()] == [errors.DONE, errors.DONE], processes.ends()


# ------------------------------------------------------------------------------------------------
# Agreement


@pytest.mark.slow
def test_processes_with_different_settings_or_sources_are_all_refused(processes: Processes, tmp_path: Path) -> None:
    port = free_port()
    processes.start(by_hand(0, port))
    processes.start(by_hand(1, port), '--weight_decay=0.2', '--max_iters=3', '--seed=1')
    for code, text in processes.ends():
        assert code == errors.COMMAND, text
        assert 'max_iters: 2 on process 0, 3 on process 1' in text
        assert 'weight_decay: 0.1 on process 0, 0.2 on process 1' in text
        assert 'seed: 1337 on process 0, 1 on process 1' in text
        assert len(text.splitlines()) <= 3
    assert not (tmp_path / 'out').exists(), 'no run was begun'

    processes.running.clear()
    other = tmp_path / 'other'
    shutil.copytree(ROOT / 'plaingpt', other / 'plaingpt', ignore=shutil.ignore_patterns('__pycache__'))
    for file in ROOT.glob('*.py'):
        shutil.copy(file, other)
    with open(other / 'plaingpt/sizes.py', 'a', encoding='utf-8') as changed:
        changed.write('\n# another version\n')
    port = free_port()
    processes.start(by_hand(0, port))
    processes.start(by_hand(1, port), root=other)
    for code, text in processes.ends():
        assert code == errors.COMMAND, text
        assert re.search(r'^plaingpt/sizes\.py: "\w{64}" on process 0, "\w{64}" on process 1\n', text), text


@pytest.mark.slow
def test_processes_may_run_in_different_places_and_take_the_time_of_the_first(
        processes: Processes, tmp_path: Path, tiny_dataset: Path) -> None:
    shutil.copytree(tiny_dataset, tmp_path / 'copy')
    (tmp_path / 'clock.py').write_text('import time\nseed = int(time.time() * 1000) % 1000000\n'
                                       f"out_dir = {str(tmp_path)!r} + '/run-{{time}}'\n", encoding='utf-8')
    port = free_port()
    for rank, name in enumerate([str(tiny_dataset), str(tmp_path / 'copy')]):
        processes.start(by_hand(rank, port), f'--dataset={name}', f'--wandb_project={rank}', str(tmp_path / 'clock.py'))
    assert [code for code, _ in processes.ends()] == [errors.DONE, errors.DONE], processes.ends()
    [run] = tmp_path.glob('run-*')
    assert checkpoint.load(run / 'ckpt.pt')['iter_num'] == 2
