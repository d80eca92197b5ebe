"""The files that measuring needs: network weights and the statistics of known datasets.

Nothing here imports torch.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path

from deme_cli.fetch import Asset, user_cache

_CLEAN_FID_STATISTICS = "https://www.cs.cmu.edu/~clean-fid/stats/"

# Known datasets whose Inception statistics clean-fid publishes: its name, split, size, image count.
PUBLISHED_STATISTICS = {
    "cifar10": ("cifar10", "train", 32, 50_000),
    "lsun-church": ("lsun_church", "train", 256, 50_000),
}


def inception_asset(resize: str) -> Asset:
    """The Inception weights that clean-fid takes for a resize mode.

    The TorchScript of NVIDIA's StyleGAN2-ADA for `clean` and `legacy_tensorflow`, the state dict of
    pytorch-fid for `legacy_pytorch`.
    """
    if resize == "legacy_pytorch":
        name = "pt_inception-2015-12-05-6726825d.pth"
        torch_home = Path(os.environ.get("TORCH_HOME") or user_cache() / "torch").expanduser()
        return Asset(
            name,
            "Inception weights of pytorch-fid",
            f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{name}",
            "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            (torch_home / "hub" / "checkpoints" / name,),
        )
    name = "inception-2015-12-05.pt"
    own = Path("." if platform.system() == "Windows" else "/tmp")  # clean-fid's fixed place
    return Asset(
        name,
        "Inception weights",
        f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{name}",
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        (own / name,),
    )


def clip_asset() -> Asset:
    """The weights of OpenAI's CLIP ViT-B/32, as in clean-fid's `clip_vit_b_32`.

    OpenAI's file, or the copy that open_clip has fetched from the hub.
    """
    digest = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
    fetched = hub_cache().glob(
        "models--timm--vit_base_patch32_clip_224.openai/snapshots/*/open_clip_model.safetensors"
    )
    return Asset(
        "ViT-B-32.pt",
        "CLIP ViT-B/32 weights",
        f"https://openaipublic.azureedge.net/clip/models/{digest}/ViT-B-32.pt",
        digest,
        (user_cache() / "clip" / "ViT-B-32.pt", *sorted(fetched)),
    )


def hub_cache() -> Path:
    """Where the hub's library keeps what it fetches."""
    home = Path(os.environ.get("HF_HOME") or user_cache() / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()


def statistics_asset(dataset: str, resize: str) -> Asset:
    """clean-fid's Inception statistics of a dataset in PUBLISHED_STATISTICS."""
    name, split, size, num = PUBLISHED_STATISTICS[dataset]
    file_name = f"{name}_{resize}_{split}_{size}.npz"
    package = importlib.util.find_spec("cleanfid")
    folders = package.submodule_search_locations if package else None
    return Asset(
        file_name,
        f"statistics of {num} images of {dataset} ({split})",
        _CLEAN_FID_STATISTICS + file_name,
        places=tuple(Path(folder) / "stats" / file_name for folder in folders or ()),
    )
