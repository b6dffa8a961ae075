"""Training steps, validation and dumps of each preset and precision on a card that computes nothing.

    python tools/fake_training.py [--with-item] [--set SETTING=VALUE ...] [PRESET ...]

Writes a JSON list: for each preset and precision the operations of a step, and what made the host wait for
the card. `--with-item` reads a number from the card in each step, as a step must not; the count has to see
it. Without a C++ compiler the list holds the reason instead.
"""
import argparse
import json
import sys
from contextlib import ExitStack, nullcontext
from unittest.mock import patch

import fake_cuda

if fake_cuda.why_not():
    print(json.dumps([{'skipped': fake_cuda.why_not()}]))
    sys.exit()

import numpy as np                                                              # noqa: E402
import torch                                                                    # noqa: E402
from torch.overrides import handle_torch_function, has_torch_function           # noqa: E402

from icecube_nb.core.config import PRESETS, override, preset                    # noqa: E402
from icecube_nb.data.batching import EventBatch                                 # noqa: E402
from icecube_nb.data.pulses import feature_names                                # noqa: E402
from icecube_nb.inference.predict import Predictor, answer_one_batch            # noqa: E402
from icecube_nb.training import step as training_step                           # noqa: E402
from icecube_nb.training.loop import answer_batches                             # noqa: E402
from icecube_nb.training.state import new_state                                 # noqa: E402

EVEN = np.arange(128)/128
ANGLE_BINS = {'azimuth_edges': 2*np.pi*EVEN, 'azimuth_centres': 2*np.pi*(EVEN + 1/256),
              'zenith_edges': np.arccos(1 - 2*EVEN), 'zenith_centres': np.arccos(1 - 2*(EVEN + 1/256))}
LENGTHS = np.array([5, 5, 8, 13, 13, 40])
SAME_CODE = {'laptop', 'large', 'medium_long', 'large_long'}                   # as `deep` and `medium`
AVERAGED = {'train.average_decay': 0.99, 'train.clip_norm': 1.0}
CHANGES = {
    'deep': {},
    'medium': {
        'train.average_decay': 0,
        'train.average_tail': 0.5,
        'train.muon_variance': 0.9,
        'train.muon_weight_decay': 0.1,
    },
}  # and `AVERAGED` for the others


def sdpa(query, key, value, **_):
    "What torch's fused attention becomes on a card."
    if has_torch_function((query, key, value)):
        return handle_torch_function(torch.nn.functional.scaled_dot_product_attention, (query, key, value),
                                     query, key, value)
    if torch.is_autocast_enabled('cuda'):
        query, key, value = (x.to(torch.get_autocast_dtype('cuda')) for x in (query, key, value))
    if query.dtype == torch.float32:
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def fake_batch(features: int) -> EventBatch: # on the fake card
    "Six events."
    rows, events = int(LENGTHS.sum()), len(LENGTHS)
    offsets = torch.empty(events + 1, dtype=torch.int64, device='cuda')
    angles = torch.empty(2, events, device='cuda')
    rows_of_pulses = torch.empty(rows, features, device='cuda')
    return EventBatch(rows_of_pulses, offsets, *angles, np.arange(events), LENGTHS)


def empty_array(tensor: torch.Tensor, *_, **__) -> np.ndarray:
    "An array in place of a fake tensor's numbers."
    return np.zeros(tuple(tensor.shape))


def record(name: str, precision: str, over: dict) -> dict:
    "Two steps and a validation; the second step is looked at."
    settings = {'train.precision': precision, 'model.layers': 2} | over         # layers are alike
    config = override(preset(name), settings)
    batch = fake_batch(len(feature_names(config.model.features)))
    with torch.device('cuda'):
        state = new_state(config, ANGLE_BINS, 'cuda')
    # late losses hold, if there are any
    state.done = 0.95
    with fake_cuda.Recorder():
        training_step.train_step(state, [batch]*2, 1e-3)                        # makes the optimiser's state
    with fake_cuda.Recorder() as step:
        training_step.train_step(state, [batch]*2, 1e-3)
    with fake_cuda.Recorder() as watched:
        training_step.train_step(state, [batch], 1e-3, watch=True)
    with torch.no_grad(), fake_cuda.Recorder() as validation:
        answer_batches(state, [batch]*2)
    predictor = Predictor(state.eval_model, config, state.bins, state.device, precision, 'fake')
    with patch('torch.Tensor.numpy', empty_array), fake_cuda.Recorder() as dump:
        answer_one_batch(predictor, batch, 'mean_vector', dump=True)
    seen = {'preset': name, 'precision': precision, 'attention': state.model.backend,
            'operations': sum(step.operations.values())}
    for part, recorder in (('step', step), ('watched step', watched), ('validation', validation)):
        seen[part] = [*recorder.waits, *recorder.blocking]
    seen['dump'] = [*dump.waits]
    seen['answers read'] = [*dump.blocking]
    seen['kernels'] = sorted({' '.join(kernel) for kernel in step.kernels})
    seen['mixed dtypes'] = [kernel for kernel in step.kernels if len(set(kernel[1:])) > 1]
    return seen


def with_item(state, norm, events, count=training_step.count_step):
    "A step that asks for a number."
    norm.item()
    count(state, norm, events)


def main() -> None:
    "Print what was recorded."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('presets', nargs='*', default=[name for name in PRESETS if name not in SAME_CODE])
    parser.add_argument('--with-item', action='store_true')
    parser.add_argument(
        '--set', action='append', default=[], dest='settings', help='a setting, such as model.layers=3'
    )
    options, found = parser.parse_args(), []
    cards = (((8, 0), 'NVIDIA A100', ('fp16', 'bf16', 'fp32')), ((7, 5), 'Tesla T4', ('fp16', 'fp32')))
    with ExitStack() as stack:
        stack.enter_context(patch('torch.nn.functional.scaled_dot_product_attention', sdpa))
        stack.enter_context(patch('icecube_nb.network.attention.trial_fault', lambda *_: ''))
        stack.enter_context(patch('torch.Tensor.pin_memory', lambda x: x))
        if options.with_item:
            stack.enter_context(patch('icecube_nb.training.step.count_step', with_item))
        for name in options.presets:
            for capability, card, precisions in cards:
                for precision in precisions:
                    with fake_cuda.fake_card(capability, card):
                        over = {} if name == 'deep' else {'train.average_decay': 0.99, 'train.clip_norm': 1.0}
                        over |= dict(setting.split('=', 1) for setting in options.settings)
                        found.append({'card': card} | record(name, precision, over))
    print(json.dumps(found, indent=1))


if __name__ == '__main__':
    main()
