"""What merged and exported files tell other programs of themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deme_cli.artifacts import BaseRecord
from deme_cli.diffusion.single_file import PUBLISHED
from deme_cli.files import read_header
from deme_cli.model_spec import model_spec

V = {"prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("Stable Diffusion 1", {}, "stable-diffusion-v1 512x512 epsilon"),
        ("Stable Diffusion 2", {}, "stable-diffusion-v2-512 512x512 epsilon"),
        ("Stable Diffusion 2", V, "stable-diffusion-v2-768-v 512x512 v"),
        ("SDXL", {}, "stable-diffusion-xl-v1-base 1024x1024 epsilon"),
        ("Flux dev", {}, "flux-1-dev"),
        ("Flux schnell", {}, "flux-1-schnell"),
    ],
)
def test_the_architecture_has_the_name_that_kohya_gives_it(
    name: str, changes: dict, expected: str
) -> None:
    config, scheduler = PUBLISHED[name]
    record = BaseRecord(
        source="a", model_config=config, scheduler_config={**scheduler, **changes},
        num_train_timesteps=1000,
    )  # fmt: skip
    told = model_spec(record, "a title", single_file=True)
    keys = ("architecture", "resolution", "prediction_type")
    assert " ".join(told[f"modelspec.{k}"] for k in keys if f"modelspec.{k}" in told) == expected
    assert told["modelspec.title"] == "a title"
    assert told["modelspec.implementation"].startswith("https://github.com/")
    assert told["modelspec.sai_model_spec"] == "1.0.0"


def test_a_merged_file_tells_its_parents_and_equal_merges_are_equal_files(
    deme: Callable, run_folder: Path
) -> None:
    written = []
    for _ in range(2):
        done = deme(
            "merge", "ft_1of4.safetensors", "ft_2of4.safetensors", "-w", "0.5,-1", "--force"
        )
        assert done.exit_code == 0, done.output
        written.append(Path("merged.safetensors").read_bytes())
    assert written[0] == written[1]
    told = read_header(Path("merged.safetensors")).metadata
    assert told["modelspec.merged_from"] == "tiny, 0.5 * ft_1of4, -1 * ft_2of4"
    assert told["modelspec.title"] == "tiny, merged"
    assert deme("export", "merged.safetensors", "out").exit_code == 0
    again = read_header(Path("out/unet/diffusion_pytorch_model.safetensors")).metadata
    assert again.pop("modelspec.date").startswith("20")
    assert again.pop("modelspec.title") == "out"
    assert again.items() <= told.items()
