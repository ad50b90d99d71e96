"""A script that needs PyTorch, as a process of its own that waits while we work.

PyTorch is no dependency of gptlab, so the script runs in whatever Python has it. It says what it is
in one line of JSON when it is ready, and answers each order, a line of JSON, with another. It keeps
the memory that it frees, as our programs do.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from gptlab.run import program


class TorchProcess:
    """The running script; `about` is what it said of itself."""

    def __init__(self, python: str, script: str, *arguments: str):
        """Starts `script` of benchmarks/ and waits until it is ready.

        Raises:
          SystemExit: it ended, for want of PyTorch, say.
        """
        self._script, self._python = script, python
        kept = {name: str(value) for name, (_, value) in program.KEPT_MEMORY.items()}
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name(script)), *arguments],
            env={**os.environ, **kept},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = self._answer()

    def ask(self, **order: Any) -> dict[str, Any]:
        """Its answer to an order; SystemExit if it has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(
                f"{self._script} ended: are the packages that it needs in {self._python}?"
            )
        return json.loads(line)
