"""A part of a plain file that a learner writes anew: cut out of it by `ast` when it is asked for, so that no copy of
any code can grow old."""
import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

Results = list[tuple[str, Any]]  # what was asked, and the answer
HOLE = 'raise NotImplementedError'


@dataclass(frozen=True)
class Exercise:
    """A part of a plain file, such as 'attend' or 'LayerNorm.forward', that a learner writes anew."""

    where: ModuleType  # the plain file
    part: str
    run: Callable[[Any], Results]  # asks a module that has the part
    task: str
    hint: str
    probe: Callable[[Any], str | None] = lambda module: None  # says what is wrong with it, if it can tell

    @property
    def name(self) -> str:
        """Return the name of the function or class to write."""
        return self.part.partition('.')[0]

    @property
    def file(self) -> Path:
        return Path(str(self.where.__file__))

    def nodes(self) -> tuple[ast.FunctionDef | ast.ClassDef, ast.FunctionDef]:
        """Return the function or class in the file's syntax tree, and the function whose body is cut out."""
        name, _, method = self.part.partition('.')
        outer = find(ast.parse(self.file.read_text(encoding='utf-8')).body, name)
        inner = find(outer.body, method) if method else outer
        assert isinstance(inner, ast.FunctionDef)
        return outer, inner

    def body(self) -> tuple[int, int]:
        """Return the lines, the first and the one after the last, counted from 0, of what the function does."""
        _, function = self.nodes()
        statements = function.body[ast.get_docstring(function) is not None:]
        return statements[0].lineno - 1, function.end_lineno or 0

    def lines(self) -> list[str]:
        return self.file.read_text(encoding='utf-8').splitlines()

    def with_body(self, new: str) -> str:
        """Return the text of the whole file, with another body of the part."""
        (first, end), lines = self.body(), self.lines()
        return '\n'.join([*lines[:first], new, *lines[end:], ''])

    def text(self, new: str | None = None) -> str:
        """Return the text of the part alone, with what it imports, and with another body if one is given."""
        (outer, _), (first, end), lines = self.nodes(), self.body(), self.lines()
        start = min([outer.lineno, *(decorator.lineno for decorator in outer.decorator_list)]) - 1
        middle = lines[first:end] if new is None else [new]
        text = [*lines[start:first], *middle, *lines[end:outer.end_lineno]]
        return '\n'.join([*self.imports(), *self.neighbours(), '', '', *text, ''])

    def hole(self) -> str:
        """Return what stands in place of the body when a learner starts."""
        first, end = self.body()
        written = [line for line in self.lines()[first:end] if line.strip() and not line.strip().startswith('#')]
        indent = ' ' * (len(written[0]) - len(written[0].lstrip()))
        size = 'one line' if len(written) == 1 else f'{len(written)} lines'
        return f'{indent}# write this; the plain file needs {size}\n{indent}{HOLE}'

    def imports(self) -> list[str]:
        """Return the import statements that the part needs: those of its file, and those of the file's other parts."""
        outer, _ = self.nodes()
        used = {node.id for node in ast.walk(outer) if isinstance(node, ast.Name)}
        lines, neighbours = ['import math', 'import torch'], set()
        for node in ast.parse('\n'.join(self.lines())).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                kept = [alias for alias in node.names if (alias.asname or alias.name).partition('.')[0] in used]
                if kept:
                    node.names = kept
                    lines.append(ast.unparse(node))
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                neighbours |= {target.id for target in targets if isinstance(target, ast.Name)} & used
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                neighbours |= {node.name} & used - {self.name}
        if neighbours:
            lines.append(f'from {self.where.__name__} import {", ".join(sorted(neighbours))}')
        return list(dict.fromkeys(lines))

    def neighbours(self) -> list[str]:
        """Return comments that say what the functions of this project do that the part calls."""
        outer, _ = self.nodes()
        names = dict.fromkeys(node.id for node in ast.walk(outer) if isinstance(node, ast.Name))
        called = [getattr(self.where, name, None) for name in names if name != self.name]
        lines = []
        for function in filter(inspect.isfunction, called):
            arguments = ', '.join(inspect.signature(function).parameters)
            lines += textwrap.wrap(f'{function.__name__}({arguments}): {inspect.getdoc(function)}', 118,
                                   initial_indent='# ', subsequent_indent='#     ')
        return lines


def find(body: list[ast.stmt], name: str) -> ast.FunctionDef | ast.ClassDef:
    """Return the function or class of this name."""
    return next(node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name)
