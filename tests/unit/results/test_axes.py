"""How configurations are numbered, told apart and named."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from lem.base.doc import text_width
from lem.base.errors import UserError
from lem.results.along import compare_along
from lem.results.axes import Key, find_axes, headline_settings, settings_of, settings_without_record, shared_settings
from lem.results.comparability import share_workload, workload_of
from lem.results.compare import compare_configurations
from lem.results.comparison import comparison_document, render_text
from lem.results.configurations import ListedConfiguration, numbers_of, read_listing, read_numbered, write_listing
from lem.results.metrics import METRIC_BY_NAME
from lem.results.run import Run, make_run
from lem.results.table import render_run
from tests.records import make_gpu, make_record
from tests.synthetic_campaign import Campaign, Configuration

ENERGY = METRIC_BY_NAME["energy_per_output_tok_j"]
MODELS = {"HuggingFaceTB/SmolLM2-135M-Instruct": 0.01, "Qwen/Qwen2.5-0.5B-Instruct": 0.03}
SETTINGS = [
    {"backend": "pytorch", "engine": "transformers 5", "model": "org/large", "pytorch.batch_size": "1"},
    {"backend": "pytorch", "engine": "transformers 5", "model": "org/large", "pytorch.batch_size": "16"},
    {"backend": "vllm", "engine": "vllm 0.32", "model": "org/large", "max_tokens": "8"},
]


@pytest.mark.parametrize(
    ("cells", "headings"),
    [
        # Both, or images of which two have the same engine: engines are no axis of their own.
        ("vllm a v1, vllm b v2, pytorch a t1, pytorch b t2", ["backend", "image"]),
        ("vllm a v1, vllm b v1, vllm c v2", ["image"]),
        ("vllm a v1, vllm a v2", ["engine"]),
        ("vllm a v1, vllm b v2, vllm b v3", ["engine", "image"]),
    ],
)
def test_an_engine_that_backend_and_image_decide_is_no_axis(cells: str, headings: list[str]) -> None:
    names = ("backend", "image", "engine")
    found = find_axes([dict(zip(names, cell.split(), strict=True)) for cell in cells.split(", ")])
    assert sorted(axis.heading for axis in found) == headings


def test_images_are_compared_where_backends_vary_too() -> None:
    records = []
    cells = itertools.product(range(3), enumerate(itertools.product(("vllm", "pytorch"), ("org/e:1", "org/e:2"))))
    for cycle, (place, (backend, image)) in cells:
        requested = {"backend": backend, "image": image}
        found = make_record(config_name=f"{backend} {image}", cycle=cycle, order=4 * cycle + place, requested=requested)
        identity = dataclasses.replace(found.identity, backend=backend)
        environment = dataclasses.replace(found.environment, engine_version=f"{backend}-{image[-1]}")
        records.append(dataclasses.replace(found, identity=identity, environment=environment))
    (pair,) = compare_along(make_run(records), "image", None).pairs
    assert (pair.baseline.name, pair.other.name) == ("image=e:1", "image=e:2")


def grid() -> Campaign:
    """Two hub models, two precisions, two batch sizes, two output lengths: 16 configurations with long names."""
    cells = itertools.product(MODELS, ("float16", "bfloat16"), (1, 16), (64, 256))
    return Campaign(
        tuple(
            Configuration(
                f"pytorch-{model.rpartition('/')[2]}-{precision}-batch_size={batch}-max_output_tokens={length}",
                backend="pytorch",
                model=model,
                precision=precision,
                batch_size=batch,
                options={"max_output_tokens": length},
                energy_per_output_tok_j=MODELS[model] * (0.25 if batch == 16 else 1) * (0.9 if length == 256 else 1),
                output_tok_per_s=900 * (4 if batch == 16 else 1),
                ttft_s=0.05,
            )
            for model, precision, batch, length in cells
        ),
        has_samples=False,
        structure="shuffled",
    )


@pytest.fixture(scope="module")
def run() -> Run:
    campaign = grid()
    return make_run(campaign.records(), numbered=tuple(map(campaign.hash_of, campaign.configurations)))


def test_a_comparison_of_16_configurations_of_two_models_fits_a_screen(run: Run) -> None:
    first, *others = run.configurations
    lines = render_text(compare_configurations(run, first, others)).splitlines()
    assert len(lines) <= 40
    assert max(map(text_width, lines)) <= 80
    text = "\n".join(lines)
    rows = [line.split() for line in lines if line.split(" ")[0].isdigit() and line[:4] != "95 %"]
    assert [int(row[0]) for row in rows] == list(range(1, 17))
    assert sum(text.count(model.rpartition("/")[2]) for model in MODELS) <= 5  # long values are not in every row
    assert "HuggingFaceTB" not in text
    assert {"J/tok", "tok/s", "TTFT", "E2E"} <= set(text.split())
    assert next(line.split() for line in lines if line[:2] == "3 ") == [
        "3", "64", "16", "0.002492", "0.25", "0.24–0.26", "3.98", "~", "1.00", "~", "1.00",
    ]  # fmt: skip


def test_a_wide_terminal_shows_more_of_each_metric(run: Run) -> None:
    first, *others = run.configurations
    narrow, wide = (render_text(compare_configurations(run, first, others), width=width) for width in (80, 120))
    assert max(map(text_width, wide.splitlines())) <= 120
    assert narrow.count("t interval") <= wide.count("t interval")
    assert "<0.001" in wide


def test_a_table_of_results_names_the_axes_in_its_columns(run: Run) -> None:
    lines = render_run(run).splitlines()
    assert max(map(text_width, lines)) <= 80
    assert next(line.split()[:5] for line in lines if line[:3] == "16 ") == ["16", "bfloat16", "256", "16", "5"]
    assert lines.count("model=SmolLM2-135M-Instruct") == 1


def test_along_an_axis_every_value_gets_one_verdict_over_all_others(run: Run) -> None:
    comparison = compare_along(run, "batch_size", None)
    (pair,) = comparison.pairs
    assert (pair.baseline.name, pair.other.name) == ("batch_size=1", "batch_size=16")
    row = next(row for row in pair.rows if row.metric is ENERGY)
    assert row.effect is not None
    assert row.effect.ratio == pytest.approx(0.25, rel=0.02)
    assert row.effect.df == 4
    assert comparison.along is not None
    assert comparison.along.held == ("model", "precision", "max_output_tokens")
    document = comparison_document(comparison)
    held = ["model", "precision", "max_output_tokens"]
    assert document["along"] == {"axis": "batch_size", "held_equal": held, "with_it": [], "left_out": []}
    assert document["pairs"][0]["other"]["members"] == [3, 4, 7, 8, 11, 12, 15, 16]
    text = " ".join(render_text(comparison).split())
    assert "batch_size=16 uses 0.2" in text
    assert "along batch_size, held equal: model, precision, max_output_tokens" in text


def test_what_has_no_counterpart_is_left_out_and_named(run: Run) -> None:
    lost = {item.name for item in run.configurations if item.number in (1, 4)}
    rest = make_run([record for record in run.records if record.identity.config_name not in lost])
    comparison = compare_along(rest, "batch_size", "16")
    (pair,) = comparison.pairs
    assert (pair.baseline.name, len(pair.other.cycles)) == ("batch_size=16", 5)
    assert comparison.along is not None
    assert [text.partition(":")[0] for text in comparison.along.alone] == ["without a counterpart (batch_size=1)"]
    row = next(row for row in pair.rows if row.metric is ENERGY)
    assert row.effect is not None
    assert row.effect.ratio == pytest.approx(4, rel=0.02)


def test_three_values_of_an_axis_fit_the_screen_with_their_long_heading() -> None:
    cells = [
        Configuration(
            f"{size}", batch_size=size, energy_per_output_tok_j=0.4 / size, output_tok_per_s=500 * size, ttft_s=1
        )
        for size in (1, 4, 16)
    ]
    comparison = compare_along(make_run(Campaign(tuple(cells), has_samples=False).records()), "max_num_seqs", "4")
    assert [pair.other.name for pair in comparison.pairs] == ["max_num_seqs=1", "max_num_seqs=16"]
    lines = render_text(comparison).splitlines()
    assert max(map(text_width, lines)) <= 80
    assert [line.split()[0] for line in lines if line[:2] in ("4 ", "1 ", "16")] == ["4", "1", "16"]


def test_an_option_of_one_backend_does_not_keep_backends_apart() -> None:
    cells = [
        Configuration(f"{backend}-{length}", backend=backend, energy_per_output_tok_j=joules, options=options)
        for backend, joules, own in (("pytorch", 0.5, {}), ("vllm", 0.2, {"vllm": {"enforce_eager": True}}))
        for length, options in ((32, {"max_output_tokens": 32, **own}), (64, {"max_output_tokens": 64, **own}))
    ]
    comparison = compare_along(make_run(Campaign(tuple(cells), has_samples=False).records()), "backend", None)
    assert comparison.along is not None
    assert (comparison.along.held, comparison.along.with_it) == (("max_output_tokens",), ("enforce_eager",))
    assert "along backend with enforce_eager, held equal: max_output_tokens" in render_text(comparison)
    assert comparison.along.alone == ()


def test_a_cycle_that_one_configuration_lost_is_no_pair_along_an_axis() -> None:
    cells = [Configuration(f"{size}-{length}", batch_size=size, options={"max_output_tokens": length},
                           failed_cycles=(2,) if (size, length) == (8, 64) else ())
             for size in (1, 8) for length in (32, 64)]  # fmt: skip
    comparison = compare_along(make_run(Campaign(tuple(cells), has_samples=False).records()), "max_num_seqs", None)
    row = next(row for row in comparison.pairs[0].rows if row.metric is ENERGY)
    assert row.effect is not None
    assert row.effect.n_cycles == (4,)


@pytest.mark.parametrize(
    ("name", "first", "message"),
    [("batch", None, "no axis 'batch'"), ("batch_size", "9", "no configuration has batch_size=9")],
)
def test_an_axis_or_value_that_is_not_there_is_refused(name: str, first: str | None, message: str, run: Run) -> None:
    with pytest.raises(UserError, match=message):
        compare_along(run, name, first)


@pytest.mark.parametrize(
    ("wanted", "number"),
    [
        ("7", 7),
        ("model=SmolLM2-135M-Instruct,precision=bfloat16,batch_size=16,max_output_tokens=64", 7),
        ("fp_precision=bfloat16,model.name=HuggingFaceTB/SmolLM2-135M-Instruct,batch_size=16,max_output_tokens=64", 7),
        ("SmolLM2-135M-Instruct-bfloat16-batch_size=16-max_output_tokens=64", 7),
    ],
)
def test_a_configuration_is_named_by_number_settings_or_part_of_its_name(wanted: str, number: int, run: Run) -> None:
    assert run.select(wanted).number == number


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("batch_size=16", r"ambiguous: 3 pytorch-Smol.* 16 |ambiguous: 3 pytorch-Smol.*and \d more"),
        ("Qwen", "ambiguous: 9 "),
        ("17", "has no configuration '17'"),
        ("batch_size=2", "has no configuration 'batch_size=2'"),
    ],
)
def test_a_name_of_several_or_none_lists_the_candidates(wanted: str, message: str, run: Run) -> None:
    with pytest.raises(UserError, match=message):
        run.select(wanted)


def test_settings_are_those_of_the_heading_then_the_options_given() -> None:
    record = make_record(
        requested={
            "model": {"name": "m"},
            "backend": "pytorch",
            "fp_precision": "float16",
            "max_output_tokens": 32,
            "config_name": "x",
            "extra_metadata": {"note": "n"},
            "pytorch": {"batch_size": 1, "compile": {"enabled": True}, "devices": [0, 1], "none": None},
        }
    )
    assert settings_of(record) == {
        "backend": "pytorch",
        "model": "tiny-llama",
        "precision": "float16",
        "device": "cpu",
        "traffic": "closed batch",
        "engine": "transformers 5.23.0",
        "max_output_tokens": "32",
        "pytorch.batch_size": "1",
        "pytorch.compile.enabled": "true",
        "pytorch.devices": "0, 1",
        "pytorch.none": "null",
    }


def test_what_changes_no_number_is_no_setting() -> None:
    requested = {
        "measurement": {"price_per_kwh": 0.3, "pue": 1.2, "min_window_sec": 5},
        "baseline": {"cache_ttl_sec": 9},
        "warmup": {"timeout_seconds": 9, "min_prompts": 4},
    }
    expected = {"measurement.min_window_sec": "5", "warmup.min_prompts": "4"}
    given = settings_of(make_record(requested=requested)).items() - settings_of(make_record(requested={})).items()
    assert dict(given) == expected


def test_a_configuration_without_a_record_has_the_settings_of_the_others() -> None:
    pytorch = {"backend": "pytorch", "precision": "float16", "engine": "transformers 5", "pytorch.batch_size": "1"}
    vllm = {"backend": "vllm", "precision": "float16", "engine": "vllm 1", "vllm.max_num_seqs": "1"}
    options = {"backend": "pytorch", "fp_precision": "bfloat16", "pytorch": {"batch_size": 8}, "config_name": "x"}
    assert settings_without_record(options, [pytorch, vllm]) == {
        "backend": "pytorch",
        "precision": "bfloat16",
        "engine": "transformers 5",
        "pytorch.batch_size": "8",
    }
    assert settings_without_record(options, []) == {}


def test_gpus_of_one_kind_are_counted_and_models_are_short() -> None:
    record = dataclasses.replace(make_record(), gpus=(make_gpu(), make_gpu()))
    assert settings_of(record)["GPU"] == "2 × H200"
    assert "GPU" not in settings_of(make_record())
    assert headline_settings(make_record(model="org/model"))["model"] == "org/model"
    assert headline_settings(make_record(model="./here/model"))["model"] == "model"


def test_what_all_have_is_shared_and_the_rest_differs() -> None:
    one, other = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "d": "4"}
    assert shared_settings([one, other]) == {"a": "1"}
    found = {axis.label: axis.values for axis in find_axes([one, other])}
    assert found == {"b": ("2", "9"), "c": ("3", "–"), "d": ("–", "4")}
    assert shared_settings([]) == {}
    assert find_axes([]) == ()


def test_what_follows_from_another_setting_is_no_axis_and_headings_are_short() -> None:
    axes = find_axes(SETTINGS)
    assert [(axis.heading, axis.values) for axis in axes] == [
        ("backend", ("pytorch", "pytorch", "vllm")),
        ("batch_size", ("1", "16", "–")),
        ("max_tokens", ("–", "–", "8")),
    ]


def test_names_are_shown_where_they_were_given_or_nothing_else_differs() -> None:
    (given,) = Key(["1", "2"], SETTINGS[:2], ["slow", "fast"]).axis_tables(80)
    assert [column.cells for column in given.columns] == [("slow", "fast"), ("1", "16")]
    (made,) = Key(["1", "2"], SETTINGS[:2], ["a-batch_size=1", "a-batch_size=16"]).axis_tables(80)
    assert [column.cells for column in made.columns] == [("1", "16")]
    (same,) = Key(["1", "2"], SETTINGS[:1] * 2, ["x=1 @ a", "x=1 @ b"]).axis_tables(80)
    assert [column.cells for column in same.columns] == [("x=1 @ a", "x=1 @ b")]


def test_known_configurations_keep_their_numbers_and_new_ones_follow(tmp_path: Path) -> None:
    one, two, new = (ListedConfiguration(digest, name) for digest, name in (("a", "one"), ("b", "two"), ("c", "new")))
    write_listing(tmp_path, [one, two])
    write_listing(tmp_path, [new, two])
    assert read_numbered(tmp_path) == ("a", "b", "c")
    known = [("b", "two"), ("", "new"), ("d", "unknown"), ("b", "on another host"), ("", "failed")]
    assert numbers_of(read_numbered(tmp_path), read_listing(tmp_path), known) == [2, 3, 4, 5, 6]
    assert read_numbered(tmp_path / "none") == ()


def test_a_workload_is_prompts_lengths_and_traffic() -> None:
    one, longer = make_record(), make_record(n_requests=4)
    loaded = make_record(requested={"traffic_simulation": {"target_qps": 2, "slo": {"ttft_s": 1}}})
    same = make_record(requested={"traffic_simulation": {"target_qps": 2}})
    assert share_workload([one], [make_record(cycle=1)])
    assert not share_workload([one], [longer])
    assert not share_workload([one], [loaded])
    assert share_workload([loaded], [same])
    assert workload_of(loaded) == "closed batch, target_qps 2, 125 tokens per answer"
