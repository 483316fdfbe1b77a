# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Adapters on a frozen language model: train them, and watch what they do
#
# A *Buu* is a pretrained decoder that stays as it is, with a small adapter in some of its layers:
# a state-space branch and a memory of learned slots, behind a gate; at first it adds nothing. This
# notebook trains one, trains low-rank adapters (LoRA) of about as many parameters as a control,
# and looks inside: how far do the gates open, which slots are read by which tokens, what is each
# layer worth, and is anything better than without?
#
# Give `backbone` the folder of a pretrained decoder (SmolLM2, Llama, Qwen3, Gemma 3, Gemma-3n, a
# `.gguf` or llama2.c file; `docs/backbones.md`). Without one the notebook first trains a decoder
# of its own, a small one of bytes, on the documentation that comes with Python: enough to see
# everything work, not to learn what adapters are worth.

# %% [markdown]
# ## 1. Settings

# %%
backbone = ""  # @param {type:"string"}
steps = 200  # @param {type:"integer"}
n_queries = 100  # @param {type:"integer"}
queries = ""  # @param {type:"string"}

# %%
import json
import os
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import hippocampus as hp

checkout = Path(hp.__file__).resolve().parents[1]
runs = Path(os.environ.get("HIPPOCAMPUS_NOTEBOOK_RUN", checkout / "checkpoints" / "buu-notebook"))
backbone = os.environ.get("HIPPOCAMPUS_NOTEBOOK_BACKBONE", backbone)
queries = os.environ.get("HIPPOCAMPUS_NOTEBOOK_QUERIES", queries)
print(f"Hippocampus {hp.__version__}, JAX {jax.__version__}, {jax.devices()[0].device_kind}")
print("runs are kept in", runs)

# %% [markdown]
# ## 2. A decoder
#
# Without a pretrained one: random parameters of a small Llama, all of which are trained for a
# while. Its folder has the form of the Hugging Face hub.

# %%
from hippocampus.config_files import defaults


def configure(**changes):
    """The config of a training, with changes; a name's "__" is a dot."""
    overrides = {
        "data.corpus": "pydoc", "data.tokenizer": "backbone", "data.context": 128,
        "train.steps": steps, "train.batch_size": 8, "model.backbone.path": str(backbone),
        "model.adapters.count": 2, "model.adapters.memory.slots": 64,
        "optimizer.learning_rate": 2e-3, "optimizer.warmup_steps": steps // 10, "ema.decay": 0.0,
        "eval.every_steps": steps // 2, "eval.max_windows": 32, "eval.batch_size": 8,
        "log.every_steps": 10, "log.histogram_every_steps": 0}
    overrides |= json.loads(os.environ.get("HIPPOCAMPUS_NOTEBOOK_OVERRIDES", "{}"))
    overrides |= {name.replace("__", "."): value for name, value in changes.items()}
    return hp.load_config(defaults("buu"), overrides)


if not backbone:
    from hippocampus.backbones.architecture import Architecture, LayerSpec
    from hippocampus.backbones.hub_tokenizer import HubTokenizer
    from hippocampus.backbones.loading import Backbone, build_decoder, save_backbone
    from hippocampus.backbones.rotary import Rope
    from hippocampus.data.tokenizers import byte_tokenizer

    layers = (LayerSpec(256, Rope(1e4)),) * 4
    decoder = build_decoder(Architecture("llama", 256, 96, 4, 2, 24, 512, layers, 1e-6, 24**-0.5))
    params = jax.jit(decoder.init)(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    reads_bytes = HubTokenizer(byte_tokenizer().to_json())
    backbone = runs / "random-decoder"
    if not backbone.exists():
        save_backbone(backbone, Backbone(decoder, params, reads_bytes))
    whole = configure(model__adapters__count=0, model__backbone__train="full",
                      train__steps=2 * steps)
    pretrained = hp.load(hp.fit(whole, runs / "pretraining"))
    backbone = runs / "decoder"
    if not backbone.exists():
        save_backbone(backbone, Backbone(decoder, pretrained.params["backbone"], reads_bytes))
print("the decoder is in", backbone)

# %% [markdown]
# ## 3. Train the adapters
#
# Nothing of the decoder is trained: its parameters are in no optimizer and in no checkpoint. While
# it trains, gates, slots and what each adapter adds are series in `metrics.jsonl` and TensorBoard.

# %%
run = hp.fit(configure(), runs / "adapters")
lm = hp.load(run)
adapted = lm.model.layers
print("layers with an adapter:", adapted)

rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def series(name):
    """The steps and values of one series."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return list(zip(*points, strict=True)) or [(), ()]


figure, panels = plt.subplots(1, 3, figsize=(12, 3.2))
panels[0].plot(*series("train/loss"))
panels[0].set(xlabel="step", ylabel="nats per token", title="Loss")
for panel, name, title in ((panels[1], "added", "What each adapter adds (rms)"),
                           (panels[2], "effective_slots", "Effective slots")):
    for layer in adapted:
        panel.plot(*series(f"adapters/{name}/{layer}"), label=f"layer {layer}")
    panel.set(xlabel="step", title=title)
panels[1].legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# ## 4. How far are the gates open?
#
# Of every layer, over generated queries of five categories, each with its answer. A gate within
# 0.0001 of 0 or 1 is *saturated*: it hardly learns any more.

# %%
report = lm.gate_statistics()
for layer, gate in report.layers.items():
    print(f"layer {layer}: mean {gate.mean:.3f}, sd {gate.sd:.3f}, "
          f"5 % to 95 % {gate.percentiles[0]:.3f} to {gate.percentiles[-1]:.3f}, "
          f"saturated {gate.saturated:.1%}, times {gate.scale}")

categories = list(report.categories)
mean_LC = np.array([[report.categories[name][layer].mean for name in categories]
                    for layer in adapted])
figure, axes = plt.subplots(figsize=(7, 1 + 0.5 * len(adapted)))
axes.imshow(mean_LC, cmap="Blues", vmin=0, vmax=1, aspect="auto")
axes.set(xticks=range(len(categories)), xticklabels=categories, yticks=range(len(adapted)),
         yticklabels=[f"layer {layer}" for layer in adapted], title="Mean gate")
for (y, x), gate in np.ndenumerate(mean_LC):
    axes.text(x, y, f"{gate:.3f}", ha="center", va="center",
              color="white" if gate > 0.6 else "black")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## 5. Which slots are read, and by what?
#
# *Effective slots* are exp(entropy of the use): all of them where all are read alike, 1 where one
# is read. A slot is *dead* if it is read less than a tenth of even use. Mind the entropy of a
# single read: where it is near log S, every token reads the mean of all slots, and however many
# are effective, they say the same to everyone.

# %%
for layer in adapted:
    usage = lm.memory_usage(layer)
    slots = usage.slots
    print(f"layer {layer}: {slots.effective:.1f} of {slots.slots} slots effective, {slots.dead} "
          f"dead, {usage.duplicates} duplicates, entropy of a read {slots.read_entropy:.2f} of "
          f"{np.log(slots.slots):.2f}")
    for hot in usage.hottest[:3]:
        tokens = ", ".join(f"{token!r} {n}" for token, n in hot.tokens[:4])
        print(f"    slot {hot.slot}: {hot.usage * slots.slots:.2f} times even use; {tokens}")

# %% [markdown]
# ## 6. A control: low-rank adapters of as many parameters
#
# The same decoder, the same text, the same steps.

# %%
from hippocampus.layers.lora import linear_layers, matching
from hippocampus.probing.adapters.opening import trained_parameters

wanted = trained_parameters(lm)
targets = ("layers_*.attention.*", "layers_*.mlp.*")
shapes = linear_layers(lm.params["backbone"])
per_rank = sum(sum(shapes[name]) for name in matching(shapes, targets))
rank = max(1, round(wanted / per_rank))
control = hp.fit(configure(model__adapters__count=0, model__backbone__train="lora",
                           model__lora__rank=rank, model__lora__targets=targets), runs / "lora")
print(f"adapters: {wanted:,} parameters; LoRA of rank {rank}: "
      f"{trained_parameters(hp.load(control)):,}")

# %% [markdown]
# ## 7. Are the adapters worth anything?
#
# One command measures the decoder alone, LoRA, the adapters, and the adapters with their memory
# zeroed and shuffled, on held-out text and on queries; switches the layers on one by one; and
# writes a report. It is `python -m hippocampus.probe --suite=buu` with the two runs.

# %%
from hippocampus.probing.adapters.opening import Request
from hippocampus.probing.command import probe_run

_, page = probe_run(run, "buu", adapters=Request(
    lora=str(control), queries=queries, n_queries=n_queries))

# %%
from hippocampus.probing.results import read_suite

result, _ = read_suite(run / "probes" / "buu.json")
for note in result.notes:
    print(note)
try:
    from IPython.display import HTML, display

    for plot in result.plots:
        display(HTML(f"<h4>{plot.title}</h4><div style='max-width:50em'>{plot.svg}</div>"
                     f"<p>{plot.caption}</p>"))
except ImportError:
    print("pictures:", ", ".join(plot.name for plot in result.plots))

# %% [markdown]
# ## 8. Is the model in order?
#
# Five checks, each of which fails it, and a score. A healthy model can be useless: what adapters
# are worth the controls above say.

# %%
print(lm.health_report())
print("all of it, on one page:", page)

# %% [markdown]
# ## What to try next
#
# - **A real decoder**: set `backbone`; the configs `buu_…` are experiments of this kind.
# - **Your own queries**: `queries`, a file of JSON lines with category, prompt and answer.
# - **Your own intervention**: `hippocampus.probing.adapters.controls.enabled(lm, [layer])` gives
#   arrays for `lm.model.apply(…, method="forward", interventions=…)`.
# - `docs/buu_monitors.md` says what every number means.
