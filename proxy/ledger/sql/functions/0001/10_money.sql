-- The only functions that change what an account has. Whoever calls them has locked the account.

CREATE FUNCTION farebox.open_purse(_account_id uuid) RETURNS farebox.purse
LANGUAGE sql AS $$
    SELECT a.id, a.balance, a.held, a.debt, a.version,
           EXISTS (SELECT FROM farebox.spend_limits s WHERE s.account_id = a.id), NULL::text, 0::bigint, 0::bigint, 0::bigint
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
    _purse farebox.purse, _change text, _hold farebox.holds,
    _reference text DEFAULT NULL, _actor text DEFAULT NULL, _reason text DEFAULT NULL
) RETURNS farebox.move
LANGUAGE sql IMMUTABLE AS $$
    SELECT NULL::bigint, NULL::text, NULL::bigint, NULL::bigint, NULL::bigint, _purse, _change, _hold,
           _reference, _actor, _reason
$$;

-- Writes moves down, in their order: the only statements that write holds' ends, transfers and accounts.
CREATE FUNCTION farebox.write_moves(_moves farebox.move[], _at timestamptz) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO farebox.holds
    SELECT (m.hold).* FROM unnest(_moves) AS m WHERE m.change = 'insert';

    UPDATE farebox.holds AS h
       SET state = (m.hold).state, amount = (m.hold).amount, charge = (m.hold).charge, overrun = (m.hold).overrun,
           reversed = (m.hold).reversed, usage = (m.hold).usage, usage_source = (m.hold).usage_source,
           capped = (m.hold).capped, ending = (m.hold).ending, receipt = (m.hold).receipt,
           settle_fingerprint = (m.hold).settle_fingerprint, ended_at = (m.hold).ended_at,
           price_version = (m.hold).price_version, model = (m.hold).model, variant = (m.hold).variant
      FROM unnest(_moves) AS m
     WHERE m.change = 'update' AND h.id = (m.hold).id;

    -- The purse is as it was after the last of a move's transfers; later ones are taken back out for the earlier.
    INSERT INTO farebox.transfers (
        account_id, version, kind, account_side, system_account, amount, balance_after, debt_after,
        hold_id, reference, actor, reason, created_at
    )
    SELECT p.account_id, p.version - t.later, t.kind, t.side, t.system_account, t.amount, p.balance + t.owned, p.debt + t.owed,
           (m.hold).id, CASE t.kind WHEN p.kind THEN m.reference END, m.actor, m.reason, _at
      FROM unnest(_moves) AS m,
           LATERAL (SELECT (m.purse).*) AS p,
           LATERAL (VALUES
               ('overrun', 'credit', 'receivable', p.lent, 1, p.due, 0),
               (p.kind, CASE WHEN p.due > 0 THEN 'debit' ELSE 'credit' END,
                CASE p.kind WHEN 'grant' THEN 'grants' ELSE 'revenue' END,
                abs(p.due), (p.paid > 0)::integer, p.paid, p.paid),
               ('debt_payment', 'debit', 'receivable', p.paid, 0, 0, 0)
           ) AS t (kind, side, system_account, amount, later, owned, owed)
     WHERE m.change IS NOT NULL AND (p.due <> 0 OR p.paid > 0) AND t.amount > 0;

    UPDATE farebox.accounts AS a
       SET balance = (last.purse).balance, held = (last.purse).held, debt = (last.purse).debt,
           version = (last.purse).version
      FROM (
          SELECT DISTINCT ON ((m.purse).account_id) m.purse
            FROM unnest(_moves) WITH ORDINALITY AS m
           WHERE m.change IS NOT NULL
           ORDER BY (m.purse).account_id, m.ordinality DESC
      ) AS last
     WHERE a.id = (last.purse).account_id;
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

-- Ends a hold with _charge in all: one that is open (_amount), provisional (_charged before), or was never seen (no state).
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
