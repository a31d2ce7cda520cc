"""A server that replays the exchanges of one dialect (`servers/DIALECT.json`), as a program that lem can start.

The exchanges of vllm and llamacpp were seen on the real servers; the others were written by their documentation. Every
answer has four tokens, whatever is asked.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SERVERS = Path(__file__).parent / "servers"
ANSWER_TOK = 4


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.handle_any(b"")

    def do_POST(self) -> None:
        self.handle_any(self.rfile.read(int(self.headers["Content-Length"])))

    def handle_any(self, body: bytes) -> None:
        options, key = self.server.options, f"{self.command} {self.path}"
        if options.key and self.headers.get("Authorization") != f"Bearer {os.environ[options.key]}":
            return self.send_text(401, "no key")
        with self.server.lock:
            self.server.looks += self.command == "GET"
            is_loading = self.server.looks <= options.ready_after
        if is_loading:
            return self.send_text(503, "loading")
        answer = self.server.answers.get(key)
        if answer is None or self.path == options.missing:
            return self.send_text(404, "not here")
        if "events" in answer:
            return self.stream(answer, json.loads(body))
        if "json" in answer:
            return self.send_text(200, json.dumps(answer["json"]))
        return self.send_text(200, answer["text"].replace("{output_tok}", str(ANSWER_TOK * self.server.answered)))

    def stream(self, answer: dict[str, Any], body: dict[str, Any]) -> None:
        with self.server.lock:
            self.server.asked += 1
            if self.server.options.log:
                with Path(self.server.options.log).open("a", encoding="utf-8") as log:
                    log.write(json.dumps(body) + "\n")
            if self.server.asked == self.server.options.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        lines = [f"{answer.get('start', 'data: ')}{json.dumps(event)}\n\n" for event in answer["events"]]
        for line in [*lines, *(["data: [DONE]\n\n"] if answer.get("done", True) else [])]:
            time.sleep(self.server.options.token_s)
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line.encode()), line.encode()))
        with self.server.lock:
            self.server.answered += 1
        self.wfile.write(b"0\r\n\r\n")

    def send_text(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        """Quiet."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__((options.host, options.port), Handler)
        self.options = options
        self.answers = json.loads((SERVERS / f"{options.dialect}.json").read_text(encoding="utf-8"))
        self.lock = threading.Lock()
        self.looks = self.asked = self.answered = 0


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--dialect", default="vllm")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--token-s", type=float, default=0.0, help="pause before each event")
    parser.add_argument("--log", help="file for the bodies of requests for answers")
    parser.add_argument("--key", help="the variable with the key that is required")
    parser.add_argument("--ready-after", type=int, default=0, help="looks that are answered with 503 first")
    parser.add_argument("--missing", help="a path to answer with 404")
    parser.add_argument("--die-at", type=int, help="be killed by this request for an answer")
    parser.add_argument("--say", help="print this and exit with 1")
    parser.add_argument("--signal", type=int, help="end by this signal")
    parser.add_argument("--child", action="store_true", help="start a process in a session of its own")
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--enable-prefix-caching", action="store_true")
    parser.add_argument("--cache-prompt", action="store_true")
    options = parser.parse_args()
    if options.say:
        print(options.say, file=sys.stderr)
        return 1
    if options.signal:
        os.kill(os.getpid(), options.signal)
    if options.child:
        subprocess.Popen(["sleep", "1000"], start_new_session=True)
    Server(options).serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
