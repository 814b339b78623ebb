-- Extending holds, many in one call. farebox.extend, which adds to a hold and so can't be said again, stays for the
-- release before this one.

-- One element a row in each array: the hold grows to _totals, or to as much as is available, down to _at_leasts. Both
-- are what it shall hold in all, so that a row may be said again: a hold that has so much is left as it is. Results in
-- any order, told apart by row_number (1..n); amount is what the hold holds now, or 0 where that isn't the caller's to
-- know.
--
-- The outcomes: extended, it holds at least _at_leasts; insufficient, the account would not carry that if it held
-- nothing else; spend_limit, nor would the key's limit; credits_held, other holds take it now; worker_lapsed; ended;
-- unknown; conflict, it is another account's or another worker's; busy, as in farebox.batch.
CREATE FUNCTION farebox.extend_holds(
    _hold_ids uuid[], _account_ids uuid[], _worker_ids uuid[], _totals bigint[], _at_leasts bigint[], _wait_ms integer
)
RETURNS TABLE (
    row_number bigint, outcome text, amount bigint, balance bigint, held bigint, debt bigint, spend_left bigint
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    busy uuid[] := farebox.lock_accounts(_account_ids, _wait_ms);
    at timestamptz := clock_timestamp();
    entry record;
    hold farebox.holds;
    purse farebox.purse;
    purse_moved boolean := false;
    hold_moved boolean := false;
    growth bigint;
    purses farebox.purse[];
    changed_holds farebox.holds[];
BEGIN
    -- A later statement than the lock: a waiter sees the holds as they are now.
    FOR entry IN
        SELECT u.*, h AS known_hold, a.id AS known_account, a.balance, a.held, a.debt, a.version,
               EXISTS (SELECT FROM farebox.spend_limits s WHERE s.account_id = u.account_id) AS limited,
               coalesce(w.lease_until > at, false) AS leased,
               s.spend_limit - s.spent AS spendable
          FROM unnest(_hold_ids, _account_ids, _worker_ids, _totals, _at_leasts) WITH ORDINALITY
                   AS u (hold_id, account_id, worker_id, total, at_least, n)
          LEFT JOIN farebox.accounts a ON a.id = u.account_id
          LEFT JOIN farebox.holds h ON h.id = u.hold_id
          LEFT JOIN farebox.workers w ON w.id = u.worker_id
          LEFT JOIN farebox.api_keys k ON k.id = h.key_id
          LEFT JOIN farebox.spend_limits s ON s.family = k.family
         ORDER BY u.account_id, u.hold_id, u.n
    LOOP
        row_number := entry.n;
        amount := 0;
        balance := 0;
        held := 0;
        debt := 0;
        spend_left := NULL;
        IF entry.known_account IS NULL OR entry.account_id = ANY (busy) THEN
            outcome := CASE WHEN entry.known_account IS NULL THEN 'unknown' ELSE 'busy' END;
            RETURN NEXT;
            CONTINUE;
        END IF;
        IF hold_moved AND (hold.id, hold.account_id) IS DISTINCT FROM (entry.hold_id, entry.account_id) THEN
            changed_holds := changed_holds || hold;
            hold_moved := false;
        END IF;
        IF purse.account_id IS DISTINCT FROM entry.account_id THEN
            IF purse_moved THEN
                purses := purses || purse;
            END IF;
            purse_moved := false;
            purse := (
                entry.account_id, entry.balance, entry.held, entry.debt, entry.version, entry.limited, NULL, 0, 0, 0
            )::farebox.purse;
            hold := NULL;
        END IF;
        IF hold.id IS DISTINCT FROM entry.hold_id THEN
            hold := entry.known_hold;
        END IF;

        IF hold.id IS NULL THEN
            outcome := 'unknown';
        ELSIF hold.account_id <> entry.account_id OR hold.worker_id <> entry.worker_id THEN
            outcome := 'conflict';
        ELSIF hold.state <> 'open' THEN
            outcome := 'ended';
            amount := hold.amount;
        ELSE
            IF purse.limited THEN
                spend_left := farebox.spend_left(hold.key_id);
            END IF;
            -- While debt stands nothing is available.
            growth := CASE
                WHEN entry.leased
                THEN greatest(least(entry.total - hold.amount, purse.balance - purse.held, spend_left), 0)
                ELSE 0
            END;
            outcome := CASE
                WHEN hold.amount + growth >= entry.at_least THEN 'extended'
                WHEN NOT entry.leased THEN 'worker_lapsed'
                WHEN purse.debt > 0 OR purse.balance < entry.at_least THEN 'insufficient'
                WHEN entry.spendable < entry.at_least THEN 'spend_limit'
                ELSE 'credits_held'
            END;
            IF outcome = 'extended' AND growth > 0 THEN
                hold.amount := hold.amount + growth;
                hold_moved := true;
                purse := farebox.moved(purse, NULL, 0, -growth);
                purse_moved := true;
                IF spend_left IS NOT NULL THEN
                    PERFORM farebox.count_spend(hold.key_id, growth, 0);
                    spend_left := spend_left - growth;
                END IF;
            END IF;
            amount := hold.amount;
        END IF;

        balance := purse.balance;
        held := purse.held;
        debt := purse.debt;
        RETURN NEXT;
    END LOOP;
    IF hold_moved THEN
        changed_holds := changed_holds || hold;
    END IF;
    IF purse_moved THEN
        purses := purses || purse;
    END IF;
    PERFORM farebox.write_down(purses, NULL, NULL, changed_holds, at);
END
$$;
