"""The page docs/changing.md is true: its names exist, and its changes, made in a copy, train."""
import ast
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from plaingpt.run import checkpoint

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / 'docs/changing.md').read_text(encoding='utf-8')
PROSE = re.sub(r'^```.*?^```$', '', PAGE, flags=re.MULTILINE | re.DOTALL)
PATH = r'(?:[\w.-]+/)*(?:[\w.-]+\.(?:py|md|toml)|Dockerfile)|(?:[\w-]+/)+'
SINK = '''"""A sink."""
class TensorBoard:
    def __init__(self, out_dir: str) -> None:
        import a_package_that_is_missing
'''
CORPUS = """import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from plaingpt.corpus import tokenise, tokenizer
from plaingpt.corpus.folder import folder_for
to_dir = ''
text = 100 * 'Simple is better than complex.'
if True:
"""  # then the lines of the page


def named() -> Iterator[tuple[str, str]]:
    """Yield each (path, name) of the page; the name of a path alone is ''. In a paragraph of what to touch, names
    belong to the path before them; elsewhere only names that follow a path after a comma do."""
    for paragraph in PROSE.split('\n\n'):
        path, end = '', 0
        for span in re.finditer(r'(new )?`([^`\n]+)`', paragraph):
            between, end = paragraph[end:span.start()], span.end()
            if re.fullmatch(PATH, span[2]):
                path = '' if span[1] else span[2]
                yield from [(path, '')] if path else ()
            elif path and re.fullmatch(r'\w+', span[2]) and (paragraph.startswith('**Touch') or between == ', '):
                yield path, span[2]
            elif between != ', ':
                path = path if paragraph.startswith('**Touch') else ''


def bound(source: str) -> set[str]:
    """Return the names that a file binds."""
    nodes = list(ast.walk(ast.parse(source)))
    return ({node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            | {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)})


def test_every_file_function_and_name_exists() -> None:
    found = set(named())
    assert len(found) > 50
    assert {('train.py', 'lr_at'), ('plaingpt/run/checkpoint.py', 'config_of'), ('export.py', 'FORMATS')} <= found
    for path, name in sorted(found):
        assert (ROOT / path).exists(), path
        assert not name or name in bound((ROOT / path).read_text(encoding='utf-8')), f'{path} has no {name}'


def test_the_table_of_contents_is_that_of_the_page() -> None:
    heads = re.findall(r'^## (.*)$', PAGE, re.MULTILINE)
    assert len(heads) == 10
    anchors = [re.sub(r'[^\w -]', '', head).lower().replace(' ', '-') for head in heads]
    assert re.findall(r'^\| \[(.*?)\]\(#(.*?)\) \|', PAGE, re.MULTILINE) == list(zip(heads, anchors, strict=True))


def change(folder: Path) -> None:
    """Make every change that the page shows as a diff to the files in `folder`."""
    for path, lines in re.findall(r'^```diff (\S+)\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL):
        old, new = (''.join(f'{line[1:]}\n' for line in lines.splitlines() if line[0] in kept) for kept in (' -', ' +'))
        text = (folder / path).read_text(encoding='utf-8')
        assert text.count(f'\n{old}') == 1, f'{path} does not have this once:\n{old}'
        (folder / path).write_text(text.replace(f'\n{old}', f'\n{new}'), encoding='utf-8')


@pytest.mark.slow
def test_the_changes_work_together(tmp_path: Path, run_script: Callable[..., CompletedProcess[str]]) -> None:
    shutil.copytree(ROOT / 'plaingpt', tmp_path / 'plaingpt', ignore=shutil.ignore_patterns('__pycache__'))
    for file in ROOT.glob('*.py'):
        shutil.copy(file, tmp_path)
    change(tmp_path)
    (tmp_path / 'plaingpt/run/tensorboard.py').write_text(SINK, encoding='utf-8')
    script = tmp_path / 'train.py'
    script.write_text(script.read_text(encoding='utf-8').replace("'wsd'] = ", "'wsd', 'root'] = "), encoding='utf-8')

    prepare = tmp_path / 'data/new/prepare.py'
    prepare.parent.mkdir(parents=True)
    lines = PAGE.partition('## 7.')[2].partition('```python\n')[2].partition('```')[0]
    prepare.write_text(CORPUS + lines, encoding='utf-8')
    assert 'wrote train.bin, val.bin, checksums.npz and meta.json' in run_script(str(prepare), cwd=tmp_path).stdout

    settings = {'dataset': 'new', 'out_dir': tmp_path / 'out', 'n_layer': 1, 'n_head': 2, 'n_embd': 16,
                'block_size': 16, 'batch_size': 2, 'gradient_accumulation_steps': 2, 'eval_interval': 4,
                'eval_iters': 2, 'sample_interval': 0, 'device': 'cpu', 'schedule': 'root', 'warmup_iters': 0,
                'lr_decay_iters': 4, 'learning_rate': 1e-2, 'min_lr': 0}
    arguments = [f'--{name}={value}' for name, value in settings.items()]
    first = run_script(str(script), *arguments, '--max_iters=4', cwd=tmp_path)
    again = run_script(str(script), *arguments, '--max_iters=6', '--init_from=resume', '--epsilon=1e-6', cwd=tmp_path)
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr

    assert "tensorboard is off: No module named 'a_package_that_is_missing'; the run continues" in first.stdout
    assert re.search(r'^resuming at step 4, with .*epsilon=1e-06 \(was 1e-08\)', again.stdout, re.MULTILINE)
    rows = [json.loads(line) for line in (tmp_path / 'out/metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    assert [row['lr'] for row in rows[:3]] == pytest.approx([1e-2, 0.5e-2, (1 - 0.5**0.5) * 1e-2])
    assert rows[0]['loss_scale'] == 1
    assert 0 <= rows[0]['val_accuracy'] <= rows[0]['val_top5_accuracy'] <= 1
    state = checkpoint.load(tmp_path / 'out/ckpt.pt')
    assert [len(group['params']) for group in state['optimizer']['param_groups']] == [2, 4, 3]
    assert all('mu_product' in moments for moments in state['optimizer']['state'].values()), 'the optimizer is NAdam'
    assert 'top5_accuracy' in state['best']
