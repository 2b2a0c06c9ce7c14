-- What an attempt holds of its compute, and what is known of computes over restarts.

ALTER TABLE attempts ADD COLUMN slots INTEGER NOT NULL DEFAULT 1;
ALTER TABLE attempts ADD COLUMN cards TEXT;  -- JSON array of the UUIDs of its GPUs; NULL: none

-- A compute that is drained, or that is not well: `unwell` is the sentence of the incident that goes on.
CREATE TABLE computes (
    name TEXT PRIMARY KEY,
    drained_by TEXT,
    drained_at INTEGER,
    unwell TEXT,
    unwell_at INTEGER,
    CHECK ((drained_by IS NULL) = (drained_at IS NULL)),
    CHECK ((unwell IS NULL) = (unwell_at IS NULL))
) STRICT, WITHOUT ROWID;
