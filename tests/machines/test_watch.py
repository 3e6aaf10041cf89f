"""A run and the faults from outside: signals, kills, processes that die or hang, numbers that are not finite, too
little memory, full disks. Real signals reach real processes; a number that is broken on purpose is in a real run."""
import errno
import json
import math
import os
import pty
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from model import GPT, GPTConfig
from plaingpt import errors, files
from plaingpt.corpus import batches
from plaingpt.corpus.batches import Part
from plaingpt.init_from import open_model
from plaingpt.machines.stop import AGAIN
from plaingpt.run import checkpoint
from plaingpt.run.log import Log
from tests.comparing import give, learner_of
from tests.waiting import PATIENT, wait_until

ROOT = Path(__file__).parents[2]
Start = Callable[..., subprocess.Popen[str]]
TINY: dict[str, Any] = {
    'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'block_size': 16, 'batch_size': 4, 'gradient_accumulation_steps': 2,
    'max_iters': 12, 'lr_decay_iters': 12, 'warmup_iters': 2, 'learning_rate': 1e-2, 'min_lr': 1e-3, 'dropout': 0.1,
    'eval_interval': 4, 'eval_iters': 2, 'sample_interval': 0, 'device': 'cpu', 'init_from': 'auto',
}
TRAIN = 'import sys, train; train.main(sys.argv[1:])'
# each step takes a tenth of a second, so that a test has time to see one
SLOWLY = """import os, sys, time, train
from plaingpt import errors
parts_of = train.parts_of
def slowly(*arguments):
    time.sleep(0.1)
    yield from parts_of(*arguments)
train.parts_of = slowly
"""
RUN = 'errors.run(train.main)'
ALONE = 'import train; from plaingpt import errors; ' + RUN
JOINING = """import train
from plaingpt import errors
from plaingpt.machines import meeting
join = meeting.join
def joining(*arguments):
    print('joining', flush=True)
    return join(*arguments)
meeting.join = joining
"""


def arguments(out_dir: Path, dataset: Path, **changes: Any) -> list[str]:
    return [f'--{name}={value}' for name, value in (TINY | {'out_dir': out_dir, 'dataset': dataset} | changes).items()]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a process and return at once: start('-c', CODE, *arguments, name=value for its environment). The process is
    killed when the test ends, with all that it has started."""
    running: list[subprocess.Popen[str]] = []

    def start(*command: str, **environment: str) -> subprocess.Popen[str]:
        running.append(subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env={**os.environ, 'PYTHONUNBUFFERED': '1', **environment},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding='utf-8',
            start_new_session=True))
        return running[-1]

    yield start
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None, 'stdout is a pipe'
        process.stdout.close()


def wait_for(process: subprocess.Popen[str], word: str) -> str:
    """Return what a process prints up to the line with this word."""
    lines = []
    assert process.stdout is not None, 'stdout is a pipe'
    for line in process.stdout:
        lines.append(line)
        if word in line:
            return ''.join(lines)
    raise AssertionError(f'{word!r} never came:\n{"".join(lines)[-3000:]}')


def end_of(process: subprocess.Popen[str]) -> str:
    """Return what a process prints until it ends by itself."""
    return process.communicate(timeout=PATIENT)[0]


def status_of(out_dir: Path) -> dict[str, Any]:
    status: dict[str, Any] = json.loads((out_dir / 'status.json').read_text(encoding='utf-8'))
    return status


def rows_of(out_dir: Path) -> list[dict[str, Any]]:
    lines = (out_dir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    return [{name: row.get(name) for name in ('step', 'loss', 'val_loss', 'lr', 'grad_norm', 'skipped')}
            for row in map(json.loads, lines)]


def assert_same_run(one: Path, other: Path) -> None:
    """Assert that two runs have the same weights, optimizer state and rows, bit for bit."""
    first, second = checkpoint.load(one / 'ckpt.pt'), checkpoint.load(other / 'ckpt.pt')
    assert first['iter_num'] == second['iter_num']
    for name, weight in first['model'].items():
        assert torch.equal(weight, second['model'][name]), name
    for number, moments in first['optimizer']['state'].items():
        for kind, tensor in moments.items():
            assert torch.equal(tensor, second['optimizer']['state'][number][kind]), (number, kind)
    assert rows_of(one) == rows_of(other)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return str(free.getsockname()[1])


def start_two(start: Start, code: str, out_dir: Path, dataset: Path, **changes: Any) -> list[subprocess.Popen[str]]:
    """Start a run of two processes without torchrun, which would end one for the other."""
    port = free_port()
    return [start('-c', code, *arguments(out_dir, dataset, **changes), RANK=str(rank), LOCAL_RANK=str(rank),
                  WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port) for rank in range(2)]


def freezing(rank: int, out_dir: Path) -> str:
    """Return code with which the process of this rank halts itself (SIGSTOP) in a step after the first checkpoint."""
    is_time = f"os.environ['RANK'] == '{rank}' and os.path.exists('{out_dir}/ckpt.pt')"
    return SLOWLY.replace('time.sleep(0.1)', f'if {is_time}: os.kill(os.getpid(), 19)')


def is_halted(pid: int) -> bool:
    """Return whether SIGSTOP has halted a process."""
    return subprocess.run(['ps', '-o', 'stat=', '-p', str(pid)], capture_output=True, text=True).stdout.startswith('T')


# ------------------------------------------------------------------------------------------------
# Signals and time


@pytest.mark.slow
def test_a_signal_ends_a_run_after_its_step_and_the_same_command_continues(
        start: Start, tmp_path: Path, tiny_dataset: Path) -> None:
    """All signals arrive one after the other; the run then equals one that got none."""
    stopped, long = tmp_path / 'stopped', {'max_iters': 200, 'lr_decay_iters': 200, 'eval_interval': 100}
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGINT, signal.SIGQUIT):
        process = start('-c', SLOWLY + RUN, *arguments(stopped, tiny_dataset, **long))
        wait_for(process, 'iter ')
        process.send_signal(number)
        printed = end_of(process)
        assert process.returncode == errors.STOPPED, printed
        step = checkpoint.load(stopped / 'ckpt.pt')['iter_num']
        assert f'stopped before step {step} of 200 by {number.name}' in printed
        assert 'Traceback' not in printed
        status = status_of(stopped)
        assert (status['state'], status['exit_code'], status['step']) == ('stopped', 75, step - 1)
    train.main(arguments(stopped, tiny_dataset, **long))
    train.main(arguments(tmp_path / 'whole', tiny_dataset, **long))
    assert status_of(stopped)['state'] == 'done'
    assert_same_run(stopped, tmp_path / 'whole')


@pytest.mark.slow
def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(start: Start, tmp_path: Path,
                                                                 tiny_dataset: Path) -> None:
    endless = ('import time; from plaingpt import metrics; read_batch = metrics.read_batch\n'
               'metrics.read_batch = lambda *all: (time.sleep(0.3), print("reading"), read_batch(*all))[-1]\n')
    process = start('-c', 'import train; from plaingpt import errors\n' + endless + RUN,
                    *arguments(tmp_path, tiny_dataset, eval_iters=2000, eval_interval=1))
    wait_for(process, 'reading')
    process.terminate()
    assert 'stopped before step 0 of 12 by SIGTERM' in end_of(process)
    assert process.returncode == errors.STOPPED
    train.main(arguments(tmp_path, tiny_dataset, eval_interval=12))
    assert checkpoint.load(tmp_path / 'ckpt.pt')['iter_num'] == 12


@pytest.mark.slow
def test_a_second_interrupt_leaves_at_once(start: Start, tmp_path: Path, tiny_dataset: Path) -> None:
    asleep = SLOWLY.replace('time.sleep(0.1)', 'print("asleep", flush=True); time.sleep(10000)')
    process = start('-c', asleep + RUN, *arguments(tmp_path, tiny_dataset))
    wait_for(process, 'asleep')
    process.send_signal(signal.SIGINT)
    wait_for(process, 'saving after this step')
    time.sleep(AGAIN + 0.2)
    process.send_signal(signal.SIGINT)
    end_of(process)
    assert process.returncode == errors.INTERRUPTED


@pytest.mark.slow
def test_signals_reach_a_process_that_waits_for_others(start: Start, tmp_path: Path, tiny_dataset: Path) -> None:
    """Python's own handlers would have to wait as long: for peers that never come, or for one that is frozen in a
    step."""
    for number, code in [(signal.SIGTERM, errors.STOPPED), (signal.SIGINT, errors.INTERRUPTED)]:
        alone = start('-c', JOINING + RUN, *arguments(tmp_path / 'alone', tiny_dataset),
                      RANK='0', LOCAL_RANK='0', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port())
        wait_for(alone, 'joining')
        time.sleep(1)  # it may wait in C++ by now
        alone.send_signal(number)
        end_of(alone)
        assert alone.returncode == code
    both = start_two(start, freezing(1, tmp_path / 'frozen') + RUN, tmp_path / 'frozen', tiny_dataset, eval_interval=2)
    wait_until(lambda: is_halted(both[1].pid), 'the halt of the other')
    time.sleep(1)  # it may wait for the other by now
    both[0].send_signal(signal.SIGINT)
    wait_for(both[0], 'saving after this step')
    time.sleep(AGAIN + 0.2)
    both[0].send_signal(signal.SIGINT)
    assert both[0].wait(PATIENT) == errors.INTERRUPTED


@pytest.mark.slow
def test_a_run_whose_output_is_closed_saves_and_ends(start: Start, tmp_path: Path, tiny_dataset: Path) -> None:
    """With `python train.py | tee log`, Ctrl-C ends tee as well, and the output no longer has a reader."""
    process = start('-c', SLOWLY + RUN, *arguments(tmp_path, tiny_dataset, max_iters=1000))
    wait_for(process, 'iter ')
    assert process.stdout is not None, 'stdout is a pipe'
    process.stdout.close()
    assert process.wait(PATIENT) == errors.STOPPED
    assert checkpoint.load(tmp_path / 'ckpt.pt')['iter_num'] > 0
    assert status_of(tmp_path)['state'] == 'stopped'


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_saves_and_ends_unless_nohup_protects_it(
        tmp_path: Path, tiny_dataset: Path) -> None:
    """In a real terminal, the session gets SIGHUP, and the output no longer has a reader."""
    codes = {}
    for name, command in (('hung up', []), ('nohup', ['nohup'])):
        controller, terminal = pty.openpty()
        process = subprocess.Popen(
            [*command, sys.executable, '-c', SLOWLY + RUN, *arguments(tmp_path / name, tiny_dataset, max_iters=40)],
            cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT)}, preexec_fn=partial(os.login_tty, terminal))
        os.close(terminal)
        wait_until((tmp_path / name / 'ckpt.pt').exists, 'a checkpoint')
        os.close(controller)
        codes[name] = process.wait(PATIENT)
    assert codes == {'hung up': errors.STOPPED, 'nohup': errors.DONE}
    assert status_of(tmp_path / 'hung up')['state'] == 'stopped'
    assert checkpoint.load(tmp_path / 'nohup/ckpt.pt')['iter_num'] == 40


@pytest.mark.usefixtures('no_pictures')
def test_a_run_ends_when_its_time_is_up(tmp_path: Path, tiny_dataset: Path) -> None:
    with pytest.raises(errors.UserError, match='max_hours') as caught:
        train.main(arguments(tmp_path, tiny_dataset, max_hours=1e-9))
    assert caught.value.code == errors.STOPPED
    assert checkpoint.load(tmp_path / 'ckpt.pt')['iter_num'] == 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, 'the handlers are those from before'


@pytest.mark.slow
def test_torchrun_passes_a_signal_on_and_both_processes_stop_at_the_same_step(start: Start, tmp_path: Path,
                                                                             tiny_dataset: Path) -> None:
    script = tmp_path / 'slowly.py'
    script.write_text(f'import sys\nsys.path.insert(0, {str(ROOT)!r})\n{SLOWLY}{RUN}', encoding='utf-8')
    process = start('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                    '--signals-to-handle=SIGTERM,SIGINT,SIGUSR1', str(script),
                    *arguments(tmp_path / 'run', tiny_dataset, max_iters=1000))
    wait_for(process, 'iter ')
    process.send_signal(signal.SIGUSR1)
    printed = end_of(process)
    assert process.returncode == 1, 'torchrun makes 1 of every code'
    assert len(set(re.findall(r'stopped before step (\d+)', printed))) == 1
    assert printed.count('stopped before step') == 2
    assert status_of(tmp_path / 'run')['exit_code'] == errors.STOPPED


@pytest.mark.slow
def test_torchrun_starts_a_run_again_that_has_lost_a_process(start: Start, tmp_path: Path, tiny_dataset: Path) -> None:
    """It does so within one torchrun, whose store outlives the first start."""
    script = tmp_path / 'dying.py'
    is_first = "os.environ['RANK'] + os.environ['TORCHELASTIC_RESTART_COUNT'] == '10'"  # process 1, before a restart
    is_time = f"{is_first} and os.path.exists('{tmp_path}/run/ckpt.pt')"
    code = SLOWLY.replace('time.sleep(0.1)', f'if {is_time}: os.kill(os.getpid(), 9)')
    script.write_text(f'import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}{RUN}', encoding='utf-8')
    long = {'max_iters': 12, 'lr_decay_iters': 12, 'eval_interval': 4}
    process = start('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max_restarts=1',
                    str(script), *arguments(tmp_path / 'run', tiny_dataset, **long))
    printed = end_of(process)
    assert process.returncode == 0, printed[-3000:]
    assert 'resuming at step 4' in printed
    assert status_of(tmp_path / 'run')['state'] == 'done'


@pytest.mark.slow
def test_a_stop_under_torchrun_waits_for_a_slow_disk(start: Start, tmp_path: Path, tiny_dataset: Path) -> None:
    """max_hours ends on all processes, in some step; the main process writes for longer than its peers may be silent,
    and torchrun would end it as soon as another process had left."""
    script = tmp_path / 'slow_disk.py'
    script.write_text(f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import os, time, train
from plaingpt import errors
from plaingpt.machines.stop import Stop
fsync, is_asked, calls = os.fsync, Stop.is_asked, []
os.fsync = lambda file: (time.sleep(12 if 'ckpt' in os.readlink(f'/proc/self/fd/{{file}}') else 0), fsync(file))
def is_asked_later(self):
    calls.append(0)  # at each step, on each process
    self.end = 0.0 if len(calls) > 20 else self.end
    return is_asked(self)
Stop.is_asked = is_asked_later
{RUN}""", encoding='utf-8')
    process = start('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(script),
                    *arguments(tmp_path / 'run', tiny_dataset, max_iters=100_000, eval_interval=100_000, timeout=4,
                               max_hours=1000))
    printed = end_of(process)
    assert checkpoint.load(tmp_path / 'run/ckpt.pt')['iter_num'] > 0, printed[-3000:]
    assert status_of(tmp_path / 'run')['exit_code'] == errors.STOPPED
    assert not (tmp_path / 'run/ckpt.new.pt').exists()


# ------------------------------------------------------------------------------------------------
# Lost processes


def hang(start: Start, tmp_path: Path, dataset: Path, what: str,
         place: str = 'set_rates') -> tuple[list[subprocess.Popen[str]], list[str]]:
    """Run two processes; the second does `what` in its third step, in this function of train.py, or, in the thread that
    reads ahead, for a step soon after it. Return both, and what the first prints."""
    code = f"""import os, signal, sys, time, train
from plaingpt import errors
do, calls = train.{place}, 0
def halting(*arguments):
    global calls
    calls += 1
    if calls == {3 + batches.AHEAD if place == 'parts_of' else 3} and os.environ['RANK'] == '1':
        {what}
    return do(*arguments)
train.{place} = halting
"""
    both = start_two(start, code + RUN, tmp_path, dataset, timeout=6, start_timeout=PATIENT)
    return both, [end_of(both[0])]


@pytest.mark.slow
@pytest.mark.parametrize(('what', 'place', 'word'), [
    ('os.kill(os.getpid(), signal.SIGKILL)', 'set_rates', 'is silent'),
    ('os.kill(os.getpid(), signal.SIGSTOP)', 'set_rates', 'is silent'),
    ('time.sleep(10000)', 'set_rates', 'hangs'),
    ('time.sleep(10000)', 'parts_of', 'hangs'),  # such as a file system that does not answer
])
def test_a_process_that_is_lost_is_named_and_the_others_end(start: Start, tmp_path: Path, tiny_dataset: Path, what: str,
                                                            place: str, word: str) -> None:
    both, (printed,) = hang(start, tmp_path, tiny_dataset, what, place)
    assert both[0].returncode == errors.PEER_LOST, printed
    assert re.search(rf'process 1 \(pid {both[1].pid} on .*\), at step \d+, {word}', printed), printed
    assert status_of(tmp_path)['exit_code'] == errors.PEER_LOST
    assert 'process 1' in status_of(tmp_path)['message']
    assert 'Traceback' not in printed and 'frame #' not in printed


@pytest.mark.slow
@pytest.mark.parametrize(('where', 'strategy'), [('forward', 'ddp'), ('backward', 'ddp'), ('forward', 'fsdp'),
                                                 ('backward', 'fsdp')])
def test_a_process_that_hangs_in_the_model_is_named(start: Start, tmp_path: Path, tiny_dataset: Path, where: str,
                                                    strategy: str) -> None:
    code = f"""import model, os, time, torch, train
from plaingpt import errors
calls = 0
def sleep(*_):
    global calls
    calls += 1
    if calls == 12 and os.environ['RANK'] == '1':  # after the first step
        time.sleep(10000)
forward = model.MLP.forward
def hanging(self, x):
    y = forward(self, x)
    if '{where}' == 'forward':
        sleep()
    elif y.requires_grad:
        y.register_hook(sleep)
    return y
model.MLP.forward = hanging
"""
    both = start_two(start, code + RUN, tmp_path, tiny_dataset, timeout=6, start_timeout=PATIENT, eval_interval=100,
                     gradient_accumulation_steps=4, strategy=strategy)
    printed = end_of(both[0])
    assert both[0].returncode == errors.PEER_LOST, printed
    assert re.search(rf'process 1 \(pid {both[1].pid} on .*\), at step \d+, hangs', printed), printed


@pytest.mark.slow
@pytest.mark.parametrize(('error', 'codes', 'words'), [
    ('raise ValueError("planted")', [errors.PEER_LOST, 1], 'planted'),
    ('raise RuntimeError("cannot allocate: not enough memory")', [errors.OUT_OF_MEMORY] * 2, '--batch_size=2'),
])
def test_the_others_repeat_what_ended_a_process(
        start: Start, tmp_path: Path, tiny_dataset: Path, error: str, codes: list[int], words: str) -> None:
    both, (printed,) = hang(start, tmp_path, tiny_dataset, error)
    end_of(both[1])
    assert [process.returncode for process in both] == codes, printed
    assert re.search(rf'process 1 \(pid {both[1].pid} on .*\): .*', printed), printed
    assert words in printed
    assert status_of(tmp_path)['exit_code'] == codes[0]
    assert words in status_of(tmp_path)['message']


@pytest.mark.slow
def test_a_frozen_process_that_keeps_the_store_is_noticed(start: Start, tmp_path: Path, tiny_dataset: Path) -> None:
    both = start_two(start, freezing(0, tmp_path / 'frozen') + RUN, tmp_path / 'frozen', tiny_dataset, eval_interval=2,
                     timeout=6, start_timeout=PATIENT)
    printed = end_of(both[1])
    assert both[1].returncode == errors.PEER_LOST, printed
    assert 'process 0, at 127.0.0.1, is silent' in printed


@pytest.mark.slow
def test_two_agents_train_as_one_and_a_job_that_lost_an_agent_ends_and_continues(
        start: Start, tmp_path: Path, tiny_dataset: Path) -> None:
    """Two torchruns find each other by c10d rendezvous. The one that does not keep the store is killed."""
    script = tmp_path / 'slowly.py'
    script.write_text(f'import sys\nsys.path.insert(0, {str(ROOT)!r})\n{SLOWLY}{RUN}', encoding='utf-8')

    def launch(**changes: Any) -> list[subprocess.Popen[str]]:
        endpoint = f'127.0.0.1:{free_port()}'
        agents = []
        for host in ('true', 'false'):
            rendezvous = ['--nnodes=2', '--nproc_per_node=1', '--rdzv_backend=c10d', f'--rdzv_endpoint={endpoint}',
                          f'--rdzv_conf=is_host={host}', '--rdzv_id=test', '--local_addr=127.0.0.1']
            agents.append(start('-m', 'torch.distributed.run', *rendezvous, str(script), *arguments(
                tmp_path / 'run', tiny_dataset, timeout=6, start_timeout=PATIENT, **changes)))
        return agents

    agents = launch(max_iters=1000)
    printed: list[str] = []
    readers = [threading.Thread(target=lambda agent=agent: printed.append(agent.stdout.read())) for agent in agents]
    for reader in readers:
        reader.start()
    wait_until((tmp_path / 'run/ckpt.pt').exists, 'a checkpoint')
    agents[1].kill()  # only the agent: its worker must notice
    for reader in readers:
        reader.join(PATIENT)
    assert agents[0].wait(PATIENT) == 1
    text = '\n'.join(printed)
    assert re.search(r'torchrun, which started process \d \(pid \d+ on .*\), has died', text), text[-3000:]
    step = checkpoint.load(tmp_path / 'run/ckpt.pt')['iter_num']
    assert step > 0
    again = launch(max_iters=step + 2)
    outputs = [end_of(agent) for agent in again]
    assert [agent.returncode for agent in again] == [0, 0], outputs
    assert f'resuming at step {step}' in ''.join(outputs)
    assert '2 processes' in ''.join(outputs)


@pytest.mark.slow
def test_a_process_that_has_finished_is_not_lost_while_the_main_one_plots_and_saves(start: Start, tmp_path: Path,
                                                                                   tiny_dataset: Path) -> None:
    """The last picture and the last checkpoint take longer than a process may be silent."""
    slow_end = """import os, time, train
from plaingpt import errors
from plaingpt.run.log import Log
fsync = os.fsync
os.fsync = lambda file: (time.sleep(9 if 'ckpt' in os.readlink(f'/proc/self/fd/{file}') else 0), fsync(file))
Log.plot = lambda log: time.sleep(9 if log.folder else 0)
"""
    both = start_two(start, slow_end + RUN, tmp_path, tiny_dataset, eval_interval=12, timeout=3)
    printed = [end_of(process) for process in both]
    assert [process.returncode for process in both] == [errors.DONE] * 2, printed
    assert status_of(tmp_path)['state'] == 'done'


@pytest.mark.slow
def test_of_two_runs_in_one_folder_the_second_waits_for_the_first(start: Start, tmp_path: Path,
                                                                  tiny_dataset: Path) -> None:
    """A requeued job finds its predecessor still alive, with two processes and with one; then the predecessor is
    killed."""
    shared, long = tmp_path / 'shared', {'max_iters': 60, 'lr_decay_iters': 60, 'eval_interval': 20}
    first = start('-c', SLOWLY.replace('0.1', '2 if os.path.exists(sys.argv[1].partition("=")[2] + "/ckpt.pt") else 0')
                  + RUN, f'--out_dir={shared}', *arguments(shared, tiny_dataset, **long))
    wait_for(first, 'iter 21')
    both = start_two(start, ALONE, shared, tiny_dataset, start_timeout=3, **long)
    printed = [end_of(process) for process in both]
    assert [process.returncode for process in both] == [errors.PEER_LOST] * 2, printed
    assert f'{shared} belongs to process {first.pid} on ' in printed[0]
    new = start('-c', ALONE, *arguments(shared, tiny_dataset, init_from='scratch', start_timeout=3, **long))
    assert ': waiting up to 3 s for it to end' in end_of(new) and new.returncode == errors.PEER_LOST
    assert first.poll() is None, 'the first run continues'
    third = start('-c', ALONE, *arguments(shared, tiny_dataset, **long))
    wait_for(third, f'belongs to process {first.pid}')
    first.kill()
    assert 'resuming at step 20' in end_of(third)
    assert third.returncode == errors.DONE
    train.main(arguments(tmp_path / 'whole', tiny_dataset, **long))
    assert_same_run(shared, tmp_path / 'whole')


# ------------------------------------------------------------------------------------------------
# Numbers that are not finite


def break_steps(monkeypatch: pytest.MonkeyPatch, broken: Callable[[int], bool], number: float) -> None:
    """Multiply the loss of these steps by `number`."""
    calls, parts_of = [-1], batches.parts_of  # the first call is that of step 0

    def breaking(*rest: Any) -> Iterator[Part]:
        calls[0] += 1
        for part in parts_of(*rest):
            yield part._replace(share=part.share * number) if broken(calls[0]) else part

    monkeypatch.setattr('train.parts_of', breaking)


@pytest.mark.usefixtures('no_pictures')
@pytest.mark.parametrize('number', [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_and_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                          tiny_dataset: Path, number: float) -> None:
    updates: list[int] = []
    make_optimizer = train.make_optimizer

    def watched(*rest: Any) -> torch.optim.Optimizer:
        optimizer = make_optimizer(*rest)
        optimizer.register_step_post_hook(lambda *_: updates.append(1))
        return optimizer

    monkeypatch.setattr(train, 'make_optimizer', watched)
    break_steps(monkeypatch, lambda step: step == 5, number)
    train.main(arguments(tmp_path, tiny_dataset))
    rows = rows_of(tmp_path)
    assert [row['skipped'] for row in rows] == [0] * 5 + [1] * 7 + [None]
    assert rows[5]['loss'] is None
    assert all(row['loss'] > 0 for row in rows[:5] + rows[6:12])
    assert sum(updates) == 11
    state = checkpoint.load(tmp_path / 'ckpt.pt')
    assert state['skipped'] == 1
    assert all(moments['step'] == 11 for moments in state['optimizer']['state'].values())
    assert all(weight.isfinite().all() for weight in state['model'].values())


@pytest.mark.usefixtures('no_pictures')
def test_ten_steps_in_a_row_that_are_not_finite_end_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                            tiny_dataset: Path) -> None:
    train.main(arguments(tmp_path, tiny_dataset, max_iters=4))
    before = (tmp_path / 'ckpt.pt').read_bytes()
    break_steps(monkeypatch, lambda step: True, math.nan)
    with pytest.raises(errors.UserError, match='10 steps in a row') as caught:
        train.main(arguments(tmp_path, tiny_dataset, max_iters=100, eval_interval=50))
    assert caught.value.code == errors.NOT_FINITE
    assert (tmp_path / 'ckpt.pt').read_bytes() == before
    assert (status_of(tmp_path)['exit_code'], status_of(tmp_path)['step']) == (errors.NOT_FINITE, 12)


@pytest.mark.usefixtures('no_pictures')
def test_the_text_on_which_the_loss_is_not_finite_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                           tiny_dataset: Path, tiny_text: str) -> None:
    """One position has an embedding whose square overflows, so every window has a loss that is not finite."""
    train.main(arguments(tmp_path, tiny_dataset, max_iters=4))
    state = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    state['model']['transformer.wpe.weight'][3, ::2] = 1e30
    torch.save(state, tmp_path / 'ckpt.pt')
    with pytest.raises(errors.UserError, match='10 steps in a row') as caught:
        train.main(arguments(tmp_path, tiny_dataset, max_iters=100, eval_interval=50))
    shown = re.search(r'no finite loss: (.*)$', str(caught.value), re.MULTILINE)
    assert shown is not None, str(caught.value)
    assert shown[1][1:-1].encode().decode('unicode_escape') in tiny_text


@pytest.mark.slow
@pytest.mark.parametrize('strategy', ['ddp', 'fsdp'])
def test_an_infinite_loss_on_one_of_two_processes_skips_the_step_on_both(start: Start, tmp_path: Path,
                                                                        tiny_dataset: Path, strategy: str) -> None:
    code = """import math, os, train
from plaingpt import errors
calls, parts_of = [-1], train.parts_of
def breaking(*rest):
    calls[0] += 1
    for part in parts_of(*rest):
        yield part._replace(share=math.inf) if calls[0] == 5 and os.environ['RANK'] == '1' else part
train.parts_of = breaking
"""
    both = start_two(start, code + RUN, tmp_path, tiny_dataset, strategy=strategy)
    printed = [end_of(process) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert 'step 5 is skipped: loss inf' in printed[0]
    assert [row['skipped'] for row in rows_of(tmp_path)] == [0] * 5 + [1] * 7 + [None]
    state = checkpoint.load(tmp_path / 'ckpt.pt')
    assert all(moments['step'] == 11 for moments in state['optimizer']['state'].values())
    assert all(weight.isfinite().all() for weight in state['model'].values())


# ------------------------------------------------------------------------------------------------
# Memory and disk


@pytest.mark.slow
def test_a_batch_that_is_too_large_is_answered_with_the_settings_that_fit(tmp_path: Path, tiny_dataset: Path) -> None:
    limit = 8 << 30  # bytes of address space; torch itself takes a part of it

    def with_limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    result = subprocess.run(
        [sys.executable, 'train.py', *arguments(tmp_path, tiny_dataset, batch_size=1_000_000, n_embd=64,
                                                gradient_accumulation_steps=3, eval_iters=1, eval_interval=1000)],
        cwd=ROOT, preexec_fn=with_limit, capture_output=True, text=True, timeout=PATIENT, check=False)
    assert result.returncode == errors.OUT_OF_MEMORY, result.stdout[-2000:] + result.stderr[-2000:]
    assert '--batch_size=500000 --gradient_accumulation_steps=6' in result.stderr
    assert len(result.stderr.splitlines()) <= 3
    assert status_of(tmp_path)['exit_code'] == errors.OUT_OF_MEMORY


@pytest.mark.parametrize(('batch_size', 'accumulation', 'total', 'advice'), [
    (12, 40, 0, '--batch_size=6 --gradient_accumulation_steps=80'),
    (5, 4, 0, '--batch_size=2 --gradient_accumulation_steps=10'),
    (7, 3, 0, '--batch_size=3 --gradient_accumulation_steps=7'), (12, 40, 491520, '--batch_size=6'),
    (1, 40, 0, '--activation_checkpointing=True'),
])
def test_the_advice_keeps_the_tokens_of_a_step(batch_size: int, accumulation: int, total: int, advice: str) -> None:
    give(train, batch_size=batch_size, gradient_accumulation_steps=accumulation, total_batch_size=total)
    said = train.less_memory()
    assert said.startswith(advice)
    if batch_size > 1 and not total:
        new = dict(re.findall(r'--(\w+)=(\d+)', said))
        assert int(new['batch_size']) * int(new['gradient_accumulation_steps']) == batch_size * accumulation


@pytest.mark.parametrize(('vocab_size', 'n_layer', 'recomputes', 'advice'), [
    (20_000, 1, False, 4),  # 16 windows have their logits whole, which takes more than those of 32 in parts
    (20_000, 60, False, 16),  # the blocks' numbers count for more
    (20_000, 60, True, 4),  # but not if they are computed again
    (100, 1, False, 16)])
def test_the_advice_never_needs_more_memory(vocab_size: int, n_layer: int, recomputes: bool, advice: int) -> None:
    give(train, batch_size=32, gradient_accumulation_steps=2, total_batch_size=0, activation_checkpointing=recomputes)
    model = GPT(GPTConfig(128, vocab_size, n_layer, 4, 64))
    learner = learner_of(model, train.make_optimizer(model))
    said = train.less_memory(learner)
    assert said.startswith(f'--batch_size={advice} --gradient_accumulation_steps={64 // advice},')
    assert train.bytes_of(advice, learner) < train.bytes_of(32, learner)


@pytest.mark.usefixtures('no_pictures')
def test_a_run_that_would_fill_the_disk_does_not_begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                       tiny_dataset: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage._replace(free=100_000))
    with pytest.raises(errors.UserError, match=r'needs [\d,]+ bytes .*, and there is room for 100,000') as caught:
        train.main(arguments(tmp_path / 'run', tiny_dataset))
    assert caught.value.code == errors.DISK_FULL
    assert not (tmp_path / 'run/metrics.jsonl').exists()


@pytest.mark.usefixtures('no_pictures')
def test_training_continues_while_a_checkpoint_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                          tiny_dataset: Path) -> None:
    """The disk waits until two more steps are done; the checkpoint still holds the weights of its own step."""
    went_on, write, iteration = threading.Event(), checkpoint.write, Log.iteration
    written: list[int] = []

    def slowly(out_dir: Path, state: checkpoint.State, keep: int, is_best: bool) -> None:
        assert state['iter_num'] != 4 or went_on.wait(PATIENT), 'no step was done in the meantime'
        write(out_dir, state, keep, is_best)
        written.append(state['iter_num'])

    def noting(log: Log, step: int, *rest: Any) -> None:
        iteration(log, step, *rest)
        if step == 5:
            assert written == [], 'training did not wait for the disk'
            went_on.set()

    monkeypatch.setattr(checkpoint, 'write', slowly)
    monkeypatch.setattr(Log, 'iteration', noting)
    train.main(arguments(tmp_path / 'slow', tiny_dataset, keep=5))
    assert written == [4, 8, 12]
    monkeypatch.undo()
    for age, step in (('.2', 4), ('.1', 8), ('', 12)):
        assert checkpoint.load(tmp_path / f'slow/ckpt{age}.pt')['iter_num'] == step
    shutil.copytree(tmp_path / 'slow', tmp_path / 'resumed')
    os.replace(tmp_path / 'resumed/ckpt.2.pt', tmp_path / 'resumed/ckpt.pt')
    train.main(arguments(tmp_path / 'resumed', tiny_dataset, eval_interval=4))
    assert_same_run(tmp_path / 'slow', tmp_path / 'resumed')


@pytest.mark.usefixtures('no_pictures')
def test_what_a_kill_left_half_written_is_removed_and_nothing_else(tmp_path: Path, tiny_dataset: Path) -> None:
    left = ('ckpt.new.pt', 'best.pt.tmp', 'metrics.jsonl.tmp', 'ckpt.pt.0a1b2c3d.tmp', '.best.pt.0a1b2c3d.uploading',
            '.ckpt.pt.0a1b2c3d.uploading.tmp')
    foreign = ('thesis.tmp', 'ckpt.pt.old.tmp', '.mytext.uploading', 'ckpt-mytext.pt', 'ckpt.final.pt', 'my best.pt')
    for name in (*left, *foreign):
        (tmp_path / name).write_bytes(b'half')
    upload_to = (tmp_path / 'elsewhere').as_uri()  # removes old copies
    train.main(arguments(tmp_path, tiny_dataset, init_from='scratch', overwrite=True, upload_to=upload_to))
    assert {path.name for path in tmp_path.iterdir()} & {*left, *foreign} == {*foreign}


@pytest.mark.usefixtures('no_pictures')
def test_a_run_resumes_elsewhere_from_what_it_has_uploaded(
        tmp_path: Path, tiny_dataset: Path, capsys: pytest.CaptureFixture[str],
        run_script: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    url = (tmp_path / 'elsewhere').as_uri()
    train.main(arguments(tmp_path / 'here', tiny_dataset, max_iters=8, upload_to=url))
    assert status_of(tmp_path / 'here')['not_uploaded'] == []
    assert (tmp_path / 'elsewhere/ckpt.pt').read_bytes() == (tmp_path / 'here/ckpt.pt').read_bytes()
    train.main(arguments(tmp_path / 'there', tiny_dataset, upload_to=url))
    assert 'resuming at step 8' in capsys.readouterr().out
    train.main(arguments(tmp_path / 'whole', tiny_dataset))
    first, second = (checkpoint.load(tmp_path / name / 'ckpt.pt') for name in ('there', 'whole'))
    assert all(torch.equal(weight, second['model'][name]) for name, weight in first['model'].items())
    model, state = open_model(url)
    assert state['iter_num'] == 12
    sampled = run_script('sample.py', f'--out_dir={url}', '--num_samples=1', '--max_new_tokens=20', '--start=import')
    assert sampled.stdout.startswith('import'), sampled.stderr
    assert torch.equal(model.lm_head.weight, second['model']['lm_head.weight'])


@pytest.mark.usefixtures('no_pictures')
def test_an_upload_that_fails_is_reported_and_does_not_end_the_run(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_dataset: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr('plaingpt.run.upload.PAUSES', (0.01, 0.01))
    (tmp_path / 'file').write_text('in the way', encoding='utf-8')
    url = (tmp_path / 'file/run').as_uri()
    train.main(arguments(tmp_path / 'run', tiny_dataset, upload_to=url, init_from='scratch'))
    assert 'is not uploaded' in capsys.readouterr().out
    status = status_of(tmp_path / 'run')
    assert (status['state'], status['exit_code']) == ('done', 0)
    assert sorted(status['not_uploaded']) == ['best.pt', 'ckpt.pt']
    (tmp_path / 'file').unlink()
    train.main(arguments(tmp_path / 'run', tiny_dataset, upload_to=url))  # nothing is left to do but the upload
    assert status_of(tmp_path / 'run')['not_uploaded'] == []
    assert (tmp_path / 'file/run/ckpt.pt').read_bytes() == (tmp_path / 'run/ckpt.pt').read_bytes()


# ------------------------------------------------------------------------------------------------
# More on disks, folders and numbers


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_what_was_saved(tmp_path: Path, tiny_dataset: Path) -> None:
    """The limit is that of `ulimit -f`: no file may become larger than half a checkpoint."""
    subprocess.run([sys.executable, 'train.py', *arguments(tmp_path, tiny_dataset, max_iters=8)], cwd=ROOT, check=True,
                   capture_output=True)
    before = (tmp_path / 'ckpt.pt').read_bytes()

    def with_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

    result = subprocess.run([sys.executable, 'train.py', *arguments(tmp_path, tiny_dataset)], cwd=ROOT, timeout=PATIENT,
                            preexec_fn=with_limit, capture_output=True, text=True, check=False)
    assert result.returncode == errors.DISK_FULL, result.stdout[-2000:] + result.stderr[-2000:]
    assert re.search(r'it needs [\d,]{6,} bytes, and [\d,]{6,} are free', result.stderr), result.stderr
    assert len(result.stderr.splitlines()) <= 3
    assert (tmp_path / 'ckpt.pt').read_bytes() == before
    assert not (tmp_path / 'ckpt.new.pt').exists()
    assert status_of(tmp_path)['exit_code'] == errors.DISK_FULL


@pytest.mark.slow
def test_a_disk_that_has_no_room_for_a_row_is_full_in_one_line(tmp_path: Path, tiny_dataset: Path) -> None:
    def with_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))

    result = subprocess.run([sys.executable, 'train.py', *arguments(tmp_path, tiny_dataset, eval_interval=1000)],
                            cwd=ROOT, preexec_fn=with_limit, capture_output=True, text=True, check=False)
    assert result.returncode == errors.DISK_FULL, result.stdout[-2000:] + result.stderr[-2000:]
    assert 'metrics.jsonl: the disk is full' in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize('eval_interval', [1000, 1], ids=['while a row is written', 'while a checkpoint is written'])
def test_status_has_the_exit_code_though_the_disk_is_full(start: Start, tmp_path: Path, tiny_dataset: Path,
                                                          eval_interval: int) -> None:
    """A real file system in memory has not one free byte once the run is in its steps."""
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2M', 'tmpfs', str(tmp_path)], capture_output=True,
                             text=True, check=False)
    if mounted.returncode:
        pytest.skip(f'mounts a file system: {mounted.stderr}')
    try:
        process = start('-c', SLOWLY + RUN, *arguments(tmp_path / 'run', tiny_dataset, max_iters=1000,
                                                       eval_interval=eval_interval))
        wait_for(process, 'iter 3')
        filled = subprocess.run(['dd', 'if=/dev/zero', f'of={tmp_path}/more'], capture_output=True, text=True)
        assert 'No space left' in filled.stderr
        printed = end_of(process)
        status = status_of(tmp_path / 'run')
    finally:
        subprocess.run(['umount', '--lazy', str(tmp_path)], check=True)
    assert process.returncode == errors.DISK_FULL, printed
    assert (status['state'], status['exit_code']) == ('failed', errors.DISK_FULL)
    assert 'is not written' not in printed and 'Traceback' not in printed


@pytest.mark.slow
def test_a_run_whose_folder_is_deleted_makes_it_again(start: Start, tmp_path: Path, tiny_dataset: Path) -> None:
    process = start('-c', SLOWLY + RUN, *arguments(tmp_path / 'run', tiny_dataset, max_iters=40, sample_interval=8,
                                                   upload_to=(tmp_path / 'elsewhere').as_uri()))
    wait_for(process, 'iter 9')
    shutil.rmtree(tmp_path / 'run', ignore_errors=True)
    printed = end_of(process)
    assert process.returncode == errors.DONE, printed
    assert checkpoint.load(tmp_path / 'run/ckpt.pt')['iter_num'] == rows_of(tmp_path / 'run')[-1]['step'] == 40
    assert (status_of(tmp_path / 'run')['state'], status_of(tmp_path / 'run')['not_uploaded']) == ('done', [])


@pytest.mark.usefixtures('no_pictures')
@pytest.mark.parametrize('what', ['link', 'write'])
def test_what_goes_wrong_behind_training_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                      tiny_dataset: Path, what: str) -> None:
    """The fault is in the thread that writes: in renaming the files, or in code that expects no error."""
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, 'planted')

    def surprise(*_: Any) -> None:
        raise ArithmeticError('planted')

    monkeypatch.setattr({'link': files, 'write': checkpoint}[what], what, {'link': fail, 'write': surprise}[what])
    with pytest.raises((errors.UserError, ArithmeticError), match=r'the disk is full|planted'):
        train.main(arguments(tmp_path, tiny_dataset))
    assert status_of(tmp_path)['state'] == 'failed'


@pytest.mark.usefixtures('no_pictures')
def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_over(tmp_path: Path, tiny_dataset: Path) -> None:
    train.main(arguments(tmp_path, tiny_dataset))
    for path in tmp_path.glob('*.pt'):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.unlink()  # best.pt may be another name of the same file
        path.write_bytes(data)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(errors.UserError, match='is damaged') as caught:
        train.main(arguments(tmp_path, tiny_dataset, max_iters=16))
    assert caught.value.code == errors.CHECKPOINT
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_processes_that_do_not_share_a_folder_are_told_so(start: Start, tmp_path: Path, tiny_dataset: Path) -> None:
    train.main(arguments(tmp_path / 'here', tiny_dataset, max_iters=4))
    port = free_port()
    both = [start('-c', ALONE, *arguments(tmp_path / name, tiny_dataset), RANK=str(rank),
                  LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
            for rank, name in enumerate(['here', 'there'])]
    for process in both:
        printed = end_of(process)
        assert process.returncode == errors.COMMAND, printed
        assert 'checkpoint of step: 4 on process 0, none on process 1\nout_dir must be one folder' in printed


@pytest.mark.usefixtures('no_pictures')
def test_an_overflow_that_the_scaler_answers_does_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                            tiny_dataset: Path) -> None:
    """float16 runs on the CPU, which only a test asks for, with a scale that overflows in the first steps."""
    monkeypatch.setattr('plaingpt.machines.device.pick_dtype', lambda name, device: (torch.float16, 'for a test'))
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda device, enabled: scaler(device, 2.0**30, enabled=enabled))
    train.main(arguments(tmp_path, tiny_dataset, max_iters=40, eval_interval=40))
    rows = rows_of(tmp_path)
    overflows = [row['step'] for row in rows[:-1] if row['grad_norm'] is None]
    assert len(overflows) > 10, 'more than would end a run'
    assert all(row['skipped'] == 0 for row in rows[:-1])
    state = checkpoint.load(tmp_path / 'ckpt.pt')
    assert all(moments['step'] == 40 - len(overflows) for moments in state['optimizer']['state'].values())
    assert state['scaler']['scale'] < 2.0**30
    assert rows[39]['loss'] < rows[0]['loss']


@pytest.mark.usefixtures('no_pictures')
def test_gradients_that_no_scale_makes_finite_end_a_run_in_float16(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                                   tiny_dataset: Path) -> None:
    make_optimizer = train.make_optimizer

    def breaking(model: GPT, *rest: Any) -> torch.optim.Optimizer:
        next(model.parameters()).register_hook(lambda gradient: gradient * math.nan)
        return make_optimizer(model, *rest)

    monkeypatch.setattr(train, 'make_optimizer', breaking)
    monkeypatch.setattr('plaingpt.machines.device.pick_dtype', lambda name, device: (torch.float16, 'for a test'))
    with pytest.raises(errors.UserError, match='10 steps in a row') as caught:
        train.main(arguments(tmp_path, tiny_dataset, max_iters=60, eval_interval=60))
    assert caught.value.code == errors.NOT_FINITE


@pytest.mark.slow
def test_no_secret_of_the_environment_is_left_anywhere(start: Start, tmp_path: Path, tiny_dataset: Path) -> None:
    secrets = {name: f'{name.lower()}-0123456789abcdef0123456789abcdef'[-40:] for name in (
        'WANDB_API_KEY', 'AWS_SECRET_ACCESS_KEY', 'AWS_SESSION_TOKEN', 'HF_TOKEN', 'MY_PASSWORD')}
    process = start('train.py', *arguments(tmp_path / 'run', tiny_dataset, wandb_log=True,
                                           upload_to=(tmp_path / 'elsewhere').as_uri()),
                    **secrets, WANDB_MODE='offline')
    printed = end_of(process)
    assert process.returncode == 0, printed
    files = [path for path in tmp_path.rglob('*') if path.is_file()]
    assert any('wandb' in str(path) for path in files)
    assert any(path.parent.name == 'elsewhere' for path in files)
    for secret in secrets.values():
        assert secret not in printed
        assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_nothing_in_a_pickled_corpus_is_run(tmp_path: Path, tiny_dataset: Path) -> None:
    """Each file of a corpus is replaced by the protocol-0 pickle of a call of os.system."""
    witness = tmp_path / 'it ran'
    evil = f"cos\nsystem\n(S'touch \"{witness}\"'\ntR.".encode()
    evil += b' ' * (len(evil) % 2)
    for name in ('train.bin', 'val.bin', 'meta.json'):
        folder = tmp_path / name
        shutil.copytree(tiny_dataset, folder)
        (folder / name).write_bytes(evil * 200)
        with pytest.raises(errors.UserError, match=re.escape(str(folder))) as caught:
            train.main(arguments(tmp_path / 'run', folder))
        assert caught.value.code == errors.DATA
    assert not witness.exists()
