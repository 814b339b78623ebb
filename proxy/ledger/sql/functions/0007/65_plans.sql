-- Credits of a subscription's month: an invoice that was paid is an order that was paid, once.

-- A paid invoice, as fetched from Stripe. _credits: what its lines sell; _price: what they come to before discount and
-- tax. _expires_at NULL: never. _problem: what the caller found wrong already.
-- 'paid' (now) and 'known' (before) with the order; 'quarantined' with the reason (fresh: for the first time), until the
-- same call finds nothing wrong any more, or an operator decides: then 'dismissed', or 'credited' by other means.
CREATE FUNCTION farebox.pay_plan(
    _order_id uuid, _account_id uuid, _invoice text, _payment_intent text, _customer text, _pack text, _credits bigint,
    _expires_at timestamptz, _currency text, _price bigint, _livemode boolean, _subtotal bigint, _discount bigint,
    _tax bigint, _received bigint, _problem text,
    OUT outcome text, OUT reason text, OUT order_id uuid, OUT fresh boolean
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    held farebox.quarantine;
    buyer farebox.accounts;
BEGIN
    fresh := false;
    PERFORM farebox.lock_reference('plan', _invoice);
    PERFORM farebox.lock_accounts(ARRAY(SELECT a.id FROM farebox.accounts a WHERE a.id = _account_id), NULL);
    SELECT o.id INTO order_id FROM farebox.orders o WHERE o.invoice = _invoice;
    SELECT * INTO held FROM farebox.quarantine q WHERE q.payment = _invoice;
    outcome := CASE WHEN order_id IS NOT NULL THEN 'known' ELSE held.resolution END;
    IF outcome IS NOT NULL THEN
        RETURN;
    END IF;

    SELECT * INTO buyer FROM farebox.accounts a WHERE a.id = _account_id;
    reason := coalesce(_problem, CASE
        WHEN buyer.id IS NULL THEN 'unknown_account'
        WHEN _received >= 0 IS NOT TRUE OR _price > 0 IS NOT TRUE THEN 'other_amount'
        WHEN EXISTS (SELECT FROM farebox.orders o WHERE o.payment_intent = _payment_intent) THEN 'other_order'
        -- As in credited(): some room below what 64 bits carry.
        WHEN buyer.balance > 1000000000000000000 - _credits THEN 'above_limit'
    END);
    fresh := reason IS NULL OR held.payment IS NULL;
    IF reason IS NOT NULL THEN
        outcome := 'quarantined';
        INSERT INTO farebox.quarantine AS q (
            payment, account_id, reason, payment_intent, customer, currency, subtotal, discount, tax, received, livemode
        ) VALUES (
            _invoice, _account_id, reason, _payment_intent, _customer, _currency, _subtotal, _discount, _tax, _received,
            _livemode
        ) ON CONFLICT (payment) DO UPDATE SET account_id = excluded.account_id, reason = excluded.reason;
        RETURN;
    END IF;

    INSERT INTO farebox.orders (
        id, account_id, kind, pack, credits, currency, price, discount_max, livemode, actor, customer, invoice
    ) VALUES (
        _order_id, _account_id, 'plan', _pack, _credits, _currency, _price, _discount, _livemode, 'stripe', _customer,
        _invoice
    );
    PERFORM farebox.settle_order(
        _order_id, 'plan', _invoice, _payment_intent, NULL, _customer, NULL, _subtotal, _discount, _tax, _received,
        _expires_at
    );
    UPDATE farebox.quarantine AS q
       SET resolved_at = clock_timestamp(), resolved_by = 'stripe', resolution = 'credited'
     WHERE q.payment = _invoice;
    outcome := 'paid';
    order_id := _order_id;
END
$$;

GRANT EXECUTE ON FUNCTION farebox.pay_plan TO farebox_control;
