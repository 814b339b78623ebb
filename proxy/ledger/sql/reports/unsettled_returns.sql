-- Refunds and disputes of the mode $1 that Stripe may still decide about, whenever they were made.
SELECT 'refund' AS kind, r.id
  FROM farebox.stripe_refunds r
  JOIN farebox.orders o ON o.id = r.order_id
 WHERE r.status IN ('pending', 'requires_action') AND o.livemode = $1
 UNION ALL
SELECT 'dispute', d.id
  FROM farebox.disputes d
  JOIN farebox.orders o ON o.id = d.order_id
 WHERE d.status NOT IN ('won', 'lost', 'warning_closed') AND o.livemode = $1
