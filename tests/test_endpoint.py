"""The client of served models against a server that has every fault."""

import base64
import html
import json
import logging
import socket
import ssl
import threading
import time
import urllib.parse

import hypothesis
import hypothesis.strategies as st
import pytest

from fault_server import said, serving
from stableopd.endpoint import Endpoint, client, read_key, root_of
from stableopd.endpoint.keys import Mask
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
    leaks = said({"error": {"message": f"Incorrect API key provided: {KEY}"}}, 400)
    faults = then(said({"detail": KEY}, 500), leaks)
    with serving(faults) as server, caplog.at_level(logging.DEBUG):
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


@pytest.mark.parametrize("status", [401, 403])
def test_of_a_refused_key_the_status_alone_is_told(status):
    refused = then(said({"error": "bad key, such as sk-v"}, status))
    with serving(refused) as server, pytest.raises(ServerError, match=f"{status}") as found:
        endpoint(server.url, api_key=KEY).get("/models")
    assert "bad key" not in str(found.value)
    assert "api_key_env" in str(found.value)


ODD_KEY = 'sk-SECRET/ab+c=="1\\x%41&<'


@pytest.mark.parametrize("key", [KEY, ODD_KEY])
@pytest.mark.parametrize(
    "spell",
    [
        str,
        lambda key: urllib.parse.quote(key, safe=""),
        lambda key: urllib.parse.quote(urllib.parse.quote(key, safe="")),
        lambda key: "".join(f"%{ord(c):02X}" for c in key),
        lambda key: base64.b64encode(key.encode()).decode(),
        lambda key: base64.urlsafe_b64encode(b"user:" + key.encode()).decode(),
        lambda key: base64.b64encode(b"me:" + key.encode() + b"!").decode(),
        lambda key: key.encode().hex(),
        lambda key: json.dumps({"key": key}),
        lambda key: json.dumps(json.dumps({"key": key})),
        lambda key: "".join(f"\\u{ord(c):04x}" for c in key),
        lambda key: repr(key.encode()),
        html.escape,
        lambda key: key[:7] + "\n" + key[7:13] + " \t" + key[13:],
        lambda key: json.dumps(key[:8] + "\r\n" + key[8:]),
        str.upper,
        lambda key: key[:-4],
        lambda key: key[4:],
        lambda key: key[2:10],
    ],
)
def test_the_key_is_masked_in_every_spelling(key, spell):
    text = f"bad key {spell(key)}, sorry"
    with serving(then((400, {}, text.encode()))) as server, pytest.raises(ServerError) as found:
        endpoint(server.url, api_key=key).get("/models")
    told = str(found.value)
    assert "bad key" in told
    assert told.endswith("sorry")
    between = told.partition("bad key")[2].removesuffix("sorry")
    assert "***" in between
    # What stands next to the key may be left, such as the quotes of JSON, and up to seven
    # characters of the key where a spelling broke them off.
    assert len(between.replace("***", "")) < 24
    bare = "".join(between.split()).lower()
    assert not any(key[i : i + 8].lower() in bare for i in range(len(key) - 7))


@hypothesis.given(st.text(max_size=60), st.text(max_size=60), st.integers(0, 8), st.integers(0, 5))
@hypothesis.settings(max_examples=200, deadline=None)
def test_masking_leaves_no_run_of_the_key_and_no_other_text(before, behind, start, cut):
    part = KEY[start : len(KEY) - cut]
    masked = Mask(KEY)(f"{before}{part}{behind}")
    runs = [part[i : i + 8] for i in range(len(part) - 7)]
    assert not any(run in masked for run in runs)
    assert Mask(None)(before + part) == before + part


def test_short_keys_are_masked_where_they_stand():
    assert Mask("EMPTY")("key EMPTY is wrong, EMPT") == "key *** is wrong, EMPT"


@pytest.mark.parametrize("value", [f"{KEY}\n", f" {KEY}\r\n", f"\t{KEY}"])
def test_a_key_is_stripped_where_it_is_read(monkeypatch, value):
    monkeypatch.setenv("SOME_KEY", value)
    assert read_key("SOME_KEY", "it") == KEY


@pytest.mark.parametrize(
    "value",
    ["sk-\u00fc-very-secret", "sk-very\nsecret", "sk-very\x7fsecret", "sk-\udcff-secret", " "],
)
def test_what_is_no_key_is_refused_by_the_name_of_its_variable(monkeypatch, value):
    monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(ConfigError, match="SOME_KEY") as found:
        read_key("SOME_KEY", "it")
    assert "secret" not in str(found.value)
    if value.strip():
        with pytest.raises(ConfigError) as found:
            endpoint("http://127.0.0.1:1/v1", api_key=value)
        assert "secret" not in str(found.value)


def test_a_redirect_is_not_followed():
    with serving(then(said({}))) as other:
        moved = (307, {"Location": f"{other.url}/models?key=secret"}, b"")
        with serving(then(moved)) as server, pytest.raises(ServerError, match="307") as found:
            endpoint(server.url, api_key=KEY).post("/completions", {})
        assert other.asked == []
    assert f"{other.url}/models" in str(found.value)
    assert "secret" not in str(found.value)


@pytest.mark.parametrize("name", ["drip", "drip headers"])
def test_the_time_is_for_the_full_answer(name):
    with serving(then(name)) as server:
        start = time.monotonic()
        with pytest.raises(ServerError, match=r"within 0\.3 s"):
            endpoint(server.url, patience_s=0).get("/models")
        assert time.monotonic() - start < 3


def test_an_answer_has_a_largest_size():
    with serving(then("flood")) as server:
        with pytest.raises(ServerError, match="more than 2 MiB"):
            endpoint(server.url, timeout_s=60).post("/x", {}, most_bytes=2**21)
        assert len(server.asked) == 1
        assert server.num_flooded < 2**26  # what was under way


def test_an_error_of_any_size_is_told():
    with (
        serving(then((400, {}, b"too long " * 2**18))) as server,
        pytest.raises(ServerError, match="too long"),
    ):
        endpoint(server.url).get("/models")


def test_a_fault_with_the_same_words_is_not_asked_for_long(monkeypatch):
    monkeypatch.setattr(client, "LAST_PAUSE_S", 0.02)
    with serving(then(said({"detail": "nan is not JSON compliant"}, 500))) as server:
        with pytest.raises(ServerError, match="status 500: nan is not JSON compliant"):
            endpoint(server.url, patience_s=600).post("/completions", {})
        assert len(server.asked) == client.MAX_SAME


@pytest.mark.parametrize("faults", [[said({"n": n}, 500) for n in range(20)], [said({}, 503)] * 20])
def test_other_words_and_a_server_that_is_away_are_waited_for(faults, monkeypatch):
    monkeypatch.setattr(client, "LAST_PAUSE_S", 0.02)
    with serving(then(*faults, said({"x": 1}))) as server:
        assert endpoint(server.url, patience_s=60).post("/completions", {}) == {"x": 1}


@pytest.mark.parametrize("status", [501, 505])
def test_what_never_heals_is_told_at_once(status):
    with serving(then(said({"message": "no such thing"}, status))) as server:
        with pytest.raises(ServerError, match="no such thing"):
            endpoint(server.url, patience_s=600).post("/completions", {})
        assert len(server.asked) == 1


def test_a_server_that_was_never_there_is_not_waited_for_long():
    url = f"http://127.0.0.1:{free_port()}/v1"
    one = Endpoint(
        [url], timeout_s=1, patience_s=600, max_in_flight=1, name="teacher", start_patience_s=0.5
    )
    start = time.monotonic()
    with pytest.raises(ServerError, match=r"no answer for 0\.5 s"):
        one.get("/models")
    assert 0.5 <= time.monotonic() - start < 10


def test_a_host_without_an_address_is_told_soon(monkeypatch):
    def nobody(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    monkeypatch.setattr(client, "NAME_PATIENCE_S", 0.1)
    start = time.monotonic()
    with pytest.raises(ServerError, match="no host of this name"):
        endpoint("http://teacher.invalid:8000/v1", patience_s=600).get("/models")
    assert time.monotonic() - start < 10


def test_a_server_without_tls_is_told_at_once():
    with serving(then(said({}))) as server:
        url = server.url.replace("http://", "https://")
        with pytest.raises(ServerError, match="http://"):
            endpoint(url, timeout_s=5, patience_s=600).get("/models")


@pytest.mark.parametrize(
    "answer",
    [
        (200, {}, b"[" * 200_000),
        (200, {}, b'{"a":' * 100_000),
        (200, {}, b'{"a": ' + b"9" * 5000 + b"}"),
        (200, {"Content_Type": "application/json; charset=utf-16"}, b"\xff\xfe{\x00"),
        (200, {"Content_Encoding": "br"}, b"{}"),
        (200, {"Content_Type": "a\x1b]0;title\x07"}, b"\x1b[2J"),
        (500, {}, b"[" * 200_000),
        (401, {}, b"[" * 200_000),
        (400, {"Content_Type": "text/html; charset=utf-16"}, b"no"),
        (400, {"Content_Type": "text/html; charset=none-such"}, b"no"),
        (400, {}, b'{"error": {"message": {"a": [1]}}}'),
        (400, {}, b"\x1b]0;title\x07\x1b[2J \xed\xa0\x80 \xe2\x80\xae"),
        (429, {"Retry_After": "1e999"}, b""),
        (429, {"Retry_After": "nan"}, b""),
        (429, {"Retry_After": "Mon, 99 Foo 99999"}, b""),
        (302, {"Location": "http://[::bad"}, b""),
    ],
    ids=repr,
)
def test_whatever_comes_is_one_line(answer):
    with serving(then(answer)) as server, pytest.raises(ServerError) as found:
        endpoint(server.url, patience_s=0).get("/models")
    assert str(found.value).isprintable()
    assert len(str(found.value)) < 600


@hypothesis.given(st.binary(max_size=40), st.sampled_from([200, 204, 302, 400, 401, 429, 500, 501]))
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_bytes_are_an_object_or_one_error(raw, status):
    with serving(then((status, {}, raw))) as server:
        one = endpoint(server.url, patience_s=0, timeout_s=5)
        told = ""
        try:
            assert isinstance(one.get("/models"), dict)
        except ServerError as error:
            told = str(error)
        assert told.isprintable()


def test_proxies_are_those_of_the_environment(monkeypatch):
    """A server elsewhere is asked through the proxy, this machine directly."""
    with serving(then(said({"via": "proxy"}))) as proxy:
        address = proxy.url.removesuffix("/v1")
        monkeypatch.setenv("HTTP_PROXY", address)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        elsewhere = "http://teacher.invalid:8000/v1"
        assert endpoint(elsewhere).get("/models") == {"via": "proxy"}
        assert proxy.asked[0][0] == f"{elsewhere}/models"
        with serving(then(said({"via": "none"}))) as server:
            assert endpoint(server.url).get("/models") == {"via": "none"}
        monkeypatch.setenv("HTTP_PROXY", "socks9://me:secret@h:port")
        with pytest.raises(ConfigError, match="HTTP_PROXY") as found:
            endpoint(elsewhere)
        assert "secret" not in str(found.value)
        monkeypatch.setenv("NO_PROXY", "teacher.invalid")
        endpoint(elsewhere)


def test_certificates_that_cannot_be_read(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise ssl.SSLError("no certificate or crl found")

    monkeypatch.setattr(ssl, "create_default_context", broken)
    monkeypatch.setattr(ssl, "SSLContext", broken)
    with pytest.raises(ConfigError, match="SSL_CERT_FILE"):
        endpoint("https://teacher.invalid/v1")


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
        ("http://\u2603.net:1/v1", "is not one"),
        (f"http://{'a' * 70}:1/v1", "is not one"),
        ("http://.../v1", "is not one"),
        ("http://127.0.0.1:1/\t/v1", "control character"),
        ("http://127.0.0.1:1 /v1", "space"),
        ("", "is not one"),
    ],
)
def test_addresses_that_are_refused(url, words):
    with pytest.raises(ConfigError, match=words) as found:
        endpoint(url)
    assert "secret" not in str(found.value)
