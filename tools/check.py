"""`make test`: the checks of the repository, and every notebook's cells as tests. `--help` says more."""
import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import repo_checks

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = 77                # exit status of a notebook whose front matter says skip_exec
MAX_ERROR_LINES = 25        # how much of a traceback is shown, from its end


@dataclass
class Result:
    "What became of one check or notebook"
    name: str
    seconds: float
    faults: list[str]
    skipped: bool = False

    @property
    def status(self) -> str:
        "One word: ok, FAIL or skip"
        return 'skip' if self.skipped else 'FAIL' if self.faults else 'ok'

    def __str__(self) -> str:
        "One line, and the faults below it"
        lines = [f'{self.status:4}  {self.name:<16}  {self.seconds:5.1f} s']
        return '\n'.join(lines + ['      ' + line for fault in self.faults for line in fault.splitlines()])


def run_check(name: str, check: Callable[[Path], list[str]], root: Path) -> Result:
    "One check of the repository, timed; a check that breaks is a fault like any other"
    start = time.monotonic()
    try: faults = check(root)
    except Exception as error: faults = [f'the check itself broke: {type(error).__name__}: {error}']
    return Result(name, time.monotonic() - start, faults)


def run_notebook(path: Path, root: Path, flags: Iterable[str] = (), timeout_s: int = 900) -> Result:
    "One notebook's cells in a process of its own, with one thread for the numerics"
    env = os.environ | {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1'}
    command = [sys.executable, __file__, '--worker', str(path), '--root', str(root), '--flags', *flags]
    start = time.monotonic()
    try: done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return Result(path.stem, timeout_s, [f'not done after {timeout_s} s; mend: less work, or --timeout'])
    faults = [] if done.returncode in (0, SKIPPED) else [error_end(done.stdout + done.stderr)]
    if done.returncode < 0: faults.append(f'the process was ended by signal {-done.returncode}')
    return Result(path.stem, time.monotonic() - start, faults, done.returncode == SKIPPED)


def error_end(text: str) -> str:
    "The end of what a failed notebook wrote, without colours"
    lines = re.sub(r'\x1b\[[0-9;]*m', '', text).strip().splitlines()
    return '\n'.join(lines[-MAX_ERROR_LINES:]) or 'no message'


def worker(path: Path, root: Path, flags: list[str]) -> int:
    "Run one notebook through nbdev in this process, and return the exit status"
    os.chdir(root)                                                      # nbdev looks for settings.ini here
    from nbdev.test import test_nb
    passed, seconds = test_nb(path, skip_flags=repo_checks.test_flags(root), force_flags=flags, basepath=root)
    return SKIPPED if passed and not seconds else int(not passed)       # nbdev's mark of skip_exec: no time


def all_jobs(args: argparse.Namespace) -> dict[str, Callable[[], Result]]:
    "Everything that can be run, name -> a call that runs it"
    import self_test
    checks = repo_checks.CHECKS | {'self-test': self_test.run}
    jobs = {name: lambda n=name, c=check: run_check(n, c, args.root) for name, check in checks.items()}
    for path in repo_checks.notebooks(args.root):
        jobs[path.stem] = lambda p=path: run_notebook(p, args.root, args.flags, args.timeout)
    return jobs


def chosen(names: list[str], jobs: dict) -> dict:
    "The jobs that `names` name (a check, or a notebook as name, file or path); all without names"
    wanted = [Path(name).name.removesuffix('.ipynb') for name in names]
    unknown = [name for name in wanted if name not in jobs]
    if unknown: sys.exit(f'no check or notebook is called {", ".join(unknown)}; there are: {", ".join(jobs)}')
    return {name: jobs[name] for name in wanted or jobs}


def run_all(jobs: dict[str, Callable[[], Result]], workers: int) -> list[Result]:
    "Run the jobs, `workers` at a time, and print each result as it comes"
    results = []
    with ThreadPoolExecutor(workers) as pool:
        for future in as_completed([pool.submit(job) for job in jobs.values()]):
            results.append(future.result())
            print(results[-1], flush=True)
    return results


def summary(results: list[Result]) -> str:
    "The last line: how many passed, failed and (if any) were skipped"
    counts = {status: sum(r.status == status for r in results) for status in ('ok', 'FAIL', 'skip')}
    skipped = f', {counts["skip"]} skipped' if counts['skip'] else ''
    return f'{counts["ok"]} passed, {counts["FAIL"]} failed{skipped}'


def arguments() -> argparse.Namespace:
    "The command line"
    parser = argparse.ArgumentParser(description='Check the repository and run all notebooks as tests.')
    add = parser.add_argument
    add('names', nargs='*', help='run only these checks and notebooks, e.g. layers 01_preprocess')
    add('--flags', nargs='*', default=[], help='run cells with these test flags too, e.g. --flags slow')
    add('--workers', type=int, default=2, help='how many run at a time (default: 2)')
    add('--timeout', type=int, default=900, help='seconds a notebook may take (default: 900)')
    add('--self-test', action='store_true', help='only see that each check can fail')
    add('--root', type=Path, default=ROOT, help=argparse.SUPPRESS)
    add('--worker', type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.root = args.root.resolve()
    return args


def main() -> int:
    "Run what was asked for, print one line each and the count; 1 if anything failed"
    args = arguments()
    if args.worker: return worker(args.worker.resolve(), args.root, args.flags)
    names = args.names + ['self-test'] * args.self_test
    results = run_all(chosen(names, all_jobs(args)), args.workers)
    print(summary(results), flush=True)
    return int(any(r.faults for r in results))


if __name__ == '__main__': sys.exit(main())
