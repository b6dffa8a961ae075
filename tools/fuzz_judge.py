"""Is what a command made, with exit status 0, a result? `tools/fuzz.py` asks in the process that ran it."""
import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd

from icecube_nb.core.outputs import MARKER


def option(words: list[str], name: str) -> str | None:
    "The last value of an option, as the parser takes it; `--run` has another name, for torchrun."
    found, names = None, (name, '--run-folder') if name == '--run' else (name,)
    for at, word in enumerate(words[:-1]):
        if word in names:
            found = words[at + 1]
    return found


def read_answers(path: Path) -> pd.DataFrame:
    "A submission, .csv or .parquet."
    return pd.read_parquet(path) if path.suffix.lower() == '.parquet' else pd.read_csv(path)


def wrong_answers(answers: pd.DataFrame) -> list[str]:
    "Ids that come twice, angles out of range."
    found = []
    if answers['event_id'].duplicated().any():
        found.append('an event is answered twice')
    for name, most in (('azimuth', 2*np.pi), ('zenith', np.pi)):
        values = answers[name].to_numpy(float)
        if not ((values >= 0) & (values <= most + 1e-6)).all():
            found.append(f'{name} is out of range or not finite')
    return found


def judge_predict(task: dict, folder: Path) -> list[str]:
    "All events asked for, once each; the known answers where only the form of the files changed."
    words = task['words']
    out = Path(os.path.expanduser(option(words, '--out') or 'submission.csv'))
    if not out.is_file() or '--batches' in words:
        return [] if out.exists() else ['there is no output']
    answers = read_answers(out)
    found = wrong_answers(answers)
    data = Path(option(words, '--data') or 'data')
    source = data/'sample_submission.parquet'
    source = source if source.is_file() else data/'test_meta.parquet'
    wanted = pd.read_parquet(source, columns=['event_id'])
    wanted = wanted.reset_index() if 'event_id' not in wanted else wanted
    if sorted(map(int, wanted['event_id'])) != sorted(answers['event_id']):
        found.append('the events are others than those asked for')
    if task['kind'] == 'form' and option(words, '--run') == 'run' and '--long-run' not in words:
        known = pd.read_csv(folder/'submission.csv').set_index('event_id')
        now = answers.set_index('event_id').loc[known.index]
        off = np.abs(now - known).to_numpy().max()
        if not off < 1e-4:
            found.append(f'answers differ by {off:.1e} although only the form of the files changed')
    return found


def judge_skymap(words: list[str]) -> list[str]:
    "A map of probabilities over the whole sky, in the asked resolution."
    from astropy.io import fits
    path = Path(os.path.expanduser(option(words, '--out') or f'event_{words[1]}.fits'))
    if not path.is_file():
        return [] if path.exists() else ['there is no map']
    with fits.open(path) as file:
        probability, nside = file[1].data['PROB'], file[1].header['NSIDE']
    found = [] if len(probability) == 12*nside**2 else ['the map has not 12 nside^2 pixels']
    if not (probability >= 0).all() or abs(probability.sum() - 1) > 1e-6:
        found.append(f'the probabilities sum to {probability.sum()}')
    asked = option(words, '--nside')
    return found if asked is None or int(asked) == nside else [*found, f'nside is {nside}']


def judge(task: dict, folder: Path) -> list[str]:
    "What is wrong with the result of a command that ended well."
    command, words = task['command'], task['words']
    printed = (folder.parents[1]/'out'/'stdout').read_text(errors='replace')
    out = option(words, '--out')
    if command == 'predict':
        return judge_predict(task, folder)
    if command == 'evaluate':
        found = re.search(r'mean angular error (\S+)', printed)
        value = float(found[1]) if found else float('nan')
        return [] if 0 <= value <= np.pi + 1e-6 else [f'the mean error is {value}']
    if command == 'train':
        from icecube_nb.training.checkpoints import load_checkpoint
        load_checkpoint(option(words, '--run'))
        return [] if re.search(r'\d+ steps', printed) else ['it does not say how many steps were made']
    if command == 'stack' and out:
        from icecube_nb.inference.stack import load_stack
        load_stack(Path(os.path.expanduser(out)))
    if command == 'ensemble' and out:
        from icecube_nb.inference.ensemble_folder import load_ensemble
        load_ensemble(Path(os.path.expanduser(out)))
    if command == 'bundle' and out:
        from icecube_nb.kaggle import open_bundle
        open_bundle(os.path.expanduser(out))
    if command in ('simulate', 'convert') and out:
        from icecube_nb.data.check import STRUCTURE, folder_faults
        faults = [f for f in folder_faults(os.path.expanduser(out)) if f.severity == STRUCTURE]
        return [f'its own check says: {faults[0]}'[:300]] if faults else []
    if command == 'prepare':
        from icecube_nb.data.packed import load_packed
        for path in Path(option(words, '--cache') or 'data/packed').rglob('batch_*.arrow'):
            load_packed(path)
    if command == 'show':
        page = Path(option(words, '--out') or f'event_{words[1]}.html')
        return [] if page.exists() else ['there is no page']
    if command == 'skymap':
        return judge_skymap(words)
    if command == 'runs' and not printed.strip():
        return ['it says nothing']
    return []
