-- What takes credits back from one purchase, and gives them again: refunds, disputes and the reservations before them.
-- For other functions here: the caller has locked the reference (farebox.lock_reference), then the account.

-- Takes _amount from the account: from the lot first, then from others as a charge would; what isn't available is lent,
-- as debt, and as far as it is the lot's but other holds have it, the debt takes it there when they end.
-- _at_most_lot: only what the lot has free, and only what is available.
-- _freed: what a hold had, which ends with this; its row is the caller's to change.
-- Outcomes: done, also where (_kind, _reference) was taken before, by this account; conflict, by another account;
-- nothing: there was nothing to take. transfer_version: the taking's; taken: what it took, of which lent was lent.
CREATE FUNCTION farebox.take(
    _account_id uuid, _kind text, _amount bigint, _reference text, _actor text, _reason text,
    _lot_version bigint, _at_most_lot boolean, _freed bigint DEFAULT 0,
    OUT outcome text, OUT transfer_version bigint, OUT taken bigint, OUT lent bigint
)
LANGUAGE plpgsql AS $$
DECLARE
    known farebox.transfers;
    purse farebox.purse;
    mark bigint;
BEGIN
    IF _kind IN ('refund', 'dispute', 'expiry') IS NOT TRUE THEN
        RAISE EXCEPTION 'no such kind of taking: %', _kind USING ERRCODE = '22023';
    END IF;
    IF _amount >= 0 IS NOT TRUE OR _freed >= 0 IS NOT TRUE THEN
        RAISE EXCEPTION 'a taking of % microcredits, % freed', _amount, _freed USING ERRCODE = '22023';
    END IF;
    lent := 0;
    SELECT * INTO known FROM farebox.transfers t WHERE t.kind = _kind AND t.reference = _reference;
    IF known.version IS NOT NULL THEN
        outcome := CASE known.account_id WHEN _account_id THEN 'done' ELSE 'conflict' END;
        taken := CASE known.account_id WHEN _account_id THEN known.amount ELSE 0 END;
        transfer_version := CASE known.account_id WHEN _account_id THEN known.version END;
        SELECT t.amount INTO lent
          FROM farebox.transfers t
         WHERE t.account_id = _account_id AND t.version = transfer_version - 1 AND t.kind = 'overrun';
        lent := coalesce(lent, 0);
        RETURN;
    END IF;
    PERFORM farebox.draw_lots(_account_id, NULL, NULL);
    purse := farebox.open_purse(_account_id);
    mark := purse.version;
    taken := _amount;
    IF _at_most_lot THEN
        SELECT least(_amount, l.remaining - l.reserved - l.owed, purse.balance - purse.held + _freed) INTO taken
          FROM farebox.lots l WHERE l.account_id = _account_id AND l.version = _lot_version;
        taken := coalesce(taken, 0);
    END IF;
    purse := farebox.moved(purse, CASE WHEN taken > 0 THEN _kind END, taken, _freed);
    PERFORM farebox.write_down(
        ARRAY[purse], ARRAY[farebox.a_move(purse, NULL, _reference, _actor, _reason)], NULL, NULL, clock_timestamp()
    );
    PERFORM farebox.draw_moves(_account_id, mark, purse.version, _lot_version, NULL);
    lent := purse.lent;
    IF taken > 0 THEN
        outcome := 'done';
        transfer_version := purse.version - (purse.paid > 0)::integer;
    ELSE
        outcome := 'nothing';
    END IF;
END
$$;

-- Gives back _amount of what refunds and disputes of one purchase took: into the lots it came from, the last drawn
-- first. _references: those of all its refunds and disputes, _lot_version: the lot that they were aimed at.
-- Outcomes: done, also where (_kind, _reference) was given back before; conflict: to another account.
CREATE FUNCTION farebox.give_back(
    _account_id uuid, _kind text, _amount bigint, _reference text, _actor text, _reason text,
    _lot_version bigint, _references text[],
    OUT outcome text, OUT transfer_version bigint
)
LANGUAGE plpgsql AS $$
DECLARE
    known farebox.transfers;
    purse farebox.purse;
    mark bigint;
BEGIN
    IF _kind IN ('refund_return', 'dispute_return') IS NOT TRUE THEN
        RAISE EXCEPTION 'no such kind of return: %', _kind USING ERRCODE = '22023';
    END IF;
    IF _amount > 0 IS NOT TRUE THEN
        RAISE EXCEPTION 'a return of % microcredits', _amount USING ERRCODE = '22023';
    END IF;
    SELECT * INTO known FROM farebox.transfers t WHERE t.kind = _kind AND t.reference = _reference;
    IF known.version IS NOT NULL THEN
        outcome := CASE known.account_id WHEN _account_id THEN 'done' ELSE 'conflict' END;
        transfer_version := CASE known.account_id WHEN _account_id THEN known.version END;
        RETURN;
    END IF;
    PERFORM farebox.draw_lots(_account_id, NULL, NULL);
    purse := farebox.open_purse(_account_id);
    mark := purse.version;
    purse := farebox.moved(purse, _kind, -_amount, 0);
    PERFORM farebox.write_down(
        ARRAY[purse], ARRAY[farebox.a_move(purse, NULL, _reference, _actor, _reason)], NULL, NULL, clock_timestamp()
    );
    PERFORM farebox.draw_moves(_account_id, mark, purse.version, _lot_version, _references);
    outcome := 'done';
    transfer_version := mark + 1;
END
$$;

-- Speaks for _amount of what the lot has free, or for as much as there is: a refund under way. Returns how much.
CREATE FUNCTION farebox.reserve_lot(_account_id uuid, _lot_version bigint, _amount bigint) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    part bigint;
BEGIN
    PERFORM farebox.draw_lots(_account_id, NULL, NULL);
    SELECT greatest(least(_amount, l.remaining - l.reserved - l.owed), 0) INTO part
      FROM farebox.lots l WHERE l.account_id = _account_id AND l.version = _lot_version;
    UPDATE farebox.lots AS l
       SET reserved = l.reserved + part
     WHERE l.account_id = _account_id AND l.version = _lot_version AND part > 0;
    RETURN coalesce(part, 0);
END
$$;

-- Takes back what reserve_lot returned. Its refund has ended, or is about to take it.
CREATE FUNCTION farebox.unreserve_lot(_account_id uuid, _lot_version bigint, _amount bigint) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM farebox.draw_lots(_account_id, NULL, NULL);
    UPDATE farebox.lots AS l
       SET reserved = greatest(l.reserved - _amount, 0)
     WHERE l.account_id = _account_id AND l.version = _lot_version AND l.reserved > 0 AND _amount > 0;
END
$$;
