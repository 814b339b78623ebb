"""A large ledger in seconds: many accounts with a grant and many settled calls each, valid to the last invariant.

Written by set as the tables' owner, since a million calls through the ledger's functions would take minutes. What the
functions would have written is what stands there: the audit passes on it.
"""

from proxy.ledger.connect import Connection
from tests.ledger.bank import BODY, VERSION

__all__ = ["GRANT", "fill"]

GRANT = 10**12

# Account n: a uuid whose last twelve digits are n. Hold (n, call): opened in the order of the calls, as UUIDv7s are.
_ACCOUNTS = """
    INSERT INTO farebox.accounts (id, name, balance, version)
    SELECT ('00000000-0000-7000-8000-' || lpad(n::text, 12, '0'))::uuid, 'crowd ' || n,
           $3::bigint - $2 * ($2 + 1) / 2, $2::bigint + 1
      FROM generate_series(1, $1::integer) AS n
"""
_GRANTS = """
    INSERT INTO farebox.transfers (
        account_id, version, kind, account_side, system_account, amount, balance_after, debt_after, reference, actor,
        created_at
    )
    SELECT a.id, 1, 'grant', 'credit', 'grants', $1::bigint, $1, 0, 'crowd ' || a.id, 'test',
           timestamptz '2026-01-01 00:00Z'
      FROM farebox.accounts a WHERE a.name LIKE 'crowd %'
"""
# Call c of an account costs c microcredits: c tokens of output.
_HOLDS = """
    INSERT INTO farebox.holds (
        id, account_id, state, amount, key_id, worker_id, price_version, model, variant, quote, fingerprint, opened_at,
        charge, usage, usage_source, ending, receipt, settle_fingerprint, ended_at
    )
    SELECT (lpad(to_hex(c), 8, '0') || '-0000-7000-8000-' || right(a.id::text, 12))::uuid, a.id, 'final', 2 * c,
           'crowdcrowd00', '00000000-0000-7000-8000-000000000000', $2, 'm', 'standard',
           '{"input_tokens":312,"output_tokens":688,"cap":null,"amount":1000}', decode(repeat('ab', 32), 'hex'),
           timestamptz '2026-01-01 00:00Z' + c * interval '1 second', c,
           ARRAY[0, 0, 0, 0, c, 0, 0], 'reported', 'complete',
           '{"usage":{"prompt_tokens":300,"completion_tokens":400,"total_tokens":700},"finish":["stop"]}',
           decode(repeat('cd', 32), 'hex'), timestamptz '2026-01-01 00:00:01Z' + c * interval '1 second'
      FROM generate_series(1, $1::bigint) AS c, farebox.accounts a
     WHERE a.name LIKE 'crowd %'
     ORDER BY c
"""
_CHARGES = """
    INSERT INTO farebox.transfers (
        account_id, version, kind, account_side, system_account, amount, balance_after, debt_after, hold_id, created_at
    )
    SELECT h.account_id, h.charge + 1, 'charge', 'debit', 'revenue', h.charge,
           $1::bigint - h.charge * (h.charge + 1) / 2, 0, h.id, h.ended_at
      FROM farebox.holds h
     WHERE h.key_id = 'crowdcrowd00'
     ORDER BY h.id
"""


async def fill(owner: Connection, *, accounts: int, calls: int) -> None:
    """``accounts`` new accounts with a grant and ``calls`` charged calls each: ``accounts * (calls + 1)`` transfers.

    ``owner`` acts as the tables' owner on a database without such a crowd.
    """
    await owner.execute("SET statement_timeout = 0")
    await owner.execute("SELECT farebox.put_price_version($1, $2)", VERSION, BODY)
    await owner.execute(_ACCOUNTS, accounts, calls, GRANT)
    await owner.execute(_GRANTS, GRANT)
    await owner.execute(_HOLDS, calls, VERSION)
    await owner.execute(_CHARGES, GRANT)
    await owner.execute("ANALYZE farebox.accounts, farebox.holds, farebox.transfers")
