from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lem.base import process
from lem.base.errors import EngineError
from lem.base.reasons import Reason
from lem.base.variables import DATASETS_VARIABLE
from lem.config.experiment import ExperimentConfig
from lem.config.sections import DATASET_ALIASES
from lem.worker.datasets import DatasetChoice, choice_of, find_files, resolve_dataset, shuffle
from lem.worker.prompts import ResolvedPrompts, fingerprint

ROOT = Path(__file__).parents[3]
ROWS = [{"prompt": f"prompt {number}", "other": number} for number in range(6)]


def config(**options: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict({"model": "any", **options})


def resolve(folder: Path, options: Mapping[str, Any], draw: int = 0) -> ResolvedPrompts:
    return resolve_dataset(config(**options), {DATASETS_VARIABLE: str(folder)}, {}, draw)


def write_jsonl(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def texts(found: ResolvedPrompts) -> list[str]:
    return [item.prompt for item in found.prompts]


def test_an_alias_names_where_it_is_and_what_is_given_wins_over_it() -> None:
    for alias in DATASET_ALIASES:
        choice = choice_of(config(dataset=alias))
        assert choice.hub_name == DATASET_ALIASES[alias].path
        assert choice.columns == DATASET_ALIASES[alias].columns
        assert choice_of(config(dataset=choice.hub_name)) == replace(choice, name=choice.hub_name)
        assert choice.split in ("train", "test")
    choice = choice_of(config(dataset={"name": "mmlu", "split": "validation", "column": "answer"}))
    assert (choice.split, choice.columns, choice.subset) == ("validation", ("answer",), "all")
    with pytest.raises(ValueError, match="no prompts from a data set"):
        choice_of(config())


def test_data_set_in_the_folder_is_taken_with_source_and_hash(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "mine.jsonl", ROWS)
    found = resolve(tmp_path, {"dataset": {"name": "mine", "sample_size": 3}})
    assert texts(found) == ["prompt 0", "prompt 1", "prompt 2"]
    place = {"kind": "local", "path": str(tmp_path / "mine.jsonl"), "name": "mine", "split": "train"}
    expected = {**place, "revision": None, "sha256": fingerprint(found.prompts), "count": 3, "taken_from": "prompt"}
    assert found.source == {**dict.fromkeys(found.source), "hub_name": "mine", **expected}
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mine.json", json.dumps(ROWS)),
        ("mine.json", json.dumps({"data": ROWS, "version": 1})),
        ("mine.csv", "prompt,other\n" + "".join(f"prompt {number},{number}\n" for number in range(6))),
        ("mine.txt", "".join(f"prompt {number}\n" for number in range(6))),
        ("mine/train.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS)),
        ("mine/only.ndjson", "".join(json.dumps(row) + "\n\n" for row in ROWS)),
        ("mine/data/train-00000-of-00001.json", json.dumps(ROWS)),
    ],
)
def test_formats_and_places(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content)
    assert texts(resolve(tmp_path, {"dataset": "mine"})) == [row["prompt"] for row in ROWS]


@pytest.mark.parametrize("form", ["tatsu-lab/alpaca", "tatsu-lab__alpaca", "tatsu-lab--alpaca", "alpaca"])
def test_an_alias_is_found_by_any_form_of_its_name(tmp_path: Path, form: str) -> None:
    write_jsonl(
        tmp_path / f"{form}.jsonl", [{"instruction": "do it", "input": "x", "output": "y", "text": "do it x y"}]
    )
    for name in ("alpaca", "tatsu-lab/alpaca"):
        found = resolve(tmp_path, {"dataset": name})
        assert (texts(found), found.source["taken_from"]) == (["do it\n\nx"], "instruction, input")


def test_a_split_may_have_parts_and_a_subset_is_a_folder_of_its_own(tmp_path: Path) -> None:
    for part in (1, 0):
        write_jsonl(tmp_path / "mine" / f"train-{part}.jsonl", [{"prompt": f"part {part}"}])
    write_jsonl(tmp_path / "mine" / "test.jsonl", [{"prompt": "another split"}])
    for subset in ("main", "socratic"):
        write_jsonl(tmp_path / "gsm8k" / subset / "train.jsonl", [{"question": subset}])
    assert texts(resolve(tmp_path, {"dataset": "mine"})) == ["part 0", "part 1"]
    assert texts(resolve(tmp_path, {"dataset": {"name": "mine", "split": "test"}})) == ["another split"]
    assert texts(resolve(tmp_path, {"dataset": "gsm8k"})) == ["main"]


def test_a_data_set_may_be_a_folder_or_file_itself(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "set" / "train.jsonl", ROWS)
    for name in (tmp_path / "set", tmp_path / "set" / "train.jsonl"):
        assert len(resolve_dataset(config(dataset=str(name)), {}, {}).prompts) == 6


def test_sharegpt_gives_first_human_turns_and_skips_what_has_none(tmp_path: Path) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "answer"}]},
        {"conversations": []},
        {"conversations": [{"from": "gpt", "value": "answer"}, {"from": "human", "value": "two"}]},
    ]
    write_jsonl(tmp_path / "sharegpt.jsonl", rows)
    found = resolve(tmp_path, {"dataset": "sharegpt"})
    assert texts(found) == ["one", "two"]
    assert found.warnings == (Reason.of("rows_skipped", name="sharegpt", skipped=1),)


def test_blank_rows_are_skipped_and_too_few_are_told(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "mine.jsonl", [{"prompt": ""}, {"prompt": " "}, {"prompt": None}, *ROWS])
    found = [resolve(tmp_path, {"dataset": {"name": "mine", "sample_size": size}}) for size in (2, 50)]
    skipped = Reason.of("rows_skipped", name="mine", skipped=3)
    assert texts(found[0]) == ["prompt 0", "prompt 1"]
    assert len(found[1].prompts) == 6
    assert found[0].warnings == (skipped,)
    assert found[1].warnings == (skipped, Reason.of("dataset_too_small", name="mine", wanted=50, found=6))


def test_shuffle_takes_others_by_its_seed(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "mine.jsonl", ROWS)

    drawn = {"type": "huggingface", "dataset": "mine", "sample_size": 3, "shuffle": True, "seed": 1}

    def draw(seed: int) -> list[str]:
        return texts(resolve(tmp_path, {"prompts": {**drawn, "seed": seed}}))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    cycles = [texts(resolve(tmp_path, {"prompts": drawn}, draw=cycle)) for cycle in (0, 1, 1)]
    assert cycles[0] == draw(1) != cycles[1] == cycles[2], "each cycle has its own"
    assert set(draw(1)) <= {row["prompt"] for row in ROWS}


def test_every_permutation_is_as_likely() -> None:
    def order(seed: int) -> str:
        items = list("abc")
        shuffle(items, seed)
        return "".join(items)

    orders = Counter(map(order, range(6000)))
    assert len(orders) == 6
    assert all(count == pytest.approx(1000, abs=130) for count in orders.values())


@pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
        ([{"a": "x", "b": "y"}], None, "it has a, b"),
        ([{"prompt": "x"}], "nope", "no column 'nope'"),
        ([{"prompt": ["x"]}], None, "no prompts found: prompt: expected text, or a list of messages"),
        ([{"prompt": ""}], None, "no prompts found"),
        ([], None, "no prompts found"),
        ([["x"]], None, "line 1: expected an object"),
    ],
)
def test_rows_that_hold_no_prompts_are_refused(
    tmp_path: Path, rows: list[Any], column: str | None, message: str
) -> None:
    write_jsonl(tmp_path / "mine.jsonl", rows)
    with pytest.raises(EngineError, match=message) as caught:
        resolve(tmp_path, {"dataset": {"name": "mine", "column": column}})
    assert caught.value.kind == "prompts"
    assert caught.value.is_permanent


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mine.jsonl", b"{", "line 1"),
        ("mine.jsonl", b"[" * 100_000, "line 1: nested too deeply"),
        ("mine/README.md", b"---\nconfigs:\n- config_name: \xff\n", "cannot be read"),
        ("mine.json", b'{"a": 1}', "expected a list of objects"),
        ("mine.json", b"3", "expected a list of objects"),
        ("mine.csv", b'prompt\n"open', "not a valid csv file"),
        ("mine.txt", b"\xff\xfe", "not a valid txt file"),
        ("mine/train.parquet", b"not parquet", "not a valid parquet file|cannot be read"),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EngineError, match=message) as caught:
        resolve(tmp_path, {"dataset": "mine"})
    assert str(tmp_path / name) in caught.value.message


@pytest.mark.parametrize(
    ("folder", "dataset", "message"),
    [
        (".", {"name": "mine", "split": "validation"}, "it has train, test"),
        (".", "empty", "no data files$"),
        ("missing", "mine", DATASETS_VARIABLE),
    ],
)
def test_a_folder_without_the_data_is_refused(tmp_path: Path, folder: str, dataset: Any, message: str) -> None:
    for split in ("train", "test"):
        write_jsonl(tmp_path / "mine" / f"{split}.jsonl", ROWS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EngineError, match=message):
        resolve(tmp_path / folder, {"dataset": dataset})


CARD = """---
language: en
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path:
    - "main/test.jsonl"
- config_name: 'other'
  data_files: other/*.jsonl
license: mit
---
# A data set
"""
SHARDS = tuple(f"data/train-0000{part}-of-00002.jsonl" for part in range(2))


class Layout(NamedTuple):
    files: Iterable[str]
    found: tuple[str, ...] | str  # the files of the split, or a part of the refusal
    split: str = "train"
    subset: str | None = None
    card: str | None = None


LAYOUTS = {
    "a copy of a hub repository": Layout(("data/train.jsonl", "LICENSE.txt"), ("data/train.jsonl",)),
    "a licence beside one file": Layout(("data.jsonl", "LICENSE.txt"), ("data.jsonl",)),
    "a licence and a notice": Layout(("data.jsonl", "LICENSE.txt", "NOTICE.txt"), "several formats"),
    "a licence alone": Layout(("LICENSE.txt", "README.md"), "found a document"),
    "texts": Layout(("a.txt", "b.txt"), ("a.txt", "b.txt")),
    "all files are train": Layout(("b.jsonl", "a.jsonl", "c/d.json"), ("a.jsonl", "b.jsonl", "c/d.json")),
    "no test among all": Layout(("a.jsonl",), "the split 'test'; it has train", "test"),
    "no test among splits": Layout(("train.jsonl", "dev.jsonl"), "it has train, validation", "test"),
    "dev is validation": Layout(("train.jsonl", "dev.jsonl"), ("dev.jsonl",), "validation"),
    "a word within a name": Layout(("my_train_set.jsonl", "strain.jsonl"), ("my_train_set.jsonl",)),
    "a folder by split": Layout(("train/a.jsonl", "train/b.jsonl", "test/a.jsonl"), ("train/a.jsonl", "train/b.jsonl")),
    "a folder wins over a file": Layout(("test/a.jsonl", "train.jsonl"), "it has test"),
    "a slice": Layout(("train.jsonl",), ("train.jsonl",), "train[:2]"),
    "a sum": Layout(("train.jsonl", "test.jsonl"), "expected a name, or a slice", "train+test"),
    "two formats": Layout(("train.jsonl", "train.csv"), "several formats"),
    "two kinds of JSON": Layout(("train.json", "train.jsonl"), ("train.json", "train.jsonl")),
    "packed": Layout(("train.jsonl.gz",), ("train.jsonl.gz",)),
    "both shards": Layout(SHARDS, SHARDS),
    "one shard of two": Layout(SHARDS[:1], "part 00001 is missing"),
    "shards of another split": Layout(("data/sft-00000-of-00001.jsonl",), ("data/sft-00000-of-00001.jsonl",), "sft"),
    "shards win over words": Layout((*SHARDS, "test.jsonl"), "it has train", "test"),
    "another format in another split": Layout(("train.jsonl", "test.csv"), "several formats"),
    "a script in the folder of a split": Layout(("train/make.py", "a.jsonl"), "no data files"),
    "capitals": Layout(("train.jsonl", "train.JSONL"), "several formats"),
    "notes beside data": Layout(("a.jsonl", "NOTES.md"), ("a.jsonl",)),
    "notes alone": Layout(("NOTES.md",), "several formats, or of one that lem does not read"),
    "a copy for later": Layout(("train.jsonl", "train.jsonl.bak"), "several formats"),
    "saved to disk": Layout(("data-00000-of-00001.arrow", "state.json", "dataset_info.json"), "several formats"),
    "hidden": Layout(("train.jsonl", ".cache/train.jsonl", "__old/train.jsonl"), ("train.jsonl",)),
    "an unknown subset": Layout(("train.jsonl",), "no subset 'nope'", subset="nope"),
    "nothing": Layout(("setup.py",), "no data files"),
    "a card": Layout(("main/train-1.jsonl", "main/test.jsonl", "x.jsonl"), ("main/train-1.jsonl",), card=CARD),
    "a card and half of its files": Layout(("main/train-1.jsonl",), "no data files for the split test", card=CARD),
    "a split of a card": Layout(("main/test.jsonl", "main/train-1.jsonl", "other/a.jsonl"), ("main/test.jsonl",),
                                "test", "main", CARD),
    "a subset of a card": Layout(("main/test.jsonl", "main/train-1.jsonl", "other/a.jsonl"), ("other/a.jsonl",),
                                 "train", "other", CARD),
    "no subset of a card": Layout(("main/train-1.jsonl",), "no subset 'nope'; it has main, other", subset="nope",
                                  card=CARD),
    "no split of a card": Layout(("main/train-1.jsonl", "main/test.jsonl"), "it has train, test", "validation",
                                 card=CARD),
    "no file of a card": Layout(("other/a.jsonl",), "no data files for the split train, test", card=CARD),
    "a card without a default": Layout(("main/train-1.jsonl",), "it has subsets: main, other",
                                       card=CARD.replace("  default: true\n", "")),
    "a card with other options": Layout(("main/train-1.jsonl",), "does not understand: data_dir: main",
                                        card=CARD.replace("  default: true", "  data_dir: main")),
    "a card in one line": Layout(("a.jsonl",), "does not understand", card="---\nconfigs: [{config_name: a}]\n---\n"),
    "a card with all folders": Layout(("a/b.jsonl", "main/test.jsonl", "main/train-1.jsonl"),
                                      ("a/b.jsonl", "main/test.jsonl", "main/train-1.jsonl"), subset="other",
                                      card=CARD.replace("other/*.jsonl", "'**/*.jsonl'")),
    "a card with the folder itself": Layout(("a.jsonl",), "does not understand",
                                            card=CARD.replace("other/*.jsonl", ".")),
    "a card that leads out": Layout(("a.jsonl",), "does not understand", card=CARD.replace("main/train-*", "../*")),
}  # fmt: skip


def lay_out(folder: Path, layout: Layout) -> None:
    for name in layout.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        row = name if ".txt" in name else f"prompt\n{name}" if name.endswith(".csv") else json.dumps({"prompt": name})
        (folder / name).write_bytes(gzip.compress(row.encode()) if name.endswith(".gz") else row.encode())
    if layout.card is not None:
        (folder / "README.md").write_text(layout.card)


def find(folder: Path, layout: Layout) -> tuple[str, ...]:
    files = find_files(DatasetChoice(str(folder), str(folder), layout.subset, layout.split, ()), {})
    return tuple(str(file.relative_to(folder)) for file in files)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_files_of_a_split_in_a_folder(tmp_path: Path, layout: Layout) -> None:
    lay_out(tmp_path, layout)
    if isinstance(layout.found, tuple):
        assert find(tmp_path, layout) == layout.found
        return
    with pytest.raises(EngineError) as caught:
        find(tmp_path, layout)
    assert layout.found in caught.value.message
    assert (caught.value.kind, caught.value.is_permanent) == ("prompts", True)


@pytest.mark.needs("datasets")
@pytest.mark.parametrize("layout", [item for item in LAYOUTS.values() if isinstance(item.found, tuple)])
def test_a_folder_that_is_read_is_read_as_by_the_datasets_package(tmp_path: Path, layout: Layout) -> None:
    import datasets

    folder = tmp_path / "set"
    lay_out(folder, layout)
    builder = datasets.load_dataset_builder(str(folder), layout.subset, cache_dir=str(tmp_path / "cache"))
    files = builder.config.data_files[layout.split.partition("[")[0]]
    assert sorted(str(Path(file).relative_to(folder)) for file in files) == sorted(find(folder, layout))


@pytest.mark.needs("datasets")
@pytest.mark.parametrize("split", ["train", "train[:2]", "train[-2:]", "train[4:99]", "train[:50%]", "train[10%:-20%]"])
def test_a_slice_has_the_rows_that_the_datasets_package_gives(tmp_path: Path, split: str) -> None:
    import datasets

    write_jsonl(tmp_path / "set" / "train.jsonl", ROWS)
    loaded = datasets.load_dataset(str(tmp_path / "set"), split=split, cache_dir=str(tmp_path / "cache"))
    found = resolve(tmp_path, {"dataset": {"name": "set", "split": split}})
    assert texts(found) == loaded["prompt"][:]
    assert found.source["split"] == split


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"name": "mine", "split": "test"}, "mine.jsonl: a single file has no split 'test'"),
        ("both", r"found .*both and .*both\.csv"),
        ({"name": "mmlu", "split": "validation"}, "a single file has no split 'validation'"),
    ],
)
def test_a_split_is_not_taken_from_a_file_that_may_be_another(tmp_path: Path, dataset: Any, message: str) -> None:
    for name in ("mine.jsonl", "both/train.jsonl", "both.csv", "mmlu.jsonl"):
        write_jsonl(tmp_path / name, ROWS)
    with pytest.raises(EngineError, match=message):
        resolve(tmp_path, {"dataset": dataset})
    assert len(resolve(tmp_path, {"dataset": {"name": "mine", "split": "train[:2]"}}).prompts) == 2


def test_a_name_that_is_too_long_for_a_file_is_none(tmp_path: Path) -> None:
    name = "n" * 300
    assert find_files(DatasetChoice(name, name, None, "train", ()), {DATASETS_VARIABLE: str(tmp_path)}) == ()


def test_a_data_set_may_be_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "mine.jsonl", ROWS)
    choice = DatasetChoice("~/mine.jsonl", "~/mine.jsonl", None, "train", ())
    assert find_files(choice, {}) == (tmp_path / "mine.jsonl",)


def test_rows_of_the_assistant_and_columns_with_the_answer_are_not_prompts(tmp_path: Path) -> None:
    turns = [{"role": role, "text": f"{role} {number}"} for number in range(3) for role in ("prompter", "assistant")]
    write_jsonl(tmp_path / "oasst.jsonl", turns)
    found = resolve(tmp_path, {"dataset": "oasst"})
    assert texts(found) == ["prompter 0", "prompter 1", "prompter 2"]
    assert found.warnings == (Reason.of("rows_skipped", name="oasst", skipped=3),)
    write_jsonl(
        tmp_path / "told.jsonl", [{"text": f"Q{number} A{number}", "output": f"A{number}"} for number in range(3)]
    )
    with pytest.raises(EngineError, match=r"not counting text, which ends with the answer\); it has output, text"):
        resolve(tmp_path, {"dataset": "told"})
    named = resolve(tmp_path, {"dataset": {"name": "told", "column": "text"}})
    assert texts(named)[0] == "Q0 A0"


def test_a_named_column_may_hold_messages_and_stands_alone(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    write_jsonl(tmp_path / "mine.jsonl", [{"chosen": chat, "question": "Which?", "choices": ["a", "b"]}])
    found = [resolve(tmp_path, {"dataset": {"name": "mine", "column": name}}) for name in ("chosen", "question")]
    assert [texts(item) for item in found] == [["Hi"], ["Which?"]]
    assert [item.source["taken_from"] for item in found] == [
        "chosen, up to the last user turn, joined without roles",
        "question",
    ]


def test_json_that_holds_lines_and_packed_files_are_read(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "lines.json", ROWS)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress((tmp_path / "lines.json").read_bytes()))
    for name in ("lines", "packed"):
        assert texts(resolve(tmp_path, {"dataset": name})) == [row["prompt"] for row in ROWS]


@pytest.mark.needs("datasets")
def test_a_parquet_file_that_is_replaced_under_the_same_time_stamp_gives_the_new_rows(tmp_path: Path) -> None:
    import datasets

    file = tmp_path / "mine.parquet"
    for text in ("old", "new"):
        datasets.Dataset.from_list([{"prompt": text}]).to_parquet(str(file))
        os.utime(file, (1, 1))
        assert texts(resolve(tmp_path, {"dataset": "mine"})) == [text]


@pytest.mark.needs("datasets")
def test_parquet_is_read_through_the_datasets_package(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "mine.parquet"))
    assert texts(resolve(tmp_path, {"dataset": "mine"})) == [row["prompt"] for row in ROWS]


HUB_NAME = "owner/name"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILE = "train.jsonl"
CONTENTS = {
    HUB_NAME: b'{"prompt": "first of the hub"}\n{"prompt": "second of the hub"}\n',
    "tatsu-lab/alpaca": b'{"instruction": "Add.", "input": "1, 2", "output": "3", "text": "Add. 1, 2 3"}\n',
}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of one as `datasets` asks: repositories with one file each, its commit, and 404 for the rest."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        name = next((name for name in CONTENTS if f"/{name}" in path), HUB_NAME)
        content = CONTENTS[name]
        entry = [{"type": "file", "path": FILE, "size": len(content), "oid": "a" * 40}]
        if path.startswith(f"/api/datasets/{name}/tree/{COMMIT}"):
            self._answer(200, json.dumps(entry).encode(), {"Content-Type": "application/json"})
        elif path.startswith(f"/api/datasets/{name}"):
            facts = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": FILE}], "tags": [], "private": False}
            self._answer(200, json.dumps(facts).encode(), {"Content-Type": "application/json"})
        elif path.startswith(f"/datasets/{name}/resolve/") and path.endswith(FILE):
            self._answer(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{"b" * 40}"'})
        else:
            code = "EntryNotFound" if name in path else "RepoNotFound"
            self._answer(404, b"{}", {"X-Error-Code": code, "Content-Type": "application/json"})

    do_HEAD = do_GET  # noqa: N815 (as http.server wants it)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def serving_hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


RESOLVE = """
import json, sys
from lem.config.experiment import (ExperimentConfig)
from lem.base.errors import EngineError
from lem.worker.datasets import resolve_dataset
try:
    found = resolve_dataset(ExperimentConfig.from_dict({"model": "any", "dataset": sys.argv[1]}), {}, {})
    answer = {"source": dict(found.source), "prompts": [item.prompt for item in found.prompts]}
except EngineError as error:
    answer = {"kind": error.kind, "is_permanent": error.is_permanent, "message": error.message, "hint": error.hint}
print(json.dumps(answer))
"""


# A command in a mount namespace of its own, in which its first argument is read-only.
READ_ONLY = (
    *("unshare", "--mount", "sh", "-c"),
    'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"',
)


def resolve_apart(name: str, home: Path, *before: str, **variables: str) -> dict[str, Any]:
    """What a Python of its own makes of a hub name: `datasets` reads its environment when it is imported."""
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HF_HOME": str(home), **variables}
    done = process.run([*before, sys.executable, "-c", RESOLVE, name], timeout_s=120, env=environ, cwd=home)
    assert done.code == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.needs("datasets")
def test_hub_data_set_is_recorded_with_its_commit_and_found_again_offline(tmp_path: Path) -> None:
    with serving_hub() as address:
        online = resolve_apart(HUB_NAME, tmp_path, HF_ENDPOINT=address)
    assert online["prompts"] == ["first of the hub", "second of the hub"]
    assert online["source"]["kind"] == "hub"
    assert online["source"]["revision"] == COMMIT
    assert online["source"]["count"] == 2
    assert resolve_apart(HUB_NAME, tmp_path, HF_HUB_OFFLINE="1") == online


@pytest.mark.needs("datasets")
@pytest.mark.parametrize("name", ["alpaca", "tatsu-lab/alpaca"])
def test_an_alias_means_the_same_by_its_name_on_the_hub(tmp_path: Path, name: str) -> None:
    with serving_hub() as address:
        found = resolve_apart(name, tmp_path, HF_ENDPOINT=address)
    assert found["prompts"] == ["Add.\n\n1, 2"]
    assert (found["source"]["kind"], found["source"]["taken_from"]) == ("hub", "instruction, input")


@pytest.mark.needs("datasets")
def test_a_data_set_is_read_from_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    if process.run([*READ_ONLY, str(tmp_path), "true"], timeout_s=10).code != 0:
        pytest.skip("needs the right to mount")
    read_only = (*READ_ONLY, str(tmp_path))
    with serving_hub() as address:
        online = resolve_apart(HUB_NAME, tmp_path, HF_ENDPOINT=address)
        assert resolve_apart(HUB_NAME, tmp_path, *read_only, HF_ENDPOINT=address) == online
    assert resolve_apart(HUB_NAME, tmp_path, *read_only, HF_HUB_OFFLINE="1") == online
    asked = {"HF_HUB_OFFLINE": "true", "LEM_MODEL_CACHE_READ_ONLY": "true"}
    absent = resolve_apart("owner/absent", tmp_path, *read_only, **asked)
    assert (absent["kind"], absent["is_permanent"]) == ("prompts", True)
    assert "LEM_MODEL_CACHE_READ_ONLY=false" in absent["hint"]


CHECK = """
import json, sys
from lem.config.experiment import (ExperimentConfig)
from lem.base.errors import EngineError
from lem.worker.datasets import check_dataset
found = []
for choice in json.loads(sys.argv[1]):
    try:
        check_dataset(ExperimentConfig.from_dict({"model": "any", **choice}), {}, {})
        found.append(None)
    except EngineError as error:
        found.append([error.is_permanent, error.message])
print(json.dumps(found))
"""


def check_apart(choices: Sequence[Any], home: Path, **variables: str) -> list[Any]:
    """For each choice None, or whether its error is permanent and what it says; in a process of its own."""
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HF_HOME": str(home), **variables}
    done = process.run([sys.executable, "-c", CHECK, json.dumps(choices)], timeout_s=120, env=environ, cwd=home)
    assert done.code == 0, done.stderr
    answer: list[Any] = json.loads(done.stdout)
    return answer


@pytest.mark.needs("datasets")
def test_a_check_looks_for_data_set_subset_and_split_without_the_rows(tmp_path: Path) -> None:
    choices = [
        {"dataset": HUB_NAME},
        {"dataset": {"name": HUB_NAME, "split": "train[:1]"}},
        {"dataset": {"name": HUB_NAME, "split": "train[:1]+train[1:]"}},
        {"dataset": {"name": HUB_NAME, "split": "test"}},
        {"prompts": {"type": "huggingface", "dataset": HUB_NAME, "subset": "other"}},
        {"dataset": "owner/missing"},
    ]
    with serving_hub() as address:
        *good, split, subset, missing = check_apart(choices, tmp_path, HF_ENDPOINT=address)
    assert good == [None, None, None]
    assert split == [True, f"data set {HUB_NAME} ({HUB_NAME}, split test): it has no split test; it has train"]
    assert ([subset[0], missing[0]], "other" in subset[1]) == ([True, True], True)
    assert not list(tmp_path.rglob("*.arrow"))
    assert check_apart(choices[:1], tmp_path, HF_HUB_OFFLINE="1")[0][0] is True  # it would fail the same way later


@pytest.mark.long
@pytest.mark.needs("datasets")
def test_a_hub_that_does_not_answer_is_no_proof_that_a_data_set_is_missing(tmp_path: Path) -> None:
    ((is_permanent, _),) = check_apart([{"dataset": HUB_NAME}], tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert not is_permanent


@pytest.mark.needs("datasets")
def test_a_data_set_the_hub_does_not_have_is_refused_for_good(tmp_path: Path) -> None:
    with serving_hub() as address:
        refused = resolve_apart("owner/missing", tmp_path, HF_ENDPOINT=address)
    assert (refused["kind"], refused["is_permanent"]) == ("prompts", True)
    assert "owner/missing" in refused["message"]
    assert DATASETS_VARIABLE in refused["hint"]
