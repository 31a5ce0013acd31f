"""The client of served models against a server that has every fault."""

import logging
import socket
import threading
import time

import pytest

from fault_server import said, serving
from stableopd.endpoint import Endpoint, root_of
from stableopd.types import ConfigError, ServerError

KEY = "sk-very-secret-key"


def endpoint(*urls, timeout_s=0.3, patience_s=5.0, max_in_flight=4, api_key=None):
    return Endpoint(
        urls,
        api_key=api_key,
        timeout_s=timeout_s,
        patience_s=patience_s,
        max_in_flight=max_in_flight,
        name="teacher",
    )


def then(*answers):
    """Each answer once, the last one for ever."""
    left = list(answers)
    lock = threading.Lock()

    def script(path, body):
        with lock:
            return left.pop(0) if len(left) > 1 else left[0]

    return script


@pytest.mark.parametrize(
    "fault",
    [
        "hang",
        "drop",
        "half",
        "torn",
        said({}, 500),
        said({}, 503),
        said({}, 408),
        said({}, 429, Retry_After="0"),
        said([1, 2]),
        (200, {}, b"<html>a proxy's page</html>"),
        (200, {}, b"\xff\xfe{"),
        (200, {"Content_Encoding": "gzip"}, b"not gzip"),
    ],
    ids=str,
)
def test_a_fault_that_passes(fault):
    with serving(then(fault, fault, said({"x": 1}))) as server:
        assert endpoint(server.url).post("/completions", {"a": 1}) == {"x": 1}
        assert [(path, body) for path, body, _ in server.asked] == [
            ("/v1/completions", {"a": 1})
        ] * 3


def test_retry_after_is_kept():
    with serving(then(said({}, 429, Retry_After="1"), said({}))) as server:
        start = time.monotonic()
        endpoint(server.url).get("/models")
        assert time.monotonic() - start >= 1.0


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_a_server_that_comes_back(caplog):
    port = free_port()
    results = []
    client = endpoint(f"http://127.0.0.1:{port}/v1", patience_s=60.0)
    asking = threading.Thread(target=lambda: results.append(client.post("/x", {})))
    with caplog.at_level(logging.WARNING, "stableopd"):
        asking.start()
        time.sleep(0.6)
        with serving(then(said({"back": True})), port):
            asking.join(60)
    assert results == [{"back": True}]
    told = [r.getMessage() for r in caplog.records if r.name == "stableopd"]
    assert len(told) == 1
    assert "asking again for up to 60 s" in told[0]


def test_patience_ends_in_one_sentence():
    url = f"http://127.0.0.1:{free_port()}/v1"
    start = time.monotonic()
    with pytest.raises(ServerError) as found:
        endpoint(url, patience_s=0.7).post("/completions", {})
    assert time.monotonic() - start >= 0.7
    assert str(found.value).startswith(f"teacher: {url}/completions has given no answer for 0.7 s")
    assert str(found.value).endswith("start the server again or correct its address.")
    assert "\n" not in str(found.value)


def test_patience_counts_from_the_last_answer():
    """A server that answers one request in three is slow, and not gone."""
    lock, count = threading.Lock(), [0]

    def script(path, body):
        with lock:
            count[0] += 1
            return said({"n": body["n"]}) if count[0] % 3 == 0 else said({}, 500)

    with serving(script) as server:
        client = endpoint(server.url, patience_s=2.0, max_in_flight=2)
        start = time.monotonic()
        answers = client.post_all("/x", [{"n": n} for n in range(12)])
        assert time.monotonic() - start > 2.0, "too fast to tell"
        assert answers == [{"n": n} for n in range(12)]


@pytest.mark.parametrize(
    "body", [{"error": {"message": "too long"}}, {"message": "too long"}, {"detail": "too long"}]
)
def test_a_refusal_is_told_at_once(body):
    with serving(then(said(body, 400))) as server:
        with pytest.raises(ServerError, match=r"refused the request with status 400: too long$"):
            endpoint(server.url).post("/completions", {})
        assert len(server.asked) == 1


def test_a_long_refusal_is_cut_and_on_one_line():
    with serving(then((404, {}, b"a\nb " * 1000))) as server:
        with pytest.raises(ServerError) as found:
            endpoint(server.url).post("/completions", {})
        assert "\n" not in str(found.value)
        assert len(str(found.value)) < 450


def test_order_bound_and_spread():
    def script(path, body):
        time.sleep(0.02 if body["n"] % 3 else 0.06)
        return said(body)

    bodies = [{"n": n} for n in range(30)]
    with serving(script) as one, serving(script) as two:
        assert endpoint(one.url, two.url, max_in_flight=4).post_all("/x", bodies) == bodies
        assert max(one.most_in_flight, two.most_in_flight) <= 4
        assert one.most_in_flight >= 2
        assert min(len(one.asked), len(two.asked)) >= 10


def test_answers_are_read_as_they_come():
    with serving(lambda path, body: said(body)) as server:
        client = endpoint(server.url)
        read = client.post_all(
            "/x", [{"n": n} for n in range(5)], lambda place, answer: (place, answer["n"])
        )
        assert read == [(n, n) for n in range(5)]

        def refuse(place, answer):
            raise ServerError("no number")

        with pytest.raises(ServerError, match="no number"):
            client.post_all("/x", [{"n": 1}], refuse)


def test_a_replica_that_is_down_is_passed_by():
    bodies = [{"n": n} for n in range(20)]
    with serving(lambda path, body: said(body)) as server:
        client = endpoint(f"http://127.0.0.1:{free_port()}/v1", server.url)
        start = time.monotonic()
        assert client.post_all("/x", bodies) == bodies
        assert time.monotonic() - start < 20


def test_one_replica_by_its_address():
    with serving(then(said({"r": 1}))) as one, serving(then(said({"r": 2}))) as two:
        client = endpoint(one.url, two.url)
        assert [client.get("/models", url)["r"] for url in (one.url, two.url, one.url)] == [1, 2, 1]
        client.post("/tokenize", {}, url=root_of(one.url))
        assert one.asked[-1][0] == "/tokenize"


def test_an_error_ends_the_others_soon():
    def script(path, body):
        return said({"message": "no"}, 422) if body["n"] == 3 else said({}, 500)

    with serving(script) as server:
        start = time.monotonic()
        with pytest.raises(ServerError, match="422: no"):
            endpoint(server.url, patience_s=30).post_all("/x", [{"n": n} for n in range(8)])
        assert time.monotonic() - start < 20


def test_a_request_that_alone_fails_is_not_hammered():
    def script(path, body):
        time.sleep(0.01)
        return said({}, 500) if body["n"] == 0 else said(body)

    with serving(script) as server:
        client = endpoint(server.url, patience_s=0.5, max_in_flight=2)
        with pytest.raises(ServerError, match="status 500"):
            client.post_all("/x", [{"n": n} for n in range(40)])
        assert sum(body["n"] == 0 for _, body, _ in server.asked) < 40


def test_the_key_is_in_the_header_and_nowhere_else(caplog):
    leaks = said({"error": {"message": f"Incorrect API key provided: {KEY}"}}, 401)
    with serving(then(said({}, 500), leaks)) as server, caplog.at_level(logging.DEBUG):
        client = endpoint(server.url, api_key=KEY)
        with pytest.raises(ServerError) as found:
            client.post("/completions", {})
    assert server.asked[0][2]["Authorization"] == f"Bearer {KEY}"
    assert "provided: ***" in str(found.value)
    seen: BaseException | None = found.value
    while seen is not None:
        assert KEY not in repr(seen)
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    assert KEY not in caplog.text
    assert KEY not in repr(client)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://me:secret@host/v1", "holds credentials"),
        ("http://secret@host/v1", "holds credentials"),
        ("http://host/v1?key=secret", "goes on with"),
        ("host:8000", "is not one"),
        ("ftp://host/v1", "is not one"),
        ("http://host:port/v1", "is not one"),
        ("http://", "is not one"),
        ("", "is not one"),
    ],
)
def test_addresses_that_are_refused(url, words):
    with pytest.raises(ConfigError, match=words) as found:
        endpoint(url)
    assert "secret" not in str(found.value)
