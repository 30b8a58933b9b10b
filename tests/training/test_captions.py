import re

from diffusers_perfusion.training.captions import generate_captions


def test_as_many_captions_as_asked_for():
    assert len(list(generate_captions(count=37))) == 37
    assert list(generate_captions(count=0)) == []


def test_the_paper_s_hundred_thousand_by_default():
    assert sum(1 for _ in generate_captions()) == 100_000


def test_the_seed_decides_the_captions():
    assert list(generate_captions(50)) == list(generate_captions(50, seed=0))
    assert list(generate_captions(50)) != list(generate_captions(50, seed=1))
    assert list(generate_captions(50)) == list(generate_captions(100))[:50]


def test_articles_fit_the_words_behind_them():
    text = "\n".join(generate_captions(5000))
    assert not re.findall(r"\ba [aeiou]\w*", text)
    assert not re.findall(r"\ban (?![aeiou])\w*", text)
    assert re.search(r"\ba \w", text) and re.search(r"\ban \w", text)


def test_captions_are_varied_and_tidy():
    captions = list(generate_captions(5000))
    assert len(set(captions)) > 4500
    assert len({word for caption in captions for word in re.findall(r"\w+", caption)}) > 250
    assert all(caption == " ".join(caption.split()) and "{" not in caption for caption in captions)
