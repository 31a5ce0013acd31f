"""A client of OpenAI-style servers that outlives their faults, for teachers and rollouts alike.

A training of days must not end because a server was started again. So whatever may pass (no
connection, a time-out, 429, 5xx, half an answer) is asked again, with growing pauses, until nothing
at all has come back for `patience_s`. What cannot pass is told at once (another 4xx, a redirect, an
answer too large to be one) or soon (the same 500 with the same words again and again; and, as long
as no server has answered yet, no server at the address).

The key is in the header of the requests and nowhere else: no message, log or `repr` holds it.
"""

from __future__ import annotations

import email.utils
import itertools
import json
import logging
import math
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore2
import httpx2

from stableopd.config_servers import url_fault
from stableopd.endpoint.answers import BASE_BYTES, AnswerError, parsed
from stableopd.endpoint.keys import Mask, key_text_fault
from stableopd.endpoint.transport import Reply, TooLargeError, Wire
from stableopd.text import shown
from stableopd.types import ConfigError, ServerError

__all__ = ["Endpoint", "RefusedError", "root_of"]

# Seconds before a replica is asked again: the first pause, which doubles up to the last (design).
FIRST_PAUSE_S, LAST_PAUSE_S = 0.25, 20.0
# Until a server has answered once, seconds without a connection and without its name (design): a
# server that starts with the training is waited for, a wrong address is told soon.
START_PATIENCE_S, NAME_PATIENCE_S = 60.0, 5.0
# The same fault with the same words in the same request is no accident at this count (design): with
# the pauses, 16 s of it.
MAX_SAME = 7
# Status codes that are no accident at all: not implemented, another version of HTTP.
NEVER_HEALS = (501, 505)
# Status codes of what stands in front of a server that is not there at the moment.
AWAY = (502, 503, 504)
# Seconds between two warnings about one server.
TELL_EVERY_S = 60.0
# Of a server's own message, characters.
MAX_TOLD = 300
# Of it, characters in which the key is looked for.
ERROR_CHARS = 2**14

log = logging.getLogger("stableopd")


class _PassingError(Exception):
    """A fault that may be over when the server is asked again.

    Attributes:
        after_s: Seconds to wait, as the server wishes.
        start_s: Patience with it while no server has answered yet.
        is_own: Whether the server itself says that it failed, so that asking again may not help.
    """

    def __init__(
        self, reason: str, after_s: float = 0.0, start_s: float = math.inf, is_own: bool = False
    ) -> None:
        super().__init__(reason)
        self.after_s, self.start_s, self.is_own = after_s, start_s, is_own


class RefusedError(ServerError):
    """The server will not answer this request, however often it is asked."""


@dataclass
class _Replica:
    url: str
    num_in_flight: int = 0
    num_faults: int = 0  # since its last answer
    rests_until: float = 0.0


def root_of(url: str) -> str:
    """The address of a server, of which "/v1" is the OpenAI-style part.

    Args:
        url: Such as "http://host:8000/v1".

    Returns:
        Such as "http://host:8000", where vLLM has /health, /tokenize and more.
    """
    return url.rstrip("/").removesuffix("/v1")


class Endpoint:
    """One or more replicas of one OpenAI-style server. Threads may share it.

    Args:
        urls: Addresses up to and with "/v1"; all serve the same model.
        api_key: Goes into the header of each request; None sends none.
        timeout_s: Seconds for one answer, to its last byte.
        patience_s: Seconds without any answer after which it gives up.
        max_in_flight: Requests under way at once, over all replicas.
        name: What the server is to the user, such as "teacher", for messages.
        start_patience_s: The same without a connection as long as no server has answered yet.

    Raises:
        ConfigError: An address is none, or holds credentials; the key is none; a proxy or
            certificates that the environment names cannot be used.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        api_key: str | None = None,
        timeout_s: float,
        patience_s: float,
        max_in_flight: int,
        name: str,
        start_patience_s: float = START_PATIENCE_S,
    ) -> None:
        for url in urls or ("",):
            if fault := url_fault(url) or _unreadable(url):
                raise ConfigError(f"{name}: {fault}")
        if api_key and (fault := key_text_fault(api_key)):
            raise ConfigError(f"{name}: the key {fault}.")
        self.urls = tuple(url.rstrip("/") for url in urls)
        self.name = name
        self.timeout_s, self.patience_s = timeout_s, patience_s
        self.max_in_flight = max_in_flight
        self.start_patience_s = start_patience_s
        self._mask, self._has_key = Mask(api_key), bool(api_key)
        self._replicas = [_Replica(url) for url in self.urls]
        self._lock = threading.Lock()
        self._last_answer = 0.0  # before the first one
        self._told_at = -math.inf
        self._wire = Wire(self.urls, api_key, timeout_s, max_in_flight)
        # Connections that are kept for the next request are closed when nobody has this any more.
        weakref.finalize(self, self._wire.close)

    def __repr__(self) -> str:
        return f"Endpoint({self.name!r}, {list(self.urls)!r})"

    def told(self, value: object, most: int = MAX_TOLD) -> str:
        """Words of a server as a message may show them.

        Args:
            value: What the server said, or a part of it.
            most: Longest text in characters.

        Returns:
            One line, without the key in any spelling, and without control characters.
        """
        try:
            text = value if isinstance(value, str) else repr(value)
        except (RecursionError, ValueError):  # too deep, or a number of too many digits
            text = "what cannot be shown"
        return shown(self._mask(" ".join(text[:ERROR_CHARS].split())), most)

    def post(
        self,
        path: str,
        body: dict[str, Any],
        url: str | None = None,
        *,
        most_bytes: int = BASE_BYTES,
        is_patient: bool = True,
    ) -> dict[str, Any]:
        """Ask once, and again while that may help.

        Args:
            path: Such as "/completions".
            body: Sent as JSON.
            url: A replica, or its root, to ask no other one; None takes the replica that has
                least to do.
            most_bytes: The largest answer that is read.
            is_patient: Whether to ask again where that may help.

        Returns:
            The answer, a JSON object.

        Raises:
            ServerError: The server refused the request, or nothing came for `patience_s`.
        """
        return self._ask("POST", path, body, url, most_bytes, is_patient=is_patient)

    def get(self, path: str, url: str | None = None, *, is_patient: bool = True) -> dict[str, Any]:
        """Ask for something, as `post` does.

        Args:
            path: Such as "/models".
            url: As for `post`.
            is_patient: As for `post`.

        Returns:
            The answer, a JSON object; an empty one where the server sends an empty answer.

        Raises:
            ServerError: As for `post`.
        """
        return self._ask("GET", path, None, url, BASE_BYTES, is_patient=is_patient)

    def post_all(
        self,
        path: str,
        bodies: Sequence[dict[str, Any]],
        read: Callable[[int, dict[str, Any]], Any] | None = None,
        *,
        most_bytes: int | Sequence[int] = BASE_BYTES,
    ) -> list[Any]:
        """Ask many things, at most `max_in_flight` of them at a time, spread over the replicas.

        Args:
            path: Such as "/completions".
            bodies: What to ask.
            read: Takes the place of a body and its answer as soon as it is there, in any thread,
                and gives what is to be kept of it; large answers are then not held together.
            most_bytes: The largest answer that is read; one for all, or one for each body.

        Returns:
            The answers, or what was kept of them, in the order of the bodies.

        Raises:
            ServerError: The first error of its kind; what is still waiting is given up.
        """
        gives_up = threading.Event()
        sizes = [most_bytes] * len(bodies) if isinstance(most_bytes, int) else most_bytes

        def one(place: int, body: dict[str, Any]) -> Any:
            answer = self._ask("POST", path, body, None, sizes[place], gives_up)
            return answer if read is None else read(place, answer)

        workers = ThreadPoolExecutor(
            max(1, min(self.max_in_flight, len(bodies))), f"stableopd-{self.name}"
        )
        try:
            tasks = [workers.submit(one, place, body) for place, body in enumerate(bodies)]
            done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
            error = next((task.exception() for task in done if task.exception()), None)
            if error is not None:
                raise error
            return [task.result() for task in tasks]
        finally:
            gives_up.set()  # nobody reads the other answers any more
            workers.shutdown(cancel_futures=True)

    def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        url: str | None,
        most_bytes: int,
        gives_up: threading.Event | None = None,
        *,
        is_patient: bool = True,
    ) -> dict[str, Any]:
        begin, gives_up = time.monotonic(), gives_up or threading.Event()
        own = None if url is None else _Replica(url.rstrip("/"))
        same: tuple[str, int] = "", 0
        for attempt in itertools.count():
            replica = self._take(own)
            try:
                answer = self._once(method, replica.url + path, body, most_bytes)
            except _PassingError as fault:
                self._give_back(replica, fault)
                where = self._shown(replica.url + path)
                same = str(fault), same[1] + 1 if str(fault) == same[0] else 1
                if fault.is_own and same[1] >= MAX_SAME * (1 if own else len(self._replicas)):
                    raise ServerError(
                        f"{self.name}: {where} failed {same[1]} times in the same way ({fault}); "
                        "see the server's log."
                    ) from None
                wakes = self._wakes(attempt, own)
                patience = self.patience_s if is_patient else 0.0
                left = self._seconds_left(begin, where, fault, wakes, patience)
                if gives_up.wait(max(0.0, left)):
                    raise ServerError(f"{self.name}: {where} was given up ({fault}).") from None
            except BaseException:
                self._give_back(replica, None)
                raise
            else:
                self._give_back(replica, None)
                return answer
        raise AssertionError  # the loop has no end

    def _take(self, own: _Replica | None) -> _Replica:
        """The replica with least to do among those that are not known to be down."""
        with self._lock:
            now = time.monotonic()
            ready = [r for r in self._replicas if r.rests_until <= now]
            chosen = own or min(
                ready or self._replicas,
                key=(lambda r: r.num_in_flight) if ready else (lambda r: r.rests_until),
            )
            chosen.num_in_flight += 1
            return chosen

    def _give_back(self, replica: _Replica, fault: _PassingError | None) -> None:
        with self._lock:
            replica.num_in_flight -= 1
            if fault is None:
                self._last_answer = time.monotonic()
                replica.num_faults, replica.rests_until = 0, 0.0
                return
            pause = min(FIRST_PAUSE_S * 2**replica.num_faults, LAST_PAUSE_S)
            replica.num_faults = min(replica.num_faults + 1, 16)
            replica.rests_until = time.monotonic() + max(pause, fault.after_s)

    def _wakes(self, attempt: int, own: _Replica | None) -> float:
        """When a request is to be sent again: a replica has rested, and so has the request.

        The second is for a request that alone fails, while others keep the replicas from resting;
        each replica is tried once without it.
        """
        replicas = [own] if own else self._replicas
        doublings = min(attempt + 1 - len(replicas), 16)
        pause = min(FIRST_PAUSE_S * 2**doublings, LAST_PAUSE_S) if doublings >= 0 else 0.0
        with self._lock:
            rested = min(replica.rests_until for replica in replicas)
        return max(rested, time.monotonic() + pause)

    def _seconds_left(
        self, begin: float, where: str, fault: _PassingError, wakes: float, patience: float
    ) -> float:
        """Seconds until `wakes` or the end of patience; says now and then that it waits."""
        with self._lock:
            now = time.monotonic()
            if not self._last_answer:
                patience = min(patience, fault.start_s)
            ends = max(begin, self._last_answer) + patience
            tells = now - self._told_at > TELL_EVERY_S and now < ends
            self._told_at = now if tells else self._told_at
        if now >= ends:
            raise ServerError(
                f"{self.name}: {where} has given no answer for {patience:g} s ({fault}); "
                "start the server again or correct its address."
            ) from None
        if tells:
            log.warning(
                "%s: %s gave no answer (%s); asking again for up to %g s.",
                self.name, where, fault, patience,
            )  # fmt: skip
        return min(wakes, ends) - now

    def _once(
        self, method: str, address: str, body: dict[str, Any] | None, most_bytes: int
    ) -> dict[str, Any]:
        where = self._shown(address)
        try:
            reply = self._wire.ask(method, address, body, most_bytes)
        except TooLargeError:
            raise ServerError(
                f"{self.name}: {where} answered with more than {most_bytes / 2**20:.3g} MiB, which "
                "is more than any answer to this request can have."
            ) from None
        except httpcore2.TimeoutException as error:
            is_connect = isinstance(error, httpcore2.ConnectTimeout)
            what = "no connection" if is_connect else f"no full answer within {self.timeout_s:g} s"
            raise _PassingError(what, start_s=self._start_s(is_connect)) from None
        except httpcore2.NetworkError as error:
            raise self._unconnected(where, error) from None
        except (httpcore2.ProtocolError, httpcore2.ProxyError, httpx2.HTTPError) as error:
            raise _PassingError(self._reason(error)) from None
        self._require_answer(where, reply)
        encoding = reply.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise _PassingError(f"an answer in the encoding {self.told(encoding)!r}")
        try:
            return parsed(reply.raw)
        except AnswerError as error:
            raise _PassingError(f"an answer that {error}") from None

    def _require_answer(self, where: str, reply: Reply) -> None:
        """Raise what a status code means that is no success."""
        status = reply.status
        if status < 300:
            return
        told = f"status {status}"
        if status in (401, 403):
            # What a server says about a key may hold a part of it.
            what = "another key" if self._has_key else "a key"
            raise ServerError(
                f"{self.name}: {where} refused the request with {told}: it wants {what}; see the "
                "environment variable that api_key_env names, or name one."
            )
        if 300 <= status < 400:
            target = self._shown(reply.headers.get("location", ""), where)
            raise ServerError(
                f"{self.name}: {where} sends requests on with {told} to {target}, where a key does "
                "not go; write the address that is to be asked."
            )
        said = self.told(_message(reply))
        if status in (408, 429) or (status >= 500 and status not in NEVER_HEALS):
            is_own = status >= 500 and status not in AWAY
            reason = f"{told}: {said}" if said else told
            raise _PassingError(reason, _retry_after(reply), is_own=is_own)
        raise RefusedError(f"{self.name}: {where} refused the request with {told}: {said}")

    def _unconnected(self, where: str, error: BaseException) -> Exception:
        """What the fault of a connection means: whether to ask again, and for how long."""
        causes = [error]
        while (inner := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(inner)
        reason = self._reason(error)
        if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
            return ServerError(
                f"{self.name}: {where} shows a certificate that is not trusted ({reason}); name "
                "the one that signed it in SSL_CERT_FILE, or correct the address."
            )
        speaks_otherwise = any(
            isinstance(c, ssl.SSLError) and c.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST")
            for c in causes
        )
        if speaks_otherwise:
            return ServerError(
                f"{self.name}: {where} does not speak TLS ({reason}); write http:// instead of "
                "https://, or correct the port."
            )
        if any(isinstance(cause, socket.gaierror) for cause in causes):
            return _PassingError(f"no host of this name ({reason})", start_s=NAME_PATIENCE_S)
        is_connect = isinstance(error, httpcore2.ConnectError)
        return _PassingError(reason, start_s=self._start_s(is_connect))

    def _start_s(self, is_connect: bool) -> float:
        return self.start_patience_s if is_connect else math.inf

    def _reason(self, error: BaseException) -> str:
        """An exception's text; not that of a header, which may be ours and hold the key."""
        text = self.told(str(error) or type(error).__name__)
        if isinstance(error, httpcore2.LocalProtocolError) or "header" in text.lower():
            return "a header that is not allowed"
        return text

    def _shown(self, address: str, base: str = "") -> str:
        """An address as a message may show it: without credentials or anything behind the path."""
        try:
            parts = urlsplit(urljoin(base, address))
        except ValueError:
            return "an address that is none"
        return self.told(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")


def _unreadable(url: str) -> str:
    """What makes an address unusable that only the client knows: names that no host can have."""
    try:
        httpx2.URL(url)
    except httpx2.InvalidURL:
        return f"the address {url!r} is not one; write it as http://host:8000/v1."
    return ""


def _message(reply: Reply) -> str:
    """What a server says about an error, in the forms that are in use."""
    text = reply.raw.decode("utf-8", "replace")
    try:
        body: Any = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for key in ("error", "message", "detail"):
        if isinstance(body, dict) and key in body:
            body = body[key]
    return body if isinstance(body, str) else text


def _retry_after(reply: Reply) -> float:
    """Seconds that a server asks to wait, given as a number or as a date; 0 where it does not."""
    text = reply.headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError, OSError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
