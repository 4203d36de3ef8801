-- What scrapers do on a table of theirs. {table} is filled in. The index is on what an
-- update leaves alone, and pages are filled by half: so updates stay on their page, and
-- the table does not get slower from round to round.

-- create
CREATE TABLE {table} (
    id integer PRIMARY KEY,
    scraper text NOT NULL,
    payload text NOT NULL,
    runs integer NOT NULL DEFAULT 0,
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 50)

-- index
CREATE INDEX ON {table} (scraper)

-- fill
INSERT INTO {table} (id, scraper, payload)
SELECT n, (CAST(:scrapers AS text[]))[1 + n % :count], md5(n::text)
FROM generate_series(1, :rows) AS n

-- fetch
SELECT id, payload FROM {table} WHERE scraper = :scraper
LIMIT :batch FOR UPDATE SKIP LOCKED

-- serve
SELECT pg_sleep(:seconds)

-- write
UPDATE {table} SET runs = runs + 1, payload = md5(payload),
    updated_at = clock_timestamp()
WHERE id = ANY(:ids)

-- drop
DROP TABLE IF EXISTS {table}
