"""Spreads the credits of the current hour in a usage database over the last 24 hours, so that a chart of a day has
values. The sum stays the same. The script may run while Keychoir uses the database."""

import math
import sqlite3
import sys

HOUR_MS = 3_600_000

database = sqlite3.connect(sys.argv[1], timeout=30)
columns = [row[1] for row in database.execute("PRAGMA table_info(hours)")]
hour, credits = columns.index("hour_ms"), columns.index("credits")
places = ", ".join("?" * len(columns))
for index, row in enumerate(database.execute("SELECT * FROM hours").fetchall()):
    # A day has a quiet night, and the keys are not all busy at the same time.
    weights = [0.55 + 0.45 * math.sin((age + 5 * index) * math.pi / 12) for age in range(24)]
    for age, weight in enumerate(weights):
        changed = list(row)
        changed[hour] -= age * HOUR_MS
        changed[credits] = int(row[credits] * weight / sum(weights))
        database.execute(f"INSERT OR REPLACE INTO hours VALUES ({places})", changed)
database.commit()
