"""localstripe, which others wrote, is told the same by the same client: it answers as the fake does, in the fields that
Farebox reads. A process of its own; PaymentIntents, refunds and webhook signatures are what it has of ours."""

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx2
import pytest
import stripe

from tests.fakes.stripe import FakeStripe
from tests.local.processes import eventually

SECRET = "whsec_of_the_second_opinion"
# Its own command listens to the whole network, and keeps what it has in a file that every run shares.
SERVER = """
import logging, socket, sys
from aiohttp import web
from localstripe import resources
resources.Store.dump_to_disk = lambda self: None
from localstripe.server import app
listening = socket.socket()
listening.bind(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
web.run_app(app, sock=listening, print=None)
"""


@dataclass
class Hook:
    """Where webhooks arrive."""

    url: str
    got: list[tuple[bytes, str]]


@pytest.fixture(scope="module")
def localstripe() -> Iterator[str]:
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", SERVER], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        assert eventually(lambda: answers(port), seconds=30)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@pytest.fixture
def hook() -> Iterator[Hook]:
    got: list[tuple[bytes, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            got.append((body, self.headers["stripe-signature"]))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield Hook(f"http://127.0.0.1:{server.server_port}/hook", got)
        server.shutdown()
        thread.join()


def client_of(url: str) -> stripe.StripeClient:
    return stripe.StripeClient("sk_test_ofthefake", base_addresses={"api": url}, max_network_retries=0)


def plain(metadata: Any) -> dict[str, str]:
    return {} if metadata is None else dict(metadata.to_dict())


def refusal(error: stripe.StripeError) -> tuple[str, int | None, str | None]:
    return type(error).__name__, error.http_status, error.code


def charge_of(intent: stripe.PaymentIntent) -> str:
    """localstripe gives the charge whether it is asked for or not."""
    charge = intent.latest_charge
    return charge.id if isinstance(charge, stripe.Charge) else str(charge)


def intent_facts(intent: stripe.PaymentIntent) -> dict[str, Any]:
    return {
        "object": intent.object,
        "prefix": intent.id[:3],
        "amount": intent.amount,
        "currency": intent.currency,
        "customer": str(intent.customer)[:4],
        "status": intent.status,
        "metadata": plain(intent.metadata),
        "livemode": intent.livemode,
        "charged": intent.latest_charge is not None,
    }


def refund_facts(refund: stripe.Refund, intent: str) -> dict[str, Any]:
    return {
        "object": refund.object,
        "prefix": refund.id[:3],
        "amount": refund.amount,
        "currency": refund.currency,
        "status": refund.status,
        "metadata": plain(refund.metadata),
        "of the intent": refund.payment_intent == intent,
        "of a charge": str(refund.charge)[:3],
    }


def customers(client: stripe.StripeClient) -> list[Any]:
    made = client.v1.customers.create({"email": "a@example.com", "metadata": {"farebox_account": "a"}})
    got = client.v1.customers.retrieve(made.id)
    assert isinstance(got, stripe.Customer)
    facts = [got.object, got.id == made.id, got.id[:4], got.email, plain(got.metadata), got.livemode]
    return [*facts, [one.id for one in client.v1.customers.list({"email": "a@example.com"}).data] == [made.id]]


def payment(client: stripe.StripeClient, method: str, **more: Any) -> stripe.PaymentIntent:
    params: Any = {
        "amount": 1000,
        "currency": "eur",
        "customer": client.v1.customers.create({}).id,
        "payment_method": method,
        "metadata": {"farebox_order": "o"},
    }
    params |= more
    return client.v1.payment_intents.create(params)


def paid(client: stripe.StripeClient) -> list[Any]:
    intent = payment(client, "pm_card_visa", confirm=True, off_session=True)
    again = client.v1.payment_intents.retrieve(intent.id)
    charge = client.v1.charges.retrieve(charge_of(again))
    facts = [intent_facts(intent), intent_facts(again)]
    return [
        *facts,
        {
            "charge": (charge.object, charge.amount, charge.currency, charge.status, charge.paid, charge.captured),
            "of": (charge.payment_intent == intent.id, charge.customer == intent.customer),
            "back": (charge.amount_refunded, charge.refunded),
        },
    ]


def canceled(client: stripe.StripeClient) -> list[Any]:
    intent = payment(client, "pm_card_visa")
    facts = [intent_facts(intent), intent_facts(client.v1.payment_intents.cancel(intent.id))]
    with pytest.raises(stripe.InvalidRequestError) as caught:
        client.v1.payment_intents.cancel(intent.id)
    return [*facts, caught.value.http_status]


def confirmed_later(client: stripe.StripeClient) -> list[Any]:
    intent = payment(client, "pm_card_visa")
    return [intent_facts(intent), intent_facts(client.v1.payment_intents.confirm(intent.id))]


def declined(client: stripe.StripeClient) -> list[Any]:
    # The two know different test methods that attach and then decline; its own is named here.
    method = "pm_card_chargeCustomerFail"
    with pytest.raises(stripe.CardError) as caught:
        payment(client, method, confirm=True, off_session=True)
    listed = client.v1.payment_intents.list({"limit": 100}).data
    intent = next(one for one in listed if one.status == "requires_payment_method")
    failed = intent.last_payment_error
    return [refusal(caught.value), intent_facts(intent), failed and failed.code, failed and failed.message]


def refunded(client: stripe.StripeClient) -> list[Any]:
    intent = payment(client, "pm_card_visa", confirm=True)
    params: Any = {"payment_intent": intent.id, "amount": 300, "metadata": {"farebox_refund": "r"}}
    one, two = client.v1.refunds.create(params), client.v1.refunds.create(params | {"amount": 700})
    charge = client.v1.charges.retrieve(charge_of(intent))
    listed = client.v1.refunds.list({"payment_intent": intent.id}).data
    return [
        refund_facts(one, intent.id),
        refund_facts(two, intent.id),
        refund_facts(client.v1.refunds.retrieve(one.id), intent.id),
        (charge.amount_refunded, charge.refunded),
        {refund.id for refund in listed} == {one.id, two.id},
    ]


def missing(client: stripe.StripeClient) -> list[Any]:
    facts = []
    for ask in (
        lambda: client.v1.payment_intents.retrieve("pi_none"),
        lambda: client.v1.refunds.retrieve("re_none"),
        lambda: client.v1.refunds.create({"payment_intent": "pi_none"}),
        lambda: payment(client, "pm_card_visa", customer="cus_none"),
    ):
        with pytest.raises(stripe.InvalidRequestError) as caught:
            ask()
        facts.append(refusal(caught.value)[:2])
    return facts


@pytest.mark.parametrize("story", [customers, paid, canceled, confirmed_later, declined, refunded, missing])
def test_both_say_the_same(localstripe: str, story: Any) -> None:
    with FakeStripe() as fake:
        ours, theirs = story(client_of(fake.url)), story(client_of(localstripe))
    assert ours == theirs


def test_both_sign_what_the_client_verifies(localstripe: str, hook: Hook) -> None:
    made = httpx2.post(
        f"{localstripe}/_config/webhooks/ours",
        json={"url": hook.url, "secret": SECRET, "events": ["payment_intent.succeeded"]},
        trust_env=False,
    )
    assert made.status_code == 200
    payment(client_of(localstripe), "pm_card_visa", confirm=True)
    # It waits for a second before it delivers.
    assert eventually(lambda: len(hook.got) == 1, seconds=30)
    with FakeStripe(secret=SECRET) as fake:
        intent = payment(client_of(fake.url), "pm_card_visa", confirm=True)
        post = fake.signed(fake.events_of("payment_intent.succeeded")[0])
        assert intent.status == "succeeded"
    theirs, ours = hook.got[0], (post.body, post.headers["stripe-signature"])
    facts = []
    for body, signature in (ours, theirs):
        event = stripe.Webhook.construct_event(body, signature, SECRET)
        thing: Any = event.data.object
        facts.append((event.object, event.type, event.livemode, thing["object"], thing["status"], thing["amount"]))
        with pytest.raises(stripe.SignatureVerificationError):
            stripe.Webhook.construct_event(body + b" ", signature, SECRET)
        with pytest.raises(stripe.SignatureVerificationError):
            stripe.Webhook.construct_event(body, signature, SECRET + "x")
    assert facts[0] == facts[1]
