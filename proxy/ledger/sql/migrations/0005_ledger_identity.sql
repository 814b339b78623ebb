-- Which ledger this is. A journal names the ledger that its rows belong to, so that they are never carried out in
-- another: a database that was made anew, or one that DATABASE_URL has come to name. A backup, a restored one and a
-- standby are the same ledger.
-- serves code from: 1

CREATE TABLE farebox.ledger_identity (
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    only_one boolean PRIMARY KEY DEFAULT true CHECK (only_one)
);
INSERT INTO farebox.ledger_identity DEFAULT VALUES;
REVOKE ALL ON farebox.ledger_identity FROM PUBLIC;
