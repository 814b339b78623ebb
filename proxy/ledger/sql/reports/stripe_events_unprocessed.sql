-- Webhooks of a mode ($1: live) that are still to be processed, and since when the oldest has waited.
SELECT count(*) AS count, min(e.received_at) AS oldest
  FROM farebox.stripe_events e
 WHERE e.processed_at IS NULL AND e.livemode = $1
