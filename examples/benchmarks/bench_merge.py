"""How fast `deme merge` is, and how much memory it takes, beside other ways to do the same.

    python examples/benchmarks/bench_merge.py [--parameters 114e6] [--experts 4] [--rounds 7]

Writes a base and experts with random float32 weights under the names and shapes of
google/ddpm-ema-church-256 (113.7 M parameters, 455 MB each), or with --model sd of
CompVis/stable-diffusion-v1-4's U-Net (859.5 M parameters, 3.4 GB each), into a temporary folder,
then runs, in turns, each as a process of its own:

    recipe        the authors': model objects loaded, state dicts subtracted, scaled and added into
                  new dictionaries, applied to a deep copy, saved
    safetensors   load_file on all files, arithmetic on dictionaries, save_file
    loop          a bare loop that reads every input and writes as many bytes as the output has
    deme          deme merge -w 0.1,0.1,0.2,0.5

Times are of whole processes with warm files; `work` leaves out the imports before it. Ratios are
of the runs of one round, shown as median (least to most), because machines have moods. Anonymous
memory is the peak of RssAnon, Linux only. --parameters shrinks the network, --folder chooses the
disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ARMS = ("recipe", "safetensors", "loop", "deme")
COEFFICIENTS = (0.1, 0.1, 0.2, 0.5)
STABLE_DIFFUSION = {
    "_class_name": "UNet2DConditionModel", "sample_size": 64, "in_channels": 4, "out_channels": 4,
    "cross_attention_dim": 768, "attention_head_dim": 8,
}  # fmt: skip
UNIT = 128  # channels of the first level of google/ddpm-ema-church-256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", type=float, default=114e6, help="about so many per model")
    parser.add_argument("--model", choices=("ddpm", "sd"), default="ddpm")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--arms", default=",".join(ARMS), help="which ways to run")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--arm", help=argparse.SUPPRESS)  # one way, run by the script itself
    options = parser.parse_args()
    if options.arm:
        run_arm(options.arm, Path.cwd())
        return
    arms = options.arms.split(",")
    with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=options.folder) as folder:
        is_sd = options.model == "sd"
        config = STABLE_DIFFUSION if is_sd else model_config(options.parameters)
        num_bytes = write_models(Path(folder), config, options.experts)
        inputs = options.experts + 1
        print(f"{inputs} files of {num_bytes / 1e6:.0f} MB in {folder}", file=sys.stderr)
        if num_bytes * (inputs + 2) > shutil.disk_usage(folder).free:
            sys.exit("not enough disk space; use --parameters or --folder")
        rounds = [run_round(arms, Path(folder)) for _ in range(options.rounds)]
        memory = peak_anonymous(Path(folder)) if "deme" in arms else None
    report(arms, rounds, memory, num_bytes * (inputs + 1) / 1e6)


def model_config(parameters: float) -> dict:
    """The configuration of ddpm-ema-church-256, its widths scaled to about `parameters`."""
    unit = max(32, round(UNIT * (parameters / 113.7e6) ** 0.5 / 32) * 32)
    down = ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"]
    return {
        "_class_name": "UNet2DModel", "sample_size": 256, "in_channels": 3, "out_channels": 3,
        "block_out_channels": [unit * k for k in (1, 1, 2, 2, 4, 4)], "layers_per_block": 2,
        "down_block_types": down, "up_block_types": [d.replace("Down", "Up") for d in down[::-1]],
        "attention_head_dim": None, "norm_num_groups": 32, "freq_shift": 1,
        "flip_sin_to_cos": False, "downsample_padding": 0,
    }  # fmt: skip


def write_models(folder: Path, config: dict, experts: int) -> int:
    """base and ft_*.safetensors, and diffusers folders of the same files; returns bytes of one."""
    import json

    import diffusers
    import numpy as np
    import torch

    from deme_cli.artifacts import ArtifactWriter
    from deme_cli.records import BaseRecord, ExpertRecord
    from deme_cli.tensor_file import layout_of
    from deme_cli.timesteps import split_uniform

    network = getattr(diffusers, config["_class_name"])
    with torch.device("meta"):
        layout = layout_of(network.from_config(config).state_dict())
    shared = {
        "source": "random", "model_config": config, "num_train_timesteps": 1000,
        "scheduler_config": {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000},
    }  # fmt: skip
    base = BaseRecord(**shared)
    for index in range(experts + 1):
        name = f"ft_{index}of{experts}" if index else "base"
        record = base
        if index:
            span = split_uniform(experts, 1000)[index - 1]
            record = ExpertRecord(
                **shared, range=[span.start, span.stop], index=index, of=experts, p=0.3, steps=0,
                base=base.fingerprint, seed=0, projection="none", data={}, training={},
            )  # fmt: skip
        path = folder / f"{name}.safetensors"
        generator = np.random.default_rng(index)
        with ArtifactWriter(path, layout, record) as writer:
            for spec in layout:
                writer.write(generator.standard_normal(spec.num_elements, np.float32))
        base = writer.record if not index else base
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        os.link(path, folder / name / "diffusion_pytorch_model.safetensors")
    return sum(spec.num_bytes for spec in layout)


def run_round(arms: list[str], folder: Path) -> dict[str, tuple[float, float]]:
    """Seconds of each arm, as a process and in its work; every arm starts on a quiet disk."""
    seconds = {}
    for arm in arms:
        for path in folder.glob("out*"):
            path.unlink()
        os.sync()
        start = time.perf_counter()
        result = subprocess.run(command(arm, folder), cwd=folder, stdout=subprocess.PIPE, text=True)
        process = time.perf_counter() - start
        if result.returncode:
            sys.exit(f"{arm} failed")
        work = float(result.stdout) if arm != "deme" else engine_seconds(folder)
        seconds[arm] = (process, work)
        print(f"{arm:12} {process:7.2f} s  (work {work:.2f} s)", file=sys.stderr)
    return seconds


def command(arm: str, folder: Path) -> list[str]:
    if arm != "deme":
        return [sys.executable, str(Path(__file__).resolve()), "--arm", arm]
    experts = sorted(str(path) for path in folder.glob("ft_*.safetensors"))
    coefficients = ",".join(str(w) for w in coefficients_for(len(experts)))
    return [
        sys.executable, "-m", "deme_cli", "merge", *experts, "-w", coefficients,
        "-o", str(folder / "out.safetensors"), "--quiet",
    ]  # fmt: skip


def coefficients_for(count: int) -> list[float]:
    return [COEFFICIENTS[i % len(COEFFICIENTS)] for i in range(count)]


def engine_seconds(folder: Path) -> float:
    """The merge alone, as a library call in a fresh process."""
    (folder / "out.safetensors").unlink()
    os.sync()
    arguments = [sys.executable, str(Path(__file__).resolve()), "--arm", "engine"]
    return float(subprocess.run(arguments, cwd=folder, check=True, capture_output=True).stdout)


def run_arm(arm: str, folder: Path) -> None:
    """One way of merging, in this process; prints the seconds of its work."""
    paths = [folder / "base.safetensors", *sorted(folder.glob("ft_*.safetensors"))]
    prepare, work = {
        "recipe": (_import_diffusers, _recipe), "safetensors": (_import_torch, _dictionaries),
        "loop": (lambda: None, _loop), "engine": (_import_deme, _engine),
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


def _engine(paths: list[Path], coefficients: list[float], folder: Path) -> None:
    from deme_cli.merging.combine import merge_artifacts

    merge_artifacts(paths[0], paths[1:], coefficients, folder / "out.safetensors")


def peak_anonymous(folder: Path) -> float | None:
    """Peak RssAnon of `deme merge` in MB, looked at every millisecond; None without /proc."""
    if not Path("/proc/self/status").exists():
        return None
    for path in folder.glob("out*"):
        path.unlink()
    process, peak = subprocess.Popen(command("deme", folder), stdout=subprocess.DEVNULL), 0
    while process.poll() is None:
        text = Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak, *(int(line.split()[1]) for line in text.splitlines()
                            if line.startswith("RssAnon"))])  # fmt: skip
        time.sleep(0.001)
    return peak * 1024 / 1e6


def report(
    arms: list[str],
    rounds: list[dict[str, tuple[float, float]]],
    memory: float | None,
    megabytes: float,
) -> None:
    """The table; MB/s are of bytes read and written, `megabytes` in all, in the work alone."""
    print("| way | process, s | work, s | work, MB/s | process / deme | work / deme |")
    print("|---|---|---|---|---|---|")
    for arm in arms:
        cells = [spread([r[arm][i] for r in rounds]) for i in (0, 1)]
        cells.append(f"{megabytes / statistics.median([r[arm][1] for r in rounds]):.0f}")
        if "deme" in arms:
            cells += [spread([r[arm][i] / r["deme"][i] for r in rounds]) for i in (0, 1)]
        print(f"| {arm} | {' | '.join(cells)} |")
    if memory is not None:
        print(f"\npeak anonymous memory of deme merge: {memory:.0f} MB")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
