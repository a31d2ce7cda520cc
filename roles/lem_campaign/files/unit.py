"""Have systemd use the unit that was written, and start it: unit.py load|start UNIT DESCRIPTION COMMAND.

After a playbook that was interrupted, systemd may still have an older one, and NeedDaemonReload does not tell. So what
systemd would run is compared with what it should run.
"""

import re
import subprocess
import sys

verb, unit, description, command = sys.argv[1:]


def systemctl(*words):
    return subprocess.run(["systemctl", *words], check=True, stdout=subprocess.PIPE, text=True).stdout


def show(name):
    return systemctl("show", "--value", "--property=" + name, unit).strip()


def bare(text):
    return re.sub(r"[\s\\\"$%]", "", text)


def is_wanted():
    is_loaded = show("Description") == description and show("NeedDaemonReload") == "no"
    return is_loaded and "argv[]=" + bare(command) + ";" in bare(show("ExecStart"))


if show("ActiveState") in ("active", "activating", "deactivating"):
    print("it is running")
    sys.exit()
if not is_wanted():
    # A reload removes GPUs from containers that use the legacy hook.
    states = "--state=active,activating,deactivating"
    running = systemctl("list-units", "--plain", "--no-legend", states, "lem-campaign@*.service")
    if running:
        sys.exit(f"systemd must be reloaded, but a campaign runs here: {running.split()[0]}")
    subprocess.run(["systemctl", "reset-failed", unit], stderr=subprocess.DEVNULL, check=False)
    systemctl("daemon-reload")
    if not is_wanted():
        sys.exit(f"a drop-in changes the unit: {show('DropInPaths')}; systemd would run {show('ExecStart')}")
    print("reloaded")
if verb == "start":
    systemctl("start", "--no-block", unit)
    print("started")
