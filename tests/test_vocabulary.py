import pytest
import torch
from conftest import WIDTH

from diffusers_perfusion.families import text_encoders
from diffusers_perfusion.vocabulary import Vocabulary


@pytest.fixture
def vocabulary(xl_pipeline):
    return Vocabulary(text_encoders(xl_pipeline))


def test_a_word_is_taught_to_all_or_none(vocabulary, xl_components):
    tokenizers = xl_components["tokenizer"], xl_components["tokenizer_2"]
    lengths = [len(tokenizer) for tokenizer in tokenizers]
    vocabulary.enable()
    for embeddings, match in (
        ([torch.ones(WIDTH)], "has 1 word embeddings, but this pipeline has 2 text encoders"),
        ([torch.ones(WIDTH), torch.ones(WIDTH)], "has 32 numbers, but those of this text encoder .* have 24"),
    ):
        with pytest.raises(ValueError, match=match):
            vocabulary.add("<my-cat>", embeddings, "cat")
    vocabulary.add("<my-cat>", [torch.ones(WIDTH), torch.ones(24)], "cat")
    vocabulary.enable()
    assert [len(tokenizer) for tokenizer in tokenizers] == [length + 1 for length in lengths]
    tokenizers[1].add_tokens(["<other>"])
    for change in (
        lambda: vocabulary.remove("<my-cat>"),
        lambda: vocabulary.add("<my-dog>", [torch.ones(WIDTH), torch.ones(24)], "dog"),
        vocabulary.disable,
    ):
        with pytest.raises(ValueError, match="the tokens <other> were added"):
            change()
        assert all(len(tokenizer("<my-cat>", add_special_tokens=False).input_ids) == 1 for tokenizer in tokenizers)
    assert all(len(tokenizer.tokenize("<my-dog>")) > 1 for tokenizer in tokenizers)


def test_nothing_is_reported_while_unheard(vocabulary, xl_pipeline):
    reports = []
    vocabulary.add("<my-cat>", [torch.ones(WIDTH), torch.ones(24)], "cat")
    vocabulary.enable()
    vocabulary.listen(lambda encoding, words, twin: reports.append(words))
    with vocabulary.unheard():
        xl_pipeline.encode_prompt("a <my-cat>", do_classifier_free_guidance=False)
    assert reports == []
    xl_pipeline.encode_prompt("a <my-cat>", do_classifier_free_guidance=False)
    assert reports == [("<my-cat>",)] * 2
