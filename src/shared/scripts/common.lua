-- Defines functions that several scripts use. This text is the beginning of every script.

-- Returns the time of Redis in ms since 1970.
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Formats a whole number. `tostring` would write a large number with an exponent.
local function text(number)
  return string.format('%.0f', number)
end

-- Calls `divide` with each key and its `count` arguments, which begin after the first `fixed` arguments of the
-- script. An argument is passed as a number, as a text if it is not a number, or as nil if it is empty. Returns the
-- results in the order of the keys.
local function divide_each(fixed, count, divide)
  local results = {}
  for index, key in ipairs(KEYS) do
    local arguments = {}
    for offset = 1, count do
      local argument = ARGV[fixed + (index - 1) * count + offset]
      arguments[offset] = tonumber(argument) or (argument ~= '' and argument or nil)
    end
    results[index] = divide(key, unpack(arguments, 1, count))
  end
  return results
end

