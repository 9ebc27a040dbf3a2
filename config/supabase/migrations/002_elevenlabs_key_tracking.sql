-- Creates the tables of Keychoir's mirror, for the states of the keys and, with `supabase.events`, for the usage events.
-- Run it in the SQL editor of Supabase, or with psql. Running it again only adds what is missing.
-- The tables contain no keys: `api_key_hash` is SHA-256 over `keychoir:key:1:` and a key, and `short_key` contains the
-- first and the last characters of the key.

CREATE EXTENSION IF NOT EXISTS "uuid-ossp";

CREATE TABLE IF NOT EXISTS public.elevenlabs_key_usage (
  id UUID PRIMARY KEY DEFAULT uuid_generate_v4(),
  api_key_hash TEXT NOT NULL UNIQUE,
  short_key TEXT NOT NULL,
  character_count INT NOT NULL DEFAULT 0,
  character_limit INT NOT NULL DEFAULT 0,
  remaining_characters INT NOT NULL DEFAULT 0,
  usage_percentage DECIMAL(5,4) NOT NULL DEFAULT 0,
  is_over_limit BOOLEAN NOT NULL DEFAULT false,
  is_near_limit BOOLEAN NOT NULL DEFAULT false,
  next_reset_date TIMESTAMP NOT NULL,
  status TEXT NOT NULL DEFAULT 'active',
  last_checked TIMESTAMP NOT NULL DEFAULT NOW(),
  created_at TIMESTAMP DEFAULT NOW(),
  updated_at TIMESTAMP DEFAULT NOW()
);

-- If an earlier version of the table exists, this adds its missing columns.
ALTER TABLE public.elevenlabs_key_usage
  ADD COLUMN IF NOT EXISTS character_count INT NOT NULL DEFAULT 0,
  ADD COLUMN IF NOT EXISTS character_limit INT NOT NULL DEFAULT 0,
  ADD COLUMN IF NOT EXISTS remaining_characters INT NOT NULL DEFAULT 0,
  ADD COLUMN IF NOT EXISTS usage_percentage DECIMAL(5,4) NOT NULL DEFAULT 0,
  ADD COLUMN IF NOT EXISTS is_over_limit BOOLEAN NOT NULL DEFAULT false,
  ADD COLUMN IF NOT EXISTS is_near_limit BOOLEAN NOT NULL DEFAULT false,
  ADD COLUMN IF NOT EXISTS next_reset_date TIMESTAMP NOT NULL DEFAULT 'infinity',
  ADD COLUMN IF NOT EXISTS status TEXT NOT NULL DEFAULT 'active',
  ADD COLUMN IF NOT EXISTS last_checked TIMESTAMP NOT NULL DEFAULT NOW(),
  ADD COLUMN IF NOT EXISTS created_at TIMESTAMP DEFAULT NOW(),
  ADD COLUMN IF NOT EXISTS updated_at TIMESTAMP DEFAULT NOW();
CREATE UNIQUE INDEX IF NOT EXISTS elevenlabs_key_usage_api_key_hash_key
  ON public.elevenlabs_key_usage (api_key_hash);

COMMENT ON COLUMN public.elevenlabs_key_usage.api_key_hash IS
  'SHA-256 over keychoir:key:1: and the key, in hexadecimal digits.';
COMMENT ON COLUMN public.elevenlabs_key_usage.last_checked IS
  'The time of this state, in UTC. An older state never overwrites a newer one.';
COMMENT ON COLUMN public.elevenlabs_key_usage.next_reset_date IS
  'The end of the period, in UTC, or infinity while it is unknown.';

-- Two machines can send the state of one key, and an old state can be sent again later. Only the newest state is kept.
CREATE OR REPLACE FUNCTION public.elevenlabs_key_usage_newest() RETURNS trigger
LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
  IF NEW.last_checked < OLD.last_checked THEN
    RETURN NULL;
  END IF;
  NEW.updated_at := pg_catalog.timezone('utc', pg_catalog.now());
  RETURN NEW;
END
$$;
CREATE OR REPLACE TRIGGER elevenlabs_key_usage_newest
  BEFORE UPDATE ON public.elevenlabs_key_usage
  FOR EACH ROW EXECUTE FUNCTION public.elevenlabs_key_usage_newest();

DROP VIEW IF EXISTS public.elevenlabs_key_health;
CREATE VIEW public.elevenlabs_key_health AS
SELECT
  short_key,
  status,
  CASE
    WHEN status <> 'active' THEN status
    WHEN is_over_limit THEN 'over_limit'
    WHEN is_near_limit THEN 'near_limit'
    ELSE 'healthy'
  END AS health,
  ROUND(usage_percentage * 100, 2) AS usage_percent,
  character_count,
  character_limit,
  remaining_characters,
  is_over_limit,
  is_near_limit,
  NULLIF(next_reset_date, 'infinity') AS next_reset_date,
  last_checked
FROM public.elevenlabs_key_usage;

-- Each row is one attempt of a request. Keychoir writes this table only with `supabase.events = true`.
CREATE TABLE IF NOT EXISTS public.elevenlabs_usage_events (
  id UUID PRIMARY KEY,
  request_id TEXT NOT NULL,
  attempt INT NOT NULL,
  started_at TIMESTAMPTZ NOT NULL,
  client TEXT NOT NULL,
  api_key_hash TEXT NOT NULL,
  workspace TEXT,
  method TEXT NOT NULL,
  route TEXT NOT NULL,
  model TEXT,
  status INT,
  verdict TEXT NOT NULL,
  request_bytes BIGINT NOT NULL,
  response_bytes BIGINT NOT NULL,
  characters BIGINT,
  credits BIGINT NOT NULL,
  credits_from TEXT NOT NULL,
  first_byte_ms BIGINT,
  total_ms BIGINT NOT NULL
);
-- If an earlier version of the table exists, this adds its missing columns.
ALTER TABLE public.elevenlabs_usage_events ADD COLUMN IF NOT EXISTS user_hash TEXT;
ALTER TABLE public.elevenlabs_usage_events ADD COLUMN IF NOT EXISTS region TEXT;
CREATE INDEX IF NOT EXISTS elevenlabs_usage_events_by_time ON public.elevenlabs_usage_events (started_at);

COMMENT ON COLUMN public.elevenlabs_usage_events.user_hash IS
  'The fingerprint of the end user that the client named in x-keychoir-user.';
COMMENT ON COLUMN public.elevenlabs_usage_events.region IS
  'The region of ElevenLabs, or the host of another provider.';
COMMENT ON COLUMN public.elevenlabs_usage_events.credits_from IS
  'The source of the credits: answer, estimate, free, or unknown until the price of the event is known.';

-- The price of an event can be sent later than the event. If the event is sent again after that, it does not remove the
-- price.
CREATE OR REPLACE FUNCTION public.elevenlabs_usage_events_priced() RETURNS trigger
LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
  IF NEW.credits_from = 'unknown' AND OLD.credits_from <> 'unknown' THEN
    RETURN NULL;
  END IF;
  RETURN NEW;
END
$$;
CREATE OR REPLACE TRIGGER elevenlabs_usage_events_priced
  BEFORE UPDATE ON public.elevenlabs_usage_events
  FOR EACH ROW EXECUTE FUNCTION public.elevenlabs_usage_events_priced();

-- Only service_role can use the tables: no other role has a policy of the row level security, or a privilege.
ALTER TABLE public.elevenlabs_key_usage ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.elevenlabs_usage_events ENABLE ROW LEVEL SECURITY;
REVOKE ALL ON public.elevenlabs_key_usage, public.elevenlabs_usage_events, public.elevenlabs_key_health FROM PUBLIC;
DO $$
DECLARE
  web_role TEXT;
  mirror_table TEXT;
BEGIN
  -- Without this option, the view would show every row that its owner can read.
  IF current_setting('server_version_num')::int >= 150000 THEN
    EXECUTE 'ALTER VIEW public.elevenlabs_key_health SET (security_invoker = true)';
  END IF;
  FOR web_role IN SELECT rolname FROM pg_roles WHERE rolname IN ('anon', 'authenticated') LOOP
    EXECUTE format('REVOKE ALL ON public.elevenlabs_key_usage, public.elevenlabs_usage_events,
      public.elevenlabs_key_health FROM %I', web_role);
  END LOOP;
  IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'service_role') THEN
    GRANT SELECT, INSERT, UPDATE, DELETE ON public.elevenlabs_key_usage, public.elevenlabs_usage_events TO service_role;
    GRANT SELECT ON public.elevenlabs_key_health TO service_role;
    FOREACH mirror_table IN ARRAY ARRAY['elevenlabs_key_usage', 'elevenlabs_usage_events'] LOOP
      EXECUTE format('DROP POLICY IF EXISTS keychoir_service_role ON public.%I', mirror_table);
      EXECUTE format('CREATE POLICY keychoir_service_role ON public.%I TO service_role USING (true) WITH CHECK (true)', mirror_table);
    END LOOP;
  END IF;
END
$$;

-- The API in front of the database reads the new schema immediately.
NOTIFY pgrst, 'reload schema';
