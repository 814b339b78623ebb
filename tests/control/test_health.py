"""/healthz and /readyz: what each check does to the answer."""

import asyncio

import pytest

from proxy.control.health import FRESH_SECONDS, CatalogStatus, Check, Health, Problem, health_routes
from tests.control.conftest import client_of

GOOD = CatalogStatus(version="abc", models=4)


async def fine() -> None:
    pass


async def draining() -> None:
    raise Problem("this process is ending")


async def broken() -> None:
    raise OSError("connection to postgresql://u:CanaryPassword@host refused")


async def hangs() -> None:
    await asyncio.sleep(60)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_200_when_every_check_passes() -> None:
    async with client_of(health_routes(Health({"database": fine, "lease": fine}, lambda: GOOD))) as client:
        answer = await client.get("/readyz")
        assert answer.status_code == 200
        assert answer.json() == {
            "ready": True,
            "checks": {"database": {"ok": True}, "lease": {"ok": True}},
            "catalog": {"ok": True, "version": "abc", "models": 4},
        }
        assert answer.headers["cache-control"] == "no-store"
        assert (await client.get("/healthz")).json() == {"ok": True}


async def test_503_names_the_check_that_fails() -> None:
    async with client_of(health_routes(Health({"database": fine, "serving": draining}, lambda: GOOD))) as client:
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        body = answer.json()
        assert body["ready"] is False
        assert body["checks"] == {
            "database": {"ok": True},
            "serving": {"ok": False, "problem": "this process is ending"},
        }
        assert (await client.get("/healthz")).status_code == 200


async def test_503_shows_what_failed_by_its_class_alone() -> None:
    async with client_of(health_routes(Health({"database": broken}, lambda: GOOD))) as client:
        answer = await client.get("/readyz")
        assert answer.json()["checks"]["database"] == {"ok": False, "problem": "OSError"}
        assert "Canary" not in answer.text


async def test_503_where_a_check_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.control.health.CHECK_SECONDS_MAX", 0.01)
    ready, body = await Health({"database": hangs}, lambda: GOOD).report()
    assert not ready
    assert "no answer" in body["checks"]["database"]["problem"]


async def test_200_while_a_pricing_file_is_refused() -> None:
    status = CatalogStatus(version="abc", models=4, error="pricing.yaml:3: models.gpt-4o.input: expected a number")
    async with client_of(health_routes(Health({"database": fine}, lambda: status))) as client:
        answer = await client.get("/readyz")
        assert answer.status_code == 200
        assert answer.json()["catalog"] == {"ok": False, "version": "abc", "models": 4, "problem": status.error}


async def test_asking_often_looks_seldom() -> None:
    looks = 0

    async def counted() -> None:
        nonlocal looks
        looks += 1

    clock = Clock()
    health = Health({"database": counted}, lambda: GOOD, monotonic=clock)
    await asyncio.gather(*(health.report() for _ in range(50)))
    assert looks == 1
    clock.now += FRESH_SECONDS
    await health.report()
    assert looks == 2


async def test_what_was_found_failing_is_looked_at_again() -> None:
    clock = Clock()
    outcomes: list[Check] = [draining, fine]
    health = Health({"database": lambda: outcomes.pop(0)()}, lambda: GOOD, monotonic=clock)
    assert (await health.report())[0] is False
    clock.now += FRESH_SECONDS
    assert (await health.report())[0] is True
