"""How fast does an ensemble combine the answers of its networks, beside the way it was done before?

    python bench/ensemble.py                         about three minutes on one core
    python bench/ensemble.py --events 1000 --rounds 1 --train 2000      a quick try, which keeps no numbers

The ensemble is of the usual size: two networks with two heads and a stack each, 11 candidates, 5 folds, 200
trees of 31 leaves a booster, 12,000 trees in all, a posterior of 4,096 points. Its events are made up; speed
depends on the trees and not on what they say. Before: LightGBM answers, one event after the other, and numpy
computes the posterior of 1,000 events at a time, point by point. Now: `forest_answers` and `grid_answers`. Both take turns, on
the same events, on one core; the time is that of the processor, so other work on the machine matters little.
"""
import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'

import lightgbm                                             # noqa: E402  after the number of threads is set
import numpy as np                                          # noqa: E402
import torch                                                # noqa: E402

from icecube_nb.inference.boosters import forest_answers    # noqa: E402
from icecube_nb.inference.ensemble import (Ensemble, EnsembleConfig,       # noqa: E402
                                           candidate_table, candidates_of, ensemble_answers,
                                           example_answers, fit_boosters, heads_and_vectors, normalised)
from icecube_nb.inference.posterior import SkyGrid, grid_answers                           # noqa: E402
from icecube_nb.inference.uncertainty import (PosteriorWeights, expected_angles,           # noqa: E402
                                              pooled_log_density, spherical_median)
from icecube_nb.network.losses import Bins, make_bins                                      # noqa: E402
from icecube_nb.physics.angles import angle_between, angles_from_direction, direction_from_angles      # noqa: E402

RESULTS = Path(__file__).parent/'results'/'ensemble.json'
WEIGHTS = (0.5, 0.4, 0.1, 0.2, 0.1, 0.2)    # of the posterior: two maps, four vectors


def even_bins() -> Bins:
    "Classes of a sky that is even in azimuth and in the cosine of the zenith."
    edges = {'azimuth': np.linspace(0, 2*np.pi, 129), 'zenith': np.arccos(np.linspace(1, -1, 129))}
    found = {f'{name}_edges': each[:-1] for name, each in edges.items()}
    return make_bins(found | {f'{name}_centres': (each[1:] + each[:-1])/2 for name, each in edges.items()})


def made_up(events: int, seed: int, bins: Bins) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
    "Answers of two networks, with maps around the answers of the classes, and the truth."
    members, truth = example_answers(events, seed)
    rng = np.random.default_rng(seed + 100)
    for columns in members:
        azimuth, zenith = columns['classes_azimuth'][:, None], columns['classes_zenith'][:, None]
        width = np.exp(rng.uniform(np.log(0.03), np.log(2), (events, 1)))
        away = np.angle(np.exp(1j*(bins.azimuth_centres.numpy() - azimuth)))
        up = bins.zenith_centres.numpy() - zenith
        for name, off in (('azimuth', away), ('zenith', up)):
            logits = np.maximum(-0.5*(off/width)**2, -30) + 0.1*rng.normal(size=off.shape)
            columns[f'{name}_logits'] = logits.astype(np.float32)
        answer = direction_from_angles(azimuth[:, 0], zenith[:, 0]) + 0.2*rng.normal(size=(events, 3))
        columns['stack_azimuth'], columns['stack_zenith'] = angles_from_direction(normalised(answer))
        columns['stack_confidence'] = 1/width[:, 0]**2
    return members, truth


def posterior_before(members: list[dict[str, np.ndarray]], pool: PosteriorWeights) -> np.ndarray:
    "Median, expected angles and entropy, as they were computed before."
    skies, parts = pool.skies(), []
    _, candidates = candidates_of(members)
    for start in range(0, len(candidates), 1000):
        rows = slice(start, start + 1000)
        log_p = pooled_log_density(pool, skies, *heads_and_vectors(members, rows))
        angles = expected_angles(log_p, candidates[rows], skies[0].points)
        best = candidates[rows][np.arange(len(angles)), angles.argmin(1)]
        median = spherical_median(log_p, best, skies[0].points)
        own = expected_angles(log_p, median[:, None], skies[0].points)
        entropy = -(np.exp(log_p)*log_p).sum(-1, keepdims=True)
        parts.append(np.concatenate([median, angles, own, entropy], 1))
    return np.concatenate(parts)


def posterior_now(members: list[dict[str, np.ndarray]], pool: PosteriorWeights) -> np.ndarray:
    "The same on a grid of torch."
    heads, vectors = heads_and_vectors(members)
    return np.concatenate(grid_answers(SkyGrid(pool), heads, vectors, candidates_of(members)[1]), 1)


def moved_answers(ensemble: Ensemble, members: list[dict[str, np.ndarray]], # of the first events
                  pool: PosteriorWeights) -> np.ndarray:
    "How far final answers move where the posterior is computed as now and not point by point, rad."
    from icecube_nb.inference import ensemble as module
    ids, found = np.arange(len(members[0]['pulses'])) + 10**6, []
    kept = module.grid_answers
    def exact(grid, heads, vectors, candidates):
        each = posterior_before(members, pool)
        return each[:, :3], each[:, 3:]
    for way in (exact, kept):
        module.grid_answers = way
        answers = ensemble_answers(ensemble, candidate_table(members, pool), ids, members[0]['pulses'])
        found.append(direction_from_angles(answers['azimuth'], answers['zenith']))
    return angle_between(*found)


def trees_before(boosters: list[list[lightgbm.Booster]], features: np.ndarray) -> np.ndarray:
    "The mean of all folds, by LightGBM."
    return np.mean([[booster.predict(features) for booster in fold] for fold in boosters], 0).T


def trees_now(ensemble: Ensemble, features: np.ndarray) -> np.ndarray:
    "The mean of all folds, by sets of events."
    return np.mean([forest_answers(fold, features) for fold in ensemble.boosters], 0)


def in_turns(calls: dict[str, Callable], rounds: int) -> tuple[dict[str, list[float]], dict]:
    "Processor seconds of each call, in turns after a first round that is not counted; and what they return."
    seconds, found = {name: [] for name in calls}, {}
    for number in range(rounds + 1):
        for name in list(calls)[::1 if number % 2 else -1]:
            began = time.process_time()
            found[name] = calls[name]()
            if number:
                seconds[name].append(time.process_time() - began)
    return seconds, found


def measure(events: int, rounds: int, train: int) -> list[dict]:
    "A row for each part."
    torch.set_num_threads(1)
    bins = even_bins()
    pool = PosteriorWeights(WEIGHTS, (bins, bins))
    members, truth = made_up(train, 0, bins)
    print(f'fitting to {train:,} made-up events ...', file=sys.stderr, flush=True)
    ensemble, _ = fit_boosters(candidate_table(members, pool), truth, np.arange(train), EnsembleConfig(threads=1))
    boosters = [[lightgbm.Booster(model_str=f.text) for f in fold]
                for fold in ensemble.boosters]
    members, _ = made_up(events, 1, bins)
    table, ids = candidate_table(members, pool), np.arange(events) + train
    few = min(events, 2000)                                 # the way before takes long
    first = [{name: values[:few] for name, values in columns.items()} for columns in members]
    def whole() -> dict[str, np.ndarray]:
        return ensemble_answers(ensemble, candidate_table(members, pool), ids, members[0]['pulses'])
    parts = {'trees': (lambda: trees_before(boosters, table.features[:few]), lambda: trees_now(ensemble, table.features)),
             'posterior': (lambda: posterior_before(first, pool), lambda: posterior_now(members, pool))}
    rows = []
    for part, (before, now) in parts.items():
        seconds, found = in_turns({'before': before, 'now': now}, rounds)
        before_us, now_us = 1e6*np.array(seconds['before'])/few, 1e6*np.array(seconds['now'])/events
        off = np.abs(found['before'] - found['now'][:few])
        rows.append({'part': part, 'before_us': float(np.median(before_us)), 'now_us': float(np.median(now_us)),
                     'times_faster': float(np.median(before_us/now_us)), 'least': float((before_us/now_us).min()),
                     'largest_difference': float(off.max()), 'mean_difference': float(off.mean())})
    seconds, _ = in_turns({'now': whole}, rounds)
    now = 1e6*float(np.median(seconds['now']))/events
    saved = sum(row['before_us'] - row['now_us'] for row in rows)
    # the booster of the answer's error asks one twelfth of the trees, and was as slow as the others
    saved += (rows[0]['before_us'] - rows[0]['now_us'])/len(ensemble.names)
    moved = moved_answers(ensemble, first, pool)
    rows.append({'part': 'whole combination', 'before_us': now + saved, 'now_us': now,
                 'times_faster': (now + saved)/now, 'largest_difference': float(moved.max()),
                 'mean_difference': float(moved.mean())})
    return rows


def main() -> None:
    "Measure, print, and keep the numbers of a full run."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--events', type=int, default=16_384)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--train', type=int, default=6000, help='events that the boosters are fitted to')
    a = parser.parse_args()
    rows = measure(a.events, a.rounds, a.train)
    for row in rows:
        print(f'{row["part"]:18} before {row["before_us"]:7.1f}, now {row["now_us"]:6.1f} us an event: '
              f'{row["times_faster"]:.1f} times as fast', end='')
        print(f', differences up to {row["largest_difference"]:.0e}' if 'largest_difference' in row else '')
    if (a.events, a.rounds) >= (16_384, 3):
        about = {'events': a.events, 'rounds': a.rounds, 'trees': 12_000, 'points': 4096, 'cores': 1,
                 'lightgbm': lightgbm.__version__, 'torch': torch.__version__, 'numpy': np.__version__,
                 'instructions': torch.backends.cpu.get_cpu_capability()}
        RESULTS.write_text(json.dumps({'about': about, 'rows': rows}, indent=1) + '\n')


if __name__ == '__main__':
    main()
