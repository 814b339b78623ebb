-- What is known here of the refunds $1, of the payments $2, where an order of ours has paid by that payment.
SELECT p.id, o.id AS order_id, o.currency, CASE WHEN r.active THEN r.amount WHEN r.id IS NOT NULL THEN 0 END AS amount,
       r.status AS state, NULL::text AS reason, NULL::text AS resolution, NULL::bigint AS whole
  FROM unnest($1::text[], $2::text[]) AS p (id, payment)
  JOIN farebox.orders o ON o.payment_intent = p.payment AND o.state = 'paid'
  LEFT JOIN farebox.stripe_refunds r ON r.id = p.id
