"""The hub is asked once, in bounded time, and never where the user said not to."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from deme_cli import fetch
from deme_cli.fetch import is_dataset_cached, is_hub_id, is_model_cached, offline_reason


class Answering(BaseHTTPRequestHandler):
    """A server that answers everything, as the hub does where it can be reached."""

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def log_message(self, *parts: object) -> None:
        """Keep quiet."""


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    """The hub's address, pointed at a server on this machine; asked anew."""
    server = HTTPServer(("127.0.0.1", 0), Answering)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    fetch._hub_answers.cache_clear()
    yield server
    server.server_close()
    fetch._hub_answers.cache_clear()


def test_a_hub_that_answers_is_asked(endpoint: HTTPServer) -> None:
    threading.Thread(target=endpoint.handle_request, daemon=True).start()
    assert offline_reason() is None


def test_a_hub_that_refuses_is_told_at_once(endpoint: HTTPServer) -> None:
    endpoint.server_close()
    began = time.monotonic()
    assert "did not answer" in offline_reason()
    assert time.monotonic() - began < 7


def test_a_hub_that_says_nothing_is_given_up(
    endpoint: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_HUB_SECONDS", 0.3)
    began = time.monotonic()
    assert "did not answer" in offline_reason()
    assert time.monotonic() - began < 7


def test_no_question_is_asked_where_the_user_wants_none(
    endpoint: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert offline_reason() == "HF_HUB_OFFLINE is set"


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
