-- Idempotency-Key: which hold a client's own word for a call stands for, and, where the operator wants it, the answer.
-- serves code from: 1

-- One row for each word of an account. What it stands for at the moment follows from its hold (claim_key says how), so
-- that no crash leaves anything to clean up. key_hash: the word's SHA-256, since clients put names into it.
-- No foreign keys: a claim is made before its hold.
CREATE TABLE farebox.idempotency_keys (
    account_id uuid NOT NULL,
    key_hash bytea NOT NULL CHECK (length(key_hash) = 32),
    fingerprint bytea NOT NULL,
    hold_id uuid NOT NULL,
    worker_id uuid NOT NULL,
    claimed_at timestamptz NOT NULL,
    PRIMARY KEY (account_id, key_hash)
) WITH (fillfactor = 90, autovacuum_vacuum_scale_factor = 0.02);
-- Small, and no hindrance to an update in place; only the removal of old rows looks here.
CREATE INDEX idempotency_keys_age ON farebox.idempotency_keys USING brin (claimed_at) WITH (autosummarize = on);

-- Whole answers, kept for a while. Unlogged: they are a convenience, and their text shall not be in the write-ahead log,
-- its archives and the standbys. A crash of PostgreSQL empties the table, and their keys are then merely used up.
CREATE UNLOGGED TABLE farebox.idempotency_answers (
    hold_id uuid PRIMARY KEY,
    head text NOT NULL,
    body bytea NOT NULL,
    expires_at timestamptz NOT NULL
);
CREATE INDEX idempotency_answers_age ON farebox.idempotency_answers (expires_at);
