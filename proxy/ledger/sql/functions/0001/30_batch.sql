-- The hot path: finalizes, releases and reserves, many in one call. A single call is a batch of one, so that the money
-- rule exists once. The three *_entry functions do one row each; _hold is its hold as it stands, all NULL if there is none.

CREATE FUNCTION farebox.reserve_entry(
    INOUT purse farebox.purse,
    _hold farebox.holds,
    _entry farebox.entry,
    _at timestamptz
)
LANGUAGE plpgsql AS $$
DECLARE
    available bigint := purse.balance - purse.held;
BEGIN
    IF _hold.id IS NOT NULL THEN
        purse.outcome := CASE
            WHEN _hold.account_id <> _entry.account_id OR _hold.fingerprint <> _entry.fingerprint THEN 'conflict'
            WHEN _hold.state = 'open' THEN 'granted'
            ELSE 'ended'
        END;
        purse.amount := CASE purse.outcome WHEN 'granted' THEN _hold.amount ELSE 0 END;
        RETURN;
    END IF;
    IF _entry.refusal IS NOT NULL THEN
        purse.outcome := _entry.refusal;
        RETURN;
    END IF;
    IF purse.limited THEN
        purse.spend_left := farebox.spend_left(_entry.key_id);
    END IF;
    purse.outcome := CASE
        WHEN purse.debt > 0 OR purse.balance < _entry.at_least THEN 'insufficient'
        WHEN available < _entry.at_least THEN 'credits_held'
        WHEN purse.spend_left < _entry.at_least THEN 'spend_limit'
        ELSE 'granted'
    END;
    IF purse.outcome <> 'granted' THEN
        RETURN;
    END IF;
    purse.amount := least(_entry.amount, available, purse.spend_left);
    INSERT INTO farebox.holds (
        id, account_id, state, amount, key_id, worker_id, price_version, model, variant, quote, fingerprint, opened_at
    ) VALUES (
        _entry.hold_id, _entry.account_id, 'open', purse.amount, _entry.key_id, _entry.worker_id, _entry.price_version,
        _entry.model, _entry.variant, _entry.note, _entry.fingerprint, _at
    );
    purse.held := purse.held + purse.amount;
    IF purse.spend_left IS NOT NULL THEN
        PERFORM farebox.count_spend(_entry.key_id, purse.amount, 0);
        purse.spend_left := purse.spend_left - purse.amount;
    END IF;
END
$$;

-- Ends a hold with its final charge. A hold never seen is settled all the same, and leaves its tombstone.
CREATE FUNCTION farebox.finalize_entry(
    INOUT purse farebox.purse,
    _hold farebox.holds,
    _entry farebox.entry,
    _at timestamptz
)
LANGUAGE plpgsql AS $$
DECLARE
    unseen boolean := _hold.id IS NULL;
    charged bigint := _entry.amount;
    capped_by text := _entry.capped;
BEGIN
    purse.outcome := CASE
        WHEN unseen THEN 'final'
        WHEN _hold.account_id <> _entry.account_id THEN 'conflict'
        WHEN _hold.state = 'released' THEN 'released'
        WHEN _hold.state <> 'final' OR _hold.settle_fingerprint = _entry.fingerprint THEN 'final'
        ELSE 'conflict'
    END;
    IF purse.outcome <> 'final' OR _hold.state = 'final' THEN
        IF purse.outcome = 'final' THEN
            purse.amount := _hold.charge;
            purse.overrun := _hold.overrun;
        END IF;
        RETURN;
    END IF;
    IF unseen THEN
        _hold.id := _entry.hold_id;
        _hold.key_id := _entry.key_id;
    ELSIF _entry.usage_source = 'counted' AND charged > _hold.amount THEN
        charged := _hold.amount;
        capped_by := 'counted_above_hold';
    END IF;
    purse := farebox.settle(purse, _hold, charged, _at);
    IF unseen THEN
        INSERT INTO farebox.holds (
            id, account_id, state, amount, key_id, worker_id, price_version, model, variant, opened_at, charge, overrun,
            usage, usage_source, capped, ending, receipt, settle_fingerprint, ended_at
        ) VALUES (
            _entry.hold_id, _entry.account_id, 'final', 0, _entry.key_id, _entry.worker_id, _entry.price_version,
            _entry.model, _entry.variant, _at, charged, purse.overrun,
            _entry.usage, _entry.usage_source, capped_by, _entry.ending, _entry.note, _entry.fingerprint, _at
        );
        RETURN;
    END IF;
    UPDATE farebox.holds AS h
       SET state = 'final', charge = charged, overrun = purse.overrun, usage = _entry.usage,
           usage_source = _entry.usage_source, capped = capped_by, ending = _entry.ending, receipt = _entry.note,
           settle_fingerprint = _entry.fingerprint, ended_at = _at,
           price_version = _entry.price_version, model = _entry.model, variant = _entry.variant
     WHERE h.id = _hold.id;
END
$$;

-- Gives a hold back. One never seen becomes a tombstone, so that its reserve, arriving late, holds nothing.
-- What the sweeper has charged meanwhile is trued up to nothing; the hold is then final, with a charge of 0.
CREATE FUNCTION farebox.release_entry(
    INOUT purse farebox.purse,
    _hold farebox.holds,
    _entry farebox.entry,
    _at timestamptz
)
LANGUAGE plpgsql AS $$
BEGIN
    IF _hold.id IS NULL THEN
        purse.outcome := 'released';
        INSERT INTO farebox.holds (id, account_id, state, amount, worker_id, opened_at, charge, ending, ended_at)
        VALUES (_entry.hold_id, _entry.account_id, 'released', 0, _entry.worker_id, _at, 0, 'released', _at);
        RETURN;
    END IF;
    IF _hold.account_id <> _entry.account_id THEN
        purse.outcome := 'conflict';
        RETURN;
    END IF;
    IF _hold.state NOT IN ('open', 'provisional') THEN
        purse.outcome := _hold.state;
        RETURN;
    END IF;
    purse.outcome := CASE _hold.state WHEN 'open' THEN 'released' ELSE 'final' END;
    purse := farebox.settle(purse, _hold, 0, _at);
    purse.amount := CASE _hold.state WHEN 'open' THEN _hold.amount ELSE _hold.charge END;
    UPDATE farebox.holds AS h
       SET state = purse.outcome, charge = 0, usage = NULL, usage_source = NULL, capped = NULL, ending = 'released',
           ended_at = _at
     WHERE h.id = _hold.id;
END
$$;

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

-- The arrays run in parallel, one element a row; finalizes stand first, since _usages carries seven numbers for each of
-- them and none for the others. In effect row by row; within an account the reserves come last, so that what was just
-- given back can be held again. Results come in any order, told apart by row_number (1..n as given).
CREATE FUNCTION farebox.batch(
    _ops text[],
    _hold_ids uuid[],
    _account_ids uuid[],
    _worker_ids uuid[],
    _key_ids text[],
    _key_versions integer[],
    _amounts bigint[],
    _at_leasts bigint[],
    _price_versions text[],
    _models text[],
    _variants text[],
    _notes text[],
    _fingerprints bytea[],
    _usages bigint[],
    _usage_sources text[],
    _capped text[],
    _endings text[],
    _wait_ms integer
) RETURNS SETOF farebox.result
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    busy uuid[] := farebox.lock_accounts(_account_ids, _wait_ms);
    at timestamptz := clock_timestamp();
    current_account uuid;
    purse farebox.purse;
    stored farebox.purse;
    entry farebox.entry;
    hold farebox.holds;
BEGIN
    -- A later statement than the lock, so that a key revoked while this call waited is seen as revoked.
    FOR entry IN
        SELECT u.n, u.op, u.hold_id, u.account_id, u.worker_id, u.key_id, u.amount, u.at_least, u.price_version, u.model,
               u.variant, u.note, u.fingerprint,
               CASE u.op WHEN 'finalize' THEN _usages[u.n * 7 - 6 : u.n * 7] END,
               u.usage_source, u.capped, u.ending,
               CASE
                   WHEN u.op <> 'reserve' THEN NULL
                   WHEN w.lease_until IS NULL OR w.lease_until <= at THEN 'worker_lapsed'
                   WHEN k.id IS NULL OR k.account_id <> u.account_id OR p.version IS NULL THEN 'unknown'
                   WHEN k.version <> u.key_version OR k.revoked_at IS NOT NULL THEN 'key_changed'
                   WHEN k.expires_at <= at THEN 'key_expired'
               END
          FROM unnest(
                   _ops, _hold_ids, _account_ids, _worker_ids, _key_ids, _key_versions, _amounts, _at_leasts,
                   _price_versions, _models, _variants, _notes, _fingerprints, _usage_sources, _capped, _endings
               ) WITH ORDINALITY AS u (
                   op, hold_id, account_id, worker_id, key_id, key_version, amount, at_least,
                   price_version, model, variant, note, fingerprint, usage_source, capped, ending, n
               )
          LEFT JOIN farebox.workers w ON w.id = u.worker_id
          LEFT JOIN farebox.api_keys k ON k.id = u.key_id
          LEFT JOIN farebox.prices p ON p.version = u.price_version AND p.model = u.model AND p.variant = u.variant
         ORDER BY u.account_id, u.op = 'reserve', u.n
    LOOP
        IF current_account IS DISTINCT FROM entry.account_id THEN
            IF (purse.held, purse.version) IS DISTINCT FROM (stored.held, stored.version) THEN
                PERFORM farebox.store_purse(purse);
            END IF;
            current_account := entry.account_id;
            purse := farebox.open_purse(current_account);
            stored := purse;
        END IF;
        IF purse IS NULL OR current_account = ANY (busy) THEN
            RETURN NEXT (
                entry.row_number, CASE WHEN purse IS NULL THEN 'unknown' ELSE 'busy' END, 0, 0, 0, 0, 0, NULL
            )::farebox.result;
            CONTINUE;
        END IF;
        SELECT * INTO hold FROM farebox.holds h WHERE h.id = entry.hold_id;
        purse.amount := 0;
        purse.overrun := 0;
        purse.spend_left := NULL;
        CASE entry.op
            WHEN 'finalize' THEN purse := farebox.finalize_entry(purse, hold, entry, at);
            WHEN 'release' THEN purse := farebox.release_entry(purse, hold, entry, at);
            WHEN 'reserve' THEN purse := farebox.reserve_entry(purse, hold, entry, at);
        END CASE;
        RETURN NEXT (
            entry.row_number, purse.outcome, purse.amount, purse.overrun, purse.balance, purse.held, purse.debt,
            purse.spend_left
        )::farebox.result;
    END LOOP;
    IF (purse.held, purse.version) IS DISTINCT FROM (stored.held, stored.version) THEN
        PERFORM farebox.store_purse(purse);
    END IF;
END
$$;
