-- What disputes of Stripe's do: they freeze the account, take the credits where the bank has taken the money, and give
-- them back where it has come back.

-- Take it before a dispute is fetched: of two answers the one that was asked for later stands.
CREATE FUNCTION farebox.ask_dispute() RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT nextval('farebox.dispute_questions')
$$;

-- Whether a dispute in this status freezes its account (true), lifts what it froze (false), or leaves it (NULL): an
-- inquiry is only a question, and a dispute that was prevented is settled by a refund. A status that we don't know may
-- be any trouble.
CREATE FUNCTION farebox.dispute_freezes(_status text) RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN _status = 'won' THEN false
        WHEN _status = 'prevented' OR starts_with(_status, 'warning_') THEN NULL
        ELSE true
    END
$$;

-- Freezes the account for this dispute, or lifts that. What an operator has lifted is not put back by the same dispute;
-- what was lifted because it was won is, should the bank come back upon it. True: it is frozen by this call.
CREATE FUNCTION farebox.freeze_for_dispute(
    _account_id uuid, _dispute_id text, _status text, _payment_intent text
) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    froze boolean := farebox.dispute_freezes(_status);
    standing text;
    won integer;
BEGIN
    SELECT max(f.reference) FILTER (WHERE f.lifted_at IS NULL), count(*) FILTER (WHERE f.lifted_by = 'stripe')
      INTO standing, won
      FROM farebox.freezes f
     WHERE f.account_id = _account_id
       AND (f.reference = _dispute_id OR starts_with(f.reference, _dispute_id || ':'));
    IF froze AND standing IS NULL THEN
        RETURN farebox.frozen(
            _account_id, farebox.dispute_reference(_dispute_id, won + 1), 'payment ' || _payment_intent || ' is disputed',
            'stripe'
        );
    END IF;
    IF NOT froze AND standing IS NOT NULL THEN
        PERFORM farebox.thawed(_account_id, standing, 'stripe');
    END IF;
    RETURN false;
END
$$;

-- A dispute as fetched from Stripe. _withdrawn: the bank has the money; _asked: ask_dispute() before it was fetched.
-- In another currency than the order's it counts as a dispute of the whole payment.
-- Outcomes: taken, returned (moved says how much: negative), known (nothing moved), stale (what was asked for later is
-- known), not_ours, not_paid, conflict, as of refunds. froze: the account is frozen by this call.
CREATE FUNCTION farebox.apply_dispute(
    _dispute_id text, _payment_intent text, _amount bigint, _currency text, _status text, _withdrawn boolean,
    _asked bigint,
    OUT outcome text, OUT order_id uuid, OUT account_id uuid, OUT moved bigint, OUT froze boolean
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    payer uuid;
    sold farebox.orders;
    known farebox.disputes;
    gone_before bigint;
    gone bigint;
BEGIN
    moved := 0;
    froze := false;
    PERFORM farebox.lock_reference('dispute', _dispute_id);
    SELECT o.account_id INTO payer FROM farebox.orders o WHERE o.payment_intent = _payment_intent;
    PERFORM farebox.lock_accounts(ARRAY[payer], NULL);
    -- One that was paid since then isn't found yet: its account is not locked. Who asks again finds it.
    SELECT * INTO sold FROM farebox.orders o
     WHERE o.payment_intent = _payment_intent AND o.account_id = payer
       FOR UPDATE;
    SELECT * INTO known FROM farebox.disputes d WHERE d.id = _dispute_id;
    order_id := sold.id;
    account_id := sold.account_id;
    outcome := CASE
        WHEN sold.id IS NULL THEN 'not_ours'
        WHEN sold.state <> 'paid' THEN 'not_paid'
        WHEN known.order_id <> sold.id THEN 'conflict'
        WHEN known.asked > _asked THEN 'stale'
    END;
    IF outcome IS NOT NULL THEN
        RETURN;
    END IF;
    gone_before := CASE WHEN known.withdrawn THEN known.amount ELSE 0 END;
    INSERT INTO farebox.disputes AS d (id, order_id, amount, status, asked, withdrawn)
    VALUES (
        _dispute_id, sold.id,
        CASE WHEN _currency = sold.currency THEN _amount ELSE greatest(sold.received, 1) END,
        _status, _asked, coalesce(_withdrawn, false)
    )
    ON CONFLICT (id) DO UPDATE
       SET amount = excluded.amount, status = excluded.status, asked = excluded.asked, withdrawn = excluded.withdrawn,
           changed_at = CASE
               WHEN (d.amount, d.status, d.withdrawn) = (excluded.amount, excluded.status, excluded.withdrawn)
               THEN d.changed_at ELSE clock_timestamp()
           END
    RETURNING d.* INTO known;
    froze := farebox.freeze_for_dispute(sold.account_id, _dispute_id, _status, _payment_intent);
    gone := CASE WHEN known.withdrawn THEN known.amount ELSE 0 END;
    IF gone <> gone_before THEN
        moved := farebox.settle_takings(
            sold.id, 'dispute', farebox.dispute_reference(
                _dispute_id, 1 + CASE WHEN gone > gone_before THEN known.takings ELSE known.returns END
            ), gone > gone_before, 'dispute of order ' || sold.id, 0, 0
        );
        UPDATE farebox.disputes AS d
           SET takings = d.takings + (gone > gone_before)::integer, returns = d.returns + (gone < gone_before)::integer
         WHERE d.id = _dispute_id;
    END IF;
    outcome := CASE WHEN moved > 0 THEN 'taken' WHEN moved < 0 THEN 'returned' ELSE 'known' END;
END
$$;

GRANT EXECUTE ON FUNCTION farebox.ask_dispute, farebox.apply_dispute TO farebox_control;
