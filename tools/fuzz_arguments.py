"""Which command lines does `tools/fuzz.py` try?

The commands and their options are read from the parser itself, so a new option is tried without a change
here. `USUAL` has a command line for each command that works on the files of `tools/fuzz.py`; `draw_arguments`
changes some of its values, leaves some out and adds others, valid ones, borderline ones and hostile ones.

    python tools/fuzz_arguments.py              names commands and options that are never tried
"""
import random
import sys
import types
import warnings
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Union, get_args, get_origin, get_type_hints

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from icecube_nb.cli import COMMANDS
from icecube_nb.core.config import CHOICES, PRESETS, RANGES, Config
from icecube_nb.data.layouts import LAYOUTS
from icecube_nb.physics.detector import DETECTORS
from icecube_nb.physics.simulation_config import WORLDS

BRIEF = ('model.width=16', 'model.layers=1', 'model.neck=16', 'train.epochs=1', 'train.batch_events=16',
         'data.max_pulses=32', 'train.validation_events=20')
USUAL = {                            # command -> option -> words; paths are those of `fuzz.make_base`
    'demo': {'minutes': ['0.02'], 'out': ['new/demo'], 'preset': ['tiny'], 'batches': ['4'],
             'events_per_batch': ['100'], 'test_events': ['20'], 'device': ['cpu']},
    'simulate': {'out': ['new/simulated'], 'batches': ['1'], 'events_per_batch': ['20'],
                 'test_events': ['10'], 'workers': ['1'], 'array': ['nine_strings']},
    'convert': {'inputs': ['plain'], 'out': ['new/converted']},
    'check': {'folder': ['data']},
    'prepare': {'data': ['data'], 'workers': ['1']},
    'train': {'run': ['new/run'], 'data': ['data'], 'batches': ['1', '2'], 'device': ['cpu'],
              'set': list(BRIEF)},
    'runs': {'folder': ['.']},
    'gpu': {'device': ['cpu'], 'seconds': ['0.1'], 'presets': ['tiny'], 'events': ['4']},
    'predict': {'run': ['run'], 'data': ['data'], 'device': ['cpu'], 'out': ['new/answers.csv']},
    'stack': {'dump': ['dump'], 'out': ['new/stack'], 'batches': ['2'], 'epochs': ['1'], 'device': ['cpu']},
    'ensemble': {'runs': ['run'], 'dumps': ['dump'], 'stacks': ['stack'], 'batches': ['3'],
                 'out': ['new/ensemble']},
    'export': {'run': ['run']},
    'evaluate': {'submission': ['submission.csv'], 'truth': ['data/test_truth.parquet']},
    'bundle': {'run': ['run'], 'out': ['new/bundle']},
    'show': {'event_id': ['EVENT'], 'data': ['data'], 'run': ['run'], 'out': ['new/page.html'],
             'device': ['cpu']},
    'skymap': {'event_id': ['EVENT'], 'data': ['data'], 'run': ['run'], 'out': ['new/map.fits'],
               'nside': ['8'], 'device': ['cpu']},
}
SECOND = ('train.optimiser=muon', 'train.average_decay=0.9', 'train.seed=1')   # of the run `run2`
ALSO = {                             # command -> other usual command lines, by what is different
    'train': [{'run': ['run'], 'set': [*BRIEF, 'train.seed=0']}, {'run': ['run2'], 'set': [*BRIEF, *SECOND]}],
    'predict': [{'run': ['ensemble']}, {'run': ['past/run'], 'data': ['past/data']},
                {'run': ['past/ensemble'], 'data': ['past/data']},
                {'run': ['run2'], 'dump': ['dump2'], 'batches': ['2', '3']}, {'long_run': ['run2']}],
    'evaluate': [{'submission': ['ensemble.csv']}, {'submission': ['ensemble.parquet']}],
    'convert': [{'inputs': ['prometheus']}, {'inputs': ['icecube.db']}], 'check': [{'run': ['run']}],
    'stack': [{'out': ['stack']}], 'ensemble': [{'out': ['ensemble']}],
    'bundle': [{'ensemble': ['ensemble']}, {'out': ['bundle']}],
    'show': [{'submission': ['submission.csv']}, {'out': ['page.html']}], 'runs': [{'folder': ['past']}],
    'skymap': [{'head': ['classes']}, {'nside': ['4'], 'out': ['map.fits']}]}
WEIGHTS = {'demo': 0.3, 'gpu': 0.3, 'export': 0.15, 'bundle': 1, 'ensemble': 2, 'train': 3, 'predict': 6}
VALID = {                            # option -> words that may be right
    'run': [['run'], ['run2'], ['ensemble'], ['past/run'], ['past/ensemble']], 'long_run': [['run2']],
    'cheap_run': [['run2']], 'start_from': [['run'], ['run2']], 'runs': [['run', 'run2'], ['run']],
    'dumps': [['dump', 'dump2'], ['dump']], 'stacks': [['stack', 'stack'], ['stack']],
    'long_runs': [['run2']], 'dump': [['dump'], ['new/dump'], ['dump2']], 'ensemble': [['ensemble']],
    'cache': [['new/cache'], ['data/packed']], 'truth': [['data/test_truth.parquet']],
    'submission': [['submission.csv'], ['ensemble.csv']], 'folder': [['data'], ['.']],
    'data': [['data']], 'geometry': [['data/sensor_geometry.csv']], 'ice': [['ice.txt']],
    'inputs': [['plain'], ['prometheus'], ['icecube.db'], ['plain/pulses.csv', 'plain/truth.csv']],
    'test_events': [['5']], 'pulses': [['pulses']], 'columns': [['time=time', 'x=x']],
    'layout': [['auto'], *([name] for name in LAYOUTS)],
    'direction': [['from'], ['to']], 'decode': [['published'], ['mean_vector']],
    'answer': [['vector'], ['classes']], 'precision': [['fp32'], ['bf16'], ['fp16'], ['auto']],
    'engine': [['onnxruntime'], ['openvino'], ['torch']],
    'device': [['cpu'], ['auto'], ['cuda'], ['cuda:1'], ['cpu,cpu']], 'preset': [[name] for name in PRESETS],
    'presets': [['tiny'], ['small']], 'attention': [['auto'], ['padded'], ['sdpa'], ['varlen']],
    'array': [[name] for name in DETECTORS], 'world': [[name] for name in WORLDS],
    'format': [['csv'], ['parquet'], ['events']], 'turns': [['2'], ['3'], ['6']],
    'max_pulses': [['16'], ['64']], 'head': [['classes'], ['vector'], ['mixture']],
    'nside': [['1'], ['4'], ['1024']], 'more_data': [['past/data']], 'session_minutes': [['0.05'], ['5']],
    'pack_space': [['100MB'], ['1 GB'], ['1B']], 'owner': [['somebody']], 'name': [['my-bundle']],
    'batches': [['1'], ['2', '3'], ['4'], ['1', '2', '3']], 'workers': [['1'], ['2']], 'minutes': [['0.01']],
    'out': [['new/out.csv'], ['new/out.parquet'], ['new/folder'], ['new/out.html']], 'epochs': [['1']],
    'offset_m': [['1', '2', '3']], 'seconds': [['0.1']], 'events': [['4']],
}
NUMBERS = ['0', '-1', '1', '2', '7', str(2**31), str(2**63), '-' + '9'*40, '1e3', '1.5', 'nan', 'inf', '-inf',
           '1e-320', '', 'ten', '0x10', '1_000', '٣']
MOST_WORKERS = 16                    # a machine's processes are no fair game
PATHS = ['', ' ', '.', '..', 'missing/name', 'odd/fifo', 'odd/loop', 'odd/link', 'odd/empty', 'odd/folder',
         'odd/dangling', 'odd/ümlaut und mehr', '/dev/null', '/dev/full', '/dev/zero', 'a'*300, 'new\nline',
         '--', '~', '~nobody1/x', 'odd/\udcff', 'data', 'data/test_meta.parquet',
         'data/train/batch_1.parquet', 'data/sensor_geometry.csv', 'data/sample_submission.parquet',
         'data/packed', 'run', 'run/log.csv', 'dump', 'stack', 'ensemble', 'ensemble/ensemble.json',
         'bundle', 'bundle/main', 'bundle/check',
         'submission.csv', 'ensemble.csv', 'page.html', 'plain', 'icecube.db', 'ice.txt', 'new/a/b/c.csv']
TEXTS = ['', ' ', 'x', '-', '../x', 'a=b', '=', 'NaN', '\\0', 'ü', 'auto ', 'CPU', 'x'*5000, 'cuda:99',
         'cpu:-1', 'meta', "'; --", '%s%n', '\udc80']
LONG = {str(2**31), '1e3', '1_000'}  # a count that makes work for longer than anybody waits


@dataclass(frozen=True)
class Option:
    "What the parser knows about an option."
    name: str
    kind: type                       # Path, int, float, str or bool
    flags: tuple[str, ...]           # its names on the command line
    many: int                        # 0: one word; -1: as many as come; else so many
    positional: bool
    needed: bool


def options_of(command: str) -> list[Option]:
    "The options of a command, read from its definition."
    made, hints = COMMANDS[command], get_type_hints(COMMANDS[command], include_extras=True)
    found = []
    for option in fields(made):
        kind, marks = hints[option.name], ()
        if hasattr(kind, '__metadata__'):
            kind, marks = get_args(kind)[0], kind.__metadata__
        if get_origin(kind) in (Union, types.UnionType):
            kind = next(part for part in get_args(kind) if part is not type(None))
        many = 0
        if get_origin(kind) is tuple:
            parts = get_args(kind)
            many, kind = (-1 if parts[-1] is ... else len(parts)), parts[0]
        positional = any(mark is tyro.conf.Positional or 'Positional' in repr(mark) for mark in marks)
        aliases = [alias for mark in marks for alias in getattr(mark, 'aliases', None) or ()]
        flags = (f'--{option.name.replace("_", "-")}', *aliases)
        found.append(Option(option.name, kind, flags, many, positional, option.default is MISSING))
    return found


def draw_setting(rng: random.Random) -> str:
    "A word for `train --set`, of any setting there is."
    names = [f'{group}.{field.name}' for group in ('model', 'data', 'train')
             for field in fields(getattr(Config(), group))]
    name = rng.choice([*names, *names, *names, 'train.nothing', 'x', '', 'name'])
    values = [*NUMBERS, 'true', 'false', 'adamw', 'muon', '0.9,0.95', ',', 'classes', 'vector',
              'classes,vector', 'bin_loss:1', 'x:nan', 'auto', 'fp16', 'bf16', 'published', 'nearby',
              'attention', '3', '5', '0.1']
    if name in RANGES:
        values += [repr(limit) for limit in RANGES[name]]*3
    values += [*CHOICES.get(name, ())]*3
    return f'{name}={rng.choice(values)}' if rng.random() < .97 else name


def draw_word(rng: random.Random, option: Option) -> str:
    "A hostile or borderline value."
    if option.name == 'set':
        return draw_setting(rng)
    if option.kind is Path:
        return rng.choice(PATHS)
    if option.kind in (int, float):
        word = rng.choice(NUMBERS)
        small = option.name != 'workers' or not word.lstrip('-').isdigit() or int(word) < MOST_WORKERS
        return word if small else str(MOST_WORKERS)
    return rng.choice(TEXTS)


def draw_words(rng: random.Random, option: Option, usual: list[str] | None) -> list[str]:
    "Values of an option: mostly such as may be right."
    if option.name == 'set':
        return [*BRIEF, *(draw_setting(rng) for _ in range(rng.choice((1, 1, 2))))]
    if option.name in VALID and rng.random() < .5:
        return list(rng.choice(VALID[option.name]))
    if not option.many:
        return [draw_word(rng, option)]
    count = option.many if option.many > 0 else rng.choice((0, 1, 1, 2, 3))
    words = [draw_word(rng, option) for _ in range(count)]
    return words + (usual or []) if rng.random() < .3 else words


def draw_arguments(rng: random.Random, command: str, calm: bool # only what is usual
                   ) -> tuple[list[str], bool]: # the words, and whether the work may be endless
    "A command line."
    usual, words, front = USUAL[command] | rng.choice([{}, *ALSO.get(command, [])]), [], []
    for option in options_of(command):
        chosen = usual.get(option.name)
        if not calm:
            if chosen is None and rng.random() < .12 or chosen is not None and rng.random() < .12:
                chosen = draw_words(rng, option, chosen)
            elif chosen is not None and rng.random() < .03:
                chosen = None
        if chosen is None:
            continue
        flag = rng.choice(option.flags)
        if option.kind is bool:
            words.append([rng.choice((flag, '--no-' + flag[2:]))])
        elif option.positional:
            front += chosen
        else:
            words.append([flag, *chosen])
    if not calm:
        rng.shuffle(words)
        if words and rng.random() < .03:
            words.append(rng.choice(words))
        if rng.random() < .02:
            words.append([rng.choice(('--nothing', '-h', '--help', '-', 'more'))])
    flat = [*front, *(word for group in words for word in group)]
    return [command, *flat], bool(LONG & {word.rpartition('=')[2] for word in flat})


# ---- is everything tried? ----

def parser_flags(command: str) -> set[str]: # such as {'--out', '--help'}
    "The flags that the parser of a command takes."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)             # tyro has nothing else for it
        parser = tyro.extras.get_parser(COMMANDS[command], config=(tyro.conf.OmitArgPrefixes,))
    return {flag for action in parser._actions for flag in action.option_strings if flag.startswith('--')}


def never_tried(lines: int = 1000) -> list[str]: # of each command
    "Commands and options that the parser knows and that are not drawn."
    import fuzz
    import fuzz_readers
    fuzz_readers.readers()              # ImportError if one of them has another name now
    tables = {'USUAL of tools/fuzz_arguments.py': USUAL, 'MADE of tools/fuzz.py': fuzz.MADE}
    found = [f'the command {name} has no line in {table}: write one'
             for table, known in tables.items() for name in COMMANDS if name not in known]
    rng = random.Random(0)
    for command in USUAL:
        drawn = {word for _ in range(lines) for word in draw_arguments(rng, command, calm=False)[0]}
        found += [f'{command} {flag} is never tried' for flag in sorted(parser_flags(command) - drawn)]
        found += [f'{command} {option.name} is never tried' for option in options_of(command)
                  if option.positional and option.name not in USUAL[command]]
    return found


if __name__ == '__main__':
    print(*never_tried(), sep='\n', end='')
