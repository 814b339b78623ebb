-- The audit of lots, and what of the older audit knows of them now.

-- How a lot came to be: what brought credits in makes a lot of that kind and amount; what came back from where it was
-- lent, one that is no greater.
CREATE FUNCTION farebox.came_so(_lot farebox.lots, _transfer farebox.transfers) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT coalesce(
        _transfer.account_side = 'credit' AND CASE
            WHEN _transfer.kind IN ('grant', 'promo', 'purchase', 'plan') THEN
                _lot.amount = _transfer.amount AND _lot.kind = CASE _transfer.kind
                    WHEN 'grant' THEN 'granted' WHEN 'promo' THEN 'promo' ELSE _lot.kind
                END
            WHEN _transfer.kind IN ('reversal', 'true_up', 'refund_return', 'dispute_return') THEN
                _lot.amount <= _transfer.amount AND _lot.kind = 'granted'
        END,
        false
    )
$$;

-- Accounts whose lots don't hold what the balance was at their mark, or owe more than the debt is, or have more reserved
-- than refunds' holds hold. _accounts NULL: all of them.
CREATE FUNCTION farebox.judged_marks(_accounts uuid[])
RETURNS TABLE (id text, lots bigint, held boolean, spoken_for boolean)
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT coalesce(a.id, m.account_id, l.account_id)::text, coalesce(l.lots, 0),
           coalesce(m.version, 0) <= a.version AND coalesce(l.as_they_came, true)
               AND coalesce(l.remaining, 0) = CASE WHEN coalesce(m.version, 0) > 0 THEN t.balance_after ELSE 0 END,
           coalesce(l.owed, 0) <= coalesce(t.debt_after, 0)
               AND coalesce(l.reserved, 0) <= coalesce(r.held, 0)
      FROM (SELECT * FROM farebox.accounts x WHERE _accounts IS NULL OR x.id = ANY (_accounts)) AS a
      FULL JOIN (SELECT * FROM farebox.lot_marks x WHERE _accounts IS NULL OR x.account_id = ANY (_accounts)) AS m
             ON m.account_id = a.id
      FULL JOIN (
          SELECT x.account_id, count(*) AS lots,
                 sum(x.remaining) FILTER (WHERE x.version <= k.version) AS remaining,
                 -- Beyond the mark.
                 bool_and(x.version <= coalesce(k.version, 0) OR x.remaining = x.amount) AS as_they_came,
                 sum(x.owed) AS owed, sum(x.reserved) AS reserved
            FROM farebox.lots x LEFT JOIN farebox.lot_marks k ON k.account_id = x.account_id
           WHERE _accounts IS NULL OR x.account_id = ANY (_accounts)
           GROUP BY x.account_id
      ) AS l ON l.account_id = coalesce(a.id, m.account_id)
      LEFT JOIN farebox.transfers t ON t.account_id = m.account_id AND t.version = m.version
      LEFT JOIN (
          SELECT h.account_id, sum(h.amount) AS held
            FROM farebox.holds h WHERE h.state = 'open' AND h.worker_id IS NULL GROUP BY h.account_id
      ) AS r ON r.account_id = a.id
$$;

-- Each lot against its transfer and its draws.
CREATE FUNCTION farebox.judged_lots()
RETURNS TABLE (id text, draws bigint, came boolean, left_so boolean)
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT coalesce(l.account_id, d.account_id) || '-' || coalesce(l.version, d.lot_version), coalesce(d.draws, 0),
           l.version IS NULL OR farebox.came_so(l, t),
           coalesce(l.remaining = l.amount - coalesce(d.amount, 0), false)
      FROM farebox.lots l
      FULL JOIN (
          SELECT x.account_id, x.lot_version, count(*) AS draws, sum(x.amount) AS amount
            FROM farebox.draws x GROUP BY x.account_id, x.lot_version
      ) AS d ON d.account_id = l.account_id AND d.lot_version = l.version
      LEFT JOIN farebox.transfers t ON t.account_id = l.account_id AND t.version = l.version
$$;

-- Each transfer up to its account's mark, and what was drawn for it: all that it took, save what was lent; nothing for
-- credits that came in. What was given back, and what paid a debt, may have met each other: the sums prove those.
-- draws: how many those are. Nearly all have one, so that only the others need be added up.
CREATE FUNCTION farebox.judged_draws()
RETURNS TABLE (id text, drawn boolean, draws bigint)
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT t.account_id || '-' || t.version,
           CASE
               WHEN t.kind = 'debt_payment'
                   THEN coalesce(f.amount, 0) + coalesce(e.amount, 0) BETWEEN 0 AND t.amount
               WHEN t.account_side = 'debit'
                   THEN coalesce(f.amount, 0) + coalesce(e.amount, 0) = t.amount - coalesce(o.amount, 0)
               WHEN t.kind IN ('reversal', 'true_up', 'refund_return', 'dispute_return')
                   THEN coalesce(f.amount, 0) + coalesce(e.amount, 0) BETWEEN -t.amount AND 0
               ELSE f.version IS NULL AND e.version IS NULL
           END,
           (f.version IS NOT NULL)::integer + coalesce(e.rows, 0)
      FROM farebox.transfers t
      JOIN farebox.lot_marks m ON m.account_id = t.account_id AND m.version >= t.version
      LEFT JOIN farebox.draws f ON f.account_id = t.account_id AND f.version = t.version AND f.nth = 1
      LEFT JOIN (
          SELECT x.account_id, x.version, count(*) AS rows, sum(x.amount) AS amount
            FROM farebox.draws x WHERE x.nth > 1 GROUP BY x.account_id, x.version
      ) AS e ON e.account_id = t.account_id AND e.version = t.version
      LEFT JOIN (
          SELECT x.account_id, x.version + 1 AS version, x.amount FROM farebox.transfers x WHERE x.kind = 'overrun'
      ) AS o ON o.account_id = t.account_id AND o.version = t.version
$$;

-- One that was drawn for no transfer up to its account's mark.
CREATE FUNCTION farebox.a_stray_draw() RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT min(d.account_id || '-' || d.version)
      FROM farebox.draws d
     WHERE NOT EXISTS (
               SELECT FROM farebox.transfers t JOIN farebox.lot_marks m ON m.account_id = t.account_id
                WHERE t.account_id = d.account_id AND t.version = d.version AND m.version >= t.version
           )
$$;

-- Lent to a hold that ended, or to a refund or a dispute: then those follow it at once.
CREATE FUNCTION farebox.audit_overruns() RETURNS SETOF farebox.audit_check
LANGUAGE sql STABLE AS $$
    WITH judged AS (
        SELECT o.account_id || '-' || o.version AS id, t.kind IN ('refund', 'dispute') IS TRUE AS taken
          FROM farebox.transfers o
          LEFT JOIN farebox.transfers t ON t.account_id = o.account_id AND t.version = o.version + 1
         WHERE o.kind = 'overrun' AND o.hold_id IS NULL
    )
    SELECT 'what_no_hold_was_lent_was_taken_back', count(*), count(*) FILTER (WHERE NOT j.taken),
           min(j.id) FILTER (WHERE NOT j.taken)
      FROM judged j
$$;

-- In passes that only count. Where something is wrong another finds an example.
CREATE FUNCTION farebox.audit_lots() RETURNS SETOF farebox.audit_check
LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN QUERY
    WITH marks AS MATERIALIZED (
        SELECT count(*) AS checked, count(*) FILTER (WHERE NOT j.held) AS v1,
               count(*) FILTER (WHERE NOT j.spoken_for) AS v2
          FROM farebox.judged_marks(NULL) AS j
    ), lots AS MATERIALIZED (
        SELECT count(*) AS checked, count(*) FILTER (WHERE NOT j.came) AS v3, count(*) FILTER (WHERE NOT j.left_so) AS v4
          FROM farebox.judged_lots() AS j
    ), draws AS MATERIALIZED (
        SELECT count(*) AS checked, count(*) FILTER (WHERE NOT j.drawn) AS v5,
               (SELECT count(*) FROM farebox.draws) - coalesce(sum(j.draws), 0)::bigint AS strays
          FROM farebox.judged_draws() AS j
    )
    SELECT v.name, v.checked, v.violations, v.example
      FROM marks m, lots l, draws d,
           LATERAL (VALUES
               ('lots_hold_the_balance_at_their_mark', m.checked, m.v1, CASE WHEN m.v1 > 0 THEN (
                    SELECT min(j.id) FROM farebox.judged_marks(NULL) AS j WHERE NOT j.held
                ) END),
               ('lots_owe_no_more_than_the_debt_and_reserve_no_more_than_is_held', m.checked, m.v2,
                CASE WHEN m.v2 > 0 THEN (
                    SELECT min(j.id) FROM farebox.judged_marks(NULL) AS j WHERE NOT j.spoken_for
                ) END),
               ('lots_came_with_their_transfers', l.checked, l.v3, CASE WHEN l.v3 > 0 THEN (
                    SELECT min(j.id) FROM farebox.judged_lots() AS j WHERE NOT j.came
                ) END),
               ('lots_have_left_what_their_draws_left', l.checked, l.v4, CASE WHEN l.v4 > 0 THEN (
                    SELECT min(j.id) FROM farebox.judged_lots() AS j WHERE NOT j.left_so
                ) END),
               ('transfers_are_drawn_from_lots', d.checked, d.v5 + abs(d.strays), coalesce(CASE WHEN d.v5 > 0 THEN (
                    SELECT min(j.id) FROM farebox.judged_draws() AS j WHERE NOT j.drawn
                ) END, CASE WHEN d.strays <> 0 THEN farebox.a_stray_draw() END))
           ) AS v (name, checked, violations, example);
END
$$;

-- The accounts that have moved since their mark.
CREATE FUNCTION farebox.audit_lots_since(_steps farebox.audit_step[]) RETURNS SETOF farebox.audit_check
LANGUAGE plpgsql STABLE SET plan_cache_mode = force_custom_plan AS $$
DECLARE
    -- Known when the plan is made: it goes to these accounts, and to no other.
    accounts uuid[] := ARRAY(SELECT s.account_id FROM unnest(_steps) AS s);
BEGIN
    RETURN QUERY
    WITH judged AS MATERIALIZED (
        SELECT j.* FROM farebox.judged_marks(accounts) AS j
    )
    SELECT v.name, v.checked, v.violations, v.example
      FROM (
               SELECT count(*) AS checked,
                      count(*) FILTER (WHERE NOT j.held) AS v1, min(j.id) FILTER (WHERE NOT j.held) AS e1,
                      count(*) FILTER (WHERE NOT j.spoken_for) AS v2, min(j.id) FILTER (WHERE NOT j.spoken_for) AS e2
                 FROM judged j
           ) AS c,
           LATERAL (VALUES
               ('lots_hold_the_balance_at_their_mark', c.checked, c.v1, c.e1),
               ('lots_owe_no_more_than_the_debt_and_reserve_no_more_than_is_held', c.checked, c.v2, c.e2)
           ) AS v (name, checked, violations, example);
END
$$;

