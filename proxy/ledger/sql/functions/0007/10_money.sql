-- The book's kinds of transfers, and what brings credits in or takes them back out.

-- The system account that a kind moves credits from or to. Overruns and debt payments name theirs themselves.
CREATE FUNCTION farebox.system_side(_kind text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE _kind
        WHEN 'charge' THEN 'revenue' WHEN 'true_up' THEN 'revenue' WHEN 'reversal' THEN 'revenue'
        WHEN 'grant' THEN 'grants' WHEN 'promo' THEN 'grants'
        WHEN 'purchase' THEN 'stripe' WHEN 'plan' THEN 'stripe'
        WHEN 'refund' THEN 'refunds' WHEN 'refund_return' THEN 'refunds'
        WHEN 'dispute' THEN 'disputes' WHEN 'dispute_return' THEN 'disputes'
        WHEN 'expiry' THEN 'expired'
    END
$$;

-- A transfer's name, and between whom it moves credits, belong together.
CREATE OR REPLACE FUNCTION farebox.named_rightly(_row farebox.transfers) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE
        WHEN _row.kind = 'overrun' THEN _row.account_side = 'credit' AND _row.system_account = 'receivable'
        WHEN _row.kind = 'debt_payment' THEN _row.account_side = 'debit' AND _row.system_account = 'receivable'
        WHEN _row.system_account = farebox.system_side(_row.kind) THEN CASE
            WHEN _row.kind = 'true_up' THEN true
            WHEN _row.kind = 'charge' THEN _row.account_side = 'debit'
            WHEN _row.kind = 'reversal' THEN _row.account_side = 'credit'
            WHEN _row.kind IN ('refund', 'dispute', 'expiry') THEN _row.account_side = 'debit' AND _row.hold_id IS NULL
            ELSE _row.account_side = 'credit' AND _row.hold_id IS NULL
        END
        ELSE false
    END
$$;

-- Writes down what was decided: the only statements that write accounts, transfers and the ends of holds.
-- Moves stand in their order; a purse that stands for its account is the last state of it.
CREATE OR REPLACE FUNCTION farebox.write_down(
    _purses farebox.purse[], _moves farebox.move[], _new_holds farebox.holds[], _changed_holds farebox.holds[],
    _at timestamptz
) RETURNS void
LANGUAGE plpgsql
-- One plan whatever the tables' size: each row by its key. Planned while a table was empty, it must never scan it.
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
BEGIN
    INSERT INTO farebox.holds SELECT n.* FROM unnest(_new_holds) AS n;

    UPDATE farebox.holds AS h
       SET state = c.state, amount = c.amount, charge = c.charge, overrun = c.overrun, reversed = c.reversed,
           usage = c.usage, usage_source = c.usage_source, capped = c.capped, ending = c.ending, receipt = c.receipt,
           settle_fingerprint = c.settle_fingerprint, ended_at = c.ended_at, price_version = c.price_version,
           model = c.model, variant = c.variant
      FROM unnest(_changed_holds) AS c
     WHERE h.id = c.id;

    INSERT INTO farebox.transfers (
        account_id, version, kind, account_side, system_account, amount, balance_after, debt_after,
        hold_id, reference, actor, reason, created_at
    )
    SELECT m.account_id, m.version - t.later, t.kind, t.side, t.system_account, t.amount, m.balance + t.owned,
           m.debt + t.owed, m.hold_id, CASE t.kind WHEN m.kind THEN m.reference END, m.actor, m.reason, _at
      FROM unnest(_moves) AS m,
           -- later, owned, owed: what came after, taken back out of the version, the balance and the debt.
           LATERAL (VALUES
               ('overrun', 'credit', 'receivable', m.lent, 1, m.due, 0),
               (m.kind, CASE WHEN m.due > 0 THEN 'debit' ELSE 'credit' END, farebox.system_side(m.kind),
                abs(m.due), (m.paid > 0)::integer, m.paid, m.paid),
               ('debt_payment', 'debit', 'receivable', m.paid, 0, 0, 0)
           ) AS t (kind, side, system_account, amount, later, owned, owed)
     WHERE t.amount > 0;

    UPDATE farebox.accounts AS a
       SET balance = p.balance, held = p.held, debt = p.debt, version = p.version
      FROM unnest(_purses) AS p
     WHERE a.id = p.account_id;
END
$$;
