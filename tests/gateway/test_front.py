"""The door: paths, request ids, CORS, and whatever is raised behind it."""

import json
from collections.abc import MutableMapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.errors import NotFound, OutOfCredits, Refusal
from proxy.gateway.front import Call, Front, Receive, Scope, Send, canonical_path
from proxy.gateway.ids import new_request_id
from proxy.metrics import Metrics


class Exchange:
    """One request through the door, and what came out."""

    def __init__(self, raised: BaseException | None = None, *, after_start: bool = False) -> None:
        self.raised = raised
        self.after_start = after_start
        self.sent: list[MutableMapping[str, Any]] = []

    async def chat(self, _scope: Scope, _receive: Receive, send: Send, call: Call) -> None:
        if self.after_start:
            await send({"type": "http.response.start", "status": 200, "headers": call.headers})
        if self.raised is not None:
            raise self.raised

    async def ask(self, *, origins: tuple[str, ...] = ("*",), status: int = 402, **headers: str) -> None:
        async def send(message: MutableMapping[str, Any]) -> None:
            self.sent.append(message)

        async def receive() -> MutableMapping[str, Any]:
            return {"type": "http.disconnect"}

        async def router(_scope: Scope, _receive: Receive, _send: Send) -> None:
            raise AssertionError("not asked for")

        front = Front(self.chat, router, metrics=Metrics(), cors_origins=origins, exhausted_status=status)
        names = [(name.encode(), value.encode()) for name, value in headers.items()]
        await front({"path": "/v1/chat/completions", "method": "POST", "headers": names}, receive, send)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def error(self) -> Any:
        return json.loads(self.sent[1]["body"])["error"]


async def test_a_refusal_keeps_its_status_headers_and_details() -> None:
    refused = Exchange(NotFound("no", code="c", param="p", headers={"Retry-After": "3"}, details={"more": 1}))
    await refused.ask()
    assert refused.status == 404
    assert refused.headers["retry-after"] == "3"
    assert refused.error == {"message": "no", "type": "invalid_request_error", "param": "p", "code": "c", "more": 1}


async def test_the_status_of_no_credits_can_be_set() -> None:
    refused = Exchange(OutOfCredits("no", code="insufficient_quota"))
    await refused.ask(status=429)
    assert (refused.status, refused.headers["x-should-retry"]) == (429, "false")


async def test_a_mistake_of_ours_tells_nothing() -> None:
    failed = Exchange(RuntimeError("postgresql://user:password@host"))
    await failed.ask()
    assert (failed.status, failed.error["code"]) == (500, "internal_error")
    assert "password" not in str(failed.sent)
    assert failed.headers["x-request-id"]


async def test_an_answer_that_had_begun_is_left_without_an_end() -> None:
    failed = Exchange(RuntimeError("late"), after_start=True)
    await failed.ask()
    assert [message["type"] for message in failed.sent] == ["http.response.start"]


@pytest.mark.parametrize(
    ("origins", "allowed"),
    [(("*",), "*"), (("https://a.example",), "https://a.example"), (("https://b.example",), None), ((), None)],
)
async def test_origins(origins: tuple[str, ...], allowed: str | None) -> None:
    refused = Exchange(Refusal("no", code="c"))
    await refused.ask(origins=origins, origin="https://a.example")
    assert refused.headers.get("access-control-allow-origin") == allowed
    assert ("vary" in refused.headers) == (allowed == "https://a.example")


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/v1/models/openai/gpt-4o", "/v1/models/openai/gpt-4o"),
        ("/models/v1/x", "/v1/models/v1/x"),
        ("/v1/v1/v1/models", "/v1/models"),
        ("/admin/v1/accounts", "/admin/v1/accounts"),
        ("/healthz/", "/healthz"),
        ("", "/"),
        ("/", "/"),
        ("///", "/"),
        ("*", "*"),
    ],
)
def test_paths(path: str, meant: str) -> None:
    assert canonical_path(path) == meant


@given(st.text(alphabet="/v1chatmodels*%", max_size=30))
def test_a_path_is_brought_to_its_form_once(path: str) -> None:
    assert canonical_path(canonical_path(path)) == canonical_path(path)


def test_request_ids_are_uuids_of_version_7_and_in_order() -> None:
    ids = [new_request_id() for _ in range(1_000)]
    assert {one.version for one in ids} == {7}
    assert {one.variant for one in ids} == {"specified in RFC 4122"}
    assert len(set(ids)) == 1_000
    stamps = [one.int >> 80 for one in ids]
    assert stamps == sorted(stamps)
