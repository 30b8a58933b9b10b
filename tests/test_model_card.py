"""Model cards: their contents, and that a stranger's text in a concept file stays text."""

import ast
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from diffusers_perfusion.concept_file import ConceptHeader
from diffusers_perfusion.hub import card_entry
from diffusers_perfusion.model_card import CardEntry, is_hub_id, make_card

ROOT = Path(__file__).resolve().parents[1]

HEADER = ConceptHeader(
    placeholder_token="<my-bear>",
    superclass="teddy bear",
    bias=0.6,
    temperature=0.15,
    bias_range=(0.5, 1.1),
    base_model="me/tiny",
    training={"steps": 150, "mask": "attention"},
    width=32,
    layers={"down": 16},
    dtype="float16",
)
ENTRY = CardEntry("perfusion.safetensors", HEADER, 5640, "ab" * 32, [("a <my-bear> in snow", "images/bear 1/0.png")])


def render(card):
    """Render the body as a page with tables and without the front matter, as a browser would show it."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(card.text)


def test_front_matter():
    data = make_card("me/my-bear", [ENTRY], license="cc-by-4.0").data
    assert data.to_dict() == {
        "base_model": "me/tiny",
        "base_model_relation": "adapter",
        "library_name": "diffusers-perfusion",
        "license": "cc-by-4.0",
        "pipeline_tag": "text-to-image",
        "tags": ["perfusion", "diffusers", "text-to-image"],
        "instance_prompt": "a photo of a <my-bear>",
        "widget": [{"text": "a <my-bear> in snow", "output": {"url": "images/bear 1/0.png"}}],
    }


def test_body():
    page = render(
        make_card("me/my-bear", [ENTRY], sweep=[{"bias": 0.5, "clip_i": 0.81}, {"bias": 0.7, "clip_i": 0.7}])
    )
    assert "<Gallery />" in page
    for row in (
        ("placeholder token", "<code>&lt;my-bear&gt;</code>"),
        ("super-class", "teddy bear"),
        ("β", "0.6; worth trying are 0.5 to 1.1"),
        ("τ", "0.15"),
        ("file", "perfusion.safetensors, 5640 bytes"),
        ("sha256", f"<code>{'ab' * 32}</code>"),
        ("0.5", "0.81"),
        ("0.7", "0.7"),
        ("steps", "150"),
        ("mask", "attention"),
    ):
        assert "<tr>\n" + "".join(f"<td>{cell}</td>\n" for cell in row) + "</tr>" in page
    assert "pipe.load_perfusion('me/my-bear')\n" in page


def test_unknown_fields_are_left_out():
    bare = replace(ENTRY, header=replace(HEADER, base_model="", training={}), sha256=None, samples=())
    card = make_card("me/my-bear", [bare])
    assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags", "instance_prompt"}
    page = render(card)
    for absent in ("sha256", "Training", "Other settings", "<Gallery"):
        assert absent not in page


def test_a_collection_lists_its_concepts():
    cat = replace(
        ENTRY, weight_name="cat.safetensors", header=replace(HEADER, placeholder_token="<my-cat>"), samples=()
    )
    other_base = replace(cat, weight_name="dog.safetensors", header=replace(HEADER, base_model="you/other"))
    card = make_card("me/pets", [cat, ENTRY, other_base])
    assert card.data.base_model == ["me/tiny", "you/other"]
    assert card.data.get("instance_prompt") is None
    page = render(card)
    assert "<h1>3 concepts</h1>" in page
    assert '<a href="cat.safetensors">cat.safetensors</a>' in page
    assert "pipe.load_perfusion('me/pets', weight_name='cat.safetensors')\n" in page
    assert page.count("<Gallery />") == 1
    assert [entry["output"]["url"] for entry in card.data.widget] == ["images/bear 1/0.png"]
    assert f"<td>perfusion.safetensors</td>\n<td><code>{'ab' * 32}</code></td>" in page
    assert "<Gallery" not in render(make_card("me/pets", [cat, other_base]))


def test_rows_of_a_sweep_are_alike():
    with pytest.raises(ValueError, match="the rows of the sweep have different columns; expected the same in each"):
        make_card("me/my-bear", [ENTRY], sweep=[{"bias": 0.5}, {"temperature": 0.1}])


@pytest.mark.parametrize(
    ("name", "is_id"),
    [("me/tiny", True), ("tiny", False), ("", False), ("/home/me/tiny", False), ("me/t y", False), ("../x", False)],
)
def test_which_names_are_ids_on_the_hub(name, is_id):
    assert is_hub_id(name) is is_id


def cards_of(text):
    """Return a card of one concept and a card of two, with a text wherever a stranger could have put one."""
    printable = "".join(c for c in text if c.isprintable())
    header = replace(
        HEADER,
        placeholder_token="".join(printable.split()) or "x",
        superclass=printable.strip() or "x",
        base_model=printable + " ",
        training={text: text, "nested ": {text: [text]}},
    )
    entry = CardEntry("perfusion.safetensors", header, 1, None, [(text, "images/perfusion/0.png")])
    return [make_card("me/x", [entry]), make_card("me/x", [entry, replace(entry, weight_name=f"{text}.safetensors")])]


class Tags(HTMLParser):
    """The tags of a page with the names of their attributes, and where they lead."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.leads = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, [name for name, _ in attributes]))
        self.leads += [value for name, value in attributes if name in ("href", "src")]


def code_of(card):
    """Return the syntax tree of a card's code with every string in it emptied."""
    (code,) = (block.content for block in MarkdownIt().parse(card.text) if block.type == "fence")
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            node.value = ""
    return ast.dump(tree)


@given(st.text(st.sampled_from("<>[]()!`*_~|#-:&\\\n'\"{}% ab/."), max_size=40))
@settings(max_examples=50, deadline=None)
@example("\N{RIGHT-TO-LEFT OVERRIDE}x\n---\n# heading\n")
@example("<script>alert(1)</script>")
@example("<img/src=x/onerror=alert(1)>")
@example("](javascript:alert(1))")
@example("![x](https://evil.example/x.png)")
@example("**bold**`code`_x_~~y~~ a|b|c")
@example("\n```\nimport os")
@example("x'+__import__('os').system('true')+'")
@example("{{ 7 * 7 }}{% raw %}")
@example("a: &b *c !!python/object:os.system")
@example("&lt;script&gt;\\")
def test_any_text_is_only_text(text):
    for card, plain in zip(cards_of(text), cards_of("harmless"), strict=True):
        read = ModelCard(str(card))
        assert read.data.to_dict().keys() == plain.data.to_dict().keys()
        assert {entry["text"] for entry in read.data.widget} == {text}
        page = Tags(render(read))
        assert page.tags == Tags(render(plain)).tags
        for lead in page.leads:
            assert lead.startswith(("https://arxiv.org/", "images/")) or not urlsplit(lead).scheme
        assert code_of(read) == code_of(plain)


def test_prompts_on_the_card_call_the_concept():
    card = make_card("me/my-bear", [ENTRY])
    (code,) = (block.content for block in MarkdownIt().parse(card.text) if block.type == "fence")
    for prompt in (card.data.instance_prompt, card.data.widget[0]["text"], code):
        assert "<my-bear>" in prompt


@pytest.mark.parametrize("path", ["hub_cards/example.md", "examples/hub/my-bear/README.md"])
def test_the_example_card_is_that_of_the_example_concept(path):
    """Render it again with `python tests/test_model_card.py`."""
    assert (ROOT / path).read_text() == example_card()


def example_card():
    folder = ROOT / "examples" / "hub" / "my-bear"
    prompts = ["a <my-bear> on the beach"] * 4 + ["a <my-bear> wearing a top hat"] * 4
    samples = [(prompt, f"images/perfusion/{number}.png") for number, prompt in enumerate(prompts)]
    assert all((folder / image).is_file() for _, image in samples)
    return str(make_card("me/my-bear", [card_entry(folder / "perfusion.safetensors", samples)]))


if __name__ == "__main__":
    for path in ("hub_cards/example.md", "examples/hub/my-bear/README.md"):
        (ROOT / path).write_text(example_card())
