-- Codes that give credits: made and ended by the operator, redeemed once by each account.

-- The same code with the same terms again is the same code. 'conflict': it has others, or was ended.
CREATE FUNCTION farebox.create_promo(
    _code text, _credits bigint, _credits_seconds bigint, _starts_at timestamptz, _ends_at timestamptz,
    _redemptions_max bigint, _actor text
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO farebox.promo_codes (code, credits, credits_seconds, starts_at, ends_at, redemptions_max, actor)
    VALUES (_code, _credits, _credits_seconds, _starts_at, _ends_at, _redemptions_max, _actor)
    ON CONFLICT DO NOTHING;
    IF FOUND THEN
        RETURN 'done';
    END IF;
    PERFORM FROM farebox.promo_codes p
      WHERE p.code = _code AND p.ended_at IS NULL
        AND (p.credits, p.credits_seconds, p.starts_at, p.ends_at, p.redemptions_max)
            IS NOT DISTINCT FROM (_credits, _credits_seconds, _starts_at, _ends_at, _redemptions_max);
    RETURN CASE WHEN FOUND THEN 'done' ELSE 'conflict' END;
END
$$;

-- From now on nobody redeems it. What was redeemed stays.
CREATE FUNCTION farebox.end_promo(_code text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE farebox.promo_codes AS p SET ended_at = coalesce(p.ended_at, clock_timestamp()) WHERE p.code = _code;
    RETURN CASE WHEN FOUND THEN 'done' ELSE 'unknown' END;
END
$$;

-- When the account may try a code again: after ten that were refused within an hour, when that hour is over. Else NULL.
CREATE FUNCTION farebox.promo_wait(_account_id uuid) RETURNS timestamptz
LANGUAGE sql AS $$
    SELECT r.since + interval '1 hour'
      FROM farebox.promo_refusals r
     WHERE r.account_id = _account_id AND r.refusals >= 10 AND r.since + interval '1 hour' > clock_timestamp()
$$;

CREATE FUNCTION farebox.count_promo_refusal(_account_id uuid) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO farebox.promo_refusals AS r (account_id, since, refusals)
    VALUES (_account_id, clock_timestamp(), 1)
    ON CONFLICT (account_id) DO UPDATE
       SET since = CASE WHEN r.since + interval '1 hour' > excluded.since THEN r.since ELSE excluded.since END,
           refusals = CASE WHEN r.since + interval '1 hour' > excluded.since THEN r.refusals + 1 ELSE 1 END
$$;

-- Gives the account the code's credits. 'again': it had them already, by the transfer that is named. 'unknown',
-- 'not_started', 'ended' and 'used_up' count as refusals; after too many of them it is 'wait', until retry_at.
CREATE FUNCTION farebox.redeem_promo(
    _account_id uuid, _code text, _actor text,
    OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint, OUT retry_at timestamptz
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    promo farebox.promo_codes;
    reference text := 'code:' || _code || ':' || _account_id;
    at timestamptz;
    credit record;
BEGIN
    -- Looked at before any lock, too: whoever tries codes by the thousand must not keep the account's calls waiting.
    SELECT r.account_id, r.version INTO transfer_account, transfer_version
      FROM farebox.promo_redemptions r WHERE r.code = _code AND r.account_id = _account_id;
    retry_at := farebox.promo_wait(_account_id);
    outcome := CASE WHEN transfer_version IS NOT NULL THEN 'again' WHEN retry_at IS NOT NULL THEN 'wait' END;
    IF outcome IS NOT NULL THEN
        RETURN;
    END IF;

    PERFORM farebox.lock_reference('promo', reference);
    PERFORM farebox.lock_accounts(ARRAY[_account_id], NULL);
    SELECT * INTO promo FROM farebox.promo_codes p WHERE p.code = _code FOR UPDATE;
    at := clock_timestamp();
    SELECT r.account_id, r.version INTO transfer_account, transfer_version
      FROM farebox.promo_redemptions r WHERE r.code = _code AND r.account_id = _account_id;
    retry_at := farebox.promo_wait(_account_id);
    outcome := CASE
        WHEN transfer_version IS NOT NULL THEN 'again'
        WHEN NOT EXISTS (SELECT FROM farebox.accounts a WHERE a.id = _account_id) THEN 'no_account'
        WHEN retry_at IS NOT NULL THEN 'wait'
        WHEN promo.code IS NULL THEN 'unknown'
        WHEN promo.starts_at > at THEN 'not_started'
        WHEN promo.ended_at IS NOT NULL OR promo.ends_at <= at THEN 'ended'
        WHEN promo.redeemed >= promo.redemptions_max THEN 'used_up'
        ELSE 'done'
    END;
    IF outcome IN ('unknown', 'not_started', 'ended', 'used_up') THEN
        PERFORM farebox.count_promo_refusal(_account_id);
    END IF;
    IF outcome <> 'done' THEN
        RETURN;
    END IF;

    SELECT * INTO credit FROM farebox.credited(
        _account_id, 'promo', promo.credits, reference, _actor, 'promo code ' || _code, 'promo',
        at + make_interval(secs => promo.credits_seconds), NULL, NULL
    );
    outcome := credit.outcome;
    transfer_account := credit.transfer_account;
    transfer_version := credit.transfer_version;
    IF outcome <> 'done' THEN
        RETURN;
    END IF;
    INSERT INTO farebox.promo_redemptions (code, account_id, version) VALUES (_code, _account_id, transfer_version);
    UPDATE farebox.promo_codes AS p SET redeemed = p.redeemed + 1 WHERE p.code = _code;
END
$$;

GRANT EXECUTE ON FUNCTION farebox.create_promo, farebox.end_promo, farebox.redeem_promo TO farebox_control;
