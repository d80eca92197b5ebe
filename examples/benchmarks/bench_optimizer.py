"""One update of AdamW and the moving average as `deme finetune` makes it, against plain loops.

    python examples/benchmarks/bench_optimizer.py [--rounds 7] [--device cpu]

Ways, each with its own copy of the same network, the same gradients, clipping to norm 1:

    loops       torch.optim.AdamW(foreach=False, fused=False), clipping tensor by tensor, and the
                average as a Python loop of `mul_` and `add_`
    diffusers   the same, with diffusers' EMAModel as its training examples use it
    deme        `TrainingState.update`

on the embedded digits U-Net (many small tensors) and on google/ddpm-cifar10-32's shape (35.7 M
parameters, bound by memory). For the latter the bytes that any update must move are counted as
well: AdamW reads p, g, m, v and writes p, m, v; the average reads p, s and writes s; 40 bytes per
parameter in float32, held against what this machine moves when it adds two long vectors. After
the rounds the weights and averages of all ways are compared. Target: loops / deme >= 2.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diffusers.training_utils import EMAModel
from random_models import ddpm_cifar10, random_denoiser
from rounds import machine, ratios, spread, timed_rounds, verdict
from torch import Tensor, nn

from deme_cli.config import FinetuneConfig
from deme_cli.data.digits import BASE_PATH
from deme_cli.diffusion.denoiser import Denoiser, load_denoiser
from deme_cli.training.state import TrainingState
from deme_cli.training.weighting import Reduction

CONFIG = FinetuneConfig()
BYTES_PER_PARAMETER = 40
Update = Callable[[], None]


def networks_of(denoiser: Denoiser, count: int) -> list[nn.Module]:
    import copy

    return [copy.deepcopy(denoiser.network).train().requires_grad_(True) for _ in range(count)]


def deme_way(network: nn.Module, denoiser: Denoiser) -> tuple[Update, list[Tensor]]:
    """What `deme finetune` does between two batches, and its moving average."""
    state = TrainingState(network, Reduction(CONFIG, denoiser.schedule), CONFIG, scale_loss=False)
    return state.update, list(state.averages[None].values())


def plain_way(network: nn.Module, *, ema: str) -> tuple[Update, list[Tensor]]:
    """The update as a notebook has it, and its moving average."""
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=CONFIG.lr, betas=(CONFIG.beta1, CONFIG.beta2),
        weight_decay=CONFIG.weight_decay, foreach=False, fused=False,
    )  # fmt: skip
    average = EMAModel(parameters, decay=CONFIG.ema_decay, use_ema_warmup=True, power=0.75)
    shadow, step = average.shadow_params, 0

    def update() -> None:
        nonlocal step
        torch.nn.utils.clip_grad_norm_(parameters, CONFIG.grad_clip, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
        if ema == "diffusers":
            average.step(parameters)
            return
        step += 1
        decay = average.get_decay(step)
        with torch.no_grad():
            for s, p in zip(shadow, parameters, strict=True):
                s.mul_(decay).add_(p, alpha=1 - decay)

    return update, shadow


def repeated(
    network: nn.Module, gradients: list[Tensor], update: Update, updates: int
) -> Callable[[], None]:
    """`updates` updates from these gradients, put back each time, for an update drops them."""
    device = gradients[0].device

    def run() -> None:
        for _ in range(updates):
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                parameter.grad = gradient
            update()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def bytes_per_second(device: torch.device) -> float:
    """What this machine moves: c = a + b of 64 M floats, two reads and a write."""
    a, b, c = (torch.zeros(1 << 26, device=device) for _ in range(3))

    def add() -> None:
        torch.add(a, b, out=c)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds = timed_rounds({"add": add}, 5)["add"]
    return 3 * a.numel() * a.element_size() / statistics.median(seconds)


def compare(label: str, denoiser: Denoiser, updates: int, rounds: int) -> None:
    networks = dict(zip(("loops", "diffusers", "deme"), networks_of(denoiser, 3), strict=True))
    drawn = [torch.randn_like(p) for p in denoiser.network.parameters()]
    made = {
        "loops": plain_way(networks["loops"], ema="loop"),
        "diffusers": plain_way(networks["diffusers"], ema="diffusers"),
        "deme": deme_way(networks["deme"], denoiser),
    }
    ways = {
        name: repeated(networks[name], [g.clone() for g in drawn], update, updates)
        for name, (update, _) in made.items()
    }
    seconds = timed_rounds(ways, rounds)
    numel = sum(gradient.numel() for gradient in drawn)
    print(f"\n{label}: {len(drawn)} tensors, {numel / 1e6:.2f} M parameters, {updates} updates")
    for name, spent in seconds.items():
        print(f"  {name}: {spread([1e3 * s / updates for s in spent])} ms per update")
    print("  " + verdict("loops / deme", ratios(seconds["loops"], seconds["deme"]), ">= 2"))
    print("  " + verdict("diffusers / deme", ratios(seconds["diffusers"], seconds["deme"])))
    for name in ("loops", "diffusers"):
        print(f"  largest relative difference to {name}: {difference(networks, made, name):.1e}")
    if numel > 1e7:
        floor = BYTES_PER_PARAMETER * numel / bytes_per_second(drawn[0].device)
        share = [floor * updates / s for s in seconds["deme"]]
        print(f"  bytes that must move would take {1e3 * floor:.1f} ms: {spread(share)} of deme's")


def difference(networks: dict[str, nn.Module], made: dict, other: str) -> float:
    """Of weights and averages, relative to the largest of a tensor."""
    pairs = [
        *zip(networks["deme"].parameters(), networks[other].parameters(), strict=True),
        *zip(made["deme"][1], made[other][1], strict=True),
    ]
    with torch.no_grad():
        return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-3)) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--updates", type=int, default=300, help="per round, of the digits U-Net")
    parser.add_argument("--large-updates", type=int, default=5, help="per round, of the large one")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    began = time.perf_counter()
    print(machine(options.device))
    digits = load_denoiser(BASE_PATH, device=options.device)
    compare("digits U-Net", digits, options.updates, options.rounds)
    large = random_denoiser(ddpm_cifar10(), device=options.device)
    compare("ddpm-cifar10-32", large, options.large_updates, options.rounds)
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
