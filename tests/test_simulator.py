"""The simulator against what the documents say, and against what independent clients really send."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import pytest
import requests

from tests.conftest import SECRET_KEY
from tests.simulation import APP, Simulation, control, simulation
from worker import usersig
from worker.simulator import CLOSED_FOR, MAX_REFUSED_SIGNATURES, Api, Arrivals, Fault, Quirks

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


def test_a_hundred_users_and_a_registration_id_pass(api: Api) -> None:
    entries = [{"To_Account": f"u{n}", "Attrs": {"city": "Paris"}} for n in range(99)]

    assert code(api, users([*entries, {"To_Account": "x" * 36, "Attrs": {"city": "Paris"}}])) == 0


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
