-- Webhooks that were received: each is written down before anything is done about it, and stays unprocessed until the
-- object that it names has been fetched and applied. What is applied doesn't depend on these rows: they are a list of
-- what is still to be done, and a memory of what came.

-- Writes an event down, or finds it. Outcomes:
--   taken      it is to be processed: it is new, or was left unprocessed by whoever took it before
--   processed  nothing is left to do
--   conflict   the id stands for another event
-- _outcome: what became of it, where nothing has to be done about it; NULL otherwise.
CREATE FUNCTION farebox.take_event(
    _id text, _type text, _livemode boolean, _object_id text, _created timestamptz, _outcome text
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
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

-- The object was fetched and applied. False: it had been before.
CREATE FUNCTION farebox.finish_event(_id text, _outcome text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE farebox.stripe_events AS e
       SET processed_at = clock_timestamp(), outcome = _outcome, error = NULL
     WHERE e.id = _id AND e.processed_at IS NULL;
    RETURN FOUND;
END
$$;

-- It was not, and why; another attempt comes. False: somebody else's attempt has succeeded meanwhile.
CREATE FUNCTION farebox.fail_event(_id text, _error text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE farebox.stripe_events AS e SET error = _error WHERE e.id = _id AND e.processed_at IS NULL;
    RETURN FOUND;
END
$$;

-- How long an event that was tried so often is left alone: half a minute, doubled with each attempt, an hour at most.
CREATE FUNCTION farebox.event_pause(_attempts integer) RETURNS interval
LANGUAGE sql IMMUTABLE AS $$
    SELECT least(interval '1 hour', interval '15 seconds' * (2 ^ least(_attempts, 10)))
$$;

-- Takes the unprocessed event that was tried longest ago, to try it again; it is this caller's for its pause, since
-- being tried is what makes the next attempt wait. No row: none is due. _pause: wait so long at most (a hurried
-- operator: not at all). _without: those that the caller has tried just now. _livemode: of the mode whose key the caller
-- has; to another's the object is unknown, which is no reason to be done with it.
CREATE FUNCTION farebox.claim_event(_livemode boolean, _pause interval, _without text[]) RETURNS SETOF farebox.stripe_events
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
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

-- Removes processed events older than _keep, at most _limit; how many. Nothing depends on them: what an object has
-- done is kept with the object's own id.
CREATE FUNCTION farebox.forget_events(_limit integer, _keep interval) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
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

REVOKE ALL ON FUNCTION
    farebox.take_event, farebox.finish_event, farebox.fail_event, farebox.event_pause, farebox.claim_event,
    farebox.forget_events
FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
    farebox.take_event, farebox.finish_event, farebox.fail_event, farebox.claim_event, farebox.forget_events
TO farebox_control;
