-- Configuration, the engines' lives, and the ledger.

CREATE TABLE installation (
    only_one   boolean PRIMARY KEY DEFAULT true CHECK (only_one),
    id         text NOT NULL,                       -- 8 hex digits; in the names of runtime directories
    epoch      bigint NOT NULL DEFAULT 0,           -- of the controller that leads; only grows
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE workspace (
    name        text PRIMARY KEY CHECK (name ~ '^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$'),
    created_at  timestamptz NOT NULL DEFAULT now(),
    disabled_at timestamptz
);

CREATE TABLE api_key (
    id         text PRIMARY KEY,                    -- public part
    workspace  text REFERENCES workspace,           -- NULL: an operator's key
    label      text NOT NULL DEFAULT '',
    hmac       bytea NOT NULL CHECK (length(hmac) = 32),
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    revoked_at timestamptz
);
CREATE INDEX api_key_workspace ON api_key (workspace);

CREATE TABLE model (
    name       text PRIMARY KEY CHECK (name ~ '^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$'),
    digest     text NOT NULL CHECK (digest ~ '^[0-9a-f]{64}$'),
    manifest   jsonb NOT NULL,                      -- engines.model.Model
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE variant (
    workspace  text NOT NULL REFERENCES workspace,
    name       text NOT NULL CHECK (name ~ '^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$'),
    model      text NOT NULL REFERENCES model,
    defaults   jsonb NOT NULL DEFAULT '{}',         -- engines.model.RequestDefaults
    scaling    jsonb NOT NULL DEFAULT '{}',         -- engines.model.Scaling
    arguments  jsonb NOT NULL DEFAULT '{}',         -- engines.model.RuntimeArguments
    dedicated  boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (workspace, name)
);

CREATE TABLE engine (
    id           uuid PRIMARY KEY,
    pool         text NOT NULL,
    spec         jsonb NOT NULL,                    -- engines.model.EngineSpec
    state        text NOT NULL,
    since        timestamptz NOT NULL,
    node         text NOT NULL,
    device       text NOT NULL,
    memory_bytes bigint NOT NULL CHECK (memory_bytes >= 0),
    epoch        bigint NOT NULL,
    address      text,
    pid          integer,
    pid_start    bigint,
    caused_by    text,
    created_at   timestamptz NOT NULL,
    ready_at     timestamptz,
    phases_us    jsonb NOT NULL DEFAULT '{}',
    failure      text,
    last_lines   text[] NOT NULL DEFAULT '{}'       -- end of the log of one that failed
);
CREATE INDEX engine_live ON engine (state) WHERE state <> 'stopped';
CREATE INDEX engine_created ON engine (created_at);

CREATE TABLE engine_interval (
    engine       uuid NOT NULL REFERENCES engine,
    seq          integer NOT NULL,                  -- 0, 1, … per engine
    state        text NOT NULL,
    started_at   timestamptz NOT NULL,
    ended_at     timestamptz,
    memory_bytes bigint NOT NULL,
    PRIMARY KEY (engine, seq)
);

-- A process that answers for rows of `usage_open`; it extends its own lease, and is dead when that has passed.
CREATE TABLE instance (
    id          uuid PRIMARY KEY,
    kind        text NOT NULL,                      -- gateway
    pid         integer NOT NULL,
    started_at  timestamptz NOT NULL DEFAULT now(),
    lease_until timestamptz NOT NULL
);

-- Way of the fleet and of demand while Valkey is away.
CREATE TABLE fleet_snapshot (
    only_one boolean PRIMARY KEY DEFAULT true CHECK (only_one),
    epoch    bigint NOT NULL,
    version  bigint NOT NULL,
    body     jsonb NOT NULL                         -- engines.model.Fleet
);

CREATE TABLE demand_report (
    gateway uuid PRIMARY KEY,
    at      timestamptz NOT NULL,
    body    jsonb NOT NULL                          -- engines.model.Demand
);

-- The ledger. `usage_open` has a row for every accepted request that has not ended; `usage_event` is append-only.
CREATE TABLE usage_open (
    request_id  uuid NOT NULL,
    attempt     smallint NOT NULL CHECK (attempt >= 1),
    workspace   text NOT NULL,
    key         text NOT NULL,
    variant     text NOT NULL,
    model       text NOT NULL,
    endpoint    text NOT NULL,
    stream      boolean NOT NULL,
    sequences   integer NOT NULL CHECK (sequences >= 1),
    gateway     uuid NOT NULL,
    received_at timestamptz NOT NULL,
    trace_id    text NOT NULL,
    retry_count integer NOT NULL DEFAULT 0,
    pending     jsonb,                              -- tenants.usage.UsageClose that waits for the engine book
    PRIMARY KEY (request_id, attempt)
);
CREATE INDEX usage_open_gateway ON usage_open (gateway);

CREATE TABLE usage_event (
    request_id        uuid NOT NULL,
    attempt           smallint NOT NULL CHECK (attempt >= 1),
    revision          smallint NOT NULL DEFAULT 0 CHECK (revision >= 0),
    final             boolean NOT NULL,
    workspace         text NOT NULL,
    key               text NOT NULL,
    variant           text NOT NULL,
    model             text NOT NULL,
    endpoint          text NOT NULL,
    stream            boolean NOT NULL,
    outcome           text NOT NULL,
    source            text NOT NULL CHECK (source IN ('stream', 'book', 'none')),
    prompt_tokens     bigint NOT NULL CHECK (prompt_tokens >= 0),
    cached_tokens     bigint NOT NULL CHECK (cached_tokens BETWEEN 0 AND prompt_tokens),
    completion_tokens bigint NOT NULL CHECK (completion_tokens >= 0),
    engine            uuid,
    cold              boolean NOT NULL,
    received_at       timestamptz NOT NULL,
    ended_at          timestamptz NOT NULL,
    queued_us         bigint NOT NULL CHECK (queued_us >= 0),
    held_us           bigint NOT NULL CHECK (held_us >= 0),
    first_token_us    bigint CHECK (first_token_us >= 0),
    duration_us       bigint NOT NULL CHECK (duration_us >= 0),
    detail            text,
    trace_id          text NOT NULL,
    retry_count       integer NOT NULL DEFAULT 0,
    PRIMARY KEY (request_id, attempt, revision)
);
CREATE UNIQUE INDEX usage_event_one_final ON usage_event (request_id) WHERE final AND revision = 0;
CREATE INDEX usage_event_corrections ON usage_event (request_id, attempt, revision) WHERE revision > 0;
CREATE INDEX usage_event_workspace_time ON usage_event (workspace, received_at);
CREATE INDEX usage_event_time ON usage_event (received_at);
