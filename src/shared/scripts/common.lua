-- The beginning of every script.
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
-- Formats a whole number. Large numbers would get an exponent otherwise.
local function text(number)
  return string.format('%.0f', number)
end
-- Calls `divide` with each key and its `count` numbers, which begin after the first `fixed` arguments of the script.
-- Returns the results in the order of the keys.
local function divide_each(fixed, count, divide)
  local results = {}
  for index, key in ipairs(KEYS) do
    local numbers = {}
    for offset = 1, count do
      numbers[offset] = tonumber(ARGV[fixed + (index - 1) * count + offset])
    end
    results[index] = divide(key, unpack(numbers, 1, count))
  end
  return results
end

