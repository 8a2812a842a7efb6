-- One batch of operations on the meters of rates, token rates and concurrency: all of them at one instant, which is
-- Redis's own. KEYS: the meters. ARGV[1]: the lease of a place in microseconds. ARGV[2]: the operations (MessagePack):
--   {1, id, {{meter, 0, span_us, charge_us} | {meter, 1, count}, …}}   take of all, or of none
--   {2, id, {{meter, 0, more_us} | {meter, 1}, …}}                     give back: correct a charge, free a place
--   {3, id, {{meter, 1}, …}}                                           renew the lease of a place
-- Returns for each (MessagePack) {refused, wait_us, due_in_us of each meter, …}: `refused` is 0, or the place of the
-- limit that refused.
-- A rate's meter is one number, when its bucket will have drained; a concurrency's is a set of ids by end of lease.
local EPOCH_S = 1700000000 -- keeps microseconds exact to a fraction in a double
local TOLERANCE_US = 1
local time = redis.call('TIME')
local now = (time[1] - EPOCH_S) * 1000000 + time[2]
local lease = tonumber(ARGV[1])
local due, dirty, count = {}, {}, {}

local function due_of(k)
  if not due[k] then due[k] = math.max(tonumber(redis.call('GET', KEYS[k]) or 0), now) end
  return due[k]
end

local function count_of(k)
  if not count[k] then
    redis.call('ZREMRANGEBYSCORE', KEYS[k], '-inf', now)
    count[k] = redis.call('ZCARD', KEYS[k])
  end
  return count[k]
end

local function hold(k, id)
  count_of(k)
  count[k] = count[k] + redis.call('ZADD', KEYS[k], string.format('%.0f', now + lease), id)
  redis.call('PEXPIRE', KEYS[k], math.ceil(lease / 1000) + 1000)
end

local results = {}
for i, op in ipairs(cmsgpack.unpack(ARGV[2])) do
  local result = {0, 0}
  if op[1] == 1 then
    for j, limit in ipairs(op[3]) do
      if limit[2] == 1 then
        if count_of(limit[1]) >= limit[3] then
          result = {j, 0}
          break
        end
      else
        local wait = due_of(limit[1]) + limit[4] - now - limit[3]
        if wait > TOLERANCE_US then
          result = {j, wait}
          break
        end
      end
    end
    if result[1] == 0 then
      for j, limit in ipairs(op[3]) do
        local k = limit[1]
        if limit[2] == 1 then
          hold(k, op[2])
          result[j + 2] = 0
        else
          due[k] = due[k] + limit[4]
          dirty[k] = true
          result[j + 2] = due[k] - now
        end
      end
    end
  elseif op[1] == 2 then
    for _, meter in ipairs(op[3]) do
      local k = meter[1]
      if meter[2] == 1 then
        count_of(k)
        count[k] = count[k] - redis.call('ZREM', KEYS[k], op[2])
      else
        due[k] = math.max(due_of(k) + meter[3], now)
        dirty[k] = true
      end
    end
  else
    for _, meter in ipairs(op[3]) do hold(meter[1], op[2]) end
  end
  results[i] = result
end

for k in pairs(dirty) do
  if due[k] > now then
    redis.call('SET', KEYS[k], string.format('%.3f', due[k]), 'PX', math.ceil((due[k] - now) / 1000) + 1000)
  else
    redis.call('DEL', KEYS[k])
  end
end
return cmsgpack.pack(results)
