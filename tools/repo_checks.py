"""The checks of the repository itself. Each is a plain function: it takes the root, returns a list of faults.

tools/check.py runs them beside the notebooks; tools/self_test.py sees each of them fail on a broken tree.
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import structure
from structure import PACKAGE, module_files as modules, notebook_files as notebooks

# who may import whom: a module imports modules further down this list, never one further up
LAYERS = [
    ['__main__'],
    ['cli'],
    ['demo'],
    ['commands'],
    ['budgets'],
    ['kaggle', 'show', 'gpu', 'sessions'],
    ['kaggle_answers'],
    ['kaggle_files'],
    ['inference.time_plan', 'inference.answer_sheet'],
    ['inference.robustness', 'inference.ensemble_predict'],
    ['inference.ensemble_folder'],
    ['inference.ensemble', 'inference.stack', 'inference.standalone', 'inference.sky_maps'],
    ['inference.posterior'],
    ['inference.predict'],
    ['inference.formats'],
    ['inference.uncertainty', 'inference.submission', 'inference.summaries', 'inference.cards',
     'inference.answer_options'],
    ['inference.answers', 'inference.boosters'],
    ['training.loop'],
    ['training.step'],
    ['training.state'],
    ['training.optimise', 'training.distributed', 'training.runs'],
    ['training.precision', 'training.checkpoints'],
    ['training.hardware'],
    ['network.published', 'network.engines', 'network.attention_weights'],
    ['network.model'],
    ['network.heads'],
    ['network.attention', 'network.losses'],
    ['data.epochs'],
    ['data.check', 'data.batching', 'data.record'],
    ['data.turns'],
    ['data.prepare', 'data.pulses'],
    ['data.pack_space'],
    ['data.packing', 'data.convert'],
    ['data.convert_events'],
    ['data.angle_bins', 'data.packed', 'data.layouts', 'inference.evaluate'],
    ['data.competition', 'data.packed_columns'],
    ['physics.eda', 'physics.simulate'],
    ['physics.events'],
    ['physics.readout'],
    ['physics.light'],
    ['physics.detector', 'physics.simulation_config'],
    ['physics.angles'],
    ['core.outputs', 'core.arrow_files'],
    ['core.config', 'core.progress', 'core.storage', 'core.cpu_workers', 'core.device_arrays'],
    ['old_names'],                      # looks names up in all others, when they are asked for
]
LAYER_OF = {module: -number for number, modules in enumerate(LAYERS) for module in modules}
WITHOUT_TORCH = [
    'old_names',
    'core.config',
    'core.outputs',
    'core.arrow_files',
    'core.progress',
    'core.storage',
    'physics.angles',
    'physics.detector',
    'physics.eda',
    'physics.light',
    'physics.events',
    'physics.readout',
    'physics.simulate',
    'physics.simulation_config',
    'data.competition',
    'data.layouts',
    'data.convert_events',
    'data.convert',
    'data.packed_columns',
    'data.packed',
    'data.packing',
    'data.pack_space',
    'data.prepare',
    'data.check',
    'training.checkpoints',
    'training.runs',
]
DEVELOPMENT_ONLY = {'nbdev', 'fastcore', 'execnb'}  # what an exported module must not need

MAX_COLUMNS = 110
MAX_MODULE_LINES = 500
MAX_CELL_LINES = 40
MAX_NOTEBOOK_BYTES = 1_000_000
MAX_FIGURES = 8
MACHINE_WORDS = re.compile(r'(?<![\w.~-])/(?:root|home|work|tmp|Users)/[^\s"\'`]*'   # one machine's paths
                           r'|[\w.-]*(?:pypi\.org|pythonhosted\.org|download\.pytorch\.org)[^\s"\']*')


# ---- what the checks read ----

def read_notebook(path: Path) -> dict:
    "A notebook as it lies on disk"
    return json.loads(path.read_text(encoding='utf-8'))


def text_of(lines: str | list[str]) -> str:
    "Notebook text, which is stored as one string or as a list of lines"
    return lines if isinstance(lines, str) else ''.join(lines)


def code_cells(path: Path) -> Iterator[tuple[int, str, list[dict]]]:
    "The code cells of a notebook: number, source, outputs"
    for number, cell in enumerate(read_notebook(path)['cells']):
        if cell['cell_type'] == 'code':
            yield number, text_of(cell['source']), cell['outputs']


def directives(source: str) -> set[str]:
    "The names of a cell's `#|` directives"
    return set(re.findall(r'^#\|\s*(\w+)', source, re.M))


def copy_project(root: Path, target: Path) -> Path:
    "Copy what nbdev needs (settings and notebooks) and return the copy's resolved root"
    (target/PACKAGE).mkdir()
    shutil.copytree(root/'nbs', target/'nbs', ignore=shutil.ignore_patterns('.*', '_*', 'images'))
    shutil.copy(root/'settings.ini', target)
    if (root/PACKAGE/'__init__.py').exists():
        shutil.copy(root/PACKAGE/'__init__.py', target/PACKAGE)
    return target.resolve()


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess:
    "Run `code` by this Python in `folder`"
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}       # under IN_TEST nbdev writes no index
    return subprocess.run([sys.executable, '-c', code], cwd=folder, env=env, capture_output=True, text=True)


def last_line(text: str) -> str:
    "The last line of a traceback: what went wrong"
    return text.strip().splitlines()[-1] if text.strip() else 'no message'


# ---- the checks ----

def export(root: Path) -> list[str]:
    "The package is what the notebooks export"
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_project(root, Path(folder))
        done = run_python('from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()', copy)
        if done.returncode:
            return [f'nbdev_export failed: {last_line(done.stderr)}']
        there, here = ({str(p.relative_to(r/PACKAGE)): p.read_bytes() for p in (r/PACKAGE).rglob('*.py')}
                       for r in (copy, root))
    return [_drift(name, there, here) for name in sorted(there.keys() | here.keys())
            if there.get(name) != here.get(name)]


def _drift(name: str, exported: dict, committed: dict) -> str:
    "One sentence on a module that is not what its notebook exports"
    if name not in exported:
        return f'{PACKAGE}/{name} comes from no notebook: write it as one, or remove it'
    if name not in committed:
        return f'{PACKAGE}/{name} is not there; fix: make export'
    return f'{PACKAGE}/{name} is not what its notebook exports; fix: make export'


def clean(root: Path) -> list[str]:
    "Notebooks are clean: no execution counts, no metadata of one machine"
    broken = [f'{p.relative_to(root)} is not a notebook: {_unreadable(p)}' for p in notebooks(root)
              if _unreadable(p)]
    if broken:
        return broken
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_project(root, Path(folder))
        done = run_python('from nbdev.clean import nbdev_clean; nbdev_clean.__wrapped__()', copy)
        if done.returncode:
            return [f'nbdev_clean failed: {last_line(done.stderr)}']
        names = [p.relative_to(root) for p in notebooks(root)]
        unlike = [name for name in names if (root/name).read_bytes() != (copy/name).read_bytes()]
    return [f'{name} is not clean; fix: make clean-nbs' for name in unlike]


def _unreadable(path: Path) -> str:
    "Why `path` cannot be read as a notebook, or nothing"
    try:
        read_notebook(path)['cells']
    except (ValueError, KeyError, TypeError) as error:
        return f'{type(error).__name__}: {error}'
    return ''


def as_run(root: Path) -> list[str]:
    """Notebooks are committed as run: their outputs belong to their code, and to the result files they show

    nbs/as_run.jsonl says what the outputs were made from (tools/as_run.py). Besides, a cell that plainly
    calls `print` or `plt.show` has an output, and no output is an error. Cells with a test flag may be
    committed unrun.
    """
    import as_run as record                                             # tools/as_run.py
    flags = test_flags(root) | {'eval'}
    found = []
    for path in notebooks(root):
        found += record.faults(root, path, read_notebook(path)['cells'], test_flags(root))
        for number, source, outputs in code_cells(path):
            if any(o['output_type'] == 'error' for o in outputs):
                found.append(f'{path.relative_to(root)} cell {number} ended in an error; fix: run the '
                             'notebook')
            elif not outputs and not flags & directives(source) and _must_show(source):
                found.append(f'{path.relative_to(root)} cell {number} shows something, but has no output: '
                             'run it')
    return found


def test_flags(root: Path) -> set[str]:
    "The directives that mark cells as not run by default: tst_flags of settings.ini"
    line = re.search(r'^tst_flags\s*=(.*)$', (root/'settings.ini').read_text(encoding='utf-8'), re.M)
    return set(line[1].split()) if line else set()


def _must_show(source: str) -> bool:
    "Whether a cell, once run, surely leaves an output: a plain call of print or plt.show"
    try:
        statements = ast.parse(source).body
    except SyntaxError:
        return False                                    # magics; its test says more
    calls = [s.value.func for s in statements if isinstance(s, ast.Expr) and isinstance(s.value, ast.Call)]
    return not source.rstrip().endswith(';') and any(ast.unparse(c) in ('print', 'plt.show') for c in calls)


def size(root: Path) -> list[str]:
    "Notebooks are small: under 1 MB, at most 8 figures"
    found = []
    for path in notebooks(root):
        n_bytes = path.stat().st_size
        figures = sum('image/png' in o.get('data', {}) for _, _, outputs in code_cells(path) for o in outputs)
        if n_bytes >= MAX_NOTEBOOK_BYTES:
            found.append(f'{path.relative_to(root)} has {n_bytes:,} bytes, allowed are under '
                         f'{MAX_NOTEBOOK_BYTES:,}: '
                         'fewer figures, or fewer dots per inch')
        if figures > MAX_FIGURES:
            found.append(f'{path.relative_to(root)} has {figures} figures, allowed are {MAX_FIGURES}')
    return found


def readme(root: Path) -> list[str]:
    "README.md is what nbs/index.ipynb gives"
    import readme as maker                                              # tools/readme.py; needs nbconvert
    return maker.faults(root)


def layers(root: Path) -> list[str]:
    "Modules import downwards: the table at the top of tools/repo_checks.py"
    arrows = structure.imports(root)
    found = [f'{PACKAGE}.{name} has no layer: give it one in LAYERS of tools/repo_checks.py'
             for name in sorted(arrows.keys() - LAYER_OF.keys())]
    for source, targets in sorted(arrows.items()):
        for target in sorted(targets):
            if not {source, target} <= LAYER_OF.keys():
                continue
            above = LAYER_OF[target] - LAYER_OF[source]
            if above > 0:
                found.append(f'{PACKAGE}.{source} imports {target}, which is {above} layer(s) above it')
            if above == 0 and source in arrows[target]:
                found.append(f'{source} and {target} import each other')
    return found


def style(root: Path) -> list[str]:
    "One statement a line, modules of at most 500 lines, exported cells of at most 40"
    found = []
    for path in modules(root):
        source = path.read_text(encoding='utf-8')
        semicolons, one_liners = structure.crowded_lines(source)
        lines = len(source.splitlines())
        if semicolons or one_liners:
            found.append(f'{path.relative_to(root)} has {semicolons + one_liners} line(s) with more than one '
                         'statement: one statement a line')
        if lines > MAX_MODULE_LINES:
            found.append(f'{path.relative_to(root)} has {lines} lines, at most {MAX_MODULE_LINES}: split it '
                         'by question')
    for path in notebooks(root):
        for source, flags in structure.code_cells(path):
            if flags & {'export', 'exports', 'exporti'} and structure.code_lines(source) > MAX_CELL_LINES:
                found.append(f'{path.relative_to(root)} has an exported cell of '
                             f'{structure.code_lines(source)} lines, at most {MAX_CELL_LINES}: split it')
    return found


def links(root: Path) -> list[str]:
    "Relative links in notebooks lead to files that exist"
    found = []
    for path in notebooks(root):
        for cell in read_notebook(path)['cells']:
            if cell['cell_type'] != 'markdown':
                continue
            for target in re.findall(r'\]\(([^)#\s]+)', text_of(cell['source'])):
                if re.match(r'\w+:', target) or target.startswith('attachment'):
                    continue
                if not (path.parent/target).exists():
                    found.append(f'{path.relative_to(root)} links to {target}, which does not exist')
    return found


def _imported(node: ast.AST) -> list[str]:
    "The dotted names that one import statement names"
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ''] if isinstance(node, ast.ImportFrom) and not node.level else []


def _parse(path: Path) -> ast.Module:
    "A module's syntax tree"
    return ast.parse(path.read_text(encoding='utf-8'), filename=str(path))


def no_torch(root: Path) -> list[str]:
    "The modules of the first steps import without torch: in a process where torch cannot be imported"
    names = [n for n in WITHOUT_TORCH if (root/PACKAGE/f'{n.replace(".", "/")}.py').exists()]
    code = ('import importlib, sys\n'
            'sys.modules["torch"] = None\n'
            f'for name in {names}:\n'
            '    try:\n'
            f'        importlib.import_module("{PACKAGE}." + name)\n'
            '    except Exception as error:\n'
            '        print(name, type(error).__name__, error)\n')
    found = []
    for line in run_python(code, root).stdout.splitlines():
        name, _, error = line.partition(' ')
        why = (
            'imports torch: do it inside a function'
            if 'import of torch' in error
            else f'does not import: {error}'
        )
        found.append(f'{PACKAGE}.{name} {why}')
    return found


def imports(root: Path) -> list[str]:
    "Exported modules need no development tools, and use no `import *`"
    found = []
    for path in modules(root):
        for node in ast.walk(_parse(path)):
            heads = {name.partition('.')[0] for name in _imported(node)}
            for head in sorted(heads & DEVELOPMENT_ONLY):
                found.append(f'{path.relative_to(root)}:{node.lineno} imports {head}: only hidden cells may')
            if isinstance(node, ast.ImportFrom) and any(alias.name == '*' for alias in node.names):
                found.append(f'{path.relative_to(root)}:{node.lineno} has `import *`: name what is used')
    return found


def columns(root: Path) -> list[str]:
    "Lines of code, in notebooks and tools, are at most 110 columns wide"
    sources = [(f'{path.relative_to(root)} cell {number}', source)
               for path in notebooks(root) for number, source, _ in code_cells(path)]
    sources += [(f'tools/{path.name}', path.read_text(encoding='utf-8'))
                for path in sorted((root/'tools').glob('*.py'))]
    return [f'{place} line {number} has {len(line)} columns, at most {MAX_COLUMNS}'
            for place, source in sources for number, line in enumerate(source.splitlines(), 1)
            if len(line) > MAX_COLUMNS]


def words(root: Path) -> list[str]:
    "No paths of one machine and no registry hosts in notebooks (outputs too), pages, pins and modules"
    files = [*notebooks(root), *modules(root), *sorted(root.glob('*.md'))]
    files += [p for name in ('constraints.txt', 'settings.ini', 'Makefile') if (p := root/name).exists()]
    found = []
    for path in files:
        lines = _notebook_text(path) if path.suffix == '.ipynb' else [path.read_text(encoding='utf-8')]
        hits = sorted({hit[0] for line in lines for hit in MACHINE_WORDS.finditer(line)})
        found += [f'{path.relative_to(root)} names {hit}, which only this machine has' for hit in hits]
    return found


def gpu_bench(root: Path) -> list[str]:
    "The GPU benchmark runs to its end on the CPU; a session with a GPU has no time to fix it"
    script = root/'bench'/'gpu.py'
    if not script.exists():
        return []
    done = subprocess.run([sys.executable, str(script), '--device', 'cpu', '--small'], cwd=root,
                          capture_output=True, text=True)
    if done.returncode:
        return [f'bench/gpu.py --device cpu --small failed: {last_line(done.stderr)}']
    return []


def fuzz(root: Path) -> list[str]:
    "`make fuzz` tries every command and every option that the parser knows"
    script = root/'tools'/'fuzz_arguments.py'
    if not script.exists():
        return []
    done = subprocess.run([sys.executable, str(script)], cwd=root, capture_output=True, text=True)
    if done.returncode:
        return [f'tools/fuzz_arguments.py failed: {last_line(done.stderr)}']
    return done.stdout.splitlines()


def prose_numbers(root: Path) -> list[str]:
    "An error in radians that the text names stands in an output of its notebook, or has a source"
    import prose_numbers as numbers                                     # tools/prose_numbers.py
    return [fault for path in notebooks(root) for fault in numbers.faults(path)]


def sdist(root: Path) -> list[str]:
    "The source distribution holds every file of the repository"
    if not (root/'setup.py').is_file():
        return []
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=root, capture_output=True, text=True)
    names = [name for name in listed.stdout.split('\0') if name and (root/name).is_file()]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            (Path(folder)/'project'/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root/name, Path(folder)/'project'/name)
        done = run_python(f'from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})',
                          Path(folder)/'project')
        made = [*Path(folder).glob('*.tar.gz')]
        if done.returncode or not made:
            return [f'the source distribution cannot be built: {last_line(done.stderr)}']
        with tarfile.open(made[0]) as archive:
            held = {name.partition('/')[2] for name in archive.getnames()}
    return [f'{name} is not in the source distribution; name it in MANIFEST.in' for name in names
            if name not in held]


def kaggle(root: Path) -> list[str]:
    "With the versions of Kaggle's image, packing and answering give what they give with ours"
    import kaggle_versions                                              # tools/kaggle_versions.py
    return kaggle_versions.kaggle_versions(root)


def _notebook_text(path: Path) -> Iterator[str]:
    "All text of a notebook, sources and outputs, without its pictures"
    def strings(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            for item in value:
                yield from strings(item)
        elif isinstance(value, dict):
            for key, item in value.items():
                if not key.startswith('image/'):
                    yield from strings(item)
    return strings(read_notebook(path))


CHECKS = {'export': export, 'clean': clean, 'as-run': as_run, 'size': size, 'readme': readme,
          'layers': layers, 'no-torch': no_torch, 'imports': imports, 'style': style, 'links': links,
          'gpu-bench': gpu_bench, 'fuzz': fuzz, 'kaggle': kaggle, 'sdist': sdist, 'columns': columns,
          'words': words, 'prose-numbers': prose_numbers}
