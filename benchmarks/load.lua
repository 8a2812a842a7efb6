-- wrk script: POSTs a chat request whose prompt differs each time (UNIQUE=1) or stays the same, and prints a line of JSON.
local model = os.getenv("BENCH_MODEL") or "mock"
local unique = os.getenv("BENCH_UNIQUE") == "1"
local seed = tonumber(os.getenv("BENCH_SEED") or "0")
local count = 0
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer " .. (os.getenv("BENCH_KEY") or "none")
if os.getenv("BENCH_CACHE_CONTROL") then wrk.headers["Cache-Control"] = os.getenv("BENCH_CACHE_CONTROL") end

local function body(number)
  return '{"model":"' .. model .. '","messages":[{"role":"system","content":"You are a helpful assistant."},'
    .. '{"role":"user","content":"Question ' .. number .. ': which planets have rings, and what are they made of?"}],'
    .. '"max_tokens":256}'
end

request = function()
  if unique then count = count + 1 end
  return wrk.format(nil, nil, nil, body(seed .. "-" .. count))
end

done = function(summary, latency)
  local e = summary.errors
  io.write(string.format(
    'RESULT {"requests":%d,"duration_us":%d,"p50_us":%d,"p99_us":%d,"bad_status":%d,"socket_errors":%d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), e.status,
    e.connect + e.read + e.write + e.timeout))
end
