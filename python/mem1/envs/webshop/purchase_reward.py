"""What a purchase is worth: the original's reward, from 0 to 1.

    reward = r_type * (attributes matched + options matched + price kept) / (attributes + options + 1)

Texts match where RapidFuzz's `token_set_ratio`, rounded, is over 85 of 100.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from mem1.envs.webshop.catalogue import Product
from mem1.envs.webshop.goals import Goal
from mem1.extras import extra

_ALIKE = 85  # of 100
COLOURS = tuple(
    "alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy "
    "camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral "
    "cranberry cream crystal dark denim eggplant elephant espresso fuchsia gold granite grape graphite grass "
    "gray green grey heather indigo ivory ivy khaki lavender lemon leopard light lilac lime magenta maroon "
    "mauve merlot midnight mint mocha multicolor mushroom mustard natural navy nude olive orange peach "
    "pewter pink plum purple rainbow red rose royal rust sand sapphire seashell silver skull slate steel "
    "stone stonewash sunflower tan taupe teal tiger turquoise violet walnut wheat white wine yellow".split()
)
_LATIN_1 = dict.fromkeys(range(128, 256))  # dropped before texts are compared, as thefuzz does


class PurchaseReward(NamedTuple):
    """reward, and what it is made of, each from 0 to 1.

    r_type: whether it is the right kind of product. r_att, r_option: shares of the attributes and options
    asked for that match (r_option is 1 where none is asked for). r_price: 1 unless the price is above the
    bound.
    """

    reward: float = 0.0
    r_type: float = 0.0
    r_att: float = 0.0
    r_option: float = 0.0
    r_price: float = 0.0


def purchase_reward(goal: Goal, bought: Product, chosen: Collection[str]) -> PurchaseReward:
    """The reward for buying `bought` with the option values `chosen`. Raises InputError without RapidFuzz."""
    attributes = sum(_has_attribute(bought, wanted) for wanted in goal.attributes)
    options = sum(_is_chosen(*wanted, chosen) for wanted in goal.options)
    price = bought.price <= goal.price_bound
    share = (attributes + options + price) / (len(goal.attributes) + len(goal.options) + 1)
    r_type = type_reward(goal.product, bought)
    return PurchaseReward(
        reward=share * r_type,
        r_type=r_type,
        r_att=attributes / len(goal.attributes),
        r_option=options / len(goal.options) if goal.options else 1.0,
        r_price=float(price),
    )


def type_reward(wanted: Product, bought: Product) -> float:
    """1 for a product of the same kind: the same query, two parts of the category in common, or a title score
    above 0.2. Else 0.5. Whatever agrees, 0.1 for a title score below 0.1, and 0 for one of 0.
    """
    score = title_score(wanted.nouns, bought.nouns)
    if score == 0.0:
        return 0.0
    if score < 0.1:
        return 0.1
    same = wanted.query == bought.query or len(wanted.categories & bought.categories) >= 2 or score > 0.2
    return 1.0 if same else 0.5


def title_score(wanted: Collection[str], bought: Iterable[str]) -> float:
    """Different nouns of the wanted title that the bought one has as well, by the number of all its nouns;
    as in the original, repeated ones count in the latter only. 0.2 for a title without nouns.
    """
    return len({*wanted} & {*bought}) / len(wanted) if wanted else 0.2


def normalize_colour(text: str) -> str:
    """The first of COLOURS, in their order, that occurs in `text`, be it inside of a word; else `text`."""
    return next((colour for colour in COLOURS if colour in text), text)


def _has_attribute(product: Product, wanted: str) -> bool:
    if any(_alike(known, wanted) for known in product.attributes):
        return True
    texts = (product.title, " ".join(product.bullet_points), product.description)
    return any(wanted in text.lower() for text in texts)


def _is_chosen(name: str, value: str, chosen: Collection[str]) -> bool:
    """Whether one of the chosen values is like the wanted pair, read as "name value".

    The original's code reduces the pair only where its name or its value is a colour and nothing else. Taken
    so, 458 of the 6,910 goals could not be fulfilled: "black2070", once chosen, becomes "black", which is not
    like "color black2070".
    """
    wanted = normalize_colour(f"{name} {value}")
    return any(_alike(normalize_colour(one), wanted) for one in chosen)


def _alike(one: str, other: str) -> bool:
    with extra("webshop", "webshop"):
        from rapidfuzz import fuzz, utils
    plain = (utils.default_process(text.translate(_LATIN_1)) for text in (one, other))
    return round(fuzz.token_set_ratio(*plain)) > _ALIKE
