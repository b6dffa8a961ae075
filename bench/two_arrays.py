"""What does a network gain or lose when it learns from two arrays together?

    python bench/two_arrays.py --arrays icecube86 arca_block --out /some/folder

Simulates both arrays with the same seed, trains one network on each alone and one on both, with the same passes
over each array, and answers the test events of both by all three. What crosses from one array to the other is
what a network without a list of sensors can carry over: places, times and charges. One row for each pair of
training and testing goes to bench/results/two_arrays.csv, with the errors of a line fit for comparison, and
what it was made with to two_arrays.json. A call that was stopped goes on from there.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

from icecube_nb.core.config import override, preset
from icecube_nb.core.progress import Progress
from icecube_nb.data.packed import load_packed
from icecube_nb.data.prepare import prepare
from icecube_nb.inference.evaluate import bootstrap_error, paired_difference, read_directions
from icecube_nb.inference.predict import predict
from icecube_nb.inference.summaries import line_fit_packed
from icecube_nb.physics.angles import angle_between, direction_from_angles
from icecube_nb.physics.detector import geometry_table, ice_table, read_geometry
from icecube_nb.physics.simulate import VERSION, write_dataset
from icecube_nb.training.loop import train

RESULTS = Path(__file__).parent/'results'


def make_data(a: argparse.Namespace, array: str) -> Path:
    "Simulated events of an array."
    folder = write_dataset(a.out/array, a.batches, a.events, a.seed, a.test_events, geometry_table(array),
                           ice_table(array), progress=Progress(f'simulating {array}, batches'))
    prepare(folder)
    return folder


def true_directions(data: Path, event_id: np.ndarray) -> np.ndarray: # (E, 3) unit vectors
    "Where the neutrinos of the test events come from."
    truth = pd.read_parquet(data/'test_truth.parquet').set_index('event_id').loc[event_id]
    return direction_from_angles(truth.azimuth.to_numpy(), truth.zenith.to_numpy())


def network_errors(a: argparse.Namespace, run: Path, data: Path) -> np.ndarray: # (E,) rad
    "The errors of a network on the test events."
    out = a.out/f'{run.name}-on-{data.name}.csv'
    predict(data, run, out, device='cpu', answer='vector', other_detector=True)
    table = read_directions(out)
    answer = direction_from_angles(table.azimuth.to_numpy(), table.zenith.to_numpy())
    return angle_between(answer, true_directions(data, table.event_id.to_numpy()))


def line_fit_errors(data: Path) -> np.ndarray: # (E,) rad, in the order of `network_errors`
    "The errors of the line fit on the test events."
    prepared = prepare(data)
    position = read_geometry(prepared.geometry_path)[['x', 'y', 'z']].to_numpy()
    packed = load_packed(*prepared.test.values())
    return angle_between(line_fit_packed(packed, position), true_directions(data, packed.event_id))


def rows_of(errors: dict[str, np.ndarray], tested_on: str) -> list[dict]:
    "One row for each method; the difference is to the network that learned from this array alone, paired."
    own = errors[tested_on]
    rows = []
    for name, values in errors.items():
        row = {'trained_on': name, 'tested_on': tested_on, 'events': len(values), 'mean': values.mean(),
               'mean_error': bootstrap_error(values), 'median': np.median(values),
               'median_error': bootstrap_error(values, 'median')}
        if name != tested_on:
            difference = paired_difference(values, own)
            row |= {'difference': difference.mean, 'difference_error': difference.error}
        rows.append(row)
    return rows


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument('--arrays', nargs=2, default=['icecube86', 'arca_block'])
    parser.add_argument('--out', type=Path, default=Path('runs/two_arrays'))
    parser.add_argument('--batches', type=int, default=4, help='training files of each array, the last validates')
    parser.add_argument('--events', type=int, default=3000, help='in each')
    parser.add_argument('--test-events', type=int, default=3000)
    parser.add_argument('--epochs', type=int, default=4)
    parser.add_argument('--layers', type=int, default=4, help='of the encoder')
    parser.add_argument('--pulses', type=int, default=64, help='of an event, at most')
    parser.add_argument('--preset', default='deep')
    parser.add_argument('--seed', type=int, default=18)
    a = parser.parse_args()
    config = override(preset(a.preset), {'train.epochs': a.epochs, 'model.layers': a.layers,
                                        'data.max_pulses': a.pulses, 'data.files_per_epoch': 2*a.batches})
    data = {array: make_data(a, array) for array in a.arrays}
    both = ' + '.join(a.arrays)
    groups = {array: [array] for array in a.arrays} | {both: a.arrays}
    seen = {}
    for name, arrays in groups.items():
        prepared = [prepare(data[array], splits=('train',)) for array in arrays]
        state = train(prepared, a.out/'-'.join(['run', *arrays]), config, device='cpu',
                      progress=Progress(f'training on {name}'))
        seen[name] = state.events
    rows = []
    for array, folder in data.items():
        errors = {'line fit': line_fit_errors(folder)}
        errors |= {name: network_errors(a, a.out/'-'.join(['run', *arrays]), folder)
                   for name, arrays in groups.items()}
        rows += rows_of(errors, array)
    pd.DataFrame(rows).to_csv(RESULTS/'two_arrays.csv', index=False, float_format='%.6g')
    about = {'simulation': VERSION, 'preset': a.preset, 'layers': a.layers, 'max_pulses': a.pulses, 'epochs': a.epochs, 'seed': a.seed, 'answer': 'vector',
             'training_events': (a.batches - 1)*a.events, 'test_events': a.test_events, 'events_seen': seen}
    (RESULTS/'two_arrays.json').write_text(json.dumps(about, indent=1) + '\n')
    print(pd.DataFrame(rows).round(4).to_string(index=False))


if __name__ == '__main__':
    main()
