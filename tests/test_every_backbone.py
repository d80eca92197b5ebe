"""The whole pipeline, command by command, on tiny real models: of classes, of text, of video."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import BUILDERS
from typer.testing import Result

from deme_cli.artifacts import read_record
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.denoiser import load_denoiser, predict

TRAINING = (
    "--steps", 2, "--batch-size", 4, "--accumulation", 1, "--lr", 1e-3,
    "--held-out", 0,
)  # fmt: skip


@pytest.mark.parametrize("name", sorted(BUILDERS.keys() & {"dit", "sdxl", "wan"}))
def test_experts_are_trained_merged_drawn_from_and_exported(
    name: str,
    pipelines: Callable[..., Path],
    deme: Callable[..., Result],
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"file_name": path.name, "text": f"thing {index}", "label": index}
        for index, path in enumerate(sorted(image_folder.iterdir()))
    ]
    (image_folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def done(*words: object) -> None:
        result = deme(*words)
        assert result.exit_code == 0, (words, result.exception, result.output)

    done("split", pipelines(name), "--data", image_folder, "-n", 2)
    settings = Path("deme.toml").read_text()
    Path("deme.toml").write_text(settings.replace("[data]", "[data]\nresolution = 16"))
    record = read_record(Path("base.safetensors"), "base")
    companions = open_companions(record)
    done("finetune", "--range", "all", *TRAINING)
    experts = ["ft_1of2.safetensors", "ft_2of2.safetensors"]
    done("task-vector", *experts)
    done("merge", *experts, "-w", "0.5,0.5")
    done("merge", *experts, "-w", "1,0", "-o", "first.safetensors")
    looking = ("--search", "gradient", "--objective", "experts", "--evaluations", 1, "--num", 4)
    done("merge", *experts, *looking, "--no-report", "-o", "fitted.safetensors")  # fills its cache
    first = read_record(Path("first.safetensors"), "merged")
    assert first.fingerprint == read_record(Path(experts[0]), "expert").fingerprint
    assert first.companions == record.companions
    shown = ("--prompts", "digits") if companions.wants == "text" else ()
    drawing = ("-n", 3, "--steps", 2, "--resolution", 16, *shown)
    done("sample", "merged.safetensors", *drawing)
    done("ensemble-sample", *experts, *drawing)
    images = [
        load_file(path)["images"].numpy()
        for path in ("merged-samples.safetensors", "ensemble.safetensors")
    ]
    assert all(each.shape == (3, 16, 16, 3) for each in images)
    assert not np.array_equal(*images)
    done("export", "merged.safetensors", "exported")
    pipeline = diffusers.DiffusionPipeline.from_pretrained("exported")
    merged = load_denoiser(Path("merged.safetensors"))
    x_t, t = torch.randn(2, 4, 8, 8), merged.schedule.times(torch.tensor(300))
    told: list[Any] = [3, 7] if companions.wants == "class" else ["a seven", "a boat"]
    given = companions.conditions(told)
    with torch.no_grad():
        expected = predict(merged.network, x_t, t, given)
        network = getattr(pipeline, merged.backbone.part)
        torch.testing.assert_close(predict(network, x_t, t, given), expected, rtol=0, atol=1e-5)
