"""Features: clean-fid and open_clip as oracles, and whatever else is a TorchScript."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import save_script
from torch import Tensor, nn

from deme_cli.artifacts import StatisticsRecord, write_artifact
from deme_cli.data.images import open_images
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.evaluation.features import (
    Resizer,
    full_float32,
    load_extractor,
    look_at,
    quiet_clean_fid,
    resize_bilinear,
    resize_clean,
)
from deme_cli.evaluation.references import (
    choose_features,
    find_weights,
    published_weights,
    require_same_extractor,
    statistics_asset,
)
from deme_cli.fetch import fetch


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


def seen(folder: Path, mode: str, weights: Path) -> np.ndarray:
    """Our features of a folder."""
    extractor = load_extractor("inception", resize=mode, weights=weights)
    data = open_images(str(folder), shape=None, split="all")
    return np.concatenate(look_at(data, extractor, "five", keep=True)[1])


@pytest.mark.parametrize("resize", [resize_clean, resize_bilinear])
def test_images_are_resized_as_clean_fid_resizes_them_to_the_last_bit(resize: Resizer) -> None:
    from cleanfid.resize import build_resizer

    mode = "clean" if resize is resize_clean else "legacy_pytorch"
    images = np.random.default_rng(0).integers(0, 256, (3, 17, 400, 3), dtype=np.uint8)
    with quiet_clean_fid():
        expected = np.stack([build_resizer(mode)(image) for image in images])
    assert (resize(images) == expected.transpose(0, 3, 1, 2)).all()
    np.testing.assert_allclose(resize(images[..., :1]), resize(images)[:, :1], atol=1e-3)


@pytest.mark.parametrize("mode", ["clean", "legacy_tensorflow"])
def test_inception_features_equal_those_of_clean_fid(
    mode: str, stand_in: Path, colour_folder: Path
) -> None:
    from cleanfid.inception_torchscript import InceptionV3W

    place = stand_in.rename(stand_in.with_name("inception-2015-12-05.pt"))
    inside = mode == "legacy_tensorflow"
    with quiet_clean_fid():
        oracle = InceptionV3W(str(place.parent), download=False, resize_inside=inside)
    expected = clean_fid_features(colour_folder, oracle, mode)
    np.testing.assert_allclose(seen(colour_folder, mode, place), expected, rtol=1e-4, atol=1e-5)


def test_legacy_pytorch_features_equal_those_of_clean_fid(
    tmp_path: Path, colour_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cleanfid import inception_pytorch

    torch.manual_seed(0)
    for name in ("trunc_normal_", "kaiming_uniform_"):  # which take seconds
        monkeypatch.setattr(nn.init, name, lambda tensor, *a, **k: tensor)
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
    np.testing.assert_allclose(seen(colour_folder, "legacy_pytorch", path), expected, rtol=1e-3)


@pytest.mark.slow
def test_clip_features_are_those_of_open_clip(tmp_path: Path) -> None:
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None).eval()
    path = tmp_path / "clip.safetensors"
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, path)
    extractor = load_extractor("clip", weights=path)
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    preprocess = open_clip.image_transform(
        224, is_train=False, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD
    )
    x = torch.stack([preprocess(Image.fromarray(image)) for image in images])
    with torch.inference_mode():
        expected = model.encode_image(x).double().numpy()
    assert extractor.weights.name_of("fid") == "frechet_clip"
    np.testing.assert_allclose(extractor.features(images), expected, rtol=1e-3, atol=1e-5)
    save_file({"visual.proj": state["visual.proj"]}, path)
    with pytest.raises(ArtifactError, match="not the weights of CLIP"):
        load_extractor("clip", weights=path)
    published = open_clip.get_pretrained_cfg("ViT-B-32", "openai")["url"]
    assert published_weights("clip", "clean").url == published


def test_dinov2_features_are_the_class_token_of_transformers(tmp_path: Path) -> None:
    from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14
    )
    network = Dinov2Model(config).eval()
    network.save_pretrained(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 40, 3), dtype=np.uint8)
    prepare = Compose([
        Resize((224, 224), InterpolationMode.BICUBIC, antialias=True),
        Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])  # fmt: skip
    with torch.inference_mode():
        x = prepare(torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255))
        expected = network(x).last_hidden_state[:, 0]
    extractor = load_extractor("dinov2", weights=tmp_path / "model.safetensors")
    np.testing.assert_allclose(extractor.features(images), expected, rtol=1e-4, atol=1e-5)
    (tmp_path / "config.json").unlink()  # then ViT-L/14's is expected
    with pytest.raises(ArtifactError, match="not the weights of DINOv2"):
        load_extractor("dinov2", weights=tmp_path / "model.safetensors")


def test_any_torchscript_of_images_to_features_will_do(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=[2, 3])

    extractor = load_extractor(str(save_script(Mean(), tmp_path / "my mean.pt")))
    images = np.full((2, 4, 6, 3), (10, 20, 250), np.uint8)
    np.testing.assert_allclose(extractor.features(images), [[10, 20, 250]] * 2, rtol=1e-6)
    assert extractor.weights.name_of("fid") == "frechet_my_mean"
    assert extractor.num_features((3, 4, 6)) == 3
    assert capfd.readouterr() == ("", "")


def test_features_depend_on_the_image_alone(stand_in: Path) -> None:
    images = np.random.default_rng(2).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    inception = load_extractor("inception", weights=stand_in)
    features = inception.features(images)
    one_by_one = replace(inception, batch_size=1).features(images)
    np.testing.assert_allclose(features, one_by_one, atol=1e-5)
    np.testing.assert_array_equal(features, inception.features(images.repeat(3, axis=3)))
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(features, inception.features(images))


@pytest.mark.gpu
def test_a_gpu_sees_as_the_cpu_does(stand_in: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    with full_float32(torch.device("cuda")):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    on_cpu, on_gpu = (
        load_extractor("inception", weights=stand_in, device=name).features(images)
        for name in ("cpu", "cuda")
    )
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=0, atol=1e-4)


def refuse(*args: object, **options: object) -> Tensor:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def test_a_lack_of_memory_is_no_fault_of_the_images_or_the_file(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        replace(load_extractor("digits"), network=refuse).num_features((1, 8, 8))
    monkeypatch.setattr(torch.jit, "load", refuse)
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        load_extractor("inception", weights=stand_in)


def test_wrong_files_of_weights_and_what_does_not_go_together_are_refused(
    tmp_path: Path, cache: Path
) -> None:
    path = tmp_path / "given.pt"
    for resize, write, words in (
        ("clean", lambda p: p.write_bytes(b"PK"), "not a readable TorchScript"),
        ("clean", lambda p: save_script(nn.Identity(), p), "interface"),
        ("legacy_pytorch", lambda p: torch.save({"weight": torch.zeros(2)}, p), "of pytorch-fid"),
        ("legacy_pytorch", lambda p: p.write_bytes(b"nothing"), "not a readable file of weights"),
    ):
        write(path)
        with pytest.raises(ArtifactError, match=words):
            load_extractor("inception", resize=resize, weights=path)
    with pytest.raises(ArtifactError, match="fails on 32x32 images"):
        load_extractor("digits").num_features((3, 32, 32))
    for given, kind, words in (
        (("inception", "clean", tmp_path / "no.pt"), MissingError, "no.pt: no such file"),
        (("digits", "clean", path), ConfigError, "--weights goes with"),
        (("digits", "legacy_pytorch"), ConfigError, "--resize legacy_pytorch goes with"),
        (("clip",), MissingError, r"ViT-B-32\.pt"),
        (("incepton",), MissingError, "expected inception, clip, dinov2"),
    ):
        with pytest.raises(kind, match=words):
            find_weights(*given)


def test_only_published_inception_weights_give_a_distance_called_fid(
    cache: Path, stand_in: Path
) -> None:
    given = find_weights("inception", weights=stand_in)
    assert (given.name_of("fid"), given.name_of("kid"), given.published) == ("fid", "kid", False)
    named = find_weights(str(stand_in.rename(stand_in.with_name("inception.pt"))))
    assert (named.name_of("fid"), named.name_of("kid")) == ("frechet_inception", "kernel_inception")
    named.path.rename(cache / "inception-2015-12-05.pt")
    found = find_weights("inception")
    assert (found.sha256, found.path.parent) == (given.sha256, cache)


def test_features_follow_the_reference_and_statistics_of_others_are_refused(
    tmp_path: Path,
) -> None:
    made, weights = tmp_path / "ref.safetensors", find_weights("digits")
    record = StatisticsRecord(n=2, extractor=weights.extractor, resize="none", source="x")
    write_artifact(made, {"mu": np.zeros(2)}, record)
    chosen = [choose_features(None, [ref]) for ref in ("digits", "cifar10", str(made))]
    assert chosen == ["digits", "inception", "digits"]
    assert choose_features("clip", ["digits"]) == "clip"
    require_same_extractor(record, weights, "ref")
    other = {"name": "digits", "sha256": "f" * 64}
    for changes, words in (({"resize": "clean"}, "resize clean"), ({"extractor": other}, "f" * 12)):
        with pytest.raises(ArtifactError, match=words):
            require_same_extractor(replace(record, **changes), weights, "ref")


def test_files_are_named_as_clean_fid_names_them_and_each_that_lacks_is_told(cache: Path) -> None:
    import cleanfid
    from cleanfid import downloads_helper, inception_pytorch

    assert published_weights("inception", "clean").url == downloads_helper.inception_url
    pytorch = published_weights("inception", "legacy_pytorch")
    assert pytorch.url == inception_pytorch.FID_WEIGHTS_URL
    church = statistics_asset("lsun-church", "legacy_pytorch")
    assert church.name == "lsun_church_legacy_pytorch_train_256.npz"
    assert church.copies == (Path(cleanfid.__path__[0]) / "stats" / church.name,)
    with pytest.raises(MissingError) as raised:
        fetch([pytorch, church])
    for words in (pytorch.name, pytorch.url, pytorch.sha256, church.name, church.url, str(cache)):
        assert words in str(raised.value)
