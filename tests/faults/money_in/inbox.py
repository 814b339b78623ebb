"""The operator's own endpoint: takes messages out, each read by the library that receivers use, and remembers them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from standardwebhooks import Webhook

from tests.fakes.upstream import Received, Script, ScriptedUpstream, whole

__all__ = ["Inbox", "running_inbox"]

SECRET = "whsec_a2tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2s="
TAKEN = whole(b"", 204)


class Inbox:
    """``got``: how often each message came, by its ``webhook-id``."""

    def __init__(self, upstream: ScriptedUpstream) -> None:
        self.url = upstream.base_url + "/messages"
        self.secret = SECRET
        self.got: dict[str, int] = {}
        self.forged: list[str] = []
        """What didn't verify."""
        upstream.choose(self._take)

    def _take(self, received: Received) -> Script:
        name = received.headers.get("webhook-id", "")
        try:
            Webhook(self.secret).verify(received.body, received.headers)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told
            self.forged.append(f"{name}: {error!r}")
        self.got[name] = self.got.get(name, 0) + 1
        return TAKEN


@asynccontextmanager
async def running_inbox() -> AsyncIterator[Inbox]:
    """A running one."""
    async with ScriptedUpstream() as upstream:
        yield Inbox(upstream)
