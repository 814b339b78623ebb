-- The ledger's tables. Amounts are microcredits. Nothing but the owner touches them, save through the functions beside
-- this file and the SELECTs granted at its end.
-- serves code from: 1

-- Who pays. Half of each page stays free, so that the hottest rows are updated in place (HOT).
CREATE TABLE farebox.accounts (
    id uuid PRIMARY KEY,
    name text NOT NULL,
    external_id text UNIQUE,
    email text,
    balance bigint NOT NULL DEFAULT 0,
    held bigint NOT NULL DEFAULT 0,
    debt bigint NOT NULL DEFAULT 0,
    version bigint NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT held_not_negative CHECK (held >= 0),
    CONSTRAINT available_not_negative CHECK (balance - held >= 0),
    CONSTRAINT debt_not_negative CHECK (debt >= 0),
    CONSTRAINT debt_paid_first CHECK (debt = 0 OR balance = held)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02);

-- A credential of an account. family: the first key of its chain of rotations; a spend limit binds the whole family.
CREATE TABLE farebox.api_keys (
    id text PRIMARY KEY,
    account_id uuid NOT NULL REFERENCES farebox.accounts,
    family text NOT NULL REFERENCES farebox.api_keys,
    name text NOT NULL,
    secret_hmac bytea NOT NULL,
    pepper_version integer NOT NULL,
    scopes text[] NOT NULL,
    models text[],
    profile text,
    affordable_cap boolean NOT NULL,
    version integer NOT NULL DEFAULT 1,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz,
    revoked_at timestamptz,
    rotated_from text
);
CREATE INDEX api_keys_account ON farebox.api_keys (account_id);
CREATE INDEX api_keys_family ON farebox.api_keys (family);

-- A row only for a family of keys that has a limit: all others cost the hot path nothing.
CREATE TABLE farebox.spend_limits (
    family text PRIMARY KEY REFERENCES farebox.api_keys,
    account_id uuid NOT NULL,
    spend_limit bigint NOT NULL CHECK (spend_limit >= 0),
    spent bigint NOT NULL CHECK (spent >= 0),
    held bigint NOT NULL CHECK (held >= 0)
) WITH (fillfactor = 50);
CREATE INDEX spend_limits_account ON farebox.spend_limits (account_id);

-- One row per process start.
CREATE TABLE farebox.workers (
    id uuid PRIMARY KEY,
    hostname text NOT NULL,
    release text NOT NULL,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    lease_until timestamptz NOT NULL,
    stopped_at timestamptz
) WITH (fillfactor = 50);

-- Every catalog that ever served, by the SHA-256 of its body. Immutable.
CREATE TABLE farebox.price_versions (
    version text PRIMARY KEY CHECK (version ~ '^[0-9a-f]{64}$'),
    body text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- The price rows of those bodies, so that nothing has to take a large document apart on the hot path. Immutable.
CREATE TABLE farebox.prices (
    version text NOT NULL REFERENCES farebox.price_versions,
    model text NOT NULL,
    variant text NOT NULL,
    rates bigint[] NOT NULL,
    per_request bigint NOT NULL CHECK (per_request >= 0),
    PRIMARY KEY (version, model, variant),
    CONSTRAINT seven_rates CHECK (cardinality(rates) = 7 AND 0 <= ALL (rates))
);

-- Reservations, open and ended. Rows are never deleted: they are the tombstones and the receipts, too.
-- No foreign keys: each would lock the referenced row once more for every request.
CREATE TABLE farebox.holds (
    id uuid PRIMARY KEY,
    account_id uuid NOT NULL,
    state text NOT NULL,
    amount bigint NOT NULL CHECK (amount >= 0),
    key_id text,
    worker_id uuid,
    price_version text,
    model text,
    variant text,
    quote text,
    fingerprint bytea,
    mark bigint[],
    opened_at timestamptz NOT NULL,
    charge bigint CHECK (charge >= 0),
    overrun bigint NOT NULL DEFAULT 0 CHECK (overrun >= 0),
    reversed bigint NOT NULL DEFAULT 0 CHECK (reversed >= 0),
    usage bigint[] CHECK (cardinality(usage) = 7),
    usage_source text,
    capped text,
    ending text,
    receipt text,
    settle_fingerprint bytea,
    ended_at timestamptz,
    CONSTRAINT known_state CHECK (state IN ('open', 'released', 'final', 'provisional')),
    CONSTRAINT ended_has_charge CHECK ((state = 'open') = (charge IS NULL) AND (state = 'open') = (ended_at IS NULL)),
    CONSTRAINT reversed_within_charge CHECK (reversed <= coalesce(charge, 0))
) WITH (fillfactor = 60, autovacuum_vacuum_scale_factor = 0.02);
CREATE INDEX holds_open ON farebox.holds (worker_id) WHERE state = 'open';
CREATE INDEX holds_account ON farebox.holds (account_id, id) WHERE state <> 'open';

-- The book: one row debits one side and credits the other, so it sums to zero by construction. Exactly one side is the
-- customer, whose next version it takes; the other is a system name without a running balance. Append-only.
CREATE TABLE farebox.transfers (
    account_id uuid NOT NULL,
    version bigint NOT NULL,
    kind text NOT NULL,
    account_side text NOT NULL CHECK (account_side IN ('debit', 'credit')),
    system_account text NOT NULL CHECK (
        system_account IN ('revenue', 'stripe', 'grants', 'refunds', 'disputes', 'expired', 'receivable')
    ),
    amount bigint NOT NULL CHECK (amount > 0),
    balance_after bigint NOT NULL CHECK (balance_after >= 0),
    debt_after bigint NOT NULL CHECK (debt_after >= 0),
    hold_id uuid,
    reference text,
    actor text,
    reason text,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (account_id, version),
    CONSTRAINT known_kind CHECK (kind IN ('grant', 'charge', 'true_up', 'overrun', 'debt_payment', 'reversal'))
);
-- A hold is charged once and trued up once, whatever the functions do.
CREATE UNIQUE INDEX transfers_once_a_hold ON farebox.transfers (hold_id, kind) WHERE kind IN ('charge', 'true_up');
CREATE UNIQUE INDEX transfers_reference ON farebox.transfers (kind, reference) WHERE reference IS NOT NULL;

-- Values that the functions hand to each other.

-- An account's money while its row is locked, and what moved in it last: due left it (negative: came in) under kind, of
-- which receivable lent a part, and debt took paid of what had become available.
CREATE TYPE farebox.purse AS (
    account_id uuid,
    balance bigint,
    held bigint,
    debt bigint,
    version bigint,
    limited boolean,
    kind text,
    due bigint,
    lent bigint,
    paid bigint
);

-- What moved in a purse, to be written as up to three transfers; balance, debt and version are those after the last.
CREATE TYPE farebox.move AS (
    account_id uuid,
    kind text,
    due bigint,
    lent bigint,
    paid bigint,
    balance bigint,
    debt bigint,
    version bigint,
    hold_id uuid,
    reference text,
    actor text,
    reason text
);
