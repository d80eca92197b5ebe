"""Files from outside: what they are, where they are looked for, how they come.

Looked for in the folder of DEME_CACHE, then where the library that publishes or uses them keeps its
own copy. They are fetched only where their host answers at once, so that a machine without network
is told within seconds what to put where: the hub's own libraries retry for half a minute. Nothing
here imports torch.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import os
import re
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from deme_cli.console import Progress, Step, silent
from deme_cli.errors import ArtifactError, MissingError, reading
from deme_cli.files import write_whole

_ANSWER_SECONDS = 1.0
_READ_SECONDS = 30.0
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Asset:
    """A file by the name its publisher gave it. `copies`: full paths that others keep it at."""

    name: str
    what: str
    url: str
    sha256: str | None = None
    copies: tuple[Path, ...] = ()

    def find(self) -> Path | None:
        """The first copy, DEME_CACHE before the library's own."""
        places = (cache_folder() / self.name, *self.copies)
        return next((path for path in places if path.is_file()), None)


def cache_folder() -> Path:
    """DEME_CACHE, else `deme` in the user's cache folder."""
    if folder := os.environ.get("DEME_CACHE"):
        return Path(folder).expanduser()
    return user_cache() / "deme"


def user_cache() -> Path:
    """XDG_CACHE_HOME, else `~/.cache`: where other libraries keep what they fetch."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file. Raises MissingError if it cannot be read."""
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def missing(assets: Sequence[Asset], reason: str) -> MissingError:
    """The error that names files, their checksums, addresses and place, and why they are absent."""
    wanted = [
        f"{asset.name} ({asset.what}{f', sha256 {asset.sha256}' if asset.sha256 else ''}) from "
        f"{asset.url}"
        for asset in assets
    ]
    return MissingError(
        f"missing: {'; '.join(wanted)}; {reason}: fetch elsewhere and put into {cache_folder()} "
        f"(or the folder of DEME_CACHE; weights also by --weights FILE); `deme doctor` lists all "
        f"places"
    )


def _status(url: str, seconds: float) -> int:
    """What a host answers to a HEAD request, 0 where it does not in time."""
    told = [0]

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                told[0] = answer.status
        except urllib.error.HTTPError as error:
            told[0] = error.code
        except (OSError, http.client.HTTPException, ValueError):
            pass

    thread = threading.Thread(target=ask, daemon=True)  # resolving a name has no timeout
    thread.start()
    thread.join(seconds)
    return told[0]


def fetch(assets: Sequence[Asset], progress: Progress = silent) -> None:
    """See to it that every asset is on this machine.

    Raises MissingError that names every missing file, its checksum, its address and its place,
    within two seconds, before anything is fetched; and what `download` raises.
    """
    absent = [asset for asset in assets if asset.find() is None]
    if absent and _is_offline():
        raise missing(absent, f"{_OFFLINE} is set")
    for asset in absent:
        if not 200 <= _status(asset.url, _ANSWER_SECONDS) < 300:
            raise missing(absent, f"no answer from {asset.url.split('/')[2]}")
    for asset in absent:
        download(asset, progress)


def download(asset: Asset, progress: Progress) -> Path:
    """Fetch a file into the cache folder, whole or not at all.

    Raises MissingError if the connection fails, ArtifactError if the checksum is another.
    """

    def chunks() -> Iterator[bytes]:
        digest, done = hashlib.sha256(), 0
        try:
            with urllib.request.urlopen(asset.url, timeout=_READ_SECONDS) as response:
                total = int(response.headers.get("Content-Length") or 0)
                while chunk := response.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    done += len(chunk)
                    whole = -(-max(total, done) // 1_000_000)
                    progress(Step(done // 1_000_000, whole, f"fetching {asset.name}", "MB"))
                    yield chunk
                if done < total:
                    raise OSError("it broke off")
        except (OSError, http.client.HTTPException) as error:
            what = f"{asset.name}: the download from {asset.url} failed: {error}; run it again"
            raise MissingError(what) from error
        if asset.sha256 and digest.hexdigest() != asset.sha256:
            raise ArtifactError(
                f"{asset.name}: {asset.url} sent a file with sha256 {digest.hexdigest()}, "
                f"expected {asset.sha256}; nothing was kept"
            )

    path = cache_folder() / asset.name
    write_whole(path, chunks())
    return path


_HUB_SECONDS = 4.0
_OFFLINE = "HF_HUB_OFFLINE"  # the variable, and what the libraries made of it


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form owner/name."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text))


def offline_reason() -> str | None:
    """Why the hub cannot be asked, or None if it answers."""
    if _is_offline():
        return f"{_OFFLINE} is set"
    return None if _hub_answers() else f"the hub did not answer within {_HUB_SECONDS:.0f} s"


def _is_offline() -> bool:
    return os.environ.get(_OFFLINE, "").upper() in ("1", "ON", "YES", "TRUE")


@functools.cache
def _hub_answers() -> bool:
    from huggingface_hub import constants

    return _status(constants.ENDPOINT, _HUB_SECONDS) > 0


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
    name = hub_id.replace("/", "___")
    fetched = Path(constants.HF_HUB_CACHE, f"datasets--{hub_id.replace('/', '--')}")
    places = [Path(prepared, name.lower()), Path(prepared, name), fetched]
    return any(place.exists() for place in places)


def is_model_cached(hub_id: str) -> bool:
    """Whether the cache holds anything of a hub model."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"models--{hub_id.replace('/', '--')}").exists()


def require_peft() -> None:
    """Check that the library of adapters is installed; raises MissingError if not."""
    if find_spec("peft") is None:
        raise MissingError("adapters (LoRA) need peft: pip install 'deme[lora]'")
