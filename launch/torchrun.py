"""
torchrun, but for two things that Kubernetes needs. Its exit code is that of the processes it started, while torchrun's
is always 1: so a run that stopped after saving (75) can be told from a mistake (2 to 7). And a machine that comes back
alone, while the others have not noticed yet that it was lost, waits until they come back, too.

    python launch/torchrun.py --standalone --nproc_per_node=gpu train.py config/train_gpt2.py
"""
import sys
import time
from datetime import timedelta

from torch.distributed import DistError, TCPStore, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

STOPPED = 75  # as errors.py has it
PATIENCE = timedelta(minutes=30)  # for the first machine


def wait_for_a_new_start(address: str, port: int, machine: int) -> None:
    """Block until the first machine has a new store, which this `machine` has not met before: the keys in an old one
    would let torchrun believe that all machines have come. Raise DistError if there is none in time."""
    while True:
        store = TCPStore(address, port, is_master=False, timeout=PATIENCE, wait_for_workers=False)
        if store.add(f'plaingpt/machine {machine}', 1) == 1:
            return
        print(f'machine {machine} has been here before: waiting until {address} starts anew', file=sys.stderr)
        try:
            while True:
                store.check(['plaingpt'])
                time.sleep(1)
        except DistError:  # the old store has gone
            pass


def main(args: list[str]) -> int:
    """Return the highest exit code of those of this machine's processes that ended by themselves (torchrun then kills
    the others); 128 + n if none did, and signal n has killed one."""
    options = run.parse_args(args)
    if options.rdzv_backend == 'static' and options.node_rank > 0:
        wait_for_a_new_start(options.master_addr, options.master_port, options.node_rank)
    try:
        run.run(options)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        code = max(failure.exitcode for failure in error.failures.values())  # -n if signal n has killed one
        return code if code > 0 else 128 - code
    except SignalException as error:  # the processes got the same signal, and time to save
        print(error, file=sys.stderr)
        return STOPPED
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
