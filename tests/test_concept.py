"""`PerfusionConcept`: saved concepts come back, in few bytes and always the same, and bad ones are refused."""

import copy
import errno
import os
import pickle
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import places_of

from diffusers_perfusion import PerfusionConcept
from diffusers_perfusion.concept_file import MAX_HEADER_BYTES, WEIGHT_NAME, ConceptHeader

WIDTH = 32
VECTORS = ("target_input", "inverse_target_input", "superclass_input", "inverse_superclass_input")
TENSORS = ("token_embeddings.0", *VECTORS)


def random_concept(width=WIDTH, layers=None, **given):
    generator = torch.Generator().manual_seed(0)
    target_input, superclass_input = torch.randn(2, width, generator=generator)
    return PerfusionConcept(
        **{
            "placeholder_token": "<My-Cat>",
            "superclass": "tabby cat",
            "token_embeddings": [torch.randn(24, generator=generator)],
            "target_input": target_input,
            "inverse_target_input": 1e6 * (target_input + 0.1 * torch.randn(width, generator=generator)),
            "superclass_input": superclass_input,
            "inverse_superclass_input": 1e6 * (superclass_input + 0.1 * torch.randn(width, generator=generator)),
            "target_outputs": {
                name: torch.randn(size, generator=generator)
                for name, size in (layers or {"down.0.attn2": 16, "mid.attn2": 32}).items()
            },
            "bias": 0.65,
            "temperature": 0.2,
            "bias_range": (0.4, 0.9),
            "base_model": "a/model",
            "training": {"steps": 400, "seeds": [1, 2], "mask": None, "name": "Ünïcode"},
            **given,
        }
    )


def same_description(one, other):
    names = [f.name for f in fields(one) if f.name not in (*VECTORS, "token_embeddings", "target_outputs")]
    return all(getattr(one, name) == getattr(other, name) for name in names)


@pytest.mark.parametrize(
    ("arguments", "tolerance"), [({}, 1e-3), ({"dtype": torch.bfloat16}, 1e-2), ({"dtype": torch.float32}, 0)]
)
def test_a_saved_concept_comes_back(tmp_path, arguments, tolerance):
    concept = random_concept()
    path = concept.save(tmp_path / "new" / "folder" / "cat.safetensors", **arguments)
    assert path == tmp_path / "new" / "folder" / "cat.safetensors"
    loaded = PerfusionConcept.load(str(path))
    assert same_description(loaded, concept)
    tensors = dict(loaded._tensors())
    assert tensors.keys() == dict(concept._tensors()).keys()
    for name, tensor in concept._tensors():
        assert tensors[name].dtype == arguments.get("dtype", torch.float16)
        if not name.startswith("inverse_"):
            torch.testing.assert_close(tensors[name].float(), tensor, atol=tolerance, rtol=tolerance)
    # The scale of C⁻¹ i is free, and would not fit into float16 here.
    for name in ("inverse_target_input", "inverse_superclass_input"):
        ratio = getattr(loaded, name).float() / getattr(concept, name)
        torch.testing.assert_close(ratio, ratio.mean().expand(WIDTH), atol=0, rtol=5 * tolerance + 1e-6)
        assert ratio.mean() > 0


def test_state_dict_has_the_contents_of_the_file(tmp_path):
    concept = random_concept()
    loaded = PerfusionConcept.load(concept.save(tmp_path / "cat"))
    other = PerfusionConcept.from_state_dict(concept.state_dict())
    assert same_description(loaded, other)
    for name, tensor in loaded._tensors():
        assert torch.equal(tensor, dict(other._tensors())[name])


def test_saving_copies_a_concept_that_is_still_being_trained():
    embedding = torch.nn.Parameter(torch.ones(8))
    state_dict = random_concept(token_embeddings=[embedding]).state_dict(torch.float32)
    with torch.no_grad():
        embedding += 1
    assert not state_dict["token_embeddings.0"].requires_grad
    assert state_dict["token_embeddings.0"].eq(1).all()


def test_a_concept_of_stable_diffusion_1_5_takes_35_kilobytes(tmp_path):
    blocks = {"down_blocks.0": (320, 2), "down_blocks.1": (640, 2), "down_blocks.2": (1280, 2), "mid_block": (1280, 1)}
    blocks |= {"up_blocks.1": (1280, 3), "up_blocks.2": (640, 3), "up_blocks.3": (320, 3)}
    layers = {
        f"{block}.attentions.{n}.transformer_blocks.0.attn2": size
        for block, (size, count) in blocks.items()
        for n in range(count)
    }
    assert (len(layers), sum(layers.values())) == (16, 12480)
    concept = random_concept(768, layers, token_embeddings=[torch.ones(768)])
    assert concept.save(tmp_path / "cat.safetensors").stat().st_size <= 36_000


def test_size_of_a_stable_diffusion_xl_concept(tmp_path):
    blocks = {"down_blocks.1": (640, 2, 2), "down_blocks.2": (1280, 2, 10), "mid_block": (1280, 1, 10)}
    blocks |= {"up_blocks.0": (1280, 3, 10), "up_blocks.1": (640, 3, 2)}
    layers = {
        f"{block}.attentions.{n}.transformer_blocks.{m}.attn2": size
        for block, (size, count, depth) in blocks.items()
        for n in range(count)
        for m in range(depth)
    }
    assert (len(layers), sum(layers.values())) == (70, 83200)
    concept = random_concept(2048, layers, token_embeddings=[torch.ones(768), torch.ones(1280)])
    assert concept.save(tmp_path / "cat.safetensors").stat().st_size <= 200_000


@pytest.mark.parametrize("count", [1, 2, 3, 11])
def test_a_concept_has_a_token_embedding_for_each_text_encoder(tmp_path, count):
    concept = random_concept(token_embeddings=[torch.full((5 + number,), float(number)) for number in range(count)])
    loaded = PerfusionConcept.load(concept.save(tmp_path / "cat"))
    assert [len(embedding) for embedding in loaded.token_embeddings] == [5 + number for number in range(count)]
    assert all(embedding.eq(number).all() for number, embedding in enumerate(loaded.token_embeddings))
    assert same_description(loaded, concept)
    assert ConceptHeader.read(tmp_path / "cat").layers == {"down.0.attn2": 16, "mid.attn2": 32}
    assert concept.to(torch.float64).token_embeddings[-1].dtype == torch.float64
    concept.token_embeddings[-1][0] = torch.nan
    with pytest.raises(ValueError, match=f"token_embeddings.{count - 1} holds NaN"):
        concept.to(torch.float64)


def test_bytes_of_a_file_depend_on_the_concept_alone(tmp_path):
    """Training with the same seed gives the same file, and saving a loaded file gives it again."""
    first = random_concept().save(tmp_path / "first").read_bytes()
    shuffled = random_concept()
    shuffled.target_outputs = dict(reversed(shuffled.target_outputs.items()))
    assert shuffled.save(tmp_path / "second").read_bytes() == first
    assert PerfusionConcept.load(tmp_path / "first").save(tmp_path / "third").read_bytes() == first


@pytest.mark.parametrize("name", ["target_outputs.mid.attn2", "token_embeddings.0"])
def test_numbers_too_large_for_float16_are_refused(tmp_path, name):
    concept = random_concept()
    dict(concept._tensors())[name][3] = 7e4
    with pytest.raises(ValueError, match=rf"^in torch.float16 {name} holds .* infinity; .*dtype=torch.float32"):
        concept.save(tmp_path / "cat")
    assert not list(tmp_path.iterdir())
    loaded = PerfusionConcept.load(concept.save(tmp_path / "cat", torch.float32))
    assert dict(loaded._tensors())[name][3] == 7e4


def test_what_nobody_could_load_is_not_saved(tmp_path):
    """Numbers that float16 rounds to zero, and a description that is too long."""
    concept = random_concept(target_input=torch.full((WIDTH,), 1e-8), inverse_target_input=torch.ones(WIDTH))
    with pytest.raises(ValueError, match=r"^in torch.float16 target_input and .* ‖i‖² = 0; .*dtype=torch.float32"):
        concept.save(tmp_path / "cat")
    assert PerfusionConcept.load(concept.save(tmp_path / "dog", torch.float32)).target_input[0] == 1e-8
    long = random_concept(training={"captions": ["x" * 1000] * 300})
    with pytest.raises(ValueError, match=rf"its header has 3\d+ bytes; expected at most {MAX_HEADER_BYTES}"):
        long.save(tmp_path / "cat")
    assert [path.name for path in tmp_path.iterdir()] == ["dog"]


@pytest.mark.parametrize("training", [{"a": {1, 2}}, {"a": Path("b")}, {1: "a"}, {"a": [[{"b": torch.ones(1)}]]}])
def test_a_description_that_is_no_plain_json_is_refused(training):
    with pytest.raises(ValueError, match=r"^training .*; expected plain JSON"):
        random_concept(training=training)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.to("meta"), "is on meta; expected an ordinary tensor"),
        (torch.Tensor.to_sparse, "is sparse; expected an ordinary tensor"),
        (
            lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
            "is quantised; expected",
        ),
        (lambda tensor: torch.nested.nested_tensor([tensor, tensor[1:]]), "is nested; expected an ordinary tensor"),
        (torch.Tensor.tolist, "is a list; expected a tensor"),
        (lambda tensor: tensor[:1].expand(2**40), r"has shape \(1099511627776,\); expected a vector"),
    ],
    ids=["meta", "sparse", "quantised", "nested", "list", "stride 0"],
)
@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:.*nested tensors:UserWarning")
def test_what_is_no_ordinary_tensor_is_named(change, message):
    changed = change(torch.ones(WIDTH))
    with pytest.raises(ValueError, match=rf"^superclass_input {message}"):
        random_concept(superclass_input=changed)
    with pytest.raises(ValueError, match=rf"^superclass_input {message}"):
        PerfusionConcept.from_state_dict(random_concept().state_dict() | {"superclass_input": changed})


def test_a_full_disk_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    path = random_concept().save(tmp_path / "cat.safetensors")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        random_concept(bias=0.3).save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert PerfusionConcept.load(path).bias == 0.65


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "file"))):
        random_concept().save(tmp_path / "file" / "cat.safetensors")


def test_to_converts_every_tensor():
    concept = random_concept()
    half = concept.to(torch.bfloat16)
    assert {tensor.dtype for _, tensor in half._tensors()} == {torch.bfloat16}
    assert {tensor.dtype for _, tensor in concept._tensors()} == {torch.float32}
    assert same_description(half, concept)


NOT_FINITE = torch.full((WIDTH,), 0.5).index_fill(0, torch.tensor(7), torch.inf)
BAD_FIELDS = [
    ("placeholder_token", ""),
    ("placeholder_token", "my cat"),
    ("placeholder_token", "cat\n"),
    ("placeholder_token", "\x1b[31m"),
    ("placeholder_token", "x" * 257),
    ("placeholder_token", None),
    ("superclass", ""),
    ("superclass", "  "),
    ("superclass", "x" * 100_000),
    ("base_model", "a\x00b"),
    ("base_model", 3),
    ("bias", -0.1),
    ("bias", 2.1),
    ("bias", float("nan")),
    ("bias", float("inf")),
    ("bias", True),
    ("bias", "0.7"),
    ("temperature", 0),
    ("temperature", -0.1),
    ("temperature", 1.5),
    ("temperature", float("nan")),
    ("temperature", False),
    ("temperature", "0.1"),
    ("bias_range", (0.9, 0.4)),
    ("bias_range", (0.5, float("nan"))),
    ("bias_range", (0.5,)),
    ("bias_range", (0.1, 0.2, 0.3)),
    ("training", []),
]
BAD_TENSORS = [
    ("token_embeddings", []),
    ("token_embeddings", torch.ones(3)),
    ("token_embeddings", [torch.tensor([])]),
    ("token_embeddings", [torch.ones(3), torch.tensor([0.0, torch.nan])]),
    ("token_embeddings", [torch.ones(1, 3)]),
    ("target_input", torch.ones(2, WIDTH)),
    ("target_input", torch.ones(WIDTH + 1)),
    ("target_input", NOT_FINITE),
    ("inverse_target_input", torch.ones(WIDTH - 1)),
    ("inverse_target_input", NOT_FINITE),
    ("inverse_target_input", torch.zeros(WIDTH)),
    ("superclass_input", torch.ones(WIDTH + 1)),
    ("superclass_input", torch.tensor(1.0)),
    ("inverse_superclass_input", torch.ones(WIDTH - 1)),
    ("inverse_superclass_input", torch.zeros(WIDTH)),
    ("target_outputs", {}),
    ("target_outputs", {"mid.attn2": torch.ones(2, 2)}),
    ("target_outputs", {"mid.attn2": -NOT_FINITE}),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS + BAD_TENSORS)
def test_constructor_names_the_bad_field(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        random_concept(**{name: value})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["inverse_target_input", "inverse_superclass_input"])
def test_an_input_and_its_inverse_from_different_trainings_are_refused(name):
    with pytest.raises(ValueError, match=name):
        random_concept(**{name: -getattr(random_concept(), name)})


# Folders, as diffusers saves models.


def test_a_concept_goes_into_a_folder_and_comes_back(tmp_path, caplog):
    concept = random_concept()
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "config.json").write_text("{}")
    assert concept.save_pretrained(tmp_path / "cat") is None
    assert sorted(path.name for path in (tmp_path / "cat").iterdir()) == ["README.md", "config.json", WEIGHT_NAME]
    folder, file = tmp_path / "cat", tmp_path / "cat" / WEIGHT_NAME
    for source in (folder, str(folder), file, str(file)):
        assert same_description(PerfusionConcept.from_pretrained(source), concept)
    assert "load_perfusion('cat')" in (folder / "README.md").read_text()
    (folder / "README.md").write_text("Mine.")
    random_concept(bias=0.5).save_pretrained(folder, repo_id="me/my-cat")
    assert PerfusionConcept.from_pretrained(folder).bias == 0.5
    assert (folder / "README.md").read_text() == "Mine."
    assert (folder / "config.json").read_text() == "{}"
    random_concept().save(folder / "other" / "dog.safetensors")
    assert PerfusionConcept.from_pretrained(folder, weight_name="dog.safetensors", subfolder="other").bias == 0.65
    assert not caplog.messages


def test_a_concept_can_be_copied_and_pickled():
    concept = random_concept()
    for other in (copy.deepcopy(concept), pickle.loads(pickle.dumps(concept))):
        assert same_description(other, concept)
        assert vars(other).keys() == {f.name for f in fields(PerfusionConcept)}  # and no config of ModelHubMixin
        for (_, copied), (_, tensor) in zip(other._tensors(), concept._tensors(), strict=True):
            assert torch.equal(copied, tensor) and copied is not tensor


def test_an_ordinary_pipeline_generates_a_concept_with_standard_calls(
    pipeline, plain_pipeline, make_concept, generate, monkeypatch
):
    """The same image as a Perfusion pipeline's but for its fading, to the bit where every row holds the token."""
    monkeypatch.setattr("diffusers_perfusion.registry.fade", lambda e, e_super, gate: e)
    concept, prompt = make_concept(bias=0.7), "a <my-cat> on the beach"
    pipeline.load_perfusion(concept)
    # As after a training, the target input is what the text encoder gives at the token.
    (place,) = places_of(pipeline.tokenizer, prompt, "<my-cat>")
    target_input = pipeline.encode_prompt(prompt, "cpu", 1, False)[0][0, place].detach()
    concept = replace(concept, target_input=target_input, inverse_target_input=target_input)
    pipeline.unload_perfusion()
    pipeline.load_perfusion(concept)
    expected = generate(prompt, guidance_scale=1.0)
    pipeline.unload_perfusion()
    plain_pipeline.load_textual_inversion({concept.placeholder_token: concept.token_embeddings[0]})
    with_token = generate(prompt, plain_pipeline, guidance_scale=1.0)
    plain_pipeline.unet.set_attn_processor(concept.attn_processors(plain_pipeline.unet))
    assert torch.allclose(generate(prompt, plain_pipeline, guidance_scale=1.0), expected, atol=1e-5)
    assert not torch.allclose(with_token, expected, atol=1e-3)
