"""Worker of test_loading.py: what a model takes in memory while it is loaded, over all ranks together.

torchrun --nproc-per-node N tests/loading.py CHECKPOINT OUT
"""

import json
import re
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402


def own_memory(process) -> int:
    """Bytes of a process that are no file's."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


def main():
    checkpoint, out = sys.argv[1:]
    args = common.Args(student=checkpoint, dtype="bfloat16")
    common.start_ranks(args)
    # what these take is no model's
    import transformers  # noqa: F401
    from transformers import AutoModelForImageTextToText  # noqa: F401

    common.Model(checkpoint, torch.float32, empty=True)  # and neither are the classes
    ranks = common.all_gather_object(Path("/proc/self").resolve().name)
    before = sum(map(own_memory, ranks))
    peak, done = [before], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], sum(map(own_memory, ranks)))
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    if common.rank() == 0:
        thread.start()
    model = common.load_model(checkpoint, args, trained=True)
    common.all_gather_object(None)
    done.set()
    copy = sum(4 * p.numel() for p in model.parameters())
    sums = {name: float(value.detach().double().sum()) for name, value in model.weights()}
    if common.rank() == 0:
        thread.join()
        found = {"copy": copy, "peak": peak[0] - before, "sums": sums}
        Path(out).write_text(json.dumps(found))
    common.all_gather_object(None)


if __name__ == "__main__":
    common.launch(main)
