"""The signature: vectors made by the official libraries, and the life of a cached one."""

from __future__ import annotations

import base64
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.delivery import usersig
from worker.delivery.usersig import VALIDITY, Signer

#: The public sample key of the vendor's own README files, and two made up.
K1 = "5bd2850fff3ecb11d7c805251c51ee463a25727bddc2385f3fa8bfee1bb93b5e"
K2 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
K3 = "k"

VECTORS = {
    "A": (K1, "administrator", 1400000000, 1700000000, 86400, "yLAe+w7WUeUuqbV9h/TX78u21oTGi+i9Zp1u3PpnY60="),
    "B": (
        K1,
        "administrator",
        1400000000,
        1700000000,
        15552000,
        "JCzxanF8NTTXau4m+2h9wv7gYJnyNksm0xm1NEXU274=",
    ),
    "C": (K2, "admin_im-01", 20000001, 1760000000, 5184000, "yuoxwXidxUjBDyKzIKCjVd2P7BDsgtngMgRQGMn0s0E="),
    "D": (K3, "xiaojun", 1600012345, 1577836800, 604800, "E/Ac15nrMA6+OdW8HPjpyZDfFE6lqAxU/bvtMq6P+k4="),
    "E": (K1, "管理员", 1400000000, 1700000000, 86400, "pbrM5gj3jEaLcveZ2CyjpTNJES7Up4k7XBCC+iPigpA="),
}

#: Made by the vendor's libraries for Python (A) and Node (C).
COMPLETE = {
    "A": (
        "eJyrVgrxCdYrSy1SslJQMtIzUNJRAItkpqTmlWSmZUIkElNyM-Myi0uKEkvyi2BKilOyEwsKMlOACgxNDKAAKpdaUZBZlAqUsTAzgQuWZOaC"
        "hAzN0RQXZ6aDLKn0cUzVLjcPD00NLS1MCrPM0A*JMLcoNTLMD3HP1M60jCowLDUOKMiLNDOwVaoFAD4PNPI_"
    ),
    "C": (
        "eJw9yV0LwiAYhuH-8h7XUKkWQidrEbEGfdPZGGjyLjSZVq7ovwczes7u63nDYb1PHrIFDiwhMOgbhTQeL9hzLTSaCvWQ0N-txLW2FgVwRvrR6B61"
        "BE7TSVQSVQaLrQQ*ptPRHx0q4NDdb*F5RhGOTZZ3xWtVzJuTYJs0y53yRpVqt12WhjiymMHnC*qAM0A_"
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_the_signature_of_a_known_document_is_as_published(name: str) -> None:
    key, identifier, sdkappid, issued, expire, expected = VECTORS[name]

    assert usersig.signature(key, identifier, sdkappid, issued, expire) == expected


@pytest.mark.parametrize("name", COMPLETE)
def test_a_usersig_made_by_another_library_is_read(name: str) -> None:
    key, identifier, sdkappid, issued, expire, signature = VECTORS[name]

    document = usersig.decode(COMPLETE[name])

    assert document["TLS.identifier"] == identifier
    assert (document["TLS.sdkappid"], document["TLS.time"], document["TLS.expire"]) == (
        sdkappid,
        issued,
        expire,
    )
    assert document["TLS.sig"] == signature == usersig.signature(key, identifier, sdkappid, issued, expire)


@given(key=st.text(min_size=1), identifier=st.text(max_size=32), issued=st.integers(0, 2**33))
def test_what_is_signed_can_be_read_and_fits_a_url(key: str, identifier: str, issued: int) -> None:
    packed = usersig.sign(key, identifier, 1400000000, issued)

    assert packed.isascii()
    assert not set(packed) & set("+/=")
    document = usersig.decode(packed)
    assert document["TLS.identifier"] == identifier
    assert document["TLS.sig"] == usersig.signature(key, identifier, 1400000000, issued, VALIDITY)


def packed(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "eJ",
        packed(b"no zlib"),
        packed(zlib.compress(b"no json")),
        packed(zlib.compress(b"[]")),
        packed(zlib.compress(b" " * 10**8)),
    ],
    ids=["empty", "no base64", "cut", "no zlib", "no json", "no object", "a bomb"],
)
def test_what_is_no_usersig_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a UserSig"):
        usersig.decode(text)


class Wall:
    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def wall() -> Wall:
    return Wall()


def test_a_signature_is_used_for_four_fifths_of_its_life(wall: Wall) -> None:
    signer = Signer(lambda: K1, "administrator", 1400000000, now=wall)
    first = signer.current().text

    wall.now += VALIDITY * 0.8 - 1
    assert signer.current().text == first
    wall.now += 1
    assert usersig.decode(signer.current().text)["TLS.time"] == int(wall.now)


def test_a_clock_that_was_set_back_makes_a_new_signature(wall: Wall) -> None:
    signer = Signer(lambda: K1, "administrator", 1400000000, now=wall)
    signer.current()

    wall.now -= 3600

    assert usersig.decode(signer.current().text)["TLS.time"] == int(wall.now)


def test_a_forgotten_signature_is_made_again(wall: Wall) -> None:
    signer = Signer(lambda: K1, "administrator", 1400000000, now=wall)
    first = signer.current().text
    wall.now += 1

    signer.renew()

    assert signer.current().text != first


def test_a_signer_does_not_show_its_key(wall: Wall) -> None:
    assert K1 not in repr(Signer(lambda: K1, "administrator", 1400000000, now=wall))


def test_nested_garbage_is_no_usersig() -> None:
    with pytest.raises(ValueError, match="not a UserSig"):
        usersig.decode(base64.b64encode(zlib.compress(b"[" * 9_999)).decode())


def test_a_time_that_the_fleet_shares_is_adopted_when_it_is_newer(wall: Wall) -> None:
    signer = Signer(lambda: K1, "administrator", 1400000000, now=wall)
    first = signer.current()

    signer.adopt(first.issued)
    assert signer.current() == first
    signer.adopt(first.issued + 5)
    assert signer.current().issued == first.issued + 5


def test_each_signature_is_made_with_the_key_as_it_is_then(wall: Wall) -> None:
    keys = iter([K1, K2])
    signer = Signer(lambda: next(keys), "administrator", 1400000000, now=wall)
    signer.current()

    signer.renew()

    document = usersig.decode(signer.current().text)
    expected = usersig.signature(K2, "administrator", 1400000000, document["TLS.time"], VALIDITY)
    assert document["TLS.sig"] == expected


def test_a_time_of_the_fleet_that_is_ahead_of_this_machine_is_kept(wall: Wall) -> None:
    """Otherwise a wrong key would be renewed again and again: what is refused would always be older than the fleet's."""
    signer = Signer(lambda: "key", "administrator", 1400000000, now=wall)
    ahead = signer.current().issued + 300

    signer.adopt(ahead)

    assert signer.current().issued == ahead
