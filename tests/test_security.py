"""What a file, a name or a command line from somebody else must not bring about."""

import ast
import json
import subprocess
from pathlib import Path

import pytest
import quick_xla
import tiny_run

from hippocampus.config_files import defaults, fields, load_config, read_json, to_json
from hippocampus.errors import ConfigError, DataError, HippocampusError
from hippocampus.exports.folder import check_free, new_export
from hippocampus.files import check_nameable
from hippocampus.runs.redact import HIDDEN, redact, redact_command
from hippocampus.runs.run_folder import RunFolder, RunLock, environment

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("hippocampus", "probes", "benchmarks", "configs", "launch", "notebooks")


# ---------------------------------------------------------------- what would run code

UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {("os", "system"), ("os", "popen"), ("torch", "load"), ("yaml", "load"),
              ("yaml", "load_all"), ("yaml", "unsafe_load"), ("yaml", "full_load"),
              ("subprocess", "getoutput"), ("subprocess", "getstatusoutput"),
              ("pandas", "read_pickle"), ("pd", "read_pickle"),
              ("serialize_executable", "deserialize_and_load")}
FLAGS = {"shell", "allow_pickle", "trust_remote_code"}


def violations(source: str) -> list[str]:
    """What of a module's source could run code that a file or a person brought."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found += [module] if module.split(".")[0] in UNPICKLERS else [
                f"{module}.{a.name}" for a in node.names
                if (module.rpartition(".")[2], a.name) in ATTRIBUTES or a.name in UNPICKLERS]
        elif isinstance(node, ast.Call):
            found += [f"{keyword.arg}=" for keyword in node.keywords if keyword.arg in FLAGS
                      and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)]
            found += [node.func.id] if (isinstance(node.func, ast.Name)
                                        and node.func.id in CALLS) else []
        elif isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(
                node.value, "id", "")
            found += [f"{owner}.{node.attr}"] if (owner, node.attr) in ATTRIBUTES else []
    return found


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def test_nothing_in_the_repository_unpickles_evaluates_or_asks_a_shell():
    assert len(sources()) > 100
    found = {str(path.relative_to(ROOT)): bad for path in sources()
             if (bad := violations(path.read_text("utf-8")))}
    assert not found


@pytest.mark.parametrize("line", [
    "import pickle", "import cloudpickle as c", "from dill import loads", "import joblib",
    "from torch import load", "x = torch.load(f)", "np.load(f, allow_pickle=True)",
    "np.load(f, allow_pickle=flag)", "yaml.load(f)", "yaml.load(f, Loader=yaml.SafeLoader)",
    "from yaml import load", "eval(text)", "exec(text)", "compile(text, '', 'exec')",
    "__import__(name)", "subprocess.run(c, shell=True)", "os.system(c)", "from os import system",
    "run = os.system", "os.popen(c)", "load_dataset(n, trust_remote_code=True)",
    "def f():\n    if x:\n        import pickle as p",
    "from jax.experimental import serialize_executable as s\n"
    "jax.experimental.serialize_executable.deserialize_and_load(x)",
])
def test_a_planted_violation_is_found(line):
    assert violations(f"import os\n{line}\n")


@pytest.mark.parametrize("line", [
    "model.eval()", "ast.literal_eval(x)", "yaml.safe_load(f)", "np.load(f, allow_pickle=False)",
    "subprocess.run(c, shell=False)", "loader.exec_module(m)", "re.compile(x)", "json.load(f)",
    "jax.jit(f).lower(x).compile()", "config.eval.stride"])
def test_what_runs_nothing_is_no_violation(line):
    assert not violations(f"import os\n{line}\n")


# ---------------------------------------------------------------- a config.json is data

@pytest.mark.parametrize("code", [
    "__import__('os').system('touch {place}')", "[__import__('os').system('touch {place}')]",
    "(lambda: open('{place}', 'w'))()", "$(touch {place})", "`touch {place}`",
    "{{{{open('{place}', 'w')}}}}", "!!python/object/apply:os.system ['touch {place}']"])
def test_code_in_a_config_json_runs_in_no_field(tmp_path, code):
    place = tmp_path / "pwned"
    text = code.format(place=place)
    content = json.loads(to_json(load_config(defaults())))
    for name, value in fields(load_config(defaults())).items():
        *groups, last = name.split(".")
        changed = json.loads(json.dumps(content))
        group = changed
        for part in groups:
            group = group[part]
        group[last] = [text] if isinstance(value, tuple) else text
        (tmp_path / "config.json").write_text(json.dumps(changed))
        try:
            config, _ = read_json(tmp_path / "config.json")
            assert fields(config)[name] in (text, (text,))
        except HippocampusError as error:
            assert len(error.message.splitlines()) == 1
    assert not place.exists()


def test_a_config_file_inside_a_run_folder_is_never_executed(tmp_path):
    from hippocampus.generation.loading import load

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
    (folder / "config.json").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
    with pytest.raises(DataError, match="cannot read"):
        load(folder)
    assert not (tmp_path / "pwned").exists()


# ---------------------------------------------------------------- names stay in their folder

OUTSIDE = ("../outside", "/outside", "a/../../outside", "..", ".", "", "a/b", "a\\b", "a\0b",
           "a\nb", "x" * 256)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_of_a_run_cannot_leave_the_folder_of_runs(name):
    with pytest.raises(ConfigError, match=r"^name is "):
        load_config(defaults(), {"name": name})


@pytest.mark.parametrize("place", ["a\0b", "x" * 256, "/".join(["x"] * 4000), "\ud800"])
def test_a_path_that_no_file_system_has_is_one_line(place):
    for refuse in (check_nameable, RunFolder.at, lambda p: check_free(Path(p), False)):
        with pytest.raises(ConfigError, match="cannot be a path") as caught:
            refuse(place)
        assert len(caught.value.message) < 200 and caught.value.message.isprintable()
    check_nameable("/".join(["é" * 127] * 3))


@pytest.mark.parametrize("field", ["data.corpus", "data.validation_files", "data.tokenizer"])
def test_a_path_of_a_field_that_no_file_system_has_names_the_field(field):
    with pytest.raises(ConfigError, match=rf"^{field}: 'x+… cannot be a path"):
        load_config(defaults(), {field: "x" * 300 + ".json"})


def test_a_lock_that_is_a_link_does_not_empty_the_file_behind_it(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").symlink_to(mine)
    with pytest.raises(ConfigError, match="cannot write to"):
        RunLock(RunFolder(folder))
    assert mine.read_text() == "precious"


def test_an_export_does_not_clear_a_folder_that_a_link_put_in_its_way(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("precious")
    (tmp_path / ".out.partial").symlink_to(mine)
    with pytest.raises(ConfigError, match=r"\.out\.partial is a link"), new_export(
            tmp_path / "out", overwrite=False):
        raise AssertionError("nothing may be written")
    assert (mine / "thesis.tex").read_text() == "precious"


def test_small_files_of_a_run_replace_a_link_and_do_not_follow_it(tmp_path):
    from hippocampus.files import write_atomically
    from hippocampus.runs.run_folder import cut_metrics

    mine = tmp_path / "mine"
    for name in ("metrics.jsonl", "config.json"):
        mine.write_text('{"step": 1}\n')
        (tmp_path / name).symlink_to(mine)
        if name == "metrics.jsonl":
            cut_metrics(tmp_path / name, 0)
        else:
            write_atomically(tmp_path / name, "new")
        assert mine.read_text() == '{"step": 1}\n' and not (tmp_path / name).is_symlink()


# ---------------------------------------------------------------- secrets

SECRET = "hf_" + "S3cr3tV4lueOfNobody" + "00"


@pytest.mark.parametrize(("text", "kept"), [
    (f"--token={SECRET}", "--token=***"), (f"--hf_token={SECRET}", "--hf_token=***"),
    ("--api-key=abc", "--api-key=***"), ("password: abc", "password: ***"),
    ("https://me:abc@host/x?y=1", "https://***@host/x?y=1"), ("s3://key@bucket", "s3://***@bucket"),
    ("https://h/x?token=abc&y=1", "https://h/x?token=***&y=1"),
    ("https://h/x?X-Amz-Signature=abc", "https://h/x?X-Amz-Signature=***"),
    (f"--config.data.corpus={SECRET}", "--config.data.corpus=***"),
    ("AKIAABCDEFGHIJKLMNOP", "***"), ("ghp_" + "a" * 36, "***"), ("sk-" + "a" * 30, "***"),
    ("--xla_dump_to=/x --xla_y=https://u:p@h", "--xla_dump_to=/x --xla_y=https://***@h"),
])
def test_what_looks_like_a_secret_is_hidden_and_nothing_else(text, kept):
    assert redact(text, {}) == kept


def test_the_value_of_a_secret_variable_is_hidden_wherever_it_stands():
    variables = {"WANDB_API_KEY": "0123456789abcdef", "HF_TOKEN": "tok", "PWD": "/home/me/work",
                 "HF_TOKEN_PATH": "/home/me/token", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7"}
    text = "--x=0123456789abcdef --y=/home/me/work --z=tokens --w=wJalrXUtnFEMI/K7 /home/me/token"
    assert redact(text, variables) == (
        "--x=*** --y=/home/me/work --z=tokens --w=*** /home/me/token")


def test_a_secret_in_a_word_of_its_own_is_hidden():
    assert redact_command(["train.py", "--token", "abc", "--config", "x.py", "--api_key=abc"]) == [
        "train.py", "--token", HIDDEN, "--config", "x.py", f"--api_key={HIDDEN}"]
    unchanged = ["train.py", "--token", "--config"]
    assert redact_command(unchanged) == unchanged


def test_no_field_of_a_config_looks_like_a_secret():
    command = [f"--config.{name}=value12345" for name in fields(load_config(defaults()))]
    assert redact_command(command) == command
    assert redact_command([word for flag in command for word in flag.split("=")]) == [
        word for flag in command for word in flag.split("=")]


@pytest.mark.parametrize("field", ["data.corpus", "log.wandb_project", "data.tokenizer"])
def test_an_address_with_a_password_is_refused_without_being_shown(field):
    with pytest.raises(ConfigError) as caught:
        load_config(defaults(), {field: f"https://me:{SECRET}@host/x.json"})
    assert SECRET not in str(caught.value) and field in caught.value.message


def start(workdir: Path, *flags: str, **changes) -> subprocess.CompletedProcess:
    """A run with secrets in all the places that they come to."""
    variables = {**tiny_run.environment(), "HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET + "1",
                 "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": " ".join(
                     (f"--xla_gpu_cuda_data_dir=/none?token={SECRET}2", *quick_xla.FLAGS))}
    command = [*tiny_run.command(workdir, **changes), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120)


def test_no_secret_reaches_the_run_folder_or_the_console(tmp_path):
    done = start(tmp_path / "run", train__steps=2, eval__max_windows=1)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    env = json.loads((tmp_path / "run" / "env.json").read_text())
    assert env["xla_flags"].split()[0] == f"--xla_gpu_cuda_data_dir=/none?token={HIDDEN}"
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_a_secret_on_the_command_line_is_not_kept(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/x/train.py", "--workdir=run", "--token", "abc",
                                     f"--config.data.corpus={SECRET}"])
    assert environment()["command"] == ["train.py", "--workdir=run", "--token", HIDDEN,
                                        f"--config.data.corpus={HIDDEN}"]


def test_no_secret_of_the_environment_is_printed_by_a_run_that_fails(tmp_path):
    done = start(tmp_path / "run", "--debug", data__corpus="missing.txt")
    assert done.returncode == 66 and SECRET not in done.stdout + done.stderr
    done = start(tmp_path / "run", data__corpus=f"https://me:{SECRET}@host/text.txt")
    assert done.returncode == 64 and SECRET not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()
