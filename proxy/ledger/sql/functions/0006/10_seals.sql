-- Sealing, behind the writers: they are never waited for, and never wait.

-- What is hashed. In binary: no setting of a session (time zone, date style, form of bytea) has a part in it. Text that
-- isn't from a list of ours is taken as UTF-8, whatever the database and the client speak.
-- Never changed: new columns of a table are for a new format, beside this one.
CREATE FUNCTION farebox.transfer_bytes(_row farebox.transfers) RETURNS bytea
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT record_send(ROW(
        _row.account_id, _row.version, _row.kind, _row.account_side, _row.system_account, _row.amount,
        _row.balance_after, _row.debt_after, _row.hold_id, convert_to(_row.reference, 'UTF8'),
        convert_to(_row.actor, 'UTF8'), convert_to(_row.reason, 'UTF8'), _row.created_at
    ))
$$;

-- All of an ended hold but what was given back of its charge later: that is what its reversals add up to.
CREATE FUNCTION farebox.hold_bytes(_row farebox.holds) RETURNS bytea
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT record_send(ROW(
        _row.id, _row.account_id, _row.state, _row.amount, _row.key_id, _row.worker_id, _row.price_version,
        convert_to(_row.model, 'UTF8'), convert_to(_row.variant, 'UTF8'), convert_to(_row.quote, 'UTF8'),
        _row.fingerprint, _row.mark, _row.opened_at, _row.charge, _row.overrun, _row.usage, _row.usage_source,
        _row.capped, _row.ending, convert_to(_row.receipt, 'UTF8'), _row.settle_fingerprint, _row.ended_at
    ))
$$;

-- Half of a SHA-512, which PostgreSQL computes faster than a SHA-256 where nothing but the processor helps.
CREATE FUNCTION farebox.hold_digest(_row farebox.holds) RETURNS bytea
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT substring(sha512(farebox.hold_bytes(_row)) FOR 32)
$$;

CREATE FUNCTION farebox.seal_head(_before bytea, _seal farebox.seals) RETURNS bytea
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT sha256(record_send(ROW(
        'farebox seal 1'::text, _before, _seal.account_id, _seal.number, _seal.last_version, _seal.transfers_digest,
        _seal.hold_ids, _seal.hold_digests, _seal.provisional_ids, _seal.provisional_digests, _seal.ended_to,
        _seal.sealed_at
    )))
$$;

-- Of transfers in the order of their versions.
CREATE FUNCTION farebox.transfers_digest(_account_id uuid, _after bigint, _upto bigint, OUT digest bytea, OUT rows bigint)
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT sha512(coalesce(string_agg(farebox.transfer_bytes(t), '' ORDER BY t.version), '')), count(*)
      FROM farebox.transfers t
     WHERE t.account_id = _account_id AND t.version > _after AND t.version <= _upto
$$;

-- Seals at most about _rows transfers and as many ended holds; says how many it sealed of both. NULL: another session
-- is at it. Call it until it seals few: an old ledger takes many calls. 0 where everything was sealed less than _pause
-- ago: many processes call it, and many small blocks are of no use.
--
-- A version is sealed only when all before it are committed: an account's versions are taken under its lock, which is
-- kept until the commit, so that whoever sees one sees all before it. Where one is missing nonetheless the account's
-- transfers stay unsealed, and the audit says which.
--
-- Ended holds have no number. They are found by the time of their end, and told from those sealed already by their ids,
-- for as far back as a transaction may have been on its way. A clock that was put back is noticed by its own mark.
CREATE FUNCTION farebox.seal(_rows integer, _pause interval) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET row_security = off SET work_mem = '64MB'
SET plan_cache_mode = force_custom_plan AS $$
#variable_conflict use_column
DECLARE
    block_rows CONSTANT integer := 5000;
    on_its_way CONSTANT interval := interval '2 minutes';
    since timestamptz;
    sealed bigint;
    holds bigint;
    ended_to timestamptz;
    at timestamptz := clock_timestamp();
BEGIN
    -- Under an older snapshot than the lock, what the session before it has sealed would be sealed again.
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'the ledger is sealed under READ COMMITTED only' USING ERRCODE = '25001';
    END IF;
    SELECT least(s.holds_to, at - on_its_way) INTO since
      FROM farebox.sealing s FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN NULL;
    ELSIF since > at - on_its_way - _pause THEN
        RETURN 0;
    END IF;
    WITH known AS MATERIALIZED (
        SELECT id FROM farebox.seals s, unnest(s.hold_ids) AS id WHERE s.ended_to >= since
    ), known_provisional AS MATERIALIZED (
        SELECT id FROM farebox.seals s, unnest(s.provisional_ids) AS id WHERE s.ended_to >= since
    ), ended AS MATERIALIZED (
        SELECT h.*
          FROM farebox.holds h
         WHERE h.state <> 'open' AND h.ended_at >= since
           AND CASE h.state
                   WHEN 'provisional' THEN h.id NOT IN (SELECT id FROM known_provisional)
                   ELSE h.id NOT IN (SELECT id FROM known)
               END
         ORDER BY h.ended_at, h.id
         LIMIT _rows
    ), holds AS (
        SELECT e.account_id,
               coalesce(array_agg(e.id ORDER BY e.id) FILTER (WHERE e.state <> 'provisional'), '{}') AS ids,
               coalesce(
                   array_agg(farebox.hold_digest(e::farebox.holds) ORDER BY e.id)
                       FILTER (WHERE e.state <> 'provisional'), '{}'
               ) AS digests,
               coalesce(array_agg(e.id ORDER BY e.id) FILTER (WHERE e.state = 'provisional'), '{}') AS provisional_ids,
               coalesce(
                   array_agg(farebox.hold_digest(e::farebox.holds) ORDER BY e.id)
                       FILTER (WHERE e.state = 'provisional'), '{}'
               ) AS provisional_digests,
               max(e.ended_at) AS ended_to
          FROM ended e
         GROUP BY e.account_id
    ), behind AS (
        SELECT b.account_id, b.upto
          FROM (
                   SELECT a.id AS account_id, least(a.version, coalesce(l.last_version, 0) + block_rows) AS upto,
                          sum(least(a.version - coalesce(l.last_version, 0), block_rows)) OVER (ORDER BY a.id)
                              - least(a.version - coalesce(l.last_version, 0), block_rows) AS before
                     FROM farebox.accounts a
                     LEFT JOIN LATERAL (
                         SELECT s.last_version FROM farebox.seals s
                          WHERE s.account_id = a.id ORDER BY s.number DESC LIMIT 1
                     ) AS l ON true
                    WHERE a.version > coalesce(l.last_version, 0)
               ) AS b
         WHERE b.before < _rows
    ), made AS (
        SELECT account_id, coalesce(l.number, 0) + 1 AS number, l.head AS before,
               -- All of them, or none.
               CASE WHEN t.rows = b.upto - coalesce(l.last_version, 0) THEN b.upto ELSE coalesce(l.last_version, 0) END
                   AS last_version,
               CASE WHEN t.rows = b.upto - coalesce(l.last_version, 0) THEN t.digest ELSE sha512('') END AS digest,
               coalesce(l.last_version, 0) AS after,
               coalesce(h.ids, '{}') AS hold_ids, coalesce(h.digests, '{}') AS hold_digests,
               coalesce(h.provisional_ids, '{}') AS provisional_ids,
               coalesce(h.provisional_digests, '{}') AS provisional_digests, h.ended_to
          FROM behind b
          FULL JOIN holds h USING (account_id)
          LEFT JOIN LATERAL (
              SELECT s.number, s.last_version, s.head FROM farebox.seals s
               WHERE s.account_id = coalesce(b.account_id, h.account_id) ORDER BY s.number DESC LIMIT 1
          ) AS l ON true
          LEFT JOIN LATERAL farebox.transfers_digest(b.account_id, coalesce(l.last_version, 0), b.upto) AS t
                 ON b.account_id IS NOT NULL
    ), written AS (
        INSERT INTO farebox.seals
        SELECT m.account_id, m.number, m.last_version, m.digest, m.hold_ids, m.hold_digests, m.provisional_ids,
               m.provisional_digests, m.ended_to, statement_timestamp(),
               farebox.seal_head(m.before, ROW(
                   m.account_id, m.number, m.last_version, m.digest, m.hold_ids, m.hold_digests, m.provisional_ids,
                   m.provisional_digests, m.ended_to, statement_timestamp(), NULL
               )::farebox.seals)
          FROM made m
         WHERE m.last_version > m.after OR m.ended_to IS NOT NULL
    )
    SELECT coalesce(sum(m.last_version - m.after + cardinality(m.hold_ids) + cardinality(m.provisional_ids)), 0),
           coalesce(sum(cardinality(m.hold_ids) + cardinality(m.provisional_ids)), 0), max(m.ended_to)
      INTO sealed, holds, ended_to
      FROM made m;
    UPDATE farebox.sealing AS s
       SET holds_to = CASE WHEN holds < _rows THEN at - on_its_way ELSE least(ended_to, at - on_its_way) END;
    RETURN sealed;
END
$$;

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON farebox.seals
    FOR EACH STATEMENT EXECUTE FUNCTION farebox.refuse_change();
