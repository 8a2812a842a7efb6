-- The schema of release 0001 on sqlite, as create_all made it, with one row of each kind. Frozen: never edited.

CREATE TABLE api_key (
  id VARCHAR(16) NOT NULL,
  name VARCHAR(64) NOT NULL,
  tenant VARCHAR(64) NOT NULL,
  role VARCHAR(16) NOT NULL,
  hash VARCHAR(64) NOT NULL,
  created_at_ms BIGINT NOT NULL,
  revoked_at_ms BIGINT,
  budget_nanousd BIGINT,
  budget_window VARCHAR(8),
  PRIMARY KEY (id),
  UNIQUE (name)
);

CREATE INDEX ix_api_key_tenant ON api_key (tenant);

CREATE TABLE attempt (
  id VARCHAR(48) NOT NULL,
  request_id VARCHAR(40) NOT NULL,
  seq INTEGER NOT NULL,
  model VARCHAR(128) NOT NULL,
  provider VARCHAR(128) NOT NULL,
  started_at_ms BIGINT NOT NULL,
  first_byte_us BIGINT,
  duration_us BIGINT NOT NULL,
  outcome VARCHAR(24) NOT NULL,
  upstream_status INTEGER,
  error VARCHAR(300),
  input_tokens BIGINT NOT NULL,
  cached_input_tokens BIGINT NOT NULL,
  cache_write_tokens BIGINT NOT NULL,
  output_tokens BIGINT NOT NULL,
  reasoning_tokens BIGINT NOT NULL,
  cost_nanousd BIGINT,
  cost_estimated BOOLEAN NOT NULL,
  PRIMARY KEY (id)
);

CREATE INDEX ix_attempt_request_id ON attempt (request_id);

CREATE TABLE request (
  id VARCHAR(40) NOT NULL,
  created_at_ms BIGINT NOT NULL,
  tenant VARCHAR(64) NOT NULL,
  key_id VARCHAR(16) NOT NULL,
  endpoint VARCHAR(32) NOT NULL,
  stream BOOLEAN NOT NULL,
  session VARCHAR(128),
  scope VARCHAR(64),
  model_requested VARCHAR(256) NOT NULL,
  model_served VARCHAR(128),
  provider VARCHAR(128),
  route VARCHAR(128) NOT NULL,
  policy_version VARCHAR(64) NOT NULL,
  decision TEXT,
  outcome VARCHAR(16) NOT NULL,
  http_status INTEGER NOT NULL,
  error_code VARCHAR(64),
  cache VARCHAR(8) NOT NULL,
  attempts INTEGER NOT NULL,
  input_tokens BIGINT NOT NULL,
  cached_input_tokens BIGINT NOT NULL,
  cache_write_tokens BIGINT NOT NULL,
  output_tokens BIGINT NOT NULL,
  reasoning_tokens BIGINT NOT NULL,
  cost_nanousd BIGINT,
  cost_estimated BOOLEAN NOT NULL,
  baseline_nanousd BIGINT,
  reserved_nanousd BIGINT NOT NULL,
  first_byte_us BIGINT,
  duration_us BIGINT NOT NULL,
  overhead_us BIGINT NOT NULL,
  PRIMARY KEY (id)
);

CREATE INDEX ix_request_created_at_ms ON request (created_at_ms);

CREATE INDEX request_by_key_time ON request (key_id, created_at_ms);


INSERT INTO api_key (id, name, tenant, role, hash, created_at_ms, revoked_at_ms, budget_nanousd, budget_window) VALUES
  ('5f3a9c01d2e4', 'first', 'default', 'admin', 'abababababababababababababababababababababababababababababababab', 1795200000000, NULL, NULL, NULL),
  ('77aa00bb11cc', 'alice', 'research', 'user', 'cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd', 1795200001000, 1795200009000, 5000000000, 'month');

INSERT INTO request (id, created_at_ms, tenant, key_id, endpoint, stream, session, scope, model_requested, model_served,
  provider, route, policy_version, decision, outcome, http_status, error_code, cache, attempts, input_tokens,
  cached_input_tokens, cache_write_tokens, output_tokens, reasoning_tokens, cost_nanousd, cost_estimated,
  baseline_nanousd, reserved_nanousd, first_byte_us, duration_us, overhead_us) VALUES
  ('req_1', 1795200002000, 'default', '5f3a9c01d2e4', 'chat.completions', 1, 's1', 'run42', 'auto', 'cheap', 'openai', 'auto',
   'abc123abc123', '{"route":"auto"}', 'ok', 200, NULL, 'miss', 1, 100, 50, 0, 20, 5, 12345, 0, 99999, 20000, 1500, 9000, 250),
  ('req_2', 1795200003000, 'research', '77aa00bb11cc', 'chat.completions', 0, NULL, NULL, 'gpt', NULL, NULL, '', '', NULL,
   'error', 502, 'upstream_error', 'off', 1, 0, 0, 0, 0, 0, NULL, 1, NULL, 0, NULL, 800, 800);

INSERT INTO attempt (id, request_id, seq, model, provider, started_at_ms, first_byte_us, duration_us, outcome,
  upstream_status, error, input_tokens, cached_input_tokens, cache_write_tokens, output_tokens, reasoning_tokens,
  cost_nanousd, cost_estimated) VALUES
  ('req_1-0', 'req_1', 0, 'cheap', 'openai', 1795200002001, 1500, 8800, 'ok', 200, NULL, 100, 50, 0, 20, 5, 12345, 0),
  ('req_2-0', 'req_2', 0, 'gpt', 'openai', 1795200003001, NULL, 700, 'status', 500, 'boom', 0, 0, 0, 0, 0, NULL, 1);
