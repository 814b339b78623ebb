"""`farebox stripe setup` and `check`: Farebox's endpoint at Stripe, and whether everything fits together.

Neither asks the database: they need FAREBOX_STRIPE_KEY alone.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import typer

from proxy.billing import stripe_api
from proxy.cli.arguments import AsJson
from proxy.cli.output import EXIT_FAILED, CommandFailed, reporting
from proxy.control.billing.checks import Finding, check_stripe
from proxy.control.billing.endpoints import SetUp, endpoint_url, set_up
from proxy.control.billing.errors import StripeError
from proxy.control.billing.stripe_api import StripeApi
from proxy.control.views import View
from proxy.settings import load

__all__ = ["check", "setup"]

Result = TypeVar("Result")

_MARKS = {True: "ok  ", False: "FAIL", None: "note"}


def setup(
    url: Annotated[
        str, typer.Option(metavar="URL", help="This Farebox as Stripe reaches it, as https://farebox.example.com.")
    ],
    anew: Annotated[
        bool, typer.Option("--anew", help="Make another endpoint beside the one that is there, for a new secret.")
    ] = False,
    retire_others: Annotated[
        bool, typer.Option("--retire-others", help="Remove all endpoints at this address but the newest.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make the webhook endpoint at Stripe, or bring it up to date. A new one's secret is printed, this once."""
    with reporting(as_json=as_json) as out:
        if anew and retire_others:
            raise typer.BadParameter("--anew and --retire-others go one after the other: first serve with both secrets")

        async def work(api: StripeApi) -> SetUp:
            address = endpoint_url(url, livemode=api.livemode)
            return await set_up(api, address, anew=anew, retire_others=retire_others)

        done = _ask_stripe(work)
        out.show(_setup_view(done), _setup_lines(done))


def check(
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The endpoint's address; without it any that ends in /webhooks/stripe."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look at the key, what it may read, the endpoint, its events and the secrets. Ends with 1 if one is wrong."""
    with reporting(as_json=as_json) as out:
        secrets = [secret.get_secret_value() for secret in load().stripe_webhook_secrets]

        async def work(api: StripeApi) -> list[Finding]:
            address = None if url is None else endpoint_url(url, livemode=api.livemode)
            return await check_stripe(api, url=address, secrets=secrets)

        findings = _ask_stripe(work)
        ok = all(finding.ok is not False for finding in findings)
        view = {"ok": ok, "checks": [{"name": one.name, "ok": one.ok, "found": one.found} for one in findings]}
        out.show(view, (f"{_MARKS[one.ok]}  {one.name}: {one.found}" for one in findings))
        if not ok:
            raise typer.Exit(EXIT_FAILED)


def _ask_stripe(work: Callable[[StripeApi], Awaitable[Result]]) -> Result:
    api = stripe_api(load())

    async def ask() -> Result:
        return await work(api)

    try:
        return asyncio.run(ask())
    except StripeError as error:
        raise CommandFailed(str(error), code="stripe") from None
    finally:
        api.close()


def _setup_view(done: SetUp) -> View:
    endpoint = done.endpoint
    return {
        "object": "webhook_endpoint",
        "id": endpoint.id,
        "url": endpoint.url,
        "done": done.done,
        "secret": done.secret,
        "api_version": endpoint.api_version,
        "events": sorted(endpoint.events),
        "retired": list(done.retired),
    }


def _setup_lines(done: SetUp) -> list[str]:
    endpoint = done.endpoint
    lines = [f"{endpoint.id} at {endpoint.url} is {done.done}, with {len(endpoint.events)} events."]
    lines += [f"{id} is removed." for id in done.retired]
    if done.secret is not None:
        lines += [
            "Its secret, which Stripe shows this once; put it first into FAREBOX_STRIPE_WEBHOOK_SECRETS and restart:",
            done.secret,
        ]
    return lines
