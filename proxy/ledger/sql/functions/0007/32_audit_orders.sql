-- The audit of orders: what was paid for is what was credited, and the reverse.

-- Whether a paid order has what the book says of it: its credits, its bonus, and what came in for them.
CREATE FUNCTION farebox.credited_so(
    _order farebox.orders, _kind text, _amount bigint, _reference text, _bonus_kind text, _bonus_amount bigint,
    _bonus_reference text
) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT coalesce(
        _kind = CASE _order.kind WHEN 'plan' THEN 'plan' ELSE 'purchase' END
        AND _amount = _order.credits AND _reference IN (_order.payment_intent, _order.session_id, _order.invoice)
        AND CASE
            WHEN _order.bonus = 0 THEN _order.bonus_version IS NULL
            ELSE _bonus_kind = 'promo' AND _bonus_amount = _order.bonus AND _bonus_reference = _reference
        END
        -- Of an invoice a part may be paid from what the customer has at Stripe.
        AND (_order.kind = 'plan' OR _order.received BETWEEN _order.subtotal - _order.discount
                 AND _order.subtotal - _order.discount + _order.tax),
        false
    )
$$;

-- Each paid order has its credits and its bonus in the book, under the name of its payment, and what came in adds up; and
-- each purchase in the book has its order. The book is gone over once: purchases are few among its rows.
CREATE FUNCTION farebox.audit_orders() RETURNS SETOF farebox.audit_check
LANGUAGE sql STABLE AS $$
    WITH book AS MATERIALIZED (
        SELECT t.account_id, t.version, t.kind, t.amount, t.reference
          FROM farebox.transfers t WHERE t.kind IN ('purchase', 'plan', 'promo')
    ), paid AS MATERIALIZED (
        SELECT o.*, o AS sold FROM farebox.orders o WHERE o.state = 'paid'
    ), judged AS (
        SELECT o.id::text AS id,
               farebox.credited_so(o.sold, c.kind, c.amount, c.reference, b.kind, b.amount, b.reference) AS kept
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
