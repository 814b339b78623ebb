-- The audit of what is new since it last found nothing wrong: each account from its mark on, holds that ended since, and
-- all open holds. It costs what happened meanwhile, and a look at each account's row.
--
-- Nobody tells it from where on: marks are its own, in tables that nobody else can write, and they move only over what
-- it has itself seen to be right. What lies behind them is the full audit's, and the seals'.

-- Holds against their transfers, their state and their price: those that ended from _since on (at most _rows), and those
-- that transfers name.
CREATE FUNCTION farebox.audit_ended_holds(_named uuid[], _since timestamptz, _rows integer)
RETURNS TABLE (hold_id uuid, account_id uuid, ended_at timestamptz, in_time boolean, charged boolean, ended_so boolean, priced boolean, within boolean)
LANGUAGE sql STABLE AS $$
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

-- An account's way from its mark to where it is looked at now.
CREATE TYPE farebox.audit_step AS (
    account_id uuid,
    after bigint,
    upto bigint,
    whole boolean,
    balance bigint,
    debt bigint
);

-- The accounts that have moved since their mark, as far as _rows transfers reach, those with least to look at first.
CREATE FUNCTION farebox.audit_steps(_rows integer) RETURNS farebox.audit_step[]
LANGUAGE sql STABLE AS $$
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

-- The transfers of those steps.
CREATE FUNCTION farebox.audit_step_rows(_steps farebox.audit_step[])
RETURNS TABLE (step farebox.audit_step, transfer farebox.transfers)
LANGUAGE sql STABLE AS $$
    SELECT s::farebox.audit_step, t
      FROM unnest(_steps) AS s
      JOIN farebox.transfers t ON t.account_id = s.account_id AND t.version > s.after
       -- Beyond the account's own version, too: there should be none.
       AND t.version <= CASE WHEN s.whole THEN 9223372036854775807 ELSE s.upto END
$$;

-- At most about _rows transfers and as many holds. No row: another session is at it. The caller's transaction is
-- REPEATABLE READ, so that all of it sees one moment.
CREATE FUNCTION farebox.audit_since_last(_rows integer) RETURNS SETOF farebox.audit_check
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET row_security = off SET work_mem = '64MB'
SET plan_cache_mode = force_custom_plan SET jit = off AS $$
DECLARE
    on_its_way CONSTANT interval := interval '30 seconds';
    last farebox.auditing;
    steps farebox.audit_step[];
    named uuid[];
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
        SELECT c.* FROM farebox.audit_accounts_since(steps, ended.bad) AS c
        UNION ALL
        VALUES ('every_hold_was_charged_what_its_transfers_say', ended.checked, ended.v1, ended.e1),
               ('every_hold_ended_as_its_state_says', ended.checked, ended.v2, ended.e2),
               ('charges_recompute_from_usage_and_price', ended.checked, ended.v3, ended.e3),
               ('counted_charges_stay_within_their_hold', ended.checked, ended.v4, ended.e4)
        UNION ALL
        SELECT * FROM farebox.audit_price_versions_since(least(last.prices_to, now() - on_its_way))
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

-- Accounts against their marks and what moved since. Marks move where all is right, in the statement that saw it; those
-- of _bad accounts stay, for whose holds something is wrong.
CREATE FUNCTION farebox.audit_accounts_since(_steps farebox.audit_step[], _bad uuid[])
RETURNS SETOF farebox.audit_check
LANGUAGE plpgsql SET plan_cache_mode = force_custom_plan AS $$
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

-- Price versions are immutable: each is looked at once.
CREATE FUNCTION farebox.audit_price_versions_since(_since timestamptz) RETURNS SETOF farebox.audit_check
LANGUAGE sql STABLE AS $$
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

-- How far behind the writers the seals and the audit are. unsealed, unaudited: transfers; clean_at: when the audit of
-- what is new last found nothing wrong (NULL: never yet).
CREATE FUNCTION farebox.book_state(
    OUT transfers bigint, OUT unsealed bigint, OUT unaudited bigint, OUT clean_at timestamptz
)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(sum(a.version), 0), coalesce(sum(a.version - coalesce(s.last_version, 0)), 0),
           coalesce(sum(a.version - coalesce(m.version, 0)), 0), (SELECT g.clean_at FROM farebox.auditing g)
      FROM farebox.accounts a
      LEFT JOIN farebox.audit_marks m ON m.account_id = a.id
      LEFT JOIN LATERAL (
          SELECT s.last_version FROM farebox.seals s WHERE s.account_id = a.id ORDER BY s.number DESC LIMIT 1
      ) AS s ON true
$$;
