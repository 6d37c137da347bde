"""The README's code does what it says, and its commands and files are there."""

import re

import mutations
import torch
from conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_both_snippets_of_vgs_give_the_same_loss_and_gradient():
    torch.manual_seed(0)
    views = ("student_image", "student_text", "teacher_image", "teacher_text")
    hidden = [torch.randn(50, 8) for _ in views]
    heads = [torch.randn(101, 8, requires_grad=True), torch.randn(101, 8)]
    names = {"response_length": torch.full((50,), 10.0), "responses": 5}
    names |= {"student_head": heads[0], "teacher_head": heads[1]}
    names |= {view.replace("_", "_hidden_"): h for view, h in zip(views, hidden)}
    whole = names | {view: h @ heads[i // 2].T for i, (view, h) in enumerate(zip(views, hidden))}
    exec(BLOCKS[0], whole)
    (expected,) = torch.autograd.grad(whole["loss"], heads[0])
    chunked = {"torch": torch, "c": whole["c"]} | names
    exec(BLOCKS[2], chunked)
    torch.testing.assert_close(chunked["loss"], whole["loss"])
    torch.testing.assert_close(heads[0].grad, expected, rtol=1e-4, atol=1e-6)
    assert expected.norm() > 1


def test_the_loss_of_a_line():
    names = {"student_logits": torch.randn(5, 300), "teacher_logits": torch.randn(5, 300)}
    exec(BLOCKS[1], names)
    assert names["tutoring"].shape == (5,) and names["tutoring"].min() > 0


def test_the_gate_finds_the_test_command():
    command = "pip install -r requirements-dev.txt && pytest"
    assert re.search(rf"^{command}", README, re.M) and command in (ROOT / ".ci" / "run").read_text()


def test_requirements_are_those_of_the_project():
    project = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"dependencies = \[(.*?)\n\]", project, re.S)[1]
    assert re.findall(r'"(.+?)"', listed) == (ROOT / "requirements.txt").read_text().split()


def test_files_and_links_are_there():
    assert len(README.splitlines()) <= 200
    linked = re.findall(r"\]\((?!http)([\w/.]+)\)", README)
    named = re.findall(r"`((?:tests|docs|kernels|tools)/[\w/.]+)`", README)
    tools = [f"tools/{name}.py" for name in re.findall(r"python -m tools\.([a-z]+)", README)]
    missing = [name for name in linked + named + tools if not (ROOT / name).exists()]
    assert len(linked) > 3 and not missing, missing


def test_every_fault_of_mutations_still_fits():
    """Whether each is found takes the better part of an hour, and is a command of its own."""
    mutations.check(mutations.FAULTS)
    assert len(mutations.FAULTS) >= 80
