-- The pass that draws lots: which credits a transfer took, told after the fact and in the order of the versions.
--
-- It goes on from the account's mark. What it writes follows from the transfers, the lots and where refunds and disputes
-- were aimed at, and from no clock: late or in time, in one go or in many, it comes to the same. Whoever draws has
-- locked the account's mark; nobody else writes lots and draws, but for farebox.credited, which puts new lots behind it.
--
-- Up to the mark the lots hold what the balance was there. Hence a mark stands between moves: an overrun's credits are
-- consumed by the charge behind it, and what pays a debt belongs to what made it payable.

-- Waits for whoever else draws these lots; the account's mark.
CREATE FUNCTION farebox.lock_lots(_account_id uuid) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    mark bigint;
BEGIN
    -- Under a snapshot older than the lock, what the session before it has drawn would be drawn again.
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'the ledger writes under READ COMMITTED only' USING ERRCODE = '25001';
    END IF;
    INSERT INTO farebox.lot_marks (account_id, version) VALUES (_account_id, 0) ON CONFLICT DO NOTHING;
    SELECT m.version INTO mark FROM farebox.lot_marks m WHERE m.account_id = _account_id FOR UPDATE;
    RETURN mark;
END
$$;

-- Draws what left the account after _after, up to _upto. _lot_version: where refunds, disputes and expiries take from
-- first. _netted: what the debt payment at the beginning needs no lots for.
--
-- Parts of lots, in the order in which they are taken:
--   1 (aimed at a lot)    what is free of that lot
--   2 (debt payments)     what is owed to refunds and disputes
--   3                     what is free of lots that hadn't expired when the hold was opened
--   4                     what is free of the others: the expiry was late. The latest to expire first
--   5                     what is owed, 6 what is reserved: there is nothing else
CREATE FUNCTION farebox.draw_stretch(
    _account_id uuid, _after bigint, _upto bigint, _lot_version bigint, _netted bigint
) RETURNS void
LANGUAGE plpgsql
-- One plan whatever the tables' size: each row by its key. Planned while a table was empty, it must never scan it.
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    -- The lots with anything left, in drawing order: an element each. by_expiry: their places, the latest expiry first.
    lot_versions bigint[];
    lot_remaining bigint[];
    lot_reserved bigint[];
    lot_owed bigint[];
    lot_expires_at timestamptz[];
    by_expiry integer[];
    lots integer;
    -- The lots before it are used up.
    first integer := 1;
    expiring boolean;
    -- What was drawn.
    drawn_at bigint[] := '{}';
    drawn_nth integer[] := '{}';
    drawn_lot bigint[] := '{}';
    drawn bigint[] := '{}';
    drawn_owed boolean[] := '{}';
    draws integer := 0;
    entry record;
    lent bigint := 0;
    netted bigint := _netted;
    due bigint;
    aimed boolean;
    nth integer;
    i integer;
    part bigint;
BEGIN
    SELECT coalesce(array_agg(l.version ORDER BY l.priority, l.expires_at, l.version), '{}'),
           array_agg(l.remaining ORDER BY l.priority, l.expires_at, l.version),
           array_agg(l.reserved ORDER BY l.priority, l.expires_at, l.version),
           array_agg(l.owed ORDER BY l.priority, l.expires_at, l.version),
           array_agg(l.expires_at ORDER BY l.priority, l.expires_at, l.version)
      INTO lot_versions, lot_remaining, lot_reserved, lot_owed, lot_expires_at
      FROM farebox.lots l
     WHERE l.account_id = _account_id AND l.version <= _upto AND l.remaining > 0;
    lots := cardinality(lot_versions);
    expiring := EXISTS (SELECT FROM unnest(lot_expires_at) AS e WHERE e IS NOT NULL);
    by_expiry := ARRAY(
        SELECT u.n::integer FROM unnest(lot_expires_at) WITH ORDINALITY AS u (e, n) WHERE u.e IS NOT NULL ORDER BY u.e DESC, u.n
    );

    FOR entry IN
        SELECT t.version, t.kind, t.account_side, t.amount,
               -- A lot counts as it was when the hold was opened; a debt's payment as the hold that it comes from.
               CASE WHEN expiring THEN coalesce(
                   (SELECT h.opened_at FROM farebox.holds h WHERE h.id = t.hold_id), t.created_at
               ) END AS moment
          FROM farebox.transfers t
         WHERE t.account_id = _account_id AND t.version > _after AND t.version <= _upto
         ORDER BY t.version
    LOOP
        IF entry.account_side = 'credit' THEN
            lent := CASE entry.kind WHEN 'overrun' THEN entry.amount ELSE 0 END;
            CONTINUE;
        END IF;
        due := entry.amount - lent - netted;
        netted := 0;
        nth := 0;
        aimed := _lot_version IS NOT NULL AND entry.kind IN ('refund', 'dispute', 'expiry');
        WHILE lot_remaining[first] = 0 LOOP
            first := first + 1;
        END LOOP;
        FOR step IN 1..6 LOOP
            EXIT WHEN due = 0;
            CONTINUE WHEN step = 1 AND NOT aimed OR step = 2 AND entry.kind <> 'debt_payment';
            FOR place IN CASE step WHEN 4 THEN 1 ELSE first END
                      .. CASE step WHEN 4 THEN cardinality(by_expiry) ELSE lots END
            LOOP
                i := CASE step WHEN 4 THEN by_expiry[place] ELSE place END;
                CONTINUE WHEN lot_versions[i] > entry.version;
                part := CASE
                    WHEN step = 1 AND lot_versions[i] <> _lot_version THEN 0
                    WHEN step = 3 AND lot_expires_at[i] <= entry.moment THEN 0
                    WHEN step IN (2, 5) THEN lot_owed[i]
                    WHEN step = 6 THEN lot_reserved[i]
                    ELSE lot_remaining[i] - lot_reserved[i] - lot_owed[i]
                END;
                CONTINUE WHEN part = 0;
                part := least(part, due);
                lot_remaining[i] := lot_remaining[i] - part;
                IF step IN (2, 5) THEN
                    lot_owed[i] := lot_owed[i] - part;
                ELSIF step = 6 THEN
                    lot_reserved[i] := lot_reserved[i] - part;
                END IF;
                due := due - part;
                nth := nth + 1;
                draws := draws + 1;
                drawn_at[draws] := entry.version;
                drawn_nth[draws] := nth;
                drawn_lot[draws] := lot_versions[i];
                drawn[draws] := part;
                drawn_owed[draws] := step = 2;
                EXIT WHEN due = 0;
            END LOOP;
        END LOOP;
        IF due <> 0 THEN
            RAISE EXCEPTION 'the lots of account % don''t carry its transfer %: % microcredits are missing',
                _account_id, entry.version, due USING ERRCODE = 'XX001';
        END IF;
        IF aimed AND lent > 0 THEN
            -- What other holds have of that lot at this moment: the debt takes it from there when they end.
            i := array_position(lot_versions, _lot_version);
            IF i IS NOT NULL THEN
                lot_owed[i] := lot_owed[i] + least(lent, lot_remaining[i] - lot_reserved[i] - lot_owed[i]);
            END IF;
        END IF;
        lent := 0;
    END LOOP;

    INSERT INTO farebox.draws (account_id, version, nth, lot_version, amount, owed)
    SELECT _account_id, u.*
      FROM unnest(drawn_at, drawn_nth, drawn_lot, drawn, drawn_owed) AS u (version, nth, lot_version, amount, owed);
    UPDATE farebox.lots AS l
       SET remaining = u.remaining, reserved = u.reserved, owed = u.owed
      FROM unnest(lot_versions, lot_remaining, lot_reserved, lot_owed) AS u (version, remaining, reserved, owed)
     WHERE l.account_id = _account_id AND l.version = u.version
       AND (l.remaining, l.reserved, l.owed) IS DISTINCT FROM (u.remaining, u.reserved, u.owed);
END
$$;

-- What draws and returns of these transfers leave to be given back, the last drawn at the end. What a lot owed to the
-- refunds and disputes among them counts as theirs (_lot_version).
CREATE FUNCTION farebox.unwindable(
    _account_id uuid, _versions bigint[], _lot_version bigint, OUT lots bigint[], OUT amounts bigint[]
)
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    draw record;
    back bigint;
    part bigint;
    top integer := 0;
BEGIN
    lots := '{}';
    amounts := '{}';
    FOR draw IN
        SELECT d.version, d.nth, d.lot_version, d.amount
          FROM unnest(_versions) AS v (version)
          JOIN farebox.draws d ON d.account_id = _account_id AND d.version = v.version
        UNION
        SELECT d.version, d.nth, d.lot_version, d.amount
          FROM farebox.draws d
         WHERE d.account_id = _account_id AND d.lot_version = _lot_version AND d.owed
         ORDER BY version, nth
    LOOP
        IF draw.amount > 0 THEN
            top := top + 1;
            lots[top] := draw.lot_version;
            amounts[top] := draw.amount;
            CONTINUE;
        END IF;
        back := -draw.amount;
        WHILE back > 0 AND top > 0 LOOP
            part := least(back, amounts[top]);
            back := back - part;
            amounts[top] := amounts[top] - part;
            IF amounts[top] = 0 THEN
                top := top - 1;
            END IF;
        END LOOP;
    END LOOP;
    lots := lots[1:top];
    amounts := amounts[1:top];
END
$$;

-- Gives what came in at _version back to the lots from which the same hold took it, or, at a return, the refunds and
-- disputes of _references, aimed at _lot_version. What was no lot's but lent pays the debt that it is; where that was
-- paid already, it is a lot of its own. Returns what the debt payment behind it needs no lots for.
CREATE FUNCTION farebox.unwind(_account_id uuid, _version bigint, _lot_version bigint, _references text[]) RETURNS bigint
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    entry farebox.transfers;
    lot bigint;
    versions bigint[];
    stack record;
    top integer;
    part bigint;
    rest bigint;
    paid bigint;
    unowed bigint;
    netted bigint;
    nth integer := 0;
BEGIN
    SELECT * INTO entry FROM farebox.transfers t WHERE t.account_id = _account_id AND t.version = _version;
    SELECT t.amount INTO paid
      FROM farebox.transfers t
     WHERE t.account_id = _account_id AND t.version = _version + 1 AND t.kind = 'debt_payment';
    paid := coalesce(paid, 0);
    IF entry.hold_id IS NULL THEN
        lot := _lot_version;
        versions := ARRAY(
            SELECT t.version
              FROM unnest(_references) AS r (reference)
              JOIN farebox.transfers t ON t.reference = r.reference
             WHERE t.kind IN ('refund', 'refund_return', 'dispute', 'dispute_return') AND t.account_id = _account_id
               AND t.version < _version
        );
    ELSE
        versions := ARRAY(
            SELECT t.version
              FROM farebox.transfers t
             WHERE t.hold_id = entry.hold_id AND t.kind IN ('charge', 'true_up') AND t.account_id = _account_id
               AND t.version < _version
            UNION ALL
            SELECT t.version
              FROM farebox.transfers t
             WHERE t.hold_id = entry.hold_id AND t.kind = 'reversal' AND t.account_id = _account_id
               AND t.version < _version
        );
    END IF;

    rest := entry.amount;
    -- What the lot owes is paid by this, so that it needn't give it up.
    SELECT least(rest, paid, l.owed) INTO unowed
      FROM farebox.lots l WHERE l.account_id = _account_id AND l.version = lot;
    unowed := coalesce(unowed, 0);
    rest := rest - unowed;
    IF unowed > 0 THEN
        UPDATE farebox.lots AS l SET owed = l.owed - unowed WHERE l.account_id = _account_id AND l.version = lot;
    END IF;

    stack := farebox.unwindable(_account_id, versions, lot);
    top := cardinality(stack.lots);
    WHILE rest > 0 AND top > 0 LOOP
        part := least(rest, stack.amounts[top]);
        rest := rest - part;
        nth := nth + 1;
        INSERT INTO farebox.draws (account_id, version, nth, lot_version, amount, owed)
        VALUES (_account_id, _version, nth, stack.lots[top], -part, false);
        UPDATE farebox.lots AS l
           SET remaining = l.remaining + part
         WHERE l.account_id = _account_id AND l.version = stack.lots[top];
        top := top - 1;
    END LOOP;

    -- Other lots' owed parts come before.
    SELECT least(rest, greatest(paid - unowed - coalesce(sum(l.owed), 0), 0)) INTO netted
      FROM farebox.lots l
     WHERE l.account_id = _account_id AND l.remaining > 0;
    rest := rest - netted;
    IF rest > 0 THEN
        INSERT INTO farebox.lots (account_id, version, kind, amount, remaining, priority, created_at)
        VALUES (_account_id, _version, 'granted', rest, rest, farebox.priority_of('granted'), entry.created_at);
    END IF;
    RETURN unowed + netted;
END
$$;

-- Draws the moves after _after up to _upto, and takes the mark there. The caller has locked it, and sees that no move
-- is cut in two. Credits without a lot are those of releases before lots.
CREATE FUNCTION farebox.draw_moves(
    _account_id uuid, _after bigint, _upto bigint, _lot_version bigint, _references text[]
) RETURNS void
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    done bigint := _after;
    back bigint;
    netted bigint := 0;
BEGIN
    INSERT INTO farebox.lots (account_id, version, kind, amount, remaining, priority, created_at)
    SELECT t.account_id, t.version, k.kind, t.amount, t.amount, farebox.priority_of(k.kind), t.created_at
      FROM farebox.transfers t,
           LATERAL (VALUES (CASE t.kind WHEN 'grant' THEN 'granted' WHEN 'promo' THEN 'promo' ELSE 'paid' END)) AS k (kind)
     WHERE t.account_id = _account_id AND t.version > _after AND t.version <= _upto
       AND t.kind IN ('grant', 'promo', 'purchase', 'plan')
       AND NOT EXISTS (SELECT FROM farebox.lots l WHERE l.account_id = _account_id AND l.version = t.version);
    FOR back IN
        SELECT t.version
          FROM farebox.transfers t
         WHERE t.account_id = _account_id AND t.version > _after AND t.version <= _upto AND t.account_side = 'credit'
           AND t.kind IN ('reversal', 'true_up', 'refund_return', 'dispute_return')
         ORDER BY t.version
    LOOP
        IF back - 1 > done THEN
            PERFORM farebox.draw_stretch(_account_id, done, back - 1, _lot_version, netted);
        END IF;
        netted := farebox.unwind(_account_id, back, _lot_version, _references);
        done := back;
    END LOOP;
    IF _upto > done THEN
        PERFORM farebox.draw_stretch(_account_id, done, _upto, _lot_version, netted);
    END IF;
    UPDATE farebox.lot_marks AS m SET version = _upto WHERE m.account_id = _account_id;
END
$$;

-- Draws the account's lots up to _upto (NULL: all that there is), about _rows transfers at most (NULL: all of them).
-- Returns how many it were. Alone it needs no lock but the mark's, and never waits for a writer.
CREATE FUNCTION farebox.draw_lots(_account_id uuid, _upto bigint, _rows integer) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    mark bigint;
    newest bigint;
    upto bigint;
BEGIN
    IF NOT EXISTS (SELECT FROM farebox.accounts a WHERE a.id = _account_id) THEN
        RETURN 0;
    END IF;
    mark := farebox.lock_lots(_account_id);
    SELECT a.version INTO newest FROM farebox.accounts a WHERE a.id = _account_id;
    upto := least(_upto, newest, mark + _rows);
    IF upto <= mark THEN
        RETURN 0;
    END IF;
    -- To the end of its move.
    WHILE upto < newest AND EXISTS (
        SELECT FROM farebox.transfers t
         WHERE t.account_id = _account_id
           AND (t.version = upto AND t.kind = 'overrun' OR t.version = upto + 1 AND t.kind = 'debt_payment')
    ) LOOP
        upto := upto + 1;
    END LOOP;
    PERFORM farebox.draw_moves(_account_id, mark, upto, NULL, NULL);
    RETURN upto - mark;
END
$$;

GRANT EXECUTE ON FUNCTION farebox.draw_lots TO farebox_control;
