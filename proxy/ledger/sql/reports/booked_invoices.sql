-- What became of the invoices $1 here: the order that each has paid, or why it is in quarantine.
SELECT p.id, o.id AS order_id, o.currency, o.received AS amount, CASE WHEN o.id IS NOT NULL THEN 'paid' END AS state, q.reason, q.resolution,
       NULL::bigint AS whole
  FROM unnest($1::text[]) AS p (id)
  LEFT JOIN farebox.orders o ON o.invoice = p.id
  LEFT JOIN farebox.quarantine q ON q.payment = p.id
