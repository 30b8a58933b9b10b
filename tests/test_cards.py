"""Model cards: what is in them, and that nothing a stranger's file says is more than text."""

import ast
from dataclasses import replace
from html.parser import HTMLParser
from urllib.parse import urlsplit

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from diffusers_perfusion.cards import CardEntry, is_hub_id, make_card
from diffusers_perfusion.concept import ConceptHeader

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
    dtype=torch.float16,
)
ENTRY = CardEntry("perfusion.safetensors", HEADER, 5640, "ab" * 32, [("a <my-bear> in snow", "images/bear 1/0.png")])


def render(card):
    """The body as a page, with tables and without the front matter; what a browser would see."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(card.text)


def test_front_matter():
    data = make_card("me/my-bear", [ENTRY], license="cc-by-4.0").data
    assert data.to_dict() == {
        "base_model": "me/tiny",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "license": "cc-by-4.0",
        "pipeline_tag": "text-to-image",
        "tags": ["perfusion", "text-to-image", "diffusers"],
        "instance_prompt": "a photo of a <my-bear>",
        "widget": [{"text": "a <my-bear> in snow", "output": {"url": "images/bear 1/0.png"}}],
    }


def test_body():
    page = render(
        make_card("me/my-bear", [ENTRY], sweep=[{"bias": 0.5, "clip_i": 0.81}, {"bias": 0.7, "clip_i": 0.7}])
    )
    assert '<img src="images/bear%201/0.png" alt="a &lt;my-bear&gt; in snow" />' in page
    for row in (
        ("word", "<code>&lt;my-bear&gt;</code>"),
        ("super-category", "teddy bear"),
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


def test_what_is_not_known_is_left_out():
    bare = replace(ENTRY, header=replace(HEADER, base_model="", training={}), sha256=None, samples=())
    card = make_card("me/my-bear", [bare])
    assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags", "instance_prompt"}
    page = render(card)
    for absent in ("sha256", "How it was fitted", "Other settings", "<img"):
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
    assert page.count("<img") == 1


def test_rows_of_a_sweep_are_alike():
    with pytest.raises(ValueError, match="the rows of the sweep have different columns; expected the same in each"):
        make_card("me/my-bear", [ENTRY], sweep=[{"bias": 0.5}, {"temperature": 0.1}])


@pytest.mark.parametrize(
    ("name", "is_id"),
    [("me/tiny", True), ("tiny", False), ("", False), ("/home/me/tiny", False), ("me/t y", False), ("../x", False)],
)
def test_what_is_an_id_on_the_hub(name, is_id):
    assert is_hub_id(name) is is_id


def cards_of(text):
    """A card of one concept and a card of two, with a text wherever a stranger could have put one."""
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
    """The code of a card with every string in it emptied."""
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
