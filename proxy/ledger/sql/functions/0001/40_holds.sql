-- What a gateway calls beside the batch: extending a hold, its worker's lease, the sweeper, a key by its id.

-- A worker whose lease has lapsed may not admit, and its open holds may be settled by expire_holds.
CREATE FUNCTION farebox.lease_length() RETURNS interval LANGUAGE sql IMMUTABLE AS $$ SELECT interval '30 seconds' $$;

-- Adds _by, or as much as is available down to _at_least. granted 0: refused; total: what the hold holds now.
CREATE FUNCTION farebox.extend(
    _hold_id uuid,
    _account_id uuid,
    _worker_id uuid,
    _by bigint,
    _at_least bigint,
    OUT granted bigint,
    OUT total bigint,
    OUT state text
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
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

-- Registers a process. False where the id is known already and has stopped.
CREATE FUNCTION farebox.start_worker(_worker_id uuid, _hostname text, _release text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO farebox.workers AS w (id, hostname, release, lease_until)
    VALUES (_worker_id, _hostname, _release, clock_timestamp() + farebox.lease_length())
    ON CONFLICT (id) DO UPDATE SET lease_until = clock_timestamp() + farebox.lease_length() WHERE w.stopped_at IS NULL;
    RETURN FOUND;
END
$$;

-- Ends the lease at once. Open holds it leaves behind are then expire_holds' to settle.
CREATE FUNCTION farebox.stop_worker(_worker_id uuid) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE farebox.workers AS w
       SET stopped_at = clock_timestamp(), lease_until = least(w.lease_until, clock_timestamp())
     WHERE w.id = _worker_id AND w.stopped_at IS NULL;
    RETURN FOUND;
END
$$;

-- Totals by class, each the greater of the two.
CREATE FUNCTION farebox.greater_usage(_a bigint[], _b bigint[]) RETURNS bigint[]
LANGUAGE sql IMMUTABLE AS $$
    SELECT ARRAY[
        greatest(_a[1], _b[1]), greatest(_a[2], _b[2]), greatest(_a[3], _b[3]), greatest(_a[4], _b[4]),
        greatest(_a[5], _b[5]), greatest(_a[6], _b[6]), greatest(_a[7], _b[7])
    ]
$$;

-- Renews the lease and stores progress: absolute totals, seven numbers in _usages for each hold, never decreasing.
-- False: unknown or stopped, nothing was stored. A hold that somebody has locked is left for the next heartbeat.
CREATE FUNCTION farebox.heartbeat(_worker_id uuid, _hold_ids uuid[], _usages bigint[]) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE farebox.workers AS w
       SET lease_until = clock_timestamp() + farebox.lease_length()
     WHERE w.id = _worker_id AND w.stopped_at IS NULL;
    IF NOT FOUND THEN
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

-- Settles open holds whose worker's lease has lapsed, whatever their age, provisionally and at their last progress
-- mark. One sweeper at a time; at most _limit holds; what somebody has locked is left for the next sweep.
-- While Postgres has run for less than _restart_grace nothing is swept: after a restart every lease is stale at once.
CREATE FUNCTION farebox.expire_holds(_limit integer, _restart_grace interval)
RETURNS TABLE (hold_id uuid, account_id uuid, charge bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    at timestamptz;
    candidates uuid[];
    lapsed uuid[];
    accounts uuid[];
    purse farebox.purse;
    hold farebox.holds;
    cost numeric;
    purses farebox.purse[];
    moves farebox.move[];
    settled_holds farebox.holds[];
BEGIN
    IF clock_timestamp() < pg_postmaster_start_time() + _restart_grace
       OR NOT pg_try_advisory_xact_lock(hashtextextended('farebox.expire_holds', 0)) THEN
        RETURN;
    END IF;
    candidates := ARRAY(
        SELECT h.id
          FROM farebox.holds h
         WHERE h.state = 'open'
           AND NOT EXISTS (
               SELECT FROM farebox.workers w WHERE w.id = h.worker_id AND w.lease_until > clock_timestamp()
           )
         LIMIT _limit
    );
    -- Locks in the order worker, account, hold; every condition is checked again once the lock is held.
    lapsed := ARRAY(
        SELECT w.id
          FROM farebox.workers w
         WHERE w.id IN (SELECT h.worker_id FROM farebox.holds h WHERE h.id = ANY (candidates))
           AND w.lease_until <= clock_timestamp()
         ORDER BY w.id
           FOR NO KEY UPDATE SKIP LOCKED
    );
    accounts := ARRAY(
        SELECT a.id
          FROM farebox.accounts a
         WHERE a.id IN (SELECT h.account_id FROM farebox.holds h WHERE h.id = ANY (candidates))
         ORDER BY a.id
           FOR NO KEY UPDATE SKIP LOCKED
    );
    at := clock_timestamp();
    FOR hold IN
        SELECT h.*
          FROM farebox.holds h
         WHERE h.id = ANY (candidates) AND h.state = 'open'
           AND h.worker_id = ANY (lapsed) AND h.account_id = ANY (accounts)
         ORDER BY h.account_id, h.id
           FOR NO KEY UPDATE
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

-- The key as the gateway caches it; with its family's limit, if it has one.
CREATE FUNCTION farebox.find_key(_key_id text)
RETURNS TABLE (
    id text, account_id uuid, name text, secret_hmac bytea, pepper_version integer, scopes text[], models text[],
    profile text, affordable_cap boolean, spend_limit bigint, spent bigint, version integer, created_at timestamptz,
    expires_at timestamptz, revoked_at timestamptz, rotated_from text
)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT k.id, k.account_id, k.name, k.secret_hmac, k.pepper_version, k.scopes, k.models, k.profile, k.affordable_cap,
           s.spend_limit, coalesce(s.spent, 0), k.version, k.created_at, k.expires_at, k.revoked_at, k.rotated_from
      FROM farebox.api_keys k
      LEFT JOIN farebox.spend_limits s USING (family)
     WHERE k.id = _key_id
$$;
