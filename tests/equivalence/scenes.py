"""What both builds are made to do: scenes of files and command lines that run nothing."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.equivalence.builds import Build

CORPUS = Path(__file__).with_name("corpus.jsonl")

COMMANDS: tuple[tuple[str, ...], ...] = (
    (),
    *((name,) for name in ("campaign", "experiment", "status", "check", "results", "compare", "report", "presets")),
    *((name,) for name in ("datasets", "gpus", "doctor", "compose", "merge", "bundle", "completion", "worker")),
    *(("config", *action) for action in ((), ("validate",), ("show",), ("new",), ("schema",), ("fields",))),
    *(("results", action) for action in ("list", "show", "recompute", "export")),
    *(("bundle", action) for action in ("make", "verify")),
)
BACKENDS = ("pytorch", "vllm", "tensorrt")
PRESETS = ("quick-test", "benchmark", "none-of-this-name")

_EXPERIMENT = "model: gpt2\nprompts: {type: synthetic, input_tokens: 8, sample_size: 2}\n"
_CAMPAIGN = (
    "campaign_name: wide\nmodel: gpt2\n"
    "grid: {backends: [pytorch, vllm], shared: {max_output_tokens: [8, 16]}}\n"
    "experiments: [{config: e.yaml, overrides: {max_output_tokens: 4}}]\n"
)
_BLOCK = re.compile(r"^(?:<!-- file: (\S+) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Scene:
    """Files in an empty folder, and command lines that are run there one after the other.

    Attributes:
        files: by name: a text, `{"base64": …}`, or `{"copy": path}` of a file or folder.
        may_change: the outcome depends on this machine as it is now, so the old one is not kept.
    """

    name: str
    steps: tuple[tuple[str, ...], ...]
    files: Mapping[str, Any] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    may_change: bool = False

    @property
    def commands(self) -> tuple[str, ...]:
        """The command lines for people to read."""
        return tuple(" ".join(step) for step in self.steps)

    def to_json(self) -> str:
        """The scene as the driver reads it."""
        return json.dumps({"name": self.name, "steps": self.steps, "files": self.files, "environ": self.environ})


def static_scenes(old: Build) -> Iterator[Scene]:
    """Every scene that needs nothing but the program. Examples, pages and fuzz cases are those of the old tree."""
    yield from _plain_scenes()
    yield from _example_scenes(old.tree)
    yield from _documentation_scenes(old.tree)
    yield from _corpus_scenes()
    yield from _fuzz_scenes(old.tree)


def _plain_scenes() -> Iterator[Scene]:
    for words in COMMANDS:
        name = "-".join(words) or "lem"
        # A worker would run, and the other two tell of this machine as it is now.
        alone = () if words in {("worker",), ("doctor",), ("gpus",)} else (words,)
        yield Scene(f"help/{name}", ((*words, "--help"), (*words, "--no-such-option"), (*words, "--hepl"), *alone))
    unknown = (("campain", "x.yaml"), ("--version",), ("-q",), ("--cycles", "3"), ("status", "a", "b"))
    yield Scene("usage/unknown", unknown)
    missing: list[tuple[str, ...]] = [
        (*words, "none.yaml") for words in (("campaign",), ("experiment",), ("config", "validate"))
    ]
    missing += [("config", "show", "none.yaml"), ("campaign", "none.yaml", "--dry-run"), ("status", "none")]
    missing += [("check", "none"), ("results", "show", "none"), ("results", "list"), ("compare", "none"), ("status",)]
    missing += [("report", "none"), ("merge", "none", "--output", "out"), ("results", "export"), ("presets", "none")]
    missing += [("bundle", "verify", "none"), ("results", "recompute", "none"), ("completion", "tcsh")]
    yield Scene("usage/missing", tuple(missing))
    listings: list[tuple[str, ...]] = [("config", "schema", kind) for kind in ("campaign", "experiment")]
    for kind in ("campaign", "experiment"):
        listings += [("config", "fields", kind), ("config", "fields", kind, "--json"), ("config", "new", kind)]
        listings += [("config", "fields", kind, "--markdown"), ("config", "new", kind, "--backend", "none")]
        for backend in BACKENDS:
            listings += [
                ("config", "fields", kind, "--backend", backend),
                ("config", "new", kind, "--backend", backend),
            ]
    listings += [("config", "fields", "--json"), ("config", "fields"), ("config", "fields", "--markdown")]
    listings += [("presets",), ("presets", "--json"), ("datasets",), ("datasets", "--json"), ("compose",)]
    listings += [("presets", name, *more) for name in PRESETS for more in ((), ("--json",))]
    listings += [("completion", shell) for shell in ("bash", "zsh", "fish")]
    yield Scene("listings", tuple(listings))
    machine = (("gpus",), ("gpus", "--json"), ("doctor",), ("doctor", "--json"), ("doctor", "--backend", "vllm"))
    yield Scene("machine", machine, may_change=True)
    yield Scene("options", tuple(_option_steps()), {"c.yaml": _CAMPAIGN, "e.yaml": _EXPERIMENT})


def _option_steps() -> Iterator[tuple[str, ...]]:
    """Each option of a campaign and of an experiment, right and wrong."""
    values = {
        "--cycles": ("3", "0", "x", "21"),
        "--sample-size": ("4", "-1"),
        "--structure": ("shuffled", "grouped", "none"),
        "--seed": ("7", "x"),
        "--warmup-prompts": ("2", "-1"),
        "--warmup-timeout": ("1.5", "x"),
        "--config-gap": ("0", "-1", "1e3"),
        "--cycle-gap": ("3", "nan"),
        "--model": ("distilgpt2", ""),
        "--dataset": ("gsm8k", "none/of/this"),
        "--preset": PRESETS,
        "--results-dir": ("out", ""),
        "--until": ("ci=2%", "ci=2", "ci=1%:output_tok_per_s", "ci=1%:none", "x"),
        "--max-cycles": ("9", "1", "x"),
        "--budget": ("8h", "0s", "x"),
        "--shard": ("1/2", "2/2", "3/2", "x"),
        "--executor": ("local", "docker", "none"),
        "--python": ("/none/of/this/python",),
        "--set": ("execution.cycles=2", "execution.cycles=x", "x=1", "grid.shared.max_output_tokens=[1, 2]", "x"),
    }
    for option, choices in values.items():
        for choice in choices:
            local = () if option == "--executor" else ("--executor", "local")
            yield ("campaign", "c.yaml", "--dry-run", *local, option, choice)
            if option in ("--cycles", "--sample-size", "--warmup-prompts", "--warmup-timeout", "--model", "--set"):
                yield ("experiment", "e.yaml", "--dry-run", option, choice)
    files = ("campaign", "e.yaml", "--campaign-name", "x", "--dry-run", "--executor", "local")
    yield from (files, ("campaign", "e.yaml", "--dry-run"), ("campaign", "c.yaml", "e.yaml", "--dry-run"))
    for more in (("--resume",), ("--fresh",), ("--resume", "--fresh"), ("--until", "ci=2%"), ("--validate-only",)):
        yield ("campaign", "c.yaml", "--dry-run", "--executor", "local", *more)
    yield from (
        ("campaign", "c.yaml", "--dry-run", "--json", "--executor", "local"),
        ("campaign", "c.yaml", "-q", "--dry-run"),
    )
    yield ("experiment", "e.yaml", "--dry-run", "--json")
    yield ("config", "validate", "c.yaml", "e.yaml", "none.yaml", "--json")


def _example_scenes(tree: Path) -> Iterator[Scene]:
    for path in sorted((tree / "examples").glob("*.yaml")):
        files = {f"examples/{path.name}": path.read_text(encoding="utf-8")}
        steps = [step for variant in range(3) for step in _steps_of(f"examples/{path.name}", "campaign", (), variant)]
        yield Scene(f"examples/{path.stem}", tuple(steps), files)
    compose = {
        str(p.relative_to(tree)): p.read_text(encoding="utf-8") for p in sorted((tree / "docker").glob("*.y*ml"))
    }
    yield Scene("examples/docker", tuple(("config", "validate", name) for name in compose), compose)


def _documentation_scenes(tree: Path) -> Iterator[Scene]:
    """Every YAML block of the pages. Those with a name may use each other; one without gets the number of its place."""
    named: dict[str, str] = {}
    for page in (tree / "README.md", *sorted((tree / "docs").glob("*.md"))):
        for number, (name, language, text) in enumerate(_BLOCK.findall(page.read_text(encoding="utf-8"))):
            if name or language in ("yaml", "yml") or (not language and re.match(r"[a-z_]+:( |\n)", text)):
                named[name or f"{page.stem}-{number}.yaml"] = text
    for name, text in named.items():
        if name.endswith((".yaml", ".yml")):
            steps = [step for variant in range(3) for step in _steps_of(name, _kind_of(text), (), variant)]
            yield Scene(f"docs/{name}", tuple(steps), named)


def _kind_of(text: str) -> str:
    return "campaign" if "campaign_name" in text or re.search(r"^grid:", text, re.MULTILINE) else "experiment"


def _steps_of(file: str, kind: str, more: Sequence[str], variant: int = 0) -> Iterator[tuple[str, ...]]:
    """The commands that read a configuration file; of many files each third with one of the three sets."""
    json_option = ("--json",) if variant % 3 == 2 else ()
    yield ("config", "validate", file, *more, *(() if variant % 3 == 1 else ("--json",)))
    yield ("config", "show", file, *more, *json_option)
    if kind == "experiment":
        yield ("experiment", file, *more, "--dry-run", *json_option)
    elif variant % 3 != 1:
        yield ("campaign", file, *more, "--dry-run", "--executor", "local", *json_option)
    else:
        yield ("campaign", file, *more, "--validate-only", "--executor", "local")


def _corpus_scenes() -> Iterator[Scene]:
    """What the tests of the old commit configure: `{"file", "kind", "files", "more", "environ", "argv"}` a line."""
    for number, line in enumerate(CORPUS.read_text(encoding="utf-8").splitlines(), 1):
        item = json.loads(line)
        if "argv" in item:
            steps: Iterator[tuple[str, ...]] = iter((tuple(item["argv"]),))
        else:
            steps = _steps_of(item["file"], item["kind"], item.get("more", ()), number)
        yield Scene(f"corpus/{number}", tuple(steps), item["files"], item.get("environ", {}))


def _fuzz_scenes(tree: Path) -> Iterator[Scene]:
    neighbours = {"e.yaml": _EXPERIMENT, "base.yaml": "model: gpt2\nmax_input_tokens: 32\n", "p.txt": "one\ntwo\n"}
    for kind in ("campaign-yaml", "experiment-yaml", "yaml-text", "yaml-bytes", "named-yaml"):
        for path in sorted((tree / "tests" / "fuzz" / "cases" / kind).glob("*")):
            data = {"base64": base64.b64encode(path.read_bytes()).decode()}
            name = "e.yaml" if kind == "named-yaml" else "c.yaml"
            files = {"c.yaml": _CAMPAIGN, **neighbours, name: data}
            yield Scene(f"fuzz/{kind}/{path.name}", tuple(_steps_of("c.yaml", "campaign", ())), files)
    arguments = sorted((tree / "tests" / "fuzz" / "cases" / "arguments").glob("*"))
    steps = tuple(tuple(path.read_text(encoding="utf-8").split("\n")) for path in arguments)
    yield Scene("fuzz/arguments", steps, {"c.yaml": _CAMPAIGN, **neighbours})
