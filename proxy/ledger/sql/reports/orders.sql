-- Orders, newest first: $4 of them, behind the order $3 (NULL: from the newest), of the account $1 (NULL: of all), in the
-- state $2 (NULL: any).
SELECT o.*
  FROM farebox.orders o
 WHERE ($1::uuid IS NULL OR o.account_id = $1) AND ($2::text IS NULL OR o.state = $2)
   AND ($3::uuid IS NULL OR (o.created_at, o.id) < (SELECT p.created_at, p.id FROM farebox.orders p WHERE p.id = $3))
 ORDER BY o.created_at DESC, o.id DESC
 LIMIT $4
