"""launch/slurm.sbatch and srun on a real Slurm: two nodes on the loopback of this machine, whose daemons this file
starts. If Slurm is not installed, tests/test_launch.py has stand-ins for its programs."""
import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plaingpt import errors
from plaingpt.run import checkpoint
from tests.waiting import PATIENT, wait_until

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.slurm]
TINY = ['--n_layer=2', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=2', '--eval_iters=1',
        '--gradient_accumulation_steps=2', '--sample_interval=0', '--log_interval=10', '--warmup_iters=2',
        '--device=cpu', '--timeout=60']
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4000
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Cluster:
    """The daemons, and the commands that query them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ('state', 'spool'):
            (folder / name).mkdir()
        with socket.socket() as a, socket.socket() as b, socket.socket() as c:
            for free in (a, b, c):
                free.bind(('127.0.0.1', 0))
            ports = [free.getsockname()[1] for free in (a, b, c)]
        host = socket.gethostname().partition('.')[0]
        (folder / 'slurm.conf').write_text(
            CONFIGURATION.format(host=host, ports=ports, user=getpass.getuser(), folder=folder), encoding='utf-8')
        self.environment = {**os.environ, 'SLURM_CONF': str(folder / 'slurm.conf'), 'PYTHONUNBUFFERED': '1',
                            'PATH': os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])}
        try:
            socket.getaddrinfo('n1', 1)  # the address at which processes meet, unless another is exported
        except socket.gaierror:
            self.environment['MASTER_ADDR'] = '127.0.0.1'
        self.daemons = [self.start('slurmctld', '-D', '-i'), self.start('slurmd', '-D', '-N', 'n1'),
                        self.start('slurmd', '-D', '-N', 'n2')]

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        with open(self.folder / 'daemons.log', 'ab') as log:
            return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def ask(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True,
                              timeout=PATIENT).stdout

    def submit(self, script: Path, *arguments: str) -> str:
        """Return the number of the job."""
        told = self.ask('sbatch', '--parsable', '--nodes=2', '--ntasks-per-node=1', '--gpus-per-node=0', '--mem=2000',
                        '--cpus-per-task=1', f'--output={self.folder}/job.log', str(script), *arguments)
        assert told.strip().isdecimal(), told
        return told.strip()

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r'(\w+)=(\S*)', self.ask('scontrol', 'show', 'job', number)))

    def wait_for(self, number: str, state: str, restarts: int) -> None:
        wait_until(lambda: (job := self.job(number))['JobState'] == state and job['Restarts'] == str(restarts),
                   f'{state} of the job, after {restarts} restarts')

    @property
    def log(self) -> str:
        path = self.folder / 'job.log'
        return path.read_text(encoding='utf-8') if path.exists() else ''

    def end(self) -> None:
        self.ask('scancel', '--user', getpass.getuser())
        wait_until(lambda: not self.ask('squeue', '--noheader') or self.daemons[0].poll() is not None)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait(PATIENT)


@pytest.fixture(scope='module')
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if shutil.which('slurmctld') is None or shutil.which('slurmd') is None:
        pytest.skip('needs Slurm: apt-get install slurm-wlm')
    cluster = Cluster(tmp_path_factory.mktemp('slurm'))
    try:
        wait_until(lambda: cluster.ask('sinfo', '--noheader', '--format=%T %D').strip() == 'idle 2'
                   or any(daemon.poll() is not None for daemon in cluster.daemons), 'both nodes')
        if any(daemon.poll() is not None for daemon in cluster.daemons):
            said = (cluster.folder / 'daemons.log').read_text(encoding='utf-8')
            pytest.skip(f'Slurm does not start here: {said[-300:]}')
        yield cluster
    finally:
        cluster.end()


def status_of(out: Path) -> dict[str, Any]:
    status: dict[str, Any] = json.loads((out / 'status.json').read_text(encoding='utf-8'))
    return status


def pids_of(out: Path) -> list[int]:
    """Return the processes that train into a folder."""
    listing = subprocess.run(['ps', '-eww', '-o', 'pid=,args='], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in listing.splitlines() if re.search(rf'python train\.py.*={out}( |$)', line)]


def test_a_job_on_two_nodes_outlives_its_time_limit_and_a_lost_process(cluster: Cluster, tiny_dataset: Path,
                                                                       tmp_path: Path) -> None:
    out = tmp_path / 'out'
    number = cluster.submit(ROOT / 'launch/slurm.sbatch', f'--dataset={tiny_dataset}', *TINY, '--eval_interval=500',
                            '--max_iters=3000', '--lr_decay_iters=3000', f'--out_dir={out}')
    wait_until(lambda: 'iter 20: ' in cluster.log, 'twenty steps')
    assert '2 processes' in cluster.log
    assert cluster.log.count('Overriding: out_dir') == 1, 'only one process prints'
    cluster.ask('scancel', '--signal=USR1', number)  # as before the end of the time limit
    cluster.wait_for(number, 'PENDING', 1)
    stopped = checkpoint.load(out / 'ckpt.pt')['iter_num']
    assert cluster.log.count(f'stopped before step {stopped} of 3000 by ') == 2, cluster.log[-2000:]
    assert (status_of(out)['exit_code'], status_of(out)['step']) == (errors.STOPPED, stopped - 1)

    cluster.ask('scontrol', 'update', f'JobId={number}', 'StartTime=now+5')  # instead of two minutes later
    wait_until(lambda: re.search(rf'(?s)resuming at step {stopped}.*\niter \d+0: ', cluster.log), 'the second start')
    os.kill(pids_of(out)[-1], signal.SIGKILL)
    cluster.wait_for(number, 'PENDING', 2)
    assert 'is silent: it has died, or was halted' in cluster.log
    assert 'exit code 137 at step' in cluster.log
    assert 'frame #' not in cluster.log
    cluster.ask('scontrol', 'update', f'JobId={number}', 'StartTime=now+5')
    cluster.wait_for(number, 'COMPLETED', 2)
    assert checkpoint.load(out / 'ckpt.pt')['iter_num'] == 3000


def test_two_steps_of_one_job_are_two_runs_and_a_command_outside_of_srun_is_alone(
        cluster: Cluster, tiny_dataset: Path, tmp_path: Path) -> None:
    train = f'python train.py --dataset={tiny_dataset} {" ".join(TINY)} --max_iters=4 --lr_decay_iters=4'
    script = tmp_path / 'sweep.sh'
    script.write_text(f"""#!/bin/bash
{train} --out_dir={tmp_path}/alone
srun --overlap --mem=0 {train} --out_dir={tmp_path}/1 --learning_rate=1e-3 &
srun --overlap --mem=0 {train} --out_dir={tmp_path}/2 --learning_rate=2e-3 &
wait %1 && wait %2
""", encoding='utf-8')
    (cluster.folder / 'job.log').unlink(missing_ok=True)
    cluster.wait_for(cluster.submit(script), 'COMPLETED', 0)
    assert 'alone, as srun, which starts the 2 tasks of a job, did not start it' in cluster.log
    assert cluster.log.count('2 processes; ') == 2
    for step in (1, 2):
        assert checkpoint.load(tmp_path / f'{step}/ckpt.pt')['config']['learning_rate'] == step * 1e-3
