"""Settings: environment variables that start with ``IMATTR_``, read once. All configuration errors are reported together.

Durations are in seconds. `Settings.from_env` reads them for a role: a producer needs only the app and Redis, never the
API's credentials.
"""

from __future__ import annotations

import codecs
import dataclasses
import difflib
import ipaddress
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from .errors import ConfigError
from .models import LONGEST_DELAY, MAX_AHEAD, MAX_USER_ID_BYTES
from .redis_url import SCHEMES, RedisUrl, read_redis_url

PREFIX = "IMATTR_"

Role = Literal["producer", "worker"]

#: Domains by region (API document 1047/34620 and newer pages). `API_URL` takes any other.
REGIONS = {
    "china": "https://console.tim.qq.com",
    "singapore": "https://adminapisgp.im.qcloud.com",
    "seoul": "https://adminapikr.im.qcloud.com",
    "tokyo": "https://adminapijpn.im.qcloud.com",
    "frankfurt": "https://adminapiger.im.qcloud.com",
    "silicon-valley": "https://adminapiusa.im.qcloud.com",
    "jakarta": "https://adminapiidn.im.qcloud.com",
    "mumbai": "https://adminapiind.im.qcloud.com",
    "saudi-arabia": "https://adminapiksa.im.qcloud.com",
}

#: The service's own timeout, seconds (1047/34620): ours must be longer, and so must every hold.
SERVICE_TIMEOUT = 3.0


class Secret:
    """Text that is shown only by `reveal`; any formatting of it reads ``***``."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __bool__(self) -> bool:
        return bool(self._text)

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__


NO_SECRET = Secret("")


def _text(value: str) -> str:
    return value


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    def parse(value: str) -> int:
        number = int(value) if value.removeprefix("-").isdecimal() and len(value) < 20 else None
        if number is None or number < least or (most is not None and number > most):
            raise ValueError(f"must be a whole number from {least} {f'to {most}' if most else 'up'}")
        return number

    return parse


def _seconds(most: float, least: float = 0.0, *, above: bool = False) -> Callable[[str], float]:
    def parse(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not least <= number <= most or (above and number == least):
            raise ValueError(
                f"must be a number of seconds, {'more than' if above else 'at least'} {least:g} and at most {most:g}"
            )
        return number

    return parse


def _share(value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise ValueError("must be a number from 0 to 1")
    return share


def _prefix(value: str) -> str:
    """Return a prefix of keys and channels. Celery subscribes to patterns that begin with it, and no ACL rule may contain a
    space."""
    if re.search(r"[\s*?\[\]\\]", value):
        raise ValueError("must not contain spaces, or any of * ? [ ] \\")
    return value


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value.lower() not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return value.lower()

    return parse


def _with_password(value: str) -> str:
    """Return a URL; raises `ValueError` if its password ends it early."""
    rest = value.partition("://")[2]
    place = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in rest and "@" not in place:
        raise ValueError("has a password with /, ? or # in it: write them as %2F, %3F and %23")
    return value


def _url(*schemes: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        try:
            parts = urlsplit(value)
            labels = (parts.hostname or "").rstrip(".").split(".")
            good = parts.scheme in schemes and (parts.scheme == "unix" or all(labels))
            parts.port  # noqa: B018  # raises for an invalid port
        except ValueError:
            # Python's own message quotes the URL, password and all.
            good = False
        _with_password(value)
        if not good:
            raise ValueError(f"must be a URL that starts with {' or '.join(f'{s}://' for s in schemes)}")
        return value

    return parse


def _redis(value: str) -> Secret:
    read_redis_url(value)
    return Secret(value)


def _broker(value: str) -> Secret:
    if value.partition("://")[0].lower() in SCHEMES:
        return _redis(value)
    return Secret(_with_password(value))


def _flag(value: str) -> bool:
    if value.lower() not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise ValueError("must be 1 or 0")
    return value.lower() in ("1", "true", "yes", "on")


def _readable_file(value: str) -> str:
    try:
        if not Path(value).read_text(encoding="utf-8").strip():
            raise ValueError("is empty")
    except UnicodeDecodeError:
        raise ValueError("is not text") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({type(error).__name__})") from None
    return value


def _listed(value: str) -> tuple[str, ...]:
    """The parts of a comma-separated list."""
    return tuple(part for part in (part.strip() for part in value.split(",")) if part)


def _networks(value: str) -> tuple[str, ...]:
    """Addresses and networks, each as a network."""
    try:
        return tuple(str(ipaddress.ip_network(part)) for part in _listed(value))
    except ValueError:
        raise ValueError("must be addresses or networks, such as 10.0.0.7, 10.1.0.0/16") from None


def _path_prefix(value: str) -> str:
    if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", value) or re.search(r"/\.\.?(/|$)", value):
        raise ValueError("must be a path such as /imattr, without a slash at its end")
    return value


def _header(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", value):
        raise ValueError("must be the name of an HTTP header, such as X-Forwarded-User")
    return value


def _account(value: str) -> str:
    if not (value.isascii() and value.isprintable() and len(value) <= MAX_USER_ID_BYTES):
        raise ValueError(f"must be 1 to {MAX_USER_ID_BYTES} bytes of printable ASCII")
    return value


#: Kubernetes and Docker set variables in every container for every Service; those for a Service named imattr, or
#: imattr-something, begin like ours.
_LINK_NAME = re.compile(
    r"IMATTR_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?|NAME|ENV_\w+)"
)
_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://", re.IGNORECASE)
_COLLIDES = (
    "holds the address of a Service, which the platform sets for a Service of that name: "
    "rename the Service, or set enableServiceLinks: false"
)


def _is_service_link(variable: str, value: str) -> bool:
    return bool(_LINK_NAME.fullmatch(variable) or (variable.endswith("_PORT") and _LINK_VALUE.match(value)))


def _bare(value: str) -> str:
    """Return a value without the spaces, byte order mark and quotes that files and shells leave around it."""
    bare = value.strip().removeprefix("\ufeff").strip()
    if len(bare) >= 2 and bare[0] == bare[-1] and bare[0] in "\"'":
        bare = bare[1:-1].strip()
    return bare


def _key(value: str) -> Secret:
    """A secret key. Raises `ValueError` if it cannot be one, without showing any of it."""
    if not (value.isascii() and value.isprintable()) or re.match(r"[A-Za-z_]+ ?=.", value):
        raise ValueError(
            f"must be the key alone, on one line, without a name before it; this is {len(value)} characters"
        )
    return Secret(value)


def _setting(parse: Callable[[str], Any], default: Any, doc: str) -> Any:
    return dataclasses.field(default=default, metadata={"parse": parse, "doc": doc})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings; `metadata["doc"]` of each field says what it means."""

    sdkappid: int = _setting(_whole(1), 0, "the app's SDKAppID")
    admin: str = _setting(_account, "administrator", "the app's administrator account")
    secret_key: Secret = _setting(_key, NO_SECRET, "the app's secret key")
    secret_key_file: str = _setting(_text, "", "file that holds the secret key, instead of SECRET_KEY")
    region: str = _setting(_choice(*REGIONS), "", "named region of the API")
    api_url: str = _setting(_url("https", "http"), "", "base URL of the API, instead of a region")
    api: str = _setting(_choice("chat", "push"), "chat", "chat = im_set_attr, push = timpush/set_attr")
    redis_url: Secret = _setting(
        _redis, NO_SECRET, "where the state is kept: one server, Sentinel or a cluster"
    )
    redis_password_file: str = _setting(
        _readable_file, "", "file that holds the password of REDIS_URL; read again for each connection"
    )
    replicas: int = _setting(
        _whole(0, 9), 0, "how many replicas must confirm an update before it counts as accepted; 0 = none"
    )
    replicas_fsync: bool = _setting(
        _flag, False, "1 = those replicas must have it on disk (Redis 7.2 and newer)"
    )
    allow_eviction: bool = _setting(_flag, False, "1 = start although maxmemory-policy is not noeviction")
    broker_prefix: str = _setting(
        _prefix, "", "prefix of Celery's keys in Redis; your Celery clients must use the same"
    )
    broker_url: Secret = _setting(_broker, NO_SECRET, "Celery's broker, Redis or RabbitMQ; default REDIS_URL")
    broker_password_file: str = _setting(
        _readable_file, "", "file that holds the password of BROKER_URL, if that is Redis"
    )
    quota: int = _setting(_whole(1, 1000), 100, "calls a second that the API allows the app")
    read_quota: int = _setting(
        _whole(0, 1000),
        0,
        "calls a second for reading attributes back; 0 = reads share QUOTA with deliveries",
    )
    read_share: float = _setting(
        _share, 0.05, "share of QUOTA that reads may take while deliveries could use all of it"
    )
    batch_size: int = _setting(_whole(1, 100), 100, "maximum users a call")
    linger: float = _setting(_seconds(60), 0.25, "how long the oldest user waits for company")
    max_attempts: int = _setting(_whole(1, 1000), 8, "attempts before a failing user becomes a dead letter")
    backoff_base: float = _setting(_seconds(3600, above=True), 1.0, "back-off after the first failure")
    backoff_max: float = _setting(_seconds(86_400, above=True), 300.0, "longest back-off")
    connect_timeout: float = _setting(_seconds(60, above=True), 3.05, "connecting to the API")
    read_timeout: float = _setting(_seconds(300, SERVICE_TIMEOUT, above=True), 10.0, "waiting for its answer")
    hold: float = _setting(
        _seconds(3600, SERVICE_TIMEOUT, above=True), 5.0, "how long users wait after an unknown outcome"
    )
    lease: float = _setting(_seconds(3600, above=True), 60.0, "how long a worker may keep a batch")
    patience: float = _setting(_seconds(60, above=True), 2.0, "how long a task waits for a permit")
    max_ahead: float = _setting(
        _seconds(86_400), MAX_AHEAD, "how far ahead of Redis' clock an event time may be"
    )
    max_pending: int = _setting(_whole(0), 0, "refuse new users beyond this many pending; 0 = no limit")
    shadow_ttl: float = _setting(
        _seconds(31_536_000), 900.0, "how long delivered values are remembered; 0 = not at all"
    )
    shadow_max_users: int = _setting(_whole(1), 1_000_000, "how many users are remembered")
    audit: int = _setting(
        _whole(0, 6000),
        0,
        "calls a minute that read random users back, to check what was delivered; 0 = none",
    )
    log_level: str = _setting(_choice("debug", "info", "warning", "error"), "info", "lowest level logged")
    log_format: str = _setting(_choice("json", "text"), "", "json or text; default text on a terminal")

    health_port: int = _setting(_whole(1, 65_535), 0, "port of the worker's health page; default off")
    console_host: str = _setting(_text, "127.0.0.1", "address on which the console listens")
    console_port: int = _setting(_whole(1, 65_535), 8300, "its port")
    console_prefix: str = _setting(
        _path_prefix, "", "path under which a proxy serves the console, such as /imattr"
    )
    console_accounts_file: str = _setting(_text, "", "file with the accounts that may use the console")
    console_proxy_header: str = _setting(
        _header, "", "header in which an authenticating proxy names the user; default off"
    )
    console_proxy_operators: tuple[str, ...] = _setting(
        _listed, (), "comma-separated names in that header that are operators; all others are viewers"
    )
    console_proxies: tuple[str, ...] = _setting(
        _networks,
        (),
        "comma-separated addresses or networks from which that header and X-Forwarded-* are trusted",
    )

    @property
    def base_url(self) -> str:
        return self.api_url or REGIONS.get(self.region, "")

    @property
    def redis(self) -> RedisUrl:
        """Where the state is."""
        url = read_redis_url(self.redis_url.reveal())
        return dataclasses.replace(url, password_file=self.redis_password_file)

    @property
    def broker(self) -> RedisUrl | None:
        """Where Celery's broker is, if it is a Redis."""
        if not self.broker_url:
            return self.redis
        if self.broker_url.reveal().partition("://")[0].lower() not in SCHEMES:
            return None
        url = read_redis_url(self.broker_url.reveal())
        return dataclasses.replace(url, password_file=self.broker_password_file)

    @property
    def needs_replica(self) -> bool:
        """Whether to send only while the primary has a replica in step. In a cluster, a primary that is cut off stops by
        itself."""
        return self.replicas > 0 and self.redis.kind != "cluster"

    @property
    def celery_prefix(self) -> str:
        """The prefix of Celery's keys in Redis. On a cluster, it puts all of them into the app's slot."""
        if self.broker is None or self.broker.kind != "cluster" or "{" in self.broker_prefix:
            return self.broker_prefix
        return f"{{imattr:{self.sdkappid}}}.{self.broker_prefix}"

    def current_key(self) -> Secret:
        """The secret key, read again if it is in a file; the last known one if that file cannot be read now."""
        try:
            return (self.secret_key_file and _key_in(self.secret_key_file)) or self.secret_key
        except (OSError, ValueError):
            return self.secret_key

    @property
    def longest_delay(self) -> float:
        """The longest that a user waits from one attempt to the next, in seconds."""
        return max(LONGEST_DELAY, self.backoff_max + self.hold + 1)

    @property
    def longest_task(self) -> float:
        """Seconds that one deliver task may take: waiting, then sending until its lease ends."""
        return 2 * self.patience + self.lease + self.connect_timeout + self.read_timeout

    @classmethod
    def from_env(cls, environ: Mapping[str, str], role: Role = "worker") -> Settings:
        """Read the environment; raises `ConfigError` with a sentence for each error."""
        mistakes: list[str] = []
        found: dict[str, Any] = {}
        fields = {PREFIX + field.name.upper(): field for field in dataclasses.fields(cls)}
        for variable, given in environ.items():
            value = _bare(given)
            if not variable.startswith(PREFIX) or not value:
                continue
            if variable not in fields:
                if _is_service_link(variable, value):
                    continue
                near = difflib.get_close_matches(variable, fields, 1)
                mistakes.append(
                    f"unknown setting {variable}" + (f"; did you mean {near[0]}?" if near else "")
                )
                continue
            field = fields[variable]
            try:
                if _LINK_VALUE.match(value):
                    raise ValueError(_COLLIDES)
                found[field.name] = field.metadata["parse"](value)
            except ValueError as mistake:
                mistakes.append(f"{variable} {mistake}")
        if role == "worker":
            mistakes += _read_key_file(found)
        settings = cls(**found)
        mistakes += settings._contradictions(role, environ)
        if mistakes:
            raise ConfigError(mistakes)
        return settings

    def _contradictions(self, role: Role, environ: Mapping[str, str]) -> list[str]:
        """Settings that are missing for the role, or that contradict each other."""
        missing = {"SDKAPPID": self.sdkappid, "REDIS_URL": self.redis_url}
        if role == "worker":
            missing["SECRET_KEY"] = self.secret_key or environ.get(f"{PREFIX}SECRET_KEY_FILE")
            given = environ.get(f"{PREFIX}REGION") or environ.get(f"{PREFIX}API_URL")
            missing["REGION or IMATTR_API_URL"] = self.base_url or given
        found = [
            f"{PREFIX}{name} is not set"
            for name, value in missing.items()
            if not value and not environ.get(PREFIX + name, "").strip()
        ]
        if self.region and self.api_url:
            found.append("IMATTR_REGION and IMATTR_API_URL are both set, choose one")
        if self.lease <= 2 * (self.connect_timeout + self.read_timeout):
            found.append("IMATTR_LEASE must be more than twice CONNECT_TIMEOUT + READ_TIMEOUT")
        if self.hold >= self.lease:
            found.append(
                "IMATTR_HOLD must be less than IMATTR_LEASE: "
                "a batch that is held must still be this worker's when it is sent again"
            )
        if self.redis_url and self.redis_password_file and self.redis.password:
            found.append("IMATTR_REDIS_URL has a password and IMATTR_REDIS_PASSWORD_FILE is set, choose one")
        if self.broker_password_file and self.broker and self.broker.password:
            found.append(
                "IMATTR_BROKER_URL has a password and IMATTR_BROKER_PASSWORD_FILE is set, choose one"
            )
        if self.broker_password_file and (not self.broker_url or self.broker is None):
            found.append("IMATTR_BROKER_PASSWORD_FILE needs an IMATTR_BROKER_URL that is Redis")
        if self.replicas_fsync and not self.replicas:
            found.append("IMATTR_REPLICAS_FSYNC needs IMATTR_REPLICAS")
        if self.audit and not self.shadow_ttl:
            found.append(
                "IMATTR_AUDIT needs an IMATTR_SHADOW_TTL: without it, nothing is remembered to compare with"
            )
        if self.backoff_max < self.backoff_base:
            found.append("IMATTR_BACKOFF_MAX must not be less than IMATTR_BACKOFF_BASE")
        if self.console_proxy_header and not self.console_proxies:
            found.append("IMATTR_CONSOLE_PROXY_HEADER needs IMATTR_CONSOLE_PROXIES: whose header to trust")
        if self.console_proxy_operators and not self.console_proxy_header:
            found.append("IMATTR_CONSOLE_PROXY_OPERATORS needs IMATTR_CONSOLE_PROXY_HEADER")
        if self.patience < 2 / self.quota:
            found.append(f"IMATTR_PATIENCE must be at least {2 / self.quota:g} at this IMATTR_QUOTA")
        return found


def _read_key_file(found: dict[str, Any]) -> list[str]:
    path = found.get("secret_key_file")
    if not path:
        return []
    if found.get("secret_key"):
        return ["IMATTR_SECRET_KEY and IMATTR_SECRET_KEY_FILE are both set, choose one"]
    try:
        found["secret_key"] = _key_in(path)
    except UnicodeDecodeError:
        return ["IMATTR_SECRET_KEY_FILE is not text"]
    except ValueError as mistake:
        return [f"IMATTR_SECRET_KEY_FILE {mistake}"]
    except OSError as error:
        return [f"IMATTR_SECRET_KEY_FILE cannot be read ({type(error).__name__})"]
    return [] if found["secret_key"] else ["IMATTR_SECRET_KEY_FILE is empty"]


def _key_in(path: str) -> Secret:
    """The key in a file; raises `OSError`, or `ValueError` if it is not one. Editors on Windows write UTF-16."""
    raw = Path(path).read_bytes()
    is_utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    bare = _bare(raw.decode("utf-16" if is_utf16 else "utf-8"))
    return _key(bare) if bare else NO_SECRET
