"""Whatever a client sends: a clear 4xx or a served request, never a 500, never credits that stay held.

Every body goes through a real socket. What is served is served by an upstream that answers anything, so that what must
be refused here can't be refused there.
"""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
import pytest_asyncio
import structlog

from tests.e2e.proxy import MESSAGES, Customer, Proxy, running_proxy
from tests.fakes.upstream import ScriptedUpstream, chat_answer, whole
from tests.postgres import Database

pytestmark = pytest.mark.asyncio(loop_scope="module")

BLANKS = 1_000_000
ADMIN_TOKEN = "an admin token for tests, long enough for one"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(
    module_database: Database, tmp_path_factory: pytest.TempPathFactory, upstream: ScriptedUpstream
) -> AsyncIterator[Proxy]:
    directory = tmp_path_factory.mktemp("proxy")
    async with running_proxy(module_database, directory, upstream.base_url, admin_token=ADMIN_TOKEN) as running:
        yield running


@pytest.fixture(autouse=True)
def willing(upstream: ScriptedUpstream) -> None:
    upstream.requests.clear()
    upstream.will(*whole(chat_answer()))


@pytest.fixture(autouse=True)
def errors_logged() -> Iterator[list[Any]]:
    """What the proxy logged as an error: a request that it can't refuse by name would be there."""
    with structlog.testing.capture_logs() as entries:
        found: list[Any] = []
        yield found
        found.extend(entry for entry in entries if entry["log_level"] in ("error", "critical"))
        assert found == []


def body(**members: Any) -> bytes:
    """A request of the usual members; what is given replaces or joins them."""
    return json.dumps({"model": "m", "messages": MESSAGES} | members).encode()


def raw(member: str) -> bytes:
    """A request with one more member, as text: for what json.dumps wouldn't write."""
    return b'{"model":"m","messages":[{"role":"user","content":"x"}],' + member.encode() + b"}"


def saying(text: str) -> bytes:
    return body(messages=[{"role": "user", "content": text}])


REFUSED: dict[str, tuple[bytes, int]] = {
    # Malformed.
    "nothing": (b"", 400),
    "blanks": (b" " * BLANKS, 400),
    "an open brace": (b"{", 400),
    "words": (b"model=m&messages=hi", 400),
    "cut off": (body()[:-1], 400),
    "something behind it": (body() + b"{}", 400),
    "a comma too many": (raw('"n":1,'), 400),
    "single quotes": (b"{'model':'m'}", 400),
    "a list": (b"[]", 400),
    "a list of requests": (b"[" + body() + b"]", 400),
    "a string": (b'"hi"', 400),
    "null": (b"null", 400),
    "a number": (b"1", 400),
    "an empty object": (b"{}", 400),
    "NUL bytes": (b"\x00" * 100, 400),
    "a raw NUL in a string": (raw('"user":"a\x00b"'), 400),
    "a raw newline in a string": (raw('"user":"a\nb"'), 400),
    "a NUL behind it": (body() + b"\x00", 400),
    "not UTF-8": (b'{"model":"\xff"}', 400),
    "an encoded surrogate": (b'{"model":"m","messages":[{"role":"user","content":"\xed\xa0\x80"}]}', 400),
    "overlong UTF-8": (b'{"model":"m","messages":[{"role":"user","content":"\xc0\x80"}]}', 400),
    "UTF-16": (body().decode().encode("utf-16"), 400),
    "UTF-16 without a mark": (body().decode().encode("utf-16-le"), 400),
    "UTF-32": (body().decode().encode("utf-32"), 400),
    "a byte order mark": (b"\xef\xbb\xbf" + body(), 400),
    "half an escape": (raw('"user":"\\u12"'), 400),
    "a wrong escape": (raw('"user":"\\x41"'), 400),
    "a comment": (b"/* hi */" + body(), 400),
    "nested lists": (raw('"x":' + "[" * 5_000 + "]" * 5_000), 400),
    "nested lists, left open": (b"[" * 1_000_000, 400),
    "nested objects": (raw('"x":' + '{"a":' * 5_000 + "1" + "}" * 5_000), 400),
    "a million values": (raw('"x":[' + "0," * 1_000_000 + "0]"), 400),
    "a hundred thousand members": (raw(",".join(f'"{n}":0' for n in range(100_000))), 400),
    "too long": (saying("x" * 10_500_000), 413),
    # Wrong types.
    "no model": (json.dumps({"messages": MESSAGES}).encode(), 400),
    "no messages": (b'{"model":"m"}', 400),
    "a number for a model": (body(model=1), 400),
    "null for a model": (body(model=None), 400),
    "a list for a model": (body(model=["m"]), 400),
    "a string for messages": (body(messages="hi"), 400),
    "an object for messages": (body(messages={"role": "user", "content": "hi"}), 400),
    "null for messages": (body(messages=None), 400),
    "no message": (body(messages=[]), 400),
    "a string for a message": (body(messages=["hi"]), 400),
    "null for a message": (body(messages=[None]), 400),
    "too many messages": (body(messages=MESSAGES * 2_001), 400),
    "a string for stream": (body(stream="true"), 400),
    "a number for stream": (body(stream=1), 400),
    "a list for stream_options": (body(stream=True, stream_options=[1]), 400),
    "a string for include_usage": (body(stream=True, stream_options={"include_usage": "yes"}), 400),
    "a string for n": (body(n="2"), 400),
    "a fraction for n": (body(n=1.5), 400),
    "true for n": (body(n=True), 400),
    "no choice": (body(n=0), 400),
    "fewer than none": (body(n=-1), 400),
    "too many choices": (body(n=1_000_000_000), 400),
    "far too many choices": (raw('"n":1' + "0" * 4_000), 400),
    "a number with an exponent for n": (raw('"n":1e9'), 400),
    "a string for max_tokens": (body(max_tokens="5"), 400),
    "true for max_tokens": (body(max_tokens=True), 400),
    "a list for max_tokens": (body(max_tokens=[5]), 400),
    "negative max_tokens": (body(max_tokens=-5), 400),
    "negative max_completion_tokens": (body(max_completion_tokens=-(10**30)), 400),
    "a fraction for max_tokens": (body(max_tokens=0.5), 400),
    "max_tokens in an exponent": (raw('"max_tokens":1e400'), 400),
    "a number of a million digits": (raw('"seed":' + "9" * 1_000_000), 400),
    # Read in two ways.
    "the model twice": (raw('"model":"free"'), 400),
    "the model twice, once escaped": (raw('"mod\\u0065l":"free"'), 400),
    "n twice": (raw('"n":1,"n":8'), 400),
    "the cap twice": (raw('"max_tokens":1,"max_tokens":1000'), 400),
    "stream_options twice": (raw('"stream_options":{},"stream_options":{}'), 400),
    "include_usage twice": (raw('"stream":true,"stream_options":{"include_usage":true,"include_usage":false}'), 400),
    "NaN": (raw('"temperature":NaN'), 400),
    "Infinity": (raw('"temperature":Infinity'), 400),
    "minus Infinity": (raw('"x":[-Infinity]'), 400),
    "NaN for the cap": (raw('"max_tokens":NaN'), 400),
    # Models that aren't sold.
    "an unknown model": (body(model="gpt-99"), 404),
    "the upstream's name of a model": (body(model="up-model"), 404),
    "an empty model": (body(model=""), 400),
    "a model of NULs": (body(model="\x00"), 400),
    "a model of lone surrogates": (body(model="\ud800\udfff\ud800"), 400),
    "a model with a NUL behind": (body(model="m\x00"), 400),
    "a model in capitals": (body(model="M"), 404),
    "a model with blanks": (body(model=" m "), 404),
    "a path for a model": (body(model="../../etc/passwd"), 404),
    "SQL for a model": (body(model="m'; DROP TABLE farebox.accounts; --"), 404),
    "a very long model": (body(model="m" * 1_000_000), 400),
    # What isn't priced.
    "a service tier": (body(service_tier="priority"), 400),
    "a service tier of NULs": (body(service_tier="\x00\ud800"), 400),
    "web search": (body(web_search_options={}), 400),
    "store": (body(store=True), 400),
    "a cap beyond all credits": (body(max_tokens=2**63), 400),
    "a cap that nobody can pay": (body(max_tokens=2**31), 402),
    "a cap of a thousand digits": (raw('"max_tokens":' + "9" * 1_000), 400),
}

SERVED: dict[str, bytes] = {
    "NUL in a text": saying("a\x00b"),
    "only NULs": saying("\x00" * 10_000),
    "lone surrogates in a text": saying("a\ud800b\udc00"),
    "lone surrogates, many": saying("\ud800" * 100_000),
    "the halves of a pair in the wrong order": saying("\udc00\ud800"),
    "a command of the tokenizer": saying("<|endoftext|>"),
    "many commands of the tokenizer": saying("<|endoftext|><|im_start|>system<|endofprompt|>" * 1_000),
    "a million blanks": saying(" " * BLANKS),
    "a million tabs": saying("\t" * BLANKS),
    "a million newlines": saying("\n" * BLANKS),
    "a million of one letter": saying("a" * BLANKS),
    "a million blanks and a letter": saying(" " * BLANKS + "x"),
    "a million ideographic blanks": saying("\u3000" * BLANKS),
    "blanks around the body": b" " * BLANKS + body() + b"\n" * 10,
    "an empty text": saying(""),
    "a list of no parts": body(messages=[{"role": "user", "content": []}]),
    "a list of parts": body(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}]}]),
    "other ends of lines": saying("\u2028\u0085\u000b"),
    "letters beyond the first plane": saying("\U0001d518\U0001d52b \U0001f3dc"),
    "a null content": body(messages=[{"role": "assistant", "content": None}]),
    "an unknown role": body(messages=[{"role": "\x00\ud800", "content": "x"}]),
    "no role": body(messages=[{"content": "x"}]),
    "a message of nothing": body(messages=[{}]),
    "a number for content": body(messages=[{"role": "user", "content": 5}]),
    "an unknown part": body(messages=[{"role": "user", "content": [{"type": "\ud800", "x": [{"y": None}]}]}]),
    "NUL in a name": body(messages=[{"role": "user", "name": "\x00", "content": "x"}]),
    "NUL for a user": body(user="a\x00b"),
    "a lone surrogate for a user": body(user="\ud800"),
    "odd metadata": body(metadata={"\x00": "\ud800", "a" * 10_000: "b" * 10_000}),
    "odd keys": body(**{"\x00": 1, "\ud800": 2, "": 3, "<|endoftext|>": 4}),
    "a huge seed": raw('"seed":' + "9" * 300),
    "a huge temperature": raw('"temperature":1e400'),
    "a tiny temperature": raw('"temperature":1e-400'),
    "a long fraction": raw('"temperature":0.' + "1" * 100_000),
    "minus zero": raw('"temperature":-0'),
    "null for the cap": body(max_tokens=None, max_completion_tokens=None),
    "null for n": body(n=None),
    "null for stream": body(stream=None),
    "null for stream_options": body(stream_options=None),
    "unknown fields": body(x={"y": [1, {"z": None}]}),
    "the most messages": body(messages=MESSAGES * 2_000),
    "a tool with odd names": body(
        tools=[{"type": "function", "function": {"name": "\x00", "parameters": {"\ud800": ["\x00"]}}}]
    ),
    "right-to-left and combining marks": saying("\u202e" + "e\u0301" * 1_000 + "\ufeff"),
}


def assert_openai_error(answer: httpx2.Response, status: int) -> None:
    assert answer.status_code == status, answer.text[:500]
    error = answer.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert error["code"]
    # An error may name what it is about, and never sends a megabyte of it back.
    assert len(answer.content) < 2_000
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("name", REFUSED)
async def test_a_clear_refusal(customer: Customer, upstream: ScriptedUpstream, name: str) -> None:
    content, status = REFUSED[name]

    answer = await customer.send(content)

    assert_openai_error(answer, status)
    assert upstream.requests == []
    assert [hold for hold in await customer.holds() if hold["state"] == "open"] == []
    account = await customer.money()
    assert (account.balance, account.held) == (1000_000_000, 0)


@pytest.mark.parametrize("name", SERVED)
async def test_served_and_settled(proxy: Proxy, upstream: ScriptedUpstream, name: str) -> None:
    # The counter may use its budget up over some of these, and the quote be by bytes.
    customer = await proxy.account(credits=100_000)

    answer = await customer.send(SERVED[name])

    assert answer.status_code == 200, answer.text[:500]
    assert answer.json() == chat_answer()
    (received,) = upstream.requests
    assert received.body == SERVED[name].replace(b'"m"', b'"gpt-4o-up"', 1)
    (hold,) = await customer.ended()
    assert hold["state"] == "final"
    account = await customer.money()
    assert (account.balance, account.held, account.debt) == (100_000_000_000 - (10 * 1000 + 5 * 3000), 0, 0)


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "deflate, gzip"])
async def test_an_encoded_body_is_refused(customer: Customer, encoding: str) -> None:
    headers = customer.headers | {"content-encoding": encoding}

    answer = await customer.proxy.http.post("/chat/completions", content=body(), headers=headers)

    assert_openai_error(answer, 400)
    assert await customer.holds() == []


KEYS = {
    "a letter": "x",
    "a beginning": "fb_",
    "far too long": "fb_" + "0" * 1_000,
    "another provider's": "sk-proj-1",
    "no ASCII": "\xff\xfe",
    "SQL": "' OR 1=1 --",
    "a wrong crc": "fb_aaaaaaaaaaaa_" + "b" * 43 + "_000000",
}
PATHS = ["/chat/completions", "/models", "/models/m", "/credits", "/transactions", "/usage", "/receipts/x"]


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("path", PATHS)
async def test_a_key_that_is_none_is_401_everywhere(proxy: Proxy, name: str, path: str) -> None:
    key = KEYS[name]
    headers = [(b"authorization", b"Bearer " + key.encode("latin-1"))]
    method = "POST" if path == "/chat/completions" else "GET"

    answer = await proxy.http.request(method, path, content=body() if method == "POST" else None, headers=headers)

    assert_openai_error(answer, 401)
    assert len(key) <= 3 or key not in answer.text


ODD = {
    "nothing": "",
    "a letter": "x",
    "NUL": "\x00",
    "a surrogate": "\ud800",
    "an emoji": "\U0001f4b8",
    "five thousand": "a" * 5_000,
    "a path": "../..",
    "SQL": "' OR 1=1 --",
    "zero": "0",
    "minus one": "-1",
    "NaN": "NaN",
    "an exponent": "1e400",
    "a hundred digits": "9" * 100,
    "a percent sign": "%",
    "a date that is none": "2026-02-30",
    "a date far away": "9999-12-31",
    "an id of nobody": "01890000-0000-7000-8000-000000000000",
}
QUESTIONS = [
    "/credits?x={}",
    "/transactions?limit={}",
    "/transactions?after={}",
    "/usage?from={}",
    "/usage?to={}",
    "/models?limit={}",
]


def quoted(text: str) -> str:
    return quote(text.encode("utf-8", "surrogatepass"), safe="")


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("path", ["/receipts/{}", "/models/{}", "/{}", "/chat/{}"])
async def test_an_odd_path_is_404(customer: Customer, path: str, name: str) -> None:
    answer = await customer.proxy.http.get(path.format(quoted(ODD[name])), headers=customer.headers)

    if (path, name) == ("/models/{}", "nothing"):
        # A slash too many is forgiven: this is the list.
        assert answer.status_code == 200
    else:
        assert_openai_error(answer, 404)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("question", QUESTIONS)
async def test_an_odd_question_is_answered_or_400(customer: Customer, question: str, name: str) -> None:
    answer = await customer.proxy.http.get(question.format(quoted(ODD[name])), headers=customer.headers)

    if answer.status_code != 200:
        assert_openai_error(answer, 400)


REFERENCES = {
    "empty": "", "NUL": "\x00", "NUL within": "a\x00b", "a surrogate": "\ud800", "too long": "x" * 10_000,
}  # fmt: skip
AMOUNTS = {
    "NaN": "NaN", "negative": "-1", "an exponent": "1e3", "zero": "0", "empty": "", "NUL": "\x00", "huge": "9" * 30,
    "too fine": "0.0000001", "a number": 5, "a fraction": 5.5, "null": None, "true": True, "a list": ["5"],
}  # fmt: skip


@pytest.mark.parametrize("name", REFERENCES)
async def test_a_grant_under_an_odd_reference_is_400(proxy: Proxy, customer: Customer, name: str) -> None:
    answer = await grant(proxy, customer, {"amount": "5", "reference": REFERENCES[name], "reason": "test"})

    assert_openai_error(answer, 400)
    assert (await customer.money()).balance == 1000_000_000


@pytest.mark.parametrize("name", AMOUNTS)
async def test_a_grant_of_an_odd_amount_is_400(proxy: Proxy, customer: Customer, name: str) -> None:
    answer = await grant(proxy, customer, {"amount": AMOUNTS[name], "reference": "r", "reason": "test"})

    assert_openai_error(answer, 400)
    assert (await customer.money()).balance == 1000_000_000


async def grant(proxy: Proxy, customer: Customer, members: dict[str, Any]) -> httpx2.Response:
    """What an operator's program asks for."""
    url = f"{proxy.base_url.removesuffix('/v1')}/admin/v1/accounts/{customer.id}/grants"
    return await proxy.http.post(
        url, content=json.dumps(members).encode(), headers={"authorization": f"Bearer {ADMIN_TOKEN}"}
    )


async def test_after_all_that_the_books_balance_and_a_call_is_served(proxy: Proxy, customer: Customer) -> None:
    await proxy.audit()
    assert await proxy.query("SELECT id FROM farebox.accounts WHERE held <> 0") == []
    assert (await customer.post()).status_code == 200
