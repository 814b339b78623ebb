-- Accounts whose lots are not drawn to the end, those with least to draw first: $1 of them; behind: transfers of all.
SELECT a.id, a.version - coalesce(m.version, 0) AS transfers, sum(a.version - coalesce(m.version, 0)) OVER () AS behind
  FROM farebox.accounts a
  LEFT JOIN farebox.lot_marks m ON m.account_id = a.id
 WHERE a.version > coalesce(m.version, 0)
 ORDER BY transfers, a.id
 LIMIT $1
