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

from diffusers_perfusion import PerfusionConcept, concept_file
from diffusers_perfusion.concept_file import (
    MAX_DEPTH,
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    WEIGHT_NAME,
    ConceptHeader,
    check_same_token,
    find_local_file,
    printable,
)


def write(path, tensors=None, header=None, metadata=None):
    """A file like that of `random_concept`, but for what is given; None leaves a tensor or field out."""
    state_dict = random_concept().state_dict()
    description = json.loads(state_dict.pop("perfusion")) | (header or {})
    description = {name: value for name, value in description.items() if value is not None}
    state_dict = {name: tensor for name, tensor in (state_dict | (tensors or {})).items() if tensor is not None}
    path.write_bytes(serialize(state_dict, {"perfusion": json.dumps(description)} if metadata is None else metadata))
    return path


def refuse(path, match=None, read=PerfusionConcept.load):
    """Load a file, which must fail with one short message that names the file and holds `match`."""
    with pytest.raises(ValueError, match=match) as caught:
        read(path)
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert str(path) in message and message.isprintable() and len(message) < 1000
    return message


def refuse_header(path, match=None):
    """Load a file and read its header alone, which must fail in the same way."""
    message = refuse(path, match)
    assert refuse(path, match, ConceptHeader.read) == message
    content = path.read_bytes()
    with pytest.raises(ValueError) as caught:  # as of a file on the Hub
        ConceptHeader.from_bytes(content, len(content))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    return message


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
        refuse_header(path, "is truncated or not a safetensors file")
    path.write_bytes(whole + b"\0")
    refuse_header(path, "is truncated or not a safetensors file")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"\n<!DOCTYPE html><html>404</html>" * 20, "it is a web page; download the file itself"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 6108\n",
            "pointer of Git LFS; `git lfs pull`",
        ),
        (b"\x89PNG\r\n\x1a\n" * 20, "it is not a safetensors file"),
        (b"\xff" * 1000, "it is not a safetensors file"),
        (b'{"a": 1}', "it is not a safetensors file"),
        (bytes(1000), "it is truncated or not a safetensors file"),
        (b"", "it is truncated or not a safetensors file"),
    ],
    ids=["html", "git-lfs", "png", "ones", "json", "zeros", "nothing"],
)
def test_other_files_are_refused(tmp_path, content, match):
    (tmp_path / "cat").write_bytes(content)
    refuse_header(tmp_path / "cat", match)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "random-bytes"
    path.write_bytes(content)
    refuse_header(path)


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
    refuse_header(path, "no 'perfusion' description .*, so it is not a Perfusion concept; load a LoRA with load_lora")
    path.write_bytes(serialize({"unet.to_k.lora_A.weight": torch.ones(4, 8)}))
    refuse_header(path, "not a Perfusion concept")


@pytest.mark.parametrize(
    "value", [torch.ones(WIDTH, dtype=dtype) for dtype in (torch.float64, torch.int64, torch.bool, torch.uint8)]
)
def test_tensors_of_another_dtype_are_refused(tmp_path, value):
    refuse_header(
        write(tmp_path / "cat", {"superclass_input": value}), "superclass_input is [A-Z0-9]+; expected one of F16"
    )
    with pytest.raises(ValueError, match="superclass_input is torch"):
        PerfusionConcept.from_state_dict(random_concept().state_dict() | {"superclass_input": value})


@pytest.mark.parametrize("shape", [(), (1, WIDTH), (WIDTH, 1), (0,)])
def test_tensors_of_another_shape_are_refused(tmp_path, shape):
    refuse_header(write(tmp_path / "cat", {"target_outputs.mid.attn2": torch.ones(shape)}), "target_outputs.mid.attn2")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [*TENSORS, "target_outputs.mid.attn2"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, name, value):
    tensor = random_concept().state_dict()[name]
    tensor[5] = value
    refuse(write(tmp_path / "cat", {name: tensor}), f"{name} holds NaN or infinity")


@pytest.mark.parametrize("name", TENSORS)
def test_a_missing_tensor_is_named(tmp_path, name):
    refuse_header(write(tmp_path / "cat", {name: None}), rf"tensors missing: \['{name}'\]")


@pytest.mark.parametrize("name", ["extra", "word_embedding", "token_embeddings.", "token_embeddings.01"])
def test_tensors_that_the_format_does_not_have_are_named(tmp_path, name):
    refuse_header(write(tmp_path / "cat", {name: torch.ones(1)}), rf"not expected: \['{name}'\]")
    with pytest.raises(ValueError, match=rf"not expected: \['{name}'\]"):
        PerfusionConcept.from_state_dict(random_concept().state_dict() | {name: torch.ones(1)})


def test_tensors_are_in_the_order_of_their_names(tmp_path):
    """safetensors has another order in each call."""
    outputs = {f"target_outputs.{name}": torch.ones(3) for name in "zyxcba"}
    path = write(tmp_path / "cat", outputs)
    expected = sorted([*"zyxcba", *random_concept().target_outputs])
    assert list(ConceptHeader.read(path).layers) == list(PerfusionConcept.load(path).target_outputs) == expected
    write(path, {name: torch.ones(3) for name in "zyxcba"})
    refuse_header(path, r"not expected: \['a', 'b', 'c', 'x', 'y'\]")


def test_a_gap_between_token_embeddings_is_named(tmp_path):
    gap = {"token_embeddings.2": torch.ones(3)}
    refuse_header(
        write(tmp_path / "cat", gap), r"missing: \['token_embeddings.1'\]; not expected: \['token_embeddings.2'\]"
    )


def test_a_file_without_target_outputs_is_refused(tmp_path):
    outputs = {"target_outputs.down.0.attn2": None, "target_outputs.mid.attn2": None}
    refuse_header(write(tmp_path / "cat", outputs), "target_outputs is empty")


@pytest.mark.parametrize("version", [None, 0, 1, 2, 4, "3", [3]])
def test_another_format_version_is_named(tmp_path, version):
    message = refuse_header(
        write(tmp_path / "cat", header={"format_version": version}), "format version .* reads version 3;"
    )
    assert "train the concept again" in message and "\n" not in message


def test_a_width_that_is_not_that_of_the_tensors_is_refused(tmp_path):
    refuse_header(write(tmp_path / "cat", header={"width": 768}), f"has {WIDTH} numbers, but the header says 768")
    seven = {"inverse_superclass_input": torch.ones(7)}
    refuse_header(write(tmp_path / "cat", seven), "inverse_superclass_input has 7 numbers")


@pytest.mark.parametrize(
    "text",
    ["", "{", "nonsense", "[" * 100_000, '"text"', "[]", "null", "{'format_version': 1}", '{"width": 1' + "0" * 9999],
)
def test_a_header_that_is_not_a_json_object_is_refused(tmp_path, text):
    refuse_header(write(tmp_path / "cat", metadata={"perfusion": text}))


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
    ("bias_range", ["x" * 100_000, 1]),
    ("base_model", {}),
    ("training", "none"),
    ("width", "32"),
    ("width", 32.0),
    ("format_version", "x" * 100_000),
    ("placeholder_token", "x" * 100_000),
    ("x" * 100_000, 1),
]


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, value in BAD_HEADERS if value is not None],
    ids=range(len(BAD_HEADERS) - 1),
)
def test_a_header_field_out_of_range_or_of_another_type_is_named(tmp_path, name, value):
    match = "the header describes" if name.startswith("xx") else name.replace("_", ".")
    refuse_header(write(tmp_path / "cat", header={name: value}), match)


@pytest.mark.parametrize("name", ["placeholder_token", "superclass", "bias", "temperature", "base_model", "width"])
def test_a_missing_header_field_is_noticed(tmp_path, name):
    refuse_header(write(tmp_path / "cat", header={name: None}), "the header describes")


def test_unknown_header_fields_are_refused(tmp_path):
    refuse_header(write(tmp_path / "cat", header={"__class__": "os.system"}), "the header describes .*__class__")


def test_long_tensor_names_give_short_messages(tmp_path):
    refuse_header(write(tmp_path / "cat", {"x" * 100_000: torch.ones(1)}))
    refuse(write(tmp_path / "cat", {"target_outputs." + "x" * 100_000: torch.tensor([torch.nan])}))


def test_a_huge_file_is_refused(tmp_path):
    path = write(tmp_path / "cat")
    os.truncate(path, MAX_FILE_BYTES + 1)
    refuse_header(path, f"has more than {MAX_FILE_BYTES} bytes")


def test_a_huge_header_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    """The same for many tensors as for a long description."""
    path = write(tmp_path / "cat", header={"training": {"note": "x" * (MAX_HEADER_BYTES - 10_000)}})
    assert ConceptHeader.read(path).training == PerfusionConcept.load(path).training
    write(path, header={"training": {"lists": [[]] * (MAX_HEADER_BYTES // 4)}})
    monkeypatch.setattr(concept_file, "deserialize", None)
    refuse_header(path, f"its header has .* bytes; expected at most {MAX_HEADER_BYTES}")
    write(path, {f"target_outputs.{n}": torch.ones(1) for n in range(4000)})
    refuse_header(path, f"its header has .* bytes; expected at most {MAX_HEADER_BYTES}")


def test_a_deep_description_is_refused(tmp_path):
    def nested(depth):
        return [] if depth == 1 else [nested(depth - 1)]

    path = write(tmp_path / "cat", header={"training": {"deep": nested(MAX_DEPTH - 1)}})
    assert ConceptHeader.read(path).training == PerfusionConcept.load(path).training
    for depth in (MAX_DEPTH, 500):
        write(path, header={"training": {"deep": nested(depth)}})
        refuse_header(path, f"training has more than {MAX_DEPTH} lists and objects in each other")


def raw(path, header, numbers):
    """A file with a header that no writer of safetensors would write."""
    header = header.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + numbers)
    return path


def test_control_characters_do_not_reach_a_terminal(tmp_path):
    path = tmp_path / "cat"
    refuse_header(write(path, {"target_outputs.\x1b[2J": torch.ones(3)}), "the name of a tensor is .*printable")
    refuse_header(write(path, {"\x1b[2J": torch.ones(3)}), "the name of a tensor is .*printable")
    refuse_header(write(path, {"target_outputs.\u202egnp": torch.ones(3, dtype=torch.int32)}), "gnp is I32")
    tensor = '{"a": {"dtype": "F\\u001b[2J", "shape": [1], "data_offsets": [0, 2]}}'
    refuse_header(raw(path, tensor, bytes(2)), "it is truncated or not a safetensors file")


@pytest.mark.parametrize("metadata", ["5", "[]", "null", '"perfusion"', '{"perfusion": 5}'])
def test_metadata_that_are_no_texts_are_refused(tmp_path, metadata):
    tensor = '"a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}'
    refuse_header(raw(tmp_path / "cat", f'{{"__metadata__": {metadata}, {tensor}}}', bytes(2)))


@pytest.mark.parametrize("metadata", [5, None, [], "perfusion", {"perfusion": 5}])
def test_metadata_that_the_hub_has_parsed_may_be_anything(metadata):
    with pytest.raises(ValueError, match="no 'perfusion' description"):
        ConceptHeader.parse(metadata, {})


def test_a_header_is_read_from_the_first_bytes_of_a_file(tmp_path):
    """As of a file on the Hub, whose numbers are not downloaded."""
    path = write(tmp_path / "cat", header={"training": {"note": "x" * 1000}})
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    for start in (content, content[:end], content[: end + 5]):
        assert ConceptHeader.from_bytes(start, len(content)) == ConceptHeader.read(path)
    for start, size in ((content[: end - 1], len(content)), (content[:end], len(content) - 1), (content[:end], 0)):
        with pytest.raises(ValueError, match="it is truncated or not a safetensors file"):
            ConceptHeader.from_bytes(start, size)
    with pytest.raises(ValueError, match=f"has more than {MAX_FILE_BYTES} bytes"):
        ConceptHeader.from_bytes(content[:end], MAX_FILE_BYTES + 1)


def test_a_loaded_concept_does_not_change_with_its_file(tmp_path):
    path = write(tmp_path / "cat")
    concept = PerfusionConcept.load(path)
    before = {name: tensor.clone() for name, tensor in concept._tensors()}
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    for name, tensor in concept._tensors():
        assert torch.equal(tensor, before[name])


def test_a_file_that_is_cut_after_loading_kills_nothing(tmp_path):
    code = (
        "import os, sys; from diffusers_perfusion import PerfusionConcept; "
        "concept = PerfusionConcept.load(sys.argv[1]); os.truncate(sys.argv[1], 0); print(concept.target_input.sum())"
    )
    path = write(tmp_path / "cat")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_a_folder_without_the_file_holds_is_named(tmp_path):
    """A file that was renamed, the output of a training that was stopped, and the folder of a model."""
    write(tmp_path / "my-cat.safetensors")
    for folder in ("checkpoint-20", "checkpoint-10"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / WEIGHT_NAME)
    held = f"my-cat.safetensors, checkpoint-10/{WEIGHT_NAME}, checkpoint-20/{WEIGHT_NAME}"
    with pytest.raises(FileNotFoundError, match=rf"no {WEIGHT_NAME}; it holds {held} \(give the path of one"):
        find_local_file(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="it holds no safetensors file"):
        find_local_file(tmp_path / "empty")


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / WEIGHT_NAME).symlink_to(tmp_path / "gone")
    (tmp_path / "folder").symlink_to(tmp_path)
    for source in (tmp_path, tmp_path / WEIGHT_NAME, tmp_path / "folder"):
        with pytest.raises(FileNotFoundError, match=f"{WEIGHT_NAME} is a link to .*gone, which does not exist"):
            find_local_file(source)
    write(tmp_path / "gone")
    assert find_local_file(tmp_path / "folder") == tmp_path / "folder" / WEIGHT_NAME
    assert PerfusionConcept.from_pretrained(tmp_path).superclass == "tabby cat"


def test_no_source_is_not_this_folder(tmp_path, monkeypatch):
    write(tmp_path / WEIGHT_NAME)
    monkeypatch.chdir(tmp_path)
    assert find_local_file(".") is not None
    assert find_local_file("") is None


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


def test_only_a_concept_of_the_same_token_may_be_replaced(tmp_path):
    path = tmp_path / "cat.safetensors"
    check_same_token(path, "<my-cat>")
    random_concept(placeholder_token="<my-cat>").save(path)
    check_same_token(path, "<my-cat>")
    with pytest.raises(ValueError, match=r"cat\.safetensors is the concept <my-cat>; choose another .* for <my-dog>"):
        check_same_token(path, "<my-dog>")
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"cat\.safetensors .*; delete it, or choose another folder or name"):
        check_same_token(path, "<my-cat>")


def test_a_strangers_text_is_printed_on_one_line_without_control_characters():
    assert printable("a\n  b\t\x1b]0;evil\x07\x1b[2J\u202e") == "a b \ufffd]0;evil\ufffd\ufffd[2J\ufffd"
    assert printable("a" * 1000) == "a" * 399 + "…"
