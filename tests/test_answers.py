"""Answers: verdicts on hundreds of pairs, none of which may be falsely right, and random ones that differ."""

import json
import string

import common

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

CASES = [json.loads(line) for line in (ROOT / "tests/answers.jsonl").read_text().splitlines()]
# What the rule takes for wrong and a reader would not. docs/answers.md says why.
FALSELY_WRONG = {
    ("1, 2", "2, 1"),  # a bare list keeps its order, as a grid's row and column do
    (r"0.\overline{3}", "1/3"),  # repeating decimals are not read
    ("3=3", "3"),  # a statement of numbers: 5=7 is not 7
}
ONE_SIDED = r"\boxed{\left\{\begin{array}{l}x=1\\y=2\end{array}\right.}"  # its braces do not pair


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['said']} = {case['gold']}"[:60])
def test_verdicts(case):
    said = case["said"]
    if case["kind"] == "response":
        said = common.extract_answer(said)
    right = case["right"]
    if (said, case["gold"]) in FALSELY_WRONG or case["said"] == ONE_SIDED:
        right = False
    assert common.is_correct(said, case["gold"]) is right


WORD = st.text(string.ascii_lowercase, min_size=1, max_size=7)
CODE = (  # of two characters at least: "A:" is the option A
    st.tuples(
        st.sampled_from(string.ascii_uppercase),
        st.text(string.ascii_uppercase + "0123456789-/.:", min_size=1, max_size=6),
    )
    .map("".join)
    .filter(lambda code: sum(map(str.isalnum, code)) > 1)
)
DATE = st.dates().flatmap(
    lambda day: st.sampled_from([f"{day:%Y-%m-%d}", f"{day:%d/%m/%Y}", f"{day:%d.%m.%Y}"])
)
ORDER = st.permutations("ABCDE").flatmap(
    lambda order: st.sampled_from([sign.join(order) for sign in ("", "-", ">", " > ")])
)
SHUFFLED = WORD.flatmap(lambda word: st.permutations(list(word)).map("".join))


@settings(max_examples=1000, deadline=None)
@given(
    st.one_of(
        st.tuples(WORD, WORD),
        st.tuples(CODE, CODE),
        st.tuples(DATE, DATE),
        st.tuples(ORDER, ORDER),
        WORD.flatmap(
            lambda word: st.tuples(st.just(word), st.permutations(list(word)).map("".join))
        ),
        CODE.flatmap(
            lambda code: st.tuples(st.just(code), st.permutations(list(code)).map("".join))
        ),
    )
)
def test_different_words_codes_dates_and_orders_are_different(pair):
    ours, gold = (common.plain(text).casefold() for text in pair)
    if ours.replace(" ", "") != gold.replace(" ", ""):
        assert not common.is_correct(*pair)


def test_one_verdict_in_training_and_in_evaluation():
    """What was cut off has not answered, whatever it had in a box by then."""
    cut = common.Response([1], finished=False, text=r"\boxed{3}")
    whole = common.Response([1], text=r"\boxed{3}")
    row = {"problem": "How many?", "answer": "3"}
    assert not common.is_right(cut, row) and common.is_right(whole, row)


COLOURS = "<image>What colour?\nA. red\nB. blue\nC. dark blue\nD. None of the above"
ANGLES = "In triangle ABC, with A: right angle. Which? (A) 30° (B) 45° (C) 2, 3 (D) 90 cm"


@pytest.mark.parametrize(
    "problem, answer, said, right",
    [
        (COLOURS, "B", "blue", True),
        (COLOURS, "(B)", r"\text{Blue}", True),
        (COLOURS, "B", "b", True),
        (COLOURS, "B", "B. the blue one", True),
        (COLOURS, "B", "dark blue", False),
        (COLOURS, "B", "A. blue", False),
        (COLOURS, "B", "red or blue", False),
        (COLOURS, "D", "none of the above", True),
        (COLOURS, ["B", "C"], "dark blue", True),
        (COLOURS, "red", "A", False),
        (ANGLES, "A", r"30^\circ", True),
        (ANGLES, "A", "right angle", False),
        (ANGLES, "C", "2, 3", True),
        (ANGLES, "D", "90", True),
        (ANGLES, "D", "90 m", False),
    ],
)
def test_an_options_text_counts_as_its_letter(problem, answer, said, right):
    response = common.Response([1], text=rf"\boxed{{{said}}}")
    assert common.is_right(response, {"problem": problem, "answer": answer}) is right
