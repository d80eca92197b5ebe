"""Whether the Hugging Face hub answers, asked once and in bounded time, and what lies in its cache.

The libraries retry for half a minute where nothing answers; this asks first, so that a machine
without network gets its message within seconds. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import threading
from pathlib import Path

_SECONDS = 4.0
_OFFLINE = "HF_HUB_OFFLINE"  # the variable, and what the libraries made of it
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form owner/name."""
    return bool(_HUB_ID.fullmatch(text))


def offline_reason() -> str | None:
    """Why the hub cannot be asked, or None if it answers."""
    if os.environ.get(_OFFLINE, "").upper() in ("1", "ON", "YES", "TRUE"):
        return f"{_OFFLINE} is set"
    return None if _answers() else f"the hub did not answer within {_SECONDS:.0f} s"


def stay_offline() -> None:
    """Tell the hub's libraries, imported or not, to look in their caches only."""
    os.environ[_OFFLINE] = "1"
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            setattr(sys.modules[name], _OFFLINE, True)


def is_dataset_cached(hub_id: str) -> bool:
    """Whether the caches hold anything of a hub dataset."""
    from huggingface_hub import constants

    prepared = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets")
    return (
        Path(prepared, hub_id.replace("/", "___").lower()).exists()
        or Path(prepared, hub_id.replace("/", "___")).exists()
        or Path(constants.HF_HUB_CACHE, f"datasets--{hub_id.replace('/', '--')}").exists()
    )


def is_model_cached(hub_id: str) -> bool:
    """Whether the cache holds anything of a hub model."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"models--{hub_id.replace('/', '--')}").exists()


@functools.cache
def _answers() -> bool:
    """Whether the hub's endpoint answers; in a thread, since resolving a name knows no timeout."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    heard = threading.Event()

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=_SECONDS)
        except Exception:  # whatever the HTTP library of the day raises, it did not answer
            return
        heard.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    return heard.is_set()
