"""What the models of tools/toy_weights were taught: right responses, in every context that a method may show them."""

import hashlib
from dataclasses import dataclass

import common
import ptdpo
import reopold
import vgs
import vigos
from tools import toy


# =============================================================================================== lessons
def asking(row: dict, extra: str) -> common.Context:
    """The row's question with `extra` text behind it."""
    turn = common.message("user", row["problem"] + extra, len(row["images"]))
    return common.Context([turn], row["images"])


def see_first(row: dict) -> common.Context:
    return asking(row, vigos.FORMAT)


def solution_first(row: dict) -> common.Context:
    return asking(row, f"\nReference solution: {row['solution']}{vigos.FORMAT}")


def image_only(row: dict) -> common.Context:
    return asking(row | {"problem": ""}, "")


def practise(row: dict) -> common.Context:
    return common.Context([common.message("user", "Practise.")])


def text_alone(row: dict) -> common.Context:
    """The digits are named in the question."""
    return vgs.without_image(row | {"problem": row["text_problem"]})


def with_hint(row: dict) -> common.Context:
    return ptdpo.tutored(row, "hint")


def hint_blind(row: dict) -> common.Context:
    return ptdpo.tutored(row, "hint", blind=True)


def with_answer(row: dict) -> common.Context:
    return ptdpo.tutored(row, "answer")


def with_solution(row: dict) -> common.Context:
    return ptdpo.tutored(row, "solution")


def told_answer(row: dict) -> common.Context:
    return vigos.privileged(row | {"reference": row["answer"], "problem": row["doubted"]})


# name -> (context, format of the response)
CONTEXTS = {
    "see": (vgs.with_image, "reason"),
    "blind": (vgs.without_image, "reason"),
    "ask": (ptdpo.question, "think"),
    "hint": (with_hint, "think"),
    "hint_blind": (hint_blind, "think"),
    "answer": (with_answer, "think"),
    "solution": (with_solution, "think"),
    "see_first": (see_first, "see-first"),
    "solution_first": (solution_first, "see-first"),
    "image_only": (image_only, "description"),
    "drill": (practise, "drill"),
    "text": (text_alone, "reason"),
}
# ViGOS's own, with the first tag given. The student of captions learns to believe them, for it only ever sees right
# ones; but it is its own teacher, too, and as such it is told the answer, and learns from it that they can be wrong.
DESCRIBING = {
    "describe_first": (vigos.question, "see-first after tag"),
    "told_answer": (told_answer, "see-first after tag"),
    "describe": (vigos.image_alone, "description after tag"),
}
# Reopold's. "zoomed" goes on after the right call and the part of the picture that it shows: see prompt_of.
REASONING = {"ask_text": (reopold.question, "think")}
ZOOMING = {"call": (reopold.with_tools, "call"), "zoomed": (reopold.with_tools, "think")}
LESSONS = CONTEXTS | DESCRIBING | REASONING | ZOOMING


def prompt_of(lesson: str, row: dict, processor: common.Processor) -> common.Prompt:
    """What the lesson shows before the response."""
    context, _ = LESSONS[lesson]
    prompt = processor.encode(context(row))
    if lesson != "zoomed":
        return prompt
    said = common.Prompt(response_of("call", row, processor).ids)
    text, images = shown_by_call(row)
    turn = reopold.next_turn(processor, text, images)
    return reopold.join(reopold.join(prompt, said), turn)


def shown_by_call(row: dict) -> tuple[str, list]:
    """(text, images) of the tool's answer to the right call."""
    call = reopold.CALL.search(toy.respond(row, "call"))
    text, images, failed = reopold.answer_call(call[1], row["images"])
    assert not failed, text
    return text, images


def response_of(lesson: str, row: dict, processor: common.Processor) -> common.Response:
    """What the lesson asks for, and its end."""
    _, style = LESSONS[lesson]
    ids = processor.tokenize(toy.respond(row, style))
    return common.Response([*ids, processor.tokenizer.eos_token_id])


def complete(rows: list[dict]) -> list[dict]:
    """The rows with what the lessons look for and rows of text alone do not have."""
    return [{"images": [], "text_problem": row["problem"]} | row for row in rows]


def caption_lessons() -> list[dict]:
    """Strips under right captions, which under `doubted` may be wrong, and strips without any."""
    plain = toy.strips(3, 4)["train"]
    believed = toy.captioned(plain, 1.0, seed=8)
    doubted = toy.captioned(plain, 0.5, seed=9)
    lessons = [row | {"doubted": row["problem"]} for row in plain]
    for row, other in zip(believed, doubted):
        lessons.append(row | {"doubted": other["problem"]})
    return lessons


# =============================================================================================== courses
@dataclass
class Course:
    """phases: (steps, lesson -> its share). stop: end when that share of the first 400 training rows is right."""

    phases: list[tuple[int, dict[str, float]]]
    lr: float = 3e-3
    batch: int = 32
    stop: float = 0.0


# Sight comes all at once, when nothing else is asked for; text and arithmetic start beside it, for one after the other
# takes far longer.
START = {"text": 0.6, "drill": 0.6, "image_only": 4}
TEACHING = {
    "drill": 0.8,
    "text": 0.5,
    "see": 5,
    "blind": 2,
    "ask": 0.7,
    "hint": 0.7,
    "solution": 1.3,
    "see_first": 3,
    "solution_first": 1.3,
    "image_only": 1,
}
# The student is its own tutor in PTD-PO and its own teacher in ViGOS: it learns to use what they show.
LISTENING = {"text": 1, "drill": 0.5, "hint_blind": 4, "image_only": 2}
STUDYING = {
    "drill": 0.5,
    "text": 0.5,
    "see": 1,
    "blind": 0.5,
    "see_first": 1,
    "ask": 1,
    "hint": 4,
    "hint_blind": 1,
    "answer": 0.2,
    "solution": 0.5,
    "solution_first": 0.5,
    "image_only": 0.3,
}
READING = {"text": 1, "drill": 1}
DOUBTING = {"describe_first": 0.5, "told_answer": 3, "describe": 1.5}
THINKING = {"ask_text": 0.3, "drill": 1}
LOOKING = {"call": 1, "zoomed": 1}
COURSES = {
    "main/teacher": Course([(250, START), (800, TEACHING)]),
    "main/student": Course([(450, LISTENING), (600, STUDYING)], stop=0.45),
    "main/text-teacher": Course([(450, READING)]),
    "captions/student": Course([(400, DOUBTING)], lr=2e-3),
    "math/teacher": Course([(150, {"ask_text": 1})], lr=1e-3),
    "math/student": Course([(500, THINKING)]),
    "zoom/teacher": Course([(200, LOOKING)], lr=2e-3, batch=16),
    "zoom/student": Course([(300, LOOKING)], lr=2e-3, batch=16),
}
SIZES = {
    "main/teacher": dict(hidden=128, layers=3, vision=64, vocab=576),
    "main/student": dict(hidden=64, layers=2, vision=48, vocab=512),
    "main/text-teacher": dict(hidden=128, layers=2, vision=0, vocab=512),
    "math/student": dict(hidden=64, layers=2, vision=0, vocab=512),
}
TRAINED_ON = {  # the others begin as a model that is trained already
    "captions/student": "main/student",
    "math/teacher": "main/text-teacher",
    "zoom/teacher": "main/teacher",
    "zoom/student": "main/student",
}
# Tokens of zoom's tokenizer, in rows of the output matrix that were empty so far.
CALL_WORDS = ["<tool_call>", "</tool_call>", "crop_image", "select_frames"]
CALL_WORDS += ['"arguments"', "bbox_2d", "target_image", '"name"']


def recipe(family: str = toy.FAMILIES[0]) -> str:
    """Changes with a course, a size, a prompt or a response; not with the code that draws strips and trains."""
    names = "problem answer solution hint text_problem doubted box".split()
    row = {name: name for name in names} | {"images": [None]}
    texts = []
    for context, style in LESSONS.values():
        view = context(row)
        for turn in view.messages:
            texts += [turn["role"], *(part["text"] for part in turn["content"])]
        texts += [view.prefill, toy.respond(row, style)]
    hidden = toy.hide(toy.make_rows(*toy.scans()["test"], 1, seed=0), seed=0)
    texts.append(shown_by_call(hidden[0])[0])
    sizes = (toy.TRAIN_ROWS, toy.TEST_ROWS, SIZES, TRAINED_ON)
    facts = (family, texts, COURSES, sizes, CALL_WORDS)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:10]
