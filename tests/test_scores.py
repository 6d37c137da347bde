"""tools/scores.py against exact counts, a bootstrap and the official formulas of the groups."""

import itertools
import json
import math
import random
import time

import common
from tools import rules, scores

import numpy as np
import pytest


def record(right, row=0, sample=None, **more):
    kept = {
        "set": "s",
        "row": row,
        "sample": sample,
        "right": right,
        "extracted": "1" if right else "2",
        "finished": True,
    }
    return kept | more


def drawn(*rights, row=0, **more):
    """Samples of one question."""
    return [record(right, row, i, **more) for i, right in enumerate(rights)]


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n):
    """By going through every way to draw k of n."""
    for c in range(n + 1):
        answers = [1] * c + [0] * (n - c)
        for k in range(1, n + 1):
            draws = list(itertools.combinations(answers, k))
            share = sum(map(any, draws)) / len(draws)
            assert scores.pass_at(n, c, k) == pytest.approx(share, abs=1e-12)


def test_standard_errors_are_a_bootstraps():
    """Of acc@1, acc@n, pass@k and maj@k: resampled are questions, not answers."""
    rng = random.Random(0)
    questions = []
    for row in range(120):
        chance = rng.random()
        questions.append([record(rng.random() < chance, row)])
        questions[-1] += drawn(*(rng.random() < chance for _ in range(6)), row=row)
    found = scores.metrics(list(itertools.chain(*questions)), [2, 6])["metrics"]
    assert list(found) == ["acc@1", "acc@6", "pass@2", "maj@2", "pass@6", "maj@6"]
    values = {name: [] for name in found}
    for _ in range(100):
        chosen = [[answer | {"row": row} for answer in rng.choice(questions)] for row in range(120)]
        again = scores.metrics(list(itertools.chain(*chosen)), [2, 6])["metrics"]
        for name, (mean, _) in again.items():
            values[name].append(mean)
    for name, (mean, error) in found.items():
        assert np.std(values[name]) == pytest.approx(error, rel=0.3)
        assert np.mean(values[name]) == pytest.approx(mean, abs=error / 4)


def test_each_answer_of_the_same_question_counts_once():
    answers = drawn(True, True, False, False) + drawn(False, False, False, True, row=1)
    found = scores.metrics(answers, [1, 2, 4])["metrics"]
    assert found["acc@4"][0] == pytest.approx(100 * (2 / 4 + 1 / 4) / 2)
    assert found["acc@4"][1] == pytest.approx(100 * math.sqrt((0.125**2) * 2 / 1 / 2))
    assert found["pass@1"] == found["acc@4"]
    assert found["pass@2"][0] == pytest.approx(100 * ((1 - 1 / 6) + 1 / 2) / 2, abs=1e-4)
    assert found["pass@4"] == [100.0, 0.0]
    assert "acc@1" not in found  # nothing was answered greedily


@pytest.mark.parametrize(
    "answers, right",
    [
        ([("1/2", 1), ("0.5", 1), ("3", 0)], 1.0),  # equal in value
        ([("3", 0), ("4", 0), ("3", 0), ("1", 1)], 0.0),
        ([("3", 0), ("1", 1)], 0.5),  # a tie
        ([(None, 0), (None, 0), ("1", 1)], 1.0),  # no answer has no vote
        ([(None, 0)], 0.0),
        ([("$B$", 1), ("(B)", 1), ("A", 0)], 1.0),
        ([("\\text{ 7 }", 1), ("7", 1), ("8", 0), ("8", 0), ("8.0", 0)], 0.0),
    ],
)
def test_majority(answers, right):
    assert scores.majority([{"extracted": e, "right": bool(r)} for e, r in answers]) == right


def test_majority_of_k_is_over_consecutive_groups():
    rights = (True, True, False, False, False, True, True)
    answers = [record(right, 0, i) for i, right in enumerate(rights)]
    assert scores.vote(answers, 3) == 0.5 and scores.vote(answers, 7) == 1.0
    assert scores.vote(answers, 1) == pytest.approx(4 / 7)


def test_greedy_and_sampled_are_kept_apart():
    answers = [record(True), record(False, 1)] + drawn(False) + drawn(False, row=1)
    found = scores.metrics(answers, [])["metrics"]
    assert found["acc@1"][0] == 50 and found["acc@1 sampled"][0] == 0


@pytest.mark.parametrize("k", [0, -1, 3])
def test_a_k_of_which_there_are_no_samples(k):
    with pytest.raises(common.UserError, match=f"--k {k}"):
        scores.metrics(drawn(True, False) + drawn(False, False, row=1), [1, k])


def test_questions_of_several_numbers_of_samples_are_refused():
    """As where a line of answers.jsonl is lost, or only some of a set have been judged."""
    with pytest.raises(common.UserError, match="1 to 3 samples"):
        scores.metrics(drawn(True, True, True) + drawn(False, row=1), [])


def test_the_share_of_finished_answers():
    answers = [record(True), record(False, 1) | {"finished": False}]
    assert scores.metrics(answers, [])["finished"] == 50
    assert "50.0 % finished" in scores.table(scores.results(answers, []))


# ------------------------------------------------------------------------------------------------ groups
def test_group_accuracies_by_hand():
    """Three questions of two figures; every sample by itself, then the mean."""
    table = {0: ("q 1", "f 1"), 1: ("q 1", "f 2"), 2: ("q 2", "f 2")}
    names = {row: [f"{x[0]}Acc {x}" for x in keys] for row, keys in table.items()}
    greedy = [
        record(right, row, groups=names[row]) for row, right in enumerate((True, True, False))
    ]
    found = scores.metrics(greedy, [])["metrics"]
    assert (
        found["qAcc"][0] == 50
        and found["fAcc"][0] == 50
        and found["acc@1"][0] == pytest.approx(66.6667)
    )
    samples = []
    for row, rights in enumerate([(True, False), (True, True), (True, False)]):
        samples += drawn(*rights, row=row, groups=names[row])
    found = scores.metrics(samples, [])["metrics"]
    assert found["qAcc@2"][0] == 50 and found["fAcc@2"][0] == 50  # 2, 2 right of the first; none


@pytest.mark.parametrize(
    "steps, whole, strict, loose",
    [
        ((1, 1), 1, 1, 1),  # complete mastery
        ((1, 0), 1, 0, 1),  # by rote, strictly
        ((0, 0), 1, 0, 0),
        ((1, 1), 0, 0.5, 0.5),  # inadequate generalisation
        ((1, 0), 0, 0, 0),  # insufficient knowledge
        ((1, 1, 0), 1, 0, 1),
        ((1, 1, 1), 0, 0.5, 0.5),
    ],
)
def test_mastery(steps, whole, strict, loose):
    kind = f"{len(steps)}steps"
    answers = [record(bool(x), i, category=f"{kind}_{i + 1}") for i, x in enumerate(steps)]
    answers.append(record(bool(whole), 9, category=f"{kind}_multi"))
    assert scores.mastery(answers, all) == strict and scores.mastery(answers, any) == loose
    answers = [answer | {"groups": ["strict 1", "loose 1"]} for answer in answers]
    found = scores.results(answers, [])["s"]
    assert found["metrics"]["strict"][0] == 100 * strict
    # a category has one step of a problem: no score of it
    assert all(list(part["metrics"]) == ["acc@1"] for part in found["categories"].values())


def test_balanced_is_the_mean_of_means():
    assert scores.balanced({"2D/ADE20K": 60, "2D/COCO": 80, "3D/Omni3D": 30}) == 50
    assert scores.balanced({"a": 10, "b": 20, "c": 60}) == 30


def test_categories_and_a_set_for_a_judge():
    answers = [record(True, 0, category="a"), record(False, 1, category="b")]
    answers += [record(False, 2, category="b"), record(None, 0) | {"set": "other"}]
    found = scores.results(answers, [])
    assert found["s"]["questions"] == 3 and found["s"]["categories"]["b"]["questions"] == 2
    assert found["s"]["metrics"]["balanced"] == [50.0, None]
    assert found["other"]["metrics"] == {}
    shown = scores.table(found)
    assert "acc@1 33.3 ± 33.3" in shown and "written out for a judge" in shown
    json.dumps(found, allow_nan=False)


def test_a_judge_s_verdicts_are_kept():
    answers = [record(None, row, rule="judge", response="?", problem="?") for row in range(2)]
    for answer in answers:
        answer |= rules.judge(answer)
    assert scores.results(answers, [])["s"]["metrics"] == {}
    for answer, share in zip(answers, (0.4, True)):
        answer["right"] = share
        answer |= rules.judge(answer)
    assert scores.results(answers, [])["s"]["metrics"]["acc@1"][0] == 70


def test_the_mean_over_sets():
    """Of what all have; errors of independent sets; none where there is one set, and none of a set for a judge."""
    one = {"questions": 10, "finished": 90.0, "metrics": {"acc@1": [50.0, 3.0], "qAcc": [1.0, 1.0]}}
    other = {"questions": 30, "finished": 100.0, "metrics": {"acc@1": [100.0, 4.0]}}
    judged = {"questions": 5, "finished": 100.0, "metrics": {}}
    found = scores.over_sets({"a": one, "b": other, "c": judged})["mean"]
    assert found["metrics"] == {"acc@1": [75.0, 2.5]} and found["questions"] == 45
    assert scores.over_sets({"a": one, "c": judged}) == {}
    single = {"questions": 1, "finished": 100.0, "metrics": {"acc@1": [100.0, None]}}
    found = scores.over_sets({"a": one, "b": single})["mean"]
    assert found["metrics"] == {"acc@1": [75.0, None]}


def test_a_category_that_waits_for_its_judge():
    answers = [record(True, 0, category="a"), record(None, 1, category="b")]
    found = scores.results(answers, [])["s"]
    assert found["metrics"]["acc@1"][0] == found["metrics"]["balanced"][0] == 100
    assert found["categories"]["b"]["metrics"] == {}


# ------------------------------------------------------------------------------------------------ rules
def verdict(text, answer, rule="answer", **more):
    row = {"problem": "?", "answer": answer, "rule": rule, "tolerance": 0.0}
    return rules.judge(row | {"response": text, "finished": True} | more)["right"]


def test_an_answer_that_was_cut_off_is_none():
    for rule in rules.RULES:
        found = rules.judge(
            {
                "problem": "?",
                "answer": ["3"],
                "rule": rule,
                "tolerance": 1.0,
                "response": "\\boxed{3}",
                "finished": False,
            }
        )
        assert found["extracted"] is None and not found["right"]


@pytest.mark.parametrize(
    "text, right",
    [
        ("3.142", 1),
        ("3.1421", 1),
        ("3.1431", 0),
        ("3.143", 1),
        ("3.1409", 0),
        ("pi", 0),
        ("3.142 cm", 1),
        ("", 0),
    ],
)
def test_numbers_within_a_tolerance(text, right):
    assert verdict(f"\\boxed{{{text}}}", "3.142", "number", tolerance=0.001) == bool(right)


@pytest.mark.parametrize(
    "text, answer, right",
    [
        ("cubes", "cube", 1),
        ("Seven", "7", 1),
        ("a box", "boxes", 1),
        ("glass", "glass", 1),
        ("glasses", "glass", 1),
        ("round", "square", 0),
        ("", "cube", 0),
        ("two cubes", "cube", 0),
    ],
)
def test_words(text, answer, right):
    assert verdict(f"\\boxed{{{text}}}", answer, "word") == bool(right)


@pytest.mark.parametrize(
    "text, answer, right",
    [
        ("rows={5} columns={4}", "5,4", 1),
        ("5, 4", "5,4", 1),
        ("4, 5", "5,4", 0),
        ("{5}", "5", 1),
        ("15", "5", 0),
        ("yes", "Yes", 1),
        ("{o}", "o", 1),
        ("t", "o", 0),
    ],
)
def test_counts(text, answer, right):
    assert verdict(f"\\boxed{{{text}}}", answer, "counts") == bool(right)


def test_anls_against_the_definition():
    """1 - Levenshtein distance / the longer length, of the nearest; below one half 0."""
    assert rules.edit_distance("kitten", "sitting") == 3 and rules.edit_distance("", "abc") == 3
    assert verdict("\\boxed{5 Million}", ["5 million", "five"], "anls") == 1
    assert verdict("\\boxed{kitten}", ["sitting"], "anls") == pytest.approx(1 - 3 / 7)
    assert verdict("\\boxed{abcd}", ["abzz"], "anls") == 0.5  # one half counts
    assert verdict("\\boxed{abcd}", ["azzz"], "anls") == 0
    assert verdict("no box", ["no box"], "anls") == 0


@pytest.mark.slow
def test_ten_thousand_answers_are_rescored_in_a_minute():
    """Eight samples of 1,250 questions, on one core."""
    rng, answers = random.Random(0), []
    forms = ["\\frac{%d}{2}", "%d", "(%d)", "x=%d", "%d cm", "\\text{%d}", "%d.50", "option %d"]
    for row in range(1250):
        gold = rng.randrange(9)
        for i in range(8):
            said = rng.choice(forms) % rng.choice([gold, rng.randrange(9)])
            answers.append(
                {
                    "set": "s",
                    "row": row,
                    "sample": i,
                    "problem": "How many? A. 1 B. 2",
                    "answer": [str(gold)],
                    "response": f"<reason>{'so ' * 200}</reason> \\boxed{{{said}}}",
                    "finished": True,
                }
            )
    start = time.process_time()
    for answer in answers:
        answer |= rules.judge(answer)
    scores.results(answers, [1, 8])
    assert time.process_time() - start < 60
