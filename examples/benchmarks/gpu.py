"""What one GPU gives, in ten minutes at most: one JSON, one table, each part apart.

    python examples/benchmarks/gpu.py -o gpu.json
    python examples/benchmarks/gpu.py --only train sample --minutes 4
    python examples/benchmarks/gpu.py --tiny --device cpu   # that it runs; no figures

The JSON is written anew after each part, so that a run that is cut off keeps what it has; a part
that fails or finds no time left is told as such, and the next one runs. Weights are random and of
published shapes (google/ddpm-cifar10-32, 35.7 M; CLIP ViT-B/32; Inception v3), images are drawn.
Rounds are in turn, figures are medians. The goals beside them are aims, not promises.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_features import StandIn, clean_fid_way, draw_images, write_folder
from bench_finetune import hand_written
from bench_sample import competitors
from random_models import SMALL_CIFAR, ddpm_cifar10, random_denoiser, write_images, write_pipeline
from rounds import machine, timed_rounds
from torch.utils.flop_counter import FlopCounterMode

import deme_cli as deme
from deme_cli.config import DataConfig, FinetuneConfig, MergeConfig, SplitConfig

GOALS = {
    "train.speed over diffusers": ">= 2", "train.share of bf16 peak": ">= 0.2",
    "sample.speed over diffusers": ">= 1.7", "sample.ensemble / one model": "<= 1.03",
    "compile.speed over diffusers": ">= 1.7", "features.speed over clean-fid": ">= 4",
}  # fmt: skip
Figures = dict[str, Any]


@dataclass
class Lab:
    """Where and how large; what parts leave for later ones."""

    device: str
    tiny: bool
    rounds: int
    folder: Path
    peak: float = 0.0  # FLOP/s of a matrix product in bfloat16
    base: Path | None = None
    experts: list[Path] = field(default_factory=list)

    @property
    def dtype(self) -> str:
        return "fp32" if self.tiny else "bf16"

    @property
    def model(self) -> dict[str, Any]:
        return {**SMALL_CIFAR, "block_out_channels": [32, 32]} if self.tiny else ddpm_cifar10()

    def wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], repeats: int) -> float:
        """Seconds of one `work`, after one that does not count."""
        work()
        self.wait()
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        self.wait()
        return (time.perf_counter() - began) / repeats


def device(lab: Lab) -> Figures:
    """What the device can do at best: matrix products and copies."""
    figures: Figures = {"machine": machine(lab.device)}
    size, repeats = (256, 2) if lab.tiny else (8192, 20)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(size, size, device=lab.device, dtype=dtype)
        flops = 2 * size**3 / lab.seconds(partial(torch.matmul, a, a), repeats)
        figures[f"TFLOP/s {name}"] = flops / 1e12
    lab.peak = figures["TFLOP/s bf16"] * 1e12
    source = torch.empty(2**16 if lab.tiny else 2**30, dtype=torch.uint8, device=lab.device)
    target = torch.empty_like(source)
    seconds = lab.seconds(lambda: target.copy_(source), repeats)
    figures["copy GB/s, read and written"] = 2 * source.numel() / seconds / 1e9
    return figures


def tests(lab: Lab) -> Figures:
    """The tests that need a GPU, as they are."""
    if lab.tiny:
        return {"not run": "needs a GPU"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-x", "-n", "0"]
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], text=True, capture_output=True)
    return {"exit code": ended.returncode, "last line": ended.stdout.strip().splitlines()[-1]}


def train(lab: Lab) -> Figures:
    """Images per second of `deme finetune` (consistency on) and of a plain loop with diffusers."""
    steps, batch = (4, 4) if lab.tiny else (150, 256)
    images = write_images(lab.folder / "images", 8 if lab.tiny else 2048)
    source = write_pipeline(lab.folder / "pipeline", lab.model)
    lab.base = deme.split(str(source), SplitConfig(n=4), output=lab.folder).run.base
    settings = FinetuneConfig(
        steps=steps, batch_size=batch, consistency=1.0, projection="none", held_out=0, p=0.1
    )
    figures: Figures = {"images a batch": batch, "updates": steps}
    for compiled in ("off",) if lab.tiny else ("off", "on"):
        output = lab.folder / f"ft_{compiled}.safetensors"
        lab.experts = deme.finetune(
            "2/4", settings, images=DataConfig(source=str(images)), base=lab.base, output=output,
            device=lab.device, dtype=lab.dtype, compile=compiled,
        )  # fmt: skip
        lines = output.with_suffix(".metrics.jsonl").read_text().splitlines()
        rates = [r for line in lines if (r := json.loads(line).get("images_per_second"))]
        figures[f"images/s, compile {compiled}"] = statistics.median(rates[len(rates) // 2 :])
    best = max(value for name, value in figures.items() if name.startswith("images/s"))
    figures["images/s, plain diffusers loop"] = plain = plain_loop(lab, settings)
    figures["speed over diffusers"] = best / plain
    network = random_denoiser(lab.model, device=lab.device).network
    shape = (1, 3, lab.model["sample_size"], lab.model["sample_size"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(shape, device=lab.device), 0)
    work = 4 * counter.get_total_flops()  # forward, backward of twice that, forward of the base
    figures["GFLOP an image"] = work / 1e9
    if lab.peak:
        figures["share of bf16 peak"] = best * work / lab.peak
    return figures


def plain_loop(lab: Lab, settings: FinetuneConfig) -> float:
    """Images per second of the same objective in diffusers' words, the images in memory."""
    denoiser = random_denoiser(lab.model, device=lab.device)
    drawn = draw_images(max(settings.batch_size, 64), lab.model["sample_size"], 1)
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2).to(lab.device)
    settings = replace(settings, steps=max(2, settings.steps // 2))
    hand_written(denoiser, images, replace(settings, steps=2), bf16=not lab.tiny)  # to warm up
    seconds = hand_written(denoiser, images, settings, bf16=not lab.tiny)
    return settings.batch_size * settings.steps / seconds


def sample(lab: Lab, compiled: str = "off") -> Figures:
    """DDIM against diffusers' DDIMPipeline, and an ensemble of four against one model."""
    num, steps = (2, 2) if lab.tiny else (256, 100)
    options = argparse.Namespace(
        device=lab.device, dtype=lab.dtype, compile=compiled, rounds=lab.rounds
    )
    ways = competitors(lab.model, num, steps, options)
    seconds = {way: statistics.median(s) for way, s in timed_rounds(ways, lab.rounds).items()}
    figures: Figures = {f"images/s, {way}": num / spent for way, spent in seconds.items()}
    return figures | {
        "images": num, "steps": steps, "compile": compiled,
        "speed over diffusers": seconds["diffusers"] / seconds["sample"],
        "ensemble / one model": seconds["ensemble"] / seconds["sample"],
    }  # fmt: skip


def compile_(lab: Lab) -> Figures:
    """The same, deme's networks compiled."""
    return {"not run": "tiny"} if lab.tiny else sample(lab, "on")


def search(lab: Lab) -> Figures:
    """Candidates per second of a search whose experts stay on the device."""
    if lab.base is None:
        train(lab)
    times: list[float] = []
    settings = MergeConfig(
        search="random", objective="loss", evaluations=3 if lab.tiny else 64,
        num=4 if lab.tiny else 1024, batch_size=4 if lab.tiny else 512, report=False,
    )  # fmt: skip
    deme.merge(
        lab.experts, settings, base=lab.base, output=lab.folder / "merged.safetensors",
        device=lab.device, dtype=lab.dtype, force=True,
        progress=lambda *_, **__: times.append(time.perf_counter()),
    )  # fmt: skip
    return {"candidates/s": (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None}


def features(lab: Lab) -> Figures:
    """Inception's shape against clean-fid's own loop, and CLIP's ViT-B/32: images per second."""
    import open_clip
    import torchvision

    from deme_cli.evaluation.features import load_extractor

    stand_in, num = StandIn(), 16 if lab.tiny else 4096
    if not lab.tiny:
        stand_in.layers = torchvision.models.inception_v3(init_weights=False, aux_logits=False)
        stand_in.layers.fc = torch.nn.Identity()
    weights, images = lab.folder / "inception.pt", draw_images(num, 32, 1)
    torch.jit.script(stand_in.eval()).save(str(weights))
    folder = write_folder(images, lab.folder / "png")
    extractor = load_extractor("inception", weights=weights, device=lab.device)
    ways = {
        "deme": lambda: extractor.features(images),
        "clean-fid": clean_fid_way(folder, weights, torch.device(lab.device)),
    }
    rounds = timed_rounds(ways, min(lab.rounds, 3))
    seconds = {way: statistics.median(spent) for way, spent in rounds.items()}
    figures: Figures = {f"images/s, {way}": num / spent for way, spent in seconds.items()}
    figures["speed over clean-fid"] = seconds["clean-fid"] / seconds["deme"]
    if not lab.tiny:
        clip = open_clip.create_model("ViT-B-32", device=lab.device).eval().bfloat16()
        batch = torch.zeros(512, 3, 224, 224, device=lab.device, dtype=torch.bfloat16)
        with torch.inference_mode():
            figures["images/s, CLIP"] = 512 / lab.seconds(lambda: clip.encode_image(batch), 5)
    return figures


def nccl(lab: Lab) -> Figures:
    """One process joins a group of its own: the library loads and sums."""
    from torch import distributed

    backend = "nccl" if lab.device.startswith("cuda") else "gloo"
    store = distributed.FileStore(str(lab.folder / "store"), 1)
    distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    numbers = torch.ones(2**10 if lab.tiny else 2**26, device=lab.device)
    seconds = lab.seconds(lambda: distributed.all_reduce(numbers), 2)
    distributed.destroy_process_group()
    return {"backend": backend, "all_reduce GB/s": 4 * numbers.numel() / seconds / 1e9}


PARTS = {
    "device": device, "train": train, "sample": sample, "search": search, "features": features,
    "tests": tests, "compile": compile_, "nccl": nccl,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--skip", nargs="+", choices=PARTS, default=[])
    parser.add_argument("--minutes", type=float, default=10, help="no part begins after them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="everything very small, for a test")
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    deme.set_quiet(True)
    began, document = time.perf_counter(), {"schema_version": 1, "tiny": options.tiny, "parts": {}}
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        lab = Lab(options.device, options.tiny, options.rounds, Path(folder))
        for name in [name for name in options.only if name not in options.skip]:
            late = time.perf_counter() - began > 60 * options.minutes
            figures = {"not run": "no time left"} if late else measured(PARTS[name], lab)
            document["parts"][name] = figures
            document["seconds"] = time.perf_counter() - began
            options.output.write_text(json.dumps(document, indent=1) + "\n")
            show(name, figures)
    sys.exit(any("failed" in figures for figures in document["parts"].values()))


def measured(part: Callable[[Lab], Figures], lab: Lab) -> Figures:
    """The part's figures with its seconds and peak memory; what went wrong where something did."""
    is_cuda, began = lab.device.startswith("cuda"), time.perf_counter()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        figures = part(lab)
    except Exception as error:  # the next part runs all the same
        traceback.print_exc()
        figures = {"failed": f"{type(error).__name__}: {error}"}
    figures["seconds"] = time.perf_counter() - began
    if is_cuda:
        figures["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.empty_cache()
    return figures


def show(part: str, figures: Figures) -> None:
    for name, value in figures.items():
        goal = f"   goal {GOALS[key]}" if (key := f"{part}.{name}") in GOALS else ""
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"{part:10} {name:34} {shown}{goal}", flush=True)


if __name__ == "__main__":
    main()
