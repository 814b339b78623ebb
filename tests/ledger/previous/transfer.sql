SELECT t.* FROM farebox.transfers t WHERE t.account_id = $1 AND t.version = $2
