"""Packages that wait are those of the plain import once they are asked for."""

from __future__ import annotations

import subprocess
import sys

WAITS = """
import sys
from deme_cli.deferred import _Waiting, defer_imports
defer_imports()
import torch
from diffusers import DDIMScheduler, UNet2DModel

def waits(name):
    return isinstance(sys.modules[name], _Waiting)

network = UNet2DModel(8, 1, 1, block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1,
    down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
torch.optim.AdamW(network.parameters()).step()
assert waits("torch._dynamo") and waits("diffusers.models.transformers")
assert not {"sympy", "scipy.stats._qmc", "torch._inductor", "transformers.modeling_utils"} & {
    name for name in sys.modules}

from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel as by_file
assert by_file is FluxTransformer2DModel is sys.modules[
    "diffusers.models.transformers"].FluxTransformer2DModel
import scipy.stats
assert abs(scipy.stats.norm.ppf(0.975) - 1.96) < 1e-3
from torch._dynamo.exc import TorchDynamoException
assert torch._dynamo.exc.TorchDynamoException is TorchDynamoException
assert not waits("torch._dynamo") and not waits("diffusers.models.transformers")
assert "_answers" not in dir(torch._dynamo) and torch._dynamo.disable.__module__.startswith("torch")
assert torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2)).tolist() == [1, 1]
"""


def test_packages_wait_until_they_are_asked_and_are_then_themselves() -> None:
    done = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
