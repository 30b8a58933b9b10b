"""The concept file: what goes in comes out, few bytes, always the same, and nothing bad gets in."""

import json
import os
import stat
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save as serialize

from diffusers_perfusion import PerfusionConcept
from diffusers_perfusion.concept import MAX_FILE_BYTES, MAX_TENSORS, ConceptHeader

WIDTH = 32
VECTORS = ("word_embedding", "target_input", "inverse_target_input", "superclass_input")


def random_concept(width=WIDTH, layers=None, **given):
    generator = torch.Generator().manual_seed(0)
    target_input = torch.randn(width, generator=generator)
    return PerfusionConcept(
        **{
            "placeholder_token": "<My-Cat>",
            "superclass": "tabby cat",
            "word_embedding": torch.randn(24, generator=generator),
            "target_input": target_input,
            "inverse_target_input": 1e6 * (target_input + 0.1 * torch.randn(width, generator=generator)),
            "superclass_input": torch.randn(width, generator=generator),
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
    names = [f.name for f in fields(one) if f.name not in (*VECTORS, "word_embedding_2", "target_outputs")]
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
    for name in ("word_embedding", "target_input", "superclass_input"):
        assert getattr(loaded, name).dtype == arguments.get("dtype", torch.float16)
        torch.testing.assert_close(
            getattr(loaded, name).float(), getattr(concept, name), atol=tolerance, rtol=tolerance
        )
    assert loaded.target_outputs.keys() == concept.target_outputs.keys()
    for name, output in concept.target_outputs.items():
        torch.testing.assert_close(loaded.target_outputs[name].float(), output, atol=tolerance, rtol=tolerance)
    # The scale of C⁻¹ i* is free, and would not fit into float16 here.
    ratio = loaded.inverse_target_input.float() / concept.inverse_target_input
    torch.testing.assert_close(ratio, ratio.mean().expand(WIDTH), atol=0, rtol=5 * tolerance + 1e-6)
    assert ratio.mean() > 0


def test_state_dict_is_what_the_file_holds(tmp_path):
    concept = random_concept()
    loaded = PerfusionConcept.load(concept.save(tmp_path / "cat"))
    other = PerfusionConcept.from_state_dict(concept.state_dict())
    assert same_description(loaded, other)
    for name, tensor in loaded._tensors():
        assert torch.equal(tensor, dict(other._tensors())[name])


def test_saving_copies_a_concept_that_is_still_being_fitted():
    word_embedding = torch.nn.Parameter(torch.ones(8))
    state_dict = random_concept(word_embedding=word_embedding).state_dict(torch.float32)
    with torch.no_grad():
        word_embedding += 1
    assert not state_dict["word_embedding"].requires_grad
    assert state_dict["word_embedding"].eq(1).all()


def test_a_concept_of_stable_diffusion_1_5_takes_35_kilobytes(tmp_path):
    blocks = {"down_blocks.0": (320, 2), "down_blocks.1": (640, 2), "down_blocks.2": (1280, 2), "mid_block": (1280, 1)}
    blocks |= {"up_blocks.1": (1280, 3), "up_blocks.2": (640, 3), "up_blocks.3": (320, 3)}
    layers = {
        f"{block}.attentions.{n}.transformer_blocks.0.attn2": size
        for block, (size, count) in blocks.items()
        for n in range(count)
    }
    assert (len(layers), sum(layers.values())) == (16, 12480)
    concept = random_concept(768, layers, word_embedding=torch.ones(768))
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
    embeddings = {"word_embedding": torch.ones(768), "word_embedding_2": torch.ones(1280)}
    concept = random_concept(2048, layers, **embeddings)
    assert concept.save(tmp_path / "cat.safetensors").stat().st_size <= 200_000


def test_a_second_word_embedding_is_in_the_file_if_there_is_one(tmp_path):
    second = torch.arange(5.0)
    with_two = random_concept(word_embedding_2=second)
    loaded = PerfusionConcept.load(with_two.save(tmp_path / "two"))
    assert [len(embedding) for embedding in loaded.word_embeddings] == [24, 5]
    assert torch.equal(loaded.word_embedding_2.float(), second)
    assert same_description(loaded, with_two)
    assert (
        ConceptHeader.read(tmp_path / "two").layers
        == ConceptHeader.read(random_concept().save(tmp_path / "one")).layers
    )
    one = PerfusionConcept.load(tmp_path / "one")
    assert one.word_embedding_2 is None and len(one.word_embeddings) == 1
    assert with_two.to(torch.float64).word_embedding_2.dtype == torch.float64
    with pytest.raises(ValueError, match="word_embedding_2 holds NaN"):
        random_concept(word_embedding_2=second / 0)


def test_bytes_of_a_file_depend_on_the_concept_alone(tmp_path):
    """A fit with the same seed gives the same file, and saving a loaded file gives it again."""
    first = random_concept().save(tmp_path / "first").read_bytes()
    shuffled = random_concept()
    shuffled.target_outputs = dict(reversed(shuffled.target_outputs.items()))
    assert shuffled.save(tmp_path / "second").read_bytes() == first
    assert PerfusionConcept.load(tmp_path / "first").save(tmp_path / "third").read_bytes() == first


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch, call, error):
    path = random_concept().save(tmp_path / "cat.safetensors")
    before = path.read_bytes()

    def crash(*args):
        raise error

    monkeypatch.setattr(os, call, crash)
    with pytest.raises(type(error)):
        random_concept(bias=0.5).save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_a_file_has_the_permissions_of_any_other_new_file(tmp_path):
    (tmp_path / "other").touch()
    path = random_concept().save(tmp_path / "cat.safetensors")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


@pytest.mark.parametrize("name", ["target_outputs.mid.attn2", "word_embedding"])
def test_numbers_too_large_for_float16_are_refused(tmp_path, name):
    concept = random_concept()
    dict(concept._tensors())[name][3] = 7e4
    with pytest.raises(ValueError, match=rf"^{name} does not fit into torch.float16; .*torch.float32"):
        concept.save(tmp_path / "cat")
    assert not list(tmp_path.iterdir())
    loaded = PerfusionConcept.load(concept.save(tmp_path / "cat", torch.float32))
    assert dict(loaded._tensors())[name][3] == 7e4


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
    ("superclass", "x" * 10_000_000),
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
    ("word_embedding", torch.tensor([])),
    ("word_embedding", torch.tensor([0.0, torch.nan])),
    ("target_input", torch.ones(2, WIDTH)),
    ("target_input", torch.ones(WIDTH + 1)),
    ("target_input", NOT_FINITE),
    ("inverse_target_input", torch.ones(WIDTH - 1)),
    ("inverse_target_input", NOT_FINITE),
    ("inverse_target_input", torch.zeros(WIDTH)),
    ("superclass_input", torch.ones(WIDTH + 1)),
    ("superclass_input", torch.tensor(1.0)),
    ("target_outputs", {}),
    ("target_outputs", {"mid.attn2": torch.ones(2, 2)}),
    ("target_outputs", {"mid.attn2": -NOT_FINITE}),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS + BAD_TENSORS)
def test_constructor_names_the_bad_field(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        random_concept(**{name: value})
    assert len(str(caught.value)) < 300


def test_target_input_and_its_inverse_from_different_fits_are_refused():
    concept = random_concept()
    with pytest.raises(ValueError, match="inverse_target_input"):
        random_concept(inverse_target_input=-concept.inverse_target_input)


# Files.


def write(path, tensors=None, header=None, metadata=None):
    """A file like that of `random_concept`, but for what is given; None leaves a tensor or field out."""
    state_dict = random_concept().state_dict()
    description = json.loads(state_dict.pop("perfusion")) | (header or {})
    description = {name: value for name, value in description.items() if value is not None}
    state_dict = {name: tensor for name, tensor in (state_dict | (tensors or {})).items() if tensor is not None}
    path.write_bytes(serialize(state_dict, {"perfusion": json.dumps(description)} if metadata is None else metadata))
    return path


def refuse(path, match=None):
    """Load a file, which must fail with one short message that names the file and holds `match`."""
    with pytest.raises(ValueError, match=match) as caught:
        PerfusionConcept.load(path)
    assert type(caught.value) is ValueError
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def test_the_file_that_the_bad_ones_are_made_from_is_good(tmp_path):
    assert same_description(PerfusionConcept.load(write(tmp_path / "cat")), random_concept())


def test_a_missing_file_and_a_folder_are_not_found(tmp_path):
    for path in (tmp_path / "cat.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="is not a file"):
            PerfusionConcept.load(path)


def test_truncated_files_are_refused(tmp_path):
    path = tmp_path / "cat.safetensors"
    whole = write(path).read_bytes()
    for size in [*range(12), *range(12, len(whole), 53), len(whole) - 1]:
        path.write_bytes(whole[:size])
        refuse(path, "is truncated or not a safetensors file")
    path.write_bytes(whole + b"\0")
    refuse(path, "is truncated or not a safetensors file")


@pytest.mark.parametrize(
    "content",
    [b"<html>404</html>" * 20, b"\x89PNG\r\n\x1a\n" * 20, bytes(1000), b"\xff" * 1000, b'{"a": 1}'],
    ids=["html", "png", "zeros", "ones", "json"],
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "cat").write_bytes(content)
    refuse(tmp_path / "cat", "not a safetensors file")


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "random-bytes"
    path.write_bytes(content)
    refuse(path)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.data())
def test_a_file_with_flipped_bytes_is_refused_or_gives_a_valid_concept(tmp_path_factory, data):
    """Whatever the damage, nothing but ValueError comes out."""
    path = tmp_path_factory.getbasetemp() / "flipped-bytes"
    content = bytearray(write(path).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        concept = PerfusionConcept.load(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert all(torch.isfinite(tensor).all() for _, tensor in concept._tensors())
        assert 0 <= concept.bias <= 2


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
def test_pickles_are_refused_and_not_run(tmp_path, options):
    torch.save(random_concept().state_dict(), tmp_path / "cat.bin", **options)
    refuse(tmp_path / "cat.bin", "is a pickle, which can run code")


@pytest.mark.parametrize("length", [0x0480, 0x0580, 0x4B50])
def test_a_file_whose_header_length_reads_like_a_pickle_is_loaded(tmp_path, length):
    """A safetensors file begins with the length of its header, which can be any multiple of eight."""

    def header_length(padding):
        content = random_concept(training={"note": "x" * padding}).save(tmp_path / "cat").read_bytes()
        return int.from_bytes(content[:8], "little")

    assert header_length(length - header_length(0)) == length
    assert PerfusionConcept.load(tmp_path / "cat").superclass == "tabby cat"


def test_a_lora_is_refused(tmp_path):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(serialize({"unet.to_k.lora_A.weight": torch.ones(4, 8)}, {"format": "pt"}))
    refuse(path, "no 'perfusion' description in the header, so it is not a Perfusion concept")
    path.write_bytes(serialize({"unet.to_k.lora_A.weight": torch.ones(4, 8)}))
    refuse(path, "not a Perfusion concept")


@pytest.mark.parametrize(
    "value", [torch.ones(WIDTH, dtype=dtype) for dtype in (torch.float64, torch.int64, torch.bool, torch.uint8)]
)
def test_tensors_of_another_dtype_are_refused(tmp_path, value):
    refuse(write(tmp_path / "cat", {"superclass_input": value}), "superclass_input is [A-Z0-9]+ of shape")
    with pytest.raises(ValueError, match="superclass_input is torch"):
        PerfusionConcept.from_state_dict(random_concept().state_dict() | {"superclass_input": value})


@pytest.mark.parametrize("shape", [(), (1, WIDTH), (WIDTH, 1), (0,)])
def test_tensors_of_another_shape_are_refused(tmp_path, shape):
    refuse(write(tmp_path / "cat", {"target_outputs.mid.attn2": torch.ones(shape)}), "target_outputs.mid.attn2")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [*VECTORS, "target_outputs.mid.attn2"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, name, value):
    tensor = random_concept().state_dict()[name]
    tensor[5] = value
    refuse(write(tmp_path / "cat", {name: tensor}), f"{name} holds NaN or infinity")


@pytest.mark.parametrize("name", VECTORS)
def test_a_missing_tensor_is_named(tmp_path, name):
    refuse(write(tmp_path / "cat", {name: None}), rf"tensors missing: \['{name}'\]")


def test_tensors_beside_those_of_the_format_are_named(tmp_path):
    refuse(write(tmp_path / "cat", {"extra": torch.ones(1)}), r"not expected: \['extra'\]")


def test_a_file_without_target_outputs_is_refused(tmp_path):
    outputs = {"target_outputs.down.0.attn2": None, "target_outputs.mid.attn2": None}
    refuse(write(tmp_path / "cat", outputs), "target_outputs is empty")


@pytest.mark.parametrize("version", [None, 0, 2, "1", [1]])
def test_another_format_version_is_named(tmp_path, version):
    refuse(write(tmp_path / "cat", header={"format_version": version}), "format version .*; this release .* reads 1")


def test_a_width_that_is_not_that_of_the_tensors_is_refused(tmp_path):
    refuse(write(tmp_path / "cat", header={"width": 768}), f"has {WIDTH} numbers, but the header says 768")
    refuse(write(tmp_path / "cat", {"superclass_input": torch.ones(7)}), "superclass_input has 7 numbers")


@pytest.mark.parametrize(
    "text",
    ["", "{", "nonsense", "[" * 100_000, '"text"', "[]", "null", "{'format_version': 1}", '{"width": 1' + "0" * 9999],
)
def test_a_header_that_is_not_a_json_object_is_refused(tmp_path, text):
    refuse(write(tmp_path / "cat", metadata={"perfusion": text}))


BAD_HEADERS = [(name, list(value) if isinstance(value, tuple) else value) for name, value in BAD_FIELDS]
BAD_HEADERS += [
    ("placeholder_token", ["<my-cat>"]),
    ("superclass", {"a": "cat"}),
    ("bias", [0.7]),
    ("bias", 10**400),
    ("temperature", {}),
    ("bias_range", 0.5),
    ("bias_range", "ab"),
    ("bias_range", [[], []]),
    ("bias_range", ["x" * 1_000_000, 1]),
    ("base_model", {}),
    ("training", "none"),
    ("width", "32"),
    ("width", 32.0),
    ("format_version", "x" * 1_000_000),
    ("placeholder_token", "x" * 1_000_000),
    ("x" * 1_000_000, 1),
]


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, value in BAD_HEADERS if value is not None],
    ids=range(len(BAD_HEADERS) - 1),
)
def test_a_header_field_out_of_range_or_of_another_type_is_named(tmp_path, name, value):
    match = "the header describes" if name.startswith("xx") else name.replace("_", ".")
    refuse(write(tmp_path / "cat", header={name: value}), match)


@pytest.mark.parametrize("name", ["placeholder_token", "superclass", "bias", "temperature", "base_model", "width"])
def test_a_missing_header_field_is_noticed(tmp_path, name):
    refuse(write(tmp_path / "cat", header={name: None}), "the header describes")


def test_unknown_header_fields_are_refused(tmp_path):
    refuse(write(tmp_path / "cat", header={"__class__": "os.system"}), "the header describes .*__class__")


def test_long_tensor_names_give_short_messages(tmp_path):
    refuse(write(tmp_path / "cat", {"x" * 1_000_000: torch.ones(1)}))
    refuse(write(tmp_path / "cat", {"target_outputs." + "x" * 1_000_000: torch.tensor([torch.nan])}))


def test_too_many_tensors_are_refused(tmp_path):
    outputs = {f"target_outputs.{n}": torch.ones(1) for n in range(MAX_TENSORS)}
    refuse(write(tmp_path / "cat", outputs), f"expected at most {MAX_TENSORS}")


def test_a_huge_file_is_refused_unread(tmp_path):
    path = write(tmp_path / "cat")
    os.truncate(path, MAX_FILE_BYTES + 1)
    refuse(path, f"has {MAX_FILE_BYTES + 1} bytes")


def test_the_description_is_one_key_of_the_safetensors_header(tmp_path):
    """Other tools can read it, and safetensors does not order several keys."""
    with safe_open(random_concept().save(tmp_path / "cat"), "pt") as file:
        assert list(file.metadata()) == ["perfusion"]
        assert json.loads(file.metadata()["perfusion"])["superclass"] == "tabby cat"
