#!/usr/bin/env python3
"""llama.cpp's own HTTP server, from the package xllamacpp, with the options of the program `llama-server`.

Only the options that the tests use exist here, each with the name and the default of `llama-server`. It needs no other
package, so the same file runs on the host and in a container.
"""

from __future__ import annotations

import argparse
import signal
import sys

CACHE_TYPES = ("f32", "f16", "q8_0", "q4_0")
WHOLE = {"-c": "ctx-size", "-np": "parallel", "-b": "batch-size", "-ub": "ubatch-size", "-t": "threads"}
FIELDS = {"ctx_size": "n_ctx", "parallel": "n_parallel", "batch_size": "n_batch", "ubatch_size": "n_ubatch"}


def main() -> int:
    """Serve until SIGTERM or SIGINT."""
    options = _parser().parse_args()
    import xllamacpp

    if options.version:
        print(f"version: {xllamacpp.BUILD_INFO}")
        return 0
    stops = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # before the server has threads
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.hostnames, params.port = [options.host], options.port
    if options.alias:
        params.model_alias = {options.alias}
    for option, field in FIELDS.items():
        if (value := getattr(options, option)) is not None:
            setattr(params, field, value)
    if options.threads is not None:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    if options.api_key is not None:
        params.api_keys = [options.api_key]
    for name in ("k", "v"):
        kind = getattr(options, f"cache_type_{name}").upper()
        setattr(params, f"cache_type_{name}", getattr(xllamacpp.ggml_type, f"GGML_TYPE_{kind}"))
    params.cont_batching, params.kv_unified = options.cont_batching, options.kv_unified
    params.cache_prompt, params.warmup = options.cache_prompt, options.warmup
    params.endpoint_metrics = options.metrics
    server = xllamacpp.Server(params)
    print(f"listening on {server.listening_address}", flush=True)
    signal.sigwait(stops)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llama-server", allow_abbrev=False)
    parser.add_argument("--version", action="store_true")
    parser.add_argument("-m", "--model", default="")
    parser.add_argument("-a", "--alias", default="")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--api-key")
    for short, name in WHOLE.items():
        parser.add_argument(short, f"--{name}", type=int)
    for short, name in (("-ctk", "cache-type-k"), ("-ctv", "cache-type-v")):
        parser.add_argument(short, f"--{name}", choices=CACHE_TYPES, default="f16")
    for name, default in (("cont-batching", True), ("cache-prompt", True), ("warmup", True), ("kv-unified", False)):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default)
    parser.add_argument("--metrics", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
