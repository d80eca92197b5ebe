"""Models with random weights for the benchmarks: the shapes of published ones, nothing fetched."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deme_cli.diffusion.denoiser import Denoiser

SCHEDULER = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000}
DIGITS = {
    "_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1,
    "layers_per_block": 1, "block_out_channels": [16, 32], "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
SMALL_CIFAR = {
    "_class_name": "UNet2DModel", "sample_size": 32, "in_channels": 3, "out_channels": 3,
    "layers_per_block": 1, "block_out_channels": [64, 128],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip


def ddpm_cifar10(width: int = 128) -> dict[str, Any]:
    """The configuration of google/ddpm-cifar10-32 (width 128: 35.7 M), or of another width."""
    down = ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]
    return {
        "_class_name": "UNet2DModel", "sample_size": 32, "in_channels": 3, "out_channels": 3,
        "layers_per_block": 2, "block_out_channels": [width, 2 * width, 2 * width, 2 * width],
        "down_block_types": down, "up_block_types": [d.replace("Down", "Up") for d in down[::-1]],
        "attention_head_dim": None, "norm_num_groups": min(32, width), "norm_eps": 1e-6,
        "freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0,
    }  # fmt: skip


def random_denoiser(
    config: dict[str, Any], *, device: str = "cpu", dtype: str = "fp32"
) -> Denoiser:
    """A denoiser of this configuration on the DDPM schedule of 1000 steps, frozen."""
    import torch

    from deme_cli.artifacts import BaseRecord
    from deme_cli.diffusion.denoiser import (
        TORCH_DTYPES,
        Denoiser,
        build_network,
        choose_device,
    )
    from deme_cli.diffusion.schedule import read_schedule

    torch.manual_seed(0)
    network = build_network(config).to(choose_device(device))
    if dtype != "fp32":
        network.to(TORCH_DTYPES[dtype])
    record = BaseRecord(
        source="benchmark", model_config=config, scheduler_config=SCHEDULER,
        num_train_timesteps=1000, fingerprint="random",
    )  # fmt: skip
    return Denoiser(network.eval().requires_grad_(False), read_schedule(SCHEDULER), record)


def write_pipeline(folder: Path, config: dict[str, Any]) -> Path:
    """A diffusers folder of such a model, as `deme split` takes it."""
    from diffusers import DDPMPipeline, DDPMScheduler

    scheduler = DDPMScheduler.from_config(SCHEDULER)
    pipeline: Any = DDPMPipeline(random_denoiser(config).network, scheduler)
    pipeline.save_pretrained(folder)
    return folder


def write_family(folder: Path, config: dict[str, Any], experts: int, *, scale: float = 1.0) -> int:
    """base.safetensors and ft_1ofN.safetensors ... of N ranges, weights of N(0, scale^2).

    Returns the bytes of the tensors of one of them.
    """
    import diffusers
    import numpy as np
    import torch

    from deme_cli.artifacts import ArtifactWriter, BaseRecord, DenoiserRecord, ExpertRecord
    from deme_cli.files import layout_of
    from deme_cli.timesteps import split_uniform

    with torch.device("meta"):
        network = getattr(diffusers, config["_class_name"]).from_config(config)
    layout = layout_of(network.state_dict())
    shared: dict[str, Any] = {
        "source": "random", "model_config": config, "num_train_timesteps": 1000,
        "scheduler_config": SCHEDULER,
    }  # fmt: skip
    base = BaseRecord(**shared)
    for index in range(experts + 1):
        record: DenoiserRecord = base
        if index:
            span = split_uniform(experts, 1000)[index - 1]
            record = ExpertRecord(
                **shared, range=[span.start, span.stop], index=index, of=experts, p=0.3, steps=0,
                base=base.fingerprint, seed=0, projection="none", data={}, training={},
            )  # fmt: skip
        name = f"ft_{index}of{experts}" if index else "base"
        generator = np.random.default_rng(index)
        with ArtifactWriter(folder / f"{name}.safetensors", layout, record) as writer:
            for spec in layout:
                drawn = generator.standard_normal(spec.num_elements, np.float32)
                writer.write(np.float32(scale) * drawn)
        if isinstance(writer.record, BaseRecord):
            base = writer.record
    return sum(spec.num_bytes for spec in layout)


def write_images(folder: Path, num: int, size: int = 32) -> Path:
    """A folder of smooth random colour images as PNG files."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(num):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        image = coarse.resize((size, size), Image.Resampling.BICUBIC)
        image.save(folder / f"{index:06d}.png")
    return folder
