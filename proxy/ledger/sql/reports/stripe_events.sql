-- Webhooks, the newest first: at most $2, those before the event $1 (NULL: from the newest); $3: unprocessed ones alone.
SELECT e.id, e.type, e.livemode, e.object_id, e.created, e.received_at, e.attempts, e.tried_at, e.error,
       e.processed_at, e.outcome
  FROM farebox.stripe_events e
 WHERE ($1::text IS NULL OR (e.received_at, e.id) < (
           SELECT b.received_at, b.id FROM farebox.stripe_events b WHERE b.id = $1
       ))
   AND (NOT $3::boolean OR e.processed_at IS NULL)
 ORDER BY e.received_at DESC, e.id DESC
 LIMIT $2
