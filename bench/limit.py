"""How well can these events be known at all? The answer of a likelihood that knows the simulator.

    python bench/limit.py --events 400 --workers 2

Simulated events are taken as single photoelectrons, before electronics merge them, and their likelihood is
sampled over direction, place, time and brightness, starting at the truth. It is told what no reconstruction
knows: whether the event is a track or a cascade, and where along a track the large losses lie and how bright
they are beside it. Events of more than 300 photoelectrons count as known exactly. The answer is the direction
with the smallest expected angle; its mean error estimates the limit that a network trained on such events
can come near to. Where the sampling is right, the error it expects and the error it makes agree on
average. One row an event is written to bench/results/limit.csv; a call that was stopped goes on from there.
After a change of this file remove limit.csv first.

Approximations: the jitter is a mean of boxes; the energy of a cascade has one power law as its prior, a
track's brightness and place have flat ones; noise pulses that follow others count like any; light after the
end of the readout is not taken off; pre-pulses and late pulses are not in the likelihood; afterpulses are left
out, and so is what the electronics lose outside of a launch.

The rows in limit.csv come from version 2 of the simulator and have to be made again.
"""
import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import gammainc

from icecube_nb.core.progress import Progress, end_with_parent
from icecube_nb.inference.evaluate import bootstrap_error, line_fit
from icecube_nb.physics.detector import SPEED_OF_LIGHT_M_PER_NS
from icecube_nb.physics.events import (CHUNK_NEUTRINOS, draw_neutrinos, light_sources, photoelectrons,
                                       readable_times)
from icecube_nb.physics.light import DetectorArray, LightSources, expected_light, pairs_in_reach
from icecube_nb.physics.readout import (Pulses, afterpulses, digitise, find_triggers, noise_pulses,
                                        single_charges)

RESULTS = Path(__file__).parent/'results'/'limit.csv'
MOST = 300                                      # photoelectrons; brighter events are not sampled
WALKERS, STEPS, BURN = 48, 1200, 600            # walkers, steps of each, how many of these are dropped
BOXES = np.array([1.2, 2.4, 4.0, 6.4])          # half widths [ns] whose mean stands for the jitter of 2 ns


@dataclass
class Event:
    "One triggered event: its light, what was seen of it, and what the line fit says."
    light: LightSources     # K sources, the track or cascade at the vertex first
    sensor: np.ndarray      # (N,) of each photoelectron or noise pulse
    time_ns: np.ndarray     # (N,)
    weight: np.ndarray      # (N,) photoelectrons it stands for
    pulses: int             # after merging, within the readout
    from_line_fit: np.ndarray # (3,) where the line fit says it comes from


def draw_events(rng: np.random.Generator, array: DetectorArray, n: int = CHUNK_NEUTRINOS) -> list[Event]:
    "Events of `n` neutrinos, by the steps of `simulate_chunk`, with the photoelectrons kept."
    nu = draw_neutrinos(n, array, rng)
    light = light_sources(nu, rng, array)
    source, sensor = pairs_in_reach(light, array)
    config = array.config
    pair, time, weight = photoelectrons(*expected_light(light, source, sensor, array), config, rng)
    owner, seen = light.event[source[pair]], sensor[pair]
    pulses = Pulses(owner, seen, time, weight*single_charges(len(weight), rng))
    pulses = pulses + afterpulses(pulses, config, rng)
    ids, early, late = readable_times(pulses, config)
    dark = noise_pulses(early, late, array, rng)
    dark.event = ids[dark.event]
    both, local, launches = digitise(pulses + dark, array)
    triggers = find_triggers(launches, n, array)
    start, end = triggers.start_ns, triggers.end_ns
    events = []
    for k in np.flatnonzero(triggers.fired.any(1)):
        read_out = start[k] - config.readout_before_ns, end[k] + config.readout_after_ns
        light_rows = _inside(owner, time, k, read_out)
        noise_rows = _inside(dark.event, dark.time_ns, k, read_out)
        pulse_rows = _inside(both.event, both.time_ns, k, read_out)
        fit_rows = pulse_rows & local
        fit = line_fit(both.time_ns[fit_rows], array.position[both.sensor[fit_rows]],
                       np.array([0, fit_rows.sum()]))[0]
        sources = light[light.event == k]
        own = np.argsort(-sources.length_m, kind='stable')                        # the track first, if any
        events.append(Event(sources[own], np.concatenate([seen[light_rows], dark.sensor[noise_rows]]),
                            np.concatenate([time[light_rows], dark.time_ns[noise_rows]]).astype(float),
                            np.concatenate([weight[light_rows], np.ones(noise_rows.sum())]),
                            int(pulse_rows.sum()), fit))
    return events


def _inside(event: np.ndarray, time_ns: np.ndarray, number: int, window: tuple[float, float]) -> np.ndarray:
    "Which rows belong to an event and lie within its readout."
    return (event == number) & (time_ns >= window[0]) & (time_ns <= window[1])


class Likelihood:
    "Log likelihood of one event's photoelectrons; parameters (W, 8): place, time, log brightness, direction."
    def __init__(self, event: Event, array: DetectorArray):
        light = event.light
        self.array, self.event = array, event
        self.truth = light.direction[0].astype(float)
        # the pivot is the point of the track that is nearest to the light; a direction turns around it
        middle = np.average(array.position[event.sensor], axis=0, weights=event.weight)
        self.along = ((light.start - light.start[0])*self.truth).sum(1)           # (K,) m after the first
        pivot = float(np.clip((middle - light.start[0])@self.truth, 0, light.length_m[0]))
        self.along = self.along - pivot
        place = light.start[0] + pivot*self.truth
        self.time = light.time_ns[0] + pivot/SPEED_OF_LIGHT_M_PER_NS
        self.start = np.concatenate([place, [0, 0], self.truth])
        _, sensor = pairs_in_reach(light, array, faint=0.001)
        self.sensors = np.unique(sensor)
        known = np.isin(event.sensor, self.sensors)                    # all others are noise
        self.sensor = np.searchsorted(self.sensors, event.sensor[known])          # (N,)
        self.weight, self.t = event.weight[known], event.time_ns[known]

    def __call__(self, asked: np.ndarray) -> np.ndarray: # (W,)
        sane = np.abs(asked[:, 4]) < 3                                 # a factor of 20 in brightness
        p = np.where(sane[:, None], asked, self.start)
        v = p[:, 5:]
        direction = v/np.linalg.norm(v, axis=1, keepdims=True)                    # (W, 3)
        mean, density = self.light_of(p, direction)
        config = self.array.config
        noise_hz = config.noise_hz + config.noise_bursts_hz*config.burst_pulses
        noise = 1e-9*noise_hz*self.array.efficiency[self.sensors[self.sensor]]
        seen_log = np.log(noise + (density*mean[:, :, self.sensor].astype(float)).sum(1))
        value = (self.weight*seen_log).sum(1) - mean.sum((1, 2))
        value += -0.5*(v**2).sum(1) + np.log1p(-config.zenith_slope*direction[:, 2])  # norm; zenith
        if self.event.light.length_m[0] == 0:                          # a cascade: in the cylinder
            far = np.hypot(p[:, 0], p[:, 1]) > self.array.radius_m
            value[far | (np.abs(p[:, 2]) > self.array.half_height_m)] = -np.inf
            value -= (config.soft_index - 1)*p[:, 4]
        return np.where(sane, value, -np.inf)

    def light_of(self, p: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        "Expected photoelectrons (W, K, S), and their density in time (W, K, N) [1/ns]."
        light, K, S, W = self.event.light, len(self.event.light.event), len(self.sensors), len(p)
        start = p[:, None, :3] + self.along[:, None]*direction[:, None]           # (W, K, 3)
        time = self.time + p[:, 3:4] + self.along/SPEED_OF_LIGHT_M_PER_NS         # (W, K)
        length, brightness = (np.broadcast_to(x, (W, K)).reshape(W*K).astype(np.float32)
                              for x in (light.length_m, light.brightness*np.exp(p[:, 4:5])))
        moved = LightSources(np.zeros(W*K, int), start.reshape(-1, 3).astype(np.float32),
                             np.repeat(direction, K, 0).astype(np.float32), length,
                             np.zeros(W*K, np.float32), brightness)
        pair = np.repeat(np.arange(W*K), S), np.tile(self.sensors, W*K)
        mean, arrival, shape, rate = (x.reshape(W, K, S) for x in expected_light(moved, *pair, self.array))
        arrival, shape, rate = (x[:, :, self.sensor].astype(float) for x in (arrival, shape, rate))
        late = self.t - time[:, :, None] - arrival
        density = np.zeros(late.shape)
        near = late > -BOXES[-1]
        late, a, b = late[near], shape[near], rate[near]
        for half in BOXES:                                             # light per ns, blurred by jitter
            upper, lower = (gammainc(a, b*np.maximum(late + side, 0)) for side in (half, -half))
            density[near] += (upper - lower)/(2*half)/len(BOXES)
        return mean, density


def sample(event: Event, array: DetectorArray, rng: np.random.Generator) -> np.ndarray: # (M, 3) directions
    "Goodman and Weare's stretch moves with two halves of walkers."
    likelihood = Likelihood(event, array)
    p = likelihood.start + rng.standard_normal((WALKERS, 8))*[10, 10, 10, 20, 0.2, 0.5, 0.5, 0.5]
    if event.light.length_m[0] == 0:
        r = np.hypot(p[:, 0], p[:, 1])
        p[:, :2] *= np.minimum(1, 0.99*array.radius_m/r)[:, None]
        p[:, 2] = np.clip(p[:, 2], -0.99*array.half_height_m, 0.99*array.half_height_m)
    value, half, kept = likelihood(p), WALKERS//2, []
    for step in range(STEPS):
        for mine, other in ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half))):
            z = (rng.random(half) + 1)**2/2                            # density 1/sqrt(z), 0.5 to 2
            partner = p[other][rng.integers(half, size=half)]
            new = partner + z[:, None]*(p[mine] - partner)
            found = likelihood(new)
            take = np.log(rng.random(half)) < 7*np.log(z) + found - value[mine]
            p[mine], value[mine] = np.where(take[:, None], new, p[mine]), np.where(take, found, value[mine])
        if step >= BURN and step % 10 == 0:
            kept.append(p[:, 5:].copy())
    v = np.concatenate(kept)
    return v/np.linalg.norm(v, axis=1, keepdims=True)


def angles(a: np.ndarray, b: np.ndarray) -> np.ndarray: # (A, B) rad
    "Between all pairs of two sets of unit vectors."
    return np.arccos(np.clip(a@b.T, -1, 1))


def examine(event: Event, array: DetectorArray, seed: int) -> dict:
    "Error that the likelihood makes and expects for one event, and the line fit's."
    rng, truth = np.random.default_rng([seed, 1]), event.light.direction[0].astype(float)
    row = {'kind': 'track' if event.light.length_m[0] > 0 else 'cascade', 'pulses': event.pulses,
           'photoelectrons': float(event.weight.sum()), 'error': 0.0, 'expected': 0.0,
           'line fit': float(angles(-event.from_line_fit[None], truth[None])[0, 0])}
    if row['photoelectrons'] > MOST:
        return row
    found = sample(event, array, rng)
    tries = np.concatenate([found[rng.permutation(len(found))[:500]], found.mean(0, keepdims=True)])
    tries /= np.linalg.norm(tries, axis=1, keepdims=True)
    expected = angles(tries, found).mean(1)
    best = int(expected.argmin())
    error = float(angles(tries[best:best + 1], truth[None])[0, 0])
    return row | {'error': error, 'expected': float(expected[best])}


def worker(job: tuple[Event, int]) -> dict:
    "One event, in a worker process."
    return examine(job[0], DetectorArray.from_tables(), job[1])


def events(done: int, n: int) -> Iterator[tuple[Event, int]]:
    "The first `n` triggered events, each with a seed, without those that are done."
    array, rng, made = DetectorArray.from_tables(), np.random.default_rng(99), 0
    while made < n:
        for event in draw_events(rng, array)[:n - made]:
            if made >= done:
                yield event, made
            made += 1


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument('--events', type=int, default=400)
    parser.add_argument('--workers', type=int, default=2)
    a = parser.parse_args()
    rows = pd.read_csv(RESULTS).to_dict('records') if RESULTS.exists() else []
    progress = Progress('sampling events')
    with ProcessPoolExecutor(a.workers, get_context('spawn'), end_with_parent) as pool:
        for row in pool.map(worker, events(len(rows), a.events)):
            rows.append(row)
            progress(len(rows), a.events)
            if len(rows) % 20 == 0 or len(rows) == a.events:
                pd.DataFrame(rows).to_csv(RESULTS, index=False)
    print(summary(pd.DataFrame(rows)))


def summary(rows: pd.DataFrame) -> str:
    "Mean errors by kind."
    groups = [('all', rows), *rows.groupby('kind')]
    groups.append(('not too bright', rows[rows.expected > 0]))
    out = []
    for name, group in groups:
        row = {'events': name, 'number': len(group)}
        for column in ('line fit', 'error', 'expected'):
            values = group[column].to_numpy()
            row[column] = f'{values.mean():.3f} +- {bootstrap_error(values):.3f}'
        out.append(row)
    return pd.DataFrame(out).to_string(index=False)


if __name__ == '__main__':
    main()
