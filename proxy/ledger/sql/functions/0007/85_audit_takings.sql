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

-- Each order has given up what its refunds and disputes come to, of its bonus at most that; the book says the same of
-- each account; and whatever is being refunded is held.
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
         WHERE t.kind IN ('refund', 'refund_return', 'dispute', 'dispute_return') AND t.reference IS NOT NULL
         GROUP BY t.account_id
    ), accounts AS (
        SELECT account_id::text AS id, coalesce(b.amount, 0) = coalesce(k.amount, 0) AS kept
          FROM taken k FULL JOIN booked b USING (account_id)
    ), requests AS (
        SELECT r.id::text AS id,
               (h.state, h.account_id, h.amount)
                   IS NOT DISTINCT FROM ('open', r.account_id, r.credits + r.bonus) AS kept
          FROM farebox.refund_requests r LEFT JOIN farebox.holds h ON h.id = r.id
         WHERE r.state = 'held'
    )
    SELECT 'orders_gave_up_what_their_refunds_say', count(*), count(*) FILTER (WHERE NOT j.kept),
           min(j.id) FILTER (WHERE NOT j.kept)
      FROM judged j
    UNION ALL
    SELECT 'the_book_has_what_orders_gave_up', count(*), count(*) FILTER (WHERE NOT a.kept),
           min(a.id) FILTER (WHERE NOT a.kept)
      FROM accounts a
    UNION ALL
    SELECT 'refunds_under_way_are_held', count(*), count(*) FILTER (WHERE NOT q.kept),
           min(q.id) FILTER (WHERE NOT q.kept)
      FROM requests q
$$;
