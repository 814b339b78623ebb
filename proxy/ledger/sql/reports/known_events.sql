-- Which of the events $1 have come.
SELECT e.id FROM farebox.stripe_events e WHERE e.id = ANY ($1::text[])
