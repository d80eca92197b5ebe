"""Speed of `deme sample` against diffusers' own DDIMPipeline, and of an ensemble against one model.

The same UNet with random weights, the same generators, the same number of images, the competitors
taking turns in one process. The figures that count are ratios of speed: above 1 means faster. On a
CPU the clock is the process's own CPU time, so that other programs do not count; else it is time.

Usage: python examples/benchmarks/bench_sample.py [--repeats 7] [--model digits|cifar|both]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import DDIMPipeline, DDIMScheduler

from deme_cli.config import SampleConfig
from deme_cli.diffusion.denoiser import Denoiser, build_network, choose_device
from deme_cli.diffusion.schedule import read_schedule
from deme_cli.records import BaseRecord
from deme_cli.sampling.sampler import SamplingExpert, collect_images, image_seed, single
from deme_cli.timesteps import split_uniform

SCHEDULER = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000}
MODELS = {
    "digits": ({"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1,
                "block_out_channels": [16, 32], "norm_num_groups": 8,
                "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
                "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}, 64, 50),
    "cifar": ({"sample_size": 32, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
               "block_out_channels": [64, 128],
               "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
               "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}, 8, 10),
}  # fmt: skip


def make_denoiser(model_config: dict, device: torch.device) -> Denoiser:
    """A UNet with random weights on the DDPM schedule of 1000 steps."""
    config = {"_class_name": "UNet2DModel", **model_config}
    torch.manual_seed(0)
    network = build_network(config).to(device).eval().requires_grad_(False)
    record = BaseRecord(
        source="benchmark",
        model_config=config,
        scheduler_config=SCHEDULER,
        num_train_timesteps=1000,
    )
    return Denoiser(network, read_schedule(SCHEDULER), record)


def competitors(denoiser: Denoiser, num: int, steps: int) -> dict[str, Callable[[], object]]:
    """What is timed: the pipeline, one model, and an ensemble of four, `num` images each."""
    pipeline = DDIMPipeline(denoiser.network, DDIMScheduler.from_config(SCHEDULER))
    pipeline.set_progress_bar_config(disable=True)
    config = SampleConfig(num=num, steps=steps, batch_size=num)
    four = []
    for span in split_uniform(4, 1000):
        expert = make_denoiser(denoiser.record.model_config, denoiser.device)
        four.append(SamplingExpert(span, lambda expert=expert: expert))

    def with_diffusers() -> object:
        generators = [
            torch.Generator("cpu").manual_seed(image_seed(0, index)) for index in range(num)
        ]
        return pipeline(num, generator=generators, num_inference_steps=steps).images

    return {
        "diffusers": with_diffusers,
        "sample": lambda: collect_images(single(denoiser), config),
        "ensemble": lambda: collect_images(four, config),
    }


def measure(
    runs: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each run, in turn and in changing order; the first round warms up."""
    names, seconds = list(runs), {name: [] for name in runs}
    for round_index in range(repeats + 1):
        for name in names[round_index % 3 :] + names[: round_index % 3]:
            began = clock()
            runs[name]()
            if round_index:
                seconds[name].append(clock() - began)
    return seconds


def report(label: str, slower: list[float], faster: list[float]) -> None:
    ratios = sorted(a / b for a, b in zip(slower, faster, strict=True))
    middle = statistics.median(ratios)
    print(f"  {label}: median {middle:.3f}  (min {ratios[0]:.3f}, max {ratios[-1]:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--model", choices=[*MODELS, "both"], default="both")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num", type=int, default=None, help="images per run")
    parser.add_argument("--steps", type=int, default=None)
    options = parser.parse_args()
    for name in MODELS if options.model == "both" else [options.model]:
        model_config, num, steps = MODELS[name]
        num, steps = options.num or num, options.steps or steps
        denoiser = make_denoiser(model_config, choose_device(options.device))
        clock = time.process_time if denoiser.device.type == "cpu" else time.perf_counter
        seconds = measure(competitors(denoiser, num, steps), options.repeats, clock)
        print(f"{name}: {num} images, {steps} DDIM steps, {options.repeats} rounds")
        report("speed of sample / diffusers' pipeline", seconds["diffusers"], seconds["sample"])
        report("speed of ensemble / sample", seconds["sample"], seconds["ensemble"])


if __name__ == "__main__":
    main()
