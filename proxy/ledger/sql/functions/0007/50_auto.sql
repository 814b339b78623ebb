-- Accounts that buy a pack by themselves. Whether one is due is judged on its balance, never on what is available: what
-- runs may yet be given back.
--
-- Locks: the account, then its orders, then its row of auto_topups.

-- What its owner wants from now on. Whatever stood in the way is forgotten: they have looked at it.
CREATE FUNCTION farebox.set_auto_topup(
    _account_id uuid, _enabled boolean, _threshold bigint, _pack text, _credits bigint, _currency text, _price bigint,
    _monthly_max bigint, _livemode boolean, _actor text
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO farebox.auto_topups AS t (
        account_id, enabled, threshold, pack, credits, currency, price, monthly_max, livemode, actor
    )
    SELECT a.id, _enabled, _threshold, _pack, _credits, _currency, _price, _monthly_max, _livemode, _actor
      FROM farebox.accounts a
     WHERE a.id = _account_id
    ON CONFLICT (account_id) DO UPDATE
       SET enabled = _enabled, threshold = _threshold, pack = _pack, credits = _credits, currency = _currency,
           price = _price, monthly_max = _monthly_max, livemode = _livemode, actor = _actor,
           failures = 0, blocked_until = NULL, problem = NULL, failed_order = NULL, link_order = NULL,
           changed_at = clock_timestamp();
    RETURN CASE WHEN FOUND THEN 'done' ELSE 'unknown' END;
END
$$;

-- No more attempts. One that is under way comes to its end.
CREATE FUNCTION farebox.stop_auto_topup(_account_id uuid, _actor text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE farebox.auto_topups AS t
       SET enabled = false, actor = _actor, changed_at = clock_timestamp()
     WHERE t.account_id = _account_id AND t.enabled;
    RETURN CASE
        WHEN EXISTS (SELECT FROM farebox.auto_topups t WHERE t.account_id = _account_id) THEN 'done' ELSE 'unknown'
    END;
END
$$;

-- Minor units of this currency that the account's automatic orders of this calendar month (UTC) have taken, or may
-- still take: one that isn't known to have failed counts.
CREATE FUNCTION farebox.auto_spent(_account_id uuid, _currency text, _livemode boolean) RETURNS bigint
LANGUAGE sql STABLE AS $$
    SELECT coalesce(sum(o.price), 0)::bigint
      FROM farebox.orders o
     WHERE o.account_id = _account_id AND o.kind = 'auto' AND o.currency = _currency AND o.livemode = _livemode
       AND o.state IN ('created', 'open', 'pending', 'paid')
       AND o.created_at >= date_trunc('month', clock_timestamp(), 'UTC')
$$;

-- Nothing is attempted until then. Told once a day: settings that are made anew begin anew, as often as anybody likes.
-- The caller has locked the row.
CREATE FUNCTION farebox.block_auto_topup(_account_id uuid, _problem text, _until timestamptz) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    UPDATE farebox.auto_topups AS t
       SET problem = _problem, blocked_until = _until, changed_at = clock_timestamp()
     WHERE t.account_id = _account_id;
    PERFORM farebox.tell('account.auto_topup_failed', _account_id, concat_ws(
        ':', _account_id, _problem, (clock_timestamp() AT TIME ZONE 'UTC')::date
    ), jsonb_build_object(
        'order', NULL, 'pack', t.pack, 'reason', _problem, 'checkout_url', NULL,
        'next_attempt_at', CASE WHEN isfinite(_until) THEN farebox.time_text(_until) END
    )) FROM farebox.auto_topups t WHERE t.account_id = _account_id;
END
$$;

-- Writes the attempt down, if the account is due and nothing stands in the way: then 'done', and the order is there,
-- before Stripe hears of it. _offered: whether the account's pack is sold at all; the values after it are that pack's.
-- _day_max: attempts in 24 hours, whatever became of them.
-- 'not_due', 'busy' (another attempt is under way), 'no_payment_method', and what has blocked it: 'monthly_max',
-- 'too_often', 'pack_gone', 'pack_changed'.
CREATE FUNCTION farebox.open_auto_topup(
    _id uuid, _account_id uuid, _livemode boolean, _offered boolean, _credits bigint, _bonus bigint,
    _credits_seconds bigint, _bonus_seconds bigint, _currency text, _price bigint, _day_max integer
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    owner farebox.accounts;
    wanted farebox.auto_topups;
    payer farebox.stripe_customers;
    at timestamptz := clock_timestamp();
    outcome text;
BEGIN
    PERFORM farebox.lock_accounts(ARRAY[_account_id], NULL);
    SELECT * INTO wanted FROM farebox.auto_topups t WHERE t.account_id = _account_id FOR UPDATE;
    SELECT * INTO owner FROM farebox.accounts a WHERE a.id = _account_id;
    SELECT * INTO payer FROM farebox.stripe_customers c WHERE c.account_id = _account_id AND c.livemode = _livemode;
    IF (wanted.enabled AND wanted.livemode = _livemode AND owner.balance < wanted.threshold
        AND owner.frozen_at IS NULL AND coalesce(wanted.blocked_until <= at, true)) IS NOT TRUE THEN
        RETURN 'not_due';
    END IF;
    -- Looked for before it is inserted: the unique index would wait for whoever ends the other one, and that one for us.
    IF EXISTS (
        SELECT FROM farebox.orders o
         WHERE o.account_id = _account_id AND o.kind = 'auto' AND o.state IN ('created', 'open', 'pending')
    ) THEN
        RETURN 'busy';
    END IF;
    IF payer.payment_method IS NULL THEN
        RETURN 'no_payment_method';
    END IF;
    outcome := CASE
        WHEN NOT _offered THEN 'pack_gone'
        WHEN (_currency = wanted.currency AND _price <= wanted.price AND _credits >= wanted.credits) IS NOT TRUE
            THEN 'pack_changed'
        WHEN farebox.auto_spent(_account_id, _currency, _livemode) + _price > wanted.monthly_max THEN 'monthly_max'
        WHEN _day_max <= (
            SELECT count(*) FROM farebox.orders o
             WHERE o.account_id = _account_id AND o.kind = 'auto' AND o.created_at > at - interval '24 hours'
        ) THEN 'too_often'
    END;
    IF outcome IS NOT NULL THEN
        PERFORM farebox.block_auto_topup(_account_id, outcome, CASE outcome
            WHEN 'monthly_max' THEN date_trunc('month', at, 'UTC') + interval '1 month'
            WHEN 'too_often' THEN at + interval '6 hours'
            ELSE 'infinity'
        END);
        RETURN outcome;
    END IF;
    INSERT INTO farebox.orders (
        id, account_id, kind, pack, credits, bonus, credits_seconds, bonus_seconds, currency, price, livemode, actor,
        customer, payment_method
    ) VALUES (
        _id, _account_id, 'auto', wanted.pack, _credits, _bonus, _credits_seconds, _bonus_seconds, _currency, _price,
        _livemode, 'auto_topup', payer.customer, payer.payment_method
    );
    RETURN 'done';
END
$$;

-- Takes at most _rows attempts of which nothing was heard for a while, for whoever asks Stripe about them; the older,
-- the seldomer. No two callers get the same one.
CREATE FUNCTION farebox.claim_auto_orders(_livemode boolean, _after interval, _rows integer) RETURNS SETOF farebox.orders
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH silent AS MATERIALIZED (
        SELECT o.id
          FROM farebox.orders o
         WHERE o.kind = 'auto' AND o.livemode = _livemode AND o.state IN ('created', 'open', 'pending')
           AND o.changed_at < clock_timestamp() - greatest(
                   _after, least((clock_timestamp() - o.created_at) / 8, interval '1 hour')
               )
         ORDER BY o.changed_at
         LIMIT _rows
           FOR UPDATE SKIP LOCKED
    )
    UPDATE farebox.orders AS o
       SET changed_at = clock_timestamp()
      FROM silent
     WHERE o.id = silent.id
    RETURNING o.*
$$;

-- Until when to wait after so many failures in a row; without end where another attempt could only fail, too. problem:
-- Stripe's decline code, or its error's code, or a word of ours. The card networks count attempts: there are few.
CREATE FUNCTION farebox.auto_topup_pause(_problem text, _failures integer) RETURNS timestamptz
LANGUAGE sql AS $$
    SELECT CASE
        WHEN _problem IN (
            'authentication_required', 'expired_card', 'fraudulent', 'incorrect_number', 'invalid_account',
            'lost_card', 'merchant_blacklist', 'payment_method_gone', 'pickup_card', 'restricted_card',
            'revocation_of_all_authorizations', 'revocation_of_authorization', 'security_violation', 'stolen_card',
            'stop_payment_order'
        ) THEN 'infinity'
        ELSE coalesce(
            clock_timestamp()
                + (ARRAY[interval '1 hour', interval '6 hours', interval '24 hours', interval '72 hours'])[_failures],
            'infinity'
        )
    END
$$;

-- An attempt has come to nothing, whoever found that out: wait, and tell. Where the bank wants its customer the message
-- comes with the link, from link_auto_topup.
CREATE FUNCTION farebox.auto_order_ended() RETURNS trigger
LANGUAGE plpgsql AS $$
DECLARE
    why text := coalesce(NEW.problem, NEW.state);
    wanted farebox.auto_topups;
BEGIN
    UPDATE farebox.auto_topups AS t
       SET failures = t.failures + 1, problem = why, failed_order = NEW.id, link_order = NULL,
           blocked_until = farebox.auto_topup_pause(why, t.failures + 1),
           changed_at = clock_timestamp()
     WHERE t.account_id = NEW.account_id
    RETURNING t.* INTO wanted;
    IF wanted.account_id IS NOT NULL AND why <> 'authentication_required' THEN
        PERFORM farebox.tell('account.auto_topup_failed', NEW.account_id, NEW.id::text, jsonb_build_object(
            'order', NEW.id, 'pack', NEW.pack, 'reason', why, 'checkout_url', NULL, 'next_attempt_at',
            CASE WHEN isfinite(wanted.blocked_until) THEN farebox.time_text(wanted.blocked_until) END
        ));
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER auto_order_ended AFTER UPDATE OF state ON farebox.orders
    FOR EACH ROW
    WHEN (NEW.kind = 'auto' AND NEW.state IN ('failed', 'expired', 'canceled') AND OLD.state <> NEW.state)
    EXECUTE FUNCTION farebox.auto_order_ended();

-- The checkout that its owner is sent to in place of the attempt that the bank refused without them; told once. NULL:
-- there can be none. 'late' where another attempt, or its owner, has come in between.
CREATE FUNCTION farebox.link_auto_topup(_account_id uuid, _failed_order uuid, _link_order uuid) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- Its own number where there is no checkout: so that it isn't looked for again.
    UPDATE farebox.auto_topups AS t
       SET link_order = coalesce(_link_order, _failed_order), changed_at = clock_timestamp()
     WHERE t.account_id = _account_id AND t.failed_order = _failed_order AND t.link_order IS NULL;
    IF NOT FOUND THEN
        RETURN 'late';
    END IF;
    PERFORM farebox.tell('account.auto_topup_failed', _account_id, f.id::text, jsonb_build_object(
        'order', f.id, 'pack', f.pack, 'reason', f.problem, 'next_attempt_at', NULL, 'checkout_url',
        (SELECT o.url FROM farebox.orders o WHERE o.id = _link_order)
    )) FROM farebox.orders f WHERE f.id = _failed_order;
    RETURN 'done';
END
$$;

GRANT EXECUTE ON FUNCTION
    farebox.set_auto_topup, farebox.stop_auto_topup, farebox.open_auto_topup, farebox.claim_auto_orders,
    farebox.link_auto_topup
TO farebox_control;
