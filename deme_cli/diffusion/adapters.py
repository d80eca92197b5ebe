"""Low-rank adapters on a network, through peft: W x + alpha / r B A x, W frozen (Hu et al. 2022).

What is trained of an expert of low rank, and what its artifact holds: A and B alone, float32, under
the names by which diffusers' `load_lora_weights` takes them, alpha / r in B. A base and any number
of networks with adapters share the base's tensors: each is a skeleton of modules with factors of
its own. So consistency needs no second network, and an ensemble one base.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from deme_cli.artifacts import load_tensors, read_record
from deme_cli.diffusion.denoiser import Denoiser, Weights
from deme_cli.diffusion.lora import LAYERS, low_rank_factors
from deme_cli.errors import ConfigError
from deme_cli.fetch import require_peft
from deme_cli.run_file import RunFile, locate_base

_TRAINED = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])\.default\.weight")


def target_layers(network: nn.Module, targets: str | None, rank: int = 1) -> list[str]:
    """The names of the layers that `targets` means: `attention` (its linear layers; None as well),
    `linear`, `all` (convolutions too), or a glob of names.

    Raises ConfigError where none is meant, with the nearest name, and for a rank above all theirs.
    """
    modules, targets = dict(network.named_modules()), targets or "attention"
    layers = [name for name, one in modules.items() if isinstance(one, LAYERS)]
    linear = [name for name in layers if isinstance(modules[name], nn.Linear)]
    blocks = tuple(
        f"{name}." for name, one in modules.items() if type(one).__name__.endswith("Attention")
    )
    meant = {
        "attention": [name for name in linear if name.startswith(blocks)],
        "linear": linear, "all": layers,
    }  # fmt: skip
    chosen = meant.get(targets, [name for name in layers if fnmatchcase(name, targets)])
    if not chosen:
        ends = (f"*.{name.rpartition('.')[2]}" for name in layers)
        above = (f"{name}.*" for name in modules if name and name not in layers)
        near = difflib.get_close_matches(targets, dict.fromkeys((*layers, *above, *ends, *meant)))
        raise ConfigError(
            f"lora_targets = {targets!r}: no layer of this {type(network).__name__} is meant; "
            f"expected attention, linear, all, or a glob of names as {(near or layers)[0]!r}"
        )
    shapes = [cast(Tensor, modules[name].weight).flatten(1).shape for name in chosen]
    if rank > (most := max(map(min, shapes))):
        raise ConfigError(
            f"lora = {rank}: the layers of lora_targets = {targets!r} have a rank of {most} at "
            f"most; expected less, or train whole weights and leave it out"
        )
    return chosen


def shared_copy(network: nn.Module) -> nn.Module:
    """The network once more: modules of its own, the very tensors of the first."""
    tensors = chain(network.parameters(), network.buffers())
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


def attach_adapters(
    network: nn.Module, layers: Sequence[str], *, rank: int, alpha: float | None = None,
    seed: int = 0,
) -> None:  # fmt: skip
    """Put adapters on `layers`: A drawn from `seed`, B of zeros, so that nothing changes yet.

    alpha: None for the rank. They alone want gradients then, in float32 whatever the network is.
    """
    require_peft()
    import peft

    names = "|".join(map(re.escape, layers))  # else the end of a name would be enough
    config = peft.LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=names)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, network)
    for name, parameter in network.named_parameters():
        if _TRAINED.fullmatch(name):
            parameter.data = parameter.data.float()


def adapter_tensors(trained: Weights, *, scale: float, part: str) -> dict[str, Tensor]:
    """What an artifact holds of the factors, by their names in a network with adapters.

    scale: alpha / r, which goes into B.   part: of the pipeline, unet or transformer.
    """
    held = {}
    for name, tensor in trained.items():
        if match := _TRAINED.fullmatch(name):
            value = tensor * scale if match["side"] == "B" else tensor
            held[f"{part}.{match['layer']}.lora_{match['side']}.weight"] = value
    return held


def open_adapted(
    load: Callable[[Path], Denoiser], run: RunFile | None = None
) -> Callable[[Path], Denoiser]:
    """What loads the experts of one base that hold adapters: each a shared copy of it with theirs.

    load: gives the base of an artifact; called once.
    """
    bases: dict[str, Denoiser] = {}

    def adapted(path: Path) -> Denoiser:
        record = read_record(path, "expert")
        if record.base not in bases:
            bases[record.base] = load(locate_base(path, record.base, run or RunFile(), None))
        base = bases[record.base]
        factors = low_rank_factors(load_tensors(path), record.model_config, str(path))
        rank, network = max(len(pair.down) for pair in factors.values()), shared_copy(base.network)
        attach_adapters(network, list(factors), rank=rank)
        own = dict(network.named_parameters())
        for layer, pair in factors.items():
            for side, value in zip("AB", pair.sides, strict=True):
                held = own[f"{layer}.lora_{side}.default.weight"].data.zero_()
                part = held.narrow("AB".index(side), 0, len(pair.down))  # all, of one rank
                part.copy_(value.view_as(part))
        network.eval().requires_grad_(False)
        return replace(base, network=network, record=record)

    return adapted
