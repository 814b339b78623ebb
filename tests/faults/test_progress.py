"""What is charged of an answer whose worker died, stopped, or had a client that didn't read: what was delivered."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import pytest_asyncio

from proxy.local.postgres import ClusterAddress
from tests.faults.caller import BODY, Call
from tests.faults.judge import Verdict, audited, counted, disturbed, judge
from tests.faults.nursery import Nursery, Process, running_nursery
from tests.faults.provider import Answer, Provider, running_provider
from tests.faults.scene import LEASE_SECONDS, RENEW_SECONDS, Customer, Scene, open_scene
from tests.faults.stopping import stopped_and_continued
from tests.postgres import fresh_database

# A mark is made every RENEW_SECONDS; what a busy machine adds to that is not the subject here.
PERIOD_SECONDS = RENEW_SECONDS + 1.5
# Many times what all buffers between the provider and a client take.
WORDS_MANY = 40_000

pytestmark = [pytest.mark.timeout(180), pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nursery() -> AsyncIterator[Nursery]:
    async with running_nursery() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def provider() -> AsyncIterator[Provider]:
    async with running_provider() as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def scene(
    cluster: ClusterAddress, nursery: Nursery, provider: Provider, state_path: Path
) -> AsyncIterator[Scene]:
    with fresh_database(cluster) as database:
        # Calls are named after the directory, and the provider is the module's.
        async with open_scene(database, provider, nursery, state_path / f"progress{uuid4().hex}") as opened:
            yield opened


def begin(scene: Scene, worker: Process, customer: Customer, answer: Answer) -> tuple[Call, "asyncio.Task[Call]"]:
    call = scene.plan(customer, answer)
    task = asyncio.create_task(scene.make(worker, customer, call))
    scene.background.append(task)
    return call, task


async def hold_of(scene: Scene, call: Call) -> dict[str, object]:
    [hold] = [hold for hold in await scene.holds() if (hold["account_id"], hold["cap"]) == (call.account_id, call.cap)]
    return hold


async def until_words(calls: list[Call], words: int) -> None:
    async with asyncio.timeout(30):
        while min(len(call.words) for call in calls) < words:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_killed_workers_answers_are_charged_at_their_last_mark(scene: Scene) -> None:
    """Each as far as it had been delivered a period before, and never further."""
    customer = await scene.customer()
    mortal, _ = await asyncio.gather(scene.worker("mortal"), scene.worker("other"))
    begun = [begin(scene, mortal, customer, Answer(words=2_000, pace=pace)) for pace in [0.02] * 12 + [0.1] * 4]
    calls = [call for call, _ in begun]
    await until_words(calls[:12], 150)
    await scene.kill(mortal)
    await asyncio.gather(*(task for _, task in begun))
    await scene.settled(customer)
    verdict = Verdict()
    for call in calls:
        hold = await hold_of(scene, call)
        assert (hold["state"], hold["ending"]) == ("provisional", "worker_gone")
        assert hold["charge"], "a mark was stored"
        disturbed(verdict, call, hold, died=scene.deaths[mortal.pid], period=PERIOD_SECONDS)
    assert verdict.wrongs == []
    assert (await judge(scene)).wrongs == []


async def test_a_client_that_doesnt_read_is_never_charged_for_what_waited_for_it(scene: Scene) -> None:
    """The worker has read far ahead of it when it dies, and its mark goes no further than the client's own socket."""
    customer = await scene.customer()
    mortal, _ = await asyncio.gather(scene.worker("mortal"), scene.worker("other"))
    call = scene.plan(customer, Answer(words=WORDS_MANY, pace=0.0))
    call.cap = WORDS_MANY
    scene.served_by[call.name] = mortal
    url = urlsplit(await mortal.url())
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, (url.hostname, url.port))
    reader, writer = await asyncio.open_connection(sock=client, limit=1_024)
    body = json.dumps(BODY | {"max_tokens": call.cap, "stream": True}).encode()
    head = f"POST {url.path}/chat/completions HTTP/1.1\r\nhost: f\r\nauthorization: Bearer {customer.key}\r\n"
    head += f"x-client-request-id: {call.name}\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    received = await reader.read(100)
    mark, before = None, None
    try:
        async with asyncio.timeout(30):
            while mark is None or mark != before:
                await asyncio.sleep(4 * RENEW_SECONDS)
                before, mark = mark, (await hold_of(scene, call))["mark"]
        await scene.kill(mortal)
        while piece := await reader.read(65_536):
            received += piece
    except ConnectionResetError:
        pass
    finally:
        writer.close()
    await scene.settled(customer)
    charge = (await hold_of(scene, call))["charge"]
    words = received.count(b'"content":" word"') + received.count(b'"content": " word"')
    assert 0 < words < scene.provider.of(call.name).words
    assert isinstance(charge, int)
    assert 0 < charge <= counted(words)
    assert await audited(scene) == []


async def test_a_worker_that_was_stopped_and_goes_on_has_charged_what_it_delivered(scene: Scene) -> None:
    assert await stopped_and_continued(scene, streams=10, stopped_seconds=2 * LEASE_SECONDS) == []


async def test_a_long_silence_keeps_its_hold_and_costs_nothing_if_its_worker_dies(scene: Scene) -> None:
    customer = await scene.customer()
    mortal, other = await asyncio.gather(scene.worker("mortal"), scene.worker("other"))
    silent = 3.0 * LEASE_SECONDS
    doomed, doomed_task = begin(scene, mortal, customer, Answer(words=1, pace=silent))
    patient, patient_task = begin(scene, other, customer, Answer(words=1, pace=silent))
    async with asyncio.timeout(30):
        while len(await scene.holds(customer)) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    await scene.kill(mortal)
    async with asyncio.timeout(20):
        while (await hold_of(scene, doomed))["state"] == "open":  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert (await hold_of(scene, doomed))["charge"] == 0
    hold = await hold_of(scene, patient)
    assert (hold["state"], hold["mark"]) == ("open", None)
    await asyncio.gather(doomed_task, patient_task)
    assert patient.outcome == "whole"
    await scene.settled(customer)
    assert (await judge(scene)).wrongs == []
