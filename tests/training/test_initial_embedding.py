"""The token embeddings that a training starts from, and Textual Inversion files."""

from types import SimpleNamespace

import pytest
import torch
from conftest import WIDTH
from safetensors.torch import save_file

from diffusers_perfusion.model_families import family_of
from diffusers_perfusion.model_families.stable_diffusion import StableDiffusion
from diffusers_perfusion.training.initial_embedding import load_embeddings, token_input
from diffusers_perfusion.training.superclass import superclass_embeddings, superclass_input

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
        ({"one": VECTOR[:1].expand(2**40)}, r"of shape \(1099511627776,\), but only 32 of its numbers are there"),
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


def test_the_input_of_a_token_leaves_no_trace(components):
    tokenizer = components["tokenizer"]
    ids, vocabulary = tokenizer("a <cat>").input_ids, tokenizer.get_vocab()
    family = StableDiffusion(SimpleNamespace(**components))
    found = [token_input(family, "<cat>", [vector], "cat") for vector in (VECTOR, VECTOR, -VECTOR)]
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2], atol=0.1)
    assert tokenizer("a <cat>").input_ids == ids and tokenizer.get_vocab() == vocabulary
    with pytest.raises(ValueError, match="has 3 numbers"):
        token_input(family, "<cat>", [VECTOR[:3]], "cat")


@pytest.mark.parametrize("name", ["pipeline", "xl_pipeline", "pixart_pipeline", "sana_pipeline"])
def test_a_token_with_the_embeddings_of_another_is_encoded_like_it(request, name):
    family = family_of(request.getfixturevalue(name))
    found = token_input(family, "<my-cat>", superclass_embeddings(family, "cat"), "cat")
    torch.testing.assert_close(found, superclass_input(family, "cat"))
