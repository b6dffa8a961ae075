"""Make README.md from nbs/index.ipynb (`make readme`), or say how the two differ (`--check`).

The notebook is taken as it was run: nothing is executed here. `#| hide` drops a cell, `#| echo: false` its
code, `#| output: false` its outputs. Figures go to nbs/images/readme_N.png, and links, which in the notebook
start from nbs/, start from the README's folder.
"""
import argparse
import base64
import difflib
import os
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

NOTEBOOK = 'nbs/index.ipynb'
HEADER = '<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook, not this file. -->\n\n'
MIME_TYPES = ['text/markdown', 'image/png', 'text/plain']              # the best one that an output has
DIRECTIVE = re.compile(r'^#\|\s*(\w+):?[ \t]*(.*?)[ \t]*$', re.M)      # `#| echo: false`
MARKDOWN_LINK = re.compile(r'(\]\()([^)\s]+)')                         # [text](target "title")
HTML_LINK = re.compile(r'(\b(?:src|href)=")([^"]+)')                   # <img src="target">
ELSEWHERE = re.compile(r'^(\w+:|#|/)')                                 # https:..., #anchor, /absolute


def directives(source: str) -> dict[str, str]:
    "The `#|` directives of a code cell, name -> value"
    return dict(DIRECTIVE.findall(source))


def outside_nbs(target: str) -> str:
    "A link's `target`, written in nbs/, as it reads from the folder above"
    return target if ELSEWHERE.match(target) else posixpath.normpath(posixpath.join('nbs', target))


def relink(text: str) -> str:
    "Markdown `text` with its relative links read from the folder above nbs/"
    for link in (MARKDOWN_LINK, HTML_LINK):
        text = link.sub(lambda found: found[1] + outside_nbs(found[2]), text)
    return text


def shown_outputs(cell) -> list:
    "The outputs of a code cell that a reader should see: no errors, no stderr (progress bars, warnings)"
    return [o for o in cell.outputs if o.output_type != 'error' and o.get('name') != 'stderr']


def take_figure(output, figures: dict[str, bytes]) -> None:
    "Replace the PNG of `output` by a link, and add the picture to `figures` (path -> bytes)"
    path = f'nbs/images/readme_{len(figures) + 1}.png'
    figures[path] = base64.b64decode(output.data['image/png'])
    output.data = nbformat.from_dict({'text/markdown': f'![]({path})'})


def prepare_output(output, figures: dict[str, bytes]) -> None:
    "Make one output ready for the exporter, in place"
    data = output.get('data', {})
    if 'text/markdown' in data:
        data['text/markdown'] = relink(data['text/markdown'])
    elif 'image/png' in data:
        take_figure(output, figures)


def prepare_cell(cell, figures: dict[str, bytes]):
    "One cell as the README shows it, or None where it does not"
    if cell.cell_type == 'markdown':
        cell.source = relink(cell.source)
    if cell.cell_type != 'code':
        return cell if cell.cell_type == 'markdown' else None
    flags = directives(cell.source)
    if 'hide' in flags or flags.get('include') == 'false':
        return None
    cell.outputs = [] if flags.get('output') == 'false' else shown_outputs(cell)
    for output in cell.outputs:
        prepare_output(output, figures)
    cell.source = '' if flags.get('echo') == 'false' else DIRECTIVE.sub('', cell.source).strip()
    if not cell.source:
        cell.metadata['transient'] = {'remove_source': True}
    return cell if cell.source or cell.outputs else None


def make_readme(root: Path) -> tuple[str, dict[str, bytes]]:
    "The text of README.md for the repository at `root`, and its figures, path -> bytes"
    path = root/NOTEBOOK
    if not path.exists():
        raise FileNotFoundError(f'{NOTEBOOK} is missing: README.md is made from it')
    figures: dict[str, bytes] = {}
    nb = nbformat.read(path, as_version=4)
    nb.cells = [c for c in (prepare_cell(c, figures) for c in nb.cells) if c is not None]
    nb.metadata['language_info'] = {'name': 'python'}
    exporter = MarkdownExporter(config=Config(NbConvertBase={'display_data_priority': MIME_TYPES}))
    text = exporter.from_notebook_node(nb)[0]
    return HEADER + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', figures


def dead_links(root: Path, text: str) -> list[str]:
    "The relative links of the README `text` that lead to no file"
    targets = {t for link in (MARKDOWN_LINK, HTML_LINK) for _, t in link.findall(text)}
    paths = {t.partition('#')[0] for t in targets if not ELSEWHERE.match(t)}
    return sorted(p for p in paths if not (root/p).exists())


def faults(root: Path) -> list[str]:
    "How README.md and its figures differ from what nbs/index.ipynb gives; empty where they agree"
    try:
        text, figures = make_readme(root)
    except FileNotFoundError as error:
        return [str(error)]
    readme = root/'README.md'
    old = readme.read_text(encoding='utf-8') if readme.exists() else ''
    diff = list(difflib.unified_diff(old.splitlines(), text.splitlines(), lineterm='', n=0))[2:8]
    found = ['README.md is not what nbs/index.ipynb gives; fix: make readme', *diff] if old != text else []
    stale = [p for p, png in figures.items() if not (root/p).exists() or (root/p).read_bytes() != png]
    found += [f'{p} is not the figure in nbs/index.ipynb; fix: make readme' for p in stale]
    return found + [f'README.md links to {p}, which does not exist' for p in dead_links(root, text)]


def write_readme(root: Path) -> None:
    "Write README.md and its figures, and remove figures that it no longer has"
    text, figures = make_readme(root)
    for old in (root/'nbs'/'images').glob('readme_*.png'):
        if old.relative_to(root).as_posix() not in figures:
            old.unlink()
    for path, png in figures.items():
        (root/path).parent.mkdir(exist_ok=True)
        (root/path).write_bytes(png)
    temporary = root/'.README.md.tmp'
    temporary.write_text(text, encoding='utf-8')
    os.replace(temporary, root/'README.md')


def main() -> int:
    "Write README.md, or with --check only compare it"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='write nothing; exit 1 where they differ')
    parser.add_argument('--root', type=Path, default=Path(__file__).parents[1], help='the repository')
    args = parser.parse_args()
    if not args.check:
        write_readme(args.root)
    found = faults(args.root)
    print('\n'.join(found) or 'README.md is what nbs/index.ipynb gives')
    return bool(found)


if __name__ == '__main__':
    sys.exit(main())
