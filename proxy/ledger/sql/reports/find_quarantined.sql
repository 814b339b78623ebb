-- The payment $1 in quarantine.
SELECT q.*
  FROM farebox.quarantine q
 WHERE q.payment = $1
