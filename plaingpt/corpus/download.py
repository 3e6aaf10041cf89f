"""Downloads, which appear on this machine whole or not at all."""
import hashlib
import http.client
import logging
import re
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plaingpt import console, files
from plaingpt.errors import DATA, UserError, refusal

BLOCK = 1 << 20  # bytes of a file that are read at a time
TIMEOUT = 30  # seconds that a download may stall


def download(url: str, path: Path, sha256: str = '', option: str = '--input') -> Path:
    """Return `path`; download it from `url`, unless the file exists and has that sha256. It never appears with wrong or
    missing bytes. The `option` is for a file that the user got in another way."""
    if sha256 and path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    if re.match(r'https?://[^/?#]*@', url):
        raise UserError(f'{url} was given with a password, which cannot be used here\n'
                        f'get the file in another way, and name it with {option}=PATH', DATA)
    try:
        answer = urllib.request.urlopen(url, timeout=TIMEOUT)
        path.parent.mkdir(parents=True, exist_ok=True)
        with answer, files.written_whole(path, is_shared=True) as file:
            shutil.copyfileobj(answer, file, BLOCK)
            if answer.length:  # bytes still to come; urlopen itself raises if the server's status is an error
                raise OSError(f'it broke off {answer.length} bytes early')
            file.seek(0)
            found = sha256 and hashlib.file_digest(file, 'sha256').hexdigest()
            if found != sha256:
                raise OSError(f'its sha256 is {found}, and {sha256} is expected')
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise refusal(error, f'{url} cannot be used', DATA,
                      f'get the file in another way, and name it with {option}=PATH') from error
    return path


def find_hub_files(dataset: str, config: str, revision: str, split: str = 'train') -> list[str]:
    """Return the paths or URLs of the files of one split of a dataset: on the Hugging Face hub, or in a folder. Nothing
    in the dataset is executed."""
    from datasets import load_dataset_builder

    console.say(f'looking for the files of {dataset}')  # without network it tries for half a minute
    with explained_hub(dataset):
        builder = load_dataset_builder(dataset, config or None, revision=revision or None)
        return [str(file) for file in builder.config.data_files[split]]


def fetch_hub_files(files: list[str]) -> list[str]:
    """Fetch these files into Hugging Face's cache on this machine, which continues an interrupted download."""
    from datasets import DownloadConfig, DownloadManager

    with explained_hub(files[0]):
        manager = DownloadManager(download_config=DownloadConfig(max_retries=5, resume_download=True))
        return [str(path) for path in manager.download(files)]


@contextmanager
def explained_hub(what: str) -> Iterator[None]:
    """Raise one message that says what cannot be downloaded, and silence what the libraries say about each attempt."""
    for library in ('datasets', 'huggingface_hub'):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise refusal(error, f'{what} cannot be downloaded', DATA,
                      'get its parquet files in another way, and name them with --input=PATH') from error
