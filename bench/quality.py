"""Which ideas make the network more accurate? Paired training runs, one idea at a time.

    python bench/quality.py data                                   simulate and pack the events of both worlds
    python bench/quality.py run --arms deep no-muon --events 16000 --seeds 0 1 2
    python bench/quality.py table --events 16000 --reference deep  differences with errors; --slices for more
    python bench/quality.py after --run FOLDER --events 40000      fine-tune a trained run; average over turns
    python bench/quality.py minutes --preset deep --minutes 20 --threads 2 --run FOLDER     by the clock
    python bench/quality.py compare --run FOLDER --beside OTHER    two trained runs on the same events

A run is one arm (settings that differ from a preset), one budget of events, one seed, and the simulated world
it learns from (`--worlds`). It is tested on both worlds: on its own, which is the native result, and on the
other, which is the crossed one. Runs of the same seed see the same events, in the same order where the batches
agree, so their errors on the same test events can be subtracted. Each run appends one line to
bench/results/quality.jsonl when it ends; a run that is in the file is not made again, unless the simulator has
another version since. The learning rate falls to its end within each budget. Run the reference arm first: a
line holds the difference to it, with the error that comes from the sample of test events.

`minutes` trains a preset as `icecube-nb train --minutes` does, and goes on with a run that was stopped: with
--session-minutes 12, call it again until the time is used up. Each call appends its errors on the test events
of both worlds, beside the line fit, to bench/results/minutes.jsonl; with --beside FOLDER also the difference to
another run. A run that has ended is only tested.

`compare` tests two runs that `icecube-nb train` or `icecube-nb demo` made on other events, and appends to
bench/results/compared.jsonl.

A small try that takes a minute and leaves the results alone:

    python bench/quality.py run --files 3 --file-events 200 --test-events 200 --events 400 --seeds 0 \
        --arms deep no-rotary --results /dev/null
"""
import argparse
import copy
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from icecube_nb.core.config import Config, cache_folder, override, preset
from icecube_nb.core.progress import Progress
from icecube_nb.data.batching import EventFile, inference_batches
from icecube_nb.data.epochs import TrainingEvents
from icecube_nb.data.packed import PackedBatch, load_packed
from icecube_nb.data.prepare import Prepared, prepare
from icecube_nb.data.pulses import (FEATURE_SETS, PUBLISHED, FeatureSet, Tokens, centre_of, code_tables, feature,
                                    turn_features)
from icecube_nb.inference.answer_options import AnswerOptions
from icecube_nb.inference.evaluate import (error_table, format_table, paired_difference, pulse_slice,
                                           to_markdown)
from icecube_nb.inference.predict import answer_batch_file, load_predictor
from icecube_nb.inference.summaries import method_errors
from icecube_nb.network.heads import decode_heads, loss_of_heads
from icecube_nb.network.model import load_weights
from icecube_nb.physics.angles import angles_from_direction, angular_error, direction_from_angles
from icecube_nb.physics.detector import (CENTRED_POSITION_UNIT_M, CENTRED_TIME_UNIT_NS, DETECTORS,
                                         POSITION_UNIT_M, TIME_UNIT_NS, read_geometry, sensor_features)
from icecube_nb.physics.simulate import VERSION, write_dataset
from icecube_nb.physics.simulation_config import WORLDS
from icecube_nb.training.checkpoints import load_checkpoint, sensors_of_run
from icecube_nb.training.loop import train
from icecube_nb.training.optimise import JointOptimiser
from icecube_nb.training.runs import checkpoints, log_rows
from icecube_nb.training.state import State, make_optimiser, new_state

RESULTS = Path(__file__).parent/'results'/'quality.jsonl'
NAME_OF_HEAD = {'classes': 'bins', 'vector': 'vector'}      # in the files of results


@dataclass(frozen=True)
class DataSize:
    "How many simulated events there are."
    files: int = 65
    file_events: int = 4000
    test_events: int = 5000
    seed: int = 7           # the default data set has another seed
    world: str = 'standard'


# ---- features that serve as controls: `centred` changes both the origin of a token's place and its units ----

def rescaled(tokens: Tokens) -> torch.Tensor:
    "Time and place in the units of `centred`, from one origin for all events: 1.2 us and the detector's centre."
    time = torch.asinh((tokens.time_ns[:, None] - 1200)/CENTRED_TIME_UNIT_NS)
    return torch.cat([time, tokens.sensor_features[:, :3]*(POSITION_UNIT_M/CENTRED_POSITION_UNIT_M)], 1)


def shifted(tokens: Tokens) -> torch.Tensor:
    "Time and place from the event's centre, in the published units."
    place = torch.cat([tokens.time_ns[:, None]/TIME_UNIT_NS, tokens.sensor_features[:, :3]], 1)
    return (place - centre_of(place, tokens).index_select(0, tokens.event)).float()


def register_controls() -> None:
    "Make the feature sets `rescaled` and `shifted` known in this process."
    for name, function in (('rescaled', rescaled), ('shifted', shifted)):
        columns = tuple(f'{name}_{what}' for what in ('time', 'x', 'y', 'z'))
        feature(*columns)(function)
        FEATURE_SETS[name] = FeatureSet(PUBLISHED + columns)


# ---- arms: a preset and what differs from it ----

FASTER = {'train.max_lr': 1e-3, 'train.batch_events': 64}       # than the published 2e-4 and 384
ARMS = {
    'published': ('small', {}),
    'deep': ('deep', {}),
    # other peak rates of Muon (`deep`: a factor of 5, which is a rate of 0.0025), and another size of a step
    'muon 0.02': ('deep', {'train.muon_lr_factor': 40}),
    'muon 0.01': ('deep', {'train.muon_lr_factor': 20}),
    'muon 0.005': ('deep', {'train.muon_lr_factor': 10}),
    'muon 0.00125': ('deep', {'train.muon_lr_factor': 2.5}),
    'batch 128': ('deep', {'train.batch_events': 128}),
    # without one idea
    'no-centring': ('deep', {'model.features': 'published'}),       # neither merged nor nearby
    'no-nearby': ('deep', {'model.features': 'merged'}),
    'no-merging': ('deep', {'model.features': 'centred'}),          # nor nearby
    'no-attention-pooling': ('deep', {'model.pooling': 'mean'}),
    'no-rotary': ('deep', {'model.rotary': False}),
    'no-qk-norm': ('deep', {'model.qk_norm': False}),
    'no-vector-head': ('deep', {'model.outputs': 'classes'}),
    'no-muon': ('deep', {'train.optimiser': 'adamw'}),
    # with one more
    'summary': ('deep', {'model.event_summary': True}),
}
# arms that `run` leaves out unless they are named
EXTRA_ARMS = {
    'published, batch 64, lr 1e-3': ('small', FASTER),
    'published, rescaled': ('small', FASTER | {'model.features': 'rescaled'}),
    'published, shifted': ('small', FASTER | {'model.features': 'shifted'}),
    'published, centred': ('small', FASTER | {'model.features': 'centred'}),
    'no-muon, lr 1e-3': ('deep', {'train.optimiser': 'adamw', 'train.max_lr': 1e-3}),
    'no-muon, lr 2.5e-4': ('deep', {'train.optimiser': 'adamw', 'train.max_lr': 2.5e-4}),
    'neck 256': ('deep', {'model.neck': 256}),
    'first 8 pulses': ('deep', {'model.features': 'sensor_pulses'}),
    'first 16 pulses': ('deep', {'model.features': 'sensor_pulses:pulses=16'}),
    'first 8 pulses, all auxiliary tokens': ('deep', {'model.features': 'sensor_pulses:auxiliary=all'}),
    '24 auxiliary tokens': ('deep', {'model.features': 'nearby:auxiliary=24'}),
    '64 auxiliary tokens': ('deep', {'model.features': 'nearby:auxiliary=64'}),
    'zero projections': ('deep', {'model.zero_projections': True}),
    'input in every block': ('deep', {'model.mix_input': True}),
    'squared relu': ('deep', {'model.activation': 'squared_relu'}),
    'squared relu, zero projections': ('deep', {'model.activation': 'squared_relu', 'model.zero_projections': True}),
    'mixture head': ('deep', {'model.outputs': 'classes,vector,mixture'}),
    'mixture head alone beside the classes': ('deep', {'model.outputs': 'classes,mixture'}),
    'flat then decay': ('deep', {'train.schedule': 'flat_then_decay', 'train.warm_up_steps': 50}),
    'average 0.99': ('deep', {'train.average_decay': 0.99}),
    'average of the tail': ('deep', {'train.average_tail': 0.2}),
    'flat then decay, average of the tail': ('deep', {'train.schedule': 'flat_then_decay', 'train.average_tail': 0.2}),
    'late angle': ('deep', {'train.late_losses': 'class_angle_loss,angle_loss,vector_loss:0.05'}),
    'late angle from 80 %': ('deep', {'train.late_losses': 'class_angle_loss,angle_loss,vector_loss:0.05',
                                      'train.late_share': 0.2}),
    'growing batches': ('deep', {'train.batch_growth': '0.4:2,0.7:4'}),
    'muon, decaying weight decay': ('deep', {'train.muon_weight_decay': 0.1}),
    'muon, even rows': ('deep', {'train.muon_variance': 0.95}),
    'turns': ('deep', {'data.turns': True}),
    'turns and mirrors': ('deep', {'data.turns': True, 'data.mirrors': True}),
    'look-ahead': ('deep', {}),                                     # see `AROUND`
}
# `laptop`, and what differs from it: run these with --reference 'laptop, batch 64', which most of them change
EXTRA_ARMS |= {'laptop': ('laptop', {})} | {f'laptop, batch {size}': ('laptop', {'train.batch_events': size})
                                            for size in (32, 64, 256)}
EXTRA_ARMS |= {f'laptop, batch 64, {name}': ('laptop', {'train.batch_events': 64, **changes}) for name, changes in {
    'fp32': {'train.precision': 'fp32'},
    'neck of deep': {'model.neck': 1024},
    '3 blocks': {'model.layers': 3},
    'Muon x 0.5': {'train.muon_lr_factor': 2.5},
    'Muon x 2': {'train.muon_lr_factor': 10},
    'AdamW x 2': {'train.max_lr': 1e-3, 'train.muon_lr_factor': 2.5}}.items()}
# other widths at other rates, and other sizes at the rate of `deep`; heads of 32 numbers, as in `deep`
EXTRA_ARMS |= {f'width {width}, rate x {factor}': ('deep', {
    'model.width': width, 'model.heads': width//32, 'train.max_lr': 5e-4*factor})
    for width in (32, 64, 128, 256) for factor in (0.25, 0.5, 1, 2, 4)}
EXTRA_ARMS |= {f'{layers} layers of {width}': ('deep', {
    'model.layers': layers, 'model.width': width, 'model.heads': width//32,
    'model.neck': 1024 if 1024 % width == 0 else 8*width})
    for width, layers in ((32, 6), (64, 4), (64, 6), (64, 12), (64, 24), (96, 6), (96, 9), (128, 6), (128, 9),
                          (128, 12), (128, 24), (256, 9))}


@contextmanager
def look_ahead(every: int = 5, share: float = 0.5) -> Iterator[None]:
    "Optimisers keep slow weights too: every few steps these go a share of the way to the others, which follow."
    plain_step, slow, count = JointOptimiser.step, [], 0

    @torch.no_grad()
    def step(optimiser: JointOptimiser) -> None:
        nonlocal slow, count
        weights = [p for group in optimiser.param_groups for p in group['params']]
        slow = slow or [p.clone() for p in weights]
        plain_step(optimiser)
        count += 1
        if count % every == 0:
            torch._foreach_lerp_(slow, weights, share)
            torch._foreach_copy_(weights, slow)

    JointOptimiser.step = step
    try:
        yield
    finally:
        JointOptimiser.step = plain_step


AROUND = {'look-ahead': look_ahead}     # arms that are no settings: what is in force while they train


def data_folder(size: DataSize) -> Path:
    "Where the events of this benchmark lie."
    return cache_folder()/f'quality-v{VERSION}-{size.world}-{size.files}x{size.file_events}-seed{size.seed}'


def make_data(size: DataSize) -> Prepared:
    "Simulate and pack the events, as far as that is not done yet."
    folder = write_dataset(data_folder(size), size.files, size.file_events, size.seed, size.test_events,
                           world=size.world)
    return prepare(folder, workers=1)


def arm_config(arm: str, events: int, seed: int, size: DataSize) -> Config:
    "The settings of a run: one pass over as many files as the budget of events needs."
    name, changes = (ARMS | EXTRA_ARMS)[arm]
    one_pass = {'data.files_per_epoch': events//size.file_events, 'train.epochs': 1, 'train.seed': seed}
    return override(preset(name), changes | one_pass)


def answers(state: State, packed: PackedBatch, sensors: np.ndarray, turns: int = 0) -> dict[str, np.ndarray]:
    "Direction (B, 3) that each head answers; the events are shown turned by sixths of a circle."
    c, found = state.config, {}
    back = turns*2*np.pi/DETECTORS['icecube86'].turns
    model = state.eval_model.eval()         # the averaged weights, if the run has them
    file = EventFile(packed, code_tables(sensors))
    for batch in inference_batches(file, np.arange(len(packed)), c.model.features, c.data.max_pulses):
        features = batch.features
        if turns:
            features = torch.from_numpy(turn_features(features.numpy(), c.model.features, turns))
        with torch.inference_mode():
            output = model(features, batch.offsets, batch.lengths)
        columns = decode_heads(output, state.bins)
        for head in c.model.outputs:
            row = found.setdefault(NAME_OF_HEAD.get(head, head), np.full((len(packed), 3), np.nan))
            azimuth, zenith = columns[f'{head}_azimuth'], columns[f'{head}_zenith']
            row[batch.event] = direction_from_angles(azimuth - back, zenith)
    model.train()
    return found


def errors_of(found: dict[str, np.ndarray], packed: PackedBatch) -> dict[str, np.ndarray]:
    "Angular error [rad] of each event of a packed test file, by head; NaN without pulses."
    truth = read_truth(packed).loc[packed.event_id]
    errors = {name: np.full(len(packed), np.nan) for name in found}
    for name, direction in found.items():
        answered = np.isfinite(direction).all(1)
        errors[name][answered] = angular_error(
            truth.azimuth.to_numpy()[answered], truth.zenith.to_numpy()[answered],
            *angles_from_direction(direction[answered]))
    return errors


def read_truth(packed: PackedBatch) -> pd.DataFrame:
    "The truth of the data set that a packed test file was made from, by event_id."
    folder = next(p for p in packed.path.parents if (p/'test_truth.parquet').exists())
    return pd.read_parquet(folder/'test_truth.parquet').set_index('event_id')


def summarise(errors: dict[str, np.ndarray], packed: PackedBatch) -> dict:
    "Mean error by slice of pulse count and by topology, for the classes; and of the other heads."
    bins, row = errors['bins'], {name: float(np.nanmean(e)) for name, e in errors.items()}
    labels = {'pulses': pulse_slice(packed.lengths),
              'kind': read_truth(packed).kind.loc[packed.event_id].to_numpy()}
    row['slices'] = {f'{key} {name}': float(np.nanmean(bins[label == name]))
                     for key, label in labels.items() for name in np.unique(label)}
    return row | {'test_events': int(np.isfinite(bins).sum())}


def test_file(prepared: Prepared) -> PackedBatch:
    "The packed test events of a data set."
    return load_packed(next(iter(prepared.test.values())))


def errors_file(scratch: Path, arm: str, events: int, seed: int, trained: str, tested: str) -> Path:
    "Where the error of each test event of a run lies, so that two arms can be compared event by event."
    return scratch/f'{arm}-{events}-{seed}-{trained}'.replace(' ', '_')/f'errors_{tested}.npz'


def run_arm(arm: str, events: int, seed: int, size: DataSize, prepared: Mapping[str, Prepared],
            reference: str, scratch: Path) -> dict:
    "Train one arm on the world of `size` and test it on all worlds; one row of results."
    if events % size.file_events:
        raise ValueError(f'--events {events} must be a multiple of {size.file_events}')
    own = prepared[size.world]
    folder = errors_file(scratch, arm, events, seed, size.world, size.world).parent
    shutil.rmtree(folder, ignore_errors=True)
    begin = time.process_time()
    with AROUND.get(arm, nullcontext)():
        state = train(own, folder, arm_config(arm, events, seed, size), device='cpu')
    seconds = time.process_time() - begin
    sensors, tests = sensor_features(read_geometry(own.geometry_path)), {}
    for world, data in prepared.items():
        packed = test_file(data)
        errors = errors_of(answers(state, packed, sensors), packed)
        np.savez_compressed(errors_file(scratch, arm, events, seed, size.world, world), **errors)
        tests[world] = summarise(errors, packed)
        base = errors_file(scratch, reference, events, seed, size.world, world)
        if base.exists() and arm != reference:
            tests[world]['difference'] = difference_to(errors['bins'], base, reference)
    shutil.rmtree(folder/'checkpoints', ignore_errors=True)
    return {'arm': arm, 'events': state.events, 'seed': seed, 'world': size.world, 'simulator': VERSION,
            'cpu_seconds': round(seconds, 1), 'threads': torch.get_num_threads(), 'tests': tests}


def difference_to(error: np.ndarray, base: Path, reference: str) -> dict:
    "Mean difference to another arm's errors on the same test events, and its standard error."
    with np.load(base) as file:
        less = paired_difference(error, file['bins'])
    return {'reference': reference, 'mean': float(less.mean), 'error': float(less.error)}


# ---- after training (no results are kept in the repository) ----

def fine_tune(state: State, prepared: Prepared, sensors: np.ndarray, events: int, max_lr: float,
              losses: Mapping[str, float] | None) -> State:
    "A copy of `state`, trained further with named losses and weights at a rate that falls to zero."
    state = copy.deepcopy(state)
    c, optimiser = state.config, make_optimiser(state.model, state.config)
    source = TrainingEvents(list(prepared.train.values())[:-1], sensors, c.model.features, c.data,
                            c.train.batch_events, seed=1000)
    seen, epoch = 0, 0
    while seen < events:
        for batch in source.epoch(epoch):
            for group in optimiser.param_groups:
                group['lr'] = max_lr*(1 - seen/events)*group.get('scale', 1)
            optimiser.zero_grad()
            output = state.model(batch.features, batch.offsets, batch.lengths)
            loss, _ = loss_of_heads(output, batch.azimuth, batch.zenith, state.bins, state.kernel, losses)
            loss.backward()
            torch.nn.utils.clip_grad_value_(state.model.parameters(), c.train.clip_value)
            optimiser.step()
            seen += len(batch.azimuth)
            if seen >= events:
                break
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
    packed = test_file(prepared)
    states = {'as trained': state}
    for name, losses in (('further, usual losses', None),
                         ('further, metric', {'angle_loss': 1.0, 'vector_loss': 0.05})):
        states[name] = fine_tune(state, prepared, sensors, events, state.config.train.max_lr/10, losses)
    errors = {name: errors_of(answers(s, packed, sensors), packed) for name, s in states.items()}
    turned = [answers(state, packed, sensors, turns) for turns in range(DETECTORS['icecube86'].turns)]
    errors['six turns'] = errors_of({head: sum(t[head] for t in turned) for head in turned[0]}, packed)
    for name, by_head in errors.items():
        row = {'run': folder.name, 'what': name, 'events': events if 'further' in name else 0}
        for head, error in by_head.items():
            answered = np.isfinite(error)
            less = paired_difference(error[answered], errors['as trained']['bins'][answered])
            row |= {head: float(error[answered].mean()), f'{head} less': less.mean,
                    f'{head} less_error': less.error}
        yield row


def minutes_run(a: argparse.Namespace, own: Prepared, other: Prepared) -> dict:
    """Train a preset for some minutes, in one session or more: one row of results.

    `own` holds the events to train on. The run is tested on the test events of both data sets."""
    torch.set_num_threads(a.threads)
    before, begin = max(checkpoints(a.run), default=0), time.process_time()
    config = override(preset(a.preset), {'train.seed': a.seeds[0]})
    state = train(own, a.run, config, a.minutes, 'cpu', Progress('training'), session_minutes=a.session_minutes)
    seconds = time.process_time() - begin
    sessions = sessions_of(a.run, seconds if state.step > before else None)
    worlds = {'errors': own, 'crossed': other}
    found = {name: error_table(*errors_of_run(a.run, prepared)).round(5).to_dict('records')
             for name, prepared in worlds.items()}
    if a.beside:
        found['beside'] = {name: difference_of_runs(a.run, a.beside, prepared)
                           for name, prepared in worlds.items()} | {'preset': load_checkpoint(a.beside)[0].name}
    return {'preset': a.preset, 'minutes': a.minutes, 'threads': a.threads, 'events': state.events,
            'steps': state.step, 'parameters': sum(p.numel() for p in state.model.parameters()),
            'sessions': len(sessions), 'seconds': round(state.seconds),
            'cpu_seconds': round(sum(sessions)), 'simulator': VERSION, 'training_events': a.files*a.file_events,
            'world': a.worlds[0], 'seed': a.seeds[0], 'precision': state.precision,
            'batch_events': config.train.batch_events} | found


def errors_of_run(run: Path, prepared: Prepared) -> tuple[dict[str, np.ndarray], np.ndarray]:
    "Errors of a run on the test events of a data set, by method and beside the line fit; their pulse counts."
    packed = test_file(prepared)
    columns = answer_batch_file(packed, lambda c: sensors_of_run(prepared, c.data), load_predictor(run, 'cpu'))
    return method_errors(packed, columns, read_truth(packed).reset_index(), prepared), columns['pulses']


def difference_of_runs(run: Path, reference: Path, prepared: Prepared) -> dict[str, float]:
    "Mean error of a run less that of another one, on the same events, with its standard error."
    method = 'classification heads'
    difference = paired_difference(*(errors_of_run(folder, prepared)[0][method] for folder in (run, reference)))
    return {'mean': round(difference.mean, 5), 'error': round(difference.error, 5)}


def about_run(run: Path) -> dict:
    "How a run was trained, from its log."
    rows, config = log_rows(run), load_checkpoint(run)[0]
    last = next(row for row in reversed(rows) if 'events' in row)
    return {'preset': config.name, 'seed': config.train.seed, 'parameters': rows[0]['parameters'],
            'precision': rows[0]['precision'], 'batch_events': config.train.batch_events, 'events': last['events'],
            'seconds': round(last['seconds'])}


def errors_on_files(run: Path, prepared: Prepared, files: int, turns: int = 1) -> np.ndarray:
    "Angular error [rad] of the answers of a run to all events of the first training files of a data set."
    predictor, errors = load_predictor(run, 'cpu', options=AnswerOptions(turns)), []
    for path in list(prepared.train.values())[:files]:
        packed = load_packed(path)
        columns = answer_batch_file(packed, lambda c: sensors_of_run(prepared, c.data), predictor)
        errors.append(angular_error(packed.azimuth, packed.zenith, columns['azimuth'], columns['zenith']))
    return np.concatenate(errors)


def compared(run: Path, beside: Path, worlds: Mapping[str, Prepared], turns: int, files: int = 5) -> dict:
    """Two runs on the same events of each world, which neither has learned from: one row of results.

    The answers of the first are averaged over `turns` of each event."""
    row = {'run': about_run(run) | {'turns': turns}, 'beside': about_run(beside), 'simulator': VERSION}
    for world, prepared in worlds.items():
        own, other = errors_on_files(run, prepared, files, turns), errors_on_files(beside, prepared, files)
        less = paired_difference(own, other)
        row[world] = {'events': len(own), 'run': float(own.mean()), 'beside': float(other.mean()),
                      'difference': float(less.mean), 'error': float(less.error)}
    return row


def sessions_of(run: Path, more: float | None) -> list[float]:
    "The processor's seconds of each session of a run so far; `more` is a further one."
    path = run.with_name(run.name + '-sessions.json')
    sessions = json.loads(path.read_text()) if path.is_file() else []
    if more is not None:
        sessions.append(more)
        path.write_text(json.dumps(sessions))
    return sessions


# ---- results ----

def read_results(path: Path = RESULTS, all_versions: bool = False) -> pd.DataFrame:
    "All runs on events of the present simulator; one row for each run and each world it was tested on."
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    rows = []
    for line in lines:
        if line['simulator'] == VERSION or all_versions:
            tests = line.pop('tests')
            rows += [line | {'tested': world} | result for world, result in tests.items()]
    return pd.DataFrame(rows)


def append(path: Path, row: dict) -> None:
    "Add a line to a file of results, and show it."
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'a') as file:
        file.write(json.dumps(row) + '\n')
    means = {world: round(test['bins'], 4) for world, test in row['tests'].items()} if 'tests' in row else {}
    print(json.dumps({k: v for k, v in row.items() if k != 'tests'} | means), flush=True)


FAR = 0.1       # rad


def differences(rows: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Each arm's mean error and its difference to `reference`, by world of training and world of test.

    Two things make a difference uncertain. The scatter between seeds is pooled over the arms of one pair of
    worlds that are near the reference, because three seeds alone tell little about their own scatter; an arm
    that is more than `FAR` away has its own. The sample of test events is the same for all seeds, so its
    error does not fall with more of them. Both are added in quadrature.
    """
    out = []
    for (world, tested), pair in rows.groupby(['world', 'tested'], sort=False):
        base = pair[pair.arm == reference].set_index('seed').bins
        paired = pair[pair.seed.isin(base.index)].copy()
        paired['less'] = paired.bins - base.loc[paired.seed].to_numpy()
        far = paired.groupby('arm').less.transform('mean').abs() > FAR
        near_scatter = pooled_scatter(paired[(paired.arm != reference) & ~far])
        for arm, group in paired.groupby('arm', sort=False):
            row = {'method': arm, 'world': world, 'tested': tested, 'runs': len(group),
                   'mean error': group.bins.mean(), 'difference': group.less.mean(),
                   'events/s': (group.events/group.cpu_seconds).mean()}
            if arm != reference:
                others = {d['reference'] for d in group.difference} - {reference}
                if others:
                    raise ValueError(f'{arm} was compared with {", ".join(others)}: run it with --reference {reference}')
                sample = np.mean([d['error']**2 for d in group.difference])
                own = abs(group.less.mean()) > FAR
                scatter = pooled_scatter(group) if own else near_scatter
                row['difference_error'] = math.sqrt(scatter**2/len(group) + sample)
            out.append(row)
    return pd.DataFrame(out)


def pooled_scatter(paired: pd.DataFrame) -> float:
    "Standard deviation of `less` between the seeds of an arm, from all arms together."
    squares = (paired.less - paired.groupby('arm').less.transform('mean')).pow(2).sum()
    degrees_of_freedom = len(paired) - paired.arm.nunique()
    return math.sqrt(squares/degrees_of_freedom) if degrees_of_freedom > 0 else math.nan


def table(rows: pd.DataFrame, reference: str) -> pd.DataFrame:
    "One line an arm: its difference to `reference` on each pair of worlds; the mean error of `reference`."
    found = differences(rows, reference)
    out = {}
    for _, row in found.iterrows():
        line = out.setdefault(row.method, {'method': row.method, 'runs': 0})
        line['runs'] = max(line['runs'], row.runs)
        text = f'{row["mean error"]:.3f}'
        if row.method != reference:
            known = not math.isnan(row.difference_error)
            error = f'± {row.difference_error:.3f}' if known else '(one seed)'
            text = f'{round(row.difference, 3) + 0.0:+.3f} {error}'
        line[column_name(row.world, row.tested)] = text
    pairs = [column_name(world, tested) for world in WORLDS for tested in WORLDS]
    shown = pd.DataFrame(out.values()).astype({'runs': str}).fillna('-')
    return shown[['method', 'runs', *(pair for pair in pairs if pair in shown)]]


def column_name(world: str, tested: str) -> str:
    "Of a pair of worlds, in tables."
    return f'{world}, native' if world == tested else f'{world} to {tested}'


def by_slice(rows: pd.DataFrame) -> pd.DataFrame:
    "Mean error of each arm by slice of pulse count and by topology, over its seeds, in its own world."
    rows = rows[rows.world == rows.tested]
    parts = [pd.DataFrame(group.slices.tolist()).mean().rename(arm)
             for arm, group in rows.groupby('arm', sort=False)]
    return pd.concat(parts, axis=1).T.rename_axis('method').reset_index()


# ---- the command line ----

def read_arguments() -> argparse.Namespace:
    "The command line."
    size = DataSize()
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add('what', choices=['data', 'run', 'table', 'after', 'minutes', 'compare'])
    add('--arms', nargs='+', metavar='ARM', help='default: all of ' + ', '.join(ARMS) +
        '; more arms: ' + ', '.join(EXTRA_ARMS).replace('%', '%%'))
    add('--events', type=int, default=16000, help='of a run, a multiple of --file-events')
    add('--seeds', type=int, nargs='+', default=[0, 1, 2], help='of the runs; `minutes` takes the first')
    add('--reference', default='deep', help='arm that the others are compared with; run it first')
    add('--worlds', nargs='+', default=list(WORLDS), choices=list(WORLDS), help='that the runs learn from')
    add('--threads', type=int, default=1)
    add('--slices', action='store_true', help='table by slice and topology too')
    add('--run', type=Path, help='folder of a run, for `after`, `minutes` and `compare`')
    add('--beside', type=Path, help='folder of another run, whose errors are subtracted')
    add('--turns', type=int, default=1, help='`compare` averages the answers of --run over this many turns')
    add('--preset', default='deep', help='of `minutes`')
    add('--minutes', type=float, default=20.0, help='of the whole run')
    add('--session-minutes', type=float, help='after which `minutes` stops; the next call goes on')
    add('--scratch', type=Path, default=cache_folder()/'quality-runs', help='of the runs')
    add('--results', type=Path, default=RESULTS, help='file of results')
    add('--files', type=int, default=size.files, help='batch files that are simulated')
    add('--file-events', type=int, default=size.file_events, help='events in each')
    add('--test-events', type=int, default=size.test_events)
    arguments = parser.parse_args()
    unknown = sorted({*(arguments.arms or [])} - (ARMS | EXTRA_ARMS).keys())
    if unknown and arguments.what == 'run':
        parser.error(f'no arm {", ".join(unknown)}; there are {", ".join(ARMS | EXTRA_ARMS)}')
    return arguments


def show_tables(a: argparse.Namespace) -> None:
    "Print the results of one budget of events."
    rows = read_results(a.results)
    rows = rows[(rows.events == a.events) & (rows.arm.isin(a.arms) if a.arms else True)]
    print(to_markdown(table(rows, a.reference)))
    if a.slices:
        print(to_markdown(by_slice(rows)))


def run_arms(a: argparse.Namespace, size: DataSize, prepared: Mapping[str, Prepared]) -> None:
    "Train and test all arms that have no row of results yet."
    done = read_results(a.results)
    done = set() if done.empty else set(zip(done.arm, done.events, done.seed, done.world))
    for seed in a.seeds:
        for world in a.worlds:
            for arm in a.arms or ARMS:
                if (arm, a.events, seed, world) not in done:
                    own = replace(size, world=world)
                    append(a.results, run_arm(arm, a.events, seed, own, prepared, a.reference, a.scratch))


def main() -> None:
    "Do what the command line says."
    a = read_arguments()
    if a.what == 'table':
        show_tables(a)
        return
    if a.what == 'minutes':
        size = DataSize(a.files, a.file_events, a.test_events, world=a.worlds[0])
        other = DataSize(test_events=a.test_events, world=next(w for w in WORLDS if w != size.world))
        row = minutes_run(a, make_data(size), make_data(other))
        append(RESULTS.with_name('minutes.jsonl'), row)
        print(format_table(pd.DataFrame(row['errors'])))
        return
    torch.set_num_threads(a.threads)
    register_controls()
    size = DataSize(a.files, a.file_events, a.test_events)
    prepared = {world: make_data(replace(size, world=world)) for world in WORLDS}
    if a.what == 'run':
        run_arms(a, size, prepared)
    if a.what == 'compare':
        append(RESULTS.with_name('compared.jsonl'), compared(a.run, a.beside, prepared, a.turns))
    if a.what == 'after':
        for row in after(a.run, prepared['standard'], a.events):
            append(RESULTS.with_name('after.jsonl'), row)


if __name__ == '__main__':
    main()
