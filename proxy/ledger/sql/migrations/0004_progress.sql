-- Progress of open holds in numbered beats, and a sweeper that can tell a dead worker from a clock that jumped.
-- serves code from: 1

-- beat: the last one heard, so that one that was lost on its way and arrives late changes nothing.
-- held_since: since when the lease has been held without a gap; what a worker should have done, it had that long to do.
ALTER TABLE farebox.workers
    ADD COLUMN beat bigint NOT NULL DEFAULT 0,
    ADD COLUMN held_since timestamptz NOT NULL DEFAULT clock_timestamp();
