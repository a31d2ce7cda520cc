"""Text from files, engines and hosts, which may hold anything, in everything that lem prints and exports."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lem.cli.main import COMMANDS, main
from lem.orchestration.packing import PYZ_NAME
from tests.campaign_rig import CampaignRig, campaign_text
from tests.synthetic_campaign import Campaign, Configuration

# A colour that lem uses too, a title, the 8-bit form of a sequence, a line written over, text from right to left, words
# that pass for lem's, HTML, Markdown, and a character that some programs take for the end of a line.
HOSTILE = (
    "=\x1b[31mred\x1b]0;title\x07\x9b2J\x7f\r\x1b[2K\u202egnp.exe\u2066 [12/12] ok\b\x0c\u2028\ufeff"
    "<img src=x onerror=alert(1)>|`*_[a](javascript:b)&lt;"
)
# How each configuration went.
COURSES: tuple[dict[str, Any], ...] = (
    {},
    {"failed_cycles": (0, 1)},
    {"invalid_attempts": {0: 2, 1: 2}},
    {"backend": "pytorch"},
)
LINES = f"{HOSTILE}\n[12/12] ok forged\n\x1b[1A"
OWN = re.compile(r"\x1b\[(?:0|1|2|31|32|33|34|36)m|\r\x1b\[2K")


def controls(text: str) -> set[str]:
    return {
        char for char in text if char not in "\n\t" and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    }


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def run_lem(*words: str, is_terminal: bool = False) -> tuple[int, str, str]:
    out, err = (Screen(), Screen()) if is_terminal else (io.StringIO(), io.StringIO())
    code = main(words, out, err)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def run_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The id of a run all of whose texts are hostile; its folder is where commands are run."""
    folder = tmp_path / "\x1b[31mfolder\u202e"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LEM_\x1b[31m", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    configurations = tuple(
        Configuration(
            f"{number} {HOSTILE}", model=HOSTILE, batch_size=number + 1, error=LINES, warnings=(LINES,), **more
        )
        for number, more in enumerate(COURSES)
    )
    campaign = Campaign(
        configurations, name="demo", cycles=3, host=HOSTILE, gpu_name=HOSTILE, driver=HOSTILE, stop_after=9
    )
    written = campaign.write(Path())
    for log in Path().rglob("log.txt"):
        log.write_text(LINES, encoding="utf-8")
    experiment = {"model": HOSTILE, HOSTILE: 1, "backend": HOSTILE, "extra_metadata": {HOSTILE: HOSTILE}}
    Path("e.yaml").write_text(json.dumps(experiment))
    Path("c.yaml").write_text(json.dumps({"campaign_name": HOSTILE, "configs": [HOSTILE], "experiments": [experiment]}))
    Path("good.yaml").write_text(
        json.dumps(
            {"campaign_name": f"x{HOSTILE}", "experiments": [{"model": HOSTILE, "extra_metadata": {"a": HOSTILE}}]}
        )
    )
    (bundle := Path("bundle")).mkdir()
    (bundle / "SHA256SUMS").write_text(f"{'0' * 64}  {HOSTILE.partition('<')[0]}\n")
    (bundle / f"\x1b[31m{PYZ_NAME}").write_text("")
    return written.run_id


def commands(run_id: str) -> Iterator[tuple[str, ...]]:
    yield from (("status",), ("status", "demo"), ("status", "demo", "--json"), ("status", HOSTILE))
    yield from (("check", "demo"), ("check", "demo", "--json"), ("check", HOSTILE))
    yield from (("results", "list"), ("results", "list", "--json"), ("results", "show", "demo"))
    yield from (
        ("results", "show", path.name) for path in sorted(Path("results/demo", run_id).iterdir()) if path.is_dir()
    )
    yield from (("results", "show", "demo", "--json"), ("results", "recompute", "demo"))
    yield from (("verify", f"results/demo/{run_id}"), ("verify", "results", "--json"), ("verify", HOSTILE))
    for form in ("csv", "json", "jsonl", "markdown"):
        yield from (("results", "export", "demo", "--format", form), ("results", "export", "-o", f"out.{form}"))
        yield "results", "export", "demo", "--attempts", "all", "--format", form, "-o", f"all.{form}"
    yield "results", "export", "demo", "--columns", HOSTILE
    yield from (("compare", "demo"), ("compare", "demo", "--json"), ("compare", "demo", "--markdown"))
    yield from (("compare", "demo", f"0 {HOSTILE}", f"3 {HOSTILE}"), ("compare", "demo", "--baseline", HOSTILE))
    yield from (("report", "demo", "-o", "page.html"), ("report", "demo", "-o", f"{HOSTILE.partition('<')[0]}/x.html"))
    yield from (("merge", "results", "--output", "merged"), ("merge", HOSTILE, "--output", "merged2"))
    for file in ("c.yaml", "e.yaml", "good.yaml", HOSTILE):
        yield from (("config", "validate", file), ("config", "validate", file, "--json"), ("config", "show", file))
    yield from (
        ("campaign", file, *more) for file in ("c.yaml", "good.yaml") for more in (("--dry-run",), ("--validate-only",))
    )
    yield "campaign", "good.yaml", "--executor", "local", "--write-plan", "plan.json", "--hosts", f"a,{HOSTILE}"
    yield from (("campaign", "good.yaml", "--dry-run", "--set", HOSTILE), ("experiment", "e.yaml", "--dry-run"))
    yield from (("experiment", "good.yaml"), ("bundle", "verify", "bundle"), ("bundle", "verify", HOSTILE))
    yield from (
        (HOSTILE,),
        ("status", f"--{HOSTILE}"),
        ("status", "a", HOSTILE),
        ("presets", HOSTILE),
        ("gpus", "--json"),
    )
    yield from (("doctor",), ("doctor", "--backend", HOSTILE), ("datasets",), ("completion", HOSTILE))
    yield from ((name, "--help") for name, text in COMMANDS.items() if text)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_no_command_lets_text_steer_the_terminal(run_id: str, is_terminal: bool) -> None:
    found = 0
    for words in commands(run_id):
        code, out, err = run_lem(*words, is_terminal=is_terminal)
        assert code in (0, 1, 2, 4), (words, err)
        shown = out + err
        assert "\x1b[31mred" not in shown, words
        assert controls(OWN.sub("", shown) if is_terminal else shown) == set(), words
        if "--json" in words and code == 0:
            assert json.loads(out) is not None, words
        found += "31mred" in shown
    assert found > 40, "the text is shown, and can be told"


def test_each_export_escapes_what_would_be_more_than_text_in_it(run_id: str) -> None:
    for form in ("csv", "json", "jsonl", "markdown"):
        for attempts in ("used", "all"):
            code, _, err = run_lem(
                "results", "export", "--attempts", attempts, "-o", f"{attempts}.{form}", "--format", form
            )
            assert code == 0, err
            text = Path(f"{attempts}.{form}").read_text(encoding="utf-8")
            assert "31mred" in text
            assert controls(text) == set(), form
            check_export(form, text)
    code, shown, _ = run_lem("compare", "demo", "--markdown")
    assert code == 0
    assert_plain_markdown(shown)
    assert run_lem("report", "demo", "-o", "page.html")[0] == 0
    page = Path("page.html").read_text(encoding="utf-8")
    assert "31mred" in page
    assert controls(page) == set()
    assert "<img" not in page


def check_export(form: str, text: str) -> None:
    if form == "csv":
        cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
        assert [cell for cell in cells if cell[:1] in ("=", "@", "+", "\t", "\r")] == []
        assert [cell for cell in cells if cell[:1] == "-" and not re.fullmatch(r"-[\d.e-]+", cell)] == []
    elif form == "markdown":
        assert_plain_markdown(text)
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()}) == 1
    else:
        documents = json.loads(text) if form == "json" else [json.loads(line) for line in text.splitlines()]
        assert any(item["config_name"] == f"0 {HOSTILE}" for item in documents), "a program gets the name as it is"


def assert_plain_markdown(text: str) -> None:
    assert "31mred" in text
    assert controls(text) == set()
    assert not re.search(r"<(?!br>)", text)
    assert not re.search(r"(?<!\\)[\]`]", text)


RULES: list[dict[str, Any]] = [
    {"at": "load", "do": "print", "text": LINES},
    {"at": "generate", "do": "fail", "text": LINES, "when": {"max_output_tokens": 4}},
]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[CampaignRig]:
    (folder := tmp_path / "work").mkdir()
    rig = CampaignRig(
        folder, campaign_text(cycles=1).replace("campaign_name: demo", f"campaign_name: {json.dumps(HOSTILE)}")
    )
    yield rig
    assert rig.marker.survivors() == ()


@pytest.mark.parametrize("options", [("-vv",), ("--json",), ("-q",), ("--fail-fast",)])
def test_an_engine_cannot_steer_the_terminal_of_its_campaign(rig: CampaignRig, options: tuple[str, ...]) -> None:
    ended = rig.run("--yes", "--executor", "local", *options, rules=RULES)
    assert ended.code == 1, ended.err
    assert "31mred" in ended.out + ended.err
    assert controls(ended.out + ended.err) == set()
    assert "\n[12/12] ok" not in ended.out + ended.err
    logs = [path.read_text() for path in rig.folder.rglob("lem.log")]
    assert controls("".join(logs)) == set()


def test_on_a_terminal_only_sequences_of_lem_arrive(rig: CampaignRig) -> None:
    terminal = rig.terminal("--yes", "--executor", "local", rules=RULES)
    assert terminal.wait() == 1, terminal.shown
    shown = terminal.shown.replace("\r\n", "\n")
    assert "31mred" in shown
    assert "\x1b[31mred" not in shown
    assert controls(OWN.sub("", shown)) == set()
    assert "\n[12/12] ok" not in shown
