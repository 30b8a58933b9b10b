"""Placeholder tokens: found in any prompt, encoded by their own embeddings, and taken away without a trace."""

import copy
import gc

import pytest
import torch
from conftest import CHAT_WORDS, LENGTH, WIDTH, byte_level_tokenizer
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from diffusers_perfusion.model_families import family_of
from diffusers_perfusion.model_families.base import embedding_table, tokenizer_in
from diffusers_perfusion.model_families.flux2 import Flux2Dev
from diffusers_perfusion.model_families.pixart import PixArt
from diffusers_perfusion.model_families.qwen_image import QwenImage
from diffusers_perfusion.model_families.sana import Sana
from diffusers_perfusion.model_families.stable_diffusion import StableDiffusion
from diffusers_perfusion.model_families.stable_diffusion_xl import StableDiffusionXL
from diffusers_perfusion.placeholder_tokens import PlaceholderTokens, _copy, known_token, superclass_ids

PROMPTS = ["a cat on the beach", "A Dog, in <my-cat>'s picture!", "", "the <My-Cat> and <my-bear> <my-cat>"]


class Owner:
    """Stands in for a registry of concepts."""


@pytest.fixture
def owner():
    return Owner()


@pytest.fixture
def tokenizer(components):
    return components["tokenizer"]


@pytest.fixture
def tokens(components):
    return PlaceholderTokens.of(
        components["tokenizer"], components["text_encoder"].requires_grad_(False), StableDiffusion
    )


@pytest.fixture
def add(tokens, owner):
    """Give `owner` a placeholder token of a random embedding, and attach it."""

    def run(token="<my-cat>", seed=0, superclass="cat"):
        tokens.add(owner, token, vector(seed), superclass)
        tokens.attach(owner)

    return run


def vector(seed, width=WIDTH):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def tokenize(tokens, *prompts):
    return tokens.tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    ).input_ids


def encode(tokens, *prompts):
    return tokens.text_encoder(tokenize(tokens, *prompts))[0]


def found(tokens, prompt):
    """Positions of the placeholder tokens of a prompt."""
    return tokens.positions(tokenize(tokens, prompt)[0].tolist())


def content(tokens, prompt):
    """Token ids of a prompt without start, end and padding."""
    return tokens.tokenizer(prompt, add_special_tokens=False).input_ids


def encoder_with(tokens, **embeddings):
    """Return a copy of the text encoder with embeddings in its table in place of those of words."""
    other = copy.deepcopy(tokens.text_encoder)
    for word, embedding in embeddings.items():
        embedding_table(other).data[content(tokens, word)[0]] = embedding
    return other


# Finding tokens in prompts


@pytest.mark.parametrize("token", ["<my-cat>", "<My-Cat>", "<MYCAT>", "<мой-кот>", "sks7", "Sks7", "ツ"])
@pytest.mark.parametrize("prompt", ["a {} on the beach", "{}", "a dog on {}"])
def test_a_placeholder_token_is_one_token_id(tokens, add, token, prompt):
    before, after = (content(tokens, part) for part in prompt.split("{}"))
    add(token)
    ids = content(tokens, prompt.format(token))
    assert len(ids) == len(before) + 1 + len(after)
    assert ids == [*before, ids[len(before)], *after]
    assert found(tokens, prompt.format(token)) == {token: (1 + len(before),)}


def test_a_tokenizer_that_ignores_case_does_so_for_placeholder_tokens(fast_tokenizer, tokens, add):
    add("<My-Cat>")
    assert content(tokens, "a <my-cat>") == content(tokens, "a <MY-CAT>") == content(tokens, "a <My-Cat>")
    assert found(tokens, "a <my-cat>") == {"<My-Cat>": (2,)}


def test_two_tokens_that_differ_only_in_case_are_refused_where_case_is_ignored(fast_tokenizer, tokens, add, owner):
    add("<My-Cat>")
    for other in (owner, Owner()):
        with pytest.raises(ValueError, match="'<my-cat>' differs only in case from '<My-Cat>'"):
            tokens.check(other, "<my-cat>", vector(1), "cat")


def test_two_tokens_may_differ_only_in_case_where_case_matters(pixart_components, owner):
    tokens = PlaceholderTokens.of(pixart_components["tokenizer"], pixart_components["text_encoder"], PixArt)
    tokens.add(owner, "<My-Cat>", vector(0, 20), "cat")
    tokens.attach(owner)
    assert found(tokens, "a <my-cat>") == {"<My-Cat>": (1,)}
    tokens.add(owner, "<my-cat>", vector(1, 20), "cat")
    assert found(tokens, "a <my-cat> <My-Cat>") == {"<my-cat>": (1,), "<My-Cat>": (2,)}


@pytest.mark.parametrize(
    "prompt", ["a {}, good", "a photo of ({}).", "{}'s photo", "a photo:{}", "my{}", "a-{}-photo"]
)
def test_a_token_in_brackets_is_found_beside_anything(tokens, add, prompt):
    add()
    assert list(found(tokens, prompt.format("<my-cat>"))) == ["<my-cat>"]


def test_a_token_of_letters_is_not_found_inside_a_word(tokens, add):
    add("sks")
    assert found(tokens, "a photo of asksb") == found(tokens, "sksa") == {}
    assert found(tokens, "a photo of sks on the beach") == {"sks": (4,)}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a <my-cat> <my-dog>", {"<my-cat>": (2,), "<my-dog>": (3,)}),
        ("<my-dog> on <my-cat> on <my-cat>", {"<my-dog>": (1,), "<my-cat>": (3, 5)}),
        ("<my-cat-2> <my-cat-2>", {"<my-cat-2>": (1, 2)}),
        ("a cat", {}),
        ("", {}),
        (" ".join(["a"] * 40) + " <my-cat>", {}),
    ],
)
def test_positions_are_those_of_every_occurrence(tokens, add, prompt, expected):
    for seed, token in enumerate(["<my-cat>", "<my-dog>", "<my-cat-2>"]):
        add(token, seed)
    assert found(tokens, prompt) == expected
    assert list(found(tokens, prompt)) == list(expected)


# Embeddings


@pytest.mark.parametrize("prompt", ["a {} on the beach", "{} and {}", "a photo of {}, a good {}"])
def test_a_token_is_encoded_by_its_embedding(tokens, add, prompt):
    """The same as if the embedding stood in the table, at each occurrence."""
    table = embedding_table(tokens.text_encoder)
    expected = encoder_with(tokens, dog=vector(0))(tokenize(tokens, prompt.replace("{}", "dog")))[0]
    add()
    assert torch.equal(encode(tokens, prompt.replace("{}", "<my-cat>")), expected)
    assert embedding_table(tokens.text_encoder) is table


def test_two_tokens_are_encoded_by_their_own_embeddings(tokens, add):
    other = encoder_with(tokens, dog=vector(0), bear=vector(1))
    expected = other(tokenize(tokens, "a dog in the bear", "bear"))[0]
    add("<my-dog>", 0)
    add("<my-bear>", 1)
    assert torch.equal(encode(tokens, "a <my-dog> in the <my-bear>", "<my-bear>"), expected)


@pytest.mark.parametrize("family", [PixArt, Sana], ids=lambda family: family.name)
def test_a_token_is_encoded_by_its_embedding_in_other_text_encoders(request, family, owner):
    parts = request.getfixturevalue(f"{family.name.lower()}_components")
    tokens = PlaceholderTokens.of(parts["tokenizer"], parts["text_encoder"], family)
    tokens.tokenizer.padding_side = "right"
    other = copy.deepcopy(tokens.text_encoder)
    embedding_table(other).data[content(tokens, "a dog")[-1]] = vector(0, 20)
    ids = tokenize(tokens, "a dog on the beach")
    expected = other(ids, attention_mask=ids.ne(tokens.tokenizer.pad_token_id))[0]
    tokens.add(owner, "<my-dog>", vector(0, 20), "dog")
    tokens.attach(owner)
    ids = tokenize(tokens, "a <my-dog> on the beach")
    assert torch.equal(tokens.text_encoder(ids, attention_mask=ids.ne(tokens.tokenizer.pad_token_id))[0], expected)


def test_the_end_of_a_prompt_stays_where_it_is(xl_components, owner):
    """The second text encoder takes the highest id for the end, and a placeholder token's would be higher."""
    tokens = PlaceholderTokens.of(xl_components["tokenizer_2"], xl_components["text_encoder_2"], StableDiffusionXL)
    model = tokens.text_encoder
    expected = encoder_with(tokens, dog=vector(0, 24))(tokenize(tokens, "a dog on the beach")).text_embeds
    tokens.add(owner, "<my-dog>", vector(0, 24), "dog")
    tokens.attach(owner)
    ids = tokenize(tokens, "a <my-dog> on the beach")
    assert ids.argmax(-1) == 2
    for output in (model(ids), model(input_ids=ids)):
        assert torch.equal(output.text_embeds, expected)


def test_an_embedding_is_cast_to_the_precision_of_the_text_encoder(tokens, add):
    tokens.text_encoder.to(torch.bfloat16)
    add()
    assert encode(tokens, "a <my-cat>").dtype == torch.bfloat16


def test_gradients_reach_the_token_embedding_alone(tokens, owner):
    embedding = torch.nn.Parameter(vector(0))
    tokens.add(owner, "<my-cat>", embedding, "cat")
    tokens.attach(owner)
    encode(tokens, "a <my-cat> on the beach", "a cat").square().sum().backward()
    assert embedding.grad.abs().min() > 0
    assert all(parameter.grad is None for parameter in tokens.text_encoder.parameters())


def test_a_trained_table_gets_no_gradient_from_a_placeholder_token(tokens, add):
    """The row that is looked up in place of the token must not be trained."""
    embedding_table(tokens.text_encoder).requires_grad_()
    add()
    encode(tokens, "a <my-cat>").sum().backward()
    gradient = embedding_table(tokens.text_encoder).grad
    assert gradient[content(tokens, "a")[0]].any()
    assert not gradient[0].any()
    assert len(gradient) == tokens.text_encoder.config.vocab_size


def test_a_saved_text_encoder_has_no_placeholder_token(tokens, owner, tmp_path):
    before = {name: tensor.clone() for name, tensor in tokens.text_encoder.state_dict().items()}
    tokens.add(owner, "<my-cat>", torch.nn.Parameter(vector(0)), "cat")
    tokens.attach(owner)
    encode(tokens, "a <my-cat>")
    tokens.text_encoder.save_pretrained(tmp_path)
    loaded = CLIPTextModel.from_pretrained(tmp_path)
    for state_dict in (tokens.text_encoder.state_dict(), loaded.state_dict()):
        assert state_dict.keys() == before.keys()
        assert all(torch.equal(state_dict[name], tensor) for name, tensor in before.items())
    assert loaded.config.vocab_size == tokens.text_encoder.config.vocab_size


def test_a_text_encoder_that_does_not_look_embeddings_up_is_an_error(tokens, add):
    add()
    tokens.text_encoder.get_input_embeddings()._forward_hooks.clear()
    encode(tokens, "a cat")
    with pytest.raises(RuntimeError, match="CLIPTextModel encodes a prompt without looking up"):
        encode(tokens, "a <my-cat>")


def test_listeners_get_ids_mask_and_output_of_each_call(tokens, add):
    calls = []
    tokens.listeners.append(lambda *call: calls.append(call))
    encode(tokens, "a cat")
    assert not calls  # no token is attached
    add()
    ids = tokenize(tokens, "a <my-cat>", "a cat")
    mask = torch.ones_like(ids)
    expected = [(ids, mask, tokens.text_encoder(ids, mask)), (ids, None, tokens.text_encoder(input_ids=ids))]
    for call, wanted in zip(calls, expected, strict=True):
        assert all(one is other for one, other in zip(call, wanted, strict=True))


# Attach and detach


def test_prompts_without_a_token_are_not_changed(tokens, add):
    plain = ["a cat on the beach", "A Dog, in my picture!", ""]
    ids, hidden_states = tokenize(tokens, *plain), encode(tokens, *plain)
    add()
    assert torch.equal(tokenize(tokens, *plain), ids)
    assert torch.equal(encode(tokens, *plain), hidden_states)
    # Nor beside a prompt with one, in the same batch.
    assert torch.equal(encode(tokens, *plain, "a <my-cat>")[:3], hidden_states)


def hooks_of(model):
    return [(dict(module._forward_hooks), dict(module._forward_pre_hooks)) for module in model.modules()]


def test_detach_restores_tokenizer_and_text_encoder_exactly(tokens, tokenizer, owner):
    ids, hidden_states = tokenize(tokens, *PROMPTS), encode(tokens, *PROMPTS)
    vocabulary, size, attributes = tokenizer.get_vocab(), len(tokenizer), tokenizer.__dict__
    hooks = hooks_of(tokens.text_encoder)
    tokens.add(owner, "<my-cat>", vector(0), "cat")
    tokens.add(owner, "<my-bear>", vector(1), "teddy bear")
    for _ in range(2):
        tokens.attach(owner)
        tokens.attach(owner)
        assert len(tokenizer) > size
        assert not torch.equal(tokenize(tokens, *PROMPTS), ids)
        assert not torch.equal(encode(tokens, *PROMPTS), hidden_states)
        tokens.detach(owner)
        tokens.detach(owner)
        assert tokenizer.__dict__ is attributes
        assert len(tokenizer) == size
        assert tokenizer.get_vocab() == vocabulary
        assert torch.equal(tokenize(tokens, *PROMPTS), ids)
        assert torch.equal(encode(tokens, *PROMPTS), hidden_states)
        assert hooks_of(tokens.text_encoder) == hooks


def test_tokens_are_detached_for_the_body_of_a_statement(tokens, tokenizer, add):
    attributes = tokenizer.__dict__
    add()
    ids = tokenize(tokens, *PROMPTS)
    with pytest.raises(KeyError), tokens.detached():
        assert tokenizer.__dict__ is attributes
        raise KeyError
    assert torch.equal(tokenize(tokens, *PROMPTS), ids)


def test_tokens_come_and_go_while_attached(tokens, tokenizer, add, owner):
    tokens.attach(owner)
    size = len(tokenizer)  # it has none yet
    add()
    alone = encode(tokens, "a <my-cat>")
    tokens.add(owner, "<my-dog>", vector(1), "dog")
    assert torch.equal(encode(tokens, "a <my-cat>"), alone)
    tokens.remove(owner, "<my-cat>")
    assert found(tokens, "a <my-cat>") == {}
    assert found(tokens, "a <my-dog>") == {"<my-dog>": (2,)}
    assert PlaceholderTokens.existing(tokens.text_encoder) is tokens
    tokens.remove(owner, "<my-dog>")
    assert len(tokenizer) == size
    assert PlaceholderTokens.existing(tokens.text_encoder) is None


def test_ids_do_not_depend_on_the_order_of_loading(tokens, add):
    add("<my-dog>", 0)
    add("<my-cat>", 1)
    ids = content(tokens, "<my-cat> <my-dog>")
    assert ids == sorted(ids)


@pytest.mark.parametrize("change", ["detach", "add", "remove"])
def test_tokens_added_by_others_meanwhile_stop_a_change_and_are_not_lost(tokens, tokenizer, add, owner, change):
    """A token of Textual Inversion that was loaded after a concept has an id behind it."""
    add()
    before = encode(tokens, "a <my-cat>")
    tokenizer.add_tokens(["<inversion>"])
    with pytest.raises(ValueError, match=r"the tokens <inversion> were added .*unload_textual_inversion"):
        {
            "detach": lambda: tokens.detach(owner),
            "add": lambda: tokens.add(owner, "<my-dog>", vector(1), "dog"),
            "remove": lambda: tokens.remove(owner, "<my-cat>"),
        }[change]()
    assert len(content(tokens, "<inversion>")) == 1
    assert len(content(tokens, "<my-dog>")) > 1
    assert found(tokens, "a <my-cat>") == {"<my-cat>": (2,)}
    assert torch.equal(encode(tokens, "a <my-cat>"), before)


def test_tokens_that_somebody_else_has_removed_are_no_obstacle(tokens, tokenizer, add, owner):
    """As unload_textual_inversion does, which removes every token that was added, ours too."""
    plain = copy.deepcopy(tokenizer).__dict__
    add()
    tokenizer.__dict__ = plain
    tokens.detach(owner)
    assert len(content(tokens, "<my-cat>")) > 1


def test_tokens_added_by_others_before_stay(tokens, tokenizer, add, owner):
    tokenizer.add_tokens(["<inversion>"])
    add()
    ids = content(tokens, "<inversion> <my-cat>")
    assert len(set(ids)) == 2
    tokens.detach(owner)
    assert content(tokens, "<inversion>") == ids[:1]


@pytest.mark.parametrize("name", ["components", "pixart_components"])
def test_a_tokenizer_with_placeholder_tokens_is_the_same_otherwise(request, name):
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
    ids = tokenizer(PROMPTS[0]).input_ids
    assert copied.decode(ids) == tokenizer.decode(ids)


def test_a_copy_of_the_text_encoder_has_no_placeholder_token(tokens, tokenizer, add):
    plain = tokenize(tokens, *PROMPTS)
    add()
    ids, hidden_states = tokenize(tokens, *PROMPTS), encode(tokens, *PROMPTS)
    copied = copy.deepcopy(tokens.text_encoder)
    its_tokens = PlaceholderTokens.existing(copied)
    assert its_tokens.text_encoder is copied and its_tokens.tokenizer is not tokenizer
    assert torch.equal(tokenize(its_tokens, *PROMPTS), plain)
    other = Owner()
    its_tokens.add(other, "<my-cat>", vector(1), "cat")
    its_tokens.attach(other)
    assert not torch.equal(encode(its_tokens, "a <my-cat>"), encode(tokens, "a <my-cat>"))
    assert torch.equal(tokenize(tokens, *PROMPTS), ids)
    assert torch.equal(encode(tokens, *PROMPTS), hidden_states)


# Several owners


@pytest.fixture
def owners(tokens):
    """Two owners of the same token, with different embeddings and super-classes."""
    owners = Owner(), Owner()
    for seed, (owner, superclass) in enumerate(zip(owners, ["cat", "teddy bear"], strict=True)):
        tokens.add(owner, "<my-cat>", vector(seed), superclass)
        tokens.attach(owner)
    return owners


def test_each_owner_encodes_its_own_embedding(tokens, owners):
    ids = tokenize(tokens, "a <my-cat>")[0].tolist()
    plain = content(tokens, "a cat"), content(tokens, "a teddy bear")
    for seed, owner in enumerate(owners):
        with tokens.only(owner):
            hidden_states = encode(tokens, "a <my-cat>")
            assert tokens.superclass_prompt(ids)[0][1 : 1 + len(plain[seed])] == plain[seed]
        expected = encoder_with(tokens, dog=vector(seed))(tokenize(tokens, "a dog"))[0]
        assert torch.equal(hidden_states, expected)


def test_a_token_of_several_owners_is_an_error_where_none_of_them_encodes(tokens, owners):
    with pytest.raises(ValueError, match=r"'<my-cat>' is loaded on several models .*encode_prompt of the pipeline"):
        encode(tokens, "a <my-cat>")
    with pytest.raises(ValueError, match="'<my-cat>' is loaded on several models"):
        tokens.superclass_prompt(tokenize(tokens, "a <my-cat>")[0].tolist())


def test_prompts_without_the_token_of_several_owners_are_encoded(tokens, owners):
    with tokens.only(None):
        expected = encode(tokens, "a cat")
    assert torch.equal(encode(tokens, "a cat"), expected)


def test_owners_of_one_embedding_are_not_told_apart(tokens, owner):
    expected, embedding = encoder_with(tokens, dog=vector(0))(tokenize(tokens, "a dog"))[0], vector(0)
    other = Owner()
    for one in (owner, other):
        tokens.add(one, "<my-cat>", embedding, "cat")
        tokens.attach(one)
    assert torch.equal(encode(tokens, "a <my-cat>"), expected)


def test_owners_of_one_embedding_and_two_superclasses_are_told_apart(tokens, owner):
    other, embedding = Owner(), vector(0)
    for one, superclass in ((owner, "cat"), (other, "teddy bear")):
        tokens.add(one, "<my-cat>", embedding, superclass)
        tokens.attach(one)
    with pytest.raises(ValueError, match="'<my-cat>' is loaded on several models"):
        encode(tokens, "a <my-cat>")


@pytest.mark.parametrize("first", [0, 1])
def test_owners_leave_in_either_order(tokens, tokenizer, owners, first):
    size = len(tokenizer)
    with tokens.only(owners[1 - first]):
        expected = encode(tokens, "a <my-cat>")
    tokens.remove(owners[first], "<my-cat>")
    assert len(tokenizer) == size
    assert torch.equal(encode(tokens, "a <my-cat>"), expected)
    tokens.remove(owners[1 - first], "<my-cat>")
    assert len(tokenizer) < size


def test_an_owner_encodes_without_the_tokens_of_others(tokens, add, owner):
    plain = tokenize(tokens, *PROMPTS)
    add("<my-cat>")
    other = Owner()
    tokens.add(other, "<my-bear>", vector(1), "teddy bear")
    tokens.attach(other)
    both = tokenize(tokens, *PROMPTS)
    with tokens.only(other):
        assert found(tokens, "a <my-cat> <my-bear>").keys() == {"<my-bear>"}
        with tokens.only(owner):
            assert found(tokens, "a <my-cat> <my-bear>").keys() == {"<my-cat>"}
        assert found(tokens, "a <my-cat> <my-bear>").keys() == {"<my-bear>"}
    with tokens.only(None):
        assert torch.equal(tokenize(tokens, *PROMPTS), plain)
    assert torch.equal(tokenize(tokens, *PROMPTS), both)
    tokens.detach(owner)
    with tokens.only(owner):
        assert torch.equal(tokenize(tokens, *PROMPTS), plain)


def test_a_freed_owner_leaves_the_tokenizer(tokens, tokenizer, add):
    plain = tokenize(tokens, *PROMPTS)
    other = Owner()
    tokens.add(other, "<my-bear>", vector(1), "bear")
    tokens.attach(other)
    alone, size = tokenize(tokens, *PROMPTS), len(tokenizer)
    temporary = Owner()
    tokens.add(temporary, "<my-cat>", vector(0), "cat")
    tokens.attach(temporary)
    assert len(tokenizer) > size
    del temporary
    gc.collect()
    assert torch.equal(tokenize(tokens, *PROMPTS), alone)
    del other
    gc.collect()
    assert torch.equal(tokenize(tokens, *PROMPTS), plain)


@pytest.mark.filterwarnings("error")
def test_a_freed_owner_beside_tokens_added_by_others_disturbs_nobody(tokens, tokenizer):
    expected = encode(tokens, "a cat")
    temporary = Owner()
    tokens.add(temporary, "<my-cat>", vector(0), "cat")
    tokens.attach(temporary)
    tokenizer.add_tokens(["<inversion>"])
    del temporary
    gc.collect()
    assert torch.equal(encode(tokens, "a cat"), expected)
    assert len(content(tokens, "<inversion>")) == 1


def test_everybody_has_the_same_placeholder_tokens_of_a_text_encoder(tokens, tokenizer, add):
    assert PlaceholderTokens.of(tokenizer, tokens.text_encoder, StableDiffusion) is tokens
    other = copy.deepcopy(tokenizer)
    assert PlaceholderTokens.of(other, tokens.text_encoder, StableDiffusion).tokenizer is other
    PlaceholderTokens.of(tokenizer, tokens.text_encoder, StableDiffusion)
    add()
    with pytest.raises(ValueError, match=r"placeholder tokens from another tokenizer .*tokenizer=pipe.tokenizer"):
        PlaceholderTokens.of(other, tokens.text_encoder, StableDiffusion)


# Refusing


@pytest.mark.parametrize("token", ["cat", "Cat", "beach", "a", "!"])
def test_a_word_of_the_language_is_refused(tokens, owner, token):
    with pytest.raises(ValueError, match=f"'{token}' is already a token of the tokenizer"):
        tokens.add(owner, token, vector(0), "cat")


def test_the_token_of_a_textual_inversion_is_refused(tokens, tokenizer, owner):
    tokenizer.add_tokens(["<my-cat>"])
    with pytest.raises(ValueError, match="already a token of the tokenizer"):
        tokens.add(owner, "<my-cat>", vector(0), "cat")


def test_an_embedding_of_another_width_is_refused(tokens, owner):
    with pytest.raises(ValueError, match=r"'<my-cat>' has 48 numbers.*CLIPTextModel.* have 32") as caught:
        tokens.add(owner, "<my-cat>", vector(0, 48), "cat")
    assert "another text encoder" in str(caught.value)
    tokens.add(owner, "<my-cat>", vector(0), "cat")


@pytest.mark.parametrize("superclass", ["", "  ", "<|endoftext|>", "a <|endoftext|>"])
def test_a_superclass_that_the_tokenizer_does_not_know_is_refused(tokens, owner, superclass):
    with pytest.raises(ValueError, match="does not know the super-class"):
        tokens.add(owner, "<my-cat>", vector(0), superclass)
    tokens.check(owner, "<my-cat>", vector(0), "cat")


def test_a_superclass_that_leaves_no_room_in_a_prompt_is_refused(tokenizer):
    assert len(superclass_ids(tokenizer, " ".join(["cat"] * 12))) == 12
    with pytest.raises(ValueError, match="is 13 tokens long; expected at most 12"):
        superclass_ids(tokenizer, " ".join(["cat"] * 13))


# Super-class prompts


@pytest.mark.parametrize(
    ("prompt", "plain", "expected", "too_long"),
    [
        ("a <my-cat> on", "a cat on", [0, 1, 2, 3], 0),
        ("a <my-bear> on", "a teddy bear on", [0, 1, 3, 4], 1),
        ("<my-bear> on <my-bear> on", "teddy bear on teddy bear on", [0, 2, 3, 5, 6], 2),
    ],
)
def test_a_superclass_prompt_has_the_superclass_in_place_of_each_token(tokens, add, prompt, plain, expected, too_long):
    wanted = tokenize(tokens, plain)[0].tolist()
    add("<my-cat>", 0, "cat")
    add("<my-bear>", 1, "teddy bear")
    ids, places, longer = tokens.superclass_prompt(tokenize(tokens, prompt)[0].tolist())
    assert ids == wanted
    assert places[: len(expected)] == expected
    assert places == sorted(places) and places[-1] == LENGTH - 1
    assert longer == too_long


def test_a_superclass_prompt_that_is_too_long_keeps_its_end(tokens, add):
    plain = tokenize(tokens, "a teddy bear " + " ".join(["beach"] * 20))[0].tolist()
    add("<my-bear>", 0, "teddy bear")
    prompt = tokenize(tokens, "a <my-bear> " + " ".join(["beach"] * 20))[0].tolist()
    ids, places, longer = tokens.superclass_prompt(prompt)
    assert (ids, longer) == (plain, 1)
    assert len(places) == LENGTH and places[-2:] == [LENGTH - 1, LENGTH - 1]


def test_of_a_superclass_at_the_end_of_a_full_prompt_the_last_word_is_kept(tokens, add):
    plain = tokenize(tokens, " ".join(["beach"] * (LENGTH - 3)) + " bear")[0].tolist()
    add("<my-bear>", 0, "teddy bear")
    prompt = tokenize(tokens, " ".join(["beach"] * (LENGTH - 3)) + " <my-bear>")[0].tolist()
    ids, places, longer = tokens.superclass_prompt(prompt)
    assert (ids, places, longer) == (plain, list(range(LENGTH)), 0)


@pytest.mark.parametrize("length", [10, 9, 8, 4])
def test_padding_before_a_prompt_gives_way_to_the_superclass(dev_components, owner, length):
    """And the prompt's end where there is not as much padding."""
    tokenizer, prompt = dev_components["tokenizer"].tokenizer, "cat {} and the {} a"
    tokens = PlaceholderTokens.of(tokenizer, dev_components["text_encoder"], Flux2Dev)

    def tokenize(prompt):
        return tokenizer(prompt, padding="max_length", truncation=True, max_length=length).input_ids

    plain = tokenize(prompt.format("teddy bear", "teddy bear"))
    (bear,) = superclass_ids(tokenizer, "bear")
    tokens.add(owner, "<my-bear>", torch.zeros(12), "teddy bear")
    tokens.attach(owner)
    prompt = tokenize(prompt.format("<my-bear>", "<my-bear>"))
    ids, places, longer = tokens.superclass_prompt(prompt)
    assert ids == plain and len(places) == length and places == sorted(places) and places[-1] == length - 1
    found = tokens.positions(prompt)["<my-bear>"]
    assert longer == len(found)
    assert [places[place] for place in found] == [place for place, token_id in enumerate(plain) if token_id == bear]


SURROUNDINGS = [
    "a {}, good",
    "a {}.",
    "({}, good)",
    "a ([{}])",
    'a "{}" on',
    "a '{}' on",
    "a “{}”",
    "{}'s photo",
    "the {}'s beach",
    "a good-{}-photo",
    "a photo:{}",
    "({}:1.2)",
    "a {}\nphoto",
    "a\n{}",
    "a  {}  on",
    "the dogs' {}",
    "a {} , good",
    "{}, {}! {}",
]


@pytest.fixture
def split_components(pixart_components):
    """With a tokenizer that reads any white space as one space, as transformers 5 makes that of T5."""
    backend = pixart_components["tokenizer"]._tokenizer
    backend.normalizer = normalizers.Replace(Regex(r"\s"), " ")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), backend.pre_tokenizer])
    return pixart_components


@pytest.fixture
def merging_components(klein_components):
    """With a tokenizer to which a bracket and a letter are one token, as to that of Qwen."""
    tokenizer = byte_level_tokenizer((*CHAT_WORDS, "(t", "-t", "-c", "[x"))
    klein_components["tokenizer"] = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>")
    return klein_components


@pytest.mark.usefixtures("fast_tokenizer")
@pytest.mark.parametrize("token", ["<my-bear>", "sks", "SKS-2"])
@pytest.mark.parametrize("superclass", ["teddy bear", "cat"])
@pytest.mark.parametrize(
    "name",
    [f"{name}components" for name in ("", "pixart_", "split_", "sana_", "klein_", "merging_", "dev_")],
)
def test_a_superclass_prompt_is_tokenized_as_its_text(request, owner, name, superclass, token):
    """Whatever stands before the token and behind it; its place is that of the super-class's last token."""
    parts = request.getfixturevalue(name)
    tokens = PlaceholderTokens.of(tokenizer_in(parts["tokenizer"]), parts["text_encoder"], QwenImage)
    plain = {prompt: tokens.tokenizer(prompt.replace("{}", superclass)).input_ids for prompt in SURROUNDINGS}
    begun = {
        prompt: tokens.tokenizer(prompt[: prompt.index("{}")] + superclass, add_special_tokens=False).input_ids
        for prompt in SURROUNDINGS
    }
    tokens.add(owner, token, torch.zeros(tokens.text_encoder.get_input_embeddings().embedding_dim), superclass)
    tokens.attach(owner)
    for prompt, expected in plain.items():
        assert tokens.tokenizer(prompt.replace("{}", superclass)).input_ids == expected
        ids = tokens.tokenizer(prompt.replace("{}", token)).input_ids
        found, places, longer = tokens.superclass_prompt(ids)
        assert (prompt, found) == (prompt, expected)
        assert longer == len(expected) - len(ids) and len(places) == len(ids)
        last = places[tokens.positions(ids)[token][0]] + 1
        assert expected[:last][-len(begun[prompt]) :] == begun[prompt]


@pytest.mark.parametrize(
    "prompt", ["a sks, good", "a sks-2, good", "sks-2 sks sks-2.", "<my-bear>sks-2", "<my-bear><dog>"]
)
def test_tokens_beside_each_other_and_tokens_that_begin_alike(pixart_components, owner, prompt):
    superclasses = {"sks-2": "cat", "sks": "dog", "<my-bear>": "teddy bear", "<dog>": "dog"}
    tokens = PlaceholderTokens.of(pixart_components["tokenizer"], pixart_components["text_encoder"], QwenImage)
    plain = prompt
    for token, superclass in superclasses.items():
        plain = plain.replace(token, superclass)
    expected = tokens.tokenizer(plain).input_ids
    for token, superclass in superclasses.items():
        tokens.add(owner, token, torch.zeros(20), superclass)
    tokens.attach(owner)
    assert tokens.superclass_prompt(tokens.tokenizer(prompt).input_ids).input_ids == expected


def test_a_superclass_is_a_token_of_its_own(merging_components, owner):
    """Also where it would be one with the bracket before it."""
    tokens = PlaceholderTokens.of(merging_components["tokenizer"], merging_components["text_encoder"], QwenImage)
    bracket, both, alone = (content(tokens, text) for text in ("[", "[x", "x"))
    assert len(both) == 1
    tokens.add(owner, "<my-cat>", torch.zeros(8), "x")
    tokens.attach(owner)
    assert tokens.superclass_prompt(content(tokens, "[<my-cat>")) == ([*bracket, *alone], [0, 1], 0)


# A token for the body of a statement


def test_all_text_encoders_know_a_token_for_the_body_of_a_statement(xl_pipeline):
    family = family_of(xl_pipeline)
    sizes = [len(tokenizer) for tokenizer in family.tokenizers]
    with pytest.raises(KeyError), known_token(family, "<my-cat>", [vector(0), vector(1, 24)], "cat"):
        assert all(len(tokenizer) > size for tokenizer, size in zip(family.tokenizers, sizes, strict=True))
        raise KeyError
    assert [len(tokenizer) for tokenizer in family.tokenizers] == sizes
    assert [PlaceholderTokens.existing(text_encoder) for text_encoder in family.text_encoders] == [None, None]


@pytest.mark.parametrize(
    ("embeddings", "match"),
    [
        ([vector(0)], "'<my-cat>' has 1 token embeddings, but this pipeline has 2 text encoders"),
        ([vector(0), vector(1)], "'<my-cat>' has 32 numbers, but those of this text encoder .* have 24"),
    ],
)
def test_a_token_is_known_to_all_text_encoders_or_none(xl_pipeline, embeddings, match):
    family = family_of(xl_pipeline)
    sizes = [len(tokenizer) for tokenizer in family.tokenizers]
    with pytest.raises(ValueError, match=match), known_token(family, "<my-cat>", embeddings, "cat"):
        pass
    assert [len(tokenizer) for tokenizer in family.tokenizers] == sizes
    assert [PlaceholderTokens.existing(text_encoder) for text_encoder in family.text_encoders] == [None, None]
