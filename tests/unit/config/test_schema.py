"""The JSON Schema: it accepts what lem accepts, and refuses what is wrong in one place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lem.base.errors import ConfigurationError
from lem.config import kinds
from lem.config.backends import BACKENDS, SECTIONS
from lem.config.campaign_config import CampaignConfig, CampaignGridConfig
from lem.config.experiment import ExperimentConfig
from lem.config.introspection import get_campaign_params, get_experiment_params, template
from lem.config.load import load_campaign
from lem.config.option import Section, VariantKind, check_partial, declared, walk
from lem.config.schema import document_schema
from tests.documentation import blocks, pages

EXAMPLES = Path(__file__).parents[3] / "examples"
SCHEMAS = {
    kind: document_schema(section, kind)
    for kind, section in (("campaign", CampaignConfig), ("experiment", ExperimentConfig))
}
VALIDATORS = {kind: jsonschema.Draft7Validator(schema) for kind, schema in SCHEMAS.items()}


def complaints(tree: Any, kind: str = "campaign") -> list[str]:
    return [f"{list(error.absolute_path)}: {error.message}" for error in VALIDATORS[kind].iter_errors(tree)]


def subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
        nested = [*schema.get("allOf", []), *schema.get("anyOf", []), *schema.get("oneOf", [])]
        for word in ("properties", "patternProperties", "definitions"):
            nested += schema.get(word, {}).values()
        words = ("items", "additionalProperties", "propertyNames", "contains", "not", "if", "then", "else")
        for part in [*nested, *(schema.get(word) for word in words)]:
            yield from subschemas(part)


KEYWORDS = {
    *(
        "$schema",
        "$id",
        "$ref",
        "title",
        "description",
        "default",
        "examples",
        "definitions",
        "type",
        "enum",
        "const",
        "pattern",
    ),
    *("properties", "patternProperties", "additionalProperties", "propertyNames", "required", "minProperties"),
    *("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "items", "contains", "minItems", "uniqueItems"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_the_schema_has_every_option_and_only_keywords_of_draft_7(kind: str) -> None:
    schema = SCHEMAS[kind]
    jsonschema.Draft7Validator.check_schema(schema)
    found = list(subschemas(schema))
    assert set().union(*found) <= KEYWORDS
    properties = {name for part in found for name in part.get("properties", {})}
    params = get_campaign_params() if kind == "campaign" else get_experiment_params()
    assert {name.rpartition(".")[2] for name in params} <= properties
    assert json.loads(json.dumps(schema, allow_nan=False)) == schema
    assert schema["$id"] == f"urn:lem-energy:schema:{kind}"


def test_every_reference_leads_to_a_definition() -> None:
    for schema in SCHEMAS.values():
        for part in subschemas(schema):
            node: Any = schema
            for name in part.get("$ref", "#").removeprefix("#").split("/")[1:]:
                node = node[name]
            assert node


def test_an_editor_can_show_what_an_option_does_and_its_default() -> None:
    option = SCHEMAS["experiment"]["properties"]["max_output_tokens"]
    assert option["description"] == "Tokens to generate at most. Unit: tokens."
    assert option["default"] == 128
    assert option["else"] == {"type": "integer", "minimum": 1}


def test_the_examples_the_templates_and_the_pages_satisfy_the_schema() -> None:
    texts = [path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.yaml")]
    texts += [template(kind, backend) for kind in SCHEMAS for backend in BACKENDS]
    texts += [block.text for page in pages() for block in blocks(page) if block.language == "yaml" and block.file]
    trees = [yaml.safe_load(text) for text in texts]
    checked = [complaints(tree, "campaign" if "campaign_name" in tree else "experiment") for tree in trees]
    assert len(checked) > 10
    assert [found for found in checked if found] == []


WRONG = """
grid.shared: {fp_precison: [float16]}
grid.shared: {batchsize: [1]}
grid.shared: {fp_precision: [float61]}
grid.shared: {decoder.preset: [nice]}
grid.shared: {decoder.temprature: [1]}
grid.shared: {max_output_tokens: []}
grid.shared: {max_output_tokens: [0]}
grid.shared: {max_output_tokens: "12"}
grid.shared: {model: [gpt2]}
grid.shared: {decoder: [{preset: nice}]}
grid.shared: {pytorch.batch_size: [1]}
grid.backend_overrides: {pytorch: {batch_size: [1]}}
grid.backend_overrides: {vllm: {max_num_seq: [1]}}
grid.backend_overrides: {vllm: {max_num_seqs: [one]}}
grid.backend_overrides: {vllm: {speculative.num_tokens: 0}}
grid.backend_overrides: {cuda: {}}
grid.models: []
grid.models: [{nam: gpt2}]
grid.backends: [cuda]
grid.backends: []
grid.backends: [vllm, vllm]
grid: {shared: {}}
execution: {cycels: 3}
execution: {cycles: 0}
execution: {cycles: 2.5}
execution: {cycles: "3"}
execution: {structure: sorted}
execution: {<<: {cycles: 3}}
<<: {num_samples: 3}
campaign_name: " "
campaign_name: null
num_samples: 0
schedule: {days: [mon]}
schedule: {at: "25:00"}
schedule: {at: "12:00", days: [monday]}
daemon: {interval: 6h}
io: {manifest_filename: a/b}
dataset: {sample_size: 5}
experiments: [{}]
experiments: [{overrides: {backend: vllm}}]
experiments: [{config: e.yaml, inline: {backend: vllm}}]
experiments: [{config: e.yaml, overrides: {decoder.presets: factual}}]
experiments: [{config: e.yaml, overrides: {decoder: {preset: nice}}}]
experiments: [{max_output_tokens: 5, max_tokens: 3}]
experiments: [{backend: vllm, pytorch: {batch_size: 1}}]
experiments: [{prompts: {type: synthetic}, dataset: alpaca}]
experiments: [{prompts: {type: huggingface}}]
experiments: [{prompts: 3}]
experiments: [{prompts: {input_tokens: 5}}]
experiments: [{traffic_simulation: {target_qps: 1}}]
experiments: [{gpus: [one]}]
experiments: [{model: gpt2, model_name: gpt2}]
""".strip().splitlines()


class NoMergeKeys(yaml.SafeLoader):
    """Takes `<<` as any other key, as YAML 1.2 does."""


NoMergeKeys.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def campaign_with(line: str) -> str:
    """The text of a campaign in which one option is as in the line."""
    key, _, value = line.partition(": ")
    lines = {"campaign_name": "c", "model": "gpt2", "grid": "{backends: [vllm]}"}
    of_grid = key.removeprefix("grid.")
    if of_grid != key:
        key, value = "grid", f"{{{'' if of_grid == 'backends' else 'backends: [vllm], '}{of_grid}: {value}}}"
    return "".join(f"{name}: {text}\n" for name, text in {**lines, key: value}.items())


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_is_refused_by_the_schema_and_by_lem(line: str, tmp_path: Path) -> None:
    text = campaign_with(line)
    assert complaints(yaml.load(text, NoMergeKeys))  # noqa: S506 - a SafeLoader
    (tmp_path / "e.yaml").write_text("model: gpt2\n", encoding="utf-8")
    with pytest.raises(ConfigurationError):
        load_campaign(written(tmp_path, text))


def written(folder: Path, text: str) -> Path:
    file = folder / "c.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    "text",
    [
        "_extends: base.yaml",
        "_extends: base.yaml\ngrid: {shared: {max_output_tokens: [5]}}\ndataset: {sample_size: 4}",
        "campaign_name: c\nconfigs: e.yaml",
        "campaign_name: c\ngrid: {backends: vllm, shared: {vllm.max_num_seqs: [1, 2], gpus: [0, [1]]}, models: gpt2}",
        "campaign_name: c\ngrid: {backends: '${B}', backend_overrides: {vllm: {extra.some.name: [1], extra: {a: []}}}}",
        "campaign_name: c\nexperiments: [{max_output_tokens: '${N:-5}', dataset: {sample_size: 5}, gpus: []}]",
        "campaign_name: c\nexperiments: [{config: e.yaml, overrides: {decoder.preset: factual, decoder: {top_k: 3}}}]",
        "campaign_name: c\nexperiments: [{prompts: a.txt}]\ngrid: {backends: vllm, shared: {prompts: [a.txt]}}",
        "campaign_name: c\nexperiments: [{inline: {model: {revision: main}}}]\nschedule: null\ngrid: null",
        "campaign_name: c\nconfigs: e.yaml\nexperiments: null\nexecution: null\ngrid: {backends: vllm, shared: null}",
    ],
)
def test_what_lem_accepts_satisfies_the_schema(text: str) -> None:
    assert complaints(yaml.safe_load(text)) == []


# Campaigns at random, from the declarations

UNKNOWN = "no_such_option"


def values(item: kinds.Option, kind: kinds.Kind) -> st.SearchStrategy[Any]:
    """What an option may have, or may be thought to have."""
    found: st.SearchStrategy[Any]
    match kind:
        case kinds.BoolKind():
            found = st.booleans()
        case kinds.NumberKind(type=of):
            low = item.bounds.get("minimum", item.bounds.get("exclusiveMinimum", -3))
            high = item.bounds.get("maximum", low + 9)
            found = st.integers(int(low), int(high)) if of is int else st.sampled_from([low, high, (low + high) / 2])
        case kinds.ChoiceKind():
            found = st.sampled_from(item.choices)
        case kinds.TextKind():
            found = st.sampled_from(["a", "12", "no", "GPU-1", "10GiB", "7h", "12:30", "https://a.example"])
        case kinds.ListKind():
            inner = values(item, kind.inner)
            return st.lists(inner, max_size=2) | inner if item.takes_scalar else st.lists(inner, max_size=2)
        case kinds.MapKind():
            return st.dictionaries(st.sampled_from(["a", "0", "cpu"]), values(item, kind.inner), max_size=2)
        case VariantKind():
            return st.one_of([parts(section) for section in kind.sections])
        case kinds.Kind(sections=(section,)):
            whole = parts(section)
            return whole if section.shorthand is None else whole | st.sampled_from(["gpt2", "alpaca"])
        case _:
            return st.sampled_from(["gpt2", 1, True, [1], {"a": 1}])
    valid = found.filter(lambda value: kind.read(value, (), kinds.Sink(CampaignConfig)) is not kinds.INVALID)
    return found | valid.map(referred)  # the schema cannot see what a reference means


def referred(value: Any) -> Any:
    """A reference that means the value: without quotes, as `safe_dump` writes it."""
    return f"${{V:-{json.dumps(value)}}}" if isinstance(value, (bool, int)) else value


def parts(section: type[Section], always: tuple[str, ...] = ()) -> st.SearchStrategy[dict[str, Any]]:
    """Some options of a section with what it requires, now and then with a key that it does not have."""
    options = {name: item for name, item in declared(section).items() if name != "configs"}
    required = [*always, *(name for name, item in options.items() if item.default is kinds.REQUIRED)]

    def chosen(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
        wanted = dict.fromkeys([*([section.switch] if section.switch and names else []), *names, *required])
        known = {name: option(section, options[name]) for name in wanted if name in options}
        return st.fixed_dictionaries({**known, **{name: st.just(1) for name in wanted if name not in options}})

    return st.lists(st.sampled_from([*options, UNKNOWN]), max_size=2, unique=True).flatmap(chosen)


def option(section: type[Section], item: kinds.Option) -> st.SearchStrategy[Any]:
    name = (section.__name__, item.name)
    if name == ("CampaignGridConfig", "shared"):
        return axes(ExperimentConfig)
    if name == ("CampaignGridConfig", "backend_overrides"):
        return st.sampled_from(BACKENDS).flatmap(lambda one: axes(SECTIONS[one]).map(lambda found: {one: found}))
    if name == ("CampaignConfig", "experiments"):
        return st.lists(parts(ExperimentConfig), max_size=1)
    found = values(item, item.kind)
    return found | st.none() if item.takes_null and item.name != "grid" else found


def axes(section: type[Section]) -> st.SearchStrategy[dict[str, Any]]:
    named = [(name, item) for name, item, _ in walk(section)]
    named.append((UNKNOWN, named[0][1]))

    def axis(chosen: tuple[str, kinds.Option]) -> st.SearchStrategy[dict[str, Any]]:
        name, item = chosen
        value = values(item, item.kind)
        return (value | st.lists(value, max_size=2)).map(lambda found: {name: found})

    return st.sampled_from(named).flatmap(axis)


CAMPAIGNS = parts(CampaignConfig, ("grid",)) | parts(CampaignConfig, ("experiments",))
SETTINGS = settings(deadline=None, max_examples=300, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def accepted_by_lem(tree: Any, folder: Path) -> bool:
    try:
        load_campaign(written(folder, yaml.safe_dump(tree, sort_keys=False)), environ={})
    except ConfigurationError:
        return False
    return True


@SETTINGS
@given(tree=CAMPAIGNS)
def test_every_campaign_that_lem_accepts_satisfies_the_schema(tree: Any, tmp_path_factory: Any) -> None:
    if accepted_by_lem(tree, tmp_path_factory.getbasetemp()):
        assert complaints(tree) == []


@SETTINGS
@given(tree=CAMPAIGNS)
def test_lem_accepts_each_option_of_a_campaign_that_satisfies_the_schema(tree: Any) -> None:
    """Only rules between options are left to lem."""
    if complaints(tree) == []:
        read = plain_values(tree)
        CampaignGridConfig.from_dict(read.pop("grid", None) or {"backends": ["vllm"]})
        for experiment in read.pop("experiments", None) or ():
            assert check_partial(ExperimentConfig, experiment) == ()
        assert check_partial(CampaignConfig, read) == ()


def plain_values(tree: Any) -> Any:
    """The tree with what its references mean."""
    text = re.sub(r"\$\{V:-([^}]*)\}", r"\1", yaml.safe_dump(tree, sort_keys=False))
    return yaml.safe_load(text)
