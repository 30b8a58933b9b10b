"""What a model gets for a prompt, and where a super-category is in it."""

import pytest
import torch

from diffusers_perfusion.families import text_encoders
from diffusers_perfusion.text import (
    TEMPLATES,
    embedding_table,
    initial_word_embeddings,
    superclass_ids,
    superclass_input,
    superclass_positions,
)


@pytest.fixture(params=["pipeline", "xl_pipeline"])
def pipe(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def texts(pipe):
    return text_encoders(pipe)


@torch.no_grad()
def test_encodings_are_those_of_the_pipeline(pipe, texts):
    prompts = ["a cat on the beach", "a dog"]
    found = pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    encoding = texts.encode(texts.tokenize(prompts))
    assert torch.equal(encoding.states, found[0]) and encoding.states.shape[-1] == texts.width
    if len(texts.models) == 1:
        assert encoding.pooled is None
    else:
        assert torch.equal(encoding.pooled, found[2])


# The super-category


@pytest.mark.parametrize("superclass", ["", "  ", "<|endoftext|>", "a <|endoftext|>"])
def test_a_superclass_that_the_tokenizer_drops_is_refused(texts, superclass):
    for function in (
        lambda: superclass_ids(texts.tokenizers[0], superclass),
        lambda: superclass_input(texts, superclass),
        lambda: initial_word_embeddings(texts, superclass),
    ):
        with pytest.raises(ValueError, match="does not know the super-category"):
            function()


def test_a_superclass_that_leaves_no_room_in_a_prompt_is_refused(texts):
    tokenizer = texts.tokenizers[0]
    assert len(superclass_ids(tokenizer, "cat " * 12)) == 12
    with pytest.raises(ValueError, match="is 13 tokens long; expected at most 12"):
        superclass_ids(tokenizer, "cat " * 13)


def test_positions_of_a_superclass_are_of_its_last_occurrence(texts):
    tokenizer = texts.tokenizers[0]
    (ids, *_) = texts.tokenize(["a teddy bear on a teddy bear", "the teddy bear of a cat"])
    assert superclass_positions(tokenizer, "teddy bear", ids).tolist() == [[6, 7], [2, 3]]


@pytest.mark.parametrize(("superclass", "tokens"), [("cat", 1), ("teddy bear", 2), ("Teddy  Bear", 2), ("Zebra", 5)])
def test_superclass_input_is_the_encoding_at_its_last_token(texts, superclass, tokens):
    tokenizer = texts.tokenizers[0]
    assert len(superclass_ids(tokenizer, superclass)) == tokens
    expected = []
    for template in TEMPLATES:
        text = template.format(superclass)
        end = len(tokenizer(text, add_special_tokens=False).input_ids)  # all templates end with it
        expected.append(texts.encode(texts.tokenize([text])).states[0, end])
    got = superclass_input(texts, superclass)
    torch.testing.assert_close(got, torch.stack(expected).mean(0))
    assert not got.requires_grad


def test_superclass_input_takes_the_super_category_and_not_the_template(texts):
    """A super-category that also stands in the template: 'a photo of a photo'."""
    prompts = [template.format("photo") for template in TEMPLATES]
    last = [len(texts.tokenizers[0](prompt, add_special_tokens=False).input_ids) for prompt in prompts]
    expected = texts.encode(texts.tokenize(prompts)).states[torch.arange(len(prompts)), last].mean(0)
    torch.testing.assert_close(superclass_input(texts, "photo"), expected)


def test_word_embeddings_start_at_the_last_token_of_the_superclass(texts):
    bear = texts.tokenizers[0]("bear", add_special_tokens=False).input_ids[0]
    starts = initial_word_embeddings(texts, "teddy bear")
    for model, start in zip(texts.models, starts, strict=True):
        assert torch.equal(start, embedding_table(model)[bear])
        start += 1
        assert not torch.equal(start, embedding_table(model)[bear])
