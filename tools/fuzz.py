"""Does any input make a command fail without a word? Random command lines on randomly damaged files.

Each attempt copies a small set of all files that the commands know (events, packed files, runs, a dump, a
stack, an ensemble, a bundle, tables to convert), damages none to three of them, and runs one command line.
The rule: exit status 0 and a result that holds, or status 2 and one line; never a traceback, a crash, a hang,
a changed input or something left behind. Attempt number N of a seed is always the same.

    python tools/fuzz.py --minutes 60           goes on after the last attempt that is in the record
    python tools/fuzz.py --only 17 --show       one attempt again, with what it printed
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.update(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='passive')
WORK = ROOT/'.fuzz'                  # ignored by git
FILES_SEED = 3                       # of the events
IDLE_SECONDS = 15                    # without work: it waits for something that will not come
MOST_SECONDS = 90                    # of the processor
GRACE_SECONDS = 60                   # from Ctrl-C to the end
MOST_BYTES = 8 << 30                 # of memory
MOST_FILE = 1 << 29                  # bytes of a file
NOBODY = 65534                       # number of a user who owns nothing
LONGEST_LINE = 1500
MADE = {                             # command -> what it may change, because it made it
    'demo': (), 'simulate': (), 'convert': (), 'check': (), 'prepare': (), 'runs': (), 'gpu': (),
    'train': ('run', 'run2', 'past/run'), 'stack': ('stack', 'past/stack'), 'show': ('page.html',),
    'predict': ('submission.csv', 'ensemble.csv', 'ensemble.parquet', 'dump', 'dump2', 'past/dump'),
    'ensemble': ('ensemble', 'past/ensemble'), 'export': ('run/checkpoints', 'run2/checkpoints'),
    'evaluate': (), 'bundle': ('bundle', 'past/bundle'), 'skymap': ('map.fits',)}
CACHES = ('data/packed', 'past/data/packed', 'cache', 'new')  # what any command may write


# ---- the files ----

def make_base(base: Path) -> None:
    "One small example of all that the commands read."
    import tarfile
    import numpy as np
    import pandas as pd
    from dataclasses import replace
    from fuzz_arguments import BRIEF, SECOND
    from icecube_nb.cli import main
    from icecube_nb.physics.detector import geometry_table
    fewer_boosters()
    base.mkdir(parents=True)
    os.chdir(base)
    os.environ['ICECUBE_CACHE_DIR'] = str(base/'cache')

    def command(*words):
        if main([str(word) for word in words]):
            raise SystemExit(f'{words} failed')
    command('simulate', '--out', 'data', '--batches', 3, '--events-per-batch', 130, '--test-events', 40,
            '--seed', FILES_SEED, '--workers', 1, '--array', 'nine_strings')
    for name, more in (('run', ['train.seed=0']), ('run2', SECOND)):
        command('train', '--data', 'data', '--run', name, '--batches', 1, 2, '--device', 'cpu',
                '--set', *BRIEF, *more)
    command('prepare', '--data', 'data', '--workers', 1)
    for name, dump in (('run', 'dump'), ('run2', 'dump2')):
        command('predict', '--data', 'data', '--run', name, '--dump', dump, '--batches', 2, 3,
                '--out', 'new.csv', '--device', 'cpu')
        Path('new.csv').unlink()
    command('stack', '--dump', 'dump', '--out', 'stack', '--batches', 2, '--epochs', 1, '--device', 'cpu')
    command('ensemble', '--runs', 'run', '--dumps', 'dump', '--stacks', 'stack', '--batches', 3,
            '--out', 'ensemble')
    command('bundle', '--run', 'run', '--ensemble', 'ensemble', '--out', 'bundle')
    command('predict', '--data', 'data', '--run', 'run', '--out', 'submission.csv', '--device', 'cpu')
    command('predict', '--data', 'data', '--run', 'ensemble', '--out', 'ensemble.csv', '--device', 'cpu')
    event = int(pd.read_parquet('data/test_meta.parquet')['event_id'][3])
    command('show', event, '--data', 'data', '--out', 'page.html')
    for optional in (['export', '--run', 'run'],                         # needs packages that may be missing
                     ['skymap', str(event), *'--data data --run run --nside 8 --out map.fits'.split()]):
        main(optional)
    with tarfile.open(ROOT/'nbs/appendix/samples/version_0_1.tar.xz') as archive:
        archive.extractall(base/'past', filter='data')
    make_tables(base)
    Path('ice.txt').write_text((ROOT/'icecube_nb/physics/detectors/nine_strings/ice.txt').read_text())
    Path('event').write_text(str(event))


def make_tables(base: Path) -> None:
    "Thirty events as plain tables, as nested ones and as a database."
    import sqlite3
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq
    from icecube_nb.physics.detector import geometry_table
    geometry, rng = geometry_table('nine_strings'), np.random.default_rng(0)
    rows = pd.DataFrame({'event_id': np.repeat(np.arange(30), 20), 'time': rng.uniform(0, 9000, 600),
                         'charge': 1.0, 'signal': 1})
    rows[['x', 'y', 'z']] = geometry[['x', 'y', 'z']].to_numpy()[rng.integers(0, len(geometry), 600)]
    truth = pd.DataFrame({'event_id': np.arange(30), 'azimuth': rng.uniform(0, 6, 30),
                          'zenith': rng.uniform(0, 3, 30)})
    (base/'plain').mkdir()
    rows.to_csv(base/'plain/pulses.csv', index=False)
    truth.to_csv(base/'plain/truth.csv', index=False)
    lists = rows.groupby('event_id').agg(list)
    photons = [{'sensor_pos_x': row.x, 'sensor_pos_y': row.y, 'sensor_pos_z': row.z, 't': row.time}
               for row in lists.itertuples()]
    mc_truth = [{'initial_state_azimuth': row.azimuth, 'initial_state_zenith': row.zenith}
                for row in truth.itertuples()]
    (base/'prometheus').mkdir()
    pq.write_table(pa.table({'photons': photons, 'mc_truth': mc_truth}), base/'prometheus/events.parquet')
    names = {'event_id': 'event_no', 'x': 'dom_x', 'y': 'dom_y', 'z': 'dom_z', 'time': 'dom_time',
             'signal': 'hlc'}
    with contextlib.closing(sqlite3.connect(base/'icecube.db')) as connection:
        rows.rename(columns=names).to_sql('pulses', connection, index=False)
        truth.rename(columns=names).to_sql('truth', connection, index=False)
        connection.commit()


def fewer_boosters() -> None:
    "Ensembles of few trees, for the speed; the code that makes them is the same."
    from icecube_nb.inference import ensemble, ensemble_folder
    few = ensemble.EnsembleConfig(folds=2, rounds=5, threads=1)
    defaults = ensemble_folder.fit_ensemble.__defaults__
    ensemble_folder.fit_ensemble.__defaults__ = tuple(
        few if isinstance(value, ensemble.EnsembleConfig) else value for value in defaults)


# ---- what is there ----

def state_of(folder: Path) -> dict[str, str]: # name below the folder -> what it is
    "The content of every file, by its hash."
    found = {}
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(place)/name
            info = path.lstat()
            kind = stat.S_IFMT(info.st_mode)
            key = path.relative_to(folder).as_posix()
            if kind == stat.S_IFREG:
                with contextlib.suppress(PermissionError):
                    found[key] = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
            elif kind == stat.S_IFLNK:
                found[key] = f'link to {os.readlink(path)}'
            else:
                found[key] = f'entry {kind}'
    return found


def harmed(before: dict[str, str], after: dict[str, str], command: str, words: list[str]) -> list[str]:
    "Inputs that changed or are gone, and temporary files that were left."
    own = (*CACHES, *MADE[command])
    if command == 'prepare':
        own += tuple(os.path.normpath(word) for word in words if 'packed' in word)
    found = []
    for name, content in before.items():
        mine = any(name == place or name.startswith(place + '/') for place in own)
        if after.get(name) != content and not mine:
            found.append(f'{name} was {"changed" if name in after else "removed"}')
    found += [f'{name} was left behind' for name in after.keys() - before.keys()
              if name.endswith('.icecube-nb.part')]
    if any('PICKLE-WAS-EXECUTED' in name for name in after):
        found.append('a pickle was executed')
    return found


# ---- one attempt ----

def plan(number: int, seed: int, folder: Path) -> dict:
    "Copy the files, damage some, choose a command line."
    import fuzz_files
    from fuzz_arguments import USUAL, WEIGHTS, draw_arguments
    rng = random.Random(f'{seed} {number}')
    command = rng.choices(list(USUAL), [WEIGHTS.get(name, 2) for name in USUAL])[0]
    kind = rng.choices(('form', 'files', 'words', 'both', 'user'), (1, 4, 3, 3, 0.5))[0]
    words, endless = draw_arguments(rng, command, calm=kind in ('form', 'files'))
    words = [(folder/'event').read_text() if word == 'EVENT' else word for word in words]
    done, reads = [], files_of(folder, words)
    if kind == 'form':
        tables = [path for path in reads if path.suffix == '.parquet' and path.is_relative_to(folder/'data')
                  and 'packed' not in path.parts and 'truth' not in path.name]
        for path in rng.sample(tables, min(len(tables), 3)):
            done.append(f'{path.relative_to(folder)}: {fuzz_files.change_form(rng, path)}')
    elif kind in ('files', 'both') or (kind == 'user' and rng.random() < .5):
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            path = choose_file(rng, reads)
            if path is not None:
                name = path.relative_to(folder)
                done.append(f'{name}: {fuzz_files.damage(rng, path)}')
    return {'number': number, 'command': command, 'kind': kind, 'words': words, 'endless': endless,
            'done': done}


def files_of(folder: Path, words: list[str]) -> list[Path]:
    "The regular files that a command line names, and those below the folders it names."
    found = {}
    for word in words[1:]:
        try:
            path = folder/word
            inside = path.exists() and path.resolve().is_relative_to(folder)
            inside = inside and word not in ('', '.', '..', ' ')
        except (OSError, ValueError):
            continue
        if inside and path.is_file():
            found[path] = None
        elif inside:
            found |= dict.fromkeys(sorted(p for p in path.rglob('*') if p.is_file() and not p.is_symlink()
                                          and p.suffix not in ('.py', '.whl', '.html', '.js')))
    return list(found)


def choose_file(rng: random.Random, reads: list[Path]) -> Path | None:
    "One of the files; each folder is as likely as another."
    there = [path for path in reads if path.is_file() and not path.is_symlink()]
    if not there:
        return None
    by_folder = defaultdict(list)
    for path in there:
        by_folder[path.parent].append(path)
    return rng.choice(by_folder[rng.choice(sorted(by_folder))])


def act(task: dict, folder: Path, out: Path) -> None:
    "In a process of its own: run the command line, look at what it made, note both. Does not return."
    os.setsid()
    os.chdir(folder)
    os.environ.update(HOME=str(folder/'home'), ICECUBE_CACHE_DIR=str(folder/'cache'),
                      TMPDIR=str(out/'temporary'))
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_FILE, MOST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number, name in ((1, 'stdout'), (2, 'stderr')):
        os.dup2(os.open(out/name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    result = os.open(out/'result.json', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if task['kind'] == 'user' and os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from icecube_nb.cli import main
    fewer_boosters()
    note = {'status': 99, 'wrong': []}
    try:
        note['status'] = main([os.fsencode(word).decode(errors='surrogateescape') for word in task['words']])
    except SystemExit as e:
        code = e.code
        note |= {'status': code if isinstance(code, int) else 0 if code is None else 1, 'usage': True}
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    if note['status'] == 0 and not note.get('usage'):
        from fuzz_judge import judge
        try:
            note['wrong'] = judge(task, folder)
        except Exception as e:
            note['wrong'] = [f'the result cannot be read: {type(e).__name__}: {e}'[:300]]
    os.write(result, json.dumps(note).encode())
    os._exit(0)


def busy_seconds(group: int) -> tuple[float, bool]: # and whether one of them is able to run
    "Processor time of all processes of a session."
    ticks, running = 0, False
    for entry in os.listdir('/proc'):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                words = Path(f'/proc/{entry}/stat').read_text().rpartition(')')[2].split()
                if int(words[3]) == group:
                    ticks += int(words[11]) + int(words[12])
                    running |= words[0] in 'RD'
    return ticks/os.sysconf('SC_CLK_TCK'), running


def wait_for(child: int, endless: bool) -> tuple[int | None, str]: # exit code of waitpid; hang, stopped or ''
    "Wait for a process; stop it when it does nothing, or for too long."
    began = moved = time.monotonic()
    busy, why, pause = -1.0, '', 0.005
    while True:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(pause)
        pause = min(pause*1.2, 0.2)
        now = time.monotonic()
        if now - began < 3:
            continue
        used, running = busy_seconds(child)
        if used != busy or running:
            busy, moved = used, now
        if now - moved > IDLE_SECONDS or used > (15 if endless else MOST_SECONDS):
            why = 'waits' if now - moved > IDLE_SECONDS else 'long'
            os.kill(child, signal.SIGINT)
            code = end_of(child)
            why = 'stopped' if why == 'long' and endless and code is not None else f'hang ({why})'
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if code is None:
        os.waitpid(child, 0)
    return code, why


def end_of(child: int) -> int | None:
    "The exit code of a process that was asked to stop; None if it does not."
    until = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < until:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            return code
        time.sleep(.05)
    return None


def attempt(number: int, seed: int, base: Path, place: Path) -> dict:
    "One attempt; what came of it."
    import fuzz_files
    shutil.rmtree(place, ignore_errors=True)
    folder, out = place/'box'/'root', place/'out'
    (out/'temporary').mkdir(parents=True)
    (out/'temporary').chmod(0o1777)
    folder.parent.mkdir()
    fuzz_files.copy_base(base, folder)
    began = time.monotonic()
    planner = os.fork()
    if not planner:
        os.setsid()
        try:
            text = json.dumps(plan(number, seed, folder))
            (out/'plan.json').write_text(text)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.waitpid(planner, 0)
    if not (out/'plan.json').is_file():
        return {'number': number, 'command': 'none', 'kind': 'none', 'words': [], 'done': [], 'seconds': 0,
                'outcome': 'no plan', 'wrong': ['the attempt could not be planned'], 'line': ''}
    task = json.loads((out/'plan.json').read_text())
    before = state_of(folder)
    child = os.fork()
    if not child:
        act(task, folder, out)
    code, why = wait_for(child, task['endless'])
    seconds = round(time.monotonic() - began, 2)
    return task | judge_end(task, code, why, before, folder, out) | {'seconds': seconds}


def waits_for_reader(task: dict, folder: Path) -> bool:
    "Whether the output is a pipe that nobody reads: a command waits, as `> pipe` would."
    named = [word for word in task['words'] if word and '\0' not in word and len(word) < 200]
    outputs = {*named, *MADE[task['command']]}
    return any((folder/word).is_fifo() for word in outputs)


def judge_end(task: dict, code: int | None, why: str, before: dict, folder: Path, out: Path) -> dict:
    "The outcome, and what is wrong with it."
    text = ''
    if (out/'stderr').is_file():
        text = (out/'stderr').read_text(errors='replace')
    try:
        note = json.loads((out/'result.json').read_text())
    except (OSError, ValueError):
        note = {}
    wrong = list(note.get('wrong', [])) + harmed(before, state_of(folder), task['command'], task['words'])
    lines = [line for line in text.replace('\r', '\n').splitlines() if line.strip()]
    status = note.get('status')
    if why.startswith('hang') and waits_for_reader(task, folder):
        outcome = 'stopped'
    elif why.startswith('hang'):
        outcome = 'hang'
    elif why == 'stopped':
        outcome = 'stopped'
        wrong = [w for w in wrong if 'left behind' not in w or code is None]
    elif status is None:
        outcome = 'crash'
    elif 'Traceback (most recent call last)' in text:
        outcome = 'traceback'
    elif 'should not happen' in text:
        outcome = 'fault of the program'
    elif note.get('usage'):
        outcome = 'help' if status == 0 else 'refused by the parser'
    elif status == 0:
        outcome = 'result'
    elif status == 1 and task['command'] == 'check' or status == 2:
        outcome = 'refused'
        wrong += judge_line(task, status, lines, (out/'stdout').read_text(errors='replace'))
    else:
        outcome = f'status {status}'
    # an optional package is not here
    lacks_extra = '; to install it: pip install icecube-nb[' in text
    if outcome == 'refused' and task['kind'] == 'form' and not lacks_extra:
        wrong.append('refused, although only the form of its files is another')
    noise = [line for line in lines
             if any(mark in line for mark in ('[LightGBM]', 'Exception ignored', 'Warning: '))]
    if noise and outcome in ('result', 'refused'):
        wrong.append(f'noise: {noise[0][:200]}')
    if outcome in ('hang', 'crash', 'traceback', 'fault of the program') or outcome.startswith('status'):
        wrong.append(f'{outcome}: {lines[-1][:300] if lines else code}')
    return {'outcome': outcome, 'wrong': wrong, 'line': lines[-1][:400] if lines else ''}


def judge_line(task: dict, status: int, lines: list[str], printed: str) -> list[str]:
    "What is wrong with the line of a refusal."
    start = f'icecube-nb {task["command"]}: '
    if task['command'] == 'check' and 'structural faults' in printed:
        return []
    if not lines or not lines[-1].startswith(start):
        return [f'status {status} without a line: {lines[-1][:200] if lines else ""}']
    if len(lines[-1]) > LONGEST_LINE + sum(map(len, task['words'])):
        return [f'a line of {len(lines[-1])} letters: {lines[-1][:100]}']
    if len(lines[-1]) < len(start) + 12:
        return [f'a line that says nothing: {lines[-1]}']
    return []


# ---- many attempts ----

def pick_seed(work: Path, kind: str, results: Path|None) -> int: # `attempts` or `readers`
    "That of the newest record here, which goes on; else one that no round in the results has."
    here = sorted(work.glob(f'{kind}-*.jsonl'), key=lambda path: path.stat().st_mtime)
    if here:
        return int(here[-1].stem.rpartition('-')[2])
    rounds = json.loads(results.read_text())['rounds'] if results and results.is_file() else []
    return 1 + max((found['seed'] for found in rounds), default=0)


def keep_round(results: Path, figures: dict) -> None:
    "Write the figures of a round to a file of results, in the place of an earlier state of the same round."
    rounds = json.loads(results.read_text())['rounds'] if results.is_file() else []
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True)
    figures = figures | {'commit': commit.stdout.strip()}
    rounds = [found for found in rounds if found['seed'] != figures['seed']] + [figures]
    results.write_text(json.dumps({'rounds': rounds}, indent=1) + '\n')


def summary(records: list[dict], seed: int) -> dict:
    "The figures of a round."
    by_command = defaultdict(Counter)
    for record in records:
        by_command[record['command']]['wrong' if record['wrong'] else record['outcome']] += 1
    return {'seed': seed, 'attempts': len(records), 'wrong': sum(bool(r['wrong']) for r in records),
            'minutes': round(sum(r['seconds'] for r in records)/60, 1),
            'outcomes': dict(Counter(r['outcome'] for r in records).most_common()),
            'by_command': {name: dict(sorted(counts.items())) for name, counts in sorted(by_command.items())},
            'damages': dict(sorted(Counter(': '.join(done.split(': ')[1:]) for record in records
                                           for done in record['done']).items()))}


def show(record: dict, place: Path) -> None:
    "An attempt in lines."
    print(f'#{record["number"]} {record["kind"]}: {" ".join(map(ascii, record["words"]))}')
    for done in record['done']:
        print(f'   damaged {done}')
    print(f'   {record["outcome"]} in {record["seconds"]} s: {record["line"]}')
    for wrong in record['wrong']:
        print(f'   WRONG: {wrong}')
    sys.stdout.flush()


def main() -> int:
    "Attempts until the time is over; exit status 1 if something was wrong."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--minutes', type=float, default=60)
    parser.add_argument('--seed', type=int, help='default: goes on here, or takes a new one')
    parser.add_argument('--only', type=int, nargs='*', help='numbers of attempts')
    parser.add_argument('--show', action='store_true', help='print what the attempts printed')
    parser.add_argument('--work', type=Path, default=WORK)
    parser.add_argument('--out', type=Path, help='add the figures to this file')
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if given.seed is None:
        given.seed = pick_seed(work, 'attempts', given.out)
    base = work/'base'
    if not base_is_made(base):
        return 1
    warm_up()
    record = work/f'attempts-{given.seed}.jsonl'
    known = [json.loads(line) for line in record.read_text().splitlines()] if record.is_file() else []
    if given.only:
        found = []
        for number in given.only:
            found.append(attempt(number, given.seed, base, work/'again'))
            show(found[-1], work/'again')
            if given.show:
                for name in ('stdout', 'stderr'):
                    print((work/'again'/'out'/name).read_text(errors='replace'))
        return int(any(r['wrong'] for r in found))
    until, number = time.monotonic() + 60*given.minutes, 1 + max((r['number'] for r in known), default=-1)
    while time.monotonic() < until:
        done = attempt(number, given.seed, base, work/'now')
        if done['wrong']:
            show(done, work/'now')
        known.append(done)
        with open(record, 'a') as file:
            file.write(json.dumps(done) + '\n')
        number += 1
    figures = summary(known, given.seed)
    if given.out:
        keep_round(given.out, figures)
    print(json.dumps(figures['outcomes']), f'{figures["wrong"]} wrong')
    return int(figures['wrong'] > 0)


def base_is_made(base: Path) -> bool:
    "Make the example that everything is tried on, in a process of its own. Returns whether it is there."
    if (base/'event').is_file():                            # written last
        return True
    shutil.rmtree(base, ignore_errors=True)
    child = os.fork()
    if not child:
        make_base(base)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def warm_up() -> None:
    "Import all that the commands use, once; nothing is computed, so that processes can be forked."
    import lightgbm, pandas, pyarrow.parquet, pyarrow.csv, torch, safetensors.numpy        # noqa: E401, F401
    import icecube_nb.cli, icecube_nb.demo, icecube_nb.kaggle, icecube_nb.show             # noqa: E401, F401
    import icecube_nb.inference.ensemble_predict, icecube_nb.training.loop                 # noqa: E401, F401
    import icecube_nb.data.check, icecube_nb.data.convert, fuzz_judge                      # noqa: E401, F401
    torch.set_num_threads(1)
    icecube_nb.cli.parse(['runs'])


if __name__ == '__main__':
    sys.exit(main())
