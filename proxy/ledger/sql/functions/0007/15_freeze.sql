-- Accounts that may reserve nothing for now. What runs goes on to its end, and is charged.

-- As the gateway asks along with a key.
CREATE FUNCTION farebox.account_frozen(_account_id uuid) RETURNS boolean
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce((SELECT a.frozen_at IS NOT NULL FROM farebox.accounts a WHERE a.id = _account_id), false)
$$;

-- Writes down a reason to freeze, once for each reference: one that was lifted stays lifted, however often it is said
-- again. The caller has locked the account. True: it was written by this call.
CREATE FUNCTION farebox.frozen(_account_id uuid, _reference text, _reason text, _actor text) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    at timestamptz := clock_timestamp();
BEGIN
    INSERT INTO farebox.freezes (account_id, reference, reason, actor, created_at)
    VALUES (_account_id, _reference, _reason, _actor, at)
    ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    UPDATE farebox.accounts AS a SET frozen_at = at WHERE a.id = _account_id AND a.frozen_at IS NULL;
    PERFORM farebox.tell(
        'account.frozen', _account_id, _account_id || ':' || _reference,
        jsonb_build_object('reference', _reference, 'reason', _reason)
    );
    RETURN true;
END
$$;

-- Lifts the freeze of that reference (NULL: every one that stands). The caller has locked the account. True: by this
-- call.
CREATE FUNCTION farebox.thawed(_account_id uuid, _reference text, _actor text) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    UPDATE farebox.freezes AS f
       SET lifted_at = clock_timestamp(), lifted_by = _actor
     WHERE f.account_id = _account_id AND f.reference = coalesce(_reference, f.reference) AND f.lifted_at IS NULL;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    UPDATE farebox.accounts AS a
       SET frozen_at = NULL
     WHERE a.id = _account_id
       AND NOT EXISTS (SELECT FROM farebox.freezes f WHERE f.account_id = _account_id AND f.lifted_at IS NULL);
    RETURN true;
END
$$;

-- By the operator's hand. done; unknown: no such account; conflict: the reference stood before, and has been lifted.
CREATE FUNCTION farebox.freeze_account(_account_id uuid, _reference text, _reason text, _actor text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM farebox.lock_accounts(ARRAY[_account_id], NULL);
    IF NOT EXISTS (SELECT FROM farebox.accounts a WHERE a.id = _account_id) THEN
        RETURN 'unknown';
    END IF;
    IF NOT farebox.frozen(_account_id, _reference, _reason, _actor) AND EXISTS (
        SELECT FROM farebox.freezes f
         WHERE f.account_id = _account_id AND f.reference = _reference AND f.lifted_at IS NOT NULL
    ) THEN
        RETURN 'conflict';
    END IF;
    RETURN 'done';
END
$$;

-- done, though there may have been nothing to lift; unknown: no such account; no_freeze: none of that reference ever.
CREATE FUNCTION farebox.unfreeze_account(_account_id uuid, _reference text, _actor text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM farebox.lock_accounts(ARRAY[_account_id], NULL);
    IF NOT EXISTS (SELECT FROM farebox.accounts a WHERE a.id = _account_id) THEN
        RETURN 'unknown';
    END IF;
    IF _reference IS NOT NULL AND NOT EXISTS (
        SELECT FROM farebox.freezes f WHERE f.account_id = _account_id AND f.reference = _reference
    ) THEN
        RETURN 'no_freeze';
    END IF;
    PERFORM farebox.thawed(_account_id, _reference, _actor);
    RETURN 'done';
END
$$;

-- As in 0001, but that a reserve of a frozen account is refused as one by a key that has changed: every release loads the
-- key again upon that, and learns with it that the account is frozen. A hold that was granted before is granted still.
--
-- Reserves, then finalizes, then releases (the rest), one element a row in each array; _key_versions and _at_leasts for
-- the reserves only, _usages with seven numbers for each finalize. What many rows share stands once: _terms says which
-- element of the arrays from _worker_ids on is the row's. Results in any order, told apart by row_number (1..n).
--
-- In effect row by row: finalizes and releases first, so that what they give back can be held again, and reserves last.
-- An account's rows are decided one after the other in memory, which carries the purse and the hold in hand from one to
-- the next, and then written by set. Rows of one hold come together; nothing changes by that, since to say a thing
-- again moves nothing.
CREATE OR REPLACE FUNCTION farebox.batch(
    _reserves integer, _finalizes integer,
    _hold_ids uuid[], _account_ids uuid[], _key_ids text[], _amounts bigint[], _notes text[], _fingerprints bytea[],
    _terms integer[], _key_versions integer[], _at_leasts bigint[], _usages bigint[],
    _worker_ids uuid[], _price_versions text[], _models text[], _variants text[], _usage_sources text[], _capped text[],
    _endings text[],
    _wait_ms integer
)
RETURNS TABLE (
    row_number bigint, outcome text, amount bigint, overrun bigint, balance bigint, held bigint, debt bigint,
    spend_left bigint
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
-- One plan whatever the tables' size: each row by its key. Planned while a table was empty, it must never scan it.
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    busy uuid[] := farebox.lock_accounts(_account_ids, _wait_ms);
    at timestamptz := clock_timestamp();
    rows integer := cardinality(_hold_ids);
    repeats boolean := rows > (SELECT count(DISTINCT u.id) FROM unnest(_hold_ids) AS u (id));
    entry record;
    hold farebox.holds;
    purse farebox.purse;
    purse_moved boolean := false;
    available bigint;
    charge bigint;
    cap text;
    purses farebox.purse[];
    moves farebox.move[];
    new_holds farebox.holds[];
    changed_holds farebox.holds[];
BEGIN
    -- A later statement than the lock, so that a key revoked while this call waited is seen as revoked.
    FOR entry IN
        SELECT u.*, h AS known_hold, a.id AS known_account, a.balance, a.held, a.debt, a.version,
               EXISTS (SELECT FROM farebox.spend_limits s WHERE s.account_id = u.account_id) AS limited,
               _worker_ids[u.term] AS worker_id, _price_versions[u.term] AS price_version, _models[u.term] AS model,
               _variants[u.term] AS variant, _usage_sources[u.term] AS usage_source,
               CASE
                   WHEN u.n <= _reserves THEN 'reserve'
                   WHEN u.n <= _reserves + _finalizes THEN 'finalize'
                   ELSE 'release'
               END AS op,
               CASE WHEN u.n <= _reserves THEN CASE
                   WHEN w.lease_until IS NULL OR w.lease_until <= at THEN 'worker_lapsed'
                   WHEN k.id IS NULL OR k.account_id <> u.account_id OR p.version IS NULL THEN 'unknown'
                   WHEN k.version <> u.key_version OR k.revoked_at IS NOT NULL OR a.frozen_at IS NOT NULL
                       THEN 'key_changed'
                   WHEN k.expires_at <= at THEN 'key_expired'
               END END AS refusal
          FROM unnest(
                   _hold_ids, _account_ids, _key_ids, _amounts, _notes, _fingerprints, _terms, _key_versions, _at_leasts
               ) WITH ORDINALITY AS u (
                   hold_id, account_id, key_id, wanted, note, fingerprint, term, key_version, at_least, n
               )
          LEFT JOIN farebox.accounts a ON a.id = u.account_id
          LEFT JOIN farebox.holds h ON h.id = u.hold_id
          LEFT JOIN farebox.workers w ON w.id = _worker_ids[u.term]
          LEFT JOIN farebox.api_keys k ON k.id = u.key_id
          LEFT JOIN farebox.prices p ON p.version = _price_versions[u.term] AND p.model = _models[u.term]
                                    AND p.variant = _variants[u.term]
         ORDER BY u.account_id,
                  CASE WHEN repeats THEN (
                      SELECT min(x.n + CASE WHEN x.n > _reserves THEN -rows ELSE 0 END)
                        FROM unnest(_hold_ids) WITH ORDINALITY AS x (id, n)
                       WHERE x.id = u.hold_id
                  ) END,
                  u.n <= _reserves, u.n
    LOOP
        row_number := entry.n;
        outcome := NULL;
        amount := 0;
        overrun := 0;
        spend_left := NULL;
        IF entry.known_account IS NULL OR entry.account_id = ANY (busy) THEN
            outcome := CASE WHEN entry.known_account IS NULL THEN 'unknown' ELSE 'busy' END;
            balance := 0;
            held := 0;
            debt := 0;
            RETURN NEXT;
            CONTINUE;
        END IF;
        IF purse.account_id IS DISTINCT FROM entry.account_id THEN
            IF purse_moved THEN
                purses := purses || purse;
            END IF;
            purse_moved := false;
            purse := (
                entry.account_id, entry.balance, entry.held, entry.debt, entry.version, entry.limited, NULL, 0, 0, 0
            )::farebox.purse;
            hold := NULL;
        END IF;
        IF hold.id IS DISTINCT FROM entry.hold_id THEN
            hold := entry.known_hold;
        END IF;

        IF hold.account_id <> entry.account_id THEN
            outcome := 'conflict';

        ELSIF entry.op = 'finalize' AND hold.state IN ('released', 'final') THEN
            outcome := CASE
                WHEN hold.state = 'released' THEN 'released'
                WHEN hold.settle_fingerprint = entry.fingerprint THEN 'final'
                ELSE 'conflict'
            END;
            IF outcome = 'final' THEN
                amount := hold.charge;
                overrun := hold.overrun;
            END IF;

        ELSIF entry.op = 'finalize' THEN
            charge := entry.wanted;
            cap := _capped[entry.term];
            IF entry.usage_source = 'counted' AND charge > hold.amount THEN
                charge := hold.amount;
                cap := 'counted_above_hold';
            END IF;
            purse := farebox.settled(
                purse, hold.state, hold.amount, hold.charge, coalesce(hold.key_id, entry.key_id), charge
            );
            purse_moved := true;
            moves := moves || farebox.a_move(purse, entry.hold_id);
            outcome := 'final';
            amount := charge;
            overrun := coalesce(hold.overrun, 0) + purse.lent;
            -- A hold that was never seen leaves its tombstone.
            hold := (
                entry.hold_id, entry.account_id, coalesce(hold.state, 'new'), coalesce(hold.amount, 0),
                coalesce(hold.key_id, entry.key_id), coalesce(hold.worker_id, entry.worker_id), entry.price_version,
                entry.model, entry.variant, hold.quote, hold.fingerprint, hold.mark, coalesce(hold.opened_at, at),
                charge, overrun, 0, _usages[(entry.n - _reserves) * 7 - 6 : (entry.n - _reserves) * 7],
                entry.usage_source, cap, _endings[entry.term], entry.note, entry.fingerprint, at
            )::farebox.holds;
            IF hold.state = 'new' THEN
                hold.state := 'final';
                new_holds := new_holds || hold;
            ELSE
                hold.state := 'final';
                changed_holds := changed_holds || hold;
            END IF;

        ELSIF entry.op = 'release' AND hold.id IS NULL THEN
            -- A tombstone, so that its reserve, arriving late, holds nothing.
            outcome := 'released';
            hold := (
                entry.hold_id, entry.account_id, 'released', 0, NULL, entry.worker_id, NULL, NULL, NULL, NULL, NULL,
                NULL, at, 0, 0, 0, NULL, NULL, NULL, 'released', NULL, NULL, at
            )::farebox.holds;
            new_holds := new_holds || hold;

        ELSIF entry.op = 'release' AND hold.state IN ('open', 'provisional') THEN
            -- What the sweeper has charged meanwhile is trued up to nothing; the hold is then final.
            outcome := CASE hold.state WHEN 'open' THEN 'released' ELSE 'final' END;
            amount := CASE hold.state WHEN 'open' THEN hold.amount ELSE hold.charge END;
            purse := farebox.settled(purse, hold.state, hold.amount, hold.charge, hold.key_id, 0);
            purse_moved := true;
            moves := moves || farebox.a_move(purse, entry.hold_id);
            hold.state := outcome;
            hold.charge := 0;
            hold.usage := NULL;
            hold.usage_source := NULL;
            hold.capped := NULL;
            hold.ending := 'released';
            hold.ended_at := at;
            changed_holds := changed_holds || hold;

        ELSIF entry.op = 'release' THEN
            outcome := hold.state;

        ELSIF hold.id IS NOT NULL THEN
            outcome := CASE
                WHEN hold.fingerprint <> entry.fingerprint THEN 'conflict'
                WHEN hold.state = 'open' THEN 'granted'
                ELSE 'ended'
            END;
            amount := CASE outcome WHEN 'granted' THEN hold.amount ELSE 0 END;

        ELSIF entry.refusal IS NOT NULL THEN
            outcome := entry.refusal;

        ELSE
            available := purse.balance - purse.held;
            IF purse.limited THEN
                spend_left := farebox.spend_left(entry.key_id);
            END IF;
            IF purse.debt > 0 OR purse.balance < entry.at_least THEN
                outcome := 'insufficient';
            ELSIF available < entry.at_least THEN
                outcome := 'credits_held';
            ELSIF spend_left < entry.at_least THEN
                outcome := 'spend_limit';
            ELSE
                outcome := 'granted';
                amount := least(entry.wanted, available, spend_left);
                purse := farebox.moved(purse, NULL, 0, -amount);
                purse_moved := true;
                hold := (
                    entry.hold_id, entry.account_id, 'open', amount, entry.key_id, entry.worker_id, entry.price_version,
                    entry.model, entry.variant, entry.note, entry.fingerprint, NULL, at, NULL,
                    0, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL
                )::farebox.holds;
                new_holds := new_holds || hold;
                IF spend_left IS NOT NULL THEN
                    PERFORM farebox.count_spend(entry.key_id, amount, 0);
                    spend_left := spend_left - amount;
                END IF;
            END IF;
        END IF;

        balance := purse.balance;
        held := purse.held;
        debt := purse.debt;
        RETURN NEXT;
    END LOOP;
    IF purse_moved THEN
        purses := purses || purse;
    END IF;
    PERFORM farebox.write_down(purses, moves, new_holds, changed_holds, at);
END
$$;

GRANT EXECUTE ON FUNCTION farebox.account_frozen TO farebox_gateway;
GRANT EXECUTE ON FUNCTION farebox.freeze_account, farebox.unfreeze_account TO farebox_control;
