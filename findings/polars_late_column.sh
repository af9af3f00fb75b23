#!/usr/bin/env bash
# polars 2.1: a field of a JSON Lines log that first appears after line 100 is left out of the table, without an error.
#
# Guessed: `read_ndjson` raises at the first row that has a field which the rows before did not have.
# Found: it infers the columns from the first 100 lines and drops everything else. A training log that evaluates every 1000
# steps and logs every 10 has its first evaluation behind line 100: the table then holds no `answer_accuracy` at all.
# `infer_schema_length=None` reads every line first. pandas and pyarrow keep the field.
#
# Seen with polars 2.1.0, pandas 3.1.1:
#   polars: columns step, loss; with infer_schema_length=None step, loss, answer_accuracy; pandas: step, loss, answer_accuracy
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet polars==2.1.0 pandas==3.1.1 numpy==2.4.6

cd "$work"
venv/bin/python - <<'PY'
import json
import sys

import pandas
import polars

rows = [{"step": step, "loss": 3.0} for step in range(10, 1010, 10)] + [{"step": 1000, "answer_accuracy": 0.5}]
with open("metrics.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)

short = polars.read_ndjson("metrics.jsonl")
whole = polars.read_ndjson("metrics.jsonl", infer_schema_length=None)
table = pandas.read_json("metrics.jsonl", lines=True)
print(f"polars {polars.__version__}, pandas {pandas.__version__}")
print(
    f"polars: columns {', '.join(short.columns)}; with infer_schema_length=None {', '.join(whole.columns)}; "
    f"pandas: {', '.join(table.columns)}"
)
complete = ["step", "loss", "answer_accuracy"]
seen = short.columns == complete[:2] and short.height == 101 and whole.columns == complete and list(table) == complete
sys.exit(0 if seen else 1)
PY
