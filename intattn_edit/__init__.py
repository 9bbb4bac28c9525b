__version__ = "0.1.0"

# The names that the overview and a user's script need, each with the module it lives in. They are loaded when they
# are first asked for, so that `import intattn_edit` and the command line's help do not wait for torch.
# nbdev writes the version above and leaves the rest of this file as it is: nbs/tools/packaging.ipynb tests both.
PROMISED = {
    "LM": "engine.models",
    "load_lm": "engine.models",
    "prove": "engine.models",
    "Site": "engine.models",
    "sites": "engine.models",
    "Fact": "engine.facts",
    "Edit": "engine.facts",
    "load_facts": "engine.facts",
    "known": "method.tracing",
    "trace_facts": "method.tracing",
    "balance": "method.balance",
    "find_keys": "method.keys_values",
    "find_values": "method.keys_values",
    "second_moments": "method.moments",
    "factor": "method.solve",
    "Delta": "method.delta",
    "load_delta": "method.delta",
    "Pathway": "method.editor",
    "editor": "method.editor",
    "settings_of": "method.editor",
    "Fixed": "method.intattn",
    "Traced": "method.intattn",
    "PerFact": "method.intattn",
    "PerLayer": "method.intattn",
    "IntAttn": "method.intattn",
    "MEMIT": "editors.memit",
    "evaluate": "method.metrics",
    "summary": "method.metrics",
    "generate": "method.metrics",
    "perplexity": "evaluation.alarms",
}
__all__ = list(PROMISED)

def __getattr__(name):
    "A promised name, from its module."
    from importlib import import_module
    if name in PROMISED: return getattr(import_module(f"{__name__}.{PROMISED[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

def __dir__():
    return sorted([*globals(), *PROMISED])
