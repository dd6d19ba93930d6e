"""Products as they are read: cleaned like the original's, and malformed rows named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_shop import CHAIR, LAMP, MUGS, SHOE, TRAIL_SHOE, notes, row, rows, write_shop

from mem1.checks import InputError
from mem1.envs.webshop.catalogue import INSTRUCTIONS, PRODUCTS, Product, read_products
from mem1.envs.webshop.title_nouns import TitleTagger

LAST_WORD = TitleTagger("last word", lambda title: (title.split()[-1].lower(),))


def read(folder: Path, seed: int = 0) -> dict[str, Product]:
    return read_products(folder, seed, LAST_WORD)


def test_products_in_the_order_of_the_file(folder: Path) -> None:
    assert list(read(folder)) == [SHOE, TRAIL_SHOE, LAMP, CHAIR, *MUGS]


def test_a_product(folder: Path) -> None:
    shoe = read(folder)[SHOE]
    assert shoe.title == "Swift Running Shoes" and shoe.nouns == ("shoes",)
    assert shoe.query == "running shoes"
    assert shoe.categories == {"Clothing", "Women", "Shoes"}
    assert shoe.bullet_points == ("Rubber sole", "Machine washable")
    assert shoe.options == {"color": ("red", "navy blue"), "size": ("7", "8 | 9")}
    assert (shoe.price, shoe.price_tag) == (45.0, "$45.0")
    assert shoe.attributes == ("rubber sole", "machine washable", "long lasting")
    assert shoe.instruction_attributes == ("rubber sole", "quick dry")
    assert shoe.document == (
        "swift running shoes light shoes for long runs. quick dry. rubber sole "
        "color: red, navy blue, and size: 7, 8 | 9"
    )


def test_what_is_left_out_or_written_as_a_literal(folder: Path) -> None:
    products = read(folder)
    lamp, mug = products[LAMP], products[MUGS[1]]
    assert lamp.options == {"style": ("desk",)}  # the text of a table; a name without values has none
    assert lamp.attributes == ("easy clean",)  # the text of a list
    assert lamp.bullet_points == ("One bullet point, as a text",)
    assert (lamp.price, lamp.price_tag) == (100.0, "$100.0")  # without a price
    assert (mug.options, mug.attributes, mug.instruction) == ({}, (), None)


@pytest.mark.parametrize(
    ("pricing", "least", "greatest", "tag"),
    [
        ("$1,250.50", 1250.5, 1250.5, "$1250.5"),
        ("$19.99 - $27.99", 19.99, 27.99, "$19.99 to $27.99"),
        ("$1.00 - $2.00 - $3.00", 1.0, 2.0, "$1.0 to $2.0"),
        (None, 100.0, 100.0, "$100.0"),
    ],
)
def test_prices(tmp_path: Path, pricing: str | None, least: float, greatest: float, tag: str) -> None:
    write_shop(tmp_path, [row(SHOE, "Shoes", pricing=pricing)], {})
    prices = [read(tmp_path, seed)[SHOE].price for seed in range(20)]
    assert all(least <= price <= greatest for price in prices)
    assert len(set(prices)) == (1 if least == greatest else 20)
    assert read(tmp_path)[SHOE].price_tag == tag
    assert read(tmp_path, 7)[SHOE].price == prices[7]


def test_a_drawn_price_is_that_of_the_product_whatever_else_is_sold(tmp_path: Path) -> None:
    trail = rows()[1]
    prices = [
        read(write_shop(tmp_path / name, products))[TRAIL_SHOE].price
        for name, products in (("alone", [trail]), ("all", rows()), ("reversed", rows()[::-1]))
    ]
    assert len(set(prices)) == 1


def test_ids_that_the_original_leaves_out(tmp_path: Path) -> None:
    products = [row("nan", "A"), row("B0123456789", "B"), row(SHOE, "C"), row(SHOE, "D")]
    (only,) = read(write_shop(tmp_path, products)).values()
    assert only.title == "C"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, "name: expected a text, got None"),
        ({"asin": 7}, "asin: expected a text, got 7"),
        ({"full_description": ["x"]}, "full_description: expected a text"),
        ({"small_description": {"x": 1}}, "small_description: expected a list of texts"),
        ({"small_description": ["x", 1]}, "small_description: expected a list of texts"),
        ({"pricing": "12.00"}, "pricing: expected '$x'"),
        ({"pricing": "$x"}, "pricing: expected '$x'"),
        ({"pricing": "$1.2.3"}, "pricing: expected '$x'"),
        ({"pricing": 12}, "pricing: expected '$x'"),
        ({"customization_options": "{'Color': ["}, "customization_options: expected a Python literal"),
        ({"customization_options": "__import__('os')"}, "customization_options: expected a Python literal"),
        ({"customization_options": "['red']"}, "customization_options: expected an object"),
        ({"customization_options": {"Color": ["red"]}}, "customization_options: expected an object"),
        ({"customization_options": {"Color": [{"value": 1}]}}, "customization_options: expected an object"),
    ],
)
def test_a_malformed_product_is_named_by_file_and_row(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    products = rows()
    products[1] |= changes
    with pytest.raises(InputError) as caught:
        read(write_shop(tmp_path, products))
    assert f"{tmp_path / PRODUCTS}: row 2: {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attributes": "rubber sole"}, "attributes: expected a Python literal"),
        ({"attributes": [1]}, "attributes: expected a list of texts"),
        ({"instruction": 3}, "instruction: expected a text"),
        ({"instruction_attributes": []}, "instruction_attributes: expected at least one"),
    ],
)
def test_malformed_notes_are_named_by_file_and_product(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    described = notes()
    described[SHOE] |= changes
    with pytest.raises(InputError) as caught:
        read(write_shop(tmp_path, described=described))
    assert f"{tmp_path / INSTRUCTIONS}: {SHOE}: {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (PRODUCTS, None, "expected a file that can be read"),
        (INSTRUCTIONS, None, f"path: expected a file that can be read, got '.*{INSTRUCTIONS}'"),
        (PRODUCTS, "{}", "expected a list of objects"),
        (PRODUCTS, "[]", "expected at least one product"),
        (INSTRUCTIONS, "[]", "expected an object by product ids"),
        (INSTRUCTIONS, json.dumps({SHOE: []}), f"{SHOE}: expected an object"),
        (INSTRUCTIONS, "{", "expected JSON"),
        (INSTRUCTIONS, "\udcff", "expected JSON"),
    ],
)
def test_files_that_are_none(tmp_path: Path, file: str, text: str | None, message: str) -> None:
    path = write_shop(tmp_path) / file
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message):
        read(tmp_path)
