"""Configs from the command line: overrides by their declared types, flag files, names that were misspelt."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kd_jax.runs import config as config_lib
from kd_jax.runs.command_line import Parser
from kd_jax.runs.settings import did_you_mean, setting, spec

CONFIG = """
from ml_collections import config_dict


def get_config():
    config = config_dict.ConfigDict()
    config.experiment = "gmm"
    config.seeds = 10
    config.rate = 0.5
    config.flag = True
    config.name = "a"
    config.sizes = (1, 2)
    config.betas = (0.5, 1.0)
    config.student = config_dict.ConfigDict({"components": 5})
    return config
"""


@spec
class Student:
    components: int = setting(1, "Gaussians of the student", at_least=1)


@spec
class Spec:
    experiment: str = setting("gmm", "the experiment")
    seeds: int = setting(1, "runs", at_least=1)
    rate: float = setting(1.0, "learning rate, at most 100% of x", above=0.0)
    flag: bool = setting(False, "whether")
    name: str = setting("", "a name")
    sizes: tuple[int, ...] = setting((), "sizes")
    betas: tuple[float, ...] = setting((), "betas")
    ids: tuple[int, ...] = setting((), "token ids")
    words: tuple[str, ...] = setting((), "texts")
    limit: float | None = setting(None, "clip here; none for no limit")
    arms: dict[str, Any] = setting({}, "arms by name")
    student: Student = setting(Student(), "the student")


def flags():
    parser = Parser()
    parser.add_argument("--workdir")
    parser.add_argument("--num_processes", type=int)
    parser.flag("overwrite", "again")
    return parser


def parse_words(*words, kind=None):
    return config_lib.parse(words, flags(), lambda config: kind)


@pytest.fixture(params=[None, Spec], ids=["by value", "declared"])
def parse(tmp_path, request):
    """Both ways to know a setting's type: from the value in the config file, and from its declaration."""
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return lambda *words: parse_words(f"--config={path}", f"--workdir={tmp_path / 'run'}", *words, kind=request.param)


@pytest.fixture
def parse_declared(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return lambda *words: parse_words(f"--config={path}", *words, kind=Spec)


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("--config.seeds=5", "seeds", 5),
        ("--config.rate=1", "rate", 1.0),
        ("--config.rate=1e-3", "rate", 1e-3),
        ("--config.flag=false", "flag", False),
        ("--noconfig.flag", "flag", False),
        ("--config.flag", "flag", True),
        ("--config.name=7", "name", "7"),
        ("--config.sizes=(3,4,5)", "sizes", (3, 4, 5)),
        ("--config.betas=(1,0.1)", "betas", (1, 0.1)),
        ("--config.sizes=3", "sizes", (3,)),
        ("--config.student.components=3", "student.components", 3),
    ],
)
def test_override_sets_field_and_its_type(parse, word, key, value):
    got = config_lib.flatten(parse(word).config.to_dict())[key]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("--config.seeds=1e6", ["--config.seeds", "1e6"]),
        ("--config.seeds=100.0", ["--config.seeds", "100.0"]),
        ("--config.seeds=True", ["--config.seeds"]),
        ("--config.rate=fast", ["--config.rate", "fast"]),
        ("--config.rate", ["--config.rate"]),
        ("--config.flag=no", ["--config.flag"]),
        ("--config.sizes=(1.5,2)", ["--config.sizes", "1.5"]),
        ("--config.sizes[0]=3", ["--config.sizes[0]"]),
        ("--config.seds=3", ["--config.seds", "did you mean --config.seeds?"]),
        ("--config.student.componets=3", ["did you mean --config.student.components?"]),
        ("--config.components=3", ["did you mean --config.student.components?"]),
        ("--config.student=3", ["--config.student", "group"]),
        ("--overwite", ["did you mean --overwrite?"]),
        ("--workdri=x", ["did you mean --workdir?"]),
        ("--overwrite=maybe", ["--overwrite"]),
        ("stray", ["stray"]),
        ("--num_process=2", ["did you mean --num_processes?"]),
        ("--num_processes=two", ["--num_processes", "two"]),
        ("--config.sizes=(1,", ["--config.sizes"]),
        ("--config.sizes=none", ["--config.sizes", "tuple"]),
        ("--config.betas='1,x'", ["--config.betas=", "must be a tuple of float"]),
        ("-config.seeds=3", ["unknown flag -config.seeds; did you mean --config.seeds?"]),
    ],
)
def test_a_bad_flag_is_one_line_that_names_it(parse, word, parts, tmp_path):
    with pytest.raises(ValueError) as caught:
        parse(word)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("--config.ids=(1,7)", (1, 7)),
        ("--config.ids=1,7", (1, 7)),
        ("--config.words=a,b", ("a", "b")),
        ("--config.words=('a',)", ("a",)),
        ("--config.limit=2", 2.0),
        ("--config.limit=-1e-4", -1e-4),
        ("--config.limit=none", None),
        ("--config.arms={'a': {'top_k': 3}}", {"a": {"top_k": 3}}),
        ("--config.rate=1", 1.0),
    ],
)
def test_declared_types(parse_declared, word, value):
    got = parse_declared(word).config.to_dict()[word[len("--config.") :].split("=")[0]]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("word", ["ids=(1.7,)", "ids=(True,)", "ids=('a',)", "words=(1,)", "limit=x", "arms=3"])
def test_a_value_of_another_type_than_declared_is_refused(parse_declared, word):
    with pytest.raises(ValueError, match=f"--config.{word.split('=')[0]}"):
        parse_declared(f"--config.{word}")


def test_settings_that_the_file_leaves_out_and_names_of_the_users_own(parse_declared):
    config = parse_declared("--config.limit=0.5", "--config.arms.wide.top_k=3", "--config.arms.wide.loss=x").config
    assert config.limit == 0.5 and config.arms.to_dict() == {"wide": {"top_k": 3, "loss": "x"}}


@pytest.mark.parametrize(
    ("name", "meant"),
    [("config.lr", "config.train.learning_rate"), ("config.train.steps", "config.train.epochs"),
     ("config.loss", "config.distill.divergence"), ("config.batch", "config.train.batch_size"), ("config.zzz", None)],
)  # fmt: skip
def test_a_name_from_elsewhere_finds_ours(name, meant):
    known = [
        "config.train.learning_rate",
        "config.train.epochs",
        "config.distill.divergence",
        "config.train.batch_size",
    ]
    parser = Parser()
    for key in known:
        parser.add_argument(f"--{key}")
    with pytest.raises(ValueError) as caught:
        parser.parse_args([f"--{name}=3"])
    assert str(caught.value) == f"unknown flag --{name}" + (f"; did you mean --{meant}?" if meant else "")


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("config.student.train.lr", "; did you mean --config.student.train.learning_rate?"),
        ("config.train.steps", "; did you mean --config.train.updates or --config.train.epochs?"),
        ("config.temperature", "; did you mean --config.taus, --config.distill.loss_temperature or "
         "--config.evaluation.sample_temperatures?"),
        ("config.grad_clip", "; did you mean --config.train.clip?"),
        ("config.student.weight_decya", "; did you mean --config.student.train.weight_decay?"),
    ],
)  # fmt: skip
def test_several_meanings_are_all_named_and_the_group_counts(name, end):
    ends = ("learning_rate", "updates", "epochs", "clip", "weight_decay")
    known = [f"config.{group}train.{last}" for group in ("", "student.", "teacher.") for last in ends]
    known += ["config.taus", "config.distill.loss_temperature", "config.evaluation.sample_temperatures"]
    assert did_you_mean(name, known, "--") == end


def test_help_lists_every_setting(parse, parse_declared, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0 and "--config.student.components int" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse_declared("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "--config.rate float learning rate, at most 100% of x (above 0.0; default 0.5)" in shown
    assert "--config.limit float or none clip here" in shown and "settings: config.student" in shown
    with pytest.raises(SystemExit):
        parse_words("--help")
    assert "--workdir" in capsys.readouterr().out


def test_flagfile_counts_wherever_it_stands(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "flags.txt").write_text("--config.seeds=3\n--overwrite\n")
    words = ["--config", str(tmp_path / "config.py"), "--workdir", "w", f"--flagfile={tmp_path / 'flags.txt'}"]
    args = parse_words(*words)
    assert args.config.seeds == 3 and args.overwrite and args.workdir == "w"


def test_a_flagfile_with_an_open_quote_is_named_and_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "a.txt").write_text("--config.name=don't\n")
    with pytest.raises(ValueError, match=r"--flagfile .*a.txt: No closing quotation; .* quoted as in a shell"):
        parse_words(f"--flagfile={tmp_path / 'a.txt'}", f"--config={tmp_path / 'config.py'}")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf--config.name=x\r\n")
    config = parse_words(f"--flagfile={tmp_path / 'a.txt'}", f"--config={tmp_path / 'config.py'}").config
    assert config.name == "x"


def test_flagfiles_have_comments_and_name_others(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "a.txt").write_text(f"# seeds\n--flagfile {tmp_path / 'b.txt'}\n\n// more\n--config.name='a b'\n")
    (tmp_path / "b.txt").write_text("--config.seeds=7\n--config.flag=False\n")
    config = parse_words(f"--flagfile={tmp_path / 'a.txt'}", f"--config={tmp_path / 'config.py'}").config
    assert (config.seeds, config.flag, config.name) == (7, False, "a b")
    with pytest.raises(OSError, match=r"absent\.txt"):
        parse_words("--flagfile=absent.txt")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["config.py", "neither a file"]),
        ("def get_config():\n    return 3\n", ["ConfigDict"]),
        ("def get_config():\n    return {}['a']\n", ["KeyError", "config.py, line 2"]),
        ("def get_config(arg=''):\n    raise ValueError(f'{arg} is not known')\n", ["not known"]),
        ("x = (\n", ["SyntaxError"]),
        ("import sys\nsys.exit('no data')\n", ["config.py", "SystemExit: no data", "config.py, line 2"]),
    ],
)
def test_a_config_file_that_does_not_work_is_one_line(tmp_path, text, words):
    if text is not None:
        (tmp_path / "config.py").write_text(text)
    with pytest.raises(ValueError) as caught:
        parse_words(f"--config={tmp_path / 'config.py'}")
    assert "--config" in str(caught.value) and "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_a_config_may_import_a_file_beside_it_and_has_to_take_the_argument(tmp_path):
    (tmp_path / "beside_a_config.py").write_text("SEEDS = 7\n")
    text = CONFIG.replace("config.seeds = 10", "config.seeds = SEEDS")
    (tmp_path / "config.py").write_text("from beside_a_config import SEEDS\n" + text)
    before = list(sys.path)
    assert config_lib.load(str(tmp_path / "config.py")).seeds == 7 and sys.path == before
    with pytest.raises(ValueError, match=r"config.py:smoke: get_config\(\) in .*config.py takes no argument"):
        config_lib.load(f"{tmp_path / 'config.py'}:smoke")


def test_config_is_missing():
    with pytest.raises(ValueError, match="--config is missing"):
        parse_words("--workdir=w")


def test_config_is_locked_and_plain(parse):
    config = parse().config
    with pytest.raises(AttributeError):
        config.seds = 3
    plain = config_lib.to_dict(config)
    assert plain["sizes"] == [1, 2] and json.loads(json.dumps(plain)) == plain


def test_a_negative_number_as_a_word_of_its_own(parse_declared):
    for text in ("-1e-4", "-.5", "-3"):
        assert parse_declared("--config.limit", text).config.limit == float(text)


def test_a_config_that_comes_with_the_package_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_lib.load("gmm:smoke").experiment == "gmm"
    # a copied file still finds the one it begins with
    (tmp_path / "mine.py").write_text((config_lib._shipped() / "gmm_frontier.py").read_text())
    assert config_lib.load("mine.py").experiment == "gmm_frontier"
    with pytest.raises(ValueError, match="gm is neither a file nor one of gmm, gmm_frontier"):
        config_lib.load("gm")


def test_a_package_called_configs_in_the_users_project_hides_nothing(tmp_path):
    """In a process of its own, as in this one `configs` has been imported."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/__init__.py").write_text("")
    (tmp_path / "configs/mine.py").write_text("from configs import gmm\nget_config = gmm.get_config\n")
    (tmp_path / "configs/other.py").write_text("from configs import mine\nget_config = mine.get_config\n")
    root = str(Path(config_lib.__file__).parents[2])
    script = (
        f"import sys; sys.path.append({root!r})\nfrom kd_jax.runs import config\n"
        "print(config.load('configs/other.py:smoke').experiment, config.load('gmm_frontier').experiment)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["gmm", "gmm_frontier"], done.stderr
