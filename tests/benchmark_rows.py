r"""Rows of every benchmark in its published schema, with contents of our own, and what has to become of them.

    rows        as published: column names and types; an Image's cell is {"bytes", "path"}
    asked       the question of each of our rows as a model sees it, and the sizes of the images that its marks show
    answers     of each of our rows: the answer that it is checked against (a list: alternatives)
    verdicts    of our row n: right answers and wrong ones, each between two ";"; they are put into \boxed{}

Sizes tell images from each other. The verdicts are those of the benchmark's own scorer, but for DIFFERENCES.
"""

import io
from dataclasses import dataclass, field

from PIL import Image


@dataclass
class Published:
    rows: list[dict]
    asked: list[tuple[str, str]]
    answers: list
    verdicts: dict[int, tuple[str, str]]
    files: dict[str, bytes] = field(
        default_factory=dict
    )  # images beside rows that name them by path


def png(width: int, height: int = 32) -> bytes:
    """An image of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (width, 90, 200)).save(file, "PNG")
    return file.getvalue()


def shown(width: int, height: int = 32) -> dict:
    """A cell of an Image column."""
    return {"bytes": png(width, height), "path": None}


SETS: dict[str, Published] = {}
# Where ours and the official verdict differ on purpose: name, row, answer in the box, our verdict, why.
DIFFERENCES: list[tuple[str, int, str, bool, str]] = []


# =============================================================================================== MMMU-Pro
def mmmu_pro(question, options, answer, *images):
    """options are a text; the seven columns of images are always there."""
    columns = {f"image_{i}": image for i, image in enumerate([*images, *[None] * 7][:7], 1)}
    rest = {
        "id": "test_Art_7",
        "question": question,
        "options": options,
        "explanation": "?",
        "img_type": "['Paintings']",
        "answer": answer,
        "topic_difficulty": "Easy",
        "subject": "Art",
    }
    return rest | columns


SETS["mmmu-pro-4"] = Published(
    rows=[
        mmmu_pro(
            "<image 1> was painted by whom?",
            "['James Roe', \"Ann O'Hara\", 'No one', 'Both, it is said']",
            "B",
            shown(32),
        ),
        # options that are images, in another order than their columns
        mmmu_pro(
            "Which goes with <image 1>?",
            "['<image 3>', '<image 2>', 'neither']",
            "A",
            shown(32),
            shown(48),
            shown(64),
        ),
        # one of two images is named: both are shown
        mmmu_pro("Is <image 2> the older one?", "['Yes', 'No']", "B", shown(32), shown(48)),
    ],
    asked=[
        (
            "<image> was painted by whom?\nA. James Roe\nB. Ann O'Hara\nC. No one\nD. Both, it is said",
            "32",
        ),
        ("Which goes with <image>?\nA. <image>\nB. <image>\nC. neither", "32 64 48"),
        ("<image><image>Is (image 2) the older one?\nA. Yes\nB. No", "32 48"),
    ],
    answers=["B", "A", "B"],
    verdicts={
        0: (
            r"B; (B); B.; **B**; \text{B}; B. Ann O'Hara; (B) Ann O'Hara; Answer: B; Ann O'Hara",
            r"A; C; D; E; A or B; A, B; A. James Roe; James Roe; none; 2",
        ),
        1: ("A; (A)", "B; C; A and B; neither"),
        2: ("B; B. No; (B)", "A; Yes; A. Yes; (A) or (B)"),
    },
)
DIFFERENCES += [
    (
        "mmmu-pro-4",
        2,
        "No",
        False,
        "official: by chance; ours: yes and no are options of their own",
    ),
    ("mmmu-pro-4", 0, "James", False, "official: no letter, so that one is drawn at random"),
    ("mmmu-pro-4", 0, "b", True, "official: small letters are none, so that one is drawn"),
    ("mmmu-pro-4", 0, "(A) or (B)", False, "official: of several letters, the last"),
]

TEN = [f"{10 * i} per cent" for i in range(1, 11)]
SETS["mmmu-pro-10"] = Published(
    rows=[
        mmmu_pro("How much is shaded in <image 1>?", str(TEN), "J", shown(32)),
        mmmu_pro("Who is it?\n<image 1>", "['Ann', 'Bob', 'Cy']", "C", shown(48)),
    ],
    asked=[
        (
            "How much is shaded in <image>?"
            + "".join(f"\n{letter}. {text}" for letter, text in zip("ABCDEFGHIJ", TEN)),
            "32",
        ),
        ("Who is it?\n<image>\nA. Ann\nB. Bob\nC. Cy", "48"),
    ],
    answers=["J", "C"],
    verdicts={
        0: (
            "J; (J); J.; J. 100 per cent; 100 per cent; **J**",
            "A; I; K; A. 10 per cent; H; A or J; (J) or (I); J. or I.; 10",
        ),
        1: ("C; (C); Cy; C. Cy", "A; B; Bob; B or C; D"),
    },
)
DIFFERENCES += [
    ("mmmu-pro-10", 0, "J. A dramatic rise", True, 'official: "A " comes before "J."'),
]

SETS["mmmu-pro-vision"] = Published(
    rows=[
        {
            "id": "validation_Math_3",
            "image": shown(32),
            "options": "['1', '2', '3']",
            "answer": "C",
            "subject": "Math",
        },
        {
            "id": "test_Art_9",
            "image": shown(48),
            "options": "['red', 'blue', 'green', 'black']",
            "answer": "A",
            "subject": "Art",
        },
    ],
    asked=[
        ("<image>Answer the question in the image.", "32"),
        ("<image>Answer the question in the image.", "48"),
    ],
    answers=["C", "A"],
    verdicts={
        0: ("C; (C); C. 3; **C**; Option C", "A; B; D; B or C; B, C; 2"),
        1: ("A; (A) red", "B; blue; A/B"),
    },
)
DIFFERENCES += [
    (
        "mmmu-pro-vision",
        0,
        "3",
        False,
        "official: too short to be an option's text; drawn at random",
    ),
]


# =============================================================================================== mathematics, drawn
def mathverse(version, question, query, answer, kind, width):
    return {
        "sample_index": "12",
        "problem_index": "3",
        "problem_version": version,
        "question": question,
        "image": shown(width),
        "answer": answer,
        "question_type": kind,
        "metadata": {
            "split": "testmini",
            "source": "GeoQA",
            "subject": "Plane Geometry",
            "subfield": "Angle",
        },
        "query_wo": f"Please directly answer the question.\nQuestion: {question}",
        "query_cot": query,
        "question_for_eval": "AB is parallel to CD. How large is angle 2?",
    }


CHOICES = "AB is parallel to CD. Angle 2 is ()\nChoices:\nA:40°\nB:60°\nC:120°\nD:140°"
LETTER = "provide the correct option letter, e.g., A, B, C, D, at the end."
REASON = "please first conduct reasoning, and then answer the question and"
IN_IMAGE = f"According to the question shown in the image, {REASON} {LETTER}"
VALUE = f"P{REASON[1:]} provide the final value, e.g., 1, 2.5, 300, at the end.\nQuestion: "
SETS["mathverse"] = Published(
    rows=[
        mathverse(
            "Text Dominant",
            CHOICES,
            f"P{REASON[1:]} {LETTER}\nQuestion: {CHOICES}",
            "D",
            "multi-choice",
            32,
        ),
        mathverse("Vision Only", "", IN_IMAGE, "B", "multi-choice", 48),
        mathverse("Text Lite", "Its domain?", f"{VALUE}Its domain?", "(-2, 1]", "free-form", 64),
        mathverse("Text Lite", "Its area?", f"{VALUE}Its area?", "14", "free-form", 80),
    ],
    asked=[
        (f"<image>P{REASON[1:]} {LETTER}\nQuestion: {CHOICES}", "32"),
        (f"<image>{IN_IMAGE}", "48"),
        (f"<image>{VALUE}Its domain?", "64"),
        (f"<image>{VALUE}Its area?", "80"),
    ],
    answers=["D", "B", "(-2, 1]", "14"],
    verdicts={
        0: (
            r"D; (D); D:140°; D. 140°; 140°; 140^\circ; 140; $140^{\circ}$; 140 degrees",
            r"A; A:40°; 40°; C or D; C, D; 14°; 120",
        ),
        1: ("B; (B); B. 60; **B**", "A; D; A or B"),
        2: (r"(-2, 1]; (-2,1]; $(-2, 1]$; \left(-2, 1\right]", "(-2, 1); [-2, 1]; (1, -2]; -2; B"),
        3: ("14; 14.0; $14$; 14 cm^2; A = 14", "15; 1.4; 13 or 14; -14; 14, 15"),
    },
)


def part(name: str, taken: list[int], rows: list[dict]) -> Published:
    """The same rows and some more, of which those are taken that were these."""
    whole = SETS[name]
    return Published(
        rows=whole.rows + rows,
        asked=[whole.asked[i] for i in taken],
        answers=[whole.answers[i] for i in taken],
        verdicts={n: whole.verdicts[i] for n, i in enumerate(taken)},
    )


DOMINANT = [SETS["mathverse"].rows[0] | {"problem_version": "Vision Dominant"}]
SETS["mathverse-choice"] = part("mathverse", [0, 1], [])  # without free answers
SETS["mathverse-vd"] = part("mathverse", [0], DOMINANT)
SETS["mathverse-vo"] = part("mathverse", [1], DOMINANT)
SETS["mathverse-v"] = part("mathverse", [1, 0], DOMINANT)


def mathvision(question, options, answer, width):
    return {
        "id": "27",
        "question": question,
        "options": options,
        "image": "images/27.jpg",
        "decoded_image": shown(width),
        "answer": answer,
        "solution": None,
        "level": 5,
        "subject": "metric geometry - length",
    }


SETS["mathvision"] = Published(
    rows=[
        mathvision(
            "In which order?\n<image1>",
            [r"$\Delta, \square$", r"$\square, \Delta$", "none", "both", "any"],
            "A",
            32,
        ),
        # options in the picture, and images that are one picture
        mathvision("Which of <image1>, <image2>, <image3> fits?", list("ABCDE"), "E", 48),
        mathvision("How many digits?\n<image1>", [], "6", 64),
        # one mark twice: the picture is shown twice
        mathvision("<image1> How long is <image1>?", [], r"\frac{1}{2}", 80),
        mathvision("Which is it?", [], "B", 96),
    ],
    asked=[
        (
            "In which order?\n<image>"
            "\nA. $\\Delta, \\square$\nB. $\\square, \\Delta$\nC. none\nD. both\nE. any",
            "32",
        ),
        ("<image>Which of (image 1), (image 2), (image 3) fits?", "48"),
        ("How many digits?\n<image>", "64"),
        ("<image> How long is <image>?", "80 80"),
        ("<image>Which is it?", "96"),
    ],
    answers=["A", "E", "6", r"\frac{1}{2}", "B"],
    verdicts={
        0: (
            r"A; (A); \text{A}; \Delta, \square; $\Delta, \square$; A. $\Delta, \square$",
            r"B; \square, \Delta; \Delta; A or B; none; A, B",
        ),
        1: ("E; (E); e; {E}", "A; D; D or E; 5"),
        2: (r"6; 6.0; $6$; \text{6}; 6 \text{ km}; n = 6", "5; 66; 6 or 7; 0.6; F"),
        3: (r"\frac{1}{2}; 1/2; 0.5; \frac12; \dfrac{1}{2}; \frac{2}{4}", r"2; \frac{2}{1}; -0.5"),
        4: ("B; (B); b", "A; A or B"),
    },
)
SETS["mathvision-mini"] = SETS["mathvision"]
DIFFERENCES += [
    ("mathvision", 2, "6.001", False, "official: rounded to two decimals; ours: numbers are exact"),
]


def mathvista(question, query, answer, kind, width, choices=None, precision=None, unit=None):
    return {
        "pid": "1",
        "question": question,
        "image": "images/1.jpg",
        "decoded_image": shown(width),
        "choices": choices,
        "unit": unit,
        "precision": precision,
        "answer": answer,
        "question_type": "multi_choice" if choices else "free_form",
        "answer_type": kind,
        "metadata": {
            "category": "math-targeted-vqa",
            "context": "scientific figure",
            "grade": "college",
            "img_height": 32,
            "img_width": width,
            "language": "english",
            "skills": ["scientific reasoning"],
            "source": "SciBench",
            "split": "testmini",
            "task": "textbook question answering",
        },
        "query": query,
    }


HINT = "Hint: Please answer the question requiring"
QUERIES = [
    "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
    "Question: Find angle H\nChoices:\n(A) 97\n(B) 102\n(C) 107",
    f"{HINT} a floating-point number with one decimal place and provide the final value, e.g., 1.2, 1.3, 1.4, at the "
    "end.\nQuestion: How far? (Unit: cm)",
    f"{HINT} a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.\n"
    "Question: Which two?",
    f"{HINT} an integer answer and provide the final value, e.g., 1, 2, 3, at the end.\nQuestion: How many?",
    f"{HINT} a floating-point number with two decimal places and provide the final value, e.g., 1.23, 1.34, 1.45, at "
    "the end.\nQuestion: What share?",
]
SETS["mathvista"] = Published(
    rows=[
        mathvista("Find angle H", QUERIES[0], "102", "text", 32, choices=["97", "102", "107"]),
        mathvista("How far?", QUERIES[1], "1.2", "float", 48, precision=1.0, unit="cm"),
        mathvista("Which two?", QUERIES[2], "[2, 8]", "list", 64),
        mathvista("How many?", QUERIES[3], "4", "integer", 80),
        mathvista("What share?", QUERIES[4], "0.21", "float", 96, precision=2.0),
    ],
    asked=[(f"<image>{query}", f"{32 + 16 * i}") for i, query in enumerate(QUERIES)],
    answers=["B", "1.2", "[2, 8]", "4", "0.21"],
    verdicts={
        0: ("B; (B); 102; (B) 102; B. 102; **B**", "A; (A) 97; 97; A or B; 3; 107"),
        1: ("1.2; 1.20; 1.23; 1.16; 1.2 cm; $1.2$", "1.3; 1.26; 12; 1.1; -1.2; 1; B"),
        2: (r"[2, 8]; [2, 8].; $[2, 8]$", "[8, 2]; [2, 9]; [2]; [2, 8, 1]; 2"),
        3: ("4; 4.0; $4$; 4 apples", "5; -4; 40; 3 or 4; four"),
        4: ("0.21; 0.214; 0.206; 0.210", "0.22; 0.2; 21; 0.216"),
    },
)
SETS["mathvista-choice"] = part("mathvista", [0], [])
DIFFERENCES += [
    ("mathvista", 3, "4.9", False, "official: an integer is cut to 4; ours: numbers are exact"),
    ("mathvista", 2, "[2,8]", True, "official: lists are compared as texts, blanks included"),
    ("mathvista", 0, "112", False, "official: the choice at the least edit distance"),
]


def logicvista(question, answer, width, skill):
    return {
        "id": "v1_1",
        "question": question,
        "answer": answer,
        "reasoning": "They are alike.",
        "image": shown(width),
        "skill": [skill],
        "broad_capability": ["diagram"],
        "specific_capability": ["patterns"],
        "imagesource": "tests",
        "sourcelink": "https://example.com",
        "liscenced": "no",
    }


SETS["logicvista"] = Published(
    rows=[
        logicvista("Which choices in the image (A-D) are green?", "A, C", 32, "inductive"),
        logicvista("Which is right? Select from 1-5", "3", 48, "deductive"),
        logicvista("How long is it? A) 10 B) 12 C) 14", "B", 64, "numerical"),
        logicvista("Which of A to I?", "I", 80, "spatial"),
        logicvista("Which three of A to D?", "A, B, C", 96, "mechanical"),
    ],
    asked=[
        ("<image>Which choices in the image (A-D) are green?", "32"),
        ("<image>Which is right? Select from 1-5", "48"),
        ("<image>How long is it? A) 10 B) 12 C) 14", "64"),
        ("<image>Which of A to I?", "80"),
        ("<image>Which three of A to D?", "96"),
    ],
    answers=["A, C", "3", "B", "I", "A, B, C"],
    verdicts={
        0: ("A, C; C, A; A and C; AC; A,C; (A), (C)", "A; C; A, B; A, B, C; A or B; D; B, C, A"),
        1: ("3; (3); 3.", "4; C; 3, 4; 3 or 4; 13"),
        2: ("B; (B); B) 12; b", "A; C; 10; A or B; A, B"),
        3: ("I; (I); I.", "A; H; 1; A, I"),
        4: ("A, B, C; ABC; A, B and C", "A, B; A, B, D; A; D"),
    },
)
DIFFERENCES += [
    ("logicvista", 0, "CA", False, "official: letters are sorted; ours: without a comma in order"),
    ("logicvista", 4, "C, A, B", False, "official: letters are sorted; ours: it may be an order"),
    ("logicvista", 2, "12", True, "official: letters alone; ours: the text of a listed option"),
]

SETS["visualpuzzles"] = Published(
    rows=[
        {
            "id": 1,
            "category": "inductive",
            "image": shown(32),
            "question": "Which figure completes the row?",
            "options": None,
            "answer": "D",
        },
        {
            "id": 3,
            "category": "spatial",
            "image": shown(48),
            "question": "How many pieces have <image1> and <image2>?",
            "options": ["32", "35", "37", "40"],
            "answer": "C",
        },
    ],
    asked=[
        (
            "<image>Which figure completes the row?\nChoose from A, B, C and D in the image.",
            "32",
        ),
        (
            "<image>How many pieces have (image 1) and (image 2)?\nA. 32\nB. 35\nC. 37\nD. 40",
            "48",
        ),
    ],
    answers=["D", "C"],
    verdicts={
        0: ("D; (D); d; {D}; Answer: D; $D$", "A; B; C; C or D; 4"),
        1: ("C; (C); c); 37; C. 37; Answer: (C)", "A; B; 35; B. 35; C or D; 3"),
    },
)
DIFFERENCES += [
    ("visualpuzzles", 0, "(C) or (D)", False, "official: of several letters, the last"),
    (
        "visualpuzzles",
        0,
        "the last one",
        False,
        "official: without a letter one is drawn at random",
    ),
]


def blind(task, prompt, groundtruth, width):
    return {
        "task": task,
        "image": shown(width),
        "prompt": prompt,
        "groundtruth": groundtruth,
        "metadata": '{"image_id": 3}',
    }


BLIND = [
    "How many times do the lines touch each other? Answer with a number in curly brackets, e.g., {5}.",
    "Count the number of rows and columns and answer with numbers in curly brackets. For example, rows={5} columns={6}",
    "Are the two circles touching each other? Answer with Yes/No.",
    "Which letter is being circled? Answer with the letter in curly brackets, e.g. {a}",
]
SETS["vlmsareblind"] = Published(
    rows=[
        blind("Line Plot Intersections", BLIND[0], "1", 32),
        blind("Counting Grid - Blank Grids", BLIND[1], "5,4", 48),
        blind("Touching Circles", BLIND[2], "Yes", 64),
        blind("Circled Letter", BLIND[3], "o", 80),
    ],
    asked=[(f"<image>{prompt}", f"{32 + 16 * i}") for i, prompt in enumerate(BLIND)],
    answers=["1", "5,4", "Yes", "o"],
    verdicts={
        0: (r"1; {1}; \{1\}; 1 time; $1$", "2; 11; 0; one; {2}; Yes"),
        1: (
            r"rows={5} columns={4}; rows=\{5\} columns=\{4\}; (5, 4); 5,4; 5 4; {5} {4}",
            "4,5; rows={4} columns={5}; 5; 54; 5,4,3; 5,5",
        ),
        2: ("Yes; yes; **Yes**; Yes.", "No; no; Yes or no; 1; touching"),
        3: (r"o; O; {o}; \{o\}; (o)", "a; 0; oo; o or a; none"),
    },
)
DIFFERENCES += [
    ("vlmsareblind", 0, "1 or 2", False, "official: the first number; ours: all of them"),
    ("vlmsareblind", 0, "{1}, not {2}", False, "VLMEvalKit: the first braces; ours: all numbers"),
    ("vlmsareblind", 3, "ocean", False, "official: the first letter anywhere"),
]


# =============================================================================================== perception
def mmstar(question, answer, width, category, below):
    return {
        "index": 0,
        "question": question,
        "image": shown(width),
        "answer": answer,
        "category": category,
        "l2_category": below,
        "meta_info": {"source": "MMBench", "split": "val", "image_path": "images/0.jpg"},
    }


STARS = [
    "Which option describes the image?\nOptions: A: A dog runs., B: A cat sits., C: Two birds., D: A car.",
    "How many are there?\nOptions: A: 1, B: 2, C: 3, D: 4",
]
SETS["mmstar"] = Published(
    rows=[
        mmstar(STARS[0], "B", 32, "coarse perception", "image scene and topic"),
        mmstar(STARS[1], "D", 48, "fine-grained perception", "object counting"),
    ],
    asked=[(f"<image>{STARS[0]}", "32"), (f"<image>{STARS[1]}", "48")],
    answers=["B", "D"],
    verdicts={
        0: (
            "B; b; (B); Option B; The answer is B; B: A cat sits.",
            "A; C; A dog runs.; A: A dog runs.; none; E",
        ),
        1: ("D; D. 4; D: 4", "A; C; 3; 1"),
    },
)
DIFFERENCES += [
    ("mmstar", 0, "Both", False, "official: the first character"),
    ("mmstar", 0, "B or C", False, "official: the first character; ours: two are none"),
    ("mmstar", 1, "4", True, "official: letters alone; ours: the text of a listed option"),
]


def hallusion(question, answer, figure, number, width, category="VD", below="illusion"):
    return {
        "category": category,
        "subcategory": below,
        "visual_input": "1",
        "set_id": "0",
        "figure_id": figure,
        "sample_note": "circle",
        "question_id": number,
        "question": question,
        "gt_answer_details": "The right circle is larger.",
        "gt_answer": answer,
        "filename": "./VD/illusion/0_1.png",
        "image": shown(width),
    }


SETS["hallusionbench"] = Published(
    rows=[
        hallusion("Is the right circle smaller?", "0", "1", "2", 32),
        hallusion("Is the right circle larger?", "1", "2", "0", 48, "VS", "figure"),
    ],
    asked=[
        ("<image>Is the right circle smaller?", "32"),
        ("<image>Is the right circle larger?", "48"),
    ],
    answers=["No", "Yes"],
    verdicts={
        0: ("No; no; NO.; No, it is larger; **No**", "Yes; yes, it is; Yes and no; 0; unclear"),
        1: ("Yes; yes; Yes, it is; YES.", "No; no, it is not; maybe; 1"),
    },
)
DIFFERENCES += [
    ("hallusionbench", 1, "It is", False, "official: a judge model reads the whole answer"),
]

CHOICE = "Is the function even? choice: (A) odd (B) even (C) neither"


def dynamath(number, question, truth, kind, width):
    return {
        "id": number,
        "question": question,
        "image": "images/q1.png",
        "decoded_image": shown(width),
        "ground_truth": truth,
        "answer_type": kind,
        "subject": "algebra",
        "knowledge_level": "high school",
    }


SETS["dynamath"] = Published(
    rows=[
        dynamath("1", "What is the period?", "3.142", "float", 32),
        dynamath("2", CHOICE, "B", "multiple choice", 48),
        dynamath("3", "What is the shape?", "circle", "text", 64),
    ],
    asked=[
        ("<image>What is the period?", "32"),
        (f"<image>{CHOICE}", "48"),
        ("<image>What is the shape?", "64"),
    ],
    answers=["3.142", "B", "circle"],
    verdicts={
        0: ("3.142; 3.141; 3.143; 3.1416; 3.142 s; $3.142$", "3.14; 3.144; 3.139; 3; -3.142; B"),
        1: ("B; (B); (B) even; B. even", "A; C; odd; (A) odd; A or B; even or odd"),
        2: (r"circle; a circle; \text{circle}; The circle.", "square; circ; ellipse; C"),
    },
)
DIFFERENCES += [
    ("dynamath", 0, "1π", False, 'official: "1π" is multiplied out; ours: numbers are exact'),
    ("dynamath", 2, "not a circle", False, "official: the reference anywhere in the answer"),
    ("dynamath", 1, "even", True, "official: letters alone; ours: the text of a listed option"),
    ("dynamath", 1, "b", True, "official: small letters are none"),
]


def wemath(problem, key, question, option, answer, width):
    return {
        "ID": problem,
        "split": "testmini",
        "knowledge concept": "Area of Circles",
        "question": question,
        "option": option,
        "answer": answer,
        "image_path": shown(width),
        "key": key,
        "question number": 1575,
        "knowledge concept description": "Area of a circle",
    }


SETS["wemath"] = Published(
    rows=[
        wemath(
            "3steps_165",
            "3steps_3",
            "What is the area ( ) m2?",
            "A. 200.96;B. 3215.36;C. 30, 50, 40.;D. 32; E. No correct answer",
            "B",
            32,
        ),
        # the other semicolon, and colons
        wemath(
            "2steps_5",
            "2steps_multi",
            "Which ratio ( )?",
            "A. 3:4； B: 4;5;C. 5:6；D. No correct answer",
            "C",
            48,
        ),
    ],
    asked=[
        (
            "<image>What is the area ( ) m2?"
            "\nA. 200.96\nB. 3215.36\nC. 30, 50, 40.\nD. 32\nE. No correct answer",
            "32",
        ),
        ("<image>Which ratio ( )?\nA. 3:4\nB. 4;5\nC. 5:6\nD. No correct answer", "48"),
    ],
    answers=["B", "C"],
    verdicts={
        0: (
            "B; B. 3215.36; Answer: B; B: 3215.36; B.",
            "A; E; 200.96; No correct answer; A. 200.96; C; D",
        ),
        1: ("C; C. 5:6; C.", "A; D; B; A. 3:4; 4"),
    },
)
DIFFERENCES += [
    ("wemath", 0, "(B)", True, "official: a bracket before the letter hides it"),
    ("wemath", 0, "3215.36", True, "official: letters alone; ours: the text of a listed option"),
    ("wemath", 0, "B or C", False, "official: the first character; ours: two are none"),
]

HOW_MANY = "How many different items are there in the image?"
SETS["counting"] = Published(
    rows=[
        {"images": [shown(32)], "problem": HOW_MANY, "answer": "3"},
        {"images": [shown(48)], "problem": f"<image>{HOW_MANY}", "answer": "10"},
    ],
    asked=[(f"<image>{HOW_MANY}", "32"), (f"<image>{HOW_MANY}", "48")],
    answers=["3", "10"],
    verdicts={
        0: ("3; $3$; 3.; **3**", "4; 13; 30; 2 or 3; C; -3"),
        1: ("10; 10 items", "1; 0; 11; 9, 10"),
    },
)
FLAT = "As shown, angle A is ( )\nA. 30 B. 45 C. 60 D. 90"
SETS["geo3k"] = Published(
    rows=[
        {"images": [shown(32)], "problem": "<image>Find x.", "answer": r"2 \sqrt { 221 }"},
        {"images": [shown(48)], "problem": "<image>Find $m \\angle H$.", "answer": "97"},
    ],
    asked=[("<image>Find x.", "32"), ("<image>Find $m \\angle H$.", "48")],
    answers=[r"2 \sqrt { 221 }", "97"],
    verdicts={
        0: (
            r"2\sqrt{221}; 2 \sqrt { 221 }; $2\sqrt{221}$; \sqrt{884}; x = 2\sqrt{221}",
            r"\sqrt{221}; 2\sqrt{21}; 29.73; B; 2; 221",
        ),
        1: (r"97; 97°; 97^\circ; 97 degrees; 97.0", "98; 9.7; 7; 96 or 97; 97, 98"),
    },
)

SETS["mmk12"] = Published(
    rows=[
        {"images": [shown(32)], "problem": f"<image>{FLAT}", "answer": "C"},
        {"images": [shown(48)], "problem": "See <image>. Which one?", "answer": "A"},
    ],
    asked=[(f"<image>{FLAT}", "32"), ("See <image>. Which one?", "48")],
    answers=["C", "A"],
    verdicts={
        0: (r"C; (C); \text{C}; c; C.", "A; B; D; C or D; 30; A, C"),
        1: ("A; (A)", "B; A or B"),
    },
)
DIFFERENCES += [
    ("mmk12", 0, "60", True, "official: letters alone; ours: the text of a listed option"),
    ("mmk12", 0, "C. 60", True, "official: letters alone; ours: a letter with its text"),
]

VILP = [
    "A triangle has three sides. How many sides does this shape have?",
    "A pet can bark. Which animals does the image show?",
    "A captain steers it. What does the image show?",
]
WORD = "<image>Please answer with one word: "
SETS["vilp"] = Published(
    rows=[
        # bytes
        {
            "question": VILP[0],
            "image1": png(32),
            "answer1": "3",
            "image2": png(48),
            "answer2": "7",
            "image3": png(64),
            "answer3": "5",
        },
        {
            "question": VILP[1],
            "image1": png(80),
            "answer1": "dogs",
            "image2": png(96),
            "answer2": "butterfly",
            "image3": png(112),
            "answer3": "Horse",
        },
        {
            "question": VILP[2],
            "image1": png(128),
            "answer1": "ship",
            "image2": png(144),
            "answer2": "bus",
            "image3": png(160),
            "answer3": "house",
        },
    ],
    asked=[(WORD + VILP[i // 3], f"{32 + 16 * i}") for i in range(9)],
    answers=["3", "7", "5", "dogs", "butterfly", "Horse", "ship", "bus", "house"],
    verdicts={
        0: ("3; three; Three.; THREE; 3.", "7; seven; 3 or 7; triangle; thirty; 33"),
        1: ("7; Seven", "3; three"),
        3: ("dogs; Dog; DOGS.; dog", "horse; cat; dogs and cats; do"),
        4: ("butterfly; butterflies; Butterfly.", "fly; dog; none"),
        5: ("horse; horses; Horse", "dog; hors; house"),
        7: ("bus; buses; Bus.", "bush; car; us"),
        8: ("house; houses", "horse; hous; home"),
    },
)
DIFFERENCES += [
    ("vilp", 6, "boat", False, "official: about 150 synonyms; ours: none"),
    ("vilp", 3, "a dog", True, "official: the whole text; ours: articles are dropped"),
]


def cv_bench(kind, task, source, prompt, answer, width):
    return {
        "idx": 0,
        "type": kind,
        "task": task,
        "image": shown(width),
        "question": prompt.split(" Select")[0],
        "choices": ["1", "0", "3", "2"],
        "answer": answer,
        "prompt": prompt,
        "filename": "img/2D/count/ade20k_1.png",
        "source": source,
        "source_dataset": f"{source} Dataset",
    }


CUPS = (
    "How many cups are in the image? Select from the following choices.\n(A) 1\n(B) 0\n(C) 3\n(D) 2"
)
NEAR = "Which one is nearer? Select from the following choices.\n(A) lamp\n(B) table"
SETS["cv-bench"] = Published(
    rows=[
        cv_bench("2D", "Count", "ADE20K", CUPS, "(D)", 32),
        cv_bench("2D", "Count", "COCO", CUPS, "(C)", 48),
        cv_bench("3D", "Depth", "Omni3D", NEAR, "(B)", 64),
    ],
    asked=[(f"<image>{CUPS}", "32"), (f"<image>{CUPS}", "48"), (f"<image>{NEAR}", "64")],
    answers=["(D)", "(C)", "(B)"],
    verdicts={
        0: ("D; (D); d; (D) 2; D. 2", "A; C; (C) 3; (A) 1; 3; none"),
        1: ("C; (C) 3", "(D) 2; D"),
        2: ("B; (B) table; table", "A; lamp; (A) lamp; cup"),
    },
)
DIFFERENCES += [
    ("cv-bench", 0, "desk", False, "official: the first letter of any word"),
    ("cv-bench", 0, "2", True, "official: letters alone; ours: the text of a listed option"),
    ("cv-bench", 0, "The answer is D", True, 'official: the first letter, here "T"'),
]

TURN = "The images are taken in order. How did the camera turn?\nOptions: A: Left, B: Right, C: Up, D: Down"


def mmsi(answer, kind, *widths):
    return {
        "id": 0,
        "images": [png(width) for width in widths],  # a list of bytes
        "question_type": kind,
        "question": TURN,
        "answer": answer,
        "thought": "It turns.",
        "mean_normed_duration_seconds": 41.5,
        "difficulty": "medium",
    }


SETS["mmsi"] = Published(
    rows=[mmsi("B", "Motion (Cam.)", 32, 48), mmsi("D", "MSR", 64, 80, 96)],
    asked=[(f"<image><image>{TURN}", "32 48"), (f"<image><image><image>{TURN}", "64 80 96")],
    answers=["B", "D"],
    verdicts={
        0: ("B; `B`; ``B``; B: Right; (B); {B}", "A; `A`; C; A: Left; Left; none"),
        1: ("D; D: Down", "A; B"),
    },
)
DIFFERENCES += [
    ("mmsi", 0, "b", True, "official: capitals alone, before a judge model reads it"),
    ("mmsi", 0, "B, C", False, "official: the first letter; ours: two are none"),
]

LANE = (
    "Which lane is free?\n\nA. Left\nB. Right\nC. None\n"
    "Please answer directly with only the letter of the correct option and nothing else."
)
LIGHT = "Is the light red? Please answer directly with a single word or number."
CARS = "How many cars are there? Please answer directly with a single word or number."
SETS["realworldqa"] = Published(
    rows=[
        {"image": shown(32), "question": LANE, "answer": "B", "image_path": "1.webp"},
        {"image": shown(48), "question": LIGHT, "answer": "Yes", "image_path": "2.webp"},
        {"image": shown(64), "question": CARS, "answer": "3", "image_path": "3.webp"},
    ],
    asked=[(f"<image>{LANE}", "32"), (f"<image>{LIGHT}", "48"), (f"<image>{CARS}", "64")],
    answers=["B", "Yes", "3"],
    verdicts={
        0: ("B; b; Right; B.; right; B. Right", "A; Left; C; None; A. Left; A or B"),
        1: ("Yes; yes.; YES", "No; red; Yes or no; 1"),
        2: ("3; 3.", "4; 13; 3 or 4; C"),
    },
)
DIFFERENCES += [
    ("realworldqa", 2, "three", False, "official: number words to ten; ours: a word is no number"),
    ("realworldqa", 2, "3 cars", True, "official: the whole reply; ours: a unit may stand behind"),
]

SETS["mm-vet"] = Published(
    rows=[
        {
            "question_id": "v1_0",
            "image": shown(32),
            "question": "What is x in the equation?",
            "answer": "-1<AND>-5",
            "capability": "ocr,math",
        },
        {
            "question_id": "v1_1",
            "image": shown(48),
            "question": "What is this?",
            "answer": "a cat<OR>a kitten",
            "capability": "rec",
        },
    ],
    asked=[("<image>What is x in the equation?", "32"), ("<image>What is this?", "48")],
    answers=["-1<AND>-5", "a cat<OR>a kitten"],
    verdicts={},  # a judge model's
)

SETS["infovqa"] = Published(
    rows=[
        {
            "questionId": "98313",
            "question": "How many users in 2012?",
            "answers": ["5 million", "5,000,000"],
            "answer_type": ["single span"],
            "image": shown(32),
            "image_url": "http://example.com",
            "operation/reasoning": ["none"],
            "ocr": "[]",
            "data_split": "val",
        },
        {
            "questionId": "98314",
            "question": "Which site?",
            "answers": ["abcd"],
            "answer_type": ["single span"],
            "image": shown(48),
            "image_url": "http://example.com",
            "operation/reasoning": ["none"],
            "ocr": "[]",
            "data_split": "val",
        },
    ],
    asked=[("<image>How many users in 2012?", "32"), ("<image>Which site?", "48")],
    answers=[["5 million", "5,000,000"], ["abcd"]],
    # shares of others: test_anls
    verdicts={
        0: ("5 million; 5  Million; 5,000,000; 5 MILLION", "7; two; 8 users; none; 2012; 9%"),
        1: ("abcd; ABCD", "x; zzzz; axyz"),
    },
)

BAG = (
    "What is the color of the bag?\n(A) red\n(B) blue\n(C) white\n(D) black\n"
    "Answer with the option's letter from the given choices directly."
)
SIDE = (
    "Is the bag left or right of the dog?\n(A) right\n(B) left\n"
    "Answer with the option's letter from the given choices directly."
)
SETS["v-star"] = Published(
    rows=[
        {
            "image": "direct_attributes/sa_4690.jpg",
            "text": BAG,
            "category": "direct_attributes",
            "label": "A",
            "question_id": "0",
        },
        {
            "image": "relative_position/sa_1.jpg",
            "text": SIDE,
            "category": "relative_position",
            "label": "B",
            "question_id": "1",
        },
    ],
    asked=[(f"<image>{BAG}", "32"), (f"<image>{SIDE}", "48")],
    answers=["A", "B"],
    verdicts={
        0: ("A; (A); A.; (A) red; red; Answer: A", "B; (B) blue; blue; C; none; B or C"),
        1: ("B; left; (B) left", "A; right"),
    },
    files={"direct_attributes/sa_4690.jpg": png(32), "relative_position/sa_1.jpg": png(48)},
)
DIFFERENCES += [
    ("v-star", 0, "Apparently blue", False, "lmms-eval: the first letter of any word"),
]

SETS["tallyqa"] = Published(
    rows=[
        {
            "image": shown(32),
            "qa": [
                {"question": "How many dogs are there?", "answer": "2", "is_simple": True},
                {"question": "How many dogs wear a hat?", "answer": "0", "is_simple": False},
            ],
        },
        {
            "image": shown(48),
            "qa": [{"question": "How many cups?", "answer": "12", "is_simple": True}],
        },
    ],
    asked=[
        ("<image>How many dogs are there?", "32"),
        ("<image>How many dogs wear a hat?", "32"),
        ("<image>How many cups?", "48"),
    ],
    answers=["2", "0", "12"],
    verdicts={
        0: ("2; $2$; **2**", "3; 12; two; 2 or 3; -2; B"),
        1: ("0", "1; none; 2"),
        2: ("12", "1; 2; 1, 2; 21"),
    },
)
DIFFERENCES += [
    ("tallyqa", 0, "2 dogs", True, "official: the whole reply; ours: a unit may stand behind"),
    ("tallyqa", 0, "2.0", True, "official: texts; ours: numbers by their value"),
]

# =============================================================================================== mathematics, text
SETS["aime24"] = Published(
    rows=[
        {
            "id": 60,
            "problem": "Find $m+n$.",
            "solution": "It is.",
            "answer": "204",
            "url": "https://example.com",
            "year": "2024",
        },
        {
            "id": 61,
            "problem": "Find the remainder.",
            "solution": "It is.",
            "answer": "025",
            "url": "https://example.com",
            "year": "2024",
        },
    ],
    asked=[("Find $m+n$.", ""), ("Find the remainder.", "")],
    answers=["204", "025"],
    verdicts={
        0: (r"204; $204$; 0204; \text{204}", "205; m+n = 204; 24; 2004; 204 or 205; -204; 20.4"),
        1: ("25; 025; 25.0", "250; 0.25; 5"),
    },
)

SETS["aime25"] = Published(
    # integers
    rows=[
        {
            "id": 0,
            "problem": "Find the sum.",
            "answer": 70,
            "solution": "",
            "url": "",
            "year": 2025,
        },
        {"id": 1, "problem": "Find $x$.", "answer": 0, "solution": "", "url": "", "year": 2025},
    ],
    asked=[("Find the sum.", ""), ("Find $x$.", "")],
    answers=["70", "0"],
    verdicts={
        0: (r"70; 070; $70$; 70.0; 70^\circ", "7; 71; 700; 69, 70; 60 or 70"),
        1: ("0; 000", "1; none"),
    },
)

SETS["amc23"] = Published(
    rows=[
        {"id": 0, "question": "How many miles?", "answer": "27.0", "url": "https://example.com"},
        {"id": 1, "question": "What is it?", "answer": "11", "url": "https://example.com"},
    ],
    asked=[("How many miles?", ""), ("What is it?", "")],
    answers=["27.0", "11"],
    verdicts={
        0: (r"27; 27.0; 27 \text{ miles}; $27$; \frac{54}{2}", "28; 2.7; 27 or 28; 270; C"),
        1: ("11; 11.0", "1; 1, 1"),
    },
)

SETS["math-500"] = Published(
    rows=[
        {
            "problem": "Convert $(0,3)$ to polar coordinates.",
            "solution": "It is.",
            "answer": r"\left( 3, \frac{\pi}{2} \right)",
            "subject": "Precalculus",
            "level": 2,
            "unique_id": "test/precalculus/807.json",
        },
        {
            "problem": "Who is it?",
            "solution": "It is.",
            "answer": r"\text{Evelyn}",
            "subject": "Algebra",
            "level": 1,
            "unique_id": "test/algebra/1.json",
        },
    ],
    asked=[("Convert $(0,3)$ to polar coordinates.", ""), ("Who is it?", "")],
    answers=[r"\left( 3, \frac{\pi}{2} \right)", r"\text{Evelyn}"],
    verdicts={
        0: (
            r"(3, \frac{\pi}{2}); \left(3,\frac{\pi}{2}\right); (3, \pi/2); $(3, \frac{\pi}{2})$",
            r"(\frac{\pi}{2}, 3); [3, \frac{\pi}{2}]; 3; (3, \pi); (3, 2); \frac{\pi}{2}",
        ),
        1: (r"Evelyn; \text{Evelyn}; evelyn", "Eve; Bob; Evelyn or Bob"),
    },
)

SETS["minerva"] = Published(
    rows=[
        {"question": "How far is it, in parsecs?", "answer": "1.6"},
        {"question": "Give $y(t)$.", "answer": r"2 e^{-t}"},
    ],
    asked=[("How far is it, in parsecs?", ""), ("Give $y(t)$.", "")],
    answers=["1.6", r"2 e^{-t}"],
    verdicts={
        0: (r"1.6; 1.60; \frac{8}{5}; $1.6$; d = 1.6", "1.7; 16; 1.6, 2; -1.6; 1.65"),
        1: (r"2e^{-t}; y(t) = 2e^{-t}; \frac{2}{e^{t}}", "2e^{t}; e^{-t}; 2"),
    },
)


def olympiad(question, answers, several=False):
    return {
        "id": 1606,
        "question": question,
        "solution": ["It is."],
        "final_answer": answers,
        "context": None,
        "image_1": None,
        "modality": "Text-only",
        "difficulty": "Competition",
        "is_multiple_answer": several,
        "unit": None,
        "answer_type": "Numerical",
        "error": None,
        "question_type": "Open-ended",
        "subfield": "Algebra",
        "subject": "Math",
        "language": "English",
    }


SETS["olympiadbench"] = Published(
    rows=[
        olympiad("What is it?", ["$2$"]),
        olympiad("All triples?", ["$(1,8,19), (2,7,13), (4,5,7)$"], several=True),
        olympiad("Both roots?", ["$-1$", r"$\frac{1}{2}$"], several=True),
        olympiad("Which pair?", ["$(1,2)$"]),
    ],
    asked=[
        (question, "") for question in ("What is it?", "All triples?", "Both roots?", "Which pair?")
    ],
    answers=[
        "$2$",
        "$(1,8,19) or (2,7,13) or (4,5,7)$",
        r"$-1$ or $\frac{1}{2}$",
        "$(1,2)$",
    ],
    verdicts={
        0: (r"2; $2$; 2.0; \frac{4}{2}; x = 2", "3; 22; 2, 3; -2; 1 or 2"),
        1: (
            "(1,8,19), (2,7,13), (4,5,7); (4, 5, 7), (1, 8, 19), (2, 7, 13)",
            "(1,8,19), (2,7,13); (8,1,19), (2,7,13), (4,5,7); (1,8,19); 1,8,19,2,7,13,4,5,7",
        ),
        2: (
            r"-1, \frac{1}{2}; 0.5, -1; \frac12, -1",
            r"-1; \frac{1}{2}; 1, \frac{1}{2}; -1, 0.5, 2",
        ),
        3: ("(1,2); (1, 2)", "(2,1); [1,2]; 1; 1.2"),
    },
)

SETS["gsm8k"] = Published(
    rows=[
        {"question": "How many clips?", "answer": "She sold 48/2 = <<48/2=24>>24.\n#### 72"},
        {"question": "How much is it?", "answer": "It is 12.\n#### 1,450"},
    ],
    asked=[("How many clips?", ""), ("How much is it?", "")],
    answers=["She sold 48/2 = <<48/2=24>>24.\n#### 72", "It is 12.\n#### 1,450"],
    verdicts={
        0: (r"72; $72$; 72.; 72 clips; 72.0", "24; 48; 7.2; 71 or 72; 72, 24"),
        1: (r"1,450; 1450; \$1450; 1{,}450; $1,450", "145; 1; 450; 12"),
    },
)

# =============================================================================================== ViGOS' copies
LISTED = "What is the area? Choices: (A) 4 (B) 6"


def rows_of_copy() -> list[dict]:
    """An image, or a list of them, by the set; marks may be too few, too many or all there is."""
    return [
        {"images": shown(32), "problem": f"<image>{LISTED}", "answer": "B"},
        {"images": shown(48), "problem": "How many? See <image> and <image>", "answer": "7"},
        {"images": shown(64), "problem": "", "answer": "A"},
        {"images": shown(80), "problem": "<image>", "answer": "A"},
    ]


def copy(right_and_wrong=True, several=False) -> Published:
    rows = rows_of_copy()
    asked = [
        (f"<image>{LISTED}", "32"),
        ("<image>How many? See  and ", "48"),
        ("<image>Answer the question in the image.", "64"),
        ("<image>Answer the question in the image.", "80"),
    ]
    answers = ["B", "7", "A", "A"]
    if several:
        rows = [row | {"images": [row["images"]]} for row in rows]
        first = {"images": [shown(96), shown(112)], "answer": "B"}
        rows += [
            first | {"problem": "<image><image>Which is older?"},
            first | {"problem": "<image>Which is older?"},
        ]
        asked += [("<image><image>Which is older?", "96 112")] * 2
        answers += ["B", "B"]
    verdicts = {
        0: (r"B; (B); \text{B}; b; (B) 6", "A; C; A or B; (A) 4; 4; A, B"),
        1: (r"7; 7.0; $7$; 7 \text{ cm}", "8; 70; 7 or 8; -7; seven"),
        2: ("A; (A)", "B; A or B"),
    }
    return Published(rows, asked, answers, verdicts if right_and_wrong else {})


for name in "mathverse mathvista mathvision mmstar mmmu-pro-vision realworldqa".split():
    SETS[f"zli-{name}"] = copy()
for name in ("mmmu", "mmsi", "mmmu-pro-10"):
    SETS[f"zli-{name}"] = copy(several=True)
SETS["zli-mm-vet"] = copy(right_and_wrong=False)
DIFFERENCES += [
    ("zli-mathverse", 0, "6", True, "official: letters alone; ours: the text of a listed option"),
]
