-- The transfer $2 of the account $1, which redeemed a code, and when its credits expire.
SELECT t.*, l.expires_at
  FROM farebox.transfers t
  LEFT JOIN farebox.lots l USING (account_id, version)
 WHERE t.account_id = $1 AND t.version = $2
