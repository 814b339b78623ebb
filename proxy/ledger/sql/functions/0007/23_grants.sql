-- Credits given by hand.

-- Credits an account with a lot of that kind, once for each (_kind, _reference), whatever is then said of its expiry.
-- _kind: grant or promo. _expires_at NULL: never. _priority NULL: the kind's own; lots of a lower number are drawn first.
-- Outcomes: done, conflict, unknown, above_limit; expired: it would be from the beginning.
CREATE FUNCTION farebox.grant_lot(
    _account_id uuid, _kind text, _amount bigint, _reference text, _actor text, _reason text,
    _expires_at timestamptz, _priority integer,
    OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF _kind IN ('grant', 'promo') IS NOT TRUE THEN
        RAISE EXCEPTION 'no such kind of grant: %', _kind USING ERRCODE = '22023';
    END IF;
    IF _priority NOT BETWEEN 0 AND 1000 THEN
        RAISE EXCEPTION 'a priority of %', _priority USING ERRCODE = '22023';
    END IF;
    PERFORM farebox.lock_reference(_kind, _reference);
    PERFORM farebox.lock_accounts(ARRAY[_account_id], NULL);
    IF _expires_at <= clock_timestamp()
       AND NOT EXISTS (SELECT FROM farebox.transfers t WHERE t.kind = _kind AND t.reference = _reference) THEN
        outcome := 'expired';
        RETURN;
    END IF;
    SELECT c.* INTO outcome, transfer_account, transfer_version
      FROM farebox.credited(
               _account_id, _kind, _amount, _reference, _actor, _reason,
               CASE _kind WHEN 'promo' THEN 'promo' ELSE 'granted' END, _expires_at, _priority, NULL
           ) AS c;
END
$$;

-- As releases before lots say it.
CREATE OR REPLACE FUNCTION farebox.grant_credits(
    _account_id uuid, _kind text, _amount bigint, _reference text, _actor text, _reason text,
    OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF _kind <> 'grant' THEN
        RAISE EXCEPTION 'no such kind of grant: %', _kind USING ERRCODE = '22023';
    END IF;
    SELECT g.* INTO outcome, transfer_account, transfer_version
      FROM farebox.grant_lot(_account_id, _kind, _amount, _reference, _actor, _reason, NULL, NULL) AS g;
END
$$;

GRANT EXECUTE ON FUNCTION farebox.grant_lot TO farebox_control;
