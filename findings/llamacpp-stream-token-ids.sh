#!/bin/bash
# llama.cpp's server (xllamacpp 2026.10.11549): a stream of /completion with return_tokens omits token ids.
#
# Without `stream`, the field `tokens` has the id of every generated token. With `stream`, a token whose bytes end within
# a character gets no event, since there is no text to send yet, and the event that completes the character has only the
# id of its last token. So the ids of a stream can be fewer than `tokens_predicted` in its last event, for the same seed
# and the same tokens. A client that counts ids counts too few tokens, and one that sends them on sends another text.
#
# The model here has random weights and one token per byte, so that many tokens are parts of characters.
#
# Seen:
#   without stream: 40 ids, tokens_predicted 40
#   with stream:    29 ids, tokens_predicted 40
#   the ids of the stream are those of the answer without stream, with 11 missing: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check 'xllamacpp==2026.10.11549' 'gguf==0.19.0' 'numpy<3'
cd "$folder"
env/bin/python - 2>server.log <<'PYTHON'
import http.client
import json
import sys

import gguf
import numpy as np
import xllamacpp

WIDTH, INNER, CONTEXT = 32, 64, 256
SPECIAL = ["<pad>", "<s>", "</s>"]


def alphabet():
    """The characters that stand for the 256 bytes in a byte-level BPE vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]


def write_model(path):
    """A Llama of one layer."""
    tokens = SPECIAL + alphabet()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(WIDTH)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * 256
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    draw = np.random.default_rng(7)
    shapes = {"token_embd": (len(tokens), WIDTH), "output": (len(tokens), WIDTH)}
    shapes |= {f"blk.0.attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (INNER, WIDTH), "blk.0.ffn_up": (INNER, WIDTH), "blk.0.ffn_down": (WIDTH, INNER)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (0.2 * draw.standard_normal(shape)).astype(np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ask(port, body):
    """The objects of an answer: one, or those of its events."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
    text = connection.getresponse().read().decode()
    if not body.get("stream"):
        return [json.loads(text)]
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]


def is_part_of(part, whole):
    """Whether `part` is `whole` with some elements left out."""
    rest = iter(whole)
    return all(item in rest for item in part)


write_model("model.gguf")
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.cpuparams.n_threads = "model.gguf", CONTEXT, 1
params.hostnames, params.port = ["127.0.0.1"], 0
server = xllamacpp.Server(params)
port = int(server.listening_address.rpartition(":")[2])
body = {"prompt": [1, 70, 71, 72], "n_predict": 40, "temperature": 1, "seed": 3, "ignore_eos": True}
body |= {"return_tokens": True, "cache_prompt": False}
(answer,) = ask(port, body)
events = ask(port, {**body, "stream": True})
streamed = [number for event in events for number in event.get("tokens", [])]
last = events[-1]["tokens_predicted"]
print(f"without stream: {len(answer['tokens'])} ids, tokens_predicted {answer['tokens_predicted']}")
print(f"with stream:    {len(streamed)} ids, tokens_predicted {last}")
missing = len(answer["tokens"]) - len(streamed)
is_part = is_part_of(streamed, answer["tokens"])
print(f"the ids of the stream are those of the answer without stream, with {missing} missing: {is_part}")
is_as_described = is_part and missing > 0 and last == answer["tokens_predicted"] == len(answer["tokens"]) == 40
sys.exit(0 if is_as_described else "this is no longer so")
PYTHON
