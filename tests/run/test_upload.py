"""Copies of checkpoints: a real S3 API in a process of its own, folders under file://, and kills."""
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from plaingpt.errors import CHECKPOINT, COMMAND, UserError
from plaingpt.run import upload
from tests.waiting import PATIENT, wait_until

ROOT = Path(__file__).parents[2]
SECRET = 'wJalrXUtnFEMI-a-secret-of-this-test'
needs_s3 = pytest.mark.skipif(not (find_spec('s3fs') and find_spec('moto')), reason="needs s3fs and 'moto[server]'")


class Server:
    """An S3 API on 127.0.0.1, which forgets everything when it is stopped."""

    def __init__(self) -> None:
        with socket.create_server(('127.0.0.1', 0)) as free:
            self.port = free.getsockname()[1]

    def start(self) -> None:
        command = [sys.executable, '-m', 'moto.server', '-H', '127.0.0.1', '-p', str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(self.answers)
        self.call('create_bucket', Bucket='bucket')

    def answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(('127.0.0.1', self.port)) == 0

    def call(self, method: str, **arguments: object) -> dict[str, object]:
        files, _ = upload.open_url('s3://bucket', COMMAND)
        return dict(files.call_s3(method, **arguments))

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope='module')
def server() -> Iterator[Server]:
    server = Server()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith('AWS_') or name.lower().endswith('_proxy')]:
            patch.delenv(name)
        for name, value in {'ENDPOINT_URL': f'http://127.0.0.1:{server.port}', 'ACCESS_KEY_ID': 'a-key-of-this-test',
                            'SECRET_ACCESS_KEY': SECRET, 'DEFAULT_REGION': 'us-east-1', 'CONFIG_FILE': os.devnull,
                            'EC2_METADATA_DISABLED': 'true', 'MAX_ATTEMPTS': '1'}.items():
            patch.setenv(f'AWS_{name}', value)
        server.start()
        yield server
        server.stop()


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the messages of an Uploader, with short pauses between its attempts."""
    monkeypatch.setattr(upload, 'PAUSES', (0.05, 0.1))
    return []


def write(path: Path, content: bytes) -> Path:
    """Replace a file as checkpoint.py does."""
    new = path.with_name('ckpt.new.pt')
    new.write_bytes(content)
    os.replace(new, path)
    return path


def kinds(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@needs_s3
def test_what_is_put_arrives_bit_for_bit_though_the_file_is_renamed_at_once(
        server: Server, tmp_path: Path, lines: list[str]) -> None:
    newest, older, out = tmp_path / 'ckpt.pt', tmp_path / 'ckpt.1.pt', tmp_path / 'fetched'
    first, second = os.urandom(3_000_000), os.urandom(3_000_000)
    uploader = upload.Uploader('s3://bucket/deep/run/', lines.append)
    uploader.put(write(newest, first))
    os.replace(newest, older)
    uploader.put(older)
    uploader.put(write(newest, second))
    newest.unlink()
    assert set(uploader.missing) <= {'ckpt.pt', 'ckpt.1.pt'}
    uploader.close(PATIENT)
    assert (uploader.missing, lines, kinds(tmp_path)) == ([], [], {'ckpt.1.pt'})

    assert upload.checkpoints('s3://bucket/deep/run') == ['ckpt.1.pt', 'ckpt.pt']
    assert upload.fetch('s3://bucket/deep/run', out) == [out / 'ckpt.1.pt', out / 'ckpt.pt']
    assert [(out / name).read_bytes() for name in ('ckpt.1.pt', 'ckpt.pt')] == [first, second]
    assert upload.fetch('s3://bucket/deep/run/ckpt.1.pt', tmp_path / 'one') == [tmp_path / 'one/ckpt.1.pt']
    assert kinds(tmp_path / 'one') == {'ckpt.1.pt'}


@needs_s3
@pytest.mark.slow
def test_a_run_resumes_and_is_sampled_from_what_is_in_s3(
        server: Server, tmp_path: Path, tiny_dataset: Path,
        run_script: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    settings = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=2', '--eval_iters=1',
                '--gradient_accumulation_steps=1', '--sample_interval=0', '--device=cpu', '--init_from=auto',
                f'--dataset={tiny_dataset}', '--upload_to=s3://bucket/real']
    for machine, steps in [('one', 4), ('another', 8)]:
        result = run_script('train.py', *settings, f'--max_iters={steps}', f'--out_dir={tmp_path / machine}')
        assert result.returncode == 0, result.stderr
        assert '"not_uploaded": []' in (tmp_path / machine / 'status.json').read_text(encoding='utf-8')
    assert 'ckpt.pt comes from s3://bucket/real' in result.stderr
    assert 'resuming at step 4' in result.stdout
    result = run_script('sample.py', '--out_dir=s3://bucket/real', '--start=import', '--num_samples=1',
                        '--max_new_tokens=8', '--device=cpu')
    assert result.stdout.startswith('import'), result.stderr
    assert SECRET not in result.stdout + result.stderr


@needs_s3
def test_a_missing_bucket_is_visible_and_not_fatal(server: Server, tmp_path: Path, lines: list[str]) -> None:
    uploader = upload.Uploader('s3://nowhere/run', lines.append)
    uploader.put(write(tmp_path / 'ckpt.pt', b'one'))
    wait_until(lambda: len(lines) == 1)
    assert lines[0].startswith('s3://nowhere/run/ckpt.pt is not uploaded: The specified bucket does not exist')
    assert uploader.missing == ['ckpt.pt']
    assert len(list(tmp_path.glob('.*.uploading'))) == 1  # kept, to be tried again

    server.call('create_bucket', Bucket='nowhere')
    uploader.put(write(tmp_path / 'best.pt', b'two'))
    wait_until(lambda: uploader.missing == [])
    uploader.close(PATIENT)
    assert upload.checkpoints('s3://nowhere/run') == ['best.pt', 'ckpt.pt']
    assert len(lines) == 1
    assert kinds(tmp_path) == {'best.pt', 'ckpt.pt'}


@needs_s3
def test_while_the_service_hangs_only_the_newest_version_waits(
        server: Server, tmp_path: Path, lines: list[str]) -> None:
    server.call('put_bucket_versioning', Bucket='bucket', VersioningConfiguration={'Status': 'Enabled'})
    uploader = upload.Uploader('s3://bucket/slow', lines.append)
    server.process.send_signal(signal.SIGSTOP)
    try:
        for size in range(1, 7):
            uploader.put(write(tmp_path / 'ckpt.pt', b'x' * size))
            wait_until(lambda: uploader.busy_with is not None)
        assert len(list(tmp_path.glob('.*.uploading'))) == 2
        assert uploader.missing == ['ckpt.pt']
    finally:
        server.process.send_signal(signal.SIGCONT)
    uploader.close(PATIENT)
    versions = server.call('list_object_versions', Bucket='bucket', Prefix='slow/')['Versions']
    assert isinstance(versions, list)
    assert sorted(version['Size'] for version in versions) == [1, 6]
    assert (uploader.missing, lines) == ([], [])


@needs_s3
def test_a_service_that_comes_back_gets_what_it_missed(server: Server, tmp_path: Path, lines: list[str],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    uploader = upload.Uploader('s3://bucket/again', lines.append)
    server.stop()
    uploader.put(write(tmp_path / 'ckpt.pt', b'one'))
    wait_until(lambda: len(lines) == 1)  # all attempts failed
    assert uploader.missing == ['ckpt.pt']
    with pytest.raises(UserError, match=r's3://bucket/again cannot be read: .*connect') as error:
        upload.fetch('s3://bucket/again', tmp_path)
    assert error.value.code == CHECKPOINT

    monkeypatch.setattr(upload, 'PAUSES', (0.5,) * 2 * PATIENT)  # the server starts between two attempts
    uploader.put(write(tmp_path / 'best.pt', b'two'))
    server.start()
    wait_until(lambda: uploader.missing == [])
    uploader.close(PATIENT)
    assert len(lines) == 1
    assert [path.read_bytes() for path in upload.fetch('s3://bucket/again', tmp_path / 'out')] == [b'two', b'one']


@needs_s3
def test_no_message_holds_a_secret(server: Server, tmp_path: Path, lines: list[str],
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('AWS_ENDPOINT_URL', f'http://127.0.0.1:1/{SECRET}')  # no server answers there; errors quote it
    uploader = upload.Uploader('s3://bucket/run', lines.append)
    uploader.put(write(tmp_path / 'ckpt.pt', b'one'))
    wait_until(lambda: len(lines) == 1)
    with pytest.raises(UserError) as error:
        upload.fetch('s3://bucket/run/ckpt.pt', tmp_path)
    uploader.put(tmp_path / 'ckpt.pt')
    uploader.close(0)
    said = '\n'.join([*lines, str(error.value)])
    assert '127.0.0.1:1' in said
    assert SECRET not in said


def test_errors_are_shown_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('SOME_API_TOKEN', SECRET)
    assert upload.reason(OSError(f"'https://h/a.pt?Signature=abc': bad key {SECRET}!\nmore")) == (
        "'https://h/a.pt?***': bad key ***!")


@pytest.mark.slow
def test_a_secret_in_upload_to_is_neither_printed_nor_kept_by_a_run(
        tmp_path: Path, tiny_dataset: Path, run_script: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = run_script('train.py', '--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=2',
                        '--eval_iters=1', '--gradient_accumulation_steps=1', '--device=cpu', '--max_iters=1',
                        f'--dataset={tiny_dataset}', f'--out_dir={tmp_path}', f'--upload_to=memory://run?sig={SECRET}')
    assert result.returncode == 0, result.stderr
    assert 'Overriding: upload_to = memory://run?***' in result.stdout
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert b'memory://run?***' in kept['ckpt.pt']
    assert SECRET.encode() not in b''.join([result.stdout.encode(), result.stderr.encode(), *kept.values()])


def test_a_folder_under_file_gets_whole_files_and_nothing_else(tmp_path: Path, lines: list[str]) -> None:
    run, there = tmp_path / 'run', tmp_path / 'not/yet there'
    run.mkdir()
    (run / '.ckpt.pt.0a1b2c3d.uploading').write_bytes(b'what a kill left')
    uploader = upload.Uploader(f'file://{there}', lines.append)
    for content in (b'one', b'two', b'three'):
        uploader.put(write(run / 'ckpt.pt', content))
        wait_until(lambda: uploader.missing == [])
        assert (there / 'ckpt.pt').read_bytes() == content
    uploader.put(write(run / 'best.pt', b'best'))
    uploader.close(PATIENT)
    uploader.put(run / 'ckpt.pt')  # after the end: ignored
    assert (kinds(run), kinds(there)) == ({'ckpt.pt', 'best.pt'}, {'ckpt.pt', 'best.pt'})
    assert lines == []

    (there / 'ckpt.pt.tmp').touch()
    (there / 'notes.txt').touch()
    fetched = upload.fetch(f'file://{there}/', tmp_path / 'fetched')
    assert [path.read_bytes() for path in fetched] == [b'best', b'three']
    assert kinds(tmp_path / 'fetched') == {'ckpt.pt', 'best.pt'}
    assert upload.fetch(f'file://{there}/best.pt', run) == [run / 'best.pt']


def test_files_arrive_even_if_no_links_are_possible(tmp_path: Path, lines: list[str],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError('this file system has no links')

    monkeypatch.setattr(os, 'link', refuse)
    uploader = upload.Uploader(f'file://{tmp_path}/there', lines.append)
    uploader.put(write(tmp_path / 'ckpt.pt', b'one'))
    (tmp_path / 'ckpt.pt').unlink()
    uploader.close(PATIENT)
    assert (tmp_path / 'there/ckpt.pt').read_bytes() == b'one'
    assert (kinds(tmp_path), lines) == ({'there'}, [])


def test_a_folder_that_cannot_be_written_to_is_reported_once_a_put_and_tried_again(
        tmp_path: Path, lines: list[str]) -> None:
    there = tmp_path / 'there'
    there.write_text('a file where a folder should be', encoding='utf-8')
    uploader = upload.Uploader(f'file://{there}', lines.append)
    uploader.put(write(tmp_path / 'ckpt.pt', b'one'))
    wait_until(lambda: len(lines) == 1)
    uploader.put(write(tmp_path / 'ckpt.pt', b'two'))
    wait_until(lambda: len(lines) == 2)
    uploader.close(PATIENT)
    assert len(lines) == 3
    assert all(line.startswith(f'file://{there}/ckpt.pt is not uploaded: ') for line in lines)
    assert uploader.missing == ['ckpt.pt']
    assert kinds(tmp_path) == {'ckpt.pt', 'there'}


def test_a_kill_in_the_middle_leaves_no_half_file_under_the_final_name(tmp_path: Path) -> None:
    run, there = tmp_path / 'run', tmp_path / 'there'
    run.mkdir()
    size = 20_000_000_000  # of holes: they take no space until they are copied
    with open(run / 'ckpt.pt', 'wb') as file:
        file.truncate(size)
    code = ('import sys; from plaingpt.run import upload; from pathlib import Path; '
            'uploader = upload.Uploader(sys.argv[1], print); '
            'uploader.put(Path(sys.argv[2])); uploader.close(1800)')
    process = subprocess.Popen([sys.executable, '-c', code, f'file://{there}', str(run / 'ckpt.pt')], cwd=ROOT)
    wait_until(lambda: there.is_dir() and any(there.iterdir()))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [path.stat().st_size < size for path in there.iterdir()] == [True]  # the kill came in the middle
    assert not (there / 'ckpt.pt').exists()
    assert upload.checkpoints(f'file://{there}') == []
    assert len(list(run.glob('.*.uploading'))) == 1

    uploader = upload.Uploader(f'file://{there}', print)
    uploader.put(write(run / 'ckpt.pt', b'one'))
    uploader.close(PATIENT)
    assert (kinds(run), kinds(there)) == ({'ckpt.pt'}, {'ckpt.pt'})


def test_a_slow_upload_holds_up_neither_close_nor_the_end_of_the_process(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / 'ckpt.pt.tmp')  # opening it blocks until a reader comes, and none does
    (tmp_path / 'run').mkdir()
    write(tmp_path / 'run/ckpt.pt', b'one')
    code = ('import sys; from plaingpt.run import upload; from pathlib import Path; '
            'from fsspec.implementations.local import LocalFileSystem; '
            'LocalFileSystem.put_file = lambda self, source, target: open(target, "wb"); '
            'uploader = upload.Uploader(sys.argv[1], print); '
            'uploader.put(Path(sys.argv[2])); uploader.close(0.5); print(uploader.missing)')
    result = subprocess.run([sys.executable, '-c', code, f'file://{tmp_path}', str(tmp_path / 'run/ckpt.pt')],
                            cwd=ROOT, capture_output=True, text=True, encoding='utf-8', timeout=PATIENT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        f'file://{tmp_path}/ckpt.pt is not uploaded: 0.5 seconds were not enough; the run continues', "['ckpt.pt']"]


@pytest.mark.parametrize('url', ['memory://nobody/was/here', 'file:///nobody/was/here', 'file:///nobody/here/ckpt.pt'])
def test_fetching_a_missing_file_is_answered_in_one_line(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        upload.fetch(url, tmp_path / 'out')
    assert error.value.code == CHECKPOINT
    assert url in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / 'out').exists() or kinds(tmp_path / 'out') == set()


@needs_s3
@pytest.mark.parametrize('url', ['s3://no-such-bucket/run', 's3://no-such-bucket/run/ckpt.pt', 's3://bucket/none'])
def test_fetching_from_a_missing_bucket_is_answered_in_one_line(
        server: Server, url: str, tmp_path: Path) -> None:
    test_fetching_a_missing_file_is_answered_in_one_line(url, tmp_path)


@pytest.mark.parametrize(('url', 'answer'), [
    ('nosuch://bucket/run', r'nosuch://bucket/run cannot be used: Protocol not known'),
    ('backup', r"'backup' is not a URL: write s3://bucket/folder, or file:///.*/backup"),
    ('ftp://me:secret@host/run', r'ftp://\*\*\*@host/run was given with a password'),
    ('https://secret@host/run', r'https://\*\*\*@host/run was given with a password'),
    ('oci://bucket@namespace/run', r'the package ocifs is missing: .*python -m pip install ocifs'),
])
def test_a_url_that_cannot_work_is_refused_before_a_run_begins(url: str, answer: str) -> None:
    with pytest.raises(UserError, match=answer) as error:
        upload.Uploader(url, print)
    assert error.value.code == COMMAND
    assert 'secret' not in str(error.value)


def test_without_a_url_nothing_happens(tmp_path: Path) -> None:
    uploader = upload.Uploader('', print)
    uploader.put(write(tmp_path / 'ckpt.pt', b'one'))
    uploader.close(PATIENT)
    assert uploader.missing == []
    assert kinds(tmp_path) == {'ckpt.pt'}
