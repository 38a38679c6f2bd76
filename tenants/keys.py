"""API keys as text: `gr-<id>-<secret>` opens a workspace, `gra-<id>-<secret>` the operators' side.

The id (12 characters) is public: it names a key in lists, logs and the ledger. The secret (at least 32 characters) is
shown once, when the key is made; what is stored is HMAC-SHA-256 with the server's pepper over the whole text, so that
neither the kind nor the id can be swapped. Both parts are of `a-z2-7`, so a double click selects a whole key and no
two letters look alike. No error here repeats what was sent. Pure: random bytes are an argument.
"""

from __future__ import annotations

import base64
import hmac
import re
from enum import StrEnum
from typing import Final

from msgspec import Struct

from tenants.errors import KeyRefused
from tenants.model import KeyId

RANDOM_BYTES: Final = 40
"""What `generate` needs: 60 bits become the id, 256 the secret."""

_ID_LENGTH: Final = 12
_ID_BYTES: Final = 8
_SECRET_MIN: Final = 32
_SECRET_MAX: Final = 128
_TEXT_MAX: Final = 256
_ID: Final = re.compile(r"[a-z2-7]{12}", re.ASCII)
_SECRET: Final = re.compile(r"[a-z2-7]+", re.ASCII)
_BEARER: Final = re.compile(r"bearer +", re.ASCII | re.IGNORECASE)


class KeyKind(StrEnum):
    """What a key opens; the value is what its text begins with."""

    WORKSPACE = "gr"
    OPERATOR = "gra"


class KeyText(Struct, frozen=True):
    """A well-formed key. Its `repr` has no secret."""

    kind: KeyKind
    id: KeyId
    text: str
    """The whole key; secret."""

    def __repr__(self) -> str:
        return f"KeyText({self.kind}-{self.id}-…)"


def generate(kind: KeyKind, random: bytes) -> KeyText:
    """A new key from `RANDOM_BYTES` bytes of the system's randomness."""
    if len(random) != RANDOM_BYTES:
        raise ValueError(f"a key is made of {RANDOM_BYTES} random bytes, not {len(random)}")
    key_id = _base32(random[:_ID_BYTES])[:_ID_LENGTH]
    return KeyText(kind, KeyId(key_id), f"{kind}-{key_id}-{_base32(random[_ID_BYTES:])}")


def bearer(authorization: str | None) -> str:
    """The key's text out of an `Authorization` header. Raises `KeyRefused`."""
    if authorization is None or not authorization.strip():
        raise KeyRefused("no API key: send `Authorization: Bearer <key>`")
    scheme = _BEARER.match(authorization)
    if scheme is None:
        raise KeyRefused("the Authorization header must be `Bearer <key>`")
    text = authorization[scheme.end() :].strip(" ")
    if not text:
        raise KeyRefused("the Authorization header has no key after `Bearer`")
    return text


def parse(text: str) -> KeyText:
    """Check a key's form. Raises `KeyRefused` that says what is wrong and never what was sent."""
    if len(text) > _TEXT_MAX:
        raise KeyRefused(f"not an API key: longer than {_TEXT_MAX} characters")
    prefix, _, rest = text.partition("-")
    if prefix not in tuple(KeyKind) or not rest:
        raise KeyRefused("not an API key of this server: it must begin with `gr-` (or `gra-` for operators)")
    key_id, dash, secret = rest.partition("-")
    if not _ID.fullmatch(key_id):
        raise KeyRefused(f"not an API key: after `{prefix}-` come {_ID_LENGTH} characters of a-z and 2-7")
    if not dash:
        raise KeyRefused("not a whole API key: only the public part; the secret part is missing")
    if not _SECRET_MIN <= len(secret) <= _SECRET_MAX:
        raise KeyRefused(f"not a whole API key: the last part has {_SECRET_MIN} to {_SECRET_MAX} characters")
    if not _SECRET.fullmatch(secret):
        raise KeyRefused("not an API key: the last part is of a-z and 2-7 only")
    return KeyText(KeyKind(prefix), KeyId(key_id), text)


def digest(pepper: bytes, key: KeyText) -> bytes:
    """HMAC-SHA-256 over the whole key: 32 bytes, what is stored and what caches are keyed by."""
    return hmac.digest(pepper, key.text.encode("ascii"), "sha256")


def matches(stored: bytes, given: bytes) -> bool:
    """Compare two digests in constant time."""
    return hmac.compare_digest(stored, given)


def _base32(data: bytes) -> str:
    return base64.b32encode(data).decode("ascii").rstrip("=").lower()
