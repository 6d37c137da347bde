"""One step of VGS's Standard objective (reverse KL) beside TRL's DistillationTrainer, beta = 1: seconds, peak memory.

    pip install trl torchvision && python tests/bench_trl.py   (without a GPU: PYTHONPATH=tests/vllm_cpu python ...)

The models are the toy's, their vocabularies brought to one size, as TRL wants it: the student's, and a larger one. Both
sample 64 responses of exactly 64 tokens to the same questions about images (the end token is banned), in float32, and
put 64 sequences through the models at once. Each runs in a process of its own; steps 5 to 20 count. Peak memory is the
process's, less what it held before the models were loaded.
"""

import json
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import vgs  # noqa: E402

STEPS, FIRST, BATCH, LENGTH = 20, 5, 64, 64


def resident() -> int:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """Bytes that this process has held at most; ru_maxrss is its parent's as well."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def ours(student: str, teacher: str, folder: Path) -> tuple[list[float], int, int]:
    """Seconds of each step, peak memory beyond the start's, response tokens of a step."""
    args = vgs.Args(
        student=student,
        teacher=teacher,
        gamma=0.0,
        lambda_lp=0.0,
        prompts=BATCH,
        max_response=LENGTH,
        max_steps=STEPS,
        eval_every=0,
        micro_tokens=10**6,
        dtype="float32",
        engine="hf",
        output=str(folder / "run"),
    )
    run = common.Run("vgs", args)
    processor, train, before = common.Processor(student), questions(student), resident()
    run.load(processor, teacher)
    run.processor.banned += run.engine.ends
    seconds, start = [], None
    for _ in run.steps(train, None, vgs.with_image):
        if start is not None:  # the step before ends with the push of its weights
            seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        samples = vgs.rollout(run.draw(), run, args)
        micros = vgs.score(samples, run, args)
        vgs.weigh(micros, run, args)
        run.log(vgs.update(micros, run, args))
    return seconds, peak() - before, sum(len(s.response.ids) for s in samples)


def trl(student: str, teacher: str, folder: Path) -> tuple[list[float], int, int]:
    """See ours."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    class Clock(TrainerCallback):
        ends: list[float] = []

        def on_step_end(self, *_, **__):
            self.ends.append(time.perf_counter())

    rows, chats = questions(student), []
    for i in range(STEPS * BATCH):
        turn = {"role": "user", "content": rows[i]["problem"].replace("<image>", "")}
        system = {"role": "system", "content": vgs.SYSTEM["content"][0]["text"]}
        chats.append({"prompt": [system, turn], "images": rows[i]["images"]})
    processor, clock, held = common.Processor(student), Clock(), resident()
    # a sampled image placeholder would stop its next forward pass
    banned = [processor.tokenizer.eos_token_id, *processor.banned]
    config = DistillationConfig(
        str(folder / "trl"),
        beta=1.0,
        max_completion_length=LENGTH,
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=1e-6,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        save_strategy="no",
        report_to="none",
        logging_steps=STEPS,
        use_cpu=True,
        disable_tqdm=True,
        generation_kwargs={"suppress_tokens": banned, "min_new_tokens": LENGTH},
    )
    data = Dataset.from_list(chats)
    trainer = DistillationTrainer(student, teacher, config, train_dataset=data, callbacks=[clock])
    trainer.train()
    name = "completions/mean_length"
    length = next(line[name] for line in trainer.state.log_history if name in line)
    seconds = [now - before for before, now in zip(clock.ends, clock.ends[1:])]
    return seconds, peak() - held, round(length * BATCH)


def questions(student: str):
    args = common.Args(data="toy/train")
    return common.load_rows(args, common.Processor(student), {}, "problem images answer")


def prepare(folder: Path, vocab: int):
    """The toy's student and teacher with `vocab` rows of embeddings each."""
    for name in ("student", "teacher"):
        source = common.locate(f"toy/{name}")
        shutil.copytree(source, folder / name)
        lm = common.Model(source, torch.float32).lm
        lm.resize_token_embeddings(vocab, mean_resizing=False)
        lm.save_pretrained(folder / name)


def main():
    if len(sys.argv) > 1:  # one side of the comparison
        folder, side = Path(sys.argv[1]), {"ours": ours, "trl": trl}[sys.argv[2]]
        seconds, memory, tokens = side(f"{folder}/student", f"{folder}/teacher", folder)
        found = {"seconds": statistics.median(seconds[FIRST:]), "memory": memory}
        print(json.dumps(found | {"tokens": tokens}))
        return
    for vocab in (512, 32_768):
        results = {}
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), vocab)
            for side in ("ours", "trl"):
                argv = [sys.executable, __file__, folder, side]
                output = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True).stdout
                found = results[side] = json.loads(output.splitlines()[-1])
                print(
                    f"vocabulary {vocab:6,}  {side:5} {found['seconds']:8.3f} s a step "
                    f"{found['memory'] / 2**20:8.0f} MiB {found['tokens']} tokens"
                )
        for key in ("seconds", "memory"):
            print(f"ours / TRL's: {results['ours'][key] / results['trl'][key]:.2f} ({key})")


if __name__ == "__main__":
    main()
