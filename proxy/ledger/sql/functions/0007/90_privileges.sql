-- Money in is the operator's side: the gateway's role has no part in it.
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA farebox FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA farebox FROM PUBLIC;
GRANT SELECT ON
    farebox.freezes, farebox.lots, farebox.draws, farebox.lot_marks, farebox.stripe_customers, farebox.orders,
    farebox.quarantine, farebox.stripe_events, farebox.stripe_refunds, farebox.refund_requests, farebox.disputes,
    farebox.auto_topups, farebox.alerts, farebox.outbox, farebox.promo_codes, farebox.promo_redemptions
TO farebox_control;

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON farebox.draws
    FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();
CREATE TRIGGER never_removed BEFORE DELETE OR TRUNCATE ON farebox.lots
    FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();
CREATE TRIGGER never_removed BEFORE DELETE OR TRUNCATE ON farebox.orders
    FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();
CREATE TRIGGER never_removed BEFORE DELETE OR TRUNCATE ON farebox.stripe_refunds
    FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();
CREATE TRIGGER never_removed BEFORE DELETE OR TRUNCATE ON farebox.refund_requests
    FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();
CREATE TRIGGER never_removed BEFORE DELETE OR TRUNCATE ON farebox.disputes
    FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();

-- Self-service: an account's own rows.
GRANT SELECT ON farebox.lots, farebox.orders, farebox.auto_topups TO farebox_reader;
ALTER TABLE farebox.lots ENABLE ROW LEVEL SECURITY;
ALTER TABLE farebox.orders ENABLE ROW LEVEL SECURITY;
ALTER TABLE farebox.auto_topups ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_lots ON farebox.lots FOR SELECT TO farebox_reader
    USING (account_id = (SELECT nullif(current_setting('farebox.account', true), '')::uuid));
CREATE POLICY own_orders ON farebox.orders FOR SELECT TO farebox_reader
    USING (account_id = (SELECT nullif(current_setting('farebox.account', true), '')::uuid));
CREATE POLICY own_auto_topup ON farebox.auto_topups FOR SELECT TO farebox_reader
    USING (account_id = (SELECT nullif(current_setting('farebox.account', true), '')::uuid));
CREATE POLICY all_lots ON farebox.lots FOR SELECT TO farebox_control USING (true);
CREATE POLICY all_orders ON farebox.orders FOR SELECT TO farebox_control USING (true);
CREATE POLICY all_auto_topups ON farebox.auto_topups FOR SELECT TO farebox_control USING (true);
