"""Clicks through the edit bench in JupyterLab, in a real browser: `make ui-test`.

Starts JupyterLab on loopback with folders of its own, opens a copy of nbs/edit_bench.ipynb in Chromium, and goes through the whole story. Fails on any error of the page or the kernel, and on a click
that takes more than five seconds. Where more tasks want a processor than there are, a click may take as much longer as there are more (the load average says so), or UI_TEST_SLACK times as long. CHROMIUM names the
browser."""
import argparse, contextlib, json, os, secrets, shutil, signal, socket, subprocess, sys, tempfile, time, urllib.request
from pathlib import Path
import psutil
from playwright.sync_api import sync_playwright

ROOT, LIMIT = Path(__file__).resolve().parents[1], 5. # seconds a click
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --force-color-profile=srgb".split()
BROKEN = "[data-mime-type='application/vnd.jupyter.error'], [data-mime-type='application/vnd.jupyter.stderr']" # of a cell's outputs
WINDOW = {"width": 1280, "height": 900}
QUIET = {"@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}

def slack():
    "How many times longer a click may take on this machine, as busy as it is now."
    return float(os.environ.get("UI_TEST_SLACK", 0)) or max(1., os.getloadavg()[0]/len(os.sched_getaffinity(0)))

def processor_seconds():
    "Seconds of processor that JupyterLab and its kernels have used."
    total = 0.
    for p in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "python" in p.name(): total += sum(p.cpu_times()[:2])
    return total

def browser_path():
    "The browser to drive."
    names = [x] if (x := os.environ.get("CHROMIUM")) else ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
    found = next(filter(None, map(shutil.which, names)), None)
    if not found: sys.exit(f"no Chromium found ({', '.join(names)}): install it (Debian: apt-get install chromium), or set CHROMIUM to its path")
    return found

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

def end(process):
    "End a process and all it started."
    with contextlib.suppress(psutil.NoSuchProcess): family = [*psutil.Process(process.pid).children(recursive=True)]
    process.terminate() # JupyterLab shuts its kernels down
    with contextlib.suppress(subprocess.TimeoutExpired): process.wait(15)
    for p in [x for x in locals().get("family", []) if x.is_running()] + [process]:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError): p.kill()
    process.wait()

@contextlib.contextmanager
def jupyterlab(box): # a temporary folder
    "JupyterLab's address with its token; its log is box/log."
    work, port, token = box/"work", free_port(), secrets.token_hex(16)
    work.mkdir()
    shutil.copy(ROOT/"nbs/edit_bench.ipynb", work)
    if (ROOT/"nbs/images").exists(): shutil.copytree(ROOT/"nbs/images", work/"images")
    for name, value in QUIET.items():
        f = (box/"settings"/name).with_suffix(".jupyterlab-settings")
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text(json.dumps(value))
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
              "IPYTHONDIR": "ipython", "INTATTN_EDIT_STORE": "store"}
    env = {**os.environ, **{k: str(box/v) for k, v in places.items()}, "PYTHONPATH": str(ROOT), "JUPYTER_PREFER_ENV_PATH": "1", "TOKENIZERS_PARALLELISM": "false", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    with open(box/"log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
                                   f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={work}", "--LabApp.extension_manager=readonly"], env=env, stdout=log, stderr=log)
        try:
            answers(f"http://127.0.0.1:{port}/api?token={token}", server)
            yield f"http://127.0.0.1:{port}/lab/tree/edit_bench.ipynb?token={token}"
        finally: end(server)

def answers(url, server, seconds=90):
    "Wait until the server is there."
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if server.poll() is not None: raise RuntimeError("JupyterLab ended at once")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=5).read()
            return
        time.sleep(.2)
    raise RuntimeError(f"JupyterLab did not answer within {seconds} s")

class Story:
    "The steps, in order; each uses the page as the one before left it."
    def __init__(self, page, box, shots): # playwright's page; temporary folder; folder of pictures
        self.page, self.box, self.shots, self.errors, self.times = page, box, shots, [], {}
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda e: self.errors.append(f"page error: {e}"))
        page.on("console", lambda m: self.errors.append(f"console: {m.text}") if m.type == "error" else None)

    # what a hand and an eye do
    def at(self, name): return self.page.locator(f".ia-{name}").first
    def text(self, name): return self.at(name).inner_text()
    def value(self, name): return self.at(name).locator("input, select, textarea").first.input_value()
    def type(self, name, text):
        box = self.at(name).locator("input, textarea").first
        box.fill(text); box.press("Tab")
    def choose(self, name, **how): self.at(name).locator("select").select_option(**how)
    def shot(self, name, card=None): # number of a section; None: all
        "Save a picture."
        what = self.page.locator(".ia-card").nth(card - 1) if card else self.page.locator(".ia-page")
        if not card: self.page.set_viewport_size({"width": 1280, "height": 2400}) # so that all of it is there to be pictured
        what.scroll_into_view_if_needed()
        what.screenshot(path=self.shots/f"{name}.png")
        self.page.set_viewport_size(WINDOW)

    def timed(self, what, section, act, kind="ok"):
        "Do something that starts a job of a section; wait until it is done, in time, and as it should be."
        status = f".ia-status-{section}"
        self.page.eval_on_selector(f"{status} .widget-html-content", "x => x.innerHTML = ''")
        began, used = time.monotonic(), processor_seconds()
        act()
        self.page.wait_for_selector(f"{status} .ia-ok, {status} .ia-error, {status} .ia-note:only-child", timeout=120_000)
        seconds, said = time.monotonic() - began, self.text(f"status-{section}").strip()
        self.times[what], most = seconds, LIMIT*slack()
        print(f"    {what}: {seconds:.2f} s ({processor_seconds() - used:.2f} s of processor): {said}", flush=True)
        assert self.page.locator(f"{status} .ia-{kind}").count(), f"{what}: the page says {said!r}"
        assert seconds < most, f"{what} took {seconds:.1f} s, more than {most:.1f}"
        return said
    def press(self, button, section, kind="ok", what=None):
        return self.timed(what or button, section, lambda: self.at(f"do-{button}").click(), kind)

    # the story
    def step_open(self):
        "the notebook opens, and its cells run"
        self.page.goto(self.url)
        self.page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=60_000)
        self.page.get_by_text("| Idle").wait_for(timeout=60_000) # the kernel is connected
        self.page.keyboard.press("Control+b") # the file browser goes
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        self.page.wait_for_selector(f".ia-status-fact .ia-ok, {BROKEN}", timeout=120_000)
        assert not (bad := self.page.locator(BROKEN).all_inner_texts()), bad
        assert self.value("model") == "lab/qwen2" and self.value("prompt"), "no model, or no fact, to begin with"

    def step_model(self):
        "another model, and back"
        said = self.timed("choose a model", "fact", lambda: self.choose("model", label="lab/mistral"))
        assert "lab/mistral" in said
        self.timed("choose it back", "fact", lambda: self.choose("model", label="lab/qwen2"))

    def step_no_model(self):
        "a model that is not there is said to be so, and the old one stays"
        self.choose("model", label="other …")
        def enter():
            self.at("model-other").locator("input").fill("lab/nothing")
            self.at("model-other").locator("input").press("Enter")
        assert "no lab model" in self.timed("a wrong model", "fact", enter, "error")
        self.page.wait_for_function("document.querySelector('.ia-model select').selectedOptions[0].label == 'lab/qwen2'")

    def step_fact(self):
        "a fact is chosen, and fills the form"
        before = self.value("prompt")
        self.choose("fact", index=2)
        self.page.wait_for_function("x => document.querySelector('.ia-prompt input').value != x", arg=before)
        self.fact = {k: self.value(k) for k in ("prompt", "subject", "new", "old")}
        assert all(self.fact.values()), self.fact
        self.page.get_by_text("Questions that judge the edit").click()
        assert "→" in self.value("neighbours") and self.value("rephrases")
        self.shot("bench_fact", 1)
        self.page.get_by_text("Questions that judge the edit").click()

    def step_stop(self):
        "a trace is stopped, and an edit"
        def stop():
            self.at("do-trace").click()
            self.page.wait_for_selector(".ia-trace td[title]")
            self.at("do-stop-trace").click()
        assert "stopped" in self.timed("stop a trace", "trace", stop, "note")
        assert self.at("do-traced").is_disabled()
        self.shot("bench_stopped", 2)
        def stop_edit():
            self.at("do-edit").click()
            self.page.wait_for_selector(".ia-status-edit .ia-progress")
            self.at("do-stop-edit").click()
        assert "stopped" in self.timed("stop an edit", "edit", stop_edit, "note")
        assert "No edit" in self.text("edits-on") and self.at("do-undo").is_disabled()

    def step_trace(self):
        "a trace fills in, and implies alpha"
        self.page.evaluate("""() => { const t = document.querySelector('.ia-trace'); window.seen = [];
            new MutationObserver(() => window.seen.push(t.querySelectorAll('td[title]').length)).observe(t, {childList: true, subtree: true}); }""")
        self.press("trace", "trace")
        seen = self.page.evaluate("window.seen")
        assert len(set(seen)) > 4 and sorted(set(seen))[-1] == max(seen), f"the trace did not fill in: {seen}"
        assert "alpha = 0." in self.text("alpha-view") and "layers" in self.text("alpha-view")
        self.shot("bench_trace", 2)

    def step_edit(self):
        "the edit, with the trace's alpha; before and after"
        self.at("do-traced").click()
        self.page.wait_for_function("document.querySelector('.ia-means').innerText.includes('from the trace')")
        assert "is on the model" in self.press("edit", "edit")
        rows = self.page.locator(".ia-said tbody tr")
        first = rows.first.locator("td").all_inner_texts()
        assert first[3].startswith(self.fact["old"]) and self.fact["new"] in first[4] and "✓" in first[4], first
        kinds = " ".join(rows.locator("td:first-child").all_inner_texts())
        assert "rephrase" in kinds and "neighbour" in kinds, kinds
        after = self.text("after")
        for word in ("next token", "Edit success", "Generalisation", "Portability", "Locality", "old: " + self.fact["old"], "rank"): assert word in after, f"{word} is not shown"
        self.shot("bench_edit", 4); self.shot("bench_settings", 3); self.shot("bench")

    def step_undo(self):
        "undo, exactly"
        assert "bit for bit" in self.press("undo", "edit")
        first = self.page.locator(".ia-said tbody tr").first.locator("td").all_inner_texts()
        assert self.fact["old"] in first[4] and self.at("do-undo").is_disabled(), first

    def step_wrong(self):
        "a subject that is not in the prompt"
        self.choose("fact", index=0)
        self.page.wait_for_function("document.querySelector('.ia-prompt input').value == ''")
        for k, v in dict(prompt=self.fact["prompt"], subject="Nobody", new="Paris").items(): self.type(k, v)
        assert "is not in the prompt" in self.press("edit", "edit", "error", "a wrong subject")
        self.shot("bench_error", 3)

    def step_typed(self):
        "a fact of one's own, by another method, with its own questions"
        from intattn_edit.facts import load_facts
        alike = [f for f in load_facts("lab/wiki_counterfact") if f.prompt.replace(f.subject, "{}") == self.fact["prompt"].replace(self.fact["subject"], "{}") and f.subject != self.fact["subject"]]
        self.typed = alike[0].target_new
        self.type("subject", self.fact["subject"]); self.type("new", self.typed)
        self.page.get_by_text("Questions that judge the edit").click()
        self.type("rephrases", self.fact["prompt"].replace(self.fact["subject"], "The " + self.fact["subject"]))
        self.choose("method", label="MEMIT")
        self.press("edit", "edit", what="edit a typed fact")
        first = self.page.locator(".ia-said tbody tr").first.locator("td").all_inner_texts()
        assert self.typed in first[4] and "MEMIT" in self.text("edits-on"), first
        self.shot("bench_typed", 4)

    def step_conflict(self):
        "another object for the same fact is refused"
        self.type("new", "Rome")
        assert "undo that edit first" in self.press("edit", "edit", "error", "a conflict")

    def step_save(self):
        "the delta is saved, and does the same in Python"
        self.type("folder", str(self.box/"saved"))
        self.press("save", "edit")
        from intattn_edit.delta import load_delta
        from intattn_edit.facts import load_facts
        from intattn_edit.models import load_lm
        from intattn_edit.protocols import say
        lm, delta, (fact,) = load_lm("lab/qwen2"), load_delta(self.box/"saved"), load_facts(self.box/"saved/facts.json")
        assert (fact.prompt, fact.target_new, delta.meta["method"]) == (self.fact["prompt"], self.typed, "MEMIT"), (fact, delta.meta)
        said = [say(lm, [fact.prompt])[fact.prompt].text]
        with delta.applied(lm): said.append(say(lm, [fact.prompt])[fact.prompt].text)
        assert said[0].startswith(self.fact["old"]) and self.typed in said[1], said
        self.press("undo", "edit", what="undo it")

    def step_whole(self):
        "the page as a whole: nothing wider than the window, no error anywhere"
        self.narrow()
        self.page.keyboard.press("Control+b")
        self.page.locator(".jp-FileBrowser").wait_for()
        self.narrow() # beside the file browser too
        assert not (bad := self.page.locator(BROKEN).all_inner_texts()), bad
        assert not self.errors, self.errors
        log = [l for l in (self.box/"log").read_text().splitlines() if "Traceback" in l or l.startswith(("[E ", "[C "))]
        assert not log, log

    def narrow(self):
        "Nothing is wider than its place."
        wide = self.page.evaluate("[...document.querySelectorAll('.jp-OutputArea-output, .ia-page, .ia-card')].filter(x => x.scrollWidth > x.clientWidth + 1).map(x => `${x.className}: ${x.scrollWidth} > ${x.clientWidth}`)")
        assert not wide, wide

    def play(self, url):
        "Numbers of steps passed and failed; what follows a failed step cannot be tried, and counts as failed."
        self.url, steps = url, [(n[5:], getattr(self, n)) for n in vars(Story) if n.startswith("step_")]
        for i, (name, f) in enumerate(steps):
            print(f"{i + 1}/{len(steps)} {name}: {f.__doc__}", flush=True)
            try: f()
            except Exception as e:
                print(f"FAILED: {name}: {e}", *self.errors, sep="\n    ", flush=True)
                with contextlib.suppress(Exception): self.page.screenshot(path=self.shots/"failed.png")
                return i, len(steps) - i
        return len(steps), 0

def main():
    parser = argparse.ArgumentParser(description="The edit bench in a real browser.")
    parser.add_argument("--screenshots", type=Path, default=ROOT/"runs/ui", help="folder for the pictures (runs/ui); nbs/images for those of the docs")
    parser.add_argument("--log", action="store_true", help="print JupyterLab's log at the end")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) # so that all is put away then too
    args.screenshots.mkdir(parents=True, exist_ok=True)
    executable = browser_path()
    print(f"a click may take {LIMIT:.0f} s{f', now {LIMIT*slack():.1f} s: this machine is busy' if slack() > 1 else ''}", flush=True)
    with tempfile.TemporaryDirectory(prefix="ui-test-", ignore_cleanup_errors=True) as box, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=executable, args=FLAGS)
        try:
            with jupyterlab(Path(box)) as url:
                page = browser.new_page(viewport=WINDOW)
                story = Story(page, Path(box), args.screenshots)
                passed, failed = story.play(url)
        finally: browser.close()
        if failed or args.log: print((Path(box)/"log").read_text()[-4000:])
    print("slowest click: {0} {1:.1f} s".format(*max(story.times.items(), key=lambda x: x[1])) if story.times else "no click")
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)

if __name__ == "__main__": main()
