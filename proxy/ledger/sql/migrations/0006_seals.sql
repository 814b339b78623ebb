-- Seals over the book, and marks of how far it was audited.
-- serves code from: 1

-- Of each account a chain of blocks: the transfers since the block before up to last_version, and holds that ended
-- since. head covers the block and the head before it, so that no row can change, vanish or appear in a block unseen.
-- A digest for each hold, in the order of hold_ids. A provisional end may be trued up yet: its digest counts for as long
-- as the hold stays provisional.
-- ended_to: the latest end of a hold in the block; NULL where there is none.
CREATE TABLE farebox.seals (
    account_id uuid NOT NULL,
    number bigint NOT NULL CHECK (number > 0),
    last_version bigint NOT NULL CHECK (last_version >= 0),
    transfers_digest bytea NOT NULL,
    hold_ids uuid[] NOT NULL,
    hold_digests bytea[] NOT NULL,
    provisional_ids uuid[] NOT NULL,
    provisional_digests bytea[] NOT NULL,
    ended_to timestamptz,
    sealed_at timestamptz NOT NULL,
    head bytea NOT NULL,
    PRIMARY KEY (account_id, number)
);
CREATE INDEX seals_ended_to ON farebox.seals (ended_to) WHERE ended_to IS NOT NULL;

-- One row, whose lock makes one sealer at a time: nobody but the owner's functions can take it.
-- holds_to: holds that ended up to then are sealed, but for those that were being written at that moment.
CREATE TABLE farebox.sealing (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    holds_to timestamptz NOT NULL
);
INSERT INTO farebox.sealing (holds_to) VALUES ('-infinity');

-- How far each account was audited, and what it had there. Written by the audit itself, from what it saw to be right.
CREATE TABLE farebox.audit_marks (
    account_id uuid PRIMARY KEY,
    version bigint NOT NULL,
    balance bigint NOT NULL,
    debt bigint NOT NULL
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02);

-- One row, as of sealing. clean_at: when the audit last found nothing wrong. ended_to: holds that ended up to then were
-- looked at; prices_to: price versions likewise.
CREATE TABLE farebox.auditing (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    clean_at timestamptz,
    ended_to timestamptz NOT NULL,
    prices_to timestamptz NOT NULL
);
INSERT INTO farebox.auditing (ended_to, prices_to) VALUES ('-infinity', '-infinity');

-- By these the sealer and the audit find what is new, and what belongs to a hold, without reading everything.
-- On tables of many millions an operator makes both beforehand, CONCURRENTLY: docs/operations.md says how.
CREATE INDEX IF NOT EXISTS holds_ended ON farebox.holds (ended_at) WHERE state <> 'open';
CREATE INDEX IF NOT EXISTS transfers_of_a_hold ON farebox.transfers (hold_id) WHERE kind IN ('overrun', 'reversal');

-- Their work is done by fewer and faster ones now.
DROP FUNCTION farebox.audit_accounts, farebox.audit_chain, farebox.audit_charges, farebox.audit_kinds,
    farebox.audit_prices;
