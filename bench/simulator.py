"""How far are simulated events from the real ones, before and after a change of the simulator?

    python bench/simulator.py                           both worlds, written to bench/results/simulator.csv
    git worktree add ../before 1735519
    python bench/simulator.py --before ../before        with an older simulator beside them

Each row is one figure: its value for the real data with its source, and its value for each simulator. For the
three real events of the public test file a row says which share of simulated events has a smaller value
(half of the equal ones included): at 0 or 1 the simulator never makes such an event. The real figures are
typed here; no file of the competition is needed. The rows on speed are ratios of CPU time in this process, runs taking turns.
"""
import argparse
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from icecube_nb.inference.evaluate import line_fit
from icecube_nb.physics.angles import angles_from_direction, angular_error
from icecube_nb.physics.detector import geometry_table
from icecube_nb.physics.events import simulate_events
from icecube_nb.physics.light import DetectorArray
from icecube_nb.physics.simulation_config import WORLDS

RESULTS = Path(__file__).parent/'results'/'simulator.csv'
ICEAGGR = 'training events, as given by github.com/timinar/iceaggr'
PERCENTILES = {50: 63, 75: 89, 90: 144, 95: 221, 99: 1177, 99.9: 19605}       # pulses an event, ICEAGGR
LINE_FIT = 1.18                                                # rad, training events; source not traced
TEST_FILE = 'public test file, events 2092, 7344, 9482'
REAL_EVENTS = {                                                # TEST_FILE
    'pulses': (299, 36, 43),
    'pulses not auxiliary': (241, 4, 11),
    'sensors': (88, 32, 37),
    'sensors not auxiliary': (39, 4, 6),
    'strings not auxiliary': (6, 1, 2),
    'first pulse [ns]': (6170, 5929, 5936),
    'last pulse [ns]': (25695, 16171, 14929),
    'first not auxiliary [ns]': (9870, 9867, 9890),
    'last not auxiliary [ns]': (20112, 10314, 10771),
    'median charge [pe]': (0.975, 0.925, 1.025),
    'largest charge [pe]': (2.925, 1.425, 4.775),
    'median z of not auxiliary [m]': (-469.59, 339.76, -180.7),
    'pulses auxiliary': (58, 32, 32),
    'not auxiliary: last minus first [ns]': (10242, 447, 881),
}
TIMED_EVENTS, TIMED_TURNS = 2000, 3

Simulator = Callable[[int, int], tuple[pd.DataFrame, pd.DataFrame]]            # events, seed -> pulses, truth


def world_simulator(name: str) -> Simulator:
    "The simulator of this checkout in one of its worlds."
    array = DetectorArray.from_tables(config=WORLDS[name])
    return lambda events, seed: simulate_events(events, array, [seed])


def older_simulator(folder: Path) -> Simulator:
    "The simulator of another checkout, whose random numbers come from one generator."
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split('.')[0] == 'icecube_nb'}
    sys.path.insert(0, str(folder.resolve()))
    try:
        events = importlib.import_module('icecube_nb.physics.events')
        array = importlib.import_module('icecube_nb.physics.light').DetectorArray.from_tables()
    finally:
        sys.path.pop(0)
        for name in [name for name in sys.modules if name.split('.')[0] == 'icecube_nb']:
            del sys.modules[name]
        sys.modules.update(kept)
    return lambda n, seed: events.simulate_events(n, array, np.random.default_rng(seed))


def event_table(pulses: pd.DataFrame) -> pd.DataFrame:
    "Summary numbers, one row an event; pulses have columns event, sensor_id, time, charge, auxiliary."
    z = geometry_table().z.to_numpy()[pulses.sensor_id]
    pulses = pulses.assign(z=z, string=pulses.sensor_id//60)
    every, clean = pulses.groupby('event'), pulses[~pulses.auxiliary].groupby('event')
    table = pd.DataFrame({
        'pulses': every.size(), 'pulses not auxiliary': clean.size(), 'sensors': every.sensor_id.nunique(),
        'sensors not auxiliary': clean.sensor_id.nunique(), 'strings not auxiliary': clean.string.nunique(),
        'first pulse [ns]': every.time.min(), 'last pulse [ns]': every.time.max(),
        'first not auxiliary [ns]': clean.time.min(), 'last not auxiliary [ns]': clean.time.max(),
        'median charge [pe]': every.charge.median(), 'largest charge [pe]': every.charge.max(),
        'median z of not auxiliary [m]': clean.z.median()})
    table['pulses auxiliary'] = table.pulses - table['pulses not auxiliary']
    late = clean.time.max() - clean.time.min()
    table['not auxiliary: last minus first [ns]'] = late
    return table


def late_share(pulses: pd.DataFrame, fewest: int = 100, most: int = 500) -> float:
    "Mean share of pulses over 5 us after the first, not auxiliary ones, in events with 100 to 500 of these."
    clean = pulses[~pulses.auxiliary]
    groups = clean.groupby('event').time
    number, first = groups.transform('size'), groups.transform('min')
    kept = number.between(fewest, most)
    return float((clean.time - first > 5000)[kept].groupby(clean.event[kept]).mean().mean())


def line_fit_errors(pulses: pd.DataFrame, truth: pd.DataFrame) -> np.ndarray: # (B,) rad
    "Errors of the line fit through the pulses that are not auxiliary."
    place = geometry_table()[['x', 'y', 'z']].to_numpy()[pulses.sensor_id]
    offsets = np.append(0, truth.pulses.cumsum())
    fitted = line_fit(pulses.time.to_numpy(), place, offsets, 1.0 - pulses.auxiliary.to_numpy())
    return angular_error(truth.azimuth.to_numpy(), truth.zenith.to_numpy(), *angles_from_direction(fitted))


def distribution_figures(pulses: pd.DataFrame, truth: pd.DataFrame) -> dict[str, float]:
    "Figures of a set of events, by name."
    table, errors = event_table(pulses), line_fit_errors(pulses, truth)
    track, dim = truth.kind.to_numpy() == 'track', table[table.pulses < 64]
    cosine = np.cos(truth.zenith)
    figures = {f'pulses at {q} %': float(np.percentile(truth.pulses, q)) for q in PERCENTILES}
    figures |= {'line fit, mean error [rad]': errors.mean(), 'line fit, tracks [rad]': errors[track].mean(),
                'line fit, cascades [rad]': errors[~track].mean(), 'share of tracks': track.mean(),
                'share from below': (cosine < 0).mean(),
                'share with |cos zenith| < 0.5': (abs(cosine) < 0.5).mean(),
                'under 64 pulses: auxiliary, median': dim['pulses auxiliary'].median(),
                'share of events under 8 sensors not auxiliary': (table['sensors not auxiliary'] < 8).mean(),
                'share of not auxiliary later than 5 us': late_share(pulses)}
    small = pulses.charge[pulses.groupby('event').time.transform('size') < 300]
    for q in (1, 10, 50, 90, 99):
        figures[f'under 300 pulses: charge at {q} % [pe]'] = float(np.percentile(small, q))
    for name, values in REAL_EVENTS.items():
        for event, value in zip(('2092', '7344', '9482'), values):
            below, equal = (table[name] < value).mean(), (table[name] == value).mean()
            figures[f'event {event}: {name}, share below'] = below + equal/2
    return figures


def real_figures() -> dict[str, tuple[float, str]]:
    "What is known of the real data: figure and source."
    real = {f'pulses at {q} %': (float(value), ICEAGGR) for q, value in PERCENTILES.items()}
    real['line fit, mean error [rad]'] = LINE_FIT, 'training events; source not traced'
    real['under 64 pulses: auxiliary, median'] = 32.0, TEST_FILE
    real['share of not auxiliary later than 5 us'] = 0.046, 'public test file, event 2092 alone'
    charges = {1: 0.225, 10: 0.475, 50: 0.975, 90: 1.475, 99: 2.525}
    real |= {f'under 300 pulses: charge at {q} % [pe]': (value, 'public test file, 378 pulses')
             for q, value in charges.items()}
    for name, values in REAL_EVENTS.items():
        for event, value in zip(('2092', '7344', '9482'), values):
            real[f'event {event}: {name}, share below'] = float(value), f'public test file, event {event}'
    return real


def cpu_seconds(simulators: dict[str, Simulator]) -> dict[str, float]:
    "CPU seconds for some events, the smallest of some turns, simulators taking turns."
    taken = {name: [] for name in simulators}
    for turn in range(TIMED_TURNS):
        for name, simulator in simulators.items():
            start = time.process_time()
            simulator(TIMED_EVENTS, turn)
            taken[name].append(time.process_time() - start)
    return {name: min(seconds) for name, seconds in taken.items()}


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument('--events', type=int, default=20_000, help='of each simulator')
    parser.add_argument('--before', type=Path, help='checkout with an older simulator')
    parser.add_argument('--out', type=Path, default=RESULTS)
    options = parser.parse_args()
    simulators = {'before': older_simulator(options.before)} if options.before else {}
    simulators |= {name: world_simulator(name) for name in WORLDS}
    rows = pd.DataFrame({name: distribution_figures(*simulator(options.events, 1))
                         for name, simulator in simulators.items()})
    real = pd.DataFrame(real_figures(), index=['real', 'source']).T
    table = real.reindex(rows.index).join(rows).rename_axis('figure')
    seconds = cpu_seconds(simulators)
    for name in simulators:
        table.loc['speed, relative to standard', name] = seconds['standard']/seconds[name]
        table.loc['events', name] = options.events
    table.round(4).to_csv(options.out)
    print(table.drop(columns='source').round(3).to_string())
    print(f'standard: {TIMED_EVENTS/seconds["standard"]:,.0f} events a second of CPU time')


if __name__ == '__main__':
    main()
