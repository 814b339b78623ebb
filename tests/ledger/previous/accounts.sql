-- Accounts in the order of their making: $2 of them, those behind the id $1 (NULL: from the first).
SELECT a.*
  FROM farebox.accounts a
  LEFT JOIN farebox.accounts p ON p.id = $1::uuid
 WHERE $1::uuid IS NULL OR (a.created_at, a.id) > (p.created_at, p.id)
 ORDER BY a.created_at, a.id
 LIMIT $2
