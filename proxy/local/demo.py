"""What `farebox demo` has and `farebox serve` hasn't: an account with credits, a key that is kept, and an upstream.

Everything here may be repeated: the second start finds the account by its external id, the key in its file, and the
grant by its reference, so that it prints the same key and gives nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from proxy.control.operations import SCOPES, KeyTerms, Operations
from proxy.core.catalog import Catalog, Upstream
from proxy.core.errors import NotFound
from proxy.core.money import MICROCREDITS_PER_CREDIT, format_credits
from proxy.ledger.records import Account
from proxy.local.state import StateDirectory

__all__ = ["DEMO_CREDITS", "DemoKey", "demo_key", "instructions", "through_demo_upstream"]

DEMO_CREDITS = 1000
EXTERNAL_ID = "farebox-demo"
KEY_FILE = "demo.json"
ACTOR = "farebox demo"


@dataclass(frozen=True, slots=True)
class DemoKey:
    """The demo account's key, which opens it: shown on the terminal and kept in the state directory."""

    text: str
    account: Account
    """As it is after the grant."""


async def demo_key(operations: Operations, state: StateDirectory) -> DemoKey:
    """The demo account's key; the first call makes the account, its key and its one grant."""
    account = await operations.create_account("demo", external_id=EXTERNAL_ID)
    await operations.grant(
        account.id,
        DEMO_CREDITS * MICROCREDITS_PER_CREDIT,
        reference=EXTERNAL_ID,
        actor=ACTOR,
        reason="To try Farebox out.",
    )
    text = await _kept_key(operations, state)
    if text is None:
        terms = KeyTerms(name="demo", scopes=SCOPES)
        key, text = await operations.create_key(account.id, terms)
        state.write_json(KEY_FILE, {"account": str(account.id), "id": key.id, "key": text})
    return DemoKey(text, await operations.account(str(account.id)))


async def _kept_key(operations: Operations, state: StateDirectory) -> str | None:
    """The key in its file, unless the ledger doesn't know it (any more) or it was revoked."""
    kept = state.read_json(KEY_FILE)
    if kept is None:
        return None
    try:
        key = await operations.key(kept["id"])
    except NotFound:
        return None
    return None if key.revoked_at is not None else str(kept["key"])


def through_demo_upstream(base_url: str) -> Callable[[Catalog], Catalog]:
    """What makes a catalog's every route lead to the demo upstream. Models, limits and prices stay as they are."""

    def moved(upstream: Upstream) -> Upstream:
        return replace(upstream, dialect="openai", base_url=base_url, api_key_env=None, api_key_file=None, headers={})

    def adapt(catalog: Catalog) -> Catalog:
        routes = {model: replace(route, upstream=moved(route.upstream)) for model, route in catalog.routes.items()}
        upstreams = {name: moved(upstream) for name, upstream in catalog.upstreams.items()}
        return replace(catalog, routes=routes, upstreams=upstreams)

    return adapt


def instructions(base_url: str, demo: DemoKey, *, model: str, source: str) -> str:
    """What a newcomer does next. Every command stands at the line's beginning, to be pasted into a shell as it is."""
    key, left = demo.text, format_credits(demo.account.available)
    return f"""\
Farebox is ready: {base_url}
{source}

# The demo account's key, with {left} credits:
# {key}

# Ask, and see the answer stream:
curl -N {base_url}/chat/completions -H "Authorization: Bearer {key}" -H "Content-Type: application/json" \\
  -d '{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Hello!"}}]}}'

# See the credits fall:
curl {base_url}/credits -H "Authorization: Bearer {key}"

# The same with the OpenAI SDK (pip install openai):
python3 - <<'END'
from openai import OpenAI

client = OpenAI(base_url="{base_url}", api_key="{key}")
stream = client.chat.completions.create(
    model="{model}",
    messages=[{{"role": "user", "content": "Hello!"}}],
    stream=True,
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
END
"""
