"""A stand-in for Inception's TorchScript, and what may lie in a cache."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

NUM_FEATURES = 2048


class StandInLayers(nn.Module):
    """Normalised images -> 2048 features, as the submodule `layers` of the published file."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(3)
        self.linear = nn.Linear(27, NUM_FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.pool(x).flatten(1))


class StandIn(nn.Module):
    """The interface of the published file: resizes, normalises, and has `layers`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = StandInLayers()
        self.output = nn.Linear(NUM_FEATURES, 5)

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        x = functional.interpolate(x, size=[299, 299], mode="bilinear", align_corners=False)
        features = self.layers((x - 128) / 128)
        return features if return_features else self.output(features)


def save_script(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module.eval()), str(path))
    return path


def write_stand_in(path: Path) -> Path:
    torch.manual_seed(0)
    return save_script(StandIn(), path)


def write_statistics_npz(path: Path, num_features: int = NUM_FEATURES) -> Path:
    """Statistics of a standard Gaussian, laid out as clean-fid's."""
    np.savez(path, mu=np.zeros(num_features), sigma=np.eye(num_features))
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty DEME_CACHE, with every other cache out of sight and no network."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for name in ("DEME_CACHE", "XDG_CACHE_HOME", "TORCH_HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(folder))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    return write_stand_in(tmp_path / "stand-in.pt")
