-- A provisional end may be trued up yet, and a final or released one never again.
CREATE FUNCTION farebox.ended_so(_hold farebox.holds) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE _hold.state
        WHEN 'final' THEN _hold.settle_fingerprint IS NOT NULL OR _hold.charge = 0
        WHEN 'released' THEN _hold.charge = 0 AND _hold.settle_fingerprint IS NULL
        WHEN 'provisional' THEN _hold.ending = 'worker_gone' AND _hold.settle_fingerprint IS NULL
        WHEN 'open' THEN true
        ELSE false
    END
$$;

-- An ended hold's charge is what its usage costs at its price, to the microcredit. One that was capped says why, and is
-- less; one without usage is nothing. Our own cap says to what; the gateway's reasons don't.
CREATE FUNCTION farebox.priced_so(_hold farebox.holds, _rates bigint[], _per_request bigint) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT coalesce(
        CASE
            WHEN _hold.usage IS NULL THEN _hold.charge = 0
            WHEN _hold.capped IS NULL THEN _hold.charge = farebox.charge_at(_rates, _per_request, _hold.usage)
            WHEN _hold.capped = 'counted_above_hold' AND _hold.charge < _hold.amount
                THEN _hold.charge = farebox.charge_at(_rates, _per_request, _hold.usage)
            ELSE _hold.charge <= farebox.charge_at(_rates, _per_request, _hold.usage)
        END,
        false
    )
$$;

-- A transfer of a hold that isn't there, or isn't that account's. Slow; asked only where there is one.
CREATE FUNCTION farebox.a_stray_charge() RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT min(t.account_id || '-' || t.version)
      FROM farebox.transfers t LEFT JOIN farebox.holds h ON h.id = t.hold_id AND h.account_id = t.account_id
     WHERE t.kind IN ('charge', 'true_up', 'overrun', 'reversal') AND h.id IS NULL
$$;

-- A sealed hold that isn't there. Slow; asked only where there is one.
CREATE FUNCTION farebox.a_lost_hold() RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT min(u.id::text)
      FROM farebox.seals s, unnest(s.hold_ids || s.provisional_ids) AS u (id)
     WHERE NOT EXISTS (SELECT FROM farebox.holds h WHERE h.id = u.id)
$$;

-- Each hold against its transfers, its state, what its usage costs at its price, and its seals.
CREATE FUNCTION farebox.judged_holds()
RETURNS TABLE (
    id uuid, ended boolean, transfers bigint, kept boolean, ended_so boolean, priced boolean, within_hold boolean,
    seals integer, as_sealed boolean
)
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT h.id, h.state <> 'open' AS ended,
           (c.version IS NOT NULL)::integer + (u.version IS NOT NULL)::integer + coalesce(r.rows, 0) AS transfers,
           coalesce(h.charge, 0)
               = coalesce(c.amount, 0) + coalesce(CASE u.account_side WHEN 'debit' THEN u.amount ELSE -u.amount END, 0)
               AND h.overrun = coalesce(r.overrun, 0) AND h.reversed = coalesce(r.reversed, 0) AS kept,
           farebox.ended_so(h) AS ended_so,
           h.state = 'open' OR farebox.priced_so(h, p.rates, p.per_request) AS priced,
           h.state = 'open' OR h.usage_source IS DISTINCT FROM 'counted' OR h.fingerprint IS NULL
               OR h.charge <= h.amount AS within_hold,
           (s.id IS NOT NULL)::integer + (v.id IS NOT NULL)::integer AS seals,
           (s.id IS NULL OR s.digest = farebox.hold_digest(h)) AND CASE
               WHEN v.id IS NULL THEN true
               WHEN h.state = 'provisional' THEN v.digest = farebox.hold_digest(h)
               -- Trued up since: its end is under a later seal, or will be.
               ELSE h.state = 'final'
           END AS as_sealed
      FROM farebox.holds h
      LEFT JOIN (
          SELECT u.id, u.digest FROM farebox.seals s, unnest(s.hold_ids, s.hold_digests) AS u (id, digest)
      ) AS s ON s.id = h.id
      LEFT JOIN (
          SELECT u.id, u.digest
            FROM farebox.seals s, unnest(s.provisional_ids, s.provisional_digests) AS u (id, digest)
      ) AS v ON v.id = h.id
      LEFT JOIN farebox.transfers c ON c.hold_id = h.id AND c.account_id = h.account_id AND c.kind = 'charge'
      LEFT JOIN farebox.transfers u ON u.hold_id = h.id AND u.account_id = h.account_id AND u.kind = 'true_up'
      LEFT JOIN (
          SELECT t.hold_id, t.account_id, count(*) AS rows,
                 coalesce(sum(t.amount) FILTER (WHERE t.kind = 'overrun'), 0) AS overrun,
                 coalesce(sum(t.amount) FILTER (WHERE t.kind = 'reversal'), 0) AS reversed
            FROM farebox.transfers t
           WHERE t.kind IN ('overrun', 'reversal')
           GROUP BY t.hold_id, t.account_id
      ) AS r ON r.hold_id = h.id AND r.account_id = h.account_id
      LEFT JOIN farebox.prices p ON p.version = h.price_version AND p.model = h.model AND p.variant = h.variant
$$;

-- All of them in one pass. Only where something is wrong, a second one finds an example: counting and choosing at once
-- would judge each hold twice.
CREATE FUNCTION farebox.audit_holds() RETURNS SETOF farebox.audit_check
LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN QUERY
    WITH counted AS MATERIALIZED (
        SELECT count(*) AS checked, count(*) FILTER (WHERE j.ended) AS ended, coalesce(sum(j.transfers), 0) AS transfers,
               coalesce(sum(j.seals), 0) AS seals,
               count(*) FILTER (WHERE NOT j.kept) AS v1, count(*) FILTER (WHERE NOT j.ended_so) AS v2,
               count(*) FILTER (WHERE NOT j.priced) AS v3, count(*) FILTER (WHERE NOT j.within_hold) AS v4,
               count(*) FILTER (WHERE NOT j.as_sealed) AS v5
          FROM farebox.judged_holds() AS j
    ), strays AS MATERIALIZED (
        SELECT (
                   SELECT count(*) FROM farebox.transfers t
                    WHERE t.kind IN ('charge', 'true_up', 'overrun', 'reversal')
               ) - c.transfers AS transfers,
               (SELECT coalesce(sum(cardinality(s.hold_ids) + cardinality(s.provisional_ids)), 0) FROM farebox.seals s)
                   - c.seals AS seals
          FROM counted c
    )
    SELECT v.name, v.checked::bigint, v.violations::bigint, v.example
      FROM counted c, strays s,
           LATERAL (VALUES
               ('every_hold_was_charged_what_its_transfers_say', c.checked, c.v1 + abs(s.transfers),
                coalesce(CASE WHEN c.v1 > 0 THEN (
                    SELECT min(j.id::text) FROM farebox.judged_holds() AS j WHERE NOT j.kept
                ) END, CASE WHEN s.transfers <> 0 THEN farebox.a_stray_charge() END)),
               ('every_hold_ended_as_its_state_says', c.checked, c.v2, CASE WHEN c.v2 > 0 THEN (
                    SELECT min(j.id::text) FROM farebox.judged_holds() AS j WHERE NOT j.ended_so
                ) END),
               ('sealed_holds_are_as_they_were', c.seals + s.seals, c.v5 + abs(s.seals),
                coalesce(CASE WHEN c.v5 > 0 THEN (
                    SELECT min(j.id::text) FROM farebox.judged_holds() AS j WHERE NOT j.as_sealed
                ) END, CASE WHEN s.seals <> 0 THEN farebox.a_lost_hold() END)),
               ('charges_recompute_from_usage_and_price', c.ended, c.v3, CASE WHEN c.v3 > 0 THEN (
                    SELECT min(j.id::text) FROM farebox.judged_holds() AS j WHERE NOT j.priced
                ) END),
               ('counted_charges_stay_within_their_hold', c.ended, c.v4, CASE WHEN c.v4 > 0 THEN (
                    SELECT min(j.id::text) FROM farebox.judged_holds() AS j WHERE NOT j.within_hold
                ) END)
           ) AS v (name, checked, violations, example);
END
$$;
