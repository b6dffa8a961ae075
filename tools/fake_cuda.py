"""A CUDA card that computes nothing: training runs on it to show what it would make the host wait for.

Fake tensors of torch know shape, dtype and device, and hold no numbers. With the library of fake_cuda.cpp,
autograd, CUDA autocast and GradScaler accept them as CUDA tensors on a CPU build of torch. `Recorder` counts
what passes: operations, waits of the host for the device, copies that block, dtypes that reach attention.

This module has to be imported before torch. It needs a C++ compiler; `why_not` says what is missing.
"""
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

SOURCE = Path(__file__).with_name('fake_cuda.cpp')
PACKAGE = Path(__file__).resolve().parents[1]/'icecube_nb'


def why_not() -> str:
    "Why there can be no fake card here; '' if there can be."
    if sys.platform != 'linux':
        return f'the fake card is made for Linux, not {sys.platform}'
    return '' if shutil.which('g++') else 'g++ is not installed'


def build_library() -> Path:
    "Compile the guard and the hooks, once for each version of torch and of the source."
    torch_folder = Path(find_spec('torch').origin).parent
    key = hashlib.blake2b(SOURCE.read_bytes() + version('torch').encode(), digest_size=8).hexdigest()
    target = Path(tempfile.gettempdir())/f'fake_cuda_{os.getuid()}_{key}.so'
    if not target.exists():
        include, library = torch_folder/'include', torch_folder/'lib'
        part = target.with_suffix(f'.{os.getpid()}')
        subprocess.run(['g++', '-shared', '-fPIC', '-O0', '-std=c++20', SOURCE, '-o', part, f'-I{include}',
                        f'-I{include}/torch/csrc/api/include', f'-L{library}', '-ltorch_cpu', '-lc10',
                        f'-Wl,-rpath,{library}'], check=True, capture_output=True)
        part.rename(target)
    return target


if not why_not():
    if 'torch' in sys.modules:
        raise ImportError('import fake_cuda before torch')
    ctypes.CDLL(str(build_library()))

import torch                                                                    # noqa: E402
import torch.cuda.amp.common                                                    # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode                        # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode                      # noqa: E402

WAITS = {'_local_scalar_dense', 'nonzero', 'masked_select', '_unique2', 'unique_dim', 'unique_consecutive',
         'equal'}
COPIES = {'_to_copy', 'copy_', '_copy_from', '_copy_from_and_resize'}
KERNELS = {'_scaled_dot_product_flash_attention', '_scaled_dot_product_efficient_attention', '_varlen_attn',
           '_efficient_attention_forward', '_flash_attention_forward'}


def place_in_package() -> str:
    "File and line of the package that led here."
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(f'{PACKAGE}/'):
            return f'{frame.filename[len(str(PACKAGE)) + 1:]}:{frame.lineno}'
    return 'outside the package'


class Recorder(TorchDispatchMode):
    "Counts what runs on the card."
    def __init__(self):
        super().__init__()
        self.operations, self.waits, self.blocking, self.kernels = Counter(), Counter(), Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        on_card = any(x.device.type == 'cuda' for x in tensors)
        if not func.is_view:
            self.operations[name] += 1
        if name in KERNELS:
            self.kernels[(name, *(str(x.dtype) for x in tensors[:3]))] += 1
        if name in COPIES:
            self.look_at_copy(name, args, kwargs)
        if on_card and name in WAITS or name == 'repeat_interleave' and kwargs.get('output_size') is None:
            self.waits[f'{name} at {place_in_package()}'] += 1
        if on_card and name in ('index', 'index_put', 'index_put_', '_index_put_impl_'):
            if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
                self.waits[f'mask as index at {place_in_package()}'] += 1
        if name == '_local_scalar_dense':
            return 1.0 if args[0].is_floating_point() else 1    # a fake number, so that the run goes on
        return func(*args, **kwargs)

    def look_at_copy(self, name: str, args: tuple, kwargs: dict) -> None:
        "A copy between card and host blocks unless it says that it does not."
        source = args[1] if name == 'copy_' else args[0]
        target = args[0].device if name == 'copy_' else kwargs.get('device') or source.device
        kinds = source.device.type, torch.device(target).type
        without_waiting = kwargs.get('non_blocking', len(args) > 2 and args[2] is True)
        if kinds[0] != kinds[1] and not without_waiting:
            self.blocking[f'{kinds[0]} to {kinds[1]} at {place_in_package()}'] += 1


@contextmanager
def fake_card(capability: tuple[int, int] = (8, 0), name: str = 'NVIDIA A100'):
    "Everything inside sees one CUDA card, and tensors without numbers."
    free, cuda = 80 * 10**9, 'torch.cuda.'
    stand_ins = {
        cuda + 'amp.common.amp_definitely_not_available': lambda: False, cuda + 'is_available': lambda: True,
        cuda + 'get_device_capability': lambda device=None: capability,
        cuda + 'get_device_name': lambda device=None: name,
        cuda + 'mem_get_info': lambda device=None: (free, free), cuda + 'empty_cache': lambda: None,
        cuda + 'is_bf16_supported': lambda *_, **__: capability >= (8, 0),
        cuda + 'device_count': lambda: 1, cuda + 'current_device': lambda: 0,
        'torch.nn.Module.to': lambda module, *_, **__: module}         # modules are made on the card at once
    with ExitStack() as stack:
        for target, value in stand_ins.items():
            stack.enter_context(patch(target, value))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
