-- What a compute keeps of what was made there (`keep="remote"`).

ALTER TABLE outputs ADD COLUMN compute TEXT;  -- NULL: it came home when it was made
