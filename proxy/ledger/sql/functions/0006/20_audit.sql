-- The audit, second edition: the same invariants, each table read once, by as many processes as Postgres gives; and the
-- seals. farebox.audit() alone is called; its caller puts it into one REPEATABLE READ transaction.

-- A stretch of one account's book: what its transfers add up to, what is wrong with them, and which seals are broken.
CREATE TYPE farebox.audit_stretch AS (
    transfers bigint,
    first bigint,
    last bigint,
    balance numeric,
    debt numeric,
    charges bigint,
    unchained bigint,
    unchained_at bigint,
    misnamed bigint,
    misnamed_at bigint,
    seals bigint,
    altered bigint,
    altered_in bigint,
    unlinked bigint,
    unlinked_at bigint
);

-- A transfer's name, and between whom it moves credits, belong together.
CREATE FUNCTION farebox.named_rightly(_row farebox.transfers) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE _row.kind
        WHEN 'charge' THEN _row.account_side = 'debit' AND _row.system_account = 'revenue'
        WHEN 'grant' THEN _row.account_side = 'credit' AND _row.system_account = 'grants' AND _row.hold_id IS NULL
        WHEN 'true_up' THEN _row.system_account = 'revenue'
        WHEN 'reversal' THEN _row.account_side = 'credit' AND _row.system_account = 'revenue'
        WHEN 'overrun' THEN _row.account_side = 'credit' AND _row.system_account = 'receivable'
        WHEN 'debt_payment' THEN _row.account_side = 'debit' AND _row.system_account = 'receivable'
        ELSE false
    END
$$;

-- The transfers under the seals from number _first on, _seals of them; _first NULL: the transfers after the
-- last seal. plpgsql, since it keeps its plans; a stretch a call, so that Postgres can spread calls over processes.
CREATE FUNCTION farebox.audit_stretch(_account_id uuid, _first bigint, _seals integer) RETURNS farebox.audit_stretch
LANGUAGE plpgsql STABLE PARALLEL SAFE COST 50000
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_mergejoin = off AS $$
DECLARE
    before farebox.seals;
    lasts bigint[];
    upto bigint;
    found farebox.audit_stretch;
BEGIN
    SELECT * INTO before
      FROM farebox.seals s
     WHERE s.account_id = _account_id AND (_first IS NULL OR s.number < _first)
     ORDER BY s.number DESC
     LIMIT 1;
    lasts := ARRAY(
        SELECT s.last_version
          FROM farebox.seals s
         WHERE s.account_id = _account_id AND s.number >= _first AND s.number < _first + _seals
         ORDER BY s.number
    );
    upto := coalesce(lasts[cardinality(lasts)], 9223372036854775807);
    WITH rows AS (
        SELECT t.version, t.kind, t.balance_after, t.debt_after,
               CASE t.account_side WHEN 'credit' THEN t.amount ELSE -t.amount END AS signed,
               CASE t.system_account WHEN 'receivable' THEN 1 ELSE 0 END AS lent,
               CASE WHEN _first IS NOT NULL THEN farebox.transfer_bytes(t) END AS bytes,
               farebox.named_rightly(t) AS named
          FROM farebox.transfers t
         -- With the one before, for the chain.
         WHERE t.account_id = _account_id AND t.version >= coalesce(before.last_version, 0) AND t.version <= upto
    ), chained AS (
        SELECT r.*,
               r.balance_after = lag(r.balance_after, 1, 0) OVER w + r.signed
                   AND r.debt_after = lag(r.debt_after, 1, 0) OVER w + r.lent * r.signed AS chained
          FROM rows r
        WINDOW w AS (ORDER BY r.version)
    ), blocks AS MATERIALIZED (
        SELECT width_bucket(c.version - 1, lasts) AS block, count(*) AS transfers, min(c.version) AS first,
               max(c.version) AS last, sum(c.signed) AS balance, sum(c.lent * c.signed) AS debt,
               count(*) FILTER (WHERE c.kind = 'charge') AS charges,
               count(*) FILTER (WHERE NOT c.chained) AS unchained,
               min(c.version) FILTER (WHERE NOT c.chained) AS unchained_at,
               count(*) FILTER (WHERE NOT c.named) AS misnamed,
               min(c.version) FILTER (WHERE NOT c.named) AS misnamed_at,
               CASE WHEN _first IS NOT NULL THEN sha512(string_agg(c.bytes, '' ORDER BY c.version)) END AS digest
          FROM chained c
         WHERE c.version > coalesce(before.last_version, 0)
         GROUP BY 1
    )
    SELECT sum(b.transfers), min(b.first), max(b.last), sum(b.balance), sum(b.debt), sum(b.charges),
           sum(b.unchained), min(b.unchained_at), sum(b.misnamed), min(b.misnamed_at),
           count(s.number),
           count(*) FILTER (WHERE s.transfers_digest <> coalesce(b.digest, sha512(''))),
           min(s.number) FILTER (WHERE s.transfers_digest <> coalesce(b.digest, sha512(''))),
           count(*) FILTER (WHERE NOT s.linked), min(s.number) FILTER (WHERE NOT s.linked)
      INTO found
      FROM blocks b
      FULL JOIN (
               SELECT s.number, s.transfers_digest, row_number() OVER w - 1 AS block,
                      s.head = farebox.seal_head(lag(s.head, 1, before.head) OVER w, s)
                          AND s.number = lag(s.number, 1, coalesce(before.number, 0)) OVER w + 1
                          AND s.last_version >= lag(s.last_version, 1, coalesce(before.last_version, 0)) OVER w
                          AS linked
                 FROM farebox.seals s
                WHERE s.account_id = _account_id AND s.number >= _first AND s.number < _first + _seals
               WINDOW w AS (ORDER BY s.number)
           ) AS s ON s.block = b.block;
    RETURN found;
END
$$;

-- A transfer that its account's versions don't lead to, and a seal likewise. Slow; asked only where there is one.
CREATE FUNCTION farebox.a_stray_transfer() RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT min(t.account_id || '-' || t.version)
      FROM farebox.transfers t LEFT JOIN farebox.accounts a ON a.id = t.account_id
     WHERE a.id IS NULL OR t.version < 1 OR t.version > a.version
$$;

CREATE FUNCTION farebox.a_stray_seal() RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT min(s.account_id || ' seal ' || s.number)
      FROM farebox.seals s
     WHERE s.number > 1
       AND NOT EXISTS (SELECT FROM farebox.seals p WHERE p.account_id = s.account_id AND p.number = s.number - 1)
$$;

-- Accounts, transfers and seals.
CREATE FUNCTION farebox.audit_book() RETURNS SETOF farebox.audit_check
LANGUAGE plpgsql STABLE AS $$
DECLARE
    stretch CONSTANT integer := 32;
BEGIN
    RETURN QUERY
    WITH units AS MATERIALIZED (
        SELECT s.account_id, f.*
          FROM farebox.seals s, LATERAL farebox.audit_stretch(s.account_id, s.number, stretch) AS f
         WHERE (s.number - 1) % stretch = 0
        UNION ALL
        SELECT a.id, f.*
          FROM farebox.accounts a, LATERAL farebox.audit_stretch(a.id, NULL, 0) AS f
         WHERE a.version > coalesce((
             SELECT s.last_version FROM farebox.seals s WHERE s.account_id = a.id ORDER BY s.number DESC LIMIT 1
         ), 0)
    ), book AS (
        SELECT u.account_id, sum(u.transfers) AS transfers, min(u.first) AS first, max(u.last) AS last,
               sum(u.balance) AS balance, sum(u.debt) AS debt
          FROM units u
         GROUP BY u.account_id
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
    ), accounts AS (
        SELECT count(*) AS checked,
               count(*) FILTER (WHERE NOT j.balance) AS v1, min(j.id) FILTER (WHERE NOT j.balance) AS e1,
               count(*) FILTER (WHERE NOT j.held) AS v2, min(j.id) FILTER (WHERE NOT j.held) AS e2,
               count(*) FILTER (WHERE NOT j.debt) AS v3, min(j.id) FILTER (WHERE NOT j.debt) AS e3,
               count(*) FILTER (WHERE NOT j.versions) AS v4, min(j.id) FILTER (WHERE NOT j.versions) AS e4,
               count(*) FILTER (WHERE NOT j.limits) AS v5, min(j.id) FILTER (WHERE NOT j.limits) AS e5
          FROM compared j
    ), transfers AS (
        SELECT coalesce(sum(u.transfers), 0) AS checked, coalesce(sum(u.seals), 0) AS seals,
               coalesce(sum(u.transfers) FILTER (WHERE u.seals > 0), 0) AS sealed,
               coalesce(sum(u.unchained), 0) AS v6, min(u.account_id || '-' || u.unchained_at) AS e6,
               coalesce(sum(u.misnamed), 0) AS v7, min(u.account_id || '-' || u.misnamed_at) AS e7,
               coalesce(sum(u.altered), 0) AS v8, min(u.account_id || ' seal ' || u.altered_in) AS e8,
               coalesce(sum(u.unlinked), 0) AS v10, min(u.account_id || ' seal ' || u.unlinked_at) AS e10
          FROM units u
    ), strays AS MATERIALIZED (
        -- What no account's stretches led to, counted.
        SELECT (SELECT count(*) FROM farebox.transfers) - t.checked AS transfers,
               (SELECT count(*) FROM farebox.seals) - t.seals AS seals
          FROM transfers t
    )
    SELECT v.name, v.checked::bigint, v.violations::bigint, v.example
      FROM accounts a, transfers t, strays s,
           LATERAL (VALUES
               ('balance_is_the_sum_of_transfers', a.checked, a.v1, a.e1),
               ('held_is_the_sum_of_open_holds', a.checked, a.v2, a.e2),
               ('debt_is_what_receivable_lent', a.checked, a.v3, a.e3),
               ('versions_are_gapless', a.checked, a.v4, a.e4),
               ('nothing_is_negative_and_debt_is_paid_first', a.checked, a.v5, a.e5),
               ('balances_chain_from_transfer_to_transfer', t.checked, t.v6, t.e6),
               ('transfers_move_between_the_sides_of_their_kind', t.checked, t.v7, t.e7),
               ('every_transfer_has_its_place', t.checked + s.transfers, abs(s.transfers),
                CASE WHEN s.transfers <> 0 THEN farebox.a_stray_transfer() END),
               ('sealed_transfers_are_as_they_were', t.sealed, t.v8, t.e8),
               ('seals_chain_from_block_to_block', t.seals + s.seals, t.v10 + abs(s.seals),
                coalesce(t.e10, CASE WHEN s.seals <> 0 THEN farebox.a_stray_seal() END))
           ) AS v (name, checked, violations, example);
END
$$;
