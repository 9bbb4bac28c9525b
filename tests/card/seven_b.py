"""The table of times at Qwen2.5-7B's shapes, on one card: random bfloat16 weights, so nothing is downloaded.

    python tests/card/seven_b.py --out data/speed_7b.json     # about four minutes on an H100 or H200
    python tests/card/seven_b.py --shapes small               # the same steps in seconds, anywhere

Every row is written as it is measured: a run that is lost keeps what it had.
"""
import argparse, json, resource, tempfile, time
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np, torch, transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from intattn_edit.engine.facts import Edit, Fact, load_facts
from intattn_edit.engine.hooks import capture, stop_after
from intattn_edit.engine.models import LM, Site, sites
from intattn_edit.engine.preserve import preserve_texts
from intattn_edit.engine.store import Store, data_dir
from intattn_edit.engine.tokens import batches, collate, encode, hidden_of
from intattn_edit.method import moments as moments_module
from intattn_edit.method.editor import default_layers, editor
from intattn_edit.method.keys_values import Objective, find_values
from intattn_edit.method.metrics import evaluate, unedited_answers
from intattn_edit.method.moments import moments_for, second_moments
from intattn_edit.method.solve import factor, ridge
from intattn_edit.method.tracing import trace_facts

SHAPES = {
    "7b": dict(vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
               num_attention_heads=28, num_key_value_heads=4),
    "small": dict(vocab_size=8_192, hidden_size=128, intermediate_size=384, num_hidden_layers=12,
                  num_attention_heads=4, num_key_value_heads=2),
}

def random_lm(shapes, device):
    "A model of these shapes with random weights, made where it shall lie."
    config = Qwen2Config(**SHAPES[shapes], tie_word_embeddings=False, dtype=torch.bfloat16)
    torch.manual_seed(0)
    with torch.device(device): model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(data_dir()/"lab/qwen2")
    return LM(model, tokenizer, f"random/{shapes}")

class Table:
    "Rows, printed and written as they are measured."
    def __init__(self, path, about):
        self.path, self.about, self.rows = path, about, []

    def add(self, what, seconds=None, **more):
        self.rows.append(dict(what=what, seconds=seconds, **more))
        said = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                         for k, v in more.items())
        time_said = "" if seconds is None else f"{seconds:8.3f} s  "
        print(f"{time_said}{what}{': ' if said else ''}{said}", flush=True)
        if self.path: Path(self.path).write_text(json.dumps(self.about | {"rows": self.rows}, indent=1))

class Timer:
    "Seconds of a block, after the card has finished; its own peak memory in GB."
    def __init__(self, cuda): self.cuda = cuda

    def __enter__(self):
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.begun = time.perf_counter()
        return self

    def __exit__(self, *_):
        if self.cuda: torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.begun
        self.card_gb = torch.cuda.max_memory_allocated()/1e9 if self.cuda else 0.

def host_gb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e6

def six_tokens(lm, n):
    "Facts whose prompt has six tokens, the subject first."
    rng, facts = np.random.default_rng(0), []
    while len(facts) < n:
        ids = rng.integers(300, 1200, 6).tolist()
        subject = lm.tokenizer.decode(ids[:3]).strip()
        fact = Fact(subject, f"{subject} {lm.tokenizer.decode(ids[3:]).strip()}", ("Paris",))
        try: row = encode(lm, fact.prompt, fact.subject)
        except ValueError: continue # tokens that are no text by themselves
        if len(row) == 6 and row.subject[0] == 0: facts.append(fact)
    return facts

def rates(lm, table, device):
    "What the card reaches: products of the model's shape, float64 products, copies."
    W = lm.weight(Site("mlp", 0))
    x = torch.randn(8192, W.shape[1], device=device, dtype=W.dtype)
    for dtype, name, d in ((W.dtype, "bfloat16", None), (torch.float64, "float64", 4096)):
        a, b = (x, W.T) if d is None else (torch.randn(d, d, device=device, dtype=dtype),)*2
        a @ b
        with Timer(device == "cuda") as t:
            for _ in range(5): a @ b
        flops = 5*2*a.shape[0]*a.shape[1]*b.shape[1]/t.seconds
        table.add(f"products in {name}", None, TFLOPs=flops/1e12)

def traces(lm, table, timed, n_known):
    "One fact, ten facts, and what alpha needs of three hundred."
    facts, kinds = six_tokens(lm, 30), ("h", "mlp", "attn")
    run = partial(trace_facts, lm, draws=10, std=.02)
    run(facts[:1], kinds)
    with timed() as t: one = run(facts[1:2], kinds)
    tokens = int(one.token.nunique())
    table.add("trace of one fact, three kinds, all tokens, 10 draws", t.seconds,
              tokens=tokens, states=len(one), card_GB=t.card_gb)
    run(facts[10:20], kinds)
    with timed() as t: run(facts[20:30], kinds)
    table.add("the same, ten facts together, a fact", t.seconds/10, card_GB=t.card_gb)
    known = load_facts("lab/known", seed=0)[:n_known]
    run(known[:5], ("mlp", "attn"), roles=("last subject",))
    with timed() as t: run(known, ("mlp", "attn"), roles=("last subject",))
    table.add("trace for alpha: MLP and attention at the subject's last token", t.seconds,
              facts=len(known), card_GB=t.card_gb)

def targets(lm, edits, store, table, timed, site):
    "25 steps for every edit: none stops early."
    objective = Objective(steps=25, stop=0.)
    find_values(lm, edits[:4], site, Objective(steps=2, stop=0.))
    with timed() as t: find_values(lm, edits, site, objective, store=store)
    table.add("targets, 25 steps", t.seconds, edits=len(edits), card_GB=t.card_gb)
    return objective

def texts_of(n_tokens):
    "The lab's sentences, six drawn at a time."
    each, rng = list(preserve_texts("lab")), np.random.default_rng(0)
    return [" ".join(rng.choice(each, 6)) for _ in range(n_tokens//30)]

@torch.no_grad()
def accuracy(lm, texts, site, table, device):
    "bfloat16 products with float32 sums, and float32 ones, beside float64: of C, and of an edit."
    rows = [encode(lm, t) for t in texts[:800]]
    whole, parts, n = 0, {"bfloat16 products, float32 sums": 0, "float32 products and sums": 0}, 0
    for part in batches(rows, 4096):
        batch = collate([rows[i] for i in part], lm.pad_id)
        with capture({"k": lm.proj(site)}, inputs=True) as seen, stop_after(lm.block(site.layer)):
            hidden_of(lm, batch)
        k = seen["k"][batch.mask.bool().to(device)]
        n += len(k)
        whole = whole + k.double().T @ k.double()
        parts["bfloat16 products, float32 sums"] += moments_module._product(k)
        parts["float32 products and sums"] += k.float().T @ k.float()
    eye = whole.diagonal().mean()/n*torch.eye(len(whole), device=device, dtype=torch.float64)
    K = k[:100].double().T
    R = torch.randn(lm.d_model, K.shape[1], device=device, dtype=torch.float64)
    def update(C):
        A, B = ridge(K, R, factor(C.double()/n + 1e-3*eye, 100.))
        return A @ B
    true = update(whole)
    for name, C in parts.items():
        table.add(f"{name}, against float64", None, tokens=n, columns=len(whole),
                  of_C=((C - whole).norm()/whole.norm()).item(),
                  of_an_edit=((update(C) - true).norm()/true.norm()).item())

def statistics(lm, texts, each, store, table, timed, n_tokens):
    "The moments of all sites in one pass, moved to the host as halves, then into the store."
    second_moments(lm, texts[:50], each[:1])
    before = host_gb()
    with timed() as t: found = second_moments(lm, texts, each, n_tokens, halves=True)
    table.add("second moments", t.seconds, tokens=found.count, sites=len(each),
              tokens_a_second=found.count/t.seconds, card_GB=t.card_gb,
              host_GB=host_gb(), host_GB_before=before)
    with timed() as t: kept = moments_for(lm, texts, each, store, n_tokens)
    files = sum(f.stat().st_size for f in Path(store.root).rglob("*.safetensors"))
    table.add("the same, with the texts' hash and the store", t.seconds, file_GB=files/1e9,
              host_GB=host_gb())
    with timed() as t: kept = moments_for(lm, texts, each, store, n_tokens)
    table.add("from the store", t.seconds)
    return kept

def solves(lm, edits, moments, objective, store, table, timed, layers):
    "One factor, by estimate and by all eigenvalues; an editor's call; sweeps."
    mlp, attn = layers
    C = moments.on(Site("mlp", mlp[0]), lm.device)
    factor(C, 1.)
    with timed() as t: factor(C, 1.)
    table.add("factor, condition number estimated", t.seconds, columns=len(C), card_GB=t.card_gb)
    with timed() as t: factor(C, 1., exact=True)
    table.add("factor, all eigenvalues (as before)", t.seconds, columns=len(C))
    del C
    settings = {"mlp": {"layers": mlp}, "attn": {"layers": attn}, "alpha": .3, "objective": objective}
    def call(**more):
        own = {k: v for k, v in settings.items()} | more
        made = editor("IntAttn A", {"intattn_a": own})
        return made(lm, edits, store=store, moments=moments, check=False)
    call()
    moments._factors.clear()
    with timed() as t: delta = call()
    table.add("IntAttn of these edits, targets and moments there: keys, 8 factors, solves", t.seconds,
              edits=len(edits), card_GB=t.card_gb, host_GB=host_gb())
    with timed() as t: delta = call()
    table.add("the same, factors kept", t.seconds)
    with timed() as t:
        for alpha in (.1, .2, .4, .5, .6): call(alpha=alpha)
    table.add("alpha sweep, factors kept, a point", t.seconds/5)
    with timed() as t:
        for lam in (1e2, 1e3, 1e4, 1e5, 1e6):
            call(mlp={"layers": mlp, "lam": lam}, attn={"layers": attn, "lam": lam})
    table.add("lambda sweep, factors kept, a point", t.seconds/5)
    return delta

def evaluation(lm, edits, delta, table, timed):
    "The five columns of the edited model."
    base = unedited_answers(lm, edits)
    with delta.applied(lm):
        evaluate(lm, edits[:4], base=base, fluency=1)
        with timed() as t: evaluate(lm, edits, base=base, fluency=10)
    table.add("evaluation, ten continued to 100 tokens", t.seconds, edits=len(edits),
              card_GB=t.card_gb)

def main(shapes, device, out, n_tokens, n_edits):
    chip = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    about = dict(chip=chip, date=str(date.today()), torch=torch.__version__,
                 transformers=transformers.__version__, shapes=SHAPES[shapes])
    print(about, flush=True)
    table, timed = Table(out, about), partial(Timer, device == "cuda")
    with timed() as t: lm = random_lm(shapes, device)
    table.add("random weights made", t.seconds)
    with timed() as t: lm.fingerprint
    size = sum(p.numel()*p.element_size() for p in lm.model.parameters())
    table.add("fingerprint of the weights", t.seconds, GB=size/1e9)
    rates(lm, table, device)
    traces(lm, table, timed, 300 if shapes == "7b" else 10)

    mlp, attn = (default_layers(lm.n_layers, kind) for kind in ("mlp", "attn"))
    edits = load_facts("lab/zsre", n=n_edits, seed=0)
    texts = texts_of(n_tokens)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        objective = targets(lm, edits, store, table, timed, Site("h", mlp[-1]))
        moments = statistics(lm, texts, sites(mlp=mlp, attn=attn), store, table, timed, n_tokens)
        accuracy(lm, texts, Site("mlp", mlp[0]), table, device)
        delta = solves(lm, edits, moments, objective, store, table, timed, (mlp, attn))
    evaluation(lm, edits, delta, table, timed)

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--shapes", default="7b", choices=SHAPES)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--out")
parser.add_argument("--tokens", type=int, default=245_592)
parser.add_argument("--edits", type=int, default=100)
given = parser.parse_args()
main(given.shapes, given.device, given.out, given.tokens, given.edits)
