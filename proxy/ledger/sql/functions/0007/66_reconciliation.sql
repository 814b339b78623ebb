-- When Stripe's book and this one were last compared, over which time, and what was left between them.

-- _window: recent or month, as the server compares; another one leaves nothing here. What began before the one that is
-- noted says nothing newer: a month's comparison takes long, and the hour's goes on beside it.
CREATE FUNCTION farebox.note_reconciliation(
    _window text, _started_at timestamptz, _compared bigint, _mended bigint, _differing bigint
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO farebox.reconciliations AS r (name, started_at, finished_at, compared, mended, differing, clean_at)
    VALUES (
        _window, _started_at, clock_timestamp(), _compared, _mended, _differing,
        CASE WHEN _differing = 0 THEN clock_timestamp() END
    ) ON CONFLICT (name) DO UPDATE
       SET started_at = excluded.started_at, finished_at = excluded.finished_at, compared = excluded.compared,
           mended = excluded.mended, differing = excluded.differing, clean_at = coalesce(excluded.clean_at, r.clean_at)
     WHERE r.started_at <= excluded.started_at;
END
$$;

GRANT EXECUTE ON FUNCTION farebox.note_reconciliation TO farebox_control;
GRANT SELECT ON farebox.reconciliations TO farebox_control;
