"""Which prompts a pipeline's text encoders have encoded with which tokens."""

import torch


def recognised(registry, encode, prompt, *tokens):
    (connection,) = registry._connections
    return connection.recognise(encode(prompt)[0], tokens)


def test_positions_of_all_tokens_are_found(registry, load, encode):
    load("my-cat")
    load("my-dog", 1)
    row = recognised(registry, encode, "a <my-cat> on a <my-dog> on <my-cat>", "<my-cat>", "<my-dog>")
    assert row.tokens == {"<my-cat>": (2, 7), "<my-dog>": (5,)}
    assert recognised(registry, encode, "a cat", "<my-cat>").tokens == {}


def test_a_prompt_of_before_its_token_was_loaded_is_not_recognised(registry, load, encode):
    load("my-dog", 1)
    before = encode("a < My-Cat > on the beach", "a cat on the beach", "a <my-dog> on the beach")
    load("my-cat")
    (connection,) = registry._connections
    found = [connection.recognise(row, ["<my-cat>", "<my-dog>"]) for row in before]
    assert found[0] is None  # it would be the base model's image, without a warning
    assert found[1].tokens == {} and found[2].tokens == {"<my-dog>": (2,)}


def test_a_prompt_with_another_embedding_of_its_token_is_not_recognised(registry, load, encode, make_concept):
    load("my-dog", 1)
    load("my-cat")
    before = encode("a <my-cat>", "a <my-dog>")
    registry.remove("my-cat")
    load("my-cat", 5)
    (connection,) = registry._connections
    assert connection.recognise(before[0], ["<my-cat>"]) is None
    assert connection.recognise(before[1], ["<my-cat>", "<my-dog>"]).tokens == {"<my-dog>": (2,)}
    registry.remove("my-cat")
    load("my-cat", 5)
    assert recognised(registry, encode, "a <my-cat>", "<my-cat>").tokens == {"<my-cat>": (2,)}


def test_rows_of_others_are_not_recognised(registry, load):
    load("my-cat")
    (connection,) = registry._connections
    assert connection.recognise(torch.ones(24, 32), ["<my-cat>"]) is None
