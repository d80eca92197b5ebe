"""One run: what it minimises, what it leaves, and that it goes on bit for bit after any stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_base

from deme_cli.artifacts import fingerprint, fingerprint_file, load_tensors, read_record
from deme_cli.config import FinetuneConfig
from deme_cli.diffusion.denoiser import load_denoiser
from deme_cli.errors import ArtifactError, ConfigError, NumericsError
from deme_cli.timesteps import parse_range
from deme_cli.training.setup import Run, checkpoint_path, metrics_path
from deme_cli.training.train import train

SHORT = FinetuneConfig(steps=12, batch_size=4, lr=1e-3, checkpoint_every=5, held_out=16)
SITES = ("down_blocks_0", "down_blocks_1", "mid_block", "up_blocks_0", "up_blocks_1")


@pytest.fixture
def run(digits_run: Callable[..., Run]) -> Run:
    return digits_run(SHORT)


def with_settings(run: Run, **settings: object) -> Run:
    return replace(run, config=replace(run.config, **settings))


def train_to(run: Run, step: int) -> None:
    """Train and break off after `step`, as a crash would: the generator is dropped."""
    for record in train(run):
        if record.step >= step:
            return


def curve(run: Run) -> list[float]:
    lines = metrics_path(run.output).read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("projection", ["fold", "block"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit_and_says_what_was_done(
    run: Run, projection: str
) -> None:
    before, plain = run.denoiser.record.fingerprint, set(run.denoiser.network.state_dict())
    settings = {"lr_schedule": "cosine", "warmup": 3, "accumulation": 2}
    run = replace(with_settings(run, projection=projection, **settings), flip=True)
    list(train(run))
    record, losses = read_record(run.output, "expert"), curve(run)
    assert fingerprint(run.denoiser.network.state_dict()) == before
    assert (record.range, record.index, record.of, record.p) == ([25, 50], 2, 4, SHORT.p)
    assert (record.base, record.steps, record.seed) == (before, 12, 0)
    assert record.training["lr"] == SHORT.lr
    assert record.data["source"] == "digits"
    assert record.fingerprint == fingerprint_file(run.output) != before
    extra = {f"channel_projection.{site}.weight" for site in SITES}
    assert set(load_tensors(run.output)) == plain | (extra if projection == "block" else set())
    load_denoiser(run.output)  # with its projections, if it has any
    run.output.unlink()

    train_to(run, 10)  # the checkpoint is that of update 10
    with metrics_path(run.output).open("a") as lines_cut_short:
        lines_cut_short.write('{"step": 11, "lo')
    assert checkpoint_path(run.output).exists()
    list(train(run))
    assert read_record(run.output, "expert") == record
    assert curve(run) == losses
    assert not checkpoint_path(run.output).exists()


def test_training_lowers_the_loss_on_its_range(run: Run) -> None:
    run = with_settings(
        run, steps=40, p=0.0, lr=1e-2, consistency=0.0, ema_decay=0.9, checkpoint_every=20,
        batch_size=8,
    )  # fmt: skip
    held_out = [record.held_out for record in train(run) if record.held_out is not None]
    assert held_out[-1] < 0.8 * held_out[0]


def test_the_whole_range_with_no_extras_is_plain_finetuning(run: Run) -> None:
    plain = replace(
        with_settings(run, steps=3, p=0.0, consistency=0.0, projection="none"),
        choice=parse_range("1/1", 100),
    )
    everywhere = replace(with_settings(plain, p=1.0), output=run.output.with_name("p1"))
    list(train(plain))
    list(train(everywhere))
    one, other = load_tensors(plain.output), load_tensors(everywhere.output)
    assert all(torch.equal(one[name], other[name]) for name in one)
    last = replace(with_settings(plain, ema_decay=0.0), output=run.output.with_name("last"))
    list(train(last))
    base = run.denoiser.network.state_dict()

    def distance(path: Path) -> float:
        loaded = load_tensors(path)
        return sum((loaded[name] - base[name]).square().sum().item() for name in base) ** 0.5

    assert 0 < distance(plain.output) < distance(last.output)  # the moving average is what is saved


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(run: Run) -> None:
    good = with_settings(run, steps=400, grad_clip=0.0)
    train_to(good, 5)
    kept = checkpoint_path(run.output).read_bytes()
    with pytest.raises(ConfigError, match=r"an unfinished run with lr = 0\.001"):
        list(train(with_settings(good, lr=1e30)))
    checkpoint_path(run.output).unlink()
    with pytest.raises(NumericsError, match="became"):
        list(train(with_settings(good, lr=1e30)))
    assert not run.output.exists()
    checkpoint_path(run.output).write_bytes(kept[:-3] + bytes([kept[-3] ^ 1]) + kept[-2:])
    with pytest.raises(ArtifactError, match="corrupt"):
        list(train(good))
    checkpoint_path(run.output).write_bytes(kept)
    train_to(good, 10)


WORDS = [
    "finetune", "--range", "1/2", "--data", "digits", "--steps", "60", "--lr", "1e-3",
    "--batch-size", "16", "--checkpoint-every", "10", "--device", "cpu",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75), (signal.SIGINT, 130)]
)
def test_a_killed_run_continues_to_the_same_weights(
    deme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals, code: int
) -> None:
    write_tiny_base(tmp_path / "base.safetensors")
    process = subprocess.Popen(
        [sys.executable, "-m", "deme_cli", *WORDS], cwd=tmp_path, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
    )  # fmt: skip
    path = tmp_path / "ft_1of2.metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(sent)
    _, message = process.communicate(timeout=60)
    assert process.returncode == code, message
    if code > 0:
        assert "run the same command again" in message
    # the rest in this process, by the same command line
    monkeypatch.chdir(tmp_path)
    again = deme(*WORDS)
    assert again.exit_code == 0, again.exception
    broken = read_record(tmp_path / "ft_1of2.safetensors").fingerprint
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"base.safetensors", "ft_1of2.safetensors", "ft_1of2.metrics.jsonl"}
    assert deme(*WORDS, "--force").exit_code == 0
    assert read_record(tmp_path / "ft_1of2.safetensors").fingerprint == broken
