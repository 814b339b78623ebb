-- What Stripe's refunds take back of a purchase, and what `farebox refund` holds until Stripe has answered.

-- Of what was received, how much went back by now: refunds that stand, and disputes that have the money.
CREATE FUNCTION farebox.gone_back(_order_id uuid) RETURNS bigint
LANGUAGE sql STABLE AS $$
    SELECT least(
        (SELECT o.received FROM farebox.orders o WHERE o.id = _order_id),
        (SELECT coalesce(sum(r.amount), 0) FROM farebox.stripe_refunds r WHERE r.order_id = _order_id AND r.active)
        + (SELECT coalesce(sum(d.amount), 0) FROM farebox.disputes d WHERE d.order_id = _order_id AND d.withdrawn)
    )::bigint
$$;

-- How many of the credits go with so much of the money, rounded down.
CREATE FUNCTION farebox.share_of(_credits bigint, _money bigint, _received bigint) RETURNS bigint
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN _received > 0 THEN div(_credits::numeric * _money, _received)::bigint ELSE 0 END
$$;

-- What a dispute's n-th taking is called, and its n-th return.
CREATE FUNCTION farebox.dispute_reference(_dispute_id text, _n integer) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT _dispute_id || CASE WHEN _n > 1 THEN ':' || _n ELSE '' END
$$;

-- What all takings from the order's credits (_suffix '') or bonus (':bonus') may be called.
CREATE FUNCTION farebox.taking_references(_order_id uuid, _suffix text) RETURNS text[]
LANGUAGE sql STABLE AS $$
    SELECT ARRAY(
        SELECT r.id || _suffix FROM farebox.stripe_refunds r WHERE r.order_id = _order_id
        UNION ALL
        SELECT farebox.dispute_reference(d.id, n) || _suffix
          FROM farebox.disputes d, generate_series(1, greatest(d.takings, d.returns)) AS n
         WHERE d.order_id = _order_id
    )
$$;

-- Brings what was taken of an order to what its refunds and disputes come to, whatever came in which order: the
-- difference leaves the account as _kind, or comes back as _kind || '_return'. Credits that were spent are lent, as debt;
-- of the bonus goes only what is left. _more: whether more of the money has gone back than before, or less. _freed,
-- _freed_bonus: what a hold had for it, which ends with this. What another request of the order holds is taken first,
-- and the request holds what is left for it: Stripe may refuse its refund, and this has gone. Of what comes back it holds
-- again what it needs.
-- The caller has taken lock_reference, locked the account, and seen that this is news: it is done once for each change.
-- moved: the credits that left; negative: that came back.
CREATE FUNCTION farebox.settle_takings(
    _order_id uuid, _kind text, _reference text, _more boolean, _reason text, _freed bigint, _freed_bonus bigint,
    OUT moved bigint
)
LANGUAGE plpgsql AS $$
DECLARE
    sold farebox.orders;
    back bigint := farebox.gone_back(_order_id);
    due bigint;
    due_bonus bigint;
    waiting farebox.refund_requests;
    freed bigint := _freed;
    took record;
BEGIN
    SELECT * INTO sold FROM farebox.orders o WHERE o.id = _order_id;
    due := farebox.share_of(sold.credits, back, sold.received) - sold.taken;
    due_bonus := farebox.share_of(sold.bonus, back, sold.received) - sold.bonus_taken;
    IF _more AND (due > 0 OR due_bonus > 0) THEN
        waiting := farebox.laid_aside(_order_id);
        freed := freed + coalesce(waiting.credits + waiting.bonus, 0);
    END IF;
    IF due > 0 OR freed > 0 THEN
        took := farebox.take(
            sold.account_id, _kind, greatest(due, 0), _reference, 'stripe', _reason, sold.credit_version, false, freed
        );
        IF took.taken <> greatest(due, 0) THEN
            RAISE EXCEPTION '% took % of order % before', _reference, took.taken, _order_id USING ERRCODE = 'XX001';
        END IF;
    ELSIF due < 0 THEN
        PERFORM farebox.give_back(
            sold.account_id, _kind || '_return', -due, _reference, 'stripe', _reason, sold.credit_version,
            farebox.taking_references(_order_id, '')
        );
    END IF;
    IF _more AND (due_bonus > 0 OR _freed_bonus > 0) THEN
        took := farebox.take(
            sold.account_id, _kind, greatest(due_bonus, 0), _reference || ':bonus', 'stripe', _reason,
            sold.bonus_version, true, _freed_bonus
        );
        due_bonus := took.taken;
    ELSIF due_bonus < 0 THEN
        PERFORM farebox.give_back(
            sold.account_id, _kind || '_return', -due_bonus, _reference || ':bonus', 'stripe', _reason,
            sold.bonus_version, farebox.taking_references(_order_id, ':bonus')
        );
    ELSE
        due_bonus := 0;
    END IF;
    UPDATE farebox.orders AS o
       SET taken = o.taken + due, bonus_taken = o.bonus_taken + due_bonus, changed_at = clock_timestamp()
     WHERE o.id = _order_id AND (due <> 0 OR due_bonus <> 0);
    IF NOT _more AND (SELECT a.debt = 0 FROM farebox.accounts a WHERE a.id = sold.account_id) THEN
        -- What has come back may be what a request holds too little of. A debt comes before it.
        waiting := farebox.laid_aside(_order_id);
        IF waiting.id IS NOT NULL THEN
            PERFORM farebox.free_hold(waiting);
        END IF;
    END IF;
    IF waiting.id IS NOT NULL THEN
        PERFORM farebox.hold_again(waiting);
    END IF;
    moved := due + due_bonus;
END
$$;

-- The order's request that waits for its refund. What it has of the lots is theirs again, and what it holds is the
-- caller's to free, who calls hold_again at the end. NULL: there is none that holds anything.
CREATE FUNCTION farebox.laid_aside(_order_id uuid) RETURNS farebox.refund_requests
LANGUAGE plpgsql AS $$
DECLARE
    request farebox.refund_requests;
    sold farebox.orders;
BEGIN
    SELECT r.* INTO request
      FROM farebox.refund_requests r JOIN farebox.holds h ON h.id = r.id
     WHERE r.order_id = _order_id AND r.state = 'held' AND h.state = 'open' AND h.amount = r.credits + r.bonus;
    IF request.id IS NOT NULL THEN
        SELECT * INTO sold FROM farebox.orders o WHERE o.id = _order_id;
        PERFORM farebox.unreserve_lot(sold.account_id, sold.credit_version, request.reserved);
        PERFORM farebox.unreserve_lot(sold.account_id, sold.bonus_version, request.bonus);
    END IF;
    RETURN request;
END
$$;

-- Once what a request held is freed: it holds what it needs by now, as far as that is available.
CREATE FUNCTION farebox.hold_again(_request farebox.refund_requests) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    sold farebox.orders;
    hold farebox.holds;
    purse farebox.purse := farebox.open_purse(_request.account_id);
    needs record;
BEGIN
    SELECT * INTO sold FROM farebox.orders o WHERE o.id = _request.order_id;
    needs := farebox.refund_needs(sold, _request.amount, purse.balance - purse.held);
    -- Before the UPDATE: what it has to wait for, it computes twice.
    _request.credits := needs.credits;
    _request.bonus := farebox.reserve_lot(sold.account_id, sold.bonus_version, needs.bonus);
    _request.reserved := farebox.reserve_lot(sold.account_id, sold.credit_version, needs.credits);
    UPDATE farebox.refund_requests AS r
       SET credits = _request.credits, bonus = _request.bonus, reserved = _request.reserved
     WHERE r.id = _request.id;
    SELECT * INTO hold FROM farebox.holds h WHERE h.id = _request.id;
    hold.amount := _request.credits + _request.bonus;
    PERFORM farebox.write_down(
        ARRAY[farebox.moved(purse, NULL, 0, -hold.amount)], NULL, NULL, ARRAY[hold], clock_timestamp()
    );
END
$$;

-- What a request for so much of the order's payment holds, of what the account has available: the credits that go with
-- it, and what it can of the bonus.
CREATE FUNCTION farebox.refund_needs(
    _sold farebox.orders, _amount bigint, _available bigint, OUT credits bigint, OUT bonus bigint
)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    upto bigint := least(farebox.gone_back(_sold.id) + _amount, _sold.received);
BEGIN
    credits := farebox.share_of(_sold.credits, upto, _sold.received) - _sold.taken;
    credits := greatest(least(credits, _available), 0);
    bonus := farebox.share_of(_sold.bonus, upto, _sold.received) - _sold.bonus_taken;
    bonus := greatest(least(bonus, _available - credits), 0);
END
$$;

-- A later status of a refund has a higher rank. NULL: there is no such status.
CREATE FUNCTION farebox.refund_rank(_status text) RETURNS integer
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE _status
        WHEN 'pending' THEN 1 WHEN 'requires_action' THEN 1 WHEN 'succeeded' THEN 2 WHEN 'failed' THEN 3
        WHEN 'canceled' THEN 3
    END
$$;

-- A refund as fetched from Stripe. _request_id: the request of ours that its metadata name: its hold ends with this.
-- Outcomes: taken, returned (moved says how much: negative), known (nothing new), stale (something later is known),
-- not_ours (no order has this payment), not_paid (one has, which isn't paid), conflict (the refund was another order's,
-- or of another amount or currency), unknown_status.
CREATE FUNCTION farebox.apply_refund(
    _refund_id text, _payment_intent text, _amount bigint, _currency text, _status text, _request_id uuid,
    _problem text,
    OUT outcome text, OUT order_id uuid, OUT account_id uuid, OUT moved bigint
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    payer uuid;
    sold farebox.orders;
    known farebox.stripe_refunds;
    request farebox.refund_requests;
    rank integer := farebox.refund_rank(_status);
    stands boolean := rank < 3;
    news boolean;
    held boolean := false;
BEGIN
    moved := 0;
    PERFORM farebox.lock_reference('refund', _refund_id);
    SELECT o.account_id INTO payer FROM farebox.orders o WHERE o.payment_intent = _payment_intent;
    PERFORM farebox.lock_accounts(ARRAY[payer], NULL);
    -- One that was paid since then isn't found yet: its account is not locked. Who asks again finds it.
    SELECT * INTO sold FROM farebox.orders o
     WHERE o.payment_intent = _payment_intent AND o.account_id = payer
       FOR UPDATE;
    SELECT * INTO known FROM farebox.stripe_refunds r WHERE r.id = _refund_id;
    order_id := sold.id;
    account_id := sold.account_id;
    outcome := CASE
        WHEN rank IS NULL THEN 'unknown_status'
        WHEN sold.id IS NULL THEN 'not_ours'
        WHEN sold.state <> 'paid' THEN 'not_paid'
        WHEN (known.order_id, known.amount) <> (sold.id, _amount) OR sold.currency <> _currency THEN 'conflict'
        WHEN known.status_rank > rank THEN 'stale'
    END;
    IF outcome IS NOT NULL THEN
        RETURN;
    END IF;
    INSERT INTO farebox.stripe_refunds AS r (id, order_id, amount, status, status_rank, active)
    VALUES (_refund_id, sold.id, _amount, _status, rank, stands)
    ON CONFLICT (id) DO UPDATE
       SET status = _status, status_rank = rank, active = stands, changed_at = clock_timestamp()
     WHERE r.status <> _status;
    SELECT * INTO request
      FROM farebox.refund_requests r
     WHERE r.id = _request_id AND r.order_id = sold.id AND r.amount = _amount AND r.state = 'held';
    IF request.id IS NOT NULL THEN
        held := farebox.end_refund_request(
            request, CASE WHEN stands THEN 'done' ELSE 'released' END, _refund_id, coalesce(_problem, _status)
        );
    END IF;
    news := coalesce(known.active, false) <> stands;
    IF news THEN
        moved := farebox.settle_takings(
            sold.id, 'refund', _refund_id, stands, coalesce(request.reason, 'refund of order ' || sold.id),
            CASE WHEN stands AND held THEN request.credits ELSE 0 END,
            CASE WHEN stands AND held THEN request.bonus ELSE 0 END
        );
    END IF;
    IF held AND NOT (stands AND news) THEN
        PERFORM farebox.free_hold(request);
    END IF;
    outcome := CASE WHEN moved > 0 THEN 'taken' WHEN moved < 0 THEN 'returned' ELSE 'known' END;
END
$$;

-- The request has ended: so have its hold, whose credits are the caller's to free, and what its lots spoke for. False:
-- somebody has ended the hold before, and nothing is to be freed.
CREATE FUNCTION farebox.end_refund_request(
    _request farebox.refund_requests, _state text, _refund_id text, _problem text
) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    sold farebox.orders;
    hold farebox.holds;
    was_open boolean;
    at timestamptz := clock_timestamp();
BEGIN
    SELECT * INTO sold FROM farebox.orders o WHERE o.id = _request.order_id;
    SELECT * INTO hold FROM farebox.holds h WHERE h.id = _request.id;
    was_open := hold.state = 'open' AND hold.amount = _request.credits + _request.bonus;
    IF was_open THEN
        hold.state := 'released';
        hold.charge := 0;
        hold.ending := CASE _state WHEN 'done' THEN 'refunded' ELSE 'released' END;
        hold.ended_at := at;
        PERFORM farebox.write_down(NULL, NULL, NULL, ARRAY[hold], at);
    END IF;
    PERFORM farebox.unreserve_lot(_request.account_id, sold.credit_version, _request.reserved);
    PERFORM farebox.unreserve_lot(_request.account_id, sold.bonus_version, _request.bonus);
    UPDATE farebox.refund_requests AS r
       SET state = _state, refund = _refund_id, problem = CASE _state WHEN 'released' THEN _problem END,
           changed_at = at
     WHERE r.id = _request.id;
    RETURN coalesce(was_open, false);
END
$$;

-- What the request held is available again, to a debt before all.
CREATE FUNCTION farebox.free_hold(_request farebox.refund_requests) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    purse farebox.purse := farebox.moved(
        farebox.open_purse(_request.account_id), NULL, 0, _request.credits + _request.bonus
    );
BEGIN
    PERFORM farebox.write_down(
        ARRAY[purse], ARRAY[farebox.a_move(purse, _request.id)], NULL, NULL, clock_timestamp()
    );
END
$$;

-- Writes down that a part of an order's payment is to be refunded, and holds the credits that go with it: of the purchase
-- first. Before Stripe hears of it; its id is the idempotency key there. _amount: money; NULL: for what of the purchase
-- isn't spent, rounded down to a multiple of _step, or, with _owing, for all that is left of the payment.
-- Outcomes: done, also where the same was asked before; unknown: no such order; no_payment: it isn't paid, or nothing was
-- paid for it; under_way: another request of the order is (request_id); refunded: nothing is left of the payment; spent:
-- nothing is left of the purchase; above_payment: more than is left of the payment (amount); insufficient: the credits
-- that go with it aren't available: spent, or held by calls that run. amount: for how much they are. Not with _owing:
-- what isn't available is then owed.
CREATE FUNCTION farebox.open_refund_request(
    _id uuid, _order_id uuid, _amount bigint, _owing boolean, _step integer, _actor text, _reason text,
    OUT outcome text, OUT request_id uuid, OUT amount bigint
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    sold farebox.orders;
    purse farebox.purse;
    request farebox.refund_requests;
    back bigint;
    available bigint;
    unspent bigint;
    due bigint;
BEGIN
    PERFORM farebox.lock_accounts(ARRAY(SELECT o.account_id FROM farebox.orders o WHERE o.id = _order_id), NULL);
    SELECT * INTO sold FROM farebox.orders o WHERE o.id = _order_id FOR UPDATE;
    SELECT r.id, r.amount INTO request_id, amount
      FROM farebox.refund_requests r WHERE r.id = _id OR (r.order_id = _order_id AND r.state = 'held')
     ORDER BY r.id <> _id LIMIT 1;
    outcome := CASE
        WHEN sold.id IS NULL THEN 'unknown'
        WHEN request_id = _id THEN 'done'
        WHEN request_id IS NOT NULL THEN 'under_way'
        WHEN sold.state <> 'paid' OR sold.payment_intent IS NULL OR sold.received = 0 THEN 'no_payment'
    END;
    IF outcome IS NOT NULL THEN
        RETURN;
    END IF;
    PERFORM farebox.draw_lots(sold.account_id, NULL, NULL);
    purse := farebox.open_purse(sold.account_id);
    back := farebox.gone_back(_order_id);
    available := purse.balance - purse.held;
    SELECT least(available, l.remaining - l.reserved - l.owed) INTO unspent
      FROM farebox.lots l WHERE l.account_id = sold.account_id AND l.version = sold.credit_version;
    amount := CASE
        WHEN _amount IS NOT NULL THEN _amount
        WHEN _owing THEN sold.received - back
        ELSE least(farebox.share_of(sold.received, coalesce(unspent, 0), sold.credits), sold.received - back)
            / _step * _step
    END;
    -- The credits between what so much of the money came to before, and comes to then.
    due := farebox.share_of(sold.credits, back + amount, sold.received) - sold.taken;
    outcome := CASE
        WHEN sold.received = back THEN 'refunded'
        WHEN amount > sold.received - back THEN 'above_payment'
        WHEN amount = 0 THEN 'spent'
        WHEN due > available AND NOT _owing THEN 'insufficient'
    END;
    IF outcome IS NOT NULL THEN
        amount := CASE outcome
            WHEN 'insufficient' THEN greatest(
                farebox.share_of(sold.received, sold.taken + available, sold.credits) - back, 0
            ) / _step * _step
            ELSE sold.received - back
        END;
        RETURN;
    END IF;
    request := farebox.held_for_refund(_id, sold, purse, amount, _actor, _reason);
    outcome := 'done';
    request_id := request.id;
END
$$;

-- Holds what a request needs. The caller has seen that its credits are available, or may be owed.
CREATE FUNCTION farebox.held_for_refund(
    _id uuid, _sold farebox.orders, _purse farebox.purse, _amount bigint, _actor text, _reason text
) RETURNS farebox.refund_requests
LANGUAGE plpgsql AS $$
DECLARE
    at timestamptz := clock_timestamp();
    needs record := farebox.refund_needs(_sold, _amount, _purse.balance - _purse.held);
    request farebox.refund_requests;
    hold farebox.holds;
BEGIN
    request := (
        _id, _sold.id, _sold.account_id, _amount, needs.credits,
        farebox.reserve_lot(_sold.account_id, _sold.bonus_version, needs.bonus),
        farebox.reserve_lot(_sold.account_id, _sold.credit_version, needs.credits),
        'held', NULL, _actor, _reason, NULL, at, at
    )::farebox.refund_requests;
    hold := (
        _id, _sold.account_id, 'open', request.credits + request.bonus, NULL, NULL, NULL, NULL, NULL,
        jsonb_build_object('refund_of', _sold.id)::text, NULL, NULL, at, NULL,
        0, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL
    )::farebox.holds;
    PERFORM farebox.write_down(
        ARRAY[farebox.moved(_purse, NULL, 0, -hold.amount)], NULL, ARRAY[hold], NULL, at
    );
    INSERT INTO farebox.refund_requests SELECT request.*;
    RETURN request;
END
$$;

-- There will be no refund for this request: what it held is available again. Says what the request is by now: released,
-- done (its refund came first), or NULL where there is none.
CREATE FUNCTION farebox.release_refund_request(_id uuid, _problem text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    request farebox.refund_requests;
BEGIN
    PERFORM farebox.lock_accounts(
        ARRAY(SELECT r.account_id FROM farebox.refund_requests r WHERE r.id = _id), NULL
    );
    SELECT * INTO request FROM farebox.refund_requests r WHERE r.id = _id;
    IF request.state = 'held' THEN
        IF farebox.end_refund_request(request, 'released', NULL, _problem) THEN
            PERFORM farebox.free_hold(request);
        END IF;
        RETURN 'released';
    END IF;
    RETURN request.state;
END
$$;

-- Requests that wait for their refund, were made longer than _age ago, and were not given out lately: they are the
-- caller's for a quarter of their age, _age at least and _pause at most. _limit of them, the longest left alone first.
CREATE FUNCTION farebox.claim_refund_requests(_age interval, _pause interval, _limit integer)
RETURNS TABLE (id uuid)
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH due AS MATERIALIZED (
        SELECT d.id
          FROM farebox.refund_requests d
         WHERE d.state = 'held' AND d.created_at <= clock_timestamp() - _age
           AND d.changed_at <= clock_timestamp() - least(
                   greatest((clock_timestamp() - d.created_at) / 4, _age), greatest(_pause, _age)
               )
         ORDER BY d.changed_at
         LIMIT _limit
           FOR UPDATE SKIP LOCKED
    )
    UPDATE farebox.refund_requests AS r SET changed_at = clock_timestamp() FROM due WHERE r.id = due.id
    RETURNING r.id
$$;

GRANT EXECUTE ON FUNCTION
    farebox.apply_refund, farebox.open_refund_request, farebox.release_refund_request, farebox.claim_refund_requests
TO farebox_control;
