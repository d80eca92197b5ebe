"""Features: clean-fid as the oracle, and whatever else is a TorchScript."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import save_script
from torch import Tensor, nn

from deme_cli.data.images import open_images
from deme_cli.errors import ArtifactError
from deme_cli.evaluation.features import image_features, load_extractor
from deme_cli.evaluation.networks import quiet_clean_fid, run_network


@pytest.fixture
def colour_folder(tmp_path: Path) -> Path:
    """Five 20x16 colour images."""
    folder = tmp_path / "colour"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 20, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index}.png")
    return folder


def clean_fid_features(folder: Path, network: object, mode: str) -> np.ndarray:
    """The features that clean-fid itself takes of a folder."""
    from cleanfid import fid

    return fid.get_folder_features(
        str(folder), network, num_workers=0, batch_size=2, device="cpu", mode=mode, verbose=False
    )


@pytest.mark.parametrize("mode", ["clean", "legacy_tensorflow"])
def test_inception_features_equal_those_of_clean_fid(
    mode: str, stand_in: Path, colour_folder: Path
) -> None:
    from cleanfid.inception_torchscript import InceptionV3W

    place = stand_in.rename(stand_in.with_name("inception-2015-12-05.pt"))
    with quiet_clean_fid():
        oracle = InceptionV3W(
            str(place.parent), download=False, resize_inside=mode == "legacy_tensorflow"
        )
    expected = clean_fid_features(colour_folder, oracle, mode)
    extractor = load_extractor("inception", resize=mode, weights=place)
    data = open_images(str(colour_folder), shape=None, split="all")
    found = np.concatenate(list(image_features(data, extractor)))
    assert found.dtype == np.float64
    assert found.shape == (5, 2048)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_legacy_pytorch_features_equal_those_of_clean_fid(
    tmp_path: Path, colour_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cleanfid import inception_pytorch

    torch.manual_seed(0)
    with quiet_clean_fid(), monkeypatch.context() as patch:
        patch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *a, **k: None)
        network = inception_pytorch.fid_inception_v3()
    state = {name: torch.rand_like(t) * 0.05 if t.is_floating_point() else t
             for name, t in network.state_dict().items()}  # fmt: skip
    path = tmp_path / "pytorch.pth"
    torch.save(state, path)
    with quiet_clean_fid(), monkeypatch.context() as patch:
        patch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *a, **k: state)
        oracle = inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False).eval()
    expected = clean_fid_features(
        colour_folder, lambda x: oracle(x / 255)[0].flatten(1), "legacy_pytorch"
    )
    extractor = load_extractor("inception", resize="legacy_pytorch", weights=path)
    data = open_images(str(colour_folder), shape=None, split="all")
    found = np.concatenate(list(image_features(data, extractor)))
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_clean_fid_prints_nothing_and_does_not_touch_the_network(
    stand_in: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    extractor = load_extractor("inception", resize="legacy_tensorflow", weights=stand_in)
    extractor.features(np.zeros((1, 8, 8, 3), np.uint8))
    assert capfd.readouterr() == ("", "")


def test_grey_images_count_as_three_equal_channels(stand_in: Path) -> None:
    extractor = load_extractor("inception", weights=stand_in)
    grey = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    np.testing.assert_array_equal(
        extractor.features(grey), extractor.features(np.repeat(grey, 3, axis=3))
    )


def test_features_do_not_depend_on_the_batch_size() -> None:
    from dataclasses import replace

    extractor = load_extractor("digits")
    images = np.random.default_rng(2).integers(0, 256, (50, 8, 8, 1), dtype=np.uint8)
    one_by_one = replace(extractor, batch_size=1).features(images)
    np.testing.assert_allclose(extractor.features(images), one_by_one, atol=1e-5)


def test_any_torchscript_of_images_to_features_will_do(tmp_path: Path) -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=[2, 3])

    extractor = load_extractor(str(save_script(Mean(), tmp_path / "my mean.pt")))
    images = np.full((2, 4, 6, 3), (10, 20, 250), np.uint8)
    np.testing.assert_allclose(extractor.features(images), [[10, 20, 250]] * 2, rtol=1e-6)
    assert extractor.metric_name == "frechet_my_mean"
    assert extractor.num_features((3, 4, 6)) == 3


def test_images_of_a_size_the_network_cannot_take_are_refused() -> None:
    with pytest.raises(ArtifactError, match="fails on 32x32 images"):
        load_extractor("digits").num_features((3, 32, 32))


NO_MEMORY = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


def refuse(*args: object, **options: object) -> Tensor:
    raise RuntimeError(NO_MEMORY)


def test_a_lack_of_memory_is_no_fault_of_the_images_or_the_file(
    tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        run_network(refuse, torch.zeros(2, 3, 8, 8), where=tmp_path, option="--features")
    monkeypatch.setattr(torch.jit, "load", refuse)
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        load_extractor("inception", weights=stand_in)


def test_a_broken_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.pt"
    path.write_bytes(b"PK broken")
    with pytest.raises(ArtifactError, match="not a readable TorchScript"):
        load_extractor("inception", weights=path)


def test_a_torchscript_without_layers_is_no_inception(tmp_path: Path) -> None:
    path = save_script(nn.Identity(), tmp_path / "identity.pt")
    with pytest.raises(ArtifactError, match="not of Inception's interface"):
        load_extractor("inception", weights=path)


def test_wrong_files_for_the_pytorch_inception_are_refused(tmp_path: Path, stand_in: Path) -> None:
    with pytest.raises(ArtifactError, match="takes the state dict"):
        load_extractor("inception", resize="legacy_pytorch", weights=stand_in)
    strange = tmp_path / "strange.pth"
    torch.save({"weight": torch.zeros(2)}, strange)
    with pytest.raises(ArtifactError, match="not the weights of pytorch-fid"):
        load_extractor("inception", resize="legacy_pytorch", weights=strange)
    strange.write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="not a readable file of weights"):
        load_extractor("inception", resize="legacy_pytorch", weights=strange)


@pytest.mark.slow
def test_clip_features_are_those_of_open_clip(tmp_path: Path) -> None:
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None).eval()
    path = tmp_path / "clip.safetensors"
    state = {k: v.contiguous() for k, v in model.state_dict().items() if k.startswith("visual.")}
    save_file(state, path)
    extractor = load_extractor("clip", weights=path)
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    preprocess = open_clip.image_transform(
        224, is_train=False, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD
    )
    x = torch.stack([preprocess(Image.fromarray(image)) for image in images])
    with torch.inference_mode():
        expected = model.encode_image(x).double().numpy()
    assert extractor.metric_name == "frechet_clip"
    np.testing.assert_allclose(extractor.features(images), expected, rtol=1e-3, atol=1e-5)
    save_file({"visual.proj": state["visual.proj"]}, path)
    with pytest.raises(ArtifactError, match="not the weights of CLIP"):
        load_extractor("clip", weights=path)
