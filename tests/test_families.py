"""Qwen's families of vision-language models: each samples, trains, is saved and loaded again, alone and on two ranks.

The classes are transformers' own, in two narrow layers; the checkpoints have the layout of the hub's. Qwen3.5 has
linear attention in most of its layers. Mixtures of experts keep all experts of a layer in one tensor.
"""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import common
import vgs
import vigos
from tools import toy

import pytest
import torch
from conftest import distance, flags, layout_gradients, refusal, run_script
from gradients import fixed_rows
from safetensors import safe_open
from safetensors.torch import load_file, save_file

CLASSES = {
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "qwen3_5": "Qwen3_5",
    "qwen3_vl_moe": "Qwen3VLMoe",
    "qwen3_5_moe": "Qwen3_5Moe",
}
PLACEHOLDERS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
EXPERTS = [name for name in CLASSES if name.endswith("moe")]


# ------------------------------------------------------- checkpoints
def make_model(family: str, tokenizer, hidden: int, vocab: int):
    """An untrained model of two layers; of Qwen3.5 one has linear attention. Experts' embeddings are not tied."""
    import transformers as t

    token = tokenizer.convert_tokens_to_ids
    text = dict(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        initializer_range=0.05,
        tie_word_embeddings=family not in EXPERTS,
        bos_token_id=None,
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"),
    )
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[8, 4, 4])
    tower = dict(depth=2, num_heads=2, patch_size=16, initializer_range=0.05)
    if family == "qwen2_vl":
        tower |= dict(embed_dim=32, mlp_ratio=2, hidden_size=hidden)
    else:
        tower |= dict(hidden_size=32, intermediate_size=64, out_hidden_size=hidden)
    if family == "qwen2_5_vl":
        tower |= dict(window_size=64, fullatt_block_indexes=[1])
    if family.startswith("qwen3"):
        text["head_dim"] = 32
        rope["mrope_interleaved"] = True
        tower["num_position_embeddings"] = 64
    if family.startswith("qwen3_vl"):
        tower["deepstack_visual_indexes"] = [0]
    if family.startswith("qwen3_5"):
        rope |= dict(mrope_section=[2, 1, 1], partial_rotary_factor=0.25)
        text |= dict(layer_types=["linear_attention", "full_attention"])
        text |= dict(linear_key_head_dim=32, linear_num_key_heads=2)
        text |= dict(linear_value_head_dim=32, linear_num_value_heads=4)
    if family in EXPERTS:
        text |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96)
    if family == "qwen3_5_moe":
        text["shared_expert_intermediate_size"] = 32
        del text["intermediate_size"]
    config = getattr(t, f"{CLASSES[family]}Config")(
        text_config=text | {"rope_parameters": rope},
        vision_config=tower,
        tie_word_embeddings=text["tie_word_embeddings"],
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    return getattr(t, f"{CLASSES[family]}ForConditionalGeneration")(config)


@torch.no_grad()
def sharpen(model, placeholders: list[int]):
    """Weights that all matter, and a state of linear attention that fades over tens of tokens.

    The first channel of the language model is the same everywhere and speaks against the placeholders, which the
    sampler never samples: to the trainer they are as unlikely as training makes them. No layer reads or writes it.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.uniform_(math.log(0.01), math.log(0.2))
        elif parameter.ndim > 1:
            parameter.mul_(4.0)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
    hidden = model.lm_head.in_features
    for name, parameter in model.model.language_model.layers.named_parameters():
        if any(last in name for last in ("o_proj", "out_proj", "down_proj")):
            parameter[..., 0, :] = 0.0
        elif parameter.ndim > 1 and parameter.shape[-1] == hidden:
            parameter[..., 0] = 0.0
    embeddings = model.get_input_embeddings()
    embeddings.weight[embeddings.padding_idx].normal_(0.0, 0.2)  # padding that leaks is to be seen
    for module in (embeddings, model.lm_head):
        module.weight[:, 0] = 4.0
        module.weight[placeholders, 0] = -4.0


def hub_weights(family: str, model) -> dict[str, torch.Tensor]:
    """The weights as the family's checkpoints on the hub have them, by name.

    Qwen2-VL, Qwen2.5-VL: visual.*, model.*. Qwen3-VL-MoE: experts [E, in, out], which transformers holds transposed.
    Qwen3.5: layers that predict several tokens besides (mtp.*), which transformers leaves out.
    """
    weights = {}
    for name, value in model.named_parameters():  # what is tied once
        if family in ("qwen2_vl", "qwen2_5_vl"):
            name = name.replace("model.visual.", "visual.")
            name = name.replace("model.language_model.", "model.")
        if family == "qwen3_vl_moe" and ".mlp.experts." in name:
            value = value.transpose(1, 2)
        weights[name] = value.detach().contiguous()
    if family.startswith("qwen3_5"):
        weights["mtp.fc.weight"] = torch.zeros(8, 16)
    return weights


def make_checkpoint(folder: Path, family: str, tokenizer, hidden: int, vocab: int):
    model = make_model(family, tokenizer, hidden, vocab)
    sharpen(model, [tokenizer.convert_tokens_to_ids(token) for token in PLACEHOLDERS])
    folder.mkdir(parents=True)
    model.config.dtype, model.config.architectures = "float32", [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_file(hub_weights(family, model), folder / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folder)
    toy.image_processor("qwen3_vl").save_pretrained(folder)


def make_rows(file: Path) -> list[dict]:
    """24 rows, whose images have four sizes."""
    import datasets
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows = toy.make_rows(digits.images, digits.target, 24, seed=0)
    for i, row in enumerate(rows):
        size = (64 + 32 * (i % 4), 64 - 32 * (i % 2))
        row["images"] = [image.resize(size) for image in row["images"]]
    kinds = {key: datasets.Value("string") for key in rows[0]}
    features = datasets.Features(kinds | {"images": datasets.List(datasets.Image())})
    datasets.Dataset.from_list(rows, features=features).to_parquet(file)
    return rows


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """FAMILY/student, FAMILY/teacher, which is wider, and rows.parquet. One tokenizer, and patches of 16 pixels."""
    folder = tmp_path_factory.mktemp("families")
    rows = make_rows(folder / "rows.parquet")
    texts = [row["problem"] + row["text_problem"] + toy.respond(row, "reason") for row in rows]
    tokenizer = toy.make_tokenizer(texts)
    torch.manual_seed(0)
    for name in CLASSES:
        make_checkpoint(folder / name / "student", name, tokenizer, 64, 512)
        make_checkpoint(folder / name / "teacher", name, tokenizer, 128, 576)
    # gradients.py takes the processor from here
    (folder / "student").symlink_to(folder / "qwen3_vl/student")
    return folder


@pytest.fixture(scope="module", params=CLASSES)
def family(request, root):
    """Its name, its folder, the student's processor and eight rows."""
    folder = root / request.param
    processor = common.Processor(f"{folder}/student")
    rows = fixed_rows(root, processor)
    return SimpleNamespace(name=request.param, folder=folder, processor=processor, rows=rows)


def mixed_prompts(family) -> list[common.Prompt]:
    """Of 20 to 120 tokens: images of four sizes, two images in one prompt, and none in another.

    Linear attention works in chunks of 64 tokens.
    """
    contexts = []
    for i, row in enumerate(family.rows[:4]):
        question = common.message("user", row["problem"].replace("<image>", "") * (1 + 3 * i), 1)
        contexts.append(common.Context([question], row["images"]))
    both = family.rows[4]["images"] + family.rows[7]["images"]
    contexts.append(common.Context([common.message("user", "compare them.", 2)], both))
    contexts.append(common.Context([common.message("user", "which?")]))
    return [family.processor.encode(context) for context in contexts]


def models(folder: Path) -> dict[str, str]:
    return {name: str(folder / name) for name in ("student", "teacher")}


def seeds_for(prompts: list) -> list[int]:
    return [common.seed_of(0, i) for i in range(len(prompts))]


def student(family) -> common.Model:
    return common.Model(f"{family.folder}/student", torch.float32)


# ------------------------------------------------------- passes
@torch.no_grad()
def test_the_sampler_gives_the_log_probs_of_the_trainer(family):
    """Padded left with a mask and read token by token, or padded right without one: the same distributions.

    Three batches one after the other: what a model keeps of the images before is not used for the next.
    """
    args = common.Args(dtype="float32", max_response=16)
    hf, model = common.HFEngine(f"{family.folder}/student", family.processor, args), student(family)
    prompts = mixed_prompts(family)
    for part in (prompts, prompts[-1:], prompts[:3]):
        responses = hf.generate(part, seeds_for(part))
        logits = model(family.processor.batch(part, responses)) @ model.head().T
        logits[:, hf.processor.banned] = -torch.inf
        ids = torch.tensor([i for r in responses for i in r.ids])
        got = torch.tensor([x for r in responses for x in r.log_probs])
        expected = common.gather(logits.log_softmax(-1), ids)
        assert len(ids) >= 16 and expected.std() > 0.5
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_padding_changes_no_hidden_state(family):
    """A batch padded right without a mask (the trainer's), and left with one (the sampler's), against each alone.

    And without the mask padding on the left does change them: the test would see it.
    """
    model, prompts = student(family), mixed_prompts(family)
    responses = [common.Response([40 + i] * (1 + i)) for i in range(len(prompts))]
    alone = [model(family.processor.batch([p], [r])) for p, r in zip(prompts, responses)]
    together = model(family.processor.batch(prompts, responses))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)

    batch = family.processor.pad(prompts, side="left")
    left = model.lm.model(**batch, use_cache=False).last_hidden_state[:, -1]
    last = torch.stack([hidden[0] for hidden in alone])  # of the prompt's last token
    torch.testing.assert_close(left, last, rtol=1e-4, atol=1e-4)
    mask = batch.pop("attention_mask")
    left = model.lm.model(**batch, use_cache=False).last_hidden_state[:, -1]
    shorter = ~mask.bool().all(-1)
    assert shorter.sum() >= 4 and (left - last).abs().amax(-1)[shorter].min() > 1e-2


# ------------------------------------------------------- a run
def layout(checkpoint: Path) -> dict[str, tuple]:
    """Shape and precision of each of its weights, by name. Without mtp.*, which transformers leaves out."""
    found = {}
    with safe_open(checkpoint / "model.safetensors", "pt") as f:
        for name in f.keys():
            weight = f.get_slice(name)
            if not name.startswith("mtp."):
                found[name] = (tuple(weight.get_shape()), weight.get_dtype())
    return found


@torch.no_grad()
def logits_of(model, family) -> torch.Tensor:
    prompts = mixed_prompts(family)
    batch = family.processor.batch(prompts, [common.Response([40, 41])] * len(prompts))
    return model(batch) @ model.head().T


@pytest.fixture(scope="module")
def finished(family, root, tmp_path_factory):
    """One step of the real script: its folder, the last line of its metrics, and logits of the student in memory."""
    folder, logits, finish = tmp_path_factory.mktemp("run") / family.name, [], common.Run.finish

    def look(run):
        logits.append(logits_of(run.student, family))
        finish(run)

    settings = models(family.folder) | dict(max_steps=1, lr=0.01, warmup=0, max_response=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "finish", look)
        result = run_script("vgs.py", *flags(root, folder, **settings))
    assert result.returncode == 0, result.stderr
    metrics = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return SimpleNamespace(folder=folder, metrics=metrics, logits=logits[0])


def test_a_step_is_finite_and_its_sampler_is_the_trainer(finished):
    assert math.isfinite(finished.metrics["loss"]) and finished.metrics["grad_norm"] > 0
    assert min(finished.metrics[name] for name in ("std", "vis", "lang")) > 0
    assert finished.metrics["sampler_gap"] < 1e-3


def test_a_loaded_checkpoint_is_the_model_that_was_trained(finished, family):
    """The same logits, bit for bit, which one step has moved."""
    loaded = logits_of(common.Model(f"{finished.folder}/final", torch.float32), family)
    assert torch.equal(loaded, finished.logits)
    assert (loaded - logits_of(student(family), family)).abs().max() > 1e-2


def test_a_saved_checkpoint_has_the_layout_of_the_original(finished, family):
    """The same names and shapes: what reads the one, as vLLM does, reads the other."""
    assert layout(finished.folder / "final") == layout(family.folder / "student")


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_a_checkpoint_is_saved_in_the_precision_it_came_with(name, root, tmp_path):
    """Qwen2's configurations say it at the top, Qwen3's in that of the language model alone."""
    student = tmp_path / "student"
    shutil.copytree(root / name / "student", student)
    weights = load_file(student / "model.safetensors")
    weights = {key: value.bfloat16() for key, value in weights.items()}
    save_file(weights, student / "model.safetensors", {"format": "pt"})
    config = json.loads((student / "config.json").read_text())
    (config if name == "qwen2_vl" else config["text_config"])["dtype"] = "bfloat16"
    if name == "qwen3_vl":
        del config["dtype"]
    (student / "config.json").write_text(json.dumps(config))
    settings = models(root / name) | dict(student=student, max_steps=1, max_response=4)
    result = run_script("vgs.py", *flags(root, tmp_path / "run", **settings))
    assert result.returncode == 0, result.stderr
    assert layout(tmp_path / "run/final") == layout(student)


# ------------------------------------------------------- adapters
@pytest.mark.parametrize("targets", [vigos.LORA_TARGETS, ["proj"]], ids=["default", "proj"])
def test_adapters_stand_beside_linear_layers_alone(family, monkeypatch, targets):
    """A convolution of the vision tower is called proj, as is a linear layer; what is merged is the checkpoint's."""
    monkeypatch.setattr(vigos, "LORA_TARGETS", targets)
    name = f"{family.folder}/student"
    model = vigos.Adapted(name, torch.float32, False, 4, 0)
    adapted = [m.base_layer for m in model.modules() if hasattr(m, "lora_A")]
    assert adapted and all(isinstance(m, torch.nn.Linear) for m in adapted)
    shapes = {key: value.shape for key, value in model.weights()}
    assert shapes == {key: value.shape for key, value in student(family).weights()}


@pytest.mark.parametrize(
    "targets, message",
    [
        (["linear_fc1"], "no weight of the student would be trained"),  # of the frozen tower
        (["c_attn"], "has no linear layer called c_attn"),
    ],
)
def test_a_run_that_would_train_nothing_is_refused(root, tmp_path, monkeypatch, targets, message):
    monkeypatch.setattr(vigos, "LORA_TARGETS", targets)
    settings = dict(student=root / "qwen3_vl/student", teacher=None, column_reference="solution")
    settings |= dict(conflict_data="", lora=4, freeze_vision=True)
    assert message in refusal("vigos.py", flags(root, tmp_path / "run", **settings))
    assert not (tmp_path / "run/metrics.jsonl").exists()


# ------------------------------------------------------- gradients
def test_the_routers_auxiliary_loss_plays_no_part(root, tmp_path):
    """Checkpoints that ask for it, with a large factor, have the same gradients; the routers are trained."""
    for name in EXPERTS:
        folder = tmp_path / name
        shutil.copytree(root / name / "student", folder)
        config = json.loads((folder / "config.json").read_text())
        config["text_config"] |= {"output_router_logits": True, "router_aux_loss_coef": 1e3}
        (folder / "config.json").write_text(json.dumps(config))
        processor = common.Processor(str(folder))
        prompts = [processor.encode(vgs.with_image(row)) for row in fixed_rows(root, processor)[:3]]
        batch, found = processor.batch(prompts, [common.Response([40, 41, 42])] * 3), []
        for one in (folder, root / name / "student"):
            model = common.Model(str(one), torch.float32)
            (model(batch) @ model.lm.lm_head.weight.T).log_softmax(-1)[:, 7].sum().backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        asked, plain = found
        assert all(torch.equal(asked[n], g) for n, g in plain.items())
        routers = [g for n, g in plain.items() if n.endswith("mlp.gate.weight")]
        assert len(routers) == 2 and all(g.any() for g in routers)


UNEVEN = [6, 2]  # the second rank runs out of work before the first
IDLE = [8, 0]
CHECKPOINTED = {"gradient_checkpointing": True}


def gradients_of(root, folder, shares: list, settings: dict) -> dict[str, dict]:
    """By family, in one start for all."""
    mixed = {"alpha": 0.3} | settings  # of VGS and GRPO
    layouts = [(shares, 500, 7, "vgs", mixed | models(root / name)) for name in CLASSES]
    return dict(zip(CLASSES, layout_gradients(root, folder, layouts)))


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory):
    """Gradients on one rank."""
    return gradients_of(root, tmp_path_factory.mktemp("alone"), [8], {})


def check_same(found, alone):
    for name in CLASSES:
        assert distance(found[name]["gradient"], alone[name]["gradient"]) < 1e-6, name
        assert found[name]["norm"] == pytest.approx(alone[name]["norm"], rel=1e-5), name


@pytest.mark.slow
def test_gradients_on_two_ranks_are_those_on_one(root, alone, tmp_path):
    """Of every parameter, and none is zero: each expert of each layer learns."""
    for name in CLASSES:
        for parameter, gradient in alone[name]["gradient"].items():
            pieces = gradient if ".mlp.experts." in parameter else [gradient]
            assert all(piece.any() for piece in pieces), (name, parameter)
    check_same(gradients_of(root, tmp_path, UNEVEN, {}), alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shares, settings", [(IDLE, {}), ([8], CHECKPOINTED), (UNEVEN, CHECKPOINTED)]
)
def test_idle_ranks_and_gradient_checkpointing_change_no_gradient(
    shares, settings, root, alone, tmp_path
):
    check_same(gradients_of(root, tmp_path, shares, settings), alone)
