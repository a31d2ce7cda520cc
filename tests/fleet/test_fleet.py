"""The fleet on real hosts, in the order of a lab's life: from bare hosts over campaigns to none of it left.

The tests share hosts and stand in order: each finds what the one before it left.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lem.record import decode_record
from tests.container_rig import docker
from tests.doubles.nvml.gpus import GpuTrace, Load
from tests.doubles.nvml.library import build_library
from tests.doubles.nvml.sensors import Counter
from tests.doubles.nvml.traces import Trace
from tests.fleet.controller import ANY, HOLD, environment, held, install_collection, trivial, unit
from tests.fleet.hosts import DOUBLES, LEFT, MODEL, Host, inventory, start_host, wait_for

pytestmark = [pytest.mark.needs("fleet", "gcc"), pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[2]

GPU = "GPU-11111111-2222-3333-4444-555555555555"


# From bare


@pytest.mark.long
def test_check_mode_on_bare_hosts_is_clean_and_changes_nothing(fleet):
    hosts = (fleet.gpu1, fleet.gpu2)
    before = [host.lasting() for host in hosts]
    ended = fleet.controller.must("site", "--check", "--diff")
    assert ended.changed("gpu1", "gpu2") > 0
    assert [host.lasting() for host in hosts] == before
    assert not any(host.answers("id", "lem") for host in hosts)


def test_bare_hosts_are_provisioned_and_a_second_run_changes_nothing(fleet, site):
    assert site.changed("gpu1", "gpu2") > 0
    assert fleet.controller.must("site").changed("gpu1", "gpu2") == 0
    for host in (fleet.gpu1, fleet.gpu2):
        (release,) = host.run("ls", "/opt/lem/releases").split()
        assert host.run("python3", "-I", f"/opt/lem/releases/{release}/lem.pyz", "--version").startswith("lem ")


@pytest.mark.long
def test_check_mode_on_provisioned_hosts_finds_nothing_to_do(provisioned):
    assert provisioned.controller.must("site", "--check", "--diff").changed("gpu1", "gpu2") == 0


RAPL = "/sys/class/powercap"


def test_the_user_of_campaigns_reads_the_energy_counters_only_where_a_role_option_says_so(provisioned):
    """A powercap tree is mounted over that of the host, with links as the kernel makes them."""
    controller, host = provisioned.controller, provisioned.gpu1
    tree = "/opt/lem-powercap"
    script = f"""
        mkdir -p {tree}/devices/intel-rapl:0 {tree}/class/powercap
        cd {tree}/devices/intel-rapl:0
        echo package-0 > name
        echo 1000000 > energy_uj
        echo 262143328850 > max_energy_range_uj
        chmod 400 energy_uj
        ln -s {tree}/devices/intel-rapl:0 {tree}/class/powercap/
        mount --bind {tree}/class /sys/class"""
    host.run("bash", "-euc", script)
    counter = f"{RAPL}/intel-rapl:0/energy_uj"
    limited = ("--limit", "gpu1,localhost")
    reading = ("setpriv", "--reuid=lem", "--regid=lem", "--init-groups", "cat", counter)
    assert not host.answers(*reading)
    controller.must("deploy", *limited, lem_deploy_rapl_access=True)
    assert host.run(*reading) == "1000000\n"
    assert not host.answers("setpriv", "--reuid=65534", "--clear-groups", "cat", counter)
    assert controller.must("deploy", *limited, lem_deploy_rapl_access=True).changed("gpu1") == 0
    controller.must("deploy", *limited)
    assert host.run("stat", "-L", "-c", "%a %U %G", counter) == "400 root root\n"
    assert not host.answers(*reading)
    assert not host.answers("test", "-e", "/etc/tmpfiles.d/lem-rapl.conf")
    # Without counters, lem doctor says so, and with it the role.
    host.run("umount", "/sys/class")
    refused = controller.play("deploy", *limited, lem_deploy_rapl_access=True)
    assert refused.code != 0
    assert "lem cannot read the CPU's energy counters" in " ".join(refused.text.split())
    controller.must("deploy", *limited)
    host.run("rm", "-rf", tree)


def test_a_model_is_copied_as_one_archive_and_only_when_it_differs(provisioned, tmp_path):
    controller, host = provisioned.controller, provisioned.gpu1
    (tmp_path / "tiny" / "blobs").mkdir(parents=True)
    (tmp_path / "tiny" / "blobs" / "weights").write_text("weights")
    (tmp_path / "tiny" / "link").symlink_to("blobs/weights")
    given = {"lem_deploy_models": [str(tmp_path / "tiny")], "lem_deploy_model_dir": "/opt/lem-copied"}
    checked = controller.must("deploy", "--check", **given)
    assert checked.changed("gpu1") > 0
    assert not host.answers("test", "-e", "/opt/lem-copied")
    controller.must("deploy", **given)
    for path in ("link", "blobs/weights"):
        assert host.run("stat", "-c", "%F %a %U", f"/opt/lem-copied/tiny/{path}") == "regular file 644 root\n"
    assert controller.must("deploy", **given).changed("gpu1", "gpu2") == 0
    host.run("sh", "-c", "echo more > /opt/lem-copied/tiny/stale")
    again = controller.must("deploy", **given)
    assert (again.changed("gpu1") > 0, again.changed("gpu2")) == (True, 0)
    assert host.run("ls", "/opt/lem-copied", "/opt/lem-copied/tiny").split() == [
        "/opt/lem-copied:", "tiny", "/opt/lem-copied/tiny:", "blobs", "link"]  # fmt: skip
    for each in (provisioned.gpu1, provisioned.gpu2):
        each.run("rm", "-rf", "/opt/lem-copied")


# Bad input


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {"lem_python": "/opt/old-python"},
            r"lem needs Python 3\.10 or newer; lem_python is /opt/old-python,\s+which\s+is 3\.9\.18",
        ),
        pytest.param({"lem_preflight_state_mib": "much"}, "much", marks=pytest.mark.long),
        pytest.param({"lem_preflight_state_mib": 10**9}, "MiB are required", marks=pytest.mark.long),
        pytest.param({"lem_preflight_gpu_runtime": True}, "containers cannot use a GPU here", marks=pytest.mark.long),
        pytest.param({"lem_python": "/opt/no-python"}, "does not run here", marks=pytest.mark.long),
    ],
)
def test_a_host_that_is_not_fit_is_refused_before_anything_changes(fleet, variables, said):
    script = "printf '#!/bin/sh\\necho 3.9.18\\n' > /opt/old-python && chmod 755 /opt/old-python"
    fleet.gpu1.run("sh", "-c", script)
    before = fleet.gpu1.files()
    ended = fleet.controller.play("site", "--limit", "gpu1,localhost", **variables)
    fleet.gpu1.run("rm", "-f", "/opt/old-python")
    assert ended.code != 0
    assert re.search(said, ended.text), ended.text[-3000:]
    assert ended.counts("gpu1")["changed"] == 0
    before.pop("/opt/old-python")
    after = fleet.gpu1.files()
    assert {path for path in before.keys() ^ after.keys() if path.startswith(("/opt", "/etc"))} == set()


# Campaigns


def test_a_campaign_is_split_over_hosts_and_merged(fleet):
    controller = fleet.controller
    (controller.folder / "texts").mkdir()
    (controller.folder / "texts" / "prompts.txt").write_text("One line.\nAnd another.\n")
    prompts = [{"type": "file", "path": "texts/prompts.txt"}]
    campaign = controller.write_campaign("split", outputs=(4, 8, 16), more={"model": MODEL}, prompts=prompts)
    given = {
        "lem_campaign_file": os.path.relpath(campaign, ROOT),  # from where the playbook is called
        "lem_campaign_extra_files": ["texts/prompts.txt"],
        "lem_campaign_executor": "local",
        "lem_campaign_poll_seconds": 1,
        "lem_fleet_anchor_tolerance": ANY,
    }
    ended = controller.must("run_campaign", **given)
    merged = controller.merged("split")
    assert len(merged) == 8, ended.text[-4000:]  # three configurations and the anchor once more, twice
    assert {name.split("+")[1].split("/")[0] for name in merged} == {"gpu1", "gpu2"}
    engines = {json.loads(text)["environment"]["engine_name"] for text in merged.values()}
    assert engines == {"transformers"}
    assert b"<svg" in (controller.fleet_dir / "split" / "report.html").read_bytes()


def test_check_mode_of_a_first_campaign_changes_nothing_on_any_host(fleet):
    controller = fleet.controller
    hosts = (fleet.gpu1, fleet.gpu2)
    given = trivial(lem_campaign_file=controller.write_campaign("first"))
    before = [host.lasting() for host in hosts]
    assert controller.must("run_campaign", "--check", "--diff", **given).changed("gpu1", "gpu2") > 0
    assert [host.lasting() for host in hosts] == before
    assert not (controller.fleet_dir / "first").exists()


def test_the_unit_that_was_written_is_the_one_that_starts_after_an_interrupted_playbook(provisioned):
    """Its drop-in is written, as by a playbook that ended before systemd read it, and it failed before."""
    controller, host = provisioned.controller, provisioned.gpu1
    fails = {"at": "generate", "do": "fail", "text": "on purpose", "permanent": True}
    given = trivial(fails, lem_campaign_file=controller.write_campaign("again", outputs=(4,), cycles=1))
    limited = ("--limit", "gpu1,localhost")
    assert controller.play("run_campaign", *limited, **given).code != 0
    assert host.show(unit("again"), "ActiveState") == "failed"
    # What the new call will write; systemd still has the failing one.
    mended = trivial(lem_campaign_file=given["lem_campaign_file"])
    dropin = "/etc/systemd/system/lem-campaign@again.service.d/campaign.conf"
    assert controller.play("run_campaign", *limited, **given, lem_campaign_options=["--no-resume"]).code != 0
    controller.must("run_campaign", *limited, **mended)
    new, old = host.read(dropin), host.show(unit("again"), "Description")
    host.run("sh", "-c", f"cat > {dropin}", stdin=new.replace("Environment=", "Environment=EARLIER=1 ").encode())
    host.run("systemctl", "daemon-reload")
    host.run("sh", "-c", f"cat > {dropin}", stdin=new.encode())
    host.run("rm", "-rf", "/var/lib/lem/again")
    controller.must("run_campaign", *limited, **mended)
    assert host.show(unit("again"), "Description") == old
    assert "EARLIER" not in host.show(unit("again"), "Environment")
    # A drop-in of somebody else is refused.
    other = dropin.replace("campaign.conf", "zz.conf")
    host.run("sh", "-c", f"cat > {other}", stdin=b"[Service]\nExecStart=\nExecStart=/bin/true\n")
    refused = controller.play("run_campaign", *limited, **mended)
    host.run("rm", other)
    host.run("systemctl", "daemon-reload")
    assert refused.code != 0
    assert "zz.conf" in refused.text


def test_secrets_that_are_no_longer_configured_are_removed(provisioned):
    controller, host = provisioned.controller, provisioned.gpu1
    given = {"lem_campaign_file": controller.write_campaign("secret"), "lem_campaign_executor": "local"}
    given["lem_campaign_calendar"] = "2199-01-01 00:00:00 UTC"
    limited = ("--limit", "gpu1,localhost")
    folder = "/etc/lem/credentials"
    host.run("sh", "-c", f"mkdir -p {folder} && echo old > {folder}/OLD_TOKEN")  # as an earlier lem had them
    secrets = {"HF_TOKEN": "one", "WEBHOOK": "two"}
    controller.must("schedule_campaign", *limited, **given, lem_campaign_secrets=secrets)
    assert host.run("sh", "-c", f"cd {folder} && find . -type f").split() == ["./secret/HF_TOKEN", "./secret/WEBHOOK"]
    controller.must("schedule_campaign", *limited, **given, lem_campaign_secrets={"HF_TOKEN": "one"})
    assert host.run("ls", f"{folder}/secret").split() == ["HF_TOKEN"]
    controller.must("schedule_campaign", *limited, **given)
    assert host.run("ls", f"{folder}/secret") == ""
    assert controller.must("schedule_campaign", *limited, **given).changed("gpu1") == 0
    controller.must("stop_campaign", *limited, lem_campaign_name="secret", lem_campaign_stop_timer=True)


def test_a_new_calendar_whose_time_has_passed_today_starts_nothing(provisioned):
    controller, host = provisioned.controller, provisioned.gpu1
    given = {"lem_campaign_file": controller.write_campaign("late"), "lem_campaign_executor": "local"}
    limited = ("--limit", "gpu1,localhost")
    stamp = "/var/lib/systemd/timers/stamp-lem-campaign@late.timer"
    timer = "lem-campaign@late.timer"
    controller.must("schedule_campaign", *limited, **given, lem_campaign_calendar="2199-01-01 00:00:00 UTC")
    # It elapsed a year ago for the last time, and the new calendar would have elapsed since.
    for change in ("daily", "hourly"):
        host.run("touch", "-d", "1 year ago", stamp)
        controller.must("schedule_campaign", *limited, **given, lem_campaign_calendar=change)
        assert host.show(timer, "ActiveState") == "active"
        assert host.show(unit("late"), "ExecMainStartTimestampMonotonic") == "0"
    # Also when it was stopped meanwhile.
    host.run("systemctl", "stop", timer)
    host.run("touch", "-d", "1 year ago", stamp)
    controller.must("schedule_campaign", *limited, **given, lem_campaign_calendar="hourly")
    assert host.show(unit("late"), "ExecMainStartTimestampMonotonic") == "0"
    controller.must("stop_campaign", *limited, lem_campaign_name="late", lem_campaign_stop_timer=True)
    assert not host.answers("test", "-e", stamp)


@pytest.mark.long
def test_results_that_arrived_are_kept_and_a_second_call_runs_only_what_is_missing(provisioned):
    fleet = provisioned
    """Replicated; one host fails at one configuration, the other is killed in the middle."""
    controller = fleet.controller
    campaign = controller.write_campaign("twice")
    fails = {"at": "generate", "do": "fail", "text": "on purpose", "permanent": True, "when": {"max_output_tokens": 8}}
    fleet.gpu2.run("touch", HOLD)
    rules = {"gpu1": environment(fails), "gpu2": environment(held({"max_output_tokens": 8}))}
    given = trivial(
        lem_campaign_file=campaign,
        lem_fleet_mode="replicate",
        fleet_rules=rules,
        lem_campaign_environment="{{ fleet_rules[inventory_hostname] }}",
    )
    first = controller.play("run_campaign", **given, lem_campaign_poll_times=1)
    assert first.code != 0
    assert "gpu2: still running" in first.text
    plan = (controller.fleet_dir / "twice" / "plan.json").read_bytes()
    wait_for("gpu1 has failed", lambda: fleet.gpu1.show(unit("twice"), "ActiveState") == "failed")
    assert sorted(fleet.gpu1.entries("twice", "gpu1").values()) == ["completed", "completed", "failed", "failed"]
    wait_for("gpu2 is in the middle", lambda: "running" in fleet.gpu2.entries("twice", "gpu2").values())
    wait_for("gpu2 has a result", lambda: len(fleet.gpu2.results("twice")) == 1)
    measured, kept = fleet.gpu1.results("twice"), fleet.gpu2.results("twice")

    fleet.gpu2.kill()
    given["lem_campaign_environment"] = environment()
    missing_host = controller.play("run_campaign", **given)
    assert missing_host.code != 0
    assert "gpu2: unreachable" in missing_host.text
    assert "results are missing" in missing_host.text
    merged = controller.merged("twice")
    assert len([name for name in merged if "+gpu1/" in name]) == 4
    assert len(measured) == 2
    assert measured.items() <= fleet.gpu1.results("twice").items()

    fleet.gpu2.start()
    fleet.gpu2.run("rm", "-f", HOLD)
    controller.know(fleet.gpu1, fleet.gpu2)  # its port is another one
    before = fleet.gpu1.results("twice")
    controller.must("run_campaign", **given)
    assert fleet.gpu1.results("twice") == before
    assert kept.items() <= fleet.gpu2.results("twice").items()
    assert len(controller.merged("twice")) == 8
    assert (controller.fleet_dir / "twice" / "plan.json").read_bytes() == plan
    shown = controller.lem("results", "show", "twice", "--results-dir", controller.fleet_dir / "twice" / "merged")
    assert "@ gpu1" in shown.stdout
    assert "@ gpu2" in shown.stdout


@pytest.mark.long
def test_missing_work_of_a_lost_host_is_divided_among_the_others(provisioned):
    fleet = provisioned
    controller = fleet.controller
    given = trivial(lem_campaign_file=controller.write_campaign("lost", outputs=(4, 8, 16)))
    fleet.gpu2.kill()
    first = controller.play("run_campaign", **given)
    assert first.code != 0
    assert "gpu2: unreachable" in first.text
    kept = controller.merged("lost")
    assert {name.split("+")[1].split("/")[0] for name in kept} == {"gpu1"}
    plan = (controller.fleet_dir / "lost" / "plan.json").read_bytes()

    again = controller.play("run_campaign", **given, lem_fleet_replan=True)
    merged = controller.merged("lost")
    assert kept.items() <= merged.items()
    measured = {json.loads(text)["identity"]["config_name"] for text in merged.values()}
    assert len(measured) == 3, again.text[-4000:]
    assert "results are missing" not in again.text
    plans = [path.read_bytes() for path in (controller.fleet_dir / "lost").glob("plan.*.json")]
    assert plans == [plan]

    fleet.gpu2.start()
    controller.know(fleet.gpu1, fleet.gpu2)


@pytest.mark.long
def test_a_timer_starts_a_campaign_and_stopping_keeps_what_is_measured(provisioned):
    fleet = provisioned
    controller, host = fleet.controller, fleet.gpu1
    campaign = controller.write_campaign("nightly", cycles=1)
    host.run("touch", HOLD)
    given = trivial(
        held({"max_output_tokens": 8}), lem_campaign_file=campaign, lem_campaign_calendar="*-*-* *:*:0/2 UTC"
    )
    controller.must("schedule_campaign", "--limit", "gpu1,localhost", **given)
    wait_for("the timer has fired", lambda: len(host.results("nightly")) == 1)
    # READY came after preflight, and STATUS says how far it is.
    wait_for("it waits", lambda: "measuring" in host.show(unit("nightly"), "StatusText"))
    assert host.show(unit("nightly"), "ActiveState") == "active"
    begun = host.show(unit("nightly"), "InvocationID")
    host.run("systemctl", "start", unit("nightly"))  # as the timer does when it elapses again
    assert host.show(unit("nightly"), "InvocationID") == begun

    refused = controller.play("uninstall", "--limit", "gpu1")
    assert refused.code != 0
    assert "a campaign runs here" in refused.text
    changed = controller.play("schedule_campaign", "--limit", "gpu1,localhost", **trivial(lem_campaign_file=campaign))
    assert changed.code != 0
    assert "a campaign runs here" in changed.text

    controller.must("stop_campaign", "--limit", "gpu1", lem_campaign_name="nightly", lem_campaign_stop_timer=True)
    assert host.show(unit("nightly"), "ActiveState") == "inactive"  # and not failed, though lem exits with 143
    assert sorted(host.entries("nightly").values()) == ["completed", "pending"]
    assert "interrupted" in host.read("/var/lib/lem/nightly/.state/nightly/campaign_manifest.json")
    kept = host.results("nightly")

    host.run("rm", "-f", HOLD)
    host.run("systemctl", "start", unit("nightly"))
    wait_for("it has ended", lambda: host.show(unit("nightly"), "ActiveState") == "inactive")
    assert sorted(host.entries("nightly").values()) == ["completed", "completed"]
    assert kept.items() <= host.results("nightly").items()
    assert len({path.split("/")[2] for path in host.results("nightly")}) == 1  # one run
    priorities = host.run("journalctl", "-u", unit("nightly"), "-o", "json", "--output-fields=PRIORITY,MESSAGE")
    said = [json.loads(line) for line in priorities.splitlines()]
    assert {item["PRIORITY"] for item in said if "interrupted" in str(item["MESSAGE"])} == {"4"}


@pytest.mark.long
def test_roles_of_the_collection_run_a_campaign_from_another_repository(fleet, tmp_path):
    """Without the playbooks, the group variables and the ansible.cfg of the project."""
    controller = fleet.controller
    install_collection(tmp_path, Path(sys.executable).with_name("ansible-galaxy"))
    names = [("lem_preflight", "main"), ("lem_deploy", "main")]
    names += [("lem_campaign", tasks) for tasks in ("main", "start", "wait")]
    roles = [{"include_role": {"name": f"lem.energy.{name}", "tasks_from": tasks}} for name, tasks in names]
    collect = {"include_role": {"name": "lem.energy.lem_collect"}, "vars": {"lem_collect_folder": str(tmp_path)}}
    play = {"hosts": "gpu1", "become": True, "gather_facts": False, "tasks": [*roles, collect]}
    (tmp_path / "site.yml").write_text(json.dumps([play]))
    given = trivial(lem_campaign_file=controller.write_campaign("elsewhere"), lem_campaign_name="elsewhere")
    (tmp_path / "hosts.yml").write_text(inventory([fleet.gpu1], controller.key, controller.folder))
    with controller.start(tmp_path / "site.yml", **given, lem_collect_name="elsewhere") as playing:
        ended = playing.wait()
    assert ended.code == 0, ended.text[-6000:]
    assert "lem.energy.lem_campaign : Start the campaign" in ended.text
    assert len(list((tmp_path / "gpu1/results/elsewhere").rglob("result.json"))) == 4


# Without network


@pytest.fixture(scope="module")
def island(fleet):
    host = start_host("island", fleet.controller.key, has_network=False)
    yield host
    host.remove()


@pytest.fixture(scope="module")
def bundle(fleet, tmp_path_factory):
    """A signed bundle with an image and a model, the lock of the image, and what to trust."""
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "root").mkdir()
    (folder / "root" / "hello").write_text("hello\n")
    subprocess.run(["tar", "-C", str(folder / "root"), "-cf", str(folder / "root.tar"), "."], check=True)
    docker("import", str(folder / "root.tar"), "lem-fleet-probe:1")
    identity = docker("image", "inspect", "lem-fleet-probe:1", "--format", "{{.Id}}").strip()
    lock = {"probe": {"tag": "lem-fleet-probe:1", "digest": None, "ids": {"overlay2": identity, "containerd": None}}}
    (folder / "lock.json").write_text(json.dumps({"schema_version": 1, "images": lock}))
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text("weights")
    key = fleet.controller.key
    (folder / "allowed").write_text(f"lab {key.with_suffix('.pub').read_text()}")
    variables = {
        "lem_bundle_make_in": str(folder / "made"),
        "lem_bundle_images": ["lem-fleet-probe:1"],
        "lem_bundle_models": [str(folder / "model")],
        "lem_bundle_sign_key": str(key),
        "lem_bundle_allowed_signers": str(folder / "allowed"),
        "lem_bundle_identity": "lab",
        "lem_images_wanted": ["probe"],
        "lem_images_lock_file": str(folder / "lock.json"),
    }
    fleet.controller.must("airgap_bundle", **variables)
    docker("image", "rm", "lem-fleet-probe:1")
    (made,) = (folder / "made").iterdir()
    return folder, {**variables, "lem_bundle_dir": str(made)}


@pytest.mark.long
def test_a_changed_byte_or_an_image_with_another_id_is_refused(fleet, island, bundle):
    folder, variables = bundle
    fleet.controller.know(island)
    spoiled = folder / "spoiled"
    shutil.copytree(variables["lem_bundle_dir"], spoiled)
    (spoiled / "models" / "model" / "weights").write_text("weightz")
    lock = json.loads((folder / "lock.json").read_text())
    lock["images"]["probe"]["ids"]["overlay2"] = "sha256:" + "0" * 64
    (folder / "other.json").write_text(json.dumps(lock))
    for changed, said in (
        ({"lem_bundle_dir": str(spoiled)}, "changed since it was made: models/model/weights"),
        ({"lem_images_lock_file": str(folder / "other.json")}, "the lock file says sha256:000"),
    ):
        ended = fleet.controller.play("site", **{**variables, **changed})
        assert ended.code != 0
        assert said in ended.text
        assert ("island" in ended.text) is ("lem_bundle_dir" not in changed)
        assert not island.answers("test", "-e", "/opt/lem")


@pytest.mark.long
def test_a_host_without_network_installs_from_a_bundle_and_runs_a_campaign(fleet, island, bundle):
    _, variables = bundle
    controller, host = fleet.controller, island
    controller.know(host)
    assert "lo" in host.run("ls", "/sys/class/net").split()
    controller.must("site", **variables)
    assert host.run("docker", "image", "inspect", "lem-fleet-probe:1", "--format", "{{.Id}}").startswith("sha256:")
    assert host.read("/var/lib/lem-models/model/weights") == "weights"
    controller.must("run_campaign", **metered_campaign(controller, host))
    records = [decode_record(json.loads(text)) for text in controller.merged("alone").values()]
    assert len(records) == 2
    assert {record.energy.energy_source for record in records} == {"nvml_counter"}
    assert all((record.energy.gpu_energy_j or 0) > 0 for record in records)


def metered_campaign(controller, host: Host) -> dict[str, Any]:
    """The variables of a campaign that measures the energy of a GPU, which is NVML's double on the host."""
    library = build_library() / "libnvidia-ml.so.1"
    trace = Trace(
        1, (GpuTrace(uuid=GPU, load=Load("/opt/lem-nvml/load", 80.0, 350.0), counter=Counter(period_s=0.02)),)
    )
    host.run("mkdir", "-p", "/opt/lem-nvml")
    host.run("sh", "-c", "cat > /opt/lem-nvml/libnvidia-ml.so.1", stdin=library.read_bytes())
    host.run("sh", "-c", "cat > /opt/lem-nvml/script", stdin="".join(f"{line}\n" for line in trace.lines()).encode())
    campaign = controller.write_campaign(
        "alone", outputs=(4,), **{"gpus": [["0"]], "measurement.min_window_sec": [1.0], "measurement.energy": ["nvml"]}
    )
    variables = trivial(lem_campaign_file=campaign)
    variables["lem_campaign_environment"] = {
        "PYTHONPATH": DOUBLES,
        "LEMTEST_ENGINE_SCRIPT": json.dumps({"gpus": [GPU], "token_s": 0.01}),
        "LD_LIBRARY_PATH": "/opt/lem-nvml",
        "LEMTEST_NVML_SCRIPT": "/opt/lem-nvml/script",
    }
    return variables


# The end


@pytest.mark.long
def test_uninstalling_leaves_what_it_names_and_nothing_else(provisioned):
    fleet = provisioned
    controller = fleet.controller
    controller.know(fleet.gpu1, fleet.gpu2)
    results = fleet.gpu1.results("twice")
    controller.must("deploy", "--limit", "gpu1,localhost", lem_deploy_docker_access=True)
    assert "docker" in fleet.gpu1.run("id", "-nG", "lem").split()
    fleet.gpu1.run("touch", "/var/lib/systemd/timers/stamp-lem-campaign@nightly.timer")
    controller.must("uninstall", "--limit", "gpu1")
    assert fleet.gpu1.results("twice") == results
    assert not fleet.gpu1.answers("test", "-e", "/opt/lem")
    assert fleet.gpu1.run("id", "-nG", "lem").split() == ["lem"]
    assert "lem" not in fleet.gpu1.run("ls", "/var/lib/systemd/timers")
    # And installed again.
    controller.must("deploy", "--limit", "gpu1,localhost")
    assert controller.must("deploy", "--limit", "gpu1,localhost").changed("gpu1") == 0
    controller.must("uninstall", "--limit", "gpu1")

    controller.must("uninstall", "--limit", "gpu2", lem_uninstall_results=True)
    before, after = fleet.bare_files["gpu2"], fleet.gpu2.files()
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert sorted(path for path in changed if not LEFT.match(path)) == []
    assert controller.must("uninstall", lem_uninstall_results=True).changed("gpu2") == 0
