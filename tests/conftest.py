"""Shared parts of the tests: texts, a vocabulary, a small corpus, and a way to run a script as a user does."""
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.waiting import PATIENT

if TYPE_CHECKING:
    import tiktoken
    from selenium.webdriver import Chrome

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / 'data'  # its README describes each file
OURS = sorted('.'.join(path.relative_to(ROOT).with_suffix('').parts)
              for path in (*ROOT.glob('*.py'), *ROOT.glob('plaingpt/**/*.py')))  # the modules of this project

# Before torch is imported, here and in every process that a test starts: one thread each, since threads that wait for
# each other starve when other programs want the cores; and no network.
os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', HF_HUB_OFFLINE='1')

# test files, the longest first
TAKE_MINUTES = ('test_kills.py', 'test_watch.py', 'test_strategies.py', 'test_next.py', 'test_commands.py',
                'test_launch.py', 'test_pipeline.py', 'test_readme.py', 'test_rounding.py', 'test_errors.py')


def pytest_configure(config: pytest.Config) -> None:
    """Turn deprecation warnings in this project's own files into errors, whatever the libraries do among themselves.
    And let the signals that tests send arrive although `nohup` or `&` started the tests: a run leaves alone what was
    ignored when it began."""
    for category in ('DeprecationWarning', 'FutureWarning'):
        config.addinivalue_line('filterwarnings', fr'error::{category}:({"|".join(OURS)})\Z')
    for name in ('SIGINT', 'SIGQUIT', 'SIGHUP'):  # Windows lacks two of them
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if name == 'SIGINT' else signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take minutes: else one of two processes would wait at the end for the other."""
    places = {name: place for place, name in enumerate(TAKE_MINUTES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests marked `gpu` if the machine has none."""
    if item.get_closest_marker('gpu') and not importlib.import_module('torch').cuda.is_available():
        pytest.skip('needs a GPU')


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Have every test draw the same numbers, alone or after others."""
    random.seed(0)
    if 'torch' in sys.modules:
        sys.modules['torch'].manual_seed(0)


@pytest.fixture(scope='module')
def no_pictures() -> Iterator[None]:
    """Have the runs of a file draw no loss.png and no report.html, which cost as much time as a hundred of their
    steps."""
    def draw_nothing(log: object) -> None:
        """Stand in for Log.plot and Log.report."""

    with pytest.MonkeyPatch.context() as patch:
        for name in ('plot', 'report'):
            patch.setattr(f'plaingpt.run.log.Log.{name}', draw_nothing)
        yield


@pytest.fixture
def float64() -> Iterator[None]:
    """Have a test train in float64, where rounding stays rounding: see comparing.py."""
    with importlib.import_module('tests.comparing').in_float64():
        yield


@pytest.fixture(scope='session')
def documents() -> list[str]:
    """Return texts of every kind, from tests/data/documents.jsonl. The half character that one of them has becomes
    U+FFFD."""
    lines = (DATA / 'documents.jsonl').read_bytes().splitlines()
    return [json.loads(line)['text'].replace('\ud83d', '\ufffd') for line in lines if line]


@pytest.fixture(scope='session')
def small_encoding() -> 'tiktoken.Encoding':
    """Return the vocabulary in tests/data/vocabulary: 50,257 ids, as GPT-2 has, but most of them for other tokens."""
    constructor = importlib.import_module('tests.data.vocabulary.tiktoken_ext.openai_public').gpt2
    return importlib.import_module('tiktoken').Encoding(**constructor())


@pytest.fixture
def gpt2_stand_in(small_encoding: 'tiktoken.Encoding', monkeypatch: pytest.MonkeyPatch) -> 'tiktoken.Encoding':
    """Return the small vocabulary under the name 'gpt2', here and in every process that the test starts: for all that
    does not depend on which id stands for which token."""
    monkeypatch.setitem(importlib.import_module('tiktoken.registry').ENCODINGS, 'gpt2', small_encoding)
    monkeypatch.setenv('PYTHONPATH', str(DATA / 'vocabulary'), prepend=os.pathsep)
    return small_encoding


@pytest.fixture(scope='session')
def shared_data() -> Path:
    """Return the folder beside the checkout that holds real texts and GPT-2's own vocabulary, which cannot be part of
    the repository. It serves only what tests/data cannot show: that published numbers come out."""
    folder = ROOT.parent / 'shared/data'
    if not folder.is_dir():
        pytest.skip(f'compares with published data, which is not in {folder}')
    return folder


@pytest.fixture
def tiktoken_cache(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put GPT-2's own vocabulary where tiktoken looks for it, so that it downloads nothing."""
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(shared_data / 'tiktoken'))
    return shared_data / 'tiktoken'


@pytest.fixture(scope='session')
def run_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python script arguments...` in a process of its own: run_script('sample.py', '--start=x', cwd=tmp_path,
    environment={'NAME': 'value'}, typed='a line'). A script's path starts at the root of the repository, which is also
    its working folder by default."""

    def run(script: str, *arguments: str, cwd: Path = ROOT, environment: Mapping[str, str] | None = None,
            typed: str = '') -> subprocess.CompletedProcess[str]:
        warnings = ','.join(f'error::{category}:{module}' for category in ('DeprecationWarning', 'FutureWarning')
                            for module in ('__main__', *OURS))
        return subprocess.run([sys.executable, str(ROOT / script), *arguments], cwd=cwd, input=typed,
                              env={**os.environ, 'PYTHONWARNINGS': warnings, **(environment or {})},
                              capture_output=True, text=True, encoding='utf-8', timeout=PATIENT)

    return run


@pytest.fixture(scope='module')
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator['Chrome']:
    """Yield Chromium without a window, with a profile of its own and no network, if Debian's chromium and
    chromium-driver are installed."""
    webdriver = pytest.importorskip('selenium.webdriver', reason='looks at a page in a browser: selenium is missing')
    programs = [shutil.which('chromium'), shutil.which('chromedriver')]
    if None in programs:
        pytest.skip('looks at a page in a browser: install chromium and chromium-driver')
    options = webdriver.ChromeOptions()
    options.binary_location, driver = programs
    quiet = 'disable-quic no-first-run disable-background-networking disable-component-update disable-sync'
    for option in ('headless', 'no-sandbox', 'disable-gpu', *quiet.split(), 'disable-dev-shm-usage',
                   f'user-data-dir={tmp_path_factory.mktemp("profile")}'):
        options.add_argument(f'--{option}')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    opened.set_page_load_timeout(PATIENT)
    yield opened
    opened.quit()


@pytest.fixture(scope='session')
def tiny_text() -> str:
    """Return about 50 kB of real text that every machine has: the source of Python's json package."""
    files = sorted(Path(json.__file__).parent.glob('*.py'))
    return '\n'.join(file.read_text(encoding='utf-8') for file in files)


@pytest.fixture(scope='session')
def tiny_dataset(tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a corpus of characters as prepare.py would leave it: nine tenths of tiny_text in train.bin, the rest in
    val.bin. It is written without the project's own writer, so that this function states the format. `--dataset=FOLDER`
    trains on it, and `--hellaswag=FOLDER/hellaswag.jsonl` asks questions in these characters."""
    folder = tmp_path_factory.mktemp('tiny')
    tokenizer = importlib.import_module('plaingpt.corpus.tokenizer').build('char', lambda: [tiny_text], eot=False)
    cut = len(tiny_text) * 9 // 10
    numpy, splits, checksums = importlib.import_module('numpy'), {}, {}
    for split, text in [('train', tiny_text[:cut]), ('val', tiny_text[cut:])]:
        ids = tokenizer.encode(text)
        packed = b''.join(i.to_bytes(2, 'little') for i in ids)
        (folder / f'{split}.bin').write_bytes(packed)
        hashes = {'sha256': packed, 'head': packed[:4096], 'tail': packed[-4096:]}
        splits[split] = {'tokens': len(ids), 'documents': 1, 'bytes': len(text.encode()), 'largest_id': max(ids),
                         **{name: hashlib.sha256(part).hexdigest() for name, part in hashes.items()}}
        blocks = [packed[start:start + 65536] for start in range(0, len(packed), 65536)]
        checksums[splits[split]['sha256']] = numpy.array([zlib.crc32(block) for block in blocks], dtype='<u4')
    numpy.savez(folder / 'checksums.npz', **checksums)
    meta = {'format': 1, 'tokenizer': tokenizer.reference(), 'vocab_size': tokenizer.n_vocab, 'dtype': 'uint16',
            'source': "Python's json package", 'created_by': 'tests/conftest.py', 'splits': splits}
    (folder / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    questions = [
        {'ind': i, 'activity_label': 'Reading', 'ctx_a': f'def read{i}(self):', 'ctx_b': 'return', 'label': i % 4,
         'ctx': f'def read{i}(self): return', 'endings': ['self', 'None', 'a string', f'{i} tokens and more']}
        for i in range(5)]
    (folder / 'hellaswag.jsonl').write_text('\n'.join(map(json.dumps, questions)), encoding='utf-8')
    return folder
