-- The audit of orders: what was paid for is what was credited, and the reverse.

-- Each paid order has its credits and its bonus in the book, under the name of its payment, and what came in adds up; and
-- each purchase in the book has its order.
CREATE FUNCTION farebox.audit_orders() RETURNS SETOF farebox.audit_check
LANGUAGE sql STABLE AS $$
    WITH paid AS (
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
          FROM farebox.orders o
          LEFT JOIN farebox.transfers c ON c.account_id = o.account_id AND c.version = o.credit_version
          LEFT JOIN farebox.transfers b ON b.account_id = o.account_id AND b.version = o.bonus_version
         WHERE o.state = 'paid'
    ), purchases AS (
        SELECT t.kind || ' ' || t.reference AS id, o.id IS NOT NULL AS kept
          FROM farebox.transfers t
          LEFT JOIN farebox.orders o
                 ON o.account_id = t.account_id AND o.credit_version = t.version AND o.state = 'paid'
         WHERE t.kind IN ('purchase', 'plan')
    )
    SELECT 'paid_orders_were_credited', count(*), count(*) FILTER (WHERE NOT p.kept), min(p.id) FILTER (WHERE NOT p.kept)
      FROM paid p
    UNION ALL
    SELECT 'purchases_have_their_order', count(*), count(*) FILTER (WHERE NOT p.kept), min(p.id) FILTER (WHERE NOT p.kept)
      FROM purchases p
$$;
