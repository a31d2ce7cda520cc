"""lem's side of `tests.bench.client`: one load in a process of its own, and what it reports, as JSON.

python -m tests.bench.client_side PORT CONCURRENCY REQUESTS TOKENS TEXTS
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import sys

from lem.engines.server.client import Call, LoadClient, Target


def main(port: str, *numbers: str) -> None:
    concurrency, requests, tokens, texts = map(int, numbers)
    target = Target(f"http://127.0.0.1:{port}/v1/completions", warm_path="/health", keeps_texts=bool(texts))
    options = {"max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
    call = Call(json.dumps({"model": "m", "prompt": "hi " * 8, **options}), tokens, tokens)
    with LoadClient(target) as client:
        result = client.run_all([call] * requests, concurrency, lambda _: None)
    good = [reply for reply in result.replies if reply.error is None and reply.sent_ns is not None]
    ttft_ns = sum(it.times_ns[0] - (it.sent_ns or 0) for it in good) / len(good)
    gaps = (after - before for it in good for before, after in itertools.pairwise(it.times_ns))
    icl_us = collections.Counter(gap // 1000 for gap in gaps)
    enough, below = icl_us.total() * 0.99, itertools.accumulate(icl_us[gap] for gap in sorted(icl_us))
    p99_us = next(gap for gap, count in zip(sorted(icl_us), below, strict=True) if count >= enough)
    found = {"good": len(good), "ttft_ms": ttft_ns / 1e6, "icl_p99_ms": p99_us / 1e3}
    if texts:  # every token is the time at which it was sent
        added_ns = sorted(at - int(text) for it in good for at, text in zip(it.times_ns, it.texts or (), strict=True))
        found["added_p99_us"] = added_ns[len(added_ns) * 99 // 100] / 1e3
    check = dataclasses.asdict(result.check)
    print(json.dumps({**found, "bound": result.bound and result.bound.text, "check": check}))


if __name__ == "__main__":
    main(*sys.argv[1:])
