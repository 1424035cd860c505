"""The enumerated policy of 06_misalignment, every response counted: exact_toy.py [--part paths phase] [--seeds 10]

A question is a random vector; a teacher gives each of three steps its gold token out of four; a response is right when
its last token is gold. All 64 responses of every question are enumerated, so advantages, accuracy and AUC are
population values. Seeds are one leading axis S of every tensor: they train side by side and do not touch each other.
"""
import argparse, csv, json, subprocess, time
from pathlib import Path
import torch
import torch.nn.functional as F

DATA = Path(__file__).resolve().parents[1]/"data"
STEPS, TOKENS, DIM = 3, 4, 8
SEQ = torch.cartesian_prod(*[torch.arange(TOKENS)] * STEPS)                       # (64, 3), all responses
CONFIG = dict(train=512, test=256, fit_steps=400, fit_lr=1e-2, steps=300, lr=3e-3, width=12, noise=.5,
              every=10, marks=[0, 10, 30], group=16, smooth=.1, cross=24)


def per_seed(seeds, draw): return torch.stack([draw(torch.Generator().manual_seed(s)) for s in seeds])


def world(seeds, n, noise):
    "Questions (S, n, 8), gold tokens (S, n, 3), and the token distribution of the corpus (S, n, 3, 4)."
    def net(g, out): return .8 * torch.randn(DIM, 16, generator=g), .8 * torch.randn(16, out, generator=g)
    def draw(g):
        right, wrong, doubt = net(g, 12), net(g, 12), net(g, 1)
        x = torch.randn(n, DIM, generator=g)
        tokens = lambda w: ((x @ w[0]).tanh() @ w[1]).view(n, STEPS, TOKENS).argmax(-1)
        share = torch.sigmoid(.3 * ((x @ doubt[0]).tanh() @ doubt[1]) - .3)[..., None]
        gold, other = (F.one_hot(tokens(w), TOKENS).float() for w in (right, wrong))
        taught = (1 - share) * gold + share * other
        corpus = noise / TOKENS + (1 - noise) * taught
        return torch.cat([x, tokens(right).float(), corpus.flatten(1)], 1)
    x, gold, corpus = per_seed(seeds, draw).split([DIM, STEPS, STEPS * TOKENS], -1)
    return x, gold.long(), corpus.unflatten(-1, (STEPS, TOKENS))


def init(seeds, width):
    "Weights of a tanh network with two hidden layers over the sum of three embeddings: question, previous token, step."
    shapes = dict(x=(DIM, DIM), prev=(TOKENS + 1, DIM), step=(STEPS, DIM), w1=(DIM, width), b1=(1, width),
                  w2=(width, width), b2=(1, width), w3=(width, TOKENS), b3=(1, TOKENS))
    def draw(name, shape):
        scale = 0 if name[0] == "b" else 1 if name in ("prev", "step") else shape[0] ** -.5
        own = [s * 1000 + list(shapes).index(name) for s in seeds]
        return per_seed(own, lambda g: scale * torch.randn(shape, generator=g)).requires_grad_()
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
    order = (SEQ[:, 2] != gold[..., 2:]).long().argsort(dim=-1, stable=True)
    return v.gather(-1, order).split([16, 48], -1)


def scores(w, x, gold):
    "lpm and probability of the right and of the wrong responses: ((S, n, 16), (S, n, 48)) each."
    f = split(seq_logp(w, x) / STEPS, gold)
    return f, tuple((STEPS * v).exp() for v in f)


def advantages(p, f, tau, std):
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
    f, p = scores(w, x, gold)
    p, A = [v.detach() for v in p], advantages([v.detach() for v in p], [v.detach() for v in f], tau, std)
    return sum((pi * a * v).sum(-1) for pi, a, v in zip(p, A, f)).mean(1)


def mixed(p, G):
    "(S, n): the chance that G responses to a question are neither all right nor all wrong."
    acc = p[0].sum(-1).double().clamp(0, 1)
    return 1 - acc ** G - (1 - acc) ** G


def group_auc(f, p, won=lambda t: (t > 0).float()):
    "(S, n): exact AUC of each question; ties have probability zero here."
    t = f[0][..., :, None] - f[1][..., None, :]
    return torch.einsum("sqij,sqi,sqj->sq", won(t), *p) / (p[0].sum(-1) * p[1].sum(-1))


def weighted(auc, m): return (auc * m).sum(1) / m.sum(1)


def auc_mean(f, p, G):
    "What the AUC-mean of groups of G responses estimates: each question's AUC, weighted by its chance of being mixed."
    return weighted(group_auc(f, p), mixed(p, G))


def pooled_auc(f, p):
    "Exact AUC (S,) of all responses of all questions, weighted by p."
    (fr, fw), (pr, pw) = [[v.flatten(1).double() for v in z] for z in (f, p)]
    order = fw.argsort(-1)
    below = F.pad(pw.gather(-1, order).cumsum(-1), (1, 0))
    rank = torch.searchsorted(fw.gather(-1, order).contiguous(), fr.contiguous())
    return (pr * below.gather(-1, rank)).sum(-1) / (pr.sum(-1) * pw.sum(-1))


def smooth_auc(w, x, gold, cfg, pooled, moving):
    "AUC-mean or pooled AUC with σ(t/h) for the step; `moving`: differentiate what is drawn, too."
    f, p = scores(w, x, gold)
    if not moving: p = [v.detach() for v in p]
    m = mixed(p, cfg["group"])
    if pooled: f, p = [v.flatten(1)[:, None] for v in f], [v.flatten(1)[:, None] for v in p]
    auc = group_auc(f, p, lambda t: torch.sigmoid(t / cfg["smooth"]))
    return auc[:, 0] if pooled else weighted(auc, m)


@torch.no_grad()
def measure(w, x, gold, cfg):
    "Exact figures on the questions x, one number a seed each."
    f, p = scores(w, x, gold)
    acc, auc, m, lp = p[0].sum(-1), group_auc(f, p), mixed(p, cfg["group"]), seq_logp(w, x)
    sure = (p[1] * (p[1] > .5)).sum((1, 2)) / p[1].sum((1, 2))                  # of the wrong answers that are given
    return {"accuracy": acc.mean(1), "auc_mean": weighted(auc, m), "auc_every_question": auc.mean(1),
            "mixed": m.mean(1), "auc_pairs": weighted(auc, acc * (1 - acc)), "auc_pooled": pooled_auc(f, p),
            "entropy": -(lp.exp() * lp).sum(-1).mean(1), "sure_if_wrong": sure}


@torch.no_grad()
def exchanged(w, mark, x, gold, cfg):
    """AUC when scores and draws come from two policies, w and an earlier one.

    order: w's scores, earlier draws; drawn: w's draws, earlier scores; questions: only their weights are w's."""
    (f, p), (f0, p0), G = scores(w, x, gold), scores(mark, x, gold), cfg["group"]
    out = {"mean_questions": weighted(group_auc(f0, p0), mixed(p, G))}
    for kind, auc in (("mean", lambda f, p: auc_mean(f, p, G)), ("pooled", pooled_auc)):
        out |= {kind: auc(f, p), f"{kind}_at_mark": auc(f0, p0)}
        out |= {f"{kind}_order": auc(f, p0), f"{kind}_drawn": auc(f0, p)}
    return out


@torch.no_grad()
def by_group_size(w, x, gold, sizes=(2, 4, 8, 16, 64, 256, 1024)):
    "The AUC-mean that groups of each size estimate, and the share of questions over which it is a mean."
    f, p = scores(w, x, gold)
    return {G: {"auc_mean": auc_mean(f, p, G), "mixed": mixed(p, G).mean(1)} for G in sizes}


def cosines(w, x, gold, cfg, tau):
    "Cosines of GRPO's and CAPO's step with the gradient of smoothed AUC: AUC-mean and pooled, draws held and moving."
    few = x[:, :cfg["cross"]], gold[:, :cfg["cross"]]
    def flat(loss):
        grads = torch.autograd.grad(loss.sum(), list(w.values()), allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten(1) for g in grads], 1)
    out = {}
    for kind, data in (("mean", (x, gold)), ("pooled", few)):
        step = {m: flat(objective(w, *data, t, False)) for m, t in (("grpo", None), ("capo", tau))}
        for tag in ("held", "moving"):
            up = flat(smooth_auc(w, *data, cfg, kind == "pooled", tag == "moving"))
            out |= {f"{m}_{kind}_{tag}": torch.cosine_similarity(step[m], up, dim=1) for m in step}
    return out


@torch.no_grad()
def coverage_curve(w, x, gold, grid):
    "Precision among the most confident share of the answers given, for each share: (S, len(grid))."
    f, p = [[v.flatten(1).double() for v in z] for z in scores(w, x, gold)]
    mass, order = torch.cat(p, 1), torch.cat(f, 1).argsort(-1, descending=True)
    right = torch.cat([p[0], torch.zeros_like(p[1])], 1).gather(1, order).cumsum(-1)
    mass = mass.gather(1, order).cumsum(-1)
    share, wanted = mass / mass[:, -1:], grid.double().expand(len(mass), -1).contiguous()
    at = torch.searchsorted(share, wanted).clamp(max=mass.shape[1] - 1)
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
    return [head | {"seed": s} | {k: f"{v[i].item():.4f}" for k, v in values.items()} for i, s in enumerate(seeds)]


ARMS = {"GRPO": (None, False), "GRPO with std": (None, True), "CAPO 0.5": (.5, False), "CAPO 0.5 with std": (.5, True),
        "CAPO 0.1": (.1, False), "CAPO 0.25": (.25, False), "CAPO 1": (1., False), "CAPO 2": (2., False)}
CLOSE = "GRPO", "CAPO 0.5"                                                            # followed at every step


def paths(cfg, seeds, arms=ARMS):
    "Rows by file: the paths, AUC with draws and scores exchanged, cosines, precision, AUC-mean by group size."
    base, train, test = start(seeds, cfg)
    grid, log, swaps, angles, curves, sizes = torch.linspace(.05, 1, 20), [], [], [], [], []
    def last(arm, w):
        for s, row in zip(seeds, coverage_curve(w, *test, grid)):
            curves.extend(dict(arm=arm, seed=s, coverage=f"{c:.2f}", precision=f"{v:.4f}") for c, v in zip(grid, row))
        for G, values in by_group_size(w, *test).items(): sizes.extend(rows(values, seeds, arm=arm, group=G))
    last("base", base)
    for arm, (tau, std) in arms.items():
        marks = {}
        for step, w in climb(base, train, cfg, tau, std):
            close, tenth, at = arm in CLOSE, step % cfg["every"] == 0, dict(arm=arm, step=step)
            if close or tenth: log += rows(measure(w, *test, cfg), seeds, **at)
            if step in cfg["marks"]: marks[step] = {k: v.detach().clone() for k, v in w.items()}
            if not close or not tenth: continue
            for mark, then in marks.items(): swaps += rows(exchanged(w, then, *test, cfg), seeds, **at, mark=mark)
            if step % (3 * cfg["every"]) == 0: angles += rows(cosines(w, *train, cfg, .5), seeds, **at)
        if arm in CLOSE: last(arm, w)
        print(arm, flush=True)
    return {"": log, "_exchanged": swaps, "_cosines": angles, "_coverage": curves, "_groups": sizes}


def phase(cfg, seeds, noises=(0., .125, .25, .5, .75), widths=(4, 8, 12, 24, 48)):
    "The last policies under other noise in the corpus and other widths of the network."
    log = []
    for noise in noises:
        for width in widths:
            c = cfg | dict(noise=noise, width=width)
            base, train, test = start(seeds, c)
            def note(arm, w):
                for part, data in (("test", test), ("train", train)):
                    figures, where = measure(w, *data, c), dict(noise=noise, width=width, arm=arm, part=part)
                    log.extend(rows({k: figures[k] for k in ("accuracy", "auc_mean", "auc_pooled")}, seeds, **where))
            note("base", base)
            for arm in CLOSE:
                for _, w in climb(base, train, c, *ARMS[arm]): pass
                note(arm, w)
        print("noise", noise, flush=True)
    return {"_phase": log}


def save(name, log):
    with (DATA/name).open("w", newline="") as f:
        writer = csv.DictWriter(f, list(log[0]), lineterminator="\n"); writer.writeheader(); writer.writerows(log)


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--part", choices=["paths", "phase"], nargs="*", default=["paths", "phase"])
    ask.add_argument("--seeds", type=int, default=10)
    todo = ask.parse_args()
    torch.set_num_threads(1)
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=DATA)
    about = DATA/"exact_toy.json"
    for part in todo.part:
        begin, seeds = time.process_time(), list(range(todo.seeds if part == "paths" else min(6, todo.seeds)))
        for name, log in dict(paths=paths, phase=phase)[part](CONFIG, seeds).items(): save(f"exact_toy{name}.csv", log)
        info = json.loads(about.read_text()) if about.exists() else {}
        command = f"python nbs/tools/exact_toy.py --part {part} --seeds {todo.seeds}"
        info[part] = dict(command=command, config=CONFIG, seeds=seeds, commit=head.stdout.strip(),
                          torch=torch.__version__, cpu_seconds=round(time.process_time() - begin))
        about.write_text(json.dumps(info, indent=1) + "\n")
