-- The reasons for which the account $1 was ever frozen, the newest first, those that stand before all.
SELECT f.*
  FROM farebox.freezes f
 WHERE f.account_id = $1
 ORDER BY f.lifted_at IS NOT NULL, f.created_at DESC, f.reference
 LIMIT 100
