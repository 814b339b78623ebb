-- The keys of the account $1, or the key $2.
SELECT k.*, s.spend_limit, coalesce(s.spent, 0) AS spent
  FROM farebox.api_keys k
  LEFT JOIN farebox.spend_limits s USING (family)
 WHERE k.account_id = $1::uuid OR k.id = $2::text
 ORDER BY k.created_at, k.id
