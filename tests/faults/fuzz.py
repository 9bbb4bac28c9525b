#!/usr/bin/env python
"""Damaged and hostile input through every reader: each input is read as it stands, or refused in a
sentence that names the file. Anything else (another exception, a text that cannot be written again,
a message of a page, more than SLOW seconds) is a failure, and its seed repeats it.

    python tests/faults/fuzz.py                  # 50,000 inputs, a quarter of an hour
    python tests/faults/fuzz.py --short          # 1,000 inputs, in .ci/run
    python tests/faults/fuzz.py --door facts_csv --seed 4711   # one input again, with its traceback
"""
import argparse, contextlib, io, json, os, pickle, random, sys, tempfile, time, traceback, warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1" # a door that asks the network would be slow, and a fault

import torch

from intattn_edit.engine.facts import Edit, Fact, FactError, load_facts, write_facts
from intattn_edit.engine.formats import EXAMPLES
from intattn_edit.engine.models import Site, load_lm
from intattn_edit.engine.preserve import preserve_texts
from intattn_edit.engine.store import Store, load_json, save_json
from intattn_edit.engine.tiny import tiny_lm
from intattn_edit.engine.tokens import SubjectNotFound, encode, find_subject
from intattn_edit.method.delta import Delta, load_delta
from intattn_edit.tools.records import pack, unpack
from intattn_edit.tools.tables import Table

SLOW = 10       # seconds
LONGEST = 1500  # characters of a message
REFUSED = (ValueError, FactError, FileNotFoundError, SubjectNotFound) # and no heirs of theirs

# Values that no one should have written. Text in JSON may name a number or a depth that Python
# cannot hold: DIGITS and DEEP are put in after the value is JSON.
HOSTILE = [
    None, True, False, 0, -1, 1.5, 1e308, float("nan"), float("inf"), 10**30, "DIGITS", "DEEP", "",
    " ", "\n", "\t", "\0", "\x1b[2J", "\ud800", "a\udfffb", "\u202eabc", "\u200b", "\xa0", "\ufeff",
    "x"*5000, "ab "*3000, "😀"*99, "é", "e\u0301", "首都は", "{}", "{} {}", "{s.__class__}",
    "{s:1000000000}", "%s%n", "<script>", "=1+1", "['a' 'b']", "['a', 'b']", '["a", "b"]',
    "["*3000, "[1, 2", "(1,)", "null", "NaN", "../../etc/passwd", "a/b", "con", "-n", "x"*300 + ".A",
    [], {}, [[]], [{}], [None], [[["a"]]], {"str": 1}, {"str": "Lund"}, {"": ""}, ["a", 1],
    {"prompt": 1}, [{"prompt": "p", "ground_truth": {"a": 1}}], {"\ud800": "x"}, {"x"*9999: 1}]
BYTES = [b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b'"', b"'", b",", b"\t", b"[",
         b"{", b"}", b"\\", b"\\ud800", b"\x1b", b"1"*5000, b"["*2000, b"PAR1", b"\x80\x04", b"NaN"]

def spots(x, path=()): # of a JSON value
    "Where every part of a value is."
    yield path
    if isinstance(x, dict):
        for k in x: yield from spots(x[k], (*path, k))
    if isinstance(x, list):
        for i in range(len(x)): yield from spots(x[i], (*path, i))

def changed(rng, value):
    "The value with one part replaced, dropped, repeated, wrapped or renamed."
    value = json.loads(json.dumps(value))
    path = rng.choice(list(spots(value)))
    if not path: return rng.choice([value, rng.choice(HOSTILE), [value], {"a": value}])
    parent = value
    for k in path[:-1]: parent = parent[k]
    k, how = path[-1], rng.randrange(7)
    if how < 3: parent[k] = rng.choice(HOSTILE)
    elif how == 3: del parent[k]
    elif how == 4: parent[k] = [parent[k]]
    elif how == 5: parent[k] = {"a": parent[k]}
    elif isinstance(parent, dict): parent[str(rng.choice(HOSTILE))[:200]] = parent.pop(k)
    else: parent.append(parent[k])
    return value

def as_json(rng, value):
    "JSON of the value, as text; numbers and depths beyond Python's."
    text = json.dumps(value, ensure_ascii=rng.random() < .8)
    deep = rng.choice([40, 60, 900, 3000, 20000])
    text = text.replace('"DIGITS"', "1" + "0"*rng.choice([50, 400, 5000]))
    return text.replace('"DEEP"', "["*deep + "]"*deep)

def damaged(rng, raw):
    "Some bytes flipped, cut, put in, or repeated."
    raw = bytearray(raw)
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        i, how = rng.randrange(len(raw) + 1), rng.randrange(5)
        j = min(len(raw), i + rng.choice([1, 2, 9, 200]))
        if how == 0 and i < len(raw): raw[i] ^= 1 << rng.randrange(8)
        elif how == 1: del raw[i:j]
        elif how == 2: raw[i:i] = rng.choice(BYTES)
        elif how == 3: raw[i:i] = raw[i:j]*rng.choice([1, 3, 50])
        else: del raw[i:]
    return bytes(raw)

def mutated(rng, value):
    "Bytes of a JSON file: its value changed, or its bytes, or both."
    for _ in range(rng.choice([0, 1, 1, 2, 4])): value = changed(rng, value)
    raw = as_json(rng, value).encode("utf-8", "surrogatepass")
    return damaged(rng, raw) if rng.random() < .4 else raw

def odd_name(rng, ending=""):
    "A name for a file."
    return rng.choice(["mine", "mine", "mine", "a b", "é", "e\u0301", "x\n\x1b[2J", "-n", "x"*200]) + ending

# Doors: a function (rng, folder) that makes one input and puts it through. It may raise REFUSED.

def check_facts(facts):
    "What was read can be used: written as UTF-8, and its subject found."
    for f in facts:
        json.dumps(vars(f), ensure_ascii=False, default=vars).encode()
        find_subject(f.prompt, f.subject)
        assert isinstance(f, Fact) and all(isinstance(a, str) for a in f.answers)
    facts.drop_report().encode()

def read_facts(rng, path):
    strict = rng.random() < .6
    facts = load_facts(path, strict=strict)
    check_facts(facts)
    try: write_facts(path.with_name("again.json"), facts)
    except FactError: return # such as an answer twice
    again = load_facts(path.with_name("again.json"))
    assert [f.prompt for f in again] == [f.prompt for f in facts], "written and read: not the same"

def facts_json(rng, folder):
    records = [rng.choice([*EXAMPLES.values()]) for _ in range(rng.choice([1, 2, 3]))]
    if rng.random() < .7: records = [records[0]]*len(records)
    path = folder/odd_name(rng, rng.choice([".json", ".json", ".jsonl"]))
    if path.suffix == ".json":
        value = rng.choice([records, {"records": records}])
        raw = mutated(rng, value)
    else: raw = b"\n".join(mutated(rng, r) for r in records)
    path.write_bytes(raw)
    read_facts(rng, path)

def facts_csv(rng, folder):
    columns = dict(EXAMPLES["table"])
    rows = [columns, columns | {"prompt": "Anna lives in"}]
    sep, ending = rng.choice([(",", ".csv"), ("\t", ".tsv")])
    def cell(x):
        if rng.random() < .08: x = rng.choice(HOSTILE)
        x = str(x)
        return '"' + x.replace('"', '""') + '"' if rng.random() < .95 or sep in x else x
    lines = [sep.join(map(cell, row)) for row in [list(columns), *(r.values() for r in rows)]]
    raw = rng.choice(["\n", "\r\n", "\n\n"]).join(lines).encode("utf-8", "surrogatepass")
    path = folder/odd_name(rng, ending)
    path.write_bytes(damaged(rng, raw) if rng.random() < .5 else raw)
    read_facts(rng, path)

TRIPLES = [["Anna", "city", "Rome"], {"subject": "Bob", "relation": "city", "object": "Paris"},
           "A text.", {"text": "Another."}]

def preserved(rng, folder):
    ending = rng.choice([".txt", ".json", ".jsonl", ".tsv", ""])
    if ending == ".json": raw = mutated(rng, TRIPLES)
    elif ending == ".jsonl": raw = b"\n".join(mutated(rng, t) for t in TRIPLES)
    elif ending == ".tsv": raw = damaged(rng, b"Anna\tcity\tRome\nBob\tcity\tParis\n")
    else: raw = damaged(rng, rng.choice([b"One.\n\nTwo.\nMore.\n", b"One.\nTwo.\n",
                                         pickle.dumps(["a", "b"], rng.randrange(5))]))
    path = folder/odd_name(rng, ending)
    path.write_bytes(raw)
    template = "{s}'s {r} is {o}."
    if rng.random() < .2: template = rng.choice([h for h in HOSTILE if isinstance(h, str)])
    texts = preserve_texts(path, n=rng.choice([None, None, 1, 3]), template=template)
    "\n".join(texts).encode()
    assert texts and all(isinstance(t, str) for t in texts)

DBP = {"ent_ids_2": b"1\thttp://dbpedia.org/resource/Rome\n2\tItaly\n",
       "rel_ids_2": b"7\thttp://dbpedia.org/property/capitalOf\n", "triples_2": b"1\t7\t2\n"}

def dbpedia(rng, folder):
    for name, raw in DBP.items():
        if rng.random() < .97: (folder/name).write_bytes(damaged(rng, raw))
    texts = preserve_texts(folder, n=rng.choice([None, 1]))
    "\n".join(texts).encode()

def json_file(rng, folder):
    value = {"meta": {"method": "MEMIT", "edits": [EXAMPLES["knowedit"]]}, "weights": {"a": [1, 2]}}
    path = folder/"meta.json"
    path.write_bytes(mutated(rng, value))
    json.dumps(load_json(path), ensure_ascii=False).encode()

def stored(rng, folder):
    "A damaged entry of the store is told, and computed again."
    store, value = Store(folder), {"alpha": .3, "layers": [1, 2], "name": "é"}
    store.get_or("kind", "key", lambda: value)
    path = next(folder.glob("kind/*.json"))
    path.write_bytes(mutated(rng, load_json(path)))
    assert store.get_or("kind", "key", lambda: value) == value, "a damaged entry was believed"

LM = None

def tiny():
    global LM
    if LM is None: LM = tiny_lm("gpt2")
    return LM

def delta(rng, folder):
    lm, name = tiny(), tiny().weight_name(Site("mlp", 1))
    d_out, d_in = lm.d_model, lm.weight(Site("mlp", 1)).numel()//lm.d_model
    Delta({name: (torch.ones(d_out, 1), torch.ones(1, d_in))},
          {"method": "MEMIT", "model": lm.name, "edits": [EXAMPLES["knowedit"]]}).save(folder/"d")
    files = sorted((folder/"d").iterdir())
    path = rng.choice(files)
    if path.suffix == ".json": path.write_bytes(mutated(rng, json.loads(path.read_text())))
    else: path.write_bytes(headed(rng, path.read_bytes()))
    before = lm.fingerprint
    try:
        loaded = load_delta(folder/"d")
        json.dumps(loaded.meta, ensure_ascii=False).encode()
        with loaded.applied(lm, strict=rng.random() < .5): pass
    except KeyError as e: # of a name that is no weight of this model
        raise ValueError(f"d: {e.args[0]}") from e
    finally: assert lm.fingerprint == before, "the model has changed"

def headed(rng, raw):
    "A safetensors file whose header, or whose bytes, are damaged."
    if rng.random() < .3: return damaged(rng, raw)
    n = int.from_bytes(raw[:8], "little")
    value = json.loads(raw[8:8+n])
    about = value["__metadata__"]
    if rng.random() < .6: # what we put into the header
        about["delta"] = mutated(rng, json.loads(about["delta"])).decode("utf-8", "replace")
        head = json.dumps(value).encode()
    else: head = mutated(rng, value)
    return len(head).to_bytes(8, "little") + head + raw[8+n:]

def records(rng, folder):
    cells = [{"cell": {"model": "m", "seed": i}, "metrics": {"edit_success": 50.5},
              "cases": {"edit_success": [100., None]}, "case_ids": ["a", "b"]} for i in range(2)]
    lines = [mutated(rng, json.loads(line)).decode("utf-8", "replace") for line in pack(cells)]
    unpack(lines, "records.jsonl")

def names(rng, folder):
    "Names of files and models that are not there."
    name = str(rng.choice(HOSTILE))*rng.choice([1, 1, 30])
    name = rng.choice(["", "lab/", "~", "~nobody/", "/", "./", "zz-"]) + name
    if rng.random() < .5: name = str(folder/name)
    try: os.fsencode(name)
    except UnicodeEncodeError: return # no name that a system could give
    door = rng.choice([load_facts, preserve_texts, load_delta, load_lm])
    if door is preserve_texts and name in ("wikipedia", "lab", "self"): return
    door(name)

WORDS = ["Anna", "Anna Lee", "Anna’s", "Zoe\u0308", "Zoë", "北京", "東京", "กรุงเทพ", "서울", "lives in", "は",
         "的首都是", "คือ", "’", "\xa0", "\u200b", "<|im_end|>\n", "\n", "  ", "😀", "\ufb01"]

def prompts(rng, folder):
    words = rng.choices([*WORDS, *(h for h in HOSTILE if isinstance(h, str))], k=rng.randrange(1, 6))
    subject = rng.choice([*words, *WORDS])
    prompt, target = rng.choice(["", " "]).join(words), rng.choice([*WORDS, " Lund", "", "\n"])
    try: prompt.encode(), target.encode()
    except UnicodeEncodeError: return # the loader refuses these
    tok = TOKENIZERS[rng.randrange(len(TOKENIZERS))]
    row, bare = encode(tok, prompt, subject, target), encode(tok, prompt, subject)
    assert bare.ids == row.ids[:row.prompt_len], "the target changed the prompt's tokens"
    assert bare.subject == row.subject and row.subject[1] <= row.prompt_len

TOKENIZERS = []

def tables(rng, folder):
    cells = [str(rng.choice(HOSTILE))[:300].encode("utf-8", "replace").decode() for _ in range(6)]
    rows = tuple(((c, False), (d, True)) for c, d in zip(cells, reversed(cells)))
    import pandas as pd
    made = Table(1, ("a", "b"), rows, frozenset({0}), cells[0], pd.DataFrame({"a": cells}))
    assert made.html().count("<td>") == 12 and "<script" not in made.html()
    assert made.markdown().splitlines()[2 + len(rows)] == ""
    assert sum(line.endswith(r" \\") for line in made.latex().splitlines()) >= len(rows)
    assert len(pd.read_csv(io.StringIO(made.csv()), dtype=str, keep_default_na=False,
                           skip_blank_lines=False)) == len(rows)

def model(rng, folder):
    "A folder with a damaged config or tokenizer."
    lm = tiny()
    lm.model.save_pretrained(folder/"m")
    lm.tokenizer.save_pretrained(folder/"m")
    path = folder/"m"/rng.choice(["config.json", "tokenizer.json", "tokenizer_config.json"])
    path.write_bytes(mutated(rng, json.loads(path.read_text())))
    load_lm(str(folder/"m"))

DOORS = {facts_json: 15000, facts_csv: 9000, preserved: 7500, dbpedia: 1500, json_file: 3000,
         stored: 2000, delta: 2000, records: 3000, names: 1500, prompts: 4000, tables: 1000,
         model: 500} # inputs of the long form

def fault_of(door, seed):
    "What is wrong with how an input was met (None: nothing), whether it was read, and the traceback."
    rng, start = random.Random(f"{door.__name__} {seed}"), time.perf_counter()
    quiet = io.StringIO()
    with tempfile.TemporaryDirectory() as d, warnings.catch_warnings(), \
         contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
        warnings.simplefilter("ignore")
        try: door(rng, Path(d)); said = None
        except Exception as e: said, tb = e, traceback.format_exc()
    seconds = time.perf_counter() - start
    if seconds > SLOW: return f"took {seconds:.0f} s", False, ""
    if said is None: return None, True, ""
    text = str(said)
    if type(said) not in REFUSED: return f"{type(said).__name__}: {text[:300]!r}", False, tb
    if len(text) > LONGEST: return f"a message of {len(text)} characters", False, tb
    if not text.replace("\n", "").isprintable(): return f"control characters: {text[:300]!r}", False, tb
    if len(text) < 15: return f"no sentence: {text!r}", False, tb
    return None, False, ""

def run(door, n, seed):
    "(read, refused, failures) of n inputs."
    read, failures, start = 0, [], time.perf_counter()
    for i in range(n):
        fault, ok, tb = fault_of(door, seed + i)
        read += ok
        if fault: failures.append((seed + i, fault, tb))
    seconds = time.perf_counter() - start
    print(f"{door.__name__:12}{n:7,} inputs {read:7,} read {n - read - len(failures):7,} refused "
          f"{len(failures):5,} failures {seconds:6.0f} s", flush=True)
    kinds = Counter(f.split(":")[0] + tb.strip().rsplit("File ", 1)[-1].split(", in")[0] for _, f, tb in failures)
    for kind, _ in kinds.most_common(12):
        seed, fault, _ = next(x for x in failures
                              if x[1].split(":")[0] + x[2].strip().rsplit("File ", 1)[-1].split(", in")[0] == kind)
        print(f"    --door {door.__name__} --seed {seed}: {fault}", flush=True)
    return read, n - read - len(failures), len(failures)

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--short", action="store_true", help="a fiftieth, for CI")
    p.add_argument("--share", type=float, help="so large a part of the long form")
    p.add_argument("--door", help="one door only: " + ", ".join(d.__name__ for d in DOORS))
    p.add_argument("--seed", type=int, help="this input of the door only, with its traceback")
    p.add_argument("--first", type=int, default=0, help="first seed")
    p.add_argument("--out", help="a JSON file for the table")
    a = p.parse_args()
    from intattn_edit.engine.tiny import tiny_tokenizer
    TOKENIZERS.extend(map(tiny_tokenizer, ("bytelevel", "metaspace", "prepend")))
    torch.set_num_threads(1)
    share = a.share or (.02 if a.short else 1)
    doors = [d for d in DOORS if a.door in (None, d.__name__)]
    if a.seed is not None:
        fault, read, tb = fault_of(doors[0], a.seed)
        print(tb, fault or ("read" if read else "refused"), sep="\n")
        return bool(fault)
    found = {}
    for d in doors: found[d.__name__] = run(d, max(1, round(DOORS[d]*share)), a.first)
    total = [sum(x) for x in zip(*found.values())]
    print(f"{sum(total):,} inputs: {total[0]:,} read, {total[1]:,} refused with a sentence, "
          f"{total[2]:,} failures")
    if a.out:
        rows = [dict(zip(("door", "read", "refused", "failures"), (k, *v))) for k, v in found.items()]
        save_json(a.out, rows)
    return total[2] > 0

if __name__ == "__main__": sys.exit(main())
