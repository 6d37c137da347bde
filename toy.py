"""The embedded default: real handwriting and small real models, written as ordinary data sets and checkpoints.

    python toy.py                         builds into ~/.cache/cleanopd (or $CLEANOPD_CACHE) and prints the folder
    python toy.py --family qwen2_5_vl     the same with Qwen2.5-VL classes

A question shows a strip of three of the 1,797 handwritten digits that scikit-learn ships (8 x 8 scans, enlarged to 32 x 32
pixels) and asks for a sum, a difference, the largest digit, ... Seeing is hard and reasoning is easy, and the two can be told apart in the
answer: a wrong digit is an error of perception, a wrong sum one of reasoning. The digits are split by image: no scan of the
held-out strips occurs in training.

    train/ test/     columns problem, images, answer, solution, hint, text_problem
    teacher/         Qwen3-VL (or 2.5), trained on solutions in every context that a method gives its teacher
    student/         the same classes, smaller, stopped when it answers about half of its questions
    text-teacher/    a Qwen3 language model with the same tokenizer, which reads text_problem
    captions/        built when it is first asked for (ViGOS): the same questions under a caption that may name a wrong digit.
                     train/ test/; conflict/: three strips a question and caption, of which the first alone is as the caption says;
                     student/: the student, trained on to describe first, and to believe captions
    zoom/            built when it is first asked for (Reopold with image tools): strips on a card in one of nine places of a picture twenty times
                     as wide, seen as small as a strip: too small to read without zooming in. train/ test/, teacher/ and student/, trained on to zoom
    math/            built when it is first asked for (Reopold on text alone): train/ test/ with the digits named in the question,
                     teacher/: text-teacher/, trained on in Reopold's prompt, student/: a smaller one, half-trained

No method imports this file. They load what it writes with the code that loads Qwen and a hub data set.
"""

import argparse
import fcntl
import hashlib
import os
import random
import shutil
import sys
from pathlib import Path

import torch

import common
import ptdpo
import reopold
import vgs
import vigos

TRAIN_ROWS, TEST_ROWS = 6000, 400
SIDE = 32  # pixels of an enlarged digit: one merged patch of Qwen3-VL
KINDS = ("sum", "difference", "largest", "number", "even", "smallest")  # of questions, in turn


# ====================================================================================================== questions
def working(kind: str, a: int, b: int, c: int) -> tuple[str, str, str]:
    """(question, worked solution without the description, answer) for the digits a, b, c."""
    digits = (a, b, c)
    if kind == "sum":
        return "What is the first digit plus the last digit?", f"{a}+{c}={a + c}.", str(a + c)
    if kind == "difference":
        return "What is the first digit minus the last digit?", f"{a}-{c}={a - c}.", str(a - c)
    if kind == "largest":
        return "Which digit is the largest?", f"The largest is {max(digits)}.", str(max(digits))
    if kind == "number":
        return "Which number do the digits form?", f"Together they form {a}{b}{c}.", f"{a}{b}{c}"
    if kind == "even":
        return ("How many digits are even?", ", ".join(f"{d} {'odd' if d % 2 else 'even'}" for d in digits) + ".",
                str(sum(d % 2 == 0 for d in digits)))
    place = digits.index(min(digits))  # kind == "smallest"; the caller makes the smallest digit unique
    return ("Where is the smallest digit? (A) first (B) second (C) third",
            f"The smallest is {min(digits)}, the {('first', 'second', 'third')[place]}.", "ABC"[place])


def make_rows(images, labels, count: int, seed: int, jitter: bool = False) -> list[dict]:
    """`count` questions about random strips of the given scans. jitter: turn and move the scans a little, for more of them."""
    rng, rows = random.Random(seed), []
    while len(rows) < count:
        picks = [rng.randrange(len(labels)) for _ in range(3)]
        digits = [int(labels[i]) for i in picks]
        kind = KINDS[len(rows) % 6]
        if kind == "smallest" and digits.count(min(digits)) > 1:
            continue
        question, steps, answer = working(kind, *digits)
        seen = f"The digits are {digits[0]},{digits[1]},{digits[2]}."
        ranges = ", ".join("below four" if d < 4 else "four to six" if d < 7 else "above six" for d in digits)
        rows.append({
            "problem": f"<image>{question}", "images": [draw([images[i] for i in picks], rng if jitter else None)], "answer": answer,
            "solution": f"{seen} {steps}", "hint": f"Read the digits from left to right: {ranges}.",
            "text_problem": f"{seen} {question}",
        })
    return rows


def draw(scans, rng: random.Random | None = None):
    """Three 8 x 8 scans (values 0 to 16) side by side, white on black; with rng each turned and moved a little."""
    from PIL import Image

    strip = Image.new("L", (3 * SIDE, SIDE))
    for place, scan in enumerate(scans):
        digit = Image.fromarray((scan * (255 / 16)).astype("uint8")).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        if rng:
            digit = digit.rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR, translate=(rng.randint(-2, 2), rng.randint(-2, 2)))
        strip.paste(digit, (place * SIDE, 0))
    return strip.convert("RGB")


def misread(kind: str, digits: list[int], rng: random.Random) -> list[int]:
    """The digits, changed one after the other until the answer to a question of this kind changes as well."""
    other = list(digits)
    while True:
        other[rng.randrange(3)] = rng.randrange(10)
        unique = kind != "smallest" or other.count(min(other)) == 1
        if unique and working(kind, *other)[2] != working(kind, *digits)[2]:
            return other


def with_caption(row: dict, digits: list[int]) -> dict:
    """The row under a caption that names these digits."""
    return row | {"problem": row["problem"].replace("<image>", f"<image>Caption: {digits[0]},{digits[1]},{digits[2]}. ")}


def digits_of(row: dict) -> list[int]:
    """What the strip shows, as the solution says it first."""
    return [int(c) for c in row["solution"] if c.isdigit()][:3]


def captioned(rows: list[dict], truthful: float, seed: int) -> list[dict]:
    """The rows under captions, of which a share `truthful` is right and the others would lead to a wrong answer."""
    rng, result = random.Random(seed), []
    for i, row in enumerate(rows):
        digits = digits_of(row)
        result.append(with_caption(row, digits if rng.random() < truthful else misread(KINDS[i % 6], digits, rng)))
    return result


def conflicts(images, labels, rows: list[dict], seed: int) -> list[dict]:
    """Of each row three, with one question and one caption: position 1 shows what the caption says, 2 and 3 something else (as in ViLP)."""
    rng, result = random.Random(seed), []
    for i, row in enumerate(rows):
        claimed, kind = digits_of(row), KINDS[i % 6]
        for position in (1, 2, 3):
            shown = claimed if position == 1 else misread(kind, claimed, rng)
            picks = [images[rng.choice([k for k, label in enumerate(labels) if label == digit])] for digit in shown]
            _, steps, answer = working(kind, *shown)
            result.append({"problem": with_caption(row, claimed)["problem"], "images": [draw(picks)], "answer": answer,
                           "solution": f"The digits are {shown[0]},{shown[1]},{shown[2]}. {steps}", "position": str(position)})
    return result


CALL_WORDS = ["<tool_call>", "</tool_call>", "crop_image", "select_frames", '"arguments"', "bbox_2d", "target_image", '"name"']
PLACES = [(x, y) for y in (0.15, 0.45, 0.75) for x in (0.15, 0.45, 0.75)]  # of a strip in the picture of zoom/: its left and upper edge
SHARE = 0.05  # of the picture's width and height that the strip has


def hide(rows: list[dict], seed: int) -> list[dict]:
    """The rows with their strips shrunk to the scans' own 8 pixels a digit, on a grey card somewhere in a black picture of 480 x 160."""
    from PIL import Image

    rng, result = random.Random(seed), []
    for row in rows:
        strip = row["images"][0].resize((24, 8), Image.Resampling.BOX)
        left, top = rng.choice(PLACES)
        picture = Image.new("RGB", (round(24 / SHARE), round(8 / SHARE)))
        at = (round(left * picture.width), round(top * picture.height))
        picture.paste((160, 160, 160), (at[0] - 24, at[1] - 8, at[0] + 48, at[1] + 16))
        picture.paste(strip, at)
        box = [left, top, round(left + SHARE, 2), round(top + SHARE, 2)]
        result.append({"problem": row["problem"], "images": [picture], "answer": row["answer"], "solution": row["solution"], "box": str(box)})
    return result


# ====================================================================================================== what the models learn
def drill(row: dict) -> str:
    """Eight worked steps in a row, as text: what a language model knows before it learns to see."""
    rng, lines = random.Random(row["text_problem"]), []
    while len(lines) < 8:
        a, b, c = (rng.randrange(10) for _ in range(3))
        kind = rng.choice(["sum", "difference", "smallest"])
        if kind == "smallest" and (a, b, c).count(min(a, b, c)) > 1:
            continue
        lines.append((f"The digits are {a},{b},{c}. " if kind == "smallest" else "") + working(kind, a, b, c)[1])
    return " ".join(lines)


def respond(row: dict, style: str) -> str:
    """The row's solution in one of the papers' formats: reason (VGS), think (PTD-PO), see-first and description (ViGOS)."""
    if style == "drill":
        return drill(row)
    if style == "call":
        return f'<tool_call>{{"name": "crop_image", "arguments": {{"bbox_2d": {row["box"]}, "target_image": 1}}}}</tool_call>'
    seen, _, steps = row["solution"].partition(". ")
    if style == "reason":
        return f"<reason>{row['solution']}</reason>\n\\boxed{{{row['answer']}}}"
    if style == "think":
        return f"<think>{row['solution']}</think>\n\\boxed{{{row['answer']}}}"
    described = f"<description>{seen}.</description>"
    if style.endswith("after tag"):  # for contexts that already end in <description>
        return respond(row, style.removesuffix(" after tag")).removeprefix(vigos.OPENING)
    return described if style == "description" else f"{described}\n<think>{steps}</think>\n\\boxed{{{row['answer']}}}"


def asking(row: dict, extra: str, images: bool = True, system: bool = False) -> common.Context:
    """The row's question with `extra` text behind it, with or without its images and VGS's system prompt."""
    user = common.user_message(row["problem"] + extra, len(row["images"]) if images else 0)
    return common.Context([vgs.SYSTEM, user] if system else [user], row["images"] if images else [])


SEE_FIRST = ("\nDescribe the image inside <description></description>, reason inside <think></think>, "
             "and put the final answer in \\boxed{}.")

# name -> (context, response format). VGS: see, blind. PTD-PO: ask, hint, answer, solution. ViGOS: see_first, image_only, solution_first.
CONTEXTS = {
    "see": (vgs.with_image, "reason"),
    "blind": (vgs.without_image, "reason"),
    "ask": (ptdpo.question, "think"),
    "hint": (lambda row: ptdpo.tutored(row, "hint"), "think"),
    "hint_blind": (lambda row: ptdpo.tutored(row, "hint", blind=True), "think"),
    "answer": (lambda row: ptdpo.tutored(row, "answer"), "think"),
    "solution": (lambda row: ptdpo.tutored(row, "solution"), "think"),
    "see_first": (lambda row: asking(row, SEE_FIRST), "see-first"),
    "solution_first": (lambda row: asking(row, f"\nReference solution: {row['solution']}{SEE_FIRST}"), "see-first"),
    "image_only": (lambda row: asking(row | {"problem": ""}, ""), "description"),
    "drill": (lambda row: asking(row | {"problem": "Practise."}, "", images=False), "drill"),
    "text": (lambda row: asking(row | {"problem": row["text_problem"]}, "", images=False, system=True), "reason"),
}
# (steps, weights of the contexts). Sight comes all at once, when nothing else is asked for; text and arithmetic start beside it, for one
# after the other takes far longer. The student is its own tutor in PTD-PO and its own teacher in ViGOS: it learns to use what they show.
START = {"text": 0.6, "drill": 0.6, "image_only": 4}
TEACHER = [(250, START), (800, {"drill": 0.8, "text": 0.5, "see": 5, "blind": 2, "ask": 0.7, "hint": 0.7, "solution": 1.3, "see_first": 3,
                                "solution_first": 1.3, "image_only": 1})]
STUDENT = [(450, {"text": 1, "drill": 0.5, "hint_blind": 4, "image_only": 2}),
           (600, {"drill": 0.5, "text": 0.5, "see": 1, "blind": 0.5, "see_first": 1, "ask": 1, "hint": 4, "hint_blind": 1, "answer": 0.2,
                  "solution": 0.5, "solution_first": 0.5, "image_only": 0.3})]
TEXT_TEACHER = [(450, {"text": 1, "drill": 1})]
# ViGOS's own contexts, with the first tag given, for the student of captions/. It learns to believe captions, which it only ever sees right;
# but it is its own teacher, too, and as such it is told the answer, and learns from it that captions can be wrong.
DESCRIBING = {
    "describe_first": (vigos.question, "see-first after tag"),
    "told_answer": (lambda row: vigos.privileged(row | {"reference": row["answer"], "problem": row["doubted"]}), "see-first after tag"),
    "describe": (vigos.image_alone, "description after tag"),
}
TEXT_ALONE = {"ask_text": (lambda row: reopold.question({"problem": row["text_problem"]}), "think")}  # Reopold's, for the models of math/
MATH_TEACHER, MATH_STUDENT = [(150, {"ask_text": 1})], [(500, {"ask_text": 0.3, "drill": 1})]
ZOOMING = {"call": (reopold.with_tools, "call"), "zoomed": (reopold.with_tools, "think")}  # the second after the call of the first
ZOOM_TEACHER, ZOOM_STUDENT = [(200, {"call": 1, "zoomed": 1})], [(300, {"call": 1, "zoomed": 1})]
DESCRIBER = [(400, {"describe_first": 0.5, "told_answer": 3, "describe": 1.5})]
LESSONS = CONTEXTS | DESCRIBING | TEXT_ALONE | ZOOMING


# ====================================================================================================== models
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
           "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# How Qwen's tokenizers cut text before merging (their tokenizer.json): digits one by one, words with the space before them.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def make_tokenizer(texts: list[str]):
    """Byte-level BPE that splits text as Qwen's does (digits one by one), with Qwen's special tokens and the chat template."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE,
                                   additional_special_tokens=SPECIAL, model_max_length=2048)


def make_model(family: str, tokenizer, hidden: int, layers: int, vision: int, vocab: int):
    """A randomly initialised model of the real classes. family: qwen3_vl, qwen2_5_vl, or qwen3 (text only)."""
    import transformers as t

    token = tokenizer.convert_tokens_to_ids
    text = dict(vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 32,
                num_key_value_heads=hidden // 64, max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.05,
                bos_token_id=None, eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>"))
    rope = dict(rope_type="default", rope_theta=10000.0)
    images = dict(image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"), tie_word_embeddings=True,
                  vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"))
    eyes = dict(depth=2, hidden_size=vision, intermediate_size=2 * vision, num_heads=2, out_hidden_size=hidden, initializer_range=0.05)
    if family == "qwen3":
        return t.Qwen3ForCausalLM(t.Qwen3Config(**text, head_dim=32, rope_parameters=rope))
    if family == "qwen3_vl":
        eyes |= dict(patch_size=16, deepstack_visual_indexes=[0], num_position_embeddings=64)
        text |= dict(head_dim=32, rope_parameters=rope | dict(mrope_section=[8, 4, 4], mrope_interleaved=True))
        return t.Qwen3VLForConditionalGeneration(t.Qwen3VLConfig(text_config=text, vision_config=eyes, **images))
    eyes |= dict(patch_size=14, window_size=56, fullatt_block_indexes=[1])
    text |= dict(rope_parameters=rope | dict(mrope_section=[8, 4, 4]))
    return t.Qwen2_5_VLForConditionalGeneration(t.Qwen2_5_VLConfig(text_config=text, vision_config=eyes, **images))


def image_processor(family: str):
    """The family's image processor, with the mean and deviation of these strips and no lower limit of size but one patch."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    patch = 16 if family == "qwen3_vl" else 14
    return Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, temporal_patch_size=2, image_mean=[0.2] * 3, image_std=[0.35] * 3,
                                    size={"shortest_edge": 4 * patch * patch, "longest_edge": 1024 * patch * patch})


# ====================================================================================================== training
def train(folder: Path, rows: list[dict], phases: list[tuple[int, dict]], title: str, stop=None, batch: int = 32, lr: float = 3e-3) -> None:
    """Next-token training of the checkpoint in `folder` on solutions. phases: (steps, weights of the contexts drawn from).

    stop: (rows, accuracy) ends the training when that share of greedy answers to those rows is right.
    """
    from tqdm import tqdm

    processor = common.Processor(str(folder))
    model = common.Model(str(folder), torch.float32)
    ends = processor.tokenizer.eos_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    warmup, steps = 30, sum(count for count, _ in phases)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warmup, 1.0 if stop else 1.02 - i / steps))
    engine = common.HFEngine(str(folder), processor, common.Args(rollout_batch=256, dtype="float32")) if stop else None
    rng, encoded = random.Random(0), {}
    bar = tqdm([mix for count, mix in phases for _ in range(count)], desc=title, unit="step", mininterval=1)
    for step, mix in enumerate(bar):
        prompts, responses = [], []
        for _ in range(batch):
            i, name = rng.randrange(len(rows)), rng.choices(list(mix), mix.values())[0]
            if (i, name) not in encoded:
                context, style = LESSONS[name]
                before = zoomed(processor, rows[i]) if name == "zoomed" else processor.encode(context(rows[i]))
                encoded[i, name] = (before, processor.tokenizer(respond(rows[i], style), add_special_tokens=False)["input_ids"] + [ends])
            prompt, target = encoded[i, name]
            prompts.append(prompt)
            responses.append(target)
        tokens = sum(map(len, responses))
        order = sorted(range(batch), key=lambda k: len(prompts[k].ids) + len(responses[k]))
        total = 0.0
        for part in (order[: batch // 2], order[batch // 2 :]):  # short and long ones apart: less padding
            ids = torch.tensor([token for k in part for token in responses[k]])
            weights = torch.full((1, len(ids)), 1 / tokens)

            def loss_fn(hidden, head):
                return common.vocab_loss(next_token, weights, [hidden], head, extras=[ids], chunk=4096)

            loss, _ = model(processor.batch([prompts[k] for k in part], [responses[k] for k in part]), loss_fn)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{total:.3f}")
        if stop and step % 10 == 9:
            engine.sync(model.weights())
            if common.evaluate(engine, stop[0], vgs.with_image)["acc@1"] >= stop[1]:
                break
    common.save_checkpoint(model.lm, processor, folder)


def zoomed(processor: common.Processor, row: dict) -> common.Prompt:
    """The question, the right call, and the part of the picture that it shows."""
    call = respond(row, "call")
    ids = processor.tokenizer(call, add_special_tokens=False)["input_ids"] + [processor.tokenizer.eos_token_id]
    text, images, _ = common.answer_call(common.CALL.search(call)[1], row["images"])
    shown = common.Observation(len(ids), processor.next_turn(common.user_message(text, 1), images), text, False)
    return common.transcript(processor.encode(reopold.with_tools(row)), ids, [shown])[0]


def next_token(logits, ids):
    """Negative log-likelihood of the given tokens."""
    return (-common.gather(logits.log_softmax(-1), ids),)


# ====================================================================================================== build
def scans() -> dict:
    """The handwriting, split by image: name -> (scans, the digits they show)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0)).numpy()
    return {name: (digits.images[part], digits.target[part]) for name, part in (("train", order[:1500]), ("test", order[1500:]))}


def write(rows: list[dict], folder: Path) -> None:
    """Rows as an ordinary data set."""
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({key: datasets.List(datasets.Image()) if key == "images" else datasets.Value("string") for key in rows[0]})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(folder))


def build(folder: Path, family: str) -> None:
    """Everything but PARTS into `folder`."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    rows = {}
    for (name, part), count, seed in zip(scans().items(), (TRAIN_ROWS, TEST_ROWS), (1, 2)):
        rows[name] = make_rows(*part, count, seed, jitter=name == "train")
        write(rows[name], folder / name)

    texts = []
    for row in rows["train"][:600]:
        for context, style in CONTEXTS.values():
            parts = [c.get("text", "") for m in context(row).messages if m["role"] == "user" for c in m["content"]]
            texts += [vgs.SYSTEM["content"], *parts, respond(row, style), "system\nuser\nassistant\n"]
    tokenizer = make_tokenizer(texts)
    sizes = {"teacher": (family, 128, 3, 64, 576), "student": (family, 64, 2, 48, 512), "text-teacher": ("qwen3", 128, 2, 0, 512)}
    for name, (kind, hidden, layers, vision, vocab) in sizes.items():
        make_model(kind, tokenizer, hidden, layers, vision, vocab).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        if vision:
            image_processor(kind).save_pretrained(folder / name)
    train(folder / "teacher", rows["train"], TEACHER, "teacher")
    train(folder / "student", rows["train"], STUDENT, "student", stop=(rows["train"][:400], 0.45))
    train(folder / "text-teacher", rows["train"], TEXT_TEACHER, "text-only teacher")


def build_captions(folder: Path, root: Path) -> None:
    """captions/ into `folder`, from the rest of the toy in `root`."""
    torch.manual_seed(0)
    rows, parts = {}, scans()
    for (name, part), count, seeds in zip(parts.items(), (TRAIN_ROWS, TEST_ROWS), ((3, 5), (4, 6))):
        rows[name] = make_rows(*part, count, seeds[0], jitter=name == "train")
        write(captioned(rows[name], 0.5, seeds[1]), folder / name)
    write(conflicts(*parts["test"], rows["test"][: TEST_ROWS // 3], seed=7), folder / "conflict")
    shutil.copytree(root / "student", folder / "student")
    believed, doubted = captioned(rows["train"], 1.0, seed=8), captioned(rows["train"], 0.5, seed=9)
    lessons = [row | {"doubted": other["problem"]} for row, other in zip(believed, doubted)] + [row | {"doubted": row["problem"]} for row in rows["train"]]
    train(folder / "student", lessons, DESCRIBER, "student who describes", lr=2e-3)


def build_math(folder: Path, root: Path) -> None:
    """math/ into `folder`, from the rest of the toy in `root`."""
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    rows = {}
    for (name, part), count, seed in zip(scans().items(), (TRAIN_ROWS, TEST_ROWS), (10, 11)):
        rows[name] = make_rows(*part, count, seed)
        write([{"problem": row["text_problem"], "answer": row["answer"], "solution": row["solution"]} for row in rows[name]], folder / name)
    shutil.copytree(root / "text-teacher", folder / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(root / "text-teacher")
    make_model("qwen3", tokenizer, 64, 2, 0, 512).save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    train(folder / "teacher", rows["train"], MATH_TEACHER, "teacher of text", lr=1e-3)
    train(folder / "student", rows["train"], MATH_STUDENT, "student of text")


def build_zoom(folder: Path, root: Path) -> None:
    """zoom/ into `folder`, from the rest of the toy in `root`."""
    torch.manual_seed(0)
    rows = {}
    for (name, part), count, seed in zip(scans().items(), (TRAIN_ROWS, TEST_ROWS), (12, 13)):
        rows[name] = hide(make_rows(*part, count, seed, jitter=name == "train"), seed)
        write(rows[name], folder / name)
    for name, phases in (("teacher", ZOOM_TEACHER), ("student", ZOOM_STUDENT)):
        shutil.copytree(root / name, folder / name)
        processor = common.Processor(str(folder / name))
        processor.images.size = {"shortest_edge": 3 * SIDE**2, "longest_edge": 3 * SIDE**2}  # every picture is seen as large as a strip
        processor.images.save_pretrained(folder / name)
        processor.tokenizer.add_tokens(CALL_WORDS)  # in rows of the output matrix that were empty so far
        processor.tokenizer.save_pretrained(folder / name)
        train(folder / name, rows["train"], phases, f"{name} who zooms", batch=16, lr=2e-3)


PARTS = {"captions": build_captions, "math": build_math, "zoom": build_zoom}  # what is built only when it is asked for


def recipe(family: str) -> str:
    """Changes whenever this file or a prompt that the models are trained on changes."""
    row = {key: key for key in ("problem", "answer", "solution", "hint", "text_problem", "doubted")} | {"images": [None]}
    prompts = [context(row).messages for context, _ in LESSONS.values()]
    return hashlib.sha256(Path(__file__).read_bytes() + repr((family, prompts)).encode()).hexdigest()[:10]


def build_once(folder: Path, minutes: str, build, *args) -> None:
    """build(folder aside, *args), unless the folder is there: its name appears only when everything is in it."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one builds, the others wait here
        if folder.exists():
            return
        aside = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)  # of a build that was killed
        print(f"building the toy (once, about {minutes} on two cores) in {folder}", file=sys.stderr)
        try:
            build(aside, *args)
        except KeyboardInterrupt:
            shutil.rmtree(aside, ignore_errors=True)
            sys.exit("\ninterrupted: nothing was kept, the next start builds it again")
        aside.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=("qwen3_vl", "qwen2_5_vl"), default="qwen3_vl", help="classes of the student and the teacher")
    parser.add_argument("--part", default="", help="a folder of it that is wanted; captions/, math/ and zoom/ are built only then")
    args = parser.parse_args()
    cache = Path(os.environ.get("CLEANOPD_CACHE") or Path.home() / ".cache" / "cleanopd")
    folder = cache / f"toy-{args.family}-{recipe(args.family)}"
    build_once(folder, "5 minutes", build, args.family)
    if args.part in PARTS:
        build_once(folder / args.part, "one to two minutes", PARTS[args.part], folder)
    print(folder)


if __name__ == "__main__":
    main()
