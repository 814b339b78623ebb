-- What brings credits in: a transfer and its lot, in one.

-- Lots of a lower number are drawn first: what was given before what was paid for, promotions before all.
CREATE FUNCTION farebox.priority_of(_lot_kind text) RETURNS integer
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE _lot_kind WHEN 'promo' THEN 100 WHEN 'granted' THEN 200 WHEN 'paid' THEN 300 END
$$;

-- Credits the account, once for each (kind, reference). The caller has taken lock_reference(_kind, _reference) first and
-- then locked the account. transfer_*: the row that this call or an earlier one wrote. NULL priority: the kind's own.
CREATE FUNCTION farebox.credited(
    _account_id uuid, _kind text, _amount bigint, _reference text, _actor text, _reason text,
    _lot_kind text, _expires_at timestamptz, _priority integer, _order_id uuid,
    OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint
)
LANGUAGE plpgsql AS $$
DECLARE
    purse farebox.purse;
    known farebox.transfers;
    at timestamptz;
BEGIN
    IF _kind IN ('grant', 'promo', 'purchase', 'plan') IS NOT TRUE THEN
        RAISE EXCEPTION 'no such kind of grant: %', _kind USING ERRCODE = '22023';
    END IF;
    IF _amount > 0 IS NOT TRUE THEN
        RAISE EXCEPTION 'a grant of % microcredits', _amount USING ERRCODE = '22023';
    END IF;
    SELECT * INTO known FROM farebox.transfers t WHERE t.kind = _kind AND t.reference = _reference;
    IF known.version IS NOT NULL THEN
        outcome := CASE WHEN known.account_id = _account_id AND known.amount = _amount THEN 'done' ELSE 'conflict' END;
        transfer_account := known.account_id;
        transfer_version := known.version;
        RETURN;
    END IF;
    purse := farebox.open_purse(_account_id);
    outcome := CASE
        WHEN purse IS NULL THEN 'unknown'
        -- Some room below what 64 bits carry, for sums.
        WHEN purse.balance > 1000000000000000000 - _amount THEN 'above_limit'
        ELSE 'done'
    END;
    IF outcome <> 'done' THEN
        RETURN;
    END IF;
    at := clock_timestamp();
    transfer_account := _account_id;
    transfer_version := purse.version + 1;
    purse := farebox.moved(purse, _kind, -_amount, 0);
    PERFORM farebox.write_down(
        ARRAY[purse], ARRAY[farebox.a_move(purse, NULL, _reference, _actor, _reason)], NULL, NULL, at
    );
    INSERT INTO farebox.lots (
        account_id, version, kind, amount, remaining, priority, expires_at, order_id, created_at
    ) VALUES (
        _account_id, transfer_version, _lot_kind, _amount, _amount, coalesce(_priority, farebox.priority_of(_lot_kind)),
        _expires_at, _order_id, at
    );
END
$$;
