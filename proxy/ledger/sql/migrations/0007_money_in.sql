-- Money in: orders and what Stripe says of them, refunds and disputes, lots of credits, and what is told to the outside.
-- Credits are microcredits, money is minor units of its currency (cents; whole yen).
-- serves code from: 1

-- Both at once, in the order in which calls lock them, and never waited for long: behind whoever waits for a whole table
-- all calls wait, too, and a backup or an audit may read it for minutes.
DO $$
DECLARE
    patience text := current_setting('lock_timeout');
BEGIN
    FOR attempt IN 1..200 LOOP
        BEGIN
            PERFORM set_config('lock_timeout', '300ms', true);
            LOCK TABLE farebox.accounts, farebox.transfers IN ACCESS EXCLUSIVE MODE;
            EXIT;
        EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
            IF attempt = 200 THEN
                RAISE;
            END IF;
        END;
        PERFORM pg_sleep(0.2 + random() / 5);
    END LOOP;
    PERFORM set_config('lock_timeout', patience, true);
END
$$;

-- Which kinds there are is now one table's to say: see farebox.side_of. Checked for new rows: the old ones were narrower.
ALTER TABLE farebox.transfers DROP CONSTRAINT known_kind;
ALTER TABLE farebox.transfers ADD CONSTRAINT known_kind CHECK (kind IN (
    'grant', 'promo', 'purchase', 'plan', 'charge', 'true_up', 'overrun', 'debt_payment', 'reversal',
    'refund', 'refund_return', 'dispute', 'dispute_return', 'expiry'
)) NOT VALID;

-- While it is set nothing is reserved. The rows of freezes say why; this one is what the hot path reads.
ALTER TABLE farebox.accounts ADD COLUMN frozen_at timestamptz;

CREATE TABLE farebox.freezes (
    account_id uuid NOT NULL REFERENCES farebox.accounts,
    reference text NOT NULL,
    reason text NOT NULL,
    actor text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    lifted_at timestamptz,
    lifted_by text,
    PRIMARY KEY (account_id, reference)
);

-- What a transfer that brought credits in has left. version: that transfer's. Drawn in the order priority, expires_at
-- (never last), version, by a pass of its own behind the writers: nothing here decides whether a call is admitted.
-- reserved: spoken for by refunds under way. owed: lent to a refund while other holds had it; the debt takes it first.
CREATE TABLE farebox.lots (
    account_id uuid NOT NULL,
    version bigint NOT NULL,
    kind text NOT NULL CHECK (kind IN ('paid', 'granted', 'promo')),
    amount bigint NOT NULL CHECK (amount > 0),
    remaining bigint NOT NULL CHECK (remaining >= 0),
    reserved bigint NOT NULL DEFAULT 0 CHECK (reserved >= 0),
    owed bigint NOT NULL DEFAULT 0 CHECK (owed >= 0),
    priority integer NOT NULL,
    expires_at timestamptz,
    order_id uuid,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (account_id, version),
    CONSTRAINT remaining_within_amount CHECK (remaining <= amount),
    CONSTRAINT spoken_for_once CHECK (reserved + owed <= remaining)
) WITH (fillfactor = 70);
CREATE INDEX lots_left ON farebox.lots (account_id) WHERE remaining > 0;
CREATE INDEX lots_expiring ON farebox.lots (expires_at) WHERE remaining > 0 AND expires_at IS NOT NULL;
CREATE INDEX lots_order ON farebox.lots (order_id) WHERE order_id IS NOT NULL;

-- Which lots a transfer took from (amount > 0), or gave back to (amount < 0), in this order. Append-only.
-- owed: a debt payment that took what the lot owed to a refund or a dispute.
CREATE TABLE farebox.draws (
    account_id uuid NOT NULL,
    version bigint NOT NULL,
    nth integer NOT NULL,
    lot_version bigint NOT NULL,
    amount bigint NOT NULL CHECK (amount <> 0),
    owed boolean NOT NULL,
    PRIMARY KEY (account_id, version, nth)
);
CREATE INDEX draws_owed ON farebox.draws (account_id, lot_version) WHERE owed;

-- How far an account's transfers have been drawn from its lots.
CREATE TABLE farebox.lot_marks (
    account_id uuid PRIMARY KEY,
    version bigint NOT NULL
) WITH (fillfactor = 70);

-- Who an account is to Stripe, in test mode and in live mode. payment_method: the last one saved for later payments.
CREATE TABLE farebox.stripe_customers (
    account_id uuid NOT NULL REFERENCES farebox.accounts,
    livemode boolean NOT NULL,
    customer text NOT NULL UNIQUE,
    payment_method text,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (account_id, livemode)
);

-- Purchases. One is written before Stripe hears of it; its id is the idempotency key there. What it sells is copied
-- into it, so that a later edit of the packs changes nothing. price: what is asked before tax; received: what came in
-- all, of which subtotal - discount + tax. taken, bonus_taken: credits that refunds and disputes took back by now.
CREATE TABLE farebox.orders (
    id uuid PRIMARY KEY,
    account_id uuid NOT NULL REFERENCES farebox.accounts,
    kind text NOT NULL CHECK (kind IN ('checkout', 'auto', 'plan')),
    state text NOT NULL DEFAULT 'created' CHECK (
        state IN ('created', 'open', 'pending', 'paid', 'failed', 'expired', 'canceled')
    ),
    pack text,
    credits bigint NOT NULL CHECK (credits > 0),
    bonus bigint NOT NULL DEFAULT 0 CHECK (bonus >= 0),
    credits_seconds bigint CHECK (credits_seconds > 0),
    bonus_seconds bigint CHECK (bonus_seconds > 0),
    currency text NOT NULL CHECK (currency ~ '^[a-z]{3}$'),
    price bigint NOT NULL CHECK (price > 0),
    discount_max bigint NOT NULL DEFAULT 0 CHECK (discount_max >= 0),
    livemode boolean NOT NULL,
    -- Who asked: a key's id, or the command's user. request_key: the Idempotency-Key it was asked under.
    actor text NOT NULL,
    request_key text,
    request_digest bytea,
    save_payment_method boolean NOT NULL DEFAULT false,
    success_url text,
    cancel_url text,
    customer text,
    payment_method text,
    session_id text UNIQUE,
    payment_intent text UNIQUE,
    invoice text UNIQUE,
    url text,
    problem text,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    paid_at timestamptz,
    received bigint CHECK (received >= 0),
    subtotal bigint CHECK (subtotal >= 0),
    discount bigint CHECK (discount >= 0),
    tax bigint CHECK (tax >= 0),
    credit_version bigint,
    bonus_version bigint,
    taken bigint NOT NULL DEFAULT 0 CHECK (taken >= 0),
    bonus_taken bigint NOT NULL DEFAULT 0 CHECK (bonus_taken >= 0),
    CONSTRAINT paid_says_what CHECK ((state = 'paid') = (paid_at IS NOT NULL) AND (state = 'paid') = (received IS NOT NULL)),
    CONSTRAINT taken_within_credits CHECK (taken <= credits AND bonus_taken <= bonus),
    UNIQUE (account_id, request_key)
);
CREATE INDEX orders_account ON farebox.orders (account_id, created_at);
CREATE INDEX orders_unfinished ON farebox.orders (created_at) WHERE state IN ('created', 'open', 'pending');
-- One attempt at a time to top an account up by itself.
CREATE UNIQUE INDEX orders_one_auto ON farebox.orders (account_id)
    WHERE kind = 'auto' AND state IN ('created', 'open', 'pending');

-- Payments that carry an order's name and don't match it: no credits until an operator says so.
CREATE TABLE farebox.quarantine (
    payment text PRIMARY KEY,
    order_id uuid,
    account_id uuid,
    reason text NOT NULL,
    payment_intent text,
    session_id text,
    customer text,
    payment_method text,
    currency text,
    subtotal bigint,
    discount bigint,
    tax bigint,
    received bigint,
    livemode boolean NOT NULL,
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    resolved_at timestamptz,
    resolved_by text,
    resolution text CHECK (resolution IN ('credited', 'dismissed'))
);

-- Webhooks that were received: hints that something of this id changed, committed before anything is done about it.
CREATE TABLE farebox.stripe_events (
    id text PRIMARY KEY,
    type text NOT NULL,
    livemode boolean NOT NULL,
    object_id text NOT NULL,
    created timestamptz NOT NULL,
    received_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    attempts integer NOT NULL,
    tried_at timestamptz NOT NULL,
    error text,
    processed_at timestamptz,
    outcome text,
    CONSTRAINT processed_says_how CHECK ((processed_at IS NULL) = (outcome IS NULL))
);
CREATE INDEX stripe_events_unprocessed ON farebox.stripe_events (tried_at) WHERE processed_at IS NULL;
CREATE INDEX stripe_events_received ON farebox.stripe_events (received_at);

-- What Stripe calls refunds. status_rank only rises, so that what was fetched earlier can't undo what was fetched later.
CREATE TABLE farebox.stripe_refunds (
    id text PRIMARY KEY,
    order_id uuid NOT NULL REFERENCES farebox.orders,
    amount bigint NOT NULL CHECK (amount > 0),
    status text NOT NULL,
    status_rank integer NOT NULL,
    active boolean NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX stripe_refunds_order ON farebox.stripe_refunds (order_id);

-- What `farebox refund` asks for: written, with its hold of the same id, before Stripe hears of it. The hold has credits
-- and bonus; reserved: how much of the credits the purchase's own lot has spoken for. The bonus's lot has all of it.
CREATE TABLE farebox.refund_requests (
    id uuid PRIMARY KEY,
    order_id uuid NOT NULL REFERENCES farebox.orders,
    account_id uuid NOT NULL,
    amount bigint NOT NULL CHECK (amount > 0),
    credits bigint NOT NULL CHECK (credits >= 0),
    bonus bigint NOT NULL CHECK (bonus >= 0),
    reserved bigint NOT NULL CHECK (reserved BETWEEN 0 AND credits),
    state text NOT NULL DEFAULT 'held' CHECK (state IN ('held', 'done', 'released')),
    refund text UNIQUE,
    actor text NOT NULL,
    reason text,
    problem text,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX refund_requests_held ON farebox.refund_requests (created_at) WHERE state = 'held';
CREATE UNIQUE INDEX refund_requests_one_held ON farebox.refund_requests (order_id) WHERE state = 'held';

-- What Stripe calls disputes. Their statuses come in no order that could be relied on (an appeal follows a loss), so what
-- is older is told by when it was asked for: asked is a number that only rises, taken before the dispute was fetched.
-- takings, returns: how often it took credits and gave them back.
CREATE SEQUENCE farebox.dispute_questions;
CREATE TABLE farebox.disputes (
    id text PRIMARY KEY,
    order_id uuid NOT NULL REFERENCES farebox.orders,
    amount bigint NOT NULL CHECK (amount > 0),
    status text NOT NULL,
    asked bigint NOT NULL,
    withdrawn boolean NOT NULL,
    takings integer NOT NULL DEFAULT 0,
    returns integer NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX disputes_order ON farebox.disputes (order_id);

-- Accounts that buy a pack by themselves when their balance is below the threshold. credits, currency, price: what the
-- pack was when its owner agreed to it; one that has become dearer isn't bought. monthly_max: minor units a calendar month
-- (UTC). blocked_until: after a payment that failed; infinity: until its owner has done something about it, as problem
-- says. failed_order: the last that failed; link_order: the checkout that its owner was sent to in its place.
CREATE TABLE farebox.auto_topups (
    account_id uuid PRIMARY KEY REFERENCES farebox.accounts,
    enabled boolean NOT NULL,
    threshold bigint NOT NULL CHECK (threshold > 0),
    pack text NOT NULL,
    credits bigint NOT NULL CHECK (credits > 0),
    currency text NOT NULL,
    price bigint NOT NULL CHECK (price > 0),
    monthly_max bigint NOT NULL CHECK (monthly_max >= 0),
    livemode boolean NOT NULL,
    actor text NOT NULL,
    failures integer NOT NULL DEFAULT 0,
    blocked_until timestamptz,
    problem text,
    failed_order uuid,
    link_order uuid,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX auto_topups_enabled ON farebox.auto_topups (account_id) WHERE enabled;

-- What an account was warned of: so that it is told once each time it gets there.
CREATE TABLE farebox.alerts (
    account_id uuid PRIMARY KEY REFERENCES farebox.accounts,
    low_balance bigint CHECK (low_balance >= 0),
    low_told_at timestamptz,
    debt_told_at timestamptz
);

-- Messages to the operator's own endpoint, written in the transaction whose news they are.
CREATE TABLE farebox.outbox (
    id uuid PRIMARY KEY,
    type text NOT NULL,
    account_id uuid NOT NULL,
    reference text,
    payload text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    next_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    attempts integer NOT NULL DEFAULT 0,
    error text,
    delivered_at timestamptz,
    given_up_at timestamptz,
    UNIQUE (type, reference)
);
CREATE INDEX outbox_due ON farebox.outbox (next_at) WHERE delivered_at IS NULL AND given_up_at IS NULL;

-- Codes that give credits. redeemed counts the rows of promo_redemptions.
CREATE TABLE farebox.promo_codes (
    code text PRIMARY KEY CHECK (code = upper(code)),
    credits bigint NOT NULL CHECK (credits > 0),
    credits_seconds bigint CHECK (credits_seconds > 0),
    starts_at timestamptz,
    ends_at timestamptz,
    redemptions_max bigint CHECK (redemptions_max > 0),
    redeemed bigint NOT NULL DEFAULT 0,
    actor text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    ended_at timestamptz,
    CONSTRAINT redeemed_within_max CHECK (redeemed <= redemptions_max)
);
CREATE TABLE farebox.promo_redemptions (
    code text NOT NULL REFERENCES farebox.promo_codes,
    account_id uuid NOT NULL REFERENCES farebox.accounts,
    version bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (code, account_id)
);

-- Codes that an account named in vain, since when: so that nobody finds one by trying.
CREATE TABLE farebox.promo_refusals (
    account_id uuid PRIMARY KEY REFERENCES farebox.accounts,
    since timestamptz NOT NULL,
    refusals integer NOT NULL
);

-- The last comparison with Stripe's book over each of the times that the server looks at.
CREATE TABLE farebox.reconciliations (
    name text PRIMARY KEY CHECK (name IN ('recent', 'month')),
    started_at timestamptz NOT NULL,
    finished_at timestamptz NOT NULL,
    compared bigint NOT NULL,
    mended bigint NOT NULL,
    differing bigint NOT NULL,
    clean_at timestamptz
);
