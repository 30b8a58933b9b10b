"""Checkpoints of other implementations; theirs are not here, so they are written as their code writes them."""

import importlib.util
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import LENGTH, WIDTH, make_unet
from diffusers import StableDiffusionPipeline
from torch import nn

from diffusers_perfusion.model_families import cross_attention_layers, family_of
from diffusers_perfusion.training.superclass import superclass_input

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "convert_checkpoint.py"
spec = importlib.util.spec_from_file_location("convert_checkpoint", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

# The layers of Stable Diffusion 1.x in its own names, and those that diffusers has for them.
SD1 = {
    "input_blocks.1.1.": "down_blocks.0.attentions.0.",
    "input_blocks.2.1.": "down_blocks.0.attentions.1.",
    "input_blocks.4.1.": "down_blocks.1.attentions.0.",
    "input_blocks.5.1.": "down_blocks.1.attentions.1.",
    "input_blocks.7.1.": "down_blocks.2.attentions.0.",
    "input_blocks.8.1.": "down_blocks.2.attentions.1.",
    "middle_block.1.": "mid_block.attentions.0.",
    "output_blocks.3.1.": "up_blocks.1.attentions.0.",
    "output_blocks.4.1.": "up_blocks.1.attentions.1.",
    "output_blocks.5.1.": "up_blocks.1.attentions.2.",
    "output_blocks.6.1.": "up_blocks.2.attentions.0.",
    "output_blocks.7.1.": "up_blocks.2.attentions.1.",
    "output_blocks.8.1.": "up_blocks.2.attentions.2.",
    "output_blocks.9.1.": "up_blocks.3.attentions.0.",
    "output_blocks.10.1.": "up_blocks.3.attentions.1.",
    "output_blocks.11.1.": "up_blocks.3.attentions.2.",
}
ATTENTION = "transformer_blocks.0.attn2"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_layers_have_the_order_of_the_original():
    names = [new + ATTENTION for new in SD1.values()]
    assert script.in_order(sorted(names, reverse=True)) == names
    old = [old + ATTENTION for old in SD1]
    assert script.in_order(sorted(old)) == old


# Those of the tiny UNet, which has fewer blocks.
ORIGINAL = ("input_blocks.1.1.", "middle_block.1.", "output_blocks.2.1.", "output_blocks.3.1.")


@pytest.fixture
def widths(pipeline):
    layers = cross_attention_layers(pipeline.unet)
    return {name: layers[name].inner_kv_dim for name in script.in_order(layers)}


@pytest.fixture
def c_inv():
    root = random(WIDTH, WIDTH, seed=1)
    return root @ root.T + torch.eye(WIDTH)


@pytest.fixture
def chendaryen(widths, c_inv):
    """As its `on_save_checkpoint` writes."""
    outputs = {}
    for number, (original, width) in enumerate(zip(ORIGINAL, widths.values(), strict=True)):
        for seed, name in enumerate(("to_k", "to_v")):
            outputs[f"{original}{ATTENTION}.{name}.target_output"] = random(LENGTH, width, seed=10 * number + seed)
    return {
        "global_step": 400,
        "C_inv": c_inv,
        "target_input": random(WIDTH),
        "embedding": {
            "initializer_words": ["cat"],
            "string_to_token": {"*": 265},
            "string_to_param": nn.ParameterDict({"*": nn.Parameter(random(1, WIDTH, seed=2))}),
        },
        "target_output": outputs,
    }


@pytest.fixture
def lucidrains(widths, c_inv):
    """As its `save` writes."""
    pairs = [
        [random(1, WIDTH), random(1, width, seed=10 * number + seed)]
        for number, width in enumerate(widths.values())
        for seed in range(2)
    ]
    return {"embed_params": random(1, WIDTH, seed=2), "key_value_params": pairs, "C_inv": c_inv}


@pytest.fixture
def read(pipeline, tmp_path):
    def run(state, superclass=None, pipe=pipeline):
        torch.save(state, tmp_path / "other.ckpt")
        return script.convert(tmp_path / "other.ckpt", pipe, "<my-cat>", superclass)

    return run


def check(concept, pipeline, c_inv, source):
    assert (concept.placeholder_token, concept.superclass) == ("<my-cat>", "cat")
    assert (concept.bias, concept.temperature) == (0.7, 0.15) and concept.training == {"converted_from": source}
    assert torch.equal(concept.token_embeddings[0], random(1, WIDTH, seed=2)[0])
    i_super = superclass_input(family_of(pipeline), "cat")
    assert torch.equal(concept.target_input, random(WIDTH))
    torch.testing.assert_close(concept.inverse_target_input, c_inv @ random(WIDTH))
    assert torch.equal(concept.superclass_input, i_super)
    torch.testing.assert_close(concept.inverse_superclass_input, c_inv @ i_super)


def test_outputs_of_every_position_become_those_of_the_placeholder_token(read, chendaryen, pipeline, widths, c_inv):
    concept, lost = read(chendaryen)
    check(concept, pipeline, c_inv, "ChenDarYen/Key-Locked-Rank-One-Editing-for-Text-to-Image-Personalization")
    for number, (name, width) in enumerate(widths.items()):
        rows = random(LENGTH, width, seed=10 * number + 1)
        torch.testing.assert_close(
            concept.target_outputs[name], (rows[2] + 4 * rows[4] + 2 * rows[5] + 2 * rows[6]) / 9
        )
    assert "between the token positions" in lost and "keys are locked" in lost
    for output in chendaryen["target_output"].values():
        output[:] = output[3]
    assert "differ by 0% between" in read(chendaryen)[1]
    assert read(chendaryen, "dog")[0].superclass == "dog"


def test_modules_without_names(read, lucidrains, pipeline, widths, c_inv):
    concept, lost = read(lucidrains, "cat")
    check(concept, pipeline, c_inv, "lucidrains/perfusion-pytorch")
    for number, (name, width) in enumerate(widths.items()):
        assert torch.equal(concept.target_outputs[name], random(1, width, seed=10 * number + 1)[0])
    assert "keys are locked" in lost
    with pytest.raises(ValueError, match=r"does not name its super-class; give it with --superclass"):
        read(lucidrains)


def test_modules_in_the_order_of_diffusers(read, lucidrains, components):
    """Its middle block is last, and is told by its width."""
    pipe = StableDiffusionPipeline(**components | {"unet": make_unet(channels=(16, 64))})
    layers = cross_attention_layers(pipe.unet)
    pairs = [
        [random(1, WIDTH), random(1, layer.inner_kv_dim, seed=seed)] for layer in layers.values() for seed in range(2)
    ]
    concept, _ = read(lucidrains | {"key_value_params": pairs}, "cat", pipe)
    for name, layer in layers.items():
        assert torch.equal(concept.target_outputs[name], random(1, layer.inner_kv_dim, seed=1)[0])


@pytest.mark.parametrize("kind", ["chendaryen", "lucidrains"])
def test_the_script_writes_a_concept_that_changes_images(
    request, kind, pipeline, model_folder, generate, tmp_path, capsys
):
    plain = generate("a <my-cat> on the beach")
    torch.save(request.getfixturevalue(kind), tmp_path / "other.ckpt")
    path = tmp_path / "mine.safetensors"
    flags = ["--placeholder_token", "<my-cat>", "--superclass", "cat", "--output", str(path)]
    script.main([str(tmp_path / "other.ckpt"), "--pretrained_model_name_or_path", str(model_folder), *flags])
    lost, written = capsys.readouterr().out.splitlines()
    assert "keys are locked" in lost and written == str(path)
    pipeline.load_perfusion(path)
    generated = generate("a <my-cat> on the beach")
    pipeline.set_perfusion(bias=0.3)
    assert all((generated - other).abs().max() > 1e-3 for other in (plain, generate("a <my-cat> on the beach")))


def test_the_script_says_in_one_line_what_is_wrong(model_folder, chendaryen, tmp_path, capsys):
    flags = ["--pretrained_model_name_or_path", str(model_folder), "--placeholder_token", "<my-cat>", "--output"]
    with pytest.raises(SystemExit):
        script.main([str(tmp_path / "nowhere.ckpt"), *flags, str(tmp_path / "mine.safetensors")])
    assert "nowhere.ckpt is not a file" in capsys.readouterr().err
    assert not (tmp_path / "mine.safetensors").exists()
    torch.save(chendaryen, tmp_path / "other.ckpt")
    with pytest.raises(SystemExit):
        script.main([str(tmp_path / "other.ckpt"), *flags, str(tmp_path / "other.ckpt" / "mine.safetensors")])
    assert "error: [Errno" in capsys.readouterr().err


# Of a few bytes in a file.
HUGE = torch.as_strided(torch.ones(1), (2**20, 2**20), (0, 0))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("chendaryen", lambda state: {"C_inv": HUGE}),
        ("chendaryen", lambda state: {"target_input": HUGE}),
        ("chendaryen", lambda state: {"target_output": dict.fromkeys(state["target_output"], HUGE)}),
        ("chendaryen", lambda state: {"embedding": state["embedding"] | {"string_to_param": {"*": HUGE}}}),
        ("lucidrains", lambda state: {"C_inv": HUGE}),
        ("lucidrains", lambda state: {"embed_params": HUGE}),
        ("lucidrains", lambda state: {"key_value_params": [[HUGE, o] for _, o in state["key_value_params"]]}),
        (
            "lucidrains",
            lambda state: {"key_value_params": [[i, o.expand(2**20, -1)] for i, o in state["key_value_params"]]},
        ),
    ],
)
def test_a_tensor_that_claims_more_than_it_holds_is_not_copied(request, read, kind, change):
    state = request.getfixturevalue(kind)
    with pytest.raises(ValueError, match=r"1048576.* where numbers of the shape"):
        read(state | change(state), "cat")


def test_nested_lists_that_share_their_parts_do_not_hang(read, chendaryen, lucidrains):
    """Written out, they would have more parts than there is memory."""
    nested = ["cat"]
    for _ in range(100):
        nested = [nested, nested]
    chendaryen["embedding"]["initializer_words"] = nested
    with pytest.raises(ValueError, match="does not name its super-class; give it with --superclass"):
        read(chendaryen)
    assert read(chendaryen, "cat")[0].superclass == "cat"
    for changed in ({"C_inv": nested}, {"embed_params": nested}, {"key_value_params": nested}):
        with pytest.raises(ValueError, match="is not a whole checkpoint of one concept"):
            read(lucidrains | changed, "cat")


@pytest.mark.parametrize("word", [5, None, ["cat"], torch.ones(2)])
def test_a_super_class_that_is_no_text_must_be_given(read, chendaryen, word):
    chendaryen["embedding"]["initializer_words"] = [word]
    with pytest.raises(ValueError, match="does not name its super-class; give it with --superclass"):
        read(chendaryen)
    chendaryen["embedding"]["initializer_words"] = ["\x1b[2J"]
    with pytest.raises(ValueError, match=r"superclass is '\\x1b\[2J'; expected"):
        read(chendaryen)


def test_a_zip_file_that_unpacks_to_gigabytes_is_not_read(pipeline, tmp_path):
    path = tmp_path / "other.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(script.MAX_BYTES + 1))
    assert path.stat().st_size < 2**20
    with pytest.raises(ValueError, match=f"it has {script.MAX_BYTES + 1} bytes; expected at most {script.MAX_BYTES}"):
        script.convert(path, pipeline, "<my-cat>", "cat")


class Code:
    def __reduce__(self):
        return print, ("a stranger's code ran",)


def test_what_is_not_such_a_file(
    read, chendaryen, lucidrains, pipeline, components, xl_pipeline, tmp_path, capfd, monkeypatch
):
    with pytest.raises(FileNotFoundError, match=r"nowhere.ckpt is not a file"):
        script.convert(tmp_path / "nowhere.ckpt", pipeline, "<my-cat>", None)
    with pytest.raises(ValueError, match="broken, or holds more than tensors"):
        read(chendaryen | {"embedding": Code()})
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Code(), protocol=2))
    with pytest.raises(ValueError, match="broken, or holds more than tensors"):
        script.convert(tmp_path / "plain.ckpt", pipeline, "<my-cat>", None)
    assert "stranger" not in capfd.readouterr().out
    content = bytearray((tmp_path / "other.ckpt").read_bytes())
    (tmp_path / "cut.ckpt").write_bytes(content.replace(b"PK\x01\x02", b"\0\0\0\0"))  # a broken list of its parts
    with pytest.raises(ValueError, match="is not a whole checkpoint of one concept"):
        script.convert(tmp_path / "cut.ckpt", pipeline, "<my-cat>", "cat")
    two = lucidrains | {"embed_params": random(2, WIDTH)}
    damaged = [{}, [], {"target_output": {}}, chendaryen | {"target_output": {}}, two]
    damaged += [chendaryen | {"C_inv": torch.eye(WIDTH + 1)}]
    damaged += [lucidrains | {"key_value_params": lucidrains["key_value_params"][:-1]}]
    for state in damaged:
        with pytest.raises(ValueError, match="is not a whole checkpoint of one concept"):
            read(state, "cat")
    with pytest.raises(ValueError, match="for Stable Diffusion 1 or 2; the model given is Stable Diffusion XL"):
        read(chendaryen, pipe=xl_pipeline)
    narrow = StableDiffusionPipeline(**components | {"unet": make_unet(channels=(8, 16))})
    with pytest.raises(ValueError, match=r"of \(4, 16\) where numbers of the shape \(4, 8\) are expected"):
        read(chendaryen, pipe=narrow)
    monkeypatch.setattr(script, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="bytes; expected at most 100"):
        read(chendaryen)
