"""Which ideas make the network more accurate? Paired training runs, one idea at a time.

    python bench/quality.py data                                   simulate and pack the events
    python bench/quality.py run --arms deep no-muon --events 24000 --seeds 0 1 2
    python bench/quality.py table --events 24000 --reference deep  differences with errors; --slices for more
    python bench/quality.py after --run FOLDER --events 40000      fine-tune a trained run; average over turns
    python bench/quality.py minutes --run FOLDER --data FOLDER --minutes 20   one long run beside the line fit

A run is one arm (settings that differ from a preset), one budget of events, one seed. Runs of the same seed
see the same events, in the same order where the batches agree, so their errors on the same test events can be
subtracted. Each run appends one line to bench/results/quality.jsonl when it ends; a run that is in the file
is not made again. The learning rate falls to its end within each budget.
"""
import argparse
import copy
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from icecube_nb.data import batching
from icecube_nb.training import loop as train_module
from icecube_nb.physics.angles import angles_from_direction, angular_error, direction_from_angles
from icecube_nb.data.batching import TrainingEvents, inference_batches
from icecube_nb.core.config import Config, cache_folder, override, preset
from icecube_nb.training.checkpoints import load_checkpoint
from icecube_nb.physics.detector import read_geometry, sensor_features
from icecube_nb.inference.evaluate import (error_table, format_table, paired_difference, pulse_slice,
                                           to_markdown)
from icecube_nb.inference.predict import answer_batch, load_predictor
from icecube_nb.inference.summaries import method_errors
from icecube_nb.network.losses import angle_loss, bin_loss, decode_bins, decode_vector, unit_vectors, vector_loss
from icecube_nb.network.model import load_weights
from icecube_nb.data.packed import PackedBatch, load_packed
from icecube_nb.data.prepare import Prepared, prepare
from icecube_nb.core.progress import Progress
from icecube_nb.data.pulses import turn_angle, turn_features
from icecube_nb.physics.simulate import write_dataset
from icecube_nb.training.loop import train
from icecube_nb.training.state import State, make_optimiser, new_state

RESULTS = Path(__file__).parent/'results'/'quality.jsonl'
FILE_EVENTS, FILES, TEST_EVENTS, SEED = 4000, 65, 5000, 7   # the default data set has another seed

# an arm is a preset and what differs from it
ARMS = {
    'published': ('small', {}),
    'deep': ('deep', {}),
    # other rates of Muon at their peak (`deep`: 0.0025), and other sizes of a step
    'muon 0.02': ('deep', {'train.muon_lr_factor': 40}),
    'muon 0.01': ('deep', {'train.muon_lr_factor': 20}),
    'muon 0.005': ('deep', {'train.muon_lr_factor': 10}),
    'muon 0.00125': ('deep', {'train.muon_lr_factor': 2.5}),
    'batch 128': ('deep', {'train.batch_events': 128}),
    'batch 128, rates x 1.4': ('deep', {'train.batch_events': 128, 'train.max_lr': 7e-4}),
    'neck 256': ('deep', {'model.neck': 256}),
    # without one idea
    'no-centring': ('deep', {'model.features': 'published'}),       # neither merged nor nearby
    'no-nearby': ('deep', {'model.features': 'merged'}),
    'no-merging': ('deep', {'model.features': 'centred'}),          # nor nearby
    'no-attention-pooling': ('deep', {'model.pooling': 'mean'}),
    'no-rotary': ('deep', {'model.rotary': False}),
    'no-qk-norm': ('deep', {'model.qk_norm': False}),
    'no-vector-head': ('deep', {'model.outputs': 'classes'}),
    'no-muon': ('deep', {'train.optimiser': 'adamw'}),
    'no-muon, lr 1e-3': ('deep', {'train.optimiser': 'adamw', 'train.max_lr': 1e-3}),
    'muon in the necks': ('deep', {}),      # and the blocks, see `more_muon`
    # with one more
    'summary': ('deep', {'model.event_summary': True}),
    'turned': ('deep', {}),                 # trained on turned and mirrored events, see `turned_batches`
    # the published network with one idea
    'published + centring': ('small', {'model.features': 'centred', 'train.max_lr': 1e-3,
                                       'train.batch_events': 64}),
    'published, batch 64, lr 1e-3': ('small', {'train.max_lr': 1e-3, 'train.batch_events': 64}),
}


@contextmanager
def turned_batches(wanted: bool, seed: int):
    "While this holds, training events are turned by a random multiple of 60 degrees, every other mirrored."
    original, rng = batching.make_batch, np.random.default_rng([seed, 60])
    def make(*arguments):
        batch = original(*arguments)
        event = np.repeat(np.arange(len(batch.event)), np.diff(batch.offsets))
        sixths, mirror = rng.integers(6, size=len(batch.event)), rng.integers(2, size=len(batch.event)) == 1
        features = turn_features(batch.features.numpy(), arguments[3], sixths[event], mirror[event])
        azimuth = turn_angle(batch.azimuth.numpy(), sixths, mirror)
        return batch._replace(features=torch.from_numpy(features), azimuth=torch.from_numpy(azimuth).float())
    try:
        if wanted: batching.make_batch = make
        yield
    finally: batching.make_batch = original


@contextmanager
def more_muon(wanted: bool):
    "While this holds, Muon takes the matrices of the necks as well."
    original = train_module.hidden_matrices
    def with_necks(model):
        necks = [*model.azimuth_neck.modules(), *model.zenith_neck.modules()]
        return original(model) + [(m.weight, 1) for m in necks if isinstance(m, torch.nn.Linear)]
    try:
        if wanted: train_module.hidden_matrices = with_necks
        yield
    finally: train_module.hidden_matrices = original


def data_folder() -> Path:
    "Where the events of this benchmark lie."
    return cache_folder()/f'quality-{FILES}x{FILE_EVENTS}-seed{SEED}'


def arm_config(arm: str, events: int, seed: int) -> Config:
    "The settings of a run: one pass over as many files as the budget of events needs."
    name, changes = ARMS[arm]
    one_pass = {'data.files_per_epoch': events//FILE_EVENTS, 'train.epochs': 1, 'train.seed': seed}
    return override(preset(name), changes | one_pass)


def answers(state: State, packed: PackedBatch, sensors: np.ndarray, sixths: int = 0) -> dict[str, np.ndarray]:
    "Unit vector of each event's answer (B, 3), by way of decoding; the events are shown turned by `sixths`."
    c, found = state.config, {}
    state.model.eval()
    for batch in inference_batches(packed, sensors, c.model.features, c.data.max_pulses):
        features = batch.features
        if sixths: features = torch.from_numpy(turn_features(features.numpy(), c.model.features, sixths))
        with torch.inference_mode(): out = state.model(features, batch.offsets)
        ways = {'bins': decode_bins(out.azimuth_logits, out.zenith_logits, state.bins)[:2]}
        if 'direction' in out: ways['vector'] = decode_vector(out.direction)[:2]
        for way, (azimuth, zenith) in ways.items():
            row = found.setdefault(way, np.full((len(packed), 3), np.nan))
            row[batch.event] = direction_from_angles(azimuth.numpy() - sixths*np.pi/3, zenith.numpy())
    state.model.train()
    return found


def errors_of(found: dict[str, np.ndarray], packed: PackedBatch) -> dict[str, np.ndarray]:
    "Angular error [rad] of each event of a packed test file, by way of decoding; NaN without pulses."
    truth = pd.read_parquet(data_of(packed)/'test_truth.parquet').set_index('event_id').loc[packed.event_id]
    errors = {way: np.full(len(packed), np.nan) for way in found}
    for way, answer in found.items():
        good = np.isfinite(answer).all(1)
        errors[way][good] = angular_error(truth.azimuth.to_numpy()[good], truth.zenith.to_numpy()[good],
                                          *angles_from_direction(answer[good]))
    return errors


def data_of(packed: PackedBatch) -> Path:
    "The competition-format folder that a packed file was made from."
    return next(p for p in packed.path.parents if (p/'test_truth.parquet').exists())


def summarise(errors: dict[str, np.ndarray], packed: PackedBatch) -> dict:
    "Mean error by slice of pulse count and by kind of event, for the classes; and of the vector head."
    truth = pd.read_parquet(data_of(packed)/'test_truth.parquet').set_index('event_id')
    bins, row = errors['bins'], {way: float(np.nanmean(e)) for way, e in errors.items()}
    labels = {'pulses': pulse_slice(packed.lengths), 'kind': truth.kind.loc[packed.event_id].to_numpy()}
    row['slices'] = {f'{key} {name}': float(np.nanmean(bins[label == name]))
                     for key, label in labels.items() for name in np.unique(label)}
    return row | {'test_events': int(np.isfinite(bins).sum())}


def run_arm(arm: str, events: int, seed: int, prepared: Prepared, scratch: Path) -> dict:
    "Train and test one arm; one row of results."
    if events % FILE_EVENTS: raise ValueError(f'--events {events} must be a multiple of {FILE_EVENTS}')
    config, folder = arm_config(arm, events, seed), scratch/f'{arm}-{events}-{seed}'.replace(' ', '_')
    shutil.rmtree(folder, ignore_errors=True)
    begin = time.process_time()
    with turned_batches(arm == 'turned', seed), more_muon(arm == 'muon in the necks'):
        state = train(prepared, folder, config, device='cpu')
    seconds = time.process_time() - begin
    sensors = sensor_features(read_geometry(prepared.geometry_path))
    packed = load_packed(next(iter(prepared.test.values())))
    errors = errors_of(answers(state, packed, sensors), packed)
    np.savez_compressed(folder/'errors.npz', **errors)
    shutil.rmtree(folder/'checkpoints', ignore_errors=True)
    return {'arm': arm, 'events': state.events, 'seed': seed, 'cpu_seconds': round(seconds, 1),
            'threads': torch.get_num_threads()} | summarise(errors, packed)


def fine_tune(state: State, prepared: Prepared, sensors: np.ndarray, events: int, max_lr: float,
              loss: Callable) -> State:
    "A copy of `state`, trained further with `loss(output, azimuth, zenith)` at a rate that falls to zero."
    state = copy.deepcopy(state)
    c, optimiser = state.config, make_optimiser(state.model, state.config)
    source = TrainingEvents(list(prepared.train.values())[:-1], sensors, c.model.features, c.data,
                            c.train.batch_events, seed=1000)
    seen, epoch = 0, 0
    while seen < events:
        for batch in source.epoch(epoch):
            for group in optimiser.param_groups: group['lr'] = max_lr*(1 - seen/events)*group.get('scale', 1)
            optimiser.zero_grad()
            loss(state.model(batch.features, batch.offsets), batch.azimuth, batch.zenith).backward()
            torch.nn.utils.clip_grad_value_(state.model.parameters(), c.train.clip_value)
            optimiser.step()
            seen += len(batch.azimuth)
            if seen >= events: break
        epoch += 1
    return state


def load_run(folder: Path) -> State:
    "The last checkpoint of a run, to go on from or to ask."
    config, weights, angle_bins = load_checkpoint(folder)
    state = new_state(config, angle_bins, 'cpu')
    load_weights(state.model, {k: torch.from_numpy(v) for k, v in weights.items()})
    return state


def after(folder: Path, prepared: Prepared, events: int) -> Iterator[dict]:
    "What fine-tuning on the metric and averaging over turns change on a trained run: rows of results."
    state, sensors = load_run(folder), sensor_features(read_geometry(prepared.geometry_path))
    packed = load_packed(next(iter(prepared.test.values())))
    def usual(out, azimuth, zenith):
        return (bin_loss(out.azimuth_logits, out.zenith_logits, azimuth, zenith, state.bins, state.kernel)
                + vector_loss(out.direction, unit_vectors(azimuth, zenith)))
    def metric(out, azimuth, zenith):
        truth = unit_vectors(azimuth, zenith)
        return angle_loss(out.direction, truth) + 0.05*vector_loss(out.direction, truth)
    rows = {'as trained': state}
    for name, loss in (('further, usual loss', usual), ('further, metric', metric)):
        rows[name] = fine_tune(state, prepared, sensors, events, state.config.train.max_lr/10, loss)
    errors = {name: errors_of(answers(s, packed, sensors), packed) for name, s in rows.items()}
    found = [answers(state, packed, sensors, k) for k in range(6)]
    errors['six turns'] = errors_of({way: sum(f[way] for f in found) for way in found[0]}, packed)
    for name, e in errors.items():
        row = {'run': folder.name, 'what': name, 'events': events if 'further' in name else 0}
        for way, other in e.items():
            good = np.isfinite(other)
            less = paired_difference(other[good], errors['as trained']['bins'][good])
            row |= {way: float(other[good].mean()), f'{way} less': less.mean, f'{way} less_error': less.error}
        yield row


def minutes_run(run: Path, data: Path, minutes: float, muon_lr_factor: float) -> pd.DataFrame:
    "Train `deep` for so long, or go on; errors of the heads and the line fit on the test events of `data`."
    prepared = prepare(data)
    config = override(preset('deep'), {'train.muon_lr_factor': muon_lr_factor})
    state = train(prepared, run, config, minutes, 'cpu', Progress('training'))
    packed = load_packed(next(iter(prepared.test.values())))
    columns = answer_batch(packed, lambda c: prepared.sensors(c.data), load_predictor(run, 'cpu'))
    truth = pd.read_parquet(data/'test_truth.parquet')
    errors = method_errors(packed, columns, truth, prepared)
    found = error_table(errors, columns['pulses'])
    kinds = truth.set_index('event_id').loc[packed.event_id, 'kind'].to_numpy()
    about = {'events': state.events, 'seconds': round(state.seconds), 'steps': state.step,
             'muon_scale': muon_lr_factor,
             'threads': torch.get_num_threads(), 'instructions': torch.backends.cpu.get_cpu_capability(),
             'kinds': {k: {name: float(np.mean(e[kinds == k])) for name, e in errors.items()}
                       for k in np.unique(kinds)}}
    found.to_csv(RESULTS.with_name('minutes.csv'), index=False)
    RESULTS.with_name('minutes.json').write_text(json.dumps(about, indent=1) + '\n')
    return found


def read_results(path: Path = RESULTS) -> pd.DataFrame:
    "All runs so far."
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return pd.DataFrame(rows)


def table(rows: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Mean error of each arm, and its difference to `reference` over the seeds both have.

    The error of a difference comes from the scatter of all paired differences of this budget around their
    arm's mean, pooled over the arms, because three seeds alone tell little about their own scatter.
    """
    base = rows[rows.arm == reference].set_index('seed').bins
    paired = rows[rows.seed.isin(base.index)].copy()
    paired['less'] = paired.bins - base.loc[paired.seed].to_numpy()
    others = paired[paired.arm != reference]
    spread = (others.less - others.groupby('arm').less.transform('mean')).pow(2).sum()
    free = len(others) - others.arm.nunique()
    pooled = math.sqrt(spread/free) if free else math.nan
    out = []
    for arm, group in paired.groupby('arm', sort=False):
        out.append({'method': arm, 'runs': str(len(group)), 'mean error': group.bins.mean(),
                    'difference': group.less.mean(),
                    'difference_error': math.nan if arm == reference else pooled/math.sqrt(len(group)),
                    'vector head': group.vector.mean() if 'vector' in group else math.nan,
                    'events/s': f'{(group.events/group.cpu_seconds).mean():.0f}'})
    return pd.DataFrame(out).sort_values('difference')


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument('what', choices=['data', 'run', 'table', 'after', 'minutes'])
    parser.add_argument('--arms', nargs='+', metavar='ARM', help='default: all of ' + ', '.join(ARMS))
    parser.add_argument('--events', type=int, default=24000, help=f'of a run, a multiple of {FILE_EVENTS}')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--reference', default='deep')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--slices', action='store_true', help='table by slice and kind too')
    parser.add_argument('--run', type=Path, help='folder of a run, for `after` and `minutes`')
    parser.add_argument('--data', type=Path, help='competition-format folder with test_truth.parquet')
    parser.add_argument('--minutes', type=float, default=20.0)
    parser.add_argument('--muon-scale', type=float, default=preset('deep').train.muon_lr_factor,
                        help="of `minutes`: Muon's rate in units of train.max_lr")
    parser.add_argument('--scratch', type=Path, default=cache_folder()/'quality-runs', help='of the runs')
    a = parser.parse_args()
    if a.what == 'table':
        rows = read_results()
        rows = rows[(rows.events == a.events) & (rows.arm.isin(a.arms) if a.arms else True)]
        print(to_markdown(table(rows, a.reference)))
        if a.slices: print(to_markdown(by_slice(rows)))
        return
    if a.what == 'minutes': return print(format_table(minutes_run(a.run, a.data, a.minutes, a.muon_lr_factor)))
    unknown = sorted({*(a.arms or [])} - ARMS.keys())
    if unknown: parser.error(f'no arm {", ".join(unknown)}; there are {", ".join(ARMS)}')
    torch.set_num_threads(a.threads)
    data = write_dataset(data_folder(), FILES, FILE_EVENTS, SEED, TEST_EVENTS)
    prepared = prepare(data, workers=1)
    if a.what == 'data': return
    if a.what == 'after':
        for row in after(a.run, prepared, a.events): append(RESULTS.with_name('after.jsonl'), row)
        return
    done = read_results()
    done = set() if done.empty else set(zip(done.arm, done.events, done.seed))
    for seed in a.seeds:
        for arm in a.arms or ARMS:
            if (arm, a.events, seed) in done: continue
            row = run_arm(arm, a.events, seed, prepared, a.scratch)
            append(RESULTS, row)


def append(path: Path, row: dict) -> None:
    "One more line of results, shown as well."
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'a') as file: file.write(json.dumps(row) + '\n')
    print(json.dumps({k: v for k, v in row.items() if k != 'slices'}), flush=True)


def by_slice(rows: pd.DataFrame) -> pd.DataFrame:
    "Mean error of each arm by slice of pulse count and by kind, over its seeds."
    parts = [pd.DataFrame(group.slices.tolist()).mean().rename(arm)
             for arm, group in rows.groupby('arm', sort=False)]
    return pd.concat(parts, axis=1).T.rename_axis('method').reset_index()


if __name__ == '__main__': main()
