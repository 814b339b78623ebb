-- Lots that have expired: what no hold may still draw leaves the account.

-- Accounts of which expire_lots would take something now, by their ids: those after _after (NULL: from the beginning),
-- _limit of them at most. Looks without locks.
CREATE FUNCTION farebox.expired_accounts(_after uuid, _limit integer) RETURNS SETOF uuid
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
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

-- Takes what is left of the account's expired lots, as far as it is available; returns how much. Each keeps what holds
-- that were opened before it expired may still draw, until they end: then it is taken, too. What refunds reserved or
-- debts are owed isn't the lot's any more.
CREATE FUNCTION farebox.expire_lots(_account_id uuid) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
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

GRANT EXECUTE ON FUNCTION farebox.expired_accounts, farebox.expire_lots TO farebox_control;
