"""The server under 1, 2, 4, 8 and 16 clients, beside Hugging Face's `generate` behind a server.

    python -m benchmarks.serve --model=runs/quickstart [--torch=PYTHON]

Each client asks for one streamed reply after another over HTTP, each to a prompt of its own of
`prompt` tokens (no two share a beginning), and gets exactly `new` tokens: no token ends a reply
here. Reported are the tokens of all replies a second, the milliseconds until a reply's first token,
and `speedup`, the throughput beside that of one client, who asks one after another.

--torch names a Python with PyTorch and transformers, which are no dependencies of gptlab: the model
is exported, and serve_torch.py answers with one `generate` at a time, as plain servers do. It gets
and sends token ids, where we read and write text. The two take turns, with all cores for each.
Prints a table, then the same figures as one line of JSON; medians with quartiles over the rounds.
"""

import argparse
import asyncio
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from benchmarks import measure
from configs import common
from configs import convert as convert_config
from gptlab import convert
from gptlab.people import api, app
from gptlab.people import policy as policies
from gptlab.people.embedded import Embedded
from gptlab.people.engine import Options
from gptlab.run import program
from gptlab.train import mesh as mesh_lib

TEXT = Path(__file__).parents[1] / "README.md"  # what the prompts are made of
SHAPE = ("model", "dtype", "prompt", "new", "slots", "chunk", "requests")
Ask = tuple[str, bytes]  # path, body
Result = tuple[float, float, int]  # seconds to the first token, to the last, tokens


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a workdir with a model and a vocabulary")
    parser.add_argument("--torch", help="a Python with PyTorch and transformers")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clients", default="1,2,4,8,16", help="numbers of them, with commas")
    parser.add_argument("--requests", type=int, default=16, help="of all clients of a round")
    parser.add_argument("--prompt", type=int, default=48)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="turns that everything gets")
    parser.add_argument("--server", action="store_true", help="be the server that is measured")
    args = parser.parse_args()
    if args.new < 2 or args.requests < 1:
        parser.error("--new must be at least 2 and --requests at least 1")
    if args.server:
        serve(args)
        return
    clients = [int(count) for count in args.clients.split(",")]
    tokenizer = policies.find_tokenizer(policies.find(args.model))
    ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    prompts = (ids[at : at + args.prompt] for at in itertools.cycle(range(0, len(ids) // 2, 7)))
    figures: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)),
        "shape": {
            k: getattr(args, k) for k in ("model", "dtype", "prompt", "new", "slots", "chunk")
        },
    }
    with tempfile.TemporaryDirectory() as place:
        servers = {"gptlab": Server([sys.executable, "-m", "benchmarks.serve", "--server",
                                     *sys.argv[1:]])}  # fmt: skip
        try:
            if args.torch:
                servers["transformers"] = Server(torch_command(args, place))
                figures |= servers["transformers"].about
            asks = {"gptlab": ours(prompts, tokenizer, args), "transformers": theirs(prompts, args)}
            found: dict[tuple[str, int], list[Any]] = {
                (way, count): [] for way in servers for count in clients
            }
            for turn, (way, count) in itertools.product(range(args.rounds + 1), found):
                batch = list(itertools.islice(asks[way], max(count, args.requests)))
                result = asyncio.run(round_of(servers[way].port, batch, count))
                if turn:
                    found[way, count].append(result)
        finally:
            for server in servers.values():
                server.close()
    for way in servers:
        figures[way] = {f"clients_{n}": figures_of(found[way, n], found[way, 1] if 1 in clients
                                                   else None) for n in clients}  # fmt: skip
    print("\n".join(measure.table(figures)))
    print(json.dumps(figures))


def serve(args: argparse.Namespace) -> None:
    """The app of gptlab.serve around a model that never ends a reply by itself."""
    program.keep_freed_memory()
    program.enable_compilation_cache()

    def load(*given: Any) -> policies.Policy:
        policy = policies.load(*given)
        policy.end_tokens = ()
        return policy

    backend = Embedded(
        {"model": args.model},
        Options(args.slots, args.chunk, None, 1024),
        args.dtype,
        mesh_lib.make_mesh(common.mesh()),
        3600.0,
        None,
        load,
    )
    made = app.make(
        backend, check_key=None, limits=api.Limits(None, 1), max_body_bytes=1 << 20,
        body_seconds=60.0, allowed_hosts=("*",), drain_seconds=0.0,
    )  # fmt: skip
    listener = socket.create_server(("127.0.0.1", 0))
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
    uvicorn.run(made, fd=listener.fileno(), log_level="error")


class Server:
    """A server in a process of its own; its first line says its port and whatever else."""

    def __init__(self, command: list[str]):
        """Starts it and waits until everything is loaded."""
        kept = {name: str(value) for name, (_, value) in program.KEPT_MEMORY.items()}
        self._process = subprocess.Popen(
            command, env={**os.environ, **kept}, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(command)} ended before it served")
        self.about = json.loads(line)
        self.port = self.about.pop("port")

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()


def torch_command(args: argparse.Namespace, place: str) -> list[str]:
    """Exports the model, and says how to serve it."""
    config = convert_config.get_config("export")
    config.inputs.model = str(policies.find(args.model))
    convert.run(config, f"{place}/exported")
    script = Path(__file__).with_name("serve_torch.py")
    folder = f"{place}/exported/{convert.EXPORTED}"
    return [args.torch, str(script), f"--folder={folder}", f"--dtype={args.dtype}"]


def ours(prompts: Iterator[list[int]], tokenizer: Any, args: argparse.Namespace) -> Iterator[Ask]:
    """Requests to gptlab."""
    drawing = {"max_tokens": args.new, "temperature": 0.7}
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    for ids in prompts:
        body = {"model": "model", "prompt": tokenizer.decode(ids), **drawing, **streaming}
        yield "/v1/completions", json.dumps(body).encode()


def theirs(prompts: Iterator[list[int]], args: argparse.Namespace) -> Iterator[Ask]:
    """The same to serve_torch.py."""
    for ids in prompts:
        yield "/", json.dumps({"prompt": ids, "new": args.new, "temperature": 0.7}).encode()


async def round_of(port: int, asks: list[Ask], clients: int) -> tuple[float, list[Result]]:
    """Seconds until clients who share these requests have all replies, and each reply's times."""
    left, results = iter(asks), []

    async def client() -> None:
        for path, body in left:
            results.append(await ask(port, path, body))

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - start, results


async def ask(port: int, path: str, body: bytes) -> Result:
    """One streamed reply. A client costs the server's cores as little as it can: no library."""
    start, first, tokens = time.perf_counter(), None, 0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"the server answers {status!r}: {(await reader.read())[-500:]!r}")
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - start
            if b'"usage":{' in line:
                tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    writer.close()
    assert first is not None
    return first, time.perf_counter() - start, tokens


def figures_of(rounds: list[Any], alone: list[Any] | None) -> dict[str, Any]:
    """Throughput and waiting, over rounds of (seconds, results)."""
    rate = rates(rounds)
    firsts = 1e3 * np.array([first for _, results in rounds for first, _, _ in results])
    figures = {"tokens_per_sec": measure.spread(rate, 1), "first_token_ms": measure.spread(firsts)}
    if alone is not None:
        figures["speedup"] = measure.spread(rate / rates(alone), 2)
    return figures


def rates(rounds: list[Any]) -> np.ndarray:
    """Tokens a second of each round."""
    return np.array([sum(n for *_, n in results) / seconds for seconds, results in rounds])


if __name__ == "__main__":
    main()
