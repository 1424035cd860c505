"""Every method of 31_baselines in the enumerated policy of 06_misalignment: toy_methods.py [--seeds 10]

World, base and measurement are those of exact_toy.py; what is sampled is the training. A batch is a group of 16 for
each question, drawn from the enumerated responses, and makes two updates by Adam, half of the questions each. The
methods are the library's recipes, with the defaults of their sources; CAPO, which has no mask here, has 06's τ and
GRPO's size. Accuracy and AUC are exact, on questions that are not trained on. Ten minutes on one core.
"""
import argparse, json, math, subprocess, time

import torch

import exact_toy as toy
from capo.baselines import METHODS, codapo, disco, pairwise
from capo.recipe import Likeliest, capo, grpo_size, refilled
from capo.rollout import Rollouts
from capo.surrogate import exponential, hinge, squared_hinge

CONFIG = toy.CONFIG | dict(updates=2)
COLUMNS = ("accuracy", "auc_mean", "auc_pooled", "entropy")
ARMS = {name: make() for name, make in METHODS.items()} | {
    "capo": capo(.5, ref_low=1, ref_high=math.inf, scale=grpo_size), "dr_grpo": METHODS["dr_grpo"](longest=3),
    "codapo_again": codapo(again=4), "disco_b": disco(tau=None), "hinge": pairwise(hinge),
    "squared_hinge": pairwise(squared_hinge), "exponential": pairwise(exponential)}


def tokens(w, x, responses):
    "The distribution (n, G, 3, 4) that each token of the responses (n, G, 3) was drawn from."
    first, *later = (lp[0] for lp in toy.token_logp(w, x[None]))
    n, G, _ = responses.shape
    of = torch.arange(n)[:, None]
    behind = [lp[of, responses[..., t]] for t, lp in enumerate(later)]
    return torch.stack([first.expand(n, G, -1), *behind], 2)


def own(logp, responses): return logp.gather(-1, responses[..., None])[..., 0]


@torch.no_grad()
def draw(w, x, gold, asked, G, g):
    "Graded rollouts: a group of G for each of these questions, which are the prompts."
    p = toy.seq_logp(w, x[None, asked])[0].exp()
    responses = toy.SEQ[torch.multinomial(p, G, replacement=True, generator=g)]
    one, mask = torch.ones(len(asked), 1, dtype=torch.long), torch.ones_like(responses)
    logp, reward = own(tokens(w, x[asked], responses), responses), (responses[..., 2] == gold[asked, None, 2]).float()
    return Rollouts(asked[:, None], one, responses, mask, logp, reward, reward < 0, [[""] * G] * len(asked))


def loss(recipe, w, x, r, advantage):
    "The recipe's loss on these rollouts, with what it needs besides."
    dist = tokens(w, x[r.prompt_ids[:, 0]], r.response_ids)
    logp, G = own(dist, r.response_ids), r.mask.shape[1]
    rows = lambda t: t.flatten(0, 1)
    entropy = -(dist.exp() * dist).sum(-1).detach()
    likely = Likeliest(rows(dist.topk(3).values), rows(entropy), rows(dist.argmax(-1) == r.response_ids))
    more = {"question": torch.arange(len(r)).repeat_interleave(G), "reward": r.reward.flatten(), "likeliest": likely}
    needed = {k: more[k] for k in recipe.needs}
    return recipe.loss(rows(logp), rows(r.logp), advantage.flatten(), rows(r.mask), **needed)


def climb(recipe, base, train, cfg, seed):
    "Yields (update, weights)."
    (x, gold), g = (v[0] for v in train), torch.Generator().manual_seed(seed)
    w = {k: v.clone().requires_grad_() for k, v in base.items()}
    opt, n, done, step = torch.optim.Adam(w.values(), lr=cfg["lr"]), cfg["train"], 0, 0
    parts = [slice(i * n // cfg["updates"], (i + 1) * n // cfg["updates"]) for i in range(cfg["updates"])]
    def ask(asked): return draw(w, x, gold, asked, cfg["group"], g)
    def learn(r):
        advantage = recipe.advantage(r, step)
        for some in parts:
            opt.zero_grad(); loss(recipe, w, x, r[some], advantage[some]).backward(); opt.step()
            yield w
    def rounds():
        asked = torch.randperm(n, generator=g)
        r = ask(asked)
        if recipe.refill: r, _ = refilled(r, recipe.refill, lambda k: ask(torch.randint(n, (n,), generator=g)))
        yield from learn(r)
        if recipe.again: yield from learn(ask(asked[recipe.again(r)]))
    yield 0, w
    while done < cfg["steps"]:
        step += 1
        for w in rounds(): yield (done := done + 1), w


def runs(cfg, seeds):
    log = []
    for seed in seeds:
        base, train, test = toy.start([seed], cfg)
        for arm, recipe in ARMS.items():
            for update, w in climb(recipe, base, train, cfg, seed):
                if update % cfg["every"]: continue
                figures = toy.measure(w, *test, cfg)
                log += toy.rows({k: figures[k] for k in COLUMNS}, [seed], arm=arm, step=update)
        print("seed", seed, flush=True)
    return log


def told(settings): return {k: "inf" if v == math.inf else v for k, v in settings.items()}  # JSON has no infinity


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--seeds", type=int, default=10)
    todo = ask.parse_args()
    torch.set_num_threads(1)
    begin, seeds = time.process_time(), list(range(todo.seeds))
    toy.save("toy_methods.csv", runs(CONFIG, seeds))
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=toy.DATA)
    info = dict(command=f"python nbs/tools/toy_methods.py --seeds {todo.seeds}", config=CONFIG, seeds=seeds,
                settings={arm: told(recipe.settings) for arm, recipe in ARMS.items()}, commit=head.stdout.strip(),
                torch=torch.__version__, cpu_seconds=round(time.process_time() - begin))
    (toy.DATA/"toy_methods.json").write_text(json.dumps(info, indent=1) + "\n")
