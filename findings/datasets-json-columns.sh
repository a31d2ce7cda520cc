#!/bin/bash
# datasets 5.2.0 and pyarrow 25.0.1: objects whose keys differ between rows change their type on the way to Parquet.
#
# Chat data sets have such objects: the arguments of tool calls. datasets gives a column of them the feature `Json`, and
# its rows are dicts. The Parquet file that it writes has the column as the extension type `arrow.json`. pyarrow, which
# other programs read the same file with, gives text for it, without an error. If all objects have the same keys, the
# column is a struct, and both give dicts.
#
# Seen:
#   datasets: {'city': 'Rome'}
#   pyarrow:  '{"city":"Rome"}' of type extension<arrow.json>
#   the same keys in every row: {'city': 'Rome'}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check 'datasets==5.2.0' 'pyarrow==25.0.1'
cd "$folder"
HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 HF_HOME="$folder/home" env/bin/python - <<'PYTHON'
import json
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet


def both(name, arguments):
    """The first row's object by datasets and by pyarrow, and the type of the column in the Parquet file."""
    folder = Path(name)
    folder.mkdir()
    rows = [{"turn": turn, "arguments": item} for turn, item in enumerate(arguments)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = datasets.load_dataset(name, split="train")
    loaded.to_parquet(f"{name}.parquet")
    table = pyarrow.parquet.read_table(f"{name}.parquet")
    return loaded[0]["arguments"], table.column("arguments")[0].as_py(), table.schema.field("arguments").type


print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__)
ours, theirs, kind = both("different", [{"city": "Rome"}, {"lines": 3}])
print(f"datasets: {ours!r}\npyarrow:  {theirs!r} of type {kind}")
alike = both("alike", [{"city": "Rome"}, {"city": "Oslo"}])[1]
print(f"the same keys in every row: {alike!r}")
is_as_described = ours == alike == {"city": "Rome"} and theirs == '{"city":"Rome"}' and "arrow.json" in str(kind)
sys.exit(0 if is_as_described else "this is no longer so")
PYTHON
