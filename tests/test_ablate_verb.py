"""The verb itself: its errors are one line before anything is trained, --check writes nothing."""

import pytest
import tiny_run

import hippocampus.ablate
from hippocampus.errors import EXIT_OK, EXIT_USAGE
from hippocampus.verbs import run_verb


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "small.py"
    file.write_text("from hippocampus.config_files import defaults\n\n"
                    "def get_config():\n    return defaults()\n")
    changed = {**tiny_run.TINY, "data.corpus": tiny_run.corpus(), "model.paths": "ssm,attention",
               "model.segments.weights": "1", "name": "small"}
    return [f"--config={file}", *(f"--config.{name}={value}" for name, value in changed.items())]


def outcome(capsys, *arguments) -> tuple[int, str, list[str]]:
    with pytest.raises(SystemExit) as caught:
        run_verb(hippocampus.ablate.main, list(map(str, arguments)))
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err.splitlines()


@pytest.mark.parametrize(("flags", "words"), [
    (["--over=model.n_layer=1,2"], "model.n_layer is not a field"),
    (["--over=model.n_heads=2,5"], "model.d_model = 16 is not a multiple of model.n_heads = 5"),
    (["--over=model.n_layers=2"], "one cell has nothing to be compared with"),
    (["--over=model.n_layers=1,2", "--baseline=n_layers=3"], "there is no cell 'n_layers=3'"),
    (["--over=model.n_layers=1,2", "--match=flops"], "--match has nothing to match"),
    (["--match=time"], "--match is 'time'"),
    (["--seeds=none"], "invalid int value"),
    (["--seeds=0"], "--seeds is 0"),
    (["--out=gs://bucket/x"], "is not on a file system"),
    (["--max_windows=-1"], "--max_windows is -1"),
    (["--target_loss=nan"], "--target_loss is nan"),
])
def test_a_mistake_is_one_line_and_nothing_is_written(capsys, config, tmp_path, flags, words):
    out = [] if any(flag.startswith("--out") for flag in flags) else [f"--out={tmp_path / 'out'}"]
    code, printed, errors = outcome(capsys, *config, *flags, *out)
    assert code == EXIT_USAGE and printed == ""
    assert len(errors) == 2 and errors[0].startswith("error: ") and words in errors[0]
    assert errors[1].startswith("hint: ")
    assert not (tmp_path / "out").exists()


def test_check_lists_the_cells_with_what_they_cost_and_writes_nothing(capsys, config, tmp_path):
    code, printed, errors = outcome(capsys, *config, "--check", "--match=parameters",
                                    f"--out={tmp_path / 'out'}")
    assert (code, errors) == (EXIT_OK, [])
    assert "small: 5 cells x 3 seeds" in printed
    for cell in ("full", "ssm", "attn", "ssm (same parameters)", "attn (same parameters)"):
        assert any(line.startswith(f"{cell} ") for line in printed.splitlines())
    assert "0 of 3" in printed and "model.mlp.width = " in printed
    assert not (tmp_path / "out").exists()
