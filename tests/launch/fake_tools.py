"""A checkout with the launchers in it, on a PATH of stand-ins that note how they are called."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERBS = ("train", "evaluate", "probe", "sample")
CLOUD = ("gcloud", "xpk", "docker", "sky", "sbatch", "srun", "scontrol", "squeue")
TOOLS = """base64 basename bash cat chmod cksum cp date dirname env git grep gzip head id ln ls
    mkdir mktemp mv nohup readlink rm rmdir sed setsid sh sort tail tar touch tr uname"""

# Answers with the first line of $FAKE_ANSWERS/<kind>, which is then used up: "CODE text"; without a
# line, 0 and silence. The kind of a call is the first that matches in $FAKE_ANSWERS/kinds.
FAKE_TOOL = r"""#!/usr/bin/env bash
printf -v call '%s\x1f' "${0##*/}" "$@"
printf '%s\x1e' "$call" >>"$FAKE_LOG" # in one piece: the two sides of a pipe come here at once
kind=${0##*/}
while IFS=$'\t' read -r name pattern; do
  # shellcheck disable=SC2053
  if [[ "${0##*/} $*" == $pattern ]]; then kind=$name; break; fi
done <"$FAKE_ANSWERS/kinds"
file=$FAKE_ANSWERS/$kind
[ -s "$file" ] || exit 0
IFS= read -r answer <"$file"
sed -i 1d "$file"
code=${answer%% *}
text=${answer#"$code"}
text=${text# }
[ -z "$text" ] || printf '%b\n' "$text"
if [ -n "${FAKE_NOTES:-}" ] && [ "$kind" = srun ]; then . "$FAKE_NOTES"; fi
exit "$code"
"""


class Launchers:
    """The checkout, its PATH, and what was called."""

    def __init__(self, base: Path):
        self.base = base
        self.root = base / "a checkout"
        self.bin, self.home, self.answers = base / "bin", base / "home", base / "answers"
        self.log = base / "log"
        for folder in (self.root, self.bin, self.home, self.answers):
            folder.mkdir()
        shutil.copy2(ROOT / "pyproject.toml", self.root)
        shutil.copytree(ROOT / "launch", self.root / "launch")
        (self.root / "hippocampus").mkdir()
        for verb in VERBS:
            (self.root / "hippocampus" / f"{verb}.py").touch()
        tools = base / "tools"
        tools.mkdir()
        for tool in TOOLS.split():
            where = shutil.which(tool)
            if where is None and tool == "setsid":
                continue
            assert where, tool
            (tools / tool).symlink_to(where)
        sleep = shutil.which("sleep")
        assert sleep
        (tools / "sleep").symlink_to(sleep)
        (self.answers / "kinds").touch()
        self.env = {
            "PATH": f"{self.bin}:{tools}", "HOME": str(self.home), "TMPDIR": str(base),
            "FAKE_LOG": str(self.log), "FAKE_ANSWERS": str(self.answers),
            "HIPPOCAMPUS_READY_PYTHON": "python"}
        self.tools(*CLOUD)
        self.program("python", "#!/usr/bin/env bash\nexit 0\n")

    def program(self, name, text):
        target = self.bin / name
        target.write_text(text)
        target.chmod(0o755)
        return target

    def tools(self, *names):
        """Stand-ins that note their arguments and answer as `answer` says."""
        for name in names:
            self.program(name, FAKE_TOOL)

    def kinds(self, **patterns):
        """Which calls (bash patterns over the whole command) count as which kind."""
        (self.answers / "kinds").write_text(
            "".join(f"{kind}\t{pattern}\n" for kind, pattern in patterns.items()))

    def answer(self, kind, *lines):
        """What the next calls of a kind answer: "CODE text"."""
        (self.answers / kind).write_text("".join(f"{line}\n" for line in lines))

    def start(self, script, *arguments, cwd=None, **env):
        return subprocess.Popen(
            ["bash", str(self.root / "launch" / script), *arguments], cwd=cwd or self.root,
            env=self.env | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, script, *arguments, cwd=None, timeout=30, **env):
        process = self.start(script, *arguments, cwd=cwd, **env)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def calls(self, name=None):
        """Every call so far as a list of words, of one program or of all."""
        text = self.log.read_text() if self.log.exists() else ""
        calls = [call.split("\x1f")[:-1] for call in text.split("\x1e")[:-1]]
        return [call for call in calls if name in (None, call[0])]


def read_words(line):
    """The words of a line as bash reads them: what a launcher printed is what would be run."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True,
                          check=True, env={"PATH": os.environ["PATH"]})
    return done.stdout.split("\0")[:-1]


def error_and_hint(done):
    """The two lines that a wrong argument ends with."""
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith("error: ") and lines[1].startswith("hint: ")
    return lines
