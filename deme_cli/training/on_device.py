"""Data where the network is: decoded images, batches and tables of the schedule on a GPU.

A copy from ordinary memory makes the processor wait until the GPU has done all that it was given
before; one from pinned memory does not.
N images, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from deme_cli.data.images import KEEP_BYTES, ImageData
from deme_cli.diffusion.schedule import FlowSchedule, Schedule

_SHARE = 0.2  # of the memory that is free before the first update, for images
_CHUNK = 4096  # images copied at a time


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting for a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def schedule_on(schedule: Schedule, device: torch.device) -> Schedule:
    """`schedule` with its table on a GPU, so that looking up draws there copies nothing.

    In float32, as the images that it is applied to: Apple's GPUs have no float64.
    """
    if device.type == "cpu":
        return schedule
    if isinstance(schedule, FlowSchedule):
        return replace(schedule, sigmas=schedule.sigmas.float().to(device))
    return replace(schedule, alphas_cumprod=schedule.alphas_cumprod.float().to(device))


def has_room(num_bytes: int, device: torch.device) -> bool:
    """Whether images of this size may lie on a GPU for as long as a run takes."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + cached  # of the range trained before, for one
    return num_bytes <= min(KEEP_BYTES, _SHARE * free)


class ResidentImages:
    """All images of `data`, uint8 (N, C, H, W), on `device`."""

    def __init__(self, data: ImageData, device: torch.device) -> None:
        self.images = torch.empty((len(data), *data.shape), dtype=torch.uint8, device=device)
        for start in range(0, len(data), _CHUNK):
            numbers = range(start, min(start + _CHUNK, len(data)))
            self.images[start : numbers.stop] = data.batch(numbers).to(device)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Images by their number: uint8 (B, C, H, W), on the device."""
        return self.images[send(torch.as_tensor(indices, dtype=torch.long), self.images.device)]
