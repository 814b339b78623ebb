REVOKE ALL ON FUNCTION
    farebox.renew_lease, farebox.renew, farebox.postgres_started, farebox.lock_lapsed, farebox.sweep
FROM PUBLIC;
GRANT EXECUTE ON FUNCTION farebox.renew, farebox.sweep TO farebox_gateway;
