-- Idempotency-Key: one hold and one upstream call for a word of an account, whoever says it again and whoever dies.

-- What a claim stands for now. Nothing is written down when that changes: it follows from the claim's hold.
--   free      its hold was given back; or its worker is gone and nothing is known to have been delivered; or it has
--             no hold and can't get one any more
--   running   its hold is open, or is just being reserved
--   finished  its hold was charged, for good or provisionally
CREATE FUNCTION farebox.claim_state(_claim farebox.idempotency_keys) RETURNS text
LANGUAGE plpgsql STABLE SET enable_seqscan = off AS $$
DECLARE
    hold farebox.holds;
BEGIN
    SELECT h.* INTO hold FROM farebox.holds h WHERE h.id = _claim.hold_id;
    RETURN CASE
        WHEN hold.state = 'open' THEN 'running'
        -- What the sweeper had settled and its worker gave back after all is final, and costs nothing.
        WHEN hold.state = 'released' OR hold.ending = 'released' THEN 'free'
        WHEN hold.state = 'provisional' AND hold.charge = 0 AND hold.mark IS NULL THEN 'free'
        WHEN hold.id IS NOT NULL THEN 'finished'
        WHEN _claim.claimed_at > clock_timestamp() - farebox.lease_length() AND EXISTS (
            SELECT FROM farebox.workers w WHERE w.id = _claim.worker_id AND w.lease_until > clock_timestamp()
        ) THEN 'running'
        ELSE 'free'
    END;
END
$$;

-- Takes a free claim's hold from its worker for good, so that one word is never charged twice: a reserve that comes
-- late finds a tombstone, and a charge that comes late (from a journal) finds the hold final, at nothing.
-- False where the claim isn't free any more. Locks the account, so that nothing can come in between.
CREATE FUNCTION farebox.bar_claim(_claim farebox.idempotency_keys) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    -- The usual case, a retry after a refusal: what was given back stays so.
    IF EXISTS (
        SELECT FROM farebox.holds h
         WHERE h.id = _claim.hold_id AND (h.state = 'released' OR h.ending = 'released')
    ) THEN
        RETURN true;
    END IF;
    PERFORM farebox.lock_accounts(ARRAY[_claim.account_id], NULL);
    IF farebox.claim_state(_claim) <> 'free' THEN
        RETURN false;
    END IF;
    -- A release, through the one function that does it.
    PERFORM FROM farebox.batch(
        0, 0, ARRAY[_claim.hold_id], ARRAY[_claim.account_id], ARRAY[NULL::text], ARRAY[NULL::bigint],
        ARRAY[NULL::text], ARRAY[NULL::bytea], ARRAY[1], '{}', '{}', '{}', ARRAY[_claim.worker_id], ARRAY[NULL::text],
        ARRAY[NULL::text], ARRAY[NULL::text], ARRAY[NULL::text], ARRAY[NULL::text], ARRAY[NULL::text], NULL
    );
    RETURN true;
END
$$;

-- Claims an account's word for a hold that is about to be reserved. Outcomes:
--   claimed   it is this hold's (again, where it is said again)
--   running, finished   another hold's, hold_id: not to be done twice; with the kept answer, where there is one
--   mismatch  another hold's, and what was asked was something else
CREATE FUNCTION farebox.claim_key(
    _account_id uuid, _key_hash bytea, _fingerprint bytea, _hold_id uuid, _worker_id uuid,
    OUT outcome text, OUT hold_id uuid, OUT head text, OUT body bytea
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    claim farebox.idempotency_keys;
BEGIN
    -- Others may take it or give it up between two statements. Whoever loses three times comes again.
    FOR turn IN 1..3 LOOP
        INSERT INTO farebox.idempotency_keys (account_id, key_hash, fingerprint, hold_id, worker_id, claimed_at)
        VALUES (_account_id, _key_hash, _fingerprint, _hold_id, _worker_id, clock_timestamp())
        ON CONFLICT DO NOTHING;
        IF FOUND THEN
            outcome := 'claimed';
            hold_id := _hold_id;
            RETURN;
        END IF;
        SELECT k.* INTO claim
          FROM farebox.idempotency_keys k WHERE k.account_id = _account_id AND k.key_hash = _key_hash;
        CONTINUE WHEN NOT FOUND;
        hold_id := claim.hold_id;
        outcome := CASE claim.hold_id WHEN _hold_id THEN 'claimed' ELSE farebox.claim_state(claim) END;
        IF outcome IN ('running', 'finished') AND claim.fingerprint <> _fingerprint THEN
            outcome := 'mismatch';
        ELSIF outcome = 'finished' THEN
            SELECT a.head, a.body INTO head, body
              FROM farebox.idempotency_answers a
             WHERE a.hold_id = claim.hold_id AND a.expires_at > clock_timestamp();
        END IF;
        IF outcome <> 'free' THEN
            RETURN;
        END IF;
        CONTINUE WHEN NOT farebox.bar_claim(claim);
        UPDATE farebox.idempotency_keys AS k
           SET fingerprint = _fingerprint, hold_id = _hold_id, worker_id = _worker_id, claimed_at = clock_timestamp()
         WHERE k.account_id = _account_id AND k.key_hash = _key_hash AND k.hold_id = claim.hold_id;
        IF FOUND THEN
            outcome := 'claimed';
            hold_id := _hold_id;
            RETURN;
        END IF;
    END LOOP;
    outcome := 'running';
END
$$;

-- Gives a claim up whose reserve was refused. False: it is another's by now. One that has a hold is the hold's.
CREATE FUNCTION farebox.free_key(_account_id uuid, _key_hash bytea, _hold_id uuid) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
BEGIN
    DELETE FROM farebox.idempotency_keys k
     WHERE k.account_id = _account_id AND k.key_hash = _key_hash AND k.hold_id = _hold_id
       AND NOT EXISTS (SELECT FROM farebox.holds h WHERE h.id = _hold_id);
    RETURN FOUND;
END
$$;

-- Keeps a whole answer for so long. False: one is kept already.
CREATE FUNCTION farebox.keep_answer(_hold_id uuid, _head text, _body bytea, _keep interval) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO farebox.idempotency_answers (hold_id, head, body, expires_at)
    VALUES (_hold_id, _head, _body, clock_timestamp() + _keep)
    ON CONFLICT DO NOTHING;
    RETURN FOUND;
END
$$;

-- Removes answers whose time is over, and claims older than _keep; at most _limit of each. How many it removed.
-- One process at a time; a claim whose hold is open stays.
CREATE FUNCTION farebox.forget_keys(_limit integer, _keep interval) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    answers integer;
    claims integer;
    before timestamptz := clock_timestamp() - _keep;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtextextended('farebox.forget_keys', 0)) THEN
        RETURN 0;
    END IF;
    DELETE FROM farebox.idempotency_answers
     WHERE hold_id IN (
         SELECT a.hold_id FROM farebox.idempotency_answers a WHERE a.expires_at <= clock_timestamp() LIMIT _limit
     );
    GET DIAGNOSTICS answers = ROW_COUNT;
    DELETE FROM farebox.idempotency_keys AS k
     WHERE k.claimed_at < before
       AND (k.account_id, k.key_hash) IN (
           SELECT o.account_id, o.key_hash
             FROM farebox.idempotency_keys o
            WHERE o.claimed_at < before
              AND NOT EXISTS (SELECT FROM farebox.holds h WHERE h.id = o.hold_id AND h.state = 'open')
            LIMIT _limit
       );
    GET DIAGNOSTICS claims = ROW_COUNT;
    RETURN answers + claims;
END
$$;
