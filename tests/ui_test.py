"""Clicks through the edit bench in JupyterLab, in a real browser: `make ui-test`.

Starts JupyterLab on loopback with folders of its own, opens a copy of nbs/tools/edit_bench.ipynb in
Chromium, and goes through the whole story. Fails on any error of the page or the kernel, and on a
click that takes more than five seconds. It begins with the real model that the bench begins with,
and goes on with one of the lab's, whose traces and edits fit into those seconds.

On a machine with more work than processors a click may take as much longer as the load average
says, or UI_TEST_SLACK times as long. CHROMIUM names the browser.
"""
import argparse, contextlib, json, os, secrets, shutil, signal, socket, subprocess, sys, tempfile
import time, urllib.request
from pathlib import Path
import psutil
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 5. # seconds a click
WINDOW = {"width": 1280, "height": 900}
WHOLE_PAGE = {"width": 1280, "height": 2400}

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--force-color-profile=srgb"]

# Outputs of a cell that should not be there.
BROKEN = ("[data-mime-type='application/vnd.jupyter.error'], "
          "[data-mime-type='application/vnd.jupyter.stderr']")

SETTINGS = { # of JupyterLab, which else asks for news
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}
FOLDERS = { # of its own, so that nothing of the user's is read or written
    "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
    "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    "IPYTHONDIR": "ipython", "INTATTN_EDIT_STORE": "store"}
VARIABLES = {
    "PYTHONPATH": str(ROOT), "JUPYTER_PREFER_ENV_PATH": "1", "TOKENIZERS_PARALLELISM": "false",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1"}

# ------------------------------------------------------------------------------ the machine

def slack():
    "How many times longer a click may take on this machine, as busy as it is now."
    given = float(os.environ.get("UI_TEST_SLACK", 0))
    return given or max(1., os.getloadavg()[0]/len(os.sched_getaffinity(0)))

def processor_seconds():
    "Seconds of processor that JupyterLab and its kernels have used."
    total = 0.
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "python" in process.name(): total += sum(process.cpu_times()[:2])
    return total

def browser_path():
    "The browser to drive."
    given = os.environ.get("CHROMIUM")
    names = [given] if given else BROWSERS
    for path in filter(None, map(shutil.which, names)): return path
    sys.exit(f"no Chromium found ({', '.join(names)}): install it (Debian: apt-get install "
             "chromium), or set CHROMIUM to its path")

def free_port():
    "A port that nobody listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

# -------------------------------------------------------------------------------- JupyterLab

def prepare(box):
    "The notebook, JupyterLab's settings and the real model, in a temporary folder."
    from intattn_edit.engine.weights import fetch
    work, store = box/"work", box/FOLDERS["INTATTN_EDIT_STORE"]
    work.mkdir()
    store.mkdir()
    (store/"models").symlink_to(fetch("smollm2").parent)
    shutil.copy(ROOT/"nbs/tools/edit_bench.ipynb", work)
    for name, value in SETTINGS.items():
        file = (box/"settings"/name).with_suffix(".jupyterlab-settings")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))
    return work

@contextlib.contextmanager
def jupyterlab(box):
    "The address of the notebook in JupyterLab, with its token. Its log is box/log."
    work, port, token = prepare(box), free_port(), secrets.token_hex(16)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
        "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={work}",
        "--LabApp.extension_manager=readonly"]
    folders = {name: str(box/folder) for name, folder in FOLDERS.items()}
    with open(box/"log", "w") as log:
        server = subprocess.Popen(command, env={**os.environ, **folders, **VARIABLES},
                                  stdout=log, stderr=log)
        try:
            wait_for(f"http://127.0.0.1:{port}/api?token={token}", server)
            yield f"http://127.0.0.1:{port}/lab/tree/edit_bench.ipynb?token={token}"
        finally: end(server)

def wait_for(url, server, seconds=90):
    "Wait until the server answers."
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if server.poll() is not None: raise RuntimeError("JupyterLab ended at once")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=5).read()
            return
        time.sleep(.2)
    raise RuntimeError(f"JupyterLab did not answer within {seconds} s")

def end(process):
    "End a process and all it started."
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.terminate() # JupyterLab shuts its kernels down
    with contextlib.suppress(subprocess.TimeoutExpired): process.wait(15)
    for p in [p for p in family if p.is_running()] + [process]:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError): p.kill()
    process.wait()

# ---------------------------------------------------------------------------------- the page

class Hand:
    "What a hand and an eye do in the page. A widget is named by its class there, without `ia-`."
    def __init__(self, page, shots): # playwright's page; folder of pictures
        self.page, self.shots = page, shots
        self.errors = [] # of the page
        self.times = {}  # click -> seconds
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: self.errors.append(f"page error: {error}"))
        page.on("console", self._heard)

    def _heard(self, message):
        if message.type == "error": self.errors.append(f"console: {message.text}")

    def at(self, name): return self.page.locator(f".ia-{name}").first
    def text(self, name): return self.at(name).inner_text()
    def field(self, name): return self.at(name).locator("input, select, textarea").first
    def value(self, name): return self.field(name).input_value()

    def type(self, name, text):
        self.field(name).fill(text)
        self.field(name).press("Tab")

    def choose(self, name, **how): self.at(name).locator("select").select_option(**how)

    def turn_questions(self):
        "Open the part of the form with the questions, or close it."
        self.page.get_by_text("Questions that judge the edit").click()

    def first_answer(self):
        "The cells of the first row of answers: question, prompt, wanted, before, after."
        return self.page.locator(".ia-answers tbody tr").first.locator("td").all_inner_texts()

    def shot(self, name, card=None): # number of a section; None: the whole page
        "Save a picture."
        what = self.page.locator(".ia-card").nth(card - 1) if card else self.at("page")
        if not card: self.page.set_viewport_size(WHOLE_PAGE)
        what.scroll_into_view_if_needed()
        what.screenshot(path=self.shots/f"{name}.png")
        self.page.set_viewport_size(WINDOW)

    def timed(self, what, section, act, kind="ok"):
        "Do something that starts a job of a section, and wait until it has ended, in time."
        status = f".ia-status-{section}"
        self.page.eval_on_selector(f"{status} .widget-html-content", "x => x.innerHTML = ''")
        began, used = time.monotonic(), processor_seconds()
        act()
        done = f"{status} .ia-ok, {status} .ia-error, {status} .ia-note:only-child"
        self.page.wait_for_selector(done, timeout=120_000)

        seconds, used = time.monotonic() - began, processor_seconds() - used
        self.times[what], limit = seconds, LIMIT*slack()
        text = self.text(f"status-{section}").strip()
        print(f"    {what}: {seconds:.2f} s ({used:.2f} s of processor): {text}", flush=True)
        assert self.page.locator(f"{status} .ia-{kind}").count(), f"{what}: the page says {text!r}"
        assert seconds < limit, f"{what} took {seconds:.1f} s, more than {limit:.1f}"
        return text

    def press(self, button, section, kind="ok", what=None):
        "Press a button that starts a job."
        return self.timed(what or button, section, self.at(f"do-{button}").click, kind)

    def broken(self): return self.page.locator(BROKEN).all_inner_texts()

    def check_width(self):
        "Nothing is wider than its place."
        wide = self.page.evaluate("""() =>
            [...document.querySelectorAll('.jp-OutputArea-output, .ia-page, .ia-card')]
            .filter(x => x.scrollWidth > x.clientWidth + 1)
            .map(x => `${x.className}: ${x.scrollWidth} > ${x.clientWidth}`)""")
        assert not wide, wide

# --------------------------------------------------------------------------------- the story

class Story(Hand):
    "The steps, in order. Each uses the page as the one before left it."
    def __init__(self, page, shots, box, url): # box: temporary folder; url: of the notebook
        super().__init__(page, shots)
        self.box, self.url = box, url

    def step_open(self):
        "the notebook opens, and its cells run"
        page = self.page
        page.goto(self.url)
        page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=60_000)
        page.get_by_text("| Idle").wait_for(timeout=60_000) # the kernel is connected
        page.keyboard.press("Control+b") # the file browser goes
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.wait_for_selector(f".ia-status-fact .ia-ok, {BROKEN}", timeout=120_000)
        assert not self.broken(), self.broken()
        assert self.value("model") == "smollm2", "not the model to begin with"
        assert self.value("source") == "atlas", "not the facts to begin with"
        assert self.value("prompt"), "no fact to begin with"

    def step_methods(self):
        "the methods are those of the registry"
        from intattn_edit.method.editor import METHODS
        options = self.at("method").locator("option").all_inner_texts()
        offered = [option.replace("\xa0", " ") for option in options] # unbreakable blanks
        assert offered == list(METHODS), offered

    def step_model(self):
        "a model of the lab, which brings its facts; another, and back"
        def of_the_lab(): self.choose("model", label="lab/qwen2")
        def another(): self.choose("model", label="lab/mistral")
        found = self.timed("choose a model of the lab", "fact", of_the_lab)
        assert "lab/qwen2" in found and "lab/wiki_counterfact" in found, found
        assert "lab/mistral" in self.timed("choose another", "fact", another)
        self.timed("choose it back", "fact", of_the_lab)

    def step_no_model(self):
        "a model that is not there is said to be so, and the old one stays"
        self.choose("model", label="other …")
        def enter():
            self.field("model-other").fill("lab/nothing")
            self.field("model-other").press("Enter")
        assert "no lab model" in self.timed("a wrong model", "fact", enter, "error")
        self.page.wait_for_function("""() => document.querySelector('.ia-model select')
                                             .selectedOptions[0].label == 'lab/qwen2'""")

    def step_fact(self):
        "a fact is chosen, and fills the form"
        before = self.value("prompt")
        self.choose("fact", index=2)
        self.page.wait_for_function(
            "x => document.querySelector('.ia-prompt input').value != x", arg=before)
        self.fact = {name: self.value(name) for name in ("prompt", "subject", "new", "old")}
        assert all(self.fact.values()), self.fact
        self.turn_questions()
        assert "→" in self.value("neighbours")
        assert self.value("rephrases")
        self.shot("bench_fact", 1)
        self.turn_questions()

    def step_stop(self):
        "a trace is stopped, and an edit"
        def stop_trace():
            self.at("do-trace").click()
            self.page.wait_for_selector(".ia-trace td[title]")
            self.at("do-stop-trace").click()
        assert "stopped" in self.timed("stop a trace", "trace", stop_trace, "note")
        assert self.at("do-traced").is_disabled()
        self.shot("bench_stopped", 2)

        def stop_edit():
            self.at("do-edit").click()
            self.page.wait_for_selector(".ia-status-edit .ia-progress")
            self.at("do-stop-edit").click()
        assert "stopped" in self.timed("stop an edit", "edit", stop_edit, "note")
        assert "No edit" in self.text("edits-on")
        assert self.at("do-undo").is_disabled()

    def step_trace(self):
        "a trace fills in, and implies alpha"
        self.page.evaluate("""() => {
            const trace = document.querySelector('.ia-trace');
            const count = () => window.seen.push(trace.querySelectorAll('td[title]').length);
            window.seen = [];
            new MutationObserver(count).observe(trace, {childList: true, subtree: true});
        }""")
        self.press("trace", "trace")
        seen = self.page.evaluate("window.seen") # numbers of cells that were shown
        assert len(set(seen)) > 4, f"the trace did not fill in: {seen}"
        assert "alpha = 0." in self.text("alpha-view")
        assert "layers" in self.text("alpha-view")
        self.shot("bench_trace", 2)

    def step_edit(self):
        "the edit, with the trace's alpha; before and after"
        self.at("do-traced").click()
        self.page.wait_for_function(
            "document.querySelector('.ia-means').innerText.includes('from the trace')")
        assert "is on the model" in self.press("edit", "edit")

        before, after = self.first_answer()[3:]
        assert before.startswith(self.fact["old"]), before
        assert self.fact["new"] in after and "✓" in after, after
        kinds = self.page.locator(".ia-answers tbody td:first-child").all_inner_texts()
        assert "rephrase" in kinds, kinds
        assert "neighbour" in kinds, kinds

        shown = self.text("after")
        for word in ("next token", "Edit success", "Generalisation", "Portability", "Locality",
                     "old: " + self.fact["old"], "rank"):
            assert word in shown, f"{word} is not shown"
        self.shot("bench_edit", 4)
        self.shot("bench_settings", 3)
        self.shot("bench")

    def step_undo(self):
        "undo, exactly"
        assert "bit for bit" in self.press("undo", "edit")
        assert self.fact["old"] in self.first_answer()[4], self.first_answer()
        assert self.at("do-undo").is_disabled()

    def step_wrong(self):
        "a subject that is not in the prompt"
        self.choose("fact", index=0)
        self.page.wait_for_function("document.querySelector('.ia-prompt input').value == ''")
        self.type("prompt", self.fact["prompt"])
        self.type("subject", "Nobody")
        self.type("new", "Paris")
        assert "is not in the prompt" in self.press("edit", "edit", "error", "a wrong subject")
        self.shot("bench_error", 3)

    def step_preserve(self):
        "a preserve set that is not there is said to be so, beside its field"
        self.type("subject", self.fact["subject"])
        self.type("preserve", "nowhere.txt")
        assert "no preserve set" in self.press("edit", "edit", "error", "a wrong preserve set")
        self.type("preserve", "")

    def step_typed(self):
        "a fact of one's own, by another method, with its own questions"
        from intattn_edit.engine.facts import load_facts
        template = self.fact["prompt"].replace(self.fact["subject"], "{}")
        self.typed = next(f.target_new for f in load_facts("lab/wiki_counterfact")
                          if f.template == template and f.subject != self.fact["subject"])
        self.type("subject", self.fact["subject"])
        self.type("new", self.typed)
        self.turn_questions()
        self.type("rephrases", template.format("The " + self.fact["subject"]))
        self.choose("method", label="MEMIT")
        self.press("edit", "edit", what="edit a typed fact")
        assert self.typed in self.first_answer()[4], self.first_answer()
        assert "MEMIT" in self.text("edits-on")
        self.shot("bench_typed", 4)

    def step_conflict(self):
        "another object for the same fact is refused"
        self.type("new", "Rome")
        assert "undo that edit first" in self.press("edit", "edit", "error", "a conflict")

    def step_save(self):
        "the delta is saved, and does the same in Python"
        self.type("folder", str(self.box/"saved"))
        self.press("save", "edit")
        self.check_saved()
        self.press("undo", "edit", what="undo it")

    def check_saved(self):
        from intattn_edit.engine.facts import load_facts
        from intattn_edit.engine.models import load_lm
        from intattn_edit.evaluation.protocols import continue_prompts
        from intattn_edit.method.delta import load_delta
        delta, (fact,) = load_delta(self.box/"saved"), load_facts(self.box/"saved/facts.json")
        assert fact.prompt == self.fact["prompt"], fact
        assert fact.target_new == self.typed, fact
        assert delta.meta["method"] == "MEMIT", delta.meta

        lm = load_lm("lab/qwen2")
        def answer(): return continue_prompts(lm, [fact.prompt])[fact.prompt].text
        assert answer().startswith(self.fact["old"]), answer()
        with delta.applied(lm): assert self.typed in answer(), answer()

    def step_whole(self):
        "the page as a whole: nothing wider than the window, no error anywhere"
        self.check_width()
        self.page.keyboard.press("Control+b")
        self.page.locator(".jp-FileBrowser").wait_for()
        self.check_width() # beside the file browser too
        assert not self.broken(), self.broken()
        assert not self.errors, self.errors
        log = (self.box/"log").read_text().splitlines()
        bad = [line for line in log if "Traceback" in line or line.startswith(("[E ", "[C "))]
        assert not bad, bad

    def play(self):
        "Numbers of steps passed and failed. What follows a failed step counts as failed too."
        steps = [name for name in vars(Story) if name.startswith("step_")]
        for i, name in enumerate(steps):
            step, title = getattr(self, name), name.removeprefix("step_")
            print(f"{i + 1}/{len(steps)} {title}: {step.__doc__}", flush=True)
            try: step()
            except Exception as error:
                print(f"FAILED: {title}: {error}", *self.errors, sep="\n    ", flush=True)
                with contextlib.suppress(Exception):
                    self.page.screenshot(path=self.shots/"failed.png")
                return i, len(steps) - i
        return len(steps), 0

# --------------------------------------------------------------------------------------- main

def arguments():
    parser = argparse.ArgumentParser(description="The edit bench in a real browser.")
    parser.add_argument("--screenshots", type=Path, default=ROOT/"runs/ui",
                        help="folder for the pictures (runs/ui); nbs/images for those of the docs")
    parser.add_argument("--log", action="store_true", help="print JupyterLab's log at the end")
    return parser.parse_args()

def main():
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) # so that all is put away then too
    args.screenshots.mkdir(parents=True, exist_ok=True)
    executable = browser_path()
    busy = f", now {LIMIT*slack():.1f} s: this machine is busy" if slack() > 1 else ""
    print(f"a click may take {LIMIT:.0f} s{busy}", flush=True)

    with contextlib.ExitStack() as stack:
        box = Path(stack.enter_context(
            tempfile.TemporaryDirectory(prefix="ui-test-", ignore_cleanup_errors=True)))
        url = stack.enter_context(jupyterlab(box))
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        stack.callback(browser.close)
        story = Story(browser.new_page(viewport=WINDOW), args.screenshots, box, url)
        passed, failed = story.play()
        if failed or args.log: print((box/"log").read_text()[-4000:])

    if story.times:
        what, seconds = max(story.times.items(), key=lambda x: x[1])
        print(f"slowest click: {what} {seconds:.1f} s")
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)

if __name__ == "__main__": main()
