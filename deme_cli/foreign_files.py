"""What a file of weights is that deme did not write, told from the names of its tensors alone.

Nothing is unpickled: of a pickle the words in it are listed. Needs no torch.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_PICKLED_BYTES = 1 << 24  # read of a pickle that is no zip: its names come before its numbers
_WHOLE = "convert it with diffusers ({}.from_single_file(FILE).save_pretrained(DIR)) and give DIR"
_NETWORK = (
    "convert it with diffusers ({}.from_single_file(FILE).save_pretrained(DIR/transformer), DIR "
    "the folder of its pipeline) and give DIR"
)
_FUSE = (
    "fuse it in diffusers (pipeline.load_lora_weights(FILE); pipeline.fuse_lora(); "
    "pipeline.unload_lora_weights(); pipeline.save_pretrained(DIR)) and give DIR"
)
_FOLDER = "give the folder that holds them beside config.json"
_ANOTHER = "deme takes the networks of diffusers pipelines alone"
# What is part of some tensor's name, what then the file is, what to do. The first that fits.
_KINDS = (
    (r"\blora_|_lora\b|\.lora\b|hada_w|lokr_w|oft_blocks", "a LoRA, not a whole model", _FUSE),
    (r"control_model\.|controlnet_", "a ControlNet", _ANOTHER),
    (r"ip_adapter\.|image_proj\.", "an IP-Adapter", _ANOTHER),
    (r"motion_modules\.", "motion modules of AnimateDiff", _ANOTHER),
    (r"emb_params|string_to_param", "a textual inversion", _ANOTHER),
    (r"joint_blocks\.", "a single-file checkpoint of Stable Diffusion 3",
     _NETWORK.format("SD3Transformer2DModel")),
    (r"double_blocks\.", "a single-file checkpoint of Flux",
     _NETWORK.format("FluxTransformer2DModel")),
    (r"blocks\.\d+\.self_attn\.norm_q\.", "a single-file checkpoint of Wan",
     _NETWORK.format("WanTransformer3DModel")),
    (r"conditioner\.embedders\.1\.", "a single-file checkpoint of SDXL",
     _WHOLE.format("StableDiffusionXLPipeline")),
    (r"conditioner\.embedders\.0\.model\.", "the SDXL refiner", "deme takes SDXL's base alone"),
    (r"diffusion_model\.(input|output)_blocks\.", "a single-file checkpoint of Stable Diffusion",
     _WHOLE.format("StableDiffusionPipeline")),
    (r"\bmodel\.diffusion_model\.", "a single-file checkpoint of another network", _ANOTHER),
    (r"\bfinal_layer\.adaLN|\by_embedder\.", "a DiT in its authors' format",
     "give its diffusers folder or hub id, as facebook/DiT-XL-2-256"),
    (r"\bencoder\.conv_in\.|\bquant_conv\.", "a VAE alone", _ANOTHER),
    (r"\btext_model\.|\bshared\.weight", "a text encoder alone", _ANOTHER),
    (r"\bdown_blocks\.|transformer_blocks\.|\bcondition_embedder\.",
     "the weights of a diffusers network alone", _FOLDER),
)  # fmt: skip


def told(path: Path, names: Iterable[str]) -> str:
    """The message that refuses a file with tensors of these names."""
    text = "\n".join(names)
    found = next(((what, todo) for part, what, todo in _KINDS if re.search(part, text)), None)
    if found is None:
        return (
            f"{path}: not written by deme, and no model that it knows; a model is an artifact, a "
            f"hub id, or a diffusers folder: weights alone do not tell their network, "
            f"{_FOLDER}"
        )
    return f"{path}: {found[0]}, not written by deme; {found[1]}"


def pickled_names(path: Path) -> list[str]:
    """The words in a pickle or in a zip of one, tensors' names among them; [] of another file."""
    with path.open("rb") as file:
        head = file.read(4)
        if head[:2] == b"\x80\x02":
            pickles = io.BytesIO(head + file.read(_PICKLED_BYTES))
        elif head == b"PK\x03\x04" and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                member = next((n for n in archive.namelist() if n.endswith("data.pkl")), None)
                pickles = io.BytesIO(archive.read(member) if member else b"")
        else:
            return []
    words = []
    with suppress(ValueError, IndexError):  # it ends, or what follows are numbers
        while True:  # torch's old files are several pickles, one behind the other
            for _, arg, _ in pickletools.genops(pickles):
                if isinstance(arg, str):
                    words.append(arg)
    return words
