"""Does a submission keep its time and its memory? The bundle's own notebook and code, with the clock cut.

    python bench/kaggle.py plan --out FOLDER       each step of the time plan, forced by the clock
    python bench/kaggle.py million --out FOLDER    a million events in files of real size, with little memory

`plan` makes a bundle with everything (an ensemble of two networks, a network for long events, turned events,
a smaller network), measures how long each way takes, and submits once for each step with just a little more
time than that step needs. The clock is the real one, so it wants a machine that does nothing else.

`million` runs the cells of the bundle's submission notebook in a process that may allocate no more than
--limit gigabytes, first for one file of 200,000 events with --hours-of-one on the clock, then for --files of
them, once for each of --hours. The networks are very small: what is tested is memory, the plan and the file that is
written.

What was found goes to bench/results/kaggle_plan.json and kaggle_million.json.
"""
import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

RESULTS = Path(__file__).parent/'results'
NAMES = {'plan': 'kaggle_plan.json', 'million': 'kaggle_million.json'}
BRIEF = {'train.epochs': 1, 'train.batch_events': 32}
VERY_SMALL = BRIEF | {'model.width': 16, 'model.neck': 16, 'data.max_pulses': 16}


def make_bundle(folder: Path, settings: dict) -> Path:
    "A bundle with everything, of networks that learn from 600 events."
    from icecube_nb.core.config import override, tiny
    from icecube_nb.data.prepare import prepare
    from icecube_nb.inference.answer_options import AnswerOptions
    from icecube_nb.inference.answers import open_dump
    from icecube_nb.inference.ensemble import EnsembleConfig
    from icecube_nb.inference.ensemble_folder import fit_ensemble
    from icecube_nb.inference.predict import predict
    from icecube_nb.inference.stack import STACKS, fit_stack
    from icecube_nb.kaggle import bundle
    from icecube_nb.physics.simulate import write_dataset
    from icecube_nb.training.loop import train
    target = folder/'input'/'bundle'
    if target.is_dir():
        return target
    data = write_dataset(folder/'made', 2, 300, test_events=10)
    for name, layers in (('main', 2), ('small', 1)):
        train(prepare(data), folder/name, override(tiny(), settings | {'model.layers': layers}), device='cpu')
        dump = folder/f'{name}-dump'
        predict(data, folder/name, folder/'heads.csv', dump=dump, batches=[1, 2], device='cpu')
        one_pass = replace(STACKS['compact'](), epochs=1)
        fit_stack(open_dump(dump, [1]), folder/f'{name}-stack', one_pass, 'cpu')
    folders = [[folder/f'{name}{kind}' for name in ('main', 'small')] for kind in ('', '-dump', '-stack')]
    fit_ensemble(folders[0], folders[1], folder/'ensemble', folders[2], batches=[2],
                 config=EnsembleConfig(folds=3, rounds=50))
    bundle(folder/'main', target, folder/'small', folder/'small', ensemble=folder/'ensemble',
           options=AnswerOptions(2))
    return target


def make_files(bundle: Path, folder: Path, files: int, events: int) -> Path:
    "Competition files of real size, without truth."
    from icecube_nb.kaggle_files import write_whole_files
    if not (folder/'sample_submission.parquet').is_file():
        write_whole_files(bundle/'check', folder, files, events)
    return folder


# ---- each step of the plan ----

def force_steps(a: argparse.Namespace) -> dict:
    "Submit once for each step, with the time that it needs."
    import tempfile
    from icecube_nb.data.packed import load_packed
    from icecube_nb.inference.predict import files_to_answer
    from icecube_nb.inference.time_plan import measure_ways
    from icecube_nb.kaggle import self_check
    from icecube_nb.kaggle_answers import ways_of
    from icecube_nb.kaggle_files import open_bundle
    made = open_bundle(make_bundle(a.out, BRIEF))
    data = make_files(made.folder, a.out/'input'/'data', 1, a.events)
    check = self_check(made, 'cpu')._replace(device=a.devices)
    ways = ways_of(made, a.devices, 'auto')
    prepared, files = files_to_answer(data, None)
    packed = load_packed(next(iter(files.values())))
    rows = []
    for step in ways:
        with tempfile.TemporaryDirectory() as place:            # anew each time: the machine's speed changes
            costs = measure_ways(ways, packed, prepared, Path(place), {way.name: 1000 for way in ways})
        rows.append(forced_step(a, made, check, data, step.name, costs))
        print(json.dumps(rows[-1]), flush=True)
    return {'events': a.events, 'devices': a.devices, 'rows': rows}


def forced_step(a: argparse.Namespace, made, check, data: Path, step: str, costs: dict[str, float]) -> dict:
    "One submission that can afford a step, and hardly anything better."
    from icecube_nb.inference.answer_sheet import check_against_sample
    from icecube_nb.kaggle_answers import submit
    began, lines = time.monotonic(), []
    seconds = 1.05*a.events*costs[step] + 1
    done = submit(made, check, data, began + seconds, a.out/'submission.csv', progress=lambda *_: None,
                  report=lines.append, costs=costs, part_events=max(a.events//20, 1))
    used = time.monotonic() - began
    rows = check_against_sample(done.out, data/'sample_submission.parquet')
    return {'step': step, 'events_a_second': 1/costs[step], 'seconds_given': seconds, 'seconds_used': used,
            'by_way': done.by_way, 'rows': rows, 'unanswered': done.unanswered, 'plans': lines}


# ---- a million events ----

class MemoryWatch(threading.Thread):
    "Notes the most memory of this process: its own pages, and pages of mapped files."

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.over = {'RssAnon': 0, 'RssFile': 0}, threading.Event()

    def run(self) -> None:
        "Look five times a second."
        while not self.over.wait(0.2):
            now = process_status()
            self.most = {name: max(most, now[name]) for name, most in self.most.items()}


def process_status() -> dict[str, int]:
    "Sizes of this process in kB, as Linux keeps them."
    lines = [line.split() for line in open('/proc/self/status') if line.endswith(' kB\n')]
    return {name.rstrip(':'): int(size) for name, size, _ in lines}


def run_notebook(a: argparse.Namespace) -> None:
    "In a process of its own: the cells of the submission notebook, and what they took."
    resource.setrlimit(resource.RLIMIT_DATA, (int(a.limit*1e9),)*2)
    notebook = json.loads((a.out/'input'/'bundle'/'submission.ipynb').read_text(encoding='utf-8'))
    place, began, watch = {}, time.monotonic(), MemoryWatch()
    watch.start()
    for cell in notebook['cells']:
        if cell['cell_type'] == 'code':
            source = ''.join(cell['source']).replace('HOURS = 8.5', f'HOURS = {a.hours[0]}')
            exec(compile(source, 'submission.ipynb', 'exec'), place)
    watch.over.set()
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss*1024
    done = place['done']
    print('FOUND ' + json.dumps({
        'events': done.events, 'seconds': time.monotonic() - began, 'by_way': done.by_way,
        'plans': done.plans, 'unanswered': done.unanswered,
        'peak_gb': process_status()['VmHWM']*1024/1e9,
        'own_gb': watch.most['RssAnon']*1024/1e9, 'mapped_files_gb': watch.most['RssFile']*1024/1e9,
        'largest_worker_gb': workers/1e9}))


def answer_million(a: argparse.Namespace) -> dict:
    "The notebook for one file, and for all of them with each limit of time."
    bundle = make_bundle(a.out, VERY_SMALL)
    rows = []
    for files, hours in ((1, a.hours_of_one), *((a.files, hours) for hours in a.hours)):
        place = a.out/f'{files} files'
        (place/'input').mkdir(parents=True, exist_ok=True)
        if not (place/'input'/'bundle').exists():
            (place/'input'/'bundle').symlink_to(bundle.resolve())
        make_files(bundle, place/'input'/'data', files, a.events)
        print(f'{files} files are written', flush=True)
        env = os.environ | {'ICECUBE_INPUT_DIR': str(place/'input'), 'ICECUBE_CACHE_DIR': str(place/'cache'),
                            'PYTHONPATH': ''}
        command = [sys.executable, str(Path(__file__).resolve()), 'notebook', '--out', str(place),
                   '--limit', str(a.limit), '--hours', str(hours)]
        with subprocess.Popen(command, cwd=place, env=env, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                print(line, end='', flush=True)
                if line.startswith('FOUND '):
                    rows.append({'files': files, 'hours': hours} | json.loads(line.removeprefix('FOUND ')))
        if process.returncode:
            sys.exit(f'the notebook ended with {process.returncode}')
    return {'events_of_a_file': a.events, 'limit_gb': a.limit, 'width': 16, 'layers': [2, 1], 'rows': rows}


def main() -> None:
    "Measure, print, and keep the numbers."
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['plan', 'million', 'notebook'])
    parser.add_argument('--out', type=Path, required=True, help='folder for bundle and files')
    parser.add_argument('--events', type=int, help='of a file; 40,000 for `plan`, 200,000 for `million`')
    parser.add_argument('--devices', default='cpu,cpu', help='`plan`: two devices stand in for two GPUs')
    parser.add_argument('--files', type=int, default=5)
    parser.add_argument('--limit', type=float, default=8.0, help='gigabytes that the process may allocate')
    parser.add_argument('--hours', type=float, nargs='+', default=[0.06, 0.025],
                        help='on the clock of each of the larger runs')
    parser.add_argument('--hours-of-one', type=float, default=0.05, help='on the clock of the run on one file')
    a = parser.parse_args()
    a.out = a.out.resolve()
    if a.what == 'notebook':
        run_notebook(a)
        return
    a.events = a.events or {'plan': 40_000, 'million': 200_000}[a.what]
    found = {'plan': force_steps, 'million': answer_million}[a.what](a)
    about = {'cores': os.cpu_count(), 'machine': platform.machine(), 'load_at_the_end': os.getloadavg()[0]}
    (RESULTS/NAMES[a.what]).write_text(json.dumps({'about': about} | found, indent=1) + '\n')


if __name__ == '__main__':
    main()
