from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

from lem.cli.host import add_datasets_arguments
from lem.config.sections import DATASET_ALIASES


def datasets(*argv: str, **environ: str) -> tuple[int, str, str]:
    parser = argparse.ArgumentParser()
    add_datasets_arguments(parser)
    args = parser.parse_args(argv)
    out, err = io.StringIO(), io.StringIO()
    return args.run(args, out, err, environ) or 0, out.getvalue(), err.getvalue()


def places(**environ: str) -> dict[str, dict[str, Any]]:
    code, out, err = datasets("--json", **environ)
    assert (code, err) == (0, "")
    return {line["alias"]: line for line in json.loads(out)}


def test_every_alias_is_listed_with_what_it_stands_for(tmp_path: Path) -> None:
    code, out, err = datasets(HF_HOME=str(tmp_path))
    rows = [line.split() for line in out.splitlines()]
    assert (code, "downloaded on first use" in err) == (0, True)
    assert [row[0] for row in rows[1:]] == list(DATASET_ALIASES)
    assert rows[-1] == ["mmlu", "cais/mmlu", "(all)", "test", "question,", "choices", "hub"]


def test_a_data_set_is_found_in_the_folder_or_else_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "alpaca.jsonl").write_text('{"instruction": "x"}\n')
    (tmp_path / "gsm8k").mkdir()
    snapshot = tmp_path / "hub" / "datasets--cais--mmlu" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "test.parquet").write_bytes(b"")
    found = places(LEM_DATASETS_DIR=str(tmp_path), HF_HOME=str(tmp_path))
    assert (found["alpaca"]["place"], found["alpaca"]["detail"]) == ("folder", str(tmp_path / "alpaca.jsonl"))
    assert (found["gsm8k"]["place"], "no data files" in found["gsm8k"]["detail"]) == ("unusable", True)
    assert found["mmlu"]["place"] == "cache"
    assert places(HF_HUB_CACHE=str(tmp_path / "hub"), HF_HOME="/nowhere")["mmlu"]["place"] == "cache"
    assert places(XDG_CACHE_HOME=str(tmp_path))["mmlu"]["place"] == "hub"
