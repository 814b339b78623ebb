-- What became of the payments $1 (PaymentIntents) here: the order that each has paid, or why it is in quarantine.
SELECT p.id, o.id AS order_id, o.currency, o.received AS amount, NULL::text AS state, q.reason, q.resolution,
       NULL::bigint AS whole
  FROM unnest($1::text[]) AS p (id)
  LEFT JOIN farebox.orders o ON o.payment_intent = p.id AND o.state = 'paid'
  LEFT JOIN farebox.quarantine q ON q.payment = p.id
