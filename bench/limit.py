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
end of the readout is not taken off.
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

from icecube_nb.physics import simulate as sim
from icecube_nb.inference.evaluate import bootstrap_error, line_fit
from icecube_nb.core.progress import Progress, end_with_parent

RESULTS = Path(__file__).parent/'results'/'limit.csv'
MOST = 300                                      # photoelectrons; brighter events are not sampled
WALKERS, STEPS, BURN = 48, 1200, 600
BOXES = np.array([1.2, 2.4, 4.0, 6.4])          # half widths [ns] whose mean stands for the jitter of 2 ns
NOISE_PER_NS = sim.NOISE_HZ*1e-9


@dataclass
class Event:
    "One triggered event: its light, what was seen of it, and what the line fit says."
    light: sim.Emitters     # K sources, the track or cascade at the vertex first
    sensor: np.ndarray      # (N,) of each photoelectron or noise pulse
    time_ns: np.ndarray     # (N,)
    weight: np.ndarray      # (N,) photoelectrons it stands for
    pulses: int             # after merging, within the readout
    from_line_fit: np.ndarray # (3,) where the line fit says it comes from


def draw_events(rng: np.random.Generator, array: sim.Array, n: int = sim.CHUNK) -> list[Event]:
    "Events of `n` neutrinos, by the steps of `simulate_chunk`, with the photoelectrons kept."
    nu = sim.draw_neutrinos(n, array, rng)
    light = sim.emitters(nu, rng, array)
    emitter, sensor = sim.lit_pairs(light, array)
    pair, time, weight = sim.photoelectrons(*sim.expected_light(light, emitter, sensor, array), rng)
    owner, seen = light.event[emitter[pair]], sensor[pair]
    pulses = sim.merge_light(owner, seen, time, weight*sim.single_charges(len(weight), rng))
    bright = np.bincount(pulses.event, minlength=n) >= sim.HITS_TO_TRIGGER - 2
    pulses = pulses[bright[pulses.event]]
    ids, first = np.unique(pulses.event, return_index=True)                       # merged: sorted by event
    early = np.minimum.reduceat(pulses.time_ns.astype(float), first) - sim.BEFORE_NS - 500
    late = np.maximum.reduceat(pulses.time_ns.astype(float), first) + sim.AFTER_NS + 500
    dark = sim.noise(early, np.minimum(late, early + 30_000), array, rng)
    dark.event = ids[dark.event]
    both = sim.Pulses(*(np.concatenate([getattr(pulses, k), getattr(dark, k)])
                        for k in pulses.__dataclass_fields__))
    both = both[np.lexsort((both.time_ns, both.event))]
    local = sim.coincident(both, array)
    start, end = sim.trigger(both.event[local], both.time_ns[local], n)
    events = []
    for k in np.flatnonzero(np.isfinite(start)):
        first, last = start[k] - sim.BEFORE_NS, end[k] + sim.AFTER_NS
        inside = lambda event, t: (event == k) & (t >= first) & (t <= last)
        pe, noise = inside(owner, time), inside(dark.event, dark.time_ns)
        of_line = inside(both.event, both.time_ns) & local
        fit = line_fit(both.time_ns[of_line], array.position[both.sensor[of_line]],
                       np.array([0, of_line.sum()]))[0]
        sources = light[light.event == k]
        own = np.argsort(-sources.length_m, kind='stable')                        # the track first, if any
        events.append(Event(sources[own], np.concatenate([seen[pe], dark.sensor[noise]]),
                            np.concatenate([time[pe], dark.time_ns[noise]]).astype(float),
                            np.concatenate([weight[pe], np.ones(noise.sum())]),
                            int(inside(both.event, both.time_ns).sum()), fit))
    return events


class Likelihood:
    "Log likelihood of one event's photoelectrons; parameters (W, 8): place, time, log brightness, direction."
    def __init__(self, event: Event, array: sim.Array):
        light = event.light
        self.array, self.event = array, event
        self.truth = light.direction[0].astype(float)
        # the pivot is the point of the track that is nearest to the light; a direction turns around it
        middle = np.average(array.position[event.sensor], axis=0, weights=event.weight)
        self.along = ((light.start - light.start[0])*self.truth).sum(1)           # (K,) m after the first
        pivot = float(np.clip((middle - light.start[0])@self.truth, 0, light.length_m[0]))
        self.along = self.along - pivot
        place = light.start[0] + pivot*self.truth
        self.time = light.time_ns[0] + pivot/sim.SPEED_OF_LIGHT_M_PER_NS
        self.start = np.concatenate([place, [0, 0], self.truth])
        emitter, sensor = sim.lit_pairs(light, array, faint=0.001)
        self.sensors = np.unique(sensor)
        known = np.isin(event.sensor, self.sensors)                    # all others are noise
        self.sensor = np.searchsorted(self.sensors, event.sensor[known])          # (N,)
        self.weight, self.t = event.weight[known], event.time_ns[known]

    def __call__(self, asked: np.ndarray) -> np.ndarray: # (W,)
        light, array = self.event.light, self.array
        sane = np.abs(asked[:, 4]) < 3                                 # a factor of 20 in brightness
        p = np.where(sane[:, None], asked, self.start)
        W, K, S, N = len(p), len(light.event), len(self.sensors), len(self.t)
        v = p[:, 5:]
        direction = v/np.linalg.norm(v, axis=1, keepdims=True)                    # (W, 3)
        start = p[:, None, :3] + self.along[:, None]*direction[:, None]           # (W, K, 3)
        time = self.time + p[:, 3:4] + self.along/sim.SPEED_OF_LIGHT_M_PER_NS                  # (W, K)
        wide = lambda x: np.broadcast_to(x, (W, K)).reshape(W*K).astype(np.float32)
        moved = sim.Emitters(np.zeros(W*K, int), start.reshape(-1, 3).astype(np.float32),
                             np.repeat(direction, K, 0).astype(np.float32), wide(light.length_m),
                             np.zeros(W*K, np.float32), wide(light.brightness*np.exp(p[:, 4:5])))
        pair = np.repeat(np.arange(W*K), S), np.tile(self.sensors, W*K)
        mean, arrival, shape, rate = (x.reshape(W, K, S) for x in sim.expected_light(moved, *pair, array))
        seen = lambda x: x[:, :, self.sensor].astype(float)                       # (W, K, N)
        late = self.t - time[:, :, None] - seen(arrival)
        density = np.zeros((W, K, N))
        near = late > -BOXES[-1]
        late, a, b = late[near], seen(shape)[near], seen(rate)[near]
        for half in BOXES:                                             # light per ns, blurred by jitter
            upper, lower = (gammainc(a, b*np.maximum(late + side, 0)) for side in (half, -half))
            density[near] += (upper - lower)/(2*half)/len(BOXES)
        noise = NOISE_PER_NS*array.efficiency[self.sensors[self.sensor]]
        seen_log = np.log(noise + (density*seen(mean)).sum(1))
        value = (self.weight*seen_log).sum(1) - mean.sum((1, 2))
        value += -0.5*(v**2).sum(1) + np.log1p(-0.35*direction[:, 2])             # of the norm; of the zenith
        if light.length_m[0] == 0:                                     # a cascade: in the cylinder
            far = np.hypot(p[:, 0], p[:, 1]) > array.radius_m
            value[far | (np.abs(p[:, 2]) > array.half_height_m)] = -np.inf
            value -= 0.95*p[:, 4]
        return np.where(sane, value, -np.inf)


def sample(event: Event, array: sim.Array, rng: np.random.Generator) -> np.ndarray: # (M, 3) directions
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
        if step >= BURN and step % 10 == 0: kept.append(p[:, 5:].copy())
    v = np.concatenate(kept)
    return v/np.linalg.norm(v, axis=1, keepdims=True)


def angles(a: np.ndarray, b: np.ndarray) -> np.ndarray: # (A, B) rad
    "Between all pairs of two sets of unit vectors."
    return np.arccos(np.clip(a@b.T, -1, 1))


def examine(event: Event, array: sim.Array, seed: int) -> dict:
    "Error that the likelihood makes and expects for one event, and the line fit's."
    rng, truth = np.random.default_rng([seed, 1]), event.light.direction[0].astype(float)
    row = {'kind': 'track' if event.light.length_m[0] > 0 else 'cascade', 'pulses': event.pulses,
           'photoelectrons': float(event.weight.sum()), 'error': 0.0, 'expected': 0.0,
           'line fit': float(angles(-event.from_line_fit[None], truth[None])[0, 0])}
    if row['photoelectrons'] > MOST: return row
    found = sample(event, array, rng)
    tries = np.concatenate([found[rng.permutation(len(found))[:500]], found.mean(0, keepdims=True)])
    tries /= np.linalg.norm(tries, axis=1, keepdims=True)
    expected = angles(tries, found).mean(1)
    best = int(expected.argmin())
    error = float(angles(tries[best:best + 1], truth[None])[0, 0])
    return row | {'error': error, 'expected': float(expected[best])}


def one(job: tuple[Event, int]) -> dict:
    "A worker's task."
    return examine(job[0], sim.Array.from_tables(), job[1])


def events(done: int, n: int) -> Iterator[tuple[Event, int]]:
    "The first `n` triggered events, each with a seed, without those that are done."
    array, rng, made = sim.Array.from_tables(), np.random.default_rng(99), 0
    while made < n:
        for event in draw_events(rng, array)[:n - made]:
            if made >= done: yield event, made
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
        for row in pool.map(one, events(len(rows), a.events)):
            rows.append(row)
            progress(len(rows), a.events)
            if len(rows) % 20 == 0 or len(rows) == a.events: pd.DataFrame(rows).to_csv(RESULTS, index=False)
    print(summary(pd.DataFrame(rows)))


def summary(rows: pd.DataFrame) -> str:
    "Mean errors by kind."
    groups = [('all', rows), *rows.groupby('kind')]
    groups.append(('not too bright', rows[rows.expected > 0]))
    said = lambda x: f'{x.mean():.3f} +- {bootstrap_error(x.to_numpy()):.3f}'
    out = [{'events': name, 'number': len(g)} | {k: said(g[k]) for k in ('line fit', 'error', 'expected')}
           for name, g in groups]
    return pd.DataFrame(out).to_string(index=False)


if __name__ == '__main__': main()
