"""Every exception this product raises.

    ImattrError
    ├── ConfigError      settings are missing or wrong; lists all errors
    ├── InvalidUpdate    an update breaks a rule of the API; names the rule and the user
    ├── BufferFull       a new user was refused because too many are pending, or Redis has little memory left
    ├── NotConfirmed     Redis has the update, but too few replicas confirmed it in time
    ├── CallFailed       an API call requested by a person failed; says what to do
    ├── CannotImport     a file cannot be imported; says why
    ├── UnusablePlan     a plan file cannot be written, or applied; says why
    └── SandboxError     a server of the sandbox could not be started

Errors of the `redis` library pass through unchanged, so callers that already handle them keep doing so.
"""

from collections.abc import Sequence


class ImattrError(Exception):
    """Base of all exceptions of this product."""


class ConfigError(ImattrError):
    """Raised when settings are missing or wrong. `mistakes` has a sentence for each error."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__("\n".join(self.mistakes))


class InvalidUpdate(ImattrError):
    """Raised when an update breaks a rule; never carries the value, only its length or type.

    `user` is the user id as given (shortened), `rule` the sentence that says what is wrong.
    """

    def __init__(self, user: str, rule: str) -> None:
        self.user = user
        self.rule = rule
        super().__init__(f"user {user}: {rule}")


class BufferFull(ImattrError):
    """Raised when there is no room for a user who is not pending yet. There may be later.

    `limit` is `IMATTR_MAX_PENDING`, or None if Redis is short of memory.
    """

    def __init__(self, user: str, limit: int | None) -> None:
        self.user = user
        if limit is None:
            self.rule = "the buffer is full, Redis is near its memory limit (maxmemory)"
        else:
            self.rule = f"the buffer is full, {limit} users are pending (IMATTR_MAX_PENDING)"
        super().__init__(f"user {user}: {self.rule}")


class NotConfirmed(ImattrError):
    """Raised when fewer replicas than `IMATTR_REPLICAS` confirmed an update in time.

    It may still be applied. Sending it again is safe.
    """

    def __init__(self, have: int, wanted: int, seconds: float) -> None:
        self.have, self.wanted = have, wanted
        super().__init__(
            f"not confirmed: {have} of {wanted} replicas have the update after {seconds:g} s; "
            "it may still be applied, and sending it again is safe"
        )


class CallFailed(ImattrError):
    """Raised when an API call requested by a person failed.

    `found` says why, `fix` what to do about it; neither contains a secret.
    """

    def __init__(self, found: str, fix: str) -> None:
        self.found = found
        self.fix = fix
        super().__init__(f"{found}; {fix}")


class CannotImport(ImattrError):
    """Raised when a file cannot be imported; says why, without showing its content."""


class UnusablePlan(ImattrError):
    """Raised when a plan file cannot be written or applied; says why, without showing its content."""


class SandboxError(ImattrError):
    """Raised when a server that the sandbox needs cannot be found or started."""
