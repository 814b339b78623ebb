-- What is left of the audit, and all of it.

-- An open hold belongs to a worker that lives, or to one that a live one is about to settle. Judged at the time of the
-- snapshot: in the eyes of a long audit's end, every lease that it sees has lapsed.
CREATE OR REPLACE FUNCTION farebox.audit_leases() RETURNS SETOF farebox.audit_check
LANGUAGE sql STABLE AS $$
    WITH judged AS (
        SELECT h.id::text AS id,
               w.id IS NOT NULL AND (
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
               ) AS kept
          FROM farebox.holds h LEFT JOIN farebox.workers w ON w.id = h.worker_id
         WHERE h.state = 'open'
    )
    SELECT 'open_holds_belong_to_a_live_worker', count(*), count(*) FILTER (WHERE NOT j.kept),
           min(j.id) FILTER (WHERE NOT j.kept)
      FROM judged j
$$;

-- What keeps the rows as they are, and keeps two of one kind from being written, is there and in force.
CREATE FUNCTION farebox.audit_guards() RETURNS SETOF farebox.audit_check
LANGUAGE sql STABLE AS $$
    WITH judged AS (
        SELECT 'trigger ' || g.name || ' on ' || g.relation AS id,
               coalesce(t.tgenabled IN ('O', 'A') AND t.tgfoid = 'farebox.refuse_change'::regproc, false) AS kept
          FROM (VALUES
                   ('transfers', 'append_only'), ('seals', 'append_only'), ('price_versions', 'immutable'),
                   ('prices', 'immutable'), ('accounts', 'never_removed'), ('holds', 'never_removed'),
                   ('api_keys', 'never_removed')
               ) AS g (relation, name)
          LEFT JOIN pg_trigger t ON t.tgrelid = to_regclass('farebox.' || g.relation) AND t.tgname = g.name
        UNION ALL
        SELECT 'index ' || g.name, coalesce(i.indisunique AND i.indisvalid AND i.indimmediate, false)
          FROM (VALUES
                   ('accounts_pkey'), ('holds_pkey'), ('transfers_pkey'), ('seals_pkey'), ('prices_pkey'),
                   ('transfers_once_a_hold'), ('transfers_reference')
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
    ), hidden AS (
        SELECT j.relation, NOT j.rows AND pg_stat_get_live_tuples(('farebox.' || j.relation)::regclass) > 0 AS hidden
          FROM judged j
    )
    SELECT 'rows_are_visible', count(*), count(*) FILTER (WHERE h.hidden), min(h.relation) FILTER (WHERE h.hidden)
      FROM hidden h
$$;

CREATE OR REPLACE FUNCTION farebox.audit() RETURNS SETOF farebox.audit_check
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET row_security = off SET work_mem = '64MB'
-- As many processes as there may be, whatever the planner thinks of the cost of starting them.
SET parallel_setup_cost = 0 SET parallel_tuple_cost = 0 SET min_parallel_table_scan_size = 0 SET jit = off
AS $$
BEGIN
    RETURN QUERY SELECT * FROM farebox.audit_visibility();
    RETURN QUERY SELECT * FROM farebox.audit_guards();
    RETURN QUERY SELECT * FROM farebox.audit_book();
    RETURN QUERY SELECT * FROM farebox.audit_holds();
    RETURN QUERY SELECT * FROM farebox.audit_price_versions();
    RETURN QUERY SELECT * FROM farebox.audit_leases();
    RETURN QUERY SELECT * FROM farebox.audit_limits();
END
$$;
