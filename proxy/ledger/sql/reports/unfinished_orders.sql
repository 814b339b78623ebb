-- Orders made before $1 that wait for their payment, oldest first: $3 of them, behind the order $2 (NULL: the oldest).
SELECT o.*
  FROM farebox.orders o
 WHERE o.state IN ('created', 'open', 'pending') AND o.created_at < $1
   AND ($2::uuid IS NULL OR (o.created_at, o.id) > (SELECT p.created_at, p.id FROM farebox.orders p WHERE p.id = $2))
 ORDER BY o.created_at, o.id
 LIMIT $3
