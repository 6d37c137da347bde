"""When an answer to a benchmark's question is right. No model is needed here.

A record is what tools.evaluate writes of an answer, a line of answers.jsonl. Its rule is the benchmark's:

    answer    that of training: docs/answers.md              word    one word, singular or plural
    number    within a tolerance                             anls    a share: 1 - normalised edit distance
    counts    all whole numbers, in order                    judge   whatever a judge has written into "right"
"""

import re
from fractions import Fraction

import common


def judge(record: dict) -> dict:
    """{"extracted", "right"} of a record; right is a bool, for anls a share, and None where the set needs a judge."""
    response = common.Response([], record["finished"], record["response"])
    extracted = common.extract_answer(response.text) if response.finished else None
    rule = RULES[record.get("rule") or "answer"]
    return {"extracted": extracted, "right": rule(response, extracted, record)}


def answer_is_right(response, extracted, record) -> bool:
    """The rule of training: docs/answers.md."""
    return common.is_right(response, record)


def number_is_near(response, extracted, record) -> bool:
    """|x - answer| <= tolerance; what is no number is compared as in training."""
    ours = number(extracted or "")
    gold = number(common.all_answers(record["answer"])[0])
    if ours is None or gold is None:
        return common.is_right(response, record)
    # fractions: exact, and the limit itself is within it
    return abs(ours - gold) <= Fraction(str(record["tolerance"]))


def number(text):
    """Its value, where it is a number, with a unit or not; else None."""
    value, _ = common.as_quantity(common.plain(text))
    return value if isinstance(value, Fraction) else None


def counts_are_same(response, extracted, record) -> bool:
    """All whole numbers in order, "rows=5, columns=4" for "5,4"; an answer without any as in training."""
    gold = re.findall(r"\d+", common.all_answers(record["answer"])[0])
    if not gold:
        return common.is_right(response, record)
    return re.findall(r"\d+", extracted or "") == gold


NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty""".split()


def word_is_same(response, extracted, record) -> bool:
    """One word, numbers as words or digits, singular or plural."""
    ours = word(extracted or "")
    golds = [word(answer) for answer in common.all_answers(record["answer"])]
    return any(ours in plurals(gold) or gold in plurals(ours) for gold in golds)


def word(text):
    """ "The Cubes." -> "cubes", "Seven" -> "7"."""
    text = common.plain(text).lower()
    return str(NUMBERS.index(text)) if text in NUMBERS else text


def plurals(text):
    """A word, and what its plural may be: the rules of several words differ ("houses", "buses")."""
    return text, f"{text}s", f"{text}es", re.sub("y$", "ies", text)


def anls(response, extracted, record) -> float:
    """1 - edit distance / length of the longer, of the nearest answer; 0 below one half."""
    ours = " ".join((extracted or "").lower().split())
    likeness = [0.0]
    for answer in common.all_answers(record["answer"]):
        gold = " ".join(answer.lower().split())
        longer = max(len(ours), len(gold), 1)
        likeness.append(1 - edit_distance(ours, gold) / longer)
    best = max(likeness)
    return best if best >= 0.5 else 0.0


def edit_distance(one: str, other: str) -> int:
    """Levenshtein's: insertions, deletions, substitutions."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            # before: one left and one up
            best = min(row[j] + 1, row[j - 1] + 1, before + (a != b))
            before, row[j] = row[j], best
    return row[-1]


RULES = {
    "answer": answer_is_right,
    "number": number_is_near,
    "word": word_is_same,
    "counts": counts_are_same,
    "anls": anls,
    # what a person or a model has written into answers.jsonl, if any
    "judge": lambda response, extracted, record: record.get("right"),
}
