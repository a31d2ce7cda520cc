"""No shell, no code out of data, and no name out of a file that leads out of a folder."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lem.base.errors import UserError
from lem.config.campaign_config import CampaignConfig
from lem.config.kinds import ConfigProblems
from lem.orchestration.grid import file_stem
from lem.results.store import Repository, experiment_folder_name
from tests.command_rig import run_lem
from tests.synthetic_campaign import Campaign, Configuration, Written

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for folder in ("lem", "lem.pyz-build", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]
FLEET = [path for folder in ("playbooks", "roles", "inventory") for path in sorted((ROOT / folder).rglob("*.yml"))]

# Calls that give text to a shell, or make code or objects of it.
FORBIDDEN_CALLS = frozenset(
    {
        "compile", "eval", "exec", "__import__",
        "os.system", "os.popen", "os.execl", "os.execlp", "os.spawnl", "os.spawnlp", "os.startfile", "pty.spawn",
        "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell",
        "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "dill.load",
        "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader", "yaml.FullLoader",
        "yaml.UnsafeLoader", "torch.load", "joblib.load", "tempfile.mktemp",
    }
)  # fmt: skip
SHELLS = frozenset({"sh", "bash", "dash", "zsh", "/bin/sh", "/bin/bash", "/usr/bin/sh", "/usr/bin/bash"})
ESCAPES = ("../out", "/tmp/out", "..", ".", "", "a/b", "a\\b", "a\0b", "-rf", ".hidden", "a\nb", "~", "x" * 300, "é")


def dangers_in(source: str) -> Iterator[str]:
    """What a source text does that could run a shell, or code out of data."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS:
                yield f"line {node.lineno}: {name}"
            for keyword in node.keywords:
                if keyword.arg == "shell" and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value):
                    yield f"line {node.lineno}: shell="
        if isinstance(node, (ast.List, ast.Tuple)) and len(node.elts) > 1:
            words = [item.value if isinstance(item, ast.Constant) else None for item in node.elts]
            if words[0] in SHELLS and isinstance(words[1], str) and words[1].startswith("-"):
                yield f"line {node.lineno}: {words[0]} {words[1]}"


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.system('ls')",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=is_windows)",
        "run(['sh', '-c', text])",
        "run(('/bin/bash', '-lc', text))",
        "yaml.load(text)",
        "torch.load(path)",
        "eval(text)",
    ],
)
def test_a_danger_is_seen(source: str) -> None:
    assert list(dangers_in(source))


# `__init__` from the names of fields, and the types of these, as in the standard library; and lem's own modules,
# in lem.pyz and compiled by it for this user, which nobody else can write (tests/unit/test_importer.py).
MADE_OF_NAMES_AND_CHECKED_CODE = {
    "lem.pyz-build/entry.py": ["exec"],
    "lem/base/dataclass.py": ["eval", "exec"],
    "lem/base/importer.py": ["marshal.loads", "marshal.loads"],
}


def test_nothing_runs_a_shell_or_makes_code_of_data() -> None:
    found = {str(path.relative_to(ROOT)): list(dangers_in(path.read_text(encoding="utf-8"))) for path in SOURCES}
    dangers = {name: [line.split(": ")[1] for line in lines] for name, lines in found.items() if lines}
    assert dangers == MADE_OF_NAMES_AND_CHECKED_CODE


def tasks_in(node: Any) -> Iterator[dict[str, Any]]:
    """Every task of a playbook or role, those in blocks and plays among them."""
    if isinstance(node, list):
        for item in node:
            yield from tasks_in(item)
    elif isinstance(node, dict):
        yield node
        for key in ("tasks", "pre_tasks", "post_tasks", "handlers", "block", "rescue", "always"):
            yield from tasks_in(node.get(key))


# A slug, as the first task of the role lem_campaign asserts.
CHECKED = "lem_campaign_name"
RAW = "ansible.builtin.raw"  # costs a host far less CPU than `command`


def test_the_fleet_quotes_what_it_runs_in_a_shell() -> None:
    lines = [(path.name, line) for path in FLEET for line in path.read_text(encoding="utf-8").splitlines()]
    modules = ("ansible.builtin.shell:", "ansible.builtin.expect:")
    assert [item for item in lines if item[1].strip().startswith(modules)] == []

    variables: dict[str, Any] = {}
    for path in FLEET:
        if path.parent.name == "vars":
            variables |= read_yaml(path)
    files = [path for path in FLEET if path.parent.name in ("tasks", "handlers", "playbooks")]
    words = [task[RAW] for path in files for task in tasks_in(read_yaml(path)) if RAW in task]
    filled = [item.strip() for text in words for item in re.findall(r"\{\{(.*?)\}\}", text, re.DOTALL)]
    assert filled
    assert [item for item in filled if "quote" not in str(variables.get(item, item)) and item != CHECKED] == []


def shows_secrets(task: dict[str, Any]) -> bool:
    """Whether Ansible would print values of secrets with the task's result."""
    own = {name: value for name, value in task.items() if name not in ("when", "block", "rescue", "always", "tasks")}
    return "lem_campaign_secrets" in str(own) and own.get("no_log") is not True


def test_the_fleet_prints_no_secret_and_writes_none_into_a_unit() -> None:
    files = [path for path in FLEET if path.parent.name in ("tasks", "handlers", "playbooks")]
    tasks = [task for path in files for task in tasks_in(read_yaml(path))]
    named = [task for task in tasks if "lem_campaign_secrets" in str(task)]
    assert named
    assert [task.get("name") for task in tasks if shows_secrets(task)] == []
    for path in sorted((ROOT / "roles").rglob("*.j2")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if "lem_campaign_secrets" in line:  # names alone, for systemd to load the values itself
                assert re.fullmatch(r"\{% for name in lem_campaign_secrets \| sort %\}", line), (path, line)


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


# Names


@pytest.mark.parametrize("name", [*ESCAPES, "../../etc/cron.d/x"])
def test_a_campaign_is_called_by_a_slug_or_refused(name: str) -> None:
    grid = {"backends": ["pytorch"]}
    try:
        campaign = CampaignConfig.from_dict({"campaign_name": name, "model": "gpt2", "grid": grid})
    except ConfigProblems:
        return
    assert set(campaign.slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-")
    assert campaign.slug[0] not in "-_."


@pytest.mark.parametrize("name", ESCAPES)
def test_a_configuration_is_a_file_in_its_folder(name: str) -> None:
    stem = file_stem(name)
    assert Path("folder", f"{stem}.yaml").resolve().parent == Path("folder").resolve()
    assert not stem.startswith((".", "-"))


@pytest.mark.parametrize("name", ESCAPES)
def test_a_run_an_experiment_and_a_host_are_folders_in_their_place_or_refused(tmp_path: Path, name: str) -> None:
    repository = Repository(tmp_path / "results", "demo")
    for attempt in (
        lambda: Repository(tmp_path / "results", name),
        lambda: repository.prepare_attempt(name, "e"),
        lambda: repository.prepare_attempt("r", name),
        lambda: repository.find_attempts("r", name),
        lambda: repository.scan(name),
    ):
        with pytest.raises(UserError, match="cannot be used as a folder name"):
            attempt()
    if "/" in name or "\0" in name or "\n" in name:
        with pytest.raises(UserError, match="cannot be used as a folder name"):
            experiment_folder_name("e", name)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Written:
    """A campaign in a folder deep enough that a way out of it shows; the folder is where commands are run."""
    folder = tmp_path / "a" / "b" / "here"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return Campaign((Configuration("one", backend="pytorch"),), cycles=2, has_samples=False).write(Path())


def lem(*words: str) -> tuple[int, str]:
    code, out, err = run_lem(*words)
    return code, out + err


def names_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("field", ["exp_id", "config_name", "config_path", "campaign_name", "run_id"])
@pytest.mark.parametrize("name", ["../../../out", "/tmp/lem-out-of-folder", "a/../../../out"])
def test_a_hostile_manifest_leads_nowhere(written: Written, tmp_path: Path, field: str, name: str) -> None:
    document = json.loads(written.manifest_path.read_text())
    if field in document:
        document[field] = name
    else:
        document["experiments"][0][field] = name
        document["experiments"][0]["status"] = "pending"
    written.manifest_path.write_text(json.dumps(document))
    grid = {"backends": ["pytorch"], "shared": {"max_output_tokens": [8]}}
    Path("c.yaml").write_text(json.dumps({"campaign_name": "demo", "model": "gpt2", "grid": grid}))
    before = names_below(tmp_path)
    for words in (
        ("status", "demo"),
        ("status", "--json"),
        ("campaign", "c.yaml", "--resume", "--dry-run", "--executor", "local"),
        ("campaign", "c.yaml", "--resume", "--yes", "--executor", "local", "--python", "/nonexistent/python"),
    ):
        code, said = lem(*words)
        assert code in (0, 1, 2), said
    appeared = names_below(tmp_path) - before
    inside = ("a/b/here/results/demo", "a/b/here/.state/demo", "a/b/here/configs/demo", "a/b/here/configs")
    assert {path for path in appeared if not path.startswith(inside)} == set()
    assert not Path("/tmp/lem-out-of-folder").exists()


@pytest.mark.parametrize("field", ["host", "run_id", "experiment_id", "campaign_name", "config_name"])
@pytest.mark.parametrize("name", ["../../../out", "/tmp/lem-out-of-folder"])
def test_a_hostile_result_is_merged_nowhere_else(written: Written, tmp_path: Path, field: str, name: str) -> None:
    for path in sorted(written.results_dir.rglob("result.json")):
        document = json.loads(path.read_text())
        document["identity"][field] = name
        path.write_text(json.dumps(document))
    before = names_below(tmp_path)
    code, said = lem("merge", "results", "--output", "merged")
    assert code in (0, 1, 2), said
    appeared = {path for path in names_below(tmp_path) - before if not path.startswith("a/b/here/merged")}
    assert appeared <= {f"a/b/here/results/demo/{written.run_id}/index.jsonl"}
    assert not Path("/tmp/lem-out-of-folder").exists()


def test_a_link_in_results_is_not_followed_into_a_merge(written: Written) -> None:
    Path("secret.txt").write_text("canary")
    (attempt := next(written.results_dir.rglob("attempt-1"))).joinpath("log.txt").unlink()
    attempt.joinpath("log.txt").symlink_to(Path("secret.txt").resolve())
    assert lem("merge", "results", "--output", "merged")[0] == 0
    assert "canary" not in "".join(path.read_text() for path in Path("merged").rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "words",
    [("results", "export", "demo", "-o", "results"), ("report", "demo", "-o", "results"), ("report", "../demo")],
)
def test_a_file_to_write_is_what_was_named_or_an_error(written: Written, words: tuple[str, ...]) -> None:
    code, said = lem(*words)
    assert code == 2, said
    assert written.results_dir.is_dir()


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "</svg></style>"])
def test_a_hostile_name_is_text_on_the_page(written: Written, text: str) -> None:
    for path in sorted(written.results_dir.rglob("result.json")):
        document = json.loads(path.read_text())
        document["identity"] |= {"config_name": text, "model": text, "host": text, "campaign_name": text}
        document["environment"]["engine_version"] = text
        document["validity"]["warnings"] = [text]
        path.write_text(json.dumps(document))
    assert lem("report", "demo", "-o", "report.html")[0] == 0
    assert text not in Path("report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("start", ["=1+1", "+1", "-1+x", "@x", "\t=1", "\r=1"])
def test_a_spreadsheet_is_given_no_formula(written: Written, start: str) -> None:
    for path in sorted(written.results_dir.rglob("result.json")):
        document = json.loads(path.read_text())
        document["identity"]["config_name"] = start
        path.write_text(json.dumps(document))
    code, said = lem("results", "export", "demo", "--columns", "config_name")
    assert code == 0, said
    cells = said.split("\n")[1:-1]
    assert cells
    assert not [cell for cell in cells if cell.lstrip('"').startswith(("=", "+", "-", "@", "\t", "\r"))]


def test_control_characters_of_files_do_not_reach_the_terminal(written: Written) -> None:
    hostile = "\x1b]0;owned\x07\x1b[2J\u202e"
    for path in (*sorted(written.results_dir.rglob("result.json")), written.manifest_path):
        document = json.loads(path.read_text())
        for section in (document.get("identity", document), *document.get("experiments", ())):
            section |= {name: hostile for name in ("config_name", "campaign_name", "error", "host") if name in section}
        path.write_text(json.dumps(document))
    Path("c.yaml").write_text(json.dumps({"campaign_name": "demo", hostile: 1, "model": "gpt2", "configs": [hostile]}))
    for words in (
        ("results", "show", "demo"),
        ("results", "list"),
        ("results", "show", json.loads(written.manifest_path.read_text())["experiments"][0]["exp_id"]),
        ("check", "demo"),
        ("compare", "demo"),
        ("merge", "results", "--output", "merged"),
        ("status",),
        ("status", "demo"),
        ("config", "validate", "c.yaml"),
        ("campaign", "c.yaml", "--dry-run"),
    ):
        assert not {"\x1b", "\x07", "\u202e"} & set(lem(*words)[1]), words


@pytest.mark.needs("checkout")
def test_no_secret_is_in_the_repository() -> None:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, timeout=60, check=True).stdout
    kinds = (b"-----BEGIN OPENSSH PRIVATE KEY", b"-----BEGIN RSA PRIVATE KEY", b"AKIA", b"ghp_", b"hf_" + b"A")
    for name in names.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file() and path != Path(__file__):
            assert not [kind for kind in kinds if kind in path.read_bytes()], name
    assert shutil.which("git")
