"""Names made of other names: legal everywhere, distinct even without case, the same each time."""

import re
import unicodedata

import pytest
from host_prompts import a1111
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hyper_merge.loras.prompt_tags import format_tag
from hyper_merge.runtime.names import (
    distinct_words,
    file_stem,
    is_reserved,
    name_key,
    one_line,
    prompt_word,
    unique_name,
)

# Microsoft, "Naming Files, Paths, and Namespaces".
DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
TEXTS = st.lists(st.text(max_size=80), max_size=8)


def same_on_windows_or_macos(one, other):
    return unicodedata.normalize("NFC", one).lower() == unicodedata.normalize("NFC", other).lower()


@given(TEXTS)
@example(["写实人像_v2", "动漫风_v2", "风景画_v2", "水彩_v2"])
@example(["a" * 60 + "1", "a" * 60 + "2", "A" * 70])
@example(["v2", "V2", "v2-2", "v2 (2)", "v2 [2]"])
@example(["e\u0301", "\u00e9", "\u00c9"])
@example(["stra\u00dfe", "STRASSE"])
def test_words_of_many_names_are_all_different(texts):
    words = distinct_words(texts)
    assert len({name_key(word) for word in words}) == len(words) == len(texts)
    assert not any(
        same_on_windows_or_macos(one, other) for i, one in enumerate(words) for other in words[:i]
    )


@given(st.text(max_size=300), st.integers(20, 200))
@example("CON", 60)
@example("nul.tar", 60)
@example("com¹.x", 60)
@example("name. . ", 60)
@example("a\ud800b", 60)
def test_a_stem_is_a_file_on_every_system(text, longest):
    for stem in (file_stem(text, longest), prompt_word(text, longest)):
        assert not re.search(r'[<>:"/\\|?*\x00-\x1f]', stem)
        assert stem
        assert stem == stem.rstrip(" .").lstrip(" ")
        assert not DEVICE.fullmatch(stem)
        assert len(stem.encode()) <= longest + len("checkpoint-")


def test_plain_name_keeps_its_word_in_any_order():
    assert distinct_words(["v2!", "v2", "V2"]) == ("v2-3", "v2", "V2-2")


def test_letters_of_all_scripts_stay():
    for name in ("写实人像_v2", "Портрет v3", "हिन्दी", "ภาพ-1", "Ærø"):
        assert prompt_word(name) == file_stem(name) == unicodedata.normalize("NFC", name)


def test_long_name_of_wide_letters_is_shortened():
    word = prompt_word("写" * 200, 60)
    assert word == "写" * 20


def test_the_usual_ascii_names_are_what_they_were():
    assert prompt_word("photon_v1.5 + LCM-x") == "photon_v1.5 + LCM-x"
    assert prompt_word("My Model [v2]__final") == "My Model -v2-_final"
    assert file_stem("My Model [v2]__final, 'new'") == "My Model [v2]__final, 'new'"


@pytest.mark.parametrize("name", ["con", "NUL.x", "LPT9", "com1 .safetensors", "COM²"])
def test_names_of_windows_devices_are_known(name):
    assert is_reserved(name)
    assert not is_reserved(f"x{name}")


def test_taken_name_gets_the_first_free_number():
    taken = {"a", "a-2", "a-4"}
    assert unique_name("a", taken.__contains__) == "a-3"
    assert unique_name("b", taken.__contains__) == "b"


@given(st.text(), st.text())
@example("a\nb", "a\\nb")
def test_names_on_one_line_stay_apart(one, other):
    assert one_line(one).isprintable()
    assert (one_line(one) == one_line(other)) == (one == other)


@settings(max_examples=200)
@given(st.text(max_size=150), st.integers(1, 100))
def test_any_text_becomes_a_safe_prompt_word(text, longest):
    word = prompt_word(text, longest)
    assert not re.search(r"[^\w._ +-]", word, re.ASCII) or not word.isascii()
    assert not set(word) & set('<>:"/\\|?*=#,{}[]()^\n')
    assert len(word.encode()) <= max(longest, len("checkpoint")) + len("checkpoint-")
    assert "__" not in word
    assert not word.endswith((" ", ".", "_"))
    assert a1111(format_tag(f"mix_{word}", 1)) == [(f"mix_{word}", 1.0, 1.0)]
    assert prompt_word(word) == word


def test_a_plain_name_stays_as_it_is():
    assert prompt_word("photon_v1.5 + LCM-x") == "photon_v1.5 + LCM-x"
    assert prompt_word("__ <日本> __") == "日本"
    assert prompt_word("__ <!> __") == "checkpoint"
