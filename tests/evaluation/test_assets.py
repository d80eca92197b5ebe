"""Files from outside: where they are looked for, and how they are fetched."""

from __future__ import annotations

import hashlib
import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deme_cli.errors import ArtifactError, MissingError
from deme_cli.evaluation.assets import (
    Asset,
    cache_folder,
    clip_asset,
    download,
    inception_asset,
    require_assets,
    statistics_asset,
)

CONTENT = bytes(range(256)) * 20


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT at /whole, and less than it promises at /broken."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT if self.path == "/whole" else CONTENT[:1000])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_the_cache_folder_wins_over_the_librarys_own_place(cache: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.pt"
    asset = Asset("weights.pt", "weights", "http://nowhere", places=(own,))
    assert asset.find() is None
    own.touch()
    assert asset.find() == own
    (cache / "weights.pt").touch()
    assert asset.find() == cache / "weights.pt"


def test_the_cache_folder_has_a_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DEME_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "deme"


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


def test_an_unreachable_host_is_told_within_two_seconds(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    began = time.monotonic()
    with pytest.raises(MissingError, match=r"no answer from 192\.0\.2\.1"):
        require_assets([Asset("a.pt", "weights", "http://192.0.2.1/a.pt")])  # TEST-NET-1
    assert time.monotonic() - began < 6


def test_what_is_there_needs_no_network(cache: Path) -> None:
    (cache / "a.pt").touch()
    assert require_assets([Asset("a.pt", "weights", "http://nowhere")]) == []


def test_a_missing_file_is_fetched_where_its_host_answers(cache: Path, server: str) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    asset = Asset("a.pt", "weights", f"{server}/whole", digest)
    assert require_assets([asset]) == [asset]
    seen: list[tuple[int, int]] = []
    path = download(asset, lambda done, total: seen.append((done, total)))
    assert path == cache / "a.pt" == asset.find()
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_a_file_of_another_checksum_is_not_kept(cache: Path, server: str) -> None:
    asset = Asset("a.pt", "weights", f"{server}/whole", "0" * 64)
    with pytest.raises(ArtifactError, match="expected 0000"):
        download(asset, lambda done, total: None)
    assert list(cache.iterdir()) == []


def test_a_download_that_breaks_off_leaves_nothing(cache: Path, server: str) -> None:
    with pytest.raises(MissingError, match=r"a\.pt"):
        download(Asset("a.pt", "weights", f"{server}/broken"), lambda done, total: None)
    assert list(cache.iterdir()) == []
