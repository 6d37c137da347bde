"""How the models of tools/toy_weights were trained.

    python -m tools.toy --rebuild     trains all of them into the cache, in about 15 minutes
    python -m tools.toy --store       does the same, measures them, and puts them into tools/toy_weights as float16

What is stored are ordinary checkpoints, with their own configs and tokenizers. recipe.json beside them says what they
were trained with (toy_lessons.recipe), how large they are, and their accuracies on the 400 held-out rows.
"""

import functools
import json
import random
import shutil
from pathlib import Path

import common
import vgs
from tools import toy, toy_lessons
from tools.toy_lessons import COURSES, SIZES, TRAINED_ON, Course, prompt_of, response_of

import torch
from torch import Tensor


# =============================================================================================== models
@functools.cache
def tokenizer():
    """One for all models, from the texts of 600 rows in every context."""
    texts = []
    for row in toy.make_rows(*toy.scans()["train"], 600, seed=1, jitter=True):
        for context, style in toy_lessons.CONTEXTS.values():
            texts += ["system\nuser\nassistant\n", vgs.SYSTEM["content"][0]["text"]]
            for turn in context(row).messages:
                if turn["role"] == "user":
                    texts += [part["text"] for part in turn["content"]]
            texts.append(toy.respond(row, style))
    return toy.make_tokenizer(texts)


def begin(model: str, root: Path, folder: Path, family: str):
    """Write the checkpoint that a model's training starts from; root: where earlier ones are."""
    if model in TRAINED_ON:
        shutil.copytree(root / TRAINED_ON[model], folder)
    else:
        sees = SIZES[model]["vision"] > 0
        kind = family if sees else "qwen3"
        toy.make_model(kind, tokenizer(), **SIZES[model]).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        if sees:
            toy.image_processor(kind).save_pretrained(folder)
    if model.startswith("zoom/"):
        processor = common.Processor(str(folder))
        strip = 3 * toy.SIDE**2  # every picture is seen as large as a strip
        processor.images.size = {"shortest_edge": strip, "longest_edge": strip}
        processor.images.save_pretrained(folder)
        processor.tokenizer.add_tokens(toy_lessons.CALL_WORDS)
        processor.tokenizer.save_pretrained(folder)


# =============================================================================================== training
def next_token(logits: Tensor, ids: Tensor) -> tuple[Tensor]:
    """Negative log-likelihood [n] of the given tokens."""
    return (-common.gather(logits.log_softmax(-1), ids),)


def backward(model: common.Model, processor: common.Processor, examples: list[tuple]) -> float:
    """Add the gradient of the mean loss over the responses' tokens. examples: (prompt, response) each."""
    tokens = sum(len(response.ids) for _, response in examples)
    ordered = sorted(examples, key=lambda pair: len(pair[0].ids) + len(pair[1].ids))
    total = 0.0
    for part in common.split(ordered, 2):  # short and long ones apart: less padding
        prompts, responses = zip(*part)
        ids = torch.tensor([token for response in responses for token in response.ids])
        weights = torch.full((1, len(ids)), 1 / tokens)

        def loss_fn(hidden, head, ids=ids, weights=weights):
            return common.vocab_loss(next_token, weights, [hidden], head, extras=[ids], chunk=4096)

        loss, _ = model(processor.batch(prompts, responses, images=False), loss_fn)
        loss.backward()
        total += loss.item()
    return total


def train(folder: Path, rows: list[dict], course: Course, title: str):
    """Train the checkpoint in `folder`; the result takes its place."""
    from tqdm import tqdm

    processor = common.Processor(str(folder))
    model = common.Model(str(folder), torch.float32)
    settings = common.Args(rollout_batch=256, dtype="float32")
    engine = common.HFEngine(str(folder), processor, settings) if course.stop else None
    betas = (0.9, 0.98)
    optimizer = torch.optim.AdamW(model.parameters(), course.lr, betas, weight_decay=0.01)
    mixes = [mix for steps, mix in course.phases for _ in range(steps)]

    def factor(step: int) -> float:
        decay = 1.0 if course.stop else 1.02 - step / len(mixes)
        return min((step + 1) / 30, decay)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    rng = random.Random(0)

    @functools.cache
    def example(i: int, lesson: str) -> tuple:
        row = rows[i]
        return prompt_of(lesson, row, processor), response_of(lesson, row, processor)

    bar = tqdm(mixes, desc=title, unit="step", mininterval=5)
    for step, mix in enumerate(bar):
        examples = []
        for _ in range(course.batch):
            i = rng.randrange(len(rows))
            [lesson] = rng.choices(list(mix), mix.values())
            examples.append(example(i, lesson))
        loss = backward(model, processor, examples)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if course.stop and step % 10 == 9:
            engine.sync(model.weights())
            asked = rows[:400]
            responses = engine.generate([processor.encode(vgs.with_image(row)) for row in asked])
            right = map(common.is_right, responses, asked)
            if sum(right) >= course.stop * len(asked):
                break
    model.lm.save_pretrained(folder)  # beside the tokenizer and the image processor that are there


def rebuild_part(part: str, root: Path, family: str, folder: Path):
    """Write a part's rows and newly trained models into `folder`."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    rows = toy.ROWS[part]()
    for name in rows:
        toy.write(rows[name], folder / name)
    lessons = toy_lessons.complete(rows["train"])
    if part == "captions":
        lessons = toy_lessons.caption_lessons()
    models = [model for model in COURSES if model.startswith(f"{part}/")]
    for model in models:
        begin(model, root, folder / Path(model).name, family)
    for model in models:
        train(folder / Path(model).name, lessons, COURSES[model], model)


def rebuild(family: str, keep: bool) -> Path:
    """Train all models in a folder of the cache, which is returned; keep: put them into tools/toy_weights too."""
    files = [Path(module.__file__) for module in (toy, toy_lessons)]
    code = toy.digest(Path(__file__), *files)
    root = toy.in_cache(f"toy-{family}-rebuilt-{toy_lessons.recipe(family)}-{code[:10]}")
    for part in toy.ROWS:
        toy.once(root / part, functools.partial(rebuild_part, part, root, family))
    if keep:
        store(root)
    return root


# =============================================================================================== store
MEASURED = {
    "main/teacher": [
        "see",
        "hint",
        "solution",
        "see_first",
        "solution_first",
        "blind",
    ],
    "main/student": ["see", "ask", "hint"],
    "main/text-teacher": ["text"],
    "captions/student": ["describe_first"],
    "math/teacher": ["ask_text"],
    "math/student": ["ask_text"],
    "zoom/teacher": ["zoomed"],
    "zoom/student": ["zoomed"],
}


def answers(folder: Path, lesson: str, rows: list[dict]) -> list[str]:
    """A checkpoint's greedy responses to the rows."""
    processor = common.Processor(str(folder))
    settings = common.Args(dtype="float32", rollout_batch=200)
    engine = common.HFEngine(str(folder), processor, settings)
    prompts = [prompt_of(lesson, row, processor) for row in rows]
    return [response.text for response in engine.generate(prompts)]


def accuracy(texts: list[str], rows: list[dict]) -> float:
    right = 0
    for text, row in zip(texts, rows):
        right += common.is_correct(common.extract_answer(text), row["answer"])
    return right / len(rows)


@functools.cache
def held_out(part: str) -> list[dict]:
    return toy_lessons.complete(toy.ROWS[part]()["test"])


def measure(model: str, folder: Path) -> dict[str, float]:
    """Accuracy of a checkpoint on its part's held-out rows, by lesson."""
    rows = held_out(model.split("/")[0])
    return {lesson: accuracy(answers(folder, lesson, rows), rows) for lesson in MEASURED[model]}


def store(root: Path):
    """Put the models of a rebuild into tools/toy_weights, as float16, and what is known of them into recipe.json."""
    from safetensors.torch import load_file, save_file

    models = {}
    for model in COURSES:
        folder = toy.WEIGHTS / model
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(root / model, folder)
        file = folder / "model.safetensors"
        weights = {name: value.half() for name, value in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
        models[model] = {
            "sha256": toy.digest(file),
            "bytes": file.stat().st_size,
            "accuracy": measure(model, folder),
        }
    text = json.dumps({"recipe": toy_lessons.recipe(), "models": models}, indent=2)
    (toy.WEIGHTS / "recipe.json").write_text(f"{text}\n")
