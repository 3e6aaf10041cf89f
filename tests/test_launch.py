"""The files of launch/ under stand-ins for the schedulers, which start real processes and signal them as the real ones
do, and the promises of these files to Slurm, Kubernetes and Docker."""
import fnmatch
import importlib
import json
import os
import re
import runpy
import shlex
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
LAUNCH = ROOT / 'launch'
TINY = ['--n_layer=2', '--n_head=2', '--n_embd=16', '--block_size=16', '--dropout=0.1', '--batch_size=2',
        '--gradient_accumulation_steps=2', '--eval_iters=1', '--eval_interval=100000', '--sample_interval=0',
        '--log_interval=10', '--warmup_iters=2', '--device=cpu', '--timeout=20']

# Slurm starts the processes of a step on the nodes, not below the batch shell, and this stand-in does, too: in sessions
# of their own. It honours the options that decide which processes are killed when, and returns the highest code, or 128
# + the signal.
SRUN = r"""
import os, subprocess, sys, time
options = dict(word.partition('=')[::2] for word in sys.argv[1:sys.argv.index('python')])
command = sys.argv[sys.argv.index('python'):]
known = {'--kill-on-bad-exit', '--wait', '--cpus-per-task'}
assert options.keys() <= known, options
here = os.environ['STAND_IN']
tasks = []
for rank in range(2):
    more = {'SLURM_PROCID': str(rank), 'SLURM_LOCALID': str(rank), 'SLURM_NTASKS': '2', 'SLURM_STEP_ID': '0',
            'SLURM_STEP_NUM_TASKS': '2', 'SLURM_STEP_NODELIST': 'localhost'}
    tasks.append(subprocess.Popen(command, env=os.environ | more, start_new_session=True))
with open(here + '/step.new', 'w') as file:
    file.write(' '.join(str(task.pid) for task in tasks))
os.replace(here + '/step.new', here + '/step')
is_killed = False
while any(task.poll() is None for task in tasks):
    if options.get('--kill-on-bad-exit', '1') == '1' and not is_killed and any(task.poll() for task in tasks):
        is_killed = True
        for task in tasks:
            task.poll() is None and task.kill()
    time.sleep(0.01)
codes = [task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks]
with open(here + '/codes', 'a') as file:
    print(*codes, file=file)
sys.exit(max(codes))
"""
SCONTROL = r"""
import os, sys
with open(os.environ['STAND_IN'] + '/scontrol', 'a') as file:
    print(*sys.argv[1:], file=file)
"""


class Slurm:
    """A Slurm cluster of this machine alone, which runs batch scripts and signals them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.job = folder, os.getpid()
        programs = folder / 'bin'
        programs.mkdir()
        for name, source in {'srun': SRUN, 'scontrol': SCONTROL}.items():
            (programs / name).write_text(f'#!{sys.executable}\n{source}', encoding='utf-8')
            (programs / name).chmod(0o755)
        path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ['PATH']])
        self.environment = {**os.environ, 'PATH': path, 'STAND_IN': str(folder), 'SLURM_JOB_ID': str(self.job),
                            'SLURM_CPUS_PER_TASK': '1', 'PYTHONUNBUFFERED': '1'}
        self.log = folder / 'slurm.out'

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        (self.folder / 'step').unlink(missing_ok=True)
        with open(self.log, 'ab') as log:  # --open-mode=append
            return subprocess.Popen(['bash', str(LAUNCH / 'slurm.sbatch'), *arguments], cwd=ROOT, stdout=log,
                                    stderr=log, stdin=subprocess.DEVNULL, env=self.environment)

    def warn(self, shell: subprocess.Popen[bytes]) -> None:
        """Send the signal that comes before the end of the time limit, as the script's directive asks: to the processes
        of the step, or with B: to the batch shell alone."""
        where, _, name = directives()['signal'].partition('@')[0].rpartition(':')
        pids = [shell.pid] if where == 'B' else [int(pid) for pid in self.read('step')[0].split()]
        for pid in pids:
            os.kill(pid, signal.Signals[f'SIG{name}'])

    def read(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text(encoding='utf-8').splitlines() if path.exists() else []


def free_port() -> int:
    with socket.socket() as free:
        free.bind(('localhost', 0))
        return int(free.getsockname()[1])


def only(pattern: str, text: str) -> str:
    """Return the group of a pattern that fits in exactly one place."""
    found: list[str] = re.findall(pattern, text, re.MULTILINE)
    assert len(found) == 1, f'{pattern}: {found}'
    return found[0]


def directives() -> dict[str, str]:
    """Return the #SBATCH lines. sbatch reads them up to the first command."""
    lines = (LAUNCH / 'slurm.sbatch').read_text(encoding='utf-8').splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith('#'))
    found = [line.removeprefix('#SBATCH --') for line in lines[:first_command] if line.startswith('#SBATCH')]
    assert len(found) == sum('#SBATCH --' in line for line in lines), 'sbatch does not read one of them'
    return {name: value for name, _, value in (line.partition('=') for line in found)}


# ------------------------------------------------------------------------------------------------
# Slurm


@pytest.mark.slow
def test_a_slurm_job_saves_at_its_signal_is_requeued_once_and_runs_to_its_end(tiny_dataset: Path,
                                                                              tmp_path: Path) -> None:
    slurm, out = Slurm(tmp_path), tmp_path / 'out'
    command = ['config/train_gpt2.py', '--wandb_log=False', f'--dataset={tiny_dataset}', f'--out_dir={out}', *TINY,
               '--max_iters=800', '--lr_decay_iters=800']
    shell = slurm.start(*command)
    wait_until(lambda: 'iter 20: ' in ' '.join(slurm.read('slurm.out')), 'twenty steps')
    slurm.warn(shell)
    assert shell.wait(PATIENT) == errors.STOPPED, slurm.read('slurm.out')[-20:]
    assert slurm.read('codes') == ['75 75'], 'the exit codes of both processes'
    status = json.loads((out / 'status.json').read_text(encoding='utf-8'))
    stopped = checkpoint.load(out / 'ckpt.pt')['iter_num']
    assert (status['state'], status['exit_code']) == ('stopped', errors.STOPPED)
    assert status['step'] == stopped - 1, 'the last update, to which --log_interval gives no row'
    assert 20 < stopped < 800
    assert f'stopped before step {stopped} of 800' in '\n'.join(slurm.read('slurm.out'))
    assert slurm.read('scontrol') == [f'requeue {slurm.job}']

    assert slurm.start(*command).wait(PATIENT) == errors.DONE, slurm.read('slurm.out')[-20:]
    log = '\n'.join(slurm.read('slurm.out'))
    assert f'resuming at step {stopped}' in log
    assert log.index('iter 20: ') < log.index('resuming at step'), 'the log of the first start is still there'
    assert slurm.read('scontrol') == [f'requeue {slurm.job}'], 'a finished run is not requeued'
    assert checkpoint.load(out / 'ckpt.pt')['iter_num'] == 800
    steps = [json.loads(line)['step'] for line in (out / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    assert len(steps) == len(set(steps))


@pytest.mark.slow
def test_a_slurm_job_with_a_wrong_setting_is_not_requeued(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path)
    assert slurm.start('config/train_gpt2.py', '--learning_rte=1').wait(PATIENT) == errors.COMMAND
    assert slurm.read('codes') == ['2 2']
    assert slurm.read('scontrol') == []


@pytest.mark.slow
def test_a_slurm_job_that_loses_a_process_is_requeued_and_resumes(tiny_dataset: Path, tmp_path: Path) -> None:
    slurm, out = Slurm(tmp_path), tmp_path / 'out'
    command = [f'--dataset={tiny_dataset}', f'--out_dir={out}', *TINY, '--eval_interval=20', '--max_iters=400',
               '--lr_decay_iters=400']
    shell = slurm.start(*command)
    wait_until((out / 'ckpt.pt').exists, 'a checkpoint')
    os.kill(int(slurm.read('step')[0].split()[1]), signal.SIGKILL)
    assert shell.wait(PATIENT) == 137, slurm.read('slurm.out')[-20:]
    assert slurm.read('codes') == ['8 137']
    assert slurm.read('scontrol') == [f'requeue {slurm.job}']
    log = '\n'.join(slurm.read('slurm.out'))
    step = json.loads((out / 'status.json').read_text(encoding='utf-8'))['step']
    assert f'exit code 137 at step {step}: the job starts again, after 1 end without progress' in log
    assert 'frame #' not in log
    assert slurm.start(*command).wait(PATIENT) == errors.DONE, slurm.read('slurm.out')[-20:]
    assert 'resuming at step' in '\n'.join(slurm.read('slurm.out'))


@pytest.mark.parametrize(('code', 'steps', 'expected'), [
    (errors.PEER_LOST, [-1, -1, -1, -1], [0, 0, 0, 1]),  # the run cannot even begin
    (137, [10, 10, 10, 20, 20, 20, 20, 20], [0, 0, 0, 0, 0, 0, 0, 1]),
    (137, [5, 4, 3, 2], [0, 0, 0, 1]),
    (errors.DATA, [10], [1]), (errors.INTERRUPTED, [10], [1]), (errors.DONE, [10], [1]),
])
def test_a_job_that_loses_processes_without_progress_starts_again_three_times(
        code: int, steps: list[int], expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = runpy.run_path(str(LAUNCH / 'requeue.py'))['main']
    monkeypatch.setenv('SLURM_JOB_ID', '12')
    ends = []
    for step in steps:
        if step >= 0:
            (tmp_path / 'status.json').write_text(json.dumps({'step': step}), encoding='utf-8')
        with pytest.raises(SystemExit) as left:
            main([str(code), f'--out_dir={tmp_path}'])
        ends.append(int(left.value.code or 0))
    assert ends == expected
    monkeypatch.setenv('SLURM_JOB_ID', '13')
    if is_loss := code in (errors.PEER_LOST, 137):
        with pytest.raises(SystemExit, match=r'^(0|False)$'):
            main([str(code), f'--out_dir={tmp_path}'])  # another job starts a new count
    assert (tmp_path / 'requeued.json').exists() == is_loss


def test_what_cannot_be_resumed_or_read_is_requeued_within_bounds(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(LAUNCH / 'requeue.py'))['main']
    monkeypatch.setenv('SLURM_JOB_ID', '12')
    config = tmp_path / 'config.py'
    config.write_text(f"import time\nout_dir = {str(tmp_path)!r} + '/run-' + str(time.time())\n", encoding='utf-8')
    for argument in (f'--out_dir={tmp_path}/run-{{time}}', str(config)):
        with pytest.raises(SystemExit, match='1'):
            main(['8', argument])
        assert 'cannot be resumed' in capsys.readouterr().out and list(tmp_path.iterdir()) == [config]
    for content in ('[1]', '{"step": "3"}', '{"job": "12"}', '{'):
        (tmp_path / 'status.json').write_text(content, encoding='utf-8')
        (tmp_path / 'requeued.json').write_text(content, encoding='utf-8')
        with pytest.raises(SystemExit, match=r'^(0|False)$'):
            main(['8', f'--out_dir={tmp_path}'])


def test_the_slurm_script_asks_for_what_requeueing_needs() -> None:
    asked = directives()
    assert 'requeue' in asked
    assert asked['open-mode'] == 'append', 'a requeued job would begin its log anew'
    lead = int(asked['signal'].partition('@')[2])
    assert lead >= 120, 'seconds for a step and a save; Slurm sends the signal up to 60 early, never late'
    assert asked['ntasks-per-node'] == asked['gpus-per-node'], 'one process for each GPU'
    wait = only(r'--wait=(\d+)', (LAUNCH / 'slurm.sbatch').read_text(encoding='utf-8'))
    timeout = only(r'^timeout: float = ([\d.]+)', (ROOT / 'train.py').read_text(encoding='utf-8'))
    assert int(wait) > float(timeout), 'train.py names a lost process before srun ends the step'


def test_the_cluster_on_aws_has_what_the_slurm_script_asks_for() -> None:
    cluster = yaml_of('aws-cluster.yaml')[0]
    queue, storage = cluster['Scheduling']['SlurmQueues'][0], cluster['SharedStorage'][0]
    assert storage['FsxLustreSettings']['DeletionPolicy'] == 'Retain', 'checkpoints outlive the cluster'
    assert storage['StorageType'] == 'FsxLustre'
    assert queue['ComputeResources'][0]['MinCount'] == 0, 'no GPU is paid for while no job runs'
    cpus = {'p4d.24xlarge': 96}[queue['ComputeResources'][0]['InstanceType']]
    assert int(directives()['gpus-per-node']) * int(directives()['cpus-per-task']) <= cpus
    text = (LAUNCH / 'aws-cluster.yaml').read_text(encoding='utf-8')
    assert f'--out_dir={storage["MountDir"]}/' in text, 'all nodes see the run'
    assert not re.search(SECRET, text)


# ------------------------------------------------------------------------------------------------
# Kubernetes

SECRET = re.compile(r'AKIA[0-9A-Z]{16}|(SECRET|TOKEN|PASSWORD|_KEY)\w*[ \t]*[=:][ \t]*\S', re.IGNORECASE)


def yaml_of(name: str) -> list[Any]:
    yaml = importlib.import_module('yaml')
    return list(yaml.safe_load_all((LAUNCH / name).read_text(encoding='utf-8')))


@pytest.fixture
def manifest() -> dict[str, Any]:
    return {document['kind']: document for document in yaml_of('kubernetes.yaml')}


def test_the_pods_of_a_run_find_each_other(manifest: dict[str, Any]) -> None:
    job, service = manifest['Job'], manifest['Service']
    pod = job['spec']['template']['spec']
    arguments = pod['containers'][0]['args']
    nodes = job['spec']['completions']
    assert job['spec']['completionMode'] == 'Indexed', 'a pod that fails comes back under its own number'
    assert job['spec']['parallelism'] == nodes, 'all at once, or they wait for each other forever'
    assert f'--nnodes={nodes}' in arguments
    assert '--node_rank=$(JOB_COMPLETION_INDEX)' in arguments
    assert service['spec']['clusterIP'] == 'None', 'pods have names only behind a headless service'
    assert service['spec']['publishNotReadyAddresses'] is True
    assert service['spec']['selector'] == {'batch.kubernetes.io/job-name': job['metadata']['name']}
    assert pod['subdomain'] == service['metadata']['name']
    assert f'--master_addr={job["metadata"]["name"]}-0.{pod["subdomain"]}' in arguments
    assert '--master_port=29500' in arguments


def test_torchrun_and_train_take_what_kubernetes_gives_them(manifest: dict[str, Any]) -> None:
    container = manifest['Job']['spec']['template']['spec']['containers'][0]
    assert container['command'] == ['python', 'launch/torchrun.py'], 'no shell between Kubernetes and torchrun'
    given = [argument.replace('$(JOB_COMPLETION_INDEX)', '1') for argument in container['args']]
    options = importlib.import_module('torch.distributed.run').parse_args(given)
    assert (options.node_rank, options.rdzv_backend, options.max_restarts) == (1, 'static', 0)
    assert [options.training_script, *options.training_script_args][:2] == ['train.py', 'config/train_gpt2.py']
    assert 'train.py config/train_gpt2.py' in (ROOT / 'README.md').read_text(encoding='utf-8')
    settings, _ = importlib.import_module('configurator').configure(
        importlib.import_module('train'), [str(ROOT / 'config/train_gpt2.py'), *options.training_script_args[1:]])
    assert settings['init_from'] == 'auto', 'a pod that comes back resumes'
    mounts = {mount['mountPath'] for mount in container['volumeMounts']}
    assert {'/' + settings[name].split('/')[1] for name in ('dataset', 'out_dir')} <= mounts, 'these must outlive a pod'


def test_kubernetes_gives_a_run_the_time_to_save(manifest: dict[str, Any]) -> None:
    pod = manifest['Job']['spec']['template']['spec']
    options = importlib.import_module('torch.distributed.run').parse_args(
        [argument for argument in pod['containers'][0]['args'] if '$' not in argument])
    assert 30 < options.shutdown_timeout < pod['terminationGracePeriodSeconds'], 'torchrun must not be killed first'
    assert {'SIGTERM', 'SIGINT', 'SIGUSR1'} <= set(options.signals_to_handle.split(','))
    assert int(options.rdzv_conf.removeprefix('timeout=')) > 360, 'the longest pause between two attempts'


def outcome(policy: dict[str, Any], code: int, conditions: list[str]) -> str:
    """Return what Kubernetes does with a pod that failed: the action of the first rule that fits, or else 'Count'."""
    for rule in policy['rules']:
        codes = rule.get('onExitCodes')
        if codes and (code in codes['values']) == (codes['operator'] == 'In'):
            return rule['action']
        if any(pattern['type'] in conditions for pattern in rule.get('onPodConditions', [])):
            return rule['action']
    return 'Count'


@pytest.mark.parametrize(('code', 'conditions', 'expected'), [
    (errors.STOPPED, [], 'Ignore'),
    (143, ['DisruptionTarget'], 'Ignore'),
    (errors.PEER_LOST, ['DisruptionTarget'], 'Ignore'),
    (errors.PEER_LOST, [], 'Count'),
    (errors.CHECK_FAILED, [], 'Count'),
    (137, [], 'Count'),
    *((code, [], 'FailJob') for code in (errors.COMMAND, errors.DATA, errors.CHECKPOINT, errors.NOT_FINITE,
                                         errors.OUT_OF_MEMORY, errors.DISK_FULL)),
])
def test_a_stop_does_not_count_a_failure_does_and_a_mistake_ends_the_job(
        manifest: dict[str, Any], code: int, conditions: list[str], expected: str) -> None:
    job = manifest['Job']['spec']
    pod = job['template']['spec']
    assert outcome(job['podFailurePolicy'], code, conditions) == expected
    assert pod['restartPolicy'] == 'Never', 'podFailurePolicy asks for it'
    assert job['backoffLimit'] > 2 * job['completions']
    assert job['podReplacementPolicy'] == 'Failed', 'the old pod may still write its checkpoint'
    for rule in job['podFailurePolicy']['rules']:
        assert rule.get('onExitCodes', {}).get('containerName', 'train') == pod['containers'][0]['name']


def test_a_pod_is_not_root_and_holds_no_secret(manifest: dict[str, Any]) -> None:
    pod = manifest['Job']['spec']['template']['spec']
    container = pod['containers'][0]
    assert pod['securityContext']['runAsNonRoot'] is True
    assert pod['securityContext']['runAsUser'] == int(only(r'--uid=(\d+)', dockerfile())) > 0
    assert pod['securityContext']['fsGroup'] == pod['securityContext']['runAsGroup']
    assert container['securityContext']['allowPrivilegeEscalation'] is False
    assert container['securityContext']['capabilities'] == {'drop': ['ALL']}
    assert container['securityContext']['readOnlyRootFilesystem'] is True
    assert pod['automountServiceAccountToken'] is False
    assert 'env' not in container, 'environment variables of a container can be read'
    assert [source.keys() for source in container['envFrom']] == [{'secretRef'}]
    assert 'Secret' not in manifest
    text = (LAUNCH / 'kubernetes.yaml').read_text(encoding='utf-8')
    assert not re.search(SECRET, text.replace('automountServiceAccountToken: false', ''))
    memory = {volume['name']: volume.get('emptyDir', {}).get('medium') for volume in pod['volumes']}
    at = {mount['mountPath']: mount['name'] for mount in container['volumeMounts']}
    assert memory[at['/dev/shm']] == 'Memory'
    claims = [volume['persistentVolumeClaim']['claimName'] for volume in pod['volumes'] if 'emptyDir' not in volume]
    assert claims == [manifest['PersistentVolumeClaim']['metadata']['name']]
    assert manifest['PersistentVolumeClaim']['spec']['accessModes'] == ['ReadWriteMany'], 'all pods mount it'


@pytest.mark.slow
def test_a_run_writes_only_to_what_a_pod_mounts(manifest: dict[str, Any], tiny_dataset: Path,
                                                tmp_path: Path) -> None:
    """The run is in a mount namespace of its own, in which the root is read-only; the volume is at /mnt."""
    container = manifest['Job']['spec']['template']['spec']['containers'][0]
    mounts = {mount['mountPath'] for mount in container['volumeMounts']}
    home = only(r'^ENV HOME=(\S+)', dockerfile())
    assert home in mounts
    tempfs = ' && '.join(f'mount -t tmpfs tmpfs {path}' for path in sorted(mounts - {'/volume'}))
    prepare = f'mount --bind {tmp_path} /mnt && mount -o remount,bind,ro / && {tempfs}'
    if ROOT.is_relative_to('/tmp') or shutil.which('unshare') is None or subprocess.run(
            ['unshare', '-m', 'sh', '-c', prepare], capture_output=True).returncode:
        pytest.skip('needs the right to mount, and a checkout outside of /tmp')
    shutil.copytree(tiny_dataset, tmp_path / 'corpus')
    command = [sys.executable, 'launch/torchrun.py', '--standalone', '--nproc_per_node=2', 'train.py', *TINY,
               '--dataset=/mnt/corpus', '--out_dir=/mnt/out', '--max_iters=2', '--lr_decay_iters=2']
    result = subprocess.run(['unshare', '-m', 'sh', '-c', f'{prepare} && ! touch {ROOT}/x && {shlex.join(command)}'],
                            cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'HOME': home}, timeout=PATIENT)
    assert result.returncode == 0, result.stderr[-3000:]
    assert checkpoint.load(tmp_path / 'out/ckpt.pt')['iter_num'] == 2
    assert (tmp_path / 'out/loss.png').exists()


@pytest.mark.slow
@pytest.mark.parametrize(('ends', 'expected'), [('sys.exit(75)', 75), ('os.kill(os.getpid(), 9)', 137)])
def test_launch_torchrun_exits_with_the_code_of_the_process_that_ended_first(
        tmp_path: Path, ends: str, expected: int) -> None:
    """And not with the code of the other one, which torchrun then kills, perhaps while it still saves."""
    (tmp_path / 'work.py').write_text(
        f"import os, sys, time\ntime.sleep(10000) if os.environ['RANK'] == '0' else {ends}", encoding='utf-8')
    command = [sys.executable, str(LAUNCH / 'torchrun.py'), '--standalone', '--nproc_per_node=2', 'work.py']
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=PATIENT).returncode == expected


class Pods:
    """Two machines with a process each, both of them this machine. A pod that ended is started again, as a Job
    would."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.folder, self.command, self.port = folder, command, free_port()
        self.pods: dict[int, subprocess.Popen[bytes]] = {}
        self.codes: list[tuple[int, int]] = []  # pod, exit code

    def start(self, pod: int) -> None:
        container = yaml_of('kubernetes.yaml')[2]['spec']['template']['spec']['containers'][0]
        arguments = [text for text in container['args'] if re.match('--(nnodes|rdzv|signals|shutdown)', text)]
        with open(self.folder / f'pod{pod}.log', 'ab') as log:
            self.pods[pod] = subprocess.Popen(
                [sys.executable, 'launch/torchrun.py', *arguments, '--nproc_per_node=1', f'--node_rank={pod}',
                 '--master_addr=localhost', f'--master_port={self.port}', *self.command],
                cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, 'PYTHONUNBUFFERED': '1'})

    def lose(self, pod: int) -> None:
        """Kill all processes of a pod, as if its node were gone."""
        session = self.pods[pod].pid
        listing = subprocess.run(['ps', '-e', '-o', 'pid=,sess='], capture_output=True, text=True, check=True).stdout
        for pid, its_session in (map(int, line.split()) for line in listing.splitlines()):
            if its_session == session:
                os.kill(pid, signal.SIGKILL)
        self.pods[pod].wait(PATIENT)

    def collect(self) -> list[int]:
        """Return the pods that have ended since the last call."""
        ended = [pod for pod, process in self.pods.items() if process.poll() is not None]
        self.codes += [(pod, self.pods.pop(pod).returncode) for pod in ended]
        return ended

    def end(self) -> None:
        for pod in list(self.pods):
            self.lose(pod)


@pytest.fixture
def pods(tmp_path: Path, tiny_dataset: Path) -> Iterator[Pods]:
    """Yield pods that train for so long that they are interrupted."""
    group = Pods(tmp_path, 'train.py', f'--dataset={tiny_dataset}', f'--out_dir={tmp_path / "out"}', *TINY,
                 '--eval_interval=100', '--max_iters=2000', '--lr_decay_iters=2000', '--init_from=auto')
    yield group
    group.end()


@pytest.mark.slow
def test_pods_meet_again_after_one_was_lost_and_a_stop_of_one_is_the_stop_of_all(pods: Pods, tmp_path: Path) -> None:
    for pod in (0, 1):
        pods.start(pod)
    wait_until((tmp_path / 'out/ckpt.pt').exists, 'a checkpoint')
    pods.lose(1)
    pods.collect()
    pods.start(1)  # at once: the other pod has hardly noticed
    wait_until(pods.collect, 'the end of the other pod')
    assert pods.codes == [(1, -signal.SIGKILL), (0, errors.PEER_LOST)]
    pods.start(0)
    log = tmp_path / 'pod0.log'
    wait_until(lambda: re.search(r'(?s)resuming at step.*\niter \d+0: ', log.read_text(encoding='utf-8')),
               'what both learn after they have met again')

    pods.pods[1].send_signal(signal.SIGTERM)  # its node is drained
    wait_until(lambda: pods.collect() and not pods.pods, 'the end of both')
    assert sorted(pods.codes[2:]) == [(0, errors.STOPPED), (1, errors.STOPPED)]
    status = json.loads((tmp_path / 'out/status.json').read_text(encoding='utf-8'))
    stopped = checkpoint.load(tmp_path / 'out/ckpt.pt')['iter_num']
    assert status['state'] == 'stopped'
    assert status['message'].startswith(f'stopped before step {stopped} of 2000')


# ------------------------------------------------------------------------------------------------
# Docker


def dockerfile() -> str:
    """Return the instructions of the Dockerfile, one in a line."""
    lines = (LAUNCH / 'Dockerfile').read_text(encoding='utf-8').splitlines()
    return '\n'.join(line for line in lines if not line.startswith('#')).replace('\\\n', ' ')


def copies() -> Iterator[tuple[list[str], str]]:
    """Yield the sources and the target of each COPY."""
    for line in re.findall(r'^(?:COPY|ADD) (.*)$', dockerfile(), re.MULTILINE):
        *sources, target = shlex.split(line)
        yield sources, target


def is_sent(path: str) -> bool:
    """Return whether .dockerignore lets the builder see a path: the last pattern that fits it, or a folder of it,
    decides."""
    parts = path.split('/')
    heads = ['/'.join(parts[:i + 1]) for i in range(len(parts))]
    sent = True
    for line in (ROOT / '.dockerignore').read_text(encoding='utf-8').splitlines():
        pattern = line.removeprefix('!')
        if line and not line.startswith('#') and any(
                head.count('/') == pattern.count('/') and fnmatch.fnmatchcase(head, pattern) for head in heads):
            sent = line.startswith('!')
    return sent


def sent_files(source: str) -> list[Path]:
    """Return the files that COPY finds under a name, a glob or a folder, among those that the builder sees."""
    found = [*ROOT.glob(source), *ROOT.glob(f'{source}/**/*')]
    return [path for path in found if path.is_file() and is_sent(path.relative_to(ROOT).as_posix())]


def test_the_image_holds_files_that_exist_and_no_secret() -> None:
    for sources, _ in copies():
        for source in sources:
            assert sent_files(source), f'{source} is missing, or kept out by .dockerignore'
    held = [file for sources, _ in copies() for source in sources for file in sent_files(source)]
    assert all(file.suffix in ('.py', '.html') or file.name.startswith('requirements') for file in held)
    assert {*ROOT.glob('plaingpt/**/*.py'), *ROOT.glob('plaingpt/**/*.html')} <= set(held)
    rest = re.sub(r'^COPY.*', '', dockerfile(), flags=re.MULTILINE)  # it names files
    assert not re.search(r'SECRET|TOKEN|PASSWORD|API_KEY|CREDENTIAL|\bAWS_|netrc|wandb login', rest, re.IGNORECASE)
    assert not re.search(r'curl|wget|\| *(ba)?sh\b', dockerfile()), 'nothing runs that was just downloaded'


@pytest.mark.parametrize('path', [
    '.git/config', '.env', 'secrets.env', 'config/secrets.env', 'credentials', '.aws/credentials', 'wandbcreds',
    'KEY.pem', '.netrc', 'out/ckpt.pt', 'out-gpt2/ckpt.pt', 'data/openwebtext/train.bin', 'data/stdlib/val.bin',
    'wandb/run.log', '.venv/bin/python', 'launch/kubernetes.yaml',
])
def test_a_file_that_the_image_must_not_hold_is_not_sent_to_the_builder(path: str) -> None:
    assert not is_sent(path)


def test_the_image_has_a_fixed_base_and_its_process_is_python_and_not_root() -> None:
    text = dockerfile()
    assert re.search(r'^ARG BASE=python:3\.1[1-4]\.\d+-[\w-]+$', text, re.MULTILINE), 'a version, not a moving name'
    assert re.findall(r'^FROM (.*)$', text, re.MULTILINE) == ['${BASE}'], 'a digest can be given'
    users = re.findall(r'^USER (.*)$', text, re.MULTILINE)
    assert users and users[-1] not in ('root', '0')
    assert re.search(rf'useradd .*{users[-1]}', text)
    assert text.index('RUN pip install') < text.index(f'USER {users[-1]}'), 'the run cannot change what is installed'
    entry = re.findall(r'^ENTRYPOINT (.*)$', text, re.MULTILINE)
    assert [json.loads(words) for words in entry] == [['python']], 'a list: signals reach Python, not a shell'
    assert '-r requirements.txt' in text
    assert {'requirements-core.txt', 'requirements.txt'} <= {source for sources, _ in copies() for source in sources}


@pytest.mark.slow
def test_what_the_image_holds_is_enough_to_prepare_and_to_train(tmp_path: Path) -> None:
    """Every file is where COPY puts it, and none is missing: the command that the image runs by default, a preparation,
    and launch/torchrun.py import all of them."""
    for sources, target in copies():
        for source in sources:
            for file in sent_files(source):
                inner = file.relative_to(ROOT / source if (ROOT / source).is_dir() else file.parent)
                (tmp_path / target / inner).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / target / inner)
    modules = ', '.join(sorted(path.stem for path in tmp_path.glob('*.py')))
    for command in (json.loads(only(r'^CMD (.*)$', dockerfile())), ['-c', f'import {modules}'],
                    ['data/openwebtext/prepare.py', f'--input={ROOT}/tests/data/documents.jsonl', '--to_dir=volume',
                     '--tokenizer=byte', '--val_fraction=0.1'],
                    ['launch/torchrun.py', '--standalone', 'train.py', 'config/train_gpt2.py', '--learning_rte=1']):
        result = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True,
                                encoding='utf-8', timeout=PATIENT)
        expected = errors.COMMAND if '--learning_rte=1' in command else errors.DONE
        assert result.returncode == expected, result.stderr
        assert 'ModuleNotFoundError' not in result.stderr
