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
from conftest import write_tiny_base

from deme_cli.artifacts import fingerprint, fingerprint_file, load_tensors, read_record
from deme_cli.config import FinetuneConfig
from deme_cli.diffusion.denoiser import load_denoiser
from deme_cli.errors import ArtifactError, ConfigError, NumericsError, Stopped
from deme_cli.timesteps import TimestepRange, parse_range
from deme_cli.training.power_profile import gamma_of
from deme_cli.training.setup import Run, checkpoint_path, metrics_path, variant_path, variant_paths
from deme_cli.training.state import require_same_run
from deme_cli.training.train import train

SHORT = FinetuneConfig(steps=12, batch_size=4, lr=1e-3, checkpoint_every=5, held_out=16)
SITES = ("down_blocks_0", "down_blocks_1", "mid_block", "up_blocks_0", "up_blocks_1")


@pytest.fixture
def run(digits_run: Callable[..., Run]) -> Run:
    return digits_run(SHORT)


def with_settings(run: Run, **settings: object) -> Run:
    return replace(run, config=replace(run.config, **settings))


def train_to(run: Run, step: int, *, sent: signal.Signals | None = None) -> None:
    """Train and break off after `step`: the generator is dropped, as in a crash, or hears of it."""
    records = train(run)
    while next(records).step < step:
        pass
    if sent:
        os.kill(os.getpid(), sent)
        with pytest.raises(Stopped):
            next(records)


def curve(run: Run) -> list[float]:
    lines = metrics_path(run.output).read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


FALLING = {"lr_schedule": "cosine", "warmup": 3, "accumulation": 2}
STOPPED = {  # settings, and what has been learned beside the network by the update it stops at
    "fold": (FALLING, None),
    "block": ({"projection": "block", **FALLING}, None),
    "averages": ({"ema_lengths": [0.05, 0.1], "snapshot_every": 4}, None),
    "uncertainty": ({"loss_weighting": "uncertainty"}, "reduction.uncertainty.weight"),
    "uw": ({"multitask": "uw"}, "reduction.tasks.log_variances"),
    # alpha is solved at the updates from 0, 4 and 8
    "nashmtl": ({"multitask": "nashmtl", "multitask_every": 4, "accumulation": 2},
                "reduction.tasks.alpha"),
}  # fmt: skip


@pytest.mark.parametrize("name", STOPPED)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    digits_run: Callable[..., Run], name: str
) -> None:
    settings, learned = STOPPED[name]
    own = {"p": 0.0, "clusters": 2} if "multitask" in settings else {}
    clusters = [TimestepRange(25, 40), TimestepRange(40, 50)] if own else ()
    whole, broken = (
        replace(digits_run(replace(SHORT, **settings, **own), clusters=clusters), flip=True)
        for _ in range(2)
    )
    list(train(whole))
    # at a state that is saved, before a snapshot of it is written; or where a signal saves it
    train_to(broken, 8 if name == "averages" else 10, sent=signal.SIGTERM if learned else None)
    checkpoint = checkpoint_path(broken.output)
    if learned:
        start = 1.0 if name == "nashmtl" else 0.0
        assert (load_tensors(checkpoint)[learned] != start).any(), "something has been learned"
    with metrics_path(broken.output).open("a") as lines_cut_short:
        lines_cut_short.write('{"step": 11, "lo')
    list(train(broken))
    assert not checkpoint.exists()
    assert curve(broken) == curve(whole)
    files = ([one.output, *variant_paths(one.output, one.config)] for one in (whole, broken))
    for one, other in zip(*files, strict=True):
        assert read_record(one) == read_record(other)


def test_an_expert_says_what_was_done_and_leaves_the_base_alone(run: Run) -> None:
    before, plain = run.denoiser.record.fingerprint, set(run.denoiser.network.state_dict())
    extra = {f"channel_projection.{site}.weight" for site in SITES}
    for projection, more in (("fold", set()), ("block", extra)):
        own = with_settings(run, projection=projection, steps=2)
        own = replace(own, output=run.output.with_stem(projection))
        list(train(own))
        assert fingerprint(run.denoiser.network.state_dict()) == before
        record = read_record(own.output, "expert")
        assert (record.range, record.index, record.of, record.p) == ([25, 50], 2, 4, SHORT.p)
        assert (record.base, record.steps, record.seed) == (before, 2, 0)
        assert (record.training["lr"], record.data["source"]) == (SHORT.lr, "digits")
        assert not {"ema_lengths", "snapshot_every", "step"} & set(record.training)
        assert record.fingerprint == fingerprint_file(own.output) != before
        assert set(load_tensors(own.output)) == plain | more
        load_denoiser(own.output)  # with its projections, if it has any


def test_snapshots_are_what_shorter_runs_leave_and_averages_change_no_expert(
    digits_run: Callable[..., Run],
) -> None:
    config = replace(SHORT, held_out=0)
    saving = replace(config, ema_lengths=[0.05, 0.1], snapshot_every=4)
    shorter = replace(saving, steps=8, snapshot_every=None)
    plain, whole, short = map(digits_run, (config, saving, shorter))
    for run in (plain, whole, short):
        list(train(run))
    assert read_record(plain.output).fingerprint == read_record(whole.output).fingerprint
    names = {path.name for path in (whole.output.parent / "ft_2of4.snapshots").iterdir()}
    averages = ("ema-0.050", "ema-0.100")
    steps = [f"step-{step}{more}" for step in ("000004", "000008")
             for more in ("", *(f".{average}" for average in averages))]  # fmt: skip
    assert names == {f"{name}.safetensors" for name in (*averages, *steps)}
    record = read_record(variant_path(whole.output, step=4, length=0.05), "expert")
    assert (record.steps, record.training["step"], record.training["steps"]) == (4, 4, 12)
    assert record.training["ema_length"] == 0.05
    assert record.training["ema_gamma"] == gamma_of(0.05)
    folded = set(load_tensors(variant_path(whole.output, length=0.1)))
    assert folded == set(whole.denoiser.network.state_dict())
    for length in (None, 0.05):
        one = read_record(variant_path(whole.output, step=8, length=length))
        other = read_record(variant_path(short.output, length=length))
        assert one.fingerprint == other.fingerprint


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
    last = replace(with_settings(plain, ema_decay=0.0), output=run.output.with_name("last"))
    for one in (plain, everywhere, last):
        list(train(one))
    assert read_record(plain.output).fingerprint == read_record(everywhere.output).fingerprint
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


def test_a_kept_run_is_continued_with_the_settings_that_decide_its_result_alone(run: Run) -> None:
    spared = with_settings(run, gradient_checkpointing=True, micro_batch=2)
    assert replace(spared, compile="on").identity == run.identity
    # of before there were these settings
    kept = {k: v for k, v in run.identity.items() if k not in ("ema_lengths", "snapshot_every")}
    require_same_run(kept, run.identity, run.output)
    uw = with_settings(run, multitask="uw", clusters=2, p=0.0)
    uw, moved = (
        replace(uw, clusters=[TimestepRange(25, edge), TimestepRange(edge, 50)]).identity
        for edge in (30, 40)
    )
    averaged = with_settings(run, ema_lengths=[0.1]).identity
    for before, wanted, fault in [
        (kept, averaged, "ema_lengths = None"),
        ({**kept, "data": "0"}, run.identity, "on other images or captions"),
        (uw, moved, r"cluster_ranges = \['25:30', '30:50'\] is kept here"),
    ]:
        with pytest.raises(ConfigError, match=fault):
            require_same_run(before, wanted, run.output)


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
