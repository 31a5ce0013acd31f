"""A client of OpenAI-style servers that outlives their faults, for teachers and rollouts alike.

A training of days must not end because a server was started again. So whatever may pass (no
connection, a time-out, 429, 5xx, half an answer) is asked again, with growing pauses, until nothing
at all has come back for `patience_s`. What cannot pass (another 4xx) is told at once.

The key is in the header of the requests and nowhere else: no message, log or `repr` holds it.
"""

from __future__ import annotations

import email.utils
import itertools
import json
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

from stableopd.config_servers import url_fault
from stableopd.types import ConfigError, ServerError

__all__ = ["Endpoint", "root_of"]

# Seconds before a replica is asked again: the first pause, which doubles up to the last (design).
FIRST_PAUSE_S, LAST_PAUSE_S = 0.25, 20.0
# No connection within this is none at all, however long an answer may take (design).
CONNECT_S = 10.0
# Seconds between two warnings about one server.
TELL_EVERY_S = 60.0
# Of a server's own message, characters.
MAX_TOLD = 300

log = logging.getLogger("stableopd")


class _PassingError(Exception):
    """A fault that may be over when the server is asked again; `after_s` is its own wish."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


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
        timeout_s: Seconds to wait for one answer.
        patience_s: Seconds without any answer after which it gives up.
        max_in_flight: Requests under way at once, over all replicas.
        name: What the server is to the user, such as "teacher", for messages.

    Raises:
        ConfigError: An address is none, or holds credentials.
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
    ) -> None:
        for url in urls or ("",):
            if fault := url_fault(url):
                raise ConfigError(f"{name}: {fault}")
        self.urls = tuple(url.rstrip("/") for url in urls)
        self.name = name
        self.timeout_s, self.patience_s = timeout_s, patience_s
        self.max_in_flight = max_in_flight
        self._key = api_key
        self._replicas = [_Replica(url) for url in self.urls]
        self._lock = threading.Lock()
        self._last_answer = 0.0
        self._told_at = -math.inf
        self._client = httpx2.Client(
            timeout=httpx2.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s), pool=None),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=max_in_flight),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        )
        # Connections that are kept for the next request are closed when nobody has this any more.
        weakref.finalize(self, self._client.close)

    def __repr__(self) -> str:
        return f"Endpoint({self.name!r}, {list(self.urls)!r})"

    def post(self, path: str, body: dict[str, Any], url: str | None = None) -> dict[str, Any]:
        """Ask once, and again while that may help.

        Args:
            path: Such as "/completions".
            body: Sent as JSON.
            url: A replica, or another address to ask, and no other one; None takes the replica
                that has least to do.

        Returns:
            The answer, a JSON object.

        Raises:
            ServerError: The server refused the request, or nothing came for `patience_s`.
        """
        return self._ask("POST", path, body, url)

    def get(self, path: str, url: str | None = None) -> dict[str, Any]:
        """Ask for something, as `post` does.

        Args:
            path: Such as "/models".
            url: As for `post`.

        Returns:
            The answer, a JSON object; an empty one where the server sends an empty answer.

        Raises:
            ServerError: As for `post`.
        """
        return self._ask("GET", path, None, url)

    def post_all(
        self,
        path: str,
        bodies: Sequence[dict[str, Any]],
        read: Callable[[int, dict[str, Any]], Any] | None = None,
    ) -> list[Any]:
        """Ask many things, at most `max_in_flight` of them at a time, spread over the replicas.

        Args:
            path: Such as "/completions".
            bodies: What to ask.
            read: Takes the place of a body and its answer as soon as it is there, in any thread,
                and gives what is to be kept of it; large answers are then not held together.

        Returns:
            The answers, or what was kept of them, in the order of the bodies.

        Raises:
            ServerError: The first error of its kind; what is still waiting is given up.
        """
        gives_up = threading.Event()

        def one(place: int, body: dict[str, Any]) -> Any:
            answer = self._ask("POST", path, body, None, gives_up)
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
        gives_up: threading.Event | None = None,
    ) -> dict[str, Any]:
        begin, gives_up = time.monotonic(), gives_up or threading.Event()
        own = None if url is None else _Replica(url.rstrip("/"))
        for attempt in itertools.count():
            replica = self._take(own)
            try:
                answer = self._once(method, replica.url + path, body)
            except _PassingError as fault:
                self._give_back(replica, fault)
                wakes = self._wakes(attempt, own)
                where = self._shown(replica.url + path)
                if gives_up.wait(max(0.0, self._seconds_left(begin, where, fault, wakes))):
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

    def _seconds_left(self, begin: float, where: str, fault: _PassingError, wakes: float) -> float:
        """Seconds until `wakes` or the end of patience; says now and then that it waits."""
        with self._lock:
            now = time.monotonic()
            ends = max(begin, self._last_answer) + self.patience_s
            tells = now - self._told_at > TELL_EVERY_S
            self._told_at = now if tells else self._told_at
        if now >= ends:
            raise ServerError(
                f"{self.name}: {where} has given no answer for {self.patience_s:g} s ({fault}); "
                "start the server again or correct its address."
            ) from None
        if tells:
            log.warning(
                "%s: %s gave no answer (%s); asking again for up to %g s.",
                self.name, where, fault, self.patience_s,
            )  # fmt: skip
        return min(wakes, ends) - now

    def _once(self, method: str, address: str, body: dict[str, Any] | None) -> dict[str, Any]:
        where = self._shown(address)
        try:
            reply = self._client.request(method, address, json=body)
        except httpx2.TimeoutException:
            raise _PassingError(f"no answer within {self.timeout_s:g} s") from None
        except httpx2.TransportError as error:
            raise _PassingError(self._safe(str(error) or type(error).__name__)) from None
        except httpx2.HTTPError as error:
            reason = self._safe(str(error) or type(error).__name__)
            raise _PassingError(f"an answer that cannot be read ({reason})") from None
        status = reply.status_code
        if status in (408, 429) or status >= 500:
            raise _PassingError(f"status {status}", _retry_after(reply)) from None
        if status >= 300:
            told = self._safe(_message(reply))
            raise ServerError(
                f"{self.name}: {where} refused the request with status {status}: {told}"
            )
        try:
            answer = json.loads(reply.content or b"{}")
        except ValueError:
            raise _PassingError("an answer that is not JSON") from None
        if not isinstance(answer, dict):
            raise _PassingError("an answer that is no JSON object")
        return answer

    def _shown(self, address: str) -> str:
        """An address as a message may show it: without credentials or anything behind the path."""
        parts = urlsplit(address)
        return self._safe(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")

    def _safe(self, text: str) -> str:
        """A text on one line, not too long, and without the key, which some servers repeat."""
        text = " ".join(text.split())
        if self._key:
            text = text.replace(self._key, "***")
        return text if len(text) <= MAX_TOLD else f"{text[:MAX_TOLD]}..."


def _message(reply: httpx2.Response) -> str:
    """What a server says about an error, in the forms that are in use."""
    try:
        body: Any = json.loads(reply.content)
    except ValueError:
        return reply.text or reply.reason_phrase
    for key in ("error", "message", "detail"):
        if isinstance(body, dict) and key in body:
            body = body[key]
    return body if isinstance(body, str) else json.dumps(body)


def _retry_after(reply: httpx2.Response) -> float:
    """Seconds that a server asks to wait, given as a number or as a date; 0 where it does not."""
    text = reply.headers.get("retry-after", "")
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0
