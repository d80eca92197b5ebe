"""The files that measuring needs are those that the libraries name, and each is named if absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from deme_cli.errors import MissingError
from deme_cli.evaluation.assets import clip_asset, inception_asset, statistics_asset
from deme_cli.fetch import require_assets


def test_assets_are_named_as_clean_fid_names_them(cache: Path) -> None:
    from cleanfid import downloads_helper, inception_pytorch

    assert inception_asset("clean").url == downloads_helper.inception_url
    assert inception_asset("legacy_pytorch").url == inception_pytorch.FID_WEIGHTS_URL
    assert statistics_asset("cifar10", "clean").name == "cifar10_clean_train_32.npz"
    church = statistics_asset("lsun-church", "legacy_pytorch")
    assert church.name == "lsun_church_legacy_pytorch_train_256.npz"
    import cleanfid

    own = Path(cleanfid.__path__[0]) / "stats" / church.name
    assert church.places == (own,)


@pytest.mark.slow
def test_clip_weights_are_those_of_open_clip(cache: Path) -> None:
    import open_clip

    config = open_clip.get_pretrained_cfg("ViT-B-32", "openai")
    assert clip_asset().url == config["url"]
    name = f"models--{config['hf_hub'].strip('/').replace('/', '--')}"
    copy = cache / "hub" / name / "snapshots" / "0" / "open_clip_model.safetensors"
    copy.parent.mkdir(parents=True)
    copy.touch()
    assert clip_asset().find() == copy


def test_without_network_one_message_names_every_missing_file(cache: Path) -> None:
    assets = [inception_asset("legacy_pytorch"), statistics_asset("cifar10", "clean")]
    with pytest.raises(MissingError) as raised:
        require_assets(assets)
    message = str(raised.value)
    for asset in assets:
        assert asset.name in message
        assert asset.url in message
    assert assets[0].sha256 in message
    assert str(cache) in message
