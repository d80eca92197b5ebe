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
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
        for path in (cache_folder() / self.name, *self.copies):
            if path.is_file():
                return path
        return None


def cache_folder() -> Path:
    """DEME_CACHE, else `deme` in the user's cache folder."""
    if folder := os.environ.get("DEME_CACHE"):
        return Path(folder).expanduser()
    return user_cache() / "deme"


def user_cache() -> Path:
    """XDG_CACHE_HOME, else `~/.cache`: where other libraries keep what they fetch."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, read in chunks. Raises MissingError if it cannot be read."""
    digest = hashlib.sha256()
    with reading(path), path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def require_assets(assets: Sequence[Asset]) -> list[Asset]:
    """Of `assets`, those that have to be fetched first, which their hosts offer now.

    Raises MissingError that names every missing file, its checksum, its address and its place.
    """
    absent = [asset for asset in assets if asset.find() is None]
    if absent and (reason := _unreachable([asset.url for asset in absent])):
        raise missing(absent, reason)
    return absent


def missing(assets: Sequence[Asset], reason: str) -> MissingError:
    """The error that names files, their checksums, addresses and place, and why they are absent."""
    wanted = "; ".join(_describe(asset) for asset in assets)
    return MissingError(
        f"missing: {wanted}; {reason}: fetch elsewhere and put into {cache_folder()} (or the "
        f"folder of DEME_CACHE; weights also by --weights FILE); `deme doctor` lists all places"
    )


def _describe(asset: Asset) -> str:
    checksum = f", sha256 {asset.sha256}" if asset.sha256 else ""
    return f"{asset.name} ({asset.what}{checksum}) from {asset.url}"


def _unreachable(urls: Sequence[str]) -> str | None:
    """Why files cannot be fetched, or None if every host answers; all are asked at once."""
    if _is_offline():
        return f"{_OFFLINE} is set"
    silent = _silent({url: functools.partial(_offers, url) for url in urls}, _ANSWER_SECONDS)
    return f"no answer from {silent[0].split('/')[2]}" if silent else None


def _silent(asks: Mapping[str, Callable[[], bool]], seconds: float) -> list[str]:
    """Which of these do not say yes in time; in threads, for resolving a name has no timeout."""
    answered: set[str] = set()

    def ask(name: str) -> None:
        if asks[name]():
            answered.add(name)

    threads = [threading.Thread(target=ask, args=(name,), daemon=True) for name in asks]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return [name for name in asks if name not in answered]


def _offers(url: str) -> bool:
    try:
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS):
            return True
    except (OSError, http.client.HTTPException, ValueError):
        return False


def fetch(assets: Sequence[Asset], progress: Progress = silent) -> None:
    """See to it that every asset is on this machine.

    Raises MissingError within two seconds where one is neither here nor within reach.
    """
    for asset in require_assets(assets):
        download(asset, progress)


def download(asset: Asset, progress: Progress = silent) -> Path:
    """Fetch a file into the cache folder, whole or not at all.

    Raises MissingError if the connection fails, ArtifactError if the checksum is another.
    """
    path = cache_folder() / asset.name
    write_whole(path, _checked(asset, progress))
    return path


def _checked(asset: Asset, progress: Progress) -> Iterator[bytes]:
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
    except (OSError, http.client.HTTPException) as error:
        raise MissingError(
            f"{asset.name}: the download from {asset.url} failed: {error}"
        ) from error
    if total and done != total:
        raise MissingError(f"{asset.name}: the download from {asset.url} broke off; run it again")
    if asset.sha256 and digest.hexdigest() != asset.sha256:
        raise ArtifactError(
            f"{asset.name}: {asset.url} sent a file with sha256 {digest.hexdigest()}, "
            f"expected {asset.sha256}; nothing was kept"
        )


_HUB_SECONDS = 4.0
_OFFLINE = "HF_HUB_OFFLINE"  # the variable, and what the libraries made of it
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form owner/name."""
    return bool(_HUB_ID.fullmatch(text))


def offline_reason() -> str | None:
    """Why the hub cannot be asked, or None if it answers."""
    if _is_offline():
        return f"{_OFFLINE} is set"
    return None if _hub_answers() else f"the hub did not answer within {_HUB_SECONDS:.0f} s"


def _is_offline() -> bool:
    return os.environ.get(_OFFLINE, "").upper() in ("1", "ON", "YES", "TRUE")


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
def _hub_answers() -> bool:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    def ask() -> bool:
        try:
            get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
        except Exception:  # whatever the HTTP library of the day raises, it did not answer
            return False
        return True

    return not _silent({"hub": ask}, _HUB_SECONDS)
