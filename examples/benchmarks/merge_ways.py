"""The ways of merging that bench_merge.py compares, each run as `python merge_ways.py WAY`.

In a folder of models (base.safetensors, ft_*.safetensors, and what a way wants beside them), in
this process, with what it imports imported before: the last line printed is the seconds of the
work. Those of mergekit run in an environment that has neither deme nor diffusers, so nothing but
the standard library is imported at the top.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

COEFFICIENTS = (0.1, 0.1, 0.2, 0.5)
METHODS = {"mergekit": "linear", "mergekit-ta": "task_arithmetic"}


def coefficients_for(count: int) -> list[float]:
    return [COEFFICIENTS[i % len(COEFFICIENTS)] for i in range(count)]


def run_arm(arm: str, folder: Path) -> None:
    """One way of merging the models of `folder`; prints the seconds of its work."""
    paths = [folder / "base.safetensors", *sorted(folder.glob("ft_*.safetensors"))]
    prepare, work = {
        "recipe": (_import_diffusers, _recipe), "safetensors": (_import_torch, _dictionaries),
        "loop": (lambda: None, _loop), "loop-synced": (lambda: None, _loop_synced),
        "deme": (_import_deme, _deme),
        "mergekit": (_import_mergekit, _mergekit_linear),
        "mergekit-ta": (_import_mergekit, _mergekit_task_arithmetic),
    }[arm]  # fmt: skip
    prepare()
    start = time.perf_counter()
    work(paths, coefficients_for(len(paths) - 1), folder)
    print(time.perf_counter() - start)


def _import_diffusers() -> None:
    import diffusers  # noqa: F401


def _import_torch() -> None:
    import safetensors.torch  # noqa: F401


def _import_deme() -> None:
    import deme_cli.merging.combine  # noqa: F401


def _import_mergekit() -> None:
    import mergekit.scripts.merge_raw_pytorch  # noqa: F401


def _recipe(paths: list[Path], coefficients: list[float], folder: Path) -> None:
    import copy
    import json

    import diffusers
    import torch

    config = json.loads((paths[0].with_suffix("") / "config.json").read_text())
    network = getattr(diffusers, config["_class_name"])
    base, *experts = (network.from_pretrained(path.with_suffix("")) for path in paths)
    theta = base.state_dict()
    vectors = [{name: expert.state_dict()[name] - theta[name] for name in theta}
               for expert in experts]  # fmt: skip
    total = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}
    for w, vector in zip(coefficients, vectors, strict=True):
        scaled = {name: w * tensor for name, tensor in vector.items()}
        total = {name: total[name] + scaled[name] for name in theta}
    merged = copy.deepcopy(base)
    merged.load_state_dict({name: theta[name] + total[name] for name in theta})
    torch.save(merged, folder / "out.pt")


def _dictionaries(paths: list[Path], coefficients: list[float], folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    base, *experts = (load_file(path) for path in paths)
    merged = {}
    for name, theta in base.items():
        merged[name] = theta.clone()
        for w, expert in zip(coefficients, experts, strict=True):
            merged[name] += w * (expert[name] - theta)
    save_file(merged, folder / "out.safetensors")


def _loop(paths: list[Path], coefficients: list[float], folder: Path) -> None:
    buffer = bytearray(1 << 20)
    with open(folder / "out.bin", "wb", buffering=0) as out:
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    if path is paths[0]:
                        out.write(memoryview(buffer)[:count])


def _loop_synced(paths: list[Path], coefficients: list[float], folder: Path) -> None:
    import os

    _loop(paths, coefficients, folder)
    with open(folder / "out.bin", "rb+", buffering=0) as out:
        os.fsync(out.fileno())


def _deme(paths: list[Path], coefficients: list[float], folder: Path) -> None:
    from deme_cli.merging.combine import merge_inputs
    from deme_cli.merging.inputs import open_experts, open_inputs

    inputs = open_inputs(paths[0], open_experts(paths[1:], "expert"))
    merge_inputs(inputs, coefficients, folder / "out.safetensors")


def _mergekit_linear(paths: list[Path], coefficients: list[float], folder: Path) -> None:
    from mergekit.scripts.merge_raw_pytorch import main

    main(["linear.yaml", "out", "--quiet"], standalone_mode=False)


def _mergekit_task_arithmetic(paths: list[Path], coefficients: list[float], folder: Path) -> None:
    from mergekit.scripts.merge_raw_pytorch import main

    main(["task_arithmetic.yaml", "out", "--quiet"], standalone_mode=False)


if __name__ == "__main__":
    run_arm(sys.argv[1], Path.cwd())
