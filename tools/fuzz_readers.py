"""Does a damaged file make a reader fail in another way than by one line? Thousands of damages.

`tools/fuzz.py` runs whole commands. Here the readers that the commands share are called alone, on fresh
copies of one file or folder each, damaged as there. The rule: a value, or a ValueError, OSError, ImportError
or MemoryError, whose text is one line that names the file. Each hundred attempts run in a process of their
own, so a crash is seen.

    python tools/fuzz_readers.py --minutes 5
"""
import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import fuzz

FAULTS = (ValueError, OSError, ImportError, MemoryError)          # that the command line makes one line of
SECONDS = 20                         # of an attempt


def readers() -> dict[str, tuple[str, Callable[[Path], object]]]: # name -> what is damaged, and who reads it
    "The readers of the package."
    from icecube_nb.data.check import folder_faults
    from icecube_nb.data.competition import split_train_meta
    from icecube_nb.data.layouts import event_chunks, find_sources
    from icecube_nb.data.packed import load_packed
    from icecube_nb.data.prepare import open_prepared
    from icecube_nb.data.record import read_record
    from icecube_nb.inference.answers import network_of, open_dump, usable_rows
    from icecube_nb.inference.ensemble_folder import load_with_networks
    from icecube_nb.inference.evaluate import read_directions
    from icecube_nb.inference.predict import load_predictor
    from icecube_nb.inference.stack import load_stack
    from icecube_nb.kaggle import open_bundle
    from icecube_nb.network.engines import read_about
    from icecube_nb.physics.detector import read_geometry, read_ice
    from icecube_nb.training.checkpoints import find_checkpoint, load_checkpoint, read_detectors
    from icecube_nb.training.runs import format_runs, list_runs, log_rows
    from icecube_nb.training.state import resume_state

    def resumed(run):
        return resume_state(run, load_checkpoint(run)[0], 'cpu')

    def dump(folder):
        found = open_dump(folder)
        return usable_rows(found), network_of(found), {name: found.column(name) for name in found.columns[0]}

    def converted(folder):
        return [list(event_chunks(source)) for source in find_sources([folder])]

    def packed(path):
        batch = load_packed(path)
        return batch.bad_events, batch.lengths, len(batch.pulses)
    return {
        'run': ('run', lambda p: load_predictor(p, 'cpu')), 'state': ('run2', resumed),
        'log': ('run', log_rows),
        'runs': ('run', lambda p: format_runs(list_runs(p.parent), p.parent)),
        'record': ('run', lambda p: (read_record(find_checkpoint(p)), read_detectors(find_checkpoint(p)))),
        'old run': ('past/run', lambda p: load_predictor(p, 'cpu')), 'old state': ('past/run', resumed),
        'engine': ('run', lambda p: read_about(find_checkpoint(p)/'model.onnx')),
        'packed': ('data/packed/train/batch_1.arrow', packed),
        'old packed': ('past/data/packed/test/batch_5.arrow', packed),
        'prepared': ('data/packed', lambda p: open_prepared(p).angle_bins),
        'dump': ('dump', dump), 'stack': ('stack', load_stack), 'bundle': ('bundle', open_bundle),
        'ensemble': ('ensemble', lambda p: load_with_networks(p, 'cpu')), 'ice': ('ice.txt', read_ice),
        'geometry': ('data/sensor_geometry.csv', read_geometry),
        'answers': ('submission.csv', read_directions),
        'answers.parquet': ('ensemble.parquet', read_directions),
        'meta': ('data/train_meta.parquet', lambda p: split_train_meta(p, p.parent/'made')),
        'folder': ('data', lambda p: list(folder_faults(p))), 'plain': ('plain', converted),
        'nested': ('prometheus', converted), 'database': ('icecube.db', converted)}


def one(number: int, seed: int, base: Path, place: Path) -> dict:
    "Damage a copy, read it."
    import fuzz_files
    rng = random.Random(f'readers {seed} {number}')
    known = readers()
    name = rng.choice(list(known))
    source, read = known[name]
    shutil.rmtree(place, ignore_errors=True)
    target = place/source
    target.parent.mkdir(parents=True)
    if (base/source).is_dir():
        without = shutil.ignore_patterns('packed') if name == 'folder' else None
        shutil.copytree(base/source, target, ignore=without)
    else:
        shutil.copy(base/source, target)
    done = []
    for _ in range(rng.choice((1, 1, 2))):
        files = [target] if target.is_file() else sorted(target.rglob('*'))
        path = fuzz.choose_file(rng, files)
        if path is not None:
            done.append(f'{path.relative_to(place)}: {fuzz_files.damage(rng, path)}')
    record = {'number': number, 'reader': name, 'done': done, 'wrong': ''}
    began = time.monotonic()
    signal.alarm(SECONDS)
    try:
        read(target)
        record['outcome'] = 'read'
    except FAULTS as e:
        record['outcome'] = 'refused'
        text = str(e)
        if isinstance(e, TimeoutError):
            record['wrong'] = f'more than {SECONDS} s'
        elif not (isinstance(e, MemoryError) or place.name in text or target.name in text
                  or name.endswith('state') and text.startswith('model.')): # there it is the user's setting
            record['wrong'] = f'the line names no file: {type(e).__name__}: {text[:300]}'
        elif len(text.splitlines()) > 1:
            record['wrong'] = f'several lines: {text[:300]}'
    except Exception as e:
        frame = traceback.extract_tb(e.__traceback__)[-1]
        mine = [f for f in traceback.extract_tb(e.__traceback__) if 'icecube_nb' in f.filename][-1:]
        places = [f'{Path(f.filename).name} {f.lineno} {f.name}' for f in (*mine, frame)]
        record |= {'outcome': 'fault', 'wrong': f'{type(e).__name__}: {str(e)[:200]} ({"; ".join(places)})'}
    signal.alarm(0)
    return record | {'seconds': round(time.monotonic() - began, 3)}


def many(start: int, seed: int, base: Path, place: Path, out: Path) -> None:
    "A hundred attempts, in a process of its own. Does not return."
    import resource
    import warnings
    warnings.simplefilter('ignore')
    resource.setrlimit(resource.RLIMIT_AS, (fuzz.MOST_BYTES, fuzz.MOST_BYTES))

    def too_long(*_):
        raise TimeoutError
    signal.signal(signal.SIGALRM, too_long)
    with open(out, 'a') as file:
        for number in range(start, start + 100):
            file.write(json.dumps({'begun': number}) + '\n')
            file.flush()
            file.write(json.dumps(one(number, seed, base, place)) + '\n')
            file.flush()
    os._exit(0)


def wait(child: int, record: Path) -> int: # 0, or what waitpid says
    "Wait for a hundred attempts; end them if one of them hangs where no signal reaches it."
    while True:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            return code
        if record.is_file() and time.time() - record.stat().st_mtime > 6*SECONDS:
            os.kill(child, signal.SIGKILL)
        time.sleep(.5)


def main() -> int:
    "Attempts until the time is over; exit status 1 if something was wrong."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--minutes', type=float, default=5)
    parser.add_argument('--seed', type=int, help='default: goes on here, or takes a new one')
    parser.add_argument('--work', type=Path, default=fuzz.WORK)
    parser.add_argument('--only', type=int, nargs='*')
    parser.add_argument('--out', type=Path, help='add the figures to this file')
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not fuzz.base_is_made(work/'base'):
        return 1
    if given.seed is None:
        given.seed = fuzz.pick_seed(work, 'readers', given.out)
    fuzz.warm_up()
    place, record = work/'reading', work/f'readers-{given.seed}.jsonl'
    for number in given.only or ():
        print(json.dumps(one(number, given.seed, work/'base', place), indent=1))
    if given.only:
        return 0
    lines = [json.loads(line) for line in record.read_text().splitlines()] if record.is_file() else []
    number = 1 + max((line.get('number', -1) for line in lines), default=-1)
    until = time.monotonic() + 60*given.minutes
    while time.monotonic() < until:
        seen = record.stat().st_size if record.is_file() else 0
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            many(number, given.seed, work/'base', place, record)
        code = wait(child, record)
        with open(record) as file:
            file.seek(seen)
            found = [json.loads(line) for line in file]
        if code:
            died = found[-1].get('begun', found[-1].get('number'))
            crash = {'number': died, 'reader': '?', 'done': [], 'outcome': 'crash', 'seconds': 0,
                     'wrong': f'the process died: {code}'}
            found.append(crash)
            with open(record, 'a') as file:
                file.write(json.dumps(crash) + '\n')
            number = died + 1
        else:
            number += 100
        for line in found:
            if line.get('wrong'):
                print(f'#{line["number"]} {line["reader"]}: {line["done"]}\n   WRONG: {line["wrong"]}')
                sys.stdout.flush()
        lines += found
    records = [line for line in lines if 'number' in line]
    by_reader = defaultdict(Counter)
    for line in records:
        by_reader[line['reader']]['wrong' if line['wrong'] else line['outcome']] += 1
    figures = {'seed': given.seed, 'attempts': len(records), 'wrong': sum(bool(r['wrong']) for r in records),
               'minutes': round(sum(r['seconds'] for r in records)/60, 1),
               'by_reader': {name: dict(sorted(by_reader[name].items())) for name in sorted(by_reader)}}
    if given.out:
        fuzz.keep_round(given.out, figures)
    print(figures['attempts'], 'attempts,', figures['wrong'], 'wrong')
    return int(figures['wrong'] > 0)


if __name__ == '__main__':
    sys.exit(main())
