"""Checkpoints that are not what they seem are refused by name, before anything is trained on them."""

import json
import shutil

import common
import vigos

import pytest
import torch
import transformers as t
from conftest import flags, layout_gradients, refusal, run_script
from safetensors.torch import load_file, save_file


def copy_of(tiny, tmp_path, name="student"):
    return shutil.copytree(tiny / name, tmp_path / name)


def edit(folder, file, change):
    path = folder / file
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


# ------------------------------------------------------------------------------------------------ weights
def without_vision(name: str) -> str | None:
    return None if ".visual." in name else name


def renamed(name: str) -> str | None:
    return name.replace("language_model", "decoder")


@pytest.mark.parametrize("rename", [without_vision, renamed])
def test_missing_weights_are_refused(tiny, tmp_path, rename):
    """They would be random, and the run would end as if all were well."""
    file = copy_of(tiny, tmp_path) / "model.safetensors"
    weights = load_file(file)
    kept = {rename(name): value for name, value in weights.items() if rename(name)}
    assert kept.keys() != weights.keys()
    save_file(kept, file, metadata={"format": "pt"})
    said = refusal("vgs.py", flags(tiny, tmp_path / "run", student=tmp_path / "student"))
    assert "has no weights for" in said and "random" in said, said


def test_the_other_rank_is_silent_where_the_first_finds_weights_missing(tiny, tmp_path):
    """It waits for them, and its broken connection is no news."""
    file = copy_of(tiny, tmp_path) / "model.safetensors"
    weights = load_file(file)
    kept = {name: value for name, value in weights.items() if without_vision(name)}
    save_file(kept, file, metadata={"format": "pt"})
    argv = flags(tiny, tmp_path / "run", student=tmp_path / "student")
    said = run_script("vgs.py", *argv, torchrun=2).stderr
    assert said.count("has no weights for") == said.count("error: ") == 1, said
    assert "common.py" not in said.split("has no weights for")[1], said


def test_weights_that_the_model_does_not_use_are_named(tiny, tmp_path, capsys):
    file = copy_of(tiny, tmp_path) / "model.safetensors"
    extra = {"model.reward_head.weight": torch.zeros(2)}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    common.Model(str(tmp_path / "student"), torch.float32)
    assert "stay unused: ['model.reward_head.weight']" in capsys.readouterr().out


def test_a_head_that_only_one_of_two_configs_ties_is_refused(tiny, tmp_path):
    folder = copy_of(tiny, tmp_path)
    edit(folder, "config.json", lambda config: config | {"tie_word_embeddings": False})
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    said = refusal("vgs.py", flags(tiny, tmp_path / "run", student=folder))
    assert "has no weights for ['lm_head.weight']" in said, said


def test_weights_of_another_shape_are_refused(tiny, tmp_path):
    folder = copy_of(tiny, tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "mlp" in name and name.endswith("weight"))
    weights[name] = weights[name][:-1].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    said = refusal("vgs.py", flags(tiny, tmp_path / "run", student=folder))
    assert "student' cannot be read" in said and "shape" in said, said


def test_a_folder_of_adapters_is_refused(tiny, tmp_path):
    """transformers would apply them without a word, or stop at the missing config."""
    folder = copy_of(tiny, tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    said = refusal("vgs.py", flags(tiny, tmp_path / "run", student=folder))
    assert "holds adapters: merge them" in said, said


# ------------------------------------------------------------------------------------------------ families
def image_processors():
    return {
        "gemma3": (t.Gemma3Config, t.Gemma3ImageProcessor),
        "smolvlm": (t.SmolVLMConfig, t.SmolVLMImageProcessor),
        "llava": (t.LlavaConfig, t.CLIPImageProcessor),
        "internvl": (t.InternVLConfig, t.GotOcr2ImageProcessor),
    }


@pytest.mark.parametrize("family", ["gemma3", "smolvlm", "llava", "internvl"])
def test_another_family_is_refused_in_one_sentence(tiny, tmp_path, family):
    config, images = image_processors()[family]
    folder = tmp_path / family
    config().save_pretrained(folder)
    images().save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny / "student" / file, folder)
    said = refusal("vgs.py", flags(tiny, tmp_path / "run", student=folder))
    assert f"is {family}" in said and "Qwen2-VL" in said, said


# ------------------------------------------------------------------------------------------------ tokenizers
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_tokenizers_that_differ_in_one_added_token_are_refused(tiny, tmp_path, whose):
    """Whoever lacks it reads its pieces."""
    folder = copy_of(tiny, tmp_path, whose)
    tokenizer = t.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(folder)
    said = refusal("vgs.py", flags(tiny, tmp_path / "run", **{whose: folder}))
    assert "differently: ['<think>']" in said, said


def test_a_prefill_behind_an_opened_thought_is_refused(tiny, tmp_path):
    """ViGOS's <description> would stand inside of the thought that the template opens."""
    folder = copy_of(tiny, tmp_path)
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("assistant\n", "assistant\n<think>\n"))
    changes = dict(teacher=None, student=folder, column_reference="solution", conflict_data="")
    said = refusal("vigos.py", flags(tiny, tmp_path / "run", **changes))
    assert "opens <think>" in said, said
    row = {"problem": "How many?", "images": []}
    with pytest.raises(ValueError, match="opens <think>"):
        common.Processor(str(folder)).render(vigos.question(row))


# ------------------------------------------------------------------------------------------------ dropout
def test_dropout_stays_off_under_gradient_checkpointing(tiny, tmp_path):
    """transformers checkpoints in training mode, in which a config's dropout would be on."""
    folder = tmp_path / "dropping"
    shutil.copytree(tiny, folder)

    def drop(config):
        config["text_config"]["attention_dropout"] = 0.5
        return config

    edit(folder / "student", "config.json", drop)
    found = []
    for where, checkpointing in ((tiny, False), (folder, True)):
        settings = {"gradient_checkpointing": checkpointing}
        layouts = [([8], 10**6, 10**6, "vgs", settings)]
        (tmp_path / where.name).mkdir(exist_ok=True)
        found += layout_gradients(where, tmp_path / where.name, layouts)
    plain, dropping = (result["gradient"] for result in found)
    for name, value in plain.items():
        torch.testing.assert_close(dropping[name], value, rtol=1e-4, atol=1e-6)
