"""The CLIP score: open_clip itself as the oracle, and where its weights are looked for."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tiny_clip import CONFIG, write_clip

from deme_cli import fetch
from deme_cli.config import EvalConfig
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.evaluation.clip_score import (
    ClipScorer,
    find_clip,
    open_clip_scorer,
    quick_gelu_of,
)
from deme_cli.evaluation.references import CLIP_REPOSITORY, hub_cache

OPENAI = ("input_resolution", "context_length", "vocab_size")  # beside the weights in its files
PROMPTS = ["a seven", "a red bus in the rain", "a seven", "two dogs, one cat"]


def load_clip_scorer(model: str, weights: str) -> ClipScorer:
    return open_clip_scorer(find_clip(model, weights))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def scorer(clip_folder: Path) -> ClipScorer:
    return load_clip_scorer("", f"local-dir:{clip_folder}")


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 40, 48, 3), dtype=np.uint8)


def direct_cosines(name: str, images: np.ndarray, prompts: list[str], **options: str) -> list:
    """As BK-SDM computes them: pair by pair, with open_clip alone."""
    model, _, preprocess = open_clip.create_model_and_transforms(name, **options)
    model.eval()
    tokenizer = open_clip.get_tokenizer(name)
    cosines = []
    for pixels, prompt in zip(images, prompts, strict=True):
        with torch.no_grad():
            image = model.encode_image(preprocess(Image.fromarray(pixels)).unsqueeze(0))
            text = model.encode_text(tokenizer([prompt]))
        cosines.append(torch.nn.functional.cosine_similarity(image, text).item())
    return cosines


def test_cosines_equal_a_direct_computation_with_open_clip(
    clip_folder: Path, scorer: ClipScorer, images: np.ndarray, tmp_path: Path
) -> None:
    """Of a folder, and of an architecture with a file; grey images are three equal channels."""
    expected = direct_cosines(f"local-dir:{clip_folder}", images, PROMPTS)
    cosines, is_cut = scorer.compare(images, PROMPTS).T
    np.testing.assert_allclose(cosines, expected, atol=1e-7)
    assert len(np.unique(cosines)) == 4
    assert is_cut.tolist() == [0] * 4
    grey = images[..., :1]
    coloured = np.repeat(grey, 3, axis=3)
    np.testing.assert_array_equal(scorer.compare(grey, PROMPTS), scorer.compare(coloured, PROMPTS))
    (tmp_path / "tiny-b.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "tiny-b.json")
    named = load_clip_scorer("tiny-b", str(clip_folder / "open_clip_model.safetensors"))
    assert named.weights.card["model"] == "tiny-b"
    expected = direct_cosines("tiny-b", images, PROMPTS, pretrained=str(named.weights.path))
    np.testing.assert_allclose(named.compare(images, PROMPTS)[:, 0], expected, atol=1e-7)


@pytest.mark.gpu
def test_a_gpu_finds_the_cosines_of_the_cpu(scorer: ClipScorer, images: np.ndarray) -> None:
    on_gpu = open_clip_scorer(scorer.weights, device="cuda")
    np.testing.assert_allclose(
        on_gpu.compare(images, PROMPTS), scorer.compare(images, PROMPTS), rtol=0, atol=1e-5
    )


def test_prompts_of_more_tokens_than_the_context_are_counted(
    scorer: ClipScorer, images: np.ndarray
) -> None:
    prompts = ["cat " * 75, "cat " * 76, "!" * 400, "a cat"]  # with both marks 77, 78, ...
    tokens = [len(open_clip.SimpleTokenizer().encode(prompt)) + 2 for prompt in prompts]
    assert tokens[:2] == [77, 78]
    assert scorer.compare(images, prompts)[:, 1].tolist() == [n > 77 for n in tokens]


def test_a_tag_is_found_in_the_cache_folder_before_the_hubs(cache: Path) -> None:
    repository = "CLIP-ViT-B-32-laion2B-s34B-b79K"
    snapshot = hub_cache() / f"models--laion--{repository}" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "open_clip_model.safetensors").write_bytes(b"hub")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0")
    found = find_clip("ViT-B-32", "laion2b_s34b_b79k")
    assert found.path == snapshot / "open_clip_model.safetensors"
    assert found.preprocessing["image_interpolation"] == "bicubic"
    own = cache / repository / "open_clip_pytorch_model.bin"
    own.parent.mkdir()
    own.write_bytes(b"own")
    assert find_clip("ViT-B-32", "laion2b_s34b_b79k").path == own


class QuickGELU(torch.nn.Module):
    """A part of an archive as OpenAI's: its code tells the activation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


def script(path: Path, **state: torch.Tensor) -> None:
    """An archive with tensors of these names."""
    root = QuickGELU()
    for name, tensor in state.items():
        module, (*parents, last) = root, name.split(".")
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, QuickGELU())
            module = module.get_submodule(parent)
        module.register_buffer(last, tensor)
    torch.jit.script(root).save(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_an_archive_of_openai_is_read_for_its_tensors(
    scorer: ClipScorer, images: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "tiny-c.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "tiny-c.json")
    state = {**scorer.model.state_dict(), "vocab_size": torch.tensor(9)}
    script(tmp_path / "own.pt", **state)
    found, same = (
        load_clip_scorer("tiny-c", str(path)) for path in (tmp_path / "own.pt", scorer.weights.path)
    )
    np.testing.assert_array_equal(found.compare(images, PROMPTS), same.compare(images, PROMPTS))


def state(path: Path, **more: torch.Tensor) -> None:
    torch.save({"logit_scale": torch.zeros(()), **more}, path)


def beside(path: Path) -> None:
    """As in a folder of open_clip, whose config tells it."""
    state(path)
    (path.parent / "open_clip_config.json").write_text('{"model_cfg": {}}')


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("name", "write", "quick"),
    [
        ("any.pt", script, True),
        ("any.pt", lambda path: state(path, **dict.fromkeys(OPENAI, torch.zeros(()))), True),
        ("a/open_clip_pytorch_model.bin", beside, False),
        ("mine.pt", state, None),
    ],
)
def test_a_file_of_weights_goes_with_the_activation_it_was_trained_with(
    tmp_path: Path, name: str, write: Callable[[Path], None], quick: bool | None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    assert quick_gelu_of(path) is quick
    for model in ("ViT-B-32", "ViT-B-32-quickgelu"):
        if quick in (None, model.endswith("quickgelu")):
            find_clip(model, str(path))
            assert ("does not tell" in capsys.readouterr().err) == (quick is None)
        else:
            with pytest.raises(ConfigError, match=f"{path} were trained with another act"):
                find_clip(model, str(path))


def test_missing_weights_name_the_hub_repository_within_seconds(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(fetch, "_hub_answers", lambda: False)
    began = time.monotonic()
    with pytest.raises(MissingError) as raised:
        find_clip(EvalConfig().clip_model, EvalConfig().clip_weights)
    assert time.monotonic() - began < 3
    for words in (f"{CLIP_REPOSITORY} into", "did not answer", str(cache),
                  "DEME_CACHE", "--clip-weights FILE", "local-dir:"):  # fmt: skip
        assert words in str(raised.value)


def test_what_is_not_known_or_not_there_is_refused(
    cache: Path, tmp_path: Path, clip_folder: Path
) -> None:
    for name in ("bare", "broken", "lacking"):
        shutil.copytree(clip_folder, tmp_path / name)
    (tmp_path / "bare" / "open_clip_model.safetensors").unlink()
    (tmp_path / "broken" / "open_clip_model.safetensors").write_bytes(b"no weights")
    (tmp_path / "lacking" / "open_clip_config.json").write_text("{}")
    for model, weights, kind, words in (
        ("ViT-g-15", "openai", ConfigError, "no such open_clip architecture.*ViT-g-14"),
        ("ViT-g-14", "laion2b", ConfigError, "no such tag.*laion2b_s34b_b88k"),
        ("ViT-B-32", "openai", ConfigError, "give --clip-model ViT-B-32-quickgelu"),
        ("ViT-g-14", "nowhere.safetensors", MissingError, "no such file of CLIP weights"),
        ("ViT-g-14", "local-dir:nowhere", MissingError, "no such folder"),
        ("ViT-g-14", f"local-dir:{tmp_path}", ArtifactError, r"no open_clip_config\.json"),
        ("", f"local-dir:{tmp_path / 'bare'}", MissingError, "no weights of open_clip"),
        ("", f"local-dir:{tmp_path / 'broken'}", ArtifactError, "not the weights of CLIP"),
        ("", f"local-dir:{tmp_path / 'lacking'}", ArtifactError, "missing 'model_cfg'"),
    ):
        with pytest.raises(kind, match=words):
            load_clip_scorer(model, weights)
