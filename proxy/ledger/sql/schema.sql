-- What the migrations make, for reading. Written by `make schema` from a migrated database; a test proves it equal.
-- Nothing runs this file.

CREATE SCHEMA farebox;

CREATE TYPE farebox.audit_check AS (
	name text,
	checked bigint,
	violations bigint,
	example text
);

CREATE TYPE farebox.move AS (
	account_id uuid,
	kind text,
	due bigint,
	lent bigint,
	paid bigint,
	balance bigint,
	debt bigint,
	version bigint,
	hold_id uuid,
	reference text,
	actor text,
	reason text
);

CREATE TYPE farebox.purse AS (
	account_id uuid,
	balance bigint,
	held bigint,
	debt bigint,
	version bigint,
	limited boolean,
	kind text,
	due bigint,
	lent bigint,
	paid bigint
);

CREATE FUNCTION farebox.a_move(_purse farebox.purse, _hold_id uuid, _reference text DEFAULT NULL::text, _actor text DEFAULT NULL::text, _reason text DEFAULT NULL::text) RETURNS farebox.move
    LANGUAGE sql IMMUTABLE
    AS $$
    SELECT ROW(_purse.account_id, _purse.kind, _purse.due, _purse.lent, _purse.paid, _purse.balance, _purse.debt,
               _purse.version, _hold_id, _reference, _actor, _reason)::farebox.move
$$;

CREATE FUNCTION farebox.audit() RETURNS SETOF farebox.audit_check
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    SET work_mem TO '64MB'
    AS $$
BEGIN
    RETURN QUERY SELECT * FROM farebox.audit_visibility();
    RETURN QUERY SELECT * FROM farebox.audit_accounts();
    RETURN QUERY SELECT * FROM farebox.audit_chain();
    RETURN QUERY SELECT * FROM farebox.audit_charges();
    RETURN QUERY SELECT * FROM farebox.audit_kinds();
    RETURN QUERY SELECT * FROM farebox.audit_prices();
    RETURN QUERY SELECT * FROM farebox.audit_price_versions();
    RETURN QUERY SELECT * FROM farebox.audit_leases();
    RETURN QUERY SELECT * FROM farebox.audit_limits();
END
$$;

CREATE FUNCTION farebox.audit_accounts() RETURNS SETOF farebox.audit_check
    LANGUAGE sql STABLE
    AS $$
    WITH book AS (
        SELECT t.account_id, count(*) AS transfers, min(t.version) AS first, max(t.version) AS last,
               sum(CASE t.account_side WHEN 'credit' THEN t.amount ELSE -t.amount END) AS balance,
               sum(CASE t.account_side WHEN 'credit' THEN t.amount ELSE -t.amount END)
                   FILTER (WHERE t.system_account = 'receivable') AS debt
          FROM farebox.transfers t
         GROUP BY t.account_id
    ), open AS (
        SELECT h.account_id, sum(h.amount) AS held FROM farebox.holds h WHERE h.state = 'open' GROUP BY h.account_id
    ), compared AS (
        -- Full joins: transfers and open holds of an account that doesn't exist break the same checks.
        SELECT coalesce(a.id, b.account_id, o.account_id)::text AS id,
               a.balance IS NOT DISTINCT FROM coalesce(b.balance, 0) AS balance,
               a.held IS NOT DISTINCT FROM coalesce(o.held, 0) AS held,
               a.debt IS NOT DISTINCT FROM coalesce(b.debt, 0) AS debt,
               a.version IS NOT DISTINCT FROM coalesce(b.last, 0)
                   AND coalesce(b.first, 1) = 1 AND coalesce(b.transfers, 0) = coalesce(b.last, 0) AS versions,
               coalesce(
                   a.held >= 0 AND a.balance >= a.held AND a.debt >= 0 AND (a.debt = 0 OR a.balance = a.held), false
               ) AS limits
          FROM farebox.accounts a
          FULL JOIN book b ON b.account_id = a.id
          FULL JOIN open o ON o.account_id = coalesce(a.id, b.account_id)
    )
    SELECT v.name, c.checked, v.violations, v.example
      FROM (
               SELECT count(*) AS checked,
                      count(*) FILTER (WHERE NOT j.balance) AS v1, min(j.id) FILTER (WHERE NOT j.balance) AS e1,
                      count(*) FILTER (WHERE NOT j.held) AS v2, min(j.id) FILTER (WHERE NOT j.held) AS e2,
                      count(*) FILTER (WHERE NOT j.debt) AS v3, min(j.id) FILTER (WHERE NOT j.debt) AS e3,
                      count(*) FILTER (WHERE NOT j.versions) AS v4, min(j.id) FILTER (WHERE NOT j.versions) AS e4,
                      count(*) FILTER (WHERE NOT j.limits) AS v5, min(j.id) FILTER (WHERE NOT j.limits) AS e5
                 FROM compared j
           ) AS c,
           LATERAL (VALUES
               ('balance_is_the_sum_of_transfers', c.v1, c.e1),
               ('held_is_the_sum_of_open_holds', c.v2, c.e2),
               ('debt_is_what_receivable_lent', c.v3, c.e3),
               ('versions_are_gapless', c.v4, c.e4),
               ('nothing_is_negative_and_debt_is_paid_first', c.v5, c.e5)
           ) AS v (name, violations, example)
$$;

CREATE FUNCTION farebox.audit_chain() RETURNS SETOF farebox.audit_check
    LANGUAGE sql STABLE
    AS $$
    WITH signed AS (
        SELECT t.account_id, t.version, t.balance_after, t.debt_after,
               lag(t.balance_after, 1, 0) OVER w AS balance_before, lag(t.debt_after, 1, 0) OVER w AS debt_before,
               CASE t.account_side WHEN 'credit' THEN t.amount ELSE -t.amount END AS amount,
               CASE t.system_account WHEN 'receivable' THEN 1 ELSE 0 END AS lent
          FROM farebox.transfers t
        WINDOW w AS (PARTITION BY t.account_id ORDER BY t.version)
    ), broken AS (
        SELECT s.account_id || '-' || s.version AS id
          FROM signed s
         WHERE s.balance_after <> s.balance_before + s.amount OR s.debt_after <> s.debt_before + s.lent * s.amount
    )
    SELECT 'balances_chain_from_transfer_to_transfer', (SELECT count(*) FROM farebox.transfers),
           (SELECT count(*) FROM broken), (SELECT min(b.id) FROM broken b)
$$;

CREATE FUNCTION farebox.audit_charges() RETURNS SETOF farebox.audit_check
    LANGUAGE sql STABLE
    AS $$
    WITH book AS (
        SELECT t.hold_id, t.account_id,
               coalesce(sum(CASE t.account_side WHEN 'debit' THEN t.amount ELSE -t.amount END)
                            FILTER (WHERE t.kind IN ('charge', 'true_up')), 0) AS charge,
               coalesce(sum(t.amount) FILTER (WHERE t.kind = 'overrun'), 0) AS overrun,
               coalesce(sum(t.amount) FILTER (WHERE t.kind = 'reversal'), 0) AS reversed
          FROM farebox.transfers t
         WHERE t.kind IN ('charge', 'true_up', 'overrun', 'reversal')
         GROUP BY t.hold_id, t.account_id
    ), compared AS (
        SELECT coalesce(h.id, b.hold_id)::text AS id,
               h.id IS NOT NULL
                   AND (coalesce(h.charge, 0), h.overrun, h.reversed)
                     = (coalesce(b.charge, 0), coalesce(b.overrun, 0), coalesce(b.reversed, 0)) AS kept,
               -- A provisional end may be trued up yet, and a final or released one never again.
               coalesce(CASE h.state
                   WHEN 'released' THEN h.charge = 0 AND h.settle_fingerprint IS NULL
                   WHEN 'provisional' THEN h.ending = 'worker_gone' AND h.settle_fingerprint IS NULL
                   WHEN 'final' THEN h.settle_fingerprint IS NOT NULL OR h.charge = 0
                   ELSE true
               END, false) AS ended_so
          FROM farebox.holds h
          FULL JOIN book b ON b.hold_id = h.id AND b.account_id = h.account_id
    )
    SELECT v.name, c.checked, v.violations, v.example
      FROM (
               SELECT count(*) AS checked,
                      count(*) FILTER (WHERE NOT j.kept) AS v1, min(j.id) FILTER (WHERE NOT j.kept) AS e1,
                      count(*) FILTER (WHERE NOT j.ended_so) AS v2, min(j.id) FILTER (WHERE NOT j.ended_so) AS e2
                 FROM compared j
           ) AS c,
           LATERAL (VALUES
               ('every_hold_was_charged_what_its_transfers_say', c.v1, c.e1),
               ('every_hold_ended_as_its_state_says', c.v2, c.e2)
           ) AS v (name, violations, example)
$$;

CREATE FUNCTION farebox.audit_kinds() RETURNS SETOF farebox.audit_check
    LANGUAGE sql STABLE
    AS $$
    WITH judged AS (
        SELECT t.account_id || '-' || t.version AS id,
               CASE t.kind
                   WHEN 'grant' THEN (t.account_side, t.system_account) = ('credit', 'grants') AND t.hold_id IS NULL
                   WHEN 'charge' THEN (t.account_side, t.system_account) = ('debit', 'revenue')
                   WHEN 'true_up' THEN t.system_account = 'revenue'
                   WHEN 'reversal' THEN (t.account_side, t.system_account) = ('credit', 'revenue')
                   WHEN 'overrun' THEN (t.account_side, t.system_account) = ('credit', 'receivable')
                   WHEN 'debt_payment' THEN (t.account_side, t.system_account) = ('debit', 'receivable')
                   ELSE false
               END AS kept
          FROM farebox.transfers t
    )
    SELECT 'transfers_move_between_the_sides_of_their_kind', count(*), count(*) FILTER (WHERE NOT j.kept),
           min(j.id) FILTER (WHERE NOT j.kept)
      FROM judged j
$$;

CREATE FUNCTION farebox.audit_leases() RETURNS SETOF farebox.audit_check
    LANGUAGE sql STABLE
    AS $$
    WITH judged AS (
        SELECT h.id::text AS id,
               w.id IS NOT NULL AND (
                   w.lease_until > statement_timestamp() - interval '5 minutes'
                   -- Nobody sweeps while no worker runs, nor soon after Postgres came up or after workers were cut off
                   -- from it: one that has been there for a while should have.
                   OR farebox.postgres_started() > statement_timestamp() - interval '5 minutes'
                   OR NOT EXISTS (
                       SELECT FROM farebox.workers live
                        WHERE live.lease_until > statement_timestamp()
                          AND live.started_at < statement_timestamp() - interval '5 minutes'
                          AND live.held_since < statement_timestamp() - interval '5 minutes'
                   )
               ) AS kept
          FROM farebox.holds h LEFT JOIN farebox.workers w ON w.id = h.worker_id
         WHERE h.state = 'open'
    )
    SELECT 'open_holds_belong_to_a_live_worker', count(*), count(*) FILTER (WHERE NOT j.kept),
           min(j.id) FILTER (WHERE NOT j.kept)
      FROM judged j
$$;

CREATE FUNCTION farebox.audit_limits() RETURNS SETOF farebox.audit_check
    LANGUAGE sql STABLE
    AS $$
    WITH spent AS (
        SELECT s.family, s.spent, s.held, k.account_id = s.account_id AS known,
               coalesce(sum(h.charge - h.reversed), 0) AS charged,
               coalesce(sum(h.amount) FILTER (WHERE h.state = 'open'), 0) AS open
          FROM farebox.spend_limits s
          LEFT JOIN farebox.api_keys k USING (family)
          LEFT JOIN farebox.holds h ON h.account_id = k.account_id AND h.key_id = k.id
         GROUP BY s.family, k.account_id
    ), judged AS (
        SELECT s.family, coalesce(s.known AND (s.spent, s.held) = (s.charged, s.open), false) AS kept FROM spent s
    )
    SELECT 'spend_limits_count_what_was_spent', count(*), count(*) FILTER (WHERE NOT j.kept),
           min(j.family) FILTER (WHERE NOT j.kept)
      FROM judged j
$$;

CREATE FUNCTION farebox.audit_price_versions() RETURNS SETOF farebox.audit_check
    LANGUAGE sql STABLE
    AS $$
    WITH said AS (
        SELECT v.version, r.* FROM farebox.price_versions v, LATERAL farebox.price_rows(v.body) AS r
    ), broken AS (
        SELECT coalesce(s.version, p.version) AS version
          FROM said s FULL JOIN farebox.prices p USING (version, model, variant)
         WHERE (s.rates, s.per_request) IS DISTINCT FROM (p.rates, p.per_request)
        UNION
        SELECT v.version FROM farebox.price_versions v
         WHERE encode(sha256(convert_to(v.body, 'UTF8')), 'hex') <> v.version
    )
    SELECT 'price_versions_are_their_hash', (SELECT count(*) FROM farebox.price_versions),
           (SELECT count(*) FROM broken), (SELECT min(b.version) FROM broken b)
$$;

CREATE FUNCTION farebox.audit_prices() RETURNS SETOF farebox.audit_check
    LANGUAGE sql STABLE
    AS $$
    WITH costs AS (
        SELECT h.id::text AS id, h.charge,
               -- Ours says to what; the gateway's own reasons don't.
               CASE h.capped WHEN 'counted_above_hold' THEN h.charge >= h.amount ELSE h.capped IS NOT NULL END
                   AS capped,
               CASE WHEN h.usage IS NULL THEN 0 ELSE farebox.charge_at(p.rates, p.per_request, h.usage) END AS cost,
               h.usage_source IS DISTINCT FROM 'counted' OR h.fingerprint IS NULL OR h.charge <= h.amount AS within_hold
          FROM farebox.holds h
          LEFT JOIN farebox.prices p ON p.version = h.price_version AND p.model = h.model AND p.variant = h.variant
         WHERE h.state <> 'open'
    ), judged AS (
        SELECT c.id, c.within_hold,
               coalesce(c.charge = c.cost OR (c.capped AND c.charge < c.cost), false) AS kept
          FROM costs c
    )
    SELECT v.name, c.checked, v.violations, v.example
      FROM (
               SELECT count(*) AS checked,
                      count(*) FILTER (WHERE NOT j.kept) AS v1, min(j.id) FILTER (WHERE NOT j.kept) AS e1,
                      count(*) FILTER (WHERE NOT j.within_hold) AS v2, min(j.id) FILTER (WHERE NOT j.within_hold) AS e2
                 FROM judged j
           ) AS c,
           LATERAL (VALUES
               ('charges_recompute_from_usage_and_price', c.v1, c.e1),
               ('counted_charges_stay_within_their_hold', c.v2, c.e2)
           ) AS v (name, violations, example)
$$;

CREATE FUNCTION farebox.audit_visibility() RETURNS SETOF farebox.audit_check
    LANGUAGE sql STABLE
    AS $$
    WITH counted (relation, rows) AS (
        SELECT 'accounts', count(*) FROM farebox.accounts
        UNION ALL SELECT 'api_keys', count(*) FROM farebox.api_keys
        UNION ALL SELECT 'holds', count(*) FROM farebox.holds
        UNION ALL SELECT 'price_versions', count(*) FROM farebox.price_versions
        UNION ALL SELECT 'transfers', count(*) FROM farebox.transfers
        UNION ALL SELECT 'workers', count(*) FROM farebox.workers
    ), judged AS (
        SELECT c.*, c.rows = 0 AND pg_stat_get_live_tuples(('farebox.' || c.relation)::regclass) > 0 AS hidden
          FROM counted c
    )
    SELECT 'rows_are_visible', sum(j.rows)::bigint, count(*) FILTER (WHERE j.hidden),
           min(j.relation) FILTER (WHERE j.hidden)
      FROM judged j
$$;

CREATE TABLE farebox.idempotency_keys (
    account_id uuid NOT NULL,
    key_hash bytea NOT NULL,
    fingerprint bytea NOT NULL,
    hold_id uuid NOT NULL,
    worker_id uuid NOT NULL,
    claimed_at timestamp with time zone NOT NULL,
    CONSTRAINT idempotency_keys_key_hash_check CHECK ((length(key_hash) = 32))
)
WITH (fillfactor='90', autovacuum_vacuum_scale_factor='0.02');

CREATE FUNCTION farebox.bar_claim(_claim farebox.idempotency_keys) RETURNS boolean
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION farebox.batch(_reserves integer, _finalizes integer, _hold_ids uuid[], _account_ids uuid[], _key_ids text[], _amounts bigint[], _notes text[], _fingerprints bytea[], _terms integer[], _key_versions integer[], _at_leasts bigint[], _usages bigint[], _worker_ids uuid[], _price_versions text[], _models text[], _variants text[], _usage_sources text[], _capped text[], _endings text[], _wait_ms integer) RETURNS TABLE(row_number bigint, outcome text, amount bigint, overrun bigint, balance bigint, held bigint, debt bigint, spend_left bigint)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET enable_hashjoin TO 'off'
    SET enable_mergejoin TO 'off'
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
                   WHEN k.version <> u.key_version OR k.revoked_at IS NOT NULL THEN 'key_changed'
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

CREATE FUNCTION farebox.charge_at(_rates bigint[], _per_request bigint, _usage bigint[]) RETURNS numeric
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    AS $$
    SELECT CASE
        WHEN 1073741824 > ALL (_rates) AND 1073741824 > ALL (_usage) THEN (
            _per_request + (
                _rates[1] * _usage[1] + _rates[2] * _usage[2] + _rates[3] * _usage[3] + _rates[4] * _usage[4]
                + _rates[5] * _usage[5] + _rates[6] * _usage[6] + _rates[7] * _usage[7] + 999999
            ) / 1000000
        )::numeric
        ELSE _per_request + div(
            _rates[1]::numeric * _usage[1] + _rates[2]::numeric * _usage[2] + _rates[3]::numeric * _usage[3]
            + _rates[4]::numeric * _usage[4] + _rates[5]::numeric * _usage[5] + _rates[6]::numeric * _usage[6]
            + _rates[7]::numeric * _usage[7] + 999999,
            1000000
        )
    END
$$;

CREATE FUNCTION farebox.charge_for(_version text, _model text, _variant text, _usage bigint[]) RETURNS numeric
    LANGUAGE sql STABLE
    AS $$
    SELECT farebox.charge_at(p.rates, p.per_request, _usage)
      FROM farebox.prices p
     WHERE p.version = _version AND p.model = _model AND p.variant = _variant
$$;

CREATE FUNCTION farebox.claim_key(_account_id uuid, _key_hash bytea, _fingerprint bytea, _hold_id uuid, _worker_id uuid, OUT outcome text, OUT hold_id uuid, OUT head text, OUT body bytea) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_seqscan TO 'off'
    AS $$
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

CREATE FUNCTION farebox.claim_state(_claim farebox.idempotency_keys) RETURNS text
    LANGUAGE plpgsql STABLE
    SET enable_seqscan TO 'off'
    AS $$
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

CREATE FUNCTION farebox.count_spend(_key_id text, _held bigint, _spent bigint) RETURNS void
    LANGUAGE sql
    AS $$
    UPDATE farebox.spend_limits s
       SET held = s.held + _held, spent = s.spent + _spent
      FROM farebox.api_keys k
     WHERE k.id = _key_id AND s.family = k.family
$$;

CREATE FUNCTION farebox.create_account(_id uuid, _name text, _external_id text, _email text, OUT outcome text, OUT account_id uuid) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION farebox.create_key(_id text, _account_id uuid, _name text, _secret_hmac bytea, _pepper_version integer, _scopes text[], _models text[], _profile text, _affordable_cap boolean, _spend_limit bigint, _expires_at timestamp with time zone) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION farebox.expire_holds(_limit integer, _restart_grace interval) RETURNS TABLE(hold_id uuid, account_id uuid, charge bigint)
    LANGUAGE sql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    SELECT * FROM farebox.sweep(_limit, _restart_grace, NULL)
$$;

CREATE FUNCTION farebox.extend(_hold_id uuid, _account_id uuid, _worker_id uuid, _by bigint, _at_least bigint, OUT granted bigint, OUT total bigint, OUT state text) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
DECLARE
    purse farebox.purse;
    hold farebox.holds;
    addable bigint;
BEGIN
    PERFORM farebox.lock_accounts(ARRAY[_account_id], NULL);
    purse := farebox.open_purse(_account_id);
    SELECT * INTO hold FROM farebox.holds h WHERE h.id = _hold_id AND h.account_id = _account_id;
    granted := 0;
    total := coalesce(hold.amount, 0);
    state := coalesce(hold.state, 'unknown');
    IF state <> 'open' OR hold.worker_id <> _worker_id OR purse.debt > 0 THEN
        RETURN;
    END IF;
    IF NOT EXISTS (SELECT FROM farebox.workers w WHERE w.id = _worker_id AND w.lease_until > clock_timestamp()) THEN
        RETURN;
    END IF;
    addable := least(_by, purse.balance - purse.held, CASE WHEN purse.limited THEN farebox.spend_left(hold.key_id) END);
    IF addable < _at_least OR addable <= 0 THEN
        RETURN;
    END IF;
    granted := addable;
    total := hold.amount + granted;
    hold.amount := total;
    PERFORM farebox.write_down(
        ARRAY[farebox.moved(purse, NULL, 0, -granted)], NULL, NULL, ARRAY[hold], clock_timestamp()
    );
    IF purse.limited THEN
        PERFORM farebox.count_spend(hold.key_id, granted, 0);
    END IF;
END
$$;

CREATE FUNCTION farebox.extend_holds(_hold_ids uuid[], _account_ids uuid[], _worker_ids uuid[], _totals bigint[], _at_leasts bigint[], _wait_ms integer) RETURNS TABLE(row_number bigint, outcome text, amount bigint, balance bigint, held bigint, debt bigint, spend_left bigint)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET enable_hashjoin TO 'off'
    SET enable_mergejoin TO 'off'
    AS $$
#variable_conflict use_column
DECLARE
    busy uuid[] := farebox.lock_accounts(_account_ids, _wait_ms);
    at timestamptz := clock_timestamp();
    entry record;
    hold farebox.holds;
    purse farebox.purse;
    purse_moved boolean := false;
    hold_moved boolean := false;
    growth bigint;
    purses farebox.purse[];
    changed_holds farebox.holds[];
BEGIN
    -- A later statement than the lock: a waiter sees the holds as they are now.
    FOR entry IN
        SELECT u.*, h AS known_hold, a.id AS known_account, a.balance, a.held, a.debt, a.version,
               EXISTS (SELECT FROM farebox.spend_limits s WHERE s.account_id = u.account_id) AS limited,
               coalesce(w.lease_until > at, false) AS leased,
               s.spend_limit - s.spent AS spendable
          FROM unnest(_hold_ids, _account_ids, _worker_ids, _totals, _at_leasts) WITH ORDINALITY
                   AS u (hold_id, account_id, worker_id, total, at_least, n)
          LEFT JOIN farebox.accounts a ON a.id = u.account_id
          LEFT JOIN farebox.holds h ON h.id = u.hold_id
          LEFT JOIN farebox.workers w ON w.id = u.worker_id
          LEFT JOIN farebox.api_keys k ON k.id = h.key_id
          LEFT JOIN farebox.spend_limits s ON s.family = k.family
         ORDER BY u.account_id, u.hold_id, u.n
    LOOP
        row_number := entry.n;
        amount := 0;
        balance := 0;
        held := 0;
        debt := 0;
        spend_left := NULL;
        IF entry.known_account IS NULL OR entry.account_id = ANY (busy) THEN
            outcome := CASE WHEN entry.known_account IS NULL THEN 'unknown' ELSE 'busy' END;
            RETURN NEXT;
            CONTINUE;
        END IF;
        IF hold_moved AND (hold.id, hold.account_id) IS DISTINCT FROM (entry.hold_id, entry.account_id) THEN
            changed_holds := changed_holds || hold;
            hold_moved := false;
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

        IF hold.id IS NULL THEN
            outcome := 'unknown';
        ELSIF hold.account_id <> entry.account_id OR hold.worker_id <> entry.worker_id THEN
            outcome := 'conflict';
        ELSIF hold.state <> 'open' THEN
            outcome := 'ended';
            amount := hold.amount;
        ELSE
            IF purse.limited THEN
                spend_left := farebox.spend_left(hold.key_id);
            END IF;
            -- While debt stands nothing is available.
            growth := CASE
                WHEN entry.leased
                THEN greatest(least(entry.total - hold.amount, purse.balance - purse.held, spend_left), 0)
                ELSE 0
            END;
            outcome := CASE
                WHEN hold.amount + growth >= entry.at_least THEN 'extended'
                WHEN NOT entry.leased THEN 'worker_lapsed'
                WHEN purse.debt > 0 OR purse.balance < entry.at_least THEN 'insufficient'
                WHEN entry.spendable < entry.at_least THEN 'spend_limit'
                ELSE 'credits_held'
            END;
            IF outcome = 'extended' AND growth > 0 THEN
                hold.amount := hold.amount + growth;
                hold_moved := true;
                purse := farebox.moved(purse, NULL, 0, -growth);
                purse_moved := true;
                IF spend_left IS NOT NULL THEN
                    PERFORM farebox.count_spend(hold.key_id, growth, 0);
                    spend_left := spend_left - growth;
                END IF;
            END IF;
            amount := hold.amount;
        END IF;

        balance := purse.balance;
        held := purse.held;
        debt := purse.debt;
        RETURN NEXT;
    END LOOP;
    IF hold_moved THEN
        changed_holds := changed_holds || hold;
    END IF;
    IF purse_moved THEN
        purses := purses || purse;
    END IF;
    PERFORM farebox.write_down(purses, NULL, NULL, changed_holds, at);
END
$$;

CREATE FUNCTION farebox.find_key(_key_id text) RETURNS TABLE(id text, account_id uuid, name text, secret_hmac bytea, pepper_version integer, scopes text[], models text[], profile text, affordable_cap boolean, spend_limit bigint, spent bigint, version integer, created_at timestamp with time zone, expires_at timestamp with time zone, revoked_at timestamp with time zone, rotated_from text)
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    SELECT k.id, k.account_id, k.name, k.secret_hmac, k.pepper_version, k.scopes, k.models, k.profile, k.affordable_cap,
           s.spend_limit, coalesce(s.spent, 0), k.version, k.created_at, k.expires_at, k.revoked_at, k.rotated_from
      FROM farebox.api_keys k
      LEFT JOIN farebox.spend_limits s USING (family)
     WHERE k.id = _key_id
$$;

CREATE FUNCTION farebox.forget_keys(_limit integer, _keep interval) RETURNS integer
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION farebox.free_key(_account_id uuid, _key_hash bytea, _hold_id uuid) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_seqscan TO 'off'
    AS $$
BEGIN
    DELETE FROM farebox.idempotency_keys k
     WHERE k.account_id = _account_id AND k.key_hash = _key_hash AND k.hold_id = _hold_id
       AND NOT EXISTS (SELECT FROM farebox.holds h WHERE h.id = _hold_id);
    RETURN FOUND;
END
$$;

CREATE FUNCTION farebox.grant_credits(_account_id uuid, _kind text, _amount bigint, _reference text, _actor text, _reason text, OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION farebox.greater_usage(_a bigint[], _b bigint[]) RETURNS bigint[]
    LANGUAGE sql IMMUTABLE
    AS $$
    SELECT ARRAY[
        greatest(_a[1], _b[1]), greatest(_a[2], _b[2]), greatest(_a[3], _b[3]), greatest(_a[4], _b[4]),
        greatest(_a[5], _b[5]), greatest(_a[6], _b[6]), greatest(_a[7], _b[7])
    ]
$$;

CREATE FUNCTION farebox.heartbeat(_worker_id uuid, _hold_ids uuid[], _usages bigint[]) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    IF NOT farebox.renew_lease(_worker_id) THEN
        RETURN false;
    END IF;
    WITH given AS MATERIALIZED (
        SELECT u.id, _usages[u.n * 7 - 6 : u.n * 7] AS usage FROM unnest(_hold_ids) WITH ORDINALITY AS u (id, n)
    ), free AS MATERIALIZED (
        SELECT h.id
          FROM farebox.holds h
         WHERE h.id = ANY (_hold_ids) AND h.worker_id = _worker_id AND h.state = 'open'
         ORDER BY h.id
           FOR NO KEY UPDATE SKIP LOCKED
    )
    UPDATE farebox.holds AS h
       SET mark = farebox.greater_usage(h.mark, given.usage)
      FROM free JOIN given USING (id)
     WHERE h.id = free.id AND h.state = 'open';
    RETURN true;
END
$$;

CREATE FUNCTION farebox.keep_answer(_hold_id uuid, _head text, _body bytea, _keep interval) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    INSERT INTO farebox.idempotency_answers (hold_id, head, body, expires_at)
    VALUES (_hold_id, _head, _body, clock_timestamp() + _keep)
    ON CONFLICT DO NOTHING;
    RETURN FOUND;
END
$$;

CREATE FUNCTION farebox.known_key(_id text, _account_id uuid, _secret_hmac bytea, _rotated_from text) RETURNS text
    LANGUAGE sql
    AS $$
    SELECT CASE WHEN (k.account_id, k.secret_hmac, k.rotated_from)
                     IS NOT DISTINCT FROM (_account_id, _secret_hmac, _rotated_from)
                THEN 'done' ELSE 'conflict' END
      FROM farebox.api_keys k
     WHERE k.id = _id
$$;

CREATE FUNCTION farebox.lease_length() RETURNS interval
    LANGUAGE sql IMMUTABLE
    AS $$ SELECT interval '30 seconds' $$;

CREATE FUNCTION farebox.ledger_id() RETURNS uuid
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    SELECT i.id FROM farebox.ledger_identity i
$$;

CREATE FUNCTION farebox.lock_accounts(_account_ids uuid[], _wait_ms integer) RETURNS uuid[]
    LANGUAGE plpgsql
    SET enable_seqscan TO 'off'
    AS $$
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

CREATE TABLE farebox.api_keys (
    id text NOT NULL,
    account_id uuid NOT NULL,
    family text NOT NULL,
    name text NOT NULL,
    secret_hmac bytea NOT NULL,
    pepper_version integer NOT NULL,
    scopes text[] NOT NULL,
    models text[],
    profile text,
    affordable_cap boolean NOT NULL,
    version integer DEFAULT 1 NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    expires_at timestamp with time zone,
    revoked_at timestamp with time zone,
    rotated_from text
);

CREATE FUNCTION farebox.lock_key(_id text) RETURNS farebox.api_keys
    LANGUAGE plpgsql
    AS $$
DECLARE
    key farebox.api_keys;
BEGIN
    PERFORM farebox.lock_accounts(ARRAY(SELECT k.account_id FROM farebox.api_keys k WHERE k.id = _id), NULL);
    SELECT * INTO key FROM farebox.api_keys k WHERE k.id = _id;
    RETURN key;
END
$$;

CREATE FUNCTION farebox.lock_lapsed(_worker_ids uuid[], _at timestamp with time zone) RETURNS uuid[]
    LANGUAGE sql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    SELECT ARRAY(
        SELECT w.id
          FROM farebox.workers w
         WHERE w.id = ANY (_worker_ids) AND w.lease_until <= _at
         ORDER BY w.id
           FOR NO KEY UPDATE SKIP LOCKED
    )
$$;

CREATE FUNCTION farebox.lock_reference(_kind text, _reference text) RETURNS void
    LANGUAGE sql
    AS $$
    SELECT pg_advisory_xact_lock(hashtextextended(_kind || ':' || _reference, 1)) WHERE _reference IS NOT NULL
$$;

CREATE FUNCTION farebox.moved(INOUT purse farebox.purse, _kind text, _due bigint, _freed bigint) RETURNS farebox.purse
    LANGUAGE plpgsql IMMUTABLE
    AS $$
BEGIN
    purse.held := purse.held - _freed;
    purse.kind := _kind;
    purse.due := _due;
    purse.lent := CASE WHEN _due > 0 THEN greatest(_due - (purse.balance - purse.held), 0) ELSE 0 END;
    purse.balance := purse.balance + purse.lent - _due;
    purse.debt := purse.debt + purse.lent;
    purse.paid := least(purse.debt, purse.balance - purse.held);
    purse.balance := purse.balance - purse.paid;
    purse.debt := purse.debt - purse.paid;
    -- Each of the three is a transfer and takes a version.
    purse.version := purse.version + (purse.lent > 0)::integer + (_due <> 0)::integer + (purse.paid > 0)::integer;
END
$$;

CREATE FUNCTION farebox.open_purse(_account_id uuid) RETURNS farebox.purse
    LANGUAGE sql
    AS $$
    SELECT a.id, a.balance, a.held, a.debt, a.version,
           EXISTS (SELECT FROM farebox.spend_limits s WHERE s.account_id = a.id),
           NULL::text, 0::bigint, 0::bigint, 0::bigint
      FROM farebox.accounts a
     WHERE a.id = _account_id
$$;

CREATE FUNCTION farebox.postgres_started() RETURNS timestamp with time zone
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$ SELECT pg_postmaster_start_time() $$;

CREATE FUNCTION farebox.price_rows(_body text) RETURNS TABLE(model text, variant text, rates bigint[], per_request bigint)
    LANGUAGE sql IMMUTABLE
    AS $$
    SELECT route.key, priced.key,
           ARRAY(SELECT r.value::bigint
                   FROM jsonb_array_elements_text(priced.value -> 'rates') WITH ORDINALITY AS r (value, position)
                  ORDER BY r.position),
           (priced.value ->> 'per_request')::bigint
      FROM jsonb_each(_body::jsonb -> 'routes') AS route,
           jsonb_each(route.value -> 'variants') AS priced
$$;

CREATE FUNCTION farebox.put_price_version(_version text, _body text) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    IF encode(sha256(convert_to(_body, 'UTF8')), 'hex') IS DISTINCT FROM _version THEN
        RAISE EXCEPTION 'price version % is not the SHA-256 of its body', left(_version, 64) USING ERRCODE = '22023';
    END IF;
    INSERT INTO farebox.price_versions (version, body) VALUES (_version, _body) ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO farebox.prices (version, model, variant, rates, per_request)
    SELECT _version, r.model, r.variant, r.rates, r.per_request FROM farebox.price_rows(_body) AS r;
    RETURN true;
END
$$;

CREATE FUNCTION farebox.refuse_change() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    RAISE EXCEPTION '% on farebox.%: its rows are never changed or removed', TG_OP, TG_TABLE_NAME
        USING ERRCODE = '55000';
END
$$;

CREATE FUNCTION farebox.renew(_worker_id uuid, _beat bigint, _hold_ids uuid[], _usages bigint[]) RETURNS uuid[]
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET enable_hashjoin TO 'off'
    SET enable_mergejoin TO 'off'
    AS $$
DECLARE
    last bigint;
    marked uuid[];
BEGIN
    SELECT w.beat INTO last FROM farebox.workers w WHERE w.id = _worker_id FOR NO KEY UPDATE;
    IF _beat <= last THEN
        RETURN '{}';
    END IF;
    IF NOT farebox.renew_lease(_worker_id) THEN
        RETURN NULL;
    END IF;
    UPDATE farebox.workers AS w SET beat = coalesce(_beat, w.beat) WHERE w.id = _worker_id;
    WITH free AS MATERIALIZED (
        SELECT h.id, u.n
          FROM unnest(_hold_ids) WITH ORDINALITY AS u (id, n) JOIN farebox.holds h ON h.id = u.id
         WHERE h.worker_id = _worker_id AND h.state = 'open'
         ORDER BY h.id
           FOR NO KEY UPDATE OF h SKIP LOCKED
    ), stored AS (
        UPDATE farebox.holds AS h
           SET mark = _usages[free.n * 7 - 6 : free.n * 7]
          FROM free
         WHERE h.id = free.id
        RETURNING h.id
    )
    SELECT coalesce(array_agg(s.id), '{}') INTO marked FROM stored s;
    RETURN marked;
END
$$;

CREATE FUNCTION farebox.renew_lease(_worker_id uuid) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    UPDATE farebox.workers AS w
       SET lease_until = clock_timestamp() + farebox.lease_length(),
           held_since = CASE WHEN w.lease_until > clock_timestamp() THEN w.held_since ELSE clock_timestamp() END
     WHERE w.id = _worker_id AND w.stopped_at IS NULL;
    RETURN FOUND;
END
$$;

CREATE FUNCTION farebox.reverse(_hold_id uuid, _amount bigint, _reference text, _actor text, _reason text, OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION farebox.revoke_key(_id text) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION farebox.rotate_key(_id text, _new_id text, _secret_hmac bytea, _pepper_version integer, _overlap interval) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION farebox.schema_version(OUT number integer, OUT serves_from integer) RETURNS record
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    SELECT m.number, m.serves_from FROM farebox.schema_migrations m ORDER BY m.number DESC LIMIT 1
$$;

CREATE FUNCTION farebox.set_spend_limit(_key_id text, _spend_limit bigint) RETURNS void
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION farebox.settled(INOUT purse farebox.purse, _state text, _amount bigint, _charged bigint, _key_id text, _charge bigint) RETURNS farebox.purse
    LANGUAGE plpgsql
    AS $$
DECLARE
    freed bigint := CASE _state WHEN 'open' THEN _amount ELSE 0 END;
    due bigint := _charge - coalesce(_charged, 0);
BEGIN
    purse := farebox.moved(purse, CASE _state WHEN 'provisional' THEN 'true_up' ELSE 'charge' END, due, freed);
    IF purse.limited THEN
        PERFORM farebox.count_spend(_key_id, -freed, due);
    END IF;
END
$$;

CREATE FUNCTION farebox.spend_left(_key_id text) RETURNS bigint
    LANGUAGE sql
    AS $$
    SELECT greatest(s.spend_limit - s.spent - s.held, 0)
      FROM farebox.api_keys k JOIN farebox.spend_limits s USING (family)
     WHERE k.id = _key_id
$$;

CREATE FUNCTION farebox.start_worker(_worker_id uuid, _hostname text, _release text) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    INSERT INTO farebox.workers AS w (id, hostname, release, lease_until)
    VALUES (_worker_id, _hostname, _release, clock_timestamp() + farebox.lease_length())
    ON CONFLICT (id) DO NOTHING;
    RETURN FOUND OR farebox.renew_lease(_worker_id);
END
$$;

CREATE FUNCTION farebox.stop_worker(_worker_id uuid) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    UPDATE farebox.workers AS w
       SET stopped_at = clock_timestamp(), lease_until = least(w.lease_until, clock_timestamp())
     WHERE w.id = _worker_id AND w.stopped_at IS NULL;
    RETURN FOUND;
END
$$;

CREATE FUNCTION farebox.sweep(_limit integer, _restart_grace interval, _not_after timestamp with time zone) RETURNS TABLE(hold_id uuid, account_id uuid, charge bigint)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
#variable_conflict use_column
DECLARE
    at timestamptz := clock_timestamp();
    lapsed uuid[];
    accounts uuid[];
    purse farebox.purse;
    hold farebox.holds;
    cost numeric;
    purses farebox.purse[];
    moves farebox.move[];
    settled_holds farebox.holds[];
BEGIN
    IF at < farebox.postgres_started() + coalesce(_restart_grace, 2 * farebox.lease_length()) OR at > _not_after
       OR NOT pg_try_advisory_xact_lock(hashtextextended('farebox.expire_holds', 0)) THEN
        RETURN;
    END IF;
    -- Locks in the order worker, account, hold; every condition is checked again once the lock is held.
    lapsed := farebox.lock_lapsed(
        ARRAY(
            SELECT w.id
              FROM farebox.workers w
             WHERE w.lease_until <= at
               AND EXISTS (SELECT FROM farebox.holds h WHERE h.worker_id = w.id AND h.state = 'open')
             ORDER BY w.lease_until, w.id
             LIMIT _limit
        ),
        at
    );
    accounts := ARRAY(
        SELECT a.id
          FROM farebox.accounts a
         WHERE a.id IN (SELECT h.account_id FROM farebox.holds h WHERE h.worker_id = ANY (lapsed) AND h.state = 'open')
         ORDER BY a.id
         LIMIT _limit
           FOR NO KEY UPDATE SKIP LOCKED
    );
    FOR hold IN
        SELECT h.*
          FROM farebox.holds h
         WHERE h.state = 'open' AND h.worker_id = ANY (lapsed) AND h.account_id = ANY (accounts)
         ORDER BY h.account_id, h.id
         LIMIT _limit
           FOR NO KEY UPDATE SKIP LOCKED
    LOOP
        IF purse.account_id IS DISTINCT FROM hold.account_id THEN
            IF purse.account_id IS NOT NULL THEN
                purses := purses || purse;
            END IF;
            purse := farebox.open_purse(hold.account_id);
        END IF;
        -- A mark was counted by us, so it never costs more than was held.
        cost := coalesce(farebox.charge_for(hold.price_version, hold.model, hold.variant, hold.mark), 0);
        hold.capped := CASE WHEN cost > hold.amount THEN 'counted_above_hold' END;
        cost := least(cost, hold.amount);
        purse := farebox.settled(purse, hold.state, hold.amount, hold.charge, hold.key_id, cost::bigint);
        hold.state := 'provisional';
        hold.charge := cost;
        hold.overrun := purse.lent;
        hold.usage := hold.mark;
        hold.usage_source := CASE WHEN hold.mark IS NULL THEN 'none' ELSE 'counted' END;
        hold.ending := 'worker_gone';
        hold.ended_at := at;
        moves := moves || farebox.a_move(purse, hold.id);
        settled_holds := settled_holds || hold;
        RETURN QUERY SELECT hold.id, hold.account_id, cost::bigint;
    END LOOP;
    IF purse.account_id IS NOT NULL THEN
        purses := purses || purse;
    END IF;
    PERFORM farebox.write_down(purses, moves, NULL, settled_holds, at);
END
$$;

CREATE FUNCTION farebox.update_key(_id text, _version integer, _name text, _scopes text[], _models text[], _profile text, _affordable_cap boolean, _spend_limit bigint, _expires_at timestamp with time zone) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE TABLE farebox.holds (
    id uuid NOT NULL,
    account_id uuid NOT NULL,
    state text NOT NULL,
    amount bigint NOT NULL,
    key_id text,
    worker_id uuid,
    price_version text,
    model text,
    variant text,
    quote text,
    fingerprint bytea,
    mark bigint[],
    opened_at timestamp with time zone NOT NULL,
    charge bigint,
    overrun bigint DEFAULT 0 NOT NULL,
    reversed bigint DEFAULT 0 NOT NULL,
    usage bigint[],
    usage_source text,
    capped text,
    ending text,
    receipt text,
    settle_fingerprint bytea,
    ended_at timestamp with time zone,
    CONSTRAINT ended_has_charge CHECK ((((state = 'open'::text) = (charge IS NULL)) AND ((state = 'open'::text) = (ended_at IS NULL)))),
    CONSTRAINT holds_amount_check CHECK ((amount >= 0)),
    CONSTRAINT holds_charge_check CHECK ((charge >= 0)),
    CONSTRAINT holds_overrun_check CHECK ((overrun >= 0)),
    CONSTRAINT holds_reversed_check CHECK ((reversed >= 0)),
    CONSTRAINT holds_usage_check CHECK ((cardinality(usage) = 7)),
    CONSTRAINT known_state CHECK ((state = ANY (ARRAY['open'::text, 'released'::text, 'final'::text, 'provisional'::text]))),
    CONSTRAINT reversed_within_charge CHECK ((reversed <= COALESCE(charge, (0)::bigint)))
)
WITH (fillfactor='60', autovacuum_vacuum_scale_factor='0.02');

CREATE FUNCTION farebox.write_down(_purses farebox.purse[], _moves farebox.move[], _new_holds farebox.holds[], _changed_holds farebox.holds[], _at timestamp with time zone) RETURNS void
    LANGUAGE plpgsql
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET enable_hashjoin TO 'off'
    SET enable_mergejoin TO 'off'
    AS $$
BEGIN
    INSERT INTO farebox.holds SELECT n.* FROM unnest(_new_holds) AS n;

    UPDATE farebox.holds AS h
       SET state = c.state, amount = c.amount, charge = c.charge, overrun = c.overrun, reversed = c.reversed,
           usage = c.usage, usage_source = c.usage_source, capped = c.capped, ending = c.ending, receipt = c.receipt,
           settle_fingerprint = c.settle_fingerprint, ended_at = c.ended_at, price_version = c.price_version,
           model = c.model, variant = c.variant
      FROM unnest(_changed_holds) AS c
     WHERE h.id = c.id;

    INSERT INTO farebox.transfers (
        account_id, version, kind, account_side, system_account, amount, balance_after, debt_after,
        hold_id, reference, actor, reason, created_at
    )
    SELECT m.account_id, m.version - t.later, t.kind, t.side, t.system_account, t.amount, m.balance + t.owned,
           m.debt + t.owed, m.hold_id, CASE t.kind WHEN m.kind THEN m.reference END, m.actor, m.reason, _at
      FROM unnest(_moves) AS m,
           -- later, owned, owed: what came after, taken back out of the version, the balance and the debt.
           LATERAL (VALUES
               ('overrun', 'credit', 'receivable', m.lent, 1, m.due, 0),
               (m.kind, CASE WHEN m.due > 0 THEN 'debit' ELSE 'credit' END,
                CASE m.kind WHEN 'grant' THEN 'grants' ELSE 'revenue' END,
                abs(m.due), (m.paid > 0)::integer, m.paid, m.paid),
               ('debt_payment', 'debit', 'receivable', m.paid, 0, 0, 0)
           ) AS t (kind, side, system_account, amount, later, owned, owed)
     WHERE t.amount > 0;

    UPDATE farebox.accounts AS a
       SET balance = p.balance, held = p.held, debt = p.debt, version = p.version
      FROM unnest(_purses) AS p
     WHERE a.id = p.account_id;
END
$$;

CREATE TABLE farebox.accounts (
    id uuid NOT NULL,
    name text NOT NULL,
    external_id text,
    email text,
    balance bigint DEFAULT 0 NOT NULL,
    held bigint DEFAULT 0 NOT NULL,
    debt bigint DEFAULT 0 NOT NULL,
    version bigint DEFAULT 0 NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT available_not_negative CHECK (((balance - held) >= 0)),
    CONSTRAINT debt_not_negative CHECK ((debt >= 0)),
    CONSTRAINT debt_paid_first CHECK (((debt = 0) OR (balance = held))),
    CONSTRAINT held_not_negative CHECK ((held >= 0))
)
WITH (fillfactor='50', autovacuum_vacuum_scale_factor='0.02');

CREATE UNLOGGED TABLE farebox.idempotency_answers (
    hold_id uuid NOT NULL,
    head text NOT NULL,
    body bytea NOT NULL,
    expires_at timestamp with time zone NOT NULL
);

CREATE TABLE farebox.ledger_identity (
    id uuid DEFAULT gen_random_uuid() NOT NULL,
    only_one boolean DEFAULT true NOT NULL,
    CONSTRAINT ledger_identity_only_one_check CHECK (only_one)
);

CREATE TABLE farebox.price_versions (
    version text NOT NULL,
    body text NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT price_versions_version_check CHECK ((version ~ '^[0-9a-f]{64}$'::text))
);

CREATE TABLE farebox.prices (
    version text NOT NULL,
    model text NOT NULL,
    variant text NOT NULL,
    rates bigint[] NOT NULL,
    per_request bigint NOT NULL,
    CONSTRAINT prices_per_request_check CHECK ((per_request >= 0)),
    CONSTRAINT seven_rates CHECK (((cardinality(rates) = 7) AND (0 <= ALL (rates))))
);

CREATE TABLE farebox.schema_migrations (
    number integer NOT NULL,
    name text NOT NULL,
    checksum text NOT NULL,
    serves_from integer NOT NULL,
    applied_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);

CREATE TABLE farebox.spend_limits (
    family text NOT NULL,
    account_id uuid NOT NULL,
    spend_limit bigint NOT NULL,
    spent bigint NOT NULL,
    held bigint NOT NULL,
    CONSTRAINT spend_limits_held_check CHECK ((held >= 0)),
    CONSTRAINT spend_limits_spend_limit_check CHECK ((spend_limit >= 0)),
    CONSTRAINT spend_limits_spent_check CHECK ((spent >= 0))
)
WITH (fillfactor='50');

CREATE TABLE farebox.transfers (
    account_id uuid NOT NULL,
    version bigint NOT NULL,
    kind text NOT NULL,
    account_side text NOT NULL,
    system_account text NOT NULL,
    amount bigint NOT NULL,
    balance_after bigint NOT NULL,
    debt_after bigint NOT NULL,
    hold_id uuid,
    reference text,
    actor text,
    reason text,
    created_at timestamp with time zone NOT NULL,
    CONSTRAINT known_kind CHECK ((kind = ANY (ARRAY['grant'::text, 'charge'::text, 'true_up'::text, 'overrun'::text, 'debt_payment'::text, 'reversal'::text]))),
    CONSTRAINT transfers_account_side_check CHECK ((account_side = ANY (ARRAY['debit'::text, 'credit'::text]))),
    CONSTRAINT transfers_amount_check CHECK ((amount > 0)),
    CONSTRAINT transfers_balance_after_check CHECK ((balance_after >= 0)),
    CONSTRAINT transfers_debt_after_check CHECK ((debt_after >= 0)),
    CONSTRAINT transfers_system_account_check CHECK ((system_account = ANY (ARRAY['revenue'::text, 'stripe'::text, 'grants'::text, 'refunds'::text, 'disputes'::text, 'expired'::text, 'receivable'::text])))
);

CREATE TABLE farebox.workers (
    id uuid NOT NULL,
    hostname text NOT NULL,
    release text NOT NULL,
    started_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    lease_until timestamp with time zone NOT NULL,
    stopped_at timestamp with time zone,
    beat bigint DEFAULT 0 NOT NULL,
    held_since timestamp with time zone DEFAULT clock_timestamp() NOT NULL
)
WITH (fillfactor='50');

ALTER TABLE ONLY farebox.accounts
    ADD CONSTRAINT accounts_external_id_key UNIQUE (external_id);

ALTER TABLE ONLY farebox.accounts
    ADD CONSTRAINT accounts_pkey PRIMARY KEY (id);

ALTER TABLE ONLY farebox.api_keys
    ADD CONSTRAINT api_keys_pkey PRIMARY KEY (id);

ALTER TABLE ONLY farebox.holds
    ADD CONSTRAINT holds_pkey PRIMARY KEY (id);

ALTER TABLE ONLY farebox.idempotency_answers
    ADD CONSTRAINT idempotency_answers_pkey PRIMARY KEY (hold_id);

ALTER TABLE ONLY farebox.idempotency_keys
    ADD CONSTRAINT idempotency_keys_pkey PRIMARY KEY (account_id, key_hash);

ALTER TABLE ONLY farebox.ledger_identity
    ADD CONSTRAINT ledger_identity_pkey PRIMARY KEY (only_one);

ALTER TABLE ONLY farebox.price_versions
    ADD CONSTRAINT price_versions_pkey PRIMARY KEY (version);

ALTER TABLE ONLY farebox.prices
    ADD CONSTRAINT prices_pkey PRIMARY KEY (version, model, variant);

ALTER TABLE ONLY farebox.schema_migrations
    ADD CONSTRAINT schema_migrations_pkey PRIMARY KEY (number);

ALTER TABLE ONLY farebox.spend_limits
    ADD CONSTRAINT spend_limits_pkey PRIMARY KEY (family);

ALTER TABLE ONLY farebox.transfers
    ADD CONSTRAINT transfers_pkey PRIMARY KEY (account_id, version);

ALTER TABLE ONLY farebox.workers
    ADD CONSTRAINT workers_pkey PRIMARY KEY (id);

CREATE INDEX api_keys_account ON farebox.api_keys USING btree (account_id);

CREATE INDEX api_keys_family ON farebox.api_keys USING btree (family);

CREATE INDEX holds_account ON farebox.holds USING btree (account_id, id) WHERE (state <> 'open'::text);

CREATE INDEX holds_open ON farebox.holds USING btree (worker_id) WHERE (state = 'open'::text);

CREATE INDEX idempotency_answers_age ON farebox.idempotency_answers USING btree (expires_at);

CREATE INDEX idempotency_keys_age ON farebox.idempotency_keys USING brin (claimed_at) WITH (autosummarize='on');

CREATE INDEX spend_limits_account ON farebox.spend_limits USING btree (account_id);

CREATE UNIQUE INDEX transfers_once_a_hold ON farebox.transfers USING btree (hold_id, kind) WHERE (kind = ANY (ARRAY['charge'::text, 'true_up'::text]));

CREATE UNIQUE INDEX transfers_reference ON farebox.transfers USING btree (kind, reference) WHERE (reference IS NOT NULL);

CREATE TRIGGER append_only BEFORE DELETE OR UPDATE OR TRUNCATE ON farebox.transfers FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();

CREATE TRIGGER immutable BEFORE DELETE OR UPDATE OR TRUNCATE ON farebox.price_versions FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();

CREATE TRIGGER immutable BEFORE DELETE OR UPDATE OR TRUNCATE ON farebox.prices FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();

CREATE TRIGGER never_removed BEFORE DELETE OR TRUNCATE ON farebox.accounts FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();

CREATE TRIGGER never_removed BEFORE DELETE OR TRUNCATE ON farebox.api_keys FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();

CREATE TRIGGER never_removed BEFORE DELETE OR TRUNCATE ON farebox.holds FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();

ALTER TABLE ONLY farebox.api_keys
    ADD CONSTRAINT api_keys_account_id_fkey FOREIGN KEY (account_id) REFERENCES farebox.accounts(id);

ALTER TABLE ONLY farebox.api_keys
    ADD CONSTRAINT api_keys_family_fkey FOREIGN KEY (family) REFERENCES farebox.api_keys(id);

ALTER TABLE ONLY farebox.prices
    ADD CONSTRAINT prices_version_fkey FOREIGN KEY (version) REFERENCES farebox.price_versions(version);

ALTER TABLE ONLY farebox.spend_limits
    ADD CONSTRAINT spend_limits_family_fkey FOREIGN KEY (family) REFERENCES farebox.api_keys(id);

ALTER TABLE farebox.accounts ENABLE ROW LEVEL SECURITY;

CREATE POLICY all_accounts ON farebox.accounts FOR SELECT TO farebox_control USING (true);

CREATE POLICY all_holds ON farebox.holds FOR SELECT TO farebox_control USING (true);

CREATE POLICY all_transfers ON farebox.transfers FOR SELECT TO farebox_control USING (true);

ALTER TABLE farebox.holds ENABLE ROW LEVEL SECURITY;

CREATE POLICY own_account ON farebox.accounts FOR SELECT TO farebox_reader USING ((id = ( SELECT (NULLIF(current_setting('farebox.account'::text, true), ''::text))::uuid AS "nullif")));

CREATE POLICY own_holds ON farebox.holds FOR SELECT TO farebox_reader USING ((account_id = ( SELECT (NULLIF(current_setting('farebox.account'::text, true), ''::text))::uuid AS "nullif")));

CREATE POLICY own_transfers ON farebox.transfers FOR SELECT TO farebox_reader USING ((account_id = ( SELECT (NULLIF(current_setting('farebox.account'::text, true), ''::text))::uuid AS "nullif")));

ALTER TABLE farebox.transfers ENABLE ROW LEVEL SECURITY;

GRANT USAGE ON SCHEMA farebox TO farebox_gateway;
GRANT USAGE ON SCHEMA farebox TO farebox_control;
GRANT USAGE ON SCHEMA farebox TO farebox_reader;

REVOKE ALL ON FUNCTION farebox.a_move(_purse farebox.purse, _hold_id uuid, _reference text, _actor text, _reason text) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit() FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.audit() TO farebox_control;

REVOKE ALL ON FUNCTION farebox.audit_accounts() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_chain() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_charges() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_kinds() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_leases() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_limits() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_price_versions() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_prices() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.audit_visibility() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.bar_claim(_claim farebox.idempotency_keys) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.batch(_reserves integer, _finalizes integer, _hold_ids uuid[], _account_ids uuid[], _key_ids text[], _amounts bigint[], _notes text[], _fingerprints bytea[], _terms integer[], _key_versions integer[], _at_leasts bigint[], _usages bigint[], _worker_ids uuid[], _price_versions text[], _models text[], _variants text[], _usage_sources text[], _capped text[], _endings text[], _wait_ms integer) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.batch(_reserves integer, _finalizes integer, _hold_ids uuid[], _account_ids uuid[], _key_ids text[], _amounts bigint[], _notes text[], _fingerprints bytea[], _terms integer[], _key_versions integer[], _at_leasts bigint[], _usages bigint[], _worker_ids uuid[], _price_versions text[], _models text[], _variants text[], _usage_sources text[], _capped text[], _endings text[], _wait_ms integer) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.charge_at(_rates bigint[], _per_request bigint, _usage bigint[]) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.charge_for(_version text, _model text, _variant text, _usage bigint[]) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.claim_key(_account_id uuid, _key_hash bytea, _fingerprint bytea, _hold_id uuid, _worker_id uuid, OUT outcome text, OUT hold_id uuid, OUT head text, OUT body bytea) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.claim_key(_account_id uuid, _key_hash bytea, _fingerprint bytea, _hold_id uuid, _worker_id uuid, OUT outcome text, OUT hold_id uuid, OUT head text, OUT body bytea) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.claim_state(_claim farebox.idempotency_keys) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.count_spend(_key_id text, _held bigint, _spent bigint) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.create_account(_id uuid, _name text, _external_id text, _email text, OUT outcome text, OUT account_id uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.create_account(_id uuid, _name text, _external_id text, _email text, OUT outcome text, OUT account_id uuid) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.create_key(_id text, _account_id uuid, _name text, _secret_hmac bytea, _pepper_version integer, _scopes text[], _models text[], _profile text, _affordable_cap boolean, _spend_limit bigint, _expires_at timestamp with time zone) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.create_key(_id text, _account_id uuid, _name text, _secret_hmac bytea, _pepper_version integer, _scopes text[], _models text[], _profile text, _affordable_cap boolean, _spend_limit bigint, _expires_at timestamp with time zone) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.expire_holds(_limit integer, _restart_grace interval) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.expire_holds(_limit integer, _restart_grace interval) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.extend(_hold_id uuid, _account_id uuid, _worker_id uuid, _by bigint, _at_least bigint, OUT granted bigint, OUT total bigint, OUT state text) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.extend(_hold_id uuid, _account_id uuid, _worker_id uuid, _by bigint, _at_least bigint, OUT granted bigint, OUT total bigint, OUT state text) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.extend_holds(_hold_ids uuid[], _account_ids uuid[], _worker_ids uuid[], _totals bigint[], _at_leasts bigint[], _wait_ms integer) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.extend_holds(_hold_ids uuid[], _account_ids uuid[], _worker_ids uuid[], _totals bigint[], _at_leasts bigint[], _wait_ms integer) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.find_key(_key_id text) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.find_key(_key_id text) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.forget_keys(_limit integer, _keep interval) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.forget_keys(_limit integer, _keep interval) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.free_key(_account_id uuid, _key_hash bytea, _hold_id uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.free_key(_account_id uuid, _key_hash bytea, _hold_id uuid) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.grant_credits(_account_id uuid, _kind text, _amount bigint, _reference text, _actor text, _reason text, OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.grant_credits(_account_id uuid, _kind text, _amount bigint, _reference text, _actor text, _reason text, OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.greater_usage(_a bigint[], _b bigint[]) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.heartbeat(_worker_id uuid, _hold_ids uuid[], _usages bigint[]) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.heartbeat(_worker_id uuid, _hold_ids uuid[], _usages bigint[]) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.keep_answer(_hold_id uuid, _head text, _body bytea, _keep interval) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.keep_answer(_hold_id uuid, _head text, _body bytea, _keep interval) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.known_key(_id text, _account_id uuid, _secret_hmac bytea, _rotated_from text) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.lease_length() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.ledger_id() FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.ledger_id() TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.lock_accounts(_account_ids uuid[], _wait_ms integer) FROM PUBLIC;

GRANT SELECT ON TABLE farebox.api_keys TO farebox_control;

REVOKE ALL ON FUNCTION farebox.lock_key(_id text) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.lock_lapsed(_worker_ids uuid[], _at timestamp with time zone) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.lock_reference(_kind text, _reference text) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.moved(INOUT purse farebox.purse, _kind text, _due bigint, _freed bigint) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.open_purse(_account_id uuid) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.postgres_started() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.price_rows(_body text) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.put_price_version(_version text, _body text) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.put_price_version(_version text, _body text) TO farebox_gateway;
GRANT ALL ON FUNCTION farebox.put_price_version(_version text, _body text) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.refuse_change() FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.renew(_worker_id uuid, _beat bigint, _hold_ids uuid[], _usages bigint[]) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.renew(_worker_id uuid, _beat bigint, _hold_ids uuid[], _usages bigint[]) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.renew_lease(_worker_id uuid) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.reverse(_hold_id uuid, _amount bigint, _reference text, _actor text, _reason text, OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.reverse(_hold_id uuid, _amount bigint, _reference text, _actor text, _reason text, OUT outcome text, OUT transfer_account uuid, OUT transfer_version bigint) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.revoke_key(_id text) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.revoke_key(_id text) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.rotate_key(_id text, _new_id text, _secret_hmac bytea, _pepper_version integer, _overlap interval) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.rotate_key(_id text, _new_id text, _secret_hmac bytea, _pepper_version integer, _overlap interval) TO farebox_control;

REVOKE ALL ON FUNCTION farebox.schema_version(OUT number integer, OUT serves_from integer) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.schema_version(OUT number integer, OUT serves_from integer) TO farebox_gateway;
GRANT ALL ON FUNCTION farebox.schema_version(OUT number integer, OUT serves_from integer) TO farebox_control;
GRANT ALL ON FUNCTION farebox.schema_version(OUT number integer, OUT serves_from integer) TO farebox_reader;

REVOKE ALL ON FUNCTION farebox.set_spend_limit(_key_id text, _spend_limit bigint) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.settled(INOUT purse farebox.purse, _state text, _amount bigint, _charged bigint, _key_id text, _charge bigint) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.spend_left(_key_id text) FROM PUBLIC;

REVOKE ALL ON FUNCTION farebox.start_worker(_worker_id uuid, _hostname text, _release text) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.start_worker(_worker_id uuid, _hostname text, _release text) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.stop_worker(_worker_id uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.stop_worker(_worker_id uuid) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.sweep(_limit integer, _restart_grace interval, _not_after timestamp with time zone) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.sweep(_limit integer, _restart_grace interval, _not_after timestamp with time zone) TO farebox_gateway;

REVOKE ALL ON FUNCTION farebox.update_key(_id text, _version integer, _name text, _scopes text[], _models text[], _profile text, _affordable_cap boolean, _spend_limit bigint, _expires_at timestamp with time zone) FROM PUBLIC;
GRANT ALL ON FUNCTION farebox.update_key(_id text, _version integer, _name text, _scopes text[], _models text[], _profile text, _affordable_cap boolean, _spend_limit bigint, _expires_at timestamp with time zone) TO farebox_control;

GRANT SELECT ON TABLE farebox.holds TO farebox_control;
GRANT SELECT ON TABLE farebox.holds TO farebox_reader;

REVOKE ALL ON FUNCTION farebox.write_down(_purses farebox.purse[], _moves farebox.move[], _new_holds farebox.holds[], _changed_holds farebox.holds[], _at timestamp with time zone) FROM PUBLIC;

GRANT SELECT ON TABLE farebox.accounts TO farebox_control;
GRANT SELECT ON TABLE farebox.accounts TO farebox_reader;

GRANT SELECT ON TABLE farebox.price_versions TO farebox_control;

GRANT SELECT ON TABLE farebox.prices TO farebox_control;
GRANT SELECT ON TABLE farebox.prices TO farebox_reader;

GRANT SELECT ON TABLE farebox.schema_migrations TO farebox_control;

GRANT SELECT ON TABLE farebox.spend_limits TO farebox_control;

GRANT SELECT ON TABLE farebox.transfers TO farebox_control;
GRANT SELECT ON TABLE farebox.transfers TO farebox_reader;

GRANT SELECT ON TABLE farebox.workers TO farebox_control;
