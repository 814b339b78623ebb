-- Accounts of this mode ($1) that want to buy their pack now, as far as a look without locks can tell: $2 of them, those
-- that have waited for longest. The balance decides, not what is available of it.
-- Each account's row is found by its key (OFFSET 0 keeps it so): those that buy by themselves are few among all.
SELECT t.account_id, t.pack
  FROM farebox.auto_topups t
 CROSS JOIN LATERAL (
     SELECT FROM farebox.accounts a
      WHERE a.id = t.account_id AND a.balance < t.threshold AND a.frozen_at IS NULL
     OFFSET 0
 ) AS low
  JOIN farebox.stripe_customers c ON c.account_id = t.account_id AND c.livemode = $1
 WHERE t.enabled AND t.livemode = $1 AND coalesce(t.blocked_until <= clock_timestamp(), true)
   AND c.payment_method IS NOT NULL
   AND NOT EXISTS (
       SELECT FROM farebox.orders o
        WHERE o.account_id = t.account_id AND o.kind = 'auto' AND o.state IN ('created', 'open', 'pending')
   )
 ORDER BY t.changed_at
 LIMIT $2
