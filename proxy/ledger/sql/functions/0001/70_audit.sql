-- The audit: every invariant as a set-based check that says how many rows it looked at and how many break it.
--
-- It runs as the owner, whom row-level security doesn't bind; should it ever (FORCE), row_security = off makes it fail
-- instead of seeing nothing and passing. The caller puts it into one REPEATABLE READ transaction.
-- A check that finds no row to look at passes: an empty ledger is a right one. But a table that shows no row although
-- Postgres has counted some in it breaks rows_are_visible.

CREATE TYPE farebox.audit_check AS (name text, checked bigint, violations bigint, example text);

CREATE FUNCTION farebox.audit_accounts() RETURNS SETOF farebox.audit_check
LANGUAGE sql STABLE AS $$
    WITH book AS (
        SELECT t.account_id, count(*) AS transfers, min(t.version) AS first, max(t.version) AS last,
               sum(CASE t.account_side WHEN 'credit' THEN t.amount ELSE -t.amount END) AS balance,
               sum(CASE t.account_side WHEN 'credit' THEN t.amount ELSE -t.amount END)
                   FILTER (WHERE t.system_account = 'receivable') AS debt
          FROM farebox.transfers t
         GROUP BY t.account_id
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
    )
    SELECT v.name, c.checked, v.violations, v.example
      FROM (
               SELECT count(*) AS checked,
                      count(*) FILTER (WHERE NOT j.balance) AS v1, min(j.id) FILTER (WHERE NOT j.balance) AS e1,
                      count(*) FILTER (WHERE NOT j.held) AS v2, min(j.id) FILTER (WHERE NOT j.held) AS e2,
                      count(*) FILTER (WHERE NOT j.debt) AS v3, min(j.id) FILTER (WHERE NOT j.debt) AS e3,
                      count(*) FILTER (WHERE NOT j.versions) AS v4, min(j.id) FILTER (WHERE NOT j.versions) AS e4,
                      count(*) FILTER (WHERE NOT j.limits) AS v5, min(j.id) FILTER (WHERE NOT j.limits) AS e5
                 FROM compared j
           ) AS c,
           LATERAL (VALUES
               ('balance_is_the_sum_of_transfers', c.v1, c.e1),
               ('held_is_the_sum_of_open_holds', c.v2, c.e2),
               ('debt_is_what_receivable_lent', c.v3, c.e3),
               ('versions_are_gapless', c.v4, c.e4),
               ('nothing_is_negative_and_debt_is_paid_first', c.v5, c.e5)
           ) AS v (name, violations, example)
$$;

CREATE FUNCTION farebox.audit_chain() RETURNS SETOF farebox.audit_check
LANGUAGE sql STABLE AS $$
    WITH signed AS (
        SELECT t.account_id, t.version, t.balance_after, t.debt_after,
               lag(t.balance_after, 1, 0) OVER w AS balance_before, lag(t.debt_after, 1, 0) OVER w AS debt_before,
               CASE t.account_side WHEN 'credit' THEN t.amount ELSE -t.amount END AS amount,
               CASE t.system_account WHEN 'receivable' THEN 1 ELSE 0 END AS lent
          FROM farebox.transfers t
        WINDOW w AS (PARTITION BY t.account_id ORDER BY t.version)
    ), broken AS (
        SELECT s.account_id || '-' || s.version AS id
          FROM signed s
         WHERE s.balance_after <> s.balance_before + s.amount OR s.debt_after <> s.debt_before + s.lent * s.amount
    )
    SELECT 'balances_chain_from_transfer_to_transfer', (SELECT count(*) FROM farebox.transfers),
           (SELECT count(*) FROM broken), (SELECT min(b.id) FROM broken b)
$$;

CREATE FUNCTION farebox.audit_charges() RETURNS SETOF farebox.audit_check
LANGUAGE sql STABLE AS $$
    WITH book AS (
        SELECT t.hold_id, t.account_id,
               coalesce(sum(CASE t.account_side WHEN 'debit' THEN t.amount ELSE -t.amount END)
                            FILTER (WHERE t.kind IN ('charge', 'true_up')), 0) AS charge,
               coalesce(sum(t.amount) FILTER (WHERE t.kind = 'overrun'), 0) AS overrun,
               coalesce(sum(t.amount) FILTER (WHERE t.kind = 'reversal'), 0) AS reversed
          FROM farebox.transfers t
         WHERE t.kind IN ('charge', 'true_up', 'overrun', 'reversal')
         GROUP BY t.hold_id, t.account_id
    ), compared AS (
        SELECT coalesce(h.id, b.hold_id)::text AS id,
               h.id IS NOT NULL
                   AND (coalesce(h.charge, 0), h.overrun, h.reversed)
                     = (coalesce(b.charge, 0), coalesce(b.overrun, 0), coalesce(b.reversed, 0)) AS kept,
               -- A provisional end may be trued up yet, and a final or released one never again.
               coalesce(CASE h.state
                   WHEN 'released' THEN h.charge = 0 AND h.settle_fingerprint IS NULL
                   WHEN 'provisional' THEN h.ending = 'worker_gone' AND h.settle_fingerprint IS NULL
                   WHEN 'final' THEN h.settle_fingerprint IS NOT NULL OR h.charge = 0
                   ELSE true
               END, false) AS ended_so
          FROM farebox.holds h
          FULL JOIN book b ON b.hold_id = h.id AND b.account_id = h.account_id
    )
    SELECT v.name, c.checked, v.violations, v.example
      FROM (
               SELECT count(*) AS checked,
                      count(*) FILTER (WHERE NOT j.kept) AS v1, min(j.id) FILTER (WHERE NOT j.kept) AS e1,
                      count(*) FILTER (WHERE NOT j.ended_so) AS v2, min(j.id) FILTER (WHERE NOT j.ended_so) AS e2
                 FROM compared j
           ) AS c,
           LATERAL (VALUES
               ('every_hold_was_charged_what_its_transfers_say', c.v1, c.e1),
               ('every_hold_ended_as_its_state_says', c.v2, c.e2)
           ) AS v (name, violations, example)
$$;

-- What a transfer is called, and between whom it moves credits, belong together.
CREATE FUNCTION farebox.audit_kinds() RETURNS SETOF farebox.audit_check
LANGUAGE sql STABLE AS $$
    WITH judged AS (
        SELECT t.account_id || '-' || t.version AS id,
               CASE t.kind
                   WHEN 'grant' THEN (t.account_side, t.system_account) = ('credit', 'grants') AND t.hold_id IS NULL
                   WHEN 'charge' THEN (t.account_side, t.system_account) = ('debit', 'revenue')
                   WHEN 'true_up' THEN t.system_account = 'revenue'
                   WHEN 'reversal' THEN (t.account_side, t.system_account) = ('credit', 'revenue')
                   WHEN 'overrun' THEN (t.account_side, t.system_account) = ('credit', 'receivable')
                   WHEN 'debt_payment' THEN (t.account_side, t.system_account) = ('debit', 'receivable')
                   ELSE false
               END AS kept
          FROM farebox.transfers t
    )
    SELECT 'transfers_move_between_the_sides_of_their_kind', count(*), count(*) FILTER (WHERE NOT j.kept),
           min(j.id) FILTER (WHERE NOT j.kept)
      FROM judged j
$$;

-- A charge is what its usage costs at its price, to the microcredit. One that was capped says why, and is less; one
-- without usage is nothing. What we counted ourselves never exceeds a hold that was seen.
CREATE FUNCTION farebox.audit_prices() RETURNS SETOF farebox.audit_check
LANGUAGE sql STABLE AS $$
    WITH costs AS (
        SELECT h.id::text AS id, h.charge,
               -- Ours says to what; the gateway's own reasons don't.
               CASE h.capped WHEN 'counted_above_hold' THEN h.charge >= h.amount ELSE h.capped IS NOT NULL END
                   AS capped,
               CASE WHEN h.usage IS NULL THEN 0 ELSE farebox.charge_at(p.rates, p.per_request, h.usage) END AS cost,
               h.usage_source IS DISTINCT FROM 'counted' OR h.fingerprint IS NULL OR h.charge <= h.amount AS within_hold
          FROM farebox.holds h
          LEFT JOIN farebox.prices p ON p.version = h.price_version AND p.model = h.model AND p.variant = h.variant
         WHERE h.state <> 'open'
    ), judged AS (
        SELECT c.id, c.within_hold,
               coalesce(c.charge = c.cost OR (c.capped AND c.charge < c.cost), false) AS kept
          FROM costs c
    )
    SELECT v.name, c.checked, v.violations, v.example
      FROM (
               SELECT count(*) AS checked,
                      count(*) FILTER (WHERE NOT j.kept) AS v1, min(j.id) FILTER (WHERE NOT j.kept) AS e1,
                      count(*) FILTER (WHERE NOT j.within_hold) AS v2, min(j.id) FILTER (WHERE NOT j.within_hold) AS e2
                 FROM judged j
           ) AS c,
           LATERAL (VALUES
               ('charges_recompute_from_usage_and_price', c.v1, c.e1),
               ('counted_charges_stay_within_their_hold', c.v2, c.e2)
           ) AS v (name, violations, example)
$$;

CREATE FUNCTION farebox.audit_price_versions() RETURNS SETOF farebox.audit_check
LANGUAGE sql STABLE AS $$
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

-- An open hold belongs to a worker that lives, or to one that a live one is about to settle.
CREATE FUNCTION farebox.audit_leases() RETURNS SETOF farebox.audit_check
LANGUAGE sql STABLE AS $$
    WITH judged AS (
        SELECT h.id::text AS id,
               w.id IS NOT NULL AND (
                   w.lease_until > statement_timestamp() - interval '5 minutes'
                   -- Nobody sweeps while no worker runs, nor in the first moments of one.
                   OR NOT EXISTS (
                       SELECT FROM farebox.workers live
                        WHERE live.lease_until > statement_timestamp()
                          AND live.started_at < statement_timestamp() - interval '5 minutes'
                   )
               ) AS kept
          FROM farebox.holds h LEFT JOIN farebox.workers w ON w.id = h.worker_id
         WHERE h.state = 'open'
    )
    SELECT 'open_holds_belong_to_a_live_worker', count(*), count(*) FILTER (WHERE NOT j.kept),
           min(j.id) FILTER (WHERE NOT j.kept)
      FROM judged j
$$;

CREATE FUNCTION farebox.audit_limits() RETURNS SETOF farebox.audit_check
LANGUAGE sql STABLE AS $$
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

CREATE FUNCTION farebox.audit_visibility() RETURNS SETOF farebox.audit_check
LANGUAGE sql STABLE AS $$
    WITH counted (relation, rows) AS (
        SELECT 'accounts', count(*) FROM farebox.accounts
        UNION ALL SELECT 'api_keys', count(*) FROM farebox.api_keys
        UNION ALL SELECT 'holds', count(*) FROM farebox.holds
        UNION ALL SELECT 'price_versions', count(*) FROM farebox.price_versions
        UNION ALL SELECT 'transfers', count(*) FROM farebox.transfers
        UNION ALL SELECT 'workers', count(*) FROM farebox.workers
    ), judged AS (
        SELECT c.*, c.rows = 0 AND pg_stat_get_live_tuples(('farebox.' || c.relation)::regclass) > 0 AS hidden
          FROM counted c
    )
    SELECT 'rows_are_visible', sum(j.rows)::bigint, count(*) FILTER (WHERE j.hidden),
           min(j.relation) FILTER (WHERE j.hidden)
      FROM judged j
$$;

CREATE FUNCTION farebox.audit() RETURNS SETOF farebox.audit_check
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET row_security = off SET work_mem = '64MB'
AS $$
BEGIN
    RETURN QUERY SELECT * FROM farebox.audit_visibility();
    RETURN QUERY SELECT * FROM farebox.audit_accounts();
    RETURN QUERY SELECT * FROM farebox.audit_chain();
    RETURN QUERY SELECT * FROM farebox.audit_charges();
    RETURN QUERY SELECT * FROM farebox.audit_kinds();
    RETURN QUERY SELECT * FROM farebox.audit_prices();
    RETURN QUERY SELECT * FROM farebox.audit_price_versions();
    RETURN QUERY SELECT * FROM farebox.audit_leases();
    RETURN QUERY SELECT * FROM farebox.audit_limits();
END
$$;
