"How long `import capo` takes beyond torch, in a fresh process each: python benchmarks/imports.py"
import statistics
import subprocess
import sys

from measure import header, row

CODE = "import time; import torch; start = time.process_time(); import {}; print(time.process_time() - start)"


def seconds(module): return float(subprocess.check_output([sys.executable, "-c", CODE.format(module)]).splitlines()[-1])


if __name__ == "__main__":
    header(["import, beyond torch", "s"])
    for module in ("capo", "capo.rollout", "capo.train"):
        row(module, statistics.median(seconds(module) for _ in range(5)))
