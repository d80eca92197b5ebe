"""A digest at the end of a JSON text, so that damage in the text is seen when it is read.

The last entry of a sealed text is `"digest"`: SHA-256 of the text without that entry. Any tool that
keeps a header's strings keeps the seal. Texts without one, from before there were seals, are taken
as they are; a seal that is itself damaged does not pass for none.
"""

from __future__ import annotations

import hashlib

from deme_cli.errors import ArtifactError

_BEFORE, _AFTER = ', "digest": "', '"}'
_LENGTH = len(_BEFORE) + 64 + len(_AFTER)


def sealed(text: str) -> str:
    """A JSON table with the digest as its last entry."""
    return text[:-1] + _seal_of(text)


def require_intact(text: str, where: str, *, is_sealed: bool = False) -> None:
    """Check the seal of `text`; raises ArtifactError if they disagree.

    is_sealed: known to have one; otherwise a text without anything like a seal is left alone.
    """
    body, seal = text[:-_LENGTH] + "}", text[-_LENGTH:]
    if (is_sealed or _resembles_a_seal(seal)) and seal != _seal_of(body):
        raise ArtifactError(
            f"{where}: the record in the header was altered or damaged (its digest is another); "
            f"copy or make the file again"
        )


def _seal_of(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{_BEFORE}{digest}{_AFTER}"


def _resembles_a_seal(seal: str) -> bool:
    """Whether most of what frames a digest is there: a flipped bit may have changed the rest."""
    frame = seal[: len(_BEFORE)] + seal[-len(_AFTER) :]
    expected = _BEFORE + _AFTER
    return len(seal) == _LENGTH and sum(map(str.__eq__, frame, expected)) > len(expected) // 2
