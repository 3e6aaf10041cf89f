"""Paths as users write them: a file or folder of that very name comes before what a glob matches."""
import gzip
import shutil
from pathlib import Path

import pytest

import evaluate
import sample
import train
from plaingpt.corpus import documents
from plaingpt.corpus.batches import Windows
from plaingpt.corpus.folder import data_folder, files_of
from plaingpt.errors import UserError
from plaingpt.paths import is_url, matching

ODD = ('a[1]', '[ab]', 'a*', 'a?', 'a::b', "it's", 'a b', '[', '{a}', 'a%20b', '#a', 'a:b')  # valid file names
SMALL = ['--n_layer=1', '--n_head=1', '--n_embd=8', '--block_size=8', '--max_iters=1', '--eval_iters=1', '--device=cpu',
         '--batch_size=2', '--gradient_accumulation_steps=1', '--sample_interval=0']


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: Path, content: str = 'x') -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding='utf-8')
    return path


def test_urls_are_distinguished_from_paths() -> None:
    assert [is_url(url) for url in ('s3://bucket/a', 'file:///a', 'memory://a', 'abfs://a@b/c')] == [True] * 4
    assert [is_url(path) for path in ('out', '/a//b', 'C:\\a', 'C:/a', './s3:/a', '', 'a b://c')] == [False] * 7


@pytest.mark.parametrize('name', ODD)
def test_the_name_of_an_existing_file_is_no_glob(name: str, tmp_path: Path) -> None:
    decoys = [write(Path(decoy)) for decoy in ('a1', 'a', 'b', 'ab', 'aa', 'a0b')]  # matched by the globs among them
    assert name not in map(str, decoys)
    assert all(path.name in map(str, decoys) for path in matching(Path(name)))
    write(Path(name, 'x.txt'))
    for path in (Path(name), tmp_path / name, Path(name, 'x.txt')):
        assert matching(path) == [path]
    for pattern in ('*', '[x].txt', '**/x.tx?', '*.txt'):
        assert matching(Path(name, pattern)) == [Path(name, 'x.txt')], 'the rest of the path is a glob as usual'
        assert matching(tmp_path / name / pattern) == [tmp_path / name / 'x.txt']


def test_a_glob_goes_through_folders_of_any_name_and_gives_each_file_once() -> None:
    for name in ('a[1]/b/x.txt', 'a[2]/b/x.txt', 'a[2]/.b/x.txt', 'c/b/x.txt'):
        write(Path(name))
    assert matching(Path('a*/*/x.txt')) == [Path('a[1]/b/x.txt'), Path('a[2]/b/x.txt')]
    assert matching(Path('**/**/x.txt')) == [Path('a[1]/b/x.txt'), Path('a[2]/b/x.txt'), Path('c/b/x.txt')]
    assert len(matching(Path('a*/*/x.txt'), hidden=True)) == 3
    assert matching(Path('nowhere/*')) == matching(Path('/nowhere/at/all')) == []


@pytest.mark.parametrize('name', ODD)
def test_texts_of_any_name_are_read_and_no_others(name: str, tmp_path: Path) -> None:
    """The texts are a file, a row, a packed file, a folder, and a file in it."""
    for decoy in ('a1', 'a', 'b', 'ab', 'aa', 'a0b'):
        write(Path(f'{decoy}.txt'), 'wrong')
        write(Path(decoy, 'x.txt'), 'wrong')
    write(Path(f'{name}.txt'), 'a file')
    write(Path(f'{name}.jsonl'), '{"text": "a row"}')
    Path(f'{name}.txt.gz').write_bytes(gzip.compress(b'packed'))
    write(Path(name, 'in', f'{name}.txt'), 'in a folder')

    def texts(path: str) -> list[str]:
        found = documents.find_files(path, tmp_path)
        return [*documents.read_documents(piece for file in found for piece in documents.find_pieces(file))]

    for folder in ('', './', f'{tmp_path}/'):
        for ending, content in (('.txt', 'a file'), ('.jsonl', 'a row'), ('.txt.gz', 'packed')):
            assert texts(f'{folder}{name}{ending}') == [content]
        for path in (f'{name}/in', f'{name}/in/', f'{name}/in/{name}.txt', f'{name}/in/*', f'{name}/*/**'):
            assert texts(f'{folder}{path}') == ['in a folder'], path


def test_a_path_that_looks_like_a_url_is_one_unless_it_exists(tmp_path: Path) -> None:
    write(Path('file:/a.txt'), 'here')
    assert documents.find_files('file://a.txt', tmp_path) == [f'{tmp_path}/file:/a.txt']
    write(tmp_path / 'b[1].txt', 'there')
    assert documents.find_files(f'file://{tmp_path}/b[1].txt', tmp_path) == [f'file://{tmp_path}/b[1].txt']
    [file] = documents.find_files(f'file://{tmp_path}/b*.txt', tmp_path)
    assert [*documents.read_documents(documents.find_pieces(file))] == ['there']


def test_a_tilde_is_the_home_of_the_user_unless_a_folder_is_called_so(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    for path in ('home/a.txt', 'home/b.txt', '~/b.txt'):
        write(Path(path))
    found = [documents.find_files(path, tmp_path) for path in ('~/a.txt', '~/a*', '~/b.txt')]
    assert found == [[f'{tmp_path}/home/a.txt'], [f'{tmp_path}/home/a.txt'], [f'{tmp_path}/~/b.txt']]


def corpora(tiny_dataset: Path, name: str) -> Path:
    """Copy a corpus to that name, and make other folders, which are no corpora, whose names it matches as a glob."""
    for decoy in ('my1data/train.bin', 'a/train.bin', 'data/my1data/x.txt', 'data/a/x.txt'):
        write(Path(decoy))
    return Path(shutil.copytree(tiny_dataset, name))


@pytest.mark.usefixtures('no_pictures')
@pytest.mark.parametrize('name', ['my[1]data', 'a*', 'a::b', '[a]'])
def test_a_corpus_a_run_and_its_copy_may_have_any_name(name: str, tiny_dataset: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr('plaingpt.corpus.folder.CORPORA', tmp_path / 'data')
    folder = corpora(tiny_dataset, name)
    for dataset, path in ((name, folder), (f'{name}/*.bin', folder / '*.bin'), (f'{name}/t*n.*', folder / 't*n.*')):
        assert data_folder(dataset) == path
        assert files_of(path, 'train') == [folder / 'train.bin']
    assert len(Windows(f'{name}/train.bin', 8)) == len(Windows(f'{name}/train*', 8)) > 10
    copy = '' if '::' in name else f'file://{tmp_path}/copies/{name}'  # in a URL, :: has a meaning
    train.main([f'--dataset={name}', f'--out_dir=out/{name}', f'--upload_to={copy}', *SMALL])
    assert sorted(path.name for path in Path('out').iterdir()) == [name]
    write(Path('out/a/ckpt.pt'), 'this is no checkpoint')
    found = [f'out/{name}', f'out/{name}/ckpt*.pt', f'out/{name}/ckpt.pt', *filter(None, [copy])]
    capsys.readouterr()
    for where in found:
        evaluate.main([f'--init_from={where}', '--eval_iters=1', '--device=cpu', '--json=x.json'])
        assert ', step 1 ' in capsys.readouterr().out
    sample.main([f'--out_dir=out/{name}', '--num_samples=1', '--max_new_tokens=3', '--device=cpu'])
    with pytest.raises(UserError, match='matches no file'):
        evaluate.find_checkpoints(f'out/{name}/best*.py')
