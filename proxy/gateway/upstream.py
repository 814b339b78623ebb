"""The way to the upstream: one request out, one answer in as it arrives.

The seam to the HTTP client: nothing outside this file knows httpx2 or, below it, httpcore2. Its *transport* is used
without its client, since the client would keep an upstream's cookies and send them with other people's requests, follow
redirects and read proxy settings from the environment.

    UpstreamFault              the upstream's or the network's fault; nothing here is the client's
      UpstreamUnreachable      no connection: the request was not sent
      UpstreamStalled          silent for longer than the upstream's read_seconds
      UpstreamBroken           the connection broke, or what came isn't HTTP
"""

import socket
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import httpcore2
import httpx2

from proxy.core.catalog import Upstream
from proxy.gateway.headers import Headers

__all__ = [
    "Answer",
    "HttpClient",
    "UpstreamBroken",
    "UpstreamClient",
    "UpstreamFault",
    "UpstreamStalled",
    "UpstreamUnreachable",
]

WRITE_SECONDS = 60.0
# Below what load balancers and providers keep open (60 s and more), so that a reused connection is seldom a closed one.
IDLE_SECONDS = 25.0
IDLE_CONNECTIONS_MAX = 1_000
# While a client doesn't read, its upstream isn't read either, and the kernel would take megabytes of each in advance.
RECEIVE_BUFFER_BYTES = 64 * 1024
_SOCKET_OPTIONS = [(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)]


class UpstreamFault(Exception):
    """The upstream failed; the message is for the log."""


class UpstreamUnreachable(UpstreamFault):
    """No connection could be made, so nothing was sent."""


class UpstreamStalled(UpstreamFault):
    """Nothing came for longer than the upstream's ``read_seconds``."""


class UpstreamBroken(UpstreamFault):
    """The connection ended before the answer did, or what came isn't HTTP."""


class Answer(Protocol):
    """An answer whose headers have come. ``chunks`` is read once; ``close`` may be called at any time, twice too."""

    status: int
    headers: Headers

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises UpstreamStalled, UpstreamBroken."""

    async def close(self) -> None:
        """Give the connection back where the body was read to its end, else close it."""


class UpstreamClient(Protocol):
    """What sends requests to upstreams."""

    async def post(
        self, upstream: Upstream, path: str, headers: Headers, body: bytes, sent: Callable[[], None] | None = None
    ) -> Answer:
        """The answer, once its headers are there; ``sent`` is called when the request has gone out whole.

        Raises UpstreamFault.
        """

    async def close(self) -> None:
        """Close every connection."""


class HttpClient:
    """``UpstreamClient`` over httpx2, with idle connections kept here.

    Each transport is used as one connection: httpcore2's own pool looks at all its connections on every request, which
    at 64 streams already takes half of this process's time.
    """

    def __init__(self) -> None:
        # trust_env: certificates come from the platform's store, never from SSL_CERT_* in the environment.
        self._tls = httpx2.create_ssl_context(trust_env=False)
        self._idle: dict[str, deque[_Connection]] = {}
        self._urls: dict[str, httpx2.URL] = {}
        self._closed = False

    async def post(
        self, upstream: Upstream, path: str, headers: Headers, body: bytes, sent: Callable[[], None] | None = None
    ) -> Answer:
        try:
            url = self._url(upstream.base_url + path)
        except httpx2.InvalidURL as error:
            raise _fault(error) from error
        connection = self._take(upstream.base_url) or _Connection(self._new_transport(url), upstream.base_url)
        request = httpx2.Request(
            "POST",
            url,
            headers=[(b"host", url.netloc), *headers, (b"content-length", str(len(body)).encode())],
            stream=_Body(body, sent),
            extensions={"timeout": _timeouts(upstream)},
        )
        try:
            response = await connection.transport.handle_async_request(request)
        except _ERRORS as error:
            await connection.transport.aclose()
            raise _fault(error) from error
        except BaseException:
            await connection.transport.aclose()
            raise
        return _HttpAnswer(response, connection, self._give_back)

    async def close(self) -> None:
        self._closed = True
        for connections in self._idle.values():
            for connection in connections:
                await connection.transport.aclose()
        self._idle.clear()

    def _take(self, base_url: str) -> "_Connection | None":
        """The connection that was used last: the others may grow old."""
        connections = self._idle.get(base_url)
        return connections.pop() if connections else None

    async def _give_back(self, connection: "_Connection", *, usable: bool) -> None:
        if not usable or self._closed:
            await connection.transport.aclose()
            return
        connections = self._idle.setdefault(connection.base_url, deque())
        now = connection.idle_since = time.monotonic()
        connections.append(connection)
        if len(connections) > IDLE_CONNECTIONS_MAX or now - connections[0].idle_since > IDLE_SECONDS:
            await connections.popleft().transport.aclose()

    def _url(self, text: str) -> httpx2.URL:
        # Parsing one costs as much as reserving and settling a call. There are as many as upstreams have had.
        url = self._urls.get(text)
        if url is None:
            url = self._urls[text] = httpx2.URL(text)
        return url

    def _new_transport(self, url: httpx2.URL) -> httpx2.AsyncHTTPTransport:
        limits = httpx2.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=IDLE_SECONDS)
        transport = httpx2.AsyncHTTPTransport(
            verify=self._tls, trust_env=False, limits=limits, socket_options=_SOCKET_OPTIONS
        )
        if url.scheme == "https":
            transport._pool = httpcore2.AsyncConnectionPool(
                ssl_context=self._tls,
                max_connections=1,
                max_keepalive_connections=1,
                keepalive_expiry=IDLE_SECONDS,
                network_backend=_TlsBackend(),
                socket_options=_SOCKET_OPTIONS,
            )
        return transport


class _TlsBackend(httpcore2.AnyIOBackend):
    """httpcore2's own, but for a connection whose TLS handshake is cancelled: that one stayed open, held by nobody,
    until the garbage collector came by."""

    async def connect_tcp(self, *values: Any, **options: Any) -> httpcore2.AsyncNetworkStream:
        return _BeforeTls(await super().connect_tcp(*values, **options))


class _BeforeTls(httpcore2.AsyncNetworkStream):
    """A connection of which only its TLS will be used."""

    def __init__(self, stream: httpcore2.AsyncNetworkStream) -> None:
        self._stream = stream

    async def start_tls(self, *values: Any, **options: Any) -> httpcore2.AsyncNetworkStream:
        try:
            return await self._stream.start_tls(*values, **options)
        except BaseException:
            await self._stream.aclose()
            raise

    async def aclose(self) -> None:
        await self._stream.aclose()


@dataclass(slots=True)
class _Connection:
    transport: httpx2.AsyncHTTPTransport
    base_url: str
    idle_since: float = 0.0


class _Body(httpx2.AsyncByteStream):
    """A request's body that tells when it is out: the connection asks for more once it has written what there was."""

    def __init__(self, body: bytes, sent: Callable[[], None] | None) -> None:
        self._body = body
        self._sent = sent

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        yield self._body
        if self._sent is not None:
            self._sent()


class _GiveBack(Protocol):
    async def __call__(self, connection: _Connection, *, usable: bool) -> None: ...


class _HttpAnswer:
    def __init__(self, response: httpx2.Response, connection: _Connection, give_back: _GiveBack) -> None:
        self.status = response.status_code
        self.headers: Headers = list(response.headers.raw)
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        self._stream = response.stream
        self._connection: _Connection | None = connection
        self._give_back = give_back
        self._chunks = self._read()
        self._complete = False

    def chunks(self) -> AsyncIterator[bytes]:
        return self._chunks

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            await self._chunks.aclose()
            await self._stream.aclose()
        finally:
            await self._give_back(connection, usable=self._complete)

    async def _read(self) -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in self._stream:
                yield chunk
        except _ERRORS as error:
            raise _fault(error) from error
        self._complete = True


def _timeouts(upstream: Upstream) -> dict[str, float]:
    return {
        "connect": upstream.connect_seconds,
        "read": upstream.read_seconds,
        "write": WRITE_SECONDS,
        "pool": upstream.connect_seconds,
    }


_ERRORS = (httpx2.TransportError, httpx2.InvalidURL, OSError)

_FAULTS: Mapping[type[Exception], type[UpstreamFault]] = {
    httpx2.ConnectError: UpstreamUnreachable,
    httpx2.ConnectTimeout: UpstreamUnreachable,
    httpx2.PoolTimeout: UpstreamUnreachable,
    httpx2.InvalidURL: UpstreamUnreachable,
    httpx2.UnsupportedProtocol: UpstreamUnreachable,
    httpx2.ReadTimeout: UpstreamStalled,
    httpx2.WriteTimeout: UpstreamStalled,
}


def _fault(error: Exception) -> UpstreamFault:
    kind = _FAULTS.get(type(error), UpstreamBroken)
    return kind(f"{type(error).__name__}: {error}")
