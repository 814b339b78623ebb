-- Of seals that were kept elsewhere (account, number, version, head), those that don't stand so in their chains.
SELECT k.account_id, k.number
  FROM unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::bytea[]) AS k (account_id, number, last_version, head)
  LEFT JOIN farebox.seals s ON s.account_id = k.account_id AND s.number = k.number
 WHERE (s.last_version, s.head) IS DISTINCT FROM (k.last_version, k.head)
 ORDER BY k.account_id, k.number
