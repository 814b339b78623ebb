"""`make chaos`: what `make test` does in small, done for an hour, with a table of what was tried and what was found.

    python -m tests.faults.chaos [--kills 1000] [--restarts 200] [--lives 5040] [--rounds 1000] [--seed N] [--only NAME]

The seed is printed first and decides every choice made here; what the machine does meanwhile it can't decide. The exit
status is 1 where anything was found.
"""

import argparse
import asyncio
import random
import secrets
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from proxy.local.postgres import ClusterAddress
from tests.control.billing.lives import MANNERS, ORDERS, at_once, lived, troubled
from tests.control.billing.lives_scene import open_scene as open_purchases
from tests.fakes.stripe import FakeStripe
from tests.faults.drive import die_and_recover
from tests.faults.judge import judge
from tests.faults.money_in.races import WORKERS, open_race
from tests.faults.money_in.rounds import run_batches
from tests.faults.nursery import running_nursery
from tests.faults.points import POINTS, Point
from tests.faults.provider import running_provider
from tests.faults.restarting import RestartingPostgres
from tests.faults.scene import FACTOR, open_scene
from tests.faults.stopping import stopped_and_continued
from tests.faults.trouble import Found, kill_round, restart_round
from tests.hostile import slow_readers, slowloris
from tests.memory import fast_directory
from tests.postgres import fresh_database, remove_cluster, running_cluster

KILLS_A_ROUND = 10
RESTARTS_A_ROUND = 10
STREAMS = 50
RESTARTS_FACTOR = 5.0
POINTS_AT_ONCE = 4
RACES_SAID = 50
READERS = 1_000
SLOW_CONNECTIONS = 2_000
STOPPED_SECONDS = 60.0
LIVES_A_ROUND = 504


@dataclass
class Row:
    """A line of the table: what was tried, and what came of it."""

    name: str
    tried: str
    seconds: float = 0.0
    noted: str = ""
    wrongs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Chaos:
    """What is needed to make trouble: a cluster that many share, a directory, a seed, and how much."""

    address: ClusterAddress
    directory: Path
    seed: int
    kills: int
    restarts: int
    lives: int
    rounds: int

    async def failpoints(self) -> Row:
        """Each point, each on a ledger of its own."""
        row = Row("failpoints", f"kill -9 at {len(POINTS)} points")
        places = asyncio.Semaphore(POINTS_AT_ONCE)

        async def die(point: Point) -> list[str]:
            async with places, AsyncExitStack() as stack:
                database = stack.enter_context(fresh_database(self.address))
                opened = open_scene(database, provider, nursery, self.directory / point.label)
                scene = await stack.enter_async_context(opened)
                try:
                    return await die_and_recover(scene, point) + (await judge(scene)).wrongs
                except Exception as error:  # noqa: BLE001 - one point's trouble may not hide another's
                    return [f"{point.label}: {error!r}"]

        async with running_provider() as provider, running_nursery() as nursery:
            found = await asyncio.gather(*map(die, POINTS.values()))
        row.wrongs = [wrong for wrongs in found for wrong in wrongs]
        row.noted = f"{len(POINTS) - sum(map(bool, found))} of {len(POINTS)} points reached and right"
        return row

    async def killing(self) -> Row:
        """Two to four workers under load, killed at random."""
        row = Row("random kills", f"{self.kills} kill -9 of 2-4 workers under {STREAMS} streams")
        random_, found = random.Random(self.seed), Found()
        with fresh_database(self.address) as database:
            async with (
                running_provider() as provider,
                running_nursery() as nursery,
                open_scene(database, provider, nursery, self.directory / "kills") as scene,
            ):
                while found.blows < self.kills and not found.wrongs:
                    kills, workers = min(KILLS_A_ROUND, self.kills - found.blows), random_.randint(2, 4)
                    await kill_round(scene, random_, found, workers=workers, streams=STREAMS, kills=kills)
                    say(f"  {found.blows} kills: {found.told()}")
        return _filled(row, found)

    async def restarting(self) -> Row:
        """PostgreSQL stopped at once under load, and started again."""
        row = Row("PostgreSQL restarts", f"{self.restarts} immediate stops under {STREAMS} streams")
        random_, found = random.Random(self.seed), Found()
        postgres = RestartingPostgres(self.directory / "pg")
        try:
            database = await postgres.start()
            async with (
                running_provider() as provider,
                running_nursery() as nursery,
                open_scene(database, provider, nursery, self.directory / "restarts", factor=RESTARTS_FACTOR) as scene,
            ):
                while found.blows < self.restarts and not found.wrongs:
                    restarts = min(RESTARTS_A_ROUND, self.restarts - found.blows)
                    await restart_round(scene, random_, found, postgres, workers=3, streams=STREAMS, restarts=restarts)
                    say(f"  {found.blows} restarts: {found.told()}")
        finally:
            await postgres.stop()
        return _filled(row, found)

    async def reading_slowly(self) -> Row:
        """A crowd that never reads, beside calls that do."""
        with fresh_database(self.address) as database:
            found = await slow_readers.measure(
                database, self._place("readers"), readers=READERS, send_seconds=30, good_calls=400
            )
        return Row("slow readers", f"{READERS} that never read", noted=found.report(), wrongs=found.wrongs())

    async def asking_slowly(self) -> Row:
        """A crowd that never finishes asking, beside calls that do."""
        with fresh_database(self.address) as database:
            found = await slowloris.measure(
                database,
                self._place("slowloris"),
                connections=SLOW_CONNECTIONS,
                receive_seconds=30,
                trickle_seconds=slowloris.TRICKLE_SECONDS,
            )
        return Row(
            "slowloris", f"{SLOW_CONNECTIONS} that never finish asking", noted=found.report(), wrongs=found.wrongs()
        )

    async def stopping(self) -> Row:
        """A worker stopped for a minute and continued, with leases as they are."""
        row = Row("SIGSTOP", f"{STOPPED_SECONDS:.0f} s under {STREAMS} streams, then SIGCONT; leases as they are")
        with fresh_database(self.address) as database:
            async with (
                running_provider() as provider,
                running_nursery() as nursery,
                open_scene(database, provider, nursery, self.directory / "stops", factor=1.0) as scene,
            ):
                row.wrongs = await stopped_and_continued(scene, streams=STREAMS, stopped_seconds=STOPPED_SECONDS)
        row.noted = "" if row.wrongs else "every hold swept at its mark, then trued up to what was delivered"
        return row

    async def living(self) -> Row:
        """Purchases whose webhooks come in every order: one by one, eight at once, and overtaken by others."""
        row = Row("purchases", f"{self.lives} orders of webhooks, in {len(MANNERS)} manners")
        numbers, asked, attempts = range(0, ORDERS, max(ORDERS // self.lives, 1)), 0, 0
        with fresh_database(self.address) as database:
            for number, manner in enumerate(MANNERS):
                for begin in range(0, len(numbers), LIVES_A_ROUND):
                    with FakeStripe() as stripe:
                        async with open_purchases(database, stripe) as scene:
                            if manner is at_once:
                                troubled(stripe, self.seed)
                            part = numbers[begin : begin + LIVES_A_ROUND]
                            wrongs = await lived(scene, manner, part, seed=self.seed) + await scene.audit()
                        asked, attempts = asked + len(stripe.asked), attempts + len(stripe.courier.attempts)
                    row.wrongs += wrongs
                    said = "".join(f"\n    {manner.__name__}: {wrong}" for wrong in wrongs)
                    say(f"  {number * len(numbers) + begin + len(part)} lives: {len(row.wrongs)} wrong{said}")
        row.noted = f"{len(MANNERS) * len(numbers)} lives, {attempts} webhooks, {asked} requests to Stripe"
        return row

    async def money_in(self) -> Row:
        """Deaths at random points of money in, while Stripe and the network have troubles of their own."""
        async with running_nursery() as nursery:
            found = await run_batches(
                self.address, nursery, self._place("money"), rounds=self.rounds, seed=self.seed, say=say
            )
        row = Row("money in", f"{found.rounds} kill -9 at points of money in, Stripe's faults beside them")
        row.noted, row.wrongs = found.told(), found.wrongs
        return row

    async def topping_up(self) -> Row:
        """Fifty workers at one automatic top-up, cut off and unheard, again and again."""
        random_ = random.Random(self.seed)
        with fresh_database(self.address) as database:
            async with open_race(database) as race:
                while race.raced.rounds < self.rounds and not race.raced.wrongs:
                    await race.round(random_)
                    if race.raced.rounds % RACES_SAID == 0:
                        say(f"  {race.raced.told()}")
        row = Row("top-ups", f"{race.raced.rounds} races of {WORKERS} workers for one top-up")
        row.noted, row.wrongs = race.raced.told(), race.raced.wrongs
        return row

    def _place(self, name: str) -> Path:
        place = self.directory / name
        place.mkdir()
        return place


TRIALS: dict[str, Callable[[Chaos], Awaitable[Row]]] = {
    "failpoints": Chaos.failpoints,
    "kills": Chaos.killing,
    "restarts": Chaos.restarting,
    "readers": Chaos.reading_slowly,
    "slowloris": Chaos.asking_slowly,
    "stops": Chaos.stopping,
    "purchases": Chaos.living,
    "money-in": Chaos.money_in,
    "top-ups": Chaos.topping_up,
}


def _filled(row: Row, found: Found) -> Row:
    row.noted, row.wrongs = found.told(), found.wrongs
    if not found.cut_short or not found.exact:
        row.wrongs.append("nothing was under way when the blows fell: nothing is proved")
    return row


async def run(chaos: Chaos, names: list[str]) -> list[Row]:
    """Every trial in turn; one that fails doesn't keep the others from being tried."""
    rows = []
    for name in names:
        say(f"{name} ...")
        began = time.monotonic()
        try:
            row = await TRIALS[name](chaos)
        except Exception as error:  # noqa: BLE001 - it is a line of the table
            row = Row(name, "ended early", wrongs=[f"{error!r}\n{traceback.format_exc()}"])
        row.seconds = time.monotonic() - began
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """What was tried and what was found, for a person."""
    lines = [f"{'':<22}{'tried':<52}{'took':>8}  found", "-" * 92]
    for row in rows:
        found = f"{len(row.wrongs)} WRONG" if row.wrongs else "nothing wrong"
        lines.append(f"{row.name:<22}{row.tried:<52}{row.seconds:>7.0f}s  {found}")
        lines += [f"{'':<22}{part}" for part in row.noted.split(", ")]
        lines += [f"{'':<22}! {wrong}" for wrong in row.wrongs[:20]]
    return "\n".join(lines)


def say(what: str) -> None:
    """On standard output, at once."""
    print(what, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--restarts", type=int, default=200)
    parser.add_argument("--lives", type=int, default=ORDERS)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS))
    given = parser.parse_args()
    say(f"seed {given.seed}; leases divided by {FACTOR:.0f} ({RESTARTS_FACTOR:.0f} where PostgreSQL restarts)")
    # Short, since sockets lie below it, and to be passed through by whom PostgreSQL runs as.
    directory, run_id = Path(tempfile.mkdtemp(prefix="fbc", dir=fast_directory())), secrets.token_hex(6)
    directory.chmod(0o755)
    try:
        with running_cluster(run_id) as address:
            chaos = Chaos(address, directory, given.seed, given.kills, given.restarts, given.lives, given.rounds)
            rows = asyncio.run(run(chaos, given.only))
    finally:
        remove_cluster(run_id)
        shutil.rmtree(directory, ignore_errors=True)
    say(table(rows))
    sys.exit(any(row.wrongs for row in rows))


if __name__ == "__main__":
    main()
