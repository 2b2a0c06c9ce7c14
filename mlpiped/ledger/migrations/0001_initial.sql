-- The ledger: what was decided, what happened, and what may be reused.
-- Times are microseconds since the epoch, UTC. Paths are the file system's own bytes. `finished` has an outcome, nothing else has.
-- The lists of states are chains of OR: an IN of more than two is built anew for each row written, at twice the cost.

CREATE TABLE runs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- people write it down: never given twice
    pipeline TEXT NOT NULL,
    version TEXT NOT NULL,
    experiment TEXT NOT NULL,
    owner TEXT NOT NULL,
    cause_kind TEXT NOT NULL,
    cause_detail TEXT NOT NULL,
    parameters TEXT NOT NULL,  -- JSON object, as are tags and options
    tags TEXT NOT NULL,
    options TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state = 'queued' OR state = 'running' OR state = 'finished'),
    outcome TEXT CHECK (outcome = 'succeeded' OR outcome = 'failed' OR outcome = 'cancelled'),
    created_at INTEGER NOT NULL,
    started_at INTEGER,
    finished_at INTEGER,
    CHECK ((state = 'finished') = (outcome IS NOT NULL))
) STRICT;
CREATE INDEX runs_by_pipeline ON runs (pipeline, id);
CREATE INDEX runs_by_outcome ON runs (outcome, id);  -- no outcome: not finished
CREATE INDEX runs_by_pipeline_outcome ON runs (pipeline, outcome, id);
CREATE INDEX runs_by_creation ON runs (created_at);

CREATE TABLE run_tags (
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    run_id INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    PRIMARY KEY (name, value, run_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE steps (
    run_id INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    idx INTEGER NOT NULL,
    name TEXT NOT NULL,
    state TEXT NOT NULL CHECK (
        state = 'waiting' OR state = 'queued' OR state = 'submitting' OR state = 'running'
        OR state = 'collecting' OR state = 'finished'
    ),
    outcome TEXT CHECK (
        outcome = 'succeeded' OR outcome = 'reused' OR outcome = 'failed' OR outcome = 'timed_out'
        OR outcome = 'cancelled' OR outcome = 'skipped' OR outcome = 'lost'
    ),
    why TEXT NOT NULL,
    compute TEXT,
    attempts INTEGER NOT NULL,  -- those that may have run
    exit_code INTEGER,
    key TEXT,
    reused_run INTEGER,
    reused_step TEXT,
    made_by INTEGER,  -- attempts.id whose outputs are this step's: its own committed one, or the reused one
    started_at INTEGER,
    finished_at INTEGER,
    PRIMARY KEY (run_id, idx),
    CHECK ((state = 'finished') = (outcome IS NOT NULL)),
    CHECK ((made_by IS NOT NULL) = (outcome IS NOT NULL AND (outcome = 'succeeded' OR outcome = 'reused')))
) STRICT, WITHOUT ROWID;
CREATE INDEX steps_active ON steps (state) WHERE state <> 'waiting' AND state <> 'finished';

CREATE TABLE attempts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    token TEXT NOT NULL UNIQUE,
    run_id INTEGER NOT NULL,
    idx INTEGER NOT NULL,
    n INTEGER NOT NULL,
    compute TEXT NOT NULL,
    key TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state = 'intent' OR state = 'submitted' OR state = 'ended'),
    "end" TEXT CHECK (
        "end" = 'committed' OR "end" = 'failed' OR "end" = 'timed_out' OR "end" = 'cancelled'
        OR "end" = 'lost' OR "end" = 'never_ran' OR "end" = 'tainted' OR "end" = 'superseded'
    ),
    handle TEXT,  -- JSON, the backend's own
    exit_code INTEGER,
    reason TEXT,
    usage TEXT,  -- JSON
    cost_us INTEGER,
    intent_at INTEGER NOT NULL,
    submitted_at INTEGER,
    ended_at INTEGER,
    FOREIGN KEY (run_id, idx) REFERENCES steps (run_id, idx) ON DELETE CASCADE,
    UNIQUE (run_id, idx, n),
    CHECK ((state = 'ended') = ("end" IS NOT NULL))
) STRICT;
-- The two promises that no code above the ledger can break: a step has one live attempt, and commits once.
CREATE UNIQUE INDEX attempts_live ON attempts (run_id, idx) WHERE state <> 'ended';
CREATE UNIQUE INDEX attempts_committed ON attempts (run_id, idx) WHERE "end" = 'committed';

CREATE TABLE keys (
    key TEXT PRIMARY KEY,
    parts TEXT NOT NULL  -- JSON: the named parts that were hashed
) STRICT, WITHOUT ROWID;

-- What may be reused: written in the transaction that commits an attempt and nowhere else. Outlives its run.
CREATE TABLE results (
    key TEXT PRIMARY KEY,
    attempt INTEGER NOT NULL,
    run_id INTEGER NOT NULL,
    step TEXT NOT NULL,
    cost_us INTEGER NOT NULL,
    made_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- What committed attempts made. Outlives the attempt's run, as `results` does.
CREATE TABLE outputs (
    attempt INTEGER NOT NULL,
    position INTEGER NOT NULL,
    name TEXT NOT NULL,
    digest TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind = 'file' OR kind = 'folder'),
    size INTEGER NOT NULL,
    path BLOB NOT NULL,
    cost_us INTEGER NOT NULL,
    used_at INTEGER NOT NULL,  -- made or reused, to the day
    gone_at INTEGER,  -- garbage collection took the bytes; the digest stays
    PRIMARY KEY (attempt, position)
) STRICT, WITHOUT ROWID;
CREATE INDEX outputs_by_digest ON outputs (digest);

-- The last good state of each step of each pipeline: what a change is explained against.
CREATE TABLE step_heads (
    pipeline TEXT NOT NULL,
    step TEXT NOT NULL,
    key TEXT NOT NULL,
    run_id INTEGER NOT NULL,
    cost_us INTEGER NOT NULL,
    PRIMARY KEY (pipeline, step)
) STRICT, WITHOUT ROWID;

-- Every fire of every trigger, once for ever.
CREATE TABLE fires (
    dedupe TEXT PRIMARY KEY,
    pipeline TEXT NOT NULL,
    verdict TEXT NOT NULL,  -- opened, merged, or why it opened nothing
    run_id INTEGER,
    detail TEXT NOT NULL,
    at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE schedules (
    id TEXT PRIMARY KEY,
    pipeline TEXT NOT NULL,
    cursor TEXT NOT NULL,  -- JSON, the trigger's own
    moved_at INTEGER NOT NULL,
    fired_at INTEGER,  -- the last fire: when, and what came of it
    verdict TEXT,
    run_id INTEGER
) STRICT, WITHOUT ROWID;

-- What lay at each path when it was last taken into a batch …
CREATE TABLE arrivals (
    schedule TEXT NOT NULL,
    path BLOB NOT NULL,
    digest TEXT NOT NULL,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    ino INTEGER NOT NULL,
    PRIMARY KEY (schedule, path)
) STRICT, WITHOUT ROWID;

-- … and all content that ever was, so that none fires twice.
CREATE TABLE arrival_digests (
    schedule TEXT NOT NULL,
    digest TEXT NOT NULL,
    PRIMARY KEY (schedule, digest)
) STRICT, WITHOUT ROWID;

-- One row a move. Ids grow without gaps that matter; the newest row is never removed, so none is given twice.
CREATE TABLE events (
    id INTEGER PRIMARY KEY,
    run_id INTEGER,
    idx INTEGER,
    kind TEXT NOT NULL,
    at INTEGER NOT NULL,
    data TEXT  -- JSON object
) STRICT;
CREATE INDEX events_by_run ON events (run_id, id);

CREATE TABLE definitions (
    version TEXT PRIMARY KEY,
    pipeline TEXT NOT NULL,
    spec TEXT NOT NULL,  -- JSON
    saved_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE pauses (
    pipeline TEXT PRIMARY KEY,
    who TEXT NOT NULL,
    at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE audit (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at INTEGER NOT NULL,
    who TEXT NOT NULL,
    uid INTEGER,
    pid INTEGER,
    verb TEXT NOT NULL,
    args TEXT NOT NULL  -- JSON
) STRICT;

CREATE TABLE stat_cache (
    path BLOB PRIMARY KEY,
    dev INTEGER NOT NULL,
    ino INTEGER NOT NULL,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    ctime_ns INTEGER NOT NULL,
    hashed_ns INTEGER NOT NULL,  -- when hashing began
    digest TEXT NOT NULL
) STRICT, WITHOUT ROWID;
