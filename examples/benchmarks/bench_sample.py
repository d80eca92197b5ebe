"""Speed of `deme sample` against diffusers' own DDIMPipeline, and of an ensemble against one model.

The same UNet with random weights, the same generators, the same number of images, the competitors
taking turns in one process. The figures that count are ratios of speed: above 1 means faster. On a
CPU the clock is the process's own CPU time, so that other programs do not count; else it is time.

    python examples/benchmarks/bench_sample.py [--rounds 7] [--model digits|small|cifar10|all]
    python examples/benchmarks/bench_sample.py --model cifar10 --device cuda --dtype bf16 \\
        --compile on --num 256 --steps 100

--dtype is that of both networks. --compile compiles deme's (the ensemble's too), as `deme sample`
does; the pipeline stays as diffusers delivers it. Targets: on a CPU sample at least 0.97 of the
pipeline's speed, on a GPU 1.7; the ensemble takes at most 1.03 times the time of one model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler
from random_models import DIGITS, SCHEDULER, SMALL_CIFAR, ddpm_cifar10, random_denoiser
from rounds import machine, ratios, timed_rounds, verdict

from deme_cli.config import SampleConfig
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.sampling.ensemble import SamplingExpert, single
from deme_cli.sampling.sampler import CompiledSteps, image_seed, sample_images
from deme_cli.timesteps import split_uniform

MODELS = {  # with images and steps of a run
    "digits": (DIGITS, 64, 50),
    "small": (SMALL_CIFAR, 8, 10),
    "cifar10": (ddpm_cifar10(), 4, 4),
}


def competitors(
    config: dict, num: int, steps: int, options: argparse.Namespace
) -> dict[str, Callable[[], object]]:
    """What is timed: the pipeline, one model, and an ensemble of four, `num` images each."""

    def make() -> Denoiser:
        return random_denoiser(config, device=options.device, dtype=options.dtype)

    def draw(experts: list[SamplingExpert], compiled: CompiledSteps) -> object:
        return list(sample_images(experts, settings, compiled=compiled))

    def compiled(num_loads: int) -> CompiledSteps:
        num_forwards = steps * options.rounds
        return CompiledSteps(options.compile, num_forwards=num_forwards, num_loads=num_loads)

    plain, ours = make(), make()
    pipeline: Any = DDIMPipeline(plain.network, DDIMScheduler.from_config(SCHEDULER))
    pipeline.set_progress_bar_config(disable=True)
    settings = SampleConfig(num=num, steps=steps, batch_size=num)
    four = []
    for span in split_uniform(4, 1000):
        expert = make()
        four.append(SamplingExpert(span, partial(_itself, expert)))

    def with_diffusers() -> object:
        generators = [
            torch.Generator("cpu").manual_seed(image_seed(0, index)) for index in range(num)
        ]
        return pipeline(num, generator=generators, num_inference_steps=steps).images

    return {
        "diffusers": with_diffusers,
        "sample": partial(draw, single(ours), compiled(1)),
        "ensemble": partial(draw, four, compiled(len(four))),
    }


def _itself(denoiser: Denoiser) -> Denoiser:
    return denoiser


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--num", type=int, default=None, help="images per run")
    parser.add_argument("--steps", type=int, default=None)
    options = parser.parse_args()
    began = time.perf_counter()
    print(machine(options.device))
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    for name in MODELS if options.model == "all" else [options.model]:
        config, num, steps = MODELS[name]
        num, steps = options.num or num, options.steps or steps
        seconds = timed_rounds(competitors(config, num, steps, options), options.rounds, clock)
        print(f"{name}: {num} images, {steps} DDIM steps, {options.dtype}")
        target = ">= 0.97" if options.device == "cpu" else ">= 1.7"
        speed = ratios(seconds["diffusers"], seconds["sample"])
        print("  " + verdict("speed of sample / diffusers' pipeline", speed, target))
        times = ratios(seconds["ensemble"], seconds["sample"])
        print("  " + verdict("time of ensemble / sample", times, "<= 1.03"), flush=True)
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
