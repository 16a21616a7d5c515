"""The simulator against what the documents say, and against what independent clients really send."""

from __future__ import annotations

import base64
import json
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests

from tests.conftest import SECRET_KEY
from tests.delivery.test_usersig import COMPLETE, VECTORS
from tests.simulation import APP, Simulation, control, simulation
from worker.delivery import usersig
from worker.sandbox.faults import Fault
from worker.sandbox.simulator import CLOSED_FOR, MAX_REFUSED_SIGNATURES, Api, Arrivals, Quirks

NOW = 1_700_000_000
SET = "/v4/all_member_push/im_set_attr"
GOOD = [{"To_Account": "ann", "Attrs": {"city": "Paris"}}]


@pytest.fixture
def api() -> Api:
    return Api(APP, SECRET_KEY, names=("city", "level"), wall=lambda: NOW + 10)


def query(**changes: str) -> dict[str, str]:
    sig = usersig.sign(SECRET_KEY, "administrator", APP, NOW)
    good = {
        "sdkappid": str(APP),
        "identifier": "administrator",
        "usersig": sig,
        "random": "99",
        "contenttype": "json",
    }
    return good | changes


def ask(api: Api, body: object, *, path: str = SET, now: float = 1.0, **changes: str) -> dict[str, Any]:
    packed = body if isinstance(body, bytes) else json.dumps(body).encode()
    return api.handle(path, query(**changes), packed, now)


def code(api: Api, body: object, **changes: Any) -> int:
    reply = ask(api, body, **changes)
    assert reply["ActionStatus"] == ("FAIL" if reply["ErrorCode"] else "OK")
    number: int = reply["ErrorCode"]
    return number


def users(entries: object) -> dict[str, object]:
    return {"UserAttrs": entries}


def test_a_good_call_is_applied(api: Api) -> None:
    assert ask(api, users(GOOD)) == {"ActionStatus": "OK", "ErrorInfo": "", "ErrorCode": 0}
    assert api.users == {"ann": {"city": "Paris"}}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"Attrs": [{"To_Account": "ann", "Attrs": {"city": "Paris"}}]}, 90001),
        (b"", 90001),
        (b"{", 90001),
        ([], 90001),
        ({}, 90001),
        (users([]), 90001),
        (users(["ann"]), 90001),
        (users([{"To_Account": ["ann"], "Attrs": {"city": "Paris"}}]), 60015),
        (users([{"To_Account": 42, "Attrs": {"city": "Paris"}}]), 60015),
        (users([{"To_Account": "ann", "Attrs": ["city"]}]), 90001),
        (users([{"To_Account": "ann", "Attrs": {}}]), 90001),
        (users([{"To_Account": f"u{n}", "Attrs": {"city": "Paris"}} for n in range(101)]), 90018),
        (users([{"To_Account": "ann", "Attrs": {"city": "x" * 51}}]), 90033),
        (users([{"To_Account": "ann", "Attrs": {"city": "字" * 17}}]), 90033),
        (users([{"To_Account": "ann", "Attrs": {"city": ""}}]), 90033),
        (users([{"To_Account": "ann", "Attrs": {"city": 7}}]), 90033),
        (users([{"To_Account": "ann", "Attrs": {"shoe": "44"}}]), 90033),
        (users([{"To_Account": "", "Attrs": {"city": "Paris"}}]), 90048),
        (users([{"To_Account": "x" * 33, "Attrs": {"city": "Paris"}}]), 90048),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_bad_body_is_refused_and_nothing_is_applied(api: Api, body: object, expected: int) -> None:
    assert code(api, body) == expected
    assert api.users == {}


@pytest.mark.parametrize("value", ["x" * 50, "字" * 16])
def test_bytes_are_counted_after_decoding(api: Api, value: str) -> None:
    escaped = json.dumps(users([{"To_Account": "ann", "Attrs": {"city": value}}]), ensure_ascii=True)

    assert code(api, escaped.encode()) == 0
    assert api.users["ann"]["city"] == value


def test_a_hundred_users_pass(api: Api) -> None:
    entries = [{"To_Account": f"u{n}", "Attrs": {"city": "Paris"}} for n in range(100)]

    assert code(api, users(entries)) == 0


@pytest.mark.parametrize(
    ("path", "length", "expected"),
    [
        ("timpush/set_attr", 36, 0),
        ("timpush/set_attr", 35, 90048),
        ("all_member_push/im_set_attr", 36, 90048),
    ],
)
def test_only_the_twin_knows_registration_ids(api: Api, path: str, length: int, expected: int) -> None:
    entries = [{"To_Account": "x" * length, "Attrs": {"city": "Paris"}}]

    assert code(api, users(entries), path=f"/v4/{path}") == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"path": "/v4/openim/im_set_attr"}, 60009),
        ({"sdkappid": ""}, 60012),
        ({"identifier": ""}, 60025),
        ({"usersig": ""}, 60025),
        ({"random": ""}, 60025),
        ({"random": str(2**32)}, 60025),
        ({"contenttype": "JSON"}, 60025),
        ({"sdkappid": "1"}, 70020),
        ({"usersig": "nonsense"}, 70003),
        ({"usersig": usersig.sign(SECRET_KEY, "administrator", 1, NOW)}, 70014),
        ({"identifier": "somebody"}, 70013),
        ({"usersig": usersig.sign("other", "administrator", APP, NOW)}, 70009),
        ({"usersig": usersig.sign(SECRET_KEY, "administrator", APP, NOW - 100, 89)}, 70001),
        ({"identifier": "bob", "usersig": usersig.sign(SECRET_KEY, "bob", APP, NOW)}, 90009),
    ],
    ids=str,
)
def test_a_bad_url_is_refused(api: Api, changes: dict[str, str], expected: int) -> None:
    assert code(api, users(GOOD), **changes) == expected


def test_a_signature_is_good_until_its_very_last_second() -> None:
    sig = usersig.sign(SECRET_KEY, "administrator", APP, NOW, 300)

    assert code(Api(APP, SECRET_KEY, wall=lambda: NOW + 300), users(GOOD), usersig=sig) == 0
    assert code(Api(APP, SECRET_KEY, wall=lambda: NOW + 301), users(GOOD), usersig=sig) == 70001


def test_too_many_bad_signatures_close_verification_for_a_minute(api: Api) -> None:
    for _ in range(MAX_REFUSED_SIGNATURES):
        assert code(api, users(GOOD), usersig="nonsense") == 70003

    assert code(api, users(GOOD)) == 70050
    assert code(api, users(GOOD), now=1.0 + CLOSED_FOR) == 0


def test_the_checks_come_in_their_order(api: Api) -> None:
    api.quirks = Quirks(quota=1, feature_on=False)
    wrong = {"path": "/x", "sdkappid": "", "usersig": "x", "identifier": "x"}

    assert code(api, b"{", **wrong) == 60009
    del wrong["path"]
    assert code(api, b"{", **wrong) == 60012
    del wrong["sdkappid"]
    assert code(api, b"{", **wrong) == 70003
    assert code(api, b"{") == 90045
    api.quirks.feature_on = True
    assert code(api, b"{") == 90001
    assert code(api, b"{") == 60007, "the frequency is looked at before the body"


def packed(document: dict[str, Any], level: int) -> str:
    data = base64.b64encode(zlib.compress(json.dumps(document, separators=(",", ":")).encode(), level))
    return data.decode().translate(str.maketrans("+/=", "*-_"))


@pytest.mark.parametrize("level", [0, 1, 9])
def test_any_order_of_keys_and_any_compression_of_a_signature_passes(api: Api, level: int) -> None:
    document = usersig.decode(usersig.sign(SECRET_KEY, "administrator", APP, NOW, 300))
    turned = dict(reversed(document.items()))

    assert code(api, users(GOOD), usersig=packed(turned, level)) == 0


def test_the_worst_rolling_second_is_found_across_full_seconds() -> None:
    arrivals = Arrivals()
    # In both full seconds there are 100; in the second between them, 200.
    for number in range(100):
        arrivals.arrive(1.01 + number / 100_000)
        arrivals.arrive(0.99 + number / 100_000)

    assert arrivals.worst == 200
    assert arrivals.total == 200


def test_two_calls_exactly_a_second_apart_are_not_in_one_second() -> None:
    arrivals = Arrivals()
    for number in range(300):
        arrivals.arrive(number / 128)

    assert arrivals.worst == 128
    assert arrivals.seconds == pytest.approx(299 / 128)


@pytest.mark.parametrize(("refused_count", "passed"), [(True, 3), (False, 4)])
def test_the_quota_holds_in_every_rolling_second(refused_count: bool, passed: int) -> None:
    arrivals, quirks = Arrivals(), Quirks(quota=3, refused_count=refused_count)

    admitted = [arrivals.admit(at, quirks) for at in (0.0, 0.1, 0.2, 0.3, 1.05, 1.15)]

    assert admitted[:4] == [True, True, True, False]
    assert sum(admitted) == passed + (not refused_count)


def test_a_fixed_window_starts_anew_each_second() -> None:
    arrivals, quirks = Arrivals(), Quirks(quota=3, window="fixed")

    assert [arrivals.admit(at, quirks) for at in (0.8, 0.9, 0.95, 0.99, 1.0, 1.1)] == [
        True,
        True,
        True,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("reading", "expected", "errors"), [("batch", 90033, None), ("list", 0, 90033), ("silent", 0, None)]
)
def test_one_bad_user_has_three_readings(api: Api, reading: Any, expected: int, errors: int | None) -> None:
    api.quirks.bad_user = reading

    reply = ask(api, users([*GOOD, {"To_Account": "bob", "Attrs": {"shoe": "44"}}]))

    assert reply["ErrorCode"] == expected
    assert [entry["ErrorCode"] for entry in reply.get("ErrorList", [])] == ([errors] if errors else [])
    assert list(api.users) == ([] if expected else ["ann"])


def test_the_other_open_questions_are_switches(api: Api) -> None:
    api.quirks = Quirks(empty_values="accept", non_strings="coerce", case_sensitive=False)
    assert code(api, users([{"To_Account": "Ann", "Attrs": {"city": "", "level": 7}}])) == 0
    assert api.users == {"ann": {"city": "", "level": "7"}}

    api.quirks = Quirks(body_limit=20)
    assert code(api, users(GOOD)) == 93000

    api.quirks = Quirks(accounts_must_exist=True)
    assert code(api, users(GOOD)) == 70107
    api.accounts.add("ann")
    assert code(api, users(GOOD)) == 0


@pytest.mark.parametrize("family", [("all_member_push", "im_"), ("timpush", "")], ids=lambda pair: pair[0])
def test_the_companions_work_in_both_families(api: Api, family: tuple[str, str]) -> None:
    folder, prefix = family

    def path(name: str) -> str:
        return f"/v4/{folder}/{prefix}{name}"

    assert code(api, users(GOOD), path=path("set_attr")) == 0
    assert ask(api, {"To_Account": ["ann", "bob"]}, path=path("get_attr"))["UserAttrs"] == [
        {"To_Account": "ann", "Attrs": {"city": "Paris"}},
        {"To_Account": "bob", "Attrs": {}},
    ]
    assert ask(api, {}, path=path("get_attr_name"))["AttrNames"] == {"0": "city", "1": "level"}
    assert code(api, {"AttrNames": {"0": "sex"}}, path=path("set_attr_name")) == 0
    assert ask(api, {"AttrNames": {"0": "city"}}, path=path("set_attr_name")) == {
        "ActionStatus": "FAIL",
        "ErrorInfo": "attrName:city already exists at index:0",
        "ErrorCode": 90033,
    }
    removal = path("remove_attr")
    assert code(api, users([{"To_Account": "ann", "Attrs": {"city": ""}}]), path=removal) == 90001
    assert code(api, users([{"To_Account": "ann", "Attrs": ["city"]}]), path=removal) == 0
    assert api.users == {"ann": {}}


def test_the_record_has_every_write_with_its_arrival(api: Api) -> None:
    ask(api, users(GOOD), now=1.0)
    ask(api, users([{"To_Account": "ann", "Attrs": {"city": "Rome"}}]), now=2.0)

    assert [(write.at, write.user, write.attrs) for write in api.writes] == [
        (1.0, "ann", {"city": "Paris"}),
        (2.0, "ann", {"city": "Rome"}),
    ]


# Over HTTP.


def post(simulated: Simulation, body: bytes, url: str = "", **options: Any) -> requests.Response:
    parameters = "&".join(f"{name}={value}" for name, value in fresh().items())
    return requests.post(url or f"{simulated.url}{SET}?{parameters}", data=body, timeout=5, **options)


def fresh(**changes: str) -> dict[str, str]:
    import time

    return query(usersig=usersig.sign(SECRET_KEY, "administrator", APP, int(time.time()))) | changes


#: How independent clients in five languages differ on the wire.
WIRES: dict[str, dict[str, Any]] = {
    "php": {"star": "%2A", "type": "application/json", "escape": True, "close": True},
    "java": {"star": "*", "type": "application/json; charset=utf-8", "escape": False, "close": False},
    "python": {"star": "%2A", "type": None, "escape": True, "close": False, "spaces": True},
    "node": {"star": "*", "type": "application/json", "escape": False, "close": False},
    "go": {"star": "*", "type": "application/json", "escape": False, "close": True},
}


@pytest.mark.parametrize("language", WIRES)
@pytest.mark.parametrize("random", ["0", "4294967295"])
def test_what_independent_clients_send_is_accepted(language: str, random: str) -> None:
    wire = WIRES[language]
    body = json.dumps(
        users([{"To_Account": "ann", "Attrs": {"city": "北京"}, "Extra": 1}]),
        ensure_ascii=wire["escape"],
        separators=None if wire.get("spaces") else (",", ":"),
    )
    parameters = fresh(random=random)
    parameters["usersig"] = parameters["usersig"].replace("*", wire["star"])
    with simulation() as simulated:
        order = reversed(parameters.items()) if language == "node" else parameters.items()
        url = f"{simulated.url}{SET}?" + "&".join(f"{name}={value}" for name, value in order)
        headers = {"Content-Type": wire["type"], "Connection": "close" if wire["close"] else "keep-alive"}
        reply = requests.post(url, data=body.encode(), headers=headers, timeout=5)

        assert reply.status_code == 200
        assert reply.json()["ErrorCode"] == 0
        assert simulated.api.users == {"ann": {"city": "北京"}}


def test_refusals_come_with_status_200() -> None:
    with simulation() as simulated:
        reply = post(simulated, b"{")

        assert (reply.status_code, reply.json()["ErrorCode"]) == (200, 90001)
        assert requests.get(f"{simulated.url}{SET}", timeout=5).json()["ErrorCode"] == 60009


@pytest.mark.parametrize("applied", [False, True])
def test_a_reset_comes_before_or_after_the_write(applied: bool) -> None:
    with simulation() as simulated:
        simulated.fail(Fault("reset", applied=applied))

        with pytest.raises(requests.ConnectionError):
            post(simulated, json.dumps(users(GOOD)).encode())

        assert ("ann" in simulated.api.users) is applied


def test_a_late_write_lands_after_its_successor() -> None:
    with simulation() as simulated:
        simulated.fail(Fault("late_write", delay=0.3))
        with pytest.raises(requests.ConnectionError):
            post(simulated, json.dumps(users(GOOD)).encode())
        post(simulated, json.dumps(users([{"To_Account": "ann", "Attrs": {"city": "Rome"}}])).encode())
        assert simulated.api.users["ann"]["city"] == "Rome"

        simulated.api.quirks.latency = 0.5
        post(simulated, b"{}")

        assert [write.attrs["city"] for write in simulated.api.writes] == ["Rome", "Paris"]


def test_a_fault_strikes_as_often_as_it_should_and_only_its_user() -> None:
    with simulation() as simulated:
        simulated.fail(
            Fault("code", code=91000, times=2), Fault("user_code", user="bob", code=70107, times=None)
        )
        bodies = [
            json.dumps(users([{"To_Account": user, "Attrs": {"city": "Oslo"}}])).encode()
            for user in ("ann", "bob")
        ]

        codes = [post(simulated, bodies[number]).json()["ErrorCode"] for number in (0, 0, 0, 1, 1)]

        assert codes == [91000, 91000, 0, 70107, 70107]


def test_everything_can_be_looked_at_and_set_from_outside() -> None:
    with simulation() as simulated:
        url = f"{simulated.url}/simulator"
        requests.post(f"{url}/quirks", json={"bad_user": "list"}, timeout=5)
        requests.post(f"{url}/faults", json=[{"kind": "extra_fields"}], timeout=5)
        requests.post(f"{url}/accounts", json=["ann"], timeout=5)

        reply = post(simulated, json.dumps(users(GOOD)).encode()).json()

        assert reply["RequestId"] == "simulated"
        assert simulated.api.quirks.bad_user == "list"
        assert simulated.api.accounts == {"ann"}
        assert control(simulated.url, "users").json() == {"ann": {"city": "Paris"}}
        assert json.loads(control(simulated.url, "record").text)[2:] == ["ann", {"city": "Paris"}]
        state = control(simulated.url, "state").json()
        assert (state["requests"], state["users"], state["worst_rolling_second"]) == (1, 1, 1)
        requests.post(f"{url}/key", json="another", timeout=5)
        assert post(simulated, b"{}").json()["ErrorCode"] == 70009
        assert control(simulated.url, "nothing").status_code == 404


# More of the rules, one by one.


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in query().items() if key != name}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sdkappid", 60012),
        ("identifier", 60025),
        ("usersig", 60025),
        ("random", 60025),
        ("contenttype", 60025),
    ],
)
def test_a_missing_parameter_is_refused(api: Api, name: str, expected: int) -> None:
    assert api.handle(SET, without(name), b"{}", 1.0)["ErrorCode"] == expected


def test_a_value_of_51_bytes_is_refused_however_it_is_escaped(api: Api) -> None:
    body = json.dumps(users([{"To_Account": "ann", "Attrs": {"city": "字" * 17}}]))

    assert code(api, body.encode()) == code(api, json.dumps(json.loads(body), ensure_ascii=False).encode())
    assert api.counts.refused == {90033: 2}


UNKNOWN_APP = {"sdkappid": "1"}
OTHERS_SIGNATURE = usersig.sign("other", "bob", 1, NOW - 100, 5)

#: Each row is wrong in two ways; the code is that of the check that comes first.
ORDER: dict[str, tuple[dict[str, Any], Quirks, object, int]] = {
    "path, then sdkappid": ({"path": "/x", "sdkappid": ""}, Quirks(), {}, 60009),
    "sdkappid, then the others": ({"sdkappid": "", "random": ""}, Quirks(), {}, 60012),
    "parameters, then the signature": ({"random": "", "usersig": "x"}, Quirks(), {}, 60025),
    "known app, then the signed app": (UNKNOWN_APP | {"usersig": OTHERS_SIGNATURE}, Quirks(), {}, 70020),
    "signed app, then identifier": ({"usersig": OTHERS_SIGNATURE}, Quirks(), {}, 70014),
    "identifier, then key": ({"usersig": usersig.sign("other", "bob", APP, NOW)}, Quirks(), {}, 70013),
    "key, then expiry": (
        {"usersig": usersig.sign("other", "administrator", APP, NOW - 100, 5)},
        Quirks(),
        {},
        70009,
    ),
    "expiry, then administrator": (
        {"identifier": "bob", "usersig": usersig.sign(SECRET_KEY, "bob", APP, NOW - 100, 5)},
        Quirks(),
        {},
        70001,
    ),
    "administrator, then feature": (
        {"identifier": "bob", "usersig": usersig.sign(SECRET_KEY, "bob", APP, NOW)},
        Quirks(feature_on=False),
        {},
        90009,
    ),
    "feature, then JSON": ({}, Quirks(feature_on=False), b"{", 90045),
    "JSON, then each user": ({}, Quirks(), b'{"UserAttrs":[{"To_Account":4}', 90001),
    "count, then each user": ({}, Quirks(), users([{"To_Account": 4}] * 101), 90018),
}


@pytest.mark.parametrize("row", ORDER)
def test_of_two_mistakes_the_earlier_check_speaks(api: Api, row: str) -> None:
    changes, quirks, body, expected = ORDER[row]
    api.quirks = quirks

    assert code(api, body, **changes) == expected


@pytest.mark.parametrize(
    ("body", "feature_on", "expected"), [(b"{", True, 60007), (b"{", False, 90045)], ids=["JSON", "feature"]
)
def test_the_frequency_is_checked_between_feature_and_json(
    api: Api, body: bytes, feature_on: bool, expected: int
) -> None:
    api.quirks.quota = 1
    assert code(api, users(GOOD)) == 0
    api.quirks.feature_on = feature_on

    assert code(api, body) == expected


def test_an_undecodable_signature_is_noticed_before_an_unknown_app(api: Api) -> None:
    assert code(api, users(GOOD), usersig="nonsense", **UNKNOWN_APP) == 70003


def test_verification_stays_closed_for_the_whole_minute(api: Api) -> None:
    for _ in range(MAX_REFUSED_SIGNATURES):
        code(api, users(GOOD), usersig="nonsense", now=1.0)

    assert code(api, users(GOOD), now=1.0 + CLOSED_FOR - 0.001) == 70050
    assert api.users == {}


def test_a_good_signature_in_between_keeps_verification_open(api: Api) -> None:
    for _ in range(MAX_REFUSED_SIGNATURES - 1):
        code(api, users(GOOD), usersig="nonsense")
    assert code(api, users(GOOD)) == 0

    assert code(api, users(GOOD), usersig="nonsense") == 70003
    assert code(api, users(GOOD)) == 0


@pytest.mark.parametrize(("signatures_from", "expected"), [(NOW, 0), (NOW + 1, 70001)])
def test_signatures_of_before_a_given_time_have_expired(
    api: Api, signatures_from: int, expected: int
) -> None:
    api.quirks.signatures_from = signatures_from

    assert code(api, users(GOOD)) == expected


def test_a_signature_that_was_let_in_before_may_expire(api: Api) -> None:
    assert code(api, users(GOOD)) == 0

    api.quirks.signatures_from = NOW + 1

    assert code(api, users(GOOD)) == 70001


@pytest.mark.parametrize("name", COMPLETE)
def test_a_usersig_of_an_official_library_lets_a_call_in(name: str) -> None:
    key, identifier, sdkappid, issued, expire, proof = VECTORS[name]
    api = Api(sdkappid, key, administrators=[identifier], names=["city"], wall=lambda: issued + 1)
    changes = {"sdkappid": str(sdkappid), "identifier": identifier, "usersig": COMPLETE[name]}

    assert code(api, users(GOOD), **changes) == 0
    assert usersig.decode(COMPLETE[name])["TLS.sig"] == proof
    assert usersig.signature(key, identifier, sdkappid, issued, expire) == proof


# Numbers that a float cannot hold exactly would blur the window's edge: all times are multiples of 1/256.
AROUND_A_FULL_SECOND = [255 / 256] * 100 + [257 / 256] * 100


@pytest.mark.parametrize(("window", "passed"), [("rolling", 100), ("fixed", 200)])
def test_a_rolling_window_stops_what_fixed_ones_let_pass(window: Any, passed: int) -> None:
    arrivals, quirks = Arrivals(), Quirks(window=window)

    assert sum(arrivals.admit(at, quirks) for at in AROUND_A_FULL_SECOND) == passed


def test_the_quota_admits_exactly_100_in_any_rolling_second() -> None:
    arrivals, admitted = Arrivals(), Arrivals()
    quirks = Quirks(refused_count=False)

    for at in (number / 256 for number in range(1024)):
        if arrivals.admit(at, quirks):
            admitted.arrive(at)

    assert admitted.worst == 100
    assert admitted.total == 400


def test_refused_calls_that_count_keep_a_hasty_caller_out() -> None:
    arrivals, quirks = Arrivals(), Quirks(refused_count=True)

    admitted = [arrivals.admit(number / 256, quirks) for number in range(1024)]

    assert sum(admitted) == 100


def test_no_quota_lets_everything_pass() -> None:
    arrivals, quirks = Arrivals(), Quirks(quota=0)

    assert all(arrivals.admit(1.0, quirks) for _ in range(1000))


def test_a_call_over_the_quota_is_refused_and_not_applied(api: Api) -> None:
    api.quirks.quota = 1
    code(api, users(GOOD))

    assert code(api, users([{"To_Account": "bob", "Attrs": {"city": "Rome"}}])) == 60007
    assert list(api.users) == ["ann"]


@pytest.mark.parametrize(("given", "stored"), [(7, "7"), (True, "true"), (None, "null"), (1.5, "1.5")])
def test_values_that_are_no_strings_are_coerced_if_wished(api: Api, given: object, stored: str) -> None:
    api.quirks.non_strings = "coerce"

    assert code(api, users([{"To_Account": "ann", "Attrs": {"city": given}}])) == 0
    assert api.users == {"ann": {"city": stored}}


@pytest.mark.parametrize(("room", "expected"), [(0, 0), (-1, 93000)])
def test_a_body_may_be_as_long_as_the_limit(api: Api, room: int, expected: int) -> None:
    body = json.dumps(users(GOOD)).encode()
    api.quirks.body_limit = len(body) + room

    assert code(api, body) == expected


def test_an_account_that_was_not_imported_is_listed(api: Api) -> None:
    api.quirks = Quirks(accounts_must_exist=True, bad_user="list")
    api.accounts.add("ann")

    reply = ask(api, users([*GOOD, {"To_Account": "bob", "Attrs": {"city": "Rome"}}]))

    assert reply["ErrorCode"] == 0
    assert reply["ErrorList"] == [{"To_Account": "bob", "ErrorCode": 70107, "ErrorInfo": ""}]


@pytest.mark.parametrize(
    ("case_sensitive", "known"), [(True, ["Ann", "ann"]), (False, ["ann"])], ids=["sensitive", "not"]
)
def test_the_case_of_a_user_id_matters_or_not(api: Api, case_sensitive: bool, known: list[str]) -> None:
    api.quirks.case_sensitive = case_sensitive

    code(api, users([{"To_Account": "Ann", "Attrs": {"city": "Paris"}}]))
    code(api, users(GOOD))

    assert sorted(api.users) == known


def test_a_user_is_read_back_when_case_does_not_matter(api: Api) -> None:
    api.quirks.case_sensitive = False
    code(api, users([{"To_Account": "Ann", "Attrs": {"city": "Paris"}}]))

    reply = ask(api, {"To_Account": ["Ann"]}, path="/v4/all_member_push/im_get_attr")

    assert reply["UserAttrs"] == [{"To_Account": "Ann", "Attrs": {"city": "Paris"}}]


def test_an_imported_account_is_known_when_case_does_not_matter(api: Api) -> None:
    api.quirks = Quirks(case_sensitive=False, accounts_must_exist=True)
    api.accounts.add("ann")

    assert code(api, users([{"To_Account": "Ann", "Attrs": {"city": "Paris"}}])) == 0


SET_NAMES = "/v4/all_member_push/im_set_attr_name"


def test_an_app_never_has_more_than_ten_names(api: Api) -> None:
    nine = {str(number): f"name {number}" for number in range(9)}
    assert code(api, {"AttrNames": nine}, path=SET_NAMES) == 90033
    assert api.names == ["city", "level"]

    del nine["8"]
    assert code(api, {"AttrNames": nine}, path=SET_NAMES) == 0
    assert len(api.names) == 10


def test_a_name_given_twice_in_one_call_is_refused(api: Api) -> None:
    reply = ask(api, {"AttrNames": {"0": "sex", "1": "sex"}}, path=SET_NAMES)

    assert (reply["ErrorCode"], reply["ErrorInfo"]) == (90033, "attrName:sex already exists at index:2")
    assert api.names == ["city", "level"]


@pytest.mark.parametrize("names", [{"10": "sex"}, {"0": ""}, {"0": "x" * 51}, {}], ids=str)
def test_names_that_break_a_rule_are_refused(api: Api, names: dict[str, str]) -> None:
    assert code(api, {"AttrNames": names}, path=SET_NAMES) in (90001, 90033)
    assert api.names == ["city", "level"]


def test_a_removal_of_an_unknown_name_is_refused(api: Api) -> None:
    body = users([{"To_Account": "ann", "Attrs": ["shoe"]}])

    assert code(api, body, path="/v4/all_member_push/im_remove_attr") == 90033


TWIN = "/v4/timpush"
CHAT = "/v4/all_member_push"


@pytest.mark.parametrize("path", [f"{CHAT}/im_get_attr", f"{TWIN}/get_attr"])
@pytest.mark.parametrize(
    ("asked", "expected"),
    [("ann", 90001), (None, 90001), (["ann", 4], 60015), ([4] * 101, 90018), (["ann"] * 100, 0)],
    ids=["text", "nothing", "a number in it", "too many", "a hundred"],
)
def test_attributes_are_asked_for_with_up_to_100_strings(
    api: Api, path: str, asked: object, expected: int
) -> None:
    assert code(api, {"To_Account": asked}, path=path) == expected


def test_the_twin_lists_unknown_accounts_when_asked_for_attributes(api: Api) -> None:
    api.quirks.accounts_must_exist = True
    api.accounts.add("ann")

    reply = ask(api, {"To_Account": ["bob", "ann"]}, path=f"{TWIN}/get_attr")

    assert reply["ErrorCode"] == 0
    assert reply["UserAttrs"] == [{"To_Account": "ann", "Attrs": {}}]
    assert reply["ErrorList"] == [{"To_Account": "bob", "ErrorCode": 70107, "ErrorInfo": ""}]


def test_only_the_twin_lists_unknown_accounts_when_asked_for_attributes(api: Api) -> None:
    api.quirks.accounts_must_exist = True

    reply = ask(api, {"To_Account": ["bob"]}, path=f"{CHAT}/im_get_attr")

    assert reply["UserAttrs"] == [{"To_Account": "bob", "Attrs": {}}]
    assert "ErrorList" not in reply


@pytest.mark.parametrize("reading", ["batch", "list", "silent"])
@pytest.mark.parametrize(("name", "attrs"), [("set_attr", {"city": "Rome"}), ("remove_attr", ["city"])])
def test_the_twin_lists_unknown_accounts_under_every_reading(
    api: Api, reading: Any, name: str, attrs: object
) -> None:
    api.quirks = Quirks(accounts_must_exist=True, bad_user=reading)
    api.accounts.add("ann")

    reply = ask(
        api, users([{"To_Account": user, "Attrs": attrs} for user in ("bob", "ann")]), path=f"{TWIN}/{name}"
    )

    assert reply["ErrorCode"] == 0
    assert reply["ErrorList"] == [{"To_Account": "bob", "ErrorCode": 70107, "ErrorInfo": ""}]
    assert list(api.users) == ["ann"]


def test_the_twin_tells_the_types_of_the_names(api: Api) -> None:
    body = {"AttrNames": {"2": "device", "3": "sex"}, "AttrTypes": {"2": 1}}
    assert code(api, body, path=f"{TWIN}/set_attr_name") == 0

    reply = ask(api, {}, path=f"{TWIN}/get_attr_name")

    assert reply["AttrNames"] == {"0": "city", "1": "level", "2": "device", "3": "sex"}
    assert reply["AttrTypes"] == {"0": 0, "1": 0, "2": 1, "3": 0}
    assert "AttrTypes" not in ask(api, {}, path=f"{CHAT}/im_get_attr_name")


@pytest.mark.parametrize("types", [[0], {"1": 0}, {"0": 2}, {"0": "1"}, {"0": True}, {"0": None}], ids=str)
def test_types_that_break_a_rule_are_refused(api: Api, types: object) -> None:
    body = {"AttrNames": {"0": "sex"}, "AttrTypes": types}

    assert code(api, body, path=f"{TWIN}/set_attr_name") == 90001
    assert api.names == ["city", "level"]
    assert code(api, body, path=f"{CHAT}/im_set_attr_name") == 0, "an unknown field there"


def altered(**fields: object) -> str:
    """A signature with other fields, and so with a wrong proof."""
    document = usersig.decode(usersig.sign(SECRET_KEY, "administrator", APP, NOW))
    return packed(document | {f"TLS.{name}": value for name, value in fields.items()}, 6)


@pytest.mark.parametrize(
    ("body", "changes", "expected"),
    [
        (users([{"To_Account": "ann", "Attrs": {"city": "\ud800"}}]), {}, 90001),
        (users([{"To_Account": "\ud800", "Attrs": {"city": "Paris"}}]), {}, 90001),
        ({"AttrNames": {"0": "\ud800"}}, {"path": SET_NAMES}, 90001),
        (json.dumps(users(GOOD)).encode("utf-16"), {}, 90001),
        (b"[" * 100_000, {}, 90001),
        (b'{"UserAttrs":' + b"9" * 5000 + b"}", {}, 90001),
        (users([{"To_Account": "ann", "Attrs": {"city": float("inf")}}]), {}, 90001),
        (users([{"To_Account": "ann", "Attrs": {"city": float("nan")}}]), {}, 90001),
        (users(GOOD), {"random": "9" * 5000}, 60025),
        (users(GOOD), {"random": "\u0663"}, 60025),
        (users(GOOD), {"usersig": altered(expire=float("inf"))}, 70003),
        (users(GOOD), {"usersig": altered(time=[])}, 70003),
        (users(GOOD), {"usersig": altered(sig="\ud800")}, 70003),
        (users(GOOD), {"usersig": altered(identifier="\ud800"), "identifier": "\ud800"}, 70003),
        (users(GOOD), {"usersig": "\ud800"}, 70003),
    ],
    ids=[
        "half a character as value",
        "as user",
        "as name",
        "not UTF-8",
        "deep nesting",
        "long number",
        "endless number",
        "no number",
        "long random",
        "foreign digits",
        "endless signature",
        "a list for a time",
        "half a character as proof",
        "as identifier",
        "as signature",
    ],
)
def test_nothing_a_caller_sends_makes_the_api_fall_over(
    api: Api, body: object, changes: dict[str, str], expected: int
) -> None:
    assert code(api, body, **changes) == expected


# More over HTTP.


@pytest.fixture
def simulated() -> Iterator[Simulation]:
    with simulation() as running:
        yield running


def set_city(simulated: Simulation, city: str, user: str = "ann") -> requests.Response:
    return post(simulated, json.dumps(users([{"To_Account": user, "Attrs": {"city": city}}])).encode())


def wait_for(met: Callable[[], bool]) -> None:
    """Until something has happened in the simulator's thread; at most 5 s."""
    for _ in range(500):
        if met():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen")


PARAMETERS = ("sdkappid", "identifier", "usersig", "random", "contenttype")


@pytest.mark.parametrize(
    "order",
    [PARAMETERS, PARAMETERS[::-1], PARAMETERS[2:] + PARAMETERS[:2], ("contenttype", *PARAMETERS[:4])],
    ids=["documented", "reversed", "turned", "last first"],
)
def test_the_order_of_the_parameters_does_not_matter(order: tuple[str, ...], simulated: Simulation) -> None:
    parameters = fresh()
    url = f"{simulated.url}{SET}?" + "&".join(f"{name}={parameters[name]}" for name in order)

    assert post(simulated, json.dumps(users(GOOD)).encode(), url).json()["ErrorCode"] == 0


def test_connection_close_is_honoured(simulated: Simulation) -> None:
    body = json.dumps(users(GOOD)).encode()

    reply = post(simulated, body, headers={"Connection": "close"})

    assert reply.headers["Connection"] == "close"
    assert reply.json()["ErrorCode"] == 0


def test_an_unknown_path_is_refused_with_status_200(simulated: Simulation) -> None:
    reply = post(simulated, b"{}", f"{simulated.url}/v4/nothing")

    assert (reply.status_code, reply.json()["ErrorCode"]) == (200, 60009)


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_another_method_is_refused_with_status_200(method: str, simulated: Simulation) -> None:
    reply = requests.request(method, f"{simulated.url}{SET}", timeout=5)

    assert (reply.status_code, reply.json()["ErrorCode"]) == (200, 60009)


def test_a_parameter_that_is_no_text_is_refused(simulated: Simulation) -> None:
    parameters = "&".join(f"{name}={value}" for name, value in fresh(identifier="%FF").items())

    reply = post(simulated, b"{}", f"{simulated.url}{SET}?{parameters}")

    assert (reply.status_code, reply.json()["ErrorCode"]) == (200, 70013)


@pytest.mark.parametrize("applied", [False, True])
def test_a_bad_gateway_says_so_in_html(applied: bool, simulated: Simulation) -> None:
    simulated.fail(Fault("status", code=502, applied=applied))

    reply = set_city(simulated, "Paris")

    assert (reply.status_code, reply.headers["Content-Type"]) == (502, "text/html")
    assert reply.text.startswith("<html>")
    assert ("ann" in simulated.api.users) is applied


def test_a_truncated_reply_is_no_json_but_was_applied(simulated: Simulation) -> None:
    simulated.fail(Fault("truncated"))

    reply = set_city(simulated, "Paris")

    with pytest.raises(requests.JSONDecodeError):
        reply.json()
    assert simulated.api.users == {"ann": {"city": "Paris"}}


def test_a_slow_reply_comes_after_the_callers_timeout_and_was_applied(simulated: Simulation) -> None:
    simulated.fail(Fault("slow", delay=0.5))
    url = f"{simulated.url}{SET}?" + "&".join(f"{name}={value}" for name, value in fresh().items())

    with pytest.raises(requests.ReadTimeout):
        requests.post(url, data=json.dumps(users(GOOD)), timeout=0.2)

    wait_for(lambda: simulated.api.users == {"ann": {"city": "Paris"}})


def test_a_code_on_demand_applies_nothing(simulated: Simulation) -> None:
    simulated.fail(Fault("code", code=60020))

    assert set_city(simulated, "Paris").json()["ErrorCode"] == 60020
    assert simulated.api.users == {}


def test_a_code_for_one_user_leaves_the_others_alone(simulated: Simulation) -> None:
    simulated.api.quirks.bad_user = "list"
    simulated.fail(Fault("user_code", user="bob", code=90035))
    body = users([*GOOD, {"To_Account": "bob", "Attrs": {"city": "Rome"}}])

    reply = post(simulated, json.dumps(body).encode()).json()

    assert reply["ErrorList"] == [{"To_Account": "bob", "ErrorCode": 90035, "ErrorInfo": ""}]
    assert simulated.api.users == {"ann": {"city": "Paris"}}


def test_extra_fields_come_with_a_good_reply(simulated: Simulation) -> None:
    simulated.fail(Fault("extra_fields"))

    reply = set_city(simulated, "Paris").json()

    assert (reply["ErrorCode"], reply["RequestId"]) == (0, "simulated")
    assert "Unheard" in reply


def test_a_fault_used_up_lets_the_next_one_strike(simulated: Simulation) -> None:
    simulated.fail(Fault("code", code=91000), Fault("code", code=60008))

    codes = [set_city(simulated, "Paris").json()["ErrorCode"] for _ in range(3)]

    assert codes == [91000, 60008, 0]


def late_then_wait(simulated: Simulation, body: object, path: str = SET) -> None:
    """Send a call that is applied late, and wait until it is."""
    simulated.fail(Fault("late_write", delay=0.05))
    before = simulated.api.counts.applied_requests
    url = f"{simulated.url}{path}?" + "&".join(f"{name}={value}" for name, value in fresh().items())
    with pytest.raises(requests.ConnectionError):
        requests.post(url, data=json.dumps(body), timeout=5)
    wait_for(lambda: simulated.api.counts.applied_requests > before)


def test_the_record_has_late_writes_with_the_arrival_of_their_request(simulated: Simulation) -> None:
    simulated.fail(Fault("late_write", delay=0.2))
    with pytest.raises(requests.ConnectionError):
        set_city(simulated, "Paris")
    set_city(simulated, "Rome")
    wait_for(lambda: len(simulated.api.writes) == 2)

    lines = [json.loads(line) for line in control(simulated.url, "record").text.splitlines()]

    assert [attrs["city"] for _, _, _, attrs in lines] == ["Rome", "Paris"], "in order of application"
    assert lines[1][0] < lines[0][0], "but the late one had arrived first"


def test_a_late_write_keeps_the_number_of_its_request(simulated: Simulation) -> None:
    simulated.fail(Fault("late_write", delay=0.2))
    with pytest.raises(requests.ConnectionError):
        set_city(simulated, "Paris")
    set_city(simulated, "Rome")
    wait_for(lambda: len(simulated.api.writes) == 2)

    assert [write.request for write in simulated.api.writes] == [2, 1]


@pytest.mark.parametrize("reading", ["list", "silent"])
def test_a_late_write_leaves_refused_users_out(reading: Any, simulated: Simulation) -> None:
    simulated.api.quirks.bad_user = reading

    late_then_wait(simulated, users([*GOOD, {"To_Account": "bob", "Attrs": {"shoe": "44"}}]))

    # Asked over HTTP: the answer comes after the write is complete.
    assert control(simulated.url, "users").json() == {"ann": {"city": "Paris"}}


def test_a_removal_can_be_late(simulated: Simulation) -> None:
    set_city(simulated, "Paris")

    late_then_wait(simulated, users([{"To_Account": "ann", "Attrs": ["city"]}]), f"{CHAT}/im_remove_attr")

    assert control(simulated.url, "users").json() == {"ann": {}}


def test_a_late_write_that_was_refused_never_comes(simulated: Simulation) -> None:
    simulated.fail(Fault("late_write"))
    with pytest.raises(requests.ConnectionError):
        set_city(simulated, "")

    # Even a write without delay would be there after the next call.
    set_city(simulated, "Rome", "bob")

    assert control(simulated.url, "users").json() == {"bob": {"city": "Rome"}}


def test_a_slow_answer_tells_what_was_stored_when_it_was_asked_for(api: Api) -> None:
    code(api, users(GOOD))
    reply = ask(api, {"To_Account": ["ann"]}, path=f"{CHAT}/im_get_attr")

    code(api, users([{"To_Account": "ann", "Attrs": {"city": "Rome"}}]))

    assert reply["UserAttrs"] == [{"To_Account": "ann", "Attrs": {"city": "Paris"}}]


def test_the_record_is_kept_in_order_of_application(simulated: Simulation) -> None:
    for city in ("Paris", "Rome", "Oslo"):
        set_city(simulated, city)

    lines = [json.loads(line) for line in control(simulated.url, "record").text.splitlines()]

    assert [attrs["city"] for _, _, _, attrs in lines] == ["Paris", "Rome", "Oslo"]
    assert [at for at, _, _, _ in lines] == sorted(at for at, _, _, _ in lines)


def test_arrivals_can_be_counted_anew(simulated: Simulation) -> None:
    set_city(simulated, "Paris")
    assert control(simulated.url, "state").json()["calls"] == 1

    requests.post(f"{simulated.url}/simulator/reset-arrivals", json={}, timeout=5)

    assert control(simulated.url, "state").json()["calls"] == 0


def put(simulated: Simulation, what: str, given: object) -> None:
    requests.post(f"{simulated.url}/simulator/{what}", json=given, timeout=5).raise_for_status()


def test_signatures_can_be_made_to_expire_from_outside(simulated: Simulation) -> None:
    put(simulated, "quirks", {"signatures_from": 2**40})
    assert set_city(simulated, "Paris").json()["ErrorCode"] == 70001

    put(simulated, "quirks", {"signatures_from": 0})

    assert set_city(simulated, "Paris").json()["ErrorCode"] == 0


def test_the_names_of_the_app_can_be_replaced_from_outside(simulated: Simulation) -> None:
    put(simulated, "names", ["shoe"])

    assert set_city(simulated, "Paris").json()["ErrorCode"] == 90033
    assert control(simulated.url, "state").json()["names"] == ["shoe"]


def test_the_administrators_can_be_replaced_from_outside(simulated: Simulation) -> None:
    put(simulated, "administrators", ["somebody"])
    assert set_city(simulated, "Paris").json()["ErrorCode"] == 90009

    put(simulated, "administrators", ["somebody", "administrator"])

    assert set_city(simulated, "Paris").json()["ErrorCode"] == 0


def test_the_arrivals_of_all_calls_can_be_looked_at(simulated: Simulation) -> None:
    set_city(simulated, "Paris")
    set_city(simulated, "")
    set_city(simulated, "Rome")

    arrivals = control(simulated.url, "arrivals").json()

    assert len(arrivals) == 3, "refused ones, too"
    assert arrivals == sorted(arrivals)
    assert [arrivals[0], arrivals[2]] == [write.at for write in simulated.api.writes]


def test_arrivals_are_told_in_order_even_if_noted_out_of_order() -> None:
    arrivals = Arrivals()
    for at in (2.0, 1.0, 3.0):
        arrivals.arrive(at)

    assert arrivals.times == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("reads", "passed"), [("shared", 3), ("apart", 6)])
def test_reads_share_the_quota_or_have_one_for_themselves(api: Api, reads: Any, passed: int) -> None:
    api.quirks = Quirks(quota=3, reads=reads)
    read = SET.replace("set_attr", "get_attr")

    answers = [ask(api, {}, path=path, now=1.0)["ErrorCode"] for path in [SET, read] * 4]

    assert sum(code != 60007 for code in answers) == passed
