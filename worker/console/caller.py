"""Where a request comes from, as far as the network tells: only our own proxies are believed."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.requests import Request

from worker.config import Settings

#: Names for this machine that a browser on it may use.
_LOOPBACK = ("localhost", "ip6-localhost", "ip6-loopback")


@dataclass(frozen=True, slots=True)
class Caller:
    """Where a request comes from, and how it was sent."""

    #: The sender's address, behind our proxies.
    address: str
    scheme: str
    #: The host that was asked for, with its port.
    host: str
    #: Whether one of our proxies sent it.
    by_proxy: bool
    cookies: Mapping[str, str]

    @property
    def secure(self) -> bool:
        return self.scheme == "https"


def read_caller(request: Request, proxies: Sequence[str]) -> Caller:
    """Return where a request comes from."""
    headers = request.headers
    peer = request.client.host if request.client else ""
    networks = [ipaddress.ip_network(one) for one in proxies]
    by_proxy = _is_in(peer, networks)
    scheme, host, address = request.url.scheme, headers.get("host", ""), peer
    if by_proxy:
        said = _last(headers.getlist("x-forwarded-proto"))
        scheme = said if said in ("http", "https") else scheme
        host = _last(headers.getlist("x-forwarded-host")) or host
        address = _sender(headers.getlist("x-forwarded-for"), networks) or peer
    return Caller(address, scheme, host, by_proxy, request.cookies)


def _last(values: Sequence[str]) -> str:
    """The last item of a list, which the proxy next to us added."""
    return ",".join(values).rpartition(",")[2].strip().lower()


def _sender(values: Sequence[str], networks: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]) -> str:
    """The last address that is not one of our proxies': anybody could have written those before it."""
    for said in reversed(",".join(values).split(",")):
        if not _is_in(said.strip(), networks):
            return said.strip()
    return ""


def _is_in(address: str, networks: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return any((mapped or found) in network for network in networks)


def is_loopback(host: str) -> bool:
    """Whether a host, with or without a port, is this machine's name for itself. Other names may lead here, even an
    attacker's."""
    name = host_name(host)
    if name in _LOOPBACK or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def host_name(host: str) -> str:
    """A host without its port and brackets."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def cookie_name(what: str, sdkappid: int, caller: Caller) -> str:
    """The name of a cookie, different from those of other apps' consoles on this host, on any port.

    The prefix makes a browser refuse the cookie from any other host; it is allowed only over TLS.
    """
    name = f"imattr-{sdkappid}-{what}"
    return f"__Host-{name}" if caller.secure else name


def is_from_our_page(request: Request, caller: Caller) -> bool:
    """Whether a form was sent by a page of ours, as the browser says; a program says nothing."""
    fetched = request.headers.get("sec-fetch-site")
    if fetched is not None:
        # Only the browser itself can say that, and it does so behind any proxy.
        return fetched in ("same-origin", "none")
    origin = request.headers.get("origin")
    if origin is None:
        return True
    return origin == f"{caller.scheme}://{caller.host}" or (
        not caller.by_proxy and origin == f"https://{caller.host}"
    )


def needs_no_login(settings: Settings) -> bool:
    """Whether anyone may use it without logging in: only on this machine."""
    return not (settings.console_accounts_file or settings.console_proxy_header)
