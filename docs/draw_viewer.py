"""Draws viewer.png: the page that `mem1 view` writes, in a browser. Needs playwright and a Chromium.

python docs/draw_viewer.py
"""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import sync_playwright
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mem1.evaluation.viewer.page import write_page
from mem1.trajectory import FinishReason, TokenReward, Trajectory
from mem1_core.segments import Segment, by_policy

PROMPT = """Answer the questions one by one, in the order of the list, as <answer>a; b; ...</answer>.
1. Which sea does the longest river of Europe flow into?
2. How high is the highest mountain of the Pyrenees?
3. Which lake is the deepest in the world?
"""
TURNS = (
    (
        "<IS>Three questions. First I need the longest river of Europe.</IS>",
        "<query>longest river in Europe</query>",
        "<info>(Title: Volga) The Volga is the longest river in Europe. It rises in the Valdai Hills, "
        "north-west of Moscow, runs for about 3,530 km and drains most of western Russia.\n(Title: Danube) "
        "The Danube is the second longest river in Europe. It flows through ten countries to the Black "
        "Sea.</info>",
    ),
    (
        "<IS>1: the longest river is the Volga; I still need its sea. 2 and 3 are open.</IS>",
        "<query>Volga mouth sea</query>",
        "<info>(Title: Volga Delta) The Volga Delta is the largest river delta in Europe. It lies where the "
        "Volga flows into the Caspian Sea, about 60 km below Astrakhan.</info>",
    ),
    (
        "<IS>1: Caspian Sea. Next is 2, the highest mountain of the Pyrenees. 3 is open.</IS>",
        "<query>highest mountain of the Pyrenees height</query>",
        "<info>(Title: Aneto) Aneto, with 3,404 metres, is the highest mountain in the Pyrenees and the "
        "third highest in Spain. It stands in the province of Huesca.</info>",
    ),
    (
        "<IS>1: Caspian Sea. 2: 3,404 metres. Next is 3, the deepest lake in the world.</IS>",
        "<query>deepest lake in the world</query>",
        "<info>(Title: Lake Baikal) Lake Baikal, a rift lake in southern Siberia, is the deepest lake in the "
        "world, with 1,642 metres at most, and holds more water than any other fresh one.</info>",
    ),
    (
        "<IS>1: Caspian Sea. 2: 3,404 metres. 3: Lake Baikal. All are answered.</IS>",
        "<answer>Caspian Sea; 3,404 metres; Lake Baikal</answer>",
        "",
    ),
)
AGENTS = (("MEM1", "action"), ("full context", "never"), ("last observation", "hide_observations=1"))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, learnt from the example itself."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = [PROMPT, *(part for turn in TURNS for part in turn)] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def play(tokenizer: PreTrainedTokenizerFast, seed: int, agent: str, prune: str, turns: int) -> dict[str, Any]:
    """An episode that is over after `turns` turns of the example, with log-probs drawn at random."""
    rng = random.Random(seed)
    tokens, segments, logprobs = list[int](), list[Segment](), list[float]()

    def write(kind: str, turn: int, text: str) -> None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        segments.append(Segment(kind, turn, len(ids)))
        tokens.extend(ids)
        logprobs.extend(-rng.expovariate(1.6) if by_policy(kind) else 0.0 for _ in ids)

    write("prompt", 0, PROMPT)
    for turn, (state, action, observation) in enumerate(TURNS[:turns], start=1):
        last = turn == len(TURNS)
        write("state", turn, state)
        write("answer" if last else "query", turn, action)
        if turn < turns:
            write("info", turn, observation)
    right = rng.randint(1, 3) if turns == len(TURNS) else 0
    trajectory = Trajectory(
        tokens=torch.tensor(tokens),
        segments=segments,
        logprobs=torch.tensor(logprobs),
        prune=prune,
        rewards=[TokenReward(len(tokens) - 1, right / 3)] if right else [],
        score={"exact_match": float(right), "f1": right + rng.random() * (3 - right)},
        finish_reason=FinishReason.ANSWERED if turns == len(TURNS) else FinishReason.TURN_LIMIT,
        objectives=3,
        task=f"europe-{seed}",
        seed=seed,
        model="demo/final",
        model_tokens=len(tokens),
    )
    return trajectory.to_dict() | {"agent": agent}


def main() -> None:
    tokenizer = make_tokenizer()
    rows = [
        play(tokenizer, seed, agent, prune, turns=5 if seed % 4 else 3)
        for seed in range(1, 9)
        for agent, prune in AGENTS
    ]
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "trajectories.html"
        write_page(rows, path, tokenizer=tokenizer, title="demo/evaluation")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(path.as_uri())
        page.select_option("#colour", "logprob")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        page.evaluate("window.scrollTo(0, 0)")
        page.screenshot(path=Path(__file__).with_name("viewer.png"))
        browser.close()


if __name__ == "__main__":
    main()
