"""Prints the table of means ± standard deviations over seeds (and folds) from a file of results, in Markdown.

    python -m experiments.table experiments/results/ablation.jsonl
"""

import json
import statistics
import sys
from collections import defaultdict

MEASURES = ("linear", "linear-pair", "knn", "knn-pair", "fine-tuned", "fine-tuned-pair", "linear-all", "scene",
            "direction", "nearest-all", "rank", "held-out")


def cell(values, digits):
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


rows = defaultdict(lambda: defaultdict(list))
for line in map(json.loads, open(sys.argv[1])):
    rows[line["row"]][line["measure"]].append(line["value"])
columns = [name for name in MEASURES if any(name in values for values in rows.values())]
print("| |", " | ".join(columns), "|")
print("|---" * (len(columns) + 1) + "|")
for row, values in sorted(rows.items(), key=lambda row: row[0].split("-")[0]):  # the rows of a set together
    cells = (cell(values[name], 3 if name == "held-out" else 1) for name in columns)
    print(f"| {row} |", " | ".join(cells), "|")
