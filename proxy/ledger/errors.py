"""What the ledger raises. Expected refusals of the hot path are outcomes (``records.py``), not exceptions.

LedgerError
  LedgerUnavailable    Postgres can't be reached, is restarting, or didn't answer in time: retry with the same id
    JournalFull        the journal takes no new work: a charge that couldn't be written down might be lost
  JournalError         a journal, or its directory, can't be used; the message says what to do
  SchemaMismatch       the database has another schema than this code needs; the message says what to run
  MissingRole          the login lacks a right to migrate, or roles that it may not make; the message is the SQL to run
  InvalidValue         (also a ValueError) a value that can't be stored: NUL, lone surrogate, amount out of bounds
  Unknown              no such account, key or hold
  Conflict             the id or reference stands for something else already, or the row has changed meanwhile
"""

__all__ = [
    "Conflict",
    "InvalidValue",
    "JournalError",
    "JournalFull",
    "LedgerError",
    "LedgerUnavailable",
    "MissingRole",
    "SchemaMismatch",
    "Unknown",
]


class LedgerError(Exception):
    """Anything the ledger raises."""


class LedgerUnavailable(LedgerError):
    """Postgres can't be asked now. The call may or may not have taken effect: ids make a retry safe."""


class JournalFull(LedgerUnavailable):
    """No new work: the journal is full, can't be written, or its disk doesn't answer. Nothing was held."""


class JournalError(LedgerError):
    """A journal, or its directory, can't be used; the message says what to do about it."""


class SchemaMismatch(LedgerError):
    """The schema is behind the code, or too far ahead of it."""


class MissingRole(LedgerError):
    """The login may not do a part of the migration: somebody who may has to run the SQL in the message."""


class InvalidValue(LedgerError, ValueError):
    """A value that the ledger can't store; the message names the field."""


class Unknown(LedgerError):
    """No such account, key or hold."""


class Conflict(LedgerError):
    """The id or reference is taken by something else, or the row isn't what the caller took it for."""
