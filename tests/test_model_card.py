"""Model cards: their contents, and that a stranger's text in a concept file stays text."""

import ast
import json
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
from diffusers_perfusion.model_card import CardEntry, card_metadata, is_hub_id, make_card, merge_card

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


# what somebody else has written

CARD = make_card("me/my-bear", [ENTRY])
NEXT = make_card("me/my-bear", [replace(ENTRY, header=replace(HEADER, bias=0.9, base_model="you/other"))])


@pytest.fixture
def readme(tmp_path):
    return tmp_path / "README.md"


def merge(readme, text, card=CARD, earlier=None):
    """Write a card into a README of this text, and return metadata and text."""
    readme.write_bytes(text.encode())
    merge_card(readme, card, earlier)
    return card_metadata(readme), readme.read_bytes().decode()


def test_a_card_where_there_is_none(readme):
    merge_card(readme, CARD, None)
    assert ModelCard(readme.read_text()).data.to_dict() == CARD.data.to_dict()
    assert readme.read_text().endswith(CARD.text)


def test_text_outside_of_the_marks_stays(readme):
    front, body = str(CARD).split("---\n\n", 1)
    metadata, text = merge(readme, f"{front}---\n\nAbove.\n\n{body}\nBelow.\n", NEXT, CARD)
    assert metadata == NEXT.data.to_dict()
    assert text.endswith(f"---\n\nAbove.\n\n{NEXT.text.strip()}\n\nBelow.\n")
    assert merge(readme, text, NEXT, NEXT)[1] == text


@pytest.mark.parametrize("end", ["", "\n", "\n\n\n"])
def test_a_text_without_marks_gets_the_card_at_its_end(readme, end):
    _, text = merge(readme, f"---\nlicense: mit\n---\n# Mine\n\nText.{end}")
    assert text.endswith(f"# Mine\n\nText.\n\n{CARD.text.strip()}\n")


def test_half_of_the_marks_are_no_marks(readme):
    begin, *_, end = CARD.text.strip().splitlines()
    for half in (begin, end):
        _, text = merge(readme, f"Mine.\n{half}\nMine too.\n")
        assert "Mine." in text and "Mine too." in text and "# &#60;my-bear&#62;" in text


def test_metadata_of_others_stay(readme):
    written = "---\ndatasets: [me/bears]  # mine\nlicense: mit\ninstance_prompt: a bear\ntags: [bear]\n---\n"
    metadata, text = merge(readme, written)
    assert metadata == CARD.data.to_dict() | {
        "datasets": ["me/bears"],
        "license": "mit",
        "instance_prompt": "a bear",
        "tags": ["bear", "perfusion", "diffusers", "text-to-image"],
    }
    again, _ = merge(readme, text, make_card("me/my-bear", [ENTRY], license="cc-by-4.0"), CARD)
    assert again == metadata | {"license": "cc-by-4.0"}


def test_metadata_that_an_earlier_card_wrote_are_written_anew(readme):
    two = make_card("me/my-bear", [ENTRY, replace(ENTRY, weight_name="cat.safetensors", samples=())])
    metadata, text = merge(readme, str(CARD), NEXT, CARD)
    assert metadata == NEXT.data.to_dict()
    metadata, _ = merge(readme, text, two, NEXT)
    assert metadata == two.data.to_dict()
    assert "instance_prompt" not in metadata


def test_the_gallery_keeps_the_images_of_others(readme):
    mine = {"text": "mine", "output": {"url": "mine.png"}}
    odd = [5, {"text": "no image"}]
    changed = {"text": "a prompt in other words", "output": {"url": "images/bear 1/0.png"}}
    front = json.dumps({"widget": [mine, *odd, changed]})
    metadata, _ = merge(readme, f"---\n{front}\n---\n", CARD, CARD)
    assert metadata["widget"] == [mine, *odd, *CARD.data.widget]


def test_a_whole_model_stays_what_it_is(readme):
    written = "---\nlibrary_name: diffusers\nbase_model: you/base\n---\n# A model\n"
    metadata, text = merge(readme, written)
    assert metadata == {
        "library_name": "diffusers",
        "base_model": "you/base",
        "tags": CARD.data.tags,
        "widget": CARD.data.widget,
    }
    assert "# A model" in text and "# &#60;my-bear&#62;" in text
    licensed = make_card("me/my-bear", [ENTRY], license="mit")
    assert "base_model" not in merge(readme, "---\nlibrary_name: diffusers\n---\n")[0]
    assert merge(readme, "---\nlibrary_name: diffusers\nlicense: other\n---\n", licensed)[0]["license"] == "other"
    assert merge(readme, "---\nlibrary_name: diffusers\n---\n", licensed)[0]["license"] == "mit"


def test_line_ends_stay(readme):
    written = "---\r\nlicense: mit\r\n---\r\n# Mine\r\n"
    metadata, text = merge(readme, written)
    assert metadata["license"] == "mit" and "# Mine\r\n" in text
    assert text.count("\n") == text.count("\r\n")
    assert merge(readme, text, NEXT, CARD)[1].count("# &#60;my-bear&#62;") == 1


def test_a_comment_in_metadata_stays_while_they_do(readme):
    text = merge(readme, "")[1].replace("---\n", "---\n# mine\n", 1)
    assert "# mine" in merge(readme, text, CARD, CARD)[1]


@pytest.mark.parametrize(
    "written",
    [b"---\na: [\n---\n", b"---\n- a list\n---\n", b"\xff\xfe", b"---\na: " + b"[" * 5000 + b"\n---\n"],
    ids=["no YAML", "a list", "no text", "deep"],
)
def test_a_readme_that_cannot_be_read_is_not_written(readme, written):
    readme.write_bytes(written)
    with pytest.raises(ValueError, match=r"README\.md cannot be read, so nothing can be added to it"):
        merge_card(readme, CARD, None)
    assert readme.read_bytes() == written


def test_no_text_of_a_concept_ends_the_card(readme):
    for header in (replace(HEADER, base_model=END), replace(HEADER, training={END: END}, superclass=END)):
        entry = replace(ENTRY, header=header, samples=[(END, "images/perfusion/0.png")])
        card = make_card("me/my-bear", [entry])
        _, text = merge(readme, str(card) + "Mine.\n", CARD, card)
        assert text.endswith(CARD.text + "Mine.\n")


END = CARD.text.strip().splitlines()[-1]


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
