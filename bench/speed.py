"""How fast is each stage, beside a plain padded reference on the same machine in the same minutes?

    make bench                                    one table, some minutes on two cores
    python bench/speed.py --stages training       one stage; --rounds N for smaller errors

All variants of a stage take turns, round after round, on the same events. A ratio is the median over the
rounds, with the smallest and largest beside it, so that other work on the machine hits all variants alike.
Speed does not depend on the weights: they are fresh. The events are simulated, cut at 256 pulses. With
OMP_NUM_THREADS=1 all rates are those of one core, which is what a busy machine can measure.
"""
import argparse
import ctypes
import importlib.util
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

import numpy as np
import pandas as pd
import torch

import padded

from icecube_nb.data.batching import batches_by_pulses, make_batch
from icecube_nb.core.config import cache_folder, override, small
from icecube_nb.core.cpu_workers import MMAP_THRESHOLD, TRIM_THRESHOLD, CpuWorkerPool
from icecube_nb.physics.detector import read_geometry, sensor_features
from icecube_nb.network.heads import loss_of_heads
from icecube_nb.network.losses import decode_bins
from icecube_nb.network.model import Model
from icecube_nb.data.packed import load_packed
from icecube_nb.data.prepare import pack_batch, plan_jobs, prepare
from icecube_nb.physics.simulate import default_dataset
from icecube_nb.training.state import new_state
from icecube_nb.training.step import cpu_workers_for, train_step

RESULTS = Path(__file__).parent/'results'/'speed.json'
REPEATS = 8           # of the simulated events in the file that is preprocessed
PULSES = 2048         # of a micro-batch that stays in the cache of a core
PLAIN = {'model.outputs': 'classes'}
BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()   # does the processor compute in it?


def in_turns(calls: dict[str, Callable[[], int]], rounds: int) -> dict[str, np.ndarray]:
    "Events/s of each call (they return how many), in turns; a first round is not counted."
    rates = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in list(calls)[::1 if number % 2 else -1]:
            began = time.perf_counter()
            events = calls[name]()
            if number: rates[name].append(events/(time.perf_counter() - began))
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

def large_folder() -> Path:
    "A competition folder with one long batch file: simulated events, repeated under new numbers."
    source = default_dataset()
    out = cache_folder()/f'bench-{source.name}-x{REPEATS}'
    if (out/'train_meta.parquet').is_file(): return out
    (out/'train').mkdir(parents=True, exist_ok=True)
    meta = pd.read_parquet(source/'train_meta.parquet')
    files = [(pd.read_parquet(source/'train'/f'batch_{b}.parquet'), m) for b, m in meta.groupby('batch_id')]
    pulses, metas, rows, shift = [], [], 0, 0
    for _ in range(REPEATS):
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


def preprocess_once(kind: str, folder: Path) -> dict[str, float]:
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
    if kind == 'packed': pack_batch(jobs[0])
    elif kind == 'padded': kept = padded.preprocess(path, sensors)
    else:
        for piece in pq.ParquetFile(path).iter_batches(1 << 17, use_threads=False): del piece
    seconds = time.perf_counter() - began
    peak = memory('VmHWM') - before
    if kind == 'padded': assert len(kept[1]) == events + 1
    shutil.rmtree(out)
    return {'rate': events/seconds, 'kilobytes': peak, 'events': events}


def preprocessing(rounds: int, size: int) -> list[dict]:
    "Parquet file to what training reads: packed file on disk, or the reference's arrays in memory."
    folder, kinds = large_folder(), {'padded': 'reference: pandas', 'packed': 'packed file, checked, written',
                                     'read': 'only reading the columns'}
    found = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            done = subprocess.run([sys.executable, __file__, '--preprocess', kind, str(folder)],
                                  capture_output=True, text=True, check=True)
            found[kind].append(json.loads(done.stdout.splitlines()[-1]))
    rows = rows_of('preprocessing', {kinds[k]: np.array([f['rate'] for f in v]) for k, v in found.items()},
                   [kinds['padded']])
    for row, values in zip(rows, found.values()):
        row['peak MB'] = f"{np.median([f['kilobytes'] for f in values])/1024:,.0f}"
    return rows


# ---- the network ----

def strata(lengths: np.ndarray, size: int) -> list[np.ndarray]:
    "Six batches of the file in the order of length, in the middle of each sixth."
    order = np.argsort(lengths, kind='stable')
    return [order[at:at + size] for at in (len(order)*(np.arange(6) + 0.5)/6).astype(int) - size//2]


def open_events() -> tuple:
    "A packed file of simulated events, its sensors' numbers and the lengths after the cut."
    prepared = prepare(large_folder(), workers=1)
    packed = load_packed(next(iter(prepared.train.values())))
    sensors = sensor_features(read_geometry(prepared.geometry_path))
    return prepared, packed, sensors, np.minimum(packed.lengths, small().data.max_pulses)


def batch_of(packed, events: np.ndarray, sensors: np.ndarray):
    "A batch of the published features, gathered from the file."
    return make_batch(packed, events, sensors, 'published', small().data.max_pulses, np.random.default_rng(0))


def gathering(rounds: int, size: int) -> list[dict]:
    "Minibatches out of the packed file, shuffled and grouped by length."
    _, packed, sensors, lengths = open_events()
    def call(groups): return lambda: sum(len(batch_of(packed, g, sensors).event) for g in groups)
    part = np.random.default_rng(0).permutation(len(lengths))[:20*size]
    cuts = {way: [part[cut] for cut in padded.batches(lengths[part], size, way == 'grouped')]
            for way in ('grouped', 'shuffled')}
    calls = {f'{size} events, {way} by length' if way == 'grouped' else f'{size} events, {way}': call(groups)
             for way, groups in cuts.items()}
    return rows_of('minibatches', in_turns(calls, rounds), [])


def usual_memory() -> None:
    "glibc's allocator as it is by itself once it has seen large pieces: a crew before may have changed it."
    try: mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError): return
    mallopt(TRIM_THRESHOLD, 2**26), mallopt(MMAP_THRESHOLD, 2**25)


def same_answers(model: Model, packed, sensors: np.ndarray) -> None:
    "The padded and the packed way give the same numbers, or nothing is measured."
    batch = batch_of(packed, np.arange(64), sensors)
    with torch.no_grad(): ours, theirs = model(*batch[:2]), padded.Padded(model)(*padded.pad(batch))
    for a, b in zip(ours[:3], theirs[:3]): assert torch.allclose(a, b, atol=1e-4), (a - b).abs().max()


def training(rounds: int, size: int) -> list[dict]:
    "One step of the optimiser a batch; six batches that stand for all lengths."
    prepared, packed, sensors, lengths = open_events()
    grouped = strata(lengths, size)
    shuffled = np.random.default_rng(0).permutation(len(lengths))[:size]
    bins = prepared.angle_bins.to_dict()
    plain, exact = (new_state(override(small(), PLAIN | {'model.activation': a}), bins, 'cpu')
                    for a in ('gelu_tanh', 'gelu'))
    same_answers(plain.model, packed, sensors)

    def reference(groups):
        network = padded.Padded(plain.model)
        optimiser = torch.optim.AdamW(network.parameters(), lr=1e-5)
        def call():
            usual_memory()
            for events in groups:
                batch = batch_of(packed, events, sensors)
                optimiser.zero_grad()
                out = network(*padded.pad(batch))
                loss_of_heads(out, batch.azimuth, batch.zenith, plain.bins, plain.kernel)[0].backward()
                torch.nn.utils.clip_grad_value_(network.parameters(), 0.5)
                optimiser.step()
            return sum(map(len, groups))
        return call

    def ours(state):
        def call():
            with cpu_workers_for(state) as crew:
                for events in grouped:
                    train_step(state, [batch_of(packed, events, sensors)], 1e-5, workers=crew)
            return sum(map(len, grouped))
        return call

    names = ['reference 1: padded, grouped by length', 'reference 2: padded, shuffled']
    calls = {names[0]: reference(grouped), names[1]: reference([shuffled]),
             f'packed, a core takes {plain.config.train.microbatch_pulses:,} pulses': ours(plain),
             'the same, exact GELU': ours(exact)}
    return rows_of('training small', in_turns(calls, rounds), names)


def inference(rounds: int, size: int) -> list[dict]:
    "From the packed file to angles; six batches that stand for all lengths."
    prepared, packed, sensors, lengths = open_events()
    by_length = strata(lengths, size)
    some, cores = np.concatenate(by_length), torch.get_num_threads()
    shuffled = np.random.default_rng(0).permutation(len(lengths))[:size]
    state = new_state(override(small(), PLAIN), prepared.angle_bins.to_dict(), 'cpu')
    model = state.model.eval()
    same_answers(model, packed, sensors)

    def answer(network, groups, fill=False, workers=0):
        @torch.no_grad()
        def work(events):
            batch = batch_of(packed, events, sensors)
            out = network(*padded.pad(batch)) if fill else network(*batch[:2])
            decode_bins(out.azimuth_logits.float(), out.zenith_logits.float(), state.bins)
            return len(events)
        def call():
            usual_memory()
            with CpuWorkerPool(workers) if workers else nullcontext() as crew:
                return sum(crew.map(work, groups) if crew else map(work, groups))
        return call

    def bf16(features, offsets):
        with torch.autocast('cpu', torch.bfloat16): return model(features, offsets)
    names = ['reference 1: padded, grouped by length', 'reference 2: padded, shuffled']
    cached, wide = ([some[cut] for cut in batches_by_pulses(lengths[some], n*PULSES)] for n in (2, 32))
    calls = {names[0]: answer(padded.Padded(model), by_length, True),
             names[1]: answer(padded.Padded(model), [shuffled], True),
             'packed, torch fp32': answer(model, cached, workers=cores)}
    if BF16: calls['packed, torch bf16'] = answer(bf16, cached, workers=cores)
    with tempfile.TemporaryDirectory() as folder:
        for name, engine in engines(model, Path(folder)).items():
            calls[f'packed, {name}'] = answer(engine, wide)
        return rows_of('inference small', in_turns(calls, rounds), names)


def engines(model: Model, folder: Path) -> dict[str, Callable]:
    "The exported network in each engine that is installed."
    if importlib.util.find_spec('icecube_nb.network.engines') is None: return {}
    from icecube_nb.network.engines import available_engines, export_onnx, load_engine
    there = [name for name, why in available_engines().items() if not why and name != 'torch']
    if not there: return {}
    try: path = export_onnx(model, folder/'small.onnx')
    except ImportError as error:
        print(error)
        return {}
    found = {}
    for name, precision in (('onnxruntime', 'fp32'), ('openvino', 'fp32'), ('openvino', 'bf16')):
        if name not in there or precision == 'bf16' and not BF16: continue
        try: found[f'{name} {precision}'] = load_engine(name, path, precision=precision)
        except ValueError as error: print(error)
    return found


STAGES = {'preprocessing': preprocessing, 'minibatches': gathering, 'training': training,
          'inference': inference}


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument('--stages', nargs='+', default=list(STAGES), choices=list(STAGES))
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--batch', type=int, default=384, help='events of a batch (384 as published)')
    parser.add_argument('--preprocess', nargs=2, metavar=('KIND', 'FOLDER'), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.preprocess: return print(json.dumps(preprocess_once(a.preprocess[0], Path(a.preprocess[1]))))
    large_folder()
    rows = []
    for stage in a.stages:
        print(f'{stage} ...', file=sys.stderr, flush=True)
        rows += STAGES[stage](a.rounds, a.batch)
    about = {'cores': os.cpu_count(), 'threads': torch.get_num_threads(), 'torch': torch.__version__,
             'instructions': torch.backends.cpu.get_cpu_capability(), 'rounds': a.rounds,
             'batch': a.batch, 'load': round(os.getloadavg()[1], 1)}
    print(pd.DataFrame(rows).fillna('').to_string(index=False))
    print(', '.join(f'{name} {value}' for name, value in about.items()),
          '; x ref: median over rounds (smallest-largest)', sep='')
    if a.stages != list(STAGES): return
    RESULTS.write_text(json.dumps({'about': about, 'rows': rows}, indent=1) + '\n')


if __name__ == '__main__': main()
