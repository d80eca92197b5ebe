"""Packages that wait are those of the plain import once they are asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deme_cli.data.digits import BASE_PATH

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

ADAPTERS_WAIT = """
import sys
from deme_cli.deferred import _Waiting, defer_imports
defer_imports()
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.hooks import layerwise_casting
from diffusers.training_utils import EMAModel
from diffusers.utils import USE_PEFT_BACKEND
from transformers import CLIPTextModel

small = dict(block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1,
    cross_attention_dim=4, attention_head_dim=2,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
network = UNet2DConditionModel(8, 4, 4, **small)
Accelerator(cpu=True).prepare(network)
network(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 2, 4))
loaded = {name for name in sys.modules if name.split(".")[0] == "peft"}
assert USE_PEFT_BACKEND and loaded <= {
    "peft", "peft.helpers", "peft.tuners", "peft.tuners.tuners_utils"}, loaded
assert isinstance(sys.modules["peft"], _Waiting)

before = layerwise_casting.BaseTunerLayer, layerwise_casting.disable_input_dtype_casting
assert not isinstance(network, before[0])
import peft
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
assert peft.tuners.tuners_utils.BaseTunerLayer is BaseTunerLayer is not before[0]
assert issubclass(LoraLayer, BaseTunerLayer) and not isinstance(sys.modules["peft"], _Waiting)
assert peft.PeftModel.__module__ == "peft.peft_model" and "_answers" not in dir(peft)
network.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
assert layers and all(isinstance(layer, before[0]) for layer in layers)
with before[1](network):
    assert not layers[0].cast_input_dtype_enabled
assert layers[0].cast_input_dtype_enabled
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_peft_waits_until_a_network_has_an_adapter_and_is_then_itself() -> None:
    run(ADAPTERS_WAIT)


@pytest.mark.slow
def test_packages_wait_until_they_are_asked_and_are_then_themselves() -> None:
    run(WAITS)


HEAVY = {
    "cleanfid", "datasets", "diffusers.models.unets.unet_2d_condition", "matplotlib.pyplot",
    "open_clip", "optuna", "pandas", "peft.tuners.lora", "pyarrow", "scipy.integrate._quadrature",
    "scipy.optimize", "scipy.stats._stats_py", "sklearn", "sympy", "torch", "torch._inductor",
    "torch.distributed.tensor", "torch.utils.flop_counter", "torchvision",
    "transformers.modeling_utils", "triton",
}  # fmt: skip
COMMAND = f"""
import atexit, sys
from deme_cli.__main__ import run
atexit.register(lambda: print("loaded", *sorted(sys.modules.keys() & {HEAVY!r}), file=sys.stderr))
run()
"""


@pytest.mark.parametrize(
    "arguments",
    [
        "finetune --range 1/2 --steps 1 -b 2 --held-out 4",
        "eval base.safetensors --fid digits --steps 1 -n 40",
    ],
)
def test_of_what_is_heavy_a_command_on_pixels_loads_torch_alone(
    arguments: str, tmp_path: Path
) -> None:
    (tmp_path / "base.safetensors").symlink_to(BASE_PATH)
    (tmp_path / "deme.toml").write_text('[data]\nsource = "digits"\n[split]\nn = 2\n')
    command = [sys.executable, "-c", COMMAND, *arguments.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}  # as many as are tried, and counted
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "loaded torch")


def test_a_plain_merge_loads_nothing_that_its_sum_does_not_need(run_folder: Path) -> None:
    left_out = {"torch", "pydantic", "rich.console", "deme_cli.evaluation.references"}
    code = f"import sys; heavy = {left_out!r}\n{COMMAND.replace(repr(HEAVY), 'heavy')}"
    merge = ["merge", "ft_1of4.safetensors", "ft_3of4.safetensors", "-w", "0.25,0.5", "--quiet"]
    command = [sys.executable, "-c", code, *merge]
    done = subprocess.run(command, cwd=run_folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "merged.safetensors\n", "loaded\n")
