-- Each request asks for a row of its own, and every answer must be that of a row that was asked for and not yet answered.
--
-- Row k of n numbers is k, k + 1/n, ... its answer twice that plus one: exact in single precision up to 2^18 rows of 16
-- or 64. wrk does not say on which connection an answer came; that each caller gets its own is checked before
-- (processes.py). A second argument is the JSON of the Open Inference Protocol that goes before each row.
local ffi = require("ffi")
ffi.cdef [[
typedef struct { long seconds, nanoseconds; } moment;
int clock_gettime(int clock, moment *now);
]]

local ROWS, now = 2 ^ 18, ffi.new("moment")
local FEATURES, row, json
local asked, last, head, threads = {}, 0, "", {}

local function microseconds()
  ffi.C.clock_gettime(1, now)
  return tonumber(now.seconds) * 1e6 + tonumber(now.nanoseconds) / 1e3
end

local function answered(body) -- the row, or nil
  if json ~= "" then body = body:sub(-4 * FEATURES) end
  if #body ~= 4 * FEATURES then return nil end
  local y = ffi.cast("const float *", body)
  local k = (y[0] - 1) / 2
  for i = 0, FEATURES - 1 do
    if y[i] ~= 2 * (k + i / FEATURES) + 1 then return nil end
  end
  return asked[k] and k
end

function setup(thread) table.insert(threads, thread) end

function init(args)
  FEATURES, json = tonumber(args[1]), args[2] or ""
  row = ffi.new("float[?]", FEATURES)
  answers, wrong, refused, failed, took = 0, 0, 0, 0, {}
  head = table.concat({
    "POST " .. wrk.path .. " HTTP/1.1", "Host: " .. wrk.host .. ":" .. wrk.port,
    "Content-Type: application/octet-stream", "Content-Length: " .. #json + 4 * FEATURES,
    json == "" and "\r\n" or "Inference-Header-Content-Length: " .. #json .. "\r\n\r\n" .. json,
  }, "\r\n")
end

function request()
  last = (last + 1) % ROWS
  for i = 0, FEATURES - 1 do row[i] = last + i / FEATURES end
  asked[last] = microseconds()
  return head .. ffi.string(row, 4 * FEATURES)
end

function response(status, headers, body)
  if status == 503 or status == 429 then
    refused = refused + 1
  elseif status ~= 200 then
    failed = failed + 1
  else
    local k = answered(body)
    if k then
      answers = answers + 1
      took[answers] = math.floor(microseconds() - asked[k])
      asked[k] = nil
    else
      wrong = wrong + 1
    end
  end
end

function done(summary)
  local thread, errors = threads[1], summary.errors
  io.write(string.format(
    '\n{"duration":%d,"answers":%d,"refused":%d,"wrong":%d,"failed":%d,"broken":%d,"late":%d,"took":[%s]}\n',
    summary.duration, thread:get("answers"), thread:get("refused"), thread:get("wrong"), thread:get("failed"),
    errors.connect + errors.read + errors.write, errors.timeout, table.concat(thread:get("took"), ",")))
end
