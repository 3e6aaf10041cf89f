"""What was measured, in measured.json: each number with the machine, the day and the versions that gave it."""
import json
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import rung
import torch

from plaingpt.files import read_json, written_whole

FILE = rung.FOLDER / 'measured.json'


def read(kind: str) -> dict[str, Any]:
    """Return what was measured of 'ladder' or 'course', by the name of what it was measured of."""
    found: dict[str, Any] = read_json(FILE)[kind]
    return found


def keep(kind: str, name: str, found: dict[str, Any]) -> None:
    """Write what was measured just now; what was before of the same name goes."""
    everything = read_json(FILE) if FILE.exists() else {'ladder': {}, 'course': {}}
    everything[kind][name] = {**found, 'on': here()}
    with written_whole(FILE) as file:
        file.write(json.dumps(everything, indent=1).encode() + b'\n')


def here() -> str:
    """Return the day, the machine and the versions."""
    cpu = platform.processor() or platform.machine()
    info = Path('/proc/cpuinfo')
    if info.exists():
        pairs = (line.partition(':') for line in info.read_text(encoding='utf-8').splitlines())
        said = {name.strip(): value.strip() for name, _, value in pairs}
        cpu = f'{said.get("model name", cpu)} (family {said.get("cpu family", "?")}, model {said.get("model", "?")})'
    torch_version = str(torch.__version__).partition('+')[0]
    return (f'{time.strftime("%Y-%m-%d")}, one thread, {os.cpu_count()} cores of {cpu}, '
            f'Python {platform.python_version()}, torch {torch_version}')


def places(found: dict[str, Any]) -> Iterable[str]:
    """Return when and where some numbers were measured, each once."""
    return dict.fromkeys(entry['on'] for entry in found.values())
