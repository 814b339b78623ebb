-- What an operator does: accounts, keys, grants, reversals. Each is idempotent, and says by its outcome what happened.

-- The same external_id again is the same account, if name and email agree.
CREATE FUNCTION farebox.create_account(
    _id uuid, _name text, _external_id text, _email text, OUT outcome text, OUT account_id uuid
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO farebox.accounts (id, name, external_id, email)
    VALUES (_id, _name, _external_id, _email)
    ON CONFLICT DO NOTHING;
    outcome := CASE WHEN FOUND THEN 'done' ELSE 'conflict' END;
    account_id := _id;
    IF outcome = 'done' THEN
        RETURN;
    END IF;
    SELECT a.id INTO account_id
      FROM farebox.accounts a
     WHERE (a.id = _id OR a.external_id = _external_id)
       AND (a.name, a.email, a.external_id) IS NOT DISTINCT FROM (_name, _email, _external_id);
    outcome := CASE WHEN FOUND THEN 'done' ELSE 'conflict' END;
END
$$;

-- Sets, changes or (NULL) lifts the limit of a key's family. Counts what the family spent and holds by then from its
-- holds, since nothing is counted without a limit. The account is locked.
CREATE FUNCTION farebox.set_spend_limit(_key_id text, _spend_limit bigint) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    key farebox.api_keys;
BEGIN
    SELECT * INTO key FROM farebox.api_keys k WHERE k.id = _key_id;
    IF _spend_limit IS NULL THEN
        DELETE FROM farebox.spend_limits s WHERE s.family = key.family;
        RETURN;
    END IF;
    INSERT INTO farebox.spend_limits AS s (family, account_id, spend_limit, spent, held)
    SELECT key.family, key.account_id, _spend_limit,
           coalesce(sum(h.charge - h.reversed), 0), coalesce(sum(h.amount) FILTER (WHERE h.state = 'open'), 0)
      FROM farebox.holds h
     WHERE h.account_id = key.account_id
       AND h.key_id IN (SELECT k.id FROM farebox.api_keys k WHERE k.family = key.family)
    ON CONFLICT (family) DO UPDATE SET spend_limit = _spend_limit;
END
$$;

-- An id that is taken already: 'done' where it is this very key, made by an earlier call whose reply was lost.
CREATE FUNCTION farebox.known_key(_id text, _account_id uuid, _secret_hmac bytea, _rotated_from text) RETURNS text
LANGUAGE sql AS $$
    SELECT CASE WHEN (k.account_id, k.secret_hmac, k.rotated_from)
                     IS NOT DISTINCT FROM (_account_id, _secret_hmac, _rotated_from)
                THEN 'done' ELSE 'conflict' END
      FROM farebox.api_keys k
     WHERE k.id = _id
$$;

CREATE FUNCTION farebox.create_key(
    _id text, _account_id uuid, _name text, _secret_hmac bytea, _pepper_version integer, _scopes text[], _models text[],
    _profile text, _affordable_cap boolean, _spend_limit bigint, _expires_at timestamptz
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM farebox.lock_accounts(ARRAY[_account_id], NULL);
    IF NOT EXISTS (SELECT FROM farebox.accounts a WHERE a.id = _account_id) THEN
        RETURN 'unknown';
    END IF;
    INSERT INTO farebox.api_keys (
        id, account_id, family, name, secret_hmac, pepper_version, scopes, models, profile, affordable_cap, expires_at
    ) VALUES (
        _id, _account_id, _id, _name, _secret_hmac, _pepper_version, _scopes, _models, _profile, _affordable_cap,
        _expires_at
    ) ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN farebox.known_key(_id, _account_id, _secret_hmac, NULL);
    END IF;
    PERFORM farebox.set_spend_limit(_id, _spend_limit);
    RETURN 'done';
END
$$;

-- Locks the key's account first, as every change of a key does: a reserve that waits for the account sees the change.
CREATE FUNCTION farebox.lock_key(_id text) RETURNS farebox.api_keys
LANGUAGE plpgsql AS $$
DECLARE
    key farebox.api_keys;
BEGIN
    PERFORM farebox.lock_accounts(ARRAY(SELECT k.account_id FROM farebox.api_keys k WHERE k.id = _id), NULL);
    SELECT * INTO key FROM farebox.api_keys k WHERE k.id = _id;
    RETURN key;
END
$$;

CREATE FUNCTION farebox.revoke_key(_id text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    key farebox.api_keys := farebox.lock_key(_id);
BEGIN
    IF key.id IS NULL THEN
        RETURN 'unknown';
    END IF;
    UPDATE farebox.api_keys AS k
       SET revoked_at = clock_timestamp(), version = k.version + 1
     WHERE k.id = _id AND k.revoked_at IS NULL;
    RETURN 'done';
END
$$;

-- Replaces everything about a key that can be edited. _version: the one the edit was made from; another is a conflict.
CREATE FUNCTION farebox.update_key(
    _id text, _version integer, _name text, _scopes text[], _models text[], _profile text, _affordable_cap boolean,
    _spend_limit bigint, _expires_at timestamptz
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    key farebox.api_keys := farebox.lock_key(_id);
BEGIN
    IF key.id IS NULL THEN
        RETURN 'unknown';
    END IF;
    IF key.version <> _version OR key.revoked_at IS NOT NULL THEN
        RETURN 'conflict';
    END IF;
    UPDATE farebox.api_keys AS k
       SET name = _name, scopes = _scopes, models = _models, profile = _profile, affordable_cap = _affordable_cap,
           expires_at = _expires_at, version = k.version + 1
     WHERE k.id = _id;
    PERFORM farebox.set_spend_limit(_id, _spend_limit);
    RETURN 'done';
END
$$;

-- A new key with the old one's rights, in its family; the old one ends after the overlap.
CREATE FUNCTION farebox.rotate_key(
    _id text, _new_id text, _secret_hmac bytea, _pepper_version integer, _overlap interval
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    key farebox.api_keys := farebox.lock_key(_id);
    ends_at timestamptz := clock_timestamp() + _overlap;
BEGIN
    IF key.id IS NULL THEN
        RETURN 'unknown';
    END IF;
    IF key.revoked_at IS NOT NULL OR key.expires_at <= clock_timestamp() THEN
        -- By this very rotation, it may be, whose reply was lost.
        RETURN coalesce(farebox.known_key(_new_id, key.account_id, _secret_hmac, _id), 'conflict');
    END IF;
    INSERT INTO farebox.api_keys (
        id, account_id, family, name, secret_hmac, pepper_version, scopes, models, profile, affordable_cap, expires_at,
        rotated_from
    ) VALUES (
        _new_id, key.account_id, key.family, key.name, _secret_hmac, _pepper_version, key.scopes, key.models,
        key.profile, key.affordable_cap, key.expires_at, key.id
    ) ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN farebox.known_key(_new_id, key.account_id, _secret_hmac, _id);
    END IF;
    UPDATE farebox.api_keys AS k
       SET expires_at = least(k.expires_at, ends_at), version = k.version + 1
     WHERE k.id = _id;
    RETURN 'done';
END
$$;

-- Two calls with one reference, on whatever accounts, go one after the other. Taken before any account is locked.
CREATE FUNCTION farebox.lock_reference(_kind text, _reference text) RETURNS void
LANGUAGE sql AS $$
    SELECT pg_advisory_xact_lock(hashtextextended(_kind || ':' || _reference, 1)) WHERE _reference IS NOT NULL
$$;

-- Credits an account, once for each (kind, reference). transfer_*: the row that this call or an earlier one wrote.
CREATE FUNCTION farebox.grant_credits(
    _account_id uuid, _kind text, _amount bigint, _reference text, _actor text, _reason text,
    OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    purse farebox.purse;
    known farebox.transfers;
    at timestamptz;
BEGIN
    IF _kind <> 'grant' THEN
        RAISE EXCEPTION 'no such kind of grant: %', _kind USING ERRCODE = '22023';
    END IF;
    IF _amount > 0 IS NOT TRUE THEN
        RAISE EXCEPTION 'a grant of % microcredits', _amount USING ERRCODE = '22023';
    END IF;
    PERFORM farebox.lock_reference(_kind, _reference);
    PERFORM farebox.lock_accounts(ARRAY[_account_id], NULL);
    SELECT * INTO known FROM farebox.transfers t WHERE t.kind = _kind AND t.reference = _reference;
    IF known.version IS NOT NULL THEN
        outcome := CASE WHEN known.account_id = _account_id AND known.amount = _amount THEN 'done' ELSE 'conflict' END;
        transfer_account := known.account_id;
        transfer_version := known.version;
        RETURN;
    END IF;
    purse := farebox.open_purse(_account_id);
    outcome := CASE
        WHEN purse IS NULL THEN 'unknown'
        -- Some room below what 64 bits carry, for sums.
        WHEN purse.balance > 1000000000000000000 - _amount THEN 'above_limit'
        ELSE 'done'
    END;
    IF outcome <> 'done' THEN
        RETURN;
    END IF;
    at := clock_timestamp();
    transfer_account := _account_id;
    transfer_version := purse.version + 1;
    purse := farebox.moved(purse, _kind, -_amount, 0);
    PERFORM farebox.write_down(
        ARRAY[purse], ARRAY[farebox.a_move(purse, NULL, _reference, _actor, _reason)], NULL, NULL, at
    );
END
$$;

-- Gives back a final charge, or _amount of it (NULL: all that is left), once for each reference.
CREATE FUNCTION farebox.reverse(
    _hold_id uuid, _amount bigint, _reference text, _actor text, _reason text,
    OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    purse farebox.purse;
    hold farebox.holds;
    known farebox.transfers;
    back bigint;
    at timestamptz;
BEGIN
    PERFORM farebox.lock_reference('reversal', _reference);
    PERFORM farebox.lock_accounts(ARRAY(SELECT h.account_id FROM farebox.holds h WHERE h.id = _hold_id), NULL);
    SELECT * INTO known FROM farebox.transfers t WHERE t.kind = 'reversal' AND t.reference = _reference;
    IF known.version IS NOT NULL THEN
        outcome := CASE
            WHEN known.hold_id = _hold_id AND known.amount = coalesce(_amount, known.amount) THEN 'done' ELSE 'conflict'
        END;
        transfer_account := known.account_id;
        transfer_version := known.version;
        RETURN;
    END IF;
    SELECT * INTO hold FROM farebox.holds h WHERE h.id = _hold_id;
    back := coalesce(_amount, hold.charge - hold.reversed);
    outcome := CASE
        WHEN hold.id IS NULL THEN 'unknown'
        WHEN hold.state <> 'final' THEN 'not_final'
        WHEN back <= 0 OR back > hold.charge - hold.reversed THEN 'above_charge'
        ELSE 'done'
    END;
    IF outcome <> 'done' THEN
        RETURN;
    END IF;
    at := clock_timestamp();
    purse := farebox.open_purse(hold.account_id);
    transfer_account := purse.account_id;
    transfer_version := purse.version + 1;
    purse := farebox.moved(purse, 'reversal', -back, 0);
    hold.reversed := hold.reversed + back;
    PERFORM farebox.write_down(
        ARRAY[purse], ARRAY[farebox.a_move(purse, hold.id, _reference, _actor, _reason)], NULL, ARRAY[hold], at
    );
    IF purse.limited THEN
        PERFORM farebox.count_spend(hold.key_id, 0, -back);
    END IF;
END
$$;
