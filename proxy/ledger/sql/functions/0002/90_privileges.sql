REVOKE ALL ON ALL FUNCTIONS IN SCHEMA farebox FROM PUBLIC;
REVOKE ALL ON farebox.idempotency_keys, farebox.idempotency_answers FROM PUBLIC;
GRANT EXECUTE ON FUNCTION farebox.claim_key, farebox.free_key, farebox.keep_answer, farebox.forget_keys
TO farebox_gateway;
