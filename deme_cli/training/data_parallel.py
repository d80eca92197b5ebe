"""Several processes, one expert: each takes its share of every batch, and gradients are added up.

The batch stays that of the whole launch, and so does every random number: a process draws all of
them and looks at the images of its share alone. What an update does therefore depends on the number
of processes by rounding only, and a kept run continues on any number of them.

The network is not wrapped (DistributedDataParallel would hide its config, by which it is called).
Gradients are added up once per update, after accumulation and before clipping, bucket by bucket.
What is lost by that: they travel when the backward pass is over and not while it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from deme_cli.distributed import World
from deme_cli.training.sharding import is_divided, own_part

BUCKET_BYTES = 128 << 20  # copied and sent at a time: the memory that adding up costs


def share_of(num: int, world: World) -> slice:
    """The images of a batch of `num` that this process takes; first ones may take one more."""
    each, more = divmod(num, world.size)
    start = world.rank * each + min(world.rank, more)
    return slice(start, start + each + (world.rank < more))


@torch.no_grad()
def add_up_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Make `.grad` of every parameter the sum over the processes.

    Each one's has to be weighed by its share before. Raises Lost where a process has ended. Of a
    network that is divided, the backward pass has left the mean.
    """
    if world.is_alone:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    if means := [own_part(gradient) for gradient in gradients if is_divided(gradient)]:
        torch._foreach_mul_(means, world.size)
    for bucket in buckets(gradient for gradient in gradients if not is_divided(gradient)):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        world.add_up(flat)
        parts = flat.split([gradient.numel() for gradient in bucket])
        shaped = [part.view_as(gradient) for part, gradient in zip(parts, bucket, strict=True)]
        torch._foreach_copy_(bucket, shaped)


def buckets(tensors: Iterable[Tensor], num_bytes: int = BUCKET_BYTES) -> Iterator[list[Tensor]]:
    """`tensors` by device and dtype, in groups of at most `num_bytes` or of one."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for same in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for tensor in same:
            if bucket and size + tensor.nbytes > num_bytes:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        yield bucket
