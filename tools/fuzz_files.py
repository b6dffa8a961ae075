"""How does `tools/fuzz.py` damage a file? By its structure: columns, rows, types, entries, shapes, bytes.

Checksums that lie beside a damaged file are mostly written anew, so that what comes after them is reached
too. A change in `NEUTRAL` leaves the meaning as it is: the answers must be the same.
"""
import json
import os
import random
import shutil
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from icecube_nb.core.storage import file_checksum

DEEP = '['*100_000
VALUES = [None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 1.5, -1e308, 1e-320, '', 'x', 'nan',
          '../../x', 'ü'*300, [], {}, [[]], {'a': {}}, [None]*3, [0]*1000, list(range(5))]


# ---- any file ----

def damage_bytes(rng: random.Random, path: Path) -> str:
    "Cut, flip, insert or empty."
    data = bytearray(path.read_bytes())
    kind = rng.choice(('cut', 'flip', 'flips', 'insert', 'empty', 'zeros', 'double', 'noise'))
    at = rng.randrange(len(data) + 1)
    if kind == 'cut':
        data = data[:at]
    elif kind in ('flip', 'flips') and data:
        for _ in range(1 if kind == 'flip' else 20):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 'insert':
        data[at:at] = rng.randbytes(rng.choice((1, 8, 1000)))
    elif kind == 'empty':
        data = b''
    elif kind == 'zeros':
        data[at:at + 100] = bytes(len(data[at:at + 100]))
    elif kind == 'double':
        data = data*2
    elif kind == 'noise':
        data = rng.randbytes(len(data))
    path.write_bytes(data)
    return f'bytes: {kind}'


def damage_entry(rng: random.Random, path: Path) -> str:
    "Put something else in the place of a file."
    kind = rng.choice(('removed', 'folder', 'fifo', 'dangling', 'loop', 'link', 'no permission', 'device'))
    kept = path.with_name(path.name + '.kept')
    if kind == 'no permission':
        path.chmod(0)
        return f'entry: {kind}'
    if kind == 'link':
        path.rename(kept)
        path.symlink_to(kept.name)
        return f'entry: {kind}'
    path.unlink()
    if kind == 'folder':
        path.mkdir()
    elif kind == 'fifo':
        os.mkfifo(path)
    elif kind == 'dangling':
        path.symlink_to('nowhere')
    elif kind == 'loop':
        path.symlink_to(path.name)
    elif kind == 'device':
        path.symlink_to('/dev/zero')
    return f'entry: {kind}'


# ---- tables ----

def odd_array(rng: random.Random, rows: int) -> pa.Array:
    "A column of a strange type."
    kinds = [pa.nulls(rows), pa.array(['x']*rows), pa.array([[1]]*rows), pa.array([{'a': 1}]*rows),
             pa.array([2**63]*rows, pa.uint64()), pa.array([1.5]*rows), pa.array([float('nan')]*rows),
             pa.array([True]*rows), pa.array([b'x']*rows), pa.array([0]*rows, pa.timestamp('ns')),
             pa.array([-2**63]*rows), pa.array(['1']*rows).dictionary_encode(), pa.array([1]*rows, pa.int8()),
             pa.array([1]*rows, pa.decimal128(20, 2)), pa.array([1.0]*rows, pa.float16()),
             pa.array([[1.0, 2.0]]*rows, pa.list_(pa.float64(), 2))]
    return rng.choice(kinds)


def set_cell(rng: random.Random, table: pa.Table) -> pa.Table:
    "Another value in one row, or in some."
    name = rng.choice(table.column_names)
    at, kind = table.column_names.index(name), table[name].type
    values = table[name].to_pylist()
    odd = [None, 0, -1, 1, 2**31, 2**63 - 1, -2**63, 5160, 32767, -32768, float('nan'), float('inf'), -0.0,
           1e308, 5e-324, 7.0, True, values[rng.randrange(len(values))]]
    value = rng.choice(odd)
    rows = [rng.randrange(len(values))]
    if rng.random() < .3:
        rows = range(0, len(values), rng.choice((1, 2, 10)))
    for row in rows:
        values[row] = value
    try:
        column = pa.array(values, kind)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        column = pa.array([None if v is value else v for v in values], kind)
    return table.set_column(at, name, column)


def damage_table(rng: random.Random, table: pa.Table) -> tuple[pa.Table, str]:
    "A damaged table."
    names = table.column_names
    kind = rng.choice(('drop', 'type', 'cell', 'cell', 'cell', 'rows', 'none', 'twice', 'rename', 'repeat',
                       'shuffle', 'scale', 'metadata', 'many', 'double'))
    if not names or not len(table):
        kind = 'double'
    if kind == 'drop':
        table = table.drop_columns([rng.choice(names)])
    elif kind == 'type':
        name = rng.choice(names)
        table = table.set_column(names.index(name), name, odd_array(rng, len(table)))
    elif kind == 'cell':
        table = set_cell(rng, table)
    elif kind == 'rows':
        table = table.slice(0, rng.randrange(len(table)))
    elif kind == 'none':
        table = table.slice(0, 0)
    elif kind == 'twice':
        table = table.append_column(names[0], table[names[0]])
    elif kind == 'rename':
        at = rng.randrange(len(names))
        table = table.rename_columns([rng.choice(('', 'x', name.upper())) if k == at else name
                                      for k, name in enumerate(names)])
    elif kind == 'repeat':
        table = pa.concat_tables([table, table.slice(0, rng.choice((1, len(table))))])
    elif kind == 'shuffle':
        order = list(range(len(table)))
        rng.shuffle(order)
        table = table.take(order)
    elif kind == 'scale':
        name = rng.choice(names)
        if pa.types.is_floating(table[name].type) or pa.types.is_integer(table[name].type):
            by = rng.choice((0, -1, 1000, 0.001))
            values = (table[name].to_numpy().astype(float)*by)
            safe = pa.array(values).cast(table[name].type, safe=False)
            table = table.set_column(names.index(name), name, safe)
    elif kind == 'metadata':
        notes = b'{', b'[]', DEEP.encode(), b'{"index_columns": [1, {}]}'
        table = table.replace_schema_metadata({rng.choice((b'pandas', b'x')): rng.choice(notes)})
    elif kind == 'many':
        table = table.append_column('more', odd_array(rng, len(table)))
    else:
        table = pa.concat_tables([table, table])
    return table, f'table: {kind}'


NEUTRAL = ('zstd', 'groups', 'more', 'plain', 'order', 'wide', 'unpandas')


def change_form(rng: random.Random, path: Path) -> str:
    "Write a parquet file in another form with the same meaning; only a meta file in another order."
    table, kind = pq.read_table(path, partitioning=None), rng.choice(NEUTRAL)
    options = {}
    if kind == 'zstd':
        options = {'compression': 'zstd'}
    elif kind == 'groups':
        options = {'row_group_size': rng.choice((1, 7, 64))}
    elif kind == 'more':
        table = table.append_column('more', pa.array(['x']*len(table)))
    elif kind == 'plain':
        options = {'use_dictionary': False, 'compression': 'none', 'data_page_version': '2.0'}
    elif kind == 'order' and 'meta' in path.name:
        order = list(range(len(table)))
        rng.shuffle(order)
        table = table.take(order)
    elif kind == 'wide':
        for at, name in enumerate(table.column_names):
            if pa.types.is_integer(table[name].type):
                table = table.set_column(at, name, table[name].cast(pa.int64()))
    elif kind == 'unpandas':
        table = table.replace_schema_metadata(None)
    pq.write_table(table, path, **options)
    return f'form: {kind}'


def damage_parquet(rng: random.Random, path: Path) -> str:
    "Damage the table in a parquet file; or write one of 12 million rows in a few bytes."
    if rng.random() < .005:
        ones = pa.table({name: pa.array(np.ones(10**6, np.int8)) for name in pq.read_schema(path).names})
        with pq.ParquetWriter(path, ones.schema, compression='zstd') as file:
            for _ in range(12):
                file.write_table(ones)
        return 'table: bomb'
    table, what = damage_table(rng, pq.read_table(path, partitioning=None))
    pq.write_table(table, path)
    return what


def damage_csv(rng: random.Random, path: Path) -> str:
    "Damage the lines or cells of a text table."
    lines = path.read_text(errors='replace').splitlines()
    kind = rng.choice(('line away', 'cell', 'cell', 'cell', 'column away', 'header away', 'again', 'bom',
                       'nul', 'latin', 'semicolons', 'quotes', 'long', 'cells more', 'order', 'blank'))
    at = rng.randrange(len(lines)) if lines else 0
    cells = lines[at].split(',') if lines else ['']
    if kind == 'line away':
        del lines[at]
    elif kind == 'cell':
        odd = ['', 'nan', 'inf', '-1', '1e400', 'x', '0', '9'*30, '1.5', '"', 'None', '1,2', '\t', str(2**63)]
        cells[rng.randrange(len(cells))] = rng.choice(odd)
        lines[at] = ','.join(cells)
    elif kind == 'column away':
        lines = [line.rpartition(',')[0] for line in lines]
    elif kind == 'header away':
        lines = lines[1:]
    elif kind == 'again':
        lines += lines[at:]
    elif kind == 'bom':
        lines[0] = '\ufeff' + lines[0]
    elif kind == 'nul':
        lines[at] += '\x00'
    elif kind == 'latin':
        path.write_bytes('\n'.join([*lines, 'ü,ü,ü']).encode('latin-1', 'replace'))
        return 'text table: latin'
    elif kind == 'semicolons':
        lines = [line.replace(',', ';') for line in lines]
    elif kind == 'quotes':
        lines[at] = '"' + lines[at]
    elif kind == 'long':
        lines[at] = '1'*1_000_000
    elif kind == 'cells more':
        lines[at] += ',1,2,3'
    elif kind == 'order':
        head, *rest = lines
        rng.shuffle(rest)
        lines = [head, *rest]
    else:
        lines = ['']*len(lines)
    path.write_text('\n'.join(lines) + '\n')
    return f'text table: {kind}'


# ---- JSON ----

def places(value: object) -> list[tuple[object, object]]:
    "Every entry of nested lists and dicts: its container and its key."
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:200]:
        found += [(value, key), *places(inner)]
    return found


def damage_value(rng: random.Random, value: object) -> tuple[object, str]:
    "Change, remove or add an entry of nested lists and dicts."
    entries = places(value)
    if not entries or rng.random() < .05:
        return rng.choice(VALUES), 'whole'
    holder, key = rng.choice(entries)
    kind = rng.choice(('value', 'value', 'value', 'away', 'more', 'scale'))
    if kind == 'away':
        del holder[key]
    elif kind == 'more' and isinstance(holder, dict):
        holder[rng.choice(('x', '', '__class__', 'device'))] = rng.choice(VALUES)
    elif kind == 'scale' and type(holder[key]) in (int, float):
        holder[key] = holder[key]*rng.choice((-1, 0, 1000, 10**6, 0.5))
    else:
        holder[key] = rng.choice(VALUES)
    return value, kind


def damage_json(rng: random.Random, path: Path) -> str:
    "Damage the structure of a JSON file."
    if rng.random() < .1:
        texts = DEEP, '{"a":'*100_000, '1'*5000, 'NaN', '"\\ud800"', '{"version": 1e999}', '\x00'
        path.write_text(rng.choice(texts))
        return 'json: text'
    value, kind = damage_value(rng, json.loads(path.read_text()))
    path.write_text(json.dumps(value))
    return f'json: {kind}'


# ---- weights and states ----

def damage_safetensors(rng: random.Random, path: Path) -> str:
    "Damage the header or the numbers of a safetensors file."
    from safetensors.numpy import load, save
    data = path.read_bytes()
    if rng.random() < .3:
        size, = struct.unpack('<Q', data[:8])
        header, kind = damage_value(rng, json.loads(data[8:8 + size]))
        text = json.dumps(header).encode()
        length = len(text) if rng.random() < .9 else rng.choice((0, 2**62, 2**63, len(data)))
        path.write_bytes(struct.pack('<Q', length) + text + data[8 + size:])
        return f'weights: header {kind}'
    arrays = load(data)
    name = rng.choice(sorted(arrays))
    kind = rng.choice(('nan', 'large', 'shape', 'away', 'more', 'type', 'empty', 'zero'))
    if kind == 'nan':
        arrays[name] = np.full_like(arrays[name], np.nan)
    elif kind == 'large':
        arrays[name] = np.full_like(arrays[name], 3e38)
    elif kind == 'shape':
        arrays[name] = arrays[name].reshape(-1) if arrays[name].ndim > 1 else arrays[name][None]
    elif kind == 'away':
        del arrays[name]
    elif kind == 'more':
        arrays['more'] = arrays[name]
    elif kind == 'type':
        arrays[name] = arrays[name].astype(rng.choice((np.float64, np.float16, np.int8, np.int64, bool)))
    elif kind == 'empty':
        arrays[name] = arrays[name][:0]
    else:
        arrays[name] = np.zeros_like(arrays[name])
    path.write_bytes(save({key: np.ascontiguousarray(value) for key, value in arrays.items()}))
    return f'weights: {kind}'


class Stranger:
    "A pickled object, which nobody may load."

    def __reduce__(self):
        return os.mkdir, ('PICKLE-WAS-EXECUTED',)


def damage_state(rng: random.Random, path: Path) -> str:
    "Damage the nested entries and tensors of a saved training state."
    import torch
    saved = torch.load(path, weights_only=True)
    odd = [*VALUES, torch.zeros(3), torch.zeros(1).expand(10**12), torch.tensor(float('nan')), torch.zeros(0),
           torch.zeros(2, 2, dtype=torch.int64), torch.zeros(1 << 20).to_sparse(),
           torch.zeros(4, device='meta'), Stranger()]
    entries = places(saved)
    holder, key = rng.choice(entries)
    kind = rng.choice(('value', 'value', 'away', 'whole', 'key'))
    if kind == 'away':
        del holder[key]
    elif kind == 'whole':
        saved = rng.choice(odd)
    elif kind == 'key' and isinstance(holder, dict):
        holder[rng.choice(('model', 'eval_model', '__class__', 7, 'step'))] = rng.choice(odd)
    else:
        holder[key] = rng.choice(odd)
    torch.save(saved, path)
    return f'state: {kind}'


def damage_arrow(rng: random.Random, path: Path) -> str:
    "Damage a packed file or answers, with a right checksum."
    from icecube_nb.core.arrow_files import checksum, column_arrays
    with pa.memory_map(str(path)) as source:
        batch = pa.ipc.open_file(source).get_batch(0)
        about = {k.decode(): v.decode() for k, v in (batch.schema.metadata or {}).items()}
        batch = pa.RecordBatch.from_arrays([pa.concat_arrays([c]) for c in batch.columns], batch.schema.names)
    columns, kind = dict(zip(batch.schema.names, batch.columns)), 'about'
    if rng.random() < .3:
        about, _ = damage_value(rng, about)
        about = about if isinstance(about, dict) else {}
        about = {str(key): v if isinstance(v, str) else json.dumps(v) for key, v in about.items()}
    else:
        table, kind = damage_table(rng, pa.table(columns))
        columns = {k: c.combine_chunks() if isinstance(c, pa.ChunkedArray) else c
                   for k, c in zip(table.column_names, table.columns)}
    batch = pa.record_batch(list(columns.values()), list(columns))
    try:
        arrays = [array for k in range(batch.num_columns)
                  for array in column_arrays(batch.schema.names[k], batch.column(k)).values()]
        about['checksum'] = checksum(about, arrays)
    except Exception:
        pass
    data = pa.BufferOutputStream()
    with pa.ipc.new_file(data, batch.schema.with_metadata(about)) as writer:
        writer.write_batch(batch)
    path.write_bytes(data.getvalue())
    return f'arrow {kind}'


def damage_text(rng: random.Random, path: Path) -> str:
    "Damage the lines and numbers of a text, such as decision trees or a table of the ice."
    lines = path.read_text(errors='replace').splitlines()
    at = rng.randrange(max(len(lines), 1))
    kind = rng.choice(('away', 'number', 'number', 'swap', 'again', 'long'))
    words = lines[at].split() if lines else []
    if kind == 'away' and lines:
        del lines[at]
    elif kind == 'number' and words:
        name, equals, last = words[-1].rpartition('=')
        words[-1] = name + equals + rng.choice(('-1', '0', '999999999', 'nan', '1e999', 'x', '', str(2**40)))
        lines[at] = ' '.join(words)
    elif kind == 'swap' and lines:
        other = rng.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == 'again':
        lines += lines[at:]
    else:
        lines.insert(at, '1'*100_000)
    path.write_text('\n'.join(lines) + '\n')
    return f'text: {kind}'


def damage_sqlite(rng: random.Random, path: Path) -> str:
    "Damage the tables of a database."
    statement = rng.choice(('DROP TABLE truth', 'DELETE FROM truth', 'UPDATE pulses SET charge = NULL',
                            "UPDATE pulses SET dom_time = 'x'", 'UPDATE truth SET zenith = 9',
                            'UPDATE pulses SET event_no = 1e300',
                            'ALTER TABLE pulses RENAME TO "a""b"', 'INSERT INTO truth SELECT * FROM truth',
                            'UPDATE pulses SET event_no = NULL', "UPDATE pulses SET dom_x = x'00ff'",
                            'CREATE VIEW loop AS SELECT * FROM loop', 'UPDATE pulses SET dom_z = 1e308'))
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
    connection.close()
    return 'database: statement'


def damage_npy(rng: random.Random, path: Path) -> str:
    "Another array in a .npy file, or one that is a pickle, or one whose header asks for terabytes."
    kind = rng.choice(('float', 'pickle', 'huge', 'empty', 'text'))
    array = {'float': np.full(3, np.nan), 'pickle': np.array([Stranger()], object), 'huge': np.zeros(3),
             'empty': np.zeros(0, np.int64), 'text': np.array(['x'])}[kind]
    np.save(path, array, allow_pickle=True)
    if kind == 'huge':
        path.write_bytes(path.read_bytes().replace(b"'shape': (3,)", b"'shape': (10000000000000,)", 1))
    return f'array: {kind}'


BY_SUFFIX: dict[str, Callable[[random.Random, Path], str]] = {
    '.parquet': damage_parquet, '.csv': damage_csv, '.json': damage_json, '.npy': damage_npy,
    '.safetensors': damage_safetensors, '.pt': damage_state, '.arrow': damage_arrow, '.txt': damage_text,
    '.db': damage_sqlite}


# ---- checksums that lie beside ----

def write_sums(path: Path) -> None:
    "Bring the checksums that speak of a damaged file up to date, as somebody who means harm would."
    sums = path.with_name('checksums.json')
    if sums.is_file() and path.is_file() and path != sums:
        known = json.loads(sums.read_text())
        if path.name in known:
            sums.write_text(json.dumps(known | {path.name: file_checksum(path)}))
    for folder in list(path.parents)[:4]:
        note = folder/'ensemble.json'
        if note.is_file() and path.parent == folder and path.is_file():
            about = json.loads(note.read_text())
            if path.name in about.get('checksums', {}):
                about['checksums'][path.name] = file_checksum(path)
                note.write_text(json.dumps(about))
        manifest = folder/'manifest.json'
        if manifest.is_file() and path.is_file():
            about, name = json.loads(manifest.read_text()), path.relative_to(folder).as_posix()
            if name in about.get('files', {}):
                about['files'][name] = [path.stat().st_size, file_checksum(path, 'sha256')]
                manifest.write_text(json.dumps(about))


def damage(rng: random.Random, path: Path) -> str: # what was done
    "Damage one file, by its structure where it has one."
    how = rng.random()
    if how < .1:
        return damage_entry(rng, path)
    if how < .2 or path.suffix not in BY_SUFFIX:
        done = damage_bytes(rng, path)
    else:
        kept = path.read_bytes()
        try:
            done = BY_SUFFIX[path.suffix](rng, path)
        except Exception:                                       # damaged already, or not of this structure
            path.write_bytes(kept)
            done = damage_bytes(rng, path)
    if rng.random() < .7:
        try:
            write_sums(path)
        except (ValueError, OSError, AttributeError, TypeError, RecursionError):
            pass
    return done


def copy_base(base: Path, folder: Path) -> None:
    "A fresh copy of all files, with odd entries beside them."
    shutil.copytree(base, folder, symlinks=True)
    odd = folder/'odd'
    (odd/'folder').mkdir(parents=True)
    (odd/'empty').touch()
    (odd/'loop').symlink_to('loop')
    (odd/'dangling').symlink_to('nowhere')
    (odd/'link').symlink_to('../data')
    os.mkfifo(odd/'fifo')
    (folder/'new').mkdir()
