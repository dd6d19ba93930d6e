"""A shop by hand: two pairs of shoes, a lamp, a chair and 55 mugs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mem1.envs.webshop.catalogue import INSTRUCTIONS, PRODUCTS, Product

SHOE, TRAIL_SHOE, LAMP, CHAIR = "B0SHOE0001", "B0SHOE0002", "B0LAMP0001", "B0CHAIR001"
MUGS = tuple(f"B0MUG{number:05}" for number in range(55))


def choices(*values: str) -> list[dict[str, Any]]:
    """The values of an option, as the data has them."""
    return [{"value": value, "is_selected": False} for value in values]


def row(asin: str, name: str, **changes: Any) -> dict[str, Any]:
    """A product of `items_shuffle_1000.json`."""
    return {
        "asin": asin,
        "name": name,
        "full_description": "",
        "small_description": [f"{name}, new"],
        "customization_options": "",
        "pricing": "$12.00",
        "product_category": "Home › Kitchen › Mugs",
        "query": "mugs",
        "category": "home",
        "images": ["x.jpg"],
        "average_rating": 4.5,
        "page": 1,
    } | changes


def rows() -> list[dict[str, Any]]:
    """A fresh copy of all products."""
    shoe = row(
        SHOE,
        "Swift Running Shoes",
        full_description="Light shoes for long runs. Quick dry.",
        small_description=["Rubber sole", "Machine washable"],
        customization_options={
            "Color": choices("Red", "Navy Blue"),
            "Size": choices("7", " 8/9 "),
            "Fit": None,
        },
        pricing="$45.00",
        product_category="Clothing › Women › Shoes",
        query="Running Shoes ",
    )
    trail = row(
        TRAIL_SHOE,
        "Granite Trail Shoes",
        pricing="$19.99 - $27.99",
        product_category="Clothing › Men › Shoes",
        query="running shoes",
    )
    lamp = row(
        LAMP,
        "Reading Lamp",
        small_description="One bullet point, as a text",
        customization_options="{'Style': [{'value': 'Desk'}], 'Color': None}",
        pricing="",
        product_category="Home › Lighting › Lamps",
        query="lamps",
    )
    chair = row(
        CHAIR,
        "Garden Chair",
        customization_options={"Frame": choices("Oak", "Black"), "Seat": choices("Black", "Buy Now", "A[1]")},
        pricing="$1,250.50",
        product_category="Garden › Chairs",
        query="chairs",
    )
    return [shoe, trail, lamp, chair, *(row(asin, f"Plain Mug {asin[-2:]}") for asin in MUGS)]


def notes() -> dict[str, Any]:
    """A fresh copy of `items_ins_v2_1000.json`."""
    shoe = {
        "attributes": ["rubber sole", "machine washable", "long lasting"],
        "instruction": "Find me rubber sole, quick dry running shoes",
        "instruction_attributes": ["rubber sole", "quick dry"],
    }
    lamp = {
        "attributes": "['easy clean']",
        "instruction": "Find me easy clean lamps",
        "instruction_attributes": ["easy clean"],
    }
    chair = {
        "attributes": ["solid wood"],
        "instruction": "Find me solid wood chairs",
        "instruction_attributes": ["solid wood"],
    }
    return {SHOE: shoe, LAMP: lamp, CHAIR: chair, MUGS[0]: {"attributes": []}}


def write_shop(
    folder: Path, products: list[dict[str, Any]] | None = None, described: dict[str, Any] | None = None
) -> Path:
    """Write both files; without arguments those of the shop above."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PRODUCTS).write_text(json.dumps(rows() if products is None else products))
    (folder / INSTRUCTIONS).write_text(json.dumps(notes() if described is None else described))
    return folder


def product(**changes: Any) -> Product:
    """A product without files, of which a test names what matters to it."""
    fields: dict[str, Any] = {
        "asin": "B000000001",
        "title": "",
        "description": "",
        "bullet_points": (),
        "query": "query 1",
        "categories": frozenset("abc"),
        "options": {},
        "price": 35.0,
        "price_tag": "$35.0",
        "nouns": ("shoe",),
        "attributes": (),
        "instruction": None,
        "instruction_attributes": (),
    }
    return Product(**(fields | changes))
