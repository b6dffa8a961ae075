"""Do other versions of the libraries answer as our own do?

`kaggle_versions(root)` packs and answers 5,000 events twice: with this Python's packages, and with the data
libraries of constraints-kaggle.txt, by the code of the bundle's submission notebook. One event has more
pulses than are read in one piece. The libraries go into .venv-kaggle, once, beside the torch that is there.

    python tools/kaggle_versions.py            the check, with its times and the largest difference
    python tools/kaggle_versions.py --all      the same with the oldest, Kaggle's, its next and the newest
                                               versions, with the training notebook and the packed files, too;
                                               the table goes to bench/results/kaggle_versions.csv
"""
import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT/'bench'/'results'/'kaggle_versions.csv'
CONSTRAINTS = {'oldest': 'constraints-oldest.txt', 'kaggle': 'constraints-kaggle.txt',
               'next': 'constraints-kaggle-next.txt', 'newest': None}       # None: the newest there are
LIBRARIES = ('lightgbm', 'numpy', 'pandas', 'pyarrow', 'python-dateutil', 'pytz')   # that are installed

EVENTS = 5000
SIMULATED = 250                     # events that are simulated; the others are copies with fewer pulses
LARGEST = 140_000                   # pulses of the last event; 131,072 are read in one piece
MOST_RAD = 5e-5                     # allowed between two answers to one event
INSTALL_SECONDS, STEP_SECONDS = 900, 600
SETTINGS = "'medium', 660, 1, 10.0, '15GB', 'cuda'", "'tiny', 2, 1, 0.003, '15GB', 'cpu'"   # of training


def kaggle_versions(root: Path, report: Callable[[str], None] = lambda line: None) -> list[str]:
    "Kaggle's data libraries answer 5,000 events as our own do"
    if not (root/'icecube_nb'/'kaggle.py').is_file():
        return []                                               # no bundle to be made: nothing to check
    with tempfile.TemporaryDirectory() as folder:
        return compare_versions(root, ['kaggle'], Path(folder).resolve(), root, report)[1]


def compare_versions(root: Path, names: list[str], # keys of CONSTRAINTS
                     work: Path, place: Path, # folder for files; folder for the libraries
                     report: Callable[[str], None], training: bool = False # run the training notebook, too
    ) -> tuple[list[dict], list[str]]: # a row for each of the names; what is wrong
    "Answer the same events with each set of versions."
    rows, faults = [], []
    for name in names:
        fault = install(root, name, place)
        if fault:
            return rows, [fault]
    fault = run_step(['make'], work, work, root, None, report)
    if fault:
        return rows, [fault]
    for name in names:
        steps = [[step, name] for step in (('answer', 'train') if training else ('answer',))]
        stopped = (run_step(step, work, work/name, root, place/f'.venv-{name}', report) for step in steps)
        fault = next(filter(None, stopped), '')
        row, found = ({}, [fault]) if fault else compare(work, work/name, root, name, report)
        rows.append({'versions': name} | row)
        faults += found
    return rows, faults


def install(root: Path, name: str, place: Path) -> str: # what went wrong, or nothing
    "Install the libraries of a set of versions into .venv-NAME, unless they are there"
    file, target = CONSTRAINTS[name], place/f'.venv-{name}'
    if file and not (root/file).is_file():
        return f'{file} is missing: it lists versions that are meant to work'
    wanted = pinned(root, name)
    stamp, text = target/'installed.txt', '\n'.join([sys.version, *wanted])
    if file and stamp.is_file() and stamp.read_text(encoding='utf-8') == text:
        return ''
    stamp.unlink(missing_ok=True)
    command = [sys.executable, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '--no-deps',
               '--only-binary', ':all:', '--upgrade', '--target', str(target), *wanted]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        return f'the packages of {file} were not installed within {INSTALL_SECONDS} s'
    if done.returncode:
        return f'the packages of {file} cannot be installed: {error_line(done)}'
    stamp.write_text(text, encoding='utf-8')
    return ''


def pinned(root: Path, name: str) -> list[str]:
    "What pip is asked for: lines of a constraints file that name a library for data, or the names alone"
    if CONSTRAINTS[name] is None:
        return list(LIBRARIES)
    lines = (root/CONSTRAINTS[name]).read_text(encoding='utf-8').splitlines()
    return [line.strip() for line in lines if line.partition('==')[0] in LIBRARIES]


def error_line(done: subprocess.CompletedProcess) -> str:
    "The line of a failed command's errors that says most"
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith('ERROR')]
    return (errors or lines or ['no message'])[-1].removeprefix('ERROR: ')


def run_step(step: list[str], work: Path, target: Path, # words for this file; folder of all and of this step
             root: Path, libraries: Path | None, # that come before all other packages
             report: Callable[[str], None]
    ) -> str: # what went wrong, or nothing
    """Run one step of this file in a process of its own

    `-S` passes over what is installed in editable form: on Kaggle there is the bundle's code alone.
    """
    start, whose = time.monotonic(), 'our own' if libraries is None else f'the {step[-1]}'
    own = root if libraries is None else libraries
    path = [str(own), *dict.fromkeys(sysconfig.get_path(name) for name in ('purelib', 'platlib'))]
    env = os.environ | {'PYTHONPATH': os.pathsep.join(path), 'OMP_NUM_THREADS': '2',
                        'ICECUBE_INPUT_DIR': str(work/'input'), 'ICECUBE_CACHE_DIR': str(target/'cache'),
                        'PYTHONWARNINGS': 'ignore'}
    place = target/'working'
    if (place/f'{step[0]}.done').is_file():
        return ''                                               # by an earlier call for the same --work
    shutil.rmtree(work/'input'/'data'/'packed', ignore_errors=True)         # each packs by itself
    place.mkdir(exist_ok=True, parents=True)
    command = [sys.executable, '-S', str(Path(__file__).resolve()), '--step', *step, '--work', str(work)]
    try:
        done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True,
                              timeout=STEP_SECONDS)
    except subprocess.TimeoutExpired:
        return f'{step[0]} with {whose} versions took more than {STEP_SECONDS} s'
    report(f'{step[0]} with {whose} versions: {time.monotonic() - start:.1f} s')
    if done.returncode:
        return f'{step[0]} with {whose} versions failed: {error_line(done)}'
    (place/f'{step[0]}.done').touch()
    return ''


# ---- with our own versions: events, networks, a bundle, and the answers that are right ----

def make(work: Path) -> None:
    "Write the inputs of the notebooks, and what the submission notebook should answer"
    from icecube_nb.core.config import override, tiny
    from icecube_nb.data.prepare import prepare
    from icecube_nb.inference.answers import open_dump
    from icecube_nb.inference.ensemble import EnsembleConfig
    from icecube_nb.inference.ensemble_folder import fit_ensemble
    from icecube_nb.inference.ensemble_predict import predict_ensemble
    from icecube_nb.inference.predict import predict
    from icecube_nb.inference.stack import STACKS, fit_stack
    from icecube_nb.kaggle import bundle
    from icecube_nb.physics.simulate import write_dataset
    from icecube_nb.training.loop import train
    data = write_dataset(work/'input'/'data', 2, SIMULATED, test_events=SIMULATED)
    brief = override(tiny(), {'train.epochs': 1, 'train.batch_events': 32})
    train(prepare(data, workers=1), work/'run', brief, device='cpu')
    predict(data, work/'run', work/'heads.csv', dump=work/'dump', batches=[1, 2], device='cpu')
    fit_stack(open_dump(work/'dump', [1]), work/'stack', replace(STACKS['compact'](), epochs=1), 'cpu')
    fit_ensemble([work/'run'], [work/'dump'], work/'ensemble', [work/'stack'], batches=[2],
                 config=EnsembleConfig(folds=3, rounds=20, threads=1))
    bundle(work/'run', work/'input'/'bundle', ensemble=work/'ensemble')
    enlarge(data)
    predict(data, work/'run', work/'main.csv', device='cpu')
    predict_ensemble(data, work/'ensemble', work/'ensemble.csv', device='cpu')
    (data/'packed').rename(work/'packed')
    note_versions(work/'ours.json')


def enlarge(data: Path) -> None:
    "Make the test file larger: copies that lack a tenth of their pulses, and one event of many pulses"
    import numpy as np
    import pandas as pd
    few, rng = pd.read_parquet(data/'test'/'batch_3.parquet'), np.random.default_rng(0)
    parts, at = [few], int(few.index.max()) + 1
    while sum(part.index.nunique() for part in parts) < EVENTS - 1:
        copy = few[rng.random(len(few)) < 0.9]
        parts.append(copy.set_axis(copy.index - few.index.min() + at))
        at = int(parts[-1].index.max()) + 1
    rows = pd.concat(parts)
    rows = rows[rows.index.isin(np.unique(rows.index)[:EVENTS - 1])]
    large = rows.sample(LARGEST, random_state=0, replace=len(rows) < LARGEST).sort_values('time')
    pulses = pd.concat([rows, large.set_axis(np.full(LARGEST, at))]).rename_axis('event_id')
    event_id, first, count = np.unique(pulses.index, return_index=True, return_counts=True)
    meta = pd.DataFrame({'batch_id': 3, 'event_id': event_id, 'first_pulse_index': first,
                         'last_pulse_index': first + count - 1})
    pulses.to_parquet(data/'test'/'batch_3.parquet', use_dictionary=False)          # megabytes a column
    meta.to_parquet(data/'test_meta.parquet')
    sample = pd.DataFrame({'event_id': event_id, 'azimuth': 1.0, 'zenith': 1.0})
    sample.to_parquet(data/'sample_submission.parquet', index=False)


def note_versions(path: Path) -> None:
    "Note which versions of the data libraries this process imports"
    import lightgbm
    import numpy
    import pandas
    import pyarrow
    import torch
    libraries = (lightgbm, numpy, pandas, pyarrow, torch)
    found = {library.__name__: library.__version__ for library in libraries}
    path.write_text(json.dumps(found | {'python': sys.version.split()[0]}))


# ---- with other versions, in the folder `working` of their own ----

def run_notebook(work: Path, title: str, old: str = '', new: str = '') -> None:
    "Run the code of one of the bundle's notebooks, with a change"
    notebook = json.loads((work/'input'/'bundle'/f'{title}.ipynb').read_text(encoding='utf-8'))
    for cell in notebook['cells']:
        if cell['cell_type'] == 'code':
            source = ''.join(cell['source']).replace(old, new) if old else ''.join(cell['source'])
            exec(compile(source, f'{title}.ipynb', 'exec'), globals())


def answer(work: Path) -> None:
    "Run the bundle's submission notebook, and answer by its single run too"
    note_versions(Path('versions.json'))
    run_notebook(work, 'submission')
    from icecube_nb.inference.predict import predict
    predict(work/'input'/'data', work/'input'/'bundle'/'main', Path('main.csv'), device='cpu')
    code = {Path(module.__file__) for name, module in sys.modules.items() if name.startswith('icecube_nb')}
    assert all(path.is_relative_to(work/'input'/'bundle') for path in code), code


def train_and_answer(work: Path) -> None:
    """Run the bundle's training notebook for some seconds, and answer by the bundle that it makes; then read
    what our versions packed"""
    run_notebook(work, 'train', *SETTINGS)
    from icecube_nb.inference.predict import predict
    predict(work/'input'/'data', Path('bundle')/'main', Path('trained.csv'), device='cpu')
    compare_packed(work/'packed', work/'input'/'data'/'packed')


def compare_packed(first: Path, second: Path | str) -> None:
    "AssertionError if two folders of packed files do not hold the same events"
    from icecube_nb.data.packed import load_packed
    paths = [sorted(Path(folder).rglob('batch_3.arrow')) for folder in (first, second)]
    assert [len(found) for found in paths] == [1, 1], paths
    one, two = (load_packed(found[0]) for found in paths)
    for name in ('event_id', 'first_time_ns', 'offsets', 'pulses'):
        assert (getattr(one, name) == getattr(two, name)).all(), f'{name} of {paths} differ'


# ---- the comparison ----

def compare(work: Path, target: Path, root: Path, name: str, # of the versions
            report: Callable[[str], None]
    ) -> tuple[dict, list[str]]: # versions and differences; what is wrong
    "Versions as asked for, the same events in the same order, and no answer too far away"
    place, file = target/'working', CONSTRAINTS[name]
    theirs, asked = json.loads((place/'versions.json').read_text()), pinned(root, name)
    report(f'{name}: ' + ', '.join(f'{k} {v}' for k, v in theirs.items()))
    used = {library: f'{library}=={theirs[library]}' for library in theirs if file and library in LIBRARIES}
    found = [f'{line} was used, which {file} does not list' for line in used.values() if line not in asked]
    row, pairs = theirs | {'events': EVENTS}, {'main': 'main.csv', 'ensemble': 'submission.csv'}
    if (place/'bundle').is_dir():
        from icecube_nb.inference.predict import predict
        compare_packed(work/'packed', work/'input'/'data'/'packed')     # theirs, read by our versions
        predict(work/'input'/'data', place/'bundle'/'main', work/'trained.csv', device='cpu')
        pairs['trained'] = 'trained.csv'                        # a run of theirs, answered by our versions
    for way, table in pairs.items():
        row[f'{way}_rad'], fault = largest_difference(way, work/f'{way}.csv', place/table, name)
        report(f'{way}: {EVENTS:,} events, largest difference {row[f"{way}_rad"]} rad')
        found += fault
    return row, found


def largest_difference(way: str, ours: Path, theirs: Path, name: str # two tables; of the versions
    ) -> tuple[float | None, list[str]]: # rad; what is wrong
    "Compare two tables of answers row by row"
    import pandas as pd
    right, got = pd.read_csv(ours), pd.read_csv(theirs)
    if len(right) != EVENTS or right['event_id'].tolist() != got['event_id'].tolist():
        return None, [f'{way}: {len(got):,} answers with the {name} versions, {len(right):,} with ours; '
                      f'both should be to the same {EVENTS:,} events']
    away = angles_between(right, got)
    if away.max() <= MOST_RAD:
        return float(away.max()), []
    worst = int(away.argmax())
    fault = (f'{way}: event {right["event_id"][worst]} differs by {away[worst]:.1e} rad with the {name} '
             f'versions, allowed are {MOST_RAD:.0e}')
    return float(away.max()), [fault]


def angles_between(a, b):
    "The angle between the directions of two tables, row by row, rad"
    import numpy as np
    def vectors(table):
        azimuth, zenith = table['azimuth'].to_numpy(), table['zenith'].to_numpy()
        return np.stack([np.cos(azimuth)*np.sin(zenith), np.sin(azimuth)*np.sin(zenith), np.cos(zenith)])
    return 2*np.arcsin(np.clip(np.linalg.norm(vectors(a) - vectors(b), axis=0)/2, 0, 1))


def main() -> int:
    "The check, the table, or one of the steps"
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--all', action='store_true', help='all sets of versions, and keep the table')
    parser.add_argument('--place', type=Path, default=ROOT, help='folder where the libraries are installed')
    parser.add_argument('--work', type=Path, help='folder for files; a call that was stopped goes on there')
    parser.add_argument('--step', nargs='+', help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.step:
        steps = {'make': make, 'answer': answer, 'train': train_and_answer}
        for name in a.step:
            if name in steps:
                steps[name](a.work)
        return 0
    if not a.all:
        faults = kaggle_versions(ROOT, lambda line: print(line, flush=True))
    else:
        with tempfile.TemporaryDirectory() as folder:
            work = (a.work or Path(folder)).resolve()
            rows, faults = compare_versions(ROOT, list(CONSTRAINTS), work, a.place, print, True)
        if not faults:
            with RESULTS.open('w', newline='', encoding='utf-8') as file:
                table = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
                table.writeheader()
                table.writerows(rows)
    print('\n'.join(faults) or 'ok')
    return int(bool(faults))


if __name__ == '__main__':
    sys.exit(main())
