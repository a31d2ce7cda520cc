"""The JSON Schema in the programs that people check YAML with: check-jsonschema, and the language server of editors."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lem.config.campaign_config import CampaignConfig
from lem.config.experiment import ExperimentConfig
from lem.config.schema import document_schema
from tests.needs import language_server
from tests.unit.config.test_schema import EXAMPLES, WRONG, campaign_with

TIMEOUT_S = 60


@pytest.fixture(scope="module")
def schemas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("schemas")
    files = {}
    for kind, section in (("campaign", CampaignConfig), ("experiment", ExperimentConfig)):
        files[kind] = folder / f"{kind}.schema.json"
        files[kind].write_text(json.dumps(document_schema(section, kind)), encoding="utf-8")
    return files


def example_texts() -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(EXAMPLES.glob("*.yaml"))}


def kind_of(text: str) -> str:
    return "campaign" if "campaign_name:" in text else "experiment"


# check-jsonschema


@pytest.fixture
def _program() -> None:
    pytest.importorskip("check_jsonschema", reason="check-jsonschema needs Python 3.11")


def check(schema: Path, *files: Path) -> tuple[int, dict[str, set[str]]]:
    """The exit code of check-jsonschema, and for each file that it refuses where."""
    command = [sys.executable, "-m", "check_jsonschema", "-o", "json", "--schemafile", str(schema), *map(str, files)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert finished.returncode in (0, 1), finished.stderr
    found: dict[str, set[str]] = {}
    for error in json.loads(finished.stdout).get("errors", ()):
        found.setdefault(Path(error["filename"]).name, set()).add(error["path"])
    return finished.returncode, found


@pytest.mark.usefixtures("_program")
def test_check_jsonschema_accepts_the_examples(schemas: dict[str, Path]) -> None:
    for kind, schema in schemas.items():
        files = [EXAMPLES / name for name, text in example_texts().items() if kind_of(text) == kind]
        assert files
        assert check(schema, *files) == (0, {})


@pytest.mark.usefixtures("_program")
def test_check_jsonschema_refuses_what_is_wrong_at_its_place(schemas: dict[str, Path], tmp_path: Path) -> None:
    # It merges `<<` while it reads, before it looks at the schema.
    lines = [line for line in WRONG if "<<" not in line]
    for number, line in enumerate(lines):
        (tmp_path / f"{number}.yaml").write_text(campaign_with(line), encoding="utf-8")
    code, found = check(schemas["campaign"], *(tmp_path / f"{number}.yaml" for number in range(len(lines))))
    assert code == 1
    assert [line for number, line in enumerate(lines) if f"{number}.yaml" not in found] == []
    assert found[f"{lines.index('grid.shared: {fp_precison: [float16]}')}.yaml"] == {"$.grid.shared"}
    assert found[f"{lines.index('grid.shared: {max_output_tokens: [0]}')}.yaml"] == {
        "$.grid.shared.max_output_tokens[0]"
    }


# yaml-language-server


class LanguageServer:
    """The program behind the YAML support of editors, asked over its standard streams."""

    def __init__(self, schema: Path) -> None:
        command = [str(language_server()), "--stdio"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._schema = schema
        self._messages: queue.Queue[dict[str, Any]] = queue.Queue()
        self._count = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ask("initialize", {"processId": None, "rootUri": None, "capabilities": {}})
        self._send({"method": "initialized", "params": {}})

    def close(self) -> None:
        self._process.kill()
        self._process.wait(TIMEOUT_S)
        self._reader.join(TIMEOUT_S)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def diagnostics(self, name: str, text: str) -> list[tuple[int, str]]:
        """Open a text; the line, from 1, and the message of each problem."""
        head = f"# yaml-language-server: $schema={self._schema.name}\n"
        uri = self._uri(name)
        document = {"uri": uri, "languageId": "yaml", "version": 1, "text": head + text}
        self._send({"method": "textDocument/didOpen", "params": {"textDocument": document}})
        found = self._wait(
            lambda it: it.get("method") == "textDocument/publishDiagnostics" and it["params"]["uri"] == uri
        )
        return [(item["range"]["start"]["line"], item["message"]) for item in found["params"]["diagnostics"]]

    def ask(self, what: str, name: str, line: int, column: int) -> Any:
        """What it says of a position in an open text; line and column from 1."""
        position = {"line": line, "character": column - 1}
        return self._ask(f"textDocument/{what}", {"textDocument": {"uri": self._uri(name)}, "position": position})

    def _uri(self, name: str) -> str:
        """That of a file beside the schema, which need not exist."""
        return (self._schema.parent / name).as_uri()

    def _ask(self, method: str, params: Any) -> Any:
        self._count += 1
        self._send({"id": self._count, "method": method, "params": params})
        return self._wait(lambda it: it.get("id") == self._count and "method" not in it)["result"]

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps({"jsonrpc": "2.0", **message}).encode()
        stream = self._process.stdin
        assert stream is not None
        stream.write(b"Content-Length: %d\r\n\r\n" % len(data) + data)
        stream.flush()

    def _wait(self, is_wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while True:
            message = self._messages.get(timeout=TIMEOUT_S)
            if is_wanted(message):
                return message
            if "id" in message and "method" in message:
                self._send({"id": message["id"], "result": None})

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        while header := stream.readline():
            length = int(header.partition(b":")[2])
            while stream.readline().strip():
                pass
            self._messages.put(json.loads(stream.read(length)))


@pytest.fixture(scope="module")
def server(schemas: dict[str, Path]) -> Iterator[LanguageServer]:
    started = LanguageServer(schemas["campaign"])
    yield started
    started.close()


@pytest.mark.needs("yaml-language-server")
def test_an_editor_finds_nothing_wrong_with_the_examples(server: LanguageServer) -> None:
    campaigns = {name: text for name, text in example_texts().items() if kind_of(text) == "campaign"}
    assert campaigns
    assert {name: server.diagnostics(name, text) for name, text in campaigns.items()} == {
        name: [] for name in campaigns
    }


@pytest.mark.needs("yaml-language-server")
def test_an_editor_marks_what_is_wrong_merge_keys_included(server: LanguageServer) -> None:
    found = [server.diagnostics(f"{number}.yaml", campaign_with(line)) for number, line in enumerate(WRONG)]
    assert [line for line, problems in zip(WRONG, found, strict=True) if not problems] == []
    wrong = WRONG.index("grid.shared: {fp_precison: [float16]}")
    assert found[wrong] == [(3, "Property fp_precison is not allowed.")]
    assert any("<<" in line for line in WRONG)


@pytest.mark.needs("yaml-language-server")
def test_an_editor_offers_options_and_values_and_explains_them(server: LanguageServer) -> None:
    text = "campaign_name: c\ngrid:\n  shared:\n    fp_precision: [float16]\n    \nexecution:\n  structure: \n"
    server.diagnostics("c.yaml", text)
    offered = {item["label"] for item in server.ask("completion", "c.yaml", 5, 5)["items"]}
    assert {"max_output_tokens", "decoder.preset", "ignore_eos"} <= offered
    assert "fp_precision" not in offered
    structures = [item["label"] for item in server.ask("completion", "c.yaml", 7, 14)["items"]]
    assert structures == ["balanced", "interleaved", "shuffled", "grouped"]
    assert "Type of the weights." in server.ask("hover", "c.yaml", 4, 7)["contents"]["value"]
