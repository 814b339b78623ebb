-- The account $1's transfers, newest first: $3 of them, of versions below $2 (NULL: from the newest).
SELECT t.*
  FROM farebox.transfers t
 WHERE t.account_id = $1 AND t.version < coalesce($2::bigint, 9223372036854775807)
 ORDER BY t.version DESC
 LIMIT $3
