-- The pass over many accounts.

-- Draws these accounts' lots, about _rows transfers in all. What somebody has locked is left for the next pass. broken:
-- accounts whose lots can't be drawn, of which example is one, and problem why; they keep no other waiting. No row:
-- another session is at it. A subtransaction an account: not many of them in one call.
CREATE FUNCTION farebox.draw_accounts(_account_ids uuid[], _rows integer)
RETURNS TABLE (drawn bigint, broken bigint, example uuid, problem text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    _id uuid;
    free boolean;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtextextended('farebox.draw_accounts', 0)) THEN
        RETURN;
    END IF;
    drawn := 0;
    broken := 0;
    FOREACH _id IN ARRAY _account_ids LOOP
        EXIT WHEN drawn >= _rows;
        BEGIN
            SELECT count(*) = 0 INTO free FROM farebox.lot_marks m WHERE m.account_id = _id;
            IF NOT free THEN
                PERFORM FROM farebox.lot_marks m
                  WHERE m.account_id = _id FOR UPDATE SKIP LOCKED;
                free := FOUND;
            END IF;
            IF free THEN
                drawn := drawn + farebox.draw_lots(_id, NULL, _rows);
            END IF;
        EXCEPTION WHEN lock_not_available THEN
            -- Somebody has begun its mark at this moment.
            NULL;
        WHEN OTHERS THEN
            broken := broken + 1;
            example := coalesce(example, _id);
            problem := coalesce(problem, SQLERRM);
        END;
    END LOOP;
    RETURN NEXT;
END
$$;

GRANT EXECUTE ON FUNCTION farebox.draw_accounts TO farebox_control;
