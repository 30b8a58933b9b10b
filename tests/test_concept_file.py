"""The concept file: one safetensors file with one description, and a bad one is refused with a short message."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save as serialize
from test_concept import BAD_FIELDS, TENSORS, WIDTH, random_concept, same_description

from diffusers_perfusion import PerfusionConcept
from diffusers_perfusion.concept_file import MAX_FILE_BYTES, MAX_TENSORS


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
@pytest.mark.parametrize("name", [*TENSORS, "target_outputs.mid.attn2"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, name, value):
    tensor = random_concept().state_dict()[name]
    tensor[5] = value
    refuse(write(tmp_path / "cat", {name: tensor}), f"{name} holds NaN or infinity")


@pytest.mark.parametrize("name", TENSORS)
def test_a_missing_tensor_is_named(tmp_path, name):
    refuse(write(tmp_path / "cat", {name: None}), rf"tensors missing: \['{name}'\]")


@pytest.mark.parametrize("name", ["extra", "word_embedding", "token_embeddings.", "token_embeddings.01"])
def test_tensors_that_the_format_does_not_have_are_named(tmp_path, name):
    refuse(write(tmp_path / "cat", {name: torch.ones(1)}), rf"not expected: \['{name}'\]")
    with pytest.raises(ValueError, match=rf"not expected: \['{name}'\]"):
        PerfusionConcept.from_state_dict(random_concept().state_dict() | {name: torch.ones(1)})


def test_a_gap_between_token_embeddings_is_named(tmp_path):
    gap = {"token_embeddings.2": torch.ones(3)}
    refuse(write(tmp_path / "cat", gap), r"missing: \['token_embeddings.1'\]; not expected: \['token_embeddings.2'\]")


def test_a_file_without_target_outputs_is_refused(tmp_path):
    outputs = {"target_outputs.down.0.attn2": None, "target_outputs.mid.attn2": None}
    refuse(write(tmp_path / "cat", outputs), "target_outputs is empty")


@pytest.mark.parametrize("version", [None, 0, 1, 2, 4, "3", [3]])
def test_another_format_version_is_named(tmp_path, version):
    message = refuse(write(tmp_path / "cat", header={"format_version": version}), "format version .* reads version 3;")
    assert "train the concept again" in message and "\n" not in message


def test_a_width_that_is_not_that_of_the_tensors_is_refused(tmp_path):
    refuse(write(tmp_path / "cat", header={"width": 768}), f"has {WIDTH} numbers, but the header says 768")
    seven = {"inverse_superclass_input": torch.ones(7)}
    refuse(write(tmp_path / "cat", seven), "inverse_superclass_input has 7 numbers")


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


def test_reading_a_header_imports_no_torch(tmp_path):
    path = random_concept(training={"steps": 3}).save(tmp_path / "cat.safetensors")
    code = (
        "import sys; from diffusers_perfusion.concept_file import ConceptHeader; "
        "assert not {'torch', 'numpy', 'diffusers', 'transformers', 'huggingface_hub'} & sys.modules.keys(); "
        "print(ConceptHeader.read(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    told = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
    assert "placeholder_token='<My-Cat>'" in told.stdout and "dtype='float16'" in told.stdout
    assert not told.stderr
