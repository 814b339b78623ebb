"""Reload: what the files hold becomes the catalog, whole or not at all, however they were saved."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from proxy.control import reload
from proxy.control.reload import CatalogReloader
from proxy.core.catalog import Catalog
from proxy.core.yaml_reader import ConfigError

UPSTREAMS = """\
upstreams:
  openai:
    dialect: openai
    base_url: https://api.openai.com/v1
    api_key_env: OPENAI_API_KEY
"""


def pricing(price: str, model: str = "gpt-4o") -> str:
    return f"models:\n  {model}:\n    upstream: openai\n    input: {price}\n    output: 3\n    max_output_tokens: 100\n"


class Ledger:
    """Takes price versions as the ledger does: a known version again is no news."""

    def __init__(self) -> None:
        self.versions: dict[str, str] = {}
        self.calls = 0
        self.broken = False
        self.before_return: Callable[[], None] = lambda: None

    async def put(self, version: str, body: str) -> None:
        await asyncio.sleep(0)
        if self.broken:
            raise ConnectionError("no ledger")
        self.calls += 1
        self.versions[version] = body
        self.before_return()


class Metrics:
    def __init__(self) -> None:
        self.events: list[str] = []

    def catalog_loaded(self, version: str, routes: int) -> None:
        self.events.append(f"loaded {routes}")

    def catalog_failed(self) -> None:
        self.events.append("failed")


class Shop:
    """Two files in a folder, a ledger, and the reloader between them."""

    def __init__(self, folder: Path) -> None:
        self.pricing = folder / "pricing.yaml"
        self.upstreams = folder / "upstreams.yaml"
        self.pricing.write_text(pricing("1"))
        self.upstreams.write_text(UPSTREAMS)
        self.ledger = Ledger()
        self.metrics = Metrics()
        self.reloader = self.make()

    def make(self) -> CatalogReloader:
        return CatalogReloader(
            self.pricing,
            self.upstreams,
            self.ledger.put,
            metrics=self.metrics,
            poll_seconds=0.005,
            settle_seconds=0,
        )

    def price(self, model: str = "gpt-4o") -> float:
        return self.reloader.holder.current.routes[model].standard.price.input / 1e9


@pytest.fixture
async def shop(tmp_path: Path) -> Shop:
    shop = Shop(tmp_path)
    await shop.reloader.load()
    return shop


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110 - there is no event: a file is watched
            await asyncio.sleep(0.005)


def by_rename(path: Path, text: str) -> None:
    """As most editors save."""
    beside = path.with_suffix(".tmp")
    beside.write_text(text)
    beside.replace(path)


def in_place(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.mark.parametrize("save", [by_rename, in_place])
async def test_a_saved_file_serves(shop: Shop, save: Callable[[Path, str], None]) -> None:
    save(shop.pricing, pricing("2"))
    assert await shop.reloader.check()
    assert shop.price() == 2
    assert shop.reloader.state.ok
    assert shop.reloader.state.version == shop.reloader.holder.current.version
    assert shop.metrics.events == ["loaded 1", "loaded 1"]


async def test_files_as_they_were_are_not_loaded_again(shop: Shop) -> None:
    os.utime(shop.pricing)
    by_rename(shop.upstreams, UPSTREAMS)
    assert not await shop.reloader.check()
    assert shop.ledger.calls == 1


async def test_the_other_file_counts_too(shop: Shop) -> None:
    before = shop.reloader.holder.current
    by_rename(shop.upstreams, UPSTREAMS.replace("https://api.openai.com/v1", "https://example.com/v1"))
    assert await shop.reloader.check()
    after = shop.reloader.holder.current
    assert after.routes["gpt-4o"].upstream.base_url == "https://example.com/v1"
    assert after.version == before.version, "where an upstream lives changes no price"


async def test_a_mounted_directory_that_is_swapped_by_its_link(tmp_path: Path) -> None:
    """As Kubernetes updates a ConfigMap: the files are links through ..data, and ..data is swapped."""
    for name, price in (("one", "1"), ("two", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pricing.yaml").write_text(pricing(price))
        (tmp_path / name / "upstreams.yaml").write_text(UPSTREAMS)
        for file in (tmp_path / name).iterdir():
            os.utime(file, (1_000_000_000, 1_000_000_000))
    (tmp_path / "..data").symlink_to("one")
    for name in ("pricing.yaml", "upstreams.yaml"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    ledger = Ledger()
    reloader = CatalogReloader(
        tmp_path / "pricing.yaml", tmp_path / "upstreams.yaml", ledger.put, poll_seconds=1, settle_seconds=0
    )
    holder = await reloader.load()
    (tmp_path / "..tmp").symlink_to("two")
    (tmp_path / "..tmp").replace(tmp_path / "..data")
    assert await reloader.check()
    assert holder.current.routes["gpt-4o"].standard.price.input == 2 * 10**9


async def test_a_file_that_is_being_written_is_not_judged(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a file can be a valid one that sells less: here the writer pauses behind its first model."""
    whole = pricing("2") + pricing("3", "other").removeprefix("models:\n")
    half = pricing("2")

    def read_then_go_on(files: "reload._Files") -> "reload._Read | None":
        found = files.read()
        shop.pricing.write_text(whole)
        return found

    shop.pricing.write_text(half)
    monkeypatch.setattr(reload._Files, "read_if_touched", read_then_go_on)
    assert not await shop.reloader.check()
    assert shop.price() == 1, "nothing of the half file serves"
    monkeypatch.undo()
    assert await shop.reloader.check()
    assert set(shop.reloader.holder.current.routes) == {"gpt-4o", "other"}


async def test_a_bad_file_keeps_the_last_good_catalog_and_says_why_once(shop: Shop) -> None:
    before = shop.reloader.holder.current
    by_rename(shop.pricing, pricing("-1"))
    with capture_logs() as logs:
        for _ in range(3):
            assert not await shop.reloader.check()
    assert shop.reloader.holder.current is before
    state = shop.reloader.state
    assert (state.ok, state.version, state.models) == (False, before.version, 1)
    assert state.error is not None
    assert "pricing.yaml:4: models.gpt-4o.input" in state.error
    assert [entry["event"] for entry in logs] == ["catalog_refused"]
    assert shop.metrics.events == ["loaded 1", "failed"]
    by_rename(shop.pricing, pricing("1"))
    assert await shop.reloader.check()
    assert shop.reloader.state.ok
    assert shop.reloader.state.error is None


@pytest.mark.parametrize("spoil", ["empty", "missing", "folder", "binary", "pipe", "huge"])
async def test_whatever_stands_where_the_file_was_changes_nothing(shop: Shop, spoil: str) -> None:
    before = shop.reloader.holder.current
    shop.pricing.unlink()
    make: dict[str, Callable[[], object]] = {
        "empty": lambda: shop.pricing.write_text(""),
        "missing": lambda: None,
        "folder": shop.pricing.mkdir,
        "binary": lambda: shop.pricing.write_bytes(b"\x00\xff\xfe"),
        "pipe": lambda: os.mkfifo(shop.pricing),
        "huge": lambda: shop.pricing.write_bytes(b"#" * 3_000_000),
    }
    make[spoil]()
    assert not await shop.reloader.check()
    assert shop.reloader.holder.current is before
    assert not shop.reloader.state.ok


async def test_a_catalog_is_stored_before_it_serves(shop: Shop) -> None:
    served_at_store: list[float] = []
    shop.ledger.before_return = lambda: served_at_store.append(shop.price())
    by_rename(shop.pricing, pricing("2"))
    assert await shop.reloader.check()
    assert served_at_store == [1]
    assert shop.reloader.holder.current.version in shop.ledger.versions


async def test_what_cannot_be_stored_does_not_serve_and_is_tried_again(shop: Shop) -> None:
    shop.ledger.broken = True
    by_rename(shop.pricing, pricing("2"))
    assert not await shop.reloader.check()
    assert not await shop.reloader.check()
    assert shop.price() == 1
    assert not shop.reloader.state.ok
    assert shop.metrics.events == ["loaded 1", "failed"], "one failure, however often it is tried"
    shop.ledger.broken = False
    assert await shop.reloader.check()
    assert shop.price() == 2
    assert shop.reloader.state.ok


async def test_an_edit_that_was_taken_back_before_it_could_be_stored_leaves_no_error(shop: Shop) -> None:
    shop.ledger.broken = True
    by_rename(shop.pricing, pricing("2"))
    await shop.reloader.check()
    shop.ledger.broken = False
    by_rename(shop.pricing, pricing("1"))
    await shop.reloader.check()
    assert shop.reloader.state.ok
    assert shop.price() == 1


async def test_prices_a_to_b_and_back_to_a_are_two_versions(shop: Shop) -> None:
    versions = [shop.reloader.holder.current.version]
    task = asyncio.create_task(shop.reloader.run())
    for price in (2, 1, 2, 1):
        by_rename(shop.pricing, pricing(str(price)))
        await eventually(lambda price=price: shop.price() == price)  # type: ignore[misc]
        versions.append(shop.reloader.holder.current.version)
    task.cancel()
    a, b = versions[0], versions[1]
    assert a != b
    assert versions == [a, b, a, b, a]
    assert set(shop.ledger.versions) == {a, b}


async def test_every_catalog_that_is_ever_seen_is_whole_and_stored(shop: Shop) -> None:
    """Both files change together and apart, under a watcher, with a reader that looks at every step."""
    task = asyncio.create_task(shop.reloader.run())
    seen = set()
    for round_ in range(30):
        by_rename(shop.pricing, pricing(str(round_ + 1)))
        await asyncio.sleep(0.002)
        current = shop.reloader.holder.current
        assert current.version in shop.ledger.versions
        seen.add(current.version)
    await eventually(lambda: shop.price() == 30)
    task.cancel()
    assert len(seen) > 1


async def test_a_file_whose_stamp_lies_is_still_found(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system may keep showing the old dates."""
    monkeypatch.setattr(reload, "_stamp", lambda _: (1, 1, 1, 1, 1))
    await shop.reloader.load()
    shop.pricing.write_text(pricing("2"))
    assert not await shop.reloader.check()
    monkeypatch.setattr(reload, "REREAD_SECONDS", 0.0)
    assert await shop.reloader.check()


async def test_files_that_did_not_change_are_not_read(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "_STAMP_DOUBTED_NS", 0)
    await shop.reloader.load()
    monkeypatch.setattr(reload, "_content", lambda _: pytest.fail("read without need"))
    assert not await shop.reloader.check()
    assert shop.reloader.state.ok


async def test_a_start_with_bad_files_is_refused(shop: Shop) -> None:
    shop.upstreams.unlink()
    with pytest.raises(ConfigError, match=r"upstreams\.yaml:1: can't be read: No such file"):
        await shop.make().load()


async def test_a_start_without_a_ledger_is_refused(shop: Shop) -> None:
    shop.ledger.broken = True
    with pytest.raises(ConnectionError):
        await shop.make().load()


async def test_an_unforeseen_failure_does_not_end_the_watch(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("surprise")

    with monkeypatch.context() as broken:
        broken.setattr(reload._Files, "read_if_touched", fail)
        assert not await shop.reloader.check()
    assert not shop.reloader.state.ok
    await shop.reloader.check()
    assert shop.reloader.state.ok


async def test_what_serves_is_adapted_but_the_stored_prices_are_the_files(shop: Shop) -> None:
    elsewhere = "http://127.0.0.1:1/v1"

    def adapt(catalog: Catalog) -> Catalog:
        routes = {
            model: replace(route, upstream=replace(route.upstream, base_url=elsewhere))
            for model, route in catalog.routes.items()
        }
        return replace(catalog, routes=routes)

    reloader = CatalogReloader(shop.pricing, shop.upstreams, shop.ledger.put, adapt=adapt, settle_seconds=0)
    plain = await shop.reloader.load()
    holder = await reloader.load()
    assert holder.current.route("gpt-4o").upstream.base_url == elsewhere
    assert holder.current.version == plain.current.version
    in_place(shop.pricing, pricing("2"))
    assert await reloader.check()
    assert holder.current.route("gpt-4o").upstream.base_url == elsewhere
    assert len(shop.ledger.versions) == 2
