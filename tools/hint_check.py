"""The check of a hint: does it have the form, and does it give away the answer? See tools/hints.py."""

import re

import common

FAULTS = {
    "cut off": "it was too long to be finished",
    "form": "it has to be a line 'Look: ...' and a line 'Think: ...'",
    "evidence": "the 'Look' part has to name the visual evidence",
    "solution": "it was a whole solution",
    "answer": "it contained the answer",
    "option": "it named the right option",
    "number": "it contained a number that has to be read off or worked out",
    "refused": "the endpoint refused the request",
}
FIGURE = r"\d+(?:\.\d+)?(?:/\d+)?"
UNITS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen""".split()
TENS = "ten twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBERS = dict(zip(UNITS, range(20))) | dict(zip(TENS, range(10, 100, 10)))


def words(text: str) -> list[str]:
    r"""Words, numbers, no case, no markup: "$\frac{1}{2}$ of Forty-seven, 0.5" -> ["1/2", "of", "47", "1/2"]."""
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    text = re.sub(r"\\[dt]?frac\s*\{(\w+)\}\s*\{(\w+)\}", r"\1/\2", text)
    text = re.sub(r"\\sqrt\b", "√", text)
    text = re.sub(r"\\(?:text|mathrm|boxed)\b", " ", text)
    found = []
    for word in re.findall(rf"{FIGURE}|[^\W\d_]+(?:-[^\W\d_]+)?|√", text.casefold()):
        parts = word.split("-")
        if word[0].isdigit():
            found.append(str(common.as_number(word) or 0))
        elif word != "one" and NUMBERS.keys() >= set(parts):  # "one" is a pronoun as well
            found.append(str(sum(NUMBERS[part] for part in parts)))
        else:
            found += parts
    return found


def runs(text: list[str], n: int) -> set[tuple]:
    """All n words in a row of a text."""
    return {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}


def gives(part: list[str], hint: list[str], question: list[str]) -> bool:
    """Whether a hint has `part` otherwise than in a phrase of the question: with the word before it, or behind it.

    "2" in "the 2 rows" gives nothing away if the question has "2 rows".
    """
    phrases = runs(question, len(part) + 1)
    for run in runs(["", *hint, ""], len(part) + 2):
        quoted = run[:-1] in phrases or run[1:] in phrases
        if part and run[1:-1] == tuple(part) and not quoted:
            return True
    return False


def options_of(problem: str) -> tuple[str, dict[str, str]]:
    """The question before its options, and their texts: "How far? (A) 5 (B) 6" -> "How far? ", {"A": "5", "B": "6"}."""
    parts = re.split(r"(?<!\S)\(?([A-J])[).:]\s+", problem)  # text, letter, text, letter, text ...
    letters = parts[1::2]
    if "A" not in letters:
        return problem, {}
    first = len(parts) - 2 - 2 * letters[::-1].index("A")  # the last A begins the options
    texts = [text.strip().split("\n")[0] for text in parts[first + 1 :: 2]]
    return " ".join(parts[:first]), dict(zip(parts[first::2], texts))


CUE = (
    r"(?i:\b(?:options?|choices?|letters?|answers?|choose|pick|select|correct)\b"
    r"(?:[^\w.\n]+(?:is|one|be|must|the|answer|choice|option|letter|to)\b)*)"
)


def names_option(letter: str, hint: str) -> bool:
    """ "Take option B", "it is (B)" -> True for B; "choose a point" does not choose A."""
    either = letter if letter in "AI" else f"[{letter}{letter.lower()}]"
    return re.search(rf"{CUE}[^\w.\n]+{either}\b|\({either}\)", hint) is not None


def without_step_numbers(hint: str) -> str:
    """ "1. count 2. add" -> " count  add": the marks of steps 1, 2, 3, ... in order are no numbers of the solution."""
    for step in range(1, 10):
        hint, found = re.subn(rf"(?<![\w.]){step}[.)]\s", " ", hint, count=1)
        if not found:
            break
    return hint


def form_fault(hint: str, problem: list[str], solution: list[str]) -> str | None:
    """form, evidence or solution. Eight words in a row of the solution are one, unless the question has them too."""
    look, _, think = hint.partition("Think:")
    evidence = look.strip().removeprefix("Look:")
    if evidence in ("", look.strip()) or not think.strip():
        return "form"
    if len(words(evidence)) < 4:
        return "evidence"
    said = words(hint)
    copied = runs(solution, 8) & runs(said, 8) - runs(problem, 8)
    return "solution" if copied or len(said) > 200 or "\\boxed" in hint else None


def answer_fault(hint: str, answer: str, problem: str) -> str | None:
    """option or answer: whether the hint gives it away."""
    gold = common.plain(common.extract_answer(answer) or answer)
    letter, said, asked = common.as_option(gold), words(hint), words(problem)
    if letter:
        stem, options = options_of(problem)
        content = words(options.get(letter, ""))
        named = names_option(letter, hint) or gives(content, said, words(stem))
        return "option" if named else None
    target = words(gold)
    if target in (["yes"], ["no"], ["true"], ["false"]):  # ordinary words, until called the answer
        called = {("answer", *target), ("answer", "is", *target)}
        return "answer" if called & (runs(said, 2) | runs(said, 3)) else None
    figures = [word for word in target if word[0].isdigit()]
    if len(figures) == 1 and gives(figures, said, asked):  # "8 cm" is told by 8
        return "answer"
    return "answer" if gives(target, said, asked) else None


def hint_fault(hint: str, row: dict, finished: bool = True) -> str | None:
    """The first of FAULTS that a hint has, or None. Phrases and numbers of the question are no spoilers.

    answer 47: "Think: 47 remain" -> answer;   solution "40 + 7 = 47": "Think: add 7" -> number;
    answer B: "Look at (B)" -> option
    """
    if not finished:
        return "cut off"
    hint = without_step_numbers(hint)
    asked, steps = words(row["problem"]), words(row.get("solution") or "")
    fault = form_fault(hint, asked, steps)
    for answer in common.all_answers(row["answer"]):  # each of them is a spoiler
        fault = fault or answer_fault(hint, answer, row["problem"])
    if fault:
        return fault
    numbers = {str(common.as_number(figure)) for figure in re.findall(FIGURE, hint)} - set(asked)
    # Single digits may count things, where there is no solution to say whether they are of it.
    return "number" if numbers & set(steps) or any(len(x) > 1 for x in numbers) else None
