"""Do the versions of Kaggle's image answer as our own do?

`kaggle_versions(root)` packs and answers 5,000 events twice: with this Python's packages, and with the data
libraries of constraints-kaggle.txt, by the code of the bundle's submission notebook. One event has more
pulses than are read in one piece. The libraries go into .venv-kaggle, once, beside the torch that is there.

    python tools/kaggle_versions.py            the check, with its times and the largest difference
"""
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
CONSTRAINTS = 'constraints-kaggle.txt'
FOLDER = '.venv-kaggle'
LIBRARIES = ('lightgbm', 'numpy', 'pandas', 'pyarrow', 'python-dateutil', 'pytz')   # that are installed

EVENTS = 5000
SIMULATED = 250                     # events that are simulated; the others are copies with fewer pulses
LARGEST = 140_000                   # pulses of the last event; 131,072 are read in one piece
MOST_RAD = 5e-5                     # allowed between two answers to one event
INSTALL_SECONDS, STEP_SECONDS = 600, 600


def kaggle_versions(root: Path, report: Callable[[str], None] = lambda line: None) -> list[str]:
    "Kaggle's data libraries answer 5,000 events as our own do"
    if not (root/'icecube_nb'/'kaggle.py').is_file():
        return []                                               # no bundle to be made: nothing to check
    if not (root/CONSTRAINTS).is_file():
        return [f'{CONSTRAINTS} is missing: it lists the versions of Kaggle\'s image']
    start = time.monotonic()
    fault = install(root)
    if fault:
        return [fault]
    report(f'{FOLDER}: {time.monotonic() - start:.1f} s')
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        for step, libraries in (('make', None), ('answer', root/FOLDER)):
            start = time.monotonic()
            whose = 'our own' if libraries is None else 'Kaggle\'s'
            try:
                done = run_step(step, work, root, libraries)
            except subprocess.TimeoutExpired:
                return [f'{step} with {whose} versions took more than {STEP_SECONDS} s']
            report(f'{step}: {time.monotonic() - start:.1f} s')
            if done.returncode:
                return [f'{step} with {whose} versions failed: {error_line(done)}']
        return compare(work, root, report)


def install(root: Path) -> str: # what went wrong, or nothing
    "Install the libraries of constraints-kaggle.txt into .venv-kaggle, unless they are there"
    target, wanted = root/FOLDER, pinned(root)
    stamp, text = target/'installed.txt', '\n'.join([sys.version, *wanted])
    if stamp.is_file() and stamp.read_text(encoding='utf-8') == text:
        return ''
    stamp.unlink(missing_ok=True)
    command = [sys.executable, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '--no-deps',
               '--only-binary', ':all:', '--upgrade', '--target', str(target), *wanted]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        return f'the packages of {CONSTRAINTS} were not installed within {INSTALL_SECONDS} s'
    if done.returncode:
        return f'the packages of {CONSTRAINTS} cannot be installed: {error_line(done)}'
    stamp.write_text(text, encoding='utf-8')
    return ''


def pinned(root: Path) -> list[str]:
    "The lines of constraints-kaggle.txt that name a library for data"
    lines = (root/CONSTRAINTS).read_text(encoding='utf-8').splitlines()
    return [line.strip() for line in lines if line.partition('==')[0] in LIBRARIES]


def error_line(done: subprocess.CompletedProcess) -> str:
    "The line of a failed command's errors that says most"
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith('ERROR')]
    return (errors or lines or ['no message'])[-1].removeprefix('ERROR: ')


def run_step(step: str, work: Path, root: Path, libraries: Path | None) -> subprocess.CompletedProcess:
    """Run one step of this file in a process of its own; `libraries` come before all other packages

    `-S` passes over what is installed in editable form: on Kaggle there is the bundle's code alone.
    """
    own = root if libraries is None else libraries
    path = [str(own), *dict.fromkeys(sysconfig.get_path(name) for name in ('purelib', 'platlib'))]
    env = os.environ | {'PYTHONPATH': os.pathsep.join(path), 'OMP_NUM_THREADS': '2',
                        'ICECUBE_INPUT_DIR': str(work/'input'), 'ICECUBE_CACHE_DIR': str(work/'cache'),
                        'PYTHONWARNINGS': 'ignore'}
    place = work/'working'
    place.mkdir(exist_ok=True)
    command = [sys.executable, '-S', str(Path(__file__).resolve()), step, str(work)]
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=STEP_SECONDS)


# ---- with our own versions: events, networks, a bundle, and the answers that are right ----

def make(work: Path) -> None:
    "Write the inputs of the submission notebook, and what it should answer"
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
    shutil.rmtree(data/'packed')                                # the other versions pack by themselves
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
    libraries = (lightgbm, numpy, pandas, pyarrow)
    path.write_text(json.dumps({library.__name__: library.__version__ for library in libraries}))


# ---- with Kaggle's versions ----

def answer(work: Path) -> None:
    "Run the bundle's submission notebook, and answer by its single run too"
    note_versions(work/'theirs.json')
    notebook = json.loads((work/'input'/'bundle'/'submission.ipynb').read_text(encoding='utf-8'))
    for cell in notebook['cells']:
        if cell['cell_type'] == 'code':
            exec(compile(''.join(cell['source']), 'submission.ipynb', 'exec'), globals())
    from icecube_nb.inference.predict import predict
    predict(work/'input'/'data', work/'input'/'bundle'/'main', work/'working'/'main.csv', device='cpu')
    code = {Path(module.__file__) for name, module in sys.modules.items() if name.startswith('icecube_nb')}
    assert all(path.is_relative_to(work/'input'/'bundle') for path in code), code


# ---- the comparison ----

def compare(work: Path, root: Path, report: Callable[[str], None]) -> list[str]:
    "Versions as asked for, the same events in the same order, and no answer too far away"
    import pandas as pd
    ours, theirs = (json.loads((work/f'{name}.json').read_text()) for name in ('ours', 'theirs'))
    wrong = [f'{name} {theirs[name]} was used' for name in theirs
             if f'{name}=={theirs[name]}' not in pinned(root)]
    report('ours: ' + ', '.join(f'{k} {v}' for k, v in ours.items()))
    report("Kaggle's: " + ', '.join(f'{k} {v}' for k, v in theirs.items()))
    found = [f'{fault}, which {CONSTRAINTS} does not list' for fault in wrong]
    for name, file in (('main', 'main.csv'), ('ensemble', 'submission.csv')):
        right, got = pd.read_csv(work/f'{name}.csv'), pd.read_csv(work/'working'/file)
        if len(right) != EVENTS or right['event_id'].tolist() != got['event_id'].tolist():
            found.append(f'{name}: {len(got):,} answers with Kaggle\'s versions, {len(right):,} with ours; '
                         f'both should be to the same {EVENTS:,} events')
            continue
        away = angles_between(right, got)
        report(f'{name}: {len(got):,} events, largest difference {away.max():.1e} rad')
        if not away.max() <= MOST_RAD:
            worst = int(away.argmax())
            found.append(f'{name}: event {right["event_id"][worst]} differs by {away[worst]:.1e} rad with '
                         f'Kaggle\'s versions, allowed are {MOST_RAD:.0e}')
    return found


def angles_between(a, b):
    "The angle between the directions of two tables, row by row, rad"
    import numpy as np
    def vectors(table):
        azimuth, zenith = table['azimuth'].to_numpy(), table['zenith'].to_numpy()
        return np.stack([np.cos(azimuth)*np.sin(zenith), np.sin(azimuth)*np.sin(zenith), np.cos(zenith)])
    return 2*np.arcsin(np.clip(np.linalg.norm(vectors(a) - vectors(b), axis=0)/2, 0, 1))


def main() -> int:
    "The check, or one of its steps"
    if len(sys.argv) == 3:
        {'make': make, 'answer': answer}[sys.argv[1]](Path(sys.argv[2]))
        return 0
    faults = kaggle_versions(ROOT, print)
    print('\n'.join(faults) or 'ok')
    return int(bool(faults))


if __name__ == '__main__':
    sys.exit(main())
