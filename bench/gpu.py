"""What does a GPU make of this project? One command, under 8 minutes on an H100, with nothing to install.

    python bench/gpu.py                          writes bench/results/gpu.json; the README's table is made from it
    python bench/gpu.py --device cpu --small     the dry run, part of `make test`: seconds, proves the code only

It needs torch, numpy, pandas, pyarrow and safetensors, and simulates its own events. Each section is measured by
itself: one that fails is noted with its error and the others go on. Sections that do not fit into the time are named.
"""
import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from itertools import islice
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import padded
from icecube_nb import gpu
from icecube_nb.core.config import Config, override, preset
from icecube_nb.data.batching import prefetch
from icecube_nb.network.heads import loss_of_heads
from icecube_nb.training.precision import guarded_step, in_precision
from icecube_nb.training.state import new_state, resume_state, save_state
from icecube_nb.training.step import read_back, read_counts, train_step

RESULTS = Path(__file__).resolve().parent/'results'/'gpu.json'


class Bench:
    "The box, the data, and how much time is left."
    def __init__(self, arguments: argparse.Namespace, folder: Path):
        self.device = torch.device(arguments.device)
        self.cuda = self.device.type == 'cuda'
        self.small = arguments.small
        self.began, self.limit = time.monotonic(), arguments.seconds
        files, events = (1, 120) if self.small else (4, 15_000)
        self.prepared = gpu.simulated_events(folder, files, events, min(4, os.cpu_count()))
        self.bins = self.prepared.angle_bins.to_dict()
        self.measure_seconds = 0.05 if self.small else 3.0
        self.backends = ['sdpa', *(['varlen', 'flash', 'efficient'] if self.cuda else [])]

    def left(self) -> float:
        "Seconds until the end of the time."
        return self.limit - (time.monotonic() - self.began)

    def config(self, name: str, **settings: object) -> Config:
        "A preset with changes, such as train__max_lr=1e-3; smaller in the dry run."
        small = {'train.batch_events': 4, 'train.accumulate': 2, 'model.layers': 1, 'model.width': 64,
                 'model.heads': 2, 'model.neck': 64, 'data.max_pulses': 32}
        changes = {key.replace('__', '.'): value for key, value in settings.items()}
        return override(preset(name), changes | (small if self.small else {}))

    def source(self, config: Config) -> object:
        "The training events for a config."
        return gpu.open_events(self.prepared, config, self.device)


def facts(bench: Bench) -> Iterator[dict]:
    "Names and versions, and the best rates this box reaches."
    row = gpu.machine_facts(bench.device)
    size = 256 if bench.small else 8192
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if bench.cuda else (torch.bfloat16, torch.float32):
        a = torch.randn(size, size, device=bench.device, dtype=dtype)
        seconds = gpu.seconds_per_call(lambda a=a: a @ a, bench.device, bench.measure_seconds/3)
        row[f'tflops_{str(dtype).removeprefix("torch.")}'] = 2*size**3/seconds/1e12
    a = torch.empty(1 << (18 if bench.small else 28), device=bench.device)
    row['copy_gb_per_second'] = 2*a.nbytes/gpu.seconds_per_call(a.clone, bench.device, bench.measure_seconds/3)/1e9
    yield row


def agreement(bench: Bench) -> Iterator[dict]:
    "Loss and gradient of each backend and precision, against the formula in fp32 on the CPU."
    cases = [('deep', 8, {})] if bench.small else [('tiny', 16, {}), ('small', 16, {}), ('deep', 16, {}),
                                                   ('deep', 16, {'model__rotary': False}), ('full', 2, {})]
    precisions = ('fp32', 'fp16', 'bf16') if bench.cuda else ('fp32', 'bf16')
    for name, events, changes in cases:
        for row in gpu.agreement(bench.prepared, bench.config(name, **changes), bench.device, precisions, events):
            yield row | changes


def synchronisations(bench: Bench) -> Iterator[dict]:
    "Where the host waits for the GPU within a training step."
    if not bench.cuda:
        return
    for name in ('small', 'deep'):
        config = bench.config(name)
        state = new_state(config, bench.bins, str(bench.device))
        steps = gpu.endless_steps(bench.source(config), state)
        for _ in range(3):
            train_step(state, next(steps), 1e-5)
        step = next(steps)
        gpu.wait_for_device(bench.device)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            torch.cuda.set_sync_debug_mode('warn')
            try:
                train_step(state, step, 1e-5)
                in_step = len(seen)
                next(steps)
            finally:
                torch.cuda.set_sync_debug_mode('default')
        places = sorted({f'{Path(w.filename).name}:{w.lineno}' for w in seen})
        yield {'preset': name, 'in_step': in_step, 'in_loader': len(seen) - in_step, 'places': places}


def training(bench: Bench) -> Iterator[dict]:
    "Training speed of the presets, by backend, compiled and not."
    cases = [('small', {}), ('deep', {}), ('deep', {'train__batch_events': 384}), ('medium', {}), ('large', {}),
             ('full', {})]
    for name, changes in cases:
        for backend in bench.backends:
            for precision in ('fp16', 'bf16') if bench.cuda else ('fp32',):
                if bench.left() < 90:
                    yield {'preset': name, 'backend': backend, 'skipped': 'no time left'}
                    continue
                if precision == 'bf16' and backend != 'varlen':
                    continue
                config = bench.config(name, train__precision=precision, train__attention=backend, **changes)
                yield measured(bench, config, backend)


def measured(bench: Bench, config: Config, backend: str) -> dict:
    "One row of `training`; a backend that does not run there gives its reason."
    row = {'batch': config.train.batch_events*config.train.accumulate, 'backend': backend,
           'precision': config.train.precision}
    try:
        return row | gpu.training_speed(bench.prepared, config, bench.device, bench.measure_seconds)
    except (ValueError, RuntimeError) as error:
        return row | {'preset': config.name, 'fault': str(error).splitlines()[0][:200]}


def compiled(bench: Bench) -> Iterator[dict]:
    "The same with torch.compile; the time of the first steps holds the compilation."
    if not bench.cuda:
        return
    for name, changes in (('small', {}), ('deep', {'train__batch_events': 384}), ('medium', {}), ('large', {}),
                          ('full', {})):
        if bench.left() < 120:
            yield {'preset': name, 'skipped': 'no time left'}
            continue
        began = time.monotonic()
        row = measured(bench, bench.config(name, train__compile=True, train__precision='bf16', **changes), 'auto')
        yield row | {'seconds_in_all': time.monotonic() - began}


def kernels(bench: Bench) -> Iterator[dict]:
    "How many kernels a step launches, and what share of its time the GPU computes."
    if not bench.cuda:
        return
    for name in ('small', 'deep', 'full'):
        config = bench.config(name)
        state = new_state(config, bench.bins, str(bench.device))
        steps = gpu.endless_steps(bench.source(config), state)
        seconds = gpu.seconds_per_call(lambda: train_step(state, next(steps), 1e-5), bench.device, 1.0)
        step = next(steps)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            train_step(state, step, 1e-5)
            gpu.wait_for_device(bench.device)
        found = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        yield {'preset': name, 'kernels': len(found), 'passes': len(step.microbatches),
               'busy': sum(e.device_time for e in found)*1e-6/seconds}


def inference(bench: Bench) -> Iterator[dict]:
    "Forward passes alone, on batches that lie on the GPU."
    for name in ('small', 'deep', 'medium', 'large', 'full'):
        if bench.left() < 45:
            yield {'preset': name, 'skipped': 'no time left'}
            continue
        config = bench.config(name, train__batch_events=8 if bench.small else 384, train__accumulate=1)
        state = new_state(config, bench.bins, str(bench.device))
        batches = list(islice(bench.source(config).epoch(0), 16))
        turn = iter(range(1 << 30))
        state.model.eval()

        def work():
            batch = batches[next(turn) % len(batches)]
            with torch.no_grad(), in_precision(bench.device, state.precision):
                state.model(batch.features, batch.offsets, batch.lengths)

        seconds = gpu.seconds_per_call(work, bench.device, bench.measure_seconds)
        yield {'preset': name, 'events_per_second': np.mean([len(b.lengths) for b in batches])/seconds}


def padded_reference(bench: Bench) -> Iterator[dict]:
    "The plain way: every event filled up to the longest of its batch, with a mask."
    config = bench.config('small', model__outputs='classes', train__batch_events=8 if bench.small else 384)
    state = new_state(config, bench.bins, str(bench.device))
    batches = [(*padded.pad(batch), batch) for batch in islice(bench.source(config).epoch(0), 12)]
    network, turn = padded.Padded(state.model), iter(range(1 << 30))

    def work():
        x, mask, batch = batches[next(turn) % len(batches)]
        state.optimiser.zero_grad()
        with in_precision(bench.device, state.precision):
            output = network(x, mask)
        loss, _ = loss_of_heads(output, batch.azimuth, batch.zenith, state.bins, state.kernel)
        state.scaler.scale(loss).backward()
        guarded_step(state.optimiser, state.scaler, 0.5, 0)

    seconds = gpu.seconds_per_call(work, bench.device, bench.measure_seconds)
    events = np.mean([len(batch.lengths) for _, _, batch in batches])
    yield {'preset': 'small', 'events_per_second': events/seconds}


def loader(bench: Bench) -> Iterator[dict]:
    "Batches with features on the GPU, without training."
    for name in ('small', 'deep'):
        config = bench.config(name)
        batches = prefetch(batch for epoch in range(1000) for batch in bench.source(config).epoch(epoch))
        events = []
        seconds = gpu.seconds_per_call(lambda b=batches: events.append(len(next(b).lengths)), bench.device,
                                       bench.measure_seconds)
        batches.close()
        yield {'preset': name, 'events_per_second': np.mean(events)/seconds}


def stability(bench: Bench) -> Iterator[dict]:
    "The same steps in each precision: where the loss ends, and how many steps were left out."
    number = 4 if bench.small else 400
    for name in ('tiny', 'deep'):
        for precision in ('fp32', 'bf16', 'fp16') if bench.cuda else ('fp32', 'bf16'):
            if bench.left() < 30:
                yield {'preset': name, 'precision': precision, 'skipped': 'no time left'}
                continue
            config = bench.config(name, train__precision=precision)
            state = new_state(config, bench.bins, str(bench.device))
            steps = gpu.endless_steps(bench.source(config), state)
            rows = [train_step(state, next(steps), config.train.max_lr*min(1, k/60)) for k in range(number)]
            losses = [row['loss'] for row in read_back(rows, state.processes, bench.device)]
            read_counts(state)
            yield {'preset': name, 'precision': precision, 'first': np.mean(losses[:20]),
                   'last': np.mean(losses[-50:]), 'left_out': state.skipped,
                   'largest_jump': float(np.max(np.diff(losses)))}


def resume(bench: Bench) -> Iterator[dict]:
    "Is a run that was stopped half way the same as one that was not, and as itself once more?"
    number, config, found = 4 if bench.small else 40, bench.config('deep'), {}
    for how in ('whole', 'again', 'resumed'):
        state = new_state(config, bench.bins, str(bench.device))
        with tempfile.TemporaryDirectory() as run:
            for k, step in enumerate(islice(gpu.endless_steps(bench.source(config), state), number)):
                if how == 'resumed' and k == number//2:
                    read_counts(state)
                    save_state(state, Path(run))
                    state = resume_state(Path(run), config, str(bench.device))
                train_step(state, step, 5e-4)
        found[how] = torch.cat([p.detach().flatten().float().cpu() for p in state.model.parameters()])
    yield {f'{how}_differs_by': float((found[how] - found['whole']).abs().max()) for how in ('again', 'resumed')}


SECTIONS = (facts, agreement, synchronisations, training, compiled, kernels, inference, padded_reference, loader,
            stability, resume)


def run_section(bench: Bench, section: Callable[[Bench], Iterator[dict]]) -> list[dict]:
    "The rows of a section; an error ends it and is one of its rows."
    rows = []
    try:
        for row in section(bench):
            rows.append(row)
            print(f'{section.__name__}: {json.dumps(row, default=float)}', flush=True)
    except Exception as error:
        rows.append({'failed': f'{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ""}'})
        print(f'{section.__name__}: {rows[-1]}', flush=True)
        if bench.small:
            raise
    if bench.cuda:
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    "Measure everything that fits into the time, and write it down after each section."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', default='cuda', help='cuda, cuda:1, cpu')
    parser.add_argument('--small', action='store_true', help='a dry run of seconds')
    parser.add_argument('--seconds', type=float, default=440, help='time to spend (default: 440)')
    parser.add_argument('--sections', nargs='*', default=[s.__name__ for s in SECTIONS], help='only these')
    parser.add_argument('--out', type=Path, help='file to write (default: bench/results/gpu.json, or none if small)')
    arguments = parser.parse_args()
    out = arguments.out or (None if arguments.small else RESULTS)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder)/'events')
        found = {'date': date.today().isoformat(), 'seconds': 0.0}
        for section in SECTIONS:
            if section.__name__ not in arguments.sections:
                continue
            found[section.__name__] = run_section(bench, section)
            found['seconds'] = round(time.monotonic() - bench.began, 1)
            if out:
                out.write_text(json.dumps(found, indent=1, default=float) + '\n')
    print(f'done in {found["seconds"]:.0f} s' + (f', in {out}' if out else ''))


if __name__ == '__main__':
    main()
