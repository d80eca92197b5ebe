"""What a network is told besides x_t and t: text embeddings, class numbers, sizes.

Tensors by the network's own keyword, batched on the first dimension; {} for an unconditional model.
A *null* is the condition of "nothing said" (an empty prompt, the null class), with batch 1, for
classifier-free guidance (Ho & Salimans 2022) and for leaving captions out in training. It may lack
keys (sizes, for one): those stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Conditions = dict[str, Tensor]


def select(conditions: Mapping[str, Tensor], indices: Sequence[int]) -> Conditions:
    """The conditions of these members of the batch."""
    return {name: value[list(indices)] for name, value in conditions.items()}


def concatenate(*parts: Mapping[str, Tensor]) -> Conditions:
    """Batches with the same keys, one after another."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def to(conditions: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> Conditions:
    """The conditions on `device`; floats in `dtype`, whole numbers as they are."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
        for name, value in conditions.items()
    }


def null_like(conditions: Mapping[str, Tensor], null: Mapping[str, Tensor]) -> Conditions:
    """`conditions` with everything that `null` speaks of replaced by it, for the whole batch."""
    return {
        name: null[name].to(value).expand_as(value) if name in null else value
        for name, value in conditions.items()
    }


def fill_null(
    conditions: Mapping[str, Tensor], null: Mapping[str, Tensor], dropped: Tensor
) -> Conditions:
    """`conditions` with the members where `dropped` (B,) is true replaced by the null."""
    silent = null_like(conditions, null)
    return {
        name: torch.where(
            dropped.to(value.device).view(-1, *[1] * (value.ndim - 1)), silent[name], value
        )
        for name, value in conditions.items()
    }
