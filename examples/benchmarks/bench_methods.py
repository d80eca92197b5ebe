"""What each row of Table 1 costs: updates per second relative to plain finetuning.

All methods train the embedded digits model in one process, in turn, several rounds; printed per
method is the ratio of updates per second, method / plain of the same round: median (min to max),
beside the ratio that counted FLOPs alone would give.

    OMP_NUM_THREADS=1 uv run python examples/benchmarks/bench_methods.py
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rounds import machine, ratios, rounds_of, spread

from deme_cli.comparison.stage import count_passes, flops_per_update
from deme_cli.config import FinetuneConfig
from deme_cli.data.digits import BASE_PATH
from deme_cli.data.images import open_images
from deme_cli.diffusion.denoiser import Denoiser, load_denoiser
from deme_cli.timesteps import TimestepRange, parse_range
from deme_cli.training.clusters import cluster_draws
from deme_cli.training.examples import PixelExamples
from deme_cli.training.setup import Run
from deme_cli.training.train import train

PLAIN = FinetuneConfig(
    p=0.0, consistency=0.0, projection="none", batch_size=128, lr=1e-4, held_out=0
)
METHODS: dict[str, dict[str, Any]] = {
    "plain finetuning": {},
    "SNR+1": {"loss_weighting": "snr+1"},
    "Min-SNR-5": {"loss_weighting": "min-snr"},
    "P2": {"loss_weighting": "p2"},
    "learned uncertainty (EDM2)": {"loss_weighting": "uncertainty"},
    "ANT-UW": {"multitask": "uw"},
    "ANT-NashMTL": {"multitask": "nashmtl"},
    "ANT-PCGrad": {"multitask": "pcgrad"},
    "DeMe expert 2/4": {"p": 0.3, "consistency": 1.0, "projection": "fold"},
    "DeMe expert 2/4, no consistency": {"p": 0.3, "projection": "fold"},
}


def open_run(denoiser: Denoiser, config: FinetuneConfig, folder: Path) -> Run:
    """The run of a method: an expert where p > 0, else all timesteps, in clusters where asked."""
    images = open_images("digits", shape=denoiser.sample_shape, split="train")
    clusters = []
    if config.multitask != "none":
        whole = TimestepRange(0, denoiser.schedule.num_train_timesteps)
        clusters = cluster_draws(whole, config.clusters, config.cluster_by, denoiser.schedule)
    return Run(
        denoiser=denoiser,
        choice=parse_range("2/4" if config.p else "1/1", denoiser.schedule.num_train_timesteps),
        examples=PixelExamples(images),
        held_out=None,
        flip=False,
        config=config,
        output=folder / "expert.safetensors",
        clusters=clusters,
    )


def seconds(run: Run) -> float:
    start = time.perf_counter()
    for _ in train(run):
        pass
    spent = time.perf_counter() - start
    run.output.unlink()
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    denoiser = load_denoiser(BASE_PATH)
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: open_run(denoiser, replace(PLAIN, steps=options.steps, **own), Path(folder))
            for name, own in METHODS.items()
        }
        flops = {
            name: flops_per_update(run.config, count_passes(run)) for name, run in runs.items()
        }
        spent = rounds_of(
            {name: partial(seconds, run) for name, run in runs.items()}, options.rounds
        )
    print(f"{options.rounds} rounds of {options.steps} updates, batch {PLAIN.batch_size}")
    for name in METHODS:
        found = ratios(spent["plain finetuning"], spent[name])
        by_flops = flops["plain finetuning"] / flops[name]
        print(f"{name}: {spread(found)}, by FLOPs {by_flops:.2f}")


if __name__ == "__main__":
    main()
