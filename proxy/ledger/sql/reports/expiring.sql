-- The account $1's lots that expire before $2, the soonest first, of which calls may still draw something.
SELECT l.*
  FROM farebox.lots l
 WHERE l.account_id = $1 AND l.remaining > 0 AND l.remaining > l.reserved + l.owed AND l.expires_at < $2
 ORDER BY l.expires_at, l.version
 LIMIT 20
