"""Each test of data starts with an empty cache of tables, and hears what is said once."""

from __future__ import annotations

import pytest

from deme_cli import console


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` prepares out of the cache of whoever runs the tests."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setattr(console, "_said", {})
