-- The refund request $1, with what its order says of the payment.
SELECT r.*, o.payment_intent, o.currency, o.livemode
  FROM farebox.refund_requests r
  JOIN farebox.orders o ON o.id = r.order_id
 WHERE r.id = $1
