"""Files from outside: where they are looked for, how they are fetched, whether the hub answers."""

from __future__ import annotations

import hashlib
import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from deme_cli import fetch
from deme_cli.console import Step
from deme_cli.errors import ArtifactError, MissingError
from deme_cli.fetch import (
    Asset,
    cache_folder,
    is_dataset_cached,
    is_hub_id,
    is_model_cached,
    offline_reason,
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
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_the_cache_folder_wins_over_the_librarys_own_place(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.pt"
    asset = Asset("weights.pt", "weights", "http://nowhere", copies=(own,))
    assert asset.find() is None
    own.touch()
    assert asset.find() == own
    (cache / "weights.pt").touch()
    assert asset.find() == cache / "weights.pt"
    fetch.fetch([asset])  # what is there needs no network
    monkeypatch.delenv("DEME_CACHE")
    assert cache_folder() == cache / "deme"


def test_an_unreachable_host_is_told_within_two_seconds(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    began = time.monotonic()
    with pytest.raises(MissingError, match=r"no answer from 192\.0\.2\.1"):
        fetch.fetch([Asset("a.pt", "weights", "http://192.0.2.1/a.pt")])  # TEST-NET-1
    assert time.monotonic() - began < 6


def test_a_missing_file_is_fetched_where_its_host_answers(cache: Path, server: str) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    asset = Asset("a.pt", "weights", f"{server}/whole", digest)
    steps: list[Step] = []
    fetch.fetch([asset], steps.append)
    assert asset.find() == cache / "a.pt"
    assert (cache / "a.pt").read_bytes() == CONTENT
    assert (steps[-1].label, steps[-1].total) == ("fetching a.pt", 1)


def test_a_file_that_is_not_what_was_promised_is_not_kept(cache: Path, server: str) -> None:
    with pytest.raises(ArtifactError, match="expected 0000"):
        fetch.fetch([Asset("a.pt", "weights", f"{server}/whole", "0" * 64)])
    with pytest.raises(MissingError, match=r"a\.pt"):
        fetch.fetch([Asset("a.pt", "weights", f"{server}/broken")])
    assert list(cache.iterdir()) == []


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.HTTPServer]:
    """The hub's address, pointed at a server on this machine; asked anew."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    fetch._hub_answers.cache_clear()
    yield server
    server.server_close()
    fetch._hub_answers.cache_clear()


def test_a_hub_is_asked_whether_it_answers(
    endpoint: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    threading.Thread(target=endpoint.handle_request, daemon=True).start()
    assert offline_reason() is None
    fetch._hub_answers.cache_clear()
    monkeypatch.setattr(fetch, "_HUB_SECONDS", 0.3)
    began = time.monotonic()
    assert "did not answer" in offline_reason(), "one that says nothing"
    fetch._hub_answers.cache_clear()
    endpoint.server_close()
    assert "did not answer" in offline_reason(), "one that refuses"
    assert time.monotonic() - began < 7
    fetch._hub_answers.cache_clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert offline_reason() == "HF_HUB_OFFLINE is set", "it is not asked where nobody wants it"


def test_owner_and_name_make_a_hub_id() -> None:
    assert is_hub_id("google/ddpm-cifar10-32")
    for text in ("digits", "./folder/x", "a/b/c", "/a", "a/", "~/x", "a b/c"):
        assert not is_hub_id(text)


def test_the_caches_are_looked_into(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "prepared"))
    assert not is_model_cached("some/model")
    assert not is_dataset_cached("some/images")
    (tmp_path / "models--some--model").mkdir()
    (tmp_path / "prepared" / "some___images").mkdir(parents=True)
    assert is_model_cached("some/model")
    assert is_dataset_cached("some/images")
