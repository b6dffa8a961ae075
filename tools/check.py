"""`make test`: the checks of the repository, and `nbdev_test` over the notebooks. `--help` says more.

The notebooks are run by `nbdev_test` itself, so a bare `nbdev_test` and `make test` cannot differ. This file
only starts it, shows what it writes, and counts what passed. It starts it for a few notebooks at a time,
because a process that runs notebooks one after the other keeps what each of them has loaded: with all of them
in two processes the memory in use grew to ten gigabytes, and a machine that has less ends such a process.
"""
import argparse
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import repo_checks

ROOT = Path(__file__).resolve().parents[1]
STARTED = re.compile(r'Starting (.+?\.ipynb)')              # what nbdev_test prints with --do_print; lines of
COMPLETED = re.compile(r'- Completed (.+?\.ipynb)')         # two workers may run together
FAILED_HEADING = 'nbdev Tests Failed On The Following Notebooks:'
GROUP_SIZE = 8                                              # notebooks that one process runs


@dataclass
class Result:
    "What became of one check or notebook."
    name: str
    seconds: float
    faults: list[str]
    skipped: bool = False

    @property
    def status(self) -> str:
        "One word: ok, FAIL or skip."
        if self.skipped:
            return 'skip'
        return 'FAIL' if self.faults else 'ok'

    def __str__(self) -> str:
        "One line, and the faults below it."
        lines = [f'{self.status:4}  {self.name:<20}  {self.seconds:5.1f} s']
        lines += ['      ' + line for fault in self.faults for line in fault.splitlines()]
        return '\n'.join(lines)


# ---- the checks of the repository ----

def run_check(name: str, check: Callable[[Path], list[str]], root: Path) -> Result:
    "Run one check of the repository and time it. A check that breaks is a fault like any other."
    start = time.monotonic()
    try:
        faults = check(root)
    except Exception as error:
        faults = [f'the check itself broke: {type(error).__name__}: {error}']
    return Result(name, time.monotonic() - start, faults)


def run_checks(checks: dict[str, Callable[[Path], list[str]]], root: Path, workers: int) -> list[Result]:
    "Run the checks, `workers` at a time, and print each result as it comes."
    results = []
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(run_check, name, check, root) for name, check in checks.items()]
        for job in as_completed(jobs):
            results.append(job.result())
            print(results[-1], flush=True)
    return results


# ---- the notebooks ----

@dataclass
class NotebookLog:
    "What `nbdev_test` has written so far: when each notebook started and ended, and which ones failed."
    started: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    in_failed_list: bool = False

    def read(self, line: str) -> None:
        "Take note of one line."
        now = time.monotonic()
        self.started |= {Path(path).stem: now for path in STARTED.findall(line)}
        self.ended |= {Path(path).stem: now for path in COMPLETED.findall(line)}
        if line == FAILED_HEADING:
            self.in_failed_list = True
        elif self.in_failed_list and line.endswith('.ipynb'):
            self.failed.add(Path(line.strip()).stem)

    def seconds(self, name: str) -> float:
        "How long the notebook ran; up to now if it has not ended."
        if name not in self.started:
            return 0.0
        return self.ended.get(name, time.monotonic()) - self.started[name]

    def result(self, name: str, complete: bool) -> Result:
        """What became of the notebook.

        `complete` says that `nbdev_test` came to its end; a notebook that did not start was then skipped.
        """
        faults = []
        if name in self.failed:
            faults = ['a cell failed; nbdev_test shows the error above']
        elif name in self.started and name not in self.ended:
            faults = ['it started and did not end']
        elif name not in self.started and not complete:
            faults = ['it did not start']
        return Result(name, self.seconds(name), faults, skipped=name not in self.started and not faults)


def nbdev_command(names: list[str], flags: Iterable[str]) -> list[str]:
    "The `nbdev_test` command that runs these notebooks one after the other in one process."
    pattern = rf'^({"|".join(re.escape(name) for name in names)})\.ipynb$'
    program = Path(sys.executable).with_name('nbdev_test')
    return [str(program), '--n_workers', '0', '--do_print', '--flags', ' '.join(flags), '--file_re', pattern]


def end_group(process: subprocess.Popen) -> None:
    "End a process together with all that it started."
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def lines_of(command: list[str], root: Path, timeout_s: float) -> Iterator[str|int]:
    "What the command writes, line by line, and its exit status last. It is ended after `timeout_s` seconds."
    env = os.environ | {'PYTHONUNBUFFERED': '1',            # lines come when they are written
                        'PYTHONFAULTHANDLER': '1'}          # a crash shows where it was
    process = subprocess.Popen(command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, errors='replace', start_new_session=True)
    alarm = threading.Timer(timeout_s, end_group, [process])
    alarm.daemon = True
    alarm.start()
    try:
        yield from (line.rstrip('\n') for line in process.stdout)
        yield process.wait()
    finally:
        alarm.cancel()
        end_group(process)


@dataclass
class NotebookRunner:
    "Runs notebooks by `nbdev_test`. What it writes is handed to `show`, line by line."
    root: Path
    flags: Iterable[str] = ()
    timeout_s: float = 1800                       # for everything
    show: Callable[[str], None] = partial(print, flush=True)
    start: float = field(default_factory=time.monotonic)

    def run_group(self, names: list[str]) -> tuple[NotebookLog, int]:
        "Run these notebooks in one process: its log, and its exit status, which is below 0 after a signal."
        log, status = NotebookLog(), 0
        for line in lines_of(nbdev_command(names, self.flags), self.root, self.seconds_left()):
            if isinstance(line, int):
                status = line
            else:
                log.read(line)
                self.show(line)
        return log, status

    def seconds_left(self) -> float:
        "Until the time for everything is over."
        return max(0.1, self.start + self.timeout_s - time.monotonic())

    def results(self, names: list[str], once_more: bool = True) -> list[Result]:
        """What became of each of these notebooks.

        Where the process ends early, the notebooks behind the one that it was running get a new process. If
        it was killed (signal 9), as the system does when memory runs out, that notebook gets one more try,
        alone.
        """
        log, status = self.run_group(names)
        complete = status == 0 or bool(log.failed)
        if complete or self.seconds_left() < 1:
            return [log.result(name, complete) for name in names]
        unfinished = [name for name in names if name in log.started and name not in log.ended]
        waiting = [name for name in names if name not in log.started]
        found = [log.result(name, complete=False) for name in names if name in log.ended]
        for name in unfinished:
            reason = f'its process ended with status {status}'
            if status == -signal.SIGKILL and once_more:
                self.show(f'{name}: {reason}; it runs once more, alone')
                found += self.results([name], once_more=False)
            else:
                found.append(Result(name, log.seconds(name), [reason]))
        if not unfinished and log.started:               # it ended between two notebooks, or after the last
            fault = f'it ended with status {status} outside a notebook'
            found.append(Result('nbdev_test', 0.0, [fault]))
        if waiting and not log.started:
            return [Result(name, 0.0, [f'nbdev_test did not start it: status {status}']) for name in names]
        return found + (self.results(waiting, once_more) if waiting else [])


def run_notebooks(names: list[str], root: Path, flags: Iterable[str] = (), workers: int = 2,
                  timeout_s: float = 1800,
                  show: Callable[[str], None] = partial(print, flush=True)) -> list[Result]:
    "Run these notebooks, `workers` processes at a time, each with `GROUP_SIZE` notebooks at most."
    runner = NotebookRunner(root, flags, timeout_s, show)
    size = min(GROUP_SIZE, math.ceil(len(names)/workers))
    groups = [names[first:first + size] for first in range(0, len(names), size)]
    with ThreadPoolExecutor(workers) as pool:
        return [result for results in pool.map(runner.results, groups) for result in results]


# ---- the command ----

def chosen(names: list[str], known: list[str]) -> list[str]:
    "The checks and notebooks that `names` names (by name, file or path); without names all that are known."
    wanted = [Path(name).name.removesuffix('.ipynb') for name in names]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        sys.exit(f'no check or notebook is called {", ".join(unknown)}; there are: {", ".join(known)}')
    return list(dict.fromkeys(wanted or known))


def summary(results: list[Result]) -> str:
    "The last line: how many passed, failed and (if any) were skipped."
    counts = {status: sum(r.status == status for r in results) for status in ('ok', 'FAIL', 'skip')}
    skipped = f', {counts["skip"]} skipped' if counts['skip'] else ''
    return f'{counts["ok"]} passed, {counts["FAIL"]} failed{skipped}'


def arguments() -> argparse.Namespace:
    "The command line."
    parser = argparse.ArgumentParser(description='Check the repository and run all notebooks as tests.')
    add = parser.add_argument
    add('names', nargs='*', help='run only these checks and notebooks, e.g. layers 01_preprocess')
    add('--flags', nargs='*', default=[], help='run cells with these test flags too, e.g. --flags slow')
    add('--workers', type=int, default=2, help='how many run at a time (default: 2)')
    add('--timeout', type=int, default=1800, help='seconds that all notebooks may take (default: 1800)')
    add('--self-test', action='store_true', help='only see that each check can fail')
    add('--root', type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.root = args.root.resolve()
    return args


def main() -> int:
    "Run what was asked for, print a line for each and the count. The exit status is 1 if anything failed."
    import self_test
    args = arguments()
    checks = repo_checks.CHECKS | {'self-test': self_test.run}
    notebooks = [path.stem for path in repo_checks.notebooks(args.root)]
    names = chosen(args.names + ['self-test'] * args.self_test, [*checks, *notebooks])
    to_run = [name for name in notebooks if name in names]
    results = run_checks({n: check for n, check in checks.items() if n in names}, args.root, args.workers)
    if to_run:
        found = run_notebooks(to_run, args.root, args.flags, args.workers, args.timeout)
        print(*found, sep='\n', flush=True)
        results += found
    print(summary(results), flush=True)
    return int(any(result.faults for result in results))


if __name__ == '__main__':
    sys.exit(main())
