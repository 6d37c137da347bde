"""The README's code does what it says, and mutations.py fits the code."""

import re

import mutations
import torch
from conftest import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_both_snippets_give_the_same_loss_and_gradient():
    torch.manual_seed(0)
    hidden, heads = [torch.randn(50, 8) for _ in range(4)], [torch.randn(101, 8, requires_grad=True), torch.randn(101, 8)]
    names = dict(response_length=torch.full((50,), 10.0), responses=5, student_head=heads[0], teacher_head=heads[1],
                 **dict(zip(("student_hidden_image", "student_hidden_text", "teacher_hidden_image", "teacher_hidden_text"), hidden)))
    logits = [h @ heads[i // 2].T for i, h in enumerate(hidden)]
    whole = names | dict(zip(("student_image", "student_text", "teacher_image", "teacher_text"), logits))
    exec(BLOCKS[0], whole)
    (expected,) = torch.autograd.grad(whole["loss"], heads[0])
    chunked = {"torch": torch} | names
    exec(BLOCKS[3], chunked)
    torch.testing.assert_close(chunked["loss"], whole["loss"])
    torch.testing.assert_close(heads[0].grad, expected, rtol=1e-4, atol=1e-6)
    assert expected.norm() > 1


def test_the_losses_of_a_line():
    names = dict(student_image=torch.randn(5, 300), teacher_image=torch.randn(5, 300), log_p=torch.tensor([-1.0, -2.0]), log_q=torch.tensor([-1.0, -4.0]))
    exec(BLOCKS[1], names)
    assert names["tutoring"].shape == (5,) and names["tutoring"].min() > 0 and names["pull"].tolist() == [0.0, 2.0]


def test_the_span_and_its_loss():
    names = dict(torch=torch, student=torch.randn(9, 30), teacher=torch.randn(9, 30), ids=torch.arange(9))
    exec(BLOCKS[2], names)
    assert (names["spans"].description, names["spans"].reasoning) == ((0, 2), (4, 9)) and 0 < names["loss"] <= 0.05


def test_the_gate_finds_the_test_command():
    assert re.search(r"^pip install -r requirements-dev.txt && pytest", (ROOT / "README.md").read_text(), re.M)
    assert "requirements-dev.txt && pytest" in (ROOT / ".ci" / "run").read_text()


def test_every_fault_of_mutations_still_fits_its_file():
    """Its text is there exactly once; whether it is found takes the better part of an hour, and is a command of its own."""
    mutations.check(mutations.FAULTS)
    assert len(mutations.FAULTS) > 150
