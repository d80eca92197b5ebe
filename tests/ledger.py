"""What must not move while the code is rebuilt: results of whole commands, written down as JSON.

    python tests/ledger.py before.json      # in a checkout of the commit before
    python tests/ledger.py after.json --against before.json

Not a test of the suite: figures hold for one machine and one version of the libraries. Weights and
images are read from the files by safetensors alone, so nothing here depends on how deme reads them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file
from typer.testing import CliRunner, Result

DIGITS = ("--data", "digits", "--steps", 8, "--batch-size", 8, "--held-out", 0, "--device", "cpu")
EXPERTS: dict[str, tuple[object, ...]] = {
    "plain": (),
    "p 0": ("--p", 0),
    "p 0.1": ("--p", 0.1),
    "consistency off": ("--consistency", 0),
    "projection block": ("--projection", "block"),
    "projection none": ("--projection", "none"),
    "min-snr": ("--loss-weighting", "min-snr"),
    "p2": ("--loss-weighting", "p2"),
    "snr+1": ("--loss-weighting", "snr+1"),
    "uncertainty": ("--loss-weighting", "uncertainty"),
    "uw": ("--multitask", "uw", "--p", 0),
    "nashmtl": ("--multitask", "nashmtl", "--p", 0),
    "pcgrad": ("--multitask", "pcgrad", "--p", 0),
    "accumulation": ("--accumulation", 2),
    "cosine, warm-up": ("--lr-schedule", "cosine", "--warmup", 3),
}
MERGES: dict[str, tuple[object, ...]] = {
    "linear": ("-w", "0.1,0.2,0.3,0.4"),
    "zero": ("-w", "0,0,0,0"),
    "ties": ("-w", "1,1,1,1", "--method", "ties"),
    "dare": ("-w", "0.5,0.5,0.5,0.5", "--method", "dare"),
    "model-stock": ("--method", "model-stock"),
    "by glob": ("-w", "0.1,0.2,0.3,0.4", "--coefficients-for", "mid_block.*=1,0,0,0"),
}
SAMPLERS = ("ddim", "ddpm", "dpm++", "euler", "unipc")
NEW = ("-o", "new.safetensors")
DRAW = ("-n", 4, "--steps", 5, "--device", "cpu")
REFUSED: dict[str, tuple[object, ...]] = {
    "unknown command": ("finetun",),
    "unknown option": ("sample", "base.safetensors", "--stepps", 3),
    "range 5/4": ("finetune", "--range", "5/4", *DIGITS),
    "empty range": ("finetune", "--range", "500:250", *DIGITS),
    "p above 1": ("finetune", "--range", "1/4", "--p", 1.5, *DIGITS),
    "no such base": ("finetune", "--range", "1/4", "--base", "none.safetensors", *DIGITS, *NEW),
    "no such images": ("finetune", "--range", "1/4", *DIGITS, "--data", "nowhere", *NEW),
    "output exists": ("split", "digits", "-n", 4),
    "truncated": ("sample", "truncated.safetensors", *DRAW),
    "no safetensors": ("inspect", "text.safetensors"),
    "another kind": ("task-vector", "base.safetensors"),
    "another base": ("merge", "ft_1of4.safetensors", "-w", 1, "--base", "other.safetensors", *NEW),
    "coefficients": ("merge", "ft_1of4.safetensors", "-w", "1,2", "-o", "x.safetensors"),
    "a missing file": ("merge", "ft_9of9.safetensors", "-w", 1, *NEW),
    "no cover": ("ensemble-sample", "ft_1of4.safetensors", *DRAW),
    "unknown sampler": ("sample", "base.safetensors", "--sampler", "magic", *DRAW),
    "too many steps": ("sample", "base.safetensors", "--steps", 5000),
    "no Inception weights": ("eval", "base.safetensors", "--fid", "pictures", "-n", 4, *DRAW[2:]),
    "gate": ("eval", "base.safetensors", "--fid", "digits", *DRAW, "--max-fid", 0.001),
    "unknown key": ("merge", "ft_1of4.safetensors", "--config", "bad.toml", *NEW),
}  # fmt: skip


def deme(*arguments: object) -> Result:
    from deme_cli.app import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def exit_code(result: Result) -> int:
    return getattr(result.exception, "exit_code", result.exit_code)


def run(*arguments: object) -> str:
    """The stdout of a command that must end well."""
    result = deme(*arguments)
    if exit_code(result):
        raise SystemExit(f"{arguments}: {result.output}\n{result.exception!r}")
    return result.stdout


def digest(path: str) -> str:
    """The tensors of a file, whatever its header says of them."""
    total = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        total.update(f"{name} {tensor.shape} {tensor.dtype}".encode() + tensor.tobytes())
    return total.hexdigest()[:16]


def is_resumed() -> bool:
    """Whether an expert that was stopped by SIGTERM and continued is the one that ran through."""
    command = [str(word) for word in (
        sys.executable, "-m", "deme_cli", "finetune", "--range", "3/4", *DIGITS, "--steps", 150,
        "--checkpoint-every", 10,
    )]  # fmt: skip
    subprocess.run([*command, "-o", "whole.safetensors"], check=True, capture_output=True)
    stopped = [*command, "-o", "stopped.safetensors"]
    process = subprocess.Popen(stopped, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(Path().glob("stopped*metrics*")):
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    subprocess.run(stopped, check=True, capture_output=True)
    return code == 75 and digest("whole.safetensors") == digest("stopped.safetensors")


def record() -> dict[str, Any]:
    """Every figure by name, from commands run in the current folder."""
    ledger: dict[str, Any] = {}
    run("split", "digits", "-n", 4)
    ledger["base"] = digest("base.safetensors")
    for name, options in EXPERTS.items():
        run("finetune", "--range", "2/4", *DIGITS, *options, "-o", "x.safetensors", "--force")
        ledger[f"expert: {name}"] = digest("x.safetensors")
    ledger["expert: resumed equals uninterrupted"] = is_resumed()
    run("finetune", "--range", "all", *DIGITS, "--projection", "none")
    experts = [f"ft_{index}of4.safetensors" for index in range(1, 5)]
    run("task-vector", *experts)
    ledger["task vector"] = digest("tv_2of4.safetensors")
    for name, options in MERGES.items():
        run("merge", *experts, *options, "-o", "merged.safetensors", "--force")
        ledger[f"merged: {name}"] = digest("merged.safetensors")
    run("merge", *experts[:2], "--method", "slerp", "-o", "x.safetensors", "--force")
    ledger["merged: slerp"] = digest("x.safetensors")
    search = ("--search", "grid", "--grid", "0,1", "--num", 8, "--no-report")
    found = json.loads(run("merge", *experts[:2], *search, "-o", "found.safetensors", "--json"))
    ledger["search: grid"] = [found["coefficients"], digest("found.safetensors")]

    for sampler in SAMPLERS:
        output = f"{sampler}.safetensors"
        run("sample", "merged.safetensors", *DRAW, "--sampler", sampler, "-o", output)
        ledger[f"samples: digits, {sampler}"] = digest(f"{sampler}.safetensors")
    run("ensemble-sample", *experts, *DRAW, "-o", "ensemble.safetensors")
    ledger["samples: ensemble"] = digest("ensemble.safetensors")
    from tiny_pipelines import stable_diffusion

    run("split", stable_diffusion(Path("sd")), "-o", "text", "-n", 2)
    for sampler in SAMPLERS:
        words = ("--config", "text/deme.toml", "-n", 2, "--steps", 4, "--sampler", sampler)
        output = f"sd-{sampler}.safetensors"
        run("sample", "text/base.safetensors", "--prompt", "a cat", *words, "-o", output)
        ledger[f"samples: SD, {sampler}"] = digest(f"sd-{sampler}.safetensors")

    rng = np.random.default_rng(0)
    Path("pictures").mkdir()
    for index in range(6):
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(f"pictures/{index}.png")
    for data in ("digits", "pictures"):
        run("stats", data, "--features", "digits", "-o", f"stats-{data}.safetensors")
        ledger[f"statistics: {data}"] = digest(f"stats-{data}.safetensors")
    rows = ("base.safetensors", "merged.safetensors", *experts)
    table = json.loads(
        run("eval", *rows, "--fid", "digits", "-n", 40, "--steps", 5, "--repeats", 2, "--json")
    )
    ledger["eval"] = {row["name"]: row["metrics"] for row in table["rows"]}
    ledger |= refusals()
    return ledger


def refusals() -> dict[str, int]:
    """The exit code of each bad input."""
    whole = Path("ft_1of4.safetensors").read_bytes()
    Path("truncated.safetensors").write_bytes(whole[:-100])
    Path("text.safetensors").write_text("no tensors, only words\n" * 9)
    Path("bad.toml").write_text("[finetune]\nstepz = 3\n")
    Path("none.toml").write_text("[merge]\n")
    run("split", "digits", "-o", "other_run", "-n", 2)
    from conftest import write_tiny_base

    write_tiny_base(Path("other.safetensors"))
    return {f"exit code: {name}": exit_code(deme(*words)) for name, words in REFUSED.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--against", type=Path)
    options = parser.parse_args()
    output = options.output.resolve()
    before = json.loads(options.against.read_text()) if options.against else {}
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        ledger = record()
        os.chdir("/")
    output.write_text(json.dumps(ledger, indent=1) + "\n")
    names = [name for name in {**before, **ledger} if before.get(name) != ledger.get(name)]
    for name in names if before else ():
        print(f"{name}: {before.get(name)} -> {ledger.get(name)}")
    print(f"{len(ledger)} results" + (f", {len(names)} moved" if before else ""))


if __name__ == "__main__":
    main()
