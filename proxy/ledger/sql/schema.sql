-- What the migrations make, for reading. Written by `make schema` from a migrated database; a test proves it equal.
-- Nothing runs this file.

CREATE SCHEMA farebox;

CREATE TYPE farebox.audit_check AS (
	name text,
	checked bigint,
	violations bigint,
	example text
);

CREATE TYPE farebox.audit_step AS (
	account_id uuid,
	after bigint,
	upto bigint,
	whole boolean,
	balance bigint,
	debt bigint
);

CREATE TYPE farebox.audit_stretch AS (
	transfers bigint,
	first bigint,
	last bigint,
	balance numeric,
	debt numeric,
	charges bigint,
	unchained bigint,
	unchained_at bigint,
	misnamed bigint,
	misnamed_at bigint,
	seals bigint,
	altered bigint,
	altered_in bigint,
	unlinked bigint,
	unlinked_at bigint
);

CREATE TYPE farebox.move AS (
	account_id uuid,
	kind text,
	due bigint,
	lent bigint,
	paid bigint,
	balance bigint,
	debt bigint,
	version bigint,
	hold_id uuid,
	reference text,
	actor text,
	reason text
);

CREATE TYPE farebox.purse AS (
	account_id uuid,
	balance bigint,
	held bigint,
	debt bigint,
	version bigint,
	limited boolean,
	kind text,
	due bigint,
	lent bigint,
	paid bigint
);

CREATE FUNCTION farebox.a_lost_hold() RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE
    AS $$
    SELECT min(u.id::text)
      FROM farebox.seals s, unnest(s.hold_ids || s.provisional_ids) AS u (id)
     WHERE NOT EXISTS (SELECT FROM farebox.holds h WHERE h.id = u.id)
$$;

CREATE FUNCTION farebox.a_move(_purse farebox.purse, _hold_id uuid, _reference text DEFAULT NULL::text, _actor text DEFAULT NULL::text, _reason text DEFAULT NULL::text) RETURNS farebox.move
    LANGUAGE sql IMMUTABLE
    AS $$
    SELECT ROW(_purse.account_id, _purse.kind, _purse.due, _purse.lent, _purse.paid, _purse.balance, _purse.debt,
               _purse.version, _hold_id, _reference, _actor, _reason)::farebox.move
$$;

CREATE FUNCTION farebox.a_stray_charge() RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE
    AS $$
    SELECT min(t.account_id || '-' || t.version)
      FROM farebox.transfers t LEFT JOIN farebox.holds h ON h.id = t.hold_id AND h.account_id = t.account_id
     WHERE t.kind IN ('charge', 'true_up', 'overrun', 'reversal') AND h.id IS NULL
       AND (t.kind <> 'overrun' OR t.hold_id IS NOT NULL)
$$;

CREATE FUNCTION farebox.a_stray_draw() RETURNS text
    LANGUAGE sql STABLE
    AS $$
    SELECT min(d.account_id || '-' || d.version)
      FROM farebox.draws d
     WHERE NOT EXISTS (
               SELECT FROM farebox.transfers t JOIN farebox.lot_marks m ON m.account_id = t.account_id
                WHERE t.account_id = d.account_id AND t.version = d.version AND m.version >= t.version
           )
$$;

CREATE FUNCTION farebox.a_stray_seal() RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE
    AS $$
    SELECT min(s.account_id || ' seal ' || s.number)
      FROM farebox.seals s
     WHERE s.number > 1
       AND NOT EXISTS (SELECT FROM farebox.seals p WHERE p.account_id = s.account_id AND p.number = s.number - 1)
$$;

CREATE FUNCTION farebox.a_stray_transfer() RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE
    AS $$
    SELECT min(t.account_id || '-' || t.version)
      FROM farebox.transfers t LEFT JOIN farebox.accounts a ON a.id = t.account_id
     WHERE a.id IS NULL OR t.version < 1 OR t.version > a.version
$$;

CREATE FUNCTION farebox.account_frozen(_account_id uuid) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    SELECT coalesce((SELECT a.frozen_at IS NOT NULL FROM farebox.accounts a WHERE a.id = _account_id), false)
$$;

CREATE FUNCTION farebox.advance_order(_id uuid, _state text, _payment_intent text, _problem text) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION farebox.apply_dispute(_dispute_id text, _payment_intent text, _amount bigint, _currency text, _status text, _withdrawn boolean, _asked bigint, OUT outcome text, OUT order_id uuid, OUT account_id uuid, OUT moved bigint, OUT froze boolean) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION farebox.apply_refund(_refund_id text, _payment_intent text, _amount bigint, _currency text, _status text, _request_id uuid, _problem text, OUT outcome text, OUT order_id uuid, OUT account_id uuid, OUT moved bigint) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION farebox.ask_dispute() RETURNS bigint
    LANGUAGE sql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    SELECT nextval('farebox.dispute_questions')
$$;

CREATE FUNCTION farebox.audit() RETURNS SETOF farebox.audit_check
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    SET work_mem TO '64MB'
    SET parallel_setup_cost TO '0'
    SET parallel_tuple_cost TO '0'
    SET min_parallel_table_scan_size TO '1MB'
    SET jit TO 'off'
    AS $$
BEGIN
    RETURN QUERY SELECT * FROM farebox.audit_visibility();
    RETURN QUERY SELECT * FROM farebox.audit_guards();
    RETURN QUERY SELECT * FROM farebox.audit_book();
    RETURN QUERY SELECT * FROM farebox.audit_holds();
    RETURN QUERY SELECT * FROM farebox.audit_overruns();
    RETURN QUERY SELECT * FROM farebox.audit_lots();
    RETURN QUERY SELECT * FROM farebox.audit_price_versions();
    RETURN QUERY SELECT * FROM farebox.audit_leases();
    RETURN QUERY SELECT * FROM farebox.audit_orders();
    RETURN QUERY SELECT * FROM farebox.audit_takings();
    RETURN QUERY SELECT * FROM farebox.audit_refund_requests();
    RETURN QUERY SELECT * FROM farebox.audit_limits();
END
$$;

CREATE FUNCTION farebox.audit_accounts_since(_steps farebox.audit_step[], _bad uuid[]) RETURNS SETOF farebox.audit_check
    LANGUAGE plpgsql
    SET plan_cache_mode TO 'force_custom_plan'
    AS $$
BEGIN
    RETURN QUERY
        WITH steps AS MATERIALIZED (
            SELECT s.* FROM unnest(_steps) AS s
        ), rows AS MATERIALIZED (
            SELECT t.account_id AS id, t.version, t.balance_after, t.debt_after, farebox.named_rightly(r.transfer) AS named,
                   t.version = coalesce(lag(t.version) OVER w, s.after) + 1 AS next,
                   t.balance_after = coalesce(lag(t.balance_after) OVER w, s.balance)
                       + CASE t.account_side WHEN 'credit' THEN t.amount ELSE -t.amount END
                       AND t.debt_after = coalesce(lag(t.debt_after) OVER w, s.debt)
                           + CASE t.system_account WHEN 'receivable' THEN 1 ELSE 0 END
                             * CASE t.account_side WHEN 'credit' THEN t.amount ELSE -t.amount END AS chained
              FROM farebox.audit_step_rows(_steps) AS r,
                   LATERAL (SELECT (r.step).*) AS s,
                   LATERAL (SELECT (r.transfer).*) AS t
            WINDOW w AS (PARTITION BY t.account_id ORDER BY t.version)
        ), stretches AS MATERIALIZED (
            SELECT r.id, max(r.version) AS last, bool_and(r.next) AS next, bool_and(r.chained) AS chained,
                   bool_and(r.named) AS named, (array_agg(r.balance_after ORDER BY r.version DESC))[1] AS balance,
                   (array_agg(r.debt_after ORDER BY r.version DESC))[1] AS debt
              FROM rows r
             GROUP BY r.id
        ), open AS (
            SELECT h.account_id, sum(h.amount) AS held
              FROM farebox.holds h WHERE h.state = 'open' GROUP BY h.account_id
        ), judged AS MATERIALIZED (
            SELECT coalesce(a.id, m.account_id, o.account_id)::text AS id, a.id AS account_id, s.last, s.balance AS owned,
                   s.debt AS owed,
                   CASE
                       WHEN b.whole THEN s.balance IS NOT DISTINCT FROM a.balance
                       WHEN a.version = coalesce(m.version, 0) THEN a.balance = coalesce(m.balance, 0)
                       ELSE a.id IS NOT NULL
                   END AS balance,
                   CASE
                       WHEN b.whole THEN s.debt IS NOT DISTINCT FROM a.debt
                       WHEN a.version = coalesce(m.version, 0) THEN a.debt = coalesce(m.debt, 0)
                       ELSE a.id IS NOT NULL
                   END AS debt,
                   a.held IS NOT DISTINCT FROM coalesce(o.held, 0) AS held,
                   a.version >= coalesce(m.version, 0) AND a.id IS NOT NULL
                       AND (b.account_id IS NULL OR coalesce(s.next AND s.last = b.upto, false)) AS versions,
                   coalesce(
                       a.held >= 0 AND a.balance >= a.held AND a.debt >= 0 AND (a.debt = 0 OR a.balance = a.held), false
                   ) AS limits,
                   coalesce(s.chained, true) AS chained, coalesce(s.named, true) AS named
              FROM farebox.accounts a
              FULL JOIN farebox.audit_marks m ON m.account_id = a.id
              LEFT JOIN steps b ON b.account_id = a.id
              LEFT JOIN stretches s ON s.id = a.id
              FULL JOIN open o ON o.account_id = coalesce(a.id, m.account_id)
        ), moved AS (
            INSERT INTO farebox.audit_marks AS m (account_id, version, balance, debt)
            SELECT j.account_id, j.last, j.owned, j.owed
              FROM judged j
             WHERE j.last IS NOT NULL AND j.balance AND j.debt AND j.versions AND j.chained AND j.named
               AND j.account_id = ANY (_bad) IS NOT TRUE
            ON CONFLICT (account_id) DO UPDATE
               SET version = excluded.version, balance = excluded.balance, debt = excluded.debt
        ), counted AS (
            SELECT count(*) AS checked, (SELECT count(*) FROM rows) AS rows,
                   count(*) FILTER (WHERE NOT j.balance) AS v1, min(j.id) FILTER (WHERE NOT j.balance) AS e1,
                   count(*) FILTER (WHERE NOT j.held) AS v2, min(j.id) FILTER (WHERE NOT j.held) AS e2,
                   count(*) FILTER (WHERE NOT j.debt) AS v3, min(j.id) FILTER (WHERE NOT j.debt) AS e3,
                   count(*) FILTER (WHERE NOT j.versions) AS v4, min(j.id) FILTER (WHERE NOT j.versions) AS e4,
                   count(*) FILTER (WHERE NOT j.limits) AS v5, min(j.id) FILTER (WHERE NOT j.limits) AS e5,
                   count(*) FILTER (WHERE NOT j.chained) AS v6, min(j.id) FILTER (WHERE NOT j.chained) AS e6,
                   count(*) FILTER (WHERE NOT j.named) AS v7, min(j.id) FILTER (WHERE NOT j.named) AS e7
              FROM judged j
        )
        SELECT v.name, v.checked, v.violations, v.example
          FROM counted c,
               LATERAL (VALUES
                   ('balance_is_the_sum_of_transfers', c.checked, c.v1, c.e1),
                   ('held_is_the_sum_of_open_holds', c.checked, c.v2, c.e2),
                   ('debt_is_what_receivable_lent', c.checked, c.v3, c.e3),
                   ('versions_are_gapless', c.checked, c.v4, c.e4),
                   ('nothing_is_negative_and_debt_is_paid_first', c.checked, c.v5, c.e5),
                   ('balances_chain_from_transfer_to_transfer', c.rows, c.v6, c.e6),
                   ('transfers_move_between_the_sides_of_their_kind', c.rows, c.v7, c.e7)
               ) AS v (name, checked, violations, example);
END
$$;

CREATE FUNCTION farebox.audit_book() RETURNS SETOF farebox.audit_check
    LANGUAGE plpgsql STABLE
    AS $$
DECLARE
    stretch CONSTANT integer := 32;
BEGIN
    RETURN QUERY
    WITH units AS MATERIALIZED (
        SELECT s.account_id, f.*
          FROM farebox.seals s, LATERAL farebox.audit_stretch(s.account_id, s.number, stretch) AS f
         WHERE (s.number - 1) % stretch = 0
        UNION ALL
        SELECT a.id, f.*
          FROM farebox.accounts a, LATERAL farebox.audit_stretch(a.id, NULL, 0) AS f
         WHERE a.version > coalesce((
             SELECT s.last_version FROM farebox.seals s WHERE s.account_id = a.id ORDER BY s.number DESC LIMIT 1
         ), 0)
    ), book AS (
        SELECT u.account_id, sum(u.transfers) AS transfers, min(u.first) AS first, max(u.last) AS last,
               sum(u.balance) AS balance, sum(u.debt) AS debt
          FROM units u
         GROUP BY u.account_id
    ), open AS (
        SELECT h.account_id, sum(h.amount) AS held FROM farebox.holds h WHERE h.state = 'open' GROUP BY h.account_id
    ), compared AS (
        -- Full joins: transfers and open holds of an account that doesn't exist break the same checks.
        SELECT coalesce(a.id, b.account_id, o.account_id)::text AS id,
               a.balance IS NOT DISTINCT FROM coalesce(b.balance, 0) AS balance,
               a.held IS NOT DISTINCT FROM coalesce(o.held, 0) AS held,
               a.debt IS NOT DISTINCT FROM coalesce(b.debt, 0) AS debt,
               a.version IS NOT DISTINCT FROM coalesce(b.last, 0)
                   AND coalesce(b.first, 1) = 1 AND coalesce(b.transfers, 0) = coalesce(b.last, 0) AS versions,
               coalesce(
                   a.held >= 0 AND a.balance >= a.held AND a.debt >= 0 AND (a.debt = 0 OR a.balance = a.held), false
               ) AS limits
          FROM farebox.accounts a
          FULL JOIN book b ON b.account_id = a.id
          FULL JOIN open o ON o.account_id = coalesce(a.id, b.account_id)
    ), accounts AS (
        SELECT count(*) AS checked,
               count(*) FILTER (WHERE NOT j.balance) AS v1, min(j.id) FILTER (WHERE NOT j.balance) AS e1,
               count(*) FILTER (WHERE NOT j.held) AS v2, min(j.id) FILTER (WHERE NOT j.held) AS e2,
               count(*) FILTER (WHERE NOT j.debt) AS v3, min(j.id) FILTER (WHERE NOT j.debt) AS e3,
               count(*) FILTER (WHERE NOT j.versions) AS v4, min(j.id) FILTER (WHERE NOT j.versions) AS e4,
               count(*) FILTER (WHERE NOT j.limits) AS v5, min(j.id) FILTER (WHERE NOT j.limits) AS e5
          FROM compared j
    ), transfers AS (
        SELECT coalesce(sum(u.transfers), 0) AS checked, coalesce(sum(u.seals), 0) AS seals,
               coalesce(sum(u.transfers) FILTER (WHERE u.seals > 0), 0) AS sealed,
               coalesce(sum(u.unchained), 0) AS v6, min(u.account_id || '-' || u.unchained_at) AS e6,
               coalesce(sum(u.misnamed), 0) AS v7, min(u.account_id || '-' || u.misnamed_at) AS e7,
               coalesce(sum(u.altered), 0) AS v8, min(u.account_id || ' seal ' || u.altered_in) AS e8,
               coalesce(sum(u.unlinked), 0) AS v10, min(u.account_id || ' seal ' || u.unlinked_at) AS e10
          FROM units u
    ), strays AS MATERIALIZED (
        -- What no account's stretches led to, counted.
        SELECT (SELECT count(*) FROM farebox.transfers) - t.checked AS transfers,
               (SELECT count(*) FROM farebox.seals) - t.seals AS seals
          FROM transfers t
    )
    SELECT v.name, v.checked::bigint, v.violations::bigint, v.example
      FROM accounts a, transfers t, strays s,
           LATERAL (VALUES
               ('balance_is_the_sum_of_transfers', a.checked, a.v1, a.e1),
               ('held_is_the_sum_of_open_holds', a.checked, a.v2, a.e2),
               ('debt_is_what_receivable_lent', a.checked, a.v3, a.e3),
               ('versions_are_gapless', a.checked, a.v4, a.e4),
               ('nothing_is_negative_and_debt_is_paid_first', a.checked, a.v5, a.e5),
               ('balances_chain_from_transfer_to_transfer', t.checked, t.v6, t.e6),
               ('transfers_move_between_the_sides_of_their_kind', t.checked, t.v7, t.e7),
               ('every_transfer_has_its_place', t.checked + s.transfers, abs(s.transfers),
                CASE WHEN s.transfers <> 0 THEN farebox.a_stray_transfer() END),
               ('sealed_transfers_are_as_they_were', t.sealed, t.v8, t.e8),
               ('seals_chain_from_block_to_block', t.seals + s.seals, t.v10 + abs(s.seals),
                coalesce(t.e10, CASE WHEN s.seals <> 0 THEN farebox.a_stray_seal() END))
           ) AS v (name, checked, violations, example);
END
$$;

CREATE FUNCTION farebox.audit_ended_holds(_named uuid[], _since timestamp with time zone, _rows integer) RETURNS TABLE(hold_id uuid, account_id uuid, ended_at timestamp with time zone, in_time boolean, charged boolean, ended_so boolean, priced boolean, within boolean)
    LANGUAGE sql STABLE
    AS $$
    WITH holds AS (
        (SELECT h AS hold, true AS in_time FROM farebox.holds h
          WHERE h.state <> 'open' AND h.ended_at >= _since ORDER BY h.ended_at LIMIT _rows)
        UNION ALL
        SELECT h, false FROM unnest(_named) AS n (id) JOIN farebox.holds h ON h.id = n.id
         WHERE h.state = 'open' OR h.ended_at < _since
    )
    SELECT h.id, h.account_id, h.ended_at, x.in_time,
           (coalesce(h.charge, 0), h.overrun, h.reversed) = (b.charge, o.overrun, o.reversed),
           farebox.ended_so(x.hold),
           h.state = 'open' OR farebox.priced_so(x.hold, p.rates, p.per_request),
           h.state = 'open' OR h.usage_source IS DISTINCT FROM 'counted' OR h.fingerprint IS NULL
               OR h.charge <= h.amount
      FROM holds x CROSS JOIN LATERAL (SELECT (x.hold).*) AS h
      LEFT JOIN farebox.prices p ON p.version = h.price_version AND p.model = h.model AND p.variant = h.variant,
           LATERAL (
               SELECT coalesce(sum(CASE t.account_side WHEN 'debit' THEN t.amount ELSE -t.amount END), 0) AS charge
                 FROM farebox.transfers t
                WHERE t.hold_id = h.id AND t.kind IN ('charge', 'true_up') AND t.account_id = h.account_id
           ) AS b,
           LATERAL (
               SELECT coalesce(sum(t.amount) FILTER (WHERE t.kind = 'overrun'), 0) AS overrun,
                      coalesce(sum(t.amount) FILTER (WHERE t.kind = 'reversal'), 0) AS reversed
                 FROM farebox.transfers t
                WHERE t.hold_id = h.id AND t.kind IN ('overrun', 'reversal') AND t.account_id = h.account_id
           ) AS o
    UNION ALL
    -- Named by a transfer, and not there.
    SELECT n.id, NULL, NULL, false, false, true, true, true
      FROM unnest(_named) AS n (id)
     WHERE NOT EXISTS (SELECT FROM farebox.holds h WHERE h.id = n.id)
$$;

CREATE FUNCTION farebox.audit_guards() RETURNS SETOF farebox.audit_check
    LANGUAGE sql STABLE
    AS $$
    WITH judged AS (
        SELECT 'trigger ' || g.name || ' on ' || g.relation AS id,
               coalesce(t.tgenabled IN ('O', 'A') AND t.tgfoid = 'farebox.refuse_change'::regproc, false) AS kept
          FROM (VALUES
                   ('transfers', 'append_only'), ('seals', 'append_only'), ('price_versions', 'immutable'),
                   ('prices', 'immutable'), ('accounts', 'never_removed'), ('holds', 'never_removed'),
                   ('api_keys', 'never_removed'), ('lots', 'never_removed'), ('draws', 'append_only'),
                   ('orders', 'never_removed'), ('stripe_refunds', 'never_removed'), ('disputes', 'never_removed'),
                   ('refund_requests', 'never_removed')
               ) AS g (relation, name)
          LEFT JOIN pg_trigger t ON t.tgrelid = to_regclass('farebox.' || g.relation) AND t.tgname = g.name
        UNION ALL
        SELECT 'index ' || g.name, coalesce(i.indisunique AND i.indisvalid AND i.indimmediate, false)
          FROM (VALUES
                   ('accounts_pkey'), ('holds_pkey'), ('transfers_pkey'), ('seals_pkey'), ('prices_pkey'),
                   ('transfers_once_a_hold'), ('transfers_reference'), ('lots_pkey'), ('draws_pkey'), ('lot_marks_pkey'),
                   ('orders_pkey'), ('orders_payment_intent_key'), ('orders_session_id_key'), ('orders_invoice_key')
               ) AS g (name)
          LEFT JOIN pg_index i ON i.indexrelid = to_regclass('farebox.' || g.name)
    )
    SELECT 'guards_stand', count(*), count(*) FILTER (WHERE NOT j.kept), min(j.id) FILTER (WHERE NOT j.kept)
      FROM judged j
$$;

CREATE FUNCTION farebox.audit_holds() RETURNS SETOF farebox.audit_check
    LANGUAGE plpgsql STABLE
    AS $$
BEGIN
    RETURN QUERY
    WITH counted AS MATERIALIZED (
        SELECT count(*) AS checked, count(*) FILTER (WHERE j.ended) AS ended, coalesce(sum(j.transfers), 0) AS transfers,
               coalesce(sum(j.seals), 0) AS seals,
               count(*) FILTER (WHERE NOT j.kept) AS v1, count(*) FILTER (WHERE NOT j.ended_so) AS v2,
               count(*) FILTER (WHERE NOT j.priced) AS v3, count(*) FILTER (WHERE NOT j.within_hold) AS v4,
               count(*) FILTER (WHERE NOT j.as_sealed) AS v5
          FROM farebox.judged_holds() AS j
    ), strays AS MATERIALIZED (
        SELECT (
                   SELECT count(*) FROM farebox.transfers t
                    WHERE t.kind IN ('charge', 'true_up', 'overrun', 'reversal')
                      AND (t.kind <> 'overrun' OR t.hold_id IS NOT NULL)
               ) - c.transfers AS transfers,
               (SELECT coalesce(sum(cardinality(s.hold_ids) + cardinality(s.provisional_ids)), 0) FROM farebox.seals s)
                   - c.seals AS seals
          FROM counted c
    )
    SELECT v.name, v.checked::bigint, v.violations::bigint, v.example
      FROM counted c, strays s,
           LATERAL (VALUES
               ('every_hold_was_charged_what_its_transfers_say', c.checked, c.v1 + abs(s.transfers),
                coalesce(CASE WHEN c.v1 > 0 THEN (
                    SELECT min(j.id::text) FROM farebox.judged_holds() AS j WHERE NOT j.kept
                ) END, CASE WHEN s.transfers <> 0 THEN farebox.a_stray_charge() END)),
               ('every_hold_ended_as_its_state_says', c.checked, c.v2, CASE WHEN c.v2 > 0 THEN (
                    SELECT min(j.id::text) FROM farebox.judged_holds() AS j WHERE NOT j.ended_so
                ) END),
               ('sealed_holds_are_as_they_were', c.seals + s.seals, c.v5 + abs(s.seals),
                coalesce(CASE WHEN c.v5 > 0 THEN (
                    SELECT min(j.id::text) FROM farebox.judged_holds() AS j WHERE NOT j.as_sealed
                ) END, CASE WHEN s.seals <> 0 THEN farebox.a_lost_hold() END)),
               ('charges_recompute_from_usage_and_price', c.ended, c.v3, CASE WHEN c.v3 > 0 THEN (
                    SELECT min(j.id::text) FROM farebox.judged_holds() AS j WHERE NOT j.priced
                ) END),
               ('counted_charges_stay_within_their_hold', c.ended, c.v4, CASE WHEN c.v4 > 0 THEN (
                    SELECT min(j.id::text) FROM farebox.judged_holds() AS j WHERE NOT j.within_hold
                ) END)
           ) AS v (name, checked, violations, example);
END
$$;

CREATE FUNCTION farebox.audit_leases() RETURNS SETOF farebox.audit_check
    LANGUAGE sql STABLE
    AS $$
    WITH judged AS (
        SELECT h.id::text AS id,
               CASE WHEN h.worker_id IS NULL THEN
                   (r.account_id, r.credits + r.bonus) IS NOT DISTINCT FROM (h.account_id, h.amount)
               ELSE w.id IS NOT NULL AND (
                   w.lease_until > now() - interval '5 minutes'
                   -- Nobody sweeps while no worker runs, nor soon after Postgres came up or after workers were cut off
                   -- from it: one that has been there for a while should have.
                   OR farebox.postgres_started() > now() - interval '5 minutes'
                   OR NOT EXISTS (
                       SELECT FROM farebox.workers live
                        WHERE live.lease_until > now()
                          AND live.started_at < now() - interval '5 minutes'
                          AND live.held_since < now() - interval '5 minutes'
                   )
               ) END AS kept
          FROM farebox.holds h
          LEFT JOIN farebox.workers w ON w.id = h.worker_id
          LEFT JOIN farebox.refund_requests r ON r.id = h.id AND r.state = 'held'
         WHERE h.state = 'open'
    )
    SELECT 'open_holds_belong_to_a_live_worker', count(*), count(*) FILTER (WHERE NOT j.kept),
           min(j.id) FILTER (WHERE NOT j.kept)
      FROM judged j
$$;

CREATE FUNCTION farebox.audit_limits() RETURNS SETOF farebox.audit_check
    LANGUAGE sql STABLE
    AS $$
    WITH spent AS (
        SELECT s.family, s.spent, s.held, k.account_id = s.account_id AS known,
               coalesce(sum(h.charge - h.reversed), 0) AS charged,
               coalesce(sum(h.amount) FILTER (WHERE h.state = 'open'), 0) AS open
          FROM farebox.spend_limits s
          LEFT JOIN farebox.api_keys k USING (family)
          LEFT JOIN farebox.holds h ON h.account_id = k.account_id AND h.key_id = k.id
         GROUP BY s.family, k.account_id
    ), judged AS (
        SELECT s.family, coalesce(s.known AND (s.spent, s.held) = (s.charged, s.open), false) AS kept FROM spent s
    )
    SELECT 'spend_limits_count_what_was_spent', count(*), count(*) FILTER (WHERE NOT j.kept),
           min(j.family) FILTER (WHERE NOT j.kept)
      FROM judged j
$$;

CREATE FUNCTION farebox.audit_lots() RETURNS SETOF farebox.audit_check
    LANGUAGE plpgsql STABLE
    AS $$
BEGIN
    RETURN QUERY
    WITH marks AS MATERIALIZED (
        SELECT count(*) AS checked, count(*) FILTER (WHERE NOT j.held) AS v1,
               count(*) FILTER (WHERE NOT j.spoken_for) AS v2
          FROM farebox.judged_marks(NULL) AS j
    ), lots AS MATERIALIZED (
        SELECT count(*) AS checked, count(*) FILTER (WHERE NOT j.came) AS v3, count(*) FILTER (WHERE NOT j.left_so) AS v4
          FROM farebox.judged_lots() AS j
    ), draws AS MATERIALIZED (
        SELECT count(*) AS checked, count(*) FILTER (WHERE NOT j.drawn) AS v5,
               (SELECT count(*) FROM farebox.draws) - coalesce(sum(j.draws), 0)::bigint AS strays
          FROM farebox.judged_draws() AS j
    )
    SELECT v.name, v.checked, v.violations, v.example
      FROM marks m, lots l, draws d,
           LATERAL (VALUES
               ('lots_hold_the_balance_at_their_mark', m.checked, m.v1, CASE WHEN m.v1 > 0 THEN (
                    SELECT min(j.id) FROM farebox.judged_marks(NULL) AS j WHERE NOT j.held
                ) END),
               ('lots_owe_no_more_than_the_debt_and_reserve_no_more_than_is_held', m.checked, m.v2,
                CASE WHEN m.v2 > 0 THEN (
                    SELECT min(j.id) FROM farebox.judged_marks(NULL) AS j WHERE NOT j.spoken_for
                ) END),
               ('lots_came_with_their_transfers', l.checked, l.v3, CASE WHEN l.v3 > 0 THEN (
                    SELECT min(j.id) FROM farebox.judged_lots() AS j WHERE NOT j.came
                ) END),
               ('lots_have_left_what_their_draws_left', l.checked, l.v4, CASE WHEN l.v4 > 0 THEN (
                    SELECT min(j.id) FROM farebox.judged_lots() AS j WHERE NOT j.left_so
                ) END),
               ('transfers_are_drawn_from_lots', d.checked, d.v5 + abs(d.strays), coalesce(CASE WHEN d.v5 > 0 THEN (
                    SELECT min(j.id) FROM farebox.judged_draws() AS j WHERE NOT j.drawn
                ) END, CASE WHEN d.strays <> 0 THEN farebox.a_stray_draw() END))
           ) AS v (name, checked, violations, example);
END
$$;

CREATE FUNCTION farebox.audit_lots_since(_steps farebox.audit_step[]) RETURNS SETOF farebox.audit_check
    LANGUAGE plpgsql STABLE
    SET plan_cache_mode TO 'force_custom_plan'
    AS $$
DECLARE
    -- Known when the plan is made: it goes to these accounts, and to no other.
    accounts uuid[] := ARRAY(SELECT s.account_id FROM unnest(_steps) AS s);
BEGIN
    RETURN QUERY
    WITH judged AS MATERIALIZED (
        SELECT j.* FROM farebox.judged_marks(accounts) AS j
    )
    SELECT v.name, v.checked, v.violations, v.example
      FROM (
               SELECT count(*) AS checked,
                      count(*) FILTER (WHERE NOT j.held) AS v1, min(j.id) FILTER (WHERE NOT j.held) AS e1,
                      count(*) FILTER (WHERE NOT j.spoken_for) AS v2, min(j.id) FILTER (WHERE NOT j.spoken_for) AS e2
                 FROM judged j
           ) AS c,
           LATERAL (VALUES
               ('lots_hold_the_balance_at_their_mark', c.checked, c.v1, c.e1),
               ('lots_owe_no_more_than_the_debt_and_reserve_no_more_than_is_held', c.checked, c.v2, c.e2)
           ) AS v (name, checked, violations, example);
END
$$;

CREATE FUNCTION farebox.audit_orders() RETURNS SETOF farebox.audit_check
    LANGUAGE sql STABLE
    AS $$
    WITH book AS MATERIALIZED (
        SELECT t.account_id, t.version, t.kind, t.amount, t.reference
          FROM farebox.transfers t WHERE t.kind IN ('purchase', 'plan', 'promo')
    ), paid AS MATERIALIZED (
        SELECT o.*, o AS sold FROM farebox.orders o WHERE o.state = 'paid'
    ), judged AS (
        SELECT o.id::text AS id,
               farebox.credited_so(o.sold, c.kind, c.amount, c.reference, b.kind, b.amount, b.reference) AS kept
          FROM paid o
          LEFT JOIN book c ON c.account_id = o.account_id AND c.version = o.credit_version
          LEFT JOIN book b ON b.account_id = o.account_id AND b.version = o.bonus_version
    ), purchases AS (
        SELECT b.account_id || '-' || b.version AS id, o.id IS NOT NULL AS kept
          FROM book b LEFT JOIN paid o ON o.account_id = b.account_id AND o.credit_version = b.version
         WHERE b.kind IN ('purchase', 'plan')
    )
    SELECT 'paid_orders_were_credited', count(*), count(*) FILTER (WHERE NOT j.kept), min(j.id) FILTER (WHERE NOT j.kept)
      FROM judged j
    UNION ALL
    SELECT 'purchases_have_their_order', count(*), count(*) FILTER (WHERE NOT p.kept), min(p.id) FILTER (WHERE NOT p.kept)
      FROM purchases p
$$;

CREATE FUNCTION farebox.audit_orders_since(_steps farebox.audit_step[]) RETURNS SETOF farebox.audit_check
    LANGUAGE sql STABLE
    AS $$
    SELECT v.name, count(j.name), count(*) FILTER (WHERE NOT j.kept), min(j.id) FILTER (WHERE NOT j.kept)
      FROM (VALUES ('paid_orders_were_credited'), ('purchases_have_their_order'),
                   ('orders_gave_up_what_their_refunds_say'), ('the_book_has_what_orders_gave_up')) AS v (name)
      LEFT JOIN farebox.judged_orders_since(_steps) AS j ON j.name = v.name
     GROUP BY v.name
    UNION ALL
    SELECT * FROM farebox.audit_refund_requests()
$$;

CREATE FUNCTION farebox.audit_overruns() RETURNS SETOF farebox.audit_check
    LANGUAGE sql STABLE
    AS $$
    WITH judged AS (
        SELECT o.account_id || '-' || o.version AS id, t.kind IN ('refund', 'dispute') IS TRUE AS taken
          FROM farebox.transfers o
          LEFT JOIN farebox.transfers t ON t.account_id = o.account_id AND t.version = o.version + 1
         WHERE o.kind = 'overrun' AND o.hold_id IS NULL
    )
    SELECT 'what_no_hold_was_lent_was_taken_back', count(*), count(*) FILTER (WHERE NOT j.taken),
           min(j.id) FILTER (WHERE NOT j.taken)
      FROM judged j
$$;

CREATE FUNCTION farebox.audit_price_versions() RETURNS SETOF farebox.audit_check
    LANGUAGE sql STABLE
    AS $$
    WITH said AS (
        SELECT v.version, r.* FROM farebox.price_versions v, LATERAL farebox.price_rows(v.body) AS r
    ), broken AS (
        SELECT coalesce(s.version, p.version) AS version
          FROM said s FULL JOIN farebox.prices p USING (version, model, variant)
         WHERE (s.rates, s.per_request) IS DISTINCT FROM (p.rates, p.per_request)
        UNION
        SELECT v.version FROM farebox.price_versions v
         WHERE encode(sha256(convert_to(v.body, 'UTF8')), 'hex') <> v.version
    )
    SELECT 'price_versions_are_their_hash', (SELECT count(*) FROM farebox.price_versions),
           (SELECT count(*) FROM broken), (SELECT min(b.version) FROM broken b)
$$;

CREATE FUNCTION farebox.audit_price_versions_since(_since timestamp with time zone) RETURNS SETOF farebox.audit_check
    LANGUAGE sql STABLE
    AS $$
    WITH new AS (
        SELECT v.version, v.body FROM farebox.price_versions v WHERE v.created_at > _since
    ), broken AS (
        SELECT n.version FROM new n WHERE encode(sha256(convert_to(n.body, 'UTF8')), 'hex') <> n.version
        UNION
        SELECT coalesce(s.version, p.version)
          FROM (SELECT n.version, r.* FROM new n, LATERAL farebox.price_rows(n.body) AS r) AS s
          FULL JOIN (SELECT p.* FROM farebox.prices p JOIN new n USING (version)) AS p USING (version, model, variant)
         WHERE (s.rates, s.per_request) IS DISTINCT FROM (p.rates, p.per_request)
    )
    SELECT 'price_versions_are_their_hash', (SELECT count(*) FROM new), (SELECT count(*) FROM broken),
           (SELECT min(b.version) FROM broken b)
$$;

CREATE FUNCTION farebox.audit_refund_requests() RETURNS SETOF farebox.audit_check
    LANGUAGE sql STABLE
    AS $$
    WITH requests AS (
        SELECT r.id::text AS id,
               (h.state, h.account_id, h.amount)
                   IS NOT DISTINCT FROM ('open', r.account_id, r.credits + r.bonus) AS kept
          FROM farebox.refund_requests r LEFT JOIN farebox.holds h ON h.id = r.id
         WHERE r.state = 'held'
    )
    SELECT 'refunds_under_way_are_held', count(*), count(*) FILTER (WHERE NOT q.kept),
           min(q.id) FILTER (WHERE NOT q.kept)
      FROM requests q
$$;

CREATE FUNCTION farebox.audit_since_last(_rows integer) RETURNS SETOF farebox.audit_check
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    SET work_mem TO '64MB'
    SET plan_cache_mode TO 'force_custom_plan'
    SET jit TO 'off'
    AS $$
DECLARE
    on_its_way CONSTANT interval := interval '30 seconds';
    last farebox.auditing;
    steps farebox.audit_step[];
    named uuid[];
    bad_orders uuid[];
    ended record;
    outcome farebox.audit_check;
    clean boolean := true;
BEGIN
    IF current_setting('transaction_isolation') <> 'repeatable read' THEN
        RAISE EXCEPTION 'the audit looks at one moment: REPEATABLE READ only' USING ERRCODE = '25001';
    END IF;
    SELECT * INTO last FROM farebox.auditing FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    steps := farebox.audit_steps(_rows);
    named := ARRAY(
        SELECT DISTINCT (r.transfer).hold_id FROM farebox.audit_step_rows(steps) AS r
         WHERE (r.transfer).hold_id IS NOT NULL
    );
    bad_orders := ARRAY(SELECT j.account_id FROM farebox.judged_orders_since(steps) AS j WHERE NOT j.kept);
    SELECT count(*) AS checked,
           -- All that ended so far, but for what a transaction may still be about to write; or as far as _rows went.
           CASE WHEN count(*) < _rows THEN now() ELSE max(e.ended_at) FILTER (WHERE e.in_time) END AS ended_to,
           array_agg(e.account_id) FILTER (WHERE NOT (e.charged AND e.ended_so AND e.priced AND e.within)) AS bad,
           count(*) FILTER (WHERE NOT e.charged) AS v1, min(e.hold_id::text) FILTER (WHERE NOT e.charged) AS e1,
           count(*) FILTER (WHERE NOT e.ended_so) AS v2, min(e.hold_id::text) FILTER (WHERE NOT e.ended_so) AS e2,
           count(*) FILTER (WHERE NOT e.priced) AS v3, min(e.hold_id::text) FILTER (WHERE NOT e.priced) AS e3,
           count(*) FILTER (WHERE NOT e.within) AS v4, min(e.hold_id::text) FILTER (WHERE NOT e.within) AS e4
      INTO ended
      FROM farebox.audit_ended_holds(named, least(last.ended_to, now() - on_its_way), _rows) AS e;
    FOR outcome IN
        SELECT c.* FROM farebox.audit_accounts_since(steps, ended.bad || bad_orders) AS c
        UNION ALL
        VALUES ('every_hold_was_charged_what_its_transfers_say', ended.checked, ended.v1, ended.e1),
               ('every_hold_ended_as_its_state_says', ended.checked, ended.v2, ended.e2),
               ('charges_recompute_from_usage_and_price', ended.checked, ended.v3, ended.e3),
               ('counted_charges_stay_within_their_hold', ended.checked, ended.v4, ended.e4)
        UNION ALL
        SELECT * FROM farebox.audit_price_versions_since(least(last.prices_to, now() - on_its_way))
        UNION ALL
        SELECT * FROM farebox.audit_overruns()
        UNION ALL
        SELECT * FROM farebox.audit_lots_since(steps)
        UNION ALL
        SELECT * FROM farebox.audit_orders_since(steps)
        UNION ALL
        SELECT * FROM farebox.audit_leases()
        UNION ALL
        SELECT * FROM farebox.audit_guards()
    LOOP
        clean := clean AND outcome.violations = 0;
        RETURN NEXT outcome;
    END LOOP;
    IF clean THEN
        UPDATE farebox.auditing AS a
           SET clean_at = now(), ended_to = least(ended.ended_to, now() - on_its_way),
               prices_to = now() - on_its_way;
    END IF;
END
$$;

CREATE TABLE farebox.transfers (
    account_id uuid NOT NULL,
    version bigint NOT NULL,
    kind text NOT NULL,
    account_side text NOT NULL,
    system_account text NOT NULL,
    amount bigint NOT NULL,
    balance_after bigint NOT NULL,
    debt_after bigint NOT NULL,
    hold_id uuid,
    reference text,
    actor text,
    reason text,
    created_at timestamp with time zone NOT NULL,
    CONSTRAINT transfers_account_side_check CHECK ((account_side = ANY (ARRAY['debit'::text, 'credit'::text]))),
    CONSTRAINT transfers_amount_check CHECK ((amount > 0)),
    CONSTRAINT transfers_balance_after_check CHECK ((balance_after >= 0)),
    CONSTRAINT transfers_debt_after_check CHECK ((debt_after >= 0)),
    CONSTRAINT transfers_system_account_check CHECK ((system_account = ANY (ARRAY['revenue'::text, 'stripe'::text, 'grants'::text, 'refunds'::text, 'disputes'::text, 'expired'::text, 'receivable'::text])))
);

CREATE FUNCTION farebox.audit_step_rows(_steps farebox.audit_step[]) RETURNS TABLE(step farebox.audit_step, transfer farebox.transfers)
    LANGUAGE sql STABLE ROWS 5000
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET enable_hashjoin TO 'off'
    SET enable_mergejoin TO 'off'
    AS $$
    SELECT s::farebox.audit_step, t
      FROM unnest(_steps) AS s
      JOIN farebox.transfers t ON t.account_id = s.account_id AND t.version > s.after
       -- Beyond the account's own version, too: there should be none.
       AND t.version <= CASE WHEN s.whole THEN 9223372036854775807 ELSE s.upto END
$$;

CREATE FUNCTION farebox.audit_steps(_rows integer) RETURNS farebox.audit_step[]
    LANGUAGE sql STABLE
    AS $$
    SELECT array_agg((b.id, b.after, least(b.version, b.after + _rows), b.version <= b.after + _rows, b.balance, b.debt)
                         ::farebox.audit_step)
      FROM (
               SELECT a.id, a.version, coalesce(m.version, 0) AS after, coalesce(m.balance, 0) AS balance,
                      coalesce(m.debt, 0) AS debt,
                      sum(a.version - coalesce(m.version, 0))
                          OVER (ORDER BY a.version - coalesce(m.version, 0), a.id ROWS UNBOUNDED PRECEDING)
                          - (a.version - coalesce(m.version, 0)) AS before
                 FROM farebox.accounts a LEFT JOIN farebox.audit_marks m ON m.account_id = a.id
                WHERE a.version > coalesce(m.version, 0)
           ) AS b
     WHERE b.before < _rows
$$;

CREATE FUNCTION farebox.audit_stretch(_account_id uuid, _first bigint, _seals integer) RETURNS farebox.audit_stretch
    LANGUAGE plpgsql STABLE COST 50000 PARALLEL SAFE
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET enable_bitmapscan TO 'off'
    SET enable_mergejoin TO 'off'
    AS $$
DECLARE
    before farebox.seals;
    lasts bigint[];
    upto bigint;
    found farebox.audit_stretch;
BEGIN
    SELECT * INTO before
      FROM farebox.seals s
     WHERE s.account_id = _account_id AND (_first IS NULL OR s.number < _first)
     ORDER BY s.number DESC
     LIMIT 1;
    lasts := ARRAY(
        SELECT s.last_version
          FROM farebox.seals s
         WHERE s.account_id = _account_id AND s.number >= _first AND s.number < _first + _seals
         ORDER BY s.number
    );
    upto := coalesce(lasts[cardinality(lasts)], 9223372036854775807);
    WITH rows AS (
        SELECT t.version, t.kind, t.balance_after, t.debt_after,
               CASE t.account_side WHEN 'credit' THEN t.amount ELSE -t.amount END AS signed,
               CASE t.system_account WHEN 'receivable' THEN 1 ELSE 0 END AS lent,
               CASE WHEN _first IS NOT NULL THEN farebox.transfer_bytes(t) END AS bytes,
               farebox.named_rightly(t) AS named
          FROM farebox.transfers t
         -- With the one before, for the chain.
         WHERE t.account_id = _account_id AND t.version >= coalesce(before.last_version, 0) AND t.version <= upto
    ), chained AS (
        SELECT r.*,
               r.balance_after = lag(r.balance_after, 1, 0) OVER w + r.signed
                   AND r.debt_after = lag(r.debt_after, 1, 0) OVER w + r.lent * r.signed AS chained
          FROM rows r
        WINDOW w AS (ORDER BY r.version)
    ), blocks AS MATERIALIZED (
        SELECT width_bucket(c.version - 1, lasts) AS block, count(*) AS transfers, min(c.version) AS first,
               max(c.version) AS last, sum(c.signed) AS balance, sum(c.lent * c.signed) AS debt,
               count(*) FILTER (WHERE c.kind = 'charge') AS charges,
               count(*) FILTER (WHERE NOT c.chained) AS unchained,
               min(c.version) FILTER (WHERE NOT c.chained) AS unchained_at,
               count(*) FILTER (WHERE NOT c.named) AS misnamed,
               min(c.version) FILTER (WHERE NOT c.named) AS misnamed_at,
               CASE WHEN _first IS NOT NULL THEN sha512(string_agg(c.bytes, '' ORDER BY c.version)) END AS digest
          FROM chained c
         WHERE c.version > coalesce(before.last_version, 0)
         GROUP BY 1
    )
    SELECT sum(b.transfers), min(b.first), max(b.last), sum(b.balance), sum(b.debt), sum(b.charges),
           sum(b.unchained), min(b.unchained_at), sum(b.misnamed), min(b.misnamed_at),
           count(s.number),
           count(*) FILTER (WHERE s.transfers_digest <> coalesce(b.digest, sha512(''))),
           min(s.number) FILTER (WHERE s.transfers_digest <> coalesce(b.digest, sha512(''))),
           count(*) FILTER (WHERE NOT s.linked), min(s.number) FILTER (WHERE NOT s.linked)
      INTO found
      FROM blocks b
      FULL JOIN (
               SELECT s.number, s.transfers_digest, row_number() OVER w - 1 AS block,
                      s.head = farebox.seal_head(lag(s.head, 1, before.head) OVER w, s)
                          AND s.number = lag(s.number, 1, coalesce(before.number, 0)) OVER w + 1
                          AND s.last_version >= lag(s.last_version, 1, coalesce(before.last_version, 0)) OVER w
                          AS linked
                 FROM farebox.seals s
                WHERE s.account_id = _account_id AND s.number >= _first AND s.number < _first + _seals
               WINDOW w AS (ORDER BY s.number)
           ) AS s ON s.block = b.block;
    RETURN found;
END
$$;

CREATE FUNCTION farebox.audit_takings() RETURNS SETOF farebox.audit_check
    LANGUAGE sql STABLE
    AS $$
    WITH returned AS (
        SELECT g.order_id, sum(g.amount)::bigint AS amount
          FROM (
                   SELECT r.order_id, r.amount FROM farebox.stripe_refunds r WHERE r.active
                   UNION ALL
                   SELECT d.order_id, d.amount FROM farebox.disputes d WHERE d.withdrawn
               ) AS g
         GROUP BY g.order_id
    ), judged AS (
        SELECT o.id::text AS id,
               o.taken = farebox.share_of(o.credits, m.back, o.received)
               AND o.bonus_taken <= farebox.share_of(o.bonus, m.back, o.received) AS kept
          FROM farebox.orders o
          LEFT JOIN returned r ON r.order_id = o.id
         CROSS JOIN LATERAL (SELECT least(coalesce(r.amount, 0), o.received) AS back) AS m
         WHERE o.state = 'paid'
    ), taken AS (
        SELECT o.account_id, sum(o.taken + o.bonus_taken) AS amount FROM farebox.orders o GROUP BY o.account_id
    ), booked AS (
        SELECT t.account_id, sum(CASE t.account_side WHEN 'debit' THEN t.amount ELSE -t.amount END) AS amount
          FROM farebox.transfers t
         WHERE t.kind IN ('refund', 'refund_return', 'dispute', 'dispute_return')
         GROUP BY t.account_id
    ), accounts AS (
        SELECT account_id::text AS id, coalesce(b.amount, 0) = coalesce(k.amount, 0) AS kept
          FROM taken k FULL JOIN booked b USING (account_id)
    )
    SELECT 'orders_gave_up_what_their_refunds_say', count(*), count(*) FILTER (WHERE NOT j.kept),
           min(j.id) FILTER (WHERE NOT j.kept)
      FROM judged j
    UNION ALL
    SELECT 'the_book_has_what_orders_gave_up', count(*), count(*) FILTER (WHERE NOT a.kept),
           min(a.id) FILTER (WHERE NOT a.kept)
      FROM accounts a
$$;

CREATE FUNCTION farebox.audit_visibility() RETURNS SETOF farebox.audit_check
    LANGUAGE sql STABLE
    AS $$
    WITH judged (relation, rows) AS (
        SELECT 'accounts', EXISTS (SELECT FROM farebox.accounts)
        UNION ALL SELECT 'api_keys', EXISTS (SELECT FROM farebox.api_keys)
        UNION ALL SELECT 'holds', EXISTS (SELECT FROM farebox.holds)
        UNION ALL SELECT 'price_versions', EXISTS (SELECT FROM farebox.price_versions)
        UNION ALL SELECT 'transfers', EXISTS (SELECT FROM farebox.transfers)
        UNION ALL SELECT 'workers', EXISTS (SELECT FROM farebox.workers)
        UNION ALL SELECT 'seals', EXISTS (SELECT FROM farebox.seals)
        UNION ALL SELECT 'lots', EXISTS (SELECT FROM farebox.lots)
        UNION ALL SELECT 'draws', EXISTS (SELECT FROM farebox.draws)
        UNION ALL SELECT 'orders', EXISTS (SELECT FROM farebox.orders)
    ), hidden AS (
        SELECT j.relation, NOT j.rows AND pg_stat_get_live_tuples(('farebox.' || j.relation)::regclass) > 0 AS hidden
          FROM judged j
    )
    SELECT 'rows_are_visible', count(*), count(*) FILTER (WHERE h.hidden), min(h.relation) FILTER (WHERE h.hidden)
      FROM hidden h
$$;

CREATE FUNCTION farebox.auto_order_ended() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION farebox.auto_spent(_account_id uuid, _currency text, _livemode boolean) RETURNS bigint
    LANGUAGE sql STABLE
    AS $$
    SELECT coalesce(sum(o.price), 0)::bigint
      FROM farebox.orders o
     WHERE o.account_id = _account_id AND o.kind = 'auto' AND o.currency = _currency AND o.livemode = _livemode
       AND o.state IN ('created', 'open', 'pending', 'paid')
       AND o.created_at >= date_trunc('month', clock_timestamp(), 'UTC')
$$;

CREATE FUNCTION farebox.auto_topup_pause(_problem text, _failures integer) RETURNS timestamp with time zone
    LANGUAGE sql
    AS $$
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

CREATE TABLE farebox.idempotency_keys (
    account_id uuid NOT NULL,
    key_hash bytea NOT NULL,
    fingerprint bytea NOT NULL,
    hold_id uuid NOT NULL,
    worker_id uuid NOT NULL,
    claimed_at timestamp with time zone NOT NULL,
    CONSTRAINT idempotency_keys_key_hash_check CHECK ((length(key_hash) = 32))
)
WITH (fillfactor='90', autovacuum_vacuum_scale_factor='0.02');

CREATE FUNCTION farebox.bar_claim(_claim farebox.idempotency_keys) RETURNS boolean
    LANGUAGE plpgsql
    AS $$
BEGIN
    -- The usual case, a retry after a refusal: what was given back stays so.
    IF EXISTS (
        SELECT FROM farebox.holds h
         WHERE h.id = _claim.hold_id AND (h.state = 'released' OR h.ending = 'released')
    ) THEN
        RETURN true;
    END IF;
    PERFORM farebox.lock_accounts(ARRAY[_claim.account_id], NULL);
    IF farebox.claim_state(_claim) <> 'free' THEN
        RETURN false;
    END IF;
    -- A release, through the one function that does it.
    PERFORM FROM farebox.batch(
        0, 0, ARRAY[_claim.hold_id], ARRAY[_claim.account_id], ARRAY[NULL::text], ARRAY[NULL::bigint],
        ARRAY[NULL::text], ARRAY[NULL::bytea], ARRAY[1], '{}', '{}', '{}', ARRAY[_claim.worker_id], ARRAY[NULL::text],
        ARRAY[NULL::text], ARRAY[NULL::text], ARRAY[NULL::text], ARRAY[NULL::text], ARRAY[NULL::text], NULL
    );
    RETURN true;
END
$$;

CREATE FUNCTION farebox.batch(_reserves integer, _finalizes integer, _hold_ids uuid[], _account_ids uuid[], _key_ids text[], _amounts bigint[], _notes text[], _fingerprints bytea[], _terms integer[], _key_versions integer[], _at_leasts bigint[], _usages bigint[], _worker_ids uuid[], _price_versions text[], _models text[], _variants text[], _usage_sources text[], _capped text[], _endings text[], _wait_ms integer) RETURNS TABLE(row_number bigint, outcome text, amount bigint, overrun bigint, balance bigint, held bigint, debt bigint, spend_left bigint)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET enable_hashjoin TO 'off'
    SET enable_mergejoin TO 'off'
    AS $$
#variable_conflict use_column
DECLARE
    busy uuid[] := farebox.lock_accounts(_account_ids, _wait_ms);
    at timestamptz := clock_timestamp();
    rows integer := cardinality(_hold_ids);
    repeats boolean := rows > (SELECT count(DISTINCT u.id) FROM unnest(_hold_ids) AS u (id));
    entry record;
    hold farebox.holds;
    purse farebox.purse;
    purse_moved boolean := false;
    available bigint;
    charge bigint;
    cap text;
    purses farebox.purse[];
    moves farebox.move[];
    new_holds farebox.holds[];
    changed_holds farebox.holds[];
BEGIN
    -- A later statement than the lock, so that a key revoked while this call waited is seen as revoked.
    FOR entry IN
        SELECT u.*, h AS known_hold, a.id AS known_account, a.balance, a.held, a.debt, a.version,
               EXISTS (SELECT FROM farebox.spend_limits s WHERE s.account_id = u.account_id) AS limited,
               _worker_ids[u.term] AS worker_id, _price_versions[u.term] AS price_version, _models[u.term] AS model,
               _variants[u.term] AS variant, _usage_sources[u.term] AS usage_source,
               CASE
                   WHEN u.n <= _reserves THEN 'reserve'
                   WHEN u.n <= _reserves + _finalizes THEN 'finalize'
                   ELSE 'release'
               END AS op,
               CASE WHEN u.n <= _reserves THEN CASE
                   WHEN w.lease_until IS NULL OR w.lease_until <= at THEN 'worker_lapsed'
                   WHEN k.id IS NULL OR k.account_id <> u.account_id OR p.version IS NULL THEN 'unknown'
                   WHEN k.version <> u.key_version OR k.revoked_at IS NOT NULL OR a.frozen_at IS NOT NULL
                       THEN 'key_changed'
                   WHEN k.expires_at <= at THEN 'key_expired'
               END END AS refusal
          FROM unnest(
                   _hold_ids, _account_ids, _key_ids, _amounts, _notes, _fingerprints, _terms, _key_versions, _at_leasts
               ) WITH ORDINALITY AS u (
                   hold_id, account_id, key_id, wanted, note, fingerprint, term, key_version, at_least, n
               )
          LEFT JOIN farebox.accounts a ON a.id = u.account_id
          LEFT JOIN farebox.holds h ON h.id = u.hold_id
          LEFT JOIN farebox.workers w ON w.id = _worker_ids[u.term]
          LEFT JOIN farebox.api_keys k ON k.id = u.key_id
          LEFT JOIN farebox.prices p ON p.version = _price_versions[u.term] AND p.model = _models[u.term]
                                    AND p.variant = _variants[u.term]
         ORDER BY u.account_id,
                  CASE WHEN repeats THEN (
                      SELECT min(x.n + CASE WHEN x.n > _reserves THEN -rows ELSE 0 END)
                        FROM unnest(_hold_ids) WITH ORDINALITY AS x (id, n)
                       WHERE x.id = u.hold_id
                  ) END,
                  u.n <= _reserves, u.n
    LOOP
        row_number := entry.n;
        outcome := NULL;
        amount := 0;
        overrun := 0;
        spend_left := NULL;
        IF entry.known_account IS NULL OR entry.account_id = ANY (busy) THEN
            outcome := CASE WHEN entry.known_account IS NULL THEN 'unknown' ELSE 'busy' END;
            balance := 0;
            held := 0;
            debt := 0;
            RETURN NEXT;
            CONTINUE;
        END IF;
        IF purse.account_id IS DISTINCT FROM entry.account_id THEN
            IF purse_moved THEN
                purses := purses || purse;
            END IF;
            purse_moved := false;
            purse := (
                entry.account_id, entry.balance, entry.held, entry.debt, entry.version, entry.limited, NULL, 0, 0, 0
            )::farebox.purse;
            hold := NULL;
        END IF;
        IF hold.id IS DISTINCT FROM entry.hold_id THEN
            hold := entry.known_hold;
        END IF;

        IF hold.account_id <> entry.account_id THEN
            outcome := 'conflict';

        ELSIF entry.op = 'finalize' AND hold.state IN ('released', 'final') THEN
            outcome := CASE
                WHEN hold.state = 'released' THEN 'released'
                WHEN hold.settle_fingerprint = entry.fingerprint THEN 'final'
                ELSE 'conflict'
            END;
            IF outcome = 'final' THEN
                amount := hold.charge;
                overrun := hold.overrun;
            END IF;

        ELSIF entry.op = 'finalize' THEN
            charge := entry.wanted;
            cap := _capped[entry.term];
            IF entry.usage_source = 'counted' AND charge > hold.amount THEN
                charge := hold.amount;
                cap := 'counted_above_hold';
            END IF;
            purse := farebox.settled(
                purse, hold.state, hold.amount, hold.charge, coalesce(hold.key_id, entry.key_id), charge
            );
            purse_moved := true;
            moves := moves || farebox.a_move(purse, entry.hold_id);
            outcome := 'final';
            amount := charge;
            overrun := coalesce(hold.overrun, 0) + purse.lent;
            -- A hold that was never seen leaves its tombstone.
            hold := (
                entry.hold_id, entry.account_id, coalesce(hold.state, 'new'), coalesce(hold.amount, 0),
                coalesce(hold.key_id, entry.key_id), coalesce(hold.worker_id, entry.worker_id), entry.price_version,
                entry.model, entry.variant, hold.quote, hold.fingerprint, hold.mark, coalesce(hold.opened_at, at),
                charge, overrun, 0, _usages[(entry.n - _reserves) * 7 - 6 : (entry.n - _reserves) * 7],
                entry.usage_source, cap, _endings[entry.term], entry.note, entry.fingerprint, at
            )::farebox.holds;
            IF hold.state = 'new' THEN
                hold.state := 'final';
                new_holds := new_holds || hold;
            ELSE
                hold.state := 'final';
                changed_holds := changed_holds || hold;
            END IF;

        ELSIF entry.op = 'release' AND hold.id IS NULL THEN
            -- A tombstone, so that its reserve, arriving late, holds nothing.
            outcome := 'released';
            hold := (
                entry.hold_id, entry.account_id, 'released', 0, NULL, entry.worker_id, NULL, NULL, NULL, NULL, NULL,
                NULL, at, 0, 0, 0, NULL, NULL, NULL, 'released', NULL, NULL, at
            )::farebox.holds;
            new_holds := new_holds || hold;

        ELSIF entry.op = 'release' AND hold.state IN ('open', 'provisional') THEN
            -- What the sweeper has charged meanwhile is trued up to nothing; the hold is then final.
            outcome := CASE hold.state WHEN 'open' THEN 'released' ELSE 'final' END;
            amount := CASE hold.state WHEN 'open' THEN hold.amount ELSE hold.charge END;
            purse := farebox.settled(purse, hold.state, hold.amount, hold.charge, hold.key_id, 0);
            purse_moved := true;
            moves := moves || farebox.a_move(purse, entry.hold_id);
            hold.state := outcome;
            hold.charge := 0;
            hold.usage := NULL;
            hold.usage_source := NULL;
            hold.capped := NULL;
            hold.ending := 'released';
            hold.ended_at := at;
            changed_holds := changed_holds || hold;

        ELSIF entry.op = 'release' THEN
            outcome := hold.state;

        ELSIF hold.id IS NOT NULL THEN
            outcome := CASE
                WHEN hold.fingerprint <> entry.fingerprint THEN 'conflict'
                WHEN hold.state = 'open' THEN 'granted'
                ELSE 'ended'
            END;
            amount := CASE outcome WHEN 'granted' THEN hold.amount ELSE 0 END;

        ELSIF entry.refusal IS NOT NULL THEN
            outcome := entry.refusal;

        ELSE
            available := purse.balance - purse.held;
            IF purse.limited THEN
                spend_left := farebox.spend_left(entry.key_id);
            END IF;
            IF purse.debt > 0 OR purse.balance < entry.at_least THEN
                outcome := 'insufficient';
            ELSIF available < entry.at_least THEN
                outcome := 'credits_held';
            ELSIF spend_left < entry.at_least THEN
                outcome := 'spend_limit';
            ELSE
                outcome := 'granted';
                amount := least(entry.wanted, available, spend_left);
                purse := farebox.moved(purse, NULL, 0, -amount);
                purse_moved := true;
                hold := (
                    entry.hold_id, entry.account_id, 'open', amount, entry.key_id, entry.worker_id, entry.price_version,
                    entry.model, entry.variant, entry.note, entry.fingerprint, NULL, at, NULL,
                    0, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL
                )::farebox.holds;
                new_holds := new_holds || hold;
                IF spend_left IS NOT NULL THEN
                    PERFORM farebox.count_spend(entry.key_id, amount, 0);
                    spend_left := spend_left - amount;
                END IF;
            END IF;
        END IF;

        balance := purse.balance;
        held := purse.held;
        debt := purse.debt;
        RETURN NEXT;
    END LOOP;
    IF purse_moved THEN
        purses := purses || purse;
    END IF;
    PERFORM farebox.write_down(purses, moves, new_holds, changed_holds, at);
END
$$;

CREATE FUNCTION farebox.block_auto_topup(_account_id uuid, _problem text, _until timestamp with time zone) RETURNS void
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION farebox.book_state(OUT transfers bigint, OUT unsealed bigint, OUT unaudited bigint, OUT clean_at timestamp with time zone) RETURNS record
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    SELECT coalesce(sum(a.version), 0), coalesce(sum(a.version - coalesce(s.last_version, 0)), 0),
           coalesce(sum(a.version - coalesce(m.version, 0)), 0), (SELECT g.clean_at FROM farebox.auditing g)
      FROM farebox.accounts a
      LEFT JOIN farebox.audit_marks m ON m.account_id = a.id
      LEFT JOIN LATERAL (
          SELECT s.last_version FROM farebox.seals s WHERE s.account_id = a.id ORDER BY s.number DESC LIMIT 1
      ) AS s ON true
$$;

CREATE TABLE farebox.lots (
    account_id uuid NOT NULL,
    version bigint NOT NULL,
    kind text NOT NULL,
    amount bigint NOT NULL,
    remaining bigint NOT NULL,
    reserved bigint DEFAULT 0 NOT NULL,
    owed bigint DEFAULT 0 NOT NULL,
    priority integer NOT NULL,
    expires_at timestamp with time zone,
    order_id uuid,
    created_at timestamp with time zone NOT NULL,
    CONSTRAINT lots_amount_check CHECK ((amount > 0)),
    CONSTRAINT lots_kind_check CHECK ((kind = ANY (ARRAY['paid'::text, 'granted'::text, 'promo'::text]))),
    CONSTRAINT lots_owed_check CHECK ((owed >= 0)),
    CONSTRAINT lots_remaining_check CHECK ((remaining >= 0)),
    CONSTRAINT lots_reserved_check CHECK ((reserved >= 0)),
    CONSTRAINT remaining_within_amount CHECK ((remaining <= amount)),
    CONSTRAINT spoken_for_once CHECK (((reserved + owed) <= remaining))
)
WITH (fillfactor='70');

CREATE FUNCTION farebox.came_so(_lot farebox.lots, _transfer farebox.transfers) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    AS $$
    SELECT coalesce(
        _transfer.account_side = 'credit' AND CASE
            WHEN _transfer.kind IN ('grant', 'promo', 'purchase', 'plan') THEN
                _lot.amount = _transfer.amount AND _lot.kind = CASE _transfer.kind
                    WHEN 'grant' THEN 'granted' WHEN 'promo' THEN 'promo' ELSE _lot.kind
                END
            WHEN _transfer.kind IN ('reversal', 'true_up', 'refund_return', 'dispute_return') THEN
                _lot.amount <= _transfer.amount AND _lot.kind = 'granted'
        END,
        false
    )
$$;

CREATE FUNCTION farebox.charge_at(_rates bigint[], _per_request bigint, _usage bigint[]) RETURNS numeric
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    AS $$
    SELECT CASE
        WHEN 1073741824 > ALL (_rates) AND 1073741824 > ALL (_usage) THEN (
            _per_request + (
                _rates[1] * _usage[1] + _rates[2] * _usage[2] + _rates[3] * _usage[3] + _rates[4] * _usage[4]
                + _rates[5] * _usage[5] + _rates[6] * _usage[6] + _rates[7] * _usage[7] + 999999
            ) / 1000000
        )::numeric
        ELSE _per_request + div(
            _rates[1]::numeric * _usage[1] + _rates[2]::numeric * _usage[2] + _rates[3]::numeric * _usage[3]
            + _rates[4]::numeric * _usage[4] + _rates[5]::numeric * _usage[5] + _rates[6]::numeric * _usage[6]
            + _rates[7]::numeric * _usage[7] + 999999,
            1000000
        )
    END
$$;

CREATE FUNCTION farebox.charge_for(_version text, _model text, _variant text, _usage bigint[]) RETURNS numeric
    LANGUAGE sql STABLE
    AS $$
    SELECT farebox.charge_at(p.rates, p.per_request, _usage)
      FROM farebox.prices p
     WHERE p.version = _version AND p.model = _model AND p.variant = _variant
$$;

CREATE TABLE farebox.orders (
    id uuid NOT NULL,
    account_id uuid NOT NULL,
    kind text NOT NULL,
    state text DEFAULT 'created'::text NOT NULL,
    pack text,
    credits bigint NOT NULL,
    bonus bigint DEFAULT 0 NOT NULL,
    credits_seconds bigint,
    bonus_seconds bigint,
    currency text NOT NULL,
    price bigint NOT NULL,
    discount_max bigint DEFAULT 0 NOT NULL,
    livemode boolean NOT NULL,
    actor text NOT NULL,
    request_key text,
    request_digest bytea,
    save_payment_method boolean DEFAULT false NOT NULL,
    success_url text,
    cancel_url text,
    customer text,
    payment_method text,
    session_id text,
    payment_intent text,
    invoice text,
    url text,
    problem text,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    changed_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    paid_at timestamp with time zone,
    received bigint,
    subtotal bigint,
    discount bigint,
    tax bigint,
    credit_version bigint,
    bonus_version bigint,
    taken bigint DEFAULT 0 NOT NULL,
    bonus_taken bigint DEFAULT 0 NOT NULL,
    CONSTRAINT orders_bonus_check CHECK ((bonus >= 0)),
    CONSTRAINT orders_bonus_seconds_check CHECK ((bonus_seconds > 0)),
    CONSTRAINT orders_bonus_taken_check CHECK ((bonus_taken >= 0)),
    CONSTRAINT orders_credits_check CHECK ((credits > 0)),
    CONSTRAINT orders_credits_seconds_check CHECK ((credits_seconds > 0)),
    CONSTRAINT orders_currency_check CHECK ((currency ~ '^[a-z]{3}$'::text)),
    CONSTRAINT orders_discount_check CHECK ((discount >= 0)),
    CONSTRAINT orders_discount_max_check CHECK ((discount_max >= 0)),
    CONSTRAINT orders_kind_check CHECK ((kind = ANY (ARRAY['checkout'::text, 'auto'::text, 'plan'::text]))),
    CONSTRAINT orders_price_check CHECK ((price > 0)),
    CONSTRAINT orders_received_check CHECK ((received >= 0)),
    CONSTRAINT orders_state_check CHECK ((state = ANY (ARRAY['created'::text, 'open'::text, 'pending'::text, 'paid'::text, 'failed'::text, 'expired'::text, 'canceled'::text]))),
    CONSTRAINT orders_subtotal_check CHECK ((subtotal >= 0)),
    CONSTRAINT orders_taken_check CHECK ((taken >= 0)),
    CONSTRAINT orders_tax_check CHECK ((tax >= 0)),
    CONSTRAINT paid_says_what CHECK ((((state = 'paid'::text) = (paid_at IS NOT NULL)) AND ((state = 'paid'::text) = (received IS NOT NULL)))),
    CONSTRAINT taken_within_credits CHECK (((taken <= credits) AND (bonus_taken <= bonus)))
);

CREATE FUNCTION farebox.claim_auto_orders(_livemode boolean, _after interval, _rows integer) RETURNS SETOF farebox.orders
    LANGUAGE sql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE TABLE farebox.stripe_events (
    id text NOT NULL,
    type text NOT NULL,
    livemode boolean NOT NULL,
    object_id text NOT NULL,
    created timestamp with time zone NOT NULL,
    received_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    attempts integer NOT NULL,
    tried_at timestamp with time zone NOT NULL,
    error text,
    processed_at timestamp with time zone,
    outcome text,
    CONSTRAINT processed_says_how CHECK (((processed_at IS NULL) = (outcome IS NULL)))
);

CREATE FUNCTION farebox.claim_event(_livemode boolean, _pause interval, _without text[]) RETURNS SETOF farebox.stripe_events
    LANGUAGE sql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    UPDATE farebox.stripe_events AS e
       SET attempts = e.attempts + 1, tried_at = clock_timestamp()
     WHERE e.id = (
         SELECT d.id
           FROM farebox.stripe_events d
          WHERE d.processed_at IS NULL
            AND d.livemode = _livemode
            AND d.tried_at <= clock_timestamp() - least(farebox.event_pause(d.attempts), _pause)
            AND d.id <> ALL (_without)
          ORDER BY d.tried_at
          LIMIT 1
            FOR NO KEY UPDATE SKIP LOCKED
     )
    RETURNING e.*
$$;

CREATE FUNCTION farebox.claim_key(_account_id uuid, _key_hash bytea, _fingerprint bytea, _hold_id uuid, _worker_id uuid, OUT outcome text, OUT hold_id uuid, OUT head text, OUT body bytea) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_seqscan TO 'off'
    AS $$
#variable_conflict use_column
DECLARE
    claim farebox.idempotency_keys;
BEGIN
    -- Others may take it or give it up between two statements. Whoever loses three times comes again.
    FOR turn IN 1..3 LOOP
        INSERT INTO farebox.idempotency_keys (account_id, key_hash, fingerprint, hold_id, worker_id, claimed_at)
        VALUES (_account_id, _key_hash, _fingerprint, _hold_id, _worker_id, clock_timestamp())
        ON CONFLICT DO NOTHING;
        IF FOUND THEN
            outcome := 'claimed';
            hold_id := _hold_id;
            RETURN;
        END IF;
        SELECT k.* INTO claim
          FROM farebox.idempotency_keys k WHERE k.account_id = _account_id AND k.key_hash = _key_hash;
        CONTINUE WHEN NOT FOUND;
        hold_id := claim.hold_id;
        outcome := CASE claim.hold_id WHEN _hold_id THEN 'claimed' ELSE farebox.claim_state(claim) END;
        IF outcome IN ('running', 'finished') AND claim.fingerprint <> _fingerprint THEN
            outcome := 'mismatch';
        ELSIF outcome = 'finished' THEN
            SELECT a.head, a.body INTO head, body
              FROM farebox.idempotency_answers a
             WHERE a.hold_id = claim.hold_id AND a.expires_at > clock_timestamp();
        END IF;
        IF outcome <> 'free' THEN
            RETURN;
        END IF;
        CONTINUE WHEN NOT farebox.bar_claim(claim);
        UPDATE farebox.idempotency_keys AS k
           SET fingerprint = _fingerprint, hold_id = _hold_id, worker_id = _worker_id, claimed_at = clock_timestamp()
         WHERE k.account_id = _account_id AND k.key_hash = _key_hash AND k.hold_id = claim.hold_id;
        IF FOUND THEN
            outcome := 'claimed';
            hold_id := _hold_id;
            RETURN;
        END IF;
    END LOOP;
    outcome := 'running';
END
$$;

CREATE TABLE farebox.outbox (
    id uuid NOT NULL,
    type text NOT NULL,
    account_id uuid NOT NULL,
    reference text,
    payload text NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    next_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    attempts integer DEFAULT 0 NOT NULL,
    error text,
    delivered_at timestamp with time zone,
    given_up_at timestamp with time zone
);

CREATE FUNCTION farebox.claim_messages(_rows integer, _lease interval) RETURNS SETOF farebox.outbox
    LANGUAGE sql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    WITH due AS MATERIALIZED (
        SELECT d.id
          FROM farebox.outbox d
         WHERE d.delivered_at IS NULL AND d.given_up_at IS NULL AND d.next_at <= clock_timestamp()
         ORDER BY d.next_at
         LIMIT _rows
           FOR UPDATE SKIP LOCKED
    )
    UPDATE farebox.outbox AS o
       SET attempts = o.attempts + 1, next_at = clock_timestamp() + _lease
      FROM due
     WHERE o.id = due.id
    RETURNING o.*
$$;

CREATE FUNCTION farebox.claim_refund_requests(_age interval, _pause interval, _limit integer) RETURNS TABLE(id uuid)
    LANGUAGE sql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION farebox.claim_state(_claim farebox.idempotency_keys) RETURNS text
    LANGUAGE plpgsql STABLE
    SET enable_seqscan TO 'off'
    AS $$
DECLARE
    hold farebox.holds;
BEGIN
    SELECT h.* INTO hold FROM farebox.holds h WHERE h.id = _claim.hold_id;
    RETURN CASE
        WHEN hold.state = 'open' THEN 'running'
        -- What the sweeper had settled and its worker gave back after all is final, and costs nothing.
        WHEN hold.state = 'released' OR hold.ending = 'released' THEN 'free'
        WHEN hold.state = 'provisional' AND hold.charge = 0 AND hold.mark IS NULL THEN 'free'
        WHEN hold.id IS NOT NULL THEN 'finished'
        WHEN _claim.claimed_at > clock_timestamp() - farebox.lease_length() AND EXISTS (
            SELECT FROM farebox.workers w WHERE w.id = _claim.worker_id AND w.lease_until > clock_timestamp()
        ) THEN 'running'
        ELSE 'free'
    END;
END
$$;

CREATE FUNCTION farebox.count_promo_refusal(_account_id uuid) RETURNS void
    LANGUAGE sql
    AS $$
    INSERT INTO farebox.promo_refusals AS r (account_id, since, refusals)
    VALUES (_account_id, clock_timestamp(), 1)
    ON CONFLICT (account_id) DO UPDATE
       SET since = CASE WHEN r.since + interval '1 hour' > excluded.since THEN r.since ELSE excluded.since END,
           refusals = CASE WHEN r.since + interval '1 hour' > excluded.since THEN r.refusals + 1 ELSE 1 END
$$;

CREATE FUNCTION farebox.count_spend(_key_id text, _held bigint, _spent bigint) RETURNS void
    LANGUAGE sql
    AS $$
    UPDATE farebox.spend_limits s
       SET held = s.held + _held, spent = s.spent + _spent
      FROM farebox.api_keys k
     WHERE k.id = _key_id AND s.family = k.family
$$;

CREATE FUNCTION farebox.create_account(_id uuid, _name text, _external_id text, _email text, OUT outcome text, OUT account_id uuid) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    INSERT INTO farebox.accounts (id, name, external_id, email)
    VALUES (_id, _name, _external_id, _email)
    ON CONFLICT DO NOTHING;
    outcome := CASE WHEN FOUND THEN 'done' ELSE 'conflict' END;
    account_id := _id;
    IF outcome = 'done' THEN
        RETURN;
    END IF;
    SELECT a.id INTO account_id
      FROM farebox.accounts a
     WHERE (a.id = _id OR a.external_id = _external_id)
       AND (a.name, a.email, a.external_id) IS NOT DISTINCT FROM (_name, _email, _external_id);
    outcome := CASE WHEN FOUND THEN 'done' ELSE 'conflict' END;
END
$$;

CREATE FUNCTION farebox.create_key(_id text, _account_id uuid, _name text, _secret_hmac bytea, _pepper_version integer, _scopes text[], _models text[], _profile text, _affordable_cap boolean, _spend_limit bigint, _expires_at timestamp with time zone) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    PERFORM farebox.lock_accounts(ARRAY[_account_id], NULL);
    IF NOT EXISTS (SELECT FROM farebox.accounts a WHERE a.id = _account_id) THEN
        RETURN 'unknown';
    END IF;
    INSERT INTO farebox.api_keys (
        id, account_id, family, name, secret_hmac, pepper_version, scopes, models, profile, affordable_cap, expires_at
    ) VALUES (
        _id, _account_id, _id, _name, _secret_hmac, _pepper_version, _scopes, _models, _profile, _affordable_cap,
        _expires_at
    ) ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN farebox.known_key(_id, _account_id, _secret_hmac, NULL);
    END IF;
    PERFORM farebox.set_spend_limit(_id, _spend_limit);
    RETURN 'done';
END
$$;

CREATE FUNCTION farebox.create_order(_id uuid, _account_id uuid, _kind text, _pack text, _credits bigint, _bonus bigint, _credits_seconds bigint, _bonus_seconds bigint, _currency text, _price bigint, _discount_max bigint, _livemode boolean, _actor text, _request_key text, _request_digest bytea, _save_payment_method boolean, _success_url text, _cancel_url text, _customer text, _payment_method text, _unfinished_max integer, OUT outcome text, OUT order_id uuid) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION farebox.create_promo(_code text, _credits bigint, _credits_seconds bigint, _starts_at timestamp with time zone, _ends_at timestamp with time zone, _redemptions_max bigint, _actor text) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    INSERT INTO farebox.promo_codes (code, credits, credits_seconds, starts_at, ends_at, redemptions_max, actor)
    VALUES (_code, _credits, _credits_seconds, _starts_at, _ends_at, _redemptions_max, _actor)
    ON CONFLICT DO NOTHING;
    IF FOUND THEN
        RETURN 'done';
    END IF;
    PERFORM FROM farebox.promo_codes p
      WHERE p.code = _code AND p.ended_at IS NULL
        AND (p.credits, p.credits_seconds, p.starts_at, p.ends_at, p.redemptions_max)
            IS NOT DISTINCT FROM (_credits, _credits_seconds, _starts_at, _ends_at, _redemptions_max);
    RETURN CASE WHEN FOUND THEN 'done' ELSE 'conflict' END;
END
$$;

CREATE FUNCTION farebox.credited(_account_id uuid, _kind text, _amount bigint, _reference text, _actor text, _reason text, _lot_kind text, _expires_at timestamp with time zone, _priority integer, _order_id uuid, OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint) RETURNS record
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION farebox.credited_so(_order farebox.orders, _kind text, _amount bigint, _reference text, _bonus_kind text, _bonus_amount bigint, _bonus_reference text) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    AS $$
    SELECT coalesce(
        _kind = CASE _order.kind WHEN 'plan' THEN 'plan' ELSE 'purchase' END
        AND _amount = _order.credits AND _reference IN (_order.payment_intent, _order.session_id, _order.invoice)
        AND CASE
            WHEN _order.bonus = 0 THEN _order.bonus_version IS NULL
            ELSE _bonus_kind = 'promo' AND _bonus_amount = _order.bonus AND _bonus_reference = _reference
        END
        -- Of an invoice a part may be paid from what the customer has at Stripe.
        AND (_order.kind = 'plan' OR _order.received BETWEEN _order.subtotal - _order.discount
                 AND _order.subtotal - _order.discount + _order.tax),
        false
    )
$$;

CREATE FUNCTION farebox.credits_text(_microcredits bigint) RETURNS text
    LANGUAGE sql IMMUTABLE
    AS $$
    SELECT trim_scale(_microcredits::numeric / 1000000)::text
$$;

CREATE FUNCTION farebox.dispute_freezes(_status text) RETURNS boolean
    LANGUAGE sql IMMUTABLE
    AS $$
    SELECT CASE
        WHEN _status = 'won' THEN false
        WHEN _status = 'prevented' OR starts_with(_status, 'warning_') THEN NULL
        ELSE true
    END
$$;

CREATE FUNCTION farebox.dispute_reference(_dispute_id text, _n integer) RETURNS text
    LANGUAGE sql IMMUTABLE
    AS $$
    SELECT _dispute_id || CASE WHEN _n > 1 THEN ':' || _n ELSE '' END
$$;

CREATE FUNCTION farebox.draw_accounts(_account_ids uuid[], _rows integer) RETURNS TABLE(drawn bigint, broken bigint, example uuid, problem text)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
DECLARE
    _id uuid;
    free boolean;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtextextended('farebox.draw_accounts', 0)) THEN
        RETURN;
    END IF;
    drawn := 0;
    broken := 0;
    FOREACH _id IN ARRAY _account_ids LOOP
        EXIT WHEN drawn >= _rows;
        BEGIN
            SELECT count(*) = 0 INTO free FROM farebox.lot_marks m WHERE m.account_id = _id;
            IF NOT free THEN
                PERFORM FROM farebox.lot_marks m
                  WHERE m.account_id = _id FOR UPDATE SKIP LOCKED;
                free := FOUND;
            END IF;
            IF free THEN
                drawn := drawn + farebox.draw_lots(_id, NULL, _rows);
            END IF;
        EXCEPTION WHEN lock_not_available THEN
            -- Somebody has begun its mark at this moment.
            NULL;
        WHEN OTHERS THEN
            broken := broken + 1;
            example := coalesce(example, _id);
            problem := coalesce(problem, SQLERRM);
        END;
    END LOOP;
    RETURN NEXT;
END
$$;

CREATE FUNCTION farebox.draw_lots(_account_id uuid, _upto bigint, _rows integer) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
DECLARE
    mark bigint;
    newest bigint;
    upto bigint;
BEGIN
    IF NOT EXISTS (SELECT FROM farebox.accounts a WHERE a.id = _account_id) THEN
        RETURN 0;
    END IF;
    mark := farebox.lock_lots(_account_id);
    SELECT a.version INTO newest FROM farebox.accounts a WHERE a.id = _account_id;
    upto := least(_upto, newest, mark + _rows);
    IF upto <= mark THEN
        RETURN 0;
    END IF;
    -- To the end of its move.
    WHILE upto < newest AND EXISTS (
        SELECT FROM farebox.transfers t
         WHERE t.account_id = _account_id
           AND (t.version = upto AND t.kind = 'overrun' OR t.version = upto + 1 AND t.kind = 'debt_payment')
    ) LOOP
        upto := upto + 1;
    END LOOP;
    PERFORM farebox.draw_moves(_account_id, mark, upto, NULL, NULL);
    RETURN upto - mark;
END
$$;

CREATE FUNCTION farebox.draw_moves(_account_id uuid, _after bigint, _upto bigint, _lot_version bigint, _references text[]) RETURNS void
    LANGUAGE plpgsql
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET enable_hashjoin TO 'off'
    SET enable_mergejoin TO 'off'
    AS $$
DECLARE
    done bigint := _after;
    back bigint;
    netted bigint := 0;
BEGIN
    INSERT INTO farebox.lots (account_id, version, kind, amount, remaining, priority, created_at)
    SELECT t.account_id, t.version, k.kind, t.amount, t.amount, farebox.priority_of(k.kind), t.created_at
      FROM farebox.transfers t,
           LATERAL (VALUES (CASE t.kind WHEN 'grant' THEN 'granted' WHEN 'promo' THEN 'promo' ELSE 'paid' END)) AS k (kind)
     WHERE t.account_id = _account_id AND t.version > _after AND t.version <= _upto
       AND t.kind IN ('grant', 'promo', 'purchase', 'plan')
       AND NOT EXISTS (SELECT FROM farebox.lots l WHERE l.account_id = _account_id AND l.version = t.version);
    FOR back IN
        SELECT t.version
          FROM farebox.transfers t
         WHERE t.account_id = _account_id AND t.version > _after AND t.version <= _upto AND t.account_side = 'credit'
           AND t.kind IN ('reversal', 'true_up', 'refund_return', 'dispute_return')
         ORDER BY t.version
    LOOP
        IF back - 1 > done THEN
            PERFORM farebox.draw_stretch(_account_id, done, back - 1, _lot_version, netted);
        END IF;
        netted := farebox.unwind(_account_id, back, _lot_version, _references);
        done := back;
    END LOOP;
    IF _upto > done THEN
        PERFORM farebox.draw_stretch(_account_id, done, _upto, _lot_version, netted);
    END IF;
    UPDATE farebox.lot_marks AS m SET version = _upto WHERE m.account_id = _account_id;
END
$$;

CREATE FUNCTION farebox.draw_stretch(_account_id uuid, _after bigint, _upto bigint, _lot_version bigint, _netted bigint) RETURNS void
    LANGUAGE plpgsql
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET enable_hashjoin TO 'off'
    SET enable_mergejoin TO 'off'
    AS $$
DECLARE
    -- The lots with anything left, in drawing order: an element each. by_expiry: their places, the latest expiry first.
    lot_versions bigint[];
    lot_remaining bigint[];
    lot_reserved bigint[];
    lot_owed bigint[];
    lot_expires_at timestamptz[];
    by_expiry integer[];
    lots integer;
    -- The lots before it are used up.
    first integer := 1;
    expiring boolean;
    -- What was drawn.
    drawn_at bigint[] := '{}';
    drawn_nth integer[] := '{}';
    drawn_lot bigint[] := '{}';
    drawn bigint[] := '{}';
    drawn_owed boolean[] := '{}';
    draws integer := 0;
    entry record;
    lent bigint := 0;
    netted bigint := _netted;
    due bigint;
    aimed boolean;
    nth integer;
    i integer;
    part bigint;
BEGIN
    SELECT coalesce(array_agg(l.version ORDER BY l.priority, l.expires_at, l.version), '{}'),
           array_agg(l.remaining ORDER BY l.priority, l.expires_at, l.version),
           array_agg(l.reserved ORDER BY l.priority, l.expires_at, l.version),
           array_agg(l.owed ORDER BY l.priority, l.expires_at, l.version),
           array_agg(l.expires_at ORDER BY l.priority, l.expires_at, l.version)
      INTO lot_versions, lot_remaining, lot_reserved, lot_owed, lot_expires_at
      FROM farebox.lots l
     WHERE l.account_id = _account_id AND l.version <= _upto AND l.remaining > 0;
    lots := cardinality(lot_versions);
    expiring := EXISTS (SELECT FROM unnest(lot_expires_at) AS e WHERE e IS NOT NULL);
    by_expiry := ARRAY(
        SELECT u.n::integer FROM unnest(lot_expires_at) WITH ORDINALITY AS u (e, n) WHERE u.e IS NOT NULL ORDER BY u.e DESC, u.n
    );

    FOR entry IN
        SELECT t.version, t.kind, t.account_side, t.amount,
               -- A lot counts as it was when the hold was opened; a debt's payment as the hold that it comes from.
               CASE WHEN expiring THEN coalesce(
                   (SELECT h.opened_at FROM farebox.holds h WHERE h.id = t.hold_id), t.created_at
               ) END AS moment
          FROM farebox.transfers t
         WHERE t.account_id = _account_id AND t.version > _after AND t.version <= _upto
         ORDER BY t.version
    LOOP
        IF entry.account_side = 'credit' THEN
            lent := CASE entry.kind WHEN 'overrun' THEN entry.amount ELSE 0 END;
            CONTINUE;
        END IF;
        due := entry.amount - lent - netted;
        netted := 0;
        nth := 0;
        aimed := _lot_version IS NOT NULL AND entry.kind IN ('refund', 'dispute', 'expiry');
        WHILE lot_remaining[first] = 0 LOOP
            first := first + 1;
        END LOOP;
        FOR step IN 1..6 LOOP
            EXIT WHEN due = 0;
            CONTINUE WHEN step = 1 AND NOT aimed OR step = 2 AND entry.kind <> 'debt_payment';
            FOR place IN CASE step WHEN 4 THEN 1 ELSE first END
                      .. CASE step WHEN 4 THEN cardinality(by_expiry) ELSE lots END
            LOOP
                i := CASE step WHEN 4 THEN by_expiry[place] ELSE place END;
                CONTINUE WHEN lot_versions[i] > entry.version;
                part := CASE
                    WHEN step = 1 AND lot_versions[i] <> _lot_version THEN 0
                    WHEN step = 3 AND lot_expires_at[i] <= entry.moment THEN 0
                    WHEN step IN (2, 5) THEN lot_owed[i]
                    WHEN step = 6 THEN lot_reserved[i]
                    ELSE lot_remaining[i] - lot_reserved[i] - lot_owed[i]
                END;
                CONTINUE WHEN part = 0;
                part := least(part, due);
                lot_remaining[i] := lot_remaining[i] - part;
                IF step IN (2, 5) THEN
                    lot_owed[i] := lot_owed[i] - part;
                ELSIF step = 6 THEN
                    lot_reserved[i] := lot_reserved[i] - part;
                END IF;
                due := due - part;
                nth := nth + 1;
                draws := draws + 1;
                drawn_at[draws] := entry.version;
                drawn_nth[draws] := nth;
                drawn_lot[draws] := lot_versions[i];
                drawn[draws] := part;
                drawn_owed[draws] := step = 2;
                EXIT WHEN due = 0;
            END LOOP;
        END LOOP;
        IF due <> 0 THEN
            RAISE EXCEPTION 'the lots of account % don''t carry its transfer %: % microcredits are missing',
                _account_id, entry.version, due USING ERRCODE = 'XX001';
        END IF;
        IF aimed AND lent > 0 THEN
            -- What other holds have of that lot at this moment: the debt takes it from there when they end.
            i := array_position(lot_versions, _lot_version);
            IF i IS NOT NULL THEN
                lot_owed[i] := lot_owed[i] + least(lent, lot_remaining[i] - lot_reserved[i] - lot_owed[i]);
            END IF;
        END IF;
        lent := 0;
    END LOOP;

    INSERT INTO farebox.draws (account_id, version, nth, lot_version, amount, owed)
    SELECT _account_id, u.*
      FROM unnest(drawn_at, drawn_nth, drawn_lot, drawn, drawn_owed) AS u (version, nth, lot_version, amount, owed);
    UPDATE farebox.lots AS l
       SET remaining = u.remaining, reserved = u.reserved, owed = u.owed
      FROM unnest(lot_versions, lot_remaining, lot_reserved, lot_owed) AS u (version, remaining, reserved, owed)
     WHERE l.account_id = _account_id AND l.version = u.version
       AND (l.remaining, l.reserved, l.owed) IS DISTINCT FROM (u.remaining, u.reserved, u.owed);
END
$$;

CREATE FUNCTION farebox.end_promo(_code text) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    UPDATE farebox.promo_codes AS p SET ended_at = coalesce(p.ended_at, clock_timestamp()) WHERE p.code = _code;
    RETURN CASE WHEN FOUND THEN 'done' ELSE 'unknown' END;
END
$$;

CREATE TABLE farebox.refund_requests (
    id uuid NOT NULL,
    order_id uuid NOT NULL,
    account_id uuid NOT NULL,
    amount bigint NOT NULL,
    credits bigint NOT NULL,
    bonus bigint NOT NULL,
    reserved bigint NOT NULL,
    state text DEFAULT 'held'::text NOT NULL,
    refund text,
    actor text NOT NULL,
    reason text,
    problem text,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    changed_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT refund_requests_amount_check CHECK ((amount > 0)),
    CONSTRAINT refund_requests_bonus_check CHECK ((bonus >= 0)),
    CONSTRAINT refund_requests_check CHECK (((reserved >= 0) AND (reserved <= credits))),
    CONSTRAINT refund_requests_credits_check CHECK ((credits >= 0)),
    CONSTRAINT refund_requests_state_check CHECK ((state = ANY (ARRAY['held'::text, 'done'::text, 'released'::text])))
);

CREATE FUNCTION farebox.end_refund_request(_request farebox.refund_requests, _state text, _refund_id text, _problem text) RETURNS boolean
    LANGUAGE plpgsql
    AS $$
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

CREATE TABLE farebox.holds (
    id uuid NOT NULL,
    account_id uuid NOT NULL,
    state text NOT NULL,
    amount bigint NOT NULL,
    key_id text,
    worker_id uuid,
    price_version text,
    model text,
    variant text,
    quote text,
    fingerprint bytea,
    mark bigint[],
    opened_at timestamp with time zone NOT NULL,
    charge bigint,
    overrun bigint DEFAULT 0 NOT NULL,
    reversed bigint DEFAULT 0 NOT NULL,
    usage bigint[],
    usage_source text,
    capped text,
    ending text,
    receipt text,
    settle_fingerprint bytea,
    ended_at timestamp with time zone,
    CONSTRAINT ended_has_charge CHECK ((((state = 'open'::text) = (charge IS NULL)) AND ((state = 'open'::text) = (ended_at IS NULL)))),
    CONSTRAINT holds_amount_check CHECK ((amount >= 0)),
    CONSTRAINT holds_charge_check CHECK ((charge >= 0)),
    CONSTRAINT holds_overrun_check CHECK ((overrun >= 0)),
    CONSTRAINT holds_reversed_check CHECK ((reversed >= 0)),
    CONSTRAINT holds_usage_check CHECK ((cardinality(usage) = 7)),
    CONSTRAINT known_state CHECK ((state = ANY (ARRAY['open'::text, 'released'::text, 'final'::text, 'provisional'::text]))),
    CONSTRAINT reversed_within_charge CHECK ((reversed <= COALESCE(charge, (0)::bigint)))
)
WITH (fillfactor='60', autovacuum_vacuum_scale_factor='0.02');

CREATE FUNCTION farebox.ended_so(_hold farebox.holds) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    AS $$
    SELECT CASE _hold.state
        WHEN 'final' THEN _hold.settle_fingerprint IS NOT NULL OR _hold.charge = 0
        WHEN 'released' THEN _hold.charge = 0 AND _hold.settle_fingerprint IS NULL
        WHEN 'provisional' THEN _hold.ending = 'worker_gone' AND _hold.settle_fingerprint IS NULL
        WHEN 'open' THEN true
        ELSE false
    END
$$;

CREATE FUNCTION farebox.event_pause(_attempts integer) RETURNS interval
    LANGUAGE sql IMMUTABLE
    AS $$
    SELECT least(interval '1 hour', interval '15 seconds' * (2 ^ least(_attempts, 10)))
$$;

CREATE FUNCTION farebox.expire_holds(_limit integer, _restart_grace interval) RETURNS TABLE(hold_id uuid, account_id uuid, charge bigint)
    LANGUAGE sql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    SELECT * FROM farebox.sweep(_limit, _restart_grace, NULL)
$$;

CREATE FUNCTION farebox.expire_lots(_account_id uuid) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
DECLARE
    at timestamptz;
    lot record;
    took record;
    total bigint := 0;
BEGIN
    PERFORM farebox.lock_accounts(ARRAY[_account_id], NULL);
    PERFORM farebox.draw_lots(_account_id, NULL, NULL);
    at := clock_timestamp();
    FOR lot IN
        SELECT l.version,
               l.remaining - l.reserved - l.owed - (
                   SELECT coalesce(sum(h.amount), 0)::bigint
                     FROM farebox.holds h
                    -- A refund's hold has no worker, and what it may draw is reserved.
                    WHERE h.state = 'open' AND h.worker_id IS NOT NULL AND h.account_id = _account_id
                      AND h.opened_at < l.expires_at
               ) AS over
          FROM farebox.lots l
         WHERE l.account_id = _account_id AND l.remaining > 0 AND l.expires_at <= at
         ORDER BY l.expires_at, l.version
    LOOP
        CONTINUE WHEN lot.over <= 0;
        took := farebox.take(
            _account_id, 'expiry', lot.over,
            -- Once at each version of the account.
            _account_id || ':' || lot.version || ':' || (SELECT a.version FROM farebox.accounts a WHERE a.id = _account_id),
            'farebox', NULL, lot.version, true
        );
        EXIT WHEN took.outcome <> 'done';
        total := total + took.taken;
    END LOOP;
    RETURN total;
END
$$;

CREATE FUNCTION farebox.expired_accounts(_after uuid, _limit integer) RETURNS SETOF uuid
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    WITH expired AS MATERIALIZED (
        SELECT l.account_id, l.expires_at, l.remaining - l.reserved - l.owed AS free
          FROM farebox.lots l JOIN farebox.accounts a ON a.id = l.account_id
         WHERE l.expires_at <= clock_timestamp() AND l.remaining > 0 AND l.remaining > l.reserved + l.owed
           AND a.balance > a.held AND (_after IS NULL OR l.account_id > _after)
    ), open AS MATERIALIZED (
        SELECT h.account_id, h.opened_at, h.amount
          FROM farebox.holds h
         WHERE h.state = 'open' AND h.worker_id IS NOT NULL AND EXISTS (SELECT FROM expired)
    )
    SELECT DISTINCT e.account_id
      FROM expired e
     WHERE e.free > (
               SELECT coalesce(sum(o.amount), 0)
                 FROM open o
                WHERE o.account_id = e.account_id AND o.opened_at < e.expires_at
           )
     ORDER BY e.account_id
     LIMIT _limit
$$;

CREATE FUNCTION farebox.extend(_hold_id uuid, _account_id uuid, _worker_id uuid, _by bigint, _at_least bigint, OUT granted bigint, OUT total bigint, OUT state text) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
DECLARE
    purse farebox.purse;
    hold farebox.holds;
    addable bigint;
BEGIN
    PERFORM farebox.lock_accounts(ARRAY[_account_id], NULL);
    purse := farebox.open_purse(_account_id);
    SELECT * INTO hold FROM farebox.holds h WHERE h.id = _hold_id AND h.account_id = _account_id;
    granted := 0;
    total := coalesce(hold.amount, 0);
    state := coalesce(hold.state, 'unknown');
    IF state <> 'open' OR hold.worker_id <> _worker_id OR purse.debt > 0 THEN
        RETURN;
    END IF;
    IF NOT EXISTS (SELECT FROM farebox.workers w WHERE w.id = _worker_id AND w.lease_until > clock_timestamp()) THEN
        RETURN;
    END IF;
    addable := least(_by, purse.balance - purse.held, CASE WHEN purse.limited THEN farebox.spend_left(hold.key_id) END);
    IF addable < _at_least OR addable <= 0 THEN
        RETURN;
    END IF;
    granted := addable;
    total := hold.amount + granted;
    hold.amount := total;
    PERFORM farebox.write_down(
        ARRAY[farebox.moved(purse, NULL, 0, -granted)], NULL, NULL, ARRAY[hold], clock_timestamp()
    );
    IF purse.limited THEN
        PERFORM farebox.count_spend(hold.key_id, granted, 0);
    END IF;
END
$$;

CREATE FUNCTION farebox.extend_holds(_hold_ids uuid[], _account_ids uuid[], _worker_ids uuid[], _totals bigint[], _at_leasts bigint[], _wait_ms integer) RETURNS TABLE(row_number bigint, outcome text, amount bigint, balance bigint, held bigint, debt bigint, spend_left bigint)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET enable_hashjoin TO 'off'
    SET enable_mergejoin TO 'off'
    AS $$
#variable_conflict use_column
DECLARE
    busy uuid[] := farebox.lock_accounts(_account_ids, _wait_ms);
    at timestamptz := clock_timestamp();
    entry record;
    hold farebox.holds;
    purse farebox.purse;
    purse_moved boolean := false;
    hold_moved boolean := false;
    growth bigint;
    purses farebox.purse[];
    changed_holds farebox.holds[];
BEGIN
    -- A later statement than the lock: a waiter sees the holds as they are now.
    FOR entry IN
        SELECT u.*, h AS known_hold, a.id AS known_account, a.balance, a.held, a.debt, a.version,
               EXISTS (SELECT FROM farebox.spend_limits s WHERE s.account_id = u.account_id) AS limited,
               coalesce(w.lease_until > at, false) AS leased,
               s.spend_limit - s.spent AS spendable
          FROM unnest(_hold_ids, _account_ids, _worker_ids, _totals, _at_leasts) WITH ORDINALITY
                   AS u (hold_id, account_id, worker_id, total, at_least, n)
          LEFT JOIN farebox.accounts a ON a.id = u.account_id
          LEFT JOIN farebox.holds h ON h.id = u.hold_id
          LEFT JOIN farebox.workers w ON w.id = u.worker_id
          LEFT JOIN farebox.api_keys k ON k.id = h.key_id
          LEFT JOIN farebox.spend_limits s ON s.family = k.family
         ORDER BY u.account_id, u.hold_id, u.n
    LOOP
        row_number := entry.n;
        amount := 0;
        balance := 0;
        held := 0;
        debt := 0;
        spend_left := NULL;
        IF entry.known_account IS NULL OR entry.account_id = ANY (busy) THEN
            outcome := CASE WHEN entry.known_account IS NULL THEN 'unknown' ELSE 'busy' END;
            RETURN NEXT;
            CONTINUE;
        END IF;
        IF hold_moved AND (hold.id, hold.account_id) IS DISTINCT FROM (entry.hold_id, entry.account_id) THEN
            changed_holds := changed_holds || hold;
            hold_moved := false;
        END IF;
        IF purse.account_id IS DISTINCT FROM entry.account_id THEN
            IF purse_moved THEN
                purses := purses || purse;
            END IF;
            purse_moved := false;
            purse := (
                entry.account_id, entry.balance, entry.held, entry.debt, entry.version, entry.limited, NULL, 0, 0, 0
            )::farebox.purse;
            hold := NULL;
        END IF;
        IF hold.id IS DISTINCT FROM entry.hold_id THEN
            hold := entry.known_hold;
        END IF;

        IF hold.id IS NULL THEN
            outcome := 'unknown';
        ELSIF hold.account_id <> entry.account_id OR hold.worker_id <> entry.worker_id THEN
            outcome := 'conflict';
        ELSIF hold.state <> 'open' THEN
            outcome := 'ended';
            amount := hold.amount;
        ELSE
            IF purse.limited THEN
                spend_left := farebox.spend_left(hold.key_id);
            END IF;
            -- While debt stands nothing is available.
            growth := CASE
                WHEN entry.leased
                THEN greatest(least(entry.total - hold.amount, purse.balance - purse.held, spend_left), 0)
                ELSE 0
            END;
            outcome := CASE
                WHEN hold.amount + growth >= entry.at_least THEN 'extended'
                WHEN NOT entry.leased THEN 'worker_lapsed'
                WHEN purse.debt > 0 OR purse.balance < entry.at_least THEN 'insufficient'
                WHEN entry.spendable < entry.at_least THEN 'spend_limit'
                ELSE 'credits_held'
            END;
            IF outcome = 'extended' AND growth > 0 THEN
                hold.amount := hold.amount + growth;
                hold_moved := true;
                purse := farebox.moved(purse, NULL, 0, -growth);
                purse_moved := true;
                IF spend_left IS NOT NULL THEN
                    PERFORM farebox.count_spend(hold.key_id, growth, 0);
                    spend_left := spend_left - growth;
                END IF;
            END IF;
            amount := hold.amount;
        END IF;

        balance := purse.balance;
        held := purse.held;
        debt := purse.debt;
        RETURN NEXT;
    END LOOP;
    IF hold_moved THEN
        changed_holds := changed_holds || hold;
    END IF;
    IF purse_moved THEN
        purses := purses || purse;
    END IF;
    PERFORM farebox.write_down(purses, NULL, NULL, changed_holds, at);
END
$$;

CREATE FUNCTION farebox.fail_event(_id text, _error text) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    UPDATE farebox.stripe_events AS e SET error = _error WHERE e.id = _id AND e.processed_at IS NULL;
    RETURN FOUND;
END
$$;

CREATE FUNCTION farebox.find_key(_key_id text) RETURNS TABLE(id text, account_id uuid, name text, secret_hmac bytea, pepper_version integer, scopes text[], models text[], profile text, affordable_cap boolean, spend_limit bigint, spent bigint, version integer, created_at timestamp with time zone, expires_at timestamp with time zone, revoked_at timestamp with time zone, rotated_from text)
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    SELECT k.id, k.account_id, k.name, k.secret_hmac, k.pepper_version, k.scopes, k.models, k.profile, k.affordable_cap,
           s.spend_limit, coalesce(s.spent, 0), k.version, k.created_at, k.expires_at, k.revoked_at, k.rotated_from
      FROM farebox.api_keys k
      LEFT JOIN farebox.spend_limits s USING (family)
     WHERE k.id = _key_id
$$;

CREATE FUNCTION farebox.finish_event(_id text, _outcome text) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    UPDATE farebox.stripe_events AS e
       SET processed_at = clock_timestamp(), outcome = _outcome, error = NULL
     WHERE e.id = _id AND e.processed_at IS NULL;
    RETURN FOUND;
END
$$;

CREATE FUNCTION farebox.forget_events(_limit integer, _keep interval) RETURNS integer
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
DECLARE
    forgotten integer;
BEGIN
    DELETE FROM farebox.stripe_events AS e
     WHERE e.id IN (
         SELECT o.id
           FROM farebox.stripe_events o
          WHERE o.received_at < clock_timestamp() - _keep AND o.processed_at IS NOT NULL
          ORDER BY o.received_at
          LIMIT _limit
            FOR UPDATE SKIP LOCKED
     );
    GET DIAGNOSTICS forgotten = ROW_COUNT;
    RETURN forgotten;
END
$$;

CREATE FUNCTION farebox.forget_keys(_limit integer, _keep interval) RETURNS integer
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
DECLARE
    answers integer;
    claims integer;
    before timestamptz := clock_timestamp() - _keep;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtextextended('farebox.forget_keys', 0)) THEN
        RETURN 0;
    END IF;
    DELETE FROM farebox.idempotency_answers
     WHERE hold_id IN (
         SELECT a.hold_id FROM farebox.idempotency_answers a WHERE a.expires_at <= clock_timestamp() LIMIT _limit
     );
    GET DIAGNOSTICS answers = ROW_COUNT;
    DELETE FROM farebox.idempotency_keys AS k
     WHERE k.claimed_at < before
       AND (k.account_id, k.key_hash) IN (
           SELECT o.account_id, o.key_hash
             FROM farebox.idempotency_keys o
            WHERE o.claimed_at < before
              AND NOT EXISTS (SELECT FROM farebox.holds h WHERE h.id = o.hold_id AND h.state = 'open')
            LIMIT _limit
       );
    GET DIAGNOSTICS claims = ROW_COUNT;
    RETURN answers + claims;
END
$$;

CREATE FUNCTION farebox.forget_messages(_age interval, _stale interval) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
DECLARE
    gone bigint;
BEGIN
    UPDATE farebox.outbox AS o
       SET given_up_at = clock_timestamp(), error = 'nobody was there to send it'
     WHERE o.delivered_at IS NULL AND o.given_up_at IS NULL AND o.attempts = 0
       AND o.next_at < clock_timestamp() - _stale;
    DELETE FROM farebox.outbox AS o WHERE coalesce(o.delivered_at, o.given_up_at) < clock_timestamp() - _age;
    GET DIAGNOSTICS gone = ROW_COUNT;
    RETURN gone;
END
$$;

CREATE FUNCTION farebox.free_hold(_request farebox.refund_requests) RETURNS void
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION farebox.free_key(_account_id uuid, _key_hash bytea, _hold_id uuid) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_seqscan TO 'off'
    AS $$
BEGIN
    DELETE FROM farebox.idempotency_keys k
     WHERE k.account_id = _account_id AND k.key_hash = _key_hash AND k.hold_id = _hold_id
       AND NOT EXISTS (SELECT FROM farebox.holds h WHERE h.id = _hold_id);
    RETURN FOUND;
END
$$;

CREATE FUNCTION farebox.freeze_account(_account_id uuid, _reference text, _reason text, _actor text) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    PERFORM farebox.lock_accounts(ARRAY[_account_id], NULL);
    IF NOT EXISTS (SELECT FROM farebox.accounts a WHERE a.id = _account_id) THEN
        RETURN 'unknown';
    END IF;
    IF NOT farebox.frozen(_account_id, _reference, _reason, _actor) AND EXISTS (
        SELECT FROM farebox.freezes f
         WHERE f.account_id = _account_id AND f.reference = _reference AND f.lifted_at IS NOT NULL
    ) THEN
        RETURN 'conflict';
    END IF;
    RETURN 'done';
END
$$;

CREATE FUNCTION farebox.freeze_for_dispute(_account_id uuid, _dispute_id text, _status text, _payment_intent text) RETURNS boolean
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION farebox.frozen(_account_id uuid, _reference text, _reason text, _actor text) RETURNS boolean
    LANGUAGE plpgsql
    AS $$
DECLARE
    at timestamptz := clock_timestamp();
BEGIN
    INSERT INTO farebox.freezes (account_id, reference, reason, actor, created_at)
    VALUES (_account_id, _reference, _reason, _actor, at)
    ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    UPDATE farebox.accounts AS a SET frozen_at = at WHERE a.id = _account_id AND a.frozen_at IS NULL;
    PERFORM farebox.tell(
        'account.frozen', _account_id, _account_id || ':' || _reference,
        jsonb_build_object('reference', _reference, 'reason', _reason)
    );
    RETURN true;
END
$$;

CREATE FUNCTION farebox.give_back(_account_id uuid, _kind text, _amount bigint, _reference text, _actor text, _reason text, _lot_version bigint, _references text[], OUT outcome text, OUT transfer_version bigint) RETURNS record
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION farebox.gone_back(_order_id uuid) RETURNS bigint
    LANGUAGE sql STABLE
    AS $$
    SELECT least(
        (SELECT o.received FROM farebox.orders o WHERE o.id = _order_id),
        (SELECT coalesce(sum(r.amount), 0) FROM farebox.stripe_refunds r WHERE r.order_id = _order_id AND r.active)
        + (SELECT coalesce(sum(d.amount), 0) FROM farebox.disputes d WHERE d.order_id = _order_id AND d.withdrawn)
    )::bigint
$$;

CREATE FUNCTION farebox.grant_credits(_account_id uuid, _kind text, _amount bigint, _reference text, _actor text, _reason text, OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    IF _kind <> 'grant' THEN
        RAISE EXCEPTION 'no such kind of grant: %', _kind USING ERRCODE = '22023';
    END IF;
    SELECT g.* INTO outcome, transfer_account, transfer_version
      FROM farebox.grant_lot(_account_id, _kind, _amount, _reference, _actor, _reason, NULL, NULL) AS g;
END
$$;

CREATE FUNCTION farebox.grant_lot(_account_id uuid, _kind text, _amount bigint, _reference text, _actor text, _reason text, _expires_at timestamp with time zone, _priority integer, OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    IF _kind IN ('grant', 'promo') IS NOT TRUE THEN
        RAISE EXCEPTION 'no such kind of grant: %', _kind USING ERRCODE = '22023';
    END IF;
    IF _priority NOT BETWEEN 0 AND 1000 THEN
        RAISE EXCEPTION 'a priority of %', _priority USING ERRCODE = '22023';
    END IF;
    PERFORM farebox.lock_reference(_kind, _reference);
    PERFORM farebox.lock_accounts(ARRAY[_account_id], NULL);
    IF _expires_at <= clock_timestamp()
       AND NOT EXISTS (SELECT FROM farebox.transfers t WHERE t.kind = _kind AND t.reference = _reference) THEN
        outcome := 'expired';
        RETURN;
    END IF;
    SELECT c.* INTO outcome, transfer_account, transfer_version
      FROM farebox.credited(
               _account_id, _kind, _amount, _reference, _actor, _reason,
               CASE _kind WHEN 'promo' THEN 'promo' ELSE 'granted' END, _expires_at, _priority, NULL
           ) AS c;
END
$$;

CREATE FUNCTION farebox.greater_usage(_a bigint[], _b bigint[]) RETURNS bigint[]
    LANGUAGE sql IMMUTABLE
    AS $$
    SELECT ARRAY[
        greatest(_a[1], _b[1]), greatest(_a[2], _b[2]), greatest(_a[3], _b[3]), greatest(_a[4], _b[4]),
        greatest(_a[5], _b[5]), greatest(_a[6], _b[6]), greatest(_a[7], _b[7])
    ]
$$;

CREATE FUNCTION farebox.heartbeat(_worker_id uuid, _hold_ids uuid[], _usages bigint[]) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    IF NOT farebox.renew_lease(_worker_id) THEN
        RETURN false;
    END IF;
    WITH given AS MATERIALIZED (
        SELECT u.id, _usages[u.n * 7 - 6 : u.n * 7] AS usage FROM unnest(_hold_ids) WITH ORDINALITY AS u (id, n)
    ), free AS MATERIALIZED (
        SELECT h.id
          FROM farebox.holds h
         WHERE h.id = ANY (_hold_ids) AND h.worker_id = _worker_id AND h.state = 'open'
         ORDER BY h.id
           FOR NO KEY UPDATE SKIP LOCKED
    )
    UPDATE farebox.holds AS h
       SET mark = farebox.greater_usage(h.mark, given.usage)
      FROM free JOIN given USING (id)
     WHERE h.id = free.id AND h.state = 'open';
    RETURN true;
END
$$;

CREATE FUNCTION farebox.held_for_refund(_id uuid, _sold farebox.orders, _purse farebox.purse, _amount bigint, _actor text, _reason text) RETURNS farebox.refund_requests
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION farebox.hold_again(_request farebox.refund_requests) RETURNS void
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION farebox.hold_bytes(_row farebox.holds) RETURNS bytea
    LANGUAGE sql STABLE PARALLEL SAFE
    AS $$
    SELECT record_send(ROW(
        _row.id, _row.account_id, _row.state, _row.amount, _row.key_id, _row.worker_id, _row.price_version,
        convert_to(_row.model, 'UTF8'), convert_to(_row.variant, 'UTF8'), convert_to(_row.quote, 'UTF8'),
        _row.fingerprint, _row.mark, _row.opened_at, _row.charge, _row.overrun, _row.usage, _row.usage_source,
        _row.capped, _row.ending, convert_to(_row.receipt, 'UTF8'), _row.settle_fingerprint, _row.ended_at
    ))
$$;

CREATE FUNCTION farebox.hold_digest(_row farebox.holds) RETURNS bytea
    LANGUAGE sql STABLE PARALLEL SAFE
    AS $$
    SELECT substring(sha512(farebox.hold_bytes(_row)) FOR 32)
$$;

CREATE FUNCTION farebox.judged_draws() RETURNS TABLE(id text, drawn boolean, draws bigint)
    LANGUAGE sql STABLE PARALLEL SAFE
    AS $$
    SELECT t.account_id || '-' || t.version,
           CASE
               WHEN t.kind = 'debt_payment'
                   THEN coalesce(f.amount, 0) + coalesce(e.amount, 0) BETWEEN 0 AND t.amount
               WHEN t.account_side = 'debit'
                   THEN coalesce(f.amount, 0) + coalesce(e.amount, 0) = t.amount - coalesce(o.amount, 0)
               WHEN t.kind IN ('reversal', 'true_up', 'refund_return', 'dispute_return')
                   THEN coalesce(f.amount, 0) + coalesce(e.amount, 0) BETWEEN -t.amount AND 0
               ELSE f.version IS NULL AND e.version IS NULL
           END,
           (f.version IS NOT NULL)::integer + coalesce(e.rows, 0)
      FROM farebox.transfers t
      JOIN farebox.lot_marks m ON m.account_id = t.account_id AND m.version >= t.version
      LEFT JOIN farebox.draws f ON f.account_id = t.account_id AND f.version = t.version AND f.nth = 1
      LEFT JOIN (
          SELECT x.account_id, x.version, count(*) AS rows, sum(x.amount) AS amount
            FROM farebox.draws x WHERE x.nth > 1 GROUP BY x.account_id, x.version
      ) AS e ON e.account_id = t.account_id AND e.version = t.version
      LEFT JOIN (
          SELECT x.account_id, x.version + 1 AS version, x.amount FROM farebox.transfers x WHERE x.kind = 'overrun'
      ) AS o ON o.account_id = t.account_id AND o.version = t.version
$$;

CREATE FUNCTION farebox.judged_holds() RETURNS TABLE(id uuid, ended boolean, transfers bigint, kept boolean, ended_so boolean, priced boolean, within_hold boolean, seals integer, as_sealed boolean)
    LANGUAGE sql STABLE PARALLEL SAFE
    AS $$
    SELECT h.id, h.state <> 'open' AS ended,
           (c.version IS NOT NULL)::integer + (u.version IS NOT NULL)::integer + coalesce(r.rows, 0) AS transfers,
           coalesce(h.charge, 0)
               = coalesce(c.amount, 0) + coalesce(CASE u.account_side WHEN 'debit' THEN u.amount ELSE -u.amount END, 0)
               AND h.overrun = coalesce(r.overrun, 0) AND h.reversed = coalesce(r.reversed, 0) AS kept,
           farebox.ended_so(h) AS ended_so,
           h.state = 'open' OR farebox.priced_so(h, p.rates, p.per_request) AS priced,
           h.state = 'open' OR h.usage_source IS DISTINCT FROM 'counted' OR h.fingerprint IS NULL
               OR h.charge <= h.amount AS within_hold,
           (s.id IS NOT NULL)::integer + (v.id IS NOT NULL)::integer AS seals,
           (s.id IS NULL OR s.digest = farebox.hold_digest(h)) AND CASE
               WHEN v.id IS NULL THEN true
               WHEN h.state = 'provisional' THEN v.digest = farebox.hold_digest(h)
               -- Trued up since: its end is under a later seal, or will be.
               ELSE h.state = 'final'
           END AS as_sealed
      FROM farebox.holds h
      LEFT JOIN (
          SELECT u.id, u.digest FROM farebox.seals s, unnest(s.hold_ids, s.hold_digests) AS u (id, digest)
      ) AS s ON s.id = h.id
      LEFT JOIN (
          SELECT u.id, u.digest
            FROM farebox.seals s, unnest(s.provisional_ids, s.provisional_digests) AS u (id, digest)
      ) AS v ON v.id = h.id
      LEFT JOIN farebox.transfers c ON c.hold_id = h.id AND c.account_id = h.account_id AND c.kind = 'charge'
      LEFT JOIN farebox.transfers u ON u.hold_id = h.id AND u.account_id = h.account_id AND u.kind = 'true_up'
      LEFT JOIN (
          SELECT t.hold_id, t.account_id, count(*) AS rows,
                 coalesce(sum(t.amount) FILTER (WHERE t.kind = 'overrun'), 0) AS overrun,
                 coalesce(sum(t.amount) FILTER (WHERE t.kind = 'reversal'), 0) AS reversed
            FROM farebox.transfers t
           WHERE t.kind IN ('overrun', 'reversal')
           GROUP BY t.hold_id, t.account_id
      ) AS r ON r.hold_id = h.id AND r.account_id = h.account_id
      LEFT JOIN farebox.prices p ON p.version = h.price_version AND p.model = h.model AND p.variant = h.variant
$$;

CREATE FUNCTION farebox.judged_lots() RETURNS TABLE(id text, draws bigint, came boolean, left_so boolean)
    LANGUAGE sql STABLE PARALLEL SAFE
    AS $$
    SELECT coalesce(l.account_id, d.account_id) || '-' || coalesce(l.version, d.lot_version), coalesce(d.draws, 0),
           l.version IS NULL OR farebox.came_so(l, t),
           coalesce(l.remaining = l.amount - coalesce(d.amount, 0), false)
      FROM farebox.lots l
      FULL JOIN (
          SELECT x.account_id, x.lot_version, count(*) AS draws, sum(x.amount) AS amount
            FROM farebox.draws x GROUP BY x.account_id, x.lot_version
      ) AS d ON d.account_id = l.account_id AND d.lot_version = l.version
      LEFT JOIN farebox.transfers t ON t.account_id = l.account_id AND t.version = l.version
$$;

CREATE FUNCTION farebox.judged_marks(_accounts uuid[]) RETURNS TABLE(id text, lots bigint, held boolean, spoken_for boolean)
    LANGUAGE sql STABLE PARALLEL SAFE
    AS $$
    SELECT coalesce(a.id, m.account_id, l.account_id)::text, coalesce(l.lots, 0),
           coalesce(m.version, 0) <= a.version AND coalesce(l.as_they_came, true)
               AND coalesce(l.remaining, 0) = CASE WHEN coalesce(m.version, 0) > 0 THEN t.balance_after ELSE 0 END,
           coalesce(l.owed, 0) <= coalesce(t.debt_after, 0)
               AND coalesce(l.reserved, 0) <= coalesce(r.held, 0)
      FROM (SELECT * FROM farebox.accounts x WHERE _accounts IS NULL OR x.id = ANY (_accounts)) AS a
      FULL JOIN (SELECT * FROM farebox.lot_marks x WHERE _accounts IS NULL OR x.account_id = ANY (_accounts)) AS m
             ON m.account_id = a.id
      FULL JOIN (
          SELECT x.account_id, count(*) AS lots,
                 sum(x.remaining) FILTER (WHERE x.version <= k.version) AS remaining,
                 -- Beyond the mark.
                 bool_and(x.version <= coalesce(k.version, 0) OR x.remaining = x.amount) AS as_they_came,
                 sum(x.owed) AS owed, sum(x.reserved) AS reserved
            FROM farebox.lots x LEFT JOIN farebox.lot_marks k ON k.account_id = x.account_id
           WHERE _accounts IS NULL OR x.account_id = ANY (_accounts)
           GROUP BY x.account_id
      ) AS l ON l.account_id = coalesce(a.id, m.account_id)
      LEFT JOIN farebox.transfers t ON t.account_id = m.account_id AND t.version = m.version
      LEFT JOIN (
          SELECT h.account_id, sum(h.amount) AS held
            FROM farebox.holds h WHERE h.state = 'open' AND h.worker_id IS NULL GROUP BY h.account_id
      ) AS r ON r.account_id = a.id
$$;

CREATE FUNCTION farebox.judged_orders_since(_steps farebox.audit_step[]) RETURNS TABLE(name text, id text, account_id uuid, kept boolean)
    LANGUAGE plpgsql STABLE
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET enable_hashjoin TO 'off'
    SET enable_mergejoin TO 'off'
    AS $$
BEGIN
    RETURN QUERY
    WITH new AS MATERIALIZED (
        SELECT t.account_id, t.version, t.kind, t.amount, t.reference
          FROM farebox.audit_step_rows(_steps) AS r, LATERAL (SELECT (r.transfer).*) AS t
         WHERE t.kind IN ('purchase', 'plan', 'refund', 'refund_return', 'dispute', 'dispute_return')
    ), bought AS MATERIALIZED (
        SELECT n.account_id, n.version, n.kind, n.amount, n.reference, p.sold
          FROM new n
          LEFT JOIN LATERAL (
              SELECT o AS sold
                FROM farebox.orders o
               WHERE (o.payment_intent = n.reference OR o.session_id = n.reference OR o.invoice = n.reference)
                 AND o.account_id = n.account_id AND o.credit_version = n.version AND o.state = 'paid'
          ) AS p ON true
         WHERE n.kind IN ('purchase', 'plan')
    ), named AS MATERIALIZED (
        SELECT b.account_id, (b.sold).id AS order_id FROM bought b WHERE b.sold IS DISTINCT FROM NULL
        UNION
        SELECT n.account_id, coalesce(r.order_id, d.order_id)
          FROM new n
          LEFT JOIN farebox.stripe_refunds r
            ON n.kind IN ('refund', 'refund_return') AND r.id = split_part(n.reference, ':', 1)
          LEFT JOIN farebox.disputes d
            ON n.kind IN ('dispute', 'dispute_return') AND d.id = split_part(n.reference, ':', 1)
         WHERE n.kind NOT IN ('purchase', 'plan')
    ), judged AS MATERIALIZED (
        SELECT o.id, n.account_id, o.credits, o.bonus, o.received, o.taken, o.bonus_taken, farebox.gone_back(o.id) AS back
          FROM named n LEFT JOIN farebox.orders o ON o.id = n.order_id AND o.account_id = n.account_id
    )
    SELECT 'purchases_have_their_order', b.account_id || '-' || b.version, b.account_id, b.sold IS DISTINCT FROM NULL
      FROM bought b
    UNION ALL
    SELECT 'paid_orders_were_credited', (b.sold).id::text, b.account_id,
           farebox.credited_so(b.sold, b.kind, b.amount, b.reference, t.kind, t.amount, t.reference)
      FROM bought b
      LEFT JOIN farebox.transfers t ON t.account_id = b.account_id AND t.version = (b.sold).bonus_version
     WHERE b.sold IS DISTINCT FROM NULL
    UNION ALL
    SELECT 'orders_gave_up_what_their_refunds_say', o.id::text, o.account_id,
           o.taken = farebox.share_of(o.credits, o.back, o.received)
               AND o.bonus_taken <= farebox.share_of(o.bonus, o.back, o.received)
      FROM judged o
     WHERE o.id IS NOT NULL
    UNION ALL
    SELECT 'the_book_has_what_orders_gave_up', o.account_id::text, o.account_id, coalesce(o.taken + o.bonus_taken = (
               SELECT coalesce(sum(CASE t.account_side WHEN 'debit' THEN t.amount ELSE -t.amount END), 0)
                 FROM farebox.transfers t
                WHERE t.kind IN ('refund', 'refund_return', 'dispute', 'dispute_return')
                  AND t.reference = ANY (
                      farebox.taking_references(o.id, '') || farebox.taking_references(o.id, ':bonus')
                  )
           ), false)
      FROM judged o;
END
$$;

CREATE FUNCTION farebox.keep_answer(_hold_id uuid, _head text, _body bytea, _keep interval) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    INSERT INTO farebox.idempotency_answers (hold_id, head, body, expires_at)
    VALUES (_hold_id, _head, _body, clock_timestamp() + _keep)
    ON CONFLICT DO NOTHING;
    RETURN FOUND;
END
$$;

CREATE FUNCTION farebox.known_key(_id text, _account_id uuid, _secret_hmac bytea, _rotated_from text) RETURNS text
    LANGUAGE sql
    AS $$
    SELECT CASE WHEN (k.account_id, k.secret_hmac, k.rotated_from)
                     IS NOT DISTINCT FROM (_account_id, _secret_hmac, _rotated_from)
                THEN 'done' ELSE 'conflict' END
      FROM farebox.api_keys k
     WHERE k.id = _id
$$;

CREATE FUNCTION farebox.laid_aside(_order_id uuid) RETURNS farebox.refund_requests
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION farebox.lease_length() RETURNS interval
    LANGUAGE sql IMMUTABLE
    AS $$ SELECT interval '30 seconds' $$;

CREATE FUNCTION farebox.ledger_id() RETURNS uuid
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    SELECT i.id FROM farebox.ledger_identity i
$$;

CREATE FUNCTION farebox.link_auto_topup(_account_id uuid, _failed_order uuid, _link_order uuid) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION farebox.lock_accounts(_account_ids uuid[], _wait_ms integer) RETURNS uuid[]
    LANGUAGE plpgsql
    SET enable_seqscan TO 'off'
    AS $$
DECLARE
    locked uuid[];
BEGIN
    -- Under a snapshot older than the lock, the checks after it would see a key as it was before the wait.
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'the ledger writes under READ COMMITTED only' USING ERRCODE = '25001';
    END IF;
    IF _wait_ms IS DISTINCT FROM 0 THEN
        IF _wait_ms IS NOT NULL THEN
            PERFORM set_config('lock_timeout', _wait_ms::text, true);
        END IF;
        PERFORM FROM farebox.accounts a WHERE a.id = ANY (_account_ids) ORDER BY a.id FOR NO KEY UPDATE;
        RETURN '{}';
    END IF;
    locked := ARRAY(
        SELECT a.id FROM farebox.accounts a WHERE a.id = ANY (_account_ids) ORDER BY a.id FOR NO KEY UPDATE SKIP LOCKED
    );
    RETURN ARRAY(
        SELECT a.id FROM farebox.accounts a WHERE a.id = ANY (_account_ids) AND a.id <> ALL (locked)
    );
END
$$;

CREATE TABLE farebox.api_keys (
    id text NOT NULL,
    account_id uuid NOT NULL,
    family text NOT NULL,
    name text NOT NULL,
    secret_hmac bytea NOT NULL,
    pepper_version integer NOT NULL,
    scopes text[] NOT NULL,
    models text[],
    profile text,
    affordable_cap boolean NOT NULL,
    version integer DEFAULT 1 NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    expires_at timestamp with time zone,
    revoked_at timestamp with time zone,
    rotated_from text
);

CREATE FUNCTION farebox.lock_key(_id text) RETURNS farebox.api_keys
    LANGUAGE plpgsql
    AS $$
DECLARE
    key farebox.api_keys;
BEGIN
    PERFORM farebox.lock_accounts(ARRAY(SELECT k.account_id FROM farebox.api_keys k WHERE k.id = _id), NULL);
    SELECT * INTO key FROM farebox.api_keys k WHERE k.id = _id;
    RETURN key;
END
$$;

CREATE FUNCTION farebox.lock_lapsed(_worker_ids uuid[], _at timestamp with time zone) RETURNS uuid[]
    LANGUAGE sql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    SELECT ARRAY(
        SELECT w.id
          FROM farebox.workers w
         WHERE w.id = ANY (_worker_ids) AND w.lease_until <= _at
         ORDER BY w.id
           FOR NO KEY UPDATE SKIP LOCKED
    )
$$;

CREATE FUNCTION farebox.lock_lots(_account_id uuid) RETURNS bigint
    LANGUAGE plpgsql
    AS $$
DECLARE
    mark bigint;
BEGIN
    -- Under a snapshot older than the lock, what the session before it has drawn would be drawn again.
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'the ledger writes under READ COMMITTED only' USING ERRCODE = '25001';
    END IF;
    INSERT INTO farebox.lot_marks (account_id, version) VALUES (_account_id, 0) ON CONFLICT DO NOTHING;
    SELECT m.version INTO mark FROM farebox.lot_marks m WHERE m.account_id = _account_id FOR UPDATE;
    RETURN mark;
END
$$;

CREATE FUNCTION farebox.lock_reference(_kind text, _reference text) RETURNS void
    LANGUAGE sql
    AS $$
    SELECT pg_advisory_xact_lock(hashtextextended(_kind || ':' || _reference, 1)) WHERE _reference IS NOT NULL
$$;

CREATE FUNCTION farebox.message_delivered(_id uuid) RETURNS void
    LANGUAGE sql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    UPDATE farebox.outbox AS o
       SET delivered_at = clock_timestamp(), given_up_at = NULL, error = NULL
     WHERE o.id = _id AND o.delivered_at IS NULL
$$;

CREATE FUNCTION farebox.message_failed(_id uuid, _attempt integer, _error text, _again interval) RETURNS void
    LANGUAGE sql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    UPDATE farebox.outbox AS o
       SET error = _error, next_at = clock_timestamp() + coalesce(_again, interval '0'),
           given_up_at = CASE WHEN _again IS NULL THEN clock_timestamp() END
     WHERE o.id = _id AND o.attempts = _attempt AND o.delivered_at IS NULL AND o.given_up_at IS NULL
$$;

CREATE FUNCTION farebox.moved(INOUT purse farebox.purse, _kind text, _due bigint, _freed bigint) RETURNS farebox.purse
    LANGUAGE plpgsql IMMUTABLE
    AS $$
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

CREATE FUNCTION farebox.named_rightly(_row farebox.transfers) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    AS $$
    SELECT CASE
        WHEN _row.kind = 'overrun' THEN _row.account_side = 'credit' AND _row.system_account = 'receivable'
        WHEN _row.kind = 'debt_payment' THEN _row.account_side = 'debit' AND _row.system_account = 'receivable'
        WHEN _row.system_account = farebox.system_side(_row.kind) THEN CASE
            WHEN _row.kind = 'true_up' THEN true
            WHEN _row.kind = 'charge' THEN _row.account_side = 'debit'
            WHEN _row.kind = 'reversal' THEN _row.account_side = 'credit'
            WHEN _row.kind IN ('refund', 'dispute', 'expiry') THEN _row.account_side = 'debit' AND _row.hold_id IS NULL
            ELSE _row.account_side = 'credit' AND _row.hold_id IS NULL
        END
        ELSE false
    END
$$;

CREATE FUNCTION farebox.note_reconciliation(_window text, _started_at timestamp with time zone, _compared bigint, _mended bigint, _differing bigint) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    INSERT INTO farebox.reconciliations AS r (name, started_at, finished_at, compared, mended, differing, clean_at)
    VALUES (
        _window, _started_at, clock_timestamp(), _compared, _mended, _differing,
        CASE WHEN _differing = 0 THEN clock_timestamp() END
    ) ON CONFLICT (name) DO UPDATE
       SET started_at = excluded.started_at, finished_at = excluded.finished_at, compared = excluded.compared,
           mended = excluded.mended, differing = excluded.differing, clean_at = coalesce(excluded.clean_at, r.clean_at)
     WHERE r.started_at <= excluded.started_at;
END
$$;

CREATE FUNCTION farebox.open_auto_topup(_id uuid, _account_id uuid, _livemode boolean, _offered boolean, _credits bigint, _bonus bigint, _credits_seconds bigint, _bonus_seconds bigint, _currency text, _price bigint, _day_max integer) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION farebox.open_order(_id uuid, _session_id text, _url text, _customer text) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION farebox.open_purse(_account_id uuid) RETURNS farebox.purse
    LANGUAGE sql
    AS $$
    SELECT a.id, a.balance, a.held, a.debt, a.version,
           EXISTS (SELECT FROM farebox.spend_limits s WHERE s.account_id = a.id),
           NULL::text, 0::bigint, 0::bigint, 0::bigint
      FROM farebox.accounts a
     WHERE a.id = _account_id
$$;

CREATE FUNCTION farebox.open_refund_request(_id uuid, _order_id uuid, _amount bigint, _owing boolean, _step integer, _actor text, _reason text, OUT outcome text, OUT request_id uuid, OUT amount bigint) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION farebox.order_mismatch(_sold farebox.orders, _account_id uuid, _payment_intent text, _session_id text, _customer text, _livemode boolean, _currency text, _subtotal bigint, _discount bigint, _tax bigint, _total bigint, _received bigint) RETURNS text
    LANGUAGE sql STABLE
    AS $$
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

CREATE FUNCTION farebox.order_rank(_state text) RETURNS integer
    LANGUAGE sql IMMUTABLE
    AS $$
    SELECT CASE _state
        WHEN 'created' THEN 0 WHEN 'open' THEN 1 WHEN 'pending' THEN 2
        WHEN 'failed' THEN 3 WHEN 'expired' THEN 3 WHEN 'canceled' THEN 3
        WHEN 'paid' THEN 4
    END
$$;

CREATE TABLE farebox.quarantine (
    payment text NOT NULL,
    order_id uuid,
    account_id uuid,
    reason text NOT NULL,
    payment_intent text,
    session_id text,
    customer text,
    payment_method text,
    currency text,
    subtotal bigint,
    discount bigint,
    tax bigint,
    received bigint,
    livemode boolean NOT NULL,
    seen_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    resolved_at timestamp with time zone,
    resolved_by text,
    resolution text,
    CONSTRAINT quarantine_resolution_check CHECK ((resolution = ANY (ARRAY['credited'::text, 'dismissed'::text])))
);

CREATE FUNCTION farebox.ordered_anew(_sold farebox.orders, _held farebox.quarantine, _new_id uuid) RETURNS uuid
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION farebox.pay_order(_order_id uuid, _account_id uuid, _payment text, _payment_intent text, _session_id text, _customer text, _payment_method text, _livemode boolean, _currency text, _subtotal bigint, _discount bigint, _tax bigint, _total bigint, _received bigint, _problem text, OUT outcome text, OUT reason text, OUT fresh boolean) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION farebox.pay_plan(_order_id uuid, _account_id uuid, _invoice text, _payment_intent text, _customer text, _pack text, _credits bigint, _expires_at timestamp with time zone, _currency text, _price bigint, _livemode boolean, _subtotal bigint, _discount bigint, _tax bigint, _received bigint, _problem text, OUT outcome text, OUT reason text, OUT order_id uuid, OUT fresh boolean) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION farebox.postgres_started() RETURNS timestamp with time zone
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$ SELECT pg_postmaster_start_time() $$;

CREATE FUNCTION farebox.price_rows(_body text) RETURNS TABLE(model text, variant text, rates bigint[], per_request bigint)
    LANGUAGE sql IMMUTABLE
    AS $$
    SELECT route.key, priced.key,
           ARRAY(SELECT r.value::bigint
                   FROM jsonb_array_elements_text(priced.value -> 'rates') WITH ORDINALITY AS r (value, position)
                  ORDER BY r.position),
           (priced.value ->> 'per_request')::bigint
      FROM jsonb_each(_body::jsonb -> 'routes') AS route,
           jsonb_each(route.value -> 'variants') AS priced
$$;

CREATE FUNCTION farebox.priced_so(_hold farebox.holds, _rates bigint[], _per_request bigint) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    AS $$
    SELECT coalesce(
        CASE
            WHEN _hold.usage IS NULL THEN _hold.charge = 0
            WHEN _hold.capped IS NULL THEN _hold.charge = farebox.charge_at(_rates, _per_request, _hold.usage)
            WHEN _hold.capped = 'counted_above_hold' AND _hold.charge < _hold.amount
                THEN _hold.charge = farebox.charge_at(_rates, _per_request, _hold.usage)
            ELSE _hold.charge <= farebox.charge_at(_rates, _per_request, _hold.usage)
        END,
        false
    )
$$;

CREATE FUNCTION farebox.priority_of(_lot_kind text) RETURNS integer
    LANGUAGE sql IMMUTABLE
    AS $$
    SELECT CASE _lot_kind WHEN 'promo' THEN 100 WHEN 'granted' THEN 200 WHEN 'paid' THEN 300 END
$$;

CREATE FUNCTION farebox.promo_wait(_account_id uuid) RETURNS timestamp with time zone
    LANGUAGE sql
    AS $$
    SELECT r.since + interval '1 hour'
      FROM farebox.promo_refusals r
     WHERE r.account_id = _account_id AND r.refusals >= 10 AND r.since + interval '1 hour' > clock_timestamp()
$$;

CREATE FUNCTION farebox.put_customer(_account_id uuid, _livemode boolean, _customer text, _instead_of text) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION farebox.put_price_version(_version text, _body text) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    IF encode(sha256(convert_to(_body, 'UTF8')), 'hex') IS DISTINCT FROM _version THEN
        RAISE EXCEPTION 'price version % is not the SHA-256 of its body', left(_version, 64) USING ERRCODE = '22023';
    END IF;
    INSERT INTO farebox.price_versions (version, body) VALUES (_version, _body) ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO farebox.prices (version, model, variant, rates, per_request)
    SELECT _version, r.model, r.variant, r.rates, r.per_request FROM farebox.price_rows(_body) AS r;
    RETURN true;
END
$$;

CREATE FUNCTION farebox.redeem_promo(_account_id uuid, _code text, _actor text, OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint, OUT retry_at timestamp with time zone) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
DECLARE
    promo farebox.promo_codes;
    reference text := 'code:' || _code || ':' || _account_id;
    at timestamptz;
    credit record;
BEGIN
    -- Looked at before any lock, too: whoever tries codes by the thousand must not keep the account's calls waiting.
    SELECT r.account_id, r.version INTO transfer_account, transfer_version
      FROM farebox.promo_redemptions r WHERE r.code = _code AND r.account_id = _account_id;
    retry_at := farebox.promo_wait(_account_id);
    outcome := CASE WHEN transfer_version IS NOT NULL THEN 'again' WHEN retry_at IS NOT NULL THEN 'wait' END;
    IF outcome IS NOT NULL THEN
        RETURN;
    END IF;

    PERFORM farebox.lock_reference('promo', reference);
    PERFORM farebox.lock_accounts(ARRAY[_account_id], NULL);
    SELECT * INTO promo FROM farebox.promo_codes p WHERE p.code = _code FOR UPDATE;
    at := clock_timestamp();
    SELECT r.account_id, r.version INTO transfer_account, transfer_version
      FROM farebox.promo_redemptions r WHERE r.code = _code AND r.account_id = _account_id;
    retry_at := farebox.promo_wait(_account_id);
    outcome := CASE
        WHEN transfer_version IS NOT NULL THEN 'again'
        WHEN NOT EXISTS (SELECT FROM farebox.accounts a WHERE a.id = _account_id) THEN 'no_account'
        WHEN retry_at IS NOT NULL THEN 'wait'
        WHEN promo.code IS NULL THEN 'unknown'
        WHEN promo.starts_at > at THEN 'not_started'
        WHEN promo.ended_at IS NOT NULL OR promo.ends_at <= at THEN 'ended'
        WHEN promo.redeemed >= promo.redemptions_max THEN 'used_up'
        ELSE 'done'
    END;
    IF outcome IN ('unknown', 'not_started', 'ended', 'used_up') THEN
        PERFORM farebox.count_promo_refusal(_account_id);
    END IF;
    IF outcome <> 'done' THEN
        RETURN;
    END IF;

    SELECT * INTO credit FROM farebox.credited(
        _account_id, 'promo', promo.credits, reference, _actor, 'promo code ' || _code, 'promo',
        at + make_interval(secs => promo.credits_seconds), NULL, NULL
    );
    outcome := credit.outcome;
    transfer_account := credit.transfer_account;
    transfer_version := credit.transfer_version;
    IF outcome <> 'done' THEN
        RETURN;
    END IF;
    INSERT INTO farebox.promo_redemptions (code, account_id, version) VALUES (_code, _account_id, transfer_version);
    UPDATE farebox.promo_codes AS p SET redeemed = p.redeemed + 1 WHERE p.code = _code;
END
$$;

CREATE FUNCTION farebox.refund_needs(_sold farebox.orders, _amount bigint, _available bigint, OUT credits bigint, OUT bonus bigint) RETURNS record
    LANGUAGE plpgsql STABLE
    AS $$
DECLARE
    upto bigint := least(farebox.gone_back(_sold.id) + _amount, _sold.received);
BEGIN
    credits := farebox.share_of(_sold.credits, upto, _sold.received) - _sold.taken;
    credits := greatest(least(credits, _available), 0);
    bonus := farebox.share_of(_sold.bonus, upto, _sold.received) - _sold.bonus_taken;
    bonus := greatest(least(bonus, _available - credits), 0);
END
$$;

CREATE FUNCTION farebox.refund_rank(_status text) RETURNS integer
    LANGUAGE sql IMMUTABLE
    AS $$
    SELECT CASE _status
        WHEN 'pending' THEN 1 WHEN 'requires_action' THEN 1 WHEN 'succeeded' THEN 2 WHEN 'failed' THEN 3
        WHEN 'canceled' THEN 3
    END
$$;

CREATE FUNCTION farebox.refuse_change() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    RAISE EXCEPTION '% on farebox.%: its rows are never changed or removed', TG_OP, TG_TABLE_NAME
        USING ERRCODE = '55000';
END
$$;

CREATE FUNCTION farebox.release_refund_request(_id uuid, _problem text) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION farebox.renew(_worker_id uuid, _beat bigint, _hold_ids uuid[], _usages bigint[]) RETURNS uuid[]
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET enable_hashjoin TO 'off'
    SET enable_mergejoin TO 'off'
    AS $$
DECLARE
    last bigint;
    marked uuid[];
BEGIN
    SELECT w.beat INTO last FROM farebox.workers w WHERE w.id = _worker_id FOR NO KEY UPDATE;
    IF _beat <= last THEN
        RETURN '{}';
    END IF;
    IF NOT farebox.renew_lease(_worker_id) THEN
        RETURN NULL;
    END IF;
    UPDATE farebox.workers AS w SET beat = coalesce(_beat, w.beat) WHERE w.id = _worker_id;
    -- Each row by its key, and judged when it is locked: asked for the worker's open holds, the planner would go through
    -- all of them for every mark.
    WITH locked AS MATERIALIZED (
        SELECT h.id, h.worker_id, h.state, u.n
          FROM unnest(_hold_ids) WITH ORDINALITY AS u (id, n)
         CROSS JOIN LATERAL (
                   SELECT x.id, x.worker_id, x.state FROM farebox.holds x WHERE x.id = u.id
                      FOR NO KEY UPDATE SKIP LOCKED
               ) AS h
    ), stored AS (
        UPDATE farebox.holds AS h
           SET mark = _usages[l.n * 7 - 6 : l.n * 7]
          FROM locked l
         WHERE h.id = l.id AND l.worker_id = _worker_id AND l.state = 'open'
        RETURNING h.id
    )
    SELECT coalesce(array_agg(s.id), '{}') INTO marked FROM stored s;
    RETURN marked;
END
$$;

CREATE FUNCTION farebox.renew_lease(_worker_id uuid) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    UPDATE farebox.workers AS w
       SET lease_until = clock_timestamp() + farebox.lease_length(),
           held_since = CASE WHEN w.lease_until > clock_timestamp() THEN w.held_since ELSE clock_timestamp() END
     WHERE w.id = _worker_id AND w.stopped_at IS NULL;
    RETURN FOUND;
END
$$;

CREATE FUNCTION farebox.resend_messages(_id uuid) RETURNS bigint
    LANGUAGE sql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    WITH again AS (
        UPDATE farebox.outbox AS o
           SET delivered_at = NULL, given_up_at = NULL, attempts = 0, next_at = clock_timestamp()
         WHERE CASE WHEN _id IS NULL THEN o.given_up_at IS NOT NULL ELSE o.id = _id END
        RETURNING o.id
    )
    SELECT count(*) FROM again
$$;

CREATE FUNCTION farebox.reserve_lot(_account_id uuid, _lot_version bigint, _amount bigint) RETURNS bigint
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION farebox.resolve_quarantine(_payment text, _resolution text, _actor text, _new_id uuid, OUT outcome text, OUT order_id uuid) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION farebox.reverse(_hold_id uuid, _amount bigint, _reference text, _actor text, _reason text, OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
DECLARE
    purse farebox.purse;
    hold farebox.holds;
    known farebox.transfers;
    back bigint;
    at timestamptz;
BEGIN
    PERFORM farebox.lock_reference('reversal', _reference);
    PERFORM farebox.lock_accounts(ARRAY(SELECT h.account_id FROM farebox.holds h WHERE h.id = _hold_id), NULL);
    SELECT * INTO known FROM farebox.transfers t WHERE t.kind = 'reversal' AND t.reference = _reference;
    IF known.version IS NOT NULL THEN
        outcome := CASE
            WHEN known.hold_id = _hold_id AND known.amount = coalesce(_amount, known.amount) THEN 'done' ELSE 'conflict'
        END;
        transfer_account := known.account_id;
        transfer_version := known.version;
        RETURN;
    END IF;
    SELECT * INTO hold FROM farebox.holds h WHERE h.id = _hold_id;
    back := coalesce(_amount, hold.charge - hold.reversed);
    outcome := CASE
        WHEN hold.id IS NULL THEN 'unknown'
        WHEN hold.state <> 'final' THEN 'not_final'
        WHEN back <= 0 OR back > hold.charge - hold.reversed THEN 'above_charge'
        ELSE 'done'
    END;
    IF outcome <> 'done' THEN
        RETURN;
    END IF;
    at := clock_timestamp();
    purse := farebox.open_purse(hold.account_id);
    transfer_account := purse.account_id;
    transfer_version := purse.version + 1;
    purse := farebox.moved(purse, 'reversal', -back, 0);
    hold.reversed := hold.reversed + back;
    PERFORM farebox.write_down(
        ARRAY[purse], ARRAY[farebox.a_move(purse, hold.id, _reference, _actor, _reason)], NULL, ARRAY[hold], at
    );
    IF purse.limited THEN
        PERFORM farebox.count_spend(hold.key_id, 0, -back);
    END IF;
END
$$;

CREATE FUNCTION farebox.revoke_key(_id text) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
DECLARE
    key farebox.api_keys := farebox.lock_key(_id);
BEGIN
    IF key.id IS NULL THEN
        RETURN 'unknown';
    END IF;
    UPDATE farebox.api_keys AS k
       SET revoked_at = clock_timestamp(), version = k.version + 1
     WHERE k.id = _id AND k.revoked_at IS NULL;
    RETURN 'done';
END
$$;

CREATE FUNCTION farebox.rotate_key(_id text, _new_id text, _secret_hmac bytea, _pepper_version integer, _overlap interval) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
DECLARE
    key farebox.api_keys := farebox.lock_key(_id);
    ends_at timestamptz := clock_timestamp() + _overlap;
BEGIN
    IF key.id IS NULL THEN
        RETURN 'unknown';
    END IF;
    IF key.revoked_at IS NOT NULL OR key.expires_at <= clock_timestamp() THEN
        -- By this very rotation, it may be, whose reply was lost.
        RETURN coalesce(farebox.known_key(_new_id, key.account_id, _secret_hmac, _id), 'conflict');
    END IF;
    INSERT INTO farebox.api_keys (
        id, account_id, family, name, secret_hmac, pepper_version, scopes, models, profile, affordable_cap, expires_at,
        rotated_from
    ) VALUES (
        _new_id, key.account_id, key.family, key.name, _secret_hmac, _pepper_version, key.scopes, key.models,
        key.profile, key.affordable_cap, key.expires_at, key.id
    ) ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN farebox.known_key(_new_id, key.account_id, _secret_hmac, _id);
    END IF;
    UPDATE farebox.api_keys AS k
       SET expires_at = least(k.expires_at, ends_at), version = k.version + 1
     WHERE k.id = _id;
    RETURN 'done';
END
$$;

CREATE FUNCTION farebox.schema_version(OUT number integer, OUT serves_from integer) RETURNS record
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    SELECT m.number, m.serves_from FROM farebox.schema_migrations m ORDER BY m.number DESC LIMIT 1
$$;

CREATE FUNCTION farebox.seal(_rows integer, _pause interval) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    SET work_mem TO '64MB'
    SET plan_cache_mode TO 'force_custom_plan'
    AS $$
#variable_conflict use_column
DECLARE
    block_rows CONSTANT integer := 5000;
    on_its_way CONSTANT interval := interval '2 minutes';
    since timestamptz;
    sealed bigint;
    holds bigint;
    ended_to timestamptz;
    at timestamptz := clock_timestamp();
BEGIN
    -- Under an older snapshot than the lock, what the session before it has sealed would be sealed again.
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'the ledger is sealed under READ COMMITTED only' USING ERRCODE = '25001';
    END IF;
    SELECT least(s.holds_to, at - on_its_way) INTO since
      FROM farebox.sealing s FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN NULL;
    ELSIF since > at - on_its_way - _pause THEN
        RETURN 0;
    END IF;
    WITH known AS MATERIALIZED (
        SELECT id FROM farebox.seals s, unnest(s.hold_ids) AS id WHERE s.ended_to >= since
    ), known_provisional AS MATERIALIZED (
        SELECT id FROM farebox.seals s, unnest(s.provisional_ids) AS id WHERE s.ended_to >= since
    ), ended AS MATERIALIZED (
        SELECT h.*
          FROM farebox.holds h
         WHERE h.state <> 'open' AND h.ended_at >= since
           AND CASE h.state
                   WHEN 'provisional' THEN h.id NOT IN (SELECT id FROM known_provisional)
                   ELSE h.id NOT IN (SELECT id FROM known)
               END
         ORDER BY h.ended_at, h.id
         LIMIT _rows
    ), holds AS (
        SELECT e.account_id,
               coalesce(array_agg(e.id ORDER BY e.id) FILTER (WHERE e.state <> 'provisional'), '{}') AS ids,
               coalesce(
                   array_agg(farebox.hold_digest(e::farebox.holds) ORDER BY e.id)
                       FILTER (WHERE e.state <> 'provisional'), '{}'
               ) AS digests,
               coalesce(array_agg(e.id ORDER BY e.id) FILTER (WHERE e.state = 'provisional'), '{}') AS provisional_ids,
               coalesce(
                   array_agg(farebox.hold_digest(e::farebox.holds) ORDER BY e.id)
                       FILTER (WHERE e.state = 'provisional'), '{}'
               ) AS provisional_digests,
               max(e.ended_at) AS ended_to
          FROM ended e
         GROUP BY e.account_id
    ), behind AS (
        SELECT b.account_id, b.upto
          FROM (
                   SELECT a.id AS account_id, least(a.version, coalesce(l.last_version, 0) + block_rows) AS upto,
                          sum(least(a.version - coalesce(l.last_version, 0), block_rows)) OVER (ORDER BY a.id)
                              - least(a.version - coalesce(l.last_version, 0), block_rows) AS before
                     FROM farebox.accounts a
                     LEFT JOIN LATERAL (
                         SELECT s.last_version FROM farebox.seals s
                          WHERE s.account_id = a.id ORDER BY s.number DESC LIMIT 1
                     ) AS l ON true
                    WHERE a.version > coalesce(l.last_version, 0)
               ) AS b
         WHERE b.before < _rows
    ), made AS (
        SELECT account_id, coalesce(l.number, 0) + 1 AS number, l.head AS before,
               -- All of them, or none.
               CASE WHEN t.rows = b.upto - coalesce(l.last_version, 0) THEN b.upto ELSE coalesce(l.last_version, 0) END
                   AS last_version,
               CASE WHEN t.rows = b.upto - coalesce(l.last_version, 0) THEN t.digest ELSE sha512('') END AS digest,
               coalesce(l.last_version, 0) AS after,
               coalesce(h.ids, '{}') AS hold_ids, coalesce(h.digests, '{}') AS hold_digests,
               coalesce(h.provisional_ids, '{}') AS provisional_ids,
               coalesce(h.provisional_digests, '{}') AS provisional_digests, h.ended_to
          FROM behind b
          FULL JOIN holds h USING (account_id)
          LEFT JOIN LATERAL (
              SELECT s.number, s.last_version, s.head FROM farebox.seals s
               WHERE s.account_id = coalesce(b.account_id, h.account_id) ORDER BY s.number DESC LIMIT 1
          ) AS l ON true
          LEFT JOIN LATERAL farebox.transfers_digest(b.account_id, coalesce(l.last_version, 0), b.upto) AS t
                 ON b.account_id IS NOT NULL
    ), written AS (
        INSERT INTO farebox.seals
        SELECT m.account_id, m.number, m.last_version, m.digest, m.hold_ids, m.hold_digests, m.provisional_ids,
               m.provisional_digests, m.ended_to, statement_timestamp(),
               farebox.seal_head(m.before, ROW(
                   m.account_id, m.number, m.last_version, m.digest, m.hold_ids, m.hold_digests, m.provisional_ids,
                   m.provisional_digests, m.ended_to, statement_timestamp(), NULL
               )::farebox.seals)
          FROM made m
         WHERE m.last_version > m.after OR m.ended_to IS NOT NULL
    )
    SELECT coalesce(sum(m.last_version - m.after + cardinality(m.hold_ids) + cardinality(m.provisional_ids)), 0),
           coalesce(sum(cardinality(m.hold_ids) + cardinality(m.provisional_ids)), 0), max(m.ended_to)
      INTO sealed, holds, ended_to
      FROM made m;
    UPDATE farebox.sealing AS s
       SET holds_to = CASE WHEN holds < _rows THEN at - on_its_way ELSE least(ended_to, at - on_its_way) END;
    RETURN sealed;
END
$$;

CREATE TABLE farebox.seals (
    account_id uuid NOT NULL,
    number bigint NOT NULL,
    last_version bigint NOT NULL,
    transfers_digest bytea NOT NULL,
    hold_ids uuid[] NOT NULL,
    hold_digests bytea[] NOT NULL,
    provisional_ids uuid[] NOT NULL,
    provisional_digests bytea[] NOT NULL,
    ended_to timestamp with time zone,
    sealed_at timestamp with time zone NOT NULL,
    head bytea NOT NULL,
    CONSTRAINT seals_last_version_check CHECK ((last_version >= 0)),
    CONSTRAINT seals_number_check CHECK ((number > 0))
);

CREATE FUNCTION farebox.seal_head(_before bytea, _seal farebox.seals) RETURNS bytea
    LANGUAGE sql STABLE PARALLEL SAFE
    AS $$
    SELECT sha256(record_send(ROW(
        'farebox seal 1'::text, _before, _seal.account_id, _seal.number, _seal.last_version, _seal.transfers_digest,
        _seal.hold_ids, _seal.hold_digests, _seal.provisional_ids, _seal.provisional_digests, _seal.ended_to,
        _seal.sealed_at
    )))
$$;

CREATE FUNCTION farebox.set_auto_topup(_account_id uuid, _enabled boolean, _threshold bigint, _pack text, _credits bigint, _currency text, _price bigint, _monthly_max bigint, _livemode boolean, _actor text) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION farebox.set_low_balance(_account_id uuid, _low_balance bigint) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    INSERT INTO farebox.alerts AS l (account_id, low_balance)
    SELECT a.id, _low_balance FROM farebox.accounts a WHERE a.id = _account_id
    ON CONFLICT (account_id) DO UPDATE SET low_balance = _low_balance;
    RETURN CASE WHEN FOUND THEN 'done' ELSE 'unknown' END;
END
$$;

CREATE FUNCTION farebox.set_spend_limit(_key_id text, _spend_limit bigint) RETURNS void
    LANGUAGE plpgsql
    AS $$
DECLARE
    key farebox.api_keys;
BEGIN
    SELECT * INTO key FROM farebox.api_keys k WHERE k.id = _key_id;
    IF _spend_limit IS NULL THEN
        DELETE FROM farebox.spend_limits s WHERE s.family = key.family;
        RETURN;
    END IF;
    INSERT INTO farebox.spend_limits AS s (family, account_id, spend_limit, spent, held)
    SELECT key.family, key.account_id, _spend_limit,
           coalesce(sum(h.charge - h.reversed), 0), coalesce(sum(h.amount) FILTER (WHERE h.state = 'open'), 0)
      FROM farebox.holds h
     WHERE h.account_id = key.account_id
       AND h.key_id IN (SELECT k.id FROM farebox.api_keys k WHERE k.family = key.family)
    ON CONFLICT (family) DO UPDATE SET spend_limit = _spend_limit;
END
$$;

CREATE FUNCTION farebox.settle_order(_order_id uuid, _kind text, _payment text, _payment_intent text, _session_id text, _customer text, _payment_method text, _subtotal bigint, _discount bigint, _tax bigint, _received bigint, _expires_at timestamp with time zone) RETURNS void
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION farebox.settle_takings(_order_id uuid, _kind text, _reference text, _more boolean, _reason text, _freed bigint, _freed_bonus bigint, OUT moved bigint) RETURNS bigint
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION farebox.settled(INOUT purse farebox.purse, _state text, _amount bigint, _charged bigint, _key_id text, _charge bigint) RETURNS farebox.purse
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION farebox.share_of(_credits bigint, _money bigint, _received bigint) RETURNS bigint
    LANGUAGE sql IMMUTABLE
    AS $$
    SELECT CASE WHEN _received > 0 THEN div(_credits::numeric * _money, _received)::bigint ELSE 0 END
$$;

CREATE FUNCTION farebox.spend_left(_key_id text) RETURNS bigint
    LANGUAGE sql
    AS $$
    SELECT greatest(s.spend_limit - s.spent - s.held, 0)
      FROM farebox.api_keys k JOIN farebox.spend_limits s USING (family)
     WHERE k.id = _key_id
$$;

CREATE FUNCTION farebox.start_worker(_worker_id uuid, _hostname text, _release text) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    INSERT INTO farebox.workers AS w (id, hostname, release, lease_until)
    VALUES (_worker_id, _hostname, _release, clock_timestamp() + farebox.lease_length())
    ON CONFLICT (id) DO NOTHING;
    RETURN FOUND OR farebox.renew_lease(_worker_id);
END
$$;

CREATE FUNCTION farebox.stop_auto_topup(_account_id uuid, _actor text) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    UPDATE farebox.auto_topups AS t
       SET enabled = false, actor = _actor, changed_at = clock_timestamp()
     WHERE t.account_id = _account_id AND t.enabled;
    RETURN CASE
        WHEN EXISTS (SELECT FROM farebox.auto_topups t WHERE t.account_id = _account_id) THEN 'done' ELSE 'unknown'
    END;
END
$$;

CREATE FUNCTION farebox.stop_worker(_worker_id uuid) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    UPDATE farebox.workers AS w
       SET stopped_at = clock_timestamp(), lease_until = least(w.lease_until, clock_timestamp())
     WHERE w.id = _worker_id AND w.stopped_at IS NULL;
    RETURN FOUND;
END
$$;

CREATE FUNCTION farebox.sweep(_limit integer, _restart_grace interval, _not_after timestamp with time zone) RETURNS TABLE(hold_id uuid, account_id uuid, charge bigint)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
#variable_conflict use_column
DECLARE
    at timestamptz := clock_timestamp();
    lapsed uuid[];
    accounts uuid[];
    purse farebox.purse;
    hold farebox.holds;
    cost numeric;
    purses farebox.purse[];
    moves farebox.move[];
    settled_holds farebox.holds[];
BEGIN
    IF at < farebox.postgres_started() + coalesce(_restart_grace, 2 * farebox.lease_length()) OR at > _not_after
       OR NOT pg_try_advisory_xact_lock(hashtextextended('farebox.expire_holds', 0)) THEN
        RETURN;
    END IF;
    -- Locks in the order worker, account, hold; every condition is checked again once the lock is held.
    lapsed := farebox.lock_lapsed(
        ARRAY(
            SELECT w.id
              FROM farebox.workers w
             WHERE w.lease_until <= at
               AND EXISTS (SELECT FROM farebox.holds h WHERE h.worker_id = w.id AND h.state = 'open')
             ORDER BY w.lease_until, w.id
             LIMIT _limit
        ),
        at
    );
    accounts := ARRAY(
        SELECT a.id
          FROM farebox.accounts a
         WHERE a.id IN (SELECT h.account_id FROM farebox.holds h WHERE h.worker_id = ANY (lapsed) AND h.state = 'open')
         ORDER BY a.id
         LIMIT _limit
           FOR NO KEY UPDATE SKIP LOCKED
    );
    FOR hold IN
        SELECT h.*
          FROM farebox.holds h
         WHERE h.state = 'open' AND h.worker_id = ANY (lapsed) AND h.account_id = ANY (accounts)
         ORDER BY h.account_id, h.id
         LIMIT _limit
           FOR NO KEY UPDATE SKIP LOCKED
    LOOP
        IF purse.account_id IS DISTINCT FROM hold.account_id THEN
            IF purse.account_id IS NOT NULL THEN
                purses := purses || purse;
            END IF;
            purse := farebox.open_purse(hold.account_id);
        END IF;
        -- A mark was counted by us, so it never costs more than was held.
        cost := coalesce(farebox.charge_for(hold.price_version, hold.model, hold.variant, hold.mark), 0);
        hold.capped := CASE WHEN cost > hold.amount THEN 'counted_above_hold' END;
        cost := least(cost, hold.amount);
        purse := farebox.settled(purse, hold.state, hold.amount, hold.charge, hold.key_id, cost::bigint);
        hold.state := 'provisional';
        hold.charge := cost;
        hold.overrun := purse.lent;
        hold.usage := hold.mark;
        hold.usage_source := CASE WHEN hold.mark IS NULL THEN 'none' ELSE 'counted' END;
        hold.ending := 'worker_gone';
        hold.ended_at := at;
        moves := moves || farebox.a_move(purse, hold.id);
        settled_holds := settled_holds || hold;
        RETURN QUERY SELECT hold.id, hold.account_id, cost::bigint;
    END LOOP;
    IF purse.account_id IS NOT NULL THEN
        purses := purses || purse;
    END IF;
    PERFORM farebox.write_down(purses, moves, NULL, settled_holds, at);
END
$$;

CREATE FUNCTION farebox.system_side(_kind text) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    AS $$
    SELECT CASE _kind
        WHEN 'charge' THEN 'revenue' WHEN 'true_up' THEN 'revenue' WHEN 'reversal' THEN 'revenue'
        WHEN 'grant' THEN 'grants' WHEN 'promo' THEN 'grants'
        WHEN 'purchase' THEN 'stripe' WHEN 'plan' THEN 'stripe'
        WHEN 'refund' THEN 'refunds' WHEN 'refund_return' THEN 'refunds'
        WHEN 'dispute' THEN 'disputes' WHEN 'dispute_return' THEN 'disputes'
        WHEN 'expiry' THEN 'expired'
    END
$$;

CREATE FUNCTION farebox.take(_account_id uuid, _kind text, _amount bigint, _reference text, _actor text, _reason text, _lot_version bigint, _at_most_lot boolean, _freed bigint DEFAULT 0, OUT outcome text, OUT transfer_version bigint, OUT taken bigint, OUT lent bigint) RETURNS record
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION farebox.take_event(_id text, _type text, _livemode boolean, _object_id text, _created timestamp with time zone, _outcome text) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
DECLARE
    known farebox.stripe_events;
    at timestamptz := clock_timestamp();
BEGIN
    INSERT INTO farebox.stripe_events (
        id, type, livemode, object_id, created, received_at, attempts, tried_at, processed_at, outcome
    ) VALUES (
        _id, _type, _livemode, _object_id, _created, at, 1, at, CASE WHEN _outcome IS NOT NULL THEN at END, _outcome
    ) ON CONFLICT DO NOTHING;
    IF FOUND THEN
        RETURN CASE WHEN _outcome IS NULL THEN 'taken' ELSE 'processed' END;
    END IF;
    SELECT e.* INTO known FROM farebox.stripe_events e WHERE e.id = _id FOR NO KEY UPDATE;
    IF (known.type, known.livemode, known.object_id) IS DISTINCT FROM (_type, _livemode, _object_id) THEN
        RETURN 'conflict';
    END IF;
    IF known.processed_at IS NOT NULL THEN
        RETURN 'processed';
    END IF;
    UPDATE farebox.stripe_events AS e
       SET attempts = e.attempts + 1, tried_at = at, error = CASE WHEN _outcome IS NULL THEN e.error END,
           processed_at = CASE WHEN _outcome IS NOT NULL THEN at END, outcome = _outcome
     WHERE e.id = _id;
    RETURN CASE WHEN _outcome IS NULL THEN 'taken' ELSE 'processed' END;
END
$$;

CREATE FUNCTION farebox.taking_references(_order_id uuid, _suffix text) RETURNS text[]
    LANGUAGE sql STABLE
    AS $$
    SELECT ARRAY(
        SELECT r.id || _suffix FROM farebox.stripe_refunds r WHERE r.order_id = _order_id
        UNION ALL
        SELECT farebox.dispute_reference(d.id, n) || _suffix
          FROM farebox.disputes d, generate_series(1, greatest(d.takings, d.returns)) AS n
         WHERE d.order_id = _order_id
    )
$$;

CREATE FUNCTION farebox.tell(_type text, _account_id uuid, _reference text, _data jsonb DEFAULT '{}'::jsonb) RETURNS void
    LANGUAGE plpgsql
    AS $$
BEGIN
    INSERT INTO farebox.outbox (id, type, account_id, reference, payload)
    SELECT gen_random_uuid(), _type, a.id, _reference, jsonb_build_object(
               'type', _type,
               'timestamp', farebox.time_text(clock_timestamp()),
               'data', jsonb_build_object(
                   'account', a.id, 'name', a.name, 'external_id', a.external_id,
                   'balance', farebox.credits_text(a.balance), 'debt', farebox.credits_text(a.debt)
               ) || _data
           )::text
      FROM farebox.accounts a
     WHERE a.id = _account_id
    ON CONFLICT (type, reference) DO NOTHING;
END
$$;

CREATE FUNCTION farebox.tell_alerts(_low_balance bigint, _rows integer) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
DECLARE
    found record;
    told bigint := 0;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtextextended('farebox.tell_alerts', 1)) THEN
        RETURN NULL;
    END IF;
    FOR found IN
        SELECT n.*
          FROM (
                   SELECT a.id, a.balance, a.debt, a.version, m.mark, l.low_told_at, l.debt_told_at,
                          -- An account that never had anything has not run low.
                          coalesce(a.version > 0 AND a.balance < m.mark, false) AS low, a.debt > 0 AS owes
                     FROM farebox.accounts a
                     LEFT JOIN farebox.alerts l ON l.account_id = a.id
                    CROSS JOIN LATERAL (SELECT coalesce(l.low_balance, _low_balance) AS mark) AS m
               ) AS n
         WHERE n.low <> (n.low_told_at IS NOT NULL) OR n.owes <> (n.debt_told_at IS NOT NULL)
         LIMIT _rows
    LOOP
        IF found.low AND found.low_told_at IS NULL THEN
            PERFORM farebox.tell('account.low_balance', found.id, found.id || ':' || found.version, jsonb_build_object(
                'balance', farebox.credits_text(found.balance), 'low_balance', farebox.credits_text(found.mark)
            ));
        END IF;
        IF found.owes AND found.debt_told_at IS NULL THEN
            PERFORM farebox.tell('account.debt', found.id, found.id || ':' || found.version, jsonb_build_object(
                'balance', farebox.credits_text(found.balance), 'debt', farebox.credits_text(found.debt)
            ));
        END IF;
        INSERT INTO farebox.alerts AS l (account_id, low_told_at, debt_told_at)
        VALUES (
            found.id, CASE WHEN found.low THEN clock_timestamp() END, CASE WHEN found.owes THEN clock_timestamp() END
        )
        ON CONFLICT (account_id) DO UPDATE
           SET low_told_at = CASE WHEN found.low THEN coalesce(l.low_told_at, clock_timestamp()) END,
               debt_told_at = CASE WHEN found.owes THEN coalesce(l.debt_told_at, clock_timestamp()) END;
        told := told + 1;
    END LOOP;
    RETURN told;
END
$$;

CREATE FUNCTION farebox.thawed(_account_id uuid, _reference text, _actor text) RETURNS boolean
    LANGUAGE plpgsql
    AS $$
BEGIN
    UPDATE farebox.freezes AS f
       SET lifted_at = clock_timestamp(), lifted_by = _actor
     WHERE f.account_id = _account_id AND f.reference = coalesce(_reference, f.reference) AND f.lifted_at IS NULL;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    UPDATE farebox.accounts AS a
       SET frozen_at = NULL
     WHERE a.id = _account_id
       AND NOT EXISTS (SELECT FROM farebox.freezes f WHERE f.account_id = _account_id AND f.lifted_at IS NULL);
    RETURN true;
END
$$;

CREATE FUNCTION farebox.time_text(_at timestamp with time zone) RETURNS text
    LANGUAGE sql IMMUTABLE
    AS $$
    SELECT to_char(_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
$$;

CREATE FUNCTION farebox.transfer_bytes(_row farebox.transfers) RETURNS bytea
    LANGUAGE sql STABLE PARALLEL SAFE
    AS $$
    SELECT record_send(ROW(
        _row.account_id, _row.version, _row.kind, _row.account_side, _row.system_account, _row.amount,
        _row.balance_after, _row.debt_after, _row.hold_id, convert_to(_row.reference, 'UTF8'),
        convert_to(_row.actor, 'UTF8'), convert_to(_row.reason, 'UTF8'), _row.created_at
    ))
$$;

CREATE FUNCTION farebox.transfers_digest(_account_id uuid, _after bigint, _upto bigint, OUT digest bytea, OUT rows bigint) RETURNS record
    LANGUAGE sql STABLE PARALLEL SAFE
    AS $$
    SELECT sha512(coalesce(string_agg(farebox.transfer_bytes(t), '' ORDER BY t.version), '')), count(*)
      FROM farebox.transfers t
     WHERE t.account_id = _account_id AND t.version > _after AND t.version <= _upto
$$;

CREATE FUNCTION farebox.unfreeze_account(_account_id uuid, _reference text, _actor text) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    PERFORM farebox.lock_accounts(ARRAY[_account_id], NULL);
    IF NOT EXISTS (SELECT FROM farebox.accounts a WHERE a.id = _account_id) THEN
        RETURN 'unknown';
    END IF;
    IF _reference IS NOT NULL AND NOT EXISTS (
        SELECT FROM farebox.freezes f WHERE f.account_id = _account_id AND f.reference = _reference
    ) THEN
        RETURN 'no_freeze';
    END IF;
    PERFORM farebox.thawed(_account_id, _reference, _actor);
    RETURN 'done';
END
$$;

CREATE FUNCTION farebox.unreserve_lot(_account_id uuid, _lot_version bigint, _amount bigint) RETURNS void
    LANGUAGE plpgsql
    AS $$
BEGIN
    PERFORM farebox.draw_lots(_account_id, NULL, NULL);
    UPDATE farebox.lots AS l
       SET reserved = greatest(l.reserved - _amount, 0)
     WHERE l.account_id = _account_id AND l.version = _lot_version AND l.reserved > 0 AND _amount > 0;
END
$$;

CREATE FUNCTION farebox.unwind(_account_id uuid, _version bigint, _lot_version bigint, _references text[]) RETURNS bigint
    LANGUAGE plpgsql
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET enable_hashjoin TO 'off'
    SET enable_mergejoin TO 'off'
    AS $$
DECLARE
    entry farebox.transfers;
    lot bigint;
    versions bigint[];
    stack record;
    top integer;
    part bigint;
    rest bigint;
    paid bigint;
    unowed bigint;
    netted bigint;
    nth integer := 0;
BEGIN
    SELECT * INTO entry FROM farebox.transfers t WHERE t.account_id = _account_id AND t.version = _version;
    SELECT t.amount INTO paid
      FROM farebox.transfers t
     WHERE t.account_id = _account_id AND t.version = _version + 1 AND t.kind = 'debt_payment';
    paid := coalesce(paid, 0);
    IF entry.hold_id IS NULL THEN
        lot := _lot_version;
        versions := ARRAY(
            SELECT t.version
              FROM unnest(_references) AS r (reference)
              JOIN farebox.transfers t ON t.reference = r.reference
             WHERE t.kind IN ('refund', 'refund_return', 'dispute', 'dispute_return') AND t.account_id = _account_id
               AND t.version < _version
        );
    ELSE
        versions := ARRAY(
            SELECT t.version
              FROM farebox.transfers t
             WHERE t.hold_id = entry.hold_id AND t.kind IN ('charge', 'true_up') AND t.account_id = _account_id
               AND t.version < _version
            UNION ALL
            SELECT t.version
              FROM farebox.transfers t
             WHERE t.hold_id = entry.hold_id AND t.kind = 'reversal' AND t.account_id = _account_id
               AND t.version < _version
        );
    END IF;

    rest := entry.amount;
    -- What the lot owes is paid by this, so that it needn't give it up.
    SELECT least(rest, paid, l.owed) INTO unowed
      FROM farebox.lots l WHERE l.account_id = _account_id AND l.version = lot;
    unowed := coalesce(unowed, 0);
    rest := rest - unowed;
    IF unowed > 0 THEN
        UPDATE farebox.lots AS l SET owed = l.owed - unowed WHERE l.account_id = _account_id AND l.version = lot;
    END IF;

    stack := farebox.unwindable(_account_id, versions, lot);
    top := cardinality(stack.lots);
    WHILE rest > 0 AND top > 0 LOOP
        part := least(rest, stack.amounts[top]);
        rest := rest - part;
        nth := nth + 1;
        INSERT INTO farebox.draws (account_id, version, nth, lot_version, amount, owed)
        VALUES (_account_id, _version, nth, stack.lots[top], -part, false);
        UPDATE farebox.lots AS l
           SET remaining = l.remaining + part
         WHERE l.account_id = _account_id AND l.version = stack.lots[top];
        top := top - 1;
    END LOOP;

    -- Other lots' owed parts come before.
    SELECT least(rest, greatest(paid - unowed - coalesce(sum(l.owed), 0), 0)) INTO netted
      FROM farebox.lots l
     WHERE l.account_id = _account_id AND l.remaining > 0;
    rest := rest - netted;
    IF rest > 0 THEN
        INSERT INTO farebox.lots (account_id, version, kind, amount, remaining, priority, created_at)
        VALUES (_account_id, _version, 'granted', rest, rest, farebox.priority_of('granted'), entry.created_at);
    END IF;
    RETURN unowed + netted;
END
$$;

CREATE FUNCTION farebox.unwindable(_account_id uuid, _versions bigint[], _lot_version bigint, OUT lots bigint[], OUT amounts bigint[]) RETURNS record
    LANGUAGE plpgsql
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET enable_hashjoin TO 'off'
    SET enable_mergejoin TO 'off'
    AS $$
DECLARE
    draw record;
    back bigint;
    part bigint;
    top integer := 0;
BEGIN
    lots := '{}';
    amounts := '{}';
    FOR draw IN
        SELECT d.version, d.nth, d.lot_version, d.amount
          FROM unnest(_versions) AS v (version)
          JOIN farebox.draws d ON d.account_id = _account_id AND d.version = v.version
        UNION
        SELECT d.version, d.nth, d.lot_version, d.amount
          FROM farebox.draws d
         WHERE d.account_id = _account_id AND d.lot_version = _lot_version AND d.owed
         ORDER BY version, nth
    LOOP
        IF draw.amount > 0 THEN
            top := top + 1;
            lots[top] := draw.lot_version;
            amounts[top] := draw.amount;
            CONTINUE;
        END IF;
        back := -draw.amount;
        WHILE back > 0 AND top > 0 LOOP
            part := least(back, amounts[top]);
            back := back - part;
            amounts[top] := amounts[top] - part;
            IF amounts[top] = 0 THEN
                top := top - 1;
            END IF;
        END LOOP;
    END LOOP;
    lots := lots[1:top];
    amounts := amounts[1:top];
END
$$;

CREATE FUNCTION farebox.update_key(_id text, _version integer, _name text, _scopes text[], _models text[], _profile text, _affordable_cap boolean, _spend_limit bigint, _expires_at timestamp with time zone) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
DECLARE
    key farebox.api_keys := farebox.lock_key(_id);
BEGIN
    IF key.id IS NULL THEN
        RETURN 'unknown';
    END IF;
    IF key.version <> _version OR key.revoked_at IS NOT NULL THEN
        RETURN 'conflict';
    END IF;
    UPDATE farebox.api_keys AS k
       SET name = _name, scopes = _scopes, models = _models, profile = _profile, affordable_cap = _affordable_cap,
           expires_at = _expires_at, version = k.version + 1
     WHERE k.id = _id;
    PERFORM farebox.set_spend_limit(_id, _spend_limit);
    RETURN 'done';
END
$$;

CREATE FUNCTION farebox.write_down(_purses farebox.purse[], _moves farebox.move[], _new_holds farebox.holds[], _changed_holds farebox.holds[], _at timestamp with time zone) RETURNS void
    LANGUAGE plpgsql
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET enable_hashjoin TO 'off'
    SET enable_mergejoin TO 'off'
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
               (m.kind, CASE WHEN m.due > 0 THEN 'debit' ELSE 'credit' END, farebox.system_side(m.kind),
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

CREATE TABLE farebox.accounts (
    id uuid NOT NULL,
    name text NOT NULL,
    external_id text,
    email text,
    balance bigint DEFAULT 0 NOT NULL,
    held bigint DEFAULT 0 NOT NULL,
    debt bigint DEFAULT 0 NOT NULL,
    version bigint DEFAULT 0 NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    frozen_at timestamp with time zone,
    CONSTRAINT available_not_negative CHECK (((balance - held) >= 0)),
    CONSTRAINT debt_not_negative CHECK ((debt >= 0)),
    CONSTRAINT debt_paid_first CHECK (((debt = 0) OR (balance = held))),
    CONSTRAINT held_not_negative CHECK ((held >= 0))
)
WITH (fillfactor='50', autovacuum_vacuum_scale_factor='0.02');

CREATE TABLE farebox.alerts (
    account_id uuid NOT NULL,
    low_balance bigint,
    low_told_at timestamp with time zone,
    debt_told_at timestamp with time zone,
    CONSTRAINT alerts_low_balance_check CHECK ((low_balance >= 0))
);

CREATE TABLE farebox.audit_marks (
    account_id uuid NOT NULL,
    version bigint NOT NULL,
    balance bigint NOT NULL,
    debt bigint NOT NULL
)
WITH (fillfactor='70', autovacuum_vacuum_scale_factor='0.02');

CREATE TABLE farebox.auditing (
    one boolean DEFAULT true NOT NULL,
    clean_at timestamp with time zone,
    ended_to timestamp with time zone NOT NULL,
    prices_to timestamp with time zone NOT NULL,
    CONSTRAINT auditing_one_check CHECK (one)
);

CREATE TABLE farebox.auto_topups (
    account_id uuid NOT NULL,
    enabled boolean NOT NULL,
    threshold bigint NOT NULL,
    pack text NOT NULL,
    credits bigint NOT NULL,
    currency text NOT NULL,
    price bigint NOT NULL,
    monthly_max bigint NOT NULL,
    livemode boolean NOT NULL,
    actor text NOT NULL,
    failures integer DEFAULT 0 NOT NULL,
    blocked_until timestamp with time zone,
    problem text,
    failed_order uuid,
    link_order uuid,
    changed_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT auto_topups_credits_check CHECK ((credits > 0)),
    CONSTRAINT auto_topups_monthly_max_check CHECK ((monthly_max >= 0)),
    CONSTRAINT auto_topups_price_check CHECK ((price > 0)),
    CONSTRAINT auto_topups_threshold_check CHECK ((threshold > 0))
);

CREATE SEQUENCE farebox.dispute_questions
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;

CREATE TABLE farebox.disputes (
    id text NOT NULL,
    order_id uuid NOT NULL,
    amount bigint NOT NULL,
    status text NOT NULL,
    asked bigint NOT NULL,
    withdrawn boolean NOT NULL,
    takings integer DEFAULT 0 NOT NULL,
    returns integer DEFAULT 0 NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    changed_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT disputes_amount_check CHECK ((amount > 0))
);

CREATE TABLE farebox.draws (
    account_id uuid NOT NULL,
    version bigint NOT NULL,
    nth integer NOT NULL,
    lot_version bigint NOT NULL,
    amount bigint NOT NULL,
    owed boolean NOT NULL,
    CONSTRAINT draws_amount_check CHECK ((amount <> 0))
);

CREATE TABLE farebox.freezes (
    account_id uuid NOT NULL,
    reference text NOT NULL,
    reason text NOT NULL,
    actor text NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    lifted_at timestamp with time zone,
    lifted_by text
);

CREATE UNLOGGED TABLE farebox.idempotency_answers (
    hold_id uuid NOT NULL,
    head text NOT NULL,
    body bytea NOT NULL,
    expires_at timestamp with time zone NOT NULL
);

CREATE TABLE farebox.ledger_identity (
    id uuid DEFAULT gen_random_uuid() NOT NULL,
    only_one boolean DEFAULT true NOT NULL,
    CONSTRAINT ledger_identity_only_one_check CHECK (only_one)
);

CREATE TABLE farebox.lot_marks (
    account_id uuid NOT NULL,
    version bigint NOT NULL
)
WITH (fillfactor='70');

CREATE TABLE farebox.price_versions (
    version text NOT NULL,
    body text NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT price_versions_version_check CHECK ((version ~ '^[0-9a-f]{64}$'::text))
);

CREATE TABLE farebox.prices (
    version text NOT NULL,
    model text NOT NULL,
    variant text NOT NULL,
    rates bigint[] NOT NULL,
    per_request bigint NOT NULL,
    CONSTRAINT prices_per_request_check CHECK ((per_request >= 0)),
    CONSTRAINT seven_rates CHECK (((cardinality(rates) = 7) AND (0 <= ALL (rates))))
);

CREATE TABLE farebox.promo_codes (
    code text NOT NULL,
    credits bigint NOT NULL,
    credits_seconds bigint,
    starts_at timestamp with time zone,
    ends_at timestamp with time zone,
    redemptions_max bigint,
    redeemed bigint DEFAULT 0 NOT NULL,
    actor text NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    ended_at timestamp with time zone,
    CONSTRAINT promo_codes_code_check CHECK ((code = upper(code))),
    CONSTRAINT promo_codes_credits_check CHECK ((credits > 0)),
    CONSTRAINT promo_codes_credits_seconds_check CHECK ((credits_seconds > 0)),
    CONSTRAINT promo_codes_redemptions_max_check CHECK ((redemptions_max > 0)),
    CONSTRAINT redeemed_within_max CHECK ((redeemed <= redemptions_max))
);

CREATE TABLE farebox.promo_redemptions (
    code text NOT NULL,
    account_id uuid NOT NULL,
    version bigint NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);

CREATE TABLE farebox.promo_refusals (
    account_id uuid NOT NULL,
    since timestamp with time zone NOT NULL,
    refusals integer NOT NULL
);

CREATE TABLE farebox.reconciliations (
    name text NOT NULL,
    started_at timestamp with time zone NOT NULL,
    finished_at timestamp with time zone NOT NULL,
    compared bigint NOT NULL,
    mended bigint NOT NULL,
    differing bigint NOT NULL,
    clean_at timestamp with time zone,
    CONSTRAINT reconciliations_name_check CHECK ((name = ANY (ARRAY['recent'::text, 'month'::text])))
);

CREATE TABLE farebox.schema_migrations (
    number integer NOT NULL,
    name text NOT NULL,
    checksum text NOT NULL,
    serves_from integer NOT NULL,
    applied_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);

CREATE TABLE farebox.sealing (
    one boolean DEFAULT true NOT NULL,
    holds_to timestamp with time zone NOT NULL,
    CONSTRAINT sealing_one_check CHECK (one)
);

CREATE TABLE farebox.spend_limits (
    family text NOT NULL,
    account_id uuid NOT NULL,
    spend_limit bigint NOT NULL,
    spent bigint NOT NULL,
    held bigint NOT NULL,
    CONSTRAINT spend_limits_held_check CHECK ((held >= 0)),
    CONSTRAINT spend_limits_spend_limit_check CHECK ((spend_limit >= 0)),
    CONSTRAINT spend_limits_spent_check CHECK ((spent >= 0))
)
WITH (fillfactor='50');

CREATE TABLE farebox.stripe_customers (
    account_id uuid NOT NULL,
    livemode boolean NOT NULL,
    customer text NOT NULL,
    payment_method text,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);

CREATE TABLE farebox.stripe_refunds (
    id text NOT NULL,
    order_id uuid NOT NULL,
    amount bigint NOT NULL,
    status text NOT NULL,
    status_rank integer NOT NULL,
    active boolean NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    changed_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT stripe_refunds_amount_check CHECK ((amount > 0))
);

CREATE TABLE farebox.workers (
    id uuid NOT NULL,
    hostname text NOT NULL,
    release text NOT NULL,
    started_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    lease_until timestamp with time zone NOT NULL,
    stopped_at timestamp with time zone,
    beat bigint DEFAULT 0 NOT NULL,
    held_since timestamp with time zone DEFAULT clock_timestamp() NOT NULL
)
WITH (fillfactor='50');

ALTER TABLE ONLY farebox.accounts
    ADD CONSTRAINT accounts_external_id_key UNIQUE (external_id);

ALTER TABLE ONLY farebox.accounts
    ADD CONSTRAINT accounts_pkey PRIMARY KEY (id);

ALTER TABLE ONLY farebox.alerts
    ADD CONSTRAINT alerts_pkey PRIMARY KEY (account_id);

ALTER TABLE ONLY farebox.api_keys
    ADD CONSTRAINT api_keys_pkey PRIMARY KEY (id);

ALTER TABLE ONLY farebox.audit_marks
    ADD CONSTRAINT audit_marks_pkey PRIMARY KEY (account_id);

ALTER TABLE ONLY farebox.auditing
    ADD CONSTRAINT auditing_pkey PRIMARY KEY (one);

ALTER TABLE ONLY farebox.auto_topups
    ADD CONSTRAINT auto_topups_pkey PRIMARY KEY (account_id);

ALTER TABLE ONLY farebox.disputes
    ADD CONSTRAINT disputes_pkey PRIMARY KEY (id);

ALTER TABLE ONLY farebox.draws
    ADD CONSTRAINT draws_pkey PRIMARY KEY (account_id, version, nth);

ALTER TABLE ONLY farebox.freezes
    ADD CONSTRAINT freezes_pkey PRIMARY KEY (account_id, reference);

ALTER TABLE ONLY farebox.holds
    ADD CONSTRAINT holds_pkey PRIMARY KEY (id);

ALTER TABLE ONLY farebox.idempotency_answers
    ADD CONSTRAINT idempotency_answers_pkey PRIMARY KEY (hold_id);

ALTER TABLE ONLY farebox.idempotency_keys
    ADD CONSTRAINT idempotency_keys_pkey PRIMARY KEY (account_id, key_hash);

ALTER TABLE farebox.transfers
    ADD CONSTRAINT known_kind CHECK ((kind = ANY (ARRAY['grant'::text, 'promo'::text, 'purchase'::text, 'plan'::text, 'charge'::text, 'true_up'::text, 'overrun'::text, 'debt_payment'::text, 'reversal'::text, 'refund'::text, 'refund_return'::text, 'dispute'::text, 'dispute_return'::text, 'expiry'::text]))) NOT VALID;

ALTER TABLE ONLY farebox.ledger_identity
    ADD CONSTRAINT ledger_identity_pkey PRIMARY KEY (only_one);

ALTER TABLE ONLY farebox.lot_marks
    ADD CONSTRAINT lot_marks_pkey PRIMARY KEY (account_id);

ALTER TABLE ONLY farebox.lots
    ADD CONSTRAINT lots_pkey PRIMARY KEY (account_id, version);

ALTER TABLE ONLY farebox.orders
    ADD CONSTRAINT orders_account_id_request_key_key UNIQUE (account_id, request_key);

ALTER TABLE ONLY farebox.orders
    ADD CONSTRAINT orders_invoice_key UNIQUE (invoice);

ALTER TABLE ONLY farebox.orders
    ADD CONSTRAINT orders_payment_intent_key UNIQUE (payment_intent);

ALTER TABLE ONLY farebox.orders
    ADD CONSTRAINT orders_pkey PRIMARY KEY (id);

ALTER TABLE ONLY farebox.orders
    ADD CONSTRAINT orders_session_id_key UNIQUE (session_id);

ALTER TABLE ONLY farebox.outbox
    ADD CONSTRAINT outbox_pkey PRIMARY KEY (id);

ALTER TABLE ONLY farebox.outbox
    ADD CONSTRAINT outbox_type_reference_key UNIQUE (type, reference);

ALTER TABLE ONLY farebox.price_versions
    ADD CONSTRAINT price_versions_pkey PRIMARY KEY (version);

ALTER TABLE ONLY farebox.prices
    ADD CONSTRAINT prices_pkey PRIMARY KEY (version, model, variant);

ALTER TABLE ONLY farebox.promo_codes
    ADD CONSTRAINT promo_codes_pkey PRIMARY KEY (code);

ALTER TABLE ONLY farebox.promo_redemptions
    ADD CONSTRAINT promo_redemptions_pkey PRIMARY KEY (code, account_id);

ALTER TABLE ONLY farebox.promo_refusals
    ADD CONSTRAINT promo_refusals_pkey PRIMARY KEY (account_id);

ALTER TABLE ONLY farebox.quarantine
    ADD CONSTRAINT quarantine_pkey PRIMARY KEY (payment);

ALTER TABLE ONLY farebox.reconciliations
    ADD CONSTRAINT reconciliations_pkey PRIMARY KEY (name);

ALTER TABLE ONLY farebox.refund_requests
    ADD CONSTRAINT refund_requests_pkey PRIMARY KEY (id);

ALTER TABLE ONLY farebox.refund_requests
    ADD CONSTRAINT refund_requests_refund_key UNIQUE (refund);

ALTER TABLE ONLY farebox.schema_migrations
    ADD CONSTRAINT schema_migrations_pkey PRIMARY KEY (number);

ALTER TABLE ONLY farebox.sealing
    ADD CONSTRAINT sealing_pkey PRIMARY KEY (one);

ALTER TABLE ONLY farebox.seals
    ADD CONSTRAINT seals_pkey PRIMARY KEY (account_id, number);

ALTER TABLE ONLY farebox.spend_limits
    ADD CONSTRAINT spend_limits_pkey PRIMARY KEY (family);

ALTER TABLE ONLY farebox.stripe_customers
    ADD CONSTRAINT stripe_customers_customer_key UNIQUE (customer);

ALTER TABLE ONLY farebox.stripe_customers
    ADD CONSTRAINT stripe_customers_pkey PRIMARY KEY (account_id, livemode);

ALTER TABLE ONLY farebox.stripe_events
    ADD CONSTRAINT stripe_events_pkey PRIMARY KEY (id);

ALTER TABLE ONLY farebox.stripe_refunds
    ADD CONSTRAINT stripe_refunds_pkey PRIMARY KEY (id);

ALTER TABLE ONLY farebox.transfers
    ADD CONSTRAINT transfers_pkey PRIMARY KEY (account_id, version);

ALTER TABLE ONLY farebox.workers
    ADD CONSTRAINT workers_pkey PRIMARY KEY (id);

CREATE INDEX api_keys_account ON farebox.api_keys USING btree (account_id);

CREATE INDEX api_keys_family ON farebox.api_keys USING btree (family);

CREATE INDEX auto_topups_enabled ON farebox.auto_topups USING btree (account_id) WHERE enabled;

CREATE INDEX disputes_order ON farebox.disputes USING btree (order_id);

CREATE INDEX draws_owed ON farebox.draws USING btree (account_id, lot_version) WHERE owed;

CREATE INDEX holds_account ON farebox.holds USING btree (account_id, id) WHERE (state <> 'open'::text);

CREATE INDEX holds_ended ON farebox.holds USING btree (ended_at) WHERE (state <> 'open'::text);

CREATE INDEX holds_open ON farebox.holds USING btree (worker_id) WHERE (state = 'open'::text);

CREATE INDEX idempotency_answers_age ON farebox.idempotency_answers USING btree (expires_at);

CREATE INDEX idempotency_keys_age ON farebox.idempotency_keys USING brin (claimed_at) WITH (autosummarize='on');

CREATE INDEX lots_expiring ON farebox.lots USING btree (expires_at) WHERE ((remaining > 0) AND (expires_at IS NOT NULL));

CREATE INDEX lots_left ON farebox.lots USING btree (account_id) WHERE (remaining > 0);

CREATE INDEX lots_order ON farebox.lots USING btree (order_id) WHERE (order_id IS NOT NULL);

CREATE INDEX orders_account ON farebox.orders USING btree (account_id, created_at);

CREATE UNIQUE INDEX orders_one_auto ON farebox.orders USING btree (account_id) WHERE ((kind = 'auto'::text) AND (state = ANY (ARRAY['created'::text, 'open'::text, 'pending'::text])));

CREATE INDEX orders_unfinished ON farebox.orders USING btree (created_at) WHERE (state = ANY (ARRAY['created'::text, 'open'::text, 'pending'::text]));

CREATE INDEX outbox_due ON farebox.outbox USING btree (next_at) WHERE ((delivered_at IS NULL) AND (given_up_at IS NULL));

CREATE INDEX refund_requests_held ON farebox.refund_requests USING btree (created_at) WHERE (state = 'held'::text);

CREATE UNIQUE INDEX refund_requests_one_held ON farebox.refund_requests USING btree (order_id) WHERE (state = 'held'::text);

CREATE INDEX seals_ended_to ON farebox.seals USING btree (ended_to) WHERE (ended_to IS NOT NULL);

CREATE INDEX spend_limits_account ON farebox.spend_limits USING btree (account_id);

CREATE INDEX stripe_events_received ON farebox.stripe_events USING btree (received_at);

CREATE INDEX stripe_events_unprocessed ON farebox.stripe_events USING btree (tried_at) WHERE (processed_at IS NULL);

CREATE INDEX stripe_refunds_order ON farebox.stripe_refunds USING btree (order_id);

CREATE INDEX transfers_of_a_hold ON farebox.transfers USING btree (hold_id) WHERE (kind = ANY (ARRAY['overrun'::text, 'reversal'::text]));

CREATE UNIQUE INDEX transfers_once_a_hold ON farebox.transfers USING btree (hold_id, kind) WHERE (kind = ANY (ARRAY['charge'::text, 'true_up'::text]));

CREATE UNIQUE INDEX transfers_reference ON farebox.transfers USING btree (kind, reference) WHERE (reference IS NOT NULL);

CREATE TRIGGER append_only BEFORE DELETE OR UPDATE OR TRUNCATE ON farebox.draws FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();

CREATE TRIGGER append_only BEFORE DELETE OR UPDATE OR TRUNCATE ON farebox.seals FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();

CREATE TRIGGER append_only BEFORE DELETE OR UPDATE OR TRUNCATE ON farebox.transfers FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();

CREATE TRIGGER auto_order_ended AFTER UPDATE OF state ON farebox.orders FOR EACH ROW WHEN (((new.kind = 'auto'::text) AND (new.state = ANY (ARRAY['failed'::text, 'expired'::text, 'canceled'::text])) AND (old.state <> new.state))) EXECUTE FUNCTION farebox.auto_order_ended();

CREATE TRIGGER immutable BEFORE DELETE OR UPDATE OR TRUNCATE ON farebox.price_versions FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();

CREATE TRIGGER immutable BEFORE DELETE OR UPDATE OR TRUNCATE ON farebox.prices FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();

CREATE TRIGGER never_removed BEFORE DELETE OR TRUNCATE ON farebox.accounts FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();

CREATE TRIGGER never_removed BEFORE DELETE OR TRUNCATE ON farebox.api_keys FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();

CREATE TRIGGER never_removed BEFORE DELETE OR TRUNCATE ON farebox.disputes FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();

CREATE TRIGGER never_removed BEFORE DELETE OR TRUNCATE ON farebox.holds FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();

CREATE TRIGGER never_removed BEFORE DELETE OR TRUNCATE ON farebox.lots FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();

CREATE TRIGGER never_removed BEFORE DELETE OR TRUNCATE ON farebox.orders FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();

CREATE TRIGGER never_removed BEFORE DELETE OR TRUNCATE ON farebox.refund_requests FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();

CREATE TRIGGER never_removed BEFORE DELETE OR TRUNCATE ON farebox.stripe_refunds FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();

ALTER TABLE ONLY farebox.alerts
    ADD CONSTRAINT alerts_account_id_fkey FOREIGN KEY (account_id) REFERENCES farebox.accounts(id);

ALTER TABLE ONLY farebox.api_keys
    ADD CONSTRAINT api_keys_account_id_fkey FOREIGN KEY (account_id) REFERENCES farebox.accounts(id);

ALTER TABLE ONLY farebox.api_keys
    ADD CONSTRAINT api_keys_family_fkey FOREIGN KEY (family) REFERENCES farebox.api_keys(id);

ALTER TABLE ONLY farebox.auto_topups
    ADD CONSTRAINT auto_topups_account_id_fkey FOREIGN KEY (account_id) REFERENCES farebox.accounts(id);

ALTER TABLE ONLY farebox.disputes
    ADD CONSTRAINT disputes_order_id_fkey FOREIGN KEY (order_id) REFERENCES farebox.orders(id);

ALTER TABLE ONLY farebox.freezes
    ADD CONSTRAINT freezes_account_id_fkey FOREIGN KEY (account_id) REFERENCES farebox.accounts(id);

ALTER TABLE ONLY farebox.orders
    ADD CONSTRAINT orders_account_id_fkey FOREIGN KEY (account_id) REFERENCES farebox.accounts(id);

ALTER TABLE ONLY farebox.prices
    ADD CONSTRAINT prices_version_fkey FOREIGN KEY (version) REFERENCES farebox.price_versions(version);

ALTER TABLE ONLY farebox.promo_redemptions
    ADD CONSTRAINT promo_redemptions_account_id_fkey FOREIGN KEY (account_id) REFERENCES farebox.accounts(id);

ALTER TABLE ONLY farebox.promo_redemptions
    ADD CONSTRAINT promo_redemptions_code_fkey FOREIGN KEY (code) REFERENCES farebox.promo_codes(code);

ALTER TABLE ONLY farebox.promo_refusals
    ADD CONSTRAINT promo_refusals_account_id_fkey FOREIGN KEY (account_id) REFERENCES farebox.accounts(id);

ALTER TABLE ONLY farebox.refund_requests
    ADD CONSTRAINT refund_requests_order_id_fkey FOREIGN KEY (order_id) REFERENCES farebox.orders(id);

ALTER TABLE ONLY farebox.spend_limits
    ADD CONSTRAINT spend_limits_family_fkey FOREIGN KEY (family) REFERENCES farebox.api_keys(id);

ALTER TABLE ONLY farebox.stripe_customers
    ADD CONSTRAINT stripe_customers_account_id_fkey FOREIGN KEY (account_id) REFERENCES farebox.accounts(id);

ALTER TABLE ONLY farebox.stripe_refunds
    ADD CONSTRAINT stripe_refunds_order_id_fkey FOREIGN KEY (order_id) REFERENCES farebox.orders(id);

ALTER TABLE farebox.accounts ENABLE ROW LEVEL SECURITY;

CREATE POLICY all_accounts ON farebox.accounts FOR SELECT TO farebox_control USING (true);

CREATE POLICY all_auto_topups ON farebox.auto_topups FOR SELECT TO farebox_control USING (true);

CREATE POLICY all_holds ON farebox.holds FOR SELECT TO farebox_control USING (true);

CREATE POLICY all_lots ON farebox.lots FOR SELECT TO farebox_control USING (true);

CREATE POLICY all_orders ON farebox.orders FOR SELECT TO farebox_control USING (true);

CREATE POLICY all_transfers ON farebox.transfers FOR SELECT TO farebox_control USING (true);

ALTER TABLE farebox.auto_topups ENABLE ROW LEVEL SECURITY;

ALTER TABLE farebox.holds ENABLE ROW LEVEL SECURITY;

ALTER TABLE farebox.lots ENABLE ROW LEVEL SECURITY;

ALTER TABLE farebox.orders ENABLE ROW LEVEL SECURITY;

CREATE POLICY own_account ON farebox.accounts FOR SELECT TO farebox_reader USING ((id = ( SELECT (NULLIF(current_setting('farebox.account'::text, true), ''::text))::uuid AS "nullif")));

CREATE POLICY own_auto_topup ON farebox.auto_topups FOR SELECT TO farebox_reader USING ((account_id = ( SELECT (NULLIF(current_setting('farebox.account'::text, true), ''::text))::uuid AS "nullif")));

CREATE POLICY own_holds ON farebox.holds FOR SELECT TO farebox_reader USING ((account_id = ( SELECT (NULLIF(current_setting('farebox.account'::text, true), ''::text))::uuid AS "nullif")));

CREATE POLICY own_lots ON farebox.lots FOR SELECT TO farebox_reader USING ((account_id = ( SELECT (NULLIF(current_setting('farebox.account'::text, true), ''::text))::uuid AS "nullif")));

CREATE POLICY own_orders ON farebox.orders FOR SELECT TO farebox_reader USING ((account_id = ( SELECT (NULLIF(current_setting('farebox.account'::text, true), ''::text))::uuid AS "nullif")));

CREATE POLICY own_transfers ON farebox.transfers FOR SELECT TO farebox_reader USING ((account_id = ( SELECT (NULLIF(current_setting('farebox.account'::text, true), ''::text))::uuid AS "nullif")));

ALTER TABLE farebox.transfers ENABLE ROW LEVEL SECURITY;

GRANT USAGE ON SCHEMA farebox TO farebox_gateway;
GRANT USAGE ON SCHEMA farebox TO farebox_control;
GRANT USAGE ON SCHEMA farebox TO farebox_reader;

REVOKE ALL ON FUNCTION farebox.a_lost_hold() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.a_move(_purse farebox.purse, _hold_id uuid, _reference text, _actor text, _reason text) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.a_stray_charge() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.a_stray_draw() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.a_stray_seal() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.a_stray_transfer() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.account_frozen(_account_id uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.account_frozen(_account_id uuid) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.advance_order(_id uuid, _state text, _payment_intent text, _problem text) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.advance_order(_id uuid, _state text, _payment_intent text, _problem text) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.apply_dispute(_dispute_id text, _payment_intent text, _amount bigint, _currency text, _status text, _withdrawn boolean, _asked bigint, OUT outcome text, OUT order_id uuid, OUT account_id uuid, OUT moved bigint, OUT froze boolean) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.apply_dispute(_dispute_id text, _payment_intent text, _amount bigint, _currency text, _status text, _withdrawn boolean, _asked bigint, OUT outcome text, OUT order_id uuid, OUT account_id uuid, OUT moved bigint, OUT froze boolean) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.apply_refund(_refund_id text, _payment_intent text, _amount bigint, _currency text, _status text, _request_id uuid, _problem text, OUT outcome text, OUT order_id uuid, OUT account_id uuid, OUT moved bigint) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.apply_refund(_refund_id text, _payment_intent text, _amount bigint, _currency text, _status text, _request_id uuid, _problem text, OUT outcome text, OUT order_id uuid, OUT account_id uuid, OUT moved bigint) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.ask_dispute() FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.ask_dispute() TO farebox_control;

REVOKE ALL ON FUNCTION farebox.audit() FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.audit() TO farebox_control;

REVOKE ALL ON FUNCTION farebox.audit_accounts_since(_steps farebox.audit_step[], _bad uuid[]) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_book() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_ended_holds(_named uuid[], _since timestamp with time zone, _rows integer) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_guards() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_holds() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_leases() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_limits() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_lots() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_lots_since(_steps farebox.audit_step[]) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_orders() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_orders_since(_steps farebox.audit_step[]) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_overruns() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_price_versions() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_price_versions_since(_since timestamp with time zone) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_refund_requests() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_since_last(_rows integer) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.audit_since_last(_rows integer) TO farebox_control;

GRANT SELECT ON TABLE farebox.transfers TO farebox_control;
GRANT SELECT ON TABLE farebox.transfers TO farebox_reader;

REVOKE ALL ON FUNCTION farebox.audit_step_rows(_steps farebox.audit_step[]) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_steps(_rows integer) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_stretch(_account_id uuid, _first bigint, _seals integer) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_takings() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_visibility() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.auto_order_ended() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.auto_spent(_account_id uuid, _currency text, _livemode boolean) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.auto_topup_pause(_problem text, _failures integer) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.bar_claim(_claim farebox.idempotency_keys) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.batch(_reserves integer, _finalizes integer, _hold_ids uuid[], _account_ids uuid[], _key_ids text[], _amounts bigint[], _notes text[], _fingerprints bytea[], _terms integer[], _key_versions integer[], _at_leasts bigint[], _usages bigint[], _worker_ids uuid[], _price_versions text[], _models text[], _variants text[], _usage_sources text[], _capped text[], _endings text[], _wait_ms integer) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.batch(_reserves integer, _finalizes integer, _hold_ids uuid[], _account_ids uuid[], _key_ids text[], _amounts bigint[], _notes text[], _fingerprints bytea[], _terms integer[], _key_versions integer[], _at_leasts bigint[], _usages bigint[], _worker_ids uuid[], _price_versions text[], _models text[], _variants text[], _usage_sources text[], _capped text[], _endings text[], _wait_ms integer) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.block_auto_topup(_account_id uuid, _problem text, _until timestamp with time zone) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.book_state(OUT transfers bigint, OUT unsealed bigint, OUT unaudited bigint, OUT clean_at timestamp with time zone) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.book_state(OUT transfers bigint, OUT unsealed bigint, OUT unaudited bigint, OUT clean_at timestamp with time zone) TO farebox_control;

GRANT SELECT ON TABLE farebox.lots TO farebox_control;
GRANT SELECT ON TABLE farebox.lots TO farebox_reader;

REVOKE ALL ON FUNCTION farebox.came_so(_lot farebox.lots, _transfer farebox.transfers) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.charge_at(_rates bigint[], _per_request bigint, _usage bigint[]) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.charge_for(_version text, _model text, _variant text, _usage bigint[]) FROM PUBLIC;

GRANT SELECT ON TABLE farebox.orders TO farebox_control;
GRANT SELECT ON TABLE farebox.orders TO farebox_reader;

REVOKE ALL ON FUNCTION farebox.claim_auto_orders(_livemode boolean, _after interval, _rows integer) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.claim_auto_orders(_livemode boolean, _after interval, _rows integer) TO farebox_control;

GRANT SELECT ON TABLE farebox.stripe_events TO farebox_control;

REVOKE ALL ON FUNCTION farebox.claim_event(_livemode boolean, _pause interval, _without text[]) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.claim_event(_livemode boolean, _pause interval, _without text[]) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.claim_key(_account_id uuid, _key_hash bytea, _fingerprint bytea, _hold_id uuid, _worker_id uuid, OUT outcome text, OUT hold_id uuid, OUT head text, OUT body bytea) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.claim_key(_account_id uuid, _key_hash bytea, _fingerprint bytea, _hold_id uuid, _worker_id uuid, OUT outcome text, OUT hold_id uuid, OUT head text, OUT body bytea) TO farebox_gateway;

GRANT SELECT ON TABLE farebox.outbox TO farebox_control;

REVOKE ALL ON FUNCTION farebox.claim_messages(_rows integer, _lease interval) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.claim_messages(_rows integer, _lease interval) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.claim_refund_requests(_age interval, _pause interval, _limit integer) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.claim_refund_requests(_age interval, _pause interval, _limit integer) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.claim_state(_claim farebox.idempotency_keys) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.count_promo_refusal(_account_id uuid) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.count_spend(_key_id text, _held bigint, _spent bigint) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.create_account(_id uuid, _name text, _external_id text, _email text, OUT outcome text, OUT account_id uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.create_account(_id uuid, _name text, _external_id text, _email text, OUT outcome text, OUT account_id uuid) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.create_key(_id text, _account_id uuid, _name text, _secret_hmac bytea, _pepper_version integer, _scopes text[], _models text[], _profile text, _affordable_cap boolean, _spend_limit bigint, _expires_at timestamp with time zone) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.create_key(_id text, _account_id uuid, _name text, _secret_hmac bytea, _pepper_version integer, _scopes text[], _models text[], _profile text, _affordable_cap boolean, _spend_limit bigint, _expires_at timestamp with time zone) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.create_order(_id uuid, _account_id uuid, _kind text, _pack text, _credits bigint, _bonus bigint, _credits_seconds bigint, _bonus_seconds bigint, _currency text, _price bigint, _discount_max bigint, _livemode boolean, _actor text, _request_key text, _request_digest bytea, _save_payment_method boolean, _success_url text, _cancel_url text, _customer text, _payment_method text, _unfinished_max integer, OUT outcome text, OUT order_id uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.create_order(_id uuid, _account_id uuid, _kind text, _pack text, _credits bigint, _bonus bigint, _credits_seconds bigint, _bonus_seconds bigint, _currency text, _price bigint, _discount_max bigint, _livemode boolean, _actor text, _request_key text, _request_digest bytea, _save_payment_method boolean, _success_url text, _cancel_url text, _customer text, _payment_method text, _unfinished_max integer, OUT outcome text, OUT order_id uuid) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.create_promo(_code text, _credits bigint, _credits_seconds bigint, _starts_at timestamp with time zone, _ends_at timestamp with time zone, _redemptions_max bigint, _actor text) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.create_promo(_code text, _credits bigint, _credits_seconds bigint, _starts_at timestamp with time zone, _ends_at timestamp with time zone, _redemptions_max bigint, _actor text) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.credited(_account_id uuid, _kind text, _amount bigint, _reference text, _actor text, _reason text, _lot_kind text, _expires_at timestamp with time zone, _priority integer, _order_id uuid, OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.credited_so(_order farebox.orders, _kind text, _amount bigint, _reference text, _bonus_kind text, _bonus_amount bigint, _bonus_reference text) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.credits_text(_microcredits bigint) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.dispute_freezes(_status text) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.dispute_reference(_dispute_id text, _n integer) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.draw_accounts(_account_ids uuid[], _rows integer) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.draw_accounts(_account_ids uuid[], _rows integer) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.draw_lots(_account_id uuid, _upto bigint, _rows integer) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.draw_lots(_account_id uuid, _upto bigint, _rows integer) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.draw_moves(_account_id uuid, _after bigint, _upto bigint, _lot_version bigint, _references text[]) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.draw_stretch(_account_id uuid, _after bigint, _upto bigint, _lot_version bigint, _netted bigint) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.end_promo(_code text) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.end_promo(_code text) TO farebox_control;

GRANT SELECT ON TABLE farebox.refund_requests TO farebox_control;

REVOKE ALL ON FUNCTION farebox.end_refund_request(_request farebox.refund_requests, _state text, _refund_id text, _problem text) FROM PUBLIC;

GRANT SELECT ON TABLE farebox.holds TO farebox_control;
GRANT SELECT ON TABLE farebox.holds TO farebox_reader;

REVOKE ALL ON FUNCTION farebox.ended_so(_hold farebox.holds) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.event_pause(_attempts integer) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.expire_holds(_limit integer, _restart_grace interval) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.expire_holds(_limit integer, _restart_grace interval) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.expire_lots(_account_id uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.expire_lots(_account_id uuid) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.expired_accounts(_after uuid, _limit integer) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.expired_accounts(_after uuid, _limit integer) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.extend(_hold_id uuid, _account_id uuid, _worker_id uuid, _by bigint, _at_least bigint, OUT granted bigint, OUT total bigint, OUT state text) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.extend(_hold_id uuid, _account_id uuid, _worker_id uuid, _by bigint, _at_least bigint, OUT granted bigint, OUT total bigint, OUT state text) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.extend_holds(_hold_ids uuid[], _account_ids uuid[], _worker_ids uuid[], _totals bigint[], _at_leasts bigint[], _wait_ms integer) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.extend_holds(_hold_ids uuid[], _account_ids uuid[], _worker_ids uuid[], _totals bigint[], _at_leasts bigint[], _wait_ms integer) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.fail_event(_id text, _error text) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.fail_event(_id text, _error text) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.find_key(_key_id text) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.find_key(_key_id text) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.finish_event(_id text, _outcome text) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.finish_event(_id text, _outcome text) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.forget_events(_limit integer, _keep interval) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.forget_events(_limit integer, _keep interval) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.forget_keys(_limit integer, _keep interval) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.forget_keys(_limit integer, _keep interval) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.forget_messages(_age interval, _stale interval) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.forget_messages(_age interval, _stale interval) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.free_hold(_request farebox.refund_requests) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.free_key(_account_id uuid, _key_hash bytea, _hold_id uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.free_key(_account_id uuid, _key_hash bytea, _hold_id uuid) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.freeze_account(_account_id uuid, _reference text, _reason text, _actor text) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.freeze_account(_account_id uuid, _reference text, _reason text, _actor text) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.freeze_for_dispute(_account_id uuid, _dispute_id text, _status text, _payment_intent text) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.frozen(_account_id uuid, _reference text, _reason text, _actor text) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.give_back(_account_id uuid, _kind text, _amount bigint, _reference text, _actor text, _reason text, _lot_version bigint, _references text[], OUT outcome text, OUT transfer_version bigint) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.gone_back(_order_id uuid) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.grant_credits(_account_id uuid, _kind text, _amount bigint, _reference text, _actor text, _reason text, OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.grant_credits(_account_id uuid, _kind text, _amount bigint, _reference text, _actor text, _reason text, OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.grant_lot(_account_id uuid, _kind text, _amount bigint, _reference text, _actor text, _reason text, _expires_at timestamp with time zone, _priority integer, OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.grant_lot(_account_id uuid, _kind text, _amount bigint, _reference text, _actor text, _reason text, _expires_at timestamp with time zone, _priority integer, OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.greater_usage(_a bigint[], _b bigint[]) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.heartbeat(_worker_id uuid, _hold_ids uuid[], _usages bigint[]) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.heartbeat(_worker_id uuid, _hold_ids uuid[], _usages bigint[]) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.held_for_refund(_id uuid, _sold farebox.orders, _purse farebox.purse, _amount bigint, _actor text, _reason text) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.hold_again(_request farebox.refund_requests) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.hold_bytes(_row farebox.holds) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.hold_digest(_row farebox.holds) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.judged_draws() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.judged_holds() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.judged_lots() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.judged_marks(_accounts uuid[]) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.judged_orders_since(_steps farebox.audit_step[]) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.keep_answer(_hold_id uuid, _head text, _body bytea, _keep interval) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.keep_answer(_hold_id uuid, _head text, _body bytea, _keep interval) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.known_key(_id text, _account_id uuid, _secret_hmac bytea, _rotated_from text) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.laid_aside(_order_id uuid) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.lease_length() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.ledger_id() FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.ledger_id() TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.link_auto_topup(_account_id uuid, _failed_order uuid, _link_order uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.link_auto_topup(_account_id uuid, _failed_order uuid, _link_order uuid) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.lock_accounts(_account_ids uuid[], _wait_ms integer) FROM PUBLIC;

GRANT SELECT ON TABLE farebox.api_keys TO farebox_control;

REVOKE ALL ON FUNCTION farebox.lock_key(_id text) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.lock_lapsed(_worker_ids uuid[], _at timestamp with time zone) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.lock_lots(_account_id uuid) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.lock_reference(_kind text, _reference text) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.message_delivered(_id uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.message_delivered(_id uuid) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.message_failed(_id uuid, _attempt integer, _error text, _again interval) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.message_failed(_id uuid, _attempt integer, _error text, _again interval) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.moved(INOUT purse farebox.purse, _kind text, _due bigint, _freed bigint) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.named_rightly(_row farebox.transfers) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.note_reconciliation(_window text, _started_at timestamp with time zone, _compared bigint, _mended bigint, _differing bigint) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.note_reconciliation(_window text, _started_at timestamp with time zone, _compared bigint, _mended bigint, _differing bigint) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.open_auto_topup(_id uuid, _account_id uuid, _livemode boolean, _offered boolean, _credits bigint, _bonus bigint, _credits_seconds bigint, _bonus_seconds bigint, _currency text, _price bigint, _day_max integer) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.open_auto_topup(_id uuid, _account_id uuid, _livemode boolean, _offered boolean, _credits bigint, _bonus bigint, _credits_seconds bigint, _bonus_seconds bigint, _currency text, _price bigint, _day_max integer) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.open_order(_id uuid, _session_id text, _url text, _customer text) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.open_order(_id uuid, _session_id text, _url text, _customer text) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.open_purse(_account_id uuid) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.open_refund_request(_id uuid, _order_id uuid, _amount bigint, _owing boolean, _step integer, _actor text, _reason text, OUT outcome text, OUT request_id uuid, OUT amount bigint) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.open_refund_request(_id uuid, _order_id uuid, _amount bigint, _owing boolean, _step integer, _actor text, _reason text, OUT outcome text, OUT request_id uuid, OUT amount bigint) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.order_mismatch(_sold farebox.orders, _account_id uuid, _payment_intent text, _session_id text, _customer text, _livemode boolean, _currency text, _subtotal bigint, _discount bigint, _tax bigint, _total bigint, _received bigint) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.order_rank(_state text) FROM PUBLIC;

GRANT SELECT ON TABLE farebox.quarantine TO farebox_control;

REVOKE ALL ON FUNCTION farebox.ordered_anew(_sold farebox.orders, _held farebox.quarantine, _new_id uuid) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.pay_order(_order_id uuid, _account_id uuid, _payment text, _payment_intent text, _session_id text, _customer text, _payment_method text, _livemode boolean, _currency text, _subtotal bigint, _discount bigint, _tax bigint, _total bigint, _received bigint, _problem text, OUT outcome text, OUT reason text, OUT fresh boolean) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.pay_order(_order_id uuid, _account_id uuid, _payment text, _payment_intent text, _session_id text, _customer text, _payment_method text, _livemode boolean, _currency text, _subtotal bigint, _discount bigint, _tax bigint, _total bigint, _received bigint, _problem text, OUT outcome text, OUT reason text, OUT fresh boolean) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.pay_plan(_order_id uuid, _account_id uuid, _invoice text, _payment_intent text, _customer text, _pack text, _credits bigint, _expires_at timestamp with time zone, _currency text, _price bigint, _livemode boolean, _subtotal bigint, _discount bigint, _tax bigint, _received bigint, _problem text, OUT outcome text, OUT reason text, OUT order_id uuid, OUT fresh boolean) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.pay_plan(_order_id uuid, _account_id uuid, _invoice text, _payment_intent text, _customer text, _pack text, _credits bigint, _expires_at timestamp with time zone, _currency text, _price bigint, _livemode boolean, _subtotal bigint, _discount bigint, _tax bigint, _received bigint, _problem text, OUT outcome text, OUT reason text, OUT order_id uuid, OUT fresh boolean) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.postgres_started() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.price_rows(_body text) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.priced_so(_hold farebox.holds, _rates bigint[], _per_request bigint) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.priority_of(_lot_kind text) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.promo_wait(_account_id uuid) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.put_customer(_account_id uuid, _livemode boolean, _customer text, _instead_of text) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.put_customer(_account_id uuid, _livemode boolean, _customer text, _instead_of text) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.put_price_version(_version text, _body text) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.put_price_version(_version text, _body text) TO farebox_gateway;
GRANT ALL ON FUNCTION farebox.put_price_version(_version text, _body text) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.redeem_promo(_account_id uuid, _code text, _actor text, OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint, OUT retry_at timestamp with time zone) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.redeem_promo(_account_id uuid, _code text, _actor text, OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint, OUT retry_at timestamp with time zone) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.refund_needs(_sold farebox.orders, _amount bigint, _available bigint, OUT credits bigint, OUT bonus bigint) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.refund_rank(_status text) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.refuse_change() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.release_refund_request(_id uuid, _problem text) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.release_refund_request(_id uuid, _problem text) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.renew(_worker_id uuid, _beat bigint, _hold_ids uuid[], _usages bigint[]) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.renew(_worker_id uuid, _beat bigint, _hold_ids uuid[], _usages bigint[]) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.renew_lease(_worker_id uuid) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.resend_messages(_id uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.resend_messages(_id uuid) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.reserve_lot(_account_id uuid, _lot_version bigint, _amount bigint) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.resolve_quarantine(_payment text, _resolution text, _actor text, _new_id uuid, OUT outcome text, OUT order_id uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.resolve_quarantine(_payment text, _resolution text, _actor text, _new_id uuid, OUT outcome text, OUT order_id uuid) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.reverse(_hold_id uuid, _amount bigint, _reference text, _actor text, _reason text, OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.reverse(_hold_id uuid, _amount bigint, _reference text, _actor text, _reason text, OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.revoke_key(_id text) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.revoke_key(_id text) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.rotate_key(_id text, _new_id text, _secret_hmac bytea, _pepper_version integer, _overlap interval) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.rotate_key(_id text, _new_id text, _secret_hmac bytea, _pepper_version integer, _overlap interval) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.schema_version(OUT number integer, OUT serves_from integer) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.schema_version(OUT number integer, OUT serves_from integer) TO farebox_gateway;
GRANT ALL ON FUNCTION farebox.schema_version(OUT number integer, OUT serves_from integer) TO farebox_control;
GRANT ALL ON FUNCTION farebox.schema_version(OUT number integer, OUT serves_from integer) TO farebox_reader;

REVOKE ALL ON FUNCTION farebox.seal(_rows integer, _pause interval) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.seal(_rows integer, _pause interval) TO farebox_control;

GRANT SELECT ON TABLE farebox.seals TO farebox_control;

REVOKE ALL ON FUNCTION farebox.seal_head(_before bytea, _seal farebox.seals) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.set_auto_topup(_account_id uuid, _enabled boolean, _threshold bigint, _pack text, _credits bigint, _currency text, _price bigint, _monthly_max bigint, _livemode boolean, _actor text) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.set_auto_topup(_account_id uuid, _enabled boolean, _threshold bigint, _pack text, _credits bigint, _currency text, _price bigint, _monthly_max bigint, _livemode boolean, _actor text) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.set_low_balance(_account_id uuid, _low_balance bigint) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.set_low_balance(_account_id uuid, _low_balance bigint) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.set_spend_limit(_key_id text, _spend_limit bigint) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.settle_order(_order_id uuid, _kind text, _payment text, _payment_intent text, _session_id text, _customer text, _payment_method text, _subtotal bigint, _discount bigint, _tax bigint, _received bigint, _expires_at timestamp with time zone) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.settle_takings(_order_id uuid, _kind text, _reference text, _more boolean, _reason text, _freed bigint, _freed_bonus bigint, OUT moved bigint) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.settled(INOUT purse farebox.purse, _state text, _amount bigint, _charged bigint, _key_id text, _charge bigint) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.share_of(_credits bigint, _money bigint, _received bigint) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.spend_left(_key_id text) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.start_worker(_worker_id uuid, _hostname text, _release text) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.start_worker(_worker_id uuid, _hostname text, _release text) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.stop_auto_topup(_account_id uuid, _actor text) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.stop_auto_topup(_account_id uuid, _actor text) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.stop_worker(_worker_id uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.stop_worker(_worker_id uuid) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.sweep(_limit integer, _restart_grace interval, _not_after timestamp with time zone) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.sweep(_limit integer, _restart_grace interval, _not_after timestamp with time zone) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.system_side(_kind text) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.take(_account_id uuid, _kind text, _amount bigint, _reference text, _actor text, _reason text, _lot_version bigint, _at_most_lot boolean, _freed bigint, OUT outcome text, OUT transfer_version bigint, OUT taken bigint, OUT lent bigint) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.take_event(_id text, _type text, _livemode boolean, _object_id text, _created timestamp with time zone, _outcome text) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.take_event(_id text, _type text, _livemode boolean, _object_id text, _created timestamp with time zone, _outcome text) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.taking_references(_order_id uuid, _suffix text) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.tell(_type text, _account_id uuid, _reference text, _data jsonb) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.tell_alerts(_low_balance bigint, _rows integer) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.tell_alerts(_low_balance bigint, _rows integer) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.thawed(_account_id uuid, _reference text, _actor text) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.time_text(_at timestamp with time zone) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.transfer_bytes(_row farebox.transfers) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.transfers_digest(_account_id uuid, _after bigint, _upto bigint, OUT digest bytea, OUT rows bigint) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.unfreeze_account(_account_id uuid, _reference text, _actor text) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.unfreeze_account(_account_id uuid, _reference text, _actor text) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.unreserve_lot(_account_id uuid, _lot_version bigint, _amount bigint) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.unwind(_account_id uuid, _version bigint, _lot_version bigint, _references text[]) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.unwindable(_account_id uuid, _versions bigint[], _lot_version bigint, OUT lots bigint[], OUT amounts bigint[]) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.update_key(_id text, _version integer, _name text, _scopes text[], _models text[], _profile text, _affordable_cap boolean, _spend_limit bigint, _expires_at timestamp with time zone) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.update_key(_id text, _version integer, _name text, _scopes text[], _models text[], _profile text, _affordable_cap boolean, _spend_limit bigint, _expires_at timestamp with time zone) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.write_down(_purses farebox.purse[], _moves farebox.move[], _new_holds farebox.holds[], _changed_holds farebox.holds[], _at timestamp with time zone) FROM PUBLIC;

GRANT SELECT ON TABLE farebox.accounts TO farebox_control;
GRANT SELECT ON TABLE farebox.accounts TO farebox_reader;

GRANT SELECT ON TABLE farebox.alerts TO farebox_control;

GRANT SELECT ON TABLE farebox.auto_topups TO farebox_control;
GRANT SELECT ON TABLE farebox.auto_topups TO farebox_reader;

GRANT SELECT ON TABLE farebox.disputes TO farebox_control;

GRANT SELECT ON TABLE farebox.draws TO farebox_control;

GRANT SELECT ON TABLE farebox.freezes TO farebox_control;

GRANT SELECT ON TABLE farebox.lot_marks TO farebox_control;

GRANT SELECT ON TABLE farebox.price_versions TO farebox_control;

GRANT SELECT ON TABLE farebox.prices TO farebox_control;
GRANT SELECT ON TABLE farebox.prices TO farebox_reader;

GRANT SELECT ON TABLE farebox.promo_codes TO farebox_control;

GRANT SELECT ON TABLE farebox.promo_redemptions TO farebox_control;

GRANT SELECT ON TABLE farebox.reconciliations TO farebox_control;

GRANT SELECT ON TABLE farebox.schema_migrations TO farebox_control;

GRANT SELECT ON TABLE farebox.spend_limits TO farebox_control;

GRANT SELECT ON TABLE farebox.stripe_customers TO farebox_control;

GRANT SELECT ON TABLE farebox.stripe_refunds TO farebox_control;

GRANT SELECT ON TABLE farebox.workers TO farebox_control;
