"""Evaluation features: from arrays as `deme eval` takes them, against folders of PNG files.

    python examples/benchmarks/bench_features.py [--rounds 5] [--num 512] [--weights FILE]

The same images through the same network:

    deme            `Extractor.features` on uint8 arrays, resize `clean`
    clean-fid       fid.get_folder_features of PNG files (num_workers 0, mode clean)
    deme legacy     the same as deme, resize `legacy_tensorflow` (the network resizes)
    torch-fidelity  its dataset of PNG files, where it is installed (`pip install torch-fidelity`);
                    its extractor wraps the same network, which resizes

clean-fid is compared with deme, torch-fidelity with deme legacy; writing the PNG files, without
which images of a sampler never reach the other two, is timed as well. Printed too: by how much the
Fréchet distances to other images differ.

Without --weights no Inception is at hand: a small stand-in of the same interface takes its place.
Then the reading and resizing of images is timed, not Inception, and distances are not FIDs. With
--weights FILE (inception-2015-12-05.pt) they are.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rounds import machine, ratios, skip, spread, timed_rounds, verdict

from deme_cli.diffusion.denoiser import choose_device
from deme_cli.evaluation.features import load_extractor, quiet_clean_fid
from deme_cli.evaluation.frechet import frechet_distance

Way = Callable[[], np.ndarray]  # -> features (n, d)
ONE_IN = {"clean-fid": "deme", "torch-fidelity": "deme legacy"}  # who is compared with whom


class Layers(torch.nn.Module):
    """A few layers in Inception's place: (B, 3, 299, 299) in about [-1, 1] -> (B, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 7, stride=8)
        self.second = torch.nn.Conv2d(8, 64, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 100 * self.second(self.first(x).relu()).relu().mean(dim=(2, 3))


class StandIn(torch.nn.Module):
    """The interface of NVIDIA's TorchScript of Inception: `layers`, and a call that resizes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: torch.Tensor, return_features: bool = True) -> torch.Tensor:
        x = torch.nn.functional.interpolate(x, [299, 299], mode="bilinear", align_corners=False)
        return self.layers((x - 128) / 128)


def write_stand_in(path: Path) -> Path:
    torch.manual_seed(0)
    torch.jit.script(StandIn().eval()).save(str(path))
    return path


def draw_images(num: int, size: int, seed: int) -> np.ndarray:
    """Smooth random colour images: uint8 (num, size, size, 3)."""
    rng = np.random.default_rng(seed)
    coarse = (Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(num))
    return np.stack([np.asarray(c.resize((size, size), Image.Resampling.BICUBIC)) for c in coarse])


def write_folder(images: np.ndarray, folder: Path) -> Path:
    """As PNG files in their order, the folder emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:06d}.png")
    return folder


def clean_fid_way(folder: Path, weights: Path, device: torch.device) -> Way:
    """clean-fid's own path from a folder, its network run as clean-fid runs Inception."""
    with quiet_clean_fid():
        from cleanfid import fid
    script = torch.jit.load(str(weights), map_location=device).eval()

    def network(x: torch.Tensor) -> torch.Tensor:
        return script.layers((x - 128) / 128)

    def features() -> np.ndarray:
        with quiet_clean_fid():
            return fid.get_folder_features(
                str(folder), network, num_workers=0, batch_size=128, device=device,
                mode="clean", verbose=False,
            )  # fmt: skip

    return features


def torch_fidelity_way(folder: Path, weights: Path, device: torch.device) -> Way | None:
    """torch-fidelity's own path from a folder; None where it is not installed."""
    try:
        from torch_fidelity.feature_extractor_base import FeatureExtractorBase
        from torch_fidelity.utils import extract_featuresdict_from_input_id
    except ImportError as error:
        skip("torch-fidelity", f"{error}")
        return None

    class Wrapped(FeatureExtractorBase):
        """The network behind torch-fidelity's interface: uint8 (B, 3, H, W) -> ((B, d),)."""

        def __init__(self) -> None:
            super().__init__("wrapped", ["all"])
            self.script = torch.jit.load(str(weights), map_location=device).eval()

        @staticmethod
        def get_provided_features_list() -> tuple[str]:
            return ("all",)

        @torch.no_grad()
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.script(images.float(), return_features=True),)

    extractor = Wrapped()
    settings = {
        "input1": str(folder), "cuda": device.type == "cuda", "batch_size": 128, "verbose": False,
        "samples_find_deep": False, "samples_shuffle": False, "save_cpu_ram": True,
    }  # fmt: skip
    return lambda: extract_featuresdict_from_input_id(1, extractor, **settings)["all"].numpy()


def distance(features: np.ndarray, others: np.ndarray) -> float:
    """Fréchet distance of two sets of features (n, d)."""
    found = [np.asarray(each, dtype=np.float64) for each in (features, others)]
    parts = [part for f in found for part in (f.mean(axis=0), np.cov(f, rowvar=False))]
    return frechet_distance(*parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num", type=int, default=512, help="images")
    parser.add_argument("--size", type=int, default=32, help="pixels per side")
    parser.add_argument("--weights", type=Path, help="inception-2015-12-05.pt")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # torch.jit is on its way out
    began, device = time.perf_counter(), choose_device(options.device)
    print(machine(options.device))
    images, others = (draw_images(options.num, options.size, seed) for seed in (1, 2))
    with tempfile.TemporaryDirectory(prefix="bench-features-") as name:
        weights = options.weights or write_stand_in(Path(name) / "stand-in.pt")
        if options.weights is None:
            print("no --weights: a small stand-in network, so times are of reading and resizing")
        folder = write_folder(images, Path(name) / "images")
        extractors = {
            "deme": load_extractor("inception", weights=weights, device=options.device),
            "deme legacy": load_extractor(
                "inception", resize="legacy_tensorflow", weights=weights, device=options.device
            ),
        }
        ways: dict[str, Way] = {
            "deme": lambda: extractors["deme"].features(images),
            "clean-fid": clean_fid_way(folder, weights, device),
            "deme legacy": lambda: extractors["deme legacy"].features(images),
        }
        if fidelity := torch_fidelity_way(folder, weights, device):
            ways["torch-fidelity"] = fidelity
        writing = {"writing": lambda: write_folder(images, folder)}
        seconds = timed_rounds({**ways, **writing}, options.rounds)
        report(ways, seconds, options.num)
        for other, ours in ONE_IN.items():
            if other in ways:
                reference = extractors[ours].features(others)
                found = [distance(ways[way](), reference) for way in (ours, other)]
                print(
                    f"{other}: distance {found[1]:.6g}, {ours} {found[0]:.6g}, "
                    f"difference {abs(found[0] - found[1]):.1e}"
                )
    print(f"\n{time.perf_counter() - began:.0f} s in all")


def report(ways: dict[str, Way], seconds: dict[str, list[float]], num: int) -> None:
    for way, spent in seconds.items():
        print(f"  {way}: {spread(spent)} s, {num / statistics.median(spent):.0f} images/s")
    for other, ours in ONE_IN.items():
        if other in ways:
            whole = [a + b for a, b in zip(seconds[other], seconds["writing"], strict=True)]
            print(verdict(f"{other} / {ours}, reading only", ratios(seconds[other], seconds[ours])))
            print(verdict(f"{other} / {ours}, with PNG writing", ratios(whole, seconds[ours])))


if __name__ == "__main__":
    main()
