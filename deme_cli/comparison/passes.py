"""What training costs in floating-point operations, counted on one image and scaled.

Counted are the multiplications and additions of convolutions, matrix products and attention in the
denoiser and in the frozen base (`torch.utils.flop_counter`), which is nearly all there is; not the
optimizer, the moving averages, or the frozen VAE and text encoders. Counted once per base, and kept
in the folder of the comparison.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deme_cli.config import DataConfig, FinetuneConfig
from deme_cli.diffusion.execution import forward_flops
from deme_cli.files import write_whole
from deme_cli.timesteps import RangeChoice, parse_span
from deme_cli.training.objective import expert_losses
from deme_cli.training.setup import Plan, Run, prepare
from deme_cli.training.state import open_networks

if TYPE_CHECKING:
    from deme_cli.comparison.jobs import Stage

_NAME = "passes.json"


@dataclass(frozen=True)
class PassCost:
    """FLOPs of one image: through the network forward, backward, and through the base."""

    forward: int
    backward: int
    base: int


def passes_of(stage: Stage, projections: Sequence[str]) -> dict[str, PassCost]:
    """The costs of one image through `stage`'s base, by placement of the projection."""
    kept = _read(stage)
    missing = [one for one in projections if one not in kept]
    if missing:
        kept |= _count(stage, missing)
        document = {
            "base": stage.fingerprint,
            "data": dict(stage.tables.get("data", {})),
            "passes": {name: asdict(passes) for name, passes in kept.items()},
        }
        write_whole(stage.folder / _NAME, [json.dumps(document, indent=1).encode()])
    return kept


def _read(stage: Stage) -> dict[str, PassCost]:
    """What was counted before of this base and data; {} where nothing was."""
    try:
        document = json.loads((stage.folder / _NAME).read_text())
        same = document["base"] == stage.fingerprint
        same = same and document["data"] == dict(stage.tables.get("data", {}))
        return {n: PassCost(**v) for n, v in document["passes"].items()} if same else {}
    except (OSError, ValueError, KeyError, TypeError):  # not there, or of another version
        return {}


def _count(stage: Stage, projections: Sequence[str]) -> dict[str, PassCost]:
    """Count on the CPU, on one image; consistency is on, so that the base is counted, too."""
    settings = FinetuneConfig(consistency=1.0, held_out=0, cache="off", batch_size=1)
    ranges = next(iter(stage.ranges.values()))
    whole = parse_span(f"0:{ranges[-1].split(':')[1]}", "range")
    plan = Plan(
        stage.base, DataConfig(**stage.tables.get("data", {})), settings,
        Path("unused.safetensors"), RangeChoice(whole, 1, 1), device="cpu",
        pipeline=stage.tables.get("model", {}).get("pipeline"),
    )  # fmt: skip
    run = prepare(plan)
    return {
        name: count_passes(replace(run, config=replace(settings, projection=name)))
        for name in projections
    }


def count_passes(run: Run) -> PassCost:
    """Count the passes of `run`'s networks on its first training image.

    The base counts also where this run does not ask it.
    """
    network, schedule = open_networks(run)[0], run.denoiser.schedule
    x0, conditions = run.examples.draw([0], flip=None, generator=None)
    x0, first = x0.float().cpu(), schedule.indices(run.choice.range).start
    forward = forward_flops(network, x0, conditions)
    base = 0 if run.from_scratch else forward_flops(run.denoiser.network, x0, conditions)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses = expert_losses(
            network, None, schedule, x0=x0, eps=torch.zeros_like(x0), t=torch.tensor([first]),
            conditions=conditions, consistency=0.0,
        )  # fmt: skip
        losses.total.mean().backward()
    return PassCost(forward, counter.get_total_flops() - forward, base)


def flops_per_update(config: FinetuneConfig, passes: PassCost) -> float:
    """One optimizer update of `config`, on average over the run.

    Gradients of k clusters cost k backward passes through the whole batch, in every update (pcgrad)
    or in the first batch of every `multitask_every`-th (nashmtl).
    """
    images = config.batch_size * config.accumulation
    backwards = float(config.accumulation)
    if config.multitask == "pcgrad":
        backwards *= config.clusters
    elif config.multitask == "nashmtl":
        backwards += (config.clusters - 1) / config.multitask_every
    base = passes.base * images if config.consistency else 0
    return passes.forward * images + passes.backward * config.batch_size * backwards + base
