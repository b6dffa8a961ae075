"""How fast is each stage, beside a plain padded reference on the same machine in the same minutes?

    make bench                                    one table, some minutes on two cores
    python bench/speed.py --stages training       one stage; --rounds N for smaller errors
    python bench/speed.py --stages minibatches --rounds 1 --batch 64 --repeats 1      a quick try

All variants of a stage take turns, round after round, on the same events. A ratio is the median over the
rounds, with the smallest and largest beside it, so that other work on the machine hits all variants alike.
Speed does not depend on the weights: they are fresh. The events are simulated, cut at 256 pulses. With
OMP_NUM_THREADS=1 all rates are those of one core, which is what a busy machine can measure.
"""
import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from icecube_nb.core.config import cache_folder, override, small
from icecube_nb.core.cpu_workers import MMAP_THRESHOLD, TRIM_THRESHOLD, CpuWorkerPool
from icecube_nb.data.batching import EventBatch, batches_by_pulses, make_batch
from icecube_nb.data.packed import PackedBatch, load_packed
from icecube_nb.data.packing import pack_batch, plan_jobs
from icecube_nb.data.prepare import Prepared, prepare
from icecube_nb.network.heads import decode_heads, loss_of_heads
from icecube_nb.network.model import Model
from icecube_nb.physics.detector import read_geometry, sensor_features
from icecube_nb.physics.simulate import default_dataset
from icecube_nb.training.state import State, new_state
from icecube_nb.training.step import cpu_workers_for, train_step

sys.path.insert(0, str(Path(__file__).parent))
import padded                                               # noqa: E402  beside this file

RESULTS = Path(__file__).parent/'results'/'speed.json'
MICROBATCH_PULSES = 2048    # pulses that stay in the cache of a core
PLAIN = {'model.outputs': 'classes'}
BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()   # does the processor compute in it?


def in_turns(calls: dict[str, Callable[[], int]], rounds: int) -> dict[str, np.ndarray]:
    "Events/s of each call (they return how many), in turns; a first round is not counted."
    rates = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in list(calls)[::1 if number % 2 else -1]:
            began = time.perf_counter()
            events = calls[name]()
            if number:
                rates[name].append(events/(time.perf_counter() - began))
    return {name: np.array(values) for name, values in rates.items()}


def rows_of(stage: str, rates: dict[str, np.ndarray], references: list[str]) -> list[dict]:
    "Lines of the table: median rate, and ratio to each reference as median (smallest to largest)."
    rows = []
    for name, rate in rates.items():
        row = {'stage': stage, 'variant': name, 'events/s': f'{np.median(rate):,.0f}'}
        for number, reference in enumerate(references, 1):
            ratio = rate/rates[reference]
            row[f'x ref {number}'] = f'{np.median(ratio):.2f} ({ratio.min():.2f}-{ratio.max():.2f})'
        rows.append(row)
    return rows


# ---- preprocessing: each variant in a process of its own, for the sake of its memory ----

def large_folder(repeats: int) -> Path:
    "A competition folder with one long batch file: simulated events, repeated under new numbers."
    source = default_dataset()
    out = cache_folder()/f'bench-{source.name}-x{repeats}'
    if (out/'train_meta.parquet').is_file():
        return out
    (out/'train').mkdir(parents=True, exist_ok=True)
    meta = pd.read_parquet(source/'train_meta.parquet')
    files = [(pd.read_parquet(source/'train'/f'batch_{b}.parquet'), m) for b, m in meta.groupby('batch_id')]
    pulses, metas, rows, shift = [], [], 0, 0
    for _ in range(repeats):
        for p, m in files:
            pulses.append(p.set_axis(p.index + shift))
            metas.append(m.assign(batch_id=1, event_id=m.event_id + shift,
                                  first_pulse_index=m.first_pulse_index + rows,
                                  last_pulse_index=m.last_pulse_index + rows))
            rows += len(p)
        shift += int(meta.event_id.max()) + 1
    pd.concat(pulses).rename_axis('event_id').to_parquet(out/'train'/'batch_1.parquet')
    shutil.copy(source/'sensor_geometry.csv', out)
    pd.concat(metas).to_parquet(out/'train_meta.parquet', index=False)
    return out


def memory(name: str) -> int: # kilobytes
    "A line of Linux' account of this process: VmRSS is what it holds, VmHWM the most it held."
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(name))


def preprocess_once(way: str, folder: Path) -> dict[str, float]:
    "Preprocess the long file one way; runs in a process of its own and prints what it took."
    import pyarrow.parquet as pq
    path, out = folder/'train'/'batch_1.parquet', Path(tempfile.mkdtemp())
    geometry = read_geometry(folder/'sensor_geometry.csv')
    sensors = sensor_features(geometry)
    shutil.copy(folder/'sensor_geometry.csv', out)
    jobs = plan_jobs(folder, out, ('train',), None)
    events = len(pd.read_parquet(folder/'train_meta.parquet', columns=['event_id']))
    before = memory('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')                       # the peak starts anew
    began = time.perf_counter()
    if way == 'packed':
        pack_batch(jobs[0])
    elif way == 'padded':
        kept = padded.preprocess(path, sensors)
    else:
        for piece in pq.ParquetFile(path).iter_batches(1 << 17, use_threads=False):
            del piece
    seconds = time.perf_counter() - began
    peak = memory('VmHWM') - before
    if way == 'padded':
        assert len(kept[1]) == events + 1
    shutil.rmtree(out)
    return {'rate': events/seconds, 'kilobytes': peak, 'events': events}


def preprocessing(folder: Path, rounds: int, size: int) -> list[dict]:
    "Parquet file to what training reads: packed file on disk, or the reference's arrays in memory."
    names = {'padded': 'reference: pandas', 'packed': 'packed file, checked, written',
             'read': 'only reading the columns'}
    found = {way: [] for way in names}
    for _ in range(rounds):
        for way in names:
            done = subprocess.run([sys.executable, __file__, '--preprocess', way, str(folder)],
                                  capture_output=True, text=True, check=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    rates = {names[way]: np.array([f['rate'] for f in values]) for way, values in found.items()}
    rows = rows_of('preprocessing', rates, [names['padded']])
    for row, values in zip(rows, found.values()):
        row['peak MB'] = f"{np.median([f['kilobytes'] for f in values])/1024:,.0f}"
    return rows


# ---- the network ----

def strata(lengths: np.ndarray, size: int) -> list[np.ndarray]:
    "Six batches of the file in the order of length, in the middle of each sixth."
    order = np.argsort(lengths, kind='stable')
    return [order[at:at + size] for at in (len(order)*(np.arange(6) + 0.5)/6).astype(int) - size//2]


class Events(NamedTuple):
    "A packed file of simulated events."
    prepared: Prepared
    packed: PackedBatch
    sensors: np.ndarray     # (S, 6)
    lengths: np.ndarray     # (B,) after the cut

    def batch(self, events: np.ndarray) -> EventBatch:
        "A batch of the published features, gathered from the file."
        return make_batch(self.packed, events, self.sensors, 'published', small().data.max_pulses,
                          np.random.default_rng(0))


def open_events(folder: Path) -> Events:
    "Pack a folder, if that is not done yet, and open its file."
    prepared = prepare(folder, workers=1)
    packed = load_packed(next(iter(prepared.train.values())))
    sensors = sensor_features(read_geometry(prepared.geometry_path))
    return Events(prepared, packed, sensors, np.minimum(packed.lengths, small().data.max_pulses))


def gathering(folder: Path, rounds: int, size: int) -> list[dict]:
    "Minibatches out of the packed file, shuffled and grouped by length."
    events = open_events(folder)
    part = np.random.default_rng(0).permutation(len(events.lengths))[:20*size]

    def call(grouped):
        cuts = [part[cut] for cut in padded.batches(events.lengths[part], size, grouped)]
        return lambda: sum(len(events.batch(chosen).event) for chosen in cuts)

    calls = {f'{size} events, grouped by length': call(True), f'{size} events, shuffled': call(False)}
    return rows_of('minibatches', in_turns(calls, rounds), [])


def usual_memory() -> None:
    "glibc's allocator as it is by itself once it has seen large pieces: worker threads may have changed it."
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(TRIM_THRESHOLD, 2**26)
    mallopt(MMAP_THRESHOLD, 2**25)


def check_same_answers(model: Model, events: Events) -> None:
    "The padded and the packed way give the same numbers, or nothing is measured."
    batch = events.batch(np.arange(64))
    with torch.no_grad():
        ours = model(batch.features, batch.offsets, batch.lengths)
        theirs = padded.Padded(model)(*padded.pad(batch))
    for name, expected in theirs.items():
        assert torch.allclose(ours[name], expected, atol=1e-4), (ours[name] - expected).abs().max()


REFERENCES = ['reference 1: padded, grouped by length', 'reference 2: padded, shuffled']


def training(folder: Path, rounds: int, size: int) -> list[dict]:
    "One step of the optimiser a batch; six batches that stand for all lengths."
    events = open_events(folder)
    grouped = strata(events.lengths, size)
    shuffled = np.random.default_rng(0).permutation(len(events.lengths))[:size]
    bins = events.prepared.angle_bins.to_dict()
    plain, exact = (new_state(override(small(), PLAIN | {'model.activation': name}), bins, 'cpu')
                    for name in ('gelu_tanh', 'gelu'))
    check_same_answers(plain.model, events)
    calls = {REFERENCES[0]: padded_training(plain, events, grouped),
             REFERENCES[1]: padded_training(plain, events, [shuffled]),
             f'packed, a core takes {plain.config.train.microbatch_pulses:,} pulses':
                 packed_training(plain, events, grouped),
             'the same, exact GELU': packed_training(exact, events, grouped)}
    return rows_of('training small', in_turns(calls, rounds), REFERENCES)


def padded_training(state: State, events: Events, groups: list[np.ndarray]) -> Callable[[], int]:
    "A call that takes a step for each group of events, in the plain way."
    network = padded.Padded(state.model)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-5)

    def call():
        usual_memory()
        for chosen in groups:
            batch = events.batch(chosen)
            optimiser.zero_grad()
            out = network(*padded.pad(batch))
            loss_of_heads(out, batch.azimuth, batch.zenith, state.bins, state.kernel)[0].backward()
            torch.nn.utils.clip_grad_value_(network.parameters(), 0.5)
            optimiser.step()
        return sum(map(len, groups))
    return call


def packed_training(state: State, events: Events, groups: list[np.ndarray]) -> Callable[[], int]:
    "A call that takes a step for each group of events, as the training loop does."
    def call():
        with cpu_workers_for(state) as workers:
            for chosen in groups:
                train_step(state, [events.batch(chosen)], 1e-5, workers=workers)
        return sum(map(len, groups))
    return call


def inference(folder: Path, rounds: int, size: int) -> list[dict]:
    "From the packed file to angles; six batches that stand for all lengths."
    events = open_events(folder)
    by_length = strata(events.lengths, size)
    some, cores = np.concatenate(by_length), torch.get_num_threads()
    shuffled = np.random.default_rng(0).permutation(len(events.lengths))[:size]
    state = new_state(override(small(), PLAIN), events.prepared.angle_bins.to_dict(), 'cpu')
    model = state.model.eval()
    check_same_answers(model, events)

    def on_padded(batch):
        return padded.Padded(model)(*padded.pad(batch))

    def on_packed(batch):
        return model(batch.features, batch.offsets, batch.lengths)

    def in_bf16(batch):
        with torch.autocast('cpu', torch.bfloat16):
            return on_packed(batch)

    cached, wide = ([some[cut] for cut in batches_by_pulses(events.lengths[some], n*MICROBATCH_PULSES)]
                    for n in (2, 32))
    calls = {REFERENCES[0]: answering(state, events, on_padded, by_length),
             REFERENCES[1]: answering(state, events, on_padded, [shuffled]),
             'packed, torch fp32': answering(state, events, on_packed, cached, cores)}
    if BF16:
        calls['packed, torch bf16'] = answering(state, events, in_bf16, cached, cores)
    with tempfile.TemporaryDirectory() as exported:
        for name, engine in engines(model, Path(exported)).items():
            calls[f'packed, {name}'] = answering(state, events, engine, wide)
        return rows_of('inference small', in_turns(calls, rounds), REFERENCES)


def answering(state: State, events: Events, network: Callable[[EventBatch], dict], groups: list[np.ndarray],
              workers: int = 0) -> Callable[[], int]:
    "A call that answers all events of the groups, if asked by several threads."
    @torch.no_grad()
    def answer(chosen):
        output = network(events.batch(chosen))
        decode_heads({name: value.float() for name, value in output.items()}, state.bins)
        return len(chosen)

    def call():
        usual_memory()
        with CpuWorkerPool(workers) if workers else nullcontext() as pool:
            return sum(pool.map(answer, groups) if pool else map(answer, groups))
    return call


def engines(model: Model, folder: Path) -> dict[str, Callable[[EventBatch], dict]]:
    "The exported network in each engine that is installed."
    from icecube_nb.network.engines import available_engines, export_onnx, load_engine
    there = [name for name, why in available_engines().items() if not why and name != 'torch']
    if not there:
        return {}
    try:
        path = export_onnx(model, folder/'small.onnx')
    except ImportError as error:
        print(error)
        return {}
    found = {}
    for name, precision in (('onnxruntime', 'fp32'), ('openvino', 'fp32'), ('openvino', 'bf16')):
        if name in there and (precision != 'bf16' or BF16):
            try:
                engine = load_engine(name, path, precision=precision)
            except ValueError as error:
                print(error)
                continue
            found[f'{name} {precision}'] = lambda batch, engine=engine: engine(batch.features, batch.offsets)
    return found


STAGES = {'preprocessing': preprocessing, 'minibatches': gathering, 'training': training,
          'inference': inference}


def read_arguments() -> argparse.Namespace:
    "The command line."
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add('--stages', nargs='+', default=list(STAGES), choices=list(STAGES))
    add('--rounds', type=int, default=3)
    add('--batch', type=int, default=384, help='events of a batch (384 as published)')
    add('--repeats', type=int, default=8, help='of the 15,000 simulated events, in one batch file')
    add('--preprocess', nargs=2, metavar=('WAY', 'FOLDER'), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    "Measure the stages, print a table, and keep the numbers of a full run."
    a = read_arguments()
    if a.preprocess:
        print(json.dumps(preprocess_once(a.preprocess[0], Path(a.preprocess[1]))))
        return
    folder, rows = large_folder(a.repeats), []
    for stage in a.stages:
        print(f'{stage} ...', file=sys.stderr, flush=True)
        rows += STAGES[stage](folder, a.rounds, a.batch)
    about = {'cores': os.cpu_count(), 'threads': torch.get_num_threads(), 'torch': torch.__version__,
             'instructions': torch.backends.cpu.get_cpu_capability(), 'rounds': a.rounds,
             'batch': a.batch, 'load': round(os.getloadavg()[1], 1)}
    print(pd.DataFrame(rows).fillna('').to_string(index=False))
    print(', '.join(f'{name} {value}' for name, value in about.items()),
          '; x ref: median over rounds (smallest-largest)', sep='')
    if a.stages == list(STAGES) and a.repeats == 8:
        RESULTS.write_text(json.dumps({'about': about, 'rows': rows}, indent=1) + '\n')


if __name__ == '__main__':
    main()
