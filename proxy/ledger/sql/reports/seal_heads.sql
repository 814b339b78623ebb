-- The last seal of each account.
SELECT DISTINCT ON (s.account_id) s.account_id, s.number, s.last_version, s.head
  FROM farebox.seals s
 ORDER BY s.account_id, s.number DESC
