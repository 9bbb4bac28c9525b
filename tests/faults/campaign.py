"""Faults on purpose: what survives signals, kills, full disks and other writers?

    python tests/faults/campaign.py                 # the short form, for CI
    python tests/faults/campaign.py --long          # writes data/faults/campaign.json, which the docs show

A line for each kind of fault: tried, how many came while the work was under way, lost. Exit 1 if
any was lost."""
import argparse, contextlib, os, random, resource, shutil, signal, sys, tempfile, threading, time
import warnings
from functools import partial
from pathlib import Path

warnings.filterwarnings("ignore")
import torch
from intattn_edit.editors.finetune import substituted
from intattn_edit.engine.facts import Edit
from intattn_edit.engine.hooks import capture, patch, record, stop_after
from intattn_edit.engine.models import Site
from intattn_edit.engine import store as store_module
from intattn_edit.engine.store import Store, load_both, load_json, save_json
from intattn_edit.engine.tiny import tiny_lm
from intattn_edit.engine.tokens import collate, encode, hidden_of
from intattn_edit.engine.weights import quiet
from intattn_edit.method.delta import Delta, load_delta, provenance, without_deltas
from intattn_edit.method.editor import METHODS, editor
from intattn_edit.method.keys_values import Values, _kept
from intattn_edit.method.moments import moments_for
from intattn_edit.tools.bench import Bench, EditStack
from intattn_edit.tools.export import save_merged, take_back, to_peft
from intattn_edit.tools.records import Results

torch.set_num_threads(1)
def no_sync(path): "Only a power failure takes what was written: nobody waits for the disk here."
store_module._sync = no_sync

# ---------------------------------------------- signals
class Signals:
    "Sends real SIGINTs while an action runs; they raise KeyboardInterrupt until it has ended."
    def __init__(self, rng):
        self.rng, self.open, self.came = rng, False, 0
        signal.signal(signal.SIGINT, self.handle)

    def handle(self, signum, frame):
        if not self.open: return
        self.came += 1
        raise KeyboardInterrupt

    def send(self, delays):
        for delay in delays:
            time.sleep(delay)
            os.kill(os.getpid(), signal.SIGINT)

    def strike(self, action, seconds):
        "Run the action under one or two signals; how many arrived in it."
        delays = [self.rng.uniform(0, seconds)]
        if self.rng.random() < .3: delays.append(self.rng.uniform(0, min(.002, seconds)))
        sender = threading.Thread(target=self.send, args=(delays,))
        self.came = 0
        try:
            self.open = True
            sender.start()
            action()
            self.open = False
        except KeyboardInterrupt: self.open = False
        sender.join()
        time.sleep(.003) # a signal that was put off comes now
        return len(delays), self.came

class State:
    "Everything of a model and of torch that a fault must not change."
    def __init__(self, lm):
        self.lm = lm
        self.tensors = {n: (t, t.data_ptr(), t.detach().clone())
                        for n, t in lm.model.state_dict(keep_vars=True).items()}
        self.rest = self.look()

    def look(self):
        model = self.lm.model
        hooks = [len(v) for m in model.modules() for k, v in vars(m).items() if "hooks" in k]
        kept = [(type(m), m.training, *sorted(vars(m))) for m in model.modules()]
        grads = [(p.requires_grad, p.grad is None) for p in model.parameters()]
        deltas = len(vars(self.lm).get("deltas", []))
        return dict(hooks=hooks, modules=kept, gradients=grads, deltas=deltas,
                    grad_mode=torch.is_grad_enabled(), inference=torch.is_inference_mode_enabled(),
                    rng=torch.get_rng_state().tolist(), handler=signal.getsignal(signal.SIGINT))

    def wrong(self):
        "What is not as it was."
        now = self.look()
        found = [k for k in now if now[k] != self.rest[k]]
        tensors = self.lm.model.state_dict(keep_vars=True)
        for name, (t, where, values) in self.tensors.items():
            same = tensors.get(name) is t and t.data_ptr() == where
            if not (same and torch.equal(t.detach(), values)): found.append(name)
        return found

EDITS = [Edit("Anna", "Anna lives in", ("Paris",), target_new="Rome"),
         Edit("Ben", "Ben works in", ("London",), target_new="Bonn")]
SITES = [Site("mlp", 0), Site("mlp", 1), Site("attn", 0), Site("attn", 1)]

def random_delta(lm, sites, seed):
    g = torch.Generator().manual_seed(seed)
    factors = {}
    for site in sites:
        d_out, d_in = lm.weight(site).shape
        factors[lm.weight_name(site)] = (torch.randn(d_out, 2, generator=g),
                                         torch.randn(2, d_in, generator=g))
    return Delta(factors, {"method": f"random {seed}"} | provenance(lm))

def weight_actions(lm):
    "name -> what is done with deltas, hooks and recorded passes."
    one, two = random_delta(lm, SITES[:3], 1), random_delta(lm, SITES[1:], 2)
    batch = collate([encode(lm, e.prompt, e.subject) for e in EDITS], lm.pad_id)

    def nested():
        with one.applied(lm), two.applied(lm):
            with without_deltas(lm): hidden_of(lm, batch)
    def stacked():
        stack = EditStack(lm)
        try:
            for delta in (one, two): stack.apply(EDITS[0], "MEMIT", delta)
        finally: stack.close()
    def hooked():
        module = lm.mlp(1)
        with torch.no_grad(), capture({"x": module}), patch({module: torch.zeros_like}):
            with stop_after(lm.block(1)): hidden_of(lm, batch)
    def exchanged():
        module = lm.proj(SITES[0])
        with substituted(module, module.weight + 1), torch.no_grad(): hidden_of(lm, batch)
    def once():
        with one.applied(lm): pass
    return {"a delta put on and taken off": once, "two deltas, and the model without them": nested,
            "the bench's stack": stacked, "hooks": hooked, "a weight in training": exchanged,
            "a recorded pass": lambda: record(lm, batch)}

SMALL = {"FT": dict(steps=3), "FT-L": dict(steps=3), "LoRA": dict(steps=3, r=2)}

def editor_actions(lm, methods):
    "method -> an edit of two facts by it, with small settings."
    texts = [f"{e.prompt} {e.target_new} and {o}" for e in EDITS for o in ("Rome", "Paris", "Bonn")]
    sites = [Site(kind, layer) for kind in ("mlp", "attn") for layer in range(lm.n_layers)]
    moments = moments_for(lm, texts, sites, Store(None))
    def edit(made): return made(lm, EDITS, store=Store(None), moments=moments, check=False)
    found = {}
    for method in methods:
        changes = SMALL.get(method) or {"objective": {"steps": 3}}
        found[method] = partial(edit, editor(method, **changes))
    return found

def signalled(actions, lm, count, rng):
    """Strike until so many have arrived inside; (signals sent, those inside, what was left changed
    by which action)."""
    signals = Signals(rng)
    state, seconds = State(lm), {}
    for name, action in actions.items():
        action() # what it keeps on the model the first time is not its fault
        begun = time.perf_counter()
        action()
        seconds[name] = time.perf_counter() - begun
    state, sent, inside, lost = State(lm), 0, 0, []
    names = list(actions)
    while inside < count:
        name = rng.choice(names)
        n, came = signals.strike(actions[name], seconds[name])
        sent, inside = sent + n, inside + came
        wrong = state.wrong()
        if wrong:
            lost.append(f"{name}: {', '.join(wrong[:4])}")
            with contextlib.suppress(Exception): lm.deltas = []
            for t, where, values in state.tensors.values(): # go on from whole weights
                if not torch.equal(t.detach(), values): t.data = values.clone()
            torch.set_grad_enabled(True)
            state = State(lm)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return sent, inside, lost

# ---------------------------------------------- kill points and full disks
POINTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree",
          "shutil.copyfile"}
WRITING = os.O_WRONLY | os.O_RDWR

def in_child(action, before=lambda: None):
    "Run it in a forked process; its exit status (negative: the signal that ended it)."
    pid = os.fork()
    if not pid:
        code = 1
        try:
            with open(os.devnull, "w") as null: os.dup2(null.fileno(), 2)
            before()
            action()
            code = 0
        except BaseException: code = 3
        finally: os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def killed_at(k, folder):
    "Kill this process at the k-th change of a file in the folder; count if k is None."
    seen = [0]
    def hook(event, args):
        if event not in POINTS or not args or str(folder) not in str(args[0]): return
        if event == "open" and len(args) > 2 and not (args[2] or 0) & WRITING: return
        seen[0] += 1
        if seen[0] == k: os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    return seen

def small_disk(size):
    "From now on no file of this process grows beyond so many bytes."
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

class Work:
    "Something that writes over something: set up, do it, look what is there."
    def __init__(self, name, prepare, act, look):
        self.name, self.prepare, self.act, self.look = name, prepare, act, look

    def attempt(self, root, limit):
        "None, or what is wrong after the child has been stopped."
        folder = root/"box"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        store_module._SWEPT.clear() # each time as if this process were new
        self.prepare(folder)
        store_module._SWEPT.clear()
        status = in_child(lambda: self.act(folder), partial(limit, folder))
        problem = None
        try: problem = self.look(folder)
        except Exception as e: problem = f"{type(e).__name__}: {e}"
        if problem is None: # the same again, undisturbed: it must go through, and sweep
            again = in_child(lambda: self.act(folder))
            if again and self.name != "revert": problem = f"cannot be repeated ({again})"
            if not again and list(folder.rglob(".*.tmp")): problem = "litter stays"
        return status, problem and f"{self.name}: {problem}"

    def points(self, root):
        "How many kill points it has."
        folder, count = root/"box", root/"count"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self.prepare(folder)
        def act():
            seen = killed_at(None, folder)
            self.act(folder)
            count.write_text(str(seen[0]))
        assert not in_child(act), self.name
        return int(count.read_text())

def works(lm, root):
    a, b = random_delta(lm, SITES[:3], 1), random_delta(lm, SITES[:3], 2)
    c = random_delta(lm, SITES, 3)
    ids = {d.id: d.meta["method"] for d in (a, b, c)}

    def one_delta(folder):
        found = load_delta(folder)
        if ids.get(found.id) != found.meta["method"]: return "tensors of one, meta of another"
    yield Work("a delta over a delta", a.save, b.save, one_delta)

    def bench_save(delta, edit, folder):
        bench = Bench(lm, Store(None))
        bench.apply(edit, "MEMIT", delta)
        bench.save(folder)
        bench.close()
    marks = {a.id: EDITS[0].prompt, b.id: EDITS[1].prompt}
    def bench_look(folder):
        if problem := one_delta(folder): return problem
        facts = folder/"facts.json"
        if facts.exists() and marks[load_delta(folder).id] not in facts.read_text():
            return "facts of one edit, delta of another"
    yield Work("the bench's save over another", partial(bench_save, a, EDITS[0]),
               partial(bench_save, b, EDITS[1]), bench_look)

    old, new = {"value": [0]*2000}, {"value": [1]*2000}
    def json_look(folder):
        if load_json(folder/"x.json") not in (old, new): return "neither old nor new"
    yield Work("a JSON file", lambda f: save_json(f/"x.json", old),
               lambda f: save_json(f/"x.json", new), json_look)

    def stored(folder): Store(folder).get_or("moments", 1, lambda: {"C": torch.eye(40)})
    def store_look(folder):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Store(folder).get_or("moments", 1, lambda: {"C": torch.eye(40)})
    yield Work("an entry of the store", lambda f: None, stored, store_look)

    def written(seed): return {"cell": {"seed": seed}, "x": [.5*seed]*50}
    def write(folder, seeds):
        for s in seeds: Results(folder).write("toy", {"seed": s}, written(s))
    def records_look(folder):
        found = Results(folder).records("toy")
        if found != [written(s) for s in range(len(found))] or len(found) < 2: return str(found)
    yield Work("records", partial(write, seeds=[0, 1]), partial(write, seeds=[2, 3]), records_look)

    base, sharded = root/"base", root/"sharded"
    with quiet():
        lm.model.save_pretrained(base)
        lm.tokenizer.save_pretrained(base)
    def weights(folder):
        index = folder/"model.safetensors.index.json"
        files = {"model.safetensors"}
        if index.exists(): files = set(load_json(index)["weight_map"].values())
        return {n: t for f in files for n, t in load_both(folder/f)[0].items()}
    name, lm.name = lm.name, str(base)
    own = random_delta(lm, SITES, 3)
    save_merged(lm, own, sharded, max_shard_size="30KB")
    start, edited = weights(base), weights(sharded)
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    def same(x, y): return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)
    def reverted(folder):
        with contextlib.suppress(FileNotFoundError): take_back(folder/"m") # there is no edit: done
    def revert_look(folder):
        now = weights(folder/"m")
        if not (same(now, start) or same(now, edited)): return "a mixture of shards"
        reverted(folder)
        if not same(weights(folder/"m"), start): return "not the original after a second call"
    yield Work("revert", lambda f: shutil.copytree(sharded, f/"m"), reverted, revert_look)

    def absent_or_whole(make, whole):
        def look(folder):
            if (folder/"m").exists() and not whole(folder/"m"): return "half a folder"
        def act(folder):
            with contextlib.suppress(FileExistsError): make(folder/"m")
        return lambda f: None, act, look
    yield Work("a merged model", *absent_or_whole(
        lambda f: save_merged(lm, own, f, max_shard_size="30KB"),
        lambda f: same(weights(f), edited)))
    files = ("adapter_config.json", "adapter_model.safetensors", "README.md")
    yield Work("a LoRA adapter", *absent_or_whole(
        lambda f: to_peft(own, f, lm), lambda f: all((f/n).exists() for n in files)))

def stopped_writers(lm, kills, disks, rng):
    "Kill points and full disks of all that writes: two lists of (tried, ended inside, lost)."
    with tempfile.TemporaryDirectory() as d:
        root = Path(d)
        every = list(works(lm, root))
        points = [(w, k) for w in every for k in range(1, w.points(root) + 1)]
        print(f"  {len(points)} kill points: " +
              ", ".join(f"{w.name} {sum(p[0] is w for p in points)}" for w in every), flush=True)
        if kills < len(points): points = rng.sample(points, kills)
        else: points = (points*(kills//len(points) + 1))[:kills]
        killed, lost = 0, []
        for work, k in points:
            status, problem = work.attempt(root, lambda f, k=k: killed_at(k, f))
            killed += status == -signal.SIGKILL
            if problem:
                lost.append(f"{problem} (point {k})")
                print("  lost:", lost[-1], flush=True)
        full, short = 0, []
        for i in range(disks):
            size = int(2**rng.uniform(4, 17))
            status, problem = every[i % len(every)].attempt(root, lambda f: small_disk(size))
            full += status == 3
            if problem: short.append(f"{problem} ({size} bytes)")
        return (len(points), killed, lost), (disks, full, short)

# ---------------------------------------------- readers and writers beside each other
def torn_reads(lm, count):
    "Load a delta so often while another process saves two in turn."
    a, b = random_delta(lm, SITES, 1), random_delta(lm, SITES, 2)
    ids, lost, changes, last = {d.id: d.meta["method"] for d in (a, b)}, [], 0, None
    with tempfile.TemporaryDirectory() as d:
        a.save(d)
        writer = os.fork()
        if not writer:
            while True:
                for delta in (b, a): delta.save(d)
        try:
            for _ in range(count):
                try:
                    found = load_delta(d)
                    changes += found.id != last
                    last = found.id
                    if ids.get(found.id) != found.meta["method"]: lost.append("a mixture")
                except Exception as e: lost.append(f"{type(e).__name__}: {e}")
        finally:
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
    return count, changes, lost

def shared_shelf(processes, each):
    "Processes that put targets on one shelf, and records into one file: all must be there."
    with tempfile.TemporaryDirectory() as d:
        shelf, results = Path(d)/"shelf.safetensors", Path(d)/"results"
        def edit(p, i): return Edit("Anna", f"{p}-{i} Anna", ("x",), target_new="y")
        def find(new):
            n = len(new)
            z, h0, loss = torch.ones(n, 4), torch.zeros(n, 4), torch.zeros(n)
            return Values(z, h0, loss, loss.long())
        def work(p):
            for i in range(each):
                _kept(None, [edit(p, i)], shelf, find)
                cell = {"seed": p*each + i}
                Results(results).write("toy", cell, {"cell": cell})
        children = []
        for p in range(processes):
            if not (pid := os.fork()):
                work(p)
                os._exit(0)
            children.append(pid)
        for pid in children: os.waitpid(pid, 0)
        kept = len(load_both(shelf)[0]["z"])
        written = len(Results(results).records("toy"))
    n = processes*each
    lost = [f"{n - kept} targets"]*(kept < n) + [f"{n - written} records"]*(written < n)
    return 2*n, 2*n, lost

# ---------------------------------------------- the whole
PARTS = ("files", "reads", "shelf", "deltas", "editors")
SHORT = dict(files=(40, 16), reads=300, shelf=(3, 6), deltas=200, editors=40)
LONG = dict(files=(520, 200), reads=2000, shelf=(3, 40), deltas=4400, editors=640)
FAST = ["MEMIT", "IntAttn", "AlphaEdit", "FT", "LoRA"]

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--long", action="store_true", help="the numbers of the docs: half an hour")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    p.add_argument("--share", type=float, default=1, help="of the faults; other seeds give others")
    p.add_argument("--out", type=Path, help="JSON to add to [with --long: data/faults/campaign.json]")
    args = p.parse_args()
    sizes, begun = LONG if args.long else SHORT, time.time()
    out = args.out or (Path("data/faults/campaign.json") if args.long else None)
    tried = lost = 0
    for part in args.parts:
        lm, rng = tiny_lm("qwen2"), random.Random(f"{args.seed} {part}")
        size = sizes[part]
        if isinstance(size, tuple): size = tuple(max(1, round(n*args.share)) for n in size)
        else: size = max(1, round(size*args.share))
        for fault, on, result in run_part(part, lm, size, rng, args.long):
            n, inside, failures = result
            row = dict(fault=fault, on=on, tried=n, inside=inside, lost=len(failures))
            tried, lost = tried + n, lost + len(failures)
            print(f"{fault}, {on}: {n} tried, {inside} while at work, {len(failures)} lost "
                  f"({time.time() - begun:.0f} s)", flush=True)
            for text in failures[:5]: print("  lost:", text, flush=True)
            if out: keep(out, row | dict(seed=args.seed))
    print(f"{tried} faults, {lost} lost")
    return bool(lost)

def run_part(part, lm, size, rng, every):
    "Yield (fault, on what, (tried, while at work, lost))."
    if part == "files":
        killed, full = stopped_writers(lm, *size, rng)
        yield "kill", "whatever writes files", killed
        yield "full disk", "whatever writes files", full
    if part == "reads": yield "read beside a writer", "a saved delta", torn_reads(lm, size)
    if part == "shelf":
        yield "writers beside each other", "targets and records", shared_shelf(*size)
    if part == "deltas":
        yield "signal", "deltas and hooks", signalled(weight_actions(lm), lm, size, rng)
    if part == "editors":
        methods = [m for m in METHODS if every or m in FAST]
        edits = editor_actions(lm, methods)
        yield "signal", f"{len(methods)} editors", signalled(edits, lm, size, rng)

def keep(path, row):
    "Put the row into the file, in the place of the one of the same seed."
    with store_module.one_at_a_time(path):
        rows = load_json(path)["rows"] if path.exists() else []
        keys = "fault", "on", "seed"
        rows = [r for r in rows if any(r[k] != row[k] for k in keys)] + [row]
        save_json(path, dict(rows=sorted(rows, key=lambda r: [r[k] for k in keys])))

if __name__ == "__main__": sys.exit(main())
