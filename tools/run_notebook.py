"""`make run NB=03_train`: run notebooks from top to bottom, save their outputs, note what made them.

Cells with a test flag (slow, cuda, kaggle) are not run and keep the outputs they have; `--flags slow` runs
those. Nothing is saved if a cell fails. The package is exported first, and each notebook is
cleaned when it is saved, so it can be committed as it is.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import as_run
import nbformat
import repo_checks
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parents[1]
EXPORT_CALL = 'nbdev_export('                           # the last cell of a notebook; exporting is done here
WATCH = '''
import os, sys, types
sys.modules['opened_files'] = types.SimpleNamespace(names=set())
def _watch(event, args):
    if event == 'open' and isinstance(args[0], (str, os.PathLike)):
        sys.modules['opened_files'].names.add(os.path.abspath(args[0]))
sys.addaudithook(_watch)
'''
TELL = '''
import json, sys
names = sorted(name for name in sys.modules['opened_files'].names if name.startswith(FOLDER))
print(json.dumps([names, 'icecube_nb.physics.simulate' in sys.modules]))
'''         # nbclient takes quadratic time for long lines, so only the files that matter are told


def hide_sources(cells: list, flags: set[str]) -> dict[str, tuple[str, list]]:
    "Empty the cells that are not to run, and return what they held: id -> source and outputs"
    kept = {}
    for cell in cells:
        if cell.cell_type == 'code' and (as_run.is_flagged(cell, flags) or EXPORT_CALL in cell.source):
            kept[cell.id] = (cell.source, cell.outputs)
            cell.source = ''
    return kept


def run_cells(nb, folder: Path, results: str, timeout_s: int) -> tuple[list[str], bool]:
    "Run a notebook in a kernel of its own; the files in `results` that it opened, and whether it simulated"
    own = nb.cells
    tell = TELL.replace('FOLDER', repr(results))
    nb.cells = [nbformat.v4.new_code_cell(WATCH), *own, nbformat.v4.new_code_cell(tell)]
    client = NotebookClient(nb, timeout=timeout_s, kernel_name='python3', coalesce_streams=True,
                            resources={'metadata': {'path': str(folder)}})
    try:
        client.execute(stderr=subprocess.DEVNULL)       # the kernel's own warnings; a cell's error is raised
        told = ''.join(output['text'] for output in nb.cells[-1].outputs if output.get('name') == 'stdout')
    finally:
        nb.cells = own
    opened, simulates = json.loads(told)
    return opened, simulates


def flagged_cells(cells: list, name: str, root: Path, flags: set[str], run: set[str]) -> dict[str, dict]:
    "What the outputs of flagged cells were made from: now for those that ran, as noted before for the others"
    now = {'simulator': as_run.simulator_version(root)}
    noted: dict[str, dict] = {}
    for entry in as_run.read_record(root).get(name, []):
        noted |= entry.get('flagged', {})
    found = {}
    for cell in cells:
        if cell.cell_type != 'code' or not as_run.is_flagged(cell, flags) or not cell.outputs:
            continue
        if as_run.is_flagged(cell, run):
            found[cell.id] = {'code': as_run.cell_hash(cell)} | now
        elif cell.id in noted:
            found[cell.id] = noted[cell.id]
    return found


def entry_of(cells: list, name: str, root: Path, opened: list[str], simulates: bool, run: set[str]) -> dict:
    "The line of the record for a notebook that has just run"
    flags = repo_checks.test_flags(root)
    return {'notebook': name, 'code': as_run.code_hash(cells, flags),
            'simulator': as_run.simulator_version(root) if simulates else None,
            'read': as_run.file_hashes(root, [os.path.relpath(p, root) for p in opened]),
            'flagged': flagged_cells(cells, name, root, flags, run)}


def run_notebook(path: Path, root: Path, run: set[str], timeout_s: int) -> dict:
    "Run one notebook, save it with its outputs, and return the line for the record"
    flags = repo_checks.test_flags(root)
    nb = nbformat.read(path, as_version=4)
    kept = hide_sources(nb.cells, flags - run)
    results = os.path.abspath(root/as_run.RESULTS) + os.sep
    opened, simulates = run_cells(nb, path.parent, results, timeout_s)
    for cell in nb.cells:
        if cell.id in kept:
            cell.source, cell.outputs = kept[cell.id]
    temporary = path.with_name(f'.{path.stem}.tmp.ipynb')
    nbformat.write(nb, temporary)
    os.replace(temporary, path)
    return entry_of(nb.cells, path.relative_to(root).as_posix(), root, opened, simulates, run)


def nbdev(command: str, root: Path, *arguments: str) -> None:
    "Run one of nbdev's commands in the repository"
    subprocess.run([str(Path(sys.executable).with_name(command)), *arguments], cwd=root, check=True)


def chosen(names: list[str], root: Path) -> list[Path]:
    "The notebooks that `names` names, by stem, file or path"
    known = {path.stem: path for path in repo_checks.notebooks(root)}
    stems = [Path(name).name.removesuffix('.ipynb') for name in names]
    unknown = [stem for stem in stems if stem not in known]
    if unknown:
        sys.exit(f'no notebook is called {", ".join(unknown)}; there are: {", ".join(known)}')
    return [known[stem] for stem in dict.fromkeys(stems)]


def arguments() -> argparse.Namespace:
    "The command line"
    parser = argparse.ArgumentParser(description='Run notebooks and save their outputs.')
    add = parser.add_argument
    add('names', nargs='*', help='notebooks, e.g. 03_train 05_stack')
    add('--all', action='store_true', help='all notebooks, one after the other')
    add('--stale', action='store_true', help='those whose outputs are not of their present code')
    add('--flags', nargs='*', default=[], help='run cells with these test flags too, e.g. --flags slow')
    add('--timeout', type=int, default=1800, help='seconds that one cell may take (default: 1800)')
    add('--root', type=Path, default=ROOT, help=argparse.SUPPRESS)
    return parser.parse_args()


def stale(root: Path) -> list[str]:
    "The notebooks whose outputs are not of their present code"
    flags = repo_checks.test_flags(root)
    return [path.stem for path in repo_checks.notebooks(root)
            if as_run.faults(root, path, repo_checks.read_notebook(path)['cells'], flags)]


def main() -> int:
    "Run what was asked for; the exit status is 1 if a notebook failed"
    args = arguments()
    root = args.root.resolve()
    every = [path.stem for path in repo_checks.notebooks(root)]
    names = every if args.all else args.names + (stale(root) if args.stale else [])
    if not names:
        sys.exit('nothing to run: every notebook is as run' if args.stale else
                 'name the notebooks to run, e.g. 03_train, or say --all or --stale')
    os.environ['PYTHONPATH'] = os.pathsep.join([str(root), *filter(None, [os.environ.get('PYTHONPATH')])])
    nbdev('nbdev_export', root)
    failed = 0
    for path in chosen(names, root):
        start = time.monotonic()
        try:
            entry = run_notebook(path, root, set(args.flags), args.timeout)
            nbdev('nbdev_clean', root, '--fname', str(path))
            as_run.write_record(root, entry)
            print(f'saved {path.relative_to(root)}, {time.monotonic() - start:.0f} s', flush=True)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            failed += 1
            print(f'{error}\nFAIL  {path.relative_to(root)} is left as it was', flush=True)
    return int(failed > 0)


if __name__ == '__main__':
    sys.exit(main())
