-- Orders: written before Stripe hears of them, and paid by what was fetched from Stripe; each once.

-- States only rise: what was fetched earlier can't undo what was fetched later, and a payment that comes late still counts.
CREATE FUNCTION farebox.order_rank(_state text) RETURNS integer
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE _state
        WHEN 'created' THEN 0 WHEN 'open' THEN 1 WHEN 'pending' THEN 2
        WHEN 'failed' THEN 3 WHEN 'expired' THEN 3 WHEN 'canceled' THEN 3
        WHEN 'paid' THEN 4
    END
$$;

-- The same id again, or the same request_key under the same digest, is the same order ('known'); under another digest
-- 'conflict'. 'busy': the account has an unfinished automatic order, order_id. 'too_many': so many are unfinished.
CREATE FUNCTION farebox.create_order(
    _id uuid, _account_id uuid, _kind text, _pack text, _credits bigint, _bonus bigint, _credits_seconds bigint,
    _bonus_seconds bigint, _currency text, _price bigint, _discount_max bigint, _livemode boolean, _actor text,
    _request_key text, _request_digest bytea, _save_payment_method boolean, _success_url text, _cancel_url text,
    _customer text, _payment_method text, _unfinished_max integer,
    OUT outcome text, OUT order_id uuid
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    known farebox.orders;
BEGIN
    SELECT * INTO known FROM farebox.orders o
     WHERE o.id = _id OR (o.account_id = _account_id AND o.request_key = _request_key);
    IF known.id IS NULL THEN
        outcome := CASE
            WHEN NOT EXISTS (SELECT FROM farebox.accounts a WHERE a.id = _account_id) THEN 'unknown'
            WHEN _unfinished_max <= (
                SELECT count(*) FROM farebox.orders o
                 WHERE o.account_id = _account_id AND o.state IN ('created', 'open', 'pending')
            ) THEN 'too_many'
        END;
        IF outcome IS NOT NULL THEN
            RETURN;
        END IF;
        INSERT INTO farebox.orders (
            id, account_id, kind, pack, credits, bonus, credits_seconds, bonus_seconds, currency, price, discount_max,
            livemode, actor, request_key, request_digest, save_payment_method, success_url, cancel_url, customer,
            payment_method
        ) VALUES (
            _id, _account_id, _kind, _pack, _credits, _bonus, _credits_seconds, _bonus_seconds, _currency, _price,
            _discount_max, _livemode, _actor, _request_key, _request_digest, _save_payment_method, _success_url,
            _cancel_url, _customer, _payment_method
        ) ON CONFLICT DO NOTHING;
        IF FOUND THEN
            outcome := 'done';
            order_id := _id;
            RETURN;
        END IF;
        -- Somebody else's, committed meanwhile: a statement of its own sees it.
        SELECT * INTO known FROM farebox.orders o
         WHERE o.id = _id OR (o.account_id = _account_id AND o.request_key = _request_key);
    END IF;
    IF known.id IS NULL THEN
        SELECT o.id INTO order_id FROM farebox.orders o
         WHERE o.account_id = _account_id AND o.kind = 'auto' AND o.state IN ('created', 'open', 'pending');
        outcome := 'busy';
        RETURN;
    END IF;
    order_id := known.id;
    outcome := CASE
        WHEN (known.account_id, known.kind, known.request_digest)
             IS NOT DISTINCT FROM (_account_id, _kind, _request_digest) THEN 'known'
        ELSE 'conflict'
    END;
END
$$;

-- What the order is called at Stripe, once known; another session than before is 'conflict'.
CREATE FUNCTION farebox.open_order(_id uuid, _session_id text, _url text, _customer text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    known farebox.orders;
BEGIN
    SELECT * INTO known FROM farebox.orders o WHERE o.id = _id FOR UPDATE;
    IF known.id IS NULL THEN
        RETURN 'unknown';
    END IF;
    IF known.session_id <> _session_id OR EXISTS (
        SELECT FROM farebox.orders o WHERE o.session_id = _session_id AND o.id <> _id
    ) THEN
        RETURN 'conflict';
    END IF;
    UPDATE farebox.orders AS o
       SET session_id = _session_id, url = coalesce(_url, o.url), customer = coalesce(o.customer, _customer),
           changed_at = clock_timestamp(),
           state = CASE o.state WHEN 'created' THEN 'open' ELSE o.state END
     WHERE o.id = _id AND (o.session_id IS NULL OR o.state = 'created' OR o.url IS NULL);
    RETURN 'done';
END
$$;

-- The order is now pending, failed, expired or canceled, unless it got as far already. Paid it is by pay_order alone.
-- Returns the state that it has now; NULL where there is no such order.
CREATE FUNCTION farebox.advance_order(_id uuid, _state text, _payment_intent text, _problem text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    known farebox.orders;
BEGIN
    IF _state IN ('pending', 'failed', 'expired', 'canceled') IS NOT TRUE THEN
        RAISE EXCEPTION 'an order does not become %', _state USING ERRCODE = '22023';
    END IF;
    SELECT * INTO known FROM farebox.orders o WHERE o.id = _id FOR UPDATE;
    IF farebox.order_rank(known.state) < farebox.order_rank(_state) THEN
        UPDATE farebox.orders AS o
           SET state = _state, problem = _problem, changed_at = clock_timestamp(),
               payment_intent = coalesce(o.payment_intent, _payment_intent)
         WHERE o.id = _id;
        RETURN _state;
    END IF;
    RETURN known.state;
END
$$;

-- Who the account is to Stripe: what is stored from now on, though several asked at once. _instead_of: a customer that
-- is there no more, whose cards are gone with it.
CREATE FUNCTION farebox.put_customer(_account_id uuid, _livemode boolean, _customer text, _instead_of text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    known text;
BEGIN
    INSERT INTO farebox.stripe_customers (account_id, livemode, customer)
    VALUES (_account_id, _livemode, _customer)
    ON CONFLICT DO NOTHING;
    UPDATE farebox.stripe_customers AS c
       SET customer = _customer, payment_method = NULL
     WHERE c.account_id = _account_id AND c.livemode = _livemode AND c.customer = _instead_of;
    SELECT c.customer INTO known
      FROM farebox.stripe_customers c
     WHERE c.account_id = _account_id AND c.livemode = _livemode;
    RETURN known;
END
$$;

-- Credits what the order sold, and its bonus, and writes down what came in for it. The caller has taken lock_reference
-- for promo and _kind, the account and the order, and found that the order is not paid. _kind: purchase or plan.
-- _expires_at: when the credits end, where the order doesn't say in how many seconds.
CREATE FUNCTION farebox.settle_order(
    _order_id uuid, _kind text, _payment text, _payment_intent text, _session_id text, _customer text,
    _payment_method text, _subtotal bigint, _discount bigint, _tax bigint, _received bigint, _expires_at timestamptz
) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    sold farebox.orders;
    outcomes text[];
    credited_at bigint;
    bonus_at bigint;
    at timestamptz := clock_timestamp();
BEGIN
    SELECT * INTO sold FROM farebox.orders o WHERE o.id = _order_id;
    SELECT ARRAY[c.outcome], c.transfer_version INTO outcomes, credited_at
      FROM farebox.credited(
          sold.account_id, _kind, sold.credits, _payment, sold.actor, 'order ' || sold.id, 'paid',
          coalesce(_expires_at, at + make_interval(secs => sold.credits_seconds)), NULL, sold.id
      ) AS c;
    IF sold.bonus > 0 THEN
        SELECT outcomes || c.outcome, c.transfer_version INTO outcomes, bonus_at
          FROM farebox.credited(
              sold.account_id, 'promo', sold.bonus, _payment, sold.actor, 'order ' || sold.id, 'promo',
              at + make_interval(secs => coalesce(sold.bonus_seconds, sold.credits_seconds)), NULL, sold.id
          ) AS c;
    END IF;
    IF outcomes <@ ARRAY['done'] IS NOT TRUE THEN
        RAISE EXCEPTION 'order % could not be credited for %: %', _order_id, _payment, outcomes;
    END IF;
    UPDATE farebox.orders AS o
       SET state = 'paid', paid_at = at, changed_at = at, received = _received, subtotal = _subtotal,
           discount = _discount, tax = _tax, problem = NULL,
           payment_intent = coalesce(_payment_intent, o.payment_intent),
           session_id = coalesce(_session_id, o.session_id), customer = coalesce(o.customer, _customer),
           payment_method = coalesce(_payment_method, o.payment_method),
           credit_version = credited_at, bonus_version = bonus_at
     WHERE o.id = _order_id;
    IF sold.save_payment_method AND _payment_method IS NOT NULL THEN
        UPDATE farebox.stripe_customers AS c
           SET payment_method = _payment_method
         WHERE c.account_id = sold.account_id AND c.livemode = sold.livemode AND c.customer = _customer;
    END IF;
    PERFORM farebox.tell('account.topped_up', sold.account_id, _payment, jsonb_build_object(
        'order', sold.id, 'kind', sold.kind, 'pack', sold.pack, 'credits', farebox.credits_text(sold.credits),
        'bonus', farebox.credits_text(sold.bonus), 'currency', sold.currency, 'received', _received
    ));
    -- A payment that went through shows that the next may.
    UPDATE farebox.auto_topups AS t
       SET failures = 0, blocked_until = NULL, problem = NULL, changed_at = at
     WHERE t.account_id = sold.account_id AND (t.failures > 0 OR t.blocked_until IS NOT NULL);
END
$$;

-- Why this payment is not what the order asked for; NULL where it is. _total: what the checkout came to, which is the
-- subtotal less discounts, and tax on top unless the prices hold it already.
CREATE FUNCTION farebox.order_mismatch(
    _sold farebox.orders, _account_id uuid, _payment_intent text, _session_id text, _customer text, _livemode boolean,
    _currency text, _subtotal bigint, _discount bigint, _tax bigint, _total bigint, _received bigint
) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT CASE
        WHEN _sold.id IS NULL THEN 'unknown_order'
        WHEN _account_id IS DISTINCT FROM _sold.account_id THEN 'other_account'
        WHEN _livemode IS DISTINCT FROM _sold.livemode THEN 'other_mode'
        WHEN _sold.kind = 'plan' THEN 'other_kind'
        WHEN _sold.state = 'paid' THEN 'second_payment'
        WHEN EXISTS (
            SELECT FROM farebox.orders o
             WHERE (o.payment_intent = _payment_intent OR o.session_id = _session_id) AND o.id <> _sold.id
        ) THEN 'other_order'
        WHEN _sold.customer <> _customer THEN 'other_customer'
        WHEN _currency IS DISTINCT FROM _sold.currency THEN 'other_currency'
        WHEN _subtotal IS DISTINCT FROM _sold.price THEN 'other_amount'
        WHEN (_discount BETWEEN 0 AND _sold.discount_max) IS NOT TRUE THEN 'discount'
        WHEN _received IS DISTINCT FROM _total THEN 'short'
        WHEN (_total BETWEEN _subtotal - _discount AND _subtotal - _discount + _tax) IS NOT TRUE THEN 'other_amount'
        -- As in credited(): some room below what 64 bits carry.
        WHEN 1000000000000000000 - _sold.credits - _sold.bonus < (
            SELECT a.balance FROM farebox.accounts a WHERE a.id = _sold.account_id
        ) THEN 'above_limit'
    END
$$;

-- A payment that succeeded, as fetched from Stripe: credits the order that it names, once, where everything matches.
-- _payment: the PaymentIntent's id; the session's where a discount left nothing to pay. _problem: what the caller found
-- wrong already. 'paid' (now), 'known' (before), 'quarantined' with the reason (fresh: for the first time), or what an
-- operator decided about it: 'credited', 'dismissed'.
CREATE FUNCTION farebox.pay_order(
    _order_id uuid, _account_id uuid, _payment text, _payment_intent text, _session_id text, _customer text,
    _payment_method text, _livemode boolean, _currency text, _subtotal bigint, _discount bigint, _tax bigint,
    _total bigint, _received bigint, _problem text,
    OUT outcome text, OUT reason text, OUT fresh boolean
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    sold farebox.orders;
    held farebox.quarantine;
BEGIN
    fresh := false;
    PERFORM farebox.lock_reference('promo', _payment);
    PERFORM farebox.lock_reference('purchase', _payment);
    PERFORM farebox.lock_accounts(ARRAY(SELECT o.account_id FROM farebox.orders o WHERE o.id = _order_id), NULL);
    SELECT * INTO sold FROM farebox.orders o WHERE o.id = _order_id FOR UPDATE;
    IF sold.state = 'paid' AND coalesce(sold.payment_intent, sold.session_id) = _payment THEN
        outcome := 'known';
        RETURN;
    END IF;
    SELECT * INTO held FROM farebox.quarantine q WHERE q.payment = _payment;
    reason := CASE WHEN held.payment IS NOT NULL THEN held.reason ELSE coalesce(_problem, farebox.order_mismatch(
        sold, _account_id, _payment_intent, _session_id, _customer, _livemode, _currency, _subtotal, _discount, _tax,
        _total, _received
    )) END;
    IF reason IS NULL THEN
        PERFORM farebox.settle_order(
            _order_id, 'purchase', _payment, _payment_intent, _session_id, _customer, _payment_method, _subtotal,
            _discount, _tax, _received, NULL
        );
        outcome := 'paid';
        fresh := true;
        RETURN;
    END IF;
    outcome := coalesce(held.resolution, 'quarantined');
    IF held.payment IS NULL THEN
        INSERT INTO farebox.quarantine (
            payment, order_id, account_id, reason, payment_intent, session_id, customer, payment_method, currency,
            subtotal, discount, tax, received, livemode
        ) VALUES (
            _payment, _order_id, coalesce(sold.account_id, _account_id), reason, _payment_intent, _session_id,
            _customer, _payment_method, _currency, _subtotal, _discount, _tax, _received, _livemode
        );
        fresh := true;
    END IF;
END
$$;

-- What an operator decides about a payment in quarantine, once. 'credited': its order's credits for what came in; where
-- another payment has paid that order, a copy of it under _new_id is what was bought. order_id: the one it paid.
-- 'unknown', 'conflict' (decided otherwise), 'no_order' (there is none to credit), 'other_mode' (money of test mode is
-- none), 'elsewhere' (the payment has been credited), 'above_limit'.
CREATE FUNCTION farebox.resolve_quarantine(
    _payment text, _resolution text, _actor text, _new_id uuid, OUT outcome text, OUT order_id uuid
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    held farebox.quarantine;
    sold farebox.orders;
BEGIN
    PERFORM farebox.lock_reference('promo', _payment);
    PERFORM farebox.lock_reference('purchase', _payment);
    -- An invoice may be credited by pay_plan at this moment.
    PERFORM farebox.lock_reference('plan', _payment);
    PERFORM farebox.lock_accounts(ARRAY(
        SELECT o.account_id FROM farebox.quarantine q JOIN farebox.orders o ON o.id = q.order_id
         WHERE q.payment = _payment
    ), NULL);
    SELECT * INTO held FROM farebox.quarantine q WHERE q.payment = _payment;
    SELECT * INTO sold FROM farebox.orders o WHERE o.id = held.order_id FOR UPDATE;
    outcome := CASE
        WHEN held.payment IS NULL THEN 'unknown'
        WHEN held.resolution = _resolution THEN 'done'
        WHEN held.resolution IS NOT NULL THEN 'conflict'
        WHEN _resolution = 'dismissed' THEN NULL
        WHEN sold.id IS NULL THEN 'no_order'
        WHEN held.livemode <> sold.livemode THEN 'other_mode'
        WHEN EXISTS (
            SELECT FROM farebox.transfers t WHERE t.kind IN ('purchase', 'plan') AND t.reference = _payment
        ) OR EXISTS (
            SELECT FROM farebox.orders o
             WHERE (o.payment_intent = held.payment_intent OR o.session_id = held.session_id) AND o.state = 'paid'
        ) THEN 'elsewhere'
        WHEN 1000000000000000000 - sold.credits - sold.bonus < (
            SELECT a.balance FROM farebox.accounts a WHERE a.id = sold.account_id
        ) THEN 'above_limit'
    END;
    order_id := coalesce((
        SELECT o.id FROM farebox.orders o WHERE coalesce(o.payment_intent, o.session_id) = _payment AND o.state = 'paid'
    ), held.order_id);
    IF outcome IS NOT NULL THEN
        RETURN;
    END IF;
    IF _resolution = 'credited' THEN
        order_id := farebox.ordered_anew(sold, held, _new_id);
        PERFORM farebox.settle_order(
            order_id, 'purchase', _payment, held.payment_intent, held.session_id, held.customer, held.payment_method,
            held.subtotal, held.discount, held.tax, held.received, NULL
        );
        -- What went back of it had nothing to take until now: those events are processed anew.
        UPDATE farebox.stripe_events AS e
           SET processed_at = NULL, outcome = NULL
         WHERE e.outcome = 'payment_quarantined' AND e.livemode = held.livemode;
    END IF;
    UPDATE farebox.quarantine AS q
       SET resolved_at = clock_timestamp(), resolved_by = _actor, resolution = _resolution
     WHERE q.payment = _payment;
    outcome := 'done';
END
$$;

-- The order that a payment in quarantine is to pay, in the currency that it came in: the one that it names, or a copy of
-- that where it is paid.
CREATE FUNCTION farebox.ordered_anew(_sold farebox.orders, _held farebox.quarantine, _new_id uuid) RETURNS uuid
LANGUAGE plpgsql AS $$
DECLARE
    asked bigint := CASE
        WHEN _held.currency = _sold.currency THEN _sold.price ELSE greatest(coalesce(_held.subtotal, _held.received), 1)
    END;
BEGIN
    IF _sold.state <> 'paid' THEN
        UPDATE farebox.orders AS o SET currency = _held.currency, price = asked WHERE o.id = _sold.id;
        RETURN _sold.id;
    END IF;
    INSERT INTO farebox.orders (
        id, account_id, kind, pack, credits, bonus, credits_seconds, bonus_seconds, currency, price, discount_max,
        livemode, actor, customer
    ) VALUES (
        _new_id, _sold.account_id, 'checkout', _sold.pack, _sold.credits, _sold.bonus, _sold.credits_seconds,
        _sold.bonus_seconds, _held.currency, asked, _sold.discount_max, _sold.livemode, _sold.actor, _sold.customer
    );
    RETURN _new_id;
END
$$;

GRANT EXECUTE ON FUNCTION
    farebox.create_order, farebox.open_order, farebox.advance_order, farebox.put_customer, farebox.pay_order,
    farebox.resolve_quarantine
TO farebox_control;
