"""The feature networks: Inception as clean-fid runs it, CLIP's visual tower, any TorchScript.

clean-fid prints, downloads and warns on its own: here it is kept from all three, and its networks
read the files that we chose. Nothing is unpickled but tensors.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from deme_cli.artifacts import load_tensors
from deme_cli.errors import ArtifactError, is_out_of_memory
from deme_cli.evaluation.clip_weights import quick_gelu_of
from deme_cli.evaluation.weights import FeatureWeights

CLIP_MODEL = "ViT-B-32-quickgelu"  # OpenAI trained with QuickGELU
Network = Callable[[Tensor], Tensor]  # float32 (B, 3, H, W) in [0, 255] -> (B, d)


def load_inception(weights: FeatureWeights, device: torch.device) -> Network:
    """Inception at its last pooling, with the normalisation of clean-fid's resize mode."""
    if weights.resize == "legacy_pytorch":
        network = load_pytorch_inception(weights.path).to(device)
        return lambda x: network(x / 255)[0]
    script = load_script(weights.path, device)
    if weights.resize == "legacy_tensorflow":  # resizes and normalises within
        return lambda x: script(x, return_features=True)
    if not hasattr(script, "layers"):
        raise ArtifactError(
            f"{weights.path}: not of Inception's interface (no submodule `layers`); a TorchScript "
            f"of images to features goes with --features FILE"
        )
    return lambda x: script.layers((x - 128) / 128)


def load_script(path: Path, device: torch.device) -> torch.jit.ScriptModule:
    """A TorchScript module in evaluation mode."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.jit is on its way out
            return torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise ArtifactError(
            f"{path}: not a readable TorchScript file ({last_line(error)}); fetch it again"
        ) from error


def load_pytorch_inception(path: Path) -> nn.Module:
    """clean-fid's port of pytorch-fid's Inception, with a state dict from a file we chose."""
    if is_torchscript(path):
        raise ArtifactError(
            f"{path}: a TorchScript; --resize legacy_pytorch takes the state dict of pytorch-fid"
        )
    state = read_state_dict(path)
    with quiet_clean_fid():
        from cleanfid import inception_pytorch

        fetch = inception_pytorch.load_state_dict_from_url
        inception_pytorch.load_state_dict_from_url = lambda *args, **options: state
        try:
            return inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False).eval()
        except (RuntimeError, AttributeError) as error:
            raise ArtifactError(
                f"{path}: not the weights of pytorch-fid's Inception ({last_line(error)})"
            ) from error
        finally:
            inception_pytorch.load_state_dict_from_url = fetch


def load_clip(path: Path, device: torch.device) -> Network:
    """The visual tower of CLIP ViT-B/32 from OpenAI's file or an open_clip state dict."""
    import open_clip

    if is_torchscript(path):
        state = load_script(path, torch.device("cpu")).state_dict()
    else:
        state = read_state_dict(path)
    if quick_gelu_of(path, CLIP_MODEL.removesuffix("-quickgelu")) is False:
        raise ArtifactError(
            f"{path}: trained with another activation than OpenAI's CLIP ViT-B/32, whose features "
            f"are asked for; give OpenAI's file"
        )
    tower = open_clip.create_model(CLIP_MODEL, pretrained=None).visual
    visual = {
        name.removeprefix("visual."): tensor.float()
        for name, tensor in state.items()
        if name.startswith("visual.")
    }
    try:
        tower.load_state_dict(visual)
    except RuntimeError as error:
        raise ArtifactError(f"{path}: not the weights of CLIP {CLIP_MODEL}") from error
    tower.to(device).eval().requires_grad_(False)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN, device=device).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD, device=device).view(3, 1, 1)
    return lambda x: tower((x / 255 - mean) / std)


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive (rather than a state dict)."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file or of a torch file, of which nothing else is unpickled."""
    if path.suffix == ".safetensors":
        return load_tensors(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ArtifactError(f"{path}: not a readable file of weights; fetch it again") from error
    if not isinstance(state, dict):
        raise ArtifactError(f"{path}: expected a table of weights, found {type(state).__name__}")
    return state


def to_input(images: np.ndarray, device: torch.device) -> Tensor:
    """Images (B, H, W, C), C of 1 or 3, as a network takes them: float32 (B, 3, H, W) on `device`.

    Of 8-bit levels, a quarter of the bytes travels.
    """
    x = torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2)
    return x.float().expand(-1, 3, -1, -1).contiguous()


@torch.inference_mode()
def run_network(network: Network, x: Tensor, *, where: Path, option: str) -> Tensor:
    """What a network says of images float32 (B, 3, H, W) in [0, 255]: a row per image.

    Raises ArtifactError, naming the network's file and the option that chose it, where it does not
    take images of this size.
    """
    try:
        with full_float32(x.device):
            output = network(x)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        height, width = x.shape[2:]
        raise ArtifactError(
            f"{where}: the network fails on {width}x{height} images ({last_line(error)}); "
            f"choose another {option}"
        ) from error
    if not isinstance(output, Tensor) or output.shape[0] != len(x):
        raise ArtifactError(f"{where}: expected one row per image")
    return output


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """While entered, float32 on `device` is float32: no autocast, and no TF32.

    Convolutions on GPUs take TF32 by default, which keeps 10 of 23 bits; a distance is a small
    difference of large sums.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        before = cudnn.allow_tf32, matmul.allow_tf32
        cudnn.allow_tf32 = matmul.allow_tf32 = False
        try:
            yield
        finally:
            cudnn.allow_tf32, matmul.allow_tf32 = before


@contextlib.contextmanager
def quiet_clean_fid() -> Iterator[None]:
    """Swallow what clean-fid prints, and undo what it does to the warning filters."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
