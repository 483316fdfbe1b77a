"""Selection and answer accuracy, with and without tools, on generated questions.

    python benchmarks/tool_use.py --model=FOLDER [--n=50] [--require_call] [--no_constrain]

FOLDER is a run, an export, or a pretrained decoder with its tokenizer. The same questions are put
without tools, with the built-in tools, and the two kinds of question have a row each. A learned
head, which chooses a tool from the hidden state of the question, stands beside the calls.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from hippocampus.generation.loading import load
from hippocampus.generation.pretrained import load_pretrained
from hippocampus.runs.run_folder import RunFolder
from hippocampus.serving.call_grammar import is_installed
from hippocampus.serving.tool_config import ToolLimits, ToolServer
from hippocampus.serving.tool_formats import format_of
from hippocampus.serving.tool_head import ToolHead, calibration_error
from hippocampus.serving.tool_questions import questions, score
from hippocampus.serving.tools import Toolbox


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--n", type=int, default=50, help="questions of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--calls", type=int, default=8, help="most of a text")
    parser.add_argument("--output_characters", type=int, default=4000, help="most of an answer")
    parser.add_argument("--require_call", action="store_true")
    parser.add_argument("--no_constrain", action="store_true")
    flags = parser.parse_args()
    lm = load(flags.model) if is_run(flags.model) else load_pretrained(flags.model)
    asked, documents = questions(flags.n, flags.seed)
    prompts = [one.text for one in asked]
    settings = {"max_new_tokens": flags.max_new_tokens, "temperature": 0.0}
    # Without tools the question stands in the same turns.
    style = format_of("auto", lm.tokenizer)
    bare = lm.generate([f"{style.user[0]}{text}{style.user[1]}{style.assistant}"
                        for text in prompts], **settings)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in documents.items():
            Path(folder, name).write_text(text)
        limits = ToolLimits(calls=flags.calls, output_characters=flags.output_characters)
        with Toolbox(ToolServer("own", ["*"], folder=folder), limits) as tools:
            batch = lm.generate_with_tools(
                prompts, tools=tools, constrain=False if flags.no_constrain else "auto",
                require_call=flags.require_call, **settings)
    table = Table("questions", "tools", "n", "right answer", "right tool first", "exact results")
    for tools, found in (("none", score(asked, bare)),
                         ("four", score(asked, [one.text for one in batch], batch))):
        for kind, one in found.items():
            table.add_row(kind, tools, str(one.n), f"{one.answered:.1%}",
                          "" if tools == "none" else f"{one.selected:.1%}",
                          "" if one.exact != one.exact else f"{one.exact:.1%}")
    console = Console()
    console.print(f"{flags.model.name}, {style.name}, {jax.devices()[0].device_kind}, jax "
                  f"{jax.__version__}, constrained: {is_installed() and not flags.no_constrain}")
    console.print(table)
    console.print(str(batch.summary))
    head, p_NK, labels = learned_head(lm, asked, flags)
    right = float((p_NK.argmax(1) == labels).mean())
    console.print(f"learned head, {2 * flags.n} other questions to learn from: right tool "
                  f"{right:.1%}, calibration error {calibration_error(p_NK, labels):.3f}, "
                  f"temperature {head.temperature:.2f}")


def learned_head(lm, asked, flags):
    """A head that has learned from other questions, and what it says of these."""
    others, _ = questions(flags.n, flags.seed + 1)
    head = ToolHead.fit(lm, [one.text for one in others], [one.tools[0] for one in others])
    labels = np.array([head.tools.index(one.tools[0]) for one in asked])
    return head, head.probabilities(lm, [one.text for one in asked]), labels


def is_run(folder):
    """Whether it is ours, and not a pretrained decoder."""
    return RunFolder.at(folder).config.exists()


if __name__ == "__main__":
    main()
