"""The choice of a device and how it computes: GPUs that this machine lacks are emulated by what torch would report."""
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from plaingpt import errors
from plaingpt.machines import device
from plaingpt.machines.device import pick_compile, pick_device
from tests.comparing import refused

TOO_OLD = ('CUDA initialization: The NVIDIA driver on your system is too old (found version 12020). Please update your '
           'GPU driver (Triggered internally at ...)')
BUILD = ['sm_75', 'sm_80', 'sm_86', 'sm_90', 'sm_100', 'compute_120']


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    """Have torch see a GPU of that generation."""
    def see(capability: tuple[int, int]) -> None:
        for name, answer in {'is_available': True, 'device_count': 1, 'get_device_capability': capability,
                             'get_arch_list': BUILD, 'get_device_name': 'Tesla V100-SXM2-16GB'}.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)

    return see


@pytest.mark.parametrize('asked', ['auto', 'cuda', 'cuda:0'])
def test_a_driver_that_is_too_old_is_no_reason_to_train_on_the_cpu(
        asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_available() -> bool:
        warnings.warn(TOO_OLD, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, 'is_available', is_available)
    message = refused(pick_device, asked, code=errors.COMMAND)
    assert 'driver (12020) is too old' in message and '--device=cpu' in message
    assert pick_device('cpu') == ('cpu', 'as asked')


@pytest.mark.parametrize('asked', ['auto', 'cuda', 'cuda:0'])
def test_a_gpu_that_this_build_has_no_code_for_is_refused_before_anything_is_computed(
        asked: str, gpu: Callable[[tuple[int, int]], None]) -> None:
    gpu((7, 0))
    message = refused(pick_device, asked, code=errors.COMMAND)
    assert 'has no code for this GPU, Tesla V100-SXM2-16GB, which is sm_70' in message
    assert pick_device('cpu')[0] == 'cpu'
    for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (12, 0), (12, 1)):
        gpu(capability)
        assert pick_device(asked)[0] == ('cuda' if asked == 'auto' else asked)


@pytest.mark.parametrize(('built', 'capability', 'runs'), [
    ('sm_80', (8, 6), True), ('sm_86', (8, 0), False), ('sm_80', (9, 0), False), ('compute_80', (9, 0), True),
    ('compute_90', (8, 9), False), ('sm_90a', (9, 0), True), ('sm_120', (12, 0), True), ('sm_70', (7, 5), True)])
def test_code_runs_on_the_generation_that_it_was_built_for(built: str, capability: Any, runs: bool) -> None:
    assert device.runs_on(built, capability) == runs


def test_blocks_are_compiled_for_a_gpu_if_all_that_takes_is_available(
        gpu: Callable[[tuple[int, int]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((8, 0))
    monkeypatch.setattr(device, 'find_spec', lambda name: object())
    monkeypatch.setattr(shutil, 'which', lambda name: '/usr/bin/cc' if name == 'cc' else None)
    monkeypatch.delenv('CC', raising=False)
    assert pick_compile('auto', 'cuda') == (True, 'which pays on cuda')
    gpu((7, 5))
    assert pick_compile('auto', 'cuda') == (False, 'as that needs a newer GPU')
    gpu((9, 0))
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    assert pick_compile('auto', 'cuda') == (False, 'as that needs a C compiler, gcc or clang or cc')
    monkeypatch.setenv('CC', '/opt/bin/icx')
    assert pick_compile('auto', 'cuda')[0]
    monkeypatch.setattr(device, 'find_spec', lambda name: None)
    assert pick_compile('auto', 'cuda') == (False, 'as that needs Triton')
    assert pick_compile('auto', 'cpu')[0] is False


@pytest.mark.parametrize('words', ['CUDA out of memory. Tried', 'CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling',
                                   'cuDNN error: CUDNN_STATUS_ALLOC_FAILED'])
def test_a_library_that_gets_no_memory_is_out_of_memory(words: str) -> None:
    assert errors.is_out_of_memory(RuntimeError(words)) and not errors.is_out_of_memory(RuntimeError('CUDA error'))
