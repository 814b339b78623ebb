"""The way to the upstream: one request out, one answer in as it arrives.

The seam to the HTTP client: nothing outside this file knows httpx2. Its *transport* is used without its client, since
the client would keep an upstream's cookies and send them with other people's requests, follow redirects and read proxy
settings from the environment.

    UpstreamFault              the upstream's or the network's fault; nothing here is the client's
      UpstreamUnreachable      no connection: the request was not sent
      UpstreamStalled          silent for longer than the upstream's read_seconds
      UpstreamBroken           the connection broke, or what came isn't HTTP
"""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Protocol

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

    async def post(self, upstream: Upstream, path: str, headers: Headers, body: bytes) -> Answer:
        """The answer, once its headers are there. Raises UpstreamFault."""

    async def close(self) -> None:
        """Close every connection."""


class HttpClient:
    """``UpstreamClient`` over httpx2: one connection pool a base URL, so that a new catalog finds its pools again."""

    def __init__(self) -> None:
        # trust_env: certificates come from the platform's store, never from SSL_CERT_* in the environment.
        self._tls = httpx2.create_ssl_context(trust_env=False)
        self._pools: dict[str, httpx2.AsyncHTTPTransport] = {}

    async def post(self, upstream: Upstream, path: str, headers: Headers, body: bytes) -> Answer:
        timeouts = {
            "connect": upstream.connect_seconds,
            "read": upstream.read_seconds,
            "write": WRITE_SECONDS,
            "pool": upstream.connect_seconds,
        }
        request = httpx2.Request(
            "POST",
            f"{upstream.base_url}{path}",
            headers=headers,
            content=body,
            extensions={"timeout": timeouts},
        )
        try:
            response = await self._pool(upstream.base_url).handle_async_request(request)
        except _ERRORS as error:
            raise _fault(error) from error
        return _HttpAnswer(response)

    async def close(self) -> None:
        pools, self._pools = self._pools, {}
        for pool in pools.values():
            await pool.aclose()

    def _pool(self, base_url: str) -> httpx2.AsyncHTTPTransport:
        pool = self._pools.get(base_url)
        if pool is None:
            limits = httpx2.Limits(
                max_connections=None, max_keepalive_connections=IDLE_CONNECTIONS_MAX, keepalive_expiry=IDLE_SECONDS
            )
            pool = self._pools[base_url] = httpx2.AsyncHTTPTransport(verify=self._tls, trust_env=False, limits=limits)
        return pool


class _HttpAnswer:
    def __init__(self, response: httpx2.Response) -> None:
        self.status = response.status_code
        self.headers: Headers = list(response.headers.raw)
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        self._stream = response.stream
        self._chunks = self._read()

    def chunks(self) -> AsyncIterator[bytes]:
        return self._chunks

    async def close(self) -> None:
        await self._chunks.aclose()
        await self._stream.aclose()

    async def _read(self) -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in self._stream:
                yield chunk
        except _ERRORS as error:
            raise _fault(error) from error


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
