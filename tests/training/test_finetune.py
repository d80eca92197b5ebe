from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_base
from tiny_runs import digits_run

from deme_cli.artifacts import fingerprint, fingerprint_file, load_tensors, read_record
from deme_cli.config import FinetuneConfig
from deme_cli.diffusion.denoiser import load_denoiser
from deme_cli.errors import ArtifactError, ConfigError, NumericsError
from deme_cli.timesteps import parse_range
from deme_cli.training.setup import Run, checkpoint_path, metrics_path
from deme_cli.training.train import train

SHORT = FinetuneConfig(steps=12, batch_size=8, lr=1e-3, checkpoint_every=5, held_out=16)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return digits_run(tmp_path, SHORT)


def train_to(run: Run, step: int) -> None:
    """Train and break off after `step`, as a crash would: the generator is dropped."""
    for record in train(run):
        if record.step >= step:
            return


@pytest.mark.parametrize("projection", ["fold", "block", "none"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(run: Run, projection: str) -> None:
    config = replace(SHORT, projection=projection, lr_schedule="cosine", warmup=3, accumulation=2)
    run = replace(run, config=config, flip=True)
    list(train(run))
    whole = read_record(run.output, "expert")
    lines = metrics_path(run.output).read_text().splitlines()
    curve = [json.loads(line)["loss"] for line in lines]
    run.output.unlink()

    train_to(run, 10)  # the checkpoint is that of update 10
    with metrics_path(run.output).open("a") as lines_cut_short:
        lines_cut_short.write('{"step": 11, "lo')
    assert checkpoint_path(run.output).exists()
    list(train(run))
    assert read_record(run.output, "expert") == whole
    lines = metrics_path(run.output).read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == curve
    assert not checkpoint_path(run.output).exists()


def test_the_record_says_what_was_done_and_the_base_stays_as_it_was(run: Run) -> None:
    before = run.denoiser.record.fingerprint
    list(train(run))
    record = read_record(run.output, "expert")
    assert fingerprint(run.denoiser.network.state_dict()) == before
    assert (record.range, record.index, record.of, record.p) == ([25, 50], 2, 4, SHORT.p)
    assert (record.base, record.steps, record.seed) == (before, 12, 0)
    assert record.training["lr"] == SHORT.lr
    assert record.data["source"] == "digits"
    assert record.fingerprint == fingerprint_file(run.output) != before


def test_a_folded_expert_is_a_plain_diffusers_network_and_a_block_one_is_not(run: Run) -> None:
    list(train(run))
    plain = set(run.denoiser.network.state_dict())
    assert set(load_tensors(run.output)) == plain
    output = run.output.with_name("block.safetensors")
    block = replace(run, config=replace(SHORT, projection="block"), output=output)
    list(train(block))
    extra = set(load_tensors(block.output)) - plain
    assert extra == {
        f"channel_projection.{site}.weight"
        for site in ("down_blocks_0", "down_blocks_1", "mid_block", "up_blocks_0", "up_blocks_1")
    }
    load_denoiser(block.output)  # and loads with its projections


def test_the_moving_average_is_what_is_saved_and_it_moves(run: Run) -> None:
    averaged = replace(run, output=run.output.with_name("averaged.safetensors"))
    list(train(averaged))
    last = replace(run, config=replace(SHORT, ema_decay=0.0))
    list(train(last))
    base = run.denoiser.network.state_dict()

    def distance(path: Path) -> float:
        loaded = load_tensors(path)
        return sum((loaded[name] - base[name]).square().sum().item() for name in base) ** 0.5

    assert 0 < distance(averaged.output) < distance(last.output)


def test_training_lowers_the_loss_on_its_range(run: Run) -> None:
    config = replace(
        SHORT, steps=60, p=0.0, lr=1e-2, consistency=0.0, ema_decay=0.9, checkpoint_every=20
    )
    records = list(train(replace(run, config=config)))
    held_out = [record.held_out for record in records if record.held_out is not None]
    assert held_out[-1] < 0.7 * held_out[0]


def test_the_whole_range_with_no_extras_is_plain_finetuning(run: Run) -> None:
    config = replace(SHORT, p=0.0, consistency=0.0, projection="none")
    plain = replace(run, choice=parse_range("1/1", 100), config=config)
    everywhere = replace(plain, config=replace(config, p=1.0), output=run.output.with_name("p1"))
    list(train(plain))
    list(train(everywhere))
    one, other = load_tensors(plain.output), load_tensors(everywhere.output)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(run: Run) -> None:
    broken = replace(run, config=replace(SHORT, steps=400, lr=1e30, grad_clip=0.0))
    train_to(replace(run, config=replace(broken.config, lr=1e-3)), 5)
    kept = checkpoint_path(run.output).read_bytes()
    with pytest.raises(ConfigError, match=r"lr = 0\.001"):
        list(train(broken))
    checkpoint_path(run.output).unlink()
    with pytest.raises(NumericsError, match="became"):
        list(train(broken))
    assert not run.output.exists()
    checkpoint_path(run.output).write_bytes(kept)
    train_to(replace(run, config=replace(broken.config, lr=1e-3)), 10)


def test_a_corrupt_checkpoint_is_refused(run: Run) -> None:
    train_to(run, 5)
    path = checkpoint_path(run.output)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="corrupt"):
        list(train(run))


WORDS = [
    "finetune", "--range", "1/2", "--data", "digits", "--steps", "60", "--lr", "1e-3",
    "--batch-size", "16", "--checkpoint-every", "10", "--device", "cpu",
]  # fmt: skip


def start(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "deme_cli", *WORDS],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    path = folder / "ft_1of2.metrics.jsonl"
    while process.poll() is None:
        if path.exists() and len(path.read_text().splitlines()) * 10 >= step:
            return
        time.sleep(0.01)
    raise AssertionError(process.stderr.read())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75), (signal.SIGINT, 130)]
)
def test_a_killed_run_continues_to_the_same_weights(
    deme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals, code: int
) -> None:
    write_tiny_base(tmp_path / "base.safetensors")
    process = start(tmp_path)
    wait_for_step(tmp_path, 20, process)
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
