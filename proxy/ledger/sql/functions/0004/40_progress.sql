-- Leases and the progress that is stored with them.

-- Registers a process. False where the id is known already and has stopped.
CREATE OR REPLACE FUNCTION farebox.start_worker(_worker_id uuid, _hostname text, _release text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO farebox.workers AS w (id, hostname, release, lease_until)
    VALUES (_worker_id, _hostname, _release, clock_timestamp() + farebox.lease_length())
    ON CONFLICT (id) DO NOTHING;
    RETURN FOUND OR farebox.renew_lease(_worker_id);
END
$$;

-- Renews the lease and locks the worker's row. False: unknown or stopped.
CREATE FUNCTION farebox.renew_lease(_worker_id uuid) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE farebox.workers AS w
       SET lease_until = clock_timestamp() + farebox.lease_length(),
           held_since = CASE WHEN w.lease_until > clock_timestamp() THEN w.held_since ELSE clock_timestamp() END
     WHERE w.id = _worker_id AND w.stopped_at IS NULL;
    RETURN FOUND;
END
$$;

-- Renews the lease and stores progress: absolute totals, seven numbers in _usages for each hold, which take the place of
-- what an earlier beat said. Returns the holds that took it, NULL where the worker is unknown or stopped. A hold that
-- somebody has locked is left for the next beat. A beat that comes after a later one changes nothing; NULL: unnumbered.
CREATE FUNCTION farebox.renew(_worker_id uuid, _beat bigint, _hold_ids uuid[], _usages bigint[]) RETURNS uuid[]
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
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

-- As releases before this one say it: totals never decrease.
CREATE OR REPLACE FUNCTION farebox.heartbeat(_worker_id uuid, _hold_ids uuid[], _usages bigint[]) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
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
