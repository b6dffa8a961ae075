"""Directions of neutrinos from IceCube pulses.

`simulate`, `prepare`, `train`, `predict` and `evaluate` are the path from events to a score. They are loaded
when they are first used, so `import icecube_nb` needs neither torch nor time.
"""
import os
from collections.abc import Callable
from functools import partial
from importlib import import_module

from . import old_names

__version__ = "0.2.0"

# Threads of OpenMP that wait for each other sleep. By default they spin: two processes with two threads each, on two
# cores, are then eight times slower. OpenMP reads this once, when torch is loaded; a value that is set stays.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

_FUNCTIONS = {                          # name here -> module and name there
    'simulate': ('physics.simulate', 'write_dataset'),
    'prepare': ('data.prepare', 'prepare'),
    'train': ('training.loop', 'train'),
    'predict': ('inference.predict', 'predict'),
    'evaluate': ('inference.evaluate', 'score_submission'),
}


def _function(name: str) -> Callable:
    "One of `_FUNCTIONS`, imported."
    module, function = _FUNCTIONS[name]
    return getattr(import_module(f'{__name__}.{module}'), function)


def __getattr__(name: str) -> Callable:
    "Import one of `_FUNCTIONS` when it is asked for; some were modules in version 0.1, and are still both."
    if name not in _FUNCTIONS:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}; it offers {", ".join(_FUNCTIONS)}')
    return import_module(f'{__name__}.{name}') if name in old_names.OLD_MODULES else _function(name)


def __dir__() -> list[str]:
    "What `dir(icecube_nb)` and completion show."
    return sorted([*globals(), *_FUNCTIONS])


old_names.install({name: partial(_function, name) for name in _FUNCTIONS})
