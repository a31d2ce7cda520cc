"""The lab as it stands: real containers of the compose file and its CPU overlay, real engines on a tiny model."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab.engine import unmount_namespaces
from tests.lab.places import COMPOSE_FILES, MODELS, Places
from tests.lab.servers import llama_server, serving
from tests.processes import wait_until_ended

pytestmark = [pytest.mark.needs("lab"), pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300
OWNER = 4711  # a user that neither the host nor the image has

# Small enough for any machine; the cache is capped by the compose file.
GENERATE_WITH_VLLM = """
import json, sys, vllm
from importlib.metadata import version
engine = vllm.LLM(model=sys.argv[1], dtype="float32", max_model_len=64, enforce_eager=True, disable_log_stats=True)
sampling = vllm.SamplingParams(max_tokens=5, min_tokens=5, temperature=0, ignore_eos=True)
(answer,) = engine.generate(["The sea is"], sampling)
print(json.dumps({"tokens": len(answer.outputs[0].token_ids), "version": version("vllm")}))
"""

# With ignore_eos, llama.cpp bans the end token.
GENERATE_WITH_TRANSFORMERS = """
import json, sys, torch, transformers
prompt, answers = torch.tensor([json.loads(sys.argv[1])]), []
for folder in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answer = model.generate(prompt, max_new_tokens=12, do_sample=False, bad_words_ids=[[model.config.eos_token_id]])
    answers.append(answer[0, prompt.shape[1]:].tolist())
print(json.dumps(answers))
"""

IMPORT_PYTORCH = """
import json, os, sys, torch, transformers
print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__, "uid": os.getuid()}))
"""


@dataclass(frozen=True)
class Project:
    """One compose project on the lab."""

    name: str
    variables: Mapping[str, str]

    def compose(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        files = [word for path in COMPOSE_FILES for word in ("-f", str(path))]
        return subprocess.run(
            ["docker", "compose", *files, "-p", self.name, *arguments],
            env={**os.environ, **self.variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    def python(self, service: str, program: str, *arguments: str) -> dict[str, object]:
        """The object that a program prints on a line of its own, among the lines of its engine."""
        finished = self.compose("exec", "-T", service, "python3", "-I", "-c", program, *arguments)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        (line,) = [line for line in finished.stdout.splitlines() if line.startswith("{")]
        answer: dict[str, object] = json.loads(line)
        return answer

    def containers(self) -> list[str]:
        command = ["docker", "ps", "-aq", "--filter", f"label=com.docker.compose.project={self.name}"]
        return subprocess.check_output(command, text=True, timeout=TIMEOUT_S).split()


def project(folder: Path, **variables: str) -> Project:
    """A project of its own, with folders for results and lem.pyz that any user may use."""
    for name in ("pyz", "results"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "results").chmod(0o777)
    own = {"LEM_PYZ_DIR": str(folder / "pyz"), "LEM_RESULTS_DIR": str(folder / "results")}
    own |= {"LEM_UID": str(OWNER), "LEM_GID": str(OWNER), "HF_HUB_OFFLINE": "1"}
    return Project(f"lemtest-{secrets.token_hex(4)}", {**Places.of().variables(), **own, **variables})


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    started = project(tmp_path_factory.mktemp("lab"))
    try:
        finished = started.compose("up", "-d", "--wait", "pytorch", "vllm")
        assert finished.returncode == 0, finished.stderr
        yield started
    finally:
        finished = started.compose("down", "--timeout", "5")
        assert finished.returncode == 0, finished.stderr
        assert started.containers() == []


def test_second_up_finds_everything_there() -> None:
    command = [sys.executable, "-m", "tests.lab", "up"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert finished.returncode == 0, finished.stderr
    outcomes = [line for line in finished.stdout.splitlines() if line.startswith("  ") and not line.endswith("…")]
    assert len(outcomes) >= len(("engine", "compose", "image", "pytorch", "llamacpp", "tiny", "demo", "vllm"))
    assert [line for line in outcomes if "nothing to do" not in line] == []


def test_pytorch_runs_as_the_caller_with_the_pinned_versions(running: Project) -> None:
    found = running.python("pytorch", IMPORT_PYTORCH)
    pins = (ROOT / "tests/lab/requirements-pytorch.txt").read_text(encoding="utf-8")
    assert found["uid"] == OWNER
    assert f"torch=={str(found['torch']).partition('+')[0]}\n" in pins
    assert f"transformers=={found['transformers']}\n" in pins


def test_vllm_generates_and_leaves_no_process_behind(running: Project) -> None:
    found = running.python("vllm", GENERATE_WITH_VLLM, "/opt/huggingface/tiny")
    assert found == {"tokens": 5, "version": "0.32.0+cpu"}
    finished = running.compose("top", "vllm")
    assert finished.returncode == 0, finished.stderr
    assert [line for line in finished.stdout.splitlines() if "python" in line] == []


def test_llama_cpp_generates_the_tokens_that_transformers_generates(tmp_path: Path) -> None:
    places, prompt = Places.of(), [1, 77, 300, 301, 302]
    request = {"prompt": prompt, "n_predict": 12, "top_k": 1, "ignore_eos": True, "return_tokens": True}
    tokens = []
    for size in MODELS:
        with serving(llama_server(places, size), tmp_path / "log") as server:
            status, text = server.ask("/completion", request)
        assert status == 200, text
        tokens.append(json.loads(text)["tokens"])
    command = [str(places.environment("pytorch") / "bin/python"), "-c", GENERATE_WITH_TRANSFORMERS]
    command += [json.dumps(prompt), *(str(places.models / size) for size in MODELS)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert finished.returncode == 0, finished.stderr
    assert tokens == json.loads(finished.stdout)


def test_llama_cpp_ends_at_a_signal_and_a_port_that_is_taken_is_an_error(tmp_path: Path) -> None:
    with serving(llama_server(Places.of()), tmp_path / "log") as server:
        other = [word.replace("{port}", str(server.port)) for word in llama_server(Places.of())]
        refused = subprocess.run(other, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        assert refused.returncode == 1
        assert "couldn't bind" in refused.stdout + refused.stderr
        os.kill(server.pid, signal.SIGTERM)
        assert wait_until_ended(server.pid)


def test_results_belong_to_the_caller_and_have_the_same_path_on_both_sides(running: Project) -> None:
    path = Path(running.variables["LEM_RESULTS_DIR"]) / "result.json"
    finished = running.compose("exec", "-T", "pytorch", "touch", str(path))
    assert finished.returncode == 0, finished.stderr
    assert (path.stat().st_uid, path.stat().st_gid) == (OWNER, OWNER)


def test_nothing_but_results_and_temporary_files_can_be_written(running: Project) -> None:
    for folder in (
        "/opt/lem",
        running.variables["LEM_CPU_PACKAGES_TARGET"],
        "/opt/huggingface",
        "/",
        "/root",
        "/var/tmp",
    ):
        finished = running.compose("exec", "-T", "-u", "0", "pytorch", "touch", f"{folder}/x")
        assert finished.returncode != 0
        assert "Read-only file system" in finished.stderr


def test_what_engines_compile_runs_from_their_home(running: Project) -> None:
    words = ("exec", "-T", "pytorch", "sh", "-c", "cp /bin/true ~/compiled && ~/compiled && touch /dev/shm/x")
    finished = running.compose(*words)
    assert finished.returncode == 0, finished.stderr


def test_the_cache_of_models_is_offline_while_it_is_read_only_and_both_can_be_changed(tmp_path: Path) -> None:
    def resolved(**variables: str) -> tuple[str, bool]:
        found = Project("lemtest", {**Places.of().variables(), **variables}).compose("config", "--format", "json")
        service = json.loads(found.stdout)["services"]["vllm"]
        (cache,) = (item for item in service["volumes"] if item["target"] == "/opt/huggingface")
        return service["environment"]["HF_HUB_OFFLINE"], cache.get("read_only", False)

    assert resolved() == ("true", True)
    assert resolved(LEM_MODEL_CACHE_READ_ONLY="false") == ("false", False)
    assert resolved(HF_HUB_OFFLINE="0") == ("0", True)


@pytest.mark.parametrize(
    ("limits", "variables", "expected"),
    [
        ("", {}, (0, 10**9, 16384)),
        ("", {"LEM_HOST_MEMORY": "4000000000"}, (4 * 10**9, 10**9, 16384)),
        ("", {"LEM_HOST_MEMORY": "4000000000", "LEM_MEMORY_LIMIT": "0"}, (0, 10**9, 16384)),
        ("", {"LEM_MEMORY_LIMIT": "3g", "LEM_VLLM_CPU_LIMIT": "1.5"}, (3 * 2**30, 15 * 10**8, 16384)),
        ("memory: 2g", {"LEM_MEMORY_LIMIT": "3g"}, (2 * 2**30, 10**9, 16384)),
        ("memory: 2g, cpus: '0.5', pids: 900", {"LEM_HOST_MEMORY": "4000000000"}, (2 * 2**30, 5 * 10**8, 900)),
    ],
)
def test_limits_take_an_overlay_with_resources_of_deploy(
    tmp_path: Path, limits: str, variables: dict[str, str], expected: tuple[int, int, int]
) -> None:
    started = project(tmp_path, **variables)
    overlay = f"services:\n  vllm: {{deploy: {{resources: {{limits: {{{limits}}}}}}}}}\n"
    (tmp_path / "overlay.yml").write_text(overlay)
    try:
        finished = started.compose("-f", str(tmp_path / "overlay.yml"), "up", "-d", "vllm")
        assert finished.returncode == 0, finished.stderr
        words = ("docker", "inspect", "--format", "{{json .HostConfig}}", *started.containers())
        found = json.loads(subprocess.check_output(words, text=True, timeout=TIMEOUT_S))
        assert (found["Memory"], found["NanoCpus"], found["PidsLimit"]) == expected
        assert found["ReadonlyRootfs"] is True
    finally:
        started.compose("down", "--timeout", "1")


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"LEM_PYZ_DIR": "nowhere"}, "nowhere"),
        ({"LEM_PYTORCH_IMAGE": "lem-no-such-image:1"}, "No such image: lem-no-such-image:1"),
    ],
)
def test_missing_folder_or_image_is_refused_and_not_made_or_pulled(
    tmp_path: Path, variables: dict[str, str], text: str
) -> None:
    given = {name: value.replace("nowhere", f"{tmp_path}/nowhere") for name, value in variables.items()}
    started = project(tmp_path, **given)
    try:
        finished = started.compose("up", "-d", "pytorch")
        assert finished.returncode != 0
        assert text in finished.stderr
        assert not (tmp_path / "nowhere").exists()
    finally:
        started.compose("down")


def test_network_namespaces_that_an_engine_leaves_are_unmounted_and_nothing_else(tmp_path: Path) -> None:
    namespace, disk = tmp_path / "netns", tmp_path / "disk"
    namespace.touch()
    disk.mkdir()
    subprocess.run(["mount", "--bind", "/proc/self/ns/net", namespace], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", disk], check=True)
    try:
        unmount_namespaces(tmp_path)
        assert (os.path.ismount(disk), str(namespace) in Path("/proc/mounts").read_text()) == (True, False)
    finally:
        subprocess.run(["umount", disk], check=True)
