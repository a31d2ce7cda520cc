"""Models, tokenizers, revisions and adapters: what is loaded, and what a person reads when it is not there."""

from __future__ import annotations

import hashlib
import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import EngineError, OptionRefused
from lem.engines.protocol import EngineReport
from lem.engines.pytorch import load
from tests.integration.engine_answers import experiment, loaded, outputs, prompts

pytestmark = [pytest.mark.needs("torch"), pytest.mark.needs("transformers")]

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Loads in a process of its own: offline mode and the place of the cache are read when the hub's package is imported.
LOAD = """
import json, os, sys
from lem.engines.pytorch import load
from lem.config.experiment import (ExperimentConfig)
from lem.base.errors import EngineError
found = []
for options, variables in json.loads(sys.argv[1]):
    os.environ.update(variables)
    config = ExperimentConfig.from_dict({"gpus": [], "fp_precision": "float32", **options})
    try:
        report = load(config, {"HF_TOKEN": "hf_verysecret"}).report
    except EngineError as error:
        it = {"kind": error.kind, "message": error.message, "hint": error.hint, "is_permanent": error.is_permanent}
    else:
        it = {"revision": report.model_revision, "weights": report.weights_sha256, "effective": report.effective}
    found.append(it)
print(json.dumps(found))
"""


def failure(model: Path | str, **options: Any) -> EngineError:
    """Why a model does not load; it would fail the same way again."""
    with pytest.raises(EngineError) as caught:
        load(experiment(Path("unused"), **{"model": str(model), **options}), {})
    assert caught.value.is_permanent
    return caught.value


def load_offline(cache: Path, *loads: tuple[dict[str, Any], dict[str, str]]) -> tuple[tuple[dict[str, Any], ...], str]:
    """What a process without network makes of loads, each after it sets variables, and everything it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    command = [sys.executable, "-c", LOAD, json.dumps(loads)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout.splitlines()[-1])), done.stdout + done.stderr


def broken_copy(tiny_model: Path, folder: Path, *, without: str = "", **contents: str) -> Path:
    """A copy of the model that lacks a file, or has others of these contents."""
    shutil.copytree(tiny_model, folder)
    if without:
        (folder / without).unlink()
    for name, content in contents.items():
        (folder / name.replace("__", ".")).write_text(content, encoding="utf-8")
    return folder


def test_a_folder_without_a_model_or_with_a_revision_is_an_error_with_a_remedy(
    tiny_model: Path, tmp_path: Path
) -> None:
    for folder, message, hint in (
        (tmp_path / "nowhere", "no such folder", str(Path.cwd())),
        (tmp_path, "has no config.json", "save_pretrained"),
    ):
        error = failure(folder)
        assert error.kind == "model"
        assert message in error.message
        assert hint in error.hint
    with pytest.raises(OptionRefused, match=r"model\.revision: v2"):
        load(experiment(tiny_model, model={"name": str(tiny_model), "revision": "v2"}), {})


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"without": "model.safetensors"}, "no file named model.safetensors"),
        ({"model__safetensors": "short"}, "model: "),
        ({"config__json": "{"}, "not a valid JSON file"),
        ({"config__json": '{"model_type": "nonesuch"}'}, "nonesuch"),
        ({"config__json": '{"model_type": "t5"}'}, "AutoModelForCausalLM"),
        ({"tokenizer__json": "{}"}, "tokenizer of "),
    ],
)
def test_a_model_that_is_not_whole_or_not_known_is_an_error_of_the_model(
    tiny_model: Path, tmp_path: Path, broken: dict[str, str], words: str
) -> None:
    error = failure(broken_copy(tiny_model, tmp_path / "model", **broken))
    assert error.kind == "model"
    assert words in error.message
    assert error.hint
    assert "\n" not in error.message


def test_weights_that_the_checkpoint_lacks_are_warned_about(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = broken_copy(tiny_model, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with loaded(experiment(model)) as there:
        report: EngineReport = there.report
    assert report.warnings[0].code == "weights_missing"
    assert report.warnings[0].data["first"] == "lm_head.weight"


def test_code_of_a_model_is_not_run_unless_it_is_trusted(tiny_model: Path, tmp_path: Path) -> None:
    values = json.loads((tiny_model / "config.json").read_text(encoding="utf-8"))
    values |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w').close()\nclass Config: ...\nclass Model: ...\n"
    model = broken_copy(tiny_model, tmp_path / "model", config__json=json.dumps(values), own__py=code)
    error = failure(model)
    assert "trust_remote_code: true" in error.hint
    assert not marker.exists()


def test_a_tokenizer_of_its_own_is_used(tiny_model: Path, tmp_path: Path) -> None:
    text = (tiny_model / "tokenizer.json").read_text(encoding="utf-8")
    values = json.loads(text)
    values["post_processor"] = None  # no begin of sequence any more
    other = broken_copy(tiny_model, tmp_path / "other", tokenizer__json=json.dumps(values))
    with loaded(experiment(tiny_model)) as there:
        own = there.encode("Heat.")
    with loaded(experiment(tiny_model, model={"name": str(tiny_model), "tokenizer": str(other)})) as there:
        assert there.encode("Heat.") == own[1:]


def test_a_tokenizer_of_another_model_is_told_by_its_ids(tiny_model: Path, tmp_path: Path) -> None:
    values = json.loads((tiny_model / "tokenizer.json").read_text(encoding="utf-8"))
    traits = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    values["added_tokens"].append({"id": 5000, "content": "<far>", **traits})
    values["model"]["vocab"]["<far>"] = 5000
    other = broken_copy(tiny_model, tmp_path / "other", tokenizer__json=json.dumps(values))
    config = experiment(tiny_model, model={"name": str(tiny_model), "tokenizer": str(other)})
    with loaded(config) as there, pytest.raises(EngineError, match="id 5000, but the model only has ids below 1000"):
        there.encode("<far>")


def test_a_model_that_is_nowhere_says_where_it_was_looked_for(tmp_path: Path) -> None:
    nothing = {"model": "nobody/nothing"}
    (found, inside), printed = load_offline(tmp_path, (nothing, {}), (nothing, {"LEM_MODEL_CACHE_READ_ONLY": "true"}))
    assert found["kind"] == "model"
    assert found["is_permanent"] is True
    assert "nobody/nothing" in found["message"]
    assert "HF_HUB_OFFLINE" in found["hint"]
    assert str(ROOT) in found["hint"]  # it could have been a folder
    assert "run once with LEM_MODEL_CACHE_READ_ONLY=false" in inside["hint"]
    assert "hf_verysecret" not in printed


def test_a_model_of_the_hub_is_reported_with_its_commit_and_the_hash_of_its_blobs(
    tiny_model: Path, tmp_path: Path
) -> None:
    cached = tmp_path / "models--acme--tiny"
    snapshot = cached / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT, encoding="ascii")
    (cached / "blobs").mkdir()
    for path in tiny_model.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, cached / "blobs" / digest)
        (snapshot / path.name).symlink_to(Path("../../blobs") / digest)
    of_revision = {"model": {"name": "acme/tiny", "revision": "v2"}}
    (found, absent), printed = load_offline(tmp_path, ({"model": "acme/tiny"}, {}), (of_revision, {}))
    assert found["revision"] == COMMIT
    digest = hashlib.sha256((tiny_model / "model.safetensors").read_bytes()).hexdigest()
    assert found["weights"] == hashlib.sha256(f"{digest}  model.safetensors\n".encode()).hexdigest()
    assert "hf_verysecret" not in printed + json.dumps(found)
    assert absent["kind"] == "model"


def test_an_adapter_changes_the_output_or_is_refused_with_the_remedy(tiny_model: Path, tmp_path: Path) -> None:
    adapted = experiment(tiny_model, model={"name": str(tiny_model), "adapter": str(tmp_path / "lora")})
    if importlib.util.find_spec("peft") is None:
        with pytest.raises(OptionRefused, match=r"model\.adapter: needs peft"):
            load(adapted, {})
        return
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), lora).save_pretrained(tmp_path / "lora")
    found = []
    for config in (experiment(tiny_model), adapted):
        with loaded(config) as there:
            found.append((outputs(there, prompts()), there.report.weights_sha256))
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


# --- what is looked for before a load

FIND = """
import json, sys
from lem.config.experiment import (ExperimentConfig)
from lem.engines.checkpoints import find_problems
found = []
for model in json.loads(sys.argv[1]):
    config = ExperimentConfig.from_dict({"model": model})
    found.append([[error.message, error.hint, error.is_permanent] for error in find_problems(config, None)])
print(json.dumps(found))
"""


class ModelHub(http.server.BaseHTTPRequestHandler):
    """As much of one as a look for a model asks: one has a configuration, one is gated, the rest is not there."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        status, code = 404, "RepoNotFound"
        if self.path.startswith("/owner/gated/"):
            status, code = 403, "GatedRepo"
        elif self.path.startswith("/owner/name/"):
            code = "RevisionNotFound" if "/v9/" in self.path else "EntryNotFound"
        is_there = self.path == "/owner/name/resolve/main/config.json"
        facts = {"X-Repo-Commit": COMMIT, "ETag": f'"{"b" * 40}"'} if is_there else {"X-Error-Code": code}
        self.send_response(200 if is_there else status)
        for name, value in {**facts, "Content-Length": "2"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(b"{}")

    do_HEAD = do_GET  # noqa: N815 - as http.server wants it

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def test_all_that_a_configuration_names_is_looked_for_without_a_load(tmp_path: Path) -> None:
    expected: list[tuple[dict[str, str], list[str]]] = [
        ({"name": "owner/name"}, []),
        ({"name": "owner/name", "revision": "v9"}, ["check model.revision"]),
        ({"name": "owner/none"}, ["check the spelling"]),
        ({"name": "owner/gated"}, ["HF_TOKEN"]),
        ({"name": "owner/name", "adapter": "owner/name", "tokenizer": "owner/none"}, ["spelling", "causal language"]),
    ]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), ModelHub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}"
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", FIND, json.dumps([model for model, _ in expected])]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert done.returncode == 0, done.stderr
    for (_, hints), problems in zip(expected, json.loads(done.stdout), strict=True):
        assert len(problems) == len(hints)
        assert all(hint in problem[1] and problem[2] for hint, problem in zip(hints, problems, strict=True))
