"""Does every command of the README work as it is written, and how long does it take?

    python tools/readme_commands.py            in a fresh clone, after `make setup`; some 20 minutes
    python tools/readme_commands.py --make     `make demo` and `make test` too
    python tools/readme_commands.py --only 'icecube-nb gpu'      these again; the rest of the table stays

The commands are taken from the README's code blocks and run in its order in an empty folder. What cannot be
had everywhere is replaced (`REPLACED`): simulated files stand in for the competition's, minutes for hours.
Commands that need an account or several GPUs are listed and not run (`NOT_RUN`). The table goes to
bench/results/readme_commands.csv.
"""
import argparse
import csv
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT/'bench'/'results'/'readme_commands.csv'
REPLACED = (                               # what the README says, what is run here
    ('/data/icecube', 'data', 'simulated files'),
    ('--batches 1-651', '--batches 1-8', 'the 8 files that there are'),
    ('--minutes 600', '--minutes 2', '2 minutes'),
    ('runs/demo', '{demo}', 'the demo, made shorter'),
)
NOT_RUN = (                                # beginning of a command, and why
    ('kaggle ', 'needs an account'),
    ('torchrun ', 'needs several GPUs'),
    ('make ', 'with --make only'),
    ('pip install .', 'done by `make setup` and by the check `sdist`'),
    ('.venv/bin/jupyter', 'opens a browser'),
    ('.venv/bin/pip install jupyterlab', 'not needed by the project'),
)
SHORT_DEMO = 'icecube-nb demo --minutes 0.5 --batches 4 --events-per-batch 2000 --test-events 500 --out'


def commands_of(readme: str) -> list[str]:
    "The commands of the code blocks, without comments; a line that ends in a backslash goes on."
    blocks = re.sub(r' *\\\n +', ' ', readme)
    lines = [line.strip() for line in blocks.splitlines() if line.startswith('    ')]
    starts = ('icecube-nb ', 'export ', 'make ', 'kaggle ', 'pip ', '.venv/')
    return [re.sub(r' +#.*| {2,}#.*', '', line) for line in lines if line.startswith(starts)]


def as_run_here(command: str, demo: Path) -> tuple[str, list[str]]:
    "The command with what is replaced, and what that was."
    notes = []
    for written, here, note in REPLACED:
        if written in command:
            command = command.replace(written, here.format(demo=demo))
            notes.append(note)
    return command, notes


def run(command: str, folder: Path, env: dict[str, str]) -> tuple[int, float, str]:
    "Exit status, seconds, and the last line that it wrote."
    began = time.monotonic()
    done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True,
                          check=False)
    lines = (done.stdout + done.stderr).strip().splitlines() or ['']
    return done.returncode, time.monotonic() - began, lines[-1]


def table_of(readme: str, folder: Path, with_make: bool, only: str = '') -> list[dict]:
    "A row for each command that begins with `only`."
    scripts = Path(sys.executable).parent
    env = os.environ | {'PATH': f'{scripts}{os.pathsep}{os.environ["PATH"]}',
                        'ICECUBE_CACHE_DIR': str(folder/'cache')}
    demo, rows = folder/'demo', []
    for command in commands_of(readme):
        if not command.startswith(('export ', only)):
            continue
        why = next((why for start, why in NOT_RUN if command.startswith(start)), None)
        if command.startswith('make ') and with_make:
            why = None
        if command.startswith('export '):
            name, value = as_run_here(command, demo)[0].removeprefix('export ').split('=', 1)
            env[name] = str(folder/value)
            continue
        if why:
            rows.append({'command': command, 'status': '', 'seconds': '', 'note': f'not run: {why}'})
            continue
        if 'runs/demo' in command and not demo.exists():
            run(f'{SHORT_DEMO} {shlex.quote(str(demo))}', folder, env)
        here, notes = as_run_here(command, demo)
        status, seconds, last = run(here, ROOT if here.startswith('make ') else folder, env)
        rows.append({'command': command, 'status': status, 'seconds': round(seconds, 1),
                     'note': '; '.join(notes) if status == 0 else last})
        print(f'{status}  {seconds:7.1f} s  {command}' + (f'\n    {last}' if status else ''), flush=True)
    return rows


def main() -> None:
    "Run them, print, and keep the table."
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument('--make', action='store_true', help='`make demo` and `make test` too')
    parser.add_argument('--only', default='', metavar='TEXT', help='commands that begin so')
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = table_of((ROOT/'README.md').read_text(encoding='utf-8'), Path(folder), a.make, a.only)
    if a.only:
        again = {row['command']: row for row in rows}
        with open(TABLE, newline='', encoding='utf-8') as file:
            rows = [again.get(row['command'], row) for row in csv.DictReader(file)]
    with open(TABLE, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    failed = [row['command'] for row in rows if str(row['status']) not in ('0', '')]
    sys.exit(f'{len(failed)} commands failed: {failed}' if failed else 0)


if __name__ == '__main__':
    main()
