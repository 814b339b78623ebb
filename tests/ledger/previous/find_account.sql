-- Accounts that $1 (an id, or NULL) or $2 (an external id or a name) may mean, the likeliest first.
SELECT a.*, CASE WHEN a.id = $1::uuid THEN 1 WHEN a.external_id = $2::text THEN 2 ELSE 3 END AS rank
  FROM farebox.accounts a
 WHERE a.id = $1::uuid OR a.external_id = $2::text OR a.name = $2::text
 ORDER BY rank
 LIMIT 4
