"""
Copies in another place: checkpoints are uploaded to, and fetched from, any folder that fsspec can write to, such as
s3://bucket/folder.

Uploading happens in the background of training, and never stops it. Credentials come from the environment and the files
where each service's own tools look for them; none is taken from a URL, since URLs end up in checkpoints and logs.
"""
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from threading import Condition, Thread
from typing import Any

from plaingpt import console, files
from plaingpt.errors import CHECKPOINT, COMMAND, UserError, first_line, missing_package, refusal
from plaingpt.paths import is_url

PAUSES = (1.0, 5.0, 25.0)  # seconds between one attempt to upload a file and the next
OBJECT_STORES = ('s3://', 's3a://', 'gs://', 'gcs://', 'abfs://', 'abfss://', 'az://')
CHECKPOINTS = re.compile(r'ckpt(\.\d+)?\.pt|best\.pt')
UPLOADING = '.uploading'  # how the name of a waiting copy ends
SECRETS = re.compile(r'SECRET|TOKEN|PASSWORD|KEY|CONNECTION_STRING')  # in the names of environment variables
SHORTEST_SECRET = 8  # characters; a shorter one may be part of any word


def reason(error: BaseException) -> str:
    """Return the first line of an error, without secrets."""
    return without_secrets(first_line(error))


def without_secrets(text: str) -> str:
    """Return a text without the secrets in its URLs, and without the values of environment variables that are named
    like secrets."""
    text = console.shown(text)
    hidden = {value for name, value in os.environ.items() if SECRETS.search(name) and len(value) >= SHORTEST_SECRET}
    for value in sorted(hidden, key=len, reverse=True):  # one may be part of another
        text = text.replace(value, '***')
    return text


def open_url(url: str, code: int) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it. The network is not used yet. Raise UserError with this code
    for a path, a URL with a password, or an unknown protocol, and if a protocol's package is missing."""
    import fsspec
    if not is_url(url):
        raise UserError(f'{url!r} is not a URL: write s3://bucket/folder, or file://{Path(url).absolute()}', code)
    # with http what stands before the @ is a secret even if it is alone; with sftp it is a name
    if re.search(r'https?://[^/?#]*@|://[^/]*:[^/]*@', url):
        raise UserError(f'{url} was given with a password, which checkpoints and logs would show: leave it out, '
                        'and put it into the environment', code)
    try:
        # other machines write there, so an earlier listing may be out of date
        elsewhere, path = fsspec.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise missing_package(error) from None
    except Exception as error:  # each file system raises errors of its own
        raise UserError(f'{url} cannot be used: {reason(error)}', code) from None
    return elsewhere, path.rstrip('/')


def checkpoints(url: str) -> list[str]:
    """Return the names of the checkpoint files in a folder; none if there is no such folder or bucket. Raise UserError
    if that cannot be known: no permission, no network."""
    elsewhere, folder = open_url(url, CHECKPOINT)
    try:
        names = [Path(path).name for path in elsewhere.ls(folder, detail=False)]
    except FileNotFoundError:
        return []
    except Exception as error:  # each file system raises errors of its own
        raise UserError(f'{url} cannot be read: {reason(error)}', CHECKPOINT) from None
    return sorted(name for name in names if CHECKPOINTS.fullmatch(name))


def fetch(url: str, folder: Path) -> list[Path]:
    """Copy a checkpoint file (*.pt), or those of the folder at `url`, into a local folder, each whole or not at all.
    Raise UserError if there is none, or it cannot be reached."""
    elsewhere, path = open_url(url, CHECKPOINT)
    sources = [path] if path.endswith('.pt') else [f'{path}/{name}' for name in checkpoints(url)]
    if not sources:
        raise UserError(f'no checkpoint at {url}', CHECKPOINT)
    targets = [folder / Path(source).name for source in sources]
    for source, target in zip(sources, targets, strict=True):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with files.written_whole(target, is_shared=True) as file:
                elsewhere.get_file(source, file.name)
        except Exception as error:  # each file system raises errors of its own
            refused = refusal(error, f'{url} cannot be fetched to {target}', CHECKPOINT)
            raise UserError(without_secrets(str(refused)), refused.code) from None
    return targets


def snapshots(folder: Path) -> list[Path]:
    """Return the copies of checkpoints that wait, or that a killed process has left."""
    return files.left_by_kills(folder, rf'\.({CHECKPOINTS.pattern})', UPLOADING)


class Uploader:
    """A copier of files to a folder anywhere, in the background and in order. If several versions of a file wait, only
    the newest is uploaded, so that with a slow network at most two of each stay on the disk."""

    def __init__(self, url: str, say: Callable[[str], None]) -> None:
        """Call `say` with a line for each failure, also from the background. If `url` is '', do nothing at all. Raise
        UserError for a URL that no installed file system can serve."""
        self.url, self.say = url.rstrip('/'), say
        self.changed = Condition()  # its lock guards what follows; say() is called without it
        self.waiting: dict[str, Path] = {}  # names, and copies of the newest versions, not uploaded yet
        self.failed: set[str] = set()  # the names among them that wait for the next put
        self.busy_with: Path | None = None
        self.is_closed = not url
        if url:
            self.elsewhere, self.folder = open_url(url, COMMAND)
            Thread(target=self.work, name='uploader', daemon=True).start()  # a daemon does not delay the end

    @property
    def missing(self) -> list[str]:
        """Return the names of the files whose newest version is not uploaded, or not yet."""
        with self.changed:
            return list(self.waiting)

    def put(self, path: Path) -> None:
        """Upload the file as it is now, and return at once. `path` may then be renamed, replaced or deleted, though not
        written to in place. Uploads that failed earlier are tried again as well."""
        if self.is_closed:
            return
        snapshot = path.with_name(f'.{path.name}.{secrets.token_hex(4)}{UPLOADING}')
        why_not = ''
        with self.changed:
            self.waiting[path.name] = snapshot
            self.failed.clear()
            try:
                self.sweep(path.parent)
                files.link(path, snapshot)
            except OSError as error:  # a full disk, say
                why_not = reason(error)
                self.failed.add(path.name)
            self.changed.notify_all()
        if why_not:
            self.complain(path.name, why_not)

    def close(self, seconds: float) -> None:
        """Wait at most `seconds` for uploads that are under way. Then give up, with a line for each file that is
        missing."""
        with self.changed:
            self.failed.clear()
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.waiting.keys() <= self.failed, seconds)
            self.is_closed = True
            late = [name for name in self.waiting if name not in self.failed]
            for snapshot in {*self.waiting.values()} - {self.busy_with}:
                snapshot.unlink(missing_ok=True)
            self.changed.notify_all()
        for name in late:
            self.complain(name, f'{seconds:g} seconds were not enough')

    def work(self) -> None:
        """Upload the waiting files, one after the other, until the end: this is what the thread does."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.is_closed or self.waiting.keys() - self.failed)
                if self.is_closed:
                    return
                name = next(name for name in self.waiting if name not in self.failed)
                snapshot = self.busy_with = self.waiting[name]
            why_not = self.attempt(name, snapshot)
            if why_not and not self.is_superseded(name, snapshot):
                self.complain(name, why_not)
            with self.changed:
                self.busy_with = None
                if why_not and not self.is_superseded(name, snapshot):
                    self.failed.add(name)
                elif not why_not and self.waiting.get(name) == snapshot:
                    del self.waiting[name]
                self.sweep(snapshot.parent)
                self.changed.notify_all()

    def attempt(self, name: str, snapshot: Path) -> str:
        """Try to upload a file, and again after each pause, until that succeeds or a newer version waits. Return why it
        failed, or ''."""
        for pause in (*PAUSES, 0.0):
            try:
                self.upload(name, snapshot)
                return ''
            except Exception as error:  # each file system raises errors of its own
                why_not = reason(error)
            with self.changed:
                if self.changed.wait_for(lambda: self.is_superseded(name, snapshot), pause):
                    break
        return why_not

    def is_superseded(self, name: str, snapshot: Path) -> bool:
        return self.is_closed or self.waiting.get(name) != snapshot

    def upload(self, name: str, snapshot: Path) -> None:
        target = f'{self.folder}/{name}'
        if self.url.startswith(OBJECT_STORES):  # these show no object before it is whole, and renaming would copy it
            self.elsewhere.put_file(str(snapshot), target)
            return
        self.elsewhere.makedirs(self.folder, exist_ok=True)
        self.elsewhere.put_file(str(snapshot), target + files.UNFINISHED)
        self.elsewhere.mv(target + files.UNFINISHED, target)

    def complain(self, name: str, why_not: str) -> None:
        self.say(f'{console.shown(self.url)}/{name} is not uploaded: {why_not}; the run continues')

    def sweep(self, folder: Path) -> None:
        """Delete the copies of older versions, and those that a killed process has left."""
        for snapshot in {*snapshots(folder)} - {*self.waiting.values(), self.busy_with}:
            snapshot.unlink(missing_ok=True)
