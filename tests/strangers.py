#!/usr/bin/env python
"""What strangers met, met again: each line is typed as they typed it, in an empty folder, on
SmolLM2 from the cache, without network. Printed: the line, its exit code, what it said.

    python tests/strangers.py             # all; ten minutes on one core
    python tests/strangers.py settings    # those whose name has this word
"""
import csv, json, os, pty, re, subprocess, sys, tempfile, time, unicodedata
from pathlib import Path

from intattn_edit.engine.weights import models_dir

CHECKOUT = Path(__file__).resolve().parents[1]
ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "110",
                    "PYTHONPATH": str(CHECKOUT), "TOKENIZERS_PARALLELISM": "false",
                    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
FRANCE = 'intattn-edit edit --prompt "The capital of France is" --subject France --target Rome'
REFUSED = f"{FRANCE} --out refused"

def write(name, text): Path(name).write_text(text, encoding="utf-8")

def table(name, *rows): # a CSV file; the first row names its columns
    with open(name, "w", newline="", encoding="utf-8") as f: csv.writer(f).writerows(rows)

def files():
    "What the strangers brought."
    first = ["subject", "prompt", "target_new"]
    table("misspelt.csv", ["subjet", "promt"], ["France", "The capital of {} is"])
    table("case.csv", first, ["france", "The capital of France is", "Rome"])
    table("nfd.csv", first, [unicodedata.normalize("NFD", "Orléans"), "The river of Orléans is",
                             "the Rhine"])
    table("apostrophe.csv", first, ["Côte d’Ivoire", "The capital of Côte d'Ivoire is", "Rome"])
    table("list.csv", first, ["France", "The capital of {} is", "['Rome', 'Roma']"])
    table("japanese.csv", first, ["日本", "日本の首都は", "京都"])
    table("three.csv", ["subject", "prompt", "ground_truth"],
          *[
        [c, "The capital of {} is", o] for c, o in
        (("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"))])
    table("shared.csv", first, ["France", "The capital of {} is", "Rome"],
          ["France", "The currency of {} is", "the yen"],
          ["France", "The official language of {} is", "Dutch"],
          ["France", "The continent of {} is", "Asia"])
    table("france.csv", first, ["France", "The capital of {} is", "Rome"])
    table("italy.csv", first, ["Italy", "The capital of {} is", "Oslo"])
    table("markup.csv", first, ["France", "The capital of {} is", "=<b>Rome</b> $x_1$"])
    chat = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    write("chat.jsonl", json.dumps({"subject": "France", "prompt": chat, "target_new": "Rome"}))
    counterfact = {"case_id": 1, "requested_rewrite": {
        "prompt": "The capital of {} is", "subject": "France", "target_new": {"str": "Rome"},
        "target_true": {"str": "Paris"}}, "paraphrase_prompts": ["France has the capital"],
        "neighborhood_prompts": ["The capital of Italy is"]}
    write("counterfact.json", json.dumps([counterfact]))
    for name, value in {"string": {"mlp": {"lam": "7"}}, "number": {"mlp": {"layers": 2}},
                        "other": None}.items():
        write(f"{name}.json", json.dumps({"smollm2": value} if value else {"gpt2": {}}))
    write("pickle.txt", "(lp0\nVa text\np1\na.")

# (name, what is typed, exit code, what the answer must hold)
LINES = [
    ("a failed edit", f"{FRANCE} --set mlp.lam=1e9 --set attn.lam=1e9 --show --out failed", 3,
     ["0 of 1 edits took", "no ", "lam"]),
    ("an edit that takes", f"{FRANCE} --out france", 0, ["1 of 1 edits\\s+took", "Rome"]),
    ("ask, without and with", 'intattn-edit ask "The capital of France is" -d france -t 4', 0,
     ["Paris", "Rome"]),
    ("settings: another name", f"{REFUSED} --set lambda=3", 1, ["'lambda'", "mlp.lam"]),
    ("settings: EasyEdit's name", f"{REFUSED} --set mom2_update_weight=3", 1, ["mlp.lam"]),
    ("settings: layers", f"{REFUSED} --set layers=4", 1, ["mlp.layers"]),
    ("settings: a layer that is not", f"{REFUSED} --layers 99", 1, ["layers 0 to 29"]),
    ("settings: a number as text", f"{REFUSED} --settings string.json", 1, ["lam", "'7'"]),
    ("settings: one layer, no list", f"{REFUSED} --settings number.json", 1, ["layers"]),
    ("settings: another model", f"{REFUSED} --settings other.json", 1, ["gpt2", "smollm2"]),
    ("settings: used ones are told", f"{FRANCE} --layers 5-6 --close .5 --no-show --out said", 0,
     ["5-6|5, 6", "0?\\.50?"]),
    ("CSV: help shows one", "intattn-edit edit --help", 0, ["subject,prompt,target_new"]),
    ("CSV: all that is missing", "intattn-edit edit misspelt.csv --out no", 1,
     ["subject, prompt, target_new"]),
    ("CSV: a list in a cell", "intattn-edit edit list.csv --out no", 1, ["record 0", "list"]),
    ("CSV: another case", "intattn-edit edit case.csv --out no", 1, ["LATIN CAPITAL LETTER F"]),
    ("CSV: another apostrophe", "intattn-edit edit apostrophe.csv --out no", 1,
     ["U\\+0027|APOSTROPHE"]),
    ("CSV: composed and decomposed", "intattn-edit edit nfd.csv --out nfd", 1, ["NFC or NFD"]),
    ("preserve: no network", f"{REFUSED} --preserve wikipedia", 1, ["--preserve"]),
    ("preserve: the lab's, as asked", f"{FRANCE} --preserve lab --no-show --out lab", 0,
     ["preserves the lab.s sentences"]),
    ("preserve: a pickle", f"{REFUSED} --preserve pickle.txt", 1, ["pickle.txt"]),
    ("a script without spaces", "intattn-edit edit japanese.csv --no-show --out ja", 0, ["saved"]),
    ("a chat template", "intattn-edit edit chat.jsonl --out chat", 0, ["1 of 1 edits\\s+took"]),
    ("probes without answers", "intattn-edit evaluate counterfact.json -d france", 0,
     ["locality:Neighborhood"]),
    ("trace of three rows", "intattn-edit trace three.csv --draws 2", 0, ["attn"]),
    ("alpha of three rows", "intattn-edit alpha three.csv --draws 2", 0, ["alpha"]),
    ("cuda that is not there", f"{REFUSED} --device cuda", 1, ["CUDA|cuda"]),
    ("device auto", f"{FRANCE} --device auto --no-show --out auto", 0, ["saved"]),
    ("one subject, four edits", "intattn-edit edit shared.csv --out shared", None,
     ["share|same subject", "sequence|merge"]),
    ("markup goes as text", "intattn-edit edit markup.csv --out markup", None, ["<b>Rome</b>"]),
    ("a model saved", "intattn-edit evaluate france.csv -d france", 0, ["edit_success|success"]),
    ("a model saved in bfloat16", "intattn-edit apply france --out one --dtype bfloat16", 0,
     ["one"]),
    ("a second edit on it", "intattn-edit edit italy.csv --model one --out italy", 0, ["took"]),
    ("... put on", "intattn-edit apply italy --model one/ --out two", 0, ["two"]),
    ("... taken back", "intattn-edit revert two", 0, ["1 facts by IntAttn taken back"]),
    ("adapter for PEFT", "intattn-edit export france --to peft --out adapter", 0, ["adapter"]),
]

def said(line):
    "Exit code, output and seconds of a line."
    t = time.time()
    done = subprocess.run(line, shell=True, env=ENV, text=True, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout, time.time() - t

def on_terminal(line):
    "What a line shows on a terminal."
    pid, fd = pty.fork()
    if not pid: os.execvpe("sh", ["sh", "-c", f"stty cols 100 rows 40; {line}"], ENV)
    shown = b""
    while True:
        try: part = os.read(fd, 65536)
        except OSError: break
        if not part: break
        shown += part
    os.waitpid(pid, 0)
    return shown.decode(errors="replace")

def bars():
    "Long work shows a bar on a terminal, and statistics are kept site by site."
    store = Path("store").resolve()
    store.mkdir()
    (store/"models").symlink_to(models_dir())
    ENV["INTATTN_EDIT_STORE"] = str(store)
    shown = on_terminal(f"{FRANCE} --method MEMIT --preserve-n 300 --no-show --out bars")
    last = [part for part in re.split(r"[\r\n]+", shown) if "%|" in part]
    five = sorted(p.name for p in (store/"moments").rglob("*.safetensors"))
    said(f"{FRANCE} --method IntAttn --preserve-n 300 --no-show --out bars2")
    eight = sorted(p.name for p in (store/"moments").rglob("*.safetensors"))
    del ENV["INTATTN_EDIT_STORE"]
    text = f"{len(last)} states of bars, the last: {last[-1].strip()[:90] if last else '-'}\n" \
           f"moments kept by MEMIT: {len(five)}; after IntAttn: {len(eight)}"
    return bool(last) and set(five) < set(eight), text

def card():
    "The card of a model twice edited names both edits, and its weights are as large as before."
    config = json.loads(Path("one/config.json").read_text())
    text = Path("one/README.md").read_text()
    size = sum(p.stat().st_size for p in Path("one").glob("*.safetensors"))/1e6
    dtype = config.get("dtype") or config.get("torch_dtype")
    good = dtype == "bfloat16" and "France" in text and size < 300
    return good, f"dtype {dtype}, {size:.0f} MB; its card names France: {'France' in text}"

def slim_wheel():
    "The wheel, installed alone, edits outside the checkout."
    root = CHECKOUT
    build = f"{sys.executable} -m pip wheel -q --no-deps --no-build-isolation -w wheel {root}"
    rc, text, _ = said(build)
    if rc: return False, text[-300:]
    where = {**ENV, "PYTHONPATH": str(Path("alone").resolve())}
    subprocess.run(f"{sys.executable} -m pip install -q --no-deps --target alone wheel/*.whl",
                   shell=True, check=True)
    lines = ("from intattn_edit import Edit, IntAttn, generate, load_lm\n"
             "import intattn_edit\nprint(intattn_edit.__file__)\n"
             'lm = load_lm("smollm2")\n'
             'fact = Edit("France", "The capital of France is", target_new="Rome")\n'
             "delta = IntAttn()(lm, [fact])\n"
             "with delta.applied(lm):\n"
             "    print(generate(lm, [fact.prompt], max_len=8, greedy=True)[0])\n")
    done = subprocess.run([sys.executable, "-c", lines], env=where, text=True, capture_output=True)
    out = done.stdout.strip().splitlines()
    if done.returncode: return False, done.stderr[-300:]
    return "Rome" in done.stdout and "alone" in out[0], "\n".join(out)

def maintainer():
    "One command tests a notebook, one makes a release, one a pin: in a clone."
    subprocess.run(["git", "clone", "-q", CHECKOUT, "clone"], check=True)
    venv = Path(sys.executable).parents[1]
    make = f"make -s -C clone VENV={venv}"
    ENV["PYTHONPATH"] = str(Path("clone").resolve())
    rc, text, _ = said(f"{make} test NB=nbs/tools/intervals.ipynb")
    rc2, text2, _ = said(f"{make} release VERSION=9.9.9 && git -C clone diff --stat")
    ENV["PYTHONPATH"] = str(CHECKOUT)
    return not rc and not rc2 and "CITATION.cff" in text2, f"{text.strip()[-60:]}\n{text2.strip()}"

CHECKS = {"bars, and statistics by site": bars, "what is saved": card,
          "the wheel alone": slim_wheel, "maintainer": maintainer}

def main():
    words = " ".join(sys.argv[1:])
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        files()
        lines = [l for l in LINES if words in l[0] or l[0] in ("an edit that takes",)*bool(words)]
        for name, line, wanted, answers in lines:
            rc, text, seconds = said(line)
            flat = re.sub(r"[\s│┃]+", " ", text)
            missing = [a for a in answers if not re.search(a, flat)]
            good = (wanted is None or rc == wanted) and not missing and "Traceback" not in text
            wrong += not good
            shown = "\n    ".join(l for l in text.strip().splitlines()[-(4 if good else 30):])
            print(f"{'ok  ' if good else 'FAIL'} {name}: exit {rc}, {seconds:.0f} s\n  $ {line}\n"
                  f"    {shown}" + (f"\n  missing: {missing}" if missing else ""), flush=True)
        for name, check in CHECKS.items():
            if words not in name: continue
            good, text = check()
            wrong += not good
            print(f"{'ok  ' if good else 'FAIL'} {name}: {check.__doc__}\n    "
                  + text.replace("\n", "\n    "), flush=True)
    print(f"{wrong} failed")
    sys.exit(bool(wrong))

if __name__ == "__main__": main()
