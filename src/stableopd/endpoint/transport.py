"""One request and its answer, within a time and a size that hold for all of it.

A time-out of a library counts from one byte to the next, and an answer may be of any size. So the
network is read here through streams that know when the request must end, and reading stops at a
largest size. Compressed answers are not asked for and not read: their size is not known.

Redirects are not followed, as the key would go with them. Proxies are those of the environment
(HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY); this machine is always asked directly.
"""

from __future__ import annotations

import ipaddress
import json
import math
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import httpcore2
import httpx2

from stableopd.types import ConfigError

__all__ = ["Reply", "TooLargeError", "Wire"]

# No connection within this is none at all, however long an answer may take (design).
CONNECT_S = 10.0
# Of an answer that is an error, bytes that are read (design): its words are cut off long before.
ERROR_BYTES = 2**14


class TooLargeError(Exception):
    """An answer is larger than any honest one."""


@dataclass(frozen=True)
class Reply:
    """What a server answered.

    Attributes:
        status: The status code.
        headers: Its headers.
        raw: Its bytes; the first ones where it is an error.
    """

    status: int
    headers: httpx2.Headers
    raw: bytes


class _Clock(threading.local):
    """When the request of this thread must end."""

    ends = math.inf

    def seconds_left(self, timeout: float | None) -> float:
        left = self.ends - time.monotonic()
        if left <= 0:
            raise httpcore2.ReadTimeout
        return left if timeout is None else min(left, timeout)


class _Stream(httpcore2.NetworkStream):
    """A connection whose every read and write ends with the request."""

    def __init__(self, inner: httpcore2.NetworkStream, clock: _Clock) -> None:
        self._inner, self._clock = inner, clock

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, self._clock.seconds_left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, self._clock.seconds_left(timeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        left = self._clock.seconds_left(timeout)
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, left), self._clock)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _Network(httpcore2.NetworkBackend):
    """Opens connections that end with their request."""

    def __init__(self, clock: _Clock) -> None:
        self._inner, self._clock = httpcore2.SyncBackend(), clock

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        left = self._clock.seconds_left(timeout)
        stream = self._inner.connect_tcp(host, port, left, local_address, socket_options)
        return _Stream(stream, self._clock)

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)


class _Body(httpx2.SyncByteStream):
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __iter__(self) -> Iterator[bytes]:
        yield from self._inner

    def close(self) -> None:
        self._inner.close()


class _Transport(httpx2.BaseTransport):
    """Sends requests through pools of such connections, one for each server."""

    def __init__(self, urls: Iterable[str], clock: _Clock, max_idle: int) -> None:
        self._clock, self._max_idle = clock, max_idle
        self._pools = {_origin(httpx2.URL(url)): self._pool(httpx2.URL(url)) for url in urls}

    def _pool(self, url: httpx2.URL) -> httpcore2.ConnectionPool:
        options: dict[str, Any] = {
            "max_connections": None,
            "max_keepalive_connections": self._max_idle,
            "keepalive_expiry": 5.0,
            "network_backend": _Network(self._clock),
        }
        if url.scheme == "https":
            options["ssl_context"] = _certificates()
        proxy = _proxy_of(url)
        if proxy is None:
            return httpcore2.ConnectionPool(**options)
        return httpcore2.HTTPProxy(_address(proxy.url), proxy_auth=proxy.raw_auth, **options)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        reply = self._pools[_origin(request.url)].handle_request(
            httpcore2.Request(
                method=request.method,
                url=_address(request.url),
                headers=request.headers.raw,
                content=request.stream,
                extensions=request.extensions,
            )
        )
        return httpx2.Response(
            reply.status,
            headers=reply.headers,
            stream=_Body(reply.stream),
            extensions=reply.extensions,
        )

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


class Wire:
    """Makes requests to a few servers; threads may share it.

    Args:
        urls: Addresses of the servers.
        key: Goes into the header of each request; None sends none.
        timeout_s: Seconds for an answer, from the first byte that is sent to the last that comes.
        max_idle: Connections that are kept for the next request.

    Raises:
        ConfigError: The environment names a proxy or certificates that cannot be used.
    """

    def __init__(
        self, urls: Iterable[str], key: str | None, timeout_s: float, max_idle: int
    ) -> None:
        self._clock, self._timeout_s = _Clock(), timeout_s
        connect = min(CONNECT_S, timeout_s)
        self._client = httpx2.Client(
            timeout=httpx2.Timeout(timeout_s, connect=connect, pool=None),
            headers={"Accept-Encoding": "identity"}
            | ({"Authorization": f"Bearer {key}"} if key else {}),
            transport=_Transport(urls, self._clock, max_idle),
            follow_redirects=False,
            trust_env=False,
        )

    def close(self) -> None:
        """Close the connections that are kept."""
        self._client.close()

    def ask(self, method: str, address: str, body: dict[str, Any] | None, most_bytes: int) -> Reply:
        """Make one request.

        Args:
            method: GET or POST.
            address: At one of the servers.
            body: Sent as JSON.
            most_bytes: The largest answer that is read.

        Returns:
            The answer.

        Raises:
            TooLargeError: The answer is larger.
            httpcore2.TimeoutException: It did not come in time; other exceptions of httpcore2 say
                that there is no connection, or that it does not speak HTTP.
        """
        self._clock.ends = time.monotonic() + self._timeout_s
        content = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        with self._client.stream(method, address, content=content, headers=headers) as reply:
            is_error = reply.status_code >= 300
            most = min(ERROR_BYTES, most_bytes) if is_error else most_bytes
            parts, size = list[bytes](), 0
            for part in reply.iter_raw():
                size += len(part)
                parts.append(part)
                if size > most:
                    if not is_error:
                        raise TooLargeError
                    break
        return Reply(reply.status_code, reply.headers, b"".join(parts))


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _address(url: httpx2.URL) -> httpcore2.URL:
    return httpcore2.URL(
        scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
    )


def _proxy_of(url: httpx2.URL) -> httpx2.Proxy | None:
    """The proxy that the environment names for an address."""
    proxies = urllib.request.getproxies_environment()
    address = proxies.get(url.scheme) or proxies.get("all")
    port = "" if url.port is None else f":{url.port}"
    if not address or _is_here(url.host):
        return None
    if urllib.request.proxy_bypass(f"{url.host}{port}"):
        return None
    address = address if "://" in address else f"http://{address}"
    try:
        proxy = httpx2.Proxy(address)
        if proxy.url.scheme in ("http", "https") and proxy.url.host:
            return proxy
    except (httpx2.InvalidURL, ValueError):
        pass
    name = f"{url.scheme.upper()}_PROXY or ALL_PROXY"
    raise ConfigError(
        f"the environment variable {name} does not hold the address of a proxy that can be used; "
        f"write it as http://host:port, or set NO_PROXY={url.host}."
    )


def _is_here(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def _certificates() -> Any:
    try:
        return httpx2.create_ssl_context()
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            "the certificates that SSL_CERT_FILE or SSL_CERT_DIR names cannot be read "
            f"({type(error).__name__}); correct the variable or leave it out."
        ) from None
