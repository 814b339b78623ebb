-- The audit, third edition: that of lots beside the others.

-- An overrun without a hold is a refund's or a dispute's: audit_overruns looks at those.
CREATE OR REPLACE FUNCTION farebox.a_stray_charge() RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT min(t.account_id || '-' || t.version)
      FROM farebox.transfers t LEFT JOIN farebox.holds h ON h.id = t.hold_id AND h.account_id = t.account_id
     WHERE t.kind IN ('charge', 'true_up', 'overrun', 'reversal') AND h.id IS NULL
       AND (t.kind <> 'overrun' OR t.hold_id IS NOT NULL)
$$;

CREATE OR REPLACE FUNCTION farebox.audit_holds() RETURNS SETOF farebox.audit_check
LANGUAGE plpgsql STABLE AS $$
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

-- What keeps the rows as they are, and keeps two of one kind from being written, is there and in force.
CREATE OR REPLACE FUNCTION farebox.audit_guards() RETURNS SETOF farebox.audit_check
LANGUAGE sql STABLE AS $$
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

-- A table that shows no row although Postgres has counted some in it.
CREATE OR REPLACE FUNCTION farebox.audit_visibility() RETURNS SETOF farebox.audit_check
LANGUAGE sql STABLE AS $$
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

CREATE OR REPLACE FUNCTION farebox.audit() RETURNS SETOF farebox.audit_check
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET row_security = off SET work_mem = '64MB'
-- As many processes as there may be, whatever the planner thinks of their cost; on small tables starting them is all of it.
SET parallel_setup_cost = 0 SET parallel_tuple_cost = 0 SET min_parallel_table_scan_size = '1MB' SET jit = off
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

-- As in 0006, but each account's by their key: where many accounts have something new, a plan of its own would go over all
-- of the book.
CREATE OR REPLACE FUNCTION farebox.audit_step_rows(_steps farebox.audit_step[])
RETURNS TABLE (step farebox.audit_step, transfer farebox.transfers)
LANGUAGE sql STABLE ROWS 5000
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
    SELECT s::farebox.audit_step, t
      FROM unnest(_steps) AS s
      JOIN farebox.transfers t ON t.account_id = s.account_id AND t.version > s.after
       -- Beyond the account's own version, too: there should be none.
       AND t.version <= CASE WHEN s.whole THEN 9223372036854775807 ELSE s.upto END
$$;

-- At most about _rows transfers and as many holds. No row: another session is at it. The caller's transaction is
-- REPEATABLE READ, so that all of it sees one moment.
CREATE OR REPLACE FUNCTION farebox.audit_since_last(_rows integer) RETURNS SETOF farebox.audit_check
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET row_security = off SET work_mem = '64MB'
SET plan_cache_mode = force_custom_plan SET jit = off AS $$
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
