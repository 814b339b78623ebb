-- What account $1 has said about topping up by itself, and how far that is.
SELECT t.*, month.minor AS spent, attempt.id AS attempt,
       CASE WHEN link.state IN ('created', 'open') THEN link.url END AS checkout_url,
       EXISTS (
           SELECT FROM farebox.stripe_customers c
            WHERE c.account_id = t.account_id AND c.livemode = t.livemode AND c.payment_method IS NOT NULL
       ) AS has_payment_method
  FROM farebox.auto_topups t
 CROSS JOIN LATERAL (
     SELECT coalesce(sum(o.price), 0)::bigint AS minor
       FROM farebox.orders o
      WHERE o.account_id = t.account_id AND o.kind = 'auto' AND o.currency = t.currency AND o.livemode = t.livemode
        AND o.state IN ('created', 'open', 'pending', 'paid')
        AND o.created_at >= date_trunc('month', clock_timestamp(), 'UTC')
 ) AS month
  LEFT JOIN farebox.orders attempt
         ON attempt.account_id = t.account_id AND attempt.kind = 'auto' AND attempt.state IN ('created', 'open', 'pending')
  LEFT JOIN farebox.orders link ON link.id = t.link_order AND link.kind = 'checkout'
 WHERE t.account_id = $1
