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
    loop-synced   the same, which also waits until those bytes are on the disk, as deme does
    mergekit      mergekit-pytorch, which merges raw state dicts, method linear without
                  normalisation: weight 1 - sum w of the base, w_i of the experts
    mergekit-ta   the same, method task_arithmetic: base + sum w_i (expert - base)
    deme          deme merge -w 0.1,0.1,0.2,0.5

Times are of whole processes with warm files; `work` leaves out the imports before it. Ratios are
of the runs of one round, shown as median (least to most), because machines have moods. Anonymous
memory is the peak of RssAnon, Linux only. --parameters shrinks the network, --folder chooses the
disk. mergekit runs in an environment of its own, made with `uv venv mk` and
`uv pip install --python mk/bin/python mergekit`, and named by --mergekit-python mk/bin/python, or
found by `mergekit-pytorch` on PATH; else it is skipped. After the rounds the outputs are compared.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from merge_ways import METHODS, coefficients_for
from rounds import in_turn, machine, ratios, skip, spread, watched

ARMS = ("recipe", "safetensors", "loop", "loop-synced", "mergekit", "mergekit-ta", "deme")
WAYS = Path(__file__).resolve().with_name("merge_ways.py")
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
    parser.add_argument("--mergekit-python", help="interpreter of an environment with mergekit")
    options = parser.parse_args()
    print(machine())
    python = find_mergekit(options.mergekit_python)
    arms = [arm for arm in options.arms.split(",") if python or arm not in METHODS]
    with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=options.folder) as name:
        folder, is_sd = Path(name), options.model == "sd"
        config = STABLE_DIFFUSION if is_sd else model_config(options.parameters)
        num_bytes = write_models(folder, config, options.experts)
        inputs = options.experts + 1
        print(f"{inputs} files of {num_bytes / 1e6:.0f} MB in {folder}", file=sys.stderr)
        if num_bytes * (inputs + 2) > shutil.disk_usage(folder).free:
            sys.exit("not enough disk space; use --parameters or --folder")
        write_mergekit_configs(folder)
        runs: dict[str, list[Timed]] = {arm: [] for arm in arms}
        for counts, arm in in_turn(arms, options.rounds):
            timed = run_once(arm, folder, python)
            if counts:
                runs[arm].append(timed)
        report(runs, num_bytes * (inputs + 1) / 1e6)
        compare_outputs(arms, folder, python)


def find_mergekit(python: str | None) -> str | None:
    """The interpreter beside which `mergekit-pytorch` lies; None, said aloud, without one."""
    command = Path(python).parent / "mergekit-pytorch" if python else None
    if command is None and (on_path := shutil.which("mergekit-pytorch")):
        command = Path(on_path)
    if command is None or not command.exists():
        skip("mergekit", "no mergekit-pytorch on PATH; --mergekit-python names an interpreter")
        return None
    python = str(command.absolute().parent / "python")
    said = "from importlib.metadata import version as v; print(v('mergekit'), 'torch', v('torch'))"
    found = subprocess.run([python, "-c", said], capture_output=True, text=True)
    print("mergekit", found.stdout.strip())
    return python


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

    from random_models import write_family

    num_bytes = write_family(folder, config, experts)
    for path in folder.glob("*.safetensors"):
        own = path.with_suffix("")
        own.mkdir()
        (own / "config.json").write_text(json.dumps(config))
        os.link(path, own / "diffusion_pytorch_model.safetensors")
    return num_bytes


@dataclass(frozen=True)
class Timed:
    """Seconds of the whole process and of its work alone; its peak of RssAnon in MB."""

    process: float
    work: float
    anonymous: float | None


def write_mergekit_configs(folder: Path) -> None:
    """mergekit's own account of the merge, by method; JSON is YAML."""
    import json

    experts = [str(path) for path in sorted(folder.glob("ft_*.safetensors"))]
    base, weights = str(folder / "base.safetensors"), coefficients_for(len(experts))
    models = [
        {"model": path, "parameters": {"weight": w}}
        for path, w in zip(experts, weights, strict=True)
    ]
    shared = {"parameters": {"normalize": False}, "dtype": "float32"}
    of_base = {"model": base, "parameters": {"weight": 1 - sum(weights)}}
    configs = {
        "linear": {"merge_method": "linear", "models": [of_base, *models], **shared},
        "task_arithmetic": {
            "merge_method": "task_arithmetic", "base_model": base, "models": models, **shared,
        },
    }  # fmt: skip
    for method, config in configs.items():
        (folder / f"{method}.yaml").write_text(json.dumps(config))


def run_once(arm: str, folder: Path, python: str | None) -> Timed:
    """One way, on a quiet disk: as a process, and its work in it or, if need be, in another."""
    environment = {"HF_HUB_OFFLINE": "1"}
    clean(folder)
    whole = watched(command(arm, folder, python), folder, environment)
    if arm == "deme" or arm in METHODS:
        clean(folder)
        interpreter = python if arm in METHODS else sys.executable
        words = [str(interpreter), str(WAYS), arm]
        work = float(watched(words, folder, environment).output.split()[-1])
    else:
        work = float(whole.output)
    print(f"{arm:12} {whole.seconds:7.2f} s  (work {work:.2f} s)", file=sys.stderr)
    return Timed(whole.seconds, work, whole.anonymous)


def clean(folder: Path) -> None:
    """Remove what was written, and let the disk finish."""
    for path in folder.glob("out*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.sync()


def command(arm: str, folder: Path, python: str | None) -> list[str]:
    if arm in METHODS:
        return [
            str(Path(str(python)).parent / "mergekit-pytorch"), f"{METHODS[arm]}.yaml", "out",
            "--quiet",
        ]  # fmt: skip
    if arm != "deme":
        return [sys.executable, str(WAYS), arm]
    experts = sorted(str(path) for path in folder.glob("ft_*.safetensors"))
    coefficients = ",".join(str(w) for w in coefficients_for(len(experts)))
    return [
        sys.executable, "-m", "deme_cli", "merge", *experts, "-w", coefficients,
        "-o", str(folder / "out.safetensors"), "--quiet",
    ]  # fmt: skip


def compare_outputs(arms: list[str], folder: Path, python: str | None) -> None:
    """Whether all ways come to the same weights, within rounding."""
    from safetensors.torch import load_file

    found = {}
    for arm in set(arms) & {"safetensors", "deme", *METHODS}:
        clean(folder)
        watched(command(arm, folder, python), folder, {"HF_HUB_OFFLINE": "1"})
        parts = (folder / "out").glob("*.safetensors") if arm in METHODS else [
            folder / "out.safetensors"]  # fmt: skip
        found[arm] = {name: value for path in parts for name, value in load_file(path).items()}
    if "deme" not in found:
        return
    ours = found.pop("deme")
    for arm, theirs in sorted(found.items()):
        assert theirs.keys() == ours.keys(), arm
        largest = max(float((theirs[name] - ours[name]).abs().max()) for name in ours)
        print(f"largest difference of a weight (standard normal), {arm} - deme: {largest:.1e}")


def report(runs: dict[str, list[Timed]], megabytes: float) -> None:
    """The table; MB/s are of bytes read and written, `megabytes` in all, in the work alone."""
    ours = runs.get("deme")
    print("| way | process, s | work, s | MB/s | RssAnon, MB | process / deme | work / deme |")
    print("|---|---|---|---|---|---|---|")
    for arm, each in runs.items():
        process, work = [r.process for r in each], [r.work for r in each]
        peaks = [r.anonymous for r in each if r.anonymous is not None]
        cells = [spread(process), spread(work), f"{megabytes / statistics.median(work):.0f}"]
        cells.append(f"{max(peaks):.0f}" if peaks else "")
        if ours:
            cells.append(spread(ratios(process, [r.process for r in ours])))
            cells.append(spread(ratios(work, [r.work for r in ours])))
        print(f"| {arm} | {' | '.join(cells)} |")
    print(
        "targets: recipe / deme >= 12, mergekit / deme >= 5, loop / deme >= 0.67 in the work alone,"
    )
    print("at most 200 MB of RssAnon in deme")


if __name__ == "__main__":
    main()
