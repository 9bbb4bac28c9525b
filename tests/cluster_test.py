"""A plan of eight runs on a Ray cluster of two machines, one of which is killed at work.

    python tests/cluster_test.py            the first eight runs of `--size smoke`, some minutes
    python tests/cluster_test.py --small    eight notebooks that only sleep

Both machines are this one: two nodes of Ray, each with one core. Once a record is there and the
second machine is at work, all its processes are killed. The records have to be those of a plain
run, but for dates and seconds. Then second moments are summed by what is left of the cluster, and
have to be those of one process, bit for bit. Needs Ray: pip install 'intattn-edit[ray]'.
"""
import argparse, contextlib, io, os, sys, tempfile, threading, time
from pathlib import Path
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["OMP_NUM_THREADS"] = "1" # as on the cluster
import nbformat, psutil, torch
from ray.cluster_utils import Cluster as Machines
from intattn_edit.engine.models import sites
from intattn_edit.engine.preserve import preserve_texts
from intattn_edit.tools.execute import run_all
from intattn_edit.tools.grid import Run, plan
from intattn_edit.tools.on_ray import Cluster, sharded_moments

NODE = dict(num_cpus=1, include_dashboard=False, object_store_memory=100*2**20)

# ------------------------------------------------------------------------------ the plan

DECLARED = """#| export
from intattn_edit.tools.grid import Experiment, Run
def cells(params): return [dict(model=params["model"], seed=s) for s in params["seeds"]]
experiment = Experiment("sleeper", cells)"""
BODY = """import time
run = Run.here(experiment, globals(), {folder!r})
for cell in run.due:
    time.sleep(1)
    with run.record(cell) as record: record.keep(metrics=dict(third=cell["seed"]/3))"""

def sleepers(folder, out):
    "Eight runs of a notebook that sleeps before each of its records."
    new = nbformat.v4.new_code_cell
    told = new("model = 'm'\nseeds = [0, 1, 2]\nout = None", metadata={"tags": ["parameters"]})
    body = new(BODY.format(folder=str(folder)))
    book = nbformat.v4.new_notebook(cells=[told, new(DECLARED), body])
    book.metadata.kernelspec = dict(name="python3", display_name="python3", language="python")
    nbformat.write(book, folder/"sleeper.ipynb")
    declared = {}
    exec(DECLARED, declared)
    return [Run.of(declared["experiment"], folder, model=m, out=str(out/"results"))
            for m in "abcdefgh"]

def eight(small, folder, name):
    "The runs, with a folder of their own for what they write."
    out = folder/name
    return sleepers(folder, out) if small else plan("smoke", out/"results", out/"store")[:8]

def records(runs):
    "All their records, without what no two runs share."
    own = ("date", "seconds")
    return [[{k: v for k, v in r.results.record(r.name, c).items() if k not in own}
             for c in r.cells] for r in runs]

# ------------------------------------------------------------------------------ the machines

def processes(node):
    "All processes of a machine: Ray's, its workers, their notebooks."
    for kind in node.all_processes.values():
        for p in kind:
            with contextlib.suppress(psutil.NoSuchProcess):
                own = psutil.Process(p.process.pid)
                yield from (own, *own.children(recursive=True))

def at_work(node):
    "Whether a notebook's kernel runs there."
    for p in processes(node):
        with contextlib.suppress(psutil.Error):
            if "ipykernel_launcher" in p.cmdline(): return True
    return False

def kill_at_work(node, runs, killed):
    "Kill a machine once a record is there and a notebook runs on it."
    while not (at_work(node) and any(len(r.todo()) < len(r.cells) for r in runs)): time.sleep(.2)
    time.sleep(2)
    victims = list(processes(node))
    for p in victims:
        with contextlib.suppress(psutil.NoSuchProcess): p.kill()
    killed.append(len(victims))

# ------------------------------------------------------------------------------ the test

def on_cluster(small, folder):
    "The runs on two machines, one of them killed, and moments on the other."
    machines = Machines(initialize_head=True, head_node_args=NODE)
    try:
        second, killed = machines.add_node(**NODE), []
        runs, watched = eight(small, folder, "ray"), eight(small, folder, "ray")
        killer = threading.Thread(target=kill_at_work, args=(second, watched, killed), daemon=True)
        killer.start()
        with contextlib.redirect_stderr(io.StringIO()) as said:
            n = run_all(runs, folder/"ray", on=machines.address, quiet=True)
        print(*[line for line in said.getvalue().splitlines() if "lost" in line], sep="\n")
        assert killed, "the second machine was never at work"
        assert "started again" in said.getvalue(), "no run was lost"
        print(f"{n} records of {len(runs)} runs; {killed[0]} processes killed", flush=True)
        moments_on(machines.address)
        return runs
    finally: machines.shutdown()

def moments_on(address):
    "Moments of shards, on the cluster and here."
    job = "lab/qwen2", preserve_texts("lab", 200), sites(mlp=[0, 1], attn=[0]), 4
    cluster = Cluster(address)
    try: away = sharded_moments(*job, cluster)
    finally: cluster.close()
    here = sharded_moments(*job)
    assert here.count == away.count
    assert all(torch.equal(here[site], away[site]) for site in job[2])
    print(f"second moments of {away.count} tokens in 4 shards: equal, bit for bit", flush=True)

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--small", action="store_true", help="notebooks that only sleep")
    small, begun = p.parse_args().small, time.time()
    with tempfile.TemporaryDirectory() as folder:
        away = on_cluster(small, Path(folder))
        print(f"cluster: {time.time() - begun:.0f} s", flush=True)
        here = eight(small, Path(folder), "plain")
        run_all(here, Path(folder)/"plain", cores=1, quiet=True)
        old, new = records(here), records(away)
        assert not any(run.todo() for run in away)
        assert old == new, "the records of the cluster are not those of the plain run"
        print(f"{sum(map(len, new))} records of {len(new)} runs, all equal to those of the plain "
              f"run; {time.time() - begun:.0f} s")

if __name__ == "__main__": main()
