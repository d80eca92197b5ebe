"""Several processes, one expert: each takes its share of every batch, and gradients are added up.

The batch stays that of the whole launch, and so does every random number: a process draws all of
them and looks at the images of its share alone. What an update does therefore depends on the number
of processes by rounding only, and a kept run continues on any number of them.

The network is not wrapped (DistributedDataParallel would hide its config, by which it is called).
Gradients are added up once per update, after accumulation and before clipping, bucket by bucket.
What is lost by that: they travel when the backward pass is over and not while it runs.

A network that does not fit one GPU is divided among the processes: fully sharded data parallelism
(Rajbhandari et al. 2020, ZeRO stage 3; torch's FSDP2). Of every parameter, its gradient, moments
and averages each process holds a slice, and the whole of one block for as long as that block
computes. Files hold whole tensors, so a run goes on divided otherwise, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from deme_cli.artifacts import ArtifactWriter, Record
from deme_cli.distributed import Lost, World
from deme_cli.errors import is_out_of_memory
from deme_cli.files import layout_of, tensor_bytes

if TYPE_CHECKING:  # takes a second, and most runs divide nothing
    from torch.distributed.tensor import DTensor

BUCKET_BYTES = 128 << 20  # copied and sent at a time: the memory that adding up costs
_BLOCKS = (  # diffusers' classes that a network repeats; of nested ones the outermost counts
    "ResnetBlock2D", "Attention", "BasicTransformerBlock",
    "JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock",
    "WanTransformerBlock",
)  # fmt: skip


@torch.no_grad()
def add_up_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Make `.grad` of every parameter the sum over the processes.

    Each one's has to be weighed by its share before. Raises Lost where a process has ended. Of a
    network that is divided, the backward pass has left the mean.
    """
    whole: list[Tensor] = []
    for gradient in (p.grad for p in parameters if p.grad is not None):
        if _is_divided(gradient):
            gradient.to_local().mul_(world.size)
        else:
            whole.append(gradient)
    for bucket in buckets(whole):
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


def shard(network: nn.Module, world: World) -> None:
    """Divide `network` among the processes of `world`, in place, and move it to their devices.

    It is gathered block by block when it is called; what is outside of blocks stays gathered until
    the backward pass is over. Every process has to make the same calls.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    blocks = [name for name, one in network.named_modules() if type(one).__name__ in _BLOCKS]
    for name in blocks:
        if not any(name.startswith(f"{outer}.") for outer in blocks):
            fully_shard(network.get_submodule(name), mesh=mesh)
    fully_shard(network, mesh=mesh)


def _is_divided(tensor: Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "to_local")


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if _is_divided(tensor) else tensor


def whole(tensor: Tensor, world: World) -> Tensor:
    """`tensor` with the slices of all processes, which all have to ask. Raises Lost."""
    if not _is_divided(tensor):
        return tensor
    world.wait()  # where one that has gone is noticed, which the gathering itself may not
    return tensor.full_tensor()


@torch.no_grad()
def put(own: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one of which this process may hold a slice."""
    if _is_divided(own):
        from torch.distributed.tensor import distribute_tensor

        mesh, places = own.device_mesh, own.placements
        value = distribute_tensor(value.to(own.device), mesh, places, src_data_rank=None)
    own_part(own).copy_(own_part(value))


def gather(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors: on the first process all of them, on its processor. Elsewhere none."""
    gathered = {}
    for name, tensor in tensors.items():
        value = whole(tensor, world)
        if world.is_first:
            gathered[name] = value.cpu()
    return gathered


def write_gathered(path: Path, tensors: Mapping[str, Tensor], record: Record, world: World) -> None:
    """Write tensors of which each process may hold slices, gathered one at a time.

    The first process writes; the others have to come along.
    """
    layout = layout_of(tensors)
    if not world.is_first:
        for spec in layout:
            whole(tensors[spec.name], world)
        return
    with ArtifactWriter(path, layout, record) as writer:
        for spec in layout:
            writer.write(tensor_bytes(whole(tensors[spec.name], world)))


@contextmanager
@torch.no_grad()
def holding(network: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the network has `weights`, which are divided like its own if it is.

    What they lack stays as it is.
    """
    state = {name: own for name, own in network.state_dict().items() if name in weights}
    own = {name: tensor.clone() for name, tensor in state.items()}
    for name, tensor in state.items():
        tensor.copy_(weights[name])
    try:
        yield
    finally:
        for name, tensor in state.items():
            tensor.copy_(own[name])
        if reshard := getattr(network, "reshard", None):  # of FSDPModule
            reshard()  # else what lies outside of blocks would stay gathered as it was


@contextmanager
def joint_passes(world: World) -> Iterator[None]:
    """Translate what torch says in a pass through a divided network when a process has gone."""
    try:
        yield
    except RuntimeError as error:
        is_of_launch = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if is_out_of_memory(error) or not is_of_launch:
            raise
        lost = Lost(
            "another process of this launch ended without a word (killed, or out of memory?); "
            "run the same command again to continue from the last checkpoint"
        )
        lost.exit_code = world.failure() or lost.exit_code
        raise lost from error
