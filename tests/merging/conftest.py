"""Families of arbitrary small tensors: a base and experts as artifacts, without a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deme_cli.artifacts import BaseRecord, ExpertRecord, write_artifact
from deme_cli.timesteps import split_uniform

Weights = Mapping[str, Tensor]
WriteInputs = Callable[..., tuple[Path, list[Path]]]
SHARED = {
    "source": "test",
    "model_config": {"_class_name": "UNet2DModel"},
    "scheduler_config": {},
    "num_train_timesteps": 100,
}


@pytest.fixture
def write_inputs(tmp_path: Path) -> WriteInputs:
    """Write base and experts; returns their paths. The experts' records say `projection`."""

    def write(
        base: Weights, experts: Sequence[Weights], *, projection: str = "none", folder: str = "."
    ) -> tuple[Path, list[Path]]:
        place = tmp_path / folder
        base_path = place / "base.safetensors"
        base_record = write_artifact(base_path, base, BaseRecord(**SHARED))
        paths = []
        spans = split_uniform(len(experts), SHARED["num_train_timesteps"])
        for index, (weights, span) in enumerate(zip(experts, spans, strict=True), start=1):
            record = ExpertRecord(
                **SHARED,
                range=[span.start, span.stop],
                index=index,
                of=len(experts),
                base=base_record.fingerprint,
                p=0.3,
                steps=0,
                seed=0,
                projection=projection,
                data={"source": "digits"},
                training={},
            )
            paths.append(place / f"ft_{index}of{len(experts)}.safetensors")
            write_artifact(paths[-1], weights, record)
        return base_path, paths

    return write


def random_weights(seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Weights:
    """A matrix, a vector, a scalar and an empty tensor."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv.weight": (17, 5), "conv.bias": (17,), "scale": (), "none": (0, 3)}
    return {
        name: (scale * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in shapes.items()
    }


@pytest.fixture
def weights() -> Callable[..., Weights]:
    return random_weights
