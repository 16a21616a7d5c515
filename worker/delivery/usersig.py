"""UserSig, version 2: the signature that proves who calls (Tencent Cloud Chat document 269/32688).

Only the standard library: HMAC-SHA256 over four lines, packed as JSON, deflated, base64 with three
characters exchanged so that it fits a URL.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

#: Seconds a signature is valid: the least the documents recommend, so a leaked one soon is worthless.
VALIDITY = 86_400
#: The part of its life after which a signature is made anew.
RENEW_AFTER = 0.8
#: Seconds by which a time of signing that the fleet shares may be ahead of this machine's clock.
CLOCK_SKEW = 60

_TO_URL = str.maketrans("+/=", "*-_")
_FROM_URL = str.maketrans("*-_", "+/=")


def signature(key: str, identifier: str, sdkappid: int, issued: int, expire: int) -> str:
    """The `TLS.sig` field: base64 of the HMAC over the signed lines. `expire` is a duration, seconds."""
    content = (
        f"TLS.identifier:{identifier}\nTLS.sdkappid:{sdkappid}\nTLS.time:{issued}\nTLS.expire:{expire}\n"
    )
    return base64.b64encode(hmac.digest(key.encode(), content.encode(), hashlib.sha256)).decode()


def sign(key: str, identifier: str, sdkappid: int, issued: int, expire: int = VALIDITY) -> str:
    """A complete UserSig. All numbers must be integers: `1.0` would be signed as another text."""
    document = {
        "TLS.ver": "2.0",
        "TLS.identifier": identifier,
        "TLS.sdkappid": sdkappid,
        "TLS.expire": expire,
        "TLS.time": issued,
        "TLS.sig": signature(key, identifier, sdkappid, issued, expire),
    }
    return base64.b64encode(zlib.compress(json.dumps(document).encode())).decode().translate(_TO_URL)


def decode(usersig: str) -> dict[str, Any]:
    """The document inside a UserSig; raises `ValueError` when it is none.

    Encoded UserSigs must never be compared: key order, spacing and compression differ between correct
    implementations.
    """
    try:
        inflater = zlib.decompressobj()
        packed = base64.b64decode(usersig.translate(_FROM_URL), validate=True)
        # Bounded: a few bytes may inflate to gigabytes.
        document = json.loads(inflater.decompress(packed, 10_000))
    except (binascii.Error, zlib.error, ValueError, RecursionError):
        raise ValueError("not a UserSig") from None
    if not isinstance(document, dict):
        raise ValueError("not a UserSig")
    return document


class UserSig(NamedTuple):
    """A UserSig and the time at which it was made, seconds since 1970."""

    text: str
    issued: int


class Signer:
    """Keeps one valid UserSig and makes a new one at 80 % of its life. Thread-safe."""

    def __init__(
        self, key: Callable[[], str], identifier: str, sdkappid: int, *, now: Callable[[], float] = time.time
    ) -> None:
        """`key` gives the secret key; it is asked anew for each signature, so that a key can be rotated."""
        self._key, self._identifier, self._sdkappid, self._now = key, identifier, sdkappid, now
        self._lock = threading.Lock()
        self._current = UserSig("", 0)

    def __repr__(self) -> str:
        return f"Signer({self._identifier!r}, {self._sdkappid})"

    def current(self) -> UserSig:
        """A UserSig that stays valid for at least a fifth of `VALIDITY`."""
        now = int(self._now())
        with self._lock:
            # A clock that was set back makes the signature one from the future: make it anew, too.
            age = now - self._current.issued
            if not self._current.text or not -CLOCK_SKEW <= age < VALIDITY * RENEW_AFTER:
                self._sign(now)
            return self._current

    def sign_again(self) -> None:
        """Make a new UserSig now."""
        with self._lock:
            self._sign(int(self._now()))

    def adopt(self, issued: int) -> None:
        """Make the UserSig of that time (seconds since 1970), unless the current one is as new."""
        with self._lock:
            if self._current.issued < issued:
                self._sign(issued)

    def _sign(self, issued: int) -> None:
        text = sign(self._key(), self._identifier, self._sdkappid, issued)
        self._current = UserSig(text, issued)
