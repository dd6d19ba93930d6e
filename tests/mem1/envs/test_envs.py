from __future__ import annotations

import random

import pytest
from transformers import PreTrainedTokenizerFast

from mem1.envs.adapters import tool_env
from mem1.envs.base import Action, Step
from mem1.envs.toy.expert import expert_example
from mem1.envs.toy.multihop import INSTRUCTION, MALFORMED, NOTHING_FOUND, MultiHopEnv
from mem1.envs.toy.words import NAMES
from mem1.metrics import UNANSWERED
from mem1.parsing.codec import Codec
from mem1_core.eviction_policies import EvictionPolicy
from mem1_core.layout import TrajectoryLayout


def play(environment: MultiHopEnv, seed: int) -> tuple[list[str], Step]:
    """All texts of an episode of the expert, and the last observation."""
    texts = [environment.reset(seed)]
    while True:
        state, action = environment.expert_action()
        observation = environment.step(action)
        texts += [state, action.text, observation.observation]
        if observation.terminated:
            return texts, observation


@pytest.mark.parametrize("objectives", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("hops", [1, 2, 4])
def test_expert_solves_every_episode(objectives: int, hops: int) -> None:
    environment = MultiHopEnv(objectives, hops=hops)
    for seed in range(5):
        texts, last = play(environment, seed)
        assert last.reward == 1.0
        assert last.info == {"exact_match": objectives, "f1": objectives, "answers_miscounted": 0.0}
        assert len(texts) == 1 + 3 * (objectives * hops + 1)  # a turn per hop, and the answer


def test_an_episode_follows_from_its_seed_and_no_two_share_their_facts() -> None:
    environment = MultiHopEnv(4)
    assert play(environment, 7) == play(MultiHopEnv(4), 7)
    answers = set()
    for seed in range(20):
        environment.reset(seed)
        answers.add(environment.step(Action("query", "ada boss")).observation)
    assert len(answers) > 10


def test_the_notes_rewrite_each_question_as_far_as_it_is_known() -> None:
    environment = MultiHopEnv(2)
    prompt = environment.reset(3)
    first, second = prompt.removeprefix(f"{INSTRUCTION} ").removesuffix(" .").split(" ; ")
    (number, head, one, two), (_, other, three, _) = first.split(), second.split()
    assert environment.expert_action() == (f"{first} ;", Action("query", f"{head} {one}"))
    found = environment.step(Action("query", f"{head} {one}")).observation.removeprefix("found ")
    assert environment.expert_action() == (
        f"{head} {one} {found} ; {number} {found} {two} ;",
        Action("query", f"{found} {two}"),
    )
    answer = environment.step(Action("query", f"{found} {two}")).observation.removeprefix("found ")
    assert environment.answers[0] == answer
    learned = f"{found} {two} {answer} ; {number} {answer} ; {second} ."
    assert environment.expert_action() == (learned, Action("query", f"{other} {three}"))
    assert environment.step(Action("query", "who")).observation == NOTHING_FOUND
    assert environment.expert_action().state == f"{number} {answer} ; {second} .", "nothing was learned"


def test_an_answer_may_have_the_number_of_its_question() -> None:
    environment = MultiHopEnv(2)
    texts, _ = play(environment, 3)
    *_, answer, _ = texts
    numbered = [part.split() for part in answer.split(" ; ")]
    assert [name for _, name in numbered] == environment.answers
    for number, said in (("one", environment.answers), ("other", [" ".join(part) for part in numbered])):
        environment.reset(3)
        assert environment.step(Action("answer", " ; ".join(said))).reward == 1.0, number
    environment.reset(3)
    (first, name), (second, other) = numbered
    wrong = f"{second} {name} ; {first} {other}"
    assert environment.step(Action("answer", wrong)).reward == 0.0


def test_ranges_are_drawn_from() -> None:
    environment = MultiHopEnv((1, 3), hops=(1, 2))
    seen = set()
    for seed in range(40):
        prompt = environment.reset(seed)
        questions = prompt.removeprefix(f"{INSTRUCTION} ").removesuffix(" .").split(" ; ")
        assert len(questions) == environment.objectives
        seen |= {(len(questions), len(q.split()) - 2) for q in questions}
    assert seen == {(k, h) for k in (1, 2, 3) for h in (1, 2)}


@pytest.mark.parametrize("text", ["", "ada", "ada ada", "boss ada", "ada boss coach", "<IS>", "xyzzy \x00"])
def test_a_query_without_an_answer_finds_nothing(text: str) -> None:
    environment = MultiHopEnv(1)
    environment.reset(0)
    assert environment.step(Action("query", text)) == Step(NOTHING_FOUND, info=UNANSWERED)


def test_malformed_actions_are_told_the_format_and_the_episode_goes_on() -> None:
    environment = MultiHopEnv(1)
    environment.reset(0)
    assert environment.step(Action("malformed", "<query> <query> ;")) == Step(MALFORMED, info=UNANSWERED)
    found, name = environment.step(environment.expert_action().action).observation.split()
    assert found == "found" and name in NAMES


def test_partial_credit() -> None:
    environment = MultiHopEnv(4)
    environment.reset(5)
    a, b, c, d = environment.answers
    step = environment.step(Action("answer", f"{a} ; {b} {c} ; ; {d} ; {d}"))
    assert step[:4] == ("answered", 0.5, True, False)
    assert step.info == {"exact_match": 2.0, "f1": pytest.approx(2 + 2 / 3), "answers_miscounted": 1.0}
    environment.reset(5)
    assert environment.step(Action("answer", "")).reward == 0.0


def test_order_of_the_answers_matters() -> None:
    environment = MultiHopEnv(2)
    environment.reset(1)
    assert environment.step(Action("answer", " ; ".join(reversed(environment.answers)))).reward == 0.0


def test_an_episode_that_is_over_takes_no_step() -> None:
    environment = MultiHopEnv(1)
    with pytest.raises(RuntimeError, match="reset"):
        environment.step(Action("query", "ada boss"))
    play(environment, 0)
    with pytest.raises(RuntimeError, match="reset"):
        environment.step(Action("answer", "ada"))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("objectives", 0),
        ("objectives", 33),
        ("objectives", (3, 2)),
        ("hops", 0),
        ("hops", 5),
        ("passage_tokens", -1),
        ("missing", 1.5),
        ("missing", True),
        ("hasty", -0.1),
        ("missing", "0.5"),
    ],
)
def test_arguments_out_of_range_are_named(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=argument):
        MultiHopEnv(**{argument: value})  # type: ignore[arg-type]


def test_passages_have_their_length_in_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    environment = MultiHopEnv(1, passage_tokens=400)
    environment.reset(0)
    passage = environment.step(environment.expert_action().action).observation
    ids = tokenizer.encode(passage)
    assert len(ids) == 400 and tokenizer.unk_token_id not in ids
    assert len([word for word in passage.split() if word in NAMES]) == 1


def test_adversarial_answers_imitate_tags() -> None:
    environment = MultiHopEnv(2, adversarial=True)
    texts, last = play(environment, 0)
    assert last.reward == 1.0
    infos = texts[3:-1:3]
    assert len(infos) == 4
    assert all("</info><answer>" in info and info.endswith("</answer>") for info in infos)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_facts_hold_the_one_that_was_asked_for(count: int) -> None:
    environment = MultiHopEnv(4, facts=count)
    kinds = set()
    for seed in range(5):
        texts, last = play(environment, seed)
        assert last.reward == 1.0
        for query, said in zip(texts[2:-3:3], texts[3:-3:3], strict=True):
            facts = said.removeprefix("found ").split(" ; ")
            assert len(facts) == len({*facts}) == count
            (right,) = [fact for fact in facts if fact.startswith(f"{query} ")]
            assert right.split()[2] in NAMES
            same = [
                (fact.split()[0] == query.split()[0], fact.split()[1] == query.split()[1]) for fact in facts
            ]
            kinds |= {*same} - {(True, True)}
    assert kinds == ({(True, False), (False, True), (False, False)} if count > 1 else set())


def test_how_many_facts_is_drawn_for_each_query() -> None:
    environment = MultiHopEnv(16, facts=(0, 3))
    texts, _ = play(environment, 0)
    counts = {len(said.split(" ; ")) if len(said.split()) > 2 else 0 for said in texts[3:-3:3]}
    assert counts == {0, 1, 2, 3}


def test_a_fact_is_the_same_whoever_asks() -> None:
    environment = MultiHopEnv(1, facts=8)
    environment.reset(3)
    told: dict[str, str] = {}
    for _ in range(300):
        said = environment.step(environment.random_action(random.Random(len(told))).action)
        if not said.observation.startswith("found"):
            environment.reset(3)
            continue
        for fact in said.observation.removeprefix("found ").split(" ; "):
            name, relation, other = fact.split()
            assert told.setdefault(f"{name} {relation}", other) == other
    assert len(told) > 20


def test_of_a_missing_fact_nothing_is_found_and_nothing_is_the_answer() -> None:
    environment = MultiHopEnv(8, missing=1.0)
    for seed in range(3):
        texts, last = play(environment, seed)
        assert last.reward == 1.0 and environment.answers == ["nothing"] * 8
        assert texts.count(NOTHING_FOUND) == 8
    others = MultiHopEnv(2, facts=3, missing=1.0)
    texts, last = play(others, 0)
    assert last.reward == 1.0 and NOTHING_FOUND not in texts
    lost = 0
    for query, said, state in zip(texts[2::3], texts[3::3], texts[4::3], strict=False):
        learned = state.startswith(f"{query} nothing ;")
        assert learned != (f"{query} " in said)
        lost += learned
    assert lost == 2
    shares = []
    environment = MultiHopEnv(16, missing=0.25)
    for seed in range(40):
        assert play(environment, seed)[1].reward == 1.0
        shares.append(environment.answers.count("nothing") / 16)
    assert sum(shares) / 40 == pytest.approx(0.25, abs=0.05)


def test_a_hasty_expert_takes_names_on_the_way_for_answers() -> None:
    """Of questions of 3 hops 0.6 end after the first, 0.6 of the others after the second; they are the same
    questions.
    """
    shares, queries = [], []
    environment, patient = MultiHopEnv(8, hops=3, hasty=0.6), MultiHopEnv(8, hops=3)
    for seed in range(100):
        texts, last = play(environment, seed)
        assert texts[0] == patient.reset(seed) and environment.answers == patient.answers
        shares.append(last.reward)
        queries.append(sum(text.startswith("found ") for text in texts) / 8)
    assert sum(shares) / 100 == pytest.approx(0.16, abs=0.04)
    assert sum(queries) / 100 == pytest.approx(0.6 + 2 * 0.24 + 3 * 0.16, abs=0.1)
    assert play(MultiHopEnv(8, hops=1, hasty=1.0), 0)[1].reward == 1.0, "nothing is on the way"
    assert play(MultiHopEnv(8, hops=2, hasty=1.0), 0)[1].reward == 0.0


def test_all_texts_are_in_the_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    texts, _ = play(MultiHopEnv(32, hops=(1, 4), passage_tokens=30, missing=0.1), 0)
    texts += play(MultiHopEnv(2, adversarial=True), 0)[0]
    for text in [*texts, MALFORMED, NOTHING_FOUND]:
        assert tokenizer.unk_token_id not in tokenizer.encode(text), text


@pytest.mark.parametrize("hint", [MALFORMED, tool_env.MALFORMED])
def test_hints_reach_the_agent_word_for_word(tokenizer: PreTrainedTokenizerFast, hint: str) -> None:
    shown = tokenizer.decode(Codec(tokenizer).observation(hint, 64, turns_left=1))
    assert shown == f"<info> {hint} </info>"


def peak(
    tokenizer: PreTrainedTokenizerFast, objectives: int, passage: int, prune: EvictionPolicy, prompt: bool
) -> float:
    """Mean peak of live tokens of the expert's episodes."""
    ids = tokenizer.get_vocab()
    environment = MultiHopEnv(objectives, passage_tokens=passage)
    peaks = []
    for seed in range(4):
        segments = expert_example(environment, seed, ids).segments
        peaks.append(
            int(TrajectoryLayout.from_segments(segments, prune=prune).mask.peak_tokens(prompt=prompt))
        )
    return sum(peaks) / len(peaks)


def growth(tokenizer: PreTrainedTokenizerFast, passage: int, prune: EvictionPolicy, prompt: bool) -> float:
    """How often the peak at 2 objectives fits into that at 16."""
    two, sixteen = (peak(tokenizer, k, passage, prune, prompt) for k in (2, 16))
    return sixteen / two


def test_peak_memory_grows_at_most_a_third_as_fast_as_with_the_full_context(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    full = growth(tokenizer, 0, "never", prompt=True)
    for prune in ("action", "state"):
        assert growth(tokenizer, 0, prune, prompt=True) <= full / 3


def test_peak_memory_is_nearly_constant_with_real_passages(tokenizer: PreTrainedTokenizerFast) -> None:
    assert growth(tokenizer, 400, "action", prompt=False) <= 1.65
    assert growth(tokenizer, 400, "state", prompt=False) <= 1.65
    assert growth(tokenizer, 400, "never", prompt=False) > 6
