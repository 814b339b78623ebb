-- Refund requests that wait for their refund, made longer than $1 ago, the oldest first: $2 of them at most.
SELECT r.*, o.payment_intent, o.currency, o.livemode
  FROM farebox.refund_requests r
  JOIN farebox.orders o ON o.id = r.order_id
 WHERE r.state = 'held' AND r.created_at <= clock_timestamp() - $1::interval
 ORDER BY r.created_at, r.id
 LIMIT $2
