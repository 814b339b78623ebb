-- The payments (PaymentIntents) of orders that were paid since $1, in the mode $2, behind the payment $3: $4 of them.
SELECT o.payment_intent
  FROM farebox.orders o
 WHERE o.state = 'paid' AND o.paid_at >= $1 AND o.livemode = $2 AND o.kind <> 'plan' AND o.payment_intent > $3
 ORDER BY o.payment_intent
 LIMIT $4
