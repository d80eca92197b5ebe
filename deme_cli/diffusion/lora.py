"""Low-rank adapters from elsewhere: W + (alpha / r) B A (Hu et al. 2022), by the layers of a base.

W: (out, in, *kernel)   A, down: (r, in, *kernel)   B, up: (out, r), 1 x 1 for a convolution

Names that spell a layer of the network as it is (PEFT, diffusers, kohya on diffusers' networks) are
taken at their word. Those of other networks go through diffusers' own converters, the ones behind
`load_lora_weights`, which split what is one layer there and several here; no table of names is
ours. alpha goes into the factors before, as some converters forget it. What is no pair of
factors (DoRA, LoHa, LoKr, biases, whole differences) is refused by name, never left out.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from deme_cli import console
from deme_cli.data.prompts import parse_json
from deme_cli.diffusion.backbones import backbone_of
from deme_cli.diffusion.backbones.backbone import Backbone, Config
from deme_cli.diffusion.denoiser import Weights, build_network
from deme_cli.diffusion.model_files import read_json, silence_libraries
from deme_cli.errors import ArtifactError, shown
from deme_cli.files import read_header

_FACTOR = re.compile(
    r"(?P<layer>.+?)[._]lora(?:_linear_layer)?[._](?P<side>A|B|down|up)(?:\.\w+)?\.weight"
)
_DOWN = ("A", "down")
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # that have factors
_TEXT = re.compile(r"lora_te\d?_|(base_model\.model\.)?text_(encoder|model)")
_OTHERS = {  # what else adapters hold, by a part of the names
    "dora_scale": "DoRA", "magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr",
    "oft_": "OFT", "ia3_": "IA3", ".on_input": "IA3", "lora_mid": "a core between its factors",
    "bias": "a bias", "diff_b": "a bias", ".diff": "a whole difference",
    "lora_embedding": "an embedding",
}  # fmt: skip
_VARIANTS = {  # of LoRA, whose factors alone say something else, by the setting of PEFT
    "use_dora": "DoRA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA", "arrow_config": "Arrow", "alora_invocation_tokens": "aLoRA",
    "layer_replication": "LoRA on layers that it doubles",
}  # fmt: skip
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # that change W before they train


@dataclass(frozen=True)
class LowRank:
    """The factors of one layer's change, alpha / r in them."""

    down: Tensor  # (r, in, *kernel)
    up: Tensor  # (out, r)

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up

    def change(self) -> Tensor:
        """B A, in the shape of the layer's weight."""
        return (self.up @ self.down.flatten(1)).unflatten(1, self.down.shape[1:])


def layers_of(model_config: Config) -> dict[str, tuple[int, ...]]:
    """The shape of the weight of each linear layer and convolution of a network, by its name."""
    with torch.device("meta"):
        network = build_network(model_config)
    modules = network.named_modules()
    return {name: tuple(one.weight.shape) for name, one in modules if isinstance(one, LAYERS)}


def is_lora(names: Iterable[str]) -> bool:
    """Whether some of a file's tensors are factors of a LoRA."""
    return any(map(_FACTOR.fullmatch, names))


def adapter_settings(path: Path, part: str) -> dict[str, Any]:
    """What PEFT's adapter_config.json beside a file, or diffusers in its header, says of alpha.

    part: unet or transformer, as pipelines of diffusers prefix it; its networks alone do not.
    """
    beside, found = path.parent / "adapter_config.json", {}
    if path.name.startswith("adapter_model.") and beside.exists():
        found = read_json(beside)
    elif path.suffix == ".safetensors":
        text = read_header(path).metadata.get("lora_adapter_metadata", "{}")
        told = parse_json(text, f"{path}: lora_adapter_metadata is")
        if not isinstance(told, dict):
            raise ArtifactError(f"{path}: lora_adapter_metadata is no table of settings")
        found = {
            name.removeprefix(f"{part}."): value
            for name, value in told.items() if name.rpartition(".")[0] in ("", part)
        }  # fmt: skip
    kind, start = found.get("peft_type") or "LORA", found.get("init_lora_weights")
    for is_other, what in (
        (kind != "LORA", f"an adapter of type {kind}"),
        *((found.get(name), variant) for name, variant in _VARIANTS.items()),
        (
            str(start).lower().startswith(_OTHER_BASE),
            f"made with {start}, which changes the base too",
        ),
    ):
        if is_other:
            raise ArtifactError(f"{path}: {what}; deme takes plain LoRA and rsLoRA")
    own = found.get("alpha_pattern") or {}
    try:
        [alpha + 0.0 for alpha in (found.get("lora_alpha", 1), *own.values())]
        list(map(re.compile, own))
    except (AttributeError, TypeError, re.error) as error:
        raise ArtifactError(
            f"{path}: lora_alpha and alpha_pattern beside it or in its header: expected a number, "
            f"and numbers by patterns of names ({error})"
        ) from error
    return found


def fuse(weights: Weights, factors: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """W + B A for the layers of `factors`, summed in float32, in the dtypes of `weights`."""
    fused = dict(weights)
    for layer, pair in factors.items():
        theta = weights[f"{layer}.weight"]
        fused[f"{layer}.weight"] = (theta.float() + pair.change().view_as(theta)).to(theta.dtype)
    return fused


def low_rank_factors(
    tensors: Weights, model_config: Config, where: str, settings: Config | None = None
) -> dict[str, LowRank]:
    """The factors in a LoRA file by the name of the layer they change, checked against its shape.

    settings: what `adapter_settings` found. Parts for text encoders are left out, which is told.
    Raises ArtifactError naming what is no pair of factors, or is not of this network.
    """
    backbone, layers = backbone_of(model_config, where), layers_of(model_config)
    own = {name: tensor for name, tensor in tensors.items() if not _TEXT.match(name)}
    if len(own) < len(tensors):
        console.note(
            f"{where}: {len(tensors) - len(own)} tensors are for text encoders and left out; an "
            f"expert is a denoiser alone"
        )
    starts = ("", "base_model.model.", "diffusion_model.", f"{backbone.part}.")
    names = {f"{start}{layer}": layer for layer in layers for start in starts}
    for layer in layers:
        for start in ("lora_unet_", "lora_transformer_"):
            names[start + layer.replace(".", "_")] = layer
    state = _with_alpha(own, names, where, settings)
    pairs = _pairs(state, where)
    if pairs and not pairs.keys() <= names.keys():
        converted = _pairs(_converted(state, backbone, model_config, where), where)
        if len(converted) < len(pairs):
            raise ArtifactError(
                f"{where}: diffusers reads {len(converted)} of the {len(pairs)} layers of this LoRA"
            )
        pairs = converted
    found: dict[str, LowRank] = {}
    for name, (down, up) in sorted(pairs.items()):
        if name not in names:
            near = difflib.get_close_matches(name, layers, n=1, cutoff=0.4)
            raise ArtifactError(
                f"{where}: {name!r} is no linear layer or convolution of this "
                f"{backbone.class_name}" + (f"; the nearest name: {near[0]!r}" if near else "")
            )
        if (layer := names[name]) in found:
            raise ArtifactError(f"{where}: {name!r} is the layer {layer!r} once more; keep one")
        found[layer] = _fitted(down, up, layers[layer], f"{where}: {name!r}")
    if not found:
        raise ArtifactError(f"{where}: holds no low-rank factors of a {backbone.class_name}")
    return found


def _with_alpha(
    tensors: Weights, names: Mapping[str, str], where: str, settings: Config | None
) -> dict[str, Tensor]:
    """The tensors in float32, A times alpha / r (or alpha / sqrt(r)), and alpha = r where told.

    Notes where `settings` were looked for and nothing says an alpha. Raises ArtifactError for a
    tensor that is neither a factor nor an alpha.
    """
    state, num_guessed = {}, 0
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None and not (name.endswith(".alpha") and tensor.numel() == 1):
            what = next((what for part, what in _OTHERS.items() if part in name), "no factor")
            raise ArtifactError(
                f"{where}: {name!r} is {what}; deme takes pairs of low-rank factors alone; fuse it "
                f"where it was trained, and import the whole network"
            )
        if match is None:
            continue
        if tensor.ndim < 2 or not tensor.numel() or not tensor.is_floating_point():
            kind = f"{tensor.dtype} {list(tensor.shape)}"
            raise ArtifactError(f"{where}: {name!r} is {kind}: no factor")
        state[name] = tensor.float()
        if match["side"] in _DOWN:
            layer, rank = match["layer"], tensor.shape[0]
            told = tensors.get(f"{layer}.alpha")
            if told is None:
                scale = _scale(names.get(layer, layer), rank, settings or {})
                num_guessed += "lora_alpha" not in (settings or {})
            else:
                scale = told.item() / rank
                state[f"{layer}.alpha"] = torch.tensor(float(rank))
            state[name] = tensor.float() * scale
    for layer in (name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")):
        if f"{layer}.alpha" not in state:
            raise ArtifactError(f"{where}: '{layer}.alpha' scales no factors that are there")
    if num_guessed and settings is not None:
        console.note(
            f"{where}: neither it nor PEFT's adapter_config.json beside it says alpha of "
            f"{num_guessed} layers: taken as plain LoRA with alpha = rank, as diffusers takes it"
        )
    return state


def _scale(layer: str, rank: int, settings: Config) -> float:
    """alpha / r of a layer as PEFT finds it: of the first pattern that fits its name, else of all.

    1 where nothing is told, as diffusers has it.
    """
    alpha = settings.get("lora_alpha", rank)
    for pattern, own in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):  # peft.utils.other.get_pattern_key
            alpha = own
            break
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _pairs(state: Weights, where: str) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by what stands before `lora` in their names; raises ArtifactError where one lacks."""
    sides: dict[str, dict[bool, Tensor]] = {}
    for name, tensor in state.items():
        if match := _FACTOR.fullmatch(name):
            one = sides.setdefault(match["layer"], {})
            if (match["side"] in _DOWN) in one:
                raise ArtifactError(f"{where}: {match['layer']!r} has two adapters; keep one")
            one[match["side"] in _DOWN] = tensor
    for layer, both in sides.items():
        if len(both) < 2:
            raise ArtifactError(f"{where}: {layer!r} has one of its two factors")
    return {layer: (both[True], both[False]) for layer, both in sides.items()}


def _converted(
    state: Weights, backbone: Backbone, model_config: Config, where: str
) -> dict[str, Tensor]:
    """The state dict under diffusers' names, by diffusers."""
    import diffusers
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.utils import convert_unet_state_dict_to_peft

    silence_libraries()
    kind = getattr(diffusers, backbone.pipeline)
    kind = kind if hasattr(kind, "lora_state_dict") else StableDiffusionLoraLoaderMixin
    told = {"unet_config": SimpleNamespace(**model_config)} if backbone.part == "unet" else {}
    try:
        found = kind.lora_state_dict(dict(state), **told)
        found = found[0] if isinstance(found, tuple) else found
        return convert_unet_state_dict_to_peft(found)
    except (ValueError, LookupError, AssertionError, RuntimeError, AttributeError, TypeError,
            NotImplementedError) as error:  # fmt: skip
        raise ArtifactError(
            f"{where}: neither names of this {backbone.class_name}'s layers nor names that "
            f"diffusers converts ({shown(str(error))})"
        ) from error


def _fitted(down: Tensor, up: Tensor, shape: tuple[int, ...], where: str) -> LowRank:
    """The factors in the shapes of a layer's weight; a 1 x 1 kernel may be left out, or be there.

    Raises ArtifactError where their product is of another shape.
    """
    out, *rest = shape
    if up.numel() != out * len(down) or up.shape[0] != out or down[0].numel() != math.prod(rest):
        raise ArtifactError(
            f"{where}: factors of shapes {list(down.shape)} and {list(up.shape)} for a weight of "
            f"shape {list(shape)}"
        )
    return LowRank(down.view(-1, *rest), up.view(out, -1))
