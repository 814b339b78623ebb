-- Attempts of this mode ($1) that the bank refused without its customer, whose owner has not been sent a link yet.
SELECT o.*
  FROM farebox.auto_topups t
  JOIN farebox.orders o ON o.id = t.failed_order
 WHERE t.enabled AND t.link_order IS NULL AND t.problem = 'authentication_required' AND o.livemode = $1
 ORDER BY t.changed_at
 LIMIT $2
