"""Pages and the ways between them, text by text."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from small_shop import CHAIR, LAMP, MUGS, SHOE, TRAIL_SHOE, write_shop

from mem1.envs.webshop.shop import open_shop
from mem1.envs.webshop.shop_visit import ShopVisit, parse_action

TOP = "Instruction: [SEP] find it [SEP] Back to Search"


@pytest.fixture
def visit(folder: Path) -> ShopVisit:
    return ShopVisit(open_shop(folder), "find it")


def walk(visit: ShopVisit, *actions: str) -> str:
    """What is seen after actions that are all possible."""
    for action in actions:
        assert visit.act(action), action
    return visit.page.observation


def listed(asins: tuple[str, ...]) -> str:
    return "".join(f" [SEP] {asin} [SEP] Plain Mug {asin[-2:]} [SEP] $12.0" for asin in asins)


def test_start(visit: ShopVisit) -> None:
    assert visit.page.observation == (
        "WebShop [SEP] Instruction: [SEP] find it [SEP] Search\nAvailable actions: search[<content>]"
    )


def test_results(visit: ShopVisit) -> None:
    assert walk(visit, "search[mug]") == (
        f"{TOP} [SEP] Page 1 (Total results: 50) [SEP] Next >{listed(MUGS[:10])}\n"
        "Available actions: click[back to search], click[next >], "
        + ", ".join(f"click[{asin.lower()}]" for asin in MUGS[:10])
    )
    assert walk(visit, "click[next >]", "click[next >]") == (
        f"{TOP} [SEP] Page 3 (Total results: 50) [SEP] < Prev [SEP] Next >{listed(MUGS[20:30])}\n"
        "Available actions: click[back to search], click[< prev], click[next >], "
        + ", ".join(f"click[{asin.lower()}]" for asin in MUGS[20:30])
    )
    assert walk(visit, "click[< prev]").startswith(f"{TOP} [SEP] Page 2 ")


def test_pages_behind_the_last_are_empty(visit: ShopVisit) -> None:
    assert walk(visit, "search[shoes]", "click[next >]") == (
        f"{TOP} [SEP] Page 2 (Total results: 2) [SEP] < Prev [SEP] Next >\n"
        "Available actions: click[back to search], click[< prev], click[next >]"
    )


def test_no_results(visit: ShopVisit) -> None:
    assert walk(visit, "search[zebra]") == (
        f"{TOP} [SEP] Page 1 (Total results: 0) [SEP] Next >\n"
        "Available actions: click[back to search], click[next >]"
    )


def test_item(visit: ShopVisit) -> None:
    shown = walk(visit, "search[swift]", f"click[{SHOE}]")
    assert shown == (
        f"{TOP} [SEP] < Prev [SEP] color [SEP] red [SEP] navy blue [SEP] size [SEP] 7 [SEP] 8 | 9 [SEP] "
        "Swift Running Shoes [SEP] Price: $45.0 [SEP] Rating: N.A. [SEP] Description [SEP] Features [SEP] "
        "Reviews [SEP] Buy Now\n"
        "Available actions: click[back to search], click[< prev], click[description], click[features], "
        "click[reviews], click[buy now], click[red], click[navy blue], click[7], click[8 | 9]"
    )
    assert walk(visit, "click[red]") == shown
    assert visit.chosen == {"color": "red"}
    walk(visit, "click[8 | 9]", "click[Navy Blue]")
    assert visit.chosen == {"color": "navy blue", "size": "8 | 9"}


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("description", " [SEP] Light shoes for long runs. Quick dry."),
        ("features", " [SEP] Rubber sole [SEP] Machine washable"),
        ("reviews", ""),
    ],
)
def test_sub_pages(visit: ShopVisit, name: str, texts: str) -> None:
    item = walk(visit, "search[swift]", f"click[{SHOE}]", "click[red]")
    assert walk(visit, f"click[{name}]") == (
        f"{TOP} [SEP] < Prev{texts}\nAvailable actions: click[back to search], click[< prev]"
    )
    assert walk(visit, "click[< prev]") == item
    assert visit.chosen == {"color": "red"}


def test_an_empty_description_is_no_text(visit: ShopVisit) -> None:
    assert walk(visit, "search[trail]", f"click[{TRAIL_SHOE}]", "click[description]").startswith(
        f"{TOP} [SEP] < Prev\n"
    )


def test_the_way_back_forgets_options(visit: ShopVisit) -> None:
    results = walk(visit, "search[mug]", "click[next >]")
    walk(visit, f"click[{MUGS[12]}]")
    assert walk(visit, "click[< prev]") == results
    walk(visit, "click[back to search]", "search[swift]", f"click[{SHOE}]", "click[red]", "click[< prev]")
    assert visit.chosen == {}
    walk(visit, f"click[{SHOE}]", "click[red]", "click[features]", "click[back to search]")
    assert (visit.place, visit.chosen) == ("start", {})


def test_purchase(visit: ShopVisit) -> None:
    walk(visit, "search[swift]", f"click[{SHOE}]", "click[red]", "click[buy now]")
    assert (visit.place, visit.product.asin, visit.chosen) == ("bought", SHOE, {"color": "red"})


def test_buttons_go_before_options_and_the_last_of_two_equal_values_counts(visit: ShopVisit) -> None:
    shown = walk(visit, "search[garden]", f"click[{CHAIR}]")
    assert shown.endswith(
        "click[reviews], click[buy now], click[oak], click[black], click[a[1]]"  # each once
    )
    walk(visit, "click[black]")
    assert visit.chosen == {"seat": "black"}
    assert not visit.act("click[a[1]]")  # the original's pattern reads "click[a" and "1]"
    walk(visit, "click[buy now]")
    assert visit.place == "bought"


ITEM = ("search[swift]", f"click[{SHOE}]")


@pytest.mark.parametrize(
    ("before", "action"),
    [
        ((), "click[search]"),
        ((), "click[back to search]"),
        ((), f"click[{SHOE}]"),
        ((), "search[]"),
        ((), "search[ ]"),
        ((), "search"),
        ((), "swift"),
        ((), "look[swift]"),
        ((), "search[swift"),
        ((), "search\n[swift]"),
        ((), ""),
        (("search[swift]",), "search[mug]"),  # on the start page only
        (("search[swift]",), f"click[{LAMP}]"),  # not among the results
        (("search[swift]",), "click[< prev]"),  # page 1
        (("search[mug]",), f"click[{MUGS[10]}]"),  # on page 2
        (("search[swift]",), "click[buy now]"),
        (("search[swift]",), "click[red]"),
        (ITEM, "search[mug]"),
        (ITEM, "click[green]"),
        (ITEM, "click[next >]"),
        (ITEM, f"click[{SHOE}]"),
        ((*ITEM, "click[features]"), "click[features]"),
        ((*ITEM, "click[features]"), "click[buy now]"),
        ((*ITEM, "click[features]"), "click[red]"),
    ],
)
def test_what_is_impossible_changes_nothing(visit: ShopVisit, before: tuple[str, ...], action: str) -> None:
    shown = walk(visit, *before)
    place = visit.place
    assert not visit.act(action)
    assert (visit.place, visit.page.observation, visit.chosen) == (place, shown, {})


@pytest.mark.parametrize(
    "action",
    ["SEARCH[Swift]", "  search[ swift ]\n", "search [swift]", "search[swift] please", "search[swift]]"],
)
def test_case_and_blanks_do_not_matter(visit: ShopVisit, action: str) -> None:
    assert walk(visit, action).startswith(f"{TOP} [SEP] Page 1 (Total results: 1) [SEP] Next > [SEP] {SHOE}")


def test_actions_are_read_as_the_originals_pattern_reads_them() -> None:
    draw = random.Random(0)
    for _ in range(20_000):
        text = "".join(draw.choices("[[]]ab\n\r ", k=draw.randint(0, 9)))
        found = re.match(r"(.+)\[(.+)\]", text.strip())
        expected = tuple(part.strip().lower() for part in found.groups()) if found else ("", "")
        assert parse_action(text) == expected, repr(text)


def test_one_shop_for_a_folder_and_a_seed(folder: Path, tmp_path: Path) -> None:
    assert open_shop(folder) is open_shop(str(folder), 0)
    assert open_shop(folder, 1) is not open_shop(folder)
    assert open_shop(write_shop(tmp_path)) is not open_shop(folder)
