"""Who may do what: read off the database's catalogs, so that nothing is granted by oversight; and tried."""

from collections import defaultdict
from collections.abc import AsyncIterator

import asyncpg
import pytest

from proxy.ledger.connect import Connection, Role, connect
from tests.ledger.bank import Bank
from tests.postgres import Database

GATEWAY = {
    "batch",
    "extend",
    "extend_holds",
    "start_worker",
    "stop_worker",
    "heartbeat",
    "renew",
    "expire_holds",
    "sweep",
    "find_key",
    "account_frozen",
    "put_price_version",
    "ledger_id",
    "claim_key",
    "free_key",
    "keep_answer",
    "forget_keys",
}
CONTROL = {
    "create_account",
    "create_key",
    "revoke_key",
    "update_key",
    "rotate_key",
    "grant_credits",
    "reverse",
    "freeze_account",
    "unfreeze_account",
    "apply_refund",
    "open_refund_request",
    "release_refund_request",
    "claim_refund_requests",
    "ask_dispute",
    "apply_dispute",
    "put_price_version",
    "audit",
    "audit_since_last",
    "seal",
    "book_state",
    "draw_lots",
    "draw_accounts",
    "expired_accounts",
    "expire_lots",
    "grant_lot",
    *("create_order", "open_order", "advance_order", "put_customer", "pay_order", "resolve_quarantine"),
    *("claim_messages", "message_delivered", "message_failed", "resend_messages", "forget_messages"),
    *("tell_alerts", "set_low_balance"),
    *("set_auto_topup", "stop_auto_topup", "open_auto_topup", "claim_auto_orders", "link_auto_topup"),
    *("create_promo", "end_promo", "redeem_promo", "pay_plan", "note_reconciliation"),
    "take_event",
    "finish_event",
    "fail_event",
    "claim_event",
    "forget_events",
}
FUNCTIONS = {
    "farebox_gateway": GATEWAY | {"schema_version"},
    "farebox_control": CONTROL | {"schema_version"},
    "farebox_reader": {"schema_version"},
}
TABLES = {
    "farebox_control": {
        *("accounts", "api_keys", "spend_limits", "workers", "price_versions", "prices", "holds", "transfers"),
        *("seals", "schema_migrations"),
        *("freezes", "lots", "draws", "lot_marks", "stripe_customers", "orders", "quarantine", "stripe_events"),
        *("stripe_refunds", "refund_requests", "disputes", "auto_topups", "alerts", "outbox"),
        *("promo_codes", "promo_redemptions", "reconciliations"),
    },
    "farebox_reader": {"accounts", "holds", "transfers", "prices", "lots", "orders", "auto_topups"},
}
ACLS = """
    SELECT kind, name, coalesce(r.rolname, 'PUBLIC') AS grantee, a.privilege_type AS privilege
      FROM (
          SELECT 'schema' AS kind, n.nspname::text AS name, coalesce(n.nspacl, acldefault('n', n.nspowner)) AS acl,
                 n.nspowner AS owner
            FROM pg_namespace n WHERE n.nspname = 'farebox'
          UNION ALL
          SELECT 'relation', c.relname, coalesce(c.relacl, acldefault('r', c.relowner)), c.relowner
            FROM pg_class c
           WHERE c.relnamespace = 'farebox'::regnamespace AND c.relkind IN ('r', 'v', 'm', 'S', 'p', 'f')
          UNION ALL
          SELECT 'function', p.proname, coalesce(p.proacl, acldefault('f', p.proowner)), p.proowner
            FROM pg_proc p WHERE p.pronamespace = 'farebox'::regnamespace
          UNION ALL
          SELECT 'column', c.relname || '.' || t.attname, t.attacl, c.relowner
            FROM pg_attribute t JOIN pg_class c ON c.oid = t.attrelid
           WHERE c.relnamespace = 'farebox'::regnamespace AND t.attacl IS NOT NULL
      ) AS thing (kind, name, acl, owner)
     CROSS JOIN LATERAL aclexplode(thing.acl) AS a
      LEFT JOIN pg_roles r ON r.oid = a.grantee
     WHERE a.grantee <> thing.owner
"""


@pytest.fixture
async def superuser(module_database: Database) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(module_database.superuser)
    yield connection
    await connection.close()


async def test_the_catalogs_hold_these_privileges_and_no_other(superuser: Connection) -> None:
    found: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for row in await superuser.fetch(ACLS):
        found[row["kind"], row["grantee"], row["privilege"]].add(row["name"])
    expected = {("schema", role, "USAGE"): {"farebox"} for role in FUNCTIONS}
    expected |= {("function", role, "EXECUTE"): names for role, names in FUNCTIONS.items()}
    expected |= {("relation", role, "SELECT"): names for role, names in TABLES.items()}
    assert dict(found) == expected


async def test_no_privilege_is_granted_in_advance(superuser: Connection) -> None:
    assert await superuser.fetch("SELECT * FROM pg_default_acl") == []


async def test_what_others_may_call_runs_as_the_owner_with_a_fixed_search_path(superuser: Connection) -> None:
    rows = await superuser.fetch(
        """
        SELECT p.proname, p.prosecdef, p.proconfig, p.proowner = c.relowner AS owned
          FROM pg_proc p, pg_class c
         WHERE p.pronamespace = 'farebox'::regnamespace AND c.oid = 'farebox.accounts'::regclass
        """
    )
    definers = {row["proname"] for row in rows if row["prosecdef"]}
    assert definers == GATEWAY | CONTROL | {"schema_version"}
    for row in rows:
        assert row["owned"], row["proname"]
        if row["prosecdef"]:
            assert "search_path=pg_catalog, pg_temp" in row["proconfig"], row["proname"]


async def test_the_roles_can_do_nothing_by_themselves(superuser: Connection) -> None:
    rows = await superuser.fetch(
        """
        SELECT rolname,
               rolcanlogin OR rolsuper OR rolcreaterole OR rolcreatedb OR rolbypassrls OR rolreplication AS might
          FROM pg_roles WHERE rolname = ANY ($1)
        """,
        [role.value for role in Role],
    )
    assert {row["rolname"]: row["might"] for row in rows} == {role.value: False for role in Role}
    owner = await superuser.fetchrow(
        """
        SELECT r.rolsuper, r.rolbypassrls
          FROM pg_class c JOIN pg_roles r ON r.oid = c.relowner
         WHERE c.oid = 'farebox.accounts'::regclass
        """
    )
    assert tuple(owner or ()) == (False, False), "these tests must run on a schema whose owner is nobody special"


REFUSED = {
    Role.GATEWAY: [
        "SELECT * FROM farebox.accounts",
        "SELECT * FROM farebox.api_keys",
        "SELECT * FROM farebox.schema_migrations",
        "SELECT farebox.grant_credits(gen_random_uuid(), 'grant', 1, NULL, 'x', 'x')",
        "SELECT farebox.reverse(gen_random_uuid(), NULL, NULL, 'x', 'x')",
        "SELECT farebox.redeem_promo(gen_random_uuid(), 'x', 'x')",
        "SELECT farebox.revoke_key('x')",
        "SELECT * FROM farebox.audit()",
        "SELECT * FROM farebox.audit_since_last(1)",
        "SELECT farebox.seal(1, '0')",
        "SELECT * FROM farebox.seals",
        "SELECT * FROM farebox.auditing FOR UPDATE",
        "SELECT * FROM farebox.sealing FOR UPDATE",
        "UPDATE farebox.audit_marks SET version = 1",
        "SELECT farebox.open_purse(gen_random_uuid())",
        "SELECT farebox.write_down(NULL, NULL, NULL, NULL, now())",
        "SELECT farebox.count_spend('x', 1, 1)",
        "CREATE TABLE farebox.mine (x integer)",
        "UPDATE farebox.workers SET lease_until = 'infinity'",
    ],
    Role.CONTROL: [
        "INSERT INTO farebox.transfers SELECT * FROM farebox.transfers",
        "UPDATE farebox.accounts SET balance = 1",
        "DELETE FROM farebox.api_keys",
        "SELECT farebox.expire_holds(1, '0')",
        "INSERT INTO farebox.audit_marks SELECT id, version, balance, debt FROM farebox.accounts",
        "UPDATE farebox.auditing SET clean_at = now()",
        "INSERT INTO farebox.seals SELECT * FROM farebox.seals",
        "DELETE FROM farebox.seals",
        "SELECT farebox.start_worker(gen_random_uuid(), 'x', 'x')",
        "SELECT farebox.set_spend_limit('x', 1)",
        "TRUNCATE farebox.transfers",
        "SELECT farebox.tell('x', gen_random_uuid(), 'x')",
        "CREATE TABLE farebox.mine (x integer)",
    ],
    Role.READER: [
        "SELECT * FROM farebox.api_keys",
        "SELECT * FROM farebox.price_versions",
        "SELECT * FROM farebox.workers",
        "UPDATE farebox.accounts SET balance = 1",
        "SELECT farebox.find_key('x')",
        "SELECT farebox.put_price_version('x', 'x')",
    ],
    None: ["SELECT * FROM farebox.accounts", "SELECT farebox.find_key('x')", "SELECT * FROM farebox.schema_version()"],
}


@pytest.mark.parametrize(("role", "statement"), [(role, text) for role, texts in REFUSED.items() for text in texts])
async def test_is_refused(bank: Bank, role: Role | None, statement: str) -> None:
    connection = await connect(bank.database.app, role)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.execute(statement)
    await connection.close()


async def test_a_role_cant_become_another(bank: Bank) -> None:
    """A connection's role comes from its login: what can be injected into a query must not change it for long."""
    connection = await connect(bank.database.app, Role.READER)
    assert await connection.fetchval("SELECT current_user") == "farebox_reader"
    await connection.execute("RESET ALL")
    assert await connection.fetchval("SELECT current_user") == "farebox_reader"
    await connection.close()
