"How the scripts of this folder measure: processor time of one thread, arms in turn, memory in a process of its own."
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch


def header(columns):
    "The machine, and the head of a Markdown table."
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
          f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread of {os.cpu_count()} cores, "
          f"load {os.getloadavg()[0]:.1f}\n")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))


def row(*cells): print("| " + " | ".join(x if isinstance(x, str) else f"{x:.3g}" for x in cells) + " |", flush=True)


def in_turn(arms, rounds=5):
    "Name → function; name → the median of its processor seconds. Each is called once before, which is not counted."
    seconds = {name: [] for name in arms}
    for i in range(rounds + 1):
        for name, f in arms.items():
            start = time.process_time()
            f()
            if i: seconds[name].append(time.process_time() - start)
    return {name: statistics.median(x) for name, x in seconds.items()}


def resident():
    with open("/proc/self/statm") as f: return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30


def apart(script, *args):
    "What `script` prints last, as JSON, run with these arguments in a process of its own."
    out = subprocess.run([sys.executable, script, *map(str, args)], capture_output=True, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def once(f):
    "Processor seconds of a call, and the GiB that it held at most beyond what was there."
    before, start = resident(), time.process_time()
    f()
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "GiB": peak - before}
