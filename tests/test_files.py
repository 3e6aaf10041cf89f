"""Files that are whole or absent: a real kill, a real limit of the system on their size, an exception."""
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from plaingpt import files

ROOT = Path(__file__).parents[1]
WRITE = """
import resource, sys
from plaingpt import files

if sys.argv[2] == 'full disk':
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with files.written_whole(sys.argv[1]) as file:
    file.write(b'x' * 999)
    if sys.argv[2] == 'kill':
        print('half', flush=True)
        sys.stdin.read()
    if sys.argv[2] == 'exception':
        raise KeyError('in the middle')
    file.write(b'x' * (int(sys.argv[3]) - 999))
"""


@pytest.mark.skipif(sys.platform == 'win32', reason='limits the size of files, and sends POSIX signals')
@pytest.mark.parametrize(('end', 'size', 'error'), [
    ('kill', 300_000, ''), ('exception', 300_000, 'KeyError'), ('full disk', 300_000, 'File too large'),
    ('full disk', 1200, 'File too large'),  # noticed when the last buffer is written
])
def test_whatever_ends_a_write_the_old_file_stays_and_the_same_command_replaces_it(
        end: str, size: int, error: str, tmp_path: Path) -> None:
    path = tmp_path / 'a'
    path.write_bytes(b'old')
    command = [sys.executable, '-c', WRITE, str(path)]
    with subprocess.Popen([*command, end, str(size)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, encoding='utf-8') as process:
        if end == 'kill':
            assert process.stdout and process.stdout.readline() == 'half\n'
            assert path.read_bytes() == b'old'
            process.kill()
        _, said = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if end == 'kill' else 1)
    assert error in said
    assert path.read_bytes() == b'old'
    assert {file.name for file in tmp_path.iterdir()} == {'a', *(['a.tmp'] if end == 'kill' else [])}

    subprocess.run([*command, '', str(size)], cwd=ROOT, check=True)
    assert path.read_bytes() == b'x' * size
    assert [file.name for file in tmp_path.iterdir()] == ['a']


def test_machines_that_share_a_folder_write_the_same_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / 'a'
    with files.written_whole(path, is_shared=True) as first, files.written_whole(path, is_shared=True) as second:
        first.write(b'first')
        second.write(b'second')
        assert first.name != second.name
        assert not path.exists()
    assert path.read_bytes() == b'first'
    assert [file.name for file in tmp_path.iterdir()] == ['a']


def test_a_file_that_is_no_json_is_read_as_none(tmp_path: Path) -> None:
    path = tmp_path / 'a.json'
    assert files.read_json(path) is None
    for content, value in [(b'{"a": [1, "\xc3\xa9"]}', {'a': [1, 'é']}), (b'', None), (b'{"a": 1', None),
                           (b'\xff\xfe', None)]:
        path.write_bytes(content)
        assert files.read_json(path) == value
    path.write_text(json.dumps('text'), encoding='utf-8')
    assert files.read_json(path) == 'text'
