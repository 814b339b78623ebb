-- Messages to the operator's own endpoint: written in the transaction whose news they are, sent from here afterwards.

-- Decimal credits, as the APIs write them.
CREATE FUNCTION farebox.credits_text(_microcredits bigint) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT trim_scale(_microcredits::numeric / 1000000)::text
$$;

-- RFC 3339 in UTC, whatever the session's time zone and date style.
CREATE FUNCTION farebox.time_text(_at timestamptz) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT to_char(_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
$$;

-- Writes a message, once for each (type, reference); a NULL reference is always new. Call it where the account is
-- already as the message shall say: who it is, its balance and its debt are told with every message. _data: what else,
-- amounts as text (credits_text); its members go before those.
CREATE FUNCTION farebox.tell(_type text, _account_id uuid, _reference text, _data jsonb DEFAULT '{}') RETURNS void
LANGUAGE plpgsql AS $$
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

-- Takes at most _rows messages whose time has come, for _lease: whoever takes them sends them meanwhile, and if nothing
-- is heard of it they are due again. No two callers get the same one.
CREATE FUNCTION farebox.claim_messages(_rows integer, _lease interval) RETURNS SETOF farebox.outbox
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
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

CREATE FUNCTION farebox.message_delivered(_id uuid) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    UPDATE farebox.outbox AS o
       SET delivered_at = clock_timestamp(), given_up_at = NULL, error = NULL
     WHERE o.id = _id AND o.delivered_at IS NULL
$$;

-- _attempt: the one that failed; a later one, or a delivery, isn't undone by it. _again NULL: it was the last.
CREATE FUNCTION farebox.message_failed(_id uuid, _attempt integer, _error text, _again interval) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    UPDATE farebox.outbox AS o
       SET error = _error, next_at = clock_timestamp() + coalesce(_again, interval '0'),
           given_up_at = CASE WHEN _again IS NULL THEN clock_timestamp() END
     WHERE o.id = _id AND o.attempts = _attempt AND o.delivered_at IS NULL AND o.given_up_at IS NULL
$$;

-- Sends messages anew, under their old ids: the one of _id, whatever became of it, or (NULL) all that were given up.
-- Says how many.
CREATE FUNCTION farebox.resend_messages(_id uuid) RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH again AS (
        UPDATE farebox.outbox AS o
           SET delivered_at = NULL, given_up_at = NULL, attempts = 0, next_at = clock_timestamp()
         WHERE CASE WHEN _id IS NULL THEN o.given_up_at IS NOT NULL ELSE o.id = _id END
        RETURNING o.id
    )
    SELECT count(*) FROM again
$$;

-- Removes what was delivered or given up longer than _age ago: how many. And gives up what was due for _stale without
-- anybody trying: nobody listened, and who begins to shall not be told of what is long past.
CREATE FUNCTION farebox.forget_messages(_age interval, _stale interval) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
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

-- Looks over all accounts for those that have run low or come into debt since they were last told, and for those that
-- are well again; tells at most _rows of them, and says how many. NULL: another session is at it. _low_balance:
-- below which balance an account is told that has set no mark of its own; NULL: not at all.
CREATE FUNCTION farebox.tell_alerts(_low_balance bigint, _rows integer) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
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

-- NULL: the installation's own mark. Says whether there is such an account.
CREATE FUNCTION farebox.set_low_balance(_account_id uuid, _low_balance bigint) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO farebox.alerts AS l (account_id, low_balance)
    SELECT a.id, _low_balance FROM farebox.accounts a WHERE a.id = _account_id
    ON CONFLICT (account_id) DO UPDATE SET low_balance = _low_balance;
    RETURN CASE WHEN FOUND THEN 'done' ELSE 'unknown' END;
END
$$;

GRANT EXECUTE ON FUNCTION
    farebox.claim_messages(integer, interval), farebox.message_delivered(uuid),
    farebox.message_failed(uuid, integer, text, interval), farebox.resend_messages(uuid),
    farebox.forget_messages(interval, interval), farebox.tell_alerts(bigint, integer),
    farebox.set_low_balance(uuid, bigint)
TO farebox_control;
