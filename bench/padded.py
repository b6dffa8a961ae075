"""The yardstick of bench/speed.py: the same network and features in the plain way, with pandas and padding.

Written from the description of the published recipe, without its code: tables joined in pandas, batches
filled up with zeros to their longest event, a mask for attention and mean. The weights are those of an
`icecube_nb` model, so that both ways must give the same numbers; speed.py checks that before it measures.
"""
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icecube_nb.data.batching import EventBatch
from icecube_nb.physics.detector import TIME_UNIT_NS
from icecube_nb.network.heads import Output
from icecube_nb.network.model import Model


def preprocess(path: Path, sensors: np.ndarray, max_pulses: int = 256) -> tuple[np.ndarray, np.ndarray]:
    "A batch file as the network's nine numbers (N, 9) float32, and offsets (B+1,): all of it in memory."
    pulses = pd.read_parquet(path).reset_index()
    names = ['x', 'y', 'z', 'qe', 'scatter', 'absorp']
    table = pd.DataFrame(sensors, columns=names).assign(sensor_id=np.arange(len(sensors), dtype=np.int16))
    pulses = pulses.merge(table, on='sensor_id', how='left')
    long = pulses[pulses.groupby('event_id')['sensor_id'].transform('size') > max_pulses]
    draw = np.random.default_rng(0).random(len(long)) + long['auxiliary']
    rank = draw.groupby(long['event_id']).rank()
    pulses = pulses.drop(index=rank.index[rank > max_pulses])
    event = pulses.groupby('event_id', sort=False)
    pulses['time'] = (pulses['time'] - event['time'].transform('min'))/TIME_UNIT_NS
    pulses['charge'] = np.log10(pulses['charge'])/3
    pulses['auxiliary'] = pulses['auxiliary'] - 0.5
    features = pulses[['time', 'charge', 'auxiliary', *names]].to_numpy(np.float32)             # (N, 9)
    return features, np.concatenate(([0], np.cumsum(event.size().to_numpy())))


class Padded(nn.Module):
    "A model without vector head and with mean pooling, on padded events and a mask."
    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, mask: Tensor) -> Output: # (B, T, F) and (B, T), True for pulses
        m, x = self.model, self.model.input(x)                                                  # (B, T, D)
        for block in m.blocks:
            q, k, v = block.qkv(block.norm1(x)).unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])  # (B, H, T, D/H)
            x = x + block.project(out.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        pooled = (x*mask[..., None]).sum(1)/mask.sum(1, keepdim=True)                           # (B, D)
        azimuth, zenith = m.azimuth_head(m.azimuth_neck(pooled)), m.zenith_head(m.zenith_neck(pooled))
        return Output(pooled=pooled, azimuth_logits=azimuth, zenith_logits=zenith)


def pad(batch: EventBatch) -> tuple[Tensor, Tensor]: # (B, T, F) and (B, T)
    "Fill events up with zeros to the longest one."
    lengths = batch.offsets.diff()
    mask = torch.arange(int(lengths.max()), device=lengths.device)[None] < lengths[:, None]
    x = torch.zeros(*mask.shape, batch.features.shape[1], device=lengths.device)
    x[mask] = batch.features
    return x, mask


def batches(lengths: np.ndarray, size: int, grouped: bool, seed: int = 0) -> Iterator[np.ndarray]:
    "Event numbers of batches of `size` events: in the order of length, or shuffled."
    rng = np.random.default_rng(seed)
    order = np.argsort(lengths, kind='stable') if grouped else rng.permutation(len(lengths))
    for start in range(0, len(order), size):
        yield order[start:start + size]
