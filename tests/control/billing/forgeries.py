"""Forged webhooks, by kinds: each takes the true body of an event that would bring credits, and the time, and gives
what somebody without the endpoint's secret might send instead, with the refusal that it must meet.

All are deterministic, so that the same cases run in every run.
"""

import base64
import gzip
import hashlib
import hmac
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.control.billing.signing import SECRET

__all__ = ["FORGERIES", "Forgery", "header"]


@dataclass(frozen=True, slots=True)
class Forgery:
    """What is sent, and the status and code that it must be answered with."""

    name: str
    code: str
    body: bytes
    headers: tuple[tuple[str, str], ...]
    status: int = 400


Kind = Callable[[bytes, int], Iterator[Forgery]]


def header(body: bytes, at: int, *, secret: str | bytes = SECRET, scheme: str = "v1", digest: str = "sha256") -> str:
    """A Stripe-Signature as its documentation says to make one; or not quite."""
    key = secret.encode() if isinstance(secret, str) else secret
    return f"t={at},{scheme}={hmac.new(key, f'{at}.'.encode() + body, digest).hexdigest()}"


def _signed(name: str, code: str, body: bytes, value: str, status: int = 400) -> Forgery:
    return Forgery(name, code, body, (("stripe-signature", value),), status)


def unsigned(body: bytes, at: int) -> Iterator[Forgery]:
    right = header(body, at)
    bare = base64.b64encode(bytes.fromhex(right.partition("v1=")[2])).decode()
    others: list[tuple[tuple[str, str], ...]] = [
        (),
        (("authorization", f"Bearer {SECRET}"),),
        (("x-stripe-signature", right),),
        (("stripe-signature-v1", right),),
        (("signature", right),),
        (("webhook-id", "evt_1"), ("webhook-timestamp", str(at)), ("webhook-signature", f"v1,{bare}")),
        (("cookie", f"stripe-signature={right}"),),
        (("user-agent", "Stripe/1.0 (+https://stripe.com/docs/webhooks)"), ("x-forwarded-for", "3.18.12.63")),
    ]
    for number, headers in enumerate(others):
        yield Forgery(f"no signature {number}", "signature_missing", body, headers)


def malformed_header(body: bytes, at: int) -> Iterator[Forgery]:
    right = header(body, at)
    v1 = right.partition(",")[2]
    values = [
        "", ",", "=", "t", "nonsense", v1, v1[3:], f"t={at}", f"t={at},", f"t={at},v1", f"t={at},v1=", f"t={at},,{v1}",
        f"t=,{v1}", f"t=now,{v1}", f"t=-{at},{v1}", f"t=+{at},{v1}", f"t={at}.0,{v1}", f"t=0x{at:x},{v1}",
        f"t={at:_},{v1}", f"t={'9' * 4000},{v1}", f"t=1e9,{v1}", f"t={at};{v1}", f"t={at}&{v1}", f"T={at},{v1}",
        f"t={at},t={at},{v1}", f"t={at - 9000},t={at},{v1}", f"{right}0", f"t={at},v1={v1[3:].upper()}",
        f"t={at},v1=0x{v1[5:]}", f"t={at},{','.join([v1] * 17)}", right * 60, f"{{'t': {at}, 'v1': '{v1[3:]}'}}",
    ]  # fmt: skip
    for number, value in enumerate(values):
        yield _signed(f"malformed {number}", "signature_malformed", body, value)
    twice = (("stripe-signature", right), ("stripe-signature", right))
    yield Forgery("two headers", "signature_malformed", body, twice)
    yield Forgery(
        "a false one before the right one", "signature_malformed", body, (("stripe-signature", "x"), twice[0])
    )


def wrong_scheme(body: bytes, at: int) -> Iterator[Forgery]:
    for scheme in ("v0", "v2", "v10", "V1", "v", "1", "sha256", "v1 ", " v1", "v1[]", "hmac"):
        yield _signed(f"scheme {scheme}", "signature_malformed", body, header(body, at, scheme=scheme))
    for digest in ("md5", "sha1", "sha224", "sha384", "sha512"):
        yield _signed(f"v1 by {digest}", "signature_malformed", body, header(body, at, digest=digest))


def wrong_algorithm(body: bytes, at: int) -> Iterator[Forgery]:
    key = SECRET.encode()

    def mac(text: bytes, digest: str = "sha256", secret: bytes = key) -> str:
        return hmac.new(secret, text, digest).hexdigest()[:64]

    made = {
        "the body alone": mac(body),
        "no dot": mac(str(at).encode() + body),
        "the body first": mac(body + b"." + str(at).encode()),
        "the time alone": mac(str(at).encode()),
        "nothing": mac(b""),
        "half of sha512": mac(f"{at}.".encode() + body, "sha512"),
        "sha3": mac(f"{at}.".encode() + body, "sha3_256"),
        "blake2": mac(f"{at}.".encode() + body, "blake2s"),
        "no hmac": hashlib.sha256(f"{at}.".encode() + body).hexdigest(),
        "the key in front": hashlib.sha256(key + f"{at}.".encode() + body).hexdigest(),
        "in milliseconds": mac(f"{at * 1000}.".encode() + body),
        "zeros": "0" * 64,
        "f's": "f" * 64,
    }
    for name, value in made.items():
        yield _signed(name, "signature_invalid", body, f"t={at},v1={value}")
    several = ",".join(f"v1={value}" for value in made.values())
    yield _signed("all of them", "signature_invalid", body, f"t={at},{several}")


def other_secret(body: bytes, at: int) -> Iterator[Forgery]:
    secrets: list[str | bytes] = [
        "whsec_test", "whsec_secret", "whsec_1234567890", "whsec_of_the_fake", "whsec_wh_secret", "secret", "changeme",
        "sk_test_ofthefake", "sk_live_ofthefake", SECRET.upper(), SECRET.lower(), SECRET[:-1], SECRET + "=", SECRET[6:],
        f" {SECRET}", f"{SECRET}\n", f'"{SECRET}"', SECRET[::-1], f"whsec_{SECRET}", SECRET * 2, f"{SECRET},{SECRET}",
        hashlib.sha256(SECRET.encode()).digest(), hashlib.sha256(SECRET.encode()).hexdigest(),
        base64.b64decode(SECRET[6:] + "==", validate=False), base64.b64encode(SECRET.encode()),
    ]  # fmt: skip
    for number, secret in enumerate(secrets):
        yield _signed(f"another secret {number}", "signature_invalid", body, header(body, at, secret=secret))


def empty_secret(body: bytes, at: int) -> Iterator[Forgery]:
    for secret in ("", " ", "\n", "\0", "whsec_", "whsec_ ", "None", "null", "undefined", "''", "0", "false"):
        yield _signed(f"secret {secret!r}", "signature_invalid", body, header(body, at, secret=secret))


def old(body: bytes, at: int) -> Iterator[Forgery]:
    for seconds in (320, 600, 3600, 86_400, 3 * 86_400, 30 * 86_400, 365 * 86_400, at - 1, at):
        yield _signed(f"{seconds} s old", "signature_expired", body, header(body, at - seconds))


def future(body: bytes, at: int) -> Iterator[Forgery]:
    for seconds in (320, 600, 3600, 86_400, 365 * 86_400, 10**10, 9 * 10**11):
        yield _signed(f"in {seconds} s", "signature_in_future", body, header(body, at + seconds))


def tampered_body(body: bytes, at: int) -> Iterator[Forgery]:
    right, chance, event = header(body, at), random.Random(4), json.loads(body)
    made: list[bytes] = []
    for _ in range(12):
        position = chance.randrange(len(body))
        made.append(body[:position] + bytes([body[position] ^ (1 << chance.randrange(7))]) + body[position + 1 :])
    about = event["data"]["object"]
    about |= {"amount_total": 1, "amount_subtotal": 1, "currency": "jpy", "client_reference_id": "another"}
    made += [
        body + b" ", body + b"\n", b" " + body, b"\xef\xbb\xbf" + body, body[:-1], body + body, b"", b"{}",
        body.replace(b"\n", b"\r\n"), body.replace(b"evt_", b"evt_x"), body.replace(b"false", b"true"),
        json.dumps(json.loads(body)).encode(), json.dumps(event, indent=2).encode(), body.decode().encode("utf-16"),
        json.dumps(json.loads(body), indent=2, sort_keys=True).encode() + b" ",
    ]  # fmt: skip
    for number, forged in enumerate(made):
        yield _signed(f"tampered body {number}", "signature_invalid", forged, right)


def tampered_time(body: bytes, at: int) -> Iterator[Forgery]:
    v1 = header(body, at).partition(",")[2]
    for by in (-290, -60, -2, -1, 1, 2, 60, 290):
        yield _signed(f"{by} s moved", "signature_invalid", body, f"t={at + by},{v1}")
    yield _signed("a leading zero", "signature_invalid", body, f"t=0{at},{v1}")
    old_v1 = header(body, at - 4000).partition(",")[2]
    yield _signed("an old one, made new", "signature_invalid", body, f"t={at},{old_v1}")


def tampered_signature(body: bytes, at: int) -> Iterator[Forgery]:
    digits = header(body, at).partition("v1=")[2]
    for position in range(0, 64, 5):
        other = "0" if digits[position] != "0" else "1"
        value = digits[:position] + other + digits[position + 1 :]
        yield _signed(f"digit {position}", "signature_invalid", body, f"t={at},v1={value}")
    for name, value in (("reversed", digits[::-1]), ("rotated", digits[1:] + digits[:1])):
        yield _signed(name, "signature_invalid", body, f"t={at},v1={value}")


def another_body_s_signature(body: bytes, at: int) -> Iterator[Forgery]:
    for number in range(8):
        event: dict[str, Any] = json.loads(body) | {"id": f"evt_other{number}"}
        forged = json.dumps(event, indent=2).encode()
        yield _signed(f"for another event {number}", "signature_invalid", forged, header(body, at))


def the_other_mode(body: bytes, at: int) -> Iterator[Forgery]:
    """Truly signed: by who took one mode's secret for the other's endpoint."""
    event: dict[str, Any] = json.loads(body)
    for number, event_type in enumerate(
        ("checkout.session.completed", "checkout.session.async_payment_succeeded", "checkout.session.expired")
    ):
        other = event | {"id": f"evt_mode{number}", "type": event_type, "livemode": not event["livemode"]}
        forged = json.dumps(other).encode()
        yield _signed(f"{event_type} of the other mode", "livemode_mismatch", forged, header(forged, at))


def no_event(body: bytes, at: int) -> Iterator[Forgery]:
    """Truly signed, and nothing that Stripe would send."""
    event: dict[str, Any] = json.loads(body)
    about: dict[str, Any] = event["data"]["object"]

    def named(object_id: Any, kind: Any = "checkout.session") -> dict[str, Any]:
        return {"data": {"object": about | {"id": object_id, "object": kind}}}

    changes: list[dict[str, Any]] = [
        {"object": "charge"}, {"object": None}, {"object": ["event"]}, {"id": None}, {"id": 5}, {"id": ""},
        {"id": "evt_/../x"}, {"id": "evt_\0"}, {"id": "evt_" + "x" * 300}, {"type": None}, {"type": ["x"]},
        {"type": "checkout.session.completed\n"}, {"livemode": None}, {"livemode": 0}, {"livemode": "false"},
        {"created": None}, {"created": True}, {"created": -1}, {"created": 10**18}, {"created": "now"},
        {"account": {"id": "acct_1"}}, {"data": None}, {"data": []}, {"data": {"object": None}},
        named(None), named(""), named("../payment_intents/pi_1"), named("cs_1?expand[]=x"), named(["cs_1"]),
        named(about["id"], "payment_intent"), named(about["id"], None), {"type": "refund.created"},
        {"type": "payment_intent.succeeded"}, {"type": "charge.dispute.closed"},
    ]  # fmt: skip
    for number, change in enumerate(changes):
        forged = json.dumps(event | change).encode()
        yield _signed(f"no event {number}", "event_malformed", forged, header(forged, at))
    for number, raw in enumerate((b"", b"null", b"[]", b'"evt_1"', b"{", b"[" * 50_000, b"\xff", body[:-2])):
        yield _signed(f"no object {number}", "event_malformed", raw, header(raw, at))


def thin(body: bytes, at: int) -> Iterator[Forgery]:
    about = json.loads(body)["data"]["object"]
    for number, event_type in enumerate(("v1.checkout.session.completed", "v2.core.event_destination.ping")):
        event = {
            "id": f"evt_thin{number}",
            "object": "v2.core.event",
            "type": event_type,
            "livemode": False,
            "created": "2026-11-22T12:00:00.000Z",
            "related_object": {"id": about["id"], "type": "checkout.session", "url": "/v1/checkout/sessions/x"},
        }
        forged = json.dumps(event).encode()
        yield _signed(f"thin {number}", "thin_event", forged, header(forged, at))


def unreadable(body: bytes, at: int) -> Iterator[Forgery]:
    for size in (512 * 1024 + 1, 3 * 1024 * 1024):
        large = body + b" " * (size - len(body))
        yield _signed(f"{size} bytes", "body_too_large", large, header(large, at), 413)
    packed = gzip.compress(body)
    for encoding, raw in (("gzip", packed), ("deflate", body), ("br", body)):
        for signed in (raw, body):
            headers = (("stripe-signature", header(signed, at)), ("content-encoding", encoding))
            yield Forgery(f"encoded as {encoding}", "content_encoding_unsupported", raw, headers)


FORGERIES: dict[str, Kind] = {
    kind.__name__: kind
    for kind in (
        unsigned, malformed_header, wrong_scheme, wrong_algorithm, other_secret, empty_secret, old, future,
        tampered_body, tampered_time, tampered_signature, another_body_s_signature, the_other_mode, no_event, thin,
        unreadable,
    )
}  # fmt: skip
"""Kind -> its cases."""
