CREATE FUNCTION farebox.ledger_id() RETURNS uuid
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT i.id FROM farebox.ledger_identity i
$$;
REVOKE ALL ON FUNCTION farebox.ledger_id FROM PUBLIC;
GRANT EXECUTE ON FUNCTION farebox.ledger_id TO farebox_gateway;
