"""The word embedding that a concept starts from, and Textual Inversion files."""

import pytest
import torch
from conftest import WIDTH
from safetensors.torch import save_file

from diffusers_perfusion.families import text_encoders
from diffusers_perfusion.text import TextEncoders, initial_word_embeddings, superclass_input
from diffusers_perfusion.training.embedding import load_embeddings, word_input

VECTOR = torch.arange(1.0, WIDTH + 1)


@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH)])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "pt"])
def test_the_vector_of_every_kind_of_file(tmp_path, kind, shape):
    path, vector = tmp_path / f"learned.{kind}", VECTOR.reshape(shape)
    if kind == "safetensors":
        save_file({"<cat>": vector.half()}, path)
    elif kind == "bin":
        torch.save({"<cat>": vector}, path)
    else:
        torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vector.requires_grad_()}, "step": 9}, path)
    (loaded,) = load_embeddings(path)
    assert torch.equal(loaded, VECTOR) and not loaded.requires_grad


class Code:
    def __reduce__(self):
        return print, ("code of a stranger",)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"one": VECTOR, "two": VECTOR}, "does not hold one finite vector"),
        ({"three words": torch.ones(3, WIDTH)}, r"its tensor is of shape \(3, 32\)"),
        ({"one": VECTOR / 0}, "does not hold one finite vector"),
        ([VECTOR], "does not hold one finite vector"),
        ({"one": Code()}, "which could run code"),
        (None, "could run code"),  # of no format: torch cannot tell it from a pickle
    ],
)
def test_other_files_are_refused(tmp_path, capfd, content, match):
    path = tmp_path / "learned.bin"
    path.write_bytes(b"no tensors") if content is None else torch.save(content, path)
    with pytest.raises(ValueError, match=match):
        load_embeddings(path)
    assert "stranger" not in capfd.readouterr().out


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Textual Inversion file"):
        load_embeddings(tmp_path / "nowhere.bin")


def test_the_input_of_a_word_leaves_no_trace(components):
    tokenizer, text_encoder = components["tokenizer"], components["text_encoder"]
    ids, vocabulary = tokenizer("a <cat>").input_ids, tokenizer.get_vocab()
    texts = TextEncoders([tokenizer], [text_encoder])
    found = [word_input(texts, "<cat>", [vector], "cat") for vector in (VECTOR, VECTOR, -VECTOR)]
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2], atol=0.1)
    assert tokenizer("a <cat>").input_ids == ids and tokenizer.get_vocab() == vocabulary
    with pytest.raises(ValueError, match="has 3 numbers"):
        word_input(texts, "<cat>", [VECTOR[:3]], "cat")


@pytest.mark.parametrize("name", ["pipeline", "xl_pipeline", "pixart_pipeline", "sana_pipeline"])
def test_a_word_with_the_embeddings_of_another_is_encoded_like_it(request, name):
    texts = text_encoders(request.getfixturevalue(name))
    found = word_input(texts, "<my-cat>", initial_word_embeddings(texts, "cat"), "cat")
    torch.testing.assert_close(found, superclass_input(texts, "cat"))
