#!/usr/bin/env python
"""How much memory large work takes: each load in a process of its own, its peak and its seconds.

    python tests/faults/load.py                     # all, into data/faults/load.json: twenty minutes
    python tests/faults/load.py csv --out x.json    # one
"""
import argparse, gc, json, os, resource, subprocess, sys, tempfile, time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

from dataclasses import replace

from intattn_edit.engine.facts import Edit, load_facts, validate_batch
from intattn_edit.engine.models import load_lm
from intattn_edit.engine.preserve import preserve_texts
from intattn_edit.engine.store import Store, load_json, project_root, save_json
from intattn_edit.method.editor import editor, settings_of
from intattn_edit.method.metrics import evaluate

def resident(): # MiB
    return int(Path("/proc/self/statm").read_text().split()[1])*resource.getpagesize()/2**20

def peak(): # MiB; ru_maxrss would begin with what the parent had
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith("VmHWM"))/2**10

def csv(folder, n=100_000): # rows
    "A CSV file of n rows, of which ten are taken."
    path = folder/"facts.csv"
    with open(path, "w") as f:
        f.write("subject,prompt,target_new,rephrase_prompt,locality_prompt,locality_answer\n")
        for i in range(n):
            f.write(f"Town {i},{{}} lies in,Ostra,Where is {{}}?,Hamlet {i} lies in,Lund\n")
    yield
    assert len(load_facts(path, n=10, seed=0)) == 10

def preserve(folder, n=200): # MB
    "A text of n MB, of which a thousand passages are taken."
    path, passage = folder/"texts.txt", "The river runs past the mill, and past the town of Lund. "*8
    with open(path, "w") as f:
        while f.tell() < n*10**6: f.write(f"{f.tell()} {passage}\n\n")
    yield
    assert len(preserve_texts(path, n=1000)) == 1000

def batch(folder, n=5000): # edits
    "n facts in one batch: values, keys, solution, and the look at the edited model."
    lm, edits = load_lm("lab/qwen2"), many_edits(n)
    quick = editor("MEMIT", settings_of("lab/qwen2"))
    quick = replace(quick, objective=replace(quick.objective, steps=5))
    store = Store(folder)
    quick(lm, edits[:1], store) # statistics are found once
    yield
    delta = quick(lm, edits, store)
    with delta.applied(lm): assert len(evaluate(lm, edits, metrics=("edit_success",))) == n

def many_edits(n):
    "n edits of the lab's subjects and sentences, each pair once."
    own = load_facts("lab/zsre")
    targets = {e.template: e.target_new for e in own}
    subjects = list(dict.fromkeys(e.subject for e in own))
    made = [Edit(s, template.replace("{}", s), target_new=target, case_id=f"{i} {s}")
            for i, (template, target) in enumerate(targets.items()) for s in subjects]
    return validate_batch(made[:n])

def sequence(folder, n=300): # edits
    "n edits, one after the other, each applied, asked and taken back."
    lm, edits = load_lm("lab/qwen2"), load_facts("lab/zsre", n=n, seed=0)
    method, store = editor("IntAttn", settings_of("lab/qwen2")), Store(folder)
    method(lm, edits[:1], store)
    yield
    sizes = []
    for edit in edits:
        delta = method(lm, [edit], store)
        with delta.applied(lm): evaluate(lm, [edit], fluency=0)
        gc.collect()
        sizes.append(resident())
    tenth, largest = sizes[9], max(sizes[9:])
    print(f"after 10 edits {tenth:.0f} MiB, at most {largest:.0f}", file=sys.stderr)
    yield {"after_10": tenth, "most_later": largest}

LOADS = {"csv": csv, "preserve": preserve, "batch": batch, "sequence": sequence}

def measure(name, size):
    "One load, in this process."
    with tempfile.TemporaryDirectory() as d:
        work = LOADS[name](Path(d), *([size] if size else []))
        next(work) # makes the input
        before, start = resident(), time.process_time()
        more = next(work, None) or {}
        seconds = time.process_time() - start
    what = LOADS[name].__doc__.split("\n")[0]
    return {"load": name, "what": what, "size": size or LOADS[name].__defaults__[0],
            "before": before, "peak": peak(), "seconds": seconds, **more}

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("loads", nargs="*", help=", ".join(LOADS))
    p.add_argument("--size", type=int, help="rows, MB or edits; several sizes tell what grows")
    p.add_argument("--out", default=project_root()/"data"/"faults"/"load.json", type=Path)
    p.add_argument("--here", action="store_true", help="in this process, printed as JSON")
    a = p.parse_args()
    if a.here: return print(json.dumps(measure(a.loads[0], a.size)))
    rows = load_json(a.out) if a.out.exists() else []
    for name in a.loads or LOADS:
        size = ["--size", str(a.size)] if a.size else []
        done = subprocess.run([sys.executable, __file__, name, "--here", *size],
                              stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        same = ("load", "size")
        rows = [r for r in rows if any(r[k] != row[k] for k in same)] + [row]
        print(f"{name}: {row['size']:,}, peak {row['peak']:,.0f} MiB, {row['seconds']:.0f} s")
        save_json(a.out, sorted(rows, key=lambda r: (r["load"], r["size"])))

if __name__ == "__main__": main()
