"""Can each check fail? A small sound project is made, broken in one place at a time, and checked.

`python tools/check.py --self-test` runs it. A case is a function that breaks the project at `root`; its
entry in CASES says which check must catch it, and what its fault must name.
"""
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import as_run
import check
import repo_checks

NOTEBOOK = 'nbs/00a_angles.ipynb'
RESULT = 'bench/results/toy.csv'
PICTURE = 'iVBORw0KGgo='                                               # stands for a PNG, in base64


# ---- a small sound project ----

def cell(kind: str, source: str, outputs: list | None = None) -> dict:
    "A notebook cell; its id is made from its text"
    made = {'cell_type': kind, 'id': f'{sum(source.encode()):08x}', 'metadata': {}, 'source': source}
    return made | ({'execution_count': None, 'outputs': outputs or []} if kind == 'code' else {})


def output(mime_type: str, text: str) -> dict:
    "One displayed output"
    return {'data': {mime_type: text}, 'metadata': {}, 'output_type': 'display_data'}


def write_notebook(path: Path, *cells: dict) -> None:
    "Write the cells as nbdev leaves them: clean"
    from execnb.nbio import dict2nb, write_nb
    kernel = {'display_name': 'python3', 'language': 'python', 'name': 'python3'}
    write_nb(dict2nb(cells=list(cells), metadata={'kernelspec': kernel}, nbformat=4, nbformat_minor=5), path)


def make_project(root: Path, settings: Path) -> None:
    "A sound project of two notebooks and one module"
    (root/'nbs').mkdir()
    (root/repo_checks.PACKAGE).mkdir()
    shutil.copy(settings, root)
    printed = {'name': 'stdout', 'output_type': 'stream', 'text': '2\n'}
    write_notebook(
        root/NOTEBOOK, cell('markdown', '# Angles'), cell('code', '#| default_exp physics.angles'),
        cell('code', '#| export\ndef double(x: int) -> int:\n    "Twice `x`"\n    return 2*x'),
        cell('code', 'print(double(1))', [printed]),
        cell('code', '#| slow\nassert double(2) == 5'),
        cell('code', '#| slow\ndouble(3)', [output('text/plain', '6')]))
    write_notebook(
        root/'nbs'/'index.ipynb', cell('markdown', '# Toy\n\nSee [angles](00a_angles.ipynb).'),
        cell('code', '#| hide\n1 + 1'),
        cell('code', '#| echo: false\nshow()', [output('text/markdown', '| a |\n|---|\n| 1 |')]),
        cell('code', '#| echo: false\nplot()', [output('image/png', PICTURE)]))
    repo_checks.run_python('from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()', root)
    import readme
    readme.write_readme(root)
    (root/RESULT).parent.mkdir(parents=True)
    (root/RESULT).write_text('error\n1.0\n')
    for name in (NOTEBOOK, 'nbs/index.ipynb'):
        note_as_run(root, name)


def note_as_run(root: Path, name: str) -> None:
    "Note that a notebook of the toy project was run, and read a result file"
    import nbformat
    import run_notebook
    cells = nbformat.read(root/name, as_version=4).cells
    as_run.write_record(root, run_notebook.entry_of(cells, name, root, [str(root/RESULT)], False, {'slow'}))


# ---- what breaks it ----

def edit(path: str, old: str, new: str) -> Callable[[Path], None]:
    "A break that replaces text in one file"
    def apply(root: Path) -> None:
        text = (root/path).read_text(encoding='utf-8')
        assert old in text, f'{path} has no {old!r}'
        (root/path).write_text(text.replace(old, new, 1), encoding='utf-8')
    return apply


def add(path: str, text: str) -> Callable[[Path], None]:
    "A break that adds text at a file's end, or makes the file"
    def apply(root: Path) -> None:
        (root/path).parent.mkdir(parents=True, exist_ok=True)
        with open(root/path, 'a', encoding='utf-8') as file:
            file.write(text)
    return apply


def remove(path: str) -> Callable[[Path], None]:
    "A break that removes one file"
    return lambda root: (root/path).unlink()


def add_cell(source: str, *outputs: dict) -> Callable[[Path], None]:
    "A break that adds a code cell to the notebook"
    def apply(root: Path) -> None:
        nb = json.loads((root/NOTEBOOK).read_text(encoding='utf-8'))
        nb['cells'].append(cell('code', source, list(outputs)))
        (root/NOTEBOOK).write_text(json.dumps(nb, indent=1) + '\n', encoding='utf-8')
    return apply


def both(first: Callable, second: Callable) -> Callable[[Path], None]:
    "A break made of two"
    return lambda root: [break_it(root) for break_it in (first, second)]


def track(root: Path) -> None:
    "A break that puts all files under version control"
    for words in (['init', '-q'], ['add', '-A']):
        subprocess.run(['git', *words], cwd=root, check=True)


ERROR = {'output_type': 'error', 'ename': 'ValueError', 'evalue': '', 'traceback': []}
MODULE = f'{repo_checks.PACKAGE}/physics/angles.py'
DETECTOR = f'{repo_checks.PACKAGE}/physics/detector.py'
CONFIG = f'{repo_checks.PACKAGE}/core/config.py'
# what nbdev writes into pyproject.toml wants more of setup.py than this
SETUP = """import pathlib, setuptools
pathlib.Path('pyproject.toml').unlink(missing_ok=True)
setuptools.setup(name='sample', py_modules=[])
"""
PROGRESS = f'{repo_checks.PACKAGE}/core/progress.py'

CASES = [                           # the check, what its fault must name, the break
    ('export', 'angles.py', edit(MODULE, '2*x', '3*x')),
    ('export', 'angles.py', remove(MODULE)),
    ('export', 'detector.py', add(DETECTOR, 'x = 1\n')),
    ('clean', '00a_angles', edit(NOTEBOOK, '"execution_count": null', '"execution_count": 7')),
    ('clean', '00a_angles', edit(NOTEBOOK, '{', '{,')),
    ('as-run', 'shows something', add_cell('print(1)')),
    ('as-run', 'ended in an error', add_cell('1 / 0', ERROR)),
    ('as-run', 'code has changed', edit(NOTEBOOK, 'print(double(1))', 'print(double(2))')),
    ('as-run', 'code has changed', edit(NOTEBOOK, 'return 2*x', 'return x + x')),
    ('as-run', '--flags slow', edit(NOTEBOOK, 'double(3)', 'double(4)')),
    ('as-run', RESULT, edit(RESULT, '1.0', '0.9')),
    ('as-run', 'never saved', remove(as_run.RECORD)),
    ('size', '00a_angles', add_cell('x', output('text/plain', 'x' * repo_checks.MAX_NOTEBOOK_BYTES))),
    ('size', '00a_angles', add_cell('x', *[output('image/png', PICTURE)] * (repo_checks.MAX_FIGURES + 1))),
    ('readme', 'README.md', edit('README.md', 'Toy', 'Boy')),
    ('readme', 'README.md', remove('README.md')),
    ('readme', 'index.ipynb', remove('nbs/index.ipynb')),
    ('readme', '00a_angles.ipynb', remove(NOTEBOOK)),
    ('readme', 'readme_1.png', add('nbs/images/readme_1.png', 'x')),
    ('layers', 'detector', both(add(DETECTOR, 'x = 1\n'), add(MODULE, 'from .detector import x\n'))),
    ('layers', 'cli', both(add(f'{repo_checks.PACKAGE}/cli.py', 'x = 1\n'),
                           add(MODULE, 'def f():\n    from icecube_nb import cli\n'))),
    ('layers', 'strange', add(f'{repo_checks.PACKAGE}/strange.py', 'x = 1\n')),
    ('layers', 'each other', both(add(CONFIG, 'import icecube_nb.core.progress\n'),
                                  add(PROGRESS, 'from . import config\n'))),
    ('style', 'one statement a line', add(MODULE, 'x = 1; y = 2\n')),
    ('style', 'one statement a line', add(MODULE, 'if True: y = 2\n')),
    ('style', 'at most 500', add(MODULE, 'x = 1\n' * (repo_checks.MAX_MODULE_LINES + 1))),
    ('style', 'at most 40', add_cell('#| export\n' + 'x = 1\n' * (repo_checks.MAX_CELL_LINES + 1))),
    ('links', 'nowhere.ipynb', edit(NOTEBOOK, '# Angles', '# Angles [x](nowhere.ipynb)')),
    ('no-torch', 'angles imports torch', both(add('torch.py', ''), add(MODULE, 'import torch\n'))),
    ('no-torch', 'ZeroDivisionError', add(MODULE, '1 / 0\n')),
    ('imports', 'fastcore', add(MODULE, 'from fastcore.basics import patch\n')),
    ('imports', 'import *', add(MODULE, 'from math import *\n')),
    ('gpu-bench', 'no card today', add('bench/gpu.py', 'raise SystemExit("no card today")\n')),
    ('fuzz', 'no line in USUAL', add('tools/fuzz_arguments.py', 'print("skymap has no line in USUAL")\n')),
    ('fuzz', 'no words today', add('tools/fuzz_arguments.py', 'raise SystemExit("no words today")\n')),
    ('sdist', 'settings.ini is not in', both(add('setup.py', SETUP), track)),
    ('kaggle', 'constraints-kaggle.txt', add(f'{repo_checks.PACKAGE}/kaggle.py', 'x = 1\n')),
    ('columns', '00a_angles', add_cell('#' * (repo_checks.MAX_COLUMNS + 1))),
    ('columns', 'tools/long.py', both(lambda root: (root/'tools').mkdir(),
                                      add('tools/long.py', '#' * (repo_checks.MAX_COLUMNS + 1)))),
    ('words', '/home/me', add_cell('x', output('text/plain', "'/home/me/data'"))),
    ('words', 'README.md', add('README.md', 'pip install --index-url https://' + 'pypi' + '.org/simple\n')),
    ('prose-numbers', '0.77 rad', edit(NOTEBOOK, '# Angles', '# Angles: 0.77 rad')),
    ('notebook', 'AssertionError', add_cell('assert False')),
    ('notebook', 'status -9', add_cell('import os; os.kill(os.getpid(), 9)')),
    ('notebook', 'status 3', add_cell('import os; os._exit(3)')),
    ('notebook', 'outside a notebook', add_cell('import atexit, os; atexit.register(os._exit, 3)')),
]


# ---- the test ----

def faults_of(name: str, root: Path, flags: tuple = ()) -> list[str]:
    "What the check `name` finds at `root`; 'notebook' runs the notebook, and names a failed cell's error"
    if name == 'notebook':
        written = []
        results = check.run_notebooks([Path(NOTEBOOK).stem], root, flags, workers=1, show=written.append)
        faults = [fault for result in results for fault in result.faults]
        return faults + written if faults else []
    return check.run_check(name, repo_checks.CHECKS[name], root).faults


def sound_faults(root: Path) -> list[str]:
    "Nothing is found in the sound project, and a flagged cell runs only when asked for"
    found = [f'{name} finds fault with a sound project: {faults}'
             for name in [*repo_checks.CHECKS, 'notebook'] if (faults := faults_of(name, root))]
    flagged = '\n'.join(faults_of('notebook', root, ('slow',)))
    return found + ([] if 'AssertionError' in flagged else ['--flags slow does not run the slow cells'])


def case_faults(name: str, names: str, break_it: Callable, sound: Path, root: Path) -> list[str]:
    "Break a copy of the sound project; the check must name what is wrong"
    shutil.copytree(sound, root)
    break_it(root)
    said = '\n'.join(faults_of(name, root))
    if names in said and 'the check itself broke' not in said:
        return []
    return [f'{name} should name {names!r}; it says: {said or "nothing"}']


def run(root: Path) -> list[str]:
    "Every check passes a sound project and fails each broken one"
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder).resolve()/'sound'
        sound.mkdir()
        make_project(sound, root/'settings.ini')
        found = sound_faults(sound)
        for number, (name, names, break_it) in enumerate(CASES):
            found += case_faults(name, names, break_it, sound, sound.with_name(f'broken-{number}'))
    return found + [f'no case breaks {name}' for name in repo_checks.CHECKS.keys() - {c[0] for c in CASES}]
