"""The enumerated policy of 06_misalignment: every response counted, no sampling noise. python nbs/tools/exact_toy.py [--part paths|phase]

A question is a random vector; a teacher gives each of three steps its gold token out of four; a response is right when its last token
is gold. All 64 responses of every question are enumerated, so advantages, accuracy and AUC are population values. Seeds are one leading
axis S of every tensor: they train side by side and do not touch each other.
"""
import argparse, csv, json, math, subprocess, time
from pathlib import Path
import torch

DATA = Path(__file__).resolve().parents[1]/"data"
STEPS, TOKENS, DIM = 3, 4, 8
SEQ = torch.cartesian_prod(*[torch.arange(TOKENS)] * STEPS)                       # (64, 3), all responses
CONFIG = dict(train=512, test=256, fit_steps=400, fit_lr=1e-2, steps=300, lr=3e-3, width=12, noise=.5, every=10, smooth=.1, cross=24)


def per_seed(seeds, draw): return torch.stack([draw(torch.Generator().manual_seed(s)) for s in seeds])


def world(seeds, n, noise):
    "Questions (S, n, 8), gold tokens (S, n, 3), and the token distribution of the corpus (S, n, 3, 4)."
    def net(g, out): return .8 * torch.randn(DIM, 16, generator=g), .8 * torch.randn(16, out, generator=g)
    def draw(g):
        right, wrong, doubt = net(g, 12), net(g, 12), net(g, 1)
        x = torch.randn(n, DIM, generator=g)
        tokens = lambda w: ((x @ w[0]).tanh() @ w[1]).view(n, STEPS, TOKENS).argmax(-1)
        share = torch.sigmoid(.3 * ((x @ doubt[0]).tanh() @ doubt[1]) - .3)[..., None]
        one = lambda t: torch.nn.functional.one_hot(t, TOKENS).float()
        corpus = noise / TOKENS + (1 - noise) * ((1 - share) * one(tokens(right)) + share * one(tokens(wrong)))
        return torch.cat([x, tokens(right).float(), corpus.flatten(1)], 1)
    x, gold, corpus = per_seed(seeds, draw).split([DIM, STEPS, STEPS * TOKENS], -1)
    return x, gold.long(), corpus.unflatten(-1, (STEPS, TOKENS))


def init(seeds, width):
    "Weights of a tanh network with two hidden layers over the sum of three embeddings: question, previous token, step."
    shapes = dict(x=(DIM, DIM), prev=(TOKENS + 1, DIM), step=(STEPS, DIM), w1=(DIM, width), b1=(1, width), w2=(width, width), b2=(1, width), w3=(width, TOKENS), b3=(1, TOKENS))
    def draw(name, shape):
        scale = 0 if name[0] == "b" else 1 if name in ("prev", "step") else shape[0] ** -.5
        return per_seed([s * 1000 + list(shapes).index(name) for s in seeds], lambda g: scale * torch.randn(shape, generator=g)).requires_grad_()
    return {k: draw(k, v) for k, v in shapes.items()}


def token_logp(w, x):
    "log π(token | question, previous, step): (S, n, 1, 4) for the first step and (S, n, 4, 4) for the others."
    q = x @ w["x"]
    S, n, _ = q.shape
    out = []
    for t in range(STEPS):
        prev = w["prev"][:, -1:] if t == 0 else w["prev"][:, :TOKENS]
        h = (q[:, :, None] + (prev + w["step"][:, t:t + 1])[:, None]).flatten(1, 2)
        h = (h @ w["w1"] + w["b1"]).tanh()
        h = (h @ w["w2"] + w["b2"]).tanh()
        out.append((h @ w["w3"] + w["b3"]).log_softmax(-1).view(S, n, -1, TOKENS))
    return out


def seq_logp(w, x):
    "(S, n, 64): the log-probability of each response."
    a, b, c = token_logp(w, x)
    return (a[:, :, 0, :, None, None] + b[..., None] + c[:, :, None]).flatten(2)


def fit_base(w, x, corpus, cfg):
    "Cross-entropy with the corpus, whose tokens are independent given the question."
    opt = torch.optim.Adam(w.values(), lr=cfg["fit_lr"])
    for _ in range(cfg["fit_steps"]):
        lp = token_logp(w, x)
        loss = -(lp[0][:, :, 0] * corpus[:, :, 0]).sum(-1)
        for t in (1, 2): loss = loss - (corpus[:, :, t - 1, :, None] * corpus[:, :, t, None] * lp[t]).sum((-1, -2))
        opt.zero_grad(); loss.mean(1).sum().backward(); opt.step()


def split(v, gold):
    "The 16 right and the 48 wrong responses of each question."
    S, n, _ = v.shape
    order = (SEQ[:, 2] != gold[..., 2:]).long().argsort(dim=-1, stable=True)
    return v.gather(-1, order).split([16, 48], -1)


def advantages(p, f, gold, tau, std):
    "Population advantages at GRPO's size of right (S, n, 16) and wrong (S, n, 48) responses; tau None: GRPO."
    (pr, pw), acc = p, p[0].sum(-1, keepdim=True)
    if tau is None: right, wrong = (1 - acc).expand_as(pr), -acc.expand_as(pw)
    else:
        force = torch.sigmoid(-(f[0][..., :, None] - f[1][..., None, :]) / tau)
        right, wrong = 2 * (force * pw[..., None, :]).sum(-1), -2 * (force * pr[..., :, None]).sum(-2)
    if std: right, wrong = (v / ((acc * (1 - acc)).sqrt() + 1e-4) for v in (right, wrong))
    return right, wrong


def objective(w, x, gold, tau, std):
    "Its gradient is the population step: Σ_o π(o) A(o) ∇lpm(o), π and A held fixed. One number a seed."
    f = split(seq_logp(w, x) / STEPS, gold)
    g = [v.detach() for v in f]
    p = [(STEPS * v).exp() for v in g]
    return sum((pi * a * v).sum(-1) for pi, a, v in zip(p, advantages(p, g, gold, tau, std), f)).mean(1)


def smooth_auc(w, x, gold, h, pooled, moving):
    "AUC with σ(t/h) for the step, weighted by the policy; `moving`: differentiate the weights, too."
    f = split(seq_logp(w, x) / STEPS, gold)
    pr, pw = [(STEPS * (v if moving else v.detach())).exp() for v in f]
    if pooled: f, pr, pw = [v.flatten(1)[:, None] for v in f], pr.flatten(1)[:, None], pw.flatten(1)[:, None]
    won = torch.sigmoid((f[0][..., :, None] - f[1][..., None, :]) / h)
    return (torch.einsum("sqij,sqi,sqj->sq", won, pr, pw) / (pr.sum(-1) * pw.sum(-1))).mean(1)


def pooled_auc(f, p):
    "Exact AUC (S,) of all responses of all questions, weighted by p; ties have probability zero here."
    (fr, fw), (pr, pw) = [[v.flatten(1).double() for v in z] for z in (f, p)]
    order = fw.argsort(-1)
    below = torch.cat([torch.zeros(len(fw), 1).double(), pw.gather(-1, order).cumsum(-1)], -1)
    rank = torch.searchsorted(fw.gather(-1, order).contiguous(), fr.contiguous())
    return (pr * below.gather(-1, rank)).sum(-1) / (pr.sum(-1) * pw.sum(-1))


def question_auc(f, p):
    won = (f[0][..., :, None] > f[1][..., None, :]).float()
    return (torch.einsum("sqij,sqi,sqj->sq", won, *p) / (p[0].sum(-1) * p[1].sum(-1))).mean(1)


@torch.no_grad()
def measure(w, base, x, gold):
    "Exact figures on the questions x, a list of numbers (one a seed) each."
    lp, lp0 = seq_logp(w, x), seq_logp(base, x)
    f, f0 = split(lp / STEPS, gold), split(lp0 / STEPS, gold)
    p, p0 = [(STEPS * v).exp() for v in f], [(STEPS * v).exp() for v in f0]
    mean = lambda v, q: (v * q).sum((1, 2)) / q.sum((1, 2))
    acc = p[0].sum(-1)
    share = (p[1] * (p[1] > .5)).sum((1, 2)) / p[1].sum((1, 2))                 # of the wrong answers given, those given with probability over ½
    return {"accuracy": acc.mean(1), "auc_pooled": pooled_auc(f, p), "auc_question": question_auc(f, p),
            "entropy": -(lp.exp() * lp).sum(-1).mean(1), "auc_old_responses": pooled_auc(f, p0), "auc_old_scores": pooled_auc(f0, p),
            "lpm_right": mean(f[0], p[0]), "lpm_wrong": mean(f[1], p[1]), "lpm_right_old": mean(f[0], p0[0]), "lpm_wrong_old": mean(f[1], p0[1]),
            "base_lpm_right": mean(f0[0], p[0]), "base_lpm_wrong": mean(f0[1], p[1]), "wrong_over_half": share}


def cosines(w, x, gold, cfg, tau):
    "Cosines of GRPO's and CAPO's step with the gradient of the smoothed AUC: per question and pooled, sampling fixed and moving."
    few = slice(cfg["cross"])
    flat = lambda loss: torch.cat([g.flatten(1) for g in torch.autograd.grad(loss.sum(), list(w.values()), allow_unused=True, materialize_grads=True)], 1)
    step = {"grpo": flat(objective(w, x, gold, None, False)), "capo": flat(objective(w, x, gold, tau, False))}
    few_step = {"grpo": flat(objective(w, x[:, few], gold[:, few], None, False)), "capo": flat(objective(w, x[:, few], gold[:, few], tau, False))}
    cos = lambda a, b: torch.cosine_similarity(a, b, dim=1)
    out = {"cos_steps": cos(step["grpo"], step["capo"])}
    for moving in (False, True):
        tag = "moving" if moving else "fixed"
        q, pooled = flat(smooth_auc(w, x, gold, cfg["smooth"], False, moving)), flat(smooth_auc(w, x[:, few], gold[:, few], cfg["smooth"], True, moving))
        for m in ("grpo", "capo"): out |= {f"cos_{m}_question_{tag}": cos(step[m], q), f"cos_{m}_pooled_{tag}": cos(few_step[m], pooled)}
    return out


@torch.no_grad()
def coverage_curve(w, x, gold, grid):
    "Precision among the most confident share of the answers given, for each share: (S, len(grid))."
    f = split(seq_logp(w, x) / STEPS, gold)
    p = [(STEPS * v).exp() for v in f]
    score, mass = torch.cat([v.flatten(1) for v in f], 1), torch.cat([v.flatten(1) for v in p], 1).double()
    right = torch.cat([p[0].flatten(1).double(), torch.zeros_like(p[1].flatten(1)).double()], 1)
    order = score.argsort(-1, descending=True)
    mass, right = mass.gather(1, order).cumsum(-1) / mass.sum(-1, keepdim=True), right.gather(1, order).cumsum(-1) / mass.sum(-1, keepdim=True)
    at = torch.searchsorted(mass, grid.double().expand(len(mass), -1).contiguous()).clamp(max=mass.shape[1] - 1)
    return right.gather(1, at) / mass.gather(1, at)


def start(seeds, cfg):
    x, gold, corpus = world(seeds, cfg["train"] + cfg["test"], cfg["noise"])
    cut = cfg["train"]
    base = init(seeds, cfg["width"])
    fit_base(base, x[:, :cut], corpus[:, :cut], cfg)
    return {k: v.detach() for k, v in base.items()}, (x[:, :cut], gold[:, :cut]), (x[:, cut:], gold[:, cut:])


def climb(base, data, cfg, tau, std):
    "Yields (step, weights) along the population steps by Adam."
    w = {k: v.clone().requires_grad_() for k, v in base.items()}
    opt = torch.optim.Adam(w.values(), lr=cfg["lr"])
    for step in range(cfg["steps"] + 1):
        yield step, w
        opt.zero_grad(); (-objective(w, *data, tau, std)).sum().backward(); opt.step()


def rows(values, seeds, **head):
    return [head | {"seed": s} | {k: round(v[i].item(), 5) for k, v in values.items()} for i, s in enumerate(seeds)]


ARMS = {"GRPO": (None, False), "GRPO with std": (None, True), "CAPO 0.5": (.5, False), "CAPO 0.5 with std": (.5, True),
        "CAPO 0.1": (.1, False), "CAPO 0.25": (.25, False), "CAPO 1": (1., False), "CAPO 2": (2., False)}


def paths(cfg, seeds, arms=ARMS):
    base, train, test = start(seeds, cfg)
    grid, log, curves = torch.linspace(.05, 1, 20), [], []
    for arm, (tau, std) in arms.items():
        for step, w in climb(base, train, cfg, tau, std):
            if step % cfg["every"]: continue
            values = measure(w, base, *test)
            if arm in ("GRPO", "CAPO 0.5") and step % (3 * cfg["every"]) == 0: values |= cosines(w, *train, cfg, .5)
            log += rows(values, seeds, arm=arm, step=step)
        if arm in ("GRPO", "GRPO with std", "CAPO 0.5"):
            for name, weights in (("base", base), (arm, w)):
                if name == "base" and arm != "GRPO": continue
                curves += [dict(arm=name, seed=s, coverage=round(c.item(), 2), precision=round(v.item(), 5))
                           for s, row in zip(seeds, coverage_curve(weights, *test, grid)) for c, v in zip(grid, row)]
    return log, curves


def phase(cfg, seeds, noises=(0., .125, .25, .5, .75), widths=(4, 8, 12, 24, 48)):
    log = []
    for noise in noises:
        for width in widths:
            c = cfg | dict(noise=noise, width=width)
            base, train, test = start(seeds, c)
            for part, data in (("test", test), ("train", train)): log += rows(measure(base, base, *data), seeds, noise=noise, width=width, arm="base", part=part)
            for arm in ("GRPO", "CAPO 0.5"):
                for _, w in climb(base, train, c, *ARMS[arm]): pass
                for part, data in (("test", test), ("train", train)): log += rows(measure(w, base, *data), seeds, noise=noise, width=width, arm=arm, part=part)
    return log


def save(name, log):
    columns = list(dict.fromkeys(k for r in log for k in r))
    with (DATA/name).open("w", newline="") as f:
        writer = csv.DictWriter(f, columns); writer.writeheader(); writer.writerows(log)


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--part", choices=["paths", "phase"], nargs="*", default=["paths", "phase"])
    ask.add_argument("--seeds", type=int, default=10)
    todo = ask.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=DATA).stdout.strip()
    about = DATA/"exact_toy.json"
    info = json.loads(about.read_text()) if about.exists() else {}
    for part in todo.part:
        begin, seeds = time.time(), list(range(todo.seeds if part == "paths" else min(4, todo.seeds)))
        if part == "paths":
            log, curves = paths(CONFIG, seeds)
            save("exact_toy.csv", log); save("exact_toy_coverage.csv", curves)
        else: save("exact_toy_phase.csv", phase(CONFIG, seeds))
        info[part] = dict(command=f"python nbs/tools/exact_toy.py --part {part} --seeds {todo.seeds}", config=CONFIG, seeds=seeds, commit=commit,
                          torch=torch.__version__, seconds=round(time.time() - begin))
        about.write_text(json.dumps(info, indent=1) + "\n")
