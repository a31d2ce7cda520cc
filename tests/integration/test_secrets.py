"""Canaries: a token and the address of a webhook, looked for in everything that lem writes, prints and runs."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.campaign_rig import CampaignRig, campaign_text
from tests.webhook import SECRET, Webhook, serving_webhook

TOKEN = "hf_canary4713"

ENCODED = (base64.b64encode(f"me:{TOKEN}".encode()).decode(), "".join(f"%{byte:02x}" for byte in TOKEN.encode()))

# While the engine works, the command lines of everything that runs are kept; and whoever looks at a process as another
# user sees no more than those.
SNAPSHOT = "for f in /proc/[0-9]*/cmdline; do tr '\\0' ' ' < $f; echo; done >> argv 2>/dev/null; true"
RULES: list[dict[str, Any]] = [
    {"at": "load", "do": "print", "text": "login with {secret}"},
    {"at": "load", "do": "print", "text": f"Authorization: Basic {ENCODED[0]} or ?token={ENCODED[1]}"},
    {"at": "generate", "do": "shell", "command": SNAPSHOT},
    {"at": "load", "do": "fail", "text": "the hub refused {secret}", "once": "has failed"},
]
NOTIFIED = "notification: {webhook_url: '${HOOK}'}\n"

COMMANDS = (
    ("config", "validate", "c.yaml"),
    ("config", "validate", "--json", "c.yaml", "--set", "notification.on=[never]"),
    ("config", "show", "c.yaml"),
    ("config", "show", "--json", "c.yaml"),
    ("campaign", "c.yaml", "--dry-run", "--executor", "local", "-vv", "--fresh"),
    ("campaign", "c.yaml", "--validate-only", "-vv"),
    ("campaign", "c.yaml", "--write-plan", "plan.json", "--hosts", "a,b", "--json"),
    ("status",),
    ("status", "demo", "--json"),
    ("check", "demo"),
    ("check", "demo", "--json"),
    ("compare", "demo", "--json"),
    ("results", "list", "--json"),
    ("results", "show", "demo", "--json"),
    ("results", "export", "--format", "csv", "-o", "out.csv"),
    ("results", "export", "--format", "json", "--attempts", "all", "-o", "out.json"),
    ("results", "export", "--format", "markdown", "-o", "out.md"),
    ("results", "recompute", "demo", "--json"),
    ("report", "demo", "-o", "page.html"),
    ("merge", "results", "--output", "merged", "--json"),
    ("compose",),
    ("doctor", "--json"),
    ("gpus", "--json"),
)


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    with serving_webhook() as found:
        yield found


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[CampaignRig]:
    """A campaign of two experiments."""
    (folder := tmp_path / "work").mkdir()
    rig = CampaignRig(folder, campaign_text(cycles=1, more=NOTIFIED))
    yield rig
    assert rig.marker.survivors() == ()


def traces(rig: CampaignRig, said: dict[str, str], secrets: tuple[str, ...]) -> list[tuple[str, str]]:
    """Where a secret was found: in a file, its name, or in what was said."""
    everything = {**rig.tree(), **{name: text.encode() for name, text in said.items()}}
    return [
        (name, secret)
        for name, content in everything.items()
        for secret in secrets
        if secret.encode() in content or secret in name
    ]


def lem(rig: CampaignRig, *words: str, **more: str) -> str:
    ended = rig.lem(*words, **more)
    assert ended.code in (0, 1, 2, 4), ended.err
    return ended.out + ended.err


def test_no_secret_stays_anywhere_whatever_is_done_with_a_campaign(rig: CampaignRig, webhook: Webhook) -> None:
    environ: dict[str, Any] = {"HOOK": webhook.url, "HF_TOKEN": TOKEN}
    secrets = (TOKEN, *ENCODED, SECRET, webhook.url)
    # Command lines are looked at, so each process has its own.
    ended = rig.run("--yes", "-vv", "--json", "--executor", "local", rules=RULES, is_warm=False, **environ)
    assert ended.code == 0, ended.err
    said = {"stdout of the campaign": ended.out, "stderr of the campaign": ended.err}
    said |= {" ".join(words): lem(rig, *words, **environ) for words in COMMANDS}

    assert webhook.next()[0] == f"/hook/{SECRET}"  # the canary was there to be found
    logs = [path.read_text() for path in rig.folder.rglob("log.txt")]
    assert any("login with [redacted]" in text for text in logs)
    assert any(re.search(r"Basic \S*\[redacted\]\S* or \?token=\[redacted\]", text) for text in logs)
    assert "the hub refused [redacted]" in str(rig.manifest().experiments[0].attempts[0].error)
    assert "worker" in (rig.folder / "argv").read_text(errors="replace")
    for name in ("page.html", "out.csv", "out.json", "plan.json", "configs", ".state", "merged"):
        assert (rig.folder / name).exists(), name
    assert traces(rig, said, secrets) == []


def test_a_webhook_that_is_written_out_is_hidden_and_the_file_itself_is_the_only_place(
    rig: CampaignRig, webhook: Webhook
) -> None:
    rig.write(campaign_text(cycles=1, more=f"notification: {{webhook_url: '{webhook.url}', on: [complete, never]}}\n"))
    said = {" ".join(words): lem(rig, *words) for words in COMMANDS[:6]}
    rig.write(campaign_text(cycles=1, more=f"notification: {{webhook_url: '{webhook.url}'}}\n"))
    said |= {f"valid: {' '.join(words)}": lem(rig, *words) for words in COMMANDS[:7]}
    word = f"notification.webhook_url={webhook.url}"
    said["set"] = lem(rig, "config", "show", "c.yaml", "--set", word)
    said["wrong set"] = lem(rig, "config", "validate", "c.yaml", "--set", f"notification.webhook_url=[{webhook.url}]")
    (rig.folder / "c.yaml").unlink()
    assert traces(rig, said, (SECRET, webhook.url)) == []


def test_a_secret_stays_out_of_what_is_left_of_an_interrupted_campaign(rig: CampaignRig, webhook: Webhook) -> None:
    environ: dict[str, Any] = {"HOOK": webhook.url, "HF_TOKEN": TOKEN}
    rules: list[dict[str, Any]] = [RULES[0], {"at": "generate", "do": "hang"}]
    running = rig.start("--yes", "-vv", "--json", "--executor", "local", rules=rules, **environ)
    running.wait_for_event("phase", phase="window")
    kept = traces(rig, {}, (TOKEN, SECRET))  # activity, lock, manifest and sample log as they are while it runs
    running.send(2)
    ended = running.wait()
    assert (ended.code, kept) == (130, [])
    assert traces(rig, {"stdout": ended.out, "stderr": ended.err}, (TOKEN, SECRET, webhook.url)) == []
