"""One step of VGS's Standard objective (reverse KL) beside TRL's DistillationTrainer with beta = 1: seconds and peak memory.

    pip install trl torchvision && python tests/bench_trl.py      (without a GPU: PYTHONPATH=tests/vllm_cpu python ...)

The models are the toy's, their vocabularies brought to one size, as TRL wants it: the student's, and a larger one. Both sample 64 responses of
exactly 64 tokens to the same questions about images (the end token is banned), in float32, and put 64 sequences through the models at once. Each runs in a process of its own; steps 5 to
20 count. Peak memory is the process's, less what it held before the models were loaded.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from peak import peak, resident  # noqa: E402

import common  # noqa: E402
import vgs  # noqa: E402

STEPS, FIRST, BATCH, LENGTH = 20, 5, 64, 64


def ours(student: str, teacher: str, rows) -> tuple[list[float], int, int]:
    """Seconds of each step, peak memory beyond the start's, response tokens of a step."""
    args = vgs.Args(student=student, teacher=teacher, method="standard", prompts=BATCH, max_response=LENGTH, micro_tokens=10**6, dtype="float32", engine="hf", lr=1e-6)
    common.start_distributed(args)
    processor, before, seconds = common.Processor(student), resident(), []
    models = common.load_models(args, processor, teacher, STEPS)
    models.engine.banned += models.engine.ends
    for step in range(STEPS):
        start = time.perf_counter()
        samples = vgs.rollout([rows[step * BATCH + i] for i in range(BATCH)], models, args)
        micros = vgs.score(samples, models, args)
        vgs.weigh(micros, args, 1.0)
        vgs.update(micros, models, args)
        models.engine.sync(models.student.weights())
        seconds.append(time.perf_counter() - start)
    return seconds, peak() - before, sum(len(s.response.ids) for s in samples)


def trl(student: str, teacher: str, rows) -> tuple[list[float], int, int]:
    """See ours."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    def chat(row: dict) -> dict:
        return {"prompt": [vgs.SYSTEM, {"role": "user", "content": row["problem"].replace("<image>", "")}], "images": row["images"]}

    class Clock(TrainerCallback):
        ends: list[float] = []

        def on_step_end(self, *_, **__):
            self.ends.append(time.perf_counter())

    questions = Dataset.from_list([chat(rows[i]) for i in range(STEPS * BATCH)])
    processor, clock, held = common.Processor(student), Clock(), resident()
    banned = [processor.tokenizer.eos_token_id, *processor.banned]  # a sampled image placeholder would stop its next forward pass
    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            folder, beta=1.0, max_completion_length=LENGTH, per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=1e-6, bf16=False,
            gradient_checkpointing=False, shuffle_dataset=False, save_strategy="no", report_to="none", logging_steps=STEPS, use_cpu=True, disable_tqdm=True,
            generation_kwargs={"suppress_tokens": banned, "min_new_tokens": LENGTH})
        trainer = DistillationTrainer(student, teacher, config, train_dataset=questions, callbacks=[clock])
        trainer.train()
    length = next(line["completions/mean_length"] for line in trainer.state.log_history if "completions/mean_length" in line)
    return [now - before for before, now in zip(clock.ends, clock.ends[1:])], peak() - held, round(length * BATCH)


def prepare(folder: Path, vocab: int) -> None:
    """The toy's student and teacher with `vocab` rows of embeddings each."""
    for name in ("student", "teacher"):
        source = common.locate(f"toy/{name}")
        shutil.copytree(source, folder / name)
        lm = common.Model(source, torch.float32).lm
        lm.resize_token_embeddings(vocab, mean_resizing=False)
        lm.save_pretrained(folder / name)


def main() -> None:
    if len(sys.argv) > 1:  # one side of the comparison
        _, folder, side = sys.argv
        seconds, memory, tokens = {"ours": ours, "trl": trl}[side](f"{folder}/student", f"{folder}/teacher", common.Rows("toy/train", "train", {"problem": "problem"}))
        print(json.dumps({"seconds": statistics.median(seconds[FIRST:]), "memory": memory, "tokens": tokens}))
        return
    for vocab in (512, 32_768):
        results = {}
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), vocab)
            for side in ("ours", "trl"):
                output = subprocess.run([sys.executable, __file__, folder, side], stdout=subprocess.PIPE, text=True, check=True).stdout
                results[side] = json.loads(output.splitlines()[-1])
                print(f"vocabulary {vocab:6,}  {side:5} {results[side]['seconds']:8.3f} s a step {results[side]['memory'] / 2**20:8.0f} MiB {results[side]['tokens']} tokens")
        print("ours / TRL's:", *(f"{results['ours'][key] / results['trl'][key]:.2f} ({key})" for key in ("seconds", "memory")))


if __name__ == "__main__":
    main()
