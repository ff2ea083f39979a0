"""Pictures of cards are legible, whatever the names, and leave free what the card writes over."""

from io import BytesIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from hyper_merge.loras import card_images
from hyper_merge.loras.card_images import hyper_model_picture, lora_picture

LONG = [f"aVeryLongCheckpointName_v{i}_with_a_tail_inpainting_fp16_pruned" for i in range(20)]
POSITIVE, NEGATIVE, GROUND = (0x5A, 0xA2, 0xDC), (0xE8, 0x91, 0x4A), (0x1A, 0x20, 0x29)


def image(png):
    picture = Image.open(BytesIO(png))
    assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (400, 600))
    return picture


def columns_of(picture, colour):
    """The columns in which a colour occurs."""
    width = picture.width
    return {i % width for i, pixel in enumerate(picture.getdata()) if pixel == colour}


def is_empty(picture, box):
    return picture.crop(box).getcolors() == [((box[2] - box[0]) * (box[3] - box[1]), GROUND)]


def test_a_bar_shows_a_multipliers_sign_and_size():
    up = columns_of(image(lora_picture("mix", 0, 1, 8, {"a": 1.0, "b": 0.5})), POSITIVE)
    assert (min(up), max(up)) == (200, 368)
    half = columns_of(image(lora_picture("mix", 0, 1, 8, {"b": 0.5})), POSITIVE)
    assert (min(half), max(half)) == (200, 284)
    down = columns_of(image(lora_picture("mix", 0, 1, 8, {"a": -1.0})), NEGATIVE)
    assert (min(down), max(down)) == (32, 200)


def test_a_multiplier_above_one_stays_on_the_card():
    picture = image(lora_picture("mix", 0, 1, 8, {"a": 2.0, "b": 1.0}))
    assert max(columns_of(picture, POSITIVE)) == 368


@pytest.mark.parametrize("names", [["a"], LONG[:6], LONG, ["模型" * 20, "Модель", "é" * 60, "😀"]])
def test_margins_and_what_the_card_covers_stay_empty(names):
    pictures = [
        lora_picture(names[0], 19, 20, 2048, {name: 1 - i / 10 for i, name in enumerate(names)}),
        hyper_model_picture(names[0], names),
    ]
    for picture in map(image, pictures):
        for box in ((0, 0, 30, 600), (372, 0, 400, 600), (0, 430, 400, 600)):
            assert is_empty(picture, box), box
        assert not is_empty(picture, (30, 0, 372, 150))


def test_a_card_shows_the_largest_multipliers():
    multipliers = dict.fromkeys(LONG, 0.0)
    largest = {LONG[i]: x for i, x in ((3, 0.2), (7, -1.0), (8, 0.5), (11, 0.3), (19, -0.4))}
    assert list(card_images._most(multipliers | largest).items()) == list(largest.items())
    six = dict(list(multipliers.items())[:6])
    assert card_images._most(six) == six


def test_card_bytes_follow_the_merge():
    first = lora_picture("mix", 0, 2, 8, {"a": 1.0, "b": -0.5})
    assert first == lora_picture("mix", 0, 2, 8, {"a": 1.0, "b": -0.5})
    others = [
        lora_picture("max", 0, 2, 8, {"a": 1.0, "b": -0.5}),
        lora_picture("mix", 1, 2, 8, {"a": 1.0, "b": -0.5}),
        lora_picture("mix", 0, 3, 8, {"a": 1.0, "b": -0.5}),
        lora_picture("mix", 0, 2, 4, {"a": 1.0, "b": -0.5}),
        lora_picture("mix", 0, 2, 8, {"a": 1.0, "b": -0.6}),
    ]
    assert len({first, *others}) == 6


@pytest.fixture
def no_fonts(monkeypatch):
    monkeypatch.setattr(card_images, "_opened", lambda name, size: None)
    card_images._font.cache_clear()
    yield
    card_images._font.cache_clear()


def test_without_any_font_pillows_own_writes_what_it_can(no_fonts):
    assert image(lora_picture("模型", 0, 1, 8, {"Модель": 1.0, LONG[0]: 0.5}))


def test_an_older_pillow_has_one_small_font(no_fonts, monkeypatch):
    only = (
        ImageFont.load_default_imagefont
        if hasattr(ImageFont, "load_default_imagefont")
        else ImageFont.load_default
    )
    font = only()
    assert isinstance(font, ImageFont.ImageFont)

    def load_default():
        return font

    monkeypatch.setattr(ImageFont, "load_default", load_default)
    assert image(lora_picture("模型", 0, 1, 8, {"Модель": 1.0, LONG[0]: 0.5}))


@settings(deadline=None, max_examples=20)
@given(name=st.text(), multiplier=st.floats(-1e6, 1e6))
def test_any_name_and_multiplier_make_a_picture(name, multiplier):
    assert image(lora_picture(name, 0, 1, 8, {name: multiplier}))
    assert image(hyper_model_picture(name, [name]))
