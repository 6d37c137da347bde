"""How each paper asks: its prompt and its sampling; benchmarks.csv says which sets it reports."""

import functools
from collections.abc import Callable
from pathlib import Path

import common
import ptdpo
import reopold
import vgs
import vigos
import vold

SAMPLED = {"greedy": False}
PROTOCOLS = {
    "greedy": {},
    "vgs": dict(prompt="vgs", samples=16, max_response=2048),
    "vold": dict(prompt="vold", max_response=8192),
    "ptdpo": SAMPLED | dict(prompt="ptdpo", samples=8),
    "vigos": SAMPLED | dict(prompt="vigos", samples=5, top_p=0.9, top_k=20, seed=42),
    "reopold-math": SAMPLED
    | dict(prompt="reopold", samples=32, temperature=0.6, top_p=0.95, max_response=32768),
    "reopold-visual": dict(
        prompt="reopold", samples=1, temperature=0.6, top_p=0.95, max_response=8192
    ),
    "reopold-agentic": SAMPLED
    | dict(prompt="reopold-tools", calls=5, samples=1, max_response=8192),
}
PROMPTS = {
    "vgs": vgs.with_image,
    "vold": functools.partial(vold.with_image, args=vold.Args()),
    "ptdpo": ptdpo.question,
    "vigos": vigos.question,
    "reopold": reopold.question,
    "reopold-tools": reopold.with_tools,
}


def prompt_of(name: str) -> Callable:
    """fn(row) -> Context, of PROMPTS or of a file: the user's turn, and before a line of --- a system turn."""
    if name in PROMPTS:
        return PROMPTS[name]
    try:
        text = Path(name).read_text("utf-8-sig")
    except (OSError, ValueError) as e:
        raise common.UserError(
            f"--prompt {name!r} is no prompt ({e}): give one of {', '.join(PROMPTS)}, or a text file with {{problem}}"
        )
    if text.count("{problem}") != 1 or "<image" in text:
        raise common.UserError(
            "the file of --prompt has to have {problem} in it once, and no <image>: the question says where they are"
        )

    system, line, user = text.rpartition("\n---\n")
    turns = [common.message("system", system)] if line else []

    def question(row):
        asked = user.replace("{problem}", row["problem"])
        turn = common.message("user", asked, len(row["images"]))
        return common.Context([*turns, turn], row["images"])

    return question
