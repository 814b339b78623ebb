-- Payments in quarantine, oldest first: $2 of them; those that were decided about only where $1.
SELECT q.*
  FROM farebox.quarantine q
 WHERE $1 OR q.resolved_at IS NULL
 ORDER BY q.seen_at, q.payment
 LIMIT $2
