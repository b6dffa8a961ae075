"""What the outputs of the notebooks were made from: one line a notebook in nbs/as_run.jsonl.

`make run` writes a line when it saves a notebook: a hash of the code that ran, the version of the simulator,
and the hashes of the result files that were read. The check `as-run` compares it with what is there now, so
it finds a cell that was edited and not run again, and a table of an older result file. Comments and blank
lines do not count.

Git keeps both lines where two branches have run the same notebook (`merge=union` in .gitattributes). A
notebook is as run if one of its lines fits.
"""
import hashlib
import io
import json
import os
import re
import tokenize
from pathlib import Path

RECORD = 'nbs/as_run.jsonl'
RESULTS = 'bench/results'                               # the files whose hashes are kept
SIMULATOR = 'icecube_nb/physics/simulate.py'
FIX = 'fix: make run NB={}'


def short_hash(data: bytes) -> str:
    "Twelve hexadecimal digits that stand for `data`"
    return hashlib.blake2b(data, digest_size=6).hexdigest()


def without_comments(source: str) -> str:
    "Code without comments, blank lines and blanks at the ends of lines; as it is if it is not plain Python"
    lines = source.splitlines()
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        tokens = []
    for token in tokens:
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return '\n'.join(line.rstrip() for line in lines if line.strip())


def source_of(cell: dict) -> str:
    "The source of a cell, which is stored as one string or as a list of lines"
    return cell['source'] if isinstance(cell['source'], str) else ''.join(cell['source'])


def is_flagged(cell: dict, flags: set[str]) -> bool:
    "Whether a cell carries one of these test flags, so that it runs only when asked for"
    return bool(flags & set(re.findall(r'^#\|\s*(\w+)', source_of(cell), re.M)))


def code_hash(cells: list[dict], flags: set[str]) -> str:
    "One hash for all code cells that run by default, in their order"
    sources = [without_comments(source_of(cell)) for cell in cells
               if cell['cell_type'] == 'code' and not is_flagged(cell, flags)]
    return short_hash('\n\n'.join(source for source in sources if source).encode())


def cell_hash(cell: dict) -> str:
    "The hash of one cell that carries a test flag"
    return short_hash(without_comments(source_of(cell)).encode())


def simulator_version(root: Path) -> int | None:
    "The version of the simulation, from its module"
    path = root/SIMULATOR
    found = re.search(r'^VERSION = (\d+)', path.read_text(encoding='utf-8'), re.M) if path.exists() else None
    return int(found[1]) if found else None


def file_hashes(root: Path, names: list[str]) -> dict[str, str]:
    "The hashes of these files of the repository"
    return {name: short_hash((root/name).read_bytes()) if (root/name).exists() else 'missing'
            for name in sorted(names)}


def read_record(root: Path) -> dict[str, list[dict]]:
    "The lines of nbs/as_run.jsonl, by the notebook's path"
    path = root/RECORD
    found: dict[str, list[dict]] = {}
    for line in path.read_text(encoding='utf-8').splitlines() if path.exists() else []:
        if line.strip():
            entry = json.loads(line)
            found.setdefault(entry['notebook'], []).append(entry)
    return found


def write_record(root: Path, entry: dict) -> None:
    "Replace the lines of one notebook by `entry`"
    record = read_record(root) | {entry['notebook']: [entry]}
    record = {name: entries for name, entries in record.items() if (root/name).exists()}
    lines = [json.dumps(entry) for name in sorted(record) for entry in record[name]]
    temporary = root/(RECORD + '.tmp')
    temporary.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    os.replace(temporary, root/RECORD)


def kept_hashes(entries: list[dict]) -> dict[str, set[str]]:
    "The hashes under which the outputs of flagged cells were saved, by the cell's id"
    found: dict[str, set[str]] = {}
    for entry in entries:
        for cell_id, made_from in entry.get('flagged', {}).items():
            found.setdefault(cell_id, set()).add(made_from['code'])
    return found


def entry_fault(root: Path, entry: dict, code: str) -> str:
    "Why the outputs of a notebook do not belong to one line of the record; '' if they do"
    if entry['code'] != code:
        return 'its code has changed since its outputs were made'
    now = simulator_version(root)
    if entry['simulator'] not in (None, now):
        return f'its outputs are of simulator version {entry["simulator"]}, the present one is {now}'
    hashes = file_hashes(root, list(entry['read']))
    changed = [name for name, digest in entry['read'].items() if hashes[name] != digest]
    return f'its outputs show {", ".join(changed)} as it was before' if changed else ''


def faults(root: Path, path: Path, cells: list[dict], flags: set[str]) -> list[str]:
    "How the outputs of one notebook differ from what its code and the result files would give now"
    name = path.relative_to(root).as_posix()
    entries = read_record(root).get(name, [])
    fix = FIX.format(path.stem)
    if not entries:
        return [f'{name} was never saved by `make run`; {fix}']
    found = []
    reasons = [entry_fault(root, entry, code_hash(cells, flags)) for entry in entries]
    if all(reasons):
        found.append(f'{name}: {reasons[-1]}; {fix}')
    kept = kept_hashes(entries)
    for number, cell in enumerate(cells):
        if cell['cell_type'] == 'code' and is_flagged(cell, flags) and cell['outputs']:
            if cell_hash(cell) not in kept.get(cell.get('id', ''), set()):
                flag = sorted(flags & set(re.findall(r'^#\|\s*(\w+)', source_of(cell), re.M)))[0]
                found.append(f'{name} cell {number} has changed since its output was made; {fix} '
                             f'ARGS="--flags {flag}", or remove its output')
    return found
