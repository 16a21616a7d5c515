"""Every key in Redis: the only catalogue of names, types and meanings.

All keys of an app share the hash tag ``{imattr:<sdkappid>}``, so they are on one Cluster node. Every script gets the ones
it needs through KEYS; none is built inside a script. Names of keys and fields never change: workers of the previous version
run beside these.

A *record* is what is known about one user and has not been delivered yet, as JSON::

    {"t": 1700000000000, "n": 2, "f": 1700000060000, "u": 1, "s": 1, "b": 1, "a": {"city": ["Paris", 1700000000000]}}

``t`` first-updated ms, ``n`` attempts used (absent = 0), ``f`` ms of a failure that counts as an attempt only if a call
claimed later succeeds, ``u`` present if the last call may have been applied, ``s`` present if the user is a suspect, ``b`` present if only a
backfill asked for it, ``a`` attribute name -> [value, version], with the value false to remove the attribute. A version is
the event time (ms) the producer gave, else Redis' clock at arrival. The names are short because a million pending users mean
a million records.

Delivered values are remembered as such a record, too, with ``c``, the number of the claim that delivered them.

Where a user can be: in exactly one of `live`, `backfill`, `delayed` (then `pending` has the record),
or in `flight` (then `pending` has a record only if something newer arrived meanwhile).
"""

from dataclasses import dataclass

#: The counters of the ledger, in reading order.
LEDGER = (
    "accepted",
    "redriven",
    "coalesced",
    "unchanged",
    "stale",
    "delivered",
    "dead_lettered",
    "quarantined",
    # What a repair no longer found, after keys were deleted or evicted; negative if it found more than the ledger knew of.
    "lost",
)


@dataclass(frozen=True, slots=True)
class Keys:
    """The key names of one app."""

    sdkappid: int

    def _key(self, name: str) -> str:
        return f"{{imattr:{self.sdkappid}}}:{name}"

    @property
    def pattern(self) -> str:
        """A SCAN pattern that matches all of them, and no others."""
        return self._key("*")

    @property
    def pending(self) -> str:
        """hash: user -> record, for users waiting to be sent."""
        return self._key("pending")

    @property
    def live(self) -> str:
        """zset: user scored by first-updated ms; first come, first served."""
        return self._key("live")

    @property
    def backfill(self) -> str:
        """zset: user scored by first-updated ms; fills the seats `live` leaves free."""
        return self._key("backfill")

    @property
    def delayed(self) -> str:
        """zset: user scored by not-before ms; afterwards the user joins its own lane again."""
        return self._key("delayed")

    @property
    def flight(self) -> str:
        """hash: user -> record as it is being sent."""
        return self._key("flight")

    @property
    def batches(self) -> str:
        """hash: batch id -> JSON array of the users still to be settled; the fencing token."""
        return self._key("batches")

    @property
    def leases(self) -> str:
        """zset: batch id scored by the ms at which its lease ends."""
        return self._key("leases")

    @property
    def dead(self) -> str:
        """hash: user -> {"a": attributes, "code", "message", "attempts", "t" first update ms, "at" ms}."""
        return self._key("dead")

    @property
    def dead_at(self) -> str:
        """zset: dead-lettered user scored by the ms it happened."""
        return self._key("dead_at")

    @property
    def shadow(self) -> str:
        """hash: user -> {"a": name -> [last delivered value, or null when unknown, version]}."""
        return self._key("shadow")

    @property
    def shadow_at(self) -> str:
        """zset: user in the shadow scored by the ms it was last written; the oldest are trimmed."""
        return self._key("shadow_at")

    @property
    def forgotten_at(self) -> str:
        """string: ms of the newest delivery that is no longer in the shadow."""
        return self._key("forgotten_at")

    @property
    def imports(self) -> str:
        """zset: unfinished import scored by the ms as of which it is true; anything delivered since is kept in the shadow."""
        return self._key("imports")

    @property
    def import_progress(self) -> str:
        """hash: unfinished import -> JSON of its progress: "at" s, "state", "lines", "share" of the file, "eta" s."""
        return self._key("import_progress")

    @property
    def import_pauses(self) -> str:
        """hash: paused import -> JSON of who paused it: "by", "reason", "at" s."""
        return self._key("import_pauses")

    @property
    def quarantine(self) -> str:
        """hash: "table:ms:user" -> the raw bytes that could not be read there."""
        return self._key("quarantine")

    @property
    def ledger(self) -> str:
        """hash: counter -> count, moved inside the same scripts as the users."""
        return self._key("ledger")

    @property
    def rate(self) -> str:
        """hash: "next" free slot us, "next_isolating" and "next_reading"; "paused_at", "paused_until" us with "reason" and
        "code"; "epoch", raised by each pause; while below the quota also the "limit" in calls a second
        and how it climbs: "good", "bad", "step", "granted", "climb_at" us, "hold" us; how far slots are "apart" us,
        because of the "jitter" us, corrected by the "stretch" us, which falls at "stretch_at" us and not sooner again
        than after "stretch_hold" us; "refusals" in the second that began at "refused_at" us; "busy" us, the slots granted
        so far, end to end."""
        return self._key("rate")

    @property
    def server(self) -> str:
        """hash, which server this is, and what is known of those before: its replication "id"; its "number", and the
        "first" one of this data; how many "servers" there were; since "at" ms, when that many updates were "accepted";
        "claims" made so far, and the numbers "gap_from" to "gap_to" of claims that only the server before can have made;
        "behind" = 1 once one of those was found missing here, "emptied" = 1 if the data had gone; updates known to be "lost"
        with the last server, and "lost_before" with all others."""
        return self._key("server")

    @property
    def quotas(self) -> str:
        """zset: quota in calls a second, scored by `rate`'s "busy" when a process last named it; the lowest rules."""
        return self._key("quotas")

    @property
    def read_rate(self) -> str:
        """hash, as `rate`: the slots of reads, if they have a quota of their own."""
        return self._key("read_rate")

    @property
    def read_quotas(self) -> str:
        """zset, as `quotas`, for that quota."""
        return self._key("read_quotas")

    @property
    def read_server(self) -> str:
        """hash, as `server`: which server the slots of `read_rate` belong to."""
        return self._key("read_server")

    @property
    def line(self) -> str:
        """hash, absent = open: "state" stopped or paused, "reason", "code", "since" ms; when paused "by" whom; when stopped also
        "kind" error, outage or data, "wait" ms, "next_probe" ms, "failed" probes, and "probe", the batch
        id of the one that is out."""
        return self._key("line")

    @property
    def health(self) -> str:
        """hash, what the line is decided by: "ok_at" ms at which the last successful call was claimed, "failures" of the
        service in a row, "calm_at" ms at which the last outage ended; "signed_at" s, before which no signature is good; "dead_code",
        "dead_row", "dead_seen", "dead_since" ms, "dead_count", "dead_base" of recent dead letters; "let_code" and
        "let_until" ms, the code that a person has allowed."""
        return self._key("health")

    @property
    def tickets(self) -> str:
        """zset: ticket id scored by issue ms; a ticket is the right to claim one batch, once."""
        return self._key("tickets")

    @property
    def partial_at(self) -> str:
        """string: ms at which a ticket was last issued for a batch that is not full."""
        return self._key("partial_at")

    @property
    def dispatcher(self) -> str:
        """string with expiry: name of the worker that leads as the dispatcher."""
        return self._key("dispatcher")

    @property
    def names(self) -> str:
        """set: the app's attribute names; empty or absent = not known, and any name passes."""
        return self._key("names")

    @property
    def names_read(self) -> str:
        """string with expiry: present while the names need not be read from the API again."""
        return self._key("names_read")

    @property
    def updates(self) -> str:
        """stream: updates from programs without Celery, with the consumer group `imattr`; an entry is
        deleted when it has been accepted or refused. Fields "user", "attrs" JSON, if known "occurred_at"."""
        return self._key("updates")

    @property
    def consumer(self) -> str:
        """string with expiry: name of the worker that leads as the consumer of `updates`."""
        return self._key("consumer")

    @property
    def queue_consumer(self) -> str:
        """string with expiry: name of the worker that leads as the consumer of Celery's queue."""
        return self._key("queue_consumer")

    @property
    def taken(self) -> str:
        """zset: digest of a RabbitMQ message that is not acknowledged yet, scored by the ms it was first taken."""
        return self._key("taken")

    @property
    def scheduled(self) -> str:
        """zset: JSON [[user, attributes, event time], ...] scored by the ms before which they must wait."""
        return self._key("scheduled")

    @property
    def intake(self) -> str:
        """hash: counter -> count of what came by Celery's queue, and "waiting" messages in it when last seen; "by_<way>",
        the updates accepted by each way, and "refused_<source>", those refused after they had left their sender."""
        return self._key("intake")

    @property
    def samples(self) -> str:
        """stream, capped: every few seconds "calls", "call_ms", "delivered" and "accepted" so far, users "pending" and
        "in_flight", the "server"'s number, the "limit" in calls a second, 0 = the quota, and "oldest_ms", for how long the
        oldest pending user has waited."""
        return self._key("samples")

    @property
    def samples_by_minute(self) -> str:
        """stream, capped: one of those samples a minute, for a day."""
        return self._key("samples_by_minute")

    @property
    def workers(self) -> str:
        """hash: name of a worker -> JSON of its last report: "at" s, "threads", "busy" ones, "version", and the "settings"
        that are not the defaults, without secrets."""
        return self._key("workers")

    @property
    def history(self) -> str:
        """stream, capped: what happened to the line and the fleet: "event", "by" whom, and what else there is to say."""
        return self._key("history")

    @property
    def console_key(self) -> str:
        """string: random text from which consoles make form tokens for people without a session."""
        return self._key("console_key")

    @property
    def console_sessions(self) -> str:
        """hash: digest of a session's secret -> JSON of whose it is: "name", "until" s, "proof" of the account's line."""
        return self._key("console_sessions")

    @property
    def audit(self) -> str:
        """hash: verdict -> users who were read back so far, and "skipped" ones; "since", "at" ms, the first and last time."""
        return self._key("audit")

    @property
    def auditor(self) -> str:
        """string with expiry: name of the worker that leads as the auditor."""
        return self._key("auditor")

    @property
    def refused(self) -> str:
        """stream, capped: updates refused after they had left their sender, "source" celery or stream,
        "user", "rule" and "payload"."""
        return self._key("refused")
