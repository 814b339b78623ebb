-- The hot path: finalizes, releases and reserves, many in one call. A single call is a batch of one.

-- Locks the accounts in id order. _wait_ms 0: those that somebody else has locked are skipped, and returned. Otherwise
-- they are waited for, each so long (NULL: as the connection's lock_timeout says); then lock_not_available (55P03).
CREATE FUNCTION farebox.lock_accounts(_account_ids uuid[], _wait_ms integer) RETURNS uuid[]
LANGUAGE plpgsql AS $$
DECLARE
    locked uuid[];
BEGIN
    -- Under a snapshot older than the lock, the checks after it would see a key as it was before the wait.
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'the ledger writes under READ COMMITTED only' USING ERRCODE = '25001';
    END IF;
    IF _wait_ms IS DISTINCT FROM 0 THEN
        IF _wait_ms IS NOT NULL THEN
            PERFORM set_config('lock_timeout', _wait_ms::text, true);
        END IF;
        PERFORM FROM farebox.accounts a WHERE a.id = ANY (_account_ids) ORDER BY a.id FOR NO KEY UPDATE;
        RETURN '{}';
    END IF;
    locked := ARRAY(
        SELECT a.id FROM farebox.accounts a WHERE a.id = ANY (_account_ids) ORDER BY a.id FOR NO KEY UPDATE SKIP LOCKED
    );
    RETURN ARRAY(
        SELECT a.id FROM farebox.accounts a WHERE a.id = ANY (_account_ids) AND a.id <> ALL (locked)
    );
END
$$;

-- What becomes of each entry, one after the other, and written nowhere yet (save the counts of keys with a limit): the
-- purse and the hold in hand carry it from one to the next. An account's entries come together, and in it those of one
-- hold, which changes nothing: saying a thing again moves no money.
CREATE FUNCTION farebox.decide(
    _reserves integer, _finalizes integer,
    _hold_ids uuid[], _account_ids uuid[], _key_ids text[], _amounts bigint[], _notes text[], _fingerprints bytea[],
    _terms integer[], _key_versions integer[], _at_leasts bigint[], _usages bigint[],
    _worker_ids uuid[], _price_versions text[], _models text[], _variants text[], _usage_sources text[], _capped text[],
    _endings text[],
    _busy uuid[], _at timestamptz
) RETURNS SETOF farebox.move
LANGUAGE plpgsql AS $$
DECLARE
    rows integer := cardinality(_hold_ids);
    repeats boolean := rows > (SELECT count(DISTINCT u.id) FROM unnest(_hold_ids) AS u (id));
    entry record;
    current_account uuid;
    purse farebox.purse;
    hold farebox.holds;
    available bigint;
    charge bigint;
    usage bigint[];
    cap text;
    outcome text;
    answer bigint;
    overrun bigint;
    spend_left bigint;
    change text;
BEGIN
    -- A later statement than the lock, so that a key revoked while this call waited is seen as revoked.
    FOR entry IN
        SELECT u.*, h AS known_hold,
               CASE
                   WHEN u.n <= _reserves THEN 'reserve'
                   WHEN u.n <= _reserves + _finalizes THEN 'finalize'
                   ELSE 'release'
               END AS op,
               CASE WHEN u.n <= _reserves THEN CASE
                   WHEN w.lease_until IS NULL OR w.lease_until <= _at THEN 'worker_lapsed'
                   WHEN k.id IS NULL OR k.account_id <> u.account_id OR p.version IS NULL THEN 'unknown'
                   WHEN k.version <> u.key_version OR k.revoked_at IS NOT NULL THEN 'key_changed'
                   WHEN k.expires_at <= _at THEN 'key_expired'
               END END AS refusal
          FROM unnest(
                   _hold_ids, _account_ids, _key_ids, _amounts, _notes, _fingerprints, _terms, _key_versions, _at_leasts
               ) WITH ORDINALITY AS u (
                   hold_id, account_id, key_id, amount, note, fingerprint, term, key_version, at_least, n
               )
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
        IF current_account IS DISTINCT FROM entry.account_id THEN
            current_account := entry.account_id;
            purse := farebox.open_purse(current_account);
            hold := NULL;
        END IF;
        IF purse.account_id IS NULL OR entry.account_id = ANY (_busy) THEN
            outcome := CASE WHEN purse.account_id IS NULL THEN 'unknown' ELSE 'busy' END;
            RETURN NEXT (entry.n, outcome, 0, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL)::farebox.move;
            CONTINUE;
        END IF;
        IF hold.id IS DISTINCT FROM entry.hold_id THEN
            hold := entry.known_hold;
        END IF;
        answer := 0;
        overrun := 0;
        spend_left := NULL;
        change := NULL;

        IF hold.account_id <> entry.account_id THEN
            outcome := 'conflict';

        ELSIF entry.op = 'finalize' THEN
            IF hold.state = 'released' THEN
                outcome := 'released';
            ELSIF hold.state = 'final' THEN
                outcome := CASE hold.settle_fingerprint WHEN entry.fingerprint THEN 'final' ELSE 'conflict' END;
            ELSE
                outcome := 'final';
                charge := entry.amount;
                usage := _usages[(entry.n - _reserves) * 7 - 6 : (entry.n - _reserves) * 7];
                cap := _capped[entry.term];
                IF _usage_sources[entry.term] = 'counted' AND charge > hold.amount THEN
                    charge := hold.amount;
                    cap := 'counted_above_hold';
                END IF;
                purse := farebox.settled(
                    purse, hold.state, hold.amount, hold.charge, coalesce(hold.key_id, entry.key_id), charge
                );
                change := CASE WHEN hold.id IS NULL THEN 'insert' ELSE 'update' END;
                hold := (
                    entry.hold_id, entry.account_id, 'final', coalesce(hold.amount, 0), coalesce(hold.key_id, entry.key_id),
                    coalesce(hold.worker_id, _worker_ids[entry.term]), _price_versions[entry.term], _models[entry.term], _variants[entry.term], hold.quote,
                    hold.fingerprint, hold.mark, coalesce(hold.opened_at, _at), charge,
                    coalesce(hold.overrun, 0) + purse.lent, 0, usage, _usage_sources[entry.term], cap, _endings[entry.term],
                    entry.note, entry.fingerprint, _at
                )::farebox.holds;
            END IF;
            IF outcome = 'final' THEN
                answer := hold.charge;
                overrun := hold.overrun;
            END IF;

        ELSIF entry.op = 'release' THEN
            IF hold.id IS NULL THEN
                -- A tombstone, so that its reserve, arriving late, holds nothing.
                purse := farebox.moved(purse, NULL, 0, 0);
                change := 'insert';
                hold.id := entry.hold_id;
                hold.account_id := entry.account_id;
                hold.state := 'released';
                hold.amount := 0;
                hold.worker_id := _worker_ids[entry.term];
                hold.opened_at := _at;
                hold.charge := 0;
                hold.overrun := 0;
                hold.reversed := 0;
                hold.ending := 'released';
                hold.ended_at := _at;
            ELSIF hold.state IN ('open', 'provisional') THEN
                -- What the sweeper has charged meanwhile is trued up to nothing; the hold is then final.
                purse := farebox.settled(purse, hold.state, hold.amount, hold.charge, hold.key_id, 0);
                change := 'update';
                answer := CASE hold.state WHEN 'open' THEN hold.amount ELSE hold.charge END;
                hold.state := CASE hold.state WHEN 'open' THEN 'released' ELSE 'final' END;
                hold.charge := 0;
                hold.usage := NULL;
                hold.usage_source := NULL;
                hold.capped := NULL;
                hold.ending := 'released';
                hold.ended_at := _at;
            END IF;
            outcome := hold.state;

        ELSIF hold.id IS NOT NULL THEN
            outcome := CASE
                WHEN hold.fingerprint <> entry.fingerprint THEN 'conflict'
                WHEN hold.state = 'open' THEN 'granted'
                ELSE 'ended'
            END;
            answer := CASE outcome WHEN 'granted' THEN hold.amount ELSE 0 END;

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
                answer := least(entry.amount, available, spend_left);
                purse := farebox.moved(purse, NULL, 0, -answer);
                change := 'insert';
                hold := (
                    entry.hold_id, entry.account_id, 'open', answer, entry.key_id, _worker_ids[entry.term], _price_versions[entry.term],
                    _models[entry.term], _variants[entry.term], entry.note, entry.fingerprint, NULL, _at, NULL,
                    0, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL
                )::farebox.holds;
                IF spend_left IS NOT NULL THEN
                    PERFORM farebox.count_spend(entry.key_id, answer, 0);
                    spend_left := spend_left - answer;
                END IF;
            END IF;
        END IF;
        RETURN NEXT (
            entry.n, outcome, answer, overrun, spend_left, purse, change,
            CASE WHEN change IS NOT NULL THEN hold END, NULL, NULL, NULL
        )::farebox.move;
    END LOOP;
END
$$;

-- Reserves, then finalizes, then releases (the rest), one element a row in each array; _key_versions and _at_leasts for the
-- reserves only, _usages with seven numbers for each finalize. What many rows share stands once: _terms says which element
-- of the arrays from _worker_ids on is the row's. In effect row by row, with reserves last, so that what was just given
-- back can be held again. Results in any order, told apart by row_number (1..n as given).
CREATE FUNCTION farebox.batch(
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
-- One plan whatever the tables' size: look every row up by its key. Planned while they were empty, it must not scan them.
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    busy uuid[] := farebox.lock_accounts(_account_ids, _wait_ms);
    at timestamptz := clock_timestamp();
    moves farebox.move[];
BEGIN
    moves := ARRAY(
        SELECT d
          FROM farebox.decide(
              _reserves, _finalizes, _hold_ids, _account_ids, _key_ids, _amounts, _notes, _fingerprints, _terms,
              _key_versions, _at_leasts, _usages, _worker_ids, _price_versions, _models, _variants, _usage_sources, _capped,
              _endings, busy, at
          ) AS d
    );
    PERFORM farebox.write_moves(moves, at);
    RETURN QUERY
    SELECT m.row_number, m.outcome, m.answer, m.overrun, coalesce((m.purse).balance, 0),
           coalesce((m.purse).held, 0), coalesce((m.purse).debt, 0), m.spend_left
      FROM unnest(moves) AS m;
END
$$;
