-- What has been written stays: the book and the prices for good, the rest at least as rows.

CREATE FUNCTION farebox.refuse_change() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% on farebox.%: its rows are never changed or removed', TG_OP, TG_TABLE_NAME
        USING ERRCODE = '55000';
END
$$;

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON farebox.transfers
    FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();
CREATE TRIGGER immutable BEFORE UPDATE OR DELETE OR TRUNCATE ON farebox.price_versions
    FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();
CREATE TRIGGER immutable BEFORE UPDATE OR DELETE OR TRUNCATE ON farebox.prices
    FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();
CREATE TRIGGER never_removed BEFORE DELETE OR TRUNCATE ON farebox.accounts
    FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();
CREATE TRIGGER never_removed BEFORE DELETE OR TRUNCATE ON farebox.holds
    FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();
CREATE TRIGGER never_removed BEFORE DELETE OR TRUNCATE ON farebox.api_keys
    FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();

-- How far this database has been migrated; serves_from: the oldest migration whose code it still serves.
CREATE FUNCTION farebox.schema_version(OUT number integer, OUT serves_from integer)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT m.number, m.serves_from FROM farebox.schema_migrations m ORDER BY m.number DESC LIMIT 1
$$;
