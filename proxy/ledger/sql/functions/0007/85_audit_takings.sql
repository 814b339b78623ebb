-- What the audit has to say about refunds and disputes.

-- An open hold belongs to a worker that lives, to one that a live one is about to settle, or to a refund under way.
-- Judged at the time of the snapshot: in the eyes of a long audit's end, every lease that it sees has lapsed.
CREATE OR REPLACE FUNCTION farebox.audit_leases() RETURNS SETOF farebox.audit_check
LANGUAGE sql STABLE AS $$
    WITH judged AS (
        SELECT h.id::text AS id,
               CASE WHEN h.worker_id IS NULL THEN
                   (r.account_id, r.credits + r.bonus) IS NOT DISTINCT FROM (h.account_id, h.amount)
               ELSE w.id IS NOT NULL AND (
                   w.lease_until > now() - interval '5 minutes'
                   -- Nobody sweeps while no worker runs, nor soon after Postgres came up or after workers were cut off
                   -- from it: one that has been there for a while should have.
                   OR farebox.postgres_started() > now() - interval '5 minutes'
                   OR NOT EXISTS (
                       SELECT FROM farebox.workers live
                        WHERE live.lease_until > now()
                          AND live.started_at < now() - interval '5 minutes'
                          AND live.held_since < now() - interval '5 minutes'
                   )
               ) END AS kept
          FROM farebox.holds h
          LEFT JOIN farebox.workers w ON w.id = h.worker_id
          LEFT JOIN farebox.refund_requests r ON r.id = h.id AND r.state = 'held'
         WHERE h.state = 'open'
    )
    SELECT 'open_holds_belong_to_a_live_worker', count(*), count(*) FILTER (WHERE NOT j.kept),
           min(j.id) FILTER (WHERE NOT j.kept)
      FROM judged j
$$;

-- Each order has given up what its refunds and disputes come to, of its bonus at most that; and the book says the same of
-- each account.
CREATE FUNCTION farebox.audit_takings() RETURNS SETOF farebox.audit_check
LANGUAGE sql STABLE AS $$
    WITH returned AS (
        SELECT g.order_id, sum(g.amount)::bigint AS amount
          FROM (
                   SELECT r.order_id, r.amount FROM farebox.stripe_refunds r WHERE r.active
                   UNION ALL
                   SELECT d.order_id, d.amount FROM farebox.disputes d WHERE d.withdrawn
               ) AS g
         GROUP BY g.order_id
    ), judged AS (
        SELECT o.id::text AS id,
               o.taken = farebox.share_of(o.credits, m.back, o.received)
               AND o.bonus_taken <= farebox.share_of(o.bonus, m.back, o.received) AS kept
          FROM farebox.orders o
          LEFT JOIN returned r ON r.order_id = o.id
         CROSS JOIN LATERAL (SELECT least(coalesce(r.amount, 0), o.received) AS back) AS m
         WHERE o.state = 'paid'
    ), taken AS (
        SELECT o.account_id, sum(o.taken + o.bonus_taken) AS amount FROM farebox.orders o GROUP BY o.account_id
    ), booked AS (
        SELECT t.account_id, sum(CASE t.account_side WHEN 'debit' THEN t.amount ELSE -t.amount END) AS amount
          FROM farebox.transfers t
         WHERE t.kind IN ('refund', 'refund_return', 'dispute', 'dispute_return')
         GROUP BY t.account_id
    ), accounts AS (
        SELECT account_id::text AS id, coalesce(b.amount, 0) = coalesce(k.amount, 0) AS kept
          FROM taken k FULL JOIN booked b USING (account_id)
    )
    SELECT 'orders_gave_up_what_their_refunds_say', count(*), count(*) FILTER (WHERE NOT j.kept),
           min(j.id) FILTER (WHERE NOT j.kept)
      FROM judged j
    UNION ALL
    SELECT 'the_book_has_what_orders_gave_up', count(*), count(*) FILTER (WHERE NOT a.kept),
           min(a.id) FILTER (WHERE NOT a.kept)
      FROM accounts a
$$;

-- Whatever is being refunded is held.
CREATE FUNCTION farebox.audit_refund_requests() RETURNS SETOF farebox.audit_check
LANGUAGE sql STABLE AS $$
    WITH requests AS (
        SELECT r.id::text AS id,
               (h.state, h.account_id, h.amount)
                   IS NOT DISTINCT FROM ('open', r.account_id, r.credits + r.bonus) AS kept
          FROM farebox.refund_requests r LEFT JOIN farebox.holds h ON h.id = r.id
         WHERE r.state = 'held'
    )
    SELECT 'refunds_under_way_are_held', count(*), count(*) FILTER (WHERE NOT q.kept),
           min(q.id) FILTER (WHERE NOT q.kept)
      FROM requests q
$$;

-- Orders that new transfers are about, found by what those are called: purchases have theirs, which is as it was
-- credited; and each has given up what its refunds and disputes come to, and the book says so.
CREATE FUNCTION farebox.judged_orders_since(_steps farebox.audit_step[])
RETURNS TABLE (name text, id text, account_id uuid, kept boolean)
LANGUAGE plpgsql STABLE
-- One plan, also of the functions in it: each row by its key, however much of the ledger is new.
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
BEGIN
    RETURN QUERY
    WITH new AS MATERIALIZED (
        SELECT t.account_id, t.version, t.kind, t.amount, t.reference
          FROM farebox.audit_step_rows(_steps) AS r, LATERAL (SELECT (r.transfer).*) AS t
         WHERE t.kind IN ('purchase', 'plan', 'refund', 'refund_return', 'dispute', 'dispute_return')
    ), bought AS MATERIALIZED (
        SELECT n.account_id, n.version, n.kind, n.amount, n.reference, p.sold
          FROM new n
          LEFT JOIN LATERAL (
              SELECT o AS sold
                FROM farebox.orders o
               WHERE (o.payment_intent = n.reference OR o.session_id = n.reference OR o.invoice = n.reference)
                 AND o.account_id = n.account_id AND o.credit_version = n.version AND o.state = 'paid'
          ) AS p ON true
         WHERE n.kind IN ('purchase', 'plan')
    ), named AS MATERIALIZED (
        SELECT b.account_id, (b.sold).id AS order_id FROM bought b WHERE b.sold IS DISTINCT FROM NULL
        UNION
        SELECT n.account_id, coalesce(r.order_id, d.order_id)
          FROM new n
          LEFT JOIN farebox.stripe_refunds r
            ON n.kind IN ('refund', 'refund_return') AND r.id = split_part(n.reference, ':', 1)
          LEFT JOIN farebox.disputes d
            ON n.kind IN ('dispute', 'dispute_return') AND d.id = split_part(n.reference, ':', 1)
         WHERE n.kind NOT IN ('purchase', 'plan')
    ), judged AS MATERIALIZED (
        SELECT o.id, n.account_id, o.credits, o.bonus, o.received, o.taken, o.bonus_taken, farebox.gone_back(o.id) AS back
          FROM named n LEFT JOIN farebox.orders o ON o.id = n.order_id AND o.account_id = n.account_id
    )
    SELECT 'purchases_have_their_order', b.account_id || '-' || b.version, b.account_id, b.sold IS DISTINCT FROM NULL
      FROM bought b
    UNION ALL
    SELECT 'paid_orders_were_credited', (b.sold).id::text, b.account_id,
           farebox.credited_so(b.sold, b.kind, b.amount, b.reference, t.kind, t.amount, t.reference)
      FROM bought b
      LEFT JOIN farebox.transfers t ON t.account_id = b.account_id AND t.version = (b.sold).bonus_version
     WHERE b.sold IS DISTINCT FROM NULL
    UNION ALL
    SELECT 'orders_gave_up_what_their_refunds_say', o.id::text, o.account_id,
           o.taken = farebox.share_of(o.credits, o.back, o.received)
               AND o.bonus_taken <= farebox.share_of(o.bonus, o.back, o.received)
      FROM judged o
     WHERE o.id IS NOT NULL
    UNION ALL
    SELECT 'the_book_has_what_orders_gave_up', o.account_id::text, o.account_id, coalesce(o.taken + o.bonus_taken = (
               SELECT coalesce(sum(CASE t.account_side WHEN 'debit' THEN t.amount ELSE -t.amount END), 0)
                 FROM farebox.transfers t
                WHERE t.kind IN ('refund', 'refund_return', 'dispute', 'dispute_return')
                  AND t.reference = ANY (
                      farebox.taking_references(o.id, '') || farebox.taking_references(o.id, ':bonus')
                  )
           ), false)
      FROM judged o;
END
$$;

CREATE FUNCTION farebox.audit_orders_since(_steps farebox.audit_step[]) RETURNS SETOF farebox.audit_check
LANGUAGE sql STABLE AS $$
    SELECT v.name, count(j.name), count(*) FILTER (WHERE NOT j.kept), min(j.id) FILTER (WHERE NOT j.kept)
      FROM (VALUES ('paid_orders_were_credited'), ('purchases_have_their_order'),
                   ('orders_gave_up_what_their_refunds_say'), ('the_book_has_what_orders_gave_up')) AS v (name)
      LEFT JOIN farebox.judged_orders_since(_steps) AS j ON j.name = v.name
     GROUP BY v.name
    UNION ALL
    SELECT * FROM farebox.audit_refund_requests()
$$;
