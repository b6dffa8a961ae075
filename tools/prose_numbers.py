"""Do the errors that the text of a notebook names stand in its outputs?

An error in radians with two decimals or more, such as "0.013 rad", was measured somewhere. It is right if an
output or a line of code of the same notebook has a number that rounds to it, or if its paragraph names a
source: a link, a paper, a result file, or the words "not kept" or "by hand". The rest is in KNOWN, each with
its reason.
"""
import json
import re
from pathlib import Path

MEASURED = re.compile(r'(?<![\d.,])(\d+\.\d{2,}) rad\b')
NUMBER = re.compile(r'(?<![\w.])[-+]?(\d+\.\d+|\.\d+|\d+)(?:e[-+]?\d+)?')
SOURCE = re.compile(r'\]\(|arXiv|bench/results|not kept|by hand')
KNOWN = {                           # notebook, number: why it needs no source
    ('03a_evaluate', '1.00'): 'a made-up score, to ask what it means',
    ('03a_evaluate', '0.11'): 'the distance of points of a grid: sqrt(4 pi/1000)',
    ('convert_events', '0.68'): 'from the formula beside it',
    ('posterior_grid', '0.0003'): 'the root of twice the spacing of single precision at 1',
    ('robustness', '0.05'): 'a made-up loss, to ask what it means',
    ('robustness', '0.01'): 'a made-up gain, to ask what it means',
    ('robustness', '0.001'): 'a bound, which two rows of the table keep',
}


def shown(nb: dict) -> str:
    "The code and the text outputs of a notebook"
    parts = []
    for cell in nb['cells']:
        if cell['cell_type'] != 'code':
            continue
        parts.append(''.join(cell['source']))
        for output in cell['outputs']:
            parts.append(''.join(output.get('text', '')))
            parts += [''.join(text) for kind, text in output.get('data', {}).items()
                      if kind.startswith('text/')]
    return '\n'.join(parts)


def rounds_to(number: str, text: str) -> bool:
    "Whether a number in `text` rounds to `number`, at its decimals"
    decimals, value = len(number.partition('.')[2]), float(number)
    half = 0.5*10**-decimals + 1e-9
    return any(abs(abs(float(found[0])) - value) <= half for found in NUMBER.finditer(text))


def faults(path: Path) -> list[str]:
    "The measured numbers in the text of a notebook that nothing in it shows"
    nb = json.loads(path.read_text(encoding='utf-8'))
    text, found = shown(nb), []
    for number, cell in enumerate(nb['cells']):
        if cell['cell_type'] != 'markdown':
            continue
        for paragraph in ''.join(cell['source']).split('\n\n'):
            for measured in MEASURED.findall(paragraph):
                if (path.stem, measured) in KNOWN or SOURCE.search(paragraph) or rounds_to(measured, text):
                    continue
                found.append(f'{path.name} cell {number} says {measured} rad, which no output of it shows '
                             'and no source is named for')
    return found
