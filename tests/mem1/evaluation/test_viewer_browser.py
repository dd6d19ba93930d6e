"""The viewer's page in a real browser without a window."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_tokenizers import byte_level
from transformers import PreTrainedTokenizerFast
from viewer_rows import HOSTILE, THREE_TURNS, Part, make_trajectory

from mem1.evaluation.viewer.page import write_page
from mem1.trajectory import FinishReason, TokenReward, Trajectory
from mem1_core.eviction_policies import EvictionPolicy
from mem1_core.plot import _STYLE
from mem1_core.segments import Segment

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Iterator[Open]:
    """A function from trajectories to their page in the browser, which in the end has asked for nothing but
    its own file and has complained of nothing.
    """
    said, asked = list[str](), list[str]()
    path = tmp_path / "page.html"
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))

    def show(*rows: Trajectory | dict[str, Any], tokenizer: PreTrainedTokenizerFast = tokenizer) -> Any:
        plain = [row.to_dict() if isinstance(row, Trajectory) else row for row in rows]
        write_page(plain, path, tokenizer=tokenizer)
        page.goto(path.as_uri())
        return page

    yield show
    page.close()
    assert (asked, said) == ([path.as_uri()], [])


def texts(page: Any, selector: str) -> list[str]:
    return page.locator(selector).all_text_contents()


def states(page: Any, queries: str = "[query]") -> list[list[str]]:
    """For each query, how every token is shown."""
    return page.evaluate(
        """(queries) => queries.map((query) => {
            see(query);
            return [...document.querySelectorAll(".token")].map((token) =>
                token.classList.contains("unwritten") ? "unwritten" : token.closest(".part").dataset.life);
        })""",
        page.evaluate(queries),
    )


def test_turns_and_what_was_written(open_page: Open, tokenizer: PreTrainedTokenizerFast) -> None:
    page = open_page(make_trajectory(tokenizer))
    assert page.title() == "Trajectories"
    assert texts(page, ".card h3") == ["Turn 1", "Turn 2", "Turn 3"]
    kinds = ["observation" if part.kind == "info" else part.kind for part in THREE_TURNS]
    assert texts(page, ".part .kind") == kinds
    shown = [text.split() for text in texts(page, ".part .text")]
    assert shown == [part.text.lower().replace("is>", "IS>").split() for part in THREE_TURNS]


def test_turns_without_a_valid_action_are_marked(open_page: Open, tokenizer: PreTrainedTokenizerFast) -> None:
    page = open_page(make_trajectory(tokenizer, invalid_turns=[2]))
    assert texts(page, "article h3") == ["Turn 1", "Turn 2, no valid action", "Turn 3"]


@pytest.mark.parametrize("prune", ["action", "state", "never", 12, "hide_observations=1", "summary"])
def test_memory_at_every_turn(
    open_page: Open, tokenizer: PreTrainedTokenizerFast, prune: EvictionPolicy
) -> None:
    trajectory = make_trajectory(tokenizer, prune=prune)
    page = open_page(trajectory)
    visible = trajectory.mask.dense()[0].squeeze(0).tolist()
    assert states(page, "[...selected.places.keys()]") == [
        ["live" if seen else "unwritten" if token > query else "pruned" for token, seen in enumerate(row)]
        for query, row in enumerate(visible)
    ]
    counts = trajectory.mask.visible_counts()[0].tolist()
    assert page.evaluate("Array.from(selected.live)") == counts
    ends = torch.tensor([segment.length for segment in trajectory.segments]).cumsum(0).tolist()
    written = [n for n, part in enumerate(THREE_TURNS) if part.kind in ("prompt", "query", "answer")]
    page.keyboard.press("ArrowRight")
    for turn, last in reversed(list(enumerate(written))):
        query = ends[last] - 1
        assert page.evaluate("query") == query
        assert page.text_content("#live-count") == str(counts[query])
        assert page.text_content("#pruned-count") == str(query + 1 - counts[query])
        assert page.locator("[aria-current=step]").get_attribute("data-turn") == str(turn)
        page.click("#before")
    page.keyboard.press("ArrowRight")
    assert page.locator("[aria-current=step]").get_attribute("data-turn") == "1"


def test_when_it_was_pruned(open_page: Open, tokenizer: PreTrainedTokenizerFast) -> None:
    page = open_page(make_trajectory(tokenizer))
    assert texts(page, ".life") == ["live", *3 * ["pruned in turn 2"], *5 * ["live"]]
    struck = "(part) => getComputedStyle(part).textDecorationLine"
    assert page.locator("[data-life=pruned] .text").first.evaluate(struck) == "line-through"
    assert page.locator("[data-life=live] .text").first.evaluate(struck) == "none"
    page.locator("#turn").fill("2")
    assert texts(page, ".life") == [
        "live",
        *3 * ["live"],
        *2 * ["live"],
        *3 * ["not yet written"],
    ]
    page.locator('.token[data-token="30"]').click()  # memory as this token sees it
    assert page.text_content("#live-count") == str(
        make_trajectory(tokenizer).mask.visible_counts()[0, 30].item()
    )


def test_the_mask_is_drawn(open_page: Open, tokenizer: PreTrainedTokenizerFast) -> None:
    trajectory = make_trajectory(tokenizer)
    page = open_page(trajectory)
    tokens, visible = trajectory.tokens.numel(), trajectory.mask.dense()[0].squeeze(0)
    side, pixels = page.evaluate(
        """() => {
            const canvas = document.getElementById("mask");
            const pen = canvas.getContext("2d");
            const { data } = pen.getImageData(0, 0, canvas.width, canvas.width);
            const at = (token) => Math.floor(((token + 0.5) / selected.length) * canvas.width);
            const all = Array.from({ length: selected.length }, (_, token) => at(token));
            const pixel = (x, y) => [...data.subarray(4 * (y * canvas.width + x)).subarray(0, 4)];
            return [canvas.width, all.map((y) => all.map((x) => pixel(x, y)))];
        }"""
    )
    assert side > 3 * tokens  # so that the middle of a cell is neither diagonal nor line
    kinds = [segment.kind for segment in trajectory.segments for _ in range(segment.length)]
    gone = page.evaluate("themed('--pruned')")
    for query in range(tokens - 1):  # the last one is marked by a line
        for key in range(tokens):
            if key == query:
                continue
            colour = _STYLE[kinds[key]][1] if visible[query, key] else gone if key < query else None
            *rgb, alpha = pixels[query][key]
            assert alpha == (0 if colour is None else 255), (query, key)
            assert colour is None or bytes(rgb).hex() == colour[1:], (query, key)
    page.locator("#mask").click(position={"x": 3, "y": 3})
    assert page.text_content("#moment").startswith("Prompt of 3")
    assert page.text_content("#pair") == "at token 0, token 0 is live"


def test_the_curve_of_live_tokens(open_page: Open, tokenizer: PreTrainedTokenizerFast) -> None:
    trajectory = make_trajectory(tokenizer)
    page = open_page(trajectory)
    assert texts(page, "#live text") == [
        str(trajectory.peak_tokens()),
        "0",
        f"{trajectory.tokens.numel()} tokens",
    ]
    page.locator("#live").click(position={"x": 60, "y": 50})
    assert page.text_content("#moment").startswith("Prompt of 3")


def test_a_token_says_all_about_itself(open_page: Open, tokenizer: PreTrainedTokenizerFast) -> None:
    query = sum(len(part.text.split()) for part in THREE_TURNS[:2])
    page = open_page(make_trajectory(tokenizer, rewards=[TokenReward(query, 0.25), TokenReward(query, 1.0)]))
    assert texts(page, ".reward") == ["+0.25", "+1"]
    page.locator(f'.token[data-token="{query + 1}"]').hover()
    ada = tokenizer.convert_tokens_to_ids("ada")
    logprob = -(query + 1) / 8
    evict = make_trajectory(tokenizer).mask.evict_at[0, query + 1].item()
    assert texts(page, "#token dd") == [
        '" ada"',
        f"{query + 1}, id {ada}",
        "query of turn 1",
        f"{logprob:.4f} (p {math.exp(logprob):.3g})",
        f"{logprob - 1 / 64:.4f} (p {math.exp(logprob - 1 / 64):.3g})",
        "\u2013",
        f"token {evict}, in turn 2",
        "pruned",
    ]
    page.locator(f'.token[data-token="{query}"]').hover()
    assert texts(page, "#token dd")[5] == "0.25, 1"
    page.locator('.token[data-token="2"]').hover()
    assert texts(page, "#token dd")[3:5] == ["\u2013", "\u2013"]  # not the policy's
    page.select_option("#colour", "logprob")
    colour = "(token) => getComputedStyle(token).backgroundColor"
    assert page.locator('.token[data-token="2"]').evaluate(colour) == "rgba(0, 0, 0, 0)"
    assert (
        page.locator(f'.token[data-token="{query + 1}"]').evaluate(colour).startswith("rgba(214, 39, 40, 0.")
    )


def names(page: Any) -> list[str]:
    return texts(page, "#list .name")


def test_filters_search_and_order(open_page: Open, tokenizer: PreTrainedTokenizerFast) -> None:
    def row(name: str, agent: str, reward: float, query: str, **settings: Any) -> dict[str, Any]:
        parts = (THREE_TURNS[0], Part("query", 1, query), Part("info", 1, "<info> found emma </info>"))
        rewards = [TokenReward(12, reward)] if reward else []
        return make_trajectory(tokenizer, parts, task=name, rewards=rewards, **settings).to_dict() | {
            "agent": agent
        }

    page = open_page(
        row("a-10", "MEM1", 0.5, "<query> ada boss </query>"),
        row("a-9", "full", 1.0, "<query> max friend </query>"),
        row("a-11", "MEM1", 0.0, "<query> emma coach </query>", finish_reason=FinishReason.TURN_LIMIT),
    )
    assert names(page) == ["a-10", "a-9", "a-11"]
    assert page.text_content("#totals").startswith("3 of 3 \u00b7 mean reward 0.50, peak tokens ")
    page.select_option("#sort", "name")
    assert names(page) == ["a-9", "a-10", "a-11"]
    page.select_option("#sort", "reward")
    page.click("#descending")
    assert names(page) == ["a-9", "a-10", "a-11"]
    page.select_option("#sort", "")
    assert names(page) == ["a-11", "a-9", "a-10"]
    page.click("#descending")
    page.select_option("#agent", "MEM1")
    assert names(page) == ["a-10", "a-11"]
    page.select_option("#finish", "turn_limit")
    assert names(page) == ["a-11"] and page.text_content("#name") == "a-11"
    page.select_option("#agent", "")
    page.select_option("#finish", "")
    page.fill("#lowest", "0.5")
    assert names(page) == ["a-10", "a-9"]
    page.fill("#highest", "0.5")
    assert names(page) == ["a-10"]
    page.fill("#lowest", "")
    page.fill("#highest", "")
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    page.keyboard.type("Emma")
    playwright.expect(page.locator(".hit")).to_have_text([" emma"])  # of the observation
    assert len(names(page)) == 3
    page.select_option("#scope", "query")
    assert names(page) == ["a-11"] and texts(page, ".hit") == [" emma"]
    page.fill("#search", "no such words")
    playwright.expect(page.locator("#list .name")).to_have_count(0)
    assert page.is_visible("#nothing") and not page.is_visible("#detail")
    page.fill("#search", "")
    playwright.expect(page.locator("#list .name")).to_have_count(3)
    assert page.is_visible("#detail") and not page.is_visible("#nothing")


def test_tokens_that_touch_what_is_searched(open_page: Open) -> None:
    page = open_page()
    found = {
        words: page.evaluate(f"[...marked(['aB', '', 'cd', 'c', 'ab'], '{words}')]")
        for words in ("ab", "cd", "bc", "cdca", "d", "x", "")
    }
    expected = {"ab": [0, 4], "cd": [2], "bc": [0, 2], "cdca": [2, 3, 4], "d": [2], "x": [], "": []}
    assert found == expected


def test_keys(open_page: Open, tokenizer: PreTrainedTokenizerFast) -> None:
    page = open_page(*(make_trajectory(tokenizer, seed=seed) for seed in range(3)))

    def press(*keys: str) -> tuple[str, str]:
        for key in keys:
            page.keyboard.press(key)
        current = page.locator("#list [aria-current=true] .name").text_content()
        return current, page.text_content("#moment").split(" \u00b7 ")[0]

    assert press() == ("seed 0", "Turn 3 of 3")
    assert press("j", "j", "j") == ("seed 2", "Turn 3 of 3")
    assert press("k", "ArrowLeft") == ("seed 1", "Turn 2 of 3")
    last = page.evaluate("query")
    assert press("Shift+ArrowRight", "Shift+ArrowRight") == ("seed 1", "Turn 2 of 3")
    assert page.evaluate("query") == last + 2
    assert press("ArrowLeft", "ArrowLeft", "ArrowLeft") == ("seed 1", "Prompt of 3")
    assert press("Shift+ArrowLeft") == ("seed 1", "Prompt of 3")


def test_script_in_an_observation_does_not_run(open_page: Open) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([HOSTILE])
    parts = (Part("prompt", 0, "Rhine"), Part("query", 1, HOSTILE), Part("info", 1, f"the {HOSTILE} river"))
    trajectory = make_trajectory(
        tokenizer,
        parts,
        finish_reason=FinishReason.ENVIRONMENT_ERROR,
        notes={"page": HOSTILE},
        score={HOSTILE: 1.0},
        **{name: HOSTILE for name in ("error", "model", "task")},
    )
    row = trajectory.to_dict() | {"agent": HOSTILE}
    page = open_page(row, row, tokenizer=tokenizer)
    page.click("#more summary")
    page.keyboard.press("j")
    page.locator(".token", has_text="script").first.hover()
    assert page.evaluate("window.pwned") is None
    assert page.locator("img").count() == 0 and page.locator("script").count() == 2
    assert texts(page, ".part .text")[1:] == [HOSTILE, f"the {HOSTILE} river"]
    assert page.text_content("#name") == page.text_content("#error") == HOSTILE


def test_what_would_run_or_load_is_refused(
    browser: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_page([make_trajectory(tokenizer).to_dict()], tmp_path / "page.html", tokenizer=tokenizer)
    page = browser.new_page()
    refused = list[str]()
    page.on("console", lambda message: refused.append(message.text))
    page.goto((tmp_path / "page.html").as_uri())
    page.evaluate(
        """async () => {
            const script = document.createElement("script");
            script.textContent = "window.pwned = 1";
            document.body.append(script);
            const image = document.createElement("img");
            image.src = "http://127.0.0.1:9/x.png";
            document.body.append(image);
            document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.pwned = 1'>");
            await fetch("http://127.0.0.1:9/").catch(() => {});
        }"""
    )
    page.wait_for_timeout(50)
    assert page.evaluate("window.pwned") is None
    assert len([text for text in refused if "Content Security Policy" in text]) >= 4
    page.close()


def test_a_long_observation_is_shown_bit_by_bit(open_page: Open, tokenizer: PreTrainedTokenizerFast) -> None:
    segments = [Segment("prompt", 0, 5), Segment("query", 1, 5), Segment("info", 1, 100_000)]
    tokens = torch.arange(100_010) % 100 + 20
    page = open_page(Trajectory(tokens, segments, torch.zeros(100_010), "action"))
    assert page.locator(".token").count() == 5 + 5 + 2000
    assert texts(page, ".rest") == ["20,000 more of 98,000 tokens"]
    page.click(".rest")
    assert page.locator(".token").count() == 5 + 5 + 22_000
    assert texts(page, ".rest") == ["20,000 more of 78,000 tokens"]
    assert states(page) == [["live"] * 10 + ["unwritten"] * 22_000]


def test_characters_that_are_cut_into_tokens(open_page: Open) -> None:
    tokenizer = byte_level()
    whole = "\ufeff<|end|> \u00fc\u03a3 \U0001f30d"
    trajectory = make_trajectory(tokenizer, (Part("prompt", 0, whole), Part("query", 1, "Rhine \U0001f30d")))
    trajectory.tokens = trajectory.tokens[:-1]  # within a character
    trajectory.logprobs, trajectory.rollout_logprobs = trajectory.logprobs[:-1], None
    trajectory.segments[-1] = trajectory.segments[-1]._replace(length=trajectory.segments[-1].length - 1)
    page = open_page(trajectory, tokenizer=tokenizer)
    assert texts(page, ".text") == [whole, "Rhine \ufffd"]
    assert texts(page, ".special") == ["<|end|>"]


def test_trajectories_that_went_wrong(open_page: Open, tokenizer: PreTrainedTokenizerFast) -> None:
    failed = {"finish_reason": FinishReason.ENVIRONMENT_ERROR, "error": "OSError: no server"}
    nothing = Trajectory(torch.zeros(0, dtype=torch.int64), [], torch.zeros(0), "action", **failed)
    page = open_page(
        nothing, make_trajectory(tokenizer, THREE_TURNS[:1], **failed), make_trajectory(tokenizer)
    )
    assert page.text_content("#error") == "OSError: no server"
    assert not page.is_visible("#stepper") and not page.is_visible("#panels")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("j")  # to one with a prompt alone
    assert page.is_visible("#stepper") and texts(page, ".life") == ["live"]
    page.keyboard.press("j")
    assert not page.is_visible("#error")


def test_a_page_without_trajectories(open_page: Open) -> None:
    page = open_page()
    assert page.is_visible("#nothing") and not page.is_visible("#detail")
    page.keyboard.press("j")
    page.keyboard.press("ArrowLeft")
