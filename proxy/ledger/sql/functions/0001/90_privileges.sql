-- Who may do what. Group roles; a login gets them by `farebox migrate --grant-to`. All that isn't named is the owner's.
REVOKE ALL ON SCHEMA farebox FROM PUBLIC;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA farebox FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA farebox FROM PUBLIC;

GRANT USAGE ON SCHEMA farebox TO farebox_gateway, farebox_control, farebox_reader;
GRANT EXECUTE ON FUNCTION farebox.schema_version TO farebox_gateway, farebox_control, farebox_reader;

-- The data plane: holds and what they end in. It can charge what was held, and can't make credits.
GRANT EXECUTE ON FUNCTION
    farebox.batch, farebox.extend, farebox.start_worker, farebox.stop_worker, farebox.heartbeat, farebox.expire_holds,
    farebox.find_key, farebox.put_price_version
TO farebox_gateway;

GRANT EXECUTE ON FUNCTION
    farebox.create_account, farebox.create_key, farebox.revoke_key, farebox.update_key, farebox.rotate_key,
    farebox.grant_credits, farebox.reverse, farebox.put_price_version, farebox.audit
TO farebox_control;
GRANT SELECT ON
    farebox.accounts, farebox.api_keys, farebox.spend_limits, farebox.workers, farebox.price_versions, farebox.prices,
    farebox.holds, farebox.transfers, farebox.schema_migrations
TO farebox_control;

-- Self-service: an account's own rows, by row-level security; prices are the same for all. ENABLE, not FORCE: the
-- owner's functions and its audit must see every row.
GRANT SELECT ON farebox.accounts, farebox.holds, farebox.transfers, farebox.prices TO farebox_reader;
ALTER TABLE farebox.accounts ENABLE ROW LEVEL SECURITY;
ALTER TABLE farebox.holds ENABLE ROW LEVEL SECURITY;
ALTER TABLE farebox.transfers ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_account ON farebox.accounts FOR SELECT TO farebox_reader
    USING (id = (SELECT nullif(current_setting('farebox.account', true), '')::uuid));
CREATE POLICY own_holds ON farebox.holds FOR SELECT TO farebox_reader
    USING (account_id = (SELECT nullif(current_setting('farebox.account', true), '')::uuid));
CREATE POLICY own_transfers ON farebox.transfers FOR SELECT TO farebox_reader
    USING (account_id = (SELECT nullif(current_setting('farebox.account', true), '')::uuid));
CREATE POLICY all_accounts ON farebox.accounts FOR SELECT TO farebox_control USING (true);
CREATE POLICY all_holds ON farebox.holds FOR SELECT TO farebox_control USING (true);
CREATE POLICY all_transfers ON farebox.transfers FOR SELECT TO farebox_control USING (true);
