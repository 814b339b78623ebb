"""Who wrote a webhook. The second opinion is stripe's own library: it signs here, and judges what we let pass."""

import hashlib
import hmac
import time

import pytest
import stripe
from hypothesis import given
from hypothesis import strategies as st

from proxy.control.billing.signatures import TOLERANCE_SECONDS, check_signature, usable_secret
from proxy.core.errors import InvalidRequest
from tests.control.billing.signing import OLD_SECRET, SECRET, signature

BODY = b'{"id": "evt_1", "object": "event"}'
NOW = 1_790_000_000.0


def code_of(body: bytes, *headers: str, secrets: tuple[str, ...] = (SECRET,), now: float = NOW) -> str | None:
    """The refusal's code; None where the signature is right."""
    try:
        check_signature(body, headers, secrets=secrets, now=now)
    except InvalidRequest as refusal:
        return refusal.code
    return None


def test_what_stripe_signs_is_right() -> None:
    assert code_of(BODY, signature(BODY, at=NOW)) is None
    assert code_of("Grüße, 世界".encode(), signature("Grüße, 世界".encode(), at=NOW)) is None
    assert code_of(b"", signature(b"", at=NOW)) is None


def test_each_of_several_secrets_is_right_and_no_other() -> None:
    both = (SECRET, OLD_SECRET)
    for secret in both:
        assert code_of(BODY, signature(BODY, secret=secret, at=NOW), secrets=both) is None
    assert code_of(BODY, signature(BODY, secret=OLD_SECRET, at=NOW)) == "signature_invalid"


def test_while_stripe_rotates_it_signs_with_both() -> None:
    ours, theirs = signature(BODY, at=NOW), signature(BODY, secret=OLD_SECRET, at=NOW)
    for first, second in ((ours, theirs), (theirs, ours)):
        header = f"{first},{second.partition(',')[2]},v0={'0' * 64}"
        assert code_of(BODY, header) is None
        assert code_of(BODY, header, secrets=(OLD_SECRET,)) is None


@pytest.mark.parametrize("away", [-TOLERANCE_SECONDS, -1, 0, 1, TOLERANCE_SECONDS])
def test_clocks_may_differ_either_way(away: int) -> None:
    assert code_of(BODY, signature(BODY, at=NOW + away)) is None


def test_what_is_too_old_or_yet_to_come_is_refused() -> None:
    past, future = NOW - TOLERANCE_SECONDS - 1, NOW + TOLERANCE_SECONDS + 1
    assert code_of(BODY, signature(BODY, at=past)) == "signature_expired"
    assert code_of(BODY, signature(BODY, at=future)) == "signature_in_future"
    # The library alone would let the second one pass.
    assert stripe.WebhookSignature.verify_header(BODY, signature(BODY, at=time.time() + 86_400), SECRET, 300)


def test_a_time_is_judged_only_of_who_knows_the_secret() -> None:
    forged = signature(BODY, secret="whsec_guessed", at=NOW - 10_000)
    assert code_of(BODY, forged) == "signature_invalid"


V1 = signature(BODY, at=NOW).partition(",")[2]
MALFORMED = [
    "",
    ",",
    "t",
    "nonsense",
    V1,
    f"t={int(NOW)}",
    f"t={int(NOW)},",
    f"t={int(NOW)},v1=",
    f"t={int(NOW)},v1=zz",
    f"t={int(NOW)},v0={V1[3:]}",
    f"t={int(NOW)},v2={V1[3:]}",
    f"t={int(NOW)},{V1.upper()}",
    f"t={int(NOW)},v1={V1[3:].upper()}",
    f"t={int(NOW)},{V1}f",
    f"t=,{V1}",
    f"t=now,{V1}",
    f"t=-1,{V1}",
    f"t=+{int(NOW)},{V1}",
    f"t= {int(NOW)},{V1}",
    f"t={int(NOW)}.0,{V1}",
    f"t=1_790_000_000,{V1}",
    f"t={'9' * 5000},{V1}",
    f"t=١٧٩٠٠٠٠٠٠٠,{V1}",
    f"t={int(NOW)},t={int(NOW)},{V1}",
    f"t={int(NOW)},v1={'é' * 64}",
    ",".join([f"t={int(NOW)}", *[V1] * 17]),
    f"t={int(NOW)};{V1}",
]


@pytest.mark.parametrize("header", MALFORMED, ids=range(len(MALFORMED)))
def test_a_header_that_cant_be_read_is_refused(header: str) -> None:
    assert code_of(BODY, header) == "signature_malformed"


def test_no_header_and_two_headers_are_refused() -> None:
    header = signature(BODY, at=NOW)
    assert code_of(BODY) == "signature_missing"
    assert code_of(BODY, header, header) == "signature_malformed"


@pytest.mark.parametrize("secrets", [(), ("",), ("whsec_",), ("whsec_ ",), (SECRET, ""), ("secret",), ("WHSEC_x",)])
def test_without_a_secret_nothing_is_ever_checked(secrets: tuple[str, ...]) -> None:
    for secret in (*secrets, ""):
        digest = hmac.new(secret.encode(), f"{int(NOW)}.".encode() + BODY, hashlib.sha256).hexdigest()
        with pytest.raises(ValueError, match="without a secret"):
            code_of(BODY, f"t={int(NOW)},v1={digest}", secrets=secrets)
    assert not all(usable_secret(secret) for secret in (*secrets, ""))


@given(
    body=st.binary(max_size=40),
    header=st.text(alphabet="tv01=, abcdef-" + V1[3:9], max_size=120) | st.just(signature(BODY, at=NOW)),
)
def test_whatever_passes_is_right_to_stripe_too(body: bytes, header: str) -> None:
    if code_of(body, header) is None:
        assert stripe.WebhookSignature.verify_header(body, header, SECRET)


@given(body=st.text(max_size=60), secret=st.text(min_size=1, max_size=40).filter(str.strip))
def test_whatever_stripe_signs_passes_and_with_another_secret_doesnt(body: str, secret: str) -> None:
    whole = f"whsec_{secret}".encode(errors="ignore").decode()
    if not usable_secret(whole):
        return
    raw = body.encode(errors="ignore")
    header = signature(raw, secret=whole, at=NOW)
    assert code_of(raw, header, secrets=(whole,)) is None
    assert code_of(raw, header, secrets=(whole + "x",)) == "signature_invalid"
    assert code_of(raw + b" ", header, secrets=(whole,)) == "signature_invalid"
