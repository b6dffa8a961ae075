"""Figures about the structure of a checkout: `python tools/structure.py [FOLDER]`; `--graph` for its imports.

The figures are counted from the source alone, so that two states of the project can be compared.
"""
import argparse
import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGE = 'icecube_nb'
ROOT = Path(__file__).resolve().parents[1]
GENERATED = {'__init__.py', '_modidx.py', '__main__.py'}
COMPOUND = {'if', 'elif', 'else', 'for', 'while', 'with', 'try', 'except', 'finally', 'def', 'class'}


def module_files(root: Path) -> list[Path]:
    "The package's modules that come from notebooks"
    return sorted(p for p in (root/PACKAGE).rglob('*.py') if p.name not in GENERATED)


def notebook_files(root: Path) -> list[Path]:
    "The project's notebooks; names that begin with . or _ do not count, as in nbdev"
    return sorted(p for p in (root/'nbs').rglob('*.ipynb')
                  if not any(part[0] in '._' for part in p.relative_to(root).parts))


def code_cells(path: Path) -> Iterator[tuple[str, set[str]]]:
    "The source and the directives of each code cell of a notebook"
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        if cell['cell_type'] != 'code':
            continue
        source = ''.join(cell['source'])
        yield source, set(re.findall(r'^#\|\s*(\w+)', source, re.M))


def code_lines(source: str) -> int:
    "Lines of a cell that are not directives and not empty"
    return sum(bool(line.strip()) and not line.startswith('#|') for line in source.splitlines())


def crowded_lines(source: str) -> tuple[int, int]:
    "How many lines hold several statements by a semicolon, and how many by a colon as in `if x: y`"
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, IndentationError):
        return 0, 0                                     # a magic command; nbdev's test says more
    semicolons = colons = depth = lambdas = 0
    first, seen_colon = None, False
    ends = (tokenize.NEWLINE, tokenize.COMMENT, tokenize.NL)
    for token, following in zip(tokens, tokens[1:]):
        if token.type == tokenize.NEWLINE:
            first, seen_colon, lambdas = None, False, 0
            continue
        if token.type in (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT):
            continue
        first = first or token.string
        depth += (token.string in '([{') - (token.string in ')]}') if token.type == tokenize.OP else 0
        if depth:
            continue
        if token.string == 'lambda':
            lambdas += 1
        elif token.string == ';' and following.type not in ends:
            semicolons += 1
        elif token.string == ':' and lambdas:
            lambdas -= 1
        elif token.string == ':' and first in COMPOUND and not seen_colon:
            seen_colon = True
            colons += following.type not in ends
    return semicolons, colons


def figures(root: Path) -> dict[str, int]:
    "Name of each figure, and its value for the checkout at `root`"
    lines = {p: len(p.read_text(encoding='utf-8').splitlines()) for p in module_files(root)}
    crowded = [crowded_lines(p.read_text(encoding='utf-8')) for p in lines]
    exported, tests = [], []
    for path in notebook_files(root):
        for source, directives in code_cells(path):
            if directives & {'export', 'exports', 'exporti'}:
                exported.append(code_lines(source))
            elif not directives:
                tests.append(code_lines(source))
    return {'notebooks': len(notebook_files(root)), 'modules': len(lines),
            'longest module, lines': max(lines.values(), default=0),
            'modules over 500 lines': sum(n > 500 for n in lines.values()),
            'longest exported cell, lines': max(exported, default=0),
            'exported cells over 40 lines': sum(n > 40 for n in exported),
            'visible cells over 10 lines that are not exported': sum(n > 10 for n in tests),
            'lines with a semicolon between statements': sum(s for s, _ in crowded),
            'one-line conditionals, loops and the like': sum(c for _, c in crowded)}


def imports(root: Path) -> dict[str, set[str]]:
    "The modules of the package that each module imports, anywhere in it"
    names = {'.'.join(p.relative_to(root/PACKAGE).with_suffix('').parts): p for p in module_files(root)}
    found = {}
    for name, path in names.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import):
                whole = {alias.name.removeprefix(f'{PACKAGE}.') for alias in node.names}
                found[name] |= {w for w in whole if w in names} - {name}
            if not isinstance(node, ast.ImportFrom):
                continue
            folder = name.split('.')[:-node.level] if node.level else []
            base = node.module or ''
            if not node.level and not base.startswith(PACKAGE):
                continue
            base = '.'.join([*folder, *filter(None, [base.removeprefix(PACKAGE).lstrip('.')])])
            candidates = [base, *(f'{base}.{alias.name}'.lstrip('.') for alias in node.names)]
            found[name] |= {c for c in candidates if c in names} - {name}
    return found


def floors(arrows: dict[str, set[str]]) -> list[list[str]]:
    "Modules by floor: each imports only from floors below its own; ValueError for a circle"
    placed, result = set(), []
    while len(placed) < len(arrows):
        ready = sorted(m for m, below in arrows.items() if m not in placed and below <= placed)
        if not ready:
            raise ValueError(f'a circle of imports among {", ".join(sorted(arrows.keys() - placed))}')
        result.append(ready)
        placed |= set(ready)
    return result


def main() -> None:
    "Print the figures, or the floors of the imports from the highest to the lowest"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', nargs='?', type=Path, default=ROOT, help='a checkout (default: this one)')
    parser.add_argument('--graph', action='store_true', help='print who imports whom, by floors')
    arguments = parser.parse_args()
    if not arguments.graph:
        for name, value in figures(arguments.folder).items():
            print(f'{name:<52}{value:>8,}')
        return
    arrows = imports(arguments.folder)
    for number, modules in reversed(list(enumerate(floors(arrows)))):
        print(f'floor {number}')
        for module in modules:
            print(f'    {module:<28} {", ".join(sorted(arrows[module]))}')


if __name__ == '__main__':
    main()
