"""The reward, by hand, from the original's definition; and the nouns that it depends on."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from small_shop import product

from mem1.checks import InputError
from mem1.envs.webshop.catalogue import Product
from mem1.envs.webshop.goals import Goal
from mem1.envs.webshop.purchase_reward import (
    COLOURS,
    PurchaseReward,
    normalize_colour,
    purchase_reward,
    title_score,
    type_reward,
)
from mem1.envs.webshop.title_nouns import find_tagger

TEA = ("tea tree", "essential oils", "natural ingredients")


def goal(
    wanted: Product | None = None,
    attributes: tuple[str, ...] = TEA,
    options: tuple[tuple[str, str], ...] = (("color", "grey"), ("size", "xl")),
    bound: float = 40.0,
) -> Goal:
    return Goal(0, "", wanted or product(), attributes, options, bound)


def matched(attribute: str, **bought: Any) -> bool:
    """Whether a product has an attribute."""
    return purchase_reward(goal(attributes=(attribute,)), product(**bought), ()).r_att == 1.0


def chosen(wanted: tuple[str, str], *values: str) -> bool:
    """Whether a choice has an option."""
    return purchase_reward(goal(options=(wanted,)), product(), values).r_option == 1.0


def test_the_right_product_with_the_right_options() -> None:
    bought = product(attributes=("tea tree", "essential oil", "natural ingredients"))
    # 1 * (3 attributes + 2 options + 1 price) / (3 + 2 + 1)
    assert purchase_reward(goal(), bought, ["xl", "grey"]) == PurchaseReward(1.0, 1.0, 1.0, 1.0, 1.0)


def test_what_is_missing_lowers_the_reward() -> None:
    bought = product(description="Best shampoo on the market, made with Natural Ingredients", price=35.0)
    # 1 * (1 attribute + 2 options + 1) / 6
    assert purchase_reward(goal(), bought, ["grey", "xl"]).reward == pytest.approx(4 / 6)
    # Three options wanted, two of them chosen: (1 + 2 + 1) / 7
    three = (("amount", "pack of 12"), ("color", "grey"), ("size", "xl"))
    assert purchase_reward(goal(options=three), bought, ["grey", "xl"]).reward == pytest.approx(4 / 7)
    # No options chosen: (1 + 0 + 1) / 6; too dear besides: (1 + 0 + 0) / 6
    assert purchase_reward(goal(), bought, []).reward == pytest.approx(2 / 6)
    assert purchase_reward(goal(bound=30.0), bought, []) == PurchaseReward(
        *(pytest.approx(1 / 6), 1.0, pytest.approx(1 / 3), 0.0, 0.0)
    )
    # Another kind of product, with a title score of 0.2: half of (1 + 2 + 1) / 7
    other = goal(
        product(nouns=("a", "b", "c", "d", "shoe"), query="q", categories=frozenset("axy")), options=three
    )
    assert purchase_reward(other, bought, ["grey", "xl"]).reward == pytest.approx(2 / 7)


def test_the_price_may_be_the_bound() -> None:
    assert purchase_reward(goal(bound=35.0), product(price=35.0), ()).r_price == 1.0
    assert purchase_reward(goal(bound=35.0), product(price=35.01), ()).r_price == 0.0


def test_without_options_none_is_missing() -> None:
    # (0 attributes + 0 options + 1) / (1 + 0 + 1)
    result = purchase_reward(goal(attributes=("vegan",), options=()), product(), ["red"])
    assert result == PurchaseReward(0.5, 1.0, 0.0, 1.0, 1.0)


# ------------------------------------------------------------------------------------------------- attributes


@pytest.mark.parametrize(
    ("known", "wanted", "expected"),
    [
        ("essential oil", "essential oils", True),  # 2 * 13 of 13 + 14 letters: 96
        ("long lasting color", "color", True),  # all words of one are in the other: 100
        ("Natural-Ingredients!", "natural ingredients", True),  # only letters and digits count, in any case
        ("naturalé ingredients", "natural ingredients", True),  # Latin-1 letters are dropped, as thefuzz does
        ("tea bag", "tea tree", False),  # the best of "tea" to "tea bag" (60), "tea tree" (55), both (67)
        ("abcdefg", "abcdefx", True),  # 2 * 6 of 14: 85.7, rounded to 86
        ("a" * 29 + "b" * 5, "a" * 29 + "c" * 5, False),  # 2 * 29 of 68: 85.3, rounded to 85
        ("!", "!", False),  # nothing is left of it
    ],
)
def test_attributes_that_are_alike(known: str, wanted: str, expected: bool) -> None:
    assert matched(wanted, attributes=("other", known)) is expected


def test_attributes_that_are_in_the_texts() -> None:
    assert matched("usb c", title="Cable with USB C")
    assert matched("usb c", description="for USB C only")
    assert matched("usb c", bullet_points=("Fast", "USB", "C plug"))  # joined by a blank
    assert not matched("usb c", title="USB", description="C", bullet_points=("USB-C",))


# ---------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("wanted", "value", "expected"),
    [
        (("color", "grey"), "grey", True),
        (("color", "navy blue"), "dark sky-blue", True),  # both are "blue"
        (("color", "red"), "blue", False),
        (("color", "black2070"), "black2070", True),  # both are "black"
        (("color", "black white"), "white", False),  # "black" and "white"
        (("size", "standard"), "standard", True),  # both are "tan", as odd as that is
        (("size", "standard"), "double", False),
        (("size", "7.5 wide"), "7.5 wide", True),
        (("size", "x-large"), "large", True),  # all its words are in "size x-large"
        # "large" to "large x" 83, to "large size" 67, these two 71 of 100.
        (("size", "large"), "x-large", False),
        (
            ("flavor name", "mango"),
            "mango chili",
            False,
        ),  # "mango" to "chili mango" 62, to "flavor mango name" 45
        (("amount", "pack of 12"), "pack of 12", True),
    ],
)
def test_options(wanted: tuple[str, str], value: str, expected: bool) -> None:
    assert chosen(wanted, "zzz", value) is expected


def test_nothing_chosen() -> None:
    assert not chosen(("color", "grey"))


def test_colours() -> None:
    assert len(COLOURS) == len({*COLOURS}) == 102 and [*COLOURS] == sorted(COLOURS)
    assert normalize_colour("navy blue") == "blue"
    assert normalize_colour("dark red") == "dark"
    assert normalize_colour("cashmere") == "ash"
    assert normalize_colour("xl") == "xl"


# --------------------------------------------------------------------------------------------------- the type


@pytest.mark.parametrize(
    ("wanted", "bought", "score"),
    [
        (("shoe", "sole"), ("sole", "lace"), 1 / 2),
        (("bar", "cord", "bar"), ("bar",), 1 / 3),  # a repeated noun counts among all, but is found once
        (("shoe",), (), 0.0),
        ((), ("shoe",), 0.2),
    ],
)
def test_title_score(wanted: tuple[str, ...], bought: tuple[str, ...], score: float) -> None:
    assert title_score(wanted, bought) == pytest.approx(score)


TEN = tuple("abcdefghij")


@pytest.mark.parametrize(
    ("changes", "nouns", "expected"),
    [
        ({}, ("shoe",), 1.0),
        ({}, TEN[:2], 0.0),  # nothing in common in the titles, whatever else agrees
        ({"query": "q"}, ("shoe",), 1.0),
        ({"query": "q", "categories": frozenset("cxa")}, ("shoe", *TEN[:4]), 1.0),  # 0.2, two parts
        ({"query": "q", "categories": frozenset("xyc")}, ("shoe", *TEN[:4]), 0.5),  # 0.2, one part
        ({"query": "q", "categories": frozenset("xyc")}, ("shoe", *TEN[:3]), 1.0),  # 0.25
        ({"query": "q", "categories": frozenset()}, ("shoe", *TEN[:9]), 0.5),  # 0.1 is not below 0.1
        ({}, ("shoe", *TEN), 0.1),  # 1 / 11, though query and categories agree
        ({"query": "q", "categories": frozenset()}, ("shoe", *TEN), 0.1),
        ({}, (), 1.0),  # 0.2 without nouns
        ({"query": "q", "categories": frozenset()}, (), 0.5),
    ],
)
def test_type(changes: dict[str, Any], nouns: tuple[str, ...], expected: float) -> None:
    assert type_reward(product(nouns=nouns, **changes), product()) == expected


# -------------------------------------------------------------------------------------------------- the nouns

SNEAKERS = "Mens D.O.N. Issue 2 Gca Basketball Sneakers Shoes Casual - Off White"
PEAK = (
    "PEAK High Top Mens Basketball Shoes Lou Williams Streetball Master Breathable Non Slip Outdoor Sneakers"
)
BAR = "Saireed UL Listed 2 Prong Power Cord for JBL Bar 3.1 Bar 2.1 Channel 4K Ultra HD Soundbar"
CORD = (
    "BRST AC Power Cord Outlet Socket Cable Plug Lead for Panasonic SC-HT830V DVD/VCR Combo "
    "Home Theater System"
)
KNOB = "Rusticware 921ORB Kitchen and Bath Cabinet Knob"
TWEEZERS = (
    "Minkissy 2pcs Stainless Steel Eyebrow Tweezers Blackhead Acne Remover Portable Makeup Tweezers (Silver)"
)


@pytest.fixture
def no_spacy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)


@pytest.mark.usefixtures("no_spacy")
@pytest.mark.parametrize(
    ("wanted", "bought", "score"),
    [  # the original's tests expect 0.333, 0.3, 0.15 and less than 0.05 of spaCy's model
        (SNEAKERS, PEAK, 4 / 9),
        (f"{BAR} Home Theater System Subwoofer", CORD, 5 / 17),
        (BAR, CORD, 2 / 13),
        (KNOB, TWEEZERS, 0.0),
    ],
)
def test_titles_by_textblob(wanted: str, bought: str, score: float) -> None:
    tagger = find_tagger()
    assert tagger.name == "textblob PatternTagger"
    assert title_score(tagger.nouns(wanted), tagger.nouns(bought)) == pytest.approx(score)


@pytest.mark.usefixtures("no_spacy")
@pytest.mark.parametrize("title", ["", " ", "/", "\x00", "\n\n"])
def test_titles_without_nouns(title: str) -> None:
    assert len(find_tagger().nouns(title)) <= 1


def stub_spacy(monkeypatch: pytest.MonkeyPatch, has_model: bool) -> None:
    def load(model: str, disable: list[str]) -> Any:
        assert model == "en_core_web_sm"
        parts = {"Reading": "PROPN", "Lamp": "NOUN", "for": "ADP"}
        return lambda title: [SimpleNamespace(text=word, pos_=parts[word]) for word in title.split()]

    utilities = SimpleNamespace(is_package=lambda model: has_model and model == "en_core_web_sm")
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(util=utilities, load=load))


def test_spacys_model_goes_first_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_spacy(monkeypatch, has_model=True)
    tagger = find_tagger()
    assert tagger.name == "spacy en_core_web_sm"
    assert tagger.nouns("Lamp for Reading Lamp") == ("lamp", "reading", "lamp")


def test_spacy_without_its_model_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_spacy(monkeypatch, has_model=False)
    assert find_tagger().name == "textblob PatternTagger"


@pytest.mark.usefixtures("no_spacy")
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textblob.en.taggers", None)
    with pytest.raises(
        InputError, match=r"expected the package textblob.*pip install 'mem1_core\[webshop\]'"
    ):
        find_tagger()
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    with pytest.raises(InputError, match="expected the package rapidfuzz"):
        purchase_reward(goal(), product(), ["red"])
