-- What is known here of the disputes $1, of the payments $2, where an order of ours has paid by that payment.
SELECT p.id, o.id AS order_id, o.currency, CASE WHEN d.withdrawn THEN d.amount WHEN d.id IS NOT NULL THEN 0 END AS amount,
       d.status AS state, NULL::text AS reason, NULL::text AS resolution, greatest(o.received, 1) AS whole
  FROM unnest($1::text[], $2::text[]) AS p (id, payment)
  JOIN farebox.orders o ON o.payment_intent = p.payment AND o.state = 'paid'
  LEFT JOIN farebox.disputes d ON d.id = p.id
