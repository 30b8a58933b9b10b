"""What a model gets for a prompt, and where a super-class is in it."""

import pytest
import torch

from diffusers_perfusion.model_families import family_of
from diffusers_perfusion.training.superclass import (
    TEMPLATES,
    embedding_table,
    superclass_embeddings,
    superclass_ids,
    superclass_input,
    superclass_positions,
)


@pytest.fixture(params=["pipeline", "xl_pipeline", "pixart_pipeline", "sana_pipeline"])
def pipe(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def family(pipe):
    return family_of(pipe)


def positions_of_end(family, prompts):
    """The position of the last word of each prompt: before the end, which some tokenizers do not mark."""
    tokenizer = family.tokenizers[0]
    marked = tokenizer("a").input_ids[-1] == tokenizer.eos_token_id
    return [int(row.sum()) - 1 - marked for row in family.real_tokens(prompts)]


# The super-class


@pytest.mark.parametrize("superclass", ["", "  ", "{eos}", "a {eos}", "ツ ツ"])
def test_a_superclass_that_the_tokenizer_drops_is_refused(family, superclass):
    if family.tokenizers[0].unk_token == family.tokenizers[0].eos_token:  # CLIP knows every letter, and T5 its own end
        superclass = superclass.replace("ツ", "{eos}")
    else:
        superclass = superclass.replace("  ", "ツ").replace("{eos}", "ツ")
    superclass = superclass.format(eos=family.tokenizers[0].eos_token)
    for function in (
        lambda: superclass_ids(family.tokenizers[0], superclass),
        lambda: superclass_input(family, superclass),
        lambda: superclass_embeddings(family, superclass),
    ):
        with pytest.raises(ValueError, match="does not know the super"):
            function()


def test_a_superclass_that_leaves_no_room_in_a_prompt_is_refused(pipeline):
    tokenizer = pipeline.tokenizer
    assert len(superclass_ids(tokenizer, " ".join(["cat"] * 12))) == 12
    with pytest.raises(ValueError, match="is 13 tokens long; expected at most 12"):
        superclass_ids(tokenizer, " ".join(["cat"] * 13))


def test_positions_of_a_superclass_are_of_its_last_occurrence(family):
    tokenizer = family.tokenizers[0]
    (ids, *_) = family.tokenize(["a teddy bear on a teddy bear", "the teddy bear of a cat"])
    first = int(tokenizer.bos_token_id is not None)
    expected = [[first + 5, first + 6], [first + 1, first + 2]]
    assert superclass_positions(tokenizer, "teddy bear", ids).tolist() == expected


@pytest.mark.parametrize(("superclass", "tokens"), [("cat", [1]), ("teddy bear", [2]), ("Zebra", [5, 6])])
def test_superclass_input_is_the_encoding_at_its_last_token(family, superclass, tokens):
    assert len(superclass_ids(family.tokenizers[0], superclass)) in tokens
    expected = []
    for template in TEMPLATES:
        text = template.format(superclass)  # all templates end with it
        (end,) = positions_of_end(family, [text])
        expected.append(family.encode(family.tokenize([text])).inputs[0, end])
    got = superclass_input(family, superclass)
    torch.testing.assert_close(got, torch.stack(expected).mean(0))
    assert not got.requires_grad


def test_superclass_input_takes_the_superclass_and_not_the_template(family):
    """A super-class that also stands in the template: 'a photo of a photo'."""
    prompts = [template.format("photo") for template in TEMPLATES]
    last = positions_of_end(family, prompts)
    expected = family.encode(family.tokenize(prompts)).inputs[torch.arange(len(prompts)), last].mean(0)
    torch.testing.assert_close(superclass_input(family, "photo"), expected)


def test_a_projection_is_in_the_precision_of_the_encodings(pixart_pipeline):
    """The model may be in half precision during training."""
    family = family_of(pixart_pipeline)
    exact = superclass_input(family, "cat")
    pixart_pipeline.transformer.to(torch.bfloat16)
    pixart_pipeline.transformer.caption_projection.float()
    rounded = superclass_input(family, "cat")
    assert exact.dtype == rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.05


def test_word_embeddings_start_at_the_last_token_of_the_superclass(family):
    bear = family.tokenizers[0](" bear", add_special_tokens=False).input_ids[0]
    starts = superclass_embeddings(family, "teddy bear")
    for model, start in zip(family.text_encoders, starts, strict=True):
        assert torch.equal(start, embedding_table(model)[bear])
        start += 1
        assert not torch.equal(start, embedding_table(model)[bear])
