"""A connection to a host that is not there: Ansible's controller works as always, and the answers cost nothing.

It reads the module and its arguments from what Ansible sends, and answers as a host would on which all of it works. The
folder LEMTEST_FLEET holds what hosts differ in: `<host>.json` with `dead_after` (how many exchanges; `poll`: the first
one of these), `back_after` (how many that failed), `states` of its unit, one for each poll, `problems` for which it is
not fit, `latency_s` of a poll, `is_tampered` (a byte of what is fetched changes); and `<host>.tar.gz`, its results.
Every exchange is a line of `<host>.log`.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import time
from pathlib import Path

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.connection import ConnectionBase

DOCUMENTATION = """
    name: lemtest_fleet
    short_description: answers for a host that is not there
    description: answers for a host that is not there
    author: lem contributors
    extends_documentation_fragment:
        - connection_pipelining
    options: {}
"""

_MODULE = re.compile(rb"""(?:modname|module_fqn)\s*=\s*'([\w.]+)'""")
_OLD_MODULE = re.compile(rb"""runpy\.run_module\(mod_name='([\w.]+)'""")
_PARAMS = re.compile(rb"""^\s*(?:params=|ANSIBALLZ_PARAMS = )('.*'|".*"),?$""", re.MULTILINE)


class Connection(ConnectionBase):  # type: ignore[misc]
    transport = "lemtest_fleet"
    has_pipelining = True

    def _connect(self):
        self.folder = Path(os.environ["LEMTEST_FLEET"])
        self.host = self._play_context.remote_addr
        path = self.folder / f"{self.host}.json"
        self.described = json.loads(path.read_text()) if path.exists() else {}
        self._connected = True
        return self

    def close(self):
        self._connected = False

    def reset(self):
        pass

    def _count(self, name: str) -> int:
        """How often before; a host has one worker at a time."""
        path = self.folder / f"{self.host}.{name}"
        size = path.stat().st_size if path.exists() else 0
        with path.open("ab") as stream:
            stream.write(b"x")
        return size

    def _must_answer(self):
        dead_after = self.described.get("dead_after")
        if dead_after is None:
            return
        was_polled = (self.folder / f"{self.host}.polls").exists()
        if not was_polled if dead_after == "poll" else self._count("asked") < dead_after:
            return
        if self._count("failed") < self.described.get("back_after", 10**9):
            raise AnsibleConnectionFailure(f"connect to host {self.host} port 22: No route to host")

    def exec_command(self, cmd, in_data=None, sudoable=True):
        super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
        begin_s = time.monotonic()
        self._must_answer()
        module, arguments = _sent(in_data)
        words = arguments.get("argv") or [str(cmd if module == "raw" else arguments.get("_raw_params", ""))]
        what = " ".join(map(str, words))
        answer = self._answer(module, arguments, what, str(cmd))
        is_poll = "StatusText" in what
        if is_poll:
            time.sleep(self.described.get("latency_s", 0))
            sent = self.folder / f"poll.{module}"
            if not sent.exists():
                sent.write_text(json.dumps([str(cmd), (in_data or b"").decode()]))
        line = [begin_s, time.monotonic(), "poll" if is_poll else module, what[:2000]]
        with (self.folder / f"{self.host}.log").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        if isinstance(answer, str):
            return 0, answer.encode(), b""
        return 0, json.dumps(answer).encode(), b""

    def _answer(self, module, arguments, what, cmd):
        if module == "raw":
            return self._raw(cmd)
        if module == "command":
            return {"rc": 0, "stdout": self._output(what), "stderr": "", "changed": True, "cmd": what}
        if module == "stat":
            return {"changed": False, "stat": self._stat(str(arguments["path"]), arguments)}
        if module == "setup":
            facts = {"distribution": "Debian", "distribution_version": "12", "service_mgr": "systemd", "pkg_mgr": "apt"}
            return {"ansible_facts": {f"ansible_{name}": value for name, value in facts.items()}, "changed": False}
        if module == "ping":
            return {"ping": "pong", "changed": False}
        if module == "find":
            return {"files": [], "matched": 0, "examined": 0, "changed": False}
        if module == "tempfile":
            return {"path": f"/tmp/{self.host}", "changed": True}
        if module == "slurp":
            return {"content": "", "encoding": "base64", "changed": False}
        return {"changed": True, "dest": str(arguments.get("dest", "")), "checksum": "", "status": {}}

    def _raw(self, cmd):
        archive = self.folder / f"{self.host}.tar.gz"
        if "StatusText" in cmd:
            return self._unit()
        if "problem=" in cmd:
            return "".join(f"problem={text}\n" for text in self.described.get("problems", []))
        if "campaigns=yes" in cmd:
            return "groups=\n"
        if "secret=" in cmd:
            return "state=inactive\n"
        if "lem-collect-" in cmd and "mktemp" in cmd:
            digest = hashlib.sha256(archive.read_bytes()).hexdigest() if archive.exists() else ""
            return f"{digest}  /tmp/lem-collect-x/results.tar.gz\n" if digest else ""
        return "/tmp/x=/tmp/x\n" if "ansible-tmp" in cmd else ""

    def _output(self, what):
        if "StatusText" in what:
            return self._unit()
        if "unit.py" in what:
            return "reloaded\nstarted\n"
        if "--property=ActiveState" in what:
            return "inactive"
        if "version_info" in what:
            return "3.11.2"
        if "disk_usage" in what:
            return "99999999\n99999999"
        return ""

    def _unit(self):
        states = self.described.get("states", ["inactive"])
        state = states[min(self._count("polls"), len(states) - 1)]
        return f"ActiveState={state}\nResult=success\nExecMainStatus=0\nStatusText=\n"

    def _stat(self, path, arguments):
        archive = self.folder / f"{self.host}.tar.gz"
        if path.endswith("results.tar.gz") and archive.exists():
            algorithm = arguments.get("checksum_algorithm") or arguments.get("checksum_algo") or "sha1"
            checksum = hashlib.new(algorithm, self._archive()).hexdigest()
            return {"exists": True, "isdir": False, "isreg": True, "checksum": checksum}
        if path.endswith("/results"):
            return {"exists": archive.exists(), "isdir": True}
        return {"exists": False}

    def put_file(self, in_path, out_path):
        pass

    def fetch_file(self, in_path, out_path):
        Path(out_path).write_bytes(self._archive())

    def _archive(self):
        """As it arrives."""
        data = (self.folder / f"{self.host}.tar.gz").read_bytes()
        return data[:-1] + bytes([data[-1] ^ 1]) if self.described.get("is_tampered") else data


def _sent(in_data):
    if not in_data:
        return "raw", {}
    name, text = _OLD_MODULE.search(in_data) or _MODULE.search(in_data), _PARAMS.search(in_data)
    if name is None or text is None:
        raise ValueError(f"not a module as this Ansible sends it: {in_data[-2000:]!r}")
    arguments = json.loads(ast.literal_eval(text[1].decode()))["ANSIBLE_MODULE_ARGS"]
    return name[1].decode().rpartition(".")[2], arguments
