"""Install icecube_nb: everything that is said here is read from settings.ini, as nbdev does."""
import atexit
import os
import shutil
import tempfile
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
LICENCES = {'apache2': 'Apache-2.0'}                        # nbdev's name -> SPDX name
NOTEBOOKS = 'icecube_nb.notebooks'                          # those for Kaggle, which a bundle holds
STATUSES = {'3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}


def read_settings() -> dict[str, str]:
    "The settings of settings.ini, by name"
    parser = ConfigParser(delimiters=['='])
    parser.read(HERE/'settings.ini', encoding='utf-8')
    return dict(parser['DEFAULT'])


def readme() -> str:
    "The text of README.md, which `make readme` makes from nbs/index.ipynb"
    path = HERE/'README.md'
    return path.read_text(encoding='utf-8') if path.exists() else ''


def build_options() -> dict[str, dict[str, str]]:
    "Where the build keeps its own files: beside the sources, or elsewhere if these cannot be written to."
    if os.access(HERE, os.W_OK):
        return {}
    elsewhere = tempfile.mkdtemp(prefix='icecube-nb-build-')
    atexit.register(shutil.rmtree, elsewhere, ignore_errors=True)
    return {'egg_info': {'egg_base': elsewhere}, 'build': {'build_base': elsewhere}}


cfg = read_settings()
setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'],
    license=LICENCES[cfg['license']],
    long_description=readme(), long_description_content_type='text/markdown',
    classifiers=[
        f"Development Status :: {STATUSES[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Astronomy',
    ],
    packages=[*find_packages(include=[cfg['lib_path'], f"{cfg['lib_path']}.*"]), NOTEBOOKS],
    package_dir={NOTEBOOKS: 'kaggle'},
    package_data={cfg['lib_path']: ['event_page/*'],
                  f"{cfg['lib_path']}.physics": ['detectors/*/*.csv', 'detectors/*/*.txt'],
                  NOTEBOOKS: ['*.ipynb']},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': (cfg['dev_requirements'] + ' ' + cfg['export_requirements']).split(),
                    'export': cfg['export_requirements'].split(),
                    'flash': cfg['flash_requirements'].split(),
                    'skymap': cfg['skymap_requirements'].split()},
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    options=build_options(),
    zip_safe=False,
)
