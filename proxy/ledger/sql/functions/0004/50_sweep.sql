-- The sweeper: what becomes of the holds that dead workers leave.

CREATE FUNCTION farebox.postgres_started() RETURNS timestamptz
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$ SELECT pg_postmaster_start_time() $$;

-- Locks those of the workers whose lease is over, and returns them. One that somebody else has locked is renewing.
CREATE FUNCTION farebox.lock_lapsed(_worker_ids uuid[], _at timestamptz) RETURNS uuid[]
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    SELECT ARRAY(
        SELECT w.id
          FROM farebox.workers w
         WHERE w.id = ANY (_worker_ids) AND w.lease_until <= _at
         ORDER BY w.id
           FOR NO KEY UPDATE SKIP LOCKED
    )
$$;

-- Settles open holds whose worker's lease has lapsed, whatever their age, provisionally and at their last progress
-- mark; the longest dead worker's first. One sweeper at a time; at most _limit holds; what somebody has locked is left
-- for the next sweep, and keeps no other hold waiting.
--
-- A lease that looks lapsed may only show a clock that jumped, or a machine that slept. So nothing is swept
-- - while Postgres has run for less than _restart_grace (NULL: two leases): after a restart every lease is stale;
-- - after _not_after: the caller has compared this clock with its own just before, and what has come since it can't
--   have seen. Every lease is judged by the moment at which that was checked.
CREATE FUNCTION farebox.sweep(_limit integer, _restart_grace interval, _not_after timestamptz)
RETURNS TABLE (hold_id uuid, account_id uuid, charge bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
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

-- As releases before this one ask for it: they don't compare clocks.
CREATE OR REPLACE FUNCTION farebox.expire_holds(_limit integer, _restart_grace interval)
RETURNS TABLE (hold_id uuid, account_id uuid, charge bigint)
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT * FROM farebox.sweep(_limit, _restart_grace, NULL)
$$;

-- An open hold belongs to a worker that lives, or to one that a live one is about to settle.
CREATE OR REPLACE FUNCTION farebox.audit_leases() RETURNS SETOF farebox.audit_check
LANGUAGE sql STABLE AS $$
    WITH judged AS (
        SELECT h.id::text AS id,
               w.id IS NOT NULL AND (
                   w.lease_until > statement_timestamp() - interval '5 minutes'
                   -- Nobody sweeps while no worker runs, nor soon after Postgres came up or after workers were cut off
                   -- from it: one that has been there for a while should have.
                   OR farebox.postgres_started() > statement_timestamp() - interval '5 minutes'
                   OR NOT EXISTS (
                       SELECT FROM farebox.workers live
                        WHERE live.lease_until > statement_timestamp()
                          AND live.started_at < statement_timestamp() - interval '5 minutes'
                          AND live.held_since < statement_timestamp() - interval '5 minutes'
                   )
               ) AS kept
          FROM farebox.holds h LEFT JOIN farebox.workers w ON w.id = h.worker_id
         WHERE h.state = 'open'
    )
    SELECT 'open_holds_belong_to_a_live_worker', count(*), count(*) FILTER (WHERE NOT j.kept),
           min(j.id) FILTER (WHERE NOT j.kept)
      FROM judged j
$$;
