-- The audit of orders: what was paid for is what was credited, and the reverse.

-- Each paid order has its credits and its bonus in the book, under the name of its payment, and what came in adds up; and
-- each purchase in the book has its order. The book is gone over once: purchases are few among its rows.
CREATE FUNCTION farebox.audit_orders() RETURNS SETOF farebox.audit_check
LANGUAGE sql STABLE AS $$
    WITH book AS MATERIALIZED (
        SELECT t.account_id, t.version, t.kind, t.amount, t.reference
          FROM farebox.transfers t WHERE t.kind IN ('purchase', 'plan', 'promo')
    ), paid AS MATERIALIZED (
        SELECT o.* FROM farebox.orders o WHERE o.state = 'paid'
    ), judged AS (
        SELECT o.id::text AS id,
               coalesce(
                   c.kind = CASE o.kind WHEN 'plan' THEN 'plan' ELSE 'purchase' END
                   AND c.amount = o.credits AND c.reference IN (o.payment_intent, o.session_id, o.invoice)
                   AND CASE
                       WHEN o.bonus = 0 THEN o.bonus_version IS NULL
                       ELSE b.kind = 'promo' AND b.amount = o.bonus AND b.reference = c.reference
                   END
                   -- Of an invoice a part may be paid from what the customer has at Stripe.
                   AND (o.kind = 'plan'
                        OR o.received BETWEEN o.subtotal - o.discount AND o.subtotal - o.discount + o.tax),
                   false
               ) AS kept
          FROM paid o
          LEFT JOIN book c ON c.account_id = o.account_id AND c.version = o.credit_version
          LEFT JOIN book b ON b.account_id = o.account_id AND b.version = o.bonus_version
    ), purchases AS (
        SELECT b.account_id || '-' || b.version AS id, o.id IS NOT NULL AS kept
          FROM book b LEFT JOIN paid o ON o.account_id = b.account_id AND o.credit_version = b.version
         WHERE b.kind IN ('purchase', 'plan')
    )
    SELECT 'paid_orders_were_credited', count(*), count(*) FILTER (WHERE NOT j.kept), min(j.id) FILTER (WHERE NOT j.kept)
      FROM judged j
    UNION ALL
    SELECT 'purchases_have_their_order', count(*), count(*) FILTER (WHERE NOT p.kept), min(p.id) FILTER (WHERE NOT p.kept)
      FROM purchases p
$$;
