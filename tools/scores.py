"""What benchmarks make of verdicts. No model is needed here.

`results` turns the records of several sets (tools/rules.py) into numbers, each a mean and its standard error over
questions. n sampled answers a question, c of them right:

    acc@1           the greedy answer's accuracy
    acc@n           mean of c / n (the papers' Acc@n and Avg@n)
    pass@k          1 - C(n - c, k) / C(n, k): that one of k drawn ones is right (Chen et al., arXiv:2107.03374, Eq. 1)
    maj@k           of k consecutive samples the answer given most often is right; mean over the n // k such groups
    qAcc, fAcc      HallusionBench: all questions of a group are right (one question, one figure)
    worst           DynaMath: all variants of a question are right
    strict, loose   We-Math: 1 where the whole problem is right and all (loose: some) of its steps; 0.5 where all steps
                    are right and the whole is not
    balanced        mean over categories ("2D/COCO": over COCO and its neighbours, then over 2D and its neighbours)

    mean            over the sets, as most papers' last column: each counts once, its error as independent

    finished        share of the answers that ended by themselves; the others count as wrong

With n samples a group's number is its mean over the first, the second, ... sample of each question, named qAcc@n.
"""

import functools
import math
import re
from collections import Counter, defaultdict

import common

import numpy as np


# =============================================================================================== estimators
def pass_at(n: int, c: int, k: int) -> float:
    """Chance that k of n answers, drawn without replacement, hold one of the c right ones."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


are_equal = functools.cache(common.is_correct)  # categories ask it again
RIGHT = object()  # the answer that is voted for by whoever is right


def majority(answers: list[dict]) -> float:
    """Whether the answer given most often is right; where several are, their mean. No answer has no vote."""
    votes = Counter()
    for answer in answers:
        if answer["right"]:  # all of these are equal to the reference
            votes[RIGHT] += 1
        elif answer["extracted"] is not None:
            form = common.plain(answer["extracted"])
            # equal in value, as 1/2 and 0.5
            wrong = (x for x in votes if x is not RIGHT and are_equal(x, form))
            votes[form if form in votes else next(wrong, form)] += 1
    most = max(votes.values(), default=0)
    first = [x for x in votes if votes[x] == most]
    return float(RIGHT in first) / len(first) if first else 0.0


def check_ks(ks: list[int], n: int):
    for k in ks:
        if not 1 <= k <= n:
            raise common.UserError(f"--k {k}: of {n} samples a question k may be 1 to {n}")


def vote(answers: list[dict], k: int) -> float:
    """maj@k of one question's samples."""
    starts = range(0, len(answers) - k + 1, k)
    return float(np.mean([majority(answers[i : i + k]) for i in starts]))


def mean(values) -> list:
    """[mean, standard error of the mean] over questions, in percent; one question has no error."""
    x = 100 * np.asarray(list(values), dtype=float)
    error = None
    if len(x) > 1:
        error = round(x.std(ddof=1) / math.sqrt(len(x)), 4)
    return [round(x.mean(), 4), error]


# =============================================================================================== groups
def all_right(answers: list[dict]) -> float:
    return float(all(a["right"] for a in answers))


def mastery(answers: list[dict], enough) -> float:
    """We-Math's four cases. The whole problem is the answer of category ...multi, the others are its steps."""
    steps, whole = [], False
    for a in answers:
        if a["category"].endswith("multi"):
            whole = a["right"]
        else:
            steps.append(a["right"])
    if whole:  # complete mastery, or by rote
        return float(enough(steps))
    return 0.5 if all(steps) else 0.0  # inadequate generalisation, or insufficient knowledge


MASTERY = re.compile("strict|loose")
REDUCE = {
    "qAcc": all_right,
    "fAcc": all_right,
    "worst": all_right,
    "strict": lambda answers: mastery(answers, all),
    "loose": lambda answers: mastery(answers, any),
}


def by(records: list[dict], key: str) -> dict:
    """Value of a key, as a text -> records, in their order."""
    found = defaultdict(list)
    for record in records:
        found[str(record.get(key))].append(record)
    return found


def grouped(answers: list[dict]) -> dict[str, list[float]]:
    """Name of a group metric -> a value a group. answers: one a question."""
    members = defaultdict(list)
    for answer in answers:
        for name in answer.get("groups") or ():
            members[name].append(answer)
    found = defaultdict(list)
    for name, group in members.items():
        metric = name.split(" ")[0]
        found[metric].append(REDUCE[metric](group))
    return found


def balanced(means: dict[str, float]) -> float:
    """{"2D/a": 1, "2D/b": 0, "3D": 1} -> 0.75."""
    tops = defaultdict(dict)
    for path, value in means.items():
        top, _, below = path.partition("/")
        tops[top][below] = value
    total = 0.0
    for inner in tops.values():
        total += inner[""] if "" in inner else balanced(inner)
    return total / len(tops)


# =============================================================================================== results
def of_greedy(answers: list[dict]) -> dict:
    """acc@1, and the group metrics."""
    found = {"acc@1": mean(a["right"] for a in answers)}
    for name, values in grouped(answers).items():
        found[name] = mean(values)
    return found


def of_samples(answers: list[dict], ks: list[int]) -> dict:
    """acc@n, pass@k, maj@k, and the group metrics."""
    questions = by(answers, "row").values()
    n = max(map(len, questions))
    least = min(map(len, questions))
    if least < n:
        raise common.UserError(f"questions have {least} to {n} samples, and not the same number")
    check_ks(ks, n)
    right = [sum(a["right"] for a in of_one) for of_one in questions]
    found = {f"acc@{n}": mean(c / n for c in right)}
    if all(c == int(c) for c in right):  # no shares, as anls gives
        for k in ks or [n]:
            found[f"pass@{k}"] = mean(pass_at(n, int(c), k) for c in right)
            found[f"maj@{k}"] = mean(vote(of_one, k) for of_one in questions)
    drawn = [grouped(of_one) for of_one in by(answers, "sample").values()]
    for name in drawn[0]:
        found[f"{name}@{n}"] = mean(np.mean([groups[name] for groups in drawn], axis=0))
    return found


def metrics(records: list[dict], ks: list[int]) -> dict:
    """Number of questions, and metric -> [mean, standard error]. ks: of pass@k and maj@k; empty: the samples."""
    scored = [r for r in records if r["right"] is not None]
    greedy = [r for r in scored if r["sample"] is None]
    drawn = [r for r in scored if r["sample"] is not None]
    found = of_greedy(greedy) if greedy else {}
    if drawn:
        more = of_samples(drawn, ks)
        if "acc@1" in more:  # of one sample: not the greedy one
            more["acc@1 sampled"] = more.pop("acc@1")
        found |= more
    finished, _ = mean(r["finished"] for r in records)
    return {"questions": len(by(records, "row")), "finished": finished, "metrics": found}


def results(records: list[dict], ks: list[int]) -> dict:
    """Set -> its metrics, and those of every category."""
    found = {}
    for name, of_set in by(records, "set").items():
        found[name] = whole = metrics(of_set, ks)
        categories = by(of_set, "category")
        if len(categories) < 2:
            continue
        parts = {category: metrics(part, ks) for category, part in categories.items()}
        for part in parts.values():
            # We-Math's categories are steps: none has all of a problem
            part["metrics"] = {
                name: pair for name, pair in part["metrics"].items() if not MASTERY.match(name)
            }
        whole["categories"] = parts
        for metric in list(whole["metrics"])[:1]:
            # a category may still wait for its judge
            means = {
                category: part["metrics"][metric][0]
                for category, part in parts.items()
                if metric in part["metrics"]
            }
            whole["metrics"]["balanced"] = [round(balanced(means), 4), None]
    return found | over_sets(found)


def over_sets(found: dict) -> dict:
    """{"mean": ...} of the metrics that all scored sets have, where there are several."""
    scored = [of_set["metrics"] for of_set in found.values() if of_set["metrics"]]
    if len(scored) < 2:
        return {}
    means = {}
    for name in scored[0]:
        values, errors = zip(*(metrics.get(name, [None, None]) for metrics in scored))
        if None in values:
            continue
        error = None
        if None not in errors:
            error = round(math.hypot(*errors) / len(scored), 4)
        means[name] = [round(sum(values) / len(scored), 4), error]
    questions = sum(of_set["questions"] for of_set in found.values())
    finished = np.mean([of_set["finished"] for of_set in found.values()])
    return {"mean": {"questions": questions, "finished": round(finished, 4), "metrics": means}}


def table(found: dict) -> str:
    """The results as lines of text: a set, and below it its categories."""
    lines = []
    for name, of_set in found.items():
        parts = {name: of_set}
        for category, part in of_set.get("categories", {}).items():
            parts[f"  {category}"] = part
        for label, part in parts.items():
            numbers = [shown(metric, *pair) for metric, pair in part["metrics"].items()]
            judged = ", ".join(numbers) or "written out for a judge"
            ended = f"{part['finished']:.1f} % finished"
            lines.append(f"{short(label):32} {part['questions']:6}  {ended}  {judged}")
    return "\n".join(lines)


def shown(metric: str, value: float, error) -> str:
    text = f"{metric} {value:.1f}"
    return text if error is None else f"{text} ± {error:.1f}"


def short(label: str) -> str:
    """At most 32 characters, the end among them, which tells files of one folder apart."""
    return label if len(label) < 33 else f"{label[:4]}..{label[-26:]}"
