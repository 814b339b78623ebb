-- The only functions that change an account's money. Each takes the purse of a locked account and hands it back.

CREATE FUNCTION farebox.open_purse(_account_id uuid) RETURNS farebox.purse
LANGUAGE sql AS $$
    SELECT a.id, a.balance, a.held, a.debt, a.version,
           EXISTS (SELECT FROM farebox.spend_limits s WHERE s.account_id = a.id),
           NULL::text, 0::bigint, 0::bigint, NULL::bigint
      FROM farebox.accounts a
     WHERE a.id = _account_id
$$;

CREATE FUNCTION farebox.store_purse(_purse farebox.purse) RETURNS void
LANGUAGE sql AS $$
    UPDATE farebox.accounts
       SET balance = _purse.balance, held = _purse.held, debt = _purse.debt, version = _purse.version
     WHERE id = _purse.account_id
$$;

-- Writes one transfer: the only INSERT into the book. Debt is what receivable has lent.
CREATE FUNCTION farebox.post(
    INOUT purse farebox.purse,
    _kind text,
    _side text,
    _system_account text,
    _amount bigint,
    _at timestamptz,
    _hold_id uuid,
    _reference text DEFAULT NULL,
    _actor text DEFAULT NULL,
    _reason text DEFAULT NULL
)
LANGUAGE plpgsql AS $$
DECLARE
    signed bigint := CASE _side WHEN 'credit' THEN _amount ELSE -_amount END;
BEGIN
    purse.version := purse.version + 1;
    purse.balance := purse.balance + signed;
    IF _system_account = 'receivable' THEN
        purse.debt := purse.debt + signed;
    END IF;
    INSERT INTO farebox.transfers (
        account_id, version, kind, account_side, system_account, amount, balance_after, debt_after,
        hold_id, reference, actor, reason, created_at
    ) VALUES (
        purse.account_id, purse.version, _kind, _side, _system_account, _amount, purse.balance, purse.debt,
        _hold_id, _reference, _actor, _reason, _at
    );
END
$$;

-- Debt takes whatever has become available, before anything else can.
CREATE FUNCTION farebox.pay_debt(INOUT purse farebox.purse, _at timestamptz, _hold_id uuid)
LANGUAGE plpgsql AS $$
DECLARE
    payment bigint := least(purse.debt, purse.balance - purse.held);
BEGIN
    IF payment > 0 THEN
        purse := farebox.post(purse, 'debt_payment', 'debit', 'receivable', payment, _at, _hold_id);
    END IF;
END
$$;

-- The key family's own count, kept only while it has a limit.
CREATE FUNCTION farebox.count_spend(_key_id text, _held bigint, _spent bigint) RETURNS void
LANGUAGE sql AS $$
    UPDATE farebox.spend_limits s
       SET held = s.held + _held, spent = s.spent + _spent
      FROM farebox.api_keys k
     WHERE k.id = _key_id AND s.family = k.family
$$;

-- What the key's family may still hold or spend; NULL: no limit.
CREATE FUNCTION farebox.spend_left(_key_id text) RETURNS bigint
LANGUAGE sql AS $$
    SELECT greatest(s.spend_limit - s.spent - s.held, 0)
      FROM farebox.api_keys k JOIN farebox.spend_limits s USING (family)
     WHERE k.id = _key_id
$$;

-- THE money rule: ends a hold (open, provisional, or never seen: no state) with _charge in all, and says so in the purse.
-- Its own hold pays first, then what is available, never another hold; the rest is lent by receivable and stays as debt.
CREATE FUNCTION farebox.settle(INOUT purse farebox.purse, _hold farebox.holds, _charge bigint, _at timestamptz)
LANGUAGE plpgsql AS $$
DECLARE
    freed bigint := CASE WHEN _hold.state = 'open' THEN _hold.amount ELSE 0 END;
    due bigint := _charge - coalesce(_hold.charge, 0);
    lent bigint := 0;
BEGIN
    purse.held := purse.held - freed;
    IF due > 0 THEN
        lent := greatest(due - (purse.balance - purse.held), 0);
        IF lent > 0 THEN
            purse := farebox.post(purse, 'overrun', 'credit', 'receivable', lent, _at, _hold.id);
        END IF;
        purse := farebox.post(
            purse, CASE _hold.state WHEN 'provisional' THEN 'true_up' ELSE 'charge' END,
            'debit', 'revenue', due, _at, _hold.id
        );
    ELSIF due < 0 THEN
        purse := farebox.post(purse, 'true_up', 'credit', 'revenue', -due, _at, _hold.id);
    END IF;
    IF purse.debt > 0 THEN
        purse := farebox.pay_debt(purse, _at, _hold.id);
    END IF;
    IF purse.limited THEN
        PERFORM farebox.count_spend(_hold.key_id, -freed, due);
    END IF;
    purse.amount := _charge;
    purse.overrun := coalesce(_hold.overrun, 0) + lent;
END
$$;
