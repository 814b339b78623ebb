-- The reader's own account.
SELECT a.* FROM farebox.accounts a WHERE a.id = $1
