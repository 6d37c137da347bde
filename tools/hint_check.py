"""The check of a hint: does it have the form, and does it give away the answer? See tools/hints.py."""

import re
from fractions import Fraction

import common

FAULTS = {
    "cut off": "it was too long to be finished",
    "form": "it has to be a line 'Look: ...' and a line 'Think: ...'",
    "evidence": "the 'Look' part has to name the visual evidence",
    "solution": "it was a whole solution",
    "answer": "it contained the answer",
    "option": "it named the right option",
    "number": "it contained a number that has to be read off or worked out",
}
REQUEST_FAULTS = {  # of requests to an endpoint; they say nothing of a hint
    "refused": "the endpoint refused the request, or its reply held no answer or over 4 MB",
    "timeout": "the request took longer than --timeout",
    "overloaded": "the endpoint was overloaded, also when asked again",
    "disconnected": "the endpoint broke the connection off, also when asked again",
}
FAULTS |= REQUEST_FAULTS


def of_hints(faults: list[str]) -> list[str]:
    """The faults of rejected hints, without those of requests that failed: ["form", "timeout"] -> ["form"]."""
    return [fault for fault in faults if fault not in REQUEST_FAULTS]


def hint_of(answer: str) -> str:
    r"""What follows the thoughts, fit for any file and terminal: "so</think> the\x1b[31m\tbox\ud800" -> "the  box"."""
    text = re.sub(r"\x1b\[[\d;]*\w|[^\S\n]", " ", answer.rpartition("</think>")[2])
    return "".join(c for c in text if c.isprintable() or c == "\n").strip()


# =============================================================================================== words and numbers
FIGURE = r"\d+(?:\.\d+)?(?:/\d+)?"
UNITS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen""".split()
TENS = "ten twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBERS = dict(zip(UNITS, range(20))) | dict(zip(TENS, range(10, 100, 10)))
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
NUMERAL = rf"(?:{FIGURE}|\b(?:{'|'.join([*NUMBERS, *SCALES])})\b)"
NUMERALS = rf"{NUMERAL}(?:(?:[\s-]+and)?[\s-]+{NUMERAL})*"
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
PARTS = dict(zip(ORDINALS[2:], range(3, 11))) | {"half": 2, "quarter": 4}


def exact(figure: str) -> Fraction:
    """ "0.50" -> 1/2. Of endless digits the first 60 count; what is divided by zero stays undivided."""
    top, _, bottom = figure.partition("/")
    return Fraction(top[:60]) / (int(bottom[:60] or 1) or 1)


def without_commas(text: str) -> str:
    """ "1,200" -> "1200"."""
    return re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)


def in_figures(numerals: re.Match) -> str:
    """ "two hundred and five" -> " 205 ", "3 thousand" -> " 3000 ", "seven five" -> " 7 5 "."""
    if numerals[0] == "one":  # a pronoun as well
        return "one"
    values, last = [], ""
    for word in re.findall(rf"{FIGURE}|[a-z]+", numerals[0]):
        if word in SCALES:
            scale = SCALES[word]
            before = values.pop() if values else 0
            count = before % scale  # "two thousand three" + "hundred": 3
            values.append(before - count + (count or 1) * scale)
        elif word in NUMBERS:
            value = NUMBERS[word]
            goes_on = last in SCALES or (last in TENS[1:] and 0 < value < 10)
            values.append(values.pop() + value if goes_on else value)
        elif word != "and":
            values.append(exact(word))
        if word != "and" or last not in SCALES:  # "twenty and five" are two numbers
            last = word
    return f" {' '.join(map(str, values))} "


def words(text: str) -> list[str]:
    r"""Words, numbers, no case, no markup: "$\frac{1}{2}$ of Forty-seven, 0.5" -> ["1/2", "of", "47", "1/2"]."""
    text = without_commas(text)
    text = re.sub(r"\\[dt]?frac\s*\{(\w+)\}\s*\{(\w+)\}", r"\1/\2", text)
    text = re.sub(r"\\sqrt\b", "√", text)
    text = re.sub(r"\\(?:text|mathrm|boxed)\b", " ", text)
    text = re.sub(NUMERALS, in_figures, text.casefold())
    text = re.sub(r"(\d)\s+point\s+(\d)", r"\1.\2", text)
    for name, bottom in PARTS.items():
        text = re.sub(rf"\b(?:one|1)[\s-]+{name}\b", f"1/{bottom}", text)
        text = re.sub(rf"(\d)[\s-]+{name}s\b", rf"\1/{bottom}", text)
    found = re.findall(rf"{FIGURE}|[^\W\d_]+|√", text)
    return [str(exact(word)) if word[0].isdigit() else word for word in found]


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


# =============================================================================================== options
def options_of(problem: str) -> tuple[str, dict[str, str]]:
    """The question before its options, and their texts: "How far? (A) 5 (B) 6" -> "How far? ", {"A": "5", "B": "6"}."""
    parts = re.split(r"(?<!\S)\(?([A-J])[).:]\s+", problem)  # text, letter, text, letter, text ...
    letters = parts[1::2]
    if "A" not in letters:
        return problem, {}
    first = len(parts) - 2 - 2 * letters[::-1].index("A")  # the last A begins the options
    texts = [text.strip().split("\n")[0] for text in parts[first + 1 :: 2]]
    return " ".join(parts[:first]), dict(zip(parts[first::2], texts))


def right_options(gold: str, options: dict[str, str]) -> dict[str, str]:
    """Letter -> text of each right option: "(b)", "A and C", "B. a cone", or an option's text; {} without one."""
    bare = re.sub(r"[\W_]|\band\b", "", gold)
    if re.fullmatch("[A-Za-z]", bare):
        bare = bare.upper()
        return {bare: options.get(bare, "")}
    target = words(gold)
    same = {letter: text for letter, text in options.items() if target and words(text) == target}
    if same:  # before letters: "AB" may be a segment
        return same
    if bare and set(bare) <= options.keys():
        return {letter: options[letter] for letter in bare}
    both = re.fullmatch(r"\(?([A-Ja-j])[).:]\s+(.+)", gold, re.S)
    if both:
        letter = both[1].upper()
        return {letter: options.get(letter, both[2])}
    return {}


CUE = (
    r"(?i:\b(?:options?|choices?|letters?|answers?|choose|pick|select|correct|right one)\b"
    r"(?:[^\w.\n]+(?:is|one|be|must|the|answer|choice|option|letter|to)\b)*)"
)
VERDICT = (
    r"(?i:\W+(?:is|must be|has to be|looks|seems)\W+(?:the\W+)?"
    r"(?:correct|true|answer|solution|one|best|right(?![\s-]+(?:of|end|side|hand|angle)))\b)"
)
# "angle at B", "points A, B and C", "from A to B": these letters name places in the image
PLACES = (
    r"\b(?i:(?:angle|point|vertex|corner|line|side|node|triangle)s?(?:\s+(?:at|of))?|vertices|from|between)"
    r"\s+[A-J]\b(?:(?:,|,?\s+and|\s+to)\s+[A-J]\b)*"
)


def names_letter(letter: str, hint: str, stem: str, listed: bool) -> bool:
    """ "Take option B", "it is (B)", "B is right", "so B" -> True for B; "choose a point" does not choose A.

    Where B is named in the question as well, say as a point, "B is left of C" is fine, and "B is right" is not.
    listed: the question has the options' texts. If not, the options may be places in the image: so "point B" is one.
    """
    either = letter if letter in "AI" else f"[{letter}{letter.lower()}]"
    called = rf"{CUE}[^\w.\n]+{either}\b|\({either}\)|\b[{letter}{letter.lower()}]{VERDICT}"
    if re.search(called, hint):
        return True
    alone = rf"(?<![\w°\\-]){letter}(?![\w-])"
    if letter in "AI":  # no option in front of most words
        alone += r"(?!'|\s+(?!(?:is|has|and|or|must|fits|matches)\b)\w)"
    if listed:
        hint = re.sub(PLACES, "", hint)
    return bool(re.search(alone, hint)) and not re.search(alone, stem)


def names_place(letter: str, last: bool, hint: str) -> bool:
    """ "The second option", "option two", "pick the 2nd one." -> True for B. last: whether it is the last option."""
    place = ord(letter) - ord("A") + 1
    if place > len(ORDINALS):
        return False
    names = [ORDINALS[place - 1], f"{place}(?:st|nd|rd|th)"]
    if last:
        names.append("last")
    ordinal = f"(?:{'|'.join(names)})"
    space = r"[^\w.,;:\n]+"
    linked = rf"(?:{space}(?:of|the|these|given|listed|possible|answer|one|in|list))*{space}"
    either_way = (
        rf"\b{ordinal}{linked}(?:option|choice|alternative|answer)s?\b",
        rf"\b(?:option|choice|alternative){space}(?:(?:is|number){space})*(?:{place}|{UNITS[place]})\b(?! by\b)",
        rf"\b(?:choose|pick|select|take|(?:answer|option|choice|right one) is) the {ordinal}(?: one)?\s*(?:[.,;:!]|$)",
    )
    return any(re.search(pattern, hint.casefold()) for pattern in either_way)


def option_fault(right: dict, options: dict, hint: str, stem: str) -> str | None:
    """option: one of the right ones is named or described, or all of the others are named."""
    said, asked = words(hint), words(stem)
    named = set()
    for letter in {**options, **right}:
        last = letter == max(options, default="")
        if names_letter(letter, hint, stem, bool(options)) or names_place(letter, last, hint):
            named.add(letter)
    others = options.keys() - right.keys()
    left_over = bool(others) and others <= named
    described = any(tells(words(text), said, asked) for text in right.values())
    return "option" if described or left_over or named & right.keys() else None


# =============================================================================================== the check
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
    if len(hint) > 10_000:  # and what follows would take long
        return "solution"
    if len(words(evidence)) < 4:
        return "evidence"
    said = words(hint)
    copied = runs(solution, 8) & runs(said, 8) - runs(problem, 8)
    return "solution" if copied or len(said) > 200 or "\\boxed" in hint else None


def tells(target: list[str], said: list[str], asked: list[str]) -> bool:
    """Whether a hint has an answer: the words of each, and of the question."""
    if target in (["yes"], ["no"], ["true"], ["false"]):  # ordinary words, until called the answer
        called = {("answer", *target), ("answer", "is", *target)}
        return bool(called & (runs(said, 2) | runs(said, 3)))
    figures = [word for word in target if word[0].isdigit()]
    if len(figures) == 1 and gives(figures, said, asked):  # "8 cm" is told by 8
        return True
    return gives(target, said, asked)


def plain(answer: str) -> str:
    r"""Without what stands around an answer: "$\text{Yes}$." -> "Yes"."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", answer)
    return re.sub(r"</?answer>", "", text).lstrip(" \n$").rstrip(" \n$.")


def answer_fault(hint: str, answer: str, problem: str) -> str | None:
    """option or answer: whether the hint gives it away."""
    gold = plain(common.extract_answer(answer) or answer)
    stem, options = options_of(problem)
    right = right_options(gold, options)
    if right:
        return option_fault(right, options, hint, stem)
    return "answer" if tells(words(gold), words(hint), words(problem)) else None


def hint_fault(hint: str, row: dict, finished: bool = True) -> str | None:
    """The first of FAULTS that a hint has, or None. Phrases and numbers of the question are no spoilers.

    answer 47: "Think: 47 remain" -> answer;   solution "40 + 7 = 47": "Think: add 7" -> number;
    answer B: "Look at (B)" -> option
    """
    if not finished:
        return "cut off"
    hint = without_step_numbers(hint)
    asked, steps = words(row["problem"]), []
    if not common.is_empty(row.get("solution")):  # 0 is one
        steps = words(" ".join(common.all_answers(row["solution"])))
    fault = form_fault(hint, asked, steps)
    for answer in common.all_answers(row["answer"]):  # each of them is a spoiler
        fault = fault or answer_fault(hint, answer, row["problem"])
    if fault:
        return fault
    numbers = {str(exact(figure)) for figure in re.findall(FIGURE, without_commas(hint))}
    long = {word for word in words(hint) if word[0].isdigit() and len(word) > 1}
    # Single digits may count things, where there is no solution to say whether they are of it. So may words like two.
    read_off = (numbers | long) & set(steps)
    read_off |= {number for number in numbers if len(number) > 1}
    return "number" if read_off - set(asked) else None
