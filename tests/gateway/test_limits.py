"""gateway/limits.py: profiles, headers, and bodies that are too large, too slow, encoded, or never come."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from typing import Any

import pytest

from proxy.core.errors import InvalidRequest, Refusal, TooLarge
from proxy.gateway.limits import CHAT, DEFAULT, ClientLeft, Limits, check_headers, read_body

SMALL = replace(DEFAULT, body_bytes_max=100, receive_seconds=5.0)


class Client:
    """A fake ``receive``: gives its chunks, then waits for ever, and counts what was taken."""

    def __init__(self, chunks: Iterable[bytes], *, pause_seconds: float = 0.0, leaves: bool = False) -> None:
        self.taken = 0
        self._messages = self._tell(list(chunks), pause_seconds, leaves)

    async def __call__(self) -> dict[str, Any]:
        return await anext(self._messages)

    async def _tell(self, chunks: list[bytes], pause_seconds: float, leaves: bool) -> AsyncIterator[dict[str, Any]]:
        for number, chunk in enumerate(chunks, 1):
            await asyncio.sleep(pause_seconds)
            self.taken += len(chunk)
            yield {"type": "http.request", "body": chunk, "more_body": leaves or number < len(chunks)}
        if leaves:
            yield {"type": "http.disconnect"}
        await asyncio.Event().wait()


async def refusal_of(client: Client, headers: list[tuple[bytes, bytes]], limits: Any = SMALL) -> Refusal:
    with pytest.raises(Refusal) as refused:
        await read_body(client, headers, limits)
    return refused.value


@pytest.mark.parametrize("chunks", [[b""], [b"x"], [b"x" * 100], [b"x"] * 100, [b"", b"x" * 50, b"", b"x" * 50, b""]])
async def test_a_body_within_the_limit_arrives_whole(chunks: list[bytes]) -> None:
    assert await read_body(Client(chunks), [], SMALL) == b"".join(chunks)


async def test_a_declared_length_within_the_limit_is_fine() -> None:
    headers = [(b"content-length", b"100"), (b"content-encoding", b"Identity")]

    assert await read_body(Client([b"x" * 100]), headers, SMALL) == b"x" * 100


@pytest.mark.timeout(4)
@pytest.mark.parametrize("chunks", [[b"x" * 101], [b"x"] * 101, [b"x" * 100, b"x"], [b"x" * 101, b""]])
async def test_a_body_that_says_no_length_is_413_once_it_is_too_long(chunks: list[bytes]) -> None:
    refused = await refusal_of(Client(chunks), [])

    assert isinstance(refused, TooLarge)
    assert "100 bytes" in refused.message
    assert "FAREBOX_BODY_BYTES_MAX" in refused.message
    assert refused.headers["connection"] == "close"


async def test_a_declared_length_that_is_too_long_is_read_past_and_refused() -> None:
    """The answer would be lost in a reset if the socket were closed over unread bytes."""
    client = Client([b"x" * 1000] * 3)

    refused = await refusal_of(client, [(b"content-length", b"3000")])

    assert refused.status == 413
    assert client.taken == 3000


async def test_what_is_read_past_a_limit_is_bounded() -> None:
    client = Client([b"x" * 1024 * 1024] * 1000)

    assert (await refusal_of(client, [(b"content-length", b"1048576000")])).status == 413
    assert client.taken <= 33 * 1024 * 1024


async def test_a_client_that_asks_first_is_told_before_it_sends() -> None:
    client = Client([b"x" * 1000])

    refused = await refusal_of(client, [(b"content-length", b"1000"), (b"expect", b"100-Continue")])

    assert refused.status == 413
    assert client.taken == 0


@pytest.mark.parametrize("length", [b"", b"-1", b"1e3", b"0x10", b"1, 1", b"9" * 100_000, b"\xb2"])
async def test_a_length_that_is_no_number_is_400(length: bytes) -> None:
    refused = await refusal_of(Client([b"x"]), [(b"content-length", length)])

    assert (refused.status, refused.code) == (400, "content_length_invalid")


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate", b"br", b"zstd", b"identity, gzip", b"GZIP"])
async def test_an_encoded_body_is_400_and_not_inflated(encoding: bytes) -> None:
    client = Client([b"x"])

    refused = await refusal_of(client, [(b"Content-Encoding", encoding)])

    assert (refused.status, refused.code) == (400, "content_encoding_unsupported")
    assert client.taken == 0


async def test_a_body_that_trickles_is_cut_off_in_time() -> None:
    client = Client([b"x"] * 1000, pause_seconds=0.01)

    refused = await refusal_of(client, [], replace(SMALL, receive_seconds=0.1, body_bytes_max=10_000))

    assert isinstance(refused, InvalidRequest)
    assert refused.code == "request_too_slow"
    assert "0.1 seconds" in refused.message
    assert "FAREBOX_RECEIVE_SECONDS" in refused.message
    assert refused.headers["connection"] == "close"
    assert client.taken < 1000


async def test_a_body_that_never_comes_is_cut_off_in_time() -> None:
    silent = Client([b"x"], pause_seconds=3600)

    assert (await refusal_of(silent, [], replace(SMALL, receive_seconds=0.05))).code == "request_too_slow"


@pytest.mark.parametrize("chunks", [[], [b"x"], [b"x" * 1000]])
@pytest.mark.parametrize("headers", [[], [(b"content-length", b"5000")]])
async def test_a_client_that_leaves_is_no_refusal(chunks: list[bytes], headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(ClientLeft):
        await read_body(Client(chunks, leaves=True), headers, SMALL)


def test_headers_up_to_the_limit_pass_and_above_it_are_400() -> None:
    limits = replace(DEFAULT, header_bytes_max=100)
    check_headers([(b"name", b"v" * 92)], limits)

    with pytest.raises(InvalidRequest) as refused:
        check_headers([(b"name", b"v" * 93)], limits)
    assert refused.value.code == "headers_too_large"
    assert "FAREBOX_HEADER_BYTES_MAX" in refused.value.message
    with pytest.raises(InvalidRequest):
        check_headers([(b"", b"")] * 26, limits)


# Profiles.


def test_the_profiles_are_the_documented_ones() -> None:
    assert (DEFAULT.body_bytes_max, DEFAULT.messages_max) == (10_485_760, 2_000)
    assert (CHAT.body_bytes_max, CHAT.messages_max) == (32_768, 100)
    for profile in (DEFAULT, CHAT):
        assert (profile.json_depth_max, profile.header_bytes_max, profile.receive_seconds) == (64, 32_768, 30.0)


def test_a_key_takes_its_own_profile_or_the_servers() -> None:
    assert Limits().named(None) is DEFAULT
    assert Limits().named("chat") is CHAT
    assert Limits(default="chat").named(None) is CHAT
    assert Limits(default="chat").named("default") is DEFAULT
    assert Limits(default="chat").named("from another release") is CHAT
    with pytest.raises(ValueError, match="no limits profile 'caht'"):
        Limits(default="caht")


def test_settings_move_the_default_profile_and_never_widen_chat() -> None:
    wide = Limits.of(replace(DEFAULT, body_bytes_max=1 << 30, messages_max=50, json_depth_max=10), profile="chat")

    assert wide.named("default").body_bytes_max == 1 << 30
    assert wide.named(None).name == "chat"
    assert wide.named("chat") == replace(CHAT, messages_max=50, json_depth_max=10)


def test_a_refusal_names_where_the_limit_is_set() -> None:
    assert DEFAULT.setting("messages_max") == "limit messages_max, set by FAREBOX_MESSAGES_MAX"
    assert "profile 'chat'" in CHAT.setting("messages_max")
