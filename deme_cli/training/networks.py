"""The two networks of a run: the one under training, with its projections, and the frozen base.

In half precision (autocast) the weights under training stay float32. The base's would be cast anew
at every forward, for autocast remembers only casts of weights that get gradients: what it would
cast is therefore held in half precision, of which the outputs are the same to the last bit.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from deme_cli.artifacts import fingerprint
from deme_cli.diffusion.conditions import Conditions, to
from deme_cli.diffusion.denoiser import TORCH_DTYPES, kept_in_float32
from deme_cli.diffusion.projection import attach_projections
from deme_cli.diffusion.threads import fitting_number
from deme_cli.errors import ConfigError
from deme_cli.training.run import Run


class _Float32Linear(nn.Linear):
    """Computes in float32 within autocast, too: of what diffusers keeps in float32."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


_CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # by autocast, on every device


def open_networks(run: Run) -> tuple[nn.Module, nn.Module | None]:
    """The network to train, with projections, and the frozen base (None where no loss asks it).

    Raises ConfigError where gradient checkpointing is asked of a network that has none.
    """
    network = copy.deepcopy(run.denoiser.network).train().requires_grad_(True)
    if run.config.gradient_checkpointing:
        checkpoint_gradients(network)
    attach_projections(network, run.config.projection)
    network.to(run.denoiser.device)
    return network, run.denoiser.network if run.config.consistency else None


def fitting_threads(run: Run) -> int:
    """Threads on a processor for the passes of the images that go through at a time."""

    def inputs() -> tuple[Tensor, Conditions]:
        x0, conditions = run.examples.draw([0], flip=None, generator=None)
        return x0.float(), to(conditions, x0.device, torch.float32)

    num_images = run.config.micro_batch or run.config.batch_size
    return fitting_number(run.denoiser.network, inputs, num_images=num_images)


def checkpoint_gradients(network: nn.Module) -> None:
    """Let `network` compute its blocks' activations again instead of keeping them."""
    from diffusers.models import ModelMixin

    assert isinstance(network, ModelMixin)
    try:
        network.enable_gradient_checkpointing()
    except ValueError as error:
        raise ConfigError(
            f"gradient_checkpointing: {type(network).__name__} does not support it; leave it out, "
            f"and use --micro-batch or --dtype bf16 for less memory"
        ) from error


def for_precision(
    run: Run, network: nn.Module, base: nn.Module | None
) -> tuple[nn.Module, nn.Module | None]:
    """The networks as they run fastest in the run's precision.

    In half precision the base that is run becomes a copy (unless it is to be divided), and on a GPU
    the denoiser's own network moves to the processor; convolutions there keep their channels last,
    the order in which tensor cores take them (weights on disk are the same).
    """
    half, device = TORCH_DTYPES[run.dtype], run.denoiser.device
    if half == torch.float32:
        return network, base
    for one in (network, base):
        if one is not None:
            keep_in_float32(one)
    if base is not None:
        original, base = base, hold_in(base if run.shard else copy.deepcopy(base), half)
        if device.type == "cuda":
            original.cpu()
    for one in (network, base) if device.type == "cuda" else ():
        if one is not None and is_convolutional(one):
            one.to(memory_format=torch.channels_last)
    return network, base


def hold_in(network: nn.Module, half: torch.dtype) -> nn.Module:
    """`network` with the weights that autocast casts held in `half`; norms stay as they are."""
    for module in network.modules():
        if isinstance(module, _CAST) and not isinstance(module, _Float32Linear):
            module.to(half)
    return network


def keep_in_float32(network: nn.Module) -> None:
    """Let the linear layers that diffusers keeps in float32 compute so within autocast."""
    kept = kept_in_float32(network)
    for name, module in network.named_modules():
        if type(module) is nn.Linear and not kept.isdisjoint(name.split(".")):
            module.__class__ = _Float32Linear


def is_convolutional(network: nn.Module) -> bool:
    """Whether it works on maps: a transformer has one convolution at most, which cuts patches."""
    return sum(isinstance(module, nn.Conv2d) for module in network.modules()) > 1


def require_unchanged(run: Run, base: nn.Module | None) -> None:
    """Assert that what the run started from is still what the record names, where it is whole."""
    if run.shard:
        return
    original = run.denoiser.network.state_dict()
    assert fingerprint(original) == run.denoiser.record.fingerprint, "the frozen base was changed"
    if base is not None and base is not run.denoiser.network:
        for name, tensor in base.state_dict().items():
            same = torch.equal(original[name].to(tensor.dtype), tensor.to(original[name].device))
            assert same, f"the frozen base was changed: {name}"
