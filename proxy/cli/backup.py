"""`farebox backup` and `farebox restore`: the ledger and what belongs to it, out of one place and into an empty one."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import SecretStr

from proxy.app import RELEASE
from proxy.cli.arguments import AsJson, DatabaseUrl
from proxy.cli.audit import head_view, report
from proxy.cli.output import CommandFailed, reporting
from proxy.cli.session import Access, database_access, require_schema
from proxy.ledger import migrate as migrations
from proxy.ledger.audit import Check, SealHead, audit, book_state, seal_heads
from proxy.ledger.connect import Connection, Role, connect
from proxy.ledger.holds import HoldLedger
from proxy.ledger.journal_files import JournalDirectory
from proxy.local import backup as backups
from proxy.local import dumping
from proxy.local.backup import Backup, Draft
from proxy.local.postgres import APP, Cluster
from proxy.local.state import LocalError, StateDirectory
from proxy.settings import Settings, load

__all__ = ["backup", "restore"]

COPY_TURNS_MAX = 20
Place = Annotated[Path, typer.Argument(metavar="DIR", help="The backup's directory.")]


def backup(place: Place, as_json: AsJson = False, database_url: DatabaseUrl = None) -> None:
    """Back the ledger up into a new directory, while Farebox serves. Run it as the owner of the schema."""
    with reporting(as_json=as_json) as out:
        settings = load(database_url=database_url)
        draft = backups.begin(place)
        try:
            with database_access(settings, purpose="farebox backup") as access:
                made = _backed_up(draft, access, settings)
        except BaseException:
            draft.discard()
            raise
        manifest = made.manifest
        view = {
            "object": "backup",
            "path": str(made.path),
            "created_at": manifest.created_at,
            "transfers": manifest.transfers,
            "journals": len(made.journals),
            "bytes": sum((made.path / name).stat().st_size for name in manifest.files),
        }
        advice = "The pepper is not in it: keep it apart, and as safe (docs/operations.md)."
        out.show(
            view,
            [f"Backed up {manifest.transfers} transfers and {len(made.journals)} journals to {made.path}.", advice],
        )


def restore(
    place: Place,
    grant_to: Annotated[
        str | None, typer.Option(metavar="LOGIN", help="A login that may then serve, as `farebox migrate` has it.")
    ] = None,
    without_pepper: Annotated[
        bool, typer.Option("--without-pepper", help="Restore though the keys' pepper is lost: no old key will work.")
    ] = False,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Restore a backup into an empty database, and audit it. Ends with 1 if the audit finds anything wrong."""
    with reporting(as_json=as_json) as out:
        settings = load(database_url=database_url)
        found = backups.read(place)
        with _empty_database(settings) as access:
            if not without_pepper:
                _require_peppers(found, access.settings)
            checks = _restored(found, access, APP if access.embedded else grant_to)
        journals = _put_journals(found, settings)
        report(out, checks)
        if journals is not None and not as_json:
            typer.echo(f"{len(found.journals)} journals are in {journals}. Now run: farebox journal replay", err=True)


def _backed_up(draft: Draft, access: Access, settings: Settings) -> Backup:
    known = asyncio.run(_looked_at(access))
    heads = {"object": "list", "data": [head_view(head) for head in known.pop("heads")]}
    (draft.path / backups.SEALS).write_text(json.dumps(heads), encoding="utf-8")
    dumping.dump(dumping.program("pg_dump", known["postgres"]), access.owner, draft.path / backups.DUMP)
    # After the dump: a charge that came too late for it is in the journals, which are kept for a day.
    journal = settings.journal_path()
    if journal is not None and journal.is_dir():
        _copy_journals(draft, JournalDirectory(journal))
    for file_path in (settings.pricing, settings.upstreams):
        draft.copy(backups.CONFIG, file_path)
    return draft.finish(peppers=backups.pepper_checks(access.settings.peppers()), release=RELEASE, **known)


def _copy_journals(draft: Draft, directory: JournalDirectory) -> None:
    for _ in range(COPY_TURNS_MAX):
        # A journal gets another name when it is done: what is gone is looked for once more.
        if all(draft.copy(backups.JOURNAL, file.path) for file in directory.files()):
            return
    raise LocalError(f"The journals in {directory.path} are renamed faster than they can be copied; try again.")


async def _looked_at(access: Access) -> dict[str, Any]:
    connection = await connect(access.owner, statement_seconds=0)
    try:
        (await migrations.schema_state(connection)).require()
        return {
            "created_at": backups.now_text(),
            "heads": await seal_heads(connection),
            "transfers": (await book_state(connection)).transfers,
            "schema": (await migrations.schema_state(connection)).applied,
            "postgres": _major(connection),
            "ledger": str(await HoldLedger(connection).ledger_id()),
        }
    finally:
        await connection.close()


@contextmanager
def _empty_database(settings: Settings) -> Iterator[Access]:
    """Where to restore to: the database of the settings, which is not migrated. Raises LocalError, LedgerError."""
    if settings.database_url is not None:
        yield Access(settings.database_url, settings.database_url, settings, embedded=False)
        return
    state = StateDirectory(settings.state_dir)
    cluster = Cluster(state, purpose="farebox restore")
    address = cluster.open()
    try:
        pepper = settings.key_pepper
        if pepper is None and (state.path / "pepper").is_file():
            pepper = SecretStr(state.pepper())
        own = settings.model_copy(update={"database_url": address.app, "key_pepper": pepper})
        yield Access(address.owner, address.app, own, embedded=True)
    finally:
        cluster.close()


def _require_peppers(found: Backup, settings: Settings) -> None:
    missing = backups.missing_peppers(found.manifest, settings.peppers())
    if missing:
        where = f"as FAREBOX_KEY_PEPPER, or in the file {StateDirectory(settings.state_dir).path / 'pepper'}"
        raise CommandFailed(
            f"The keys of this backup are hashed under a pepper (version {', '.join(missing)}) that isn't given here. "
            f"Give it {where}; or restore --without-pepper, and make every key anew.",
            code="pepper",
        )


def _restored(found: Backup, access: Access, grant_to: str | None) -> list[Check]:
    server = asyncio.run(_require_empty(access.owner))
    if found.manifest.schema > len(migrations.known_migrations()):
        raise CommandFailed(
            f"The backup's schema is at {found.manifest.schema}, made by release {found.manifest.release}; "
            "this release is older: install that one, or a newer.",
            code="schema",
        )
    asyncio.run(migrations.ensure_roles(access.owner))
    dumping.restore(dumping.program("pg_restore", server), access.owner, found.path / backups.DUMP)
    asyncio.run(migrations.migrate(access.owner, grant_to=grant_to))
    return asyncio.run(_audited(found, access))


async def _audited(found: Backup, access: Access) -> list[Check]:
    heads = json.loads((found.path / backups.SEALS).read_text(encoding="utf-8"))["data"]
    if access.embedded:
        await require_schema(access.login, Role.GATEWAY)
    connection = await connect(access.owner, statement_seconds=0)
    try:
        # What was loaded has no statistics yet, and would be audited by the wrong plans.
        for row in await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'farebox'"):
            await connection.execute(await connection.fetchval("SELECT format('ANALYZE farebox.%I', $1::text)", row[0]))
        return await audit(connection, kept=[SealHead.of(head) for head in heads])
    finally:
        await connection.close()


async def _require_empty(dsn: str) -> int:
    """Raise CommandFailed unless there is no ledger; the server's major version."""
    connection = await connect(dsn)
    try:
        if not await connection.fetchval("SELECT to_regnamespace('farebox') IS NULL"):
            raise CommandFailed(
                "There is a ledger in this database already, and a restore overwrites none: name an empty database, or "
                "another FAREBOX_STATE_DIR.",
                code="not_empty",
            )
        return _major(connection)
    finally:
        await connection.close()


def _put_journals(found: Backup, settings: Settings) -> Path | None:
    """Put the journals where `farebox journal replay` looks; those that are there already stay as they are."""
    directory = settings.journal_path()
    if directory is None or not found.journals:
        return None
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for journal in found.journals:
            # By whatever name: it gets another when it is done.
            if not any(directory.glob(f"{journal.stem}.*")):
                shutil.copyfile(journal, directory / journal.name)
                (directory / journal.name).chmod(0o600)
    except OSError as error:
        raise LocalError(f"The journals can't be put into {directory}: {error.strerror}.") from error
    return directory


def _major(connection: Connection) -> int:
    return connection.get_server_version().major
