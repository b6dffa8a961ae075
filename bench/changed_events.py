"""How much does a network lose where clocks, sensors, noise and ice are not as it has learned?

    python bench/changed_events.py

Trains the preset `deep` on 16,000 simulated events, once, and has it answer the same test neutrinos many
times: with changed pulses (a blurred clock, dead sensors, other charges), and simulated again in other ice,
with more noise, more jitter or more dead sensors. Nothing is trained again. Differences are paired, neutrino
by neutrino, over those that trigger in both. Data and network are kept in the cache folder, so that a stopped
call goes on. The table is written to bench/results/changed_events.csv, and the errors on the unchanged events
by number of pulses, in the slices of the published figures in competition.csv, to changed_events_slices.csv.
"""
import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from icecube_nb.core.config import cache_folder, override, preset
from icecube_nb.core.progress import Progress
from icecube_nb.data.prepare import prepare
from icecube_nb.inference.evaluate import bootstrap_error, paired_difference
from icecube_nb.inference.predict import predict
from icecube_nb.inference.robustness import CHANGES, ice_world, same_neutrinos, spoil
from icecube_nb.physics.angles import angular_error
from icecube_nb.physics.simulate import VERSION, write_dataset
from icecube_nb.physics.simulation_config import STANDARD, SimulationConfig
from icecube_nb.training.loop import train

RESULTS = Path(__file__).parent/'results'/'changed_events.csv'
SLICES = {'all': (0, np.inf), 'under 200': (0, 200), '200-999': (200, 1000), '1000 and over': (1000, np.inf)}
FOLDER = cache_folder()/f'changed-events-v{VERSION}'
TRAIN_FILES, FILE_EVENTS, TEST_EVENTS = 4, 4000, 4000       # one more file is for validation
TRAIN_SEED, TEST_SEED = 41, 42
AS_IT_IS = 'as it is'
WORLDS = {
    'ice x 0.9': ice_world(0.9),
    'ice x 1.1': ice_world(1.1),
    '5 ns jitter': replace(STANDARD, name='5 ns jitter', jitter_ns=float(np.hypot(STANDARD.jitter_ns, 5))),
    '10 % dead sensors': replace(STANDARD, name='10 % dead', dead_share=0.1),
    'noise x 1.5': replace(STANDARD, name='noise x 1.5', noise_hz=1.5*STANDARD.noise_hz,
                           noise_bursts_hz=1.5*STANDARD.noise_bursts_hz),
}


def trained_run() -> Path:
    "The run of the network, trained if it is not there yet."
    data = write_dataset(FOLDER/'train', TRAIN_FILES + 1, FILE_EVENTS, TRAIN_SEED, 100)
    one_pass = {'data.files_per_epoch': TRAIN_FILES, 'train.epochs': 1, 'train.seed': 0}
    train(prepare(data, workers=1), FOLDER/'run', override(preset('deep'), one_pass), device='cpu',
          progress=Progress('training'))
    return FOLDER/'run'


def test_folder(name: str, world: SimulationConfig) -> Path:
    "The test neutrinos in a world; the training file is as small as can be."
    return write_dataset(FOLDER/f'test {name}', 1, 1, TEST_SEED, TEST_EVENTS, world=world)


def spoiled_folder(name: str, usual: Path) -> Path:
    "The test events of the standard world with changed pulses, made once."
    folder = FOLDER/f'changed {name}'
    return folder if folder.exists() else spoil(usual, folder, CHANGES[name])


def answer_errors(data: Path, run: Path) -> tuple[pd.DataFrame, np.ndarray]:
    "Truth and angular error [rad] of each test event."
    out = FOLDER/f'{data.name}.csv'
    done = predict(data, run, out, device='cpu', other_detector=True)       # the other ice is meant
    answer = pd.read_csv(done.out).set_index('event_id')
    truth = pd.read_parquet(data/'test_truth.parquet')
    answer = answer.loc[truth.event_id]
    return truth, angular_error(truth.azimuth.to_numpy(), truth.zenith.to_numpy(),
                                answer.azimuth.to_numpy(), answer.zenith.to_numpy())


def by_pulses(truth: pd.DataFrame, errors: np.ndarray) -> pd.DataFrame:
    "Mean and median error by number of pulses, with errors by bootstrap."
    rows = []
    for name, (low, high) in SLICES.items():
        part = errors[(truth.pulses >= low) & (truth.pulses < high)]
        rows.append({'pulses': name, 'events': len(part),
                     'mean': part.mean(), 'mean_se': bootstrap_error(part),
                     'median': np.median(part), 'median_se': bootstrap_error(part, 'median')})
    return pd.DataFrame(rows)


def main() -> None:
    run, usual = trained_run(), test_folder(AS_IT_IS, STANDARD)
    sets = [(AS_IT_IS, 'reference', usual)]
    sets += [(name, 'pulses changed', spoiled_folder(name, usual)) for name in CHANGES if name != AS_IT_IS]
    sets += [(name, 'simulated again', test_folder(name, world)) for name, world in WORLDS.items()]
    rows, progress = [], Progress('changed events')
    for name, way, folder in sets:
        truth, errors = answer_errors(folder, run)
        if way == 'reference':
            reference = truth, errors
            slices = by_pulses(truth, errors)
        here, there = same_neutrinos(reference[0], truth)
        difference = paired_difference(errors[there], reference[1][here])
        rows.append({'change': name, 'how': way, 'events': len(errors), 'mean_error': errors.mean(),
                     'mean_error_se': bootstrap_error(errors), 'pairs': len(here),
                     'difference': difference.mean, 'difference_se': difference.error,
                     'pulses': truth.pulses[there].sum()/reference[0].pulses[here].sum(),
                     'preset': 'deep', 'training_events': TRAIN_FILES*FILE_EVENTS,
                     'simulator_version': VERSION})
        progress(len(rows), len(sets))
    table = pd.DataFrame(rows)
    table.to_csv(RESULTS, index=False)
    slices.to_csv(RESULTS.with_name('changed_events_slices.csv'), index=False)
    print(table.round(4).to_string(index=False))


if __name__ == '__main__':
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
