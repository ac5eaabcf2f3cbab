#!/usr/bin/env python3
"""Stands in for ssh in tests: runs the command for a node's shell on this machine, with that node's faults.

`fake_ssh.py FAULTS NAME COMMAND`. FAULTS is a JSON file: name -> {"delay": seconds, "say": text for stderr, "status": ends
with it, "hang": seconds, "env": variables, "replace": [[old, new], ...] in the command}. Every node gets an address of its
own in 127.0.1.0/24, as an ssh connection would tell it, and gloo connects them all by `lo` unless its variable is set.
"""

import json
import os
import sys
import time

with open(sys.argv[1]) as file:
    fault = json.load(file).get(sys.argv[2], {})
time.sleep(fault.get("delay", 0.05))
if "say" in fault:
    print(fault["say"], file=sys.stderr)
if "hang" in fault:
    time.sleep(fault["hang"])
if "status" in fault:
    sys.exit(fault["status"])
command = sys.argv[3]
for old, new in fault.get("replace", []):
    command = command.replace(old, new)
number = int("".join(c for c in sys.argv[2] if c.isdigit()))
os.environ["SSH_CONNECTION"] = f"127.0.0.1 1 127.0.1.{number} 22"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.update(fault.get("env", {}))
os.execv("/bin/sh", ["sh", "-c", command])
