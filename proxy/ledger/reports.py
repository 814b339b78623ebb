"""The ledger's read-only queries, one file each in ``sql/reports``."""

from importlib.resources import files

__all__ = ["SQL", "report"]

SQL = files("proxy.ledger") / "sql"


def report(name: str) -> str:
    """The text of ``sql/reports/NAME.sql``."""
    return (SQL / "reports" / f"{name}.sql").read_text(encoding="utf-8")
