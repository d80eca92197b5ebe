"""Tiny real models and data: an 8x8 UNet, experts made by perturbing it, a folder of ten images."""

from __future__ import annotations

import gc
import os
import shutil

import imports_wait  # noqa: F401

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from typer.testing import CliRunner, Result

from deme_cli.artifacts import BaseRecord, ExpertRecord, load_tensors, read_record, write_artifact
from deme_cli.diffusion.denoiser import build_network, load_denoiser
from deme_cli.errors import DemeError
from deme_cli.timesteps import split_uniform

torch.set_num_threads(1)
pytest_plugins = ["stand_ins"]

NUM_TRAIN_TIMESTEPS = 100
TINY_MODEL = {
    "_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1,
    "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 8,
}  # fmt: skip
TINY_SCHEDULER = {
    "_class_name": "DDPMScheduler", "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
    "beta_start": 0.001, "beta_end": 0.2, "beta_schedule": "linear",
    "prediction_type": "epsilon", "clip_sample": True,
}  # fmt: skip


def write_tiny_base(path: Path, *, seed: int = 0, **model_config: object) -> BaseRecord:
    """A base artifact with random weights; `model_config` overrides TINY_MODEL."""
    config = {**TINY_MODEL, **model_config}
    torch.manual_seed(seed)
    network = build_network(config)
    record = BaseRecord(
        source="tiny", model_config=config, scheduler_config=TINY_SCHEDULER,
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
    )  # fmt: skip
    return write_artifact(path, network.state_dict(), record)


def write_tiny_expert(
    path: Path, base_path: Path, *, index: int, of: int, scale: float = 0.02
) -> ExpertRecord:
    """An expert artifact: the base plus Gaussian noise of `scale`, seeded by its index."""
    base = read_record(base_path, "base")
    generator = torch.Generator().manual_seed(100 + index)
    weights = {
        name: tensor + scale * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_tensors(base_path).items()
    }
    span = split_uniform(of, base.num_train_timesteps)[index - 1]
    fields = {key: asdict(base)[key] for key in ("source", "model_config", "scheduler_config")}
    record = ExpertRecord(
        **fields, num_train_timesteps=base.num_train_timesteps, range=[span.start, span.stop],
        index=index, of=of, base=base.fingerprint, p=0.3, steps=0, seed=0, projection="none",
        data={"source": "digits", "fingerprint": ""}, training={},
    )  # fmt: skip
    return write_artifact(path, weights, record)


def write_adapter_expert(
    path: Path, base_path: Path, *, index: int, of: int, rank: int = 2, targets: str = "all"
) -> ExpertRecord:
    """An expert artifact of random adapters, seeded by its index."""
    from deme_cli.diffusion.adapters import adapter_tensors, attach_adapters, target_layers

    base = load_denoiser(base_path)
    attach_adapters(base.network, target_layers(base.network, targets), rank=rank)
    generator = torch.Generator().manual_seed(200 + index)
    drawn = {
        name: 0.3 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in base.network.named_parameters()
    }
    span = split_uniform(of, base.record.num_train_timesteps)[index - 1]
    fields = ("source", "model_config", "scheduler_config", "num_train_timesteps", "companions")
    record = ExpertRecord(
        **{name: getattr(base.record, name) for name in fields},
        range=[span.start, span.stop],
        index=index,
        of=of,
        base=base.record.fingerprint,
        holds="adapter",
        adapter={"rank": rank, "alpha": rank, "targets": targets},
    )
    return write_artifact(path, adapter_tensors(drawn, scale=1, part=base.backbone.part), record)


def collect_images(experts: Sequence, config: object, **options: object) -> np.ndarray:
    """All images of a drawing as one uint8 array (n, H, W, C)."""
    from deme_cli.sampling.sampler import ImageBatch, sample_images

    records = sample_images(experts, config, **options)
    return np.concatenate([record.images for record in records if isinstance(record, ImageBatch)])


def largest_difference(images: np.ndarray, others: np.ndarray) -> int:
    return int(np.abs(images.astype(int) - others.astype(int)).max())


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported stays: the collector need not look at it again and again


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """`os.fsync` does nothing in this process: no test pulls the plug, and each call waits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base.safetensors` and experts `ft_1of4` ... `ft_4of4`, made once."""
    folder = tmp_path_factory.mktemp("run")
    write_tiny_base(folder / "base.safetensors")
    for index in range(1, 5):
        path = folder / f"ft_{index}of4.safetensors"
        write_tiny_expert(path, folder / "base.safetensors", index=index, of=4)
    return folder


@pytest.fixture
def run_folder(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a copy of the finished run's base and experts in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Ten 8x8 grey PNG images in a folder."""
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image, mode="L").save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture
def deme() -> Callable[..., Result]:
    """Run a `deme` command line in this process. A DemeError is the result's `exception`."""
    from deme_cli.app import app

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def refuse(deme: Callable[..., Result]) -> Callable[..., str]:
    """Check that a command line ends with a code and one line with some words, and changes nothing
    in the current folder; gives back that line."""

    def check(exit_code: int, words: str, *arguments: object) -> str:
        before = contents(Path())
        result = deme(*arguments)
        error = result.exception
        assert isinstance(error, DemeError), (arguments, error, result.output)
        assert error.exit_code == exit_code, (arguments, error)
        assert words in str(error), arguments
        assert "\n" not in str(error), arguments
        assert result.stdout == "", arguments
        assert contents(Path()) == before, arguments
        return str(error)

    return check


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[..., Path]:
    """The folder of a tiny pipeline by name (see tiny_pipelines.BUILDERS), each made once for all
    the processes of a session; nothing may change it."""
    root = tmp_path_factory.getbasetemp()
    shared = (root if worker_id == "master" else root.parent) / "pipelines"

    def folder(name: str, **options: object) -> Path:
        place = shared / "-".join([name, *(f"{k}={options[k]}" for k in sorted(options))])
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            with FileLock(f"{place}.lock"):
                if not place.exists():
                    from tiny_pipelines import BUILDERS

                    partial = Path(f"{place}.partial")
                    BUILDERS[name](partial / name, **options)
                    partial.rename(place)
        return place / name

    return folder
