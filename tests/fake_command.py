"""Stands in for a command (gcloud, sbatch, srun, ...) in the tests of the launch scripts.

    python -IS fake_command.py NAME ARGUMENT ...

Appends the command line to $FAKE_CALLS, and answers by the first rule of $FAKE_SCENARIO,
[[pattern, [reply, ...]], ...], whose pattern is found in it: the n-th call of a pattern gets its
n-th reply or the last one, {"out", "err", "code"}.
"""

import json
import os
import re
import sys

line = " ".join(sys.argv[1:])
with open(os.environ["FAKE_CALLS"], "a+") as file:
    file.seek(0)
    earlier = file.read().splitlines()
    file.write(line.replace("\n", "\\n") + "\n")
with open(os.environ["FAKE_SCENARIO"]) as file:
    scenario = json.load(file)
for pattern, replies in scenario:
    if re.search(pattern, line):
        done = sum(bool(re.search(pattern, call)) for call in earlier)
        reply = replies[min(done, len(replies) - 1)]
        sys.stdout.write(reply.get("out", ""))
        sys.stderr.write(reply.get("err", ""))
        sys.exit(reply.get("code", 0))
