"""How well can these events be known at all? The answer of a likelihood that knows the simulator.

    python bench/limit.py run        # a row an event in bench/results/limit.csv; goes on where it stopped
    python bench/limit.py summary    # reads them, and writes bench/results/limit.json

The best answer to an event is the direction with the smallest expected angle under the posterior; no method
makes a smaller error on average. The posterior of each event is sampled by sequential Monte Carlo. Points
start far apart, on the whole sphere of directions and in a wide region around the lit sensors, and never
see the truth (the energy of a track starts around the true one, spread by a factor of 4). The likelihood is
switched on in small steps; points are drawn again by their weights and moved at each. Two independent runs
of each event tell whether they found the same. Points of both are used, by their evidence.

The likelihood is that of the single photoelectrons within the readout, before electronics merge and drop
any. It knows the simulator's distributions of brightness and place, early and late pulses, afterpulses of
the photoelectrons that are seen, noise and the ice. It is told what no reconstruction knows: whether the
event is a track or a cascade, and for a track how long it is, where along it the large losses lie and how
bright they are beside it. So it knows more than a network, and its mean angle is an estimate of a bound
from below.

Approximations: the spread of the transit times is a mean of boxes; noise that follows noise counts like
any; where no light is seen, a few sensors stand for their neighbours; photoelectrons of one sensor within 4
ns are one; that the told length and losses of a track say something of its energy is left out. Events are
drawn by strata of topology and brightness, and means are weighted with the shares of the strata among
simulated events. Very bright events count as known exactly.
"""
import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import gammainc, gammaln
from scipy.stats import kstest

from icecube_nb.core.progress import Progress
from icecube_nb.inference.evaluate import line_fit
from icecube_nb.physics.detector import SPEED_OF_LIGHT_M_PER_NS
from icecube_nb.physics.events import (CHUNK_NEUTRINOS, MUON_RADIATION_PER_M, Neutrinos, draw_neutrinos,
                                       light_sources, muon_energy, muon_range, photoelectrons,
                                       readable_times)
from icecube_nb.physics.light import (CASCADE_YIELD, TRACK_M_PER_GEV, TRACK_YIELD, DetectorArray,
                                      LightSources, expected_light, pairs_in_reach)
from icecube_nb.physics.readout import (AFTERPULSE_DELAY_NS, AFTERPULSE_PARTS, AFTERPULSE_SPREAD_NS, Pulses,
                                        afterpulses, digitise, find_triggers, in_local_coincidence,
                                        noise_pulses, single_charges)
from icecube_nb.physics.simulate import VERSION
from icecube_nb.physics.simulation_config import STANDARD, SimulationConfig

RESULTS = Path(__file__).parent/'results'/'limit.csv'
SUMMARY = RESULTS.with_suffix('.json')
COLUMNS = ('simulator_version world event kind pulses not_auxiliary line_fit stratum share photoelectrons '
           'error expected_own expected_other apart rank_angle rank_zenith rank_brightness '
           'log_evidence_1 log_evidence_2 steps calls cpu_seconds').split()
SEED, POOL = 99, 6000                           # seed and number of the events from which are drawn
EDGES = np.array([0, 8, 16, 32, 64, 256])       # strata by the number of pulses that are not auxiliary
SPREADS = {'cascade': (0.35, 0.4, 0.4, 0.35, 0.3), 'track': (0.45, 0.4, 0.3, 0.15, 0.1)}  # guessed, rad
COSTS = (1, 1, 1.2, 1.5, 3)                     # of an event in each stratum, guessed, relative
POINTS, SWEEPS, LAST_SWEEPS = 500, 4, 30        # of a run: points, moves of each at a step, and at the end
MOVES = 'all', 'part', 'direction', 'part', 'all', 'stretch'
KEEP_EVERY = 6                                  # of the last sweeps
EFFECTIVE = 0.7                                 # part of the points that stays effective in a step
MERGE_NS = 4.                                   # photoelectrons of a sensor so close are one with a weight
JITTER_BOXES = (1.1, 2.2)                       # half widths, in spreads of the transit time
LATE_EDGES_NS = (15., 35.8, 150.)               # two boxes with half of the late pulses each
EARLY_EDGES_NS = (-36., -24.)                   # of the early ones
SMOOTH_NS = 150.                                # later than that the density is taken as smooth


# ---- events, with the photoelectrons kept

@dataclass
class Event:
    "One triggered event: its light, what was seen of it, and what the line fit says."
    light: LightSources     # K sources, the track or cascade at the vertex first
    nu: Neutrinos           # one
    sensor: np.ndarray      # (N,) of each photoelectron, afterpulse or noise pulse within the readout
    time_ns: np.ndarray     # (N,)
    weight: np.ndarray      # (N,) photoelectrons it stands for
    window_ns: float        # length of the readout
    pulses: int             # of the readout
    not_auxiliary: int      # of them
    from_line_fit: np.ndarray # (3,) where the line fit says it comes from


def draw_events(rng: np.random.Generator, array: DetectorArray, n: int = CHUNK_NEUTRINOS) -> list[Event]:
    "Events of `n` neutrinos, by the steps of `simulate_chunk`, with the photoelectrons kept."
    nu = draw_neutrinos(n, array, rng)
    light = light_sources(nu, rng, array)
    source, sensor = pairs_in_reach(light, array)
    config = array.config
    pair, times, weight = photoelectrons(*expected_light(light, source, sensor, array), config, rng)
    pulses = Pulses(light.event[source[pair]], sensor[pair], times, weight*single_charges(len(weight), rng))
    chosen = afterpulses(replace(pulses, charge_pe=weight), config, rng)           # keep their weights
    weight = np.concatenate([weight, chosen.charge_pe])
    pulses = pulses + chosen
    ids, early, late = readable_times(pulses, config)
    dark = noise_pulses(early, late, array, rng)
    dark.event = ids[dark.event]
    weight = np.concatenate([weight, np.ones(len(dark.event))])
    pulses = pulses + dark
    seen, coincident, launches = digitise(pulses, array)
    triggers = find_triggers(launches, n, array)
    return [make_event(k, light, nu, (pulses, weight), (seen, coincident),
                       (triggers.start_ns[k] - config.readout_before_ns,
                        triggers.end_ns[k] + config.readout_after_ns), array)
            for k in np.flatnonzero(triggers.fired.any(1))]


def make_event(k: int, light: LightSources, nu: Neutrinos, photons: tuple, seen: tuple,
               window: tuple[float, float], array: DetectorArray) -> Event:
    "Event `k` of a chunk."
    def inside(pulses):
        return (pulses.event == k) & (pulses.time_ns >= window[0]) & (pulses.time_ns <= window[1])
    (all_photons, weight), (pulses, coincident) = photons, seen
    rows, kept = inside(all_photons), inside(pulses)
    fit = kept & coincident
    order = np.argsort(pulses.time_ns[fit], kind='stable')
    found = line_fit(pulses.time_ns[fit][order], array.position[pulses.sensor[fit][order]],
                     np.array([0, fit.sum()]))[0]
    sources = light[light.event == k]
    sources = sources[np.argsort(-sources.length_m, kind='stable')]        # the track first, if any
    own = Neutrinos(*(getattr(nu, name)[k] for name in nu.__dataclass_fields__))
    return Event(sources, own, *merged(all_photons.sensor[rows], all_photons.time_ns[rows], weight[rows]),
                 window[1] - window[0], int(kept.sum()), int(fit.sum()), found)


def merged(sensor: np.ndarray, time_ns: np.ndarray, weight: np.ndarray) -> tuple:
    "Join photoelectrons of one sensor that lie within `MERGE_NS`, for speed; sorted by sensor and time."
    order = np.lexsort((time_ns, sensor))
    sensor, time_ns, weight = sensor[order], time_ns[order].astype(float), weight[order].astype(float)
    new = (np.diff(sensor, prepend=-1) != 0) | (np.diff(time_ns, prepend=-np.inf) > MERGE_NS)
    if new.all():
        return sensor, time_ns, weight
    first = np.flatnonzero(new)
    total = np.add.reduceat(weight, first)
    return sensor[first], np.add.reduceat(weight*time_ns, first)/total, total


# ---- likelihood

def smooth_density(late_ns: np.ndarray, shape: np.ndarray, rate: np.ndarray) -> np.ndarray: # 1/ns
    "Density of a Gamma distribution at positive times."
    x = rate*late_ns
    return rate*np.exp((shape - 1)*np.log(x) - x - gammaln(shape))


def time_density(late_ns: np.ndarray, shape: np.ndarray, rate: np.ndarray,
                 config: SimulationConfig) -> np.ndarray: # 1/ns
    "Density of the time after the earliest arrival: scattering, transit times, early and late pulses."
    late_share, early_share = config.late_share, config.prepulse_share
    out = np.zeros(len(late_ns))
    far = late_ns > SMOOTH_NS
    t, a, b = late_ns[far], shape[far], rate[far]
    mean_late = np.mean(LATE_EDGES_NS[:2])
    out[far] = (1 - late_share)*smooth_density(t, a, b) + late_share*smooth_density(t - mean_late, a, b)
    t, a, b = late_ns[~far], shape[~far], rate[~far]

    def box(low, high): # mean density between t - high and t - low
        upper, lower = (gammainc(a, b*np.maximum(t - edge, 0)) for edge in (low, high))
        return (upper - lower)/(high - low)
    widths = [config.jitter_ns*half for half in JITTER_BOXES]
    value = (1 - late_share - early_share)*np.mean([box(-half, half) for half in widths], axis=0)
    edges = LATE_EDGES_NS
    value += late_share*(box(edges[0], edges[1]) + box(edges[1], edges[2]))/2
    value += early_share*box(*EARLY_EDGES_NS)
    out[~far] = value
    return out


def afterpulse_rate(event: Event, config: SimulationConfig) -> np.ndarray: # (N,) 1/ns
    "Rate of afterpulses that the earlier photoelectrons of the same sensor cause, at each photoelectron."
    rate = np.zeros(len(event.sensor))
    first = np.flatnonzero(np.diff(event.sensor, prepend=-1))
    for low, high in zip(first, np.append(first[1:], len(rate))):
        gap = event.time_ns[low:high, None] - event.time_ns[low:high]      # (n, n) later minus earlier
        for delay, spread, part in zip(AFTERPULSE_DELAY_NS, AFTERPULSE_SPREAD_NS, AFTERPULSE_PARTS):
            normal = np.exp(-0.5*((gap - delay)/spread)**2)/(spread*np.sqrt(2*np.pi))
            rate[low:high] += part*(normal*(gap > 200)*event.weight[low:high]).sum(1)
    return config.afterpulse_share*rate


def chosen_sensors(event: Event, lit: np.ndarray, array: DetectorArray) -> tuple[np.ndarray, np.ndarray]:
    "Sensors for the likelihood, and how many each stands for: those far from the light are thinned out."
    alive = array.efficiency > 0
    hit = np.unique(event.sensor)
    away = np.full(len(alive), np.inf)
    for place in array.position[np.unique(lit)]:
        away = np.minimum(away, np.linalg.norm(array.position - place, axis=1))
    far = 4 if event.light.length_m[0] > 0 else 8
    step = np.select([away < 25, away < 80, away < 160], [1, 2, 4], far)
    step[(array.efficiency > 1) & (away > 30)] *= 2                    # sensors of DeepCore lie closer
    step[hit] = 1
    chosen, weight = [hit], [np.ones(len(hit))]
    alive[hit] = False
    for size in np.unique(step[alive]):
        rows = np.flatnonzero(alive & (step == size) & (away < 700))
        taken = rows[np.argsort(array.slot[rows], kind='stable')][size//2::size]
        chosen.append(taken)
        weight.append(np.full(len(taken), float(size)))
    return np.concatenate(chosen), np.concatenate(weight)


class CascadePrior:
    "Log density of the log brightness of cascades, from many neutrinos."
    def __init__(self, array: DetectorArray, n: int = 1_000_000):
        nu = draw_neutrinos(n, array, np.random.default_rng(5))
        energy = nu.cascade_gev[~nu.is_track]
        bright = np.log(CASCADE_YIELD*array.config.light_yield*energy[energy > 0])
        count, edge = np.histogram(bright, np.arange(bright.min() - 0.3, bright.max() + 0.6, 0.3))
        self.x = (edge[1:] + edge[:-1])/2
        self.y = np.log(count + 0.5) - np.log(count.sum()*0.3)

    def __call__(self, bright: np.ndarray) -> np.ndarray:
        inside = (bright > self.x[0] - 0.3) & (bright < self.x[-1] + 0.3)
        return np.where(inside, np.interp(bright, self.x, self.y), -np.inf)


def energy_prior(log_gev: np.ndarray, config: SimulationConfig) -> np.ndarray: # log density of log energy
    "Prior of the energy of neutrinos that make tracks, up to a constant."
    gev = np.exp(np.clip(log_gev, 0, 25))

    def power(index):
        norm = (config.lowest_gev**(1 - index) - 2e7**(1 - index))/(index - 1)
        return gev**(1 - index)/norm
    density = (1 - config.hard_share)*power(config.soft_index) + config.hard_share*power(config.hard_index)
    odds = config.track_odds*(1 + muon_range(gev)/1000)
    inside = (gev >= config.lowest_gev) & (gev <= 2e7)
    return np.where(inside, np.log(density*odds/(1 + odds)), -np.inf)


def chord(start: np.ndarray, direction: np.ndarray, length: np.ndarray,
          array: DetectorArray) -> np.ndarray: # (W,) m
    "How much of a line of this length lies in the cylinder in which neutrinos are aimed."
    across = (direction[:, :2]**2).sum(1) + 1e-12
    middle = -(start[:, :2]*direction[:, :2]).sum(1)/across
    root = middle**2 - ((start[:, :2]**2).sum(1) - array.radius_m**2)/across
    half = np.sqrt(np.maximum(root, 0))
    rise = np.where(np.abs(direction[:, 2]) < 1e-9, 1e-9, direction[:, 2])
    ends = np.sort([(side*array.half_height_m - start[:, 2])/rise for side in (-1, 1)], axis=0)
    low = np.maximum.reduce([middle - half, ends[0], np.zeros(len(start))])
    high = np.minimum.reduce([middle + half, ends[1], length])
    return np.where(root > 0, np.maximum(high - low, 0), 0)


def track_brightness(muon_gev: np.ndarray, config: SimulationConfig) -> np.ndarray: # as in `light_sources`
    "Light of a muon of this energy, with its small losses."
    electrons = 0.188 + 0.0206*np.log(np.maximum(muon_gev, 1))
    small_losses = TRACK_M_PER_GEV*MUON_RADIATION_PER_M/2*muon_gev
    return config.light_yield*TRACK_YIELD*(1 + electrons + small_losses)


class Likelihood:
    """Posterior of one event; points (W, 8): place [m], time [ns], log brightness, direction (any length)

    A track's fifth number is the log of its energy relative to the true one.
    """
    def __init__(self, event: Event, array: DetectorArray, prior: CascadePrior):
        self.event, self.config, self.whole, self.prior = event, array.config, array, prior
        lit = in_local_coincidence(Pulses(np.zeros(len(event.sensor), int), event.sensor, event.time_ns,
                                          event.weight), array)
        self.lit = lit if lit.any() else np.ones(len(lit), bool)
        sensors, stands_for = chosen_sensors(event, event.sensor[self.lit], array)
        self.array = replace(array, position=array.position[sensors], reach_m=array.reach_m[sensors],
                             efficiency=(array.efficiency[sensors]*stands_for).astype(np.float32))
        self.hit = np.argsort(sensors)[np.searchsorted(np.sort(sensors), event.sensor)]    # (N,)
        noise_hz = self.config.noise_hz + self.config.noise_bursts_hz*self.config.burst_pulses
        self.background = (1e-9*noise_hz*array.efficiency[event.sensor]
                           + afterpulse_rate(event, self.config))                        # (N,) 1/ns
        light = event.light
        self.is_track = light.length_m[0] > 0
        along = ((light.start - light.start[0])*light.direction[0]).sum(1).astype(float)  # (K,) m
        middle = np.median(array.position[event.sensor[self.lit]], axis=0)
        pivot = float(np.clip((middle - light.start[0])@light.direction[0], 0, light.length_m[0]))
        self.along = along - pivot          # of the sources; a direction turns around the pivot
        self.vertex = float((event.nu.vertex - light.start[0])@event.nu.direction) - pivot
        self.truth = light.direction[0].astype(float)
        entry = float((light.start[0] - event.nu.vertex)@event.nu.direction)             # m after the vertex
        self.middle_gev = float(muon_energy(event.nu.muon_gev, entry + light.length_m[0]/2))
        self.calls = 0

    def first_points(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, tuple]:
        "Widely spread points, from what was seen alone, and mean and spread of the distribution."
        seen, when = self.whole.position[self.event.sensor[self.lit]], self.event.time_ns[self.lit]
        bright = np.log(self.event.weight[self.lit].sum()) + 6.5 if not self.is_track else 0.5
        mean = np.concatenate([np.median(seen, axis=0), [np.median(when) - 100, bright, 0, 0, 0]])
        spread = np.concatenate([60 + seen.std(0), [200 + when.std(), 1.5, 1, 1, 1]])
        return mean + spread*rng.standard_normal((n, 8)), (mean, spread)

    def __call__(self, p: np.ndarray) -> np.ndarray: # (W,)
        "Log prior plus log likelihood, up to a constant."
        direction = p[:, 5:]/np.linalg.norm(p[:, 5:], axis=1, keepdims=True)
        value = self.log_prior(p, direction)
        sane = np.flatnonzero(np.isfinite(value))
        if len(sane):
            value[sane] += self.log_likelihood(p[sane], direction[sane])
        return value

    def log_prior(self, p: np.ndarray, direction: np.ndarray) -> np.ndarray: # (W,)
        "Of place, brightness and direction, and a Gaussian for the direction's length."
        value = -0.5*(p[:, 5:]**2).sum(1) + np.log1p(-self.config.zenith_slope*direction[:, 2])
        if not self.is_track:
            outside = np.hypot(p[:, 0], p[:, 1]) > self.whole.radius_m
            outside |= np.abs(p[:, 2]) > self.whole.half_height_m
            return np.where(outside, -np.inf, value + self.prior(p[:, 4]))
        nu = self.event.nu
        value += energy_prior(np.log(nu.energy_gev) + p[:, 4], self.config)
        reach = muon_range(nu.muon_gev*np.exp(np.clip(p[:, 4], -20, 20)))
        inside = chord(p[:, :3] + self.vertex*direction, direction, reach, self.whole)
        with np.errstate(divide='ignore'):
            return value + np.log(inside/reach)

    def log_likelihood(self, p: np.ndarray, direction: np.ndarray) -> np.ndarray: # (W,)
        "Of all photoelectrons: a Poisson process in each sensor."
        self.calls += len(p)
        W, K, S = len(p), len(self.along), len(self.array.position)
        sources = self.sources(p, direction)
        source, sensor = pairs_in_reach(sources, self.array)
        mean, arrival, shape, rate = expected_light(sources, source, sensor, self.array)
        total = np.bincount(source//K, mean, minlength=W)                          # (W,)
        row = np.full((W*K, S), -1)
        row[source, sensor] = np.arange(len(source))
        row = row[:, self.hit]                                                     # (W*K, N)
        late = self.event.time_ns - (arrival[row] + np.repeat(p[:, 3], K)[:, None])
        near = np.flatnonzero((row >= 0) & (late > EARLY_EDGES_NS[0]) & (late < 8000))
        row, late = row.ravel()[near], late.ravel()[near]
        light = mean[row]*time_density(late, shape[row].astype(float), rate[row].astype(float), self.config)
        N = len(self.hit)
        density = np.bincount(near//(K*N)*N + near % N, light, minlength=W*N).reshape(W, N)
        return (self.event.weight*np.log(self.background + density)).sum(1) - total

    def sources(self, p: np.ndarray, direction: np.ndarray) -> LightSources: # W*K of them, times after p
        "The event's sources where each point has them."
        K, light = len(self.along), self.event.light
        start = p[:, None, :3] + self.along[:, None]*direction[:, None]            # (W, K, 3)
        length, bright = np.tile(light.length_m, len(p)), np.exp(p[:, 4:5])*light.brightness
        if self.is_track:           # the light of a bare muon hardly depends on its energy
            bright[:, 0] = track_brightness(self.middle_gev*np.exp(p[:, 4]), self.config)
        else:
            bright = np.exp(p[:, 4:5])
        delay = np.tile(self.along/SPEED_OF_LIGHT_M_PER_NS, len(p))
        return LightSources(np.zeros(len(length), int), start.reshape(-1, 3).astype(np.float32),
                            np.repeat(direction, K, 0).astype(np.float32), length,
                            delay.astype(np.float32), bright.ravel().astype(np.float32))


# ---- sampling

@dataclass
class Run:
    "What one run of the sampler found."
    points: np.ndarray      # (M, 8)
    log_evidence: float
    steps: int              # of the likelihood's switching on


def next_power(gain: np.ndarray, power: float) -> float:
    "The next power of the likelihood, at which a part `EFFECTIVE` of the points is effective."
    def effective(new):
        w = np.exp((new - power)*(gain - gain.max()))
        return w.sum()**2/(w**2).sum()/len(w)
    if effective(1.) >= EFFECTIVE:
        return 1.
    low, high = power, 1.
    for _ in range(40):
        middle = (low + high)/2
        low, high = (middle, high) if effective(middle) >= EFFECTIVE else (low, middle)
    return max(low, power + 1e-9)


def move(p: np.ndarray, values: np.ndarray, target, rng: np.random.Generator, kind: str) -> None:
    "Move each half of the points by means of the other half; in place."
    half = len(p)//2
    for mine, other in ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half))):
        new, log_factor = proposals(p[mine], p[other], p.std(0), rng, kind)
        found = target(new)
        with np.errstate(invalid='ignore'):
            take = np.log(rng.random(half)) < log_factor + found[0] - values[0, mine]
        p[mine] = np.where(take[:, None], new, p[mine])
        values[:, mine] = np.where(take, found, values[:, mine])


def proposals(mine: np.ndarray, other: np.ndarray, spread: np.ndarray, rng: np.random.Generator,
              kind: str) -> tuple[np.ndarray, np.ndarray | float]: # new points, log factor of acceptance
    "Where points might move to."
    n = len(mine)
    one, two = other[rng.integers(n, size=n)], other[rng.integers(n, size=n)]
    if kind == 'stretch':                                              # Goodman and Weare
        z = (rng.random(n) + 1)**2/2                                   # density 1/sqrt(z), 0.5 to 2
        return one + z[:, None]*(mine - one), 7*np.log(z)
    step = one - two                                                   # ter Braak's differential evolution
    if kind == 'part':                                                 # of some parameters, as in DREAM
        step = step*(rng.random(step.shape) < rng.choice([0.3, 0.6], (n, 1)))
    if kind == 'direction':
        step = np.concatenate([0*step[:, :5], step[:, 5:]], axis=1)
    size = np.where(rng.random(n) < 0.1, 1., 0.7*rng.random(n) + 0.1)
    return mine + size[:, None]*step + 1e-3*spread*rng.standard_normal(mine.shape), 0.


def anneal(likelihood: Likelihood, rng: np.random.Generator, points: int | None = None) -> Run:
    "Sequential Monte Carlo from a wide distribution to the posterior."
    points = points or POINTS
    p, (mean, spread) = likelihood.first_points(rng, points)

    def values_of(p, power): # (3, W): target, start, posterior
        start = -0.5*(((p - mean)/spread)**2).sum(1) - np.log(spread).sum()
        posterior = likelihood(p)
        with np.errstate(invalid='ignore'):
            return np.stack([(1 - power)*start + power*posterior, start, posterior])
    power, steps, log_evidence, values = 0., 0, 0., values_of(p, 1e-9)
    while power < 1:
        gain = np.maximum(values[2] - values[1], -1e9)
        new = next_power(gain, power)
        w = np.exp((new - power)*(gain - gain.max()))
        log_evidence += np.log(w.mean()) + (new - power)*gain.max()
        power, steps = new, steps + 1
        place = (np.arange(points) + rng.random())/points
        rows = np.minimum(np.searchsorted(np.cumsum(w)/w.sum(), place), points - 1)
        rows = rng.permutation(rows)
        p, values = p[rows], values[:, rows]
        values[0] = (1 - power)*values[1] + power*values[2]
        for sweep in range(SWEEPS):
            move(p, values, lambda new: values_of(new, power), rng, MOVES[sweep % len(MOVES)])
    kept = []
    for sweep in range(LAST_SWEEPS):
        move(p, values, lambda new: values_of(new, 1.), rng, MOVES[sweep % len(MOVES)])
        if sweep % KEEP_EVERY == KEEP_EVERY - 1:
            kept.append(p.copy())
    return Run(np.concatenate(kept), log_evidence, steps)


# ---- one event, examined

def angles(a: np.ndarray, b: np.ndarray) -> np.ndarray: # (A, B) rad
    "Between all pairs of two sets of unit vectors."
    return np.arccos(np.clip(a@b.T, -1, 1))


def best_direction(found: np.ndarray, rng: np.random.Generator) -> np.ndarray: # (3,)
    "The direction with the smallest mean angle to the sampled ones."
    tries = np.concatenate([found[rng.permutation(len(found))[:300]], found.mean(0, keepdims=True)])
    tries /= np.linalg.norm(tries, axis=1, keepdims=True)
    return tries[angles(tries, found).mean(1).argmin()]


def examine(event: Event, array: DetectorArray, prior: CascadePrior, seed: int) -> dict:
    "Errors that two independent runs make and expect for one event, and checks of them."
    started = time.process_time()
    likelihood = Likelihood(event, array, prior)
    rng = np.random.default_rng([seed, 7])
    runs = [anneal(likelihood, np.random.default_rng([seed, k])) for k in (1, 2)]
    found = [r.points[:, 5:]/np.linalg.norm(r.points[:, 5:], axis=1, keepdims=True) for r in runs]
    best = np.stack([best_direction(d, rng) for d in found])                       # (2, 3)
    expected = np.array([[angles(best[i:i + 1], d).mean() for d in found] for i in (0, 1)])
    evidence = np.array([r.log_evidence for r in runs])
    odds = np.exp(evidence - evidence.max())                           # points of the better run count more
    size = [round(2000*share) for share in odds/odds.sum()]
    rows = np.concatenate([rng.choice(len(r.points), n) + k*len(runs[0].points)
                           for k, (r, n) in enumerate(zip(runs, size))])
    samples, both = np.concatenate([r.points for r in runs])[rows], np.concatenate(found)[rows]
    truth = likelihood.truth
    answer = best_direction(both, rng)
    error = float(angles(answer[None], truth[None])[0, 0])
    bright = 0. if likelihood.is_track else np.log(event.light.brightness[0])
    return {'photoelectrons': float(event.weight.sum()), 'error': error,
            'expected_own': float(angles(answer[None], both).mean()),
            'expected_other': (expected[0, 1] + expected[1, 0])/2,
            'apart': float(angles(best[:1], best[1:])[0, 0]),
            'rank_angle': float((angles(answer[None], both)[0] < error).mean()),
            'rank_zenith': float((both[:, 2] < truth[2]).mean()),
            'rank_brightness': float((samples[:, 4] < bright).mean()),
            'log_evidence_1': runs[0].log_evidence, 'log_evidence_2': runs[1].log_evidence,
            'steps': runs[0].steps, 'calls': likelihood.calls,
            'cpu_seconds': round(time.process_time() - started, 2)}


# ---- strata, and the work in order

def draw_pool(array: DetectorArray) -> list[Event]:
    "The first `POOL` triggered events of the seed."
    rng, pool = np.random.default_rng(SEED), []
    while len(pool) < POOL:
        pool += draw_events(rng, array)
    return pool[:POOL]


def describe(event: Event) -> dict:
    "What is known of an event before it is sampled."
    truth = event.light.direction[:1].astype(float)
    return {'kind': 'track' if event.light.length_m[0] > 0 else 'cascade', 'pulses': event.pulses,
            'not_auxiliary': event.not_auxiliary,
            'line_fit': float(angles(-event.from_line_fit[None], truth)[0, 0])}


def plan(pool: pd.DataFrame, n: int) -> pd.DataFrame:
    "Which events to sample, in an order in which every beginning has events of all strata."
    pool['stratum'] = EDGES[np.searchsorted(EDGES, pool.not_auxiliary, 'right') - 1]
    groups = {key: group for key, group in pool.groupby(['kind', 'stratum']) if key[1] < EDGES[-1]}
    use = {(kind, low): len(group)*SPREADS[kind][np.searchsorted(EDGES, low)]
           / np.sqrt(COSTS[np.searchsorted(EDGES, low)]) for (kind, low), group in groups.items()}
    parts, rng = [], np.random.default_rng(SEED)
    for key, group in groups.items():
        size = min(max(round(n*use[key]/sum(use.values())), 5), len(group))
        part = group.iloc[rng.permutation(len(group))[:size]].copy()
        part['share'], part['order'] = len(group)/len(pool), (np.arange(size) + rng.random())/size
        parts.append(part)
    return pd.concat(parts).sort_values('order').drop(columns='order')


def bright_rows(pool: pd.DataFrame) -> list[dict]:
    "One row for each stratum that is not sampled, because its events are known almost exactly."
    bright = pool[pool.not_auxiliary >= EDGES[-1]]
    return [{'event': -1, 'kind': kind, 'pulses': group.pulses.median(), 'stratum': int(EDGES[-1]),
             'not_auxiliary': group.not_auxiliary.median(), 'line_fit': group.line_fit.mean(),
             'share': len(group)/len(pool), 'error': 0., 'expected_own': 0., 'expected_other': 0.}
            for kind, group in bright.groupby('kind')]


def run(n: int) -> None:
    "Sample events and append a row for each; rows that are there already are kept."
    array = DetectorArray.from_tables(config=STANDARD)
    prior, pool = CascadePrior(array), draw_pool(array)
    table = pd.DataFrame([describe(event) for event in pool])
    todo = plan(table, n)
    about = {'simulator_version': VERSION, 'world': STANDARD.name}
    if not RESULTS.exists():
        bright = pd.DataFrame([about | row for row in bright_rows(table)])
        bright.reindex(columns=COLUMNS).to_csv(RESULTS, index=False)
    done = pd.read_csv(RESULTS)
    if (done.simulator_version != VERSION).any():
        raise SystemExit(f'{RESULTS} has rows of another version of the simulator; remove it')
    progress = Progress('sampling events')
    for count, (number, row) in enumerate(todo.iterrows()):
        if number not in set(done.event):
            found = examine(pool[number], array, prior, int(number))
            line = pd.DataFrame([about | {'event': number} | row.to_dict() | found])
            line.reindex(columns=COLUMNS).to_csv(RESULTS, mode='a', header=False, index=False)
        progress(count + 1, len(todo))


# ---- what the rows say

def with_weights(rows: pd.DataFrame) -> pd.DataFrame:
    "Rows with `expected`, the mean of both expectations, and the weight of each row in the test set."
    size = rows.groupby(['kind', 'stratum'])['event'].transform('size')
    return rows.assign(expected=(rows.expected_own + rows.expected_other)/2, weight=rows.share/size)


def weighted_mean(rows: pd.DataFrame, column: str, chosen: np.ndarray | None = None,
                  tries: int = 400) -> tuple[float, float]: # rad
    "Mean of a column at the test set's mix, and its standard error by bootstrap within strata."
    x, w = rows[column].to_numpy(), rows.weight.to_numpy()
    w = w if chosen is None else w*np.asarray(chosen)
    strata = rows.reset_index(drop=True).groupby(['kind', 'stratum'])
    groups = [np.asarray(g) for g in strata.indices.values()]
    rng, found = np.random.default_rng(0), []
    for _ in range(tries):
        k = np.concatenate([g[rng.integers(len(g), size=len(g))] for g in groups])
        if w[k].sum() > 0:
            found.append((w[k]*x[k]).sum()/w[k].sum())
    return float((w*x).sum()/w.sum()), float(np.std(found))


def slices(rows: pd.DataFrame) -> dict[str, np.ndarray]:
    "Groups of events whose means are shown."
    return {'all': np.ones(len(rows), bool), 'cascade': (rows.kind == 'cascade').to_numpy(),
            'track': (rows.kind == 'track').to_numpy(), 'under 64': (rows.pulses < 64).to_numpy(),
            '64-255': rows.pulses.between(64, 255).to_numpy(), '256 and over': (rows.pulses > 255).to_numpy()}


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    "Means and their errors for groups of events."
    rows, out = with_weights(rows), []
    for name, chosen in slices(rows).items():
        line = {'events': name, 'sampled': int((chosen & (rows.event >= 0)).sum()),
                'share': float(rows.weight[chosen].sum())}
        for column in ('line_fit', 'error', 'expected', 'expected_own', 'expected_other'):
            line[column], line[f'{column}_se'] = weighted_mean(rows, column, chosen)
        out.append(line)
    return pd.DataFrame(out)


def checks(rows: pd.DataFrame) -> dict:
    "What should hold if the sampling is right."
    rows = with_weights(rows)
    sampled = rows[rows.event >= 0].assign(off=lambda r: r.error - r.expected)
    off = weighted_mean(sampled, 'off')
    ranks = {name: float(kstest_uniform(sampled[name].to_numpy()))
             for name in ('rank_angle', 'rank_zenith', 'rank_brightness')}
    return {'made minus expected [rad]': off[0], 'its standard error [rad]': off[1],
            'p values that the ranks of the truth are uniform': ranks,
            'run on other run minus run on itself [rad]':
                weighted_mean(sampled.assign(gap=sampled.expected_other - sampled.expected_own), 'gap')[0],
            'median angle between the answers of two runs [rad]': float(sampled.apart.median())}


def kstest_uniform(x: np.ndarray) -> float:
    "p value of a Kolmogorov-Smirnov test that numbers are uniform in 0 to 1."
    return kstest(x, 'uniform').pvalue


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument('command', choices=('run', 'summary'))
    parser.add_argument('--events', type=int, default=300)
    a = parser.parse_args()
    if a.command == 'run':
        run(a.events)
    rows = pd.read_csv(RESULTS)
    table, found = summary(rows), checks(rows)
    about = {'simulator_version': int(rows.simulator_version[0]), 'world': rows.world[0],
             'events_sampled': int((rows.event >= 0).sum()),
             'cpu_minutes': round(float(rows.cpu_seconds.sum())/60, 1)}
    about |= {'means': table.to_dict('records'), 'checks': found}
    SUMMARY.write_text(json.dumps(about, indent=1) + '\n')
    print(table.round(3).to_string(index=False))
    print(json.dumps(found, indent=1))


if __name__ == '__main__':
    main()
