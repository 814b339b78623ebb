-- The only functions that change what an account has. Whoever calls them has locked the account.

CREATE FUNCTION farebox.open_purse(_account_id uuid) RETURNS farebox.purse
LANGUAGE sql AS $$
    SELECT a.id, a.balance, a.held, a.debt, a.version,
           EXISTS (SELECT FROM farebox.spend_limits s WHERE s.account_id = a.id),
           NULL::text, 0::bigint, 0::bigint, 0::bigint
      FROM farebox.accounts a
     WHERE a.id = _account_id
$$;

-- THE money rule: _freed leaves a hold (negative: enters one), then _due leaves the account (negative: comes in).
-- What is due is taken from what is available, which no other hold's credits are; receivable lends the rest, as debt.
-- And debt takes what is available in the end, before anything else can.
CREATE FUNCTION farebox.moved(INOUT purse farebox.purse, _kind text, _due bigint, _freed bigint)
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    purse.held := purse.held - _freed;
    purse.kind := _kind;
    purse.due := _due;
    purse.lent := CASE WHEN _due > 0 THEN greatest(_due - (purse.balance - purse.held), 0) ELSE 0 END;
    purse.balance := purse.balance + purse.lent - _due;
    purse.debt := purse.debt + purse.lent;
    purse.paid := least(purse.debt, purse.balance - purse.held);
    purse.balance := purse.balance - purse.paid;
    purse.debt := purse.debt - purse.paid;
    -- Each of the three is a transfer and takes a version.
    purse.version := purse.version + (purse.lent > 0)::integer + (_due <> 0)::integer + (purse.paid > 0)::integer;
END
$$;

CREATE FUNCTION farebox.a_move(
    _purse farebox.purse, _hold_id uuid,
    _reference text DEFAULT NULL, _actor text DEFAULT NULL, _reason text DEFAULT NULL
) RETURNS farebox.move
LANGUAGE sql IMMUTABLE AS $$
    SELECT ROW(_purse.account_id, _purse.kind, _purse.due, _purse.lent, _purse.paid, _purse.balance, _purse.debt,
               _purse.version, _hold_id, _reference, _actor, _reason)::farebox.move
$$;

-- Writes down what was decided: the only statements that write accounts, transfers and the ends of holds.
-- Moves stand in their order; a purse that stands for its account is the last state of it.
CREATE FUNCTION farebox.write_down(
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
               (m.kind, CASE WHEN m.due > 0 THEN 'debit' ELSE 'credit' END,
                CASE m.kind WHEN 'grant' THEN 'grants' ELSE 'revenue' END,
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

-- What the key's family may still hold or spend; NULL: no limit.
CREATE FUNCTION farebox.spend_left(_key_id text) RETURNS bigint
LANGUAGE sql AS $$
    SELECT greatest(s.spend_limit - s.spent - s.held, 0)
      FROM farebox.api_keys k JOIN farebox.spend_limits s USING (family)
     WHERE k.id = _key_id
$$;

-- The family's own count, kept only while it has a limit.
CREATE FUNCTION farebox.count_spend(_key_id text, _held bigint, _spent bigint) RETURNS void
LANGUAGE sql AS $$
    UPDATE farebox.spend_limits s
       SET held = s.held + _held, spent = s.spent + _spent
      FROM farebox.api_keys k
     WHERE k.id = _key_id AND s.family = k.family
$$;

-- Ends a hold with _charge in all: one that is open (_amount), provisional (_charged before), or never seen (no state).
CREATE FUNCTION farebox.settled(
    INOUT purse farebox.purse, _state text, _amount bigint, _charged bigint, _key_id text, _charge bigint
)
LANGUAGE plpgsql AS $$
DECLARE
    freed bigint := CASE _state WHEN 'open' THEN _amount ELSE 0 END;
    due bigint := _charge - coalesce(_charged, 0);
BEGIN
    purse := farebox.moved(purse, CASE _state WHEN 'provisional' THEN 'true_up' ELSE 'charge' END, due, freed);
    IF purse.limited THEN
        PERFORM farebox.count_spend(_key_id, -freed, due);
    END IF;
END
$$;
