"""Hugging Face's `generate` behind a plain server: what benchmarks/serve.py compares itself with.

    python benchmarks/serve_torch.py --folder=PATH/TO/hf

Needs PyTorch and transformers only, so it runs in any Python. The first line of its output says
its port. POST {"prompt": ids, "new": number of tokens, "temperature": number} is answered by a
stream of events, one for each token, and one with the usage. One reply at a time: others wait.
"""

import argparse
import http.server
import json
import threading
from typing import Any

import torch
import transformers


class Stream:
    """What `generate` hands its tokens to: the prompt first, then one by one."""

    def __init__(self, write: Any):
        self._write, self.count = write, -1

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, or a token."""
        self.count += 1
        if self.count:
            self._write({"token": value.tolist()})

    def end(self) -> None:
        """There are no more."""


def handler(model: Any) -> type[http.server.BaseHTTPRequestHandler]:
    """Answers with the model's replies."""
    alone = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            """One reply."""
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            with alone:
                reply(model, asked, self._event)

        def _event(self, body: dict[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n")

        def log_message(self, *arguments: Any) -> None:
            """Says nothing."""

    return Handler


@torch.inference_mode()
def reply(model: Any, asked: dict[str, Any], write: Any) -> None:
    """Writes a reply of exactly `new` tokens."""
    ids, stream = torch.tensor([asked["prompt"]]), Stream(write)
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, streamer=stream,
        temperature=asked["temperature"], min_new_tokens=asked["new"], max_new_tokens=asked["new"],
    )  # fmt: skip
    write({"usage": {"completion_tokens": stream.count}})


def main() -> None:
    """Serves until it is killed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True, help="what gptlab.convert exports")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.folder, dtype=getattr(torch, args.dtype)
    ).eval()
    # Nothing ends a reply; nor is a token forbidden, as min_new_tokens would an end.
    model.generation_config.eos_token_id = None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(model))
    about = {
        "port": server.server_address[1],
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(about), flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
