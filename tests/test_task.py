"The arithmetic world: its problems, its teachers, its tokenizer, its pages; and prompts as a model expects them."
import random, re

import pytest
import torch
from hypothesis import given, strategies as st

from capo.task import (
    FACTS, INSTRUCTION, Problem, Teacher, arithmetic, arithmetic_tokenizer, base_model, calibrated_teacher,
    by_length, last_integer, limit_threads, page_batch, pretrain, prompts_for, running_totals, systematic_teacher,
    template_options, textbook, tiny_lm, verify, warm_start, with_template)

terms = st.lists(st.tuples(st.sampled_from("+-"), st.integers(1, 9)), min_size=2, max_size=5)
chains = terms.map(lambda x: "".join(f"{s}{d}" for s, d in x)[1:] + "=")
tokenizer = arithmetic_tokenizer()


@given(st.text("ab ,+=", max_size=5), st.integers(-999, 999), st.text("ab ,+=", max_size=5), st.integers(-999, 999))
def test_the_last_integer_counts(before, n, after, other):
    text = f"{before},{other} {n}{after}"
    assert last_integer(text) == str(n) and verify(text, str(n)) and verify(text, str(other)) == (n == other)
    assert last_integer(before + after) is None and not verify(before + after, str(n))


def test_the_extractor_is_a_choice():
    first = lambda text: text.split(",")[0]
    assert verify("3,4", "3", first) and not verify("3,4", "4", first) and not verify("3,4", "3")


@given(chains)
def test_running_totals_are_what_python_computes(prompt):
    steps = running_totals(prompt)
    prefixes = [prompt[:2 * i - 1] for i in range(2, len(prompt) // 2 + 1)]
    assert [total for *_, total in steps] == [eval(p) for p in prefixes]
    assert [f"{sign}{d}" for sign, d, _ in steps] == re.findall(r"[+-]\d", prompt[1:])


@pytest.mark.parametrize("terms", [(2,), (2, 3, 4), (5,)])
def test_problems_hold_their_answers(terms):
    problems = arithmetic(100, seed=3, terms=terms)
    assert len(problems) == 100 and all(eval(p.prompt[:-1]) == int(p.answer) and p.prompt[-1] == "=" for p in problems)
    assert {len(re.findall(r"\d", p.prompt)) for p in problems} == set(terms)


def test_problems_are_drawn_by_seed_without_the_excluded():
    assert arithmetic(50, 1) == arithmetic(50, 1) != arithmetic(50, 2)
    assert arithmetic(50, 1)[:20] == arithmetic(20, 1)
    two = arithmetic(100, 1, distinct=True, terms=(2,))
    assert len({p.prompt for p in two}) == 100
    rest = arithmetic(62, 2, {p.prompt for p in two}, distinct=True, terms=(2,))
    assert len({p.prompt for p in two + rest}) == 162                             # 9 · 2 · 9: all that there are


@given(chains, st.integers(0, 99))
def test_a_teacher_without_slips_is_right(prompt, seed):
    pages = Teacher(dict.fromkeys(FACTS, 0.))(prompt, random.Random(seed))
    assert pages == ",".join(str(total) for *_, total in running_totals(prompt))
    assert verify(pages, str(eval(prompt[:-1])))


@given(chains, st.integers(0, 99))
def test_a_slip_carries_on(prompt, seed):
    "A teacher who always slips by 10 is off by 10 more at every step; without offsets, by 1…9 either way."
    steps = running_totals(prompt)
    always = dict.fromkeys(FACTS, 1.)
    page = [int(x) for x in Teacher(always, dict.fromkeys(FACTS, 10))(prompt, random.Random(seed)).split(",")]
    assert page == [total + 10 * (i + 1) for i, (*_, total) in enumerate(steps)]
    page = [int(x) for x in Teacher(always)(prompt, random.Random(seed)).split(",")]
    off = [0] + [x - total for x, (*_, total) in zip(page, steps)]
    assert all(1 <= abs(b - a) <= 9 for a, b in zip(off, off[1:]))


def test_slips_come_at_the_rate_of_their_fact():
    teacher, rng = Teacher(dict.fromkeys(FACTS, 0.) | {(7, "+", 5): .3}), random.Random(0)
    slips = [teacher("7+5=", rng) != "12" for _ in range(2000)]
    assert sum(slips) / 2000 == pytest.approx(.3, abs=.05) and teacher("7+4=", rng) == "11"


def test_the_two_teachers():
    calibrated, systematic = calibrated_teacher(1), systematic_teacher(1)
    assert set(calibrated.rates) == set(systematic.rates) == set(FACTS) and len(FACTS) == 180
    assert all(.4 <= x <= .55 for x in calibrated.rates.values()) and calibrated.offsets is None
    assert all(.02 <= x <= .9 for x in systematic.rates.values())
    assert all(1 <= abs(x) <= 9 for x in systematic.offsets.values())
    assert max(systematic.rates.values()) > .8 and min(systematic.rates.values()) < .1
    assert calibrated == calibrated_teacher(1) != calibrated_teacher(2)
    assert systematic == systematic_teacher(1) != systematic_teacher(2)


@given(st.lists(st.text("0123456789+-=,", min_size=1, max_size=9), min_size=1, max_size=4))
def test_a_token_is_a_character(texts):
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    # pads left
    assert batch.attention_mask.sum(1).tolist() == [len(t) for t in texts] and (batch.attention_mask[:, -1] == 1).all()
    assert tokenizer.batch_decode(batch.input_ids, skip_special_tokens=True) == texts
    assert tokenizer("<eos>").input_ids == [tokenizer.eos_token_id]


def test_the_labels_are_the_response_and_its_end():
    teacher = calibrated_teacher()
    ids, attention, labels = page_batch(tokenizer, next(textbook(teacher, 64)))
    for i, a, label in zip(ids, attention, labels):
        page, learnt = tokenizer.decode(i[a.bool()]), tokenizer.decode(label[label != -100])
        assert page.endswith(learnt) and page[:-len(learnt)].endswith("=")
        assert learnt.endswith("<eos>") and "=" not in learnt
        assert learnt.count(",") == len(running_totals(page.split("=")[0])) - 1
        assert (label[a == 0] == -100).all()


def test_pretraining_learns_and_repeats():
    def run(steps):
        model = tiny_lm(16, 1, 2)
        return list(pretrain(model, tokenizer, calibrated_teacher(), steps, 16)), model.state_dict()
    (loss, weights), (again, same) = run(30), run(30)
    assert len(loss) == 30 and loss == again and all(weights[k].equal(same[k]) for k in weights)
    assert sum(loss[-5:]) < .95 * sum(loss[:5])


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 9))
def test_a_pass_has_every_page_once_in_batches_of_like_length(count, n, seed):
    pages = [(p.prompt, p.answer) for p in arithmetic(count, seed)]
    stream, length = by_length(pages, n, seed), lambda page: len(page[0]) + len(page[1])
    for _ in range(2):
        batches = [next(stream) for _ in range(-(-count // n))]
        assert sorted(sum(batches, [])) == sorted(pages) and all(len(b) <= n for b in batches)
        ends = sorted((min(map(length, b)), max(map(length, b))) for b in batches)
        assert all(high <= low for (_, high), (low, _) in zip(ends, ends[1:]))


def test_a_warm_start_teaches_responses_and_repeats():
    pages = [(p.prompt, p.answer) for p in arithmetic(48, 1, terms=(2,), distinct=True)]
    def run(seed=0):
        model = tiny_lm(16, 1, 2)
        return warm_start(model, tokenizer, pages, passes=20, lr=1e-2, seed=seed), model
    (loss, model), (again, same), (other, _) = run(), run(), run(1)
    assert len(loss) == 60 and loss == again != other and not model.training
    assert all(p.equal(q) for p, q in zip(model.parameters(), same.parameters()))
    ids, attention, labels = page_batch(tokenizer, pages)
    with torch.no_grad(): now = model(ids, attention_mask=attention, labels=labels).loss.item()
    assert now < loss[0] - .5
    # a prompt is not learned: its tokens do not enter the loss
    inside = model(ids, attention_mask=attention).logits[:, :-1].log_softmax(-1)
    of = -inside.gather(2, ids[:, 1:, None])[..., 0][labels[:, 1:] != -100].mean().item()
    assert of == pytest.approx(now, rel=1e-4)


def test_a_warm_start_leaves_all_but_an_adapter_alone():
    from capo.policy import with_lora
    pages = [(p.prompt, p.answer) for p in arithmetic(8, 1)]
    policy = with_lora(tiny_lm(16, 1, 2), 2)
    before = {k: p.detach().clone() for k, p in policy.named_parameters()}
    warm_start(policy, tokenizer, pages, passes=4, batch_size=4)
    changed = {k for k, p in policy.named_parameters() if not p.equal(before[k])}
    assert changed and all("lora_" in k for k in changed)


@pytest.mark.parametrize("wrong", [{"pages": []}, {"passes": 0}, {"batch_size": 0}])
def test_a_warm_start_needs_something_to_do(wrong):
    given = {"pages": [("1+1=", "2")]} | wrong
    with pytest.raises(ValueError, match="at least one of each"): warm_start(tiny_lm(16, 1, 2), tokenizer, **given)


def test_tiny_models_are_drawn_by_seed_and_leave_torchs_generator_alone():
    before = torch.get_rng_state()
    a, b, c = tiny_lm(16, 1, 2, seed=1), tiny_lm(16, 1, 2, seed=1), tiny_lm(16, 1, 2, seed=2)
    assert torch.get_rng_state().equal(before)
    assert a.lm_head.weight.equal(b.lm_head.weight) and not a.lm_head.weight.equal(c.lm_head.weight)


def test_the_shipped_model_is_often_wrong_and_knows_it():
    from capo.evaluate import evaluate
    from capo.rollout import HFSampler, rollout
    model, tokenizer = base_model()
    numbers = evaluate(rollout(HFSampler(model, tokenizer, 16), arithmetic(64, seed=5), 16, verify))
    assert not model.training and .05 < numbers["accuracy"] < .35 and numbers["auc_mean"] > .65
    assert numbers["truncated"] < .02


class Chat:
    "What with_template needs of a tokenizer."
    chat_template, bos_token, bos_token_id = "yes", "<s>", 1
    def __init__(self, adds_bos): self.adds_bos = adds_bos
    def __call__(self, text): return type("Batch", (), {"input_ids": [1] if self.adds_bos else []})
    def apply_chat_template(self, chat, tokenize, add_generation_prompt, yes=False):
        assert not tokenize and add_generation_prompt
        return "<s>" + "".join(f"[{m['role']}]{m['content']}" for m in chat) + "[assistant]" + "!" * yes
    def __len__(self): return 100


def test_templates():
    problem = [Problem("1+1?", "2")]
    prompt = lambda *args, **kwargs: with_template(problem, *args, **kwargs)[0].prompt
    assert prompt() == f"1+1?\n{INSTRUCTION}" and prompt(instruction=None) == "1+1?"
    assert prompt(system="Be brief.", instruction="") == "Be brief.\n\n1+1?"
    assert prompt(Chat(False), "Be brief.") == f"<s>[system]Be brief.[user]1+1?\n{INSTRUCTION}[assistant]"
    # the tokenizer will put its <s> in front
    assert prompt(Chat(True), instruction="Go.") == "[user]1+1?\nGo.[assistant]"
    assert with_template(problem, Chat(True))[0].answer == "2"
    with pytest.raises(ValueError, match="no chat template"): with_template(problem, tokenizer)


def test_small_models_get_one_thread():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with torch.device("meta"): assert limit_threads(torch.nn.Linear(4096, 4096)) == 2
        assert limit_threads(tiny_lm()) == torch.get_num_threads() == 1
    finally: torch.set_num_threads(before)


def test_options_of_a_template_reach_it_or_are_refused():
    problem = [Problem("1+1?", "2")]
    assert with_template(problem, Chat(False), yes=True)[0].prompt.endswith("[assistant]!")
    assert prompts_for(problem, Chat(False), options="yes=true") == with_template(problem, Chat(False), yes=True)
    for options, tokenizer in (("no=1", Chat(False)), ("yes=1", None)):
        with pytest.raises(ValueError, match="the chat template takes no"):
            with_template(problem, tokenizer, **template_options(options))
    with pytest.raises(ValueError, match="NAME=VALUE"): prompts_for(problem, Chat(False), options="yes")


@given(st.dictionaries(st.from_regex("[a-z_]{1,8}", fullmatch=True), st.booleans() | st.integers()))
def test_options_of_a_template_are_read_as_typed(options):
    assert template_options(", ".join(f"{k}={v}" for k, v in options.items())) == options


def test_a_question_that_asks_for_a_box_is_not_told_twice():
    asked = [Problem(r"What is a half? Answer in \boxed{}.", "0.5")]
    assert with_template(asked) == asked
