-- What the account $1 used, by UTC day and model, in calls that were opened from $2 on and before $3, newest day first.
-- A hold's id is a UUIDv7, so a time is a range of ids, give or take a clock's error; opened_at then decides.
SELECT (h.opened_at AT TIME ZONE 'UTC')::date AS day, h.model, count(*) AS requests,
       coalesce(sum(h.charge - h.reversed), 0)::bigint AS charge,
       ARRAY[
           coalesce(sum(h.usage[1]), 0)::bigint, coalesce(sum(h.usage[2]), 0)::bigint,
           coalesce(sum(h.usage[3]), 0)::bigint, coalesce(sum(h.usage[4]), 0)::bigint,
           coalesce(sum(h.usage[5]), 0)::bigint, coalesce(sum(h.usage[6]), 0)::bigint,
           coalesce(sum(h.usage[7]), 0)::bigint
       ] AS usage
  FROM farebox.holds h
 WHERE h.account_id = $1 AND h.id >= $4 AND h.id < $5
   AND h.opened_at >= $2 AND h.opened_at < $3
   AND h.state IN ('final', 'provisional') AND h.usage IS NOT NULL
 GROUP BY day, h.model
 ORDER BY day DESC, h.model
