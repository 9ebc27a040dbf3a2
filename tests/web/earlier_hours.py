"""Distributes the credits of each row of the hourly sums in a usage database over 24 hours, so that the chart in the
picture of the README has values. Apart from rounding, the sum of the credits stays the same. The script may run while
Keychoir uses the database:

    python3 tests/web/earlier_hours.py DATABASE
"""

import math
import sqlite3
import sys

HOUR_MS = 3_600_000

database = sqlite3.connect(sys.argv[1], timeout=30)
columns = [row[1] for row in database.execute("PRAGMA table_info(hours)")]
hour_column, credits_column = columns.index("hour_ms"), columns.index("credits")
placeholders = ", ".join("?" * len(columns))
for index, row in enumerate(database.execute("SELECT * FROM hours").fetchall()):
    # The weights follow a wave of one day, which starts at a different hour for each row.
    weights = [0.55 + 0.45 * math.sin((age + 5 * index) * math.pi / 12) for age in range(24)]
    for age, weight in enumerate(weights):
        earlier_row = list(row)
        earlier_row[hour_column] -= age * HOUR_MS
        earlier_row[credits_column] = int(row[credits_column] * weight / sum(weights))
        database.execute(f"INSERT OR REPLACE INTO hours VALUES ({placeholders})", earlier_row)
database.commit()
