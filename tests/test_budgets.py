"""The package's budgets: sizes, complexity, imports in one direction, no foreign underscore names, no em dash.

    python -m tests.test_budgets     # print what is over budget now, as EXCEPTIONS has it
"""
import ast
import pprint
from collections.abc import Iterator
from pathlib import Path

import torch.nn as nn

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'timm_aikd'
FILE_LINES, CLASS_LINES, FUNCTION_LINES, COMPLEXITY = 250, 200, 40, 10

# A file may import from its own line and the lines above, a folder not from another of its line.
LAYERS = (
    {'errors', 'loss', 'calibration', 'inference', 'folding', 'features'},
    {'ranks', 'config'},
    {'state', 'step', 'epoch'},
    {'discriminator', 'memory', 'teacher'},
    {'teaching', 'terms', 'aikd'},
    {'run'},
    {'evaluator', 'task'},
    {'script', 'commands'},
    {'__init__', '__main__'},
)
EXCEPTIONS: dict[str, set[str]] = {}  # kind -> places; exact, so that it shrinks

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BRANCHES = (
    ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.comprehension, ast.match_case,
    ast.Assert)


class Module:
    """A file of the package, parsed."""

    def __init__(self, path: Path, package: Path):
        self.path, self.text = path.relative_to(package).as_posix(), path.read_text()
        self.tree = ast.parse(self.text)
        self.parts = path.relative_to(package).with_suffix('').parts
        self.name = '.'.join(self.parts).removesuffix('.__init__')
        self.names: set[str] = set()  # defined or set anywhere in it
        for node in ast.walk(self.tree):
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                self.names.add(node.name)
            elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
                self.names.add(node.id if isinstance(node, ast.Name) else node.attr)

    def imports(self) -> Iterator[tuple[str, str]]:
        """For each import from the package, at any place: the module (dotted, without the package), and the name."""
        for node in seen_at_run_time(self.tree):
            if isinstance(node, ast.Import):
                names = [alias.name.partition('.') for alias in node.names]
                yield from ((module, '') for top, _, module in names if top == 'timm_aikd')
            elif isinstance(node, ast.ImportFrom):
                base = ('timm_aikd', *self.parts[:-node.level]) if node.level else ()
                source = (*base, *(node.module.split('.') if node.module else ()))
                if source[:1] == ('timm_aikd',):
                    yield from (('.'.join(source[1:]), alias.name) for alias in node.names)


def read(package: Path) -> list[Module]:
    return [Module(path, package) for path in sorted(package.rglob('*.py'))]


def seen_at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == 'TYPE_CHECKING':
            continue
        yield node
        yield from seen_at_run_time(node)


def definitions(tree: ast.AST, prefix: str = '') -> Iterator[tuple[str, ast.AST]]:
    """Functions and classes with their dotted names."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield prefix + node.name, node
            yield from definitions(node, f'{prefix}{node.name}.')
        else:
            yield from definitions(node, prefix)


def complexity(function: ast.AST) -> int:
    """Cyclomatic complexity after McCabe, boolean operators counted; inner functions have their own."""
    def count(node: ast.AST) -> int:
        total = 0
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
                continue
            total += isinstance(child, BRANCHES) + count(child)
            total += len(child.values) - 1 if isinstance(child, ast.BoolOp) else 0
            total += len(child.ifs) if isinstance(child, ast.comprehension) else 0
        return total
    return 1 + count(function)


def lines(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


def body_lines(function: ast.AST) -> int:
    """Without signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def sizes(modules: list[Module]) -> Iterator[tuple[str, str]]:
    for module in modules:
        if len(module.text.splitlines()) > FILE_LINES:
            yield 'long files', module.path
        if '\N{EM DASH}' in module.text:
            yield 'em dashes', module.path
        for name, node in definitions(module.tree):
            where = f'{module.path}: {name}'
            if isinstance(node, ast.ClassDef):
                if lines(node) > CLASS_LINES:
                    yield 'long classes', where
                continue
            if body_lines(node) > FUNCTION_LINES:
                yield 'long functions', where
            if complexity(node) > COMPLEXITY:
                yield 'complex functions', where


def layer(name: str) -> int:
    """Number of the line of `LAYERS`; -1 where there is none."""
    top = name.split('.')[0]
    return next((number for number, names in enumerate(LAYERS) if top in names), -1)


def wrong_imports(modules: list[Module]) -> Iterator[tuple[str, str]]:
    known = {module.name for module in modules}
    folders = {module.parts[0] for module in modules if len(module.parts) > 1}
    for module in modules:
        if layer(module.name) < 0:
            yield 'files in no layer', module.path
        for source, name in module.imports():
            target = f'{source}.{name}'.strip('.')
            target = target if target in known else source
            top = target.split('.')[0]
            if top in ('', module.parts[0]):  # the version, or within a folder
                continue
            beside = layer(top) == layer(module.name) and not folders.isdisjoint({top, module.parts[0]})
            if beside or layer(top) > layer(module.name):
                yield 'wrong imports', f'{module.path}: {target}'


def foreign_names(modules: list[Module]) -> Iterator[tuple[str, str]]:
    """Underscore names of another module: imported, or an attribute that is set nowhere in this one."""
    def is_private(name: str) -> bool:
        return name.startswith('_') and not name.startswith('__')

    private = {name for module in modules for name in module.names if is_private(name)} - set(vars(nn.Module()))
    for module in modules:
        for source, name in module.imports():
            if is_private(name):
                yield 'foreign names', f'{module.path}: {source}.{name}'
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and node.attr in private - module.names:
                yield 'foreign names', f'{module.path}: {node.attr}'


def over_budget(package: Path = PACKAGE) -> dict[str, set[str]]:
    modules, found = read(package), {}
    for kind, where in (*sizes(modules), *wrong_imports(modules), *foreign_names(modules)):
        found.setdefault(kind, set()).add(where)
    return found


def test_the_package_keeps_its_budgets():
    assert over_budget() == EXCEPTIONS


def test_what_is_over_budget_is_found(tmp_path):
    files = {
        'loss.py': 'from .config import _option\nfrom . import nowhere\n' + 250 * '\n',
        'config.py': '_option = 1\n"\N{EM DASH}"\n',
        'memory/__init__.py': 'from ..teacher.spec import parse\nfrom .table import rows\n',
        'memory/table.py': 'from timm_aikd.aikd import Aikd\nclass Table:\n' + 200 * '    x = 1\n',
        'teacher/spec.py': 'def parse(x):\n    """Doc."""\n' + 41 * '    x\n',
        'aikd.py': 'def f(x):\n    return ' + ' or '.join(11 * 'x') + '\ndef g(run):\n    run._epoch\n',
        'run.py': 'class Run:\n    def __init__(self):\n        self._epoch = 1\n',
        'odd.py': '',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert over_budget(tmp_path) == {
        'long files': {'loss.py'}, 'em dashes': {'config.py'}, 'long classes': {'memory/table.py: Table'},
        'long functions': {'teacher/spec.py: parse'}, 'complex functions': {'aikd.py: f'},
        'files in no layer': {'odd.py'},
        'wrong imports': {'loss.py: config', 'memory/__init__.py: teacher.spec', 'memory/table.py: aikd'},
        'foreign names': {'loss.py: config._option', 'aikd.py: _epoch'}}


if __name__ == '__main__':
    pprint.pprint(over_budget(), width=120)
