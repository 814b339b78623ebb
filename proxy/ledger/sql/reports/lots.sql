-- The account $1's lots that have anything left, or all of them ($2), in the order in which they are drawn; those that
-- are used up at the end, the newest first. At most $3.
SELECT l.*
  FROM farebox.lots l
 WHERE l.account_id = $1 AND (l.remaining > 0 OR $2)
 ORDER BY l.remaining = 0, CASE WHEN l.remaining > 0 THEN l.priority END,
          CASE WHEN l.remaining > 0 THEN l.expires_at END, CASE WHEN l.remaining > 0 THEN l.version END, l.version DESC
 LIMIT $3
