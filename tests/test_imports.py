"""Imports between modules: arrows point down the list below, and never form a circle. Imports inside functions count,
too."""
import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = {'train', 'sample', 'evaluate', 'export', 'learn', 'xray'}
PLAIN = {'train_trivialised', 'parallel_trivialised'}  # stages whose parts other modules import
FLOORS: list[set[str]] = [  # from the ground up
    {f'plaingpt.{name}' for name in (
        '__main__', 'chance', 'console', 'errors', 'files', 'lock', 'page', 'paths', 'published', 'schema')},
    {'model', 'model_modern', 'model_trivialised', 'model_modern_trivialised', 'tokenizer_trivialised', 'configurator'},
    {'plaingpt.machines', 'plaingpt.muon'},
    {'plaingpt.corpus'},
    PLAIN,
    {'plaingpt.formats'},
    {'plaingpt.run', 'plaingpt.metrics', 'plaingpt.tasks'},
    {'plaingpt.init_from'},
    {'plaingpt.sizes', 'plaingpt.plan', 'plaingpt.check', 'plaingpt.encoder', 'plaingpt.tiny_shakespeare'},
    {'plaingpt.learning'},
    STAGES,
    {path.stem for path in ROOT.glob('course/*.py')},  # which are no package: each can be run
]
OF_OTHER_STAGES = {('train', 'sample'), ('train', 'evaluate')}  # the only stage that may use functions of other stages
OF_LEARNING = {'learn', 'xray'}  # the only stages that may import plaingpt.learning
EXCEPTIONS = {('model', 'plaingpt.formats.huggingface')}  # GPT.from_pretrained imports it on use


def module_of(path: Path) -> str:
    name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    return name.removesuffix('.__init__').removeprefix('course.')


MODULES = {module_of(path): path
           for path in (*ROOT.glob('*.py'), *ROOT.glob('plaingpt/**/*.py'), *ROOT.glob('course/*.py'))}


def imports_of(source: str) -> Iterator[str]:
    """Yield the modules of this project that a file names in its import statements."""
    for node in ast.walk(ast.parse(source)):
        assert getattr(node, 'level', 0) == 0 and getattr(node, 'attr', getattr(node, 'id', '')) != 'import_module', (
            'import by full name, in an import statement')
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            inner = {f'{node.module}.{alias.name}' for alias in node.names} & MODULES.keys()
            yield from inner or {node.module}


def floor_of(module: str) -> int:
    [number] = [i for i, rooms in enumerate(FLOORS) if module in rooms or module.rpartition('.')[0] in rooms]
    return number


def complaints(imports: dict[str, set[str]]) -> Iterator[str]:
    """Yield each arrow that points up, and each circle."""
    for module, others in imports.items():
        for other in others:
            is_fine = (module, other) in EXCEPTIONS | OF_OTHER_STAGES or (
                floor_of(other) <= floor_of(module) and not {module, other} <= STAGES)
            if not is_fine:
                yield f'{module} imports {other}, which stands above it'
            if other.startswith('plaingpt.learning') and not (
                    module in OF_LEARNING or module.startswith('plaingpt.learning')):
                yield f'{module} imports {other}, which is for {sorted(OF_LEARNING)} alone'
    left = {module: {other for other in others if (module, other) not in EXCEPTIONS}
            for module, others in imports.items()}
    while ends := [module for module, others in left.items() if not others & left.keys()]:
        for module in ends:
            del left[module]
    if left:
        yield f'these import each other in a circle, or one that does: {", ".join(sorted(left))}'


def test_imports_point_down() -> None:
    imports = {module: set(imports_of(path.read_text(encoding='utf-8'))) - {module} for module, path in MODULES.items()
               if path.name != '__init__.py'}
    assert sum(map(len, imports.values())) > 100, 'the imports have been read'
    assert list(complaints(imports)) == []


def test_the_exception_is_one_import_in_one_function() -> None:
    [(module, other)] = EXCEPTIONS
    tree = ast.parse(MODULES[module].read_text(encoding='utf-8'))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
                 and other in imports_of(ast.unparse(node))]
    assert [function.name for function in functions] == ['from_pretrained']
    assert not [node for node in tree.body if isinstance(node, ast.ImportFrom) and 'formats' in (node.module or '')]


@pytest.mark.parametrize(('imports', 'names'), [
    ({'model': {'plaingpt.run.log'}}, 'model imports plaingpt.run.log'),
    ({'plaingpt.corpus.order': {'plaingpt.tasks'}}, 'plaingpt.corpus.order imports plaingpt.tasks'),
    ({'sample': {'export'}}, 'sample imports export'),
    ({'plaingpt.plan': {'train'}}, 'plaingpt.plan imports train'),
    ({'sample': {'rung'}}, 'sample imports rung'),
    ({'train': {'plaingpt.learning.look'}}, 'train imports plaingpt.learning.look'),
    ({'plaingpt.run.log': {'plaingpt.run.run'}, 'plaingpt.run.run': {'plaingpt.run.log'}}, 'in a circle'),
])
def test_an_arrow_that_points_up_and_a_circle_are_named(imports: dict[str, set[str]], names: str) -> None:
    [complaint] = complaints(imports)
    assert names in complaint


def test_an_import_inside_a_function_is_read() -> None:
    source = 'def f():\n from plaingpt.run import log, upload\n from plaingpt.errors import UserError\n import train'
    assert set(imports_of(source)) == {'plaingpt.run.log', 'plaingpt.run.upload', 'plaingpt.errors', 'train'}


def test_no_setting_shadows_a_module() -> None:
    prepare = (f'data.{path.parent.name}.prepare' for path in ROOT.glob('data/*/prepare.py'))
    for script in (*sorted(STAGES | PLAIN), *prepare):
        tree = ast.parse((ROOT / f'{script.replace(".", "/")}.py').read_text(encoding='utf-8'))
        settings = {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)
                    and isinstance(node.target, ast.Name)}
        imported = {alias.asname or alias.name for node in ast.walk(tree) for alias in getattr(node, 'names', [])
                    if isinstance(node, ast.Import | ast.ImportFrom)}
        assert settings & imported == set(), script
