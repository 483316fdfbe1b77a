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
# # Hippocampus: train a language model with a memory, and look inside
#
# In Colab: *File → Upload notebook*, or *File → Open notebook → GitHub* and the address of your
# copy of the repository, which also goes into `repository` below.
#
# This notebook trains a small hybrid model (a state-space path, a modern-Hopfield memory and
# causal attention side by side in every layer, mixed by a learned gate), shows its learning curves,
# lets it write, measures it in bits per byte, and opens it up: which path does each layer listen
# to, and what happens when one of them falls silent?
#
# It needs no account and no data set. **Runtime → Run all** is enough, on a TPU, a GPU or a CPU; it
# works outside Colab too. On two CPU cores the training takes a few minutes.

# %% [markdown]
# ## 1. Settings
#
# A Colab machine is taken away after a while, and everything on its disk with it. With `use_drive`
# (or a Google Cloud Storage `bucket`) the run is kept elsewhere: after **Reconnect**, choose **Run
# all** again, and training goes on from the last checkpoint. Without them that holds only as long
# as the machine does.

# %%
repository = ""  # @param {type:"string"}
config_name = "quickstart"  # @param ["quickstart", "shakespeare_laptop"]
steps = 600  # @param {type:"integer"}
use_drive = False  # @param {type:"boolean"}
bucket = ""  # @param {type:"string"}

# %% [markdown]
# ## 2. Install
#
# Colab comes with a JAX that fits its accelerator. Only what is missing beside it is installed: a
# JAX that pip replaces no longer finds the TPU or the GPU.

# %%
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

in_colab = importlib.util.find_spec("google") is not None and (
    importlib.util.find_spec("google.colab") is not None)


def shell(command, folder="."):
    """Runs a command and shows what it says."""
    environment = {**os.environ, "HIPPOCAMPUS_NO_VENV": "1", "HIPPOCAMPUS_PYTHON": sys.executable}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout, end="")
    if done.returncode:
        raise SystemExit(f"failed: {command}")


installed = importlib.util.find_spec("hippocampus")
places = [Path.cwd(), *Path.cwd().parents, Path("hippocampus").resolve()]
if installed is not None and installed.origin:
    places.insert(0, Path(installed.origin).parents[1])
checkout = next((place for place in places if (place / "launch/_bootstrap.sh").exists()), None)
if checkout is None:
    if not repository:
        raise SystemExit("set `repository` above to the address of the repository")
    shell(f"git clone --quiet --depth=1 '{repository}' hippocampus")
    checkout = Path("hippocampus").resolve()
if installed is None:
    shell(". launch/_bootstrap.sh; set_up", checkout)
    sys.path.insert(0, str(checkout))
    importlib.invalidate_caches()

# %%
import jax

import hippocampus as hp

devices = jax.devices()
print(f"Hippocampus {hp.__version__}, JAX {jax.__version__}, "
      f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})")
if devices[0].platform == "cpu" and in_colab:
    print("Runtime → Change runtime type → a GPU or a TPU makes this many times faster")

# %% [markdown]
# ## 3. Where the run is kept

# %%
runs = checkout / "checkpoints"
if in_colab and use_drive:
    from google.colab import drive

    drive.mount("/content/drive")
    runs = Path("/content/drive/MyDrive/hippocampus")
elif in_colab and bucket:
    from google.colab import auth

    auth.authenticate_user()
    runs = Path("/content/runs")
    key, packages = "/usr/share/keyrings/cloud.google.asc", "https://packages.cloud.google.com/apt"
    shell(f"""set -e
    if ! command -v gcsfuse >/dev/null; then
      curl -fsS {packages}/doc/apt-key.gpg > {key}
      echo "deb [signed-by={key}] {packages} gcsfuse-$(lsb_release -c -s) main" \
        > /etc/apt/sources.list.d/gcsfuse.list
      apt-get -qq update && apt-get -qq install gcsfuse
    fi
    mkdir -p {runs}
    mountpoint -q {runs} || gcsfuse --implicit-dirs '{bucket.removeprefix("gs://")}' {runs}""")
run = Path(os.environ.get("HIPPOCAMPUS_NOTEBOOK_RUN", runs / f"{config_name}-notebook"))
print("the run is kept in", run)

# %% [markdown]
# ## 4. Train
#
# A config is a small Python file, and every field of it can be changed. Stop the cell whenever you
# like: it saves first, then says `Stopped`; running it again goes on from there. When the run is
# finished, it says so and does nothing; raise `steps` to go on.

# %%
import json

overrides = {"train.steps": steps}
overrides |= json.loads(os.environ.get("HIPPOCAMPUS_NOTEBOOK_OVERRIDES", "{}"))
config = hp.load_config(checkout / f"configs/{config_name}.py", overrides)
run = hp.fit(config, run)

# %% [markdown]
# ## 5. Curves
#
# Every number that training reports is a row of `metrics.jsonl`, and in TensorBoard (`%load_ext
# tensorboard`, then `%tensorboard --logdir` with the folder above). Losses are in nats per token;
# for bytes, divide by ln 2 to get bits per byte.

# %%
import matplotlib.pyplot as plt

rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def series(name):
    """The steps and values of one series; a value that was not finite is left out."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return list(zip(*points, strict=True)) or [(), ()]


figure, (losses, gates) = plt.subplots(1, 2, figsize=(11, 3.6))
losses.plot(*series("train/loss"), label="training")
losses.plot(*series("eval/loss"), marker="o", label="validation (averaged weights)")
losses.set(xlabel="step", ylabel="nats per token", title="Loss")
losses.legend()
for path in config.model.paths:
    gates.plot(*series(f"mixer/gate/{path}"), label=path)
gates.set(xlabel="step", ylabel="mean gate", title="How much each path counts", ylim=(0, 1))
gates.legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# ## 6. Let it write
#
# `hp.load` opens the best checkpoint, with averaged weights.

# %%
lm = hp.load(run)
prompt = config.sample.prompt
for temperature in (0.0, 0.8):
    print(f"--- temperature {temperature}")
    print(prompt + lm.generate(prompt, max_new_tokens=160, temperature=temperature, seed=0))

# %% [markdown]
# ## 7. How good is it?
#
# Bits per byte count how many bits the model needs for each byte of a text that it has not seen:
# 8 is knowing nothing, lower is better, and models with different tokenizers can be compared. The
# validation text lies behind the training text in the same corpus. A text of another kind is
# harder.

# %%
results = json.loads((run / "results.json").read_text())
print(f"validation, step {results['step']}: {results['final/bits_per_byte']:.3f} bits per byte")
for text in ("Return the number of items in the container, or raise a TypeError.",
             "Shall I compare thee to a summer's day? Thou art more lovely and more temperate."):
    print(f"{lm.score(text).bits_per_byte:6.3f} bits per byte: {text}")

# %% [markdown]
# ## 8. Which memory does it listen to?
#
# Every intermediate has a name, and `run_with_cache` returns the ones that match. The mixer's gates
# are B × T × P: for each token, a weight for each path, which sum to 1. Left: their mean for each
# layer and path. Right: the gates of the last layer, token by token.

# %%
import numpy as np

text = "Return the number of items."
logits, cache = lm.run_with_cache(text, names="layers.*.mixer.gates")
gates_LTP = np.stack([np.asarray(cache[f"layers.{layer}.mixer.gates"])[0]
                      for layer in range(config.model.n_layers)])
paths = list(config.model.paths)

figure, (by_layer, by_token) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=(1, 2))
by_layer.imshow(gates_LTP.mean(axis=1), vmin=0, vmax=1, cmap="viridis", aspect="auto")
by_layer.set(title="Mean gate", ylabel="layer", xticks=range(len(paths)), xticklabels=paths,
             yticks=range(config.model.n_layers))
for (layer, path), gate in np.ndenumerate(gates_LTP.mean(axis=1)):
    by_layer.text(path, layer, f"{gate:.2f}", ha="center", va="center",
                  color="black" if gate > 0.5 else "white")
by_token.imshow(gates_LTP[-1].T, vmin=0, vmax=1, cmap="viridis", aspect="auto")
by_token.set(title=f"Layer {config.model.n_layers - 1}, token by token",
             yticks=range(len(paths)), yticklabels=paths, xticks=range(gates_LTP.shape[1]),
             xticklabels=[lm.tokenizer.decode(token[None]) for token in lm.tokenizer.encode(text)])
figure.tight_layout()
plt.show()

# %% [markdown]
# ## 9. Change one thing
#
# `run_with_edits` replaces intermediates by functions of themselves. Here one path of the first
# layer falls silent, and the text costs more bits, or not: that tells how much this model relies on
# that path there. (A gate says how loud a path is; an edit, what it is good for.)

# %%
ids = lm.tokenizer.encode(text)


def bits_per_byte(logits_BTV):
    """Of `text`, under these predictions of each next token."""
    log_p_TV = np.asarray(jax.nn.log_softmax(logits_BTV[0, :-1]))
    nats = -np.take_along_axis(log_p_TV, np.asarray(ids)[1:, None], axis=1).sum()
    return nats / np.log(2) / lm.tokenizer.count_bytes(ids[1:])


print(f"as trained                {bits_per_byte(logits):6.3f} bits per byte")
for path in paths:
    edited, _ = lm.run_with_edits(text, {f"layers.0.{path}.out": lambda out_BTD: 0 * out_BTD})
    print(f"layer 0 without {path:9s} {bits_per_byte(edited):6.3f}")

# %% [markdown]
# ## What to try next
#
# - **Longer**: raise `steps` in the settings and run all again; training goes on.
# - **Another model**: `overrides["model.paths"] = ("ssm", "attention")`, with another run folder,
#   trains without the Hopfield memory. `hippocampus/config.py` lists every field with its range.
# - **Another text**: `overrides["data.corpus"] = "my.txt"`, in another run folder; or
#   `config_name = "shakespeare_laptop"`.
# - **What each memory does**: `!python -m hippocampus.probe --workdir=` with the run folder knocks
#   paths out, shuffles them, looks inside, and writes `report.html`; `docs/probing.md` says how to
#   read it, and `docs/ablations.md` why a knock-out is not an ablation.
# - **All names** of intermediates: `lm.run_with_cache(text)[1].keys()`; `docs/architecture.md`
#   explains them.
# - **More devices**: `docs/launching.md` has a launcher for TPU slices, SLURM, GKE and SkyPilot.
