"""The concept word: found in any prompt, encoded by its own embedding, and gone without a trace."""

import copy

import pytest
import torch
from tokenizers import AddedToken
from transformers import CLIPTextModel

from diffusers_perfusion.text import embedding_table, tokenize
from diffusers_perfusion.words import ConceptWords, _copy

PROMPTS = ["a cat on the beach", "A Dog, in <my-cat>'s picture!", "", "the <My-Cat> and <my-bear> <my-cat>"]


@pytest.fixture
def tokenizer(components):
    return components["tokenizer"]


@pytest.fixture
def text_encoder(components):
    return components["text_encoder"].requires_grad_(False)


@pytest.fixture
def words(tokenizer, text_encoder):
    return ConceptWords(tokenizer, text_encoder)


def vector(seed, width=32):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def report_of():
    """What words report of encodings, as a list."""

    def run(words):
        reports = []
        words.on_encoding = lambda *report: reports.append(report)
        return reports

    return run


@pytest.fixture
def report(words, report_of):
    return report_of(words)


def encode_prompts(words, *prompts):
    return words.text_encoder(tokenize(words.tokenizer, prompts).input_ids)[0]


def content(words, prompt):
    """Token ids of a prompt without start, end and padding."""
    return words.tokenizer(prompt, add_special_tokens=False).input_ids


# Finding the word


@pytest.mark.parametrize("word", ["<my-cat>", "<My-Cat>", "<MYCAT>", "<мой-кот>", "sks7", "Sks7", "ツ"])
@pytest.mark.parametrize("prompt", ["a {} on the beach", "{}", "a dog on {}"])
def test_a_word_is_one_token_and_reported_as_written(words, report, word, prompt):
    expected = [content(words, part) for part in prompt.split("{}")]
    words.add(word, vector(0), "cat")
    words.enable()
    ids = content(words, prompt.format(word))
    token_id = words.tokenizer.convert_tokens_to_ids(word)
    assert ids == [*expected[0], token_id, *expected[1]]
    encode_prompts(words, prompt.format(word))
    assert [reported for _, reported, _ in report] == [(word,)]


def test_case_matters(words, report):
    words.add("<My-Cat>", vector(0), "cat")
    words.enable()
    encode_prompts(words, "a <my-cat>", "a <MY-CAT>")
    assert not report


@pytest.mark.parametrize(
    "prompt", ["a {}, good", "a photo of ({}).", "{}'s photo", "a photo:{}", "my{}", "a-{}-photo"]
)
def test_a_word_in_brackets_is_found_beside_anything(words, report, prompt):
    words.add("<my-cat>", vector(0), "cat")
    words.enable()
    encode_prompts(words, prompt.format("<my-cat>"))
    assert [reported for _, reported, _ in report] == [("<my-cat>",)]


def test_a_word_of_letters_is_not_found_inside_another(words, report):
    words.add("sks", vector(0), "cat")
    words.enable()
    encode_prompts(words, "a photo of asksb", "sksa")
    assert not report
    encode_prompts(words, "a photo of sks on the beach")
    assert len(report) == 1


def test_several_words_in_several_prompts(words, report):
    """Each row is reported with its own words, and rows without any are not."""
    for seed, word in enumerate(["<my-cat>", "<my-dog>", "<my-cat-2>"]):
        words.add(word, vector(seed), "cat")
    words.enable()
    prompts = ["a <my-cat> and <my-dog>", "a cat", "<my-cat-2> <my-cat-2>", ""]
    encodings = encode_prompts(words, *prompts)
    assert [set(reported) for _, reported, _ in report] == [{"<my-cat>", "<my-dog>"}, {"<my-cat-2>"}]
    assert torch.equal(report[0][0], encodings[0])
    assert torch.equal(report[1][0], encodings[2])
    assert all(twin is None for _, _, twin in report)


def test_positions_are_those_of_the_first_occurrence(words):
    words.add("<my-cat>", vector(0), "cat")
    words.add("<my-dog>", vector(1), "dog")
    words.enable()
    ids = tokenize(words.tokenizer, ["a <my-cat> <my-dog>", "<my-dog> on <my-cat> on <my-cat>"]).input_ids
    assert words.positions(ids, "<my-cat>").tolist() == [2, 3]
    assert words.positions(ids, "<my-dog>").tolist() == [3, 1]


# Encoding the word


@pytest.mark.parametrize("prompt", ["a {} on the beach", "{} and {}", "a photo of {}, a good {}"])
def test_a_word_is_encoded_by_its_embedding(words, prompt):
    """The same as if the embedding stood in the table, at each occurrence."""
    table = embedding_table(words.text_encoder)
    other = copy.deepcopy(words.text_encoder)
    embedding_table(other)[content(words, "dog")[0]] = vector(0)
    expected = other(tokenize(words.tokenizer, [prompt.replace("{}", "dog")]).input_ids)[0]
    words.add("<my-cat>", vector(0), "cat")
    words.enable()
    assert torch.equal(encode_prompts(words, prompt.replace("{}", "<my-cat>")), expected)
    assert embedding_table(words.text_encoder) is table


def test_two_words_are_encoded_by_their_own_embeddings(words):
    other = copy.deepcopy(words.text_encoder)
    for seed, word in enumerate(["dog", "bear"]):
        embedding_table(other)[content(words, word)[0]] = vector(seed)
    expected = other(tokenize(words.tokenizer, ["a dog in the bear", "bear"]).input_ids)[0]
    words.add("<my-dog>", vector(0), "dog")
    words.add("<my-bear>", vector(1), "bear")
    words.enable()
    assert torch.equal(encode_prompts(words, "a <my-dog> in the <my-bear>", "<my-bear>"), expected)


def test_embedding_is_cast_to_that_of_the_encoder(words):
    words.text_encoder.to(torch.bfloat16)
    words.add("<my-cat>", vector(0), "cat")
    words.enable()
    assert encode_prompts(words, "a <my-cat>").dtype == torch.bfloat16


def test_gradients_reach_the_word_embedding_alone(words):
    embedding = torch.nn.Parameter(vector(0))
    words.add("<my-cat>", embedding, "cat")
    words.enable()
    encode_prompts(words, "a <my-cat> on the beach", "a cat").square().sum().backward()
    assert embedding.grad.abs().min() > 0
    assert all(parameter.grad is None for parameter in words.text_encoder.parameters())


def test_a_trained_table_gets_no_gradient_from_a_concept_word(words):
    """The row that is looked up in place of the word must not learn from it."""
    embedding_table(words.text_encoder).requires_grad_()
    words.add("<my-cat>", vector(0), "cat")
    words.enable()
    encode_prompts(words, "a <my-cat>").sum().backward()
    gradient = embedding_table(words.text_encoder).grad
    assert gradient[content(words, "a")[0]].any()
    assert not gradient[0].any()
    assert len(gradient) == words.text_encoder.config.vocab_size


def test_saved_text_encoder_knows_nothing_of_the_words(words, tmp_path):
    before = {name: tensor.clone() for name, tensor in words.text_encoder.state_dict().items()}
    words.add("<my-cat>", torch.nn.Parameter(vector(0)), "cat")
    words.enable()
    encode_prompts(words, "a <my-cat>")
    words.text_encoder.save_pretrained(tmp_path)
    loaded = CLIPTextModel.from_pretrained(tmp_path)
    for state_dict in (words.text_encoder.state_dict(), loaded.state_dict()):
        assert state_dict.keys() == before.keys()
        assert all(torch.equal(state_dict[name], tensor) for name, tensor in before.items())
    assert loaded.config.vocab_size == words.text_encoder.config.vocab_size


# Switching


def test_prompts_without_a_word_are_not_changed(words):
    plain = ["a cat on the beach", "A Dog, in my picture!", ""]
    ids, encodings = tokenize(words.tokenizer, plain).input_ids, encode_prompts(words, *plain)
    words.add("<my-cat>", vector(0), "cat")
    words.enable()
    assert torch.equal(tokenize(words.tokenizer, plain).input_ids, ids)
    assert torch.equal(encode_prompts(words, *plain), encodings)
    # Nor beside a prompt with one, in the same batch.
    assert torch.equal(encode_prompts(words, *plain, "a <my-cat>")[:3], encodings)


def test_disable_restores_tokenizer_and_encoder_exactly(words, tokenizer):
    ids, encodings = tokenize(tokenizer, PROMPTS).input_ids, encode_prompts(words, *PROMPTS)
    vocabulary, size, state = tokenizer.get_vocab(), len(tokenizer), tokenizer.__dict__
    hooks = [hook_dicts(module) for module in words.text_encoder.modules()]
    words.add("<my-cat>", vector(0), "cat")
    words.add("<my-bear>", vector(1), "teddy bear")
    for _ in range(2):
        words.enable()
        words.enable()
        assert words.enabled
        assert len(tokenizer) == size + 2
        assert not torch.equal(tokenize(tokenizer, PROMPTS).input_ids, ids)
        assert not torch.equal(encode_prompts(words, *PROMPTS), encodings)
        words.disable()
        words.disable()
        assert not words.enabled
        assert tokenizer.__dict__ is state
        assert len(tokenizer) == size
        assert tokenizer.get_vocab() == vocabulary
        assert torch.equal(tokenize(tokenizer, PROMPTS).input_ids, ids)
        assert torch.equal(encode_prompts(words, *PROMPTS), encodings)
        assert [hook_dicts(module) for module in words.text_encoder.modules()] == hooks


def hook_dicts(module):
    return dict(module._forward_hooks), dict(module._forward_pre_hooks)


def test_words_come_and_go_while_enabled(words, report):
    words.enable()
    assert not words.enabled  # there is none yet
    words.add("<my-cat>", vector(0), "cat")
    words.enable()
    alone = encode_prompts(words, "a <my-cat>")
    words.add("<my-dog>", vector(1), "dog")
    assert words.enabled
    assert torch.equal(encode_prompts(words, "a <my-cat>"), alone)
    words.remove("<my-cat>")
    report.clear()
    encode_prompts(words, "a <my-cat>", "a <my-dog>")
    assert [reported for _, reported, _ in report] == [("<my-dog>",)]
    words.remove("<my-dog>")
    assert not words.enabled


def test_tokens_added_by_others_meanwhile_are_not_lost(words, tokenizer, report):
    """A textual inversion loaded after a concept has an id behind it: refuse to take the word away, and say so."""
    words.add("<my-cat>", vector(0), "cat")
    words.enable()
    tokenizer.add_tokens(["<inversion>"])
    with pytest.raises(ValueError, match=r"the tokens <inversion> were added .*unload_textual_inversion"):
        words.disable()
    assert words.enabled
    assert len(content(words, "<inversion>")) == 1


def test_a_failed_change_beside_foreign_tokens_changes_nothing(words, tokenizer, report):
    words.add("<my-cat>", vector(0), "cat")
    words.enable()
    before = encode_prompts(words, "a <my-cat>")
    tokenizer.add_tokens(["<inversion>"])
    with pytest.raises(ValueError, match="the tokens <inversion> were added"):
        words.add("<my-dog>", vector(1), "dog")
    with pytest.raises(ValueError, match="the tokens <inversion> were added"):
        words.remove("<my-cat>")
    words.check_new("<my-dog>")
    report.clear()
    assert torch.equal(encode_prompts(words, "a <my-cat>"), before)
    assert [reported for _, reported, _ in report] == [("<my-cat>",)]


def test_words_that_somebody_else_has_removed_are_no_obstacle(words, tokenizer):
    """As unload_textual_inversion does, which removes every token that was added, ours too."""
    words.add("<my-cat>", vector(0), "cat")
    words.enable()
    bare = copy.deepcopy(words._plain)
    tokenizer.__dict__ = bare
    words.disable()
    assert len(content(words, "<my-cat>")) > 1


def test_tokens_added_by_others_before_stay(words, tokenizer):
    tokenizer.add_tokens(["<inversion>"])
    words.add("<my-cat>", vector(0), "cat")
    words.enable()
    ids = content(words, "<inversion> <my-cat>")
    assert len(set(ids)) == 2
    words.disable()
    assert content(words, "<inversion>") == ids[:1]


# Refusing


@pytest.mark.parametrize("word", ["cat", "Cat", "beach", "a", "!"])
def test_a_word_of_the_language_is_refused(words, word):
    with pytest.raises(ValueError, match=f"'{word}' is already a word of the tokenizer"):
        words.add(word, vector(0), "cat")


def test_a_word_that_is_taken_is_refused(words):
    words.add("<my-cat>", vector(0), "cat")
    for _ in range(2):
        with pytest.raises(ValueError, match="'<my-cat>' is the word of a concept that is loaded already"):
            words.add("<my-cat>", vector(1), "cat")
        words.enable()


def test_the_token_of_an_inversion_is_refused(words, tokenizer):
    tokenizer.add_tokens(["<my-cat>"])
    with pytest.raises(ValueError, match="already a word of the tokenizer"):
        words.add("<my-cat>", vector(0), "cat")


def test_an_embedding_of_another_width_is_refused(words):
    with pytest.raises(ValueError, match=r"'<my-cat>' has 48 numbers.*CLIPTextModel.* have 32") as caught:
        words.add("<my-cat>", vector(0, 48), "cat")
    assert "another text encoder" in str(caught.value)
    words.add("<my-cat>", vector(0), "cat")


@pytest.mark.parametrize("superclass", ["", "  ", "<|endoftext|>", "a <|endoftext|>"])
def test_a_superclass_that_the_tokenizer_drops_is_refused(words, superclass):
    with pytest.raises(ValueError, match="does not know the super-category"):
        words.add("<my-cat>", vector(0), superclass)
    words.check_new("<my-cat>")


# Twins


def twin_of(words, report, prompt):
    words.twins = True
    words.enable()
    report.clear()
    encode_prompts(words, prompt)
    return report[0][2]


def test_twin_of_a_one_token_superclass_is_the_plain_prompt(words, report):
    expected = encode_prompts(words, "a cat on the beach")[0]
    words.add("<my-cat>", vector(0), "cat")
    assert torch.equal(twin_of(words, report, "a <my-cat> on the beach"), expected)


@pytest.mark.parametrize(
    "rest", ["", "on the beach", " ".join(["beach"] * 18), " ".join(["beach"] * 19), " ".join(["beach"] * 30)]
)
def test_twin_is_aligned_with_the_prompt(words, report, rest):
    """Position p of the twin belongs to position p of the prompt, also where a longer super-category overflows."""
    plain = encode_prompts(words, f"a teddy bear {rest}")[0]
    words.add("<my-bear>", vector(0), "teddy bear")
    twin = twin_of(words, report, f"a <my-bear> {rest}")
    assert len(twin) == 24
    assert torch.equal(twin[:2], plain[:2])  # start, "a"
    assert torch.equal(twin[2], plain[3])  # the word: "bear"
    assert torch.equal(twin[3:23], plain[4:24])
    assert torch.equal(twin[23], plain[23])


def test_twin_of_a_prompt_with_several_words(words, report):
    plain = encode_prompts(words, "teddy bear on a cat, teddy bear in the beach")[0]
    words.add("<my-bear>", vector(0), "teddy bear")
    words.add("<my-cat>", vector(1), "cat")
    twin = twin_of(words, report, "<my-bear> on a <my-cat>, <my-bear> in the beach")
    at = [0, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert torch.equal(twin[: len(at)], plain[at])


def test_twins_of_a_batch_belong_to_their_rows(words, report):
    plain = encode_prompts(words, "a cat", "on the teddy bear")
    words.add("<my-bear>", vector(0), "teddy bear")
    words.add("<my-cat>", vector(1), "cat")
    words.twins = True
    words.enable()
    encodings = encode_prompts(words, "a <my-cat>", "a dog", "on the <my-bear>")
    assert [reported for _, reported, _ in report] == [("<my-cat>",), ("<my-bear>",)]
    assert torch.equal(report[1][0], encodings[2])
    torch.testing.assert_close(report[0][2], plain[0])
    torch.testing.assert_close(report[1][2][:4], plain[1, [0, 1, 2, 4]])


def test_twins_are_not_made_unless_asked_for(words, report):
    """They cost a second pass of the text encoder."""
    passes = []
    words.text_encoder.register_forward_hook(lambda *args: passes.append(1))
    words.add("<my-cat>", vector(0), "cat")
    words.enable()
    encode_prompts(words, "a <my-cat>")
    assert len(passes) == 1
    words.twins = True
    encode_prompts(words, "a <my-cat>")
    assert len(passes) == 3
    encode_prompts(words, "a cat")
    assert len(passes) == 4


@pytest.mark.parametrize("name", ["components", "pixart_components"])
def test_a_tokenizer_with_words_is_the_same_otherwise(request, name):
    tokenizer = request.getfixturevalue(name)["tokenizer"]
    tokenizer.add_tokens(["<inversion>", AddedToken("<Other>", normalized=False, lstrip=True)])
    tokenizer("a cat", padding="max_length", truncation=True, max_length=9)  # which stay set

    def described(tokenizer):
        backend = getattr(tokenizer, "_tokenizer", None)  # of those that transformers 4 has in Python there is none
        return tokenizer.get_vocab(), tokenizer(PROMPTS).input_ids, backend and backend.to_str()

    copied = _copy(tokenizer)
    before = described(tokenizer)
    assert described(copied) == before
    copied.add_tokens(["<my-cat>"])
    assert described(tokenizer) == before
    assert len(copied) == len(tokenizer) + 1
    assert copied(PROMPTS[0]) == tokenizer(PROMPTS[0])


# Two text encoders


def test_the_end_of_a_prompt_stays_where_it_is(xl_components):
    """The second encoder takes the highest id for the end, and a concept word's would be higher."""
    tokenizer, model = xl_components["tokenizer_2"], xl_components["text_encoder_2"]
    other = copy.deepcopy(model)
    embedding_table(other).data[tokenizer("dog").input_ids[1]] = vector(0, 24)
    expected = other(tokenize(tokenizer, ["a dog on the beach"]).input_ids, output_hidden_states=True)
    words = ConceptWords(tokenizer, model, -2)
    words.add("<my-dog>", vector(0, 24), "dog")
    words.enable()
    for call in (lambda ids: model(ids, output_hidden_states=True), lambda ids: model(input_ids=ids)):
        ids = tokenize(tokenizer, ["a <my-dog> on the beach"]).input_ids
        assert ids.argmax(-1) == 2
        assert torch.equal(call(ids).text_embeds, expected.text_embeds)


def test_the_hidden_state_that_the_pipeline_takes_is_reported(xl_components, report_of):
    words = ConceptWords(xl_components["tokenizer_2"], xl_components["text_encoder_2"], -2)
    report = report_of(words)
    words.add("<my-dog>", vector(0, 24), "dog")
    words.twins = True
    words.enable()
    ids = tokenize(words.tokenizer, ["a <my-dog>", "a dog"]).input_ids
    output = words.text_encoder(ids, output_hidden_states=True)
    ((encoding, reported, twin),) = report
    assert reported == ("<my-dog>",)
    assert torch.equal(encoding, output.hidden_states[-2][0])
    torch.testing.assert_close(twin, output.hidden_states[-2][1])
    report.clear()
    words.text_encoder(ids)  # for its pooled output alone
    assert not report


def test_a_word_is_encoded_by_its_embedding_in_t5(pixart_components):
    tokenizer, model = pixart_components["tokenizer"], pixart_components["text_encoder"]
    other = copy.deepcopy(model)
    embedding_table(other).data[tokenizer("dog").input_ids[0]] = vector(0, 20)
    ids = tokenize(tokenizer, ["a dog on the beach"]).input_ids
    expected = other(ids, attention_mask=ids.ne(0))[0]
    words = ConceptWords(tokenizer, model)
    words.add("<my-dog>", vector(0, 20), "dog")
    words.enable()
    ids = tokenize(tokenizer, ["a <my-dog> on the beach"]).input_ids
    assert torch.equal(model(ids, attention_mask=ids.ne(0))[0], expected)


@pytest.mark.parametrize("superclass", ["dog", "teddy bear"])
def test_a_twin_beside_masked_padding(pixart_components, report_of, superclass):
    tokenizer, model = pixart_components["tokenizer"], pixart_components["text_encoder"]
    words = ConceptWords(tokenizer, model)
    ids = tokenize(tokenizer, [f"a {superclass} on the beach"]).input_ids
    expected = model(ids, attention_mask=ids.ne(0))[0][0]
    report = report_of(words)
    words.add("<my-dog>", vector(0, 20), superclass)
    words.twins = True
    words.enable()
    ids = tokenize(tokenizer, ["a <my-dog> on the beach"]).input_ids
    model(ids, attention_mask=ids.ne(0))
    longer = len(superclass.split())
    torch.testing.assert_close(report[0][2][:6], expected[[0, *range(longer, longer + 5)]])


def test_a_text_encoder_that_does_not_look_up_words_is_an_error(words):
    words.add("<my-cat>", vector(0), "cat")
    words.enable()
    embeddings = words.text_encoder.get_input_embeddings()
    for key in list(embeddings._forward_hooks):
        del embeddings._forward_hooks[key]
    encode_prompts(words, "a cat")
    with pytest.raises(RuntimeError, match="CLIPTextModel encodes a prompt without looking up"):
        encode_prompts(words, "a <my-cat>")
