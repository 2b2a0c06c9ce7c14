-- Every statement of the ledger but the schema. `{step -> finished}` becomes the condition that the row's state may
-- go there by the table of legal moves in model.py. Statements that check a move return a row when it was legal.

-- ==== runs ====

-- name: insert_run
-- A new run waits for its turn.
INSERT INTO runs (pipeline, version, experiment, owner, cause_kind, cause_detail, parameters, tags, options, state, created_at)
VALUES (:pipeline, :version, :experiment, :owner, :cause_kind, :cause_detail, :parameters, :tags, :options, 'queued', :now)
RETURNING id;

-- name: insert_tag
-- One tag of a run, to be found by.
INSERT INTO run_tags (name, value, run_id) VALUES (?, ?, ?);

-- name: start_run
-- A run's turn has come.
UPDATE runs SET state = 'running', started_at = :now
WHERE id = :run_id AND {run -> running} RETURNING id;

-- name: pin_code
-- The code of a run's steps as it was when the run began.
UPDATE runs SET options = json_set(options, '$.code', json(:code)) WHERE id = :run_id;

-- name: cancel_run
-- A person wants the run to end: what has not started never will, whatever is restarted meanwhile.
UPDATE runs SET options = json_set(options, '$.cancelled', json('true'))
WHERE id = :run_id AND state <> 'finished' RETURNING id;

-- name: finish_run
-- A run ends, and not before all of its steps have.
UPDATE runs SET state = 'finished', outcome = :outcome, finished_at = :now
WHERE id = :run_id AND {run -> finished}
    AND NOT EXISTS (SELECT 1 FROM steps WHERE run_id = :run_id AND state <> 'finished')
RETURNING id;

-- name: merge_cause
-- Another fire joins a run that still waits; its sentence is kept short.
UPDATE runs SET cause_detail = CASE
    WHEN cause_detail = '' THEN :detail
    WHEN :detail = '' OR length(cause_detail) > 400 THEN cause_detail
    ELSE cause_detail || '; ' || :detail END
WHERE id = :run_id AND state = 'queued' RETURNING pipeline;

-- name: run_state
-- For the sentence about an illegal move.
SELECT state FROM runs WHERE id = :run_id;

-- name: run
-- One run.
SELECT id, pipeline, version, experiment, owner, cause_kind, cause_detail, parameters, tags, options,
    state, outcome, created_at, started_at, finished_at
FROM runs WHERE id = :id;

-- name: runs
-- Runs, the newest first; conditions are added from the fragments `runs_where_…`.
SELECT id, pipeline, version, experiment, owner, cause_kind, cause_detail, parameters, tags, options,
    state, outcome, created_at, started_at, finished_at
FROM runs WHERE {conditions} ORDER BY id DESC LIMIT :limit;

-- name: runs_where_pipeline
-- Fragment: of one pipeline.
pipeline = :pipeline

-- name: runs_where_outcome
-- Fragment: that ended so.
outcome = :outcome

-- name: runs_where_finished
-- Fragment: that have ended.
outcome IS NOT NULL

-- name: runs_where_unfinished
-- Fragment: in a state before the last; the outcome is what the index knows.
outcome IS NULL AND state = :state

-- name: runs_where_tag
-- Fragment: with one tag, numbered by the caller.
id IN (SELECT run_id FROM run_tags WHERE name = :tag_name_{n} AND value = :tag_value_{n})

-- name: runs_where_since
-- Fragment: made since; by the lowest id, so that the scan from the newest down ends there.
id >= (SELECT coalesce(min(id), 9223372036854775807) FROM runs WHERE created_at >= :since) AND created_at >= :since

-- name: runs_where_before
-- Fragment: older than a run, to page on.
id < :before

-- name: unfinished_runs
-- What recovery and the scheduler look at, the oldest first.
SELECT id, pipeline, version, experiment, owner, cause_kind, cause_detail, parameters, tags, options,
    state, outcome, created_at, started_at, finished_at
FROM runs WHERE outcome IS NULL ORDER BY id;

-- name: latest
-- The newest run of a pipeline.
SELECT id, pipeline, version, experiment, owner, cause_kind, cause_detail, parameters, tags, options,
    state, outcome, created_at, started_at, finished_at
FROM runs WHERE pipeline = :pipeline ORDER BY id DESC LIMIT 1;

-- name: latest_of_all
-- The newest run.
SELECT id, pipeline, version, experiment, owner, cause_kind, cause_detail, parameters, tags, options,
    state, outcome, created_at, started_at, finished_at
FROM runs ORDER BY id DESC LIMIT 1;

-- name: latest_success
-- The newest run of a pipeline that succeeded.
SELECT id, pipeline, version, experiment, owner, cause_kind, cause_detail, parameters, tags, options,
    state, outcome, created_at, started_at, finished_at
FROM runs WHERE pipeline = :pipeline AND outcome = 'succeeded' ORDER BY id DESC LIMIT 1;

-- name: last_finished
-- The last run of each named pipeline that has ended.
SELECT id, pipeline, version, experiment, owner, cause_kind, cause_detail, parameters, tags, options,
    state, outcome, created_at, started_at, finished_at
FROM runs WHERE id IN (
    SELECT (SELECT max(last.id) FROM (
        SELECT max(id) AS id FROM runs WHERE pipeline = j.value AND outcome = 'succeeded'
        UNION ALL SELECT max(id) FROM runs WHERE pipeline = j.value AND outcome = 'failed'
        UNION ALL SELECT max(id) FROM runs WHERE pipeline = j.value AND outcome = 'cancelled') AS last)
    FROM json_each(:pipelines) AS j);

-- name: count_all_runs
-- For a word about a backup: reads an index.
SELECT count(*) FROM runs;

-- name: count_runs
-- Unfinished runs by state.
SELECT state, count(*) FROM runs WHERE outcome IS NULL GROUP BY state;

-- ==== steps ====

-- name: insert_step
-- A step of a run, in the state that the plan gives it.
INSERT INTO steps (run_id, idx, name, state, outcome, why, compute, attempts, exit_code, key, reused_run, reused_step,
    started_at, finished_at, made_by)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?);

-- name: queue_step
-- A step must run; nothing of it may live.
UPDATE steps SET state = 'queued', key = coalesce(:key, key), why = coalesce(:why, why)
WHERE run_id = :run_id AND idx = :idx AND {step -> queued}
    AND NOT EXISTS (SELECT 1 FROM attempts WHERE run_id = :run_id AND idx = :idx AND state <> 'ended')
RETURNING name;

-- name: finish_step
-- A step ends without a commit of its own.
UPDATE steps SET state = 'finished', outcome = ?3, why = coalesce(?4, why), finished_at = ?5, key = coalesce(?6, key),
    exit_code = coalesce(?7, exit_code), reused_run = ?8, reused_step = ?9, made_by = ?10
WHERE run_id = ?1 AND idx = ?2 AND {step -> finished};

-- name: commit_step
-- A step ends by the commit of an attempt.
UPDATE steps SET state = 'finished', outcome = 'succeeded', finished_at = :now, key = :key, made_by = :attempt,
    started_at = coalesce(started_at, :started_at),
    exit_code = coalesce((SELECT exit_code FROM attempts WHERE id = :attempt), 0)
WHERE run_id = :run_id AND idx = :idx AND {step -> finished} RETURNING name;

-- name: submitting_step
-- A step's attempt is about to be submitted; only in a run whose turn it is.
UPDATE steps SET state = 'submitting', key = :key, compute = :compute, attempts = attempts + 1, exit_code = NULL
WHERE run_id = :run_id AND idx = :idx AND {step -> submitting}
    AND EXISTS (SELECT 1 FROM runs WHERE id = :run_id AND state = 'running')
RETURNING name;

-- name: running_step
-- A backend has the step.
UPDATE steps SET state = 'running', started_at = coalesce(started_at, :now)
WHERE run_id = :run_id AND idx = :idx AND {step -> running} RETURNING name;

-- name: inherit_step
-- A queued step goes on with the attempt of an equal one; only in a run whose turn it is.
UPDATE steps SET state = 'running', key = :key, why = :why, attempts = attempts + 1, exit_code = NULL,
    compute = (SELECT compute FROM attempts WHERE id = :id), started_at = coalesce(started_at, :now)
WHERE run_id = :run_id AND idx = :idx AND {step -> running}
    AND EXISTS (SELECT 1 FROM runs WHERE id = :run_id AND state = 'running')
RETURNING name;

-- name: uncount_attempt
-- An attempt of the step is another's from now on.
UPDATE steps SET attempts = attempts - 1 WHERE run_id = :run_id AND idx = :idx;

-- name: collecting_step
-- The step's process has ended well.
UPDATE steps SET state = 'collecting', exit_code = :exit_code, started_at = coalesce(started_at, :now)
WHERE run_id = :run_id AND idx = :idx AND {step -> collecting} RETURNING name;

-- name: requeue_step
-- The step is to be tried again; an attempt that never ran is not counted.
UPDATE steps SET state = 'queued', why = coalesce(:why, why)
WHERE run_id = :run_id AND idx = :idx AND {step -> queued} RETURNING name;

-- name: attempt_told
-- What an ended attempt tells of its step; one that never ran is not counted.
UPDATE steps SET attempts = attempts - :uncounted,
    exit_code = CASE WHEN state = 'finished' THEN exit_code ELSE coalesce(:exit_code, exit_code) END
WHERE run_id = :run_id AND idx = :idx;

-- name: reuse_sources
-- The results that keys stand for now, with all their bytes: read in the transaction that reuses them.
SELECT r.key, r.run_id, r.step, r.attempt FROM json_each(:keys) AS j CROSS JOIN results AS r ON r.key = j.value
WHERE NOT EXISTS (SELECT 1 FROM outputs AS o WHERE o.attempt = r.attempt AND o.gone_at IS NOT NULL);

-- name: reuse_heads
-- Reused steps are heads of their pipeline too.
INSERT INTO step_heads (pipeline, step, key, run_id, cost_us)
SELECT (SELECT pipeline FROM runs WHERE id = :run_id), s.name, s.key, s.run_id, r.cost_us
FROM json_each(:idxs) AS j
CROSS JOIN steps AS s ON s.run_id = :run_id AND s.idx = j.value
CROSS JOIN results AS r ON r.key = s.key
WHERE true
ON CONFLICT (pipeline, step) DO UPDATE SET key = excluded.key, run_id = excluded.run_id, cost_us = excluded.cost_us;

-- name: reuse_touch
-- Outputs that are reused are not garbage; to the day, so that a nightly run that reuses all writes little.
UPDATE outputs SET used_at = :now
WHERE used_at < :now - 86400000000 AND attempt IN (
    SELECT s.made_by FROM json_each(:idxs) AS j CROSS JOIN steps AS s ON s.run_id = :run_id AND s.idx = j.value);

-- name: step_state
-- For the sentence about an illegal move.
SELECT name, state FROM steps WHERE run_id = :run_id AND idx = :idx;

-- name: steps
-- All steps of a run.
SELECT run_id, idx, name, state, outcome, why, compute, attempts, exit_code, key, reused_run, reused_step,
    started_at, finished_at
FROM steps WHERE run_id = :run_id ORDER BY idx;

-- name: step
-- One step of a run, by name.
SELECT run_id, idx, name, state, outcome, why, compute, attempts, exit_code, key, reused_run, reused_step,
    started_at, finished_at
FROM steps WHERE run_id = :run_id AND name = :name;

-- name: progress
-- How far runs are: steps by outcome or, before that, by state.
SELECT s.run_id, coalesce(s.outcome, s.state), count(*)
FROM json_each(:runs) AS j CROSS JOIN steps AS s ON s.run_id = j.value
GROUP BY 1, 2;

-- name: count_steps
-- Steps that want or have a machine, by state.
SELECT state, count(*) FROM steps
WHERE state <> 'waiting' AND state <> 'finished' GROUP BY state;

-- ==== attempts ====

-- name: insert_attempt
-- The intent to start a token.
INSERT INTO attempts (token, run_id, idx, n, compute, key, state, intent_at, slots, cards)
VALUES (:token, :run_id, :idx, :n, :compute, :key, 'intent', :now, :slots, :cards);

-- name: attempt_place
-- What a move of an attempt needs to know.
SELECT a.token, a.id, a.run_id, a.idx, a.key, a.state, a."end", s.state, s.name, r.pipeline
FROM attempts AS a
JOIN steps AS s ON s.run_id = a.run_id AND s.idx = a.idx
JOIN runs AS r ON r.id = a.run_id
WHERE a.token = :token;

-- name: submitted_attempt
-- The backend has given a handle.
UPDATE attempts SET state = 'submitted', handle = :handle, submitted_at = :now
WHERE id = :id AND {attempt -> submitted} RETURNING id;

-- name: renew_handle
-- An adopted attempt's handle, given once more.
UPDATE attempts SET handle = :handle WHERE id = :id AND state = 'submitted';

-- name: hand_over
-- A live attempt is another step's from now on.
UPDATE attempts SET run_id = :run_id, idx = :idx, n = :n, exit_code = NULL, usage = NULL
WHERE id = :id AND state = 'submitted';

-- name: exited_attempt
-- The process has ended; the attempt lives until its outputs are committed.
UPDATE attempts SET exit_code = :exit_code, usage = :usage WHERE id = :id;

-- name: end_attempt
-- How an attempt ended, once for ever.
UPDATE attempts SET state = 'ended', "end" = :end, ended_at = :now, exit_code = coalesce(:exit_code, exit_code),
    reason = :reason, usage = coalesce(:usage, usage), cost_us = :cost_us
WHERE id = :id AND {attempt -> ended} RETURNING id;

-- name: attempts
-- The attempts of a step, in order.
SELECT token, run_id, idx, n, compute, key, state, "end", handle, exit_code, reason, usage, cost_us,
    intent_at, submitted_at, ended_at, slots, cards
FROM attempts WHERE run_id = :run_id AND idx = :idx ORDER BY n;

-- name: attempts_of_run
-- All attempts of a run, step by step, in order.
SELECT token, run_id, idx, n, compute, key, state, "end", handle, exit_code, reason, usage, cost_us,
    intent_at, submitted_at, ended_at, slots, cards
FROM attempts WHERE run_id = :run_id ORDER BY idx, n;

-- name: attempt
-- The attempt of a token.
SELECT token, run_id, idx, n, compute, key, state, "end", handle, exit_code, reason, usage, cost_us,
    intent_at, submitted_at, ended_at, slots, cards
FROM attempts WHERE token = :token;

-- name: left_behind
-- Attempts that have not ended though their steps have.
SELECT token, run_id, idx, n, compute, key, state, "end", handle, exit_code, reason, usage, cost_us,
    intent_at, submitted_at, ended_at, slots, cards
FROM attempts AS a INDEXED BY attempts_live
WHERE state <> 'ended'
    AND EXISTS (SELECT 1 FROM steps AS s WHERE s.run_id = a.run_id AND s.idx = a.idx AND s.state = 'finished');

-- name: recent_use
-- What owners had of the computes, an hour at a time, by the last attempts: slot-seconds and card-seconds.
SELECT r.owner, a.ended_at / 3600000000 AS hour, sum((a.ended_at - a.submitted_at) * a.slots) / 1e6,
    sum((a.ended_at - a.submitted_at) * coalesce(json_array_length(a.cards), 0)) / 1e6
FROM attempts AS a
JOIN runs AS r ON r.id = a.run_id
WHERE a.id > (SELECT max(id) FROM attempts) - :limit AND a.ended_at >= :since AND a.submitted_at IS NOT NULL
GROUP BY r.owner, hour;

-- ==== keys, results, outputs, heads ====

-- name: insert_key
-- What a key was made of; the same key has the same parts.
INSERT INTO keys (key, parts) VALUES (:key, :parts) ON CONFLICT DO NOTHING;

-- name: put_result
-- What is reused for a key from now on.
INSERT INTO results (key, attempt, run_id, step, cost_us, made_at)
VALUES (:key, :attempt, :run_id, :step, :cost_us, :now)
ON CONFLICT (key) DO UPDATE SET attempt = excluded.attempt, run_id = excluded.run_id, step = excluded.step,
    cost_us = excluded.cost_us, made_at = excluded.made_at;

-- name: insert_output
-- One output of a committed attempt.
INSERT INTO outputs (attempt, position, name, digest, kind, size, path, cost_us, used_at, compute)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?);

-- name: revive_outputs
-- The bytes of a collected digest are there again.
UPDATE outputs SET gone_at = NULL, path = ?, compute = ? WHERE digest = ? AND gone_at IS NOT NULL;

-- name: to_lose
-- Of these digests those that may go: nobody has made or reused them since, and no unfinished run builds on them.
SELECT j.value FROM json_each(:digests) AS j
WHERE EXISTS (SELECT 1 FROM outputs WHERE digest = j.value AND gone_at IS NULL)
    AND NOT EXISTS (SELECT 1 FROM outputs WHERE digest = j.value AND used_at > :planned)
    AND j.value NOT IN (
        SELECT o.digest FROM runs AS r
        CROSS JOIN steps AS s ON s.run_id = r.id
        CROSS JOIN outputs AS o ON o.attempt = s.made_by
        WHERE r.outcome IS NULL);

-- name: lose_outputs
-- Garbage collection takes the bytes.
UPDATE outputs SET gone_at = :now WHERE digest = :digest AND gone_at IS NULL;

-- name: lose_kept
-- A compute no longer has what it kept.
UPDATE outputs SET gone_at = :now WHERE digest = :digest AND compute = :compute AND gone_at IS NULL;

-- name: put_head
-- A step has succeeded: the next change is explained against this.
INSERT INTO step_heads (pipeline, step, key, run_id, cost_us) VALUES (:pipeline, :step, :key, :run_id, :cost_us)
ON CONFLICT (pipeline, step) DO UPDATE SET key = excluded.key, run_id = excluded.run_id, cost_us = excluded.cost_us;

-- name: drop_result
-- A result is not to be reused any more.
DELETE FROM results WHERE key = ?;

-- name: results
-- What may be reused for many keys at once; one row an output, or one without output.
SELECT r.key, r.run_id, r.step, r.cost_us, o.name, o.digest, o.kind, o.size, o.path, o.gone_at, o.compute
FROM json_each(:keys) AS j
CROSS JOIN results AS r ON r.key = j.value
LEFT JOIN outputs AS o ON o.attempt = r.attempt;

-- name: outputs
-- What a step made or reused.
SELECT o.name, o.digest, o.kind, o.size, o.path, o.gone_at, o.compute
FROM steps AS s JOIN outputs AS o ON o.attempt = s.made_by
WHERE s.run_id = :run_id AND s.idx = :idx ORDER BY o.position;

-- name: outputs_of_run
-- What all finished steps of a run made or reused.
SELECT s.idx, o.name, o.digest, o.kind, o.size, o.path, o.gone_at, o.compute
FROM steps AS s JOIN outputs AS o ON o.attempt = s.made_by
WHERE s.run_id = :run_id ORDER BY s.idx, o.position;

-- name: heads
-- The last good state of many steps of a pipeline.
SELECT h.step, h.key, h.run_id, k.parts
FROM json_each(:names) AS j
CROSS JOIN step_heads AS h ON h.pipeline = :pipeline AND h.step = j.value
LEFT JOIN keys AS k ON k.key = h.key;

-- name: durations
-- What each step of a pipeline cost when it last ran.
SELECT step, cost_us FROM step_heads WHERE pipeline = :pipeline;

-- name: parts
-- What a key was made of.
SELECT parts FROM keys WHERE key = :key;

-- name: makers
-- The attempts that made these bytes, the newest first.
SELECT a.run_id, a.idx, s.name, o.name, a.token
FROM outputs AS o JOIN attempts AS a ON a.id = o.attempt JOIN steps AS s ON s.run_id = a.run_id AND s.idx = a.idx
WHERE o.digest = :digest ORDER BY o.attempt DESC LIMIT :limit;

-- name: artifacts
-- Everything that has bytes here, less what a compute keeps too. Reads all outputs: for garbage collection only.
SELECT digest, kind, path, max(size), max(used_at), max(cost_us) FROM outputs
WHERE gone_at IS NULL AND compute IS NULL GROUP BY digest, path;

-- ==== retention: what is old, and what of it is still of use ====

-- name: old_runs
-- Runs that ended before a time, but the newest of each pipeline and those whose outputs were reused since.
SELECT r.created_at, r.id FROM runs AS r INDEXED BY runs_by_creation
WHERE r.created_at < :before AND r.finished_at < :before AND (r.created_at, r.id) > (:created, :after)
    AND EXISTS (SELECT 1 FROM runs AS n WHERE n.pipeline = r.pipeline AND n.id > r.id)
    AND NOT EXISTS (
        SELECT 1 FROM attempts AS a CROSS JOIN outputs AS o ON o.attempt = a.id
        WHERE a.run_id = r.id AND o.used_at >= :before)
ORDER BY r.created_at, r.id LIMIT :limit;

-- name: tokens_of_run
-- Whose job folders go with a run.
SELECT token, compute FROM attempts WHERE run_id = :run_id;

-- name: jobs
-- What became of these tokens: their compute, and when their run ended.
SELECT a.token, a.compute, r.finished_at FROM json_each(:tokens) AS j
CROSS JOIN attempts AS a ON a.token = j.value
CROSS JOIN runs AS r ON r.id = a.run_id;

-- name: live_tokens
-- Of these tokens those whose attempt lives, or ended only just now.
SELECT a.token FROM json_each(:tokens) AS j
CROSS JOIN attempts AS a ON a.token = j.value
WHERE a.state <> 'ended' OR a.ended_at > :since;

-- name: oldest_intent
-- When the oldest attempt that lives began.
SELECT min(intent_at) FROM attempts INDEXED BY attempts_live WHERE state <> 'ended';

-- name: oldest_run
-- When the oldest run that has not finished was made.
SELECT min(created_at) FROM runs INDEXED BY runs_by_outcome WHERE outcome IS NULL;

-- name: artifact_bytes
-- Room that `artifacts` take. Reads all outputs.
SELECT coalesce(sum(size), 0) FROM (
    SELECT max(size) AS size FROM outputs WHERE gone_at IS NULL AND compute IS NULL GROUP BY digest);

-- name: needed_digests
-- What unfinished runs build on.
SELECT DISTINCT o.digest FROM runs AS r
CROSS JOIN steps AS s ON s.run_id = r.id
CROSS JOIN outputs AS o ON o.attempt = s.made_by
WHERE r.outcome IS NULL;

-- name: unknown_hexes
-- Of these digests without their prefix those that no output has.
SELECT j.value FROM json_each(:hexes) AS j
WHERE NOT EXISTS (SELECT 1 FROM outputs WHERE digest = 'b3:' || j.value AND gone_at IS NULL)
    AND NOT EXISTS (SELECT 1 FROM outputs WHERE digest = 'b3t:' || j.value AND gone_at IS NULL)
    AND NOT EXISTS (SELECT 1 FROM outputs WHERE digest = 's2:' || j.value AND gone_at IS NULL)
    AND NOT EXISTS (SELECT 1 FROM outputs WHERE digest = 's2t:' || j.value AND gone_at IS NULL);

-- name: code_in_use
-- Code that the next change is explained against, or that an attempt runs.
SELECT DISTINCT json_extract(k.parts, '$.code.raw') FROM step_heads AS h JOIN keys AS k ON k.key = h.key
UNION SELECT json_extract(k.parts, '$.code.raw')
FROM attempts AS a INDEXED BY attempts_live JOIN keys AS k ON k.key = a.key WHERE a.state <> 'ended';

-- name: stat_page
-- The stat cache in order.
SELECT path, hashed_ns FROM stat_cache WHERE path > :after ORDER BY path LIMIT :limit;

-- name: forget_events
-- Some events of a run that is forgotten; never the newest of all.
DELETE FROM events WHERE id IN (
    SELECT id FROM events WHERE run_id = :run_id AND id < (SELECT max(id) FROM events) ORDER BY id LIMIT :limit);

-- name: forget_attempts
-- Some attempts of a run that is forgotten.
DELETE FROM attempts WHERE id IN (SELECT id FROM attempts WHERE run_id = :run_id LIMIT :limit);

-- name: forget_steps
-- Some steps of a run that is forgotten.
DELETE FROM steps WHERE run_id = :run_id
    AND idx IN (SELECT idx FROM steps WHERE run_id = :run_id ORDER BY idx LIMIT :limit);

-- name: forget_run
-- The run itself, when nothing of it is left.
DELETE FROM runs WHERE id = :run_id AND state = 'finished'
    AND NOT EXISTS (SELECT 1 FROM steps WHERE run_id = :run_id);

-- name: forget_loose_events
-- Old events among the first that belong to no run (fires, pauses).
DELETE FROM events WHERE at < :before AND id IN (
    SELECT id FROM events WHERE run_id IS NULL AND id < (SELECT max(id) FROM events) ORDER BY id LIMIT :limit);

-- name: forget_stat
-- A file that is no more, unless it was hashed anew meanwhile.
DELETE FROM stat_cache WHERE path = ? AND hashed_ns = ?;

-- ==== fires, schedules, arrivals ====

-- name: insert_fire
-- A fire happens once: no row when it has happened.
INSERT INTO fires (dedupe, pipeline, verdict, run_id, detail, at)
VALUES (:dedupe, :pipeline, :verdict, :run_id, :detail, :now) ON CONFLICT DO NOTHING RETURNING dedupe;

-- name: fire_opened
-- The run that a fire has opened.
UPDATE fires SET run_id = :run_id WHERE dedupe = :dedupe;

-- name: fire
-- What came of a fire.
SELECT dedupe, pipeline, verdict, run_id, detail, at FROM fires WHERE dedupe = :dedupe;

-- name: put_cursor
-- How far a trigger is.
INSERT INTO schedules (id, pipeline, cursor, moved_at) VALUES (:schedule, :pipeline, :cursor, :now)
ON CONFLICT (id) DO UPDATE SET cursor = excluded.cursor, moved_at = excluded.moved_at;

-- name: schedule_fired
-- A trigger's last fire, and what came of it.
UPDATE schedules SET fired_at = :now, verdict = :verdict, run_id = :run_id WHERE id = :schedule;

-- name: schedules
-- All triggers that ever had a cursor.
SELECT id, pipeline, cursor, moved_at, fired_at, verdict, run_id FROM schedules;

-- name: schedule
-- One trigger's cursor.
SELECT id, pipeline, cursor, moved_at, fired_at, verdict, run_id FROM schedules WHERE id = :schedule;

-- name: put_arrival
-- A file was taken into a batch.
INSERT INTO arrivals (schedule, path, digest, size, mtime_ns, ino) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (schedule, path) DO UPDATE SET digest = excluded.digest, size = excluded.size, mtime_ns = excluded.mtime_ns,
    ino = excluded.ino;

-- name: put_arrival_digest
-- This content never fires again.
INSERT INTO arrival_digests (schedule, digest) VALUES (?, ?) ON CONFLICT DO NOTHING;

-- name: arrivals
-- What a trigger has seen, by path.
SELECT path, digest, size, mtime_ns, ino FROM arrivals WHERE schedule = :schedule AND path > :after
ORDER BY path LIMIT :limit;

-- name: arrival_digests
-- What a trigger has seen of this content.
SELECT a.digest FROM json_each(:digests) AS j
CROSS JOIN arrival_digests AS a ON a.schedule = :schedule AND a.digest = j.value;

-- ==== events, definitions, pauses, audit, stat cache ====

-- name: insert_event
-- One row a move.
INSERT INTO events (id, run_id, idx, kind, at, data) VALUES (?, ?, ?, ?, ?, ?);

-- name: last_event
-- Where the numbers go on.
SELECT coalesce(max(id), 0) FROM events;

-- name: events
-- What happened after an event.
SELECT id, run_id, idx, kind, at, data FROM events WHERE id > :after ORDER BY id LIMIT :limit;

-- name: newest_event
-- When something happened last.
SELECT max(at) FROM events WHERE id > (SELECT max(id) FROM events) - 1000;

-- name: events_of_run
-- What happened in one run after an event.
SELECT id, run_id, idx, kind, at, data FROM events WHERE run_id = :run_id AND id > :after ORDER BY id LIMIT :limit;

-- name: save_definition
-- A run keeps the version it started with.
INSERT INTO definitions (version, pipeline, spec, saved_at) VALUES (:version, :pipeline, :spec, :now)
ON CONFLICT DO NOTHING;

-- name: definition
-- The spec of a version.
SELECT spec FROM definitions WHERE version = :version;

-- name: pause
-- Nothing fires for this pipeline; no row when it was so already.
INSERT INTO pauses (pipeline, who, at) VALUES (:pipeline, :who, :now) ON CONFLICT DO NOTHING RETURNING pipeline;

-- name: resume
-- It fires again; no row when it was so already.
DELETE FROM pauses WHERE pipeline = :pipeline RETURNING pipeline;

-- name: paused
-- Pipelines that are paused.
SELECT pipeline FROM pauses;

-- name: drain
-- Nothing new starts on this compute; no row when it was so already.
INSERT INTO computes (name, drained_by, drained_at) VALUES (:name, :who, :now)
ON CONFLICT DO UPDATE SET drained_by = :who, drained_at = :now WHERE drained_by IS NULL RETURNING name;

-- name: undrain
-- Steps start on it again; no row when it was so already.
UPDATE computes SET drained_by = NULL, drained_at = NULL WHERE name = :name AND drained_by IS NOT NULL RETURNING name;

-- name: unwell
-- An incident begins; no row when one goes on already.
INSERT INTO computes (name, unwell, unwell_at) VALUES (:name, :why, :now)
ON CONFLICT DO UPDATE SET unwell = :why, unwell_at = :now WHERE unwell IS NULL RETURNING name;

-- name: well
-- The incident is over; no row without one.
UPDATE computes SET unwell = NULL, unwell_at = NULL WHERE name = :name AND unwell IS NOT NULL RETURNING name;

-- name: computes
-- What is known of computes.
SELECT name, drained_by, drained_at, unwell, unwell_at FROM computes;

-- name: insert_audit
-- Who did what.
INSERT INTO audit (at, who, uid, pid, verb, args) VALUES (:now, :who, :uid, :pid, :verb, :args);

-- name: audit
-- Who did what, the newest first.
SELECT id, at, who, uid, pid, verb, args FROM audit WHERE id < :before ORDER BY id DESC LIMIT :limit;

-- name: put_stat
-- A file's digest and what `stat` said.
INSERT INTO stat_cache (path, dev, ino, size, mtime_ns, ctime_ns, hashed_ns, digest) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (path) DO UPDATE SET dev = excluded.dev, ino = excluded.ino, size = excluded.size,
    mtime_ns = excluded.mtime_ns, ctime_ns = excluded.ctime_ns, hashed_ns = excluded.hashed_ns, digest = excluded.digest;

-- name: stats
-- The stat cache for many paths; the list of parameters is filled up by the caller.
SELECT path, dev, ino, size, mtime_ns, ctime_ns, hashed_ns, digest FROM stat_cache WHERE path IN ({slots});
