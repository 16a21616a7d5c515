"""UserSig, version 2: the signature that identifies the caller (Tencent Cloud Chat document 269/32688).

An HMAC-SHA256 over four lines, packed as JSON, deflated, and base64-encoded with three characters replaced so that it
fits into a URL. Needs only the standard library.
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

#: Seconds for which a signature is valid: the shortest time that the documents recommend, so that a leaked one soon expires.
VALIDITY = 86_400
#: The share of its validity after which a signature is replaced.
RENEW_AFTER = 0.8
#: Seconds by which a signing time shared by the fleet may be ahead of this machine's clock.
CLOCK_SKEW = 60

_TO_URL = str.maketrans("+/=", "*-_")
_FROM_URL = str.maketrans("*-_", "+/=")


def signature(key: str, identifier: str, sdkappid: int, issued: int, expire: int) -> str:
    """Return the `TLS.sig` field: base64 of the HMAC over the signed lines. `expire` is a duration in seconds."""
    content = (
        f"TLS.identifier:{identifier}\nTLS.sdkappid:{sdkappid}\nTLS.time:{issued}\nTLS.expire:{expire}\n"
    )
    return base64.b64encode(hmac.digest(key.encode(), content.encode(), hashlib.sha256)).decode()


def sign(key: str, identifier: str, sdkappid: int, issued: int, expire: int = VALIDITY) -> str:
    """Return a complete UserSig. All numbers must be integers: `1.0` would be signed as different text."""
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
    """Return the JSON document inside a UserSig; raises `ValueError` if there is none.

    Never compare encoded UserSigs: key order, spacing and compression differ between correct implementations.
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
    """A UserSig and when it was made, in seconds since 1970."""

    text: str
    issued: int


class Signer:
    """Keeps one valid UserSig and replaces it at 80 % of its validity. Thread-safe."""

    def __init__(
        self, key: Callable[[], str], identifier: str, sdkappid: int, *, now: Callable[[], float] = time.time
    ) -> None:
        """`key` returns the secret key. It is called for every signature, so a key can be rotated without a restart."""
        self._key, self._identifier, self._sdkappid, self._now = key, identifier, sdkappid, now
        self._lock = threading.Lock()
        self._current = UserSig("", 0)
        #: When it was made, on this machine's clock; `issued` may be the fleet's time, which is Redis'.
        self._made = 0

    def __repr__(self) -> str:
        return f"Signer({self._identifier!r}, {self._sdkappid})"

    def current(self) -> UserSig:
        """Return a UserSig that stays valid for at least a fifth of `VALIDITY`."""
        now = int(self._now())
        with self._lock:
            # After the clock was set back, the signature is from the future: replace it then, too.
            age = now - self._made
            if not self._current.text or not -CLOCK_SKEW <= age < VALIDITY * RENEW_AFTER:
                self._sign(now, now)
            return self._current

    def renew(self) -> None:
        """Make a new UserSig now."""
        with self._lock:
            now = int(self._now())
            self._sign(now, now)

    def adopt(self, issued: int) -> None:
        """Sign as of `issued` (seconds since 1970), unless the current UserSig is at least as new."""
        with self._lock:
            if self._current.issued < issued:
                self._sign(issued, int(self._now()))

    def _sign(self, issued: int, now: int) -> None:
        text = sign(self._key(), self._identifier, self._sdkappid, issued)
        self._current, self._made = UserSig(text, issued), now
