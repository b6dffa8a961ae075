"""Make a plain web site of the notebooks, to look at without quarto (`make site`), and check its links.

The site that is published is made by quarto in CI (`nbdev_docs`). This one shows the same pages in the same
order: `#| hide` drops a cell, `#| echo: false` its code, and links between notebooks become links between
pages. Nothing is executed.
"""
import argparse
import html
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
import readme
import repo_checks
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

LINK = re.compile(r'(href=")(?!\w+:|#)([^"#]+)\.ipynb(#[^"]*)?(")')
ANY_LINK = re.compile(r'(?:href|src)="(?!\w+:|#)([^"#?]+)')
FORMULAS = """<script>MathJax = {tex: {inlineMath: [["$", "$"]]}}</script>
<script async src="https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-mml-chtml.js"></script>"""
STYLE = """
body { margin: 0; font: 16px/1.55 system-ui, sans-serif; color: #222; display: flex; }
nav { width: 15rem; flex: none; padding: 1rem; font-size: .85rem; background: #f5f6f8; height: 100vh;
      overflow: auto; position: sticky; top: 0; box-sizing: border-box; }
nav a { display: block; padding: .1rem 0; color: #245; text-decoration: none; }
nav a.here { font-weight: bold; }
main { max-width: 61rem; padding: 1rem 2.5rem; min-width: 0; }
pre { overflow-x: auto; font-size: .82rem; line-height: 1.4; padding: .5rem .7rem; background: #f7f7f7; }
table { border-collapse: collapse; font-size: .83rem; display: block; width: fit-content;
        max-width: 100%; overflow-x: auto; }
td, th { padding: .2rem .35rem; border-bottom: 1px solid #ddd; }
td[style*="right"] { white-space: nowrap; } .output_stream pre { white-space: pre-wrap; }
img { max-width: 100%; } blockquote { color: #555; font-size: 1.1rem; margin-left: 0; }
.anchor-link, .prompt { display: none; }
"""


def pages_in_order(root: Path) -> list[Path]:
    "The notebooks in reading order: the index, the main line, the appendix"
    found = repo_checks.notebooks(root)
    return sorted(found, key=lambda path: (path.stem != 'index', path.parent.name == 'appendix', path.name))


def page_body(path: Path, folder: Path) -> str: # folder: nbs
    "The HTML of one notebook, as its readers see it"
    nb = nbformat.read(path, as_version=4)
    nb.cells = [cell for cell in nb.cells if shown(cell)]
    for cell in nb.cells:
        if cell.cell_type == 'code':
            flags = readme.directives(cell.source)
            cell.outputs = [] if flags.get('output') == 'false' else readme.shown_outputs(cell)
            cell.source = readme.DIRECTIVE.sub('', cell.source).strip()
            if flags.get('echo') == 'false':
                cell.metadata['transient'] = {'remove_source': True}
    body, _ = HTMLExporter(template_name='basic').from_notebook_node(nb)
    def to_page(found: re.Match) -> str:
        if not (path.parent/found[2]).resolve().is_relative_to(folder):
            return found[0]                                     # a notebook outside nbs has no page
        return f'{found[1]}{found[2]}.html{found[3] or ""}{found[4]}'
    return LINK.sub(to_page, body)


def shown(cell) -> bool:
    "Whether the site shows a cell"
    if cell.cell_type != 'code':
        return cell.cell_type == 'markdown'
    flags = readme.directives(cell.source)
    return not {'hide', 'default_exp'} & flags.keys() and flags.get('include') != 'false'


def navigation(root: Path, pages: list[Path], here: Path) -> str:
    "The list of pages, seen from one of them"
    up = '../' * (len(here.relative_to(root/'nbs').parts) - 1)
    links, appendix = [], False
    for page in pages:
        name = page.relative_to(root/'nbs').with_suffix('.html').as_posix()
        if name.startswith('appendix') and not appendix:
            links.append('<p><b>Appendix</b></p>')
            appendix = True
        mark = ' class=here' if page == here else ''
        links.append(f'<a href="{up}{name}"{mark}>{html.escape(page.stem)}</a>')
    return '\n'.join(links)


def write_site(root: Path, out: Path) -> list[Path]:
    "Write a page for each notebook, and return the pages"
    pages, written = pages_in_order(root), []
    style = STYLE + HtmlFormatter().get_style_defs('.highlight')
    for page in pages:
        target = out/page.relative_to(root/'nbs').with_suffix('.html')
        target.parent.mkdir(parents=True, exist_ok=True)
        head = (f'<meta charset="utf-8"><title>{html.escape(page.stem)}</title>{FORMULAS}'
                f'<style>{style}</style>')
        body = f'<nav>{navigation(root, pages, page)}</nav><main>{page_body(page, root/"nbs")}</main>'
        target.write_text(f'<!doctype html>{head}{body}', encoding='utf-8')
        written.append(target)
    return written


def dead_links(root: Path, out: Path, pages: list[Path]) -> list[str]:
    "Links that lead to no page of the site and to no file of the repository"
    found = []
    for page in pages:
        beside = root/'nbs'/page.relative_to(out)               # where the notebook of this page lies
        for target in set(ANY_LINK.findall(page.read_text(encoding='utf-8'))):
            name = unquote(html.unescape(target))
            if not (page.parent/name).exists() and not (beside.parent/name).exists():
                found.append(f'{page.relative_to(out)} links to {name}, which is not there')
    return sorted(found)


def main() -> int:
    "Write the site and check its links; the exit status is 1 if one is dead"
    parser = argparse.ArgumentParser(description='Make a plain web site of the notebooks, check its links.')
    here = Path(__file__).resolve().parents[1]
    parser.add_argument('--out', type=Path, default=here/'_site', help='the folder to write')
    parser.add_argument('--root', type=Path, default=here, help=argparse.SUPPRESS)
    args = parser.parse_args()
    pages = write_site(args.root.resolve(), args.out.resolve())
    found = dead_links(args.root.resolve(), args.out.resolve(), pages)
    print('\n'.join([*found, f'{len(pages)} pages in {args.out}, {len(found)} dead links']))
    return bool(found)


if __name__ == '__main__':
    sys.exit(main())
